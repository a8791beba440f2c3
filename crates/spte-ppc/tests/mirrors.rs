// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Trees whose pages hardware walks elsewhere than where the engine keeps them, with tables of 256 bytes side by side: the links to
//! two of them differ in one bit, which in a leaf is R.

mod common;

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use common::*;
use notifier_core::{Access, AddrRange, Extent, Gpa, GpaRange, OutputAddr, Space};
use spte_core::{
    Entry, Flush, FlushError, FlushRequest, MapError, MapOptions, OutOfPages, PageSource, Table, TableLayout,
    format::{Format, Kind},
};
use spte_ppc::*;

const PAGE: u64 = 0x1_0000;
const LARGE: u64 = 2 << 20;

type Once = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    /// A table's own page and the one that hardware walks, and whether it is free.
    tables: BTreeMap<u64, (NonNull<Entry>, NonNull<Entry>, bool)>,
    /// Room for tables of 256 bytes that is left in a page.
    room: Vec<u64>,
    freed_twice: Vec<u64>,
    /// Somebody who comes when the entries of this table are next asked for.
    meanwhile: Option<(u64, Once)>,
}

// SAFETY: the pointers are to atomics that are never given back.
unsafe impl Send for State {}

/// Pages that are never given back, each with a mirror.
#[derive(Default)]
struct Pages(Mutex<State>);

fn words(bytes: usize, align: usize, fill: u64) -> NonNull<Entry> {
    let layout = std::alloc::Layout::from_size_align(bytes, align).unwrap();
    // SAFETY: the size is not zero.
    let page = NonNull::new(unsafe { std::alloc::alloc(layout) }).unwrap().cast::<Entry>();
    for index in 0..bytes / 8 {
        // SAFETY: inside what was just allocated.
        unsafe { page.add(index).write(Entry::new(fill)) };
    }
    page
}

// SAFETY: every page is an allocation of its own, or a piece of 256 bytes of one, that is never given back; the engine alone
// writes it, but for what the tests play.
unsafe impl PageSource for Pages {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let mut state = self.0.lock().unwrap();
        let own = if layout.bytes == 256 {
            if state.room.is_empty() {
                let page = words(512, 512, fill).as_ptr().expose_provenance() as u64;
                state.room = vec![page + 256, page];
            }
            let address = state.room.pop().unwrap() as usize;
            let own = NonNull::new(std::ptr::with_exposed_provenance_mut::<Entry>(address)).unwrap();
            // SAFETY: a piece of a page that nobody else has.
            (0..32).for_each(|index| unsafe { own.add(index).write(Entry::new(fill)) });
            own
        } else {
            words(layout.bytes, layout.bytes, fill)
        };
        let address = own.as_ptr().expose_provenance() as u64;
        state.tables.insert(address, (own, words(layout.bytes, layout.bytes, fill), false));
        Ok(OutputAddr::new(address))
    }

    unsafe fn free(&self, page: OutputAddr, _: TableLayout) {
        let mut state = self.0.lock().unwrap();
        let table = state.tables.get_mut(&page.as_u64()).unwrap();
        if std::mem::replace(&mut table.2, true) {
            state.freed_twice.push(page.as_u64());
        }
    }

    unsafe fn entries(&self, page: OutputAddr, _: TableLayout) -> NonNull<Entry> {
        let mut state = self.0.lock().unwrap();
        let own = state.tables[&page.as_u64()].0;
        if let Some((_, meanwhile)) = state.meanwhile.take_if(|(table, _)| *table == page.as_u64()) {
            drop(state);
            meanwhile();
        }
        own
    }

    unsafe fn mirror(&self, page: OutputAddr, _: TableLayout) -> Option<NonNull<Entry>> {
        Some(self.0.lock().unwrap().tables[&page.as_u64()].1)
    }
}

/// A processor that stores C, and R, into a word while a flush is under way.
#[derive(Clone, Default)]
struct Late(Arc<Mutex<Option<Once>>>);

impl Flush for Late {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        let meanwhile = self.0.lock().unwrap().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        Ok(())
    }
}

struct Machine {
    space: Space,
    table: Arc<Table<Radix, Pages, Late>>,
    pages: Arc<Pages>,
    late: Late,
    heard: Arc<Mutex<Vec<GpaRange>>>,
}

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

