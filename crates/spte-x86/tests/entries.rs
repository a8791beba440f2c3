// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of single entries, each test named after the rule it checks.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, FormatError, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect};
use spte_x86::software::{CLAIM, MMU_PRESENT};
use spte_x86::*;

/// The rules that hold for a leaf of any format, and for what any operation makes of it.
fn leaf_rules<F: X86>(format: &F, level: Level, leaf: u64) -> Result<(), TestCaseError> {
    let before = format.spec(level, leaf);
    // Claiming a leaf changes nothing of what it says.
    prop_assert_eq!(format.kind(level, leaf | CLAIM), Kind::Leaf);
    prop_assert_eq!(format.spec(level, leaf | CLAIM), before);
    for (name, after) in operations(format, level, leaf) {
        let spec = format.spec(level, after);
        prop_assert_eq!(format.check(level, after), Ok(()), "{} made {:#x} of {:#x}", name, after, leaf);
        prop_assert_eq!(format.kind(level, after), Kind::Leaf, "{}", name);
        prop_assert!(after & MMU_PRESENT != 0, "{}", name);
        prop_assert!(format.state(after).is_some(), "{}", name);
        prop_assert_eq!(spec.attrs, before.attrs, "{}", name);
        if name != "set_spte" {
            prop_assert_eq!(spec.output, before.output, "{}", name);
        }
        if !clears_dirty(name) {
            prop_assert!(spec.dirty || !before.dirty, "{} lost dirty of {:#x}", name, leaf);
        }
        let transition = format.transition(level, leaf, after);
        prop_assert!(!transition.break_first);
        let lost = before.dirty && !spec.dirty
            || format.upgrade(level, leaf).is_some()
                && format.upgrade(level, after).is_none()
                && name != "upgrade"
                && name != "rwx"
            || name == "set_spte" && spec.output != before.output
            || !(spec.access.contains(before.access));
        prop_assert!(transition.flush || !lost, "{} of {:#x} owes a flush", name, leaf);
        // An operation on a claimed leaf is the same operation, and the claim stays.
        let claimed: Vec<_> = operations(format, level, leaf | CLAIM);
        prop_assert!(claimed.contains(&(name, after | CLAIM)), "{} and the claim", name);
    }
    Ok(())
}

fn change_rules<F: X86>(format: &F, level: Level, leaf: u64) -> Result<(), TestCaseError> {
    let before = format.spec(level, leaf);
    let output = OutputAddr::new(0x25_c000_0000).align_down(format.geometry().span(level));
    let changed = format.set_spte(level, leaf, output).unwrap();
    let after = format.spec(level, changed);
    prop_assert_eq!(format.state(changed), Some(WriteState::ReadOnly));
    prop_assert_eq!(format.upgrade(level, changed), None);
    prop_assert_eq!(format.touch(level, changed, Access::WRITE), Touch::Denied);
    let expected = LeafSpec { output, access: before.access.read_only(), armed: false, dirty: false, ..before };
    prop_assert_eq!(after, expected);
    prop_assert_eq!(format.equal_contents_transition(level, leaf, changed).break_first, false);
    prop_assert!(format.equal_contents_transition(level, leaf, changed).flush || output == before.output);
    let span = format.geometry().span(level);
    let unaligned = OutputAddr::new(span / 2);
    prop_assert_eq!(
        format.set_spte(level, leaf, unaligned),
        Err(FormatError::Unaligned { output: unaligned, align: span })
    );
    prop_assert!(
        matches!(format.set_spte(level, leaf, OutputAddr::new(1 << 52)), Err(FormatError::OutputTooWide { .. })),
        "wide outputs are refused"
    );
    Ok(())
}

fn host_writable_rules<F: X86>(format: &F, level: Level, leaf: u64) -> Result<(), TestCaseError> {
    let denied = format.write_protect(level, leaf, WriteProtect::Retain);
    prop_assert_eq!(format.state(denied), Some(WriteState::ReadOnly));
    for (name, after) in operations(format, level, denied) {
        if name != "rwx" {
            prop_assert_eq!(format.state(after), Some(WriteState::ReadOnly), "{}", name);
        }
    }
    let tracked = format.write_tracked(leaf);
    for (name, after) in operations(format, level, tracked) {
        if name != "rwx" {
            let writable = matches!(format.state(after), Some(WriteState::Writable | WriteState::Armed));
            prop_assert!(!writable, "{}", name);
        }
    }
    Ok(())
}

