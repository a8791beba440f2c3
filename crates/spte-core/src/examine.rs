// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Whether a format keeps its promises to the engine: for the tests of whoever writes one.
//!
//! The engine trusts a [`Format`]. One whose claim bit is part of an address, or whose values that hold nothing cannot be told apart,
//! makes it wait for ever, lose a page, or follow what is no link; nothing of that looks like a mistake in a format. So
//! [`examine`] asks a format for entries of every level, and holds each answer against the others:
//!
//! ```
//! # use spte_core::format::Format;
//! # fn of_mine<F: Format>(format: &F) {
//! spte_core::examine::examine(format, F::Attrs::default()).unwrap();
//! # }
//! ```
//!
//! It finds much of what contradicts itself: not everything (sets, and most of what [`Format::transition`] says, are not asked
//! for). What the bits mean to hardware only hardware knows.

use notifier_core::{Access, OutputAddr};

use crate::format::{Format, Kind, LeafSpec, Level, Touch, WriteProtect};

/// A promise that a format does not keep.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("entry {raw:#018x} at level {number}: {rule}")]
pub struct Flaw {
    /// The entry that shows it.
    pub raw: u64,
    /// The architecture's number of its level.
    pub number: i8,
    /// What should be so.
    pub rule: &'static str,
}

/// Asks `format` for entries of every level (leaves with these attributes), and holds its answers against each other.
///
/// # Errors
/// The first [`Flaw`].
pub fn examine<F: Format>(format: &F, attrs: F::Attrs) -> Result<(), Flaw> {
    let mut leaves = 0_usize;
    for level in format.geometry().levels() {
        let at = At { format, level };
        at.nothing()?;
        at.links()?;
        leaves += at.leaves(attrs)?;
    }
    At { format, level: Level::LEAF }.holds(leaves != 0, 0, "some leaf with rights can be made for some output")
}

/// Sets of rights that a leaf may have.
const RIGHTS: [Access; 6] = [Access::RWX, Access::RW, Access::RX, Access::READ, Access::WRITE, Access::EXECUTE];

/// Questions about one level.
struct At<'f, F: Format> {
    format: &'f F,
    level: Level,
}

