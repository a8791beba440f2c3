// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: a toy table that keeps the protocol, and a subscriber made of closures.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test file uses a part")]

use std::{
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence},
    },
    time::Duration,
};

use notifier_core::*;

pub const PAGE: u64 = 0x1000;

pub fn gpa(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

pub fn hva(start: u64, len: u64) -> HvaRange {
    AddrRange::with_len(Hva::new(start), len).unwrap()
}

pub fn out(raw: u64) -> OutputAddr {
    OutputAddr::new(raw)
}

pub fn spec(guest: u64, len: u64, host: u64) -> SlotSpec {
    SlotSpec { guest: gpa(guest, len), host: Some(Hva::new(host)), flags: SlotFlags::empty() }
}

/// What a callback that fails says.
pub fn refused() -> SubscriberError {
    SubscriberError::Other("refused".into())
}

/// Waits until `what` holds, and fails after a while.
pub fn eventually(what: impl Fn() -> bool) {
    for _ in 0..5000 {
        if what() {
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    panic!("it never came to hold");
}

/// Runs `body` on a thread of its own and fails where it does not return: a deadlock is a failure, not a hang.
pub fn returns<R: Send + 'static>(body: impl FnOnce() -> R + Send + 'static) -> R {
    let (done, result) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let _ = done.send(body());
    });
    match result.recv_timeout(Duration::from_secs(20)) {
        Ok(result) => result,
        Err(std::sync::mpsc::RecvTimeoutError::Timeout) => panic!("blocked"),
        Err(_) => match thread.join() {
            Err(panic) => std::panic::resume_unwind(panic),
            Ok(()) => unreachable!(),
        },
    }
}

// ---- the toy table -------------------------------------------------------------------------------------------------

const CLAIMED: u64 = u64::MAX;
const PRESENT: u64 = 1;
const WRITE: u64 = 2;
/// A lockless upgrade may add the write bit (KVM: host-writable and MMU-writable).
const UPGRADE: u64 = 4;
const ACCESSED: u64 = 8;
const DIRTY: u64 = 16;
const FLAGS: u64 = PAGE - 1;

/// What an entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Seen {
    pub output: OutputAddr,
    pub writable: bool,
    pub upgradable: bool,
}

/// A table of one entry for each of the first pages of the guest, under the protocol.
pub struct Toy {
    name: String,
    space: Space,
    entries: Vec<AtomicU64>,
    pub fail_start: AtomicBool,
    pub fail_end: AtomicBool,
    pub fail_zap: AtomicBool,
    pub fail_change: AtomicBool,
    pub refuse_populate: AtomicBool,
    pub starts: AtomicUsize,
    pub ends: AtomicUsize,
    pub released: AtomicBool,
    pub populated: Mutex<Vec<Stretch>>,
}

impl Toy {
    pub fn new(space: &Space, pages: usize) -> Arc<Self> {
        Self::named(space, pages, "toy")
    }

    pub fn named(space: &Space, pages: usize, name: &str) -> Arc<Self> {
        Arc::new(Self {
            name: name.into(),
            space: space.clone(),
            entries: (0..pages).map(|_| AtomicU64::new(0)).collect(),
            fail_start: AtomicBool::new(false),
            fail_end: AtomicBool::new(false),
            fail_zap: AtomicBool::new(false),
            fail_change: AtomicBool::new(false),
            refuse_populate: AtomicBool::new(false),
            starts: AtomicUsize::new(0),
            ends: AtomicUsize::new(0),
            released: AtomicBool::new(false),
            populated: Mutex::default(),
        })
    }

    fn indices(&self, range: GpaRange) -> std::ops::Range<usize> {
        let range = range.align_out(PAGE);
        let limit = |addr: Gpa| usize::try_from(addr.as_u64() / PAGE).unwrap().min(self.entries.len());
        limit(range.start())..limit(range.end())
    }

    /// Puts what was resolved into the table: claim, check, publish or give back.
    pub fn install(&self, admission: &Admission<'_>) -> Result<(), Retry> {
        assert!(admission.is_of(&self.space));
        for extent in admission.extents() {
            let access = extent.access & admission.ceiling();
            for index in self.indices(extent.guest) {
                let page = gpa(index as u64 * PAGE, PAGE);
                let entry = &self.entries[index];
                let old = self.claim(entry);
                if self.released.load(Ordering::SeqCst) || admission.check(page).is_err() {
                    entry.store(old, Ordering::Release);
                    return Err(admission.retry());
                }
                let offset = page.start().as_u64() - extent.guest.start().as_u64();
                let rights = if access.writable() { WRITE | UPGRADE | DIRTY } else { 0 };
                entry.store((extent.output.as_u64() + offset) | PRESENT | rights, Ordering::Release);
            }
        }
        Ok(())
    }

