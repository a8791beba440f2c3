// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Changes of shape that change no translation: split, collapse, unlinking of empty tables.
//!
//! *Split* builds the whole smaller table in private and links it with one compare-exchange in place of the leaf: every
//! address translates the same before and after, and there is no moment between. It adds nothing, so it needs no
//! admission.
//!
//! *Collapse* claims the link, then every leaf below, left to right. Where the format has a claim bit none of that is seen
//! by anybody who translates. When all are claimed and still alike it asks the admission (for the merged leaf is one more
//! way to reach every page of the span, and a window over any of them must be able to take it back), shows the leaf to
//! hardware in place of the link, still claimed, makes the children DEAD, adds the facts that they gathered until then, gives
//! the leaf free, and flushes. A window or a harvest that comes in between waits for the claim, and finds every fact. Where the format has no claim
//! bit, or must break before it makes, the link is taken away first: a transient fault, never a different translation.
//! A refusal then leaves the span absent, flushed, and says so.

use alloc::vec::Vec;

use notifier_core::primitive::{Backoff, Pin, Twin, broken as forgets};
use notifier_core::{AddrRange, Admission, Gpa, GpaRange, OutputAddr, Refused, Retry, SlotFlags};

use crate::{
    batch::{Absent, Batch, FlushFailed, NotFlushed, Runs},
    entry::{Cell, Claim, View, view},
    flush::{Flush, Leaves},
    format::{Format, Kind, Level},
    pages::{OutOfPages, PageSource},
    table::{Node, Private, Table, TableRangeError, fill},
};

/// Why leaves were not split, or not all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SplitError {
    /// The range does not fit the table. Nothing was done.
    #[error(transparent)]
    Range(#[from] TableRangeError),
    /// No page for a table. Leaves below `at` are split; the leaf there is as it was.
    #[error("split up to {at}: {source}")]
    OutOfPages {
        /// Where splitting stopped.
        at: Gpa,
        /// What failed.
        source: OutOfPages,
    },
    /// A flush failed, and stays owed. Leaves below `at` are split; in a format that breaks before it makes the one there is gone.
    #[error("split up to {at}: {source}{}", Absent(absent))]
    Flush {
        /// Where splitting stopped.
        at: Gpa,
        /// What failed.
        source: FlushFailed,
        /// What had to be taken away first, and is untranslated now.
        absent: Option<GpaRange>,
    },
}

/// Why leaves were not merged, or not all. Those that were stay merged.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CollapseError {
    /// The range does not fit the table. Nothing was done.
    #[error(transparent)]
    Range(#[from] TableRangeError),
    /// The admission is of another space. Nothing was done.
    #[error("the admission belongs to another space")]
    ForeignSpace,
    /// The table has not subscribed to its space, or has left it.
    #[error("the table is not a subscriber of its space")]
    NotJoined,
    /// The range is not inside the fault's. Nothing was done.
    #[error("{range} is not inside the fault's range {admitted}")]
    Outside {
        /// The range asked for.
        range: GpaRange,
        /// The fault's range.
        admitted: GpaRange,
    },
    /// A window has overtaken the fault. `absent`, where given, had to be taken away first and is now untranslated
    /// (only in formats that break before they make).
    #[error("{retry}")]
    Retry {
        /// With it one waits for the window.
        retry: Retry,
        /// What is untranslated now.
        absent: Option<GpaRange>,
    },
    /// A flush failed, and stays owed. `absent`, where given, is untranslated now.
    #[error("{source}")]
    Flush {
        /// What failed.
        source: FlushFailed,
        /// What is untranslated now.
        absent: Option<GpaRange>,
    },
}

/// What became of one leaf that was to be split.
pub(crate) enum Split {
    /// Split, or changed by somebody else meanwhile: look again.
    LookAgain,
    /// There is no smaller level.
    Smallest,
}

/// Why one leaf was not split.
#[derive(Debug)]
pub(crate) enum CannotSplit {
    Pages(OutOfPages),
    Flush(NotFlushed),
}

impl From<NotFlushed> for CannotSplit {
    fn from(failed: NotFlushed) -> Self {
        Self::Flush(failed)
    }
}

