// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hardware's bits, named as in the manuals, and the shapes of tables.
//!
//! Sources: Intel SDM volume 3, "The Extended Page Table Mechanism" (EPT entries) and "4-Level Paging and 5-Level
//! Paging" (long mode); AMD APM volume 2, "Long-Mode Page Translation" and "Nested Paging".

use spte_core::format::{FormatError, Geometry, Level, LevelShape};
pub use spte_core::raw::bit_range;
pub(crate) use spte_core::raw::check_output;

/// 51:12, the widest address field there is.
pub const ADDRESS: u64 = bit_range(51, 12);
/// Bit 7: the entry is a leaf although a table could follow (PS; EPT calls it by its number).
pub const PAGE_SIZE: u64 = 1 << 7;

/// Bits of EPT entries.
pub mod ept {
    /// Bit 0: data reads.
    pub const READ: u64 = 1 << 0;
    /// Bit 1: data writes.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: instruction fetches; with mode-based execute those of supervisor-mode linear addresses.
    pub const EXECUTE: u64 = 1 << 2;
    /// Bits 2:0. With all clear (and bit 10, with mode-based execute) the entry is not present.
    pub const RWX: u64 = READ | WRITE | EXECUTE;
    /// Bits 5:3 of a leaf: memory type.
    pub const MEMORY_TYPE: u64 = 7 << 3;
    /// Where the memory type begins.
    pub const MEMORY_TYPE_SHIFT: u32 = 3;
    /// Bit 6 of a leaf: the guest's PAT is ignored.
    pub const IGNORE_PAT: u64 = 1 << 6;
    /// Bit 8: accessed, where EPTP bit 6 is set.
    pub const ACCESSED: u64 = 1 << 8;
    /// Bit 9 of a leaf: dirty, where EPTP bit 6 is set.
    pub const DIRTY: u64 = 1 << 9;
    /// Bit 10: fetches of user-mode linear addresses, with mode-based execute; ignored without.
    pub const USER_EXECUTE: u64 = 1 << 10;
    /// Bit 63: an EPT violation here is no `#VE`.
    pub const SUPPRESS_VE: u64 = 1 << 63;
}

/// Bits of long-mode entries, which are NPT's too.
pub mod long_mode {
    /// Bit 0: P.
    pub const PRESENT: u64 = 1 << 0;
    /// Bit 1: R/W.
    pub const WRITE: u64 = 1 << 1;
    /// Bit 2: U/S. Nested accesses are user accesses, so NPT has it set at every level.
    pub const USER: u64 = 1 << 2;
    /// Bit 3: PWT, bit 0 of the PAT selector.
    pub const WRITE_THROUGH: u64 = 1 << 3;
    /// Bit 4: PCD, bit 1 of the PAT selector.
    pub const CACHE_DISABLE: u64 = 1 << 4;
    /// Bit 5: A.
    pub const ACCESSED: u64 = 1 << 5;
    /// Bit 6 of a leaf: D.
    pub const DIRTY: u64 = 1 << 6;
    /// Bit 7 of a 4K leaf: PAT, bit 2 of the selector.
    pub const PAT_4K: u64 = 1 << 7;
    /// Bit 12 of a 2M or 1G leaf: PAT, bit 2 of the selector.
    pub const PAT_HUGE: u64 = 1 << 12;
    /// Bit 8 of a leaf: G.
    pub const GLOBAL: u64 = 1 << 8;
    /// Bits 62:59 of a leaf: protection key, where enabled.
    pub const PROTECTION_KEY: u64 = 0xf << 59;
    /// Where the protection key begins.
    pub const PROTECTION_KEY_SHIFT: u32 = 59;
    /// Bit 63: NX, reserved unless EFER.NXE is set.
    pub const NO_EXECUTE: u64 = 1 << 63;
}

/// How many levels a table has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Levels {
    /// Four levels translate 48 bits.
    #[default]
    Four,
    /// Five levels translate 57 bits.
    Five,
}

impl Levels {
    /// The number: 4 or 5.
    pub const fn get(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }
}

