// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a refill writes into the TLB, and what a flush must name and in which order: data, for an implementation of
//! [`Flush`](spte_core::Flush) to carry out.
//!
//! **A TLB entry is a pair**: the even page and the odd one of twice the page size (VPN2). Whoever changes one entry of a
//! table drops both from the TLB, and whoever writes a TLB entry reads both from the table ([`GpaTable::pair`]; the buddy of
//! an entry is 8 bytes away, at the address XOR 8). G counts where both halves have it (MIPS64 PRA, "TLB
//! organization"; QEMU, `r4k_fill_tlb`); no entry of this crate has.
//!
//! An invalidation by address is a probe of the root TLB and, where it hits, a write of an EntryHi that no other index has,
//! with both halves zero (Linux: `kvm_vz_host_tlb_inv`, `UNIQUE_ENTRYHI`). Two entries that match one address would be a
//! machine check, so that the EntryHi depends on the index: [`unique_entry_hi`]. Every index may be a hit, 0 too.
//!
//! 1. the walker stops: it would write TLB registers meanwhile;
//! 2. with GuestIDs, the root's probes are for the guest's (GuestCtl1.RID);
//! 3. a probe a pair, and the write where it hits;
//! 4. the root's own GuestID again, and the walker;
//! 5. where the instruction cache has virtual tags, all of it goes: it would go on with what was fetched through the pair.
//!
//! All of that on every processor that ran the guest, before the flush returns. The store that took the entry away comes
//! before it, with a SYNC between. **A guest has more than one GuestID**: each vCPU has its own, and another on each processor
//! (Linux: `vzguestid[NR_CPUS]`). Steps 2 and 3 are made for every one that a vCPU of the guest has on the processor. (Linux
//! has no such case: it probes for the vCPU that trapped, and gives all of them new ones otherwise.)
//!
//! For all of a guest there is less to do: with GuestIDs each vCPU takes a new one, and
//! without, the root's ASID is marked on all processors first, and then vCPUs are asked to leave the guest (Linux:
//! `kvm_arch_flush_remote_tlbs`, `kvm_vz_prepare_flush_shadow`). Neither the probes nor the new number end a walk that is under
//! way, and a walk writes the TLB with the number that is there when it is done: so the walker is stopped wherever the number
//! changes (Linux: `switch_mm`. That GuestIDs are like ASIDs in this is inferred).
//!
//! **Tables that go need nothing else.** No source that was found has a walker that keeps what it read of a directory beyond one
//! walk, and there is no instruction that would take it from one: QEMU's reads all of them each time, and Linux frees tables
//! after no more than the TLB flush, in which the walker is stopped and started again ("we need to restart the HTW": commit
//! f1014d1b79d0). That this ends all walks that began before is inferred; on it rests that a table is free after the flush.
//! A refill handler runs with interrupts off, so that a processor that takes part in a flush is in none.

use spte_core::{FlushRange, FlushRequest, Leaves};

use crate::{
    bits::{CKSEG_BYTES, CKSEG0, PageSize, bit_range},
    gpa::{ByteOrder, GpaTable},
    memtype::Cache,
};

/// EntryLo0 or EntryLo1, of 64 bits.
///
/// Bit 0 G, 1 V, 2 D, 5:3 C, from 6 the physical address in units of 4K, 62 XI, 63 RI.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct EntryLo(u64);

impl EntryLo {
    /// XI.
    pub const EXECUTE_INHIBIT: u64 = 1 << 62;
    /// RI.
    pub const READ_INHIBIT: u64 = 1 << 63;

    /// The register with this value.
    pub const fn from_raw(raw: u64) -> Self {
        Self(raw)
    }
    /// The register's value.
    pub const fn raw(self) -> u64 {
        self.0
    }
    /// G.
    pub const fn is_global(self) -> bool {
        self.0 & 1 != 0
    }
    /// V.
    pub const fn is_valid(self) -> bool {
        self.0 & 2 != 0
    }
    /// D.
    pub const fn is_dirty(self) -> bool {
        self.0 & 4 != 0
    }
    /// C.
    pub const fn cache(self) -> Cache {
        Cache::from_bits((self.0 >> 3 & 7) as u8)
    }
    /// The physical address.
    pub const fn output(self) -> u64 {
        (self.0 & bit_range(53, 6)) << 6
    }
}

/// One TLB entry: EntryHi without an ASID, PageMask, and the two halves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Pair {
    /// VPN2 in its place; the ASID's bits are zero.
    pub entry_hi: u64,
    /// PageMask.
    pub page_mask: u64,
    /// EntryLo0, of the even page.
    pub even: EntryLo,
    /// EntryLo1, of the odd page.
    pub odd: EntryLo,
}

