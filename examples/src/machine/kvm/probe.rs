// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether there is a KVM that a machine can be made with, and what its CPUs are like.

use std::io;

use kvm_bindings::{CpuId, KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm};
use spte_x86::LongModeOptions;

use crate::machine::NoKvm;

/// What the machine rests on, by its name in the kernel's documentation (`Documentation/virt/kvm/api.rst`).
const NEEDED: [(Cap, &str); 4] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    // The kernel's own secondary MMU follows changes of the host's mappings: what all of this is about.
    (Cap::SyncMmu, "KVM_CAP_SYNC_MMU"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    // To finish an I/O instruction without running on.
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// Whether a machine can be made here: `/dev/kvm` can be opened, has the API and the capabilities that are needed, knows
/// 64-bit guests, and makes a VM.
///
/// # Errors
/// [`NoKvm`], which is one line that says what is missing.
pub fn probe() -> Result<(), NoKvm> {
    let kvm = open()?;
    cpuid(&kvm)?;
    kvm.create_vm().map_err(|errno| NoKvm::Call { call: "KVM_CREATE_VM", source: errno.into() })?;
    Ok(())
}

/// `/dev/kvm`, with everything that is needed.
pub(super) fn open() -> Result<Kvm, NoKvm> {
    let kvm = Kvm::new().map_err(|errno| {
        let source = io::Error::from(errno);
        match source.kind() {
            io::ErrorKind::NotFound => NoKvm::Missing,
            io::ErrorKind::PermissionDenied => NoKvm::Permission,
            _ => NoKvm::Open { source },
        }
    })?;
    let found = kvm.get_api_version();
    if u32::try_from(found) != Ok(KVM_API_VERSION) {
        return Err(NoKvm::Version { found });
    }
    match NEEDED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        Some(&(_, name)) => Err(NoKvm::Capability { name }),
        None => Ok(kvm),
    }
}

/// What the guest's CPUs can be: everything that this KVM supports on this host.
pub(super) fn cpuid(kvm: &Kvm) -> Result<(CpuId, LongModeOptions), NoKvm> {
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|errno| NoKvm::Call { call: "KVM_GET_SUPPORTED_CPUID", source: errno.into() })?;
    let leaf = |function| cpuid.as_slice().iter().find(|entry| entry.function == function);
    // Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E: Fn8000_0001 EDX, Fn8000_0008 EAX.
    let features = leaf(0x8000_0001).map_or(0, |entry| entry.edx);
    let has = |bit: u32| features & (1 << bit) != 0;
    if !has(29) {
        return Err(NoKvm::Capability { name: "64-bit guests" });
    }
    if !has(20) {
        return Err(NoKvm::Capability { name: "no-execute pages" });
    }
    let options = LongModeOptions {
        physical_bits: leaf(0x8000_0008).map_or(36, |entry| (entry.eax & 0xff) as u8),
        pages_1g: has(26),
        ..LongModeOptions::default()
    };
    Ok((cpuid, options))
}
