// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hardware's bits, and the shapes of trees.
//!
//! IBM counts bits from the most significant one, 0; masks here are ordinary numbers, and both are given. Every word of a tree
//! is big-endian in memory, whatever the processor's mode.
//!
//! Sources: Power ISA 3.0 and 3.1, Book III, "Radix Tree Translation", by way of two readers of it: Linux
//! (`arch/powerpc/include/asm/book3s/64/pgtable.h`: `_PAGE_PRESENT`, `_PAGE_PTE`, `_RPAGE_SW0` to `_RPAGE_SW3`; `radix.h`:
//! `RADIX_PMD_VAL_BITS`, `RADIX_PMD_BAD_BITS`, `RADIX_PTE_NONE_MASK`; `radix-4k.h`, `radix-64k.h`) and QEMU
//! (`target/ppc/mmu-radix64.c`: `R_PTE_*`, `R_PDE_NLB`, `R_PDE_NLS`, `ppc_radix64_get_prot_eaa`, `ppc_radix64_is_valid_level`).

use spte_core::format::{Geometry, Level, LevelShape};
pub use spte_core::raw::bit_range;
pub(crate) use spte_core::raw::check_output;

/// IBM bit 0: V, valid. With it clear hardware ignores all others.
pub const VALID: u64 = 1 << 63;
/// IBM bit 1: L, a leaf (RPTE); clear, a directory entry (RPDE).
pub const LEAF: u64 = 1 << 62;
/// IBM bit 2 of a leaf: the first bit for software. Of a directory entry: reserved.
pub const SW0: u64 = 1 << 61;
/// IBM bits 3:6 of a leaf: reserved. (A Linux entry in hash mode keeps protection keys there.)
pub const LEAF_RESERVED_HIGH: u64 = bit_range(60, 57);
/// IBM bits 7:51 of a leaf: RPN, the output address.
pub const RPN: u64 = bit_range(56, 12);
/// IBM bit 52 of a leaf: for software. (Linux: `_PAGE_DEVMAP`.)
pub const SW1: u64 = 1 << 11;
/// IBM bit 53 of a leaf: for software. (Linux: `_PAGE_SPECIAL`.)
pub const SW2: u64 = 1 << 10;
/// IBM bit 54 of a leaf: for software. (Linux: `_PAGE_SOFT_DIRTY`.)
pub const SW3: u64 = 1 << 9;
/// IBM bit 55 of a leaf: R, referenced.
pub const REFERENCED: u64 = 1 << 8;
/// IBM bit 56 of a leaf: C, changed.
pub const CHANGED: u64 = 1 << 7;
/// IBM bit 57 of a leaf: reserved.
pub const LEAF_RESERVED_LOW: u64 = 1 << 6;
/// IBM bits 58:59 of a leaf: ATT, the storage attribute.
pub const ATT: u64 = 3 << ATT_SHIFT;
/// Where ATT begins.
pub const ATT_SHIFT: u32 = 4;
/// IBM bit 60 of a leaf: EAA\[0\], privileged. Of no effect in a partition-scoped tree (QEMU: `ppc_radix64_check_prot`).
pub const PRIVILEGED: u64 = 1 << 3;
/// IBM bit 61 of a leaf: EAA\[1\], read.
pub const READ: u64 = 1 << 2;
/// IBM bit 62 of a leaf: EAA\[2\], read and write: without [`READ`] too, reading is granted (QEMU: `ppc_radix64_get_prot_eaa`).
pub const WRITE: u64 = 1 << 1;
/// IBM bit 63 of a leaf: EAA\[3\], execute.
pub const EXECUTE: u64 = 1 << 0;
/// IBM bits 4:55 of a directory entry: NLB, the base of the next table, in steps of 256 bytes.
pub const NLB: u64 = bit_range(59, 8);
/// IBM bits 59:63 of a directory entry: NLS, log2 of the next table's entries.
pub const NLS: u64 = bit_range(4, 0);
/// IBM bits 2:3 and 56:58 of a directory entry: reserved (Linux: `RADIX_PMD_BAD_BITS`, with L and without IBM bit 3, which lies
/// outside QEMU's `R_PDE_NLB` and every field of gem5's `Rpde`).
pub const LINK_RESERVED: u64 = bit_range(61, 60) | bit_range(7, 5);

/// The most bits that RPN holds.
pub const WIDEST: u8 = 57;

/// Bits of a guest address that a tree translates. The processors know one shape of tree, of 52 bits.
pub const ADDRESS_BITS: u8 = 52;

/// The size of the smallest page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum BasePage {
    /// 4 KiB: a leaf table has 512 entries, 4 KiB.
    K4,
    /// 64 KiB: a leaf table has 32 entries, **256 bytes**. A table is then much less than a page.
    #[default]
    K64,
}

impl BasePage {
    /// log2 of its bytes: 12 or 16.
    pub const fn shift(self) -> u8 {
        match self {
            Self::K4 => 12,
            Self::K64 => 16,
        }
    }

    /// Its bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.shift()
    }

    /// Index bits of a leaf table: 9 or 5.
    pub const fn leaf_bits(self) -> u8 {
        21 - self.shift()
    }

    /// The base page of so many bytes, if there is one.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            0x1000 => Some(Self::K4),
            0x1_0000 => Some(Self::K64),
            _ => None,
        }
    }
}

/// Options that no machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// RPN holds 57 bits; fewer than 32 no machine has.
    #[error("{bits} physical address bits are not within 32 to {WIDEST}")]
    PhysicalBits {
        /// The bits asked for.
        bits: u8,
    },
}

/// From the leaf up: base pages, 2M, 1G, and the root of 13 bits, whose entries span 512G and are no leaves (POWER9 User's
/// Manual 4.10.4.1 and POWER10's 5.10.6.1, "Supported Radix Tree Configurations", as QEMU quotes them; Linux:
/// `R_PTE_INDEX_SIZE` to `R_PGD_INDEX_SIZE`).
const fn shape(page: BasePage) -> Option<Geometry> {
    Geometry::new(&[
        LevelShape { shift: page.shift(), bits: page.leaf_bits(), leaf: true },
        LevelShape { shift: 21, bits: 9, leaf: true },
        LevelShape { shift: 30, bits: 9, leaf: true },
        LevelShape { shift: 39, bits: 13, leaf: false },
    ])
}

const SHAPE_4K: Geometry = match shape(BasePage::K4) {
    Some(shape) => shape,
    None => panic!("levels follow one another"),
};
const SHAPE_64K: Geometry = match shape(BasePage::K64) {
    Some(shape) => shape,
    None => panic!("levels follow one another"),
};

pub(crate) const fn geometry(page: BasePage) -> Geometry {
    match page {
        BasePage::K4 => SHAPE_4K,
        BasePage::K64 => SHAPE_64K,
    }
}

/// The number of a level: 1 where the base pages are. (The ISA counts from the root, and only in prose.)
pub(crate) const fn number_of(level: Level) -> i8 {
    level.get() as i8
}
