// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What there is where the guest's programs cannot run: the names, without a value.

use notifier_core::Gpa;
use vm_memory::GuestMemoryMmap;

use super::{MachineError, NoKvm, PAGE};

/// Says that there is no machine here.
///
/// # Errors
/// [`NoKvm::Architecture`].
pub fn probe() -> Result<(), NoKvm> {
    Err(NoKvm::Architecture { found: std::env::consts::ARCH })
}

/// A virtual machine. There is none on this architecture.
#[derive(Debug)]
pub enum Machine {}

/// A virtual CPU. There is none on this architecture.
#[derive(Debug)]
pub enum Vcpu {}

impl Machine {
    /// See the x86-64 version.
    ///
    /// # Errors
    /// [`MachineError::NoKvm`].
    pub fn new(_ram: &GuestMemoryMmap<()>, _vcpus: usize) -> Result<(Self, Vec<Vcpu>), MachineError> {
        probe()?;
        Err(NoKvm::Architecture { found: std::env::consts::ARCH }.into())
    }

    /// See the x86-64 version.
    ///
    /// # Errors
    /// None: there is no machine.
    pub fn page_faults(&self) -> Result<Option<u64>, MachineError> {
        match *self {}
    }
}

impl Vcpu {
    /// See the x86-64 version.
    ///
    /// # Errors
    /// None: there is no vCPU.
    pub fn read(&mut self, _pages: &[Gpa], _out: &mut Vec<[u8; PAGE]>) -> Result<(), MachineError> {
        match *self {}
    }

    /// See the x86-64 version.
    ///
    /// # Errors
    /// None: there is no vCPU.
    pub fn write(&mut self, _pieces: &[(Gpa, &[u8])]) -> Result<(), MachineError> {
        match *self {}
    }

    /// See the x86-64 version.
    pub fn exits(&self) -> u64 {
        match *self {}
    }
}
