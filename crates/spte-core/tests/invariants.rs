// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! I9, I12, I13 and I14 with threads, for every flavour of the tiny format.

mod common;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use common::{BIG, OUT, PAGE, Rig, Tiny, extent, flavours, large, range, small};
use notifier_core::{Access, Change, Gpa, OutputAddr, SlotFlags};
use spte_core::format::{Format, Kind, Touch};
use spte_core::{MapError, Miss, Upgrade};

/// How long each flavour is shaken: `SHAKE_MS`, or 120 milliseconds.
fn time() -> Duration {
    let asked = std::env::var("SHAKE_MS").ok().and_then(|ms| ms.parse().ok());
    Duration::from_millis(asked.unwrap_or(120))
}

/// Random enough.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % n
    }
}

/// Runs `work` again and again on threads of its own while `main` runs.
fn beside(threads: u64, work: impl Fn(&mut Random) + Sync, main: impl FnOnce(&mut Random, &dyn Fn() -> bool)) {
    let stop = AtomicBool::new(false);
    // On a busy machine the threads may begin late: `main` goes on until they have done something.
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let (stop, work, rounds) = (&stop, &work, &rounds);
        for seed in 0..threads {
            scope.spawn(move || {
                let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (seed + 1));
                while !stop.load(Ordering::Relaxed) {
                    work(&mut random);
                    rounds.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let until = Instant::now() + time();
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Ordering::Relaxed);
            }
        }
        let _stop = Stop(stop);
        let patience = until + Duration::from_secs(20);
        let going_on = || {
            let now = Instant::now();
            now < until || (rounds.load(Ordering::Relaxed) < 200 && now < patience)
        };
        main(&mut Random(0x1234_5678_9abc_def1), &going_on);
    });
}

/// Hardware that walks without waiting for anybody; a flush waits until its walks are over, as a shootdown does.
struct Hardware {
    walks: Arc<RwLock<()>>,
    /// For each page, how often a write turned a clean leaf dirty.
    dirtied: Vec<AtomicU64>,
}

impl Hardware {
    fn new(rig: &Rig) -> Self {
        let walks = Arc::new(RwLock::new(()));
        let waited = Arc::clone(&walks);
        *rig.pages.during_flush.lock().unwrap() = Some(Box::new(move |_| drop(waited.write().unwrap())));
        let pages = rig.whole().len() / PAGE;
        Self { walks, dirtied: (0..pages).map(|_| AtomicU64::new(0)).collect() }
    }

    /// A write. In a format with late facts, sometimes one whose translation was cached a while ago.
    fn write(&self, rig: &Rig, page: u64, late: bool) {
        let _walk = self.walks.read().unwrap();
        let format = rig.format;
        let at = page * PAGE;
        let mut level = format.geometry.top();
        let mut table = rig.table.root();
        loop {
            let entry = &rig.pages.hardware_page(table)[format.geometry.index(level, at)];
            let memory = entry.load();
            let raw = format.raw_of(memory);
            match (format.kind(level, raw), level.below()) {
                (Kind::Table(child), Some(below)) => (table, level) = (child, below),
                (Kind::Leaf, _) => {
                    let Touch::Allowed(new) = format.touch(level, raw, Access::WRITE) else { return };
                    if late {
                        std::thread::yield_now();
                        let mut found = entry.load();
                        let facts = format.memory_of(new & format.hardware_bits(level, new));
                        while let Err(other) = entry.compare_exchange(found, found | facts) {
                            found = other;
                        }
                        // What is claimed or dead may have given its fact to a merged leaf already: one report for both.
                        let landed = format.raw_of(found);
                        let merged = matches!(format.kind(level, landed), Kind::Claimed | Kind::Dead);
                        if landed & common::format::DIRTY == 0 && !merged {
                            self.dirtied[page as usize].fetch_add(1, Ordering::SeqCst);
                        }
                        return;
                    }
                    if entry.compare_exchange(memory, format.memory_of(new)).is_ok() {
                        if !format.is_dirty(level, raw) {
                            self.dirtied[page as usize].fetch_add(1, Ordering::SeqCst);
                        }
                        return;
                    }
                }
                _ => return,
            }
        }
    }
}

