// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Unlinking of tables against installers.

use std::{
    ptr::NonNull,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use notifier_core::{Access, OutputAddr, Space, primitive::Twin};
use spte_core::{
    Entry, Flush, HeapPages, Level, OutOfPages, PageSource, Table, TableLayout,
    format::{Format, Kind},
};

use crate::{
    harness::{Gate, Model, OLD, World, page, pages, race_in, saw},
    tiny::Tiny,
};

/// The page of the leaf table that spans the first two pages.
fn leaf_table<P: PageSource, X: Flush>(table: &Table<Tiny, P, X>) -> OutputAddr {
    match table.walk(page(0))[0].kind {
        Kind::Table(child) => child,
        other => panic!("no table at the root but {other:?}"),
    }
}

/// What the second entry of the table page `at` is, read by a read-modify-write: not an old value of it.
fn second_entry<P: PageSource, X: Flush>(table: &Table<Tiny, P, X>, at: OutputAddr) -> Kind {
    // SAFETY: the page came from this source for a table of two entries, and in models without reclamation no page that
    // was linked once is ever freed.
    let entry = unsafe { table.pages().entries(at, TableLayout { bytes: 16 }).add(1).as_ref() };
    let raw = entry.compare_exchange(u64::MAX, u64::MAX).unwrap_or_else(|found| found);
    table.format().kind(Level::LEAF, raw)
}

/// One thread unmaps a whole leaf table that has a page in it, while a fault maps the other one.
fn unmapped() {
    let world = Arc::new(World::new(Tiny::deep()));
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    let unlinked = leaf_table(&world.table);
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || race_in(&world.table, &mut walker, pages(1, 1), || OLD)
    });
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            world.table.unmap(pages(0, 2)).unwrap();
            second_entry(&world.table, unlinked)
        }
    });
    let installed = fault.join().unwrap();
    let then = remover.join().unwrap();
    let now = second_entry(&world.table, unlinked);
    let first = world.leaf(page(0));
    World::end(world);
    saw(match (then, now) {
        (Kind::Dead, Kind::Dead) => "the unlinked table is dead",
        _ => "the unlinked table is alive",
    });
    assert!(then == Kind::Leaf || now != Kind::Leaf, "nothing_is_published_into_an_unlinked_table");
    assert!(first.is_none(), "what_is_unmapped_is_gone");
    assert!(installed, "an_unlinking_fails_no_fault");
}

/// One thread trims an empty leaf table, while a fault maps a page of its span.
fn trimmed() {
    let world = Arc::new(World::new(Tiny::deep()));
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    world.table.unmap(pages(0, 1)).unwrap();
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || race_in(&world.table, &mut walker, pages(1, 1), || OLD)
    });
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            saw(match world.table.trim(pages(0, 2)).unwrap() {
                0 => "in use",
                _ => "trimmed",
            });
        }
    });
    let installed = fault.join().unwrap();
    remover.join().unwrap();
    let there = world.leaf(page(1)).is_some_and(|leaf| Tiny::output(leaf) == OLD);
    World::end(world);
    assert!(installed, "an_unlinking_fails_no_fault");
    assert!(there, "what_was_mapped_survives_a_trim");
}

#[test]
fn teardown_against_installer() {
    Model { name: "teardown_against_installer", run: unmapped, preemptions: None }
        .holds(&["installed", "the unlinked table is dead"])
        .refuted_without(Twin::UnlinkLeavesChildren, "nothing_is_published_into_an_unlinked_table");
    Model { name: "teardown_against_installer, trim", run: trimmed, preemptions: None }
        .holds(&["in use", "installed", "trimmed"])
        .refuted_without(Twin::UnlinkLeavesChildren, "what_was_mapped_survives_a_trim");
}

/// Pages that stay in being when they are freed, full of a value that no table has: who reads one takes it for a special
/// entry, who writes one is found out.
#[derive(Debug, Default)]
struct Quarantine {
    heap: HeapPages,
    freed: Mutex<Vec<(OutputAddr, TableLayout)>>,
    looked_at: AtomicBool,
}

const FREED: u64 = 0xf4ee;

impl Quarantine {
    fn is_freed(&self, page: OutputAddr) -> bool {
        self.freed.lock().unwrap().iter().any(|(freed, _)| *freed == page)
    }

    /// Whether nobody looked a freed page up or wrote one. For when all threads are done.
    fn is_unharmed(&self) -> bool {
        let freed = self.freed.lock().unwrap();
        let entry = |page, layout, index| {
            // SAFETY: given back to this source, which keeps it; `index` is inside it.
            unsafe { self.heap.entries(page, layout).add(index).as_ref() }
        };
        let written = freed
            .iter()
            .any(|&(page, layout)| (0..layout.entries()).any(|index| entry(page, layout, index).load() != FREED));
        !written && !self.looked_at.load(Ordering::Relaxed)
    }
}

// SAFETY: the pages are those of a `HeapPages`, and live at least as long as there.
unsafe impl PageSource for Quarantine {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        self.heap.alloc(layout, fill)
    }

    unsafe fn free(&self, page: OutputAddr, layout: TableLayout) {
        for index in 0..layout.entries() {
            // SAFETY: the caller says that the page is this source's; `index` is inside it.
            unsafe { self.heap.entries(page, layout).add(index).as_ref() }.store(FREED);
        }
        self.freed.lock().unwrap().push((page, layout));
    }

    unsafe fn entries(&self, page: OutputAddr, layout: TableLayout) -> NonNull<Entry> {
        if self.is_freed(page) {
            self.looked_at.store(true, Ordering::Relaxed);
        }
        // SAFETY: as the caller says; and freed pages are kept.
        unsafe { self.heap.entries(page, layout) }
    }
}

impl Drop for Quarantine {
    fn drop(&mut self) {
        for (page, layout) in self.freed.get_mut().unwrap().drain(..) {
            // SAFETY: given back to this source, and to the heap only now; nobody has the source any more.
            unsafe { self.heap.free(page, layout) };
        }
    }
}

/// One thread unmaps a whole leaf table, whose page is freed as soon as grace allows, while a fault maps a page of its
/// span.
fn reclaimed() {
    let source = Arc::new(Quarantine::default());
    let space = Space::builder().soonest_reclaim().build();
    let world = Arc::new(World::with(space, Tiny::deep(), Arc::clone(&source), ()));
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    let unlinked = leaf_table(&world.table);
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || race_in(&world.table, &mut walker, pages(1, 1), || OLD)
    });
    let remover = gate.spawn({
        let (world, source) = (Arc::clone(&world), Arc::clone(&source));
        move || {
            world.table.unmap(pages(0, 2)).unwrap();
            saw(if source.is_freed(unlinked) { "freed at once" } else { "freed when the fault was done" });
        }
    });
    let installed = fault.join().unwrap();
    remover.join().unwrap();
    let (freed, unharmed) = (source.is_freed(unlinked), source.is_unharmed());
    World::end(world);
    assert!(unharmed, "no_table_page_is_used_after_it_was_freed");
    assert!(freed, "an_unlinked_page_is_freed");
    assert!(installed, "an_unlinking_fails_no_fault");
}

#[test]
fn reclamation_against_installer() {
    Model { name: "reclamation_against_installer", run: reclaimed, preemptions: None }
        .holds(&["freed at once", "freed when the fault was done", "installed"])
        .refuted_without(Twin::RetireFrees, "no_table_page_is_used_after_it_was_freed");
}
