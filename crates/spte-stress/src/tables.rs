// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables of any format, and a device that is told of translations by calls.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::*},
    },
};

use notifier_core::{
    Access, Admission, CallConsumer, CallError, Extent, Gpa, GpaRange, JoinError, Scope, Space, Subscription,
};
use spte_core::{
    CollapseError, Flush, FlushError, FlushFailed, FlushRequest, Format, Found, HarvestError, HeapPages, MapError,
    MapOptions, Mapped, Miss, RemoveError, Removed, SplitError, Stats, Table, Translation, Upgrade, format::Kind,
};

use crate::host::{Host, frame_at};

/// A TLB flush that takes its time, would rather not when it must not wait, and now and then fails.
#[derive(Debug)]
pub(crate) struct Flaky {
    calls: AtomicU64,
    failures: Option<u64>,
}

impl Flaky {
    /// One flush in `failures` fails.
    pub(crate) fn new(failures: Option<u64>) -> Self {
        Self { calls: AtomicU64::new(0), failures }
    }
}

impl Flush for Flaky {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        let call = self.calls.fetch_add(1, Relaxed);
        if request.nonblocking && call.is_multiple_of(8) {
            return Err(FlushError::WouldBlock);
        }
        if self.failures.is_some_and(|n| call % n == n - 1) {
            return Err(FlushError::Failed { code: 5 });
        }
        if call.is_multiple_of(16) {
            std::thread::yield_now();
        }
        Ok(())
    }
}

/// How leaves are to be made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct How {
    pub(crate) access: Access,
    pub(crate) armed: bool,
    pub(crate) accessed: bool,
    pub(crate) largest: u64,
}

/// A leaf, as a look at the table finds it.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LeafSeen {
    pub(crate) start: Gpa,
    pub(crate) span: u64,
    pub(crate) frame: Option<u32>,
    /// Writing is granted or armed.
    pub(crate) writable: bool,
}

