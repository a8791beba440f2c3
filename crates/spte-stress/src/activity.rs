// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What is done, and how often it was. A run is worth something only if all of it happened.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

macro_rules! activities {
    ($($name:ident)*) => {
        /// Something that a run does, or that happens to it.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub(crate) enum Activity { $($name),* }

        const NAMES: &[&str] = &[$(stringify!($name)),*];
        const ALL: &[Activity] = &[$(Activity::$name),*];
    };
}

activities! {
    Read Write FaultPage FaultPages FaultRegion Mapped LeafOf2M Retry Upgrade MadeYoung CopyOnWrite DeviceRead DeviceWrite
    DeviceMap
    Retained RetainedByGpa Changed ChangedAbsent ChangedZapped Unexpected Merged Kept ZappedInside WithoutOutcome Busy
    Zapped ZappedByGpa ZappedByGpaOnly Nonblocking WouldBlock OwnedDropped Ballooned Populated Compacted
    LeaseTaken LeaseRefused LeaseVetoed LeaseCancelled LeaseWaited
    Aged AgedSpace TestedAge Split Collapsed Trimmed Restricted Protected Armed Unmapped
    Harvested FactReported Copied
    SlotAdded SlotRemoved SlotReplaced SlotRefused TableJoined TableLeft DeviceJoined DeviceLeft Rest
}

impl Activity {
    pub(crate) fn name(index: usize) -> &'static str {
        NAMES.get(index).copied().unwrap_or("?")
    }
}

/// Counts.
#[derive(Debug, Clone)]
pub(crate) struct Activities(Arc<Vec<AtomicU64>>);

impl Default for Activities {
    fn default() -> Self {
        Self(Arc::new(NAMES.iter().map(|_| AtomicU64::new(0)).collect()))
    }
}

impl Activities {
    pub(crate) fn did(&self, what: Activity) {
        self.add(what, 1);
    }

    pub(crate) fn add(&self, what: Activity, times: u64) {
        self.0[what as usize].fetch_add(times, Relaxed);
    }

    pub(crate) fn missing(&self) -> impl Iterator<Item = Activity> + '_ {
        ALL.iter().copied().filter(|&what| self.0[what as usize].load(Relaxed) == 0)
    }
}

impl fmt::Display for Activities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, count) in NAMES.iter().zip(&*self.0) {
            write!(f, "{name} {}, ", count.load(Relaxed))?;
        }
        Ok(())
    }
}
