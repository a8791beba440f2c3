// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carries the model's operations out on a real table, as a small VMM would.
//!
//! What the engine leaves to its user is kept here: what the dirty sink heard and nobody harvested yet, and where dirty
//! logging was asked for. Both are kept by byte; a leaf has what any of its bytes has.

use std::error::Error;
use std::sync::{Arc, Mutex, PoisonError};

use notifier_core::{
    Access, AddrRange, Admission, Change, Extent, Gpa, GpaRange, Outcome as PageOutcome, OutputAddr, RangeError, Space,
    Subscription, Walker,
};
use spte_core::format::{EntryError, Format, FormatError, Kind, LeafSpec, Level};
use spte_core::{
    CollapseError, FlushFailed, HarvestError, HeapPages, MapError, MapOptions, Mapped, PageSource, RemoveError,
    SplitError, Table, TableError, Upgrade,
};
use spte_model::{Fault, Leaf, Logging, MemType, Op, Outcome, PageChoice, Reject, Shape, TouchKind};
use thiserror::Error;

use crate::bytes::{Bytes, Nearest};
use crate::hardware::{Caches, Hardware, Refusal, Software};
use crate::pages::ScarcePages;
use crate::tlb::Cached;

/// A format, and what has to be known of it beyond [`Format`].
#[derive(Debug, Clone)]
pub struct Driven<F: Format> {
    /// The format, as it is set up.
    pub format: F,
    /// What the model knows of it: sizes, address widths, rights and memory types that it has. Where it says that hardware
    /// does not record writes ([`Shape::hw_dirty`]), a leaf that may be written counts as written in the table,
    /// for safety; what a user knows exactly is only what was upgraded, and that is what the driver goes by.
    pub shape: Shape,
    /// The attributes of a memory type, `None` where the format has none for it. Different types have different attributes.
    pub attrs: fn(MemType) -> Option<F::Attrs>,
}

