// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Random sequences of operations on a table that a machine walks, beside the model.
//!
//! After each operation a guest accesses a few places in and around what it changed. Answers, leaves, raw entries and facts are
//! compared by [`Pair`], as for a table that only software walks; what differs is that accesses are the machine's, and that
//! what hardware writes into the table was written by somebody else.
//!
//! Where an operation does not owe a flush although hardware may know of it (ageing: the engine and Linux both leave TLBs alone),
//! the range is flushed here, so that there is one right answer to the next access.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use notifier_core::{AddrRange, Gpa};
use rand::{Rng, RngExt};
use spte_core::format::{Format, Level};
use spte_drive::{Disagreement, DriveError, Pair, ScarcePages, Step};
use spte_model::{Op, PageChoice, Shape, TouchKind};
use thiserror::Error;

use crate::machine::{Ground, Machine};
use crate::memory::TablePages;
use crate::mmu::{Mmu, describe};

/// A table that a machine walks, beside the model.
pub type Walked<M> = Pair<<M as Machine>::Format, TablePages, Mmu<M>>;

/// Operations of one sequence, without the accesses after each.
pub const OPERATIONS: usize = 32;
/// Accesses after each.
const ACCESSES: usize = 8;
/// The most leaves that one mapping is to make.
const MOST_LEAVES: u64 = 1 << 6;
/// Replays that shrinking may take.
const REPLAYS: usize = 2_000;

/// Model and MMU disagree.
#[derive(Debug)]
pub struct Divergence {
    /// The shortest sequence that was found to show it. The fixed pages are mapped before.
    pub ops: Vec<Op>,
    /// What was said of it.
    pub why: String,
    /// The walk to where the last operation begins, entry by entry.
    pub walk: Vec<String>,
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for op in &self.ops {
            writeln!(f, "  {op}")?;
        }
        writeln!(f, "  {}", self.why)?;
        for entry in &self.walk {
            writeln!(f, "    {entry}")?;
        }
        Ok(())
    }
}

/// The table could not be set up for a sequence.
#[derive(Debug, Error)]
pub enum SetUp {
    /// The table or its model.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// A fixed page.
    #[error("a fixed page: {0}")]
    Fixed(#[from] Disagreement),
}

/// Guest addresses that operations keep away from: the entry above the fixed pages.
pub fn reserved<F: Format>(format: &F, ground: &Ground) -> Range<u64> {
    let above = Level::LEAF.above().filter(|level| *level <= format.geometry().top()).unwrap_or(Level::LEAF);
    let (unit, granule) = (format.geometry().span(above), format.geometry().span(Level::LEAF));
    let pages = || ground.fixed.iter().map(|page| page.gpa);
    let (Some(first), Some(last)) = (pages().min(), pages().max()) else { return 0..0 };
    first & !(unit - 1)..(last + granule).next_multiple_of(unit)
}

/// What a sequence is made of and put to.
#[derive(Debug)]
pub struct Sequences<M: Machine> {
    mmu: Mmu<M>,
    ground: Ground,
    shape: Shape,
    reserved: Range<u64>,
}

impl<M: Machine> Sequences<M> {
    /// Sequences for this machine.
    pub fn new(mmu: Mmu<M>) -> Self {
        let (driven, ground) = {
            let machine = mmu.machine();
            (machine.driven(), machine.ground().clone())
        };
        let reserved = reserved(&driven.format, &ground);
        Self { mmu, ground, shape: driven.shape, reserved }
    }

    /// An empty table, but for the fixed pages.
    ///
    /// # Errors
    /// [`SetUp`].
    pub fn table(&self) -> Result<Walked<M>, SetUp> {
        let driven = self.mmu.machine().driven();
        let pages = TablePages::new(Arc::clone(&self.ground.memory), self.ground.tables.clone());
        let mut pair = Pair::with_hardware(driven, ScarcePages::new(pages), self.mmu.clone())?;
        pair.spare_touches();
        for page in &self.ground.fixed {
            let (gpa, out, size) = (page.gpa, page.output, self.shape.granule());
            pair.step(&Op::Map {
                gpa,
                out,
                size,
                access: page.access,
                page: PageChoice::Granule,
                mem: Default::default(),
            })?;
            for kind in [TouchKind::Read, TouchKind::Write, TouchKind::Execute] {
                if page.access.contains(kind.needs()) {
                    pair.step(&Op::Touch { gpa, kind })?;
                }
            }
        }
        Ok(pair)
    }

