// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Adding: map what a fault resolved, raise rights, upgrade.
//!
//! Whatever becomes reachable is published by one store: a leaf into its absent entry, or a whole subtree, filled in private,
//! into the absent entry above it. Before that store the entry is claimed and the admission is asked about the whole
//! span that the store makes reachable.

use notifier_core::{Access, AddrRange, Admission, Extent, Gpa, GpaRange, OutputAddr, Refused, Retry, SlotFlags};

use crate::{
    batch::{Absent, Batch, FlushFailed, NotFlushed},
    entry::{Cell, View, view},
    flush::{Flush, Leaves},
    format::{Format, FormatError, LeafSpec, Level},
    pages::{OutOfPages, PageSource},
    shape::{CannotSplit, Unlink, Unlinked},
    table::{Node, Private, PrivateError, Table, TableRangeError, fill},
};

/// How leaves are made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct MapOptions<A> {
    /// Rights wanted. What is granted is what of them the extent and the slot allow.
    pub access: Access,
    /// Attributes of the format.
    pub attrs: A,
    /// Leaves begin accessed. Clear for pages that nobody asked for yet.
    pub accessed: bool,
    /// Leaves begin dirty.
    pub dirty: bool,
    /// Writing is armed instead of granted: the first write is an upgrade, which reports the page.
    pub armed: bool,
    /// The largest leaf to make, in bytes; `u64::MAX` for the largest that fits.
    pub largest: u64,
    /// Refuse to touch what is present, instead of raising its rights.
    pub only_absent: bool,
    /// Mark leaves as [sets](crate::sets) where whole tables are made, and the format has sets. Not where writing is
    /// armed or the slot logs.
    pub sets: bool,
}

impl<A: Default> Default for MapOptions<A> {
    /// All rights that were resolved, accessed and clean, not armed, leaves as large as fit.
    fn default() -> Self {
        Self {
            access: Access::RWX,
            attrs: A::default(),
            accessed: true,
            dirty: false,
            armed: false,
            largest: u64::MAX,
            only_absent: false,
            sets: false,
        }
    }
}

impl<A> MapOptions<A> {
    /// With these rights at most.
    #[must_use]
    pub fn access(mut self, access: Access) -> Self {
        self.access = access;
        self
    }

    /// With these attributes.
    #[must_use]
    pub fn attrs(mut self, attrs: A) -> Self {
        self.attrs = attrs;
        self
    }

    /// With leaves of at most so many bytes.
    #[must_use]
    pub fn largest(mut self, bytes: u64) -> Self {
        self.largest = bytes;
        self
    }

    /// With writing armed instead of granted.
    #[must_use]
    pub fn armed(mut self, armed: bool) -> Self {
        self.armed = armed;
        self
    }

    /// Dirty from the beginning.
    #[must_use]
    pub fn dirty(mut self, dirty: bool) -> Self {
        self.dirty = dirty;
        self
    }

    /// Accessed from the beginning.
    #[must_use]
    pub fn accessed(mut self, accessed: bool) -> Self {
        self.accessed = accessed;
        self
    }

    /// With leaves marked as sets, where that can be had for nothing.
    #[must_use]
    pub fn sets(mut self, sets: bool) -> Self {
        self.sets = sets;
        self
    }

    /// Refusing what is present.
    #[must_use]
    pub fn only_absent(mut self, only_absent: bool) -> Self {
        self.only_absent = only_absent;
        self
    }
}

/// What mapping did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Mapped {
    /// Leaves made.
    pub made: u64,
    /// Leaves whose rights were raised, or that were made young.
    pub raised: u64,
    /// Leaves that are as they were: they granted already what they may.
    pub already: u64,
    /// Of all these, leaves that [`Table::protect`] left with less than it was asked for, because no fault has resolved more.
    pub withheld: u64,
}

