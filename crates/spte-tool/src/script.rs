// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The script language: what a line says, and whether it may be asked of a table.
//!
//! One command a line; `#` begins a comment; blank lines say nothing. Words are separated by spaces (any ASCII white
//! space is taken for one) and are case-sensitive. Numbers are decimal or `0x` hex; sizes may also be decimal with one of
//! the units `k m g t`.

use std::fmt;

use notifier_core::Access;
use thiserror::Error;

/// A memory type, by the script's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mem {
    /// `wb`: write back, ordinary memory.
    #[default]
    WriteBack,
    /// `uc`: uncacheable; device memory where the format tells them apart.
    Uncacheable,
    /// `wc`: write combining.
    WriteCombining,
    /// `wt`: write through.
    WriteThrough,
}

/// Which leaves a `map` makes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Page {
    /// Leaves of exactly this many bytes.
    Size(u64),
    /// At each step the largest that both alignments and the remainder allow.
    Max,
}

/// What a `touch` does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// `r`: a load.
    Read,
    /// `w`: a store.
    Write,
    /// `x`: an instruction fetch.
    Execute,
}

/// A range of guest physical addresses: `size` bytes from `gpa`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
}

/// One command. `pa` is an output address; addresses and sizes are bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// `map GPA PA SIZE PERM [page=..] [mem=..]`.
    Map {
        /// Where.
        range: Range,
        /// What its first byte translates to.
        pa: u64,
        /// The rights asked for.
        rights: Access,
        /// Leaf sizes; `None` is the granule.
        page: Option<Page>,
        /// The memory type.
        mem: Mem,
    },
    /// `unmap GPA SIZE`.
    Unmap(Range),
    /// `protect GPA SIZE PERM`.
    Protect {
        /// Where.
        range: Range,
        /// The rights from now on.
        rights: Access,
    },
    /// `wrprotect GPA SIZE`.
    WriteProtect(Range),
    /// `touch GPA r|w|x`.
    Touch {
        /// The byte.
        gpa: u64,
        /// What is done to it.
        kind: Touch,
    },
    /// `age GPA SIZE`.
    Age(Range),
    /// `dirty GPA SIZE`.
    Dirty(Range),
    /// `change GPA PA`.
    Change {
        /// The page.
        gpa: u64,
        /// What it translates to from now on.
        pa: u64,
    },
    /// `zapchange GPA PA`.
    ZapChange {
        /// The page.
        gpa: u64,
        /// What it would have been repointed to.
        pa: u64,
    },
    /// `split GPA SIZE`.
    Split(Range),
    /// `collapse GPA SIZE`.
    Collapse(Range),
    /// `walk GPA`.
    Walk {
        /// The byte.
        gpa: u64,
    },
    /// `flushes`.
    Flushes,
    /// `stats`.
    Stats,
    /// `dump`.
    Dump,
}

/// Why a line is not a command.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum ParseError {
    /// The line is not text.
    #[error("the line is not UTF-8")]
    NotText,
    /// The first word is no command.
    #[error("unknown command {word:?}")]
    Command {
        /// The word.
        word: String,
    },
    /// The line ends too early.
    #[error("{what} is missing")]
    Missing {
        /// What should have come next.
        what: &'static str,
    },
    /// A word is not what belongs in its place.
    #[error("{word:?} is not {what}")]
    Word {
        /// The word.
        word: String,
        /// What belongs there.
        what: &'static str,
    },
    /// A number of more than 64 bits.
    #[error("{word:?} does not fit 64 bits")]
    TooLarge {
        /// The word.
        word: String,
    },
    /// The line goes on where it should end, or says an option twice.
    #[error("unexpected word {word:?}")]
    Extra {
        /// The word.
        word: String,
    },
}

/// Which number of a command is wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Quantity {
    /// GPA.
    Guest,
    /// PA.
    Output,
    /// SIZE.
    Size,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Guest => "guest address",
            Self::Output => "output address",
            Self::Size => "size",
        })
    }
}

/// Why a command is malformed: no table is asked it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum Malformed {
    /// A range of no bytes.
    #[error("the size is 0")]
    SizeZero,
    /// No multiple of the granule.
    #[error("{what} {value:#x} is not aligned to {granule:#x}")]
    Misaligned {
        /// Which number.
        what: Quantity,
        /// Its value.
        value: u64,
        /// The granule, in bytes.
        granule: u64,
    },
    /// The range does not end within 64 bits.
    #[error("{what} {addr:#x} wraps around with size {size:#x}")]
    Wraps {
        /// Which address.
        what: Quantity,
        /// Its value.
        addr: u64,
        /// The size of the range, in bytes.
        size: u64,
    },
    /// The last byte is beyond the configured bits.
    #[error("{what} {last:#x} is beyond {bits} bits")]
    Beyond {
        /// Which address.
        what: Quantity,
        /// The last byte asked for.
        last: u64,
        /// Configured bits.
        bits: u32,
    },
}

