// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A small VMM for one machine: a space, a table in it that the machine walks, and a fault handler.

use std::collections::BTreeSet;
use std::error::Error;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use notifier_core::{
    Access, AddrRange, Admission, Change, Extent, Gpa, GpaRange, Outcome, OutputAddr, Space, Subscription, Walker,
};
use spte_core::format::{Format, Kind, Level, Touch};
use spte_core::{Flush, FlushError, FlushRequest, MapOptions, Table};
use spte_drive::access as rights;
use spte_model::TouchKind;
use thiserror::Error;

use crate::emulator::Lost;
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Machine, Work};
use crate::memory::TablePages;
use crate::mmu::Mmu;

/// How long a guest at work may take for a pass.
const PATIENCE: Duration = Duration::from_secs(60);

/// What went wrong that no test expects.
#[derive(Debug, Error)]
pub enum VmmError {
    /// The machine is gone.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// A call that nothing stood in the way of.
    #[error("{call} at {at:#x}: {source}")]
    Call {
        /// What was called.
        call: &'static str,
        /// Where.
        at: u64,
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A fault that the handler has no answer to.
    #[error("a guest at work faulted: {fault}")]
    Fault {
        /// The fault.
        fault: Fault,
    },
    /// The guest at work does not get on.
    #[error("the guest at work is in pass {passes} and does not get on")]
    Stuck {
        /// How far it came.
        passes: u64,
    },
    /// Something was otherwise than it has to be.
    #[error("{0}")]
    Wrong(String),
}

pub(crate) fn failed<E: Error + Send + Sync + 'static>(call: &'static str, at: u64) -> impl FnOnce(E) -> VmmError {
    move |source| VmmError::Call { call, at, source: Box::new(source) }
}

type Walked<M> = Table<<M as Machine>::Format, TablePages, Watched<M>>;

struct Log<M: Machine> {
    mmu: Mmu<M>,
    table: OnceLock<Weak<Walked<M>>>,
    watched: AtomicU64,
    breaks: AtomicU64,
}

/// The machine's flushes; at each, an entry that is watched may be broken.
pub struct Watched<M: Machine>(Arc<Log<M>>);

impl<M: Machine> fmt::Debug for Watched<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("mmu", &self.0.mmu).finish_non_exhaustive()
    }
}

impl<M: Machine> Flush for Watched<M> {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        let Watched(log) = self;
        let watched = log.watched.load(Ordering::Relaxed);
        if let (true, Some(table)) = (watched != u64::MAX, log.table.get().and_then(Weak::upgrade))
            && table.entry(Gpa::new(watched)).is_some_and(|found| found.kind != Kind::Leaf)
        {
            log.breaks.fetch_add(1, Ordering::Relaxed);
        }
        log.mmu.flush(request)
    }
}

/// Faults of a guest at work, by what was done about them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Faults {
    /// Nothing was mapped: of loads.
    pub absent: u64,
    /// Nothing was mapped: of stores.
    pub absent_stores: u64,
    /// The leaf was old.
    pub old: u64,
    /// A store, where writing was armed.
    pub armed: u64,
    /// A store to what was read-only and is private now.
    pub unmerged: u64,
    /// The entry allowed the access already.
    pub spurious: u64,
}

/// A VMM.
pub struct Vmm<M: Machine> {
    // Before the space: it leaves.
    subscription: Option<Subscription>,
    walker: Walker,
    /// The table.
    pub table: Arc<Walked<M>>,
    log: Arc<Log<M>>,
    /// The space.
    pub space: Space,
    /// The machine.
    pub mmu: Mmu<M>,
    /// Its memory.
    pub ground: Ground,
    /// Bytes of the smallest page.
    pub granule: u64,
    /// Where faults lead: guest address, output address.
    resolves: Box<dyn Fn(u64) -> u64 + Send>,
    written: Arc<Mutex<Vec<GpaRange>>>,
    /// What guests at work faulted for.
    pub faults: Faults,
    /// Pages that were stored to with a fault, since somebody emptied this.
    pub stored: BTreeSet<u64>,
}

impl Faults {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.absent + self.absent_stores + self.old + self.armed + self.unmerged + self.spurious
    }
}

