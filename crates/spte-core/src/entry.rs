// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One entry in memory.
use core::sync::atomic::AtomicU64;
/// One entry.
#[derive(Debug)]
#[repr(transparent)]
pub struct Entry(AtomicU64);