/// What unlinking a table does with what it finds in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unlink {
    /// Only if nothing is in it.
    IfEmpty,
    /// Leaves in it are zapped.
    WithLeaves,
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// Splits every leaf in `range` down to the smallest pages, and dissolves [sets](crate::sets).
    ///
    /// # Errors
    /// See [`SplitError`].
    pub fn split(&self, range: GpaRange) -> Result<(), SplitError> {
        self.check_range(range)?;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        while let Some((cell, raw)) = cursor.next(|_| false) {
            if view(&self.format, cell.level, raw) == View::Leaf {
                let at = Gpa::new(cell.start);
                if self.is_member(cell.level, raw) {
                    let dissolved = self.dissolve(&cell, false);
                    dissolved.map_err(|NotFlushed { source, absent }| SplitError::Flush { at, source, absent })?;
                    continue;
                }
                match self.split_cell(&cell, raw, false) {
                    Ok(Split::LookAgain) => continue,
                    Ok(Split::Smallest) => {}
                    Err(CannotSplit::Pages(source)) => return Err(SplitError::OutOfPages { at, source }),
                    Err(CannotSplit::Flush(NotFlushed { source, absent })) => {
                        return Err(SplitError::Flush { at, source, absent });
                    }
                }
            }
            cursor.pass(&cell);
        }
        Ok(())
    }

    /// Splits so that no leaf lies across `at`, and no further.
    ///
    /// # Errors
    /// See [`SplitError`]; `at` has to be a multiple of the smallest page, and may be where the table ends.
    pub fn split_at(&self, at: Gpa) -> Result<(), SplitError> {
        let Ok(page) = AddrRange::with_len(at, self.granule()) else { return Ok(()) };
        if self.whole().is_some_and(|whole| whole.end() == at) {
            return Ok(());
        }
        self.check_range(page)?;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, page);
        while let Some((cell, raw)) = cursor.next(|_| false) {
            if view(&self.format, cell.level, raw) != View::Leaf || cell.start == at.as_u64() {
                return Ok(());
            }
            match self.split_cell(&cell, raw, false) {
                Ok(Split::LookAgain) => {}
                Ok(Split::Smallest) => return Ok(()),
                Err(CannotSplit::Pages(source)) => return Err(SplitError::OutOfPages { at, source }),
                Err(CannotSplit::Flush(NotFlushed { source, absent })) => {
                    return Err(SplitError::Flush { at, source, absent });
                }
            }
        }
        Ok(())
    }

    /// Splits the leaf `raw` in `cell` by one level, if it is still that.
    pub(crate) fn split_cell(&self, cell: &Cell<'_>, raw: u64, nonblocking: bool) -> Result<Split, CannotSplit> {
        let format = &self.format;
        let geometry = self.geometry();
        let Some(below) = cell.level.below() else { return Ok(Split::Smallest) };
        if self.is_member(cell.level, raw) {
            self.dissolve(cell, nonblocking)?;
            return Ok(Split::LookAgain);
        }
        // A format may have levels without leaves in between: then what is split has leaves two levels down. No format has
        // that yet; such a leaf is taken for the smallest.
        if !geometry.level(below).leaf {
            return Ok(Split::Smallest);
        }
        let private = self.private(below).map_err(CannotSplit::Pages)?;
        let Ok(link) = format.table(cell.level, private.top()) else {
            return Err(CannotSplit::Pages(OutOfPages { bytes: geometry.table_bytes(below) }));
        };
        for (index, child) in private.detached_node(cell.start).cells().enumerate() {
            fill(format, &child, format.split(cell.level, raw, index));
        }
        let transition = format.transition(cell.level, raw, link);
        if transition.break_first {
            return self.split_broken(cell, raw, private, link, nonblocking);
        }
        let mut batch = Batch::new(self);
        if transition.flush {
            batch.owe();
        }
        // Facts that arrive while the table is built make this fail, and it is built again.
        if cell.replace(format, raw, link).is_ok() {
            private.linked();
            if transition.flush {
                batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
            }
        }
        batch.finish(nonblocking).map_err(NotFlushed::from)?;
        Ok(Split::LookAgain)
    }

    /// As above, for formats that must break before they make: the leaf is taken away and flushed while it is claimed.
    fn split_broken(
        &self,
        cell: &Cell<'_>,
        raw: u64,
        private: Private<'_, F, P, X>,
        link: u64,
        nonblocking: bool,
    ) -> Result<Split, CannotSplit> {
        let format = &self.format;
        let mut batch = Batch::new(self);
        batch.owe();
        let Some(mut claim) = cell.claim(format, raw) else { return Ok(Split::LookAgain) };
        claim.take_away(format);
        batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
        let flushed = batch.finish(nonblocking);
        // Again, for facts that came until the flush.
        let old = claim.take_away(format);
        if let Err(error) = flushed {
            // Hardware goes on: with the facts that came until now. What comes later is found by who makes up for the flush.
            let old = claim.publish(format, format.not_present(cell.level).absent);
            self.report_leaf(cell, old);
            let absent = AddrRange::with_len(Gpa::new(cell.start), cell.span).ok();
            return Err(CannotSplit::Flush(NotFlushed { source: error, absent }));
        }
        // Facts that came before the break belong to the children.
        for (index, child) in private.detached_node(cell.start).cells().enumerate() {
            fill(format, &child, format.split(cell.level, old, index));
        }
        claim.publish(format, link);
        private.linked();
        Ok(Split::LookAgain)
    }

    /// Reports the dirty fact of a leaf that is no more.
    pub(crate) fn report_leaf(&self, cell: &Cell<'_>, raw: u64) -> bool {
        let dirty = self.format.is_dirty(cell.level, raw);
        if dirty {
            self.report_span(cell);
        }
        dirty
    }

    pub(crate) fn report_span(&self, cell: &Cell<'_>) {
        if let Ok(range) = AddrRange::with_len(Gpa::new(cell.start), cell.span) {
            self.space.report_dirty(range);
        }
    }

    /// Unlinks empty tables in `range`; how many. Scans: an empty table is not known as such.
    ///
    /// # Errors
    /// [`FlushFailed`]: the tables are unlinked, their pages wait for the next flush that succeeds.
    pub fn trim(&self, range: GpaRange) -> Result<usize, FlushFailed> {
        let Some(range) = self.clip(range) else { return Ok(0) };
        let pin = self.space.pin();
        let mut batch = Batch::new(self);
        let mut count = 0;
        let mut level = Level::LEAF;
        // From small tables to large ones: those whose last table goes become empty themselves.
        while let Some(above) = level.above().filter(|above| *above <= self.geometry().top()) {
            let mut cursor = self.cursor(&pin, range);
            while let Some((cell, raw)) = cursor.next(|cell| cell.level <= above) {
                let View::Table(page) = view(&self.format, cell.level, raw) else {
                    cursor.pass(&cell);
                    continue;
                };
                count +=
                    usize::from(self.unlink(&pin, &cell, raw, page, Unlink::IfEmpty, &mut batch) == Unlinked::Gone);
                cursor.pass(&cell);
            }
            level = above;
        }
        batch.finish(false)?;
        self.space.hand_over();
        Ok(count)
    }

    /// Takes the table behind the link `raw` in `cell` out. Facts of leaves that go are reported.
    pub(crate) fn unlink(
        &self,
        pin: &Pin,
        cell: &Cell<'_>,
        raw: u64,
        page: OutputAddr,
        how: Unlink,
        batch: &mut Batch<'_, F, P, X>,
    ) -> Unlinked {
        let format = &self.format;
        let Some(node) = self.child(pin, cell, page) else { return Unlinked::LookAgain };
        // A look without a claim first: mostly something lives here, and where the format has no claim bit a claim takes all of
        // it away from hardware.
        let lives = |child: Cell<'_>| {
            matches!(view(format, child.level, child.load(format)), View::Leaf | View::Special | View::Table(_))
        };
        if how == Unlink::IfEmpty && node.cells().any(lives) {
            return Unlinked::InUse;
        }
        batch.reserve();
        batch.owe();
        // What is to be reported when the claim is over.
        let mut facts = Marks::new(node.len());
        // That a table is empty is seen to under a claim; with leaves, the link goes at once.
        let claim = match how {
            Unlink::IfEmpty => cell.claim(format, raw),
            Unlink::WithLeaves => cell.claim_broken(format, raw),
        };
        let Some(claim) = claim else { return Unlinked::LookAgain };
        if forgets(Twin::UnlinkLeavesChildren) {
            claim.publish(format, format.not_present(cell.level).absent);
            batch.add(cell.start, cell.span, Leaves::Any, Some(cell.level));
            batch.unlink(page, &node);
            return Unlinked::Gone;
        }
        let mut leaves = Runs::default();
        for (index, child) in node.cells().enumerate() {
            let mut backoff = Backoff::new();
            loop {
                let old = child.load(format);
                match view(format, child.level, old) {
                    View::Claimed => {
                        backoff.snooze();
                        continue;
                    }
                    View::Absent => {}
                    // Nobody else makes entries of a table dead whose link is claimed by us.
                    View::Dead => break,
                    View::Leaf | View::Special if how == Unlink::WithLeaves => {}
                    _ => {
                        // Something lives here: as if nothing had been.
                        node.cells().take(index).for_each(|killed| killed.revive(format));
                        claim.give_back(format);
                        facts.iter().for_each(|index| batch.fact(&node.cell(index)));
                        return Unlinked::InUse;
                    }
                }
                if let Ok(was) = child.kill(format, old) {
                    if format.kind(child.level, was) == Kind::Leaf {
                        leaves.add(child.start, child.end());
                        if format.is_dirty(child.level, was) {
                            // In a set a write to any page may be recorded in any member.
                            let set = if self.is_member(child.level, was) { format.set_shift(child.level) } else { 0 };
                            let first = index >> set << set;
                            (first..first + (1 << set)).for_each(|index| facts.insert(index));
                        }
                    } else if self.late_bits(child.level, was) != 0 {
                        facts.insert(index);
                    }
                    break;
                }
            }
        }
        let was = claim.publish(format, format.not_present(cell.level).absent);
        batch.add_table(cell, node.level, &leaves);
        batch.unlink(page, &node);
        if self.late_bits(cell.level, was) != 0 {
            // Of a leaf that this link had taken the place of.
            batch.fact(cell);
        }
        facts.iter().for_each(|index| batch.fact(&node.cell(index)));
        Unlinked::Gone
    }

    /// Merges leaves of `range` upwards, level by level, as far as alignment, contiguity and equal attributes allow; how
    /// many tables were merged. Facts are added up.
    ///
    /// # Errors
    /// See [`CollapseError`].
    pub fn collapse(&self, admission: &Admission<'_>, range: GpaRange) -> Result<usize, CollapseError> {
        self.check_range(range)?;
        if !admission.is_of(&self.space) {
            return Err(CollapseError::ForeignSpace);
        }
        if self.membership().is_none() {
            return Err(CollapseError::NotJoined);
        }
        let admitted = admission.range();
        if !admitted.covers(&range) {
            return Err(CollapseError::Outside { range, admitted });
        }
        if admission.slot_flags().is_some_and(|flags| flags.contains(SlotFlags::LOG_DIRTY)) {
            return Ok(0);
        }
        let pin = self.space.pin();
        let mut count = 0;
        let mut level = Level::LEAF;
        while let Some(above) = level.above().filter(|above| *above <= self.geometry().top()) {
            level = above;
            if !self.geometry().level(above).leaf {
                continue;
            }
            let mut cursor = self.cursor(&pin, range);
            while let Some((cell, raw)) = cursor.next(|cell| cell.level <= above) {
                let covered = cell.level == above && cursor.covers(&cell);
                if let (View::Table(page), true) = (view(&self.format, cell.level, raw), covered) {
                    count += usize::from(self.collapse_cell(&pin, admission, &cell, raw, page)?);
                }
                cursor.pass(&cell);
            }
        }
        drop(pin);
        self.space.hand_over();
        Ok(count)
    }

    /// The leaf that a table's first entry promises, if it is a leaf that can be merged. Whether it is a member of a
    /// set matters not: all of the table's sets go at once.
    fn merged(&self, level: Level, first: u64) -> Option<u64> {
        let format = &self.format;
        let below = level.below()?;
        if view(format, below, first & !format.claim_bit()) != View::Leaf {
            return None;
        }
        format.collapse(level, first & !format.claim_bit())
    }

    /// Whether `raw`, the `index`-th child, is what splitting `merged` would make it, facts aside.
    fn is_part(&self, level: Level, merged: u64, index: usize, raw: u64) -> bool {
        let Some(below) = level.below() else { return false };
        let ignored = self.format.hardware_bits(below, raw) | self.format.claim_bit();
        let raw = if self.format.kind(below, raw) == Kind::Leaf { self.format.unmarked(below, raw) } else { raw };
        (self.format.split(level, merged, index) ^ raw) & !ignored == 0
    }

    fn collapse_cell(
        &self,
        pin: &Pin,
        admission: &Admission<'_>,
        cell: &Cell<'_>,
        raw: u64,
        page: OutputAddr,
    ) -> Result<bool, CollapseError> {
        let format = &self.format;
        let level = cell.level;
        let (Some(node), Ok(span)) =
            (self.child(pin, cell, page), AddrRange::with_len(Gpa::new(cell.start), cell.span))
        else {
            return Ok(false);
        };
        // A look without claims first: mostly there is nothing to merge.
        let Some(promise) = self.merged(level, node.cell(0).load(format)) else { return Ok(false) };
        if !node.cells().enumerate().all(|(index, child)| self.is_part(level, promise, index, child.load(format))) {
            return Ok(false);
        }
        let broken = format.claim_bit() == 0 || format.transition(level, raw, promise).break_first;
        let mut batch = Batch::new(self);
        let mut claims: Vec<Claim<'_>> = Vec::with_capacity(node.len());
        batch.reserve();
        batch.owe();
        let Some(mut claim) = cell.claim(format, raw) else { return Ok(false) };
        if broken {
            claim.take_away(format);
        }
        // Top down, left to right.
        let mut merged = None;
        for (index, child) in node.cells().enumerate() {
            let mut backoff = Backoff::new();
            let claimed = loop {
                let old = child.load(format);
                if view(format, child.level, old) == View::Claimed {
                    backoff.snooze();
                    continue;
                }
                let part = match merged {
                    None => self.merged(level, old).inspect(|whole| merged = Some(*whole)).is_some(),
                    Some(whole) => {
                        view(format, child.level, old) == View::Leaf && self.is_part(level, whole, index, old)
                    }
                };
                if !part {
                    break None;
                }
                if let Some(claimed) = child.claim(format, old) {
                    break Some(claimed);
                }
            };
            match claimed {
                Some(claimed) => claims.push(claimed),
                None => break,
            }
        }
        let whole = match merged {
            Some(whole) if claims.len() == node.len() => whole,
            _ => {
                claims.into_iter().for_each(|claimed| claimed.give_back(format));
                if broken {
                    // The link was away for a moment; what hardware cached on the way there is still right.
                    batch.add(cell.start, cell.span, Leaves::None, Some(cell.level));
                }
                claim.give_back(format);
                return batch
                    .finish(false)
                    .map(|()| false)
                    .map_err(|source| CollapseError::Flush { source, absent: None });
            }
        };
        if broken {
            return self.collapse_broken(admission, span, claim, claims, whole, (page, node), batch);
        }
        if let Err(refused) = self.admitted(admission, span) {
            claims.into_iter().for_each(|claimed| claimed.give_back(format));
            claim.give_back(format);
            return self.collapse_refused(admission, refused, span, None).map(|()| false);
        }
        let below = node.level;
        let mut leaf = claims.iter().fold(whole, |leaf, part| format.merge_facts(level, leaf, below, part.old));
        // Hardware and walkers use the leaf from here on; a window that comes now waits until its facts are complete.
        let link = claim.show(format, leaf);
        // What hardware left in the link, for a leaf that it had taken the place of, is a fact of the same pages.
        leaf = format.merge_facts(level, leaf, level, whole | self.late_bits(level, link));
        for claimed in claims {
            let was = claimed.publish(format, format.not_present(below).dead);
            if !forgets(Twin::CollapseForgetsFacts) {
                leaf = format.merge_facts(level, leaf, below, was);
            }
        }
        claim.publish(format, leaf);
        batch.add(cell.start, cell.span, Leaves::Of(below), Some(cell.level));
        batch.unlink(page, &node);
        batch.finish(false).map(|()| true).map_err(|source| CollapseError::Flush { source, absent: None })
    }

    #[expect(clippy::too_many_arguments, reason = "one half of one function")]
    fn collapse_broken(
        &self,
        admission: &Admission<'_>,
        span: GpaRange,
        claim: Claim<'_>,
        claims: Vec<Claim<'_>>,
        whole: u64,
        (page, node): (OutputAddr, Node<'_>),
        mut batch: Batch<'_, F, P, X>,
    ) -> Result<bool, CollapseError> {
        let format = &self.format;
        let level = claim.cell.level;
        let Some(below) = level.below() else { return Ok(false) };
        // The whole span, before the children are killed, and again before the leaf is published.
        if let Err(refused) = self.admitted(admission, span) {
            claims.into_iter().for_each(|claimed| claimed.give_back(format));
            claim.give_back(format);
            return self.collapse_refused(admission, refused, span, None).map(|()| false);
        }
        let mut leaf = whole;
        for claimed in claims {
            let was = claimed.publish(format, format.not_present(below).dead);
            if !forgets(Twin::CollapseForgetsFacts) {
                leaf = format.merge_facts(level, leaf, below, was);
            }
        }
        batch.add(span.start().as_u64(), span.len(), Leaves::Of(below), Some(level));
        batch.unlink(page, &node);
        batch.leave_late_facts();
        let cell = claim.cell;
        let flushed = batch.finish(false);
        // The pin keeps the table in being: facts that came until the flush go into the leaf.
        for child in node.cells() {
            let raw = child.load(format);
            let late = self.late_bits(below, raw) | child.late_in_mirror(format, raw);
            leaf = format.merge_facts(level, leaf, below, format.split(level, whole, 0) | late);
        }
        if let Err(source) = flushed {
            claim.publish(format, format.not_present(cell.level).absent);
            self.report_leaf(&cell, leaf);
            return Err(CollapseError::Flush { source, absent: Some(span) });
        }
        if let Err(refused) = self.admitted(admission, span) {
            claim.publish(format, format.not_present(cell.level).absent);
            self.report_leaf(&cell, leaf);
            return self.collapse_refused(admission, refused, span, Some(span)).map(|()| false);
        }
        claim.publish(format, leaf);
        Ok(true)
    }

    fn collapse_refused(
        &self,
        admission: &Admission<'_>,
        refused: Refused,
        range: GpaRange,
        absent: Option<GpaRange>,
    ) -> Result<(), CollapseError> {
        Err(match refused {
            Refused::Outside => CollapseError::Outside { range, admitted: admission.range() },
            Refused::NotMember => CollapseError::NotJoined,
            Refused::Lost => CollapseError::Retry { retry: admission.retry(), absent },
        })
    }

    /// The question between claim and publish: whether no window has overtaken the fault, and windows over `span` reach
    /// this table.
    pub(crate) fn admitted(&self, admission: &Admission<'_>, span: GpaRange) -> Result<(), Refused> {
        let membership = self.membership().ok_or(Refused::NotMember)?;
        admission.check_for(membership, span)
    }
}

/// Marks entries of a table: made before a claim, so that nothing is allocated under it.
#[derive(Debug)]
struct Marks(Vec<u64>);

impl Marks {
    fn new(entries: usize) -> Self {
        Self(alloc::vec![0; entries.div_ceil(64)])
    }

    fn insert(&mut self, index: usize) {
        self.0[index / 64] |= 1 << (index % 64);
    }

    fn iter(&self) -> impl Iterator<Item = usize> + '_ {
        let indices = |(word, bits): (usize, &u64)| {
            let bits = *bits;
            (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| word * 64 + bit)
        };
        self.0.iter().enumerate().flat_map(indices)
    }
}

/// What became of a table that was to be unlinked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unlinked {
    Gone,
    /// Something lives in it.
    InUse,
    /// The link changed meanwhile.
    LookAgain,
}
