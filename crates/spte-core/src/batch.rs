// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Owed flushes.
//!
//! Between an entry's removal and its flush, TLBs still use it. A batch collects what has to be flushed, and the table
//! counts the batches that owe something. The rules:
//!
//! - A batch is counted *before* its first store that takes rights away ([`Batch::owe`]), and not counted any more only
//!   after its flush. The store releases, and whoever sees it acquires: who sees a removal sees that it is owed, or sees
//!   (by the release of the counting down) that its flush is complete.
//! - Who must know that *nothing* reaches a range (opening a window, `change_pte`) looks at the count after its own walk,
//!   and if anybody owes anything flushes everything itself ([`Batch::finish_inheriting`]), even if it removed nothing. A
//!   flush that begins after the walk covers every removal that the walk saw.
//! - Who says that nothing more than some rights is left in a range (`unmap`, `restrict`, `arm`) looks at the count after its walk
//!   too, and if anybody else owes anything flushes its own range, whether it took anything away there or not
//!   ([`Batch::finish_over`]). What others owe elsewhere stays theirs.
//! - A flush that fails leaves its batch counted, and the pages it unlinked in limbo: the next full flush that succeeds
//!   settles both. A batch that is leaked stays counted for good.
//! - In a format that [must flush before it refills](Format::flushes_before_refill), whoever fills an absent entry, or
//!   splits a special one into a table, looks at the count while it holds the entry's claim ([`Table::settle_refill`]), and
//!   if anybody owes anything flushes the entry's span itself. What stood there before was taken away by a store that the
//!   claim has read, directly or through the claims and removals between: so the removal's counting is seen, or its
//!   counting down, which orders its flush before the look. A flush that failed, or is still to come, holds nobody up for
//!   longer than one flush of one entry, and nobody waits for another's batch; scopes are not waited for, because software
//!   walkers mix nothing.
//! - Unlinked pages are handed to the epoch after the flush, never before; dirty facts go to the sink after it, so that what
//!   the sink copies is what was written.
//!
//! Models: `owed_flush_inherited`, whose twin flushes only what it removed itself; `refill_after_flush`, whose twin fills
//! without a look at the count.

use alloc::vec::Vec;
use core::fmt;

use notifier_core::primitive::{AtomicUsize, Mutex, Ordering, Twin, broken};
use notifier_core::{AddrRange, Gpa, GpaRange, OutputAddr, ScopeWaitError};

use crate::{
    entry::Cell,
    flush::{Flush, FlushError, FlushRange, Leaves},
    format::{Format, Level},
    pages::PageSource,
    table::{Node, Table},
};

/// A flush that did not happen. What was removed stays removed, and the flush stays owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FlushFailed {
    /// The hardware's side.
    #[error(transparent)]
    Hardware(#[from] FlushError),
    /// The software walkers' side.
    #[error(transparent)]
    Scopes(#[from] ScopeWaitError),
}

/// A flush that failed, perhaps while a leaf was taken away to make something else of it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct NotFlushed {
    pub(crate) source: FlushFailed,
    /// What is untranslated since.
    pub(crate) absent: Option<GpaRange>,
}

impl From<FlushFailed> for NotFlushed {
    fn from(source: FlushFailed) -> Self {
        Self { source, absent: None }
    }
}

/// Says what is untranslated, in a message.
pub(crate) struct Absent<'a>(pub(crate) &'a Option<GpaRange>);

impl fmt::Display for Absent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.map_or(Ok(()), |range| write!(f, "; {range} is untranslated now"))
    }
}

/// A table that was unlinked and may still be in use.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Unlinked {
    pub(crate) page: OutputAddr,
    pub(crate) level: Level,
    /// First guest address it spanned.
    pub(crate) start: u64,
}

/// What a table knows of flushes that are owed.
#[derive(Debug, Default)]
pub(crate) struct Owed {
    /// Batches that owe a flush, those whose flush failed included.
    open: AtomicUsize,
    failed: Mutex<Failed>,
}

#[derive(Debug, Default)]
struct Failed {
    /// Batches among [`Owed::open`] that nobody has any more.
    batches: usize,
    /// Pages that they unlinked.
    limbo: Vec<Unlinked>,
}

impl Owed {
    /// Pages that wait for a flush; for the table's end, when nobody walks any more.
    pub(crate) fn take_limbo(&mut self) -> Vec<Unlinked> {
        core::mem::take(&mut self.failed.lock().limbo)
    }
}

/// Where leaves were in a table, from its start to its end: a few runs, or nobody knows. Kept while its link is claimed, when
/// nothing may be allocated.
#[derive(Debug, Default)]
pub(crate) struct Runs {
    runs: [(u64, u64); MOST_RUNS],
    len: usize,
    many: bool,
}

/// Runs that are told apart; a table with more counts as full.
const MOST_RUNS: usize = 4;

impl Runs {
    /// A leaf, behind all that were added before.
    pub(crate) fn add(&mut self, start: u64, end: u64) {
        match self.runs[..self.len].last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ if self.len < MOST_RUNS => {
                self.runs[self.len] = (start, end);
                self.len += 1;
            }
            _ => self.many = true,
        }
    }

    fn runs(&self) -> Option<&[(u64, u64)]> {
        if self.many { None } else { Some(&self.runs[..self.len]) }
    }
}

