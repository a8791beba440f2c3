// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The control region: what the machine itself keeps in guest-physical memory, above RAM.
//!
//! | pages | what | the guest's rights |
//! |---|---|---|
//! | 0 | GDT | supervisor, read |
//! | 1 | IDT | supervisor, read |
//! | 2 | stub | supervisor, read and execute |
//! | 3 | program | user, read and execute |
//! | then for each vCPU 1 | TSS | supervisor, read |
//! | 1 | CPL0 stack | supervisor, read and write |
//! | 1 + [`BUFFER_PAGES`] | job list and buffer | user, read and write |
//! | the rest | table pages | none: not mapped |
//!
//! The layouts are hardware's: Intel SDM volume 3, "Protected-Mode Memory Management", "Interrupt and Exception Handling"
//! (64-bit mode IDT) and "Task Management in 64-bit Mode".

use notifier_core::{Access, Gpa};
use vm_memory::{Bytes, MmapRegion, VolatileMemory, VolatileMemoryError, VolatileSlice};

use super::{
    program::{self, DONE_PORT, ENTRY_BYTES, FRAME_BYTES, Frame, VECTORS},
    vcpu::BUFFER_PAGES,
};
use crate::machine::{MachineError, PAGE};

const GDT: usize = 0;
const IDT: usize = 1;
const STUB: usize = 2;
const PROGRAM: usize = 3;
/// Pages that all vCPUs share.
const SHARED: usize = 4;

const TSS: usize = 0;
const STACK: usize = 1;
const JOBS: usize = 2;
const BUFFER: usize = 3;
/// Pages of each vCPU.
const PER_VCPU: usize = BUFFER + BUFFER_PAGES;

/// Segment selectors: index in the GDT, times 8, and the privilege level asked for.
pub(super) const KERNEL_CODE: u16 = 1 << 3;
pub(super) const USER_DATA: u16 = 3 << 3 | 3;
pub(super) const USER_CODE: u16 = 4 << 3 | 3;
/// The TSS has no descriptor in the GDT: KVM sets the task register's hidden part, and nobody loads it again.
pub(super) const TASK: u16 = 5 << 3;
/// Null, code and data at CPL0, data and code at CPL3; all accessed, so that the processor writes none of them.
const DESCRIPTORS: [u64; 5] =
    [0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff, 0x00cf_f300_0000_ffff, 0x00af_fb00_0000_ffff];
pub(super) const GDT_LIMIT: u16 = size_of_val(&DESCRIPTORS) as u16 - 1;
pub(super) const IDT_LIMIT: u16 = (16 * VECTORS) as u16 - 1;
/// Where the TSS has its I/O permission bitmap: behind its fixed part.
const IO_BITMAP: usize = 104;
/// The program may use one port. A bit that is set forbids; the byte after the last that counts is to be all ones.
///
/// An I/O privilege level of 3 would allow it as well, but not on every KVM: where guest code at CPL3 runs without the
/// processor's virtualisation, RFLAGS are not the guest's own.
const PORTS: [u8; 4] = {
    let mut ports = [0xff; 4];
    ports[DONE_PORT as usize / 8] &= !(1 << (DONE_PORT % 8));
    ports
};
pub(super) const TSS_LIMIT: u16 = (IO_BITMAP + PORTS.len()) as u16 - 1;

/// One copy that the guest makes: `qwords` times 8 bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Transfer {
    pub(super) src: Gpa,
    pub(super) dst: Gpa,
    pub(super) qwords: u64,
}

impl Transfer {
    /// Bytes of one in a job list.
    const BYTES: usize = 24;
    /// How many fit a list.
    pub(super) const MOST: usize = (PAGE - 8) / Self::BYTES;
}

/// A stretch of the region that the guest can reach, and how.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mapping {
    pub(super) at: Gpa,
    pub(super) bytes: u64,
    pub(super) access: Access,
    pub(super) user: bool,
}

/// The region: its memory, and where the guest has it.
#[derive(Debug)]
pub(super) struct Control {
    memory: MmapRegion<()>,
    base: Gpa,
    vcpus: usize,
}

impl Control {
    /// Bytes that are needed, table pages included.
    pub(super) fn bytes(vcpus: usize, table_pages: usize) -> usize {
        (SHARED + vcpus * PER_VCPU + table_pages) * PAGE
    }

    /// A region at `base`, filled in.
    pub(super) fn new(base: Gpa, vcpus: usize, table_pages: usize) -> Result<Self, MachineError> {
        let memory = MmapRegion::new(Self::bytes(vcpus, table_pages))?;
        let control = Self { memory, base, vcpus };
        control.fill().map_err(|_| MachineError::Outside { at: base })?;
        Ok(control)
    }

    fn fill(&self) -> Result<(), VolatileMemoryError> {
        for (index, descriptor) in DESCRIPTORS.iter().enumerate() {
            self.put(GDT * PAGE + index * 8, *descriptor)?;
        }
        for vector in 0..VECTORS {
            let entry = self.at(STUB).as_u64() + (vector * ENTRY_BYTES) as u64;
            // An interrupt gate (type 14), present, for CPL0, on the stack that the TSS names.
            let low = entry & 0xffff | u64::from(KERNEL_CODE) << 16 | 0x8e << 40 | (entry & 0xffff_0000) << 32;
            self.put(IDT * PAGE + vector * 16, low)?;
            self.put(IDT * PAGE + vector * 16 + 8, entry >> 32)?;
        }
        for (page, code) in [(STUB, program::stub()), (PROGRAM, program::program())] {
            self.slice(page * PAGE, code.len())?.copy_from(code);
        }
        for vcpu in 0..self.vcpus {
            // RSP0 is at byte 4, the bitmap's place at byte 102.
            let tss = self.own(vcpu, TSS) * PAGE;
            let stack_end = self.stack(vcpu).as_u64() + PAGE as u64;
            self.slice(tss + 4, 8)?.copy_from(&stack_end.to_le_bytes());
            self.slice(tss + 102, 2)?.copy_from(&(IO_BITMAP as u16).to_le_bytes());
            self.slice(tss + IO_BITMAP, PORTS.len())?.copy_from(&PORTS);
        }
        Ok(())
    }

