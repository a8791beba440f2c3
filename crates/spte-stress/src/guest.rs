// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What guests do: read, write, fault, hold leases; and a device that is told of translations by calls.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering::*},
    },
    thread,
    time::Duration,
};

use notifier_core::{
    Access, AddrRange, CallMapError, Extent, Fault, FaultError, GpaRange, HvaRange, LeaseError, LeaseRequest,
    OpenError, Resolved, Retry, Stretch,
};
use spte_core::{CollapseError, MapError, Miss, Upgrade};

use crate::{
    activity::Activity,
    config::Sabotage,
    host::*,
    tables::{AnyTable, Device, How},
    work::{Place, Worker},
};

/// The host has no frame for a page.
#[derive(Debug)]
struct NoMemory;

/// What the host has for the pages of a fault.
fn look_up(host: &Host, fault: &Fault<'_>) -> Result<Vec<Extent>, NoMemory> {
    fault.slot().ok_or(NoMemory)?;
    Ok(extents(host, fault.range(), fault.host()))
}

fn extents(host: &Host, guest: GpaRange, hva: Option<HvaRange>) -> Vec<Extent> {
    let first = match hva {
        Some(hva) => Some(((hva.start().as_u64() - HOST_BASE) / PAGE) as usize),
        None => page_at(guest.start()),
    };
    let mut extents: Vec<Extent> = Vec::new();
    let Some(first) = first else { return extents };
    for offset in 0..(guest.len() / PAGE) as usize {
        let Some(backing) = host.backing(first + offset) else { continue };
        let access = if backing.shared { Access::RX } else { Access::RWX };
        let at = guest.start().wrapping_add(offset as u64 * PAGE);
        let page = AddrRange::with_len(at, PAGE).unwrap();
        let output = output_of(backing.frame);
        match extents.last_mut() {
            Some(last)
                if last.access == access
                    && last.guest.end() == at
                    && last.output.wrapping_add(last.guest.len()) == output =>
            {
                last.guest = AddrRange::new(last.guest.start(), page.end()).unwrap();
            }
            _ => extents.push(Extent { guest: page, output, access }),
        }
    }
    extents
}

/// What an access does next.
enum Next {
    Done,
    Again,
    Upgrade,
    Young,
    Fault,
}

