// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Those who reach a guest's RAM without any table of ours: its vCPUs on KVM, and the VMM itself.
//!
//! What a vCPU does to the RAM is done by the guest's own code, natively: KVM's translations, made from the mapping in
//! this process, are between. The VMM writes through vm-memory, as a boot loader or an emulated device would. Both wait at
//! the fence of a page that is merged, without noticing; neither is inside a scope.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use vm_memory::{Bytes, GuestAddress};

use super::{
    access::{Agent, Piece},
    error::Error,
    guest::Guest,
    home::Home,
    mapping::gpa,
    memory::{PAGE, PageBytes},
};
use crate::machine::Vcpu;

/// A vCPU on KVM.
#[derive(Debug)]
pub(crate) struct Native<'g> {
    guest: &'g Guest,
    vcpu: Vcpu,
}

impl<'g> Native<'g> {
    pub(crate) fn new(guest: &'g Guest, vcpu: Vcpu) -> Self {
        Self { guest, vcpu }
    }

    /// How often KVM came back from running it.
    pub(crate) fn exits(&self) -> u64 {
        self.vcpu.exits()
    }
}

impl Agent for Native<'_> {
    fn guest(&self) -> &Guest {
        self.guest
    }

    fn read(&mut self, pages: &[usize]) -> Result<Vec<PageBytes>, Error> {
        let addresses: Vec<_> = pages.iter().map(|&page| gpa(page)).collect();
        let mut read = Vec::with_capacity(pages.len());
        self.vcpu.read(&addresses, &mut read)?;
        Ok(read)
    }

    fn write(&mut self, pieces: &[Piece<'_>]) -> Result<(), Error> {
        let pieces: Vec<_> =
            pieces.iter().map(|piece| (gpa(piece.page).wrapping_add(piece.offset as u64), piece.bytes)).collect();
        Ok(self.vcpu.write(&pieces)?)
    }
}

/// A thread of the VMM that reads and writes guest memory as it lies in the process.
#[derive(Debug)]
pub(crate) struct Direct<'g>(pub(crate) &'g Guest);

impl Agent for Direct<'_> {
    fn guest(&self) -> &Guest {
        self.0
    }

    fn read(&mut self, pages: &[usize]) -> Result<Vec<PageBytes>, Error> {
        let read = |&page: &usize| {
            let mut bytes = [0; PAGE];
            self.0.home.read(page, &mut bytes)?;
            Ok(bytes)
        };
        pages.iter().map(read).collect()
    }

    fn write(&mut self, pieces: &[Piece<'_>]) -> Result<(), Error> {
        let memory = self.0.home.memory();
        pieces.iter().try_for_each(|piece| {
            let at = GuestAddress((piece.page * PAGE + piece.offset) as u64);
            Ok(memory.write_slice(piece.bytes, at)?)
        })
    }
}

/// How often in a row the host may fail before nobody else is let in. Until then those who wait lose nothing but time.
const PATIENCE: u32 = 50;

/// Does what must be done for somebody to be let in, again and again where the host fails.
fn insist(guest: &Guest, mut step: impl FnMut() -> Result<(), Error>) -> Result<(), Error> {
    for _ in 1..PATIENCE {
        match step() {
            Ok(()) => return Ok(()),
            Err(_) => guest.tally.host_failures.add(1),
        }
        thread::sleep(Duration::from_millis(1));
    }
    step()
}

/// Lets those in who wait at the fence of this guest's RAM, until told to stop; by then nobody may wait any more.
///
/// It opens windows and waits for scopes. It is in none itself, and whoever is in one does not wait for it.
pub(crate) fn let_writers_in(guest: &Guest, stop: &AtomicBool) -> Result<(), Error> {
    let Home::Mapped(home) = &guest.home else { return Ok(()) };
    let mut walker = guest.space.walker();
    let mut waiters = Vec::new();
    while !stop.load(Ordering::Acquire) {
        waiters.clear();
        insist(guest, || home.waiters(&mut waiters))?;
        let mut pages: Vec<usize> = waiters.iter().map(|waiter| home.page_of(waiter)).collect();
        pages.sort_unstable();
        pages.dedup();
        for page in pages {
            insist(guest, || guest.admit_writer(page))?;
            guest.prefetch(&mut walker, page, 1)?;
        }
    }
    Ok(())
}

/// Nobody waits at the fence for ever, whatever ends this thread.
#[derive(Debug)]
pub(crate) struct OpenFence<'g>(pub(crate) &'g Guest);

impl Drop for OpenFence<'_> {
    fn drop(&mut self) {
        if let Home::Mapped(home) = &self.0.home {
            home.open_fence();
        }
    }
}
