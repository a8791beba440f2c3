// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage 2 of VMSAv8-64.
//!
//! Fields have the names of the Arm ARM (DDI 0487, "Translation table descriptor formats" and "Stage 2 block and page
//! descriptor attribute fields"). Software bits are those of `spte-arm64`; Linux's KVM uses the same four for other things
//! (`KVM_PGTABLE_PROT_SW0` to `SW3`), and nothing in an entry says who wrote it.

use spte_arm64::bits::{
    ACCESS_FLAG, CONTIGUOUS, DBM, EXECUTE_NEVER, FNXS, MEM_ATTR, MEM_ATTR_SHIFT, NO_TRANSLATION_CACHING, READ,
    SHAREABILITY, SHAREABILITY_SHIFT, TYPE, VALID, WRITE, bit_range,
};
use spte_arm64::software::{CLAIM, DIRTY_FACT, UPGRADABLE};
use spte_arm64::{
    Cache, Device, ExecuteAt, Granule, HardwareKind, MemoryType, Owner, Shareability, Stage2, Stage2Attrs, Step, Steps,
    TlbFeatures, Tlbi, WriteState,
};
use spte_core::FlushRequest;
use spte_core::format::{Format, Kind, Level};

use crate::format::{Explanation, Fields, Form, ToolFormat, nothing, rights, size_word};
use crate::script::Mem;

/// How a valid entry is laid out, whether or not it is possible.
fn form(level: Level, raw: u64) -> Form {
    if level == Level::LEAF || raw & TYPE == 0 { Form::Leaf } else { Form::Table }
}

/// Bits of the 52-bit output address that are not in one piece with the rest of it: what they are called, where they
/// stand, and which bit of the address the lowest of them is.
struct HighBits {
    name: &'static str,
    high: u32,
    low: u32,
    from: u32,
}

fn high_bits(format: &Stage2) -> Option<HighBits> {
    let options = format.options();
    match options.granule {
        Granule::K64 if options.physical_bits > 48 => Some(HighBits { name: "OA[51:48]", high: 15, low: 12, from: 48 }),
        Granule::K4 | Granule::K16 if options.lpa2 => Some(HighBits { name: "OA[51:50]", high: 9, low: 8, from: 50 }),
        _ => None,
    }
}

/// The highest bit of the piece of the output address that is in place.
fn address_top(format: &Stage2) -> u32 {
    if format.options().lpa2 { 49 } else { 47 }
}

/// All bits of an output address that begins at bit `low`.
fn address_bits(format: &Stage2, low: u32) -> u64 {
    let high = high_bits(format).map_or(0, |bits| bit_range(bits.high, bits.low));
    bit_range(address_top(format), low) | high
}

fn address_fields(fields: &mut Fields, format: &Stage2, low: u32, what: &'static str) {
    if let Some(bits) = high_bits(format) {
        fields.range(bits.high, bits.low, bits.name, |value| format!("{:#x}", value << bits.from));
    }
    fields.range(address_top(format), low, what, |value| format!("{:#x}", value << low));
}

fn memory_words(memory: Option<MemoryType>) -> String {
    let cache = |cache: Cache| match cache {
        Cache::NonCacheable => "non-cacheable",
        Cache::WriteThrough => "write-through",
        Cache::WriteBack => "write-back",
    };
    match memory {
        None => "reserved".into(),
        Some(MemoryType::Device(Device::NGnRnE)) => "Device-nGnRnE".into(),
        Some(MemoryType::Device(Device::NGnRE)) => "Device-nGnRE".into(),
        Some(MemoryType::Device(Device::NGRE)) => "Device-nGRE".into(),
        Some(MemoryType::Device(Device::GRE)) => "Device-GRE".into(),
        Some(MemoryType::Normal { outer, inner }) if outer == inner => format!("Normal {}", cache(outer)),
        Some(MemoryType::Normal { outer, inner }) => format!("Normal, outer {}, inner {}", cache(outer), cache(inner)),
        Some(MemoryType::Stage1) => "as stage 1 says".into(),
    }
}

/// What MemAttr says; and what it would under FWB, where that is something else: logs do not tell which it was.
fn mem_attr_words(fwb: bool, value: u64) -> String {
    let value = value as u8;
    let here = MemoryType::from_mem_attr(value, fwb);
    let words = memory_words(here);
    match MemoryType::from_mem_attr(value, true) {
        Some(other) if !fwb && Some(other) != here => {
            format!("{words} (with HCR_EL2.FWB: {})", memory_words(Some(other)))
        }
        _ => words,
    }
}

fn shareability_words(value: u64) -> &'static str {
    match Shareability::from_bits(value as u8) {
        Some(Shareability::NonShareable) => "non-shareable",
        Some(Shareability::Outer) => "outer shareable",
        Some(Shareability::Inner) => "inner shareable",
        None => "reserved",
    }
}

