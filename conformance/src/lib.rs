// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every format, read by an MMU that somebody else wrote.
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
pub mod vmm;
