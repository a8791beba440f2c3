// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The one place that knows which world this is compiled for: std, no_std, or the loom model checker.
//!
//! Everything in this workspace that two threads touch goes through here, so that what is model-checked is the shipped
//! code. Not a public API: other crates of the workspace use it, nobody else should.
//!
//! - Atomics and fences: `core`'s, or loom's.
//! - [`Mutex`], [`Condvar`]: parking_lot's; without std a spin lock and a spinning wait; under loom loom's.
//! - [`Snapshot`]: arc-swap's; without std a spin lock around an `Arc`; under loom an index with acquire and release
//!   ordering and nothing stronger, which is all that arc-swap promises.
//! - [`broken`]: under loom, names one thing that the shipped code then leaves out. A model is believed only when its
//!   twin with that thing left out is refuted. Outside loom it is a constant `false`.

use alloc::sync::Arc;

#[cfg(not(loom))]
pub use core::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
#[cfg(loom)]
pub use loom::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

/// What a broken twin of a model leaves out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Twin {
    /// Nothing: the shipped code.
    None = 0,
    /// The fence between a fault's publishing of its range and its look at the open windows.
    PublishFence,
    /// The fence between a window's record and its look at the faults.
    RecordFence,
    /// The fence between poisoning faults and walking the tables.
    PoisonFence,
    /// The fence between claiming an entry and reading one's own poison.
    ClaimFence,
    /// A window poisons no faults.
    Poison,
    /// A Retained window strips only the write bit and leaves the upgrade bit.
    RetainKeepsUpgrade,
    /// change_pte takes a claimed entry for an absent one.
    ChangeSkipsClaim,
    /// A closing window lowers the count before it moves the sequence.
    CountFirst,
    /// A fault publishes only the first page of its range: all that is published under it is checked for that page only.
    CheckFirstPageOnly,
    /// An unlink frees the table without exchanging its entries to DEAD.
    UnlinkLeavesChildren,
    /// Opening a window flushes only what it removed itself.
    OwedForgotten,
    /// The fence between entering a scope and the first walk.
    ScopeFence,
    /// A flush does not wait for scopes.
    FlushSkipsScopes,
    /// A collapse gives its leaf free before the facts of the children are in it.
    CollapseFreesEarly,
    /// A zap does not wait for claims.
    ZapSkipsClaim,
    /// What is retired is freed at once, whoever is pinned.
    RetireFrees,
    /// A collapse forgets the facts that the leaves gathered while they were claimed.
    CollapseForgetsFacts,
    /// An entry that was taken away is filled again whether its flush is complete or not.
    RefillUnflushed,
    /// A dissolved set gives each leaf the facts of its own entry alone.
    DissolveForgetsFacts,
    /// Whoever breaks a set takes the members that it finds, whatever became of the first.
    SetWithoutGate,
}

#[cfg(loom)]
std::thread_local! {
    static BROKEN: std::cell::Cell<u8> = const { std::cell::Cell::new(0) };
}

/// Whether the running model is the twin that leaves `what` out.
#[cfg(loom)]
pub fn broken(what: Twin) -> bool {
    BROKEN.with(|b| b.get() == what as u8)
}

/// Whether the running model is the twin that leaves `what` out: never, outside loom.
#[cfg(not(loom))]
#[inline(always)]
pub const fn broken(_what: Twin) -> bool {
    false
}

/// Chooses what this thread's models leave out from now on.
#[cfg(loom)]
pub fn set_broken(what: Twin) {
    BROKEN.with(|b| b.set(what as u8));
}

/// A fence that a model's twin may leave out.
#[inline(always)]
pub fn fence_unless(twin: Twin, order: Ordering) {
    if !broken(twin) {
        fence(order);
    }
}

/// A number that two running threads never share; 0 where that cannot be known.
#[cfg(all(feature = "std", not(loom)))]
pub fn context() -> usize {
    std::thread_local! {
        static MARK: u8 = const { 0 };
    }
    MARK.with(|mark| core::ptr::from_ref(mark) as usize)
}

/// A number that two running threads never share; 0 where that cannot be known.
#[cfg(any(not(feature = "std"), loom))]
pub fn context() -> usize {
    0
}

