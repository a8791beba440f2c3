// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! spte-core
#![cfg_attr(not(any(feature = "std", test, loom)), no_std)]

extern crate alloc;

mod entry;
mod flush;
pub mod format;
mod pages;

pub use entry::Entry;
pub use flush::{Flush, FlushError, FlushRange, FlushRequest};
pub use pages::{OutOfPages, PageSource, TableLayout};
