// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets: leaves in a row that hardware may hold as one.
//!
//! A format may let leaves of one table be marked as a set (arm64's Contiguous bit): as many as
//! [`Format::set_shift`] says, beginning at a multiple of that, pointing to outputs in a row, with the same rights and
//! attributes. A TLB may then hold all of them in one entry, filled through any of them. From that follow the engine's
//! rules:
//!
//! - **A set changes together.** Changing one member while others stay marked would leave hardware with two minds about the
//!   span. So whatever changes a member, or takes one away, first *dissolves* its set: claims all members, takes all away,
//!   flushes the span once, and makes them again as leaves of their own; then it goes on as with any leaf. What covers a
//!   whole set and only takes away leaves out the making.
//! - **Facts are the set's.** Hardware may record an access to any page of a set in any member. So a set is young or dirty
//!   if one member is, dissolving gives every leaf the facts of all, ageing makes all members old, and what takes a
//!   dirty set away reports all of its span. (Which is also why a set is broken where hardware could change sizes in place:
//!   until the flush facts could come into members that were read already.)
//! - **Sets are made in private, or by [`Table::fold`]**: where a whole table is filled before it is linked, and on demand. Armed
//!   leaves are in no set: the log wants to know which page was written.
//!
//! # Concurrency
//! The members are claimed from low addresses to high, in one table, and nothing else is claimed or waited for
//! meanwhile. The first is the gate: whoever folds, dissolves, collapses or unlinks goes through it, so that nobody gets hold of
//! part of a set. It is the order that all claims keep (see the lock protocol of `table.rs`), so no two operations wait for each other, be they
//! dissolving, folding, collapsing or unlinking. An unlinking that was quicker leaves DEAD entries: then there is no set, and the
//! caller looks again. The claims are held across one flush, as break-before-make has to; a flush that fails leaves the
//! members absent, their facts reported, and itself owed.
//!
//! Folding and dissolving add nothing: before, between and after, each page has its translation or none. So they ask no admission. A
//! window that walks meanwhile waits for the claims and takes away what they publish; a window that walked before left
//! nothing that could be folded into more than it allows, because leaves are folded only with their like.
//!
//! Models: `dissolve_against_hardware`, whose twin gives each leaf only its own facts; `dissolve_from_both_ends`;
//! `dissolve_against_unlinking`, whose twin has no gate; `fold_against_window`, whose twin does not wait for claims.

use alloc::vec::Vec;

use notifier_core::primitive::{Backoff, Pin, Twin, broken};
use notifier_core::{AddrRange, Gpa, GpaRange};

use crate::{
    batch::{Batch, FlushFailed, NotFlushed},
    entry::{Cell, Claim, View, view},
    flush::{Flush, Leaves},
    format::{Format, Level},
    pages::PageSource,
    remove::Removed,
    table::{Node, Table, TableRangeError},
};

/// Why leaves were not folded into sets, or not all. Those that were stay folded.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FoldError {
    /// The range does not fit the table. Nothing was done.
    #[error(transparent)]
    Range(#[from] TableRangeError),
    /// A flush failed, and stays owed. `absent` had to be taken away first and is now untranslated.
    #[error("{source}; {absent} is untranslated now")]
    Flush {
        /// What failed.
        source: FlushFailed,
        /// What is untranslated now.
        absent: GpaRange,
    },
}

/// A set in its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Set<'p> {
    node: Node<'p>,
    /// Index of the first member.
    first: usize,
    members: usize,
    start: u64,
    span: u64,
}

