// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A comparison that cannot fail says nothing: formats with one fault each, and what is found in them.

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;
use spte_core::examine::examine;
use spte_core::format::{Format, FormatError, Kind, LeafSpec, Level, Transition, WriteProtect};
use spte_drive::{DriveError, Driven, Why, Wrong, agree, agree_in_want};
use spte_model::{MemType, Outcome, Shape};
use spte_x86::{Ept, EptAttrs, EptMemoryType, EptOptions};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// No change of a leaf asks for a flush.
    NeverFlushes,
    /// Only what has the dirty bit cleared asks for none.
    CleansWithoutFlush,
    /// What is removed was never written.
    ForgetsDirty,
    /// A merged leaf has the facts of its first part.
    MergesOneFact,
    /// The parts of a leaf all lead to its beginning.
    SplitsInPlace,
    /// Rights are never taken away.
    KeepsRights,
    /// Arming leaves the right to write.
    ArmsNothing,
    /// Writing does not come back.
    NeverUpgrades,
    /// A repointed leaf leads where it did.
    RepointsNothing,
    /// A leaf has a bit that is reserved.
    SetsReserved,
    /// Leaves have the memory type of others.
    MixesTypes,
    /// Ageing leaves leaves young.
    NeverAges,
}

/// EPT with a fault.
struct Broken(Ept, Fault);

/// Beyond the physical address bits (which have to hold the addresses of pages on the heap).
const RESERVED: u64 = 1 << 50;

impl Broken {
    fn has(&self, fault: Fault) -> bool {
        self.1 == fault
    }
}

impl Format for Broken {
    type Attrs = EptAttrs;

    spte_drive::forward! {
        geometry level_number not_present claim_bit hardware_bits kind table spec is_young make_young
        make_clean touch collapse equal_contents_transition check
    }

    fn name(&self) -> &'static str {
        "broken"
    }
    fn leaf(&self, level: Level, spec: &LeafSpec<EptAttrs>) -> Result<u64, FormatError> {
        let raw = self.0.leaf(level, spec)?;
        Ok(if self.has(Fault::SetsReserved) { raw | RESERVED } else { raw })
    }
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let output = if self.has(Fault::RepointsNothing) { self.0.spec(level, old).output } else { output };
        self.0.set_spte(level, old, output)
    }
    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        let kept = if self.has(Fault::KeepsRights) { self.0.spec(level, raw).access } else { Access::empty() };
        self.0.with_access(level, raw, access | kept)
    }
    fn write_protect(&self, level: Level, raw: u64, how: WriteProtect) -> u64 {
        if self.has(Fault::ArmsNothing) && how == WriteProtect::Arm {
            return raw;
        }
        self.0.write_protect(level, raw, how)
    }
    fn upgrade(&self, level: Level, raw: u64) -> Option<u64> {
        let raw = self.0.upgrade(level, raw)?;
        Some(if self.has(Fault::NeverUpgrades) { self.0.write_protect(level, raw, WriteProtect::Arm) } else { raw })
    }
    fn make_old(&self, level: Level, raw: u64) -> u64 {
        if self.has(Fault::NeverAges) { raw } else { self.0.make_old(level, raw) }
    }
    fn is_dirty(&self, level: Level, raw: u64) -> bool {
        !self.has(Fault::ForgetsDirty) && self.0.is_dirty(level, raw)
    }
    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        self.0.split(level, raw, if self.has(Fault::SplitsInPlace) { 0 } else { index })
    }
    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64 {
        if self.has(Fault::MergesOneFact) { into } else { self.0.merge_facts(into_level, into, from_level, from) }
    }
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        let cleans = self.0.make_clean(level, old) == new;
        let free = match self.1 {
            Fault::NeverFlushes => self.0.kind(level, new) == Kind::Leaf,
            Fault::CleansWithoutFlush => cleans,
            _ => false,
        };
        if free { Transition::FREE } else { self.0.transition(level, old, new) }
    }
}

fn attrs(mem: MemType) -> Option<EptAttrs> {
    let memory_type = match mem {
        MemType::Wb => EptMemoryType::WriteBack,
        MemType::Uc => EptMemoryType::Uncacheable,
        MemType::Wc => EptMemoryType::WriteCombining,
        MemType::Wt => EptMemoryType::WriteThrough,
    };
    Some(EptAttrs { memory_type, ignore_pat: true })
}

/// Its leaves of one type have what the driver takes for another's.
fn mixed(mem: MemType) -> Option<EptAttrs> {
    attrs(if mem == MemType::Wc { MemType::Uc } else { mem })
}

fn broken(fault: Fault) -> Driven<Broken> {
    let format = Ept::new(EptOptions { physical_bits: 48, ..EptOptions::default() }).unwrap();
    let shape = Shape::ept().with_bits(48, 48).unwrap();
    Driven { format: Broken(format, fault), shape, attrs: if fault == Fault::MixesTypes { mixed } else { attrs } }
}

/// What the first sequence is found to be that goes wrong, of as many as CI runs for each format.
fn found(fault: Fault) -> Option<Why> {
    let mut runner = TestRunner::deterministic();
    let strategy = spte_model::strategy::ops(&broken(fault).shape, 200);
    (0..256).find_map(|_| {
        let ops = strategy.new_tree(&mut runner).unwrap().current();
        agree(broken(fault), &ops).err().map(|wrong| *wrong.why)
    })
}

