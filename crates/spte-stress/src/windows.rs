// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the host does: windows in which pages move, and go, and come back.

use std::{
    sync::{Arc, atomic::Ordering::*},
    time::Duration,
};

use notifier_core::{
    AddrRange, Change, ChangeError, Gpa, InvalidationGuard, LeaseError, LeasePolicy, LeaseRequest, OpenError, Outcome,
    Retained, SubscriberError, WindowAddress, Zapped,
};

use crate::{activity::Activity, config::Sabotage, host::*, work::Worker};

/// A page, its backing and what that holds.
type Held = (usize, Backing, (u64, u64));

impl Worker<'_> {
    pub(crate) fn policy(&mut self) -> LeasePolicy {
        match self.random.below(8) {
            0 => LeasePolicy::Fail,
            1 => LeasePolicy::CancelFor(Duration::from_millis(2)),
            2 | 3 => {
                self.did(Activity::LeaseWaited);
                LeasePolicy::Wait
            }
            _ => LeasePolicy::Cancel,
        }
    }

    pub(crate) fn refused(&mut self, error: &OpenError, nonblocking: bool) {
        match error {
            OpenError::Pinned { .. } => self.did(Activity::LeaseVetoed),
            OpenError::Busy { .. } => self.did(Activity::Busy),
            OpenError::WouldBlock { .. } if nonblocking => self.did(Activity::WouldBlock),
            // Flushes fail where they are made to.
            OpenError::Subscriber { source: SubscriberError::Flush(_), .. } => {}
            error => self.wrong(format!("a window was refused: {error}")),
        }
    }

    /// What the tables have of pages inside a window: nothing, or nothing that may be written.
    pub(crate) fn verify(&self, first: usize, count: usize, retained: bool, alias_too: bool) {
        let host = &self.shared.host;
        let tables = [Some(Arc::clone(&self.shared.primary)), self.shared.secondary.read().unwrap().clone()];
        for table in tables.into_iter().flatten() {
            let alias = host.alias();
            let mut leaves = table.leaves(gpas(first, count));
            if alias_too && alias.region() == Some(first / SPAN) {
                let offset = (first % SPAN) as u64 * PAGE;
                let range = AddrRange::with_len(Gpa::new(ALIAS_BASE + offset), count as u64 * PAGE).unwrap();
                let more = table.leaves(range);
                if host.alias() == alias {
                    leaves.extend(more);
                }
            }
            let bad = leaves.iter().find(|leaf| leaf.writable || !retained);
            if let Some(leaf) = bad {
                let mode = if retained { "Retained" } else { "Zapped" };
                self.wrong(format!("{table:?} has {leaf:x?} inside a {mode} window over {}", gpas(first, count)));
            }
        }
    }

    /// No lease is given inside a window.
    pub(crate) fn no_lease(&mut self, page: usize) {
        match self.shared.space.lease(LeaseRequest::new(gpas(page, 1), "too late")) {
            Err(LeaseError::Retry(_)) => self.did(Activity::LeaseRefused),
            // A slot is just being replaced; the window over host bytes cannot be told from the guest's address then.
            other => self.wrong(format!("a lease inside a window over page {page}: {other:?}")),
        }
    }

    /// The windows over these pages are over for certain; or not, where closing failed.
    pub(crate) fn closed(&self, first: usize, count: usize) {
        Host::stamp(&self.shared.host.closed, first..first + count);
    }

    /// Another frame with the same contents.
    pub(crate) fn twin(&mut self, page: usize, contents: (u64, u64)) -> Option<Backing> {
        let host = &self.shared.host;
        if is_mergeable(page) && self.random.one_in(2) {
            let shared = host.share(contents.0, contents.1);
            self.did(Activity::Merged);
            return shared;
        }
        host.take(contents.0, contents.1).map(|frame| Backing { frame, shared: false })
    }

    /// Gives these pages other frames at once, and the old ones away.
    pub(crate) fn move_pages(&mut self, first: usize, count: usize) {
        let host = Arc::clone(&self.shared.host);
        for page in first..first + count {
            let Some(old) = host.backing(page).filter(|_| !self.random.one_in(3)) else { continue };
            if let Some(new) = self.twin(page, host.contents(old.frame)) {
                host.set_backing(page, Some(new));
                host.release(old);
            }
        }
    }

    /// A Retained window in which each page meets another end.
    pub(crate) fn retain<A: WindowAddress>(&mut self, first: usize, range: AddrRange<A>) {
        let shared = self.shared;
        let host = &*shared.host;
        let count = (range.len() / PAGE) as usize;
        self.doing(Activity::Retained);
        Host::stamp(&host.opened, first..first + count);
        let early = self.sabotage(Sabotage::CopyBeforeWindow).then(|| {
            let lock = host.lock(first / SPAN);
            let contents: Vec<_> = (first..first + count)
                .map(|page| host.backing(page).map_or((0, 0), |backing| host.contents(backing.frame)))
                .collect();
            self.random.dawdle();
            (lock, contents)
        });
        let (policy, nonblocking) = (self.policy(), self.random.one_in(12));
        let window = shared.space.window(range).leases(policy);
        let opened = if nonblocking { window.nonblocking().open_retained() } else { window.open_retained() };
        let guard = match opened {
            Ok(guard) => guard,
            Err(error) => {
                self.refused(&error, nonblocking);
                return self.closed(first, count);
            }
        };
        let (lock, early) = match early {
            Some((lock, early)) => (lock, Some(early)),
            None => (host.lock(first / SPAN), None),
        };
        self.verify(first, count, true, true);
        let before: Vec<_> = (first..first + count)
            .map(|page| host.backing(page).map(|backing| (page, backing, host.contents(backing.frame))))
            .collect();
        self.random.dawdle();

        let page_range = |page: usize| {
            AddrRange::with_len(A::from_u64(range.start().as_u64() + (page - first) as u64 * PAGE), PAGE).unwrap()
        };
        let mut changes: Vec<(usize, Backing, Backing, Change<A>)> = Vec::new();
        let mut after_close: Vec<Backing> = Vec::new();
        for (page, old, contents) in before.iter().flatten().copied() {
            let copied = early.as_ref().map_or(contents, |early| early[page - first]);
            match self.random.below(16) {
                0..10 => {
                    let Some(new) = self.twin(page, copied) else { continue };
                    let wrong = u64::from(self.random.one_in(24));
                    let expected = output_of(old.frame).wrapping_add(wrong * (1 << 20));
                    let change = Change { page: page_range(page).start(), expected, new: output_of(new.frame) };
                    changes.push((page, old, new, change));
                }
                10..12 => {
                    self.did(Activity::Kept);
                    if let Err(error) = guard.keep(page_range(page)) {
                        self.wrong(format!("keep page {page}: {error}"));
                    }
                }
                12 | 13 => {
                    let zapped = guard.zap(page_range(page)).is_ok();
                    let new = if zapped { self.twin(page, copied) } else { None };
                    if let Some(new) = new {
                        self.did(Activity::ZappedInside);
                        host.set_backing(page, Some(new));
                        host.release(old);
                    }
                }
                _ => {
                    self.did(Activity::WithoutOutcome);
                    if let Some(new) = self.twin(page, copied) {
                        host.set_backing(page, Some(new));
                        after_close.push(old);
                    }
                }
            }
        }
        let batch = if self.random.one_in(2) { changes.len().max(1) } else { 8 };
        for part in changes.chunks(batch) {
            self.change(&guard, part, &before, first);
        }
        self.verify(first, count, true, true);
        for (page, old, contents) in before.iter().flatten() {
            // Where it still is the page's: nobody wrote it inside the window.
            if host.backing(*page) == Some(*old) && host.contents(old.frame) != *contents {
                self.wrong(format!("page {page} was written inside a Retained window"));
            }
        }
        drop(lock);
        if self.random.one_in(4) {
            self.no_lease(first);
        }
        match guard.close() {
            Ok(()) => {
                after_close.into_iter().for_each(|old| host.release(old));
                self.closed(first, count);
            }
            Err(_) => after_close.into_iter().for_each(|old| host.release_later(old)),
        }
        self.did(Activity::Retained);
    }

    pub(crate) fn change<A: WindowAddress>(
        &mut self,
        guard: &InvalidationGuard<'_, Retained, A>,
        part: &[(usize, Backing, Backing, Change<A>)],
        before: &[Option<Held>],
        first: usize,
    ) {
        let host = &*self.shared.host;
        let changes: Vec<_> = part.iter().map(|(.., change)| *change).collect();
        let sequence = self.shared.space.progress();
        self.doing(Activity::Changed);
        let report = match guard.change_pte(&changes) {
            Ok(report) => report,
            Err(ChangeError::Subscriber { .. }) => {
                // Somebody may translate to the new frames. The pages stay where they were.
                return part.iter().for_each(|(_, _, new, _)| host.release_later(*new));
            }
            Err(error) => return self.wrong(format!("change_pte: {error}")),
        };
        if sequence.count == 0 {
            self.wrong("no window is in progress inside one");
        }
        for (&(page, old, new, change), changed) in part.iter().zip(&report) {
            let expected = change.expected == output_of(old.frame);
            match changed.outcome {
                Outcome::Changed if !expected => {
                    self.wrong(format!("page {page} was repointed from {}, not from {}", old.frame, change.expected));
                }
                Outcome::Changed => self.did(Activity::Changed),
                Outcome::Absent => self.did(Activity::ChangedAbsent),
                Outcome::Zapped if !expected => self.did(Activity::Unexpected),
                Outcome::Zapped => self.did(Activity::ChangedZapped),
            }
            let held = before[page - first].map(|(_, _, contents)| contents);
            if held != Some(host.contents(old.frame)) {
                self.wrong(format!("page {page} was written before change_pte returned"));
            }
            host.set_backing(page, Some(new));
            host.release(old);
        }
    }

    /// A Zapped window in which pages move.
    pub(crate) fn zap<A: WindowAddress>(&mut self, first: usize, range: AddrRange<A>) {
        let shared = self.shared;
        let host = &*shared.host;
        let count = (range.len() / PAGE) as usize;
        self.doing(Activity::Zapped);
        Host::stamp(&host.opened, first..first + count);
        if self.sabotage(Sabotage::FreeBeforeWindow) {
            let _lock = host.lock(first / SPAN);
            self.move_pages(first, count);
        }
        let (policy, nonblocking, owned) =
            (self.policy(), self.random.one_in(6), self.random.one_in(16) && count <= 32);
        let mut window = shared.space.window(range).leases(policy);
        if nonblocking {
            window = window.nonblocking();
        }
        let refused = |worker: &mut Self, error: OpenError| {
            worker.refused(&error, nonblocking);
            if worker.sabotage(Sabotage::FreeUnderLease) && matches!(error, OpenError::Pinned { .. }) {
                let _lock = host.lock(first / SPAN);
                worker.move_pages(first, count);
            }
            worker.closed(first, count);
        };
        if owned {
            let guard = match window.open_zapped_owned() {
                Ok(guard) => guard,
                Err(error) => return refused(self, error),
            };
            self.inside_zapped(first, count);
            if self.random.one_in(4) {
                if guard.close().is_ok() {
                    self.closed(first, count);
                }
            } else {
                drop(guard);
                self.did(Activity::OwnedDropped);
            }
        } else {
            let guard = match window.open_zapped() {
                Ok(guard) => guard,
                Err(error) => return refused(self, error),
            };
            self.inside_zapped(first, count);
            self.close(guard, first, count);
        }
        if nonblocking {
            self.did(Activity::Nonblocking);
        }
        self.did(Activity::Zapped);
    }

    pub(crate) fn inside_zapped(&mut self, first: usize, count: usize) {
        let host = Arc::clone(&self.shared.host);
        let lock = host.lock(first / SPAN);
        self.verify(first, count, false, true);
        self.move_pages(first, count);
        self.random.dawdle();
        drop(lock);
        self.verify(first, count, false, true);
        if self.random.one_in(4) {
            self.no_lease(first);
        }
    }

    pub(crate) fn close<A: WindowAddress>(
        &mut self,
        guard: InvalidationGuard<'_, Zapped, A>,
        first: usize,
        count: usize,
    ) {
        let closed = if self.random.one_in(8) {
            // The safety net; whether it could do it is not known.
            drop(guard);
            false
        } else {
            guard.close().is_ok()
        };
        if closed {
            self.closed(first, count);
        }
    }

    /// A page that is shared gets a frame of its own.
    pub(crate) fn copy_on_write(&mut self, page: usize) {
        let shared = self.shared;
        let host = &*shared.host;
        self.doing(Activity::CopyOnWrite);
        Host::stamp(&host.opened, page..page + 1);
        if page / SPAN == MEMFD_REGION {
            match shared.space.window(gpas(page, 1)).leases(LeasePolicy::Cancel).open_zapped() {
                Ok(guard) => {
                    self.unshare(page);
                    self.close(guard, page, 1);
                }
                Err(error) => {
                    self.refused(&error, false);
                    self.closed(page, 1);
                }
            }
            return;
        }
        let window = shared.space.window(hvas(page, 1)).leases(LeasePolicy::Cancel);
        let repoint = self.random.one_in(2);
        let opened = if repoint { window.open_retained().map(Some) } else { Ok(None) };
        let guard = match opened {
            Ok(None) => match window.open_zapped() {
                Ok(guard) => {
                    self.unshare(page);
                    return self.close(guard, page, 1);
                }
                Err(error) => Err(error),
            },
            Ok(Some(guard)) => Ok(guard),
            Err(error) => Err(error),
        };
        let guard = match guard {
            Ok(guard) => guard,
            Err(error) => {
                self.refused(&error, false);
                return self.closed(page, 1);
            }
        };
        let lock = host.lock(page / SPAN);
        if let Some(old) = host.backing(page).filter(|backing| backing.shared) {
            let contents = host.contents(old.frame);
            if let Some(frame) = host.take(contents.0, contents.1) {
                let new = Backing { frame, shared: false };
                let change = Change { page: hva_of(page), expected: output_of(old.frame), new: output_of(frame) };
                self.change(&guard, &[(page, old, new, change)], &[Some((page, old, contents))], page);
                self.did(Activity::CopyOnWrite);
            }
        }
        drop(lock);
        if guard.close().is_ok() {
            self.closed(page, 1);
        }
    }

    pub(crate) fn unshare(&mut self, page: usize) {
        let host = &*self.shared.host;
        let _lock = host.lock(page / SPAN);
        let Some(old) = host.backing(page).filter(|backing| backing.shared) else { return };
        let (tag, value) = host.contents(old.frame);
        if let Some(frame) = host.take(tag, value) {
            host.set_backing(page, Some(Backing { frame, shared: false }));
            host.release(old);
            self.did(Activity::CopyOnWrite);
        }
    }

    /// A window over guest bytes that changes nothing of the host's: one alias of several.
    pub(crate) fn zap_one_alias(&mut self) {
        let shared = self.shared;
        let host = &*shared.host;
        let (first, count) = self.some_pages();
        if first / SPAN == MEMFD_REGION {
            return;
        }
        Host::stamp(&host.opened, first..first + count);
        match shared.space.window(gpas(first, count)).leases(LeasePolicy::Cancel).open_zapped() {
            Ok(guard) => {
                self.verify(first, count, false, false);
                self.random.dawdle();
                self.verify(first, count, false, false);
                self.close(guard, first, count);
                self.did(Activity::ZappedByGpaOnly);
            }
            Err(error) => {
                self.refused(&error, false);
                self.closed(first, count);
            }
        }
    }

    /// All of a region in one block of 2M.
    pub(crate) fn compact(&mut self, region: usize) {
        let shared = self.shared;
        let host = &*shared.host;
        let first = region * SPAN;
        self.doing(Activity::Compacted);
        Host::stamp(&host.opened, first..first + SPAN);
        let done = if region == MEMFD_REGION {
            let opened = shared.space.window(gpas(first, SPAN)).leases(LeasePolicy::Cancel).open_retained();
            self.compact_inside(opened, first)
        } else {
            let opened = shared.space.window(hvas(first, SPAN)).leases(LeasePolicy::Cancel).open_retained();
            self.compact_inside(opened, first)
        };
        if done {
            self.closed(first, SPAN);
        }
    }

    pub(crate) fn compact_inside<A: WindowAddress>(
        &mut self,
        opened: Result<InvalidationGuard<'_, Retained, A>, OpenError>,
        first: usize,
    ) -> bool {
        let host = Arc::clone(&self.shared.host);
        let guard = match opened {
            Ok(guard) => guard,
            Err(error) => {
                self.refused(&error, false);
                return true;
            }
        };
        let lock = host.lock(first / SPAN);
        let before: Vec<_> = (first..first + SPAN)
            .map(|page| host.backing(page).map(|backing| (page, backing, host.contents(backing.frame))))
            .collect();
        let contents: Vec<_> = before.iter().flatten().map(|(.., contents)| *contents).collect();
        let block = if contents.len() == SPAN { host.take_filled_block(&contents) } else { None };
        if let Some(block) = block {
            let start = guard.range().start().as_u64();
            let changes: Vec<_> = (before.iter().flatten().zip(block..))
                .map(|(&(page, old, _), frame)| {
                    let page_at = A::from_u64(start + (page - first) as u64 * PAGE);
                    let (expected, new) = (output_of(old.frame), output_of(frame));
                    (page, old, Backing { frame, shared: false }, Change { page: page_at, expected, new })
                })
                .collect();
            self.change(&guard, &changes, &before, first);
            self.did(Activity::Compacted);
        }
        drop(lock);
        guard.close().is_ok()
    }

    /// Takes pages away from the guest.
    pub(crate) fn balloon(&mut self) {
        let shared = self.shared;
        let host = &*shared.host;
        let first = BALLOON.start + self.random.below(BALLOON.len() as u64 - 8) as usize;
        let count = 1 + self.random.below(8) as usize;
        Host::stamp(&host.opened, first..first + count);
        let guard = match shared.space.window(hvas(first, count)).leases(LeasePolicy::Cancel).open_zapped() {
            Ok(guard) => guard,
            Err(error) => {
                self.refused(&error, false);
                return self.closed(first, count);
            }
        };
        let lock = host.lock(first / SPAN);
        guard.discard();
        for page in first..first + count {
            if let Some(old) = host.backing(page) {
                host.epochs[page].fetch_add(1, AcqRel);
                host.set_backing(page, None);
                host.release(old);
                self.did(Activity::Ballooned);
            }
        }
        drop(lock);
        self.close(guard, first, count);
    }

    /// Gives pages back, empty.
    pub(crate) fn populate(&mut self) {
        let shared = self.shared;
        let host = &*shared.host;
        let first = BALLOON.start + self.random.below(BALLOON.len() as u64 - 8) as usize;
        let lock = host.lock(first / SPAN);
        for page in first..first + 8 {
            if host.backing(page).is_none()
                && let Some(frame) = host.take(tag_of(page), 0)
            {
                host.ledger[page].store(0, Release);
                host.epochs[page].fetch_add(1, AcqRel);
                host.set_backing(page, Some(Backing { frame, shared: false }));
                host.mark(page);
            }
        }
        drop(lock);
        let alias = AddrRange::with_len(Gpa::new(ALIAS_BASE + (first % SPAN) as u64 * PAGE), 8 * PAGE).unwrap();
        for range in [gpas(first, 8), alias] {
            if let Err(error) = shared.space.populate(range) {
                self.wrong(format!("populate {range}: {error}"));
            }
        }
        self.did(Activity::Populated);
    }
}