/// A table of some format.
pub(crate) trait AnyTable: Send + Sync + fmt::Debug {
    fn translate<'s>(&self, scope: &'s Scope<'_>, gpa: Gpa, access: Access) -> Result<Translation<'s>, Miss>;
    fn map(&self, admission: &Admission<'_>, how: How) -> Result<Mapped, MapError>;
    fn protect(&self, admission: &Admission<'_>, range: GpaRange, access: Access) -> Result<Mapped, MapError>;
    fn collapse(&self, admission: &Admission<'_>, range: GpaRange) -> Result<usize, CollapseError>;
    fn upgrade(&self, gpa: Gpa) -> Upgrade;
    fn make_young(&self, gpa: Gpa) -> bool;
    fn unmap(&self, range: GpaRange) -> Result<Removed, RemoveError>;
    fn restrict(&self, range: GpaRange, access: Access) -> Result<Removed, RemoveError>;
    fn arm(&self, range: GpaRange) -> Result<Removed, RemoveError>;
    fn split(&self, range: GpaRange) -> Result<(), SplitError>;
    fn trim(&self, range: GpaRange) -> Result<usize, FlushFailed>;
    fn age(&self, range: GpaRange) -> Result<u64, FlushFailed>;
    fn harvest(&self, range: GpaRange) -> Result<Vec<GpaRange>, HarvestError>;
    fn leaves(&self, range: GpaRange) -> Vec<LeafSeen>;
    fn stats(&self) -> Stats;
    fn live_pages(&self) -> u64;
    fn check(&self) -> Result<(), String>;
}

impl<F: Format> AnyTable for Table<F, HeapPages, Flaky> {
    fn translate<'s>(&self, scope: &'s Scope<'_>, gpa: Gpa, access: Access) -> Result<Translation<'s>, Miss> {
        Table::translate(self, scope, gpa, access)
    }
    fn map(&self, admission: &Admission<'_>, how: How) -> Result<Mapped, MapError> {
        let options = MapOptions::default().access(how.access).armed(how.armed).accessed(how.accessed);
        Table::map(self, admission, &options.largest(how.largest))
    }
    fn protect(&self, admission: &Admission<'_>, range: GpaRange, access: Access) -> Result<Mapped, MapError> {
        Table::protect(self, admission, range, access)
    }
    fn collapse(&self, admission: &Admission<'_>, range: GpaRange) -> Result<usize, CollapseError> {
        Table::collapse(self, admission, range)
    }
    fn upgrade(&self, gpa: Gpa) -> Upgrade {
        Table::upgrade(self, gpa)
    }
    fn make_young(&self, gpa: Gpa) -> bool {
        Table::make_young(self, gpa)
    }
    fn unmap(&self, range: GpaRange) -> Result<Removed, RemoveError> {
        Table::unmap(self, range)
    }
    fn restrict(&self, range: GpaRange, access: Access) -> Result<Removed, RemoveError> {
        Table::restrict(self, range, access)
    }
    fn arm(&self, range: GpaRange) -> Result<Removed, RemoveError> {
        Table::arm(self, range)
    }
    fn split(&self, range: GpaRange) -> Result<(), SplitError> {
        Table::split(self, range)
    }
    fn trim(&self, range: GpaRange) -> Result<usize, FlushFailed> {
        Table::trim(self, range)
    }
    fn age(&self, range: GpaRange) -> Result<u64, FlushFailed> {
        Table::age(self, range)
    }
    fn harvest(&self, range: GpaRange) -> Result<Vec<GpaRange>, HarvestError> {
        Table::harvest_dirty(self, range)
    }
    fn leaves(&self, range: GpaRange) -> Vec<LeafSeen> {
        let mut leaves = Vec::new();
        self.visit(range, |Found { level, start, span, raw, kind }| {
            if kind == Kind::Leaf {
                let spec = self.format().spec(level, raw);
                let frame = frame_at(spec.output);
                leaves.push(LeafSeen { start, span, frame, writable: spec.access.writable() });
            }
        });
        leaves
    }
    fn stats(&self) -> Stats {
        Table::stats(self)
    }
    fn live_pages(&self) -> u64 {
        self.pages().live()
    }
    fn check(&self) -> Result<(), String> {
        Table::check(self).map_err(|(at, error)| format!("{at}: {error}"))
    }
}

/// A table of some format, and its place in the run's space: see [`join`].
#[derive(Debug)]
pub struct Member {
    pub(crate) table: Arc<dyn AnyTable>,
    pub(crate) subscription: Subscription,
    /// For the end: pages that are not free yet.
    pub(crate) pages: Arc<HeapPages>,
}

/// Makes a table of `format` and joins it. Its flushes take their time, would block now and then where they must not, and
/// fail: one in `failures`, or none.
///
/// # Errors
/// [`JoinError`], as [`Space::subscribe`] has it.
///
/// # Panics
/// Where the heap has no page for the root, and in flushes where `failures` is 0.
pub fn join<F: Format>(space: &Space, format: F, failures: Option<u64>) -> Result<Member, JoinError> {
    let pages = Arc::new(HeapPages::new());
    let table = Table::new(space, format, Arc::clone(&pages), Flaky::new(failures)).expect("a root page");
    let subscription = space.subscribe(Arc::clone(&table))?;
    Ok(Member { table, subscription, pages })
}

/// A device with an IOTLB of its own: it uses what it was told under a lock that calls take too.
#[derive(Debug)]
pub(crate) struct Device {
    host: Arc<Host>,
    pub(crate) mapped: Mutex<BTreeMap<Gpa, Extent>>,
    calls: AtomicU64,
}

impl Device {
    pub(crate) fn new(host: Arc<Host>) -> Self {
        Self { host, mapped: Mutex::default(), calls: AtomicU64::new(0) }
    }

    /// What is mapped over `gpa`.
    pub(crate) fn find(mapped: &BTreeMap<Gpa, Extent>, gpa: Gpa) -> Option<Extent> {
        let (_, extent) = mapped.range(..=gpa).next_back()?;
        extent.guest.contains(gpa).then_some(*extent)
    }

    fn wrong(&self, what: &str, extent: &Extent) {
        self.host.failure.report(format!("the device was asked to {what} {extent:?}"));
    }
}

impl CallConsumer for Device {
    fn map(&self, extent: &Extent) -> Result<(), CallError> {
        if self.calls.fetch_add(1, Relaxed) % 64 == 63 {
            return Err("the device is busy".into());
        }
        let mut mapped = self.mapped.lock().unwrap();
        let before = mapped.range(..extent.guest.end()).next_back();
        if before.is_some_and(|(_, other)| other.guest.overlaps(&extent.guest)) {
            self.wrong("map what is mapped", extent);
        }
        mapped.insert(extent.guest.start(), *extent);
        Ok(())
    }

    fn unmap(&self, extent: &Extent) -> Result<(), CallError> {
        if self.mapped.lock().unwrap().remove(&extent.guest.start()).map(|was| was.guest) != Some(extent.guest) {
            self.wrong("unmap what is not mapped so", extent);
        }
        Ok(())
    }

    fn make_read_only(&self, extent: &Extent) -> Result<bool, CallError> {
        if self.calls.fetch_add(1, Relaxed).is_multiple_of(2) {
            return Ok(false);
        }
        match self.mapped.lock().unwrap().get_mut(&extent.guest.start()) {
            Some(mapped) => mapped.access = mapped.access.read_only(),
            None => self.wrong("protect what is not mapped", extent),
        }
        Ok(true)
    }
}
