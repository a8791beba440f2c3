// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sequences of operations on a table of each format, compared with the sequential truth after each one.
//!
//! The input is a few bytes of options and then operations, as [`Op::decode`] reads them. `spte-drive` carries each out on a
//! real table and on `spte-model`; answers, leaves, reported facts have to be equal, and every raw entry passes its format's
//! check (reserved bits, misconfigurations, impossible states). [`out_of_memory`] does the same while the source of table pages
//! fails, at the allocations that the input says: what is left may be as before or as asked for, and nothing else.

use spte_arm64::{AccessedDirty as Management, BreakLevel, Granule, Stage2, Stage2Attrs, Stage2Options, Start};
use spte_core::{Format, HeapPages};
use spte_drive::{DriveError, Driven, Pair, ScarcePages, Step};
use spte_mips::{BigEndian, Cache, GpaAttrs, GpaOptions, GpaTable, LittleEndian, PageSize, PteLayout, Width};
use spte_model::{Access, MemType, Op, Shape};
use spte_ppc::{BasePage, Radix, RadixAttrs, RadixOptions, Storage};
use spte_x86::{
    AccessedDirty, Ept, EptAttrs, EptMemoryType, EptOptions, Levels, LongMode, LongModeAttrs, LongModeOptions,
    MemoryType, Npt, Pat,
};

use crate::bytes::Bytes;

/// The most operations of one input.
const MOST: usize = 100;

/// EPT: options, then operations.
pub fn ept(data: &[u8]) {
    let mut input = Bytes(data);
    sequence(ept_driven(&mut input), &mut input);
}

/// AMD's nested tables: options, then operations.
pub fn npt(data: &[u8]) {
    let mut input = Bytes(data);
    sequence(npt_driven(&mut input), &mut input);
}

/// Long mode of four levels: options, then operations.
pub fn x86_64(data: &[u8]) {
    let mut input = Bytes(data);
    sequence(long_mode_driven(&mut input, Levels::Four), &mut input);
}

/// Long mode of five levels: options, then operations.
pub fn la57(data: &[u8]) {
    let mut input = Bytes(data);
    sequence(long_mode_driven(&mut input, Levels::Five), &mut input);
}

/// Stage 2 of arm64: granule and other options, then operations.
pub fn arm64_s2(data: &[u8]) {
    let mut input = Bytes(data);
    if let Some(driven) = stage2_driven(&mut input) {
        sequence(driven, &mut input);
    }
}

/// Radix trees of Power: base page and other options, then operations.
pub fn ppc_radix(data: &[u8]) {
    let mut input = Bytes(data);
    sequence(radix_driven(&mut input), &mut input);
}

/// KVM's table for 64-bit MIPS: page size and other options, then operations.
pub fn mips64(data: &[u8]) {
    let mut input = Bytes(data);
    let (options, shape, little) = mips_options(&mut input);
    if little {
        sequence(mips_driven::<LittleEndian>(options, shape), &mut input);
    } else {
        sequence(mips_driven::<BigEndian>(options, shape), &mut input);
    }
}

/// Any format, with a page source that fails: format, which allocations fail, options, operations.
pub fn out_of_memory(data: &[u8]) {
    let mut input = Bytes(data);
    let format = input.below(7);
    let plan = Plan { after: input.byte(), calls: input.byte(), again: input.byte() };
    match format {
        0 => scarce(ept_driven(&mut input), plan, &mut input),
        1 => scarce(npt_driven(&mut input), plan, &mut input),
        2 => scarce(long_mode_driven(&mut input, Levels::Four), plan, &mut input),
        3 => scarce(long_mode_driven(&mut input, Levels::Five), plan, &mut input),
        5 => scarce(radix_driven(&mut input), plan, &mut input),
        6 => {
            let (options, shape, _) = mips_options(&mut input);
            scarce(mips_driven::<BigEndian>(options, shape), plan, &mut input);
        }
        _ => {
            if let Some(driven) = stage2_driven(&mut input) {
                scarce(driven, plan, &mut input);
            }
        }
    }
}

