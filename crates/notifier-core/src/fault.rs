// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faulting in: snapshot, resolve, install, in the only order that compiles.
//!
//! [`Fault`] is a snapshot of a guest range, taken before anything about it is looked up. [`Fault::resolve`] looks the
//! backing up, [`Resolved::install`] puts it into a table. Each takes the one before by value, so nothing is installed
//! that was not resolved, nothing is resolved twice, and nothing is installed under another fault than its own:
//! what was resolved travels inside, and reaches the table only through the [`Admission`] that `install` lends.
//!
//! # Retry is exact
//! A fault is refused if and only if a window that overlaps it opened after its snapshot or was open then. Linux
//! keeps one sequence for the whole VM, so there every end of any window fails every fault in flight. Here:
//!
//! - a fault publishes its range in its walker's own line, then a SeqCst fence **(F1)**, then looks at the open windows;
//! - a window records itself, then a fence **(W1)**, then *poisons* the overlapping faults it finds published, then a
//!   fence **(W2)**, then walks the tables;
//! - an install claims its entry, then a fence **(F2)**, then reads its own line.
//!
//! *No window is missed.* Of F1 and W1 one comes first in the order of SeqCst fences. If F1 does, the window sees the
//! published range and poisons it. If W1 does, the fault sees the window's record, unless that has closed already, and
//! then everything it protected had changed before the fault resolved anything. Of F2 and W2 one comes first. If F2 does, the
//! window's walk sees the claim and waits for what becomes of it: the entry is published before the walk reads it, and
//! falls to the window. If W2 does, the install sees the poison, and gives its claim back.
//!
//! *No fault is refused for nothing.* Poison is a number, the greatest generation poisoned, and a generation belongs to
//! one fault of one line: a window that was slow to poison a fault that has ended cannot hit the line's next fault, for
//! that one has a greater generation. (So no fault resets its poison, and there is no order to get wrong.) Nothing is
//! remembered of a window that closed.
//!
//! Models: `fault_against_zapped_window`, `fault_against_retained_window`; twins leave out F1, W1, W2, F2, and the
//! poisoning.

use alloc::{sync::Arc, vec::Vec};
use core::fmt;

use crate::{
    access::Access,
    addr::{AddrRange, Gpa, GpaRange, Hva, HvaRange, OutputAddr},
    primitive::{AtomicBool, AtomicU64, AtomicUsize, Loaded, Mutex, Ordering, Twin, broken, fence, fence_unless},
    slots::{Slot, SlotFlags, SlotId, SlotMap, Stretch},
    space::{Inner, Space},
    subscription::Membership,
    window::{Key, Record},
};

/// What one walker publishes. Written by its walker, but for the poison; read by windows and flushes.
///
/// Two cache lines' worth of alignment: no two walkers write the same line, prefetched neighbours included.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(crate) struct Line {
    /// Odd while inside a scope.
    pub(crate) scope: AtomicU64,
    /// Whose scope it is (see `primitive::context`).
    pub(crate) owner: AtomicUsize,
    /// Generation of the published fault when odd; no fault when even. Guards the four words below as a sequence lock.
    generation: AtomicU64,
    guest_start: AtomicU64,
    guest_end: AtomicU64,
    /// Both zero for a fault without a host address.
    host_start: AtomicU64,
    host_end: AtomicU64,
    /// The greatest generation that a window poisoned.
    poison: AtomicU64,
    /// Which windows did: for the report, and to find out whether the mechanism is as exact as it says.
    poisoners: Mutex<Vec<(u64, Key)>>,
    pub(crate) faults: AtomicU64,
    pub(crate) retries: AtomicU64,
    pub(crate) unrelated_retries: AtomicU64,
    /// A walker has this line.
    pub(crate) in_use: AtomicBool,
}

impl Line {
    /// Publishes a fault and returns its generation. The caller has the line to itself.
    fn publish(&self, guest: GpaRange, host: Option<HvaRange>) -> u64 {
        self.retract();
        let idle = self.generation.load(Ordering::Relaxed);
        // Sequence lock, writer: whoever reads a new word below also sees that the old generation is over.
        fence(Ordering::Release);
        self.guest_start.store(guest.start().as_u64(), Ordering::Relaxed);
        self.guest_end.store(guest.end().as_u64(), Ordering::Relaxed);
        self.host_start.store(host.map_or(0, |h| h.start().as_u64()), Ordering::Relaxed);
        self.host_end.store(host.map_or(0, |h| h.end().as_u64()), Ordering::Relaxed);
        // Release: whoever sees this generation sees its range.
        self.generation.store(idle + 1, Ordering::Release);
        idle + 1
    }

