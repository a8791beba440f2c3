// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every x86 table against the plain sequential truth, operation by operation.
//!
//! Each test runs 256 sequences of 200 operations; `PROPTEST_CASES` says how many otherwise:
//!
//! ```console
//! $ PROPTEST_CASES=4000 cargo test --release -p spte-x86 --test model
//! ```

use proptest::prelude::*;
use spte_core::Format;
use spte_drive::{Driven, Driver, agree, agree_in_want};
use spte_model::{MemType, Op, Shape, parse_script};
use spte_x86::{
    AccessedDirty, Ept, EptAttrs, EptMemoryType, EptOptions, Levels, LongMode, LongModeAttrs, LongModeOptions,
    MemoryType, Npt, Pat,
};

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

fn ept(levels: Levels, accessed_dirty: AccessedDirty) -> Driven<Ept> {
    let bits = if levels == Levels::Five { 57 } else { 48 };
    let shape = Shape::ept().with_bits(bits, 52).unwrap();
    let shape = match accessed_dirty {
        AccessedDirty::Enabled => shape,
        AccessedDirty::Disabled => shape.with_hw_ad(false),
        AccessedDirty::WriteProtectOnly => shape.with_hw_ad(false).with_hw_accessed(true),
    };
    let format = Ept::new(EptOptions { levels, accessed_dirty, ..EptOptions::default() }).unwrap();
    Driven { format, shape, attrs: ept_attrs }
}

fn npt() -> Driven<Npt> {
    Driven { format: Npt::new(LongModeOptions::default()).unwrap(), shape: Shape::npt(), attrs: long_mode_attrs }
}

fn long_mode(levels: Levels) -> Driven<LongMode> {
    let format = LongMode::new(LongModeOptions { levels, ..LongModeOptions::default() }).unwrap();
    let shape = if levels == Levels::Five { Shape::x86_64_la57() } else { Shape::x86_64() };
    Driven { format, shape, attrs: long_mode_attrs }
}

fn check<F: Format>(make: impl Fn() -> Driven<F>) {
    let strategy = spte_model::strategy::ops(&make().shape, 200);
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }, |(ops in strategy)| {
        agree(make(), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}

macro_rules! compare {
    ($($name:ident: $make:expr;)*) => {
        $(
            #[test]
            fn $name() {
                check(|| $make);
            }
        )*
    };
}

compare! {
    ept_of_four_levels_does_as_the_model: ept(Levels::Four, AccessedDirty::Enabled);
    ept_of_five_levels_does_as_the_model: ept(Levels::Five, AccessedDirty::Enabled);
    ept_without_hardware_facts_does_as_the_model: ept(Levels::Four, AccessedDirty::Disabled);
    ept_whose_dirty_bits_are_not_its_own_does_as_the_model: ept(Levels::Four, AccessedDirty::WriteProtectOnly);
    npt_does_as_the_model: npt();
    long_mode_does_as_the_model: long_mode(Levels::Four);
    la57_does_as_the_model: long_mode(Levels::Five);
}

/// One sequence in four, of half the length, in which operations find no page: they leave nothing that was neither there nor
/// asked for, and work when there are pages again.
fn check_in_want<F: Format>(make: impl Fn() -> Driven<F>) {
    let want = prop::option::of((0_u64..4, 1_u64..4));
    let strategy = prop::collection::vec((spte_model::strategy::op(&make().shape), want), 100);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let config = ProptestConfig { cases: config.cases.div_ceil(4), ..config };
    proptest!(config, |(ops in strategy)| {
        agree_in_want(make(), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}

#[test]
fn i10_want_of_pages_leaves_nothing_that_was_not_there_or_asked_for() {
    check_in_want(|| ept(Levels::Five, AccessedDirty::Enabled));
    check_in_want(|| ept(Levels::Four, AccessedDirty::Disabled));
    check_in_want(npt);
    check_in_want(|| long_mode(Levels::Five));
}

/// Scripts whose answers are written out: what Linux's TDP MMU makes of the same operations.
#[test]
fn scripts_end_in_the_leaves_that_are_written_down() {
    // Mask of the entry bits that do not depend on anybody's policy.
    let mask = |level: u8| if level == 1 { 0x000f_ffff_ffff_f17f } else { 0x000f_ffff_ffff_f1ff };
    let run = |script: &str| {
        let make = || ept(Levels::Four, AccessedDirty::Enabled);
        let shape = make().shape;
        let ops: Vec<Op> = parse_script(&shape, script)
            .unwrap()
            .into_iter()
            .filter_map(|(_, command)| match command {
                spte_model::Command::Op(op) => Some(op),
                _ => None,
            })
            .collect();
        agree(make(), &ops).unwrap();
        let mut driver = Driver::new(make()).unwrap();
        ops.iter().for_each(|op| drop(driver.apply(op).unwrap()));
        let mut rows = Vec::new();
        let whole = notifier_core::AddrRange::with_len(notifier_core::Gpa::new(0), 1 << 48).unwrap();
        driver.table().visit(whole, |found| {
            if found.kind == spte_core::format::Kind::Leaf {
                let level = found.level.get();
                rows.push(format!("L{level} {:#x} {:016x}", found.start.as_u64(), found.raw & mask(level)));
            }
        });
        rows
    };
    let merged = run("map 0x200000 0x1000000 2m rwx\ncollapse 0 4m\nwrprotect 0 1g\nage 0x200000 4k");
    assert_eq!(merged, ["L2 0x200000 00000000010000f5"]);
    let cut = run("map 0x200000 0x1000000 2m rwx page=2m\nunmap 0x202000 0x1fe000\nprotect 0x200000 4k r");
    assert_eq!(cut, ["L1 0x200000 0000000001000171", "L1 0x201000 0000000001001177"]);
    let changed = run("map 0x1000 0x5000 8k rwx\ntouch 0x1000 w\nchange 0x1000 0x9000\nzapchange 0x2000 0x9000");
    assert_eq!(changed, ["L1 0x1000 0000000000009175"]);
}
