// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a flush must name: data, for an implementation of [`Flush`](spte_core::Flush) to carry out.
//!
//! The two formats of secondary MMUs have no invalidation by guest physical address, so that a flush of a page is a flush of all of
//! the guest, on every processor that ran it:
//!
//! | format | how | look at |
//! |---|---|---|
//! | EPT | INVEPT of the EPTP, which takes what was combined with the guest's own translations too, of every VPID and PCID, and all that was cached of links; or of everything | [`Invept`] |
//! | NPT | the guest's ASID is flushed by its next VMRUN, or it gets another ASID | [`TlbControl`] |
//! | long mode | INVLPG for each leaf; for many, everything that is not global; where leaves are global, everything | [`Steps`] |
//!
//! A processor that is not in the guest may do it when it enters the guest next; one that is in the guest is made to leave it
//! first, and the flush waits until it has (Linux: `KVM_REQ_TLB_FLUSH`, `kvm_flush_remote_tlbs`). The instructions order
//! themselves: the store that took an entry away comes before them in the program, and is seen by walks that come after.
//!
//! Sources: Intel SDM volume 3, "Operations that Invalidate Cached Mappings" and "Invalidation of TLBs and Paging-Structure
//! Caches" (INVLPG drops what is cached of links for the current PCID, whatever the address; a write of CR3 leaves global
//! entries); AMD APM volume 2, "TLB Flush" (TLB_CONTROL); Linux: `vmx_flush_tlb_current`, `svm_flush_tlb_asid`,
//! `tlb_single_page_flush_ceiling`.

use notifier_core::GpaRange;
use spte_core::{
    FlushRange, FlushRequest, Leaves,
    format::{Format, Geometry, Level},
};

use crate::{
    long_mode::{LongModeFormat, Usage},
    registers::{EptCapabilities, EptPointer},
};

/// An INVEPT, with its operands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Invept {
    /// Type 1: all that is derived from this EPTP.
    SingleContext(EptPointer),
    /// Type 2: all that is derived from any EPTP.
    AllContexts,
}

impl Invept {
    /// The narrowest one that the processor has; `None` where it has none, and then it has no EPT that could be changed.
    /// (Bits 11:0 of the EPTP do not matter to it: one with accessed and dirty bits off stands for the same table.)
    pub const fn new(eptp: EptPointer, capabilities: EptCapabilities) -> Option<Self> {
        if !capabilities.contains(EptCapabilities::INVEPT) {
            None
        } else if capabilities.contains(EptCapabilities::INVEPT_SINGLE_CONTEXT) {
            Some(Self::SingleContext(eptp))
        } else if capabilities.contains(EptCapabilities::INVEPT_ALL_CONTEXTS) {
            Some(Self::AllContexts)
        } else {
            None
        }
    }

    /// The register operand: the type.
    pub const fn kind(self) -> u64 {
        match self {
            Self::SingleContext(_) => 1,
            Self::AllContexts => 2,
        }
    }

    /// The descriptor in memory, low half first: the EPTP, and reserved zeros.
    pub const fn descriptor(self) -> [u64; 2] {
        match self {
            Self::SingleContext(eptp) => [eptp.raw(), 0],
            Self::AllContexts => [0, 0],
        }
    }
}

/// TLB_CONTROL of the VMCB: what the next VMRUN does before it enters the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u8)]
pub enum TlbControl {
    /// Nothing.
    #[default]
    Keep = 0,
    /// All entries of all ASIDs. On every processor, the host's included.
    All = 1,
    /// All entries of the guest's ASID. With FlushByAsid (CPUID 8000_000A, EDX bit 6).
    Asid = 3,
    /// Entries of the guest's ASID that are not global to the guest. With FlushByAsid. Not for a flush of the nested table.
    AsidNonGlobal = 7,
}

impl TlbControl {
    /// For a flush of a guest's nested table. Without FlushByAsid another ASID does as well, and leaves other guests alone
    /// (Linux does that).
    pub const fn flush(flush_by_asid: bool) -> Self {
        if flush_by_asid { Self::Asid } else { Self::All }
    }

    /// The byte in the VMCB, at 5Ch.
    pub const fn raw(self) -> u8 {
        self as u8
    }
}

/// One step of a flush of a long-mode table, on each processor that has it in CR3.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Step {
    /// INVLPG of this linear address, which is canonical: the page, global or not, and what is cached of links.
    Invlpg(u64),
    /// CR3 is written with what it has (bit 63 clear, where there are PCIDs): everything of this PCID but global pages.
    WriteCr3,
    /// CR4.PGE is cleared and set, or INVPCID of type 2: everything, global pages too.
    Everything,
}

/// The most INVLPGs of one flush; for more all goes (Linux: `tlb_single_page_flush_ceiling`).
const MOST: u64 = 33;

/// The steps of a flush of a long-mode table, in order.
#[derive(Debug, Clone)]
pub struct Steps<'a> {
    geometry: Geometry,
    ranges: &'a [FlushRange],
    /// The next address of the first range.
    next: u64,
    whole: Option<Step>,
}

/// Bytes that one INVLPG is sure to cover: TLBs know the size of what they hold, so that one address of a larger page is
/// enough where there were such pages alone. What is cached of links goes with any address at all.
fn stride(geometry: &Geometry, range: &FlushRange) -> u64 {
    match range.leaves {
        Leaves::None => range.range.len(),
        leaves => geometry.span(leaves.level().unwrap_or(Level::LEAF)),
    }
}

/// How many addresses all of `ranges` are. A flush has few ranges.
fn leaves(geometry: &Geometry, ranges: &[FlushRange]) -> u64 {
    ranges.split_first().map_or(0, |(first, rest)| {
        let here = first.range.len().div_ceil(stride(geometry, first));
        here.saturating_add(leaves(geometry, rest))
    })
}

fn first(ranges: &[FlushRange]) -> u64 {
    ranges.first().map_or(0, |range| range.range.start().as_u64())
}

impl<'a> Steps<'a> {
    /// What `request` needs. `globals`: leaves of this table may be global.
    pub fn new<U: Usage>(format: &LongModeFormat<U>, globals: bool, request: &FlushRequest<'a>) -> Self {
        let geometry = *format.geometry();
        let many = leaves(&geometry, request.ranges) > MOST;
        let all = if globals { Step::Everything } else { Step::WriteCr3 };
        if request.all || many {
            Self { geometry, ranges: &[], next: 0, whole: Some(all) }
        } else {
            Self { geometry, ranges: request.ranges, next: first(request.ranges), whole: None }
        }
    }

    /// With the bits above the ones that are translated as the highest of these is.
    fn canonical(&self, address: u64) -> u64 {
        let unused = 64 - self.geometry.address_bits();
        (((address << unused) as i64) >> unused) as u64
    }

    fn pass(&mut self, range: GpaRange, stride: u64) {
        // The highest of all addresses has nothing behind it.
        self.next = (self.next & !(stride - 1)).saturating_add(stride);
        if self.next >= range.end().as_u64() {
            self.ranges = self.ranges.get(1..).unwrap_or(&[]);
            self.next = first(self.ranges);
        }
    }
}

impl Iterator for Steps<'_> {
    type Item = Step;

    fn next(&mut self) -> Option<Step> {
        if let Some(step) = self.whole.take() {
            return Some(step);
        }
        let flush = *self.ranges.first()?;
        let step = Step::Invlpg(self.canonical(self.next));
        self.pass(flush.range, stride(&self.geometry, &flush));
        Some(step)
    }
}
