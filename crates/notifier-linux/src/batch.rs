// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on guest RAM: checked, planned, done, and undone where one fails.
//!
//! 1. *Check*: everything that can be known to be wrong before anything is done.
//! 2. *Windows*, if the caller has none: Zapped, over the runs of neighbouring pages, all of them before the first call.
//! 3. *Claim* the pages, and *plan*: which calls the layout asks for. Neighbours that need the same call share it.
//! 4. *Calls*, in order. Holes in the files that replaced pages are at home in come last, so that until then those pages
//!    can be mapped back.
//! 5. *Undo*, if a call failed: operations that are done are undone, each wholly or not at all, as far as their old
//!    contents are still somewhere: in a shared file that has not been punched yet, or in a source of which the guest
//!    had no private copy (`/proc/self/pagemap` is asked beforehand, where a plan has more than one call).
//! 6. The layout is written, the pages are given up, pages are faulted in, the windows close.

use std::{fs::File, io, ops::Range, os::fd::AsFd, sync::Arc};

use notifier_core::{
    Access, AddrRange, CloseError, Gpa, GpaRange, Hva, HvaRange, Key, LeasePolicy, OpenError, RangeError, SlotId,
};
use vm_memory::bitmap::Bitmap;

use crate::{
    budget::{BudgetError, PER_CALL, Reservation, Wanted},
    kernel::Call,
    layout::{Layout, Piece, Place, Span},
    ram::{Claim, GuestRam, Home, Region, Source, State, check_window},
};

/// Of `/proc/self/pagemap`: a page of a file or of shared memory; swapped out; present
/// (`Documentation/admin-guide/mm/pagemap.rst`).
const PM_FILE: u64 = 1 << 61;
const PM_SWAP: u64 = 1 << 62;
const PM_PRESENT: u64 = 1 << 63;

