// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! spte-core
#![cfg_attr(not(any(feature = "std", test, loom)), no_std)]

extern crate alloc;

mod batch;
mod change;
mod entry;
mod facts;
mod flush;
pub mod format;
mod heap;
mod map;
mod pages;
mod remove;
mod shape;
mod subscriber;
mod table;
mod walk;

pub use batch::FlushFailed;
pub use entry::Entry;
pub use facts::HarvestError;
pub use flush::{Flush, FlushError, FlushRange, FlushRequest};
pub use format::{Format, Level};
pub use heap::HeapPages;
pub use map::{MapError, MapOptions, Mapped, Upgrade};
pub use pages::{OutOfPages, PageSource, TableLayout};
pub use remove::{RemoveError, Removed};
pub use shape::{CollapseError, SplitError};
pub use table::{Table, TableError, TableRangeError};
pub use walk::{Found, Miss, Stats, Translation};
