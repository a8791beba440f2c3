// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest RAM: what is mapped where, and who may change it when.
//!
//! # Who may call at the same time
//! Everybody, for everything. Two things keep the layout (what this crate believes to be mapped) equal to what is mapped:
//!
//! 1. *Claims.* An operation claims the host ranges of its pages, all at once, before its first call, and gives them up
//!    when the layout says what the calls did. Operations over disjoint ranges run side by side; one that overlaps another
//!    waits for it. There is no queue: whoever finds its pages free has them, so that a large operation may wait for as
//!    long as small ones over parts of it keep coming. The lock that claims and layouts lie under is held for moments, and never across a call.
//! 2. *Order.* Windows are opened before pages are claimed, and nothing that may wait for somebody else (a window, a
//!    subscriber, a fault that a userfaultfd handler has to serve) happens while pages are claimed. So whoever waits for a
//!    claim waits for system calls alone. `privatize` and `populate`, which may wait for a fault, claim nothing: they
//!    change what the kernel has faulted in, not what is mapped.
//!
//! Windows do not do this: two Zapped windows may overlap, and one that retains may overlap one that zaps. What they
//! decide is who may *translate*; if two threads discard and replace the same page in two windows, one comes after
//! the other, and which is the callers' affair.
//!
//! One case is left to the user: with `UFFD_FEATURE_EVENT_UNMAP` or `EVENT_REMOVE` a call waits until the event is read.
//! The thread that reads must not change the same pages through this crate.

use std::{fs::File, io, os::fd::AsFd, sync::Arc};

use notifier_core::{
    Access, AddrRange, Gpa, GpaRange, Hva, HvaRange, InvalidationGuard, Key, SlotError, SlotFlags, SlotId, SlotSpec,
    Space, WindowAddress, WindowMode,
};
use parking_lot::{Condvar, Mutex};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, bitmap::Bitmap};

use crate::{
    batch::{Batch, RamError},
    budget::{BudgetError, Reservation, VmaBudget, gone},
    kernel::{Call, Kernel, Style},
    layout::{Layout, Piece, Place, Span},
};

/// `MAP_TYPE`, `MAP_PRIVATE`, `MAP_NORESERVE`, `MAP_HUGETLB` as vm-memory's flags have them.
const MAP_TYPE: u32 = linux_raw_sys::general::MAP_TYPE;
const MAP_PRIVATE: u32 = linux_raw_sys::general::MAP_PRIVATE;
const MAP_NORESERVE: u32 = linux_raw_sys::general::MAP_NORESERVE;
const MAP_HUGETLB: u32 = linux_raw_sys::general::MAP_HUGETLB;
const HUGETLBFS_MAGIC: u32 = linux_raw_sys::general::HUGETLBFS_MAGIC;

/// Why guest memory was not taken over. The space has none of its slots.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// A region's guest or host address, its length or its file offset is no multiple of the page size.
    #[error("the region at {start} is not aligned to pages of {page:#x} bytes")]
    Unaligned {
        /// Where the region begins.
        start: Gpa,
        /// Bytes of a host page.
        page: u64,
    },
    /// A region is shared and has no file: nothing could be given back to the host.
    #[error("the region at {start} is shared and anonymous; use a memfd")]
    SharedAnonymous {
        /// Where the region begins.
        start: Gpa,
    },
    /// A region is made of huge pages of hugetlbfs, of which parts can neither be discarded nor mapped over.
    #[error("the region at {start} is hugetlbfs memory")]
    HugeTlb {
        /// Where the region begins.
        start: Gpa,
    },
    /// Two regions are the same memory: a change of one would be a change of the other behind its back.
    #[error("the regions at {first} and {second} have memory in common")]
    Common {
        /// Where one region begins.
        first: Gpa,
        /// Where the other one begins.
        second: Gpa,
    },
    /// A region's file could not be looked at.
    #[error("the file of the region at {start}: {source}")]
    File {
        /// Where the region begins.
        start: Gpa,
        /// What the kernel said.
        source: io::Error,
    },
    /// A region's file is shorter than the region: accesses behind its end would be `SIGBUS`.
    #[error("the file of the region at {start} ends at {length:#x}, before the region does")]
    FileEnds {
        /// Where the region begins.
        start: Gpa,
        /// Bytes of the file.
        length: u64,
    },
    /// A region's file is one that memory is given back from (a shared one, or the guest's own by
    /// [`GuestRamBuilder::own_files`]), and holes cannot be punched into it: the descriptor is not open for writing, or
    /// the file is sealed against writing (`F_SEAL_WRITE`, `F_SEAL_FUTURE_WRITE`). `fallocate(2)`: `EBADF`, `EPERM`.
    #[error("the file of the region at {start} is to give memory back, and cannot be written to: {why}")]
    NotWritable {
        /// Where the region begins.
        start: Gpa,
        /// What keeps it from being written to.
        why: &'static str,
    },
    /// The process's mappings could not be counted.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// The slots could not be added.
    #[error(transparent)]
    Slots(#[from] notifier_core::SlotError),
}

