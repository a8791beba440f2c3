// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The GPA table of 64-bit MIPS on QEMU's Malta board.
#![allow(clippy::unwrap_used, reason = "tests fail by panics")]

use std::sync::Arc;
use std::sync::atomic::Ordering;

use conformance::change::{self, How};
use conformance::machine::{Class, Exit, Fault, GuestAccess, Machine};
use conformance::machines::mips::{ByteOrder, Mips, Variant, variants};
use conformance::mmu::{Mmu, Without};
use conformance::sequence::{Sequences, Walked};
use conformance::testing;
use notifier_core::Gpa;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spte_core::format::{Format, Kind, Level};
use spte_core::{Flush, FlushRequest};
use spte_drive::Step;
use spte_mips::{BigEndian, LittleEndian};
use spte_model::{Op, Outcome, TouchKind};

/// A machine of this variant, unless programs are missing.
fn start<O: ByteOrder>(variant: Variant) -> Option<Mmu<Mips<O>>> {
    let name = variant.name.clone();
    testing::started(&name, Mips::start(&testing::tools(), variant)).map(Mmu::new)
}

/// Each variant of both byte orders whose name contains `part`, one after the other.
macro_rules! each {
    ($part:expr, $test:ident) => {{
        let _alone = testing::alone();
        assert!(
            variants::<BigEndian>().iter().any(|variant| variant.name.contains($part)),
            "nothing is called {}",
            $part
        );
        for variant in variants::<BigEndian>().into_iter().filter(|variant| variant.name.contains($part)) {
            start::<BigEndian>(variant).into_iter().for_each($test);
        }
        for variant in variants::<LittleEndian>().into_iter().filter(|variant| variant.name.contains($part)) {
            start::<LittleEndian>(variant).into_iter().for_each($test);
        }
    }};
}

/// A table, what pages are of it, and how long they are.
struct Bench<O: ByteOrder> {
    mmu: Mmu<Mips<O>>,
    sequences: Sequences<Mips<O>>,
    pair: Walked<Mips<O>>,
    page: u64,
    data: u64,
}

/// The first guest address that is used: an even page.
const AT: u64 = 0x1240_0000;

impl<O: ByteOrder> Bench<O> {
    fn new(mmu: Mmu<Mips<O>>) -> Self {
        let sequences = Sequences::new(mmu.clone());
        let pair = sequences.table().unwrap();
        let (page, data) = {
            let machine = mmu.machine();
            (machine.driven().shape.granule(), machine.ground().data.start)
        };
        Self { mmu, sequences, pair, page, data }
    }

    /// One operation that both do, in words: `{n}` is guest page n, `{=n}` the n-th page of data, `{+n}` the bytes of n pages.
    fn step(&mut self, op: &str) -> Result<Outcome, String> {
        let mut text = op.to_owned();
        for number in 0..8 {
            text = text.replace(&format!("{{{number}}}"), &format!("{:#x}", AT + number * self.page));
            text = text.replace(&format!("{{={number}}}"), &format!("{:#x}", self.data + number * self.page));
            text = text.replace(&format!("{{+{number}}}"), &format!("{:#x}", number * self.page));
        }
        let op: Op = text.parse().unwrap();
        match self.sequences.step(&mut self.pair, &op).map_err(|error| error.to_string())? {
            Some(Step::Answered(outcome)) => Ok(outcome),
            other => panic!("{text}: {other:?}"),
        }
    }

    fn page(&self, number: u64) -> u64 {
        AT + number * self.page
    }

    fn output(&self, number: u64) -> u64 {
        self.data + number * self.page
    }

    /// One access, whatever comes of it.
    fn access(&self, at: u64, kind: TouchKind) -> Exit {
        self.mmu.machine().access(GuestAccess { at, kind, value: 0x1234_5678_9abc_def1 }).unwrap()
    }

    fn fault(&self, at: u64, kind: TouchKind) -> Fault {
        match self.access(at, kind) {
            Exit::Fault(fault) => fault,
            exit => panic!("{exit:x?}"),
        }
    }

