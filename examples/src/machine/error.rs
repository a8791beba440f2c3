// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why there is no machine, and what went wrong in one.

use std::{convert::Infallible, io};

use notifier_core::{FaultError, Gpa, GpaRange, JoinError, RangeError, ResolveError};
use spte_core::{MapError, TableError};
use spte_x86::{OptionsError, registers::RegisterError};

/// Why KVM cannot be used here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NoKvm {
    /// The guest is x86-64 code.
    #[error("the guest is x86-64 code, and this is {found}")]
    Architecture {
        /// The architecture this program was built for.
        found: &'static str,
    },
    /// KVM is not part of the kernel, its module is not loaded, or the file is not in this container.
    #[error("there is no /dev/kvm")]
    Missing,
    /// Access to the file is by group `kvm` on most systems.
    #[error("no permission to open /dev/kvm")]
    Permission,
    /// Opening the file failed for another reason.
    #[error("opening /dev/kvm: {source}")]
    Open {
        /// The kernel's error.
        source: io::Error,
    },
    /// The API has been at version 12 since Linux 2.6.22; a VMM is to refuse others.
    #[error("KVM_GET_API_VERSION says {found}, not 12")]
    Version {
        /// What was said.
        found: i32,
    },
    /// Something that the machine rests on.
    #[error("KVM lacks {name}")]
    Capability {
        /// Its name in the kernel's documentation, or the CPU feature's.
        name: &'static str,
    },
    /// An ioctl that every user of KVM needs. `KVM_CREATE_VM` gives `EBUSY` where another hypervisor has the CPU.
    #[error("{call}: {source}")]
    Call {
        /// Which one.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
}

/// A return of `KVM_RUN` that the guest's programs give no reason for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum StrangeExit {
    /// An I/O instruction with another port or direction than the programs use.
    #[error("an I/O instruction on port {port:#x}")]
    Io {
        /// The port.
        port: u16,
    },
    /// An access to guest-physical memory that no memslot has, or whose host mapping is gone (emulated code only).
    #[error("an access to {at}, which is no memory")]
    Mmio {
        /// The address.
        at: Gpa,
    },
    /// KVM could not resolve a fault on guest memory: no host mapping, or one without the right.
    #[error("no host memory for {size:#x} bytes at {at}")]
    Memory {
        /// The address.
        at: Gpa,
        /// Bytes.
        size: u64,
    },
    /// The hardware refused the guest's state.
    #[error("the processor refused to enter the guest, reason {reason:#x}")]
    Entry {
        /// The hardware's reason.
        reason: u64,
    },
    /// KVM gave up; 1 is an instruction that it cannot emulate.
    #[error("KVM's internal error {suberror}")]
    Internal {
        /// `KVM_INTERNAL_ERROR_*`.
        suberror: u32,
    },
    /// A triple fault.
    #[error("a triple fault")]
    Shutdown,
    /// Any other.
    #[error("exit reason {reason}")]
    Other {
        /// `KVM_EXIT_*`.
        reason: u32,
    },
}

/// A machine that could not be made, or a job that was not done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MachineError {
    /// KVM cannot be used here.
    #[error(transparent)]
    NoKvm(#[from] NoKvm),
    /// An ioctl failed.
    #[error("{call}: {source}")]
    Call {
        /// Which one.
        call: &'static str,
        /// The kernel's error.
        source: io::Error,
    },
    /// KVM refused a memslot (`EEXIST`: it overlaps another, or what KVM itself keeps below 4 GiB).
    #[error("memslot over {range}: {source}")]
    Slot {
        /// Guest-physical bytes.
        range: GpaRange,
        /// The kernel's error.
        source: io::Error,
    },
    /// Memslots, and leaves, are made of whole pages.
    #[error("{len:#x} bytes of RAM at {start} are not whole pages")]
    Unaligned {
        /// Where the region begins.
        start: Gpa,
        /// Its bytes.
        len: u64,
    },
    /// RAM and control region have to lie below what the guest's addresses can name.
    #[error("RAM and control region would end at {end:#x}, above the {bits} bits of the guest's addresses")]
    TooHigh {
        /// One past the last byte.
        end: u64,
        /// Bits of an address.
        bits: u32,
    },
    /// There must be at least one, and KVM has a limit.
    #[error("{asked} vCPUs: not between 1 and {most}")]
    Vcpus {
        /// How many were asked for.
        asked: usize,
        /// `KVM_CAP_MAX_VCPUS`.
        most: usize,
    },
    /// The control region could not be mapped.
    #[error("mapping the control region: {0}")]
    Control(#[from] vm_memory::mmap::MmapRegionError),
    /// Something lies outside its memory: a RAM region without a host address, a stack pointer outside its stack.
    #[error("{at} is outside the memory it should be in")]
    Outside {
        /// The address.
        at: Gpa,
    },
    /// A range cannot exist.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The CPU's address widths are none that the format knows.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The table could not be made.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The table could not join its space.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A part of the guest's address space could not be mapped: the fault did not begin.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// A part of the guest's address space could not be mapped: its extent does not fit.
    #[error(transparent)]
    Resolve(#[from] ResolveError<Infallible>),
    /// A part of the guest's address space could not be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The table's root cannot be in CR3.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// The guest copies eight bytes at a time.
    #[error("{len} bytes for {at} are not a multiple of 8")]
    Length {
        /// Where they were to go.
        at: Gpa,
        /// How many they are.
        len: usize,
    },
    /// The guest's program raised an exception, which ended the job. The vCPU can be used again.
    #[error("guest exception {vector}, error code {error_code:#x}, address {address}, instruction at {rip:#x}")]
    GuestFault {
        /// Its vector: 14 for a page fault, 13 for an address that is not canonical.
        vector: u8,
        /// Its error code; 0 for exceptions that have none. For page faults: bit 0 says that there is a translation, and it
        /// lacks the right; bit 1 a write; bit 2 that it was code at CPL3.
        error_code: u64,
        /// CR2: for a page fault the address that was accessed, for others what an earlier one left there. Guest-virtual,
        /// which here is guest-physical.
        address: Gpa,
        /// The instruction.
        rip: u64,
    },
    /// `KVM_RUN` returned for a reason that the guest's programs do not give.
    #[error("KVM_RUN returned for {0}")]
    Exit(#[from] StrangeExit),
    /// `KVM_RUN` failed. `EFAULT`: guest memory has no host mapping, or one without the right.
    #[error("KVM_RUN: {source}")]
    Run {
        /// The kernel's error.
        source: io::Error,
    },
    /// The statistics could not be read.
    #[error("KVM's statistics of a vCPU: {source}")]
    Stats {
        /// The kernel's error; `InvalidData` for a file that contradicts itself.
        source: io::Error,
    },
}
