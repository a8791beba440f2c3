// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Contiguous sets against the model, which has none: leaves are folded and made as sets between random operations, hardware
//! records facts in whichever member it likes, and nothing may show but that facts are the set's. After each operation the
//! leaves are the model's, their facts are the model's or more, and every marked leaf is in a set that is whole.

mod common;

use common::*;
use notifier_core::{AddrRange, Extent, Gpa, GpaRange, OutputAddr};
use proptest::prelude::*;
use spte_arm64::{AccessedDirty, BreakLevel, Granule, MemoryType, Stage2, Stage2Attrs, Stage2Options};
use spte_core::{
    Format, MapOptions, PageSource, TableLayout,
    format::{Kind, Level},
};
use spte_drive::{Driven, Driver};
use spte_model::{Access, Fault, Leaf, MemType, Model, Op, Outcome, PageChoice, Shape, TouchKind};

const MARK: u64 = 1 << 52;
const YOUNG: u64 = 1 << 10;
const WRITTEN: u64 = 1 << 7;

fn attrs(mem: MemType) -> Option<Stage2Attrs> {
    let memory = match mem {
        MemType::Wb => MemoryType::WRITE_BACK,
        MemType::Uc => MemoryType::DEVICE,
        MemType::Wc => MemoryType::NON_CACHEABLE,
        MemType::Wt => MemoryType::WRITE_THROUGH,
    };
    Some(Stage2Attrs::default().memory(memory))
}

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

/// Where the operations go: sets of one level, from the beginning of the table.
#[derive(Debug, Clone, Copy)]
struct Field {
    options: Stage2Options,
    /// Members of a set, and bytes of each.
    members: u64,
    span: u64,
    /// Sets that operations reach.
    sets: u64,
}

impl Field {
    const fn new(granule: Granule, members: u64, span: u64, sets: u64, accessed_dirty: AccessedDirty) -> Self {
        let options = Stage2Options {
            granule,
            ipa_bits: 40,
            physical_bits: 48,
            lpa2: false,
            start: spte_arm64::Start::FewestLevels,
            fwb: false,
            xnx: false,
            accessed_dirty,
            shareability: spte_arm64::Shareability::Inner,
            break_level: BreakLevel::Level0,
        };
        Self { options, members, span, sets }
    }

    fn driven(self) -> Driven<Stage2> {
        let sizes: &[u64] = match self.options.granule {
            Granule::K4 => &[4 << 10, 2 << 20, 1 << 30],
            Granule::K16 => &[16 << 10, 32 << 20],
            Granule::K64 => &[64 << 10, 512 << 20],
        };
        let shape = Shape::new(sizes, 40, 48).unwrap().with_hw_ad(self.options.accessed_dirty.sets_dirty());
        Driven { format: stage2(self.options), shape, attrs }
    }
}

/// What is done: an operation of the model, or what the model does not know.
#[derive(Debug, Clone, Copy)]
enum Act {
    Op(Op),
    /// The same map, with leaves marked as sets where their table is made.
    MapSets(Op),
    Fold {
        gpa: u64,
        size: u64,
    },
    /// The guest touches a page; hardware records it in the member of its set that this number picks.
    Recorded {
        gpa: u64,
        write: bool,
        pick: u64,
    },
}

