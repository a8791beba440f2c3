// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A [`Machine`] as the hardware of a table and its model.

use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use notifier_core::{Access, AddrRange, Gpa, GpaRange, OutputAddr, Walker};
use spte_core::format::{Format, Kind, Level, Touch};
use spte_core::{Flush, FlushError, FlushRange, FlushRequest, Found, Leaves, PageSource, Table};
use spte_drive::{Hardware, Refusal, Software, Trouble, access};
use spte_model::TouchKind;
use thiserror::Error;

use crate::emulator::Lost;
use crate::machine::{Class, Exit, Fault, GuestAccess, Machine, Work};
use crate::mailbox::PATIENCE;

/// What the MMU did that its table does not say.
#[derive(Debug, Error)]
pub enum Odd {
    /// The machine is gone.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// A fault of a kind that no entry here may cause.
    #[error("{kind:?} of {at:#x} faulted: {fault}; the entry is {entry}")]
    Fault {
        /// The access.
        kind: TouchKind,
        /// Where it went.
        at: u64,
        /// What the machine said.
        fault: Fault,
        /// What the table has.
        entry: String,
    },
    /// What was reported is not what was accessed.
    #[error("{kind:?} of {at:#x} was reported as {fault}; the entry is {entry}")]
    Report {
        /// The access.
        kind: TouchKind,
        /// Where it went.
        at: u64,
        /// What the machine said.
        fault: Fault,
        /// What the table has.
        entry: String,
    },
    /// A load or fetch returned what no data has.
    #[error("{kind:?} of {at:#x} gave {value:#x}, which is nowhere in the data")]
    Value {
        /// The access.
        kind: TouchKind,
        /// Where it went.
        at: u64,
        /// What came back.
        value: u64,
    },
    /// A store did not go where the table leads.
    #[error("a store to {at:#x} went to {went:x?}, which is not where the table leads")]
    Store {
        /// The guest address.
        at: u64,
        /// The output address in the data where it was found.
        went: Option<u64>,
    },
    /// An access went somewhere although no leaf is there.
    #[error("{kind:?} of {at:#x} reached {output:#x}; the entry is {entry}")]
    Through {
        /// The access.
        kind: TouchKind,
        /// Where it went.
        at: u64,
        /// Where it came to.
        output: u64,
        /// What the table has.
        entry: String,
    },
    /// The guest came back for no reason.
    #[error("the guest came back from {at:#x} as if it had been kicked")]
    Kicked {
        /// The access.
        at: u64,
    },
}

/// What is counted of a machine.
#[derive(Debug, Default)]
pub struct Counts {
    /// Accesses of guests.
    pub accesses: AtomicU64,
    /// Of these, those that reached data.
    pub reached: AtomicU64,
    /// Faults whose class, address, level and kind were compared.
    pub faults: AtomicU64,
    /// Faults on rights, or leaves, that were there already, in entries that were cached before.
    pub spurious: AtomicU64,
    /// Flushes that the format asked for.
    pub flushes: AtomicU64,
    /// Those that were left out on purpose.
    pub left_out: AtomicU64,
    /// Guests that were kicked out of a loop for a flush.
    pub kicks: AtomicU64,
}

impl Counts {
    fn add(counter: &AtomicU64) {
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is left out of a machine on purpose, to see that it is missed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Without {
    /// Nothing.
    #[default]
    Nothing,
    /// Every flush.
    Flushes,
}

/// A guest that was set to work.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
enum Job {
    /// There is none.
    #[default]
    None,
    /// It runs.
    Running,
    /// It waits with a fault that nobody has been told of.
    Faulted(Fault),
    /// It waits until it may go on.
    Waiting,
}

struct Shared<M> {
    machine: Mutex<M>,
    /// Taken after `machine`.
    job: Mutex<Job>,
    counts: Counts,
    without: Mutex<Without>,
    token: AtomicU64,
}

/// A machine that walks. A clone is the same one.
pub struct Mmu<M>(Arc<Shared<M>>);

impl<M> Clone for Mmu<M> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<M: Machine> fmt::Debug for Mmu<M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mmu").field("counts", &self.0.counts).finish_non_exhaustive()
    }
}

