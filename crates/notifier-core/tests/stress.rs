// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Everything at once: faults, windows, repointing, leases, joins, leaves and slots that are replaced, against a ledger
//! that knows by itself which host page is alive. No read may reach a page that was released.
//!
//! Runs for two seconds, or `NOTIFIER_STRESS_SECONDS`; begins from `NOTIFIER_STRESS_SEED`, or from the clock, and prints
//! which.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use common::*;
use notifier_core::*;

/// Guest pages; each is in a slot, and once more as an alias.
const PAGES: u64 = 24;
const ALIAS: u64 = 64;
/// Host frames that pages move about in.
const FRAMES: u64 = 256;

/// The host: which frame backs which host page, and which frames are in use. Written by windows only.
struct Host {
    /// Frame of each host page; guest page `n` has host page `n`.
    backing: Vec<AtomicU64>,
    /// The ledger: generation of each frame; odd while it is allocated.
    alive: Vec<AtomicU64>,
    /// What each frame holds: two frames with the same contents may be merged.
    free: Mutex<Vec<u64>>,
    /// One change of a host page at a time, as the host's own page-table lock would have it.
    changing: Vec<Mutex<()>>,
}

impl Host {
    fn new() -> Self {
        let host = Self {
            backing: (0..PAGES).map(AtomicU64::new).collect(),
            alive: (0..FRAMES).map(|frame| AtomicU64::new(u64::from(frame < PAGES))).collect(),
            free: Mutex::new((PAGES..FRAMES).collect()),
            changing: (0..PAGES).map(|_| Mutex::default()).collect(),
        };
        assert!(host.alive[0].load(Ordering::Relaxed) & 1 == 1);
        host
    }

    fn allocate(&self) -> u64 {
        let mut free = lock(&self.free);
        // The frame that was released last comes first: a stale read hits it soonest.
        let frame = free.pop().expect("frames enough");
        assert_eq!(self.alive[frame as usize].fetch_add(1, Ordering::SeqCst) & 1, 0);
        frame
    }

    fn release(&self, frame: u64) {
        assert_eq!(self.alive[frame as usize].fetch_add(1, Ordering::SeqCst) & 1, 1, "released twice");
        lock(&self.free).push(frame);
    }

    fn check_alive(&self, output: OutputAddr, seed: u64) {
        let frame = (output.as_u64() - FRAME_BASE) / PAGE;
        let generation = self.alive[frame as usize].load(Ordering::SeqCst);
        assert!(generation & 1 == 1, "a released frame was reached (seed {seed})");
        std::hint::spin_loop();
        // And it stays while the scope or lease lasts.
        let again = self.alive[frame as usize].load(Ordering::SeqCst);
        assert_eq!(generation, again, "a frame was released while it was in use (seed {seed})");
    }
}

const FRAME_BASE: u64 = 0x8000_0000;

fn output(frame: u64) -> OutputAddr {
    out(FRAME_BASE + frame * PAGE)
}

/// A small generator (xorshift): the test needs no better, and prints its seed.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % sides
    }
}

struct World {
    space: Space,
    host: Host,
    /// Tables that are members; readers choose one.
    tables: Vec<Arc<Toy>>,
    done: AtomicBool,
    seed: u64,
    reads: AtomicU64,
    changed: AtomicU64,
    moved: AtomicU64,
    leased: AtomicU64,
}

impl World {
    fn over(&self) -> bool {
        self.done.load(Ordering::Relaxed)
    }

    /// A host page and the guest page by which it is looked at.
    fn pick(dice: &mut Dice) -> (u64, u64) {
        let page = dice.roll(PAGES);
        (page, if dice.roll(3) == 0 { page + ALIAS } else { page })
    }

