// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A vCPU: jobs, and what they are used for.
#![allow(unsafe_code)]

use std::{io, sync::Arc};

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::{VcpuExit, VcpuFd};
use notifier_core::Gpa;
use spte_x86::registers::Cr3;

use super::{
    control::{self, Control, Transfer},
    program::{DONE_PORT, EXCEPTION_PORT},
    vm::{Shared, call},
};
use crate::machine::{MachineError, PAGE, StrangeExit};

/// Pages of a vCPU's buffer: what one job can move.
pub const BUFFER_PAGES: usize = 64;
const BUFFER_BYTES: usize = BUFFER_PAGES * PAGE;

/// A virtual CPU. It runs on the thread that calls it, and only inside these calls.
///
/// Addresses are the guest's business: what its tables do not map, or not for CPL3, is a
/// [`MachineError::GuestFault`]. They map RAM, and the job lists and buffers of all vCPUs, which lie above it.
#[derive(Debug)]
pub struct Vcpu {
    // First: the guest is gone before its memory is.
    fd: VcpuFd,
    index: usize,
    exits: u64,
    /// Whether the next `KVM_RUN` goes on behind the program's `OUT`. Otherwise the registers are set first.
    at_rest: bool,
    sregs: kvm_sregs,
    regs: kvm_regs,
    shared: Arc<Shared>,
}

/// What a return of `KVM_RUN` was.
enum Return {
    Done,
    Exception,
    Again,
    Strange(Option<StrangeExit>),
}

impl Vcpu {
    pub(super) fn new(fd: VcpuFd, index: usize, shared: Arc<Shared>) -> Result<Self, MachineError> {
        let cr3 = Cr3::new(shared.tables.root(), 0)?;
        let sregs = sregs(fd.get_sregs().map_err(call("KVM_GET_SREGS"))?, &shared.control, index, cr3);
        let regs = kvm_regs {
            rip: shared.control.program().as_u64(),
            rbx: shared.control.jobs(index).as_u64(),
            // Nothing but bit 1, which is always set: copies go upwards, interrupts wait.
            rflags: 1 << 1,
            ..kvm_regs::default()
        };
        Ok(Self { fd, index, exits: 0, at_rest: false, sregs, regs, shared })
    }

    /// Reads pages: the guest copies [`PAGE`] bytes at each of `pages` from RAM, in this order, natively; at most
    /// [`BUFFER_PAGES`] of them in one job, which is one `KVM_RUN`. On return `out` holds their contents and nothing else; its
    /// memory is used again.
    ///
    /// Each page is copied once, in quadwords; who writes it meanwhile may be seen in a part of it.
    ///
    /// # Errors
    /// [`MachineError::GuestFault`] for what the guest's tables do not map; [`MachineError::Exit`] and [`MachineError::Run`]
    /// where KVM cannot resolve a fault or gives up. `out` then holds the pages of the jobs before. The vCPU can be used
    /// again.
    pub fn read(&mut self, pages: &[Gpa], out: &mut Vec<[u8; PAGE]>) -> Result<(), MachineError> {
        // What was there is only written over: a buffer that is used again costs one copy a page.
        out.resize(pages.len(), [0; PAGE]);
        let mut read = 0;
        let buffer = self.shared.control.buffer(self.index);
        let mut copies = Vec::with_capacity(BUFFER_PAGES.min(pages.len()));
        for part in pages.chunks(BUFFER_PAGES) {
            copies.clear();
            copies.extend(part.iter().enumerate().map(|(index, &src)| Transfer {
                src,
                dst: buffer.wrapping_add((index * PAGE) as u64),
                qwords: PAGE as u64 / 8,
            }));
            if let Err(error) = self.run(&copies) {
                out.truncate(read);
                return Err(error);
            }
            for (index, page) in out[read..][..part.len()].iter_mut().enumerate() {
                self.shared.control.buffer_slice(self.index, index * PAGE, PAGE)?.copy_to(page);
            }
            read += part.len();
        }
        Ok(())
    }

