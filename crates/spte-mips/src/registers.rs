// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers of the hardware page table walker, as typed values.
//!
//! | register | CP0 | fields |
//! |---|---|---|
//! | PWBase | 5, 5 | virtual address of the root, in an unmapped segment |
//! | PWField | 5, 6 | lowest bit of each index in an address: BDI 37:32 (64-bit), GDI 29:24, UDI 23:18, MDI 17:12, PTI 11:6; PTEI 5:0 by how much an entry is shifted down |
//! | PWSize | 5, 7 | bits of each index: BDW 37:32 (64-bit), GDW 29:24, UDW 23:18, MDW 17:12, PTW 11:6; PS 30 pointers of 64 bits (64-bit); PTEW 5:0 by how much entries are larger than pointers |
//! | PWCtl | 6, 6 | PWEn 31; DirExt 30, XK 28, XS 27, XU 26 (64-bit); DPH 7, HugePg 6, PSn 5:0 |
//!
//! Sources: Linux `mipsregs.h` (`MIPS_PWFIELD_GDI_SHIFT` and so on), `arch/mips/mm/tlbex.c` (`config_htw_params`); QEMU
//! `target/mips/cpu.h` (`CP0PF_BDI`, `CP0PS_BDW`, `CP0PC_PWDIREXT` and so on) and `tcg/sysemu` (`helper_mtc0_pwfield`,
//! `page_table_walk_refill`, which it has for 32-bit processors alone).
//!
//! **A bad index drops the write.** An index of PWField below 12 makes processors ignore the whole write (`config_htw_params`
//! says so; QEMU clears the field on release 6, and takes any value before), which is why indices that are not used keep their reset value of 12.
//! A PTEI that the processor cannot shift by is kept as it was: after the write PWField is read back, and the walker stays off
//! where PTEI differs.
//!
//! Without DirExt Loongson's walker adds address bits 63:62 to the first index (Linux: commit d191aaffe368); in xuseg they are
//! zero. The root's walker fills for guests where GuestCtl0Ext.RPW, bits 9:8, is 0 or 2 (Linux: `MIPS_GCTL0EXT_RPW_GPA`).
//!
//! The walker loads whatever directories hold: their empty entries are [`Sentinels`](crate::Sentinels), so that a walk ends in
//! a pair with V clear, and not in a miss that the handler walks once more.

use notifier_core::OutputAddr;
use spte_core::format::{Format, Geometry, Level};

use crate::{
    bits::{bit_range, unmapped},
    gpa::{ByteOrder, GpaTable},
};

/// A register value that the processor refuses, or that this crate does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The root is not aligned to its size.
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
    /// The root lies where the sentinels are, which stay as they are.
    #[error("root {root} lies where the sentinels are")]
    Sentinels {
        /// The root.
        root: OutputAddr,
    },
    /// The walker loads from unmapped segments.
    #[error("{raw:#x} is no address of an unmapped segment")]
    Mapped {
        /// PWBase.
        raw: u64,
    },
    /// Bits that must be zero, or belong to what this crate does not know.
    #[error("bits {bits:#x} of {raw:#x} are reserved")]
    Reserved {
        /// The register.
        raw: u64,
        /// Those of its bits.
        bits: u64,
    },
    /// An index below 12: the write would be ignored.
    #[error("{field} of {raw:#x} is {value}, and below 12 the write is ignored")]
    Index {
        /// The register.
        raw: u64,
        /// The field's name.
        field: &'static str,
        /// Its value.
        value: u8,
    },
    /// A field has a value that the processor cannot do anything with.
    #[error("{field} of {raw:#x} has an impossible value")]
    Field {
        /// The register, or the value alone.
        raw: u64,
        /// The field's name.
        field: &'static str,
    },
}

/// How wide the processor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Processor {
    /// MIPS32: no BDI and BDW, PS is 0, PWCtl has bits 31 and 7:0.
    Bits32,
    /// MIPS64.
    #[default]
    Bits64,
}

