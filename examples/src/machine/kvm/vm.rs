// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine: a VM with the caller's RAM, and its vCPUs.
#![allow(unsafe_code)]

use std::sync::Arc;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VmFd};
use notifier_core::{Gpa, GpaRange};
use spte_x86::LongModeOptions;
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, MemoryRegionAddress};

use super::{
    control::Control,
    probe,
    stats::Counter,
    tables::{ControlPages, GuestTable, Tables},
    vcpu::Vcpu,
};
use crate::machine::{MachineError, PAGE};

/// Three pages of guest-physical memory that KVM keeps for real mode on Intel: they are to be in the first 4 GiB, where there
/// is no RAM (`KVM_SET_TSS_ADDR` in the kernel's `api.rst`). The page before is its identity map, by default.
const REAL_MODE: usize = 0xfffb_d000;
/// The part of the low 4 GiB where KVM, and the APIC, have pages of their own: no place for the control region.
const HOLE: std::ops::Range<u64> = 0xc000_0000..0x1_0000_0000;
/// The kernel's count of page faults of a guest (`struct kvm_vcpu_stat`), since Linux 6.0.
const PAGE_FAULTS: &str = "pf_taken";

/// What has to be there for as long as guest code can run: the machine, and each of its vCPUs, hold it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) tables: Tables,
    pub(super) control: Arc<Control>,
    /// Keeps the mappings behind the memslots.
    _ram: GuestMemoryMmap<()>,
}

/// A VM: the caller's RAM, the control region, and tables that map both.
///
/// The RAM stays the caller's: it may change what is mapped there (`mmap` with `MAP_FIXED` over a page, `madvise`, memory
/// protection, userfaultfd) while the guest runs, and KVM follows.
#[derive(Debug)]
pub struct Machine {
    /// One for each vCPU, where the kernel has it.
    faults: Option<Vec<Counter>>,
    shared: Arc<Shared>,
}

impl Machine {
    /// A VM with a memslot for each region of `ram`, at the region's guest-physical address, and so many vCPUs. The control
    /// region lies above RAM (and above 4 GiB, if RAM ends in that last quarter of it where KVM has pages of its own), in a
    /// memslot of its own, and is no part of `ram`.
    ///
    /// The guest runs only inside [`Vcpu::read`] and [`Vcpu::write`]. A vCPU may outlive the machine.
    ///
    /// # Errors
    /// [`MachineError::NoKvm`] where [`probe`](super::probe()) would fail; [`MachineError::Vcpus`] for none or too many;
    /// [`MachineError::Unaligned`] for RAM that is not made of whole pages, [`MachineError::TooHigh`] where it leaves no room
    /// below the guest's address limit, [`MachineError::Slot`] where KVM refuses a memslot; others where a step of making the
    /// VM fails.
    pub fn new(ram: &GuestMemoryMmap<()>, vcpus: usize) -> Result<(Self, Vec<Vcpu>), MachineError> {
        let kvm = probe::open()?;
        let (cpuid, options) = probe::cpuid(&kvm)?;
        let most = kvm.get_max_vcpus();
        if vcpus == 0 || vcpus > most {
            return Err(MachineError::Vcpus { asked: vcpus, most });
        }
        let regions = regions(ram)?;
        let ranges: Vec<GpaRange> = regions.iter().map(|&(range, _)| range).collect();
        let control = Arc::new(control(&ranges, vcpus, &options)?);
        let tables = Tables::new(&control, &ranges, options)?;

        let vm = create(&kvm)?;
        let own = GpaRange::with_len(control.base(), control.memory().size() as u64)?;
        let shared = Arc::new(Shared { tables, control, _ram: ram.clone() });
        let own = (own, shared.control.memory().as_ptr() as u64);
        for (slot, &(range, host)) in regions.iter().chain([&own]).enumerate() {
            let region = kvm_userspace_memory_region {
                slot: slot as u32,
                flags: 0,
                guest_phys_addr: range.start().as_u64(),
                memory_size: range.len(),
                userspace_addr: host,
            };
            // SAFETY: the host bytes are those of a mapping that `shared` owns or keeps alive. Guest code runs only inside
            // KVM_RUN, on vCPUs that hold `shared`: the mapping is there whenever the guest can write. What it writes is either
            // guest RAM, which Rust code reads by volatile accesses alone, or the control region, of which it can write
            // nothing that anybody has a reference to.
            unsafe { vm.set_user_memory_region(region) }
                .map_err(|errno| MachineError::Slot { range, source: errno.into() })?;
        }

        let mut all = Vec::with_capacity(vcpus);
        let mut faults = Vec::with_capacity(vcpus);
        for index in 0..vcpus {
            let fd = vm.create_vcpu(index as u64).map_err(call("KVM_CREATE_VCPU"))?;
            fd.set_cpuid2(&cpuid).map_err(call("KVM_SET_CPUID2"))?;
            faults.push(Counter::of(&fd, PAGE_FAULTS)?);
            all.push(Vcpu::new(fd, index, Arc::clone(&shared))?);
        }
        let faults = faults.into_iter().collect();
        Ok((Self { faults, shared }, all))
    }

