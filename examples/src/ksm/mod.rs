// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's own merging of identical pages (KSM), as something to measure beside ours: mark memory, let `ksmd` run,
//! read what it merged and what that cost, and leave the host's settings as they were found.
//!
//! | module | what for |
//! |---|---|
//! | [`settings`] | change KSM's settings, and put them back even after a `kill -9` |
//! | [`daemon`] | `ksmd`'s processor time, the counters of the system and of this process |
//! | [`smaps`] | what the mappings inside given ranges hold, from `/proc/self/smaps` |
//! | [`frames`] | how many different frames given ranges have, from `/proc/self/pagemap` |
//! | [`mergeable`] | mark memory for KSM, and learn whether the kernel took it |
//! | [`run`] | all of it together: one measured run |
//!
//! KSM belongs to the whole host: while a run lasts, `ksmd` also scans what other processes have marked, and its
//! processor time includes that. Facts about KSM are from Linux's Documentation/admin-guide/mm/ksm.rst and `mm/ksm.c`.

use std::path::{Path, PathBuf};

pub mod daemon;
pub mod frames;
pub mod mergeable;
pub mod run;
pub mod settings;
pub mod smaps;

pub use daemon::{Counters, Daemon, DaemonError, ProcessStat};
pub use frames::{Frames, FramesError};
pub use mergeable::{MergeableError, host_ranges, mark, unmark};
pub use run::{Ended, KsmRun, Plan, RunError, Sample, merge_with_ksm};
pub use settings::{PutBack, Refused, Restored, Saved, Setting, SettingsError, restore_left_over};
pub use smaps::{SmapsError, Sums};

/// Where the kernel's files are, and where the record of changed settings goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The directory of KSM's settings and counters.
    pub sysfs: PathBuf,
    /// The directory of processes.
    pub proc: PathBuf,
    /// The record of settings found. Its directory is made if need be; a lock file lies beside it.
    pub record: PathBuf,
}

impl Paths {
    /// Those of the running system.
    pub fn system() -> Self {
        Self::below(Path::new("/"))
    }

    /// The same files below another root than `/`: an imitation.
    pub fn below(root: &Path) -> Self {
        Self {
            sysfs: root.join("sys/kernel/mm/ksm"),
            proc: root.join("proc"),
            record: root.join("run/secondary-mmu/ksm.json"),
        }
    }
}
