// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What formats are written with: the few words that every one of them says in the same way. The engine uses none of it.

use notifier_core::OutputAddr;

use crate::format::{EntryError, FormatError};

/// What an entry is to hardware, whoever wrote it. [`Kind`](crate::format::Kind) is what it is to the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HardwareKind {
    /// Nothing is translated: any access faults, and the rest of the entry is software's.
    NotPresent,
    /// Reserved, or of a meaning that this machine does not have, for this reason: an access may end in more than a fault.
    Impossible(EntryError),
    /// A link to the table at this address.
    Table(OutputAddr),
    /// A translation.
    Leaf,
}

/// Bits `low` to `high` from the least significant one, both included. `low <= high <= 63`; anything else gives no bits.
pub const fn bit_range(high: u32, low: u32) -> u64 {
    if high > 63 || low > high { 0 } else { (u64::MAX >> (63 - high)) & (u64::MAX << low) }
}

/// `output` as a number, if it is a multiple of `align` and fits `bits` physical address bits.
///
/// # Errors
/// [`FormatError::Unaligned`] and [`FormatError::OutputTooWide`], in this order.
pub const fn check_output(output: OutputAddr, align: u64, bits: u8) -> Result<u64, FormatError> {
    if !output.is_aligned(align) {
        return Err(FormatError::Unaligned { output, align });
    }
    if bits < 64 && output.as_u64() >> bits != 0 {
        return Err(FormatError::OutputTooWide { output, bits: bits as u32 });
    }
    Ok(output.as_u64())
}

impl EntryError {
    /// Refuses `raw`, which stands at the level with this `number`, for those of `wrong` bits that are set.
    ///
    /// # Errors
    /// The rule, where `wrong` is not 0.
    pub const fn refuse(number: i8, raw: u64, wrong: u64, rule: &'static str) -> Result<(), Self> {
        Self::require(number, raw, wrong == 0, wrong, rule)
    }

    /// Refuses `raw`, naming `bits`, unless the rule `holds`.
    ///
    /// # Errors
    /// The rule, where it does not hold.
    pub const fn require(number: i8, raw: u64, holds: bool, bits: u64, rule: &'static str) -> Result<(), Self> {
        if holds { Ok(()) } else { Err(Self { raw, number, rule, bits }) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bit_ranges_include_both_ends() {
        assert_eq!(bit_range(51, 12), 0x000f_ffff_ffff_f000);
        assert_eq!(bit_range(63, 0), u64::MAX);
        assert_eq!(bit_range(0, 0), 1);
        assert_eq!(bit_range(63, 63), 1 << 63);
        assert_eq!((bit_range(3, 4), bit_range(64, 0)), (0, 0));
    }

    #[test]
    fn outputs_are_aligned_and_fit() {
        let at = |address: u64, bits| check_output(OutputAddr::new(address), 0x1000, bits);
        assert_eq!(at(0xf000, 16), Ok(0xf000));
        assert_eq!(at(u64::MAX << 12, 64), Ok(u64::MAX << 12));
        let output = OutputAddr::new(0x1_0000);
        assert_eq!(at(0x1_0000, 16), Err(FormatError::OutputTooWide { output, bits: 16 }));
        let output = OutputAddr::new(0x1_0800);
        assert_eq!(at(0x1_0800, 16), Err(FormatError::Unaligned { output, align: 0x1000 }));
    }

    #[test]
    fn a_broken_rule_is_named_with_its_bits() {
        assert_eq!(EntryError::refuse(2, 0x7, 0, "none"), Ok(()));
        let why = EntryError { raw: 0x7, number: 2, rule: "bit 1 is clear", bits: 2 };
        assert_eq!(EntryError::refuse(2, 0x7, 2, "bit 1 is clear"), Err(why));
        assert_eq!(EntryError::require(2, 0x7, false, 2, "bit 1 is clear"), Err(why));
        assert_eq!(EntryError::require(2, 0x7, true, 2, "bit 1 is clear"), Ok(()));
    }
}
