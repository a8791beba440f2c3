// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which entries are impossible, and that nothing else is.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, Kind, LeafSpec, Level};
use spte_mips::bits::{ACCESSED, MODIFIED, PRESENT, WRITE};
use spte_mips::*;

/// The rule that a raw entry breaks, as far as it goes.
fn rule(format: &GpaTable, number: u8, raw: u64) -> &'static str {
    let level = Level::new(number).unwrap();
    let error = format.check(level, raw).expect_err("an impossible entry");
    assert_eq!((error.raw, error.number), (raw, number as i8));
    assert_ne!(error.bits, 0);
    error.rule
}

#[test]
fn every_rule_of_leaves_is_found() {
    let format = table(GpaOptions { layout: PteLayout::Huge, ..of(PageSize::K16, Width::Standard) });
    let layout = PteLayout::Huge;
    let plain = format.leaf(L1, &spec(0x4000, Access::READ)).unwrap();
    format.check(L1, plain).unwrap();
    assert_eq!(rule(&format, 1, plain ^ PRESENT), "V without PRESENT: hardware would load what nobody mapped");
    assert_eq!(rule(&format, 1, plain | 1 << 13), "frame bits below the page size are zero");
    assert_eq!(rule(&format, 1, plain | 1 << 14), "frame bits below the page size are zero");
    let wide = "address bits above the physical address width, which EntryLo does not keep";
    assert_eq!(rule(&format, 1, plain | 1 << 49), wide);
    assert_eq!(rule(&format, 1, plain | 1 << 63), wide);
    assert_eq!(rule(&format, 1, plain ^ ACCESSED), "V is set where ACCESSED is, and nowhere else");
    assert_eq!(rule(&format, 1, plain ^ layout.valid()), "V is set where ACCESSED is, and nowhere else");
    for missing in [0, WRITE, MODIFIED] {
        assert_eq!(rule(&format, 1, plain | layout.dirty() | missing), "D needs WRITE and MODIFIED");
    }
    assert_eq!(rule(&format, 1, MODIFIED), "what holds nothing has no facts");
    let bare = table(GpaOptions { rixi: false, ..GpaOptions::default() });
    let plain = bare.leaf(L1, &spec(0x4000, Access::RX)).unwrap();
    assert_eq!(rule(&bare, 1, plain ^ PteLayout::Plain.read_inhibit()), "without RI and XI every leaf has READ");
    assert_eq!(rule(&bare, 1, plain | PteLayout::Plain.execute_inhibit()), "without RI and XI there is no XI");
}

#[test]
fn global_and_huge_leaves_are_refused() {
    for format in formats() {
        let layout = format.options().layout;
        let plain = format.leaf(L1, &spec(0x1_0000, Access::RX)).unwrap();
        assert_eq!(rule(&format, 1, plain | layout.global()), "guest physical addresses are not global");
        for bit in 4..6 {
            if layout.huge() >> bit & 1 == 1 {
                assert_eq!(rule(&format, 1, plain | 1 << bit), "no leaf of a GPA table is huge");
            }
        }
        // Hardware has no rule against either.
        assert_eq!(format.hardware_kind(L1, plain | layout.global() | layout.huge()), HardwareKind::Leaf);
    }
}

/// Handlers load what has V, and the engine keeps what has PRESENT: neither is nothing.
#[test]
fn an_entry_with_present_or_v_is_a_leaf_to_hardware() {
    for format in formats() {
        let layout = format.options().layout;
        let plain = format.leaf(L1, &spec(0x1_0000, Access::RX)).unwrap();
        assert_eq!(format.hardware_kind(L1, plain & !PRESENT), HardwareKind::Leaf, "loaded, whoever wrote it");
        assert_eq!(format.hardware_kind(L1, format.make_old(L1, plain)), HardwareKind::Leaf);
        let neither = format.make_old(L1, plain) & !PRESENT;
        assert_eq!(format.hardware_kind(L1, neither), HardwareKind::NotPresent);
        // What is wrong with the address is wrong with V alone too.
        let wide = layout.valid() | layout.frame(format.options().page.shift(), 60) & !layout.frame(12, 48);
        assert!(matches!(format.hardware_kind(L1, wide), HardwareKind::Impossible(_)));
        assert_eq!(format.check_hardware(L1, wide & !layout.valid()), Ok(()), "nobody loads that");
    }
}