/// Where the bytes of a guest page lie now.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Backing {
    /// Private memory of the process's own.
    Anonymous,
    /// The guest's file, shared: writes reach it.
    Shared {
        /// The file.
        file: Arc<File>,
        /// The page's offset in it, in bytes.
        offset: u64,
    },
    /// The guest's file, copied when it is written to.
    Private {
        /// The file.
        file: Arc<File>,
        /// The page's offset in it, in bytes.
        offset: u64,
    },
    /// A file that the page was repointed to, copied when it is written to.
    Replaced {
        /// The file.
        file: Arc<File>,
        /// The page's offset in it, in bytes.
        offset: u64,
    },
}

/// Bytes of a file to map in the place of guest memory.
///
/// They are mapped privately: a guest's writes go to a copy. The file may not be made shorter while it is mapped
/// (accesses would be `SIGBUS`), and nobody may write to mapped bytes that the guest is not to see changed.
#[derive(Debug, Clone)]
pub struct Source {
    pub(crate) file: Arc<File>,
    pub(crate) offset: u64,
    pub(crate) populate: bool,
}

impl Source {
    /// The bytes of `file` from `offset` on; a multiple of the page size. The same file is the same `Arc`.
    pub fn new(file: &Arc<File>, offset: u64) -> Self {
        Self { file: Arc::clone(file), offset, populate: false }
    }

    /// Fault the pages in for reading after they were mapped (`MADV_POPULATE_READ`, Linux 5.14), instead of one by one
    /// when they are used. Pages whose rights forbid reading are left out.
    #[must_use]
    pub fn populated(mut self) -> Self {
        self.populate = true;
        self
    }
}

/// What a region is made of.
#[derive(Debug)]
pub(crate) enum Home {
    Anonymous,
    Shared(Arc<File>, u64),
    Private { file: Arc<File>, offset: u64, template: bool },
}

#[derive(Debug)]
pub(crate) struct Region {
    pub(crate) guest: GpaRange,
    pub(crate) host: HvaRange,
    pub(crate) home: Home,
    pub(crate) no_reserve: bool,
    /// The file that holes are punched into, by device and inode, and the region's offset in it.
    pub(crate) punched: Option<((u64, u64), u64)>,
}

impl Region {
    /// The host addresses of a span.
    pub(crate) fn host_of(&self, span: Span) -> HvaRange {
        part(self.host, span)
    }

    /// The guest addresses of a span.
    pub(crate) fn guest_of(&self, span: Span) -> GpaRange {
        part(self.guest, span)
    }

    pub(crate) fn span_of(&self, guest: GpaRange) -> Span {
        let start = guest.start().as_u64() - self.guest.start().as_u64();
        Span { start, end: start + guest.len() }
    }

    pub(crate) fn style(&self, access: Access, shared: bool) -> Style {
        Style { access, shared, no_reserve: self.no_reserve }
    }
}

/// The host bytes of a slot that has any.
fn host_of(spec: &SlotSpec) -> Option<HvaRange> {
    spec.host.and_then(|start| AddrRange::with_len(start, spec.guest.len()).ok())
}

/// A span lies in its region, so that neither sum wraps and the part is not empty.
fn part<A: notifier_core::Address>(whole: AddrRange<A>, span: Span) -> AddrRange<A> {
    let start = A::from_u64(whole.start().as_u64() + span.start);
    AddrRange::with_len(start, span.len()).unwrap_or(whole)
}

/// What the lock protects.
#[derive(Debug)]
pub(crate) struct State {
    pub(crate) layouts: Vec<Layout>,
    claims: Vec<(u64, HvaRange)>,
    next: u64,
    /// No huge pages in what is mapped from now on.
    pub(crate) no_huge_pages: bool,
}

