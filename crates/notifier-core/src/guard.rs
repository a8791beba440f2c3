// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The guard of an open window: the notifier count as a value.
//!
//! Linux asserts at run time, inside `kvm_mmu_notifier_change_pte`, that the notifier count is elevated. Here the count
//! is elevated because an [`InvalidationGuard`] exists, and [`change_pte`](InvalidationGuard::change_pte) is a method of
//! one: without a window there is nothing to call it on.
//!
//! Three things that do not compile, each beside its compiling twin. There is no guard to be had but from a window:
//!
//! ```compile_fail
//! use notifier_core::{Hva, InvalidationGuard, Retained};
//! let guard: InvalidationGuard<'static, Retained, Hva> = InvalidationGuard { ..todo!() };
//! ```
//! ```
//! use notifier_core::{AddrRange, Hva, Space};
//! let space = Space::new();
//! let guard = space.retain(AddrRange::with_len(Hva::new(0x1000), 0x1000)?)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! `change_pte` needs a window that retains:
//!
//! ```compile_fail
//! # use notifier_core::{AddrRange, Hva, Space};
//! # let space = Space::new();
//! let guard = space.zap(AddrRange::with_len(Hva::new(0x1000), 0x1000)?)?;
//! guard.change_pte(&[])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! ```
//! # use notifier_core::{AddrRange, Hva, Space};
//! # let space = Space::new();
//! let guard = space.retain(AddrRange::with_len(Hva::new(0x1000), 0x1000)?)?;
//! guard.change_pte(&[])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! and one that is still open:
//!
//! ```compile_fail
//! # use notifier_core::{AddrRange, Hva, Space};
//! # let space = Space::new();
//! let guard = space.retain(AddrRange::with_len(Hva::new(0x1000), 0x1000)?)?;
//! guard.close()?;
//! guard.change_pte(&[])?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! ```
//! # use notifier_core::{AddrRange, Hva, Space};
//! # let space = Space::new();
//! let guard = space.retain(AddrRange::with_len(Hva::new(0x1000), 0x1000)?)?;
//! guard.change_pte(&[])?;
//! guard.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use alloc::{string::String, sync::Arc, vec, vec::Vec};
use core::{fmt, marker::PhantomData, ops::Deref};

use crate::{
    addr::{AddrRange, OutputAddr},
    counters::add,
    slots::Stretch,
    space::{Inner, Space},
    subscriber::{ChangeBatch, Mode, PageChange, PageOutcome, SubscriberError, SubscriberId},
    window::{CloseCause, Record, Stage, WindowAddress, finish},
};

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Zapped {}
    impl Sealed for super::Retained {}
}

/// The state of a window's range, as a type. Sealed.
pub trait WindowMode: sealed::Sealed + fmt::Debug + Send + Sync + 'static {
    /// The same as a value.
    const MODE: Mode;
}

/// Nobody translates any byte of the range.
#[derive(Debug)]
pub enum Zapped {}

/// Whoever still translates a byte of the range does so read-only and cannot be upgraded.
#[derive(Debug)]
pub enum Retained {}

impl WindowMode for Zapped {
    const MODE: Mode = Mode::Zapped;
}

impl WindowMode for Retained {
    const MODE: Mode = Mode::Retained;
}

/// A page to be repointed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Change<A> {
    /// The page, by an address of the window's kind; aligned to the space's page size.
    pub page: A,
    /// What entries for it point at now. An entry that points elsewhere is zapped.
    pub expected: OutputAddr,
    /// What they are to point at.
    pub new: OutputAddr,
}

/// What came of a page, over all subscribers and all places where the page appears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Somebody translated it, and everybody who did now translates it, read-only, to the new page.
    Changed,
    /// Nobody translated it.
    Absent,
    /// At least one translation had to be removed; the next access faults.
    Zapped,
}

/// What `change_pte` did with one page. Nothing translates to `old` any more: it may be reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Changed<A> {
    /// The page.
    pub page: A,
    /// What came of it.
    pub outcome: Outcome,
    /// The output page that nothing translates to any more on account of `page`: the expected one.
    pub old: OutputAddr,
    /// An entry pointed here instead of at the expected page, and was zapped.
    pub found: Option<OutputAddr>,
}

