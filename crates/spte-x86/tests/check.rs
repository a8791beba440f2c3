// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reserved bits and misconfigurations, rule by rule.

mod common;

use common::{L1, level};
use notifier_core::{Access, OutputAddr};
use spte_core::format::{Format, LeafSpec};
use spte_x86::*;

fn ept(execute_only: bool) -> Ept {
    Ept::new(EptOptions { execute_only, physical_bits: 46, ..EptOptions::default() }).unwrap()
}

fn ept_leaf() -> u64 {
    ept(true).leaf(L1, &common::spec(0x20_0000, Access::RWX)).unwrap()
}

fn npt() -> Npt {
    Npt::new(LongModeOptions { physical_bits: 46, ..LongModeOptions::default() }).unwrap()
}

/// Linux keeps one bit for each value of bits 5:0 of a leaf that is a misconfiguration (`bad_mt_xwr`).
#[test]
fn bad_set_of_low_six_bits() {
    for (execute_only, bad) in [(true, 0xff44_4444_ffff_4444_u64), (false, 0xff54_5454_ffff_5454)] {
        let format = ept(execute_only);
        for low in 0..64_u64 {
            let raw = 0x20_0000 | low;
            // Linux asks only about entries that are present.
            let expected = low & 7 != 0 && bad & (1 << low) != 0;
            assert_eq!(format.check_hardware(L1, raw).is_err(), expected, "{low:#o}, execute-only {execute_only}");
            assert_eq!(format.check_hardware(level(2), raw | 0x80).is_err(), expected, "{low:#o} at 2M");
        }
    }
}

#[test]
fn ept_reserved_bits_of_each_level() {
    let format = ept(true);
    let broken = |n, raw| format.check_hardware(level(n), raw).err().map(|why| why.bits);
    for n in 2..=5 {
        assert_eq!(broken(n, 0x7007), None);
        for bit in 3..=6 {
            assert_eq!(broken(n, 0x7007 | 1 << bit), Some(1 << bit), "bit {bit} of a link at level {n}");
        }
        // Ignored in links: 8 to 11, and everything from 52.
        assert_eq!(broken(n, 0xfff0_0000_0000_7f07), None);
    }
    for n in 4..=5 {
        assert_eq!(broken(n, 0x87), Some(0x80), "bit 7 at level {n}");
    }
    for n in 1..=3 {
        let size = if n == 1 { 0 } else { 0x80 };
        for bit in 46..52 {
            assert_eq!(broken(n, 0x37 | size | 1 << bit), Some(1 << bit), "above MAXPHYADDR");
        }
        for bit in 12..12 + 9 * (u32::from(n) - 1) {
            assert_eq!(broken(n, 0x37 | size | 1 << bit), Some(1 << bit), "bit {bit} at level {n}");
        }
        assert_eq!(broken(n, 0xfff0_0000_0000_0f77 | size), None, "ignored in leaves");
    }
    assert_eq!(broken(1, 0x00b7), None, "bit 7 of a 4K leaf is ignored");
    let without = Ept::new(EptOptions { pages_1g: false, pages_2m: false, ..EptOptions::default() }).unwrap();
    assert_eq!(without.check_hardware(level(3), 0xb7).unwrap_err().bits, 0x80);
    assert_eq!(without.check_hardware(level(2), 0xb7).unwrap_err().bits, 0x80);
    // Not present: all is ignored.
    assert_eq!(broken(3, 0xffff_ffff_ffff_fff8), None);
}

#[test]
fn user_execute_needs_read() {
    let options = EptOptions { mode_based_execute: true, ..EptOptions::default() };
    let format = Ept::new(options).unwrap();
    assert_eq!(format.check_hardware(L1, 0x7430).unwrap_err().bits, 0x400);
    assert_eq!(format.check_hardware(L1, 0x7431), Ok(()));
    assert_eq!(ept(true).check_hardware(L1, 0x7430), Ok(()), "without the control it is not present");
}

