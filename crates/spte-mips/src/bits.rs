// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where the bits of an entry stand, and the shapes of tables.
//!
//! The table is Linux's own for 64-bit MIPS: hardware has no table format, it has a TLB. What hardware knows is EntryLo
//! (MIPS64 Privileged Resource Architecture, "EntryLo0, EntryLo1"), and an entry is an EntryLo shifted up, with
//! software's bits below it: `entry >> GLOBAL` is an EntryLo but for RI and XI.
//!
//! | [`PteLayout`] | software | XI | RI | G | V | D | C | frame, 4K / 16K / 64K |
//! |---|---|---|---|---|---|---|---|---|
//! | `Plain` | 0 to 3 | 4 | 5 | 6 | 7 | 8 | 11:9 | 12 / 14 / 16 |
//! | `Huge` | 0 to 4 | 5 | 6 | 7 | 8 | 9 | 12:10 | 13 / 15 / 17 |
//! | `HugeSplitting` | 0 to 5 | 6 | 7 | 8 | 9 | 10 | 13:11 | 14 / 16 / 18 |
//!
//! That is Linux before v5.4. Since then SPECIAL stands behind MODIFIED, and behind HUGE where that is (commit 61cbfff4b1a7), and
//! all above is one higher; no leaf of a GPA table has it. So for such a kernel `Huge` is the layout without huge pages, and
//! `HugeSplitting` the one with. Where the kernel has SOFT_DIRTY too (`CONFIG_HAVE_ARCH_SOFT_DIRTY`) everything is one higher
//! still: with huge pages there is no layout for that here.
//!
//! Sources: Linux `arch/mips/include/asm/pgtable-bits.h` (`enum pgtable_bits`, release 2 and later), `pgtable-64.h`.
//! PageMask: `mipsregs.h` (`PM_4K`, `PM_16K`, `PM_64K`). EntryLo's RI and XI, and that a PTE becomes an EntryLo by that
//! shift, also by QEMU, `target/mips/tcg/sysemu/tlb_helper.c` (`get_tlb_entry_layout`).

use spte_core::format::{Geometry, LevelShape};
pub use spte_core::raw::bit_range;

/// Bit 0: there is a page. Software's; hardware goes by V.
pub const PRESENT: u64 = 1 << 0;
/// Bit 1: the guest may write, whether or not the next write traps. Software's.
pub const WRITE: u64 = 1 << 1;
/// Bit 2: used since it was last aged. Software's.
pub const ACCESSED: u64 = 1 << 2;
/// Bit 3: written since it was last cleaned. Software's.
pub const MODIFIED: u64 = 1 << 3;

/// Where everything above bit 3 begins: what the kernel that reads the table was configured with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PteLayout {
    /// Four bits of software's: Linux before v5.4, without huge pages.
    #[default]
    Plain,
    /// Five. With huge pages before v5.4: HUGE is bit 4. (No leaf of a GPA table is huge.) Without huge pages since v5.4:
    /// bit 4 is SPECIAL.
    Huge,
    /// Six. With huge pages until v4.4: SPLITTING is bit 5. With huge pages since v5.4: bit 5 is SPECIAL.
    HugeSplitting,
}

impl PteLayout {
    /// Where G stands, and EntryLo begins: 6, 7 or 8.
    pub const fn global_shift(self) -> u32 {
        match self {
            Self::Plain => 6,
            Self::Huge => 7,
            Self::HugeSplitting => 8,
        }
    }

    /// HUGE, SPLITTING and SPECIAL, where there are any: no leaf of a GPA table has them.
    pub const fn huge(self) -> u64 {
        bit_range(self.global_shift() - 3, 4)
    }
    /// XI, execute inhibit.
    pub const fn execute_inhibit(self) -> u64 {
        1 << (self.global_shift() - 2)
    }
    /// RI, read inhibit. Without RIXI the same place is software's READ, which says the opposite.
    pub const fn read_inhibit(self) -> u64 {
        1 << (self.global_shift() - 1)
    }
    /// G, global.
    pub const fn global(self) -> u64 {
        1 << self.global_shift()
    }
    /// V, valid: clear, every access is a TLB Invalid exception.
    pub const fn valid(self) -> u64 {
        1 << (self.global_shift() + 1)
    }
    /// D: clear, a store is a TLB Modified exception.
    pub const fn dirty(self) -> u64 {
        1 << (self.global_shift() + 2)
    }
    /// Where C, the cache attribute, begins.
    pub const fn cache_shift(self) -> u32 {
        self.global_shift() + 3
    }
    /// C.
    pub const fn cache(self) -> u64 {
        7 << self.cache_shift()
    }

    /// The entry's bits for a physical address: EntryLo has it from bit 6 on in units of 4K, whatever the page size.
    pub(crate) const fn put(self, address: u64) -> u64 {
        address << (self.global_shift() - 6)
    }

    /// The physical address in `raw`, a page of `1 << shift` bytes.
    pub(crate) const fn get(self, raw: u64, shift: u8) -> u64 {
        (raw >> (self.global_shift() - 6)) & (u64::MAX << shift)
    }