impl Worker<'_> {
    /// What a page holds is what it has to hold, as long as `inside` (a scope, a lease, a device's lock) lasts.
    pub(crate) fn use_page(&mut self, page: usize, frame: Option<u32>, epoch: u64, least: u64, write: bool, by: &str) {
        let host = Arc::clone(&self.shared.host);
        let Some(frame) = frame else { return self.wrong(format!("{by} translates page {page} to no frame")) };
        if self.random.one_in(4) {
            self.random.dawdle();
        }
        let (tag, value) = host.contents(frame);
        if tag != tag_of(page) {
            return self.wrong(format!(
                "stale: {by} reads page {page} in frame {frame}: {tag:#x}, not {:#x}; the host has {:?}",
                tag_of(page),
                host.backing(page)
            ));
        }
        let most = host.ledger[page].load(Acquire) + 16;
        let same = epoch.is_multiple_of(2) && host.epochs[page].load(Acquire) == epoch;
        if same && !is_mergeable(page) && !(least..=most).contains(&value) {
            return self.wrong(format!(
                "lost: {by} reads page {page} in frame {frame}: {value} writes, not {least} to {most}"
            ));
        }
        if write {
            if self.random.one_in(64) {
                thread::sleep(Duration::from_micros(self.random.below(1000)));
            }
            host.write(page, frame);
        }
    }

    /// One access of a vCPU, with as many faults as it takes, within reason.
    pub(crate) fn access(&mut self, table: &dyn AnyTable, place: Place, write: bool) {
        let shared = self.shared;
        let host = Arc::clone(&shared.host);
        let gpa = place.gpa().wrapping_add(self.random.below(PAGE));
        let access = if write { Access::WRITE } else { Access::READ };
        for _ in 0..6 {
            let mut walker = self.walker();
            let scope = walker.enter();
            let alias = host.alias();
            let expected = place.page(alias);
            let (epoch, least) =
                expected.map_or((1, 0), |page| (host.epochs[page].load(Acquire), host.ledger[page].load(Acquire)));
            let found = table.translate(&scope, gpa, access);
            let mut next = Next::Again;
            match found {
                Ok(translation) => {
                    let frame = frame_at(translation.output());
                    if translation.leaf().len() > PAGE {
                        self.did(Activity::LeafOf2M);
                    }
                    let steady = matches!(place, Place::Page(_)) || (host.alias() == alias && !alias.is_changing());
                    match expected {
                        Some(_) if steady && write && matches!(place, Place::Alias(_)) && alias.read_only() => {
                            self.wrong(format!("{gpa} is writable in a read-only slot"));
                        }
                        Some(page) if steady => self.use_page(page, frame, epoch, least, write, "a guest"),
                        None if steady => {
                            self.wrong(format!("stale: {gpa} is translated although its slot is gone"));
                        }
                        // The slot is just being changed: one of the two.
                        _ => {
                            let tags = (0..2).map(|r| tag_of(r * SPAN + (gpa.as_u64() / PAGE) as usize % SPAN));
                            let tag = frame.map(|frame| host.tag(frame));
                            if !tags.into_iter().any(|one| Some(one) == tag) {
                                self.wrong(format!("stale: {gpa} in frame {frame:?} reads {tag:x?}"));
                            }
                        }
                    }
                    self.did(if write { Activity::Write } else { Activity::Read });
                    next = Next::Done;
                }
                Err(Miss::Denied { armed: true, .. }) => next = Next::Upgrade,
                Err(Miss::Old { .. }) => next = Next::Young,
                Err(Miss::Busy { .. }) => {}
                Err(Miss::Absent { .. } | Miss::Denied { .. }) => next = Next::Fault,
                Err(miss) => self.wrong(format!("{gpa}: {miss}")),
            }
            drop(scope);
            self.walker = Some(walker);
            match next {
                Next::Done => return,
                Next::Again => thread::yield_now(),
                Next::Upgrade => {
                    if table.upgrade(gpa) == Upgrade::Granted {
                        self.did(Activity::Upgrade);
                    }
                }
                Next::Young => {
                    table.make_young(gpa);
                    self.did(Activity::MadeYoung);
                }
                Next::Fault => {
                    if let (true, Some(page)) = (write, expected)
                        && host.backing(page).is_some_and(|backing| backing.shared)
                    {
                        self.copy_on_write(page);
                    }
                    if !self.fault(table, place, write) {
                        return;
                    }
                }
            }
            if self.shared.over() {
                return;
            }
        }
    }

    /// Windows over so many pages from `first` on, as the test itself counts them.
    pub(crate) fn windows(&self, of: &[AtomicU64], first: Place, count: usize) -> u64 {
        match first {
            Place::Page(page) => Host::stamps(of, page..page + count, false),
            Place::Alias(offset) => {
                let other = SPAN + offset;
                Host::stamps(of, offset..offset + count, true) + Host::stamps(of, other..other + count, false)
            }
        }
    }

    /// A retry has a reason, which the library can name and the test knows of.
    pub(crate) fn retried(&mut self, retry: &Retry, first: Place, count: usize, closed: u64) {
        self.did(Activity::Retry);
        let host = &self.shared.host;
        if self.windows(&host.opened, first, count) == closed {
            return self.wrong(format!("{retry}, but nobody opened one"));
        }
        let Some(key) = retry.window() else { return self.wrong(format!("{retry}, which is not named")) };
        let hosts = match first {
            Place::Page(page) if page / SPAN == MEMFD_REGION => vec![None],
            Place::Page(page) => vec![Some(hvas(page, count))],
            Place::Alias(offset) => vec![Some(hvas(offset, count)), Some(hvas(SPAN + offset, count))],
        };
        if !hosts.into_iter().any(|host| key.overlaps(&Stretch { guest: retry.range(), host })) {
            return self.wrong(format!("{retry}, which does not overlap"));
        }
        if self.random.one_in(2) {
            retry.wait_timeout(Duration::from_millis(20));
        }
    }

    /// Takes a fault through snapshot and lookup; hands it to `install`.
    pub(crate) fn faulting<R>(
        &mut self,
        first: Place,
        count: usize,
        install: impl FnOnce(Resolved<'_>) -> R,
    ) -> Option<(R, u64)> {
        let shared = self.shared;
        let host = &*shared.host;
        let range = AddrRange::with_len(first.gpa(), count as u64 * PAGE).unwrap();
        let early = self.sabotage(Sabotage::ResolveBeforeSnapshot).then(|| {
            let hva = match first {
                Place::Page(page) => (page / SPAN != MEMFD_REGION).then(|| hvas(page, count)),
                Place::Alias(_) => None,
            };
            let early = extents(host, range, hva);
            self.random.dawdle();
            early
        });
        let mut random = self.random.clone();
        self.random.next();
        let closed = self.windows(&host.closed, first, count);
        let mut walker = self.walker();
        let outcome = match walker.fault(range) {
            Ok(fault) => {
                let resolved = fault.resolve(|fault| {
                    random.dawdle();
                    match early {
                        Some(early) if !early.is_empty() => Ok(early),
                        _ => look_up(host, fault),
                    }
                });
                random.dawdle();
                resolved.ok().map(|resolved| Ok(install(resolved)))
            }
            Err(error) => Some(Err(error)),
        };
        self.walker = Some(walker);
        match outcome? {
            Ok(installed) => Some((installed, closed)),
            Err(FaultError::Retry(retry)) => {
                self.retried(&retry, first, count, closed);
                None
            }
            Err(FaultError::NotPopulated { .. }) => None,
            Err(error) => {
                self.wrong(format!("a fault on {range}: {error}"));
                None
            }
        }
    }

    /// Maps. Whether it is worth trying again.
    pub(crate) fn fault(&mut self, table: &dyn AnyTable, place: Place, write: bool) -> bool {
        let count = match self.random.below(16) {
            0 => SPAN,
            1..4 => 16,
            _ => 1,
        };
        let (first, _) = place.around(count);
        let how = How {
            access: if write || self.random.one_in(2) { Access::RWX } else { Access::RX },
            armed: self.random.one_in(4),
            accessed: !self.random.one_in(4),
            largest: if self.random.one_in(4) { PAGE } else { u64::MAX },
        };
        self.doing(Activity::FaultPage);
        let installed = self.faulting(first, count, |resolved| {
            let any = !resolved.extents().is_empty();
            resolved.install(|admission| {
                let mapped = table.map(admission, how);
                // Another output than the one looked up: only a window can have brought it, and it took this fault with it.
                let lost = admission.check(admission.range()).is_err();
                (any, mapped, lost)
            })
        });
        self.did(match count {
            1 => Activity::FaultPage,
            SPAN => Activity::FaultRegion,
            _ => Activity::FaultPages,
        });
        let Some(((any, mapped, lost), closed)) = installed else { return true };
        match mapped {
            Ok(_) => {
                self.did(Activity::Mapped);
                return any;
            }
            Err(MapError::Retry(retry)) => self.retried(&retry, first, count, closed),
            Err(MapError::Conflict { .. }) if lost => {}
            Err(MapError::NotJoined | MapError::Flush { .. }) => return false,
            Err(error) => self.wrong(format!("a fault on {place:?}: {error}")),
        }
        true
    }

    /// Merges small leaves of a whole region.
    pub(crate) fn collapse(&mut self, table: &dyn AnyTable, region: Place) {
        let (first, range) = region.around(SPAN);
        let build = self.random.one_in(2);
        let how = How { access: Access::RWX, armed: false, accessed: true, largest: PAGE };
        let collapsed = self.faulting(first, SPAN, |resolved| {
            resolved.install(|admission| {
                if build {
                    let _ = table.map(admission, how);
                }
                table.collapse(admission, range)
            })
        });
        let Some((collapsed, closed)) = collapsed else { return };
        match collapsed {
            Ok(0) => {}
            Ok(_) => self.did(Activity::Collapsed),
            Err(CollapseError::Retry { retry, .. }) => self.retried(&retry, first, SPAN, closed),
            Err(CollapseError::NotJoined | CollapseError::Flush { .. }) => {}
            Err(error) => self.wrong(format!("collapse of {range}: {error}")),
        }
    }

    pub(crate) fn protect(&mut self, table: &dyn AnyTable, place: Place) {
        let (first, range) = place.around(if self.random.one_in(8) { SPAN } else { 8 });
        let count = (range.len() / PAGE) as usize;
        let access = [Access::READ, Access::RX, Access::RW, Access::RWX][self.random.below(4) as usize];
        let protected = self
            .faulting(first, count, |resolved| resolved.install(|admission| table.protect(admission, range, access)));
        let Some((protected, closed)) = protected else { return };
        match protected {
            Ok(_) => self.did(Activity::Protected),
            Err(MapError::Retry(retry)) => self.retried(&retry, first, count, closed),
            Err(MapError::NotJoined | MapError::Flush { .. }) => {}
            Err(error) => self.wrong(format!("protect {range}: {error}")),
        }
    }

    /// What is translated in a scope is used after it, until a window wants it back.
    pub(crate) fn lease(&mut self, table: &dyn AnyTable) {
        let shared = self.shared;
        let host = Arc::clone(&shared.host);
        let page = pick(&mut self.random);
        let write = self.random.one_in(2);
        self.access(table, Place::Page(page), write);
        let mut walker = self.walker();
        let scope = walker.enter();
        let epoch = host.epochs[page].load(Acquire);
        let access = if write { Access::WRITE } else { Access::READ };
        let found = table.translate(&scope, gpa_of(page), access);
        let cancelled = Arc::new(AtomicBool::new(false));
        let hook = Arc::clone(&cancelled);
        let request = LeaseRequest::new(gpas(page, 1), "lessee").on_cancel(move || hook.store(true, Release));
        let leased = found.ok().map(|found| (frame_at(found.output()), scope.lease(request)));
        drop(scope);
        self.walker = Some(walker);
        let (frame, lease) = match leased {
            None => return,
            Some((frame, Ok(lease))) => (frame, lease),
            Some((_, Err(LeaseError::Retry(_)))) => return self.did(Activity::LeaseRefused),
            Some((_, Err(error))) => return self.wrong(error.to_string()),
        };
        self.did(Activity::LeaseTaken);
        if self.random.one_in(8) {
            Host::stamp(&host.opened, page..page + 1);
            match shared.space.zap(gpas(page, 1)) {
                Err(OpenError::Pinned { .. }) => self.did(Activity::LeaseVetoed),
                other => self.wrong(format!("a window over a lease: {other:?}")),
            }
            self.closed(page, 1);
        }
        for _ in 0..40 {
            let least = host.ledger[page].load(Acquire);
            self.use_page(page, frame, epoch, least, write, "a lease");
            if write {
                // Who writes through a lease says so himself.
                host.mark(page);
            }
            if cancelled.load(Acquire) && !lease.is_cancelled() {
                self.wrong("a hook was called for a lease that is not cancelled");
            }
            if lease.is_cancelled() {
                self.did(Activity::LeaseCancelled);
                break;
            }
            thread::sleep(Duration::from_micros(20));
        }
    }

    /// The device uses what it was told, or asks to be told.
    pub(crate) fn device(&mut self) {
        let Some(adapter) = self.shared.adapter.read().unwrap().clone() else { return };
        let host = Arc::clone(&self.shared.host);
        let page = pick(&mut self.random) % (2 * SPAN);
        let gpa = gpa_of(page);
        let write = self.random.one_in(2);
        {
            let mapped = adapter.consumer().mapped.lock().unwrap();
            if let Some(extent) = Device::find(&mapped, gpa)
                && (extent.access.writable() || !write)
            {
                let offset = gpa.as_u64() - extent.guest.start().as_u64();
                let (epoch, least) = (host.epochs[page].load(Acquire), host.ledger[page].load(Acquire));
                let frame = frame_at(extent.output.wrapping_add(offset));
                self.use_page(page, frame, epoch, least, write, "the device");
                if write {
                    host.mark(page);
                }
                return self.did(if write { Activity::DeviceWrite } else { Activity::DeviceRead });
            }
        }
        let count = if self.random.one_in(3) { 16 } else { 1 };
        let (first, _) = Place::Page(page).around(count);
        let mapped = self.faulting(first, count, |resolved| resolved.install(|admission| adapter.map(admission)));
        match mapped {
            None => {}
            Some((Ok(()), _)) => self.did(Activity::DeviceMap),
            Some((Err(CallMapError::Retry(retry)), closed)) => self.retried(&retry, first, count, closed),
            Some((Err(CallMapError::Outside { range }), _)) => self.wrong(format!("{range} is outside its own fault")),
            // Busy, gone, or mapped by another cut.
            Some((Err(_), _)) => {}
        }
    }
}
