// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Hardware writes accessed and dirty while we age, harvest, write-protect, repoint and zap: no update may be lost.
//!
//! A guest writes a counter into every page of a working set, again and again. A page whose counter moved between two harvests has
//! to be in the second, or somebody was told of the write otherwise: the dirty sink, or a fault that granted it. A page that
//! was aged and used is young again. A page that was zapped stays so until its fault is handled, whatever hardware wrote
//! into the entry at the last moment; and what is written to a page after it was repointed does not reach the old one.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use notifier_core::{Access, Gpa};
use rand::{Rng, RngExt};
use serde::Serialize;
use spte_core::format::{Format, Kind};

use crate::machine::{Machine, Work};
use crate::mmu::Mmu;
use crate::vmm::{Vmm, VmmError, failed};

/// Pages of the working set, all written.
pub const PAGES: u64 = 24;

/// What was done, and what was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Facts {
    /// Operations on the working set.
    pub rounds: u64,
    /// Pages whose counter had moved when they were looked at.
    pub moved: u64,
    /// Of these, pages that nobody was told of.
    pub lost_dirty: u64,
    /// Pages that were looked at after a whole pass over what was old.
    pub used: u64,
    /// Of these, pages that were not young.
    pub lost_accessed: u64,
    /// Pages that were zapped.
    pub zapped: u64,
    /// Of these, pages that came back by themselves.
    pub resurrected: u64,
    /// Pages that were repointed.
    pub repointed: u64,
    /// Of these, pages whose old copy was written afterwards, or whose counter went back.
    pub strayed: u64,
    /// Faults of the guest.
    pub faults: u64,
}

impl Facts {
    /// Whether nothing was lost.
    pub fn is_clean(&self) -> bool {
        self.lost_dirty + self.lost_accessed + self.resurrected + self.strayed == 0
    }
}

/// What is lost on purpose, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Lose {
    /// Nothing.
    #[default]
    Nothing,
    /// What was written, once, between two harvests.
    Dirty,
    /// What was used since it was aged.
    Accessed,
    /// That a page was zapped.
    Zapped,
}

impl Lose {
    /// All that can be lost.
    pub const ALL: [Self; 3] = [Self::Dirty, Self::Accessed, Self::Zapped];

    /// Whether it shows.
    pub fn shows(self, facts: &Facts) -> bool {
        match self {
            Self::Nothing => !facts.is_clean(),
            Self::Dirty => facts.lost_dirty > 0,
            Self::Accessed => facts.lost_accessed > 0,
            Self::Zapped => facts.resurrected > 0,
        }
    }
}

struct Race<M: Machine> {
    vmm: Vmm<M>,
    lose: Lose,
    first: u64,
    /// Where each page is now, and its other copy.
    outputs: Arc<Mutex<Vec<[u64; 2]>>>,
    /// The counter of each page when it was last harvested.
    harvested: Vec<u64>,
    told: BTreeSet<u64>,
    facts: Facts,
}

/// Lets a guest write while `rounds` operations are made; and loses something on purpose, if asked to.
///
/// # Errors
/// [`VmmError`], where something is otherwise than it has to be whatever is counted.
pub fn race<M: Machine>(mmu: &Mmu<M>, rounds: u64, lose: Lose, rng: &mut impl Rng) -> Result<Facts, VmmError> {
    let (ground, granule) = {
        let machine = mmu.machine();
        (machine.ground().clone(), machine.driven().shape.granule())
    };
    let first = ground.beside_fixed(PAGES * granule);
    let half = (ground.data.end - ground.data.start) / 2;
    let copies = |number: u64| [0, half].map(|copy| ground.data.start + copy + number * granule);
    let outputs: Vec<[u64; 2]> = (0..PAGES).map(copies).collect();
    for (number, copies) in outputs.iter().enumerate() {
        for copy in copies {
            ground.memory.store(copy + Work::OFFSET, first + number as u64 * granule + Work::OFFSET);
            ground.memory.store(copy + COUNTER, 0);
        }
    }
    let outputs = Arc::new(Mutex::new(outputs));
    let resolves = Arc::clone(&outputs);
    let lookup = move |page: u64| {
        let outputs = resolves.lock().unwrap_or_else(PoisonError::into_inner);
        outputs[((page - first) / granule) as usize][0]
    };
    let vmm = Vmm::new(mmu.clone(), lookup)?;
    let harvested = vec![0; PAGES as usize];
    let mut race = Race { vmm, lose, first, outputs, harvested, told: BTreeSet::new(), facts: Facts::default() };
    for page in race.pages() {
        race.vmm.map(page, race.output(page), granule, Access::RWX)?;
    }
    // With kicks: where flushes are broadcast there is one more thread to wait for.
    race.vmm.work(first, PAGES, PAGES, false)?;
    race.vmm.passes(1)?;
    race.harvest()?;
    for _ in 0..rounds {
        race.facts.rounds += 1;
        let page = first + rng.random_range(0..PAGES) * granule;
        match rng.random_range(0..8) {
            0..=2 => race.harvest()?,
            3 => race.age()?,
            4 => race.vmm.table.arm(race.all()?).map(drop).map_err(failed("arm", first))?,
            5 => race.zap(page)?,
            6 => race.change(page)?,
            _ => race.vmm.passes(1)?,
        }
        race.vmm.attend()?;
    }
    race.vmm.passes(1)?;
    race.harvest()?;
    mmu.stop()?;
    let (_, mismatches) = race.vmm.counts();
    if mismatches != 0 {
        return Err(VmmError::Wrong(format!("a guest read other bytes than it must, {mismatches} times")));
    }
    race.facts.faults = race.vmm.faults.total();
    let facts = race.facts;
    drop(race);
    let machine = mmu.machine();
    machine.ground().fill(|number| machine.code(number));
    Ok(facts)
}