fn any_act(field: Field) -> impl Strategy<Value = Act> {
    let Field { members, span, sets, .. } = field;
    let granule = field.options.granule.bytes();
    let all = members * sets;
    // Whole sets, single members, and anything.
    let part = prop_oneof![
        3 => (0..sets, 1..=sets).prop_map(move |(first, n)| (first * members, (n.min(sets - first)) * members)),
        3 => (0..all).prop_map(|first| (first, 1)),
        2 => (0..all, 1..=all).prop_map(move |(first, n)| (first, n.min(all - first))),
    ];
    let part = move || part.clone().prop_map(move |(first, n)| (first * span, n * span));
    let access = prop_oneof![4 => Just(Access::RWX), 1 => Just(Access::RX), 1 => Just(Access::R), 1 => Just(Access::RW), 1 => Just(Access::NONE)];
    let access = move || access.clone();
    // In a row for the most part, and aligned to the set or not.
    let base = prop_oneof![6 => Just(1_u64 << 36), 1 => Just(1_u64 << 37), 1 => Just((1_u64 << 36) + span)];
    let page =
        prop_oneof![4 => Just(PageChoice::Size(span)), 1 => Just(PageChoice::Max), 1 => Just(PageChoice::Granule)];
    let page = if span > granule { page.boxed() } else { Just(PageChoice::Granule).boxed() };
    let mem = prop_oneof![8 => Just(MemType::Wb), 1 => Just(MemType::Uc)];
    let map = (part(), base, access(), page, mem).prop_map(|((gpa, size), base, access, page, mem)| Op::Map {
        gpa,
        out: base + gpa,
        size,
        access,
        page,
        mem,
    });
    let at = move || (0..all, 0..span / granule).prop_map(move |(member, page)| member * span + page * granule);
    let kind = prop_oneof![Just(TouchKind::Read), Just(TouchKind::Write), Just(TouchKind::Execute)];
    prop_oneof![
        4 => map.clone().prop_map(Act::MapSets),
        3 => map.prop_map(Act::Op),
        8 => part().prop_map(|(gpa, size)| Act::Fold { gpa, size }),
        6 => (at(), any::<bool>(), 0..members).prop_map(|(gpa, write, pick)| Act::Recorded { gpa, write, pick }),
        2 => part().prop_map(|(gpa, size)| Act::Op(Op::Unmap { gpa, size })),
        1 => at().prop_map(move |gpa| Act::Op(Op::Unmap { gpa, size: granule })),
        3 => (part(), access()).prop_map(|((gpa, size), access)| Act::Op(Op::Protect { gpa, size, access })),
        2 => part().prop_map(|(gpa, size)| Act::Op(Op::WriteProtect { gpa, size })),
        4 => (at(), kind).prop_map(|(gpa, kind)| Act::Op(Op::Touch { gpa, kind })),
        2 => part().prop_map(|(gpa, size)| Act::Op(Op::Age { gpa, size })),
        2 => part().prop_map(|(gpa, size)| Act::Op(Op::Dirty { gpa, size })),
        2 => (at(), 1_u64..16).prop_map(move |(gpa, out)| Act::Op(Op::Change { gpa, out: (1 << 35) + out * granule })),
        1 => (at(), 1_u64..16).prop_map(move |(gpa, out)| Act::Op(Op::ZapChange { gpa, out: out * granule })),
        1 => at().prop_map(move |gpa| Act::Op(Op::Split { gpa, size: granule })),
        1 => part().prop_map(|(gpa, size)| Act::Op(Op::Collapse { gpa, size })),
    ]
}

/// The table with sets, and the model without.
struct Beside {
    driver: Driver<Stage2>,
    model: Model,
    /// How often a leaf was seen in a set: a run that makes none says nothing.
    marked: u64,
}

impl Beside {
    fn new(field: Field) -> Self {
        let driven = field.driven();
        let model = Model::new(driven.shape.clone());
        Self { driver: Driver::new(driven).unwrap(), model, marked: 0 }
    }

    fn found(&self, gpa: u64) -> spte_core::Found {
        self.driver.table().entry(Gpa::new(gpa)).unwrap()
    }

    /// The set that the leaf over `gpa` is marked as a member of: where it begins, and its bytes.
    fn set_of(&self, gpa: u64) -> Option<(u64, u64)> {
        let found = self.found(gpa);
        if found.kind != Kind::Leaf || found.raw & MARK == 0 {
            return None;
        }
        let bytes = self.driver.table().format().contiguous(found.level).unwrap().bytes;
        Some((gpa & !(bytes - 1), bytes))
    }

    fn act(&mut self, act: Act) -> Result<(), String> {
        match act {
            Act::Op(op) => self.op(op)?,
            Act::MapSets(op) => self.map(op)?,
            Act::Fold { gpa, size } => {
                self.driver.table().fold(range(gpa, size)).map_err(|error| error.to_string())?;
            }
            Act::Recorded { gpa, write, pick } => self.recorded(gpa, write, pick)?,
        }
        self.compare()
    }

