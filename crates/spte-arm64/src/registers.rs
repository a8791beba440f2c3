// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers that point at tables, as typed values.
//!
//! Sources: Arm DDI 0487, "VTCR_EL2, Virtualization Translation Control Register", "VTTBR_EL2, Virtualization Translation
//! Table Base Register"; pseudocode `AArch64.S2StartLevel`, `AArch64.S2InvalidSL`, `AArch64.S2MinTxSZ`. Linux:
//! `kvm_get_vtcr` in `arch/arm64/kvm/hyp/pgtable.c`, `arch/arm64/include/asm/kvm_arm.h`.

use notifier_core::OutputAddr;
use spte_core::format::Format;

use crate::{
    bits::{Granule, OptionsError, Start, bit_range},
    memtype::Shareability,
    software::AccessedDirty,
    stage2::{Stage2, Stage2Options},
};

/// HCR_EL2.VM, bit 0: stage 2 is on.
pub const HCR_VM: u64 = 1 << 0;
/// HCR_EL2.FWB, bit 46: MemAttr is read as [`Stage2Options::fwb`] says.
pub const HCR_FWB: u64 = 1 << 46;

/// A register value that the processor refuses, or that this crate does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// A machine translates no more guest address bits than it has physical ones.
    #[error("{ipa_bits} guest address bits are more than {physical_bits} physical ones")]
    IpaBits {
        /// Guest address bits.
        ipa_bits: u8,
        /// Physical address bits.
        physical_bits: u8,
    },
    /// Walks begin at this level only on machines with more physical address bits.
    #[error("a walk that begins at level {number} needs a machine with {least} physical address bits")]
    StartLevel {
        /// The level.
        number: i8,
        /// The fewest physical address bits.
        least: u8,
    },
    /// The root is aligned to its size, and to 64 bytes where addresses have 52 bits.
    #[error("root {root} is not aligned to {align:#x} bytes")]
    Unaligned {
        /// The root.
        root: OutputAddr,
        /// What it has to be a multiple of.
        align: u64,
    },
    /// The root has more bits than there are.
    #[error("root {root} needs more than {bits} physical address bits")]
    TooWide {
        /// The root.
        root: OutputAddr,
        /// The bits there are.
        bits: u8,
    },
    /// The VMID has more bits than VTCR_EL2.VS gives.
    #[error("VMID {vmid:#x} has more than 8 bits")]
    Vmid {
        /// The VMID.
        vmid: u16,
    },
    /// Bits that must be zero, or belong to what this crate does not know; or bit 31, which must be one.
    #[error("bits {bits:#x} of {raw:#x} are reserved, or of an unknown feature")]
    Reserved {
        /// The register.
        raw: u64,
        /// Those of its bits.
        bits: u64,
    },
    /// A field has a value that is reserved.
    #[error("{field} of {raw:#x} has a reserved value")]
    Field {
        /// The register.
        raw: u64,
        /// The field's name in the manual.
        field: &'static str,
    },
    /// The fields are each possible, but not together.
    #[error("{raw:#x}: {source}")]
    Options {
        /// The register.
        raw: u64,
        /// Why not.
        source: OptionsError,
    },
}

/// How many bits VMIDs have: VTCR_EL2.VS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum VmidBits {
    /// 8.
    #[default]
    Eight,
    /// 16, with FEAT_VMID16.
    Sixteen,
}

/// The widths that PS can name, as its values 0 to 6.
const fn physical_size(bits: u8) -> u64 {
    match bits {
        0..=32 => 0,
        33..=36 => 1,
        37..=40 => 2,
        41..=42 => 3,
        43..=44 => 4,
        45..=48 => 5,
        _ => 6,
    }
}

/// VTCR_EL2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vtcr(u64);

impl Vtcr {
    const VS: u64 = 1 << 19;
    const HA: u64 = 1 << 21;
    const HD: u64 = 1 << 22;
    const RES1: u64 = 1 << 31;
    const DS: u64 = 1 << 32;
    const SL2: u64 = 1 << 33;
    const KNOWN: u64 = bit_range(19, 0) | Self::HA | Self::HD | Self::RES1 | Self::DS | Self::SL2;

    /// The value for tables of this format: walks are write-back, read- and write-allocating.
    ///
    /// PS is the smallest there is for the format's physical address bits; HWU59 to HWU62 are clear.
    ///
    /// # Errors
    /// [`RegisterError::IpaBits`] and [`RegisterError::StartLevel`], where no machine with so many physical address bits
    /// walks such tables.
    pub fn new(format: &Stage2, vmid_bits: VmidBits) -> Result<Self, RegisterError> {
        let Stage2Options { granule, ipa_bits, physical_bits, lpa2, accessed_dirty, shareability, .. } =
            *format.options();
        if ipa_bits > physical_bits {
            return Err(RegisterError::IpaBits { ipa_bits, physical_bits });
        }
        let number = format.start_level();
        let least = match (granule, number) {
            (Granule::K4, 0) | (Granule::K64, 1) => 44,
            (Granule::K16, 1) => 42,
            _ => 0,
        };
        if physical_bits < least {
            return Err(RegisterError::StartLevel { number, least });
        }
        let (sl0, sl2) = match (granule, number) {
            (Granule::K4, -1) => (0, Self::SL2),
            (Granule::K4, 3) => (3, 0),
            (Granule::K4, number) => ((2 - number) as u64, 0),
            (Granule::K16 | Granule::K64, number) => ((3 - number) as u64, 0),
        };
        let when = |is: bool, bit: u64| if is { bit } else { 0 };
        Ok(Self(
            u64::from(64 - ipa_bits)
                | sl0 << 6
                | 1 << 8
                | 1 << 10
                | (shareability as u64) << 12
                | granule.tg0() << 14
                | physical_size(physical_bits) << 16
                | when(vmid_bits == VmidBits::Sixteen, Self::VS)
                | when(accessed_dirty.sets_accessed(), Self::HA)
                | when(accessed_dirty.sets_dirty(), Self::HD)
                | Self::RES1
                | when(lpa2, Self::DS)
                | sl2,
        ))
    }

