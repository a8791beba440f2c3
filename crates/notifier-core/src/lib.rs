// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocol that keeps second copies of host translations true.
//!
//! # The problem
//! A VMM or hypervisor keeps *second* copies of the host's translations: EPT, NPT and stage-2 tables, device IOTLBs, VFIO
//! and vhost-user mappings. When the host backing of a guest page changes (merging, ballooning, migration, hot-unplug,
//! copy-on-write), every copy has to follow before the old page is used for something else; otherwise a guest reads
//! somebody else's memory. The kernel has MMU notifiers for this. This crate is the same in user space and for any table:
//! it knows who has to be told, in which order, and when a translation that was looked up may still be used. It knows no
//! table format; it calls [`Subscriber`]s, which do.
//!
//! # Concepts
//! **A [`Space`]** is one guest's memory and everybody who keeps a second copy of its translations.
//!
//! **A window** is the time in which a range changes, and its **guard** ([`InvalidationGuard`]) is the window as a value:
//! while the guard lives, nobody adds a translation or a right in the range. There are two modes, as types. Once
//! [`Space::zap`] returns ([`Zapped`]), nobody translates any byte of the range. Once [`Space::retain`] returns
//! ([`Retained`]), whoever still does is read-only and stays so; then
//! [`change_pte`](InvalidationGuard::change_pte) can repoint a page without an exit, as page merging wants. A page of a
//! Retained window ends changed, kept or zapped, and without an outcome it is zapped.
//! [`close`](InvalidationGuard::close) ends a window; so does dropping the guard, and what a drop cannot finish stays in
//! progress until it can be. An [`OwnedInvalidationGuard`] borrows nothing, and its drop does not block.
//!
//! **A fault** adds translations: [`Fault`] (a snapshot of a range), then [`Fault::resolve`] (look the backing up), then
//! [`Resolved::install`] (put it into a table). Each takes the one before by value, so no other order compiles. The table
//! asks [`Admission::check_for`] between claiming an entry and publishing it; a fault that lost to a window gets a
//! [`Retry`], and can wait for that window. Retry is exact: a window elsewhere never fails a fault.
//!
//! **A [`Scope`]** is a walk in progress. Software walkers ([`Walker`]) are TLBs: what one found, it may use until its
//! scope ends, and flushes ([`Space::wait_for_scopes`]) wait for the scopes that were entered before.
//!
//! **A [`Lease`]** is a pin that outlives a scope, for requests in flight. A window over it is refused, waits, or asks
//! for it back ([`LeasePolicy`]).
//!
//! **A [`Subscriber`]** keeps a second copy, and is told: start before the bytes change, end after. It joins with
//! [`Space::subscribe`] at any time, open windows included, and leaves by dropping its [`Subscription`]. A consumer that
//! is calls rather than entries (VFIO, vhost-user) takes part through a [`CallAdapter`].
//!
//! **A slot** ([`SlotSpec`]) says which guest physical bytes lie at which host virtual address. One host page may be in
//! several. Slots are replaced while windows are open.
//!
//! # Overview
//! | to | call |
//! |---|---|
//! | describe guest memory | [`Space::add_slot`], [`Space::replace_slots`], [`Space::set_memory`](#feature-flags) |
//! | take part | [`Space::subscribe`], [`Space::subscribe_to`] |
//! | change the host | [`Space::zap`], [`Space::retain`]; with choices [`Space::window`] |
//! | repoint, keep or zap pages inside | [`change_pte`](InvalidationGuard::change_pte), `keep`, `zap` of a Retained guard |
//! | unplug and replug | `discard` of a Zapped guard, [`Space::populate`] |
//! | walk | [`Space::walker`], [`Walker::enter`] |
//! | fault in | [`Walker::fault`], [`Scope::fault`]; without a lookup [`Space::admit`] |
//! | hold on | [`Scope::lease`], [`Space::lease`] |
//! | know whether pages are used | [`Space::age`], [`Space::test_age`] |
//! | log writes (migration, snapshots) | [`SpaceBuilder::dirty_sink`], [`SlotFlags::LOG_DIRTY`], [`Space::report_dirty`]; the tutorial `precopy` |
//! | see what goes on | [`Space::progress`], [`Space::counters`] |
//!
//! # Example
//! ```
//! use notifier_core::{AddrRange, Coverage, FaultError, Gpa, Hva, Refused, SlotFlags, SlotSpec, Space, Subscriber, SubscriberError};
//!
//! /// Translates nothing, and so is always ready for a change.
//! struct Empty;
//! impl Subscriber for Empty {
//!     fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> { Ok(()) }
//!     fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> { Ok(()) }
//! }
//!
//! let space = Space::new();
//! let _subscription = space.subscribe(Empty)?;
//! let guest = AddrRange::with_len(Gpa::new(0), 0x10_0000)?;
//! space.add_slot(SlotSpec { guest, host: Some(Hva::new(0x7000_0000)), flags: SlotFlags::empty() })?;
//!
//! let (mut early, mut late) = (space.walker(), space.walker());
//! let page = AddrRange::with_len(Gpa::new(0x3000), 0x1000)?;
//! let fault = early.fault(page)?;
//! let guard = space.zap(AddrRange::with_len(Hva::new(0x7000_3000), 0x1000)?)?;
//! // Here the host page changes. A fault that began before has lost, and none begins:
//! assert_eq!(fault.admit(|admission| admission.check(page)), Err(Refused::Lost));
//! assert!(matches!(late.fault(page), Err(FaultError::Retry(_))));
//! guard.close()?;
//! late.fault(page)?.admit(|admission| admission.check(page)).unwrap();
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Names in Linux
//! | here | Linux |
//! |---|---|
//! | [`Space`] | what `struct kvm` has of a `struct mmu_notifier` |
//! | opening and closing a guard | `invalidate_range_start`, `invalidate_range_end` |
//! | [`Progress::count`] | `mmu_invalidate_in_progress` (until v6.0 `mmu_notifier_count`) |
//! | [`Progress::sequence`] | `mmu_invalidate_seq` (until v6.0 `mmu_notifier_seq`) |
//! | [`Space::must_retry`] | `mmu_invalidate_retry` |
//! | the check inside `install` | `mmu_invalidate_retry_gfn`, but exact |
//! | [`change_pte`](InvalidationGuard::change_pte) | `.change_pte()` (until v6.10) |
//! | [`Space::age`], [`Space::test_age`] | `clear_flush_young`, `test_young` |
//! | a slot | memslot |
//! | a [`Lease`] that can be cancelled | `gfn_to_pfn_cache` |
//! | a [`Scope`] | a vCPU with `vcpu->mode == IN_GUEST_MODE` |
//!
//! # Feature flags
//! - `std` (default): waiting sleeps, panics of callbacks are caught, a reaper thread finishes windows.
//! - `vm-memory` (default, needs `std`): slots from a `vm_memory::GuestMemoryBackend` (`Space::set_memory`), and
//!   conversions of its addresses.
//!
//! Without `std` the crate needs `alloc` only, and loses this: waits spin; a panic in a callback is not caught; there is
//! no reaper, so [`Space::reap`] has to be called where owned guards are dropped or a close failed; a thread is not told
//! that it is inside its own scope or callback, and waits for itself instead of getting the typed error; there are no
//! waits with a limit (`LeasePolicy::CancelFor`, `Retry::wait_timeout`); snapshots are read under a spin lock; each
//! space reclaims table memory by a collector of its own, whose pins are slower.
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
pub use subscription::{JoinError, LeaveError, Membership, Subscription};
pub use window::{CloseCause, Holder, Key, OpenError, WindowAddress};

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
