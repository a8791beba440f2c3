// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reserved encodings, RES0 bits, contiguous sets, and this crate's own rules, one by one.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use spte_arm64::*;
use spte_core::format::{Format, Kind};

/// The bits that the entry is refused for by the architecture.
fn hardware(format: &Stage2, number: i8, raw: u64) -> Option<u64> {
    format.check_hardware(level(number), raw).err().map(|why| {
        assert_eq!((why.raw, why.number), (raw, number));
        assert!(matches!(format.hardware_kind(level(number), raw), HardwareKind::Impossible(_)));
        why.bits
    })
}

/// The bits that the entry is refused for by this crate.
fn own(format: &Stage2, number: i8, raw: u64) -> Option<u64> {
    format.check(level(number), raw).err().map(|why| why.bits)
}

fn at48(granule: Granule) -> Stage2 {
    stage2(Stage2Options { ipa_bits: 48, ..of(granule) })
}

#[test]
fn an_invalid_entry_breaks_no_rule() {
    for number in 0..=3 {
        assert_eq!(hardware(&at48(Granule::K4), number, !1), None);
        assert_eq!(own(&at48(Granule::K4), number, !1), None);
    }
}

#[test]
fn one_at_the_last_level_is_reserved() {
    for granule in [Granule::K4, Granule::K16, Granule::K64] {
        assert_eq!(hardware(&at48(granule), 3, 0x8001_077d), Some(2));
        assert_eq!(hardware(&at48(granule), 3, 0x8001_077f), None);
    }
}

#[test]
fn blocks_stand_at_their_levels_alone() {
    assert_eq!(hardware(&at48(Granule::K4), 0, 0x77d), Some(2));
    assert_eq!(hardware(&at48(Granule::K4), 1, 0x77d), None);
    assert_eq!(hardware(&at48(Granule::K16), 1, 0x77d), Some(2));
    assert_eq!(hardware(&at48(Granule::K16), 2, 0x77d), None);
    assert_eq!(hardware(&at48(Granule::K64), 1, 0x77d), Some(2));
    assert_eq!(hardware(&at48(Granule::K64), 2, 0x77d), None);
    for (granule, number) in [(Granule::K4, 0), (Granule::K16, 1)] {
        let lpa2 = stage2(Stage2Options { ipa_bits: 52, physical_bits: 52, lpa2: true, ..of(granule) });
        assert_eq!(hardware(&lpa2, number, 0x77d), None);
    }
    let wide = stage2(Stage2Options { ipa_bits: 48, physical_bits: 52, ..of(Granule::K64) });
    assert_eq!(hardware(&wide, 1, 0x77d), None);
    // And what is none is never followed.
    assert_eq!(at48(Granule::K4).kind(level(0), 0x77d), Kind::Special);
}

#[test]
fn addresses_are_no_wider_than_the_machine() {
    let format = stage2(Stage2Options { ipa_bits: 40, physical_bits: 40, ..of(Granule::K4) });
    for bit in 40..48 {
        assert!(hardware(&format, 3, 0x77f | 1 << bit).is_some(), "bit {bit}");
        assert!(hardware(&format, 2, 0x77d | 1 << bit).is_some(), "bit {bit}");
        assert!(hardware(&format, 2, 0x3 | 1 << bit).is_some(), "bit {bit}");
    }
    assert_eq!(hardware(&format, 3, 0x77f | 1 << 39), None);
    let lpa2 = stage2(Stage2Options { physical_bits: 50, lpa2: true, ..of(Granule::K4) });
    assert_eq!(hardware(&lpa2, 3, 0x2_0000_0000_047f), None, "bit 49");
    assert!(hardware(&lpa2, 3, 0x2_0000_0000_057f).is_some(), "bit 50 of the address stands in 8");
}

#[test]
fn bits_between_attributes_and_address_are_zero() {
    for (granule, number, low, high) in [
        (Granule::K4, 2, 12, 20),
        (Granule::K4, 1, 12, 29),
        (Granule::K16, 3, 12, 13),
        (Granule::K16, 2, 12, 24),
        (Granule::K64, 3, 12, 15),
        (Granule::K64, 2, 12, 28),
    ] {
        let format = at48(granule);
        let raw = if number == 3 { 0x77f } else { 0x77d };
        for bit in low..=high {
            assert_eq!(hardware(&format, number, raw | 1 << bit), Some(1 << bit), "{granule:?}, level {number}");
        }
        assert_eq!(hardware(&format, number, raw | 1 << (high + 1)), None);
    }
    // Links name a table of a granule.
    assert_eq!(hardware(&at48(Granule::K16), 2, 0x1003), Some(0x1000));
    assert_eq!(hardware(&at48(Granule::K64), 2, 0x8003), Some(0x8000));
    // 15:12 of the 64K granule are an address where addresses have 52 bits.
    let wide = stage2(Stage2Options { physical_bits: 52, ..of(Granule::K64) });
    assert_eq!(hardware(&wide, 3, 0xf77f), None);
    assert_eq!(hardware(&wide, 2, 0xf77d), None);
    // nT stands in bit 16 of blocks where FEAT_BBM says so; of a 64K page that is an address.
    let one = stage2(Stage2Options { break_level: BreakLevel::Level1, ..Stage2Options::default() });
    assert_eq!(hardware(&one, 2, 0x1_077d), None);
    assert_eq!(own(&one, 2, 0x1_077d), Some(0x1_0000));
    assert_eq!(hardware(&at48(Granule::K4), 2, 0x1_077d), Some(0x1_0000));
    assert_eq!(own(&at48(Granule::K64), 3, 0x1_077f), None);
}

