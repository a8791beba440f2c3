// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How entries are built and read: numbers worked out by hand, and every combination back and forth.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, FormatError, Kind, LeafSpec, Level, NotPresent, Touch, WriteProtect};
use spte_mips::bits::{ACCESSED, MODIFIED, PRESENT, WRITE};
use spte_mips::*;

/// One entry: layout, page, attributes, and the two numbers.
#[test]
fn entries_and_entry_lo_are_as_worked_out_by_hand() {
    let rows: [(PteLayout, PageSize, LeafSpec<GpaAttrs>, u64, u64); 4] = [
        // PRESENT WRITE ACCESSED MODIFIED f, V 80, D 100, C=3 600.
        (PteLayout::Plain, PageSize::K4, spec(0x1234_5000, Access::RWX), 0x1234_578f, 0x48_d15e),
        // The address and all from G on one higher: PRESENT WRITE ACCESSED 7, V 100, C=3 c00; armed.
        (
            PteLayout::Huge,
            PageSize::K4,
            LeafSpec { armed: true, ..spec(0x1234_5000, Access::RWX) },
            0x2468_ad07,
            0x48_d15a,
        ),
        // PRESENT ACCESSED 5, XI 20, V 100, C=3 c00.
        (PteLayout::Huge, PageSize::K16, spec(0x1234_4000, Access::READ), 0x2468_8d25, 0x4000_0000_0048_d11a),
        // Two higher, not to be read: PRESENT ACCESSED 5, RI 80, V 200, C=5 2800.
        (
            PteLayout::HugeSplitting,
            PageSize::K64,
            LeafSpec { attrs: GpaAttrs { cache: Cache::CoherentOnWrite }, ..spec(0x1234_0000, Access::EXECUTE) },
            0x48d0_2a85,
            0x8000_0000_0048_d02a,
        ),
    ];
    for (layout, page, spec, raw, entry_lo) in rows {
        let format = table(GpaOptions { layout, ..of(page, Width::Standard) });
        assert_eq!(format.leaf(L1, &spec), Ok(raw), "{raw:#x}");
        let lo = format.entry_lo(raw);
        assert_eq!((lo.raw(), lo.output(), lo.cache()), (entry_lo, spec.output.as_u64(), spec.attrs.cache));
        format.check(L1, raw).unwrap();
    }
    // An old dirty page that may not be read, as another kernel has it: D stays while V is clear.
    let format = table(of(PageSize::K64, Width::Standard));
    assert_eq!(format.entry_lo(0x1234_052b).raw(), 0x8000_0000_0048_d014);
    assert!(!format.entry_lo(0x1234_052b).is_valid() && format.entry_lo(0x1234_052b).is_dirty());
    format.check(L1, 0x1234_052b).unwrap();
    // Without RI and XI that place is READ, and no part of EntryLo.
    let format = table(GpaOptions { rixi: false, ..GpaOptions::default() });
    let raw = format.leaf(L1, &spec(0x1234_5000, Access::RX)).unwrap();
    assert_eq!((raw, format.entry_lo(raw).raw()), (0x1234_56a5, 0x48_d15a));
}

#[test]
fn links_are_addresses_in_xkphys() {
    let format = table(GpaOptions::default());
    for level in [2, 3] {
        let level = Level::new(level).unwrap();
        assert_eq!(format.table(level, OutputAddr::new(0x1234_5000)), Ok(0x9800_0000_1234_5000));
        assert_eq!(format.kind(level, 0x9800_0000_1234_5000), Kind::Table(OutputAddr::new(0x1234_5000)));
    }
    let coherent = table(GpaOptions { table_cache: Cache::CoherentOnWrite, ..GpaOptions::default() });
    let level = Level::new(2).unwrap();
    assert_eq!(coherent.table(level, OutputAddr::new(0x1234_5000)), Ok(0xa800_0000_1234_5000));
    assert_eq!(coherent.kind(level, 0x9800_0000_1234_5000), Kind::Special, "not this table's own");
    for (at, level) in [(0x800, 2), (1 << 48, 2), (0x1000, 1), (0x1000, 4)] {
        assert!(format.table(Level::new(level).unwrap(), OutputAddr::new(at)).is_err(), "{at:#x}");
    }
}