/// How a [`GuestRam`] is made.
#[derive(Debug)]
#[must_use = "nothing is taken over yet"]
pub struct GuestRamBuilder<B: Bitmap = ()> {
    space: Space,
    memory: GuestMemoryMmap<B>,
    kernel: Kernel,
    flags: SlotFlags,
    own_files: bool,
    reserve: Option<u64>,
    budget: Option<Arc<VmaBudget>>,
}

impl<B: Bitmap> GuestRamBuilder<B> {
    /// The flags of the slots; none unless said.
    pub fn slot_flags(mut self, flags: SlotFlags) -> Self {
        self.flags = flags;
        self
    }

    /// The files of private mappings are this guest's own, and nobody needs their contents: discarding and replacing punch
    /// holes into them, so that their memory goes back too. Unless said they are not changed, ever: they may be a snapshot,
    /// or the template of several clones. (Files of shared mappings are the guest's memory; their memory always goes back.)
    pub fn own_files(mut self, own: bool) -> Self {
        self.own_files = own;
        self
    }

    /// Who makes the calls; the kernel as it is unless said.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// Mappings that are left to the rest of the process; a sixteenth of the limit, and at least 1024, unless said.
    pub fn reserve(mut self, mappings: u64) -> Self {
        self.reserve = Some(mappings);
        self
    }

    /// A budget that is shared with others. `reserve` is the budget's then.
    pub fn budget(mut self, budget: Arc<VmaBudget>) -> Self {
        self.budget = Some(budget);
        self
    }

    /// Takes the memory over, and adds its regions to the space as slots.
    ///
    /// # Errors
    /// [`BuildError`]. The memory is dropped then, but for other handles to it.
    pub fn build(self) -> Result<GuestRam<B>, BuildError> {
        let page = rustix::param::page_size() as u64;
        let mut regions: Vec<Region> = Vec::new();
        let mut layouts = Vec::new();
        for region in self.memory.iter() {
            let start = Gpa::from(region.start_addr());
            let host = Hva::new(region.as_ptr().expose_provenance() as u64);
            let ranges = (AddrRange::with_len(start, region.len()), AddrRange::with_len(host, region.len()));
            let offset = region.file_offset().map_or(0, |file| file.start());
            let (Ok(guest), Ok(host)) = ranges else { return Err(BuildError::Unaligned { start, page }) };
            if !guest.is_aligned(page) || !host.is_aligned(page) || offset % page != 0 {
                return Err(BuildError::Unaligned { start, page });
            }
            let flags = region.flags() as u32;
            let shared = flags & MAP_TYPE != MAP_PRIVATE;
            let mut huge = flags & MAP_HUGETLB != 0 || region.is_hugetlbfs() == Some(true);
            let mut punched = None;
            let home = match (region.file_offset(), shared) {
                (None, false) => Home::Anonymous,
                (None, true) => return Err(BuildError::SharedAnonymous { start }),
                (Some(at), _) => {
                    let file = Arc::clone(at.arc());
                    let failed = |errno: rustix::io::Errno| BuildError::File { start, source: errno.into() };
                    huge |= rustix::fs::fstatfs(&*file).map_err(failed)?.f_type as u32 == HUGETLBFS_MAGIC;
                    let facts = self.kernel.file_facts(file.as_fd());
                    let facts = facts.map_err(|source| BuildError::File { start, source })?;
                    if facts
                        .length
                        .checked_next_multiple_of(page)
                        .is_some_and(|end| end < offset.saturating_add(guest.len()))
                    {
                        return Err(BuildError::FileEnds { start, length: facts.length });
                    }
                    if shared || self.own_files {
                        let obstacle = self.kernel.punch_obstacle(file.as_fd());
                        if let Some(why) = obstacle.map_err(|source| BuildError::File { start, source })? {
                            return Err(BuildError::NotWritable { start, why });
                        }
                        punched = Some((facts.identity, offset));
                    }
                    if shared {
                        Home::Shared(file, offset)
                    } else {
                        Home::Private { file, offset, template: !self.own_files }
                    }
                }
            };
            if huge {
                return Err(BuildError::HugeTlb { start });
            }
            let common = |other: &&Region| {
                let file = |(file, offset): &((u64, u64), u64)| {
                    punched.is_some_and(|(mine, from)| {
                        *file == mine && *offset < from + guest.len() && from < offset + other.guest.len()
                    })
                };
                other.host.overlaps(&host) || other.punched.as_ref().is_some_and(file)
            };
            if let Some(other) = regions.iter().find(common) {
                return Err(BuildError::Common { first: other.guest.start(), second: start });
            }
            layouts.push(Layout::new(guest.len(), access_of(region.prot())));
            regions.push(Region { guest, host, home, no_reserve: flags & MAP_NORESERVE != 0, punched });
        }
        let budget = match (self.budget, self.reserve) {
            (Some(budget), _) => budget,
            (None, Some(reserve)) => Arc::new(VmaBudget::with_reserve(&self.kernel, reserve)?),
            (None, None) => Arc::new(VmaBudget::new(&self.kernel)?),
        };
        let specs: Vec<SlotSpec> = regions
            .iter()
            .map(|region| SlotSpec { guest: region.guest, host: Some(region.host.start()), flags: self.flags })
            .collect();
        self.space.replace_slots(&[], &specs)?;
        let state = State { layouts, claims: Vec::new(), next: 0, no_huge_pages: false };
        Ok(GuestRam {
            space: self.space,
            memory: Arc::new(self.memory),
            kernel: self.kernel,
            budget,
            page,
            regions,
            state: Mutex::new(state),
            given_up: Condvar::new(),
        })
    }
}

