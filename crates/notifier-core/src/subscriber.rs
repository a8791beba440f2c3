// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Those who keep a second copy of the translations.

use alloc::{boxed::Box, sync::Arc, vec::Vec};
use core::fmt;

use crate::{
    addr::{AddrRange, Gpa, GpaRange, Hva, HvaRange, OutputAddr},
    slots::Stretch,
    subscription::Membership,
};

/// The two states a window can put its range in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Nobody translates any byte of the range.
    Zapped,
    /// Whoever still translates a byte does so read-only, cannot be upgraded, and has reported what was dirty.
    Retained,
}

/// A failed callback.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SubscriberError {
    /// It would have had to wait, and the window is of the non-blocking form.
    #[error("the subscriber would block")]
    WouldBlock,
    /// Something it holds cannot be given up now.
    #[error("the subscriber holds {range} and cannot give it up")]
    Pinned {
        /// What it holds.
        range: GpaRange,
    },
    /// A flush did not happen; it stays owed.
    #[error("a flush failed: {0}")]
    Flush(Box<dyn core::error::Error + Send + Sync>),
    /// The subscriber's own failure.
    #[error("{0}")]
    Other(Box<dyn core::error::Error + Send + Sync>),
    /// The callback panicked.
    #[error("the subscriber panicked")]
    Panicked,
}

/// Names a subscription of one space, for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriberId(pub(crate) u64);

impl fmt::Display for SubscriberId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "subscriber {}", self.0)
    }
}

/// Which bytes a subscriber is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Interest {
    /// All of the space.
    Whole,
    /// Windows that touch this guest range.
    Guest(GpaRange),
    /// Windows that touch this host range.
    Host(HvaRange),
}

impl Interest {
    pub(crate) fn meets(&self, reach: &[Stretch]) -> bool {
        match self {
            Interest::Whole => true,
            Interest::Guest(mine) => reach.iter().filter_map(|s| s.guest).any(|r| r.overlaps(mine)),
            Interest::Host(mine) => reach.iter().filter_map(|s| s.host).any(|r| r.overlaps(mine)),
        }
    }
}

/// What a window, or a part of one, covers, as a subscriber needs to know it.
#[derive(Debug, Clone, Copy)]
pub struct Coverage<'a> {
    pub(crate) window: u64,
    pub(crate) mode: Mode,
    pub(crate) reach: &'a [Stretch],
    pub(crate) nonblocking: bool,
}

impl<'a> Coverage<'a> {
    /// A number that the window's start and end share, and no other window of the space ever has.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// The window's mode.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether the callback must return [`SubscriberError::WouldBlock`] rather than wait for anything.
    pub fn nonblocking(&self) -> bool {
        self.nonblocking
    }

    /// The guest ranges, one for each slot that maps the window's bytes (a host page may be in several).
    pub fn guest(&self) -> impl Iterator<Item = GpaRange> + 'a {
        self.reach.iter().filter_map(|s| s.guest)
    }

    /// The host ranges.
    pub fn host(&self) -> impl Iterator<Item = HvaRange> + 'a {
        self.reach.iter().filter_map(|s| s.host)
    }

    /// Both sides, piece by piece.
    pub fn stretches(&self) -> &'a [Stretch] {
        self.reach
    }
}

/// One page of a [`ChangeBatch`], at one of the places where the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageChange {
    /// Guest address of the page, where it has one.
    pub guest: Option<Gpa>,
    /// Host address of the page, where it has one.
    pub host: Option<Hva>,
    /// What an entry must point at to be repointed.
    pub expected: OutputAddr,
    /// What it then points at.
    pub new: OutputAddr,
}

/// Pages to be repointed together, with one flush.
#[derive(Debug, Clone, Copy)]
pub struct ChangeBatch<'a> {
    pub(crate) window: u64,
    pub(crate) page_size: u64,
    pub(crate) pages: &'a [PageChange],
}

impl<'a> ChangeBatch<'a> {
    /// The window's number.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// Bytes of each page.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The pages.
    pub fn pages(&self) -> &'a [PageChange] {
        self.pages
    }

    /// The batch as stretches, for a subscriber that cannot repoint and removes instead.
    pub fn stretches(&self) -> Vec<Stretch> {
        let size = self.page_size;
        self.pages
            .iter()
            .map(|page| Stretch {
                guest: page.guest.and_then(|gpa| AddrRange::with_len(gpa, size).ok()),
                host: page.host.and_then(|hva| AddrRange::with_len(hva, size).ok()),
            })
            .collect()
    }
}

/// What a subscriber did with one page of a [`ChangeBatch`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageOutcome {
    /// It translated to the expected page and now translates, read-only, to the new one.
    Changed,
    /// It did not translate, and still does not.
    Absent,
    /// It was removed; `found` is what it pointed at, where that was not the expected page.
    Zapped {
        /// What was found instead of the expected page.
        found: Option<OutputAddr>,
    },
}

