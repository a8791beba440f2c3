// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The VMCB of a guest in 64-bit mode (APM volume 2, appendix B), as words of memory.

use spte_x86::{Levels, Pat};

use crate::memory::Memory;

/// The guest's address space. QEMU looks at it for nothing, and VMRUN refuses 0.
pub(crate) const ASID: u64 = 1;

/// INVALID: VMRUN refuses the guest.
pub(crate) const EXIT_INVALID: u64 = u64::MAX;
/// A page fault.
pub(crate) const EXIT_PAGE_FAULT: u64 = 0x4e;
/// VMMCALL.
pub(crate) const EXIT_VMMCALL: u64 = 0x81;
/// A nested page fault.
pub(crate) const EXIT_NESTED: u64 = 0x400;

const INTERCEPT_EXCEPTIONS: u64 = 0x008;
const INTERCEPT_VM: u64 = 0x010;
const ASID_AND_TLB: u64 = 0x058;
const NESTED_ENABLE: u64 = 0x090;
/// The root of the nested table.
pub(crate) const NESTED_CR3: u64 = 0x0b0;
const SEGMENTS: [(u64, u64); 4] = [(0x400, DATA), (0x410, CODE), (0x420, DATA), (0x430, DATA)];
const CPL: u64 = 0x4c8;
const EFER: u64 = 0x4d0;
const CR4: u64 = 0x548;
/// The root of the guest's own table.
pub(crate) const CR3: u64 = 0x550;
const CR0: u64 = 0x558;
const DR7: u64 = 0x560;
const DR6: u64 = 0x568;
const RFLAGS: u64 = 0x570;
/// Where the guest is.
pub(crate) const RIP: u64 = 0x578;
/// The one general register besides rsp that the VMCB has.
pub(crate) const RAX: u64 = 0x5f8;
const PAT: u64 = 0x668;

/// Selector, attributes and limit of ES, SS and DS: all 4 GiB, DPL 3.
const DATA: u64 = 0xffff_ffff_0cf3_0010 | 3;
/// Of CS: 64-bit, DPL 3.
const CODE: u64 = 0xffff_ffff_0afb_0008 | 3;

/// Fills the VMCB at `at`: CPL 3, paging of so many levels, write protection on, no-execute on or not, interrupts off. Every
/// exception, HLT, shutdown and VMMCALL come out.
pub(crate) fn fill(memory: &Memory, at: u64, levels: Levels, no_execute: bool, nested: bool) {
    (0..512).for_each(|word| memory.store(at + 8 * word, 0));
    let set = |field: u64, value: u64| memory.store(at + field, value);
    set(INTERCEPT_EXCEPTIONS, 0xffff_ffff | (1 << 24 | 1 << 31) << 32);
    // VMRUN has to be among them.
    set(INTERCEPT_VM, 1 << 0 | 1 << 1);
    set(ASID_AND_TLB, ASID);
    set(NESTED_ENABLE, u64::from(nested));
    SEGMENTS.iter().for_each(|(field, value)| set(*field, *value));
    // One byte of this word.
    set(CPL, 3 << 24);
    // SVME, NXE, LMA, LME.
    set(EFER, 1 << 12 | u64::from(no_execute) << 11 | 1 << 10 | 1 << 8);
    // PAE, LA57.
    set(CR4, 1 << 5 | u64::from(levels == Levels::Five) << 12);
    // PG, WP, ET, PE.
    set(CR0, 1 << 31 | 1 << 16 | 1 << 4 | 1 << 0);
    set(DR7, 0x400);
    set(DR6, 0xffff_0ff0);
    set(RFLAGS, 1 << 1);
    set(PAT, Pat::RESET.raw());
}
