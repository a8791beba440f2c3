// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Joining and leaving.
//!
//! A subscription is a [`Subscription`] handle; dropping it leaves. Joining replays: the starts of the windows that are
//! open, then the ranges that are populated. It waits for no guard. Leaving returns when none of the subscriber's
//! callbacks runs, and none will.

use alloc::{boxed::Box, string::String, sync::Arc, vec::Vec};
use core::fmt;

use crate::{
    primitive::{Condvar, Mutex},
    scope::in_own_scope,
    slots::Stretch,
    space::Inner,
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
        Arc::new(Self { id, interest, subscriber, calls: Mutex::default(), idle: Condvar::new() })
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
    /// it is leaving (or joining) this waits, or with `nonblocking` fails.
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
            self.release(inner);
        }
        result
    }

    /// Tells the subscriber that it has joined, and lets callbacks begin.
    fn join(&self, inner: &Inner) -> Result<(), SubscriberError> {
        let result = inner.callback(|| {
            self.subscriber.joined(self.id);
            Ok(())
        });
        let mut calls = self.calls.lock();
        if result.is_ok() {
            calls.joined = true;
        } else {
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
    fn release(&self, inner: &Inner) {
        let _ = inner.callback(|| {
            self.subscriber.release();
            Ok(())
        });
        self.calls.lock().released = true;
        self.idle.notify_all();
        self.forget(inner);
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

    /// No callback begins from now on; with `wait`, returns when none runs, and releases.
    pub(crate) fn leave(&self, inner: &Inner, wait: bool) {
        {
            let mut calls = self.calls.lock();
            calls.left = true;
            if calls.running != 0 && !wait {
                return;
            }
            while calls.running != 0 {
                calls = self.idle.wait(&self.calls, calls);
            }
            if calls.releasing {
                // The last callback was quicker. With `wait` that is somebody else.
                while wait && !calls.released {
                    calls = self.idle.wait(&self.calls, calls);
                }
                return;
            }
            calls.releasing = true;
        }
        self.release(inner);
    }
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
    /// [`LeaveError::InCallback`] inside a callback of the same space, [`LeaveError::InScope`] inside one's own scope.
    pub fn leave(mut self) -> Result<(), LeaveError> {
        if self.inner.in_callback() {
            return Err(LeaveError::InCallback(self));
        }
        if in_own_scope(&self.inner) {
            return Err(LeaveError::InScope(self));
        }
        self.end(true);
        Ok(())
    }

    fn end(&mut self, wait: bool) {
        if let Some(member) = self.member.take() {
            member.leave(&self.inner, wait);
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // Inside a callback, or a scope, waiting could be waiting for oneself: the last callback out releases instead.
        let wait = !self.inner.in_callback() && !in_own_scope(&self.inner);
        self.end(wait);
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
