// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Encodings and shapes that were worked out by hand from the manual's field tables.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use spte_arm64::*;
use spte_core::format::{Format, LeafSpec};

/// All but the bits that hardware leaves to software.
const MASK: u64 = !(0xf << 55);

fn leaf(format: &Stage2, number: i8, output: u64, access: Access, memory: MemoryType) -> u64 {
    let spec = LeafSpec { attrs: Stage2Attrs::default().memory(memory), ..spec(output, access) };
    format.leaf(level(number), &spec).unwrap() & MASK
}

#[test]
fn leaves_are_as_worked_out_by_hand() {
    let plain = stage2(of(Granule::K4));
    let fwb = stage2(Stage2Options { fwb: true, ..of(Granule::K4) });
    let normal = MemoryType::WRITE_BACK;
    assert_eq!(leaf(&plain, 3, 0x8000_1000, Access::RWX, normal), 0x8000_17ff);
    assert_eq!(leaf(&plain, 3, 0x8000_1000, Access::READ, normal), 0x0040_0000_8000_177f);
    assert_eq!(leaf(&fwb, 3, 0x8000_1000, Access::READ, normal), 0x0040_0000_8000_175b);
    let rw = Access::READ | Access::WRITE;
    assert_eq!(leaf(&plain, 2, 0x0900_0000, rw, MemoryType::DEVICE), 0x0040_0000_0900_07c5);
    let wide = stage2(Stage2Options { physical_bits: 52, ..of(Granule::K64) });
    assert_eq!(leaf(&wide, 3, 0xf_8000_1234_0000, Access::RWX, normal), 0x8000_1234_f7ff);
    let lpa2 = Stage2Options { lpa2: true, fwb: true, physical_bits: 52, ..of(Granule::K4) };
    assert_eq!(leaf(&stage2(lpa2), 3, 0xe_8000_1234_5000, Access::RWX, normal), 0x2_8000_1234_57db);
}

#[test]
fn memory_types_of_leaves() {
    let of_type = |fwb, memory| {
        let format = stage2(Stage2Options { fwb, ..Stage2Options::default() });
        leaf(&format, 3, 0, Access::empty(), memory) & 0x3c
    };
    let normal = |outer, inner| MemoryType::Normal { outer, inner };
    assert_eq!(of_type(false, MemoryType::WRITE_BACK), 0xf << 2);
    assert_eq!(of_type(true, MemoryType::WRITE_BACK), 6 << 2);
    assert_eq!(of_type(false, MemoryType::NON_CACHEABLE), 5 << 2);
    assert_eq!(of_type(true, MemoryType::NON_CACHEABLE), 5 << 2);
    assert_eq!(of_type(false, MemoryType::WRITE_THROUGH), 10 << 2);
    assert_eq!(of_type(false, normal(Cache::NonCacheable, Cache::WriteBack)), 7 << 2);
    assert_eq!(of_type(false, normal(Cache::WriteBack, Cache::WriteThrough)), 14 << 2);
    assert_eq!(of_type(true, MemoryType::Stage1), 7 << 2);
    for (bits, device) in [Device::NGnRnE, Device::NGnRE, Device::NGRE, Device::GRE].into_iter().enumerate() {
        assert_eq!(of_type(false, MemoryType::Device(device)), (bits as u64) << 2);
        assert_eq!(of_type(true, MemoryType::Device(device)), (bits as u64) << 2);
    }
    // 15 with FWB is nothing, and 6 without it is not write-back.
    assert_eq!(MemoryType::from_mem_attr(15, true), None);
    let mixed = normal(Cache::NonCacheable, Cache::WriteThrough);
    assert_eq!(MemoryType::from_mem_attr(6, false), Some(mixed));
}

#[test]
fn the_cacheability_of_a_leaf_is_the_tables() {
    let plain = stage2(Stage2Options::default());
    let fwb = stage2(Stage2Options { fwb: true, ..Stage2Options::default() });
    assert!(plain.is_cacheable(0x8000_17ff) && fwb.is_cacheable(0x8000_17db));
    assert!(!plain.is_cacheable(0x8000_17c7) && !fwb.is_cacheable(0x8000_17c7));
    assert!(!plain.is_cacheable(0x8000_17d7) && !fwb.is_cacheable(0x8000_17d7));
}

#[test]
fn rights_of_leaves() {
    let format = stage2(Stage2Options { xnx: true, ..Stage2Options::default() });
    let rights = |access| leaf(&format, 3, 0, access, MemoryType::WRITE_BACK) & (3 << 6 | 3 << 53);
    assert_eq!(rights(Access::empty()), 2 << 53);
    assert_eq!(rights(Access::READ), 1 << 6 | 2 << 53);
    assert_eq!(rights(Access::WRITE), 2 << 6 | 2 << 53);
    assert_eq!(rights(Access::EXECUTE), 0);
    assert_eq!(rights(Access::RWX), 3 << 6);
    let at = |execute| {
        let attrs = Stage2Attrs { execute, ..Stage2Attrs::default() };
        format.leaf(L3, &LeafSpec { attrs, ..spec(0, Access::RX) }).unwrap() >> 53 & 3
    };
    assert_eq!([at(ExecuteAt::Both), at(ExecuteAt::El0), at(ExecuteAt::El1)], [0, 1, 3]);
}