impl<'p> Set<'p> {
    fn cells(self) -> impl Iterator<Item = Cell<'p>> {
        (self.first..self.first + self.members).map(move |index| self.node.cell(index))
    }

    fn level(&self) -> Level {
        self.node.level
    }
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// The place of the set around `cell`, marked or not. `None` where its level has none, or its table is gone.
    pub(crate) fn set_around<'p>(&self, pin: &'p Pin, cell: &Cell<'_>) -> Option<Set<'p>> {
        let shift = self.format.set_shift(cell.level);
        if shift == 0 {
            return None;
        }
        let mut node = self.root_node(pin);
        while node.level > cell.level {
            let above = node.cell_at(cell.start);
            node = self.linked(pin, &above, above.load(&self.format))?;
        }
        let members = 1 << shift;
        let first = self.geometry().index(cell.level, cell.start) & !(members - 1);
        let span = cell.span << shift;
        Some(Set { node, first, members, start: cell.start & !(span - 1), span })
    }

    /// Whether the leaf `raw` is a member of a set.
    pub(crate) fn is_member(&self, level: Level, raw: u64) -> bool {
        self.format.in_set(level, raw) && self.format.set_shift(level) != 0
    }

    /// Claims the members of `set`, in order, and takes them away from hardware. `claims` has room for all, and stays empty
    /// where there is no such set any more.
    fn break_set<'p>(&self, set: Set<'p>, claims: &mut Vec<Claim<'p>>) {
        let format = &self.format;
        for cell in set.cells() {
            let mut backoff = Backoff::new();
            loop {
                let raw = cell.load(format);
                match view(format, cell.level, raw) {
                    View::Claimed => backoff.snooze(),
                    View::Leaf if format.in_set(cell.level, raw) => {
                        if let Some(claim) = cell.claim(format, raw) {
                            claims.push(claim);
                            break;
                        }
                    }
                    // The first member is the gate: whoever folds, dissolves, collapses or unlinks goes through it. Behind
                    // it nobody else changes what is marked; where it is closed, what is still marked is another's.
                    _ if claims.is_empty() && !broken(Twin::SetWithoutGate) => return,
                    _ => break,
                }
            }
        }
        for claim in claims {
            claim.take_away(format);
        }
    }

    /// A leaf with the facts of all `claims`, as they are now.
    fn facts_of(&self, level: Level, claims: &mut [Claim<'_>]) -> Option<u64> {
        let format = &self.format;
        let olds = claims.iter_mut().map(|claim| claim.take_away(format));
        olds.reduce(|all, old| format.merge_facts(level, all, level, old))
    }

    /// Dissolves the set around `cell`, if there still is one: afterwards its leaves are leaves of their own, with the
    /// facts of all. The caller looks again.
    ///
    /// # Errors
    /// The flush failed: the leaves are absent, and their facts reported.
    pub(crate) fn dissolve(&self, cell: &Cell<'_>, nonblocking: bool) -> Result<(), NotFlushed> {
        let format = &self.format;
        let pin = self.space.pin();
        let Some(set) = self.set_around(&pin, cell) else {
            // Its table is being unlinked.
            Backoff::new().snooze();
            return Ok(());
        };
        let mut claims = Vec::with_capacity(set.members);
        let mut batch = Batch::new(self);
        batch.owe();
        self.break_set(set, &mut claims);
        if claims.is_empty() {
            // Somebody else is at it, or was.
            Backoff::new().snooze();
            return batch.finish(nonblocking).map_err(NotFlushed::from);
        }
        batch.add(set.start, set.span, Leaves::Of(set.level()), None);
        let absent = AddrRange::with_len(Gpa::new(set.start), set.span).ok();
        let flushed = batch.finish(nonblocking).map_err(|source| NotFlushed { source, absent });
        // After the flush, for facts that came until then.
        let Some(facts) = self.facts_of(set.level(), &mut claims) else { return flushed };
        for mut claim in claims {
            let leaf = format.unmarked(set.level(), claim.old);
            if flushed.is_err() {
                claim.publish(format, format.not_present(set.level()).absent);
            } else if broken(Twin::DissolveForgetsFacts) {
                claim.publish(format, leaf);
            } else {
                // What is published is given facts from what was claimed.
                claim.old = format.merge_facts(set.level(), claim.old, set.level(), facts);
                claim.publish(format, leaf);
            }
        }
        if flushed.is_err() && format.is_dirty(set.level(), facts) {
            if let Ok(span) = AddrRange::with_len(Gpa::new(set.start), set.span) {
                self.space.report_dirty(span);
            }
        }
        flushed
    }

    /// Takes the whole set around `cell` away, if there still is one; what has to be flushed goes into `batch`.
    pub(crate) fn remove_set(&self, cell: &Cell<'_>, batch: &mut Batch<'_, F, P, X>) -> Removed {
        let format = &self.format;
        let pin = self.space.pin();
        let mut removed = Removed::default();
        let Some(set) = self.set_around(&pin, cell) else {
            Backoff::new().snooze();
            return removed;
        };
        let mut claims = Vec::with_capacity(set.members);
        batch.owe();
        self.break_set(set, &mut claims);
        let Some(facts) = self.facts_of(set.level(), &mut claims) else {
            Backoff::new().snooze();
            return removed;
        };
        removed.leaves = claims.len() as u64;
        for claim in claims {
            claim.publish(format, format.not_present(set.level()).absent);
        }
        batch.add(set.start, set.span, Leaves::Of(set.level()), None);
        if format.is_young(set.level(), facts) {
            removed.young = removed.leaves;
        }
        if format.is_dirty(set.level(), facts) {
            removed.dirty = removed.leaves;
            set.cells().for_each(|cell| batch.fact(&cell));
        }
        removed
    }

    /// Whether a member of the set around `cell`, which is a member, is dirty. `None`: somebody is changing the set, look
    /// again.
    pub(crate) fn set_is_dirty(&self, cell: &Cell<'_>) -> Option<bool> {
        let format = &self.format;
        let pin = self.space.pin();
        let mut dirty = false;
        for member in self.set_around(&pin, cell)?.cells() {
            let raw = member.load(format);
            if view(format, member.level, raw) != View::Leaf || !format.in_set(member.level, raw) {
                return None;
            }
            dirty |= format.is_dirty(member.level, raw);
        }
        Some(dirty)
    }

    /// Calls `change` for the other members of the set around `cell`, which is a member. Waits for nothing.
    pub(crate) fn for_others(&self, cell: &Cell<'_>, mut change: impl FnMut(&Cell<'_>, u64)) {
        let pin = self.space.pin();
        let Some(set) = self.set_around(&pin, cell) else { return };
        for other in set.cells().filter(|other| other.start != cell.start) {
            let raw = other.load(&self.format);
            if self.format.kind(other.level, raw) == crate::format::Kind::Leaf && self.format.in_set(other.level, raw) {
                change(&other, raw);
            }
        }
    }

    /// Makes the rest of the set young, if the leaf `raw` in `cell`, which was made young, is a member: what is old is in
    /// no TLB, but what is young may be there for all.
    pub(crate) fn rejuvenate_others(&self, cell: &Cell<'_>, raw: u64) {
        if !self.is_member(cell.level, raw) {
            return;
        }
        let format = &self.format;
        self.for_others(cell, |other, mut raw| {
            while view(format, other.level, raw) == View::Leaf {
                let new = format.make_young(other.level, raw);
                match if new == raw { Ok(()) } else { other.replace(format, raw, new) } {
                    Ok(()) => return,
                    Err(found) => raw = found,
                }
            }
        });
    }

    /// Folds leaves of `range` into sets, as far as alignment, outputs in a row and equal rights and attributes allow; how many
    /// sets were made. Armed leaves are left alone. In formats without sets nothing happens.
    ///
    /// Each set is broken, flushed and made: a guest may see a transient fault there. Worth it for memory that will be read
    /// for long; what changes a page later dissolves its set again, with a flush for each set. Facts become the set's: not
    /// for slots whose writes are logged through dirty bits, where one write would be reported as a set of pages.
    ///
    /// # Errors
    /// See [`FoldError`].
    pub fn fold(&self, range: GpaRange) -> Result<usize, FoldError> {
        self.check_range(range)?;
        let format = &self.format;
        let pin = self.space.pin();
        let mut cursor = self.cursor(&pin, range);
        let mut count = 0;
        while let Some((cell, raw)) = cursor.next(|_| false) {
            let shift = format.set_shift(cell.level);
            let begins = shift != 0 && cell.start & ((cell.span << shift) - 1) == 0 && cursor.at == cell.start;
            if view(format, cell.level, raw) == View::Leaf
                && begins
                && cursor.end - cell.start >= cell.span << shift
                && self.fold_set(&pin, &cell, raw)?
            {
                count += 1;
                cursor.at = cell.start.saturating_add(cell.span << shift);
                continue;
            }
            cursor.pass(&cell);
        }
        Ok(count)
    }

    /// Whether `raw` is a leaf of its own that can become the `index`-th member of a set whose first leaf is `first`.
    fn folds(&self, level: Level, first: u64, index: usize, raw: u64) -> bool {
        let format = &self.format;
        if view(format, level, raw) != View::Leaf || format.in_set(level, raw) || format.spec(level, raw).armed {
            return false;
        }
        let member = format.set_member(level, first, index);
        member.is_some_and(|member| (format.unmarked(level, member) ^ raw) & !format.hardware_bits(level, raw) == 0)
    }

    /// Folds the leaves from `cell`, whose value is `raw`, to the end of its set, if they are alike. Whether it did.
    fn fold_set(&self, pin: &Pin, cell: &Cell<'_>, raw: u64) -> Result<bool, FoldError> {
        let format = &self.format;
        let level = cell.level;
        let Some(set) = self.set_around(pin, cell) else { return Ok(false) };
        // A look without claims first: mostly there is nothing to fold.
        if !set.cells().enumerate().all(|(index, other)| self.folds(level, raw, index, other.load(format))) {
            return Ok(false);
        }
        let Ok(span) = AddrRange::with_len(Gpa::new(set.start), set.span) else { return Ok(false) };
        let mut claims: Vec<Claim<'_>> = Vec::with_capacity(set.members);
        let mut batch = Batch::new(self);
        batch.owe();
        for (index, other) in set.cells().enumerate() {
            let mut backoff = Backoff::new();
            let claimed = loop {
                let old = other.load(format);
                if view(format, level, old) == View::Claimed {
                    backoff.snooze();
                    continue;
                }
                let first = claims.first().map_or(old, |claim| claim.old);
                if !self.folds(level, first, index, old) {
                    break None;
                }
                if let Some(claim) = other.claim(format, old) {
                    break Some(claim);
                }
            };
            match claimed {
                Some(claim) => claims.push(claim),
                None => break,
            }
        }
        if claims.len() < set.members {
            claims.into_iter().for_each(|claim| claim.give_back(format));
            return Ok(false);
        }
        for claim in &mut claims {
            claim.take_away(format);
        }
        batch.add(set.start, set.span, Leaves::Of(level), None);
        let flushed = batch.finish(false);
        let first = claims[0].old;
        let Some(facts) = self.facts_of(level, &mut claims) else { return Ok(false) };
        for (index, mut claim) in claims.into_iter().enumerate() {
            match format.set_member(level, first, index) {
                Some(member) if flushed.is_ok() => {
                    claim.old = format.merge_facts(level, claim.old, level, facts);
                    claim.publish(format, member)
                }
                _ => claim.publish(format, format.not_present(level).absent),
            };
        }
        if let Err(source) = flushed {
            if format.is_dirty(level, facts) {
                self.space.report_dirty(span);
            }
            return Err(FoldError::Flush { source, absent: span });
        }
        Ok(true)
    }
}