impl Machine {
    fn new() -> (Arc<Self>, notifier_core::Subscription) {
        let heard = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&heard);
        let sink = move |range: GpaRange| sink.lock().unwrap().push(range);
        let space = Space::builder().page_size(PAGE).unwrap().private_reclaim().dirty_sink(sink).build();
        let (pages, late) = (Arc::new(Pages::default()), Late::default());
        let table = Table::new(&space, radix(BasePage::K64), Arc::clone(&pages), late.clone()).unwrap();
        let subscription = space.subscribe(Arc::clone(&table)).unwrap();
        (Arc::new(Self { space, table, pages, late, heard }), subscription)
    }

    fn map(&self, at: u64, output: u64) {
        let guest = range(at, PAGE);
        let extent = Extent { guest, output: OutputAddr::new(output), access: Access::RWX };
        let mut walker = self.space.walker();
        let resolved = walker.fault(guest).unwrap().resolve(|_| Ok::<_, std::io::Error>(extent)).unwrap();
        resolved.install(|admission| self.table.map(admission, &MapOptions::default())).unwrap();
    }

    /// The word of the mirror that decides about `at`, at this level.
    fn mirrored(&self, at: u64, number: u8) -> &'static Entry {
        let (format, rows) = (self.table.format(), self.table.walk(Gpa::new(at)));
        let table = match number {
            4 => self.table.root(),
            _ => rows
                .iter()
                .find_map(|row| match row.kind {
                    Kind::Table(child) if row.level.get() == number + 1 => Some(child),
                    _ => None,
                })
                .unwrap(),
        };
        let mirror = self.pages.0.lock().unwrap().tables[&table.as_u64()].1;
        // SAFETY: inside the page, which is never given back.
        unsafe { mirror.add(format.geometry().index(level(number), at)).as_ref() }
    }

    /// During the next flush a processor stores C, and R, into the word that it walked for `at`.
    fn stores_late(&self, at: u64) {
        let (word, facts) = (self.mirrored(at, 1), self.table.format().memory_of(0x180));
        let store = move || {
            let mut found = word.load();
            while let Err(other) = word.compare_exchange(found, found | facts) {
                found = other;
            }
        };
        *self.late.0.lock().unwrap() = Some(Box::new(store));
    }

    /// What was said to be written since this was last asked.
    fn heard(&self) -> Vec<GpaRange> {
        std::mem::take(&mut *self.heard.lock().unwrap())
    }

    /// The leaf table for address 0, if there is one.
    fn leaf_table(&self) -> Option<u64> {
        match self.table.walk(Gpa::new(0))[2].kind {
            Kind::Table(at) => Some(at.as_u64()),
            _ => None,
        }
    }
}

/// Somebody finds an empty table, and before the claim of its link another takes it out and makes the table beside it.
#[test]
fn a_link_to_the_table_beside_it_is_another_link() {
    let (machine, subscription) = Machine::new();
    // Two neighbours keep the directory, and take one piece together.
    machine.map(LARGE, 0x10_0000);
    machine.map(2 * LARGE, 0x11_0000);
    machine.map(0, 0x8_0000);
    machine.table.unmap(range(0, PAGE)).unwrap();
    let first = machine.leaf_table().unwrap();
    let other = Arc::clone(&machine);
    let meanwhile = move || {
        assert_eq!(other.table.trim(range(0, LARGE)).unwrap(), 1);
        other.map(0, 0x9_0000);
        assert_eq!(other.leaf_table(), Some(first + 0x100), "the other half of the same piece");
    };
    machine.pages.0.lock().unwrap().meanwhile = Some((first, Box::new(meanwhile)));
    machine.table.trim(range(0, LARGE)).unwrap();
    assert_eq!(machine.leaf_table(), Some(first + 0x100), "the table in use was taken for the empty one");
    let found = machine.table.entry(Gpa::new(0)).unwrap();
    assert_eq!(found.kind, Kind::Leaf);
    assert_eq!(machine.table.format().spec(found.level, found.raw).output, OutputAddr::new(0x9_0000));
    machine.table.unmap(range(0, LARGE)).unwrap();
    drop(subscription);
    for _ in 0..8 {
        drop(machine.space.pin());
    }
    let state = machine.pages.0.lock().unwrap();
    assert_eq!(state.freed_twice, [0; 0]);
}