    /// Ends whatever fault is published, a leaked one included.
    pub(crate) fn retract(&self) {
        let generation = self.generation.load(Ordering::Relaxed);
        if generation & 1 == 1 {
            self.generation.store(generation + 1, Ordering::Release);
        }
    }

    /// The published fault, if there is one: generation and range.
    fn published(&self) -> Option<(u64, Stretch)> {
        loop {
            let generation = self.generation.load(Ordering::Acquire);
            if generation & 1 == 0 {
                // Nothing, or not yet: a fault that publishes later looks at the open windows after that.
                return None;
            }
            let word = |w: &AtomicU64| w.load(Ordering::Relaxed);
            let (gs, ge) = (word(&self.guest_start), word(&self.guest_end));
            let (hs, he) = (word(&self.host_start), word(&self.host_end));
            // Sequence lock, reader: were any of the words a later fault's, the load below would see that this one is over.
            fence(Ordering::Acquire);
            if self.generation.load(Ordering::Relaxed) == generation {
                let guest = AddrRange::new(Gpa::new(gs), Gpa::new(ge)).ok();
                return Some((generation, Stretch { guest, host: AddrRange::new(Hva::new(hs), Hva::new(he)).ok() }));
            }
        }
    }

    /// Poisons the published fault if `record` overlaps it.
    pub(crate) fn poison_if_overlapping(&self, record: &Record) {
        let Some((generation, place)) = self.published() else { return };
        if !record.key().overlaps(&place) {
            return;
        }
        {
            let mut poisoners = self.poisoners.lock();
            // One is enough for the report, and a fault that was leaked is poisoned again and again.
            if poisoners.iter().all(|(old, _)| *old < generation) {
                poisoners.clear();
                poisoners.push((generation, record.key()));
            }
        }
        // Never lowers: a window that was slow must not wipe out the poison of a later fault.
        self.poison.fetch_max(generation, Ordering::AcqRel);
    }

    fn is_poisoned(&self, generation: u64) -> bool {
        self.poison.load(Ordering::Relaxed) >= generation
    }
}

/// Why a fault did not begin.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FaultError {
    /// A window over the range is open.
    #[error(transparent)]
    Retry(#[from] Retry),
    /// The range begins in one slot (or none) and ends in another (or none): a snapshot is of one.
    #[error("{range} crosses the bounds of {slot}, which covers {covered}")]
    CrossesSlot {
        /// The range asked for.
        range: GpaRange,
        /// A slot that has a part of it.
        slot: SlotId,
        /// What that slot covers.
        covered: GpaRange,
    },
    /// Bytes of the range are in a slot, but not populated (unplugged, ballooned out).
    #[error("{range} is not populated")]
    NotPopulated {
        /// The range asked for.
        range: GpaRange,
    },
}

/// A fault lost to a window: begin again, from a new snapshot.
#[derive(Debug, Clone)]
pub struct Retry {
    space: Space,
    place: Stretch,
    window: Option<Key>,
}

impl Retry {
    pub(crate) fn new(inner: &Arc<Inner>, place: Stretch, window: Option<Key>) -> Self {
        Self { space: Space::from_inner(Arc::clone(inner)), place, window }
    }

    /// The range of the fault.
    pub fn range(&self) -> Option<GpaRange> {
        self.place.guest
    }

    /// A window that the fault lost to.
    pub fn window(&self) -> Option<Key> {
        self.window
    }

    /// A window that the fault's range would lose to now. By the slots of now: where another host page lies there
    /// meanwhile, a window over the old one is no reason to wait.
    fn in_the_way(&self) -> Option<Arc<Record>> {
        let inner = self.space.inner();
        let place = match self.place.guest {
            Some(guest) => {
                let slots = inner.slots.load();
                let slot = slots.find(guest.start()).map(|index| slots.get(index));
                let slot = slot.filter(|slot| slot.guest().covers(&guest));
                Stretch { guest: Some(guest), host: slot.and_then(|slot| slot.host_of(guest)) }
            }
            None => self.place,
        };
        inner.overlapping_window(&place)
    }

