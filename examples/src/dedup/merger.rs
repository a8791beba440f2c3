// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The merger: finds pages of equal contents, and makes them one.
//!
//! A pass over all guests:
//!
//! 1. *Scan.* The dirty facts since the last pass are taken; every page at home that was not written since is hashed.
//! 2. *Select.* Candidates are pages whose hash another page or a frame of the store has, and zero pages.
//! 3. *Merge*, in batches of neighbours: open a window, compare, find or fill the frame, repoint, move the page to the
//!    frame in the mapping, give its home back to the host, close.
//!
//! Hashes and dirty facts only say what is worth a window. What is equal is decided by comparing inside it, where nobody
//! writes; the two unsafe modes leave that out, and do harm.
//!
//! With `--mode change` a page that nobody translates when it is to be repointed stays at home until a later pass:
//! `change_pte` creates nothing, and the page's next fault would be one on a merged page. With `--mode zap` every
//! merge is followed by such a fault.

use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use notifier_core::{
    Change, DirtySink, Hva, InvalidationGuard, OpenError, Outcome, Retained, WindowAddress, WindowMode,
};

use super::{
    cli::{MergeMode, Safety},
    clock::thread_cpu,
    error::Error,
    guest::Guest,
    home::Home,
    mapped::Merge,
    mapping::{GROUP, Place, Places, gpa, home},
    memory::PAGE,
    report::Sample,
    store::{Frame, Store, fingerprint},
    table::RawEntry,
    tally::Tally,
};

/// How many raw entries are shown before and after their change.
const SAMPLES: usize = 8;
/// Batches that are merged before the merger looks whether it is to stop; and that `--unsafe-no-fence` compares before it
/// opens the first one's window.
const CHUNK: usize = 256;
/// Between two passes: a pass that finds little need not be followed by another at once.
const REST: Duration = Duration::from_millis(25);
/// After passes for so long without a page that was never merged before, nothing more is to be merged.
const IDLE: Duration = Duration::from_secs(2);

/// Neighbouring candidates of one guest, all of one group.
#[derive(Debug)]
struct Batch {
    guest: usize,
    first: usize,
    fingerprints: Vec<u64>,
}

/// What became of a batch.
#[derive(Debug, PartialEq, Eq)]
enum Done {
    Merged,
    /// Somebody else has the range: a lease, or another window.
    InTheWay,
}

/// The merging thread's state.
#[derive(Debug)]
pub(crate) struct Merger<'j> {
    guests: &'j [Guest],
    store: &'j Store,
    tally: Arc<Tally>,
    mode: MergeMode,
    safety: Safety,
    /// By guest and page: whether it was merged before.
    known: Vec<Vec<bool>>,
    /// Pages merged for the first time, this pass.
    new: u64,
    samples: Vec<Sample>,
    /// Saved pages at which the time is taken, and when that was.
    mark: u64,
    marked: Option<(Instant, Duration)>,
}

impl<'j> Merger<'j> {
    pub(crate) fn new(
        guests: &'j [Guest],
        store: &'j Store,
        tally: &Arc<Tally>,
        mode: MergeMode,
        safety: Safety,
    ) -> Self {
        Self {
            guests,
            store,
            tally: Arc::clone(tally),
            mode,
            safety,
            known: guests.iter().map(|guest| vec![false; guest.pages()]).collect(),
            new: 0,
            samples: Vec::new(),
            mark: u64::MAX,
            marked: None,
        }
    }

    /// When as many pages are saved, the time is taken.
    pub(crate) fn mark(&mut self, saved: u64) {
        self.mark = saved;
    }

    /// When that was, and what processor time this thread had used by then.
    pub(crate) fn marked(&self) -> Option<(Instant, Duration)> {
        self.marked
    }

    /// Makes passes until one merges nothing.
    pub(crate) fn until_quiet(&mut self, stop: &AtomicBool) -> Result<(), Error> {
        loop {
            self.pass(stop)?;
            if self.new == 0 || stop.load(Ordering::Relaxed) {
                return Ok(());
            }
        }
    }

    /// Makes passes until told to stop; says in `idle` when nothing more is to be merged, and goes on.
    pub(crate) fn run(mut self, stop: &AtomicBool, idle: &AtomicBool) -> Result<Vec<Sample>, Error> {
        let mut last_new = Instant::now();
        while !stop.load(Ordering::Relaxed) {
            let before = Instant::now();
            self.pass(stop)?;
            self.tally.passes.add(1);
            if self.new != 0 {
                last_new = Instant::now();
            }
            idle.store(last_new.elapsed() >= IDLE, Ordering::Relaxed);
            // At most half of a processor for ever.
            thread::sleep(before.elapsed().clamp(REST, 10 * REST));
        }
        Ok(self.samples)
    }

