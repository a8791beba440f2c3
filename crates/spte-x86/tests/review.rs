// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Holes that a review found, each closed: a translation that outlived its window, a fact that came too early.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
        mpsc,
    },
    time::Duration,
};

use notifier_core::*;
use spte_core::{
    Flush, FlushError, FlushFailed, FlushRequest, HeapPages, MapError, MapOptions, Mapped, RemoveError, Table,
};
use spte_x86::{Ept, EptOptions, MmioAccess, SlotGeneration};

type EptTable<X> = Table<Ept, HeapPages, X>;

const PAGE: u64 = 0x1000;
const AT: u64 = 0x5000;
const HOST: u64 = 1 << 40;

fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

fn host(offset: u64, len: u64) -> HvaRange {
    AddrRange::with_len(Hva::new(HOST + offset), len).unwrap()
}

fn slot(space: &Space) {
    let spec = SlotSpec { guest: range(0, 1 << 31), host: Some(Hva::new(HOST)), flags: SlotFlags::empty() };
    space.add_slot(spec).unwrap();
}

fn table_of<X: Flush>(space: &Space, options: EptOptions, flush: X) -> Arc<EptTable<X>> {
    Table::new(space, Ept::new(options).unwrap(), Arc::new(HeapPages::new()), flush).unwrap()
}

fn table(space: &Space) -> Arc<EptTable<()>> {
    table_of(space, EptOptions::default(), ())
}

fn resolve_to(fault: Fault<'_>, output: u64) -> Resolved<'_> {
    let extent =
        |fault: &Fault<'_>| Extent { guest: fault.range(), output: OutputAddr::new(output), access: Access::RWX };
    fault.resolve(|fault| Ok::<_, ()>(extent(fault))).unwrap()
}

fn map<X: Flush>(space: &Space, table: &EptTable<X>, at: GpaRange, output: u64) -> Result<Mapped, MapError> {
    let mut walker = space.walker();
    let fault = walker.fault(at).unwrap();
    resolve_to(fault, output).install(|admission| table.map(admission, &MapOptions::default()))
}

fn reaches<X: Flush>(space: &Space, table: &EptTable<X>, at: u64, access: Access) -> bool {
    let mut walker = space.walker();
    let scope = walker.enter();
    table.translate(&scope, Gpa::new(at), access).is_ok()
}

#[test]
fn a_table_maps_only_what_its_windows_reach() {
    let space = Space::new();
    slot(&space);
    let table = table(&space);
    let _part = space.subscribe_to(Interest::Guest(range(0, PAGE)), Arc::clone(&table)).unwrap();
    assert!(matches!(map(&space, &table, range(AT, PAGE), 0x9000), Err(MapError::NotJoined)));
    assert!(map(&space, &table, range(0, PAGE), 0x9000).is_ok());
}

#[test]
fn a_table_joins_its_own_space_once() {
    let (own, other) = (Space::new(), Space::new());
    slot(&own);
    let table = table(&own);
    assert!(matches!(other.subscribe(Arc::clone(&table)), Err(JoinError::Joined { .. })));
    assert!(matches!(map(&own, &table, range(AT, PAGE), 0x9000), Err(MapError::NotJoined)));
    let place = own.subscribe(Arc::clone(&table)).unwrap();
    assert!(matches!(own.subscribe(Arc::clone(&table)), Err(JoinError::Joined { .. })));
    assert!(map(&own, &table, range(AT, PAGE), 0x9000).is_ok());
    drop(place);
    assert!(!reaches(&own, &table, AT, Access::READ));
    assert!(matches!(map(&own, &table, range(AT, PAGE), 0x9000), Err(MapError::NotJoined)));
}

struct Device;

impl CallConsumer for Device {
    fn map(&self, _: &Extent) -> Result<(), CallError> {
        Ok(())
    }
    fn unmap(&self, _: &Extent) -> Result<(), CallError> {
        Ok(())
    }
}

#[test]
fn an_adapter_takes_admissions_of_its_own_space() {
    let (own, other) = (Space::new(), Space::new());
    let device = Arc::new(CallAdapter::new(Device));
    let _place = own.subscribe(Arc::clone(&device)).unwrap();
    let _guard = own.zap(range(0, 16 * PAGE)).unwrap();
    let mut walker = other.walker();
    let mapped = resolve_to(walker.fault(range(AT, PAGE)).unwrap(), 0x9000).install(|admission| device.map(admission));
    assert!(matches!(mapped, Err(CallMapError::NotMember { .. })));
    assert!(device.mapped().is_empty());
}

#[test]
fn i12_an_adapter_reports_what_its_device_may_have_written() {
    let facts = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&facts);
    let sink = move |_: GpaRange| {
        count.fetch_add(1, Ordering::SeqCst);
    };
    let space = Space::builder().dirty_sink(sink).build();
    let device = Arc::new(CallAdapter::new(Device));
    let _place = space.subscribe(Arc::clone(&device)).unwrap();
    let mut walker = space.walker();
    resolve_to(walker.fault(range(AT, PAGE)).unwrap(), 0x9000).install(|admission| device.map(admission)).unwrap();
    let guard = space.retain(range(AT, PAGE)).unwrap();
    assert_eq!(facts.load(Ordering::SeqCst), 1);
    guard.close().unwrap();
}

