// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table: its root, its nodes, and how operations move through it.
//!
//! # Lock protocol
//! There are no locks. What operations agree on:
//!
//! 1. **Reading.** Whoever looks at a table page is pinned (crossbeam-epoch). Links are read with acquire; the page behind
//!    a link was filled before the link was published.
//! 2. **Adding** (an entry, a right, a table with leaves in it) claims the entry, asks the admission, publishes or gives
//!    back. Nothing that waits happens in between, but for one flush of the hardware where a format must break before it
//!    makes: nobody that a flush waits for waits for claims.
//! 3. **Taking away** is one compare-exchange by whoever does it, after its batch has published that it owes a flush.
//! 4. **Waiting.** A claimed entry is waited for, at every level, by every walk that takes away, changes or adds. Walks of
//!    software walkers inside scopes never wait: a flush waits for them. Claims are taken from the top down, and from low
//!    addresses to high, and whoever holds one waits only for claims below or to the right of it: no two wait for each
//!    other.
//! 5. **DEAD** entries are in a table that is no longer linked. Whoever meets one starts again from the root.
//! 6. **Unlinking** a table claims its parent entry, makes every child entry DEAD (waiting out claims), takes the link
//!    away, flushes, and only then hands the page to the epoch. So nothing is published into an unlinked table: an
//!    installer's claim was waited out, or its compare-exchange finds DEAD.

use alloc::{sync::Arc, vec::Vec};
use core::{fmt, ptr::NonNull, slice};

use notifier_core::primitive::{Backoff, Pin, SetOnce, Twin, broken, caught};
use notifier_core::{AddrRange, Gpa, GpaRange, Membership, OutputAddr, Space};

use crate::{
    batch::{FlushFailed, Owed, Unlinked},
    entry::{Cell, Entry, View, view},
    flush::{Flush, FlushError, FlushRange, FlushRequest},
    format::{Format, FormatError, Geometry, Kind, Level, MAX_LEVELS},
    pages::{OutOfPages, PageSource, TableLayout},
};

/// Why a table could not be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableError {
    /// No page for the root.
    #[error(transparent)]
    OutOfPages(#[from] OutOfPages),
    /// The format's smallest page is larger than the space's pages, or does not divide them.
    #[error("the format's smallest page of {leaf:#x} bytes does not divide the space's pages of {page:#x} bytes")]
    PageSize {
        /// Bytes of the format's smallest page.
        leaf: u64,
        /// Bytes of the space's pages.
        page: u64,
    },
}

/// A range that an operation cannot take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TableRangeError {
    /// A bound is no multiple of the smallest page.
    #[error("{range} is not aligned to pages of {leaf:#x} bytes")]
    Unaligned {
        /// The range.
        range: GpaRange,
        /// Bytes of the smallest page.
        leaf: u64,
    },
    /// The table does not translate so far.
    #[error("{range} leaves the {bits} address bits of the table")]
    TooWide {
        /// The range.
        range: GpaRange,
        /// Bits that the table translates.
        bits: u32,
    },
}

/// A concurrent radix table in the format `F`, its pages from `P`, its flushes by `X`.
///
/// Made for a [`Space`], and part of it once it has [subscribed](Space::subscribe): before that, and after it left, it
/// maps nothing. All operations take `&self` and may run at the same time, from any threads.
///
/// - Operations that add (map, raise rights, collapse) take an [`Admission`](notifier_core::Admission), which only a fault
///   lends: see [`Table::map`], [`Table::protect`], [`Table::collapse`].
/// - Operations that take away need nothing: [`Table::unmap`], [`Table::restrict`], [`Table::arm`]. They flush, and wait
///   for the scopes of software walkers, before they return.
/// - [`Table::translate`] is a walk in software, inside a [`Scope`](notifier_core::Scope).
pub struct Table<F: Format, P: PageSource, X: Flush> {
    pub(crate) space: Space,
    pub(crate) format: F,
    /// The format's, as it was when the table was made: pages are as large as this says.
    geometry: Geometry,
    pub(crate) pages: Arc<P>,
    flush: X,
    root: OutputAddr,
    pub(crate) owed: Owed,
    /// Its place in the space, once it has joined.
    membership: SetOnce<Membership>,
}