/// The engine's contract: what ageing and harvests may write makes nothing another kind. A directory has no such bits, as a link
/// with a bit more leads elsewhere.
#[test]
fn facts_change_no_kind_at_any_level() {
    for format in formats() {
        let layout = format.options().layout;
        assert_eq!(format.claim_bit(), 0);
        let at = OutputAddr::new(0x1234_0000);
        for number in 2..=format.geometry().top().get() {
            let level = Level::new(number).unwrap();
            let link = format.table(level, at).unwrap();
            assert_eq!(format.hardware_bits(level, link), 0);
            assert_eq!(format.kind(level, link), Kind::Table(at));
            for noise in [ACCESSED, MODIFIED, layout.valid()] {
                assert_eq!(format.kind(level, link | noise), Kind::Special, "{noise:#x}");
                assert!(format.check(level, link | noise).is_err());
            }
        }
        let leaf = format.leaf(L1, &spec(0x1_0000, Access::RX)).unwrap();
        let written = format.hardware_bits(L1, leaf);
        assert_eq!(written, ACCESSED | MODIFIED | layout.valid());
        for facts in [0, ACCESSED, MODIFIED, layout.valid(), written] {
            assert_eq!(format.kind(L1, leaf & !written | facts), Kind::Leaf);
        }
    }
}

#[test]
fn memory_images_are_in_the_processors_order() {
    let big = GpaTable::<BigEndian>::new(GpaOptions::default()).unwrap();
    let little = GpaTable::<LittleEndian>::new(GpaOptions::default()).unwrap();
    let level = Level::new(2).unwrap();
    for (raw, image) in [
        (big.leaf(L1, &spec(0x1234_5000, Access::RWX)).unwrap(), [0, 0, 0, 0, 0x12, 0x34, 0x57, 0x8f]),
        (big.table(level, OutputAddr::new(0x1234_5000)).unwrap(), [0x98, 0, 0, 0, 0x12, 0x34, 0x50, 0]),
        (big.not_present(level).absent, [0x98, 0, 0xff, 0xff, 0xff, 0xf0, 0, 0]),
        (big.not_present(Level::LEAF).absent, [0; 8]),
    ] {
        assert_eq!(big.memory_of(raw).to_ne_bytes(), image);
        let mut turned = image;
        turned.reverse();
        assert_eq!(little.memory_of(raw).to_ne_bytes(), turned);
        assert_eq!((big.raw_of(big.memory_of(raw)), little.raw_of(little.memory_of(raw))), (raw, raw));
    }
    assert_eq!((big.name(), little.name()), ("mips64", "mips64el"));
}

#[test]
fn tables_have_linux_shapes() {
    let shape = |page, width| {
        let format = table(of(page, width));
        let geometry = *format.geometry();
        let entries = |number| format.level_of(number).map_or(0, |level| geometry.entries(level));
        (entries(4), entries(3), entries(2), entries(1), geometry.address_bits())
    };
    assert_eq!(shape(PageSize::K4, Width::Standard), (0, 1024, 512, 512, 40));
    assert_eq!(shape(PageSize::K4, Width::Wide), (512, 512, 512, 512, 48));
    assert_eq!(shape(PageSize::K16, Width::Standard), (0, 0, 2048, 2048, 36));
    assert_eq!(shape(PageSize::K16, Width::Wide), (0, 4096, 2048, 2048, 48));
    assert_eq!(shape(PageSize::K64, Width::Standard), (0, 0, 8192, 8192, 42));
    assert_eq!(shape(PageSize::K64, Width::Wide), (0, 8192, 8192, 8192, 55));
    // Leaves are pages, whatever the page size.
    for format in formats() {
        for number in 1..=format.geometry().top().get() {
            assert_eq!(format.geometry().level(Level::new(number).unwrap()).leaf, number == 1);
        }
    }
}

