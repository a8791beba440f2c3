// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory on Linux whose backing changes only inside invalidation windows.
#![cfg(target_os = "linux")]

mod batch;
mod budget;
mod dirty;
mod features;
mod fence;
mod kernel;
mod layout;
mod pagemap;
mod ram;
mod tripwire;
mod uffd;

pub use batch::{Batch, OperationError, RamError, UndoError};
pub use budget::{BudgetError, VmaBudget};
pub use dirty::{DirtyError, DirtyFilter};
pub use features::{Feature, Features, Missing};
pub use fence::{FenceError, Waiter, WriteFence};
pub use kernel::{Call, Kernel};
pub use pagemap::{PageMap, PageMapError, PageState};
pub use ram::{Backing, BuildError, GuestRam, GuestRamBuilder, Source, Within};
pub use tripwire::{ChangeKind, Expected, Tripped, Tripwire, TripwireError};
pub use uffd::RegisterError;
