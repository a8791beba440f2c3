// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The walker's registers: values worked out by hand, and what is refused.

mod common;

use common::*;
use notifier_core::OutputAddr;
use proptest::prelude::*;
use spte_core::Format;
use spte_mips::registers::Index;
use spte_mips::*;

fn values(options: GpaOptions) -> (u64, u64) {
    let shape = WalkShape::new(&table(options));
    let field = PwField::new(&shape, Processor::Bits64).unwrap();
    let size = PwSize::new(&shape, Processor::Bits64).unwrap();
    assert_eq!(size.shape(field), shape);
    (field.raw(), size.raw())
}

#[test]
fn walker_registers_are_as_worked_out_by_hand() {
    // GDI 30, UDI 12, MDI 21, PTI 12, PTEI 7; PS, GDW 10, MDW 9, PTW 9.
    let huge = GpaOptions { layout: PteLayout::Huge, ..GpaOptions::default() };
    assert_eq!(values(huge), (0x1e31_5307, 0x4a00_9240));
    // GDI 25, PTI 14, PTEI 6; PS, GDW 11, PTW 11.
    assert_eq!(values(of(PageSize::K16, Width::Standard)), (0x1930_c386, 0x4b00_02c0));
    // GDI 42, MDI 29, PTI 16, PTEI 6; PS, GDW 13, MDW 13, PTW 13.
    assert_eq!(values(of(PageSize::K64, Width::Wide)), (0x2a31_d406, 0x4d00_d340));
    // GDI 39, UDI 30, MDI 21, PTI 12, PTEI 6; PS and four times 9.
    assert_eq!(values(of(PageSize::K4, Width::Wide)), (0x2779_5306, 0x4924_9240));
    assert_eq!(PwCtl::new(Processor::Bits64).raw(), 0x8400_0000);
    assert_eq!(PwCtl::new(Processor::Bits64).stopped().raw(), 0x400_0000);
    assert!(!PwCtl::new(Processor::Bits64).has_huge_pages());
    // A 32-bit kernel: two levels of 10 bits, GDI 22, PTI 12, PTEI 6.
    let shape = WalkShape {
        base: Index::NONE,
        global: Index { low: 22, bits: 10 },
        upper: Index::NONE,
        middle: Index::NONE,
        table: Index { low: 12, bits: 10 },
        entry_shift: 6,
        wide_entries: false,
        wide_pointers: false,
    };
    let field = PwField::new(&shape, Processor::Bits32).unwrap();
    let size = PwSize::new(&shape, Processor::Bits32).unwrap();
    assert_eq!((field.raw(), size.raw()), (0x1630_c306, 0xa00_0280));
    assert_eq!(size.shape(field), shape);
    // With entries of two words.
    let shape = WalkShape { wide_entries: true, table: Index { low: 12, bits: 9 }, ..shape };
    assert_eq!(PwSize::new(&shape, Processor::Bits32).unwrap().raw(), 0xa00_0241);
    assert_eq!(PwCtl::new(Processor::Bits32).raw(), 0x8000_0000);
    // A base directory, on a 64-bit processor.
    let shape = WalkShape { base: Index { low: 48, bits: 7 }, ..WalkShape::new(&table(of(PageSize::K4, Width::Wide))) };
    let field = PwField::new(&shape, Processor::Bits64).unwrap();
    let size = PwSize::new(&shape, Processor::Bits64).unwrap();
    assert_eq!((field.raw(), size.raw()), (0x30_2779_5306, 0x7_4924_9240));
    assert_eq!(size.shape(field), shape);
    assert_eq!(PwField::from_raw(PwField::RESET, Processor::Bits32).unwrap().raw(), 0x0c30_c302);
}