fn each(test: impl Fn(&Rig)) {
    for format in flavours() {
        let rig = Rig::new(format);
        test(&rig);
        *rig.pages.during_flush.lock().unwrap() = None;
        rig.verify();
        rig.end();
    }
}

/// Splits and merges at random places.
fn reshape(rig: &Rig, random: &mut Random) {
    let pages = rig.whole().len() / PAGE;
    match random.below(4) {
        0 => rig.table.split(range(random.below(pages) * PAGE, PAGE)).unwrap(),
        1 => rig.table.split(rig.whole()).unwrap(),
        2 => {
            let big = range(random.below(pages / 4) * BIG, BIG);
            rig.admit(big, |admission| rig.table.collapse(admission, big).unwrap());
        }
        _ => {
            rig.admit(rig.whole(), |admission| rig.table.collapse(admission, rig.whole()).unwrap());
        }
    }
}

#[test]
fn i13_no_other_translation_is_seen_during_split_and_collapse() {
    each(|rig| {
        rig.map(0, rig.whole().len(), &large().dirty(true)).unwrap();
        let pages = rig.whole().len() / PAGE;
        let hits = AtomicU64::new(0);
        let reader = |random: &mut Random| {
            let mut walker = rig.walker();
            for _ in 0..64 {
                let at = random.below(pages) * PAGE + random.below(PAGE);
                let scope = walker.enter();
                match rig.table.translate(&scope, Gpa::new(at), Access::READ) {
                    Ok(found) => {
                        assert_eq!(found.output().as_u64(), OUT + at, "{}", rig.format.name);
                        hits.fetch_add(1, Ordering::Relaxed);
                    }
                    Err(miss) => assert!(
                        !rig.format.seamless() && matches!(miss, Miss::Busy { .. } | Miss::Absent { .. }),
                        "{}: {miss}",
                        rig.format.name
                    ),
                }
            }
        };
        beside(2, reader, |random, going_on| {
            while going_on() {
                reshape(rig, random);
            }
        });
        assert!(hits.into_inner() > 0);
        assert_eq!(rig.translations().len() as u64, pages);
    });
}

#[test]
fn i13_hardware_sees_no_other_translation() {
    each(|rig| {
        rig.map(0, rig.whole().len(), &large().dirty(true)).unwrap();
        let pages = rig.whole().len() / PAGE;
        let hardware = Hardware::new(rig);
        let reader = |random: &mut Random| {
            let at = random.below(pages) * PAGE;
            let _walk = hardware.walks.read().unwrap();
            if let Some(found) = common::hardware_access(rig, at, Access::READ) {
                assert_eq!(found, OUT + at, "{}", rig.format.name);
            }
        };
        beside(2, reader, |random, going_on| {
            while going_on() {
                reshape(rig, random);
            }
        });
    });
}

#[test]
fn i13_what_is_upgraded_or_aged_during_a_collapse_keeps_its_place() {
    each(|rig| {
        rig.map(0, rig.whole().len(), &large().armed(true)).unwrap();
        let pages = rig.whole().len() / PAGE;
        let work = |random: &mut Random| {
            let at = random.below(pages) * PAGE;
            match random.below(4) {
                0 => drop(rig.table.upgrade(Gpa::new(at))),
                1 => drop(rig.table.make_young(Gpa::new(at))),
                2 => drop(rig.table.age(range(at, PAGE)).unwrap()),
                _ => drop(rig.table.arm(range(at, PAGE)).unwrap()),
            }
        };
        beside(2, work, |random, going_on| {
            while going_on() {
                reshape(rig, random);
            }
        });
        let found: Vec<_> = rig.translations().iter().map(|page| (page.0, page.1, page.2)).collect();
        let expected: Vec<_> = (0..pages).map(|page| (page * PAGE, OUT + page * PAGE, Access::RWX)).collect();
        assert_eq!(found, expected, "{}", rig.format.name);
    });
}

