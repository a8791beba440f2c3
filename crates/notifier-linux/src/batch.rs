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

use std::{fs::File, io, os::fd::AsFd, sync::Arc};

use notifier_core::{
    Access, AddrRange, CloseError, Gpa, GpaRange, HvaRange, Key, LeasePolicy, OpenError, RangeError, SlotId,
};
use vm_memory::bitmap::Bitmap;

use crate::{
    budget::BudgetError,
    kernel::Call,
    layout::Span,
    plan::plan,
    ram::{GuestRam, Source, check_window},
    run::execute,
};

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
    /// An operation failed, and besides a window could not be closed: its range stays in progress, as with
    /// [`RamError::Close`].
    #[error("{error}; and besides: {close}")]
    Unclosed {
        /// Why the operation failed, and what is so now. Never [`RamError::Unclosed`] itself.
        error: Box<RamError>,
        /// What happened to the first window that was not closed.
        close: CloseError,
    },
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
///
/// Where `mmap` fails the kernel may have taken the old mapping away already. Such a hole is filled at once, but for a moment
/// it is there, and another thread's `mmap` without a fixed address may land in it. Nothing can tell that mapping from
/// guest RAM: it is taken for the guest's, shows up in neither `filled` nor `holes`, and the next operation maps over it or
/// discards it. A VMM that goes on after `mmap` failed accepts that.
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
    /// Operations that had been done, and that were undone: RAM is as before. That is not so for stores that somebody
    /// made to these pages meanwhile without regard to the window (device threads without a scope, code that holds a raw
    /// pointer): they went to the pages that have gone again.
    pub undone: Vec<usize>,
    /// Operations that were done and stand, because what was there before is gone. One that replaced a page may not
    /// have given its home back to the host; repeating it, or discarding the page, does. The operation that failed is
    /// among them if what it had done could not be undone wholly (see `undo`).
    pub standing: Vec<usize>,
    /// Ranges of the failed operation whose old contents are gone. Pages there read as zero, or as the source; those that
    /// were the guest's own copies of a file's may read as before.
    pub lost: Vec<GpaRange>,
    /// Ranges in which the call left nothing mapped, and which are now private zeros, so that nothing else gets mapped
    /// there.
    pub filled: Vec<GpaRange>,
    /// Ranges in which nothing is mapped, because filling them failed too. Whoever accesses them gets `SIGSEGV`, or what
    /// the process maps next. Discarding or replacing them maps them anew, over whatever has come to lie there;
    /// protecting them does not.
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

/// An operation, but for where.
#[derive(Debug)]
pub(crate) enum What {
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
        let plan = plan(ram, &operations, &ram.state.lock());
        let reservation = plan.reserve(&ram.budget);
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
        match (done, closed) {
            (done, Ok(())) => done,
            (Ok(()), Err(close)) => Err(close.into()),
            (Err(error), Err(close)) => Err(RamError::Unclosed { error: Box::new(error), close }),
        }
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
        if let Some(Key::Guest(window)) = self.window {
            // Again: slots may have come since the window was opened.
            let ranges: Vec<GpaRange> = operations.iter().map(|operation| operation.range).collect();
            ram.check_aliases(window, &ranges)?;
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
pub(crate) struct Operation<'b> {
    pub(crate) range: GpaRange,
    pub(crate) region: usize,
    pub(crate) span: Span,
    pub(crate) what: &'b What,
}

impl Operation<'_> {
    pub(crate) fn host<B: Bitmap>(&self, ram: &GuestRam<B>) -> HvaRange {
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
        let region = &ram.regions[operation.region];
        // What must not be read is not faulted in for reading.
        for span in ram.readable(operation.region, operation.span) {
            let host: HvaRange = region.host_of(span);
            run = match run.take() {
                Some((at, before)) if before.end() == host.start() => before.joined(&host).map(|joined| (at, joined)),
                other => {
                    other.map_or(Ok(()), read)?;
                    Some((region.guest_of(span).start(), host))
                }
            };
        }
    }
    run.map_or(Ok(()), read)
}