/// Runs code that may panic; `None` where it did. Without std a panic is final anyway.
pub fn caught<R>(code: impl FnOnce() -> R) -> Option<R> {
    #[cfg(all(feature = "std", not(loom)))]
    return std::panic::catch_unwind(core::panic::AssertUnwindSafe(code)).ok();
    #[cfg(any(not(feature = "std"), loom))]
    Some(code())
}

/// Waits for another thread's next step: spins a little, then gives the processor away.
#[derive(Debug, Default)]
pub struct Backoff {
    #[cfg_attr(loom, expect(dead_code, reason = "loom schedules by itself"))]
    round: u32,
}

impl Backoff {
    /// Nothing waited yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// One step of waiting.
    pub fn snooze(&mut self) {
        #[cfg(loom)]
        loom::thread::yield_now();
        #[cfg(all(feature = "std", not(loom)))]
        {
            // A claim is held for nanoseconds and a scope for microseconds, but their holder may have lost its
            // processor: after a short spin, let it run; after many turns, stop burning the processor altogether.
            match self.round {
                0..6 => (0..1 << self.round).for_each(|_| core::hint::spin_loop()),
                6..1024 => std::thread::yield_now(),
                _ => std::thread::sleep(core::time::Duration::from_micros(50)),
            }
            self.round = self.round.saturating_add(1);
        }
        #[cfg(all(not(feature = "std"), not(loom)))]
        {
            self.round = self.round.saturating_add(1);
            (0..1u32 << self.round.min(8)).for_each(|_| core::hint::spin_loop());
        }
    }
}

// ---- locks -------------------------------------------------------------------------------------------------------

#[cfg(all(feature = "std", not(loom)))]
mod lock {
    pub(super) use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
}
#[cfg(loom)]
mod lock {
    pub(super) use loom::sync::{Condvar, Mutex, MutexGuard, RwLock};
}
#[cfg(all(not(feature = "std"), not(loom)))]
mod lock {
    pub(super) use spin::{Mutex, MutexGuard, RwLock};
}

/// A mutual exclusion lock without poisoning.
#[derive(Debug, Default)]
pub struct Mutex<T>(lock::Mutex<T>);

/// Holds a [`Mutex`].
pub type MutexGuard<'a, T> = lock::MutexGuard<'a, T>;

impl<T> Mutex<T> {
    /// A lock around `value`.
    pub fn new(value: T) -> Self {
        Self(lock::Mutex::new(value))
    }

    /// Waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        #[cfg(not(loom))]
        return self.0.lock();
        #[cfg(loom)]
        return self.0.lock().unwrap();
    }
}

/// Lets many pass together, or one alone.
#[derive(Debug, Default)]
pub struct Gate(lock::RwLock<()>);

impl Gate {
    /// Passes, with others who do the same.
    pub fn together(&self) -> impl Drop + '_ {
        #[cfg(not(loom))]
        return self.0.read();
        #[cfg(loom)]
        return self.0.read().unwrap();
    }

    /// Passes when nobody else is inside, and keeps all others out.
    pub fn alone(&self) -> impl Drop + '_ {
        #[cfg(not(loom))]
        return self.0.write();
        #[cfg(loom)]
        return self.0.write().unwrap();
    }
}

/// Waits for a condition under a [`Mutex`].
#[derive(Debug, Default)]
pub struct Condvar {
    #[cfg(any(feature = "std", loom))]
    inner: lock::Condvar,
}

impl Condvar {
    /// A condition that nobody waits for yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Gives the lock away until somebody notifies (or for no reason), and takes it again.
    #[cfg(all(feature = "std", not(loom)))]
    pub fn wait<'a, T>(&self, _mutex: &'a Mutex<T>, mut guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.inner.wait(&mut guard);
        guard
    }

    /// Gives the lock away until somebody notifies (or for no reason), and takes it again.
    #[cfg(loom)]
    pub fn wait<'a, T>(&self, _mutex: &'a Mutex<T>, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.inner.wait(guard).unwrap()
    }

    /// Gives the lock away for a moment and takes it again: without std there is nothing to sleep on.
    #[cfg(all(not(feature = "std"), not(loom)))]
    pub fn wait<'a, T>(&self, mutex: &'a Mutex<T>, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        drop(guard);
        Backoff::new().snooze();
        mutex.lock()
    }

    /// As [`Condvar::wait`], but no longer than until `deadline`; `false` when that has passed.
    #[cfg(all(feature = "std", not(loom)))]
    pub fn wait_until<'a, T>(
        &self,
        mut guard: MutexGuard<'a, T>,
        deadline: std::time::Instant,
    ) -> (MutexGuard<'a, T>, bool) {
        let timed_out = self.inner.wait_until(&mut guard, deadline).timed_out();
        (guard, !timed_out)
    }

    /// Wakes all who wait.
    pub fn notify_all(&self) {
        #[cfg(any(feature = "std", loom))]
        self.inner.notify_all();
    }
}