/// What addresses of a script must fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of the smallest page.
    pub granule: u64,
    /// Bits of a guest physical address.
    pub gpa_bits: u32,
    /// Bits of an output address.
    pub pa_bits: u32,
}

impl Limits {
    fn pages(&self, what: Quantity, addr: u64, size: u64) -> Result<(), Malformed> {
        if size == 0 {
            return Err(Malformed::SizeZero);
        }
        let granule = self.granule;
        for (what, value) in [(what, addr), (Quantity::Size, size)] {
            if value % granule != 0 {
                return Err(Malformed::Misaligned { what, value, granule });
            }
        }
        self.within(what, addr, size)
    }

    /// `size` is not 0.
    fn within(&self, what: Quantity, addr: u64, size: u64) -> Result<(), Malformed> {
        let bits = if what == Quantity::Output { self.pa_bits } else { self.gpa_bits };
        let last = addr.checked_add(size - 1).ok_or(Malformed::Wraps { what, addr, size })?;
        if bits < 64 && last >> bits != 0 {
            return Err(Malformed::Beyond { what, last, bits });
        }
        Ok(())
    }

    fn range(&self, range: Range) -> Result<(), Malformed> {
        self.pages(Quantity::Guest, range.gpa, range.size)
    }
}

impl Command {
    /// Its first word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Map { .. } => "map",
            Self::Unmap(_) => "unmap",
            Self::Protect { .. } => "protect",
            Self::WriteProtect(_) => "wrprotect",
            Self::Touch { .. } => "touch",
            Self::Age(_) => "age",
            Self::Dirty(_) => "dirty",
            Self::Change { .. } => "change",
            Self::ZapChange { .. } => "zapchange",
            Self::Split(_) => "split",
            Self::Collapse(_) => "collapse",
            Self::Walk { .. } => "walk",
            Self::Flushes => "flushes",
            Self::Stats => "stats",
            Self::Dump => "dump",
        }
    }

    /// Whether the command may be asked of a table with these limits. `touch` and `walk` name any byte, all others whole
    /// pages.
    ///
    /// # Errors
    /// The first rule it breaks, in the order size 0, misaligned, wrap-around, beyond the bits; the guest range before the
    /// output range.
    pub fn check(&self, limits: &Limits) -> Result<(), Malformed> {
        match *self {
            Self::Map { range, pa, .. } => {
                limits.range(range)?;
                limits.pages(Quantity::Output, pa, range.size)
            }
            Self::Unmap(range)
            | Self::Protect { range, .. }
            | Self::WriteProtect(range)
            | Self::Age(range)
            | Self::Dirty(range)
            | Self::Split(range)
            | Self::Collapse(range) => limits.range(range),
            Self::Change { gpa, pa } | Self::ZapChange { gpa, pa } => {
                limits.pages(Quantity::Guest, gpa, limits.granule)?;
                limits.pages(Quantity::Output, pa, limits.granule)
            }
            Self::Touch { gpa, .. } | Self::Walk { gpa } => limits.within(Quantity::Guest, gpa, 1),
            Self::Flushes | Self::Stats | Self::Dump => Ok(()),
        }
    }
}

/// The command of one line, `None` where it has none. The line may end in `\n` or `\r\n`.
///
/// # Errors
/// [`ParseError`]. What is behind `#` is not looked at, and need not be UTF-8.
pub fn parse(line: &[u8]) -> Result<Option<Command>, ParseError> {
    let said = line.split(|byte| *byte == b'#').next().unwrap_or_default();
    let said = std::str::from_utf8(said).map_err(|_| ParseError::NotText)?;
    let mut words = Words(said.split_ascii_whitespace());
    let Some(command) = words.0.next() else { return Ok(None) };
    let command = match command {
        "map" => {
            let (gpa, pa, size) = (words.address("GPA")?, words.address("PA")?, words.size()?);
            let rights = words.rights()?;
            let (page, mem) = words.options()?;
            Command::Map { range: Range { gpa, size }, pa, rights, page, mem }
        }
        "unmap" => Command::Unmap(words.range()?),
        "protect" => Command::Protect { range: words.range()?, rights: words.rights()? },
        "wrprotect" => Command::WriteProtect(words.range()?),
        "touch" => Command::Touch { gpa: words.address("GPA")?, kind: words.kind()? },
        "age" => Command::Age(words.range()?),
        "dirty" => Command::Dirty(words.range()?),
        "change" => Command::Change { gpa: words.address("GPA")?, pa: words.address("PA")? },
        "zapchange" => Command::ZapChange { gpa: words.address("GPA")?, pa: words.address("PA")? },
        "split" => Command::Split(words.range()?),
        "collapse" => Command::Collapse(words.range()?),
        "walk" => Command::Walk { gpa: words.address("GPA")? },
        "flushes" => Command::Flushes,
        "stats" => Command::Stats,
        "dump" => Command::Dump,
        word => return Err(ParseError::Command { word: word.into() }),
    };
    match words.0.next() {
        None => Ok(Some(command)),
        Some(word) => Err(ParseError::Extra { word: word.into() }),
    }
}