/// Why an operation on guest RAM was refused, or failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RamError {
    /// The range cannot exist. Nothing was done.
    #[error(transparent)]
    Range(#[from] RangeError),
    /// The range is not made of whole pages of the host. Nothing was done.
    #[error("{range} is not aligned to pages of {page:#x} bytes")]
    Unaligned {
        /// The range asked for.
        range: GpaRange,
        /// Bytes of a page.
        page: u64,
    },
    /// There is no RAM. Nothing was done.
    #[error("there is no RAM at {at}")]
    Outside {
        /// The first address without RAM.
        at: Gpa,
    },
    /// The range lies in more than one region. Nothing was done.
    #[error("{range} crosses the end of a region at {end}")]
    Crosses {
        /// The range asked for.
        range: GpaRange,
        /// Where its first region ends.
        end: Gpa,
    },
    /// Two operations of a batch have pages in common. Nothing was done.
    #[error("operations {first} and {second} of a batch both have {at}")]
    Overlap {
        /// Index of one operation.
        first: usize,
        /// Index of the other.
        second: usize,
        /// The first page that both have.
        at: Gpa,
    },
    /// The source's offset is no multiple of the page size. Nothing was done.
    #[error("offset {offset:#x} of the source for {at} is not aligned to pages of {page:#x} bytes")]
    SourceUnaligned {
        /// Where it was to be mapped.
        at: Gpa,
        /// The offset, in bytes.
        offset: u64,
        /// Bytes of a page.
        page: u64,
    },
    /// The source's file is too short: accesses would be `SIGBUS`. Nothing was done.
    #[error("the source for {at} would end at {end:#x}, its file at {length:#x}")]
    SourceEnds {
        /// Where it was to be mapped.
        at: Gpa,
        /// Where the bytes asked for end in the file.
        end: u64,
        /// Bytes of the file.
        length: u64,
    },
    /// The source is memory of the guest's own file, which other operations punch holes into. Nothing was done.
    #[error("the source for {at} is the file that {home} is at home in")]
    SourceIsHome {
        /// Where it was to be mapped.
        at: Gpa,
        /// Whose home it is.
        home: GpaRange,
    },
    /// The process would come too near to the limit of its mappings. Nothing was done.
    #[error("no mappings are left for {at}: {source}")]
    Budget {
        /// Where the first operation begins.
        at: Gpa,
        /// The limit and what is in use.
        source: BudgetError,
    },
    /// The open window is over less than the operation. Nothing was done.
    #[error("{range} is not inside the open window over {window}")]
    NotInWindow {
        /// The range asked for.
        range: GpaRange,
        /// What the window covers.
        window: Key,
    },
    /// The open window is one of another space. Nothing was done.
    #[error("the window over {window} belongs to another space than the memory")]
    ForeignSpace {
        /// What the window covers.
        window: Key,
    },
    /// The window is by guest address, and another slot has the same host bytes: it would change behind the back of
    /// those who translate through that slot. Nothing was done; open a window by host address.
    #[error("{slot} has host bytes of the window over {window} too")]
    Aliased {
        /// What the window covers.
        window: Key,
        /// The other slot.
        slot: SlotId,
    },
    /// A window could not be opened. Nothing was done; what was zapped stays zapped.
    #[error("nothing was changed: {0}")]
    Window(#[from] OpenError),
    /// Everything was done, but a window could not be closed: its range stays in progress.
    #[error("everything was done: {0}")]
    Close(#[from] CloseError),
    /// A call failed. What was done before was undone where it could be.
    #[error(transparent)]
    Failed(#[from] Box<OperationError>),
    /// Everything was done, but the pages could not be faulted in ahead.
    #[error("everything was done, but at {at} {call} failed: {source}")]
    Populate {
        /// Where the pages begin.
        at: Gpa,
        /// The call.
        call: Call,
        /// What the kernel said.
        source: io::Error,
    },
    /// A call that changes no contents failed.
    #[error("at {at} {call} failed: {source}")]
    Call {
        /// The call.
        call: Call,
        /// Where it begins.
        at: Gpa,
        /// What the kernel said.
        source: io::Error,
    },
}

/// An operation failed in the middle. All operations after it were not begun.
#[derive(Debug, thiserror::Error)]
#[error(
    "operation {operation}: at {at} {call} failed: {source} ({} undone, {} stand, {} ranges lost{})",
    .undone.len(), .standing.len(), .lost.len(), Trouble(.holes, .undo)
)]
#[non_exhaustive]
pub struct OperationError {
    /// Index of the operation in its batch; zero for a single one. It is as if it had not been begun, but for what
    /// `lost` and `filled` say, unless its index is in `standing`.
    pub operation: usize,
    /// Where the call begins.
    pub at: Gpa,
    /// The call.
    pub call: Call,
    /// What the kernel said.
    pub source: io::Error,
    /// Operations that had been done, and that were undone: RAM is as before.
    pub undone: Vec<usize>,
    /// Operations that were done and stand, because what was there before is gone. One that replaced a page may not
    /// have given its home back to the host; repeating it, or discarding the page, does.
    pub standing: Vec<usize>,
    /// Ranges of the failed operation whose old contents are gone. Pages there read as zero, or as the source; those that
    /// were the guest's own copies of a file's may read as before.
    pub lost: Vec<GpaRange>,
    /// Ranges in which the call left nothing mapped, and which are now private zeros, so that nothing else gets mapped
    /// there.
    pub filled: Vec<GpaRange>,
    /// Ranges in which nothing is mapped, because filling them failed too. Whoever accesses them gets `SIGSEGV`, or what
    /// the process maps next.
    pub holes: Vec<GpaRange>,
    /// The first call that failed while undoing. The operation that it belongs to is among those that stand, partly.
    pub undo: Option<UndoError>,
}

/// A call that failed while undoing.
#[derive(Debug, thiserror::Error)]
#[error("at {at} {call} failed: {source}")]
pub struct UndoError {
    /// Where the call begins.
    pub at: Gpa,
    /// The call.
    pub call: Call,
    /// What the kernel said.
    pub source: io::Error,
}

/// What went wrong besides.
struct Trouble<'a>(&'a [GpaRange], &'a Option<UndoError>);

impl std::fmt::Display for Trouble<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(hole) = self.0.first() {
            write!(f, ", nothing is mapped at {hole}")?;
        }
        if let Some(undo) = self.1 {
            write!(f, ", undoing: {undo}")?;
        }
        Ok(())
    }
}

#[derive(Debug)]
enum What {
    Discard,
    Replace(Source),
    Protect(Access),
}

/// Operations on guest RAM that are checked together before any is begun. Made by [`GuestRam::batch`] and
/// [`Within::batch`](crate::Within::batch).
#[derive(Debug)]
#[must_use = "nothing is done before `run`"]
pub struct Batch<'r, B: Bitmap = ()> {
    ram: &'r GuestRam<B>,
    /// A window that is open already.
    window: Option<Key>,
    operations: Vec<(GpaRange, What)>,
    /// The first operation whose range cannot exist.
    bad: Option<RangeError>,
    leases: LeasePolicy,
    nonblocking: bool,
}

impl<'r, B: Bitmap> Batch<'r, B> {
    pub(crate) fn new(ram: &'r GuestRam<B>, window: Option<Key>) -> Self {
        Self { ram, window, operations: Vec::new(), bad: None, leases: LeasePolicy::default(), nonblocking: false }
    }

    /// As [`GuestRam::discard`].
    pub fn discard(mut self, range: GpaRange) -> Self {
        self.operations.push((range, What::Discard));
        self
    }