    fn pass(&mut self, stop: &AtomicBool) -> Result<(), Error> {
        self.new = 0;
        let scanned = self.guests.iter().map(|guest| self.scan(guest, stop)).collect::<Result<Vec<_>, _>>()?;
        let mut times: HashMap<u64, u32> = HashMap::new();
        scanned.iter().flatten().for_each(|(_, fingerprint)| *times.entry(*fingerprint).or_default() += 1);
        let batches = self.select(&scanned, &times);

        let mut in_the_way = Vec::new();
        for chunk in batches.chunks(CHUNK) {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            in_the_way.extend(self.merge_all(chunk)?);
        }
        // Leases are short: what they held up is tried once more, and then left for the next pass.
        for batch in in_the_way {
            if stop.load(Ordering::Relaxed) {
                return Ok(());
            }
            self.merge_all(std::slice::from_ref(batch))?;
        }
        Ok(())
    }

    /// Hashes what lies at home and was not written since the last pass: page and fingerprint, ascending.
    fn scan(&self, guest: &Guest, stop: &AtomicBool) -> Result<Vec<(usize, u64)>, Error> {
        // Windows report what they find dirty to the same log, through the space.
        let dirty = guest.table.harvest_dirty(guest.guest_range(0, guest.pages())?)?;
        dirty.into_iter().for_each(|range| guest.written.dirty(range));
        let mut found = Vec::new();
        let mut bytes = [0; PAGE];
        for page in 0..guest.pages() {
            if page % GROUP == 0 && stop.load(Ordering::Relaxed) {
                break;
            }
            if guest.mapping.place(page) == Place::Home && !guest.written.take(page) {
                guest.home.read(page, &mut bytes)?;
                found.push((page, fingerprint(&bytes)));
            }
        }
        self.tally.scanned.add(found.len() as u64);
        Ok(found)
    }

    fn select(&self, scanned: &[Vec<(usize, u64)>], times: &HashMap<u64, u32>) -> Vec<Batch> {
        let mut batches: Vec<Batch> = Vec::new();
        for (guest, pages) in scanned.iter().enumerate() {
            for &(page, fingerprint) in pages {
                if times.get(&fingerprint).is_none_or(|&times| times < 2) && !self.store.has(fingerprint) {
                    continue;
                }
                match batches.last_mut() {
                    Some(batch)
                        if batch.guest == guest
                            && batch.first + batch.fingerprints.len() == page
                            && page % GROUP != 0 =>
                    {
                        batch.fingerprints.push(fingerprint);
                    }
                    _ => batches.push(Batch { guest, first: page, fingerprints: vec![fingerprint] }),
                }
            }
        }
        batches
    }

