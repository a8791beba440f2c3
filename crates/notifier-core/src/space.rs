// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The space: one guest's memory, and everybody who keeps a second copy of its translations.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::fmt;

use crossbeam_queue::SegQueue;

use crate::{
    addr::{AddrRange, Gpa, GpaRange},
    counters::{Counters, WindowCounters},
    fault::{Admission, Fault, FaultError, Line},
    guard::{InvalidationGuard, OwnedInvalidationGuard, Retained, WindowMode, Zapped},
    lease::{Lease, LeaseError, LeasePolicy, LeaseRequest},
    primitive::{AtomicU64, AtomicUsize, Gate, Mutex, Ordering, Pin, Reclaim, Snapshot, fence},
    ranges::RangeSet,
    scope::{ScopeWaitError, Walker, wait_for_scopes},
    slots::{Slot, SlotError, SlotId, SlotMap, SlotSpec, Stretch},
    subscriber::{DirtySink, Interest, Mode, Subscriber, SubscriberError, SubscriberId},
    subscription::{self, JoinError, Member, Subscription},
    window::{CloseCause, Key, OpenError, OpenOptions, OpenWindows, Record, WindowAddress, finish, open},
};

/// What is decided in one hold of the registry's lock.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) windows: Vec<Arc<Record>>,
    pub(crate) members: Vec<Arc<Member>>,
    /// The slots that windows walk; a slot that is being removed is among them until nobody maps through it any more.
    pub(crate) walked: SlotMap,
    pub(crate) next_window: u64,
    next_subscriber: u64,
    next_slot: u64,
}

impl Registry {
    pub(crate) fn next_subscriber(&mut self) -> SubscriberId {
        self.next_subscriber += 1;
        SubscriberId(self.next_subscriber)
    }

    /// Every populated stretch of the slots that serve faults.
    pub(crate) fn populated(&self) -> Vec<Stretch> {
        let serving = self.walked.iter().filter(|slot| !slot.is_retired());
        serving.flat_map(|slot| self.walked.populated(slot)).collect()
    }
}

pub(crate) struct Inner {
    /// Windows in progress (Linux: `mmu_invalidate_in_progress`).
    pub(crate) count: AtomicUsize,
    /// Windows finished (Linux: `mmu_invalidate_seq`).
    pub(crate) sequence: AtomicU64,
    pub(crate) registry: Mutex<Registry>,
    pub(crate) open: Snapshot<OpenWindows>,
    /// The slots that serve faults.
    pub(crate) slots: Snapshot<SlotMap>,
    /// Moves after every store to `slots`.
    pub(crate) slots_generation: AtomicU64,
    pub(crate) lines: Snapshot<Vec<Arc<Line>>>,
    /// Serialises the making of walkers.
    walkers: Mutex<()>,
    /// Serialises changes of slots.
    slot_changes: Mutex<()>,
    /// Passed together by who relies on the slots for a while, and alone by their change.
    pub(crate) slots_stay: Gate,
    /// For the reaper and for memberships, which must not keep the space.
    pub(crate) me: alloc::sync::Weak<Inner>,
    pub(crate) leases: crate::lease::Leases,
    pub(crate) counters: WindowCounters,
    pub(crate) reclaim: Reclaim,
    pub(crate) page_size: u64,
    sink: Box<dyn DirtySink>,
    unfinished: SegQueue<Arc<Record>>,
    unreleased: SegQueue<SubscriberId>,
    reaping: Mutex<()>,
    #[cfg_attr(any(not(feature = "std"), loom), expect(dead_code, reason = "there is no reaper thread to wake"))]
    reaper: Mutex<ReaperSlot>,
}

#[cfg(all(feature = "std", not(loom)))]
type ReaperSlot = Option<crate::reaper::Reaper>;
#[cfg(any(not(feature = "std"), loom))]
type ReaperSlot = ();

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inner").field("count", &self.count).field("sequence", &self.sequence).finish_non_exhaustive()
    }
}

#[cfg(all(feature = "std", not(loom)))]
std::thread_local! {
    /// The spaces whose callbacks this thread is running, innermost last.
    static CALLBACKS: core::cell::RefCell<Vec<usize>> = const { core::cell::RefCell::new(Vec::new()) };
}