    /// Writes pieces: the guest stores each at its address in RAM, in this order, natively, in quadwords. As many as fit
    /// the buffer ([`BUFFER_PAGES`]) and the job list make one job, which is one `KVM_RUN`; a piece may be larger than the
    /// buffer.
    ///
    /// # Errors
    /// [`MachineError::Length`] for a piece that is not a multiple of 8 bytes long: nothing was written.
    /// [`MachineError::GuestFault`], [`MachineError::Exit`] and [`MachineError::Run`] as for [`Vcpu::read`]; what comes before
    /// the address that could not be written is written.
    pub fn write(&mut self, pieces: &[(Gpa, &[u8])]) -> Result<(), MachineError> {
        if let Some(&(at, bytes)) = pieces.iter().find(|(_, bytes)| bytes.len() % 8 != 0) {
            return Err(MachineError::Length { at, len: bytes.len() });
        }
        let buffer = self.shared.control.buffer(self.index);
        let mut copies: Vec<Transfer> = Vec::with_capacity(Transfer::MOST.min(pieces.len()));
        let mut used = 0;
        for &(at, mut bytes) in pieces {
            let mut dst = at;
            while !bytes.is_empty() {
                if used == BUFFER_BYTES || copies.len() == Transfer::MOST {
                    self.run(&copies)?;
                    copies.clear();
                    used = 0;
                }
                let (now, later) = bytes.split_at(bytes.len().min(BUFFER_BYTES - used));
                self.shared.control.buffer_slice(self.index, used, now.len())?.copy_from(now);
                let src = buffer.wrapping_add(used as u64);
                copies.push(Transfer { src, dst, qwords: now.len() as u64 / 8 });
                used += now.len();
                dst = dst.wrapping_add(now.len() as u64);
                bytes = later;
            }
        }
        if copies.is_empty() { Ok(()) } else { self.run(&copies) }
    }

    /// How often `KVM_RUN` has returned so far: once a job, and besides that for signals and for what failed.
    pub fn exits(&self) -> u64 {
        self.exits
    }

    /// One job. No lock is held while the guest runs.
    fn run(&mut self, copies: &[Transfer]) -> Result<(), MachineError> {
        self.shared.control.set_jobs(self.index, copies)?;
        if !self.at_rest {
            self.restart()?;
        }
        self.at_rest = false;
        loop {
            match self.enter()? {
                Return::Done => {
                    self.at_rest = true;
                    return Ok(());
                }
                Return::Again => {}
                Return::Exception => return Err(self.exception()?),
                Return::Strange(Some(exit)) => return Err(exit.into()),
                Return::Strange(None) => {
                    let reason = self.fd.get_kvm_run().exit_reason;
                    return Err(StrangeExit::Other { reason }.into());
                }
            }
        }
    }

