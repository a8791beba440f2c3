// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reserved bits, impossible shapes, and this crate's own rules, one by one.

mod common;

use common::*;
use notifier_core::Access;
use spte_core::format::{Format, Kind};
use spte_ppc::*;

const LEAF: u64 = 0xc000_0000_8000_0105;

fn hardware(format: &Radix, number: u8, raw: u64) -> Option<u64> {
    format.check_hardware(level(number), raw).err().map(|why| {
        assert_eq!((why.raw, why.number), (raw, number as i8));
        assert!(matches!(format.hardware_kind(level(number), raw), HardwareKind::Impossible(_)));
        why.bits
    })
}

fn own(format: &Radix, number: u8, raw: u64) -> Option<u64> {
    format.check(level(number), raw).err().map(|why| why.bits)
}

#[test]
fn an_invalid_entry_breaks_no_rule() {
    for format in both() {
        for number in 1..=4 {
            assert_eq!(hardware(&format, number, !(1 << 63)), None);
            assert_eq!(own(&format, number, !(1 << 63)), None);
            assert_eq!(format.hardware_kind(level(number), !(1 << 63)), HardwareKind::NotPresent);
        }
    }
}

#[test]
fn every_reserved_bit_of_a_leaf_is_refused() {
    for format in both() {
        assert_eq!((hardware(&format, 1, LEAF), own(&format, 1, LEAF)), (None, None));
        for bit in 0..64 {
            let expected = match bit {
                // V: then it is nothing. L: then it is a directory entry, which level 1 has none of.
                63 => None,
                62 => Some(1 << 62),
                57..=60 | 6 => Some(1 << bit),
                // Wider than 53 bits.
                53..=56 => Some(1 << bit),
                _ => None,
            };
            assert_eq!(hardware(&format, 1, LEAF ^ 1 << bit), expected, "bit {bit}");
        }
    }
    let wide = Radix::new(RadixOptions { physical_bits: 57, ..of(BasePage::K4) }).unwrap();
    assert_eq!(hardware(&wide, 1, LEAF | 0xf << 53), None);
}

#[test]
fn every_bit_of_a_link_is_address_size_or_refused() {
    for (format, base) in both().into_iter().zip([0x3456_7000, 0x3456_7300_u64]) {
        let nls = if format.options().page == BasePage::K4 { 9 } else { 5 };
        let link = 1 << 63 | base | nls;
        assert_eq!((hardware(&format, 2, link), own(&format, 2, link)), (None, None));
        for bit in 0..63_u64 {
            let expected = match bit {
                // A leaf of 2M then: low RPN bits are this crate's rule, and bit 6 is clear here.
                62 => None,
                60 | 61 | 5..=7 => Some(1 << bit),
                53..=59 => Some(1 << bit),
                0..=4 => Some(0x1f),
                // Inside another table of 512 entries.
                8..=11 if nls == 9 => Some(1 << bit),
                _ => None,
            };
            assert_eq!(hardware(&format, 2, link ^ 1 << bit), expected, "bit {bit} of {link:#x}");
            assert_eq!(
                matches!(format.kind(level(2), link ^ 1 << bit), Kind::Table(_)),
                expected.is_none() && bit != 62,
                "bit {bit}"
            );
        }
    }
}

#[test]
fn a_directory_entry_of_another_shape_is_not_followed() {
    let [k4, k64] = both();
    // Sizes of the other base page, of no base page, and none.
    for (format, number, raw) in [
        (&k4, 2, 0x8000_0000_3456_7005_u64),
        (&k64, 2, 0x8000_0000_3456_7009),
        (&k4, 3, 0x8000_0000_3456_7005),
        (&k4, 4, 0x8000_0000_3456_000d),
        (&k64, 2, 0x8000_0000_3456_7000),
    ] {
        assert_eq!(hardware(format, number, raw), Some(0x1f));
        assert_eq!(format.kind(level(number), raw), Kind::Special);
        assert!(format.check(level(number), raw).is_err());
    }
    // A table that is not aligned to its size.
    assert_eq!(hardware(&k4, 2, 0x8000_0000_3456_7109), Some(0x100));
    assert_eq!(k4.kind(level(2), 0x8000_0000_3456_7109), Kind::Special);
}

#[test]
fn leaves_stand_at_their_levels_alone() {
    for format in both() {
        for number in 1..=3 {
            assert_eq!(hardware(&format, number, LEAF), None);
            assert_eq!(format.kind(level(number), LEAF), Kind::Leaf);
        }
        assert_eq!(hardware(&format, 4, LEAF), Some(1 << 62), "512G");
        assert_eq!(format.kind(level(4), LEAF), Kind::Special);
        for raw in [0x8000_0000_3456_7009, 0x8000_0000_3456_7005] {
            assert_eq!(hardware(&format, 1, raw), Some(1 << 62), "nothing lies below level 1");
            assert_eq!(format.kind(level(1), raw), Kind::Special);
        }
    }
}

#[test]
fn strong_access_order_is_of_power_isa_3_0() {
    let old = radix(BasePage::K4);
    let new = Radix::new(RadixOptions { strong_order: false, ..of(BasePage::K4) }).unwrap();
    for att in 0..4_u64 {
        let raw = LEAF | att << 4;
        assert_eq!(hardware(&old, 1, raw), None);
        assert_eq!(hardware(&new, 1, raw), (att == 1).then_some(0x30));
    }
    assert!(new.leaf(level(1), &common::spec(0, Access::READ)).is_ok());
}

#[test]
fn software_rules() {
    let format = radix(BasePage::K4);
    assert_eq!(own(&format, 1, LEAF | 0x8), Some(0x8), "privileged");
    assert_eq!(own(&format, 1, LEAF | 1 << 61), Some(1 << 61));
    assert_eq!(own(&format, 1, LEAF | 0x200), Some(0x200));
    assert_eq!(own(&format, 1, LEAF | 0x2), Some(0x800), "written, and not upgradable");
    assert_eq!(own(&format, 1, LEAF | 0x802), None);
    assert_eq!(own(&format, 1, (LEAF & !0x4) | 0x802), Some(0x4), "writing implies reading");
    assert_eq!(own(&format, 1, LEAF | 0x800), None, "armed");
    assert_eq!(own(&format, 1, (LEAF & !0x4) | 0x800), Some(0x4), "armed, and not readable");
    assert_eq!(own(&format, 1, LEAF | 0xc80), None, "the user's bit, and C");
    assert_eq!(own(&format, 2, LEAF | 0x1f_f000), Some(0x1f_f000), "RPN below 2M");
    assert_eq!(hardware(&format, 2, LEAF | 0x1f_f000), None, "which walkers leave out");
    assert_eq!(own(&radix(BasePage::K64), 1, LEAF | 0xf000), Some(0xf000));
}
