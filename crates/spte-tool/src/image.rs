// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table that lies in a raw image of memory: somebody else's, so nothing in it is believed.
//!
//! Entries are read as hardware reads them. Depth is bounded by the format's levels, so a loop ends; a link to a table that
//! is already on the way down is shown and not followed; and the number of rows is bounded by the caller.

use std::io::{self, Read, Seek, SeekFrom};

use notifier_core::OutputAddr;
use spte_core::format::{EntryError, Kind, Level};
use spte_core::raw::HardwareKind;
use thiserror::Error;

use crate::format::ToolFormat;

/// Why a table could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The root is no multiple of its size.
    #[error("the root {root:#x} is not aligned to {align:#x} bytes")]
    Unaligned {
        /// The root.
        root: u64,
        /// What it must be a multiple of.
        align: u64,
    },
    /// Not all bytes of a table are in the image.
    #[error("the table at {table:#x} is outside the image, which has {base:#x} to {end:#x}")]
    Outside {
        /// The table's address.
        table: u64,
        /// First address of the image.
        base: u64,
        /// The address behind its last byte.
        end: u64,
    },
    /// The image could not be read.
    #[error("reading the table at {table:#x}: {source}")]
    Read {
        /// The table's address.
        table: u64,
        /// What failed.
        source: io::Error,
    },
    /// The image's length could not be found out.
    #[error("finding the end of the image: {source}")]
    Length {
        /// What failed.
        source: io::Error,
    },
    /// The image would reach beyond 64 bits.
    #[error("an image of {len:#x} bytes from {base:#x} passes 64 bits")]
    TooLarge {
        /// First address of the image.
        base: u64,
        /// Its bytes.
        len: u64,
    },
    /// There are more rows than the caller wants.
    #[error("more than {limit} rows; the next is at {gpa:#x}")]
    Rows {
        /// The limit.
        limit: u64,
        /// Guest address of the entry that was not shown.
        gpa: u64,
    },
}

/// Bytes of memory from an address on.
#[derive(Debug)]
pub struct Image<R> {
    bytes: R,
    base: u64,
    end: u64,
}

impl<R: Read + Seek> Image<R> {
    /// Memory whose first byte has the address `base`.
    ///
    /// # Errors
    /// [`ImageError::Length`], [`ImageError::TooLarge`].
    pub fn new(mut bytes: R, base: u64) -> Result<Self, ImageError> {
        let len = bytes.seek(SeekFrom::End(0)).map_err(|source| ImageError::Length { source })?;
        let end = base.checked_add(len).ok_or(ImageError::TooLarge { base, len })?;
        Ok(Self { bytes, base, end })
    }

    /// The entries of the table at `table`, as numbers.
    fn table<F: ToolFormat>(&mut self, format: &F, level: Level, table: u64) -> Result<Vec<u64>, ImageError> {
        let bytes = format.geometry().table_bytes(level);
        let outside = ImageError::Outside { table, base: self.base, end: self.end };
        let inside = table >= self.base && table.checked_add(bytes as u64).is_some_and(|end| end <= self.end);
        if !inside {
            return Err(outside);
        }
        let mut buffer = vec![0; bytes];
        let read = self.bytes.seek(SeekFrom::Start(table - self.base)).and_then(|_| self.bytes.read_exact(&mut buffer));
        read.map_err(|source| ImageError::Read { table, source })?;
        let number = |chunk: &[u8]| {
            // As a little-endian machine loads it; what the architecture means by that is the format's to say.
            format.raw_of(chunk.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte)))
        };
        Ok(buffer.chunks_exact(8).map(number).collect())
    }
}

/// Why a row goes no further than itself.
#[derive(Debug)]
pub enum Trouble {
    /// Hardware refuses the entry.
    Impossible(EntryError),
    /// The table that it links to could not be read.
    Unread(ImageError),
    /// It links to a table on the way down to it.
    Loop {
        /// The address of that table.
        table: OutputAddr,
    },
}

/// One entry that is not empty.
#[derive(Debug)]
pub struct Entry {
    /// The level of the table it stands in.
    pub level: Level,
    /// First guest address that it spans.
    pub gpa: u64,
    /// Its value, all bits.
    pub raw: u64,
    /// What hardware takes it for.
    pub reading: HardwareKind,
    /// What is wrong with it.
    pub trouble: Option<Trouble>,
}

/// Where a table is, and what of it is shown.
#[derive(Debug, Clone, Copy)]
pub struct Walk<'a> {
    /// Address of the root.
    pub root: u64,
    /// Addresses of tables that hold nothing: a link to one of them is an empty entry.
    pub empty: &'a [u64],
    /// The most rows.
    pub limit: u64,
}

/// Whether there is nothing: zero, this workspace's value for nothing, or facts that hardware wrote late into either.
fn is_empty<F: ToolFormat>(format: &F, level: Level, raw: u64) -> bool {
    raw == 0
        || raw == format.not_present(level).absent
        || (format.late_facts() && format.kind(level, raw) == Kind::Absent)
}

/// Shows every entry of a table that is not empty: ascending, links before what is below them. Stops with the first error of
/// `show`.
///
/// # Errors
/// [`ImageError`] for the root, or for too many rows; whatever `show` returns. A link to a table that is not in the image
/// is a row with a [`Trouble`], and the rest is still shown.
pub fn walk<F, R, E>(
    format: &F,
    image: &mut Image<R>,
    walk: Walk<'_>,
    mut show: impl FnMut(Entry) -> Result<(), E>,
) -> Result<(), E>
where
    F: ToolFormat,
    R: Read + Seek,
    E: From<ImageError>,
{
    let Walk { root, empty, limit } = walk;
    let geometry = *format.geometry();
    let align = geometry.table_bytes(geometry.top()) as u64;
    if root % align != 0 {
        return Err(ImageError::Unaligned { root, align }.into());
    }
    struct Node {
        table: u64,
        level: Level,
        gpa: u64,
        entries: std::iter::Enumerate<std::vec::IntoIter<u64>>,
    }
    let entries = image.table(format, geometry.top(), root)?.into_iter().enumerate();
    let mut path = vec![Node { table: root, level: geometry.top(), gpa: 0, entries }];
    let mut rows = 0;
    while let Some(node) = path.last_mut() {
        let Some((index, raw)) = node.entries.next() else {
            path.pop();
            continue;
        };
        let level = node.level;
        if is_empty(format, level, raw) {
            continue;
        }
        let reading = format.reading(level, raw);
        if matches!(reading, HardwareKind::Table(to) if empty.contains(&to.as_u64())) {
            continue;
        }
        let gpa = node.gpa + ((index as u64) << geometry.level(level).shift);
        if rows == limit {
            return Err(ImageError::Rows { limit, gpa }.into());
        }
        rows += 1;
        let mut child = None;
        let trouble = match (reading, level.below()) {
            (HardwareKind::Impossible(why), _) => Some(Trouble::Impossible(why)),
            (HardwareKind::Table(to), Some(below)) => {
                let table = to.as_u64();
                if path.iter().any(|above| above.table == table) {
                    Some(Trouble::Loop { table: to })
                } else {
                    match image.table(format, below, table) {
                        Ok(entries) => {
                            child = Some(Node { table, level: below, gpa, entries: entries.into_iter().enumerate() });
                            None
                        }
                        Err(error) => Some(Trouble::Unread(error)),
                    }
                }
            }
            _ => None,
        };
        show(Entry { level, gpa, raw, reading, trouble })?;
        path.extend(child);
    }
    Ok(())
}
