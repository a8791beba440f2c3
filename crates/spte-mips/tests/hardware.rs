// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Tables as refill handlers and the walker read them: raw loads from raw addresses, with no look at what an entry is, while
//! tables come and go.
//!
//! Each processor has a TLB, and one lock: it walks under it, as a handler has interrupts off, and a flush takes it, as its
//! interrupt waits for the handler's end. Pages that were freed are kept, full of poison: a walk that finds some held a pointer
//! for longer than the engine thought. Guest page `n` is backed by an output whose low bits say `n`, whatever it is repointed to.

mod common;

use std::{
    alloc::Layout,
    collections::BTreeMap,
    ptr::{NonNull, with_exposed_provenance, with_exposed_provenance_mut},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
};

use common::*;
use notifier_core::{Access, AddrRange, Extent, Gpa, GpaRange, OutputAddr, Space};
use spte_core::{
    Entry, Flush, FlushError, FlushRequest, HeapPages, MapOptions, OutOfPages, PageSource, Table, TableLayout,
    format::{Format, Level},
};
use spte_mips::tlb::filled;
use spte_mips::*;

/// What a page is full of when it is free: as a link no address of an unmapped segment, as a leaf valid.
const POISON: u64 = 0x4dea_dfff_dead_ffff;

/// A heap that gives nothing back to the process before the end.
#[derive(Default)]
struct Kept {
    heap: HeapPages,
    freed: AtomicU64,
}

// SAFETY: pages are those of the heap, which are never given back to it.
unsafe impl PageSource for Kept {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        self.heap.alloc(layout, fill)
    }

    unsafe fn free(&self, page: OutputAddr, layout: TableLayout) {
        self.freed.fetch_add(1, Ordering::Relaxed);
        // SAFETY: from `alloc` with this layout.
        let entries = unsafe { self.entries(page, layout) };
        for index in 0..layout.entries() {
            // SAFETY: inside the page, which is never given back.
            unsafe { entries.add(index).as_ref() }.store(POISON);
        }
    }

    unsafe fn entries(&self, page: OutputAddr, layout: TableLayout) -> NonNull<Entry> {
        // SAFETY: as the caller says.
        unsafe { self.heap.entries(page, layout) }
    }
}

/// The sentinels, in memory.
struct Nothing {
    start: *mut u8,
    layout: Layout,
}

impl Nothing {
    fn new(pages: u64, page: u64) -> Self {
        let layout = Layout::from_size_align((pages * page) as usize, page as usize).unwrap();
        // SAFETY: there are pages, each of some bytes.
        let start = unsafe { std::alloc::alloc_zeroed(layout) };
        assert!(!start.is_null());
        Self { start, layout }
    }

    fn fill<O: ByteOrder>(&self, format: &GpaTable<O>) {
        let page = format.options().page.bytes();
        for index in 0..format.sentinels().pages() {
            let value = format.memory_of(format.sentinels().fill(index).unwrap());
            for entry in 0..page / 8 {
                let at = self.address() + index * page + entry * 8;
                // SAFETY: inside the sentinels, aligned, and nobody walks yet.
                unsafe { with_exposed_provenance_mut::<u64>(at as usize).write(value) };
            }
        }
    }

    fn address(&self) -> u64 {
        self.start.expose_provenance() as u64
    }
}

impl Drop for Nothing {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout, and whoever walked has ended.
        unsafe { std::alloc::dealloc(self.start, self.layout) };
    }
}

/// The TLB of one processor, by the first address of each pair.
type Tlb = BTreeMap<u64, Pair>;

struct Processors<O: ByteOrder> {
    format: GpaTable<O>,
    tlbs: Vec<Mutex<Tlb>>,
}

impl<O: ByteOrder> Processors<O> {
    fn lock(&self, processor: usize) -> MutexGuard<'_, Tlb> {
        self.tlbs[processor].lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    fn carry_out(&self, tlb: &mut Tlb, steps: Steps<'_>) {
        for step in steps {
            match step {
                Step::DropPair(at) => drop(tlb.remove(&at)),
                Step::MarkAsids | Step::DropGuestIds => tlb.clear(),
                _ => {}
            }
        }
    }