fn ageing_rules<F: X86>(format: &F, level: Level, leaf: u64) -> Result<(), TestCaseError> {
    let before = format.spec(level, leaf);
    let old = format.make_old(level, leaf);
    let spec = format.spec(level, old);
    prop_assert!(!format.is_young(level, old));
    // A writable leaf may become an armed one: that it may be written stays.
    let armed = spec.armed;
    prop_assert!(armed || armed == before.armed);
    prop_assert_eq!(spec, LeafSpec { accessed: false, armed, ..before });
    prop_assert_eq!(format.transition(level, leaf, old), Transition::FREE);
    prop_assert_eq!(format.make_old(level, old), old);
    prop_assert!(format.is_young(level, format.make_young(level, old)));
    prop_assert_eq!(format.kind(level, old), Kind::Leaf);
    Ok(())
}

fn split_rules<F: X86>(format: &F, level: Level, leaf: u64, index: usize) -> Result<(), TestCaseError> {
    let Some(below) = level.below() else {
        return Ok(());
    };
    let before = format.spec(level, leaf);
    let child = format.split(level, leaf, index);
    let after = format.spec(below, child);
    let offset = index as u64 * format.geometry().span(below);
    prop_assert_eq!(after.output.as_u64(), before.output.as_u64() + offset);
    prop_assert!(after.access.contains(before.access));
    prop_assert_eq!(after.access.difference(before.access).difference(Access::EXECUTE), Access::empty());
    prop_assert_eq!(LeafSpec { output: before.output, access: before.access, ..after }, before, "facts and attributes");
    prop_assert_eq!(format.check(below, child), Ok(()));
    prop_assert_eq!(format.kind(below, child), Kind::Leaf);
    prop_assert_eq!(format.collapse(level, format.split(level, leaf, 0)), Some(leaf), "collapse undoes split");
    if index > 0 {
        prop_assert_eq!(format.collapse(level, child), None, "not aligned");
    }
    Ok(())
}

fn retained_rules<F: X86>(format: &F, level: Level, leaf: u64) -> Result<(), TestCaseError> {
    let was = format.state(leaf).unwrap();
    let upgradable = matches!(was, WriteState::Writable | WriteState::Armed);
    let denied = format.write_protect(level, leaf, WriteProtect::Retain);
    let tracked = format.write_tracked(leaf);
    if upgradable {
        prop_assert_eq!(format.transition(level, leaf, denied), Transition::FLUSH);
        prop_assert_eq!(format.transition(level, leaf, tracked), Transition::FLUSH);
    }
    prop_assert_eq!(format.upgrade(level, denied), None);
    prop_assert_eq!(format.upgrade(level, tracked), None);
    let armed = format.write_protect(level, leaf, WriteProtect::Arm);
    prop_assert_eq!(format.upgrade(level, armed).is_some(), upgradable);
    if let Some(upgraded) = format.upgrade(level, armed) {
        prop_assert_eq!(format.state(upgraded), Some(WriteState::Writable));
        prop_assert_eq!(format.transition(level, armed, upgraded), Transition::FREE);
        prop_assert!(matches!(format.touch(level, upgraded, Access::WRITE), Touch::Allowed(_)));
    }
    Ok(())
}

