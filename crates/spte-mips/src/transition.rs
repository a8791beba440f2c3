// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! When a change owes a flush. Nothing is ever broken before it is made.
//!
//! A TLB pair is loaded by a handler, or by the walker, when there is none; who changes an entry writes it once, and then
//! drops the pair. Between the two an access finds one translation or the other, never both: two TLB entries for one address
//! would be a machine check, but a second one is only ever written after a miss.
//!
//! | change | flush |
//! |---|---|
//! | another page, or another cache attribute | yes |
//! | a right taken away: D, RI, XI | yes |
//! | WRITE taken away, even where D was clear: an earlier protection may be unflushed | yes |
//! | MODIFIED taken away, for the same reason | yes |
//! | a right added | no, but see below |
//! | ACCESSED and V set, or taken away: a stale "young" is tolerated | no |
//! | a leaf, **old or not**, or a link, to nothing or to another link | yes |
//! | nothing to anything | no, but see below |
//!
//! **An old leaf may be in a TLB**: ageing does not flush. So nothing is saved by V being clear. (Linux's `kvm_set_spte_handler`
//! skipped the flush for an old entry that was not young, and for one that lost WRITE and not MODIFIED.)
//!
//! **A TLB remembers what is not there.** A pair is loaded whole, so that a half with V clear is in the TLB when its buddy was
//! used. Who fills an entry, or adds a right, owes nobody a flush: others trap once more for nothing; but who took the
//! trap drops its own pair before it goes back, or traps for ever: [`tlb::filled`](crate::tlb::filled).

use spte_core::format::Transition;

/// What matters of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct View {
    /// Address and cache attribute, as they lie in the entry.
    pub(crate) place: u64,
    /// Read, execute, WRITE, MODIFIED, D, as bits of any meaning.
    pub(crate) rights: u64,
}

impl View {
    pub(crate) const fn become_leaf(self, new: Self) -> Transition {
        if self.place != new.place || self.rights & !new.rights != 0 { Transition::FLUSH } else { Transition::FREE }
    }
}