/// Someone who keeps a second copy of the translations: is told of every window over bytes it cares for, before they change and after. The contract, from
/// its side:
///
/// - [`Subscriber::start`] returns when the promise of the window's [`Mode`] holds for every byte of the window,
///   caches included; or with an error, having undone what can be undone (what was zapped stays zapped). A subscriber
///   whose start failed gets no end.
/// - [`Subscriber::end`] comes exactly once for each start that succeeded, on any thread. Starts and ends of different
///   windows come in any order, and at the same time.
/// - Between the two it adds no right and no translation in the range. Who installs only through
///   [`Admission::check_for`](crate::Admission::check_for) keeps this without doing anything.
/// - Callbacks may not open or close windows, join, leave or change slots: they get a typed error.
/// - A callback that panics is taken for one that failed.
pub trait Subscriber: Send + Sync {
    /// What to call it in errors.
    fn name(&self) -> &str {
        "subscriber"
    }

    /// What of it cannot be invalidated at all (a device without an unmap call, say): windows over that are refused
    /// with [`OpenError::Pinned`](crate::OpenError::Pinned). `None` for a subscriber that always follows. Asked by each
    /// window, before anybody's start.
    fn not_invalidatable(&self) -> Option<Interest> {
        None
    }

    /// It now belongs to a space: windows that open from now on find it, and wait until this returns. Called before any
    /// other callback of this subscription. What it installs it shows the membership for
    /// ([`Admission::check_for`](crate::Admission::check_for)).
    ///
    /// # Errors
    /// Any [`SubscriberError`]: it does not join (because it belongs to another space, say).
    fn joined(&self, membership: Membership) -> Result<(), SubscriberError> {
        let _ = membership;
        Ok(())
    }

    /// The bytes of `window` are about to change. On return the promise of its mode holds.
    ///
    /// # Errors
    /// Any [`SubscriberError`]: the window is not opened, and whoever was started before gets its end.
    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError>;

    /// The bytes of `window` have changed; translations may be made again.
    ///
    /// # Errors
    /// Any [`SubscriberError`]: the window stays in progress, and the end is given again later.
    fn end(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        let _ = window;
        Ok(())
    }

    /// Inside a window: on return no byte of `part` is translated, caches included.
    ///
    /// # Errors
    /// Any [`SubscriberError`]: the bytes stay without an outcome.
    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError>;

    /// Inside a Retained window: repoints the pages and says for each what came of it (`outcomes` has as many items as
    /// the batch has pages). On return nothing translates to an expected page any more, caches included. Changes,
    /// never creates. The default removes, and says
    /// `Zapped` of every page, whether or not it had it.
    ///
    /// # Errors
    /// Any [`SubscriberError`]: the pages are then zapped.
    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        let reach = batch.stretches();
        self.zap(&Coverage { window: batch.window, mode: Mode::Retained, reach: &reach, nonblocking: false })?;
        outcomes.fill(PageOutcome::Zapped { found: None });
        Ok(())
    }

    /// Whether any byte was used since it was last aged; makes it old.
    ///
    /// # Errors
    /// Any [`SubscriberError`].
    fn age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let _ = reach;
        Ok(false)
    }

    /// Whether any byte was used since it was last aged; changes nothing.
    ///
    /// # Errors
    /// Any [`SubscriberError`].
    fn test_age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let _ = reach;
        Ok(false)
    }

    /// These bytes are there now (a slot was added, a hole filled, or the subscriber joined): whoever maps ahead of
    /// faults maps them, through an [`Admission`](crate::Admission) as everybody does: by the time of the call they may
    /// be gone again. The same bytes may be told of twice.
    ///
    /// # Errors
    /// Any [`SubscriberError`]: whoever was told before is told to zap them again.
    fn populate(&self, part: &Stretch) -> Result<(), SubscriberError> {
        let _ = part;
        Ok(())
    }

    /// It leaves, or the space goes away: drop every translation, flush, and never make one again. Called last, and again
    /// where it fails. Windows that open meanwhile wait until this returns.
    ///
    /// # Errors
    /// Any [`SubscriberError`]: windows over its bytes try again, and are refused while it fails.
    fn release(&self) -> Result<(), SubscriberError> {
        Ok(())
    }
}

impl<T: Subscriber + ?Sized> Subscriber for Arc<T> {
    fn name(&self) -> &str {
        (**self).name()
    }
    fn not_invalidatable(&self) -> Option<Interest> {
        (**self).not_invalidatable()
    }
    fn joined(&self, membership: Membership) -> Result<(), SubscriberError> {
        (**self).joined(membership)
    }
    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        (**self).start(window)
    }
    fn end(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        (**self).end(window)
    }
    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        (**self).zap(part)
    }
    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        (**self).change_pte(batch, outcomes)
    }
    fn age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        (**self).age(reach)
    }
    fn test_age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        (**self).test_age(reach)
    }
    fn populate(&self, part: &Stretch) -> Result<(), SubscriberError> {
        (**self).populate(part)
    }
    fn release(&self) -> Result<(), SubscriberError> {
        (**self).release()
    }
}

/// Receives dirty facts: guest bytes that were written since they were last reported. A fact comes when no write that
/// it stands for can follow any more. Facts come from any thread, may
/// come more than once, and reach the sink before the operation that found them returns.
pub trait DirtySink: Send + Sync {
    /// The guest wrote somewhere in `range`.
    fn dirty(&self, range: GpaRange);
}

/// Forgets every fact.
impl DirtySink for () {
    fn dirty(&self, _: GpaRange) {}
}

impl<F: Fn(GpaRange) + Send + Sync> DirtySink for F {
    fn dirty(&self, range: GpaRange) {
        self(range);
    }
}
