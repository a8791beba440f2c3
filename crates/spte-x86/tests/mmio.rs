// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MMIO entries.

mod common;

use common::L1;
use notifier_core::Gpa;
use proptest::prelude::*;
use spte_core::format::{Format, Kind};
use spte_x86::*;

fn ept(physical_bits: u8, l1tf_cache_bits: Option<u8>) -> MmioLayout {
    *Ept::new(EptOptions { physical_bits, l1tf_cache_bits, ..EptOptions::default() }).unwrap().mmio()
}

fn npt(physical_bits: u8, l1tf_cache_bits: Option<u8>) -> MmioLayout {
    let options = LongModeOptions { physical_bits, l1tf_cache_bits, ..LongModeOptions::default() };
    *Npt::new(options).unwrap().mmio().unwrap()
}

const USER_WRITE: MmioAccess = MmioAccess { write: true, user: true };

#[test]
fn mmio_entries_by_hand() {
    let gpa = Gpa::new(0xfee0_0000);
    // Generation 0x12345: low byte 0x45 in 10:3 gives 0x228, 0x123 in 62:52.
    let generation = SlotGeneration::new(0x1_2345);
    assert_eq!(ept(52, None).encode(gpa, USER_WRITE, generation), Ok(0x1230_0000_fee0_022e));
    assert_eq!(npt(48, None).encode(gpa, USER_WRITE, generation), Ok(0x1238_0000_fee0_022f));
    assert_eq!(npt(48, None).encode(gpa, MmioAccess::default(), generation), Ok(0x1238_0000_fee0_0229));
    // All 19 bits.
    let all = SlotGeneration::new(0x7_ffff);
    assert_eq!(ept(52, None).encode(Gpa::new(0), USER_WRITE, all), Ok(0x7ff0_0000_0000_07fe));
}

#[test]
fn l1tf_hides_five_bits_and_keeps_them_five_higher() {
    let layout = ept(46, Some(46));
    assert_eq!(layout.hidden_bits(), 0x3e00_0000_0000);
    // Bits 45 and 41 of the address go to 50 and 46; all of 45:41 are set.
    let raw = layout.encode(Gpa::new(0x2200_0000_1000), USER_WRITE, SlotGeneration::new(0)).unwrap();
    assert_eq!(raw, 0x0004_7e00_0000_1006);
    assert_eq!(layout.decode(raw).unwrap().gpa, Gpa::new(0x2200_0000_1000));
    // From 47 on there is no room, and no CPU that needs it.
    assert_eq!(ept(52, Some(47)).hidden_bits(), 0);
}

#[test]
fn addresses_that_do_not_fit_are_refused() {
    let generation = SlotGeneration::new(1);
    assert_eq!(
        ept(40, None).encode(Gpa::new(1 << 40), USER_WRITE, generation),
        Err(MmioError::TooWide { gpa: Gpa::new(1 << 40), bits: 40 })
    );
    assert_eq!(
        ept(46, Some(39)).encode(Gpa::new(1 << 39), USER_WRITE, generation),
        Err(MmioError::TooWide { gpa: Gpa::new(1 << 39), bits: 39 })
    );
    assert_eq!(
        ept(40, None).encode(Gpa::new(0x10), USER_WRITE, generation),
        Err(MmioError::Unaligned { gpa: Gpa::new(0x10) })
    );
}

#[test]
fn no_reserved_bit_no_mmio_entries() {
    let full = LongMode::new(LongModeOptions::default()).unwrap();
    assert!(full.mmio().is_none());
    let encrypted =
        Npt::new(LongModeOptions { physical_bits: 43, encryption_bit: Some(51), ..LongModeOptions::default() });
    assert!(encrypted.unwrap().mmio().is_none());
}

