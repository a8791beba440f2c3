// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! MMIO entries: a guest page that no slot backs, remembered so that the next access is emulated without a search.
//!
//! An MMIO entry is built so that hardware always refuses it in a way of its own: EPT by writable-but-not-readable (a
//! misconfiguration exit), the others by reserved bit 51 with P (a reserved-bit fault). It holds the guest's address,
//! what rights the guest's own tables gave where the format has room, and 19 bits of the slots' generation: low eight
//! in 10:3, high eleven in 62:52 (Linux: `make_mmio_spte`, `get_mmio_spte_generation`). MMU-present is clear, so that
//! the engine sees a special entry and leaves it alone.
//!
//! - Slots that change do not remove MMIO entries; their generation makes them stale ([`MmioEntry::is_current`]). While
//!   an update is in progress nothing is current.
//! - When the 19 bits wrap, every MMIO entry has to go ([`SlotGeneration::wraps`]).
//! - On a CPU with L1TF whose caches compare `c` address bits, a speculative load through the entry must miss: bits
//!   `c-5` to `c-1` are set, and what they hid is kept five bits higher.

use notifier_core::Gpa;

use crate::{
    bits::{ADDRESS, bit_range, ept, long_mode},
    software::MMU_PRESENT,
};

const GENERATION_LOW: u64 = bit_range(10, 3);
const GENERATION_LOW_SHIFT: u32 = 3;
const GENERATION_LOW_BITS: u64 = 0xff;
const GENERATION_HIGH: u64 = bit_range(62, 52);
const GENERATION_HIGH_SHIFT: u32 = 44;
const HIDDEN_BITS: u32 = 5;

/// An MMIO entry that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MmioError {
    /// An entry stands for a whole page.
    #[error("{gpa} is not the address of a page")]
    Unaligned {
        /// The address.
        gpa: Gpa,
    },
    /// The address does not fit the entry.
    #[error("{gpa} needs more than {bits} address bits")]
    TooWide {
        /// The address.
        gpa: Gpa,
        /// The bits there are.
        bits: u32,
    },
}

/// The slots' generation: a counter, and in bit 63 whether an update is in progress (Linux: `kvm_memslots::generation`,
/// `KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotGeneration(u64);

impl SlotGeneration {
    const UPDATE_IN_PROGRESS: u64 = 1 << 63;

    /// The generation with this counter; of it, 63 bits count. No update is in progress.
    pub const fn new(counter: u64) -> Self {
        Self(counter & !Self::UPDATE_IN_PROGRESS)
    }

    /// The same while an update is in progress.
    #[must_use]
    pub const fn updating(self) -> Self {
        Self(self.0 | Self::UPDATE_IN_PROGRESS)
    }

    /// Whether an update is in progress.
    pub const fn is_updating(self) -> bool {
        self.0 & Self::UPDATE_IN_PROGRESS != 0
    }

    /// The 19 bits that an entry can hold.
    pub const fn mmio(self) -> MmioGeneration {
        MmioGeneration((self.0 & MmioGeneration::MASK as u64) as u32)
    }

    /// Whether the 19 bits begin anew with this generation: every MMIO entry must be zapped, or one of half a million
    /// updates ago would be current again. The lowest `address_space_bits` of the counter number address spaces and do
    /// not count (Linux: `kvm_mmu_invalidate_mmio_sptes`).
    pub const fn wraps(self, address_space_bits: u32) -> bool {
        let counted = match u32::MAX.checked_shl(address_space_bits) {
            Some(mask) => mask,
            None => 0,
        };
        self.mmio().0 & counted == 0
    }
}

/// The 19 bits of a generation that an entry holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct MmioGeneration(u32);

impl MmioGeneration {
    /// How many bits.
    pub const BITS: u32 = 19;
    const MASK: u32 = (1 << Self::BITS) - 1;

    /// The generation with this number, `None` where it has more than 19 bits.
    pub const fn new(number: u32) -> Option<Self> {
        if number & !Self::MASK == 0 { Some(Self(number)) } else { None }
    }

    /// Its number.
    pub const fn get(self) -> u32 {
        self.0
    }

    const fn to_bits(self) -> u64 {
        let number = self.0 as u64;
        ((number & GENERATION_LOW_BITS) << GENERATION_LOW_SHIFT)
            | ((number & !GENERATION_LOW_BITS) << GENERATION_HIGH_SHIFT)
    }

    const fn from_bits(raw: u64) -> Self {
        let low = (raw & GENERATION_LOW) >> GENERATION_LOW_SHIFT;
        let high = (raw & GENERATION_HIGH) >> GENERATION_HIGH_SHIFT;
        Self((low | high) as u32)
    }
}

/// What the guest's own tables allow at the address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MmioAccess {
    /// Writing.
    pub write: bool,
    /// User mode.
    pub user: bool,
}

