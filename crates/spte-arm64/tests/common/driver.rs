// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carries the model's operations out on a real table, as a small VMM would: faults that resolve, dirty logging, windows.
//!
//! What the engine leaves to its user is kept here: what the dirty sink heard and nobody harvested yet, and where dirty
//! logging was asked for. Both are kept by byte; a leaf has what any of its bytes has.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use notifier_core::{
    Access, AddrRange, Change, Extent, Gpa, GpaRange, Outcome as PageOutcome, OutputAddr, Space, Subscription, Walker,
};
use spte_core::format::{Format, FormatError, Kind, LeafSpec, Level};
use spte_core::{HeapPages, MapError, MapOptions, Miss, Table, Upgrade};
use spte_model::{Fault, Leaf, Logging, MemType, Model, Op, Outcome, PageChoice, Reject, Shape, TouchKind};

/// What the driver has to know of a format beyond [`Format`].
pub(crate) trait Driven: Format {
    /// The attributes of a memory type, `None` where there are none.
    fn attrs(mem: MemType) -> Option<Self::Attrs>;

    /// Whether hardware records writes. Where it does not, a leaf that may be written counts as written, for safety; what
    /// a user knows exactly is only what was upgraded, and that is what the driver goes by.
    fn records_writes(&self) -> bool;
}

/// A set of addresses, as disjoint ranges.
#[derive(Debug, Clone, Default)]
struct Bytes(BTreeMap<u64, u64>);

impl Bytes {
    /// The parts inside `start..end`.
    fn within(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let before = self.0.range(..start).next_back().map(|(&from, &to)| (from, to));
        let others = self.0.range(start..end).map(|(&from, &to)| (from, to));
        let all = before.into_iter().chain(others);
        all.map(|(from, to)| (from.max(start), to.min(end))).filter(|(from, to)| from < to).collect()
    }

    fn overlaps(&self, start: u64, end: u64) -> bool {
        !self.within(start, end).is_empty()
    }

    fn remove(&mut self, start: u64, end: u64) {
        if let Some((&from, &to)) = self.0.range(..start).next_back()
            && to > start
        {
            self.0.insert(from, start);
            if to > end {
                self.0.insert(end, to);
            }
        }
        let inside: Vec<_> = self.0.range(start..end).map(|(&from, &to)| (from, to)).collect();
        for (from, to) in inside {
            self.0.remove(&from);
            if to > end {
                self.0.insert(end, to);
            }
        }
    }

    fn insert(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        // Neighbours join.
        let end = self.0.remove(&end).unwrap_or(end);
        match self.0.range_mut(..start).next_back() {
            Some((_, to)) if *to == start => *to = end,
            _ => drop(self.0.insert(start, end)),
        }
    }
}

/// A table and its user.
pub(crate) struct Driver<F: Driven> {
    shape: Shape,
    space: Space,
    pub(crate) table: Arc<Table<F, HeapPages, ()>>,
    subscription: Option<Subscription>,
    walker: Walker,
    heard: Arc<Mutex<Vec<GpaRange>>>,
    /// Written, and not harvested yet, as far as the sink said so; without hardware's records, as far as upgrades said so.
    written: Bytes,
    /// All that the sink ever said, until it is forgotten.
    told: Bytes,
    /// Dirty logging is on, and a write is to be logged.
    armed: Bytes,
    /// Dirty logging is on, and a write was logged.
    open: Bytes,
}

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

fn access(access: spte_model::Access) -> Access {
    use spte_model::Access as Model;
    let pairs = [(Model::R, Access::READ), (Model::W, Access::WRITE), (Model::X, Access::EXECUTE)];
    pairs.into_iter().filter(|(model, _)| access.contains(*model)).map(|(_, ours)| ours).collect()
}