impl<M: Machine> Mmu<M> {
    /// The machine, with its data filled.
    pub fn new(machine: M) -> Self {
        machine.ground().fill(|number| machine.code(number));
        let (job, counts, without) = (Mutex::default(), Counts::default(), Mutex::default());
        Self(Arc::new(Shared { machine: Mutex::new(machine), job, counts, without, token: AtomicU64::new(1) }))
    }

    /// The machine.
    pub fn machine(&self) -> MutexGuard<'_, M> {
        self.0.machine.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was counted.
    pub fn counts(&self) -> &Counts {
        &self.0.counts
    }

    /// Leaves something out from now on.
    pub fn leave_out(&self, without: Without) {
        *self.0.without.lock().unwrap_or_else(PoisonError::into_inner) = without;
    }

    fn job(&self) -> MutexGuard<'_, Job> {
        self.0.job.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets a guest to work: until [`Mmu::stop`] nothing else may be asked of the machine but flushes.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn run(&self, work: Work) -> Result<(), Lost> {
        let mut machine = self.machine();
        machine.run(work)?;
        *self.job() = Job::Running;
        Ok(())
    }

    /// A fault with which the guest at work waits, once each: [`Mmu::go_on`] follows.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn watch(&self) -> Result<Option<Fault>, Lost> {
        let mut machine = self.machine();
        let mut job = self.job();
        match std::mem::replace(&mut *job, Job::Waiting) {
            Job::Running => *job = Job::Running,
            Job::Faulted(fault) => return Ok(Some(fault)),
            other => {
                *job = other;
                return Ok(None);
            }
        }
        match machine.poll()? {
            None => Ok(None),
            Some(Exit::Fault(fault)) => {
                *job = Job::Waiting;
                Ok(Some(fault))
            }
            Some(exit) => Err(Lost::Answer(format!("{exit:?} of a guest at work that nobody kicked"))),
        }
    }

    /// Lets the guest at work make the access again that faulted.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn go_on(&self) -> Result<(), Lost> {
        let mut machine = self.machine();
        machine.resume()?;
        *self.job() = Job::Running;
        Ok(())
    }

    /// Brings the guest at work out until [`Mmu::go_on`], if it is in: whether it was. A fault with which it came out is
    /// [`Mmu::watch`]'s to tell.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn hold(&self) -> Result<bool, Lost> {
        let mut machine = self.machine();
        let mut job = self.job();
        if *job != Job::Running {
            return Ok(false);
        }
        match Self::bring_out(&mut machine)? {
            Exit::Kicked => {
                Counts::add(&self.0.counts.kicks);
                *job = Job::Waiting;
                Ok(true)
            }
            Exit::Fault(fault) => {
                *job = Job::Faulted(fault);
                Ok(false)
            }
            exit @ Exit::Done { .. } => Err(Lost::Answer(format!("{exit:?} of a guest at work"))),
        }
    }

    /// Ends the guest's work. A fault with which it came out is dropped.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn stop(&self) -> Result<(), Lost> {
        let mut machine = self.machine();
        let mut job = self.job();
        if *job == Job::Running {
            Self::bring_out(&mut machine)?;
        }
        *job = Job::None;
        Ok(())
    }

    /// Kicks the guest, and waits until it is out.
    fn bring_out(machine: &mut M) -> Result<Exit, Lost> {
        let (memory, kick) = (Arc::clone(&machine.ground().memory), machine.ground().kick);
        memory.store(kick, 1);
        let since = Instant::now();
        let exit = loop {
            if let Some(exit) = machine.poll()? {
                break exit;
            }
            if since.elapsed() > PATIENCE {
                return Err(Lost::Silent { seconds: PATIENCE.as_secs() });
            }
            std::thread::yield_now();
        };
        memory.store(kick, 0);
        Ok(exit)
    }

    /// Carries a flush out while a guest may be at work.
    fn flush_at_work(&self, request: &FlushRequest<'_>) -> Result<(), Lost> {
        let mut machine = self.machine();
        let mut job = self.job();
        if *job != Job::Running || machine.broadcasts() {
            return machine.flush(request);
        }
        match Self::bring_out(&mut machine)? {
            Exit::Kicked => {
                Counts::add(&self.0.counts.kicks);
                machine.flush(request)?;
                machine.resume()
            }
            Exit::Fault(fault) => {
                *job = Job::Faulted(fault);
                machine.flush(request)
            }
            exit @ Exit::Done { .. } => Err(Lost::Answer(format!("{exit:?} of a guest at work"))),
        }
    }

    /// Has hardware forget a range for which no format owes a flush: it is not counted, and never left out.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn forget(&self, range: GpaRange) -> Result<(), Lost> {
        let ranges = [FlushRange { range, leaves: Leaves::Any, links: None }];
        self.flush_at_work(&FlushRequest { ranges: &ranges, all: false, nonblocking: false })
    }

    /// Where an access is made for one at `at`: loads and stores are of words that are no code, fetches of the code.
    pub fn place(at: u64, kind: TouchKind) -> u64 {
        match kind {
            TouchKind::Execute => at & !0xfff,
            TouchKind::Read | TouchKind::Write if at & 0xff0 == 0 => at & !0xfff | 0x10,
            TouchKind::Read | TouchKind::Write => at & !7,
        }
    }

    /// One access, where the table has `entry`.
    fn one<F: Format>(
        &self,
        machine: &mut M,
        format: &F,
        entry: &Found,
        at: u64,
        kind: TouchKind,
    ) -> Result<Result<u64, Fault>, Odd> {
        let counts = &self.0.counts;
        Counts::add(&counts.accesses);
        let place = Self::place(at, kind);
        let value = self.0.token.fetch_add(1, Ordering::Relaxed) << 1 | 0xa5 << 56 | 1;
        match machine.access(GuestAccess { at: place, kind, value })? {
            Exit::Kicked => Err(Odd::Kicked { at }),
            Exit::Fault(fault) => {
                Counts::add(&counts.faults);
                let address = fault.at.is_none_or(|reported| reported == place >> fault.blind << fault.blind);
                let level = fault.level.is_none_or(|level| level == entry.level);
                let right = fault.kind.is_none_or(|reported| reported == kind);
                if !(address && level && right) {
                    return Err(Odd::Report { kind, at: place, fault, entry: describe(format, entry) });
                }
                Ok(Err(fault))
            }
            Exit::Done { value: found } => {
                let ground = machine.ground();
                let odd = || Odd::Value { kind, at: place, value: found };
                let output = match kind {
                    TouchKind::Execute => ground.data.start + (found << 12),
                    TouchKind::Read => found,
                    TouchKind::Write => {
                        let spec = format.spec(entry.level, entry.raw);
                        let output = spec.output.as_u64() + (place - entry.start.as_u64());
                        let leads = entry.kind == Kind::Leaf && ground.data.contains(&output);
                        if !leads || ground.memory.load(output) != value {
                            // Wherever it went in the data, it is put right: what comes next goes by it.
                            return Err(Odd::Store { at: place, went: ground.find(place & 0xff8, value) });
                        }
                        ground.memory.store(output, output);
                        output
                    }
                };
                // The offset in the granule has to be that of the access.
                if !ground.data.contains(&output) || (output ^ place) & 0xfff != 0 {
                    return Err(odd());
                }
                Counts::add(&counts.reached);
                Ok(Ok(output - (output & 0xfff) + (at & 0xfff)))
            }
        }
    }
}