/// Where an index stands in an address: lowest bit, and how many.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Index {
    /// Its lowest bit: 12 to 63. An index that is not used keeps 12.
    pub low: u8,
    /// Its bits; 0 where there is no such level.
    pub bits: u8,
}

impl Index {
    /// Of a level that there is not.
    pub const NONE: Self = Self { low: 12, bits: 0 };
}

/// What PWField and PWSize say together: the shape of the tables that are walked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct WalkShape {
    /// BDI and BDW: MIPS64 alone.
    pub base: Index,
    /// GDI and GDW.
    pub global: Index,
    /// UDI and UDW.
    pub upper: Index,
    /// MDI and MDW.
    pub middle: Index,
    /// PTI and PTW: the even and the odd page's bit included.
    pub table: Index,
    /// PTEI: how far an entry is shifted down, RI and XI going to the top.
    pub entry_shift: u8,
    /// PTEW: entries have twice the size of pointers.
    pub wide_entries: bool,
    /// PS: pointers have 64 bits.
    pub wide_pointers: bool,
}

impl WalkShape {
    /// Of the tables of this format. (Linux's own set-up knows two and three levels; the fourth is in UDI here, between the
    /// other two.)
    pub fn new<O: ByteOrder>(format: &GpaTable<O>) -> Self {
        let geometry = format.geometry();
        let top = geometry.top();
        let at = |number: u8| Level::new(number).filter(|level| *level < top);
        Self {
            base: Index::NONE,
            global: index(geometry, Some(top)),
            upper: index(geometry, at(3)),
            middle: index(geometry, at(2)),
            table: index(geometry, Some(Level::LEAF)),
            entry_shift: format.options().layout.global_shift() as u8,
            wide_entries: false,
            wide_pointers: true,
        }
    }
}

fn index(geometry: &Geometry, level: Option<Level>) -> Index {
    match level.map(|level| geometry.level(level)) {
        Some(shape) => Index { low: shape.shift, bits: shape.bits },
        None => Index::NONE,
    }
}

const BASE: u32 = 32;
const GLOBAL: u32 = 24;
const UPPER: u32 = 18;
const MIDDLE: u32 = 12;
const TABLE: u32 = 6;

/// Refuses a value for bits that it must not have.
fn refuse(raw: u64, bits: u64) -> Result<(), RegisterError> {
    if bits == 0 { Ok(()) } else { Err(RegisterError::Reserved { raw, bits }) }
}

/// A value in its place, the six bits from `low` on.
fn put(value: u8, low: u32, field: &'static str) -> Result<u64, RegisterError> {
    if value > 63 { Err(RegisterError::Field { raw: value.into(), field }) } else { Ok(u64::from(value) << low) }
}

const fn field(raw: u64, low: u32) -> u8 {
    (raw >> low & 0x3f) as u8
}

/// PWBase.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PwBase(u64);

impl PwBase {
    /// For a table with this root: its address in xkphys. A processor has something else in PWBase, and no walk under way,
    /// before the table is dropped: with the table its root is free, and no flush comes before that.
    ///
    /// # Errors
    /// [`RegisterError::Unaligned`], [`RegisterError::TooWide`], [`RegisterError::Sentinels`].
    pub fn new<O: ByteOrder>(format: &GpaTable<O>, root: OutputAddr) -> Result<Self, RegisterError> {
        let align = format.geometry().table_bytes(format.geometry().top()) as u64;
        let bits = format.options().physical_bits;
        if !root.is_aligned(align) {
            return Err(RegisterError::Unaligned { root, align });
        }
        if root.as_u64() >> bits != 0 {
            return Err(RegisterError::TooWide { root, bits });
        }
        // Links to such a table are refused; a root has no link.
        if format.sentinels().overlaps(root.as_u64(), align) {
            return Err(RegisterError::Sentinels { root });
        }
        Ok(Self(format.pointer(root)))
    }

