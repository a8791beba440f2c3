// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! EPT, walked by Bochs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "what goes wrong fails the test")]

mod common;

use std::sync::atomic::Ordering;

use common::{access, entry, fault, step};
use conformance::machine::{Class, Exit, Machine};
use conformance::machines::vmx::{Variant, Vmx, variants};
use conformance::mmu::{Mmu, Without};
use conformance::sequence::Sequences;
use conformance::testing;
use notifier_core::Access;
use spte_core::format::Level;
use spte_model::{Op, TouchKind};
use spte_x86::AccessedDirty;

/// What is made of a valid entry.
type Break = fn(u64) -> u64;

/// A machine, for each variant. Without Bochs there is nothing to test.
fn each(test: impl Fn(&Variant, &Mmu<Vmx>, &Sequences<Vmx>)) {
    let _alone = testing::alone();
    for variant in variants() {
        if let Some(machine) = testing::started(variant.name, Vmx::start(&testing::tools(), variant)) {
            let mmu = Mmu::new(machine);
            test(&variant, &mmu, &Sequences::new(mmu.clone()));
        }
    }
}

#[test]
fn loads_stores_and_fetches_arrive_through_leaves_of_every_size() {
    each(|_, _, sequences| {
        let maps = [
            "map 0x200000 0x2003000 0x3000 rwx",
            "map 0x40000000 0x2200000 0x400000 rwx page=2m",
            "map 0x8000000000 0 0x40000000 rwx page=1g",
            "map 0xff80000000 0x3fff000 0x1000 rwx",
        ];
        let places = [
            (0x20_0000, 0x200_3000),
            (0x20_2ff8, 0x200_5ff8),
            (0x4000_0000, 0x220_0000),
            (0x403f_f120, 0x25f_f120),
            (0x80_0200_0000, 0x200_0000),
            (0x80_03ff_fff8, 0x3ff_fff8),
            (0xff_8000_0010, 0x3ff_f010),
        ];
        common::accesses_arrive(sequences, &maps, &places);
    });
}

#[test]
fn hardware_marks_what_was_used_and_what_was_written() {
    each(|variant, mmu, sequences| {
        let (accessed, both) = match variant.options.accessed_dirty {
            AccessedDirty::Disabled => (0, 0),
            _ => (1 << 8, 3 << 8),
        };
        common::hardware_marks(mmu, sequences, accessed, both);
    });
}

#[test]
fn what_is_absent_or_denied_is_reported_as_that() {
    each(|variant, mmu, sequences| {
        let rights = [Access::RW, Access::RX, Access::READ, Access::EXECUTE];
        let rights = &rights[..if variant.options.execute_only { 4 } else { 3 }];
        let sizes = [("4k", 0x1000), ("2m", 0x20_0000), ("1g", 0x4000_0000)];
        // The last address of all, below a table that is there, and below none.
        let absent = [0x4000_1000, 0x4020_0000, 0x90_0000_0000, 0xff_ffdf_fff8];
        common::absent_or_denied(mmu, sequences, rights, &sizes, &absent);
    });
}

#[test]
fn an_entry_that_breaks_a_rule_is_a_misconfiguration() {
    each(|_, mmu, sequences| {
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x40000000 0x2000000 0x1000 rwx");
        step(&mut pair, "map 0x40200000 0x2000000 0x200000 rwx page=2m");
        step(&mut pair, "map 0x80000000 0 0x40000000 rwx page=1g");
        const RESERVED: u64 = 1 << 40;
        let broken: [((u64, u8), Break); 14] = [
            ((0x4000_0000, 1), |raw| raw & !1),
            ((0x4000_0000, 1), |raw| raw & !0x38 | 2 << 3),
            ((0x4000_0000, 1), |raw| raw & !0x38 | 3 << 3),
            ((0x4000_0000, 1), |raw| raw | 7 << 3),
            ((0x4000_0000, 1), |raw| raw | RESERVED),
            ((0x4000_0000, 2), |raw| raw | 1 << 3),
            ((0x4000_0000, 2), |raw| raw | 1 << 6),
            ((0x4000_0000, 3), |raw| raw | 1 << 5),
            ((0x4000_0000, 4), |raw| raw | 1 << 7),
            ((0x4000_0000, 4), |raw| raw | RESERVED),
            ((0x4020_0000, 2), |raw| raw | 1 << 13),
            ((0x4020_0000, 2), |raw| raw & !1),
            ((0x8200_0000, 3), |raw| raw | 1 << 29),
            ((0x8200_0000, 3), |raw| raw | 7 << 3),
        ];
        // Whatever is cached goes with the exit of a fault.
        let forget = || _ = fault(access(mmu, 0x90_0000_0000, TouchKind::Read));
        for (place, breaks) in broken {
            common::misconfigured(mmu, &pair, place, breaks, forget);
        }
    });
}

