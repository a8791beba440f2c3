// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Taking away: unmap, restrict, write-protect.
//!
//! Each walks its range, takes away with one compare-exchange an entry, and flushes once at the end. Facts of what goes
//! are read by the same exchange that takes the entry away, so that none can come between, and reported to the space's dirty
//! sink after the flush, before the operation returns.

use notifier_core::{Gpa, GpaRange};

use crate::{
    batch::{Absent, Batch, FlushFailed, NotFlushed},
    entry::{Cell, View, view},
    flush::{Flush, Leaves},
    format::{Format, FormatError, Kind, Level, WriteProtect},
    pages::{OutOfPages, PageSource},
    shape::{CannotSplit, Split, Unlink, Unlinked},
    table::{Cursor, Node, Table, TableRangeError},
};

/// Why an operation that takes away was not done, or not to the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RemoveError {
    /// The range does not fit the table. Nothing was done.
    #[error(transparent)]
    Range(#[from] TableRangeError),
    /// A leaf that lies only partly in the range had to be split, and there was no page. Everything below `at` is done (and
    /// flushed, or its flush stays owed); the leaf there is as it was.
    #[error("done up to {at}: {source}")]
    OutOfPages {
        /// Where it stopped.
        at: Gpa,
        /// What failed.
        source: OutOfPages,
    },
    /// A leaf that lies only partly in the range cannot be split: the format has no leaves of the next smaller size.
    /// Everything below `at` is done, and flushed, or its flush stays owed.
    #[error("done up to {at}: the format has no smaller leaf to split into")]
    CannotSplit {
        /// Where it stopped.
        at: Gpa,
    },
    /// The format cannot express these rights. Everything below `at` is done.
    #[error("done up to {at}: {source}")]
    Format {
        /// Where it stopped.
        at: Gpa,
        /// What the format says.
        source: FormatError,
    },
    /// Everything below `at` is done in the table, but the flush failed: it stays owed.
    #[error("done up to {at}, not flushed: {source}{}", Absent(absent))]
    Flush {
        /// Where it stopped; the end of the range where only the flush failed.
        at: Gpa,
        /// What failed.
        source: FlushFailed,
        /// What had to be taken away first, to be split or dissolved, and is untranslated now.
        absent: Option<GpaRange>,
    },
}

/// What an operation took away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Removed {
    /// Leaves that were taken away or changed. (Where a whole table went, its leaves count one by one.)
    pub leaves: u64,
    /// Those that were taken away young. (Rights that go leave the accessed fact where it is.)
    pub young: u64,
    /// Those whose dirty fact went to the sink: taken away dirty, or left without writing in a format where that takes the fact.
    pub dirty: u64,
}

