// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What can go wrong in a run.

use std::{io, path::PathBuf};

use notifier_core::{ChangeError, CloseError, FaultError, Gpa, Hva, LeaseError, OpenError, RangeError, SettleError};
use notifier_linux::{BuildError, FenceError, RamError};

use super::{backend::NoBackend, images::ImageError, table::TableFault};
use crate::{
    ksm::{RunError, SmapsError},
    machine::MachineError,
};

/// A run that could not be made, or did not come to its end.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The images cannot be had: bad input.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The plot cannot be written: bad input.
    #[error("cannot write the plot {}: {source}", path.display())]
    PlotPath {
        /// Where it was to go.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// Drawing the plot failed.
    #[error("drawing the plot {} failed: {cause}", path.display())]
    Plot {
        /// Where it was to go.
        path: PathBuf,
        /// What the drawing library said.
        cause: String,
    },
    /// A memory file cannot be made, measured or punched.
    #[error("{what}: {source}")]
    Memory {
        /// Which file, or what was to be done with it.
        what: &'static str,
        /// The host's error.
        source: io::Error,
    },
    /// A memory file cannot be mapped.
    #[error("mapping {what}: {source}")]
    Map {
        /// Which file.
        what: &'static str,
        /// vm-memory's error.
        source: vm_memory::mmap::FromRangesError,
    },
    /// An address outside a mapping was read or written.
    #[error(transparent)]
    Access(#[from] vm_memory::GuestMemoryError),
    /// The back end that was asked for cannot be had: bad input.
    #[error(transparent)]
    Backend(#[from] NoBackend),
    /// A guest on KVM went wrong.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// A guest on KVM has fewer vCPUs than were asked for.
    #[error("a guest has fewer than two vCPUs")]
    NoVcpu,
    /// RAM cannot be made.
    #[error(transparent)]
    Build(#[from] BuildError),
    /// RAM cannot be changed.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// Writers cannot be made to wait, or let go on.
    #[error(transparent)]
    Fence(#[from] FenceError),
    /// The kernel's own merging could not be run.
    #[error(transparent)]
    Ksm(#[from] RunError),
    /// A guest that stood still reads what it must not.
    #[error("the guest reads wrong contents at {gpa}")]
    Damaged {
        /// The page.
        gpa: Gpa,
    },
    /// The memory of a mapping cannot be measured.
    #[error(transparent)]
    Smaps(#[from] SmapsError),
    /// A range cannot exist.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The space refused the guest's slot.
    #[error(transparent)]
    Slot(#[from] notifier_core::SlotError),
    /// A fault did not begin, for another reason than an open window.
    #[error(transparent)]
    Fault(FaultError),
    /// The table refused what a fault resolved, or could not be made.
    #[error(transparent)]
    Table(#[from] TableFault),
    /// A window did not open, for another reason than a lease.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A lease was not given, for another reason than an open window.
    #[error(transparent)]
    Lease(LeaseError),
    /// Repointing failed.
    #[error(transparent)]
    Change(#[from] ChangeError<Hva>),
    /// A page's outcome was not taken.
    #[error(transparent)]
    Settle(#[from] SettleError<Hva>),
    /// A window did not close.
    #[error(transparent)]
    Close(#[from] CloseError),
    /// The extents that the mapping gave a fault did not fit it.
    #[error("the mapping's answer does not fit the fault at {gpa}")]
    Extent {
        /// The page that faulted.
        gpa: Gpa,
    },
    /// The table led elsewhere than the mapping, though every page was moved inside a window.
    #[error("the table and the mapping disagree about {gpa}")]
    Conflict {
        /// The page.
        gpa: Gpa,
    },
    /// At the end a table had an entry that its format forbids.
    #[error("the entry for {gpa} breaks a rule of its format")]
    Entry {
        /// First address that the entry translates.
        gpa: Gpa,
    },
    /// The store has no frame left.
    #[error("the store is full")]
    StoreFull,
    /// The host would not let writers in one by one, so that all of them were.
    #[error("the fence over a guest's RAM was given up: the host would not lift it, or nobody was left to")]
    FenceGone,
    /// It was interrupted before guests ran.
    #[error("interrupted before the guests ran")]
    Interrupted,
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(io::Error),
    /// A thread panicked.
    #[error("a thread panicked: a bug of this program or of what it shows")]
    Panicked,
}

impl Error {
    /// The process's exit code: 2 where the input was bad, 1 where the run failed.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Image(_) | Self::PlotPath { .. } | Self::Backend(_) => 2,
            _ => 1,
        }
    }
}