fn access_of(prot: i32) -> Access {
    use linux_raw_sys::general::{PROT_EXEC, PROT_READ, PROT_WRITE};
    let mut access = Access::empty();
    access.set(Access::READ, prot as u32 & PROT_READ != 0);
    access.set(Access::WRITE, prot as u32 & PROT_WRITE != 0);
    access.set(Access::EXECUTE, prot as u32 & PROT_EXEC != 0);
    access
}

/// Guest RAM whose backing changes only inside windows of its [`Space`].
///
/// The regions of a vm-memory guest memory, as slots of the space. What they are made of is taken from vm-memory:
///
/// | region | `discard` | `replace` |
/// |---|---|---|
/// | private, anonymous | `MADV_DONTNEED` | a file mapped over |
/// | shared file (memfd) | hole punched into the file | a file mapped over, then the hole |
/// | private file | anonymous memory mapped over | a file mapped over |
/// | private file, with [`own_files`](GuestRamBuilder::own_files) | hole, `MADV_DONTNEED` | a file mapped over, then the hole |
///
/// A file that holes are punched into has to be open for writing. The files of private mappings are not changed, unless
/// they are said to be the guest's own.
///
/// All lengths are in bytes, all ranges multiples of the host's page size, each within one region.
///
/// # Dropping it
/// removes its slots from the space, those that are still there, and unmaps the memory, but for other handles to it. A
/// region stays mapped for good where somebody may still translate to it: where its slot could not be removed (the
/// thread is inside a scope of its own, or in a subscriber's callback; a window failed), or where the space has another
/// slot with the same host bytes. Whoever adds such slots removes them before.
#[derive(Debug)]
pub struct GuestRam<B: Bitmap = ()> {
    space: Space,
    memory: Arc<GuestMemoryMmap<B>>,
    pub(crate) kernel: Kernel,
    pub(crate) budget: Arc<VmaBudget>,
    pub(crate) page: u64,
    /// Ascending by guest address, as vm-memory has them.
    pub(crate) regions: Vec<Region>,
    pub(crate) state: Mutex<State>,
    given_up: Condvar,
}

impl<B: Bitmap> GuestRam<B> {
    /// Takes `memory` over as it is, and adds its regions to `space`. See [`GuestRam::builder`] for choice.
    ///
    /// # Errors
    /// [`BuildError`].
    pub fn new(space: &Space, memory: GuestMemoryMmap<B>) -> Result<Self, BuildError> {
        Self::builder(space, memory).build()
    }

    /// Guest RAM with choices.
    ///
    /// From here on nobody else changes the mappings of `memory`, or gives back memory of its files. The same memory is
    /// taken over once: a second `GuestRam` over a clone of it, or over some of its regions, in whichever space, has a
    /// layout of its own and knows nothing of what this one maps. Nothing finds that out.
    ///
    /// *Memory that comes later* (hotplug) is a `GuestRam` of its own, over a guest memory of the new regions alone
    /// (`GuestMemoryMmap::from_arc_regions`), in the same space, with the [`budget`](GuestRamBuilder::budget) of the first.
    /// Those who access all of it do so through a third guest memory of all regions. An operation has its pages in one of
    /// the two, and a window over both serves both.
    pub fn builder(space: &Space, memory: GuestMemoryMmap<B>) -> GuestRamBuilder<B> {
        GuestRamBuilder {
            space: space.clone(),
            memory,
            kernel: Kernel::new(),
            flags: SlotFlags::empty(),
            own_files: false,
            reserve: None,
            budget: None,
        }
    }

