// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage-2 tables against the plain sequential truth, operation by operation: every granule, with and without hardware's
//! accessed and dirty, start levels from -1 to 2 with one table at the top and with up to sixteen, 48 and 52 bits, breaking
//! before making and not.
//!
//! Each test runs 256 sequences of 200 operations, or a part of that where tables have thousands of entries, or a leaf can
//! become millions; `PROPTEST_CASES` says of how many otherwise:
//!
//! ```console
//! $ PROPTEST_CASES=4000 cargo test --release -p spte-arm64 --test model
//! ```

use proptest::prelude::*;
use spte_arm64::{AccessedDirty, BreakLevel, Granule, MemoryType, Stage2, Stage2Attrs, Stage2Options, Start};
use spte_core::Format;
use spte_drive::{Driven, Driver, agree, agree_in_want};
use spte_model::{MemType, Op, Shape, parse_script};

fn attrs(mem: MemType) -> Option<Stage2Attrs> {
    let memory = match mem {
        MemType::Wb => MemoryType::WRITE_BACK,
        MemType::Uc => MemoryType::DEVICE,
        MemType::Wc => MemoryType::NON_CACHEABLE,
        MemType::Wt => MemoryType::WRITE_THROUGH,
    };
    Some(Stage2Attrs::default().memory(memory))
}

/// The format, and what the model knows of it.
fn make(options: Stage2Options) -> Driven<Stage2> {
    let granule = match options.granule {
        Granule::K4 => 4 << 10,
        Granule::K16 => 16 << 10,
        Granule::K64 => 64 << 10,
    };
    let wide = options.lpa2 || (options.granule == Granule::K64 && options.physical_bits > 48);
    let shape = Shape::arm64_stage2(granule, options.ipa_bits.into(), options.physical_bits.into(), wide).unwrap();
    // Sixteen tables of level 2 at the root are 34 bits: below that nothing begins at level 1.
    let at_level_2 = options.granule == Granule::K4 && options.ipa_bits <= 34 && options.start == Start::FewestLevels;
    let shape = if at_level_2 { shape.with_leaves_up_to(2 << 20) } else { shape };
    let facts = options.accessed_dirty;
    let shape = shape.with_hw_ad(facts == AccessedDirty::Hardware).with_hw_accessed(facts != AccessedDirty::Software);
    let shape = if options.fwb { shape.with_forced_write_back() } else { shape };
    Driven { format: Stage2::new(options).unwrap(), shape, attrs }
}

fn options(granule: Granule, accessed_dirty: AccessedDirty) -> Stage2Options {
    Stage2Options { granule, accessed_dirty, ..Stage2Options::default() }
}

/// Facts by software, and a root that begins at `level` with `tables` tables: what the architecture says of these widths,
/// which is checked here so that each kind of root is really there.
fn root(granule: Granule, ipa_bits: u8, start: Start, level: i8, tables: usize) -> Stage2Options {
    let options = Stage2Options { ipa_bits, start, ..options(granule, AccessedDirty::Software) };
    let format = Stage2::new(options).unwrap();
    assert_eq!((format.start_level(), usize::from(format.concatenated())), (level, tables));
    options
}

