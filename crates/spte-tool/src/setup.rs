// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which format, with which options; and from there to the code that knows it.

use std::fmt;

use notifier_core::OutputAddr;
use spte_arm64::{AccessedDirty, Granule, Stage2, Stage2Options, Start};
use spte_mips::{BigEndian, GpaOptions, GpaTable, PageSize, Width};
use spte_ppc::{BasePage, Radix, RadixOptions};
use spte_x86::{Ept, EptOptions, Levels, LongMode, LongModeOptions, Npt};
use thiserror::Error;

use crate::format::ToolFormat;

/// Every format of the command's contract, built or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum FormatName {
    /// `ept`: Intel's extended page tables.
    Ept,
    /// `npt`: AMD's nested page tables.
    Npt,
    /// `x86-64`: long mode, four levels.
    X86_64,
    /// `x86-64-la57`: long mode, five levels.
    X86_64La57,
    /// `arm64-s2`.
    Arm64Stage2,
    /// `ppc-radix`.
    PpcRadix,
    /// `ppc-hpt`.
    PpcHpt,
    /// `mips64`.
    Mips64,
}

impl FormatName {
    /// Every name, in the contract's order.
    pub const ALL: [Self; 8] = [
        Self::Ept,
        Self::Npt,
        Self::X86_64,
        Self::X86_64La57,
        Self::Arm64Stage2,
        Self::PpcRadix,
        Self::PpcHpt,
        Self::Mips64,
    ];

    /// The name as it is written.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ept => "ept",
            Self::Npt => "npt",
            Self::X86_64 => "x86-64",
            Self::X86_64La57 => "x86-64-la57",
            Self::Arm64Stage2 => "arm64-s2",
            Self::PpcRadix => "ppc-radix",
            Self::PpcHpt => "ppc-hpt",
            Self::Mips64 => "mips64",
        }
    }
}

impl fmt::Display for FormatName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// The most physical address bits that an x86 entry holds.
const X86_WIDEST: u8 = 52;

/// The most address bits, guest's or physical, of arm64 stage 2.
const ARM64_WIDEST: u8 = 52;

/// Levels of a radix tree.
const RADIX_LEVELS: u8 = 4;

/// The most physical address bits of a MIPS table: what xkphys holds.
const MIPS_WIDEST: u8 = 59;