/// The output address of the entry of `at` at this level, which is in the root or behind a link.
pub fn slot<F: Format, P: PageSource, X: Flush>(table: &Table<F, P, X>, level: Level, at: u64) -> u64 {
    let rows = table.walk(Gpa::new(at));
    let above = rows.iter().find_map(|row| match row.kind {
        Kind::Table(child) if row.level.below() == Some(level) => Some(child),
        _ => None,
    });
    above.unwrap_or(table.root()).as_u64() + 8 * table.format().geometry().index(level, at) as u64
}

/// An entry, for people.
pub fn describe<F: Format>(format: &F, found: &Found) -> String {
    let Found { start, span, level, kind, raw, .. } = *found;
    let place = format!("{raw:#018x}, {kind:?} at {start} of {span:#x} bytes, level {}", format.level_number(level));
    if kind == Kind::Leaf { format!("{place}, {:x?}", format.spec(level, raw)) } else { place }
}

impl<M: Machine> Flush for Mmu<M> {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        Counts::add(&self.0.counts.flushes);
        let without = *self.0.without.lock().unwrap_or_else(PoisonError::into_inner);
        if without == Without::Flushes {
            Counts::add(&self.0.counts.left_out);
            return Ok(());
        }
        self.flush_at_work(request).map_err(|_| FlushError::Failed { code: 0 })
    }
}

