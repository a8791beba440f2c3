// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The registers that point at tables, and what exits say about an access, as typed values.
//!
//! Sources: Intel SDM volume 3, "EPT Pointer (EPTP)", "VPID and EPT Capabilities" and "Exit Qualification for EPT
//! Violations"; AMD APM volume 2, "Nested Paging" and "Control Registers".

use notifier_core::{Access, OutputAddr};

use crate::bits::{ADDRESS, Levels};
use crate::memtype::EptMemoryType;

/// A register value that the processor refuses, or that this crate does not know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// A root is a page of its own.
    #[error("root {root} is not the address of a page")]
    Unaligned {
        /// The root.
        root: OutputAddr,
    },
    /// The root has more bits than the register.
    #[error("root {root} needs more than 52 address bits")]
    TooWide {
        /// The root.
        root: OutputAddr,
    },
    /// EPT structures are cached write back or not at all.
    #[error("memory type {number} of EPT structures is neither 0 nor 6")]
    MemoryType {
        /// Its number.
        number: u8,
    },
    /// EPT has four or five levels.
    #[error("an EPT of {levels} levels does not exist")]
    Levels {
        /// The number asked for.
        levels: u8,
    },
    /// A PCID has 12 bits.
    #[error("PCID {pcid:#x} has more than 12 bits")]
    Pcid {
        /// The PCID.
        pcid: u16,
    },
    /// Bits that must be zero.
    #[error("reserved bits {bits:#x} are set in {raw:#x}")]
    Reserved {
        /// The register.
        raw: u64,
        /// Those of its bits.
        bits: u64,
    },
}

const fn check_root(root: OutputAddr) -> Result<u64, RegisterError> {
    if !root.is_aligned(4096) {
        return Err(RegisterError::Unaligned { root });
    }
    if root.as_u64() & !ADDRESS != 0 {
        return Err(RegisterError::TooWide { root });
    }
    Ok(root.as_u64())
}

/// EPTP, the VMCS field that points at an EPT.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct EptPointer(u64);

impl EptPointer {
    const ACCESSED_DIRTY: u64 = 1 << 6;
    const SHADOW_STACK: u64 = 1 << 7;
    const RESERVED: u64 = !(ADDRESS | 0xff);

    /// A write-back EPT with this root. `accessed_dirty` has hardware set A and D.
    ///
    /// # Errors
    /// [`RegisterError::Unaligned`] and [`RegisterError::TooWide`] for the root.
    pub const fn new(root: OutputAddr, levels: Levels, accessed_dirty: bool) -> Result<Self, RegisterError> {
        match check_root(root) {
            Ok(root) => {
                let accessed_dirty = if accessed_dirty { Self::ACCESSED_DIRTY } else { 0 };
                let levels = (levels.get() as u64 - 1) << 3;
                Ok(Self(root | levels | accessed_dirty | EptMemoryType::WriteBack as u64))
            }
            Err(why) => Err(why),
        }
    }

    /// The field with this value.
    ///
    /// # Errors
    /// [`RegisterError::MemoryType`], [`RegisterError::Levels`] and [`RegisterError::Reserved`]: VM entry would fail.
    pub const fn from_raw(raw: u64) -> Result<Self, RegisterError> {
        let number = (raw & 7) as u8;
        if number != 0 && number != 6 {
            return Err(RegisterError::MemoryType { number });
        }
        let levels = ((raw >> 3) & 7) as u8 + 1;
        if levels != 4 && levels != 5 {
            return Err(RegisterError::Levels { levels });
        }
        if raw & Self::RESERVED != 0 {
            return Err(RegisterError::Reserved { raw, bits: raw & Self::RESERVED });
        }
        Ok(Self(raw))
    }

    /// The same with the structures uncacheable (type 0) instead of write back.
    #[must_use]
    pub const fn uncacheable(self) -> Self {
        Self(self.0 & !7)
    }

    /// The same with supervisor shadow-stack rights enforced (bit 7).
    #[must_use]
    pub const fn with_shadow_stack(self) -> Self {
        Self(self.0 | Self::SHADOW_STACK)
    }

    /// The field's value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The root table.
    pub const fn root(self) -> OutputAddr {
        OutputAddr::new(self.0 & ADDRESS)
    }

    /// Levels of the table.
    pub const fn levels(self) -> Levels {
        if (self.0 >> 3) & 7 == 4 { Levels::Five } else { Levels::Four }
    }

    /// The cache type of the table pages.
    pub const fn memory_type(self) -> EptMemoryType {
        if self.0 & 7 == 0 { EptMemoryType::Uncacheable } else { EptMemoryType::WriteBack }
    }

    /// Whether hardware sets A and D.
    pub const fn accessed_dirty(self) -> bool {
        self.0 & Self::ACCESSED_DIRTY != 0
    }

    /// Whether supervisor shadow-stack rights are enforced.
    pub const fn shadow_stack(self) -> bool {
        self.0 & Self::SHADOW_STACK != 0
    }
}