#[test]
fn an_index_below_twelve_is_refused() {
    for (low, name) in [(24, "GDI"), (18, "UDI"), (12, "MDI"), (6, "PTI"), (32, "BDI")] {
        for value in [0, 1, 11] {
            let raw = (PwField::RESET | 12 << 32) & !(0x3f << low) | value << low;
            let found = PwField::from_raw(raw, Processor::Bits64);
            if (name, value) == ("BDI", 0) {
                assert!(found.is_ok(), "as after a reset");
            } else {
                assert_eq!(found, Err(RegisterError::Index { raw, field: name, value: value as u8 }));
            }
        }
    }
    for ptei in [0, 1, 32, 63] {
        let raw = PwField::RESET & !0x3f | ptei;
        assert_eq!(PwField::from_raw(raw, Processor::Bits64), Err(RegisterError::Field { raw, field: "PTEI" }));
    }
}

#[test]
fn what_walks_nothing_is_refused() {
    for (raw, field) in [(0x4a00_9242, "PTEW"), (0x4000_0240, "GDW, UDW and MDW"), (0x4a00_9000, "PTW")] {
        assert_eq!(PwSize::from_raw(raw, Processor::Bits64), Err(RegisterError::Field { raw, field }));
    }
    assert_eq!(
        PwSize::from_raw(0x4a00_9240, Processor::Bits32),
        Err(RegisterError::Reserved { raw: 0x4a00_9240, bits: 0x4000_0000 })
    );
    assert_eq!(
        PwField::from_raw(0x5e31_5307, Processor::Bits64),
        Err(RegisterError::Reserved { raw: 0x5e31_5307, bits: 0x4000_0000 })
    );
    assert_eq!(
        PwCtl::from_raw(0x8400_0000, Processor::Bits32),
        Err(RegisterError::Reserved { raw: 0x8400_0000, bits: 0x400_0000 })
    );
    assert_eq!(
        PwCtl::from_raw(0x8400_0100, Processor::Bits64),
        Err(RegisterError::Reserved { raw: 0x8400_0100, bits: 0x100 })
    );
}

#[test]
fn what_is_at_the_edge_is_taken() {
    for ptei in [2, 31] {
        let raw = PwField::RESET & !0x3f | ptei;
        assert_eq!(PwField::from_raw(raw, Processor::Bits64).map(PwField::raw), Ok(raw));
    }
    // One level of directories, whichever.
    for raw in [0x4900_0240, 0x4024_0240, 0x4000_9240] {
        assert_eq!(PwSize::from_raw(raw, Processor::Bits64).map(PwSize::raw), Ok(raw));
    }
    let reserved = |raw, bits| RegisterError::Reserved { raw, bits };
    assert_eq!(PwSize::from_raw(0x40_4a00_9240, Processor::Bits64), Err(reserved(0x40_4a00_9240, 0x40_0000_0000)));
    assert_eq!(PwSize::from_raw(0xca00_9240, Processor::Bits64), Err(reserved(0xca00_9240, 0x8000_0000)));
    assert_eq!(PwField::from_raw(0x5e31_5307, Processor::Bits32), Err(reserved(0x5e31_5307, 0x4000_0000)));
    assert_eq!(PwField::from_raw(0xc_1e31_5307, Processor::Bits32), Err(reserved(0xc_1e31_5307, 0xc_0000_0000)));
    // Of PWCtl: XK 28, XS 27, XU 26, DirExt 30; DPH 7, HugePg 6.
    let bits = [PwCtl::BASE_DIRECTORY, PwCtl::KERNEL, PwCtl::SUPERVISOR, PwCtl::USER, PwCtl::DUAL_HUGE, PwCtl::HUGE];
    assert_eq!(bits.map(u64::trailing_zeros), [30, 28, 27, 26, 7, 6]);
    assert_eq!(PwCtl::from_raw(0xdc00_00ff, Processor::Bits64).map(PwCtl::raw), Ok(0xdc00_00ff));
    assert!(PwCtl::from_raw(0x40, Processor::Bits32).unwrap().has_huge_pages());
    for bit in [8, 25, 29] {
        let raw = 1 << bit;
        assert_eq!(PwCtl::from_raw(raw, Processor::Bits64), Err(reserved(raw, raw)));
    }
}

