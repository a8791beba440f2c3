// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a format can do, without how it does it: sizes, widths, permissions, memory types.

use thiserror::Error;

use crate::op::{Access, MemType};

/// The abilities of one format under one set of options.
///
/// Every shape in existence is sane: leaf sizes are ascending powers of two from the granule up,
/// and both address widths hold at least one granule and fit below bit 63.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    leaf_sizes: Vec<u64>,
    gpa_bits: u32,
    out_bits: u32,
    hw_ad: bool,
    access: Vec<Access>,
    mem: Vec<MemType>,
}

/// Why a [`Shape`] cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum ShapeError {
    /// There is no leaf size.
    #[error("a format needs at least one leaf size")]
    NoLeafSize,
    /// A leaf size is not a power of two, not larger than the one before, or so much larger that no
    /// table lies between them (more than 2^18 times: 1 GiB over 4 KiB).
    #[error("leaf size {size:#x} cannot follow the one before it")]
    LeafSize {
        /// The offending size.
        size: u64,
    },
    /// An address width is smaller than the granule, or larger than 63.
    #[error("{bits} address bits cannot be: not between the granule and 63")]
    Bits {
        /// The offending width.
        bits: u32,
    },
}

impl Shape {
    /// A format with these leaf sizes (ascending, the first is the granule) and address widths,
    /// every access set and memory type, and accessed and dirty managed by software. The `with_`
    /// methods narrow it.
    ///
    /// # Errors
    /// [`ShapeError`] if sizes or widths are not those of any possible table.
    pub fn new(leaf_sizes: &[u64], gpa_bits: u32, out_bits: u32) -> Result<Shape, ShapeError> {
        let granule = *leaf_sizes.first().ok_or(ShapeError::NoLeafSize)?;
        let mut previous = None;
        for &size in leaf_sizes {
            // Cutting one leaf must not exhaust memory.
            let follows = previous.is_none_or(|below| size > below && size / below <= 1 << 18);
            if !size.is_power_of_two() || !follows {
                return Err(ShapeError::LeafSize { size });
            }
            previous = Some(size);
        }
        for bits in [gpa_bits, out_bits] {
            if bits > 63 || 1 << bits < granule {
                return Err(ShapeError::Bits { bits });
            }
        }
        Ok(Shape {
            leaf_sizes: leaf_sizes.to_vec(),
            gpa_bits,
            out_bits,
            hw_ad: false,
            access: Access::ALL.to_vec(),
            mem: MemType::ALL.to_vec(),
        })
    }

    /// Intel EPT. Write without read is a misconfiguration (Intel SDM vol. 3, EPT misconfigurations),
    /// and an entry without any right is not present, so neither can be installed; execute-only can.
    pub fn ept() -> Shape {
        let access = [Access::RWX, Access::RW, Access::RX, Access::R, Access::X];
        Shape { access: access.to_vec(), ..Shape::x86(48) }
    }

    /// AMD nested paging. As [`Shape::x86_64`]: the same entries serve.
    pub fn npt() -> Shape {
        Shape::x86_64()
    }

    /// Four-level x86-64. What is present is readable (AMD64 manual vol. 2, 5.6); without a programmed
    /// PAT there is no write-combining (its power-on value selects WB, WT, UC- and UC).
    pub fn x86_64() -> Shape {
        let access = [Access::RWX, Access::RW, Access::RX, Access::R];
        let mem = [MemType::Wb, MemType::Uc, MemType::Wt];
        Shape { access: access.to_vec(), mem: mem.to_vec(), ..Shape::x86(48) }
    }

    /// Five-level x86-64.
    pub fn x86_64_la57() -> Shape {
        Shape { gpa_bits: 57, ..Shape::x86_64() }
    }

    fn x86(gpa_bits: u32) -> Shape {
        Shape {
            leaf_sizes: vec![4 << 10, 2 << 20, 1 << 30],
            gpa_bits,
            out_bits: 52,
            hw_ad: true,
            access: Access::ALL.to_vec(),
            mem: MemType::ALL.to_vec(),
        }
    }

    /// With other address widths.
    ///
    /// # Errors
    /// [`ShapeError::Bits`] if a width is impossible.
    pub fn with_bits(self, gpa_bits: u32, out_bits: u32) -> Result<Shape, ShapeError> {
        let widths = Shape::new(&self.leaf_sizes, gpa_bits, out_bits)?;
        Ok(Shape { gpa_bits: widths.gpa_bits, out_bits: widths.out_bits, ..self })
    }

    /// With accessed and dirty managed by hardware, or not.
    pub fn with_hw_ad(self, hw_ad: bool) -> Shape {
        Shape { hw_ad, ..self }
    }

    /// With only these access sets.
    pub fn with_access(self, access: &[Access]) -> Shape {
        Shape { access: access.to_vec(), ..self }
    }

    /// With only these memory types.
    pub fn with_mem(self, mem: &[MemType]) -> Shape {
        Shape { mem: mem.to_vec(), ..self }
    }

    /// The smallest leaf, in bytes.
    pub fn granule(&self) -> u64 {
        self.leaf_sizes[0]
    }

    /// All leaf sizes in bytes, ascending; the first is the granule.
    pub fn leaf_sizes(&self) -> &[u64] {
        &self.leaf_sizes
    }

    /// Width of a guest physical address.
    pub fn gpa_bits(&self) -> u32 {
        self.gpa_bits
    }

    /// Width of an output address.
    pub fn out_bits(&self) -> u32 {
        self.out_bits
    }

    /// Whether hardware manages accessed and dirty.
    pub fn hw_ad(&self) -> bool {
        self.hw_ad
    }

    /// The access sets that a leaf can have.
    pub fn access(&self) -> &[Access] {
        &self.access
    }

    /// The memory types that a leaf can have.
    pub fn mem(&self) -> &[MemType] {
        &self.mem
    }

    /// Whether a leaf can have exactly these rights.
    pub fn supports(&self, access: Access) -> bool {
        self.access.contains(&access)
    }

    /// The next smaller leaf size, if there is one.
    pub(crate) fn below(&self, size: u64) -> Option<u64> {
        self.leaf_sizes.iter().rev().copied().find(|&smaller| smaller < size)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_shapes_are_refused() {
        assert_eq!(Shape::new(&[], 48, 48), Err(ShapeError::NoLeafSize));
        assert_eq!(Shape::new(&[4096, 6144], 48, 48), Err(ShapeError::LeafSize { size: 6144 }));
        assert_eq!(Shape::new(&[4096, 4096], 48, 48), Err(ShapeError::LeafSize { size: 4096 }));
        assert_eq!(Shape::new(&[0], 48, 48), Err(ShapeError::LeafSize { size: 0 }));
        assert_eq!(Shape::new(&[4096], 64, 48), Err(ShapeError::Bits { bits: 64 }));
        assert_eq!(Shape::ept().with_bits(48, 11), Err(ShapeError::Bits { bits: 11 }));
    }

    #[test]
    fn ready_made_shapes_are_sane() {
        for shape in [Shape::ept(), Shape::npt(), Shape::x86_64(), Shape::x86_64_la57()] {
            let (gpa, out) = (shape.gpa_bits(), shape.out_bits());
            assert_eq!(shape.clone().with_bits(gpa, out), Ok(shape));
        }
    }
}