/// Ranges a batch remembers one by one; with more it flushes everything.
const MOST_RANGES: usize = 32;

/// Collects what has to be flushed.
#[derive(Debug)]
#[must_use = "a batch owes a flush until it is finished"]
pub(crate) struct Batch<'t, F: Format, P: PageSource, X: Flush> {
    table: &'t Table<F, P, X>,
    ranges: Vec<FlushRange>,
    all: bool,
    owes: bool,
    unlinked: Vec<Unlinked>,
    /// Written ranges whose facts were taken from the table: reported after the flush, when no write can follow.
    facts: Vec<GpaRange>,
    /// Facts that hardware writes late are read again after the flush.
    late_facts: bool,
}

impl<'t, F: Format, P: PageSource, X: Flush> Batch<'t, F, P, X> {
    pub(crate) fn new(table: &'t Table<F, P, X>) -> Self {
        let late_facts = table.format.late_facts();
        Self { table, ranges: Vec::new(), all: false, owes: false, unlinked: Vec::new(), facts: Vec::new(), late_facts }
    }

    /// Publishes that a flush is owed. Before the first store that takes something away.
    pub(crate) fn owe(&mut self) {
        if !self.owes {
            self.owes = true;
            // For what is added under a claim: nothing may be allocated there.
            self.ranges.reserve(1);
            // Released by the removing store that follows.
            self.table.owed.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// `span` bytes at `start` have to be flushed; `leaf` is the level of what was there, `links` whether a link went.
    pub(crate) fn add(&mut self, start: u64, span: u64, leaves: Leaves, links: Option<Level>) {
        self.owe();
        if self.all {
            return;
        }
        let Ok(range) = AddrRange::with_len(Gpa::new(start), span) else {
            // The last bytes of the address space are in no range.
            self.all = true;
            return;
        };
        let last = self.ranges.last_mut().filter(|last| (last.leaves, last.links) == (leaves, links));
        if let Some((last, joined)) = last.and_then(|last| last.range.joined(&range).map(|joined| (last, joined))) {
            last.range = joined;
        } else if self.ranges.len() < MOST_RANGES {
            self.ranges.push(FlushRange { range, leaves, links });
        } else {
            self.all = true;
            self.ranges.clear();
        }
    }

    /// The link in `cell` was removed, to a table of level `below` that had leaves in these runs alone. A table that was full
    /// is one range, so that neighbours join.
    pub(crate) fn add_table(&mut self, cell: &Cell<'_>, below: Level, leaves: &Runs) {
        match leaves.runs() {
            Some(runs) if runs != [(cell.start, cell.end())] => {
                for (start, end) in runs {
                    self.add(*start, end - start, Leaves::Of(below), None);
                }
                self.add(cell.start, cell.span, Leaves::None, Some(cell.level));
            }
            _ => self.add(cell.start, cell.span, Leaves::Of(below), Some(cell.level)),
        }
    }

    /// The dirty fact of what `cell` translated was taken from the table.
    pub(crate) fn fact(&mut self, cell: &Cell<'_>) {
        let Ok(range) = AddrRange::with_len(Gpa::new(cell.start), cell.span) else { return };
        match self.facts.last_mut().and_then(|last| last.joined(&range).map(|joined| (last, joined))) {
            Some((last, joined)) => *last = joined,
            None => self.facts.push(range),
        }
    }

    fn report(&mut self) {
        for range in core::mem::take(&mut self.facts) {
            self.table.space.report_dirty(range);
        }
    }

    /// Makes room for one more unlinked page: nothing may be allocated once its entry is claimed.
    pub(crate) fn reserve(&mut self) {
        self.unlinked.reserve(1);
    }

    pub(crate) fn unlink(&mut self, page: OutputAddr, node: &Node<'_>) {
        self.unlinked.push(Unlinked { page, level: node.level, start: node.start() });
    }

    /// Leaves facts that hardware writes late to the caller, who holds a claim and may not report.
    pub(crate) fn leave_late_facts(&mut self) {
        self.late_facts = false;
    }

    /// Flushes what was collected, if anything was.
    pub(crate) fn finish(mut self, nonblocking: bool) -> Result<(), FlushFailed> {
        if self.settle_nothing() {
            return Ok(());
        }
        self.flush(nonblocking)
    }

    /// Whether nothing was taken away after all: then nothing is owed, and nobody is to be bothered.
    fn settle_nothing(&mut self) -> bool {
        if self.all || !self.ranges.is_empty() || !self.unlinked.is_empty() {
            return false;
        }
        if core::mem::take(&mut self.owes) {
            self.table.owed.open.fetch_sub(1, Ordering::Release);
        }
        self.report();
        true
    }

    /// Flushes what was collected, and everything if anybody else owes a flush: on return nothing that was removed
    /// before the caller's walk ended is in any TLB.
    pub(crate) fn finish_inheriting(mut self, nonblocking: bool) -> Result<(), FlushFailed> {
        // Acquire: a count that has gone down again orders the flush that it stood for before our return.
        let owed = self.table.owed.open.load(Ordering::Acquire);
        let inherited = owed > usize::from(self.owes) && !broken(Twin::OwedForgotten);
        if inherited {
            self.all = true;
        } else if self.settle_nothing() {
            return Ok(());
        }
        self.flush(nonblocking)
    }

    /// Flushes what was collected, and all of `range` if anybody else owes a flush: on return nothing that was removed there
    /// before the caller's walk ended is in any TLB.
    pub(crate) fn finish_over(mut self, range: GpaRange) -> Result<(), FlushFailed> {
        // Acquire: as in `finish_inheriting`.
        let owed = self.table.owed.open.load(Ordering::Acquire);
        if owed > usize::from(self.owes) && !broken(Twin::OwedForgotten) {
            let links = Level::LEAF.above().filter(|level| *level <= self.table.geometry().top());
            if self.settle_nothing() {
                // Nothing of ours: nobody is to inherit this.
                return self.table.flush_now(&[FlushRange { range, leaves: Leaves::Any, links }], false, false);
            }
            self.ranges.retain(|flush| !range.covers(&flush.range));
            self.add(range.start().as_u64(), range.len(), Leaves::Any, links);
        } else if self.settle_nothing() {
            return Ok(());
        }
        self.flush(false)
    }

    /// Takes over what failed batches left, where this flush covers it.
    fn flush(&mut self, nonblocking: bool) -> Result<(), FlushFailed> {
        let owed = &self.table.owed;
        let inherited = if self.all { core::mem::take(&mut *owed.failed.lock()) } else { Failed::default() };
        let owes = core::mem::take(&mut self.owes);
        let mut unlinked = core::mem::take(&mut self.unlinked);
        let batches = inherited.batches + usize::from(owes);
        unlinked.extend(inherited.limbo);
        let flushed = self.table.flush_now(&self.ranges, self.all, nonblocking);
        let result = match flushed {
            Ok(()) => {
                if self.late_facts {
                    self.collect_late(&unlinked);
                }
                self.table.retire(unlinked);
                if batches != 0 {
                    owed.open.fetch_sub(batches, Ordering::Release);
                }
                Ok(())
            }
            Err(error) => {
                let mut failed = owed.failed.lock();
                failed.batches += batches;
                failed.limbo.extend(unlinked);
                Err(error)
            }
        };
        // What is flushed, or left to others, is not this batch's any more.
        self.ranges.clear();
        self.all = false;
        // After the flush: a sink that copies the page now copies what was written. Facts are not kept back where it
        // failed; the leaf that held them is gone.
        self.report();
        result
    }

    /// Reads again what hardware may have written until the flush: entries in use, and those of unlinked tables.
    fn collect_late(&self, unlinked: &[Unlinked]) {
        let table = self.table;
        for gone in unlinked {
            // SAFETY: unlinked, and not handed to the epoch yet.
            let node = unsafe { table.node(gone.page, gone.level, gone.start) };
            table.collect_late_of(node);
        }
        if self.all {
            table.whole().into_iter().for_each(|range| table.collect_late(range));
        } else {
            self.ranges.iter().for_each(|flush| table.collect_late(flush.range));
        }
    }
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// For the holder of the claim of `cell`, which is not present: sees to it that nothing of what stood there before is
    /// in a TLB, where the format asks for that.
    pub(crate) fn settle_refill(&self, cell: &Cell<'_>) -> Result<(), FlushFailed> {
        if !self.format.flushes_before_refill() || broken(Twin::RefillUnflushed) {
            return Ok(());
        }
        // Acquire: a count that has gone down orders the flush that it stood for before our publishing.
        if self.owed.open.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        // What stood there may have been a leaf, a link, or both, one after the other.
        match AddrRange::with_len(Gpa::new(cell.start), cell.span) {
            Ok(range) => {
                self.flush_hardware(&[FlushRange { range, leaves: Leaves::Any, links: Some(cell.level) }], false, false)
            }
            // The last bytes of the address space are in no range.
            Err(_) => self.flush_hardware(&[], true, false),
        }
    }
}

impl<F: Format, P: PageSource, X: Flush> Drop for Batch<'_, F, P, X> {
    fn drop(&mut self) {
        if !self.settle_nothing() {
            // An operation that ended early. If this fails too, the flush stays owed.
            let _ = self.flush(false);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbouring_leaves_are_one_run_and_many_runs_are_none() {
        let mut runs = Runs::default();
        assert_eq!(runs.runs(), Some(&[][..]));
        for leaf in [0, 1, 2, 5, 6, 9, 11] {
            runs.add(leaf, leaf + 1);
        }
        assert_eq!(runs.runs(), Some(&[(0, 3), (5, 7), (9, 10), (11, 12)][..]));
        runs.add(12, 13);
        assert_eq!(runs.runs().map(<[_]>::len), Some(MOST_RUNS));
        runs.add(20, 21);
        assert_eq!(runs.runs(), None);
    }
}