impl Inner {
    /// Whether the calling thread runs a subscriber's callback of this space. Always `false` where threads cannot be
    /// told apart.
    pub(crate) fn in_callback(&self) -> bool {
        #[cfg(all(feature = "std", not(loom)))]
        // A thread that has no such storage any more is ending, and runs no callback.
        return CALLBACKS
            .try_with(|spaces| spaces.borrow().contains(&(core::ptr::from_ref(self) as usize)))
            .unwrap_or(false);
        #[cfg(any(not(feature = "std"), loom))]
        return false;
    }

    /// Runs a subscriber's code. A panic becomes an error.
    pub(crate) fn callback<R>(
        &self,
        callback: impl FnOnce() -> Result<R, SubscriberError>,
    ) -> Result<R, SubscriberError> {
        #[cfg(all(feature = "std", not(loom)))]
        {
            // Without storage (a guard that is dropped while its thread ends) a callback cannot be told from others.
            let _ = CALLBACKS.try_with(|spaces| spaces.borrow_mut().push(core::ptr::from_ref(self) as usize));
            let result = std::panic::catch_unwind(core::panic::AssertUnwindSafe(callback));
            let _ = CALLBACKS.try_with(|spaces| spaces.borrow_mut().pop());
            result.unwrap_or(Err(SubscriberError::Panicked))
        }
        #[cfg(any(not(feature = "std"), loom))]
        callback()
    }

    pub(crate) fn overlapping_window(&self, place: &Stretch) -> Option<Arc<Record>> {
        self.open.load().overlapping(place).cloned()
    }

    /// Keeps a window that could not be finished for whoever tries again.
    pub(crate) fn leave_unfinished(&self, record: Arc<Record>) {
        crate::counters::add(&self.counters.unfinished, 1);
        self.leave_to_reaper(record);
    }

    /// Keeps a subscriber that left and may still translate for whoever tries to release it again.
    pub(crate) fn leave_unreleased(&self, id: SubscriberId) {
        self.unreleased.push(id);
        self.wake_reaper();
    }

    pub(crate) fn leave_to_reaper(&self, record: Arc<Record>) {
        self.unfinished.push(record);
        self.wake_reaper();
    }

    fn wake_reaper(&self) {
        #[cfg(all(feature = "std", not(loom)))]
        {
            self.have_reaper();
            if let Some(reaper) = &*self.reaper.lock() {
                reaper.wake();
            }
        }
    }

    /// Makes sure that there is a thread that closes windows whose guards went away. Where none can be made, such windows
    /// wait for [`Space::reap`].
    fn have_reaper(&self) {
        #[cfg(all(feature = "std", not(loom)))]
        {
            let mut reaper = self.reaper.lock();
            if reaper.is_none() {
                *reaper = crate::reaper::Reaper::spawn(self.me.clone());
            }
        }
    }

    /// Tries to finish what is left, and to release subscribers that could not be; how many are left after that.
    pub(crate) fn reap(&self) -> usize {
        if self.in_callback() || crate::scope::in_own_scope(self) {
            // Nothing can be finished here, and whoever is at it may be waiting for this callback, or this scope.
            return self.unfinished.len() + self.unreleased.len();
        }
        // One at a time: what another thread has in hand is not done yet.
        let _one_at_a_time = self.reaping.lock();
        let mut failed = Vec::new();
        for _ in 0..self.unfinished.len() {
            let Some(record) = self.unfinished.pop() else { break };
            if finish(self, &record).is_err() {
                failed.push(record);
            }
        }
        let mut left = failed.len();
        let unreleased: Vec<_> = core::iter::from_fn(|| self.unreleased.pop()).take(self.unreleased.len()).collect();
        for id in unreleased {
            let member = self.registry.lock().members.iter().find(|member| member.id() == id).cloned();
            if member.is_some_and(|member| !member.reap(self, &self.unreleased)) {
                left += 1;
            }
        }
        failed.into_iter().for_each(|record| self.unfinished.push(record));
        left
    }

    /// Publishes a changed set of serving slots.
    fn serve(&self, slots: SlotMap) {
        self.slots.store(slots);
        self.slots_generation.fetch_add(1, Ordering::Release);
    }

    /// Makes holes of what slots have of `key`.
    pub(crate) fn discard(&self, key: Key) {
        let mut registry = self.registry.lock();
        for part in key.reach(&registry.walked).iter().filter_map(|stretch| stretch.guest) {
            registry.walked.insert_hole(part);
        }
        self.serve(registry.walked.clone());
    }