    /// Stores `raw` as the entry of this level for `at`, and starts with an empty TLB: what was there.
    fn put(&self, level: u8, at: u64, raw: u64) -> u64 {
        let table = self.pair.driver().table();
        let format = table.format();
        let level = Level::new(level).unwrap();
        let rows = table.walk(Gpa::new(at));
        let child = rows.iter().find_map(|row| match row.kind {
            Kind::Table(child) if row.level.below() == Some(level) => Some(child),
            _ => None,
        });
        let slot = child.unwrap_or(table.root()).as_u64() + 8 * format.geometry().index(level, at) as u64;
        let memory = Arc::clone(&self.mmu.machine().ground().memory);
        let old = memory.word(slot).swap(format.memory_of(raw), Ordering::AcqRel);
        self.mmu.machine().begin(table.root()).unwrap();
        format.raw_of(old)
    }
}

fn answers<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let rixi = mmu.machine().driven().shape.access().len() > 2;
    let name = mmu.machine().name().to_owned();
    let mut bench = Bench::new(mmu);
    let all = if rixi { ["-", "r", "w", "x", "rw", "rx", "wx", "rwx"].as_slice() } else { &["rx", "rwx"] };
    for rights in all {
        let (offset, told) =
            (0x368, |outcome: &Outcome| matches!(outcome, Outcome::Touched { .. } | Outcome::Fault(_)));
        assert_eq!(bench.step(&format!("map {{0}} {{=3}} {{+3}} {rights}")), Ok(Outcome::Ok), "{name}");
        for number in 0..4 {
            for kind in ["r", "w", "x", "w", "r"] {
                let at = bench.page(number) + offset * (number + 1);
                let outcome = bench.step(&format!("touch {at:#x} {kind}")).unwrap();
                let allowed = rights.contains(kind) && number < 3;
                assert!(told(&outcome) && allowed == matches!(outcome, Outcome::Touched { .. }), "{name} {outcome:?}");
            }
        }
        assert_eq!(bench.step("unmap {0} {+3}"), Ok(Outcome::Ok));
    }
}

#[test]
fn accesses_reach_what_is_mapped_with_these_rights_alone() {
    each!("", answers);
}

fn told<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let mut bench = Bench::new(mmu);
    let at = bench.page(0) + 0x18;
    bench.step("map {0} {=0} {+1} -").unwrap();
    for (kind, code) in [(TouchKind::Read, 19), (TouchKind::Write, 1), (TouchKind::Execute, 20)] {
        let fault = bench.fault(at, kind);
        assert_eq!((fault.class, fault.at, fault.level, fault.kind), (Class::Denied, Some(at), None, Some(kind)));
        assert!(fault.syndrome.contains(&format!("ExcCode {code},")), "{fault}");
    }
    let absent = [(TouchKind::Read, 2), (TouchKind::Write, 3), (TouchKind::Execute, 2)];
    bench.step("unmap {0} {+1}").unwrap();
    for (kind, code) in absent {
        let fault = bench.fault(at, kind);
        assert_eq!((fault.class, fault.at, fault.level, fault.kind), (Class::Absent, Some(at), None, Some(kind)));
        assert!(fault.syndrome.contains(&format!("ExcCode {code},")), "{fault}");
    }
    // An old leaf looks the same.
    bench.step("map {0} {=0} {+1} rwx").unwrap();
    bench.step("age {0} {+1}").unwrap();
    for (kind, _) in absent {
        assert_eq!(bench.fault(at, kind).class, Class::Absent);
    }
}

#[test]
fn absent_is_told_from_without_any_right_and_not_from_old() {
    each!("-4k-wide", told);
    each!("16k", told);
}

