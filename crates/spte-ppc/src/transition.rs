// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When an entry has to be broken before the new one is made, and when a change owes a flush.
//!
//! The order kept here for a valid entry that is to translate differently is: **invalid, tlbie, write**. Make V zero; `ptesync`, so that
//! the store comes before the invalidation; `tlbie` with the size that the old leaf had; `eieio; tlbsync; ptesync`, so that
//! every processor has dropped it, and its stores of R and C are done; then store the new entry; `ptesync`. There are
//! three reasons, and all of them are about what would happen with a single store:
//!
//! - two processors, or one processor's TLB and its ERAT, could use the old and the new translation at once, and two entries
//!   for one address in one TLB are a machine check (multihit) on POWER9 (Linux: `mce_p9_derror_table`);
//! - the invalidation names a size (AP), and would be asked to find the old leaf and the new one;
//! - R and C that a processor still sets for the old page would land in the new entry: a write to the old page would be
//!   taken for one to the new page, and lost for the old.
//!
//! So [`change_pte`](spte_core::format::Format::set_spte) breaks too, though both pages are equal and read-only: that the contents
//! are the same answers the first reason for memory, not for the TLB, and not the other two. R and C are read when the entry
//! is taken away and, what comes late, again after the flush; R goes on to the new entry, C is reported for the old page, before the
//! operation returns. For that moment the guest finds nothing and faults for nothing.
//!
//! | change of a leaf | break first | flush |
//! |---|---|---|
//! | output address, `change_pte` included | yes | yes |
//! | ATT | yes | yes |
//! | size: a leaf for a table or back | yes | yes |
//! | a link to another table | yes | yes, and the page-walk cache |
//! | a right of EAA taken away | no | yes |
//! | upgradable cleared, even where writing was withheld: an earlier protection may be unflushed | no | yes |
//! | C cleared: the next write must be seen | no | yes |
//! | a right added | no | no: a processor with the old one faults once for nothing |
//! | R cleared: a stale "young" is tolerated | no | no |
//! | R or C set, the user's bit | no | no |
//! | valid to invalid | no | yes |
//! | invalid to anything | no | no: what is invalid is in no TLB |
//!
//! Sources, for what the ISA says: Power ISA 3.1B, Book III, 6.10.1.2 "Modifying a Translation Table Entry", as Linux quotes it
//! (`arch/powerpc/include/asm/book3s/64/tlbflush.h`): "If the only change being made to a valid PTE that is subject to atomic
//! hardware updates is to set the Reference or Change bit to 1 or to upgrade access authority, a simpler sequence suffices because
//! the translation hardware will refetch the PTE". So neither of these two owes a flush, and nothing else has that exemption. (In 3.0 it is
//! 5.10.1.2, "add access authorities": OpenBSD, `sys/arch/powerpc64/powerpc64/db_memrw.c`. The nest MMU of POWER9 does not
//! refetch, against the ISA: where accelerators use the tree, a right added is flushed too, which is not done here.)
//! The general sequence, which a change of the output is left to, is **not quoted anywhere that was read for radix**. For hashed
//! entries and their ancestors it is the whole order, V zero, `ptesync`, `tlbie`, `eieio; tlbsync; ptesync`, then the new entry (hostboot,
//! `PageTableManager::writePTE`; MPC7400 User's Manual, 5.4.6, "Code for Modifying a Page Table Entry": "First delete the current page
//! table entry"); that it is the same for radix is inferred, and is the careful choice either way.
//!
//! For what is done: Linux, `kvmppc_unmap_pte`, `kvmppc_radix_tlbie_page`, `kvm_age_radix` (no flush), `kvm_radix_test_clear_dirty`,
//! `kvmppc_create_pte` (rights that rise are not flushed); `_tlbie_lpid_va` in `arch/powerpc/mm/book3s64/radix_tlb.c` (the
//! barriers). Linux has no place that changes the frame number of a valid radix entry.

use spte_core::format::Transition;

/// What matters of a leaf.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    /// Output address and ATT, as they lie in the entry.
    pub(crate) target: u64,
    /// Read and execute, as they lie in the entry.
    pub(crate) rights: u64,
    pub(crate) writable: bool,
    pub(crate) upgradable: bool,
    pub(crate) changed: bool,
}

impl View {
    pub(crate) const fn become_leaf(self, new: Self) -> Transition {
        if self.target != new.target {
            return Transition::BREAK;
        }
        let lost = self.rights & !new.rights != 0
            || (self.writable && !new.writable)
            || (self.upgradable && !new.upgradable)
            || (self.changed && !new.changed);
        if lost { Transition::FLUSH } else { Transition::FREE }
    }
}
