// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every x86 table against the plain sequential truth, operation by operation.

#[path = "common/driver.rs"]
mod driver;

use driver::{Driven, Driver, agree};
use proptest::prelude::*;
use spte_model::{MemType, Op, Shape, parse_script};
use spte_x86::{
    Ept, EptAttrs, EptMemoryType, EptOptions, Levels, LongMode, LongModeAttrs, LongModeFormat, LongModeOptions,
    MemoryType, Npt, Pat, Usage,
};

impl Driven for Ept {
    fn attrs(mem: MemType) -> Option<EptAttrs> {
        let memory_type = match mem {
            MemType::Wb => EptMemoryType::WriteBack,
            MemType::Uc => EptMemoryType::Uncacheable,
            MemType::Wc => EptMemoryType::WriteCombining,
            MemType::Wt => EptMemoryType::WriteThrough,
        };
        Some(EptAttrs { memory_type, ignore_pat: true })
    }
}

impl<U: Usage> Driven for LongModeFormat<U> {
    fn attrs(mem: MemType) -> Option<LongModeAttrs> {
        let memory_type = match mem {
            MemType::Wb => MemoryType::WriteBack,
            MemType::Uc => MemoryType::Uncacheable,
            MemType::Wc => MemoryType::WriteCombining,
            MemType::Wt => MemoryType::WriteThrough,
        };
        Some(LongModeAttrs { selector: Pat::RESET.selector(memory_type)?, ..LongModeAttrs::default() })
    }
}

fn ept(levels: Levels) -> (Ept, Shape) {
    let bits = if levels == Levels::Five { 57 } else { 48 };
    (Ept::new(EptOptions { levels, ..EptOptions::default() }).unwrap(), Shape::ept().with_bits(bits, 52).unwrap())
}

fn long_mode(levels: Levels) -> LongModeOptions {
    LongModeOptions { levels, ..LongModeOptions::default() }
}

macro_rules! compare {
    ($name:ident, $make:expr) => {
        #[test]
        fn $name() {
            let (_, shape) = $make;
            let strategy = spte_model::strategy::ops(&shape, 0..200);
            proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }, |(ops in strategy)| {
                let (format, shape) = $make;
                agree(format, shape, &ops);
            });
        }
    };
}

compare!(ept_of_four_levels_does_as_the_model, ept(Levels::Four));
compare!(ept_of_five_levels_does_as_the_model, ept(Levels::Five));
compare!(npt_does_as_the_model, (Npt::new(long_mode(Levels::Four)).unwrap(), Shape::npt()));
compare!(long_mode_does_as_the_model, (LongMode::new(long_mode(Levels::Four)).unwrap(), Shape::x86_64()));
compare!(la57_does_as_the_model, (LongMode::new(long_mode(Levels::Five)).unwrap(), Shape::x86_64_la57()));

/// Scripts whose answers are written out: what Linux's TDP MMU makes of the same operations.
#[test]
fn scripts_end_in_the_leaves_that_are_written_down() {
    // Mask of the entry bits that do not depend on anybody's policy.
    let mask = |level: u8| if level == 1 { 0x000f_ffff_ffff_f17f } else { 0x000f_ffff_ffff_f1ff };
    let run = |script: &str| {
        let (format, shape) = ept(Levels::Four);
        let ops: Vec<Op> = parse_script(&shape, script)
            .unwrap()
            .into_iter()
            .filter_map(|(_, command)| match command {
                spte_model::Command::Op(op) => Some(op),
                _ => None,
            })
            .collect();
        agree(format, shape.clone(), &ops);
        let mut driver = Driver::new(ept(Levels::Four).0, shape);
        ops.iter().for_each(|op| drop(driver.apply(op).unwrap()));
        let mut rows = Vec::new();
        let whole = notifier_core::AddrRange::with_len(notifier_core::Gpa::new(0), 1 << 48).unwrap();
        driver.table.visit(whole, |found| {
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