#[test]
fn writing_under_hardware_management_is_dbm() {
    let options = Stage2Options { accessed_dirty: AccessedDirty::Hardware, ..Stage2Options::default() };
    let format = stage2(options);
    let built = |armed, dirty| format.leaf(L3, &LeafSpec { armed, dirty, ..spec(0x1000, Access::RWX) }).unwrap();
    assert_eq!(built(false, false), 0x0108_0000_0000_177f, "writable-clean: DBM, S2AP[1] clear");
    assert_eq!(built(false, true), 0x0108_0000_0000_17ff);
    assert_eq!(built(true, false), 0x0100_0000_0000_177f, "armed: no DBM, or hardware would let writes through");
    assert_eq!(built(true, true), 0x0300_0000_0000_177f);
    assert_eq!(format.upgrade(L3, 0x0100_0000_0000_177f), Some(0x0108_0000_0000_177f));
    assert_eq!(format.upgrade(L3, 0x0300_0000_0000_177f), Some(0x0108_0000_0000_17ff), "the fact stays");
    assert_eq!(format.make_clean(L3, 0x0108_0000_0000_17ff), 0x0108_0000_0000_177f);
}

#[test]
fn links_are_as_worked_out_by_hand() {
    let link = |options, to| stage2(options).table(level(2), OutputAddr::new(to)).unwrap();
    assert_eq!(link(of(Granule::K4), 0x1234_5000), 0x1234_5003);
    let wide = Stage2Options { physical_bits: 52, ..of(Granule::K64) };
    assert!(stage2(wide).table(level(2), OutputAddr::new(0xf_8000_1234_0000)).is_ok());
    assert_eq!(link(wide, 0xf_8000_1234_0000), 0x8000_1234_f003);
    let lpa2 = Stage2Options { lpa2: true, physical_bits: 52, ..of(Granule::K16) };
    assert_eq!(link(lpa2, 0xe_8000_1234_4000), 0x2_8000_1234_4303);
}

/// Start level and tables side by side, as Linux has them.
#[test]
fn roots_begin_where_the_architecture_says() {
    // Address bits, then level and tables of 4K, 16K and 64K.
    let rows: [(u8, [(i8, u8); 3]); 14] = [
        (32, [(2, 4), (2, 1), (2, 1)]),
        (34, [(2, 16), (2, 1), (2, 1)]),
        (35, [(1, 1), (2, 1), (2, 1)]),
        (36, [(1, 1), (2, 1), (2, 1)]),
        (39, [(1, 1), (2, 8), (2, 1)]),
        (40, [(1, 2), (2, 16), (2, 1)]),
        (42, [(1, 8), (1, 1), (2, 1)]),
        (43, [(1, 16), (1, 1), (2, 2)]),
        (44, [(0, 1), (1, 1), (2, 4)]),
        (46, [(0, 1), (1, 1), (2, 16)]),
        (47, [(0, 1), (1, 1), (1, 1)]),
        (48, [(0, 1), (1, 2), (1, 1)]),
        (51, [(0, 8), (1, 16), (1, 1)]),
        (52, [(0, 16), (0, 1), (1, 1)]),
    ];
    for (bits, columns) in rows {
        for (granule, (number, tables)) in [Granule::K4, Granule::K16, Granule::K64].into_iter().zip(columns) {
            let wide = bits > 48;
            let options = Stage2Options {
                ipa_bits: bits,
                physical_bits: if wide { 52 } else { 48 },
                lpa2: wide && granule != Granule::K64,
                ..of(granule)
            };
            let format = stage2(options);
            assert_eq!((format.start_level(), format.concatenated()), (number, tables), "{granule:?}, {bits} bits");
            assert_eq!(format.geometry().address_bits(), u32::from(bits));
            let top = format.geometry().top();
            assert_eq!(format.level_number(top), number);
            // Only the top may be smaller or larger than a table.
            let root = format.geometry().table_bytes(top) as u64;
            assert!(tables == 1 || root == u64::from(tables) * granule.bytes(), "{granule:?}, {bits} bits");
        }
    }
}

#[test]
fn every_width_has_a_root_of_at_most_sixteen_tables() {
    for granule in [Granule::K4, Granule::K16, Granule::K64] {
        for bits in 32..=52 {
            for start in [Start::FewestLevels, Start::SingleTable] {
                let wide = bits > 48;
                let lpa2 = wide && granule != Granule::K64;
                let physical_bits = if wide { 52 } else { 48 };
                let format = Stage2::new(Stage2Options { ipa_bits: bits, physical_bits, lpa2, start, ..of(granule) });
                let format = match (granule, bits, start) {
                    // A single table of 16K would have to begin at level 0, which needs LPA2.
                    (Granule::K16, 48, Start::SingleTable) => {
                        assert_eq!(format.unwrap_err(), OptionsError::StartLevel { granule, number: 0 });
                        continue;
                    }
                    _ => format.unwrap(),
                };
                assert!(format.concatenated() <= 16);
                assert!(start == Start::FewestLevels || format.concatenated() == 1, "{granule:?}, {bits} bits");
                assert_eq!(format.geometry().address_bits(), u32::from(bits));
            }
        }
    }
    let deepest = Stage2Options { ipa_bits: 52, physical_bits: 52, lpa2: true, ..of(Granule::K4) };
    let deepest = stage2(Stage2Options { start: Start::SingleTable, ..deepest });
    assert_eq!((deepest.start_level(), deepest.geometry().level(deepest.geometry().top()).bits), (-1, 4));
}

