// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! vCPUs: one reads, one writes.

use std::{
    collections::VecDeque,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{access::Agent, error::Error, guest::Guest, ledger::Stamp};

/// Pages touched between two rests. Agents are many and processors few: one that was scheduled away inside a scope holds
/// every window up, so nobody is to need its whole time slice.
const BURST: usize = 24;
const READER_REST: Duration = Duration::from_micros(300);
const WRITER_REST: Duration = Duration::from_millis(2);
/// How long a change stays before the old contents are put back.
const HOLD: std::ops::Range<u64> = 500..8_000;
/// Uses after which the working set is another.
const WANDER: usize = 20_000;
/// Changes that stand at one time.
const STANDING: usize = 96;

/// Which pages a guest uses, its vCPUs and its device alike: mostly those of a small part of RAM that wanders.
#[derive(Debug)]
pub(crate) struct WorkingSet {
    pages: usize,
    hot: AtomicUsize,
    uses: AtomicUsize,
}

impl WorkingSet {
    pub(crate) fn new(pages: usize) -> Self {
        Self { pages, hot: AtomicUsize::new(0), uses: AtomicUsize::new(0) }
    }

    /// The page to use next.
    pub(crate) fn pick(&self, rng: &mut ChaCha8Rng) -> usize {
        if self.uses.fetch_add(1, Ordering::Relaxed).is_multiple_of(WANDER) {
            self.hot.store(rng.random_range(0..self.pages), Ordering::Relaxed);
        }
        match rng.random_range(0..4) {
            0 => rng.random_range(0..self.pages),
            _ => (self.hot.load(Ordering::Relaxed) + rng.random_range(0..(self.pages / 32).max(1))) % self.pages,
        }
    }
}

/// How often agents rest, so that a machine carries all of them, and small guests are not all working set.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Pace(u32);

impl Pace {
    /// For one of so many guests with so many pages each. The rests above are made for two guests of 128 MiB.
    pub(crate) fn new(guests: u32, pages: usize) -> Self {
        Self((guests / 2).max(1) * (32_768 / pages.max(1)).clamp(1, 4) as u32)
    }

    /// As long a rest as this pace allows for one of `base`.
    pub(crate) fn rest(self, base: Duration) {
        thread::sleep(base * self.0);
    }
}

/// Checks whole pages: all of RAM once, in order, and then here and there.
pub(crate) fn read(guest: &Guest, seed: u64, stop: &AtomicBool) -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut agent = Agent::new(guest);
    let mut sweep = 0..guest.pages();
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let page = sweep.next().unwrap_or_else(|| guest.working_set.pick(&mut rng));
            agent.check(page)?;
        }
        guest.pace.rest(READER_REST);
    }
    Ok(())
}

/// Changes pages, and puts the old contents back after a while. Looks at a page before each change of it.
pub(crate) fn write(guest: &Guest, seed: u64, stop: &AtomicBool) -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut agent = Agent::new(guest);
    let mut standing: VecDeque<(Instant, usize)> = VecDeque::new();
    let mut stamps = 1..u64::MAX;
    while !stop.load(Ordering::Relaxed) {
        for _ in 0..BURST {
            let (page, stamp) = match standing.front() {
                Some(&(due, page)) if due <= Instant::now() => {
                    standing.pop_front();
                    (page, Stamp::NONE)
                }
                _ if standing.len() < STANDING => {
                    (guest.working_set.pick(&mut rng), stamps.next().map_or(Stamp::NONE, Stamp))
                }
                _ => break,
            };
            let due = Instant::now() + Duration::from_micros(rng.random_range(HOLD));
            let claim = match guest.ledger.claim(page) {
                Some(claim) => claim,
                // A device has it.
                None if stamp == Stamp::NONE => {
                    standing.push_back((due, page));
                    continue;
                }
                None => continue,
            };
            agent.check_claimed(page, &claim)?;
            agent.stamp(page, claim, stamp)?;
            if stamp != Stamp::NONE {
                standing.push_back((due, page));
            }
        }
        guest.pace.rest(WRITER_REST);
    }
    Ok(())
}
