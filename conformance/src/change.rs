// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What `change_pte` is for, seen from a guest: pages are repointed under a guest that reads them without pause.
//!
//! Each page of a working set has two copies in memory. While the guest reads, each page is repointed from the first to the second
//! in a `Retained` window of its own; the guest must read the same bytes all the time, and take no fault. Then it
//! writes to some, which faults once each: the page becomes private again. The same working set, zapped page by page instead,
//! faults once a page.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use notifier_core::Access;
use serde::Serialize;
use spte_model::TouchKind;

use crate::machine::{Class, Exit, Ground, Machine, Work};
use crate::mmu::Mmu;
use crate::vmm::{Vmm, VmmError};

/// Pages that are repointed.
pub const PAGES: u64 = 256;
/// Pages that are written meanwhile, behind them.
pub const WRITTEN: u64 = 4;
/// Of the repointed pages, as many are written in the end.
pub const UNMERGED: u64 = 16;

/// What a guest saw of one working set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Seen {
    /// Pages that were repointed, or zapped.
    pub pages: u64,
    /// Passes over all pages meanwhile and after.
    pub passes: u64,
    /// Loads that returned other bytes than they must.
    pub mismatches: u64,
    /// Loads that found nothing mapped.
    pub read_faults: u64,
    /// Other faults of the guest at work.
    pub other_faults: u64,
    /// Faults of the stores afterwards, and how many pages were stored to.
    pub write_faults: u64,
    /// See `write_faults`.
    pub stores: u64,
    /// Times the guest was brought out for a flush, without a fault.
    pub kicks: u64,
    /// Flushes.
    pub flushes: u64,
    /// Pages that were broken before they were made: seen at a flush.
    pub breaks: u64,
}

/// What is done to each page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum How {
    /// It is repointed.
    Change,
    /// It is zapped; the fault leads to the second copy.
    Zap,
}

/// Where the working set and its copies are.
#[derive(Debug, Clone, Copy)]
struct Set {
    first: u64,
    stride: u64,
    copies: [u64; 2],
}

impl Set {
    fn new(ground: &Ground, granule: u64) -> Self {
        let first = ground.beside_fixed((PAGES + WRITTEN) * granule);
        let half = (ground.data.end - ground.data.start) / 2;
        Self { first, stride: granule, copies: [ground.data.start, ground.data.start + half] }
    }

    fn page(&self, number: u64) -> u64 {
        self.first + number * self.stride
    }

    fn output(&self, copy: usize, page: u64) -> u64 {
        self.copies[copy] + (page - self.first)
    }

    fn fill(&self, ground: &Ground) {
        for copy in [0, 1] {
            for page in (0..PAGES + WRITTEN).map(|number| self.page(number)) {
                ground.memory.store(self.output(copy, page) + Work::OFFSET, page + Work::OFFSET);
            }
        }
    }
}

/// Lets a guest work while each page is repointed or zapped.
///
/// # Errors
/// [`VmmError`], where something is otherwise than it has to be whatever is counted.
pub fn seen<M: Machine>(mmu: &Mmu<M>, how: How) -> Result<Seen, VmmError> {
    let (ground, granule) = {
        let machine = mmu.machine();
        (machine.ground().clone(), machine.driven().shape.granule())
    };
    let set = Set::new(&ground, granule);
    set.fill(&ground);
    let second = Arc::new(AtomicBool::new(false));
    let moved = Arc::clone(&second);
    let mut vmm = Vmm::new(mmu.clone(), move |page| set.output(usize::from(moved.load(Ordering::Relaxed)), page))?;
    for number in 0..PAGES + WRITTEN {
        vmm.map(set.page(number), set.output(0, set.page(number)), granule, Access::RWX)?;
    }
    vmm.work(set.first, PAGES + WRITTEN, WRITTEN, true)?;
    // All that is cold is warm then: only what comes now is counted.
    vmm.passes(1)?;
    second.store(true, Ordering::Relaxed);
    let before = vmm.faults;
    let (kicks, flushes) = (mmu.counts().kicks.load(Ordering::Relaxed), mmu.counts().flushes.load(Ordering::Relaxed));
    for (number, page) in (0..PAGES).map(|number| (number, set.page(number))) {
        // A guest that is kicked for every flush would see little of it otherwise.
        if number % 16 == 0 {
            vmm.passes(1)?;
        }
        match how {
            How::Change => {
                if !vmm.change(page, set.output(0, page), set.output(1, page), || {})? {
                    return Err(VmmError::Wrong(format!("nobody translated {page:#x} any more when it was repointed")));
                }
            }
            How::Zap => vmm.zap(page, granule)?,
        }
        vmm.attend()?;
    }
    vmm.passes(2)?;
    mmu.stop()?;
    let (passes, mismatches) = vmm.counts();
    let faults = vmm.faults;
    let read_faults = faults.absent - before.absent;
    let mut seen = Seen {
        pages: PAGES,
        passes,
        mismatches,
        read_faults,
        other_faults: faults.total() - before.total() - read_faults,
        kicks: mmu.counts().kicks.load(Ordering::Relaxed) - kicks,
        flushes: mmu.counts().flushes.load(Ordering::Relaxed) - flushes,
        breaks: vmm.breaks(),
        ..Seen::default()
    };
    if how == How::Change {
        unmerge(&mut vmm, &set, &second, &mut seen)?;
    }
    // The data is as it was.
    drop(vmm);
    let machine = mmu.machine();
    machine.ground().fill(|number| machine.code(number));
    Ok(seen)
}

/// The second copy is what each page leads to; a store to one faults, and the first copy is its own again.
fn unmerge<M: Machine>(vmm: &mut Vmm<M>, set: &Set, second: &AtomicBool, seen: &mut Seen) -> Result<(), VmmError> {
    let memory = Arc::clone(&vmm.ground.memory);
    second.store(false, Ordering::Relaxed);
    for number in 0..PAGES {
        let at = set.page(number) + Work::OFFSET;
        // The copies differ from now on: what is loaded says which it is.
        memory.store(set.output(1, set.page(number)) + Work::OFFSET, !at);
        match vmm.access(at, TouchKind::Read, 0)? {
            Exit::Done { value } if value == !at => {}
            other => return Err(VmmError::Wrong(format!("a load of {at:#x} after it was repointed: {other:?}"))),
        }
    }
    for number in (0..PAGES).step_by((PAGES / UNMERGED) as usize) {
        let at = set.page(number) + Work::OFFSET;
        seen.stores += 1;
        loop {
            match vmm.access(at, TouchKind::Write, at ^ 0x5a5a)? {
                Exit::Done { .. } => break,
                Exit::Fault(fault) if fault.class == Class::Denied && seen.write_faults < 2 * seen.stores => {
                    seen.write_faults += 1;
                    vmm.handle(fault)?;
                }
                other => return Err(VmmError::Wrong(format!("a store to {at:#x} after it was repointed: {other:?}"))),
            }
        }
        let (own, shared) = (set.output(0, set.page(number)), set.output(1, set.page(number)));
        let found = (memory.load(own + Work::OFFSET), memory.load(shared + Work::OFFSET));
        if found != (at ^ 0x5a5a, !at) {
            return Err(VmmError::Wrong(format!("a store to {at:#x} went elsewhere: {found:x?}")));
        }
    }
    Ok(())
}