/// CR3 while CR4.PCIDE is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Cr3(u64);

impl Cr3 {
    const NO_FLUSH: u64 = 1 << 63;
    const PCID: u64 = 0xfff;

    /// The root with this PCID, which has 12 bits.
    ///
    /// # Errors
    /// [`RegisterError::Unaligned`] and [`RegisterError::TooWide`] for the root, [`RegisterError::Pcid`].
    pub const fn new(root: OutputAddr, pcid: u16) -> Result<Self, RegisterError> {
        if pcid as u64 & !Self::PCID != 0 {
            return Err(RegisterError::Pcid { pcid });
        }
        match check_root(root) {
            Ok(root) => Ok(Self(root | pcid as u64)),
            Err(why) => Err(why),
        }
    }

    /// The register with this value. Bits 61 and 62 (linear address masking) are not known here.
    ///
    /// # Errors
    /// [`RegisterError::Reserved`].
    pub const fn from_raw(raw: u64) -> Result<Self, RegisterError> {
        let bits = raw & !(ADDRESS | Self::PCID | Self::NO_FLUSH);
        if bits != 0 { Err(RegisterError::Reserved { raw, bits }) } else { Ok(Self(raw)) }
    }

    /// The value to write so that translations of the PCID are kept (bit 63, which is never read back).
    #[must_use]
    pub const fn without_flush(self) -> Self {
        Self(self.0 | Self::NO_FLUSH)
    }

    /// The register's value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The root table.
    pub const fn root(self) -> OutputAddr {
        OutputAddr::new(self.0 & ADDRESS)
    }

    /// The PCID.
    pub const fn pcid(self) -> u16 {
        (self.0 & Self::PCID) as u16
    }
}

/// nCR3, the VMCB field that points at an NPT. PWT and PCD are clear: table pages are cached as the first PAT entry
/// says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NestedCr3(u64);

impl NestedCr3 {
    /// The field for this root. The encryption bit, where tables are encrypted, is part of it.
    ///
    /// # Errors
    /// [`RegisterError::Unaligned`] and [`RegisterError::TooWide`].
    pub const fn new(root: OutputAddr) -> Result<Self, RegisterError> {
        match check_root(root) {
            Ok(root) => Ok(Self(root)),
            Err(why) => Err(why),
        }
    }

    /// The field's value.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The root table.
    pub const fn root(self) -> OutputAddr {
        OutputAddr::new(self.0)
    }
}

bitflags::bitflags! {
    /// IA32_VMX_EPT_VPID_CAP, as far as EPT goes.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct EptCapabilities: u64 {
        /// Execute-only leaves.
        const EXECUTE_ONLY = 1 << 0;
        /// Four levels.
        const FOUR_LEVELS = 1 << 6;
        /// Five levels.
        const FIVE_LEVELS = 1 << 7;
        /// Uncacheable structures.
        const UNCACHEABLE = 1 << 8;
        /// Write-back structures.
        const WRITE_BACK = 1 << 14;
        /// 2M leaves.
        const PAGES_2M = 1 << 16;
        /// 1G leaves.
        const PAGES_1G = 1 << 17;
        /// INVEPT exists.
        const INVEPT = 1 << 20;
        /// Accessed and dirty bits.
        const ACCESSED_DIRTY = 1 << 21;
        /// Violations report more about guest tables.
        const ADVANCED_EXIT_INFORMATION = 1 << 22;
        /// INVEPT of one EPTP.
        const INVEPT_SINGLE_CONTEXT = 1 << 25;
        /// INVEPT of all.
        const INVEPT_ALL_CONTEXTS = 1 << 26;
        /// What else there is.
        const _ = !0;
    }
}

bitflags::bitflags! {
    /// The exit qualification of an EPT violation. A misconfiguration has none.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct EptViolation: u64 {
        /// A data read.
        const READ = 1 << 0;
        /// A data write.
        const WRITE = 1 << 1;
        /// An instruction fetch.
        const FETCH = 1 << 2;
        /// Every entry on the way had R.
        const READABLE = 1 << 3;
        /// Every entry on the way had W.
        const WRITABLE = 1 << 4;
        /// Every entry on the way had X.
        const EXECUTABLE = 1 << 5;
        /// Every entry on the way had bit 10; undefined without mode-based execute.
        const USER_EXECUTABLE = 1 << 6;
        /// The guest linear address field is valid.
        const LINEAR_VALID = 1 << 7;
        /// The access was to the page itself; clear, it was to one of the guest's paging structures.
        const FINAL = 1 << 8;
        /// What else there is.
        const _ = !0;
    }
}

impl EptViolation {
    /// What the access wanted. A guest's page-table access with accessed and dirty bits on counts as a read and a
    /// write.
    pub fn access(self) -> Access {
        let mut access = Access::empty();
        access.set(Access::READ, self.contains(Self::READ));
        access.set(Access::WRITE, self.contains(Self::WRITE));
        access.set(Access::EXECUTE, self.contains(Self::FETCH));
        access
    }

