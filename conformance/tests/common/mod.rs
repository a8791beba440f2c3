// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is tested of every x86 machine whose guest reaches 47 bits and more, whoever walks.
#![allow(clippy::unwrap_used, clippy::panic, reason = "what goes wrong fails the test")]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use conformance::machine::{Class, Exit, Fault, GuestAccess, Machine, Work};
use conformance::mmu::Mmu;
use conformance::sequence::{Sequences, Walked};
use notifier_core::{Access, Gpa};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spte_core::format::{Format, Level};
use spte_drive::Step;
use spte_model::{Op, Outcome, TouchKind};

/// Where the data of these machines begins.
pub(crate) const DATA: u64 = 0x200_0000;
pub(crate) const KINDS: [TouchKind; 3] = [TouchKind::Read, TouchKind::Write, TouchKind::Execute];

pub(crate) fn step<M: Machine>(pair: &mut Walked<M>, op: &str) -> Outcome {
    match pair.step(&op.parse::<Op>().unwrap()) {
        Ok(Step::Answered(outcome)) => outcome,
        other => panic!("{op}: {other:?}"),
    }
}

pub(crate) fn access<M: Machine>(mmu: &Mmu<M>, at: u64, kind: TouchKind) -> Exit {
    mmu.machine().access(GuestAccess { at: Mmu::<M>::place(at, kind), kind, value: 0x5555 }).unwrap()
}

pub(crate) fn fault(exit: Exit) -> Fault {
    match exit {
        Exit::Fault(fault) => fault,
        other => panic!("{other:?}"),
    }
}

/// Where in memory the entry for `gpa` at `level` is.
pub(crate) fn entry<M: Machine>(mmu: &Mmu<M>, pair: &Walked<M>, gpa: u64, level: u8) -> u64 {
    let machine = mmu.machine();
    let table = pair.driver().table();
    let index = |level: u8| 8 * (gpa >> (3 + 9 * u32::from(level)) & 0x1ff);
    let above = (level + 1..=table.format().geometry().top().get()).rev();
    let link = |table, level| machine.ground().memory.load(table + index(level)) & 0xf_ffff_ffff_f000;
    above.fold(table.root().as_u64(), link) + index(level)
}

/// Puts back the data that [`access`] stores to.
fn restore<M: Machine>(mmu: &Mmu<M>, places: &[u64]) {
    let memory = mmu.machine().ground().memory.clone();
    places.iter().for_each(|at| memory.store(*at, *at));
}

/// Maps, and then every access to each of these guest addresses arrives at its output.
pub(crate) fn accesses_arrive<M: Machine>(sequences: &Sequences<M>, maps: &[&str], places: &[(u64, u64)]) {
    let mut pair = sequences.table().unwrap();
    for map in maps {
        step(&mut pair, map);
    }
    for &(gpa, out) in places {
        for kind in KINDS {
            let touched = step(&mut pair, &Op::Touch { gpa, kind }.to_string());
            assert_eq!(touched, Outcome::Touched { out }, "{kind:?} of {gpa:#x}");
        }
    }
    pair.compare().unwrap();
}

/// Hardware sets these bits in what was read, and these in what was written.
pub(crate) fn hardware_marks<M: Machine>(mmu: &Mmu<M>, sequences: &Sequences<M>, accessed: u64, both: u64) {
    let mut pair = sequences.table().unwrap();
    step(&mut pair, "map 0x200000 0x2000000 0x2000 rw");
    step(&mut pair, "map 0x40000000 0x2000000 0x200000 rw page=2m");
    let raw = |level, gpa| {
        let entry = entry(mmu, &pair, gpa, level);
        mmu.machine().ground().memory.load(entry)
    };
    let all = || [raw(1, 0x20_0000), raw(1, 0x20_1000), raw(2, 0x4000_0000)];
    let before = all();
    access(mmu, 0x20_0000, TouchKind::Read);
    access(mmu, 0x20_1000, TouchKind::Write);
    access(mmu, 0x4000_0000, TouchKind::Write);
    assert_eq!(all(), [before[0] | accessed, before[1] | both, before[2] | both], "{}", mmu.machine().name());
    restore(mmu, &[DATA + 0x10, DATA + 0x1010]);
}

