// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Frames: what translations point at, and the memory files they lie in.
//!
//! Output addresses of a guest: its *home frames* are at `[0, RAM)`, at the same number as the guest physical address
//! they are home to; the *store's* frames, shared by all guests, are at [`STORE_BASE`] and above. The store's frame 0 is
//! the zero frame: a private mapping that nobody ever writes, for which the host needs no memory of its own.

use std::{fs::File, io, sync::Arc};

use notifier_core::{Hva, OutputAddr};
use rustix::{
    fs::{FallocateFlags, MemfdFlags},
    mm::{MapFlags, ProtFlags},
};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap,
    mmap::{FromRangesError, MmapRegionBuilder},
};

use super::error::Error;

/// Bytes of a page.
pub(crate) const PAGE: usize = 4096;
/// Where the store's frames begin in every guest's output address space.
pub(crate) const STORE_BASE: u64 = 1 << 40;

/// The bytes of a page.
pub(crate) type PageBytes = [u8; PAGE];

/// Where the first byte of guest memory is mapped.
pub(crate) fn host_address(memory: &GuestMemoryMmap<()>) -> Result<Hva, Error> {
    Ok(Hva::new(memory.get_host_address(GuestAddress(0))? as u64))
}

/// A memory file and its mapping. All offsets are in bytes.
#[derive(Debug)]
pub(crate) struct MemoryFile {
    file: Arc<File>,
    memory: GuestMemoryMmap<()>,
}

impl MemoryFile {
    /// A memory file of `len` bytes that no memory has been spent on yet.
    pub(crate) fn new(name: &'static str, len: u64) -> Result<Self, Error> {
        let create = || -> io::Result<File> {
            let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC)?);
            file.set_len(len)?;
            Ok(file)
        };
        let file = Arc::new(create().map_err(|source| Error::Memory { what: name, source })?);
        let offset = FileOffset::from_arc(Arc::clone(&file), 0);
        let memory = GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), len as usize, Some(offset))])
            .map_err(|source| Error::Map { what: name, source })?;
        Ok(Self { file, memory })
    }

    /// The file itself.
    pub(crate) fn file(&self) -> &Arc<File> {
        &self.file
    }

    /// Another mapping of it, that nothing can be written through.
    pub(crate) fn read_only(&self) -> Result<GuestMemoryMmap<()>, Error> {
        let size = self.memory.iter().map(|region| region.len()).sum::<u64>() as usize;
        let build = || -> Result<_, FromRangesError> {
            let region = MmapRegionBuilder::new(size)
                .with_file_offset(FileOffset::from_arc(Arc::clone(&self.file), 0))
                .with_mmap_prot(ProtFlags::READ.bits() as i32)
                .with_mmap_flags((MapFlags::SHARED | MapFlags::NORESERVE).bits() as i32)
                .build()?;
            let region = GuestRegionMmap::new(region, GuestAddress(0)).ok_or(FromRangesError::InvalidGuestRegion)?;
            Ok(GuestMemoryMmap::from_regions(vec![region])?)
        };
        build().map_err(|source| Error::Map { what: "read-only view", source })
    }

    /// Its mapping, as vm-memory has it.
    pub(crate) fn memory(&self) -> &GuestMemoryMmap<()> {
        &self.memory
    }

    /// Where its first byte is mapped.
    pub(crate) fn host(&self) -> Result<Hva, Error> {
        host_address(&self.memory)
    }

    pub(crate) fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), Error> {
        Ok(self.memory.read_slice(buf, GuestAddress(offset))?)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), Error> {
        Ok(self.memory.write_slice(bytes, GuestAddress(offset))?)
    }

    /// Gives memory back to the host. What is read there afterwards is zero.
    pub(crate) fn punch(&self, offset: u64, len: u64) -> Result<(), Error> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&*self.file, flags, offset, len)
            .map_err(|errno| Error::Memory { what: "hole punch", source: errno.into() })
    }

    /// Bytes of memory that the host spends on it now, as the file system counts them.
    pub(crate) fn resident(&self) -> Result<u64, Error> {
        let stat = rustix::fs::fstat(&*self.file)
            .map_err(|errno| Error::Memory { what: "block count", source: errno.into() })?;
        // POSIX: st_blocks is in units of 512 bytes on Linux, whatever st_blksize says.
        Ok(stat.st_blocks as u64 * 512)
    }
}

/// Everything that one guest's translations can point at.
#[derive(Debug)]
pub(crate) struct Frames {
    home: GuestMemoryMmap<()>,
    /// Frames of the store are never written through a translation.
    store: GuestMemoryMmap<()>,
    zero: GuestMemoryMmap<()>,
}

impl Frames {
    pub(crate) fn new(home: GuestMemoryMmap<()>, store: &MemoryFile) -> Result<Self, Error> {
        let zero = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), PAGE)])
            .map_err(|source| Error::Map { what: "zero frame", source })?;
        Ok(Self { home, store: store.read_only()?, zero })
    }

    /// Which memory an output address is in, and where.
    fn place(&self, at: OutputAddr) -> (&GuestMemoryMmap<()>, GuestAddress) {
        match at.as_u64().checked_sub(STORE_BASE) {
            None => (&self.home, GuestAddress(at.as_u64())),
            Some(offset) if offset < PAGE as u64 => (&self.zero, GuestAddress(offset)),
            Some(offset) => (&self.store, GuestAddress(offset - PAGE as u64)),
        }
    }

    /// Reads what lies at an output address.
    pub(crate) fn read(&self, at: OutputAddr, buf: &mut [u8]) -> Result<(), Error> {
        let (memory, offset) = self.place(at);
        Ok(memory.read_slice(buf, offset)?)
    }

    /// Writes there. As hardware would: whether that was wise was the translation's business.
    pub(crate) fn write(&self, at: OutputAddr, bytes: &[u8]) -> Result<(), Error> {
        let (memory, offset) = self.place(at);
        Ok(memory.write_slice(bytes, offset)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_spent_by_writing_and_given_back_by_punching() {
        let file = MemoryFile::new("test", 16 * PAGE as u64).unwrap();
        assert_eq!(file.resident().unwrap(), 0);
        for page in 0..16 {
            file.write(page * PAGE as u64, &[7; PAGE]).unwrap();
        }
        assert_eq!(file.resident().unwrap(), 16 * PAGE as u64);
        file.punch(4 * PAGE as u64, 8 * PAGE as u64).unwrap();
        assert_eq!(file.resident().unwrap(), 8 * PAGE as u64);
        let mut byte = [1];
        file.read(4 * PAGE as u64, &mut byte).unwrap();
        assert_eq!(byte, [0]);
    }

    #[test]
    fn output_addresses_lead_to_home_store_and_zero() {
        let home = MemoryFile::new("home", PAGE as u64).unwrap();
        let store = MemoryFile::new("store", PAGE as u64).unwrap();
        let frames = Frames::new(home.memory().clone(), &store).unwrap();
        home.write(8, &[1]).unwrap();
        store.write(8, &[2]).unwrap();
        let read = |at| {
            let mut byte = [9];
            frames.read(OutputAddr::new(at), &mut byte).unwrap();
            byte[0]
        };
        assert_eq!(read(8), 1);
        assert_eq!(read(STORE_BASE + PAGE as u64 + 8), 2);
        assert_eq!(read(STORE_BASE + 8), 0);
        assert!(frames.read(OutputAddr::new(PAGE as u64), &mut [0]).is_err());
    }
}
