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
    hw_accessed: bool,
    hw_dirty: bool,
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
            hw_accessed: false,
            hw_dirty: false,
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

    /// arm64 stage 2 (VMSAv8-64, Arm ARM chapter D8) with a granule of 4 KiB, 16 KiB or 64 KiB, accessed and dirty managed
    /// by software, memory types as without FEAT_S2FWB: with it ([`Shape::with_forced_write_back`]) there is no
    /// write-through.
    ///
    /// With at most 48 output bits the sizes of blocks are those of level 2, and of level 1 for 4 KiB. `wide` is FEAT_LPA2
    /// in use (VTCR_EL2.DS) for 4 KiB and 16 KiB, and FEAT_LPA for 64 KiB: addresses of up to 52 bits, and blocks one
    /// level higher. A table whose walks begin below such a level has none there: [`Shape::with_leaves_up_to`]. Every set of rights is possible, none at all included: whether an entry is valid is a bit of its own.
    ///
    /// # Errors
    /// [`ShapeError::LeafSize`] for another granule, [`ShapeError::Bits`] for widths beyond 48 bits, or 52 where `wide`.
    pub fn arm64_stage2(granule: u64, gpa_bits: u32, out_bits: u32, wide: bool) -> Result<Shape, ShapeError> {
        const K: u64 = 1 << 10;
        const M: u64 = 1 << 20;
        const G: u64 = 1 << 30;
        let sizes: &[u64] = match granule {
            0x1000 => &[4 * K, 2 * M, G, 512 * G],
            0x4000 => &[16 * K, 32 * M, 64 * G],
            0x1_0000 => &[64 * K, 512 * M, 4096 * G],
            size => return Err(ShapeError::LeafSize { size }),
        };
        let sizes = if wide { sizes } else { &sizes[..sizes.len() - 1] };
        let most = if wide { 52 } else { 48 };
        for bits in [gpa_bits, out_bits] {
            if bits > most {
                return Err(ShapeError::Bits { bits });
            }
        }
        Shape::new(sizes, gpa_bits, out_bits)
    }

    /// A partition-scoped radix tree of Power (Power ISA 3.0, Book III) with base pages of 4 KiB or 64 KiB, as POWER9 and
    /// POWER10 walk it: leaves of 2 MiB and 1 GiB in both, 52 guest address bits, 57 of output. Writing is reading too, so
    /// that there is no writing alone; an entry without any right is an entry; there is no write-through.
    ///
    /// # Errors
    /// [`ShapeError::LeafSize`] for another base page.
    pub fn ppc_radix(page: u64) -> Result<Shape, ShapeError> {
        if page != 0x1000 && page != 0x1_0000 {
            return Err(ShapeError::LeafSize { size: page });
        }
        let access: Vec<Access> =
            Access::ALL.into_iter().filter(|set| set.contains(Access::R) || !set.contains(Access::W)).collect();
        let mem = [MemType::Wb, MemType::Uc, MemType::Wc];
        Ok(Shape::new(&[page, 2 << 20, 1 << 30], 52, 57)?.with_hw_ad(true).with_access(&access).with_mem(&mem))
    }

    /// As arm64 is with FEAT_S2FWB in use: stage 2 then says what the memory is, and cannot say write-through (Arm ARM,
    /// "Stage 2 memory type and Cacheability attributes when FEAT_S2FWB is implemented").
    pub fn with_forced_write_back(self) -> Shape {
        self.with_mem(&[MemType::Wb, MemType::Uc, MemType::Wc])
    }

    fn x86(gpa_bits: u32) -> Shape {
        Shape {
            leaf_sizes: vec![4 << 10, 2 << 20, 1 << 30],
            gpa_bits,
            out_bits: 52,
            hw_accessed: true,
            hw_dirty: true,
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

    /// Without leaves of more than `most` bytes, because the table's root is at their level or below; the granule stays.
    pub fn with_leaves_up_to(self, most: u64) -> Shape {
        let granule = self.granule();
        let leaf_sizes = self.leaf_sizes.into_iter().filter(|&size| size == granule || size <= most).collect();
        Shape { leaf_sizes, ..self }
    }

    /// With accessed and dirty managed by hardware, or not.
    pub fn with_hw_ad(self, hw_ad: bool) -> Shape {
        Shape { hw_accessed: hw_ad, hw_dirty: hw_ad, ..self }
    }

    /// With accessed managed by hardware, or not; dirty as it is. (arm64 may have the first without the second, and EPT
    /// where its dirty bits feed somebody else's log.)
    pub fn with_hw_accessed(self, hw_accessed: bool) -> Shape {
        Shape { hw_accessed, ..self }
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

    /// Whether hardware marks a leaf as accessed. Where it does not, the first access to an old leaf faults.
    pub fn hw_accessed(&self) -> bool {
        self.hw_accessed
    }

    /// Whether hardware marks a leaf as dirty. Where it does not, only a write that was withheld is known.
    pub fn hw_dirty(&self) -> bool {
        self.hw_dirty
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
    fn arm64_has_blocks_where_the_architecture_has_them() {
        let sizes = |granule, bits, wide| {
            Shape::arm64_stage2(granule, bits, bits, wide).map(|shape| shape.leaf_sizes()[1..].to_vec())
        };
        assert_eq!(sizes(4 << 10, 48, false), Ok(vec![2 << 20, 1 << 30]));
        assert_eq!(sizes(4 << 10, 52, true), Ok(vec![2 << 20, 1 << 30, 512 << 30]));
        assert_eq!(sizes(16 << 10, 47, false), Ok(vec![32 << 20]));
        assert_eq!(sizes(16 << 10, 52, true), Ok(vec![32 << 20, 64 << 30]));
        assert_eq!(sizes(64 << 10, 40, false), Ok(vec![512 << 20]));
        assert_eq!(sizes(64 << 10, 52, true), Ok(vec![512 << 20, 4 << 40]));
        assert_eq!(sizes(8 << 10, 40, false), Err(ShapeError::LeafSize { size: 8 << 10 }));
        assert_eq!(sizes(4 << 10, 49, false), Err(ShapeError::Bits { bits: 49 }));
        assert_eq!(sizes(4 << 10, 53, true), Err(ShapeError::Bits { bits: 53 }));
    }

    #[test]
    fn arm64_has_every_set_of_rights_and_software_that_keeps_the_facts() {
        let shape = Shape::arm64_stage2(4 << 10, 40, 48, false).unwrap();
        assert_eq!((shape.access(), shape.mem()), (&Access::ALL[..], &MemType::ALL[..]));
        assert_eq!((shape.hw_accessed(), shape.hw_dirty()), (false, false));
        let shape = shape.with_hw_accessed(true);
        assert_eq!((shape.hw_accessed(), shape.hw_dirty()), (true, false));
        assert_eq!(shape.clone().with_leaves_up_to(2 << 20).leaf_sizes(), [4 << 10, 2 << 20]);
        assert_eq!(shape.clone().with_leaves_up_to(0).leaf_sizes(), [4 << 10]);
        assert_eq!(shape.with_forced_write_back().mem(), [MemType::Wb, MemType::Uc, MemType::Wc]);
    }

    #[test]
    fn power_has_two_base_pages_and_no_writing_alone() {
        let shape = Shape::ppc_radix(64 << 10).unwrap();
        assert_eq!(shape.leaf_sizes(), [64 << 10, 2 << 20, 1 << 30]);
        assert_eq!(Shape::ppc_radix(4 << 10).unwrap().leaf_sizes(), [4 << 10, 2 << 20, 1 << 30]);
        assert_eq!(Shape::ppc_radix(16 << 10), Err(ShapeError::LeafSize { size: 16 << 10 }));
        assert_eq!(shape.access().len(), 6);
        assert!(shape.access().iter().all(|set| set.contains(Access::R) || !set.contains(Access::W)));
        assert_eq!(shape.mem(), [MemType::Wb, MemType::Uc, MemType::Wc]);
        assert!(shape.hw_accessed() && shape.hw_dirty());
    }

    #[test]
    fn ready_made_shapes_are_sane() {
        let arm64 = |granule, wide| Shape::arm64_stage2(granule, 48, 48, wide).unwrap();
        let arm64 = [4 << 10, 16 << 10, 64 << 10].into_iter().flat_map(|size| [arm64(size, false), arm64(size, true)]);
        for shape in [Shape::ept(), Shape::npt(), Shape::x86_64(), Shape::x86_64_la57()].into_iter().chain(arm64) {
            let (gpa, out) = (shape.gpa_bits(), shape.out_bits());
            assert_eq!(shape.clone().with_bits(gpa, out), Ok(shape));
        }
    }
}
