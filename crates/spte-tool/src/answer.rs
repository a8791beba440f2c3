// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a command answers, and how that is printed.

use std::borrow::Cow;
use std::fmt;

use serde_json::{Value, json};

/// Why a `touch` did not reach memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing is mapped there.
    Absent,
    /// The leaf does not grant it.
    Perm,
    /// The accessed bit was clear, and hardware does not set it. It is set now.
    AccessFlag,
    /// An entry on the way breaks a rule of its format.
    Reserved,
}

/// One row of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Row {
    /// A raw entry: `L<level> <gpa> <raw>`.
    Entry {
        /// The architecture's number of the level.
        level: i8,
        /// First guest address of the entry's span.
        gpa: u64,
        /// The entry, as a number.
        raw: u64,
    },
    /// A leaf that was written: `<gpa> <size>`.
    Written {
        /// Where it begins.
        gpa: u64,
        /// Its bytes.
        size: u64,
    },
    /// A count: `<key> <value>`.
    Count {
        /// What was counted.
        key: Cow<'static, str>,
        /// How many.
        value: u64,
    },
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Entry { level, gpa, raw } => write!(f, "L{level} {gpa:#x} {raw:016x}"),
            Self::Written { gpa, size } => write!(f, "{gpa:#x} {size:#x}"),
            Self::Count { key, value } => write!(f, "{key} {value}"),
        }
    }
}

impl Row {
    /// The row as a JSON object. Addresses and entries are strings, spelt as in text: JSON numbers lose bits.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Entry { level, gpa, raw } => {
                json!({ "level": level, "gpa": format!("{gpa:#x}"), "raw": format!("{raw:016x}") })
            }
            Self::Written { gpa, size } => json!({ "gpa": format!("{gpa:#x}"), "size": format!("{size:#x}") }),
            Self::Count { key, value } => json!({ "key": key, "value": value }),
        }
    }
}

/// What a command answers. Prints as its lines, without the last line's end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// `ok`.
    Ok,
    /// `refused present <gpa>`: the first address of the range that is mapped.
    RefusedPresent {
        /// That address.
        gpa: u64,
    },
    /// `refused page`: leaves of that size do not exist, or do not fit.
    RefusedPage,
    /// `refused perm`: the format cannot express the rights.
    RefusedPerm,
    /// `refused mem`: the format cannot express the memory type.
    RefusedMem,
    /// `ok <output address>`.
    Touched {
        /// Where the byte lies.
        pa: u64,
    },
    /// `fault <why>`.
    Fault(Fault),
    /// `ok <leaves that were young>`.
    Aged {
        /// How many.
        young: u64,
    },
    /// `changed`.
    Changed,
    /// `absent`.
    Absent,
    /// `zapped`.
    Zapped,
    /// Rows, then `end <rows>`.
    Rows(Vec<Row>),
}

impl fmt::Display for Answer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::RefusedPresent { gpa } => write!(f, "refused present {gpa:#x}"),
            Self::RefusedPage => f.write_str("refused page"),
            Self::RefusedPerm => f.write_str("refused perm"),
            Self::RefusedMem => f.write_str("refused mem"),
            Self::Touched { pa } => write!(f, "ok {pa:#x}"),
            Self::Fault(Fault::Absent) => f.write_str("fault absent"),
            Self::Fault(Fault::Perm) => f.write_str("fault perm"),
            Self::Fault(Fault::AccessFlag) => f.write_str("fault af"),
            Self::Fault(Fault::Reserved) => f.write_str("fault reserved"),
            Self::Aged { young } => write!(f, "ok {young}"),
            Self::Changed => f.write_str("changed"),
            Self::Absent => f.write_str("absent"),
            Self::Zapped => f.write_str("zapped"),
            Self::Rows(rows) => {
                for row in rows {
                    writeln!(f, "{row}")?;
                }
                write!(f, "end {}", rows.len())
            }
        }
    }
}

impl Answer {
    /// The answer to the command `name` of line `line`, as one JSON object: `outcome`, or `rows` of a listing.
    pub fn to_json(&self, line: u64, name: &str) -> Value {
        match self {
            Self::Rows(rows) => {
                let rows: Vec<Value> = rows.iter().map(Row::to_json).collect();
                json!({ "line": line, "command": name, "rows": rows })
            }
            other => json!({ "line": line, "command": name, "outcome": other.to_string() }),
        }
    }
}
