// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the threads do, a step at a time.

use std::{
    ops::Range,
    sync::{Arc, atomic::Ordering::*},
    thread,
    time::Duration,
};

use notifier_core::{Access, AddrRange, Gpa, GpaRange, Key, SlotFlags, Subscription, Walker};
use spte_core::{HarvestError, RemoveError, SplitError};

use crate::{
    activity::Activity,
    config::Sabotage,
    host::*,
    random::Random,
    run::{Adapter, Shared},
    tables::{AnyTable, Member},
};

/// One thread's own.
pub(crate) struct Worker<'s> {
    pub(crate) shared: &'s Shared,
    pub(crate) index: usize,
    pub(crate) random: Random,
    /// Taken out while it walks.
    pub(crate) walker: Option<Walker>,
    pub(crate) secondary: Option<Member>,
    pub(crate) adapter: Option<(Adapter, Subscription)>,
    pub(crate) serial: u64,
}

/// A guest page, by one of the addresses it may have.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Place {
    Page(usize),
    Alias(usize),
}

impl Place {
    pub(crate) fn gpa(self) -> Gpa {
        match self {
            Place::Page(page) => gpa_of(page),
            Place::Alias(offset) => Gpa::new(ALIAS_BASE + offset as u64 * PAGE),
        }
    }

    pub(crate) fn page(self, alias: Alias) -> Option<usize> {
        match self {
            Place::Page(page) => Some(page),
            Place::Alias(offset) => alias.region().map(|region| region * SPAN + offset),
        }
    }

    /// So many pages from the one that is a multiple of `count`.
    pub(crate) fn around(self, count: usize) -> (Place, GpaRange) {
        let first = match self {
            Place::Page(page) => Place::Page(page / count * count),
            Place::Alias(offset) => Place::Alias(offset / count * count),
        };
        (first, AddrRange::with_len(first.gpa(), count as u64 * PAGE).unwrap())
    }
}

/// What a thread does at each step.
pub(crate) type Step = fn(&mut Worker<'_>);

impl<'s> Worker<'s> {
    pub(crate) fn new(shared: &'s Shared, index: usize, random: Random) -> Self {
        let walker = Some(shared.space.walker());
        Self { shared, index, random, walker, secondary: None, adapter: None, serial: 0 }
    }

    /// Its walker, or now and then a new one.
    pub(crate) fn walker(&mut self) -> Walker {
        let old = self.walker.take().filter(|_| !self.random.one_in(500));
        old.unwrap_or_else(|| self.shared.space.walker())
    }

    pub(crate) fn did(&self, what: Activity) {
        self.shared.activities.did(what);
        self.shared.beat(self.index, what);
    }

    pub(crate) fn doing(&self, what: Activity) {
        self.shared.beat(self.index, what);
    }

    pub(crate) fn wrong(&self, what: impl Into<String>) {
        self.shared.host.failure.report(what);
    }

    pub(crate) fn sabotage(&self, what: Sabotage) -> bool {
        self.shared.sabotage(what)
    }

    pub(crate) fn some_table(&mut self) -> Arc<dyn AnyTable> {
        if self.random.one_in(3)
            && let Some(table) = self.shared.secondary.read().unwrap().clone()
        {
            return table;
        }
        Arc::clone(&self.shared.primary)
    }

    pub(crate) fn some_place(&mut self) -> Place {
        let page = pick(&mut self.random);
        if self.random.one_in(5) { Place::Alias(page % SPAN) } else { Place::Page(page) }
    }

    /// Some pages of one region.
    pub(crate) fn some_pages(&mut self) -> (usize, usize) {
        let page = pick(&mut self.random);
        let most = SPAN - page % SPAN;
        let wanted = match self.random.below(16) {
            0 => SPAN,
            1..4 => 32,
            4..10 => 4,
            _ => 1,
        };
        if wanted == SPAN {
            return (page / SPAN * SPAN, SPAN);
        }
        (page, (1 + self.random.below(wanted as u64) as usize).min(most))
    }

    pub(crate) fn some_range(&mut self) -> GpaRange {
        if self.random.one_in(6) {
            return alias_gpas();
        }
        let (first, count) = self.some_pages();
        gpas(first, count)
    }
}

pub(crate) fn vcpu(worker: &mut Worker<'_>) {
    let table = worker.some_table();
    worker.doing(Activity::Read);
    match worker.random.below(64) {
        0 => worker.lease(&*table),
        1..10 => worker.device(),
        _ => {
            let place = worker.some_place();
            let write = worker.random.one_in(2);
            worker.access(&*table, place, write);
        }
    }
}

pub(crate) fn host(worker: &mut Worker<'_>) {
    let (first, count) = worker.some_pages();
    match worker.random.below(32) {
        0..14 if first / SPAN == MEMFD_REGION => {
            worker.retain(first, gpas(first, count));
            worker.did(Activity::RetainedByGpa);
        }
        0..14 => worker.retain(first, hvas(first, count)),
        14..24 if first / SPAN == MEMFD_REGION => {
            worker.zap(first, gpas(first, count));
            worker.did(Activity::ZappedByGpa);
        }
        14..24 => worker.zap(first, hvas(first, count)),
        24 | 25 => worker.zap_one_alias(),
        26 => worker.balloon(),
        27 => worker.populate(),
        _ => thread::sleep(Duration::from_micros(worker.random.below(300))),
    }
}

pub(crate) fn shape(worker: &mut Worker<'_>) {
    let table = worker.some_table();
    let range = worker.some_range();
    let removed = |worker: &mut Worker<'_>, what, result: Result<_, RemoveError>| match result {
        Ok(_) | Err(RemoveError::Flush { .. }) => worker.did(what),
        Err(error) => worker.wrong(format!("{what:?} of {range}: {error}")),
    };
    match worker.random.below(24) {
        0..3 => match table.split(range) {
            Ok(()) | Err(SplitError::Flush { .. }) => worker.did(Activity::Split),
            Err(error) => worker.wrong(format!("split of {range}: {error}")),
        },
        3 => {
            let parts = PARTS.map(|part| part.guest).concat();
            let whole = parts[worker.random.below(parts.len() as u64) as usize]();
            if table.trim(whole).is_ok_and(|tables| tables != 0) {
                worker.did(Activity::Trimmed);
            }
        }
        4..6 => {
            let access = if worker.random.one_in(2) { Access::READ } else { Access::RX };
            removed(worker, Activity::Restricted, table.restrict(range, access));
        }
        6..9 => {
            let place = worker.some_place();
            worker.protect(&*table, place);
        }
        9..11 => removed(worker, Activity::Armed, table.arm(range)),
        11 => removed(worker, Activity::Unmapped, table.unmap(range)),
        12..14 => {
            if table.age(range).is_ok_and(|young| young != 0) {
                worker.did(Activity::Aged);
            }
        }
        14 => {
            let (first, count) = worker.some_pages();
            let key = if first / SPAN == MEMFD_REGION {
                Key::from(gpas(first, count))
            } else {
                Key::from(hvas(first, count))
            };
            if worker.shared.space.age(key).is_ok() {
                worker.did(Activity::AgedSpace);
            }
            if worker.shared.space.test_age(key).is_ok() {
                worker.did(Activity::TestedAge);
            }
        }
        15..18 => {
            let region = worker.random.below(REGIONS as u64) as usize;
            worker.compact(region);
            worker.collapse(&*table, Place::Page(region * SPAN));
        }
        18 => worker.collapse(&*table, Place::Alias(0)),
        _ => thread::sleep(Duration::from_micros(worker.random.below(500))),
    }
}

