// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine makes of this format: when it breaks, what it flushes, what stays, and what becomes of C that comes late.
//!
//! A recording flush looks at one entry at the moment of each flush, so that the order of invalid, flush and write shows; and
//! it can play the processor that sets R and C until then.

mod common;

use std::{mem::take, ops::Deref, sync::Arc};

use common::*;
use notifier_core::{Access, Change, Gpa, GpaRange, Outcome, OutputAddr};
use spte_core::{
    Entry, FlushRange, FlushRequest, Leaves, MapError, MapOptions, Mapped,
    format::{Format, Kind, Level},
};
use spte_drive::{Seen, range};
use spte_ppc::*;

const L1: Level = Level::LEAF;
const PAGE: u64 = 0x1_0000;
const LARGE: u64 = 2 << 20;

struct Machine(spte_drive::Machine<Radix>);

impl Machine {
    /// Pages of 64K. Watches the entry for `watched`.
    fn new(watched: u64) -> Self {
        Self(spte_drive::Machine::new(radix(BasePage::K64), Seen::at(watched)))
    }

    fn map_as(&self, start: u64, output: u64, len: u64, access: Access, attrs: RadixAttrs) -> Result<Mapped, MapError> {
        self.map_with(range(start, len), output, access, MapOptions::default().attrs(attrs))
    }

    /// The guest makes an access.
    fn touch(&self, at: u64, access: Access) {
        let mut walker = self.space.walker();
        let scope = walker.enter();
        self.table.translate(&scope, Gpa::new(at), access).unwrap();
    }

    /// The word in memory that decides about `at`.
    fn word(&self, at: u64) -> &'static Entry {
        let format = self.table.format();
        let (mut level, mut table) = (format.geometry().top(), self.table.root());
        loop {
            let address = table.as_u64() as usize + format.geometry().index(level, at) * 8;
            // SAFETY: a page of the heap source is at its address, and is not given back while its table is linked and
            // nobody but this test runs; the words are read atomically.
            let entry = unsafe { &*std::ptr::with_exposed_provenance::<Entry>(address) };
            match format.kind(level, format.raw_of(entry.load())) {
                Kind::Table(child) => (table, level) = (child, level.below().unwrap()),
                _ => return entry,
            }
        }
    }

    /// During the next flush a processor stores C, and R, into the word that decides about `at` now.
    fn stores_late(&self, at: u64) {
        let (word, facts) = (self.word(at), self.table.format().memory_of(0x180));
        let store = move || {
            let mut found = word.load();
            while let Err(other) = word.compare_exchange(found, found | facts) {
                found = other;
            }
        };
        self.meanwhile(store);
    }

    /// What was said to be written since this was last asked.
    fn heard(&self) -> Vec<GpaRange> {
        take(&mut *self.dirty())
    }

    fn change(&self, at: u64, expected: u64, new: u64) -> Outcome {
        let guard = self.space.retain(range(at, PAGE)).unwrap();
        self.flushes();
        let change = Change { page: Gpa::new(at), expected: OutputAddr::new(expected), new: OutputAddr::new(new) };
        let report = guard.change_pte(&[change]).unwrap()[0].outcome;
        let flushes = self.flushes();
        guard.close().unwrap();
        *self.seen() = flushes;
        report
    }
}