    fn claim(&self, entry: &AtomicU64) -> u64 {
        loop {
            let old = entry.load(Ordering::Relaxed);
            if old == CLAIMED {
                std::thread::yield_now();
            } else if entry.compare_exchange(old, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok() {
                return old;
            }
        }
    }

    /// Every entry of a range, claims waited out; `change` says what each becomes.
    fn walk(&self, range: GpaRange, mut change: impl FnMut(usize, u64) -> u64) {
        for index in self.indices(range) {
            let entry = &self.entries[index];
            loop {
                let old = entry.load(Ordering::Acquire);
                if old == CLAIMED {
                    std::thread::yield_now();
                    continue;
                }
                let new = if old == 0 { 0 } else { change(index, old) };
                if entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).is_ok() {
                    break;
                }
            }
        }
    }

    fn flush(&self, nonblocking: bool) -> Result<(), SubscriberError> {
        self.space.wait_for_scopes(nonblocking).map_err(|error| match error {
            ScopeWaitError::WouldBlock => SubscriberError::WouldBlock,
            error => SubscriberError::Flush(error.into()),
        })
    }

    fn clear(&self, stretches: &[Stretch], nonblocking: bool) -> Result<(), SubscriberError> {
        for range in stretches.iter().filter_map(|stretch| stretch.guest) {
            self.walk(range, |index, old| {
                self.report(index, old);
                0
            });
        }
        self.flush(nonblocking)
    }

    fn report(&self, index: usize, old: u64) {
        if old & DIRTY != 0 {
            self.space.report_dirty(gpa(index as u64 * PAGE, PAGE));
        }
    }

    /// What the guest reads through the table, inside a scope.
    pub fn read(&self, scope: &Scope<'_>, addr: u64) -> Option<OutputAddr> {
        assert!(scope.is_of(&self.space));
        let entry = self.entries[usize::try_from(addr / PAGE).unwrap()].load(Ordering::Acquire);
        (entry != CLAIMED && entry & PRESENT != 0).then(|| out(entry & !FLAGS))
    }

    /// A write through the table: by its write bit, or by a lockless upgrade. Where it goes.
    pub fn write(&self, _scope: &Scope<'_>, addr: u64) -> Option<OutputAddr> {
        let entry = &self.entries[usize::try_from(addr / PAGE).unwrap()];
        let old = entry.load(Ordering::Acquire);
        if old == CLAIMED || old & PRESENT == 0 || old & (WRITE | UPGRADE) == 0 {
            return None;
        }
        let new = old | WRITE | DIRTY;
        entry.compare_exchange(old, new, Ordering::AcqRel, Ordering::Relaxed).ok().map(|_| out(old & !FLAGS))
    }

    /// What an entry says now.
    pub fn peek(&self, addr: u64) -> Option<Seen> {
        let entry = self.entries[usize::try_from(addr / PAGE).unwrap()].load(Ordering::Acquire);
        (entry != CLAIMED && entry & PRESENT != 0).then(|| Seen {
            output: out(entry & !FLAGS),
            writable: entry & WRITE != 0,
            upgradable: entry & UPGRADE != 0,
        })
    }

    /// Sets the write bit aside and leaves the upgrade bit, as dirty logging does.
    pub fn log_dirty(&self, addr: u64) {
        self.walk(gpa(addr, PAGE), |_, old| old & !(WRITE | DIRTY));
    }

    pub fn touch(&self, addr: u64) {
        self.walk(gpa(addr, PAGE), |_, old| old | ACCESSED);
    }

    pub fn populated(&self) -> Vec<Stretch> {
        lock(&self.populated).clone()
    }
}

pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

impl Subscriber for Toy {
    fn name(&self) -> &str {
        &self.name
    }

    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        if self.fail_start.load(Ordering::SeqCst) {
            return Err(refused());
        }
        match window.mode() {
            Mode::Zapped => self.clear(window.stretches(), window.nonblocking())?,
            Mode::Retained => {
                for range in window.guest() {
                    self.walk(range, |index, old| {
                        self.report(index, old);
                        old & !(WRITE | UPGRADE | DIRTY)
                    });
                }
                self.flush(window.nonblocking())?;
            }
        }
        self.starts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn end(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        if self.fail_end.load(Ordering::SeqCst) {
            return Err(refused());
        }
        self.ends.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        if self.fail_zap.load(Ordering::SeqCst) {
            return Err(refused());
        }
        self.clear(part.stretches(), part.nonblocking())
    }

    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        if self.fail_change.load(Ordering::SeqCst) {
            return Err(refused());
        }
        for (page, outcome) in batch.pages().iter().zip(outcomes) {
            let Some(guest) = page.guest else { continue };
            self.walk(gpa(guest.as_u64(), PAGE), |_, old| {
                let found = out(old & !FLAGS);
                if found == page.expected {
                    *outcome = PageOutcome::Changed;
                    page.new.as_u64() | PRESENT | (old & ACCESSED)
                } else {
                    *outcome = PageOutcome::Zapped { found: Some(found) };
                    0
                }
            });
        }
        self.flush(false)
    }

    fn age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let mut young = false;
        for range in reach.iter().filter_map(|stretch| stretch.guest) {
            self.walk(range, |_, old| {
                young |= old & ACCESSED != 0;
                old & !ACCESSED
            });
        }
        Ok(young)
    }

    fn test_age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let mut young = false;
        for range in reach.iter().filter_map(|stretch| stretch.guest) {
            self.walk(range, |_, old| {
                young |= old & ACCESSED != 0;
                old
            });
        }
        Ok(young)
    }

    fn populate(&self, part: &Stretch) -> Result<(), SubscriberError> {
        if self.refuse_populate.load(Ordering::SeqCst) {
            return Err(refused());
        }
        lock(&self.populated).push(*part);
        Ok(())
    }

    fn release(&self) -> Result<(), SubscriberError> {
        self.released.store(true, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        if let Some(last) = self.entries.len().checked_sub(1) {
            self.walk(gpa(0, (last as u64 + 1) * PAGE), |_, _| 0);
        }
        let _ = self.space.wait_for_scopes(false);
        Ok(())
    }
}