/// A number as a script or an option has it.
///
/// # Errors
/// [`ParseError::Word`] where it is none, [`ParseError::TooLarge`] where it does not fit 64 bits.
pub fn number(word: &str) -> Result<u64, ParseError> {
    digits(word, word, "a number (decimal, or hex with 0x)")
}

/// `from_str_radix` alone would take a sign, too.
fn digits(digits: &str, word: &str, what: &'static str) -> Result<u64, ParseError> {
    let (digits, radix) = digits.strip_prefix("0x").map_or((digits, 10), |hex| (hex, 16));
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(ParseError::Word { word: word.into(), what });
    }
    u64::from_str_radix(digits, radix).map_err(|_| ParseError::TooLarge { word: word.into() })
}

struct Words<'a>(std::str::SplitAsciiWhitespace<'a>);

impl<'a> Words<'a> {
    fn next(&mut self, what: &'static str) -> Result<&'a str, ParseError> {
        self.0.next().ok_or(ParseError::Missing { what })
    }

    fn address(&mut self, what: &'static str) -> Result<u64, ParseError> {
        let word = self.next(what)?;
        digits(word, word, "an address")
    }

    fn size(&mut self) -> Result<u64, ParseError> {
        let word = self.next("SIZE")?;
        for (unit, shift) in [('k', 10), ('m', 20), ('g', 30), ('t', 40)] {
            // Hex takes no unit: none is a hex digit, so one behind `0x` makes it no number.
            if let Some(count) = word.strip_suffix(unit).filter(|count| !count.starts_with("0x")) {
                let count = digits(count, word, "a size")?;
                return count.checked_mul(1 << shift).ok_or_else(|| ParseError::TooLarge { word: word.into() });
            }
        }
        digits(word, word, "a size")
    }

    fn range(&mut self) -> Result<Range, ParseError> {
        Ok(Range { gpa: self.address("GPA")?, size: self.size()? })
    }

    fn rights(&mut self) -> Result<Access, ParseError> {
        Ok(match self.next("PERM")? {
            "-" => Access::empty(),
            "r" => Access::READ,
            "w" => Access::WRITE,
            "x" => Access::EXECUTE,
            "rw" => Access::RW,
            "rx" => Access::RX,
            "wx" => Access::WRITE | Access::EXECUTE,
            "rwx" => Access::RWX,
            word => {
                let what = "a subset of rwx in that order, or -";
                return Err(ParseError::Word { word: word.into(), what });
            }
        })
    }

    fn kind(&mut self) -> Result<Touch, ParseError> {
        match self.next("r, w or x")? {
            "r" => Ok(Touch::Read),
            "w" => Ok(Touch::Write),
            "x" => Ok(Touch::Execute),
            word => Err(ParseError::Word { word: word.into(), what: "r, w or x" }),
        }
    }

    fn options(&mut self) -> Result<(Option<Page>, Mem), ParseError> {
        let (mut page, mut mem) = (None, None);
        for word in self.0.by_ref() {
            match word.split_once('=') {
                Some(("page", value)) if page.is_none() => {
                    page = Some(match value {
                        "4k" => Page::Size(4 << 10),
                        "16k" => Page::Size(16 << 10),
                        "64k" => Page::Size(64 << 10),
                        "2m" => Page::Size(2 << 20),
                        "32m" => Page::Size(32 << 20),
                        "512m" => Page::Size(512 << 20),
                        "1g" => Page::Size(1 << 30),
                        "max" => Page::Max,
                        _ => {
                            let what = "page=4k|16k|64k|2m|32m|512m|1g|max";
                            return Err(ParseError::Word { word: word.into(), what });
                        }
                    });
                }
                Some(("mem", value)) if mem.is_none() => {
                    mem = Some(match value {
                        "wb" => Mem::WriteBack,
                        "uc" => Mem::Uncacheable,
                        "wc" => Mem::WriteCombining,
                        "wt" => Mem::WriteThrough,
                        _ => return Err(ParseError::Word { word: word.into(), what: "mem=wb|uc|wc|wt" }),
                    });
                }
                _ => return Err(ParseError::Extra { word: word.into() }),
            }
        }
        Ok((page, mem.unwrap_or_default()))
    }
}
