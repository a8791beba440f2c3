// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What points at a tree: roots, entries of the partition table and of process tables, and PTCR.
//!
//! Sources: Linux, `arch/powerpc/include/asm/book3s/64/mmu.h` (`PATB_HR`, `PATB_GR`, `RPDB_MASK`, `RTS1_SHIFT`,
//! `RTS2_SHIFT`, `RPDS_MASK`, `PRTB_MASK`, `PRTS_MASK`), `arch/powerpc/mm/book3s64/radix_pgtable.c`
//! (`radix_init_partition_table`, `PATB_SIZE_SHIFT - 12` in PTCR) and `arch/powerpc/kvm/book3s_hv_nested.c`
//! (`PATS_MASK`, and 16 bytes an LPID); QEMU, `target/ppc/mmu-radix64.c` (`PRTBE_R_GET_RTS`, `PATE1_R_PRTS`).

use notifier_core::OutputAddr;
use spte_core::format::Format;

use crate::{
    bits::{ADDRESS_BITS, bit_range},
    radix::Radix,
};

/// IBM bit 0 of the first word of a partition-table entry: HR, the host translates by radix tree.
pub const HOST_RADIX: u64 = 1 << 63;
/// IBM bit 0 of the second word: GR, the guest translates by radix tree; must be as HR.
pub const GUEST_RADIX: u64 = 1 << 63;

/// Bits of a tree's size that RTS leaves out.
const RTS_LEAST: u8 = 31;
/// The high two bits of RTS, IBM bits 1:2, and the low three, IBM bits 56:58.
const RTS_HIGH: u32 = 61;
const RTS_LOW: u32 = 5;
const RTS: u64 = 3 << RTS_HIGH | 7 << RTS_LOW;
/// IBM bits 4:55: RPDB, the root's base.
const BASE: u64 = bit_range(59, 8);
/// IBM bits 59:63: RPDS, log2 of the root's entries; PRTS and PATS, log2 of a table's pages of 4K.
const SIZE: u64 = bit_range(4, 0);
/// IBM bits 4:51: PRTB, PATB.
const TABLE_BASE: u64 = bit_range(59, 12);
/// The largest PRTS and PATS: 64 GiB.
const MOST: u8 = 24;

/// A word that the processor refuses, or that this crate does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// A table is aligned to its size.
    #[error("{base} is not aligned to {align:#x} bytes")]
    Unaligned {
        /// The table.
        base: OutputAddr,
        /// What it has to be a multiple of.
        align: u64,
    },
    /// The address has more bits than there are.
    #[error("{base} needs more than {bits} physical address bits")]
    TooWide {
        /// The table.
        base: OutputAddr,
        /// The bits there are.
        bits: u8,
    },
    /// A process or partition table has 2^12 to 2^36 bytes.
    #[error("a table of 2^{log2} bytes is not within 2^12 to 2^36")]
    TableSize {
        /// log2 of the bytes asked for.
        log2: u8,
    },
    /// Reserved bits are set.
    #[error("bits {bits:#x} of {raw:#x} are reserved")]
    Reserved {
        /// The word.
        raw: u64,
        /// Those of its bits.
        bits: u64,
    },
    /// The partition translates by hash, in whole or in one of the two scopes.
    #[error("{raw:#x}: the partition is not a radix one")]
    NotRadix {
        /// The word that says so.
        raw: u64,
    },
    /// The tree has a shape that no processor walks.
    #[error("{raw:#x}: a tree of {bits} bits with 2^{entries} entries at the root; there is 52 and 13")]
    Shape {
        /// The word.
        raw: u64,
        /// Address bits, by RTS.
        bits: u8,
        /// log2 of the root's entries, by RPDS.
        entries: u8,
    },
    /// The partition table has no entry for the LPID.
    #[error("LPID {lpid} is not among the {entries} of the partition table")]
    Lpid {
        /// The LPID.
        lpid: u32,
        /// Entries there are.
        entries: u64,
    },
}

fn aligned(base: OutputAddr, align: u64) -> Result<(), RegisterError> {
    if base.is_aligned(align) { Ok(()) } else { Err(RegisterError::Unaligned { base, align }) }
}