fn astray<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let walker = mmu.machine().name().contains("walker");
    let mut bench = Bench::new(mmu);
    bench.step("map {0} {=0} {+1} rwx").unwrap();
    let at = bench.page(0) + 0x20;
    let top = bench.pair.driver().table().format().geometry().top().get();
    for level in 2..=top {
        // Zero is an address of a mapped segment; the other is beyond the physical addresses, for 64 bits.
        for bad in [0, 0x9900_0000_0000_0000 | 1 << 55] {
            let link = bench.put(level, at, bad);
            for kind in [TouchKind::Read, TouchKind::Write, TouchKind::Execute] {
                let fault = bench.fault(at, kind);
                assert_eq!((fault.class, fault.at, fault.kind), (Class::Misconfigured, Some(at), None), "{fault}");
                assert_eq!(fault.level.map(Level::get), if walker { None } else { Some(level) });
            }
            bench.put(level, at, link);
            assert_eq!(bench.access(at, TouchKind::Read), Exit::Done { value: bench.output(0) + 0x20 });
        }
    }
}

#[test]
fn a_directory_that_leads_nowhere_is_misconfigured() {
    each!("", astray);
}

fn lenient<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let mut bench = Bench::new(mmu);
    bench.step("map {0} {=0} {+1} rwx").unwrap();
    let (at, gone) = (bench.page(0) + 0x20, Exit::Done { value: bench.output(0) + 0x20 });
    let format = bench.pair.driver().table().format().clone();
    let leaf = bench.put(1, at, 0);
    let places = [1 << 61, if bench.page > 0x1000 { format.options().layout.frame(12, 13) } else { 0 }];
    for stray in places.into_iter().filter(|stray| *stray != 0) {
        assert!(format.check_hardware(Level::LEAF, leaf | stray).is_err());
        bench.put(1, at, leaf | stray);
        assert_eq!(bench.access(at, TouchKind::Read), gone, "{stray:#x}");
    }
}

#[test]
fn address_bits_that_entry_lo_does_not_keep_are_ignored() {
    each!("-refill-", lenient);
}

fn held<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let name = mmu.machine().name().to_owned();
    let mut bench = Bench::new(mmu);
    bench.step("map {0} {=5} {+1} rx").unwrap();
    bench.step("map {1} {=2} {+1} rwx mem=uc").unwrap();
    bench.step("map {3} {=4} {+1} rwx").unwrap();
    bench.step("age {3} {+1}").unwrap();
    for first in [0, 2] {
        let at = [bench.page(first), bench.page(first + 1)];
        bench.mmu.machine().begin(bench.pair.driver().table().root()).unwrap();
        assert_eq!(bench.mmu.machine().cached(at[0]).unwrap(), None);
        bench.access(at[1], TouchKind::Read);
        let [even, odd] = at.map(|at| bench.pair.driver().table().entry(Gpa::new(at)).unwrap().raw);
        let mut machine = bench.mmu.machine();
        assert_eq!(machine.cached(at[0]).unwrap(), Some(machine.pair(at[0], even, odd)), "{name}");
        // It is the buddy's too, and nobody else's.
        assert!(machine.cached(at[1]).unwrap().is_some());
        assert_eq!(machine.cached(bench.page(first + 4)).unwrap(), None);
    }
}

#[test]
fn the_tlb_has_the_pair_that_the_crate_makes_of_two_entries() {
    each!("", held);
}

/// What is done after a touch, and the touch that finds out.
const OWED: [([&str; 3], &str); 6] = [
    (["touch {0} r", "unmap {0} {+1}", ""], "touch {0} r"),
    (["touch {0} w", "protect {0} {+1} rx", ""], "touch {0} w"),
    (["touch {0} w", "wrprotect {0} {+1}", "dirty {0} {+2}"], "walk {0}"),
    (["touch {0} r", "change {0} {=6}", ""], "touch {0} r"),
    // A pair is loaded, and dropped, whole.
    (["touch {0} r", "unmap {1} {+1}", ""], "touch {1} x"),
    (["touch {1} r", "change {0} {=6}", ""], "touch {0} r"),
];