#[test]
fn addresses_are_cut_into_linux_indices() {
    let cut = |page, width, address| {
        let format = table(of(page, width));
        [4, 3, 2, 1].map(|number| format.level_of(number).map_or(0, |level| format.geometry().index(level, address)))
    };
    assert_eq!(cut(PageSize::K4, Width::Standard, 0xff_c020_1fff), [0, 1023, 1, 1]);
    assert_eq!(cut(PageSize::K4, Width::Wide, 0x8080_c060_4000), [257, 3, 3, 4]);
    assert_eq!(cut(PageSize::K16, Width::Standard, 0xf_fe00_4000), [0, 0, 2047, 1]);
    assert_eq!(cut(PageSize::K64, Width::Wide, (8191 << 42) | (2 << 29) | (3 << 16)), [0, 8191, 2, 3]);
}

#[test]
fn empty_directories_lead_to_sentinels_and_empty_tables_are_zero() {
    for format in formats() {
        let (sentinels, page) = (*format.sentinels(), format.options().page.bytes());
        assert_eq!(format.not_present(L1).absent, 0);
        assert_eq!(sentinels.bytes(), 3 * (u64::from(format.geometry().top().get()) - 1) * page);
        let mut seen = std::collections::BTreeSet::new();
        for number in 1..=format.geometry().top().get() {
            let level = Level::new(number).unwrap();
            let NotPresent { absent, claimed, dead } = format.not_present(level);
            for (value, kind) in [(absent, Kind::Absent), (claimed, Kind::Claimed), (dead, Kind::Dead)] {
                let facts = format.hardware_bits(level, value);
                assert_eq!(facts == 0, number > 1, "a directory holds addresses alone");
                assert_eq!(value & (facts | PRESENT), 0);
                for noise in [0, ACCESSED, MODIFIED, ACCESSED | MODIFIED, facts] {
                    assert_eq!(format.kind(level, value | noise & facts), kind);
                }
                assert_eq!(format.check(level, value), Ok(()));
                assert!(seen.insert(value), "{value:#x} means two things");
                if number > 1 {
                    let page = (value - format.pointer(sentinels.start())) / page;
                    assert!(page < sentinels.pages());
                    assert_eq!(page / 3 + 2, u64::from(number));
                }
            }
        }
    }
}

/// What a handler does: it loads, and tests nothing but what it puts into the TLB.
#[test]
fn a_walk_through_sentinels_ends_in_an_invalid_entry() {
    for format in formats() {
        let (sentinels, page) = (*format.sentinels(), format.options().page.bytes());
        for number in 2..=format.geometry().top().get() {
            let level = Level::new(number).unwrap();
            for start in
                [format.not_present(level).absent, format.not_present(level).claimed, format.not_present(level).dead]
            {
                let mut entry = start;
                for below in (1..number).rev() {
                    let table = bits::unmapped(entry).unwrap() - sentinels.start().as_u64();
                    assert_eq!(table % page, 0);
                    entry = sentinels.fill(table / page).expect("inside the sentinels");
                    // Whatever led here, from here on nothing is there.
                    assert_eq!(entry, format.not_present(Level::new(below).unwrap()).absent);
                }
                assert!(!format.entry_lo(entry).is_valid());
            }
        }
        assert_eq!(sentinels.fill(sentinels.pages()), None);
    }
}

#[test]
fn a_table_where_the_sentinels_are_is_refused() {
    for format in formats() {
        let sentinels = *format.sentinels();
        let (start, page) = (sentinels.start().as_u64(), format.options().page.bytes());
        let level = Level::new(2).unwrap();
        for at in [start, start + page, start + sentinels.bytes() - page] {
            let refused = format.table(level, OutputAddr::new(at));
            assert!(matches!(refused, Err(FormatError::Attribute { value, .. }) if value == at));
        }
        for at in [start - page, start + sentinels.bytes()] {
            let link = format.table(level, OutputAddr::new(at)).unwrap();
            assert_eq!(format.kind(level, link), Kind::Table(OutputAddr::new(at)));
        }
    }
}