#[test]
fn a_format_without_a_fault_agrees() {
    assert!(found(Fault::None).is_none());
}

/// What contradicts itself is found without a table.
#[test]
fn examining_a_format_finds_what_it_can() {
    let rule = |fault| examine(&broken(fault).format, EptAttrs::default()).map_err(|flaw| flaw.rule);
    assert_eq!(rule(Fault::None), Ok(()));
    for (fault, expected) in [
        (Fault::MergesOneFact, "merge_facts adds the dirty fact"),
        (Fault::SplitsInPlace, "a part leads to its part, with all rights"),
        (Fault::KeepsRights, "with_access gives no other rights"),
        (Fault::ArmsNothing, "what is write-protected is not written"),
        (Fault::SetsReserved, "check takes what the format makes"),
        (Fault::RepointsNothing, "set_spte leads to the new page"),
        (Fault::NeverUpgrades, "what was upgraded is written"),
        (Fault::NeverFlushes, "to take writing away owes a flush"),
        (Fault::NeverAges, "make_old makes old"),
    ] {
        assert_eq!(rule(fault), Err(expected), "{fault:?}");
    }
    // How a leaf may change, and what it stands for, is not to be seen in it.
    for fault in [Fault::CleansWithoutFlush, Fault::MixesTypes] {
        assert_eq!(rule(fault), Ok(()), "{fault:?}");
    }
}

#[test]
fn a_flush_that_is_missing_is_found() {
    let why = found(Fault::NeverFlushes);
    assert!(matches!(why, Some(Why::Cached(Wrong::Stale { .. } | Wrong::StaleDirty { .. }))), "{why:?}");
    let why = found(Fault::CleansWithoutFlush);
    assert!(matches!(why, Some(Why::Cached(Wrong::StaleDirty { .. }))), "{why:?}");
}

#[test]
fn a_write_that_nobody_hears_of_is_found() {
    let why = found(Fault::ForgetsDirty);
    assert!(matches!(why, Some(Why::Answer { .. } | Why::LostWrite { .. } | Why::Cached(_))), "{why:?}");
    let why = found(Fault::MergesOneFact);
    assert!(matches!(why, Some(Why::Leaf { .. })), "{why:?}");
}

#[test]
fn a_translation_that_changes_on_the_way_is_found() {
    let why = found(Fault::SplitsInPlace);
    assert!(matches!(why, Some(Why::Leaf { .. })), "{why:?}");
    let why = found(Fault::RepointsNothing);
    assert!(matches!(why, Some(Why::Leaf { .. })), "{why:?}");
}

#[test]
fn rights_that_stay_and_rights_that_stay_away_are_found() {
    let why = found(Fault::KeepsRights);
    assert!(matches!(why, Some(Why::Leaf { .. })), "{why:?}");
    let why = found(Fault::ArmsNothing);
    assert!(matches!(why, Some(Why::Drive(DriveError::Wrong(Wrong::Withheld { .. })))), "{why:?}");
    let why = found(Fault::NeverUpgrades);
    assert!(matches!(why, Some(Why::Drive(DriveError::Wrong(Wrong::NotUpgraded { .. })))), "{why:?}");
}

#[test]
fn entries_that_hardware_refuses_are_found() {
    let why = found(Fault::SetsReserved);
    assert!(matches!(why, Some(Why::Drive(DriveError::Wrong(Wrong::Entry { .. })))), "{why:?}");
}

#[test]
fn attributes_and_facts_that_differ_are_found() {
    let why = found(Fault::MixesTypes);
    assert!(matches!(why, Some(Why::Leaf { .. })), "{why:?}");
    let why = found(Fault::NeverAges);
    assert!(matches!(why, Some(Why::Leaf { .. } | Why::Answer { found: Outcome::Aged { .. }, .. })), "{why:?}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) })]

    /// A window takes a leaf whole that it cannot split, and a split cut short leaves the rest: with pages again, each
    /// operation does what it should.
    #[test]
    fn want_of_pages_leaves_nothing_that_was_not_there_or_asked_for(
        ops in prop::collection::vec(
            (spte_model::strategy::op(&broken(Fault::None).shape), prop::option::of((0_u64..4, 1_u64..4))), 100
        )
    ) {
        let outcome = agree_in_want(broken(Fault::None), &ops);
        prop_assert!(outcome.is_ok(), "{}", outcome.unwrap_err());
    }
}

/// How often it happens, so that the property above says something; and that it finds what is wrong too.
#[test]
fn sequences_do_find_no_page_and_faults_are_found_then() {
    let run = |fault: Fault| {
        let mut runner = TestRunner::deterministic();
        let op = spte_model::strategy::op(&broken(fault).shape);
        let strategy = prop::collection::vec((op, Just(Some((0, u64::MAX)))), 100);
        let mut outcomes =
            (0..40).map(|_| agree_in_want(broken(fault), &strategy.new_tree(&mut runner).unwrap().current()));
        outcomes.try_fold(0, |sum, outcome| outcome.map(|found_none| sum + found_none))
    };
    assert!(run(Fault::None).unwrap() > 200);
    assert!(run(Fault::SplitsInPlace).is_err());
    assert!(run(Fault::KeepsRights).is_err());
}