fn owed<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    for without in [Without::Nothing, Without::Flushes] {
        for (index, (before, last)) in OWED.into_iter().enumerate() {
            let mut bench = Bench::new(mmu.clone());
            bench.step("map {0} {=0} {+2} rwx").unwrap();
            bench.step(before[0]).unwrap();
            mmu.leave_out(without);
            for op in before[1..].iter().filter(|op| !op.is_empty()) {
                bench.step(op).unwrap();
            }
            // A write that is not logged is seen in the memory, not by the guest.
            let logs = last.starts_with("walk");
            let found = if logs {
                let exit = bench.access(bench.page(0) + 0x18, TouchKind::Write);
                if matches!(exit, Exit::Done { .. }) { Err("not logged".to_owned()) } else { Ok(()) }
            } else {
                bench.step(last).map(drop)
            };
            mmu.leave_out(Without::Nothing);
            assert_eq!(found.is_ok(), without == Without::Nothing, "{index} {without:?}: {found:?}");
            mmu.machine().ground().memory.store(bench.output(0) + 0x18, bench.output(0) + 0x18);
        }
    }
    assert_ne!(mmu.counts().left_out.load(Ordering::Relaxed), 0);
}

#[test]
fn a_flush_that_is_missing_is_seen() {
    each!("-4k", owed);
    each!("-64k", owed);
}

fn numbered<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let mut bench = Bench::new(mmu.clone());
    bench.step("map {0} {=0} {+1} rwx").unwrap();
    let at = bench.page(0) + 0x20;
    // 1: the next number. 255: the same number again, with all numbers between.
    for (round, flushes) in [1, 255, 1, 255].into_iter().enumerate() {
        let round = round as u64;
        let loaded = Exit::Done { value: bench.output(round % 2) + 0x20 };
        assert_eq!(bench.access(at, TouchKind::Read), loaded, "{round}");
        mmu.leave_out(Without::Flushes);
        bench.step(&format!("change {{0}} {{={}}}", 1 - round % 2)).unwrap();
        mmu.leave_out(Without::Nothing);
        // Nobody flushed: it is cached still.
        assert_eq!(bench.access(at, TouchKind::Read), loaded, "{round}");
        for _ in 0..flushes {
            mmu.flush(&FlushRequest { ranges: &[], all: true, nonblocking: false }).unwrap();
        }
    }
    assert_eq!(bench.access(at, TouchKind::Read), Exit::Done { value: bench.output(0) + 0x20 });
}

#[test]
fn a_flush_of_all_goes_by_new_numbers_that_come_round() {
    each!("-4k-splitting", numbered);
}

fn at_work<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let name = mmu.machine().name().to_owned();
    let changed = change::seen(&mmu, How::Change).unwrap();
    assert_eq!((changed.mismatches, changed.read_faults, changed.other_faults, changed.breaks), (0, 0, 0, 0), "{name}");
    assert_eq!((changed.write_faults, changed.flushes >= change::PAGES), (changed.stores, true), "{name}");
    let zapped = change::seen(&mmu, How::Zap).unwrap();
    let told = (zapped.mismatches, zapped.read_faults, zapped.other_faults);
    assert_eq!(told, (0, change::PAGES, 0), "{name}");
}

#[test]
fn a_guest_at_work_sees_nothing_of_a_change() {
    each!("-wide", at_work);
}

fn soak<O: ByteOrder>(mmu: Mmu<Mips<O>>) {
    let name = mmu.machine().name().to_owned();
    let sequences = Sequences::new(mmu.clone());
    let mut rng = ChaCha8Rng::seed_from_u64(6400);
    // Larger tables take longer to compare.
    let cases = if name.contains("-4k") { 12 } else { 1 };
    for case in 0..cases {
        if let Err(divergence) = sequences.case(&mut rng) {
            panic!("{name}, case {case}:\n{divergence}");
        }
    }
    println!("{name}: {:?}", mmu.counts());
}

#[test]
fn random_sequences_agree_with_the_model() {
    each!("", soak);
}