fn touch_rules<F: X86>(format: &F, level: Level, leaf: u64) -> Result<(), TestCaseError> {
    let before = format.spec(level, leaf);
    for access in [Access::READ, Access::WRITE, Access::EXECUTE] {
        match format.touch(level, leaf, access) {
            Touch::Allowed(after) => {
                prop_assert!(before.access.contains(access) && !(access.writable() && before.armed));
                prop_assert!(format.is_young(level, after));
                prop_assert!(!access.writable() || format.is_dirty(level, after));
                let hardware = format.hardware_bits(level, leaf);
                prop_assert_eq!(after & !hardware, leaf & !hardware, "hardware writes nothing else");
            }
            Touch::AccessFlag => {
                prop_assert!(!before.accessed);
                let young = format.make_young(level, leaf);
                prop_assert!(matches!(format.touch(level, young, access), Touch::Allowed(_)));
            }
            Touch::Denied => prop_assert!(!before.access.contains(access) || before.armed),
        }
    }
    Ok(())
}

macro_rules! rules_of_any_leaf {
    ($($test:ident: $rules:ident($($extra:ident in $values:expr),*);)*) => {
        proptest! {
            $(
                #[test]
                fn $test(
                    ept in any_ept(),
                    npt in any_long_mode::<Nested>(),
                    long_mode in any_long_mode::<Native>(),
                    level in any_level(),
                    ept_spec in any_spec(any_ept_attrs()),
                    spec in any_spec(any_long_mode_attrs()),
                    $($extra in $values),*
                ) {
                    if let Ok(leaf) = ept.leaf(level, &aligned(&ept, level, ept_spec)) {
                        $rules(&ept, level, leaf $(, $extra)*)?;
                    }
                    let fitting = LeafSpec { attrs: fit(&npt, spec.attrs), ..spec };
                    if let Ok(leaf) = npt.leaf(level, &aligned(&npt, level, fitting)) {
                        $rules(&npt, level, leaf $(, $extra)*)?;
                    }
                    let fitting = LeafSpec { attrs: fit(&long_mode, spec.attrs), ..spec };
                    if let Ok(leaf) = long_mode.leaf(level, &aligned(&long_mode, level, fitting)) {
                        $rules(&long_mode, level, leaf $(, $extra)*)?;
                    }
                }
            )*
        }
    };
}

rules_of_any_leaf! {
    only_four_write_states_exist: leaf_rules();
    dirty_is_not_lost: leaf_rules();
    built_entries_pass_the_check: leaf_rules();
    change_is_read_only_and_not_upgradable: change_rules();
    host_writable_never_comes_back_by_itself: host_writable_rules();
    ageing_keeps_output_rights_and_dirty: ageing_rules();
    split_translates_the_same: split_rules(index in 0_usize..512);
    clearing_mmu_writable_owes_a_flush: retained_rules();
    touch_does_what_hardware_does: touch_rules();
}