#[test]
fn bits_50_to_48_are_zero_but_for_addresses() {
    let plain = at48(Granule::K4);
    for bit in 48..=50 {
        assert_eq!(hardware(&plain, 3, 0x77f | 1 << bit), Some(1 << bit));
        assert_eq!(hardware(&plain, 2, 0x3 | 1 << bit), Some(1 << bit));
    }
    let lpa2 = stage2(Stage2Options { physical_bits: 52, lpa2: true, ..of(Granule::K4) });
    assert_eq!(hardware(&lpa2, 3, 0x77f | 3 << 48), None);
    assert_eq!(hardware(&lpa2, 3, 0x77f | 1 << 50), Some(1 << 50));
}

#[test]
fn reserved_memory_types_and_shareability() {
    let plain = at48(Granule::K4);
    let fwb = stage2(Stage2Options { fwb: true, ..Stage2Options::default() });
    for mem_attr in 0..16_u64 {
        let raw = 0x743 | mem_attr << 2;
        let reserved = [4, 8, 12].contains(&mem_attr);
        assert_eq!(hardware(&plain, 3, raw), reserved.then_some(0x3c), "MemAttr {mem_attr}");
        let reserved = mem_attr == 4 || mem_attr > 7;
        assert_eq!(hardware(&fwb, 3, raw), reserved.then_some(0x3c), "MemAttr {mem_attr} with FWB");
    }
    for (shareability, refused) in [(0, None), (1, Some(0x300)), (2, None), (3, None)] {
        assert_eq!(hardware(&plain, 3, 0x47f | shareability << 8), refused);
    }
    // Address bits with LPA2.
    let lpa2 = stage2(Stage2Options { physical_bits: 52, lpa2: true, ..of(Granule::K4) });
    assert_eq!(hardware(&lpa2, 3, 0x57f), None);
}

#[test]
fn execute_never_has_one_bit_without_its_feature() {
    let with = stage2(Stage2Options { xnx: true, ..Stage2Options::default() });
    for xn in 0..4_u64 {
        let raw = 0x77f | xn << 53;
        assert_eq!(hardware(&at48(Granule::K4), 3, raw), (xn & 1 == 1).then_some(1 << 53), "XN {xn}");
        assert_eq!(hardware(&with, 3, raw), None);
    }
}

#[test]
fn contiguous_sets_are_where_the_architecture_has_them() {
    let size = |format: &Stage2, number| format.contiguous(level(number)).map(|set| (set.entries, set.bytes));
    let [k4, k16, k64] = [Granule::K4, Granule::K16, Granule::K64].map(at48);
    assert_eq!([3, 2, 1].map(|n| size(&k4, n)), [(16, 64 << 10), (16, 32 << 20), (16, 16 << 30)].map(Some));
    assert_eq!([3, 2].map(|n| size(&k16, n)), [(128, 2 << 20), (32, 1 << 30)].map(Some));
    assert_eq!([3, 2].map(|n| size(&k64, n)), [(32, 2 << 20), (32, 16 << 30)].map(Some));
    assert_eq!([size(&k4, 0), size(&k16, 1), size(&k64, 1)], [None; 3]);
    let lpa2 = stage2(Stage2Options { ipa_bits: 52, physical_bits: 52, lpa2: true, ..of(Granule::K16) });
    assert_eq!(size(&lpa2, 1), None);
    assert_eq!(hardware(&lpa2, 1, 0x77d | 1 << 52), Some(1 << 52), "a level without sets");
    assert_eq!(hardware(&k4, 3, 0x77f | 1 << 52), None);
    assert_eq!(own(&k4, 3, 0x77f | 1 << 52), None);
    let small = stage2(Stage2Options { ipa_bits: 33, start: Start::SingleTable, ..of(Granule::K4) });
    assert_eq!(small.geometry().level(level(1)).bits, 3);
    assert_eq!((size(&small, 1), hardware(&small, 1, 0x77d | 1 << 52)), (None, Some(1 << 52)), "too small a root");
}