impl Deref for Machine {
    type Target = spte_drive::Machine<Radix>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

#[test]
fn a_table_in_memory_is_big_endian() {
    let machine = Machine::new(0);
    machine.map(PAGE, 0x1_2345_0000, PAGE, Access::RX).unwrap();
    assert_eq!(machine.word(PAGE).load().to_ne_bytes(), [0xc0, 0, 0, 1, 0x23, 0x45, 0x01, 0x05]);
    let rows = machine.table.walk(Gpa::new(PAGE));
    assert_eq!(rows.len(), 4);
    // The link to a table of 32 entries: its address is a multiple of 256.
    let link = rows[2].raw;
    assert_eq!((link >> 63, link & 0x1f, link & 0xe0), (1, 5, 0));
    machine.table.check().unwrap();
}

#[test]
fn a_split_is_broken_flushed_and_made_in_this_order() {
    let machine = Machine::new(LARGE);
    machine.map(LARGE, 1 << 30, LARGE, Access::RWX).unwrap();
    assert_eq!(machine.flushes(), [], "what was absent owes nothing");
    machine.table.split(range(LARGE, LARGE)).unwrap();
    let l2 = level(2);
    let broken = Seen { ranges: vec![(LARGE, LARGE, Some(l2), false)], kind: Kind::Claimed, level: l2 };
    assert_eq!(machine.flushes(), [broken], "nothing valid during the flush, which names the size of the leaf");
    assert_eq!(machine.spec(LARGE + 3 * PAGE).output, OutputAddr::new((1 << 30) + 3 * PAGE));
    assert_eq!(machine.table.stats().leaves[..2], [32, 0]);
}

#[test]
fn a_collapse_is_broken_flushed_and_made_in_this_order() {
    let machine = Machine::new(LARGE);
    machine.map(LARGE, 1 << 30, LARGE, Access::RWX).unwrap();
    machine.table.split(range(LARGE, LARGE)).unwrap();
    machine.touch(LARGE + PAGE, Access::WRITE);
    machine.flushes();
    let whole = range(LARGE, LARGE);
    assert_eq!(machine.space.admit(whole, |admission| machine.table.collapse(admission, whole).unwrap()).unwrap(), 1);
    let made = Seen { ranges: vec![(LARGE, LARGE, Some(L1), true)], kind: Kind::Claimed, level: level(2) };
    assert_eq!(machine.flushes(), [made], "a link went with leaves of 64K");
    let spec = machine.spec(LARGE);
    assert_eq!((spec.output, spec.dirty), (OutputAddr::new(1 << 30), true));
}

#[test]
fn rights_change_in_place() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::RX).unwrap();
    assert_eq!(machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap().raised, 1);
    assert_eq!(machine.flushes(), [], "whoever has the old right faults once for nothing");
    assert_eq!(machine.table.arm(range(PAGE, PAGE)).unwrap().leaves, 1);
    let flushed = Seen { ranges: vec![(PAGE, PAGE, Some(L1), false)], kind: Kind::Leaf, level: L1 };
    assert_eq!(machine.flushes(), [flushed], "one flush, during which the entry is valid");
    assert_eq!(machine.table.restrict(range(PAGE, PAGE), Access::READ).unwrap().leaves, 1);
    assert_eq!(machine.flushes()[0].kind, Kind::Leaf);
    assert_eq!(machine.spec(PAGE).access, Access::READ);
}

#[test]
fn mapping_what_is_mapped_so_already_writes_nothing() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    let before = machine.word(PAGE).load();
    let again = machine.map(PAGE, 0x8_0000, PAGE, Access::READ).unwrap();
    assert_eq!((again.made, again.raised, again.already), (0, 0, 1), "rights are only ever added");
    assert_eq!(machine.word(PAGE).load(), before);
    assert_eq!(machine.flushes(), []);
}

#[test]
fn another_output_over_a_leaf_is_a_conflict() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::READ).unwrap();
    let before = machine.word(PAGE).load();
    let refused = machine.map(PAGE, 0x7_0000, PAGE, Access::RWX);
    assert!(matches!(refused, Err(MapError::Conflict { .. })));
    let io = RadixAttrs::default().storage(Storage::NonIdempotent);
    assert!(matches!(machine.map_as(PAGE, 0x8_0000, PAGE, Access::READ, io), Err(MapError::Conflict { .. })));
    assert_eq!(machine.word(PAGE).load(), before, "neither frame was ORed into the other");
}

#[test]
fn a_large_leaf_is_young_once() {
    let machine = Machine::new(0);
    machine.map(0, 1 << 30, LARGE, Access::RWX).unwrap();
    assert_eq!(machine.table.age(range(0, LARGE)), Ok(1), "32 pages, one leaf");
    assert_eq!(machine.table.age(range(0, LARGE)), Ok(0));
    machine.touch(5 * PAGE, Access::READ);
    assert_eq!((machine.table.test_age(range(0, LARGE)), machine.table.age(range(0, PAGE))), (1, Ok(1)));
    assert_eq!(machine.flushes(), []);
}

#[test]
fn a_harvest_clears_changed_and_flushes() {
    let machine = Machine::new(0);
    machine.map(0, 1 << 30, LARGE, Access::RWX).unwrap();
    assert_eq!(machine.table.harvest_dirty(range(0, LARGE)).unwrap(), []);
    machine.touch(5 * PAGE, Access::WRITE);
    assert_eq!(machine.table.harvest_dirty(range(0, LARGE)).unwrap(), [range(0, LARGE)]);
    let flushed = Seen { ranges: vec![(0, LARGE, Some(level(2)), false)], kind: Kind::Leaf, level: level(2) };
    assert_eq!(machine.flushes(), [flushed]);
    assert_eq!(machine.table.harvest_dirty(range(0, LARGE)).unwrap(), []);
    assert_eq!(machine.spec(0).access, Access::RWX, "no write protection is needed");
}

