// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest: its space, its table, its memory, and what answers its faults.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use notifier_core::{
    Access, AddrRange, FaultError, Gpa, GpaRange, Hva, HvaRange, LeasePolicy, ResolveError, Scope, SlotFlags, SlotSpec,
    Space,
};

use super::{
    cli::Safety,
    dirty::DirtyLog,
    error::Error,
    images::Images,
    ledger::Ledger,
    mapping::{IsMerged, Mapping, Place, gpa},
    memory::{Frames, MemoryFile, PAGE},
    store::Store,
    table::{GuestTable, Installed},
    tally::Tally,
    vcpu::{Pace, WorkingSet},
};

/// Pages that the first fault on any of them maps together: what one leaf table of the format spans.
const BLOCK: usize = 512;

/// One guest.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) space: Space,
    pub(crate) table: GuestTable,
    pub(crate) home: Arc<MemoryFile>,
    pub(crate) frames: Frames,
    pub(crate) mapping: Mapping,
    pub(crate) ledger: Ledger,
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
    /// A guest whose RAM holds the images in the order of `layout`.
    pub(crate) fn new(
        images: &Arc<Images>,
        layout: &[u32],
        store: &Arc<Store>,
        tally: &Arc<Tally>,
        safety: Safety,
        pace: Pace,
    ) -> Result<Self, Error> {
        let pages = layout.len();
        let len = (pages * PAGE) as u64;
        let home = Arc::new(MemoryFile::new("dedup-guest", len)?);
        for (page, &image) in layout.iter().enumerate() {
            home.write((page * PAGE) as u64, images.page(image))?;
        }
        let written = DirtyLog::new(pages);
        let space = Space::builder().dirty_sink(written.clone()).build();
        let host = home.host()?;
        // Writes are tracked page by page, so leaves are pages: merging by pages could not use larger ones.
        let guest = AddrRange::with_len(gpa(0), len)?;
        space.add_slot(SlotSpec { guest, host: Some(host), flags: SlotFlags::LOG_DIRTY })?;
        Ok(Self {
            table: GuestTable::new(&space)?,
            frames: Frames::new(Arc::clone(&home), Arc::clone(store.file()))?,
            mapping: Mapping::new(pages),
            ledger: Ledger::new(Arc::clone(images), layout),
            written,
            working_set: WorkingSet::new(pages),
            pace,
            tally: Arc::clone(tally),
            store: Arc::clone(store),
            warm: (0..pages.div_ceil(BLOCK)).map(|_| AtomicBool::new(false)).collect(),
            space,
            home,
            host,
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
    fn unmerge(&self, page: usize) -> Result<(), Error> {
        // A device that has the page pinned is asked to let go: the vCPU cannot go on otherwise.
        let window = self.space.window(self.host_range(page, 1)?).leases(LeasePolicy::Cancel).open_zapped()?;
        {
            let mut places = self.mapping.lock(page);
            // Another vCPU may have been here first.
            if let Place::Merged(frame) = self.mapping.place(page) {
                self.home.write((page * PAGE) as u64, &self.store.contents(frame)?)?;
                places.set(page, Place::Home);
                self.store.leave(frame)?;
                self.tally.unmerged.add(1);
            }
        }
        Ok(window.close()?)
    }
}
