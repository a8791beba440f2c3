// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long-mode tables, walked by this processor.
#![allow(clippy::unwrap_used, clippy::panic, reason = "what goes wrong fails the test")]

mod common;

use common::{DATA, KINDS, access, fault, step};
use conformance::machine::{Class, Exit, Machine};
use conformance::machines::kvm::{KvmGuest, Variant, variants};
use conformance::mmu::Mmu;
use conformance::sequence::{Sequences, Walked};
use conformance::testing;
use notifier_core::Access;
use spte_core::FlushRequest;
use spte_core::format::{Format, Level};
use spte_model::{Op, Outcome, TouchKind};

/// A machine, for each variant that is possible here. Without /dev/kvm there is nothing to test.
fn each(test: impl Fn(&Variant, &Mmu<KvmGuest>, &Sequences<KvmGuest>)) {
    let _alone = testing::alone();
    for variant in variants() {
        if let Some(machine) = testing::started(variant.name, KvmGuest::start(&testing::tools(), variant)) {
            let mmu = Mmu::new(machine);
            test(&variant, &mmu, &Sequences::new(mmu.clone()));
        }
    }
}

/// Guests may be without leaves of 1 GiB.
fn has_1g(pair: &Walked<KvmGuest>) -> bool {
    pair.driver().table().format().options().pages_1g
}

/// Everything goes.
fn flush(mmu: &Mmu<KvmGuest>) {
    mmu.machine().flush(&FlushRequest { ranges: &[], all: true, nonblocking: false }).unwrap();
}

/// Where in memory the entry for `gpa` at `level` is.
fn entry(mmu: &Mmu<KvmGuest>, pair: &Walked<KvmGuest>, gpa: u64, level: u8) -> u64 {
    let machine = mmu.machine();
    let index = |level: u8| 8 * (gpa >> (3 + 9 * u32::from(level)) & 0x1ff);
    let root = pair.driver().table().root().as_u64();
    let top = pair.driver().table().format().geometry().top().get();
    let table = (level + 1..=top)
        .rev()
        .fold(root, |table, level| machine.ground().memory.load(table + index(level)) & 0xf_ffff_ffff_f000);
    table + index(level)
}

#[test]
fn loads_stores_and_fetches_arrive_through_leaves_of_every_size() {
    each(|_, _, sequences| {
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x200000 0x2003000 0x3000 rwx");
        step(&mut pair, "map 0x40000000 0x2200000 0x400000 rwx page=2m");
        let larger = if has_1g(&pair) { "1g" } else { "2m" };
        step(&mut pair, &format!("map 0x808000000000 0 0x40000000 rwx page={larger}"));
        step(&mut pair, "map 0xffffff800000 0x3fff000 0x1000 rwx");
        let places: [(u64, u64); 7] = [
            (0x20_0000, 0x200_3000),
            (0x20_2ff8, 0x200_5ff8),
            (0x4000_0000, 0x220_0000),
            (0x403f_f120, 0x25f_f120),
            (0x8080_0200_0000, 0x200_0000),
            (0x8080_03ff_fff8, 0x3ff_fff8),
            (0xffff_ff80_0010, 0x3ff_f010),
        ];
        for (gpa, out) in places {
            for kind in KINDS {
                let touched = step(&mut pair, &Op::Touch { gpa, kind }.to_string());
                assert_eq!(touched, Outcome::Touched { out }, "{kind:?} of {gpa:#x}");
            }
        }
        pair.compare().unwrap();
    });
}

#[test]
fn hardware_marks_what_was_used_and_what_was_written() {
    each(|variant, mmu, sequences| {
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x200000 0x2000000 0x2000 rw");
        step(&mut pair, "map 0x40000000 0x2000000 0x200000 rw page=2m");
        let raw = |level, gpa| {
            let entry = entry(mmu, &pair, gpa, level);
            mmu.machine().ground().memory.load(entry)
        };
        let before = [raw(1, 0x20_0000), raw(1, 0x20_1000), raw(2, 0x4000_0000)];
        access(mmu, 0x20_0000, TouchKind::Read);
        access(mmu, 0x20_1000, TouchKind::Write);
        access(mmu, 0x4000_0000, TouchKind::Write);
        let after = [raw(1, 0x20_0000), raw(1, 0x20_1000), raw(2, 0x4000_0000)];
        let (accessed, both) = (1 << 5, 3 << 5);
        let expected = [before[0] | accessed, before[1] | both, before[2] | both];
        assert_eq!(after, expected, "{}", variant.name);
        let memory = mmu.machine().ground().memory.clone();
        for at in [DATA + 0x10, DATA + 0x1010] {
            memory.store(at, at);
        }
    });
}

