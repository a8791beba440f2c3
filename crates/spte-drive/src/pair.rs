// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table and the model of it, step by step.

use spte_core::format::Format;
use spte_core::{HeapPages, PageSource};
use spte_model::{Leaf, LeafError, Logging, Model, Op, Outcome, Reject};
use thiserror::Error;

use crate::driver::{DriveError, Driven, Driver, Wrong};
use crate::hardware::{Hardware, Software};
use crate::pages::ScarcePages;

/// With fewer leaves than this all are compared after each operation, and every raw entry is checked; with more, only what
/// the operation can have touched, and all of them whenever that has come to [`TIMES`] as many.
const FEW: usize = 128;
/// See [`FEW`].
const TIMES: usize = 4;

/// Table and model differ.
#[derive(Debug, Error)]
#[error("operation {index}, {op}: {why}")]
pub struct Disagreement {
    /// Which operation, counted from 0.
    pub index: usize,
    /// The operation.
    pub op: Op,
    /// What is wrong.
    pub why: Box<Why>,
}

/// What is wrong after an operation.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Why {
    /// The table did what it must not whatever the model says, refused what the model took, or found no page where there
    /// were pages.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// A cache in hardware has what the table no longer says.
    #[error(transparent)]
    Cached(#[from] Wrong),
    /// The answers differ.
    #[error("answered {found:?}, not {expected:?}")]
    Answer {
        /// The table's answer.
        found: Outcome,
        /// The model's.
        expected: Outcome,
    },
    /// A leaf that was written is gone, and nobody was told (invariant I12).
    #[error("lost a write at {gpa:#x}")]
    LostWrite {
        /// Where the leaf began.
        gpa: u64,
    },
    /// The leaves differ.
    #[error("the leaf is {found:x?}, not {expected:x?}")]
    Leaf {
        /// Where it begins, and the leaf; of the table.
        found: Option<(u64, Leaf)>,
        /// Of the model.
        expected: Option<(u64, Leaf)>,
    },
    /// After an operation that found no page: a translation that there was neither before nor would have been after.
    #[error("want of pages left {leaf:x?} at {gpa:#x}, which is neither as before nor as asked for")]
    Made {
        /// The first address where it is neither.
        gpa: u64,
        /// The leaf over it.
        leaf: Leaf,
    },
    /// After an operation that found no page: a translation is gone, or weaker, that there was before and would have been
    /// after.
    #[error("want of pages took {gpa:#x} away, or rights of it, which was to stay")]
    Taken {
        /// The first address that lost something.
        gpa: u64,
    },
    /// After an operation that found no page the model could not take over what is left.
    #[error(transparent)]
    Adopt(#[from] LeafError),
}

/// What came of one operation that table and model agree about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Malformed, or more than the model can hold: it was put to nobody.
    Rejected(Reject),
    /// Both answered this.
    Answered(Outcome),
    /// The table wanted for a page. What it left is possible, and the model has taken it over.
    OutOfPages,
}

/// A table and the model of it.
#[derive(Debug)]
pub struct Pair<F: Format, P: PageSource = HeapPages, H: Hardware<F> = Software> {
    model: Model,
    driver: Driver<F, P, H>,
    /// Operations so far.
    index: usize,
    /// Leaves compared since all were.
    looked_at: usize,
    /// All is compared after an access too.
    whole_touches: bool,
}

impl<F: Format> Pair<F> {
    /// Both empty, with all the pages of the heap.
    ///
    /// # Errors
    /// See [`Driver::new`].
    pub fn new(driven: Driven<F>) -> Result<Self, DriveError> {
        Self::with_pages(driven, ScarcePages::new(HeapPages::new()))
    }
}

impl<F: Format, P: PageSource> Pair<F, P> {
    /// Both empty, with these pages.
    ///
    /// # Errors
    /// See [`Driver::with_pages`].
    pub fn with_pages(driven: Driven<F>, pages: ScarcePages<P>) -> Result<Self, DriveError> {
        Self::with_hardware(driven, pages, Software)
    }
}

impl<F: Format, P: PageSource, H: Hardware<F>> Pair<F, P, H> {
    /// Both empty, with these pages; the table is walked by this hardware.
    ///
    /// # Errors
    /// See [`Driver::with_hardware`].
    pub fn with_hardware(driven: Driven<F>, pages: ScarcePages<P>, hardware: H) -> Result<Self, DriveError> {
        let model = Model::new(driven.shape.clone());
        Ok(Self {
            model,
            driver: Driver::with_hardware(driven, pages, hardware)?,
            index: 0,
            looked_at: 0,
            whole_touches: true,
        })
    }

    /// From now on an access is followed by a look at its own leaf alone, and all is compared after other operations: for many
    /// accesses in large tables.
    pub fn spare_touches(&mut self) {
        self.whole_touches = false;
    }

    /// The model.
    pub fn model(&self) -> &Model {
        &self.model
    }

    /// The table and its user.
    pub fn driver(&self) -> &Driver<F, P, H> {
        &self.driver
    }