    /// The memory, for those who access it.
    pub fn memory(&self) -> &Arc<GuestMemoryMmap<B>> {
        &self.memory
    }

    /// The space whose windows it changes in.
    pub fn space(&self) -> &Space {
        &self.space
    }

    /// Who makes the calls.
    pub fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    /// What watches the process's mappings.
    pub fn budget(&self) -> &Arc<VmaBudget> {
        &self.budget
    }

    /// The slots of the regions as the space has them now, ascending by guest address: also those that have
    /// [replaced](Space::replace_slots) the first ones over the same memory. (A slot over more than one region is not among them.)
    pub fn slots(&self) -> Vec<SlotId> {
        self.own_slots().into_iter().map(|(id, _)| id).collect()
    }

    fn own_slots(&self) -> Vec<(SlotId, SlotSpec)> {
        let own = |spec: &SlotSpec| {
            let at = |region: &Region| region.host_of(region.span_of(spec.guest)).start();
            self.regions.iter().any(|region| region.guest.covers(&spec.guest) && spec.host == Some(at(region)))
        };
        self.space.slots().into_iter().filter(|(_, spec)| own(spec)).collect()
    }

    /// Gives all slots of the regions these flags, in one step, as [`Space::replace_slots`] does: to switch dirty logging on or
    /// off. Every table drops what it has of them.
    ///
    /// # Errors
    /// [`SlotError`]: a lease on any of it refuses the change. (See there how to wait for leases first.)
    pub fn set_slot_flags(&self, flags: SlotFlags) -> Result<(), SlotError> {
        loop {
            let (ids, specs): (Vec<_>, Vec<_>) =
                self.own_slots().into_iter().map(|(id, spec)| (id, SlotSpec { flags, ..spec })).unzip();
            match self.space.replace_slots(&ids, &specs) {
                // Somebody has replaced one meanwhile.
                Err(SlotError::NoSlot { .. }) => {}
                done => return done.map(drop),
            }
        }
    }

    /// Bytes of a page of the host: ranges of operations are multiples of it.
    pub fn page_size(&self) -> u64 {
        self.page
    }

    /// The region that holds `addr`.
    fn region_at(&self, addr: Gpa) -> Option<usize> {
        let after = self.regions.partition_point(|region| region.guest.start() <= addr);
        let index = after.checked_sub(1)?;
        self.regions[index].guest.contains(addr).then_some(index)
    }

    /// Checks that `range` is made of whole pages of one region.
    pub(crate) fn locate(&self, range: GpaRange) -> Result<(usize, Span), RamError> {
        if !range.is_aligned(self.page) {
            return Err(RamError::Unaligned { range, page: self.page });
        }
        let index = self.region_at(range.start()).ok_or(RamError::Outside { at: range.start() })?;
        let region = &self.regions[index];
        if !region.guest.covers(&range) {
            return Err(match self.region_at(region.guest.end()) {
                Some(_) => RamError::Crosses { range, end: region.guest.end() },
                None => RamError::Outside { at: region.guest.end() },
            });
        }
        Ok((index, region.span_of(range)))
    }

    /// What the page at `at` is made of now; `None` outside of RAM.
    pub fn backing_at(&self, at: Gpa) -> Option<Backing> {
        let (region, span, piece) = self.piece_at(at)?;
        let offset_of = |start: u64| start + span.start;
        Some(match (piece.place, &region.home) {
            (Place::File { file, offset, .. }, _) => Backing::Replaced { file, offset },
            (Place::Anonymous, _) | (Place::Home, Home::Anonymous) => Backing::Anonymous,
            (Place::Home, Home::Shared(file, offset)) => {
                Backing::Shared { file: Arc::clone(file), offset: offset_of(*offset) }
            }
            (Place::Home, Home::Private { file, offset, .. }) => {
                Backing::Private { file: Arc::clone(file), offset: offset_of(*offset) }
            }
        })
    }

    /// The host rights of the page at `at`; `None` outside of RAM. Where setting them failed and undoing that failed too
    /// ([`OperationError::undo`](crate::OperationError)), what they were or what they were to be; the next
    /// [`GuestRam::protect`] sets them, whichever they are.
    pub fn access_at(&self, at: Gpa) -> Option<Access> {
        self.piece_at(at).map(|(_, _, piece)| piece.access)
    }

