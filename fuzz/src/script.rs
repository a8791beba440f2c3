// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `spte run` on any script.
//!
//! The input is six bytes of options and the script's text. What has to hold:
//!
//! - Nothing panics, and the exit status is 0 or 2.
//! - The output has an answer for each command up to the first that fails, in order, and nothing else: one line, or rows and
//!   `end N` with as many rows as it says.
//! - Rows of addresses ascend. Answers are of the words of the command's contract.
//! - With status 2 there is one line on the other stream, which begins with `line N:` and the number of the line that failed
//!   (or with `spte:` where the options make no table); with status 0 there is none.
//!
//! What a line may cost is bounded by the command, at a number of leaves that is too much for a fuzzer; scripts that ask for
//! much are cut before the line that does.

use spte_tool::script::{self, Command, Page};

use crate::{
    bytes::Bytes,
    decode::{command, options},
};

/// The most leaves that a script may ask for here.
const MOST_LEAVES: u64 = 1 << 13;
/// The most lines.
const MOST_LINES: usize = 64;

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Bytes(data);
    let mut header = Bytes(&[input.byte(), input.byte(), input.byte(), input.byte(), input.byte(), input.byte()]);
    let mut arguments = vec![String::from("run")];
    arguments.append(&mut options(&mut header));
    let granule = match arguments.iter().find_map(|word| word.strip_prefix("--granule=")) {
        Some("16k") => 16 << 10,
        Some("64k") => 64 << 10,
        _ => 4 << 10,
    };
    let json = arguments.iter().any(|word| word == "--json");
    let text = affordable(input.rest(), granule);
    let (status, out, err) = command(&arguments, text);
    match status {
        0 => assert_eq!(err, "", "succeeded with a message"),
        2 => assert!(err.ends_with('\n') && err.lines().count() == 1, "failed with {err:?}"),
        _ => panic!("status {status}"),
    }
    if status == 2 && err.starts_with("spte: ") {
        assert_eq!(out, "", "options that make no table, and output");
        return;
    }
    let failed = (status == 2).then(|| failed_line(&err));
    let carried_out = carried_out(text, failed);
    if json {
        objects(&out, &carried_out);
    } else {
        answers(&out, &carried_out);
    }
}

/// As many leading lines as do not ask for too much.
fn affordable(text: &[u8], granule: u64) -> &[u8] {
    let (mut leaves, mut end) = (0_u64, 0);
    for line in text.split_inclusive(|byte| *byte == b'\n').take(MOST_LINES) {
        leaves = leaves.saturating_add(script::parse(line).ok().flatten().map_or(0, |command| cost(&command, granule)));
        if leaves > MOST_LEAVES {
            break;
        }
        end += line.len();
    }
    &text[..end]
}

/// About how many leaves a command may make.
fn cost(command: &Command, granule: u64) -> u64 {
    match *command {
        Command::Map { range, page, .. } => match page {
            Some(Page::Size(bytes)) if bytes > 1 << 12 => range.size / bytes,
            // With sizes that do not fit, as many as of the smallest.
            _ => range.size / granule,
        },
        Command::Split(range) => (range.size / granule).min(1 << 12),
        // Parts of larger leaves that go, or change, leave the rest of a table.
        _ => 16,
    }
}

fn failed_line(err: &str) -> u64 {
    let number = err.strip_prefix("line ").and_then(|rest| rest.split_once(": ")).map(|(number, _)| number.parse());
    match number {
        Some(Ok(number)) => number,
        _ => panic!("failed without a line: {err:?}"),
    }
}

/// The commands with their lines, up to the one that failed.
fn carried_out(text: &[u8], failed: Option<u64>) -> Vec<(u64, Command)> {
    let mut all = Vec::new();
    let mut lines = 0;
    for (line, text) in (1..).zip(text.split_inclusive(|byte| *byte == b'\n')) {
        lines = line;
        if failed == Some(line) {
            break;
        }
        match script::parse(text) {
            Ok(Some(command)) => all.push((line, command)),
            Ok(None) => {}
            Err(why) => panic!("line {line} was taken: {why}"),
        }
    }
    assert!(failed.is_none_or(|failed| failed == lines), "there is no line {failed:?} among {lines}");
    all
}

