// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The script language: one command a line, `#` begins a comment, blank lines say nothing.
//!
//! Numbers are decimal or `0x` hex; a size may also be decimal with one of the units `k m g t`.
//! Words are separated by spaces (any ASCII white space is taken for one). `page=` and `mem=` may
//! come in either order, each once.

use std::str::FromStr;

use thiserror::Error;

use crate::check::Reject;
use crate::op::{Access, MemType, Op, PageChoice, TouchKind};
use crate::shape::Shape;

/// One command: an operation, or a report on raw entries and hardware, which is the table's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Command {
    /// An operation.
    Op(Op),
    /// The flushes asked of the hardware so far.
    Flushes,
    /// Figures about the table.
    Stats,
    /// Every entry.
    Dump,
}

/// Why a line is not a command.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum ParseError {
    /// The line has no word in it.
    #[error("no command")]
    Empty,
    /// The first word is no command.
    #[error("unknown command {word:?}")]
    Command {
        /// The offending word.
        word: String,
    },
    /// The line ends too early.
    #[error("a word is missing: {what}")]
    Missing {
        /// What should have come next.
        what: &'static str,
    },
    /// The word is not what belongs in its place.
    #[error("{word:?} is not {what}")]
    Word {
        /// The offending word.
        word: String,
        /// What belongs there.
        what: &'static str,
    },
    /// A number that does not fit 64 bits.
    #[error("{word:?} does not fit 64 bits")]
    TooLarge {
        /// The offending word.
        word: String,
    },
    /// The line goes on where it should end, or repeats an option.
    #[error("unexpected word {word:?}")]
    Extra {
        /// The offending word.
        word: String,
    },
}

/// Why a script stops, and at which line (the first is 1).
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("line {line}: {why}")]
pub struct ScriptError {
    /// The line.
    pub line: usize,
    /// What is wrong with it.
    #[source]
    pub why: Why,
}

/// What is wrong with a line.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Why {
    /// It does not parse.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// Its operation is malformed.
    #[error(transparent)]
    Reject(#[from] Reject),
}

/// The commands of a script, one after the other, each with its line number and checked against a
/// shape. The first error is the last item: earlier output stands, nothing more is run.
#[derive(Clone, Debug)]
pub struct Script<'a> {
    lines: std::iter::Enumerate<std::str::Lines<'a>>,
    shape: &'a Shape,
    failed: bool,
}

impl<'a> Script<'a> {
    /// Reads `text` as a script for tables of this shape.
    pub fn new(shape: &'a Shape, text: &'a str) -> Script<'a> {
        Script { lines: text.lines().enumerate(), shape, failed: false }
    }
}

impl Iterator for Script<'_> {
    type Item = Result<(usize, Command), ScriptError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        let (index, line) = self.lines.find(|(_, line)| words(line).next().is_some())?;
        let command = line.parse::<Command>().map_err(Why::from).and_then(|command| {
            if let Command::Op(op) = &command {
                op.check(self.shape)?;
            }
            Ok(command)
        });
        self.failed = command.is_err();
        let line = index + 1;
        Some(command.map(|command| (line, command)).map_err(|why| ScriptError { line, why }))
    }
}

/// All commands of a script with their line numbers.
///
/// # Errors
/// The first line that does not parse or is malformed for this shape.
pub fn parse_script(shape: &Shape, text: &str) -> Result<Vec<(usize, Command)>, ScriptError> {
    Script::new(shape, text).collect()
}

impl FromStr for Op {
    type Err = ParseError;

    /// Parses one line that must hold an operation.
    fn from_str(line: &str) -> Result<Op, ParseError> {
        match line.parse()? {
            Command::Op(op) => Ok(op),
            Command::Flushes | Command::Stats | Command::Dump => {
                let word = words(line).collect();
                Err(ParseError::Word { word, what: "an operation" })
            }
        }
    }
}

impl FromStr for Command {
    type Err = ParseError;