    fn own(&self, vcpu: usize, page: usize) -> usize {
        SHARED + vcpu * PER_VCPU + page
    }

    fn at(&self, page: usize) -> Gpa {
        self.base.wrapping_add((page * PAGE) as u64)
    }

    fn slice(&self, offset: usize, bytes: usize) -> Result<VolatileSlice<'_>, VolatileMemoryError> {
        self.memory.get_slice(offset, bytes)
    }

    fn put(&self, offset: usize, value: u64) -> Result<(), VolatileMemoryError> {
        self.slice(offset, 8)?.write_obj(value, 0)
    }

    /// The host's mapping of it.
    pub(super) fn memory(&self) -> &MmapRegion<()> {
        &self.memory
    }

    pub(super) fn base(&self) -> Gpa {
        self.base
    }

    pub(super) fn gdt(&self) -> Gpa {
        self.at(GDT)
    }

    pub(super) fn idt(&self) -> Gpa {
        self.at(IDT)
    }

    /// Where the program begins.
    pub(super) fn program(&self) -> Gpa {
        self.at(PROGRAM)
    }

    pub(super) fn tss(&self, vcpu: usize) -> Gpa {
        self.at(self.own(vcpu, TSS))
    }

    fn stack(&self, vcpu: usize) -> Gpa {
        self.at(self.own(vcpu, STACK))
    }

    pub(super) fn jobs(&self, vcpu: usize) -> Gpa {
        self.at(self.own(vcpu, JOBS))
    }

    pub(super) fn buffer(&self, vcpu: usize) -> Gpa {
        self.at(self.own(vcpu, BUFFER))
    }

    /// The first table page, as a page of the region, and how many there are.
    pub(super) fn table_pages(&self) -> std::ops::Range<usize> {
        self.own(self.vcpus, 0)..self.memory.size() / PAGE
    }

    /// What of the region the guest's tables are to map.
    pub(super) fn mappings(&self) -> Vec<Mapping> {
        let mapping = |page, pages: usize, access, user| Mapping {
            at: self.at(page),
            bytes: (pages * PAGE) as u64,
            access,
            user,
        };
        let mut all = vec![
            mapping(GDT, 1, Access::READ, false),
            mapping(IDT, 1, Access::READ, false),
            mapping(STUB, 1, Access::RX, false),
            mapping(PROGRAM, 1, Access::RX, true),
        ];
        for vcpu in 0..self.vcpus {
            all.push(mapping(self.own(vcpu, TSS), 1, Access::READ, false));
            all.push(mapping(self.own(vcpu, STACK), 1, Access::RW, false));
            all.push(mapping(self.own(vcpu, JOBS), 1 + BUFFER_PAGES, Access::RW, true));
        }
        all
    }

    /// Writes a vCPU's job list: at most [`Transfer::MOST`] copies.
    pub(super) fn set_jobs(&self, vcpu: usize, copies: &[Transfer]) -> Result<(), MachineError> {
        let list = self.own(vcpu, JOBS) * PAGE;
        let write = || -> Result<(), VolatileMemoryError> {
            self.put(list, copies.len() as u64)?;
            let words = copies.iter().flat_map(|copy| [copy.src.as_u64(), copy.dst.as_u64(), copy.qwords]);
            let list = self.memory.get_array_ref::<u64>(list + 8, copies.len() * 3)?;
            words.enumerate().for_each(|(index, word)| list.store(index, word));
            Ok(())
        };
        write().map_err(|_| MachineError::Outside { at: self.jobs(vcpu) })
    }

    /// `bytes` of a vCPU's buffer, `offset` bytes from its beginning.
    pub(super) fn buffer_slice(
        &self,
        vcpu: usize,
        offset: usize,
        bytes: usize,
    ) -> Result<VolatileSlice<'_>, MachineError> {
        self.slice(self.own(vcpu, BUFFER) * PAGE + offset, bytes)
            .map_err(|_| MachineError::Outside { at: self.buffer(vcpu).wrapping_add(offset as u64) })
    }

    /// What the stub left on a vCPU's CPL0 stack, at `rsp`.
    pub(super) fn frame(&self, vcpu: usize, rsp: u64) -> Result<Frame, MachineError> {
        let outside = MachineError::Outside { at: Gpa::new(rsp) };
        let offset = rsp.checked_sub(self.stack(vcpu).as_u64()).filter(|&at| at <= (PAGE - FRAME_BYTES) as u64);
        let Some(offset) = offset else { return Err(outside) };
        let slice = self.slice(self.own(vcpu, STACK) * PAGE + offset as usize, FRAME_BYTES);
        let read = |slice: VolatileSlice<'_>| -> Result<Frame, VolatileMemoryError> {
            Ok(Frame {
                cr2: slice.read_obj(0)?,
                vector: slice.read_obj(8)?,
                error_code: slice.read_obj(16)?,
                rip: slice.read_obj(24)?,
            })
        };
        slice.and_then(read).map_err(|_| outside)
    }
}