// ---- formats --------------------------------------------------------------------------------------------------------

const LARGE: [u64; 3] = [1 << 12, 1 << 21, 1 << 30];

fn ept_attrs(mem: MemType) -> Option<EptAttrs> {
    let memory_type = match mem {
        MemType::Wb => EptMemoryType::WriteBack,
        MemType::Uc => EptMemoryType::Uncacheable,
        MemType::Wc => EptMemoryType::WriteCombining,
        MemType::Wt => EptMemoryType::WriteThrough,
    };
    Some(EptAttrs { memory_type, ignore_pat: true })
}

fn long_mode_attrs(mem: MemType) -> Option<LongModeAttrs> {
    let memory_type = match mem {
        MemType::Wb => MemoryType::WriteBack,
        MemType::Uc => MemoryType::Uncacheable,
        MemType::Wc => MemoryType::WriteCombining,
        MemType::Wt => MemoryType::WriteThrough,
    };
    Some(LongModeAttrs { selector: Pat::RESET.selector(memory_type)?, ..LongModeAttrs::default() })
}

fn stage2_attrs(mem: MemType) -> Option<Stage2Attrs> {
    let memory = match mem {
        MemType::Wb => spte_arm64::MemoryType::WRITE_BACK,
        MemType::Uc => spte_arm64::MemoryType::DEVICE,
        MemType::Wc => spte_arm64::MemoryType::NON_CACHEABLE,
        MemType::Wt => spte_arm64::MemoryType::WRITE_THROUGH,
    };
    Some(Stage2Attrs::default().memory(memory))
}

fn radix_attrs(mem: MemType) -> Option<RadixAttrs> {
    let storage = match mem {
        MemType::Wb => Storage::Normal,
        MemType::Uc => Storage::NonIdempotent,
        MemType::Wc => Storage::Tolerant,
        MemType::Wt => return None,
    };
    Some(RadixAttrs::default().storage(storage))
}

/// A shape as `like`, with the first so many of the sizes of x86.
fn sized(like: Shape, sizes: usize, gpa_bits: u32) -> Shape {
    let shape = Shape::new(&LARGE[..sizes], gpa_bits, 52).expect("sizes and widths of x86");
    shape.with_access(like.access()).with_mem(like.mem()).with_hw_ad(true)
}

fn ept_driven(input: &mut Bytes<'_>) -> Driven<Ept> {
    let how = input.byte();
    let levels = if how & 1 == 0 { Levels::Four } else { Levels::Five };
    let accessed_dirty =
        [AccessedDirty::Enabled, AccessedDirty::Disabled, AccessedDirty::WriteProtectOnly, AccessedDirty::Enabled]
            [usize::from(how >> 6)];
    let (execute_only, pages_2m, pages_1g) = (how & 2 == 0, how & 12 != 12, how & 20 == 0);
    let options = EptOptions {
        levels,
        execute_only,
        pages_2m,
        pages_1g,
        suppress_ve: how & 32 == 0,
        accessed_dirty,
        ..EptOptions::default()
    };
    let bits = if levels == Levels::Five { 57 } else { 48 };
    let sizes = 1 + usize::from(pages_2m) + usize::from(pages_1g);
    let shape = sized(Shape::ept(), sizes, bits)
        .with_hw_ad(accessed_dirty == AccessedDirty::Enabled)
        .with_hw_accessed(accessed_dirty != AccessedDirty::Disabled);
    let readable = [Access::RWX, Access::RW, Access::RX, Access::R];
    let shape = if execute_only { shape } else { shape.with_access(&readable) };
    Driven { format: Ept::new(options).expect("options of a machine"), shape, attrs: ept_attrs }
}

fn long_mode_options(input: &mut Bytes<'_>, levels: Levels, like: Shape) -> (LongModeOptions, Shape) {
    let how = input.byte();
    let (pages_1g, no_execute) = (how & 1 == 0, how & 6 != 6);
    let options = LongModeOptions { levels, pages_1g, no_execute, ..LongModeOptions::default() };
    let bits = if levels == Levels::Five { 57 } else { 48 };
    let shape = sized(like, if pages_1g { 3 } else { 2 }, bits);
    let shape = if no_execute { shape } else { shape.with_access(&[Access::RWX, Access::RX]) };
    (options, shape)
}

