// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine's tests share: tiny formats, a page source and a flush that remember, and a rig of all of them.
#![allow(dead_code, reason = "each test uses a part")]

pub(crate) mod format;
pub(crate) mod pages;

use std::sync::{Arc, Mutex};

use notifier_core::{
    Access, AddrRange, Admission, Extent, FaultError, Gpa, GpaRange, OutputAddr, SlotFlags, Space, Subscription, Walker,
};
use spte_core::format::{Format, Kind};
use spte_core::{Found, MapError, MapOptions, Mapped, Table};

#[allow(unused_imports, reason = "each test uses a part")]
pub(crate) use format::{BIG, PAGE, Tiny, flavours};
#[allow(unused_imports, reason = "each test uses a part")]
pub(crate) use pages::{Event, Recorded, Recorder};

pub(crate) type TinyTable = Table<Tiny, Recorder, Recorded>;

/// Where outputs begin: aligned to every leaf.
pub(crate) const OUT: u64 = 0x100_0000;

pub(crate) fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

/// One leaf as `(guest, output, bytes, rights, armed)`.
pub(crate) type Row = (u64, u64, u64, Access, bool);

/// A table in a space, with everything recorded.
pub(crate) struct Rig {
    pub(crate) format: Tiny,
    pub(crate) space: Space,
    pub(crate) pages: Arc<Recorder>,
    pub(crate) table: Arc<TinyTable>,
    pub(crate) subscription: Option<Subscription>,
    /// What the sink heard.
    pub(crate) dirty: Arc<Mutex<Vec<GpaRange>>>,
}

impl Rig {
    /// Without slots.
    pub(crate) fn new(format: Tiny) -> Self {
        let dirty = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&dirty);
        let builder = Space::builder().private_reclaim();
        let space = builder.dirty_sink(move |range: GpaRange| sink.lock().unwrap().push(range)).build();
        let pages = Arc::new(Recorder::new(format));
        let table = Table::new(&space, format, Arc::clone(&pages), Recorded(Arc::clone(&pages))).unwrap();
        let subscription = Some(space.subscribe(Arc::clone(&table)).unwrap());
        Self { format, space, pages, table, subscription, dirty }
    }

    /// With one slot over all of the table, host address equal to guest address.
    pub(crate) fn with_slot(format: Tiny, flags: SlotFlags) -> Self {
        let rig = Self::new(format);
        let guest = rig.whole();
        let host = Some(notifier_core::Hva::new(0));
        rig.space.add_slot(notifier_core::SlotSpec { guest, host, flags }).unwrap();
        rig
    }

    pub(crate) fn whole(&self) -> GpaRange {
        range(0, 1 << self.format.geometry.address_bits())
    }

    pub(crate) fn walker(&self) -> Walker {
        self.space.walker()
    }

    /// Maps `len` bytes at `at` to `OUT + at`.
    pub(crate) fn map(&self, at: u64, len: u64, options: &MapOptions<u8>) -> Result<Mapped, MapError> {
        self.map_to(at, OUT + at, len, options)
    }

    pub(crate) fn map_to(&self, at: u64, out: u64, len: u64, options: &MapOptions<u8>) -> Result<Mapped, MapError> {
        self.map_extents(range(at, len), vec![extent(at, out, len, Access::RWX)], options)
    }

    pub(crate) fn map_extents(
        &self,
        fault: GpaRange,
        extents: Vec<Extent>,
        options: &MapOptions<u8>,
    ) -> Result<Mapped, MapError> {
        let mut walker = self.walker();
        let fault = walker.fault(fault).map_err(retry)?;
        let resolved = fault.resolve(|_| Ok::<_, ()>(extents)).unwrap();
        resolved.install(|admission| self.table.map(admission, options))
    }

    pub(crate) fn admit<R>(&self, over: GpaRange, operation: impl FnOnce(&Admission<'_>) -> R) -> R {
        self.space.admit(over, operation).unwrap()
    }

    /// Merges what can be merged, unless a window is in the way.
    pub(crate) fn admit_or_retry(&self, over: GpaRange) -> Option<usize> {
        self.space.admit(over, |admission| self.table.collapse(admission, over).ok()).ok().flatten()
    }

    /// Every leaf.
    pub(crate) fn leaves(&self) -> Vec<Row> {
        let mut rows = Vec::new();
        self.table.visit(self.whole(), |found| {
            if found.kind == Kind::Leaf {
                let spec = self.format.spec(found.level, found.raw);
                let armed = spec.armed && spec.access.writable();
                rows.push((found.start.as_u64(), spec.output.as_u64(), found.span, spec.access, armed));
            }
        });
        rows
    }

    /// Output and rights of every page, whatever the sizes of leaves.
    pub(crate) fn translations(&self) -> Vec<(u64, u64, Access, bool)> {
        let pages = self.leaves().into_iter().flat_map(|(at, out, len, access, armed)| {
            (0..len / PAGE).map(move |page| (at + page * PAGE, out + page * PAGE, access, armed))
        });
        pages.collect()
    }

    pub(crate) fn entry(&self, at: u64) -> Found {
        self.table.entry(Gpa::new(at)).unwrap()
    }

    pub(crate) fn take_dirty(&self) -> Vec<GpaRange> {
        std::mem::take(&mut self.dirty.lock().unwrap())
    }

    pub(crate) fn was_reported(&self, at: u64) -> bool {
        self.dirty.lock().unwrap().iter().any(|range| range.contains(Gpa::new(at)))
    }

    /// Lets everything that may be freed be freed.
    pub(crate) fn collect(&self) {
        for _ in 0..100 {
            self.space.collect();
            if self.pages.live() == self.table.stats().tables {
                return;
            }
        }
    }

    /// What holds after every operation: entries are possible, nothing leaks, nothing was freed too early.
    pub(crate) fn verify(&self) {
        self.collect();
        if let Err((at, error)) = self.table.check() {
            panic!("{}: {at}: {error}", self.format.name);
        }
        self.pages.verify();
        self.no_claims();
        assert_eq!(self.pages.live(), self.table.stats().tables, "{}: tables leak", self.format.name);
    }

    /// As [`Rig::verify`], while unlinked tables wait for a flush.
    pub(crate) fn verify_but_limbo(&self) {
        self.collect();
        self.table.check().unwrap();
        self.pages.verify();
        self.no_claims();
    }

    /// Nothing is claimed or dead where nobody works.
    pub(crate) fn no_claims(&self) {
        for page in (0..self.whole().end().as_u64()).step_by(PAGE as usize) {
            for found in self.table.walk(Gpa::new(page)) {
                let claimed = matches!(found.kind, Kind::Claimed | Kind::Dead)
                    || (matches!(found.kind, Kind::Leaf | Kind::Table(_)) && found.raw & self.format.claim_bit() != 0);
                assert!(!claimed, "{}: a claim was left: {found:?}", self.format.name);
            }
        }
    }

    /// The table and the space go: nothing may be left.
    pub(crate) fn end(self) {
        let Self { pages, table, space, subscription, format, .. } = self;
        drop(subscription);
        drop(table);
        drop(space);
        pages.verify();
        assert_eq!(pages.live(), 0, "{}: pages are left", format.name);
    }
}

