// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine makes of this format: when it breaks, what it flushes, and what stays.
//!
//! A recording flush looks at one entry at the moment of each flush, so that the order of break, flush and make shows.

mod common;

use std::{ops::Deref, sync::Arc};

use common::*;
use notifier_core::{Access, Change, Gpa, Outcome, OutputAddr};
use spte_arm64::*;
use spte_core::{MapError, MapOptions, RemoveError, TableRangeError, format::Kind};
use spte_drive::{Seen, range};

const BLOCK: u64 = 2 << 20;

struct Machine(spte_drive::Machine<Stage2>);

impl Machine {
    /// Watches the entry for `watched`.
    fn new(options: Stage2Options, watched: u64) -> Self {
        Self(spte_drive::Machine::new(stage2(options), Seen::at(watched)))
    }
}

impl Deref for Machine {
    type Target = spte_drive::Machine<Stage2>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

fn default() -> Stage2Options {
    Stage2Options { accessed_dirty: AccessedDirty::HardwareAccessed, ..Stage2Options::default() }
}

#[test]
fn a_split_is_broken_flushed_and_made_in_this_order() {
    let machine = Machine::new(default(), BLOCK);
    machine.map(BLOCK, 1 << 30, BLOCK, Access::RWX).unwrap();
    machine.flushes();
    machine.table.split(range(BLOCK, BLOCK)).unwrap();
    let l2 = level(2);
    let broken = Seen { ranges: vec![(BLOCK, BLOCK, Some(l2), false)], kind: Kind::Claimed, level: l2 };
    assert_eq!(machine.flushes(), [broken], "nothing valid during the flush, which names the block");
    assert_eq!(machine.spec(BLOCK + 0x3000).output, OutputAddr::new((1 << 30) + 0x3000));
}

#[test]
fn a_collapse_is_broken_flushed_and_made_in_this_order() {
    let machine = Machine::new(default(), BLOCK);
    machine.map(BLOCK, 1 << 30, BLOCK, Access::RWX).unwrap();
    machine.table.split(range(BLOCK, BLOCK)).unwrap();
    machine.flushes();
    let whole = range(BLOCK, BLOCK);
    assert_eq!(machine.space.admit(whole, |admission| machine.table.collapse(admission, whole).unwrap()).unwrap(), 1);
    let flushes = machine.flushes();
    assert_eq!(flushes.len(), 1);
    assert_eq!(flushes[0].kind, Kind::Claimed);
    assert!(flushes[0].ranges.iter().any(|range| range.3), "a link went: no level hint");
    assert_eq!(machine.spec(BLOCK).output, OutputAddr::new(1 << 30));
}

#[test]
fn where_size_may_change_in_place_nothing_is_broken() {
    let machine = Machine::new(Stage2Options { break_level: BreakLevel::Level2, ..default() }, BLOCK);
    machine.map(BLOCK, 1 << 30, BLOCK, Access::RWX).unwrap();
    machine.flushes();
    machine.table.split(range(BLOCK, BLOCK)).unwrap();
    let flushes = machine.flushes();
    assert_eq!((flushes.len(), flushes[0].kind, flushes[0].level), (1, Kind::Leaf, L3));
}

#[test]
fn rights_change_in_place() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000, Access::RX).unwrap();
    assert_eq!(machine.flushes(), [], "what was absent owes nothing");
    // More: no break, and no flush of everybody.
    assert_eq!(machine.map(0x1000, 0x8000, 0x1000, Access::RWX).unwrap().raised, 1);
    assert_eq!(machine.flushes(), []);
    // Less: one flush, during which the entry is valid.
    assert_eq!(machine.table.arm(range(0x1000, 0x1000)).unwrap().leaves, 1);
    let flushes = machine.flushes();
    assert_eq!(flushes, [Seen { ranges: vec![(0x1000, 0x1000, Some(L3), false)], kind: Kind::Leaf, level: L3 }]);
    assert_eq!(machine.table.restrict(range(0x1000, 0x1000), Access::READ).unwrap().leaves, 1);
    assert_eq!(machine.flushes()[0].kind, Kind::Leaf);
    assert_eq!(machine.spec(0x1000).access, Access::READ);
}

#[test]
fn mapping_what_is_mapped_so_already_writes_nothing() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000, Access::RWX).unwrap();
    let before = machine.table.entry(Gpa::new(0x1000)).unwrap().raw;
    let again = machine.map(0x1000, 0x8000, 0x1000, Access::READ).unwrap();
    assert_eq!((again.made, again.raised, again.already), (0, 0, 1), "rights are only ever added");
    assert_eq!(machine.table.entry(Gpa::new(0x1000)).unwrap().raw, before);
    assert_eq!(machine.flushes(), []);
}