#[test]
fn a_start_that_does_not_fit_is_refused() {
    let start = |granule, bits, number| {
        Stage2::new(Stage2Options { ipa_bits: bits, start: Start::Level(number), ..of(granule) }).map(drop)
    };
    assert_eq!(start(Granule::K4, 40, 1), Ok(()));
    assert_eq!(start(Granule::K4, 40, 0), Ok(()), "two entries");
    let inconsistent = |number, least, most, bits| Err(OptionsError::InconsistentStart { bits, number, least, most });
    assert_eq!(start(Granule::K4, 39, 0), inconsistent(0, 40, 52, 39));
    assert_eq!(start(Granule::K4, 44, 1), inconsistent(1, 31, 43, 44));
    assert_eq!(start(Granule::K4, 35, 2), inconsistent(2, 22, 34, 35));
    assert_eq!(start(Granule::K16, 41, 2), inconsistent(2, 26, 40, 41));
    assert_eq!(start(Granule::K64, 47, 2), inconsistent(2, 30, 46, 47));
    for (granule, number) in [(Granule::K4, -1), (Granule::K16, 0), (Granule::K64, 0), (Granule::K4, 4)] {
        assert_eq!(start(granule, 48, number), Err(OptionsError::StartLevel { granule, number }));
    }
    let bits = |ipa_bits, physical_bits, lpa2, granule| {
        Stage2::new(Stage2Options { ipa_bits, physical_bits, lpa2, ..of(granule) }).map(drop)
    };
    assert_eq!(bits(49, 48, false, Granule::K4), Err(OptionsError::IpaBits { bits: 49, most: 48 }));
    assert_eq!(bits(31, 48, false, Granule::K4), Err(OptionsError::IpaBits { bits: 31, most: 48 }));
    assert_eq!(bits(49, 48, false, Granule::K64), Err(OptionsError::IpaBits { bits: 49, most: 48 }));
    assert_eq!(bits(48, 52, false, Granule::K16), Err(OptionsError::PhysicalBits { bits: 52, most: 48 }));
    assert_eq!(bits(48, 52, true, Granule::K64), Err(OptionsError::Lpa2));
    assert_eq!(bits(53, 52, true, Granule::K4), Err(OptionsError::IpaBits { bits: 53, most: 52 }));
}

#[test]
fn addresses_are_cut_into_the_manuals_indices() {
    let index = |granule, number, address| {
        let format = stage2(Stage2Options { ipa_bits: 40, ..of(granule) });
        format.geometry().index(level(number), address)
    };
    let address = 0x12_3456_7000;
    assert_eq!([1, 2, 3].map(|n| index(Granule::K4, n, address)), [0x48, 0x1a2, 0x167]);
    // 16K begins at level 2 with 16 tables here: table 1, entry 0x11a.
    assert_eq!([2, 3].map(|n| index(Granule::K16, n, address)), [(1 << 11) + 0x11a, 0x159]);
    assert_eq!([2, 3].map(|n| index(Granule::K64, n, address)), [0x91, 0x1456]);
    let last = 0xff_ffff_ffff;
    assert_eq!(index(Granule::K16, 2, last), (15 << 11) + 2047);
    assert_eq!(index(Granule::K4, 1, last), (1 << 9) + 511);
}

#[test]
fn blocks_are_where_the_architecture_has_them() {
    let sizes = |options: Stage2Options| {
        let format = stage2(options);
        let levels = (-1..=3).rev().filter_map(|number| format.level_of(number));
        let leaves: Vec<u64> = levels
            .filter(|level| format.geometry().level(*level).leaf)
            .map(|level| format.geometry().span(level))
            .collect();
        leaves
    };
    let at = |granule| Stage2Options { ipa_bits: 48, ..of(granule) };
    let wide = |granule, lpa2| Stage2Options { ipa_bits: 52, physical_bits: 52, lpa2, ..of(granule) };
    assert_eq!(sizes(at(Granule::K4)), [4 << 10, 2 << 20, 1 << 30]);
    assert_eq!(sizes(at(Granule::K16)), [16 << 10, 32 << 20]);
    assert_eq!(sizes(at(Granule::K64)), [64 << 10, 512 << 20]);
    assert_eq!(sizes(wide(Granule::K4, true)), [4 << 10, 2 << 20, 1 << 30, 512 << 30]);
    assert_eq!(sizes(wide(Granule::K16, true)), [16 << 10, 32 << 20, 64 << 30]);
    assert_eq!(sizes(wide(Granule::K64, false)), [64 << 10, 512 << 20, 4 << 40]);
}