    /// The register with this value; a 32-bit one is extended with its sign.
    ///
    /// # Errors
    /// [`RegisterError::Mapped`].
    pub fn from_raw(raw: u64) -> Result<Self, RegisterError> {
        if unmapped(raw).is_some() { Ok(Self(raw)) } else { Err(RegisterError::Mapped { raw }) }
    }

    /// The register's value.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The physical address of the root.
    pub fn root(self) -> OutputAddr {
        OutputAddr::new(unmapped(self.0).unwrap_or(0))
    }
}

/// PWField.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PwField(u64);

impl PwField {
    /// What it is after a reset: every index but BDI 12, PTEI 2 (QEMU, release 6, `mips_cpu_reset`, and indices of 0 before; Linux,
    /// what KVM gives guests of releases 5 and 6, `kvm_vz_vcpu_setup`; `config_htw_params` relies on the indices).
    pub const RESET: u64 = 0x0c30_c302;

    /// For such tables. BDI is 0 where there is no base directory, as in [`PwField::RESET`]. That a processor which has BDI does not
    /// take that for an index below 12 is inferred from the reset value; Linux leaves these bits as it reads them.
    ///
    /// # Errors
    /// As for [`PwField::from_raw`]; [`RegisterError::Field`] for what six bits do not hold.
    pub fn new(shape: &WalkShape, processor: Processor) -> Result<Self, RegisterError> {
        let base = match processor {
            Processor::Bits32 => 0,
            Processor::Bits64 if shape.base.bits != 0 => put(shape.base.low, BASE, "BDI")?,
            Processor::Bits64 => 0,
        };
        let raw = base
            | put(shape.global.low, GLOBAL, "GDI")?
            | put(shape.upper.low, UPPER, "UDI")?
            | put(shape.middle.low, MIDDLE, "MDI")?
            | put(shape.table.low, TABLE, "PTI")?
            | put(shape.entry_shift, 0, "PTEI")?;
        Self::from_raw(raw, processor)
    }

    /// The register with this value. BDI may be 0, as it is after a reset.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`], [`RegisterError::Index`], and [`RegisterError::Field`] for a PTEI below 2 or above 31,
    /// which would be left as it was.
    pub fn from_raw(raw: u64, processor: Processor) -> Result<Self, RegisterError> {
        let known = match processor {
            Processor::Bits32 => bit_range(29, 0),
            Processor::Bits64 => bit_range(37, 32) | bit_range(29, 0),
        };
        refuse(raw, raw & !known)?;
        let least = |name: &'static str, low: u32| match field(raw, low) {
            value @ 0..12 => Err(RegisterError::Index { raw, field: name, value }),
            _ => Ok(()),
        };
        if field(raw, BASE) != 0 {
            least("BDI", BASE)?;
        }
        least("GDI", GLOBAL)?;
        least("UDI", UPPER)?;
        least("MDI", MIDDLE)?;
        least("PTI", TABLE)?;
        match field(raw, 0) {
            2..32 => Ok(Self(raw)),
            _ => Err(RegisterError::Field { raw, field: "PTEI" }),
        }
    }

    /// The register's value.
    pub fn raw(self) -> u64 {
        self.0
    }
}

/// PWSize.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PwSize(u64);

impl PwSize {
    const PS: u64 = 1 << 30;

    /// For such tables.
    ///
    /// # Errors
    /// As for [`PwSize::from_raw`]; [`RegisterError::Field`] for what six bits do not hold.
    pub fn new(shape: &WalkShape, processor: Processor) -> Result<Self, RegisterError> {
        let (base, pointers) = match processor {
            Processor::Bits32 => (0, 0),
            Processor::Bits64 => (put(shape.base.bits, BASE, "BDW")?, if shape.wide_pointers { Self::PS } else { 0 }),
        };
        let raw = base
            | pointers
            | put(shape.global.bits, GLOBAL, "GDW")?
            | put(shape.upper.bits, UPPER, "UDW")?
            | put(shape.middle.bits, MIDDLE, "MDW")?
            | put(shape.table.bits, TABLE, "PTW")?
            | u64::from(shape.wide_entries);
        Self::from_raw(raw, processor)
    }