    /// Whether an access can be told right from wrong: it is none of the fixed pages, and reaches data or nothing.
    pub fn is_told(&self, pair: &Walked<M>, at: u64) -> bool {
        let end = 1 << self.shape.gpa_bits();
        let leads = || pair.model().translate(at).is_none_or(|page| self.ground.data.contains(&page.out));
        at < end && !self.reserved.contains(&at) && leads()
    }

    /// One operation on both, if it keeps away from the fixed pages and can be told right from wrong.
    ///
    /// # Errors
    /// [`Disagreement`].
    pub fn step(&self, pair: &mut Walked<M>, op: &Op) -> Result<Option<Step>, Disagreement> {
        let (start, end) = extent(op, self.shape.granule());
        let apart = end <= self.reserved.start || self.reserved.end <= start;
        if !apart || matches!(op, Op::Touch { gpa, .. } if !self.is_told(pair, *gpa)) {
            return Ok(None);
        }
        let step = pair.step(op)?;
        if let (Op::Age { .. }, Step::Answered(_)) = (op, &step) {
            let (first, last) = pair.reach(op);
            if let Ok(range) = AddrRange::new(Gpa::new(first), Gpa::new(last)) {
                // A machine that is lost says so at the next access.
                let _ = self.mmu.forget(range);
            }
        }
        Ok(Some(step))
    }

    /// Operations for one sequence: the model's own, with outputs that a guest can reach.
    pub fn operations(&self, rng: &mut impl Rng) -> Vec<Op> {
        let mut bytes = [0; 8 * OPERATIONS];
        rng.fill(&mut bytes[..]);
        let mut ops = Op::decode(&self.shape, &bytes);
        for op in &mut ops {
            // Sequences of these lengths would mostly meet what is not mapped.
            if rng.random_ratio(1, 4) {
                let page = if rng.random() { PageChoice::Max } else { PageChoice::Granule };
                *op = self.mapping(rng, op, page);
            }
            match op {
                Op::Map { gpa, out, size, .. } => {
                    // Large ones out of step with their outputs would be smallest leaves without number.
                    let steers = *size > MOST_LEAVES * self.shape.granule() || rng.random_bool(0.5);
                    *out = self.output(*gpa, *out, *size, steers);
                }
                Op::Change { out, .. } | Op::ZapChange { out, .. } => *out = self.output(0, *out, 0, false),
                _ => {}
            }
        }
        ops
    }

    /// A mapping where `op` is, that is not refused for its rights, of as many leaves as decoded operations have.
    fn mapping(&self, rng: &mut impl Rng, op: &Op, page: PageChoice) -> Op {
        let (gpa, _) = extent(op, self.shape.granule());
        let rights = self.shape.access();
        let access = if rng.random() { rights[0] } else { rights[rng.random_range(0..rights.len())] };
        let sizes = self.shape.leaf_sizes();
        let unit = match page {
            PageChoice::Granule => sizes[0],
            _ => sizes[rng.random_range(0..sizes.len())],
        };
        let end = 1 << self.shape.gpa_bits();
        let gpa = gpa.min(end - 1) & !(unit - 1);
        let size = (unit * rng.random_range(1..4)).min(end - gpa);
        Op::Map { gpa, out: rng.random(), size, access, page, mem: Default::default() }
    }

    /// An output in the data; `steers`: one that keeps step with `gpa`, so that the largest leaf is possible that holds data.
    fn output(&self, gpa: u64, out: u64, size: u64, steers: bool) -> u64 {
        let Range { start, end } = self.ground.data;
        let fits = |leaf: &u64| size.checked_next_power_of_two().is_none_or(|size| *leaf <= size);
        match self.shape.leaf_sizes().iter().copied().rfind(fits) {
            Some(leaf) if steers => {
                let output = start & !(leaf - 1) | gpa & (leaf - 1);
                if leaf < end - start { output + (out % ((end - start) / leaf)) * leaf } else { output }
            }
            _ => start + out % (end - start) / self.shape.granule() * self.shape.granule(),
        }
    }

    /// Accesses in and around what `op` touches.
    fn accesses(&self, rng: &mut impl Rng, pair: &Walked<M>, op: &Op) -> Vec<Op> {
        let granule = self.shape.granule();
        let (start, end) = extent(op, granule);
        let touch = |rng: &mut dyn FnMut() -> u64| {
            let place = rng();
            let at = match place % 16 {
                6.. => self.mapped(rng, pair).unwrap_or(start),
                0 => start,
                1 => start.saturating_sub(1),
                2 => end.saturating_sub(1),
                3 => end,
                4 => start + (rng() % (end - start).max(1)),
                // Where large leaves lead to data.
                _ => {
                    let data = self.ground.data.start + rng() % (self.ground.data.end - self.ground.data.start);
                    let largest = *self.shape.leaf_sizes().last().unwrap_or(&granule);
                    start & !(largest - 1) | data & (largest - 1)
                }
            };
            let kind = [TouchKind::Read, TouchKind::Write, TouchKind::Execute][(rng() % 3) as usize];
            Op::Touch { gpa: at ^ ((rng() % granule) & !7), kind }
        };
        (0..ACCESSES).map(|_| touch(&mut || rng.random())).collect()
    }