    /// Fills the holes of `range`, and says which there were.
    fn fill(&self, range: GpaRange) -> Vec<GpaRange> {
        let mut registry = self.registry.lock();
        let holes = registry.walked.holes.within(range);
        if !holes.is_empty() {
            registry.walked.holes.remove(range);
            self.serve(registry.walked.clone());
        }
        holes
    }

    /// Removes some slots and adds others, inside windows over all of them; what was not populated of those that went. The caller
    /// holds `slot_changes`.
    fn swap_slots(
        &self,
        old: &[Arc<Slot>],
        new: &[Arc<Slot>],
        holes: &[GpaRange],
    ) -> Result<(Option<CloseCause>, Vec<GpaRange>), OpenError> {
        // A window over each range that changes. From the moment it is recorded no fault there is served; when it is open,
        // whatever was mapped through a removed slot is gone, and so is what was installed for want of memory (MMIO
        // markers) where a slot appears. Only then do the sets change.
        let mut ranges: RangeSet<Gpa> = RangeSet::default();
        old.iter().chain(new).for_each(|slot| ranges.insert(slot.guest()));
        let mut windows: Vec<Arc<Record>> = Vec::new();
        let finish_all = |windows: Vec<Arc<Record>>| {
            let mut stuck = None;
            for record in windows.into_iter().rev() {
                if let Err(cause) = finish(self, &record) {
                    self.leave_unfinished(record);
                    stuck = Some(cause);
                }
            }
            stuck
        };
        for range in ranges.iter() {
            match open(self, Key::Guest(range), Mode::Zapped, OpenOptions::default()) {
                Ok(record) => windows.push(record),
                Err(error) => {
                    finish_all(windows);
                    return Err(error);
                }
            }
        }
        let had = {
            let _nobody_relies_on_slots = self.slots_stay.alone();
            let mut registry = self.registry.lock();
            let had = old.iter().flat_map(|slot| registry.walked.holes.within(slot.guest())).collect();
            // What was unplugged of memory that goes on in another slot is unplugged still.
            let both = old.iter().flat_map(|old| new.iter().filter_map(|new| old.in_common(new)));
            let kept: Vec<GpaRange> = both.flat_map(|part| registry.walked.holes.within(part)).collect();
            for slot in old {
                slot.retire();
                registry.walked.remove(slot.id());
            }
            new.iter().for_each(|slot| registry.walked.insert(Arc::clone(slot)));
            holes.iter().chain(&kept).for_each(|&hole| registry.walked.holes.insert(hole));
            self.serve(registry.walked.clone());
            had
        };
        Ok((finish_all(windows), had))
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let members = core::mem::take(&mut self.registry.lock().members);
        for member in members {
            // Nobody is left to be told of a failure; nobody can open a window any more either.
            let _ = member.leave(self, subscription::Leaving::Outside);
        }
    }
}

/// Count and sequence, read in the order in which a fault of Linux's kind has to read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Windows in progress.
    pub count: usize,
    /// Windows finished since the space was made, modulo 2^64: also those that were refused when they had begun to open.
    pub sequence: u64,
}

/// How a space is made.
pub struct SpaceBuilder {
    page_size: u64,
    sink: Box<dyn DirtySink>,
    reclaim: Option<Reclaim>,
}

impl fmt::Debug for SpaceBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpaceBuilder").field("page_size", &self.page_size).finish_non_exhaustive()
    }
}

/// A page size that is no power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("page size {bytes:#x} is not a power of two")]
pub struct PageSizeError {
    /// Bytes asked for.
    pub bytes: u64,
}

impl SpaceBuilder {
    /// Bytes of the pages that slots are made of and `change_pte` repoints; 4096 unless said.
    ///
    /// # Errors
    /// [`PageSizeError`] where `bytes` is not a power of two.
    pub fn page_size(mut self, bytes: u64) -> Result<Self, PageSizeError> {
        if !bytes.is_power_of_two() {
            return Err(PageSizeError { bytes });
        }
        self.page_size = bytes;
        Ok(self)
    }

    /// Where dirty facts go; nowhere unless said.
    #[must_use]
    pub fn dirty_sink(mut self, sink: impl DirtySink + 'static) -> Self {
        self.sink = Box::new(sink);
        self
    }

