// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Members of the space: a toy table and a device behind a call adapter, both inside a wrapper that fails on request and
//! writes down every call.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use notifier_core::*;

use super::{
    Plant,
    truth::{GUEST, PAGE, guest_page, pages_of},
};

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What a member has of a guest page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) frame: u64,
    pub(crate) write: bool,
    /// A lockless upgrade may add the write bit.
    pub(crate) armed: bool,
    pub(crate) young: bool,
}

/// What a call was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Call {
    Joined,
    Start,
    End,
    Zap,
    Change,
    Populate,
    Release,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Event {
    pub(crate) member: usize,
    pub(crate) call: Call,
    /// 0 where the call belongs to no window.
    pub(crate) window: u64,
    pub(crate) ok: bool,
    /// The count while the call ran.
    pub(crate) count: usize,
}

pub(crate) type Log = Arc<Mutex<Vec<Event>>>;

/// Bits of [`Member::fails`].
pub(crate) mod fails {
    pub(crate) const START: u32 = 1;
    /// The start does its work and fails then.
    pub(crate) const START_LATE: u32 = 2;
    pub(crate) const END: u32 = 4;
    pub(crate) const ZAP: u32 = 8;
    pub(crate) const CHANGE: u32 = 16;
    /// The repointing does its work and fails then.
    pub(crate) const CHANGE_LATE: u32 = 32;
    pub(crate) const RELEASE: u32 = 64;
    pub(crate) const POPULATE: u32 = 128;
    /// It says that it cannot be invalidated.
    pub(crate) const PINNED: u32 = 256;
    pub(crate) const JOIN: u32 = 512;
    /// The start says that something is pinned.
    pub(crate) const START_PINNED: u32 = 1024;
    /// A callback panics instead of failing. Never set while something is fuzzed: libFuzzer ends at each panic.
    pub(crate) const ALL: u32 = 2047;
}

/// A table of one entry a page.
#[derive(Debug)]
pub(crate) struct Pages {
    space: Space,
    plant: Plant,
    entries: Mutex<Vec<Option<Entry>>>,
    membership: OnceLock<Membership>,
    /// It has no `change_pte` of its own.
    simple: bool,
}

impl Pages {
    fn each(&self, reach: &[Stretch], mut change: impl FnMut(&mut Option<Entry>)) {
        let mut entries = lock(&self.entries);
        for guest in reach.iter().filter_map(|stretch| stretch.guest) {
            for page in pages_of(guest).filter(|page| *page < GUEST) {
                change(&mut entries[page as usize]);
            }
        }
    }

    fn flush(&self, nonblocking: bool) -> Result<(), SubscriberError> {
        self.space.wait_for_scopes(nonblocking).map_err(|error| match error {
            ScopeWaitError::WouldBlock => SubscriberError::WouldBlock,
            error => SubscriberError::Flush(error.into()),
        })
    }

    fn install(&self, admission: &Admission<'_>) -> Result<(), Installed> {
        let membership = self.membership.get().ok_or(Installed::NotMember)?;
        let write = admission.ceiling().writable();
        for extent in admission.extents() {
            for page in pages_of(extent.guest) {
                let span = AddrRange::with_len(guest_page(page), PAGE).expect("a page");
                match admission.check_for(membership, span) {
                    Ok(()) => {}
                    Err(_) if self.plant == Plant::InstallsUnchecked => {}
                    Err(Refused::Lost) => return Err(Installed::Lost(admission.retry())),
                    Err(Refused::NotMember) => return Err(Installed::NotMember),
                    Err(refused) => panic!("a page of the fault is {refused:?}"),
                }
                let write = write && extent.access.writable();
                let frame = extent.output.as_u64() + (span.start().as_u64() - extent.guest.start().as_u64());
                lock(&self.entries)[page as usize] = Some(Entry { frame, write, armed: write, young: true });
            }
        }
        Ok(())
    }
}

