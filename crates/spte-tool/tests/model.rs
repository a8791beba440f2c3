// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command against the plain sequential truth: random scripts, every answer, and the table's raw entries.
//!
//! The model knows no bits; what its leaves look like in each format is written out below, from the manuals.

mod common;

use common::spte;
use proptest::prelude::*;
use spte_model::{Access, Leaf, MemType, Model, Op, Outcome, PageChoice, Shape};

/// A format, as options of the command and as what the model has to know.
struct Case {
    options: &'static str,
    shape: Shape,
    ept: bool,
    top: u8,
}

impl Case {
    /// The leaf as a dump prints it, dirty left out.
    fn raw(&self, leaf: &Leaf) -> u64 {
        let has = |right: Access, bit: u64| if leaf.access.contains(right) { bit } else { 0 };
        let write = if leaf.writable() { 2 } else { 0 };
        let size = if leaf.size > 4096 { 0x80 } else { 0 };
        if self.ept {
            let mem = match leaf.mem {
                MemType::Uc => 0,
                MemType::Wc => 1,
                MemType::Wt => 4,
                MemType::Wb => 6,
            };
            let accessed = if leaf.accessed { 0x100 } else { 0 };
            leaf.out | has(Access::R, 1) | write | has(Access::X, 4) | mem << 3 | 0x40 | size | accessed
        } else {
            let mem = match leaf.mem {
                MemType::Wb => 0,
                MemType::Wt => 0x8,
                MemType::Uc => 0x18,
                MemType::Wc => unreachable!("refused"),
            };
            let accessed = if leaf.accessed { 0x20 } else { 0 };
            let execute = if leaf.access.contains(Access::X) { 0 } else { 1 << 63 };
            leaf.out | 1 | write | 4 | mem | size | accessed | execute
        }
    }

    fn dirty_bit(&self) -> u64 {
        if self.ept { 0x200 } else { 0x40 }
    }

    fn level(size: u64) -> u8 {
        match size {
            0x1000 => 1,
            0x20_0000 => 2,
            _ => 3,
        }
    }

    /// What `dump` prints, dirty of leaves apart: each table on the way to a leaf once, then the leaf.
    fn dump(&self, model: &Model) -> Vec<String> {
        let link: u64 = if self.ept { 0x107 } else { 0x27 };
        let mut rows = Vec::new();
        let mut last = None;
        for (gpa, leaf) in model.leaves() {
            let level = Self::level(leaf.size);
            for above in (level + 1..=self.top).rev() {
                let shift = 12 + 9 * u32::from(above - 1);
                if last.is_none_or(|last: u64| last >> shift != gpa >> shift) {
                    rows.push(format!("L{above} {:#x} {link:016x}", gpa >> shift << shift));
                }
            }
            rows.push(format!("L{level} {gpa:#x} {:016x}", self.raw(leaf)));
            last = Some(gpa);
        }
        rows.push(format!("end {}", rows.len()));
        rows
    }

    /// Rows of `dump` without the dirty bit of leaves, which must say nothing that the model does not.
    fn check_dump(&self, model: &Model, rows: &[&str]) {
        let clean = |row: &&str| {
            let words: Vec<&str> = row.split(' ').collect();
            let [level, gpa, raw] = words[..] else { return String::from(*row) };
            let number = u64::from_str_radix(raw, 16).unwrap();
            let start = u64::from_str_radix(&gpa[2..], 16).unwrap();
            let leaf = level == "L1" || number & 0x80 != 0;
            if leaf && number & self.dirty_bit() != 0 {
                assert!(model.leaf(start).unwrap().1.dirty, "{row}");
            }
            format!("{level} {gpa} {:016x}", number & !if leaf { self.dirty_bit() } else { 0 })
        };
        let found: Vec<String> = rows.iter().map(clean).collect();
        assert_eq!(found, self.dump(model));
    }