#[test]
fn no_block_is_larger_than_physical_memory() {
    let leaf = |physical_bits| {
        let format = stage2(Stage2Options { ipa_bits: 52, physical_bits, lpa2: true, ..of(Granule::K4) });
        format.geometry().level(level(0)).leaf
    };
    assert_eq!((leaf(38), leaf(39)), (false, true), "blocks of 512G");
}

#[test]
fn no_set_is_wider_than_physical_memory() {
    // 4G of it, and a set of 16 leaves of 1G.
    let format = stage2(Stage2Options { ipa_bits: 40, physical_bits: 32, ..of(Granule::K4) });
    let first = 0x0000_0000_0000_077d;
    assert_eq!(format.check(level(1), first), Ok(()));
    assert_eq!([0, 15].map(|index| format.set_member(level(1), first, index)), [None; 2]);
    assert!(format.set_member(level(2), first, 15).is_some());
}

#[test]
fn a_contiguous_set_is_alike_and_in_a_row() {
    let format = at48(Granule::K4);
    let set = |index, raw| format.check_contiguous(L3, 0x0010_0000_8001_077f, index, raw).map_err(|why| why.bits);
    assert_eq!(set(0, 0x0010_0000_8001_077f), Ok(()));
    assert_eq!(set(15, 0x0010_0000_8001_f77f), Ok(()));
    assert_eq!(set(1, 0x0010_0000_8001_137f), Ok(()), "access flags are facts");
    assert!(set(1, 0x0010_0000_8001_277f).is_err(), "not the next page");
    assert_eq!(set(1, 0x0000_0000_8001_177f), Err(1 << 52));
    assert_eq!(set(1, 0x0010_0000_8001_17ff), Err(1 << 7), "other rights");
    assert_eq!(set(1, 0x0010_0000_8001_1747), Err(0x38), "another type");
    assert_eq!(set(1, 0), Err(1), "a hole");
    assert!(set(16, 0x0010_0000_8002_077f).is_err(), "a set has 16");
    let unaligned = 0x0010_0000_8000_177f;
    assert!(format.check_contiguous(L3, unaligned, 0, unaligned).is_err());
}

#[test]
fn links_hold_an_address_and_nothing_else() {
    let format = at48(Granule::K4);
    let link = format.table(level(2), OutputAddr::new(0x7000)).unwrap();
    assert_eq!(own(&format, 2, link), None);
    assert_eq!(own(&format, 2, link | 1 << 55), None, "a claimed link");
    for bit in [2, 6, 7, 8, 10, 11, 51, 52, 53, 54, 56, 57, 58, 59, 63] {
        assert_eq!(own(&format, 2, link | 1 << bit), Some(1 << bit), "bit {bit}");
        assert_eq!(hardware(&format, 2, link | 1 << bit), None, "bit {bit} is ignored in tables");
    }
}

#[test]
fn software_rules() {
    let format = stage2(Stage2Options::default());
    let leaf = format.leaf(L3, &spec(0x1000, Access::RWX)).unwrap();
    let write = 1 << 56 | 1 << 51 | 1 << 7;
    assert_eq!(own(&format, 3, leaf), None);
    assert_eq!(own(&format, 3, leaf | 1 << 55), None, "a claimed leaf");
    assert_eq!(own(&format, 3, leaf & !(1 << 56)), Some(write), "writable, and not upgradable");
    assert_eq!(own(&format, 3, leaf | 1 << 51), Some(1 << 51), "DBM where hardware records nothing");
    assert_eq!(own(&format, 3, leaf | 1 << 57), Some(1 << 57), "two ways to be dirty");
    assert_eq!(own(&format, 3, (leaf | 1 << 57) & !(1 << 7)), None);
    assert_eq!(own(&format, 3, leaf | 1 << 11), Some(1 << 11));
    for bit in 61..64 {
        assert_eq!(own(&format, 3, leaf | 1 << bit), Some(1 << bit));
    }
    assert_eq!(own(&format, 3, leaf | 1 << 59), Some(3 << 59));
    let hardware = stage2(Stage2Options { accessed_dirty: AccessedDirty::Hardware, ..Stage2Options::default() });
    assert_eq!(own(&hardware, 3, leaf), Some(write), "S2AP[1] without DBM");
    assert_eq!(own(&hardware, 3, leaf | 1 << 51), None);
    assert_eq!(own(&hardware, 3, leaf & !(1 << 7) & !(1 << 56) | 1 << 51), Some(write), "DBM, and not upgradable");
    let xnx = stage2(Stage2Options { xnx: true, ..Stage2Options::default() });
    let none = xnx.leaf(L3, &spec(0x1000, Access::READ)).unwrap();
    assert_eq!(own(&xnx, 3, none | 1 << 59), None, "executed at EL0");
    assert_eq!(own(&xnx, 3, none | 2 << 59), Some(3 << 59), "2 is nowhere");
    assert_eq!(own(&xnx, 3, leaf | 1 << 59), Some(3 << 59), "it executes now");
}
