// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every single-bit change of valid entries: what our checker refuses the MMU refuses, and the other way round.
//!
//! Leaves of every level, with every set of rights, facts and memory type that the format has, are written into a table as they are,
//! and then with each bit turned in turn. Each is accessed in the three ways. Where the format's rules for hardware allow the
//! entry, the MMU must do what the format says ([`Format::touch`]): the same output, or the same class of fault; and leave
//! in the entry what the format says it leaves. Where they do not, the MMU must fault. Of links every bit but the address's
//! is turned: where the rules allow it, nothing but rights may be missing.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use notifier_core::{Access, Gpa, OutputAddr};
use rand::Rng;
use rand::seq::SliceRandom;
use serde::Serialize;
use spte_core::format::{Format, Kind, LeafSpec, Level, Touch};
use spte_core::raw::HardwareKind;
use spte_drive::access;
use spte_model::{MemType, TouchKind};
use thiserror::Error;

use crate::machine::{Class, Exit, Fault, GuestAccess, Machine};
use crate::mmu::{Mmu, slot};
use crate::sequence::reserved;
use crate::vmm::{Vmm, VmmError};

/// The three ways.
const WAYS: [TouchKind; 3] = [TouchKind::Read, TouchKind::Write, TouchKind::Execute];

/// Checker and MMU disagree about an entry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{way:?} through {raw:#018x} at level {level} (made of {valid:#018x}): expected {expected}, found {found}")]
pub struct Mismatch {
    /// The access.
    pub way: TouchKind,
    /// The entry.
    pub raw: u64,
    /// Its level, by the architecture's number.
    pub level: i8,
    /// The entry of which a bit was turned.
    pub valid: u64,
    /// What the format says.
    pub expected: String,
    /// What the MMU did.
    pub found: String,
}

/// What was looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Entries {
    /// Entries, each with a bit turned or none.
    pub entries: u64,
    /// Accesses through them.
    pub accesses: u64,
    /// Of these entries, as many the rules refuse.
    pub refused: u64,
    /// The levels whose entries were looked at, by the architecture's numbers.
    pub levels: BTreeSet<i8>,
    /// Known leniencies that showed, and how often.
    pub lenient: BTreeMap<&'static str, u64>,
}