    /// Parses one line that must hold a command.
    fn from_str(line: &str) -> Result<Command, ParseError> {
        let mut words = words(line);
        let command = words.next().ok_or(ParseError::Empty)?;
        let next = &mut words;
        let op = match command {
            "map" => {
                let (gpa, out, size) = (address(next)?, address(next)?, size(next)?);
                let access = access(next)?;
                let (page, mem) = options(next)?;
                Op::Map { gpa, out, size, access, page, mem }
            }
            "unmap" => Op::Unmap { gpa: address(next)?, size: size(next)? },
            "protect" => {
                let (gpa, size) = (address(next)?, size(next)?);
                Op::Protect { gpa, size, access: access(next)? }
            }
            "wrprotect" => Op::WriteProtect { gpa: address(next)?, size: size(next)? },
            "touch" => Op::Touch { gpa: address(next)?, kind: kind(next)? },
            "age" => Op::Age { gpa: address(next)?, size: size(next)? },
            "dirty" => Op::Dirty { gpa: address(next)?, size: size(next)? },
            "change" => Op::Change { gpa: address(next)?, out: address(next)? },
            "zapchange" => Op::ZapChange { gpa: address(next)?, out: address(next)? },
            "split" => Op::Split { gpa: address(next)?, size: size(next)? },
            "collapse" => Op::Collapse { gpa: address(next)?, size: size(next)? },
            "walk" => Op::Walk { gpa: address(next)? },
            "flushes" => return end(next).map(|()| Command::Flushes),
            "stats" => return end(next).map(|()| Command::Stats),
            "dump" => return end(next).map(|()| Command::Dump),
            word => return Err(ParseError::Command { word: word.into() }),
        };
        end(next).map(|()| Command::Op(op))
    }
}

fn words(line: &str) -> impl Iterator<Item = &str> {
    // A split always has a first part.
    line.split('#').next().unwrap_or_default().split_ascii_whitespace()
}

fn word<'a>(words: &mut impl Iterator<Item = &'a str>, what: &'static str) -> Result<&'a str, ParseError> {
    words.next().ok_or(ParseError::Missing { what })
}

fn end<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<(), ParseError> {
    words.next().map_or(Ok(()), |word| Err(ParseError::Extra { word: word.into() }))
}

fn address<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<u64, ParseError> {
    let what = "an address";
    let word = word(words, what)?;
    number(word, word, what)
}

fn size<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<u64, ParseError> {
    let what = "a size";
    let word = word(words, what)?;
    for (unit, shift) in [("k", 10), ("m", 20), ("g", 30), ("t", 40)] {
        // Hex takes no unit: no unit is a hex digit, so one after `0x` is simply no number.
        if let Some(count) = word.strip_suffix(unit).filter(|count| !count.starts_with("0x")) {
            return number(count, word, what)?
                .checked_mul(1 << shift)
                .ok_or_else(|| ParseError::TooLarge { word: word.into() });
        }
    }
    number(word, word, what)
}

/// `from_str_radix` alone would take a sign, too.
fn number(digits: &str, word: &str, what: &'static str) -> Result<u64, ParseError> {
    let (digits, radix) = digits.strip_prefix("0x").map_or((digits, 10), |hex| (hex, 16));
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(ParseError::Word { word: word.into(), what });
    }
    u64::from_str_radix(digits, radix).map_err(|_| ParseError::TooLarge { word: word.into() })
}

/// The word for a value, looked up among those that the values print as.
fn named<T: Copy + ToString>(word: &str, values: &[T], what: &'static str) -> Result<T, ParseError> {
    let found = values.iter().copied().find(|value| value.to_string() == word);
    found.ok_or_else(|| ParseError::Word { word: word.into(), what })
}

fn access<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<Access, ParseError> {
    let what = "a subset of rwx in that order, or -";
    named(word(words, what)?, &Access::ALL, what)
}

fn kind<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<TouchKind, ParseError> {
    let what = "r, w or x";
    match word(words, what)? {
        "r" => Ok(TouchKind::Read),
        "w" => Ok(TouchKind::Write),
        "x" => Ok(TouchKind::Execute),
        word => Err(ParseError::Word { word: word.into(), what }),
    }
}