    /// The parts of `span` that the host may read.
    pub(crate) fn readable(&self, region: usize, span: Span) -> Vec<Span> {
        let state = self.state.lock();
        let readable = |(span, piece): (Span, Piece)| piece.access.contains(Access::READ).then_some(span);
        state.layouts[region].within(span).filter_map(readable).collect()
    }

    /// The page that holds `at`, and what is there.
    fn piece_at(&self, at: Gpa) -> Option<(&Region, Span, Piece)> {
        let index = self.region_at(at)?;
        let region = &self.regions[index];
        let start = at.align_down(self.page).as_u64() - region.guest.start().as_u64();
        let (_, piece) = self.state.lock().layouts[index].at(start)?;
        Some((region, Span { start, end: start + self.page }, piece))
    }

    /// The host addresses of what RAM has of `range`, in guest order; neighbours are joined.
    pub fn host_ranges(&self, range: GpaRange) -> Vec<HvaRange> {
        let mut all: Vec<HvaRange> = Vec::new();
        for region in &self.regions {
            let Some(guest) = region.guest.intersection(&range) else { continue };
            let host = region.host_of(region.span_of(guest));
            match all.last_mut() {
                Some(last) if last.end() == host.start() => *last = last.joined(&host).unwrap_or(*last),
                _ => all.push(host),
            }
        }
        all
    }

    // ---- operations with windows of their own ----

