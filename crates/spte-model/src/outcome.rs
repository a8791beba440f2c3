// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a table answers.

use std::fmt;

use crate::model::Leaf;

/// Why a touch did not reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fault {
    /// Nothing is mapped there.
    Absent,
    /// The leaf does not grant this access.
    Perm,
    /// The accessed bit is clear and software manages it. The leaf is young now.
    AccessFlag,
    /// An entry breaks a rule of its format. A model has no entries and never says this; a table
    /// that does is wrong.
    Reserved,
}

/// The answer of a table to one well-formed [`Op`](crate::Op).
///
/// Prints as the `spte` command does, but for [`Outcome::Walk`]: raw entries are not the model's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done.
    Ok,
    /// `map` found something present and changed nothing.
    RefusedPresent {
        /// The first address *of the range asked for* that is mapped, whatever the size of the leaf
        /// that maps it.
        gpa: u64,
    },
    /// `map` was told a leaf size that the format lacks or that does not fit; nothing was changed.
    RefusedPage,
    /// The format cannot express these rights; nothing was changed.
    RefusedPerm,
    /// The format cannot express this memory type; nothing was changed.
    RefusedMem,
    /// `touch` reached memory.
    Touched {
        /// The output address of the byte.
        out: u64,
    },
    /// `touch` faulted.
    Fault(Fault),
    /// `age` is done.
    Aged {
        /// How many leaves were young.
        young: u64,
    },
    /// `dirty` is done.
    Dirty {
        /// Address and size in bytes of each leaf written since the last harvest, ascending.
        rows: Vec<(u64, u64)>,
    },
    /// The page was repointed.
    Changed,
    /// There was nothing to repoint or zap.
    Absent,
    /// The page is no longer mapped.
    Zapped,
    /// `walk` is done.
    Walk {
        /// The leaf over the address, and the address where it begins.
        leaf: Option<(u64, Leaf)>,
    },
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Outcome::Ok => f.write_str("ok"),
            Outcome::RefusedPresent { gpa } => write!(f, "refused present {gpa:#x}"),
            Outcome::RefusedPage => f.write_str("refused page"),
            Outcome::RefusedPerm => f.write_str("refused perm"),
            Outcome::RefusedMem => f.write_str("refused mem"),
            Outcome::Touched { out } => write!(f, "ok {out:#x}"),
            Outcome::Fault(Fault::Absent) => f.write_str("fault absent"),
            Outcome::Fault(Fault::Perm) => f.write_str("fault perm"),
            Outcome::Fault(Fault::AccessFlag) => f.write_str("fault af"),
            Outcome::Fault(Fault::Reserved) => f.write_str("fault reserved"),
            Outcome::Aged { young } => write!(f, "ok {young}"),
            Outcome::Dirty { rows } => {
                for (gpa, size) in rows {
                    writeln!(f, "{gpa:#x} {size:#x}")?;
                }
                write!(f, "end {}", rows.len())
            }
            Outcome::Changed => f.write_str("changed"),
            Outcome::Absent => f.write_str("absent"),
            Outcome::Zapped => f.write_str("zapped"),
            Outcome::Walk { leaf: None } => f.write_str("no leaf"),
            Outcome::Walk { leaf: Some((gpa, leaf)) } => {
                write!(f, "leaf {gpa:#x} {:#x} -> {:#x} {}", leaf.size, leaf.out, leaf.access)
            }
        }
    }
}