// ---- set once ----------------------------------------------------------------------------------------------------

/// A value that is set once and read without waiting.
#[derive(Debug)]
pub struct SetOnce<T> {
    #[cfg(any(feature = "std", loom))]
    inner: std::sync::OnceLock<T>,
    #[cfg(all(not(feature = "std"), not(loom)))]
    inner: spin::Once<T>,
}

impl<T> Default for SetOnce<T> {
    fn default() -> Self {
        #[cfg(any(feature = "std", loom))]
        return Self { inner: std::sync::OnceLock::new() };
        #[cfg(all(not(feature = "std"), not(loom)))]
        return Self { inner: spin::Once::new() };
    }
}

impl<T> SetOnce<T> {
    /// Sets the value; `false` where it was set already.
    pub fn set(&self, value: T) -> bool {
        #[cfg(any(feature = "std", loom))]
        return self.inner.set(value).is_ok();
        #[cfg(all(not(feature = "std"), not(loom)))]
        {
            let mut set = false;
            self.inner.call_once(|| {
                set = true;
                value
            });
            set
        }
    }

    /// The value, if it is set.
    #[inline]
    pub fn get(&self) -> Option<&T> {
        self.inner.get()
    }
}

// ---- snapshots -----------------------------------------------------------------------------------------------------

/// A value that is read whole and replaced whole.
///
/// [`Snapshot::load`] is an acquire load, [`Snapshot::store`] a release store; nothing more may be relied on. Stores are
/// serialised by the caller.
pub struct Snapshot<T> {
    #[cfg(all(feature = "std", not(loom)))]
    inner: arc_swap::ArcSwap<T>,
    #[cfg(loom)]
    inner: (AtomicUsize, std::sync::Mutex<Vec<Arc<T>>>),
    #[cfg(all(not(feature = "std"), not(loom)))]
    inner: spin::RwLock<Arc<T>>,
}

/// One state of a [`Snapshot`], kept alive.
pub struct Loaded<T> {
    #[cfg(all(feature = "std", not(loom)))]
    inner: arc_swap::Guard<Arc<T>>,
    #[cfg(any(not(feature = "std"), loom))]
    inner: Arc<T>,
}

impl<T> Snapshot<T> {
    /// Begins with `value`.
    pub fn new(value: T) -> Self {
        let value = Arc::new(value);
        #[cfg(all(feature = "std", not(loom)))]
        return Self { inner: arc_swap::ArcSwap::new(value) };
        #[cfg(loom)]
        return Self { inner: (AtomicUsize::new(0), std::sync::Mutex::new(vec![value])) };
        #[cfg(all(not(feature = "std"), not(loom)))]
        return Self { inner: spin::RwLock::new(value) };
    }

    /// The state of now. Takes no lock and touches no counter that readers share (with std).
    #[inline]
    pub fn load(&self) -> Loaded<T> {
        #[cfg(all(feature = "std", not(loom)))]
        return Loaded { inner: self.inner.load() };
        #[cfg(loom)]
        {
            let index = self.inner.0.load(Ordering::Acquire);
            return Loaded { inner: Arc::clone(&self.inner.1.lock().unwrap()[index]) };
        }
        #[cfg(all(not(feature = "std"), not(loom)))]
        return Loaded { inner: Arc::clone(&self.inner.read()) };
    }

    /// Replaces the state. Callers serialise their stores by a lock of their own.
    pub fn store(&self, value: T) {
        let value = Arc::new(value);
        #[cfg(all(feature = "std", not(loom)))]
        self.inner.store(value);
        #[cfg(loom)]
        {
            let index = {
                let mut all = self.inner.1.lock().unwrap();
                all.push(value);
                all.len() - 1
            };
            self.inner.0.store(index, Ordering::Release);
        }
        #[cfg(all(not(feature = "std"), not(loom)))]
        {
            *self.inner.write() = value;
        }
    }
}

