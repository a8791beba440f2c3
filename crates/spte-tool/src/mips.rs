// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! KVM's GPA table for 64-bit MIPS.
//!
//! Fields from G up have EntryLo's names (MIPS64 Privileged Resource Architecture); those below it are software's, by Linux's
//! names (`arch/mips/include/asm/pgtable-bits.h`). Where they stand depends on the kernel: here it is one of release 2
//! without huge pages, with RI and XI.

use spte_core::FlushRequest;
use spte_core::format::{Format, Level};
use spte_mips::bits::{ACCESSED, MODIFIED, PRESENT, WRITE, bit_range};
use spte_mips::{ByteOrder, Cache, GpaAttrs, GpaTable, HardwareKind, Step, Steps, TlbFeatures, WriteState};

use crate::format::{Explanation, Fields, Form, ToolFormat, nothing, rights, size_word};
use crate::script::Mem;

fn cache_words(cache: Cache) -> &'static str {
    match cache {
        Cache::WriteThrough => "write-through",
        Cache::WriteAllocate => "write-allocate",
        Cache::Uncached => "uncached",
        Cache::NonCoherent => "cached, non-coherent",
        Cache::CoherentExclusive => "cached, coherent, exclusive",
        Cache::CoherentOnWrite => "cached, coherent, exclusive on write",
        Cache::CoherentUpdate => "cached, coherent, updated on write",
        Cache::UncachedAccelerated => "uncached accelerated",
    }
}

fn leaf_words<O: ByteOrder>(format: &GpaTable<O>, level: Level, raw: u64) -> String {
    let spec = format.spec(level, raw);
    let layout = format.options().layout;
    let size = size_word(format.options().page.bytes());
    let reads = raw & layout.read_inhibit() == 0;
    let executes = raw & layout.execute_inhibit() == 0;
    let rights = rights(reads, raw & layout.dirty() != 0, executes);
    let used = if raw & layout.valid() != 0 { "accessed" } else { "old" };
    let written = if raw & MODIFIED != 0 { ", dirty" } else { "" };
    let state = match format.write_state(raw) {
        Some(WriteState::Writable) => "writable",
        Some(WriteState::Armed) => "writing withheld: the next store traps once",
        Some(WriteState::ReadOnly) => "read-only",
        None => "an impossible state of writing",
    };
    let (output, cache) = (spec.output.as_u64(), cache_words(spec.attrs.cache));
    format!("a page of {size} at {output:#x}, {rights}, {cache}, {used}{written}, {state}")
}

fn leaf_fields<O: ByteOrder>(fields: &mut Fields, format: &GpaTable<O>) {
    let layout = format.options().layout;
    let at = |bits: u64| bits.trailing_zeros();
    fields
        .bit(at(PRESENT), "PRESENT (software)", "a page", "no page")
        .bit(at(WRITE), "WRITE (software)", "the guest may write", "the host must be asked")
        .bit(at(ACCESSED), "ACCESSED (software)", "was used", "was not used")
        .bit(at(MODIFIED), "MODIFIED (software)", "was written", "was not written")
        .bit(at(layout.execute_inhibit()), "XI", "no instruction fetches", "instruction fetches are allowed")
        .bit(at(layout.read_inhibit()), "RI", "no reads", "reads are allowed")
        .bit(at(layout.global()), "G", "global, if its buddy is too", "of one guest")
        .bit(at(layout.valid()), "V", "valid", "any access is a TLB Invalid exception")
        .bit(at(layout.dirty()), "D", "stores are allowed", "a store is a TLB Modified exception")
        .range(layout.cache_shift() + 2, layout.cache_shift(), "C", |value| {
            cache_words(Cache::from_bits(value as u8)).into()
        });
    let options = format.options();
    let (low, high) = (u32::from(options.page.shift()), u32::from(options.physical_bits) - 1);
    fields.range(high, low, "PFN", |value| format!("{:#x}", value << low));
}

impl<O: ByteOrder> ToolFormat for GpaTable<O> {
    /// `wc` is uncached accelerated, `wt` write-through without write-allocate.
    fn attrs(&self, mem: Mem) -> Option<GpaAttrs> {
        let cache = match mem {
            Mem::WriteBack => Cache::NonCoherent,
            Mem::Uncacheable => Cache::Uncached,
            Mem::WriteCombining => Cache::UncachedAccelerated,
            Mem::WriteThrough => Cache::WriteThrough,
        };
        Some(GpaAttrs { cache })
    }

    /// A link is an address and nothing else: what does not depend on where the table lies is the segment. Of a leaf, what goes
    /// into EntryLo.
    fn mask(&self, level: Level, form: Form) -> Option<u64> {
        let layout = self.options().layout;
        let frame = layout.frame(self.options().page.shift(), self.options().physical_bits);
        match (form, level == Level::LEAF) {
            (Form::Table, false) => Some(bit_range(63, 59)),
            (Form::Leaf, true) => Some(
                layout.execute_inhibit()
                    | layout.read_inhibit()
                    | layout.global()
                    | layout.valid()
                    | layout.dirty()
                    | layout.cache()
                    | frame,
            ),
            _ => None,
        }
    }

    fn reading(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }

    fn explain(&self, level: Level, raw: u64) -> Explanation {
        let reading = self.reading(level, raw);
        let mut fields = Fields::of(raw);
        if level > Level::LEAF {
            if let Some(words) = nothing(self.kind(level, raw)) {
                fields.range(63, 0, "Address", |_| "of a table that holds nothing".into());
                return Explanation { reading, summary: words.into(), fields: fields.rest(0), software: None };
            }
            fields.range(63, 0, "Address", |value| match value >> 62 {
                2 => format!("xkphys, {}", cache_words(Cache::from_bits((value >> 59 & 7) as u8))),
                _ if matches!(reading, HardwareKind::Table(_)) => "ckseg0 or ckseg1".into(),
                _ => "no unmapped segment".into(),
            });
            let to = spte_mips::bits::unmapped(raw).unwrap_or(raw);
            let software = self.check(level, raw).err();
            return Explanation::new(reading, format!("a link to the table at {to:#x}"), fields.rest(0), software);
        }
        let layout = self.options().layout;
        if raw & (PRESENT | layout.valid()) == 0 {
            let words = nothing(self.kind(level, raw)).unwrap_or("not present: neither PRESENT nor V is set");
            fields.bit(0, "PRESENT (software)", "", "no page");
            fields.bit(layout.valid().trailing_zeros(), "V", "", "any access is a TLB Invalid exception");
            return Explanation { reading, summary: words.into(), fields: fields.rest(0), software: None };
        }
        leaf_fields(&mut fields, self);
        let software = self.check(level, raw).err();
        Explanation::new(reading, leaf_words(self, level, raw), fields.rest(u64::MAX), software)
    }

    /// The probes of [`Steps`] for a processor with GuestIDs, or a new GuestID.
    fn asks(&self, request: &FlushRequest<'_>, ask: &mut dyn FnMut(&'static str, u64)) {
        let features = TlbFeatures { guest_ids: true, ..TlbFeatures::default() };
        for step in Steps::new(self, features, request) {
            match step {
                Step::DropPair(_) => ask("tlbp", 1),
                Step::DropGuestIds => ask("guestid", 1),
                _ => {}
            }
        }
    }
}
