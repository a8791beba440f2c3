// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The library alone, under stress: threads that fault, repoint, zap, age, split, collapse, harvest, replace slots, join
//! and leave, all at once, and every read checked against the truth. It knows no format: a [`Config`] says which tables a
//! run is made of.
//!
//! The machine is made up (`host.rs`): frames with a tag that says whose contents they hold, a mapping of guest pages to
//! frames that changes only inside windows, and a ledger of all writes that no translation has a part in. A frame whose
//! window has promised that nobody translates to it is poisoned at once and soon used for another page. So a translation
//! that is stale for a moment reads a wrong tag or writes a frame of somebody else, and a write that comes between a
//! comparison and its `change_pte` is missing from the copy. Several times a second all threads rest, and everything is
//! compared (`run.rs`): frames with the ledger, every leaf with the mapping, what a migration copied with what there is,
//! table pages with what can be reached.
//!
//! What the threads do is in `work.rs` and its neighbours `guest.rs`, `windows.rs` and `members.rs`; a run counts it
//! (`activity.rs`) and goes on until each kind has happened. That the checks can fail is a test too: with a [`Sabotage`] the
//! machine itself breaks one rule of the library's contract, and [`found`] wants that noticed.
//!
//! | variable | meaning | unless set |
//! |---|---|---|
//! | `SPTE_STRESS_SECONDS` | how long the runs of a test take, together: [`seconds`] | 3 |
//! | `SPTE_STRESS_SEED` | the seed of all choices; the schedule is the machine's: [`seed`] | from the clock |
//!
//! - [`holds`] runs, and panics where something is wrong.
//! - [`found`] runs with a [`Sabotage`], and panics where nothing is noticed.
//! - [`join`] makes a table of a format, with a flush that dawdles and may fail, and joins it to the run's space.
#![forbid(unsafe_code)]

mod activity;
mod config;
mod guest;
mod host;
mod members;
mod random;
mod run;
mod tables;
mod windows;
mod work;

pub use config::{Config, Join, Sabotage, found, holds, seconds, seed};
pub use tables::{Member, join};
