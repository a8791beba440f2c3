// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Slots: which guest physical bytes lie at which host virtual address (Linux: memslots).
//!
//! A slot never changes: it is added, removed, or replaced by another one, and each of these goes through a window over
//! its guest range. A slot that is being removed stops serving faults when that window is recorded, is dropped by every
//! subscriber while it opens, and leaves the set that windows walk only then. So no fault maps through a slot that windows
//! no longer see.

use alloc::{sync::Arc, vec::Vec};
use core::fmt;

use crate::{
    addr::{AddrRange, Gpa, GpaRange, Hva, HvaRange},
    primitive::{AtomicBool, Ordering},
    ranges::RangeSet,
};

/// Names a slot of one space, for good: numbers are not used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotId(pub(crate) u64);

impl fmt::Display for SlotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "slot {}", self.0)
    }
}

bitflags::bitflags! {
    /// What may be done with a slot's memory.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
    pub struct SlotFlags: u32 {
        /// For tracking writes page by page: leaves are of the smallest size (Linux: `KVM_MEM_LOG_DIRTY_PAGES`). What tracks them is
        /// the dirty fact of a table that hardware marks, or a table that maps without writing.
        const LOG_DIRTY = 1;
        /// No subscriber may grant writing (Linux: `KVM_MEM_READONLY`).
        const READ_ONLY = 2;
    }
}

/// Why a set of slots cannot be.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SlotError {
    /// Two slots have guest bytes in common.
    #[error("{range} overlaps {other}, which covers {covered}")]
    Overlap {
        /// Guest range of the slot that was to be added.
        range: GpaRange,
        /// The slot that is there.
        other: SlotId,
        /// What that one covers.
        covered: GpaRange,
    },
    /// Guest start, host start or length is no multiple of the page size.
    #[error("slot over {range} at {host:?} is not aligned to pages of {page:#x} bytes")]
    Unaligned {
        /// Guest range asked for.
        range: GpaRange,
        /// Host address asked for.
        host: Option<Hva>,
        /// The space's page size, in bytes.
        page: u64,
    },
    /// The host range would wrap around.
    #[error("host range of slot over {range} wraps around from {host}")]
    HostWraps {
        /// Guest range asked for.
        range: GpaRange,
        /// Host address asked for.
        host: Hva,
    },
    /// There is no such slot (any more).
    #[error("there is no {id}")]
    NoSlot {
        /// The id given.
        id: SlotId,
    },
    /// A memory region has no host address to follow.
    #[error("the region at {start} has no host address")]
    NoHostAddress {
        /// Where the region begins.
        start: Gpa,
    },
    /// The caller is a subscriber's callback of this space.
    #[error("slots changed inside a subscriber's callback")]
    InCallback,
    /// The calling thread is inside a scope of this space: the flush would wait for it for ever.
    #[error("slots changed inside the caller's own scope")]
    InScope,
    /// The window over the slots could not be opened; the slots are as they were, what was zapped stays zapped.
    #[error("slots unchanged: {0}")]
    Window(#[from] crate::window::OpenError),
    /// The slots were changed, but closing the window failed: its range stays in progress until the space's reaper
    /// finishes it.
    #[error("slots changed, window still in progress: {0}")]
    Close(crate::window::CloseCause),
}

/// What a slot is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotSpec {
    /// Guest physical bytes.
    pub guest: GpaRange,
    /// Where they lie in the host's address space; `None` for memory without a host mapping (guest_memfd).
    pub host: Option<Hva>,
    /// Flags.
    pub flags: SlotFlags,
}

/// A slot that is, or was, part of a space.
#[derive(Debug)]
pub struct Slot {
    id: SlotId,
    spec: SlotSpec,
    host: Option<HvaRange>,
    /// Set when the slot stops serving faults; never cleared.
    retired: AtomicBool,
}

impl Slot {
    /// Its id.
    pub fn id(&self) -> SlotId {
        self.id
    }

    /// Its guest range.
    pub fn guest(&self) -> GpaRange {
        self.spec.guest
    }

    /// Its host range, where it has one.
    pub fn host(&self) -> Option<HvaRange> {
        self.host
    }

    /// Its flags.
    pub fn flags(&self) -> SlotFlags {
        self.spec.flags
    }

    /// What it was made from.
    pub fn spec(&self) -> SlotSpec {
        self.spec
    }

    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// The same slot, serving.
    pub(crate) fn revived(&self) -> Arc<Self> {
        Arc::new(Self { retired: AtomicBool::new(false), ..*self })
    }

    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Release);
    }

    /// The guest bytes that both have at one host address (or both at none).
    pub(crate) fn in_common(&self, other: &Self) -> Option<GpaRange> {
        let part = self.spec.guest.intersection(&other.spec.guest)?;
        (self.host_of(part) == other.host_of(part)).then_some(part)
    }

    /// The host bytes of a guest range inside this slot.
    pub(crate) fn host_of(&self, guest: GpaRange) -> Option<HvaRange> {
        let offset = guest.start().as_u64() - self.spec.guest.start().as_u64();
        AddrRange::with_len(self.host?.start().wrapping_add(offset), guest.len()).ok()
    }

    /// The guest bytes of a host range inside this slot's host range.
    fn guest_of(&self, host: HvaRange) -> Option<GpaRange> {
        let offset = host.start().as_u64() - self.host?.start().as_u64();
        AddrRange::with_len(self.spec.guest.start().wrapping_add(offset), host.len()).ok()
    }
}

