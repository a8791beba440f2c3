// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine makes of this format: what it flushes, and what stays.
//!
//! A recording flush looks at one entry at the moment of each flush, so that the order of store and flush shows.

mod common;

use std::ops::Deref;

use common::*;
use notifier_core::{Access, Change, Extent, Gpa, Outcome, OutputAddr};
use spte_core::{
    MapError, MapOptions, Mapped, Upgrade,
    format::{Format, Kind, Level},
};
use spte_drive::{named, range};
use spte_mips::bits::MODIFIED;
use spte_mips::*;

/// One flush: its ranges, and what the watched entry was meanwhile.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    ranges: Vec<(u64, u64, bool)>,
    raw: u64,
}

struct Machine(spte_drive::Machine<GpaTable, Seen>);

impl Machine {
    /// Watches the entry for `watched`.
    fn new(options: GpaOptions, watched: u64) -> Self {
        Self(spte_drive::Machine::new(table(options), move |table, request| {
            let ranges = named(request).into_iter().map(|(start, len, _, links)| (start, len, links)).collect();
            Seen { ranges, raw: table.entry(Gpa::new(watched)).unwrap().raw }
        }))
    }

    fn map_with(&self, start: u64, output: u64, len: u64, options: &MapOptions<GpaAttrs>) -> Result<Mapped, MapError> {
        self.0.map_with(range(start, len), output, Access::RWX, *options)
    }

    fn map(&self, start: u64, output: u64, len: u64) -> Result<Mapped, MapError> {
        self.map_with(start, output, len, &MapOptions::default())
    }

    fn raw(&self, at: u64) -> u64 {
        self.found(at).raw
    }
}

impl Deref for Machine {
    type Target = spte_drive::Machine<GpaTable, Seen>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

fn default() -> GpaOptions {
    GpaOptions::default()
}

#[test]
fn a_new_table_leads_to_sentinels_at_every_level() {
    for page in PAGES {
        for width in WIDTHS {
            let machine = Machine::new(of(page, width), 0);
            let format = machine.table.format();
            let top = format.geometry().top();
            let found = machine.table.entry(Gpa::new(0)).unwrap();
            assert_eq!((found.level, found.raw), (top, format.not_present(top).absent));
            machine.map(0, 0x10_0000, page.bytes()).unwrap();
            // Beside the one page each table on the way down is empty, as its level has it.
            for number in 1..=top.get() {
                let level = Level::new(number).unwrap();
                let found = machine.table.entry(Gpa::new(format.geometry().span(level))).unwrap();
                assert_eq!((found.level, found.raw), (level, format.not_present(level).absent));
            }
            machine.table.unmap(range(0, 1 << format.geometry().address_bits())).unwrap();
            let found = machine.table.entry(Gpa::new(0)).unwrap();
            assert_eq!((found.level, found.raw), (top, format.not_present(top).absent));
            machine.table.check().unwrap();
        }
    }
}

#[test]
fn a_load_marks_nothing_as_written() {
    let machine = Machine::new(default(), 0x1000);
    // What a fault handler maps for a load: writing is resolved, and traps once.
    machine.map_with(0x1000, 0x8000, 0x1000, &MapOptions::default().armed(true)).unwrap();
    let format = machine.table.format();
    let raw = machine.raw(0x1000);
    assert_eq!((raw & MODIFIED, format.entry_lo(raw).is_dirty()), (0, false));
    assert_eq!(format.write_state(raw), Some(WriteState::Armed));
    // The first store.
    assert_eq!(machine.table.upgrade(Gpa::new(0x1000)), Upgrade::Granted);
    assert_eq!(machine.raw(0x1000), raw | MODIFIED | PteLayout::Plain.dirty());
    assert_eq!(machine.flushes(), [], "who trapped drops its own pair");
}

#[test]
fn rights_change_in_place() {
    let machine = Machine::new(default(), 0x1000);
    machine.map_with(0x1000, 0x8000, 0x1000, &MapOptions::default().access(Access::RX)).unwrap();
    assert_eq!(machine.flushes(), [], "what was absent owes nothing");
    assert_eq!(machine.map(0x1000, 0x8000, 0x1000).unwrap().raised, 1);
    assert_eq!(machine.flushes(), []);
    // Less: one store, then one flush.
    assert_eq!(machine.table.arm(range(0x1000, 0x1000)).unwrap().leaves, 1);
    assert_eq!(machine.flushes(), [Seen { ranges: vec![(0x1000, 0x1000, false)], raw: machine.raw(0x1000) }]);
    assert_eq!(machine.table.restrict(range(0x1000, 0x1000), Access::READ).unwrap().leaves, 1);
    assert_eq!(machine.flushes(), [Seen { ranges: vec![(0x1000, 0x1000, false)], raw: machine.raw(0x1000) }]);
    assert_eq!(machine.spec(0x1000).access, Access::READ);
}

#[test]
fn ageing_ends_before_the_end_of_its_range() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x4000).unwrap();
    assert_eq!(machine.table.age(range(0x2000, 0x2000)), Ok(2));
    let young: Vec<bool> = (1..5).map(|page| machine.spec(page << 12).accessed).collect();
    assert_eq!(young, [true, false, false, true]);
    assert_eq!(machine.table.age(range(0x2000, 0x2000)), Ok(0), "young once");
    assert_eq!(machine.flushes(), []);
}

