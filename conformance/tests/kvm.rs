// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long-mode tables, walked by this processor.
#![allow(clippy::unwrap_used, clippy::panic, reason = "what goes wrong fails the test")]

mod common;

use common::step;
use conformance::machine::Machine;
use conformance::machines::kvm::{KvmGuest, Variant, variants};
use conformance::mmu::Mmu;
use conformance::sequence::Sequences;
use conformance::testing;
use notifier_core::Access;
use spte_core::FlushRequest;

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
fn has_1g(mmu: &Mmu<KvmGuest>) -> bool {
    mmu.machine().driven().format.options().pages_1g
}

/// Everything goes.
fn flush(mmu: &Mmu<KvmGuest>) {
    mmu.machine().flush(&FlushRequest { ranges: &[], all: true, nonblocking: false }).unwrap();
}

#[test]
fn loads_stores_and_fetches_arrive_through_leaves_of_every_size() {
    each(|_, mmu, sequences| {
        let larger = if has_1g(mmu) { "1g" } else { "2m" };
        let maps = [
            "map 0x200000 0x2003000 0x3000 rwx",
            "map 0x40000000 0x2200000 0x400000 rwx page=2m",
            &format!("map 0x808000000000 0 0x40000000 rwx page={larger}"),
            "map 0xffffff800000 0x3fff000 0x1000 rwx",
        ];
        let places = [
            (0x20_0000, 0x200_3000),
            (0x20_2ff8, 0x200_5ff8),
            (0x4000_0000, 0x220_0000),
            (0x403f_f120, 0x25f_f120),
            (0x8080_0200_0000, 0x200_0000),
            (0x8080_03ff_fff8, 0x3ff_fff8),
            (0xffff_ff80_0010, 0x3ff_f010),
        ];
        common::accesses_arrive(sequences, &maps, &places);
    });
}

#[test]
fn hardware_marks_what_was_used_and_what_was_written() {
    each(|_, mmu, sequences| common::hardware_marks(mmu, sequences, 1 << 5, 3 << 5));
}

#[test]
fn what_is_absent_or_denied_is_reported_as_that() {
    each(|_, mmu, sequences| {
        let sizes = [("4k", 0x1000), ("2m", 0x20_0000), ("1g", 0x4000_0000)];
        let sizes = &sizes[..if has_1g(mmu) { 3 } else { 2 }];
        // The last address of all, below a table that is there, and below none.
        let absent = [0x4000_1000, 0x4020_0000, 0x90_0000_0000, 0x7fff_ffdf_fff8, 0xffff_ffff_fff8];
        common::absent_or_denied(mmu, sequences, &[Access::RW, Access::RX, Access::READ], sizes, &absent);
    });
}

#[test]
fn an_entry_that_breaks_a_rule_is_a_misconfiguration() {
    each(|_, mmu, sequences| {
        let mut pair = sequences.table().unwrap();
        step(&mut pair, "map 0x40000000 0x2000000 0x1000 rwx");
        step(&mut pair, "map 0x40200000 0x2000000 0x200000 rwx page=2m");
        let reserved = 1_u64 << 51;
        let mut broken = vec![((0x4000_0000, 4), 1 << 7), ((0x4020_0000, 2), 1 << 13), ((0x4020_0000, 2), 1 << 20)];
        if has_1g(mmu) {
            step(&mut pair, "map 0x80000000 0 0x40000000 rwx page=1g");
            broken.extend([((0x8200_0000, 3), 1 << 13), ((0x8200_0000, 3), 1 << 29)]);
        } else {
            broken.push(((0x4000_0000, 3), 1 << 7));
        }
        // A processor with all 52 address bits has none to reserve.
        if mmu.machine().driven().format.options().physical_bits < 52 {
            broken.extend([1, 2, 3, 4].map(|level| ((0x4000_0000, level), reserved)));
        }
        for (place, bits) in broken {
            common::misconfigured(mmu, &pair, place, |raw| raw | bits, || flush(mmu));
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