/// What an MMIO entry says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioEntry {
    /// The page that the guest wants.
    pub gpa: Gpa,
    /// What the guest's tables allow; EPT entries do not hold it.
    pub access: Option<MmioAccess>,
    /// The slots' generation when the entry was made.
    pub generation: MmioGeneration,
}

impl MmioEntry {
    /// Whether the entry may be trusted: no update is in progress, and there was none since it was made (Linux:
    /// `check_mmio_spte`). A stale entry is a fault like any other.
    pub fn is_current(&self, slots: SlotGeneration) -> bool {
        !slots.is_updating() && slots.mmio() == self.generation
    }
}

/// How a format and a machine lay out MMIO entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MmioLayout {
    value: u64,
    mask: u64,
    access: u64,
    /// Address bits that hold themselves.
    direct: u64,
    /// Address bits that are set, and held five bits higher.
    hidden: u64,
    gpa_bits: u32,
}

impl MmioLayout {
    /// EPT: W and X without R, bit 63 clear. Widths are those of [`crate::EptOptions`].
    pub(crate) const fn ept(physical_bits: u8, l1tf_cache_bits: Option<u8>) -> Self {
        let value = ept::WRITE | ept::EXECUTE;
        Self::new(value, ept::RWX | ept::SUPPRESS_VE, 0, physical_bits, l1tf_cache_bits)
    }

    /// Long mode and NPT: P and bit 51, which must be reserved.
    pub(crate) const fn reserved_bit(physical_bits: u8, l1tf_cache_bits: Option<u8>) -> Self {
        let value = (1 << 51) | long_mode::PRESENT;
        Self::new(value, value, long_mode::WRITE | long_mode::USER, physical_bits, l1tf_cache_bits)
    }

    const fn new(value: u64, mask: u64, access: u64, physical_bits: u8, cache: Option<u8>) -> Self {
        let physical_bits = physical_bits as u32;
        match cache {
            // Five bits above the cache's must exist below 52 to hold what is hidden (Linux:
            // kvm_mmu_reset_all_pte_masks).
            Some(cache) if (cache as u32) < 52 - HIDDEN_BITS => {
                let cache = cache as u32;
                let gpa_bits = if cache < physical_bits { cache } else { physical_bits };
                Self {
                    value,
                    mask,
                    access,
                    direct: bit_range(cache - HIDDEN_BITS - 1, 12),
                    hidden: bit_range(cache - 1, cache - HIDDEN_BITS),
                    gpa_bits,
                }
            }
            _ => Self { value, mask, access, direct: ADDRESS & !mask, hidden: 0, gpa_bits: physical_bits },
        }
    }

    /// Bits that an entry sets in any case, to hide addresses from a speculative load; 0 where no CPU needs it.
    pub const fn hidden_bits(&self) -> u64 {
        self.hidden
    }

    /// Whether `raw` is an MMIO entry.
    #[inline]
    pub const fn is_mmio(&self, raw: u64) -> bool {
        raw & self.mask == self.value && raw & MMU_PRESENT == 0
    }

    /// The entry for the page at `gpa`. An entry that is made while an update is in progress is stale from the start.
    ///
    /// # Errors
    /// [`MmioError::Unaligned`] where `gpa` is not a multiple of 4096, [`MmioError::TooWide`] where it has bits that
    /// the entry cannot hold: such addresses are emulated without an entry.
    pub const fn encode(&self, gpa: Gpa, access: MmioAccess, generation: SlotGeneration) -> Result<u64, MmioError> {
        if !gpa.is_aligned(4096) {
            return Err(MmioError::Unaligned { gpa });
        }
        let address = gpa.as_u64();
        if address >> self.gpa_bits != 0 {
            return Err(MmioError::TooWide { gpa, bits: self.gpa_bits });
        }
        let write = if access.write { long_mode::WRITE } else { 0 };
        let user = if access.user { long_mode::USER } else { 0 };
        Ok(self.value
            | generation.mmio().to_bits()
            | ((write | user) & self.access)
            | address
            | self.hidden
            | ((address & self.hidden) << HIDDEN_BITS))
    }

    /// What the entry `raw` says, `None` where it is no MMIO entry.
    pub const fn decode(&self, raw: u64) -> Option<MmioEntry> {
        if !self.is_mmio(raw) {
            return None;
        }
        let access = if self.access == 0 {
            None
        } else {
            Some(MmioAccess { write: raw & long_mode::WRITE != 0, user: raw & long_mode::USER != 0 })
        };
        let address = (raw & self.direct) | ((raw >> HIDDEN_BITS) & self.hidden);
        Some(MmioEntry { gpa: Gpa::new(address), access, generation: MmioGeneration::from_bits(raw) })
    }
}