#[test]
fn what_a_processor_stores_late_into_a_mirror_is_told() {
    let (machine, subscription) = Machine::new();
    machine.map(0, 0x8_0000);
    machine.stores_late(0);
    machine.table.unmap(range(0, PAGE)).unwrap();
    assert_eq!(machine.heard(), [range(0, PAGE)]);
    assert_eq!(machine.mirrored(0, 1).load(), 0, "and the mirror is clean again");
    // With its table too.
    machine.map(0, 0x8_0000);
    machine.stores_late(0);
    machine.table.unmap(range(0, LARGE)).unwrap();
    assert_eq!(machine.heard(), [range(0, PAGE)]);
    // A fact that somebody else's flush leaves behind is found by who fills the entry, or takes its table.
    let facts = machine.table.format().memory_of(0x180);
    machine.map(PAGE, 0x9_0000);
    machine.mirrored(0, 1).store(facts);
    machine.map(0, 0x8_0000);
    assert_eq!(machine.heard(), [range(0, PAGE)]);
    machine.table.unmap(range(0, 2 * PAGE)).unwrap();
    machine.mirrored(0, 1).store(facts);
    assert_eq!(machine.table.trim(range(0, LARGE)), Ok(3));
    assert_eq!(machine.heard(), [range(0, PAGE)]);
    drop(subscription);
}

#[test]
fn what_a_processor_stores_late_during_a_collapse_goes_to_the_larger_leaf() {
    let (machine, subscription) = Machine::new();
    for at in (0..LARGE).step_by(PAGE as usize) {
        machine.map(at, 0x4000_0000 + at);
    }
    machine.stores_late(3 * PAGE);
    let whole = range(0, LARGE);
    assert_eq!(machine.space.admit(whole, |admission| machine.table.collapse(admission, whole).unwrap()).unwrap(), 1);
    assert_eq!(machine.heard(), []);
    assert_eq!(machine.table.harvest_dirty(whole).unwrap(), [whole]);
    drop(subscription);
}

/// Who claims the entry and gives it back leaves the fact to who collects it.
#[test]
fn a_late_fact_stays_when_a_claim_is_given_back() {
    let (machine, subscription) = Machine::new();
    machine.map(PAGE, 0x9_0000);
    let facts = machine.table.format().memory_of(0x180);
    let guest = range(0, PAGE);
    let extent = Extent { guest, output: OutputAddr::new(0x8_0000), access: Access::RWX };
    let mut walker = machine.space.walker();
    let resolved = walker.fault(guest).unwrap().resolve(|_| Ok::<_, std::io::Error>(extent)).unwrap();
    machine.space.zap(guest).unwrap().close().unwrap();
    machine.mirrored(0, 1).store(facts);
    let overtaken = resolved.install(|admission| machine.table.map(admission, &MapOptions::default()));
    assert!(matches!(overtaken, Err(MapError::Retry(_))));
    assert_eq!((machine.mirrored(0, 1).load(), machine.heard()), (facts, vec![]));
    machine.map(0, 0x8_0000);
    assert_eq!(machine.heard(), [guest]);
    drop(subscription);
}

/// Bit 8 of a link is an address bit, also where a guest has written it.
#[test]
fn what_a_guest_writes_into_the_mirror_of_a_link_is_no_fact() {
    let (machine, subscription) = Machine::new();
    for at in [0, PAGE, LARGE] {
        machine.map(at, 0x10_0000 + at);
    }
    // One of the two links has the bit, and loses it; the other gets it.
    let links = [0, LARGE].map(|at| machine.table.walk(Gpa::new(at))[2].raw);
    assert_eq!(links[0] ^ links[1], 0x100);
    for at in [0, LARGE] {
        let word = machine.mirrored(at, 2);
        word.store(word.load() ^ machine.table.format().memory_of(0x180));
    }
    machine.table.unmap(range(PAGE, PAGE)).unwrap();
    machine.table.unmap(range(LARGE, PAGE)).unwrap();
    assert_eq!(machine.heard(), []);
    assert_eq!([0, LARGE].map(|at| machine.table.walk(Gpa::new(at))[2].raw), links);
    assert_eq!(machine.table.entry(Gpa::new(0)).unwrap().kind, Kind::Leaf);
    machine.table.check().unwrap();
    // The next change of the link puts it right.
    assert_eq!(machine.table.trim(range(LARGE, LARGE)), Ok(1));
    assert_eq!(machine.mirrored(LARGE, 2).load(), 0);
    drop(subscription);
}