#[test]
fn leaving_inside_a_scope_does_not_outrun_it() {
    let space = Space::new();
    slot(&space);
    let table = table(&space);
    let place = space.subscribe(Arc::clone(&table)).unwrap();
    map(&space, &table, range(AT, PAGE), 0x9000).unwrap();
    let mut walker = space.walker();
    let scope = walker.enter();
    let found = table.translate(&scope, Gpa::new(AT), Access::WRITE).unwrap();
    drop(place);
    let (opened, open) = mpsc::channel();
    let other = space.clone();
    let thread = std::thread::spawn(move || {
        let guard = other.zap(host(AT, PAGE)).unwrap();
        opened.send(()).unwrap();
        guard.close().unwrap();
    });
    assert!(open.recv_timeout(Duration::from_millis(200)).is_err(), "a window opened past {:?}", found.output());
    drop(scope);
    open.recv_timeout(Duration::from_secs(20)).unwrap();
    thread.join().unwrap();
    assert!(!reaches(&space, &table, AT, Access::READ));
}

/// Hardware that sometimes does not answer.
struct Moody(Arc<AtomicBool>);

impl Flush for Moody {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        if self.0.load(Ordering::SeqCst) { Err(FlushError::Failed { code: 5 }) } else { Ok(()) }
    }
}

#[test]
fn a_release_that_fails_refuses_windows_until_it_succeeds() {
    let space = Space::new();
    slot(&space);
    let moody = Arc::new(AtomicBool::new(false));
    let table = table_of(&space, EptOptions::default(), Moody(Arc::clone(&moody)));
    let place = space.subscribe(Arc::clone(&table)).unwrap();
    map(&space, &table, range(AT, PAGE), 0x9000).unwrap();
    moody.store(true, Ordering::SeqCst);
    assert!(matches!(place.leave(), Err(LeaveError::Release { .. })));
    assert!(matches!(space.zap(host(AT, PAGE)), Err(OpenError::Subscriber { .. })));
    assert!(matches!(map(&space, &table, range(AT, PAGE), 0x9000), Err(MapError::NotJoined)));
    moody.store(false, Ordering::SeqCst);
    space.zap(host(AT, PAGE)).unwrap().close().unwrap();
    assert_eq!(space.reap(), 0);
}

/// Repoints nothing, and sometimes fails.
struct Stubborn(Arc<AtomicBool>);

impl Subscriber for Stubborn {
    fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        Ok(())
    }
    fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        if self.0.load(Ordering::SeqCst) { Err(SubscriberError::Other("no".into())) } else { Ok(()) }
    }
}

#[test]
fn i8_a_page_whose_change_failed_has_no_outcome() {
    let space = Space::new();
    slot(&space);
    let stubborn = Arc::new(AtomicBool::new(false));
    let _first = space.subscribe(Stubborn(Arc::clone(&stubborn))).unwrap();
    let table = table(&space);
    let _second = space.subscribe(Arc::clone(&table)).unwrap();
    map(&space, &table, range(AT, PAGE), 0x9000).unwrap();
    let guard = space.retain(host(AT, PAGE)).unwrap();
    guard.keep(guard.range()).unwrap();
    stubborn.store(true, Ordering::SeqCst);
    let change = Change { page: Hva::new(HOST + AT), expected: OutputAddr::new(0x9000), new: OutputAddr::new(0xa000) };
    assert!(guard.change_pte(&[change]).is_err());
    stubborn.store(false, Ordering::SeqCst);
    guard.close().unwrap();
    assert!(!reaches(&space, &table, AT, Access::READ), "the page kept an outcome that its failed change took back");
}

/// A space whose dirty sink panics the first time.
fn with_rude_sink() -> Space {
    let rude = AtomicBool::new(true);
    let sink = move |_: GpaRange| assert!(!rude.swap(false, Ordering::SeqCst), "rude");
    let space = Space::builder().dirty_sink(sink).build();
    slot(&space);
    space
}

