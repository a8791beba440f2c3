// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Memory types, shareability, where a page executes: the attributes of a leaf.
//!
//! MemAttr means two different things, and which is HCR_EL2.FWB's: without it the four bits name device memory or an
//! outer and an inner cacheability, and what stage 1 says is *combined* with them (the weaker wins); with it bits 2:0
//! *override* stage 1 or leave it alone. A leaf of one kind in a table of the other means something else: ordinary
//! memory is 15 without FWB and 6 with it. Whether a leaf is cacheable is therefore asked of the table's format.
//!
//! | MemAttr | without FWB | with FWB |
//! |---|---|---|
//! | 0 to 3 | device: nGnRnE, nGnRE, nGRE, GRE | the same |
//! | 4 | reserved | reserved |
//! | 5 | outer and inner non-cacheable | non-cacheable; stage 1 device stays device |
//! | 6 | outer non-cacheable, inner write-through | write-back, whatever stage 1 says |
//! | 7 | outer non-cacheable, inner write-back | as stage 1 says |
//! | 8, 12 | reserved | bit 3 is RES0 |
//! | others | outer in 3:2, inner in 1:0: 1 non-cacheable, 2 write-through, 3 write-back | bit 3 is RES0 |
//!
//! Sources: Arm DDI 0487, "Stage 2 memory region type and cacheability attributes" with and without FEAT_S2FWB;
//! pseudocode `AArch64.S2ApplyFWBMemAttrs`. Linux: `MT_S2_NORMAL` (0xf), `MT_S2_NORMAL_NC` (5), `MT_S2_DEVICE_nGnRE`
//! (1), `MT_S2_FWB_NORMAL` (6). Values 4 and 14 of FEAT_MTE_PERM are not supported.

use crate::bits::{MEM_ATTR, MEM_ATTR_SHIFT};

/// Kinds of device memory, from the strictest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Device {
    /// No gathering, no reordering, no early write acknowledgement.
    NGnRnE = 0,
    /// No gathering, no reordering. What Linux maps devices as.
    NGnRE = 1,
    /// No gathering.
    NGRE = 2,
    /// All three allowed.
    GRE = 3,
}

/// How ordinary memory is cached, at one of two places.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Cache {
    /// Not at all.
    NonCacheable = 1,
    /// Writes go through.
    WriteThrough = 2,
    /// Writes stay until they are evicted.
    WriteBack = 3,
}

/// The memory type of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MemoryType {
    /// A device.
    Device(Device),
    /// Memory, by its outer and inner cacheability. With FWB there are only [`MemoryType::WRITE_BACK`] and
    /// [`MemoryType::NON_CACHEABLE`].
    Normal {
        /// Outer cacheability.
        outer: Cache,
        /// Inner cacheability.
        inner: Cache,
    },
    /// Whatever stage 1 says. Only with FWB.
    Stage1,
}

impl MemoryType {
    /// Ordinary memory.
    pub const WRITE_BACK: Self = Self::Normal { outer: Cache::WriteBack, inner: Cache::WriteBack };
    /// Memory that writes go through.
    pub const WRITE_THROUGH: Self = Self::Normal { outer: Cache::WriteThrough, inner: Cache::WriteThrough };
    /// Memory that is not cached.
    pub const NON_CACHEABLE: Self = Self::Normal { outer: Cache::NonCacheable, inner: Cache::NonCacheable };
    /// The device memory that Linux maps devices as.
    pub const DEVICE: Self = Self::Device(Device::NGnRE);

    /// MemAttr, four bits; `None` where there is none under this setting of FWB.
    pub const fn mem_attr(self, fwb: bool) -> Option<u8> {
        match (self, fwb) {
            (Self::Device(device), _) => Some(device as u8),
            (Self::Normal { outer, inner }, false) => Some((outer as u8) << 2 | inner as u8),
            (Self::Normal { outer: Cache::WriteBack, inner: Cache::WriteBack }, true) => Some(6),
            (Self::Normal { outer: Cache::NonCacheable, inner: Cache::NonCacheable }, true) => Some(5),
            (Self::Stage1, true) => Some(7),
            _ => None,
        }
    }

