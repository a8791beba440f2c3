// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reading: walks as hardware makes them, and looks at the table as it is.

use alloc::vec::Vec;
use core::marker::PhantomData;

use notifier_core::{Access, AddrRange, Gpa, GpaRange, OutputAddr, Scope};

use crate::{
    entry::{View, view},
    flush::Flush,
    format::{EntryError, Format, Kind, LeafSpec, Level, Touch},
    pages::PageSource,
    table::{Node, Table},
};

/// A translation that was found inside a scope, good until the scope ends.
#[derive(Debug, Clone, Copy)]
pub struct Translation<'s> {
    gpa: Gpa,
    output: OutputAddr,
    leaf: GpaRange,
    access: Access,
    scope: PhantomData<&'s ()>,
}

impl Translation<'_> {
    /// Where the byte that was asked for lies.
    pub fn output(&self) -> OutputAddr {
        self.output
    }

    /// What the leaf translates.
    pub fn leaf(&self) -> GpaRange {
        self.leaf
    }

    /// Rights that the leaf grants now. Writing needs a translation that was asked for writing: it records the fact.
    pub fn access(&self) -> Access {
        self.access
    }

    /// Bytes from the byte asked for to the end of the leaf.
    pub fn len(&self) -> u64 {
        self.leaf.end().as_u64() - self.gpa.as_u64()
    }

    /// Never: the byte asked for is there.
    pub fn is_empty(&self) -> bool {
        false
    }
}

/// Why a walk found no translation for an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Miss {
    /// Nothing is there.
    #[error("{at} is not mapped")]
    Absent {
        /// The address.
        at: Gpa,
    },
    /// A special entry is there: the format knows what it means.
    #[error("{at} has special entry {entry:#018x}")]
    Special {
        /// The address.
        at: Gpa,
        /// The entry.
        entry: u64,
    },
    /// The leaf does not grant the access. `armed`: [`Table::upgrade`] would help.
    #[error("{at} does not grant {access}")]
    Denied {
        /// The address.
        at: Gpa,
        /// The access asked for.
        access: Access,
        /// Writing is armed.
        armed: bool,
    },
    /// The leaf is old, and software has to make it young ([`Table::make_young`]).
    #[error("{at} is old")]
    Old {
        /// The address.
        at: Gpa,
    },
    /// Somebody is just changing the entry. Walks in scopes do not wait: leave the scope and fault, or walk again.
    #[error("{at} is being changed")]
    Busy {
        /// The address.
        at: Gpa,
    },
    /// The address is beyond what the table translates.
    #[error("{at} is beyond the table's {bits} address bits")]
    TooWide {
        /// The address.
        at: Gpa,
        /// Bits that the table translates.
        bits: u32,
    },
    /// The scope belongs to another space: nothing would wait for it.
    #[error("the scope belongs to another space")]
    ForeignScope,
}

/// An entry as it was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The level of the table it stands in.
    pub level: Level,
    /// First guest address it spans.
    pub start: Gpa,
    /// Bytes it spans.
    pub span: u64,
    /// Its value.
    pub raw: u64,
    /// What it is.
    pub kind: Kind,
}

