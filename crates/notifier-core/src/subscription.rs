// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Joining and leaving.
//!
//! A subscription is a [`Subscription`] handle; dropping it leaves. Joining replays: the starts of the windows that are
//! open, then the ranges that are populated. It waits for no guard. Leaving returns when none of the subscriber's
//! callbacks runs, and none will.

use alloc::{boxed::Box, string::String, sync::Arc};
use core::fmt;

use crate::{
    primitive::{Condvar, Mutex},
    slots::Stretch,
    space::Inner,
    subscriber::{Coverage, Interest, Mode, Subscriber, SubscriberError, SubscriberId},
    window::{CloseCause, Participant},
};

/// Why a subscriber could not join. It is not part of the space, and was given no end it had no start for.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JoinError {
    /// It cannot follow at all, and its range is populated with a window open over it.
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
}

#[derive(Debug, Default)]
struct Calls {
    running: usize,
    /// No callback begins any more.
    left: bool,
    released: bool,
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

    pub(crate) fn pins(&self, reach: &[Stretch]) -> bool {
        self.subscriber.not_invalidatable().is_some_and(|part| part.meets(reach))
    }

    pub(crate) fn close_cause(&self, source: SubscriberError) -> CloseCause {
        CloseCause::Subscriber { id: self.id, name: self.name().into(), source }
    }

    /// Runs a callback; `None` if the subscriber has left.
    pub(crate) fn call<R>(
        &self,
        inner: &Inner,
        callback: impl FnOnce(&dyn Subscriber) -> Result<R, SubscriberError>,
    ) -> Option<Result<R, SubscriberError>> {
        {
            let mut calls = self.calls.lock();
            if calls.left {
                return None;
            }
            calls.running += 1;
        }
        let result = inner.callback(|| callback(&*self.subscriber));
        let release = {
            let mut calls = self.calls.lock();
            calls.running -= 1;
            if calls.running == 0 {
                self.idle.notify_all();
            }
            // It was dropped inside one of its own callbacks: the last one out releases.
            let last = calls.left && calls.running == 0 && !calls.released;
            calls.released |= last;
            last
        };
        if release {
            self.release(inner);
        }
        Some(result)
    }

    fn release(&self, inner: &Inner) {
        let _ = inner.callback(|| {
            self.subscriber.release();
            Ok(())
        });
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
            if calls.released {
                return;
            }
            calls.released = true;
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
    /// [`LeaveError::InCallback`] inside a callback of the same space.
    pub fn leave(mut self) -> Result<(), LeaveError> {
        if self.inner.in_callback() {
            return Err(LeaveError::InCallback(self));
        }
        self.end(true);
        Ok(())
    }

    fn end(&mut self, wait: bool) {
        if let Some(member) = self.member.take() {
            remove(&self.inner, &member, wait);
        }
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // Inside a callback waiting could be waiting for oneself: the last callback out releases instead.
        let wait = !self.inner.in_callback();
        self.end(wait);
    }
}

fn remove(inner: &Inner, member: &Arc<Member>, wait: bool) {
    inner.registry.lock().members.retain(|other| !Arc::ptr_eq(other, member));
    member.leave(inner, wait);
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
    subscriber.joined(id);
    let member = Member::new(id, interest, subscriber);
    // In one hold: from here on every new window starts this member itself, and every window that is open has it as a
    // participant that this thread starts (or that the window's end finds waiting, and lets be).
    let (replay, populated) = {
        let mut registry = inner.registry.lock();
        registry.members.push(Arc::clone(&member));
        let mut replay = alloc::vec::Vec::new();
        for record in registry.windows.iter().filter(|record| interest.meets(record.reach())) {
            let participant = Participant::new(Arc::clone(&member));
            record.join(Arc::clone(&participant));
            replay.push((Arc::clone(record), participant));
        }
        (replay, registry.populated())
    };
    let subscription = Subscription { inner: Arc::clone(inner), member: Some(Arc::clone(&member)), id };
    for (record, participant) in replay {
        if let Err(source) = participant.start(inner, &record, false) {
            return Err(JoinError::Replay { name: member.name().into(), source });
        }
    }
    for stretch in populated.iter().filter(|stretch| interest.meets(core::slice::from_ref(*stretch))) {
        if let Some(Err(source)) = member.call(inner, |subscriber| subscriber.populate(stretch)) {
            return Err(JoinError::Populate { name: member.name().into(), source });
        }
    }
    Ok(subscription)
}

/// Tells every subscriber that `stretch` is there now; on failure, those that were told zap it again.
pub(crate) fn populate(inner: &Inner, stretch: Stretch) -> Result<(), (SubscriberId, String, SubscriberError)> {
    let members = inner.registry.lock().members.clone();
    let reach = core::slice::from_ref(&stretch);
    let mut told = alloc::vec::Vec::new();
    for member in members.iter().filter(|member| member.interest().meets(reach)) {
        match member.call(inner, |subscriber| subscriber.populate(&stretch)) {
            Some(Err(source)) => {
                let part = Coverage { window: 0, mode: Mode::Zapped, reach, nonblocking: false };
                for member in told.iter().rev() {
                    let member: &Arc<Member> = member;
                    let _ = member.call(inner, |subscriber| subscriber.zap(&part));
                }
                return Err((member.id(), member.name().into(), source));
            }
            Some(Ok(())) => told.push(Arc::clone(member)),
            None => {}
        }
    }
    Ok(())
}