/// Options that make no table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SetupError {
    /// The format is not built yet.
    #[error("format {format} is not built yet")]
    NotBuilt {
        /// The format.
        format: FormatName,
    },
    /// The format has no such granule.
    #[error("format {format} has no granule of {granule:#x} bytes")]
    Granule {
        /// The format.
        format: FormatName,
        /// The granule asked for.
        granule: u64,
    },
    /// The format has no tables of so many levels.
    #[error("format {format} has no tables of {levels} levels")]
    Levels {
        /// The format.
        format: FormatName,
        /// The levels asked for.
        levels: u8,
    },
    /// No table of these levels translates so many bits.
    #[error("{bits} guest address bits are not within {least} to {most}, which {levels} levels of {format} translate")]
    IpaBits {
        /// The format.
        format: FormatName,
        /// The bits asked for.
        bits: u32,
        /// The fewest there can be.
        least: u32,
        /// The most there can be.
        most: u32,
        /// Levels of the table.
        levels: u8,
    },
    /// No machine has so many physical address bits.
    #[error("{bits} physical address bits are not within {least} to {most}")]
    PaBits {
        /// The bits asked for.
        bits: u32,
        /// The fewest there can be.
        least: u32,
        /// The most there can be.
        most: u32,
    },
    /// No table of the format translates so many bits.
    #[error("{bits} guest address bits are not within {least} to {most}")]
    GuestBits {
        /// The bits asked for.
        bits: u32,
        /// The fewest there can be.
        least: u32,
        /// The most there can be.
        most: u32,
    },
    /// An x86 format's own reason.
    #[error(transparent)]
    X86(#[from] spte_x86::OptionsError),
    /// arm64 stage 2's own reason.
    #[error(transparent)]
    Arm64(#[from] spte_arm64::OptionsError),
    /// The radix tree's own reason.
    #[error(transparent)]
    Ppc(#[from] spte_ppc::OptionsError),
    /// Hardware of this format writes nothing into tables.
    #[error("accessed and dirty are software's in format {format}")]
    HwAd {
        /// The format.
        format: FormatName,
    },
    /// The MIPS format's own reason.
    #[error(transparent)]
    Mips(#[from] spte_mips::OptionsError),
}

/// Options as they are given. What is `None` is the format's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Options {
    /// `--granule`, in bytes.
    pub granule: Option<u64>,
    /// `--ipa-bits`.
    pub ipa_bits: Option<u32>,
    /// `--pa-bits`.
    pub pa_bits: Option<u32>,
    /// `--levels`.
    pub levels: Option<u8>,
    /// `--hw-ad`.
    pub hw_ad: Option<bool>,
}

/// A format and its options, checked and complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    format: FormatName,
    granule: u64,
    ipa_bits: u32,
    pa_bits: u32,
    levels: u8,
    hw_ad: bool,
}

/// What is done with a format once it is known.
pub trait Use {
    /// What comes of it.
    type Output;

    /// Does it.
    fn with<F: ToolFormat>(self, format: F) -> Self::Output;
}

impl Setup {
    /// Completes `options` for `format`.
    ///
    /// # Errors
    /// [`SetupError`].
    pub fn new(format: FormatName, options: &Options) -> Result<Self, SetupError> {
        match format {
            FormatName::Ept | FormatName::Npt | FormatName::X86_64 | FormatName::X86_64La57 => {
                Self::x86(format, options)
            }
            FormatName::Arm64Stage2 => Self::arm64(options),
            FormatName::PpcRadix => Self::radix(options),
            FormatName::Mips64 => Self::mips(options),
            FormatName::PpcHpt => Err(SetupError::NotBuilt { format }),
        }
    }

    fn x86(format: FormatName, options: &Options) -> Result<Self, SetupError> {
        let la57 = format == FormatName::X86_64La57;
        let granule = options.granule.unwrap_or(4 << 10);
        if granule != 4 << 10 {
            return Err(SetupError::Granule { format, granule });
        }
        let ipa_bits = options.ipa_bits.unwrap_or(if la57 { 57 } else { 48 });
        let levels = options.levels.unwrap_or(if la57 || ipa_bits > 48 { 5 } else { 4 });
        if !matches!(levels, 4 | 5) || (la57 && levels != 5) {
            return Err(SetupError::Levels { format, levels });
        }
        let (least, most) = (12, if levels == 5 { 57 } else { 48 });
        if ipa_bits < least || ipa_bits > most {
            return Err(SetupError::IpaBits { format, bits: ipa_bits, least, most, levels });
        }
        let pa_bits = options.pa_bits.unwrap_or(X86_WIDEST.into());
        let (least, most) = (32, X86_WIDEST.into());
        if pa_bits < least || pa_bits > most {
            return Err(SetupError::PaBits { bits: pa_bits, least, most });
        }
        Ok(Self { format, granule, ipa_bits, pa_bits, levels, hw_ad: options.hw_ad.unwrap_or(true) })
    }

    fn arm64(options: &Options) -> Result<Self, SetupError> {
        let format = FormatName::Arm64Stage2;
        let granule = options.granule.unwrap_or(4 << 10);
        if Granule::from_bytes(granule).is_none() {
            return Err(SetupError::Granule { format, granule });
        }
        let (least, most) = (32, ARM64_WIDEST.into());
        let (ipa_bits, pa_bits) = (options.ipa_bits.unwrap_or(40), options.pa_bits.unwrap_or(48));
        if ipa_bits < least || ipa_bits > most {
            return Err(SetupError::GuestBits { bits: ipa_bits, least, most });
        }
        if pa_bits < least || pa_bits > most {
            return Err(SetupError::PaBits { bits: pa_bits, least, most });
        }
        if let Some(levels) = options.levels.filter(|levels| !(1..=5).contains(levels)) {
            return Err(SetupError::Levels { format, levels });
        }
        let hw_ad = options.hw_ad.unwrap_or(false);
        let setup = Self { format, granule, ipa_bits, pa_bits, levels: options.levels.unwrap_or(0), hw_ad };
        // What is left is the format's to say; and how many levels it takes.
        let start = Stage2::new(setup.stage2(true))?.start_level();
        Ok(Self { levels: 4_u8.saturating_add_signed(-start), ..setup })
    }

    fn radix(options: &Options) -> Result<Self, SetupError> {
        let format = FormatName::PpcRadix;
        let granule = options.granule.unwrap_or(4 << 10);
        let Some(page) = BasePage::from_bytes(granule) else { return Err(SetupError::Granule { format, granule }) };
        let levels = options.levels.unwrap_or(RADIX_LEVELS);
        if levels != RADIX_LEVELS {
            return Err(SetupError::Levels { format, levels });
        }
        // The tree has one shape: fewer bits bound the addresses of a script.
        let (least, most) = (page.shift().into(), spte_ppc::bits::ADDRESS_BITS.into());
        let ipa_bits = options.ipa_bits.unwrap_or(most);
        if ipa_bits < least || ipa_bits > most {
            return Err(SetupError::GuestBits { bits: ipa_bits, least, most });
        }
        let (least, most) = (32, spte_ppc::bits::WIDEST.into());
        let pa_bits = options.pa_bits.unwrap_or(52);
        if pa_bits < least || pa_bits > most {
            return Err(SetupError::PaBits { bits: pa_bits, least, most });
        }
        Ok(Self { format, granule, ipa_bits, pa_bits, levels, hw_ad: options.hw_ad.unwrap_or(true) })
    }

    /// The machine that the options say, or the `widest` that has its descriptors.
    fn stage2(&self, widest: bool) -> Stage2Options {
        let granule = Granule::from_bytes(self.granule).unwrap_or_default();
        // Beyond 48 bits, on either side, descriptors are others: LPA2's, or the 64K granule's for 52 bits.
        let wide = self.ipa_bits > 48 || self.pa_bits > 48;
        let lpa2 = wide && granule != Granule::K64;
        // Both at most 52, as checked.
        let physical_bits = match wide {
            true if widest || self.pa_bits <= 48 && !lpa2 => ARM64_WIDEST,
            false if widest => 48,
            _ => self.pa_bits as u8,
        };
        let start = match self.levels {
            0 => Start::FewestLevels,
            levels => Start::Level(4_i8.saturating_sub_unsigned(levels)),
        };
        let accessed_dirty = if self.hw_ad { AccessedDirty::Hardware } else { AccessedDirty::Software };
        // Every machine since Armv8.2 reads XN in two bits; a table made here never needs the second.
        let xnx = !widest;
        let ipa_bits = self.ipa_bits as u8;
        Stage2Options { granule, ipa_bits, physical_bits, lpa2, start, accessed_dirty, xnx, ..Stage2Options::default() }
    }

    fn mips(options: &Options) -> Result<Self, SetupError> {
        let format = FormatName::Mips64;
        let granule = options.granule.unwrap_or(4 << 10);
        let Some(page) = PageSize::from_bytes(granule) else { return Err(SetupError::Granule { format, granule }) };
        if options.hw_ad == Some(true) {
            return Err(SetupError::HwAd { format });
        }
        // Levels of the standard width, bits of it, and bits of one level more.
        let (standard, narrow, wide) = match page {
            PageSize::K4 => (3, 40, 48),
            PageSize::K16 => (2, 36, 48),
            PageSize::K64 => (2, 42, 55),
        };
        let ipa_bits = options.ipa_bits.unwrap_or(48);
        let levels = options.levels.unwrap_or(if ipa_bits > narrow { standard + 1 } else { standard });
        let most = match levels {
            levels if levels == standard => narrow,
            levels if levels == standard + 1 => wide,
            levels => return Err(SetupError::Levels { format, levels }),
        };
        let least = 32;
        if ipa_bits < least || ipa_bits > most {
            return Err(SetupError::IpaBits { format, bits: ipa_bits, least, most, levels });
        }
        let pa_bits = options.pa_bits.unwrap_or(48);
        let (least, most) = (32, MIPS_WIDEST.into());
        if pa_bits < least || pa_bits > most {
            return Err(SetupError::PaBits { bits: pa_bits, least, most });
        }
        Ok(Self { format, granule, ipa_bits, pa_bits, levels, hw_ad: false })
    }

    /// The machine that the options say, or the widest there is.
    fn gpa(&self, widest: bool) -> GpaOptions {
        let page = PageSize::from_bytes(self.granule).unwrap_or_default();
        let standard = if page == PageSize::K4 { 3 } else { 2 };
        let width = if self.levels == standard { Width::Standard } else { Width::Wide };
        // 32 to 59, as checked.
        let physical_bits = if widest { MIPS_WIDEST } else { self.pa_bits as u8 };
        // The last megabyte: nothing that a process is given lies there.
        let sentinels = OutputAddr::new((1 << physical_bits) - (1 << 20));
        GpaOptions { page, width, physical_bits, sentinels, ..GpaOptions::default() }
    }

    /// The format.
    pub fn format(&self) -> FormatName {
        self.format
    }

    /// Bytes of the smallest page.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// Bits of a guest physical address.
    pub fn ipa_bits(&self) -> u32 {
        self.ipa_bits
    }

    /// Bits of an output address.
    pub fn pa_bits(&self) -> u32 {
        self.pa_bits
    }

    /// Whether hardware manages accessed and dirty.
    pub fn hw_ad(&self) -> bool {
        self.hw_ad
    }

    /// Lends the format of a table to be built. Its tables lie wherever this process has memory, so it is as wide as the
    /// format can be: [`Setup::pa_bits`] is for the addresses of the script.
    ///
    /// # Errors
    /// The format's own reason.
    pub fn for_table<U: Use>(&self, user: U) -> Result<U::Output, SetupError> {
        self.lend(true, user)
    }

    /// Lends the format of the machine that the options say: for entries that somebody else made.
    ///
    /// # Errors
    /// The format's own reason.
    pub fn for_entries<U: Use>(&self, user: U) -> Result<U::Output, SetupError> {
        self.lend(false, user)
    }

    fn lend<U: Use>(&self, widest: bool, user: U) -> Result<U::Output, SetupError> {
        match self.format {
            FormatName::Ept | FormatName::Npt | FormatName::X86_64 | FormatName::X86_64La57 => {
                self.lend_x86(widest, user)
            }
            FormatName::Arm64Stage2 => Ok(user.with(Stage2::new(self.stage2(widest))?)),
            FormatName::PpcRadix => {
                // 32 to 57, as checked.
                let physical_bits = if widest { spte_ppc::bits::WIDEST } else { self.pa_bits as u8 };
                let page = BasePage::from_bytes(self.granule).unwrap_or_default();
                Ok(user.with(Radix::new(RadixOptions { page, physical_bits, ..RadixOptions::default() })?))
            }
            FormatName::Mips64 => Ok(user.with(GpaTable::<BigEndian>::new(self.gpa(widest))?)),
            format @ FormatName::PpcHpt => Err(SetupError::NotBuilt { format }),
        }
    }

    fn lend_x86<U: Use>(&self, widest: bool, user: U) -> Result<U::Output, SetupError> {
        // 32 to 52, as checked.
        let physical_bits = if widest { X86_WIDEST } else { self.pa_bits as u8 };
        let levels = if self.levels == 5 { Levels::Five } else { Levels::Four };
        // As hardware has it while #VE is off; nothing that a script asks for depends on it.
        let ept = EptOptions { levels, physical_bits, suppress_ve: false, ..EptOptions::default() };
        let long_mode = LongModeOptions { levels, physical_bits, ..LongModeOptions::default() };
        Ok(match self.format {
            FormatName::Ept => user.with(Ept::new(ept)?),
            FormatName::Npt => user.with(Npt::new(long_mode)?),
            _ => user.with(LongMode::new(long_mode)?),
        })
    }
}