    /// Operations that are checked together, and done in one set of windows.
    pub fn batch(&self) -> Batch<'_, B> {
        Batch::new(self, None)
    }

    /// What is in `range` is given back to the host, and reads as zero afterwards. Pages that were replaced are at home
    /// again. Opens a Zapped window over it.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn discard(&self, range: GpaRange) -> Result<(), RamError> {
        self.batch().discard(range).run()
    }

    /// Maps `len` bytes of `source` privately (copied when written to) over guest memory from `at`. What was there is
    /// gone, and its memory given back to the host. Where exactly these bytes are mapped already, only private
    /// copies are dropped. Opens a Zapped window over it.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn replace(&self, at: Gpa, source: &Source, len: u64) -> Result<(), RamError> {
        self.batch().replace(at, source, len).run()
    }

    /// Sets the host's rights. Opens a Zapped window over the range.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn protect(&self, range: GpaRange, access: Access) -> Result<(), RamError> {
        self.batch().protect(range, access).run()
    }

    // ---- operations in the caller's window ----

    /// Operations inside a window that is open already: `guard`'s, of either mode, by host or guest address. Nothing
    /// is opened.
    ///
    /// In a Retained window the caller settles what translates the pages: `change_pte` to the new page, or `zap`.
    ///
    /// A guard by guest address covers what translates through RAM's own slots, and nothing else. Whether another slot has
    /// the same host bytes is asked here, and again by each operation before it begins. A slot that is added between
    /// that and the operation's calls is not seen, for by guest address nothing keeps it from being added: whoever adds
    /// slots over the same host bytes at any time opens windows by host address, which cover every slot that has them.
    ///
    /// # Errors
    /// [`RamError::ForeignSpace`], and [`RamError::Aliased`] for a guard by guest address where another slot has
    /// the same host bytes, which the window does not cover.
    pub fn within<'a, M: WindowMode, A: WindowAddress>(
        &'a self,
        guard: &'a InvalidationGuard<'_, M, A>,
    ) -> Result<Within<'a, B>, RamError> {
        let window = A::key(guard.range());
        if !guard.is_of(&self.space) {
            return Err(RamError::ForeignSpace { window });
        }
        if let Key::Guest(range) = window {
            self.check_aliases(range, &[range])?;
        }
        Ok(Within { ram: self, window })
    }

    /// Whether the pages of `ranges` are those of another slot too, which `window` does not cover.
    pub(crate) fn check_aliases(&self, window: GpaRange, ranges: &[GpaRange]) -> Result<(), RamError> {
        for (slot, spec) in &self.space.slots() {
            let Some(other) = host_of(spec) else { continue };
            // Where a slot has the bytes of a region at the region's guest addresses, the window covers it.
            let elsewhere = |region: &&Region| {
                let offset =
                    |guest: GpaRange, host: HvaRange| host.start().as_u64().wrapping_sub(guest.start().as_u64());
                offset(spec.guest, other) != offset(region.guest, region.host)
            };
            let hit = |range: &GpaRange| {
                self.regions.iter().filter(elsewhere).any(|region| {
                    let guest = region.guest.intersection(range);
                    guest.is_some_and(|guest| region.host_of(region.span_of(guest)).overlaps(&other))
                })
            };
            if ranges.iter().any(hit) {
                return Err(RamError::Aliased { window: Key::Guest(window), slot: *slot });
            }
        }
        Ok(())
    }

    // ---- what needs no window ----

    /// Faults `range` in for reading (`MADV_POPULATE_READ`, Linux 5.14).
    ///
    /// # Errors
    /// [`RamError::Outside`], [`RamError::Unaligned`], [`RamError::Call`]: what was faulted in before stays so.
    pub fn populate(&self, range: GpaRange) -> Result<(), RamError> {
        self.each_part(range, Call::PopulateRead, |host| self.kernel.populate_read(host))
    }

    /// No huge pages from now on: all RAM (`MADV_NOHUGEPAGE`), and what is mapped anew when replaced pages go home. What is
    /// huge already stays so until it is split. (Merging and dirty tracking work on small pages.) Waits for operations
    /// that are under way.
    ///
    /// A kernel without huge pages refuses the advice (`EINVAL`), and has done what is asked for. Where pages go home
    /// later the advice is given again, and no operation fails where it is refused then.
    ///
    /// # Errors
    /// [`RamError::Call`]: regions before that one have no huge pages until they are mapped anew.
    pub fn no_huge_pages(&self) -> Result<(), RamError> {
        // Nobody maps anything anew between the advice and its being remembered.
        let (_claim, ()) = self.claim(self.regions.iter().map(|region| region.host), |_| ());
        let mut taken = false;
        for region in &self.regions {
            match self.kernel.no_huge_page(region.host) {
                Ok(()) => taken = true,
                Err(error) if error.raw_os_error() == Some(rustix::io::Errno::INVAL.raw_os_error()) => {}
                Err(source) => {
                    return Err(RamError::Call { call: Call::NoHugePage, at: region.guest.start(), source });
                }
            }
        }
        self.state.lock().no_huge_pages |= taken;
        Ok(())
    }

    /// Makes a call for each region's part of `range`.
    pub(crate) fn each_part(
        &self,
        range: GpaRange,
        call: Call,
        make: impl Fn(HvaRange) -> io::Result<()>,
    ) -> Result<(), RamError> {
        if !range.is_aligned(self.page) {
            return Err(RamError::Unaligned { range, page: self.page });
        }
        // All of it is checked before the first call.
        let mut at = range.start();
        let mut parts = Vec::new();
        while at < range.end() {
            let region = &self.regions[self.region_at(at).ok_or(RamError::Outside { at })?];
            let guest = region.guest.intersection(&range).ok_or(RamError::Outside { at })?;
            parts.push((guest.start(), region.host_of(region.span_of(guest))));
            at = guest.end();
        }
        for (at, host) in parts {
            make(host).map_err(|source| RamError::Call { call, at, source })?;
        }
        Ok(())
    }

    // ---- claims ----

    /// Waits until nobody else changes any of `ranges`, and keeps others from it. `plan` is asked in the same hold of
    /// the lock what there is to do.
    pub(crate) fn claim<R>(
        &self,
        ranges: impl Iterator<Item = HvaRange> + Clone,
        plan: impl FnOnce(&State) -> R,
    ) -> (Claim<'_, B>, R) {
        let mut state = self.state.lock();
        let taken =
            |state: &State| state.claims.iter().any(|(_, taken)| ranges.clone().any(|range| range.overlaps(taken)));
        while taken(&state) {
            self.given_up.wait(&mut state);
        }
        state.next += 1;
        let id = state.next;
        state.claims.extend(ranges.map(|range| (id, range)));
        let plan = plan(&state);
        (Claim { ram: self, id, changes: Vec::new(), reservation: None }, plan)
    }
}