    /// The bits of the address, of a page of `1 << shift` bytes on a machine with `bits` physical address bits.
    pub const fn frame(self, shift: u8, bits: u8) -> u64 {
        let up = self.global_shift() - 6;
        if bits == 0 { 0 } else { bit_range(bits as u32 + up - 1, shift as u32 + up) }
    }
}

/// The size of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum PageSize {
    /// 4 KiB.
    #[default]
    K4,
    /// 16 KiB.
    K16,
    /// 64 KiB.
    K64,
}

impl PageSize {
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

    /// The page of so many bytes, if there is one.
    pub const fn from_bytes(bytes: u64) -> Option<Self> {
        match bytes {
            0x1000 => Some(Self::K4),
            0x4000 => Some(Self::K16),
            0x1_0000 => Some(Self::K64),
            _ => None,
        }
    }

    /// PageMask for pairs of such pages: 0, 0x6000 or 0x1e000.
    pub const fn page_mask(self) -> u64 {
        match self {
            Self::K4 => 0,
            Self::K16 => 0x6000,
            Self::K64 => 0x1_e000,
        }
    }
}

/// How many guest address bits there are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Width {
    /// What Linux has by default: 40 bits of 4K pages, 36 of 16K, 42 of 64K.
    #[default]
    Standard,
    /// One level more (`CONFIG_MIPS_VA_BITS_48`): 48 bits of 4K and 16K pages, 55 of 64K.
    Wide,
}

const fn shape(shift: u8, bits: u8) -> LevelShape {
    LevelShape { shift, bits, leaf: shift <= 16 }
}

/// The shape of a table (`PTRS_PER_PGD` and so on of `pgtable-64.h`). Every table but the root is one page; leaves are pages.
pub(crate) fn geometry(page: PageSize, width: Width) -> Option<Geometry> {
    match (page, width) {
        (PageSize::K4, Width::Standard) => Geometry::new(&[shape(12, 9), shape(21, 9), shape(30, 10)]),
        (PageSize::K4, Width::Wide) => Geometry::new(&[shape(12, 9), shape(21, 9), shape(30, 9), shape(39, 9)]),
        (PageSize::K16, Width::Standard) => Geometry::new(&[shape(14, 11), shape(25, 11)]),
        (PageSize::K16, Width::Wide) => Geometry::new(&[shape(14, 11), shape(25, 11), shape(36, 12)]),
        (PageSize::K64, Width::Standard) => Geometry::new(&[shape(16, 13), shape(29, 13)]),
        (PageSize::K64, Width::Wide) => Geometry::new(&[shape(16, 13), shape(29, 13), shape(42, 13)]),
    }
}

/// Base of xkphys, where every physical address is a virtual one, with its cache attribute in 61:59.
pub const XKPHYS: u64 = 2 << 62;
/// Where xkphys has its cache attribute.
pub const XKPHYS_CACHE_SHIFT: u32 = 59;
/// First address of ckseg0: the first 512M of physical memory, cached.
pub const CKSEG0: u64 = 0xffff_ffff_8000_0000;
/// Bytes of ckseg0 and of ckseg1, which follows it.
pub const CKSEG_BYTES: u64 = 0x2000_0000;

/// The physical address that an address of an unmapped segment stands for; `None` for a mapped one, which a walker cannot be
/// given.
pub const fn unmapped(address: u64) -> Option<u64> {
    if address >> 62 == 2 {
        Some(address & bit_range(58, 0))
    } else if address >= CKSEG0 && address - CKSEG0 < 2 * CKSEG_BYTES {
        Some(address & (CKSEG_BYTES - 1))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_stand_where_linux_has_them() {
        let of = |layout: PteLayout| {
            let bits = [
                layout.execute_inhibit(),
                layout.read_inhibit(),
                layout.global(),
                layout.valid(),
                layout.dirty(),
                layout.cache(),
            ];
            (bits.map(u64::trailing_zeros), [12, 14, 16].map(|page| layout.frame(page, 48).trailing_zeros()))
        };
        assert_eq!(of(PteLayout::Plain), ([4, 5, 6, 7, 8, 9], [12, 14, 16]));
        assert_eq!(of(PteLayout::Huge), ([5, 6, 7, 8, 9, 10], [13, 15, 17]));
        assert_eq!(of(PteLayout::HugeSplitting), ([6, 7, 8, 9, 10, 11], [14, 16, 18]));
        assert_eq!([PteLayout::Plain, PteLayout::Huge, PteLayout::HugeSplitting].map(PteLayout::huge), [0, 0x10, 0x30]);
    }

    #[test]
    fn unmapped_segments_are_xkphys_and_the_two_small_ones() {
        assert_eq!(unmapped(0x9800_0000_1234_5000), Some(0x1234_5000));
        assert_eq!(unmapped(0xa800_1234_5678_9000), Some(0x1234_5678_9000));
        assert_eq!(unmapped(0xffff_ffff_8012_3000), Some(0x12_3000));
        assert_eq!(unmapped(0xffff_ffff_a012_3000), Some(0x12_3000));
        for mapped in [0, 0x1000, 0x4000_0000_0000_0000, 0xc000_0000_0000_0000, 0xffff_ffff_c000_0000, u64::MAX] {
            assert_eq!(unmapped(mapped), None);
        }
    }
}