fn npt_driven(input: &mut Bytes<'_>) -> Driven<Npt> {
    let (options, shape) = long_mode_options(input, Levels::Four, Shape::npt());
    Driven { format: Npt::new(options).expect("options of a machine"), shape, attrs: long_mode_attrs }
}

fn long_mode_driven(input: &mut Bytes<'_>, levels: Levels) -> Driven<LongMode> {
    let (options, shape) = long_mode_options(input, levels, Shape::x86_64());
    Driven { format: LongMode::new(options).expect("options of a machine"), shape, attrs: long_mode_attrs }
}

/// Options that no machine has make no table, and nothing of these bytes.
fn stage2_driven(input: &mut Bytes<'_>) -> Option<Driven<Stage2>> {
    let how = input.byte();
    let granule = input.one_of(&[Granule::K4, Granule::K16, Granule::K64]);
    let options = Stage2Options {
        granule,
        ipa_bits: 32 + input.below(17),
        physical_bits: 48,
        accessed_dirty: [Management::Software, Management::Hardware, Management::HardwareAccessed]
            [usize::from(how & 0x81 == 0x81) + usize::from(how & 1)],
        fwb: how & 6 == 6,
        xnx: how & 8 == 8,
        start: if how & 16 == 0 { Start::FewestLevels } else { Start::SingleTable },
        break_level: if how & 96 == 96 { BreakLevel::Level2 } else { BreakLevel::Level0 },
        ..Stage2Options::default()
    };
    let format = Stage2::new(options).ok()?;
    let sizes: &[u64] = match granule {
        Granule::K4 => &LARGE,
        Granule::K16 => &[1 << 14, 1 << 25],
        Granule::K64 => &[1 << 16, 1 << 29],
    };
    // Pages are at level 3, the next larger blocks at 2; above the level where walks begin there is nothing.
    let levels = usize::try_from(4 - format.start_level()).ok()?;
    let sizes = &sizes[..sizes.len().min(levels)];
    let shape = Shape::new(sizes, options.ipa_bits.into(), 48)
        .ok()?
        .with_hw_ad(options.accessed_dirty.sets_dirty())
        .with_hw_accessed(options.accessed_dirty.sets_accessed());
    let shape = if options.fwb { shape.with_forced_write_back() } else { shape };
    Some(Driven { format, shape, attrs: stage2_attrs })
}

fn radix_driven(input: &mut Bytes<'_>) -> Driven<Radix> {
    let how = input.byte();
    let page = if how & 1 == 0 { BasePage::K4 } else { BasePage::K64 };
    let options = RadixOptions { page, physical_bits: 57, strong_order: how & 2 == 0 };
    let shape = Shape::ppc_radix(page.bytes()).expect("a base page of Power");
    Driven { format: Radix::new(options).expect("options of a machine"), shape, attrs: radix_attrs }
}

/// Options, what the model knows of them, and whether it is little-endian.
fn mips_options(input: &mut Bytes<'_>) -> (GpaOptions, Shape, bool) {
    let how = input.byte();
    let page = input.one_of(&[PageSize::K4, PageSize::K16, PageSize::K64]);
    let width = if how & 1 == 0 { Width::Standard } else { Width::Wide };
    let layout = match how >> 1 & 3 {
        1 => PteLayout::Huge,
        2 => PteLayout::HugeSplitting,
        _ => PteLayout::Plain,
    };
    let options = GpaOptions { page, width, layout, rixi: how & 8 == 0, ..GpaOptions::default() };
    let bits = match (page, width) {
        (PageSize::K4, Width::Standard) => 40,
        (PageSize::K16, Width::Standard) => 36,
        (PageSize::K64, Width::Standard) => 42,
        (PageSize::K4 | PageSize::K16, Width::Wide) => 48,
        (PageSize::K64, Width::Wide) => 55,
    };
    let shape = Shape::new(&[page.bytes()], bits, 48).expect("a page and widths");
    let shape = if options.rixi { shape } else { shape.with_access(&[Access::RWX, Access::RX]) };
    (options, shape, how & 16 != 0)
}