    /// Applies one operation to both, and compares: the answers, what was reported of what is gone, what hardware may have
    /// kept, and leaves and raw entries. Where there are many, only those that the operation can have touched; all of them
    /// now and then, and in [`Pair::compare`], with which a sequence should end.
    ///
    /// Where the page source fails meanwhile ([`ScarcePages::run_out`]), the table may have done a part of the operation, or
    /// (a window) more than was asked for. Then every translation that is left must be one that there was before or would
    /// have been after, none that both had may be missing, no fact may be lost, and the model goes on from there.
    ///
    /// # Errors
    /// [`Disagreement`]. What follows after one says nothing.
    pub fn step(&mut self, op: &Op) -> Result<Step, Disagreement> {
        let index = self.index;
        self.index += 1;
        self.apply(op).map_err(|why| Disagreement { index, op: *op, why: Box::new(why) })
    }

    /// Compares everything, whatever the number of leaves.
    ///
    /// # Errors
    /// What differs first.
    pub fn compare(&self) -> Result<(), Why> {
        self.compare_between(0, self.end())?;
        self.check()
    }

    /// Checks every raw entry.
    fn check(&self) -> Result<(), Why> {
        let checked = self.driver.table().check();
        checked.map_err(|(at, source)| DriveError::from(Wrong::Entry { at, source }).into())
    }

    fn end(&self) -> u64 {
        1 << self.model.shape().gpa_bits()
    }

    fn apply(&mut self, op: &Op) -> Result<Step, Why> {
        let failed = self.driver.pages().failed();
        let before = self.driver.pages().may_run_out().then(|| self.model.clone());
        if let Err(reject) = op.check(self.model.shape()) {
            return Ok(Step::Rejected(reject));
        }
        let (start, end) = self.reach(op);
        let expected = match self.model.apply(op) {
            Ok(outcome) => outcome,
            Err(reject) => return Ok(Step::Rejected(reject)),
        };
        let found = self.driver.apply(op);
        if let (Some(before), true) = (before, self.driver.pages().failed() != failed) {
            match found {
                Ok(_) | Err(DriveError::OutOfPages { .. }) => {}
                Err(error) => return Err(error.into()),
            }
            self.check()?;
            self.driver.check_cached()?;
            self.adopt(op, &before)?;
            return Ok(Step::OutOfPages);
        }
        let found = found?;
        if found != expected {
            return Err(Why::Answer { found, expected });
        }
        self.driver.check_cached()?;
        // I12: what was dirty in an entry that is gone has been reported.
        for &(gpa, leaf) in self.model.removed() {
            if leaf.dirty && !self.driver.was_reported(gpa, gpa + leaf.size) {
                return Err(Why::LostWrite { gpa });
            }
        }
        let removed = self.model.removed();
        for run in removed.chunk_by(|(gpa, leaf), (next, _)| gpa + leaf.size == *next) {
            if let (Some((first, _)), Some((last, leaf))) = (run.first(), run.last()) {
                self.driver.forget(*first, last + leaf.size);
            }
        }
        if !self.whole_touches && matches!(op, Op::Touch { .. } | Op::Walk { .. }) {
            self.compare_between(start, end)?;
        } else if self.model.leaf_count() < FEW {
            self.compare()?;
        } else {
            self.looked_at += self.compare_between(start, end)?;
            if self.looked_at >= TIMES * self.model.leaf_count() {
                self.looked_at = 0;
                self.compare_between(0, self.end())?;
            }
        }
        Ok(Step::Answered(found))
    }

    /// What an operation can touch, start and end: its range, and leaves that lie across its ends, which may be cut.
    pub fn reach(&self, op: &Op) -> (u64, u64) {
        let (gpa, size) = op.named(self.model.shape().granule());
        let end = gpa.saturating_add(size);
        let first = self.model.leaf(gpa).map_or(gpa, |(start, _)| start);
        (first, self.model.leaf(end - 1).map_or(end, |(start, leaf)| start + leaf.size))
    }

    /// Compares the leaves that have a byte in `start..end`, and checks the raw entries there and above; how many leaves.
    fn compare_between(&self, start: u64, end: u64) -> Result<usize, Why> {
        let mut theirs = self.model.leaves_in(start, end).map(|(gpa, leaf)| (gpa, *leaf));
        let leaves = self.driver.leaves(start, end)?;
        let count = leaves.len();
        for ours in leaves {
            let expected = theirs.next();
            if expected != Some(ours) {
                return Err(Why::Leaf { found: Some(ours), expected });
            }
        }
        match theirs.next() {
            None => Ok(count),
            expected => Err(Why::Leaf { found: None, expected }),
        }
    }

