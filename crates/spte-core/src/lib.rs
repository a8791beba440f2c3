// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One concurrent radix page table for every secondary-MMU format.
//!
//! A VMM keeps second copies of the host's translations: EPT, NPT and stage-2 tables, guest tables that it owns, the
//! tables of a device. Each is a radix tree of 64-bit entries that hardware walks while many threads change it, and each
//! has to follow when the host's mapping changes. This crate is that tree, once: it knows no bit of any format, and the
//! protocol by which host changes arrive is `notifier-core`'s. Formats (`spte-x86` and others) are pure functions on
//! one entry.
//!
//! # Concepts
//!
//! - A [`Format`] says what an entry means and how one may become another; see [`format`](mod@format), and [`examine`] for tests of
//!   one of your own.
//! - A [`PageSource`] gives pages that hardware can walk; [`HeapPages`] is one for tables that only software walks.
//! - A [`Flush`] carries out what caches in hardware must forget; `()` where there are none.
//! - A [`Table`] puts the three together. It belongs to one [`Space`](notifier_core::Space), and follows its windows
//!   as soon as it has [subscribed](notifier_core::Space::subscribe).
//! - **Adding** (mapping, raising rights, merging) takes an [`Admission`](notifier_core::Admission), which only a fault
//!   lends: nothing is published that a window has overtaken.
//! - **Taking away** ([`unmap`](Table::unmap), [`restrict`](Table::restrict), [`arm`](Table::arm)) needs nothing, and
//!   returns after the flush.
//! - **Walking** in software ([`translate`](Table::translate)) happens inside a [`Scope`](notifier_core::Scope): every
//!   flush waits for the scopes that were entered before it.
//! - **`change_pte`** is [`InvalidationGuard::change_pte`](notifier_core::InvalidationGuard::change_pte): the table
//!   repoints leaves of a Retained window without taking them away, where the format allows that.
//!
//! # Example
//!
//! A page is mapped by a fault, written, and goes when the host says so. (The format is a toy of one level; it is part of
//! this example's source.)
//!
//! ```
//! # mod toy {
//! #     use notifier_core::{Access, OutputAddr};
//! #     use spte_core::format::*;
//! #     const PRESENT: u64 = 1;
//! #     const WRITE: u64 = 2;
//! #     const DIRTY: u64 = 4;
//! #     const ADDRESS: u64 = !0xfff & !(0xf << 60);
//! #     pub struct Toy(pub Geometry);
//! #     impl Toy {
//! #         pub fn new() -> Option<Self> {
//! #             Geometry::new(&[LevelShape { shift: 12, bits: 4, leaf: true }]).map(Self)
//! #         }
//! #     }
//! #     impl Format for Toy {
//! #         type Attrs = ();
//! #         fn name(&self) -> &'static str { "toy" }
//! #         fn geometry(&self) -> &Geometry { &self.0 }
//! #         fn not_present(&self, _: Level) -> NotPresent { NotPresent { absent: 0, claimed: 1 << 60, dead: 1 << 61 } }
//! #         fn claim_bit(&self) -> u64 { 1 << 62 }
//! #         fn hardware_bits(&self, _: Level, _: u64) -> u64 { DIRTY }
//! #         fn kind(&self, _: Level, raw: u64) -> Kind {
//! #             if raw & PRESENT != 0 { return Kind::Leaf }
//! #             self.not_present(Level::LEAF).kind(raw, DIRTY).unwrap_or(Kind::Special)
//! #         }
//! #         fn table(&self, _: Level, _: OutputAddr) -> Result<u64, FormatError> {
//! #             Err(FormatError::NoLeaf { number: 1 })
//! #         }
//! #         fn leaf(&self, _: Level, spec: &LeafSpec<()>) -> Result<u64, FormatError> {
//! #             let write = if spec.access.writable() { WRITE } else { 0 };
//! #             let dirty = if spec.dirty { DIRTY } else { 0 };
//! #             Ok(spec.output.as_u64() & ADDRESS | PRESENT | write | dirty)
//! #         }
//! #         fn spec(&self, _: Level, raw: u64) -> LeafSpec<()> {
//! #             let access = if raw & WRITE != 0 { Access::RWX } else { Access::RX };
//! #             let output = OutputAddr::new(raw & ADDRESS);
//! #             LeafSpec { output, access, armed: false, accessed: true, dirty: raw & DIRTY != 0, attrs: () }
//! #         }
//! #         fn set_spte(&self, _: Level, _: u64, output: OutputAddr) -> Result<u64, FormatError> {
//! #             Ok(output.as_u64() & ADDRESS | PRESENT)
//! #         }
//! #         fn with_access(&self, _: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
//! #             Ok(if access.writable() { raw | WRITE } else { raw & !WRITE })
//! #         }
//! #         fn write_protect(&self, _: Level, raw: u64, _: WriteProtect) -> u64 { raw & !(WRITE | DIRTY) }
//! #         fn upgrade(&self, _: Level, _: u64) -> Option<u64> { None }
//! #         fn is_young(&self, _: Level, _: u64) -> bool { true }
//! #         fn make_old(&self, _: Level, raw: u64) -> u64 { raw }
//! #         fn make_young(&self, _: Level, raw: u64) -> u64 { raw }
//! #         fn is_dirty(&self, _: Level, raw: u64) -> bool { raw & DIRTY != 0 }
//! #         fn make_clean(&self, _: Level, raw: u64) -> u64 { raw & !DIRTY }
//! #         fn touch(&self, _: Level, raw: u64, access: Access) -> Touch {
//! #             match (access.writable(), raw & WRITE != 0) {
//! #                 (false, _) => Touch::Allowed(raw),
//! #                 (true, true) => Touch::Allowed(raw | DIRTY),
//! #                 (true, false) => Touch::Denied,
//! #             }
//! #         }
//! #         fn split(&self, _: Level, raw: u64, _: usize) -> u64 { raw }
//! #         fn collapse(&self, _: Level, _: u64) -> Option<u64> { None }
//! #         fn merge_facts(&self, _: Level, into: u64, _: Level, from: u64) -> u64 { into | from & DIRTY }
//! #         fn transition(&self, _: Level, _: u64, _: u64) -> Transition { Transition::FLUSH }
//! #         fn check(&self, _: Level, _: u64) -> Result<(), EntryError> { Ok(()) }
//! #     }
//! # }
//! use std::sync::Arc;
//! use notifier_core::{Access, AddrRange, Extent, Gpa, OutputAddr, Space};
//! use spte_core::{HeapPages, MapOptions, Miss, Table};
//!
//! let space = Space::new();
//! # let format = toy::Toy::new().unwrap();
//! let table = Table::new(&space, format, Arc::new(HeapPages::new()), ())?;
//! let subscription = space.subscribe(Arc::clone(&table))?;
//!
//! // A vCPU walks, misses, and faults the page in: snapshot, resolve, install.
//! let mut vcpu = space.walker();
//! let page = AddrRange::with_len(Gpa::new(0x3000), 0x1000)?;
//! let scope = vcpu.enter();
//! assert!(matches!(table.translate(&scope, page.start(), Access::WRITE), Err(Miss::Absent { .. })));
//! scope
//!     .fault(page)?
//!     .resolve(|fault| {
//!         let output = OutputAddr::new(0x8000);
//!         Ok::<_, std::io::Error>(Extent { guest: fault.range(), output, access: Access::RWX })
//!     })?
//!     .install(|admission| table.map(admission, &MapOptions::default()))?;
//!
//! // What is found in a scope is good until the scope ends.
//! {
//!     let scope = vcpu.enter();
//!     let found = table.translate(&scope, Gpa::new(0x3010), Access::WRITE)?;
//!     assert_eq!(found.output(), OutputAddr::new(0x8010));
//! }
//! assert_eq!(table.harvest_dirty(page)?, [page]);
//!
//! // The host is about to change the page: while the window is open, nobody translates it.
//! let window = space.zap(page)?;
//! assert!(matches!(table.translate(&vcpu.enter(), page.start(), Access::READ), Err(Miss::Absent { .. })));
//! window.close()?;
//! # drop(subscription);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # What it keeps
//!
//! Each rule has tests named after it (`tests/`), over every flavour of a tiny format: with and without a claim bit, in
//! place and break-before-make, with and without hardware's accessed and dirty, late facts, either byte order, mirrored
//! pages.
//!
//! | | rule |
//! |---|---|
//! | I9 | a table page is freed after the flush and after everybody who could be looking has gone; nothing is published into one that is unlinked |
//! | I10 | a failed operation is not half-way inside an entry, and says how far it came |
//! | I12 | accessed and dirty facts reach the caller before the operation that removes them returns |
//! | I13 | no different translation is visible during split and collapse; where the format has a claim bit and needs no break, no software walker misses either |
//! | I14 | no leaf grants what its install or a later check did not |
//!
//! Out of memory is an error, a failed flush is an error and stays owed, no input panics, and nothing recurses.
//!
//! # What it does not do
//!
//! - It finds no host memory: what a page is resolved to is the caller's, under a fault.
//! - It keeps no dirty bitmap: facts go to the space's [`DirtySink`](notifier_core::DirtySink), or are
//!   [harvested](Table::harvest_dirty).
//! - It sends no interrupt and programs no register: that is [`Flush`]'s and the VMM's.
//! - It follows no table that somebody else made. Where a guest can write the page that hardware walks, the engine keeps a
//!   private one beside it ([`PageSource::mirror`]).
//! - It is not for hashed tables.
//! - Formats that must break before they make hold a claim across a flush. Whoever is inside a scope must not call what
//!   waits for claims (anything but [`translate`](Table::translate), [`upgrade`](Table::upgrade),
//!   [`make_young`](Table::make_young), [`age`](Table::age) and the operations that only look).
//!
//! # Features
//!
//! `std` (default): blocking waits and the shared epoch collector. Without it the crate is `no_std` with `alloc`.
#![cfg_attr(not(any(feature = "std", test, loom)), no_std)]

extern crate alloc;

mod batch;
mod change;
mod entry;
pub mod examine;
mod facts;
mod flush;
pub mod format;
mod heap;
mod map;
mod pages;
pub mod raw;
mod remove;
pub mod sets;
mod shape;
mod subscriber;
mod table;
mod walk;

pub use batch::FlushFailed;
pub use entry::Entry;
pub use facts::HarvestError;
pub use flush::{Flush, FlushError, FlushRange, FlushRequest, Leaves};
pub use format::{Format, Level};
pub use heap::HeapPages;
pub use map::{MapError, MapOptions, Mapped, Upgrade};
pub use pages::{OutOfPages, PageSource, TableLayout};
pub use remove::{RemoveError, Removed};
pub use sets::FoldError;
pub use shape::{CollapseError, SplitError};
pub use table::{Table, TableError, TableRangeError};
pub use walk::{Found, Miss, Stats, Translation};