/// The base of a table of `1 << log2` bytes, and its size, as PRTB with PRTS and PATB with PATS have them.
fn table_word(base: OutputAddr, log2: u8) -> Result<u64, RegisterError> {
    let size = log2.checked_sub(12).filter(|size| *size <= MOST).ok_or(RegisterError::TableSize { log2 })?;
    aligned(base, 1 << log2)?;
    if base.as_u64() & !TABLE_BASE != 0 {
        return Err(RegisterError::TooWide { base, bits: 60 });
    }
    Ok(base.as_u64() | u64::from(size))
}

/// Checks what [`table_word`] makes; `flag` is whatever else may be set.
fn check_table_word(raw: u64, flag: u64) -> Result<(), RegisterError> {
    let bits = raw & !(TABLE_BASE | SIZE | flag);
    if bits != 0 {
        return Err(RegisterError::Reserved { raw, bits });
    }
    let size = (raw & SIZE) as u8;
    if size > MOST {
        return Err(RegisterError::TableSize { log2: size + 12 });
    }
    aligned(OutputAddr::new(raw & TABLE_BASE), 1 << (size + 12))
}

/// The root of a tree, as the first word of a process-table entry has it: RTS, RPDB, RPDS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Root(u64);

impl Root {
    /// The root of a tree of this format at `root` (64K of entries).
    ///
    /// # Errors
    /// [`RegisterError::Unaligned`] and [`RegisterError::TooWide`] for the address.
    pub fn new(format: &Radix, root: OutputAddr) -> Result<Self, RegisterError> {
        let geometry = format.geometry();
        aligned(root, geometry.table_bytes(geometry.top()) as u64)?;
        let bits = format.options().physical_bits;
        if root.as_u64() >> bits != 0 {
            return Err(RegisterError::TooWide { base: root, bits });
        }
        let entries = u64::from(geometry.level(geometry.top()).bits);
        Ok(Self(Self::tree_size(ADDRESS_BITS) | root.as_u64() | entries))
    }

    /// RTS of a tree of so many bits, in its two places (Linux: `radix__get_tree_size`). 31 to 62.
    const fn tree_size(bits: u8) -> u64 {
        let rts = (bits - RTS_LEAST) as u64;
        (rts >> 3) << RTS_HIGH | (rts & 7) << RTS_LOW
    }

    /// From a raw word.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`], [`RegisterError::Shape`], [`RegisterError::Unaligned`].
    pub fn from_raw(raw: u64) -> Result<Self, RegisterError> {
        let reserved = raw & !(RTS | BASE | SIZE);
        if reserved != 0 {
            return Err(RegisterError::Reserved { raw, bits: reserved });
        }
        let root = Self(raw);
        let entries = (raw & SIZE) as u8;
        let bits = root.address_bits();
        // POWER9 and POWER10 walk no other (QEMU: `ppc_radix64_is_valid_level`).
        if (bits, entries) != (ADDRESS_BITS, 13) {
            return Err(RegisterError::Shape { raw, bits, entries });
        }
        aligned(root.base(), 8 << entries)?;
        Ok(root)
    }

    /// The number.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Where the root lies.
    pub const fn base(self) -> OutputAddr {
        OutputAddr::new(self.0 & BASE)
    }

    /// Address bits of the tree: RTS + 31.
    pub const fn address_bits(self) -> u8 {
        ((self.0 >> RTS_HIGH & 3) << 3 | self.0 >> RTS_LOW & 7) as u8 + RTS_LEAST
    }
}

/// A process-table entry of a radix guest or host: its first word is a root, its second is zero.
///
/// The guest's own process table is in guest memory, and this crate makes none; but a host that is a guest itself has to read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ProcessEntry(pub Root);

impl ProcessEntry {
    /// Both words, as they lie in memory.
    pub fn to_memory(self) -> [u8; 16] {
        words(self.0.raw(), 0)
    }

    /// From memory.
    ///
    /// # Errors
    /// As [`Root::from_raw`]; the second word is reserved.
    pub fn from_memory(memory: [u8; 16]) -> Result<Self, RegisterError> {
        let (first, second) = split_words(memory);
        if second != 0 {
            return Err(RegisterError::Reserved { raw: second, bits: second });
        }
        Root::from_raw(first).map(Self)
    }
}

/// A partition-table entry of a radix partition.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PartitionEntry {
    root: Root,
    /// GR, PRTB, PRTS.
    process_table: u64,
}