#[test]
fn bochs_takes_bit_12_of_larger_leaves() {
    each(|_, mmu, sequences| {
        // Another version may have mended it.
        if !testing::required() {
            return;
        }
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x40200000 0x2000000 0x200000 rwx page=2m");
        let at = entry(mmu, &pair, 0x4020_0000, 2);
        let memory = mmu.machine().ground().memory.clone();
        let raw = memory.load(at);
        memory.store(at, raw | 1 << 12);
        let rule = mmu.machine().check_hardware(Level::new(2).unwrap(), raw | 1 << 12).unwrap_err().rule;
        assert_eq!(rule, mmu.machine().leniencies()[0].rule);
        assert!(matches!(access(mmu, 0x4020_0000, TouchKind::Read), Exit::Done { .. }));
        memory.store(at, raw);
    });
}

#[test]
fn execute_only_leaves_are_fetched_from_and_not_read() {
    each(|variant, mmu, sequences| {
        if !variant.options.execute_only {
            return;
        }
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x40000000 0x2000000 0x1000 x");
        assert!(matches!(access(mmu, 0x4000_0000, TouchKind::Execute), Exit::Done { value: 0 }));
        assert_eq!(fault(access(mmu, 0x4000_0000, TouchKind::Read)).class, Class::Denied);
    });
}

#[test]
fn a_flush_that_is_missing_shows_until_something_faults() {
    each(|variant, mmu, sequences| {
        let changes = [
            ("unmap 0x40000000 0x200000", "touch 0x40000000 r"),
            ("protect 0x40000000 0x200000 r", "touch 0x40000000 w"),
            ("change 0x40000000 0x2001000", "touch 0x40000000 r"),
            ("zapchange 0x40000000 0x2001000", "touch 0x40000000 r"),
            ("wrprotect 0x40000000 0x200000", "touch 0x40000000 w"),
            ("dirty 0x40000000 0x200000", "touch 0x40000000 w"),
        ];
        // The last is for hardware that marks what was written: it has to do so again.
        let marks = variant.options.accessed_dirty == AccessedDirty::Enabled;
        for (change, touch) in &changes[..changes.len() - usize::from(!marks)] {
            for (page, size) in [("4k", "0x2000"), ("2m", "0x200000")] {
                let mut pair = sequences.table().unwrap();
                step(&mut pair, &format!("map 0x40000000 0x2000000 {size} rw page={page}"));
                step(&mut pair, "touch 0x40000000 w");
                let change: Op = change.replace("0x200000", size).parse().unwrap();
                let touch: Op = touch.parse().unwrap();
                let before = mmu.counts().left_out.load(Ordering::Relaxed);
                mmu.leave_out(Without::Flushes);
                let missed = pair.step(&change).and_then(|_| pair.step(&touch));
                mmu.leave_out(Without::Nothing);
                let left_out = mmu.counts().left_out.load(Ordering::Relaxed) > before;
                assert!(left_out && missed.is_err(), "{}, {page}: {change}: {missed:?}", variant.name);
                // What the guest ran on goes, and so does a fault for nobody: whatever it had is gone too.
                drop(pair);
                assert!(sequences.replay(&[touch]).is_none());
            }
        }
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