    /// As [`GuestRam::replace`].
    pub fn replace(mut self, at: Gpa, source: &Source, len: u64) -> Self {
        match AddrRange::with_len(at, len) {
            Ok(range) => self.operations.push((range, What::Replace(source.clone()))),
            Err(error) => self.bad = self.bad.or(Some(error)),
        }
        self
    }

    /// As [`GuestRam::protect`].
    pub fn protect(mut self, range: GpaRange, access: Access) -> Self {
        self.operations.push((range, What::Protect(access)));
        self
    }

    /// What the windows do about leases; [`LeasePolicy::Fail`] unless said. Nothing, inside an open window.
    pub fn leases(mut self, policy: LeasePolicy) -> Self {
        self.leases = policy;
        self
    }

    /// The windows fail with [`OpenError::WouldBlock`] rather than wait. Nothing, inside an open window.
    pub fn nonblocking(mut self) -> Self {
        self.nonblocking = true;
        self
    }

    /// How many operations there are.
    pub fn len(&self) -> usize {
        self.operations.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.operations.is_empty()
    }

    /// Does them, in order.
    ///
    /// # Errors
    /// [`RamError`]. Until the first call fails nothing was done; see [`OperationError`] for what is so after that.
    pub fn run(self) -> Result<(), RamError> {
        let ram = self.ram;
        let operations = self.check()?;
        let Some(first) = operations.first() else { return Ok(()) };
        if self.window.is_some() {
            execute(ram, &operations, None)?;
            return populate(ram, &operations);
        }
        // Whether the mappings suffice is to be known before anybody is told of a change. The plan is made again when
        // the pages are claimed.
        let wanted = plan(ram, &operations, &ram.state.lock()).mappings;
        let reservation = ram.budget.reserve_mappings(wanted);
        let reservation = reservation.map_err(|source| RamError::Budget { at: first.range.start(), source })?;
        let mut windows = Vec::new();
        for run in runs(operations.iter().map(|operation| operation.host(ram))) {
            let mut window = ram.space().window(run).leases(self.leases);
            if self.nonblocking {
                window = window.nonblocking();
            }
            windows.push(window.open_zapped()?);
        }
        let done = execute(ram, &operations, Some(reservation)).and_then(|()| populate(ram, &operations));
        let mut closed = Ok(());
        for window in windows.into_iter().rev() {
            closed = closed.and(window.close());
        }
        done?;
        Ok(closed?)
    }

    /// All that can be known to be wrong before the layout is looked at.
    fn check(&self) -> Result<Vec<Operation<'_>>, RamError> {
        if let Some(error) = self.bad {
            return Err(error.into());
        }
        let ram = self.ram;
        let mut operations = Vec::with_capacity(self.operations.len());
        let mut looked_at: Option<(&Arc<File>, crate::kernel::FileFacts)> = None;
        for &(range, ref what) in &self.operations {
            let (region, span) = ram.locate(range)?;
            let operation = Operation { range, region, span, what };
            if let Some(window) = self.window {
                check_window(window, range, operation.host(ram))?;
            }
            if let What::Replace(source) = what {
                let (at, offset) = (range.start(), source.offset);
                if offset % ram.page != 0 {
                    return Err(RamError::SourceUnaligned { at, offset, page: ram.page });
                }
                let facts = match looked_at {
                    Some((file, facts)) if Arc::ptr_eq(file, &source.file) => facts,
                    _ => {
                        let failed = |source| RamError::Call { call: Call::FileFacts, at, source };
                        let facts = ram.kernel.file_facts(source.file.as_fd()).map_err(failed)?;
                        looked_at = Some((&source.file, facts));
                        facts
                    }
                };
                // The last page of a file is zero behind the end.
                let end = offset.saturating_add(range.len());
                if end > facts.length.checked_next_multiple_of(ram.page).unwrap_or(u64::MAX) {
                    return Err(RamError::SourceEnds { at, end, length: facts.length });
                }
                for region in &ram.regions {
                    let home = region.punched.is_some_and(|(identity, home)| {
                        identity == facts.identity && home < end && offset < home + region.guest.len()
                    });
                    if home {
                        return Err(RamError::SourceIsHome { at, home: region.guest });
                    }
                }
            }
            operations.push(operation);
        }
        if operations.len() > 1 {
            let mut order: Vec<usize> = (0..operations.len()).collect();
            order.sort_unstable_by_key(|&index| operations[index].range.start());
            for pair in order.windows(2) {
                let (before, after) = (&operations[pair[0]], &operations[pair[1]]);
                if before.range.overlaps(&after.range) {
                    let (first, second) = (pair[0].min(pair[1]), pair[0].max(pair[1]));
                    return Err(RamError::Overlap { first, second, at: after.range.start() });
                }
            }
        }
        Ok(operations)
    }
}