    /// The register with this value.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`]; [`RegisterError::Field`] for a PTEW above 1, for no directory at all, and for no bit of
    /// PTW: the walker walks nothing then.
    pub fn from_raw(raw: u64, processor: Processor) -> Result<Self, RegisterError> {
        let known = match processor {
            Processor::Bits32 => bit_range(29, 0),
            Processor::Bits64 => bit_range(37, 32) | bit_range(30, 0),
        };
        refuse(raw, raw & !known)?;
        let wrong = |field| Err(RegisterError::Field { raw, field });
        if field(raw, 0) > 1 {
            return wrong("PTEW");
        }
        if field(raw, GLOBAL) == 0 && field(raw, UPPER) == 0 && field(raw, MIDDLE) == 0 {
            return wrong("GDW, UDW and MDW");
        }
        if field(raw, TABLE) == 0 {
            return wrong("PTW");
        }
        Ok(Self(raw))
    }

    /// The register's value.
    pub fn raw(self) -> u64 {
        self.0
    }

    /// The shape that this and PWField say.
    pub fn shape(self, fields: PwField) -> WalkShape {
        let index = |low: u32| Index { low: field(fields.0, low), bits: field(self.0, low) };
        let base = index(BASE);
        WalkShape {
            base: if base.low == 0 { Index { low: 12, ..base } } else { base },
            global: index(GLOBAL),
            upper: index(UPPER),
            middle: index(MIDDLE),
            table: index(TABLE),
            entry_shift: field(fields.0, 0),
            wide_entries: field(self.0, 0) == 1,
            wide_pointers: self.0 & Self::PS != 0,
        }
    }
}

/// PWCtl.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PwCtl(u64);

impl PwCtl {
    /// PWEn: the walker walks.
    pub const ENABLE: u64 = 1 << 31;
    /// DirExt: BDI and BDW count.
    pub const BASE_DIRECTORY: u64 = 1 << 30;
    /// XK: for xkseg.
    pub const KERNEL: u64 = 1 << 28;
    /// XS: for xsseg.
    pub const SUPERVISOR: u64 = 1 << 27;
    /// XU: for xuseg, where guest physical addresses are looked up.
    pub const USER: u64 = 1 << 26;
    /// DPH: huge pages in pairs of directory entries.
    pub const DUAL_HUGE: u64 = 1 << 7;
    /// HugePg: directories may hold pages. Not set here: our directories hold none. (On a 32-bit processor it also makes directory
    /// entries as wide as leaves with PTEW, as QEMU reads it: with PSn below the page size, which no link has set, such a walker
    /// can walk these tables. `conformance/` does that.)
    pub const HUGE: u64 = 1 << 6;

    /// As Linux has it: on, for xuseg on 64-bit processors, without huge pages.
    pub const fn new(processor: Processor) -> Self {
        match processor {
            Processor::Bits32 => Self(Self::ENABLE),
            Processor::Bits64 => Self(Self::ENABLE | Self::USER),
        }
    }

    /// The register with this value.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`].
    pub fn from_raw(raw: u64, processor: Processor) -> Result<Self, RegisterError> {
        let wide = Self::BASE_DIRECTORY | Self::KERNEL | Self::SUPERVISOR | Self::USER;
        let known = Self::ENABLE | bit_range(7, 0) | if processor == Processor::Bits64 { wide } else { 0 };
        refuse(raw, raw & !known)?;
        Ok(Self(raw))
    }

    /// The same with the walker stopped: around every use of TLB registers.
    #[must_use]
    pub const fn stopped(self) -> Self {
        Self(self.0 & !Self::ENABLE)
    }

    /// Whether directories may hold pages.
    pub const fn has_huge_pages(self) -> bool {
        self.0 & Self::HUGE != 0
    }

    /// The register's value.
    pub const fn raw(self) -> u64 {
        self.0
    }
}