    /// What a refill does, whatever it finds.
    fn refill(&self, root: OutputAddr, gpa: u64, tlb: &mut Tlb) {
        let (format, geometry) = (&self.format, *self.format.geometry());
        let load = |at: u64| {
            // SAFETY: pages of tables are never given back to the process, and the sentinels stay until the end.
            let memory = unsafe { (*with_exposed_provenance::<AtomicU64>(at as usize)).load(Ordering::Acquire) };
            assert_ne!(memory, POISON, "a walk for {gpa:#x} is in a table that is free");
            format.raw_of(memory)
        };
        let mut table = root.as_u64();
        let mut level = geometry.top();
        while level > Level::LEAF {
            let entry = load(table + 8 * geometry.index(level, gpa) as u64);
            table = bits::unmapped(entry).unwrap_or_else(|| panic!("{entry:#x} leads nowhere, at {level:?}"));
            level = level.below().unwrap();
            thread::yield_now();
        }
        let even = table + 8 * (geometry.index(level, gpa) as u64 & !1);
        let pair = format.pair(gpa, load(even), load(even ^ 8));
        assert!(tlb.insert(pair.entry_hi, pair).is_none(), "machine check");
    }

    /// What the processor makes of an access: the half that is used, after a refill where there was none.
    fn access(&self, processor: usize, root: OutputAddr, gpa: u64) -> EntryLo {
        let mut tlb = self.lock(processor);
        if !tlb.contains_key(&self.format.vpn2(gpa)) {
            self.refill(root, gpa, &mut tlb);
        }
        let half = tlb[&self.format.vpn2(gpa)].half(gpa);
        if half.is_valid() {
            assert_eq!(half.output() & 0xff_ffff_ffff, gpa & !(self.format.options().page.bytes() - 1));
        } else {
            // The trap; whether or not there is anything to resolve, the pair goes.
            self.carry_out(&mut tlb, filled(&self.format, TlbFeatures::default(), gpa));
        }
        half
    }
}

struct Interrupts<O: ByteOrder>(Arc<Processors<O>>);

impl<O: ByteOrder> Flush for Interrupts<O> {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        for processor in 0..self.0.tlbs.len() {
            let mut tlb = self.0.lock(processor);
            self.0.carry_out(&mut tlb, Steps::new(&self.0.format, TlbFeatures::default(), request));
        }
        Ok(())
    }
}

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

/// Numbers that are as good as random.
fn next(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    (*state >> 33) % below
}

const WALKERS: usize = 2;
const OWNERS: u64 = 2;

/// Owners map and unmap, each what is its own, in tables that they share; processors walk all of it.
fn walks_end_in_what_there_is<O: ByteOrder>(page: PageSize, width: Width, turns: u64) {
    let options = of(page, width);
    let none = Nothing::new(GpaTable::<O>::new(options).unwrap().sentinels().pages(), page.bytes());
    let format = GpaTable::<O>::new(GpaOptions { sentinels: OutputAddr::new(none.address()), ..options }).unwrap();
    none.fill(&format);
    let space = Space::builder().page_size(page.bytes()).unwrap().private_reclaim().build();
    let tlbs = (0..WALKERS + OWNERS as usize).map(|_| Mutex::default()).collect();
    let processors = Arc::new(Processors { format: format.clone(), tlbs });
    let pages = Arc::new(Kept::default());
    let table = Table::new(&space, format, Arc::clone(&pages), Interrupts(Arc::clone(&processors))).unwrap();
    let subscription = space.subscribe(Arc::clone(&table)).unwrap();
    let root = table.root();
    let geometry = *processors.format.geometry();
    // Two entries of the level above leaf tables for each owner, and one of the root for all; pages in rows of eight.
    let span = geometry.span(Level::new(2).unwrap());
    let whole = range(0, 2 * OWNERS * span);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for processor in 0..WALKERS {
            let (processors, done) = (&processors, &done);
            scope.spawn(move || {
                let mut state = processor as u64;
                while !done.load(Ordering::Relaxed) {
                    let at = next(&mut state, 2 * OWNERS) * span + next(&mut state, 16) * page.bytes();
                    processors.access(processor, root, at);
                    // Locks are not fair, and a flush waits for one.
                    thread::yield_now();
                }
            });
        }
        let owners: Vec<_> = (0..OWNERS)
            .map(|owner| {
                let (processors, table, space) = (&processors, &table, &space);
                scope.spawn(move || {
                    let mut state = 100 + owner;
                    let (mut walker, processor) = (space.walker(), WALKERS + owner as usize);
                    for turn in 0..turns {
                        let start = (2 * owner + next(&mut state, 2)) * span + next(&mut state, 8) * page.bytes();
                        let at = range(start, (1 + next(&mut state, 8)) * page.bytes());
                        let output = OutputAddr::new(start | next(&mut state, 4) << 40);
                        let extent = Extent { guest: at, output, access: Access::RWX };
                        loop {
                            let resolved = walker.fault(at).unwrap().resolve(|_| Ok::<_, ()>(extent)).unwrap();
                            match resolved.install(|admission| table.map(admission, &MapOptions::default())) {
                                // Somebody repointed it, who is nobody else: an earlier turn.
                                Err(_) => drop(table.unmap(at).unwrap()),
                                Ok(_) => break,
                            }
                        }
                        // Whoever looks finds it, though tables around it are looked at by those who trim.
                        while !processors.access(processor, root, start).is_valid() {
                            thread::yield_now();
                        }
                        if turn % 3 == 0 {
                            table.age(at).unwrap();
                            table.arm(at).unwrap();
                        }
                        let gone = match turn % 4 {
                            0 => range(start & !(span - 1), span),
                            1 => range(2 * owner * span, 2 * span),
                            _ => at,
                        };
                        table.unmap(gone).unwrap();
                        if turn % 5 == 0 {
                            table.trim(whole).unwrap();
                        }
                        // Nobody else maps there, and so nobody has it.
                        for processor in 0..processors.tlbs.len() {
                            for pair in processors.lock(processor).values() {
                                for (half, entry) in [(0, pair.even), (page.bytes(), pair.odd)] {
                                    let gpa = Gpa::new(pair.entry_hi + half);
                                    assert!(!(gone.contains(gpa) && entry.is_valid()), "{gpa:?} after it was unmapped");
                                }
                            }
                        }
                    }
                })
            })
            .collect();
        let ended: Vec<_> = owners.into_iter().map(|owner| owner.join()).collect();
        done.store(true, Ordering::Relaxed);
        ended.into_iter().for_each(|ended| ended.unwrap());
    });
    table.check().unwrap();
    drop(subscription);
    drop(table);
    drop(space);
    assert!(pages.freed.load(Ordering::Relaxed) > turns / 8, "tables came and went");
}