/// How many pages and leaves a table has, counted by looking.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Stats {
    /// Table pages, the root included.
    pub tables: u64,
    /// Bytes of table pages.
    pub table_bytes: u64,
    /// Leaves of each level, the smallest first.
    pub leaves: [u64; crate::format::MAX_LEVELS],
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    /// Walks for `access` at `gpa`, as hardware would: sets accessed and dirty where the format lets hardware do that.
    /// What is found is good while `scope` lives.
    ///
    /// # Errors
    /// [`Miss`]. A miss is not a fault yet: [`Scope::fault`] begins one.
    pub fn translate<'s>(&self, scope: &'s Scope<'_>, gpa: Gpa, access: Access) -> Result<Translation<'s>, Miss> {
        if !scope.is_of(&self.space) {
            return Err(Miss::ForeignScope);
        }
        let format = &self.format;
        let bits = self.geometry().address_bits();
        if gpa.as_u64() >> bits != 0 {
            return Err(Miss::TooWide { at: gpa, bits });
        }
        let mut node = self.root_node(scope.pin());
        let mut link = None;
        loop {
            let cell = node.cell(self.geometry().index(node.level, gpa.as_u64()));
            let raw = cell.load(format);
            match format.kind(cell.level, raw) {
                // A claimed link, and a claimed leaf, are still what hardware uses.
                Kind::Table(page) => match self.child(scope.pin(), &cell, page) {
                    Some(child) => {
                        node = child;
                        link = Some((cell, raw));
                    }
                    None => return Err(Miss::Absent { at: gpa }),
                },
                Kind::Leaf => {
                    match format.touch(cell.level, raw, access) {
                        Touch::Denied => {
                            let armed = access.writable() && format.upgrade(cell.level, raw).is_some();
                            return Err(Miss::Denied { at: gpa, access, armed });
                        }
                        Touch::AccessFlag => return Err(Miss::Old { at: gpa }),
                        Touch::Allowed(new) if new == raw => {}
                        Touch::Allowed(new) => {
                            let claimed = raw & format.claim_bit() != 0;
                            if cell.mirror.is_some() && claimed {
                                return Err(Miss::Busy { at: gpa });
                            }
                            if cell.replace(format, raw, new).is_err() {
                                continue;
                            }
                        }
                    }
                    let LeafSpec { output, access, armed, .. } = format.spec(cell.level, raw);
                    let Ok(leaf) = AddrRange::with_len(Gpa::new(cell.start), cell.span) else {
                        return Err(Miss::TooWide { at: gpa, bits });
                    };
                    return Ok(Translation {
                        gpa,
                        output: output.wrapping_add(gpa.as_u64() - cell.start),
                        leaf,
                        access: if armed { access.read_only() } else { access },
                        scope: PhantomData,
                    });
                }
                Kind::Absent => return Err(Miss::Absent { at: gpa }),
                Kind::Special => return Err(Miss::Special { at: gpa, entry: raw }),
                Kind::Claimed => return Err(Miss::Busy { at: gpa }),
                // The table was merged or unlinked meanwhile: what took its place has been there since before. While
                // the link is still the same, somebody is just looking whether the table is empty.
                Kind::Dead => match link {
                    Some((above, read)) if (above.load(format) ^ read) & !format.claim_bit() != 0 => {
                        node = self.root_node(scope.pin());
                        link = None;
                    }
                    _ => return Err(Miss::Busy { at: gpa }),
                },
            }
        }
    }

    /// Every entry from the root down to the one that decides about `gpa`. A look, not a translation: by the time it
    /// returns things may have changed.
    pub fn walk(&self, gpa: Gpa) -> Vec<Found> {
        let mut rows = Vec::new();
        let format = &self.format;
        if gpa.as_u64() >> self.geometry().address_bits() != 0 {
            return rows;
        }
        let pin = self.space.pin();
        let mut node = self.root_node(&pin);
        loop {
            let cell = node.cell(self.geometry().index(node.level, gpa.as_u64()));
            let raw = cell.load(format);
            let kind = format.kind(cell.level, raw);
            rows.push(Found { level: cell.level, start: Gpa::new(cell.start), span: cell.span, raw, kind });
            match kind {
                Kind::Table(page) => match self.child(&pin, &cell, page) {
                    Some(child) => node = child,
                    None => return rows,
                },
                _ => return rows,
            }
        }
    }

    /// The entry that decides about `gpa`: the last of [`Table::walk`].
    pub fn entry(&self, gpa: Gpa) -> Option<Found> {
        self.walk(gpa).pop()
    }

    /// Calls `look` for every entry that is not absent and spans a byte of `range`: ascending, links before what is
    /// below them. Waits for nothing; what changes meanwhile may be seen before, after, or both.
    pub fn visit(&self, range: GpaRange, mut look: impl FnMut(Found)) {
        let Some(range) = self.clip(range) else { return };
        let format = &self.format;
        let pin = self.space.pin();
        let (mut at, end) = (range.start().as_u64(), range.end().as_u64());
        // The way down, as nodes and the address up to which their links were shown.
        let mut path: Vec<Node<'_>> = alloc::vec![self.root_node(&pin)];
        while at < end {
            while path.len() > 1 && path.last().is_some_and(|node| !node.holds(at)) {
                path.pop();
            }
            let Some(node) = path.last().copied() else { return };
            let cell = node.cell(self.geometry().index(node.level, at));
            let raw = cell.load(format);
            let kind = format.kind(cell.level, raw);
            if !matches!(kind, Kind::Absent | Kind::Claimed | Kind::Dead) {
                look(Found { level: cell.level, start: Gpa::new(cell.start), span: cell.span, raw, kind });
            }
            if let Some(child) = self.linked(&pin, &cell, raw) {
                path.push(child);
            } else {
                at = cell.end();
            }
        }
    }

    /// Checks every entry of the table with [`Format::check`].
    ///
    /// # Errors
    /// The first entry that breaks a rule, and where it stands.
    pub fn check(&self) -> Result<(), (Gpa, EntryError)> {
        let mut result = Ok(());
        if let Some(whole) = self.whole() {
            self.visit(whole, |found| {
                let raw = found.raw & !self.claim_bit_of(found.kind);
                if let (Ok(()), Err(error)) = (&result, self.format.check(found.level, raw)) {
                    result = Err((found.start, error));
                }
            });
        }
        result
    }

    fn claim_bit_of(&self, kind: Kind) -> u64 {
        if matches!(kind, Kind::Table(_) | Kind::Leaf) { self.format.claim_bit() } else { 0 }
    }

    /// Counts pages and leaves.
    pub fn stats(&self) -> Stats {
        let geometry = *self.geometry();
        let bytes = |level| geometry.table_bytes(level) as u64;
        let mut stats = Stats { tables: 1, table_bytes: bytes(geometry.top()), ..Stats::default() };
        if let Some(whole) = self.whole() {
            self.visit(whole, |found| match (found.kind, found.level.below()) {
                (Kind::Table(_), Some(below)) => {
                    stats.tables += 1;
                    stats.table_bytes += bytes(below);
                }
                (Kind::Leaf, _) => stats.leaves[usize::from(found.level.get()) - 1] += 1,
                _ => {}
            });
        }
        stats
    }

    /// Makes the leaf at `gpa` young: what a fault handler does for [`Miss::Old`]. Whether there was a leaf that nobody was
    /// just changing. Waits for nothing, so that it may be called inside a scope.
    pub fn make_young(&self, gpa: Gpa) -> bool {
        let Ok(range) = AddrRange::with_len(gpa, 1) else { return false };
        if self.clip(range).is_none() {
            return false;
        }
        let format = &self.format;
        let pin = self.space.pin();
        let mut young = false;
        self.look(&pin, range, |cell, mut raw| {
            while view(format, cell.level, raw) == View::Leaf {
                let new = format.make_young(cell.level, raw);
                match if new == raw { Ok(()) } else { cell.replace(format, raw, new) } {
                    Ok(()) => {
                        self.rejuvenate_others(cell, raw);
                        young = true;
                        return;
                    }
                    Err(found) => raw = found,
                }
            }
        });
        young
    }
}
