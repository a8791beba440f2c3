// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an entry is impossible.
//!
//! Two questions are kept apart. `check_hardware` of [`Ept`] and of [`LongModeFormat`] asks what the processor would
//! say: reserved bits and EPT misconfigurations, and nothing for an entry that is not present. It is the one for tables
//! that somebody else wrote, together with [`HardwareKind`]. [`Format::check`] asks that first and then this crate's
//! own rules, among them that MMU-present is set exactly where memory is behind an entry.

use notifier_core::OutputAddr;
use spte_core::format::{EntryError, Format, Level};
pub use spte_core::raw::HardwareKind;

use crate::{
    bits::{ADDRESS, PAGE_SIZE, address_field, ept, long_mode},
    ept::Ept,
    long_mode::{LongModeFormat, Usage},
    memtype::EptMemoryType,
    software::{self, AccessedDirty, MMU_PRESENT, WriteBits},
};

/// Whether the entry ends the translation, in a table of well-formed entries.
fn is_leaf(level: Level, raw: u64) -> bool {
    level == Level::LEAF || raw & PAGE_SIZE != 0
}

/// Bit 7 above the last level: at levels 4 and 5, and where the machine has no such page.
fn page_size(format: &impl Format, level: Level, raw: u64) -> Result<(), EntryError> {
    if level == Level::LEAF {
        return Ok(());
    }
    let allowed = level <= format.geometry().top() && format.geometry().level(level).leaf;
    let rule = match level.get() {
        2 => "bit 7 is reserved at level 2 where the processor has no 2M pages",
        3 => "bit 7 is reserved at level 3 where the processor has no 1G pages",
        _ => "bit 7 is reserved at levels 4 and 5",
    };
    EntryError::require(level.get() as i8, raw, allowed || raw & PAGE_SIZE == 0, PAGE_SIZE, rule)
}