proptest! {
    #[test]
    fn ept_leaf_says_what_it_was_built_from(
        ept in any_ept(), level in any_level(), wanted in any_spec(any_ept_attrs()),
    ) {
        let wanted = aligned(&ept, level, wanted);
        let options = ept.options();
        let nx = options.nx_huge_pages && level > L1;
        let execute_only = options.execute_only && !options.mode_based_execute && !nx;
        let expressible = wanted.access.contains(Access::READ) || (wanted.access == Access::EXECUTE && execute_only);
        match ept.leaf(level, &wanted) {
            Err(why) => {
                prop_assert!(!expressible);
                prop_assert_eq!(why, FormatError::Access { access: wanted.access });
            }
            Ok(leaf) => {
                prop_assert!(expressible);
                let mut expected = wanted;
                if nx {
                    expected.access.remove(Access::EXECUTE);
                }
                // Without an accessed bit an old leaf has no W, and without a dirty bit a writable one is dirty.
                let ad = options.accessed_dirty;
                if ad == AccessedDirty::Disabled && !wanted.accessed && wanted.access.writable() {
                    expected.dirty |= !wanted.armed;
                    expected.armed = true;
                }
                if ad != AccessedDirty::Enabled && wanted.access.writable() && !wanted.armed {
                    expected.dirty = true;
                }
                prop_assert_eq!(ept.spec(level, leaf), expected);
                prop_assert_eq!(ept.check(level, leaf), Ok(()));
            }
        }
    }

    #[test]
    fn long_mode_leaf_says_what_it_was_built_from(
        format in any_long_mode::<Native>(), level in any_level(), wanted in any_spec(any_long_mode_attrs()),
    ) {
        let wanted = aligned(&format, level, LeafSpec { attrs: fit(&format, wanted.attrs), ..wanted });
        let expressible = wanted.access.contains(Access::READ)
            && (format.options().no_execute || wanted.access.contains(Access::EXECUTE));
        match format.leaf(level, &wanted) {
            Err(why) => {
                prop_assert!(!expressible);
                prop_assert_eq!(why, FormatError::Access { access: wanted.access });
            }
            Ok(leaf) => {
                prop_assert!(expressible);
                let mut expected = wanted;
                if format.options().nx_huge_pages && level > L1 {
                    expected.access.remove(Access::EXECUTE);
                }
                prop_assert_eq!(format.spec(level, leaf), expected);
                prop_assert_eq!(format.check(level, leaf), Ok(()));
            }
        }
    }

    #[test]
    fn tracking_is_the_identity_minus_write(wanted in any_spec(any_ept_attrs()), level in any_level()) {
        let ept = ept(AccessedDirty::Disabled);
        let wanted = aligned(&ept, level, LeafSpec { accessed: true, ..wanted });
        if let Ok(leaf) = ept.leaf(level, &wanted) {
            let tracked = ept.make_old(level, leaf);
            prop_assert!(ept.is_tracked(tracked));
            prop_assert_eq!(tracked & 7, 0, "not present to hardware");
            let fact = if leaf & 2 != 0 { 1 << 59 } else { 0 };
            prop_assert_eq!(ept.make_young(level, tracked), (leaf & !2) | fact);
            // W returns only by a write fault, and with it the leaf as it was.
            if leaf & 2 != 0 {
                prop_assert_eq!(ept.touch(level, tracked, Access::WRITE), Touch::Denied);
                prop_assert_eq!(ept.upgrade(level, tracked), Some(leaf));
            }
        }
    }

    #[test]
    fn tracking_twice_is_tracking_once(wanted in any_spec(any_ept_attrs())) {
        let ept = ept(AccessedDirty::Disabled);
        if let Ok(leaf) = ept.leaf(L1, &aligned(&ept, L1, wanted)) {
            let once = ept.make_old(L1, leaf);
            prop_assert_eq!(ept.make_old(L1, once), once);
            let back = ept.make_young(L1, once);
            prop_assert_eq!(ept.make_young(L1, back), back);
        }
    }

    #[test]
    fn merged_facts_are_those_of_both(
        ept in any_ept(), into in any_spec(any_ept_attrs()), from in any_spec(any_ept_attrs()),
    ) {
        let leaves = (ept.leaf(L1, &aligned(&ept, L1, into)), ept.leaf(L1, &aligned(&ept, L1, from)));
        if let (Ok(into), Ok(from)) = leaves {
            let merged = ept.merge_facts(L1, into, L1, from);
            prop_assert_eq!(ept.is_young(L1, merged), ept.is_young(L1, into) || ept.is_young(L1, from));
            prop_assert_eq!(ept.is_dirty(L1, merged), ept.is_dirty(L1, into) || ept.is_dirty(L1, from));
            prop_assert_eq!(ept.spec(L1, merged).access, ept.spec(L1, into).access);
            prop_assert_eq!(ept.write_state(merged), ept.write_state(into), "no rights with facts");
            prop_assert_eq!(ept.check(L1, merged), Ok(()));
        }
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

fn three_values<F: X86>(format: &F) {
    let NotPresent { absent, claimed, dead } = format.not_present(Level::LEAF);
    let values = [(absent, Kind::Absent), (claimed, Kind::Claimed), (dead, Kind::Dead)];
    for (value, kind) in values {
        let facts = format.hardware_bits(Level::LEAF, value);
        for other in values.iter().filter(|other| other.0 != value) {
            let apart = (value ^ other.0) & !facts & !format.claim_bit();
            assert!(apart.count_ones() >= 4, "{value:#x} is near {:#x}", other.0);
        }
        // All that hardware and ageing may write in either format, and bit 10, which is a right with mode-based
        // execute.
        for written in subsets(facts) {
            for n in 1..=5 {
                for raw in [value | written, (value & !facts) | written] {
                    assert_eq!(format.kind(level(n), raw), kind, "{raw:#x}");
                    assert_eq!(format.hardware(level(n), raw), HardwareKind::NotPresent);
                    assert_eq!(format.check(level(n), raw), Ok(()));
                    assert_eq!(raw & (MMU_PRESENT | 0x000f_ffff_ffff_f407), 0, "no right, no address");
                    assert_eq!(raw >> 63, 1, "no #VE");
                }
            }
        }
        assert_eq!(value & format.claim_bit(), 0);
    }
    // A stray claim bit, or any single bit but the claim's, turns none into another.
    for bit in 0..64 {
        for (value, kind) in values {
            let now = format.kind(L1, value ^ (1 << bit));
            let harmless = matches!(now, Kind::Special | Kind::Leaf | Kind::Table(_)) || now == kind;
            assert!(harmless, "bit {bit} makes {now:?} of {kind:?}");
        }
    }
}

#[test]
fn three_values_survive_every_hardware_write() {
    for accessed_dirty in [AccessedDirty::Enabled, AccessedDirty::Disabled, AccessedDirty::WriteProtectOnly] {
        for mode_based_execute in [false, true] {
            let options = EptOptions { accessed_dirty, mode_based_execute, ..EptOptions::default() };
            three_values(&Ept::new(options).unwrap());
        }
    }
    for levels in [Levels::Four, Levels::Five] {
        for physical_bits in [48, 52] {
            let options = LongModeOptions { levels, physical_bits, ..LongModeOptions::default() };
            three_values(&Npt::new(options).unwrap());
            three_values(&LongMode::new(options).unwrap());
        }
    }
}

#[test]
fn mmu_present_iff_backed() {
    let ept = ept(AccessedDirty::Enabled);
    let npt = Npt::new(LongModeOptions { physical_bits: 48, ..LongModeOptions::default() }).unwrap();
    let child = OutputAddr::new(0x7000);
    for n in 2..=4 {
        assert_eq!(ept.kind(level(n), ept.table(level(n), child).unwrap()), Kind::Table(child));
        assert_eq!(npt.kind(level(n), npt.table(level(n), child).unwrap()), Kind::Table(child));
    }
    // Present to hardware, but nobody here wrote it.
    assert_eq!(ept.kind(L1, 0x7037), Kind::Special);
    assert_eq!(ept.hardware_kind(L1, 0x7037), HardwareKind::Leaf);
    assert_eq!(ept.hardware_kind(level(2), 0x7007), HardwareKind::Table(child));
    assert!(ept.check(L1, 0x7037).is_err());
    assert_eq!(npt.kind(L1, 0x7027), Kind::Special);
    assert_eq!(npt.hardware_kind(level(3), 0x7027), HardwareKind::Table(child));
    assert!(npt.check(L1, 0x7027).is_err());
    // Zeroed pages are empty tables.
    assert_eq!((ept.kind(L1, 0), npt.kind(level(4), 0)), (Kind::Absent, Kind::Absent));
    // A bit 7 that no leaf can have is never followed.
    assert_eq!(ept.kind(level(4), ept.table(level(4), child).unwrap() | 0x80), Kind::Special);
}

#[test]
fn pat_bit_moves_between_7_and_12() {
    let format = LongMode::new(LongModeOptions { physical_bits: 48, ..LongModeOptions::default() }).unwrap();
    // Selector 5 = PAT and PWT; P, R/W, U/S, A, D, PS, host- and MMU-writable, MMU-present.
    let huge = 0x0000_0000_4020_1eef;
    assert_eq!(format.spec(level(2), huge).attrs.selector.get(), 5);
    assert_eq!(format.spec(level(2), huge).output, OutputAddr::new(0x4020_0000));
    assert_eq!(format.split(level(2), huge, 0), 0x4020_0eef);
    // The second page: bit 12 is now its address.
    assert_eq!(format.split(level(2), huge, 1), 0x4020_1eef);
    assert_eq!(format.split(level(2), huge, 511), 0x403f_feef);
    assert_eq!(format.collapse(level(2), 0x4020_0eef), Some(huge));
    // Without PAT, bit 7 must not survive at 4K, where it would select another type.
    assert_eq!(format.split(level(2), huge & !0x1000, 1), 0x4020_1e6f);
    assert_eq!(format.collapse(level(2), 0x4020_0e6f), Some(0x4020_0eef));
    // From 1G to 2M it stays where it is.
    assert_eq!(format.split(level(3), 0x4000_1eef, 3), 0x4060_1eef);
    assert_eq!(format.collapse(level(3), 0x4000_1eef), Some(0x4000_1eef));
    // A change of address leaves it alone.
    assert_eq!(format.set_spte(level(2), huge, OutputAddr::new(0x60_0000)), Ok(0x0060_18ad));
    // EPT has no such bit.
    assert_eq!(ept(AccessedDirty::Enabled).split(level(2), 0x8600_0000_1020_0bf5, 1), 0x8600_0000_1020_1b75);
}

#[test]
fn no_executable_huge_leaf_under_the_mitigation() {
    let ept = Ept::new(EptOptions { nx_huge_pages: true, ..EptOptions::default() }).unwrap();
    let npt = Npt::new(LongModeOptions { nx_huge_pages: true, ..LongModeOptions::default() }).unwrap();
    let one_g = ept.leaf(level(3), &spec(0, Access::RWX)).unwrap();
    // X clear, bit 62 remembers.
    assert_eq!(one_g, 0xc600_0000_0000_0bf3);
    assert_eq!(ept.touch(level(3), one_g, Access::EXECUTE), Touch::Denied);
    let two_m = ept.split(level(3), one_g, 0);
    assert_eq!(two_m, 0xc600_0000_0000_0bf3);
    assert_eq!(ept.split(level(2), two_m, 1), 0x8600_0000_0000_1b77);
    assert_eq!(ept.collapse(level(2), 0x8600_0000_0000_0b77), Some(two_m));
    // What was never executable does not become so.
    let data = ept.leaf(level(2), &spec(0, Access::RW)).unwrap();
    assert_eq!(ept.split(level(2), data, 0), 0x8600_0000_0000_0b73);
    assert_eq!(ept.with_access(level(2), two_m, Access::RW), Ok(data));
    assert_eq!(ept.leaf(level(2), &spec(0, Access::EXECUTE)), Err(FormatError::Access { access: Access::EXECUTE }));
    let execute_only = ept.leaf(L1, &LeafSpec { dirty: false, ..spec(0, Access::EXECUTE) }).unwrap();
    assert_eq!(ept.collapse(level(2), execute_only), None);

    let two_m = npt.leaf(level(2), &spec(0, Access::RWX)).unwrap();
    assert_eq!(two_m, 0x8040_0000_0000_0ee7);
    assert_eq!(npt.split(level(2), two_m, 1), 0x1e67);
    assert_eq!(npt.collapse(level(2), 0x0e67), Some(two_m));
}

#[test]
fn mode_based_execute_moves_both_bits() {
    let options =
        EptOptions { mode_based_execute: true, accessed_dirty: AccessedDirty::Disabled, ..EptOptions::default() };
    let ept = Ept::new(options).unwrap();
    let leaf = ept.leaf(L1, &LeafSpec { dirty: false, ..spec(0x7000, Access::RX) }).unwrap();
    assert_eq!(leaf, 0x8010_0000_0000_7c75);
    assert_eq!(ept.make_old(L1, leaf), 0x8150_0000_0000_7870);
    assert_eq!(ept.make_young(L1, 0x8150_0000_0000_7870), leaf);
    assert_eq!(ept.table(level(2), OutputAddr::new(0)), Ok(0x8010_0000_0000_0c07));
}

#[test]
fn encryption_bit_is_no_address() {
    let options = LongModeOptions {
        physical_bits: 43,
        encryption_bit: Some(47),
        encrypt_tables: true,
        ..LongModeOptions::default()
    };
    let npt = Npt::new(options).unwrap();
    let attrs = LongModeAttrs { encrypted: true, ..LongModeAttrs::default() };
    let leaf = npt.leaf(level(2), &LeafSpec { attrs, ..spec(0x20_0000, Access::RWX) }).unwrap();
    assert_eq!(leaf, 0x0000_8000_0020_0ee7);
    assert_eq!(npt.spec(level(2), leaf).output, OutputAddr::new(0x20_0000));
    assert_eq!(npt.split(level(2), leaf, 2), 0x0000_8000_0020_2e67);
    assert_eq!(npt.set_spte(level(2), leaf, OutputAddr::new(0x40_0000)), Ok(0x0000_8000_0040_08a5));
    let link = npt.table(level(3), OutputAddr::new(0x7000)).unwrap();
    assert_eq!(link, 0x0000_8000_0000_7827);
    assert_eq!(npt.kind(level(3), link), Kind::Table(OutputAddr::new(0x7000)));
    assert_eq!(npt.check(level(3), link), Ok(()));
    let wide = OutputAddr::new(1 << 47);
    assert_eq!(npt.table(level(2), wide), Err(FormatError::OutputTooWide { output: wide, bits: 43 }));
}

#[test]
fn impossible_options_are_refused() {
    let ept = |options| Ept::new(options).err();
    let long_mode = |options| LongMode::new(options).err();
    let default = LongModeOptions::default();
    assert_eq!(
        ept(EptOptions { physical_bits: 53, ..EptOptions::default() }),
        Some(OptionsError::PhysicalBits { bits: 53 })
    );
    assert_eq!(
        ept(EptOptions { l1tf_cache_bits: Some(0), ..EptOptions::default() }),
        Some(OptionsError::CacheBits { bits: 0 })
    );
    assert_eq!(
        long_mode(LongModeOptions { encryption_bit: Some(51), ..default }),
        Some(OptionsError::EncryptionBit { bit: 51, physical_bits: 52 })
    );
    assert_eq!(long_mode(LongModeOptions { encrypt_tables: true, ..default }), Some(OptionsError::EncryptTables));
    assert_eq!(
        long_mode(LongModeOptions { nx_huge_pages: true, no_execute: false, ..default }),
        Some(OptionsError::NxHugePages)
    );
    let keys = Npt::new(LongModeOptions { protection_keys: true, ..default });
    assert_eq!(keys.err(), Some(OptionsError::NestedProtectionKeys));
}

#[test]
fn what_a_format_has_not_it_refuses() {
    let ept = Ept::new(EptOptions { pages_1g: false, ..EptOptions::default() }).unwrap();
    let npt = Npt::new(LongModeOptions::default()).unwrap();
    assert_eq!(ept.leaf(level(3), &spec(0, Access::RWX)), Err(FormatError::NoLeaf { number: 3 }));
    assert_eq!(ept.leaf(level(4), &spec(0, Access::RWX)), Err(FormatError::NoLeaf { number: 4 }));
    assert_eq!(ept.leaf(level(6), &spec(0, Access::RWX)), Err(FormatError::NoLeaf { number: 6 }));
    assert_eq!(ept.collapse(level(3), ept.leaf(level(2), &spec(0, Access::RWX)).unwrap()), None);
    assert!(matches!(ept.table(L1, OutputAddr::new(0)), Err(FormatError::Attribute { .. })));
    assert!(matches!(npt.table(level(5), OutputAddr::new(0)), Err(FormatError::Attribute { .. })));
    let refused = |attrs| npt.leaf(L1, &LeafSpec { attrs, ..spec(0, Access::RWX) }).is_err();
    let default = LongModeAttrs::default();
    assert!(refused(LongModeAttrs { user: false, ..default }));
    assert!(refused(LongModeAttrs { global: true, ..default }));
    assert!(refused(LongModeAttrs { encrypted: true, ..default }));
    assert!(refused(LongModeAttrs { protection_key: ProtectionKey::new(1).unwrap(), ..default }));
    for access in [Access::empty(), Access::WRITE, Access::EXECUTE, Access::WRITE | Access::EXECUTE] {
        assert_eq!(npt.leaf(L1, &spec(0, access)), Err(FormatError::Access { access }));
    }
}

#[test]
fn flushes_are_owed_for_what_is_taken_away() {
    let ept = ept(AccessedDirty::Enabled);
    let table = |output| ept.table(level(2), OutputAddr::new(output)).unwrap();
    let leaf = |access| ept.leaf(level(2), &LeafSpec { dirty: false, ..spec(0x20_0000, access) }).unwrap();
    let owed = |old, new| ept.transition(level(2), old, new);
    let (rwx, rx, r) = (leaf(Access::RWX), leaf(Access::RX), leaf(Access::READ));
    // Rights.
    assert_eq!(owed(rwx, rx), Transition::FLUSH);
    assert_eq!(owed(rx, r), Transition::FLUSH);
    assert_eq!(owed(r, rwx), Transition::FREE);
    // Presence.
    for gone in [
        ept.not_present(Level::LEAF).absent,
        ept.not_present(Level::LEAF).claimed,
        ept.not_present(Level::LEAF).dead,
        0x6,
        0,
    ] {
        assert_eq!(owed(r, gone), Transition::FLUSH);
        assert_eq!(owed(table(0), gone), Transition::FLUSH);
        assert_eq!(owed(gone, rwx), Transition::FREE);
        assert_eq!(owed(gone, table(0)), Transition::FREE);
    }
    // Size: a split owes nothing, a collapse does.
    assert_eq!(owed(rwx, table(0x1000)), Transition::FREE);
    assert_eq!(owed(table(0x1000), rwx), Transition::FLUSH);
    // Links.
    assert_eq!(owed(table(0x1000), table(0x2000)), Transition::FLUSH);
    assert_eq!(owed(table(0x1000), table(0x1000) | CLAIM), Transition::FREE);
    assert_eq!(owed(table(0x1000), table(0x1000) & !2), Transition::FLUSH);
    // Facts.
    assert_eq!(owed(rwx | 0x200, rwx), Transition::FLUSH);
    assert_eq!(owed(rwx, rwx & !0x100), Transition::FREE);
    assert_eq!(owed(rwx, rwx | CLAIM), Transition::FREE);
    // Cache type, and another page.
    assert_eq!(owed(r, r & !0x40), Transition::FLUSH);
    assert_eq!(owed(r, r ^ 0x40_0000), Transition::FLUSH);
    // Somebody else's entry may be cached.
    assert_eq!(owed(0x20_00b7, ept.not_present(Level::LEAF).absent), Transition::FLUSH);
    assert_eq!(owed(0x20_00b7, 0x20_00b7), Transition::FREE);
}

#[test]
fn a_stale_write_after_ageing_is_told() {
    let ept = ept(AccessedDirty::Disabled);
    let leaf = ept.leaf(L1, &spec(0x7000, Access::RWX)).unwrap();
    let old = ept.make_old(L1, leaf);
    // No flush, as writes through a stale TLB entry hit a leaf that is dirty anyway; cleaning it does flush.
    assert_eq!(ept.transition(L1, leaf, old), Transition::FREE);
    assert!(ept.is_dirty(L1, old));
    let clean = ept.make_clean(L1, old);
    assert!(!ept.is_dirty(L1, clean) && ept.is_tracked(clean));
    assert_eq!(ept.transition(L1, old, clean), Transition::FLUSH);
    // A tracked leaf that goes away may still be in a TLB.
    assert_eq!(ept.transition(L1, clean, ept.not_present(Level::LEAF).absent), Transition::FLUSH);
}

#[test]
fn capabilities_narrow_the_options() {
    let none = EptOptions::default().with_capabilities(EptCapabilities::PAGES_2M);
    assert_eq!(none.accessed_dirty, AccessedDirty::Disabled);
    assert!(none.pages_2m && !none.pages_1g && !none.execute_only);
    let all = EptOptions::default().with_capabilities(EptCapabilities::all());
    assert_eq!(all, EptOptions::default());
}