/// What takes facts away, or moves them.
fn disturb(rig: &Rig, random: &mut Random, harvested: &mut Vec<notifier_core::GpaRange>) {
    let pages = rig.whole().len() / PAGE;
    let first = random.below(pages);
    let len = 1 + random.below((pages - first).min(9));
    let part = range(first * PAGE, len * PAGE);
    match random.below(11) {
        0 | 1 => harvested.extend(rig.table.harvest_dirty(part).unwrap()),
        2 => drop(rig.table.age(part).unwrap()),
        3 => drop(rig.table.arm(part).unwrap()),
        4 => drop(rig.table.unmap(part).unwrap()),
        5 => drop(rig.table.restrict(part, Access::RX).unwrap()),
        6 => rig.table.split(part).unwrap(),
        7 => {
            rig.admit(rig.whole(), |admission| rig.table.collapse(admission, rig.whole()).unwrap());
        }
        8 => {
            let guard = rig.space.retain(part).unwrap();
            let page = part.start();
            let same = OutputAddr::new(OUT + page.as_u64());
            guard.change_pte(&[Change { page, expected: same, new: same }]).unwrap();
            if random.below(2) == 0 {
                guard.keep(part).unwrap();
            }
            guard.close().unwrap();
        }
        9 => rig.space.zap(part).unwrap().close().unwrap(),
        _ => drop(rig.table.trim(part).unwrap()),
    }
    if random.below(3) == 0 {
        rig.map(0, rig.whole().len(), &large()).unwrap();
    }
}

#[test]
fn i12_no_write_is_lost() {
    each(|rig| {
        if !rig.format.hardware {
            return;
        }
        rig.map(0, rig.whole().len(), &large()).unwrap();
        let pages = rig.whole().len() / PAGE;
        let hardware = Hardware::new(rig);
        let writer = |random: &mut Random| {
            let late = rig.format.late && random.below(2) == 0;
            hardware.write(rig, random.below(pages), late);
        };
        let mut reports = Vec::new();
        beside(2, writer, |random, going_on| {
            while going_on() {
                for page in 0..pages {
                    rig.table.upgrade(Gpa::new(page * PAGE));
                }
                disturb(rig, random, &mut reports);
            }
        });
        rig.table.unmap(rig.whole()).unwrap();
        reports.extend(rig.take_dirty());
        let mut count = vec![0; pages as usize];
        for report in reports {
            for at in (report.start().as_u64()..report.end().as_u64()).step_by(PAGE as usize) {
                count[(at / PAGE) as usize] += 1;
            }
        }
        let mut writes = 0;
        for (page, reported) in count.into_iter().enumerate() {
            let dirtied = hardware.dirtied[page].load(Ordering::SeqCst);
            writes += dirtied;
            assert!(dirtied <= reported, "{}: page {page}: {dirtied} writes, {reported} told", rig.format.name);
        }
        assert!(writes > 0, "{}: nobody wrote", rig.format.name);
    });
}

