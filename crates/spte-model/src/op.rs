// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations on a table: the one vocabulary of every test, fuzz target and tool.
//!
//! An [`Op`] prints as the line of the script language that means it, and parses back to itself.
//! Addresses and sizes are bytes. An `Op` may be malformed (see [`Op::check`]): whoever applies it
//! must say so, never panic.

use std::fmt;
use std::ops::{BitOr, Sub};

/// A set of rights: any of read, write and execute.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Access(u8);

impl Access {
    /// No right at all, `-` in a script.
    pub const NONE: Access = Access(0);
    /// Read.
    pub const R: Access = Access(1);
    /// Write.
    pub const W: Access = Access(2);
    /// Execute.
    pub const X: Access = Access(4);
    /// Read and write.
    pub const RW: Access = Access(3);
    /// Read and execute.
    pub const RX: Access = Access(5);
    /// Write and execute.
    pub const WX: Access = Access(6);
    /// Everything.
    pub const RWX: Access = Access(7);
    /// Every set there is, richest first.
    pub const ALL: [Access; 8] =
        [Access::RWX, Access::RW, Access::RX, Access::R, Access::X, Access::WX, Access::W, Access::NONE];

    /// Whether every right of `other` is in `self`.
    pub fn contains(self, other: Access) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for Access {
    type Output = Access;
    fn bitor(self, other: Access) -> Access {
        Access(self.0 | other.0)
    }
}

impl Sub for Access {
    type Output = Access;
    fn sub(self, other: Access) -> Access {
        Access(self.0 & !other.0)
    }
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Access::NONE {
            return f.write_str("-");
        }
        for (right, letter) in [(Access::R, "r"), (Access::W, "w"), (Access::X, "x")] {
            if self.contains(right) {
                f.write_str(letter)?;
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Memory type of a leaf, by the names of the script language.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemType {
    /// Write-back, ordinary memory.
    #[default]
    Wb,
    /// Uncached; device memory where the format tells them apart.
    Uc,
    /// Write-combining; normal non-cacheable where that is the name.
    Wc,
    /// Write-through.
    Wt,
}

impl MemType {
    /// Every memory type, the default first.
    pub const ALL: [MemType; 4] = [MemType::Wb, MemType::Uc, MemType::Wc, MemType::Wt];
}

impl fmt::Display for MemType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            MemType::Wb => "wb",
            MemType::Uc => "uc",
            MemType::Wc => "wc",
            MemType::Wt => "wt",
        })
    }
}

/// Which leaf sizes a `map` uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PageChoice {
    /// The granule: the smallest leaf.
    #[default]
    Granule,
    /// Leaves of exactly this many bytes. The script language has words for
    /// [`PageChoice::WORDS`] only.
    Size(u64),
    /// At each step the largest leaf that both alignments and the remainder allow.
    Max,
}

impl PageChoice {
    /// The named sizes of the script language, ascending, with their words.
    pub const WORDS: [(&'static str, u64); 7] = [
        ("4k", 4 << 10),
        ("16k", 16 << 10),
        ("64k", 64 << 10),
        ("2m", 2 << 20),
        ("32m", 32 << 20),
        ("512m", 512 << 20),
        ("1g", 1 << 30),
    ];
}

/// What kind of access a `touch` is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TouchKind {
    /// A load.
    Read,
    /// A store.
    Write,
    /// An instruction fetch.
    Execute,
}

impl TouchKind {
    /// The right that this access needs.
    pub fn needs(self) -> Access {
        match self {
            TouchKind::Read => Access::R,
            TouchKind::Write => Access::W,
            TouchKind::Execute => Access::X,
        }
    }
}

/// One operation on a table. `gpa` is a guest physical address, `out` an output address, `size` the
/// length of the range that begins at `gpa`.
#[allow(missing_docs)] // For the fields, which are the words of the line and explained above.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// Install leaves over a range where nothing is present.
    Map { gpa: u64, out: u64, size: u64, access: Access, page: PageChoice, mem: MemType },
    /// Remove what is present.
    Unmap { gpa: u64, size: u64 },
    /// Replace the rights of what is present.
    Protect { gpa: u64, size: u64, access: Access },
    /// Arm dirty logging on what is present (`wrprotect`).
    WriteProtect { gpa: u64, size: u64 },
    /// Access one byte, as a guest would.
    Touch { gpa: u64, kind: TouchKind },
    /// Count the young leaves and make them old.
    Age { gpa: u64, size: u64 },
    /// Harvest the written leaves and re-arm.
    Dirty { gpa: u64, size: u64 },
    /// Repoint one granule, read-only (Linux's `.change_pte`).
    Change { gpa: u64, out: u64 },
    /// Zap one granule where a repointing was asked for (`zapchange`).
    ZapChange { gpa: u64, out: u64 },
    /// Replace larger leaves by granules.
    Split { gpa: u64, size: u64 },
    /// Merge leaves into larger ones.
    Collapse { gpa: u64, size: u64 },
    /// Look an address up.
    Walk { gpa: u64 },
}

impl Op {
    /// The guest addresses that it names: the first, and how many bytes. That is one byte for `touch` and `walk`, and a page of
    /// `granule` bytes for `change` and `zap-change`.
    pub fn named(&self, granule: u64) -> (u64, u64) {
        match *self {
            Op::Map { gpa, size, .. }
            | Op::Unmap { gpa, size }
            | Op::Protect { gpa, size, .. }
            | Op::WriteProtect { gpa, size }
            | Op::Age { gpa, size }
            | Op::Dirty { gpa, size }
            | Op::Split { gpa, size }
            | Op::Collapse { gpa, size } => (gpa, size),
            Op::Change { gpa, .. } | Op::ZapChange { gpa, .. } => (gpa, granule),
            Op::Touch { gpa, .. } | Op::Walk { gpa } => (gpa, 1),
        }
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Op::Map { gpa, out, size, access, page, mem } => {
                write!(f, "map {gpa:#x} {out:#x} {size:#x} {access}")?;
                match page {
                    PageChoice::Granule => {}
                    PageChoice::Max => write!(f, " page=max")?,
                    PageChoice::Size(size) => match PageChoice::WORDS.iter().find(|word| word.1 == size) {
                        Some((word, _)) => write!(f, " page={word}")?,
                        None => write!(f, " page={size:#x}")?,
                    },
                }
                if mem != MemType::default() {
                    write!(f, " mem={mem}")?;
                }
                Ok(())
            }
            Op::Unmap { gpa, size } => write!(f, "unmap {gpa:#x} {size:#x}"),
            Op::Protect { gpa, size, access } => write!(f, "protect {gpa:#x} {size:#x} {access}"),
            Op::WriteProtect { gpa, size } => write!(f, "wrprotect {gpa:#x} {size:#x}"),
            Op::Touch { gpa, kind } => write!(f, "touch {gpa:#x} {}", kind.needs()),
            Op::Age { gpa, size } => write!(f, "age {gpa:#x} {size:#x}"),
            Op::Dirty { gpa, size } => write!(f, "dirty {gpa:#x} {size:#x}"),
            Op::Change { gpa, out } => write!(f, "change {gpa:#x} {out:#x}"),
            Op::ZapChange { gpa, out } => write!(f, "zapchange {gpa:#x} {out:#x}"),
            Op::Split { gpa, size } => write!(f, "split {gpa:#x} {size:#x}"),
            Op::Collapse { gpa, size } => write!(f, "collapse {gpa:#x} {size:#x}"),
            Op::Walk { gpa } => write!(f, "walk {gpa:#x}"),
        }
    }
}