    /// The register with this value.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`] for bits of what this crate does not know, [`RegisterError::Field`] for reserved values,
    /// [`RegisterError::Options`] where the level does not fit the width: every access would be a translation fault.
    pub fn from_raw(raw: u64) -> Result<Self, RegisterError> {
        let bits = (raw & !Self::KNOWN) | (!raw & Self::RES1);
        if bits != 0 {
            return Err(RegisterError::Reserved { raw, bits });
        }
        let this = Self(raw);
        Stage2::new(this.options()?).map_err(|source| RegisterError::Options { raw, source })?;
        Ok(this)
    }

    /// What the register says of a format. What it does not say (FWB, XNX, FEAT_BBM) is as by default.
    ///
    /// # Errors
    /// [`RegisterError::Field`] for reserved values of TG0, PS, SH0, SL0 and T0SZ.
    pub fn options(self) -> Result<Stage2Options, RegisterError> {
        let raw = self.0;
        let field = |field| RegisterError::Field { raw, field };
        let granule = match raw >> 14 & 3 {
            0 => Granule::K4,
            1 => Granule::K64,
            2 => Granule::K16,
            _ => return Err(field("TG0")),
        };
        let physical_bits = match raw >> 16 & 7 {
            0 => 32,
            1 => 36,
            2 => 40,
            3 => 42,
            4 => 44,
            5 => 48,
            6 => 52,
            _ => return Err(field("PS")),
        };
        let t0sz = (raw & 0x3f) as u8;
        if !(12..=32).contains(&t0sz) {
            return Err(field("T0SZ"));
        }
        let lpa2 = raw & Self::DS != 0;
        let number = match (granule, raw >> 6 & 3, raw & Self::SL2 != 0) {
            (Granule::K4, 0, true) if lpa2 => -1,
            (_, _, true) => return Err(field("SL2")),
            (Granule::K4, 3, false) => 3,
            (Granule::K4, sl0, false) => 2 - sl0 as i8,
            (Granule::K16 | Granule::K64, sl0, false) => 3 - sl0 as i8,
        };
        let accessed_dirty = match (raw & Self::HA != 0, raw & Self::HD != 0) {
            (true, true) => AccessedDirty::Hardware,
            (true, false) => AccessedDirty::HardwareAccessed,
            // HD without HA does nothing.
            (false, _) => AccessedDirty::Software,
        };
        // Without DS, 4K and 16K descriptors have 48 bits, whatever PS says.
        let wide = lpa2 || granule == Granule::K64;
        Ok(Stage2Options {
            granule,
            ipa_bits: 64 - t0sz,
            physical_bits: if wide { physical_bits } else { physical_bits.min(48) },
            lpa2,
            start: Start::Level(number),
            accessed_dirty,
            shareability: Shareability::from_bits((raw >> 12 & 3) as u8).ok_or_else(|| field("SH0"))?,
            ..Stage2Options::default()
        })
    }

    /// How many bits VMIDs have.
    pub const fn vmid_bits(self) -> VmidBits {
        if self.0 & Self::VS == 0 { VmidBits::Eight } else { VmidBits::Sixteen }
    }

    /// The register's value.
    pub const fn raw(self) -> u64 {
        self.0
    }
}

/// VTTBR_EL2.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vttbr(u64);

impl Vttbr {
    const COMMON_NOT_PRIVATE: u64 = 1 << 0;

    /// The root of a table of this format, and the VMID that tags what is cached of it.
    ///
    /// # Errors
    /// [`RegisterError::Unaligned`] and [`RegisterError::TooWide`] for the root, [`RegisterError::Vmid`].
    pub fn new(format: &Stage2, root: OutputAddr, vmid: u16, vmid_bits: VmidBits) -> Result<Self, RegisterError> {
        if vmid_bits == VmidBits::Eight && vmid > 0xff {
            return Err(RegisterError::Vmid { vmid });
        }
        let bits = format.options().physical_bits;
        let geometry = format.geometry();
        let size = geometry.table_bytes(geometry.top()) as u64;
        // 51:48 of the root stand in 5:2, where they are used.
        let align = if bits > 48 { size.max(64) } else { size };
        if !root.is_aligned(align) {
            return Err(RegisterError::Unaligned { root, align });
        }
        let root_bits = root.as_u64();
        if root_bits >> bits != 0 {
            return Err(RegisterError::TooWide { root, bits });
        }
        Ok(Self(u64::from(vmid) << 48 | (root_bits & bit_range(47, 1)) | (root_bits >> 48) << 2))
    }

    /// The same with CnP: all processors that have this VMID use these tables, and may share what they cache.
    #[must_use]
    pub const fn common(self) -> Self {
        Self(self.0 | Self::COMMON_NOT_PRIVATE)
    }

    /// The register's value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The VMID.
    pub const fn vmid(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The root table, in a table of this format.
    pub fn root(self, format: &Stage2) -> OutputAddr {
        let low = self.0 & bit_range(47, 1);
        if format.options().physical_bits > 48 {
            OutputAddr::new((low & !0x3f) | (self.0 >> 2 & 0xf) << 48)
        } else {
            OutputAddr::new(low)
        }
    }
}