/// A space with one slot of `pages` pages at guest 0 and host 0x10_0000, and a toy table in it.
pub fn world(pages: u64) -> (Space, Arc<Toy>, Subscription) {
    let space = Space::new();
    space.add_slot(spec(0, pages * PAGE, HOST)).unwrap();
    let toy = Toy::new(&space, usize::try_from(pages).unwrap() + 64);
    let subscription = space.subscribe(Arc::clone(&toy)).unwrap();
    (space, toy, subscription)
}

/// Where [`world`]'s memory lies in the host.
pub const HOST: u64 = 0x10_0000;

/// Where the page at guest `addr` of [`world`] lies to begin with.
pub fn home(addr: u64) -> OutputAddr {
    out(0x8000_0000 + addr)
}

/// Faults a page in, once.
pub fn try_fault(walker: &mut Walker, toy: &Toy, addr: u64, output: OutputAddr) -> Result<(), FaultError> {
    let fault = walker.fault(gpa(addr, PAGE))?;
    let resolved = fault
        .resolve(|fault| Ok::<_, std::convert::Infallible>(Extent { guest: fault.range(), output, access: Access::RW }))
        .unwrap();
    resolved.install(|admission| toy.install(admission)).map_err(FaultError::from)
}

/// Faults pages in at home.
pub fn fault_in(space: &Space, toy: &Toy, pages: impl IntoIterator<Item = u64>) {
    let mut walker = space.walker();
    for page in pages {
        try_fault(&mut walker, toy, page * PAGE, home(page * PAGE)).unwrap();
    }
}

pub fn is_retry(result: &Result<impl Sized, FaultError>) -> bool {
    matches!(result, Err(FaultError::Retry(_)))
}

// ---- a subscriber made of closures -----------------------------------------------------------------------------------

type Hook = Box<dyn Fn(&Coverage<'_>) -> Result<(), SubscriberError> + Send + Sync>;

/// Tells a log of every call, and does what its closures do.
pub struct Probe {
    name: String,
    log: Log,
    start: Hook,
    end: Hook,
    zap: Hook,
    pinned: Option<Interest>,
}

/// Calls in their order: name, call, window.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<Vec<(String, &'static str)>>>);

impl Log {
    pub fn push(&self, name: &str, call: &'static str) {
        lock(&self.0).push((name.into(), call));
    }

    /// `"a.start b.start a.end"`; what was there is taken.
    pub fn take(&self) -> String {
        let all: Vec<_> = std::mem::take(&mut *lock(&self.0));
        all.iter().map(|(name, call)| format!("{name}.{call}")).collect::<Vec<_>>().join(" ")
    }
}

impl Probe {
    pub fn new(name: &str, log: &Log) -> Self {
        let nothing = || -> Hook { Box::new(|_| Ok(())) };
        Self { name: name.into(), log: log.clone(), start: nothing(), end: nothing(), zap: nothing(), pinned: None }
    }

    pub fn on_start(
        mut self,
        hook: impl Fn(&Coverage<'_>) -> Result<(), SubscriberError> + Send + Sync + 'static,
    ) -> Self {
        self.start = Box::new(hook);
        self
    }

    pub fn on_end(
        mut self,
        hook: impl Fn(&Coverage<'_>) -> Result<(), SubscriberError> + Send + Sync + 'static,
    ) -> Self {
        self.end = Box::new(hook);
        self
    }

    pub fn on_zap(
        mut self,
        hook: impl Fn(&Coverage<'_>) -> Result<(), SubscriberError> + Send + Sync + 'static,
    ) -> Self {
        self.zap = Box::new(hook);
        self
    }

    pub fn pinned(mut self, interest: Interest) -> Self {
        self.pinned = Some(interest);
        self
    }
}

impl Subscriber for Probe {
    fn name(&self) -> &str {
        &self.name
    }

    fn not_invalidatable(&self) -> Option<Interest> {
        self.pinned
    }

    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.log.push(&self.name, "start");
        (self.start)(window)
    }

    fn end(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.log.push(&self.name, "end");
        (self.end)(window)
    }

    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.log.push(&self.name, "zap");
        (self.zap)(part)
    }

    fn populate(&self, _: &Stretch) -> Result<(), SubscriberError> {
        self.log.push(&self.name, "populate");
        Ok(())
    }

    fn release(&self) -> Result<(), SubscriberError> {
        self.log.push(&self.name, "release");
        Ok(())
    }
}