impl<F: Format> At<'_, F> {
    fn holds(&self, kept: bool, raw: u64, rule: &'static str) -> Result<(), Flaw> {
        if kept { Ok(()) } else { Err(Flaw { raw, number: self.format.level_number(self.level), rule }) }
    }

    fn kind(&self, raw: u64) -> Kind {
        self.format.kind(self.level, raw)
    }

    /// What is true of every entry that the format makes.
    fn any(&self, raw: u64) -> Result<(), Flaw> {
        let format = self.format;
        self.holds(format.raw_of(format.memory_of(raw)) == raw, raw, "raw_of undoes memory_of")?;
        let written = format.hardware_bits(self.level, raw);
        self.holds(written & format.claim_bit() == 0, raw, "the claim bit is none of hardware's")?;
        self.holds(format.check(self.level, raw).is_ok(), raw, "check takes what the format makes")
    }

    /// What is true of every entry that is present.
    fn present(&self, raw: u64) -> Result<(), Flaw> {
        self.any(raw)?;
        let (kind, claim) = (self.kind(raw), self.format.claim_bit());
        self.holds(raw & claim == 0, raw, "what the format makes is not claimed")?;
        self.holds(self.kind(raw | claim) == kind, raw, "the claim bit changes nothing else")?;
        let written = self.format.hardware_bits(self.level, raw);
        self.holds(self.kind(raw | written) == kind, raw, "what hardware sets changes no entry into another")?;
        self.holds(self.kind(raw & !written) == kind, raw, "what hardware clears changes no entry into another")
    }

    fn nothing(&self) -> Result<(), Flaw> {
        let values = self.format.not_present(self.level);
        let all = [(values.absent, Kind::Absent), (values.claimed, Kind::Claimed), (values.dead, Kind::Dead)];
        for (raw, kind) in all {
            self.holds(self.kind(raw) == kind, raw, "absent, claimed and dead are told apart")?;
            self.any(raw)?;
            let written = self.format.hardware_bits(self.level, raw);
            self.holds(
                self.kind(raw | written) == kind,
                raw,
                "facts that come late leave what holds nothing as it is",
            )?;
        }
        Ok(())
    }

    fn links(&self) -> Result<(), Flaw> {
        let Some(below) = self.level.below() else { return Ok(()) };
        for child in outputs(self.format.geometry().table_bytes(below) as u64) {
            let Ok(raw) = self.format.table(self.level, child) else { continue };
            self.holds(self.kind(raw) == Kind::Table(child), raw, "a link is a link to its table")?;
            self.present(raw)?;
        }
        Ok(())
    }

    /// How many could be made.
    fn leaves(&self, attrs: F::Attrs) -> Result<usize, Flaw> {
        let (mut made, geometry) = (0, self.format.geometry());
        if !geometry.level(self.level).leaf {
            return Ok(0);
        }
        for output in outputs(geometry.span(self.level)) {
            for access in RIGHTS {
                for (armed, facts) in [(false, false), (false, true), (true, false), (true, true)] {
                    let spec = LeafSpec { output, access, armed, accessed: facts, dirty: facts, attrs };
                    if let Ok(raw) = self.format.leaf(self.level, &spec) {
                        self.leaf(raw, &spec)?;
                        made += 1;
                    }
                }
            }
        }
        Ok(made)
    }

    fn leaf(&self, raw: u64, spec: &LeafSpec<F::Attrs>) -> Result<(), Flaw> {
        let (format, level) = (self.format, self.level);
        self.holds(self.kind(raw) == Kind::Leaf, raw, "a leaf is a leaf")?;
        self.present(raw)?;
        let found = format.spec(level, raw);
        // (A mitigation may take a right from larger leaves.)
        let within = spec.access.contains(found.access);
        self.holds(
            found.output == spec.output && within,
            raw,
            "spec undoes leaf, and has no right that was not asked for",
        )?;
        let asked = spec;
        let spec = &found;
        let granted = |raw, access| matches!(format.touch(level, raw, access), Touch::Allowed(_));
        let writes = spec.access.writable() && !asked.armed;
        self.holds(
            granted(raw, Access::WRITE) == writes || !spec.accessed,
            raw,
            "touch grants writing where the leaf does",
        )?;

        // What changes one leaf keeps a claim, and where the leaf leads.
        let claimed = raw | format.claim_bit();
        let same = |new: u64| {
            self.kind(new) == Kind::Leaf
                && format.spec(level, new).output == spec.output
                && new & format.claim_bit() == claimed & format.claim_bit()
        };
        for new in
            [format.make_old(level, claimed), format.make_young(level, claimed), format.make_clean(level, claimed)]
        {
            self.holds(same(new), new, "ageing and cleaning keep the claim, and where the leaf leads")?;
        }
        for how in [WriteProtect::Arm, WriteProtect::Retain] {
            let less = format.write_protect(level, claimed, how);
            self.holds(same(less), less, "write protection keeps the claim, and where the leaf leads")?;
            self.holds(!granted(less, Access::WRITE), less, "what is write-protected is not written")?;
            let back = format.upgrade(level, less);
            let may = how == WriteProtect::Arm && spec.access.writable();
            self.holds(may || back.is_none(), less, "only what is armed can be upgraded")?;
            self.holds(back.is_some() == may, less, "what was armed can be upgraded")?;
            if let Some(back) = back {
                self.holds(same(back), back, "an upgrade keeps the claim, and where the leaf leads")?;
                self.holds(
                    granted(format.make_young(level, back), Access::WRITE),
                    back,
                    "what was upgraded is written",
                )?;
            }
            if granted(raw, Access::WRITE) {
                let owes = format.transition(level, claimed, less).flush;
                self.holds(owes, less, "to take writing away owes a flush")?;
            }
        }
        for access in RIGHTS {
            if let Ok(new) = format.with_access(level, claimed, access) {
                self.holds(same(new), new, "with_access keeps the claim, and where the leaf leads")?;
                self.holds(access.contains(format.spec(level, new).access), new, "with_access gives no other rights")?;
            }
        }

        // Facts.
        let old = format.make_old(level, raw);
        let young = format.make_young(level, raw);
        self.holds(!format.is_young(level, old), old, "make_old makes old")?;
        self.holds(format.is_young(level, young), young, "make_young makes young")?;
        let clean = format.make_clean(level, raw);
        self.holds(!format.is_dirty(level, clean), clean, "make_clean makes clean")?;
        let all = format.merge_facts(level, clean, level, raw);
        self.holds(
            format.is_dirty(level, all) || !format.is_dirty(level, raw) || !writes_alone(format, level, clean, raw),
            all,
            "merge_facts adds the dirty fact",
        )?;

        // What change_pte makes of it.
        let others = [spec.output, OutputAddr::new(0), OutputAddr::new(format.geometry().span(level))];
        for output in others {
            let Ok(moved) = format.set_spte(level, raw, output) else { continue };
            self.holds(self.kind(moved) == Kind::Leaf, moved, "set_spte makes a leaf")?;
            self.holds(format.spec(level, moved).output == output, moved, "set_spte leads to the new page")?;
            self.holds(!format.is_dirty(level, moved), moved, "what was repointed is clean")?;
            let young = format.is_young(level, moved) == format.is_young(level, raw);
            self.holds(young, moved, "what was repointed is as young as it was")?;
            self.holds(!granted(moved, Access::WRITE), moved, "what was repointed is not written")?;
            self.holds(format.upgrade(level, moved).is_none(), moved, "what was repointed is not upgraded")?;
        }

        // Levels.
        let Some(below) = level.below().filter(|below| format.geometry().level(*below).leaf) else { return Ok(()) };
        let down = At { format, level: below };
        let last = format.geometry().entries(below) - 1;
        for index in [0, 1, last] {
            let child = format.split(level, raw, index);
            down.holds(down.kind(child) == Kind::Leaf, child, "split makes leaves")?;
            down.present(child)?;
            let part = format.spec(below, child);
            let output = spec.output.wrapping_add(index as u64 * format.geometry().span(below));
            down.holds(
                part.output == output && part.access.contains(spec.access) && asked.access.contains(part.access),
                child,
                "a part leads to its part, with all rights",
            )?;
        }
        let first = format.split(level, raw, 0);
        let withheld = asked.armed && asked.access.writable();
        let written = matches!(format.touch(below, first, Access::WRITE), Touch::Allowed(_));
        down.holds(!(withheld && written), first, "parts of what is armed are armed")?;
        if let Some(whole) = format.collapse(level, format.split(level, raw, 0)) {
            for index in [0, 1, last] {
                let child = format.split(level, raw, index);
                let differs = (format.split(level, whole, index) ^ child) & !format.hardware_bits(below, child);
                down.holds(differs == 0, child, "split undoes collapse, but for facts")?;
            }
        }
        Ok(())
    }
}

/// Whether the two leaves differ in bits of hardware's alone: a fact that is a right is not merged.
fn writes_alone<F: Format>(format: &F, level: Level, clean: u64, raw: u64) -> bool {
    (clean ^ raw) & !format.hardware_bits(level, raw) == 0
}

/// Addresses that are multiples of `bytes`: none, one, and each with a single bit.
fn outputs(bytes: u64) -> impl Iterator<Item = OutputAddr> {
    let bits = core::iter::successors(Some(bytes), |bit| bit.checked_mul(2));
    core::iter::once(0).chain(bits).map(OutputAddr::new)
}
