// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Contiguous sets under stress. Folders, unmappers, windows, harvesters and installers work on one table of 512 pages, while
//! hardware is played as meanly as it may be: a write is recorded in any member of a set, and then goes on to any page of
//! it, from what was cached, until a flush has waited for the scope.
//!
//! Rounds are short: a write that is lost shows only if nobody writes the page again. At the end of each round all is
//! unmapped, and what was reported as written last must be what was written last.
//!
//! | variable | meaning | unless set |
//! |---|---|---|
//! | `SPTE_STRESS_SECONDS` | how long the rounds take, together | 3 |
//! | `SPTE_STRESS_SEED` | the seed of all choices; the schedule is the machine's | from the clock |

mod common;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::SeqCst},
    },
    time::{Duration, Instant},
};

use common::*;
use notifier_core::{Access, AddrRange, Change, Extent, Gpa, GpaRange, Outcome, OutputAddr, Scope, Space, Walker};
use spte_arm64::*;
use spte_core::{
    Entry, Flush, FlushError, FlushRequest, HeapPages, MapError, MapOptions, PageSource, Table, TableLayout,
    format::{Format, Kind},
};

const MARK: u64 = 1 << 52;
const YOUNG: u64 = 1 << 10;
const WRITTEN: u64 = 1 << 7;
const DBM: u64 = 1 << 51;

const PAGE: u64 = 4096;
const PAGES: u64 = 512;
const SET: u64 = 16;
/// Where the guest's memory begins: one table of the last level.
const START: u64 = PAGES * PAGE;
/// A page is in one of two places at a time.
const PLACES: [u64; 2] = [1 << 32, 1 << 33];

/// A round that takes longer than this hangs: it is aborted, so that the threads can be looked at.
const HANGS: Duration = Duration::from_secs(120);
const ROUND: Duration = Duration::from_millis(40);

/// A flush that lets others come in between.
struct Slow;

impl Flush for Slow {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        std::thread::yield_now();
        Ok(())
    }
}

/// Numbers that look random (xorshift).
struct Random(u64);

impl Random {
    fn next(&mut self, below: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % below
    }

    /// A page, some pages, a set, or more.
    fn range(&mut self) -> GpaRange {
        let (first, pages) = match self.next(8) {
            0..=3 => (self.next(PAGES), 1),
            4 => (self.next(PAGES), 1 + self.next(40)),
            5 | 6 => (self.next(PAGES / SET) * SET, SET),
            _ => (self.next(PAGES / SET) * SET, SET * (1 + self.next(4))),
        };
        pages_of(first, pages.min(PAGES - first))
    }
}

fn pages_of(first: u64, pages: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(START + first * PAGE), pages * PAGE).unwrap()
}

fn indices(range: GpaRange) -> std::ops::Range<u64> {
    (range.start().as_u64() - START) / PAGE..(range.end().as_u64() - START) / PAGE
}

/// What the guest's memory is like.
struct Memory {
    /// How often each page was written.
    written: Vec<AtomicU64>,
    /// How often, when it was last reported.
    copied: Vec<AtomicU64>,
    /// In which of the two places it is. Changes in windows alone.
    place: Vec<AtomicU64>,
}

impl Memory {
    fn new() -> Self {
        let zeros = || (0..PAGES).map(|_| AtomicU64::new(0)).collect();
        Self { written: zeros(), copied: zeros(), place: zeros() }
    }

    fn copy(&self, range: GpaRange) {
        for page in indices(range) {
            let now = self.written[page as usize].load(SeqCst);
            self.copied[page as usize].fetch_max(now, SeqCst);
        }
    }

    fn output(&self, page: u64) -> u64 {
        PLACES[self.place[page as usize].load(SeqCst) as usize] + page * PAGE
    }
}

struct Round {
    space: Space,
    table: Arc<Table<Stage2, HeapPages, Slow>>,
    memory: Arc<Memory>,
    stop: AtomicBool,
    wrong: Mutex<Option<String>>,
    /// What the round came to do.
    folded: AtomicU64,
    spread: AtomicU64,
    changed: AtomicU64,
}

impl Round {
    fn fail(&self, what: String) {
        self.wrong.lock().unwrap().get_or_insert(what);
        self.stop.store(true, SeqCst);
    }

