// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cache types: EPT's own, long mode's selectors into the PAT, and the attributes of leaves.
//!
//! EPT leaves name a type directly; the guest's PAT is combined with it unless *ignore PAT* is set. Long-mode leaves
//! hold a selector of three bits: PWT, PCD and PAT, of which the last stands in bit 7 of a 4K leaf and in bit 12 of a
//! larger one. Splitting and collapsing must move it, or it becomes part of an address.

use crate::bits::{ept, long_mode};

/// A cache type by its number, as in the PAT and the MTRRs (Intel SDM volume 3, "Memory Cache Control").
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum MemoryType {
    /// UC, uncacheable.
    Uncacheable = 0,
    /// WC, write combining.
    WriteCombining = 1,
    /// WT, write through.
    WriteThrough = 4,
    /// WP, write protected.
    WriteProtected = 5,
    /// WB, write back.
    WriteBack = 6,
    /// UC-, uncacheable unless an MTRR says write combining. In the PAT only.
    UncacheableMinus = 7,
}

impl MemoryType {
    /// The type with this number; 2, 3 and everything above 7 are reserved.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            7 => Some(Self::UncacheableMinus),
            _ => None,
        }
    }
}

/// The type in bits 5:3 of an EPT leaf. 2, 3 and 7 are misconfigurations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum EptMemoryType {
    /// UC.
    Uncacheable = 0,
    /// WC.
    WriteCombining = 1,
    /// WT.
    WriteThrough = 4,
    /// WP.
    WriteProtected = 5,
    /// WB.
    #[default]
    WriteBack = 6,
}

impl EptMemoryType {
    /// The type with this number.
    pub const fn from_number(number: u8) -> Option<Self> {
        match number {
            0 => Some(Self::Uncacheable),
            1 => Some(Self::WriteCombining),
            4 => Some(Self::WriteThrough),
            5 => Some(Self::WriteProtected),
            6 => Some(Self::WriteBack),
            _ => None,
        }
    }

    /// The type of an EPT leaf; a reserved one reads as uncacheable.
    pub(crate) const fn of(raw: u64) -> Self {
        match Self::from_number(((raw & ept::MEMORY_TYPE) >> ept::MEMORY_TYPE_SHIFT) as u8) {
            Some(memory_type) => memory_type,
            None => Self::Uncacheable,
        }
    }
}

impl From<EptMemoryType> for MemoryType {
    fn from(memory_type: EptMemoryType) -> Self {
        match memory_type {
            EptMemoryType::Uncacheable => Self::Uncacheable,
            EptMemoryType::WriteCombining => Self::WriteCombining,
            EptMemoryType::WriteThrough => Self::WriteThrough,
            EptMemoryType::WriteProtected => Self::WriteProtected,
            EptMemoryType::WriteBack => Self::WriteBack,
        }
    }
}

/// Attributes of an EPT leaf. By default write back, and the guest's PAT is ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EptAttrs {
    /// Bits 5:3.
    pub memory_type: EptMemoryType,
    /// Bit 6: set, the type above holds; clear, it is combined with the guest's PAT as an MTRR's would be.
    pub ignore_pat: bool,
}

impl Default for EptAttrs {
    fn default() -> Self {
        Self { memory_type: EptMemoryType::WriteBack, ignore_pat: true }
    }
}

impl EptAttrs {
    /// Their bits in a leaf.
    pub const fn to_bits(self) -> u64 {
        let pat = if self.ignore_pat { ept::IGNORE_PAT } else { 0 };
        ((self.memory_type as u64) << ept::MEMORY_TYPE_SHIFT) | pat
    }

    /// The attributes of a leaf; a reserved type reads as uncacheable.
    pub const fn from_bits(raw: u64) -> Self {
        Self { memory_type: EptMemoryType::of(raw), ignore_pat: raw & ept::IGNORE_PAT != 0 }
    }
}

/// An index into the PAT, 0 to 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PatSelector(u8);

impl PatSelector {
    /// Selector 0: write back after reset and under Linux.
    pub const ZERO: Self = Self(0);

    /// The selector with this number, `None` above 7.
    pub const fn new(number: u8) -> Option<Self> {
        if number > 7 { None } else { Some(Self(number)) }
    }

    /// Its number.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// Its bits in a leaf: PWT and PCD, and PAT where a leaf of this size has it.
    pub const fn to_bits(self, huge: bool) -> u64 {
        let low = ((self.0 & 3) as u64) << 3;
        if self.0 & 4 == 0 { low } else { low | pat_bit(huge) }
    }