#[test]
fn long_mode_reserved_bits_of_each_level() {
    let format = npt();
    let broken = |n, raw| format.check_hardware(level(n), raw).err().map(|why| why.bits);
    for n in 4..=5 {
        assert_eq!(broken(n, 0x70a7), Some(0x80), "bit 7 at level {n}");
        assert_eq!(broken(n, 0x7127), Some(0x100), "bit 8 of a link at level {n}");
    }
    assert_eq!((broken(2, 0x7127), broken(3, 0x7127)), (None, None), "bit 8 of lower links is ignored");
    for n in 1..=5 {
        for bit in 46..52 {
            assert_eq!(broken(n, 0x27 | 1 << bit), Some(1 << bit));
        }
        assert_eq!(broken(n, 0xfff0_0000_0000_7e27), None, "software, keys and NX");
        assert_eq!(broken(n, 0x7023), Some(4), "U/S of nested entries");
    }
    for bit in 13..21 {
        assert_eq!(broken(2, 0xa7 | 1 << bit), Some(1 << bit));
    }
    for bit in 13..30 {
        assert_eq!(broken(3, 0xa7 | 1 << bit), Some(1 << bit));
    }
    assert_eq!((broken(2, 0x10a7), broken(3, 0x10a7)), (None, None), "bit 12 is PAT");
    let options = LongModeOptions {
        no_execute: false,
        pages_1g: false,
        link_global_reserved: false,
        ..LongModeOptions::default()
    };
    let plain = LongMode::new(options).unwrap();
    assert_eq!(plain.check_hardware(L1, 0x8000_0000_0000_7027).unwrap_err().bits, 1 << 63);
    assert_eq!(plain.check_hardware(level(3), 0xa7).unwrap_err().bits, 0x80);
    assert_eq!(plain.check_hardware(level(3), 0x7127), Ok(()));
    assert_eq!(plain.check_hardware(L1, 0x7023), Ok(()), "supervisor pages are none of NPT's");
}

#[test]
fn impossible_write_states_are_refused() {
    // (host, mmu, W)
    let possible = [(1, 1, 1), (1, 1, 0), (1, 0, 0), (0, 0, 0)];
    let npt_leaf = npt().leaf(L1, &common::spec(0x7000, Access::RWX)).unwrap();
    for (host, mmu, write) in (0..8_u64).map(|n| (n >> 2 & 1, n >> 1 & 1, n & 1)) {
        let expected = possible.contains(&(host, mmu, write));
        let raw = (ept_leaf() & !(3 << 57 | 2)) | host << 57 | mmu << 58 | write << 1;
        assert_eq!(ept(true).check(L1, raw).is_ok(), expected, "{raw:#x}");
        assert_eq!(ept(true).write_state(raw).is_some(), expected);
        let raw = (npt_leaf & !0x602) | host << 9 | mmu << 10 | write << 1;
        assert_eq!(npt().check(L1, raw).is_ok(), expected, "{raw:#x}");
        assert_eq!(npt().write_state(raw).is_some(), expected);
    }
}

