// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Table pages come back to their source: with the collector that all spaces share, whose epochs go by who is pinned in the whole
//! process. So these tests are a program of their own, and run one after the other.

mod common;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, MutexGuard, PoisonError};

use common::{BIG, OUT, PAGE, Tiny, extent, flavours, range, small};
use notifier_core::{Access, Admission, OutputAddr, Space, Subscription};
use spte_core::{Entry, HeapPages, MapError, OutOfPages, PageSource, Table, TableLayout};

/// A source of few pages.
#[derive(Debug)]
struct Pool {
    heap: HeapPages,
    left: AtomicUsize,
}

// SAFETY: the heap's, but fewer.
unsafe impl PageSource for Pool {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let take = |left: usize| left.checked_sub(1);
        let taken = self.left.fetch_update(Ordering::AcqRel, Ordering::Acquire, take);
        taken.map_err(|_| OutOfPages { bytes: layout.bytes })?;
        self.heap.alloc(layout, fill)
    }

    unsafe fn free(&self, page: OutputAddr, layout: TableLayout) {
        // SAFETY: the caller's promise.
        unsafe { self.heap.free(page, layout) };
        self.left.fetch_add(1, Ordering::AcqRel);
    }

    unsafe fn entries(&self, page: OutputAddr, layout: TableLayout) -> NonNull<Entry> {
        // SAFETY: the caller's promise.
        unsafe { self.heap.entries(page, layout) }
    }
}

struct Vm {
    space: Space,
    pages: Arc<Pool>,
    table: Arc<Table<Tiny, Pool, ()>>,
    subscription: Subscription,
}

/// Leaf tables of the first gigantic entry.
const TABLES: u64 = 2;

impl Vm {
    fn new(pages: usize) -> Self {
        let format = flavours().into_iter().find(|format| format.name == "claim").unwrap();
        let space = Space::new();
        let pages = Arc::new(Pool { heap: HeapPages::new(), left: AtomicUsize::new(pages) });
        let table = Table::new(&space, format, Arc::clone(&pages), ()).unwrap();
        let subscription = space.subscribe(Arc::clone(&table)).unwrap();
        Self { space, pages, table, subscription }
    }

    fn fill(&self) -> Result<(), MapError> {
        (0..TABLES).try_for_each(|at| self.map(at * BIG, PAGE))
    }

    fn map(&self, at: u64, len: u64) -> Result<(), MapError> {
        let mut walker = self.space.walker();
        let resolved =
            walker.fault(range(at, len)).unwrap().resolve(|_| Ok::<_, ()>(extent(at, OUT, len, Access::RWX)));
        resolved.unwrap().install(|admission| self.table.map(admission, &small())).map(drop)
    }

    fn zap(&self) {
        self.space.zap(range(0, TABLES * BIG)).unwrap().close().unwrap();
    }

    /// Pages that are not at their source.
    fn taken(&self) -> u64 {
        self.pages.heap.live()
    }
}

fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_source_of_few_pages_lasts() {
    let _alone = alone();
    // Enough for what is linked, and for once that much on its way back.
    let most = Vm::new(usize::MAX);
    most.fill().unwrap();
    let linked = most.taken();
    let vm = Vm::new(2 * linked as usize);
    for round in 0..10_000 {
        vm.fill().unwrap_or_else(|error| panic!("round {round}: {error}"));
        vm.zap();
    }
}

/// Nobody collects, and nothing is ever wanting: what is unlinked comes back by what is done next.
#[test]
fn operations_give_back_what_earlier_ones_have_unlinked() {
    let _alone = alone();
    type Way = (&'static str, fn(&Vm));
    let ways: [Way; 3] = [
        ("zap", |vm| {
            vm.fill().unwrap();
            vm.zap();
        }),
        ("unmap", |vm| {
            vm.fill().unwrap();
            vm.table.unmap(range(0, TABLES * BIG)).unwrap();
        }),
        ("collapse", |vm| {
            if vm.table.stats().tables == 1 {
                vm.map(0, BIG).unwrap();
            }
            vm.table.split(range(0, BIG)).unwrap();
            let merge = |admission: &Admission<'_>| vm.table.collapse(admission, range(0, BIG)).unwrap();
            assert_eq!(vm.space.admit(range(0, BIG), merge).unwrap(), 1);
        }),
    ];
    for (name, way) in ways {
        let vm = Vm::new(usize::MAX);
        let most = (0..1_000).map(|_| {
            way(&vm);
            vm.taken()
        });
        let most = most.max().unwrap();
        // An epoch or two behind.
        assert!(most <= 30, "{name}: {most} pages");
    }
}

#[test]
fn what_was_unlinked_is_collected_when_asked_for() {
    let _alone = alone();
    let vm = Vm::new(usize::MAX);
    vm.fill().unwrap();
    assert!(vm.taken() > 1);
    vm.zap();
    assert_eq!((vm.space.collect(), vm.taken()), (0, vm.table.stats().tables));
}

#[test]
fn who_walks_keeps_what_it_may_be_looking_at() {
    let _alone = alone();
    let vm = Vm::new(usize::MAX);
    vm.fill().unwrap();
    let linked = vm.taken();
    let (entered, leave) = (Barrier::new(2), Barrier::new(2));
    let (entered, leave, space) = (&entered, &leave, &vm.space);
    std::thread::scope(|threads| {
        threads.spawn(move || {
            // A pin, as every walk has one: a scope would hold up the flush, too.
            let pin = space.pin();
            entered.wait();
            leave.wait();
            drop(pin);
        });
        entered.wait();
        vm.zap();
        assert_ne!(vm.space.collect(), 0);
        assert_eq!(vm.taken(), linked);
        leave.wait();
    });
    assert_eq!((vm.space.collect(), vm.taken()), (0, vm.table.stats().tables));
}

#[test]
fn a_table_that_goes_leaves_nothing_behind() {
    let _alone = alone();
    let vm = Vm::new(usize::MAX);
    vm.fill().unwrap();
    vm.zap();
    vm.fill().unwrap();
    let Vm { space, pages, table, subscription } = vm;
    drop((subscription, table, space));
    assert_eq!(pages.heap.live(), 0);
    assert_eq!(Arc::strong_count(&pages), 1);
}