impl<B: Bitmap> Drop for GuestRam<B> {
    fn drop(&mut self) {
        // Slots that could not be removed, or whose removal did not come to its end.
        let stuck = loop {
            let own = self.own_slots();
            let ids: Vec<SlotId> = own.iter().map(|(id, _)| *id).collect();
            match self.space.replace_slots(&ids, &[]) {
                Ok(_) => break Vec::new(),
                // Somebody has removed one meanwhile: there are fewer now.
                Err(SlotError::NoSlot { .. }) => {}
                Err(_) => break own,
            }
        };
        let others = self.space.slots();
        let used: Vec<HvaRange> = stuck.iter().chain(&others).filter_map(|(_, spec)| host_of(spec)).collect();
        let regions = self.memory.iter().zip(&self.regions);
        for ((memory, region), layout) in regions.zip(&self.state.get_mut().layouts) {
            if used.iter().any(|used| used.overlaps(&region.host)) {
                // Somebody may still translate to it. Memory that stays is better than memory that is somebody else's.
                std::mem::forget(memory.get_mmap());
            } else {
                gone(layout.count() as u64 - 1);
            }
        }
    }
}

/// The right to change some pages, and what was changed. Dropping it writes the layout.
pub(crate) struct Claim<'r, B: Bitmap> {
    ram: &'r GuestRam<B>,
    id: u64,
    /// By region.
    pub(crate) changes: Vec<(usize, Span, Piece)>,
    pub(crate) reservation: Option<Reservation>,
}

impl<B: Bitmap> Drop for Claim<'_, B> {
    fn drop(&mut self) {
        let mut state = self.ram.state.lock();
        let mut grown = 0;
        let changed = !self.changes.is_empty();
        for (region, span, piece) in self.changes.drain(..) {
            let layout = &mut state.layouts[region];
            let before = layout.count() as i64;
            layout.set(span, piece);
            grown += layout.count() as i64 - before;
        }
        state.claims.retain(|(id, _)| *id != self.id);
        drop(state);
        self.ram.given_up.notify_all();
        // Without a change no call was made, and the reservation is simply given back.
        if let Some(reservation) = self.reservation.take().filter(|_| changed) {
            reservation.settle(grown);
        }
    }
}

/// Guest RAM inside a window that is open. See [`GuestRam::within`].
#[derive(Debug, Clone, Copy)]
pub struct Within<'a, B: Bitmap = ()> {
    ram: &'a GuestRam<B>,
    window: Key,
}

impl<'a, B: Bitmap> Within<'a, B> {
    /// Operations that are checked together.
    pub fn batch(&self) -> Batch<'a, B> {
        Batch::new(self.ram, Some(self.window))
    }

    /// As [`GuestRam::discard`], without a window of its own.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn discard(&self, range: GpaRange) -> Result<(), RamError> {
        self.batch().discard(range).run()
    }

    /// As [`GuestRam::replace`], without a window of its own.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn replace(&self, at: Gpa, source: &Source, len: u64) -> Result<(), RamError> {
        self.batch().replace(at, source, len).run()
    }

    /// As [`GuestRam::protect`], without a window of its own.
    ///
    /// # Errors
    /// [`RamError`].
    pub fn protect(&self, range: GpaRange, access: Access) -> Result<(), RamError> {
        self.batch().protect(range, access).run()
    }

    /// Takes a private copy of each page of `range` now (`MADV_POPULATE_WRITE`, Linux 5.14), where it is a private
    /// mapping of a file: from here on the file's page underneath is not needed. Pages that are the process's own already
    /// stay what they are. This is how a merged page is parted at a moment of one's choosing; without it the kernel
    /// copies at the first write, with no notice to anybody who translates to the old page.
    ///
    /// # Errors
    /// [`RamError::NotInWindow`], [`RamError::Aliased`], [`RamError::Outside`], [`RamError::Unaligned`];
    /// [`RamError::Call`], with `EINVAL` where
    /// the host's rights do not include writing: what was copied before stays so.
    pub fn privatize(&self, range: GpaRange) -> Result<(), RamError> {
        self.check_parts(range)?;
        self.ram.each_part(range, Call::PopulateWrite, |host| self.ram.kernel.populate_write(host))
    }

    fn check_parts(&self, range: GpaRange) -> Result<(), RamError> {
        if let Key::Guest(window) = self.window {
            self.ram.check_aliases(window, &[range])?;
        }
        for region in &self.ram.regions {
            let Some(guest) = region.guest.intersection(&range) else { continue };
            check_window(self.window, guest, region.host_of(region.span_of(guest)))?;
        }
        Ok(())
    }
}

/// Whether a window has all of a range.
pub(crate) fn check_window(window: Key, guest: GpaRange, host: HvaRange) -> Result<(), RamError> {
    let covers = match window {
        Key::Host(range) => range.covers(&host),
        Key::Guest(range) => range.covers(&guest),
    };
    if covers {
        return Ok(());
    }
    Err(RamError::NotInWindow { range: guest, window })
}
