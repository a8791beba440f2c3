// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The command's parser against the model's, which shares no code with it.

use proptest::prelude::*;
use spte_model::{Op, Shape};
use spte_tool::script::{self, Command, Limits, Page, Touch};

fn limits(shape: &Shape) -> Limits {
    Limits { granule: shape.granule(), gpa_bits: shape.gpa_bits(), pa_bits: shape.out_bits() }
}

/// The command as the line that means it, spelt as the model spells it.
fn spelt(command: &Command) -> String {
    let name = command.name();
    match *command {
        Command::Map { range, pa, rights, page, mem } => {
            let page = match page {
                None => String::new(),
                Some(Page::Max) => " page=max".into(),
                Some(Page::Size(size)) => format!(
                    " page={}",
                    if size >= 1 << 30 {
                        "1g".into()
                    } else if size >= 1 << 20 {
                        format!("{}m", size >> 20)
                    } else {
                        format!("{}k", size >> 10)
                    }
                ),
            };
            let mem = ["", " mem=uc", " mem=wc", " mem=wt"][mem as usize];
            format!("map {:#x} {pa:#x} {:#x} {}{page}{mem}", range.gpa, range.size, letters(rights))
        }
        Command::Protect { range, rights } => {
            format!("protect {:#x} {:#x} {}", range.gpa, range.size, letters(rights))
        }
        Command::Unmap(range)
        | Command::WriteProtect(range)
        | Command::Age(range)
        | Command::Dirty(range)
        | Command::Split(range)
        | Command::Collapse(range) => format!("{name} {:#x} {:#x}", range.gpa, range.size),
        Command::Touch { gpa, kind } => {
            let kind = match kind {
                Touch::Read => "r",
                Touch::Write => "w",
                Touch::Execute => "x",
            };
            format!("touch {gpa:#x} {kind}")
        }
        Command::Change { gpa, pa } | Command::ZapChange { gpa, pa } => format!("{name} {gpa:#x} {pa:#x}"),
        Command::Walk { gpa } => format!("walk {gpa:#x}"),
        Command::Flushes | Command::Stats | Command::Dump => name.into(),
    }
}

fn letters(rights: notifier_core::Access) -> &'static str {
    ["-", "r", "w", "rw", "x", "rx", "wx", "rwx"][usize::from(rights.bits())]
}

fn same(line: &str) {
    let ours = script::parse(line.as_bytes());
    match line.parse::<spte_model::Command>() {
        Ok(spte_model::Command::Op(op)) => {
            let ours = ours.unwrap().unwrap();
            assert_eq!(spelt(&ours), op.to_string());
            let shape = Shape::ept();
            let (checked, expected) = (ours.check(&limits(&shape)), op.check(&shape));
            assert_eq!(checked.is_ok(), expected.is_ok(), "{line}: {checked:?}, {expected:?}");
        }
        Ok(other) => assert_eq!(spelt(&ours.unwrap().unwrap()), format!("{other:?}").to_lowercase()),
        Err(spte_model::ParseError::Empty) => assert_eq!(ours, Ok(None), "{line}"),
        Err(_) => assert!(ours.is_err(), "{line}: {ours:?}"),
    }
}

#[test]
fn both_parsers_take_what_the_language_has() {
    for line in
        ["flushes", "stats # x", "dump", "", "#", "map 0 0x1000 4m rwx page=2m mem=wb", "age 1 2t", "walk 0xFf\r"]
    {
        same(line);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn operations_read_the_same(op in spte_model::strategy::op(&Shape::ept())) {
        same(&op.to_string());
    }

    #[test]
    fn words_read_the_same(words in prop::collection::vec(prop::sample::select(vec![
        "map", "unmap", "protect", "touch", "age", "change", "walk", "dump", "stats", "0", "0x", "0x1000", "4096", "4k", "2m",
        "1g", "0x4k", "k", "16777216t", "99999999999999999999", "r", "w", "x", "rwx", "wr", "-", "page=2m", "page=max",
        "page=", "mem=uc", "mem=wp", "page=4k=", "#", "+1", "é", "\u{a0}", "\t", "\r", "0xfffffffffffff000", "0x1p",
    ]), 0..8)) {
        same(&words.join(" "));
    }

    #[test]
    fn near_misses_read_the_same(
        op in spte_model::strategy::op(&Shape::npt()), at in any::<prop::sample::Index>(), with in "[0-9a-z#= -]|\\PC"
    ) {
        let mut line: Vec<char> = Op::to_string(&op).chars().collect();
        let at = at.index(line.len());
        line.splice(at..at + 1, with.chars());
        let line: String = line.into_iter().filter(|c| *c != '\n').collect();
        same(&line);
    }
}
