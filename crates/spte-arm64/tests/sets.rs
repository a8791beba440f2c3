// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Contiguous sets as the engine makes, keeps and dissolves them: seen from inside its flushes, with hardware played on
//! raw entries, against the model, and with two operations interleaved where it hurts.

mod common;

use std::{
    ops::Deref,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use common::*;
use notifier_core::{Access, Admission, Change, Gpa, GpaRange, Hva, Outcome, OutputAddr, SlotFlags, SlotSpec};
use spte_arm64::*;
use spte_core::{
    Entry, FoldError, HarvestError, MapError, MapOptions, PageSource, RemoveError, SplitError, TableLayout,
    TableRangeError,
    format::{Format, Kind, LeafSpec, Level},
};
use spte_drive::{named, range};

/// The Contiguous bit.
const MARK: u64 = 1 << 52;
/// AF.
const YOUNG: u64 = 1 << 10;
/// S2AP\[1\]: with DBM, that hardware saw a write.
const WRITTEN: u64 = 1 << 7;
const DBM: u64 = 1 << 51;

/// One flush: its ranges, and how many leaves the watched range had meanwhile.
#[derive(Debug, Clone, PartialEq)]
struct Seen {
    ranges: Vec<(u64, u64, Option<Level>, bool)>,
    leaves: usize,
}

/// A table, who flushes it, and who hears what was written.
struct Machine<F: Format = Stage2>(spte_drive::Machine<F, Seen>);

impl<F: Format> Deref for Machine<F> {
    type Target = spte_drive::Machine<F, Seen>;

    fn deref(&self) -> &Self::Target {
        &self.0
    }
}

impl<F: Format<Attrs = Stage2Attrs>> Machine<F> {
    fn new(format: F, watched: GpaRange) -> Self {
        Self(spte_drive::Machine::new(format, move |table, request| {
            let mut leaves = 0;
            table.visit(watched, |found| leaves += usize::from(found.kind == Kind::Leaf));
            Seen { ranges: named(request), leaves }
        }))
    }

    fn is_marked(&self, at: u64) -> bool {
        let found = self.found(at);
        found.kind == Kind::Leaf && found.raw & MARK != 0
    }

    /// Marked leaves in `range`.
    fn marked(&self, range: GpaRange) -> usize {
        let mut marked = 0;
        self.table.visit(range, |found| marked += usize::from(found.kind == Kind::Leaf && found.raw & MARK != 0));
        marked
    }

    /// Whether the sink was told of each byte of `range`, since it was last cleared.
    fn heard(&self, range: GpaRange) -> bool {
        let mut told: Vec<GpaRange> = self.dirty().clone();
        told.sort_by_key(|told| told.start());
        let mut at = range.start();
        for told in told {
            if told.start() <= at {
                at = at.max(told.end());
            }
        }
        at >= range.end()
    }

    fn heard_nothing(&self) -> bool {
        self.dirty().is_empty()
    }

    /// Sets bits of the leaf over `at` as hardware does: a write only where DBM lets it, young only what is there. Whether
    /// it did.
    fn record(&self, at: u64, bits: u64) -> bool {
        let _pin = self.space.pin();
        let rows = self.table.walk(Gpa::new(at));
        let found = *rows.last().unwrap();
        if found.kind != Kind::Leaf {
            return false;
        }
        let above = rows.iter().rev().nth(1);
        let page = match above.map(|found| found.kind) {
            Some(Kind::Table(page)) => page,
            _ => self.table.root(),
        };
        let geometry = self.table.format().geometry();
        let layout = TableLayout { bytes: geometry.table_bytes(found.level) };
        // SAFETY: a page of this table with the layout of its level, linked when it was read under the pin.
        let entries = unsafe { self.table.pages().entries(page, layout) };
        // SAFETY: an index of this level is inside its page.
        let entry: &Entry = unsafe { entries.add(geometry.index(found.level, at)).as_ref() };
        let mut old = entry.load();
        loop {
            let grants = old & 1 != 0 && (bits & WRITTEN == 0 || old & (DBM | WRITTEN) != 0);
            if !grants {
                return false;
            }
            match entry.compare_exchange(old, old | bits) {
                Ok(_) => return true,
                Err(other) => old = other,
            }
        }
    }
}

/// A kind of set, and one in its place.
#[derive(Debug, Clone, Copy)]
struct Place {
    granule: Granule,
    number: i8,
    /// Members.
    members: u64,
    /// Bytes that a member spans.
    span: u64,
}

impl Place {
    /// From the manual's table of sizes.
    const ALL: [Self; 7] = [
        Self { granule: Granule::K4, number: 3, members: 16, span: 4 << 10 },
        Self { granule: Granule::K4, number: 2, members: 16, span: 2 << 20 },
        Self { granule: Granule::K4, number: 1, members: 16, span: 1 << 30 },
        Self { granule: Granule::K16, number: 3, members: 128, span: 16 << 10 },
        Self { granule: Granule::K16, number: 2, members: 32, span: 32 << 20 },
        Self { granule: Granule::K64, number: 3, members: 32, span: 64 << 10 },
        Self { granule: Granule::K64, number: 2, members: 32, span: 512 << 20 },
    ];

    fn level(self) -> Level {
        level(self.number)
    }

    fn bytes(self) -> u64 {
        self.members * self.span
    }

    /// Where the set begins: not at the beginning of its table.
    fn start(self) -> u64 {
        self.bytes()
    }

    /// Where it points.
    fn output(self) -> u64 {
        5 * self.bytes()
    }

    fn whole(self) -> GpaRange {
        range(self.start(), self.bytes())
    }

    fn at(self, member: u64) -> u64 {
        self.start() + member * self.span
    }

    fn member(self, member: u64) -> GpaRange {
        range(self.at(member), self.span)
    }

    fn options(self) -> Stage2Options {
        Stage2Options { accessed_dirty: AccessedDirty::Hardware, ..of(self.granule) }
    }

    /// A machine that watches the set, with leaves that could be a set.
    fn leaves(self, access: Access) -> Machine {
        let machine = Machine::new(stage2(self.options()), self.whole());
        machine.map_with(self.whole(), self.output(), access, MapOptions::default().largest(self.span)).unwrap();
        assert_eq!(machine.marked(self.whole()), 0);
        machine
    }

    /// The same, folded.
    fn folded(self, access: Access) -> Machine {
        let machine = self.leaves(access);
        assert_eq!(machine.table.fold(self.whole()), Ok(1));
        machine.flushes();
        self.assert_set(&machine);
        machine
    }

    fn assert_set<F: Format<Attrs = Stage2Attrs>>(self, machine: &Machine<F>) {
        let format = stage2(self.options());
        let first = machine.found(self.start());
        for member in 0..self.members {
            let found = machine.found(self.at(member));
            assert_eq!((found.kind, found.level), (Kind::Leaf, self.level()), "{self:?}, member {member}");
            let checked = format.check_contiguous(self.level(), first.raw, member as u16, found.raw);
            assert_eq!(checked, Ok(()), "{self:?}, member {member}");
        }
    }

    /// Where every leaf of the set is broken and the whole of it, and nothing else, is flushed.
    fn broken(self) -> Seen {
        Seen { ranges: vec![(self.start(), self.bytes(), Some(self.level()), false)], leaves: 0 }
    }

    fn specs(self, machine: &Machine) -> Vec<LeafSpec<Stage2Attrs>> {
        (0..self.members).map(|member| machine.spec(self.at(member))).collect()
    }
}

// ---- folding ----

#[test]
fn a_fold_breaks_all_flushes_the_span_and_makes_all() {
    for place in Place::ALL {
        let machine = place.leaves(Access::RWX);
        let before = place.specs(&machine);
        machine.flushes();
        assert_eq!(machine.table.fold(place.whole()), Ok(1), "{place:?}");
        assert_eq!(machine.flushes(), [place.broken()]);
        place.assert_set(&machine);
        assert_eq!(place.specs(&machine), before, "{place:?}: outputs, rights, attributes and facts");
        machine.table.check().unwrap();
        assert!(machine.heard_nothing());
        assert_eq!(machine.table.fold(place.whole()), Ok(0), "it is one already");
        assert_eq!(machine.flushes(), []);
        place.assert_set(&machine);
    }
}

#[test]
fn a_fold_of_a_wide_range_makes_each_set_in_it_and_no_part_of_one() {
    for place in Place::ALL.into_iter().filter(|place| place.number == 3) {
        let (bytes, span) = (place.bytes(), place.span);
        let machine = Machine::new(stage2(place.options()), place.whole());
        let mapped = range(bytes - span, 2 * bytes + 2 * span);
        machine.map_with(mapped, 5 * bytes - span, Access::READ, MapOptions::default().largest(span)).unwrap();
        machine.flushes();
        for part in [
            range(bytes + span, bytes - span),
            range(bytes, bytes - span),
            range(bytes + span, bytes),
            range(bytes - span, bytes),
        ] {
            assert_eq!(machine.table.fold(part), Ok(0), "{place:?} {part}");
        }
        assert_eq!((machine.marked(mapped), machine.flushes()), (0, vec![]));
        assert_eq!(machine.table.fold(mapped), Ok(2));
        assert_eq!(machine.marked(mapped) as u64, 2 * place.members);
        place.assert_set(&machine);
        assert!(!machine.is_marked(bytes - span) && !machine.is_marked(3 * bytes));
    }
}

#[test]
fn facts_do_not_keep_leaves_from_a_set_and_become_its() {
    for place in Place::ALL {
        let machine = place.leaves(Access::RWX);
        machine.table.age(place.whole()).unwrap();
        assert!(machine.record(place.at(3), YOUNG | WRITTEN));
        assert_eq!(machine.table.fold(place.whole()), Ok(1), "{place:?}");
        place.assert_set(&machine);
        assert!(place.specs(&machine).iter().all(|spec| spec.accessed && spec.dirty));
        assert!(machine.heard_nothing(), "nothing went");
        // Read-only leaves of which some were written before.
        let machine = place.leaves(Access::RWX);
        assert!(machine.record(place.at(3), WRITTEN));
        machine.table.restrict(place.whole(), Access::READ).unwrap();
        assert_eq!(machine.spec(place.at(3)).access, Access::READ);
        assert_eq!(machine.table.fold(place.whole()), Ok(1), "{place:?}");
        place.assert_set(&machine);
        let told = machine.heard(place.member(3));
        assert!(told || place.specs(&machine).iter().all(|spec| spec.dirty));
        machine.table.check().unwrap();
    }
}

#[test]
fn what_is_not_alike_or_not_in_a_row_is_not_folded() {
    type Spoil = fn(&Machine, Place);
    let spoils: [(&str, Spoil); 8] = [
        ("an armed leaf", |machine, place| {
            machine.table.arm(place.member(3)).unwrap();
        }),
        ("all armed", |machine, place| {
            machine.table.arm(place.whole()).unwrap();
        }),
        ("other rights", |machine, place| {
            machine.table.restrict(place.member(place.members - 1), Access::READ).unwrap();
        }),
        ("retained: not upgradable", |machine, place| {
            let guard = machine.space.retain(place.member(0)).unwrap();
            guard.keep(place.member(0)).unwrap();
            guard.close().unwrap();
        }),
        ("a hole", |machine, place| {
            machine.table.unmap(place.member(1)).unwrap();
        }),
        ("another output", |machine, place| {
            machine.table.unmap(place.member(5)).unwrap();
            let options = MapOptions::default().largest(place.span);
            machine.map_with(place.member(5), 64 * place.bytes(), Access::RWX, options).unwrap();
        }),
        ("another type", |machine, place| {
            machine.table.unmap(place.member(5)).unwrap();
            let attrs = Stage2Attrs::default().memory(MemoryType::DEVICE);
            let options = MapOptions::default().largest(place.span).attrs(attrs);
            machine.map_with(place.member(5), place.output() + 5 * place.span, Access::RWX, options).unwrap();
        }),
        ("the user's bit", |machine, place| {
            machine.table.unmap(place.member(5)).unwrap();
            let attrs = Stage2Attrs { software: true, ..Stage2Attrs::default() };
            let options = MapOptions::default().largest(place.span).attrs(attrs);
            machine.map_with(place.member(5), place.output() + 5 * place.span, Access::RWX, options).unwrap();
        }),
    ];
    for place in Place::ALL {
        for (name, spoil) in spoils {
            let machine = place.leaves(Access::RWX);
            spoil(&machine, place);
            machine.flushes();
            let before: Vec<u64> = (0..place.members).map(|member| machine.found(place.at(member)).raw).collect();
            assert_eq!(machine.table.fold(place.whole()), Ok(0), "{place:?}: {name}");
            assert_eq!(machine.flushes(), [], "{place:?}: {name}");
            let after: Vec<u64> = (0..place.members).map(|member| machine.found(place.at(member)).raw).collect();
            assert_eq!(after, before, "{place:?}: {name}");
        }
        // In a row, from an output that is not aligned to the set.
        let machine = Machine::new(stage2(place.options()), place.whole());
        let options = MapOptions::default().largest(place.span);
        machine.map_with(place.whole(), place.output() + place.span, Access::RWX, options).unwrap();
        assert_eq!(machine.table.fold(place.whole()), Ok(0), "{place:?}");
        assert_eq!(machine.flushes(), []);
    }
}

#[test]
fn a_member_that_is_split_keeps_its_set_from_being_folded() {
    for place in Place::ALL.into_iter().filter(|place| place.number < 3) {
        let machine = place.leaves(Access::RWX);
        machine.table.split_at(Gpa::new(place.at(3) + place.granule.bytes())).unwrap();
        machine.flushes();
        let block = range(place.at(2), place.span);
        assert_eq!(machine.table.fold(block), Ok(0));
        assert!(!machine.is_marked(place.at(2)), "{place:?}");
        let mut blocks = 0;
        machine.table.fold(place.whole()).unwrap();
        machine.table.visit(place.whole(), |found| {
            blocks += usize::from(found.level == place.level() && found.kind == Kind::Leaf && found.raw & MARK != 0);
        });
        assert_eq!(blocks, 0, "{place:?}");
    }
}

#[test]
fn a_root_smaller_than_a_set_has_none() {
    let small = [
        (Stage2Options { ipa_bits: 33, start: Start::SingleTable, ..of(Granule::K4) }, 1 << 30, 1 << 33),
        (Stage2Options { ipa_bits: 32, ..of(Granule::K64) }, 512 << 20, 1 << 32),
    ];
    for (options, span, all) in small {
        let machine = Machine::new(stage2(options), range(0, all));
        let options = MapOptions::default().sets(true);
        machine.map_with(range(0, all), 0, Access::RWX, options).unwrap();
        assert_eq!(machine.found(0).span, span);
        machine.flushes();
        assert_eq!(machine.table.fold(range(0, all)), Ok(0));
        assert_eq!((machine.marked(range(0, all)), machine.flushes()), (0, vec![]));
    }
}

#[test]
fn a_fold_beyond_the_table_or_across_a_page_does_nothing() {
    let machine = Place::ALL[0].leaves(Access::RWX);
    let wide = machine.table.fold(range((1 << 40) - 0x1_0000, 0x2_0000));
    assert!(matches!(wide, Err(FoldError::Range(TableRangeError::TooWide { .. }))));
    let skew = machine.table.fold(range(0x800, 0x1_0000));
    assert!(matches!(skew, Err(FoldError::Range(TableRangeError::Unaligned { .. }))));
}

// ---- sets that are made with their table ----

#[test]
fn sets_are_marked_where_their_table_is_made_and_cost_no_flush() {
    for place in Place::ALL {
        // With so many bits none of the levels is the root's.
        let machine = Machine::new(stage2(Stage2Options { ipa_bits: 48, ..place.options() }), place.whole());
        let (bytes, span) = (place.bytes(), place.span);
        let mapped = range(bytes - span, 2 * bytes + 2 * span);
        let options = MapOptions::default().largest(span).sets(true);
        machine.map_with(mapped, 5 * bytes - span, Access::RWX, options).unwrap();
        assert_eq!(machine.flushes(), [], "{place:?}");
        assert_eq!(machine.marked(mapped) as u64, 2 * place.members, "{place:?}: whole sets alone");
        place.assert_set(&machine);
        machine.table.check().unwrap();
        for at in (bytes - span..3 * bytes + span).step_by(span as usize) {
            assert_eq!(machine.spec(at).output.as_u64(), 4 * bytes + at);
        }
        // In a table that is there leaves are made one by one.
        let beside = range(4 * bytes, bytes);
        machine.map_with(beside, 8 * bytes, Access::RWX, options).unwrap();
        assert_eq!(machine.marked(beside), 0, "{place:?}");
        assert_eq!(machine.table.fold(beside), Ok(1));
    }
}

#[test]
fn sets_of_each_level_are_marked_by_one_map() {
    let machine = Machine::new(stage2(Stage2Options { ipa_bits: 48, ..Place::ALL[0].options() }), range(0, 1 << 20));
    // Outputs that are alike up to 32M: pages, then blocks of 2M, then pages.
    let (start, len) = ((32 << 20) - (1 << 20), (64 << 20) + (2 << 20));
    let options = MapOptions::default().sets(true);
    machine.map_with(range(start, len), (1 << 30) + start, Access::RWX, options).unwrap();
    let sets = |of: Level| {
        let mut marked = 0;
        machine.table.visit(range(start, len), |found| {
            marked += usize::from(found.level == of && found.kind == Kind::Leaf && found.raw & MARK != 0);
        });
        marked
    };
    assert_eq!((sets(level(3)), sets(level(2))), (512, 32));
    let place = Place::ALL[1];
    place.assert_set(&machine);
    machine.table.check().unwrap();
}

#[test]
fn outputs_that_are_not_aligned_are_in_no_set() {
    for place in Place::ALL.into_iter().filter(|place| place.number == 3) {
        let machine = Machine::new(stage2(place.options()), place.whole());
        let options = MapOptions::default().sets(true).largest(place.span);
        machine.map_with(place.whole(), place.output() + place.span, Access::RWX, options).unwrap();
        assert_eq!(machine.marked(place.whole()), 0, "{place:?}");
    }
}

#[test]
fn what_is_armed_or_logged_is_in_no_set() {
    for place in Place::ALL.into_iter().filter(|place| place.number == 3) {
        let machine = Machine::new(stage2(place.options()), place.whole());
        machine
            .map_with(place.whole(), place.output(), Access::RWX, MapOptions::default().sets(true).armed(true))
            .unwrap();
        assert_eq!(machine.marked(place.whole()), 0, "{place:?}: armed");
        let machine = Machine::new(stage2(place.options()), place.whole());
        let host = Hva::new(1 << 40);
        let slot = SlotSpec { guest: place.whole(), host: Some(host), flags: SlotFlags::LOG_DIRTY };
        machine.space.add_slot(slot).unwrap();
        machine.map_with(place.whole(), place.output(), Access::RWX, MapOptions::default().sets(true)).unwrap();
        assert_eq!(machine.marked(place.whole()), 0, "{place:?}: logged");
        machine.table.check().unwrap();
    }
}

// ---- changes of one member ----

/// A change of the member at `at`; what it translates to afterwards, and with which rights.
type Single = fn(&Machine, Place, u64) -> Option<(u64, Access)>;

fn change(page: u64, expected: u64, new: u64) -> Change<Gpa> {
    Change { page: Gpa::new(page), expected: OutputAddr::new(expected), new: OutputAddr::new(new) }
}

/// Changes of a writable set.
const OF_WRITABLE: [(&str, Single); 12] = [
    ("restrict", |machine, place, at| {
        assert_eq!(machine.table.restrict(range(at, place.span), Access::READ).unwrap().leaves, 1);
        Some((0, Access::READ))
    }),
    ("restrict to nothing", |machine, place, at| {
        machine.table.restrict(range(at, place.span), Access::empty()).unwrap();
        Some((0, Access::empty()))
    }),
    ("arm", |machine, place, at| {
        assert_eq!(machine.table.arm(range(at, place.span)).unwrap().leaves, 1);
        assert!(machine.spec(at).armed);
        Some((0, Access::RWX))
    }),
    ("protect with less", |machine, place, at| {
        let output = machine.spec(at).output.as_u64();
        let member = range(at, place.span);
        machine.install(member, output, Access::READ, |a| machine.table.protect(a, member, Access::READ)).unwrap();
        Some((0, Access::READ))
    }),
    ("unmap", |machine, place, at| {
        assert_eq!(machine.table.unmap(range(at, place.span)).unwrap().leaves, 1);
        None
    }),
    ("harvest of what was written", |machine, place, at| {
        assert!(machine.record(place.at(place.members / 2), WRITTEN));
        assert_eq!(machine.table.harvest_dirty(range(at, place.span)), Ok(vec![range(at, place.span)]));
        Some((0, Access::RWX))
    }),
    ("split", |machine, place, at| {
        machine.table.split(range(at, place.granule.bytes())).unwrap();
        Some((0, Access::RWX))
    }),
    ("split at the middle of a block", |machine, place, at| {
        // Between pages there is nothing to split.
        if place.number == 3 {
            machine.table.split(range(at, place.span)).unwrap();
        } else {
            machine.table.split_at(Gpa::new(at + place.span / 2)).unwrap();
        }
        Some((0, Access::RWX))
    }),
    ("a Retained window over a page", |machine, place, at| {
        let page = range(at, place.granule.bytes());
        let guard = machine.space.retain(page).unwrap();
        guard.keep(page).unwrap();
        guard.close().unwrap();
        Some((0, Access::RX))
    }),
    ("a Zapped window over a page", |machine, place, at| {
        machine.space.zap(range(at, place.granule.bytes())).unwrap().close().unwrap();
        None
    }),
    ("a Retained window that keeps nothing", |machine, place, at| {
        machine.space.retain(range(at, place.granule.bytes())).unwrap().close().unwrap();
        None
    }),
    ("change_pte", |machine, place, at| {
        let guard = machine.space.retain(range(at, place.granule.bytes())).unwrap();
        let output = machine.spec(at).output.as_u64();
        let done = guard.change_pte(&[change(at, output, 0x77_0000)]).unwrap();
        assert_eq!(done[0].outcome, Outcome::Changed);
        guard.close().unwrap();
        Some((0x77_0000, Access::RX))
    }),
];

/// Changes of a set without the right to write.
const OF_READ_ONLY: [(&str, Single); 6] = [
    ("protect with more", |machine, place, at| {
        let output = machine.spec(at).output.as_u64();
        let member = range(at, place.span);
        machine.install(member, output, Access::RWX, |a| machine.table.protect(a, member, Access::RWX)).unwrap();
        Some((0, Access::RWX))
    }),
    ("a map with more", |machine, place, at| {
        let output = machine.spec(at).output.as_u64();
        let options = MapOptions::default().largest(place.span);
        assert_eq!(machine.map_with(range(at, place.span), output, Access::RWX, options).unwrap().raised, 1);
        Some((0, Access::RWX))
    }),
    ("a map of a page with more", |machine, place, at| {
        let output = machine.spec(at).output.as_u64();
        let page = range(at, place.granule.bytes());
        machine.map_with(page, output, Access::RWX, MapOptions::default()).unwrap();
        Some((0, Access::RWX))
    }),
    ("an armed map with more", |machine, place, at| {
        let output = machine.spec(at).output.as_u64();
        let options = MapOptions::default().largest(place.span).armed(true);
        machine.map_with(range(at, place.span), output, Access::RWX, options).unwrap();
        assert!(machine.spec(at).armed);
        Some((0, Access::RWX))
    }),
    ("change_pte", |machine, place, at| {
        let guard = machine.space.retain(range(at, place.granule.bytes())).unwrap();
        assert_eq!(machine.flushes(), [], "the window finds nothing to take");
        place.assert_set(machine);
        let output = machine.spec(at).output.as_u64();
        let done = guard.change_pte(&[change(at, output, 0x77_0000)]).unwrap();
        assert_eq!(done[0].outcome, Outcome::Changed);
        guard.close().unwrap();
        Some((0x77_0000, Access::RX))
    }),
    ("change_pte of another output", |machine, place, at| {
        let guard = machine.space.retain(range(at, place.granule.bytes())).unwrap();
        let done = guard.change_pte(&[change(at, 0x33_0000, 0x77_0000)]).unwrap();
        assert_eq!(done[0].outcome, Outcome::Zapped);
        guard.close().unwrap();
        None
    }),
];

/// Each change of one member, at the first, one in the middle and the last.
fn dissolves(access: Access, changes: &[(&str, Single)]) {
    for place in Place::ALL {
        for &(name, single) in changes {
            for member in [0, place.members / 2 + 1, place.members - 1] {
                let machine = place.folded(access);
                let before = place.specs(&machine);
                let at = place.at(member);
                let after = single(&machine, place, at);
                let what = format!("{place:?}, member {member}: {name}");
                let flushes = machine.flushes();
                assert_eq!(
                    flushes.first(),
                    Some(&place.broken()),
                    "{what}: nothing valid during the flush of the span"
                );
                assert_eq!(machine.marked(place.whole()), 0, "{what}");
                match after {
                    None => assert_eq!(machine.kind(at), Kind::Absent, "{what}"),
                    Some((output, access)) => {
                        let output = if output == 0 { before[member as usize].output.as_u64() } else { output };
                        let spec = machine.spec(at);
                        assert_eq!((spec.output.as_u64(), spec.access), (output, access), "{what}");
                    }
                }
                let written = name.starts_with("harvest");
                for other in (0..place.members).filter(|other| *other != member) {
                    let spec = machine.spec(place.at(other));
                    let expected = LeafSpec { dirty: written, ..before[other as usize] };
                    assert_eq!(spec, expected, "{what}: member {other} stays as it was");
                }
                machine.table.check().unwrap();
                assert!(machine.heard_nothing(), "{what}: nothing was written");
            }
        }
    }
}

#[test]
fn what_changes_one_writable_member_dissolves_the_set_first() {
    dissolves(Access::RWX, &OF_WRITABLE);
}

#[test]
fn what_changes_one_read_only_member_dissolves_the_set_first() {
    dissolves(Access::RX, &OF_READ_ONLY);
}

#[test]
fn what_changes_nothing_leaves_the_set_alone() {
    for place in Place::ALL {
        let machine = place.folded(Access::RX);
        let member = place.member(3);
        machine.table.restrict(member, Access::RX).unwrap();
        machine.table.arm(member).unwrap();
        let options = MapOptions::default().largest(place.span);
        let output = place.output() + 3 * place.span;
        assert_eq!(machine.map_with(member, output, Access::READ, options).unwrap().already, 1);
        machine.install(member, output, Access::RX, |a| machine.table.protect(a, member, Access::RX)).unwrap();
        assert_eq!(machine.table.harvest_dirty(place.whole()), Ok(vec![]));
        let guard = machine.space.retain(member).unwrap();
        guard.keep(member).unwrap();
        guard.close().unwrap();
        assert_eq!(machine.table.trim(range(0, 1 << 40)), Ok(0));
        let conflict = machine.map_with(member, output ^ place.bytes(), Access::READ, options);
        assert!(matches!(conflict, Err(MapError::Conflict { .. })));
        let absent = machine.map_with(member, output, Access::READ, options.only_absent(true));
        assert!(matches!(absent, Err(MapError::Present { .. })));
        assert_eq!(machine.flushes(), [], "{place:?}");
        place.assert_set(&machine);
        // Writable and not written: a harvest finds nothing.
        let machine = place.folded(Access::RWX);
        assert_eq!(machine.table.harvest_dirty(place.whole()), Ok(vec![]));
        place.assert_set(&machine);
    }
}

#[test]
fn a_change_of_all_of_a_set_changes_every_member() {
    for place in Place::ALL {
        let machine = place.folded(Access::RWX);
        assert_eq!(machine.table.restrict(place.whole(), Access::READ).unwrap().leaves, place.members);
        assert_eq!(machine.flushes().first(), Some(&place.broken()));
        assert!(place.specs(&machine).iter().all(|spec| spec.access == Access::READ));
        assert_eq!(machine.table.fold(place.whole()), Ok(1), "and it can be a set again");
        place.assert_set(&machine);
    }
}

#[test]
fn a_whole_set_is_unmapped_with_one_flush() {
    for place in Place::ALL {
        let machine = place.folded(Access::RWX);
        let removed = machine.table.unmap(place.whole()).unwrap();
        assert_eq!((removed.leaves, removed.young, removed.dirty), (place.members, place.members, 0), "{place:?}");
        assert_eq!(machine.flushes(), [place.broken()]);
        assert!((0..place.members).all(|member| machine.kind(place.at(member)) == Kind::Absent));
        assert!(machine.heard_nothing());
        machine.table.check().unwrap();
        // With a member of its neighbour, which stays a set of leaves of their own.
        let machine = place.folded(Access::RWX);
        let options = MapOptions::default().largest(place.span);
        let next = range(place.whole().end().as_u64(), place.bytes());
        machine.map_with(next, place.output() + place.bytes(), Access::RWX, options).unwrap();
        assert_eq!(machine.table.fold(next), Ok(1));
        machine.flushes();
        machine.table.unmap(range(place.start(), place.bytes() + place.span)).unwrap();
        assert!(machine.flushes().iter().all(|seen| seen.leaves == 0), "{place:?}");
        assert_eq!(machine.kind(next.start().as_u64()), Kind::Absent);
        assert_eq!(machine.kind(next.start().as_u64() + place.span), Kind::Leaf);
        assert_eq!(machine.marked(next), 0);
    }
}

#[test]
fn a_table_of_sets_collapses_into_a_block() {
    for place in Place::ALL.into_iter().filter(|place| place.number == 3) {
        let bytes = place.span << (place.granule.shift() - 3);
        let whole = range(bytes, bytes);
        for written in [false, true] {
            let machine = Machine::new(stage2(place.options()), whole);
            let options = MapOptions::default().largest(place.span).sets(true);
            machine.map_with(whole, 4 * bytes, Access::RWX, options).unwrap();
            assert_eq!(machine.marked(whole) as u64, bytes / place.span, "{place:?}");
            // One of them only: marks do not matter.
            machine.table.restrict(range(bytes, place.span), Access::RWX).unwrap();
            machine.table.split(range(bytes, place.span)).unwrap();
            assert_eq!(machine.marked(whole) as u64, bytes / place.span - place.members, "{place:?}");
            if written {
                assert!(machine.record(bytes + 7 * place.span, WRITTEN));
            }
            machine.flushes();
            let merged = machine.space.admit(whole, |admission| machine.table.collapse(admission, whole).unwrap());
            assert_eq!(merged.unwrap(), 1, "{place:?}");
            let flushes = machine.flushes();
            assert_eq!((flushes.len(), flushes[0].leaves), (1, 0), "{place:?}");
            let found = machine.found(bytes);
            assert_eq!((found.kind, found.level, found.raw & MARK), (Kind::Leaf, level(2), 0));
            assert_eq!(machine.spec(bytes), LeafSpec { dirty: written, ..spec(4 * bytes, Access::RWX) });
            machine.table.check().unwrap();
        }
    }
}

#[test]
fn a_block_of_a_set_splits_into_leaves_of_no_set() {
    for place in Place::ALL.into_iter().filter(|place| place.number < 3) {
        let machine = place.folded(Access::RWX);
        assert!(machine.record(place.at(5), WRITTEN));
        let page = place.granule.bytes();
        machine.table.unmap(range(place.at(2) + page, page)).unwrap();
        assert_eq!(machine.flushes().first(), Some(&place.broken()), "{place:?}");
        assert_eq!(machine.marked(place.whole()), 0);
        assert!(machine.heard(range(place.at(2) + page, page)), "{place:?}: written, as far as anybody knows");
        let spec = machine.spec(place.at(2));
        assert_eq!(spec.output.as_u64(), place.output() + 2 * place.span);
        assert!(spec.dirty && machine.spec(place.at(0)).dirty);
        machine.table.check().unwrap();
    }
}

// ---- facts ----

#[test]
fn a_write_that_another_member_recorded_is_not_lost() {
    type Take = fn(&Machine, Place, u64);
    let takes: [(&str, Take); 9] = [
        ("an unmap of the page", |machine, place, at| {
            let removed = machine.table.unmap(range(at, place.span)).unwrap();
            assert_eq!(removed.dirty, 1);
        }),
        ("an unmap of the set", |machine, place, _| {
            let removed = machine.table.unmap(place.whole()).unwrap();
            assert_eq!(removed.dirty, place.members);
        }),
        ("an unmap of everything", |machine, _, _| {
            machine.table.unmap(range(0, 1 << 40)).unwrap();
        }),
        ("a Zapped window over the page", |machine, place, at| {
            machine.space.zap(range(at, place.granule.bytes())).unwrap().close().unwrap();
        }),
        ("a Retained window over the page", |machine, place, at| {
            machine.space.retain(range(at, place.granule.bytes())).unwrap().close().unwrap();
        }),
        ("a Retained window over the set", |machine, place, _| {
            let guard = machine.space.retain(place.whole()).unwrap();
            guard.keep(place.whole()).unwrap();
            guard.close().unwrap();
        }),
        ("arming the page", |machine, place, at| {
            machine.table.arm(range(at, place.span)).unwrap();
        }),
        ("a harvest of the page", |machine, place, at| {
            let member = range(at, place.span);
            assert_eq!(machine.table.harvest_dirty(member), Ok(vec![member]));
            assert_eq!(machine.table.harvest_dirty(member), Ok(vec![]), "once");
            machine.dirty().push(member);
        }),
        ("a restriction, and an unmap", |machine, place, at| {
            machine.table.restrict(range(at, place.span), Access::READ).unwrap();
            machine.table.unmap(range(at, place.span)).unwrap();
        }),
    ];
    for place in Place::ALL {
        for (name, take) in takes {
            for (page, recorder) in [(0, place.members - 1), (place.members - 1, 0), (2, 1)] {
                let machine = place.folded(Access::RWX);
                // A second set beside it, which nobody wrote.
                let next = range(place.whole().end().as_u64(), place.bytes());
                let options = MapOptions::default().largest(place.span);
                machine.map_with(next, place.output() + place.bytes(), Access::RWX, options).unwrap();
                assert_eq!(machine.table.fold(next), Ok(1));
                assert!(machine.record(place.at(recorder), WRITTEN));
                let at = place.at(page);
                take(&machine, place, at);
                let what = format!("{place:?}, page {page} recorded in {recorder}: {name}");
                assert!(machine.heard(range(at, place.granule.bytes())), "{what}");
                let told = machine.dirty().clone();
                assert!(
                    told.iter().all(|told| place.whole().covers(told)),
                    "{what}: nothing else was written: {told:?}"
                );
                // The rest is written still, or has been told too.
                for other in (0..place.members).filter(|other| *other != page) {
                    let known = machine.heard(place.member(other)) || machine.spec(place.at(other)).dirty;
                    assert!(known, "{what}: member {other}");
                }
                machine.table.check().unwrap();
            }
        }
    }
}

#[test]
fn a_release_tells_of_all_of_a_written_set() {
    for place in Place::ALL {
        let mut machine = place.folded(Access::RWX);
        assert!(machine.record(place.at(4), WRITTEN));
        machine.0.leave();
        assert!(machine.heard(place.whole()), "{place:?}");
        assert_eq!(machine.kind(place.start()), Kind::Absent);
    }
}

#[test]
fn a_harvest_of_a_written_set_names_every_page_once() {
    for place in Place::ALL {
        let machine = place.folded(Access::RWX);
        assert!(machine.record(place.at(1), WRITTEN));
        let all: Vec<_> = (0..place.members).map(|member| place.member(member)).collect();
        assert_eq!(machine.table.harvest_dirty(place.whole()), Ok(all), "{place:?}");
        assert_eq!(machine.table.harvest_dirty(place.whole()), Ok(vec![]), "{place:?}");
        assert!(machine.heard_nothing());
    }
}

#[test]
fn a_set_is_young_if_one_member_is_and_ages_as_a_whole() {
    for place in Place::ALL {
        let machine = place.folded(Access::RWX);
        assert_eq!(machine.table.age(place.whole()), Ok(place.members), "{place:?}");
        assert_eq!(machine.table.test_age(place.whole()), 0);
        assert_eq!(machine.table.age(place.whole()), Ok(0), "young once");
        assert!(machine.record(place.at(6), YOUNG));
        assert_eq!(machine.table.test_age(place.whole()), place.members);
        assert_eq!(machine.table.test_age(place.member(2)), 1, "one of its pages");
        assert_eq!(machine.space.test_age(place.member(2)).ok(), Some(true));
        // By any page of it.
        assert_eq!(machine.table.age(place.member(2)), Ok(1), "{place:?}");
        assert_eq!(machine.table.test_age(place.whole()), 0, "{place:?}: all of it");
        assert!(place.specs(&machine).iter().all(|spec| !spec.accessed));
        // From the middle over the end, and up to the middle.
        let (half, end) = (place.members / 2, place.whole().end().as_u64());
        for member in [1, place.members - 1] {
            assert!(machine.record(place.at(member), YOUNG));
            assert_eq!(machine.table.age(range(place.at(half), end + 4096 * 16 - place.at(half))), Ok(half));
            assert!(machine.record(place.at(member), YOUNG));
            assert_eq!(machine.table.age(range(0, place.at(half))), Ok(half));
            assert!(machine.record(place.at(member), YOUNG));
            assert_eq!(machine.space.age(place.member(half)).ok(), Some(true));
            assert_eq!(machine.table.test_age(place.whole()), 0);
        }
        assert_eq!(machine.flushes(), [], "ageing flushes nothing");
        place.assert_set(&machine);
        assert!(machine.record(place.at(3), YOUNG));
        machine.table.restrict(place.member(5), Access::READ).unwrap();
        assert!(place.specs(&machine).iter().all(|spec| spec.accessed), "what was dissolved is young everywhere");
    }
}

#[test]
fn what_makes_one_member_young_makes_all_young() {
    for place in Place::ALL {
        let machine = place.folded(Access::RWX);
        machine.table.age(place.whole()).unwrap();
        assert!(machine.table.make_young(Gpa::new(place.at(3) + 8)));
        assert!(place.specs(&machine).iter().all(|spec| spec.accessed), "{place:?}: a fault that software handles");
        machine.table.age(place.whole()).unwrap();
        let output = place.output() + 5 * place.span;
        let options = MapOptions::default().largest(place.span);
        assert_eq!(machine.map_with(place.member(5), output, Access::RWX, options).unwrap().raised, 1);
        assert!(place.specs(&machine).iter().all(|spec| spec.accessed), "{place:?}: a map over what is old");
        assert_eq!(machine.flushes(), []);
        place.assert_set(&machine);
    }
}

#[test]
fn without_hardware_facts_a_writable_set_is_written() {
    for place in Place::ALL {
        let options = Stage2Options { accessed_dirty: AccessedDirty::Software, ..place.options() };
        let machine = Machine::new(stage2(options), place.whole());
        let options = MapOptions::default().largest(place.span);
        machine.map_with(place.whole(), place.output(), Access::RWX, options).unwrap();
        assert_eq!(machine.table.fold(place.whole()), Ok(1), "{place:?}");
        machine.table.arm(place.member(2)).unwrap();
        assert!(machine.heard(place.member(2)));
        assert_eq!(machine.table.upgrade(Gpa::new(place.at(2))), spte_core::Upgrade::Granted);
        assert_eq!(machine.table.fold(place.whole()), Ok(1), "what was upgraded folds again");
        machine.table.unmap(place.member(1)).unwrap();
        assert!(machine.heard(place.member(1)), "{place:?}");
        machine.table.check().unwrap();
    }
}

// ---- flushes that fail ----

#[test]
fn where_dissolving_is_not_flushed_the_set_is_gone_and_its_facts_are_told() {
    type Attempt = fn(&Machine, Place, u64);
    let attempts: [(&str, Access, Attempt); 9] = [
        ("unmap", Access::RWX, |machine, place, at| {
            let refused = machine.table.unmap(range(at, place.span));
            assert!(matches!(refused, Err(RemoveError::Flush { .. })), "{refused:?}");
        }),
        ("restrict", Access::RWX, |machine, place, at| {
            let refused = machine.table.restrict(range(at, place.span), Access::READ);
            assert!(matches!(refused, Err(RemoveError::Flush { .. })), "{refused:?}");
        }),
        ("arm", Access::RWX, |machine, place, at| {
            let refused = machine.table.arm(range(at, place.span));
            assert!(matches!(refused, Err(RemoveError::Flush { .. })), "{refused:?}");
        }),
        ("split", Access::RWX, |machine, place, at| {
            let refused = machine.table.split(range(at, place.span));
            assert!(matches!(refused, Err(SplitError::Flush { .. })), "{refused:?}");
        }),
        ("harvest", Access::RWX, |machine, place, at| {
            let refused = machine.table.harvest_dirty(range(at, place.span));
            assert!(matches!(&refused, Err(HarvestError::Flush { dirty, .. }) if dirty.is_empty()), "{refused:?}");
        }),
        ("protect", Access::RWX, |machine, place, at| {
            let (output, member) = (machine.spec(at).output.as_u64(), range(at, place.span));
            let protect = |a: &Admission<'_>| machine.table.protect(a, member, Access::READ);
            let refused = machine.install(member, output, Access::RWX, protect);
            assert!(matches!(refused, Err(MapError::Flush { at: stopped, .. }) if stopped == member.start()));
        }),
        ("a Zapped window", Access::RWX, |machine, place, at| {
            assert!(machine.space.zap(range(at, place.granule.bytes())).is_err());
            assert_eq!(machine.space.progress().count, 0);
        }),
        ("a Retained window", Access::RWX, |machine, place, at| {
            assert!(machine.space.window(range(at, place.granule.bytes())).nonblocking().open_retained().is_err());
            assert_eq!(machine.space.progress().count, 0);
        }),
        ("unmap of the set", Access::RWX, |machine, place, _| {
            let refused = machine.table.unmap(place.whole());
            assert!(matches!(refused, Err(RemoveError::Flush { .. })), "{refused:?}");
        }),
    ];
    for place in Place::ALL {
        for (name, access, attempt) in attempts {
            let machine = place.folded(access);
            assert!(machine.record(place.at(1), WRITTEN));
            let at = place.at(4);
            machine.fail(true);
            attempt(&machine, place, at);
            let what = format!("{place:?}: {name}");
            let flushes = machine.flushes();
            assert_eq!(flushes.first(), Some(&place.broken()), "{what}");
            assert!(flushes.iter().all(|seen| seen.leaves == 0), "{what}");
            assert!((0..place.members).all(|member| machine.kind(place.at(member)) == Kind::Absent), "{what}");
            assert!(machine.heard(place.whole()), "{what}");
            // Nothing is filled on the strength of it.
            let output = 64 * place.bytes();
            let options = MapOptions::default().largest(place.span);
            let refused = machine.map_with(range(at, place.span), output, Access::RWX, options);
            assert!(matches!(refused, Err(MapError::Flush { .. })), "{what}: {refused:?}");
            assert_eq!(machine.kind(at), Kind::Absent, "{what}");
            machine.flushes();
            machine.fail(false);
            machine.map_with(range(at, place.span), output, Access::RWX, options).unwrap();
            assert_eq!(machine.spec(at).output.as_u64(), output);
            let flushes = machine.flushes();
            assert_eq!(flushes.len(), 1, "{what}: flushed before it was filled");
            assert_eq!(flushes[0].leaves, 0, "{what}");
            machine.table.check().unwrap();
        }
    }
}

#[test]
fn where_change_pte_cannot_dissolve_the_page_is_zapped() {
    for place in Place::ALL {
        let machine = place.folded(Access::RX);
        let at = place.at(3);
        let guard = machine.space.retain(range(at, place.granule.bytes())).unwrap();
        machine.fail(true);
        let output = machine.spec(at).output.as_u64();
        let done = guard.change_pte(&[change(at, output, 0x77_0000)]);
        if let Ok(done) = done {
            assert_eq!(done[0].outcome, Outcome::Zapped, "{place:?}");
        }
        assert!((0..place.members).all(|member| machine.kind(place.at(member)) == Kind::Absent), "{place:?}");
        machine.fail(false);
        guard.close().unwrap();
        assert_eq!(machine.kind(at), Kind::Absent, "{place:?}");
    }
}

#[test]
fn a_fold_that_is_not_flushed_says_what_is_gone() {
    for place in Place::ALL {
        for written in [false, true] {
            let machine = place.leaves(Access::RWX);
            if written {
                assert!(machine.record(place.at(place.members - 2), WRITTEN));
            }
            machine.fail(true);
            let refused = machine.table.fold(place.whole());
            let whole = place.whole();
            assert!(matches!(refused, Err(FoldError::Flush { absent, .. }) if absent == whole), "{refused:?}");
            assert!((0..place.members).all(|member| machine.kind(place.at(member)) == Kind::Absent), "{place:?}");
            assert_eq!(machine.heard(place.member(place.members - 2)), written);
            machine.fail(false);
            machine.flushes();
            machine
                .map_with(place.member(0), 64 * place.bytes(), Access::READ, MapOptions::default().largest(place.span))
                .unwrap();
            assert_eq!(machine.flushes().len(), 1, "{place:?}: flushed before it was filled");
        }
    }
}

#[test]
fn a_flush_that_failed_is_made_up_for_before_a_set_is_made_again() {
    let place = Place::ALL[0];
    let machine = place.folded(Access::RWX);
    machine.fail(true);
    machine.table.unmap(place.member(3)).unwrap_err();
    machine.fail(false);
    machine.flushes();
    machine.map_with(place.whole(), place.output(), Access::RWX, MapOptions::default().largest(place.span)).unwrap();
    assert_eq!(machine.flushes().len() as u64, place.members, "each leaf before it was filled");
    assert_eq!(machine.table.fold(place.whole()), Ok(1));
    place.assert_set(&machine);
}

// ---- two operations at once ----

type Hook = Box<dyn FnMut(&Stage2, u64)>;

thread_local! {
    /// Called whenever an operation of this thread asks what an entry is.
    static HOOK: std::cell::RefCell<Option<Hook>> = const { std::cell::RefCell::new(None) };
}

/// Stage 2, and somebody who looks on: between any two steps of an operation something else may happen.
struct Watched(Stage2);

impl Watched {
    fn asked(&self, raw: u64) {
        // Taken out, so that what it does asks nobody.
        if let Some(mut hook) = HOOK.take() {
            hook(&self.0, raw);
            HOOK.set(Some(hook));
        }
    }
}

impl Format for Watched {
    type Attrs = Stage2Attrs;

    spte_drive::forward! {
        name geometry level_number not_present claim_bit hardware_bits table leaf spec set_spte
        with_access write_protect upgrade is_young make_old make_young is_dirty make_clean touch split collapse
        merge_facts set_shift set_member unmarked transition equal_contents_transition flushes_before_refill check
    }

    fn kind(&self, level: Level, raw: u64) -> Kind {
        self.asked(raw);
        self.0.kind(level, raw)
    }
    fn in_set(&self, level: Level, raw: u64) -> bool {
        self.asked(raw);
        self.0.in_set(level, raw)
    }
}

/// A machine that is interrupted, and what was written on it.
struct Interrupted {
    machine: Machine<Watched>,
    place: Place,
    /// Pages that may have been written: hardware recorded a write in them, or in their set.
    written: Mutex<Vec<GpaRange>>,
    /// Harvested.
    harvested: Mutex<Vec<GpaRange>>,
}

impl Interrupted {
    fn new() -> Arc<Self> {
        let place = Place::ALL[0];
        let machine = Machine::new(Watched(stage2(place.options())), place.whole());
        let options = MapOptions::default().largest(place.span);
        machine.map_with(place.whole(), place.output(), Access::RWX, options).unwrap();
        assert_eq!(machine.table.fold(place.whole()), Ok(1));
        Arc::new(Self { machine, place, written: Mutex::default(), harvested: Mutex::default() })
    }

    /// Whether somebody is in the middle of deciding about the set or its table.
    fn is_claimed(&self) -> bool {
        (0..self.place.members).any(|member| {
            self.machine.table.walk(Gpa::new(self.place.at(member))).iter().any(|found| {
                found.kind == Kind::Claimed
                    || found.raw & self.machine.table.format().claim_bit() != 0 && found.raw & 1 != 0
            })
        })
    }

    /// A write that hardware records in `member`, to any page that a TLB entry from there stands for.
    fn write(&self, member: u64) {
        let at = self.place.at(member);
        let reach = if self.machine.is_marked(at) { self.place.whole() } else { self.place.member(member) };
        if self.machine.record(at, WRITTEN) {
            self.written.lock().unwrap().push(reach);
        }
    }

    fn harvest(&self, range: GpaRange) {
        let harvested = self.machine.table.harvest_dirty(range).unwrap();
        self.harvested.lock().unwrap().extend(harvested);
    }

    /// What holds whatever happened.
    fn check(&self) -> Result<(), String> {
        let (machine, place) = (&self.machine, self.place);
        let marked = machine.marked(place.whole()) as u64;
        if marked != 0 && marked != place.members {
            return Err(format!("{marked} of {} members are marked", place.members));
        }
        if marked != 0 {
            place.assert_set(machine);
        }
        machine.table.check().map_err(|(at, why)| format!("{at}: {why}"))?;
        machine.dirty().extend(self.harvested.lock().unwrap().iter());
        for written in self.written.lock().unwrap().iter() {
            for member in (0..place.members).filter(|member| written.covers(&place.member(*member))) {
                let at = place.at(member);
                let in_table = match machine.kind(at) {
                    Kind::Leaf if marked != 0 => (0..place.members).any(|other| machine.spec(place.at(other)).dirty),
                    Kind::Leaf => machine.spec(at).dirty,
                    _ => false,
                };
                if !in_table && !machine.heard(place.member(member)) {
                    return Err(format!("the write to page {member} is lost"));
                }
            }
        }
        for member in (0..place.members).filter(|member| machine.kind(place.at(*member)) == Kind::Leaf) {
            let output = machine.spec(place.at(member)).output.as_u64();
            if output != place.output() + member * place.span {
                return Err(format!("page {member} points to {output:#x}"));
            }
        }
        Ok(())
    }
}

type Step = fn(&Interrupted);

/// What may come between: each keeps the set where it is, or takes from it.
const BETWEEN: [(&str, Step); 9] = [
    ("split", |on| on.machine.table.split(on.place.whole()).unwrap()),
    ("fold and write", |on| {
        on.machine.table.fold(on.place.whole()).unwrap();
        on.write(2);
    }),
    ("split, fold and write", |on| {
        on.machine.table.split(on.place.whole()).unwrap();
        on.machine.table.fold(on.place.whole()).unwrap();
        on.write(13);
    }),
    ("write", |on| on.write(11)),
    ("unmap of a page", |on| {
        on.machine.table.unmap(on.place.member(5)).unwrap();
    }),
    ("unmap of all", |on| {
        on.machine.table.unmap(range(0, 2 << 20)).unwrap();
    }),
    ("harvest of a page", |on| on.harvest(on.place.member(9))),
    ("harvest of all", |on| on.harvest(on.place.whole())),
    ("restrict", |on| {
        on.machine.table.restrict(on.place.member(12), Access::READ).unwrap();
    }),
];

/// What is interrupted.
const INTERRUPTED: [(&str, Step); 9] = [
    ("unmap of a page", |on| {
        on.machine.table.unmap(on.place.member(8)).unwrap();
    }),
    ("restrict of the first page", |on| {
        on.machine.table.restrict(on.place.member(0), Access::READ).unwrap();
    }),
    ("restrict of a page", |on| {
        on.machine.table.restrict(on.place.member(8), Access::READ).unwrap();
    }),
    ("restrict of all", |on| {
        on.machine.table.restrict(on.place.whole(), Access::READ).unwrap();
    }),
    ("unmap of the set", |on| {
        on.machine.table.unmap(on.place.whole()).unwrap();
    }),
    ("unmap of the table", |on| {
        on.machine.table.unmap(range(0, 2 << 20)).unwrap();
    }),
    ("harvest of a page", |on| on.harvest(on.place.member(8))),
    ("harvest of the set", |on| on.harvest(on.place.whole())),
    ("split and fold", |on| {
        on.machine.table.split(on.place.whole()).unwrap();
        on.machine.table.fold(on.place.whole()).unwrap();
    }),
];

/// Runs `main` with each of `steps` before its look of that number, unless something is claimed just then: who came then
/// would wait. How often it looked.
fn interrupted(main: Step, steps: &[(usize, Step)]) -> Result<usize, String> {
    let on = Interrupted::new();
    on.write(6);
    let looks = Arc::new(Mutex::new(0));
    let (steps, inside, count) = (steps.to_vec(), Arc::clone(&on), Arc::clone(&looks));
    HOOK.set(Some(Box::new(move |_, _| {
        let look = {
            let mut count = count.lock().unwrap();
            *count += 1;
            *count
        };
        if let Some((_, step)) = steps.iter().find(|(number, _)| *number == look) {
            if !inside.is_claimed() {
                step(&inside);
            }
        }
    })));
    main(&on);
    HOOK.set(None);
    on.check()?;
    // When all is gone, every write is known.
    on.machine.table.unmap(range(0, 2 << 20)).unwrap();
    on.check()?;
    let looks = *looks.lock().unwrap();
    Ok(looks)
}

#[test]
fn whatever_comes_between_two_steps_sets_are_whole_and_no_write_is_lost() {
    for (name, main) in INTERRUPTED {
        for (between, step) in BETWEEN {
            let mut number = 1;
            loop {
                let looks = interrupted(main, &[(number, step)])
                    .unwrap_or_else(|wrong| panic!("{name}, with {between} at its look {number}: {wrong}"));
                if number >= looks {
                    break;
                }
                number += 1;
            }
        }
    }
}

#[test]
fn a_set_that_is_dissolved_and_folded_while_another_dissolves_it_stays_whole() {
    let [(_, split), (_, fold), ..] = BETWEEN;
    for (name, main) in INTERRUPTED {
        let looks = interrupted(main, &[]).unwrap();
        for first in 1..=looks {
            for second in [1, 4, 9, 16, 25, 36].map(|later| first + later) {
                interrupted(main, &[(first, split), (second, fold)])
                    .unwrap_or_else(|wrong| panic!("{name}, split at its look {first}, folded at {second}: {wrong}"));
            }
        }
    }
}

/// Whether `raw` is the leaf to `output`.
fn leads_to(format: &Stage2, raw: u64, output: u64) -> bool {
    raw & 1 != 0 && format.kind(L3, raw) == Kind::Leaf && format.spec(L3, raw).output.as_u64() == output
}

/// Runs `main`, and at its `nth` look at the first member, in another thread, `other`, which stops at the first look where
/// `stops` says so, and goes on when `main` is done or waits. Whether there was such a look of `main`, with nothing claimed.
fn beside(
    main: Step,
    on: &Arc<Interrupted>,
    nth: usize,
    other: Step,
    stops: impl Fn(&Interrupted, &Stage2, u64) -> bool + Send + 'static,
) -> Result<bool, String> {
    // More looks than any operation here needs that does not wait.
    const MANY: usize = 1000;
    #[derive(Default)]
    struct State {
        stopped: AtomicBool,
        /// Of `main`, since then.
        looks: AtomicUsize,
        done: AtomicBool,
    }
    let state = Arc::new(State::default());
    let (inside, shared) = (Arc::clone(on), Arc::clone(&state));
    let other = move || {
        let (walked, progress) = (Arc::clone(&inside), Arc::clone(&shared));
        HOOK.set(Some(Box::new(move |format, raw| {
            if !stops(&walked, format, raw) || progress.stopped.swap(true, Ordering::SeqCst) {
                return;
            }
            while progress.looks.load(Ordering::SeqCst) < MANY && !progress.done.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
        })));
        other(&inside);
        HOOK.set(None);
        shared.stopped.store(true, Ordering::SeqCst);
    };
    let handle = Arc::new(Mutex::new(None));
    let (keep, progress, walked) = (Arc::clone(&handle), Arc::clone(&state), Arc::clone(on));
    let (mut other, mut met) = (Some(other), 0);
    HOOK.set(Some(Box::new(move |format, raw| {
        progress.looks.fetch_add(1, Ordering::SeqCst);
        met += usize::from(leads_to(format, raw, walked.place.output()));
        if met != nth || other.is_none() || walked.is_claimed() {
            return;
        }
        if let Some(other) = other.take() {
            *keep.lock().unwrap() = Some(std::thread::spawn(other));
            while !progress.stopped.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            progress.looks.store(0, Ordering::SeqCst);
        }
    })));
    main(on);
    HOOK.set(None);
    state.done.store(true, Ordering::SeqCst);
    let thread: Option<std::thread::JoinHandle<()>> = handle.lock().unwrap().take();
    let came = thread.map(|thread| thread.join().unwrap()).is_some();
    on.check().map(|()| came)
}

/// Unlinking kills entries one by one. Who found the set before the link was claimed comes while some are dead.
#[test]
fn who_dissolves_a_set_of_which_an_unlinking_has_some_loses_no_write() {
    let fold: Step = |on| {
        on.machine.table.fold(on.place.whole()).unwrap();
    };
    for (name, main) in INTERRUPTED.into_iter().chain([("fold", fold)]) {
        let mut came = 0;
        for nth in 1..=4 {
            for killed in [1, 7, 15] {
                for recorded in [0, 8] {
                    let on = Interrupted::new();
                    on.write(recorded);
                    if name == "fold" {
                        on.machine.table.split(on.place.whole()).unwrap();
                    }
                    // Behind the link, which it has claimed, this one is next.
                    let stops = move |on: &Interrupted, format: &Stage2, raw| {
                        let linked = on.machine.table.walk(Gpa::new(on.place.start())).len() == 3;
                        !linked && leads_to(format, raw, on.place.output() + killed * on.place.span)
                    };
                    let unlink: Step = |on| {
                        on.machine.table.unmap(range(0, 2 << 20)).unwrap();
                    };
                    let result = beside(main, &on, nth, unlink, stops);
                    came += usize::from(
                        result.unwrap_or_else(|wrong| panic!("{name} at its look {nth}, {killed} were dead: {wrong}")),
                    );
                }
            }
        }
        assert_ne!(came, 0, "{name} never looked at the first member");
    }
}

/// While a set is dissolved its facts are with who dissolves it, across a flush.
#[test]
fn who_meets_a_set_that_is_being_dissolved_waits_for_its_facts() {
    let harvest: Step = |on| {
        on.harvest(on.place.whole());
        let harvested = on.harvested.lock().unwrap().clone();
        let all = (0..on.place.members).all(|member| harvested.contains(&on.place.member(member)));
        assert!(all, "written before the harvest, and not in it: {harvested:?}");
    };
    for (name, main) in INTERRUPTED.into_iter().chain([("harvest of what was written", harvest)]) {
        let mut came = 0;
        for nth in 1..=4 {
            let on = Interrupted::new();
            on.write(15);
            let stops = |on: &Interrupted, _: &Stage2, _| {
                (0..on.place.members).all(|member| on.machine.kind(on.place.at(member)) == Kind::Claimed)
            };
            let result = beside(main, &on, nth, |on| on.machine.table.split(on.place.whole()).unwrap(), stops);
            came += usize::from(result.unwrap_or_else(|wrong| panic!("{name} at its look {nth}: {wrong}")));
        }
        assert_ne!(came, 0, "{name} never looked at the first member");
    }
}