/// Whether the answer is rows.
fn has_rows(command: &Command) -> bool {
    match command {
        Command::Dirty(_) | Command::Walk { .. } | Command::Flushes | Command::Stats | Command::Dump => true,
        Command::Map { .. }
        | Command::Unmap(_)
        | Command::Protect { .. }
        | Command::WriteProtect(_)
        | Command::Touch { .. }
        | Command::Age(_)
        | Command::Change { .. }
        | Command::ZapChange { .. }
        | Command::Split(_)
        | Command::Collapse(_) => false,
    }
}

fn answers(out: &str, commands: &[(u64, Command)]) {
    let mut lines = out.lines();
    for (line, command) in commands {
        if !has_rows(command) {
            one_line(command, lines.next().unwrap_or_else(|| panic!("line {line} has no answer")));
            continue;
        }
        let mut rows = Vec::new();
        let end = loop {
            match lines.next() {
                None => panic!("the rows of line {line} have no end"),
                Some(row) => match row.strip_prefix("end ") {
                    Some(number) => break number,
                    None => rows.push(row),
                },
            }
        };
        assert_eq!(end.parse(), Ok(rows.len()), "line {line}: end {end}");
        check_rows(command, &rows);
    }
    assert_eq!(lines.next(), None, "an answer that nothing asked for");
}

fn objects(out: &str, commands: &[(u64, Command)]) {
    let mut lines = out.lines();
    for (line, command) in commands {
        let object = lines.next().unwrap_or_else(|| panic!("line {line} has no answer"));
        let object: serde_json::Value = serde_json::from_str(object).expect("an object");
        assert_eq!(object["line"].as_u64(), Some(*line));
        assert_eq!(object["command"], command.name());
        assert_eq!(object["rows"].is_array(), has_rows(command), "{object}");
        if !has_rows(command) {
            one_line(command, object["outcome"].as_str().expect("an outcome"));
        }
    }
    assert_eq!(lines.next(), None, "an answer that nothing asked for");
}

/// Answers of one line: the words of the command's contract.
fn one_line(command: &Command, answer: &str) {
    let words: Vec<&str> = answer.split(' ').collect();
    let known = match (command, words.as_slice()) {
        (Command::Touch { .. }, ["ok", output]) => is_address(output),
        (Command::Touch { .. }, ["fault", why]) => ["perm", "af", "absent"].contains(why),
        (Command::Age(_), ["ok", count]) => count.parse::<u64>().is_ok(),
        (Command::Change { .. } | Command::ZapChange { .. }, [outcome]) => {
            ["changed", "absent", "zapped"].contains(outcome)
        }
        (Command::Map { .. } | Command::Protect { .. }, ["refused", why, rest @ ..]) => {
            ["present", "page", "perm", "mem"].contains(why) && rest.iter().all(|word| is_address(word))
        }
        (Command::Touch { .. } | Command::Age(_) | Command::Change { .. } | Command::ZapChange { .. }, _) => false,
        (_, ["ok"]) => true,
        _ => false,
    };
    assert!(known, "{command:?} was answered {answer:?}");
}

fn is_address(word: &str) -> bool {
    address(word).is_some()
}

fn address(word: &str) -> Option<u64> {
    u64::from_str_radix(word.strip_prefix("0x")?, 16).ok()
}

fn check_rows(command: &Command, rows: &[&str]) {
    let mut last = None;
    for row in rows {
        let words: Vec<&str> = row.split(' ').collect();
        match (command, words.as_slice()) {
            (Command::Dirty(_), [start, size]) => {
                let (start, size) = (address(start).expect(row), address(size).expect(row));
                assert!(size != 0, "{row:?}: nothing");
                // A row is a leaf, so that neighbours stay two rows.
                let apart = last.is_none_or(|last| last <= start);
                assert!(apart, "{row:?} does not come behind what is before it");
                last = Some(start + size);
            }
            (Command::Walk { .. } | Command::Dump, [level, at, raw]) => {
                assert!(level.strip_prefix('L').is_some_and(|level| level.parse::<i8>().is_ok()), "{row:?}");
                let at = address(at).expect(row);
                assert!(last.is_none_or(|last| last <= at), "{row:?} is before the row above it");
                last = Some(at);
                assert!(raw.len() == 16 && u64::from_str_radix(raw, 16).is_ok(), "{row:?}");
            }
            (Command::Flushes | Command::Stats, [name, count]) => {
                assert!(!name.is_empty() && count.parse::<u64>().is_ok(), "{row:?}");
            }
            _ => panic!("{command:?} has a row {row:?}"),
        }
    }
}