#[test]
fn a_dirty_large_leaf_is_reported_whole() {
    let machine = Machine::new(0);
    machine.map(0, 1 << 30, LARGE, Access::RWX).unwrap();
    machine.touch(5 * PAGE, Access::WRITE);
    machine.table.unmap(range(0, LARGE)).unwrap();
    assert_eq!(machine.heard(), [range(0, LARGE)]);
    let flushed = Seen { ranges: vec![(0, LARGE, Some(level(2)), false)], kind: Kind::Absent, level: level(2) };
    assert_eq!(machine.flushes(), [flushed]);
}

#[test]
fn an_unmapped_table_is_flushed_with_its_link() {
    let machine = Machine::new(0);
    for page in 0..32 {
        machine.map(page * PAGE, page * 2 * PAGE, PAGE, Access::RWX).unwrap();
    }
    machine.flushes();
    machine.table.unmap(range(0, LARGE)).unwrap();
    let flushes = machine.flushes();
    assert_eq!(flushes.len(), 1);
    assert_eq!(flushes[0].ranges, [(0, LARGE, Some(L1), true)]);
    let ranges = [FlushRange { range: range(0, LARGE), leaves: Leaves::Of(L1), links: L1.above() }];
    let request = FlushRequest { ranges: &ranges, all: false, nonblocking: false };
    let steps: Vec<Step> = Steps::new(machine.table.format(), TlbFixes::default(), 3, &request).collect();
    assert_eq!(steps[1], Step::Tlbie(Tlbie::partition(3, Ric::PageWalk)));
    assert_eq!(steps.len(), 1 + 1 + 32 + 3);
}

#[test]
fn part_of_a_large_leaf_unmapped_leaves_the_rest() {
    let machine = Machine::new(0);
    let io = RadixAttrs::default().storage(Storage::NonIdempotent);
    machine.map_as(0, 1 << 30, LARGE, Access::READ | Access::WRITE, io).unwrap();
    machine.table.unmap(range(3 * PAGE, PAGE)).unwrap();
    assert_eq!(machine.kind(3 * PAGE), Kind::Absent);
    for at in [0, 2 * PAGE, 4 * PAGE, LARGE - PAGE] {
        let spec = machine.spec(at);
        assert_eq!((spec.output.as_u64(), spec.access, spec.attrs), ((1 << 30) + at, Access::READ | Access::WRITE, io));
    }
}

#[test]
fn what_was_unmapped_is_filled_after_a_flush() {
    let machine = Arc::new(Machine::new(PAGE));
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    let other = Arc::clone(&machine);
    let fill = move || assert_eq!(other.map(PAGE, 0x9_0000, PAGE, Access::RWX).unwrap().made, 1);
    machine.meanwhile(fill);
    machine.table.unmap(range(PAGE, PAGE)).unwrap();
    let of_unmap = Seen { ranges: vec![(PAGE, PAGE, Some(L1), false)], kind: Kind::Absent, level: L1 };
    let of_fill = Seen { ranges: vec![(PAGE, PAGE, None, true)], kind: Kind::Claimed, level: L1 };
    assert_eq!(machine.flushes(), [of_unmap, of_fill], "the entry is claimed while who fills it flushes it");
    assert_eq!(machine.spec(PAGE).output, OutputAddr::new(0x9_0000));
}

#[test]
fn a_late_change_after_an_unmap_is_told() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    machine.stores_late(PAGE);
    machine.table.unmap(range(PAGE, PAGE)).unwrap();
    assert_eq!(machine.heard(), [range(PAGE, PAGE)]);
    assert_eq!((machine.word(PAGE).load(), machine.kind(PAGE)), (0, Kind::Absent), "and the entry is clean again");
    // With its table too.
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    machine.stores_late(PAGE);
    machine.table.unmap(range(0, LARGE)).unwrap();
    assert_eq!(machine.heard(), [range(PAGE, PAGE)]);
}

#[test]
fn a_late_change_during_change_pte_is_told_for_the_old_page() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    let guard = machine.space.retain(range(PAGE, PAGE)).unwrap();
    machine.stores_late(PAGE);
    let (expected, new) = (OutputAddr::new(0x8_0000), OutputAddr::new(0x9_0000));
    guard.change_pte(&[Change { page: Gpa::new(PAGE), expected, new }]).unwrap();
    guard.close().unwrap();
    assert_eq!(machine.heard(), [range(PAGE, PAGE)]);
    let spec = machine.spec(PAGE);
    assert_eq!((spec.output, spec.dirty), (new, false), "the new page was not written");
}