#[test]
fn ept_software_rules() {
    let format = ept(true);
    let broken = |n, raw| format.check(level(n), raw).err().map(|why| why.bits);
    let leaf = ept_leaf();
    let link = format.table(level(2), OutputAddr::new(0x7000)).unwrap();
    assert_eq!((broken(1, leaf), broken(2, link)), (None, None));
    assert_eq!(broken(1, leaf & !0x800), Some(7), "present without MMU-present");
    assert_eq!(broken(1, leaf & !7), Some(0x800), "MMU-present without rights");
    assert_eq!(broken(1, leaf | 1 << 52), Some(3 << 52), "another table's type");
    assert_eq!(broken(1, leaf | 3 << 52), Some(3 << 52), "no such type");
    assert_eq!(broken(1, leaf & !(1 << 63)), Some(1 << 63), "suppress-#VE");
    assert_eq!(broken(1, leaf | 1 << 54), Some(1 << 54), "saved rights of a leaf that has its own");
    assert_eq!(broken(1, leaf | 1 << 59), Some(1 << 59), "a fact that bit 9 holds");
    assert_eq!(broken(1, leaf | 1 << 62), Some(1 << 62), "nothing is withheld at 4K");
    assert_eq!(broken(1, leaf & !3), Some(1 << 58), "armed, and not readable");
    assert_eq!(broken(2, link | 1 << 57), Some(1 << 57), "a link is not host-writable");
    assert_eq!(broken(2, link & !7), Some(0x800), "a link without rights");
    assert_eq!(broken(1, leaf | 1 << 55), None, "a claimed leaf");
    assert_eq!(broken(1, 0x8000_0000_0000_05a0), None, "not present, some note");
    assert_eq!(broken(1, 0), None);
    let why = format.check(L1, leaf & !0x800).unwrap_err();
    assert_eq!((why.raw, why.number), (leaf & !0x800, 1));

    let nx = Ept::new(EptOptions { nx_huge_pages: true, ..EptOptions::default() }).unwrap();
    let huge = format.leaf(level(2), &common::spec(0x20_0000, Access::RWX)).unwrap();
    assert_eq!(nx.check(level(2), huge).unwrap_err().bits, 4, "executable huge leaf");
    let withheld = nx.leaf(level(2), &common::spec(0x20_0000, Access::RWX)).unwrap();
    assert_eq!(nx.check(level(2), withheld), Ok(()));
    assert_eq!(broken(2, withheld), Some(1 << 62), "withheld where nothing is");
    let tracking = common::ept(AccessedDirty::Disabled);
    let read_only = LeafSpec { accessed: false, dirty: false, ..common::spec(0, Access::READ) };
    let tracked = tracking.leaf(L1, &read_only).unwrap();
    assert_eq!(tracking.check(L1, tracked), Ok(()));
    assert!(tracking.check(L1, tracked & !(5 << 54)).is_err(), "nothing saved");
    let large = tracking.leaf(level(2), &read_only).unwrap();
    assert_eq!(tracking.check(level(2), large), Ok(()));
    let misaligned = tracking.check(level(2), large | 0x1000).unwrap_err();
    assert_eq!((misaligned.raw, misaligned.bits), (large | 0x1000, 0x1000), "what would be refused once it is young");
    let options = EptOptions { mode_based_execute: true, ..EptOptions::default() };
    let both = Ept::new(options).unwrap();
    let leaf = both.leaf(L1, &common::spec(0, Access::RWX)).unwrap();
    assert_eq!(both.check(L1, leaf & !4).unwrap_err().bits, 0x404);
}

#[test]
fn long_mode_software_rules() {
    let format = npt();
    let broken = |n, raw| format.check(level(n), raw).err().map(|why| why.bits);
    let leaf = format.leaf(level(2), &common::spec(0x20_0000, Access::RWX)).unwrap();
    let link = format.table(level(2), OutputAddr::new(0x7000)).unwrap();
    assert_eq!((broken(2, leaf), broken(2, link)), (None, None));
    assert_eq!(broken(2, leaf & !1), Some(0x801), "MMU-present without P");
    assert_eq!(broken(2, leaf & !0x800), Some(0x801), "P without MMU-present");
    assert_eq!(broken(2, link | 0x200), Some(0x200), "a link is not host-writable");
    assert_eq!(broken(2, leaf | 1 << 54), Some(1 << 54), "withheld, and executable");
    assert_eq!(broken(2, leaf | 1 << 55), None, "a claimed leaf");
    let options = LongModeOptions { nx_huge_pages: true, ..LongModeOptions::default() };
    let nx = Npt::new(options).unwrap();
    assert_eq!(nx.check(level(2), leaf).unwrap_err().bits, 1 << 63);
    let withheld = nx.leaf(level(2), &common::spec(0x20_0000, Access::RWX)).unwrap();
    assert_eq!(nx.check(level(2), withheld), Ok(()));
    assert_eq!(broken(2, withheld), Some(1 << 54), "withheld where nothing is");
}