impl PartitionEntry {
    /// A partition whose memory is translated by the tree at `root`, and whose processes are those of a table of
    /// `1 << log2` bytes (12 to 36) at `process_table`, a guest physical address.
    ///
    /// # Errors
    /// As [`Root::new`]; [`RegisterError::TableSize`], and [`RegisterError::Unaligned`] or [`RegisterError::TooWide`] for
    /// the process table.
    pub fn new(format: &Radix, root: OutputAddr, process_table: u64, log2: u8) -> Result<Self, RegisterError> {
        let base = OutputAddr::new(process_table);
        if process_table >> ADDRESS_BITS != 0 {
            return Err(RegisterError::TooWide { base, bits: ADDRESS_BITS });
        }
        let process_table = table_word(base, log2)? | GUEST_RADIX;
        Ok(Self { root: Root::new(format, root)?, process_table })
    }

    /// From both raw words.
    ///
    /// # Errors
    /// [`RegisterError::NotRadix`] where HR or GR is clear; as [`Root::from_raw`]; [`RegisterError::Reserved`],
    /// [`RegisterError::TableSize`] and [`RegisterError::Unaligned`] for the process table.
    pub fn from_raw(first: u64, second: u64) -> Result<Self, RegisterError> {
        if first & HOST_RADIX == 0 {
            return Err(RegisterError::NotRadix { raw: first });
        }
        if second & GUEST_RADIX == 0 {
            return Err(RegisterError::NotRadix { raw: second });
        }
        check_table_word(second, GUEST_RADIX)?;
        Ok(Self { root: Root::from_raw(first & !HOST_RADIX)?, process_table: second })
    }

    /// From memory. Errors are those of [`PartitionEntry::from_raw`].
    ///
    /// # Errors
    /// As above.
    pub fn from_memory(memory: [u8; 16]) -> Result<Self, RegisterError> {
        let (first, second) = split_words(memory);
        Self::from_raw(first, second)
    }

    /// Both words, as they lie in memory. The second is written first: the entry counts from the first on.
    pub fn to_memory(self) -> [u8; 16] {
        let [first, second] = self.raw();
        words(first, second)
    }

    /// Both words.
    pub const fn raw(self) -> [u64; 2] {
        [self.root.raw() | HOST_RADIX, self.process_table]
    }

    /// The tree.
    pub const fn root(self) -> Root {
        self.root
    }

    /// Where the process table lies, a guest physical address, and its bytes.
    pub const fn process_table(self) -> (u64, u64) {
        (self.process_table & TABLE_BASE, 1 << ((self.process_table & SIZE) + 12))
    }
}

/// PTCR: where the partition table lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Ptcr(u64);

impl Ptcr {
    /// A partition table of `1 << log2` bytes at `base`, which is aligned to them. (POWER9 wants 64K, 16; Linux, `PATB_SIZE_SHIFT`.)
    ///
    /// # Errors
    /// [`RegisterError::TableSize`], [`RegisterError::Unaligned`], [`RegisterError::TooWide`].
    pub fn new(base: OutputAddr, log2: u8) -> Result<Self, RegisterError> {
        table_word(base, log2).map(Self)
    }

    /// From a raw value.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`], [`RegisterError::TableSize`], [`RegisterError::Unaligned`].
    pub fn from_raw(raw: u64) -> Result<Self, RegisterError> {
        check_table_word(raw, 0).map(|()| Self(raw))
    }

    /// The number.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// Where the table lies.
    pub const fn base(self) -> OutputAddr {
        OutputAddr::new(self.0 & TABLE_BASE)
    }

    /// How many partitions it has room for.
    pub const fn entries(self) -> u64 {
        1 << ((self.0 & SIZE) + 12 - 4)
    }

    /// Where the entry of `lpid` lies.
    ///
    /// # Errors
    /// [`RegisterError::Lpid`] beyond the table.
    pub fn entry(self, lpid: u32) -> Result<OutputAddr, RegisterError> {
        let entries = self.entries();
        if u64::from(lpid) >= entries {
            return Err(RegisterError::Lpid { lpid, entries });
        }
        Ok(self.base().wrapping_add(u64::from(lpid) * 16))
    }
}

fn words(first: u64, second: u64) -> [u8; 16] {
    (u128::from(first) << 64 | u128::from(second)).to_be_bytes()
}

fn split_words(memory: [u8; 16]) -> (u64, u64) {
    let both = u128::from_be_bytes(memory);
    ((both >> 64) as u64, both as u64)
}
