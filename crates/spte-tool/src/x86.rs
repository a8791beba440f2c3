// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! EPT, NPT and long mode.
//!
//! Fields have the names of the Intel SDM, volume 3 ("The Extended Page Table Mechanism") and of the AMD APM, volume 2
//! ("Long-Mode Page Translation"). Software bits are those of `spte-x86`, which are Linux's where Linux has one.

use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{Format, Level};
use spte_x86::bits::{ADDRESS, PAGE_SIZE, ept, long_mode};
use spte_x86::software::{self, AccessedDirty, CLAIM, MMU_PRESENT};
use spte_x86::{
    Ept, EptAttrs, EptMemoryType, EptOptions, HardwareKind, LongModeAttrs, LongModeFormat, MemoryType, Pat,
    PatSelector, Step, Steps, Usage, WriteState,
};

use crate::format::{Explanation, Fields, Form, ToolFormat, nothing, rights, size_word, summary};
use crate::script::Mem;

/// How an entry is laid out, whether or not it is possible.
fn form(level: Level, raw: u64) -> Form {
    if level == Level::LEAF || raw & PAGE_SIZE != 0 { Form::Leaf } else { Form::Table }
}

/// Whether the level has entries of this form.
fn has(format: &impl Format, level: Level, form: Form) -> bool {
    match form {
        Form::Table => level > Level::LEAF,
        Form::Leaf => format.geometry().level(level).leaf,
    }
}

/// Where the address of a leaf begins: what is below is reserved.
fn address_low(format: &impl Format, level: Level) -> u32 {
    u32::from(format.geometry().level(level).shift)
}

fn write_state(state: Option<WriteState>) -> &'static str {
    match state {
        Some(WriteState::Writable) => "writable",
        Some(WriteState::Armed) => "writing withheld: one compare-exchange brings it back",
        Some(WriteState::WriteTracked) => "writing withheld for good: the page holds the guest's page tables",
        Some(WriteState::ReadOnly) => "read-only",
        None => "an impossible state of writing",
    }
}

fn cache_type(number: u64) -> String {
    let known = u8::try_from(number).ok().and_then(MemoryType::from_number);
    match known {
        Some(MemoryType::Uncacheable) => "UC, uncacheable".into(),
        Some(MemoryType::WriteCombining) => "WC, write combining".into(),
        Some(MemoryType::WriteThrough) => "WT, write through".into(),
        Some(MemoryType::WriteProtected) => "WP, write protected".into(),
        Some(MemoryType::WriteBack) => "WB, write back".into(),
        Some(MemoryType::UncacheableMinus) => "UC-, uncacheable unless an MTRR says WC".into(),
        None => "reserved".into(),
    }
}

fn address(address: u64) -> String {
    format!("{address:#x}")
}

/// The fields that hold an address of `low` bits alignment: hardware's, and what is reserved below it.
fn address_field(fields: &mut Fields, low: u32, what: &'static str) {
    fields.range(51, low, what, |value| address(value << low));
}

fn mmio_words(entry: &spte_x86::MmioEntry) -> String {
    format!(
        "an MMIO marker for {:#x}, generation {}: every access is meant to fault",
        entry.gpa.as_u64(),
        entry.generation.get()
    )
}

impl ToolFormat for Ept {
    fn attrs(&self, mem: Mem) -> Option<EptAttrs> {
        let memory_type = match mem {
            Mem::WriteBack => EptMemoryType::WriteBack,
            Mem::Uncacheable => EptMemoryType::Uncacheable,
            Mem::WriteCombining => EptMemoryType::WriteCombining,
            Mem::WriteThrough => EptMemoryType::WriteThrough,
        };
        Some(EptAttrs { memory_type, ignore_pat: true })
    }

