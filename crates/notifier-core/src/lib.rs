// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! notifier-core
#![cfg_attr(not(any(feature = "std", test, loom)), no_std)]

extern crate alloc;

mod access;
mod addr;

pub use access::Access;
pub use addr::{Address, AddrRange, Gpa, GpaRange, Hva, HvaRange, OutputAddr, OutputRange, RangeError};