    /// The selector of a leaf.
    pub const fn from_bits(raw: u64, huge: bool) -> Self {
        let low = ((raw & (long_mode::WRITE_THROUGH | long_mode::CACHE_DISABLE)) >> 3) as u8;
        Self(if raw & pat_bit(huge) == 0 { low } else { low | 4 })
    }
}

/// Where a leaf has its PAT bit: 7 at 4K, 12 above.
pub(crate) const fn pat_bit(huge: bool) -> u64 {
    if huge { long_mode::PAT_HUGE } else { long_mode::PAT_4K }
}

/// The PAT register (IA32_PAT): eight cache types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pat(u64);

impl Pat {
    /// The value after reset: WB, WT, UC-, UC, twice.
    pub const RESET: Self = Self(0x0007_0406_0007_0406);
    /// Linux's: WB, WC, UC-, UC, WB, WP, UC-, WT (`pat_bp_init`).
    pub const LINUX: Self = Self(0x0407_0506_0007_0106);

    /// The register with this value; `None` where one of the eight types is reserved.
    pub fn from_raw(raw: u64) -> Option<Self> {
        let types = raw.to_le_bytes().map(MemoryType::from_number);
        (!types.contains(&None)).then_some(Self(raw))
    }

    /// The register's value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The type that `selector` stands for.
    pub const fn memory_type(self, selector: PatSelector) -> MemoryType {
        match MemoryType::from_number((self.0 >> (8 * selector.0)) as u8) {
            Some(memory_type) => memory_type,
            None => MemoryType::Uncacheable,
        }
    }

    /// The lowest selector for `memory_type`, if the register has one.
    pub fn selector(self, memory_type: MemoryType) -> Option<PatSelector> {
        let same = self.0.to_le_bytes().map(|number| number == memory_type as u8);
        let number = match same {
            [true, ..] => 0,
            [_, true, ..] => 1,
            [_, _, true, ..] => 2,
            [_, _, _, true, ..] => 3,
            [_, _, _, _, true, ..] => 4,
            [_, _, _, _, _, true, ..] => 5,
            [.., true, _] => 6,
            [.., true] => 7,
            _ => return None,
        };
        Some(PatSelector(number))
    }
}

/// A protection key, 0 to 15.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct ProtectionKey(u8);

impl ProtectionKey {
    /// The key with this number, `None` above 15.
    pub const fn new(number: u8) -> Option<Self> {
        if number > 15 { None } else { Some(Self(number)) }
    }

    /// Its number.
    pub const fn get(self) -> u8 {
        self.0
    }
}

/// Attributes of a long-mode or NPT leaf. By default selector 0, a user page, not global, not encrypted, key 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LongModeAttrs {
    /// The cache type, as an index into the PAT.
    pub selector: PatSelector,
    /// U/S. Always set in NPT.
    pub user: bool,
    /// G: kept across CR3 loads. Never in NPT, which ignores it.
    pub global: bool,
    /// The encryption bit (C-bit), where the format has one.
    pub encrypted: bool,
    /// The protection key, where the format has them.
    pub protection_key: ProtectionKey,
}

impl Default for LongModeAttrs {
    fn default() -> Self {
        Self {
            selector: PatSelector::ZERO,
            user: true,
            global: false,
            encrypted: false,
            protection_key: ProtectionKey::default(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pat_registers_hold_the_types_they_are_known_for() {
        let selector = |number| PatSelector::new(number).unwrap();
        assert_eq!(Pat::RESET.memory_type(selector(1)), MemoryType::WriteThrough);
        assert_eq!(Pat::RESET.memory_type(selector(2)), MemoryType::UncacheableMinus);
        assert_eq!(Pat::LINUX.memory_type(selector(7)), MemoryType::WriteThrough);
        assert_eq!(Pat::LINUX.selector(MemoryType::WriteCombining), Some(selector(1)));
        assert_eq!(Pat::LINUX.selector(MemoryType::WriteThrough), Some(selector(7)));
        assert_eq!(Pat::RESET.selector(MemoryType::WriteCombining), None);
        assert_eq!(Pat::from_raw(0x0007_0406_0007_0206), None);
        assert_eq!(Pat::from_raw(Pat::LINUX.raw()), Some(Pat::LINUX));
    }

    #[test]
    fn selector_bits_are_pwt_pcd_and_the_pat_bit_of_the_size() {
        let selector = PatSelector::new(5).unwrap();
        assert_eq!(selector.to_bits(false), 0x88);
        assert_eq!(selector.to_bits(true), 0x1008);
        assert_eq!(PatSelector::new(2).unwrap().to_bits(true), 0x10);
        assert_eq!(PatSelector::new(8), None);
        assert_eq!(PatSelector::from_bits(0x1008, true), selector);
        assert_eq!(PatSelector::from_bits(0x1088, false), selector);
    }
}
