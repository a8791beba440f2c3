// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The `spte` command: page-table entries in words, scripts run on real tables, tables in images of memory.
//!
//! The binary is [`cli::run`] with the process's arguments and streams. Everything else is here to be tested, and for
//! programs that want a part of it:
//!
//! | to | look at |
//! |---|---|
//! | run a script on a table | [`machine`], with [`script`] for the language and [`answer`] for what is printed |
//! | explain a raw entry | [`format::ToolFormat::explain`] |
//! | print a table of a memory image | [`image`] |
//! | add a format | [`format::ToolFormat`], and a name in [`setup`] |
//!
//! A format is one module like `x86`, `arm64` or `ppc`, which says in a [`format::ToolFormat`] what the engine does not ask: names of fields, masks,
//! memory types, the flushes it owes; and one arm in [`setup`]'s two matches. Nothing else changes.
//!
//! What commands print is compared by machine, and never changes. `tests/rules.rs` has its fourteen rules, each with the
//! bytes that it asks for; what they leave open is in the crate's README, under "In detail".
#![forbid(unsafe_code)]

pub mod answer;
mod arm64;
pub mod cli;
pub mod decode;
pub mod format;
pub mod image;
pub mod machine;
mod mips;
mod ppc;
mod ranges;
pub mod script;
pub mod setup;
mod x86;
