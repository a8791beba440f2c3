// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carries commands out on a real table, as a small VMM would: faults that are resolved, dirty logging, windows.
//!
//! The engine holds the table. What it leaves to its user is kept here: where dirty logging was asked for, and what was
//! written and not harvested yet as far as the table does not say so itself. Both are kept by byte; a leaf has what any
//! of its bytes has.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use notifier_core::{
    Access, AddrRange, Change, ChangeError, CloseError, Extent, FaultError, Gpa, GpaRange, JoinError, OpenError,
    Outcome, OutputAddr, PageSizeError, RangeError, ResolveError, Space, Subscription, Walker,
};
use spte_core::format::{FormatError, Kind, LeafSpec, Level, Touch as Touched};
use spte_core::{
    CollapseError, Flush, FlushError, FlushFailed, FlushRequest, Found, HarvestError, HeapPages, MapError, MapOptions,
    Miss, RemoveError, SplitError, Table, TableError,
};
use thiserror::Error;

use crate::answer::{Answer, Fault, Row};
use crate::format::{ToolFormat, size_word};
use crate::ranges::Ranges;
use crate::script::{Command, Limits, Malformed, Mem, Page, Range, Touch};

/// The most leaves that a script's table has, 1T in pages of 4K: one line can ask for more than memory holds.
pub const MAX_LEAVES: u64 = 1 << 28;