#[test]
fn what_is_absent_or_denied_is_reported_as_that() {
    each(|_, mmu, sequences| {
        let mut pair = sequences.table().unwrap();
        let rights = [Access::RW, Access::RX, Access::READ];
        let sizes = [("4k", 0x4000_0000, 0x1000), ("2m", 0x8000_0000, 0x20_0000), ("1g", 0x1_0000_0000, 0x4000_0000)];
        let sizes = &sizes[..if has_1g(&pair) { 3 } else { 2 }];
        let mut leaves = Vec::new();
        for (number, &rights) in rights.iter().enumerate() {
            for &(page, gpa, size) in sizes {
                let (gpa, out) = (gpa + ((number as u64) << 36), DATA & !(size - 1));
                step(&mut pair, &format!("map {gpa:#x} {out:#x} {size:#x} {rights} page={page}"));
                leaves.push((gpa + DATA - out, rights));
            }
        }
        for (gpa, rights) in leaves {
            for kind in KINDS {
                let needed = [Access::READ, Access::WRITE, Access::EXECUTE][kind as usize];
                let exit = access(mmu, gpa, kind);
                if rights.contains(needed) {
                    assert!(matches!(exit, Exit::Done { .. }), "{kind:?} of {rights}: {exit:?}");
                    continue;
                }
                let fault = fault(exit);
                let place = Mmu::<KvmGuest>::place(gpa, kind);
                assert_eq!((fault.class, fault.at, fault.kind), (Class::Denied, Some(place), Some(kind)), "{fault}");
            }
        }
        // The last address of all, below a table that is there, and below none.
        for gpa in [0x4000_1000, 0x4020_0000, 0x90_0000_0000, 0x7fff_ffdf_fff8, 0xffff_ffff_fff8] {
            for kind in KINDS {
                let fault = fault(access(mmu, gpa, kind));
                let place = Mmu::<KvmGuest>::place(gpa, kind);
                assert_eq!((fault.class, fault.at, fault.kind), (Class::Absent, Some(place), Some(kind)), "{fault}");
            }
        }
        let memory = mmu.machine().ground().memory.clone();
        memory.store(DATA + 0x10, DATA + 0x10);
    });
}

#[test]
fn an_entry_that_breaks_a_rule_is_a_misconfiguration() {
    each(|variant, mmu, sequences| {
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x40000000 0x2000000 0x1000 rwx");
        step(&mut pair, "map 0x40200000 0x2000000 0x200000 rwx page=2m");
        let reserved = 1_u64 << 51;
        let mut broken: Vec<(u64, u8, u64)> =
            vec![(0x4000_0000, 4, 1 << 7), (0x4020_0000, 2, 1 << 13), (0x4020_0000, 2, 1 << 20)];
        if has_1g(&pair) {
            step(&mut pair, "map 0x80000000 0 0x40000000 rwx page=1g");
            broken.extend([(0x8200_0000, 3, 1 << 13), (0x8200_0000, 3, 1 << 29)]);
        } else {
            broken.push((0x4000_0000, 3, 1 << 7));
        }
        // A processor with all 52 address bits has none to reserve.
        if pair.driver().table().format().options().physical_bits < 52 {
            let places = [(0x4000_0000, 1), (0x4000_0000, 2), (0x4000_0000, 3), (0x4000_0000, 4)];
            broken.extend(places.map(|(gpa, level)| (gpa, level, reserved)));
        }
        for (gpa, level, broken) in broken {
            let at = entry(mmu, &pair, gpa, level);
            let memory = mmu.machine().ground().memory.clone();
            let raw = memory.load(at);
            let (level, wrong) = (Level::new(level).unwrap(), raw | broken);
            assert!(mmu.machine().check_hardware(level, raw).is_ok(), "{raw:#x}");
            assert!(mmu.machine().check_hardware(level, wrong).is_err(), "{wrong:#x}");
            for kind in KINDS {
                memory.store(at, wrong);
                flush(mmu);
                let exit = access(mmu, gpa, kind);
                assert!(matches!(exit, Exit::Fault(_)), "{wrong:#x} at level {}: {exit:?}", level.get());
                let fault = fault(exit);
                let place = Mmu::<KvmGuest>::place(gpa, kind);
                let expected = (Class::Misconfigured, Some(place));
                assert_eq!((fault.class, fault.at), expected, "{}, {wrong:#x}: {fault}", variant.name);
                memory.store(at, raw);
                flush(mmu);
                assert!(matches!(access(mmu, gpa, kind), Exit::Done { .. }), "{raw:#x}");
            }
        }
        let memory = mmu.machine().ground().memory.clone();
        memory.store(DATA + 0x10, DATA + 0x10);
    });
}

#[test]
fn a_flush_reaches_what_is_cached() {
    each(|_, _, sequences| common::a_flush_reaches_what_is_cached(sequences));
}

#[test]
fn a_guest_at_work_is_kicked_faults_and_goes_on() {
    each(|_, mmu, sequences| common::a_guest_at_work_is_kicked_faults_and_goes_on(mmu, sequences));
}

#[test]
fn random_sequences_do_as_the_model() {
    each(|_, mmu, sequences| common::random_sequences_do_as_the_model(mmu, sequences));
}
