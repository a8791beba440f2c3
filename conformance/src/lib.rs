// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every format, read by an MMU that nobody here wrote.
//!
//! A page table is right when hardware agrees. Here emulators walk the tables that our crates write: guest memory is a file
//! that an emulator maps and this program does too, table pages are allocated in it, flushes are carried out by a small stub at
//! the hypervisor's privilege, and a guest's loads, stores and fetches come to what the model says, or not.
//!
//! | to | look at |
//! |---|---|
//! | know what a machine is asked | [`machine`] |
//! | write a driver for another one | [`machines`], [`mailbox`], [`emulator`], [`memory`] |
//! | put random operations to a table that a machine walks | [`sequence`], [`mmu`] |
//! | turn every bit of an entry | [`entries`] |
//! | let hardware write accessed and dirty meanwhile | [`facts`] |
//! | see `change_pte` from a guest | [`change`], [`vmm`] |
//! | see that a check can fail | [`plants`] |
//! | write a test of a machine | [`testing`] |
//!
//! The command `conformance` does all of it; [`report`] is what it runs on each machine.

pub mod change;
pub mod emulator;
pub mod entries;
pub mod facts;
pub mod machine;
pub mod machines;
pub mod mailbox;
pub mod memory;
pub mod mmu;
pub mod plants;
pub mod report;
pub mod sequence;
pub mod testing;
pub mod vmm;
