// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which operations are malformed: those that no table is ever asked.
//!
//! This is rule 2 of the script language without its syntax. What a *table* refuses (something is
//! present, a permission is not expressible) is an [`Outcome`](crate::Outcome), not a rejection.

use std::fmt;

use thiserror::Error;

use crate::model::MAX_LEAVES;
use crate::op::Op;
use crate::shape::Shape;

/// Which number of an operation is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quantity {
    /// The guest physical address.
    Guest,
    /// The output address.
    Output,
    /// The size.
    Size,
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Quantity::Guest => "guest address",
            Quantity::Output => "output address",
            Quantity::Size => "size",
        })
    }
}

/// Why an operation is malformed. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Reject {
    /// A range of no bytes.
    #[error("size is 0")]
    SizeZero,
    /// A range whose end does not fit 64 bits.
    #[error("{what} {addr:#x} wraps around with size {size:#x}")]
    Wraps {
        /// Which address.
        what: Quantity,
        /// Its value.
        addr: u64,
        /// The size of the range.
        size: u64,
    },
    /// Not a multiple of the granule.
    #[error("{what} {value:#x} is not aligned to {granule:#x}")]
    Misaligned {
        /// Which number.
        what: Quantity,
        /// Its value.
        value: u64,
        /// The granule.
        granule: u64,
    },
    /// The last byte lies beyond the configured address bits.
    #[error("{what} {last:#x} is beyond {bits} bits")]
    Beyond {
        /// Which address.
        what: Quantity,
        /// The last byte asked for.
        last: u64,
        /// The configured width.
        bits: u32,
    },
    /// More leaves than the model will hold: not a rule, a guard against exhausting memory.
    #[error("more than {MAX_LEAVES} leaves")]
    TooManyLeaves,
}

impl Op {
    /// Whether this operation is well formed for this shape.
    ///
    /// Ranges and repointed pages are whole granules; `touch` and `walk` name any byte.
    ///
    /// # Errors
    /// The first rule it breaks, in the order size 0, misaligned, wrap-around, beyond the bits; the
    /// guest range before the output range.
    pub fn check(&self, shape: &Shape) -> Result<(), Reject> {
        let guest = |gpa, size| granules(shape, Quantity::Guest, gpa, size, shape.gpa_bits());
        let output = |out, size| granules(shape, Quantity::Output, out, size, shape.out_bits());
        let (gpa, size) = self.named(shape.granule());
        match *self {
            Op::Map { out, .. } | Op::Change { out, .. } | Op::ZapChange { out, .. } => {
                guest(gpa, size).and_then(|()| output(out, size))
            }
            Op::Touch { .. } | Op::Walk { .. } => within(Quantity::Guest, gpa, size, shape.gpa_bits()),
            _ => guest(gpa, size),
        }
    }
}

fn granules(shape: &Shape, what: Quantity, addr: u64, size: u64, bits: u32) -> Result<(), Reject> {
    let granule = shape.granule();
    if size == 0 {
        return Err(Reject::SizeZero);
    }
    for (what, value) in [(what, addr), (Quantity::Size, size)] {
        if value % granule != 0 {
            return Err(Reject::Misaligned { what, value, granule });
        }
    }
    within(what, addr, size, bits)
}

/// `size` is not 0.
fn within(what: Quantity, addr: u64, size: u64, bits: u32) -> Result<(), Reject> {
    let last = addr.checked_add(size - 1).ok_or(Reject::Wraps { what, addr, size })?;
    if last >> bits != 0 {
        return Err(Reject::Beyond { what, last, bits });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn why(line: &str) -> Result<(), Reject> {
        line.parse::<Op>().unwrap().check(&Shape::ept())
    }

    #[test]
    fn malformed_operations_are_rejected_with_the_rule_they_break() {
        let misaligned = |what, value| Err(Reject::Misaligned { what, value, granule: 4096 });
        assert_eq!(why("unmap 0 0"), Err(Reject::SizeZero));
        assert_eq!(why("unmap 0x800 4k"), misaligned(Quantity::Guest, 0x800));
        assert_eq!(why("age 0x1000 0x1800"), misaligned(Quantity::Size, 0x1800));
        assert_eq!(why("map 0 0x10 4k r"), misaligned(Quantity::Output, 0x10));
        assert_eq!(why("change 0 0x10"), misaligned(Quantity::Output, 0x10));
        assert_eq!(
            why("dirty 0xfffffffffffff000 8k"),
            Err(Reject::Wraps { what: Quantity::Guest, addr: !0xfff, size: 8192 })
        );
        assert_eq!(
            why("split 0xfffffffff000 8k"),
            Err(Reject::Beyond { what: Quantity::Guest, last: 0x1_0000_0000_0fff, bits: 48 })
        );
        assert_eq!(
            why("map 0 0x10000000000000 4k r"),
            Err(Reject::Beyond { what: Quantity::Output, last: 0x10_0000_0000_0fff, bits: 52 })
        );
        assert_eq!(why("walk 0x1000000000000"), Err(Reject::Beyond { what: Quantity::Guest, last: 1 << 48, bits: 48 }));
    }

    #[test]
    fn the_last_granule_and_any_byte_of_it_are_well_formed() {
        assert_eq!(why("unmap 0xfffffffff000 4k"), Ok(()));
        assert_eq!(why("collapse 0 0x1000000000000"), Ok(()));
        assert_eq!(why("touch 0xffffffffffff r"), Ok(()));
        assert_eq!(why("zapchange 0xfffffffff000 0xffffffffff000"), Ok(()));
    }
}
