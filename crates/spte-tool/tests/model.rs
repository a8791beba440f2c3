// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command against the plain sequential truth: random scripts, every answer, and the table's raw entries.
//!
//! The model knows no bits; what its leaves look like in each format is written out below, from the manuals.

mod common;

use common::spte;
use proptest::prelude::*;
use spte_model::{Access, Leaf, MemType, Model, Op, Outcome, PageChoice, Shape};

/// What entries look like.
#[derive(Clone, Copy)]
enum Bits {
    Ept,
    /// NPT and long mode.
    LongMode,
    /// KVM's table for 64-bit MIPS.
    Mips,
    /// arm64 stage 2.
    Stage2 {
        /// Hardware records writes: DBM.
        hw_ad: bool,
        /// Descriptors for addresses of more than 48 bits.
        wide: bool,
    },
    /// Partition-scoped radix trees.
    Radix,
}

/// A format, as options of the command and as what the model has to know.
struct Case {
    options: &'static str,
    shape: Shape,
    bits: Bits,
    /// How many levels there are.
    levels: u32,
}

impl Case {
    /// The leaf as a dump prints it, dirty left out.
    fn raw(&self, leaf: &Leaf) -> u64 {
        let has = |right: Access, bit: u64| if leaf.access.contains(right) { bit } else { 0 };
        let size = if leaf.size > 4096 { 0x80 } else { 0 };
        let write = if leaf.writable() { 2 } else { 0 };
        match self.bits {
            Bits::Ept => {
                let mem = match leaf.mem {
                    MemType::Uc => 0,
                    MemType::Wc => 1,
                    MemType::Wt => 4,
                    MemType::Wb => 6,
                };
                let accessed = if leaf.accessed { 0x100 } else { 0 };
                leaf.out | has(Access::R, 1) | write | has(Access::X, 4) | mem << 3 | 0x40 | size | accessed
            }
            Bits::LongMode => {
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
            Bits::Radix => {
                let mem = match leaf.mem {
                    MemType::Wb => 0,
                    MemType::Uc => 2,
                    MemType::Wc => 3,
                    MemType::Wt => unreachable!("refused"),
                };
                let accessed = if leaf.accessed { 0x100 } else { 0 };
                3 << 62 | leaf.out | mem << 4 | has(Access::R, 4) | write | has(Access::X, 1) | accessed
            }
            Bits::Mips => {
                let mem = match leaf.mem {
                    MemType::Wt => 0,
                    MemType::Uc => 2,
                    MemType::Wb => 3,
                    MemType::Wc => 7,
                };
                let lacks = |right: Access, bit: u64| if leaf.access.contains(right) { 0 } else { bit };
                let (valid, dirty) = (if leaf.accessed { 0x80 } else { 0 }, if leaf.writable() { 0x100 } else { 0 });
                leaf.out | mem << 9 | dirty | valid | lacks(Access::R, 0x20) | lacks(Access::X, 0x10)
            }
            Bits::Stage2 { hw_ad, wide } => {
                let mem = match leaf.mem {
                    MemType::Uc => 1,
                    MemType::Wc => 5,
                    MemType::Wt => 10,
                    MemType::Wb => 15,
                };
                let page = if leaf.size == self.shape.granule() { 2 } else { 0 };
                let write = match (leaf.writable(), hw_ad) {
                    (false, _) => 0,
                    (true, false) => 0x80,
                    (true, true) => 1 << 51,
                };
                let accessed = if leaf.accessed { 0x400 } else { 0 };
                let execute = if leaf.access.contains(Access::X) { 0 } else { 1 << 54 };
                let (output, shareability) = match (wide, self.shape.granule()) {
                    (false, _) => (leaf.out, 0x300),
                    (true, 0x1_0000) => (leaf.out & 0xffff_ffff_ffff | leaf.out >> 48 << 12, 0x300),
                    // Shareability is VTCR_EL2's.
                    (true, _) => (leaf.out & 0x3_ffff_ffff_ffff | leaf.out >> 50 << 8, 0),
                };
                output | 1 | page | mem << 2 | has(Access::R, 0x40) | write | shareability | accessed | execute
            }
        }
    }

    fn dirty_bit(&self) -> u64 {
        match self.bits {
            Bits::Radix => 0x80,
            Bits::Ept => 0x200,
            Bits::LongMode => 0x40,
            Bits::Stage2 { hw_ad: true, .. } => 0x80,
            // Who may write has written, for all that the entry says.
            Bits::Mips | Bits::Stage2 { hw_ad: false, .. } => 0,
        }
    }

    /// Of the level `n`.
    fn link(&self, n: u32) -> u64 {
        match self.bits {
            // NLS: the size of the table below.
            Bits::Radix => 1 << 63 | u64::from(self.shift(n) - self.shift(n - 1)),
            Bits::Ept => 0x107,
            Bits::LongMode => 0x27,
            Bits::Mips => 0x9800_0000_0000_0000,
            Bits::Stage2 { .. } => 3,
        }
    }

    fn is_leaf(&self, level: &str, raw: u64) -> bool {
        match self.bits {
            Bits::Radix => raw >> 62 & 1 == 1,
            Bits::Ept | Bits::LongMode => level == "L1" || raw & 0x80 != 0,
            Bits::Mips => level == "L1",
            Bits::Stage2 { .. } => level == "L3" || raw & 2 == 0,
        }
    }

    /// log2 of what an entry spans, `n` levels up from the smallest pages, which are 1.
    fn shift(&self, n: u32) -> u32 {
        let granule = self.shape.granule().trailing_zeros();
        match (self.bits, n) {
            (Bits::Radix, 2..) => 21 + 9 * (n - 2),
            _ => granule + (granule - 3) * (n - 1),
        }
    }

    /// The architecture's number of that level.
    fn number(&self, n: u32) -> i64 {
        match self.bits {
            Bits::Ept | Bits::LongMode | Bits::Radix | Bits::Mips => n.into(),
            Bits::Stage2 { .. } => 4 - i64::from(n),
        }
    }

    fn level(&self, size: u64) -> u32 {
        (1..).find(|n| self.shift(*n) == size.trailing_zeros()).unwrap()
    }

    /// What `dump` prints, dirty of leaves apart: each table on the way to a leaf once, then the leaf.
    fn dump(&self, model: &Model) -> Vec<String> {
        let mut rows = Vec::new();
        let mut last = None;
        for (gpa, leaf) in model.leaves() {
            let level = self.level(leaf.size);
            for above in (level + 1..=self.levels).rev() {
                let (shift, link) = (self.shift(above), self.link(above));
                if last.is_none_or(|last: u64| last >> shift != gpa >> shift) {
                    rows.push(format!("L{} {:#x} {link:016x}", self.number(above), gpa >> shift << shift));
                }
            }
            rows.push(format!("L{} {gpa:#x} {:016x}", self.number(level), self.raw(leaf)));
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
            let leaf = self.is_leaf(level, number);
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
                    assert!(answer[0].starts_with(&format!("L{} ", self.number(self.levels))), "{op}: {answer:?}");
                    let words: Vec<&str> = row.split(' ').collect();
                    match leaf {
                        None => assert_eq!(words[2], "0000000000000000", "{op}"),
                        Some((gpa, leaf)) => {
                            let place = [format!("L{}", self.number(self.level(leaf.size))), format!("{gpa:#x}")];
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

/// Where nothing else is said, as many cases as CI has time for, or one in `part` of them; `PROPTEST_CASES` for more.
fn check(case: &Case, part: u32) {
    let strategy = spte_model::strategy::ops(&case.shape, 0..100);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let config = ProptestConfig { cases: config.cases.div_ceil(part), ..config };
    proptest!(config, |(ops in strategy)| {
        case.agrees(&ops);
    });
}

macro_rules! compare {
    ($($name:ident $(, one in $part:literal)?: $options:expr, $shape:expr, $bits:expr, $levels:expr;)*) => {
        $(
            #[test]
            fn $name() {
                let case = Case { options: $options, shape: $shape, bits: $bits, levels: $levels };
                check(&case, 1 $(* $part)?);
            }
        )*
    };
}

/// Stage 2 with these leaf sizes and address widths.
fn stage2(sizes: &[u64], ipa_bits: u32, pa_bits: u32) -> Shape {
    Shape::new(sizes, ipa_bits, pa_bits).unwrap()
}

/// A radix tree with output addresses of so many bits.
fn radix(page: u64, pa_bits: u32) -> Shape {
    Shape::ppc_radix(page).unwrap().with_bits(52, pa_bits).unwrap()
}

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;
const SOFTWARE: Bits = Bits::Stage2 { hw_ad: false, wide: false };
const HARDWARE: Bits = Bits::Stage2 { hw_ad: true, wide: false };

compare! {
    ept_answers_as_the_model: "ept", Shape::ept(), Bits::Ept, 4;
    ept_without_hardware_ad_answers_as_the_model: "ept --hw-ad=off", Shape::ept().with_hw_ad(false), Bits::Ept, 4;
    ept_of_five_levels_answers_as_the_model:
        "ept --levels 5 --ipa-bits 52 --pa-bits 46", Shape::ept().with_bits(52, 46).unwrap(), Bits::Ept, 5;
    npt_answers_as_the_model: "npt", Shape::npt(), Bits::LongMode, 4;
    npt_without_hardware_ad_answers_as_the_model: "npt --hw-ad=off", Shape::npt().with_hw_ad(false), Bits::LongMode, 4;
    narrow_npt_answers_as_the_model:
        "npt --ipa-bits 32 --pa-bits 32", Shape::npt().with_bits(32, 32).unwrap(), Bits::LongMode, 4;
    x86_64_answers_as_the_model: "x86-64", Shape::x86_64(), Bits::LongMode, 4;
    la57_answers_as_the_model: "x86-64-la57", Shape::x86_64_la57(), Bits::LongMode, 5;
    mips_answers_as_the_model, one in 4: "mips64", Shape::new(&[4 * K], 48, 48).unwrap(), Bits::Mips, 4;
    mips_of_64k_answers_as_the_model, one in 16:
        "mips64 --granule 64k --ipa-bits 42", Shape::new(&[64 * K], 42, 48).unwrap(), Bits::Mips, 2;
    arm64_answers_as_the_model: "arm64-s2", stage2(&[4 * K, 2 * M, G], 40, 48), SOFTWARE, 3;
    arm64_with_hardware_ad_answers_as_the_model:
        "arm64-s2 --hw-ad", stage2(&[4 * K, 2 * M, G], 40, 48).with_hw_ad(true), HARDWARE, 3;
    arm64_of_four_levels_answers_as_the_model, one in 2:
        "arm64-s2 --ipa-bits 48 --pa-bits 44", stage2(&[4 * K, 2 * M, G], 48, 44), SOFTWARE, 4;
    arm64_of_16k_answers_as_the_model, one in 2: "arm64-s2 --granule 16k", stage2(&[16 * K, 32 * M], 40, 48), SOFTWARE, 2;
    arm64_of_16k_with_hardware_ad_answers_as_the_model, one in 2:
        "arm64-s2 --granule 16k --ipa-bits 47 --hw-ad", stage2(&[16 * K, 32 * M], 47, 48).with_hw_ad(true), HARDWARE, 3;
    arm64_of_64k_answers_as_the_model, one in 2:
        "arm64-s2 --granule 64k --ipa-bits 44", stage2(&[64 * K, 512 * M], 44, 48), SOFTWARE, 2;
    arm64_of_64k_with_hardware_ad_answers_as_the_model, one in 2:
        "arm64-s2 --granule 64k --hw-ad", stage2(&[64 * K, 512 * M], 40, 48).with_hw_ad(true), HARDWARE, 2;
    radix_answers_as_the_model: "ppc-radix", radix(4 * K, 52), Bits::Radix, 4;
    radix_of_64k_answers_as_the_model: "ppc-radix --granule 64k", radix(64 * K, 52), Bits::Radix, 4;
    radix_without_hardware_ad_answers_as_the_model, one in 2:
        "ppc-radix --granule 64k --hw-ad=off", radix(64 * K, 52).with_hw_ad(false), Bits::Radix, 4;
    narrow_radix_answers_as_the_model, one in 2: "ppc-radix --ipa-bits 34 --pa-bits 40",
        radix(4 * K, 40).with_bits(34, 40).unwrap(), Bits::Radix, 4;
    wide_arm64_answers_as_the_model, one in 8:
        "arm64-s2 --ipa-bits 52 --pa-bits 52 --levels 5",
        stage2(&[4 * K, 2 * M, G, 512 * G], 52, 52), Bits::Stage2 { hw_ad: false, wide: true }, 5;
    wide_arm64_of_16k_answers_as_the_model, one in 8:
        "arm64-s2 --granule 16k --ipa-bits 51 --pa-bits 51 --hw-ad",
        stage2(&[16 * K, 32 * M, 64 * G], 51, 51).with_hw_ad(true), Bits::Stage2 { hw_ad: true, wide: true }, 3;
    wide_arm64_of_64k_answers_as_the_model, one in 8:
        "arm64-s2 --granule 64k --ipa-bits 48 --pa-bits 52",
        stage2(&[64 * K, 512 * M, 4096 * G], 48, 52), Bits::Stage2 { hw_ad: false, wide: true }, 3;
}