    /// The entry that `found` was read from, while `scope` keeps its table.
    fn entry<'s>(&self, _scope: &'s Scope<'_>, gpa: u64) -> Option<(&'s Entry, spte_core::Found)> {
        let rows = self.table.walk(Gpa::new(gpa));
        let found = *rows.last()?;
        let page = match rows.iter().rev().nth(1).map(|above| above.kind) {
            Some(Kind::Table(page)) => page,
            _ => self.table.root(),
        };
        let geometry = self.table.format().geometry();
        let layout = TableLayout { bytes: geometry.table_bytes(found.level) };
        // SAFETY: a page of this table with the layout of its level, which was linked inside the scope: its pin keeps it.
        let entries = unsafe { self.table.pages().entries(page, layout) };
        // SAFETY: an index of this level is inside its page, and the page lives as long as the scope.
        Some((unsafe { entries.add(geometry.index(found.level, gpa)).as_ref() }, found))
    }

    /// Hardware: caches a translation by any entry that may stand for `page`, and writes through it.
    fn write(&self, walker: &mut Walker, random: &mut Random) {
        let scope = walker.enter();
        let page = random.next(PAGES);
        let Some((entry, found)) = self.entry(&scope, START + page * PAGE) else { return };
        if found.kind != Kind::Leaf {
            return;
        }
        let marked = found.raw & MARK != 0;
        let (entry, found, reach) = if marked {
            let first = page & !(SET - 1);
            let recorder = START + (first + random.next(SET)) * PAGE;
            let Some((entry, found)) = self.entry(&scope, recorder) else { return };
            if found.kind != Kind::Leaf || found.raw & MARK == 0 {
                return;
            }
            (entry, found, first..first + SET)
        } else {
            (entry, found, indices(AddrRange::with_len(found.start, found.span).unwrap()))
        };
        if found.raw & (DBM | WRITTEN) == 0 || entry.compare_exchange(found.raw, found.raw | YOUNG | WRITTEN).is_err() {
            return;
        }
        let output = self.table.format().spec(found.level, found.raw).output.as_u64();
        for _ in 0..1 + random.next(6) {
            let page = reach.start + random.next(reach.end - reach.start);
            let leads = output.wrapping_add(START + page * PAGE).wrapping_sub(found.start.as_u64());
            let expected = self.memory.output(page);
            if leads != expected {
                return self.fail(format!("page {page} was written at {leads:#x}, and is at {expected:#x}"));
            }
            self.memory.written[page as usize].fetch_add(1, SeqCst);
            if marked {
                self.spread.fetch_add(1, SeqCst);
            }
            if random.next(4) == 0 {
                std::thread::yield_now();
            }
        }
    }

    /// Maps what is absent, and raises what has too few rights.
    fn install(&self, walker: &mut Walker, random: &mut Random) {
        let range = match random.next(6) {
            0 => pages_of(0, PAGES),
            _ => random.range(),
        };
        let access = if random.next(4) == 0 { Access::RX } else { Access::RWX };
        let largest = if random.next(16) == 0 { u64::MAX } else { PAGE };
        let options = MapOptions::default().largest(largest).sets(random.next(2) == 0);
        let Ok(fault) = walker.fault(range) else { return };
        let memory = &self.memory;
        let resolved = fault.resolve(|fault| {
            let mut extents: Vec<Extent> = Vec::new();
            for page in indices(fault.range()) {
                let (guest, output) = (pages_of(page, 1), memory.output(page));
                match extents.last_mut() {
                    Some(last) if last.output.as_u64() + last.guest.len() == output => {
                        last.guest = last.guest.joined(&guest).unwrap_or(last.guest);
                    }
                    _ => extents.push(Extent { guest, output: OutputAddr::new(output), access }),
                }
            }
            Ok::<_, ()>(extents)
        });
        let Ok(resolved) = resolved else { return };
        match resolved.install(|admission| self.table.map(admission, &options)) {
            Ok(_) | Err(MapError::Retry(_)) => {}
            Err(error) => self.fail(format!("map of {range}: {error}")),
        }
    }

    fn fold(&self, random: &mut Random) {
        let range = if random.next(3) == 0 { pages_of(0, PAGES) } else { random.range() };
        match self.table.fold(range) {
            Ok(sets) => drop(self.folded.fetch_add(sets as u64, SeqCst)),
            Err(error) => self.fail(format!("fold of {range}: {error}")),
        }
    }

    fn lessen(&self, random: &mut Random) {
        let range = random.range();
        let result = match random.next(8) {
            0..=2 => self.table.unmap(range).map(drop).map_err(|error| error.to_string()),
            3 | 4 => self.table.restrict(range, Access::RX).map(drop).map_err(|error| error.to_string()),
            5 => self.table.split(range).map_err(|error| error.to_string()),
            6 => self.table.unmap(pages_of(0, PAGES)).map(drop).map_err(|error| error.to_string()),
            _ => {
                let whole = pages_of(0, PAGES);
                let merged = self.space.admit(whole, |admission| self.table.collapse(admission, whole));
                match merged {
                    Ok(Ok(_)) | Ok(Err(spte_core::CollapseError::Retry { .. })) | Err(_) => Ok(()),
                    Ok(Err(error)) => Err(error.to_string()),
                }
            }
        };
        if let Err(error) = result {
            self.fail(format!("{range}: {error}"));
        }
    }

    fn facts(&self, random: &mut Random) {
        let range = random.range();
        match random.next(4) {
            0 | 1 => match self.table.harvest_dirty(range) {
                Ok(dirty) => dirty.into_iter().filter_map(guest_part).for_each(|part| self.memory.copy(part)),
                Err(error) => self.fail(format!("harvest of {range}: {error}")),
            },
            2 => drop(self.table.age(range)),
            _ => drop(self.table.make_young(range.start())),
        }
    }

    /// Inside a window nothing is written.
    fn window(&self, random: &mut Random) {
        let range = random.range();
        let written = || indices(range).map(|page| self.memory.written[page as usize].load(SeqCst)).collect::<Vec<_>>();
        if random.next(4) == 0 {
            let Ok(guard) = self.space.zap(range) else { return };
            let before = written();
            for page in indices(range) {
                self.memory.place[page as usize].store(random.next(4) / 3, SeqCst);
            }
            std::thread::yield_now();
            if written() != before {
                self.fail(format!("{range} was written inside a Zapped window"));
            }
            drop(guard.close());
            return;
        }
        let Ok(guard) = self.space.retain(range) else { return };
        let before = written();
        let (mut changes, mut moves) = (Vec::new(), Vec::new());
        for page in indices(range) {
            if random.next(2) == 0 {
                continue;
            }
            let from = self.memory.output(page);
            // Home for the most part, where pages are in a row.
            let place = random.next(4) / 3;
            let new = OutputAddr::new(PLACES[place as usize] + page * PAGE);
            if new.as_u64() == from {
                continue;
            }
            let expected = OutputAddr::new(if random.next(8) == 0 { from ^ PAGE } else { from });
            changes.push(Change { page: Gpa::new(START + page * PAGE), expected, new });
            moves.push((page, place));
        }
        if !changes.is_empty() {
            match guard.change_pte(&changes) {
                Ok(done) => {
                    for (done, (page, place)) in done.iter().zip(moves) {
                        if done.outcome == Outcome::Changed {
                            self.changed.fetch_add(1, SeqCst);
                            self.memory.place[page as usize].store(place, SeqCst);
                        }
                    }
                }
                Err(error) => self.fail(format!("change_pte in {range}: {error}")),
            }
        }
        if random.next(2) == 0 {
            drop(guard.keep(range));
        }
        if written() != before {
            self.fail(format!("{range} was written inside a Retained window"));
        }
        drop(guard.close());
    }

    /// What holds when nobody does anything.
    fn check(&self) -> Result<(), String> {
        if let Some(wrong) = self.wrong.lock().unwrap().take() {
            return Err(wrong);
        }
        self.table.check().map_err(|(at, why)| format!("{at}: {why}"))?;
        let format = self.table.format();
        for first in (0..PAGES).step_by(SET as usize) {
            let found: Vec<_> =
                (first..first + SET).map(|page| self.table.entry(Gpa::new(START + page * PAGE)).unwrap()).collect();
            let is_marked = |found: &spte_core::Found| found.kind == Kind::Leaf && found.raw & MARK != 0;
            if !found.iter().any(is_marked) {
                continue;
            }
            for (index, member) in found.iter().enumerate() {
                format
                    .check_contiguous(member.level, found[0].raw, index as u16, member.raw)
                    .map_err(|why| format!("the set at page {first}: {why}"))?;
            }
        }
        let mut wrong = None;
        for page in 0..PAGES {
            let found = self.table.entry(Gpa::new(START + page * PAGE)).unwrap();
            if found.kind == Kind::Leaf {
                let offset = START + page * PAGE - found.start.as_u64();
                let leads = format.spec(found.level, found.raw).output.as_u64() + offset;
                if leads != self.memory.output(page) {
                    wrong = Some(format!("page {page} leads to {leads:#x}"));
                }
            }
        }
        wrong.map_or(Ok(()), Err)?;
        self.table.unmap(pages_of(0, PAGES)).map_err(|error| error.to_string())?;
        for page in 0..PAGES as usize {
            let (written, copied) = (self.memory.written[page].load(SeqCst), self.memory.copied[page].load(SeqCst));
            if written != copied {
                return Err(format!("page {page} was written {written} times, and reported after {copied}"));
            }
        }
        Ok(())
    }
}

