// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a flush must name, and in which order: data, for an implementation of [`Flush`](spte_core::Flush) to carry out.
//!
//! A flush is `ptesync` (the stores that took entries away are seen before any invalidation); the `tlbie`s; `eieio; tlbsync;
//! ptesync` (every processor has dropped what they name, and what it still stored of R and C is done). Linux: `_tlbie_lpid_va`,
//! `_tlbie_lpid` in `arch/powerpc/mm/book3s64/radix_tlb.c`.
//!
//! | operand | values |
//! |---|---|
//! | RB, one address | address in IBM bits 0:51, IS 0, AP in IBM bits 56:58: 4K 0, 64K 5, 2M 1, 1G 2 |
//! | RB, all of a partition | IS 2 in IBM bits 52:53 |
//! | RS | the LPID |
//! | RIC | 0 the TLB, 1 the page-walk cache, 2 all, caches of the partition table included |
//! | PRS | 0: partition-scoped |
//! | R | 1: radix |
//!
//! (AP as firmware says it, `ibm,processor-radix-AP-encodings`: skiboot's `add_core_common` and QEMU's `helper_tlbie_isa300` have these
//! four. In the instruction RIC is IBM bits 12:13, PRS 14, R 15: skiboot, `cleanup_global_tlb`, whose RIC 2, PRS 1, R 1 is 0x7c0b1a64. RIC
//! 1 and 2 with IS 0 are invalid forms.)
//!
//! - **AP is the size of the leaf that went**, or the TLB keeps it. Where a range had leaves of several sizes, or nobody
//!   knows, the whole partition goes.
//! - **RIC 0 leaves the page-walk cache alone.** Where a directory entry went, an invalidation with RIC 1 for the whole partition
//!   (there is none by address) comes before its table is used again, and before the addresses of its range, so that no walk
//!   through the old table can fill the TLB again behind them.
//! - **PRS 0 is all that Linux asks for** after a change of a partition-scoped entry (`kvmppc_radix_tlbie_page`): so what combines
//!   both scopes has to go with it. (Inferred from that. The ISA's own description, as of 3.1B, knows entries of one scope or of the
//!   other alone: an entry goes whose `entry_process_scoped` is PRS, with the LPID, the address and the actual page size. It says
//!   nothing of combinations, which are then an implementation's affair.)
//! - POWER9 has two faults that need more (`fixup_tlbie_lpid_va`, `CPU_FTR_P9_TLBIE_ERAT_BUG`, `CPU_FTR_P9_TLBIE_STQ_BUG`):
//!   [`TlbFixes`].
//!
//! A hypervisor that is a guest itself has no partition-scoped `tlbie`; it asks by `H_TLB_INVALIDATE`, with the same RB and RS, or by its
//! successor `H_RPT_INVALIDATE`, which takes a range and page sizes.

use spte_core::format::{Format, Level};
use spte_core::{FlushRange, FlushRequest, Leaves};

use crate::radix::Radix;

/// What the processors need beyond the architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TlbFixes {
    /// An invalidation may leave the ERAT as it is, where `mtlpidr` runs beside it: another one, for LPID 0, makes up for it; of
    /// the same address, or of all of LPID 0 after more than one. (Linux, 047e6575aec7 "Fixup tlbie vs mtpidr/mtlpidr ordering
    /// issue on POWER9": `fixup_tlbie_lpid_va` and `fixup_tlbie_va_range`.)
    pub erat: bool,
    /// An invalidation may pass stores in a store queue: the last one is made twice. (Linux, a5d4b5891c2f; mended in Nimbus
    /// DD2.3 and Cumulus DD1.3.)
    pub store_queue: bool,
}

/// One step of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// `ptesync`.
    Ptesync,
    /// `eieio`.
    Eieio,
    /// `tlbsync`.
    Tlbsync,
    /// `tlbie`.
    Tlbie(Tlbie),
}

/// One `tlbie`, with its operands as the instruction takes them. PRS is 0 and R is 1 in each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tlbie {
    /// Address or scope.
    pub rb: u64,
    /// The LPID.
    pub rs: u64,
    /// Which caches.
    pub ric: Ric,
}

/// RIC: which caches an invalidation is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Ric {
    /// The TLB.
    Tlb = 0,
    /// The page-walk cache.
    PageWalk = 1,
    /// Both, and caches of table entries.
    All = 2,
}

/// After an install, before the processor that faulted goes back: the store is seen by the table walk, or the same fault comes
/// again. What was invalid is in no TLB, so there is nothing to invalidate.
pub const INSTALLED: [Step; 1] = [Step::Ptesync];

/// IS 2: all of the partition.
const PARTITION: u64 = 2 << 10;
const AP_SHIFT: u32 = 5;

/// The most addresses that one range may take; with more the whole partition goes.
const MOST: u64 = 512;

impl Tlbie {
    /// Whether it names one address, and not all of a partition.
    pub const fn is_by_address(self) -> bool {
        self.rb & 3 << 10 == 0
    }

    /// All of a partition.
    pub const fn partition(lpid: u32, ric: Ric) -> Self {
        Self { rb: PARTITION, rs: lpid as u64, ric }
    }
}

impl Radix {
    /// AP of a leaf of this level; `None` where there are no leaves.
    pub fn page_size_code(&self, level: Level) -> Option<u64> {
        if level > self.geometry().top() || !self.geometry().level(level).leaf {
            return None;
        }
        match self.geometry().level(level).shift {
            12 => Some(0),
            16 => Some(5),
            21 => Some(1),
            30 => Some(2),
            _ => None,
        }
    }