impl Subscriber for Pages {
    fn joined(&self, membership: Membership) -> Result<(), SubscriberError> {
        self.membership.set(membership).map_err(|_| SubscriberError::Other("joined twice".into()))
    }

    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        match (window.mode(), self.plant) {
            (Mode::Zapped, Plant::KeepsZapped) => {}
            (Mode::Zapped, _) => self.each(window.stretches(), |entry| *entry = None),
            (Mode::Retained, plant) => self.each(window.stretches(), |entry| {
                if let Some(entry) = entry {
                    entry.write &= plant == Plant::KeepsWrite;
                    entry.armed &= matches!(plant, Plant::KeepsUpgrade | Plant::KeepsWrite);
                }
            }),
        }
        self.flush(window.nonblocking())
    }

    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        if self.plant != Plant::KeepsUnsettled {
            self.each(part.stretches(), |entry| *entry = None);
        }
        self.flush(part.nonblocking())
    }

    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        if self.simple {
            self.each(&batch.stretches(), |entry| *entry = None);
            outcomes.fill(PageOutcome::Zapped { found: None });
            return self.flush(false);
        }
        for (page, outcome) in batch.pages().iter().zip(outcomes) {
            let Some(guest) = page.guest else { continue };
            let index = (guest.as_u64() / PAGE) as usize;
            let mut entries = lock(&self.entries);
            let Some(entry) = entries.get_mut(index) else { continue };
            let made = Entry { frame: page.new.as_u64(), write: false, armed: false, young: false };
            match entry {
                None if self.plant == Plant::ChangeCreates => *entry = Some(made),
                None => {}
                Some(found) if found.frame == page.expected.as_u64() => {
                    *outcome = PageOutcome::Changed;
                    if self.plant != Plant::ChangeLies {
                        *found = Entry { young: found.young, ..made };
                    }
                }
                Some(found) => {
                    *outcome = PageOutcome::Zapped { found: Some(OutputAddr::new(found.frame)) };
                    *entry = None;
                }
            }
        }
        self.flush(false)
    }

    fn age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let mut any = false;
        self.each(reach, |entry| {
            if let Some(entry) = entry {
                any |= entry.young;
                entry.young = false;
            }
        });
        Ok(any)
    }

    fn test_age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let mut any = false;
        self.each(reach, |entry| any |= entry.is_some_and(|entry| entry.young));
        Ok(any)
    }

    fn release(&self) -> Result<(), SubscriberError> {
        lock(&self.entries).fill(None);
        self.flush(false)
    }
}

/// A device that is told by calls. Its own account of what is mapped.
#[derive(Debug)]
pub(crate) struct Device {
    mapped: Mutex<BTreeMap<u64, Extent>>,
    makes_read_only: bool,
}

impl CallConsumer for Device {
    fn map(&self, extent: &Extent) -> Result<(), CallError> {
        let before = lock(&self.mapped).insert(extent.guest.start().as_u64(), *extent);
        assert!(before.is_none(), "mapped over {before:?}");
        Ok(())
    }

    fn unmap(&self, extent: &Extent) -> Result<(), CallError> {
        let found = lock(&self.mapped).remove(&extent.guest.start().as_u64());
        let found = found.map(|found| (found.guest, found.output));
        assert_eq!(found, Some((extent.guest, extent.output)), "unmapped what was not mapped so");
        Ok(())
    }

    fn make_read_only(&self, extent: &Extent) -> Result<bool, CallError> {
        if !self.makes_read_only {
            return Ok(false);
        }
        let mut mapped = lock(&self.mapped);
        let found = mapped.get_mut(&extent.guest.start().as_u64()).expect("protected what was not mapped");
        found.access = found.access.read_only();
        Ok(true)
    }
}

#[derive(Debug)]
pub(crate) enum Kind {
    Pages(Pages),
    Calls(CallAdapter<Device>),
}

/// Why nothing was installed.
#[derive(Debug)]
pub(crate) enum Installed {
    Lost(Retry),
    NotMember,
    /// The device has something else there.
    Present,
}

#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) number: usize,
    pub(crate) kind: Kind,
    fails: AtomicU32,
    space: Space,
    log: Log,
}

impl Member {
    pub(crate) fn new(number: usize, space: &Space, log: &Log, plant: Plant, how: u8) -> Arc<Self> {
        let kind = if how & 3 == 3 {
            let device = Device { mapped: Mutex::default(), makes_read_only: how & 4 != 0 };
            Kind::Calls(CallAdapter::new(device))
        } else {
            let entries = Mutex::new(vec![None; GUEST as usize]);
            let simple = how & 3 == 2;
            Kind::Pages(Pages { space: space.clone(), plant, entries, membership: OnceLock::new(), simple })
        };
        Arc::new(Self { number, kind, fails: AtomicU32::new(0), space: space.clone(), log: Arc::clone(log) })
    }

    pub(crate) fn is_simple(&self) -> bool {
        matches!(&self.kind, Kind::Pages(Pages { simple: true, .. }))
    }

    pub(crate) fn fails(&self, bits: u32) -> bool {
        self.fails.load(Ordering::SeqCst) & bits != 0
    }

    pub(crate) fn set_fails(&self, bits: u32) {
        self.fails.store(bits, Ordering::SeqCst);
    }

    /// What it has, by page.
    pub(crate) fn entries(&self) -> Vec<Option<Entry>> {
        match &self.kind {
            Kind::Pages(pages) => lock(&pages.entries).clone(),
            Kind::Calls(adapter) => {
                let mut entries = vec![None; GUEST as usize];
                for extent in lock(&adapter.consumer().mapped).values() {
                    for page in pages_of(extent.guest) {
                        let frame = extent.output.as_u64() + (page * PAGE - extent.guest.start().as_u64());
                        let write = extent.access.writable();
                        entries[page as usize] = Some(Entry { frame, write, armed: false, young: false });
                    }
                }
                entries
            }
        }
    }