/// Leaves of each size (its name, and bytes) with each of these rights do what they grant and deny the rest; at the `absent`
/// addresses there is nothing.
pub(crate) fn absent_or_denied<M: Machine>(
    mmu: &Mmu<M>,
    sequences: &Sequences<M>,
    rights: &[Access],
    sizes: &[(&str, u64)],
    absent: &[u64],
) {
    let mut pair = sequences.table().unwrap();
    let mut leaves = Vec::new();
    for (number, &rights) in (0_u64..).zip(rights) {
        for ((page, size), gpa) in sizes.iter().zip([0x4000_0000, 0x8000_0000, 0x1_0000_0000]) {
            let (gpa, out) = (gpa + (number << 36), DATA & !(size - 1));
            step(&mut pair, &format!("map {gpa:#x} {out:#x} {size:#x} {rights} page={page}"));
            leaves.push((gpa + DATA - out, rights));
        }
    }
    let reported = |class, gpa, kind| {
        let fault = fault(access(mmu, gpa, kind));
        let place = Mmu::<M>::place(gpa, kind);
        assert_eq!((fault.class, fault.at, fault.kind), (class, Some(place), Some(kind)), "{fault}");
    };
    for (gpa, rights) in leaves {
        for kind in KINDS {
            if rights.contains(spte_drive::access(kind.needs())) {
                let exit = access(mmu, gpa, kind);
                assert!(matches!(exit, Exit::Done { .. }), "{kind:?} of {rights}: {exit:?}");
            } else {
                reported(Class::Denied, gpa, kind);
            }
        }
    }
    for &gpa in absent {
        KINDS.iter().for_each(|&kind| reported(Class::Absent, gpa, kind));
    }
    restore(mmu, &[DATA + 0x10]);
}

/// Whatever the checker refuses of what is made of the entry for `gpa` at `level` is a misconfiguration; `forget` sees to it that
/// nothing is cached.
pub(crate) fn misconfigured<M: Machine>(
    mmu: &Mmu<M>,
    pair: &Walked<M>,
    (gpa, level): (u64, u8),
    breaks: impl Fn(u64) -> u64,
    forget: impl Fn(),
) {
    let at = entry(mmu, pair, gpa, level);
    let memory = mmu.machine().ground().memory.clone();
    let raw = memory.load(at);
    let (level, wrong) = (Level::new(level).unwrap(), breaks(raw));
    assert!(mmu.machine().check_hardware(level, raw).is_ok(), "{raw:#x}");
    assert!(mmu.machine().check_hardware(level, wrong).is_err(), "{wrong:#x}");
    for kind in KINDS {
        memory.store(at, wrong);
        forget();
        let exit = access(mmu, gpa, kind);
        assert!(matches!(exit, Exit::Fault(_)), "{wrong:#x} at level {}: {exit:?}", level.get());
        let fault = fault(exit);
        let expected = (Class::Misconfigured, Some(Mmu::<M>::place(gpa, kind)));
        assert_eq!((fault.class, fault.at), expected, "{}, {wrong:#x}: {fault}", mmu.machine().name());
        memory.store(at, raw);
        forget();
        assert!(matches!(access(mmu, gpa, kind), Exit::Done { .. }), "{raw:#x}");
    }
    restore(mmu, &[DATA + 0x10]);
}

pub(crate) fn a_flush_reaches_what_is_cached<M: Machine>(sequences: &Sequences<M>) {
    let mut pair = sequences.table().unwrap();
    for (gpa, page) in [("0x40000000", "4k"), ("0x80000000", "2m")] {
        let size = if page == "4k" { "0x1000" } else { "0x200000" };
        step(&mut pair, &format!("map {gpa} 0x2000000 {size} rw page={page}"));
        step(&mut pair, &format!("touch {gpa} w"));
        step(&mut pair, &format!("protect {gpa} {size} r"));
        assert_eq!(step(&mut pair, &format!("touch {gpa} w")).to_string(), "fault perm");
        step(&mut pair, &format!("touch {gpa} r"));
        step(&mut pair, &format!("unmap {gpa} {size}"));
        assert_eq!(step(&mut pair, &format!("touch {gpa} r")).to_string(), "fault absent");
    }
}