fn mips_attrs(mem: MemType) -> Option<GpaAttrs> {
    let cache = match mem {
        MemType::Wb => Cache::NonCoherent,
        MemType::Uc => Cache::Uncached,
        MemType::Wc => Cache::UncachedAccelerated,
        MemType::Wt => Cache::WriteThrough,
    };
    Some(GpaAttrs { cache })
}

fn mips_driven<O: spte_mips::ByteOrder>(options: GpaOptions, shape: Shape) -> Driven<GpaTable<O>> {
    Driven { format: GpaTable::new(options).expect("options of a machine"), shape, attrs: mips_attrs }
}

// ---- sequences ------------------------------------------------------------------------------------------------------

fn operations(shape: &Shape, input: &mut Bytes<'_>) -> Vec<Op> {
    let mut ops = Op::decode(shape, input.rest());
    ops.truncate(MOST);
    ops
}

fn sequence<F: Format>(driven: Driven<F>, input: &mut Bytes<'_>) {
    let ops = operations(&driven.shape, input);
    let mut pair = Pair::new(driven).unwrap_or_else(|wrong| panic!("no table: {wrong}"));
    for op in &ops {
        pair.step(op).unwrap_or_else(|wrong| panic!("{wrong}\n{}", script(&ops)));
    }
    pair.compare().unwrap_or_else(|wrong| panic!("in the end: {wrong}\n{}", script(&ops)));
}

/// The operations as lines of a script, for who has to look into it.
fn script(ops: &[Op]) -> String {
    ops.iter().map(|op| format!("{op}\n")).collect()
}

/// Which allocations fail.
#[derive(Debug, Clone, Copy)]
struct Plan {
    /// So many succeed first, the one of the root among them.
    after: u8,
    /// So many fail then, one at least; all from there on for 255.
    calls: u8,
    /// After so many operations the same begins again; never for 0.
    again: u8,
}

impl Plan {
    fn begin<P>(self, pages: &ScarcePages<P>) {
        let calls = if self.calls == u8::MAX { u64::MAX } else { u64::from(self.calls.max(1)) };
        // The engine asks for a page that it does not get once more.
        pages.run_out(u64::from(self.after), calls.saturating_mul(2));
    }
}

fn scarce<F: Format>(driven: Driven<F>, plan: Plan, input: &mut Bytes<'_>) {
    let ops = operations(&driven.shape, input);
    let whole = Op::Unmap { gpa: 0, size: 1 << driven.shape.gpa_bits() };
    let pages = ScarcePages::new(HeapPages::new());
    plan.begin(&pages);
    let mut pair = match Pair::with_pages(driven, pages) {
        Ok(pair) => pair,
        Err(DriveError::OutOfPages { .. }) => {
            assert_eq!(plan.after, 0, "there was a page for the root");
            return;
        }
        Err(wrong) => panic!("no table: {wrong}"),
    };
    assert_ne!(plan.after, 0, "there was no page for the root");
    for (index, op) in (1_usize..).zip(&ops) {
        pair.step(op).unwrap_or_else(|wrong| panic!("{plan:?}: {wrong}\n{}", script(&ops)));
        if plan.again != 0 && index % usize::from(plan.again) == 0 {
            plan.begin(pair.driver().pages());
        }
    }
    // With pages again, everything works again, and everything can go.
    pair.driver().pages().recover();
    for op in ops.iter().take(8).chain([&whole]) {
        let step = pair.step(op).unwrap_or_else(|wrong| panic!("after {plan:?}: {wrong}\n{}", script(&ops)));
        assert_ne!(step, Step::OutOfPages, "there are pages again");
    }
    assert_eq!(pair.model().leaves().count(), 0, "not everything was unmapped");
    pair.compare().unwrap_or_else(|wrong| panic!("in the end: {wrong}\n{}", script(&ops)));
}