#[test]
fn an_old_leaf_is_made_young_in_place() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000, Access::RWX).unwrap();
    assert_eq!(machine.table.age(range(0x1000, 0x1000)), Ok(1));
    assert_eq!(machine.table.age(range(0x1000, 0x1000)), Ok(0), "young once");
    assert!(!machine.spec(0x1000).accessed);
    machine.map(0x1000, 0x8000, 0x1000, Access::RWX).unwrap();
    assert!(machine.spec(0x1000).accessed);
    assert_eq!(machine.flushes(), [], "neither way owes a flush");
}

#[test]
fn another_output_or_type_over_a_leaf_is_a_conflict() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000, Access::READ).unwrap();
    let conflict = |result| matches!(result, Err(MapError::Conflict { .. }));
    assert!(conflict(machine.map(0x1000, 0x9000, 0x1000, Access::READ)));
    let attrs =
        [Stage2Attrs::default().memory(MemoryType::DEVICE), Stage2Attrs { software: true, ..Stage2Attrs::default() }];
    for attrs in attrs {
        let refused = machine.install(range(0x1000, 0x1000), 0x8000, Access::READ, |admission| {
            machine.table.map(admission, &MapOptions::default().attrs(attrs))
        });
        assert!(conflict(refused));
    }
    assert_eq!(machine.flushes(), []);
}

#[test]
fn a_block_takes_the_place_of_an_empty_table_after_a_flush_of_its_range() {
    let machine = Machine::new(default(), BLOCK);
    machine.map(BLOCK, 0x8000, 0x1000, Access::RWX).unwrap();
    machine.table.unmap(range(BLOCK, 0x1000)).unwrap();
    machine.flushes();
    machine.map(BLOCK, 1 << 30, BLOCK, Access::RWX).unwrap();
    let l2 = level(2);
    assert_eq!(machine.flushes(), [Seen { ranges: vec![(BLOCK, BLOCK, None, true)], kind: Kind::Absent, level: l2 }]);
    assert_eq!(machine.table.entry(Gpa::new(BLOCK)).unwrap().level, l2);
}

#[test]
fn part_of_a_block_unmapped_leaves_the_rest_as_it_was() {
    let machine = Machine::new(default(), 0);
    let attrs = Stage2Attrs::default().memory(MemoryType::DEVICE);
    let access = Access::READ | Access::WRITE;
    let options = MapOptions::default().attrs(attrs);
    machine.install(range(0, BLOCK), 0x900_0000, access, |a| machine.table.map(a, &options)).unwrap();
    machine.table.unmap(range(0x3000, 0x1000)).unwrap();
    assert_eq!(machine.kind(0x3000), Kind::Absent);
    for at in [0, 0x2000, 0x4000, BLOCK - 0x1000] {
        let spec = machine.spec(at);
        assert_eq!((spec.output.as_u64(), spec.access, spec.attrs), (0x900_0000 + at, access, attrs), "{at:#x}");
    }
}

#[test]
fn empty_tables_go_up_to_the_root_and_not_the_root() {
    let machine = Machine::new(Stage2Options { ipa_bits: 48, ..default() }, 0);
    let whole = range(0, 1 << 48);
    machine.map(0x12_3456_7000, 0x8000, 0x1000, Access::READ).unwrap();
    assert_eq!(machine.table.stats().tables, 4);
    machine.table.unmap(whole).unwrap();
    assert_eq!(machine.table.stats().tables, 1);
    machine.map(0x12_3456_7000, 0x8000, 0x1000, Access::READ).unwrap();
    machine.table.check().unwrap();
}

#[test]
fn an_owner_keeps_its_table_and_goes_with_an_unmap() {
    let machine = Machine::new(default(), 0x5000);
    let at = range(0x5000, 0x1000);
    let owner = Owner(1).to_raw();
    machine.install(at, 0x8000, Access::READ, |a| machine.table.set_special(a, at.start(), owner)).unwrap();
    assert_eq!(machine.kind(0x5000), Kind::Special);
    assert_eq!(machine.table.trim(range(0, 1 << 40)), Ok(0), "the table is not empty");
    assert_eq!(Owner::from_raw(machine.table.entry(at.start()).unwrap().raw), Some(Owner(1)));
    assert_eq!(machine.flushes(), []);
    machine.table.unmap(range(0, 1 << 30)).unwrap();
    assert_eq!(machine.kind(0x5000), Kind::Absent);
    assert_eq!(machine.table.stats().tables, 1);
    // A map takes its place.
    machine.install(at, 0x8000, Access::READ, |a| machine.table.set_special(a, at.start(), owner)).unwrap();
    machine.map(0x5000, 0x8000, 0x1000, Access::READ).unwrap();
    assert_eq!(machine.kind(0x5000), Kind::Leaf);
    // What hardware would follow is no annotation.
    let refused = machine.install(range(0x6000, 0x1000), 0, Access::READ, |a| {
        machine.table.set_special(a, Gpa::new(0x6000), 0x7000_077d)
    });
    assert!(matches!(refused, Err(MapError::Format { .. })));
}

