// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an entry is impossible.
//!
//! Two questions are kept apart. [`Stage2::check_hardware`] asks what the architecture says: reserved encodings, RES0 bits,
//! addresses that are too wide, and nothing for an entry that is not valid. It is the one for tables that somebody else
//! wrote, together with [`HardwareKind`]. `Format::check` asks that first and then this crate's own rules, which
//! are the bits of [`software`](crate::software) and that an optional bit nobody here sets is clear.
//!
//! Not every broken rule is a fault: RES0 bits and reserved values of MemAttr and SH may be ignored by one processor and
//! mean something to the next.

use notifier_core::OutputAddr;
use spte_core::format::{EntryError, Level};

use crate::{
    bits::{
        AddressLayout, CONTIGUOUS, DBM, EXECUTE_NEVER, EXECUTE_NEVER_SHIFT, FNXS, MEM_ATTR, NO_TRANSLATION_CACHING,
        SHAREABILITY, TYPE, VALID, WRITE, bit_range, number_of,
    },
    memtype::{MemoryType, Shareability},
    software::{CLAIM, DIRTY_FACT, UPGRADABLE, WITHHELD_EXECUTE, WITHHELD_EXECUTE_SHIFT},
    stage2::Stage2,
    transition::BreakLevel,
};

/// What an entry is to hardware, whoever wrote it. [`Kind`](spte_core::format::Kind) is what it is to this crate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HardwareKind {
    /// Not valid: any access is a translation fault.
    NotValid,
    /// Reserved, or of a meaning that this machine does not have, for this reason.
    Impossible(EntryError),
    /// A link to the table at this address.
    Table(OutputAddr),
    /// A block or a page.
    Leaf,
}

/// Refuses the entry for those of `wrong` bits that are set.
pub(crate) fn refuse(level: Level, raw: u64, wrong: u64, rule: &'static str) -> Result<(), EntryError> {
    if wrong == 0 { Ok(()) } else { Err(EntryError { raw, number: number_of(level), rule, bits: wrong }) }
}

/// Refuses the entry, naming `bits`, unless `holds`.
pub(crate) fn require(level: Level, raw: u64, holds: bool, bits: u64, rule: &'static str) -> Result<(), EntryError> {
    if holds { Ok(()) } else { Err(EntryError { raw, number: number_of(level), rule, bits }) }
}

impl Stage2 {
    /// What `raw` is to hardware at `level`.
    pub fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        if raw & VALID == 0 {
            return HardwareKind::NotValid;
        }
        match self.check_hardware(level, raw) {
            Err(why) => HardwareKind::Impossible(why),
            Ok(()) if level == Level::LEAF || raw & TYPE == 0 => HardwareKind::Leaf,
            Ok(()) => {
                let granule = self.options().granule.shift();
                HardwareKind::Table(OutputAddr::new(self.layout().get(raw, granule)))
            }
        }
    }

    /// The reserved encodings and RES0 bits of an entry (Arm DDI 0487, "Translation table descriptor formats").
    ///
    /// # Errors
    /// The rule that the entry breaks.
    pub fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if raw & VALID == 0 {
            return Ok(());
        }
        let link = level != Level::LEAF && raw & TYPE != 0;
        require(
            level,
            raw,
            level != Level::LEAF || raw & TYPE != 0,
            TYPE,
            "an entry of level 3 that is valid is a page: bit 1 must be set",
        )?;
        require(
            level,
            raw,
            link || self.has_leaves(level),
            TYPE,
            "this level has no blocks with this granule and these address bits",
        )?;
        let granule = self.options().granule.shift();
        let shift = if link { granule } else { self.shift(level) };
        let wide = self.layout().get(raw, shift) >> self.options().physical_bits != 0;
        let field = self.layout().field(shift);
        require(level, raw, !wide, field, "address bits above the physical address width (an address size fault)")?;
        // Between the attributes and the address: nT, and PA[51:48] of the 64K granule, where there are any.
        let staging = if link || level == Level::LEAF || self.options().break_level == BreakLevel::Level0 {
            0
        } else {
            NO_TRANSLATION_CACHING
        };
        let gap = bit_range(u32::from(shift) - 1, 12) & !field & !staging;
        refuse(level, raw, raw & gap, "bits between the attributes and the output address are RES0")?;
        let above = bit_range(50, 48) & !field;
        refuse(level, raw, raw & above, "bits 50:48 that hold no output address are RES0")?;
        if link {
            return Ok(());
        }
        let fwb = self.options().fwb;
        let known = MemoryType::of(raw, fwb).is_some();
        let rule = if fwb {
            "with FWB, MemAttr[3] is RES0 and the value 4 is reserved"
        } else {
            "MemAttr values 4, 8 and 12 are reserved"
        };
        require(level, raw, known, MEM_ATTR, rule)?;
        let shareability = Shareability::from_bits((raw >> 8 & 3) as u8).is_some();
        let lpa2 = self.layout() == AddressLayout::Lpa2;
        require(level, raw, lpa2 || shareability, SHAREABILITY, "SH value 1 is reserved")?;
        if !self.options().xnx {
            let low = 1 << EXECUTE_NEVER_SHIFT;
            refuse(level, raw, raw & low, "XN[0] is RES0 without FEAT_XNX")?;
        }
        let set = self.contiguous(level).is_some();
        refuse(level, raw, if set { 0 } else { raw & CONTIGUOUS }, "this level has no contiguous sets")
    }

    pub(crate) fn check_entry(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if raw & VALID == 0 {
            return Ok(());
        }
        self.check_hardware(level, raw)?;
        if level != Level::LEAF && raw & TYPE != 0 {
            let field = self.layout().field(self.options().granule.shift());
            let foreign = raw & !(field | TYPE | VALID | CLAIM);
            return refuse(level, raw, foreign, "a link holds an address and nothing else");
        }
        // The engine dissolves a set before it arms a leaf.
        let armed = raw & CONTIGUOUS != 0 && Self::is_armed(raw);
        refuse(level, raw, if armed { CONTIGUOUS } else { 0 }, "an armed leaf is in no contiguous set")?;
        if level > Level::LEAF {
            refuse(level, raw, raw & NO_TRANSLATION_CACHING, "no block of this crate is a staging entry")?;
        }
        refuse(level, raw, raw & FNXS, "no leaf of this crate has FnXS")?;
        let xn = (raw & EXECUTE_NEVER) >> EXECUTE_NEVER_SHIFT;
        let withheld = raw & WITHHELD_EXECUTE;
        let sensible = withheld == 0 || (self.options().xnx && xn == 2 && withheld >> WITHHELD_EXECUTE_SHIFT != 2);
        require(
            level,
            raw,
            sensible,
            WITHHELD_EXECUTE,
            "where a page did execute is remembered while it executes nowhere, with FEAT_XNX",
        )?;
        refuse(level, raw, raw & bit_range(63, 61), "bits 63:61 are nobody's")?;
        if !self.options().accessed_dirty.sets_dirty() {
            refuse(
                level,
                raw,
                raw & DBM,
                "DBM would bring writing back where hardware records writes, and is clear here",
            )?;
        }
        require(
            level,
            raw,
            self.write_state(raw).is_some(),
            UPGRADABLE | DBM | WRITE,
            "S2AP[1] and DBM need upgradable, and S2AP[1] needs DBM where hardware records writes",
        )?;
        let misplaced = raw & (WRITE | DBM) != 0;
        refuse(
            level,
            raw,
            if misplaced { raw & DIRTY_FACT } else { 0 },
            "the dirty fact stands in for S2AP[1] where the page cannot be written",
        )
    }
}