#[test]
fn logging_arms_what_was_asked_for_alone() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x5000).unwrap();
    // The first and the last bit of a mask.
    for page in [1, 5] {
        machine.table.arm(range(page << 12, 0x1000)).unwrap();
    }
    let armed: Vec<bool> = (1..6).map(|page| machine.spec(page << 12).armed).collect();
    assert_eq!(armed, [true, false, false, false, true]);
}

#[test]
fn an_old_leaf_is_made_young_in_place() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000).unwrap();
    let before = machine.raw(0x1000);
    machine.table.age(range(0x1000, 0x1000)).unwrap();
    assert!(machine.table.make_young(Gpa::new(0x1000)));
    assert_eq!(machine.raw(0x1000), before, "written, and to be written, as before");
    machine.table.age(range(0x1000, 0x1000)).unwrap();
    machine.map(0x1000, 0x8000, 0x1000).unwrap();
    assert_eq!(machine.raw(0x1000), before);
    assert_eq!(machine.flushes(), []);
}

#[test]
fn another_output_or_attribute_over_a_leaf_is_a_conflict() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000).unwrap();
    let conflict = |result| matches!(result, Err(MapError::Conflict { .. }));
    assert!(conflict(machine.map(0x1000, 0x9000, 0x1000)));
    let uncached = MapOptions::default().attrs(GpaAttrs { cache: Cache::Uncached });
    assert!(conflict(machine.map_with(0x1000, 0x8000, 0x1000, &uncached)));
    assert_eq!(machine.flushes(), []);
}

#[test]
fn empty_tables_go_up_to_the_root_and_not_the_root() {
    let machine = Machine::new(of(PageSize::K4, Width::Wide), 0);
    let whole = range(0, 1 << 48);
    machine.map(0x12_3456_7000, 0x8000, 0x1000).unwrap();
    assert_eq!(machine.table.stats().tables, 4);
    // A part does not take the table with it, though the table is empty; the whole does.
    machine.table.unmap(range(0x12_3456_7000, 0x1000)).unwrap();
    assert_eq!(machine.table.stats().tables, 4);
    machine.table.unmap(whole).unwrap();
    assert_eq!(machine.table.stats().tables, 1);
    machine.map(0x12_3456_7000, 0x8000, 0x1000).unwrap();
    machine.table.unmap(range(0x12_3456_7000, 0x1000)).unwrap();
    assert_eq!(machine.table.trim(whole), Ok(3));
    assert_eq!(machine.table.stats().tables, 1);
    machine.table.check().unwrap();
}

