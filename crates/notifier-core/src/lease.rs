// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Leases: pins that outlive a scope.
//!
//! A scope is for as long as a walk lasts. What lasts longer (an io_uring request in flight, a VFIO mapping) is a
//! [`Lease`] over its bytes. A window that overlaps one asks for it back, waits for it, or fails
//! ([`LeasePolicy`]); it never goes on beside it. Leases stand in the way of windows alone: a table that is told to unmap
//! directly, with no window, does so.
//!
//! *Neither misses the other.* A lease looks at the open windows and is entered in one hold of the lock of the leases; a
//! window is recorded before it takes the same lock to look at the leases. So either the window finds the lease, or the
//! window looked before, and the lease finds it and is not entered. (Entered first and taken back, it would be in the way
//! of other windows meanwhile.)

use alloc::{string::String, sync::Arc, vec::Vec};
use core::fmt;

use crate::{
    addr::GpaRange,
    fault::Retry,
    primitive::{AtomicBool, Condvar, Mutex, Ordering},
    slots::{SlotId, Stretch},
    space::Inner,
    window::{Holder, Key, OpenError, OpenOptions},
};

/// Names a lease of one space, for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "lease {}", self.0)
    }
}

/// What a window does about leases over its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum LeasePolicy {
    /// The window is refused.
    #[default]
    Fail,
    /// The window waits until the holders are done by themselves.
    Wait,
    /// The window asks the holders to stop, and waits until they have.
    Cancel,
    /// As [`LeasePolicy::Cancel`], but the window is refused if that takes longer.
    #[cfg(all(feature = "std", not(loom)))]
    CancelFor(core::time::Duration),
}

/// Why a lease was not given.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaseError {
    /// A window over the range is open: walk again when it is closed.
    #[error(transparent)]
    Retry(#[from] Retry),
    /// The range begins in one slot (or none) and ends in another (or none).
    #[error("{range} crosses the bounds of {slot}, which covers {covered}")]
    CrossesSlot {
        /// The range asked for.
        range: GpaRange,
        /// A slot that has a part of it.
        slot: SlotId,
        /// What that slot covers.
        covered: GpaRange,
    },
}

type CancelHook = Arc<dyn Fn() + Send + Sync>;

/// What is to be leased, and by whom.
#[derive(Clone)]
pub struct LeaseRequest {
    range: GpaRange,
    name: String,
    on_cancel: Option<CancelHook>,
}

impl fmt::Debug for LeaseRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LeaseRequest").field("range", &self.range).field("name", &self.name).finish_non_exhaustive()
    }
}

impl LeaseRequest {
    /// A lease of `range`, held by something called `name`.
    pub fn new(range: GpaRange, name: impl Into<String>) -> Self {
        Self { range, name: name.into(), on_cancel: None }
    }

    /// Calls `hook` when a window asks for the lease back; at most once for each window that asks. The hook runs on the
    /// window's thread: it tells the holder, and returns.
    #[must_use]
    pub fn on_cancel(mut self, hook: impl Fn() + Send + Sync + 'static) -> Self {
        self.on_cancel = Some(Arc::new(hook));
        self
    }
}

#[derive(Debug)]
struct Entry {
    id: LeaseId,
    place: Stretch,
    request: LeaseRequest,
    cancelled: Arc<AtomicBool>,
}

#[derive(Debug, Default)]
struct Entries {
    next: u64,
    all: Vec<Entry>,
}

/// All leases of a space.
#[derive(Debug, Default)]
pub(crate) struct Leases {
    entries: Mutex<Entries>,
    returned: Condvar,
}