fn options<'a>(words: &mut impl Iterator<Item = &'a str>) -> Result<(PageChoice, MemType), ParseError> {
    let (mut page, mut mem) = (None, None);
    for word in words {
        if let (Some(value), None) = (word.strip_prefix("page="), page) {
            page = Some(match PageChoice::WORDS.iter().find(|named| named.0 == value) {
                Some(&(_, size)) => PageChoice::Size(size),
                None if value == "max" => PageChoice::Max,
                None => {
                    let what = "page=4k|16k|64k|2m|32m|512m|1g|max";
                    return Err(ParseError::Word { word: word.into(), what });
                }
            });
        } else if let (Some(value), None) = (word.strip_prefix("mem="), mem) {
            mem = Some(named(value, &MemType::ALL, "mem=wb|uc|wc|wt")?);
        } else {
            return Err(ParseError::Extra { word: word.into() });
        }
    }
    Ok((page.unwrap_or_default(), mem.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn error(line: &str) -> String {
        line.parse::<Command>().unwrap_err().to_string()
    }

    #[test]
    fn every_command_parses() {
        let map = Op::Map {
            gpa: 0x1000,
            out: 4096,
            size: 1 << 40,
            access: Access::RX,
            page: PageChoice::Size(32 << 20),
            mem: MemType::Wc,
        };
        assert_eq!("map 0x1000 4096 1t rx page=32m mem=wc".parse(), Ok(Command::Op(map)));
        assert_eq!(" map 4096 0x1000 1024g  rx mem=wc page=32m#x".parse(), Ok(Command::Op(map)));
        for line in [
            "map 0x0 0x0 0x1000 -",
            "map 0x0 0x0 0x1000 rwx page=max mem=uc",
            "unmap 0x1000 0x2000",
            "protect 0x1000 0x2000 rw",
            "wrprotect 0x0 0x2000000000",
            "touch 0x123 x",
            "age 0x1000 0x2000",
            "dirty 0x1000 0x2000",
            "change 0x1000 0x2000",
            "zapchange 0x1000 0x2000",
            "split 0x1000 0x2000",
            "collapse 0x1000 0x2000",
            "walk 0xfff",
        ] {
            assert_eq!(line.parse::<Op>().unwrap().to_string(), line);
        }
        assert_eq!("flushes".parse(), Ok(Command::Flushes));
        assert_eq!("stats".parse(), Ok(Command::Stats));
        assert_eq!("dump#".parse(), Ok(Command::Dump));
    }

    #[test]
    fn what_is_no_command_is_said_so() {
        assert_eq!(error("Map 0 0 4k r"), r#"unknown command "Map""#);
        assert_eq!(error("unmap 0"), "a word is missing: a size");
        assert_eq!(error("unmap 0 4k 4k"), r#"unexpected word "4k""#);
        assert_eq!(error("unmap 4k 4k"), r#""4k" is not an address"#);
        assert_eq!(error("unmap +1 4k"), r#""+1" is not an address"#);
        assert_eq!(error("unmap 0x 4k"), r#""0x" is not an address"#);
        assert_eq!(error("unmap 0 0x4k"), r#""0x4k" is not a size"#);
        assert_eq!(error("unmap 0 k"), r#""k" is not a size"#);
        assert_eq!(error("unmap 0 4é"), r#""4é" is not a size"#);
        assert_eq!(error("walk 0x10000000000000000"), r#""0x10000000000000000" does not fit 64 bits"#);
        assert_eq!(error("age 0 16777216t"), r#""16777216t" does not fit 64 bits"#);
        assert_eq!(error("protect 0 4k wr"), r#""wr" is not a subset of rwx in that order, or -"#);
        assert_eq!(error("touch 0 rw"), r#""rw" is not r, w or x"#);
        assert_eq!(error("map 0 0 4k r page=8k"), r#""page=8k" is not page=4k|16k|64k|2m|32m|512m|1g|max"#);
        assert_eq!(error("map 0 0 4k r page=4k page=4k"), r#"unexpected word "page=4k""#);
        assert_eq!(error("map 0 0 4k r mem=wp"), r#""wp" is not mem=wb|uc|wc|wt"#);
        assert_eq!(error("dump now"), r#"unexpected word "now""#);
        assert_eq!("dump".parse::<Op>().unwrap_err().to_string(), r#""dump" is not an operation"#);
    }

    #[test]
    fn a_script_stops_at_its_first_bad_line() {
        let shape = Shape::ept();
        let text = "# heading\n\nmap 0 0 4k r # first\ndump\n\nunmap 0 0\nwalk 0\n";
        let mut script = Script::new(&shape, text);
        let map = "map 0 0 4k r".parse().unwrap();
        assert_eq!(script.next(), Some(Ok((3, map))));
        assert_eq!(script.next(), Some(Ok((4, Command::Dump))));
        let error = script.next().unwrap().unwrap_err();
        assert_eq!(error.to_string(), "line 6: size is 0");
        assert_eq!(script.next(), None);
        assert_eq!(parse_script(&shape, text), Err(error));
        assert_eq!(parse_script(&shape, " # nothing").map(|commands| commands.len()), Ok(0));
    }

    proptest! {
        #[test]
        fn an_operation_parses_back_to_itself(op in crate::strategy::op(&Shape::ept())) {
            prop_assert_eq!(op.to_string().parse(), Ok(op));
        }

        #[test]
        fn no_text_panics(text in "(map|touch|age|page=|mem=|0x|[0-9a-fkmgt]|[ #\n]|\\PC){0,40}") {
            let _ = parse_script(&Shape::npt(), &text);
        }
    }
}
