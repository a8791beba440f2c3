// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Joining and leaving.
//!
//! A subscription is a [`Subscription`] handle; dropping it leaves. Joining replays: the starts of the windows that are
//! open, then the ranges that are populated. It waits for no guard. Leaving returns when none of the subscriber's
//! callbacks runs, and none will.

use alloc::{
    boxed::Box,
    string::String,
    sync::{Arc, Weak},
    vec::Vec,
};
use core::fmt;

use crossbeam_queue::SegQueue;

use crate::{
    addr::GpaRange,
    primitive::{AtomicBool, Condvar, Mutex, Ordering, fence},
    scope::in_own_scope,
    slots::Stretch,
    space::{Inner, Space},
    subscriber::{Coverage, Interest, Mode, Subscriber, SubscriberError, SubscriberId},
    window::{CloseCause, Participant},
};

/// Why a subscriber could not join. It is not part of the space, and was given no end it had no start for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// It failed to take the start of a window that is open.
    #[error("{name} refused the replay of an open window: {source}")]
    Replay {
        /// The subscriber's name.
        name: String,
        /// Its error.
        source: SubscriberError,
    },
    /// It could not take a populated range.
    #[error("{name} refused a populated range: {source}")]
    Populate {
        /// The subscriber's name.
        name: String,
        /// Its error.
        source: SubscriberError,
    },
    /// It failed (panicked) when it was told that it had joined.
    #[error("{name} failed to join: {source}")]
    Joined {
        /// The subscriber's name.
        name: String,
        /// Its error.
        source: SubscriberError,
    },
    /// The caller is a subscriber's callback of this space.
    #[error("joined inside a subscriber's callback")]
    InCallback,
}

/// Why a subscriber did not leave.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LeaveError {
    /// The caller is a subscriber's callback of this space: it would wait for itself. Here is the subscription again.
    #[error("left inside a subscriber's callback")]
    InCallback(Subscription),
    /// The calling thread is inside a scope of this space: a callback that runs may be waiting for that scope. Here is the
    /// subscription again.
    #[error("left inside the caller's own scope")]
    InScope(Subscription),
    /// Its release failed. It is not told of anything any more, but may still translate: windows over its bytes try the
    /// release again, and are refused while it fails.
    #[error("{id} could not give up what it translates: {source}")]
    Release {
        /// Which subscriber.
        id: SubscriberId,
        /// Its error.
        source: SubscriberError,
    },
}

/// A subscriber's place in a space: what it shows to [`Admission::check_for`](crate::Admission::check_for) when it
/// installs. Handed out by [`Subscriber::joined`] alone, and good until it leaves.
#[derive(Debug, Clone)]
pub struct Membership {
    space: Weak<Inner>,
    id: SubscriberId,
    interest: Interest,
    live: Arc<AtomicBool>,
}

impl Membership {
    /// The subscription's number.
    pub fn id(&self) -> SubscriberId {
        self.id
    }

    /// Which bytes the subscriber is told of: it may translate no others.
    pub fn interest(&self) -> Interest {
        self.interest
    }

    /// Whether the subscriber has not left.
    pub fn is_live(&self) -> bool {
        self.live.load(Ordering::Relaxed)
    }

    /// Whether this is a place in `space`.
    pub fn is_of(&self, space: &Space) -> bool {
        self.is_in(space.inner_ptr())
    }

    pub(crate) fn is_in(&self, space: *const Inner) -> bool {
        core::ptr::eq(self.space.as_ptr(), space)
    }

    /// Whether windows over any byte of `place` reach the subscriber.
    pub(crate) fn covers(&self, place: &Stretch) -> bool {
        match self.interest {
            Interest::Whole => true,
            Interest::Guest(mine) => place.guest.is_some_and(|guest| mine.covers(&guest)),
            Interest::Host(mine) => place.host.is_some_and(|host| mine.covers(&host)),
        }
    }

    /// Hands a dirty fact to the space's sink.
    pub fn report_dirty(&self, range: GpaRange) {
        if let Some(inner) = self.space.upgrade() {
            Space::from_inner(inner).report_dirty(range);
        }
    }
}