/// Why it ended.
#[derive(Debug, Error)]
pub enum EntriesError {
    /// A mismatch, the first.
    #[error(transparent)]
    Mismatch(#[from] Mismatch),
    /// Something else.
    #[error(transparent)]
    Vmm(#[from] VmmError),
}

/// What the format expects of an access.
enum Expected {
    /// It goes there, and leaves this entry.
    Reaches(u64, u64),
    /// A fault of this class.
    Faults(Class),
    /// A fault of any class, for this rule.
    Refused(&'static str),
    /// Through the link, there, or denied.
    Passes(u64),
    /// Nothing that can be told.
    Untold,
}

/// Where an entry stands, and what is accessed through it.
#[derive(Debug, Clone, Copy)]
struct Place {
    level: Level,
    slot: u64,
    /// A guest address below it.
    gpa: u64,
    /// Where that leads as it was mapped.
    output: u64,
}

struct Looker<'a, M: Machine> {
    mmu: &'a Mmu<M>,
    vmm: Vmm<M>,
    root: OutputAddr,
    seen: Entries,
}

/// Looks at links and, of each level, at no more than `most` leaves, chosen at random where there are more.
///
/// # Errors
/// [`EntriesError`].
pub fn check<M: Machine>(mmu: &Mmu<M>, most: usize, rng: &mut impl Rng) -> Result<Entries, EntriesError> {
    let vmm = Vmm::new(mmu.clone(), |page| page)?;
    let root = vmm.table.root();
    let mut looker = Looker { mmu, vmm, root, seen: Entries::default() };
    let levels = looker.vmm.table.format().geometry().levels();
    for level in levels {
        looker.leaves(level, most, rng)?;
        looker.link(level)?;
    }
    Ok(looker.seen)
}

impl<M: Machine> Looker<'_, M> {
    /// Leaves of this level, where there are any.
    fn leaves(&mut self, level: Level, most: usize, rng: &mut impl Rng) -> Result<(), EntriesError> {
        let driven = self.mmu.machine().driven();
        let format = driven.format;
        let Some(gpa) = self.place(level).filter(|_| format.geometry().level(level).leaf) else { return Ok(()) };
        let span = format.geometry().span(level);
        let data = self.vmm.ground.data.start;
        let output = data & !(span - 1);
        // The tables above it; what it was mapped with is replaced.
        self.vmm.map(gpa, output, span, Access::RWX)?;
        let slot = slot(&self.vmm.table, level, gpa);
        self.seen.levels.insert(format.level_number(level));
        let mut leaves = leaves(&format, driven.attrs, driven.shape.access(), level, output);
        leaves.shuffle(rng);
        let place = Place { level, slot, gpa: gpa + (data - output) + 0x40, output: data + 0x40 };
        let turns = || std::iter::once(0).chain((0..64).map(|bit| 1 << bit));
        let entries =
            leaves.into_iter().take(most).flat_map(|valid| turns().map(move |turned| (valid, valid ^ turned)));
        self.entries(&format, place, entries)?;
        Ok(self.vmm.zap(gpa, span)?)
    }

    /// A link of this level, above a page.
    fn link(&mut self, level: Level) -> Result<(), EntriesError> {
        let format = self.mmu.machine().driven().format;
        let Some(gpa) = self.place(level).filter(|_| level > Level::LEAF) else { return Ok(()) };
        let data = self.vmm.ground.data.start;
        self.vmm.map(gpa, data, self.vmm.granule, Access::RWX)?;
        let rows = self.vmm.table.walk(Gpa::new(gpa));
        let Some((raw, Kind::Table(child))) = rows.iter().find(|row| row.level == level).map(|row| (row.raw, row.kind))
        else {
            return Err(VmmError::Wrong(format!(
                "there is no link of level {} above {gpa:#x}",
                format.level_number(level)
            ))
            .into());
        };
        let slot = slot(&self.vmm.table, level, gpa);
        let kept = |bit: &u64| bit & child.as_u64() == 0;
        self.seen.levels.insert(format.level_number(level));
        let place = Place { level, slot, gpa: gpa + 0x40, output: data + 0x40 };
        let turns = std::iter::once(0).chain((0..64).map(|bit| 1_u64 << bit).filter(kept));
        self.entries(&format, place, turns.map(|turned| (raw, raw ^ turned)))?;
        Ok(self.vmm.zap(gpa, self.vmm.granule)?)
    }

    /// Entries in one place, each with the one of which a bit was turned. What the engine had there comes back, whatever is found:
    /// it follows links.
    fn entries(
        &mut self,
        format: &M::Format,
        place: Place,
        mut entries: impl Iterator<Item = (u64, u64)>,
    ) -> Result<(), EntriesError> {
        let memory = Arc::clone(&self.vmm.ground.memory);
        let kept = memory.word(place.slot).load(Ordering::Acquire);
        let looked = entries.try_for_each(|(valid, raw)| self.entry(format, place, valid, raw));
        memory.word(place.slot).store(kept, Ordering::Release);
        looked
    }

    /// A guest address for an entry of this level, away from the fixed pages.
    fn place(&self, level: Level) -> Option<u64> {
        let format = self.vmm.table.format();
        let (span, bits) = (format.geometry().span(level), self.mmu.machine().driven().shape.gpa_bits());
        let reserved = reserved(format, &self.vmm.ground);
        let free = |gpa: &u64| gpa + span <= reserved.start || reserved.end <= *gpa;
        let last = (1_u64 << bits).checked_sub(span)?;
        [reserved.end.next_multiple_of(span), reserved.start.saturating_sub(span) & !(span - 1), 0, last & !(span - 1)]
            .into_iter()
            .filter(|gpa| *gpa <= last)
            .find(free)
    }

    /// One entry in its place, accessed in the three ways.
    fn entry(&mut self, format: &M::Format, place: Place, valid: u64, raw: u64) -> Result<(), EntriesError> {
        let Place { level, slot, gpa, output: mapped } = place;
        self.seen.entries += 1;
        let memory = Arc::clone(&self.vmm.ground.memory);
        let mut machine = self.mmu.machine();
        let (kind, rules) = (machine.hardware_kind(level, raw), machine.check_hardware(level, raw));
        if rules.is_err() || matches!(kind, HardwareKind::Impossible(_)) {
            self.seen.refused += 1;
        }
        for way in WAYS {
            let at = Mmu::<M>::place(gpa, way);
            memory.word(slot).store(format.memory_of(raw), Ordering::Release);
            machine.begin(self.root).map_err(VmmError::from)?;
            let expected = match (kind, rules) {
                (HardwareKind::Impossible(error), _) | (_, Err(error)) => Expected::Refused(error.rule),
                (HardwareKind::NotPresent, Ok(())) => Expected::Faults(Class::Absent),
                (HardwareKind::Table(child), Ok(())) => match machine.hardware_kind(level, valid) {
                    HardwareKind::Table(same) if same == child => Expected::Passes(mapped - (gpa - at)),
                    _ => Expected::Untold,
                },
                (HardwareKind::Leaf, Ok(())) => {
                    let raw = raw & !format.claim_bit();
                    let output = format.spec(level, raw).output.as_u64() + (at & (format.geometry().span(level) - 1));
                    match format.touch(level, raw, access(way.needs())) {
                        Touch::Denied => Expected::Faults(Class::Denied),
                        Touch::AccessFlag if machine.tells_old() => Expected::Faults(Class::Old),
                        Touch::AccessFlag => Expected::Faults(Class::Absent),
                        Touch::Allowed(after) if self.vmm.ground.data.contains(&output) => {
                            Expected::Reaches(output, after)
                        }
                        Touch::Allowed(_) => Expected::Untold,
                    }
                }
            };
            if let Expected::Untold = expected {
                continue;
            }
            // What is fetched through an entry that should have been refused may be anything.
            if let (Expected::Refused(rule), TouchKind::Execute) = (&expected, way)
                && let Some(leniency) =
                    machine.leniencies().iter().find(|leniency| leniency.concerns(rule, raw ^ valid))
            {
                *self.seen.lenient.entry(leniency.why).or_default() += 1;
                continue;
            }
            self.seen.accesses += 1;
            let token = 0x5a5a_5a5a_0000_0001 | at << 4;
            let exit = machine.access(GuestAccess { at, kind: way, value: token }).map_err(VmmError::from)?;
            let after = format.raw_of(memory.word(slot).load(Ordering::Acquire));
            let found = |exit: &Exit| match exit {
                Exit::Fault(fault) => fault.to_string(),
                other => format!("{other:x?}, and the entry is {after:#018x}"),
            };
            let number = |output: u64| match way {
                TouchKind::Execute => (output - self.vmm.ground.data.start) >> 12,
                _ => output & !7,
            };
            let there = |output: u64| match (way, &exit) {
                (TouchKind::Write, Exit::Done { .. }) => {
                    let stored = memory.load(output);
                    memory.store(output, output);
                    stored == token
                }
                (_, exit) => *exit == Exit::Done { value: number(output) },
            };
            let told = |fault: &Fault| {
                fault.at.is_none_or(|reported| reported == at >> fault.blind << fault.blind)
                    && fault.level.is_none_or(|found| found == level)
                    && fault.kind.is_none_or(|found| found == way)
            };
            let (right, says, rule) = match (&expected, &exit) {
                (Expected::Reaches(output, entry), _) => {
                    let claim = raw & format.claim_bit();
                    let right = there(*output) && after == entry | claim;
                    (right, format!("{output:#x}, and the entry {entry:#018x}"), "")
                }
                (Expected::Faults(class), Exit::Fault(fault)) => {
                    (fault.class == *class && told(fault), format!("{class:?} at {at:#x}"), "")
                }
                (Expected::Faults(class), _) => (false, format!("{class:?}"), ""),
                (Expected::Refused(rule), exit) => {
                    // What was translated and led to no memory was not refused.
                    let refused = matches!(exit, Exit::Fault(fault) if fault.class != Class::Other && told(fault));
                    (refused, format!("a fault: {rule}"), *rule)
                }
                (Expected::Passes(output), Exit::Fault(fault)) => {
                    let right = raw != valid && fault.class == Class::Denied && told(fault);
                    (right, format!("{output:#x}, or a fault for rights"), "")
                }
                (Expected::Passes(output), _) => (there(*output), format!("{output:#x}"), ""),
                (Expected::Untold, _) => (true, String::new(), ""),
            };
            // A store that was to be refused may have gone anywhere in the data: it is put back where it can be found.
            if let (TouchKind::Write, Expected::Refused(_), Exit::Done { .. }) = (way, &expected, &exit) {
                self.restore(&memory);
            }
            if right {
                continue;
            }
            match machine.leniencies().iter().find(|leniency| leniency.explains(rule, raw ^ valid, way, &exit)) {
                Some(leniency) => *self.seen.lenient.entry(leniency.why).or_default() += 1,
                None => {
                    let (level, found) = (format.level_number(level), found(&exit));
                    return Err(Mismatch { way, raw, level, valid, expected: says, found }.into());
                }
            }
        }
        Ok(())
    }

    /// Puts the data right after a store that may have gone to any of it.
    fn restore(&self, memory: &crate::memory::Memory) {
        let data = self.vmm.ground.data.clone();
        for page in data.step_by(0x1000) {
            if memory.load(page + 0x40) != page + 0x40 {
                memory.store(page + 0x40, page + 0x40);
            }
        }
    }
}

/// Every leaf that the format makes for an output: each set of rights, facts, withheld writing and memory type.
fn leaves<F: Format>(
    format: &F,
    attrs: fn(MemType) -> Option<F::Attrs>,
    sets: &[spte_model::Access],
    level: Level,
    output: u64,
) -> Vec<u64> {
    let mut leaves = Vec::new();
    for rights in sets {
        for attrs in MemType::ALL.into_iter().filter_map(attrs) {
            for facts in 0..8 {
                let (accessed, dirty, armed) = (facts & 1 != 0, facts & 2 != 0, facts & 4 != 0);
                let spec = LeafSpec {
                    output: OutputAddr::new(output),
                    access: access(*rights),
                    armed,
                    accessed,
                    dirty,
                    attrs,
                };
                leaves.extend(format.leaf(level, &spec).ok());
            }
        }
    }
    leaves.sort_unstable();
    leaves.dedup();
    leaves
}
