// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What software keeps in an entry, and entries that hold nothing.
//!
//! Hardware writes nothing into tables: accessed and dirty are learnt by V and D being clear.
//!
//! | | WRITE | MODIFIED | D | |
//! |---|---|---|---|---|
//! | writable | 1 | 1 | 1 | stores go through: it counts as written |
//! | armed | 1 | 0 or 1 | 0 | the next store traps once, and is let in by one compare-exchange |
//! | read-only | 0 | 0 or 1 | 0 | the host must be asked |
//!
//! V is ACCESSED (`pte_mkold` clears both, `pte_mkyoung` sets both; Linux leaves V clear in what may not be read, here
//! RI and XI say that). D with V clear is an old leaf that was written, and stays as it is when the leaf is used again.
//!
//! **There is no claim bit.** A link is an address that handlers load without a look at it, and an entry's bits are an
//! EntryLo; there is nothing to spare. So a claimed entry is transiently absent.
//!
//! # Values that hold nothing
//! In a table of pages [`ABSENT`] is zero, as in Linux; [`CLAIMED`] and [`DEAD`] have neither PRESENT nor V, and no bit that
//! ageing writes. In a directory none of the three may be a number that leads nowhere: a refill handler
//! loads pointer after pointer and tests none of them. So there the three are the addresses of three tables that hold nothing
//! either: [`Sentinels`]. (Linux: `invalid_pte_table`, `invalid_pmd_table`, `invalid_pud_table`; `pmd_none` and
//! `pud_none` compare with them.)

use notifier_core::OutputAddr;
use spte_core::format::{Level, NotPresent};

/// An entry of a table of pages that holds nothing.
pub const ABSENT: u64 = 0;
/// Somebody is deciding what goes here: bits 63, 60, 58, 56, 54.
pub const CLAIMED: u64 = 0x9540_0000_0000_0000;
/// An entry of an unlinked table of pages: bits 62, 61, 59, 53, 52.
pub const DEAD: u64 = 0x6830_0000_0000_0000;

/// Three for each level of directories: absent, claimed, dead.
const KINDS: u64 = 3;

/// The tables that empty directories lead to: pages in a row, three for each level of directories, from the lowest up, for
/// what is absent, claimed and dead there. Whoever lets hardware, or a refill handler, walk the table fills them once,
/// and never changes them.
///
/// The page with number `index` is a table of the level below that of the directory entries that lead to it, and every entry
/// of it is [`Sentinels::fill`]: zero in the first three, in the others the address of what is absent one level down. So every
/// walk ends at an entry with V clear.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sentinels {
    pub(crate) start: u64,
    pub(crate) page_shift: u8,
    pub(crate) top: Level,
    pub(crate) window: u64,
}

impl Sentinels {
    /// Physical address of the first page.
    pub const fn start(&self) -> OutputAddr {
        OutputAddr::new(self.start)
    }

    /// How many pages there are.
    pub const fn pages(&self) -> u64 {
        (self.top.get() as u64 - 1) * KINDS
    }

    /// Bytes of all of them.
    pub const fn bytes(&self) -> u64 {
        self.pages() << self.page_shift
    }

    /// What every entry of the page with this number is; in memory, [`Format::memory_of`] it. `None` behind the last.
    ///
    /// [`Format::memory_of`]: spte_core::Format::memory_of
    pub const fn fill(&self, index: u64) -> Option<u64> {
        if index >= self.pages() {
            None
        } else if index < KINDS {
            Some(ABSENT)
        } else {
            Some(self.address(index / KINDS - 1, 0))
        }
    }

    /// Whether a table at this address would be taken for nothing.
    pub(crate) const fn overlaps(&self, table: u64, bytes: u64) -> bool {
        table < self.start + self.bytes() && self.start < table + bytes
    }

    const fn address(&self, group: u64, kind: u64) -> u64 {
        self.window + self.start + ((group * KINDS + kind) << self.page_shift)
    }

    /// The value at a level of directories; `kind` 0, 1, 2 is absent, claimed, dead.
    const fn value(&self, level: Level, kind: u64) -> u64 {
        self.address(level.get() as u64 - 2, kind)
    }

    pub(crate) fn not_present(&self, level: Level) -> NotPresent {
        if level == Level::LEAF {
            NotPresent { absent: ABSENT, claimed: CLAIMED, dead: DEAD }
        } else {
            let value = |kind| self.value(level, kind);
            NotPresent { absent: value(0), claimed: value(1), dead: value(2) }
        }
    }
}

/// The states that a leaf may be in as to writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteState {
    /// Stores go through.
    Writable,
    /// Writing is withheld; one compare-exchange brings it back.
    Armed,
    /// The host must be asked.
    ReadOnly,
}