#[derive(Debug, Default)]
struct Calls {
    running: usize,
    /// It was told that it has joined: callbacks may begin.
    joined: bool,
    /// No callback begins any more.
    left: bool,
    /// Somebody runs its release, or has run it.
    releasing: bool,
    /// Its release failed, or could not be run where it left: whoever needs it gone tries (again).
    stuck: bool,
    /// The reaper has been told of it and has not come to it yet.
    queued: bool,
    /// It translates nothing any more.
    released: bool,
}

impl Calls {
    /// It may still translate, and cannot be called: a window has to wait.
    fn in_between(&self) -> bool {
        if self.left { !self.released } else { !self.joined }
    }
}

/// A subscriber as the space knows it.
pub(crate) struct Member {
    id: SubscriberId,
    interest: Interest,
    subscriber: Box<dyn Subscriber>,
    /// Cleared when it leaves: installs ask for it after their claim (see [`Membership`]).
    live: Arc<AtomicBool>,
    calls: Mutex<Calls>,
    idle: Condvar,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("id", &self.id).field("name", &self.name()).finish_non_exhaustive()
    }
}

impl Member {
    pub(crate) fn new(id: SubscriberId, interest: Interest, subscriber: Box<dyn Subscriber>) -> Arc<Self> {
        let live = Arc::new(AtomicBool::new(true));
        Arc::new(Self { id, interest, subscriber, live, calls: Mutex::default(), idle: Condvar::new() })
    }

    pub(crate) fn id(&self) -> SubscriberId {
        self.id
    }

    pub(crate) fn name(&self) -> &str {
        self.subscriber.name()
    }

    pub(crate) fn interest(&self) -> Interest {
        self.interest
    }

    pub(crate) fn close_cause(&self, source: SubscriberError) -> CloseCause {
        CloseCause::Subscriber { id: self.id, name: self.name().into(), source }
    }

    /// Runs a callback that a window depends on. `None` if the subscriber has left, and then it has released too: while
    /// it is leaving (or joining) this waits, or with `nonblocking` fails. Where its release failed it is tried again here:
    /// it may still translate, and nobody else can make it stop.
    pub(crate) fn call<R>(
        &self,
        inner: &Inner,
        nonblocking: bool,
        callback: impl FnOnce(&dyn Subscriber) -> Result<R, SubscriberError>,
    ) -> Option<Result<R, SubscriberError>> {
        {
            let mut calls = self.calls.lock();
            while calls.in_between() {
                if nonblocking {
                    return Some(Err(SubscriberError::WouldBlock));
                }
                if core::mem::take(&mut calls.stuck) {
                    drop(calls);
                    return self.release_or_leave(inner).err().map(Err);
                }
                calls = self.idle.wait(&self.calls, calls);
            }
            if calls.left {
                return None;
            }
            calls.running += 1;
        }
        Some(self.run(inner, callback))
    }

    /// Runs a callback that nobody depends on; `None` if the subscriber has left, or is about to, or has not yet joined.
    pub(crate) fn try_call<R>(
        &self,
        inner: &Inner,
        callback: impl FnOnce(&dyn Subscriber) -> Result<R, SubscriberError>,
    ) -> Option<Result<R, SubscriberError>> {
        {
            let mut calls = self.calls.lock();
            if calls.left || !calls.joined {
                return None;
            }
            calls.running += 1;
        }
        Some(self.run(inner, callback))
    }

    fn run<R>(
        &self,
        inner: &Inner,
        callback: impl FnOnce(&dyn Subscriber) -> Result<R, SubscriberError>,
    ) -> Result<R, SubscriberError> {
        let result = inner.callback(|| callback(&*self.subscriber));
        let release = {
            let mut calls = self.calls.lock();
            calls.running -= 1;
            if calls.running == 0 {
                self.idle.notify_all();
            }
            // It was dropped inside one of its own callbacks: the last one out releases.
            let last = calls.left && calls.running == 0 && !calls.releasing;
            calls.releasing |= last;
            last
        };
        if release {
            // Where it fails, the next window over its interest tries again, and the reaper.
            let _ = self.release_or_leave(inner);
        }
        result
    }

