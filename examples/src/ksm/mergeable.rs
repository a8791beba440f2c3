// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory marked for KSM, and whether the kernel took the mark.
//!
//! `madvise(MADV_MERGEABLE)` says yes to memory that KSM cannot merge, and does nothing: a shared mapping, huge pages
//! of hugetlbfs, device memory (`vma_ksm_compatible` in `mm/ksm.c`). Only the mapping's flags tell, so [`mark`] reads
//! them.

use notifier_core::{AddrRange, Hva, HvaRange, RangeError};
use rustix::{
    io::Errno,
    mm::{Advice, madvise},
};
use vm_memory::{GuestMemoryBackend, GuestMemoryError, GuestMemoryRegion, MemoryRegionAddress};

use super::{
    Paths,
    smaps::{self, SmapsError, Sums},
};

/// Memory that is not marked, or is not unmarked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MergeableError {
    /// A range does not begin and end at a page: no call was made.
    #[error("{:#x}-{:#x} is not made of whole pages of {page} bytes", range.start(), range.end())]
    Unaligned {
        /// The range.
        range: HvaRange,
        /// Bytes of a host page.
        page: u64,
    },
    /// The kernel refused: `EINVAL` where it has no KSM, `ENOMEM` where part of the range is not mapped. The ranges
    /// before this one, and the mapped part of it, have the mark already.
    #[error("madvise of {:#x}-{:#x}: {source}", range.start(), range.end())]
    Refused {
        /// The range.
        range: HvaRange,
        /// The host's error.
        source: Errno,
    },
    /// The kernel said yes and did nothing: KSM merges private memory without a device behind it, no other.
    #[error("the kernel ignored the mark on {:#x}-{:#x}: KSM merges private anonymous pages only",
        mapping.start(), mapping.end())]
    Ignored {
        /// The first mapping without the mark.
        mapping: HvaRange,
    },
    /// The flags cannot be read.
    #[error(transparent)]
    Flags(#[from] SmapsError),
    /// A region of guest memory has no host address.
    #[error(transparent)]
    Region(#[from] GuestMemoryError),
    /// A region of guest memory is empty.
    #[error(transparent)]
    Range(#[from] RangeError),
}

/// Where the regions of `memory` lie in this process, in order of guest addresses.
///
/// # Errors
/// [`MergeableError::Region`] where a region is not mapped; [`MergeableError::Range`].
pub fn host_ranges<M: GuestMemoryBackend>(memory: &M) -> Result<Vec<HvaRange>, MergeableError> {
    let range = |region: &M::R| -> Result<HvaRange, MergeableError> {
        let start = region.get_host_address(MemoryRegionAddress(0))?;
        Ok(AddrRange::with_len(Hva::new(start as u64), region.len())?)
    };
    memory.iter().map(range).collect()
}

/// What is to be told to the kernel.
#[derive(Clone, Copy)]
enum Mark {
    Mergeable,
    Unmergeable,
}

fn advise(ranges: &[HvaRange], mark: Mark) -> Result<(), MergeableError> {
    let page = rustix::param::page_size() as u64;
    for &range in ranges {
        if !range.start().is_aligned(page) || !range.end().is_aligned(page) {
            return Err(MergeableError::Unaligned { range, page });
        }
    }
    let advice = match mark {
        Mark::Mergeable => Advice::LinuxMergeable,
        Mark::Unmergeable => Advice::LinuxUnmergeable,
    };
    for &range in ranges {
        let start = std::ptr::without_provenance_mut(range.start().as_u64() as usize);
        // SAFETY: these two advices change how pages are backed and nothing that a program can see of them: neither
        // contents nor rights nor whether they are mapped (madvise(2)). So any range will do, whoever owns it.
        #[allow(unsafe_code)]
        unsafe { madvise(start, range.len() as usize, advice) }
            .map_err(|source| MergeableError::Refused { range, source })?;
    }
    Ok(())
}

/// Marks `ranges` for KSM and reads back whether the mark is there. A mark splits the mappings at the ranges' ends.
///
/// # Errors
/// [`MergeableError::Unaligned`]; [`MergeableError::Refused`]; [`MergeableError::Ignored`];
/// [`MergeableError::Flags`] where a mapping cannot be looked at. But for the first, ranges may have the mark then.
pub fn mark(paths: &Paths, ranges: &[HvaRange]) -> Result<(), MergeableError> {
    advise(ranges, Mark::Mergeable)?;
    let mut without = None;
    smaps::open(paths, ranges, |mapping, _| {
        if mapping.sums.mergeable == 0 {
            without.get_or_insert(mapping.range);
        }
        Ok(())
    })?;
    match without {
        Some(mapping) => Err(MergeableError::Ignored { mapping }),
        None => Ok(()),
    }
}

/// Takes the mark off `ranges`, and with it every merge in them: each merged page gets a frame of its own again before
/// this returns.
///
/// # Errors
/// [`MergeableError::Unaligned`]; [`MergeableError::Refused`], with `ENOMEM` also where the host has no memory for the
/// frames; [`MergeableError::Flags`].
pub fn unmark(paths: &Paths, ranges: &[HvaRange]) -> Result<Sums, MergeableError> {
    advise(ranges, Mark::Unmergeable)?;
    Ok(Sums::of(paths, ranges)?)
}
