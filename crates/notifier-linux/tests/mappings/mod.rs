// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory of each kind that guests have, for tests.
#![allow(dead_code, reason = "each test uses a part of it")]

use std::{
    ffi::c_void,
    fs::File,
    os::{fd::AsFd, unix::fs::FileExt},
    sync::atomic::{AtomicU64, Ordering},
};

use notifier_core::{AddrRange, Hva, HvaRange};
use notifier_linux::{Kernel, PageMap, PageState};
use rustix::{
    fs::MemfdFlags,
    mm::{MapFlags, ProtFlags},
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Shared,
    Private,
}

pub(crate) const KINDS: [Kind; 3] = [Kind::Anonymous, Kind::Shared, Kind::Private];

pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// A memfd of so many pages, zero.
pub(crate) fn memfd(pages: u64) -> File {
    let file = File::from(rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(pages * page_size()).unwrap();
    file
}

/// The first eight bytes of a page of a file.
pub(crate) fn word_of(file: &File, page: u64) -> u64 {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, page * page_size()).unwrap();
    u64::from_ne_bytes(word)
}

/// Mapped memory; unmapped with this.
#[derive(Debug)]
pub(crate) struct Mapping {
    at: usize,
    pages: u64,
    pub(crate) kind: Kind,
    /// What it is a mapping of; of nothing, for anonymous memory.
    pub(crate) file: Option<File>,
}

impl Mapping {
    pub(crate) fn new(kind: Kind, pages: u64) -> Self {
        match kind {
            Kind::Anonymous => {
                let len = (pages * page_size()) as usize;
                // SAFETY: a new mapping, at an address that the kernel chooses.
                let at = unsafe {
                    rustix::mm::mmap_anonymous(
                        std::ptr::null_mut(),
                        len,
                        ProtFlags::READ | ProtFlags::WRITE,
                        MapFlags::PRIVATE,
                    )
                };
                Self { at: at.unwrap().expose_provenance(), pages, kind, file: None }
            }
            _ => Self::of(memfd(pages), kind, pages),
        }
    }

    pub(crate) fn of(file: File, kind: Kind, pages: u64) -> Self {
        let flags = if kind == Kind::Shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        let len = (pages * page_size()) as usize;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let at =
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), len, ProtFlags::READ | ProtFlags::WRITE, flags, &file, 0) };
        Self { at: at.unwrap().expose_provenance(), pages, kind, file: Some(file) }
    }

    pub(crate) fn range(&self) -> HvaRange {
        self.part(0, self.pages)
    }

    /// `pages` pages from the page `first`.
    pub(crate) fn part(&self, first: u64, pages: u64) -> HvaRange {
        AddrRange::with_len(Hva::new(self.at as u64 + first * page_size()), pages * page_size()).unwrap()
    }

    pub(crate) fn page(&self, page: u64) -> HvaRange {
        self.part(page, 1)
    }

    pub(crate) fn pointer(&self, range: HvaRange) -> *mut c_void {
        std::ptr::with_exposed_provenance_mut(range.start().as_u64() as usize)
    }

    /// A word of a page.
    pub(crate) fn word(&self, page: u64, index: u64) -> &AtomicU64 {
        assert!(page < self.pages && index < page_size() / 8);
        let at = std::ptr::with_exposed_provenance_mut::<u64>(self.at)
            .wrapping_add((page * page_size() / 8 + index) as usize);
        // SAFETY: inside the mapping, which lives as long as `self`, and aligned; all accesses to it are atomic or the
        // kernel's.
        unsafe { AtomicU64::from_ptr(at) }
    }

    pub(crate) fn get(&self, page: u64) -> u64 {
        self.word(page, 0).load(Ordering::SeqCst)
    }

    pub(crate) fn set(&self, page: u64, value: u64) {
        self.word(page, 0).store(value, Ordering::SeqCst);
    }

    /// Every word of a page.
    pub(crate) fn words(&self, page: u64) -> Vec<u64> {
        (0..page_size() / 8).map(|index| self.word(page, index).load(Ordering::SeqCst)).collect()
    }

    /// Maps a page of a file over a page, private.
    pub(crate) fn map_over(&self, page: u64, file: impl AsFd, file_page: u64) {
        let flags = MapFlags::PRIVATE | MapFlags::FIXED;
        let (at, len) = (self.pointer(self.page(page)), page_size() as usize);
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: the page is this mapping's, and its contents may change at any time.
        unsafe { rustix::mm::mmap(at, len, prot, flags, file, file_page * page_size()) }.unwrap();
    }

    pub(crate) fn state(&self, page: u64) -> PageState {
        let mut states = Vec::new();
        PageMap::read(&Kernel::new(), self.page(page), &mut states).unwrap();
        states[0]
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let range = self.range();
        // SAFETY: the mapping is this one's, and nobody has a reference into it.
        unsafe { rustix::mm::munmap(self.pointer(range), range.len() as usize) }.unwrap();
    }
}