impl<F: Format, P: PageSource, X: Flush> fmt::Debug for Table<F, P, X> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Table").field("format", &self.format.name()).field("root", &self.root).finish_non_exhaustive()
    }
}

/// A table page in its place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Node<'p> {
    entries: &'p [Entry],
    mirror: Option<&'p [Entry]>,
    pub(crate) level: Level,
    /// First guest address it spans.
    base: u64,
    /// log2 of the bytes one of its entries spans.
    shift: u8,
}

impl<'p> Node<'p> {
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// First guest address it spans.
    pub(crate) fn start(&self) -> u64 {
        self.base
    }

    pub(crate) fn cell(&self, index: usize) -> Cell<'p> {
        let span = 1 << self.shift;
        Cell {
            own: &self.entries[index],
            mirror: self.mirror.map(|mirror| &mirror[index]),
            level: self.level,
            start: self.base + index as u64 * span,
            span,
        }
    }

    pub(crate) fn cells(self) -> impl DoubleEndedIterator<Item = Cell<'p>> + ExactSizeIterator {
        (0..self.len()).map(move |index| self.cell(index))
    }

    /// The cell for an address inside this node.
    pub(crate) fn cell_at(&self, addr: u64) -> Cell<'p> {
        self.cell(((addr - self.base) >> self.shift) as usize & (self.len() - 1))
    }

    pub(crate) fn holds(&self, addr: u64) -> bool {
        addr.checked_sub(self.base).is_some_and(|offset| offset >> self.shift < self.len() as u64)
    }
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// An empty table for `space`. It maps nothing until it has [subscribed](Space::subscribe).
    ///
    /// # Errors
    /// [`TableError`].
    pub fn new(space: &Space, format: F, pages: Arc<P>, flush: X) -> Result<Arc<Self>, TableError> {
        let geometry = *format.geometry();
        let (leaf, page) = (geometry.span(Level::LEAF), space.page_size());
        if page % leaf != 0 {
            return Err(TableError::PageSize { leaf, page });
        }
        let root = pages
            .alloc(layout(&geometry, geometry.top()), format.memory_of(format.not_present(geometry.top()).absent))?;
        Ok(Arc::new(Self {
            space: space.clone(),
            format,
            geometry,
            pages,
            flush,
            root,
            owed: Owed::default(),
            membership: SetOnce::default(),
        }))
    }

    /// The space the table belongs to.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// The format.
    pub fn format(&self) -> &F {
        &self.format
    }

    /// Where the pages come from.
    pub fn pages(&self) -> &P {
        &self.pages
    }

    /// Who carries flushes out: a place to tell it, after the table was made, where its root is.
    pub fn flusher(&self) -> &X {
        &self.flush
    }

    /// Output address of the root page: what a register or a device is told.
    ///
    /// Whoever told it something takes that back, and sees walks end, before the table is dropped: dropping frees the root, and
    /// whatever tables are still linked, with no flush.
    pub fn root(&self) -> OutputAddr {
        self.root
    }

    /// The shape of the table.
    #[inline]
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// Bytes of the smallest page.
    pub fn granule(&self) -> u64 {
        self.geometry().span(Level::LEAF)
    }

    /// Its place in the space, while it has one.
    pub(crate) fn membership(&self) -> Option<&Membership> {
        self.membership.get().filter(|membership| membership.is_live())
    }

    /// Takes its place in the space. `false`: it has, or had, one already.
    pub(crate) fn join(&self, membership: Membership) -> bool {
        self.membership.set(membership)
    }

    // ---- ranges ----

    /// Checks that an operation can take `range`.
    pub(crate) fn check_range(&self, range: GpaRange) -> Result<(), TableRangeError> {
        let leaf = self.granule();
        if !range.is_aligned(leaf) {
            return Err(TableRangeError::Unaligned { range, leaf });
        }
        let bits = self.geometry().address_bits();
        if range.end().as_u64() > 1 << bits {
            return Err(TableRangeError::TooWide { range, bits });
        }
        Ok(())
    }

    /// The part of `range` that the table can translate, in whole pages: every page that is touched counts.
    pub(crate) fn clip(&self, range: GpaRange) -> Option<GpaRange> {
        let limit = AddrRange::new(Gpa::new(0), Gpa::new(1 << self.geometry().address_bits())).ok()?;
        range.align_out(self.granule()).intersection(&limit)
    }

    /// All that the table translates.
    pub(crate) fn whole(&self) -> Option<GpaRange> {
        AddrRange::new(Gpa::new(0), Gpa::new(1 << self.geometry().address_bits())).ok()
    }

    // ---- nodes ----

    pub(crate) fn layout(&self, level: Level) -> TableLayout {
        layout(self.geometry(), level)
    }

    /// The node behind a link.
    ///
    /// # Safety
    /// `page` is a page of this table for `level`, which stays allocated while `'p` lasts: it was read from a link while
    /// pinned, and the pin outlives `'p`; or it was never linked and is the caller's own.
    pub(crate) unsafe fn node<'p>(&self, page: OutputAddr, level: Level, base: u64) -> Node<'p> {
        let layout = self.layout(level);
        // SAFETY: the caller says that the page is allocated with this level's layout.
        let (entries, mirror) = unsafe { (self.pages.entries(page, layout), self.pages.mirror(page, layout)) };
        // SAFETY: the page source promises `layout.entries()` initialised entries for as long as the page is allocated,
        // which the caller says covers 'p. Entries are atomics: shared references are all that anybody has.
        let slice_of = |entries: NonNull<Entry>| unsafe { slice::from_raw_parts(entries.as_ptr(), layout.entries()) };
        let shift = self.geometry().level(level).shift;
        Node { entries: slice_of(entries), mirror: mirror.map(slice_of), level, base, shift }
    }

    pub(crate) fn root_node<'p>(&self, _pin: &'p Pin) -> Node<'p>
    where
        Self: 'p,
    {
        // SAFETY: the root lives as long as the table. (A node does not outlive the call that made it.)
        unsafe { self.node(self.root, self.geometry().top(), 0) }
    }

    /// The node that `cell` links to.
    pub(crate) fn child<'p>(&self, _pin: &'p Pin, cell: &Cell<'p>, page: OutputAddr) -> Option<Node<'p>> {
        // SAFETY: `page` was read from a kept link while pinned: the engine alone writes those, and it frees what
        // they link to only after they are gone and everybody who was pinned then has unpinned.
        cell.level.below().map(|level| unsafe { self.node(page, level, cell.start) })
    }

    /// The node that `cell`, whose value is `raw`, links to, if it is a link.
    pub(crate) fn linked<'p>(&self, pin: &'p Pin, cell: &Cell<'p>, raw: u64) -> Option<Node<'p>> {
        match self.format.kind(cell.level, raw) {
            Kind::Table(page) => self.child(pin, cell, page),
            _ => None,
        }
    }

    /// A page of one's own, not linked anywhere.
    pub(crate) fn private(&self, level: Level) -> Result<Private<'_, F, P, X>, OutOfPages> {
        Ok(Private { table: self, pages: alloc::vec![(self.alloc(level)?, level)] })
    }

    /// A page for a table of `level`. Where there is none, pages that were unlinked, here or elsewhere, may come back by asking.
    /// No claim is held.
    fn alloc(&self, level: Level) -> Result<OutputAddr, OutOfPages> {
        let alloc =
            || self.pages.alloc(self.layout(level), self.format.memory_of(self.format.not_present(level).absent));
        alloc().or_else(|_| {
            self.space.collect();
            alloc()
        })
    }

    // ---- flushing ----

    /// Asks the hardware, then waits for the scopes of software walkers.
    pub(crate) fn flush_now(&self, ranges: &[FlushRange], all: bool, nonblocking: bool) -> Result<(), FlushFailed> {
        self.flush_hardware(ranges, all, nonblocking)?;
        self.space.wait_for_scopes(nonblocking)?;
        Ok(())
    }

    /// Asks the hardware alone. Claims may be held across this: a panic does not pass them.
    pub(crate) fn flush_hardware(
        &self,
        ranges: &[FlushRange],
        all: bool,
        nonblocking: bool,
    ) -> Result<(), FlushFailed> {
        let request = FlushRequest { ranges: if all { &[] } else { ranges }, all, nonblocking };
        caught(|| self.flush.flush(&request)).unwrap_or(Err(FlushError::Panicked)).map_err(FlushFailed::from)
    }

    /// Frees unlinked and flushed pages once nobody can be looking at them.
    pub(crate) fn retire(&self, pages: Vec<Unlinked>) {
        if pages.is_empty() {
            return;
        }
        let source = Arc::clone(&self.pages);
        let geometry = *self.geometry();
        self.space.retire(pages.len(), move || {
            for Unlinked { page, level, .. } in pages {
                // SAFETY: unlinked by this engine, which got it from this source with this layout; flushed; and everybody
                // who was pinned when it was unlinked has unpinned.
                unsafe { source.free(page, layout(&geometry, level)) };
            }
        });
    }

    /// A place to move through the table from `range.start()` to its end.
    pub(crate) fn cursor<'t, 'p>(&'t self, pin: &'p Pin, range: GpaRange) -> Cursor<'t, 'p, F, P, X> {
        Cursor { table: self, pin, node: None, at: range.start().as_u64(), end: range.end().as_u64() }
    }
}

