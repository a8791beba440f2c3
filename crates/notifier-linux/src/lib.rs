// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory on Linux whose backing changes only inside invalidation windows.
#![cfg(target_os = "linux")]

mod kernel;

pub use kernel::{Call, Kernel};