    /// After want of pages: compares what is left with both ends that the operation may have, and goes on from it.
    fn adopt(&mut self, op: &Op, before: &Model) -> Result<(), Why> {
        let leaves = self.driver.leaves(0, self.end())?;
        let left = Model::with_leaves(self.model.shape().clone(), &leaves)?;
        for &(gpa, leaf) in &leaves {
            possible(before, &self.model, gpa, leaf)?;
        }
        // A window takes a leaf whole that it cannot split: over the page only, and as it was before.
        let whole = match *op {
            Op::Change { gpa, .. } | Op::ZapChange { gpa, .. } => {
                before.leaf(gpa).map(|(start, leaf)| (start, leaf.size))
            }
            _ => None,
        };
        for (gpa, leaf) in before.leaves() {
            if whole != Some((gpa, leaf.size)) {
                kept(&left, &self.model, gpa, leaf)?;
            }
            // A harvest asks for no page: what was written is written still, or somebody was told.
            let end = gpa + leaf.size;
            let still = left.leaves_in(gpa, end).filter(|(_, leaf)| leaf.dirty).map(|(at, leaf)| {
                let from = at.max(gpa);
                (at + leaf.size).min(end) - from
            });
            if leaf.dirty && still.sum::<u64>() < leaf.size && !self.driver.was_reported(gpa, end) {
                return Err(Why::LostWrite { gpa });
            }
        }
        self.driver.forget_all_but(&leaves);
        self.model = left;
        Ok(())
    }
}

/// Whether each byte of a leaf is as `before` or as `after` has it, with no more rights and no facts that neither has.
fn possible(before: &Model, after: &Model, gpa: u64, leaf: Leaf) -> Result<(), Why> {
    let end = gpa + leaf.size;
    let mut at = gpa;
    while at < end {
        let like = |model: &Model| {
            let (start, other) = model.leaf(at)?;
            let same = other.out.checked_add(at - start) == Some(leaf.out + (at - gpa)) && other.mem == leaf.mem;
            let less = other.access.contains(leaf.access) && (other.writable() || !leaf.writable());
            let facts = other.dirty || !leaf.dirty;
            let logged = other.logging == leaf.logging || leaf.logging != Logging::Off;
            (same && less && facts && logged).then_some(start + other.size)
        };
        at = match [before, after].into_iter().filter_map(like).max() {
            Some(next) => next,
            None => return Err(Why::Made { gpa: at, leaf }),
        };
    }
    Ok(())
}

/// Whether what `after` has as `leaf` does is in `left`, with at least the rights that both have.
fn kept(left: &Model, after: &Model, gpa: u64, leaf: &Leaf) -> Result<(), Why> {
    let end = gpa + leaf.size;
    let mut at = gpa;
    while at < end {
        let Some((start, other)) = after.leaf(at) else {
            // Gone in the end: whether it is gone already does not matter.
            at = after.leaves_in(at, end).next().map_or(end, |(next, _)| next);
            continue;
        };
        let out = leaf.out + (at - gpa);
        let stop = (start + other.size).min(end);
        if other.out.checked_add(at - start) != Some(out) || other.mem != leaf.mem {
            at = stop;
            continue;
        }
        match left.leaf(at) {
            Some((from, found))
                if found.out.checked_add(at - from) == Some(out)
                    && [leaf, other].iter().any(|both| found.access.contains(both.access))
                    && (found.writable() || !leaf.writable() || !other.writable()) =>
            {
                at = stop.min(from + found.size);
            }
            _ => return Err(Why::Taken { gpa: at }),
        }
    }
    Ok(())
}

/// Applies `ops` to a table and to the model, and compares what they answer and what they are after each.
///
/// # Errors
/// The first [`Disagreement`]. A table that cannot be made disagrees before the first operation, which is a walk of 0 then.
pub fn agree<F: Format>(driven: Driven<F>, ops: &[Op]) -> Result<(), Disagreement> {
    let before = |why| Disagreement { index: 0, op: Op::Walk { gpa: 0 }, why: Box::new(why) };
    let mut pair = Pair::new(driven).map_err(|error| before(error.into()))?;
    for op in ops {
        pair.step(op)?;
    }
    let Some(last) = ops.last() else { return Ok(()) };
    pair.compare().map_err(|why| Disagreement { index: ops.len() - 1, op: *last, why: Box::new(why) })
}

/// As [`agree`], in want of pages: before an operation with `Some((after, pages))`, [`ScarcePages::run_out`] is told so (of twice
/// as many calls: the engine asks for a page that it does not get once more). When the operation is over there are pages again, and one that found none is put again, which has to work. How many found
/// none.
///
/// # Errors
/// The first [`Disagreement`], as for [`agree`].
pub fn agree_in_want<F: Format>(driven: Driven<F>, ops: &[(Op, Option<(u64, u64)>)]) -> Result<usize, Disagreement> {
    let before = |why| Disagreement { index: 0, op: Op::Walk { gpa: 0 }, why: Box::new(why) };
    let mut pair = Pair::new(driven).map_err(|error| before(error.into()))?;
    let mut found_none = 0;
    for (op, want) in ops {
        if let Some((after, pages)) = *want {
            pair.driver.pages().run_out(after, pages.saturating_mul(2));
        }
        let step = pair.step(op)?;
        pair.driver.pages().recover();
        if step == Step::OutOfPages {
            found_none += 1;
            pair.step(op)?;
        }
    }
    let Some((last, _)) = ops.last() else { return Ok(0) };
    match pair.compare() {
        Ok(()) => Ok(found_none),
        Err(why) => Err(Disagreement { index: pair.index, op: *last, why: Box::new(why) }),
    }
}
