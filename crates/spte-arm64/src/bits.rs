// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hardware's bits, named as in the manual, and the shapes of tables.
//!
//! Sources: Arm Architecture Reference Manual (DDI 0487), chapter "The AArch64 Virtual Memory System Architecture":
//! "Translation table descriptor formats" (VMSAv8-64), "Stage 2 block and page descriptor attribute fields",
//! "Translation granules", "Concatenated translation tables"; its pseudocode `AArch64.S2StartLevel`,
//! `AArch64.S2InconsistentSL`, `AArch64.BlockDescSupported`. Linux: `arch/arm64/include/asm/kvm_pgtable.h`,
//! `stage2_pgtable.h` (`stage2_pgtable_levels`), `arch/arm64/kvm/hyp/pgtable.c` (`kvm_pgd_pages`).

use core::fmt;

use spte_core::format::{Geometry, Level, LevelShape};
pub use spte_core::raw::bit_range;
pub(crate) use spte_core::raw::check_output;

/// Bit 0: valid. With it clear hardware ignores all others.
pub const VALID: u64 = 1 << 0;
/// Bit 1: above the last level a table, clear a block; at the last level a page, and clear it is reserved.
pub const TYPE: u64 = 1 << 1;
/// Bits 5:2 of a leaf: MemAttr.
pub const MEM_ATTR: u64 = bit_range(5, 2);
/// Where MemAttr begins.
pub const MEM_ATTR_SHIFT: u32 = 2;
/// Bit 6 of a leaf: S2AP\[0\], read.
pub const READ: u64 = 1 << 6;
/// Bit 7 of a leaf: S2AP\[1\], write. Under hardware management of dirty state (with [`DBM`]): written.
pub const WRITE: u64 = 1 << 7;
/// Bits 9:8 of a leaf: SH. With VTCR_EL2.DS they are output address bits 51:50, in links too.
pub const SHAREABILITY: u64 = bit_range(9, 8);
/// Where SH begins.
pub const SHAREABILITY_SHIFT: u32 = 8;
/// Bit 10 of a leaf: AF, the access flag.
pub const ACCESS_FLAG: u64 = 1 << 10;
/// Bit 11 of a leaf: FnXS with FEAT_XS, otherwise RES0.
pub const FNXS: u64 = 1 << 11;
/// Bits 15:12 of the 64K granule with 52-bit addresses: output address bits 51:48.
pub const HIGH_64K: u64 = bit_range(15, 12);
/// Bit 16 of a block: nT, with FEAT_BBM level 1 and 2.
pub const NO_TRANSLATION_CACHING: u64 = 1 << 16;
/// Bit 51 of a leaf: DBM, the dirty bit modifier.
pub const DBM: u64 = 1 << 51;
/// Bit 52 of a leaf: Contiguous.
pub const CONTIGUOUS: u64 = 1 << 52;
/// Bits 54:53 of a leaf: XN. Bit 53 is RES0 without FEAT_XNX.
pub const EXECUTE_NEVER: u64 = bit_range(54, 53);
/// Where XN begins.
pub const EXECUTE_NEVER_SHIFT: u32 = 53;
/// Bits 58:55: for software.
pub const SOFTWARE: u64 = bit_range(58, 55);

/// The size of the smallest page and of every table but the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Granule {
    /// 4 KiB: 9 index bits a level.
    #[default]
    K4,
    /// 16 KiB: 11 index bits a level.
    K16,
    /// 64 KiB: 13 index bits a level.
    K64,
}

impl fmt::Display for Granule {
    /// As the manual calls it: `4K`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}K", self.bytes() >> 10)
    }
}

impl Granule {
    /// log2 of its bytes: 12, 14 or 16.
    pub const fn shift(self) -> u8 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// Its bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Index bits of one level of full tables: 9, 11 or 13.
    pub const fn index_bits(self) -> u8 {
        self.shift() - 3
    }

    /// The granule of so many bytes, if there is one.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            0x1000 => Some(Self::K4),
            0x4000 => Some(Self::K16),
            0x1_0000 => Some(Self::K64),
            _ => None,
        }
    }

    /// log2 of what an entry at the architecture's level `number` spans. There are levels -1 to 3; other numbers are
    /// taken for the nearest.
    pub const fn entry_shift(self, number: i8) -> u8 {
        let above_pages = match number {
            ..=-1 => 5,
            0 => 4,
            1 => 3,
            2 => 2,
            3.. => 1,
        };
        self.index_bits() * above_pages + 3
    }

    /// TG0 of VTCR_EL2: 0, 2 or 1.
    pub const fn tg0(self) -> u64 {
        match self {
            Self::K4 => 0,
            Self::K16 => 2,
            Self::K64 => 1,
        }
    }

    /// The granule's code in the operands of TLB invalidation (TTL\[3:2\] and TG): 1, 2 or 3.
    pub const fn ttl(self) -> u64 {
        match self {
            Self::K4 => 1,
            Self::K16 => 2,
            Self::K64 => 3,
        }
    }
}

