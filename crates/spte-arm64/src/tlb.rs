// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a flush must name, and in which order: data, for an implementation of [`Flush`](spte_core::Flush) to carry out.
//!
//! Stage 2 alone is not all there is: a TLB may hold a guest's virtual address with its final output, made of both
//! stages, which an invalidation by guest physical address does not reach. So, by address or range (Linux:
//! `__kvm_tlb_flush_vmid_ipa`, `__kvm_tlb_flush_vmid_range`):
//!
//! 1. `DSB ISHST`: the store that took the entry away is seen by every table walk;
//! 2. `TLBI IPAS2E1IS` or `RIPAS2E1IS`: what was cached of stage 2;
//! 3. `DSB ISH`: and is gone, or a walk of stage 1 could combine it once more;
//! 4. `TLBI VMALLE1IS`: what was combined, all of this VMID;
//! 5. `DSB ISH`, `ISB`: and that is gone.
//!
//! For a whole VMID steps 2 to 4 are one `TLBI VMALLS12E1IS` (`__kvm_tlb_flush_vmid`). All act on the VMID that is in
//! VTTBR_EL2: a hypervisor that is not the current regime's switches it first. When VMIDs run out, [`Tlbi::Everything`].
//!
//! **The level hint** (FEAT_TTL) is exact or absent: hardware may leave alone what is cached of other levels. A range of
//! which a link went has no hint, nor has one whose leaves are of several sizes; then every smallest page is named,
//! or the whole VMID. Where links alone went, one address for each is enough: what is cached of a link goes with any address
//! that is translated by it (Linux: `stage2_unmap_put_pte` flushes a table's entry by its first address).
//!
//! Before what was unmapped is used again without FWB, its caches are cleaned after this: see
//! [`maintenance`](crate::maintenance).

use spte_core::format::Level;
use spte_core::{FlushRange, FlushRequest, Leaves};

use crate::{bits::number_of, stage2::Stage2};

/// What the processors can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct TlbFeatures {
    /// FEAT_TTL: level hints.
    pub level_hints: bool,
    /// FEAT_TLBIRANGE: invalidation of ranges.
    pub ranges: bool,
}

/// One step of a flush.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// A data synchronization barrier.
    Barrier(Barrier),
    /// An instruction synchronization barrier.
    Isb,
    /// An invalidation.
    Invalidate(Tlbi),
}

/// Which accesses a DSB waits for, and whom for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Barrier {
    /// `DSB ISHST`: stores, for all processors.
    InnerStores,
    /// `DSB ISH`: all, for all processors.
    Inner,
    /// `DSB NSHST`: stores, for this processor.
    LocalStores,
    /// `DSB NSH`: all, for this processor.
    Local,
}

/// One invalidation, with its operand as the instruction takes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Tlbi {
    /// `IPAS2E1IS`: stage 2 of one guest physical address, on all processors.
    Ipa(u64),
    /// `RIPAS2E1IS`: stage 2 of a range.
    Range(u64),
    /// `VMALLE1IS`: stage 1 and what was combined with it, of the VMID.
    Stage1,
    /// `VMALLS12E1IS`: both stages of the VMID.
    Vmid,
    /// `ALLE1IS`: all VMIDs.
    Everything,
    /// `IPAS2E1`: stage 2 of one guest physical address, on this processor.
    LocalIpa(u64),
    /// `VMALLE1`: stage 1 of the VMID, on this processor.
    LocalStage1,
}

/// What all VMIDs need before the first is used again.
pub const VMID_ROLLOVER: [Step; 4] =
    [Step::Barrier(Barrier::InnerStores), Step::Invalidate(Tlbi::Everything), Step::Barrier(Barrier::Inner), Step::Isb];

/// After an install, before the processor that faulted goes back: the store is seen by every table walk, or the same fault
/// comes again. (What was invalid is in no TLB, so there is nothing to invalidate.) The last step of break-before-make too.
pub const INSTALLED: [Step; 1] = [Step::Barrier(Barrier::InnerStores)];

/// After rights were added in place to the leaf at `ipa`: on the processor that took the fault, before it goes back. Others
/// may fault once more for nothing (Linux: `__kvm_tlb_flush_vmid_ipa_nsh`).
pub fn relaxed(format: &Stage2, features: TlbFeatures, ipa: u64, level: Level) -> [Step; 6] {
    [
        Step::Barrier(Barrier::LocalStores),
        Step::Invalidate(Tlbi::LocalIpa(ipa_operand(format, features, ipa, Some(level)))),
        Step::Barrier(Barrier::Local),
        Step::Invalidate(Tlbi::LocalStage1),
        Step::Barrier(Barrier::Local),
        Step::Isb,
    ]
}

/// The most invalidations one range may take; with more the whole VMID goes.
const MOST: u64 = 512;

/// The most pages of one `RIPAS2E1IS`: NUM 31, SCALE 3.
const MOST_PAGES: u64 = 32 << 16;

/// The operand of IPAS2E1IS: the address in 4K pages in 39:0, TTL in 47:44.
fn ipa_operand(format: &Stage2, features: TlbFeatures, ipa: u64, leaf: Option<Level>) -> u64 {
    let page = (ipa >> 12) & ((1 << 40) - 1);
    match leaf {
        Some(level) if features.level_hints && format.has_leaves(level) => {
            let ttl = format.options().granule.ttl() << 2 | number_of(level) as u64 & 3;
            page | ttl << 44
        }
        _ => page,
    }
}

