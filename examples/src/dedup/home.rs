// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Home: the memory that a guest's own pages lie in, and how it changes when they are merged and un-merged.
//!
//! There are two kinds, and they differ in who reaches it.
//!
//! - A [*file*](Home::File) is reached through the guest's table and no other way. The table is repointed first; then
//!   nobody looks at the home any more, and it is punched out of the file.
//! - [*Mapped*](Mapped) RAM is reached by vCPUs, and by the VMM itself, through a mapping in this process, which no table
//!   of ours is between. So a *fence* makes writers wait, the frame of the store is mapped over the page, and the tables
//!   of the others (devices) are repointed when that is done. Until then, and after it where they were not, a translation
//!   to the home is good: it leads through the same mapping.

use std::sync::Arc;

use notifier_core::{AddrRange, Hva, InvalidationGuard, SlotFlags, SlotSpec, Space, WindowMode, Zapped};
use vm_memory::GuestMemoryMmap;

use super::{
    error::Error,
    mapped::{Mapped, Merge},
    mapping::gpa,
    memory::{MemoryFile, PAGE, PageBytes},
    store::{Frame, Store},
};

/// A guest's home memory.
#[derive(Debug)]
pub(crate) enum Home {
    /// Reached through the guest's table alone.
    File(MemoryFile),
    /// Reached through a mapping.
    Mapped(Box<Mapped>),
}

impl Home {
    /// A memory file of so many pages, and its slot.
    pub(crate) fn file(space: &Space, pages: usize) -> Result<Self, Error> {
        let len = (pages * PAGE) as u64;
        let home = MemoryFile::new("dedup-guest", len)?;
        // Writes are tracked page by page, so leaves are pages: merging by pages could not use larger ones.
        let guest = AddrRange::with_len(gpa(0), len)?;
        space.add_slot(SlotSpec { guest, host: Some(home.host()?), flags: SlotFlags::LOG_DIRTY })?;
        Ok(Self::File(home))
    }

    /// As vm-memory has it.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap<()> {
        match self {
            Self::File(file) => file.memory(),
            Self::Mapped(mapped) => mapped.memory(),
        }
    }

    /// Where its first byte is mapped.
    pub(crate) fn host(&self) -> Result<Hva, Error> {
        super::memory::host_address(self.memory())
    }

    /// Reads what lies at a page's home.
    pub(crate) fn read(&self, page: usize, bytes: &mut PageBytes) -> Result<(), Error> {
        Ok(vm_memory::Bytes::read_slice(self.memory(), bytes, vm_memory::GuestAddress((page * PAGE) as u64))?)
    }

    /// Bytes of memory that the host spends on it, frames of the store not counted.
    pub(crate) fn resident(&self) -> Result<u64, Error> {
        match self {
            Self::File(file) => file.resident(),
            Self::Mapped(mapped) => mapped.resident(),
        }
    }

    /// From here on nobody writes the pages, all of one group, whose lock the caller has.
    pub(crate) fn hold(&self, first: usize, count: usize) -> Result<(), Error> {
        match self {
            Self::File(_) => Ok(()),
            Self::Mapped(mapped) => mapped.hold(first, count),
        }
    }

    /// Whoever waits for these pages, which are at home, goes on.
    pub(crate) fn let_go(&self, first: usize, count: usize) -> Result<(), Error> {
        match self {
            Self::File(_) => Ok(()),
            Self::Mapped(mapped) => mapped.let_go(first, count),
        }
    }

    /// Before tables are repointed: brings pages that have a frame to show it, where that is done first. What became of
    /// each.
    pub(crate) fn cover<M: WindowMode>(
        &self,
        window: &InvalidationGuard<'_, M, Hva>,
        first: usize,
        frames: &[Option<Frame>],
    ) -> Result<Vec<Merge>, Error> {
        match self {
            Self::File(_) => Ok(frames.iter().map(|frame| frame.map_or(Merge::NotAsked, |_| Merge::Merged)).collect()),
            Self::Mapped(mapped) => mapped.cover(window, first, frames),
        }
    }

    /// When nobody translates to the homes of these pages any more: gives their memory back, where that is not done.
    pub(crate) fn give(&self, first: usize, count: usize) -> Result<(), Error> {
        match self {
            Self::File(file) => file.punch((first * PAGE) as u64, (count * PAGE) as u64),
            Self::Mapped(_) => Ok(()),
        }
    }

    /// When it is settled which pages are merged: whoever waits for one of the pages tries again, or goes on.
    pub(crate) fn settle(&self, first: usize, merged: &[bool]) -> Result<(), Error> {
        match self {
            Self::File(_) => Ok(()),
            Self::Mapped(mapped) => mapped.settle(first, merged),
        }
    }

    /// Brings the contents of a merged page home. Whether nobody is shown the frame on this page's account any more.
    pub(crate) fn take_back(
        &self,
        window: &InvalidationGuard<'_, Zapped, Hva>,
        page: usize,
        frame: Frame,
        store: &Arc<Store>,
    ) -> Result<bool, Error> {
        match self {
            Self::File(file) => {
                file.write((page * PAGE) as u64, &store.contents(frame)?)?;
                Ok(true)
            }
            Self::Mapped(mapped) => mapped.take_back(window, page),
        }
    }
}
