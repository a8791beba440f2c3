// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The bits that hardware leaves to software, and what this crate keeps in them; and entries that are not valid.
//!
//! | bits | in a valid entry | Linux |
//! |---|---|---|
//! | 55 | [claim](CLAIM) | `KVM_PGTABLE_PROT_SW0` |
//! | 56 | [upgradable](UPGRADABLE): one compare-exchange may grant writing | none |
//! | 57 | [dirty fact](DIRTY_FACT) of a leaf that cannot be written now | none |
//! | 58 | the [user's](crate::Stage2Attrs::software) | `KVM_PGTABLE_PROT_SW3` |
//! | 60:59 | with FEAT_XNX, in a leaf that executes nowhere: [where it did](WITHHELD_EXECUTE) | none |
//!
//! **Why these are free.** Bits 58:55 are reserved for software in every block and page descriptor, and ignored in
//! tables. (Stage 2 of Realm and Secure state has NS in 55: such tables are not what this crate is for.) Bits 62:59 are
//! PBHA where VTCR_EL2.HWU59 to HWU62 say so, and ignored where they are clear, as in every value that
//! [`Vtcr`](crate::registers::Vtcr) makes.
//!
//! # Entries that are not valid
//! Hardware looks at bit 0 alone. [`ABSENT`] is zero, as in Linux, so that a zeroed page is an empty table. [`CLAIMED`]
//! and [`DEAD`] differ from it and from each other in four bits at least, and have no bit that hardware or ageing writes
//! in a valid entry. Everything else is an annotation: [`Owner`] is this crate's, and any other is left alone as somebody
//! else's. (What Linux writes while it breaks before it makes, and what CLAIMED is here, is 1 in bits 63:60 of recent
//! kernels, `KVM_INVALID_PTE_TYPE_LOCKED`: such an annotation. Earlier it was bit 10 alone, `KVM_INVALID_PTE_LOCKED`, which is the
//! place of AF here, and reads as nothing.)

use spte_core::format::NotPresent;

/// Bit 55 of a valid entry: somebody has claimed it, hardware goes on using it.
pub const CLAIM: u64 = 1 << 55;
/// Bit 56 of a leaf: writing was resolved. With it, and writing withheld, the leaf is armed.
pub const UPGRADABLE: u64 = 1 << 56;
/// Bit 57 of a leaf: it was written, and has nothing else by which to say so.
pub const DIRTY_FACT: u64 = 1 << 57;
/// Bit 58 of a leaf: the user's.
pub const USER: u64 = 1 << 58;
/// Bits 60:59 of a leaf that executes nowhere: XN as it will be when execute comes back. FEAT_XNX only.
pub const WITHHELD_EXECUTE: u64 = 3 << WITHHELD_EXECUTE_SHIFT;
/// Where [`WITHHELD_EXECUTE`] begins.
pub const WITHHELD_EXECUTE_SHIFT: u32 = 59;

/// An entry that holds nothing.
pub const ABSENT: u64 = 0;
/// Somebody is deciding what goes here: bits 63, 60, 58, 56, 54.
pub const CLAIMED: u64 = 0x9540_0000_0000_0000;
/// An entry of an unlinked table: bits 62, 61, 59, 53, 52.
pub const DEAD: u64 = 0x6830_0000_0000_0000;

/// Bits 63:60 of an annotation of this crate.
const ANNOTATION: u64 = 0x5 << 60;
const OWNER_SHIFT: u32 = 12;

pub(crate) const NOT_PRESENT: NotPresent = NotPresent { absent: ABSENT, claimed: CLAIMED, dead: DEAD };

/// Who owns a page that is not mapped: an annotation in an invalid entry (Linux: `kvm_pgtable_stage2_set_owner`, by
/// which pKVM remembers whom the host gave a page to).
///
/// The engine takes it for a special entry: it is put there by [`Table::set_special`](spte_core::Table::set_special),
/// keeps its table alive, is what a walk finds instead of nothing, is replaced by a map and removed by an unmap, without
/// a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(pub u32);

impl Owner {
    /// The invalid entry that says so: bits 63:60 are 5, the number is in 43:12, all others are zero.
    pub const fn to_raw(self) -> u64 {
        ANNOTATION | (self.0 as u64) << OWNER_SHIFT
    }

    /// The owner that an entry names, if it is such an annotation.
    pub const fn from_raw(raw: u64) -> Option<Self> {
        let owner = Self((raw >> OWNER_SHIFT) as u32);
        if owner.to_raw() == raw { Some(owner) } else { None }
    }
}

/// How a table learns that a page was used and written (FEAT_HAFDBS; VTCR_EL2.HA and HD).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum AccessedDirty {
    /// Hardware sets nothing: an access to an old leaf is an access flag fault, and a leaf is dirty from the moment
    /// that writing is granted.
    #[default]
    Software,
    /// Hardware sets the access flag (HA); dirty as in [`AccessedDirty::Software`]. What Linux does.
    HardwareAccessed,
    /// Hardware sets the access flag, and on a write to a leaf with DBM it sets S2AP\[1\] (HA and HD): of a leaf with DBM,
    /// S2AP\[1\] says that it was written, and clear that it may be.
    Hardware,
}

impl AccessedDirty {
    /// Whether hardware sets the access flag: VTCR_EL2.HA.
    pub const fn sets_accessed(self) -> bool {
        !matches!(self, Self::Software)
    }

    /// Whether hardware records writes: VTCR_EL2.HD.
    pub const fn sets_dirty(self) -> bool {
        matches!(self, Self::Hardware)
    }
}

/// The states that a leaf may be in as to writing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteState {
    /// The guest writes; the leaf is dirty. S2AP\[1\], and DBM where hardware records writes.
    Writable,
    /// The guest may write, and hardware will record it: DBM with S2AP\[1\] clear. Only with [`AccessedDirty::Hardware`].
    WritableClean,
    /// Writing is withheld; one compare-exchange brings it back.
    Armed,
    /// The host must be asked.
    ReadOnly,
}
