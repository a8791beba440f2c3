// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Encodings and shapes that were worked out by hand from the field tables, and their images in memory.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use spte_core::format::{Format, LeafSpec, Level};
use spte_ppc::software::{UPGRADABLE, USER};
use spte_ppc::*;

const MASK: u64 = !(UPGRADABLE | USER);

fn leaf(format: &Radix, number: u8, output: u64, access: Access, storage: Storage, dirty: bool) -> u64 {
    let spec = LeafSpec { dirty, attrs: RadixAttrs::default().storage(storage), ..spec(output, access) };
    format.leaf(level(number), &spec).unwrap() & MASK
}

#[test]
fn leaves_are_as_worked_out_by_hand() {
    let [k4, k64] = both();
    let normal = Storage::Normal;
    assert_eq!(leaf(&k4, 1, 0x1_2345_6000, Access::RWX, normal, true), 0xc000_0001_2345_6187);
    assert_eq!(leaf(&k4, 1, 0x1_2345_6000, Access::RX, normal, false), 0xc000_0001_2345_6105);
    assert_eq!(leaf(&k64, 1, 0x1_2345_0000, Access::READ, normal, false), 0xc000_0001_2345_0104);
    assert_eq!(leaf(&k64, 2, 0x4020_0000, Access::RWX, normal, true), 0xc000_0000_4020_0187);
    assert_eq!(leaf(&k4, 3, 0x40_0000_0000, Access::READ, normal, false), 0xc000_0040_0000_0104);
    let rw = Access::READ | Access::WRITE;
    assert_eq!(leaf(&k4, 1, 0x8000_1000, rw, Storage::NonIdempotent, false), 0xc000_0000_8000_1126);
    assert_eq!(leaf(&k4, 1, 0x8000_1000, rw, Storage::Tolerant, false), 0xc000_0000_8000_1136);
    assert_eq!(leaf(&k4, 1, 0x8000_1000, rw, Storage::StrongOrder, false), 0xc000_0000_8000_1116);
    assert_eq!(leaf(&k4, 1, 0x8000_1000, Access::empty(), normal, false), 0xc000_0000_8000_1100);
    assert_eq!(leaf(&k4, 1, 0x8000_1000, Access::EXECUTE, normal, false), 0xc000_0000_8000_1101);
    // Software's: what may be written is upgradable, in IBM bit 52; the user's is 53.
    assert_eq!(k4.leaf(level(1), &spec(0, rw)), Ok(0xc000_0000_0000_0906));
    assert_eq!(k4.leaf(level(1), &LeafSpec { armed: true, ..spec(0, rw) }), Ok(0xc000_0000_0000_0904));
    let software = RadixAttrs { software: true, ..RadixAttrs::default() };
    assert_eq!(k4.leaf(level(1), &LeafSpec { attrs: software, ..spec(0, Access::READ) }), Ok(0xc000_0000_0000_0504));
    // The widest: RPN has 57 bits.
    let wide = Radix::new(RadixOptions { physical_bits: 57, ..of(BasePage::K4) }).unwrap();
    assert_eq!(leaf(&wide, 1, 0x1ff_ffff_ffff_f000, Access::READ, normal, false), 0xc1ff_ffff_ffff_f104);
}

#[test]
fn links_are_as_worked_out_by_hand() {
    let [k4, k64] = both();
    let link = |format: &Radix, number, to| format.table(level(number), OutputAddr::new(to));
    assert_eq!(link(&k4, 2, 0x3456_7000), Ok(0x8000_0000_3456_7009));
    assert_eq!(link(&k64, 2, 0x3456_7100), Ok(0x8000_0000_3456_7105));
    assert_eq!(link(&k64, 3, 0x3456_7000), Ok(0x8000_0000_3456_7009));
    assert_eq!(link(&k64, 4, 0x3456_7000), Ok(0x8000_0000_3456_7009));
    assert!(link(&k4, 2, 0x3456_7100).is_err(), "512 entries are aligned to 4K");
    assert!(link(&k64, 2, 0x3456_7080).is_err());
    assert!(link(&k64, 3, 0x3456_7100).is_err());
}