pub(crate) fn a_guest_at_work_is_kicked_faults_and_goes_on<M: Machine>(mmu: &Mmu<M>, sequences: &Sequences<M>) {
    let name = mmu.machine().name().to_owned();
    let mut pair = sequences.table().unwrap();
    let (pages, first) = (8, 0x4000_0000);
    let (memory, scratch) = {
        let machine = mmu.machine();
        (machine.ground().memory.clone(), machine.ground().scratch().unwrap())
    };
    step(&mut pair, "map 0x40000000 0x2000000 0x8000 rw");
    for page in 0..pages {
        memory.store(DATA + 0x1000 * page + Work::OFFSET, first + 0x1000 * page + Work::OFFSET);
    }
    let counts = || [0, 8].map(|at| memory.load(scratch.output + at));
    let wait = |what: &dyn Fn() -> bool| {
        let since = Instant::now();
        while !what() {
            assert!(since.elapsed() < Duration::from_secs(20), "{}: {:?}", name, counts());
            std::thread::yield_now();
        }
    };
    // What it will leave behind is there already, so that the model need not be told.
    for page in 0..pages {
        step(&mut pair, &format!("touch {:#x} w", first + 0x1000 * page + Work::OFFSET + 8));
    }
    mmu.run(Work { first, pages, stride: 0x1000, written: 2, counts: scratch.gpa, broadcast: false }).unwrap();
    wait(&|| counts()[0] > 3);
    assert_eq!(mmu.watch().unwrap(), None);
    // A flush takes it out, and it goes on.
    step(&mut pair, "unmap 0x40003000 0x1000");
    let mut told = None;
    while told.is_none() {
        told = mmu.watch().unwrap();
    }
    let told = told.unwrap();
    let expected = (Class::Absent, Some(first + 0x3000 + Work::OFFSET), Some(TouchKind::Read));
    assert_eq!((told.class, told.at, told.kind), expected, "{told}");
    step(&mut pair, "map 0x40003000 0x2003000 0x1000 rw");
    mmu.go_on().unwrap();
    let passes = counts()[0];
    wait(&|| counts()[0] > passes + 3);
    // What it writes is withheld: it faults with the store, and goes on with it.
    step(&mut pair, "protect 0x40006000 0x1000 r");
    let mut told = None;
    while told.is_none() {
        told = mmu.watch().unwrap();
    }
    let told = told.unwrap();
    let expected = (Class::Denied, Some(first + 0x6000 + Work::OFFSET + 8), Some(TouchKind::Write));
    assert_eq!((told.class, told.at, told.kind), expected, "{told}");
    step(&mut pair, "protect 0x40006000 0x1000 rw");
    mmu.go_on().unwrap();
    let passes = counts()[0];
    wait(&|| counts()[0] > passes + 3);
    mmu.stop().unwrap();
    let [passes, mismatches] = counts();
    assert_eq!(mismatches, 0);
    let written = memory.load(DATA + 0x6000 + Work::OFFSET + 8);
    assert!(written == passes || written + 1 == passes, "{written} of {passes} passes");
    let fact = pair.driver().table().entry(Gpa::new(first + 0x7000)).unwrap();
    assert!(pair.driver().table().format().is_dirty(fact.level, fact.raw), "{:#x}", fact.raw);
    let range = DATA..DATA + 0x8000;
    range.step_by(8).filter(|at| at & 0xfff >= 16).for_each(|at| memory.store(at, at));
}

pub(crate) fn random_sequences_do_as_the_model<M: Machine>(mmu: &Mmu<M>, sequences: &Sequences<M>) {
    let name = mmu.machine().name().to_owned();
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let since = Instant::now();
    for case in 0..24 {
        if let Err(divergence) = sequences.case(&mut rng) {
            panic!("{}, case {case}:\n{divergence}", name);
        }
    }
    println!("{}: {:?} in {:?}", name, mmu.counts(), since.elapsed());
    assert!(mmu.counts().faults.load(Ordering::Relaxed) > 0);
}
