// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the mappings inside given ranges hold: `/proc/self/smaps`, summed in one pass.
//!
//! The kernel tells these numbers for whole mappings only. A mapping that lies across the edge of the ranges is
//! therefore an error: counted whole or left out, it would make a number wrong without a sign. Ranges that touch count
//! as one, so two guests whose memory the kernel made one mapping of are no such case. Memory beside a range has the
//! range's mapping only if it is mapped in the same way in every respect; a hole of a page on each side rules it out,
//! and so does marking the range for KSM.
//!
//! Every number is cut to whole KiB, and `Pss` is no whole number of pages where frames are shared: of `n` mappings it
//! is short of up to `n` KiB. Where many small mappings are compared, [`frames`](super::frames) counts exactly.

use std::{
    fs::File,
    io::{self, BufRead, BufReader},
    path::PathBuf,
};

use notifier_core::{AddrRange, Hva, HvaRange};

use super::Paths;

/// Mappings that cannot be summed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SmapsError {
    /// The file cannot be read.
    #[error("reading {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The host's error.
        source: io::Error,
    },
    /// A line is none of smaps.
    #[error("line {number} of the mappings makes no sense: {text:?}")]
    Line {
        /// Its number, from 1.
        number: u64,
        /// Its beginning.
        text: String,
    },
    /// A mapping lies across the edge of the ranges.
    #[error("the mapping {:#x}-{:#x} lies across an edge of {:#x}-{:#x}: its numbers are known as a whole only",
        mapping.start(), mapping.end(), range.start(), range.end())]
    AcrossEdge {
        /// The mapping.
        mapping: HvaRange,
        /// The range, with those that touch it.
        range: HvaRange,
    },
    /// A sum is more than 64 bits hold.
    #[error("the sum of {field} is more than 2^64 bytes at line {number}")]
    Overflow {
        /// What was summed.
        field: &'static str,
        /// The line, from 1.
        number: u64,
    },
}

/// Sums over mappings, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
pub struct Sums {
    /// How many mappings.
    pub mappings: u64,
    /// Address space.
    pub size: u64,
    /// Present pages; the zero page is not counted.
    pub rss: u64,
    /// The same, each page divided by how often it is mapped.
    pub pss: u64,
    /// Present pages mapped more than once, equal to what backs them.
    pub shared_clean: u64,
    /// Present pages mapped more than once, written.
    pub shared_dirty: u64,
    /// Present pages mapped once, equal to what backs them.
    pub private_clean: u64,
    /// Present pages mapped once, written.
    pub private_dirty: u64,
    /// Present pages that belong to no file, those of KSM among them.
    pub anonymous: u64,
    /// Present pages that lead to a frame KSM shares; the zero page is not counted. `None` where there are mappings and
    /// this kernel does not tell: the line is younger than KSM.
    pub ksm: Option<u64>,
    /// Pages swapped out.
    pub swap: u64,
    /// Address space of mappings marked for KSM (`mg` among their flags).
    pub mergeable: u64,
}

/// A mapping and what smaps says of it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mapping {
    pub(super) range: HvaRange,
    pub(super) sums: Sums,
}

/// The ranges in order, those that touch or overlap as one.
fn union(ranges: &[HvaRange]) -> Vec<HvaRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable_by_key(HvaRange::start);
    let mut union: Vec<HvaRange> = Vec::with_capacity(sorted.len());
    for range in sorted {
        match union.last_mut() {
            Some(last) if range.start() <= last.end() => {
                if let Ok(both) = AddrRange::new(last.start(), last.end().max(range.end())) {
                    *last = both;
                }
            }
            _ => union.push(range),
        }
    }
    union
}

/// `start-end` in hexadecimal, the first word of a mapping's first line.
fn head(line: &[u8]) -> Option<HvaRange> {
    let word = line.split(|&b| b == b' ').next()?;
    let (start, end) = std::str::from_utf8(word).ok()?.split_once('-')?;
    let address = |digits| u64::from_str_radix(digits, 16).ok().map(Hva::new);
    AddrRange::new(address(start)?, address(end)?).ok()
}

/// `   12 kB` in bytes.
fn bytes(value: &[u8]) -> Option<u64> {
    let digits = value.trim_ascii().strip_suffix(b" kB")?;
    let kib: u64 = std::str::from_utf8(digits).ok()?.trim_ascii().parse().ok()?;
    kib.checked_mul(1024)
}

