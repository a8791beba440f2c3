// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Typed addresses and ranges.
//!
//! Three address spaces meet in a secondary MMU, and mixing them up is the oldest bug of the field. Each has a
//! type of its own; all are in bytes:
//!
//! | type | what it names | Linux |
//! |---|---|---|
//! | [`Hva`] | host virtual: where the VMM maps guest memory | `hva` |
//! | [`Gpa`] | guest physical: what the guest's own tables produce | `gpa` |
//! | [`OutputAddr`] | what a secondary entry points at | `pfn << PAGE_SHIFT` |
//!
//! Ranges ([`AddrRange`]) are half-open and byte-granular. The last byte of the 64-bit space is in no range: an end
//! is exclusive and has to be an address itself.

use core::fmt;

/// A range that cannot exist.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RangeError {
    /// The range holds no byte.
    #[error("range at {start:#x} is empty")]
    Empty {
        /// First byte asked for.
        start: u64,
    },
    /// The end lies before the start.
    #[error("range ends at {end:#x}, before its start {start:#x}")]
    Reversed {
        /// First byte asked for.
        start: u64,
        /// Exclusive end asked for.
        end: u64,
    },
    /// Start plus length leaves the 64-bit space.
    #[error("range of {len:#x} bytes at {start:#x} wraps around")]
    Wraps {
        /// First byte asked for.
        start: u64,
        /// Length asked for, in bytes.
        len: u64,
    },
}

mod sealed {
    pub trait Sealed {}
}

/// One of the three address types. Sealed.
pub trait Address:
    sealed::Sealed + Copy + Ord + fmt::Debug + fmt::Display + Send + Sync + core::hash::Hash + 'static
{
    /// The address with this number.
    fn from_u64(raw: u64) -> Self;
    /// The number of this address.
    fn as_u64(self) -> u64;
}

macro_rules! address {
    ($(#[$doc:meta])* $name:ident, $tag:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(u64);

        impl $name {
            /// The address with this number of bytes from zero.
            #[inline]
            pub const fn new(raw: u64) -> Self {
                Self(raw)
            }

            /// The number of this address.
            #[inline]
            pub const fn as_u64(self) -> u64 {
                self.0
            }

            /// This address plus `bytes`, or `None` where that wraps around.
            #[inline]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(raw) => Some(Self(raw)),
                    None => None,
                }
            }

            /// This address plus `bytes`, modulo 2^64.
            #[inline]
            pub const fn wrapping_add(self, bytes: u64) -> Self {
                Self(self.0.wrapping_add(bytes))
            }

            /// The greatest multiple of `align` that is not above this address. `align` is a power of two.
            #[inline]
            pub const fn align_down(self, align: u64) -> Self {
                Self(self.0 & !(align.wrapping_sub(1)))
            }

            /// Whether this address is a multiple of `align`, a power of two.
            #[inline]
            pub const fn is_aligned(self, align: u64) -> bool {
                self.0 & align.wrapping_sub(1) == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, ":{:#x}"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($tag, " {:#x}"), self.0)
            }
        }

        impl fmt::LowerHex for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::LowerHex::fmt(&self.0, f)
            }
        }

        impl sealed::Sealed for $name {}
        impl Address for $name {
            #[inline]
            fn from_u64(raw: u64) -> Self {
                Self(raw)
            }
            #[inline]
            fn as_u64(self) -> u64 {
                self.0
            }
        }
    };
}

address!(
    /// A host virtual address: where the VMM maps guest memory.
    Hva, "hva"
);
address!(
    /// A guest physical address: what the guest's own page tables produce, and what a second-level table translates.
    Gpa, "gpa"
);
address!(
    /// An output address: what an entry of a secondary table points at. In a hypervisor this is a host physical
    /// address; in a VMM it is whatever its walkers and devices use, such as an offset into a memory file.
    OutputAddr, "output"
);

#[cfg(feature = "vm-memory")]
impl From<vm_memory::GuestAddress> for Gpa {
    fn from(addr: vm_memory::GuestAddress) -> Self {
        Self(addr.0)
    }
}

#[cfg(feature = "vm-memory")]
impl From<Gpa> for vm_memory::GuestAddress {
    fn from(addr: Gpa) -> Self {
        Self(addr.0)
    }
}

/// A non-empty, half-open range of bytes in one address space.
///
/// ```
/// use notifier_core::{AddrRange, Gpa};
/// let range = AddrRange::with_len(Gpa::new(0x1000), 0x2000)?;
/// assert_eq!(range.end(), Gpa::new(0x3000));
/// assert!(AddrRange::with_len(Gpa::new(u64::MAX), 2).is_err());
/// # Ok::<(), notifier_core::RangeError>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct AddrRange<A> {
    start: A,
    end: A,
}