/// Why the driver did not carry an operation out.
#[derive(Debug, Error)]
pub enum DriveError {
    /// The operation is malformed. Nothing was done.
    #[error(transparent)]
    Rejected(#[from] Reject),
    /// There was no page for a table. The operation stopped there; what it did before stays done.
    #[error("no page for a table at {at:#x}")]
    OutOfPages {
        /// Where the table says that it stopped.
        at: u64,
    },
    /// The table did what it must not.
    #[error(transparent)]
    Wrong(#[from] Wrong),
}

/// What a table does that it must not, whatever the model says.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Wrong {
    /// An operation failed that nothing stood in the way of.
    #[error("{call} at {at:#x} failed: {source}")]
    Failed {
        /// What was called.
        call: &'static str,
        /// Where.
        at: u64,
        /// What it said.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A raw entry breaks a rule of its format.
    #[error("at {at}: {source}")]
    Entry {
        /// Where it stands.
        at: Gpa,
        /// The rule.
        source: EntryError,
    },
    /// A map that was to refuse what is present did not, or named another address.
    #[error("a map of absent memory alone over {present:#x}, which is present, named {named:?}")]
    PresentPassed {
        /// The first address asked for that is present.
        present: u64,
        /// The address it named, `None` where it mapped.
        named: Option<u64>,
    },
    /// Writing is withheld where nobody asked for it, or granted where it was to be withheld.
    #[error("the leaf {raw:#018x} at {at:#x} withholds writing: {withheld}, where logging is {logging:?}")]
    Withheld {
        /// Where.
        at: u64,
        /// The leaf.
        raw: u64,
        /// Whether it withholds writing.
        withheld: bool,
        /// What was asked for there.
        logging: Logging,
    },
    /// A leaf has attributes that nobody asked for.
    #[error("the leaf {raw:#018x} at {at:#x} has the attributes of no memory type")]
    Attributes {
        /// Where.
        at: u64,
        /// The leaf.
        raw: u64,
    },
    /// A leaf that withholds writing cannot be upgraded.
    #[error("the armed leaf at {at:#x} was not upgraded: {found:?}")]
    NotUpgraded {
        /// Where.
        at: u64,
        /// What the table said.
        found: Upgrade,
    },
    /// A leaf was armed that nobody had asked to log.
    #[error("the leaf at {at:#x} is armed without having been asked for")]
    ArmedUnasked {
        /// Where.
        at: u64,
    },
    /// A leaf stays old.
    #[error("the old leaf at {at:#x} was not made young")]
    StaysOld {
        /// Where.
        at: u64,
    },
    /// A harvest names what is no leaf.
    #[error("harvested {range}, which is no leaf")]
    NoLeafHarvested {
        /// What it named.
        range: GpaRange,
    },
    /// An access to an old leaf went through where the first has to fault.
    #[error("the old leaf at {at:#x} allowed an access")]
    OldAllowed {
        /// Where.
        at: u64,
    },
    /// A cache in hardware still has what the table no longer says: a flush is missing, or named too little.
    #[error("a TLB still leads {page:#x} to {output} with rights {access} (leaf at {start:#x}, {span:#x} bytes)")]
    Stale {
        /// The page.
        page: u64,
        /// Where it leads.
        output: OutputAddr,
        /// The rights that were cached.
        access: Access,
        /// Where the leaf began from which it was cached.
        start: u64,
        /// Its size in bytes.
        span: u64,
    },
    /// A cache in hardware writes without a trace to what was harvested, or reported, as written: the flush is missing.
    #[error("a TLB writes {page:#x} without marking it dirty")]
    StaleDirty {
        /// The page.
        page: u64,
    },
    /// A cache in hardware still has a link to a table that is not there any more.
    #[error("a TLB still has the link at {start:#x}, {span:#x} bytes, to the table at {table}")]
    StaleLink {
        /// Where the link's span begins.
        start: u64,
        /// Its size in bytes.
        span: u64,
        /// The table that it leads to.
        table: OutputAddr,
    },
    /// A repointing has no outcome.
    #[error("change_pte at {at:#x} reported nothing")]
    Unreported {
        /// Where.
        at: u64,
    },
    /// Hardware that walks the table did what no table of its format may make it do, or does not answer.
    #[error("hardware, at {at:#x}: {source}")]
    Hardware {
        /// Where a guest's access went, or the flush.
        at: u64,
        /// What it did.
        source: Box<dyn Error + Send + Sync>,
    },
}

/// An error of the table, which may be want of pages.
trait Stopped: Error + Send + Sync + Sized + 'static {
    /// Where it stopped for want of a page.
    fn stopped_at(&self) -> Option<Gpa> {
        None
    }

    fn of(self, call: &'static str, at: u64) -> DriveError {
        match self.stopped_at() {
            Some(at) => DriveError::OutOfPages { at: at.as_u64() },
            None => Wrong::Failed { call, at, source: Box::new(self) }.into(),
        }
    }
}

impl Stopped for MapError {
    fn stopped_at(&self) -> Option<Gpa> {
        if let MapError::OutOfPages { at, .. } = self { Some(*at) } else { None }
    }
}

impl Stopped for RemoveError {
    fn stopped_at(&self) -> Option<Gpa> {
        if let RemoveError::OutOfPages { at, .. } = self { Some(*at) } else { None }
    }
}

impl Stopped for SplitError {
    fn stopped_at(&self) -> Option<Gpa> {
        if let SplitError::OutOfPages { at, .. } = self { Some(*at) } else { None }
    }
}

impl Stopped for TableError {
    fn stopped_at(&self) -> Option<Gpa> {
        if let TableError::OutOfPages(_) = self { Some(Gpa::new(0)) } else { None }
    }
}

impl Stopped for CollapseError {}
impl Stopped for FlushFailed {}
impl Stopped for HarvestError {}

/// For errors that have nothing to do with pages.
fn failed<E: Error + Send + Sync + 'static>(call: &'static str, at: u64) -> impl FnOnce(E) -> DriveError {
    move |source| Wrong::Failed { call, at, source: Box::new(source) }.into()
}

/// A table and its user.
///
/// The table has joined a space of its own; its pages come from `P`, through a [`ScarcePages`]. A guest's accesses are `H`'s, and
/// a [`Tlb`](crate::Tlb) keeps what they saw. Who translates is the driver alone, and it waits for nobody.
#[derive(Debug)]
pub struct Driver<F: Format, P: PageSource = HeapPages, H: Hardware<F> = Software> {
    shape: Shape,
    attrs: fn(MemType) -> Option<F::Attrs>,
    /// Ageing takes rights away, the right to write for good: it comes back as that of an armed leaf does.
    ages_by_rights: bool,
    // Before the space: it leaves.
    subscription: Option<Subscription>,
    table: Arc<Table<F, ScarcePages<P>, Caches<H>>>,
    caches: Caches<H>,
    walker: Walker,
    space: Space,
    heard: Arc<Mutex<Vec<GpaRange>>>,
    /// Written, and not harvested yet, as far as the sink said so; without hardware's records, as far as upgrades said so.
    written: Bytes,
    /// All that the sink ever said, until it is forgotten.
    told: Bytes,
    /// Dirty logging is on, and a write is to be logged.
    armed: Bytes,
    /// Dirty logging is on, and a write was logged.
    open: Bytes,
}

/// What a walk over leaves knows from the leaf before.
struct Known<A> {
    mem: Option<(A, MemType)>,
    armed: Nearest,
    open: Nearest,
    written: Nearest,
}