#[test]
fn options_that_no_machine_has_are_refused() {
    let with = |options| GpaTable::<BigEndian>::new(options).err();
    for bits in [0, 31, 60, 64, 255] {
        let refused = with(GpaOptions { physical_bits: bits, ..GpaOptions::default() });
        assert_eq!(refused, Some(OptionsError::PhysicalBits { bits }));
    }
    for start in [0x800, (1 << 48) - 0x1000, u64::MAX - 0xfff] {
        let sentinels = OutputAddr::new(start);
        let refused = with(GpaOptions { sentinels, ..GpaOptions::default() });
        assert_eq!(refused, Some(OptionsError::Sentinels { start: sentinels, bytes: 0x6000 }));
    }
    assert_eq!(with(GpaOptions { sentinels: OutputAddr::new((1 << 48) - 0x6000), ..GpaOptions::default() }), None);
}

#[test]
fn the_narrowest_and_the_widest_machine_have_all_their_addresses() {
    for physical_bits in [32, 59] {
        for layout in LAYOUTS {
            for page in PAGES {
                let end = 1_u64 << physical_bits;
                let options = GpaOptions { physical_bits, layout, ..of(page, Width::Wide) };
                let bytes = 3 * (table(of(page, Width::Wide)).geometry().top().get() as u64 - 1) * page.bytes();
                let format = table(GpaOptions { sentinels: OutputAddr::new(end - bytes), ..options });
                let raw = format.leaf(L1, &spec(end - page.bytes(), Access::RWX)).unwrap();
                assert_eq!(format.check(L1, raw), Ok(()));
                assert_eq!(format.spec(L1, raw).output.as_u64(), end - page.bytes());
                assert_eq!(format.entry_lo(raw).output(), end - page.bytes());
                let output = OutputAddr::new(end);
                let wide = Err(FormatError::OutputTooWide { output, bits: physical_bits.into() });
                assert_eq!(format.leaf(L1, &spec(end, Access::RWX)), wide);
                let level = Level::new(2).unwrap();
                assert_eq!(format.table(level, output), wide);
                let last = OutputAddr::new(end - bytes - page.bytes());
                let link = format.table(level, last).unwrap();
                assert_eq!((format.kind(level, link), format.check(level, link)), (Kind::Table(last), Ok(())));
                assert_eq!(format.check(level, format.not_present(level).dead), Ok(()));
            }
        }
    }
}

#[test]
fn without_ri_and_xi_what_is_read_is_executed() {
    let format = table(GpaOptions { rixi: false, ..GpaOptions::default() });
    for bits in 0..8 {
        let access = Access::from_bits_truncate(bits);
        let built = format.leaf(L1, &spec(0x1000, access));
        match access.contains(Access::RX) {
            true => assert_eq!(format.spec(L1, built.unwrap()).access, access),
            false => assert_eq!(built, Err(FormatError::Access { access })),
        }
    }
}

#[test]
fn leaves_stand_at_the_level_of_pages_alone() {
    for format in formats() {
        let level = Level::new(2).unwrap();
        assert_eq!(format.leaf(level, &spec(0, Access::READ)), Err(FormatError::NoLeaf { number: 2 }));
        let page = format.options().page.bytes();
        let output = OutputAddr::new(page / 2);
        assert_eq!(format.leaf(L1, &spec(page / 2, Access::RX)), Err(FormatError::Unaligned { output, align: page }));
        let output = OutputAddr::new(1 << 48);
        assert_eq!(format.leaf(L1, &spec(1 << 48, Access::RX)), Err(FormatError::OutputTooWide { output, bits: 48 }));
        assert_eq!(format.collapse(level, format.leaf(L1, &spec(0, Access::RX)).unwrap()), None);
    }
}

#[test]
fn ageing_keeps_writing_for_the_next_use() {
    for format in formats() {
        let raw = format.leaf(L1, &spec(0x1234_0000, Access::RWX)).unwrap();
        let old = format.make_old(L1, raw);
        let lo = format.entry_lo(old);
        assert!(!lo.is_valid() && lo.is_dirty(), "D stays");
        assert!(format.is_dirty(L1, old) && !format.is_young(L1, old));
        assert_eq!(format.touch(L1, old, Access::WRITE), Touch::AccessFlag);
        assert_eq!(format.make_young(L1, old), raw);
        assert_eq!(format.touch(L1, raw, Access::WRITE), Touch::Allowed(raw));
    }
}