    /// Somewhere in a leaf, in data if it leads to any.
    fn mapped(&self, rng: &mut dyn FnMut() -> u64, pair: &Walked<M>) -> Option<u64> {
        let count = pair.model().leaf_count() as u64;
        let (start, leaf) = pair.model().leaves().nth((rng() % count.max(1)) as usize)?;
        let (first, last) = (leaf.out.max(self.ground.data.start), (leaf.out + leaf.size).min(self.ground.data.end));
        if first >= last { Some(start) } else { Some(start + (first - leaf.out) + rng() % (last - first)) }
    }

    /// One random sequence: what was done, and what was wrong in the end.
    fn run(&self, rng: &mut impl Rng) -> (Vec<Op>, Option<String>) {
        let mut done = Vec::new();
        let mut pair = match self.table() {
            Ok(pair) => pair,
            Err(error) => return (done, Some(error.to_string())),
        };
        for op in self.operations(rng) {
            done.push(op);
            let mut found = self.step(&mut pair, &op);
            if found.is_ok() {
                for touch in self.accesses(rng, &pair, &op) {
                    done.push(touch);
                    found = self.step(&mut pair, &touch);
                    if found.is_err() {
                        break;
                    }
                }
            }
            if let Err(error) = found {
                return (done, Some(error.why.to_string()));
            }
        }
        let compared = pair.compare();
        (done, compared.err().map(|why| why.to_string()))
    }

    /// One random sequence.
    ///
    /// # Errors
    /// [`Divergence`], shrunk.
    pub fn case(&self, rng: &mut impl Rng) -> Result<(), Divergence> {
        match self.run(rng) {
            (_, None) => Ok(()),
            (done, Some(why)) => Err(self.shrunk(done, why)),
        }
    }

    /// Whether one random sequence diverges.
    pub fn diverges(&self, rng: &mut impl Rng) -> bool {
        self.run(rng).1.is_some()
    }

    /// Applies operations to an empty table: what is wrong, and the walk to where the last one begins.
    pub fn replay(&self, ops: &[Op]) -> Option<(String, Vec<String>)> {
        let mut pair = self.table().ok()?;
        for op in ops {
            if let Err(error) = self.step(&mut pair, op) {
                let table = pair.driver().table();
                let (at, _) = extent(op, self.shape.granule());
                let walk = table.walk(Gpa::new(at));
                let walk = walk.iter().map(|found| describe(table.format(), found)).collect();
                return Some((error.why.to_string(), walk));
            }
        }
        pair.compare().err().map(|why| (why.to_string(), Vec::new()))
    }

    /// Leaves out what is not needed, as long as something is still wrong.
    fn shrunk(&self, mut ops: Vec<Op>, why: String) -> Divergence {
        // A machine that is gone shows nothing any more.
        if let Err(error) = self.table() {
            return Divergence { ops, why: format!("{why}; and then {error}"), walk: Vec::new() };
        }
        let mut found = match self.replay(&ops) {
            Some((why, walk)) => Divergence { ops: ops.clone(), why, walk },
            None => {
                let why = format!("{why} (and not when it was repeated)");
                return Divergence { ops, why, walk: Vec::new() };
            }
        };
        let mut replays = 0;
        let mut piece = ops.len().div_ceil(2);
        while piece > 0 {
            let mut from = 0;
            while from < ops.len() && replays < REPLAYS {
                let without: Vec<Op> = ops[..from].iter().chain(ops.iter().skip(from + piece)).copied().collect();
                replays += 1;
                match self.replay(&without) {
                    Some((why, walk)) => {
                        ops = without;
                        found = Divergence { ops: ops.clone(), why, walk };
                    }
                    None => from += piece,
                }
            }
            piece = if piece == 1 { 0 } else { piece.div_ceil(2) };
        }
        found
    }
}

/// What an operation names: start and end.
fn extent(op: &Op, granule: u64) -> (u64, u64) {
    let (gpa, size) = op.named(granule);
    (gpa, gpa.saturating_add(size))
}