    /// One `KVM_RUN`.
    fn enter(&mut self) -> Result<Return, MachineError> {
        let exit = self.fd.run();
        self.exits += 1;
        let strange = match exit {
            Ok(VcpuExit::IoOut(DONE_PORT, _)) => return Ok(Return::Done),
            Ok(VcpuExit::IoOut(EXCEPTION_PORT, _)) => return Ok(Return::Exception),
            Ok(VcpuExit::Intr) => return Ok(Return::Again),
            Ok(VcpuExit::IoOut(port, _) | VcpuExit::IoIn(port, _)) => Some(StrangeExit::Io { port }),
            Ok(VcpuExit::MmioRead(at, _) | VcpuExit::MmioWrite(at, _)) => Some(StrangeExit::Mmio { at: Gpa::new(at) }),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => Some(StrangeExit::Memory { at: Gpa::new(gpa), size }),
            Ok(VcpuExit::FailEntry(reason, _)) => Some(StrangeExit::Entry { reason }),
            Ok(VcpuExit::Shutdown) => Some(StrangeExit::Shutdown),
            Ok(VcpuExit::InternalError) => {
                // SAFETY: the exit reason says that this is the member of the union that the kernel has written.
                let internal = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal };
                Some(StrangeExit::Internal { suberror: internal.suberror })
            }
            Ok(_) => None,
            Err(errno) => {
                let source = io::Error::from(errno);
                return match source.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => Ok(Return::Again),
                    _ => Err(MachineError::Run { source }),
                };
            }
        };
        Ok(Return::Strange(strange))
    }

    /// The exception that the stub tells of.
    fn exception(&mut self) -> Result<MachineError, MachineError> {
        let rsp = self.fd.get_regs().map_err(call("KVM_GET_REGS"))?.rsp;
        let frame = self.shared.control.frame(self.index, rsp)?;
        Ok(MachineError::GuestFault {
            vector: frame.vector as u8,
            error_code: frame.error_code,
            address: Gpa::new(frame.cr2),
            rip: frame.rip,
        })
    }

    /// Puts the vCPU to the program's beginning.
    fn restart(&mut self) -> Result<(), MachineError> {
        if self.exits != 0 {
            // An I/O instruction is complete only when KVM_RUN was entered again ("KVM_EXIT_IO" in the kernel's api.rst);
            // left alone, the rest of the stub's would be done to the new registers.
            self.fd.set_kvm_immediate_exit(1);
            let exit = self.fd.run().map(drop).map_err(io::Error::from);
            self.fd.set_kvm_immediate_exit(0);
            self.exits += 1;
            match exit {
                Err(source) if source.kind() != io::ErrorKind::Interrupted => return Err(MachineError::Run { source }),
                _ => {}
            }
        }
        self.fd.set_sregs(&self.sregs).map_err(call("KVM_SET_SREGS"))?;
        self.fd.set_regs(&self.regs).map_err(call("KVM_SET_REGS"))
    }
}

/// 64-bit mode at CPL3, with the control region's tables.
fn sregs(reset: kvm_sregs, control: &Control, vcpu: usize, cr3: Cr3) -> kvm_sregs {
    const CODE: u8 = 11; // execute, read, accessed
    const DATA: u8 = 3; // read, write, accessed
    const BUSY_TSS: u8 = 11;
    let flat = kvm_segment { limit: !0, present: 1, dpl: 3, s: 1, g: 1, ..kvm_segment::default() };
    let code = kvm_segment { selector: control::USER_CODE, type_: CODE, l: 1, ..flat };
    let data = kvm_segment { selector: control::USER_DATA, type_: DATA, db: 1, ..flat };
    let task = kvm_segment {
        base: control.tss(vcpu).as_u64(),
        limit: control::TSS_LIMIT.into(),
        selector: control::TASK,
        type_: BUSY_TSS,
        present: 1,
        ..kvm_segment::default()
    };
    let none = kvm_segment { unusable: 1, ..kvm_segment::default() };
    let table = |at: Gpa, limit| kvm_dtable { base: at.as_u64(), limit, ..kvm_dtable::default() };
    kvm_sregs {
        cs: code,
        ss: data,
        ds: data,
        es: data,
        fs: data,
        gs: data,
        tr: task,
        ldt: none,
        gdt: table(control.gdt(), control::GDT_LIMIT),
        idt: table(control.idt(), control::IDT_LIMIT),
        // PG, WP, NE, ET, PE.
        cr0: 1 << 31 | 1 << 16 | 1 << 5 | 1 << 4 | 1,
        cr2: 0,
        cr3: cr3.raw(),
        // PAE. No SMEP, SMAP or protection keys: the format of the tables is without them.
        cr4: 1 << 5,
        // NXE, LMA, LME.
        efer: 1 << 11 | 1 << 10 | 1 << 8,
        ..reset
    }
}