/// Why a command was not carried out.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MachineError {
    /// No table is asked that. Nothing was done.
    #[error(transparent)]
    Malformed(#[from] Malformed),
    /// The table would have more than [`MAX_LEAVES`]. Nothing was done.
    #[error("more than {MAX_LEAVES} leaves")]
    TooManyLeaves,
    /// The granule is no page size.
    #[error(transparent)]
    Page(#[from] PageSizeError),
    /// No table could be made.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The table did not join its space.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// A range that cannot be.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// A fault could not begin.
    #[error(transparent)]
    Fault(#[from] FaultError),
    /// A fault was not resolved.
    #[error(transparent)]
    Resolve(#[from] ResolveError<Infallible>),
    /// Nothing was mapped, or no rights changed.
    #[error(transparent)]
    Map(#[from] MapError),
    /// Nothing was taken away.
    #[error(transparent)]
    Remove(#[from] RemoveError),
    /// Leaves were not split.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// Leaves were not merged.
    #[error(transparent)]
    Collapse(#[from] CollapseError),
    /// A flush failed.
    #[error(transparent)]
    Flush(#[from] FlushFailed),
    /// Dirty facts were not harvested.
    #[error(transparent)]
    Harvest(#[from] HarvestError),
    /// A window did not open.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// A page was not repointed.
    #[error(transparent)]
    Change(#[from] ChangeError<Gpa>),
    /// A window did not close.
    #[error(transparent)]
    Close(#[from] CloseError),
    /// A walk ended as none can while nobody else uses the table.
    #[error(transparent)]
    Walk(Miss),
    /// A window had no answer for its page.
    #[error("no outcome for the page at {at}")]
    NoOutcome {
        /// The page.
        at: Gpa,
    },
}

/// Counts of what hardware was asked for, by name.
type Asked = Arc<Mutex<BTreeMap<&'static str, u64>>>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is held under these locks can be left half done.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The hardware: it counts what it is asked for.
struct Counter<F> {
    asked: Asked,
    format: F,
}

impl<F: ToolFormat> Flush for Counter<F> {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        let mut asked = locked(&self.asked);
        self.format.asks(request, &mut |name, count| *asked.entry(name).or_default() += count);
        Ok(())
    }
}

/// A table and its user.
pub struct Machine<F: ToolFormat> {
    limits: Limits,
    hw_ad: bool,
    space: Space,
    table: Arc<Table<F, HeapPages, Counter<F>>>,
    subscription: Option<Subscription>,
    walker: Walker,
    asked: Asked,
    heard: Arc<Mutex<Vec<GpaRange>>>,
    /// Written and not harvested, as far as the table does not say so itself.
    written: Ranges,
    /// Dirty logging is on, and a write is to be logged.
    armed: Ranges,
    /// Dirty logging is on, and a write was logged.
    open: Ranges,
    /// At least as many as there are leaves.
    leaves: u64,
}

impl<F: ToolFormat> fmt::Debug for Machine<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("format", &self.table.format().name()).finish_non_exhaustive()
    }
}

fn span(start: u64, len: u64) -> Result<GpaRange, RangeError> {
    AddrRange::with_len(Gpa::new(start), len)
}

impl Range {
    fn end(self) -> u64 {
        // Checked against the limits: it fits.
        self.gpa.saturating_add(self.size)
    }

    fn guest(self) -> Result<GpaRange, RangeError> {
        span(self.gpa, self.size)
    }
}

impl Touch {
    fn needs(self) -> Access {
        match self {
            Self::Read => Access::READ,
            Self::Write => Access::WRITE,
            Self::Execute => Access::EXECUTE,
        }
    }
}

impl<F: ToolFormat> Machine<F> {
    /// An empty table.
    ///
    /// # Errors
    /// [`MachineError::Page`], [`MachineError::Table`], [`MachineError::Join`].
    pub fn new(format: F, limits: Limits, hw_ad: bool) -> Result<Self, MachineError> {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&heard);
        let asked = Asked::default();
        let builder = Space::builder().private_reclaim().page_size(limits.granule)?;
        let space = builder.dirty_sink(move |range: GpaRange| locked(&sink).push(range)).build();
        let counter = Counter { asked: Arc::clone(&asked), format: format.clone() };
        let table = Table::new(&space, format, Arc::new(HeapPages::new()), counter)?;
        let subscription = Some(space.subscribe(Arc::clone(&table))?);
        let walker = space.walker();
        let [written, armed, open] = [Ranges::default(), Ranges::default(), Ranges::default()];
        Ok(Self { limits, hw_ad, space, table, subscription, walker, asked, heard, written, armed, open, leaves: 0 })
    }

    /// Carries a command out.
    ///
    /// # Errors
    /// [`MachineError::Malformed`] and [`MachineError::TooManyLeaves`] for what no table is asked; anything else means that
    /// there is no memory left, or that the table is wrong.
    pub fn run(&mut self, command: &Command) -> Result<Answer, MachineError> {
        command.check(&self.limits)?;
        let answer = match *command {
            Command::Map { range, pa, rights, page, mem } => self.map(range, pa, rights, page, mem)?,
            Command::Unmap(range) => {
                self.cutting(2)?;
                self.table.unmap(range.guest()?)?;
                self.listen();
                self.forget(range);
                self.table.trim(range.guest()?)?;
                Answer::Ok
            }
            Command::Protect { range, rights } => self.protect(range, rights)?,
            Command::WriteProtect(range) => {
                self.cut(range)?;
                self.table.arm(range.guest()?)?;
                // Only what is mapped now is logged.
                for (start, size) in self.leaves_in(range)? {
                    self.open.remove(start, start + size);
                    self.armed.insert(start, start + size);
                }
                Answer::Ok
            }
            Command::Touch { gpa, kind } => self.touch(gpa, kind)?,
            Command::Age(range) => Answer::Aged { young: self.table.age(range.guest()?)? },
            Command::Dirty(range) => self.harvest(range)?,
            Command::Change { gpa, pa } => self.change(gpa, Some(pa))?,
            Command::ZapChange { gpa, .. } => self.change(gpa, None)?,
            Command::Split(range) => {
                self.room_to_split(range)?;
                self.table.split(range.guest()?)?;
                Answer::Ok
            }
            Command::Collapse(range) => self.collapse(range)?,
            Command::Walk { gpa } => {
                Answer::Rows(self.table.walk(Gpa::new(gpa)).iter().map(|found| self.row(found)).collect())
            }
            Command::Flushes => {
                let row = |(&key, &value): (&&'static str, &u64)| Row::Count { key: Cow::Borrowed(key), value };
                Answer::Rows(locked(&self.asked).iter().map(row).collect())
            }
            Command::Stats => Answer::Rows(self.stats()),
            Command::Dump => {
                let mut rows = Vec::new();
                self.table.visit(self.whole()?, |found| rows.push(self.row(&found)));
                Answer::Rows(rows)
            }
        };
        self.listen();
        Ok(answer)
    }

    fn row(&self, found: &Found) -> Row {
        let format = self.table.format();
        let raw = match found.kind {
            Kind::Table(_) | Kind::Leaf | Kind::Special => format.masked(found.level, found.raw & !format.claim_bit()),
            Kind::Absent | Kind::Claimed | Kind::Dead => 0,
        };
        Row::Entry { level: format.level_number(found.level), gpa: found.start.as_u64(), raw }
    }

    fn whole(&self) -> Result<GpaRange, RangeError> {
        span(0, 1 << self.table.format().geometry().address_bits())
    }

    fn stats(&self) -> Vec<Row> {
        let (format, stats) = (self.table.format(), self.table.stats());
        let row = |key, value| Row::Count { key, value };
        let mut rows = vec![row(Cow::Borrowed("tables"), stats.tables)];
        for (level, count) in format.geometry().levels().zip(stats.leaves) {
            if format.geometry().level(level).leaf {
                let size = size_word(format.geometry().span(level));
                rows.push(row(Cow::Owned(format!("leaves_{size}")), count));
            }
        }
        rows.push(row(Cow::Borrowed("bytes_tables"), stats.table_bytes));
        rows
    }

    /// Start and size of the leaves that have a byte in `range`, ascending.
    fn leaves_in(&self, range: Range) -> Result<Vec<(u64, u64)>, MachineError> {
        let mut leaves = Vec::new();
        self.table.visit(range.guest()?, |found| {
            if found.kind == Kind::Leaf {
                leaves.push((found.start.as_u64(), found.span));
            }
        });
        Ok(leaves)
    }

    /// Facts that the sink heard. Without hardware's help a write is known only where it was logged: what the table takes
    /// for written then is not told apart from what may be.
    fn listen(&mut self) {
        for range in std::mem::take(&mut *locked(&self.heard)) {
            if self.hw_ad {
                self.written.insert(range.start().as_u64(), range.end().as_u64());
            }
        }
    }

    /// What is not mapped any more is neither logged nor written.
    fn forget(&mut self, range: Range) {
        for ranges in [&mut self.written, &mut self.armed, &mut self.open] {
            ranges.remove(range.gpa, range.end());
        }
    }

    // ---- how many leaves there may be ----

    /// So many leaves are about to be made.
    fn room_for(&mut self, added: u64) -> Result<(), MachineError> {
        if self.leaves.saturating_add(added) > MAX_LEAVES {
            self.leaves = self.table.stats().leaves.iter().sum();
        }
        let sum = self.leaves.saturating_add(added);
        if sum > MAX_LEAVES {
            return Err(MachineError::TooManyLeaves);
        }
        self.leaves = sum;
        Ok(())
    }

    /// Leaves are about to be cut at so many places: each level makes one table full of one.
    fn cutting(&mut self, places: u64) -> Result<(), MachineError> {
        let format = self.table.format();
        let geometry = *format.geometry();
        let tables = format.geometry().levels().filter(|level| geometry.level(*level).leaf);
        self.room_for(places * tables.map(|level| geometry.entries(level) as u64).sum::<u64>())
    }

    /// What of `range` is mapped becomes leaves of the granule; what sticks out is cut off.
    fn room_to_split(&mut self, range: Range) -> Result<(), MachineError> {
        let granule = self.limits.granule;
        let inside = |(start, size): &(u64, u64)| (start + size).min(range.end()) - (*start).max(range.gpa);
        let added = self.leaves_in(range)?.iter().map(|leaf| inside(leaf) / granule - 1).sum();
        self.cutting(2)?;
        self.room_for(added)
    }

    /// Cuts so that no leaf lies partly in `range`.
    fn cut(&mut self, range: Range) -> Result<(), MachineError> {
        self.cutting(2)?;
        self.table.split_at(Gpa::new(range.gpa))?;
        self.table.split_at(Gpa::new(range.end()))?;
        Ok(())
    }

    // ---- commands ----

    fn expresses(&self, access: Access, attrs: F::Attrs) -> Result<(), FormatError> {
        let spec = LeafSpec { output: OutputAddr::new(0), access, armed: false, accessed: true, dirty: false, attrs };
        self.table.format().leaf(Level::LEAF, &spec).map(drop)
    }

    /// Refusals in the order present, page, rights, memory type.
    fn map(
        &mut self,
        range: Range,
        pa: u64,
        rights: Access,
        page: Option<Page>,
        mem: Mem,
    ) -> Result<Answer, MachineError> {
        let mut present = None;
        self.table.visit(range.guest()?, |found| {
            if found.kind == Kind::Leaf && present.is_none() {
                present = Some(found.start.as_u64());
            }
        });
        if let Some(start) = present {
            return Ok(Answer::RefusedPresent { gpa: start.max(range.gpa) });
        }
        let geometry = *self.table.format().geometry();
        let sizes: Vec<u64> =
            geometry.levels().filter(|level| geometry.level(*level).leaf).map(|level| geometry.span(level)).collect();
        let largest = match page {
            None => self.limits.granule,
            Some(Page::Max) => u64::MAX,
            Some(Page::Size(size)) => {
                // The bits of all three at once: none may lie below the page size.
                if !sizes.contains(&size) || (range.gpa | pa | range.size) % size != 0 {
                    return Ok(Answer::RefusedPage);
                }
                size
            }
        };
        if let Some(any) = self.table.format().attrs(Mem::default()) {
            if self.expresses(rights, any).is_err() {
                return Ok(Answer::RefusedPerm);
            }
        }
        let Some(attrs) = self.table.format().attrs(mem) else { return Ok(Answer::RefusedMem) };
        self.room_for(leaves_needed(range, pa, largest, &sizes))?;
        let options = MapOptions::default().access(rights).attrs(attrs).largest(largest).only_absent(true);
        let extent = Extent { guest: range.guest()?, output: OutputAddr::new(pa), access: Access::RWX };
        let fault = self.walker.fault(range.guest()?)?;
        let resolved = fault.resolve(|_| Ok::<_, Infallible>(extent))?;
        resolved.install(|admission| self.table.map(admission, &options))?;
        Ok(Answer::Ok)
    }

    /// The rights are the script's to give: every leaf is resolved to where it points already.
    fn protect(&mut self, range: Range, rights: Access) -> Result<Answer, MachineError> {
        if let Some(any) = self.table.format().attrs(Mem::default()) {
            if self.expresses(rights, any).is_err() {
                return Ok(Answer::RefusedPerm);
            }
        }
        self.cut(range)?;
        let table = Arc::clone(&self.table);
        let fault = self.walker.fault(range.guest()?)?;
        let resolved = fault.resolve(|fault| {
            let mut extents: Vec<Extent> = Vec::new();
            table.visit(fault.range(), |found| {
                let Ok(guest) = span(found.start.as_u64(), found.span) else { return };
                if found.kind != Kind::Leaf {
                    return;
                }
                let output = table.format().spec(found.level, found.raw).output;
                // Neighbours that continue each other are one extent: rights are looked up in the list.
                if let Some(last) = extents.last_mut() {
                    if let Some(joined) = last.guest.joined(&guest) {
                        if last.output.as_u64().checked_add(last.guest.len()) == Some(output.as_u64()) {
                            last.guest = joined;
                            return;
                        }
                    }
                }
                extents.push(Extent { guest, output, access: rights });
            });
            Ok::<_, Infallible>(extents)
        })?;
        let guest = range.guest()?;
        resolved.install(|admission| table.protect(admission, guest, rights))?;
        // Rights that come back must not go round the log.
        for (start, end) in self.armed.within(range.gpa, range.end()) {
            self.table.arm(span(start, end - start)?)?;
        }
        Ok(Answer::Ok)
    }

    /// What a vCPU does, and the fault handler after it.
    fn touch(&mut self, gpa: u64, kind: Touch) -> Result<Answer, MachineError> {
        let wanted = kind.needs();
        let table = Arc::clone(&self.table);
        let at = Gpa::new(gpa);
        for found in table.walk(at) {
            if table.format().check(found.level, found.raw & !table.format().claim_bit()).is_err() {
                return Ok(Answer::Fault(Fault::Reserved));
            }
        }
        let Some(found) = table.entry(at).filter(|found| found.kind == Kind::Leaf) else {
            return Ok(Answer::Fault(Fault::Absent));
        };
        if !self.hw_ad && !table.format().is_young(found.level, found.raw) {
            // Looked at before the rights, as architectures with such a fault do. The handler marks the leaf young.
            table.make_young(at);
            return Ok(Answer::Fault(Fault::AccessFlag));
        }
        let (start, end) = (found.start.as_u64(), found.start.as_u64() + found.span);
        if wanted.writable() && table.format().upgrade(found.level, found.raw).is_some() {
            // The write fault of dirty logging: the page is logged, writing comes back.
            table.upgrade(at);
            self.armed.remove(start, end);
            self.open.insert(start, end);
            self.written.insert(start, end);
        }
        if !self.hw_ad {
            // The same question as hardware's, without its writes to the entry.
            let Some(found) = table.entry(at) else { return Ok(Answer::Fault(Fault::Absent)) };
            return Ok(match table.format().touch(found.level, found.raw, wanted) {
                Touched::Allowed(_) => {
                    let output = table.format().spec(found.level, found.raw).output;
                    Answer::Touched { pa: output.as_u64() + (gpa - start) }
                }
                Touched::Denied => Answer::Fault(Fault::Perm),
                Touched::AccessFlag => Answer::Fault(Fault::AccessFlag),
            });
        }
        let scope = self.walker.enter();
        match table.translate(&scope, at, wanted) {
            Ok(found) => Ok(Answer::Touched { pa: found.output().as_u64() }),
            Err(Miss::Absent { .. }) => Ok(Answer::Fault(Fault::Absent)),
            Err(Miss::Denied { .. }) => Ok(Answer::Fault(Fault::Perm)),
            Err(Miss::Old { .. }) => {
                table.make_young(at);
                Ok(Answer::Fault(Fault::AccessFlag))
            }
            Err(other) => Err(MachineError::Walk(other)),
        }
    }

    fn harvest(&mut self, range: Range) -> Result<Answer, MachineError> {
        self.listen();
        let mut of_table = Vec::new();
        if self.hw_ad {
            of_table = self.table.harvest_dirty(range.guest()?)?;
        }
        let mut of_table = of_table.into_iter().peekable();
        let mut rows = Vec::new();
        let mut again = Ranges::default();
        for (start, size) in self.leaves_in(range)? {
            let end = start + size;
            let leaf = span(start, size)?;
            let in_table = of_table.next_if(|found| *found == leaf).is_some();
            if in_table || self.written.overlaps(start, end) {
                rows.push(Row::Written { gpa: start, size });
                self.written.remove(start, end);
            }
            if self.open.overlaps(start, end) {
                self.open.remove(start, end);
                self.armed.insert(start, end);
                again.insert(start, end);
            }
        }
        // Neighbours together: each call is a flush.
        for (start, end) in again.within(0, u64::MAX) {
            self.table.arm(span(start, end - start)?)?;
        }
        Ok(Answer::Rows(rows))
    }

    fn change(&mut self, gpa: u64, pa: Option<u64>) -> Result<Answer, MachineError> {
        let page = Gpa::new(gpa);
        let granule = self.limits.granule;
        let range = Range { gpa, size: granule };
        self.cutting(2)?;
        let present = self.table.entry(page).filter(|found| found.kind == Kind::Leaf);
        let current = present.map_or(0, |found| {
            let spec = self.table.format().spec(found.level, found.raw);
            spec.output.as_u64() + (gpa - found.start.as_u64())
        });
        let change = match pa {
            Some(pa) => Change { page, expected: OutputAddr::new(current), new: OutputAddr::new(pa) },
            // A page that is not the expected one is zapped.
            None => Change { page, expected: OutputAddr::new(current ^ granule), new: OutputAddr::new(0) },
        };
        let guard = self.space.retain(range.guest()?)?;
        let changed = guard.change_pte(&[change])?;
        guard.close()?;
        let outcome = changed.first().ok_or(MachineError::NoOutcome { at: page })?.outcome;
        Ok(match outcome {
            Outcome::Changed => Answer::Changed,
            Outcome::Absent => Answer::Absent,
            Outcome::Zapped => {
                self.listen();
                self.forget(range);
                self.table.trim(range.guest()?)?;
                Answer::Zapped
            }
        })
    }

    /// Stretches of equal logging are merged each for itself: a leaf is logged or not.
    fn collapse(&mut self, range: Range) -> Result<Answer, MachineError> {
        let end = range.end();
        let mut bounds = vec![range.gpa, end];
        for ranges in [&self.armed, &self.open] {
            bounds.extend(ranges.within(range.gpa, end).into_iter().flat_map(|(from, to)| [from, to]));
        }
        bounds.sort_unstable();
        bounds.dedup();
        for pair in bounds.windows(2) {
            let part = span(pair[0], pair[1] - pair[0])?;
            let table = &self.table;
            self.space.admit(part, |admission| table.collapse(admission, part))??;
        }
        self.listen();
        for (start, size) in self.leaves_in(range)? {
            if self.written.overlaps(start, start + size) {
                self.written.insert(start, start + size);
            }
        }
        Ok(Answer::Ok)
    }
}

impl<F: ToolFormat> Drop for Machine<F> {
    fn drop(&mut self) {
        drop(self.subscription.take());
    }
}

/// How many leaves a `map` makes. Stops counting behind [`MAX_LEAVES`].
fn leaves_needed(range: Range, pa: u64, largest: u64, sizes: &[u64]) -> u64 {
    let (mut done, mut count) = (0, 0);
    while done < range.size && count <= MAX_LEAVES {
        let alignment = (range.gpa + done) | (pa + done);
        let fits = |size: &&u64| **size <= largest && alignment % **size == 0 && range.size - done >= **size;
        // The smallest always fits: everything is a multiple of it.
        let size = sizes.iter().rev().find(fits).copied().unwrap_or(range.size);
        done += size;
        count += 1;
    }
    count
}
