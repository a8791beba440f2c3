// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bits that hardware leaves to software, and what this crate keeps in them.
//!
//! They are Linux's where Linux has one (`arch/x86/kvm/mmu/spte.h`), so that a dump of either reads the same:
//!
//! | | EPT | long mode, NPT | Linux |
//! |---|---|---|---|
//! | [MMU-present](MMU_PRESENT) | 11 | 11 | `SPTE_MMU_PRESENT_MASK` |
//! | host-writable | 57 | 9 | `shadow_host_writable_mask` |
//! | MMU-writable | 58 | 10 | `shadow_mmu_writable_mask` |
//! | [accessed/dirty type](AccessedDirty) | 53:52 | none | `SPTE_TDP_AD_MASK` |
//! | saved R and X of a tracked leaf | 54, 56 | none | `SHADOW_ACC_TRACK_SAVED_MASK` |
//! | [claim](CLAIM) | 55 | 55 | none |
//! | dirty fact without a dirty bit | 59 | none | none |
//! | execute withheld by the huge-page mitigation | 62 | 54 | none: `kvm_mmu_page` remembers |
//!
//! **Why these are free.** EPT ignores 52 to 56, 59 and 62 in every entry, whatever the controls. It ignores 57 and 58
//! only while guest-paging verification and paging-write are off; tables of this crate are not for machines that
//! turn these on. Long mode leaves 58:52 to software (59 and up may be protection keys) and 11:9, of which 11 is the
//! restart hint of new Intel CPUs, for ordinary tables only. Linux uses 53:52, 54 and 56 in EPT alone; 55 it uses
//! nowhere in entries that are present.
//!
//! # Values that hold nothing
//! [`ABSENT`], [`CLAIMED`] and [`DEAD`] have every bit clear that makes an entry present to hardware (10 included,
//! which mode-based execute reads), MMU-present clear, no address bit (nothing for a speculative load to find: L1TF),
//! no bit that hardware or ageing writes (5, 6, 8, 9, 59), no claim bit, and bit 63 set, which keeps a `#VE` away from
//! the guest. Each pair differs in at least four. Linux has bit 63 for the first and `0x8000_0000_0000_05a0` for
//! what corresponds to the two others; that value has bits 5, 8 and 10, which ours must avoid.

use spte_core::format::{Kind, NotPresent};

use crate::bits;

/// Bit 11: the entry links to a table or translates to memory. This is the test for presence; hardware's own bits
/// are not, as a tracked leaf has them clear and an MMIO entry has them set.
pub const MMU_PRESENT: u64 = 1 << 11;
/// Bit 55 of a present entry: somebody has claimed it, hardware goes on using it.
pub const CLAIM: u64 = 1 << 55;

/// An entry that holds nothing. Linux: `SHADOW_NONPRESENT_VALUE`. A zero reads the same.
pub const ABSENT: u64 = 0x8000_0000_0000_0000;
/// Somebody is deciding what goes here: bit 63 and 62, 60, 58, 56, 54.
pub const CLAIMED: u64 = 0xd540_0000_0000_0000;
/// An entry of an unlinked table: bit 63 and 61, 57, 53, 52.
pub const DEAD: u64 = 0xa230_0000_0000_0000;

pub(crate) const NOT_PRESENT: NotPresent = NotPresent { absent: ABSENT, claimed: CLAIMED, dead: DEAD };

/// Which of the three values `raw` is, bits in `ignored` left out. A zero is absent too.
pub(crate) const fn nothing(raw: u64, ignored: u64) -> Option<Kind> {
    let ignored = ignored | CLAIM;
    if raw & !ignored == 0 { Some(Kind::Absent) } else { NOT_PRESENT.kind(raw, ignored) }
}

/// Software bits of EPT entries.
pub mod ept {
    /// Bits 53:52: the [`AccessedDirty`](super::AccessedDirty) type.
    pub const AD_TYPE: u64 = 3 << 52;
    /// Where the type begins.
    pub const AD_TYPE_SHIFT: u32 = 52;
    /// How far above R and X their saved copies are.
    pub const SAVED_SHIFT: u32 = 54;
    /// Bits 54 and 56: R and X of a tracked leaf.
    pub const SAVED: u64 = 0x5 << SAVED_SHIFT;
    /// Bit 57: slot and host mapping allow writing.
    pub const HOST_WRITABLE: u64 = 1 << 57;
    /// Bit 58: W may be set by one compare-exchange.
    pub const MMU_WRITABLE: u64 = 1 << 58;
    /// Bit 59: the leaf was written, W is clear by now, and there is no hardware bit that would say so.
    pub const DIRTY_FACT: u64 = 1 << 59;
    /// Bit 62: the huge leaf would be executable, were it not for the mitigation.
    pub const EXECUTE_WITHHELD: u64 = 1 << 62;
}

