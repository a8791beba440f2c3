// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a space counts.

use crate::primitive::{AtomicU64, Ordering};

/// What happened in a space since it was made. Counts of different kinds are read one after the other, not at one
/// instant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Counters {
    /// Windows that were opened.
    pub windows: u64,
    /// Faults that were begun.
    pub faults: u64,
    /// Faults that lost to a window (or to a change of slots) and have to begin again.
    pub retries: u64,
    /// Those among [`Counters::retries`] for which no window was found that overlaps the fault. Always 0: anything
    /// else is a bug of this crate.
    pub unrelated_retries: u64,
    /// Pages that `change_pte` repointed.
    pub changes: u64,
    /// Pages that `change_pte` found untranslated.
    pub absents: u64,
    /// Pages that were zapped instead of repointed, or because their window closed without an outcome for them.
    pub zaps: u64,
    /// Windows refused because a subscriber or a lease holds their range.
    pub vetoes: u64,
    /// Windows that could not be finished when their guard went away and were left to the reaper.
    pub unfinished: u64,
}

/// The counts that windows write. Faults count in their walkers' own lines.
#[derive(Debug, Default)]
pub(crate) struct WindowCounters {
    pub(crate) windows: AtomicU64,
    pub(crate) changes: AtomicU64,
    pub(crate) absents: AtomicU64,
    pub(crate) zaps: AtomicU64,
    pub(crate) vetoes: AtomicU64,
    pub(crate) unfinished: AtomicU64,
}

pub(crate) fn add(counter: &AtomicU64, n: u64) {
    counter.fetch_add(n, Ordering::Relaxed);
}