fn model_access(access: Access) -> spte_model::Access {
    use spte_model::Access as Model;
    let pairs = [(Model::R, Access::READ), (Model::W, Access::WRITE), (Model::X, Access::EXECUTE)];
    pairs.into_iter().filter(|(_, ours)| access.contains(*ours)).fold(Model::NONE, |all, (model, _)| all | model)
}

impl<F: Driven> Driver<F> {
    pub(crate) fn new(format: F, shape: Shape) -> Self {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&heard);
        let builder = Space::builder().page_size(shape.granule()).unwrap().private_reclaim();
        let space = builder.dirty_sink(move |range: GpaRange| sink.lock().unwrap().push(range)).build();
        let table = Table::new(&space, format, Arc::new(HeapPages::new()), ()).unwrap();
        let subscription = Some(space.subscribe(Arc::clone(&table)).unwrap());
        let walker = space.walker();
        let [written, told, armed, open] = [(); 4].map(|()| Bytes::default());
        Self { shape, space, table, subscription, walker, heard, written, told, armed, open }
    }

    /// Leaves, ascending, as the model writes them.
    pub(crate) fn leaves(&self) -> Vec<(u64, Leaf)> {
        self.leaves_in(0, 1 << self.shape.gpa_bits())
    }

    /// Leaves that have a byte in `start..end`.
    fn leaves_in(&self, start: u64, end: u64) -> Vec<(u64, Leaf)> {
        let mut leaves = Vec::new();
        self.table.visit(range(start, end - start), |found| {
            if found.kind == Kind::Leaf {
                leaves.push(self.leaf(found.level, found.start.as_u64(), found.span, found.raw));
            }
        });
        leaves
    }

    fn leaf(&self, level: Level, start: u64, size: u64, raw: u64) -> (u64, Leaf) {
        let format = self.table.format();
        let LeafSpec { output, access, armed, accessed, dirty, attrs } = format.spec(level, raw);
        let mem = MemType::ALL.into_iter().find(|mem| F::attrs(*mem) == Some(attrs)).unwrap();
        let logging = if self.armed.overlaps(start, start + size) {
            Logging::Armed
        } else if self.open.overlaps(start, start + size) {
            Logging::Open
        } else {
            Logging::Off
        };
        let withheld = armed && access.writable();
        assert_eq!(withheld, access.writable() && logging == Logging::Armed, "leaf at {start:#x}: {raw:#x}");
        let exact = self.table.format().records_writes();
        let dirty = (dirty && exact) || self.written.overlaps(start, start + size);
        (start, Leaf { size, out: output.as_u64(), access: model_access(access), mem, accessed, dirty, logging })
    }

    /// Facts that the sink heard since this was last asked, which become part of what is known to be written.
    fn listen(&mut self) {
        for range in std::mem::take(&mut *self.heard.lock().unwrap()) {
            let (start, end) = (range.start().as_u64(), range.end().as_u64());
            self.told.insert(start, end);
            if self.table.format().records_writes() {
                self.written.insert(start, end);
            }
        }
    }

    /// Whether the sink has said that `start..end` was written.
    pub(crate) fn was_reported(&mut self, start: u64, end: u64) -> bool {
        self.listen();
        self.told.overlaps(start, end)
    }

    /// What was removed has no logging, and its facts are the caller's.
    pub(crate) fn forget(&mut self, start: u64, end: u64) {
        self.listen();
        for bytes in [&mut self.written, &mut self.told, &mut self.armed, &mut self.open] {
            bytes.remove(start, end);
        }
    }

    fn expresses(&self, rights: Access, attrs: F::Attrs) -> Result<(), FormatError> {
        let spec =
            LeafSpec { output: OutputAddr::new(0), access: rights, armed: false, accessed: true, dirty: false, attrs };
        self.table.format().leaf(Level::LEAF, &spec).map(drop)
    }

    /// Carries `op` out. Facts of what it removed are kept until [`Driver::forget`].
    pub(crate) fn apply(&mut self, op: &Op) -> Result<Outcome, Reject> {
        op.check(&self.shape)?;
        let outcome = match *op {
            Op::Map { gpa, out, size, access: rights, page, mem } => self.map(gpa, out, size, rights, page, mem),
            Op::Unmap { gpa, size } => {
                self.table.unmap(range(gpa, size)).unwrap();
                Outcome::Ok
            }
            Op::Protect { gpa, size, access: rights } => self.protect(gpa, size, access(rights)),
            Op::WriteProtect { gpa, size } => {
                self.cut(gpa, size);
                self.table.arm(range(gpa, size)).unwrap();
                // Only what is mapped now is logged.
                for (start, leaf) in self.leaves_in_unchecked(gpa, gpa + size) {
                    self.armed.insert(start, start + leaf);
                    self.open.remove(start, start + leaf);
                }
                Outcome::Ok
            }
            Op::Touch { gpa, kind } => self.touch(gpa, kind),
            Op::Age { gpa, size } => Outcome::Aged { young: self.table.age(range(gpa, size)).unwrap() },
            Op::Dirty { gpa, size } => self.harvest(gpa, size),
            Op::Change { gpa, out } => self.change(gpa, Some(out)),
            Op::ZapChange { gpa, .. } => self.change(gpa, None),
            Op::Split { gpa, size } => {
                self.table.split(range(gpa, size)).unwrap();
                Outcome::Ok
            }
            Op::Collapse { gpa, size } => self.collapse(gpa, size),
            Op::Walk { gpa } => {
                let found = self.table.entry(Gpa::new(gpa)).filter(|found| found.kind == Kind::Leaf);
                Outcome::Walk {
                    leaf: found.map(|found| self.leaf(found.level, found.start.as_u64(), found.span, found.raw)),
                }
            }
        };
        self.listen();
        Ok(outcome)
    }

    /// Start and size of leaves, without a look at logging.
    fn leaves_in_unchecked(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let mut leaves = Vec::new();
        self.table.visit(range(start, end - start), |found| {
            if found.kind == Kind::Leaf {
                leaves.push((found.start.as_u64(), found.span));
            }
        });
        leaves
    }

    fn cut(&self, gpa: u64, size: u64) {
        self.table.split_at(Gpa::new(gpa)).unwrap();
        self.table.split_at(Gpa::new(gpa + size)).unwrap();
    }

    /// Refusals in the order present, page, rights, memory type.
    fn map(
        &mut self,
        gpa: u64,
        out: u64,
        size: u64,
        rights: spte_model::Access,
        page: PageChoice,
        mem: MemType,
    ) -> Outcome {
        if let Some(&(start, _)) = self.leaves_in_unchecked(gpa, gpa + size).first() {
            let whole = self.walker.fault(range(gpa, size)).unwrap();
            let extent = Extent { guest: range(gpa, size), output: OutputAddr::new(out), access: Access::RWX };
            let resolved = whole.resolve(|_| Ok::<_, ()>(extent)).unwrap();
            let refused =
                resolved.install(|admission| self.table.map(admission, &MapOptions::default().only_absent(true)));
            let Err(MapError::Present { at }) = refused else { panic!("{refused:?}") };
            assert_eq!(at.as_u64(), start.max(gpa));
            return Outcome::RefusedPresent { gpa: at.as_u64() };
        }
        let largest = match page {
            PageChoice::Granule => self.shape.granule(),
            PageChoice::Max => u64::MAX,
            PageChoice::Size(page) => {
                if !self.shape.leaf_sizes().contains(&page) || (gpa | out | size) % page != 0 {
                    return Outcome::RefusedPage;
                }
                page
            }
        };
        let Some(any) = F::attrs(MemType::Wb) else { return Outcome::RefusedMem };
        if self.expresses(access(rights), any).is_err() {
            return Outcome::RefusedPerm;
        }
        let Some(attrs) = F::attrs(mem) else { return Outcome::RefusedMem };
        let options = MapOptions::default().access(access(rights)).attrs(attrs).largest(largest).only_absent(true);
        let fault = self.walker.fault(range(gpa, size)).unwrap();
        let extent = Extent { guest: range(gpa, size), output: OutputAddr::new(out), access: Access::RWX };
        let resolved = fault.resolve(|_| Ok::<_, ()>(extent)).unwrap();
        resolved.install(|admission| self.table.map(admission, &options)).unwrap();
        Outcome::Ok
    }

    /// The rights are the caller's to give: every leaf is resolved to where it points already.
    fn protect(&mut self, gpa: u64, size: u64, rights: Access) -> Outcome {
        let Some(any) = F::attrs(MemType::Wb) else { return Outcome::RefusedMem };
        if self.expresses(rights, any).is_err() {
            return Outcome::RefusedPerm;
        }
        self.cut(gpa, size);
        let table = Arc::clone(&self.table);
        let fault = self.walker.fault(range(gpa, size)).unwrap();
        let resolved = fault.resolve(|fault| {
            let mut extents = Vec::new();
            table.visit(fault.range(), |found| {
                if found.kind == Kind::Leaf {
                    let output = table.format().spec(found.level, found.raw).output;
                    extents.push(Extent { guest: range(found.start.as_u64(), found.span), output, access: rights });
                }
            });
            Ok::<_, ()>(extents)
        });
        let protect = |admission: &notifier_core::Admission<'_>| table.protect(admission, range(gpa, size), rights);
        resolved.unwrap().install(protect).unwrap();
        // Rights that come back must not go round the log.
        for (start, end) in self.armed.within(gpa, gpa + size) {
            self.table.arm(range(start, end - start)).unwrap();
        }
        Outcome::Ok
    }

    /// What a vCPU does, and the fault handler after it.
    fn touch(&mut self, gpa: u64, kind: TouchKind) -> Outcome {
        let wanted = access(kind.needs());
        let table = Arc::clone(&self.table);
        loop {
            let miss = {
                let scope = self.walker.enter();
                match table.translate(&scope, Gpa::new(gpa), wanted) {
                    Ok(found) => return Outcome::Touched { out: found.output().as_u64() },
                    Err(miss) => miss,
                }
            };
            match miss {
                Miss::Absent { .. } => return Outcome::Fault(Fault::Absent),
                Miss::Denied { armed: false, .. } => return Outcome::Fault(Fault::Perm),
                Miss::Denied { armed: true, .. } => {
                    assert_eq!(table.upgrade(Gpa::new(gpa)), Upgrade::Granted);
                    let found = table.entry(Gpa::new(gpa)).unwrap();
                    let (start, end) = (found.start.as_u64(), found.start.as_u64() + found.span);
                    assert!(self.armed.overlaps(start, end), "armed without having been asked for at {gpa:#x}");
                    self.armed.remove(start, end);
                    self.open.insert(start, end);
                    if !table.format().records_writes() {
                        self.written.insert(start, end);
                    }
                }
                Miss::Old { .. } => {
                    assert!(table.make_young(Gpa::new(gpa)));
                    return Outcome::Fault(Fault::AccessFlag);
                }
                other => panic!("{other}"),
            }
        }
    }

    fn harvest(&mut self, gpa: u64, size: u64) -> Outcome {
        self.listen();
        let harvested = if self.table.format().records_writes() {
            self.table.harvest_dirty(range(gpa, size)).unwrap()
        } else {
            Vec::new()
        };
        let mut rows = Vec::new();
        let mut of_table = harvested.iter().peekable();
        for (start, size) in self.leaves_in_unchecked(gpa, gpa + size) {
            let end = start + size;
            let in_table = of_table.next_if(|found| **found == range(start, size)).is_some();
            if in_table || self.written.overlaps(start, end) {
                rows.push((start, size));
                self.written.remove(start, end);
                self.told.remove(start, end);
            }
            if self.open.overlaps(start, end) {
                self.open.remove(start, end);
                self.armed.insert(start, end);
                self.table.arm(range(start, size)).unwrap();
            }
        }
        assert_eq!(of_table.next(), None, "harvested what is no leaf");
        Outcome::Dirty { rows }
    }

    fn change(&mut self, gpa: u64, out: Option<u64>) -> Outcome {
        let page = Gpa::new(gpa);
        let present = self.table.entry(page).filter(|found| found.kind == Kind::Leaf);
        let current = present.map_or(0, |found| {
            let spec = self.table.format().spec(found.level, found.raw);
            spec.output.as_u64() + (gpa - found.start.as_u64())
        });
        let granule = self.shape.granule();
        let guard = self.space.retain(range(gpa, granule)).unwrap();
        let change = match out {
            Some(out) => Change { page, expected: OutputAddr::new(current), new: OutputAddr::new(out) },
            None => Change { page, expected: OutputAddr::new(current ^ granule), new: OutputAddr::new(0) },
        };
        let done = guard.change_pte(&[change]).unwrap();
        guard.close().unwrap();
        match done[0].outcome {
            PageOutcome::Changed => Outcome::Changed,
            PageOutcome::Absent => Outcome::Absent,
            PageOutcome::Zapped => Outcome::Zapped,
        }
    }

    /// Stretches of equal logging are merged each for itself: a leaf is logged or not.
    fn collapse(&mut self, gpa: u64, size: u64) -> Outcome {
        let end = gpa + size;
        let mut bounds = vec![gpa, end];
        for bytes in [&self.armed, &self.open] {
            bounds.extend(bytes.within(gpa, end).into_iter().flat_map(|(from, to)| [from, to]));
        }
        bounds.sort_unstable();
        bounds.dedup();
        for pair in bounds.windows(2) {
            let part = range(pair[0], pair[1] - pair[0]);
            let table = &self.table;
            self.space.admit(part, |admission| table.collapse(admission, part).unwrap()).unwrap();
        }
        self.listen();
        for (start, size) in self.leaves_in_unchecked(gpa, end) {
            for bytes in [&mut self.written, &mut self.told] {
                if bytes.overlaps(start, start + size) {
                    bytes.insert(start, start + size);
                }
            }
        }
        Outcome::Ok
    }
}

