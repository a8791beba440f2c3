// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A real table beside the plain sequential truth.
//!
//! `spte-model` says what a table must answer; `spte-core` is a table. This crate puts one operation after the other to both
//! and compares, so that property tests of every format, fuzz targets and tests that run out of memory need one driver and
//! not one each. It knows no format: [`Driven`] is what it has to be told of one.
//!
//! - [`Driver`] carries an [`Op`](spte_model::Op) out on a [`Table`](spte_core::Table) as a small VMM would: faults that
//!   resolve, dirty logging, windows, harvests.
//! - [`Pair`] is a driver and a model. [`Pair::step`] applies an operation to both and compares the answers, the leaves,
//!   what was reported of what is gone, and every raw entry with the format's own rules.
//! - [`ScarcePages`] is a page source that runs out when it is told to. What an operation leaves that found no page is
//!   compared too: nothing may be there that was neither there before nor asked for, and nothing may be lost.
//! - [`Tlb`] is the hardware beside the table: it keeps what was touched until a flush names it, so that a flush that is
//!   missing, or names too little, is a disagreement.
//! - [`Hardware`] is who walks: [`Software`] alone, or an MMU that somebody else made.
//! - [`agree`] runs a whole sequence, [`agree_in_want`] one that now and then finds no page.
//! - [`forward!`] makes a format of another, for faults that are planted.
//! - [`operations`] is all that a format's functions may make of a leaf, without a table.
//! - [`Machine`] is a table alone, for tests that are written by hand: it looks at each flush while it is under way.
//!
//! Nothing here panics on any input, whatever the table does: what is wrong comes back as a [`Disagreement`]. ([`Machine`]
//! and [`operations`] do: what they are told is written by hand, and what goes wrong fails the test.)
#![warn(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod bytes;
mod driver;
mod forward;
mod hardware;
mod leaf;
mod machine;
mod pages;
mod pair;
mod tlb;

pub use driver::{DriveError, Driven, Driver, Wrong, access};
pub use hardware::{Caches, Hardware, Refusal, Software, Trouble};
pub use leaf::{operations, plain_leaf};
pub use machine::{Machine, Seen, Watch, WatchedTable, named, range};
pub use pages::ScarcePages;
pub use pair::{Disagreement, Pair, Step, Why, agree, agree_in_want};
pub use tlb::Tlb;