#[test]
fn change_pte_repoints_without_a_break_and_never_creates() {
    for rixi in [true, false] {
        let machine = Machine::new(GpaOptions { rixi, ..default() }, 0x1000);
        let attrs = GpaAttrs { cache: Cache::CoherentOnWrite };
        machine.map_with(0x1000, 0x8000, 0x1000, &MapOptions::default().attrs(attrs)).unwrap();
        let change = |page: u64, expected: u64, new: u64| Change {
            page: Gpa::new(page),
            expected: OutputAddr::new(expected),
            new: OutputAddr::new(new),
        };
        let guard = machine.space.retain(range(0x1000, 0x2000)).unwrap();
        machine.flushes();
        // 0x2000 is absent, in a table that a neighbour keeps alive: there Linux installed the host's entry.
        let done = guard.change_pte(&[change(0x1000, 0x8000, 0xa000), change(0x2000, 0x9000, 0xb000)]).unwrap();
        assert_eq!([done[0].outcome, done[1].outcome], [Outcome::Changed, Outcome::Absent]);
        assert_eq!(machine.raw(0x2000), 0);
        assert_eq!(machine.flushes(), [Seen { ranges: vec![(0x1000, 0x1000, false)], raw: machine.raw(0x1000) }]);
        let spec = machine.spec(0x1000);
        assert_eq!((spec.output, spec.access, spec.attrs), (OutputAddr::new(0xa000), Access::RX, attrs));
        assert!(spec.accessed && !spec.dirty);
        guard.close().unwrap();
        machine.table.check().unwrap();
    }
}

#[test]
fn change_pte_of_an_old_leaf_flushes() {
    let machine = Machine::new(default(), 0x1000);
    machine.map(0x1000, 0x8000, 0x1000).unwrap();
    // From before it was aged a TLB may have it.
    machine.table.age(range(0x1000, 0x1000)).unwrap();
    let guard = machine.space.retain(range(0x1000, 0x1000)).unwrap();
    machine.flushes();
    let (page, expected, new) = (Gpa::new(0x1000), OutputAddr::new(0x8000), OutputAddr::new(0xa000));
    assert_eq!(guard.change_pte(&[Change { page, expected, new }]).unwrap()[0].outcome, Outcome::Changed);
    assert_eq!(machine.flushes(), [Seen { ranges: vec![(0x1000, 0x1000, false)], raw: 0xa601 }]);
    guard.close().unwrap();
    assert!(!machine.spec(0x1000).accessed, "and it stays old");
    machine.table.unmap(range(0x1000, 0x1000)).unwrap();
    assert_eq!(machine.flushes(), [Seen { ranges: vec![(0x1000, 0x1000, false)], raw: 0 }]);
}

#[test]
fn the_last_page_is_mapped_and_nothing_behind_it() {
    for page in PAGES {
        for width in WIDTHS {
            let bytes = page.bytes();
            let bits = table(of(page, width)).geometry().address_bits();
            let last = (1 << bits) - bytes;
            let machine = Machine::new(of(page, width), last);
            assert_eq!(machine.map(last, 0x10_0000, bytes).unwrap().made, 1);
            assert_eq!(machine.spec(last).output, OutputAddr::new(0x10_0000));
            assert!(matches!(machine.map(1 << bits, 0x20_0000, bytes), Err(MapError::Range(_))));
            assert_eq!(machine.kind(0), Kind::Absent, "nor at the other end");
            assert_eq!(machine.table.unmap(range(last, bytes)).unwrap().leaves, 1);
            let flush = Seen { ranges: vec![(last, bytes, false)], raw: 0 };
            assert_eq!(machine.flushes(), [flush]);
            machine.table.check().unwrap();
        }
    }
}

#[test]
fn an_annotation_is_what_neither_handler_nor_walker_loads() {
    let machine = Machine::new(default(), 0x5000);
    let at = range(0x5000, 0x1000);
    let set = |entry: u64| {
        let mut walker = machine.space.walker();
        let extent = Extent { guest: at, output: OutputAddr::new(0), access: Access::READ };
        let resolved = walker.fault(at).unwrap().resolve(|_| Ok::<_, ()>(extent)).unwrap();
        resolved.install(|admission| machine.table.set_special(admission, at.start(), entry))
    };
    set(0x7_0000).unwrap();
    assert_eq!((machine.kind(0x5000), machine.raw(0x5000)), (Kind::Special, 0x7_0000));
    assert!(!machine.table.format().entry_lo(0x7_0000).is_valid());
    // With V, hardware would load it; with PRESENT it is a leaf.
    for entry in [0x7_0080, 0x7_0685, 0] {
        assert!(matches!(set(entry), Err(MapError::Format { .. })), "{entry:#x}");
    }
    machine.map(0x5000, 0x8000, 0x1000).unwrap();
    assert_eq!(machine.kind(0x5000), Kind::Leaf);
    assert_eq!(machine.flushes(), []);
}