#[test]
fn tables_of_256_bytes_lie_at_every_multiple() {
    let format = radix(BasePage::K64);
    assert_eq!(format.geometry().table_bytes(level(1)), 256);
    for base in (0x3456_0000_u64..0x3456_1000).step_by(256) {
        let raw = format.table(level(2), OutputAddr::new(base)).unwrap();
        assert_eq!(raw, 0x8000_0000_0000_0005 | base);
        assert_eq!(format.kind(level(2), raw), spte_core::format::Kind::Table(OutputAddr::new(base)));
        assert_eq!(format.hardware_kind(level(2), raw), HardwareKind::Table(OutputAddr::new(base)));
    }
}

#[test]
fn addresses_are_cut_as_worked_out_by_hand() {
    let cut = |format: &Radix, gpa| [4, 3, 2, 1].map(|number| format.geometry().index(level(number), gpa));
    let [k4, k64] = both();
    assert_eq!(cut(&k4, 0x1_2345_6789_a000), [0x246, 0x115, 0x13c, 0x9a]);
    assert_eq!(cut(&k64, 0x1_2345_6789_a000), [0x246, 0x115, 0x13c, 0x9]);
    assert_eq!(cut(&k4, (1 << 52) - 1), [0x1fff, 0x1ff, 0x1ff, 0x1ff]);
    assert_eq!(cut(&k64, (1 << 52) - 1), [0x1fff, 0x1ff, 0x1ff, 0x1f]);
}

#[test]
fn there_is_one_shape_of_tree_for_each_base_page() {
    for (format, leaf_bytes) in both().into_iter().zip([0x1000, 0x100]) {
        let geometry = format.geometry();
        let bytes = [4, 3, 2, 1].map(|number| geometry.table_bytes(level(number)));
        assert_eq!(bytes, [0x1_0000, 0x1000, 0x1000, leaf_bytes]);
        assert_eq!([1, 2, 3, 4].map(|number| geometry.level(level(number)).leaf), [true, true, true, false]);
        assert_eq!([2, 3].map(|number| geometry.span(level(number))), [2 << 20, 1 << 30]);
        assert_eq!((geometry.address_bits(), geometry.top()), (52, level(4)));
        assert_eq!([1, 2, 3, 4].map(|number| format.level_number(level(number))), [1, 2, 3, 4]);
        assert_eq!([0, 1, 4, 5].map(|number| format.level_of(number)), [None, Some(level(1)), Some(level(4)), None]);
    }
}

#[test]
fn entries_are_big_endian_in_memory() {
    let format = radix(BasePage::K64);
    let image = |raw: u64| format.memory_of(raw).to_ne_bytes();
    assert_eq!(image(0xc000_0001_2345_0187), [0xc0, 0, 0, 1, 0x23, 0x45, 0x01, 0x87]);
    assert_eq!(image(0x8000_0000_3456_7105), [0x80, 0, 0, 0, 0x34, 0x56, 0x71, 0x05]);
    assert_eq!(format.raw_of(u64::from_ne_bytes([0x80, 0, 0, 0, 0x34, 0x56, 0x71, 0x05])), 0x8000_0000_3456_7105);
    assert_eq!(image(format.not_present(Level::LEAF).absent), [0; 8], "a zeroed page is an empty table");
}

#[test]
fn options_that_no_machine_has_are_refused() {
    for bits in [0, 31, 58, 255] {
        let options = RadixOptions { physical_bits: bits, ..RadixOptions::default() };
        assert_eq!(Radix::new(options).unwrap_err(), OptionsError::PhysicalBits { bits });
    }
    assert_eq!(BasePage::from_bytes(0x4000), None);
    assert_eq!([0x1000, 0x1_0000].map(BasePage::from_bytes), [Some(BasePage::K4), Some(BasePage::K64)]);
}