    /// Tells the subscriber that it has joined, and lets callbacks begin.
    fn join(&self, inner: &Inner) -> Result<(), SubscriberError> {
        let membership =
            Membership { space: inner.me.clone(), id: self.id, interest: self.interest, live: Arc::clone(&self.live) };
        let result = inner.callback(|| self.subscriber.joined(membership));
        let mut calls = self.calls.lock();
        if result.is_ok() {
            calls.joined = true;
        } else {
            self.live.store(false, Ordering::Relaxed);
            (calls.left, calls.releasing, calls.released) = (true, true, true);
        }
        drop(calls);
        self.idle.notify_all();
        if result.is_err() {
            self.forget(inner);
        }
        result
    }

    /// It leaves the registry last: as long as it may translate anything, windows find it there and wait.
    fn release(&self, inner: &Inner) -> Result<(), SubscriberError> {
        self.live.store(false, Ordering::Relaxed);
        // Whoever claims after this fence sees that it has left; whoever claimed before is found by the release's walk.
        fence(Ordering::SeqCst);
        let result = inner.callback(|| self.subscriber.release());
        {
            let mut calls = self.calls.lock();
            calls.released = result.is_ok();
            calls.stuck = result.is_err();
        }
        self.idle.notify_all();
        if result.is_ok() {
            self.forget(inner);
        }
        result
    }

    /// Runs the release; where it fails, the reaper has it.
    fn release_or_leave(&self, inner: &Inner) -> Result<(), SubscriberError> {
        self.release(inner).inspect_err(|_| self.leave_to_reaper(inner))
    }

    /// Queues it for the reaper, once: whoever tries in vain while it is queued adds nothing. (The reaper itself is one of
    /// those, where it finishes a window.)
    fn leave_to_reaper(&self, inner: &Inner) {
        if !core::mem::replace(&mut self.calls.lock().queued, true) {
            inner.leave_unreleased(self.id);
        }
    }

    /// For the reaper, who has taken it out of the queue: tries again, and puts it back where that fails. Whether the
    /// subscriber is gone, or somebody else's.
    pub(crate) fn reap(&self, inner: &Inner, unreleased: &SegQueue<SubscriberId>) -> bool {
        self.calls.lock().queued = false;
        let gone = self.release_again(inner);
        if !gone && !core::mem::replace(&mut self.calls.lock().queued, true) {
            unreleased.push(self.id);
        }
        gone
    }

    /// Tries a release that failed, or that could not be run, again. Whether the subscriber is gone.
    fn release_again(&self, inner: &Inner) -> bool {
        if !core::mem::take(&mut self.calls.lock().stuck) {
            // Somebody else is at it.
            return true;
        }
        self.release(inner).is_ok()
    }

    fn forget(&self, inner: &Inner) {
        let mut gone = Vec::new();
        {
            let mut registry = inner.registry.lock();
            let at = registry.members.iter().position(|other| other.id == self.id);
            gone.extend(at.map(|at| registry.members.remove(at)));
        }
        // What is the user's is dropped outside the lock.
        drop(gone);
    }

    /// No callback begins from now on; returns when none runs, and it has released.
    ///
    /// # Errors
    /// The release's own: then it stays in the registry, and windows over its interest try again.
    pub(crate) fn leave(&self, inner: &Inner, from: Leaving) -> Result<(), SubscriberError> {
        let wait = from == Leaving::Outside;
        {
            let mut calls = self.calls.lock();
            calls.left = true;
            if calls.running != 0 && !wait {
                return Ok(());
            }
            if from == Leaving::Scope {
                // A release waits for scopes, the caller's among them: somebody else has to do it.
                (calls.releasing, calls.stuck) = (true, true);
                drop(calls);
                self.leave_to_reaper(inner);
                return Ok(());
            }
            while calls.running != 0 {
                calls = self.idle.wait(&self.calls, calls);
            }
            if calls.releasing {
                // The last callback was quicker. With `wait` that is somebody else.
                while wait && !calls.released && !calls.stuck {
                    calls = self.idle.wait(&self.calls, calls);
                }
                return Ok(());
            }
            calls.releasing = true;
        }
        self.release_or_leave(inner)
    }
}

/// Where a subscriber leaves from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leaving {
    /// Neither a callback nor a scope: it may wait.
    Outside,
    /// A callback: waiting could be waiting for oneself; the last callback out releases.
    Callback,
    /// One's own scope: the release would wait for it.
    Scope,
}