/// A range of host virtual addresses.
pub type HvaRange = AddrRange<Hva>;
/// A range of guest physical addresses.
pub type GpaRange = AddrRange<Gpa>;
/// A range of output addresses.
pub type OutputRange = AddrRange<OutputAddr>;

impl<A: Address> AddrRange<A> {
    /// The bytes from `start` up to but not including `end`.
    ///
    /// # Errors
    /// [`RangeError::Empty`] where both are equal, [`RangeError::Reversed`] where the end comes first.
    pub fn new(start: A, end: A) -> Result<Self, RangeError> {
        match start.cmp(&end) {
            core::cmp::Ordering::Less => Ok(Self { start, end }),
            core::cmp::Ordering::Equal => Err(RangeError::Empty { start: start.as_u64() }),
            core::cmp::Ordering::Greater => Err(RangeError::Reversed { start: start.as_u64(), end: end.as_u64() }),
        }
    }

    /// `len` bytes from `start`.
    ///
    /// # Errors
    /// [`RangeError::Empty`] for zero bytes, [`RangeError::Wraps`] where the end cannot be expressed.
    pub fn with_len(start: A, len: u64) -> Result<Self, RangeError> {
        if len == 0 {
            return Err(RangeError::Empty { start: start.as_u64() });
        }
        let end = start.as_u64().checked_add(len).ok_or(RangeError::Wraps { start: start.as_u64(), len })?;
        Ok(Self { start, end: A::from_u64(end) })
    }

    /// First byte.
    #[inline]
    pub fn start(&self) -> A {
        self.start
    }

    /// One past the last byte.
    #[inline]
    pub fn end(&self) -> A {
        self.end
    }

    /// Number of bytes; never zero.
    #[inline]
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub fn len(&self) -> u64 {
        self.end.as_u64() - self.start.as_u64()
    }

    /// Whether `addr` lies in this range.
    #[inline]
    pub fn contains(&self, addr: A) -> bool {
        self.start <= addr && addr < self.end
    }

    /// Whether every byte of `other` lies in this range.
    #[inline]
    pub fn covers(&self, other: &Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    /// Whether both ranges share a byte.
    #[inline]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    /// The bytes that both ranges have.
    pub fn intersection(&self, other: &Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end)).ok()
    }

    /// This range and `next` as one, where `next` begins at this one's end.
    pub fn joined(&self, next: &Self) -> Option<Self> {
        (self.end == next.start).then_some(Self { start: self.start, end: next.end })
    }

    /// The smallest range with both ends multiples of `align` (a power of two) that covers this one; it is cut at
    /// the top of the address space. Linux rounds every byte range to touched pages the same way.
    pub fn align_out(&self, align: u64) -> Self {
        let mask = align.wrapping_sub(1);
        let start = self.start.as_u64() & !mask;
        let end = self.end.as_u64().checked_add(mask).map_or(u64::MAX, |end| end & !mask);
        Self { start: A::from_u64(start), end: A::from_u64(end) }
    }

    /// Whether both ends are multiples of `align`, a power of two.
    pub fn is_aligned(&self, align: u64) -> bool {
        (self.start.as_u64() | self.end.as_u64()) & align.wrapping_sub(1) == 0
    }
}

impl<A: Address> fmt::Debug for AddrRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{:?}, {:#x})", self.start, self.end.as_u64())
    }
}

impl<A: Address> fmt::Display for AddrRange<A> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "[{}, {:#x})", self.start, self.end.as_u64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> GpaRange {
        AddrRange::new(Gpa::new(start), Gpa::new(end)).unwrap()
    }

    #[test]
    fn ranges_are_half_open() {
        assert!(!range(0, 0x1000).overlaps(&range(0x1000, 0x2000)));
        assert!(range(0, 0x1001).overlaps(&range(0x1000, 0x2000)));
        assert_eq!(range(0, 0x1001).intersection(&range(0x1000, 0x2000)), Some(range(0x1000, 0x1001)));
        assert_eq!(range(0, 0x1000).intersection(&range(0x1000, 0x2000)), None);
    }

    #[test]
    fn impossible_ranges_are_named() {
        assert_eq!(
            GpaRange::with_len(Gpa::new(u64::MAX - 1), 3),
            Err(RangeError::Wraps { start: u64::MAX - 1, len: 3 })
        );
        assert_eq!(GpaRange::new(Gpa::new(4), Gpa::new(4)), Err(RangeError::Empty { start: 4 }));
        assert_eq!(GpaRange::new(Gpa::new(4), Gpa::new(3)), Err(RangeError::Reversed { start: 4, end: 3 }));
    }

    #[test]
    fn partly_covered_pages_count() {
        assert_eq!(range(0x1fff, 0x2001).align_out(0x1000), range(0x1000, 0x3000));
        assert_eq!(range(1, u64::MAX).align_out(0x1000), range(0, u64::MAX));
    }
}
