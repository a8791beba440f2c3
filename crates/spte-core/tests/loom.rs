// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Models of the engine.
#![cfg(loom)]

#[path = "loom/harness.rs"]
mod harness;
#[path = "loom/tiny.rs"]
mod tiny;

#[path = "loom/flushes.rs"]
mod flushes;
#[path = "loom/teardown.rs"]
mod teardown;
#[path = "loom/windows.rs"]
mod windows;
