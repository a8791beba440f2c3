// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When an entry has to be broken before the new one is made, and when a change owes a flush.
//!
//! A TLB that holds two translations of one address may use either, both or a mixture. So a *valid* entry that is replaced by
//! another *valid* one is first made invalid and flushed, if one of these changes (Arm DDI 0487, "Using break-before-make
//! when updating translation table entries", rule R_WHZWS of issue M):
//!
//! | change | break first | flush |
//! |---|---|---|
//! | memory type, cacheability, shareability | yes | yes |
//! | output address, either one writable, or contents that may differ | yes | yes |
//! | output address, both read-only and contents equal (`change_pte`) | no | yes |
//! | size: a block for a table or back, the Contiguous bit | unless FEAT_BBM level 2 | yes |
//! | a link to another table | yes | yes |
//! | rights taken away, or where they hold: S2AP, XN, DBM | no | yes |
//! | upgradable cleared, even where writing was withheld: an earlier protection may be unflushed | no | yes |
//! | the written state cleared: the next write must be seen | no | yes |
//! | rights added in place | no | no, but see below |
//! | access flag set: an entry without it is in no TLB (rule I_WZCBG) | no | no |
//! | access flag cleared: a stale "young" is tolerated | no | no |
//! | software bits | no | no |
//! | valid to invalid | no | yes |
//! | invalid to anything | no | no |
//!
//! "Writable" is what hardware goes by: S2AP\[1\], or DBM where hardware records writes.
//!
//! **The exemption rests on a flush that is complete.** A leaf that was write-protected may still be writable in a TLB. In a
//! Retained window it is not: the window's opening flushed, and nothing adds a right inside it.
//!
//! **Rights added in place**: other processors may hold the old, poorer translation, and fault once more for nothing. The
//! processor that took the fault must drop its own copy before it goes back, or may fault for ever:
//! [`tlb::relaxed`](crate::tlb::relaxed) (Linux: `kvm_pgtable_stage2_relax_perms`).
//!
//! FEAT_BBM level 1 (a block changes size through a staging entry with nT) is treated as level 0: the engine makes no
//! staging entries. Level 2 changes size in place; a processor may answer overlapping translations with a TLB conflict
//! abort, so it is for machines that are known not to.

use spte_core::format::Transition;

/// ID_AA64MMFR2_EL1.BBM: how much of break-before-make a change of size needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum BreakLevel {
    /// All of it.
    #[default]
    Level0,
    /// A staging entry with nT would do; there are none here, so all of it.
    Level1,
    /// None.
    Level2,
}

impl BreakLevel {
    /// Whether a mapping may change its size in place.
    pub const fn resizes_in_place(self) -> bool {
        matches!(self, Self::Level2)
    }

    /// A change of size.
    pub(crate) const fn resize(self) -> Transition {
        if self.resizes_in_place() { Transition::FLUSH } else { Transition::BREAK }
    }
}

/// What matters of a leaf.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Output address.
    pub(crate) output: u64,
    /// MemAttr and SH, as they lie in the entry.
    pub(crate) memory: u64,
    /// Contiguous and nT.
    pub(crate) size: u64,
    /// Read and execute at each level, as bits of any meaning.
    pub(crate) rights: u64,
    /// Hardware lets the guest write.
    pub(crate) writable: bool,
    pub(crate) upgradable: bool,
    pub(crate) dirty: bool,
}

impl View {
    /// `equal`: the two pages have equal contents.
    pub(crate) const fn become_leaf(self, new: Self, level: BreakLevel, equal: bool) -> Transition {
        let moved = self.output != new.output;
        let exempt = equal && !self.writable && !new.writable;
        let resized = self.size != new.size;
        if self.memory != new.memory || (moved && !exempt) || (resized && !level.resizes_in_place()) {
            return Transition::BREAK;
        }
        let lost = self.rights & !new.rights != 0
            || (self.writable && !new.writable)
            || (self.upgradable && !new.upgradable)
            || (self.dirty && !new.dirty);
        if moved || resized || lost { Transition::FLUSH } else { Transition::FREE }
    }
}