impl Pair {
    /// The half that translates `gpa`.
    pub const fn half(&self, gpa: u64) -> EntryLo {
        // PageMask has a bit for each address bit above 4K that is inside a page.
        let odd = (self.page_mask | 0x1fff).wrapping_add(1) >> 1;
        if gpa & odd == 0 { self.even } else { self.odd }
    }

    /// Whether the entry matches every address space: where both halves are global.
    pub const fn is_global(&self) -> bool {
        self.even.is_global() && self.odd.is_global()
    }
}

/// An EntryHi that no other index of the TLB has, in ckseg0, where nothing is looked up (Linux: `UNIQUE_ENTRYHI`, `tlb.h`), and
/// behind it in ckseg1, where nothing is either. `None` for an index that has no place there, which no TLB is large enough
/// for: from 32768 on with pages of 16K, from 8192 on with pages of 64K.
///
/// `ehinv`: the processor has TLBINV (Config4.IE), so that bit 10 says that the entry is none (Linux: `MIPS_ENTRYHI_EHINV`;
/// QEMU: `CP0EnHi_EHINV`, `r4k_fill_tlb`); on others it is reserved.
pub const fn unique_entry_hi(page: PageSize, index: u16, ehinv: bool) -> Option<u64> {
    let offset = (index as u64) << (page.shift() + 1);
    if offset >= 2 * CKSEG_BYTES {
        return None;
    }
    let unique = CKSEG0 + offset;
    Some(if ehinv { unique | 1 << 10 } else { unique })
}

impl<O: ByteOrder> GpaTable<O> {
    /// What a refill handler, or the walker, writes into the TLB of an entry (Linux: `pte_to_entrylo`,
    /// `build_update_entries`).
    pub const fn entry_lo(&self, raw: u64) -> EntryLo {
        let layout = self.options.layout;
        if self.options.rixi {
            // Down to XI; RI and XI then go round to the top.
            EntryLo((raw >> (layout.global_shift() - 2)).rotate_right(2))
        } else {
            EntryLo(raw >> layout.global_shift())
        }
    }

    /// The TLB entry for the pair of pages around `gpa`, from the entries of the even page and of the odd one.
    pub const fn pair(&self, gpa: u64, even: u64, odd: u64) -> Pair {
        Pair {
            entry_hi: self.vpn2(gpa),
            page_mask: self.options.page.page_mask(),
            even: self.entry_lo(even),
            odd: self.entry_lo(odd),
        }
    }

    /// EntryHi for `gpa`, with an ASID of 0: the first address of its pair.
    pub const fn vpn2(&self, gpa: u64) -> u64 {
        gpa & !(self.pair_bytes() - 1)
    }

    const fn pair_bytes(&self) -> u64 {
        2 * self.options.page.bytes()
    }
}

/// What the processors can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TlbFeatures {
    /// GuestCtl0.RAD is clear: root TLB entries are tagged with a GuestID. (Linux: `cpu_probe_guestctl0`. GuestCtl0.G1 says
    /// no more than that there is a GuestCtl1.)
    pub guest_ids: bool,
    /// There is a hardware walker.
    pub walker: bool,
    /// The instruction cache has virtual tags (Config.VI, or as Octeon; Linux: `cpu_has_vtag_icache`).
    pub virtual_icache: bool,
}

/// One step of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// SYNC: earlier stores are seen by every handler and walker.
    Sync,
    /// PWCtl.PWEn is cleared, and a hazard barrier follows. Nested: by a counter.
    StopWalker,
    /// GuestCtl1.RID, bits 23:16, becomes the guest's (Linux: `MIPS_GCTL1_RID`). Where there are more than one on this processor,
    /// what follows up to [`Step::SelectRoot`] is done for each.
    SelectGuest,
    /// EntryHi becomes this, with the ASID; TLBP; where Index is not negative, EntryHi becomes [`unique_entry_hi`] of it,
    /// both EntryLo zero, TLBWI.
    DropPair(u64),
    /// GuestCtl1.RID becomes the root's, which is 0.
    SelectRoot,
    /// PWCtl.PWEn is set again, unless somebody else has stopped the walker too.
    StartWalker,
    /// All of the instruction cache is invalidated.
    DropInstructions,
    /// No vCPU enters the guest again with the GuestID it has: the next one is new, and is set with the walker stopped.
    DropGuestIds,
    /// Every processor takes a new root ASID before it enters the guest again, with the walker stopped. Comes before vCPUs are
    /// asked to leave.
    MarkAsids,
    /// vCPUs that are in the guest leave it, and the flush waits until they have.
    Kick,
}