impl<T> core::ops::Deref for Loaded<T> {
    type Target = T;
    #[inline]
    fn deref(&self) -> &T {
        &self.inner
    }
}

impl<T: core::fmt::Debug> core::fmt::Debug for Snapshot<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.load().fmt(f)
    }
}

impl<T: core::fmt::Debug> core::fmt::Debug for Loaded<T> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        (**self).fmt(f)
    }
}

// ---- reclamation ---------------------------------------------------------------------------------------------------

/// Where memory that was unlinked waits until nobody can still be looking at it.
///
/// With std this is crossbeam-epoch's default collector, whose pin is a store and a fence on a line of the thread's own.
/// Without std (and under loom, and on request) each space has a collector of its own, and every pin registers a
/// participant for itself; [`Reclaim::pin`] then allocates.
#[derive(Debug, Clone)]
pub struct Reclaim {
    source: Source,
    /// Pieces that were retired here and are not freed yet. A figure: nothing is ordered by it, in models neither.
    waiting: Arc<core::sync::atomic::AtomicUsize>,
}

#[derive(Debug, Clone)]
enum Source {
    #[cfg(all(feature = "std", not(loom)))]
    Shared,
    Own(crossbeam_epoch::Collector),
    #[cfg(loom)]
    Never,
    #[cfg(loom)]
    Soonest(Arc<soonest::Grace>),
}

/// While one lives, no table page that was reachable when it was made is freed.
#[derive(Debug)]
pub struct Pin(Held);

#[derive(Debug)]
enum Held {
    Epoch(crossbeam_epoch::Guard),
    #[cfg(loom)]
    Nothing,
    #[cfg(loom)]
    Soonest(soonest::Held),
}

impl Pin {
    /// Runs `free` once nobody who was pinned before now is pinned any more.
    fn retire(&self, free: impl FnOnce() + Send + 'static) {
        if broken(Twin::RetireFrees) {
            return free();
        }
        match &self.0 {
            Held::Epoch(guard) => guard.defer(free),
            #[cfg(loom)]
            Held::Nothing => {}
            #[cfg(loom)]
            Held::Soonest(held) => held.retire(free),
        }
    }

    /// Gives what this thread has retired to all, and frees some of what may be freed.
    #[cfg(not(loom))]
    fn flush(&self) {
        let Held::Epoch(guard) = &self.0;
        guard.flush();
    }
}

impl Reclaim {
    /// The collector that all share where there is one.
    pub fn shared() -> Self {
        #[cfg(all(feature = "std", not(loom)))]
        return Self::of(Source::Shared);
        #[cfg(any(not(feature = "std"), loom))]
        return Self::private();
    }

    /// A collector of one's own: what it holds is freed, at the latest, with the last handle to it.
    pub fn private() -> Self {
        Self::of(Source::Own(crossbeam_epoch::Collector::new()))
    }

    /// For models that are about something else: what is retired is never freed, and pins cost nothing.
    #[cfg(loom)]
    pub fn never() -> Self {
        Self::of(Source::Never)
    }

    /// For models of reclamation: what is retired is freed at the first moment at which an epoch could free it. (Epochs
    /// themselves are crossbeam's to check, and under loom their lists are most of the state there is.)
    #[cfg(loom)]
    pub fn soonest() -> Self {
        Self::of(Source::Soonest(Arc::default()))
    }

    fn of(source: Source) -> Self {
        Self { source, waiting: Arc::default() }
    }

    /// Runs `free`, which frees so many pieces, once nobody who is pinned now is pinned any more. Until somebody
    /// [hands it over](Reclaim::hand_over) it may stay with this thread. A panic of `free` goes no further.
    pub fn retire(&self, pieces: usize, free: impl FnOnce() + Send + 'static) {
        use core::sync::atomic::Ordering::Relaxed;
        let waiting = Arc::clone(&self.waiting);
        waiting.fetch_add(pieces, Relaxed);
        self.pin().retire(move || {
            // Pieces that cannot be freed are no longer waited for.
            let _ = caught(free);
            waiting.fetch_sub(pieces, Relaxed);
        });
    }

    /// Gives what this thread has retired to all, if anything waits here, and frees some of what may be freed, whoever retired it:
    /// for moments in which nothing is held that a `free` could wait for.
    pub fn hand_over(&self) {
        #[cfg(not(loom))]
        if self.waiting() != 0 {
            self.pin().flush();
        }
    }

