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
    Entry, Flush, FlushError, FlushRequest, MapOptions, OutOfPages, PageSource, Table, TableLayout,
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
#[derive(Default)]
struct Late(Mutex<Option<Once>>);

struct Flushes(Arc<Late>);

impl Flush for Flushes {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        let meanwhile = self.0.0.lock().unwrap().take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        Ok(())
    }
}

struct Machine {
    space: Space,
    table: Arc<Table<Radix, Pages, Flushes>>,
    pages: Arc<Pages>,
}

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

impl Machine {
    fn new() -> (Arc<Self>, notifier_core::Subscription) {
        let space = Space::builder().page_size(PAGE).unwrap().private_reclaim().build();
        let pages = Arc::new(Pages::default());
        let flush = Flushes(Arc::default());
        let table = Table::new(&space, radix(BasePage::K64), Arc::clone(&pages), flush).unwrap();
        let subscription = space.subscribe(Arc::clone(&table)).unwrap();
        (Arc::new(Self { space, table, pages }), subscription)
    }

    fn map(&self, at: u64, output: u64) {
        let guest = range(at, PAGE);
        let extent = Extent { guest, output: OutputAddr::new(output), access: Access::RWX };
        let mut walker = self.space.walker();
        let resolved = walker.fault(guest).unwrap().resolve(|_| Ok::<_, std::io::Error>(extent)).unwrap();
        resolved.install(|admission| self.table.map(admission, &MapOptions::default())).unwrap();
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
