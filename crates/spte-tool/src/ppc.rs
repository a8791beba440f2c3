// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Partition-scoped radix trees of Power.
//!
//! Fields have the names of the Power ISA (Book III, "Radix Tree Translation"); bits are counted from the least significant one, as
//! everywhere in this command, and not as IBM does. Software bits are those of `spte-ppc`; Linux's KVM leaves in them what
//! the host's own entry has there (devmap, special, soft dirty), and nothing in an entry says who wrote it.

use spte_core::FlushRequest;
use spte_core::format::{Format, Level};
use spte_ppc::bits::{
    ATT, CHANGED, EXECUTE, LEAF, LEAF_RESERVED_HIGH, LEAF_RESERVED_LOW, LINK_RESERVED, NLB, NLS, READ, REFERENCED, RPN,
    VALID, WRITE,
};
use spte_ppc::software::UPGRADABLE;
use spte_ppc::{HardwareKind, Radix, RadixAttrs, Ric, Step, Steps, Storage, TlbFixes, WriteState};

use crate::format::{Explanation, Fields, Form, ToolFormat, nothing, rights, size_word};
use crate::script::Mem;

fn storage_words(att: u64) -> &'static str {
    match Storage::from_bits(att as u8) {
        Storage::Normal => "normal memory",
        Storage::StrongOrder => "normal memory, strong access order",
        Storage::NonIdempotent => "non-idempotent I/O",
        Storage::Tolerant => "tolerant I/O",
    }
}

fn write_state(state: Option<WriteState>) -> &'static str {
    match state {
        Some(WriteState::Writable) => "writable",
        Some(WriteState::Armed) => "writing withheld: one compare-exchange brings it back",
        Some(WriteState::ReadOnly) => "read-only",
        None => "an impossible state of writing",
    }
}

/// Whether the entry has the bit by which this workspace knows its own leaves.
fn is_marked(raw: u64) -> bool {
    raw & UPGRADABLE != 0
}

fn invalid(format: &Radix, level: Level, raw: u64) -> String {
    let facts = if raw & (REFERENCED | CHANGED) != 0 { "; R or C came late" } else { "" };
    match nothing(format.kind(level, raw)) {
        Some(words) => format!("{words}{facts}"),
        None => "not present: hardware looks at nothing but V".into(),
    }
}

fn leaf_words(format: &Radix, level: Level, raw: u64) -> String {
    let size = size_word(format.geometry().span(level));
    let rights = rights(raw & (READ | WRITE) != 0, raw & WRITE != 0, raw & EXECUTE != 0);
    let storage = storage_words((raw & ATT) >> 4);
    let used = if raw & REFERENCED != 0 { "referenced" } else { "old" };
    let written = if raw & CHANGED != 0 { "changed" } else { "clean" };
    let state = if is_marked(raw) { format!(", {}", write_state(format.write_state(raw))) } else { String::new() };
    let output = format.spec(level, raw).output.as_u64();
    format!("a leaf of {size} at {output:#x}, {rights}, {storage}, {used}, {written}{state}")
}

fn access_words(value: u64) -> String {
    let access = match value & 6 {
        0 => "no loads, no stores",
        4 => "loads are allowed",
        _ => "loads and stores are allowed",
    };
    let fetch = if value & 1 == 1 { "instruction fetches too" } else { "no instruction fetches" };
    let privileged = if value & 8 == 8 { "; privileged, which says nothing here" } else { "" };
    format!("{access}, {fetch}{privileged}")
}

fn leaf_fields(fields: &mut Fields, format: &Radix, level: Level) {
    let low = u32::from(format.geometry().level(level).shift);
    fields
        .range(3, 0, "EAA", access_words)
        .range(5, 4, "ATT", |value| storage_words(value).into())
        .bit(7, "C", "was written", "was not written")
        .bit(8, "R", "was used", "was not used")
        .set(9, "SW: none", "here: nobody's (Linux: soft dirty)")
        .set(10, "SW: the user's", "here: what the user of the table makes of it (Linux: special)")
        .set(11, "SW: upgradable", "here: writing may be granted by one compare-exchange (Linux: devmap)")
        .range(56, low, "RPN", |value| format!("{:#x}", value << low))
        .set(61, "SW: none", "here: nobody's");
}

impl ToolFormat for Radix {
    /// `uc` is non-idempotent I/O, which Linux maps devices as; `wc` tolerant I/O; there is no write-through.
    fn attrs(&self, mem: Mem) -> Option<RadixAttrs> {
        let storage = match mem {
            Mem::WriteBack => Storage::Normal,
            Mem::Uncacheable => Storage::NonIdempotent,
            Mem::WriteCombining => Storage::Tolerant,
            Mem::WriteThrough => return None,
        };
        Some(RadixAttrs::default().storage(storage))
    }

    /// Links hold V, L, an address and NLS. Of leaves, the four bits for software are left out, and the privileged bit, which
    /// says nothing in a partition-scoped tree.
    fn mask(&self, level: Level, form: Form) -> Option<u64> {
        let shape = self.geometry().level(level);
        match form {
            Form::Table => (level > Level::LEAF).then_some(VALID | LEAF | NLS),
            Form::Leaf => shape.leaf.then_some(
                VALID | LEAF | (RPN & !((1 << shape.shift) - 1)) | REFERENCED | CHANGED | ATT | READ | WRITE | EXECUTE,
            ),
        }
    }

    fn reading(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }

    fn explain(&self, level: Level, raw: u64) -> Explanation {
        let reading = self.reading(level, raw);
        let mut fields = Fields::of(raw);
        fields.bit(63, "V", "valid", "not valid: hardware looks no further");
        if raw & VALID == 0 {
            let summary = invalid(self, level, raw);
            return Explanation { reading, summary, fields: fields.rest(0), software: None };
        }
        fields.bit(62, "L", "a leaf", "a directory entry");
        if raw & LEAF == 0 {
            fields.range(4, 0, "NLS", |value| format!("the next table has 2^{value} entries")).range(
                59,
                8,
                "NLB",
                |value| format!("{:#x}", value << 8),
            );
            let words = format!("a link to the table at {:#x}, of 2^{} entries", raw & NLB, raw & NLS);
            return Explanation::new(reading, words, fields.rest(LINK_RESERVED), None);
        }
        leaf_fields(&mut fields, self, level);
        let software = if is_marked(raw) { self.check(level, raw).err() } else { None };
        let reserved = LEAF_RESERVED_HIGH | LEAF_RESERVED_LOW;
        Explanation::new(reading, leaf_words(self, level, raw), fields.rest(reserved), software)
    }

    /// The invalidations of [`Steps`] for a processor without POWER9's fixes; barriers are none.
    fn asks(&self, request: &FlushRequest<'_>, ask: &mut dyn FnMut(&'static str, u64)) {
        for step in Steps::new(self, TlbFixes::default(), 1, request) {
            let Step::Tlbie(operation) = step else { continue };
            let name = match operation.ric {
                Ric::Tlb if operation.is_by_address() => "tlbie",
                Ric::Tlb => "tlbie-lpid",
                Ric::PageWalk => "tlbie-pwc",
                Ric::All => "tlbie-all",
            };
            ask(name, 1);
        }
    }
}