impl Leases {
    /// Returns when no lease overlaps `key`, or says why not.
    pub(crate) fn settle(&self, key: Key, options: OpenOptions) -> Result<(), OpenError> {
        #[cfg(all(feature = "std", not(loom)))]
        let deadline = match options.leases {
            LeasePolicy::CancelFor(timeout) => std::time::Instant::now().checked_add(timeout),
            _ => None,
        };
        let mut asked: Vec<LeaseId> = Vec::new();
        let mut entries = self.entries.lock();
        loop {
            let Some(holder) = entries.all.iter().find(|entry| key.overlaps(&entry.place)) else { return Ok(()) };
            let pinned = OpenError::Pinned { key, holder: Holder::Lease(holder.id), name: holder.request.name.clone() };
            match options.leases {
                LeasePolicy::Fail => return Err(pinned),
                LeasePolicy::Wait => {}
                _ => {
                    let mut hooks = Vec::new();
                    for entry in entries.all.iter().filter(|entry| key.overlaps(&entry.place)) {
                        if asked.contains(&entry.id) {
                            continue;
                        }
                        asked.push(entry.id);
                        entry.cancelled.store(true, Ordering::Release);
                        hooks.extend(entry.request.on_cancel.clone());
                    }
                    if !hooks.is_empty() {
                        // A hook may give its lease back itself.
                        drop(entries);
                        hooks.iter().for_each(|hook| hook());
                        entries = self.entries.lock();
                        continue;
                    }
                }
            }
            if options.nonblocking {
                return Err(OpenError::WouldBlock { key });
            }
            #[cfg(all(feature = "std", not(loom)))]
            if let Some(deadline) = deadline {
                let (guard, in_time) = self.returned.wait_until(entries, deadline);
                entries = guard;
                if !in_time && entries.all.iter().any(|entry| key.overlaps(&entry.place)) {
                    return Err(pinned);
                }
                continue;
            }
            entries = self.returned.wait(&self.entries, entries);
        }
    }
}

/// A pin on guest bytes that outlives the scope it was taken in.
///
/// While it lives no window over its bytes opens, so what was translated in the scope stays good. Dropping it gives the
/// bytes back. A lease that is leaked keeps its bytes for good.
///
/// No table hears of what its holder writes: the dirty fact of the translation may have been harvested before. Whoever writes
/// under a lease calls [`Space::report_dirty`](crate::Space::report_dirty) after the last write, before it drops the lease.
#[must_use = "dropping a lease gives the bytes back"]
pub struct Lease {
    inner: Arc<Inner>,
    id: LeaseId,
    range: GpaRange,
    cancelled: Arc<AtomicBool>,
}

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lease").field("id", &self.id).field("range", &self.range).finish_non_exhaustive()
    }
}

impl Lease {
    pub(crate) fn take(inner: &Arc<Inner>, request: LeaseRequest) -> Result<Self, LeaseError> {
        let range = request.range;
        let cancelled = Arc::new(AtomicBool::new(false));
        loop {
            let slots_generation = inner.slots_generation.load(Ordering::Acquire);
            let slots = inner.slots.load();
            let slot = slots
                .locate(range)
                .map_err(|slot| LeaseError::CrossesSlot { range, slot: slot.id(), covered: slot.guest() })?
                .map(|index| slots.get(index));
            let place = Stretch { guest: Some(range), host: slot.and_then(|slot| slot.host_of(range)) };
            let mut entries = inner.leases.entries.lock();
            if let Some(record) = inner.overlapping_window(&place) {
                return Err(Retry::new(inner, place, Some(record.key())).into());
            }
            // As for faults: slots that changed since they were looked up are to be looked up again, and only after the
            // look at the windows can that be known.
            if inner.slots_generation.load(Ordering::Acquire) != slots_generation {
                continue;
            }
            entries.next += 1;
            let id = LeaseId(entries.next);
            entries.all.push(Entry { id, place, request, cancelled: Arc::clone(&cancelled) });
            drop(entries);
            return Ok(Self { inner: Arc::clone(inner), id, range, cancelled });
        }
    }

    /// The lease's number.
    pub fn id(&self) -> LeaseId {
        self.id
    }

    /// The bytes.
    pub fn range(&self) -> GpaRange {
        self.range
    }

    /// Whether a window has asked for the bytes.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let gone = {
            let mut entries = self.inner.leases.entries.lock();
            let at = entries.all.iter().position(|entry| entry.id == self.id);
            at.map(|at| entries.all.swap_remove(at))
        };
        self.inner.leases.returned.notify_all();
        // The hook it holds is the user's: dropped outside the lock.
        drop(gone);
    }
}
