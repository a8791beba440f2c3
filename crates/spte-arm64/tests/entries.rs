// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of single entries, each test named after the rule it checks.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_arm64::software::{ABSENT, CLAIM, CLAIMED, DEAD};
use spte_arm64::*;
use spte_core::format::{Format, FormatError, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect};

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_leaf_says_what_it_was_built_from(format in any_format(), pick in any::<usize>(), wanted in any_spec()) {
        let level = leaf_level(&format, pick);
        let wanted = fitted(&format, level, wanted);
        let leaf = format.leaf(level, &wanted).unwrap();
        prop_assert_eq!(format.spec(level, leaf), wanted);
        prop_assert_eq!(format.check(level, leaf), Ok(()));
        prop_assert_eq!(format.kind(level, leaf), Kind::Leaf);
        prop_assert_eq!(format.hardware_kind(level, leaf), HardwareKind::Leaf);
        // And back: what a leaf says builds it.
        prop_assert_eq!(format.leaf(level, &format.spec(level, leaf)), Ok(leaf));
    }

    #[test]
    fn what_passes_the_check_says_how_it_is_built(
        format in any_format(), pick in any::<usize>(), wanted in any_spec(), noise in any::<u64>(), few in any::<u64>(),
    ) {
        // Bits turned over in a good leaf: where the result is good, it is what its own words build. (Whether a leaf is a
        // member of a set is the engine's to say.)
        let level = leaf_level(&format, pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let raw = (leaf ^ (noise & few & few.rotate_left(17))) & !CLAIM;
        if format.kind(level, raw) == Kind::Leaf && format.check(level, raw).is_ok() {
            prop_assert_eq!(format.leaf(level, &format.spec(level, raw)), Ok(format.unmarked(level, raw)));
        }
    }

    #[test]
    fn every_operation_keeps_what_it_does_not_mean_to_change(
        format in any_format(), pick in any::<usize>(), wanted in any_spec(),
    ) {
        let level = leaf_level(&format, pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let before = format.spec(level, leaf);
        prop_assert_eq!(format.kind(level, leaf | CLAIM), Kind::Leaf);
        prop_assert_eq!(format.spec(level, leaf | CLAIM), before);
        let rights = |(name, _): &(&str, u64)| matches!(*name, "raise" | "restrict");
        prop_assert_eq!(operations(&format, level, leaf).iter().filter(|made| rights(made)).count(), 8, "each can be had");
        for (name, after) in operations(&format, level, leaf) {
            let spec = format.spec(level, after);
            prop_assert_eq!(format.check(level, after), Ok(()), "{} made {:#x} of {:#x}", name, after, leaf);
            prop_assert_eq!(spec.attrs, before.attrs, "{}", name);
            if name != "set_spte" {
                prop_assert_eq!(spec.output, before.output, "{}", name);
            }
            if !clears_dirty(name) {
                prop_assert!(spec.dirty || !before.dirty, "{} lost dirty of {:#x}", name, leaf);
            }
            let transition = format.transition(level, leaf, after);
            prop_assert!(name == "set_spte" || !transition.break_first, "{}", name);
            let lost = before.dirty && !spec.dirty
                || !spec.access.contains(before.access)
                || (spec.armed && !before.armed && before.access.writable());
            prop_assert!(transition.flush || !lost, "{} of {:#x} owes a flush", name, leaf);
            let claimed = operations(&format, level, leaf | CLAIM);
            prop_assert!(claimed.contains(&(name, after | CLAIM)), "{} and the claim", name);
        }
    }

    #[test]
    fn change_is_read_only_not_upgradable_and_keeps_the_rest(
        format in any_format(), pick in any::<usize>(), wanted in any_spec(), to in any::<u64>(),
    ) {
        let level = leaf_level(&format, pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let before = format.spec(level, leaf);
        let span = format.geometry().span(level);
        let output = OutputAddr::new(to & ((1 << format.options().physical_bits) - 1)).align_down(span);
        let changed = format.set_spte(level, leaf, output).unwrap();
        prop_assert_eq!(format.write_state(changed), Some(WriteState::ReadOnly));
        prop_assert_eq!(format.upgrade(level, changed), None);
        prop_assert_eq!(format.touch(level, changed | 1 << 10, Access::WRITE), Touch::Denied);
        let expected = LeafSpec { output, access: before.access.read_only(), armed: false, dirty: false, ..before };
        prop_assert_eq!(format.spec(level, changed), expected);
        // In the window that it is for, the leaf is read-only already: no break.
        let retained = format.write_protect(level, leaf, WriteProtect::Retain);
        prop_assert!(!format.equal_contents_transition(level, retained, changed).break_first);
        prop_assert_eq!(format.equal_contents_transition(level, retained, changed).flush, output != before.output);
        let unaligned = OutputAddr::new(span / 2);
        prop_assert_eq!(
            format.set_spte(level, leaf, unaligned),
            Err(FormatError::Unaligned { output: unaligned, align: span })
        );
        let wide = OutputAddr::new(1 << format.options().physical_bits);
        let refused = format.set_spte(level, leaf, wide);
        prop_assert_eq!(
            refused,
            Err(FormatError::OutputTooWide { output: wide, bits: format.options().physical_bits.into() })
        );
    }

    #[test]
    fn a_retained_leaf_cannot_be_written_by_anybody(
        format in any_format(), pick in any::<usize>(), wanted in any_spec(),
    ) {
        let level = leaf_level(&format, pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let denied = format.write_protect(level, leaf, WriteProtect::Retain);
        prop_assert_eq!(format.write_state(denied), Some(WriteState::ReadOnly));
        prop_assert_eq!(denied & (1 << 51 | 1 << 7), 0, "hardware would write with DBM");
        for (name, after) in operations(&format, level, denied) {
            if name != "raise" {
                prop_assert_eq!(format.write_state(after), Some(WriteState::ReadOnly), "{}", name);
            }
        }
        let armed = format.write_protect(level, leaf, WriteProtect::Arm);
        prop_assert_eq!(armed & (1 << 51 | 1 << 7), 0, "hardware would write with DBM");
        prop_assert_eq!(format.upgrade(level, armed).is_some(), wanted.access.writable());
        if let Some(upgraded) = format.upgrade(level, armed) {
            prop_assert_eq!(format.transition(level, armed, upgraded), Transition::FREE);
            prop_assert!(matches!(format.touch(level, upgraded | 1 << 10, Access::WRITE), Touch::Allowed(_)));
            prop_assert_eq!(format.transition(level, armed, denied), Transition::FLUSH);
        }
    }

    #[test]
    fn ageing_clears_the_access_flag_alone_and_owes_no_flush(
        format in any_format(), pick in any::<usize>(), wanted in any_spec(),
    ) {
        let level = leaf_level(&format, pick);
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let old = format.make_old(level, leaf);
        prop_assert_eq!(old, leaf & !(1 << 10));
        prop_assert!(!format.is_young(level, old));
        prop_assert_eq!(format.make_young(level, old), leaf | 1 << 10);
        prop_assert_eq!(format.transition(level, leaf, old), Transition::FREE);
        prop_assert_eq!(format.transition(level, old, leaf), Transition::FREE);
    }

    #[test]
    fn a_split_says_the_same_and_a_device_stays_one(
        format in any_format(), pick in any::<usize>(), wanted in any_spec(), index in any::<usize>(),
    ) {
        let level = leaf_level(&format, pick);
        let Some(below) = level.below() else { return Ok(()) };
        let leaf = format.leaf(level, &fitted(&format, level, wanted)).unwrap();
        let before = format.spec(level, leaf);
        let index = index % format.geometry().entries(below);
        let child = format.split(level, leaf, index);
        let output = before.output.as_u64() + index as u64 * format.geometry().span(below);
        prop_assert_eq!(format.spec(below, child), LeafSpec { output: OutputAddr::new(output), ..before });
        prop_assert_eq!(format.check(below, child), Ok(()));
        prop_assert_eq!(format.collapse(level, format.split(level, leaf, 0)), Some(leaf), "collapse undoes split");
        if index > 0 {
            prop_assert_eq!(format.collapse(level, child), None, "not aligned");
        }
    }

    #[test]
    fn touch_does_what_hardware_does(format in any_format(), pick in any::<usize>(), wanted in any_spec()) {
        let level = leaf_level(&format, pick);
        let wanted = fitted(&format, level, wanted);
        let leaf = format.leaf(level, &wanted).unwrap();
        let options = format.options().accessed_dirty;
        for access in [Access::READ, Access::WRITE, Access::EXECUTE] {
            let granted = wanted.access.contains(access) && !(access.writable() && wanted.armed);
            match format.touch(level, leaf, access) {
                Touch::AccessFlag => prop_assert!(!wanted.accessed && !options.sets_accessed()),
                Touch::Denied => prop_assert!(!granted && (wanted.accessed || options.sets_accessed())),
                Touch::Allowed(after) => {
                    prop_assert!(granted);
                    prop_assert!(format.is_young(level, after));
                    prop_assert!(!access.writable() || format.is_dirty(level, after));
                    let hardware = format.hardware_bits(level, leaf);
                    prop_assert_eq!(after & !hardware, leaf & !hardware, "hardware writes nothing else");
                    prop_assert_eq!(format.transition(level, leaf, after), Transition::FREE);
                    prop_assert_eq!(format.check(level, after), Ok(()));
                }
            }
        }
    }

    #[test]
    fn merged_facts_are_those_of_both_and_bring_no_rights(
        format in any_format(), pick in any::<usize>(), into in any_spec(), from in any_spec(),
    ) {
        let level = leaf_level(&format, pick);
        let into = format.leaf(level, &fitted(&format, level, into)).unwrap();
        let from = format.leaf(L3, &fitted(&format, L3, from)).unwrap();
        let merged = format.merge_facts(level, into, L3, from);
        prop_assert_eq!(format.is_young(level, merged), format.is_young(level, into) || format.is_young(L3, from));
        prop_assert_eq!(format.is_dirty(level, merged), format.is_dirty(level, into) || format.is_dirty(L3, from));
        prop_assert_eq!(format.spec(level, merged).access, format.spec(level, into).access);
        prop_assert_eq!(format.spec(level, merged).armed, format.spec(level, into).armed);
        prop_assert_eq!(format.check(level, merged), Ok(()));
    }

    #[test]
    fn a_link_is_an_address_and_two_bits(format in any_format(), to in any::<u64>()) {
        let granule = format.options().granule.bytes();
        let child = OutputAddr::new(to & ((1 << format.options().physical_bits) - 1)).align_down(granule);
        for level in (2..=5).filter_map(Level::new) {
            let link = format.table(level, child);
            if level > format.geometry().top() {
                prop_assert!(link.is_err());
                continue;
            }
            let link = link.unwrap();
            prop_assert_eq!(format.kind(level, link), Kind::Table(child));
            prop_assert_eq!(format.kind(level, link | CLAIM), Kind::Table(child));
            prop_assert_eq!(format.check(level, link), Ok(()));
            prop_assert_eq!(format.hardware_kind(level, link), HardwareKind::Table(child));
        }
        prop_assert!(format.table(L3, child).is_err());
    }

    #[test]
    fn an_owner_comes_back_from_its_entry(owner in any::<u32>(), format in any_format(), pick in any::<usize>()) {
        let raw = Owner(owner).to_raw();
        let level = leaf_level(&format, pick);
        prop_assert_eq!(Owner::from_raw(raw), Some(Owner(owner)));
        prop_assert_eq!(format.kind(level, raw), Kind::Special);
        prop_assert_eq!(format.check(level, raw), Ok(()));
        prop_assert_eq!(format.hardware_kind(level, raw), HardwareKind::NotPresent);
        prop_assert_eq!(format.transition(level, raw, 0), Transition::FREE);
    }
}

/// Every subset of `bits`.
fn subsets(bits: u64) -> Vec<u64> {
    let mut all = vec![0];
    let mut subset = bits;
    while subset != 0 {
        all.push(subset);
        subset = (subset - 1) & bits;
    }
    all
}

#[test]
fn three_values_survive_every_hardware_write() {
    let values = [(ABSENT, Kind::Absent), (CLAIMED, Kind::Claimed), (DEAD, Kind::Dead)];
    for accessed_dirty in [AccessedDirty::Software, AccessedDirty::HardwareAccessed, AccessedDirty::Hardware] {
        let format = stage2(Stage2Options { accessed_dirty, ..Stage2Options::default() });
        let expected = NotPresent { absent: ABSENT, claimed: CLAIMED, dead: DEAD };
        assert_eq!(format.not_present(Level::LEAF), expected);
        for (value, kind) in values {
            let facts = format.hardware_bits(Level::LEAF, value);
            for other in values.iter().filter(|other| other.0 != value) {
                let apart = (value ^ other.0) & !facts & !format.claim_bit();
                assert!(apart.count_ones() >= 4, "{value:#x} is near {:#x}", other.0);
            }
            assert_eq!(value & (facts | format.claim_bit() | 1), 0);
            for written in subsets(facts) {
                for number in 0..=3 {
                    assert_eq!(format.kind(level(number), value | written), kind);
                    assert_eq!(format.check(level(number), value | written), Ok(()));
                }
            }
            // No single bit, the claim's included, turns one into another.
            for bit in 0..64 {
                let now = format.kind(L3, value ^ (1 << bit));
                assert!(now == Kind::Special || now == Kind::Leaf || now == kind, "bit {bit} makes {now:?}");
            }
        }
    }
}

#[test]
fn an_invalid_entry_is_never_interpreted() {
    let format = stage2(Stage2Options::default());
    // A page, a table and a block with bit 0 clear.
    for raw in [0x8000_17fe, 0x8000_0002, 0x0040_0000_0900_07c4, 0xffff_ffff_ffff_fffe] {
        for number in 1..=3 {
            assert_eq!(format.kind(level(number), raw), Kind::Special);
            assert_eq!(format.hardware_kind(level(number), raw), HardwareKind::NotPresent);
        }
    }
    // Linux's own annotations: an owner in 9:2, the lock of break-before-make in 63:60.
    assert_eq!(format.kind(L3, 1 << 2), Kind::Special);
    assert_eq!(format.kind(L3, 1 << 60), Kind::Special);
    assert_eq!(Owner::from_raw(1 << 60), None);
}

#[test]
fn three_at_the_last_level_is_a_page() {
    for granule in [Granule::K4, Granule::K16, Granule::K64] {
        let format = stage2(of(granule));
        let raw = 0x8001_0003 | 0x7fc;
        assert_eq!(format.kind(L3, raw), Kind::Leaf, "never followed");
        assert_eq!(format.kind(level(2), raw & !0x7fc), Kind::Table(OutputAddr::new(0x8001_0000)));
        assert_eq!(format.kind(L3, 0x8001_07fd), Kind::Special, "reserved at level 3");
    }
}

#[test]
fn a_page_split_from_a_device_block_is_a_device() {
    let format = stage2(Stage2Options::default());
    // 2M at 0x0900_0000, read-write, execute-never, Device-nGnRE; upgradable.
    let block = 0x0140_0000_0900_07c5;
    assert_eq!(format.split(level(2), block, 0), 0x0140_0000_0900_07c7);
    assert_eq!(format.split(level(2), block, 1), 0x0140_0000_0900_17c7);
    assert_eq!(format.split(level(2), block, 511), 0x0140_0000_091f_f7c7);
    assert_eq!(format.spec(L3, 0x0140_0000_0900_17c7).attrs.memory, MemoryType::DEVICE);
}

#[test]
fn where_a_page_executes_is_remembered_while_it_does_not() {
    let format = stage2(Stage2Options { xnx: true, ..Stage2Options::default() });
    let attrs = Stage2Attrs { execute: ExecuteAt::El1, ..Stage2Attrs::default() };
    let leaf = format.leaf(L3, &LeafSpec { attrs, ..spec(0x1000, Access::RX) }).unwrap();
    assert_eq!(leaf >> 53 & 3, 3);
    let without = format.with_access(L3, leaf, Access::READ).unwrap();
    assert_eq!(without >> 53 & 3, 2);
    assert_eq!(format.with_access(L3, without, Access::RX), Ok(leaf));
    // Losing one of two levels is losing a right.
    let both = format.leaf(L3, &spec(0x1000, Access::RX)).unwrap();
    assert_eq!(format.transition(L3, both, leaf), Transition::FLUSH);
    assert_eq!(format.transition(L3, leaf, both), Transition::FREE);
}

#[test]
fn what_the_format_cannot_say_is_refused() {
    let plain = stage2(Stage2Options::default());
    let fwb = stage2(Stage2Options { fwb: true, ..Stage2Options::default() });
    let lpa2 = stage2(Stage2Options { lpa2: true, ..Stage2Options::default() });
    let with = |attrs| LeafSpec { attrs, ..spec(0, Access::READ) };
    let memory = |memory| with(Stage2Attrs::default().memory(memory));
    let attribute = |result: Result<u64, FormatError>| matches!(result, Err(FormatError::Attribute { .. }));
    assert!(attribute(plain.leaf(L3, &memory(MemoryType::Stage1))));
    assert!(attribute(fwb.leaf(L3, &memory(MemoryType::WRITE_THROUGH))));
    let outer = Stage2Attrs { shareability: Shareability::Outer, ..Stage2Attrs::default() };
    assert!(plain.leaf(L3, &with(outer)).is_ok());
    assert!(attribute(lpa2.leaf(L3, &with(outer))));
    let el0 = Stage2Attrs { execute: ExecuteAt::El0, ..Stage2Attrs::default() };
    assert!(attribute(plain.leaf(L3, &with(el0))));
    let wide = OutputAddr::new(1 << 48);
    let leaf = LeafSpec { output: wide, ..spec(0, Access::READ) };
    assert_eq!(plain.leaf(L3, &leaf), Err(FormatError::OutputTooWide { output: wide, bits: 48 }));
    assert_eq!(plain.leaf(level(0), &spec(0, Access::READ)), Err(FormatError::NoLeaf { number: 0 }));
    let none = stage2(Stage2Options { ipa_bits: 48, ..Stage2Options::default() });
    assert_eq!(none.leaf(level(0), &spec(0, Access::READ)), Err(FormatError::NoLeaf { number: 0 }));
}