/// Why `change_pte` did nothing, or not all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChangeError<A: WindowAddress> {
    /// The page is not in the window. Nothing was changed.
    #[error("{page} is not inside the window over {window}")]
    OutsideWindow {
        /// The page asked for.
        page: A,
        /// What the window covers.
        window: AddrRange<A>,
    },
    /// The page, or an output address, is no multiple of the space's page size. Nothing was changed.
    #[error("{page}, {expected} or {new} is not aligned to pages of {page_size:#x} bytes")]
    Unaligned {
        /// The page asked for.
        page: A,
        /// Its expected output address.
        expected: OutputAddr,
        /// Its new output address.
        new: OutputAddr,
        /// Bytes of a page.
        page_size: u64,
    },
    /// A page is twice in the batch. Nothing was changed.
    #[error("{page} is twice in one batch")]
    Twice {
        /// The page.
        page: A,
    },
    /// The guard belongs to another space than the one named. Nothing was changed.
    #[error("the guard over {window} belongs to another space")]
    ForeignSpace {
        /// What the window covers.
        window: AddrRange<A>,
    },
    /// The calling thread is inside a scope of this space: the flush would wait for it for ever. Nothing was changed.
    #[error("pages of {window} were to be repointed inside the caller's own scope")]
    InScope {
        /// What the window covers.
        window: AddrRange<A>,
    },
    /// The caller is a subscriber's callback of this space. Nothing was changed.
    #[error("pages of {window} were to be repointed inside a subscriber's callback")]
    InCallback {
        /// What the window covers.
        window: AddrRange<A>,
    },
    /// A subscriber neither repointed nor zapped. The pages have no outcome; entries of other subscribers may have
    /// changed. No old page may be reused before the window has closed without error.
    #[error("{id} ({name}) neither repointed nor zapped: {source}")]
    Subscriber {
        /// Which subscriber.
        id: SubscriberId,
        /// Its name.
        name: String,
        /// Its error.
        source: SubscriberError,
    },
}

/// Why a part of a Retained window has no outcome.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettleError<A: WindowAddress> {
    /// The part is not in the window.
    #[error("{part} is not inside the window over {window}")]
    OutsideWindow {
        /// The part asked for.
        part: AddrRange<A>,
        /// What the window covers.
        window: AddrRange<A>,
    },
    /// A subscriber could not zap it.
    #[error(transparent)]
    Close(#[from] CloseCause),
}

/// Closing failed: the window is still in progress, and the space's reaper has it ([`Space::reap`]).
#[derive(Debug, thiserror::Error)]
#[error("the window over {window} is still in progress: {cause}")]
pub struct CloseError {
    /// What the window covers.
    pub window: crate::window::Key,
    /// What failed.
    #[source]
    pub cause: CloseCause,
}

/// An open window: while this lives, the count is elevated and nobody adds a right or a translation in its range.
///
/// Two modes, as types: after [`Zapped`] opens, nobody translates the range; after [`Retained`] opens, whoever does is
/// read-only. `A` is the kind of address that the window is over, [`Hva`](crate::Hva) or [`Gpa`](crate::Gpa).
///
/// The way out is [`close`](Self::close). Dropping the guard does the same and, where that fails, leaves the window in
/// progress for the reaper ([`Space::reap`]). Leaking the guard keeps its range, and only its range, in progress for
/// good.
#[must_use = "the window closes when its guard is dropped"]
pub struct InvalidationGuard<'s, M: WindowMode, A: WindowAddress = crate::Hva> {
    inner: Arc<Inner>,
    /// `None` once closed.
    record: Option<Arc<Record>>,
    range: AddrRange<A>,
    /// Dropping must not block: the reaper closes.
    reaped: bool,
    of: PhantomData<&'s Space>,
    mode: PhantomData<fn() -> M>,
}

impl<M: WindowMode, A: WindowAddress> fmt::Debug for InvalidationGuard<'_, M, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InvalidationGuard").field("mode", &M::MODE).field("range", &self.range).finish_non_exhaustive()
    }
}

impl<M: WindowMode, A: WindowAddress> InvalidationGuard<'_, M, A> {
    pub(crate) fn new(inner: Arc<Inner>, record: Arc<Record>, range: AddrRange<A>) -> Self {
        Self { inner, record: Some(record), range, reaped: false, of: PhantomData, mode: PhantomData }
    }

    fn record(&self) -> &Arc<Record> {
        // Taken only by close (which consumes) and drop.
        self.record.as_ref().unwrap_or_else(|| unreachable!("a live guard has a record"))
    }

    /// The bytes of the window.
    pub fn range(&self) -> AddrRange<A> {
        self.range
    }

    /// The window's number, as subscribers see it.
    pub fn window(&self) -> u64 {
        self.record().id()
    }

    /// Whether this window belongs to `space`.
    pub fn is_of(&self, space: &Space) -> bool {
        core::ptr::eq(Arc::as_ptr(&self.inner), space.inner_ptr())
    }

    /// Closes the window: what has no outcome is zapped, every subscriber gets its end, the sequence moves, then the
    /// count falls.
    ///
    /// # Errors
    /// [`CloseError`] where that could not be done: the window is then still in progress, and finished by the reaper
    /// as soon as that is possible.
    pub fn close(mut self) -> Result<(), CloseError> {
        match self.record.take() {
            None => Ok(()),
            Some(record) => finish(&self.inner, &record).map_err(|cause| {
                self.inner.leave_unfinished(record);
                CloseError { window: A::key(self.range), cause }
            }),
        }
    }
}

