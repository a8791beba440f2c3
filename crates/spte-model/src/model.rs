// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table itself: a sorted map of leaves, and what each operation does to it.
//!
//! Two ideas carry everything:
//! - **Cutting.** An operation on part of a larger leaf first cuts leaves at both ends of its range,
//!   one leaf size at a time, so that what it leaves alone stays as large as possible. Children
//!   inherit every attribute and both facts (accessed, dirty) of the leaf they came from.
//! - **Facts belong to leaves.** Ageing and harvesting only read and clear facts, so they cut
//!   nothing: a larger leaf that the range merely meets is counted, reported and cleared whole.
//!   Half a leaf has no accessed bit, and reporting too much loses no write.

use std::collections::BTreeMap;

use thiserror::Error;

use crate::check::Reject;
use crate::extent::{Extent, coalesce};
use crate::op::{Access, MemType, Op, PageChoice, TouchKind};
use crate::outcome::{Fault, Outcome};
use crate::shape::Shape;

/// How many leaves `map` and `split` may bring a model to. One line of a script can ask for more
/// granules than memory holds; [`Reject::TooManyLeaves`] is the answer.
pub const MAX_LEAVES: u64 = 1 << 22;

/// Where a leaf stands in dirty logging.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Logging {
    /// Never armed. Only hardware that manages dirty knows of writes.
    Off,
    /// Armed: the right to write is withheld until the next write.
    Armed,
    /// A write came and was logged; writing is restored until the next harvest arms again.
    Open,
}

/// One leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Leaf {
    /// Bytes it maps, one of the leaf sizes of the shape.
    pub size: u64,
    /// The output address of its first byte.
    pub out: u64,
    /// The rights granted by `map` or `protect`, less what `change` took away.
    pub access: Access,
    /// The memory type.
    pub mem: MemType,
    /// Whether it is young.
    pub accessed: bool,
    /// Whether it is known to have been written since the last harvest.
    pub dirty: bool,
    /// Dirty logging.
    pub logging: Logging,
}

impl Leaf {
    /// Whether a write goes through without a further fault.
    pub fn writable(&self) -> bool {
        self.access.contains(Access::W) && self.logging != Logging::Armed
    }

    fn extent(&self, gpa: u64) -> Extent {
        Extent { gpa, size: self.size, out: self.out, access: self.access, writable: self.writable(), mem: self.mem }
    }

    /// Whether `next`, `distance` bytes on, can be part of the same larger leaf.
    fn continued_by(&self, next: &Leaf, distance: u64) -> bool {
        let Leaf { accessed, dirty, .. } = *next;
        *next == Leaf { out: self.out + distance, accessed, dirty, ..*self }
    }
}

/// Why no table can have a leaf.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum LeafError {
    /// It is of no leaf size, not aligned to its size on both sides, beyond the address bits, or not behind the one before.
    #[error("there can be no leaf of {size:#x} bytes at {gpa:#x} to {out:#x}")]
    Place {
        /// Where it begins.
        gpa: u64,
        /// Its size in bytes.
        size: u64,
        /// Where it points.
        out: u64,
    },
    /// The shape does not have its rights or memory type.
    #[error("there can be no leaf with rights {access} and memory type {mem} at {gpa:#x}")]
    Attributes {
        /// Where it begins.
        gpa: u64,
        /// Its rights.
        access: Access,
        /// Its memory type.
        mem: MemType,
    },
}

/// A secondary page table, as a sequential program sees it.
#[derive(Clone, Debug)]
pub struct Model {
    shape: Shape,
    /// Leaves by the guest address where they begin. They never overlap; each is aligned to its
    /// size on both sides.
    leaves: BTreeMap<u64, Leaf>,
    removed: Vec<(u64, Leaf)>,
}

impl Model {
    /// An empty table.
    pub fn new(shape: Shape) -> Model {
        Model { shape, leaves: BTreeMap::new(), removed: Vec::new() }
    }

    /// A table with these leaves, ascending: what a real one was found with.
    ///
    /// # Errors
    /// [`LeafError`] if no table of this shape can have them.
    pub fn with_leaves(shape: Shape, leaves: &[(u64, Leaf)]) -> Result<Model, LeafError> {
        let mut end = 0;
        for &(gpa, leaf) in leaves {
            let fits = |start: u64, bits: u32| {
                start % leaf.size == 0 && start.checked_add(leaf.size).is_some_and(|end| end <= 1 << bits)
            };
            let known = shape.leaf_sizes().contains(&leaf.size);
            if !known || !fits(gpa, shape.gpa_bits()) || !fits(leaf.out, shape.out_bits()) || gpa < end {
                return Err(LeafError::Place { gpa, size: leaf.size, out: leaf.out });
            }
            if !shape.supports(leaf.access) || !shape.mem().contains(&leaf.mem) {
                return Err(LeafError::Attributes { gpa, access: leaf.access, mem: leaf.mem });
            }
            end = gpa + leaf.size;
        }
        Ok(Model { shape, leaves: leaves.iter().copied().collect(), removed: Vec::new() })
    }