fn layout(geometry: &Geometry, level: Level) -> TableLayout {
    TableLayout { bytes: geometry.table_bytes(level) }
}

impl<F: Format, P: PageSource, X: Flush> Drop for Table<F, P, X> {
    fn drop(&mut self) {
        for Unlinked { page, level, .. } in self.owed.take_limbo() {
            // SAFETY: unlinked; nobody walks a table that is being dropped.
            unsafe { self.pages.free(page, self.layout(level)) };
        }
        // Depth first, with the way down on a stack of fixed size.
        let geometry = *self.geometry();
        let mut path = [(self.root, 0usize); MAX_LEVELS];
        let mut depth = 0usize;
        let mut level = geometry.top();
        loop {
            let (page, index) = path[depth];
            if index == geometry.entries(level) {
                // SAFETY: nobody else has the table any more; its children are free already.
                unsafe { self.pages.free(page, layout(&geometry, level)) };
                let Some(up) = level.above().filter(|_| depth > 0) else { break };
                level = up;
                depth -= 1;
                continue;
            }
            path[depth].1 += 1;
            // SAFETY: linked, so not free; and nobody else is there to free it.
            let node = unsafe { self.node(page, level, 0) };
            let raw = self.format.raw_of(node.cell(index).own.load()) & !self.format.claim_bit();
            if let (View::Table(child), Some(below)) = (view(&self.format, level, raw), level.below()) {
                depth += 1;
                path[depth] = (child, 0);
                level = below;
            }
        }
        // What was unlinked before.
        self.space.collect();
    }
}

