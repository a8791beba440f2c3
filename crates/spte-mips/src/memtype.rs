// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Cache attributes: C of EntryLo, three bits.
//!
//! 2 and 3 are what the architecture requires; the others are the processor's (MIPS64 PRA, "Cacheability and Coherency
//! Attributes"). The R4000 has 2 to 6, and calls the others reserved; the 4K takes 0, 1, 4, 5 and 6 for 3, and 7 for 2 (their
//! manuals, "EntryLo"). EntryLo of release 6 need not take any but 2 and 3: C then keeps what it was, so that a handler writes
//! another page's attribute. Names and values are Linux's (`_CACHE_CACHABLE_NO_WA` and so on, `pgtable-bits.h`); the kernel's
//! default for memory is platform data (`_page_cachable_default`), 3 or 5 as a rule.
//!
//! What is here is the root's attribute. Where GuestCtl0Ext.NCC is 0 the guest's own counts, whatever the root's is; where it is
//! 1 the root's modifies it (Linux: `MIPS_GCTL0EXT_NCC_IND`, `_MOD`; how it does is the processor's). KVM gives every page the
//! host's default.

/// A cache attribute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Cache {
    /// Write-through, no write-allocate.
    WriteThrough = 0,
    /// Write-allocate; some processors combine writes with it.
    WriteAllocate = 1,
    /// Not cached.
    Uncached = 2,
    /// Write-back, not coherent.
    #[default]
    NonCoherent = 3,
    /// Coherent, exclusive.
    CoherentExclusive = 4,
    /// Coherent, exclusive on write.
    CoherentOnWrite = 5,
    /// Coherent, updated on write.
    CoherentUpdate = 6,
    /// Not cached, writes gathered.
    UncachedAccelerated = 7,
}

impl Cache {
    /// By its three bits; higher bits do not count.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::WriteThrough,
            1 => Self::WriteAllocate,
            2 => Self::Uncached,
            3 => Self::NonCoherent,
            4 => Self::CoherentExclusive,
            5 => Self::CoherentOnWrite,
            6 => Self::CoherentUpdate,
            _ => Self::UncachedAccelerated,
        }
    }

    /// Whether every processor has it.
    pub const fn is_architectural(self) -> bool {
        matches!(self, Self::Uncached | Self::NonCoherent)
    }
}

/// What a leaf says beyond address, rights and facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct GpaAttrs {
    /// The cache attribute.
    pub cache: Cache,
}