    /// How many page faults of the guest the kernel has counted so far: the sum over all vCPUs of `pf_taken` in KVM's
    /// statistics; `None` where the kernel does not have it (before Linux 6.0). May be called while vCPUs run.
    ///
    /// The counter moves (in `kvm_mmu_page_fault` and its like, `arch/x86/kvm/mmu`) for every fault that KVM's MMU gets to see,
    /// before it is known what comes of it: a translation is put in place, it was there already (another vCPU was faster, or
    /// the TLB was late), or the guest is told of the fault. With nested paging that is every EPT violation or nested page
    /// fault on memory, and the guest's own page faults are not among them; without, every page fault of the guest.
    ///
    /// # Errors
    /// [`MachineError::Stats`].
    pub fn page_faults(&self) -> Result<Option<u64>, MachineError> {
        let Some(counters) = &self.faults else { return Ok(None) };
        counters.iter().map(Counter::read).sum::<Result<u64, _>>().map(Some)
    }

    /// The table that CR3 of every vCPU points at. Nothing is to be unmapped or restricted in it: what hardware keeps of it is
    /// never flushed.
    pub fn table(&self) -> &GuestTable {
        self.shared.tables.table()
    }
}

/// An ioctl that failed.
pub(super) fn call(call: &'static str) -> impl Fn(kvm_ioctls::Error) -> MachineError {
    move |errno| MachineError::Call { call, source: errno.into() }
}

fn create(kvm: &Kvm) -> Result<VmFd, MachineError> {
    let vm = kvm.create_vm().map_err(call("KVM_CREATE_VM"))?;
    // Nothing here runs in real mode, but a vCPU is in it until its registers are set.
    vm.set_tss_address(REAL_MODE).map_err(call("KVM_SET_TSS_ADDR"))?;
    Ok(vm)
}

/// Each region of RAM, and the host address of its first byte.
fn regions(ram: &GuestMemoryMmap<()>) -> Result<Vec<(GpaRange, u64)>, MachineError> {
    let mut all = Vec::with_capacity(ram.num_regions());
    for region in ram.iter() {
        let (start, len) = (Gpa::from(region.start_addr()), region.len());
        if !start.is_aligned(PAGE as u64) || len % PAGE as u64 != 0 {
            return Err(MachineError::Unaligned { start, len });
        }
        let host = region.get_host_address(MemoryRegionAddress(0)).map_err(|_| MachineError::Outside { at: start })?;
        all.push((GpaRange::with_len(start, len)?, host as u64));
    }
    Ok(all)
}

/// The control region for this RAM, above it.
fn control(ram: &[GpaRange], vcpus: usize, options: &LongModeOptions) -> Result<Control, MachineError> {
    const ROUND: u64 = 2 << 20;
    const TABLES_AT_MOST: u64 = 1 << 20;
    // Virtual addresses are physical ones here, and bit 47 of the virtual ones is the sign.
    let bits = u32::from(options.physical_bits).min(47);
    let too_high = |end| MachineError::TooHigh { end, bits };
    let top = ram.last().map_or(0, |range| range.end().as_u64());
    let mut base = top.checked_next_multiple_of(ROUND).ok_or(too_high(top))?;
    // Without the table pages, which nothing maps. How many there are depends on where all of this lies; where there is RAM
    // below 4 GiB alone they are few.
    let mapped = Control::bytes(vcpus, 0) as u64;
    if base < HOLE.end && base + mapped + TABLES_AT_MOST > HOLE.start {
        base = HOLE.end;
    }
    let end = base.checked_add(mapped).ok_or(too_high(base))?;
    let own = GpaRange::new(Gpa::new(base), Gpa::new(end))?;
    let table_pages = ControlPages::needed(ram.iter().copied().chain([own]));
    let end = base.checked_add(Control::bytes(vcpus, table_pages) as u64).ok_or(too_high(base))?;
    if end > 1 << bits {
        return Err(too_high(end));
    }
    Control::new(Gpa::new(base), vcpus, table_pages)
}