/// The operand of RIPAS2E1IS: TG in 47:46, SCALE in 45:44, NUM in 43:39, TTL in 38:37, the address in granules in 36:0, or
/// in 64K with LPA2 descriptors. It covers `(num + 1) << (5 * scale + 1)` granules.
fn range_operand(format: &Stage2, features: TlbFeatures, ipa: u64, leaf: Option<Level>, scale: u64, num: u64) -> u64 {
    let options = format.options();
    let unit = if options.lpa2 { 16 } else { options.granule.shift() };
    let ttl = match leaf {
        // 0 is no hint, and so is level 0.
        Some(level) if features.level_hints => number_of(level) as u64 & 3,
        _ => 0,
    };
    options.granule.ttl() << 46 | scale << 44 | num << 39 | ttl << 37 | (ipa >> unit) & ((1 << 37) - 1)
}

/// The leaves of a range, where a hint may say so.
fn hint(range: &FlushRange) -> Option<Level> {
    if range.links.is_some() { None } else { range.leaves.level() }
}

/// Bytes that one invalidation by address is sure to cover: of a range where links alone went, the span of a link.
fn stride(format: &Stage2, range: &FlushRange) -> u64 {
    let level = match (range.leaves, range.links) {
        (Leaves::None, Some(links)) => links,
        _ => hint(range).unwrap_or(Level::LEAF),
    };
    1 << format.shift(level)
}

fn takes_too_many(format: &Stage2, features: TlbFeatures, range: &FlushRange) -> bool {
    let one = if features.ranges { MOST_PAGES * format.options().granule.bytes() } else { stride(format, range) };
    range.range.len() / one > MOST
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Begin,
    Ranges,
    Stage1,
    Stage1Done,
    Whole,
    WholeDone,
    Isb,
    End,
}

/// The steps of one flush, in order.
#[derive(Debug, Clone)]
pub struct Steps<'a> {
    format: &'a Stage2,
    features: TlbFeatures,
    ranges: &'a [FlushRange],
    /// The first address of `ranges[0]` that is not invalidated yet.
    next: u64,
    whole: bool,
    at: At,
}

impl<'a> Steps<'a> {
    /// What `request` takes. Nothing, where it names nothing.
    pub fn new(format: &'a Stage2, features: TlbFeatures, request: &FlushRequest<'a>) -> Self {
        let ranges = request.ranges;

        let next = ranges.first().map_or(0, |range| range.range.start().as_u64());
        let at = if request.all || !ranges.is_empty() { At::Begin } else { At::End };
        Self { format, features, ranges, next, whole: request.all, at }
    }

    /// Whether a range begins here that takes more invalidations than it is worth.
    fn is_too_much(&self) -> bool {
        self.ranges.first().is_some_and(|range| {
            self.next == range.range.start().as_u64() && takes_too_many(self.format, self.features, range)
        })
    }

    /// The next invalidation by address or range.
    fn invalidation(&mut self) -> Option<Tlbi> {
        let range = *self.ranges.first()?;
        let (ipa, left) = (self.next, range.range.end().as_u64().saturating_sub(self.next));
        let (operation, bytes) = self.first_of(&range, ipa, left);
        if bytes >= left {
            self.ranges = &self.ranges[1..];
            self.next = self.ranges.first().map_or(0, |range| range.range.start().as_u64());
        } else {
            self.next = ipa + bytes;
        }
        Some(operation)
    }

    fn first_of(&self, range: &FlushRange, ipa: u64, left: u64) -> (Tlbi, u64) {
        let (format, features) = (self.format, self.features);
        let stride = stride(format, range);
        let granule = format.options().granule.shift();
        let pages = left >> granule;
        let aligned = !format.options().lpa2 || ipa & 0xffff == 0;
        if !features.ranges || left <= stride || pages < 2 || !aligned {
            return (Tlbi::Ipa(ipa_operand(format, features, ipa, hint(range))), stride);
        }
        // The largest scale of which there is one unit at least; what is left over is the next step's.
        let scale = match pages {
            0x1_0000.. => 3,
            0x800.. => 2,
            0x40.. => 1,
            _ => 0,
        };
        let unit = 5 * scale + 1;
        let num = (pages >> unit).min(32) - 1;
        (Tlbi::Range(range_operand(format, features, ipa, hint(range), scale, num)), (num + 1) << unit << granule)
    }
}

impl Iterator for Steps<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        let (step, at) = match self.at {
            At::Begin => (Step::Barrier(Barrier::InnerStores), if self.whole { At::Whole } else { At::Ranges }),
            // The whole VMID makes the ranges that are left needless.
            At::Ranges if self.is_too_much() => (Step::Invalidate(Tlbi::Vmid), At::WholeDone),
            At::Ranges => match self.invalidation() {
                Some(operation) => (Step::Invalidate(operation), At::Ranges),
                None => (Step::Barrier(Barrier::Inner), At::Stage1),
            },
            At::Stage1 => (Step::Invalidate(Tlbi::Stage1), At::Stage1Done),
            At::Whole => (Step::Invalidate(Tlbi::Vmid), At::WholeDone),
            At::Stage1Done | At::WholeDone => (Step::Barrier(Barrier::Inner), At::Isb),
            At::Isb => (Step::Isb, At::End),
            At::End => return None,
        };
        self.at = at;
        Some(step)
    }
}