    /// Waits until no window over the fault's range is open. Returns at once where none is. Without std it spins, and a window
    /// whose guard was dropped without a close is open until somebody calls [`Space::reap`](crate::Space::reap).
    ///
    /// Do not call this inside a scope of the same space: a window that is being opened waits for that scope.
    pub fn wait(&self) {
        while let Some(record) = self.in_the_way() {
            record.wait_until_closed();
        }
    }

    /// As [`Retry::wait`], but no longer than `timeout`. Whether no window is open.
    #[cfg(all(feature = "std", not(loom)))]
    pub fn wait_timeout(&self, timeout: core::time::Duration) -> bool {
        let Some(deadline) = std::time::Instant::now().checked_add(timeout) else {
            self.wait();
            return true;
        };
        while let Some(record) = self.in_the_way() {
            if !record.wait_until_closed_by(deadline) {
                return false;
            }
        }
        true
    }
}

impl fmt::Display for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the fault")?;
        if let Some(guest) = self.place.guest {
            write!(f, " on {guest}")?;
        }
        match self.window {
            Some(key) => write!(f, " lost to a window over {key}"),
            None => f.write_str(" lost to a window"),
        }
    }
}

impl core::error::Error for Retry {}

/// A stretch of resolved backing: contiguous in the guest and in the output space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Guest bytes.
    pub guest: GpaRange,
    /// Where the first of them lies.
    pub output: OutputAddr,
    /// The most that may be granted.
    pub access: Access,
}

/// Why a fault was not resolved.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ResolveError<E> {
    /// The resolver's own error.
    #[error("{0}")]
    Resolver(E),
    /// The resolver returned an extent that is not wholly inside the snapshot, or overlaps another, or whose output
    /// wraps around.
    #[error("extent {extent:?} does not fit the fault's range {range}")]
    Extent {
        /// The extent.
        extent: Extent,
        /// The fault's range.
        range: GpaRange,
    },
}

/// A snapshot of a guest range, taken before anything about it was looked up.
#[derive(Debug)]
#[must_use = "a fault does nothing until it is resolved and installed"]
pub struct Fault<'w> {
    inner: &'w Arc<Inner>,
    line: &'w Line,
    generation: u64,
    guest: GpaRange,
    slots: Loaded<SlotMap>,
    slot: Option<usize>,
}