    /// Bits 57, 58, 60, 61 and 63 mean something only under controls that are off here, and are software's then.
    fn mask(&self, level: Level, form: Form) -> Option<u64> {
        let low = ept::RWX | ept::MEMORY_TYPE | ept::IGNORE_PAT | ept::ACCESSED;
        let size = if level == Level::LEAF { 0 } else { PAGE_SIZE };
        has(self, level, form).then_some(match form {
            Form::Table => low | size,
            Form::Leaf => low | size | ept::DIRTY | ADDRESS,
        })
    }

    fn reading(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }

    fn explain(&self, level: Level, raw: u64) -> Explanation {
        let reading = self.reading(level, raw);
        let marked = raw & MMU_PRESENT != 0;
        let present = raw & ept::RWX != 0;
        let mut fields = Fields::of(raw);
        fields
            .bit(0, "Read access", "reads are allowed", "no reads")
            .bit(1, "Write access", "writes are allowed", "no writes")
            .bit(2, "Execute access", "instruction fetches are allowed", "no instruction fetches");
        let rights = rights(raw & ept::READ != 0, raw & ept::WRITE != 0, raw & ept::EXECUTE != 0);
        if !present && !marked {
            let words = nothing(self.kind(level, raw)).unwrap_or("not present: hardware looks at nothing but bits 2:0");
            return Explanation { reading, summary: words.into(), fields: fields.rest(0), software: None };
        }
        if let Some(entry) = self.mmio().decode(raw) {
            let words = summary(&reading, mmio_words(&entry));
            return Explanation { reading, summary: words, fields: fields.rest(0), software: None };
        }
        let form = form(level, raw);
        let low = address_low(self, level);
        match form {
            Form::Leaf => {
                fields
                    .range(5, 3, "EPT memory type", cache_type)
                    .bit(
                        6,
                        "Ignore PAT memory type",
                        "the memory type above holds",
                        "it is combined with the guest's PAT",
                    )
                    .bit(8, "Accessed", "was used", "was not used")
                    .bit(9, "Dirty", "was written", "was not written");
                if level > Level::LEAF {
                    fields.bit(7, "Page", "a leaf, no link", "");
                }
                address_field(&mut fields, low, "Physical address");
            }
            Form::Table => {
                fields.bit(7, "Page", "", "a link, no leaf").bit(8, "Accessed", "was used", "was not used");
                address_field(&mut fields, 12, "Physical address");
            }
        }
        fields
            .set(60, "Supervisor shadow stack", "a shadow-stack page, under that control")
            .set(61, "Sub-page write permissions", "writes by sub-page, under that control")
            .bit(63, "Suppress #VE", "violations are exits", "violations may be #VE, under that control");
        fields.set(11, "MMU-present (software)", "memory or a table is behind the entry");
        if marked {
            fields.range(53, 52, "accessed/dirty type (software)", |value| {
                let kind = AccessedDirty::from_bits(value << software::ept::AD_TYPE_SHIFT);
                String::from(match kind {
                    Some(AccessedDirty::Enabled) => "hardware sets accessed and dirty",
                    Some(AccessedDirty::Disabled) => "hardware sets neither: ageing takes the rights away",
                    Some(AccessedDirty::WriteProtectOnly) => "dirty is learnt by write protection alone",
                    None => "no such type",
                })
            });
            fields
                .set(54, "saved R (software)", "read comes back when the leaf is young again")
                .set(55, "claim (software)", "somebody is changing the entry; hardware goes on using it")
                .set(56, "saved X (software)", "execute comes back when the leaf is young again")
                .set(57, "host-writable (software)", "slot and host mapping allow writing")
                .set(58, "MMU-writable (software)", "W may be set by one compare-exchange")
                .set(59, "dirty fact (software)", "was written, and there is no hardware bit that would say so")
                .set(62, "execute withheld (software)", "would be executable, were the leaf smaller");
        }
        let fields = fields.rest(ADDRESS | ept::MEMORY_TYPE | ept::IGNORE_PAT | PAGE_SIZE);
        let words = match form {
            Form::Table => format!("a link to the table at {:#x}, {rights}", raw & ADDRESS),
            Form::Leaf => {
                let output = (raw & ADDRESS) >> low << low;
                let kind = cache_type((raw & ept::MEMORY_TYPE) >> ept::MEMORY_TYPE_SHIFT);
                let size = size_word(self.geometry().span(level));
                let used = match (raw & ept::ACCESSED != 0, raw & ept::DIRTY != 0) {
                    (true, true) => "accessed, dirty",
                    (true, false) => "accessed, clean",
                    (false, true) => "old, dirty",
                    (false, false) => "old, clean",
                };
                let state = if marked { format!(", {}", write_state(self.write_state(raw))) } else { String::new() };
                let tracked = if present { "" } else { "; aged by taking its rights away" };
                format!("a leaf of {size} at {output:#x}, {rights}, {kind}, {used}{state}{tracked}")
            }
        };
        let software = if marked { self.as_written(raw).check(level, raw & !CLAIM).err() } else { None };
        Explanation::new(reading, words, fields, software)
    }