    fn vcpu(&self, dice: &mut Dice) {
        let mut walker = self.space.walker();
        while !self.over() {
            let (page, guest) = Self::pick(dice);
            let toy = &self.tables[dice.roll(self.tables.len() as u64) as usize];
            let addr = guest * PAGE;
            let scope = walker.enter();
            let found = if dice.roll(2) == 0 { toy.read(&scope, addr) } else { toy.write(&scope, addr) };
            if let Some(found) = found {
                self.host.check_alive(found, self.seed);
                self.reads.fetch_add(1, Ordering::Relaxed);
                if dice.roll(16) == 0
                    && let Ok(lease) = scope.lease(LeaseRequest::new(gpa(addr, PAGE), "stress"))
                {
                    // What was found stays good after the scope.
                    drop(scope);
                    for _ in 0..dice.roll(50) {
                        self.host.check_alive(found, self.seed);
                    }
                    self.leased.fetch_add(1, Ordering::Relaxed);
                    drop(lease);
                }
                continue;
            }
            let fault = match scope.fault(gpa(addr, PAGE)) {
                Ok(fault) => fault,
                Err(FaultError::Retry(retry)) => {
                    if dice.roll(2) == 0 {
                        retry.wait();
                    }
                    continue;
                }
                Err(FaultError::NotPopulated { .. }) => continue,
                Err(error) => panic!("{error}"),
            };
            if fault.slot().is_none() {
                // The slot is being replaced: nothing to be looked up.
                continue;
            }
            let resolved = fault
                .resolve(|fault| {
                    let frame = self.host.backing[page as usize].load(Ordering::Acquire);
                    Ok::<_, Infallible>(Extent { guest: fault.range(), output: output(frame), access: Access::RW })
                })
                .unwrap();
            let _ = resolved.install(|admission| toy.install(admission));
        }
    }

    /// Moves a page to another frame: the host's migration (Zapped) or merging (Retained).
    fn host(&self, dice: &mut Dice) {
        while !self.over() {
            let page = dice.roll(PAGES);
            let Ok(_changing) = self.host.changing[page as usize].try_lock() else { continue };
            let range = hva(HOST + page * PAGE, PAGE);
            let builder = match dice.roll(4) {
                0 => self.space.window(range),
                1 => self.space.window(range).leases(LeasePolicy::Wait),
                2 => self.space.window(range).leases(LeasePolicy::CancelFor(Duration::from_millis(1))),
                _ => self.space.window(range).leases(LeasePolicy::Cancel),
            };
            let builder = if dice.roll(8) == 0 { builder.nonblocking() } else { builder };
            let backing = &self.host.backing[page as usize];
            let old = backing.load(Ordering::Acquire);
            let refused = |error: OpenError| match error {
                OpenError::Pinned { .. } | OpenError::WouldBlock { .. } | OpenError::Busy { .. } => {}
                error => panic!("{error}"),
            };
            if dice.roll(2) == 0 {
                let guard = match builder.open_zapped() {
                    Ok(guard) => guard,
                    Err(error) => {
                        refused(error);
                        continue;
                    }
                };
                backing.store(self.host.allocate(), Ordering::Release);
                // The old frame is free as soon as the window is open.
                self.host.release(old);
                if dice.roll(2) == 0 {
                    drop(guard)
                } else {
                    guard.close().unwrap()
                }
                self.moved.fetch_add(1, Ordering::Relaxed);
            } else {
                let guard = match builder.open_retained() {
                    Ok(guard) => guard,
                    Err(error) => {
                        refused(error);
                        continue;
                    }
                };
                match dice.roll(4) {
                    0 => guard.keep(range).unwrap(),
                    1 => {
                        guard.zap(range).unwrap();
                        backing.store(self.host.allocate(), Ordering::Release);
                        self.host.release(old);
                    }
                    2 => {}
                    _ => {
                        let new = self.host.allocate();
                        backing.store(new, Ordering::Release);
                        let change = Change { page: range.start(), expected: output(old), new: output(new) };
                        let report = guard.change_pte(&[change]).unwrap();
                        assert_eq!(report[0].found, None, "seed {}", self.seed);
                        // And here as soon as change_pte has returned.
                        self.host.release(old);
                        self.changed.fetch_add(1, Ordering::Relaxed);
                    }
                }
                guard.close().unwrap();
            }
        }
    }

    /// Subscribers come and go.
    fn guests(&self, dice: &mut Dice) {
        while !self.over() {
            let toy = Toy::new(&self.space, (ALIAS + PAGES) as usize);
            let subscription = self.space.subscribe(Arc::clone(&toy)).unwrap();
            let mut walker = self.space.walker();
            for _ in 0..dice.roll(40) {
                let (page, guest) = Self::pick(dice);
                let addr = guest * PAGE;
                let scope = walker.enter();
                if let Some(found) = toy.read(&scope, addr) {
                    self.host.check_alive(found, self.seed);
                    continue;
                }
                let Ok(fault) = scope.fault(gpa(addr, PAGE)) else { continue };
                if fault.slot().is_none() {
                    continue;
                }
                let resolved = fault
                    .resolve(|fault| {
                        let frame = self.host.backing[page as usize].load(Ordering::Acquire);
                        Ok::<_, Infallible>(Extent { guest: fault.range(), output: output(frame), access: Access::RW })
                    })
                    .unwrap();
                let _ = resolved.install(|admission| toy.install(admission));
            }
            drop(walker);
            // Readers go on while it leaves.
            std::thread::scope(|threads| {
                threads.spawn(|| {
                    let mut walker = self.space.walker();
                    for page in 0..PAGES {
                        let scope = walker.enter();
                        if let Some(found) = toy.read(&scope, page * PAGE) {
                            self.host.check_alive(found, self.seed);
                        }
                    }
                });
                subscription.leave().map_err(|_| ()).unwrap();
            });
            assert!((0..PAGES).all(|page| toy.peek(page * PAGE).is_none()));
        }
    }