impl<'w> Fault<'w> {
    pub(crate) fn begin(inner: &'w Arc<Inner>, line: &'w Line, guest: GpaRange) -> Result<Self, FaultError> {
        line.faults.store(line.faults.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        loop {
            let slots_generation = inner.slots_generation.load(Ordering::Acquire);
            let slots = inner.slots.load();
            let slot = slots.locate(guest).map_err(|slot| FaultError::CrossesSlot {
                range: guest,
                slot: slot.id(),
                covered: slot.guest(),
            })?;
            if slots.holes.overlaps(guest) {
                return Err(FaultError::NotPopulated { range: guest });
            }
            let host = slot.and_then(|index| slots.get(index).host_of(guest));
            // With a twin: only the first page is published, and so it alone is ever checked.
            let shown = match broken(Twin::CheckFirstPageOnly) {
                true => AddrRange::with_len(guest.start(), inner.page_size).unwrap_or(guest),
                false => guest,
            };
            let generation = line.publish(shown, host);
            // From here on `fault` retracts when it goes.
            let fault = Self { inner, line, generation, guest, slots, slot };
            // F1.
            fence_unless(Twin::PublishFence, Ordering::SeqCst);
            // Acquire, here and in the look at the set: a window that is found closed had changed its host mappings
            // before, and the resolver must see them so.
            let open = inner.count.load(Ordering::Acquire) != 0;
            if let Some(record) = open.then(|| inner.overlapping_window(&fault.place())).flatten() {
                line.retries.store(line.retries.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
                return Err(Retry::new(inner, fault.place(), Some(record.key())).into());
            }
            // Slots change inside windows. One that opened before the range was published did not poison it; it was found
            // open just now, or it had closed: then (and so only after that look) its change of slots is seen here, and
            // the slots are to be looked up once more.
            if inner.slots_generation.load(Ordering::Relaxed) != slots_generation {
                continue;
            }
            return Ok(fault);
        }
    }

    fn place(&self) -> Stretch {
        Stretch { guest: Some(self.guest), host: self.host() }
    }

    /// The guest range.
    pub fn range(&self) -> GpaRange {
        self.guest
    }

    /// The slot the range lies in; `None` where there is no memory (MMIO).
    pub fn slot(&self) -> Option<&Slot> {
        self.slot.map(|index| &**self.slots.get(index))
    }

    /// The host range, where the slot has one.
    pub fn host(&self) -> Option<HvaRange> {
        self.slot().and_then(|slot| slot.host_of(self.guest))
    }

    /// Whether a window has overtaken this fault already. `true` is final; `false` promises nothing.
    pub fn is_lost(&self) -> bool {
        self.line.is_poisoned(self.generation)
    }

    /// Looks the backing up: one extent, or many. The resolver may take its time, sleep and fault; what it finds is
    /// covered by the snapshot.
    ///
    /// # Errors
    /// [`ResolveError::Resolver`] with the resolver's own error, [`ResolveError::Extent`] where it returned what does not
    /// fit. The fault is over.
    pub fn resolve<E, I>(self, resolver: impl FnOnce(&Self) -> Result<I, E>) -> Result<Resolved<'w>, ResolveError<E>>
    where
        I: IntoExtents,
    {
        let extents = resolver(&self).map_err(ResolveError::Resolver)?.into_extents();
        let mut last: Option<GpaRange> = None;
        for extent in extents.as_slice() {
            let fits = self.guest.covers(&extent.guest)
                && last.is_none_or(|last| last.end() <= extent.guest.start())
                && extent.output.checked_add(extent.guest.len()).is_some();
            if !fits {
                return Err(ResolveError::Extent { extent: *extent, range: self.guest });
            }
            last = Some(extent.guest);
        }
        Ok(Resolved { fault: self, extents })
    }

    /// For operations that need no lookup (merging leaves, lowering rights): what [`Resolved::install`] is to a resolved
    /// fault. A right that a leaf does not have is given only by a fault that was resolved.
    pub fn admit<R>(self, operation: impl FnOnce(&Admission<'_>) -> R) -> R {
        operation(&Admission { fault: &self, extents: &[] })
    }
}

impl Drop for Fault<'_> {
    fn drop(&mut self) {
        // A leaked fault's generation may be over, and the line another fault's.
        if self.line.generation.load(Ordering::Relaxed) == self.generation {
            self.line.retract();
        }
    }
}

/// One extent or many, ascending: what a resolver returns.
#[derive(Debug)]
pub struct Extents(ExtentsRepr);

#[derive(Debug)]
enum ExtentsRepr {
    One(Extent),
    Many(Vec<Extent>),
}

impl Extents {
    fn as_slice(&self) -> &[Extent] {
        match &self.0 {
            ExtentsRepr::One(one) => core::slice::from_ref(one),
            ExtentsRepr::Many(many) => many,
        }
    }
}

/// What a resolver may return: an [`Extent`], or several, ascending.
pub trait IntoExtents {
    /// The extents.
    fn into_extents(self) -> Extents;
}

impl IntoExtents for Extent {
    fn into_extents(self) -> Extents {
        Extents(ExtentsRepr::One(self))
    }
}

impl IntoExtents for Vec<Extent> {
    fn into_extents(self) -> Extents {
        Extents(ExtentsRepr::Many(self))
    }
}

/// A fault whose backing is known.
#[derive(Debug)]
#[must_use = "what was resolved is not installed until `install` is called"]
pub struct Resolved<'w> {
    fault: Fault<'w>,
    extents: Extents,
}

impl<'w> Resolved<'w> {
    /// The fault's range.
    pub fn range(&self) -> GpaRange {
        self.fault.guest
    }

    /// What was resolved.
    pub fn extents(&self) -> &[Extent] {
        self.extents.as_slice()
    }