impl<A> Default for Known<A> {
    fn default() -> Self {
        let [armed, open, written] = [(); 3].map(|()| Nearest::default());
        Self { mem: None, armed, open, written }
    }
}

fn range(start: u64, len: u64) -> Result<GpaRange, DriveError> {
    AddrRange::with_len(Gpa::new(start), len).map_err(failed::<RangeError>("a range", start))
}

/// The engine's word for the model's rights.
pub fn access(access: spte_model::Access) -> Access {
    use spte_model::Access as Model;
    let pairs = [(Model::R, Access::READ), (Model::W, Access::WRITE), (Model::X, Access::EXECUTE)];
    pairs.into_iter().filter(|(model, _)| access.contains(*model)).map(|(_, ours)| ours).collect()
}

fn model_access(access: Access) -> spte_model::Access {
    use spte_model::Access as Model;
    let pairs = [(Model::R, Access::READ), (Model::W, Access::WRITE), (Model::X, Access::EXECUTE)];
    pairs.into_iter().filter(|(_, ours)| access.contains(*ours)).fold(Model::NONE, |all, (model, _)| all | model)
}

/// An ordinary leaf at 0, where the level has leaves.
fn ordinary<F: Format>(format: &F, attrs: fn(MemType) -> Option<F::Attrs>, level: Level) -> Option<u64> {
    let (output, access) = (OutputAddr::new(0), Access::RWX);
    let attrs = attrs(MemType::Wb)?;
    format.leaf(level, &LeafSpec { output, access, armed: false, accessed: true, dirty: false, attrs }).ok()
}

/// Whether hardware may go by the level that a flush names: a format of such hardware has a split flushed, or a later flush
/// of a smaller leaf would leave the larger one.
fn goes_by_hints<F: Format>(format: &F, attrs: fn(MemType) -> Option<F::Attrs>) -> bool {
    let levels = std::iter::successors(Level::LEAF.above(), |level| level.above());
    let levels = levels.take_while(|level| *level <= format.geometry().top());
    let mut splits = levels.filter(|level| format.geometry().level(*level).leaf).filter_map(|level| {
        let table = format.table(level, OutputAddr::new(0)).ok()?;
        Some(format.transition(level, ordinary(format, attrs, level)?, table))
    });
    splits.all(|split| split.flush)
}

/// Whether an old leaf that may be written withholds it.
fn ages_by_rights<F: Format>(format: &F, attrs: fn(MemType) -> Option<F::Attrs>) -> bool {
    let young = ordinary(format, attrs, Level::LEAF);
    young.is_some_and(|young| format.spec(Level::LEAF, format.make_old(Level::LEAF, young)).armed)
}

impl<F: Format> Driver<F> {
    /// An empty table, with all the pages of the heap.
    ///
    /// # Errors
    /// [`DriveError::Wrong`] if the table cannot be made or does not join.
    pub fn new(driven: Driven<F>) -> Result<Self, DriveError> {
        Self::with_pages(driven, ScarcePages::new(HeapPages::new()))
    }
}

impl<F: Format, P: PageSource> Driver<F, P> {
    /// An empty table, with these pages.
    ///
    /// # Errors
    /// [`DriveError::OutOfPages`] if there is none for the root, [`DriveError::Wrong`] if the table cannot be made or
    /// does not join.
    pub fn with_pages(driven: Driven<F>, pages: ScarcePages<P>) -> Result<Self, DriveError> {
        Self::with_hardware(driven, pages, Software)
    }
}

