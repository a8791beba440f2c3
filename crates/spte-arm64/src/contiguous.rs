// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Contiguous sets: entries in a row that one TLB entry may stand for.
//!
//! | granule | level 3 | level 2 | level 1 |
//! |---|---|---|---|
//! | 4K | 16 (64K) | 16 (32M) | 16 (16G) |
//! | 16K | 128 (2M) | 32 (1G) | none |
//! | 64K | 32 (2M) | 32 (16G) | none |
//!
//! (Arm DDI 0487, "The Contiguous bit"; pseudocode `ContiguousSize`.) A set begins at an entry whose index is a multiple
//! of the set's size; all its entries have the bit, the same attributes and rights, and outputs that follow one
//! another from one that is aligned to the set.
//!
//! **The span changes together.** A processor may have cached the whole set by any entry of it, so that changing one
//! entry's output, type or rights, clearing the bit or setting it, is a change of the set: all entries are broken, the
//! set's whole span is flushed, all are made. A flush of one entry need not reach the rest.
//!
//! The engine does that ([`spte_core::sets`]): it makes sets where a whole table is made and [`MapOptions::sets`] asks for
//! them, and by [`Table::fold`]; whatever changes one entry dissolves its set. Linux has none in stage 2.
//!
//! A table with fewer entries than a set (a small root) has none.
//!
//! [`MapOptions::sets`]: spte_core::MapOptions::sets
//! [`Table::fold`]: spte_core::Table::fold

use spte_core::format::{EntryError, Format, Kind, Level};

use crate::{
    bits::{ACCESS_FLAG, CONTIGUOUS, Granule, number_of},
    software::CLAIM,
    stage2::Stage2,
};

/// The size of the sets of a level.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContiguousSet {
    /// Entries in a set: 16, 32 or 128.
    pub entries: u16,
    /// Bytes that a set spans; its alignment on both sides.
    pub bytes: u64,
}

impl Stage2 {
    /// The sets of leaves at `level`, if its tables have any.
    pub fn contiguous(&self, level: Level) -> Option<ContiguousSet> {
        if !self.has_leaves(level) {
            return None;
        }
        let entries: u16 = match (self.options().granule, number_of(level)) {
            (Granule::K4, 1..=3) => 16,
            (Granule::K16, 3) => 128,
            (Granule::K16 | Granule::K64, 2) | (Granule::K64, 3) => 32,
            _ => return None,
        };
        if u32::from(entries) > 1 << self.geometry().level(level).bits {
            return None;
        }
        Some(ContiguousSet { entries, bytes: u64::from(entries) << self.shift(level) })
    }

    /// Checks the `index`-th entry of a set at `level` whose first entry is `first`: facts and claims apart, it must be
    /// what the set says. For index 0 that the first entry can begin a set.
    ///
    /// # Errors
    /// The rule of sets that `raw` breaks.
    pub fn check_contiguous(&self, level: Level, first: u64, index: u16, raw: u64) -> Result<(), EntryError> {
        let set = self.contiguous(level).filter(|set| index < set.entries);
        let Some(set) = set else {
            return EntryError::require(
                number_of(level),
                raw,
                false,
                CONTIGUOUS,
                "this level has no contiguous sets of that size",
            );
        };
        EntryError::require(
            number_of(level),
            raw,
            self.kind(level, raw) == Kind::Leaf,
            1,
            "every entry of a contiguous set is a leaf",
        )?;
        EntryError::require(
            number_of(level),
            raw,
            raw & CONTIGUOUS != 0,
            CONTIGUOUS,
            "every entry of a contiguous set has the bit",
        )?;
        let field = self.layout().field(self.shift(level));
        let begin = self.output(level, first);
        EntryError::require(
            number_of(level),
            first,
            begin & (set.bytes - 1) == 0,
            field,
            "a contiguous set begins at a multiple of its size",
        )?;
        let follows = self.output(level, raw) == begin + (u64::from(index) << self.shift(level));
        EntryError::require(number_of(level), raw, follows, field, "outputs of a contiguous set follow one another")?;
        let attributes = !(field | ACCESS_FLAG | self.facts() | CLAIM);
        EntryError::refuse(
            number_of(level),
            raw,
            (raw ^ first) & attributes,
            "entries of a contiguous set have the same attributes and rights",
        )
    }
}
