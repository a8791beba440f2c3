// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The plain sequential truth about a page table of a secondary MMU.
//!
//! A real table here is concurrent, radix and made of bits. This crate says what such a table must
//! *answer*, with a sorted map of leaves and nothing else: no lock, no walk, no bit, and no code
//! shared with the engine or the formats, so that a mistake there cannot be repeated here. It is
//! meant to be read in one sitting and believed.
//!
//! - [`Op`] is one operation. Property tests, fuzz targets, the `spte` command and checks against
//!   real MMUs all speak it; it prints and parses as a line of the script language
//!   ([`parse_script`]), and [`Op::decode`] makes interesting ones out of arbitrary bytes.
//! - [`Shape`] is what a format can do, without its bits: leaf sizes, address widths, permissions.
//! - [`Model`] applies operations: [`Model::apply`] returns the [`Outcome`] that a table must give,
//!   or the [`Reject`] reason if the operation is malformed.
//! - [`Extent`] is the canonical view, for a table that may choose other leaf sizes.
//!
//! ```
//! use spte_model::{Model, Op, Outcome, Shape};
//!
//! let mut table = Model::new(Shape::ept());
//! table.apply(&"map 0x200000 0x40000000 2m rwx page=max".parse()?)?;
//! table.apply(&"change 0x201000 0x7000".parse()?)?;
//!
//! // The page moved and is read-only; its neighbours are where they were.
//! assert_eq!(table.translate(0x201234).map(|page| page.out), Some(0x7234));
//! assert!(!table.writable(0x201000));
//! assert!(table.writable(0x202000));
//! let write: Op = "touch 0x201000 w".parse()?;
//! assert_eq!(table.apply(&write)?.to_string(), "fault perm");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
#![forbid(unsafe_code)]

mod check;
mod decode;
mod extent;
mod model;
mod op;
mod outcome;
mod script;
mod shape;
#[cfg(any(test, feature = "proptest"))]
pub mod strategy;

pub use check::{Quantity, Reject};
pub use extent::{Extent, coalesce};
pub use model::{Leaf, LeafError, Logging, MAX_LEAVES, Model};
pub use op::{Access, MemType, Op, PageChoice, TouchKind};
pub use outcome::{Fault, Outcome};
pub use script::{Command, ParseError, Script, ScriptError, Why, parse_script};
pub use shape::{Shape, ShapeError};
