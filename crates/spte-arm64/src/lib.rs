// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage 2.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod bits;
pub mod check;
pub mod contiguous;
pub mod maintenance;
pub mod memtype;
pub mod registers;
pub mod software;
mod stage2;
pub mod tlb;
pub mod transition;

pub use bits::{Granule, OptionsError, Start};
pub use check::HardwareKind;
pub use contiguous::ContiguousSet;
pub use maintenance::{CacheFeatures, Duties, Maintenance};
pub use memtype::{Cache, Device, ExecuteAt, MemoryType, Shareability, Stage2Attrs};
pub use registers::{RegisterError, VmidBits, Vtcr, Vttbr};
pub use software::{AccessedDirty, Owner, WriteState};
pub use stage2::{Stage2, Stage2Options};
pub use tlb::{Barrier, Step, Steps, TlbFeatures, Tlbi};
pub use transition::BreakLevel;