#[test]
fn ranges_end_where_guest_addresses_end() {
    for (granule, bits) in [(Granule::K4, 40), (Granule::K16, 40), (Granule::K64, 36)] {
        let machine = Machine::new(Stage2Options { granule, ipa_bits: bits, ..default() }, 0);
        let page = granule.bytes();
        let end = 1 << bits;
        machine.map(end - page, 1 << 30, page, Access::READ).unwrap();
        assert_eq!(machine.spec(end - page).output, OutputAddr::new(1 << 30));
        assert_eq!(machine.kind(0), Kind::Absent, "no wrap into the first table of the root");
        machine.table.unmap(range(end - page, page)).unwrap();
        let beyond = machine.table.unmap(range(end - page, 2 * page));
        assert!(matches!(beyond, Err(RemoveError::Range(TableRangeError::TooWide { .. }))));
        machine.table.check().unwrap();
    }
}

#[test]
fn every_table_of_a_concatenated_root_is_walked() {
    let machine = Machine::new(Stage2Options { granule: Granule::K16, ipa_bits: 40, ..default() }, 0);
    assert_eq!(machine.table.format().concatenated(), 16);
    let table = 1_u64 << 36;
    for index in 0..16 {
        machine.map(index * table, (index + 1) << 30, 16 << 10, Access::READ).unwrap();
    }
    for index in 0..16 {
        assert_eq!(machine.spec(index * table).output, OutputAddr::new((index + 1) << 30));
    }
    let root = machine.table.root();
    assert!(root.is_aligned(16 * (16 << 10)), "a root of 16 tables is aligned to all of them");
    assert!(Vttbr::new(machine.table.format(), root, 1, VmidBits::Eight).is_ok());
}

#[test]
fn change_pte_repoints_without_a_break_and_never_creates() {
    for accessed_dirty in [AccessedDirty::Software, AccessedDirty::HardwareAccessed, AccessedDirty::Hardware] {
        let machine = Machine::new(Stage2Options { accessed_dirty, ..default() }, 0x1000);
        let attrs = Stage2Attrs { software: true, ..Stage2Attrs::default().memory(MemoryType::NON_CACHEABLE) };
        let options = MapOptions::default().attrs(attrs);
        machine.install(range(0x1000, 0x1000), 0x8000, Access::RWX, |a| machine.table.map(a, &options)).unwrap();
        let change = |page: u64, expected: u64, new: u64| Change {
            page: Gpa::new(page),
            expected: OutputAddr::new(expected),
            new: OutputAddr::new(new),
        };
        let guard = machine.space.retain(range(0x1000, 0x2000)).unwrap();
        machine.flushes();
        // 0x2000 is absent, in a table that a neighbour keeps alive.
        let done = guard.change_pte(&[change(0x1000, 0x8000, 0xa000), change(0x2000, 0x9000, 0xb000)]).unwrap();
        assert_eq!([done[0].outcome, done[1].outcome], [Outcome::Changed, Outcome::Absent]);
        assert_eq!(machine.kind(0x2000), Kind::Absent);
        let flushes = machine.flushes();
        assert_eq!(flushes, [Seen { ranges: vec![(0x1000, 0x1000, Some(L3), false)], kind: Kind::Leaf, level: L3 }]);
        let spec = machine.spec(0x1000);
        assert_eq!((spec.output, spec.access, spec.attrs), (OutputAddr::new(0xa000), Access::RX, attrs));
        assert!(spec.accessed && !spec.dirty);
        guard.close().unwrap();
        machine.table.check().unwrap();
    }
}

#[test]
fn change_pte_of_a_page_of_a_block_splits_it_and_keeps_the_rest() {
    let machine = Machine::new(default(), 0);
    machine.map(0, 1 << 30, BLOCK, Access::RWX).unwrap();
    let guard = machine.space.retain(range(0x1000, 0x1000)).unwrap();
    let change =
        Change { page: Gpa::new(0x1000), expected: OutputAddr::new((1 << 30) + 0x1000), new: OutputAddr::new(0xa000) };
    assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Changed);
    guard.close().unwrap();
    assert_eq!(machine.spec(0x1000).output, OutputAddr::new(0xa000));
    assert_eq!(machine.spec(0x1000).access, Access::RX);
    assert_eq!(machine.spec(0x2000).output, OutputAddr::new((1 << 30) + 0x2000));
    assert_eq!(machine.spec(0x2000).access, Access::RWX);
}