/// The most pairs that one flush drops one by one; with more all of the guest goes.
const MOST: u64 = 256;

/// After a trap was resolved, on the processor that took it, before the guest goes on: its TLB may have the half with V clear,
/// or the right that was missing (Linux: the end of `kvm_mips_handle_vz_root_tlb_fault`). Also where there was nothing to
/// resolve: while an entry of a directory is claimed its pages are not there for a moment, and a TLB may remember that.
pub fn filled<O: ByteOrder>(format: &GpaTable<O>, features: TlbFeatures, gpa: u64) -> Steps<'static> {
    let at = At::Sync;
    let (next, most) = (format.vpn2(gpa), 0);
    Steps { pair_bytes: format.pair_bytes(), features, ranges: &[], next, left: 1, most, whole: false, at }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Sync,
    Stop,
    Select,
    Pairs,
    Start,
    Instructions,
    Whole,
    Kick,
    End,
}

/// The steps of one flush, in order.
#[derive(Debug, Clone)]
pub struct Steps<'a> {
    pair_bytes: u64,
    features: TlbFeatures,
    /// Those that are not begun.
    ranges: &'a [FlushRange],
    /// First address of the next pair.
    next: u64,
    /// Pairs left of the range that is begun.
    left: u64,
    /// Pairs that ranges which are not begun may have, all together.
    most: u64,
    whole: bool,
    at: At,
}

impl<'a> Steps<'a> {
    /// What `request` takes. Nothing, where it names nothing.
    pub fn new<O: ByteOrder>(format: &GpaTable<O>, features: TlbFeatures, request: &FlushRequest<'a>) -> Self {
        let pair_bytes = format.pair_bytes();
        let named = request.all || !request.ranges.is_empty();
        let at = if named { At::Sync } else { At::End };
        Self { pair_bytes, features, ranges: request.ranges, next: 0, left: 0, most: MOST, whole: request.all, at }
    }

    /// Begins the next range, where nothing is left of the last; where it has too many pairs, all goes.
    fn begin(&mut self) {
        if let (0, Some((range, rest))) = (self.left, self.ranges.split_first()) {
            if range.leaves == Leaves::None {
                // Of links no TLB has anything; that walks which began before are over is what stopping the walker is for.
                self.ranges = rest;
                return self.begin();
            }
            let (start, end) = (range.range.start().as_u64(), range.range.end().as_u64());
            self.next = start & !(self.pair_bytes - 1);
            // Whole pairs, at both ends.
            self.left = (end - self.next).div_ceil(self.pair_bytes);
            self.ranges = rest;
            match self.most.checked_sub(self.left) {
                Some(most) => self.most = most,
                None => (self.left, self.ranges, self.whole) = (0, &[], true),
            }
        }
    }
}

impl Iterator for Steps<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let TlbFeatures { guest_ids, walker, virtual_icache } = self.features;
        let whole = if guest_ids { Step::DropGuestIds } else { Step::MarkAsids };
        let (step, at) = match self.at {
            At::Sync if self.whole => (Step::Sync, At::Whole),
            At::Sync => (Step::Sync, if walker { At::Stop } else { At::Select }),
            At::Stop => (Step::StopWalker, At::Select),
            At::Select if guest_ids => (Step::SelectGuest, At::Pairs),
            At::Select | At::Pairs => {
                self.begin();
                match (self.left, guest_ids, walker) {
                    (1.., ..) => {
                        let step = Step::DropPair(self.next);
                        self.next = self.next.wrapping_add(self.pair_bytes);
                        self.left -= 1;
                        (step, At::Pairs)
                    }
                    (0, true, _) => (Step::SelectRoot, if walker { At::Start } else { self.after() }),
                    (0, false, true) => (Step::StartWalker, self.after()),
                    (0, false, false) if self.whole => (whole, At::Kick),
                    (0, false, false) if virtual_icache => (Step::DropInstructions, At::End),
                    (0, false, false) => {
                        self.at = At::End;
                        return None;
                    }
                }
            }
            At::Start => (Step::StartWalker, self.after()),
            At::Instructions => (Step::DropInstructions, At::End),
            At::Whole => (whole, At::Kick),
            At::Kick => (Step::Kick, At::End),
            At::End => return None,
        };
        self.at = at;
        Some(step)
    }
}

impl Steps<'_> {
    /// What comes when registers are as they were. New GuestIDs and ASIDs are new for the instruction cache too.
    fn after(&self) -> At {
        match (self.whole, self.features.virtual_icache) {
            (true, _) => At::Whole,
            (false, true) => At::Instructions,
            (false, false) => At::End,
        }
    }
}
