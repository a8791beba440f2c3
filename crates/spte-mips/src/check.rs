// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Why an entry is impossible.
//!
//! Two questions are kept apart. [`GpaTable::check_hardware`] asks what a refill handler or the walker would make of the entry:
//! an address that they cannot load from, an EntryLo with bits that are not there. It is the one for tables that somebody else
//! wrote, together with [`HardwareKind`]. `Format::check` asks that first and then this crate's own rules, which are
//! those of Linux's accessors: V is ACCESSED, D needs WRITE and MODIFIED, no entry is global or huge.
//!
//! EntryLo has few rules to break: no value of C is reserved everywhere (see [`memtype`](crate::memtype)), and bits above
//! the physical address are not kept (QEMU: `helper_dmtc0_entrylo0` masks them away), so that an address which has any
//! leads to another page.

use notifier_core::OutputAddr;
use spte_core::format::{EntryError, Format, Kind, Level};
pub use spte_core::raw::HardwareKind;

use crate::{
    bits::{self, ACCESSED, MODIFIED, PRESENT, WRITE, bit_range},
    gpa::{ByteOrder, GpaTable},
};

impl<O: ByteOrder> GpaTable<O> {
    /// What `raw` is at `level` to whoever walks the table.
    pub fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        let nothing = if level == Level::LEAF {
            raw & (PRESENT | self.layout().valid()) == 0
        } else {
            self.not_present(level).kind(raw, 0).is_some()
        };
        if nothing {
            return HardwareKind::NotPresent;
        }
        match (self.check_hardware(level, raw), bits::unmapped(raw)) {
            (Err(why), _) => HardwareKind::Impossible(why),
            (Ok(()), Some(table)) if level != Level::LEAF => HardwareKind::Table(OutputAddr::new(table)),
            (Ok(()), _) => HardwareKind::Leaf,
        }
    }

    /// What handlers and walker need of an entry. Nothing, of one without PRESENT and V.
    ///
    /// # Errors
    /// The rule that the entry breaks.
    pub fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        let width = self.options().physical_bits;
        EntryError::require(
            self.level_number(level),
            raw,
            level <= self.geometry().top(),
            u64::MAX,
            "the table has no such level",
        )?;
        if level > Level::LEAF {
            let rule = "an empty entry of a directory leads to a sentinel: zero would be followed too";
            EntryError::require(self.level_number(level), raw, raw != 0, u64::MAX, rule)?;
            let rule = "a link is an address of an unmapped segment";
            let Some(table) = bits::unmapped(raw) else {
                return EntryError::require(self.level_number(level), raw, false, bit_range(63, 59), rule);
            };
            let wide = table & !bit_range(u32::from(width) - 1, 0);
            EntryError::refuse(
                self.level_number(level),
                raw,
                wide,
                "address bits above the physical address width (an address error)",
            )?;
            let low = raw & bit_range(u32::from(self.shift()) - 1, 0);
            return EntryError::refuse(self.level_number(level), raw, low, "a table is aligned to its page");
        }
        let layout = self.layout();
        if raw & (PRESENT | layout.valid()) == 0 {
            return Ok(());
        }
        let begin = layout.cache_shift() + 3;
        let end = self.frame().trailing_zeros();
        let below = if end > begin { raw & bit_range(end - 1, begin) } else { 0 };
        EntryError::refuse(self.level_number(level), raw, below, "frame bits below the page size are zero")?;
        let above = raw & !bit_range(63 - self.frame().leading_zeros(), 0);
        EntryError::refuse(
            self.level_number(level),
            raw,
            above,
            "address bits above the physical address width, which EntryLo does not keep",
        )
    }

    pub(crate) fn check_entry(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        if level <= self.geometry().top() {
            match self.kind(level, raw) {
                Kind::Absent | Kind::Claimed | Kind::Dead => {
                    let stray = raw & self.facts();
                    return EntryError::refuse(self.level_number(level), raw, stray, "what holds nothing has no facts");
                }
                Kind::Special | Kind::Table(_) | Kind::Leaf => {}
            }
        }
        self.check_hardware(level, raw)?;
        if level > Level::LEAF {
            let ours = matches!(self.kind(level, raw), Kind::Table(_));
            let rule =
                "a link of this crate is an address in xkphys, with the tables' cache attribute, and no sentinel's";
            return EntryError::require(self.level_number(level), raw, ours, u64::MAX, rule);
        }
        let layout = self.layout();
        let (valid, dirty) = (layout.valid(), layout.dirty());
        if raw & PRESENT == 0 {
            return EntryError::refuse(
                self.level_number(level),
                raw,
                raw & valid,
                "V without PRESENT: hardware would load what nobody mapped",
            );
        }
        EntryError::refuse(self.level_number(level), raw, raw & layout.huge(), "no leaf of a GPA table is huge")?;
        EntryError::refuse(
            self.level_number(level),
            raw,
            raw & layout.global(),
            "guest physical addresses are not global",
        )?;
        let same = (raw & ACCESSED != 0) == (raw & valid != 0);
        EntryError::require(
            self.level_number(level),
            raw,
            same,
            ACCESSED | valid,
            "V is set where ACCESSED is, and nowhere else",
        )?;
        let tracked = raw & dirty == 0 || raw & (WRITE | MODIFIED) == WRITE | MODIFIED;
        EntryError::require(self.level_number(level), raw, tracked, dirty, "D needs WRITE and MODIFIED")?;
        if !self.options().rixi {
            let read = layout.read_inhibit();
            EntryError::require(
                self.level_number(level),
                raw,
                raw & read != 0,
                read,
                "without RI and XI every leaf has READ",
            )?;
            EntryError::refuse(
                self.level_number(level),
                raw,
                raw & layout.execute_inhibit(),
                "without RI and XI there is no XI",
            )?;
        }
        Ok(())
    }
}
