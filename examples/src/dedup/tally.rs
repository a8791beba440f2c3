// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the job itself counts; the spaces count the rest.

use std::sync::atomic::{AtomicU64, Ordering};

/// A count that many threads add to.
#[derive(Debug, Default)]
pub(crate) struct Count(AtomicU64);

impl Count {
    pub(crate) fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    pub(crate) fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// The counts of one run.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    /// Pages whose contents were hashed.
    pub(crate) scanned: Count,
    /// Pages merged into a frame of the store.
    pub(crate) merged: Count,
    /// Pages un-merged by a write.
    pub(crate) unmerged: Count,
    /// Pages left unmerged because nobody translated them at that moment.
    pub(crate) absent: Count,
    /// Pages whose contents were no longer the candidate's when they were compared.
    pub(crate) differed: Count,
    /// Pages zapped for a merge (`--mode zap`).
    pub(crate) zapped: Count,
    /// Read faults on pages that were merged and not yet un-merged.
    pub(crate) refaults: Count,
    /// Calls of the host that failed, and were made up for.
    pub(crate) host_failures: Count,
    /// Batches, or parts of them, left for a later pass because the process has as many mappings as it may have.
    pub(crate) no_mapping: Count,
    /// Frames that are never filled again, because the host may still show them.
    pub(crate) stuck: Count,
    /// Passes over all guests.
    pub(crate) passes: Count,
    /// Whole pages that were read and compared with the ledger.
    pub(crate) checks: Count,
    /// Changes of a page by a vCPU or a device, putting back included.
    pub(crate) writes: Count,
    /// Leases that devices took.
    pub(crate) leases: Count,
    /// Writes that were made and are not there any more.
    pub(crate) lost_writes: Count,
    /// Reads that saw what the page did not hold.
    pub(crate) stale_reads: Count,
}