    /// What this table can do.
    pub fn shape(&self) -> &Shape {
        &self.shape
    }

    /// Every leaf, ascending, with the guest address where it begins.
    pub fn leaves(&self) -> impl Iterator<Item = (u64, &Leaf)> {
        self.leaves.iter().map(|(&gpa, leaf)| (gpa, leaf))
    }

    /// How many leaves there are.
    pub fn leaf_count(&self) -> usize {
        self.leaves.len()
    }

    /// Every leaf that has a byte in `start..end`, ascending, with the guest address where it begins.
    pub fn leaves_in(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, &Leaf)> {
        let first = self.leaf(start).map_or(start, |(first, _)| first);
        self.leaves.range(first..end.max(first)).map(|(&gpa, leaf)| (gpa, leaf))
    }

    /// The leaf over an address, and where it begins.
    pub fn leaf(&self, gpa: u64) -> Option<(u64, &Leaf)> {
        let (&start, leaf) = self.leaves.range(..=gpa).next_back()?;
        (gpa - start < leaf.size).then_some((start, leaf))
    }

    /// Where one byte leads: the extent of that byte alone.
    pub fn translate(&self, gpa: u64) -> Option<Extent> {
        let (start, leaf) = self.leaf(gpa)?;
        let out = leaf.out + (gpa - start);
        Some(Extent { size: 1, out, ..leaf.extent(gpa) })
    }

    /// Whether a write to this byte goes through without a further fault.
    pub fn writable(&self, gpa: u64) -> bool {
        self.leaf(gpa).is_some_and(|(_, leaf)| leaf.writable())
    }

    /// What translates to what, in canonical form: see [`Extent`].
    pub fn extents(&self) -> impl Iterator<Item = Extent> {
        coalesce(self.leaves().map(|(gpa, leaf)| leaf.extent(gpa)))
    }

    /// What the last operation removed, ascending: the facts that a table must have handed to its
    /// caller before the entries were gone.
    pub fn removed(&self) -> &[(u64, Leaf)] {
        &self.removed
    }

    /// Applies one operation.
    ///
    /// # Errors
    /// [`Reject`] if the operation is malformed ([`Op::check`]) or asks for more than [`MAX_LEAVES`].
    /// Nothing was changed then, as with every outcome that begins with `Refused`.
    pub fn apply(&mut self, op: &Op) -> Result<Outcome, Reject> {
        op.check(&self.shape)?;
        self.removed.clear();
        match *op {
            Op::Map { gpa, out, size, access, page, mem } => {
                return self.map(gpa, out, size, access, page, mem);
            }
            Op::Split { gpa, size } => return self.split(gpa, size),
            Op::Collapse { gpa, size } => self.collapse(gpa, size),
            Op::Unmap { gpa, size } => self.remove(gpa, size),
            Op::Protect { access, .. } if !self.shape.supports(access) => {
                return Ok(Outcome::RefusedPerm);
            }
            Op::Protect { gpa, size, access } => {
                // Logging stays as it is: if new rights disarmed it, writes would go unlogged.
                self.cut_out(gpa, size);
                self.for_each(gpa, size, |_, leaf| leaf.access = access);
            }
            Op::WriteProtect { gpa, size } => {
                // Leaves that may not be written are armed too: `protect` may let them later. A
                // dirty fact not yet harvested stays.
                self.cut_out(gpa, size);
                self.for_each(gpa, size, |_, leaf| leaf.logging = Logging::Armed);
            }
            Op::Touch { gpa, kind } => return Ok(self.touch(gpa, kind)),
            Op::Age { gpa, size } => {
                let mut young = 0;
                self.for_each(gpa, size, |_, leaf| {
                    young += u64::from(leaf.accessed);
                    leaf.accessed = false;
                });
                return Ok(Outcome::Aged { young });
            }
            Op::Dirty { gpa, size } => return Ok(self.harvest(gpa, size)),
            Op::Change { gpa, out } => return Ok(self.change(gpa, Some(out))),
            Op::ZapChange { gpa, .. } => return Ok(self.change(gpa, None)),
            Op::Walk { gpa } => {
                let leaf = self.leaf(gpa).map(|(start, leaf)| (start, *leaf));
                return Ok(Outcome::Walk { leaf });
            }
        }
        Ok(Outcome::Ok)
    }

