// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The laws of the `decode` target can fail: a format with one thing wrong breaks one of them.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};

use notifier_core::{Access, OutputAddr};
use secondary_mmu_fuzz::decode::look_with;
use spte_core::format::{EntryError, Format, FormatError, LeafSpec, Level, Touch, Transition, WriteProtect};
use spte_x86::{Ept, EptAttrs, EptOptions};

/// What is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    RuleWithoutName,
    AnythingPasses,
    LeafElsewhere,
    OldIsClean,
    OldIsYoung,
    YoungIsOld,
    CleanIsDirty,
    RetainedIsUpgradable,
    ArmedIsWritable,
    UpgradeChangesNothing,
    MoreRightsThanAsked,
    MovedStaysDirty,
    MovedStaysWritable,
    TouchIsSilent,
    EverythingIsAllowed,
    SplitRepeats,
    SplitForgetsDirty,
    CollapseGivesRights,
    MergeForgets,
    NothingOwesAFlush,
    HardwareUnclaims,
}

const FAULTS: [Fault; 21] = [
    Fault::RuleWithoutName,
    Fault::AnythingPasses,
    Fault::LeafElsewhere,
    Fault::OldIsClean,
    Fault::OldIsYoung,
    Fault::YoungIsOld,
    Fault::CleanIsDirty,
    Fault::RetainedIsUpgradable,
    Fault::ArmedIsWritable,
    Fault::UpgradeChangesNothing,
    Fault::MoreRightsThanAsked,
    Fault::MovedStaysDirty,
    Fault::MovedStaysWritable,
    Fault::TouchIsSilent,
    Fault::EverythingIsAllowed,
    Fault::SplitRepeats,
    Fault::SplitForgetsDirty,
    Fault::CollapseGivesRights,
    Fault::MergeForgets,
    Fault::NothingOwesAFlush,
    Fault::HardwareUnclaims,
];

const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const WRITE: u64 = 1 << 1;

struct Wrong(Ept, Fault);

impl Wrong {
    fn pick<T>(&self, fault: Fault, wrong: impl FnOnce() -> T, right: impl FnOnce() -> T) -> T {
        if self.1 == fault { wrong() } else { right() }
    }
}

impl Format for Wrong {
    type Attrs = EptAttrs;

    spte_drive::forward! {
        geometry not_present claim_bit kind table spec is_young is_dirty
    }

    fn name(&self) -> &'static str {
        "wrong"
    }
    fn hardware_bits(&self, level: Level, raw: u64) -> u64 {
        self.pick(Fault::HardwareUnclaims, || ACCESSED | DIRTY | 1 << 57, || self.0.hardware_bits(level, raw))
    }
    fn leaf(&self, level: Level, spec: &LeafSpec<EptAttrs>) -> Result<u64, FormatError> {
        let leaf = self.0.leaf(level, spec)?;
        Ok(self.pick(Fault::LeafElsewhere, || leaf ^ self.geometry().span(level), || leaf))
    }
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let moved = self.0.set_spte(level, old, output)?;
        Ok(match self.1 {
            Fault::MovedStaysDirty => moved | (old & DIRTY),
            Fault::MovedStaysWritable => moved | (old & (WRITE | 3 << 57)),
            _ => moved,
        })
    }
    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        let wider = access | Access::READ;
        self.0.with_access(level, raw, if self.1 == Fault::MoreRightsThanAsked { wider } else { access })
    }
    fn write_protect(&self, level: Level, raw: u64, how: WriteProtect) -> u64 {
        match (self.1, how) {
            (Fault::RetainedIsUpgradable, WriteProtect::Retain) => self.0.write_protect(level, raw, WriteProtect::Arm),
            (Fault::ArmedIsWritable, WriteProtect::Arm) => raw,
            _ => self.0.write_protect(level, raw, how),
        }
    }
    fn upgrade(&self, level: Level, raw: u64) -> Option<u64> {
        let upgraded = self.0.upgrade(level, raw)?;
        Some(self.pick(Fault::UpgradeChangesNothing, || raw, || upgraded))
    }
    fn make_old(&self, level: Level, raw: u64) -> u64 {
        match self.1 {
            Fault::OldIsClean => self.0.make_old(level, raw) & !DIRTY,
            Fault::OldIsYoung => raw,
            _ => self.0.make_old(level, raw),
        }
    }
    fn make_young(&self, level: Level, raw: u64) -> u64 {
        self.pick(Fault::YoungIsOld, || raw, || self.0.make_young(level, raw))
    }
    fn make_clean(&self, level: Level, raw: u64) -> u64 {
        self.pick(Fault::CleanIsDirty, || raw, || self.0.make_clean(level, raw))
    }
    fn touch(&self, level: Level, raw: u64, access: Access) -> Touch {
        match (self.1, self.0.touch(level, raw, access)) {
            (Fault::TouchIsSilent, Touch::Allowed(_)) => Touch::Allowed(raw),
            (Fault::EverythingIsAllowed, Touch::Denied) => Touch::Allowed(raw),
            (_, touch) => touch,
        }
    }
    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        match self.1 {
            Fault::SplitRepeats => self.0.split(level, raw, 0),
            Fault::SplitForgetsDirty => self.0.split(level, raw, index) & !DIRTY,
            _ => self.0.split(level, raw, index),
        }
    }
    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        let whole = self.0.collapse(level, child)?;
        Some(self.pick(Fault::CollapseGivesRights, || whole | 4, || whole))
    }
    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64 {
        self.pick(Fault::MergeForgets, || into, || self.0.merge_facts(into_level, into, from_level, from))
    }
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        self.pick(Fault::NothingOwesAFlush, || Transition::FREE, || self.0.transition(level, old, new))
    }
    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        match self.1 {
            Fault::RuleWithoutName => self.0.check(level, raw).map_err(|why| EntryError { rule: "", ..why }),
            Fault::AnythingPasses => Ok(()),
            _ => self.0.check(level, raw),
        }
    }
}

/// Leaves of all sizes, written and not, armed, denied, and what is refused.
const ENTRIES: [(u8, u64); 12] = [
    (1, 0x8600_0000_0501_0b77),
    (1, 0x8600_0000_0501_0a73),
    (1, 0x8600_0000_0501_0877),
    (1, 0x8600_0000_0501_0975),
    (1, 0x8000_0000_0501_0971),
    (1, 0x8600_0000_4000_0b73),
    (2, 0x8600_0000_4020_0bf7),
    (2, 0x8600_0000_4000_08f3),
    (3, 0x8600_0000_4000_0bf3),
    (2, 0x8000_0000_0123_4907),
    (1, 0x0000_0000_0000_5002),
    (1, 0x8600_0000_0501_0b57),
];

#[test]
fn every_fault_of_a_format_breaks_a_law_and_a_right_one_none() {
    let entries: Vec<u8> =
        ENTRIES.iter().flat_map(|(level, raw)| std::iter::once(level - 1).chain(raw.to_le_bytes())).collect();
    let look = |fault| {
        let format = Wrong(Ept::new(EptOptions::default()).expect("options of a machine"), fault);
        look_with(&format, &entries, |format, level, raw| format.0.hardware_kind(level, raw))
    };
    let seen = look(Fault::None);
    assert!(seen.leaves >= 8 && seen.links == 1 && seen.refused >= 1, "{seen:?}");
    set_hook(Box::new(|_| {}));
    let missed: Vec<_> =
        FAULTS.into_iter().filter(|fault| catch_unwind(AssertUnwindSafe(|| look(*fault))).is_ok()).collect();
    let _ = std::panic::take_hook();
    assert_eq!(missed, []);
}