/// Where the walk begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Start {
    /// As few levels as there may be, but two at least, with up to 16 concatenated tables at the top: what Linux does
    /// (`stage2_pgtable_levels`).
    #[default]
    FewestLevels,
    /// As many levels as it takes to have one table at the top.
    SingleTable,
    /// This level, by the architecture's number (-1 to 3).
    Level(i8),
}

/// Options that no machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// The table translates 32 bits at least; 52 at most where descriptors can hold 52 bits, otherwise 48.
    #[error("{bits} guest address bits are not within 32 to {most}")]
    IpaBits {
        /// The bits asked for.
        bits: u8,
        /// The most there may be with these options.
        most: u8,
    },
    /// Output addresses have 32 bits at least; 52 at most where descriptors can hold 52 bits, otherwise 48.
    #[error("{bits} physical address bits are not within 32 to {most}")]
    PhysicalBits {
        /// The bits asked for.
        bits: u8,
        /// The most there may be with these options.
        most: u8,
    },
    /// VTCR_EL2.DS is reserved for the 64K granule, which has its own place for 52-bit addresses.
    #[error("the 64K granule has no LPA2 descriptors")]
    Lpa2,
    /// A walk of this granule does not begin at this level.
    #[error("a walk of the {granule} granule does not begin at level {number}")]
    StartLevel {
        /// The granule.
        granule: Granule,
        /// The level asked for.
        number: i8,
    },
    /// The level does not fit the address width (`AArch64.S2InconsistentSL`): all of the top's entries would be out
    /// of reach, or more than 16 tables would have to be concatenated.
    #[error("{bits} guest address bits cannot begin at level {number}, which takes {least} to {most}")]
    InconsistentStart {
        /// Guest address bits.
        bits: u8,
        /// The level.
        number: i8,
        /// The fewest bits for it.
        least: u8,
        /// The most bits for it.
        most: u8,
    },
}

/// The fewest and the most address bits of a table that begins at `number` (`AArch64.S2InconsistentSL`).
pub const fn start_bounds(granule: Granule, number: i8) -> (u8, u8) {
    let least = granule.entry_shift(number) + 1;
    (least, least + granule.index_bits() - 1 + 4)
}

/// Whether a walk may begin at `number` at all (`AArch64.S2InvalidSL`; that a root at level 0 or 1 also needs a
/// machine with enough physical address bits is [`registers`](crate::registers)' business).
const fn start_exists(granule: Granule, number: i8, lpa2: bool) -> bool {
    match granule {
        Granule::K4 => (number >= 0 && number <= 3) || (number == -1 && lpa2),
        Granule::K16 => (number >= 1 && number <= 3) || (number == 0 && lpa2),
        Granule::K64 => number >= 1 && number <= 3,
    }
}

/// The level the walk begins at.
pub(crate) const fn start_level(granule: Granule, ipa_bits: u8, lpa2: bool, start: Start) -> Result<i8, OptionsError> {
    let bits = granule.index_bits();
    let number = match start {
        Start::Level(number) => number,
        // Four bits fewer, for 16 tables; the formula of any table, `(bits - 4) / index bits`; but two levels.
        Start::FewestLevels => {
            let levels = (ipa_bits - 8) / bits;
            4 - (if levels < 2 { 2 } else { levels }) as i8
        }
        Start::SingleTable => {
            let levels = (ipa_bits - 4) / bits;
            4 - (if levels < 2 { 2 } else { levels }) as i8
        }
    };
    if !start_exists(granule, number, lpa2) {
        return Err(OptionsError::StartLevel { granule, number });
    }
    let (least, most) = start_bounds(granule, number);
    if ipa_bits < least || ipa_bits > most {
        return Err(OptionsError::InconsistentStart { bits: ipa_bits, number, least, most });
    }
    Ok(number)
}