/// Software bits of long-mode and NPT entries.
pub mod long_mode {
    /// Bit 9: slot and host mapping allow writing.
    pub const HOST_WRITABLE: u64 = 1 << 9;
    /// Bit 10: W may be set by one compare-exchange.
    pub const MMU_WRITABLE: u64 = 1 << 10;
    /// Bit 54: the huge leaf would be executable, were it not for the mitigation.
    pub const EXECUTE_WITHHELD: u64 = 1 << 54;
}

/// How a table learns that a page was used and written. In EPT each entry says so in bits 53:52; NPT and long mode are
/// always [`AccessedDirty::Enabled`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AccessedDirty {
    /// Hardware sets A and D.
    #[default]
    Enabled,
    /// Hardware sets neither (EPTP bit 6 clear): ageing takes the rights away (*access tracking*), and a leaf is dirty
    /// from the moment that W is set.
    Disabled,
    /// Hardware sets both, but D feeds a log of another table (PML) and must not be used: A as in
    /// [`AccessedDirty::Enabled`], dirty as in [`AccessedDirty::Disabled`].
    WriteProtectOnly,
}

impl AccessedDirty {
    /// The two bits of an EPT entry.
    pub const fn to_bits(self) -> u64 {
        let value: u64 = match self {
            Self::Enabled => 0,
            Self::Disabled => 1,
            Self::WriteProtectOnly => 2,
        };
        value << ept::AD_TYPE_SHIFT
    }

    /// What the two bits of an EPT entry say; `None` for the value that does not exist.
    pub const fn from_bits(raw: u64) -> Option<Self> {
        match (raw & ept::AD_TYPE) >> ept::AD_TYPE_SHIFT {
            0 => Some(Self::Enabled),
            1 => Some(Self::Disabled),
            2 => Some(Self::WriteProtectOnly),
            _ => None,
        }
    }
}

/// The four states that a leaf may be in as to writing. Linux checks the same ones (`check_spte_writable_invariants`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteState {
    /// Host-writable, MMU-writable, W.
    Writable,
    /// Host-writable and MMU-writable: writing is withheld for dirty logging or by ageing; one compare-exchange
    /// brings it back.
    Armed,
    /// Host-writable alone: the page holds the guest's own page tables, writes to it must be seen.
    WriteTracked,
    /// None of the three: the host must be asked.
    ReadOnly,
}

/// Where a format keeps the three bits of a [`WriteState`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct WriteBits {
    pub(crate) host: u64,
    pub(crate) mmu: u64,
    pub(crate) write: u64,
}

impl WriteBits {
    pub(crate) const EPT: Self = Self { host: ept::HOST_WRITABLE, mmu: ept::MMU_WRITABLE, write: bits::ept::WRITE };
    pub(crate) const LONG_MODE: Self =
        Self { host: long_mode::HOST_WRITABLE, mmu: long_mode::MMU_WRITABLE, write: bits::long_mode::WRITE };

    pub(crate) const fn all(self) -> u64 {
        self.host | self.mmu | self.write
    }

    pub(crate) const fn state(self, raw: u64) -> Option<WriteState> {
        match (raw & self.host != 0, raw & self.mmu != 0, raw & self.write != 0) {
            (true, true, true) => Some(WriteState::Writable),
            (true, true, false) => Some(WriteState::Armed),
            (true, false, false) => Some(WriteState::WriteTracked),
            (false, false, false) => Some(WriteState::ReadOnly),
            _ => None,
        }
    }

    pub(crate) const fn is_armed(self, raw: u64) -> bool {
        raw & self.all() == self.host | self.mmu
    }

    pub(crate) const fn grant(self, raw: u64) -> u64 {
        raw | self.all()
    }

    pub(crate) const fn arm(self, raw: u64) -> u64 {
        (raw & !self.write) | self.host | self.mmu
    }

    pub(crate) const fn track(self, raw: u64) -> u64 {
        raw & !(self.mmu | self.write)
    }

    pub(crate) const fn deny(self, raw: u64) -> u64 {
        raw & !self.all()
    }

    /// Writing as asked for, where it was: an armed leaf stays armed.
    pub(crate) const fn with(self, raw: u64, writable: bool) -> u64 {
        if !writable {
            self.deny(raw)
        } else if self.is_armed(raw) {
            self.arm(raw)
        } else {
            self.grant(raw)
        }
    }
}
