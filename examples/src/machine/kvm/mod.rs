// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine on x86-64.

mod control;
mod probe;
mod program;
mod stats;
mod tables;
mod vcpu;
mod vm;

pub use probe::probe;
pub use tables::{ControlPages, GuestTable};
pub use vcpu::{BUFFER_PAGES, Vcpu};
pub use vm::Machine;