impl<M: Machine> Hardware<M::Format> for Mmu<M> {
    fn begin(&self, root: OutputAddr) -> Result<(), Trouble> {
        self.machine().begin(root).map_err(|lost| Odd::from(lost).into())
    }

    fn access<P: PageSource, C: Flush>(
        &self,
        table: &Table<M::Format, P, C>,
        walker: &mut Walker,
        at: Gpa,
        kind: TouchKind,
    ) -> Result<Result<(OutputAddr, Access), Refusal>, Trouble> {
        let mut machine = self.machine();
        let fixed = machine.ground().fixed.iter();
        let granule = table.format().geometry().span(Level::LEAF);
        if fixed.map(|page| page.gpa).any(|page| page == at.as_u64() & !(granule - 1)) {
            // Its facts are there before the guest runs, so that running it leaves none.
            drop(machine);
            return Software.access(table, walker, at, kind);
        }
        let format = table.format();
        let Some(entry) = table.entry(at) else { return Software.access(table, walker, at, kind) };
        let wanted = access(kind.needs());
        let touched = (entry.kind == Kind::Leaf).then(|| format.touch(entry.level, entry.raw, wanted));
        let mut answer = self.one(&mut machine, format, &entry, at.as_u64(), kind)?;
        // Fewer rights may be cached than there are now; and where it is cached that nothing is there, a leaf that has come since,
        // or is young again, is absent for whatever it grants.
        let keeps_absent = machine.keeps_absent();
        let spurious = |fault: &Fault| match (touched, fault.class) {
            (Some(Touch::Allowed(_)), Class::Denied) => true,
            (Some(Touch::Allowed(_) | Touch::Denied), Class::Absent) => keeps_absent,
            _ => false,
        };
        if answer.as_ref().is_err_and(spurious)
            && let Some(refreshed) = machine.refresh(Self::place(at.as_u64(), kind), entry.level)
        {
            refreshed.map_err(Odd::from)?;
            Counts::add(&self.0.counts.spurious);
            answer = self.one(&mut machine, format, &entry, at.as_u64(), kind)?;
        }
        let spec = || format.spec(entry.level, entry.raw);
        match answer {
            Ok(output) if entry.kind != Kind::Leaf => {
                Err(Odd::Through { kind, at: at.as_u64(), output, entry: describe(format, &entry) }.into())
            }
            Ok(output) => {
                let access = if spec().armed { spec().access.read_only() } else { spec().access };
                Ok(Ok((OutputAddr::new(output), access)))
            }
            Err(Fault { class: Class::Absent, .. }) if touched == Some(Touch::AccessFlag) && !machine.tells_old() => {
                Ok(Err(Refusal::Old))
            }
            Err(Fault { class: Class::Absent, .. }) => Ok(Err(Refusal::Absent)),
            Err(Fault { class: Class::Denied, .. }) => {
                let armed = kind == TouchKind::Write && entry.kind == Kind::Leaf && spec().armed;
                let early = machine.marks_denied(entry.level) && entry.kind == Kind::Leaf && !spec().accessed;
                drop(machine);
                if early {
                    let end = Gpa::new(entry.start.as_u64() + entry.span);
                    AddrRange::new(entry.start, end).map(|leaf| table.age(leaf))??;
                }
                Ok(Err(Refusal::Denied { armed }))
            }
            Err(Fault { class: Class::Old, .. }) => Ok(Err(Refusal::Old)),
            Err(fault) => {
                let place = Self::place(at.as_u64(), kind);
                Err(Odd::Fault { kind, at: place, fault, entry: describe(format, &entry) }.into())
            }
        }
    }
}