/// Pages that are not linked anywhere: dropped, they are free again.
#[derive(Debug)]
#[must_use = "private pages are freed unless they are linked"]
pub(crate) struct Private<'t, F: Format, P: PageSource, X: Flush> {
    table: &'t Table<F, P, X>,
    /// The first is the top one.
    pages: Vec<(OutputAddr, Level)>,
}

impl<F: Format, P: PageSource, X: Flush> Private<'_, F, P, X> {
    /// The top page.
    pub(crate) fn top(&self) -> OutputAddr {
        self.pages[0].0
    }

    /// The top page's node, if it spans from `base`. Good until `self` is dropped.
    pub(crate) fn detached_node<'n>(&self, base: u64) -> Node<'n>
    where
        Self: 'n,
    {
        let (page, level) = self.pages[0];
        // SAFETY: allocated for this level, and freed only when `self` is dropped without having been linked; users
        // of the node are done with it before that.
        unsafe { self.table.node(page, level, base) }
    }

    /// Adds a table below `cell`, a cell of these pages, and links it there. The node is good until `self` is dropped.
    pub(crate) fn grow<'n>(&mut self, cell: &Cell<'n>) -> Result<Node<'n>, PrivateError> {
        let Some(below) = cell.level.below() else {
            let number = self.table.format.level_number(cell.level);
            return Err(FormatError::NoLeaf { number }.into());
        };
        let table = self.table;
        let page = table.alloc(below)?;
        self.pages.push((page, below));
        fill(&table.format, cell, table.format.table(cell.level, page)?);
        // SAFETY: as for `detached_node`.
        Ok(unsafe { table.node(page, below, cell.start) })
    }

    /// The pages are linked: they belong to the table now.
    pub(crate) fn linked(mut self) {
        self.pages.clear();
    }
}