/// One in `part` of the sequences that there would be.
fn check(options: Stage2Options, part: u32) {
    let strategy = spte_model::strategy::ops(&make(options).shape, 200);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let config = ProptestConfig { cases: config.cases.div_ceil(part), ..config };
    proptest!(config, |(ops in strategy)| {
        agree(make(options), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}

macro_rules! compare {
    ($($name:ident, one in $part:literal: $options:expr;)*) => {
        $(
            #[test]
            fn $name() {
                check($options, $part);
            }
        )*
    };
}

compare! {
    granule_4k_without_hardware_facts_does_as_the_model, one in 1: options(Granule::K4, AccessedDirty::Software);
    granule_16k_without_hardware_facts_does_as_the_model, one in 1: options(Granule::K16, AccessedDirty::Software);
    granule_64k_without_hardware_facts_does_as_the_model, one in 1: options(Granule::K64, AccessedDirty::Software);
    granule_4k_with_hardware_facts_does_as_the_model, one in 1: options(Granule::K4, AccessedDirty::Hardware);
    granule_16k_with_hardware_facts_does_as_the_model, one in 1: options(Granule::K16, AccessedDirty::Hardware);
    granule_64k_with_hardware_facts_does_as_the_model, one in 1: options(Granule::K64, AccessedDirty::Hardware);
    granule_4k_with_hardware_access_flag_does_as_the_model, one in 1: options(Granule::K4, AccessedDirty::HardwareAccessed);
    granule_16k_with_hardware_access_flag_does_as_the_model, one in 1: options(Granule::K16, AccessedDirty::HardwareAccessed);
    granule_64k_with_hardware_access_flag_does_as_the_model, one in 4: options(Granule::K64, AccessedDirty::HardwareAccessed);
    small_4k_does_as_the_model, one in 1: root(Granule::K4, 32, Start::FewestLevels, 2, 4);
    sixteen_roots_of_4k_do_as_the_model, one in 1: root(Granule::K4, 43, Start::FewestLevels, 1, 16);
    four_levels_of_4k_do_as_the_model, one in 1: root(Granule::K4, 48, Start::FewestLevels, 0, 1);
    single_root_of_4k_does_as_the_model, one in 1: root(Granule::K4, 40, Start::SingleTable, 0, 1);
    small_16k_does_as_the_model, one in 4: root(Granule::K16, 36, Start::FewestLevels, 2, 1);
    sixteen_roots_of_16k_do_as_the_model, one in 4: root(Granule::K16, 40, Start::FewestLevels, 2, 16);
    two_roots_of_16k_do_as_the_model, one in 4: root(Granule::K16, 48, Start::FewestLevels, 1, 2);
    small_64k_does_as_the_model, one in 8: root(Granule::K64, 32, Start::FewestLevels, 2, 1);
    sixteen_roots_of_64k_do_as_the_model, one in 8: root(Granule::K64, 46, Start::FewestLevels, 2, 16);
    three_levels_of_64k_do_as_the_model, one in 8: root(Granule::K64, 48, Start::FewestLevels, 1, 1);
    forced_write_back_does_as_the_model, one in 1: Stage2Options {
        fwb: true, ..options(Granule::K4, AccessedDirty::Hardware)
    };
    resizing_in_place_does_as_the_model, one in 1: Stage2Options {
        break_level: BreakLevel::Level2, ..options(Granule::K4, AccessedDirty::Hardware)
    };
    lpa2_of_4k_does_as_the_model, one in 16: Stage2Options {
        lpa2: true, ipa_bits: 52, physical_bits: 52, ..options(Granule::K4, AccessedDirty::Hardware)
    };
    lpa2_of_16k_does_as_the_model, one in 4: Stage2Options {
        lpa2: true, ipa_bits: 51, physical_bits: 52, ..options(Granule::K16, AccessedDirty::Software)
    };
    wide_64k_does_as_the_model, one in 16: Stage2Options {
        ipa_bits: 52, physical_bits: 52, ..options(Granule::K64, AccessedDirty::Hardware)
    };
}

/// One sequence in four, of half the length, in which operations find no page: they leave nothing that was neither there nor
/// asked for, and work when there are pages again.
fn check_in_want(options: Stage2Options) {
    let want = prop::option::of((0_u64..4, 1_u64..4));
    let strategy = prop::collection::vec((spte_model::strategy::op(&make(options).shape), want), 100);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let config = ProptestConfig { cases: config.cases.div_ceil(4), ..config };
    proptest!(config, |(ops in strategy)| {
        agree_in_want(make(options), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}

#[test]
fn i10_want_of_pages_leaves_nothing_else_where_entries_are_broken_first() {
    check_in_want(options(Granule::K4, AccessedDirty::Software));
    check_in_want(options(Granule::K16, AccessedDirty::Hardware));
}

#[test]
fn i10_want_of_pages_leaves_nothing_else_where_sizes_change_in_place() {
    check_in_want(Stage2Options { break_level: BreakLevel::Level2, ..options(Granule::K4, AccessedDirty::Hardware) });
}

/// Scripts whose leaves are written out: what Linux 6.12's stage-2 code makes of the same operations.
#[test]
fn scripts_end_in_the_leaves_that_are_written_down() {
    // What does not depend on anybody's policy: all but software bits, FnXS and DBM.
    const MASK: u64 = 0x0060_ffff_ffff_f7ff;
    let run = |options: Stage2Options, script: &str| {
        let shape = make(options).shape;
        let ops: Vec<Op> = parse_script(&shape, script)
            .unwrap()
            .into_iter()
            .filter_map(|(_, command)| match command {
                spte_model::Command::Op(op) => Some(op),
                _ => None,
            })
            .collect();
        agree(make(options), &ops).unwrap();
        let mut driver = Driver::new(make(options)).unwrap();
        ops.iter().for_each(|op| drop(driver.apply(op).unwrap()));
        let mut rows = Vec::new();
        let bits = options.ipa_bits;
        let whole = notifier_core::AddrRange::with_len(notifier_core::Gpa::new(0), 1 << bits).unwrap();
        driver.table().visit(whole, |found| {
            if found.kind == spte_core::format::Kind::Leaf {
                let number = driver.table().format().level_number(found.level);
                rows.push(format!("L{number} {:#x} {:016x}", found.start.as_u64(), found.raw & MASK));
            }
        });
        rows
    };
    let of = |granule| options(granule, AccessedDirty::Software);
    let armed = "map 0x555d1ce9000 0x2dedb6a7000 0x2000 rw mem=uc\nwrprotect 0x555d1ce9000 0x1000";
    let options = Stage2Options { ipa_bits: 48, ..of(Granule::K4) };
    assert_eq!(run(options, armed), ["L3 0x555d1ce9000 004002dedb6a7747", "L3 0x555d1cea000 004002dedb6a87c7"]);
    let large = "map 0x5e1ea9600000 0x14c52ce00000 0x201000 rx page=max";
    assert_eq!(run(options, large), ["L2 0x5e1ea9600000 000014c52ce0077d", "L3 0x5e1ea9800000 000014c52d00077f"]);
    let device = "map 0x668864a00000 0x359c8e400000 0x201000 rw page=max mem=uc";
    assert_eq!(run(options, device), ["L2 0x668864a00000 0040359c8e4007c5", "L3 0x668864c00000 0040359c8e6007c7"]);
    let aged = "map 0x4000 0x8000 16k rwx\nage 0x4000 16k";
    assert_eq!(run(of(Granule::K16), aged), ["L3 0x4000 00000000000083ff"]);
    // Part of a device block: the rest stays device.
    let cut = "map 0x20000000 0x40000000 512m rw page=512m mem=uc\nunmap 0x20010000 0x1ffe0000";
    let rest = ["L3 0x20000000 00400000400007c7", "L3 0x3fff0000 004000005fff07c7"];
    assert_eq!(run(of(Granule::K64), cut), rest);
    let changed = "map 0x1000 0x5000 4k rwx\nchange 0x1000 0x9000\nzapchange 0x2000 0x9000\nchange 0x3000 0x9000";
    assert_eq!(run(of(Granule::K4), changed), ["L3 0x1000 000000000000977f"]);
}
