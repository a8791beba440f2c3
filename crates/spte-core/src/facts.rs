// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Accessed and dirty: ageing, and harvesting what was written.

use alloc::vec::Vec;

use notifier_core::{AddrRange, Gpa, GpaRange, primitive::Backoff};

use crate::{
    batch::{Absent, Batch, FlushFailed, NotFlushed},
    entry::{Cell, View, view},
    flush::{Flush, Leaves},
    format::{Format, Kind},
    pages::PageSource,
    table::{Table, TableRangeError},
};

/// Why dirty facts were not harvested.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HarvestError {
    /// The range does not fit the table. Nothing was done.
    #[error(transparent)]
    Range(#[from] TableRangeError),
    /// The flush failed, and stays owed. These facts were taken from the table and are lost unless the caller keeps
    /// them; they may still be written through TLBs that were not flushed, until a harvest succeeds: copy them after that.
    #[error("{} leaves harvested, not flushed: {source}{}", .dirty.len(), Absent(absent))]
    Flush {
        /// What was dirty.
        dirty: Vec<GpaRange>,
        /// What failed.
        source: FlushFailed,
        /// What had to be taken away first, to be split or dissolved, and is untranslated now.
        absent: Option<GpaRange>,
    },
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// Makes every leaf with a byte in `range` old; how many were young. A larger leaf, or a [set](crate::sets), that lies
    /// only partly in the range ages as a whole; the members of a set are young if one is.
    ///
    /// Waits for nothing, not even claims: a leaf that is just being changed may be passed over.
    ///
    /// # Errors
    /// [`FlushFailed`], in formats where ageing takes a right away.
    pub fn age(&self, range: GpaRange) -> Result<u64, FlushFailed> {
        let mut batch = Batch::new(self);
        let young = self.for_leaves(range, |cell, raw| {
            if !self.is_member(cell.level, raw) {
                return u64::from(self.age_cell(cell, raw, &mut batch));
            }
            // A set ages as one, with its first member in the range.
            let Some(members) = self.answers_for(cell, range) else { return 0 };
            let mut young = self.age_cell(cell, raw, &mut batch);
            self.for_others(cell, |other, raw| young |= self.age_cell(other, raw, &mut batch));
            if young { members } else { 0 }
        });
        batch.finish(false)?;
        Ok(young)
    }

    /// Makes one leaf old. Whether it was young.
    fn age_cell(&self, cell: &Cell<'_>, mut raw: u64, batch: &mut Batch<'_, F, P, X>) -> bool {
        let format = &self.format;
        while format.kind(cell.level, raw) == Kind::Leaf && format.is_young(cell.level, raw) {
            if cell.mirror.is_some() && raw & format.claim_bit() != 0 {
                return false;
            }
            let old = format.make_old(cell.level, raw);
            let transition = format.transition(cell.level, raw, old);
            if transition.flush {
                batch.owe();
            }
            match cell.replace(format, raw, old) {
                Ok(()) => {
                    if transition.flush {
                        batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
                    }
                    return true;
                }
                Err(found) => raw = found,
            }
        }
        false
    }

    /// How many leaves with a byte in `range` are young. Changes nothing.
    pub fn test_age(&self, range: GpaRange) -> u64 {
        let format = &self.format;
        self.for_leaves(range, |cell, raw| {
            let mut young = format.is_young(cell.level, raw);
            if !self.is_member(cell.level, raw) {
                return u64::from(young);
            }
            let Some(members) = self.answers_for(cell, range) else { return 0 };
            self.for_others(cell, |other, raw| young |= format.is_young(other.level, raw));
            if young { members } else { 0 }
        })
    }

    /// How many members of a set `cell`, one of them, answers for: all that have a byte in `range`, if it is the first of
    /// those.
    fn answers_for(&self, cell: &Cell<'_>, range: GpaRange) -> Option<u64> {
        let set = cell.span << self.format.set_shift(cell.level);
        let start = cell.start & !(set - 1);
        let is_first = cell.start == start || cell.start <= range.start().as_u64();
        let end = start.saturating_add(set).min(range.end().as_u64());
        is_first.then(|| end.saturating_sub(cell.start).div_ceil(cell.span))
    }

    /// Adds up what `question` says of each leaf.
    fn for_leaves(&self, range: GpaRange, mut question: impl FnMut(&Cell<'_>, u64) -> u64) -> u64 {
        let Some(range) = self.clip(range) else { return 0 };
        let pin = self.space.pin();
        let mut count = 0;
        self.look(&pin, range, |cell, raw| {
            if self.format.kind(cell.level, raw) == Kind::Leaf {
                count += question(cell, raw);
            }
        });
        count
    }

    /// What was written in `range` since it was last harvested, as the spans of the leaves that say so, ascending. They
    /// are made clean so that the next write shows: first cleared, then flushed, then returned, so that a write
    /// in between is in this harvest or in the next.
    ///
    /// Flushes that others owe are inherited: what the sink was told before this began is not written any more, when it
    /// returns, through the translations that were reported. So take what the sink has, harvest, then copy. What is written
    /// under a lease, or by the host, is no fact of any table: see
    /// [`Space::report_dirty`](notifier_core::Space::report_dirty).
    ///
    /// # Errors
    /// See [`HarvestError`].
    pub fn harvest_dirty(&self, range: GpaRange) -> Result<Vec<GpaRange>, HarvestError> {
        self.check_range(range)?;
        let format = &self.format;
        let pin = self.space.pin();
        let mut dirty = Vec::new();
        let mut batch = Batch::new(self);
        let mut cursor = self.cursor(&pin, range);
        while let Some((cell, raw)) = cursor.next(|_| false) {
            if view(format, cell.level, raw) == View::Leaf && self.is_member(cell.level, raw) {
                match self.set_is_dirty(&cell) {
                    Some(false) => {}
                    // Written somewhere: then each page of the set may be what was written.
                    Some(true) => match self.dissolve(&cell, false) {
                        Ok(()) => continue,
                        Err(NotFlushed { source, absent }) => {
                            return Err(HarvestError::Flush { dirty, source, absent });
                        }
                    },
                    None => {
                        Backoff::new().snooze();
                        continue;
                    }
                }
            } else if view(format, cell.level, raw) == View::Leaf && format.is_dirty(cell.level, raw) {
                let clean = format.make_clean(cell.level, raw);
                let transition = format.transition(cell.level, raw, clean);
                if transition.flush {
                    batch.owe();
                }
                if cell.replace(format, raw, clean).is_err() {
                    continue;
                }
                dirty.extend(AddrRange::with_len(Gpa::new(cell.start), cell.span));
                if transition.flush {
                    batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
                }
            }
            cursor.pass(&cell);
        }
        // Facts that others took meanwhile, and reported, are no longer in the table; but they may still owe the flush.
        match batch.finish_inheriting(false) {
            Ok(()) => Ok(dirty),
            Err(source) => Err(HarvestError::Flush { dirty, source, absent: None }),
        }
    }
}