fn execute_words(format: &Stage2, value: u64) -> &'static str {
    match (value, format.options().xnx) {
        // Without FEAT_XNX bit 53 is reserved, and does not count.
        (0, _) | (1, false) => "instruction fetches are allowed",
        (1, true) => "instruction fetches at EL0 alone",
        (3, true) => "instruction fetches at EL1 alone",
        _ => "no instruction fetches",
    }
}

fn access_words(format: &Stage2, raw: u64) -> String {
    let words = match raw >> READ.trailing_zeros() & 3 {
        0 => "no reads, no writes",
        1 => "reads are allowed",
        2 => "writes are allowed",
        _ => "reads and writes are allowed",
    };
    match (raw & DBM != 0, format.options().accessed_dirty.sets_dirty(), raw & WRITE != 0) {
        (true, true, false) => format!("{words}; with DBM writes too, and the first sets bit 7"),
        (true, true, true) => format!("{words}; with DBM: was written"),
        _ => words.into(),
    }
}

fn write_state(state: Option<WriteState>) -> &'static str {
    match state {
        Some(WriteState::Writable) => "writable",
        Some(WriteState::WritableClean) => "writable, hardware records the first write",
        Some(WriteState::Armed) => "writing withheld: one compare-exchange brings it back",
        Some(WriteState::ReadOnly) => "read-only",
        None => "an impossible state of writing",
    }
}

/// Whether the entry has bits by which this workspace knows its own leaves: no other bit is set in each of them, and in
/// nobody else's.
fn is_marked(raw: u64) -> bool {
    raw & (UPGRADABLE | DIRTY_FACT) != 0
}

fn invalid(format: &Stage2, level: Level, raw: u64) -> String {
    if let Some(words) = nothing(format.kind(level, raw)) {
        return words.into();
    }
    match Owner::from_raw(raw) {
        Some(Owner(owner)) => format!("not present: the page belongs to owner {owner}"),
        None => "not present: hardware looks at nothing but bit 0".into(),
    }
}

fn leaf_words(format: &Stage2, level: Level, raw: u64) -> String {
    let options = format.options();
    let spec = format.spec(level, raw);
    let what = if level == Level::LEAF { "page" } else { "block" };
    let size = size_word(format.geometry().span(level));
    let hardware = options.accessed_dirty.sets_dirty();
    let writes = raw & WRITE != 0 || (hardware && raw & DBM != 0);
    let executes = format.is_executable(raw);
    let rights = rights(raw & READ != 0, writes, executes);
    let place = match spec.attrs.execute {
        ExecuteAt::El0 if executes => " (executes at EL0 alone)",
        ExecuteAt::El1 if executes => " (executes at EL1 alone)",
        _ => "",
    };
    let memory = memory_words(MemoryType::from_mem_attr(((raw & MEM_ATTR) >> MEM_ATTR_SHIFT) as u8, options.fwb));
    let shareability = if options.lpa2 {
        String::new()
    } else {
        format!(", {}", shareability_words((raw & SHAREABILITY) >> SHAREABILITY_SHIFT))
    };
    let used = if raw & ACCESS_FLAG != 0 { "accessed" } else { "old" };
    let written = match (hardware && raw & DBM != 0, raw & WRITE != 0) {
        (true, true) => ", dirty",
        (true, false) => ", clean",
        _ => "",
    };
    let state = if is_marked(raw) { format!(", {}", write_state(format.write_state(raw))) } else { String::new() };
    let output = spec.output.as_u64();
    format!("a {what} of {size} at {output:#x}, {rights}{place}, {memory}{shareability}, {used}{written}{state}")
}

fn leaf_fields(fields: &mut Fields, format: &Stage2, level: Level, raw: u64) {
    let options = *format.options();
    fields
        .range(5, 2, "MemAttr[3:0]", |value| mem_attr_words(options.fwb, value))
        .range(7, 6, "S2AP[1:0]", |_| access_words(format, raw))
        .bit(10, "AF", "was used", "was not used");
    if !options.lpa2 {
        fields.range(9, 8, "SH[1:0]", |value| shareability_words(value).into());
    }
    fields.set(11, "FnXS", "with FEAT_XS: the XS attribute is 0");
    let low = u32::from(format.geometry().level(level).shift);
    address_fields(fields, format, low, "Output address");
    if low > 16 {
        fields.set(16, "nT", "with FEAT_BBM: a block that is about to change its size");
    }
    fields
        .set(51, "DBM", "where hardware manages dirty state, bit 7 says whether the leaf was written")
        .set(52, "Contiguous", "one of a set that one TLB entry may stand for")
        .range(54, 53, "XN[1:0]", |value| execute_words(format, value).into())
        .set(55, "software use: claim", "here: somebody is changing the entry; hardware goes on using it")
        .set(56, "software use: upgradable", "here: writing may be granted by one compare-exchange")
        .set(57, "software use: dirty fact", "here: was written, and there is no hardware bit that would say so")
        .set(58, "software use: the user's", "here: what the user of the table makes of it");
    if raw & bit_range(62, 59) != 0 {
        fields.range(62, 59, "PBHA[3:0]", |_| "ignored, unless VTCR_EL2.HWU59 to HWU62 are set".into());
    }
}