/// An operation whose place is known.
struct Operation<'b> {
    range: GpaRange,
    region: usize,
    span: Span,
    what: &'b What,
}

impl Operation<'_> {
    fn host<B: Bitmap>(&self, ram: &GuestRam<B>) -> HvaRange {
        ram.regions[self.region].host_of(self.span)
    }
}

/// Ranges, ascending; neighbours joined.
fn runs(ranges: impl Iterator<Item = HvaRange>) -> Vec<HvaRange> {
    let mut all: Vec<HvaRange> = ranges.collect();
    all.sort_unstable_by_key(|range| range.start());
    all.dedup_by(|next, run| match run.joined(next) {
        Some(joined) => {
            *run = joined;
            true
        }
        None => false,
    });
    all
}

/// What a step does.
#[derive(Debug, Clone)]
enum Deed {
    /// Maps a file, private.
    MapFile(Arc<File>, u64, Access),
    /// Maps what the region is made of.
    MapHome(Access),
    /// Maps private zeros, in a region made of a file.
    MapZero(Access),
    /// Drops private pages.
    Drop,
    /// Punches the home's file.
    Punch,
    Protect(Access),
    NoHugePage,
}

#[derive(Debug)]
struct Step {
    operation: usize,
    region: usize,
    span: Span,
    deed: Deed,
    /// What was there, as indices of `Plan::before`.
    before: Range<usize>,
}

/// What was there before a step.
#[derive(Debug)]
struct Before {
    span: Span,
    piece: Piece,
    /// Of a private mapping of a file: the guest has no copy of its own, so that the file has all that there is.
    clean: bool,
}

/// A hole to be punched when all steps are done.
#[derive(Debug)]
struct Hole {
    /// The first operation that it belongs to, and the last.
    operations: (usize, usize),
    region: usize,
    span: Span,
}

#[derive(Debug, Default)]
struct Plan {
    steps: Vec<Step>,
    before: Vec<Before>,
    holes: Vec<Hole>,
    /// Mappings that the process may have more afterwards.
    mappings: Wanted,
}

impl Plan {
    /// Adds a step for `self.before[before]`, which are neighbours and in need of the same.
    fn push(&mut self, operation: usize, region: usize, before: Range<usize>, deed: Deed, layout: &Layout) {
        let span = Span { start: self.before[before.start].span.start, end: self.before[before.end - 1].span.end };
        if matches!(deed, Deed::MapFile(..) | Deed::MapHome(_) | Deed::MapZero(_) | Deed::Protect(_)) {
            self.mappings.worst += PER_CALL;
            self.mappings.likely += layout.cuts(span);
        }
        self.steps.push(Step { operation, region, span, deed, before });
    }

    fn hole(&mut self, operation: usize, region: usize, span: Span) {
        match self.holes.last_mut() {
            Some(last) if last.region == region && last.span.end == span.start => {
                last.span.end = span.end;
                last.operations.1 = operation;
            }
            _ => self.holes.push(Hole { operations: (operation, operation), region, span }),
        }
    }

    fn calls(&self) -> usize {
        self.steps.len() + self.holes.len()
    }
}

/// What a piece needs, so that neighbours in need of the same can share calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    punch: bool,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    Drop,
    MapHome(Access),
    MapZero(Access),
    MapSource(Access),
    Protect,
}

fn discard_needs(piece: &Piece, home: &Home) -> Need {
    let own = !matches!(home, Home::Anonymous | Home::Private { template: true, .. });
    let then = match (&piece.place, home) {
        (Place::Home, Home::Shared(..)) => Then::Nothing,
        (Place::Home | Place::Anonymous, Home::Anonymous) => Then::Drop,
        (Place::Home, Home::Private { template: false, .. }) => Then::Drop,
        (Place::Anonymous, Home::Private { template: true, .. }) => Then::Drop,
        (_, Home::Private { template: true, .. }) => Then::MapZero(piece.access),
        _ => Then::MapHome(piece.access),
    };
    Need { punch: own, then }
}

fn replace_needs(span: Span, piece: &Piece, home: &Home, source: &Source, from: Span) -> Need {
    let wanted = source.offset + (span.start - from.start);
    let same = match (&piece.place, home) {
        (Place::File { file, offset, .. }, _) => Arc::ptr_eq(file, &source.file) && *offset == wanted,
        (Place::Home, Home::Private { file, offset, .. }) => {
            Arc::ptr_eq(file, &source.file) && offset + span.start == wanted
        }
        _ => false,
    };
    Need { punch: false, then: if same { Then::Drop } else { Then::MapSource(piece.access) } }
}