impl Ept {
    /// What `raw` is to hardware at `level`.
    pub fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        if !self.is_hardware_present(raw) {
            return HardwareKind::NotPresent;
        }
        match self.check_hardware(level, raw) {
            Err(why) => HardwareKind::Impossible(why),
            Ok(()) if is_leaf(level, raw) => HardwareKind::Leaf,
            Ok(()) => HardwareKind::Table(OutputAddr::new(raw & self.physical())),
        }
    }

    /// The misconfigurations of an entry (Intel SDM volume 3, "EPT Misconfigurations").
    ///
    /// With mode-based execute, bit 10 without R is refused whatever the processor says about execute-only, as Linux
    /// does (`reset_rsvds_bits_mask_ept` and its successors).
    ///
    /// # Errors
    /// The rule that the entry breaks.
    pub fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if !self.is_hardware_present(raw) {
            return Ok(());
        }
        let readable = raw & ept::READ != 0;
        let write = raw & ept::WRITE;
        EntryError::refuse(
            level.get() as i8,
            raw,
            if readable { 0 } else { write },
            "an entry that is not readable must not be writable",
        )?;
        let options = self.options();
        let execute = raw & ept::EXECUTE;
        let execute_only = if readable || options.execute_only { 0 } else { execute };
        EntryError::refuse(level.get() as i8, raw, execute_only, "execute-only needs a processor that supports it")?;
        if options.mode_based_execute {
            let user = if readable { 0 } else { raw & ept::USER_EXECUTE };
            EntryError::refuse(level.get() as i8, raw, user, "user-mode execute needs read")?;
        }
        page_size(self, level, raw)?;
        EntryError::refuse(
            level.get() as i8,
            raw,
            raw & ADDRESS & !self.physical(),
            "address bits above the physical address width are reserved",
        )?;
        if is_leaf(level, raw) {
            let number = ((raw & ept::MEMORY_TYPE) >> ept::MEMORY_TYPE_SHIFT) as u8;
            let known = EptMemoryType::from_number(number).is_some();
            EntryError::require(
                level.get() as i8,
                raw,
                known,
                ept::MEMORY_TYPE,
                "memory types 2, 3 and 7 are reserved",
            )?;
            let low = ADDRESS & !address_field(level);
            EntryError::refuse(
                level.get() as i8,
                raw,
                raw & low,
                "address bits below the size of the page are reserved",
            )
        } else {
            let reserved = ept::MEMORY_TYPE | ept::IGNORE_PAT;
            EntryError::refuse(level.get() as i8, raw, raw & reserved, "bits 6:3 of a link are reserved")
        }
    }

    pub(crate) fn check_entry(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if software::nothing(raw, self.facts()).is_some() || self.mmio().is_mmio(raw) {
            return Ok(());
        }
        self.check_hardware(level, raw)?;
        let present = self.is_hardware_present(raw);
        if raw & MMU_PRESENT == 0 {
            return EntryError::require(
                level.get() as i8,
                raw,
                !present,
                self.present_bits(),
                "an entry without MMU-present must not be present",
            );
        }
        let tracked = self.is_tracked(raw) && raw & software::ept::SAVED != 0 && is_leaf(level, raw);
        EntryError::require(
            level.get() as i8,
            raw,
            present || tracked,
            MMU_PRESENT,
            "MMU-present needs rights, or the saved rights of a tracked leaf",
        )?;
        if tracked {
            // As hardware will see it once it is young again.
            self.check_hardware(level, self.restored(raw)).map_err(|why| EntryError { raw, ..why })?;
        }
        let ad = AccessedDirty::from_bits(raw) == Some(self.options().accessed_dirty);
        EntryError::require(
            level.get() as i8,
            raw,
            ad,
            software::ept::AD_TYPE,
            "the accessed/dirty type must be the table's",
        )?;
        let suppress = raw & ept::SUPPRESS_VE == self.suppress_ve();
        EntryError::require(
            level.get() as i8,
            raw,
            suppress,
            ept::SUPPRESS_VE,
            "suppress-#VE must be as the table has it",
        )?;
        if !tracked {
            EntryError::refuse(
                level.get() as i8,
                raw,
                raw & software::ept::SAVED,
                "only a tracked leaf has saved rights",
            )?;
        }
        if self.options().mode_based_execute {
            let both = ept::EXECUTE | ept::USER_EXECUTE;
            let equal = matches!(raw & both, 0) || raw & both == both;
            EntryError::require(level.get() as i8, raw, equal, both, "supervisor and user execute go together")?;
        }
        let writes = WriteBits::EPT;
        if !is_leaf(level, raw) {
            let foreign = writes.host | writes.mmu | software::ept::DIRTY_FACT | software::ept::EXECUTE_WITHHELD;
            return EntryError::refuse(level.get() as i8, raw, raw & foreign, "a link has no software bits of a leaf");
        }
        EntryError::require(
            level.get() as i8,
            raw,
            writes.state(raw).is_some(),
            writes.all(),
            "W needs MMU-writable, and MMU-writable needs host-writable",
        )?;
        let unreadable = raw & writes.mmu != 0 && self.restored(raw) & ept::READ == 0;
        EntryError::refuse(
            level.get() as i8,
            raw,
            if unreadable { writes.mmu } else { 0 },
            "MMU-writable needs R, or a saved R",
        )?;
        let fact = raw & software::ept::DIRTY_FACT;
        let misplaced = self.options().accessed_dirty == AccessedDirty::Enabled || raw & ept::WRITE != 0;
        EntryError::refuse(
            level.get() as i8,
            raw,
            if misplaced { fact } else { 0 },
            "the dirty fact stands in for W where D is not used",
        )?;
        let withheld = raw & software::ept::EXECUTE_WITHHELD;
        let misplaced = !self.withholds_execute(level) || self.executes(raw);
        EntryError::refuse(
            level.get() as i8,
            raw,
            if misplaced { withheld } else { 0 },
            "execute is withheld from larger leaves under the mitigation only",
        )?;
        EntryError::require(
            level.get() as i8,
            raw,
            !(self.withholds_execute(level) && self.executes(raw)),
            ept::EXECUTE,
            "no executable leaf above 4K under the huge-page mitigation",
        )
    }
}

