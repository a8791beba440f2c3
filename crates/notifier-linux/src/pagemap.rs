// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the kernel's page tables say of memory: is a page there, is it still the file's.
//!
//! From `/proc/self/pagemap` (`Documentation/admin-guide/mm/pagemap.rst`): 34 ns a page in bulk. Page frame numbers
//! are not among it; they need a privilege, and the rest does not.
use std::io;

use notifier_core::HvaRange;

use crate::kernel::Kernel;

const SOFT_DIRTY: u64 = 1 << 55;
const EXCLUSIVE: u64 = 1 << 56;
const WRITE_PROTECTED: u64 = 1 << 57;
const FILE: u64 = 1 << 61;
const SWAPPED: u64 = 1 << 62;
const PRESENT: u64 = 1 << 63;

/// Why page states could not be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PageMapError {
    /// A range that does not begin and end on pages.
    #[error("{range} does not begin and end on pages of {page_size:#x} bytes")]
    Unaligned {
        /// What was asked about.
        range: HvaRange,
        /// Bytes of a page of this host.
        page_size: u64,
    },
    /// Reading `/proc/self/pagemap` failed; for addresses that no process can have too.
    #[error("pagemap of {range} cannot be read: {source}")]
    Read {
        /// What was asked about.
        range: HvaRange,
        /// Its error.
        source: io::Error,
    },
}

/// What stands in the page table for one page, at the moment it was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[non_exhaustive]
pub struct PageState {
    /// The page is mapped (bit 63).
    pub present: bool,
    /// It is swapped out (bit 62). A marker that userfaultfd left where no page is (an armed page of a file that was
    /// not read yet) is shown like that too.
    pub swapped: bool,
    /// It is a page of a file, or of shared anonymous memory (bit 61): in a private mapping, not a private copy.
    pub file: bool,
    /// Nobody else maps it (bit 56).
    pub exclusive: bool,
    /// userfaultfd write-protects it (bit 57).
    pub write_protected: bool,
    /// It was written since soft-dirty bits were last cleared (bit 55).
    pub soft_dirty: bool,
}

impl PageState {
    fn of(entry: u64) -> Self {
        let has = |bit| entry & bit != 0;
        Self {
            present: has(PRESENT),
            swapped: has(SWAPPED),
            file: has(FILE),
            exclusive: has(EXCLUSIVE),
            write_protected: has(WRITE_PROTECTED),
            soft_dirty: has(SOFT_DIRTY),
        }
    }

    /// The page is there and belongs to this mapping alone: in a private mapping of a file, the private copy.
    pub fn is_private(self) -> bool {
        self.present && !self.file
    }
}

/// The page tables of this process, as `/proc/self/pagemap` shows them.
#[derive(Debug, Clone, Copy)]
pub struct PageMap;

impl PageMap {
    /// The state of each page of `range`, in order, in the place of what `into` held. Each is true of its own moment.
    /// Where nothing is mapped, nothing is set.
    ///
    /// # Errors
    /// [`PageMapError::Unaligned`], [`PageMapError::Read`]; `into` is then empty.
    pub fn read(kernel: &Kernel, range: HvaRange, into: &mut Vec<PageState>) -> Result<(), PageMapError> {
        into.clear();
        let page_size = crate::uffd::page_size();
        if !range.is_aligned(page_size) {
            return Err(PageMapError::Unaligned { range, page_size });
        }
        let mut entries = Vec::new();
        kernel.read_pagemap(range, &mut entries).map_err(|source| PageMapError::Read { range, source })?;
        into.extend(entries.into_iter().map(PageState::of));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_those_of_the_documentation() {
        let state = PageState::of(0xa200_0000_0000_0000);
        assert_eq!(state, PageState { present: true, file: true, write_protected: true, ..PageState::default() });
        assert!(!state.is_private());
        let state = PageState::of(0x8180_0000_0000_1234);
        assert_eq!(state, PageState { present: true, exclusive: true, soft_dirty: true, ..PageState::default() });
        assert!(state.is_private());
        assert_eq!(PageState::of(1 << 62), PageState { swapped: true, ..PageState::default() });
    }
}
