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

use notifier_core::{Change, DirtySink, Hva, InvalidationGuard, OpenError, Outcome, Retained, WindowAddress};

use super::{
    cli::{MergeMode, Safety},
    error::Error,
    guest::Guest,
    mapping::{GROUP, Place, gpa, home},
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
                guest.home.read((page * PAGE) as u64, &mut bytes)?;
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
        match self.safety {
            Safety::Safe => {
                for batch in batches {
                    if self.merge(batch, None)? == Done::InTheWay {
                        in_the_way.push(batch);
                    }
                }
            }
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
            Safety::NoNotify => {
                for batch in batches {
                    let frames = self.compare(batch)?;
                    self.repoint_host(batch, &frames, |_| true)?;
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
            guest.home.read((page * PAGE) as u64, &mut bytes)?;
            if fingerprint(&bytes) == expected && guest.mapping.place(page) == Place::Home {
                frames.push(Some(self.store.share(&bytes)?));
            } else {
                self.tally.differed.add(1);
                frames.push(None);
            }
        }
        Ok(frames)
    }

    /// Merges a batch inside one window. `compared` is given by those who were careless.
    fn merge(&mut self, batch: &Batch, compared: Option<Vec<Option<Frame>>>) -> Result<Done, Error> {
        let guest = &self.guests[batch.guest];
        let range = guest.host_range(batch.first, batch.fingerprints.len())?;
        let (done, frames) = match self.mode {
            MergeMode::Change => match in_the_way(guest.space.retain(range))? {
                None => (Done::InTheWay, compared),
                Some(window) => {
                    let frames = compared.map_or_else(|| self.compare(batch), Ok)?;
                    let changed = self.change(batch, &frames, &window)?;
                    self.repoint_host(batch, &frames, |index| changed[index])?;
                    window.close()?;
                    return Ok(Done::Merged);
                }
            },
            MergeMode::Zap => {
                let before = self.raw_entries(batch);
                match in_the_way(guest.space.zap(range))? {
                    None => (Done::InTheWay, compared),
                    Some(window) => {
                        let frames = compared.map_or_else(|| self.compare(batch), Ok)?;
                        self.tally.zapped.add(frames.iter().flatten().count() as u64);
                        self.sample(batch, &before, |index| frames[index].is_some());
                        self.repoint_host(batch, &frames, |_| true)?;
                        window.close()?;
                        return Ok(Done::Merged);
                    }
                }
            }
        };
        // The window did not open; nobody points at what was found before.
        frames.iter().flatten().flatten().try_for_each(|&frame| self.store.leave(frame))?;
        Ok(done)
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
                // It had to be removed; the next fault finds it at home.
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

    /// Moves pages to their frames in the mapping, and gives their homes back to the host. Pages that `moved` does not
    /// want leave their frames.
    fn repoint_host(
        &mut self,
        batch: &Batch,
        frames: &[Option<Frame>],
        moved: impl Fn(usize) -> bool,
    ) -> Result<(), Error> {
        let guest = &self.guests[batch.guest];
        let mut places = guest.mapping.lock(batch.first);
        // Neighbours' homes are punched with one call.
        let mut run: Option<(usize, usize)> = None;
        let punch = |(first, count): (usize, usize)| guest.home.punch((first * PAGE) as u64, (count * PAGE) as u64);
        for (index, frame) in frames.iter().enumerate() {
            let (page, Some(frame)) = (batch.first + index, *frame) else { continue };
            if !moved(index) {
                self.store.leave(frame)?;
                continue;
            }
            places.set(page, Place::Merged(frame));
            run = match run {
                Some((first, count)) if first + count == page => Some((first, count + 1)),
                other => {
                    other.map_or(Ok(()), punch)?;
                    Some((page, 1))
                }
            };
            self.tally.merged.add(1);
            let known = &mut self.known[batch.guest][page];
            self.new += u64::from(!std::mem::replace(known, true));
        }
        run.map_or(Ok(()), punch)
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
fn in_the_way<M: notifier_core::WindowMode, A: WindowAddress>(
    opened: Result<InvalidationGuard<'_, M, A>, OpenError>,
) -> Result<Option<InvalidationGuard<'_, M, A>>, Error> {
    match opened {
        Ok(window) => Ok(Some(window)),
        Err(OpenError::Pinned { .. } | OpenError::Busy { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