    /// If several refusals apply, the first in the order of the script language's rule 4 is given:
    /// present, page, perm, mem.
    fn map(
        &mut self,
        gpa: u64,
        out: u64,
        size: u64,
        access: Access,
        page: PageChoice,
        mem: MemType,
    ) -> Result<Outcome, Reject> {
        if let Some(&first) = self.starts(gpa, size).first() {
            return Ok(Outcome::RefusedPresent { gpa: first.max(gpa) });
        }
        if let PageChoice::Size(page) = page {
            // The bits of all three at once: none may lie below the page size.
            if !self.shape.leaf_sizes().contains(&page) || (gpa | out | size) % page != 0 {
                return Ok(Outcome::RefusedPage);
            }
        }
        if !self.shape.supports(access) {
            return Ok(Outcome::RefusedPerm);
        }
        if !self.shape.mem().contains(&mem) {
            return Ok(Outcome::RefusedMem);
        }

        let pieces = || pieces(&self.shape, gpa, out, size, page);
        self.room_for(pieces().take(MAX_LEAVES as usize + 1).count() as u64)?;
        let leaves = pieces().map(|(done, size)| {
            let leaf = Leaf { size, out: out + done, access, mem, accessed: true, dirty: false, logging: Logging::Off };
            (gpa + done, leaf)
        });
        self.leaves.extend(leaves);
        Ok(Outcome::Ok)
    }

    /// The accessed bit is looked at before the rights, as arm64 orders these faults (Arm ARM, MMU
    /// fault prioritization). A fault for want of rights leaves no trace.
    fn touch(&mut self, gpa: u64, kind: TouchKind) -> Outcome {
        let (hw_accessed, hw_dirty) = (self.shape.hw_accessed(), self.shape.hw_dirty());
        let Some((&start, leaf)) = self.leaves.range_mut(..=gpa).next_back() else {
            return Outcome::Fault(Fault::Absent);
        };
        if gpa - start >= leaf.size {
            return Outcome::Fault(Fault::Absent);
        }
        if !hw_accessed && !leaf.accessed {
            leaf.accessed = true;
            return Outcome::Fault(Fault::AccessFlag);
        }
        if !leaf.access.contains(kind.needs()) {
            return Outcome::Fault(Fault::Perm);
        }
        leaf.accessed = true;
        if kind == TouchKind::Write {
            // Without hardware's help, a write that nobody withheld is a write that nobody saw.
            leaf.dirty |= hw_dirty || leaf.logging == Logging::Armed;
            if leaf.logging == Logging::Armed {
                leaf.logging = Logging::Open;
            }
        }
        Outcome::Touched { out: leaf.out + (gpa - start) }
    }

    /// Only what was armed before is armed again: where logging was never armed, clearing the dirty
    /// bit is all the re-arming that hardware needs.
    fn harvest(&mut self, gpa: u64, size: u64) -> Outcome {
        let mut rows = Vec::new();
        self.for_each(gpa, size, |start, leaf| {
            if leaf.dirty {
                rows.push((start, leaf.size));
                leaf.dirty = false;
            }
            if leaf.logging == Logging::Open {
                leaf.logging = Logging::Armed;
            }
        });
        Outcome::Dirty { rows }
    }

    /// Repoints the granule at `gpa` to `out`, or zaps it if there is none or the format cannot
    /// express what would be left of its rights. Facts and logging stay with the leaf.
    fn change(&mut self, gpa: u64, out: Option<u64>) -> Outcome {
        let granule = self.shape.granule();
        self.cut_out(gpa, granule);
        let Some(leaf) = self.leaves.get_mut(&gpa) else {
            return Outcome::Absent;
        };
        let access = leaf.access - Access::W;
        match out {
            Some(out) if self.shape.supports(access) => {
                leaf.out = out;
                leaf.access = access;
                Outcome::Changed
            }
            _ => {
                self.remove(gpa, granule);
                Outcome::Zapped
            }
        }
    }