/// Whether entries of the architecture's level `number` may be blocks (`AArch64.BlockDescSupported`); pages are at 3.
pub const fn has_leaves(granule: Granule, number: i8, lpa2: bool, physical_bits: u8) -> bool {
    match (granule, number) {
        (_, 3 | 2) | (Granule::K4, 1) => true,
        (Granule::K4, 0) | (Granule::K16, 1) => lpa2,
        (Granule::K64, 1) => physical_bits > 48,
        _ => false,
    }
}

/// The architecture's number of `level`.
pub(crate) const fn number_of(level: Level) -> i8 {
    4 - level.get() as i8
}

/// The shape of a table whose walk begins at `start`. The root has as many entries as the addresses need: fewer than
/// a table's, or up to 16 tables' in a row, which is what concatenation is.
pub(crate) fn geometry(
    granule: Granule,
    ipa_bits: u8,
    start: i8,
    lpa2: bool,
    physical_bits: u8,
) -> Result<Geometry, OptionsError> {
    let shape = |number: i8| LevelShape {
        shift: granule.entry_shift(number),
        bits: if number == start { ipa_bits - granule.entry_shift(start) } else { granule.index_bits() },
        // No block is larger than physical memory.
        leaf: has_leaves(granule, number, lpa2, physical_bits) && granule.entry_shift(number) <= physical_bits,
    };
    let all = [shape(3), shape(2), shape(1), shape(0), shape(-1)];
    Geometry::new(&all[..(4 - start) as usize]).ok_or(OptionsError::StartLevel { granule, number: start })
}

/// Where the 52 bits of an output address stand in a descriptor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum AddressLayout {
    /// 47 down, in place.
    Bits48,
    /// 49 down in place; 51:50 in bits 9:8 (VTCR_EL2.DS).
    Lpa2,
    /// 47 down in place; 51:48 in bits 15:12 (64K granule).
    Lpa64K,
}

impl AddressLayout {
    /// The bits of a descriptor that are output address, of an entry that spans `1 << shift` bytes.
    pub(crate) const fn field(self, shift: u8) -> u64 {
        match self {
            Self::Bits48 => bit_range(47, shift as u32),
            Self::Lpa2 => bit_range(49, shift as u32) | SHAREABILITY,
            Self::Lpa64K => bit_range(47, shift as u32) | HIGH_64K,
        }
    }

    /// The descriptor's bits for `address`, which is a multiple of the granule.
    pub(crate) const fn put(self, address: u64) -> u64 {
        match self {
            Self::Bits48 => address,
            Self::Lpa2 => (address & bit_range(49, 0)) | ((address >> 50 & 3) << SHAREABILITY_SHIFT),
            Self::Lpa64K => (address & bit_range(47, 0)) | ((address >> 48 & 0xf) << 12),
        }
    }

    /// The address in `raw`, an entry that spans, or whose table is as large as, `1 << shift` bytes.
    pub(crate) const fn get(self, raw: u64, shift: u8) -> u64 {
        let low = raw & bit_range(47, shift as u32);
        match self {
            Self::Bits48 => low,
            Self::Lpa2 => low | (raw & bit_range(49, 48)) | ((raw & SHAREABILITY) >> SHAREABILITY_SHIFT << 50),
            Self::Lpa64K => low | ((raw & HIGH_64K) >> 12 << 48),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_spans_what_the_manual_says() {
        let shifts = |granule: Granule| [3, 2, 1, 0].map(|number| granule.entry_shift(number));
        assert_eq!(shifts(Granule::K4), [12, 21, 30, 39]);
        assert_eq!(Granule::K4.entry_shift(-1), 48);
        assert_eq!(shifts(Granule::K16), [14, 25, 36, 47]);
        assert_eq!(shifts(Granule::K64)[..3], [16, 29, 42]);
    }

    #[test]
    fn high_address_bits_have_their_place() {
        assert_eq!(AddressLayout::Lpa2.put(0xe_8000_1234_5000), 0x2_8000_1234_5300);
        assert_eq!(AddressLayout::Lpa2.get(0x2_8000_1234_5300, 12), 0xe_8000_1234_5000);
        assert_eq!(AddressLayout::Lpa64K.put(0xf_8000_1234_0000), 0x8000_1234_f000);
        assert_eq!(AddressLayout::Lpa64K.get(0x8000_1234_f000, 16), 0xf_8000_1234_0000);
        assert_eq!(AddressLayout::Bits48.get(0xffff_ffff_ffff_ffff, 21), 0xffff_ffe0_0000);
    }
}