/// A link has no bit to spare for a claim: while it is claimed, all that is behind it is away.
#[test]
fn a_table_in_use_is_not_away_while_empty_ones_are_looked_for() {
    let options = of(PageSize::K4, Width::Wide);
    let none = Nothing::new(GpaTable::<BigEndian>::new(options).unwrap().sentinels().pages(), 0x1000);
    let format = table(GpaOptions { sentinels: OutputAddr::new(none.address()), ..options });
    none.fill(&format);
    let space = Space::builder().page_size(0x1000).unwrap().private_reclaim().build();
    let processors = Arc::new(Processors { format: format.clone(), tlbs: vec![Mutex::default()] });
    let flush = Interrupts(Arc::clone(&processors));
    let table = Table::new(&space, format, Arc::new(Kept::default()), flush).unwrap();
    let subscription = space.subscribe(Arc::clone(&table)).unwrap();
    let at = range(0x20_0000 - 0x1000, 0x1000);
    let extent = Extent { guest: at, output: OutputAddr::new(at.start().as_u64()), access: Access::RWX };
    let mut walker = space.walker();
    let resolved = walker.fault(at).unwrap().resolve(|_| Ok::<_, ()>(extent)).unwrap();
    resolved.install(|admission| table.map(admission, &MapOptions::default())).unwrap();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let walks = scope.spawn(|| {
            let mut away = 0;
            while !done.load(Ordering::Relaxed) {
                away += u64::from(!processors.access(0, table.root(), at.start().as_u64()).is_valid());
                processors.lock(0).clear();
            }
            away
        });
        for _ in 0..4_000 {
            assert_eq!(table.trim(range(0, 1 << 30)), Ok(0));
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(walks.join().unwrap(), 0, "walks that found nothing");
    });
    drop(subscription);
}

#[test]
fn walks_of_three_levels_end_in_what_there_is() {
    walks_end_in_what_there_is::<BigEndian>(PageSize::K4, Width::Standard, 200);
}

#[test]
fn walks_of_four_levels_end_in_what_there_is() {
    walks_end_in_what_there_is::<LittleEndian>(PageSize::K4, Width::Wide, 200);
}

#[test]
fn walks_of_large_pages_end_in_what_there_is() {
    walks_end_in_what_there_is::<BigEndian>(PageSize::K16, Width::Wide, 60);
}