impl<U: Usage> LongModeFormat<U> {
    /// What `raw` is to hardware at `level`.
    pub fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        if raw & long_mode::PRESENT == 0 {
            return HardwareKind::NotPresent;
        }
        match self.check_hardware(level, raw) {
            Err(why) => HardwareKind::Impossible(why),
            Ok(()) if is_leaf(level, raw) => HardwareKind::Leaf,
            Ok(()) => HardwareKind::Table(OutputAddr::new(raw & self.physical())),
        }
    }

    /// The reserved bits of an entry (AMD APM volume 2, "Long-Mode Page Translation"; Intel SDM volume 3, "Reserved
    /// Bits and Exceptions"), and that nested accesses are user accesses.
    ///
    /// # Errors
    /// The rule that the entry breaks.
    pub fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if raw & long_mode::PRESENT == 0 {
            return Ok(());
        }
        let options = self.options();
        page_size(self, level, raw)?;
        let width = ADDRESS & !self.physical() & !self.encryption_bit();
        EntryError::refuse(
            level.get() as i8,
            raw,
            raw & width,
            "address bits above the physical address width are reserved",
        )?;
        if !options.no_execute {
            EntryError::refuse(
                level.get() as i8,
                raw,
                raw & long_mode::NO_EXECUTE,
                "NX is reserved while EFER.NXE is clear",
            )?;
        }
        if is_leaf(level, raw) {
            let pat = if level == Level::LEAF { 0 } else { long_mode::PAT_HUGE };
            let low = ADDRESS & !address_field(level) & !pat;
            EntryError::refuse(
                level.get() as i8,
                raw,
                raw & low,
                "address bits below the size of the page, but for PAT, are reserved",
            )?;
        } else if options.link_global_reserved && level.get() >= 4 {
            EntryError::refuse(
                level.get() as i8,
                raw,
                raw & long_mode::GLOBAL,
                "bit 8 of a link at levels 4 and 5 is reserved",
            )?;
        }
        EntryError::require(
            level.get() as i8,
            raw,
            !U::NESTED || raw & long_mode::USER != 0,
            long_mode::USER,
            "nested accesses are user accesses: U/S must be set",
        )
    }

    pub(crate) fn check_entry(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if software::nothing(raw, self.facts()).is_some() || self.is_mmio(raw) {
            return Ok(());
        }
        self.check_hardware(level, raw)?;
        let present = raw & long_mode::PRESENT != 0;
        let marked = raw & MMU_PRESENT != 0;
        let bits = MMU_PRESENT | long_mode::PRESENT;
        EntryError::require(level.get() as i8, raw, present == marked, bits, "MMU-present is set exactly where P is")?;
        if !present {
            return Ok(());
        }
        let writes = WriteBits::LONG_MODE;
        let withheld = raw & software::long_mode::EXECUTE_WITHHELD;
        if !is_leaf(level, raw) {
            let foreign = writes.host | writes.mmu | withheld;
            return EntryError::refuse(level.get() as i8, raw, raw & foreign, "a link has no software bits of a leaf");
        }
        EntryError::require(
            level.get() as i8,
            raw,
            writes.state(raw).is_some(),
            writes.all(),
            "W needs MMU-writable, and MMU-writable needs host-writable",
        )?;
        let misplaced = !self.withholds_execute(level) || self.executes(raw);
        EntryError::refuse(
            level.get() as i8,
            raw,
            if misplaced { withheld } else { 0 },
            "execute is withheld from larger leaves under the mitigation only",
        )?;
        EntryError::require(
            level.get() as i8,
            raw,
            !(self.withholds_execute(level) && self.executes(raw)),
            long_mode::NO_EXECUTE,
            "no executable leaf above 4K under the huge-page mitigation",
        )
    }
}