/// Why something was not mapped or raised, or not to the end. What lies below the address given is done.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A window has overtaken the fault: begin again.
    #[error(transparent)]
    Retry(#[from] Retry),
    /// The range does not fit the table. Nothing was done.
    #[error(transparent)]
    Range(#[from] TableRangeError),
    /// The range is not inside the fault's.
    #[error("{range} is not inside the fault's range {admitted}")]
    Outside {
        /// The range.
        range: GpaRange,
        /// The fault's range.
        admitted: GpaRange,
    },
    /// The admission is of another space. Nothing was done.
    #[error("the admission belongs to another space")]
    ForeignSpace,
    /// The table has not subscribed to its space, has left it, or is not told of windows over all of the range.
    #[error("the table is not a subscriber of its space")]
    NotJoined,
    /// Something else is mapped there: another output, or other attributes. It can only go by a window.
    #[error("{at} is mapped to {present}, not {wanted}, or with other attributes")]
    Conflict {
        /// Where.
        at: Gpa,
        /// Where it points.
        present: OutputAddr,
        /// Where it was to point.
        wanted: OutputAddr,
    },
    /// Something is mapped there, and only what is absent was to be mapped. Nothing was done.
    #[error("{at} is present")]
    Present {
        /// The first address that is.
        at: Gpa,
    },
    /// No page for a table.
    #[error("done up to {at}: {source}")]
    OutOfPages {
        /// Where it stopped.
        at: Gpa,
        /// What failed.
        source: OutOfPages,
    },
    /// The format cannot express the leaf.
    #[error("done up to {at}: {source}")]
    Format {
        /// Where it stopped.
        at: Gpa,
        /// What the format says.
        source: FormatError,
    },
    /// A flush failed, and stays owed.
    #[error("done up to {at}: {source}{}", Absent(absent))]
    Flush {
        /// Where it stopped.
        at: Gpa,
        /// What failed.
        source: FlushFailed,
        /// What had to be taken away first, and is untranslated now.
        absent: Option<GpaRange>,
    },
}

impl MapError {
    fn flush(at: Gpa, failed: impl Into<NotFlushed>) -> Self {
        let NotFlushed { source, absent } = failed.into();
        Self::Flush { at, source, absent }
    }
}

/// What came of [`Table::upgrade`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Upgrade {
    /// Writing is granted now. In formats without a dirty bit the page was reported.
    Granted,
    /// Writing was granted already.
    Already,
    /// The leaf is not armed, or there is none, or somebody is just changing it: the fault has to go the long way.
    No,
}

/// One step of mapping.
#[derive(Clone, Copy)]
struct Step<A> {
    /// The leaf, pointing where the step's first byte is to point.
    spec: LeafSpec<A>,
    /// Largest level that the options, the slot and the table's shape allow.
    largest: Level,
    /// Leaves of new tables are marked as sets.
    sets: bool,
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// Maps what the fault resolved: for use inside [`Resolved::install`](notifier_core::Resolved::install).
    ///
    /// Leaves are as large as both alignments, the extent, the slot (dirty logging: smallest pages) and `options` allow.
    /// What is there already, with the same output and attributes, has its rights raised; special entries are
    /// replaced.
    ///
    /// Processors may have something to do before the guest goes on (a barrier, the invalidation of a leaf whose rights rose): the
    /// format's crate says what, as it does for [`Table::upgrade`].
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn map(&self, admission: &Admission<'_>, options: &MapOptions<F::Attrs>) -> Result<Mapped, MapError> {
        self.check_admission(admission)?;
        let geometry = self.geometry();
        for extent in admission.extents() {
            self.check_range(extent.guest)?;
        }
        if options.only_absent {
            for extent in admission.extents() {
                if let Some(at) = self.first_present(extent.guest) {
                    return Err(MapError::Present { at });
                }
            }
        }
        let logged = admission.slot_flags().is_some_and(|flags| flags.contains(SlotFlags::LOG_DIRTY));
        let mut largest = Level::LEAF;
        let mut level = Level::LEAF;
        while let Some(above) = level.above().filter(|above| *above <= geometry.top() && !logged) {
            level = above;
            if geometry.level(above).leaf && geometry.span(above) <= options.largest {
                largest = above;
            }
        }
        let sets = options.sets && !options.armed && !logged;
        let mut mapped = Mapped::default();
        for extent in admission.extents() {
            let spec = LeafSpec {
                output: extent.output,
                access: options.access & extent.access & admission.ceiling(),
                armed: options.armed,
                accessed: options.accessed,
                dirty: options.dirty,
                attrs: options.attrs,
            };
            self.map_extent(admission, extent, Step { spec, largest, sets }, &mut mapped)?;
        }
        Ok(mapped)
    }