    /// The invalidation of the leaf of `level` that translates `gpa`; `None` where the level has no leaves.
    pub fn tlbie_leaf(&self, lpid: u32, gpa: u64, level: Level) -> Option<Tlbie> {
        let code = self.page_size_code(level)?;
        let start = gpa & !(self.geometry().span(level) - 1);
        Some(Tlbie { rb: start | code << AP_SHIFT, rs: u64::from(lpid), ric: Ric::Tlb })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Begin,
    Ranges,
    Fixes,
    Erat,
    QueueSync,
    Queue,
    Eieio,
    Tlbsync,
    Ptesync,
    End,
}

/// The steps of one flush, in order.
#[derive(Debug, Clone)]
pub struct Steps<'a> {
    format: &'a Radix,
    fixes: TlbFixes,
    lpid: u32,
    ranges: &'a [FlushRange],
    /// The first address of `ranges[0]` that is not invalidated yet.
    next: u64,
    /// All of the partition, whatever the ranges are.
    whole: bool,
    /// The page-walk cache was invalidated.
    walked: bool,
    /// The last invalidation of translations, for the fixes.
    last: Option<Tlbie>,
    /// There was another one before it.
    several: bool,
    at: At,
}

impl<'a> Steps<'a> {
    /// What `request` takes for the partition `lpid`. Nothing, where it names nothing.
    pub fn new(format: &'a Radix, fixes: TlbFixes, lpid: u32, request: &FlushRequest<'a>) -> Self {
        let ranges = request.ranges;
        let at = if request.all || !ranges.is_empty() { At::Begin } else { At::End };
        Self {
            format,
            fixes,
            lpid,
            ranges,
            next: first(ranges),
            whole: request.all,
            walked: false,
            last: None,
            several: false,
            at,
        }
    }

    /// The next invalidation.
    fn invalidation(&mut self) -> Option<Tlbie> {
        if self.whole {
            return self.all();
        }
        let range = *self.ranges.first()?;
        // What was there had several sizes, or none that anybody knows; or there is too much of it.
        let level = match (range.leaves, range.links) {
            (Leaves::Of(level), _) => level,
            (Leaves::None, Some(_)) => return self.links_alone(),
            _ => return self.all(),
        };
        let span = self.format.geometry().span(level);
        if self.next == range.range.start().as_u64() {
            if range.range.len() / span > MOST {
                return self.all();
            }
            if range.links.is_some() && !self.walked {
                self.walked = true;
                return Some(Tlbie::partition(self.lpid, Ric::PageWalk));
            }
        }
        let Some(tlbie) = self.format.tlbie_leaf(self.lpid, self.next, level) else { return self.all() };
        self.next = (self.next & !(span - 1)) + span;
        if self.next >= range.range.end().as_u64() {
            self.ranges = &self.ranges[1..];
            self.next = first(self.ranges);
        }
        self.several |= self.last.is_some();
        self.last = Some(tlbie);
        Some(tlbie)
    }

    /// A range where links alone went: the page-walk cache, once in a flush.
    fn links_alone(&mut self) -> Option<Tlbie> {
        self.ranges = &self.ranges[1..];
        self.next = first(self.ranges);
        if self.walked {
            return self.invalidation();
        }
        self.walked = true;
        Some(Tlbie::partition(self.lpid, Ric::PageWalk))
    }

    /// All of the partition, which leaves nothing to be done of the ranges.
    fn all(&mut self) -> Option<Tlbie> {
        self.whole = false;
        self.ranges = &[];
        self.last = Some(Tlbie::partition(self.lpid, Ric::All));
        self.last
    }

    /// The last invalidation again, of translations, for `lpid`.
    fn again(&self, lpid: u32) -> Step {
        let last = self.last.unwrap_or(Tlbie::partition(lpid, Ric::Tlb));
        Step::Tlbie(Tlbie { rs: u64::from(lpid), ric: Ric::Tlb, ..last })
    }
}

fn first(ranges: &[FlushRange]) -> u64 {
    ranges.first().map_or(0, |range| range.range.start().as_u64())
}

impl Iterator for Steps<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if self.at == At::Ranges {
            if let Some(tlbie) = self.invalidation() {
                return Some(Step::Tlbie(tlbie));
            }
            self.at = if self.last.is_some() { At::Fixes } else { At::Eieio };
        }
        if self.at == At::Fixes && !self.fixes.erat {
            self.at = At::QueueSync;
        }
        if self.at == At::QueueSync && !self.fixes.store_queue {
            self.at = At::Eieio;
        }
        let (step, at) = match self.at {
            At::Begin => (Step::Ptesync, At::Ranges),
            At::Fixes => (Step::Ptesync, At::Erat),
            At::Erat if self.several => (Step::Tlbie(Tlbie::partition(0, Ric::Tlb)), At::QueueSync),
            At::Erat => (self.again(0), At::QueueSync),
            At::QueueSync => (Step::Ptesync, At::Queue),
            At::Queue => (self.again(self.lpid), At::Eieio),
            At::Eieio => (Step::Eieio, At::Tlbsync),
            At::Tlbsync => (Step::Tlbsync, At::Ptesync),
            At::Ptesync => (Step::Ptesync, At::End),
            At::Ranges | At::End => return None,
        };
        self.at = at;
        Some(step)
    }
}