/// Which calls the layout asks for.
fn plan<B: Bitmap>(ram: &GuestRam<B>, operations: &[Operation<'_>], state: &State) -> Plan {
    let mut plan = Plan::default();
    for (index, operation) in operations.iter().enumerate() {
        let region = &ram.regions[operation.region];
        let layout = &state.layouts[operation.region];
        let huge = !state.no_huge_pages;
        let mut open: Option<(Need, usize)> = None;
        for (span, piece) in layout.within(operation.span) {
            let need = match operation.what {
                What::Discard => Some(discard_needs(&piece, &region.home)),
                What::Replace(source) => Some(replace_needs(span, &piece, &region.home, source, operation.span)),
                What::Protect(access) if *access == piece.access => None,
                What::Protect(_) => Some(Need { punch: false, then: Then::Protect }),
            };
            if open.is_some_and(|(open, _)| Some(open) != need) {
                flush(&mut plan, index, operation, region, layout, huge, open.take());
            }
            if let Some(need) = need {
                open = open.or(Some((need, plan.before.len())));
                plan.before.push(Before { span, piece, clean: false });
            }
        }
        flush(&mut plan, index, operation, region, layout, huge, open.take());
    }
    plan
}

/// Adds the steps for the pieces from `open` on.
fn flush(
    plan: &mut Plan,
    index: usize,
    operation: &Operation<'_>,
    region: &Region,
    layout: &Layout,
    huge: bool,
    open: Option<(Need, usize)>,
) {
    let Some((need, first)) = open else { return };
    let before = first..plan.before.len();
    let start = plan.before[first].span.start;
    if need.punch {
        plan.push(index, operation.region, before.clone(), Deed::Punch, layout);
    }
    let deed = match (need.then, operation.what) {
        (Then::Nothing, _) => None,
        (Then::Drop, _) => Some(Deed::Drop),
        (Then::MapHome(access), _) => Some(Deed::MapHome(access)),
        (Then::MapZero(access), _) => Some(Deed::MapZero(access)),
        (Then::MapSource(access), What::Replace(source)) => {
            let offset = source.offset + (start - operation.span.start);
            Some(Deed::MapFile(Arc::clone(&source.file), offset, access))
        }
        (Then::Protect, What::Protect(access)) => Some(Deed::Protect(*access)),
        (Then::MapSource(_) | Then::Protect, _) => None,
    };
    if let Some(deed) = deed {
        let small = !huge && matches!(deed, Deed::MapHome(_) | Deed::MapZero(_));
        plan.push(index, operation.region, before.clone(), deed, layout);
        if small {
            plan.push(index, operation.region, before.clone(), Deed::NoHugePage, layout);
        }
    }
    if matches!(operation.what, What::Replace(_)) && region.punched.is_some() {
        for part in before {
            let Before { span, piece, .. } = &plan.before[part];
            let kept = match piece.place {
                Place::File { kept, .. } => kept,
                Place::Anonymous => true,
                // Its own file's bytes, where they are: they stay.
                Place::Home => need.then != Then::Drop,
            };
            let span = *span;
            if kept {
                plan.hole(index, operation.region, span);
            }
        }
    }
}

/// What the kernel said to a call, and to which.
type Made = Result<(), (Call, io::Error)>;

/// Claims the pages, makes the calls, and undoes them where one fails.
fn execute<B: Bitmap>(
    ram: &GuestRam<B>,
    operations: &[Operation<'_>],
    reserved: Option<Reservation>,
) -> Result<(), RamError> {
    let hosts = operations.iter().map(|operation| operation.host(ram));
    let (mut claim, mut plan) = ram.claim(hosts, |state| plan(ram, operations, state));
    let at = operations[0].range.start();
    // What was reserved before the windows were opened was for the layout as it was then.
    let reservation = match reserved.filter(|reserved| reserved.wanted().likely >= plan.mappings.likely) {
        Some(enough) => Ok(enough),
        None => ram.budget.reserve_mappings(plan.mappings),
    };
    claim.reservation = Some(reservation.map_err(|source| RamError::Budget { at, source })?);
    if plan.calls() > 1 {
        look_for_copies(ram, &mut plan);
    }
    let mut run = Run { ram, plan: &plan, claim };
    for (index, step) in plan.steps.iter().enumerate() {
        match run.make(step) {
            Ok(()) => run.note(step),
            Err(failed) => return Err(run.fail(operations, index, 0, failed).into()),
        }
    }
    for (index, hole) in plan.holes.iter().enumerate() {
        if let Err(failed) = run.punch(hole.region, hole.span) {
            return Err(run.fail(operations, plan.steps.len(), index, failed).into());
        }
    }
    run.punched(&plan.holes);
    Ok(())
}

/// Asks which private mappings of files have no page of their own.
fn look_for_copies<B: Bitmap>(ram: &GuestRam<B>, plan: &mut Plan) {
    let mut entries = Vec::new();
    for step in &plan.steps {
        if !matches!(step.deed, Deed::MapFile(..) | Deed::MapHome(_) | Deed::MapZero(_) | Deed::Drop) {
            continue;
        }
        let region = &ram.regions[step.region];
        for before in &mut plan.before[step.before.clone()] {
            let private = match before.piece.place {
                Place::File { .. } => true,
                Place::Home => matches!(region.home, Home::Private { .. }),
                Place::Anonymous => false,
            };
            // What cannot be asked is taken to have copies.
            before.clean = private
                && ram.kernel.read_pagemap(region.host_of(before.span), &mut entries).is_ok()
                && entries.iter().all(|entry| entry & (PM_PRESENT | PM_SWAP) == 0 || entry & PM_FILE != 0);
        }
    }
}

/// A plan under way.
struct Run<'r, 'p, B: Bitmap> {
    ram: &'r GuestRam<B>,
    plan: &'p Plan,
    claim: Claim<'r, B>,
}

impl<B: Bitmap> Run<'_, '_, B> {
    fn make(&self, step: &Step) -> Made {
        let region = &self.ram.regions[step.region];
        let host = region.host_of(step.span);
        let kernel = &self.ram.kernel;
        let failed = |call| move |error| (call, error);
        match &step.deed {
            Deed::MapFile(file, offset, access) => {
                // SAFETY: guest RAM: vm-memory accesses it through volatile slices alone, the claim keeps other changes
                // away, and the layout has checked that the range is the region's.
                unsafe { kernel.map_file(host, file.as_fd(), *offset, region.style(*access, false)) }
                    .map_err(failed(Call::MapFile))
            }
            Deed::MapHome(access) => self.map_home(region, step.span, *access),
            Deed::MapZero(access) => {
                // SAFETY: as above.
                unsafe { kernel.map_anonymous(host, region.style(*access, false)) }.map_err(failed(Call::MapAnonymous))
            }
            // SAFETY: as above.
            Deed::Drop => unsafe { kernel.discard(host) }.map_err(failed(Call::Discard)),
            Deed::Punch => self.punch(step.region, step.span),
            Deed::Protect(access) => self.protect(region, step.span, *access),
            Deed::NoHugePage => kernel.no_huge_page(host).map_err(failed(Call::NoHugePage)),
        }
    }

    fn map_home(&self, region: &Region, span: Span, access: Access) -> Made {
        let (file, offset, shared) = match &region.home {
            Home::Anonymous => {
                let style = region.style(access, false);
                // SAFETY: as in `make`.
                return unsafe { self.ram.kernel.map_anonymous(region.host_of(span), style) }
                    .map_err(|error| (Call::MapAnonymous, error));
            }
            Home::Shared(file, offset) => (file, offset, true),
            Home::Private { file, offset, .. } => (file, offset, false),
        };
        self.map_file(region, span, file, offset + span.start, access, shared)
    }

    fn map_file(
        &self,
        region: &Region,
        span: Span,
        file: &Arc<File>,
        offset: u64,
        access: Access,
        shared: bool,
    ) -> Made {
        let style = region.style(access, shared);
        // SAFETY: as in `make`.
        unsafe { self.ram.kernel.map_file(region.host_of(span), file.as_fd(), offset, style) }
            .map_err(|error| (Call::MapFile, error))
    }

    fn protect(&self, region: &Region, span: Span, access: Access) -> Made {
        // SAFETY: as in `make`. Accesses that are forbidden now are faults, not undefined.
        unsafe { self.ram.kernel.protect(region.host_of(span), access) }.map_err(|error| (Call::Protect, error))
    }

    fn punch(&self, region: usize, span: Span) -> Made {
        match &self.ram.regions[region].home {
            Home::Shared(file, offset) | Home::Private { file, offset, template: false } => {
                let made = self.ram.kernel.punch_hole(file.as_fd(), offset + span.start, span.len());
                made.map_err(|error| (Call::PunchHole, error))
            }
            Home::Anonymous | Home::Private { template: true, .. } => Ok(()),
        }
    }

    /// Writes down what a step did.
    fn note(&mut self, step: &Step) {
        let before = &self.plan.before[step.before.clone()];
        let mut set = |span, place, access| self.claim.changes.push((step.region, span, Piece { place, access }));
        match &step.deed {
            Deed::MapFile(file, offset, access) => {
                let punched = self.ram.regions[step.region].punched.is_some();
                let place = Place::File { file: Arc::clone(file), offset: *offset, kept: punched };
                set(step.span, place, *access);
            }
            Deed::MapHome(access) => set(step.span, Place::Home, *access),
            Deed::MapZero(access) => set(step.span, Place::Anonymous, *access),
            Deed::Protect(access) => {
                before.iter().for_each(|before| set(before.span, before.piece.place.clone(), *access));
            }
            // So that `punched` finds it.
            Deed::Drop => {
                before.iter().for_each(|before| set(before.span, before.piece.place.clone(), before.piece.access))
            }
            Deed::Punch | Deed::NoHugePage => {}
        }
    }

    /// Writes down that the homes under `holes` hold nothing any more.
    fn punched(&mut self, holes: &[Hole]) {
        let all = holes.len() == self.plan.holes.len();
        for (region, span, piece) in &mut self.claim.changes {
            let inside =
                |hole: &Hole| hole.region == *region && hole.span.start <= span.start && span.end <= hole.span.end;
            if let Place::File { kept, .. } = &mut piece.place {
                // Where all is punched, what no hole covers was empty before.
                *kept = *kept && !(all || holes.iter().any(inside));
            }
        }
    }

    /// A step, or a hole after all steps, failed: undoes what can be undone, and says what is so.
    fn fail(
        mut self,
        operations: &[Operation<'_>],
        steps: usize,
        holes: usize,
        (call, source): (Call, io::Error),
    ) -> Box<OperationError> {
        let plan = self.plan;
        let step = plan.steps.get(steps);
        let (operation, region, span) = match (step, plan.holes.get(holes)) {
            (Some(step), _) => (step.operation, step.region, step.span),
            (None, Some(hole)) => (hole.operations.0, hole.region, hole.span),
            // `fail` is told of a step or of a hole.
            (None, None) => (0, operations[0].region, operations[0].span),
        };
        let mut error = Box::new(OperationError {
            operation,
            at: self.ram.regions[region].guest_of(span).start(),
            call,
            source,
            undone: Vec::new(),
            standing: Vec::new(),
            lost: Vec::new(),
            filled: Vec::new(),
            holes: Vec::new(),
            undo: None,
        });
        let (made, open) = if step.is_some() { (&plan.holes[..0], true) } else { (&plan.holes[..holes], false) };
        self.punched(made);
        if let Some(step) = step {
            self.mend(step, &mut error);
        }

        // From the last to the first, as the calls were made.
        let mut end = steps;
        while end != 0 {
            let index = plan.steps[end - 1].operation;
            let begin = plan.steps[..end].iter().rposition(|step| step.operation != index).map_or(0, |last| last + 1);
            let own = &plan.steps[begin..end];
            end = begin;
            if open && index == operation {
                // Half done: what can be is undone, the rest is lost.
                for step in own.iter().rev() {
                    if self.reversible(step, made) {
                        self.undo(step, &mut error);
                    } else if !matches!(step.deed, Deed::NoHugePage) {
                        let region = &self.ram.regions[step.region];
                        let lost = region.guest_of(step.span);
                        if !error.lost.contains(&lost) {
                            error.lost.push(lost);
                        }
                    }
                }
            } else if own.iter().all(|step| self.reversible(step, made))
                && own.iter().rev().all(|step| self.undo(step, &mut error))
            {
                error.undone.push(index);
            } else {
                error.standing.push(index);
            }
        }
        // What needed no call is as it was asked for.
        for index in (0..operations.len()).filter(|&index| if open { index < operation } else { true }) {
            if !error.undone.contains(&index) && !error.standing.contains(&index) {
                error.standing.push(index);
            }
        }
        error.undone.sort_unstable();
        error.standing.sort_unstable();
        error.lost.sort_unstable_by_key(|range| range.start());
        error
    }

    /// Whether everything that was there before a step, which was made, is still somewhere.
    fn reversible(&self, step: &Step, made: &[Hole]) -> bool {
        let region = &self.ram.regions[step.region];
        let before = &self.plan.before[step.before.clone()];
        match step.deed {
            Deed::Protect(_) | Deed::NoHugePage => true,
            // Of a home that nobody sees, nothing is lost.
            Deed::Punch => before.iter().all(|before| matches!(before.piece.place, Place::File { .. })),
            Deed::MapFile(..) | Deed::MapHome(_) | Deed::MapZero(_) | Deed::Drop => {
                before.iter().all(|before| recoverable(region, step.region, before, made))
            }
        }
    }

    /// Puts back what was there before a step that is reversible.
    fn undo(&mut self, step: &Step, error: &mut OperationError) -> bool {
        if matches!(step.deed, Deed::Drop | Deed::Punch | Deed::NoHugePage) {
            // Nothing was there that is not there now.
            return true;
        }
        let protection = matches!(step.deed, Deed::Protect(_));
        let before = &self.plan.before[step.before.clone()];
        // All of them, also after one that failed.
        let failed = before.iter().filter(|before| !self.put_back(step.region, before, protection, error)).count();
        failed == 0
    }

    /// Puts back one piece.
    fn put_back(&mut self, index: usize, before: &Before, protection: bool, error: &mut OperationError) -> bool {
        let region = &self.ram.regions[index];
        let access = before.piece.access;
        let made = match &before.piece.place {
            _ if protection => self.protect(region, before.span, access),
            Place::File { file, offset, .. } => self.map_file(region, before.span, file, *offset, access, false),
            Place::Home | Place::Anonymous => self.map_home(region, before.span, access),
        };
        match made {
            Ok(()) => {
                self.claim.changes.push((index, before.span, before.piece.clone()));
                true
            }
            Err((call, source)) => {
                let at = region.guest_of(before.span).start();
                error.undo.get_or_insert(UndoError { at, call, source });
                false
            }
        }
    }

    /// Sees to what a step that failed may have done all the same.
    fn mend(&mut self, step: &Step, error: &mut OperationError) {
        let plan = self.plan;
        let before = &plan.before[step.before.clone()];
        let access = match step.deed {
            Deed::MapFile(_, _, access) | Deed::MapHome(access) | Deed::MapZero(access) => access,
            Deed::Protect(_) => {
                // `mprotect(2)`: the mappings before the one that it failed at may have been changed.
                for before in before {
                    self.put_back(step.region, before, true, error);
                }
                return;
            }
            // These fail before they do anything.
            Deed::Drop | Deed::Punch | Deed::NoHugePage => return,
        };
        let region = &self.ram.regions[step.region];
        if self.ram.kernel.is_mapped(region.host_of(step.span)).unwrap_or(false) {
            return;
        }
        // The kernel took the old mapping away and then failed. Before anything else of this process lands there:
        // filled, by halves, for a part of it may still be mapped.
        let mut filled = Vec::new();
        let mut left = vec![step.span];
        while let Some(span) = left.pop() {
            match self.ram.kernel.fill_hole(region.host_of(span), region.style(access, false)) {
                Ok(true) => filled.push(span),
                Ok(false) if span.len() > self.ram.page => {
                    let middle = span.start + (span.len() / self.ram.page / 2) * self.ram.page;
                    left.push(Span { start: middle, end: span.end });
                    left.push(Span { start: span.start, end: middle });
                }
                Ok(false) => {}
                Err(_) => error.holes.push(region.guest_of(span)),
            }
        }
        let place = if matches!(region.home, Home::Anonymous) { Place::Home } else { Place::Anonymous };
        for &span in &filled {
            self.claim.changes.push((step.region, span, Piece { place: place.clone(), access }));
        }
        for before in before {
            let hit = |span: &&Span| span.start < before.span.end && before.span.start < span.end;
            let zeros: Vec<Span> = filled.iter().filter(hit).copied().collect();
            if zeros.is_empty() {
                continue;
            }
            let recoverable = recoverable(region, step.region, before, &[]);
            if recoverable && self.put_back(step.region, before, false, error) {
                continue;
            }
            for span in zeros {
                let span = Span { start: span.start.max(before.span.start), end: span.end.min(before.span.end) };
                error.filled.push(region.guest_of(span));
                error.lost.push(region.guest_of(span));
            }
        }
    }
}

/// Whether what was there before it was mapped over, or dropped, is still somewhere.
fn recoverable(region: &Region, index: usize, before: &Before, made: &[Hole]) -> bool {
    let hit =
        |hole: &Hole| hole.region == index && hole.span.start < before.span.end && before.span.start < hole.span.end;
    match (&before.piece.place, &region.home) {
        (Place::Home, Home::Shared(..)) => !made.iter().any(hit),
        (Place::Home, Home::Private { .. }) => before.clean && !made.iter().any(hit),
        (Place::File { .. }, _) => before.clean,
        (Place::Home, Home::Anonymous) | (Place::Anonymous, _) => false,
    }
}

/// Faults in what is to be.
fn populate<B: Bitmap>(ram: &GuestRam<B>, operations: &[Operation<'_>]) -> Result<(), RamError> {
    let wanted =
        operations.iter().filter(|operation| matches!(operation.what, What::Replace(source) if source.populate));
    let mut run: Option<(Gpa, HvaRange)> = None;
    let read = |(at, host): (Gpa, HvaRange)| {
        let call = Call::PopulateRead;
        ram.kernel.populate_read(host).map_err(|source| RamError::Populate { at, call, source })
    };
    for operation in wanted {
        if !ram.access_at(operation.range.start()).is_some_and(|access| access.contains(Access::READ)) {
            continue;
        }
        let host: AddrRange<Hva> = operation.host(ram);
        run = match run.take() {
            Some((at, before)) if before.end() == host.start() => before.joined(&host).map(|joined| (at, joined)),
            other => {
                other.map_or(Ok(()), read)?;
                Some((operation.range.start(), host))
            }
        };
    }
    run.map_or(Ok(()), read)
}
