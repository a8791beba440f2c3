// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Walkers and their scopes.
//!
//! Whoever walks a table in software (a vCPU thread, a device, an IOTLB) is a TLB: what it found may be in use until it
//! says otherwise. It says so by a [`Scope`]: enter, walk, use what was found, leave; as a vCPU is in guest mode. A flush
//! waits for every scope that was entered before it.
//!
//! # Why a flush misses no scope
//! Entering stores the scope to the walker's own line, then a SeqCst fence, then the walk loads entries. A remover
//! stores the entry, then a SeqCst fence (in [`wait_for_scopes`]), then loads the lines. Of two fences one comes first: if
//! the walker's does, the remover sees the scope and waits for it; if the remover's does, the walk sees the entry gone. The
//! exit is a release store that the waiting load acquires, so that everything the walker did inside its scope
//! happens before the flush returns. (Model: `scope_entry_against_flush`; its twins leave out the entry's fence, and the
//! waiting.)

use alloc::sync::Arc;
use core::marker::PhantomData;

use crate::{
    addr::GpaRange,
    fault::{Fault, FaultError, Line},
    lease::{Lease, LeaseError, LeaseRequest},
    primitive::{Backoff, Ordering, Pin, Twin, broken, context, fence, fence_unless},
    space::{Inner, Space},
};

/// One walker's place in a space: the cache line that it publishes its scopes and faults in.
///
/// A walker has one scope or one fault at a time. Walkers are made once for each vCPU thread or device and kept; making
/// one takes a lock.
#[derive(Debug)]
pub struct Walker {
    inner: Arc<Inner>,
    line: Arc<Line>,
}

impl Walker {
    pub(crate) fn new(inner: Arc<Inner>, line: Arc<Line>) -> Self {
        Self { inner, line }
    }

    /// The space this walker belongs to.
    pub fn space(&self) -> Space {
        Space::from_inner(Arc::clone(&self.inner))
    }

    /// Enters a scope. Cheap: two stores and a fence on this walker's own line, and an epoch pin (which allocates where the space
    /// has a [collector of its own](crate::SpaceBuilder::private_reclaim), as always without std).
    ///
    /// A scope that was leaked is ended by this.
    pub fn enter(&mut self) -> Scope<'_> {
        let pin = self.inner.reclaim.pin();
        self.line.enter_scope();
        Scope { inner: &self.inner, line: &self.line, pin: Some(pin), _not_send: PhantomData }
    }

    /// Begins a fault: a snapshot of `range`, taken before anything about it is resolved.
    ///
    /// A scope that was leaked is ended by this.
    ///
    /// # Errors
    /// See [`FaultError`].
    pub fn fault(&mut self, range: GpaRange) -> Result<Fault<'_>, FaultError> {
        self.line.end_leaked_scope();
        Fault::begin(&self.inner, &self.line, range)
    }
}

impl Drop for Walker {
    fn drop(&mut self) {
        self.line.give_back();
    }
}

/// A walker that is walking. Translations found inside are good until it ends.
///
/// Everything that waits for flushes waits for this scope too: keep it short, and never wait inside it for anything that
/// could be waiting for it. Opening or closing a window inside one's own scope is a typed error.
#[derive(Debug)]
pub struct Scope<'w> {
    inner: &'w Arc<Inner>,
    line: &'w Line,
    pin: Option<Pin>,
    /// The scope belongs to the thread that entered it.
    _not_send: PhantomData<*const ()>,
}

impl<'w> Scope<'w> {
    /// The space this scope belongs to.
    pub fn space(&self) -> Space {
        Space::from_inner(Arc::clone(self.inner))
    }

    /// Whether this scope belongs to `space`.
    #[inline]
    pub fn is_of(&self, space: &Space) -> bool {
        core::ptr::eq(Arc::as_ptr(self.inner), space.inner_ptr())
    }