/// Options that no machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// Physical addresses have 32 to 52 bits.
    #[error("{bits} physical address bits are not within 32 to 52")]
    PhysicalBits {
        /// The bits asked for.
        bits: u8,
    },
    /// The encryption bit (C-bit) lies in the address field, above the width that is left for addresses.
    #[error("encryption bit {bit} is not within {physical_bits} to 51")]
    EncryptionBit {
        /// The bit asked for.
        bit: u8,
        /// Physical address bits.
        physical_bits: u8,
    },
    /// Tables can be encrypted only where there is an encryption bit.
    #[error("encrypted tables need an encryption bit")]
    EncryptTables,
    /// The width that caches compare (L1TF) is at least 32 bits.
    #[error("{bits} cache address bits are not within 32 to 52")]
    CacheBits {
        /// The bits asked for.
        bits: u8,
    },
    /// Execute can be withheld from larger leaves only where EFER.NXE is set.
    #[error("non-executable huge pages need EFER.NXE")]
    NxHugePages,
    /// Nested tables have no protection keys.
    #[error("nested tables have no protection keys")]
    NestedProtectionKeys,
}

pub(crate) const fn check_widths(physical: u8, cache: Option<u8>) -> Result<(), OptionsError> {
    if physical < 32 || physical > 52 {
        return Err(OptionsError::PhysicalBits { bits: physical });
    }
    match cache {
        Some(bits) if bits < 32 || bits > 52 => Err(OptionsError::CacheBits { bits }),
        _ => Ok(()),
    }
}

const fn shape(levels: Levels, two_m: bool, one_g: bool) -> Geometry {
    let l1 = LevelShape { shift: 12, bits: 9, leaf: true };
    let l2 = LevelShape { shift: 21, bits: 9, leaf: two_m };
    let l3 = LevelShape { shift: 30, bits: 9, leaf: one_g };
    let l4 = LevelShape { shift: 39, bits: 9, leaf: false };
    let l5 = LevelShape { shift: 48, bits: 9, leaf: false };
    let shape = match levels {
        Levels::Four => Geometry::new(&[l1, l2, l3, l4]),
        Levels::Five => Geometry::new(&[l1, l2, l3, l4, l5]),
    };
    match shape {
        Some(shape) => shape,
        // Evaluated at compile time only, below: a shape that does not exist fails the build.
        None => panic!("no such shape"),
    }
}

const FOUR: [Geometry; 4] = [
    shape(Levels::Four, false, false),
    shape(Levels::Four, true, false),
    shape(Levels::Four, false, true),
    shape(Levels::Four, true, true),
];
const FIVE: [Geometry; 4] = [
    shape(Levels::Five, false, false),
    shape(Levels::Five, true, false),
    shape(Levels::Five, false, true),
    shape(Levels::Five, true, true),
];

pub(crate) fn geometry(levels: Levels, two_m: bool, one_g: bool) -> Geometry {
    let shapes = match levels {
        Levels::Four => FOUR,
        Levels::Five => FIVE,
    };
    shapes[usize::from(two_m) + 2 * usize::from(one_g)]
}

/// The address field of a leaf at `level`: 51:12, 51:21 or 51:30. Empty above the levels that could hold leaves.
pub(crate) const fn address_field(level: Level) -> u64 {
    match level.get() {
        1 => ADDRESS,
        2 => bit_range(51, 21),
        3 => bit_range(51, 30),
        _ => 0,
    }
}

/// A link stands above the leaf level of a table with this shape.
pub(crate) fn check_link(geometry: &Geometry, level: Level) -> Result<(), FormatError> {
    if level == Level::LEAF || level > geometry.top() {
        return Err(FormatError::Attribute {
            value: u64::from(level.get()),
            rule: "links stand between the second level and the root's",
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_ranges_include_both_ends() {
        assert_eq!(ADDRESS, 0x000f_ffff_ffff_f000);
        assert_eq!(bit_range(63, 0), u64::MAX);
        assert_eq!(bit_range(0, 0), 1);
        assert_eq!(bit_range(3, 4), 0);
    }

    #[test]
    fn four_levels_cover_48_bits_and_five_57() {
        assert_eq!(geometry(Levels::Four, true, true).address_bits(), 48);
        assert_eq!(geometry(Levels::Five, true, true).address_bits(), 57);
        let level3 = Level::LEAF.above().and_then(Level::above).unwrap();
        assert!(!geometry(Levels::Five, true, false).level(level3).leaf);
        assert!(geometry(Levels::Five, false, true).level(level3).leaf);
    }
}
