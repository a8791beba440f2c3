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
pub use spte_core::raw::HardwareKind;

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

impl Stage2 {
    /// What `raw` is to hardware at `level`.
    pub fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        if raw & VALID == 0 {
            return HardwareKind::NotPresent;
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
        EntryError::require(
            number_of(level),
            raw,
            level != Level::LEAF || raw & TYPE != 0,
            TYPE,
            "an entry of level 3 that is valid is a page: bit 1 must be set",
        )?;
        EntryError::require(
            number_of(level),
            raw,
            link || self.has_leaves(level),
            TYPE,
            "this level has no blocks with this granule and these address bits",
        )?;
        let granule = self.options().granule.shift();
        let shift = if link { granule } else { self.shift(level) };
        let wide = self.layout().get(raw, shift) >> self.options().physical_bits != 0;
        let field = self.layout().field(shift);
        EntryError::require(
            number_of(level),
            raw,
            !wide,
            field,
            "address bits above the physical address width (an address size fault)",
        )?;
        // Between the attributes and the address: nT, and PA[51:48] of the 64K granule, where there are any.
        let staging = if link || level == Level::LEAF || self.options().break_level == BreakLevel::Level0 {
            0
        } else {
            NO_TRANSLATION_CACHING
        };
        let gap = bit_range(u32::from(shift) - 1, 12) & !field & !staging;
        EntryError::refuse(
            number_of(level),
            raw,
            raw & gap,
            "bits between the attributes and the output address are RES0",
        )?;
        let above = bit_range(50, 48) & !field;
        EntryError::refuse(number_of(level), raw, raw & above, "bits 50:48 that hold no output address are RES0")?;
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
        EntryError::require(number_of(level), raw, known, MEM_ATTR, rule)?;
        let shareability = Shareability::from_bits((raw >> 8 & 3) as u8).is_some();
        let lpa2 = self.layout() == AddressLayout::Lpa2;
        EntryError::require(number_of(level), raw, lpa2 || shareability, SHAREABILITY, "SH value 1 is reserved")?;
        if !self.options().xnx {
            let low = 1 << EXECUTE_NEVER_SHIFT;
            EntryError::refuse(number_of(level), raw, raw & low, "XN[0] is RES0 without FEAT_XNX")?;
        }
        let set = self.contiguous(level).is_some();
        EntryError::refuse(
            number_of(level),
            raw,
            if set { 0 } else { raw & CONTIGUOUS },
            "this level has no contiguous sets",
        )
    }

    pub(crate) fn check_entry(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if raw & VALID == 0 {
            return Ok(());
        }
        self.check_hardware(level, raw)?;
        if level != Level::LEAF && raw & TYPE != 0 {
            let field = self.layout().field(self.options().granule.shift());
            let foreign = raw & !(field | TYPE | VALID | CLAIM);
            return EntryError::refuse(number_of(level), raw, foreign, "a link holds an address and nothing else");
        }
        // The engine dissolves a set before it arms a leaf.
        let armed = raw & CONTIGUOUS != 0 && Self::is_armed(raw);
        EntryError::refuse(
            number_of(level),
            raw,
            if armed { CONTIGUOUS } else { 0 },
            "an armed leaf is in no contiguous set",
        )?;
        if level > Level::LEAF {
            EntryError::refuse(
                number_of(level),
                raw,
                raw & NO_TRANSLATION_CACHING,
                "no block of this crate is a staging entry",
            )?;
        }
        EntryError::refuse(number_of(level), raw, raw & FNXS, "no leaf of this crate has FnXS")?;
        let xn = (raw & EXECUTE_NEVER) >> EXECUTE_NEVER_SHIFT;
        let withheld = raw & WITHHELD_EXECUTE;
        let sensible = withheld == 0 || (self.options().xnx && xn == 2 && withheld >> WITHHELD_EXECUTE_SHIFT != 2);
        EntryError::require(
            number_of(level),
            raw,
            sensible,
            WITHHELD_EXECUTE,
            "where a page did execute is remembered while it executes nowhere, with FEAT_XNX",
        )?;
        EntryError::refuse(number_of(level), raw, raw & bit_range(63, 61), "bits 63:61 are nobody's")?;
        if !self.options().accessed_dirty.sets_dirty() {
            EntryError::refuse(
                number_of(level),
                raw,
                raw & DBM,
                "DBM would bring writing back where hardware records writes, and is clear here",
            )?;
        }
        EntryError::require(
            number_of(level),
            raw,
            self.write_state(raw).is_some(),
            UPGRADABLE | DBM | WRITE,
            "S2AP[1] and DBM need upgradable, and S2AP[1] needs DBM where hardware records writes",
        )?;
        let misplaced = raw & (WRITE | DBM) != 0;
        EntryError::refuse(
            number_of(level),
            raw,
            if misplaced { raw & DIRTY_FACT } else { 0 },
            "the dirty fact stands in for S2AP[1] where the page cannot be written",
        )
    }
}