    /// Slots are replaced, and parts of them discarded and populated.
    fn slots(&self, dice: &mut Dice) {
        while !self.over() {
            let slots = self.space.slots();
            let (id, slot) = slots[dice.roll(slots.len() as u64) as usize];
            match dice.roll(3) {
                0 => {
                    let page = dice.roll(PAGES);
                    let range = gpa(slot.guest.start().as_u64() + page * PAGE, PAGE);
                    let Ok(guard) = self.space.window(range).leases(LeasePolicy::Cancel).open_zapped() else {
                        continue;
                    };
                    guard.discard();
                    guard.close().unwrap();
                    self.space.populate(range).unwrap();
                }
                1 => match self.space.replace_slots(&[id], &[slot]) {
                    Ok(_) | Err(SlotError::Window(OpenError::Pinned { .. })) => {}
                    Err(error) => panic!("{error}"),
                },
                _ => {
                    if self.space.remove_slot(id).is_ok() {
                        std::thread::yield_now();
                        self.space.add_slot(slot).unwrap();
                    }
                }
            }
            std::thread::sleep(Duration::from_micros(dice.roll(300)));
        }
    }
}

#[test]
fn no_read_reaches_a_released_page() {
    let seconds = std::env::var("NOTIFIER_STRESS_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let clock = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64);
    let seed = std::env::var("NOTIFIER_STRESS_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or_else(clock) | 1;
    println!("NOTIFIER_STRESS_SEED={seed}");
    let space = Space::new();
    space.add_slot(spec(0, PAGES * PAGE, HOST)).unwrap();
    space.add_slot(spec(ALIAS * PAGE, PAGES * PAGE, HOST)).unwrap();
    let tables: Vec<_> = (0..2).map(|_| Toy::new(&space, (ALIAS + PAGES) as usize)).collect();
    let subscriptions: Vec<_> = tables.iter().map(|toy| space.subscribe(Arc::clone(toy)).unwrap()).collect();
    let zero = || AtomicU64::new(0);
    let world = World {
        space: space.clone(),
        host: Host::new(),
        tables,
        done: AtomicBool::new(false),
        seed,
        reads: zero(),
        changed: zero(),
        moved: zero(),
        leased: zero(),
    };
    let end = Instant::now() + Duration::from_secs_f64(seconds);
    std::thread::scope(|threads| {
        let world = &world;
        let roles: [fn(&World, &mut Dice); 7] =
            [World::vcpu, World::vcpu, World::vcpu, World::host, World::host, World::guests, World::slots];
        let workers: Vec<_> = roles
            .into_iter()
            .zip(1u64..)
            .map(|(role, n)| {
                threads.spawn(move || {
                    // Whoever fails stops the others.
                    struct Stop<'a>(&'a World);
                    impl Drop for Stop<'_> {
                        fn drop(&mut self) {
                            if std::thread::panicking() {
                                self.0.done.store(true, Ordering::Relaxed);
                            }
                        }
                    }
                    let _stop = Stop(world);
                    role(world, &mut Dice(seed.wrapping_mul(2 * n + 1) | 1));
                })
            })
            .collect();
        while Instant::now() < end && !world.over() {
            std::thread::sleep(Duration::from_millis(5));
        }
        world.done.store(true, Ordering::Relaxed);
        for worker in workers {
            if let Err(panic) = worker.join() {
                std::panic::resume_unwind(panic);
            }
        }
    });
    drop(subscriptions);
    let counters = space.counters();
    println!("{counters:?}");
    assert_eq!(space.progress().count, 0);
    assert_eq!(counters.unrelated_retries, 0);
    assert_eq!(counters.unfinished, 0);
    for (what, n) in
        [("read", &world.reads), ("repointed", &world.changed), ("moved", &world.moved), ("leased", &world.leased)]
    {
        assert!(n.load(Ordering::Relaxed) > 0, "nothing was {what}: the test tests nothing");
    }
}