impl ToolFormat for Stage2 {
    /// `uc` is the device memory that Linux maps devices as, nGnRE; `wc` is non-cacheable, `wt` write-through memory.
    fn attrs(&self, mem: Mem) -> Option<Stage2Attrs> {
        let memory = match mem {
            Mem::WriteBack => MemoryType::WRITE_BACK,
            Mem::Uncacheable => MemoryType::DEVICE,
            Mem::WriteCombining => MemoryType::NON_CACHEABLE,
            Mem::WriteThrough => MemoryType::WRITE_THROUGH,
        };
        memory.mem_attr(self.options().fwb)?;
        Some(Stage2Attrs { shareability: self.options().shareability, ..Stage2Attrs::default().memory(memory) })
    }

    /// Links hold an address and two bits. Of leaves, bits 58:55 are reserved for software, and 63:59 ignored while
    /// VTCR_EL2 gives PBHA no meaning.
    fn mask(&self, level: Level, form: Form) -> Option<u64> {
        let shape = self.geometry().level(level);
        match form {
            Form::Table => (level > Level::LEAF).then_some(VALID | TYPE),
            Form::Leaf => shape.leaf.then_some(
                VALID
                    | TYPE
                    | MEM_ATTR
                    | READ
                    | WRITE
                    | SHAREABILITY
                    | ACCESS_FLAG
                    | FNXS
                    | DBM
                    | CONTIGUOUS
                    | EXECUTE_NEVER
                    | address_bits(self, u32::from(shape.shift)),
            ),
        }
    }

    fn reading(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }

    fn explain(&self, level: Level, raw: u64) -> Explanation {
        let reading = self.reading(level, raw);
        let mut fields = Fields::of(raw);
        fields.bit(0, "Valid", "valid", "not valid: hardware looks no further");
        if raw & VALID == 0 {
            let summary = invalid(self, level, raw);
            return Explanation { reading, summary, fields: fields.rest(0), software: None };
        }
        let granule = u32::from(self.options().granule.shift());
        let shift = u32::from(self.geometry().level(level).shift);
        let above = bit_range(50, 48) & !address_bits(self, granule);
        let (words, reserved, software) = match form(level, raw) {
            Form::Table => {
                fields.bit(1, "Descriptor type", "a table", "");
                address_fields(&mut fields, self, granule, "Next-level table address");
                let attributes: &[(u32, u32)] = if self.options().lpa2 { &[(7, 2), (11, 10)] } else { &[(11, 2)] };
                for &(high, low) in attributes {
                    if raw & bit_range(high, low) != 0 {
                        fields
                            .range(high, low, "ignored", |_| "hardware does not look: links have no attributes".into());
                    }
                }
                fields.set(
                    55,
                    "software use: claim",
                    "here: somebody is changing the entry; hardware goes on using it",
                );
                let to = match self.kind(level, raw) {
                    Kind::Table(to) => to.as_u64(),
                    // No level that this format has.
                    _ => raw & bit_range(47, granule),
                };
                let reserved = above | bit_range(granule - 1, 12) & !address_bits(self, granule);
                (format!("a link to the table at {to:#x}"), reserved, None)
            }
            Form::Leaf => {
                if level == Level::LEAF {
                    fields.bit(1, "Descriptor type", "a page", "reserved at level 3");
                } else {
                    fields.bit(1, "Descriptor type", "", "a block");
                }
                leaf_fields(&mut fields, self, level, raw);
                let software = if is_marked(raw) { self.check(level, raw & !CLAIM).err() } else { None };
                let reserved = above | bit_range(shift - 1, 12) & !address_bits(self, shift) & !NO_TRANSLATION_CACHING;
                (leaf_words(self, level, raw), reserved, software)
            }
        };
        Explanation::new(reading, words, fields.rest(reserved), software)
    }

    /// The invalidations of [`Steps`] for a machine of Armv8.0, without level hints and ranges; barriers are none.
    fn asks(&self, request: &FlushRequest<'_>, ask: &mut dyn FnMut(&'static str, u64)) {
        for step in Steps::new(self, TlbFeatures::default(), request) {
            let Step::Invalidate(operation) = step else { continue };
            let name = match operation {
                Tlbi::Ipa(_) => "ipas2e1is",
                Tlbi::Range(_) => "ripas2e1is",
                Tlbi::Stage1 => "vmalle1is",
                Tlbi::Vmid => "vmalls12e1is",
                Tlbi::Everything => "alle1is",
                Tlbi::LocalIpa(_) => "ipas2e1",
                Tlbi::LocalStage1 => "vmalle1",
            };
            ask(name, 1);
        }
    }
}