pub(crate) fn members(worker: &mut Worker<'_>) {
    worker.doing(Activity::SlotReplaced);
    match worker.random.below(8) {
        0 | 1 => worker.change_alias(),
        2 => worker.replace_logged(),
        3 if worker.random.one_in(2) => worker.replace_slot(0, 2 * SPAN, SlotFlags::empty()),
        4 => worker.change_table(),
        5 => worker.change_device(),
        _ => {}
    }
    thread::sleep(Duration::from_micros(500 + worker.random.below(3000)));
}

pub(crate) fn migration(worker: &mut Worker<'_>) {
    worker.doing(Activity::Harvested);
    let parts = match worker.random.below(8) {
        0 => &PARTS[..],
        n => std::slice::from_ref(&PARTS[n as usize % PARTS.len()]),
    };
    if migrate(worker.shared, parts) {
        worker.did(Activity::Harvested);
    }
    thread::sleep(Duration::from_micros(worker.random.below(3000)));
}

/// Pages, and all the guest ranges that they may be in.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Part {
    pages: fn() -> Range<usize>,
    guest: &'static [fn() -> GpaRange],
}

/// What is migrated by itself.
pub(crate) const PARTS: [Part; 3] = [
    Part { pages: || 0..2 * SPAN, guest: &[|| gpas(0, 2 * SPAN), alias_gpas] },
    Part { pages: || LOGGED_REGION * SPAN..(LOGGED_REGION + 1) * SPAN, guest: &[|| gpas(LOGGED_REGION * SPAN, SPAN)] },
    Part { pages: || MEMFD_REGION * SPAN..(MEMFD_REGION + 1) * SPAN, guest: &[|| gpas(MEMFD_REGION * SPAN, SPAN)] },
];

/// One round of a migration: takes what was reported, harvests the tables, then copies what either says was written.
/// Whether it could.
///
/// In this order: when the harvest returns nobody writes any more through a translation whose fact was taken.
pub(crate) fn migrate(shared: &Shared, parts: &[Part]) -> bool {
    let host = &*shared.host;
    let mut written = vec![false; PAGES];
    for page in parts.iter().flat_map(|part| (part.pages)()) {
        written[page] = host.dirty[page].swap(false, SeqCst);
    }
    let tables = [Some(Arc::clone(&shared.primary)), shared.secondary.read().unwrap().clone()];
    let mut good = true;
    for (table, range) in tables
        .iter()
        .flatten()
        .flat_map(|table| parts.iter().flat_map(|part| part.guest).map(move |range| (table, range())))
    {
        let before = host.alias();
        let facts = match table.harvest(range) {
            Ok(facts) => facts,
            Err(HarvestError::Flush { dirty, .. }) => {
                good = false;
                dirty
            }
            Err(error) => {
                host.failure.report(format!("harvest of {range}: {error}"));
                return true;
            }
        };
        let alias = Some(before).filter(|alias| !alias.is_changing() && host.alias() == *alias);
        facts.into_iter().flat_map(|fact| host.pages_of(fact, alias)).for_each(|page| written[page] = true);
    }
    let written = (0..PAGES).filter(|page| written[*page]);
    if !good {
        // Not flushed: they may still be written.
        written.for_each(|page| host.mark(page));
        return false;
    }
    let mut copies = shared.copies.lock().unwrap();
    for page in written {
        let _lock = host.lock(page / SPAN);
        if let Some(backing) = host.backing(page) {
            copies[page] = host.value(backing.frame);
            shared.activities.did(Activity::Copied);
        }
    }
    true
}
