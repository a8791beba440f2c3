// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of single entries, each test named after the rule it checks.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, FormatError, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect};
use spte_ppc::software::{ABSENT, CLAIMED, DEAD, HARDWARE};
use spte_ppc::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_leaf_says_what_it_was_built_from(format in any_format(), pick in 1_u8..=3, wanted in any_spec()) {
        let level = level(pick);
        let wanted = fitted(&format, level, wanted);
        let leaf = format.leaf(level, &wanted).unwrap();
        prop_assert_eq!(format.spec(level, leaf), wanted);
        prop_assert_eq!(format.check(level, leaf), Ok(()));
        prop_assert_eq!(format.kind(level, leaf), Kind::Leaf);
        prop_assert_eq!(format.hardware_kind(level, leaf), HardwareKind::Leaf);
        prop_assert_eq!(format.leaf(level, &format.spec(level, leaf)), Ok(leaf));
        prop_assert_eq!(format.raw_of(format.memory_of(leaf)), leaf);
        prop_assert_eq!(format.memory_of(leaf).to_ne_bytes(), leaf.to_be_bytes());
    }

    #[test]
    fn what_passes_the_check_says_how_it_is_built(
        format in any_format(), pick in 1_u8..=3, wanted in any_spec(), noise in any::<u64>(), few in any::<u64>(),
    ) {
        let level = level(pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let raw = leaf ^ (noise & few & few.rotate_left(17));
        if format.kind(level, raw) == Kind::Leaf && format.check(level, raw).is_ok() {
            prop_assert_eq!(format.leaf(level, &format.spec(level, raw)), Ok(raw));
        }
    }

    #[test]
    fn every_operation_keeps_what_it_does_not_mean_to_change(
        format in any_format(), pick in 1_u8..=3, wanted in any_spec(),
    ) {
        let level = level(pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let before = format.spec(level, leaf);
        for (name, after) in operations(&format, level, leaf) {
            let spec = format.spec(level, after);
            prop_assert_eq!(format.check(level, after), Ok(()), "{} made {:#x} of {:#x}", name, after, leaf);
            prop_assert_eq!(spec.attrs, before.attrs, "{}", name);
            if name != "set_spte" {
                prop_assert_eq!(spec.output, before.output, "{}", name);
            }
            if !matches!(name, "retain" | "clean" | "set_spte") {
                prop_assert!(spec.dirty || !before.dirty, "{} lost C of {:#x}", name, leaf);
            }
            prop_assert!(spec.accessed || !before.accessed || name == "old", "{} lost R of {:#x}", name, leaf);
            if name != "raise" {
                prop_assert!(before.access.contains(spec.access) || name == "restrict", "{}", name);
            }
            let transition = format.transition(level, leaf, after);
            prop_assert_eq!(transition.break_first, spec.output != before.output, "{}", name);
            let lost = before.dirty && !spec.dirty
                || !spec.access.contains(before.access)
                || (spec.armed && !before.armed && before.access.writable());
            prop_assert!(transition.flush || !lost, "{} of {:#x} owes a flush", name, leaf);
        }
    }

    #[test]
    fn change_is_read_only_not_upgradable_and_keeps_the_rest(
        format in any_format(), pick in 1_u8..=3, wanted in any_spec(), to in any::<u64>(),
    ) {
        let level = level(pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let before = format.spec(level, leaf);
        let span = format.geometry().span(level);
        let bits = format.options().physical_bits;
        let output = OutputAddr::new(to & ((1 << bits) - 1)).align_down(span);
        let changed = format.set_spte(level, leaf, output).unwrap();
        prop_assert_eq!(format.write_state(changed), Some(WriteState::ReadOnly));
        prop_assert_eq!(format.upgrade(level, changed), None);
        prop_assert_eq!(format.touch(level, changed, Access::WRITE), Touch::Denied);
        let expected = LeafSpec { output, access: before.access.read_only(), armed: false, dirty: false, ..before };
        prop_assert_eq!(format.spec(level, changed), expected);
        // In the window that it is for, the leaf is read-only already; it is broken all the same.
        let retained = format.write_protect(level, leaf, WriteProtect::Retain);
        prop_assert_eq!(format.equal_contents_transition(level, retained, changed).break_first, output != before.output);
        let unaligned = OutputAddr::new(span / 2);
        let refused = Err(FormatError::Unaligned { output: unaligned, align: span });
        prop_assert_eq!(format.set_spte(level, leaf, unaligned), refused);
        let wide = OutputAddr::new(1 << bits);
        let refused = Err(FormatError::OutputTooWide { output: wide, bits: bits.into() });
        prop_assert_eq!(format.set_spte(level, leaf, wide), refused);
    }

    #[test]
    fn a_retained_leaf_cannot_be_written_by_anybody(format in any_format(), pick in 1_u8..=3, wanted in any_spec()) {
        let level = level(pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let denied = format.write_protect(level, leaf, WriteProtect::Retain);
        prop_assert_eq!(format.write_state(denied), Some(WriteState::ReadOnly));
        for (name, after) in operations(&format, level, denied) {
            if name != "raise" {
                prop_assert_eq!(format.write_state(after), Some(WriteState::ReadOnly), "{}", name);
            }
        }
        if !wanted.armed {
            prop_assert_eq!(format.upgrade(level, leaf), None, "granted already, or never");
        }
        let armed = format.write_protect(level, leaf, WriteProtect::Arm);
        prop_assert_eq!(format.touch(level, armed, Access::WRITE), Touch::Denied);
        prop_assert_eq!(format.upgrade(level, armed).is_some(), wanted.access.writable());
        if let Some(upgraded) = format.upgrade(level, armed) {
            prop_assert_eq!(format.transition(level, armed, upgraded), Transition::FREE);
            prop_assert!(matches!(format.touch(level, upgraded, Access::WRITE), Touch::Allowed(_)));
            prop_assert_eq!(format.transition(level, armed, denied), Transition::FLUSH);
        }
    }

    #[test]
    fn ageing_clears_referenced_alone_and_owes_no_flush(
        format in any_format(), pick in 1_u8..=3, wanted in any_spec(),
    ) {
        let level = level(pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let old = format.make_old(level, leaf);
        prop_assert_eq!(old, leaf & !0x100);
        prop_assert!(!format.is_young(level, old));
        prop_assert_eq!(format.make_young(level, old), leaf | 0x100);
        prop_assert_eq!(format.transition(level, leaf, old), Transition::FREE);
        prop_assert_eq!(format.transition(level, old, leaf), Transition::FREE);
    }

    #[test]
    fn a_split_says_the_same_and_a_collapse_undoes_it(
        format in any_format(), pick in 2_u8..=3, wanted in any_spec(), index in any::<usize>(),
    ) {
        let level = level(pick);
        let below = level.below().unwrap();
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let before = format.spec(level, leaf);
        let index = index % format.geometry().entries(below);
        let child = format.split(level, leaf, index);
        let output = before.output.as_u64() + index as u64 * format.geometry().span(below);
        prop_assert_eq!(format.spec(below, child), LeafSpec { output: OutputAddr::new(output), ..before });
        prop_assert_eq!(format.check(below, child), Ok(()));
        prop_assert_eq!(format.collapse(level, format.split(level, leaf, 0)), Some(leaf));
        if index > 0 {
            prop_assert_eq!(format.collapse(level, child), None, "not aligned");
        }
    }

    #[test]
    fn touch_sets_referenced_and_changed(format in any_format(), pick in 1_u8..=3, wanted in any_spec()) {
        let level = level(pick);
        let wanted = fitted(&format, level, wanted);
        let leaf = format.leaf(level, &wanted).unwrap();
        for access in [Access::READ, Access::WRITE, Access::EXECUTE] {
            let granted = wanted.access.contains(access) && !(access.writable() && wanted.armed);
            let facts = if access.writable() { 0x180 } else { 0x100 };
            let expected = if granted { Touch::Allowed(leaf | facts) } else { Touch::Denied };
            prop_assert_eq!(format.touch(level, leaf, access), expected);
            prop_assert_eq!(format.transition(level, leaf, leaf | facts), Transition::FREE);
        }
    }

    #[test]
    fn merged_facts_are_those_of_both_and_bring_no_rights(
        format in any_format(), pick in 1_u8..=3, into in any_spec(), from in any_spec(),
    ) {
        let level = level(pick);
        let into = format.leaf(level, &fitted(&format, level, into)).unwrap();
        let from = format.leaf(Level::LEAF, &fitted(&format, Level::LEAF, from)).unwrap();
        let merged = format.merge_facts(level, into, Level::LEAF, from);
        prop_assert_eq!(merged, into | (from & 0x180));
        prop_assert_eq!(format.check(level, merged), Ok(()));
    }

    #[test]
    fn a_link_is_an_address_and_its_size(format in any_format(), to in any::<u64>()) {
        for number in 2..=4 {
            let level = level(number);
            let below = level.below().unwrap();
            let bytes = format.geometry().table_bytes(below) as u64;
            let child = OutputAddr::new(to & ((1 << format.options().physical_bits) - 1)).align_down(bytes);
            let link = format.table(level, child).unwrap();
            prop_assert_eq!(link, 1 << 63 | child.as_u64() | u64::from(format.geometry().level(below).bits));
            prop_assert_eq!(format.kind(level, link), Kind::Table(child));
            prop_assert_eq!(format.check(level, link), Ok(()));
            prop_assert_eq!(format.hardware_kind(level, link), HardwareKind::Table(child));
        }
        prop_assert!(format.table(Level::LEAF, OutputAddr::new(0)).is_err());
        prop_assert!(format.table(level(5), OutputAddr::new(0)).is_err());
    }

    #[test]
    fn only_what_table_makes_is_a_link(format in any_format(), number in 1_u8..=4, raw in any::<u64>(), few in any::<u64>()) {
        // Near a link, so that some are one.
        let level = level(number);
        let raw = (raw & few & few.rotate_left(13) & 0x30ff_ffff_ffff_f0e0) | 1 << 63 | if raw & 1 == 0 { 9 } else { 5 };
        if let Kind::Table(to) = format.kind(level, raw) {
            prop_assert_eq!(format.table(level, to), Ok(raw));
        }
    }
}

#[test]
fn three_values_survive_every_hardware_write() {
    let values = [(ABSENT, Kind::Absent), (CLAIMED, Kind::Claimed), (DEAD, Kind::Dead)];
    for format in both() {
        let expected = NotPresent { absent: ABSENT, claimed: CLAIMED, dead: DEAD };
        assert_eq!(format.not_present(Level::LEAF), expected);
        assert_eq!(format.claim_bit(), 0);
        for raw in [ABSENT, CLAIMED, DEAD, 0xc000_0000_0000_0105] {
            assert_eq!(format.hardware_bits(Level::LEAF, raw), 0x180);
        }
        let table = format.table(level(2), OutputAddr::new(0x5_0000)).unwrap();
        assert_eq!(format.hardware_bits(level(2), table), 0, "bit 8 is an address bit");
        for (value, kind) in values {
            assert_eq!(value & (HARDWARE | 1 << 63), 0);
            for other in values.iter().filter(|other| other.0 != value) {
                assert!((value ^ other.0).count_ones() >= 4, "{value:#x} is near {:#x}", other.0);
            }
            for written in [0, 0x80, 0x100, 0x180] {
                for number in 1..=4 {
                    assert_eq!(format.kind(level(number), value | written), kind);
                    assert_eq!(format.check(level(number), value | written), Ok(()));
                    assert_eq!(format.hardware_kind(level(number), value | written), HardwareKind::NotPresent);
                }
            }
            // No single bit, V included, turns one into another or into a link.
            for bit in 0..64 {
                for number in 1..=4 {
                    let now = format.kind(level(number), value ^ 1 << bit);
                    assert!(now == Kind::Special || now == kind, "bit {bit} makes {now:?} of {value:#x}");
                }
            }
        }
    }
}

/// QEMU's walker leaves them out, and so does all that is made of such a leaf, which somebody else wrote.
#[test]
fn rpn_bits_below_the_size_of_a_leaf_say_nothing() {
    for format in both() {
        for (number, clean) in [(2, 0xc000_0000_8020_0105_u64), (3, 0xc000_0000_8000_0105)] {
            let (level, stray) = (level(number), (format.geometry().span(level(number)) - 1) & !0xfff);
            let raw = clean | stray;
            let output = OutputAddr::new(clean & 0x01ff_ffff_ffff_f000);
            assert_eq!(format.spec(level, raw).output, output);
            assert_eq!(format.transition(level, raw, clean), Transition::FREE);
            for index in [0, 1, 31] {
                assert_eq!(format.split(level, raw, index), format.split(level, clean, index));
            }
            let moved = format.set_spte(level, raw, OutputAddr::new(0x4000_0000)).unwrap();
            assert_eq!(moved, 0xc000_0000_4000_0105, "none of them is ORed in");
        }
    }
}

#[test]
fn an_invalid_entry_is_never_interpreted() {
    let format = radix(BasePage::K64);
    // A leaf and a directory entry with V clear; Linux's temporarily invalid entry.
    for raw in [0x4000_0000_8000_0187, 0x0000_0000_3456_7105, 0x6000_0000_8000_0187, !(1 << 63)] {
        for number in 1..=4 {
            assert_eq!(format.kind(level(number), raw), Kind::Special);
            assert_eq!(format.hardware_kind(level(number), raw), HardwareKind::NotPresent);
        }
    }
}

#[test]
fn what_the_format_cannot_say_is_refused() {
    let format = radix(BasePage::K64);
    let l1 = level(1);
    for access in [Access::WRITE, Access::WRITE | Access::EXECUTE] {
        assert_eq!(format.leaf(l1, &spec(0, access)), Err(FormatError::Access { access }));
        assert_eq!(format.with_access(l1, 0xc000_0000_0000_0104, access), Err(FormatError::Access { access }));
    }
    assert_eq!(format.leaf(level(4), &spec(0, Access::READ)), Err(FormatError::NoLeaf { number: 4 }));
    let unaligned = OutputAddr::new(0x1000);
    assert_eq!(
        format.leaf(l1, &spec(0x1000, Access::READ)),
        Err(FormatError::Unaligned { output: unaligned, align: 0x1_0000 })
    );
    let new = Radix::new(RadixOptions { strong_order: false, ..RadixOptions::default() }).unwrap();
    let ordered = LeafSpec { attrs: RadixAttrs::default().storage(Storage::StrongOrder), ..spec(0, Access::READ) };
    assert!(matches!(new.leaf(l1, &ordered), Err(FormatError::Attribute { value: 1, .. })));
    assert!(format.leaf(l1, &ordered).is_ok());
}

#[test]
fn writing_grants_reading() {
    let format = radix(BasePage::K4);
    let raw = 0xc000_0000_8000_1802;
    assert_eq!(format.spec(level(1), raw).access, Access::READ | Access::WRITE);
    assert!(matches!(format.touch(level(1), raw, Access::READ), Touch::Allowed(_)));
}