#[test]
fn what_six_bits_do_not_hold_is_refused_and_goes_into_no_neighbour() {
    let good = WalkShape::new(&table(of(PageSize::K4, Width::Wide)));
    let good = WalkShape { base: Index { low: 48, bits: 7 }, ..good };
    let wide = |index: Index| [Index { low: 64, ..index }, Index { bits: 64, ..index }];
    for at in 0..2 {
        for (shape, field) in [
            (WalkShape { base: wide(good.base)[at], ..good }, ["BDI", "BDW"]),
            (WalkShape { global: wide(good.global)[at], ..good }, ["GDI", "GDW"]),
            (WalkShape { upper: wide(good.upper)[at], ..good }, ["UDI", "UDW"]),
            (WalkShape { middle: wide(good.middle)[at], ..good }, ["MDI", "MDW"]),
            (WalkShape { table: wide(good.table)[at], ..good }, ["PTI", "PTW"]),
        ] {
            let refused = Err(RegisterError::Field { raw: 64, field: field[at] });
            let found = [
                PwField::new(&shape, Processor::Bits64).map(PwField::raw),
                PwSize::new(&shape, Processor::Bits64).map(PwSize::raw),
            ];
            assert_eq!(found[at], refused);
            assert!(found[1 - at].is_ok());
        }
    }
    let shape = WalkShape { entry_shift: 64, ..good };
    let refused = RegisterError::Field { raw: 64, field: "PTEI" };
    assert_eq!(PwField::new(&shape, Processor::Bits64), Err(refused));
}

#[test]
fn the_root_is_an_address_in_xkphys() {
    let format = table(GpaOptions::default());
    // 1024 entries: two pages.
    let base = PwBase::new(&format, OutputAddr::new(0x1234_4000)).unwrap();
    assert_eq!((base.raw(), base.root()), (0x9800_0000_1234_4000, OutputAddr::new(0x1234_4000)));
    let root = OutputAddr::new(0x1234_5000);
    assert_eq!(PwBase::new(&format, root), Err(RegisterError::Unaligned { root, align: 0x2000 }));
    let root = OutputAddr::new(1 << 48);
    assert_eq!(PwBase::new(&format, root), Err(RegisterError::TooWide { root, bits: 48 }));
    // Two pages, of which the second is the first sentinel; and where it is the last.
    let format = table(GpaOptions { sentinels: OutputAddr::new(0x1234_5000), ..GpaOptions::default() });
    for root in [0x1234_4000, 0x1234_a000].map(OutputAddr::new) {
        assert_eq!(PwBase::new(&format, root), Err(RegisterError::Sentinels { root }));
    }
    for root in [0x1234_2000, 0x1234_c000].map(OutputAddr::new) {
        assert_eq!(PwBase::new(&format, root).map(PwBase::root), Ok(root));
    }
    assert_eq!(PwBase::from_raw(0xffff_ffff_8012_0000).unwrap().root(), OutputAddr::new(0x12_0000));
    assert_eq!(PwBase::from_raw(0x12_0000), Err(RegisterError::Mapped { raw: 0x12_0000 }));
}

proptest! {
    #[test]
    fn registers_come_back(format in any_format(), raw in any::<u64>(), wide in any::<bool>()) {
        let shape = WalkShape::new(&format);
        let field = PwField::new(&shape, Processor::Bits64).unwrap();
        let size = PwSize::new(&shape, Processor::Bits64).unwrap();
        prop_assert_eq!(size.shape(field), shape);
        prop_assert_eq!(u32::from(shape.global.low + shape.global.bits), format.geometry().address_bits());
        let processor = if wide { Processor::Bits64 } else { Processor::Bits32 };
        for raw in [raw, raw & 0x3fff_ffff, raw | 0x0c30_c30c] {
            if let (Ok(field), Ok(size)) = (PwField::from_raw(raw, processor), PwSize::from_raw(raw, processor)) {
                let shape = size.shape(field);
                prop_assert_eq!(PwSize::new(&shape, processor), Ok(size));
                let again = PwField::new(&shape, processor).unwrap();
                // BDI counts for nothing without BDW.
                prop_assert_eq!(again.raw() & 0x3fff_ffff, field.raw() & 0x3fff_ffff);
            }
            if let Ok(control) = PwCtl::from_raw(raw, processor) {
                prop_assert_eq!(control.raw(), raw);
            }
        }
    }
}