impl<F: Driven> Drop for Driver<F> {
    fn drop(&mut self) {
        drop(self.subscription.take());
    }
}

/// Runs `ops` on both, and compares what they answer and what they are after each.
pub(crate) fn agree<F: Driven>(format: F, shape: Shape, ops: &[Op]) {
    let mut model = Model::new(shape.clone());
    let mut driver = Driver::new(format, shape);
    for (index, op) in ops.iter().enumerate() {
        let Ok(expected) = model.apply(op) else { continue };
        let found = driver.apply(op).unwrap();
        assert_eq!(found, expected, "operation {index}, {op}");
        for &(gpa, leaf) in model.removed() {
            // I12: what was dirty in an entry that is gone has been reported.
            let end = gpa + leaf.size;
            assert!(!leaf.dirty || driver.was_reported(gpa, end), "operation {index}, {op}: lost a write at {gpa:#x}");
        }
        for &(gpa, leaf) in model.removed() {
            driver.forget(gpa, gpa + leaf.size);
        }
        if let Err((at, error)) = driver.table.check() {
            panic!("operation {index}, {op}: {at}: {error}");
        }
        // All leaves, where there are few; else now and then.
        if model.leaves().take(2000).count() < 2000 || index % 16 == 0 || index + 1 == ops.len() {
            let ours = driver.leaves();
            let mut theirs = model.leaves();
            for (at, leaf) in &ours {
                assert_eq!(theirs.next(), Some((*at, leaf)), "operation {index}, {op}");
            }
            assert_eq!(theirs.next(), None, "operation {index}, {op}: leaves are missing");
        }
    }
}
