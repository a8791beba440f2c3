// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How many different frames given ranges have: the exact answer to how much memory merging returned, for who may ask.
//!
//! From `/proc/self/pagemap` (Documentation/admin-guide/mm/pagemap.rst): bit 63 says that a page is present, bits 0..54
//! are its frame, which the kernel shows as zero to a process without `CAP_SYS_ADMIN`.

use std::{collections::TryReserveError, fs::File, io, os::unix::fs::FileExt, path::PathBuf};

use notifier_core::HvaRange;

use super::Paths;

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// Bytes of an entry.
const ENTRY: usize = 8;

/// Frames that cannot be counted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FramesError {
    /// The file cannot be read.
    #[error("reading {} for {:#x}-{:#x}: {source}", path.display(), range.start(), range.end())]
    Read {
        /// The file.
        path: PathBuf,
        /// The range that was being read.
        range: HvaRange,
        /// The host's error.
        source: io::Error,
    },
    /// The process may not know frames.
    #[error("the kernel does not show this process its frames: that takes CAP_SYS_ADMIN")]
    Hidden,
    /// No memory for the list.
    #[error("no memory to count frames in: {0}")]
    NoMemory(#[from] TryReserveError),
}

/// Pages and frames of ranges.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Frames {
    /// Pages that are present. A page that lies in two of the ranges counts twice.
    pub present: u64,
    /// Different frames among them. The zero page counts as one.
    pub distinct: u64,
}

impl Frames {
    /// Those of `ranges` now. Takes eight bytes for each present page while it counts.
    ///
    /// # Errors
    /// [`FramesError::Hidden`] where something is present and the process may not know its frame;
    /// [`FramesError::Read`]; [`FramesError::NoMemory`].
    pub fn of(paths: &Paths, ranges: &[HvaRange]) -> Result<Self, FramesError> {
        let page = rustix::param::page_size() as u64;
        let path = paths.proc.join("self/pagemap");
        let mut frames: Vec<u64> = Vec::new();
        let mut entries = vec![0; 4096 * ENTRY];
        for &range in ranges {
            let failed = |source| FramesError::Read { path: path.clone(), range, source };
            let file = File::open(&path).map_err(failed)?;
            let mut next = range.start().as_u64() / page;
            let end = range.end().as_u64().div_ceil(page);
            while next < end {
                let count = usize::try_from(end - next).unwrap_or(usize::MAX).min(4096);
                let chunk = &mut entries[..count * ENTRY];
                file.read_exact_at(chunk, next * ENTRY as u64).map_err(failed)?;
                frames.try_reserve(count)?;
                let (chunks, _) = chunk.as_chunks::<ENTRY>();
                for entry in chunks.iter().map(|bytes| u64::from_ne_bytes(*bytes)).filter(|entry| entry & PRESENT != 0)
                {
                    if entry & FRAME == 0 {
                        return Err(FramesError::Hidden);
                    }
                    frames.push(entry & FRAME);
                }
                next += count as u64;
            }
        }
        let present = frames.len() as u64;
        frames.sort_unstable();
        frames.dedup();
        Ok(Self { present, distinct: frames.len() as u64 })
    }
}
