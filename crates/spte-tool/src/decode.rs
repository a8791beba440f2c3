// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `spte decode`: entries in words, as text and as JSON.

use serde_json::{Value, json};
use spte_core::format::{EntryError, Level};
use spte_core::raw::HardwareKind;
use thiserror::Error;

use crate::format::{Explanation, Field, Form, ToolFormat};

/// A word that is no raw entry.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{word:?} is no entry: 0x and at most 16 hex digits, or exactly 16 hex digits")]
pub struct NotAnEntry {
    /// The word.
    pub word: String,
}

/// A raw entry: `0x` and hex digits, or the 16 bare digits that dumps and kernel logs have.
///
/// # Errors
/// [`NotAnEntry`]. Fewer bare digits could be decimal, and are refused.
pub fn entry(word: &str) -> Result<u64, NotAnEntry> {
    let wrong = || NotAnEntry { word: word.into() };
    let digits = match word.strip_prefix("0x") {
        Some(digits) if (1..=16).contains(&digits.len()) => digits,
        None if word.len() == 16 => word,
        _ => return Err(wrong()),
    };
    if !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Err(wrong());
    }
    u64::from_str_radix(digits, 16).map_err(|_| wrong())
}

/// One way to read an entry, at the levels that read it so.
#[derive(Debug, Clone)]
pub struct Group {
    /// The architecture's numbers of the levels, from the smallest pages up.
    pub levels: Vec<i8>,
    /// What the entry is there.
    pub explanation: Explanation,
}

fn rule(reading: &HardwareKind) -> Option<&EntryError> {
    match reading {
        HardwareKind::Impossible(why) => Some(why),
        _ => None,
    }
}

/// Alike but for the number of the level.
fn alike(a: &Explanation, b: &Explanation) -> bool {
    let rules = |error: Option<&EntryError>| error.map(|error| (error.rule, error.bits));
    a.summary == b.summary
        && a.fields == b.fields
        && rules(rule(&a.reading)) == rules(rule(&b.reading))
        && rules(a.software.as_ref()) == rules(b.software.as_ref())
}

/// What `raw` is at `level`, or at every level where none is given.
pub fn readings<F: ToolFormat>(format: &F, level: Option<Level>, raw: u64) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for at in format.geometry().levels().filter(|at| level.is_none_or(|level| level == *at)) {
        let explanation = format.explain(at, raw);
        let number = format.level_number(at);
        match groups.iter_mut().find(|group| alike(&group.explanation, &explanation)) {
            Some(group) => group.levels.push(number),
            None => groups.push(Group { levels: vec![number], explanation }),
        }
    }
    groups
}

fn place(field: &Field) -> String {
    if field.high == field.low { field.low.to_string() } else { format!("{}:{}", field.high, field.low) }
}

/// The lines that explain `raw`. Where the level is not known and some level takes the entry, levels that refuse it are one
/// line each.
pub fn text<F: ToolFormat>(format: &F, level: Option<Level>, raw: u64) -> String {
    let groups = readings(format, level, raw);
    let some_possible = groups.iter().any(|group| rule(&group.explanation.reading).is_none());
    let mut lines = vec![format!("{raw:016x}")];
    for Group { levels, explanation } in &groups {
        let levels: Vec<String> = levels.iter().map(|level| format!("L{level}")).collect();
        lines.push(format!("  {}: {}", levels.join(" "), explanation.summary));
        let refused = rule(&explanation.reading);
        if let Some(why) = refused {
            lines.push(format!("    rule broken: {} (bits {:#x})", why.rule, why.bits));
        }
        if let Some(why) = &explanation.software {
            lines.push(format!("    software rule broken: {} (bits {:#x})", why.rule, why.bits));
        }
        if refused.is_some() && some_possible {
            continue;
        }
        for field in &explanation.fields {
            let value = if field.high == field.low { field.value.to_string() } else { format!("{:#x}", field.value) };
            let line = format!("    {:>5}  {} = {value}: {}", place(field), field.name, field.meaning);
            lines.push(line);
        }
    }
    lines.push(String::new());
    lines.join("\n")
}

fn error_json(error: Option<&EntryError>) -> Value {
    error.map_or(Value::Null, |why| json!({ "rule": why.rule, "bits": format!("{:#x}", why.bits) }))
}

/// The same as one JSON object.
pub fn json<F: ToolFormat>(format: &F, level: Option<Level>, raw: u64) -> Value {
    let field = |field: &Field| {
        json!({
            "name": field.name, "high": field.high, "low": field.low,
            "value": format!("{:#x}", field.value), "meaning": field.meaning,
        })
    };
    let reading = |group: &Group| {
        let Explanation { reading, summary, fields, software } = &group.explanation;
        let fields: Vec<Value> = fields.iter().map(field).collect();
        json!({
            "levels": group.levels, "kind": kind(reading), "summary": summary, "fields": fields,
            "rule_broken": error_json(rule(reading)), "software_rule_broken": error_json(software.as_ref()),
        })
    };
    let readings: Vec<Value> = readings(format, level, raw).iter().map(reading).collect();
    json!({ "raw": format!("{raw:016x}"), "format": format.name(), "readings": readings })
}

/// The word for a reading.
pub(crate) fn kind(reading: &HardwareKind) -> &'static str {
    match reading {
        HardwareKind::NotPresent => "not present",
        HardwareKind::Impossible(_) => "impossible",
        HardwareKind::Table(_) => Form::Table.word(),
        HardwareKind::Leaf => Form::Leaf.word(),
    }
}

/// The masks of `level`, or of all levels: from the root down, links before leaves.
pub fn masks<F: ToolFormat>(format: &F, level: Option<Level>) -> Vec<(i8, Form, u64)> {
    let mut levels: Vec<Level> =
        format.geometry().levels().filter(|at| level.is_none_or(|level| level == *at)).collect();
    levels.reverse();
    let forms = |at: Level| {
        [Form::Table, Form::Leaf]
            .into_iter()
            .filter_map(move |form| format.mask(at, form).map(|mask| (format.level_number(at), form, mask)))
    };
    levels.into_iter().flat_map(forms).collect()
}