/// Between the removal and its flush a TLB still has the old translation. Who maps something else there in that moment
/// would replace a valid entry by a valid one, as far as hardware can tell, without a break.
#[test]
fn what_was_unmapped_is_filled_after_a_flush() {
    let machine = Arc::new(Machine::new(default(), 0x1000));
    machine.map(0x1000, 0x8000, 0x1000, Access::RWX).unwrap();
    let other = Arc::clone(&machine);
    let fill = move || assert_eq!(other.map(0x1000, 0x9000, 0x1000, Access::RWX).unwrap().made, 1);
    machine.meanwhile(fill);
    machine.table.unmap(range(0x1000, 0x1000)).unwrap();
    let of_unmap = Seen { ranges: vec![(0x1000, 0x1000, Some(level(3)), false)], kind: Kind::Absent, level: level(3) };
    let of_fill = Seen { ranges: vec![(0x1000, 0x1000, None, true)], kind: Kind::Claimed, level: level(3) };
    assert_eq!(machine.flushes(), [of_unmap, of_fill], "the entry is claimed while who fills it flushes it");
    assert_eq!(machine.spec(0x1000).output, OutputAddr::new(0x9000));
}

/// The same one level up: a table is made where a block was.
#[test]
fn a_table_takes_a_blocks_place_after_a_flush() {
    let machine = Arc::new(Machine::new(default(), BLOCK));
    machine.map(BLOCK, BLOCK, BLOCK, Access::RWX).unwrap();
    let other = Arc::clone(&machine);
    let fill = move || assert_eq!(other.map(BLOCK + 0x3000, 0x9000, 0x1000, Access::RWX).unwrap().made, 1);
    machine.meanwhile(fill);
    machine.table.unmap(range(BLOCK, BLOCK)).unwrap();
    let of_fill = Seen { ranges: vec![(BLOCK, BLOCK, None, true)], kind: Kind::Claimed, level: level(2) };
    assert_eq!(machine.flushes()[1..], [of_fill], "all of what the block translated");
    assert_eq!(machine.spec(BLOCK + 0x3000).output, OutputAddr::new(0x9000));
}

/// A special entry itself is followed by nobody; the table that is made for it is.
#[test]
fn a_table_for_a_special_entry_takes_a_blocks_place_after_a_flush() {
    let machine = Arc::new(Machine::new(default(), BLOCK));
    machine.map(BLOCK, BLOCK, BLOCK, Access::RWX).unwrap();
    let other = Arc::clone(&machine);
    machine.meanwhile(move || {
        let at = range(BLOCK + 0x3000, 0x1000);
        let owner = Owner(7).to_raw();
        other
            .install(at, 0x9000, Access::RWX, |admission| other.table.set_special(admission, at.start(), owner))
            .unwrap();
    });
    machine.table.unmap(range(BLOCK, BLOCK)).unwrap();
    let of_special = Seen { ranges: vec![(BLOCK, BLOCK, None, true)], kind: Kind::Claimed, level: level(2) };
    assert_eq!(machine.flushes()[1..], [of_special]);
    assert_eq!(machine.kind(BLOCK + 0x3000), Kind::Special);
}

/// A flush that failed stays owed. Nothing is filled on the strength of it; the next flush that succeeds settles it.
#[test]
fn after_a_failed_flush_what_was_unmapped_is_flushed_again_before_it_is_filled() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000, Access::RWX).unwrap();
    machine.fail(true);
    assert!(matches!(machine.table.unmap(range(0x1000, 0x1000)), Err(RemoveError::Flush { .. })));
    machine.flushes();
    let refused = machine.map(0x1000, 0x9000, 0x1000, Access::RWX);
    assert!(matches!(refused, Err(MapError::Flush { at, .. }) if at == Gpa::new(0x1000)), "{refused:?}");
    assert_eq!(machine.kind(0x1000), Kind::Absent);
    assert_eq!(machine.flushes().len(), 1);
    machine.fail(false);
    machine.map(0x1000, 0x9000, 0x1000, Access::RWX).unwrap();
    assert_eq!(machine.flushes().len(), 1);
    // A flush of everything settles what failed: from then on nobody owes anything.
    machine.space.window(range(0x10_0000, 0x1000)).open_zapped().unwrap().close().unwrap();
    machine.flushes();
    machine.map(0x2000, 0xa000, 0x1000, Access::RWX).unwrap();
    assert_eq!(machine.flushes(), [], "nothing is owed, and nothing is flushed");
}