    fn check_admission(&self, admission: &Admission<'_>) -> Result<(), MapError> {
        if !admission.is_of(&self.space) {
            return Err(MapError::ForeignSpace);
        }
        if self.membership().is_none() {
            return Err(MapError::NotJoined);
        }
        Ok(())
    }

    fn first_present(&self, range: GpaRange) -> Option<Gpa> {
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        while let Some((cell, raw)) = cursor.next(|_| false) {
            if view(&self.format, cell.level, raw) == View::Leaf {
                return Some(Gpa::new(cell.start.max(cursor.at)));
            }
            cursor.pass(&cell);
        }
        None
    }

    fn map_extent(
        &self,
        admission: &Admission<'_>,
        extent: &Extent,
        step: Step<F::Attrs>,
        mapped: &mut Mapped,
    ) -> Result<(), MapError> {
        let format = &self.format;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, extent.guest);
        let first = extent.guest.start().as_u64();
        // Where a table in use was found, leaves stay below its level up to its end.
        let (mut lowered, mut lowered_until) = (step.largest, 0);
        loop {
            let largest = if cursor.at < lowered_until { lowered } else { step.largest };
            let wants = step.spec.output.wrapping_add(cursor.at.saturating_sub(first));
            let wanted = self.fitting(cursor.at, wants, cursor.end, largest);
            let Some((cell, raw)) = cursor.next(|cell| cell.level == wanted) else { return Ok(()) };
            let at = Gpa::new(cursor.at);
            let step = Step { spec: LeafSpec { output: wants, ..step.spec }, largest, ..step };
            match view(format, cell.level, raw) {
                View::Leaf => {
                    if self.raise(admission, &cell, raw, at, &step.spec, &cursor, mapped)? {
                        cursor.pass(&cell);
                    }
                }
                View::Table(page) => {
                    // A table where a large leaf would fit: an empty one goes, a used one stays and is filled.
                    let mut batch = Batch::new(self);
                    let unlinked = self.unlink(&pin, &cell, raw, page, Unlink::IfEmpty, &mut batch);
                    batch.finish(false).map_err(|error| MapError::flush(at, error))?;
                    if unlinked != Unlinked::InUse {
                        continue;
                    }
                    // Perhaps by nothing but empty tables.
                    let span = AddrRange::with_len(Gpa::new(cell.start), cell.span).unwrap_or(extent.guest);
                    let trimmed = match cell.level.below() {
                        None | Some(Level::LEAF) => 0,
                        Some(_) => self.trim(span).map_err(|error| MapError::flush(at, error))?,
                    };
                    if trimmed == 0 {
                        (lowered, lowered_until) = (cell.level.below().unwrap_or(Level::LEAF), cell.end());
                    }
                }
                _ => {
                    let part = cursor.part(&cell).unwrap_or(extent.guest);
                    if self.fill_absent(admission, &cell, raw, part, &step, mapped)? {
                        cursor.pass(&cell);
                    }
                }
            }
        }
    }

    fn outside(&self, admission: &Admission<'_>, range: GpaRange) -> MapError {
        MapError::Outside { range, admitted: admission.range() }
    }

    /// The largest level, up to `largest`, at which a leaf from `at` to `output` fits before `end`.
    fn fitting(&self, at: u64, output: OutputAddr, end: u64, largest: Level) -> Level {
        let geometry = self.geometry();
        let mut level = largest;
        while let Some(below) = level.below() {
            let span = geometry.span(level);
            let fits = (at | output.as_u64()) & (span - 1) == 0 && end.saturating_sub(at) >= span;
            if fits && geometry.level(level).leaf {
                break;
            }
            level = below;
        }
        level
    }

    /// Publishes what belongs into the absent (or special) entry `raw` in `cell`: a leaf, or a subtree. `false`: somebody
    /// was quicker, look again.
    fn fill_absent(
        &self,
        admission: &Admission<'_>,
        cell: &Cell<'_>,
        raw: u64,
        part: GpaRange,
        step: &Step<F::Attrs>,
        mapped: &mut Mapped,
    ) -> Result<bool, MapError> {
        let format = &self.format;
        let at = part.start();
        let fits = self.fitting(at.as_u64(), step.spec.output, part.end().as_u64(), step.largest);
        let (entry, private, leaves) = if fits == cell.level {
            let leaf = format.leaf(cell.level, &step.spec);
            (leaf.map_err(|source| MapError::Format { at, source })?, None, 1)
        } else {
            let below = cell.level.below().ok_or_else(|| self.outside(admission, part))?;
            let mut private = self.private(below).map_err(|source| MapError::OutOfPages { at, source })?;
            let leaves = self.build(&mut private, cell.start, part, step).map_err(|error| match error {
                PrivateError::OutOfPages(source) => MapError::OutOfPages { at, source },
                PrivateError::Format(source) => MapError::Format { at, source },
            })?;
            let link = format.table(cell.level, private.top()).map_err(|source| MapError::Format { at, source })?;
            (link, Some(private), leaves)
        };
        // ---- claimed: nothing from here to the end of the claim allocates, calls, locks or faults ----
        let Some(claim) = cell.claim(format, raw) else { return Ok(false) };
        // (But for a flush, where the format must have one before it refills.)
        if let Err(source) = self.settle_refill(cell) {
            claim.give_back(format);
            return Err(MapError::flush(at, source));
        }
        if let Err(refused) = self.admitted(admission, part) {
            claim.give_back(format);
            return Err(self.refused(admission, refused, part));
        }
        let was = claim.publish(format, entry);
        // ---- published ----
        if let Some(private) = private {
            private.linked();
        }
        if self.late_bits(cell.level, was) != 0 {
            // A fact that hardware left late in an entry that was taken away (see `Format::late_facts`).
            self.report_span(cell);
        }
        mapped.made += leaves;
        Ok(true)
    }

    fn refused(&self, admission: &Admission<'_>, refused: Refused, range: GpaRange) -> MapError {
        match refused {
            Refused::Outside => self.outside(admission, range),
            Refused::NotMember => MapError::NotJoined,
            Refused::Lost => admission.retry().into(),
        }
    }

    /// Fills private pages with the leaves of `part`. The number of leaves.
    fn build(
        &self,
        private: &mut Private<'_, F, P, X>,
        base: u64,
        part: GpaRange,
        step: &Step<F::Attrs>,
    ) -> Result<u64, PrivateError> {
        let format = &self.format;
        let (first, end) = (part.start().as_u64(), part.end().as_u64());
        let mut at = first;
        let mut leaves = 0;
        // The first leaf of the set that is being made, where it began, and where it ends.
        let mut set = (0, 0, 0);
        let top: Node<'_> = private.detached_node(base);
        let mut path: [Option<Node<'_>>; crate::format::MAX_LEVELS] = [None; crate::format::MAX_LEVELS];
        path[usize::from(top.level.get()) - 1] = Some(top);
        while at < end {
            let wants = step.spec.output.wrapping_add(at - first);
            let level = self.fitting(at, wants, end, step.largest.min(top.level));
            // From the lowest node that holds `at` down to the leaf's level.
            let mut node = path
                .iter()
                .skip(usize::from(level.get()) - 1)
                .flatten()
                .find(|node| node.holds(at))
                .copied()
                .unwrap_or(top);
            while node.level > level {
                node = private.grow(&node.cell_at(at))?;
                path[usize::from(node.level.get()) - 1] = Some(node);
            }
            let cell = node.cell_at(at);
            let mut leaf = format.leaf(level, &LeafSpec { output: wants, ..step.spec })?;
            let set_span = cell.span << format.set_shift(level);
            if step.sets && set_span > cell.span && at & (set_span - 1) == 0 && end - at >= set_span {
                set = (leaf, at, at + set_span);
            }
            if at < set.2 {
                let index = ((at - set.1) / cell.span) as usize;
                leaf = format.set_member(level, set.0, index).unwrap_or(leaf);
            }
            fill(format, &cell, leaf);
            leaves += 1;
            at = cell.end();
        }
        Ok(leaves)
    }

    /// A leaf is there: raise its rights, if it is the right one. `false`: look again.
    #[expect(clippy::too_many_arguments, reason = "one step of mapping")]
    fn raise(
        &self,
        admission: &Admission<'_>,
        cell: &Cell<'_>,
        raw: u64,
        at: Gpa,
        wanted: &LeafSpec<F::Attrs>,
        cursor: &crate::table::Cursor<'_, '_, F, P, X>,
        mapped: &mut Mapped,
    ) -> Result<bool, MapError> {
        let format = &self.format;
        let spec = format.spec(cell.level, raw);
        let present = spec.output.wrapping_add(at.as_u64() - cell.start);
        if present != wanted.output || spec.attrs != wanted.attrs {
            // Mostly the fault was resolved before a window repointed the page. Who reads the new leaf sees the poison too.
            if let Err(refused) = self.admitted(admission, admission.range()) {
                return Err(self.refused(admission, refused, admission.range()));
            }
            return Err(MapError::Conflict { at, present, wanted: wanted.output });
        }
        let mut access = spec.access | wanted.access;
        let armed = if spec.access.writable() { spec.armed && wanted.armed } else { wanted.armed };
        // What cannot execute in a large leaf cannot because the format withholds it there.
        if format.leaf(cell.level, &LeafSpec { access, armed, ..spec }).map(|leaf| format.spec(cell.level, leaf).access)
            == Ok(spec.access)
        {
            access = spec.access;
        }
        if access == spec.access && armed == (spec.armed && spec.access.writable()) {
            if wanted.accessed && !format.is_young(cell.level, raw) {
                // A fault on a leaf that was aged.
                if cell.replace(format, raw, format.make_young(cell.level, raw)).is_err() {
                    return Ok(false);
                }
                self.rejuvenate_others(cell, raw);
                mapped.raised += 1;
            } else {
                mapped.already += 1;
            }
            return Ok(true);
        }
        if self.is_member(cell.level, raw) {
            self.dissolve(cell, false).map_err(|error| MapError::flush(at, error))?;
            return Ok(false);
        }
        if !cursor.covers(cell) {
            // Rights rise only where they were resolved.
            return match self.split_cell(cell, raw, false) {
                Ok(crate::shape::Split::LookAgain) => Ok(false),
                Ok(crate::shape::Split::Smallest) => Err(self.outside(admission, admission.range())),
                Err(CannotSplit::Pages(source)) => Err(MapError::OutOfPages { at, source }),
                Err(CannotSplit::Flush(source)) => Err(MapError::flush(at, source)),
            };
        }
        let new = format
            .leaf(cell.level, &LeafSpec { access, armed, accessed: spec.accessed || wanted.accessed, ..spec })
            .map_err(|source| MapError::Format { at, source })?;
        let mut batch = Batch::new(self);
        let raised = self.publish_over(admission, cell, raw, new, at, &mut batch)?;
        batch.finish(false).map_err(|error| MapError::flush(at, error))?;
        mapped.raised += u64::from(raised);
        Ok(raised)
    }

    /// Puts a leaf with other rights over the leaf `raw`; what is to be flushed goes into `batch`. `false`: look again.
    fn publish_over(
        &self,
        admission: &Admission<'_>,
        cell: &Cell<'_>,
        raw: u64,
        new: u64,
        at: Gpa,
        batch: &mut Batch<'_, F, P, X>,
    ) -> Result<bool, MapError> {
        let format = &self.format;
        let span = AddrRange::with_len(Gpa::new(cell.start), cell.span)
            .map_err(|_| self.outside(admission, admission.range()))?;
        let transition = format.transition(cell.level, raw, new);
        if transition.break_first {
            return self.break_over(admission, cell, raw, new, at, span);
        }
        if transition.flush {
            batch.owe();
        }
        let Some(claim) = cell.claim(format, raw) else { return Ok(false) };
        if let Err(refused) = self.admitted(admission, span) {
            claim.give_back(format);
            return Err(self.refused(admission, refused, span));
        }
        claim.publish(format, new);
        if transition.flush {
            batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
        }
        Ok(true)
    }

    /// As above, where the old leaf has to be broken first: the claim is held across its flush.
    fn break_over(
        &self,
        admission: &Admission<'_>,
        cell: &Cell<'_>,
        raw: u64,
        new: u64,
        at: Gpa,
        span: GpaRange,
    ) -> Result<bool, MapError> {
        let format = &self.format;
        let mut batch = Batch::new(self);
        batch.owe();
        let Some(mut claim) = cell.claim(format, raw) else { return Ok(false) };
        claim.take_away(format);
        batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
        if let Err(source) = batch.finish(false) {
            // With the facts that came until now.
            let old = claim.publish(format, format.not_present(cell.level).absent);
            self.report_leaf(cell, old);
            return Err(MapError::flush(at, NotFlushed { source, absent: Some(span) }));
        }
        if let Err(refused) = self.admitted(admission, span) {
            claim.give_back(format);
            return Err(self.refused(admission, refused, span));
        }
        claim.publish(format, new);
        Ok(true)
    }

    /// Sets the rights of every leaf in `range` to `access`, as far as may be: what a leaf did not have (granted or
    /// armed) it gets only where the fault resolved it to the same output, with that right; leaves that stay short of `access`
    /// are counted ([`Mapped::withheld`]). Armed leaves stay armed. Rights that this call takes are flushed before it returns
    /// ([`Table::restrict`] answers for those that others took).
    ///
    /// # Errors
    /// See [`MapError`].
    pub fn protect(&self, admission: &Admission<'_>, range: GpaRange, access: Access) -> Result<Mapped, MapError> {
        self.check_admission(admission)?;
        self.check_range(range)?;
        if !admission.range().covers(&range) {
            return Err(self.outside(admission, range));
        }
        let format = &self.format;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        let mut mapped = Mapped::default();
        let mut batch = Batch::new(self);
        while let Some((cell, raw)) = cursor.next(|_| false) {
            let at = Gpa::new(cell.start.max(cursor.at));
            if view(format, cell.level, raw) != View::Leaf {
                cursor.pass(&cell);
                continue;
            }
            let spec = format.spec(cell.level, raw);
            let part = cursor.part(&cell).unwrap_or(range);
            let output = spec.output.wrapping_add(part.start().as_u64() - cell.start);
            let allowed = spec.access | resolved_access(admission, part, output);
            let target = access & allowed & admission.ceiling();
            let withheld = u64::from(!target.contains(access));
            let new = format.with_access(cell.level, raw, target).map_err(|source| MapError::Format { at, source })?;
            if new == raw {
                mapped.already += 1;
                mapped.withheld += withheld;
                cursor.pass(&cell);
                continue;
            }
            if self.is_member(cell.level, raw) {
                self.dissolve(&cell, false).map_err(|error| MapError::flush(at, error))?;
                continue;
            }
            if !cursor.covers(&cell) {
                match self.split_cell(&cell, raw, false) {
                    Ok(crate::shape::Split::LookAgain) => continue,
                    Ok(crate::shape::Split::Smallest) => return Err(self.outside(admission, range)),
                    Err(CannotSplit::Pages(source)) => return Err(MapError::OutOfPages { at, source }),
                    Err(CannotSplit::Flush(source)) => return Err(MapError::flush(at, source)),
                }
            }
            if self.publish_over(admission, &cell, raw, new, at, &mut batch)? {
                mapped.raised += 1;
                mapped.withheld += withheld;
                cursor.pass(&cell);
            }
        }
        // One flush for all. (An error on the way flushes what was changed before it.)
        batch.finish(false).map_err(|error| MapError::flush(range.end(), error))?;
        Ok(mapped)
    }

    /// Brings writing back to an armed leaf: one compare-exchange, with no claim and no fault. Safe beside windows because
    /// a Retained window takes the arming away with the right, and a Zapped one the leaf. Waits for nothing, so that it
    /// may be called inside a scope.
    pub fn upgrade(&self, gpa: Gpa) -> Upgrade {
        let Ok(range) = AddrRange::with_len(gpa, 1) else { return Upgrade::No };
        if self.clip(range).is_none() {
            return Upgrade::No;
        }
        let pin = self.space.pin();
        let mut upgraded = Upgrade::No;
        self.look(&pin, range, |cell, raw| upgraded = self.upgrade_cell(cell, raw));
        upgraded
    }

    fn upgrade_cell(&self, cell: &Cell<'_>, mut raw: u64) -> Upgrade {
        let format = &self.format;
        while view(format, cell.level, raw) == View::Leaf {
            // (Armed leaves are in no set: what is upgraded changes alone.)
            let Some(new) = format.upgrade(cell.level, raw).filter(|_| !self.is_member(cell.level, raw)) else {
                let spec = format.spec(cell.level, raw);
                return if spec.access.writable() && !spec.armed { Upgrade::Already } else { Upgrade::No };
            };
            match cell.replace(format, raw, new) {
                Ok(()) => {
                    // Formats with a dirty bit let hardware say so; for the others this is the only moment that knows.
                    if format.is_dirty(cell.level, new) && !format.is_dirty(cell.level, raw) {
                        self.report_span(cell);
                    }
                    return Upgrade::Granted;
                }
                Err(found) => raw = found,
            }
        }
        Upgrade::No
    }

    /// Puts a special entry (an MMIO marker, say) where nothing is. `entry` is a raw value that the format takes for
    /// special at the smallest level.
    ///
    /// # Errors
    /// See [`MapError`]; [`MapError::Present`] where something is mapped.
    pub fn set_special(&self, admission: &Admission<'_>, gpa: Gpa, entry: u64) -> Result<(), MapError> {
        self.check_admission(admission)?;
        let format = &self.format;
        let range = AddrRange::with_len(gpa, self.granule()).map_err(|_| self.outside(admission, admission.range()))?;
        self.check_range(range)?;
        // What the format's own check refuses may be something that hardware would follow.
        let special = format.kind(Level::LEAF, entry) == crate::format::Kind::Special;
        if !special || format.check(Level::LEAF, entry).is_err() {
            let rule = "the format does not take this for a special entry that hardware cannot follow";
            return Err(MapError::Format { at: gpa, source: FormatError::Attribute { value: entry, rule } });
        }
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        while let Some((cell, raw)) = cursor.next(|_| false) {
            if view(format, cell.level, raw) == View::Leaf {
                return Err(MapError::Present { at: gpa });
            }
            let no_pages = |source| MapError::OutOfPages { at: gpa, source };
            let (new, private) = match cell.level.below() {
                None => (entry, None),
                Some(below) => {
                    let mut private = self.private(below).map_err(no_pages)?;
                    let mut node = private.detached_node(cell.start);
                    while node.level > Level::LEAF {
                        node = private.grow(&node.cell_at(gpa.as_u64())).map_err(|error| match error {
                            PrivateError::OutOfPages(source) => no_pages(source),
                            PrivateError::Format(source) => MapError::Format { at: gpa, source },
                        })?;
                    }
                    fill(format, &node.cell_at(gpa.as_u64()), entry);
                    let link = format.table(cell.level, private.top());
                    (link.map_err(|source| MapError::Format { at: gpa, source })?, Some(private))
                }
            };
            let Some(claim) = cell.claim(format, raw) else { continue };
            // The entry itself is followed by nobody, but a table that is made for it is.
            if let Err(source) = self.settle_refill(&cell) {
                claim.give_back(format);
                return Err(MapError::flush(gpa, source));
            }
            if let Err(refused) = self.admitted(admission, range) {
                claim.give_back(format);
                return Err(self.refused(admission, refused, range));
            }
            let was = claim.publish(format, new);
            if let Some(private) = private {
                private.linked();
            }
            if self.late_bits(cell.level, was) != 0 {
                self.report_span(&cell);
            }
            return Ok(());
        }
        Ok(())
    }
}

/// The rights that were resolved for all of `part`, if they were resolved to `output`.
fn resolved_access(admission: &Admission<'_>, part: GpaRange, output: OutputAddr) -> Access {
    // They are in ascending order.
    let extents = admission.extents();
    let extent = extents.get(extents.partition_point(|extent| extent.guest.end() <= part.start()));
    let extent = extent.filter(|extent| extent.guest.covers(&part));
    let offset = |extent: &Extent| part.start().as_u64() - extent.guest.start().as_u64();
    extent
        .filter(|extent| extent.output.wrapping_add(offset(extent)) == output)
        .map_or(Access::empty(), |extent| extent.access)
}
