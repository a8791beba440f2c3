// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the command must know of a format beyond what the engine does.
//!
//! One implementation a format, in a module beside this one; [`setup`](crate::setup) names them. Nothing else in the crate
//! knows a bit.

use spte_core::FlushRequest;
use spte_core::format::{EntryError, Format, Kind, Level};
use spte_core::raw::HardwareKind;

use crate::script::Mem;

/// The two forms of an entry that is present.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// A link to the next lower table.
    Table,
    /// A translation.
    Leaf,
}

impl Form {
    /// Its word in output.
    pub fn word(self) -> &'static str {
        match self {
            Self::Table => "table",
            Self::Leaf => "leaf",
        }
    }
}

/// `words`, unless the entry is impossible: that comes first.
pub(crate) fn summary(reading: &HardwareKind, words: String) -> String {
    match reading {
        HardwareKind::Impossible(_) => format!("impossible: {words}"),
        _ => words,
    }
}

/// One field of an entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its name in the manual; a software bit's is the one of the crate that writes it.
    pub name: &'static str,
    /// Its highest bit.
    pub high: u32,
    /// Its lowest bit.
    pub low: u32,
    /// Its value, shifted down.
    pub value: u64,
    /// What that means.
    pub meaning: String,
}

/// An entry in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Explanation {
    /// What hardware takes it for.
    pub reading: HardwareKind,
    /// One line: what it is.
    pub summary: String,
    /// The fields, from bit 0 up; together they cover every bit that is set.
    pub fields: Vec<Field>,
    /// The rule of this workspace's software bits that it breaks, where hardware accepts it.
    pub software: Option<EntryError>,
}

impl Explanation {
    /// Of an entry that `words` describe.
    pub(crate) fn new(reading: HardwareKind, words: String, fields: Vec<Field>, software: Option<EntryError>) -> Self {
        // What hardware refuses is said once.
        let software = software.filter(|_| !matches!(reading, HardwareKind::Impossible(_)));
        Self { reading, summary: summary(&reading, words), fields, software }
    }
}

/// A format as the `spte` command sees it.
pub trait ToolFormat: Format + Clone {
    /// The attributes of an installed leaf of this memory type; `None` where the format has no such type.
    fn attrs(&self, mem: Mem) -> Option<Self::Attrs>;

    /// The bits of an entry that a dump prints: all but software's and ignored ones, and in links but the address.
    /// `None` where the level has no entries of this form.
    fn mask(&self, level: Level, form: Form) -> Option<u64>;

    /// What hardware takes the entry for.
    fn reading(&self, level: Level, raw: u64) -> HardwareKind;

    /// The entry in words.
    fn explain(&self, level: Level, raw: u64) -> Explanation;

    /// Names the operations that hardware is asked for to carry out a flush, and how many of each.
    fn asks(&self, request: &FlushRequest<'_>, ask: &mut dyn FnMut(&'static str, u64));

    /// The entry as a dump prints it.
    fn masked(&self, level: Level, raw: u64) -> u64 {
        let form = match self.reading(level, raw) {
            HardwareKind::NotPresent => return 0,
            // Whatever breaks the rule is shown.
            HardwareKind::Impossible(_) => return raw,
            HardwareKind::Table(_) => Form::Table,
            HardwareKind::Leaf => Form::Leaf,
        };
        self.mask(level, form).map_or(raw, |mask| raw & mask)
    }
}

/// Collects the fields of an entry.
#[derive(Debug)]
pub(crate) struct Fields {
    raw: u64,
    named: u64,
    fields: Vec<Field>,
}

impl Fields {
    pub(crate) fn of(raw: u64) -> Self {
        Self { raw, named: 0, fields: Vec::new() }
    }

    /// Bits `low` to `high`; `high` is below 64 and not below `low`.
    pub(crate) fn range(
        &mut self,
        high: u32,
        low: u32,
        name: &'static str,
        meaning: impl FnOnce(u64) -> String,
    ) -> &mut Self {
        let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
        let value = (self.raw & mask) >> low;
        self.named |= mask;
        self.fields.push(Field { name, high, low, value, meaning: meaning(value) });
        self
    }

    /// One bit, with what it means set and clear.
    pub(crate) fn bit(&mut self, bit: u32, name: &'static str, set: &str, clear: &str) -> &mut Self {
        self.range(bit, bit, name, |value| String::from(if value == 0 { clear } else { set }))
    }

    /// One bit that is worth a word only where it is set.
    pub(crate) fn set(&mut self, bit: u32, name: &'static str, set: &str) -> &mut Self {
        if self.raw >> bit & 1 == 1 {
            self.bit(bit, name, set, "");
        }
        self
    }

    /// All of them, from bit 0 up; set bits that have no name yet are reserved, or ignored.
    pub(crate) fn rest(mut self, reserved: u64) -> Vec<Field> {
        for bit in 0..64 {
            if self.raw & !self.named & (1 << bit) == 0 {
                continue;
            }
            if reserved & (1 << bit) != 0 {
                self.bit(bit, "reserved", "set, and must be clear", "");
            } else {
                self.bit(bit, "ignored", "set; hardware does not look", "");
            }
        }
        self.fields.sort_by_key(|field| field.low);
        self.fields
    }
}

/// A power of two of bytes as the script says it: `4k`, `2m`, `1g`.
pub(crate) fn size_word(bytes: u64) -> String {
    match bytes.trailing_zeros() {
        shift if shift >= 40 => format!("{}t", bytes >> 40),
        shift if shift >= 30 => format!("{}g", bytes >> 30),
        shift if shift >= 20 => format!("{}m", bytes >> 20),
        shift if shift >= 10 => format!("{}k", bytes >> 10),
        _ => bytes.to_string(),
    }
}

/// Rights as the script has them.
pub(crate) fn rights(read: bool, write: bool, execute: bool) -> String {
    let letters = [(read, 'r'), (write, 'w'), (execute, 'x')];
    let text: String = letters.into_iter().filter(|(has, _)| *has).map(|(_, letter)| letter).collect();
    if text.is_empty() { "-".into() } else { text }
}

/// What an entry that holds nothing is.
pub(crate) fn nothing(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Absent => Some("not present: nothing is here"),
        Kind::Claimed => Some("not present: claimed by an operation that is deciding what goes here"),
        Kind::Dead => Some("not present: an entry of a table that was unlinked"),
        Kind::Special | Kind::Table(_) | Kind::Leaf => None,
    }
}