/// R of the entry that is taken away is the new entry's too, also where it came late: the page was used.
#[test]
fn a_late_reference_during_change_pte_stays_with_the_page() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    let guard = machine.space.retain(range(PAGE, PAGE)).unwrap();
    assert_eq!(machine.table.age(range(PAGE, PAGE)), Ok(1));
    machine.stores_late(PAGE);
    let (expected, new) = (OutputAddr::new(0x8_0000), OutputAddr::new(0x9_0000));
    guard.change_pte(&[Change { page: Gpa::new(PAGE), expected, new }]).unwrap();
    guard.close().unwrap();
    assert!(machine.spec(PAGE).accessed);
}

#[test]
fn a_late_change_during_a_split_goes_to_the_pages() {
    let machine = Machine::new(0);
    machine.map(0, 1 << 30, LARGE, Access::RWX).unwrap();
    machine.stores_late(0);
    machine.table.split(range(0, LARGE)).unwrap();
    assert_eq!(machine.heard(), []);
    let dirty = machine.table.harvest_dirty(range(0, LARGE)).unwrap();
    assert_eq!(dirty.iter().map(|range| range.len()).sum::<u64>(), LARGE, "any of them may be it");
}

#[test]
fn change_pte_breaks_flushes_and_makes() {
    let machine = Machine::new(PAGE);
    machine.map(PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    machine.touch(PAGE, Access::WRITE);
    let report = machine.change(PAGE, 0x8_0000, 0x9_0000);
    assert_eq!(report, Outcome::Changed);
    let broken = Seen { ranges: vec![(PAGE, PAGE, Some(L1), false)], kind: Kind::Claimed, level: L1 };
    assert_eq!(machine.flushes()[0], broken, "nothing valid during the flush");
    let spec = machine.spec(PAGE);
    let expected = (OutputAddr::new(0x9_0000), Access::RX, true, false);
    assert_eq!((spec.output, spec.access, spec.accessed, spec.dirty), expected);
    assert_eq!(machine.heard(), [range(PAGE, PAGE)], "the write before the window was told when it opened");
}

#[test]
fn change_pte_of_an_io_page_keeps_its_attribute() {
    let machine = Machine::new(PAGE);
    let tolerant = RadixAttrs { software: true, ..RadixAttrs::default().storage(Storage::Tolerant) };
    machine.map_as(PAGE, 0x8_0000, PAGE, Access::READ | Access::WRITE, tolerant).unwrap();
    assert_eq!(machine.change(PAGE, 0x8_0000, 0x9_0000), Outcome::Changed);
    assert_eq!((machine.spec(PAGE).attrs, machine.spec(PAGE).access), (tolerant, Access::READ));
}

#[test]
fn change_pte_never_creates() {
    let machine = Machine::new(PAGE);
    // A neighbour keeps the table.
    machine.map(2 * PAGE, 0x8_0000, PAGE, Access::RWX).unwrap();
    assert_eq!(machine.change(PAGE, 0x8_0000, 0x9_0000), Outcome::Absent);
    assert_eq!(machine.kind(PAGE), Kind::Absent);
    // R and C alone are nothing.
    let facts = machine.table.format().memory_of(0x180);
    machine.word(PAGE).store(facts);
    assert_eq!(machine.change(PAGE, 0x8_0000, 0x9_0000), Outcome::Absent);
    assert_eq!(machine.kind(PAGE), Kind::Absent);
}

#[test]
fn change_pte_of_a_page_of_a_large_leaf_splits_it() {
    let machine = Machine::new(0);
    machine.map(0, 1 << 30, LARGE, Access::RWX).unwrap();
    assert_eq!(machine.change(PAGE, (1 << 30) + PAGE, 0x9_0000), Outcome::Changed);
    assert_eq!((machine.spec(PAGE).output, machine.spec(PAGE).access), (OutputAddr::new(0x9_0000), Access::RX));
    assert_eq!(machine.spec(2 * PAGE).output, OutputAddr::new((1 << 30) + 2 * PAGE));
    assert_eq!(machine.spec(2 * PAGE).access, Access::RWX);
    machine.table.check().unwrap();
}

#[test]
fn empty_tables_go_up_to_the_root_and_not_the_root() {
    let machine = Machine::new(0);
    let at = 0x1_2345_6789_0000;
    machine.map(at, 0x8_0000, PAGE, Access::READ).unwrap();
    assert_eq!(machine.table.stats().tables, 4);
    machine.table.unmap(range(0, 1 << 52)).unwrap();
    assert_eq!(machine.table.stats().tables, 1);
    machine.map((1 << 52) - PAGE, 0x8_0000, PAGE, Access::READ).unwrap();
    assert_eq!(machine.kind(0), Kind::Absent, "no wrap");
    machine.table.check().unwrap();
}