#[test]
fn a_sink_that_panics_leaves_nothing_unflushed() {
    for (mapped, zapped) in [(range(AT, PAGE), host(AT, PAGE)), (range(1 << 21, PAGE), host(1 << 21, 1 << 21))] {
        let space = with_rude_sink();
        let table = table(&space);
        let _place = space.subscribe(Arc::clone(&table)).unwrap();
        map(&space, &table, mapped, 0x9000).unwrap();
        let mut walker = space.walker();
        let scope = walker.enter();
        table.translate(&scope, mapped.start(), Access::WRITE).unwrap();
        let (opened, open) = mpsc::channel();
        let other = space.clone();
        let thread = std::thread::spawn(move || {
            // The first may fail; the second may not open while the scope lasts.
            let _ = other.zap(zapped).map(drop);
            drop(other.zap(zapped).unwrap());
            opened.send(()).unwrap();
        });
        assert!(open.recv_timeout(Duration::from_millis(200)).is_err(), "a window opened with a flush still owed");
        drop(scope);
        open.recv_timeout(Duration::from_secs(20)).unwrap();
        thread.join().unwrap();
    }
}

#[test]
fn i12_a_fact_comes_when_no_write_can_follow_it() {
    let reported = Arc::new(Mutex::new(Vec::new()));
    let sink = Arc::clone(&reported);
    let space = Space::builder().dirty_sink(move |range: GpaRange| sink.lock().unwrap().push(range)).build();
    slot(&space);
    let table = table(&space);
    let _place = space.subscribe(Arc::clone(&table)).unwrap();
    map(&space, &table, range(AT, PAGE), 0x9000).unwrap();
    let memory = AtomicU64::new(0);
    let mut walker = space.walker();
    let scope = walker.enter();
    table.translate(&scope, Gpa::new(AT), Access::WRITE).unwrap();
    let other = space.clone();
    let thread = std::thread::spawn(move || {
        let guard = other.retain(host(AT, PAGE)).unwrap();
        guard.keep(guard.range()).unwrap();
        guard.close().unwrap();
    });
    std::thread::sleep(Duration::from_millis(100));
    assert!(reported.lock().unwrap().is_empty(), "the fact came before the flush");
    memory.store(1, Ordering::SeqCst); // through the translation: its scope is still open
    drop(scope);
    thread.join().unwrap();
    assert_eq!(*reported.lock().unwrap(), [range(AT, PAGE)]);
}

#[test]
fn special_entries_are_none_that_hardware_follows() {
    let space = Space::new();
    slot(&space);
    let table = table(&space);
    let _place = space.subscribe(Arc::clone(&table)).unwrap();
    let set = |entry| space.admit(range(AT, PAGE), |a| table.set_special(a, Gpa::new(AT), entry)).unwrap();
    // Readable, writable, executable, write-back, at 0x9000: a leaf to hardware, though not to KVM's software bits.
    assert!(matches!(set(0x9000 | 7 | (6 << 3)), Err(MapError::Format { .. })));
    let access = MmioAccess { write: true, user: true };
    let mmio = table.format().mmio().encode(Gpa::new(AT), access, SlotGeneration::new(3)).unwrap();
    set(mmio).unwrap();
    assert_eq!(table.entry(Gpa::new(AT)).unwrap().raw, mmio);
}

#[test]
fn unmapping_a_part_of_what_cannot_be_split_is_refused() {
    let space = Space::new();
    slot(&space);
    let table = table_of(&space, EptOptions { pages_2m: false, ..EptOptions::default() }, ());
    let _place = space.subscribe(Arc::clone(&table)).unwrap();
    map(&space, &table, range(1 << 30, 1 << 30), 1 << 30).unwrap();
    assert!(matches!(table.unmap(range(1 << 30, PAGE)), Err(RemoveError::CannotSplit { .. })));
    assert!(reaches(&space, &table, (1 << 30) + 0x10_0000, Access::READ));
    // Inside a window too much is safe, and nothing may be left.
    drop(space.zap(range(1 << 30, PAGE)).unwrap());
    assert!(!reaches(&space, &table, (1 << 30) + 0x10_0000, Access::READ));
}

/// Hardware whose driver panics until it is told to work.
struct Panicky(Arc<AtomicBool>);

impl Flush for Panicky {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        assert!(self.0.load(Ordering::SeqCst), "rude");
        assert!(request.all, "what the panic left owed is flushed with everything");
        Ok(())
    }
}

#[test]
fn a_flush_that_panics_is_one_that_failed_and_stays_owed() {
    let space = Space::new();
    slot(&space);
    let works = Arc::new(AtomicBool::new(false));
    let table = table_of(&space, EptOptions::default(), Panicky(Arc::clone(&works)));
    let _place = space.subscribe(Arc::clone(&table)).unwrap();
    map(&space, &table, range(AT, PAGE), 0x9000).unwrap();
    let refused = table.unmap(range(AT, PAGE)).unwrap_err();
    let panicked = FlushFailed::Hardware(FlushError::Panicked);
    assert!(matches!(refused, RemoveError::Flush { source, .. } if source == panicked), "{refused}");
    assert!(space.zap(host(AT, PAGE)).is_err());
    works.store(true, Ordering::SeqCst);
    space.zap(host(AT, PAGE)).unwrap().close().unwrap();
}
