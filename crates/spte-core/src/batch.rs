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
//! - A flush that fails leaves its batch counted, and the pages it unlinked in limbo: the next full flush that succeeds
//!   settles both. A batch that is leaked stays counted for good.
//! - Unlinked pages are handed to the epoch after the flush, never before.
//!
//! Model: `owed_flush_inherited`; its twin flushes only what it removed itself.

use alloc::vec::Vec;

use notifier_core::primitive::{AtomicUsize, Mutex, Ordering, Twin, broken};
use notifier_core::{AddrRange, Gpa, GpaRange, OutputAddr, ScopeWaitError};

use crate::{
    flush::{Flush, FlushError, FlushRange},
    format::{Format, Level},
    pages::{PageSource, TableLayout},
    table::Table,
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

/// A page that was unlinked and may still be in use.
type Unlinked = (OutputAddr, TableLayout);

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
}

impl<'t, F: Format, P: PageSource, X: Flush> Batch<'t, F, P, X> {
    pub(crate) fn new(table: &'t Table<F, P, X>) -> Self {
        Self { table, ranges: Vec::new(), all: false, owes: false, unlinked: Vec::new() }
    }

    /// Publishes that a flush is owed. Before the first store that takes something away.
    pub(crate) fn owe(&mut self) {
        if !self.owes {
            self.owes = true;
            // Released by the removing store that follows.
            self.table.owed.open.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// `span` bytes at `start` have to be flushed; `leaf` is the level of what was there, `links` whether a link went.
    pub(crate) fn add(&mut self, start: u64, span: u64, leaf: Option<Level>, links: bool) {
        self.owe();
        if self.all {
            return;
        }
        let Ok(range) = AddrRange::with_len(Gpa::new(start), span) else {
            // The last bytes of the address space are in no range.
            self.all = true;
            return;
        };
        if let Some(last) = self.ranges.last_mut()
            && last.range.end() == range.start()
            && (last.leaf, last.links) == (leaf, links)
            && let Ok(joined) = AddrRange::new(last.range.start(), range.end())
        {
            last.range = joined;
        } else if self.ranges.len() < MOST_RANGES {
            self.ranges.push(FlushRange { range, leaf, links });
        } else {
            self.all = true;
            self.ranges.clear();
        }
    }

    /// Makes room for one more unlinked page: nothing may be allocated once its entry is claimed.
    pub(crate) fn reserve(&mut self) {
        self.unlinked.reserve(1);
    }

    pub(crate) fn unlink(&mut self, page: OutputAddr, layout: TableLayout) {
        self.unlinked.push((page, layout));
    }

    /// Flushes what was collected, if anything was.
    pub(crate) fn finish(mut self, nonblocking: bool) -> Result<(), FlushFailed> {
        if !self.owes {
            return Ok(());
        }
        self.flush(nonblocking)
    }

    /// Flushes what was collected, and everything if anybody else owes a flush: on return nothing that was removed
    /// before the caller's walk ended is in any TLB.
    pub(crate) fn finish_inheriting(mut self, nonblocking: bool) -> Result<(), FlushFailed> {
        // Acquire: a count that has gone down again orders the flush that it stood for before our return.
        let owed = self.table.owed.open.load(Ordering::Acquire);
        let inherited = owed > usize::from(self.owes) && !broken(Twin::OwedForgotten);
        if inherited {
            self.all = true;
        } else if !self.owes {
            return Ok(());
        }
        self.flush(nonblocking)
    }

    /// Takes over what failed batches left, where this flush covers it.
    fn flush(&mut self, nonblocking: bool) -> Result<(), FlushFailed> {
        let owed = &self.table.owed;
        let inherited = if self.all { core::mem::take(&mut *owed.failed.lock()) } else { Failed::default() };
        let owes = core::mem::take(&mut self.owes);
        let mut unlinked = core::mem::take(&mut self.unlinked);
        let batches = inherited.batches + usize::from(owes);
        unlinked.extend(inherited.limbo);
        match self.table.flush_now(&self.ranges, self.all, nonblocking) {
            Ok(()) => {
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
        }
    }

    /// The guest ranges collected, for formats whose facts come late; `None` where that is the whole table.
    pub(crate) fn ranges(&self) -> Option<Vec<GpaRange>> {
        (!self.all).then(|| self.ranges.iter().map(|flush| flush.range).collect())
    }
}

impl<F: Format, P: PageSource, X: Flush> Drop for Batch<'_, F, P, X> {
    fn drop(&mut self) {
        if self.owes {
            // An operation that ended early. If this fails too, the flush stays owed.
            let _ = self.flush(false);
        }
    }
}