#[test]
fn stale_generation_is_no_hit() {
    let layout = ept(52, None);
    let made = SlotGeneration::new(41);
    let raw = layout.encode(Gpa::new(0x1000), USER_WRITE, made).unwrap();
    let entry = layout.decode(raw).unwrap();
    assert!(entry.is_current(made));
    assert!(!entry.is_current(SlotGeneration::new(42)));
    assert!(!entry.is_current(made.updating()), "an update is in progress");
    // Made during an update: stale during it, and after it, when the counter has moved.
    let raw = layout.encode(Gpa::new(0x1000), USER_WRITE, made.updating()).unwrap();
    assert!(!layout.decode(raw).unwrap().is_current(made.updating()));
    // 19 bits later the old entry would be taken for a new one: hence the zap at the wrap.
    assert!(entry.is_current(SlotGeneration::new(41 + (1 << 19))));
}

#[test]
fn wrap_asks_for_a_zap_of_all() {
    assert!(SlotGeneration::new(0).wraps(0));
    assert!(SlotGeneration::new(1 << 19).wraps(0));
    assert!(SlotGeneration::new(5 << 19).updating().wraps(0));
    assert!(!SlotGeneration::new((1 << 19) + 1).wraps(0));
    assert!(SlotGeneration::new((1 << 19) + 1).wraps(1), "bit 0 numbers the address space");
    assert!(!SlotGeneration::new((1 << 19) + 2).wraps(1));
    assert!(SlotGeneration::new(3).wraps(u32::MAX));
}

#[test]
fn mmio_entries_are_special_and_refused_by_hardware() {
    let ept = common::ept(AccessedDirty::Enabled);
    let raw = ept.mmio().encode(Gpa::new(0x1000), USER_WRITE, SlotGeneration::new(0)).unwrap();
    assert!(matches!(ept.hardware_kind(L1, raw), HardwareKind::Impossible(why) if why.bits == 0b010));
    let options = LongModeOptions { physical_bits: 48, ..LongModeOptions::default() };
    let npt = Npt::new(options).unwrap();
    let raw = npt.mmio().unwrap().encode(Gpa::new(0x1000), USER_WRITE, SlotGeneration::new(0)).unwrap();
    assert!(matches!(npt.hardware_kind(L1, raw), HardwareKind::Impossible(why) if why.bits == 1 << 51));
}

proptest! {
    #[test]
    fn mmio_round_trips_at_every_width(
        physical in 36_u8..=51,
        cache in prop::option::of(36_u8..=51),
        address in any::<u64>(),
        write in any::<bool>(),
        user in any::<bool>(),
        counter in any::<u64>(),
    ) {
        let width = cache.map_or(physical, |cache| if cache < 47 { cache.min(physical) } else { physical });
        let gpa = Gpa::new(address & ((1 << width) - 1) & !0xfff);
        let access = MmioAccess { write, user };
        let generation = SlotGeneration::new(counter);
        for layout in [ept(physical, cache), npt(physical, cache)] {
            let raw = layout.encode(gpa, access, generation).unwrap();
            let entry = layout.decode(raw).unwrap();
            prop_assert_eq!(entry.gpa, gpa);
            prop_assert_eq!(entry.generation.get(), (counter & 0x7_ffff) as u32);
            prop_assert!(entry.is_current(generation));
            prop_assert_eq!(raw & (1 << 11), 0);
            prop_assert_eq!(raw & layout.hidden_bits(), layout.hidden_bits());
            if let Some(kept) = entry.access {
                prop_assert_eq!(kept, access);
            }
        }
        let options = EptOptions { physical_bits: physical, l1tf_cache_bits: cache, ..EptOptions::default() };
        let format = Ept::new(options).unwrap();
        let raw = format.mmio().encode(gpa, access, generation).unwrap();
        prop_assert_eq!(format.kind(L1, raw), Kind::Special);
        prop_assert_eq!(format.check(L1, raw), Ok(()));
        prop_assert_eq!(ept(physical, cache).decode(raw).unwrap().access, None);
        prop_assert_eq!(npt(physical, cache).decode(raw), None);
    }
}