/// Where in a page the guest's counter is.
const COUNTER: u64 = Work::OFFSET + 8;

impl<M: Machine> Race<M> {
    fn pages(&self) -> Vec<u64> {
        (0..PAGES).map(|number| self.first + number * self.vmm.granule).collect()
    }

    fn all(&self) -> Result<notifier_core::GpaRange, VmmError> {
        Vmm::<M>::range(self.first, PAGES * self.vmm.granule)
    }

    fn number(&self, page: u64) -> usize {
        ((page - self.first) / self.vmm.granule) as usize
    }

    fn output(&self, page: u64) -> u64 {
        self.outputs.lock().unwrap_or_else(PoisonError::into_inner)[self.number(page)][0]
    }

    fn counter(&self, page: u64) -> u64 {
        self.vmm.ground.memory.load(self.output(page) + COUNTER)
    }

    fn counters(&self) -> Vec<u64> {
        self.pages().into_iter().map(|page| self.counter(page)).collect()
    }

    /// Takes what is known to be written. What a user knows without hardware's records is what was granted: writing is withheld
    /// again.
    fn take(&mut self) -> Result<(), VmmError> {
        let all = self.all()?;
        if self.vmm.mmu.machine().driven().shape.hw_dirty() {
            let rows = self.vmm.table.harvest_dirty(all).map_err(failed("harvest_dirty", self.first))?;
            self.told.extend(rows.iter().map(|row| row.start().as_u64()));
        } else {
            self.vmm.table.arm(all).map_err(failed("arm", self.first))?;
        }
        self.listen();
        Ok(())
    }

    /// Twice: while the guest writes, and at once again when it is out. What was written after the first has to be in the second,
    /// so that one update that is lost shows, though the page is written again and again.
    fn harvest(&mut self) -> Result<(), VmmError> {
        self.take()?;
        let (after, early) = (self.counters(), std::mem::take(&mut self.told));
        if self.lose == Lose::Dirty {
            self.vmm.passes(1)?;
        }
        let held = self.vmm.mmu.hold()?;
        let last = self.counters();
        if self.lose == Lose::Dirty {
            self.take()?;
            self.told.clear();
        }
        self.take()?;
        for (number, page) in self.pages().into_iter().enumerate() {
            if last[number] == self.harvested[number] {
                continue;
            }
            self.facts.moved += 1;
            let told = self.told.contains(&page) || (last[number] == after[number] && early.contains(&page));
            self.facts.lost_dirty += u64::from(!told);
        }
        self.harvested = last;
        self.told.clear();
        if held {
            self.vmm.mmu.go_on()?;
        }
        Ok(())
    }

    fn listen(&mut self) {
        for range in self.vmm.heard() {
            let pages = self.pages().into_iter().filter(|page| range.contains(Gpa::new(*page)));
            self.told.extend(pages.collect::<Vec<u64>>());
        }
        self.told.append(&mut self.vmm.stored);
    }

    fn age(&mut self) -> Result<(), VmmError> {
        let all = self.all()?;
        self.vmm.table.age(all).map_err(failed("age", self.first))?;
        // Ageing owes no flush; hardware that still knows the pages sets nothing.
        self.vmm.mmu.forget(all)?;
        self.vmm.passes(1)?;
        if self.lose == Lose::Accessed {
            self.vmm.table.age(all).map_err(failed("age", self.first))?;
        }
        for page in self.pages() {
            let Some(found) = self.vmm.table.entry(Gpa::new(page)).filter(|found| found.kind == Kind::Leaf) else {
                continue;
            };
            self.facts.used += 1;
            if !self.vmm.table.format().is_young(found.level, found.raw) {
                self.facts.lost_accessed += 1;
            }
        }
        Ok(())
    }

    fn zap(&mut self, page: u64) -> Result<(), VmmError> {
        self.vmm.zap(page, self.vmm.granule)?;
        self.facts.zapped += 1;
        if self.lose == Lose::Zapped {
            self.vmm.map(page, self.output(page), self.vmm.granule, Access::RWX)?;
        }
        for _ in 0..100 {
            if self.vmm.table.entry(Gpa::new(page)).is_some_and(|found| found.kind == Kind::Leaf) {
                self.facts.resurrected += 1;
                break;
            }
            std::hint::spin_loop();
        }
        if self.lose == Lose::Zapped {
            // The guest waits with a fault, or has not come there yet.
            self.vmm.zap(page, self.vmm.granule)?;
        }
        self.listen();
        Ok(())
    }

    /// Moves a page to its other copy as a VMM does: when nobody can write it any more it is copied.
    fn change(&mut self, page: u64) -> Result<(), VmmError> {
        let number = self.number(page);
        let [own, other] = self.outputs.lock().unwrap_or_else(PoisonError::into_inner)[number];
        let (memory, outputs) = (Arc::clone(&self.vmm.ground.memory), Arc::clone(&self.outputs));
        let mut copied = 0;
        let copy = || {
            copied = memory.load(own + COUNTER);
            memory.store(other + COUNTER, copied);
            // A fault leads to the new copy from now on.
            outputs.lock().unwrap_or_else(PoisonError::into_inner)[number] = [other, own];
        };
        if self.vmm.change(page, own, other, copy)? {
            self.facts.repointed += 1;
        }
        self.vmm.passes(1)?;
        let memory = &self.vmm.ground.memory;
        if memory.load(own + COUNTER) != copied || memory.load(other + COUNTER) < copied {
            self.facts.strayed += 1;
        }
        self.listen();
        Ok(())
    }
}