    fn op(&mut self, op: Op) -> Result<(), String> {
        let op = match op {
            // A set ages as a whole.
            Op::Age { gpa, size } => {
                let start = self.set_of(gpa).map_or(gpa, |(start, _)| start);
                let last = gpa + size - 1;
                let end = self.set_of(last).map_or(gpa + size, |(start, bytes)| start + bytes);
                Op::Age { gpa: start, size: end.max(gpa + size) - start }
            }
            op => op,
        };
        let Ok(expected) = self.model.apply(&op) else { return Ok(()) };
        if let (Op::Touch { gpa, .. }, Outcome::Fault(Fault::AccessFlag)) = (op, &expected) {
            // Perhaps it was young here, with its set; what the fault's handler does.
            self.driver.table().make_young(Gpa::new(gpa));
            return Ok(());
        }
        let found = self.driver.apply(&op).map_err(|error| format!("{op}: {error}"))?;
        self.told()?;
        let agree = match (&expected, &found) {
            (Outcome::Aged { young: model }, Outcome::Aged { young }) => young >= model,
            (Outcome::Dirty { rows: model }, Outcome::Dirty { rows }) => model.iter().all(|row| rows.contains(row)),
            (Outcome::Walk { .. }, Outcome::Walk { .. }) => true,
            _ => expected == found,
        };
        if !agree { Err(format!("{op} answered {found:?}, not {expected:?}")) } else { Ok(()) }
    }

    fn map(&mut self, op: Op) -> Result<(), String> {
        let Op::Map { gpa, out, size, access, page, mem } = op else { return Ok(()) };
        let mut before = self.model.clone();
        if before.apply(&op) != Ok(Outcome::Ok) {
            return self.op(op);
        }
        self.model = before;
        let rights = [
            (Access::R, notifier_core::Access::READ),
            (Access::W, notifier_core::Access::WRITE),
            (Access::X, notifier_core::Access::EXECUTE),
        ];
        let rights = rights.into_iter().filter(|(model, _)| access.contains(*model)).map(|(_, ours)| ours).collect();
        let largest = match page {
            PageChoice::Granule => self.driver.shape().granule(),
            PageChoice::Size(size) => size,
            PageChoice::Max => u64::MAX,
        };
        let options = MapOptions::default().attrs(attrs(mem).unwrap()).access(rights).largest(largest).sets(true);
        let guest = range(gpa, size);
        let extent = Extent { guest, output: OutputAddr::new(out), access: notifier_core::Access::RWX };
        let table = self.driver.table();
        let mut walker = table.space().walker();
        let resolved = walker.fault(guest).unwrap().resolve(|_| Ok::<_, ()>(extent)).unwrap();
        resolved.install(|admission| table.map(admission, &options)).map(drop).map_err(|error| error.to_string())
    }

    /// A touch that hardware records in another member, where the page is in a set and grants it.
    fn recorded(&mut self, gpa: u64, write: bool, pick: u64) -> Result<(), String> {
        let hardware = self.driver.table().format().options().accessed_dirty.sets_dirty();
        let Some((start, bytes)) = self.set_of(gpa).filter(|_| hardware) else {
            let kind = if write { TouchKind::Write } else { TouchKind::Read };
            return self.op(Op::Touch { gpa, kind });
        };
        let kind = if write { TouchKind::Write } else { TouchKind::Read };
        if !matches!(self.model.apply(&Op::Touch { gpa, kind }), Ok(Outcome::Touched { .. })) {
            return Ok(());
        }
        let member = start + (pick * self.found(gpa).span) % bytes;
        self.record(member, if write { YOUNG | WRITTEN } else { YOUNG });
        Ok(())
    }

    fn record(&self, at: u64, bits: u64) {
        let table = self.driver.table();
        let _pin = table.space().pin();
        let rows = table.walk(Gpa::new(at));
        let found = rows[rows.len() - 1];
        let page = match rows.iter().rev().nth(1).map(|above| above.kind) {
            Some(Kind::Table(page)) => page,
            _ => table.root(),
        };
        let geometry = table.format().geometry();
        let layout = TableLayout { bytes: geometry.table_bytes(found.level) };
        // SAFETY: a page of this table with the layout of its level, linked when it was read under the pin.
        let entries = unsafe { table.pages().entries(page, layout) };
        // SAFETY: an index of this level is inside its page.
        let entry = unsafe { entries.add(geometry.index(found.level, at)).as_ref() };
        let old = entry.load();
        // Nobody else is there.
        assert_eq!(entry.compare_exchange(old, old | bits), Ok(old));
    }

    /// What the operation took away was reported where it was written.
    fn told(&mut self) -> Result<(), String> {
        for &(gpa, leaf) in self.model.removed() {
            if leaf.dirty && !self.driver.was_reported(gpa, gpa + leaf.size) {
                return Err(format!("lost a write at {gpa:#x}"));
            }
        }
        for &(gpa, leaf) in self.model.removed() {
            self.driver.forget(gpa, gpa + leaf.size);
        }
        Ok(())
    }

