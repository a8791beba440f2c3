// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a change of an entry owes a flush.
//!
//! x86 hardware accepts any change in one store, so nothing is ever broken first. A flush is owed where a TLB may go on
//! granting, or translating to, what the entry no longer says (Linux: the callers of `kvm_flush_remote_tlbs`):
//!
//! | change of a leaf | flush |
//! |---|---|
//! | to anything not present | yes |
//! | another output, memory type, privilege, global bit, key | yes |
//! | R, W or X taken away | yes |
//! | MMU-writable cleared, even where W was clear: an earlier protection may be unflushed | yes |
//! | dirty cleared: the next write must be seen | yes |
//! | accessed cleared, or the leaf aged by access tracking | no, a stale answer is tolerated |
//! | rights added, facts added | no |
//! | to a table: that is a split, of which every part says the same | no |
//!
//! A link owes a flush when it is removed, replaced or narrowed.

use spte_core::format::Transition;

/// What matters of a leaf.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Output and all bits that say how the memory is used, as they lie in the entry.
    pub(crate) target: u64,
    /// R and X (saved ones, where tracked) as bits of any meaning: one that disappears is a right taken away.
    pub(crate) rights: u64,
    pub(crate) write: bool,
    pub(crate) mmu_writable: bool,
    pub(crate) dirty: bool,
    /// Aged by taking the rights away.
    pub(crate) tracked: bool,
}

impl View {
    pub(crate) const fn become_leaf(self, new: Self) -> Transition {
        // Ageing without an accessed bit takes W too. That needs no flush as long as the write that a stale TLB lets
        // through is already told: dirty stays set, and clearing it flushes.
        let aged = new.tracked && new.mmu_writable && new.dirty;
        let flush = self.target != new.target
            || self.rights & !new.rights != 0
            || (self.write && !new.write && !aged)
            || (self.mmu_writable && !new.mmu_writable)
            || (self.dirty && !new.dirty);
        if flush { Transition::FLUSH } else { Transition::FREE }
    }
}