impl<F: Format, P: PageSource, X: Flush> Drop for Private<'_, F, P, X> {
    fn drop(&mut self) {
        for (page, level) in self.pages.drain(..) {
            // SAFETY: never linked.
            unsafe { self.table.pages.free(page, self.table.layout(level)) };
        }
    }
}

/// Why private pages could not be built.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum PrivateError {
    #[error(transparent)]
    OutOfPages(#[from] OutOfPages),
    #[error(transparent)]
    Format(#[from] FormatError),
}

/// Writes an entry of a page that is not linked yet.
pub(crate) fn fill<F: Format>(format: &F, cell: &Cell<'_>, raw: u64) {
    cell.own.store(format.memory_of(raw));
    if let Some(mirror) = cell.mirror {
        mirror.store(format.memory_of(raw));
    }
}

/// Where a walk that may wait is.
#[derive(Debug)]
pub(crate) struct Cursor<'t, 'p, F: Format, P: PageSource, X: Flush> {
    table: &'t Table<F, P, X>,
    pin: &'p Pin,
    /// The node of the last cell: the next is mostly in the same.
    node: Option<Node<'p>>,
    pub(crate) at: u64,
    pub(crate) end: u64,
}

impl<'p, F: Format, P: PageSource, X: Flush> Cursor<'_, 'p, F, P, X> {
    /// The lowest cell that spans the cursor's place and is no link, and its value; waits out claims. A link is returned
    /// instead of followed where `stop_at` says so. `None` at the end of the range.
    pub(crate) fn next(&mut self, stop_at: impl Fn(&Cell<'p>) -> bool) -> Option<(Cell<'p>, u64)> {
        if self.at >= self.end {
            return None;
        }
        let format = &self.table.format;
        let mut backoff = Backoff::new();
        loop {
            let mut node = match self.node {
                Some(node) if node.holds(self.at) => node,
                _ => self.table.root_node(self.pin),
            };
            // One way down; broken off when an entry turns out to be claimed or dead.
            loop {
                let cell = node.cell_at(self.at);
                let raw = cell.load(format);
                match view(format, cell.level, raw) {
                    View::Table(page) if !stop_at(&cell) => match self.table.child(self.pin, &cell, page) {
                        Some(child) => node = child,
                        None => return Some((cell, raw)),
                    },
                    // With a twin: a claim is passed over, as if nothing would come of it.
                    View::Claimed if !broken(Twin::ZapSkipsClaim) => {
                        self.node = Some(node);
                        backoff.snooze();
                        break;
                    }
                    View::Dead => {
                        // The parent of a dead entry is claimed, or links elsewhere by now.
                        self.node = None;
                        backoff.snooze();
                        break;
                    }
                    _ => {
                        self.node = Some(node);
                        return Some((cell, raw));
                    }
                }
            }
        }
    }

    /// Goes on behind `cell`.
    pub(crate) fn pass(&mut self, cell: &Cell<'p>) {
        self.at = cell.end();
    }

    /// Forgets where it was: the next cell is looked up from the root.
    pub(crate) fn restart(&mut self) {
        self.node = None;
    }

    /// Whether `cell` lies wholly inside what is left of the range.
    pub(crate) fn covers(&self, cell: &Cell<'_>) -> bool {
        self.at <= cell.start && cell.end() <= self.end
    }

    /// The part of `cell` inside the range.
    pub(crate) fn part(&self, cell: &Cell<'_>) -> Option<GpaRange> {
        AddrRange::new(Gpa::new(cell.start.max(self.at)), Gpa::new(cell.end().min(self.end))).ok()
    }
}