    /// Gives the space a collector of its own for the table pages of its tables: no thread that is inside another space's table
    /// keeps them from being freed, and they are, at the latest, with the space. Pins are slower, and allocate. Always so
    /// without std.
    #[must_use]
    pub fn private_reclaim(mut self) -> Self {
        self.reclaim = Some(Reclaim::private());
        self
    }

    /// For models that are not about reclamation.
    #[cfg(loom)]
    #[must_use]
    pub fn no_reclaim(mut self) -> Self {
        self.reclaim = Some(Reclaim::never());
        self
    }

    /// For models of reclamation: what is unlinked is freed as soon as it may be.
    #[cfg(loom)]
    #[must_use]
    pub fn soonest_reclaim(mut self) -> Self {
        self.reclaim = Some(Reclaim::soonest());
        self
    }

    /// The space.
    pub fn build(self) -> Space {
        let inner = |me: &alloc::sync::Weak<Inner>| Inner {
            count: AtomicUsize::new(0),
            sequence: AtomicU64::new(0),
            registry: Mutex::new(Registry {
                windows: Vec::new(),
                members: Vec::new(),
                walked: SlotMap::default(),
                next_window: 0,
                next_subscriber: 0,
                next_slot: 0,
            }),
            open: Snapshot::new(OpenWindows::new(&[])),
            slots: Snapshot::new(SlotMap::default()),
            slots_generation: AtomicU64::new(0),
            lines: Snapshot::new(Vec::new()),
            walkers: Mutex::new(()),
            slot_changes: Mutex::new(()),
            slots_stay: Gate::default(),
            me: me.clone(),
            leases: crate::lease::Leases::default(),
            counters: WindowCounters::default(),
            reclaim: self.reclaim.unwrap_or_else(Reclaim::shared),
            page_size: self.page_size,
            sink: self.sink,
            unfinished: SegQueue::new(),
            unreleased: SegQueue::new(),
            reaping: Mutex::new(()),
            reaper: Mutex::default(),
        };
        Space(Arc::new_cyclic(inner))
    }
}

/// One guest's memory and everybody who keeps a second copy of its translations (Linux: what `struct kvm` has of an
/// `mmu_notifier`). A handle: clones are the same space.
#[derive(Debug, Clone)]
pub struct Space(Arc<Inner>);

impl Default for Space {
    fn default() -> Self {
        Self::new()
    }
}

impl PartialEq for Space {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl Eq for Space {}

impl Space {
    /// A space with pages of 4096 bytes, no slots and nobody in it.
    pub fn new() -> Self {
        Self::builder().build()
    }

    /// A space made to measure.
    pub fn builder() -> SpaceBuilder {
        SpaceBuilder { page_size: 4096, sink: Box::new(()), reclaim: None }
    }

    pub(crate) fn from_inner(inner: Arc<Inner>) -> Self {
        Self(inner)
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.0
    }

    #[inline]
    pub(crate) fn inner_ptr(&self) -> *const Inner {
        Arc::as_ptr(&self.0)
    }

    /// Bytes of a page.
    pub fn page_size(&self) -> u64 {
        self.0.page_size
    }

    // ---- windows ----

    /// Opens a window over `range` after which nobody translates it. Leases over it refuse it; see [`Space::window`]
    /// for more choice.
    ///
    /// Windows say who may translate, not who may change the host: Zapped windows may overlap each other, and Retained ones.
    /// Two threads that change the same host pages (a balloon and a merger) need a lock of their own.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn zap<A: WindowAddress>(&self, range: AddrRange<A>) -> Result<InvalidationGuard<'_, Zapped, A>, OpenError> {
        self.window(range).open_zapped()
    }