    /// What the entries granted; nothing where one was not present.
    pub fn granted(self) -> Access {
        let mut access = Access::empty();
        access.set(Access::READ, self.contains(Self::READABLE));
        access.set(Access::WRITE, self.contains(Self::WRITABLE));
        access.set(Access::EXECUTE, self.contains(Self::EXECUTABLE));
        access
    }

    /// Whether every entry on the way was present.
    pub fn is_present(self) -> bool {
        self.intersects(Self::READABLE | Self::WRITABLE | Self::EXECUTABLE)
    }
}

bitflags::bitflags! {
    /// The error code of a nested page fault (EXITINFO1).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct NestedFault: u64 {
        /// The entry was present: rights were missing, or a reserved bit was set.
        const PRESENT = 1 << 0;
        /// A write. Every access to a guest page table is one.
        const WRITE = 1 << 1;
        /// A user access, as all nested ones are.
        const USER = 1 << 2;
        /// A reserved bit was set.
        const RESERVED = 1 << 3;
        /// An instruction fetch.
        const FETCH = 1 << 4;
        /// The fault was on the guest's final physical address.
        const FINAL = 1 << 32;
        /// The fault was on one of the guest's page tables.
        const GUEST_TABLE = 1 << 33;
        /// What else there is.
        const _ = !0;
    }
}

impl NestedFault {
    /// What the access wanted: a fetch, a write or a read.
    pub fn access(self) -> Access {
        if self.contains(Self::FETCH) {
            Access::EXECUTE
        } else if self.contains(Self::WRITE) {
            Access::WRITE
        } else {
            Access::READ
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: OutputAddr = OutputAddr::new(0x1234_5000);

    #[test]
    fn eptp_of_write_back_with_accessed_and_dirty() {
        let four = EptPointer::new(ROOT, Levels::Four, true).unwrap();
        assert_eq!(four.raw(), 0x1234_505e);
        assert_eq!(EptPointer::new(ROOT, Levels::Five, true).unwrap().raw(), 0x1234_5066);
        assert_eq!(EptPointer::new(ROOT, Levels::Four, false).unwrap().raw(), 0x1234_501e);
        assert_eq!(four.with_shadow_stack().raw(), 0x1234_50de);
        assert_eq!(four.uncacheable().memory_type(), EptMemoryType::Uncacheable);
        assert_eq!((four.root(), four.levels(), four.accessed_dirty()), (ROOT, Levels::Four, true));
        assert_eq!(EptPointer::from_raw(0x1234_5066).unwrap().levels(), Levels::Five);
    }

    #[test]
    fn eptp_that_fails_vm_entry_is_refused() {
        let refused = |raw| EptPointer::from_raw(raw).unwrap_err();
        assert_eq!(refused(0x1234_505a), RegisterError::MemoryType { number: 2 });
        assert_eq!(refused(0x1234_5056), RegisterError::Levels { levels: 3 });
        assert_eq!(refused(0x1234_535e), RegisterError::Reserved { raw: 0x1234_535e, bits: 0x300 });
        assert_eq!(
            EptPointer::new(OutputAddr::new(0x800), Levels::Four, true).unwrap_err(),
            RegisterError::Unaligned { root: OutputAddr::new(0x800) }
        );
        assert_eq!(
            EptPointer::new(OutputAddr::new(1 << 52), Levels::Four, true).unwrap_err(),
            RegisterError::TooWide { root: OutputAddr::new(1 << 52) }
        );
    }

    #[test]
    fn cr3_holds_root_and_pcid() {
        let cr3 = Cr3::new(ROOT, 0xabc).unwrap();
        assert_eq!(cr3.raw(), 0x1234_5abc);
        assert_eq!(cr3.without_flush().raw(), 0x8000_0000_1234_5abc);
        assert_eq!((cr3.root(), cr3.pcid()), (ROOT, 0xabc));
        assert_eq!(Cr3::new(ROOT, 0x1000), Err(RegisterError::Pcid { pcid: 0x1000 }));
        assert!(Cr3::from_raw(1 << 52).is_err());
        assert_eq!(NestedCr3::new(ROOT).unwrap().raw(), 0x1234_5000);
    }

    #[test]
    fn exits_say_what_was_wanted_and_what_there_was() {
        let write_to_read_only = EptViolation::from_bits_retain(0x1aa);
        assert_eq!(write_to_read_only.access(), Access::WRITE);
        assert_eq!(write_to_read_only.granted(), Access::RX);
        assert!(write_to_read_only.contains(EptViolation::FINAL | EptViolation::LINEAR_VALID));
        assert!(!EptViolation::from_bits_retain(0x181).is_present());

        let table = NestedFault::from_bits_retain(0x2_0000_0006);
        assert_eq!(table.access(), Access::WRITE);
        assert!(table.contains(NestedFault::GUEST_TABLE) && !table.contains(NestedFault::PRESENT));
        assert_eq!(NestedFault::from_bits_retain(0x1_0000_0015).access(), Access::EXECUTE);
    }
}
