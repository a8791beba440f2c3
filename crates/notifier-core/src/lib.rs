// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! notifier-core
#![cfg_attr(not(any(feature = "std", test, loom)), no_std)]

extern crate alloc;

mod access;
mod adapter;
mod addr;
mod counters;
mod fault;
mod guard;
mod lease;
#[doc(hidden)]
pub mod primitive;
mod ranges;
#[cfg(all(feature = "std", not(loom)))]
mod reaper;
mod scope;
mod slots;
mod space;
mod subscriber;
mod subscription;
mod window;

pub use access::Access;
pub use adapter::{CallAdapter, CallConsumer, CallError, CallMapError};
pub use addr::{AddrRange, Address, Gpa, GpaRange, Hva, HvaRange, OutputAddr, OutputRange, RangeError};
pub use counters::Counters;
pub use fault::{Admission, Extent, Extents, Fault, FaultError, IntoExtents, Refused, ResolveError, Resolved, Retry};
pub use guard::{
    Change, ChangeError, Changed, CloseError, InvalidationGuard, Outcome, OwnedInvalidationGuard, Retained,
    SettleError, WindowMode, Zapped,
};
pub use lease::{Lease, LeaseError, LeaseId, LeasePolicy, LeaseRequest};
pub use scope::{Scope, ScopeWaitError, Walker};
pub use slots::{Slot, SlotError, SlotFlags, SlotId, SlotSpec, Stretch};
pub use space::{PageSizeError, Progress, Space, SpaceBuilder, WindowBuilder};
pub use subscriber::{
    ChangeBatch, Coverage, DirtySink, Interest, Mode, PageChange, PageOutcome, Subscriber, SubscriberError,
    SubscriberId,
};
pub use subscription::{JoinError, LeaveError, Subscription};
pub use window::{CloseCause, Holder, Key, OpenError, WindowAddress};