/// Calls `each` with every mapping inside `ranges`, in order of addresses.
fn visit(
    mut lines: impl BufRead,
    path: &std::path::Path,
    ranges: &[HvaRange],
    mut each: impl FnMut(Mapping, u64) -> Result<(), SmapsError>,
) -> Result<(), SmapsError> {
    let union = union(ranges);
    let mut ahead = union.iter().copied().peekable();
    let mut current: Option<Mapping> = None;
    let (mut line, mut number, mut seen) = (Vec::new(), 0, false);
    loop {
        line.clear();
        let read = lines.read_until(b'\n', &mut line);
        if read.map_err(|source| SmapsError::Read { path: path.into(), source })? == 0 {
            break;
        }
        number += 1;
        let nonsense = |line: &[u8]| SmapsError::Line {
            number,
            text: String::from_utf8_lossy(&line[..line.len().min(80)]).trim_end().into(),
        };
        // Addresses are in lower case, names of numbers begin in upper case.
        if !line.first().is_some_and(u8::is_ascii_uppercase) {
            if let Some(mapping) = current.take() {
                each(mapping, number)?;
            }
            seen = true;
            let range = head(&line).ok_or_else(|| nonsense(&line))?;
            while ahead.next_if(|next| next.end() <= range.start()).is_some() {}
            // Addresses ascend: the rest of the file is of no interest.
            let Some(next) = ahead.peek() else { return Ok(()) };
            if next.overlaps(&range) {
                if !next.covers(&range) {
                    return Err(SmapsError::AcrossEdge { mapping: range, range: *next });
                }
                current = Some(Mapping { range, sums: Sums { mappings: 1, size: range.len(), ..Sums::default() } });
            }
            continue;
        }
        if !seen {
            return Err(nonsense(&line));
        }
        let Some(Mapping { sums, .. }) = &mut current else { continue };
        let Some(colon) = line.iter().position(|&b| b == b':') else { return Err(nonsense(&line)) };
        let (name, value) = (&line[..colon], &line[colon + 1..]);
        let field = match name {
            b"Rss" => &mut sums.rss,
            b"Pss" => &mut sums.pss,
            b"Shared_Clean" => &mut sums.shared_clean,
            b"Shared_Dirty" => &mut sums.shared_dirty,
            b"Private_Clean" => &mut sums.private_clean,
            b"Private_Dirty" => &mut sums.private_dirty,
            b"Anonymous" => &mut sums.anonymous,
            b"KSM" => sums.ksm.insert(0),
            b"Swap" => &mut sums.swap,
            b"VmFlags" => {
                if value.split(u8::is_ascii_whitespace).any(|flag| flag == b"mg") {
                    sums.mergeable = sums.size;
                }
                continue;
            }
            // Newer kernels tell more than is asked for.
            _ => continue,
        };
        *field = bytes(value).ok_or_else(|| nonsense(&line))?;
    }
    match current {
        Some(mapping) => each(mapping, number),
        None => Ok(()),
    }
}

impl Sums {
    /// Those of no mapping.
    fn none() -> Self {
        Self { ksm: Some(0), ..Self::default() }
    }

    /// The mappings of this process that lie inside `ranges`, as they are now. A range that is not mapped, or in part,
    /// is no error: `size` tells.
    ///
    /// The kernel looks at every page of the mappings up to the last range's end: some 60 000 mappings are read in well
    /// under a second. While others map or unmap memory, the file is right for each mapping but not for all at one
    /// time.
    ///
    /// # Errors
    /// [`SmapsError::AcrossEdge`]; [`SmapsError::Read`]; [`SmapsError::Line`]; [`SmapsError::Overflow`].
    pub fn of(paths: &Paths, ranges: &[HvaRange]) -> Result<Self, SmapsError> {
        let mut sums = Self::none();
        open(paths, ranges, |mapping, number| sums.add(&mapping.sums, number))?;
        Ok(sums)
    }

    /// The same, from text in the form of smaps.
    ///
    /// # Errors
    /// As [`Self::of`].
    pub fn parse(text: impl BufRead, ranges: &[HvaRange]) -> Result<Self, SmapsError> {
        let mut sums = Self::none();
        visit(text, "smaps".as_ref(), ranges, |mapping, number| sums.add(&mapping.sums, number))?;
        Ok(sums)
    }

    fn add(&mut self, other: &Self, number: u64) -> Result<(), SmapsError> {
        let fields = [
            (&mut self.mappings, other.mappings, "mappings"),
            (&mut self.size, other.size, "Size"),
            (&mut self.rss, other.rss, "Rss"),
            (&mut self.pss, other.pss, "Pss"),
            (&mut self.shared_clean, other.shared_clean, "Shared_Clean"),
            (&mut self.shared_dirty, other.shared_dirty, "Shared_Dirty"),
            (&mut self.private_clean, other.private_clean, "Private_Clean"),
            (&mut self.private_dirty, other.private_dirty, "Private_Dirty"),
            (&mut self.anonymous, other.anonymous, "Anonymous"),
            (&mut self.swap, other.swap, "Swap"),
            (&mut self.mergeable, other.mergeable, "mergeable"),
        ];
        for (sum, more, field) in fields {
            *sum = sum.checked_add(more).ok_or(SmapsError::Overflow { field, number })?;
        }
        self.ksm = match (self.ksm, other.ksm) {
            (Some(sum), Some(more)) => {
                Some(sum.checked_add(more).ok_or(SmapsError::Overflow { field: "KSM", number })?)
            }
            _ => None,
        };
        Ok(())
    }
}

/// [`visit`] on this process's own file.
pub(super) fn open(
    paths: &Paths,
    ranges: &[HvaRange],
    each: impl FnMut(Mapping, u64) -> Result<(), SmapsError>,
) -> Result<(), SmapsError> {
    let path = paths.proc.join("self/smaps");
    let file = File::open(&path).map_err(|source| SmapsError::Read { path: path.clone(), source })?;
    visit(BufReader::with_capacity(1 << 18, file), &path, ranges, each)
}