/// The part of a range that is the guest's memory: a large leaf has no more.
fn guest_part(range: GpaRange) -> Option<GpaRange> {
    range.intersection(&pages_of(0, PAGES))
}

/// One round; sets folded, writes through sets, pages repointed.
fn round(break_level: BreakLevel, random: &mut Random) -> Result<[u64; 3], String> {
    let options = Stage2Options { accessed_dirty: AccessedDirty::Hardware, break_level, ..Stage2Options::default() };
    let memory = Arc::new(Memory::new());
    let sink = Arc::clone(&memory);
    let copy = move |range: GpaRange| guest_part(range).into_iter().for_each(|part| sink.copy(part));
    let space = Space::builder().page_size(PAGE).unwrap().private_reclaim().dirty_sink(copy).build();
    let table = Table::new(&space, stage2(options), Arc::new(HeapPages::new()), Slow).unwrap();
    let subscription = space.subscribe(Arc::clone(&table)).unwrap();
    let [folded, spread, changed] = [(); 3].map(|()| AtomicU64::new(0));
    let (stop, wrong) = (AtomicBool::new(false), Mutex::new(None));
    let round = Round { space, table, memory, stop, wrong, folded, spread, changed };
    // What each thread does, again and again.
    type Work = fn(&Round, &mut Walker, &mut Random);
    let works: [Work; 8] = [
        Round::write,
        Round::write,
        Round::install,
        |round, _, random| round.fold(random),
        |round, _, random| round.fold(random),
        |round, _, random| round.lessen(random),
        |round, _, random| round.facts(random),
        |round, _, random| round.window(random),
    ];
    std::thread::scope(|threads| {
        for work in works {
            let (round, mut random) = (&round, Random(random.next(u64::MAX) | 1));
            threads.spawn(move || {
                let mut walker = round.space.walker();
                while !round.stop.load(SeqCst) {
                    work(round, &mut walker, &mut random);
                }
            });
        }
        std::thread::sleep(ROUND);
        round.stop.store(true, SeqCst);
    });
    let checked = round.check();
    drop(subscription);
    checked.map(|()| [&round.folded, &round.spread, &round.changed].map(|count| count.load(SeqCst)))
}