/// By the time the operation that removes the entry has returned.
#[test]
fn i12_facts_are_told_before_the_removal_returns() {
    type Removal = (&'static str, fn(&Rig));
    let page = range(0, PAGE);
    let removals: [Removal; 7] = [
        ("unmap", |rig| _ = rig.table.unmap(range(0, PAGE)).unwrap()),
        ("unmap a table", |rig| _ = rig.table.unmap(range(0, BIG)).unwrap()),
        ("arm", |rig| _ = rig.table.arm(range(0, PAGE)).unwrap()),
        ("zap", |rig| drop(rig.space.zap(range(0, PAGE)).unwrap())),
        ("retain", |rig| {
            let guard = rig.space.retain(range(0, PAGE)).unwrap();
            guard.keep(range(0, PAGE)).unwrap();
        }),
        ("change", |rig| {
            let guard = rig.space.retain(range(0, PAGE)).unwrap();
            let (expected, new) = (OutputAddr::new(OUT), OutputAddr::new(BIG));
            guard.change_pte(&[Change { page: Gpa::new(0), expected, new }]).unwrap();
        }),
        ("leave", |rig| rig.table.unmap(rig.whole()).map(drop).unwrap()),
    ];
    for (name, removal) in removals {
        for options in [small(), large()] {
            each(|rig| {
                rig.map(0, BIG, &options.dirty(true)).unwrap();
                removal(rig);
                assert!(rig.was_reported(page.start().as_u64()), "{}: {name}", rig.format.name);
            });
        }
    }
}

/// Facts that hardware writes between the removal and its flush.
#[test]
fn i12_late_facts_are_told_too() {
    type Removal = (&'static str, fn(&Rig));
    let removals: [Removal; 6] = [
        ("unmap", |rig| _ = rig.table.unmap(range(0, PAGE)).unwrap()),
        ("unmap a table", |rig| _ = rig.table.unmap(range(0, BIG)).unwrap()),
        ("zap", |rig| rig.space.zap(range(0, PAGE)).unwrap().close().unwrap()),
        ("split, then unmap", |rig| {
            rig.table.split(range(0, BIG)).unwrap();
            rig.table.unmap(range(0, BIG)).unwrap();
        }),
        ("collapse, then unmap", |rig| {
            rig.admit(range(0, BIG), |admission| rig.table.collapse(admission, range(0, BIG)).unwrap());
            rig.table.unmap(range(0, BIG)).unwrap();
        }),
        ("fail to unmap", |rig| {
            rig.pages.fail_flush_in(0);
            rig.table.unmap(range(0, PAGE)).unwrap_err();
            rig.space.zap(range(0, PAGE)).unwrap().close().unwrap();
        }),
    ];
    for format in flavours().into_iter().filter(|format| format.late) {
        for (name, removal) in removals {
            for options in [small(), large()] {
                let rig = Rig::new(format);
                rig.map(0, BIG, &options).unwrap();
                let cached = cached_leaf(&rig, 0);
                let dirty = format.memory_of(common::format::DIRTY);
                let mut written = false;
                *rig.pages.during_flush.lock().unwrap() = Some(Box::new(move |_| {
                    // Once: after the first flush the translation is cached no more.
                    if !std::mem::replace(&mut written, true) {
                        let mut found = cached.load();
                        while let Err(other) = cached.compare_exchange(found, found | dirty) {
                            found = other;
                        }
                    }
                }));
                removal(&rig);
                assert!(rig.was_reported(0), "{}: {name}", format.name);
                *rig.pages.during_flush.lock().unwrap() = None;
                rig.verify();
                rig.end();
            }
        }
    }
}

/// Where the flush fails, hardware goes on writing facts: also between the last look at a claimed leaf and the moment in which it is
/// given up.
#[test]
fn i12_a_fact_that_comes_after_a_failed_flush_is_told() {
    for format in flavours().into_iter().filter(|format| format.late && format.breaks() && !format.mirror) {
        let rig = Rig::new(format);
        rig.map(0, BIG, &large()).unwrap();
        let (cached, pages) = (cached_leaf(&rig, 0), Arc::clone(&rig.pages));
        let before = pages.flushes.load(Ordering::SeqCst);
        rig.pages.fail_flush_in(0);
        common::format::AT_ABSENT.set(Some(Box::new(move || {
            let found = cached.load();
            if pages.flushes.load(Ordering::SeqCst) > before {
                let dirty = format.memory_of(common::format::DIRTY);
                cached.compare_exchange(found, found | dirty).unwrap();
            }
        })));
        rig.table.split(range(0, BIG)).unwrap_err();
        common::format::AT_ABSENT.set(None);
        rig.space.zap(range(0, BIG)).unwrap().close().unwrap();
        assert!(rig.was_reported(0), "{}", format.name);
        rig.verify();
        rig.end();
    }
}

/// Facts for a leaf that was split in place come into the link, until the flush; who unlinks the table before that takes them along.
#[test]
fn i12_late_facts_of_a_link_are_told_by_who_unlinks_it() {
    type Way = (&'static str, fn(&Rig));
    for format in flavours().into_iter().filter(|format| format.late && !format.breaks()) {
        let ways: [Way; 3] = [
            ("unmap", |rig| _ = rig.table.unmap(range(0, BIG)).unwrap()),
            ("trim", |rig| {
                (0..4).for_each(|page| _ = rig.table.unmap(range(page * PAGE, PAGE)).unwrap());
                rig.table.trim(range(0, BIG)).unwrap();
            }),
            ("collapse", |rig| {
                let merged =
                    rig.admit(range(0, BIG), |admission| rig.table.collapse(admission, range(0, BIG)).unwrap());
                assert_eq!(merged, 1);
                rig.table.unmap(range(0, BIG)).unwrap();
            }),
        ];
        for (way, unlink) in ways {
            let rig = Rig::new(format);
            rig.map(0, BIG, &large()).unwrap();
            let link = cached_leaf(&rig, 0);
            rig.pages.fail_flush_in(0);
            rig.table.split(range(0, BIG)).unwrap_err();
            let found = link.load();
            link.compare_exchange(found, found | format.memory_of(common::format::DIRTY)).unwrap();
            unlink(&rig);
            assert!(rig.was_reported(0), "{}: {way}", format.name);
            rig.space.zap(range(0, BIG)).unwrap().close().unwrap();
            rig.verify();
            rig.end();
        }
    }
}

fn cached_leaf(rig: &Rig, at: u64) -> &'static spte_core::Entry {
    let format = rig.format;
    let (mut level, mut table) = (format.geometry.top(), rig.table.root());
    loop {
        let entry = &rig.pages.hardware_page(table)[format.geometry.index(level, at)];
        match format.kind(level, format.raw_of(entry.load())) {
            Kind::Table(child) => (table, level) = (child, level.below().unwrap()),
            _ => return entry,
        }
    }
}

#[test]
fn i9_no_page_is_free_while_an_older_pin_lives() {
    each(|rig| {
        rig.map(0, rig.whole().len(), &small()).unwrap();
        let live = rig.pages.live();
        let pin = rig.space.pin();
        rig.table.unmap(rig.whole()).unwrap();
        rig.collect();
        assert_eq!(rig.pages.live(), live, "{}", rig.format.name);
        drop(pin);
        rig.collect();
        assert_eq!(rig.pages.live(), 1, "{}", rig.format.name);
    });
}

#[test]
fn i9_nothing_is_published_into_an_unlinked_table() {
    each(|rig| {
        let pages = rig.whole().len() / PAGE;
        let mapped = AtomicU64::new(0);
        // Installers count what they made, removers what they took: nothing is made in a table that is gone.
        let install = |random: &mut Random| {
            let first = random.below(pages);
            let len = (1 + random.below(6)).min(pages - first);
            match rig.map(first * PAGE, len * PAGE, &if random.below(2) == 0 { small() } else { large() }) {
                Ok(made) => drop(mapped.fetch_add(made.made, Ordering::Relaxed)),
                Err(MapError::Retry(retry)) => retry.wait(),
                Err(other) => panic!("{other}"),
            }
            // Raw walks, pinned and nothing more.
            rig.table.walk(Gpa::new(random.below(pages) * PAGE));
        };
        beside(2, install, |random, going_on| {
            while going_on() {
                let first = random.below(pages / 4) * BIG;
                match random.below(5) {
                    0 => drop(rig.table.unmap(rig.whole()).unwrap()),
                    1 => drop(rig.table.unmap(range(first, BIG)).unwrap()),
                    2 => drop(rig.table.trim(rig.whole()).unwrap()),
                    3 => rig.space.zap(range(first, BIG)).unwrap().close().unwrap(),
                    _ => drop(rig.admit_or_retry(rig.whole())),
                }
            }
        });
        assert!(mapped.into_inner() > 0);
        rig.verify();
        rig.table.unmap(rig.whole()).unwrap();
        assert_eq!(rig.leaves(), [], "{}", rig.format.name);
        assert_eq!(rig.table.stats().tables, 1, "{}", rig.format.name);
    });
}

#[test]
fn i14_rights_never_pass_what_was_resolved_and_allowed() {
    for flags in [SlotFlags::empty(), SlotFlags::READ_ONLY] {
        for format in flavours() {
            let rig = Rig::with_slot(format, flags);
            let ceiling = if flags.is_empty() { Access::RWX } else { Access::RX };
            let rw = Access::RW;
            // What is asked for passes what was resolved.
            rig.map_extents(range(0, BIG), vec![extent(0, OUT, BIG, Access::READ)], &large()).unwrap();
            assert_eq!(rig.leaves()[0].3, Access::READ, "{}", format.name);
            // Not resolved: protect raises nothing.
            rig.admit(range(0, BIG), |admission| rig.table.protect(admission, range(0, BIG), rw).unwrap());
            assert_eq!(rig.leaves()[0].3, Access::READ);
            assert_eq!(rig.table.upgrade(Gpa::new(0)), Upgrade::No);
            // Resolved: raised as far as the slot allows.
            rig.map_extents(range(0, BIG), vec![extent(0, OUT, BIG, rw)], &large()).unwrap();
            assert_eq!(rig.leaves()[0].3, rw & ceiling, "{}", format.name);
            // A Retained window takes writing away for good.
            rig.table.arm(range(0, BIG)).unwrap();
            let guard = rig.space.retain(range(0, BIG)).unwrap();
            assert_eq!(rig.table.upgrade(Gpa::new(0)), Upgrade::No);
            guard.keep(range(0, BIG)).unwrap();
            guard.close().unwrap();
            assert_eq!(rig.table.upgrade(Gpa::new(0)), Upgrade::No);
            assert_eq!(rig.leaves()[0].3, Access::READ, "{}", format.name);
            // Merging leaves with different rights: not the sum of them.
            rig.table.split(range(0, BIG)).unwrap();
            rig.map_extents(range(0, PAGE), vec![extent(0, OUT, PAGE, Access::RX)], &large()).unwrap();
            rig.admit(range(0, BIG), |admission| rig.table.collapse(admission, range(0, BIG)).unwrap());
            let rights: Vec<_> = rig.leaves().iter().map(|leaf| leaf.3).collect();
            let r = Access::READ;
            assert_eq!(rights, [Access::RX, r, r, r], "{}", format.name);
            rig.verify();
            rig.end();
        }
    }
}

/// The host takes rights away in windows while faults bring them back: inside a window nobody has more than the host gives.
#[test]
fn i14_rights_never_pass_the_hosts_while_windows_come_and_go() {
    const WRITABLE: u8 = 1;
    each(|rig| {
        let pages = rig.whole().len() / PAGE;
        let host: Vec<AtomicU8> = (0..pages).map(|_| AtomicU8::new(WRITABLE)).collect();
        let rights = |page: u64| match host[page as usize].load(Ordering::SeqCst) {
            WRITABLE => Access::RWX,
            _ => Access::RX,
        };
        let faults = |random: &mut Random| {
            let first = random.below(pages / 4) * 4;
            let part = range(first * PAGE, BIG);
            let mut walker = rig.walker();
            let Ok(fault) = walker.fault(part) else { return };
            let resolved = fault.resolve(|_| {
                let extents = (first..first + 4).map(|page| extent(page * PAGE, OUT + page * PAGE, PAGE, rights(page)));
                let all = extents.collect::<Vec<_>>();
                let whole = extent(first * PAGE, OUT + first * PAGE, BIG, Access::RWX);
                Ok::<_, ()>(if all.iter().all(|extent| extent.access.writable()) { vec![whole] } else { all })
            });
            resolved.unwrap().install(|admission| match random.below(3) {
                0 => drop(rig.table.map(admission, &large())),
                1 => {
                    let _ = rig.table.protect(admission, part, Access::RWX);
                }
                _ => {
                    let _ = rig.table.collapse(admission, part);
                }
            });
            let at = Gpa::new(first * PAGE);
            rig.table.upgrade(at);
            let _ = rig.table.arm(range(first * PAGE, PAGE));
        };
        beside(2, faults, |random, going_on| {
            while going_on() {
                let first = random.below(pages);
                let len = 1 + random.below((pages - first).min(6));
                let part = range(first * PAGE, len * PAGE);
                let inside = |page: u64| (first..first + len).contains(&page);
                let check = |what: &str| {
                    for (at, _, access, _) in rig.translations() {
                        let allowed = !inside(at / PAGE) || !access.writable();
                        assert!(allowed, "{}: {what}: {at:#x} is writable in a window", rig.format.name);
                    }
                };
                let zapped = random.below(3) == 0;
                if zapped {
                    let guard = rig.space.zap(part).unwrap();
                    let there = rig.translations().iter().any(|page| inside(page.0 / PAGE));
                    assert!(!there, "{}: translated in a window", rig.format.name);
                    guard.close().unwrap();
                    continue;
                }
                let guard = rig.space.retain(part).unwrap();
                check("opened");
                for page in first..first + len {
                    host[page as usize].store(random.below(2) as u8, Ordering::SeqCst);
                }
                std::thread::yield_now();
                check("open");
                guard.keep(part).unwrap();
                guard.close().unwrap();
            }
        });
        for (at, output, access, _) in rig.translations() {
            let most = rights(at / PAGE);
            assert!(most.contains(access), "{}: {at:#x} has {access}, the host gives {most}", rig.format.name);
            assert_eq!(output, OUT + at);
        }
    });
}

/// A guest that writes whatever it likes where hardware looks: the engine follows none of it.
#[test]
fn a_guest_that_writes_its_own_tables_misleads_nobody() {
    for format in flavours().into_iter().filter(|format| format.mirror) {
        let rig = Rig::new(format);
        rig.map(0, rig.whole().len(), &large()).unwrap();
        let pages = rig.whole().len() / PAGE;
        let scribble = |random: &mut Random| {
            for page in rig.pages.hardware_pages() {
                let entry = &page[random.below(page.len() as u64) as usize];
                entry.store(random.below(1 << 52) << 11 | random.below(1 << 11));
            }
            std::thread::sleep(Duration::from_micros(50));
        };
        beside(1, scribble, |random, going_on| {
            let mut harvested = Vec::new();
            while going_on() {
                disturb(&rig, random, &mut harvested);
                rig.table.check().unwrap();
                let mut walker = rig.walker();
                let at = random.below(pages) * PAGE;
                let scope = walker.enter();
                if let Ok(found) = rig.table.translate(&scope, Gpa::new(at), Access::READ) {
                    assert_eq!(found.output().as_u64(), OUT + at);
                }
            }
        });
        for (at, output, _, _) in rig.translations() {
            assert_eq!(output, OUT + at, "{}", format.name);
        }
        // The next change puts right what hardware sees.
        rig.table.unmap(rig.whole()).unwrap();
        rig.map(0, rig.whole().len(), &small()).unwrap();
        for page in 0..pages {
            let found = common::hardware_access(&rig, page * PAGE, Access::WRITE);
            assert_eq!(found, Some(OUT + page * PAGE), "{}", format.name);
        }
        assert_eq!(rig.table.harvest_dirty(rig.whole()).unwrap().len() as u64, pages, "{}", format.name);
        rig.verify();
        rig.end();
    }
}

#[test]
fn what_hardware_sees_is_what_the_engine_keeps() {
    for format in flavours().into_iter().filter(|format: &Tiny| format.mirror) {
        let rig = Rig::new(format);
        let mut random = Random(77);
        let mut harvested = Vec::new();
        rig.map(0, rig.whole().len(), &large()).unwrap();
        for _ in 0..400 {
            disturb(&rig, &mut random, &mut harvested);
            let kept = rig.translations();
            for page in 0..rig.whole().len() / PAGE {
                let expected = kept.iter().find(|row| row.0 == page * PAGE).map(|row| row.1);
                let found = common::hardware_access(&rig, page * PAGE, Access::READ);
                assert_eq!(found, expected, "{}: page {page}", format.name);
            }
        }
        rig.verify();
        rig.end();
    }
}
