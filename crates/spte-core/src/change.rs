// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `change_pte`: pages of a Retained window, repointed.
//!
//! Inside a Retained window every leaf of the range is read-only and cannot be upgraded, and no fault can publish into it.
//! What may still be found is a claim: a fault that was overtaken by the window and has not given back yet. It is waited
//! out, because what it gives back may be a leaf to the old page. (Model: `change_pte_against_a_claim`; its twin takes the
//! claimed entry for an absent one.)
//!
//! The leaf is replaced by one compare-exchange where the format allows that for read-only entries of equal contents:
//! at no moment is there no translation, so the guest does not notice. Then one flush for all pages, with whatever
//! else is owed; on return nothing translates to an old page.

use notifier_core::primitive::{Pin, Twin, broken};
use notifier_core::{AddrRange, Gpa, OutputAddr, PageChange, PageOutcome};

use crate::{
    batch::Batch,
    entry::{Cell, View, view},
    flush::{Flush, Leaves},
    format::Format,
    pages::PageSource,
    shape::Split,
    table::Table,
};

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// Repoints one page; what has to be flushed goes into `batch`.
    pub(crate) fn change_page(
        &self,
        pin: &Pin,
        change: &PageChange,
        page_size: u64,
        batch: &mut Batch<'_, F, P, X>,
    ) -> PageOutcome {
        let Some(range) = change.guest.and_then(|gpa| AddrRange::with_len(gpa, page_size).ok()) else {
            return PageOutcome::Absent;
        };
        let Some(range) = self.clip(range) else { return PageOutcome::Absent };
        let format = &self.format;
        let mut outcome = PageOutcome::Absent;
        let first = range.start().as_u64();
        let mut cursor = self.cursor(pin, range);
        // More than one leaf where the space's pages are larger than the format's.
        while let Some((cell, raw)) = self.next_to_change(&mut cursor, pin) {
            match view(format, cell.level, raw) {
                View::Leaf => {}
                _ => {
                    cursor.pass(&cell);
                    continue;
                }
            }
            if self.is_member(cell.level, raw) {
                // The page leaves its set, or all of the set is gone.
                if self.dissolve(&cell, false).is_err() {
                    outcome = PageOutcome::Zapped { found: None };
                    cursor.pass(&cell);
                }
                continue;
            }
            if !cursor.covers(&cell) {
                // A larger leaf over the page is split, or else removed whole.
                if let Ok(Split::LookAgain) = self.split_cell(&cell, raw, false) {
                    continue;
                }
                if self.zap_leaf(&cell, raw, batch) {
                    outcome = PageOutcome::Zapped { found: None };
                    cursor.pass(&cell);
                }
                continue;
            }
            let offset = cell.start - first;
            match self.change_leaf(
                &cell,
                raw,
                change.expected.wrapping_add(offset),
                change.new.wrapping_add(offset),
                batch,
            ) {
                None => continue,
                Some(PageOutcome::Changed) => {
                    if outcome == PageOutcome::Absent {
                        outcome = PageOutcome::Changed;
                    }
                }
                Some(other) => outcome = other,
            }
            cursor.pass(&cell);
        }
        outcome
    }

    /// The next entry. The model's twin does not wait for claims here.
    fn next_to_change<'p>(
        &self,
        cursor: &mut crate::table::Cursor<'_, 'p, F, P, X>,
        pin: &'p Pin,
    ) -> Option<(Cell<'p>, u64)> {
        if broken(Twin::ChangeSkipsClaim) {
            let mut found = None;
            let at = AddrRange::with_len(Gpa::new(cursor.at), self.granule()).ok()?;
            if cursor.at < cursor.end {
                self.look(pin, at, |cell, raw| found = Some((*cell, raw)));
            }
            return found;
        }
        cursor.next(|_| false)
    }

    /// One leaf of the page. `None`: it changed meanwhile, look again.
    fn change_leaf(
        &self,
        cell: &Cell<'_>,
        raw: u64,
        expected: OutputAddr,
        new: OutputAddr,
        batch: &mut Batch<'_, F, P, X>,
    ) -> Option<PageOutcome> {
        let format = &self.format;
        let level = cell.level;
        let spec = format.spec(level, raw);
        if spec.output != expected {
            return self.zap_leaf(cell, raw, batch).then_some(PageOutcome::Zapped { found: Some(spec.output) });
        }
        // The window made it read-only. A leaf that is not is not this window's to keep.
        let repointed = if spec.access.writable() { None } else { format.set_spte(level, raw, new).ok() };
        let Some(repointed) = repointed else {
            return self.zap_leaf(cell, raw, batch).then_some(PageOutcome::Zapped { found: None });
        };
        batch.owe();
        if format.equal_contents_transition(level, raw, repointed).break_first {
            return self.change_broken(cell, raw, repointed);
        }
        cell.replace(format, raw, repointed).ok()?;
        batch.add(cell.start, cell.span, Leaves::Of(level), None);
        if format.is_dirty(level, raw) {
            batch.fact(cell);
        }
        Some(PageOutcome::Changed)
    }

    /// For formats that break even between equal contents: taken away, flushed, made, under a claim.
    fn change_broken(&self, cell: &Cell<'_>, raw: u64, repointed: u64) -> Option<PageOutcome> {
        let format = &self.format;
        let mut batch = Batch::new(self);
        batch.owe();
        let mut claim = cell.claim(format, raw)?;
        claim.take_away(format);
        batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
        let flushed = batch.finish(false);
        // Again, for facts that came until the flush.
        let old = claim.take_away(format);
        // Not `publish` over the old leaf: its facts are reported, and belong to the old page.
        claim.old = format.not_present(cell.level).absent;
        // That the guest page was used is the new page's too, also where hardware said so late.
        let young = format.is_young(cell.level, old);
        let repointed = if young { format.make_young(cell.level, repointed) } else { repointed };
        let (new, outcome) = match flushed {
            Ok(()) => (repointed, PageOutcome::Changed),
            Err(_) => (format.not_present(cell.level).absent, PageOutcome::Zapped { found: None }),
        };
        claim.publish(format, new);
        self.report_leaf(cell, old);
        Some(outcome)
    }

    /// Removes one leaf. `false`: it changed meanwhile, look again.
    fn zap_leaf(&self, cell: &Cell<'_>, raw: u64, batch: &mut Batch<'_, F, P, X>) -> bool {
        batch.owe();
        if cell.replace(&self.format, raw, self.format.not_present(cell.level).absent).is_err() {
            return false;
        }
        batch.add(cell.start, cell.span, Leaves::Of(cell.level), None);
        if self.format.is_dirty(cell.level, raw) {
            batch.fact(cell);
        }
        true
    }

    /// Looks at every entry of `range` that decides about something, without waiting.
    pub(crate) fn look<'p>(&self, pin: &'p Pin, range: notifier_core::GpaRange, mut look: impl FnMut(&Cell<'p>, u64)) {
        let format = &self.format;
        let (mut at, end) = (range.start().as_u64(), range.end().as_u64());
        let mut node = self.root_node(pin);
        while at < end {
            if !node.holds(at) {
                node = self.root_node(pin);
            }
            let cell = node.cell(self.geometry().index(node.level, at));
            let raw = cell.load(format);
            if let Some(child) = self.linked(pin, &cell, raw) {
                node = child;
                continue;
            }
            look(&cell, raw);
            at = cell.end();
        }
    }
}
