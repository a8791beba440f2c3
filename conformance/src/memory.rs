// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The memory that an emulated machine and this program share.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::{collections::BTreeMap, sync::Arc};

use notifier_core::OutputAddr;
use spte_core::{Entry, OutOfPages, PageSource, TableLayout};
use thiserror::Error;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// In which order a machine keeps the bytes of a word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ByteOrder {
    /// The lowest first.
    Little,
    /// The highest first.
    Big,
}

/// Bytes of memory: where the machine has them, and where they are in the file.
#[derive(Debug, Clone, Copy)]
pub struct Region {
    /// The first output address.
    pub output: u64,
    /// How many bytes.
    pub bytes: u64,
    /// Where the file has the first.
    pub offset: u64,
}

/// Why there is no memory.
#[derive(Debug, Error)]
pub enum MemoryError {
    /// The file cannot be made.
    #[error("no file for {bytes:#x} bytes of memory: {source}")]
    File {
        /// Its size.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// It cannot be mapped.
    #[error("the memory cannot be mapped: {0}")]
    Map(String),
}

/// A machine's memory: a file without a name that the emulator maps, and this program does.
#[derive(Debug)]
pub struct Memory {
    guest: GuestMemoryMmap<()>,
    file: Arc<File>,
    order: ByteOrder,
}

impl Memory {
    /// Memory of these regions, all zero.
    ///
    /// # Errors
    /// [`MemoryError`].
    pub fn new(regions: &[Region], order: ByteOrder) -> Result<Self, MemoryError> {
        let bytes = regions.iter().map(|region| region.offset + region.bytes).max().unwrap_or(0);
        let failed = |source: io::Error| MemoryError::File { bytes, source };
        let file = rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC);
        let file = Arc::new(File::from(file.map_err(|errno| failed(errno.into()))?));
        file.set_len(bytes).map_err(failed)?;
        let parts = regions.iter().map(|region| {
            let offset = FileOffset::from_arc(Arc::clone(&file), region.offset);
            (GuestAddress(region.output), region.bytes as usize, Some(offset))
        });
        let guest =
            GuestMemoryMmap::from_ranges_with_files(parts).map_err(|error| MemoryError::Map(error.to_string()))?;
        Ok(Self { guest, file, order })
    }

    /// A name under which another process can open the file for as long as this one has it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd())
    }

    /// Its size in bytes.
    pub fn file_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |data| data.len())
    }

    /// The number of the file, by which a process that maps it can be found.
    pub fn inode(&self) -> u64 {
        self.file.metadata().map_or(0, |data| data.ino())
    }

    fn host(&self, at: u64) -> NonNull<u8> {
        let host = self.guest.get_host_address(GuestAddress(at)).ok().and_then(NonNull::new);
        host.unwrap_or_else(|| panic!("the machine has no memory at {at:#x}"))
    }

    /// The word at an output address, as its bytes stand.
    ///
    /// # Panics
    /// Where the machine has no memory, or the address is no multiple of 8.
    pub fn word(&self, at: u64) -> &AtomicU64 {
        assert!(at.is_multiple_of(8), "{at:#x} is no word");
        // SAFETY: an aligned word of a mapping that lives as long as `self`; everybody here goes by atomics, and the
        // machine on the other side is no part of the program.
        unsafe { self.host(at).cast::<AtomicU64>().as_ref() }
    }

    /// As many words from an output address on, as their bytes stand.
    ///
    /// # Panics
    /// As [`Memory::word`], and where they are not in one region.
    pub fn words(&self, at: u64, count: usize) -> &[AtomicU64] {
        assert!(at.is_multiple_of(8), "{at:#x} is no word");
        let slice = self.guest.get_slice(GuestAddress(at), 8 * count);
        let slice = slice.unwrap_or_else(|error| panic!("{count} words at {at:#x}: {error}"));
        // SAFETY: as in `word`; vm-memory found all of them in one mapping.
        unsafe { std::slice::from_raw_parts(slice.ptr_guard_mut().as_ptr().cast(), count) }
    }

    /// A number as the machine has it in memory.
    pub fn ordered(&self, value: u64) -> u64 {
        match self.order {
            ByteOrder::Little => value.to_le(),
            ByteOrder::Big => value.to_be(),
        }
    }

    /// What the machine would load from there. It is not older than anything loaded before.
    pub fn load(&self, at: u64) -> u64 {
        self.ordered(self.word(at).load(Ordering::Acquire))
    }

    /// Stores as the machine would. Whoever loads it has what was stored before.
    pub fn store(&self, at: u64, value: u64) {
        self.word(at).store(self.ordered(value), Ordering::Release);
    }

    /// Copies bytes there; what is left of the last word becomes zero.
    pub fn write(&self, at: u64, bytes: &[u8]) {
        for (number, bytes) in bytes.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..bytes.len()].copy_from_slice(bytes);
            self.word(at + 8 * number as u64).store(u64::from_ne_bytes(word), Ordering::Release);
        }
    }
}

/// What pages that are free have in them, should hardware still walk there: an impossible entry, or a link to where no memory is.
const FREE: u64 = u64::MAX;

#[derive(Debug)]
struct Free {
    next: u64,
    /// By size.
    pages: BTreeMap<usize, Vec<u64>>,
}

/// Table pages out of a machine's memory.
#[derive(Debug)]
pub struct TablePages {
    memory: Arc<Memory>,
    place: Range<u64>,
    free: Mutex<Free>,
}

impl TablePages {
    /// Pages out of these output addresses.
    pub fn new(memory: Arc<Memory>, place: Range<u64>) -> Self {
        let free = Mutex::new(Free { next: place.start, pages: BTreeMap::new() });
        Self { memory, place, free }
    }

    /// Fills a page of a table.
    fn fill(&self, page: u64, layout: TableLayout, fill: u64) {
        self.memory.words(page, layout.entries()).iter().for_each(|word| word.store(fill, Ordering::Relaxed));
    }
}

// SAFETY: pieces of `place` that do not overlap, aligned to their size, whose entries are words of memory that lives as long
// as `self`; whoever else writes them here (entries that are turned, faults that are planted) does so by atomics, puts back what the engine
// follows, and hardware writes what the format says.
unsafe impl PageSource for TablePages {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        // No table is smaller: some hardware wants so much.
        let bytes = layout.bytes.max(0x1000);
        let page = match free.pages.get_mut(&bytes).and_then(Vec::pop) {
            Some(page) => page,
            None => {
                let page = free.next.next_multiple_of(bytes as u64);
                if page + bytes as u64 > self.place.end {
                    return Err(OutOfPages { bytes: layout.bytes });
                }
                free.next = page + bytes as u64;
                page
            }
        };
        drop(free);
        self.fill(page, layout, fill);
        Ok(OutputAddr::new(page))
    }

    unsafe fn free(&self, page: OutputAddr, layout: TableLayout) {
        let page = page.as_u64();
        self.fill(page, layout, FREE);
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        free.pages.entry(layout.bytes.max(0x1000)).or_default().push(page);
    }

    unsafe fn entries(&self, page: OutputAddr, _: TableLayout) -> NonNull<Entry> {
        self.memory.host(page.as_u64()).cast()
    }
}