    /// Opens a window over `range` after which whoever translates it does so read-only: the window in which
    /// [`change_pte`](InvalidationGuard::change_pte) works. Leases over it refuse it; see [`Space::window`] for more
    /// choice.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn retain<A: WindowAddress>(
        &self,
        range: AddrRange<A>,
    ) -> Result<InvalidationGuard<'_, Retained, A>, OpenError> {
        self.window(range).open_retained()
    }

    /// A window over `range`, with choices.
    pub fn window<A: WindowAddress>(&self, range: AddrRange<A>) -> WindowBuilder<'_, A> {
        WindowBuilder { space: self, range, options: OpenOptions::default() }
    }

    /// Count and sequence, for observers that want Linux's cheap test.
    pub fn progress(&self) -> Progress {
        let count = self.0.count.load(Ordering::Relaxed);
        // I2, the observer's half: whoever saw the count fall sees the sequence moved.
        fence(Ordering::Acquire);
        // Acquire: what is looked up after this is not older than the sequence says.
        Progress { count, sequence: self.0.sequence.load(Ordering::Acquire) }
    }

    /// Linux's test (`mmu_invalidate_retry`): whether something looked up after the sequence was read as `snapshot` may
    /// be out of date. Coarse: any window anywhere says so. As in Linux, it decides something only under a lock that the
    /// subscriber's start takes too; without one it is a hint.
    pub fn must_retry(&self, snapshot: u64) -> bool {
        let now = self.progress();
        now.count != 0 || now.sequence != snapshot
    }

    /// Tries to finish windows whose guards went away without finishing them, and to release subscribers that could not leave; how
    /// many of both are left after that. With std a thread does this by itself, and what it has in hand is not counted.
    ///
    /// Without std nobody else does: call it from a loop that waits for nothing (an idle loop, a timer's thread), after owned
    /// guards were dropped and after a close or a flush has failed. Until then such a window stays open, and whoever waits for it
    /// waits ([`Retry::wait`](crate::Retry::wait)). It calls subscribers, and so flushes and waits for scopes: inside a scope or a
    /// callback of this space it does nothing, and it is not for interrupt handlers (nothing of this crate is: they would wait
    /// for locks of the thread they interrupt).
    pub fn reap(&self) -> usize {
        self.0.reap()
    }

    // ---- walkers, faults, leases ----

    /// A walker: for each vCPU thread and each device that walks tables or faults.
    pub fn walker(&self) -> Walker {
        let _one_at_a_time = self.0.walkers.lock();
        let lines = self.0.lines.load();
        let free = lines.iter().find(|line| !line.in_use.load(Ordering::Acquire));
        let line = match free {
            Some(line) => Arc::clone(line),
            None => {
                let line = Arc::new(Line::default());
                let mut all = (*lines).clone();
                all.push(Arc::clone(&line));
                // Before the line's first fence: a window that does not see the line is seen by its first fault.
                self.0.lines.store(all);
                line
            }
        };
        line.in_use.store(true, Ordering::Relaxed);
        Walker::new(Arc::clone(&self.0), line)
    }

    /// Runs an operation that adds rights but needs no lookup, under a fault of its own over `range`.
    ///
    /// # Errors
    /// See [`FaultError`].
    pub fn admit<R>(&self, range: GpaRange, operation: impl FnOnce(&Admission<'_>) -> R) -> Result<R, FaultError> {
        let mut walker = self.walker();
        let fault: Fault<'_> = walker.fault(range)?;
        Ok(fault.admit(operation))
    }

    /// Takes a lease outside any scope: for what is translated after it.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn lease(&self, request: LeaseRequest) -> Result<Lease, LeaseError> {
        Lease::take(&self.0, request)
    }

    /// Waits for every scope that is open now: a flush's half of the bargain with software walkers.
    ///
    /// # Errors
    /// [`ScopeWaitError::InScope`] inside one's own scope, [`ScopeWaitError::WouldBlock`] with `nonblocking`.
    pub fn wait_for_scopes(&self, nonblocking: bool) -> Result<(), ScopeWaitError> {
        wait_for_scopes(&self.0, nonblocking)
    }

    /// Gives table pages that are no longer linked back to their source, as far as nobody can still be looking at them; how many
    /// are left. A scope that was entered before a page was unlinked keeps it, and so does any operation that is under way: of any
    /// space of the process, unless this one has a [collector of its own](SpaceBuilder::private_reclaim). Inside a scope of
    /// one's own little comes back.
    ///
    /// Nobody has to call this: operations that unlink pages collect those of earlier ones, and so do a table that goes and one that
    /// finds its source empty. It is for whoever wants to count pages.
    pub fn collect(&self) -> usize {
        self.0.reclaim.collect()
    }

    /// Runs `free`, which gives so many pages back, once nobody can be looking at them.
    #[doc(hidden)]
    pub fn retire(&self, pages: usize, free: impl FnOnce() + Send + 'static) {
        self.0.reclaim.retire(pages, free);
    }

    /// Hands what was retired over, and frees some of what may be freed. The caller holds no claim.
    #[doc(hidden)]
    pub fn hand_over(&self) {
        self.0.reclaim.hand_over();
    }

    /// Pins the calling thread: table pages that are reachable now stay in being.
    #[doc(hidden)]
    pub fn pin(&self) -> Pin {
        self.0.reclaim.pin()
    }

    /// Whether `pin` protects this space's tables.
    #[doc(hidden)]
    pub fn guards(&self, pin: &Pin) -> bool {
        self.0.reclaim.guards(pin)
    }

    // ---- subscribers ----

    /// Joins a subscriber to the whole space.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn subscribe(&self, subscriber: impl Subscriber + 'static) -> Result<Subscription, JoinError> {
        self.subscribe_to(Interest::Whole, subscriber)
    }

    /// Joins a subscriber that is told of a part of the space.
    ///
    /// # Errors
    /// See [`JoinError`].
    pub fn subscribe_to(
        &self,
        interest: Interest,
        subscriber: impl Subscriber + 'static,
    ) -> Result<Subscription, JoinError> {
        subscription::join(&self.0, interest, Box::new(subscriber))
    }

    /// Hands a dirty fact to the sink. Tables do this for what guests write through them. Whoever else changes guest memory does
    /// it himself, after the change: a device that writes under a [`Lease`](crate::Lease), a host that empties a page
    /// (a balloon, a discard), whatever writes through a mapping of its own.
    pub fn report_dirty(&self, range: GpaRange) {
        self.0.sink.dirty(range);
    }

    /// Whether anybody used a byte of `key` since it was last aged; makes it old everywhere.
    ///
    /// # Errors
    /// The first subscriber's error; the others were asked all the same.
    pub fn age(&self, key: impl Into<Key>) -> Result<bool, SubscriberError> {
        self.ask(key.into(), |subscriber, reach| subscriber.age(reach))
    }

    /// Whether anybody used a byte of `key` since it was last aged; changes nothing.
    ///
    /// # Errors
    /// The first subscriber's error; the others were asked all the same.
    pub fn test_age(&self, key: impl Into<Key>) -> Result<bool, SubscriberError> {
        self.ask(key.into(), |subscriber, reach| subscriber.test_age(reach))
    }

    fn ask(
        &self,
        key: Key,
        question: impl Fn(&dyn Subscriber, &[Stretch]) -> Result<bool, SubscriberError>,
    ) -> Result<bool, SubscriberError> {
        let (reach, members) = {
            let registry = self.0.registry.lock();
            (key.reach(&registry.walked), registry.members.clone())
        };
        let mut answer = Ok(false);
        for member in members.iter().filter(|member| member.interest().meets(&reach)) {
            match (member.try_call(&self.0, |subscriber| question(subscriber, &reach)), &mut answer) {
                (Some(Ok(young)), Ok(any)) => *any |= young,
                (Some(Err(error)), Ok(_)) => answer = Err(error),
                _ => {}
            }
        }
        answer
    }

    // ---- slots ----

    /// Adds a slot.
    ///
    /// # Errors
    /// See [`SlotError`]; nothing was added, but for [`SlotError::Close`].
    pub fn add_slot(&self, spec: SlotSpec) -> Result<SlotId, SlotError> {
        // One in, one out.
        self.replace_slots(&[], &[spec]).map(|ids| ids[0])
    }

    /// Removes a slot: it stops serving faults, is zapped and flushed everywhere, and then leaves what windows walk.
    ///
    /// # Errors
    /// See [`SlotError`]; the slot is still there, but for [`SlotError::Close`].
    pub fn remove_slot(&self, id: SlotId) -> Result<(), SlotError> {
        self.replace_slots(&[id], &[]).map(drop)
    }

    /// Removes some slots and adds others, in one step: faults see all of it or nothing. Windows may be open over any of
    /// it, and stay what they are. Every table drops what it has of all these slots; a new flag ([`SlotFlags`](crate::SlotFlags)) is a slot
    /// replaced by itself. Bytes that are not populated stay so where a new slot has them at the host address that they had (or at
    /// none, as they had).
    ///
    /// A [lease](crate::Lease) on any of it refuses the change. Where devices hold leases most of the time, wait for them in a window of
    /// one's own, and replace the slots inside it:
    ///
    /// ```
    /// # use notifier_core::{AddrRange, Gpa, Hva, LeasePolicy, SlotFlags, SlotSpec, Space};
    /// # let space = Space::new();
    /// # let guest = AddrRange::with_len(Gpa::new(0), 0x10_0000)?;
    /// # let spec = SlotSpec { guest, host: Some(Hva::new(0x7000_0000)), flags: SlotFlags::empty() };
    /// # let slot = space.add_slot(spec)?;
    /// let window = space.window(guest).leases(LeasePolicy::Wait).open_zapped()?;
    /// let logged = SlotSpec { flags: SlotFlags::LOG_DIRTY, ..spec };
    /// space.replace_slots(&[slot], &[logged])?;
    /// window.close()?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// See [`SlotError`]; nothing was changed, but for [`SlotError::Close`].
    pub fn replace_slots(&self, remove: &[SlotId], add: &[SlotSpec]) -> Result<Vec<SlotId>, SlotError> {
        let inner = &*self.0;
        if inner.in_callback() {
            return Err(SlotError::InCallback);
        }
        // Before the lock: whoever holds it may be waiting for this scope.
        if crate::scope::in_own_scope(inner) {
            return Err(SlotError::InScope);
        }
        let _one_at_a_time = inner.slot_changes.lock();
        let mut serving = (*inner.slots.load()).clone();
        let old: Vec<Arc<Slot>> = remove
            .iter()
            .map(|&id| serving.by_id(id).cloned().ok_or(SlotError::NoSlot { id }))
            .collect::<Result<_, _>>()?;
        remove.iter().for_each(|&id| serving.remove(id));
        let mut new = Vec::with_capacity(add.len());
        for &spec in add {
            let id = {
                let mut registry = inner.registry.lock();
                registry.next_slot += 1;
                SlotId(registry.next_slot)
            };
            let slot = serving.admit(id, spec, inner.page_size)?;
            serving.insert(Arc::clone(&slot));
            new.push(slot);
        }

        let (stuck, holes) = inner.swap_slots(&old, &new, &[])?;
        if let Some(cause) = stuck {
            return Err(SlotError::Close(cause));
        }
        for slot in &new {
            let mut populated = inner.slots.load().populated(slot).into_iter();
            if let Err((id, name, source)) = populated.try_for_each(|stretch| subscription::populate(inner, stretch)) {
                // Nobody keeps what not everybody can have: the slots become what they were.
                let back: Vec<_> = old.iter().map(|slot| slot.revived()).collect();
                if let (Some(cause), _) = inner.swap_slots(&new, &back, &holes)? {
                    return Err(SlotError::Close(cause));
                }
                for stretch in back.iter().flat_map(|slot| inner.slots.load().populated(slot)) {
                    // They had it before.
                    let _ = subscription::populate(inner, stretch);
                }
                return Err(OpenError::Subscriber { key: Key::Guest(slot.guest()), id, name, source }.into());
            }
        }
        Ok(new.iter().map(|slot| slot.id()).collect())
    }

    /// Replaces all slots by the regions of a guest memory.
    ///
    /// # Errors
    /// [`SlotError::NoHostAddress`] for a region that has none, and those of [`Space::replace_slots`].
    #[cfg(feature = "vm-memory")]
    pub fn set_memory<M: vm_memory::GuestMemoryBackend>(&self, memory: &M) -> Result<Vec<SlotId>, SlotError> {
        use crate::addr::Hva;
        use vm_memory::{GuestMemoryRegion, MemoryRegionAddress};
        let mut add = Vec::new();
        for region in memory.iter() {
            let start = Gpa::from(region.start_addr());
            let host =
                region.get_host_address(MemoryRegionAddress(0)).map_err(|_| SlotError::NoHostAddress { start })?;
            let Ok(guest) = AddrRange::with_len(start, region.len()) else { continue };
            add.push(SlotSpec { guest, host: Some(Hva::new(host as u64)), flags: Default::default() });
        }
        let remove: Vec<_> = self.0.slots.load().iter().map(|slot| slot.id()).collect();
        self.replace_slots(&remove, &add)
    }

    /// The slots that serve faults, ascending.
    pub fn slots(&self) -> Vec<(SlotId, SlotSpec)> {
        self.0.slots.load().iter().map(|slot| (slot.id(), slot.spec())).collect()
    }

    /// These guest bytes are populated (again): faults on them are served, and subscribers that map ahead are told.
    ///
    /// # Errors
    /// [`OpenError::Subscriber`] where a subscriber could not take them. What was not populated before is then not
    /// populated again (unless somebody has taken a lease on it meanwhile).
    pub fn populate(&self, range: GpaRange) -> Result<(), OpenError> {
        let inner = &*self.0;
        let key = Key::Guest(range);
        if inner.in_callback() {
            return Err(OpenError::InCallback { key });
        }
        if crate::scope::in_own_scope(inner) {
            return Err(OpenError::InScope { key });
        }
        let holes = inner.fill(range);
        let stretches: Vec<Stretch> = {
            let registry = inner.registry.lock();
            let within = |stretch: &Stretch| stretch.guest.is_some_and(|g| registry.walked.overlapping(g).is_some());
            registry.walked.stretches(range).into_iter().filter(within).collect()
        };
        for stretch in stretches {
            if let Err((id, name, source)) = subscription::populate(inner, stretch) {
                // What was a hole is one again, and nobody keeps what was mapped there meanwhile.
                for hole in holes {
                    if let Ok(record) = open(inner, Key::Guest(hole), Mode::Zapped, OpenOptions::default()) {
                        inner.discard(Key::Guest(hole));
                        if finish(inner, &record).is_err() {
                            inner.leave_unfinished(record);
                        }
                    }
                }
                return Err(OpenError::Subscriber { key, id, name, source });
            }
        }
        Ok(())
    }

    // ---- figures ----

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let windows = &self.0.counters;
        let mut all = Counters {
            windows: load(&windows.windows),
            changes: load(&windows.changes),
            absents: load(&windows.absents),
            zaps: load(&windows.zaps),
            vetoes: load(&windows.vetoes),
            unfinished: load(&windows.unfinished),
            ..Counters::default()
        };
        for line in self.0.lines.load().iter() {
            all.faults += load(&line.faults);
            all.retries += load(&line.retries);
            all.unrelated_retries += load(&line.unrelated_retries);
        }
        all
    }
}