    /// Installs: hands an [`Admission`] to `install`, which claims its entries, asks [`Admission::check_for`], and
    /// publishes or gives back. Table crates have operations that do all of this; a closure that calls one is all a
    /// VMM writes.
    pub fn install<R>(self, install: impl FnOnce(&Admission<'_>) -> R) -> R {
        install(&Admission { fault: &self.fault, extents: self.extents.as_slice() })
    }
}

/// Why a span may not be published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// A window has overtaken the fault: give the claim back, then return [`Admission::retry`].
    Lost,
    /// The span is not inside the snapshot.
    Outside,
    /// The subscriber is not (any more) a member of the fault's space that is told of windows over the span.
    NotMember,
}

/// The right to add translations and rights in one range, for as long as no window takes it away.
///
/// Every operation that adds rights or output addresses takes one of these, and they are only lent by
/// [`Resolved::install`] and [`Fault::admit`]. It cannot be kept:
///
/// ```compile_fail
/// # fn f(fault: notifier_core::Fault<'_>) {
/// let mut stolen = None;
/// fault.admit(|admission| stolen = Some(admission));
/// # }
/// ```
/// ```
/// # fn f(fault: notifier_core::Fault<'_>) {
/// let mut range = None;
/// fault.admit(|admission| range = Some(admission.range()));
/// # }
/// ```
#[derive(Debug)]
pub struct Admission<'a> {
    fault: &'a Fault<'a>,
    extents: &'a [Extent],
}

impl Admission<'_> {
    /// The snapshot's range: nothing may be published outside it.
    pub fn range(&self) -> GpaRange {
        self.fault.guest
    }

    /// What was resolved, ascending. Empty for operations without a lookup.
    pub fn extents(&self) -> &[Extent] {
        self.extents
    }

    /// The slot's flags; `None` outside all slots.
    pub fn slot_flags(&self) -> Option<SlotFlags> {
        self.fault.slot().map(Slot::flags)
    }

    /// The most that may be granted anywhere in the slot.
    pub fn ceiling(&self) -> Access {
        match self.slot_flags() {
            Some(flags) if flags.contains(SlotFlags::READ_ONLY) => Access::RX,
            _ => Access::RWX,
        }
    }

    /// Whether this admission belongs to `space`.
    #[inline]
    pub fn is_of(&self, space: &Space) -> bool {
        core::ptr::eq(Arc::as_ptr(self.fault.inner), space.inner_ptr())
    }

    /// [`Admission::check`], for a subscriber: whether `member`, too, is told of windows over all of `span`. Every
    /// subscriber that keeps translations asks this one.
    ///
    /// # Errors
    /// [`Refused`]: give the claim back.
    #[inline]
    pub fn check_for(&self, member: &Membership, span: GpaRange) -> Result<(), Refused> {
        self.check(span)?;
        let place = Stretch { guest: Some(span), host: self.fault.slot().and_then(|slot| slot.host_of(span)) };
        // Who leaves clears the mark, fences, and then looks for what is to be released: after the fence in `check` either
        // we see the mark cleared, or that look finds our claim.
        let told = member.is_in(Arc::as_ptr(self.fault.inner)) && member.covers(&place) && member.is_live();
        if told { Ok(()) } else { Err(Refused::NotMember) }
    }

    /// The check between claim and publish: after the entry (or the parent of what is to be published) was claimed,
    /// asks whether `span`, all that will be translated by it, may still be published.
    ///
    /// # Errors
    /// [`Refused`]: give the claim back.
    #[inline]
    pub fn check(&self, span: GpaRange) -> Result<(), Refused> {
        if !self.fault.guest.covers(&span) {
            return Err(Refused::Outside);
        }
        // F2: the claim comes before the look at the poison.
        fence_unless(Twin::ClaimFence, Ordering::SeqCst);
        let retired = self.fault.slot().is_some_and(Slot::is_retired);
        if retired || self.fault.line.is_poisoned(self.fault.generation) { Err(Refused::Lost) } else { Ok(()) }
    }

    /// The error for a check that was lost. Call it once, after the claim was given back.
    pub fn retry(&self) -> Retry {
        let Fault { line, generation, inner, .. } = *self.fault;
        let place = self.fault.place();
        // Whose poison was it? Overlap is worked out again here, from the fault's own range, so that a window that
        // poisoned without right is found out.
        let window = line
            .poisoners
            .lock()
            .iter()
            .find(|(poisoned, key)| *poisoned == generation && key.overlaps(&place))
            .map(|(_, key)| *key);
        line.retries.store(line.retries.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        if window.is_none() {
            line.unrelated_retries.store(line.unrelated_retries.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
        Retry::new(inner, place, window)
    }
}
