// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bits that hardware leaves to software, and what this crate keeps in them; and entries that are not valid.
//!
//! | bit (IBM) | in a leaf | Linux |
//! |---|---|---|
//! | 0x800 (52) | [upgradable](UPGRADABLE): one compare-exchange may grant writing | `_PAGE_DEVMAP` |
//! | 0x400 (53) | the [user's](crate::RadixAttrs::software) | `_PAGE_SPECIAL` |
//! | 0x200 (54) | none | `_PAGE_SOFT_DIRTY` |
//! | 0x2000_0000_0000_0000 (2) | none | `_PAGE_INVALID` of an entry that is not valid |
//!
//! **There is no claim bit.** It would have to be one and the same bit in leaves and in directory entries, and these have none
//! for software: IBM bit 2, which is software's in a leaf, Linux counts among the bits that a directory entry must not have
//! (`RADIX_PMD_BAD_BITS`), and the low bits of NLB are address bits that tables of 256 bytes use. What a processor makes of
//! a reserved bit is not said; an "unsupported MMU configuration" interrupt is possible. So the engine claims a present entry
//! by making it invalid for the moment, which a guest may see as a fault that finds nothing to do.
//!
//! # Entries that are not valid
//! Hardware looks at V alone, but it may still write R and C into an entry that was just made invalid (Linux: "An empty PTE can
//! still have a R or C writeback", `RADIX_PTE_NONE_MASK`). So an entry is [`ABSENT`], [`CLAIMED`] or [`DEAD`] whatever these
//! two bits are, and C of such an entry is a write that somebody has to be told of
//! ([`Format::late_facts`](spte_core::format::Format::late_facts)). [`ABSENT`] is zero, as in Linux. The other two differ
//! from it and from each other in more than four bits, and would be no directory entry if V were set. Whatever else is not
//! valid is somebody else's, and left alone (Linux's temporarily invalid entry is one).

use spte_core::format::NotPresent;

use crate::bits::{CHANGED, REFERENCED, SW1, SW2};

/// IBM bit 52 of a leaf: writing was resolved. With it, and EAA\[2\] clear, the leaf is armed.
pub const UPGRADABLE: u64 = SW1;
/// IBM bit 53 of a leaf: the user's.
pub const USER: u64 = SW2;

/// The bits that hardware writes.
pub const HARDWARE: u64 = REFERENCED | CHANGED;

/// An entry that holds nothing.
pub const ABSENT: u64 = 0;
/// Somebody is deciding what goes here: bits 60:58, 10:9.
pub const CLAIMED: u64 = 0x1c00_0000_0000_0600;
/// An entry of an unlinked table: bits 57:56, 11, 6:5.
pub const DEAD: u64 = 0x0300_0000_0000_0860;

pub(crate) const NOT_PRESENT: NotPresent = NotPresent { absent: ABSENT, claimed: CLAIMED, dead: DEAD };

/// The states that a leaf may be in as to writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteState {
    /// The guest writes, and hardware, or the handler of its interrupt, sets C: EAA\[2\] and upgradable.
    Writable,
    /// Writing is withheld; one compare-exchange brings it back.
    Armed,
    /// The host must be asked.
    ReadOnly,
}
