// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest: its space, its table, its memory, and what answers its faults.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use notifier_core::{
    Access, AddrRange, DirtySink, FaultError, Gpa, GpaRange, Hva, HvaRange, LeasePolicy, ResolveError, Scope, Space,
    Walker,
};
use vm_memory::{Bytes, GuestAddress};

use super::{
    cli::Safety,
    dirty::DirtyLog,
    error::Error,
    home::Home,
    images::Images,
    ledger::Ledger,
    mapping::{IsMerged, Mapping, Place, gpa},
    memory::{Frames, PAGE, PageBytes},
    store::Store,
    table::{GuestTable, Installed, TableFormat},
    tally::Tally,
    vcpu::{Pace, WorkingSet},
};

/// Pages that the first fault on any of them maps together: what one leaf table of the format spans.
const BLOCK: usize = 512;

/// What all guests of a run have in common.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Run<'r> {
    pub(crate) images: &'r Arc<Images>,
    pub(crate) store: &'r Arc<Store>,
    pub(crate) tally: &'r Arc<Tally>,
    pub(crate) format: TableFormat,
    pub(crate) safety: Safety,
    pub(crate) pace: Pace,
    /// Filling RAM ends when this is set.
    pub(crate) interrupt: &'r AtomicBool,
}

/// One guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) space: Space,
    pub(crate) table: GuestTable,
    pub(crate) home: Home,
    pub(crate) frames: Frames,
    pub(crate) mapping: Mapping,
    pub(crate) ledger: Arc<Ledger>,
    pub(crate) written: DirtyLog,
    pub(crate) working_set: WorkingSet,
    pub(crate) pace: Pace,
    pub(crate) tally: Arc<Tally>,
    store: Arc<Store>,
    host: Hva,
    safety: Safety,
    /// Blocks that have been faulted on.
    warm: Vec<AtomicBool>,
}

impl Guest {
    /// A guest whose RAM, made by `home` for so many pages, holds the images in the order of `layout`.
    pub(crate) fn new(
        home: impl FnOnce(&Space, usize) -> Result<Home, Error>,
        layout: &[u32],
        run: &Run<'_>,
    ) -> Result<Self, Error> {
        let &Run { images, store, tally, format, safety, pace, interrupt } = run;
        let pages = layout.len();
        let written = DirtyLog::new(pages);
        let space = Space::builder().dirty_sink(written.clone()).build();
        let home = home(&space, pages)?;
        for (page, &image) in layout.iter().enumerate() {
            if page % BLOCK == 0 && interrupt.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            home.memory().write_slice(images.page(image), GuestAddress((page * PAGE) as u64))?;
        }
        Ok(Self {
            table: GuestTable::new(&space, format)?,
            frames: Frames::new(home.memory().clone(), store.file())?,
            host: home.host()?,
            mapping: Mapping::new(pages),
            ledger: Arc::new(Ledger::new(Arc::clone(images), layout)),
            written,
            working_set: WorkingSet::new(pages),
            pace,
            tally: Arc::clone(tally),
            store: Arc::clone(store),
            warm: (0..pages.div_ceil(BLOCK)).map(|_| AtomicBool::new(false)).collect(),
            space,
            home,
            safety,
        })
    }

    /// Number of pages of RAM.
    pub(crate) fn pages(&self) -> usize {
        self.mapping.pages()
    }

    /// Guest physical bytes of some pages.
    pub(crate) fn guest_range(&self, first: usize, count: usize) -> Result<GpaRange, Error> {
        Ok(AddrRange::with_len(gpa(first), (count * PAGE) as u64)?)
    }

    /// Where the host has them.
    pub(crate) fn host_range(&self, first: usize, count: usize) -> Result<HvaRange, Error> {
        Ok(AddrRange::with_len(self.host_page(first), (count * PAGE) as u64)?)
    }

    /// Where the host has a page.
    pub(crate) fn host_page(&self, page: usize) -> Hva {
        self.host.wrapping_add((page * PAGE) as u64)
    }