impl<A: WindowAddress> InvalidationGuard<'_, Zapped, A> {
    /// Marks the window's guest bytes as not populated (unplugged, ballooned out): faults on them are refused, and
    /// joining subscribers are not told of them, until [`Space::populate`](crate::Space::populate). Whether the bytes are given
    /// back to the host is the caller's, as is telling the dirty log that they are empty
    /// ([`Space::report_dirty`](crate::Space::report_dirty)).
    pub fn discard(&self) {
        self.inner.discard(A::key(self.range));
    }
}

impl<A: WindowAddress> InvalidationGuard<'_, Retained, A> {
    /// Repoints pages: every translation of `page` that points at `expected` points at `new` afterwards, read-only.
    /// One flush for all. Never moves the sequence.
    ///
    /// *Changes, never creates*: what was not translated stays so. What cannot be repointed (another output than the
    /// expected one, a subscriber that cannot do it) is zapped, never left. On return nothing translates to the expected
    /// pages on account of these addresses, caches included.
    ///
    /// What the caller asserts by calling: since before it compared, and until this returns, both pages of each change
    /// have equal contents and nobody writes either, the host included; and it holds a reference of its own to each
    /// old page. (Compare after the window was opened: before that, guests can write.)
    ///
    /// # Errors
    /// [`ChangeError`]: all but its last variant mean that nothing was done.
    pub fn change_pte(&self, changes: &[Change<A>]) -> Result<Vec<Changed<A>>, ChangeError<A>> {
        let inner = &*self.inner;
        if inner.in_callback() {
            return Err(ChangeError::InCallback { window: self.range });
        }
        if crate::scope::in_own_scope(inner) {
            return Err(ChangeError::InScope { window: self.range });
        }
        let page_size = inner.page_size;
        let mut order: Vec<A> = Vec::with_capacity(changes.len());
        for &Change { page, expected, new } in changes {
            let whole = AddrRange::with_len(page, page_size).ok().filter(|range| self.range.covers(range));
            if whole.is_none() {
                return Err(ChangeError::OutsideWindow { page, window: self.range });
            }
            if (page.as_u64() | expected.as_u64() | new.as_u64()) & (page_size - 1) != 0 {
                return Err(ChangeError::Unaligned { page, expected, new, page_size });
            }
            order.push(page);
        }
        order.sort_unstable();
        if let Some(pair) = order.windows(2).find(|pair| pair[0] == pair[1]) {
            return Err(ChangeError::Twice { page: pair[0] });
        }

        // Each place where a page appears is a page of the batch; `whose` says which change it belongs to. The places of
        // now, not of when the window opened: where a slot was replaced meanwhile, another page may be, and may be
        // translated. So slots stay as they are until this is done.
        let _slots_stay = inner.slots_stay.together();
        let slots = inner.slots.load();
        let record = self.record();
        let mut pages = Vec::with_capacity(changes.len());
        let mut whose = Vec::with_capacity(changes.len());
        for (index, change) in changes.iter().enumerate() {
            let Ok(range) = AddrRange::with_len(change.page, page_size) else { continue };
            for Stretch { guest, host } in A::key(range).reach(&slots) {
                pages.push(PageChange {
                    guest: guest.map(|range| range.start()),
                    host: host.map(|range| range.start()),
                    expected: change.expected,
                    new: change.new,
                });
                whose.push(index);
            }
        }

        let mut report: Vec<_> = changes
            .iter()
            .map(|change| Changed { page: change.page, outcome: Outcome::Absent, old: change.expected, found: None })
            .collect();
        // From here on a page has no outcome until it has a new one, whatever it had before.
        for change in changes {
            if let Ok(range) = AddrRange::with_len(change.page, page_size) {
                record.unsettle(A::key(range));
            }
        }
        let batch = ChangeBatch { window: record.id(), page_size, pages: &pages };
        let mut outcomes = vec![PageOutcome::Absent; pages.len()];
        for participant in record.participants() {
            let stage = participant.stage.lock();
            if *stage != Stage::Started {
                continue;
            }
            outcomes.fill(PageOutcome::Absent);
            let member = &participant.member;
            let changed = member.call(inner, false, |subscriber| subscriber.change_pte(&batch, &mut outcomes));
            match changed {
                None => continue,
                Some(Ok(())) => {}
                // What it did before it failed is unknown: what it has goes.
                Some(Err(_)) => {
                    let reach = batch.stretches();
                    let part = crate::subscriber::Coverage { reach: &reach, ..record.coverage(false) };
                    if let Some(Err(source)) = member.call(inner, false, |subscriber| subscriber.zap(&part)) {
                        return Err(ChangeError::Subscriber { id: member.id(), name: member.name().into(), source });
                    }
                    outcomes.fill(PageOutcome::Zapped { found: None });
                }
            }
            for (outcome, &index) in outcomes.iter().zip(&whose) {
                let page = &mut report[index];
                match *outcome {
                    PageOutcome::Absent => {}
                    PageOutcome::Changed if page.outcome == Outcome::Absent => page.outcome = Outcome::Changed,
                    PageOutcome::Changed => {}
                    PageOutcome::Zapped { found } => {
                        page.outcome = Outcome::Zapped;
                        page.found = page.found.or(found);
                    }
                }
            }
        }
        for page in &report {
            let counter = match page.outcome {
                Outcome::Changed => &inner.counters.changes,
                Outcome::Absent => &inner.counters.absents,
                Outcome::Zapped => &inner.counters.zaps,
            };
            add(counter, 1);
            if let Ok(range) = AddrRange::with_len(page.page, page_size) {
                record.settle(A::key(range));
            }
        }
        Ok(report)
    }

    /// As [`change_pte`](Self::change_pte), but only if this window belongs to `space`: for code that is handed both.
    ///
    /// # Errors
    /// [`ChangeError::ForeignSpace`] (nothing was done), and those of `change_pte`.
    pub fn change_pte_in(&self, space: &Space, changes: &[Change<A>]) -> Result<Vec<Changed<A>>, ChangeError<A>> {
        if !self.is_of(space) {
            return Err(ChangeError::ForeignSpace { window: self.range });
        }
        self.change_pte(changes)
    }

    /// The outcome of `part` is that its host mapping is as it was: translations stay, read-only until a fault.
    ///
    /// # Errors
    /// [`SettleError::OutsideWindow`].
    pub fn keep(&self, part: AddrRange<A>) -> Result<(), SettleError<A>> {
        if !self.range.covers(&part) {
            return Err(SettleError::OutsideWindow { part, window: self.range });
        }
        self.record().settle(A::key(part));
        Ok(())
    }

    /// The outcome of `part` is that nobody translates it any more.
    ///
    /// # Errors
    /// [`SettleError`]; the part then still has no outcome.
    pub fn zap(&self, part: AddrRange<A>) -> Result<(), SettleError<A>> {
        if !self.range.covers(&part) {
            return Err(SettleError::OutsideWindow { part, window: self.range });
        }
        if self.inner.in_callback() {
            return Err(CloseCause::InCallback.into());
        }
        if crate::scope::in_own_scope(&self.inner) {
            return Err(CloseCause::InScope.into());
        }
        self.record().zap(&self.inner, A::key(part))?;
        add(&self.inner.counters.zaps, part.len().div_ceil(self.inner.page_size));
        Ok(())
    }
}

