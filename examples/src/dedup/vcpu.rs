// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What vCPUs do: one reads, one writes. How they reach memory is their [`Agent`]'s business.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    access::Agent,
    damage::{Checking, Stamping},
    error::Error,
    ledger::Stamp,
};

/// Pages touched between two rests. Agents are many and processors few: one that was scheduled away inside a scope holds
/// every window up, so nobody is to need its whole time slice.
const BURST: usize = 24;
const READER_REST: Duration = Duration::from_micros(300);
/// Between two bursts of a writing vCPU.
pub(crate) const WRITER_REST: Duration = Duration::from_millis(2);
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
pub(crate) fn read(agent: &mut impl Agent, seed: u64, stop: &AtomicBool) -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut sweep = 0..agent.guest().pages();
    while !stop.load(Ordering::Relaxed) {
        let next = |_| sweep.next().unwrap_or_else(|| agent.guest().working_set.pick(&mut rng));
        let pages: Vec<usize> = (0..BURST).map(next).collect();
        agent.check(&pages)?;
        agent.guest().pace.rest(READER_REST);
    }
    Ok(())
}

/// Changes pages, and puts the old contents back after a while. Looks at a page before each change of it. `stamps` are
/// this agent's own.
pub(crate) fn write(
    agent: &mut impl Agent,
    seed: u64,
    mut stamps: std::ops::Range<u64>,
    rest: Duration,
    stop: &AtomicBool,
) -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut standing: VecDeque<(Instant, usize)> = VecDeque::new();
    let ledger = Arc::clone(&agent.guest().ledger);
    while !stop.load(Ordering::Relaxed) {
        let mut stampings: Vec<Stamping<'_>> = Vec::with_capacity(BURST);
        for _ in 0..BURST {
            let (page, stamp) = match standing.front() {
                Some(&(due, page)) if due <= Instant::now() => {
                    standing.pop_front();
                    (page, Stamp::NONE)
                }
                _ if standing.len() < STANDING => {
                    (agent.guest().working_set.pick(&mut rng), stamps.next().map_or(Stamp::NONE, Stamp))
                }
                _ => break,
            };
            let due = Instant::now() + Duration::from_micros(rng.random_range(HOLD));
            match ledger.claim(page) {
                Some(claim) => {
                    if stamp != Stamp::NONE {
                        standing.push_back((due, page));
                    }
                    stampings.push(Stamping { page, claim, stamp });
                }
                // Somebody else has it, or this burst has it already.
                None if stamp == Stamp::NONE => standing.push_back((due, page)),
                None => {}
            }
        }
        agent.stamp(stampings)?;
        agent.guest().pace.rest(rest);
    }
    Ok(())
}
