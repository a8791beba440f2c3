// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Storage attributes: ATT, and what else a leaf says beyond address and rights.
//!
//! | ATT | what | Linux |
//! |---|---|---|
//! | 0 | ordinary memory, cached | none |
//! | 1 | ordinary memory, strong access order; reserved since Power ISA 3.1 | `_PAGE_SAO` |
//! | 2 | I/O, non-idempotent: uncached and guarded; no instructions are fetched from it | `_PAGE_NON_IDEMPOTENT`, `pgprot_noncached` |
//! | 3 | I/O, tolerant: uncached, may be gathered and read ahead | `_PAGE_TOLERANT`, `pgprot_noncached_wc` |
//!
//! Sources: Linux, `arch/powerpc/include/asm/book3s/64/pgtable.h`; QEMU, `R_PTE_ATT_*` in `target/ppc/mmu-radix64.h`, and
//! `ppc_radix64_check_prot`, which refuses to fetch instructions where ATT is 2, whatever EAA says. That refusal is the
//! processor's, by what the storage is; `Format::touch` answers by EAA.

use crate::bits::{ATT, ATT_SHIFT};

/// The storage attribute of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Storage {
    /// Ordinary memory.
    #[default]
    Normal = 0,
    /// Ordinary memory with strong access order, on machines of Power ISA 3.0.
    StrongOrder = 1,
    /// I/O where an access may have effects: what devices are mapped as.
    NonIdempotent = 2,
    /// I/O where accesses may be gathered and read ahead.
    Tolerant = 3,
}

impl Storage {
    /// By the value of ATT; the two low bits of `att` count.
    pub const fn from_bits(att: u8) -> Self {
        match att & 3 {
            0 => Self::Normal,
            1 => Self::StrongOrder,
            2 => Self::NonIdempotent,
            _ => Self::Tolerant,
        }
    }

    /// What a leaf says.
    pub(crate) const fn of(raw: u64) -> Self {
        Self::from_bits(((raw & ATT) >> ATT_SHIFT) as u8)
    }
}

/// Attributes of a leaf. The default is ordinary memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct RadixAttrs {
    /// ATT.
    pub storage: Storage,
    /// A bit that is the user's ([`software::USER`](crate::software::USER)).
    pub software: bool,
}

impl RadixAttrs {
    /// With another storage attribute.
    pub const fn storage(self, storage: Storage) -> Self {
        Self { storage, ..self }
    }
}