impl<M: WindowMode, A: WindowAddress> Drop for InvalidationGuard<'_, M, A> {
    fn drop(&mut self) {
        let Some(record) = self.record.take() else { return };
        if self.reaped {
            self.inner.leave_to_reaper(record);
        } else if finish(&self.inner, &record).is_err() {
            self.inner.leave_unfinished(record);
        }
    }
}

/// An [`InvalidationGuard`] that borrows nothing: for async code and for handing a window to another thread.
///
/// Dropping it never blocks: the window is left to the space's reaper, which closes it soon; without std, to the next
/// [`Space::reap`](crate::Space::reap). Close it where that is possible.
#[must_use = "the window is closed by the reaper when its guard is dropped"]
pub struct OwnedInvalidationGuard<M: WindowMode, A: WindowAddress = crate::Hva>(InvalidationGuard<'static, M, A>);

impl<M: WindowMode, A: WindowAddress> OwnedInvalidationGuard<M, A> {
    pub(crate) fn new(mut guard: InvalidationGuard<'static, M, A>) -> Self {
        guard.reaped = true;
        Self(guard)
    }

    /// As [`InvalidationGuard::close`].
    ///
    /// # Errors
    /// [`CloseError`].
    pub fn close(self) -> Result<(), CloseError> {
        self.0.close()
    }
}

impl<M: WindowMode, A: WindowAddress> fmt::Debug for OwnedInvalidationGuard<M, A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("OwnedInvalidationGuard").field(&self.0).finish()
    }
}

impl<M: WindowMode, A: WindowAddress> Deref for OwnedInvalidationGuard<M, A> {
    type Target = InvalidationGuard<'static, M, A>;
    fn deref(&self) -> &Self::Target {
        &self.0
    }
}