    fn compare(&mut self) -> Result<(), String> {
        let table = self.driver.table();
        table.check().map_err(|(at, why)| format!("{at}: {why}"))?;
        let end = 1 << self.driver.shape().gpa_bits();
        let ours = self.driver.leaves(0, end).map_err(|error| error.to_string())?;
        let mut raws: Vec<(u64, Level, u64)> = Vec::new();
        table.visit(range(0, end), |found| {
            if found.kind == Kind::Leaf {
                raws.push((found.start.as_u64(), found.level, found.raw));
            }
        });
        // Sets are whole; their facts are all of theirs.
        let mut facts: Vec<(bool, bool)> = ours.iter().map(|(_, leaf)| (leaf.accessed, leaf.dirty)).collect();
        let mut index = 0;
        while index < raws.len() {
            let (start, level, first) = raws[index];
            if first & MARK == 0 {
                index += 1;
                continue;
            }
            let set = table.format().contiguous(level).ok_or_else(|| format!("{start:#x} is marked at {level:?}"))?;
            if start & (set.bytes - 1) != 0 {
                return Err(format!("{start:#x} is marked, and what is before it is not"));
            }
            let span = set.bytes / u64::from(set.entries);
            for member in 0..set.entries {
                let at = start + u64::from(member) * span;
                let here = raws.get(index + usize::from(member)).filter(|here| (here.0, here.1) == (at, level));
                let &(_, _, raw) = here.ok_or_else(|| format!("{at:#x} is missing from the set at {start:#x}"))?;
                table.format().check_contiguous(level, first, member, raw).map_err(|why| why.to_string())?;
            }
            let members = index..index + usize::from(set.entries);
            let all = facts[members.clone()].iter().fold((false, false), |all, one| (all.0 | one.0, all.1 | one.1));
            facts[members.clone()].fill(all);
            self.marked += u64::from(set.entries);
            index = members.end;
        }
        let mut theirs = self.model.leaves();
        for ((start, leaf), (accessed, dirty)) in ours.into_iter().zip(facts) {
            let expected = theirs.next().map(|(gpa, leaf)| (gpa, *leaf));
            let alike = expected.is_some_and(|(gpa, model)| {
                let facts = Leaf { accessed: model.accessed, dirty: model.dirty, ..leaf };
                (gpa, model) == (start, facts) && (accessed || !model.accessed) && (dirty || !model.dirty)
            });
            if !alike {
                return Err(format!("{start:#x} {leaf:x?} of a set ({accessed}, {dirty}), not {expected:x?}"));
            }
        }
        match theirs.next() {
            None => Ok(()),
            Some(missing) => Err(format!("{missing:x?} is missing")),
        }
    }
}

fn agrees(field: Field) {
    let marked = std::cell::Cell::new(0);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(acts in proptest::collection::vec(any_act(field), 0..60))| {
        let mut beside = Beside::new(field);
        for (index, act) in acts.iter().enumerate() {
            beside.act(*act).map_err(|wrong| TestCaseError::fail(format!("act {index}, {act:x?}: {wrong}")))?;
        }
        marked.set(marked.get() + beside.marked);
    });
    assert_ne!(marked.get(), 0, "there were no sets");
}

#[test]
fn sets_of_4k_pages_show_in_nothing_but_facts() {
    agrees(Field::new(Granule::K4, 16, 4 << 10, 3, AccessedDirty::Hardware));
}

#[test]
fn sets_of_4k_pages_without_hardware_facts_show_in_nothing_but_facts() {
    agrees(Field::new(Granule::K4, 16, 4 << 10, 3, AccessedDirty::Software));
}

#[test]
fn sets_of_2m_blocks_show_in_nothing_but_facts() {
    agrees(Field::new(Granule::K4, 16, 2 << 20, 2, AccessedDirty::Hardware));
}

#[test]
fn sets_of_16k_pages_show_in_nothing_but_facts() {
    agrees(Field::new(Granule::K16, 128, 16 << 10, 2, AccessedDirty::Hardware));
}

#[test]
fn sets_of_64k_pages_show_in_nothing_but_facts() {
    agrees(Field::new(Granule::K64, 32, 64 << 10, 2, AccessedDirty::Hardware));
}

#[test]
fn sets_that_resize_in_place_show_in_nothing_but_facts() {
    let field = Field::new(Granule::K4, 16, 4 << 10, 3, AccessedDirty::Hardware);
    agrees(Field { options: Stage2Options { break_level: BreakLevel::Level2, ..field.options }, ..field });
}