impl<M: Machine> Vmm<M> {
    /// A table with the fixed pages alone; a fault leads where `resolves` says.
    ///
    /// # Errors
    /// [`VmmError`].
    pub fn new(mmu: Mmu<M>, resolves: impl Fn(u64) -> u64 + Send + 'static) -> Result<Self, VmmError> {
        let (format, ground) = {
            let machine = mmu.machine();
            (machine.driven().format, machine.ground().clone())
        };
        let granule = format.geometry().span(Level::LEAF);
        let written = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&written);
        let builder = Space::builder().page_size(granule).map_err(failed("a space", 0))?.private_reclaim();
        let hear = move |range: GpaRange| sink.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        let space = builder.dirty_sink(hear).build();
        let pages = Arc::new(TablePages::new(Arc::clone(&ground.memory), ground.tables.clone()));
        let (watched, breaks) = (AtomicU64::new(u64::MAX), AtomicU64::new(0));
        let log = Arc::new(Log { mmu: mmu.clone(), table: OnceLock::new(), watched, breaks });
        let table = Table::new(&space, format, pages, Watched(Arc::clone(&log))).map_err(failed("a table", 0))?;
        let _ = log.table.set(Arc::downgrade(&table));
        let subscription = Some(space.subscribe(Arc::clone(&table)).map_err(failed("subscribe", 0))?);
        mmu.machine().begin(table.root())?;
        let walker = space.walker();
        let (resolves, faults, stored) = (Box::new(resolves), Faults::default(), BTreeSet::new());
        let mut vmm =
            Self { subscription, walker, table, log, space, mmu, ground, granule, resolves, written, faults, stored };
        for Fixed { gpa, output, access } in vmm.ground.fixed.clone() {
            vmm.map(gpa, output, granule, rights(access))?;
            for kind in [TouchKind::Read, TouchKind::Write, TouchKind::Execute] {
                if !access.contains(kind.needs()) {
                    continue;
                }
                let scope = vmm.walker.enter();
                vmm.table.translate(&scope, Gpa::new(gpa), rights(kind.needs())).map_err(failed("translate", gpa))?;
            }
        }
        Ok(vmm)
    }

    /// `len` bytes from `at` on.
    ///
    /// # Errors
    /// [`VmmError::Call`] where that is no range.
    pub fn range(at: u64, len: u64) -> Result<GpaRange, VmmError> {
        AddrRange::with_len(Gpa::new(at), len).map_err(failed("a range", at))
    }

    /// A fault that maps `len` bytes from `at` on, with leaves as large as they can be.
    ///
    /// # Errors
    /// [`VmmError::Call`].
    pub fn map(&mut self, at: u64, output: u64, len: u64, access: Access) -> Result<(), VmmError> {
        let range = Self::range(at, len)?;
        let extent = Extent { guest: range, output: OutputAddr::new(output), access };
        let fault = self.walker.fault(range).map_err(failed("fault", at))?;
        let resolved = fault.resolve(|_| Ok::<_, std::convert::Infallible>(extent)).map_err(failed("resolve", at))?;
        let table = &self.table;
        let install = |admission: &Admission<'_>| table.map(admission, &MapOptions::default());
        resolved.install(install).map(drop).map_err(failed("map", at))
    }

    /// Repoints the page at `at` in a Retained window: whether somebody translated it, and now does so elsewhere. `meanwhile` is
    /// called when nobody can write the page any more. A guest at work is kept out where the format breaks before it makes.
    ///
    /// # Errors
    /// [`VmmError::Call`].
    pub fn change(&mut self, at: u64, expected: u64, new: u64, meanwhile: impl FnOnce()) -> Result<bool, VmmError> {
        self.log.watched.store(at, Ordering::Relaxed);
        let guard = self.space.retain(Self::range(at, self.granule)?).map_err(failed("retain", at))?;
        meanwhile();
        // Where the format has the page broken first, a guest would run into the hole, and fault for nothing: it is kept out.
        let held = self.breaks_to_change(at, new) && self.mmu.hold()?;
        let change = Change { page: Gpa::new(at), expected: OutputAddr::new(expected), new: OutputAddr::new(new) };
        let done = guard.change_pte(&[change]).map_err(failed("change_pte", at))?;
        guard.close().map_err(failed("close", at))?;
        if held {
            self.mmu.go_on()?;
        }
        self.log.watched.store(u64::MAX, Ordering::Relaxed);
        Ok(done.first().is_some_and(|page| page.outcome == Outcome::Changed))
    }

    /// Whether a page that is read-only is broken before it leads elsewhere, to the same contents.
    fn breaks_to_change(&self, at: u64, new: u64) -> bool {
        let format = self.table.format();
        let Some(found) = self.table.entry(Gpa::new(at)).filter(|found| found.kind == Kind::Leaf) else { return false };
        let moved = format.set_spte(found.level, found.raw, OutputAddr::new(new));
        moved.is_ok_and(|moved| format.equal_contents_transition(found.level, found.raw, moved).break_first)
    }

    /// Takes pages away in a window.
    ///
    /// # Errors
    /// [`VmmError::Call`].
    pub fn zap(&mut self, at: u64, len: u64) -> Result<(), VmmError> {
        let window = self.space.zap(Self::range(at, len)?).map_err(failed("zap", at))?;
        window.close().map_err(failed("close", at))
    }

    /// How often a page that was being repointed was broken at a flush.
    pub fn breaks(&self) -> u64 {
        self.log.breaks.load(Ordering::Relaxed)
    }

    /// What the dirty sink heard since this was last asked.
    pub fn heard(&self) -> Vec<GpaRange> {
        std::mem::take(&mut *self.written.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One access of a guest that is not at work: no fault is handled.
    ///
    /// # Errors
    /// [`VmmError::Lost`].
    pub fn access(&self, at: u64, kind: TouchKind, value: u64) -> Result<Exit, VmmError> {
        Ok(self.mmu.machine().access(GuestAccess { at, kind, value })?)
    }

    /// Handles one fault as a VMM does: what is absent is mapped, what is old is made young, armed writing is granted, and what is
    /// read-only becomes private.
    ///
    /// # Errors
    /// [`VmmError`], where none of that helps.
    pub fn handle(&mut self, fault: Fault) -> Result<(), VmmError> {
        let Some(at) = fault.at else { return Err(VmmError::Fault { fault }) };
        let store = fault.kind == Some(TouchKind::Write);
        let wanted = if store { Access::WRITE } else { Access::READ };
        let page = at & !(self.granule - 1);
        let Some(found) = self.table.entry(Gpa::new(at)) else { return Err(VmmError::Fault { fault }) };
        if store {
            self.stored.insert(page);
        }
        let format = self.table.format();
        let touch = match found.kind {
            Kind::Leaf => format.touch(found.level, found.raw, wanted),
            // The entry has gone since: the access is made again, and says so.
            _ if fault.class != Class::Absent => return Ok(()),
            _ => {
                *(if store { &mut self.faults.absent_stores } else { &mut self.faults.absent }) += 1;
                let output = (self.resolves)(page);
                self.map(page, output, self.granule, Access::RWX)?;
                return Ok(self.mmu.machine().installed(at)?);
            }
        };
        let armed = format.spec(found.level, found.raw).armed;
        match touch {
            Touch::Allowed(_) => {
                self.faults.spurious += 1;
                let refreshed = self.mmu.machine().refresh(at, found.level);
                refreshed.unwrap_or(Err(Lost::Answer(format!("a fault that should not be: {fault}"))))?;
            }
            Touch::AccessFlag => {
                self.faults.old += 1;
                self.table.make_young(Gpa::new(at));
                // Where ageing takes the right to write for good, it comes back here.
                self.table.upgrade(Gpa::new(at));
            }
            Touch::Denied if store && armed => {
                self.faults.armed += 1;
                self.table.upgrade(Gpa::new(at));
            }
            Touch::Denied if store => {
                self.faults.unmerged += 1;
                self.zap(page, self.granule)?;
                let output = (self.resolves)(page);
                self.map(page, output, self.granule, Access::RWX)?;
                self.mmu.machine().installed(at)?;
            }
            _ => return Err(VmmError::Fault { fault }),
        }
        Ok(())
    }

    /// The passes that the guest at work has made, and its mismatches.
    pub fn counts(&self) -> (u64, u64) {
        let Some(page) = self.ground.scratch() else { return (0, 0) };
        let memory = &self.ground.memory;
        (memory.load(page.output), memory.load(page.output + 8))
    }

    /// Sets the guest to work; `broadcast`: see [`Work::broadcast`].
    ///
    /// # Errors
    /// [`VmmError`].
    pub fn work(&mut self, first: u64, pages: u64, written: u64, broadcast: bool) -> Result<(), VmmError> {
        let Some(scratch) = self.ground.scratch() else {
            return Err(VmmError::Wrong("the machine has no fixed page for counts".to_owned()));
        };
        self.ground.memory.store(scratch.output, 0);
        self.ground.memory.store(scratch.output + 8, 0);
        self.ground.memory.store(self.ground.kick, 0);
        self.mmu.run(Work { first, pages, stride: self.granule, written, counts: scratch.gpa, broadcast })?;
        Ok(())
    }

    /// Handles faults of the guest at work until it has made `more` whole passes from now on.
    ///
    /// # Errors
    /// [`VmmError`]; [`VmmError::Stuck`] if it does not get on.
    pub fn passes(&mut self, more: u64) -> Result<(), VmmError> {
        // The pass that is under way is no whole one.
        let (until, since) = (self.counts().0 + more + 1, Instant::now());
        loop {
            self.attend()?;
            let (passes, _) = self.counts();
            if passes >= until {
                return Ok(());
            }
            if since.elapsed() > PATIENCE {
                return Err(VmmError::Stuck { passes });
            }
            std::thread::yield_now();
        }
    }

    /// Handles the fault with which the guest at work waits, if it does.
    ///
    /// # Errors
    /// [`VmmError`].
    pub fn attend(&mut self) -> Result<(), VmmError> {
        if let Some(fault) = self.mmu.watch()? {
            self.handle(fault)?;
            self.mmu.go_on()?;
        }
        Ok(())
    }
}

impl<M: Machine> fmt::Debug for Vmm<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vmm").field("space", &self.space).field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl<M: Machine> Drop for Vmm<M> {
    fn drop(&mut self) {
        drop(self.subscription.take());
    }
}