    /// Runs the operations that the model takes, with a dump after each while there are few leaves.
    fn agrees(&self, ops: &[Op]) {
        let mut model = Model::new(self.shape.clone());
        let mut script = String::new();
        let mut expected = Vec::new();
        for op in ops {
            let named = |size: &u64| PageChoice::WORDS.iter().any(|(_, named)| named == size);
            if matches!(op, Op::Map { page: PageChoice::Size(size), .. } if !named(size)) {
                continue;
            }
            let Ok(outcome) = model.apply(op) else { continue };
            script += &format!("{op}\n");
            let few = model.leaves().take(1000).count() < 1000;
            if few {
                script += "dump\n";
            }
            expected.push((op, outcome, few.then(|| model.clone())));
        }
        let words: Vec<&str> = ["run", "--format"].into_iter().chain(self.options.split(' ')).collect();
        let (status, out, err) = spte(&words, script.as_bytes());
        assert_eq!((status, err.as_str()), (0, ""), "{script}");
        let mut lines = out.lines();
        let mut listing = || {
            let mut rows = Vec::new();
            loop {
                let row = lines.next().unwrap();
                rows.push(row);
                if row.starts_with("end ") || !(row.starts_with('L') || row.starts_with("0x")) {
                    return rows;
                }
            }
        };
        for (op, outcome, model) in expected {
            let answer = listing();
            match outcome {
                Outcome::Walk { leaf } => {
                    let [.., row, end] = answer[..] else { panic!("{op}: {answer:?}") };
                    assert_eq!(end, format!("end {}", answer.len() - 1));
                    assert!(answer[0].starts_with(&format!("L{} ", self.top)), "{op}: {answer:?}");
                    let words: Vec<&str> = row.split(' ').collect();
                    match leaf {
                        None => assert_eq!(words[2], "0000000000000000", "{op}"),
                        Some((gpa, leaf)) => {
                            let place = [format!("L{}", Self::level(leaf.size)), format!("{gpa:#x}")];
                            assert_eq!(words[..2], place, "{op}");
                            let raw = u64::from_str_radix(words[2], 16).unwrap();
                            assert_eq!(raw & !self.dirty_bit(), self.raw(&leaf), "{op}");
                        }
                    }
                }
                outcome => assert_eq!(answer.join("\n"), outcome.to_string(), "{op} in\n{script}"),
            }
            if let Some(model) = model {
                self.check_dump(&model, &listing());
            }
        }
        assert_eq!(lines.next(), None);
    }
}

/// Where nothing else is said, as many cases as CI has time for; `PROPTEST_CASES` for more.
fn check(case: &Case) {
    let strategy = spte_model::strategy::ops(&case.shape, 0..100);
    proptest!(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() }, |(ops in strategy)| {
        case.agrees(&ops);
    });
}

macro_rules! compare {
    ($name:ident, $options:expr, $shape:expr, $ept:expr, $top:expr) => {
        #[test]
        fn $name() {
            check(&Case { options: $options, shape: $shape, ept: $ept, top: $top });
        }
    };
}

compare!(ept_answers_as_the_model, "ept", Shape::ept(), true, 4);
compare!(ept_without_hardware_ad_answers_as_the_model, "ept --hw-ad=off", Shape::ept().with_hw_ad(false), true, 4);
compare!(
    ept_of_five_levels_answers_as_the_model,
    "ept --levels 5 --ipa-bits 52 --pa-bits 46",
    Shape::ept().with_bits(52, 46).unwrap(),
    true,
    5
);
compare!(npt_answers_as_the_model, "npt", Shape::npt(), false, 4);
compare!(npt_without_hardware_ad_answers_as_the_model, "npt --hw-ad=off", Shape::npt().with_hw_ad(false), false, 4);
compare!(
    narrow_npt_answers_as_the_model,
    "npt --ipa-bits 32 --pa-bits 32",
    Shape::npt().with_bits(32, 32).unwrap(),
    false,
    4
);
compare!(x86_64_answers_as_the_model, "x86-64", Shape::x86_64(), false, 4);
compare!(la57_answers_as_the_model, "x86-64-la57", Shape::x86_64_la57(), false, 5);
