// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machines.

pub mod arm64;
#[cfg(target_arch = "x86_64")]
pub mod kvm;
pub mod mips;
pub mod ppc;
pub mod vmx;
pub mod x86;

use spte_mips::{BigEndian, LittleEndian};
use spte_x86::{Native, Nested};

use crate::emulator::Tools;
use crate::report::Candidate;

/// Every machine there is a driver for.
pub fn candidates() -> Vec<Candidate> {
    let mut all = Vec::new();
    for variant in arm64::variants() {
        all.push(Candidate::new(variant.name, move |tools| arm64::Arm64::start(tools, variant)));
    }
    for variant in x86::X86::<Nested>::variants() {
        all.push(Candidate::new(variant.name, move |tools| x86::X86::<Nested>::start(tools, variant)));
    }
    for variant in x86::X86::<Native>::variants() {
        all.push(Candidate::new(variant.name, move |tools| x86::X86::<Native>::start(tools, variant)));
    }
    for variant in vmx::variants() {
        all.push(Candidate::new(variant.name, move |tools| vmx::Vmx::start(tools, variant)));
    }
    #[cfg(target_arch = "x86_64")]
    for variant in kvm::variants() {
        all.push(Candidate::new(variant.name, move |tools| kvm::KvmGuest::start(tools, variant)));
    }
    for (name, variant) in ppc::variants() {
        all.push(Candidate::new(name, move |tools| ppc::Ppc::start(tools, variant)));
    }
    for variant in mips::variants::<BigEndian>() {
        let name = variant.name.clone();
        let start = move |tools: &Tools| mips::Mips::<BigEndian>::start(tools, variant.clone());
        all.push(Candidate::new(&name, start));
    }
    for variant in mips::variants::<LittleEndian>() {
        let name = variant.name.clone();
        let start = move |tools: &Tools| mips::Mips::<LittleEndian>::start(tools, variant.clone());
        all.push(Candidate::new(&name, start));
    }
    all
}