#[test]
fn change_is_read_only_not_upgradable_and_keeps_the_rest() {
    let format = table(GpaOptions::default());
    // Written, not executable, uncached accelerated.
    let rights = Access::READ | Access::WRITE;
    let attrs = GpaAttrs { cache: Cache::UncachedAccelerated };
    for (accessed, moved) in [(true, 0x777_7e95), (false, 0x777_7e11)] {
        let old = format.leaf(L1, &LeafSpec { accessed, attrs, ..spec(0x1234_5000, rights) }).unwrap();
        assert_eq!(format.set_spte(L1, old, OutputAddr::new(0x777_7000)), Ok(moved));
        assert_eq!(format.upgrade(L1, moved), None);
        assert_eq!(format.spec(L1, moved).access, Access::READ);
    }
    assert!(format.set_spte(L1, 0x1234_578f, OutputAddr::new(0x777_7800)).is_err());
}

#[test]
fn a_write_state_is_what_write_modified_and_d_say() {
    for format in formats() {
        let dirty = format.options().layout.dirty();
        let state = |bits: u64| format.write_state(PRESENT | bits);
        assert_eq!(state(WRITE | MODIFIED | dirty), Some(WriteState::Writable));
        assert_eq!([state(WRITE), state(WRITE | MODIFIED)], [Some(WriteState::Armed); 2]);
        assert_eq!([state(0), state(MODIFIED)], [Some(WriteState::ReadOnly); 2]);
        for wrong in [dirty, dirty | WRITE, dirty | MODIFIED] {
            assert_eq!(state(wrong), None, "D needs both");
        }
    }
}

#[test]
fn an_access_is_what_v_d_ri_and_xi_let_through() {
    for format in formats() {
        let rixi = format.options().rixi;
        let touch = |raw: u64, access| format.touch(L1, raw, access);
        let armed = format.leaf(L1, &LeafSpec { armed: true, ..spec(0x1_0000, Access::RWX) }).unwrap();
        assert_eq!(touch(armed, Access::WRITE), Touch::Denied, "WRITE is software's: a store traps");
        assert_eq!(touch(armed, Access::RX), Touch::Allowed(armed));
        let upgraded = format.upgrade(L1, armed).unwrap();
        assert_eq!(touch(upgraded, Access::WRITE), Touch::Allowed(upgraded));
        for (granted, wanted) in [(Access::READ, Access::EXECUTE), (Access::EXECUTE, Access::READ)] {
            let Ok(raw) = format.leaf(L1, &spec(0x1_0000, granted)) else {
                assert!(!rixi);
                continue;
            };
            assert_eq!((touch(raw, granted), touch(raw, wanted)), (Touch::Allowed(raw), Touch::Denied));
        }
    }
}

#[test]
fn merged_facts_are_those_of_both_and_grant_nothing() {
    for format in formats() {
        let leaf = |access, armed, accessed, dirty| {
            format.leaf(L1, &LeafSpec { armed, accessed, dirty, ..spec(0x1_0000, access) }).unwrap()
        };
        for (access, armed) in [(Access::RX, false), (Access::RWX, true)] {
            for (young, written) in [(false, false), (true, false), (false, true), (true, true)] {
                let from = leaf(Access::RX, false, young, written);
                let into = |accessed, dirty| leaf(access, armed, accessed, dirty);
                assert_eq!(format.merge_facts(L1, into(false, false), L1, from), into(young, written));
                assert_eq!(format.merge_facts(L1, into(true, true), L1, from), into(true, true));
            }
        }
    }
}