    /// The pin that keeps table pages in being for this walk.
    #[doc(hidden)]
    #[inline]
    pub fn pin(&self) -> &Pin {
        // Taken only by `leave`, which ends the scope.
        self.pin.as_ref().unwrap_or_else(|| unreachable!("a live scope is pinned"))
    }

    /// Ends the scope and begins a fault.
    ///
    /// # Errors
    /// See [`FaultError`]. The scope has ended in any case.
    pub fn fault(self, range: GpaRange) -> Result<Fault<'w>, FaultError> {
        let (inner, line) = (self.inner, self.line);
        drop(self);
        Fault::begin(inner, line, range)
    }

    /// Takes a lease: what was found in this scope for `request`'s range stays good after it, until a window asks for it
    /// back.
    ///
    /// # Errors
    /// See [`LeaseError`].
    pub fn lease(&self, request: LeaseRequest) -> Result<Lease, LeaseError> {
        Lease::take(self.inner, request)
    }
}

impl Drop for Scope<'_> {
    fn drop(&mut self) {
        self.line.leave_scope();
    }
}

/// A scope that would have been waited for, and was not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ScopeWaitError {
    /// The calling thread is inside a scope of this space itself, and would wait for ever.
    #[error("a flush was asked for inside the caller's own scope")]
    InScope,
    /// Somebody is inside a scope, and the caller does not want to wait.
    #[error("a scope is open, and the flush must not wait")]
    WouldBlock,
}

/// Waits until every scope that was entered before now has ended.
pub(crate) fn wait_for_scopes(inner: &Inner, nonblocking: bool) -> Result<(), ScopeWaitError> {
    // The remover's half of the Dekker: see the module's page.
    fence(Ordering::SeqCst);
    if broken(Twin::FlushSkipsScopes) {
        return Ok(());
    }
    if in_own_scope(inner) {
        return Err(ScopeWaitError::InScope);
    }
    for line in inner.lines.load().iter() {
        let Some(entered) = line.current_scope() else { continue };
        if nonblocking {
            return Err(ScopeWaitError::WouldBlock);
        }
        let mut backoff = Backoff::new();
        while line.scope_is_still(entered) {
            backoff.snooze();
        }
    }
    Ok(())
}

/// Whether the calling thread is inside a scope of this space. Always `false` where threads cannot be told apart.
pub(crate) fn in_own_scope(inner: &Inner) -> bool {
    let me = context();
    me != 0 && inner.lines.load().iter().any(|line| line.current_scope().is_some() && line.scope_owner() == me)
}

impl Line {
    fn enter_scope(&self) {
        let before = self.scope.load(Ordering::Relaxed);
        self.owner.store(context(), Ordering::Relaxed);
        // Odd: inside. Where the last scope was leaked the number is odd already; the new one is the next odd number, so
        // that whoever waits for the leaked one goes on. Release: whoever sees this scope sees whose it is; the owner
        // before may have been the very thread that looks, and would take the scope for its own.
        self.scope.store((before + 1) | 1, Ordering::Release);
        // The walker's half of the Dekker.
        fence_unless(Twin::ScopeFence, Ordering::SeqCst);
    }

    fn leave_scope(&self) {
        let inside = self.scope.load(Ordering::Relaxed);
        self.scope.store((inside | 1) + 1, Ordering::Release);
    }

    fn current_scope(&self) -> Option<u64> {
        let scope = self.scope.load(Ordering::Acquire);
        (scope & 1 == 1).then_some(scope)
    }

    fn scope_is_still(&self, entered: u64) -> bool {
        self.scope.load(Ordering::Acquire) == entered
    }

    fn scope_owner(&self) -> usize {
        self.owner.load(Ordering::Relaxed)
    }

    /// The caller has the line to itself, and no scope of it is alive.
    fn end_leaked_scope(&self) {
        if self.scope.load(Ordering::Relaxed) & 1 == 1 {
            self.leave_scope();
        }
    }

    fn give_back(&self) {
        // What a leaked scope or fault left behind ends with its walker.
        self.end_leaked_scope();
        self.retract();
        self.in_use.store(false, Ordering::Release);
    }
}