    fn split(&mut self, gpa: u64, size: u64) -> Result<Outcome, Reject> {
        let granule = self.shape.granule();
        let mut added = 0;
        for start in self.starts(gpa, size) {
            let end = (start + self.leaves[&start].size).min(gpa + size);
            added += (end - start.max(gpa)) / granule;
        }
        self.room_for(added)?;
        self.cut_out(gpa, size);
        for start in self.starts(gpa, size) {
            self.break_up(start, granule);
        }
        Ok(Outcome::Ok)
    }

    /// One leaf size at a time, so that granules can become leaves of the largest size.
    fn collapse(&mut self, gpa: u64, size: u64) {
        let sizes = self.shape.leaf_sizes().to_vec();
        for (&small, &large) in sizes.iter().zip(&sizes[1..]) {
            for start in self.starts(gpa, size) {
                if start % large == 0 && start >= gpa && start + large <= gpa + size {
                    self.merge(start, small, large);
                }
            }
        }
    }

    /// Makes one leaf of the `small` ones that begin at `start`, if they are all there and alike.
    fn merge(&mut self, start: u64, small: u64, large: u64) {
        // An earlier merge may have taken this leaf.
        let Some(&first) = self.leaves.get(&start) else {
            return;
        };
        if first.size != small || first.out % large != 0 {
            return;
        }
        let mut merged = Leaf { size: large, ..first };
        let mut parts = 0;
        for (&at, leaf) in self.leaves.range(start..start + large) {
            if !first.continued_by(leaf, at - start) {
                return;
            }
            merged.accessed |= leaf.accessed;
            merged.dirty |= leaf.dirty;
            parts += 1;
        }
        if parts == large / small {
            for at in self.starts(start, large) {
                self.leaves.remove(&at);
            }
            self.leaves.insert(start, merged);
        }
    }

    fn remove(&mut self, gpa: u64, size: u64) {
        self.cut_out(gpa, size);
        for start in self.starts(gpa, size) {
            self.removed.extend(self.leaves.remove_entry(&start));
        }
    }

    /// Where the leaves begin that have a byte in the range, ascending.
    fn starts(&self, gpa: u64, size: u64) -> Vec<u64> {
        let first = self.leaf(gpa).map_or(gpa, |(start, _)| start);
        self.leaves.range(first..gpa + size).map(|(&start, _)| start).collect()
    }

    /// Every leaf that has a byte in the range, ascending.
    fn for_each(&mut self, gpa: u64, size: u64, mut visit: impl FnMut(u64, &mut Leaf)) {
        let first = self.leaf(gpa).map_or(gpa, |(start, _)| start);
        for (&start, leaf) in self.leaves.range_mut(first..gpa + size) {
            visit(start, leaf);
        }
    }

    /// Cuts so that no leaf is partly in the range.
    fn cut_out(&mut self, gpa: u64, size: u64) {
        self.cut_at(gpa);
        self.cut_at(gpa + size);
    }

    /// Cuts so that no leaf lies across `at`, which is aligned to the granule.
    fn cut_at(&mut self, at: u64) {
        while let Some((start, leaf)) = self.leaf(at) {
            let smaller = self.shape.below(leaf.size);
            match smaller {
                Some(smaller) if start != at => self.break_up(start, smaller),
                _ => return,
            }
        }
    }

    /// Replaces the leaf that begins at `start` by leaves of a smaller size.
    fn break_up(&mut self, start: u64, size: u64) {
        let Some(leaf) = self.leaves.get(&start).copied() else {
            return;
        };
        for distance in (0..leaf.size).step_by(size as usize) {
            let part = Leaf { size, out: leaf.out + distance, ..leaf };
            self.leaves.insert(start + distance, part);
        }
    }

    fn room_for(&self, added: u64) -> Result<(), Reject> {
        if self.leaves.len() as u64 + added > MAX_LEAVES {
            return Err(Reject::TooManyLeaves);
        }
        Ok(())
    }
}

/// The leaves that a `map` makes: the offset and size of each.
fn pieces(shape: &Shape, gpa: u64, out: u64, size: u64, page: PageChoice) -> impl Iterator<Item = (u64, u64)> {
    let mut done = 0;
    std::iter::from_fn(move || {
        let here = done;
        if here == size {
            return None;
        }
        let step = match page {
            PageChoice::Granule => shape.granule(),
            PageChoice::Size(page) => page,
            PageChoice::Max => {
                let fits = |leaf: &u64| ((gpa + here) | (out + here)) % leaf == 0 && *leaf <= size - here;
                shape.leaf_sizes().iter().copied().rev().find(fits).unwrap_or(shape.granule())
            }
        };
        done += step;
        Some((here, step))
    })
}