    /// Processors have no flush of one guest address: every flush is one `invept` of the table's context.
    fn asks(&self, _: &FlushRequest<'_>, ask: &mut dyn FnMut(&'static str, u64)) {
        ask("invept", 1);
    }
}

/// What the entry itself says of the table it lies in.
trait AsWritten: Sized {
    fn as_written(&self, raw: u64) -> Self;
}

impl AsWritten for Ept {
    fn as_written(&self, raw: u64) -> Self {
        let accessed_dirty = AccessedDirty::from_bits(raw).unwrap_or_default();
        let suppress_ve = raw & ept::SUPPRESS_VE != 0;
        // The widths are those that were accepted before.
        Self::new(EptOptions { accessed_dirty, suppress_ve, ..*self.options() }).unwrap_or_else(|_| self.clone())
    }
}

impl<U: Usage> ToolFormat for LongModeFormat<U> {
    /// By the PAT as it is after reset, which has no write combining.
    fn attrs(&self, mem: Mem) -> Option<LongModeAttrs> {
        let memory_type = match mem {
            Mem::WriteBack => MemoryType::WriteBack,
            Mem::Uncacheable => MemoryType::Uncacheable,
            Mem::WriteCombining => MemoryType::WriteCombining,
            Mem::WriteThrough => MemoryType::WriteThrough,
        };
        Some(LongModeAttrs { selector: Pat::RESET.selector(memory_type)?, ..LongModeAttrs::default() })
    }

    /// Protection keys are off, so bits 62:59 are software's; nested paging ignores G.
    fn mask(&self, level: Level, form: Form) -> Option<u64> {
        let low = long_mode::PRESENT
            | long_mode::WRITE
            | long_mode::USER
            | long_mode::WRITE_THROUGH
            | long_mode::CACHE_DISABLE
            | long_mode::ACCESSED
            | PAGE_SIZE
            | long_mode::NO_EXECUTE;
        let global = if U::NESTED { 0 } else { long_mode::GLOBAL };
        has(self, level, form).then_some(match form {
            Form::Table => low,
            Form::Leaf => low | long_mode::DIRTY | global | ADDRESS,
        })
    }

    fn reading(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }

    fn explain(&self, level: Level, raw: u64) -> Explanation {
        let reading = self.reading(level, raw);
        let mut fields = Fields::of(raw);
        fields.bit(0, "P", "present", "not present: hardware looks no further");
        let present = raw & long_mode::PRESENT != 0;
        if !present {
            let words = nothing(self.kind(level, raw)).unwrap_or("not present: hardware looks at nothing but bit 0");
            return Explanation { reading, summary: words.into(), fields: fields.rest(0), software: None };
        }
        if let Some(entry) = self.mmio().and_then(|layout| layout.decode(raw)) {
            let words = summary(&reading, mmio_words(&entry));
            return Explanation { reading, summary: words, fields: fields.rest(0), software: None };
        }
        let form = form(level, raw);
        let low = address_low(self, level);
        let huge = level > Level::LEAF;
        fields
            .bit(1, "R/W", "writes are allowed", "no writes")
            .bit(2, "U/S", "user accesses are allowed", "supervisor accesses only")
            .bit(3, "PWT", "bit 0 of the PAT selector is 1", "bit 0 of the PAT selector is 0")
            .bit(4, "PCD", "bit 1 of the PAT selector is 1", "bit 1 of the PAT selector is 0")
            .bit(5, "A", "was used", "was not used");
        match form {
            Form::Leaf => {
                fields.bit(6, "D", "was written", "was not written");
                let pat = if huge { 12 } else { 7 };
                fields.bit(pat, "PAT", "bit 2 of the PAT selector is 1", "bit 2 of the PAT selector is 0");
                if huge {
                    fields.bit(7, "PS", "a leaf, no link", "");
                }
                if U::NESTED {
                    fields.set(8, "G", "ignored in nested tables");
                } else {
                    fields.bit(8, "G", "kept when CR3 is loaded", "dropped when CR3 is loaded");
                }
                address_field(&mut fields, low, "Physical address");
            }
            Form::Table => {
                fields.bit(7, "PS", "", "a link, no leaf");
                address_field(&mut fields, 12, "Physical address");
            }
        }
        fields.bit(63, "NX", "no instruction fetches", "instruction fetches are allowed");
        let marked = raw & MMU_PRESENT != 0;
        if marked {
            fields
                .set(9, "host-writable (software)", "slot and host mapping allow writing")
                .set(10, "MMU-writable (software)", "W may be set by one compare-exchange")
                .set(11, "MMU-present (software)", "memory or a table is behind the entry")
                .set(54, "execute withheld (software)", "would be executable, were the leaf smaller")
                .set(55, "claim (software)", "somebody is changing the entry; hardware goes on using it");
        }
        let global = if form == Form::Table && level.get() >= 3 { long_mode::GLOBAL } else { 0 };
        let fields = fields.rest(ADDRESS | PAGE_SIZE | global);
        let rights = rights(true, raw & long_mode::WRITE != 0, raw & long_mode::NO_EXECUTE == 0);
        let who = if raw & long_mode::USER != 0 { "user" } else { "supervisor" };
        let words = match form {
            Form::Table => format!("a link to the table at {:#x}, {rights}, {who}", raw & ADDRESS),
            Form::Leaf => {
                let output = OutputAddr::new((raw & ADDRESS) >> low << low);
                let selector = PatSelector::from_bits(raw, huge);
                let kind = cache_type(Pat::RESET.memory_type(selector) as u64);
                let size = size_word(self.geometry().span(level));
                let used = match (raw & long_mode::ACCESSED != 0, raw & long_mode::DIRTY != 0) {
                    (true, true) => "accessed, dirty",
                    (true, false) => "accessed, clean",
                    (false, true) => "old, dirty",
                    (false, false) => "old, clean",
                };
                let state = if marked { format!(", {}", write_state(self.write_state(raw))) } else { String::new() };
                let number = selector.get();
                let output = output.as_u64();
                format!(
                    "a leaf of {size} at {output:#x}, {rights}, {who}, PAT selector {number} (after reset: {kind}), {used}{state}"
                )
            }
        };
        let software = if marked { self.check(level, raw & !CLAIM).err() } else { None };
        Explanation::new(reading, words, fields, software)
    }

    /// Nested tables: every flush is one of the guest's ASID. Ordinary ones: `invlpg` for up to 33 pages, which also drops
    /// cached links; more are one load of CR3.
    fn asks(&self, request: &FlushRequest<'_>, ask: &mut dyn FnMut(&'static str, u64)) {
        if U::NESTED {
            return ask("asid", 1);
        }
        for step in Steps::new(self, false, request) {
            ask(if matches!(step, Step::Invlpg(_)) { "invlpg" } else { "cr3" }, 1);
        }
    }
}