    /// Answers a fault, so that the walk can be tried again. Ends the scope that the walk was made in.
    pub(crate) fn fault(&self, scope: Scope<'_>, page: usize, access: Access) -> Result<(), Error> {
        let block = page / BLOCK;
        let cold = !self.warm[block].swap(true, Ordering::Relaxed);
        let range = if cold {
            let first = block * BLOCK;
            self.guest_range(first, BLOCK.min(self.pages() - first))?
        } else {
            self.guest_range(page, 1)?
        };
        let fault = match scope.fault(range) {
            Ok(fault) => fault,
            Err(FaultError::Retry(retry)) => {
                retry.wait();
                return Ok(());
            }
            Err(error) => return Err(Error::Fault(error)),
        };
        match fault.resolve(|fault| self.mapping.resolve(fault.range(), page, access)) {
            Ok(resolved) => {
                let merged = resolved.extents().iter().any(|e| e.guest.contains(gpa(page)) && !e.access.writable());
                match self.table.install(resolved)? {
                    Installed::Mapped if merged && !access.writable() => self.tally.refaults.add(1),
                    Installed::Mapped => {}
                    Installed::Lost(retry) => retry.wait(),
                    Installed::Conflict(at) => self.conflict(at)?,
                }
                Ok(())
            }
            Err(ResolveError::Resolver(IsMerged)) => self.unmerge(page),
            Err(_) => Err(Error::Extent { gpa: gpa(page) }),
        }
    }

    /// The table leads elsewhere than the mapping. Only a page that was moved without a window can come to that; such a
    /// translation has to go by one.
    fn conflict(&self, at: Gpa) -> Result<(), Error> {
        if self.safety != Safety::NoNotify {
            return Err(Error::Conflict { gpa: at });
        }
        let page = (at.as_u64() / PAGE as u64) as usize;
        let window = self.space.window(self.host_range(page, 1)?).leases(LeasePolicy::Cancel).open_zapped()?;
        Ok(window.close()?)
    }

    /// Gives a merged page its home back, contents and all. Nobody translates the page while it moves.
    pub(crate) fn unmerge(&self, page: usize) -> Result<(), Error> {
        // A device that has the page pinned is asked to let go: the vCPU cannot go on otherwise.
        let window = self.space.window(self.host_range(page, 1)?).leases(LeasePolicy::Cancel).open_zapped()?;
        {
            let mut places = self.mapping.lock(page);
            match self.mapping.place(page) {
                // Another vCPU has been here first. Whoever waits, waits for nothing any more.
                Place::Home => self.home.let_go(page, 1)?,
                Place::Merged(frame) => {
                    let left = self.home.take_back(&window, page, frame, &self.store)?;
                    places.set(page, Place::Home);
                    // A frame that the host may still show the guest is never filled with anything else.
                    if left {
                        self.store.leave(frame)?;
                    }
                    self.tally.unmerged.add(1);
                    self.written.dirty(self.guest_range(page, 1)?);
                }
            }
        }
        Ok(window.close()?)
    }

    /// Somebody waits at the fence of a page: lets it write.
    pub(crate) fn admit_writer(&self, page: usize) -> Result<(), Error> {
        if self.mapping.place(page) == Place::Home {
            // Whoever holds pages that are at home has the lock.
            let _places = self.mapping.lock(page);
            if self.mapping.place(page) == Place::Home {
                return self.home.let_go(page, 1);
            }
        }
        self.unmerge(page)
    }

    /// Maps pages for those who walk the table before they ask. A window over them is a reason not to.
    pub(crate) fn prefetch(&self, walker: &mut Walker, first: usize, count: usize) -> Result<(), Error> {
        let fault = match walker.fault(self.guest_range(first, count)?) {
            Ok(fault) => fault,
            Err(FaultError::Retry(_)) => return Ok(()),
            Err(error) => return Err(Error::Fault(error)),
        };
        match fault.resolve(|fault| self.mapping.resolve(fault.range(), first, Access::READ)) {
            Ok(resolved) => match self.table.install(resolved)? {
                Installed::Conflict(at) => self.conflict(at),
                Installed::Mapped | Installed::Lost(_) => Ok(()),
            },
            Err(_) => Err(Error::Extent { gpa: gpa(first) }),
        }
    }

    /// Maps all of RAM for those who walk the table.
    pub(crate) fn prefetch_all(&self) -> Result<(), Error> {
        let mut walker = self.space.walker();
        (0..self.pages()).step_by(BLOCK).try_for_each(|first| {
            self.warm[first / BLOCK].store(true, Ordering::Relaxed);
            self.prefetch(&mut walker, first, BLOCK.min(self.pages() - first))
        })
    }

    /// What a page holds, where the host has a mapping that decides that.
    pub(crate) fn truth(&self, page: usize) -> Result<Option<PageBytes>, Error> {
        match &self.home {
            Home::File(_) => Ok(None),
            Home::Mapped(_) => {
                let mut bytes = [0; PAGE];
                self.home.read(page, &mut bytes)?;
                Ok(Some(bytes))
            }
        }
    }
}