    /// What MemAttr, four bits, says; `None` for reserved values.
    pub const fn from_mem_attr(mem_attr: u8, fwb: bool) -> Option<Self> {
        match (mem_attr, fwb) {
            (0, _) => Some(Self::Device(Device::NGnRnE)),
            (1, _) => Some(Self::Device(Device::NGnRE)),
            (2, _) => Some(Self::Device(Device::NGRE)),
            (3, _) => Some(Self::Device(Device::GRE)),
            (5, true) => Some(Self::NON_CACHEABLE),
            (6, true) => Some(Self::WRITE_BACK),
            (7, true) => Some(Self::Stage1),
            (_, true) => None,
            (4..=15, false) => match (Cache::from_bits(mem_attr >> 2), Cache::from_bits(mem_attr & 3)) {
                (Some(outer), Some(inner)) => Some(Self::Normal { outer, inner }),
                _ => None,
            },
            (_, false) => None,
        }
    }

    /// Whether it is device memory.
    pub const fn is_device(self) -> bool {
        matches!(self, Self::Device(_))
    }

    /// Whether a guest's caches may hold it, so that without FWB it has to be cleaned to the point of coherency.
    /// [`MemoryType::Stage1`] may be.
    pub const fn is_cacheable(self) -> bool {
        match self {
            Self::Device(_) => false,
            Self::Normal { outer, inner } => {
                !matches!(outer, Cache::NonCacheable) || !matches!(inner, Cache::NonCacheable)
            }
            Self::Stage1 => true,
        }
    }

    pub(crate) const fn of(raw: u64, fwb: bool) -> Option<Self> {
        Self::from_mem_attr(((raw & MEM_ATTR) >> MEM_ATTR_SHIFT) as u8, fwb)
    }
}

impl Cache {
    const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            1 => Some(Self::NonCacheable),
            2 => Some(Self::WriteThrough),
            3 => Some(Self::WriteBack),
            _ => None,
        }
    }
}

/// Who sees coherent memory: SH. Device memory is outer shareable whatever this says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum Shareability {
    /// One processor.
    NonShareable = 0,
    /// The outer domain.
    Outer = 2,
    /// The inner domain: all processors that run one system. What Linux uses.
    #[default]
    Inner = 3,
}

impl Shareability {
    /// By its two bits; `None` for 1, which is reserved.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::NonShareable),
            2 => Some(Self::Outer),
            3 => Some(Self::Inner),
            _ => None,
        }
    }
}

/// At which exception levels a page that executes does so. All but the first need FEAT_XNX.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum ExecuteAt {
    /// EL1 and EL0: XN is 0.
    #[default]
    Both = 0,
    /// EL0 alone: XN is 1 (Linux: `KVM_PTE_LEAF_ATTR_HI_S2_XN_PXN`).
    El0 = 1,
    /// EL1 alone: XN is 3 (Linux: `KVM_PTE_LEAF_ATTR_HI_S2_XN_UXN`).
    El1 = 3,
}

impl ExecuteAt {
    /// By XN; `None` for 2, which executes nowhere.
    pub const fn from_bits(bits: u8) -> Option<Self> {
        match bits {
            0 => Some(Self::Both),
            1 => Some(Self::El0),
            3 => Some(Self::El1),
            _ => None,
        }
    }
}

/// What a leaf says beyond address, rights and facts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Stage2Attrs {
    /// The memory type.
    pub memory: MemoryType,
    /// Shareability. With LPA2 descriptors it is the table's, [`Stage2Options::shareability`](crate::Stage2Options::shareability),
    /// and nothing else can be expressed.
    pub shareability: Shareability,
    /// Where the page executes, if it does; remembered while it does not.
    pub execute: ExecuteAt,
    /// Bit 58, for the user.
    pub software: bool,
}

impl Default for Stage2Attrs {
    /// Ordinary write-back memory, inner shareable, executing at both levels where it executes.
    fn default() -> Self {
        Self {
            memory: MemoryType::WRITE_BACK,
            shareability: Shareability::Inner,
            execute: ExecuteAt::Both,
            software: false,
        }
    }
}

impl Stage2Attrs {
    /// The same with another memory type.
    #[must_use]
    pub const fn memory(self, memory: MemoryType) -> Self {
        Self { memory, ..self }
    }
}