/// A stretch of bytes as both sides know it. At least one side is there; where both are, they have the same length.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stretch {
    /// Guest physical side.
    pub guest: Option<GpaRange>,
    /// Host virtual side.
    pub host: Option<HvaRange>,
}

/// Slots by guest address.
#[derive(Debug, Clone, Default)]
pub(crate) struct SlotMap {
    /// Sorted by guest start; disjoint.
    slots: Vec<Arc<Slot>>,
    /// Guest bytes that are in a slot, but not populated.
    pub(crate) holes: RangeSet<Gpa>,
}

impl SlotMap {
    pub(crate) fn iter(&self) -> impl Iterator<Item = &Arc<Slot>> {
        self.slots.iter()
    }

    /// Index of the slot that holds `addr`.
    pub(crate) fn find(&self, addr: Gpa) -> Option<usize> {
        let after = self.slots.partition_point(|slot| slot.guest().start() <= addr);
        let index = after.checked_sub(1)?;
        self.slots[index].guest().contains(addr).then_some(index)
    }

    /// Index of the slot that holds all of `range`, or `None` where no slot has a byte of it.
    ///
    /// # Errors
    /// A slot that has a part of it.
    pub(crate) fn locate(&self, range: GpaRange) -> Result<Option<usize>, &Arc<Slot>> {
        let slot = self.find(range.start());
        let crossed = match slot {
            Some(index) => Some(self.get(index)).filter(|slot| !slot.guest().covers(&range)),
            None => self.overlapping(range),
        };
        crossed.map_or(Ok(slot), Err)
    }

    pub(crate) fn get(&self, index: usize) -> &Arc<Slot> {
        &self.slots[index]
    }

    pub(crate) fn by_id(&self, id: SlotId) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|slot| slot.id == id)
    }

    /// The first slot with guest bytes in `range`.
    pub(crate) fn overlapping(&self, range: GpaRange) -> Option<&Arc<Slot>> {
        self.slots.iter().find(|slot| slot.guest().overlaps(&range))
    }

    pub(crate) fn insert(&mut self, slot: Arc<Slot>) {
        let at = self.slots.partition_point(|other| other.guest().start() < slot.guest().start());
        self.slots.insert(at, slot);
    }

    /// What is populated of a slot.
    pub(crate) fn populated(&self, slot: &Slot) -> Vec<Stretch> {
        let parts = self.holes.missing_from(slot.guest());
        parts.into_iter().map(|part| Stretch { guest: Some(part), host: slot.host_of(part) }).collect()
    }

    /// What slots have of `range` is not populated.
    pub(crate) fn insert_hole(&mut self, range: GpaRange) {
        for slot in &self.slots {
            slot.guest().intersection(&range).into_iter().for_each(|part| self.holes.insert(part));
        }
    }

    pub(crate) fn remove(&mut self, id: SlotId) {
        if let Some(at) = self.slots.iter().position(|slot| slot.id == id) {
            self.holes.remove(self.slots[at].guest());
            self.slots.remove(at);
        }
    }

    /// Checks a slot against the page size and the slots that are here.
    pub(crate) fn admit(&self, id: SlotId, spec: SlotSpec, page: u64) -> Result<Arc<Slot>, SlotError> {
        let range = spec.guest;
        if !range.is_aligned(page) || spec.host.is_some_and(|host| !host.is_aligned(page)) {
            return Err(SlotError::Unaligned { range, host: spec.host, page });
        }
        let host = match spec.host {
            None => None,
            Some(host) => {
                Some(AddrRange::with_len(host, range.len()).map_err(|_| SlotError::HostWraps { range, host })?)
            }
        };
        if let Some(other) = self.overlapping(range) {
            return Err(SlotError::Overlap { range, other: other.id, covered: other.guest() });
        }
        Ok(Arc::new(Slot { id, spec, host, retired: AtomicBool::new(false) }))
    }

    /// Every place where bytes of the host range `host` appear in the guest: once for each slot that maps them.
    pub(crate) fn aliases(&self, host: HvaRange) -> impl Iterator<Item = Stretch> + '_ {
        self.slots.iter().filter_map(move |slot| {
            let part = slot.host?.intersection(&host)?;
            Some(Stretch { guest: slot.guest_of(part), host: Some(part) })
        })
    }

    /// The stretches that make up a guest range: one for each slot in it, and one for each gap between them.
    pub(crate) fn stretches(&self, guest: GpaRange) -> Vec<Stretch> {
        let mut all = Vec::new();
        let mut at = guest.start();
        for slot in &self.slots {
            let Some(part) = slot.guest().intersection(&guest) else { continue };
            if let Ok(gap) = AddrRange::new(at, part.start()) {
                all.push(Stretch { guest: Some(gap), host: None });
            }
            all.push(Stretch { guest: Some(part), host: slot.host_of(part) });
            at = part.end();
        }
        if let Ok(gap) = AddrRange::new(at, guest.end()) {
            all.push(Stretch { guest: Some(gap), host: None });
        }
        all
    }
}