pub(crate) fn extent(at: u64, out: u64, len: u64, access: Access) -> Extent {
    Extent { guest: range(at, len), output: OutputAddr::new(out), access }
}

fn retry(error: FaultError) -> MapError {
    match error {
        FaultError::Retry(retry) => MapError::Retry(retry),
        other => panic!("{other}"),
    }
}

/// The largest leaves.
pub(crate) fn large() -> MapOptions<u8> {
    MapOptions::default()
}

/// The smallest.
pub(crate) fn small() -> MapOptions<u8> {
    MapOptions::default().largest(PAGE)
}

/// An access as hardware makes it, on the pages that hardware walks. `None` for a miss.
pub(crate) fn hardware_access(rig: &Rig, at: u64, access: Access) -> Option<u64> {
    use spte_core::format::Touch;
    let format = rig.format;
    let mut level = format.geometry.top();
    let mut page = rig.table.root();
    loop {
        let entry = &rig.pages.hardware_page(page)[format.geometry.index(level, at)];
        let memory = entry.load();
        let raw = format.raw_of(memory);
        match format.kind(level, raw) {
            Kind::Table(child) => {
                page = child;
                level = level.below()?;
            }
            Kind::Leaf => match format.touch(level, raw, access) {
                Touch::Allowed(new) => {
                    if new != raw && entry.compare_exchange(memory, format.memory_of(new)).is_err() {
                        continue;
                    }
                    let offset = at & (format.geometry.span(level) - 1);
                    return Some(format.spec(level, raw).output.as_u64() + offset);
                }
                Touch::Denied | Touch::AccessFlag => return None,
            },
            _ => return None,
        }
    }
}