/// What to do with a leaf that lies only partly in the range when there is no page to split it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Partly {
    /// Stop, and say so.
    Fail,
    /// Treat all of it: inside a window, where too much is safe and nothing may be left.
    Whole {
        /// The split must not wait either.
        nonblocking: bool,
    },
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// Removes every translation in `range`, and special entries; a leaf that lies only partly in it is split. Tables
    /// that the range covers are unlinked.
    ///
    /// On return nothing in the range is translated by any cache either, also what was taken away by others whose flush failed,
    /// or is still under way.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn unmap(&self, range: GpaRange) -> Result<Removed, RemoveError> {
        self.check_range(range)?;
        let mut batch = Batch::new(self);
        let removed = self.zap_range(range, Partly::Fail, &mut batch)?;
        self.finish_removal(range, batch)?;
        self.space.hand_over();
        Ok(removed)
    }

    /// Takes rights away: every leaf in `range` keeps of its rights those in `access`. On return no cache grants more, whoever took
    /// it away.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn restrict(&self, range: GpaRange, access: notifier_core::Access) -> Result<Removed, RemoveError> {
        self.check_range(range)?;
        self.lessen(range, |cell, raw| {
            let spec = self.format.spec(cell.level, raw);
            self.format.with_access(cell.level, raw, spec.access & access)
        })
    }

    /// Arms dirty logging: writing is withheld from every leaf in `range` that grants it, and comes back by
    /// [`Table::upgrade`]. On return no cache grants it, whoever withheld it.
    ///
    /// # Errors
    /// See [`RemoveError`].
    pub fn arm(&self, range: GpaRange) -> Result<Removed, RemoveError> {
        self.check_range(range)?;
        self.lessen(range, |cell, raw| Ok(self.format.write_protect(cell.level, raw, WriteProtect::Arm)))
    }

    fn finish_removal(&self, range: GpaRange, batch: Batch<'_, F, P, X>) -> Result<(), RemoveError> {
        batch.finish_over(range).map_err(|source| RemoveError::Flush { at: range.end(), source, absent: None })
    }

    fn lessen(
        &self,
        range: GpaRange,
        less: impl Fn(&Cell<'_>, u64) -> Result<u64, FormatError>,
    ) -> Result<Removed, RemoveError> {
        let mut batch = Batch::new(self);
        let removed = self.lessen_range(range, Partly::Fail, &mut batch, less)?;
        self.finish_removal(range, batch)?;
        Ok(removed)
    }

    /// Makes every leaf in `range` less by `less`, and collects what has to be flushed.
    pub(crate) fn lessen_range(
        &self,
        range: GpaRange,
        partly: Partly,
        batch: &mut Batch<'_, F, P, X>,
        less: impl Fn(&Cell<'_>, u64) -> Result<u64, FormatError>,
    ) -> Result<Removed, RemoveError> {
        let format = &self.format;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        let mut removed = Removed::default();
        while let Some((cell, raw)) = cursor.next(|_| false) {
            if view(format, cell.level, raw) != View::Leaf {
                cursor.pass(&cell);
                continue;
            }
            let at = Gpa::new(cell.start);
            let new = less(&cell, raw).map_err(|source| RemoveError::Format { at, source })?;
            if new == raw {
                cursor.pass(&cell);
                continue;
            }
            if self.is_member(cell.level, raw) {
                self.must_dissolve(&cell, partly)?;
                continue;
            }
            if self.must_split(&cursor, &cell, raw, partly)? {
                continue;
            }
            let transition = format.transition(cell.level, raw, new);
            if transition.flush {
                batch.owe();
            }
            if cell.replace(format, raw, new).is_err() {
                continue;
            }
            removed.leaves += 1;
            // Facts that the new value no longer has are reported.
            if format.is_dirty(cell.level, raw) && !format.is_dirty(cell.level, new) {
                removed.dirty += 1;
                batch.fact(&cell);
            }
            if transition.flush {
                batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
            }
            cursor.pass(&cell);
        }
        Ok(removed)
    }

    /// Dissolves the set that the leaf in `cell` is a member of.
    fn must_dissolve(&self, cell: &Cell<'_>, partly: Partly) -> Result<(), RemoveError> {
        let at = Gpa::new(cell.start);
        match (self.dissolve(cell, partly == Partly::Whole { nonblocking: true }), partly) {
            // Inside a window: the leaves are gone, and the flush is owed, which whoever opened it inherits.
            (Ok(()), _) | (Err(_), Partly::Whole { .. }) => Ok(()),
            (Err(NotFlushed { source, absent }), Partly::Fail) => Err(RemoveError::Flush { at, source, absent }),
        }
    }

    /// Splits a leaf that lies only partly in the range. Whether to look again.
    fn must_split(
        &self,
        cursor: &Cursor<'_, '_, F, P, X>,
        cell: &Cell<'_>,
        raw: u64,
        partly: Partly,
    ) -> Result<bool, RemoveError> {
        if cursor.covers(cell) {
            return Ok(false);
        }
        let at = Gpa::new(cell.start.max(cursor.at));
        let nonblocking = partly == Partly::Whole { nonblocking: true };
        match (self.split_cell(cell, raw, nonblocking), partly) {
            (Ok(Split::LookAgain), _) => Ok(true),
            (Ok(Split::Smallest) | Err(_), Partly::Whole { .. }) => Ok(false),
            (Ok(Split::Smallest), Partly::Fail) => Err(RemoveError::CannotSplit { at }),
            (Err(CannotSplit::Pages(source)), Partly::Fail) => Err(RemoveError::OutOfPages { at, source }),
            (Err(CannotSplit::Flush(NotFlushed { source, absent })), Partly::Fail) => {
                Err(RemoveError::Flush { at, source, absent })
            }
        }
    }

    /// Removes everything in `range` and collects what has to be flushed.
    pub(crate) fn zap_range(
        &self,
        range: GpaRange,
        partly: Partly,
        batch: &mut Batch<'_, F, P, X>,
    ) -> Result<Removed, RemoveError> {
        let format = &self.format;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        let (start, end) = (range.start().as_u64(), range.end().as_u64());
        let whole_leaf_table =
            |cell: &Cell<'_>| cell.level.below() == Some(Level::LEAF) && start <= cell.start && cell.end() <= end;
        let mut removed = Removed::default();
        while let Some((cell, raw)) = cursor.next(whole_leaf_table) {
            match view(format, cell.level, raw) {
                View::Table(page) => {
                    let (leaves, young, dirty) = self.count(&pin, &cell, page);
                    match self.unlink(&pin, &cell, raw, page, Unlink::WithLeaves, batch) {
                        Unlinked::Gone => {
                            removed.leaves += leaves;
                            removed.young += young;
                            removed.dirty += dirty;
                        }
                        Unlinked::InUse | Unlinked::LookAgain => {
                            cursor.restart();
                            continue;
                        }
                    }
                }
                View::Leaf if self.is_member(cell.level, raw) => {
                    let span = cell.span << format.set_shift(cell.level);
                    let first = cell.start & !(span - 1);
                    if cursor.at <= first && first.saturating_add(span) <= end {
                        let set = self.remove_set(&cell, batch);
                        removed.leaves += set.leaves;
                        removed.young += set.young;
                        removed.dirty += set.dirty;
                    } else {
                        self.must_dissolve(&cell, partly)?;
                    }
                    continue;
                }
                View::Leaf => {
                    if self.must_split(&cursor, &cell, raw, partly)? {
                        continue;
                    }
                    batch.owe();
                    if cell.replace(format, raw, format.not_present(cell.level).absent).is_err() {
                        continue;
                    }
                    removed.leaves += 1;
                    removed.young += u64::from(format.is_young(cell.level, raw));
                    batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
                    if format.is_dirty(cell.level, raw) {
                        removed.dirty += 1;
                        batch.fact(&cell);
                    }
                }
                View::Special if cell.replace(format, raw, format.not_present(cell.level).absent).is_err() => continue,
                _ => {}
            }
            cursor.pass(&cell);
        }
        // Tables above the leaf tables that the range covers are empty now, unless somebody was quicker.
        let mut level = Level::LEAF;
        while let Some(above) = level.above().and_then(|level| level.above()).filter(|l| *l <= self.geometry().top()) {
            level = match above.below() {
                Some(level) => level,
                None => break,
            };
            if range.len() < self.geometry().span(above) {
                break;
            }
            let mut cursor = self.cursor(&pin, range);
            while let Some((cell, raw)) = cursor.next(|cell| cell.level <= above) {
                let covered = cell.level == above && cursor.covers(&cell);
                if let (View::Table(page), true) = (view(format, cell.level, raw), covered) {
                    self.unlink(&pin, &cell, raw, page, Unlink::IfEmpty, batch);
                }
                cursor.pass(&cell);
            }
        }
        Ok(removed)
    }

    /// Leaves of a leaf table, those that are young, those that are dirty: as they are at a glance.
    fn count(
        &self,
        pin: &notifier_core::primitive::Pin,
        cell: &Cell<'_>,
        page: notifier_core::OutputAddr,
    ) -> (u64, u64, u64) {
        let format = &self.format;
        let Some(node) = self.child(pin, cell, page) else { return (0, 0, 0) };
        node.cells().fold((0, 0, 0), |(leaves, young, dirty), child| {
            let raw = child.load(format);
            if format.kind(child.level, raw) != Kind::Leaf {
                return (leaves, young, dirty);
            }
            let is = |fact: bool| u64::from(fact);
            let level = child.level;
            (leaves + 1, young + is(format.is_young(level, raw)), dirty + is(format.is_dirty(level, raw)))
        })
    }

    /// The bits of `raw` that are facts without a leaf to belong to: hardware wrote them after the leaf was replaced.
    pub(crate) fn late_bits(&self, level: Level, raw: u64) -> u64 {
        let format = &self.format;
        if !format.late_facts() {
            return 0;
        }
        let bare = match format.kind(level, raw) {
            Kind::Absent => format.not_present(level).absent,
            Kind::Dead => format.not_present(level).dead,
            Kind::Table(child) => format.table(level, child).unwrap_or(raw),
            Kind::Special | Kind::Claimed | Kind::Leaf => raw,
        };
        (raw ^ bare) & raw & format.hardware_bits(level, raw)
    }

    /// Reports and clears facts that hardware left in entries of `range` that are no leaves any more. Waits for nothing:
    /// what stands behind somebody's claim, in the entry or below it, is passed over, and told by who looks there next. That may
    /// be after the operation that took the leaf away has returned: a known gap.
    pub(crate) fn collect_late(&self, range: GpaRange) {
        let format = &self.format;
        let Some(range) = self.clip(range) else { return };
        let pin = self.space.pin();
        let (mut at, end) = (range.start().as_u64(), range.end().as_u64());
        let mut node = self.root_node(&pin);
        while at < end {
            if !node.holds(at) {
                node = self.root_node(&pin);
            }
            let cell = node.cell_at(at);
            let raw = cell.load(format);
            let late = self.late_bits(cell.level, raw);
            if late != 0 && raw & format.claim_bit() == 0 {
                if cell.replace(format, raw, raw & !late).is_ok() {
                    self.report_span(&cell);
                }
                continue;
            }
            // Once: a guest may write there again and again. Those of an unlinked table are collected with it.
            if cell.late_in_mirror(format, raw) != 0 && view(format, cell.level, raw) != View::Dead {
                if let Some(claim) = cell.claim(format, raw) {
                    let late = claim.take_late(format);
                    claim.give_back(format);
                    if late != 0 {
                        self.report_span(&cell);
                    }
                }
            }
            if let Some(child) = self.linked(&pin, &cell, raw) {
                node = child;
            } else {
                at = cell.end();
            }
        }
    }

    /// Reports facts that hardware left in an unlinked table.
    pub(crate) fn collect_late_of(&self, node: Node<'_>) {
        for cell in node.cells() {
            let raw = cell.load(&self.format);
            if self.late_bits(cell.level, raw) | cell.late_in_mirror(&self.format, raw) != 0 {
                self.report_span(&cell);
            }
        }
    }
}