impl<F: Format, P: PageSource, H: Hardware<F>> Driver<F, P, H> {
    /// An empty table, with these pages, that this hardware walks.
    ///
    /// # Errors
    /// As [`Driver::with_pages`], and [`Wrong::Hardware`] where it does not take the root.
    pub fn with_hardware(driven: Driven<F>, pages: ScarcePages<P>, hardware: H) -> Result<Self, DriveError> {
        let Driven { format, shape, attrs } = driven;
        let heard = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&heard);
        let builder = Space::builder().page_size(shape.granule()).map_err(failed("a space", 0))?.private_reclaim();
        let hear = move |range: GpaRange| sink.lock().unwrap_or_else(PoisonError::into_inner).push(range);
        let space = builder.dirty_sink(hear).build();
        let ages_by_rights = ages_by_rights(&format, attrs);
        let caches = Caches::new(goes_by_hints(&format, attrs), hardware);
        let table = Table::new(&space, format, Arc::new(pages), caches.clone());
        let table = table.map_err(|error| error.of("a table", 0))?;
        caches.hardware.begin(table.root()).map_err(|source| Wrong::Hardware { at: 0, source })?;
        let subscription = Some(space.subscribe(Arc::clone(&table)).map_err(failed("subscribe", 0))?);
        let walker = space.walker();
        let [written, told, armed, open] = [(); 4].map(|()| Bytes::default());
        Ok(Self {
            shape,
            attrs,
            ages_by_rights,
            subscription,
            table,
            caches,
            walker,
            space,
            heard,
            written,
            told,
            armed,
            open,
        })
    }

    /// The table.
    pub fn table(&self) -> &Table<F, ScarcePages<P>, Caches<H>> {
        &self.table
    }

    /// Where its pages come from.
    pub fn pages(&self) -> &ScarcePages<P> {
        self.table.pages()
    }

    /// What walks it.
    pub fn hardware(&self) -> &H {
        &self.caches.hardware
    }

    /// What the model knows of the format.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Leaves that have a byte in `start..end`, ascending, each with where it begins, as the model writes them. `end` is at
    /// most what the shape's address bits reach. Every raw entry that spans one of these bytes is checked.
    ///
    /// # Errors
    /// [`Wrong`] where an entry or a leaf is impossible.
    pub fn leaves(&self, start: u64, end: u64) -> Result<Vec<(u64, Leaf)>, DriveError> {
        let format = self.table.format();
        let mut leaves = Vec::new();
        let mut wrong = None;
        let mut known = Known::default();
        self.table.visit(range(start, end.saturating_sub(start))?, |found| {
            if wrong.is_some() {
                return;
            }
            let claim = if matches!(found.kind, Kind::Table(_) | Kind::Leaf) { format.claim_bit() } else { 0 };
            if let Err(source) = format.check(found.level, found.raw & !claim) {
                wrong = Some(Wrong::Entry { at: found.start, source });
            } else if found.kind == Kind::Leaf {
                match self.leaf_of(&mut known, found.level, found.start.as_u64(), found.span, found.raw) {
                    Ok(leaf) => leaves.push(leaf),
                    Err(error) => wrong = Some(error),
                }
            }
        });
        match wrong {
            Some(error) => Err(error.into()),
            None => Ok(leaves),
        }
    }

    fn leaf(&self, level: Level, start: u64, size: u64, raw: u64) -> Result<(u64, Leaf), Wrong> {
        self.leaf_of(&mut Known::default(), level, start, size, raw)
    }

    fn leaf_of(
        &self,
        known: &mut Known<F::Attrs>,
        level: Level,
        start: u64,
        size: u64,
        raw: u64,
    ) -> Result<(u64, Leaf), Wrong> {
        let format = self.table.format();
        let LeafSpec { output, access, armed, accessed, dirty, attrs } = format.spec(level, raw);
        let end = start + size;
        let mem = match known.mem {
            Some((known, mem)) if known == attrs => mem,
            _ => {
                let mem = MemType::ALL.into_iter().find(|mem| (self.attrs)(*mem) == Some(attrs));
                mem.ok_or(Wrong::Attributes { at: start, raw })?
            }
        };
        known.mem = Some((attrs, mem));
        let logging = if known.armed.overlaps(&self.armed, start, end) {
            Logging::Armed
        } else if known.open.overlaps(&self.open, start, end) {
            Logging::Open
        } else {
            Logging::Off
        };
        let withheld = armed && access.writable();
        // What ageing withheld comes back with the first access.
        let by_age = self.ages_by_rights && !accessed && logging != Logging::Armed;
        if withheld != (access.writable() && logging == Logging::Armed) && !by_age {
            return Err(Wrong::Withheld { at: start, raw, withheld, logging });
        }
        let dirty = (dirty && self.shape.hw_dirty()) || known.written.overlaps(&self.written, start, end);
        Ok((start, Leaf { size, out: output.as_u64(), access: model_access(access), mem, accessed, dirty, logging }))
    }

    /// Facts that the sink heard since this was last asked, which become part of what is known to be written.
    fn listen(&mut self) {
        for range in std::mem::take(&mut *self.heard.lock().unwrap_or_else(PoisonError::into_inner)) {
            let (start, end) = (range.start().as_u64(), range.end().as_u64());
            self.told.insert(start, end);
            if self.shape.hw_dirty() {
                self.written.insert(start, end);
            }
        }
    }

    /// Whether the sink has said that a byte of `start..end` was written, since it was last harvested or forgotten.
    pub fn was_reported(&mut self, start: u64, end: u64) -> bool {
        self.listen();
        self.told.overlaps(start, end)
    }

    /// What is no longer mapped has no logging, and its facts are the caller's.
    pub fn forget(&mut self, start: u64, end: u64) {
        self.listen();
        for bytes in [&mut self.written, &mut self.told, &mut self.armed, &mut self.open] {
            bytes.remove(start, end);
        }
    }

    /// Forgets all that is not among these leaves.
    pub(crate) fn forget_all_but(&mut self, leaves: &[(u64, Leaf)]) {
        self.listen();
        let mut mapped = Bytes::default();
        leaves.iter().for_each(|(start, leaf)| mapped.insert(*start, start + leaf.size));
        for bytes in [&mut self.written, &mut self.told, &mut self.armed, &mut self.open] {
            bytes.keep(&mapped);
        }
    }

    fn expresses(&self, rights: Access, attrs: F::Attrs) -> Result<(), FormatError> {
        let spec =
            LeafSpec { output: OutputAddr::new(0), access: rights, armed: false, accessed: true, dirty: false, attrs };
        self.table.format().leaf(Level::LEAF, &spec).map(drop)
    }

    /// Carries `op` out. Facts of what it removed are kept until [`Driver::forget`].
    ///
    /// # Errors
    /// [`DriveError`]. Where the table wants for pages some operations fail, others do more than they were asked to (a
    /// window takes a larger leaf whole that it cannot split).
    pub fn apply(&mut self, op: &Op) -> Result<Outcome, DriveError> {
        op.check(&self.shape)?;
        let outcome = match *op {
            Op::Map { gpa, out, size, access: rights, page, mem } => self.map(gpa, out, size, rights, page, mem),
            Op::Unmap { gpa, size } => match self.table.unmap(range(gpa, size)?) {
                Ok(_) => Ok(Outcome::Ok),
                Err(error) => Err(error.of("unmap", gpa)),
            },
            Op::Protect { gpa, size, access: rights } => self.protect(gpa, size, access(rights)),
            Op::WriteProtect { gpa, size } => self.write_protect(gpa, size),
            Op::Touch { gpa, kind } => self.touch(gpa, kind),
            Op::Age { gpa, size } => match self.table.age(range(gpa, size)?) {
                Ok(young) => Ok(Outcome::Aged { young }),
                Err(error) => Err(error.of("age", gpa)),
            },
            Op::Dirty { gpa, size } => self.harvest(gpa, size),
            Op::Change { gpa, out } => self.change(gpa, Some(out)),
            Op::ZapChange { gpa, .. } => self.change(gpa, None),
            Op::Split { gpa, size } => match self.table.split(range(gpa, size)?) {
                Ok(()) => Ok(Outcome::Ok),
                Err(error) => Err(error.of("split", gpa)),
            },
            Op::Collapse { gpa, size } => self.collapse(gpa, size),
            Op::Walk { gpa } => {
                let found = self.table.entry(Gpa::new(gpa)).filter(|found| found.kind == Kind::Leaf);
                let leaf = found.map(|found| self.leaf(found.level, found.start.as_u64(), found.span, found.raw));
                Ok(Outcome::Walk { leaf: leaf.transpose()? })
            }
        };
        self.listen();
        outcome
    }

    /// Start and size of leaves, without a look at logging.
    fn spans(&self, start: u64, end: u64) -> Result<Vec<(u64, u64)>, DriveError> {
        let mut leaves = Vec::new();
        self.table.visit(range(start, end - start)?, |found| {
            if found.kind == Kind::Leaf {
                leaves.push((found.start.as_u64(), found.span));
            }
        });
        Ok(leaves)
    }

    fn cut(&self, gpa: u64, size: u64) -> Result<(), DriveError> {
        for at in [gpa, gpa + size] {
            self.table.split_at(Gpa::new(at)).map_err(|error| error.of("split_at", at))?;
        }
        Ok(())
    }

    fn arm(&self, start: u64, len: u64) -> Result<(), DriveError> {
        self.table.arm(range(start, len)?).map(drop).map_err(|error| error.of("arm", start))
    }

    /// A fault that resolves to `extent`.
    fn install(
        &mut self,
        extent: Extent,
        options: MapOptions<F::Attrs>,
    ) -> Result<Result<Mapped, MapError>, DriveError> {
        let gpa = extent.guest.start().as_u64();
        let fault = self.walker.fault(extent.guest).map_err(failed("a fault", gpa))?;
        let resolved = fault.resolve(|_| Ok::<_, Reject>(extent)).map_err(failed("resolve", gpa))?;
        Ok(resolved.install(|admission| self.table.map(admission, &options)))
    }

    /// Refusals in the order present, page, rights, memory type.
    fn map(
        &mut self,
        gpa: u64,
        out: u64,
        size: u64,
        rights: spte_model::Access,
        page: PageChoice,
        mem: MemType,
    ) -> Result<Outcome, DriveError> {
        let extent = Extent { guest: range(gpa, size)?, output: OutputAddr::new(out), access: Access::RWX };
        if let Some(&(start, _)) = self.spans(gpa, gpa + size)?.first() {
            let present = start.max(gpa);
            let named = match self.install(extent, MapOptions::default().only_absent(true))? {
                Err(MapError::Present { at }) => Some(at.as_u64()),
                Err(error) => return Err(error.of("map", gpa)),
                Ok(_) => None,
            };
            if named != Some(present) {
                return Err(Wrong::PresentPassed { present, named }.into());
            }
            return Ok(Outcome::RefusedPresent { gpa: present });
        }
        let largest = match page {
            PageChoice::Granule => self.shape.granule(),
            PageChoice::Max => u64::MAX,
            PageChoice::Size(page) => {
                if !self.shape.leaf_sizes().contains(&page) || (gpa | out | size) % page != 0 {
                    return Ok(Outcome::RefusedPage);
                }
                page
            }
        };
        let Some(any) = (self.attrs)(MemType::Wb) else { return Ok(Outcome::RefusedMem) };
        if self.expresses(access(rights), any).is_err() {
            return Ok(Outcome::RefusedPerm);
        }
        let Some(attrs) = (self.attrs)(mem) else { return Ok(Outcome::RefusedMem) };
        if self.expresses(access(rights), attrs).is_err() {
            return Ok(Outcome::RefusedMem);
        }
        let options = MapOptions::default().access(access(rights)).attrs(attrs).largest(largest).only_absent(true);
        match self.install(extent, options)? {
            Ok(_) => Ok(Outcome::Ok),
            Err(error) => Err(error.of("map", gpa)),
        }
    }

    /// The rights are the caller's to give: every leaf is resolved to where it points already.
    fn protect(&mut self, gpa: u64, size: u64, rights: Access) -> Result<Outcome, DriveError> {
        let Some(any) = (self.attrs)(MemType::Wb) else { return Ok(Outcome::RefusedMem) };
        if self.expresses(rights, any).is_err() {
            return Ok(Outcome::RefusedPerm);
        }
        self.cut(gpa, size)?;
        let table = &self.table;
        let whole = range(gpa, size)?;
        let fault = self.walker.fault(whole).map_err(failed("a fault", gpa))?;
        let resolved = fault.resolve(|fault| {
            let mut extents: Vec<Extent> = Vec::new();
            table.visit(fault.range(), |found| {
                if let (Kind::Leaf, Ok(guest)) = (found.kind, AddrRange::with_len(found.start, found.span)) {
                    let output = table.format().spec(found.level, found.raw).output;
                    // A VMM knows stretches, not leaves.
                    match extents.last_mut() {
                        Some(last)
                            if last.guest.end() == guest.start()
                                && last.output.as_u64() + last.guest.len() == output.as_u64() =>
                        {
                            last.guest = last.guest.joined(&guest).unwrap_or(last.guest);
                        }
                        _ => extents.push(Extent { guest, output, access: rights }),
                    }
                }
            });
            Ok::<_, Reject>(extents)
        });
        let protect = |admission: &Admission<'_>| table.protect(admission, whole, rights);
        let resolved = resolved.map_err(failed("resolve", gpa))?;
        resolved.install(protect).map_err(|error| error.of("protect", gpa))?;
        // Rights that come back must not go round the log.
        for (start, end) in self.armed.within(gpa, gpa + size) {
            self.arm(start, end - start)?;
        }
        Ok(Outcome::Ok)
    }

    fn write_protect(&mut self, gpa: u64, size: u64) -> Result<Outcome, DriveError> {
        self.cut(gpa, size)?;
        self.arm(gpa, size)?;
        // Only what is mapped now is logged.
        for (start, leaf) in self.spans(gpa, gpa + size)? {
            self.armed.insert(start, start + leaf);
            self.open.remove(start, start + leaf);
        }
        Ok(Outcome::Ok)
    }

    /// What a vCPU does, and the fault handler after it.
    fn touch(&mut self, gpa: u64, kind: TouchKind) -> Result<Outcome, DriveError> {
        let table = Arc::clone(&self.table);
        // At most one upgrade: what is still withheld after it is an error, not a reason to go on for ever.
        let mut upgraded = false;
        let old = self.ages_by_rights && self.is_old(gpa);
        loop {
            let found = self.caches.hardware.access(&table, &mut self.walker, Gpa::new(gpa), kind);
            let refusal = match found.map_err(|source| Wrong::Hardware { at: gpa, source })? {
                Ok(_) if old => return Err(Wrong::OldAllowed { at: gpa }.into()),
                Ok((output, access)) => {
                    self.cache(gpa, output, access, kind == TouchKind::Write && self.shape.hw_dirty());
                    return Ok(Outcome::Touched { out: output.as_u64() });
                }
                Err(refusal) => refusal,
            };
            if old {
                // Looked at before the rights: hardware has none of them to look at.
                self.rejuvenate(gpa)?;
                return Ok(Outcome::Fault(Fault::AccessFlag));
            }
            match refusal {
                Refusal::Absent => return Ok(Outcome::Fault(Fault::Absent)),
                Refusal::Denied { armed: false } => return Ok(Outcome::Fault(Fault::Perm)),
                Refusal::Denied { armed: true } => {
                    let found = table.upgrade(Gpa::new(gpa));
                    if found != Upgrade::Granted || upgraded {
                        return Err(Wrong::NotUpgraded { at: gpa, found }.into());
                    }
                    upgraded = true;
                    let leaf = table.entry(Gpa::new(gpa)).ok_or(Wrong::NotUpgraded { at: gpa, found })?;
                    let (start, end) = (leaf.start.as_u64(), leaf.start.as_u64() + leaf.span);
                    if !self.armed.overlaps(start, end) {
                        return Err(Wrong::ArmedUnasked { at: gpa }.into());
                    }
                    self.armed.remove(start, end);
                    self.open.insert(start, end);
                    if !self.shape.hw_dirty() {
                        self.written.insert(start, end);
                    }
                }
                Refusal::Old if table.make_young(Gpa::new(gpa)) => return Ok(Outcome::Fault(Fault::AccessFlag)),
                Refusal::Old => return Err(Wrong::StaysOld { at: gpa }.into()),
            }
        }
    }

    /// Whether the leaf at `gpa` is old.
    fn is_old(&self, gpa: u64) -> bool {
        let found = self.table.entry(Gpa::new(gpa)).filter(|found| found.kind == Kind::Leaf);
        found.is_some_and(|found| !self.table.format().is_young(found.level, found.raw))
    }

    /// Makes the leaf at `gpa` young, where ageing took rights away: they come back, writing unless it is logged.
    fn rejuvenate(&self, gpa: u64) -> Result<(), DriveError> {
        let at = Gpa::new(gpa);
        if !self.table.make_young(at) {
            return Err(Wrong::StaysOld { at: gpa }.into());
        }
        let Some(found) = self.table.entry(at) else { return Err(Wrong::StaysOld { at: gpa }.into()) };
        let logged = self.armed.overlaps(found.start.as_u64(), found.start.as_u64() + found.span);
        if self.table.format().spec(found.level, found.raw).armed && !logged {
            let found = self.table.upgrade(at);
            if found != Upgrade::Granted {
                return Err(Wrong::NotUpgraded { at: gpa, found }.into());
            }
        }
        Ok(())
    }

    /// What hardware keeps of a walk.
    fn cache(&self, gpa: u64, output: OutputAddr, access: Access, dirty: bool) {
        let mut entries = self.caches.tlb.entries();
        for row in self.table.walk(Gpa::new(gpa)) {
            let (level, start, span) = (row.level, row.start.as_u64(), row.span);
            match row.kind {
                Kind::Table(table) => entries.keep_link(level, start, span, table),
                Kind::Leaf => {
                    let offset = gpa % self.shape.granule();
                    let output = OutputAddr::new(output.as_u64() - offset);
                    entries.keep_page(gpa - offset, Cached { output, access, dirty, level, start, span });
                }
                _ => {}
            }
        }
    }

    /// Compares what hardware kept with what the table says: it may know less, and older facts, but nothing else.
    ///
    /// # Errors
    /// [`Wrong`], where a flush is missing or named too little.
    pub fn check_cached(&self) -> Result<(), Wrong> {
        let format = self.table.format();
        let entries = self.caches.tlb.entries();
        for (&page, &Cached { output, access, dirty, start, span, .. }) in &entries.pages {
            let stale = Wrong::Stale { page, output, access, start, span };
            let found = self.table.entry(Gpa::new(page)).filter(|found| found.kind == Kind::Leaf);
            let Some(found) = found else { return Err(stale) };
            let now = format.spec(found.level, found.raw).output.as_u64() + (page - found.start.as_u64());
            let (start, end) = (found.start.as_u64(), found.start.as_u64() + found.span);
            // Hardware may go on as if an old leaf were young: what ageing alone withholds counts as granted.
            let old = !format.is_young(found.level, found.raw);
            let by_age = self.ages_by_rights && old && !self.armed.overlaps(start, end);
            let spec = format.spec(found.level, found.raw);
            let granted = if spec.armed && !by_age { spec.access.read_only() } else { spec.access };
            if now != output.as_u64() || !granted.contains(access) {
                return Err(stale);
            }
            if dirty && !format.is_dirty(found.level, found.raw) && !self.written.overlaps(start, end) {
                return Err(Wrong::StaleDirty { page });
            }
        }
        for (&(level, start), &(span, table)) in &entries.links {
            let rows = self.table.walk(Gpa::new(start));
            if !rows.iter().any(|row| row.level == level && row.kind == Kind::Table(table)) {
                return Err(Wrong::StaleLink { start, span, table });
            }
        }
        Ok(())
    }

    fn harvest(&mut self, gpa: u64, size: u64) -> Result<Outcome, DriveError> {
        self.listen();
        let harvested = if self.shape.hw_dirty() {
            self.table.harvest_dirty(range(gpa, size)?).map_err(|error| error.of("harvest_dirty", gpa))?
        } else {
            Vec::new()
        };
        let mut rows = Vec::new();
        let mut of_table = harvested.iter().peekable();
        for (start, size) in self.spans(gpa, gpa + size)? {
            let end = start + size;
            let span = range(start, size)?;
            let in_table = of_table.next_if(|found| **found == span).is_some();
            if in_table || self.written.overlaps(start, end) {
                rows.push((start, size));
                self.written.remove(start, end);
                self.told.remove(start, end);
            }
            if self.open.overlaps(start, end) {
                self.open.remove(start, end);
                self.armed.insert(start, end);
                self.arm(start, size)?;
            }
        }
        match of_table.next() {
            Some(&range) => Err(Wrong::NoLeafHarvested { range }.into()),
            None => Ok(Outcome::Dirty { rows }),
        }
    }

    fn change(&mut self, gpa: u64, out: Option<u64>) -> Result<Outcome, DriveError> {
        let page = Gpa::new(gpa);
        let present = self.table.entry(page).filter(|found| found.kind == Kind::Leaf);
        let current = present.map_or(0, |found| {
            let spec = self.table.format().spec(found.level, found.raw);
            spec.output.as_u64() + (gpa - found.start.as_u64())
        });
        let granule = self.shape.granule();
        let guard = self.space.retain(range(gpa, granule)?).map_err(failed("retain", gpa))?;
        let change = match out {
            Some(out) => Change { page, expected: OutputAddr::new(current), new: OutputAddr::new(out) },
            None => Change { page, expected: OutputAddr::new(current ^ granule), new: OutputAddr::new(0) },
        };
        let done = guard.change_pte(&[change]).map_err(failed("change_pte", gpa))?;
        guard.close().map_err(failed("close", gpa))?;
        match done.first().map(|page| page.outcome) {
            Some(PageOutcome::Changed) => Ok(Outcome::Changed),
            Some(PageOutcome::Absent) => Ok(Outcome::Absent),
            Some(PageOutcome::Zapped) => Ok(Outcome::Zapped),
            None => Err(Wrong::Unreported { at: gpa }.into()),
        }
    }

    /// Stretches of equal logging are merged each for itself: a leaf is logged or not.
    fn collapse(&mut self, gpa: u64, size: u64) -> Result<Outcome, DriveError> {
        let end = gpa + size;
        let young = self.make_all_young(gpa, end)?;
        let mut bounds = vec![gpa, end];
        for bytes in [&self.armed, &self.open] {
            bounds.extend(bytes.within(gpa, end).into_iter().flat_map(|(from, to)| [from, to]));
        }
        bounds.sort_unstable();
        bounds.dedup();
        for pair in bounds.windows(2) {
            let part = range(pair[0], pair[1] - pair[0])?;
            let table = &self.table;
            let merged = self.space.admit(part, |admission| table.collapse(admission, part));
            let merged = merged.map_err(failed("admit", pair[0]))?;
            merged.map_err(|error| error.of("collapse", pair[0]))?;
        }
        self.listen();
        for (start, size) in self.spans(gpa, end)? {
            for bytes in [&mut self.written, &mut self.told] {
                if bytes.overlaps(start, start + size) {
                    bytes.insert(start, start + size);
                }
            }
            // What was old in all its parts is old again.
            if self.ages_by_rights && start >= gpa && start + size <= end && !young.overlaps(start, start + size) {
                self.table.age(range(start, size)?).map_err(|error| error.of("age", start))?;
            }
        }
        Ok(Outcome::Ok)
    }

    /// Where ageing takes rights away, leaves of different age are not alike: they are made so before they are merged.
    /// What was young before.
    fn make_all_young(&self, gpa: u64, end: u64) -> Result<Bytes, DriveError> {
        let mut young = Bytes::default();
        if self.ages_by_rights {
            for (start, size) in self.spans(gpa, end)? {
                if !self.is_old(start) {
                    young.insert(start, start + size);
                } else if start >= gpa && start + size <= end {
                    self.rejuvenate(start)?;
                }
            }
        }
        Ok(young)
    }
}

impl<F: Format, P: PageSource, H: Hardware<F>> Drop for Driver<F, P, H> {
    fn drop(&mut self) {
        drop(self.subscription.take());
    }
}