#[test]
fn a_directory_entry_of_zero_is_impossible() {
    for format in formats() {
        let zero = "an empty entry of a directory leads to a sentinel: zero would be followed too";
        assert_eq!(rule(&format, 2, 0), zero);
        assert_eq!(format.kind(Level::new(2).unwrap(), 0), Kind::Special, "and never taken for an empty one");
    }
}

#[test]
fn every_rule_of_links_is_found() {
    let format = table(GpaOptions::default());
    let link = 0x9800_0000_1234_5000;
    for number in [2, 3] {
        let unmapped = "a link is an address of an unmapped segment";
        for raw in [0x1234_5000, 0x4000_0000_1234_5000, 0xc000_0000_1234_5000, 0xffff_ffff_c000_0000] {
            assert_eq!(rule(&format, number, raw), unmapped);
        }
        let wide = "address bits above the physical address width (an address error)";
        assert_eq!(rule(&format, number, link | 1 << 48), wide);
        assert_eq!(rule(&format, number, link | 1 << 58), wide);
        assert_eq!(rule(&format, number, link | 0x800), "a table is aligned to its page");
        let foreign =
            "a link of this crate is an address in xkphys, with the tables' cache attribute, and no sentinel's";
        assert_eq!(rule(&format, number, 0xa800_0000_1234_5000), foreign);
        assert_eq!(rule(&format, number, 0xffff_ffff_8123_5000), foreign);
        // A handler loads from both.
        let level = Level::new(number).unwrap();
        let at = |to: u64| HardwareKind::Table(OutputAddr::new(to));
        assert_eq!(format.hardware_kind(level, 0xa800_0000_1234_5000), at(0x1234_5000));
        assert_eq!(format.hardware_kind(level, 0xffff_ffff_8123_5000), at(0x123_5000));
        assert_eq!(format.hardware_kind(level, format.not_present(level).absent), HardwareKind::NotPresent);
        assert!(matches!(format.hardware_kind(level, 0), HardwareKind::Impossible(_)));
    }
    // The sentinels of another level, and what is not one of the three, are no links of ours.
    let (two, three) = (Level::new(2).unwrap(), Level::new(3).unwrap());
    assert!(format.check(two, format.not_present(three).absent).is_err());
    assert!(format.check(three, format.not_present(two).absent).is_err());
    assert_eq!(rule(&format, 4, link), "the table has no such level");
}

proptest! {
    /// Each single bit of a possible leaf either breaks a rule or changes what the leaf says.
    #[test]
    fn every_single_bit_change_is_found_or_means_something(format in any_format(), spec in any_spec(), bit in 0_u32..64) {
        let spec = fitted(&format, spec);
        let raw = format.leaf(L1, &spec).unwrap();
        let other = raw ^ (1 << bit);
        match (format.check(L1, other), format.kind(L1, other)) {
            (Err(error), _) => prop_assert_ne!(error.bits, 0),
            (Ok(()), Kind::Leaf) => prop_assert_ne!(format.spec(L1, other), spec),
            (Ok(()), kind) => {
                // PRESENT of an old leaf: what is left is nobody's, and hardware does not load it.
                prop_assert_eq!((kind, bit), (Kind::Special, 0));
                prop_assert!(!format.entry_lo(other).is_valid());
            }
        }
    }

    /// Whatever is in an entry, asking about it panics nowhere, and what passes can be read and built again.
    #[test]
    fn what_passes_is_what_its_spec_says(format in any_format(), raw in any::<u64>(), low in any::<bool>(), number in 1_u8..5) {
        let raw = if low { raw & 0xffff_ffff_ffff } else { raw };
        let level = Level::new(number).unwrap();
        let hardware = format.hardware_kind(level, raw);
        match (format.check(level, raw), format.kind(level, raw)) {
            (Ok(()), Kind::Leaf) => {
                prop_assert_eq!(hardware, HardwareKind::Leaf);
                let spec: LeafSpec<GpaAttrs> = format.spec(level, raw);
                prop_assert_eq!(format.leaf(level, &spec), Ok(raw));
            }
            (Ok(()), Kind::Table(to)) => prop_assert_eq!(format.table(level, to), Ok(raw)),
            (Ok(()), _) => prop_assert_eq!(hardware, HardwareKind::NotPresent),
            (Err(_), _) => {}
        }
    }
}
