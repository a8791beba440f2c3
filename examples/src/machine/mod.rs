// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small real guest on `/dev/kvm`: virtual CPUs that touch guest RAM natively, while the VMM changes the host pages
//! behind it.
//!
//! A machine has RAM, which is the caller's, and a *control region* above it, which is the machine's own. The guest is
//! two small programs in that region: one at CPL3, which carries out *jobs* (lists of copies between RAM and a buffer in
//! the control region), and one at CPL0, which tells the VMM about exceptions. A job is one `KVM_RUN`. [`Vcpu::read`] and
//! [`Vcpu::write`] are made of jobs, and so what they read and store goes through the translation that KVM keeps, and
//! through no mapping of the VMM's.
//!
//! - **CPL3**, because there guest code runs natively on every KVM. Without nested paging (EPT, NPT) KVM may emulate what
//!   runs at CPL0, and then reads guest RAM through the VMM's own mapping: nothing could be stale.
//! - **One exit a job**: the program ends it with an `OUT`. Page faults that KVM resolves by itself return nothing to the
//!   VMM; [`Machine::page_faults`] has the kernel's count of them.
//! - **Translation**: guest-virtual addresses are guest-physical ones. The tables behind CR3 are a `spte_core::Table` of
//!   `spte_x86::LongMode` entries, in pages of the control region that the tables themselves do not map: the guest cannot
//!   write them.
//!
//! On other architectures everything is there by name, and [`probe`] says that there is no machine.

mod error;

#[cfg(not(target_arch = "x86_64"))]
mod absent;
#[cfg(target_arch = "x86_64")]
mod kvm;

#[cfg(not(target_arch = "x86_64"))]
pub use absent::{Machine, Vcpu, probe};
pub use error::{MachineError, NoKvm, StrangeExit};
#[cfg(target_arch = "x86_64")]
pub use kvm::{BUFFER_PAGES, ControlPages, GuestTable, Machine, Vcpu, probe};

/// Bytes of a page, here and in the guest.
pub const PAGE: usize = 4096;