/// How a window is to be opened.
#[derive(Debug, Clone, Copy)]
#[must_use = "nothing is opened yet"]
pub struct WindowBuilder<'s, A: WindowAddress> {
    space: &'s Space,
    range: AddrRange<A>,
    options: OpenOptions,
}

impl<'s, A: WindowAddress> WindowBuilder<'s, A> {
    /// What to do about leases over the range; [`LeasePolicy::Fail`] unless said.
    pub fn leases(mut self, policy: LeasePolicy) -> Self {
        self.options.leases = policy;
        self
    }

    /// Fail with [`OpenError::WouldBlock`] rather than wait for leases, scopes or subscribers. (Locks that are held for
    /// moments, and claims, are waited for all the same.)
    pub fn nonblocking(mut self) -> Self {
        self.options.nonblocking = true;
        self
    }

    fn open<'g, M: WindowMode>(self) -> Result<InvalidationGuard<'g, M, A>, OpenError> {
        let inner = self.space.inner();
        let record = open(inner, A::key(self.range), M::MODE, self.options)?;
        Ok(InvalidationGuard::new(Arc::clone(inner), record, self.range))
    }

    /// Opens it: afterwards nobody translates the range.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_zapped(self) -> Result<InvalidationGuard<'s, Zapped, A>, OpenError> {
        self.open()
    }

    /// Opens it: afterwards whoever translates the range does so read-only.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_retained(self) -> Result<InvalidationGuard<'s, Retained, A>, OpenError> {
        self.open()
    }

    /// As [`WindowBuilder::open_zapped`], with a guard that borrows nothing.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_zapped_owned(self) -> Result<OwnedInvalidationGuard<Zapped, A>, OpenError> {
        self.space.0.have_reaper();
        self.open().map(OwnedInvalidationGuard::new)
    }

    /// As [`WindowBuilder::open_retained`], with a guard that borrows nothing.
    ///
    /// # Errors
    /// See [`OpenError`].
    pub fn open_retained_owned(self) -> Result<OwnedInvalidationGuard<Retained, A>, OpenError> {
        self.space.0.have_reaper();
        self.open().map(OwnedInvalidationGuard::new)
    }
}
