// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an entry is impossible.
//!
//! Two questions are kept apart. [`Radix::check_hardware`] asks what the architecture and the processors of today say: reserved
//! bits, shapes of trees that they do not have, addresses that are too wide, and nothing for an entry that is not valid. It is the one
//! for trees that somebody else wrote, together with [`HardwareKind`]. `Format::check` asks that first and then this
//! crate's own rules, which are the bits of [`software`](crate::software), that writing implies reading as in Linux, that
//! the privileged bit is clear, and that RPN has no bits below the leaf's size (QEMU's walker leaves them out; Linux's, for guests that
//! are hypervisors, refuses the leaf: `kvmppc_mmu_walk_radix_tree`; what a processor does was found nowhere).
//!
//! Not every broken rule is an interrupt: reserved bits may be ignored by one processor and mean something to the next. A wrong NLS
//! is one (QEMU: `DSISR_R_BADCONFIG`; Linux: `DSISR_UNSUPP_MMU`).

use notifier_core::OutputAddr;
use spte_core::format::{EntryError, Format, Level};
pub use spte_core::raw::HardwareKind;

use crate::{
    bits::{
        ATT, LEAF, LEAF_RESERVED_HIGH, LEAF_RESERVED_LOW, LINK_RESERVED, NLB, NLS, PRIVILEGED, READ, RPN, SW0, SW3,
        VALID, WRITE, bit_range, number_of,
    },
    memtype::Storage,
    radix::Radix,
    software::UPGRADABLE,
};

impl Radix {
    /// What `raw` is to hardware at `level`.
    pub fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        if raw & VALID == 0 {
            return HardwareKind::NotPresent;
        }
        match self.check_hardware(level, raw) {
            Err(why) => HardwareKind::Impossible(why),
            Ok(()) if raw & LEAF != 0 => HardwareKind::Leaf,
            Ok(()) => HardwareKind::Table(OutputAddr::new(raw & NLB)),
        }
    }

    /// The reserved bits and impossible shapes of an entry.
    ///
    /// # Errors
    /// The rule that the entry breaks.
    pub fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if raw & VALID == 0 {
            return Ok(());
        }
        let bits = u32::from(self.options().physical_bits);
        if raw & LEAF == 0 {
            let Some(below) = level.below().filter(|_| level <= self.geometry().top()) else {
                return EntryError::require(
                    number_of(level),
                    raw,
                    false,
                    LEAF,
                    "an entry of level 1 that is valid is a leaf",
                );
            };
            EntryError::refuse(
                number_of(level),
                raw,
                raw & LINK_RESERVED,
                "IBM bits 2:3 and 56:58 of a directory entry are reserved",
            )?;
            let entries = u64::from(self.geometry().level(below).bits);
            let rule = "NLS is not the size of the next table in the one shape of tree that there is";
            EntryError::require(number_of(level), raw, raw & NLS == entries, NLS, rule)?;
            let wide = raw & NLB & !bit_range(bits - 1, 0);
            EntryError::refuse(number_of(level), raw, wide, "address bits above the physical address width")?;
            let inside = raw & NLB & (self.geometry().table_bytes(below) as u64 - 1);
            return EntryError::refuse(number_of(level), raw, inside, "a table is aligned to its own size");
        }
        EntryError::require(number_of(level), raw, self.has_leaves(level), LEAF, "this level has no leaves")?;
        let reserved = LEAF_RESERVED_HIGH | LEAF_RESERVED_LOW;
        EntryError::refuse(number_of(level), raw, raw & reserved, "IBM bits 3:6 and 57 of a leaf are reserved")?;
        let wide = raw & RPN & !bit_range(bits - 1, 0);
        EntryError::refuse(number_of(level), raw, wide, "address bits above the physical address width")?;
        let ordered = Storage::of(raw) == Storage::StrongOrder;
        let rule = "ATT 1, strong access order, is reserved since Power ISA 3.1";
        EntryError::require(number_of(level), raw, !ordered || self.options().strong_order, ATT, rule)
    }

    pub(crate) fn check_entry(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if raw & VALID == 0 {
            return Ok(());
        }
        self.check_hardware(level, raw)?;
        if raw & LEAF == 0 {
            return Ok(());
        }
        let low = raw & RPN & (self.geometry().span(level) - 1);
        EntryError::refuse(number_of(level), raw, low, "RPN bits below the size of the leaf are clear")?;
        EntryError::refuse(
            number_of(level),
            raw,
            raw & PRIVILEGED,
            "EAA[0], privileged, says nothing in a partition-scoped tree and is clear",
        )?;
        EntryError::refuse(number_of(level), raw, raw & (SW0 | SW3), "IBM bits 2 and 54 are nobody's")?;
        let readable = raw & READ != 0 || raw & (WRITE | UPGRADABLE) == 0;
        EntryError::require(
            number_of(level),
            raw,
            readable,
            READ,
            "writing implies reading, withheld or not, and EAA[1] says so",
        )?;
        let state = raw & (WRITE | UPGRADABLE) != WRITE;
        EntryError::require(number_of(level), raw, state, UPGRADABLE, "what may be written is upgradable")
    }
}