#[test]
fn cache_attributes_are_three_bits() {
    for bits in 0..8 {
        let cache = Cache::from_bits(bits);
        assert_eq!(cache as u8, bits);
        assert_eq!(Cache::from_bits(bits | 0xf8), cache, "higher bits do not count");
        assert_eq!(cache.is_architectural(), bits == 2 || bits == 3);
    }
}

#[test]
fn page_sizes_are_known_by_their_bytes() {
    for page in PAGES {
        assert_eq!(PageSize::from_bytes(page.bytes()), Some(page));
    }
    for bytes in [0, 0x2000, 0x8000, 0x2_0000, 0x10_0000] {
        assert_eq!(PageSize::from_bytes(bytes), None, "{bytes:#x}");
    }
}

proptest! {
    #[test]
    fn a_leaf_says_what_it_was_built_from(format in any_format(), spec in any_spec()) {
        let spec = fitted(&format, spec);
        let raw = format.leaf(L1, &spec).unwrap();
        prop_assert_eq!(format.kind(L1, raw), Kind::Leaf);
        prop_assert_eq!(format.spec(L1, raw), spec);
        prop_assert_eq!(format.check(L1, raw), Ok(()));
        prop_assert_eq!(format.raw_of(format.memory_of(raw)), raw);
        let lo = format.entry_lo(raw);
        prop_assert_eq!((lo.output(), lo.cache()), (spec.output.as_u64(), spec.attrs.cache));
        prop_assert_eq!((lo.is_valid(), lo.is_dirty()), (spec.accessed, spec.access.writable() && !spec.armed));
        let inhibited = |right: Access| format.options().rixi && !spec.access.contains(right);
        prop_assert_eq!(lo.raw() & EntryLo::READ_INHIBIT != 0, inhibited(Access::READ));
        prop_assert_eq!(lo.raw() & EntryLo::EXECUTE_INHIBIT != 0, inhibited(Access::EXECUTE));
    }

    #[test]
    fn operations_keep_the_rules(format in any_format(), first in any_spec(), picks in prop::collection::vec(any::<prop::sample::Index>(), 1..8)) {
        let first = fitted(&format, first);
        let mut raw = format.leaf(L1, &first).unwrap();
        let layout = format.options().layout;
        for pick in picks {
            for (name, result) in operations(&format, L1, raw) {
                prop_assert_eq!(format.check(L1, result), Ok(()), "{}", name);
                prop_assert!(result & layout.valid() == 0 || result & ACCESSED != 0, "{}", name);
                prop_assert!(result & layout.dirty() == 0 || result & (WRITE | MODIFIED) == WRITE | MODIFIED, "{}", name);
                let spec = format.spec(L1, result);
                prop_assert_eq!(spec.attrs, first.attrs, "{}", name);
                prop_assert_eq!(format.leaf(L1, &spec), Ok(result), "{}", name);
            }
            raw = pick.get(&operations(&format, L1, raw)).1;
        }
    }

    #[test]
    fn rights_change_and_nothing_else(format in any_format(), spec in any_spec(), bits in 0_u8..8) {
        let spec = fitted(&format, spec);
        let raw = format.leaf(L1, &spec).unwrap();
        let access = Access::from_bits_truncate(bits);
        let Ok(changed) = format.with_access(L1, raw, access) else {
            prop_assert!(!format.options().rixi && !access.contains(Access::RX));
            return Ok(());
        };
        let armed = spec.armed && access.writable();
        let dirty = spec.dirty || (access.writable() && !armed);
        prop_assert_eq!(format.spec(L1, changed), LeafSpec { access, armed, dirty, ..spec });
        let retained = format.write_protect(L1, raw, WriteProtect::Retain);
        prop_assert_eq!(format.upgrade(L1, retained), None);
        prop_assert_eq!(format.touch(L1, format.make_young(L1, retained), Access::WRITE), Touch::Denied);
        let armed = format.write_protect(L1, raw, WriteProtect::Arm);
        prop_assert_eq!(format.upgrade(L1, armed).is_some(), spec.access.writable());
        if let Some(upgraded) = format.upgrade(L1, armed) {
            prop_assert_eq!(format.write_state(upgraded), Some(WriteState::Writable));
        }
    }
}