    /// Merges some batches; returns those that somebody was in the way of.
    fn merge_all<'b>(&mut self, batches: &'b [Batch]) -> Result<Vec<&'b Batch>, Error> {
        let mut in_the_way = Vec::new();
        let mapped = matches!(self.guests[0].home, Home::Mapped(_));
        match self.safety {
            // What a careless VMM writes: everything is compared first, "for it takes long", and the windows are opened
            // when it is known what to do. Whoever wrote in between wrote for nothing.
            Safety::NoFence => {
                let compared = batches.iter().map(|batch| self.compare(batch)).collect::<Result<Vec<_>, _>>()?;
                for (batch, frames) in batches.iter().zip(compared) {
                    if self.merge(batch, Some(frames))? == Done::InTheWay {
                        in_the_way.push(batch);
                    }
                }
            }
            // What another one writes: no window at all. The tables still lead to the home that is given back.
            Safety::NoNotify if !mapped => {
                for batch in batches {
                    let frames = self.compare(batch)?;
                    let moved: Vec<bool> = frames.iter().map(Option::is_some).collect();
                    let mut places = self.guests[batch.guest].mapping.lock(batch.first);
                    self.move_pages(batch, &frames, &moved, &mut places)?;
                }
            }
            // Behind a mapping a translation to the home stays good. There it is the un-merges that nobody is told of.
            Safety::Safe | Safety::NoNotify => {
                for batch in batches {
                    if self.merge(batch, None)? == Done::InTheWay {
                        in_the_way.push(batch);
                    }
                }
            }
        }
        Ok(in_the_way)
    }

    /// Which pages of a batch are what they were when they were scanned, and the frames with their contents; the pages
    /// are sharers of them. True for as long as nobody writes.
    fn compare(&self, batch: &Batch) -> Result<Vec<Option<Frame>>, Error> {
        let guest = &self.guests[batch.guest];
        let mut bytes = [0; PAGE];
        let mut frames = Vec::with_capacity(batch.fingerprints.len());
        for (page, &expected) in (batch.first..).zip(&batch.fingerprints) {
            // Only the merger merges, and what is at home stays there until it does.
            guest.home.read(page, &mut bytes)?;
            if fingerprint(&bytes) == expected && guest.mapping.place(page) == Place::Home {
                frames.push(Some(self.store.share(&bytes, &self.wished(batch.guest, page))?));
            } else {
                self.tally.differed.add(1);
                frames.push(None);
            }
        }
        Ok(frames)
    }

    /// Where new contents of a page had best lie in the store.
    fn wished(&self, guest: usize, page: usize) -> Vec<Frame> {
        let mapping = &self.guests[guest].mapping;
        match self.guests[guest].home {
            Home::File(_) => Vec::new(),
            // What its mapping shows already needs no other one.
            Home::Mapped(_) => {
                let place = self.store.place((guest * mapping.pages() + page) as u32);
                mapping.last(page).into_iter().chain([place]).collect()
            }
        }
    }

    /// Merges a batch inside one window. `compared` is given by those who were careless.
    fn merge(&mut self, batch: &Batch, compared: Option<Vec<Option<Frame>>>) -> Result<Done, Error> {
        let guest = &self.guests[batch.guest];
        let range = guest.host_range(batch.first, batch.fingerprints.len())?;
        let before = self.raw_entries(batch);
        match self.mode {
            MergeMode::Change => match in_the_way(guest.space.retain(range))? {
                None => self.put_off(compared),
                Some(window) => self.merge_inside(batch, compared, window, Self::change),
            },
            MergeMode::Zap => match in_the_way(guest.space.zap(range))? {
                None => self.put_off(compared),
                Some(window) => self.merge_inside(batch, compared, window, |merger, batch, frames, _| {
                    merger.tally.zapped.add(frames.iter().flatten().count() as u64);
                    merger.sample(batch, &before, |index| frames[index].is_some());
                    Ok(frames.iter().map(Option::is_some).collect())
                }),
            },
        }
    }

    /// The window did not open; nobody points at what was found before.
    fn put_off(&self, compared: Option<Vec<Option<Frame>>>) -> Result<Done, Error> {
        compared.iter().flatten().flatten().try_for_each(|&frame| self.store.leave(frame))?;
        Ok(Done::InTheWay)
    }

    /// Merges a batch: nobody writes, equal pages are found, tables follow.
    fn merge_inside<'w, M: WindowMode>(
        &mut self,
        batch: &Batch,
        compared: Option<Vec<Option<Frame>>>,
        window: InvalidationGuard<'w, M, Hva>,
        repoint: impl FnOnce(
            &mut Self,
            &Batch,
            &[Option<Frame>],
            &InvalidationGuard<'w, M, Hva>,
        ) -> Result<Vec<bool>, Error>,
    ) -> Result<Done, Error> {
        let guest = &self.guests[batch.guest];
        let (first, count) = (batch.first, batch.fingerprints.len());
        let mut places = guest.mapping.lock(first);
        let mut frames = match compared {
            Some(frames) => frames,
            None => match guest.home.hold(first, count) {
                Ok(()) => self.compare(batch)?,
                // Whoever writes them may go on doing so: they are left for a later pass.
                Err(_) => vec![None; count],
            },
        };
        if self.mode == MergeMode::Change && matches!(guest.home, Home::Mapped(_)) {
            // Here the host's mapping changes first, so that what no table translates has to be left out before.
            for (page, frame) in (first..).zip(&mut frames) {
                if let Some(found) = frame.take_if(|_| !guest.table.translates(gpa(page))) {
                    self.store.leave(found)?;
                    self.tally.absent.add(1);
                }
            }
        }
        let covered = guest.home.cover(&window, first, &frames)?;
        for (frame, covered) in frames.iter_mut().zip(covered) {
            match (covered, frame.take_if(|_| covered != Merge::Merged)) {
                (Merge::Home, Some(frame)) => {
                    self.store.leave(frame)?;
                    self.tally.differed.add(1);
                }
                // A sharer for ever: what the host may still show is not filled with anything else.
                (Merge::Stuck, _) => self.tally.stuck.add(1),
                _ => {}
            }
        }
        let repointed = repoint(self, batch, &frames, &window)?;
        // Behind a mapping, the page shows its frame whether it was in a table or not.
        let moved: Vec<bool> = match guest.home {
            Home::File(_) => repointed,
            Home::Mapped(_) => frames.iter().map(Option::is_some).collect(),
        };
        self.move_pages(batch, &frames, &moved, &mut places)?;
        guest.home.settle(first, &moved)?;
        drop(places);
        window.close()?;
        if self.mark != u64::MAX && self.marked.is_none() {
            let saved = self.tally.merged.get() - self.tally.unmerged.get();
            if saved.saturating_sub(self.store.in_use()) >= self.mark {
                self.marked = Some((Instant::now(), thread_cpu()));
            }
        }
        Ok(Done::Merged)
    }

    /// Repoints the guest's translations of a batch, inside its window. Whether each page now leads to its frame.
    fn change(
        &mut self,
        batch: &Batch,
        frames: &[Option<Frame>],
        window: &InvalidationGuard<'_, Retained, Hva>,
    ) -> Result<Vec<bool>, Error> {
        let guest = &self.guests[batch.guest];
        let before = self.raw_entries(batch);
        let mut changed = vec![false; frames.len()];
        let pages: Vec<(usize, Frame)> =
            (0..).zip(frames).filter_map(|(index, frame)| frame.map(|frame| (index, frame))).collect();
        let changes: Vec<_> = pages
            .iter()
            .map(|&(index, frame)| Change {
                page: guest.host_page(batch.first + index),
                expected: home(batch.first + index),
                new: frame.output(),
            })
            .collect();
        for (outcome, &(index, _)) in window.change_pte(&changes)?.iter().zip(&pages) {
            match outcome.outcome {
                Outcome::Changed => changed[index] = true,
                Outcome::Absent => self.tally.absent.add(1),
                // It had to be removed; the next fault finds where it is.
                Outcome::Zapped => {}
            }
        }
        // What was not repointed has kept its host mapping.
        for index in (0..frames.len()).filter(|&index| frames[index].is_none()) {
            window.keep(guest.host_range(batch.first + index, 1)?)?;
        }
        self.sample(batch, &before, |index| changed[index]);
        Ok(changed)
    }

    /// Moves pages to their frames in the mapping, and gives their homes back to the host. Pages that are not to move
    /// leave their frames.
    fn move_pages(
        &mut self,
        batch: &Batch,
        frames: &[Option<Frame>],
        moved: &[bool],
        places: &mut Places<'_>,
    ) -> Result<(), Error> {
        let guest = &self.guests[batch.guest];
        for (index, frame) in frames.iter().enumerate() {
            let (page, Some(frame)) = (batch.first + index, *frame) else { continue };
            if !moved[index] {
                self.store.leave(frame)?;
                continue;
            }
            places.set(page, Place::Merged(frame));
            self.tally.merged.add(1);
            let known = &mut self.known[batch.guest][page];
            self.new += u64::from(!std::mem::replace(known, true));
        }
        // Neighbours' homes are given back with one call.
        let mut index = 0;
        while index < moved.len() {
            let run = moved[index..].iter().take_while(|&&moved| moved).count();
            if run != 0 {
                guest.home.give(batch.first + index, run)?;
            }
            index += run + 1;
        }
        Ok(())
    }

    /// The raw entries of a batch, while samples are wanted.
    fn raw_entries(&self, batch: &Batch) -> Vec<Option<RawEntry>> {
        let pages = if self.samples.len() < SAMPLES { batch.fingerprints.len() } else { 0 };
        (batch.first..batch.first + pages).map(|page| self.guests[batch.guest].table.entry(gpa(page))).collect()
    }

    /// Keeps the first page of the batch that was changed, as it was before and as it is now.
    fn sample(&mut self, batch: &Batch, before: &[Option<RawEntry>], changed: impl Fn(usize) -> bool) {
        let Some(index) = (0..before.len()).find(|&index| changed(index)) else { return };
        let Some(before) = before[index] else { return };
        let page = batch.first + index;
        let after = self.guests[batch.guest].table.entry(gpa(page));
        self.samples.push(Sample::new(batch.guest, gpa(page), before, after));
    }
}

/// A window, or `None` where a lease or another window is in the way for now.
fn in_the_way<M: WindowMode, A: WindowAddress>(
    opened: Result<InvalidationGuard<'_, M, A>, OpenError>,
) -> Result<Option<InvalidationGuard<'_, M, A>>, Error> {
    match opened {
        Ok(window) => Ok(Some(window)),
        Err(OpenError::Pinned { .. } | OpenError::Busy { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