    pub(crate) fn install(&self, admission: &Admission<'_>) -> Result<(), Installed> {
        match &self.kind {
            Kind::Pages(pages) => pages.install(admission),
            Kind::Calls(adapter) => match adapter.map(admission) {
                Ok(()) => Ok(()),
                Err(CallMapError::Retry(retry)) => Err(Installed::Lost(retry)),
                Err(CallMapError::Left | CallMapError::NotMember { .. }) => Err(Installed::NotMember),
                Err(CallMapError::Present { .. }) => Err(Installed::Present),
                Err(error) => panic!("the adapter did not map: {error}"),
            },
        }
    }

    /// Raises rights of what is there, as a protection that is lifted does.
    pub(crate) fn raise(&self, admission: &Admission<'_>) -> Result<(), Refused> {
        let Kind::Pages(pages) = &self.kind else { return Ok(()) };
        let Some(membership) = pages.membership.get() else { return Err(Refused::NotMember) };
        for page in pages_of(admission.range()) {
            let span = AddrRange::with_len(guest_page(page), PAGE).expect("a page");
            match admission.check_for(membership, span) {
                Err(refused) if pages.plant != Plant::InstallsUnchecked => return Err(refused),
                _ => {}
            }
            if let Some(entry) = &mut lock(&pages.entries)[page as usize] {
                entry.write = admission.ceiling().writable();
                entry.armed = entry.write;
            }
        }
        Ok(())
    }

    /// What the guest does: a write where it is allowed or armed; or what dirty logging does.
    pub(crate) fn touch(&self, page: u64, log_dirty: bool) {
        let Kind::Pages(pages) = &self.kind else { return };
        if let Some(entry) = &mut lock(&pages.entries)[page as usize] {
            entry.young = true;
            if log_dirty {
                entry.write = false;
            } else if entry.armed {
                entry.write = true;
            }
        }
    }

    /// Breaks something, for [`Plant::RefusalChanges`].
    pub(crate) fn disturb(&self) {
        if let Kind::Pages(pages) = &self.kind {
            lock(&pages.entries).iter_mut().for_each(|entry| *entry = None);
        }
    }

    fn inner(&self) -> &dyn Subscriber {
        match &self.kind {
            Kind::Pages(pages) => pages,
            Kind::Calls(adapter) => adapter,
        }
    }

    fn call<R>(
        &self,
        call: Call,
        window: u64,
        before: u32,
        after: u32,
        work: impl FnOnce() -> Result<R, SubscriberError>,
    ) -> Result<R, SubscriberError> {
        let count = self.space.progress().count;
        let result = if self.fails(before) {
            Err(SubscriberError::Other("told to fail".into()))
        } else {
            match work() {
                Ok(_) if self.fails(after) => Err(SubscriberError::Other("told to fail late".into())),
                result => result,
            }
        };
        lock(&self.log).push(Event { member: self.number, call, window, ok: result.is_ok(), count });
        result
    }
}

impl Subscriber for Member {
    fn name(&self) -> &str {
        "fuzzed"
    }

    fn not_invalidatable(&self) -> Option<Interest> {
        self.fails(fails::PINNED).then_some(Interest::Whole)
    }

    fn joined(&self, membership: Membership) -> Result<(), SubscriberError> {
        self.call(Call::Joined, 0, fails::JOIN, 0, || self.inner().joined(membership))
    }

    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.call(Call::Start, window.window(), fails::START, fails::START_LATE, || {
            if self.fails(fails::START_PINNED) {
                let range = AddrRange::with_len(Gpa::new(0), PAGE).expect("a page");
                return Err(SubscriberError::Pinned { range });
            }
            self.inner().start(window)
        })
    }

    fn end(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.call(Call::End, window.window(), fails::END, 0, || self.inner().end(window))
    }

    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.call(Call::Zap, part.window(), fails::ZAP, 0, || self.inner().zap(part))
    }

    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        let work = || self.inner().change_pte(batch, outcomes);
        self.call(Call::Change, batch.window(), fails::CHANGE, fails::CHANGE_LATE, work)
    }

    fn age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        self.inner().age(reach)
    }

    fn test_age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        self.inner().test_age(reach)
    }

    fn populate(&self, part: &Stretch) -> Result<(), SubscriberError> {
        self.call(Call::Populate, 0, fails::POPULATE, 0, || self.inner().populate(part))
    }

    fn release(&self) -> Result<(), SubscriberError> {
        self.call(Call::Release, 0, fails::RELEASE, 0, || self.inner().release())
    }
}