    /// Pieces that were retired here and are not freed yet.
    fn waiting(&self) -> usize {
        self.waiting.load(core::sync::atomic::Ordering::Relaxed)
    }

    /// Frees what may be freed, whoever retired it; how many pieces of ours are left. Each step moves an epoch on at most, and
    /// frees a part: a few are taken in any case, and no more where many in a row have freed nothing of ours.
    #[cfg(not(loom))]
    pub fn collect(&self) -> usize {
        let (mut left, mut idle) = (self.waiting(), 0);
        for step in 0..1024 {
            if idle >= 64 || step >= 4 && left == 0 {
                break;
            }
            self.pin().flush();
            let now = self.waiting();
            idle = if now < left { 0 } else { idle + 1 };
            left = now;
        }
        left
    }

    /// In models nothing is freed by asking for it.
    #[cfg(loom)]
    pub fn collect(&self) -> usize {
        self.waiting()
    }

    /// Pins the calling thread.
    #[inline]
    pub fn pin(&self) -> Pin {
        match &self.source {
            #[cfg(all(feature = "std", not(loom)))]
            Source::Shared => Pin(Held::Epoch(crossbeam_epoch::pin())),
            Source::Own(collector) => Pin(Held::Epoch(collector.register().pin())),
            #[cfg(loom)]
            Source::Never => Pin(Held::Nothing),
            #[cfg(loom)]
            Source::Soonest(grace) => Pin(Held::Soonest(soonest::pin(grace))),
        }
    }

    /// Whether `pin` protects what this collector holds.
    pub fn guards(&self, pin: &Pin) -> bool {
        match &self.source {
            #[cfg(all(feature = "std", not(loom)))]
            Source::Shared => true,
            Source::Own(collector) => match &pin.0 {
                Held::Epoch(guard) => guard.collector() == Some(collector),
                #[cfg(loom)]
                _ => false,
            },
            #[cfg(loom)]
            Source::Never | Source::Soonest(_) => true,
        }
    }
}

/// Grace as short as the contract of [`Pin::retire`] allows: what is retired waits for exactly those who are pinned then.
#[cfg(loom)]
mod soonest {
    use alloc::{boxed::Box, sync::Arc, vec::Vec};
    use core::fmt;

    use super::{AtomicUsize, Ordering, fence};

    #[derive(Default)]
    pub(super) struct Grace {
        /// Touched at every step, so that the order of steps is loom's to choose.
        steps: AtomicUsize,
        state: std::sync::Mutex<State>,
    }

    #[derive(Default)]
    struct State {
        next: u64,
        pinned: Vec<u64>,
        retired: Vec<Retired>,
    }

    /// Who is still waited for, and what for.
    type Retired = (Vec<u64>, Box<dyn FnOnce() + Send>);

    impl fmt::Debug for Grace {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.debug_struct("Grace").finish_non_exhaustive()
        }
    }

    #[derive(Debug)]
    pub(super) struct Held {
        grace: Arc<Grace>,
        id: u64,
    }

    impl Grace {
        /// One step; its fence is the one that an epoch has in the same place.
        fn step<R>(&self, step: impl FnOnce(&mut State) -> R) -> R {
            self.steps.fetch_add(1, Ordering::Relaxed);
            fence(Ordering::SeqCst);
            step(&mut self.state.lock().unwrap())
        }
    }

    pub(super) fn pin(grace: &Arc<Grace>) -> Held {
        let id = grace.step(|state| {
            state.next += 1;
            state.pinned.push(state.next);
            state.next
        });
        Held { grace: Arc::clone(grace), id }
    }

    impl Held {
        pub(super) fn retire(&self, free: impl FnOnce() + Send + 'static) {
            self.grace.step(|state| state.retired.push((state.pinned.clone(), Box::new(free))));
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            let free: Vec<_> = self.grace.step(|state| {
                state.pinned.retain(|id| *id != self.id);
                state.retired.iter_mut().for_each(|(waits, _)| waits.retain(|id| *id != self.id));
                let retired = core::mem::take(&mut state.retired);
                let (free, waiting) = retired.into_iter().partition(|(waits, _)| waits.is_empty());
                state.retired = waiting;
                free
            });
            free.into_iter().for_each(|(_, free)| free());
        }
    }
}