/// A place in a space. Dropping it leaves.
#[derive(Debug)]
#[must_use = "dropping a subscription leaves the space"]
pub struct Subscription {
    inner: Arc<Inner>,
    member: Option<Arc<Member>>,
    id: SubscriberId,
}

impl Subscription {
    /// The subscription's number.
    pub fn id(&self) -> SubscriberId {
        self.id
    }

    /// Leaves: returns when none of the subscriber's callbacks runs, and after its release.
    ///
    /// # Errors
    /// [`LeaveError::InCallback`] inside a callback of the same space, [`LeaveError::InScope`] inside one's own scope,
    /// [`LeaveError::Release`] where the subscriber's release failed.
    pub fn leave(mut self) -> Result<(), LeaveError> {
        if self.inner.in_callback() {
            return Err(LeaveError::InCallback(self));
        }
        if in_own_scope(&self.inner) {
            return Err(LeaveError::InScope(self));
        }
        self.end(Leaving::Outside).map_err(|source| LeaveError::Release { id: self.id, source })
    }

    fn end(&mut self, from: Leaving) -> Result<(), SubscriberError> {
        match self.member.take() {
            Some(member) => member.leave(&self.inner, from),
            None => Ok(()),
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let from = match (self.inner.in_callback(), in_own_scope(&self.inner)) {
            (true, _) => Leaving::Callback,
            (_, true) => Leaving::Scope,
            _ => Leaving::Outside,
        };
        // A release that fails keeps the subscriber in the registry: see `Member::call`.
        let _ = self.end(from);
    }
}

pub(crate) fn join(
    inner: &Arc<Inner>,
    interest: Interest,
    subscriber: Box<dyn Subscriber>,
) -> Result<Subscription, JoinError> {
    if inner.in_callback() {
        return Err(JoinError::InCallback);
    }
    let id = inner.registry.lock().next_subscriber();
    let member = Member::new(id, interest, subscriber);
    // In one hold: from here on every new window starts this member itself, and every window that is open has it as a
    // participant that this thread starts (or that the window's end finds waiting, and lets be).
    let (replay, populated) = {
        let mut registry = inner.registry.lock();
        registry.members.push(Arc::clone(&member));
        let mut replay = Vec::new();
        for record in registry.windows.iter().filter(|record| interest.meets(record.reach())) {
            let participant = Participant::new(Arc::clone(&member));
            record.join(Arc::clone(&participant));
            replay.push((Arc::clone(record), participant));
        }
        (replay, registry.populated())
    };
    // Only now, when no window overlooks it, may it begin to translate. Windows that open meanwhile wait for this.
    if let Err(source) = member.join(inner) {
        return Err(JoinError::Joined { name: member.name().into(), source });
    }
    let subscription = Subscription { inner: Arc::clone(inner), member: Some(Arc::clone(&member)), id };
    for (record, participant) in replay {
        if let Err(source) = participant.start(inner, &record, false) {
            return Err(JoinError::Replay { name: member.name().into(), source });
        }
    }
    for stretch in populated.iter().filter(|stretch| interest.meets(core::slice::from_ref(*stretch))) {
        if let Some(Err(source)) = member.try_call(inner, |subscriber| subscriber.populate(stretch)) {
            return Err(JoinError::Populate { name: member.name().into(), source });
        }
    }
    Ok(subscription)
}

/// Tells every subscriber that `stretch` is there now; on failure, those that were told zap it again.
pub(crate) fn populate(inner: &Inner, stretch: Stretch) -> Result<(), (SubscriberId, String, SubscriberError)> {
    let members = inner.registry.lock().members.clone();
    let reach = core::slice::from_ref(&stretch);
    let mut told = Vec::new();
    for member in members.iter().filter(|member| member.interest().meets(reach)) {
        match member.try_call(inner, |subscriber| subscriber.populate(&stretch)) {
            Some(Err(source)) => {
                let part = Coverage { window: 0, mode: Mode::Zapped, reach, nonblocking: false };
                for member in told.iter().rev() {
                    let member: &Arc<Member> = member;
                    let _ = member.try_call(inner, |subscriber| subscriber.zap(&part));
                }
                return Err((member.id(), member.name().into(), source));
            }
            Some(Ok(())) => told.push(Arc::clone(member)),
            None => {}
        }
    }
    Ok(())
}