fn rounds(name: &str, break_level: BreakLevel) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let seed = spte_stress::seed();
    let mut random = Random(seed | 1);
    let end = Instant::now() + Duration::from_secs_f64(spte_stress::seconds() / 2.0);
    // Threads that wait for each other would wait for ever: who holds a claim, and who waits for it, shows in a core dump.
    let count = Arc::new(AtomicU64::new(0));
    let (over, seen) = (Arc::new(AtomicBool::new(false)), Arc::clone(&count));
    let finished = Arc::clone(&over);
    let watchdog = std::thread::spawn(move || {
        let (mut last, mut since) = (0, Instant::now());
        while !finished.load(SeqCst) {
            std::thread::park_timeout(Duration::from_secs(1));
            let now = seen.load(SeqCst);
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() > HANGS {
                eprintln!("round {now} hangs, seed {seed:#x}");
                std::process::abort();
            }
        }
    });
    let mut all = [0; 3];
    let mut result = Ok(());
    while result.is_ok() && (Instant::now() < end || all.contains(&0) && count.load(SeqCst) < 1000) {
        result =
            round(break_level, &mut random).map(|done| all.iter_mut().zip(done).for_each(|(all, one)| *all += one));
        count.fetch_add(1, SeqCst);
    }
    over.store(true, SeqCst);
    watchdog.thread().unpark();
    watchdog.join().unwrap();
    let count = count.load(SeqCst);
    println!("{name}: {count} rounds, sets folded, writes through sets, pages repointed: {all:?}");
    if let Err(wrong) = result {
        panic!("{name}, seed {seed:#x}, round {count}: {wrong}");
    }
    assert!(!all.contains(&0), "{name}: nothing came of {all:?}");
}

#[test]
fn sets_that_change_together_lose_no_write_and_stay_whole() {
    rounds("break before make", BreakLevel::Level0);
}

#[test]
fn sets_that_may_resize_in_place_lose_no_write_and_stay_whole() {
    rounds("in place", BreakLevel::Level2);
}
