// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Model checks of the shipped code.
//!
//! ```text
//! RUSTFLAGS="--cfg loom --cfg crossbeam_loom" cargo test -p notifier-core --release --test loom
//! ```
//!
//! Each model runs with the shipped code, which must hold in every explored execution, and with broken twins of it, each
//! of which leaves one thing out and must be refuted by the model's own rule. A model whose twins are not refuted sees
//! nothing. Two traps of loom are kept clear of: every thread begins with a read-modify-write on a shared gate (with a
//! load first, loom explores one execution and calls it a day), and the main thread only spawns and joins.
//!
//! The search is bounded by preemptions: [`BOUND`] forced switches in one execution, besides those where a thread waits or
//! ends. Every twin is refuted with a bound of 2 already; the rest is margin.
//!
//! A broken rule is noted and reported by the main thread when all have joined: loom does not survive a panic in a thread
//! whose locals are loom's own objects.
#![cfg(loom)]

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize as StdAtomicUsize, Ordering::SeqCst as StdSeqCst},
    },
};

use loom::thread;
use notifier_core::{
    primitive::{AtomicU64, AtomicUsize, Ordering::*, Twin, set_broken},
    *,
};

const PAGE: u64 = 0x1000;

/// Forced switches in one execution.
const BOUND: usize = 6;

const ABSENT: u64 = 0;
const CLAIMED: u64 = u64::MAX;
/// The host's page before and in the window.
const OLD: u64 = 2;
const NEW: u64 = 4;
const WRITE: u64 = 1;

fn page() -> GpaRange {
    AddrRange::with_len(Gpa::new(0), PAGE).unwrap()
}

std::thread_local! {
    static BROKEN_RULE: RefCell<Option<&'static str>> = const { RefCell::new(None) };
}

/// Notes a rule that does not hold in this execution.
fn rule(holds: bool, name: &'static str) {
    if !holds {
        BROKEN_RULE.with_borrow_mut(|rule| *rule = Some(name));
    }
}

/// For the main thread, when all have joined.
fn judge() {
    if let Some(rule) = BROKEN_RULE.take() {
        panic!("{rule}");
    }
}

fn explore(twin: Twin, model: impl Fn() + Send + Sync + 'static) -> (usize, Option<String>) {
    let iterations = Arc::new(StdAtomicUsize::new(0));
    let counted = Arc::clone(&iterations);
    set_broken(twin);
    BROKEN_RULE.take();
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(BOUND);
        builder.max_branches = 100_000;
        builder.check(move || {
            counted.fetch_add(1, StdSeqCst);
            model();
        });
    }));
    set_broken(Twin::None);
    let refuted = result.err().map(|panic| match panic.downcast::<String>() {
        Ok(text) => *text,
        Err(panic) => panic.downcast::<&str>().map_or_else(|_| "?".into(), |text| (*text).into()),
    });
    (iterations.load(StdSeqCst), refuted)
}

/// The shipped code holds, and each twin is refuted by `rule`.
fn check(name: &str, rule: &str, twins: &[Twin], model: impl Fn() + Send + Sync + Copy + 'static) {
    let (iterations, refuted) = explore(Twin::None, model);
    println!("{name}: shipped code, {iterations} executions: {}", refuted.as_deref().unwrap_or("holds"));
    assert_eq!(refuted, None, "{name}");
    assert!(iterations > 1, "{name} explored nothing");
    for &twin in twins {
        let (iterations, refuted) = explore(twin, model);
        println!("{name}: without {twin:?}, {iterations} executions: {}", refuted.as_deref().unwrap_or("HOLDS"));
        assert!(refuted.as_ref().is_some_and(|text| text.contains(rule)), "{name} does not see {twin:?}: {refuted:?}");
    }
}

/// A table of one entry, under the protocol. Walks look before they touch, as engines do: a compare-exchange always sees
/// the newest value, and would hide a missing fence.
struct Table {
    entry: AtomicU64,
    starts: AtomicUsize,
    ends: AtomicUsize,
}

impl Table {
    fn new(entry: u64) -> Arc<Self> {
        Arc::new(Self { entry: AtomicU64::new(entry), starts: AtomicUsize::new(0), ends: AtomicUsize::new(0) })
    }

    /// Claims, checks, and publishes or gives back.
    fn install(&self, admission: &Admission<'_>, entry: u64) {
        let old = loop {
            let old = self.entry.load(Relaxed);
            if old == CLAIMED {
                thread::yield_now();
            } else if self.entry.compare_exchange(old, CLAIMED, Acquire, Relaxed).is_ok() {
                break old;
            }
        };
        let new = if admission.check(page()).is_ok() { entry } else { old };
        self.entry.store(new, Release);
    }

    /// Waits out claims and takes `rights` away, all of the entry for `u64::MAX`.
    fn take_away(&self, rights: u64) {
        loop {
            let old = self.entry.load(Relaxed);
            if old == CLAIMED {
                thread::yield_now();
                continue;
            }
            if old & rights == 0 || self.entry.compare_exchange(old, old & !rights, AcqRel, Relaxed).is_ok() {
                return;
            }
        }
    }

    /// What the entry says, claims waited out.
    fn settled(&self) -> u64 {
        loop {
            let entry = self.entry.load(Acquire);
            if entry != CLAIMED {
                return entry;
            }
            thread::yield_now();
        }
    }
}

/// The table as a subscriber.
struct Follows(Arc<Table>);

impl Subscriber for Follows {
    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.0.starts.fetch_add(1, Relaxed);
        self.0.take_away(if window.mode() == Mode::Zapped { u64::MAX } else { WRITE });
        Ok(())
    }

    fn end(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.0.ends.fetch_add(1, Relaxed);
        Ok(())
    }

    fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.0.take_away(u64::MAX);
        Ok(())
    }

    fn release(&self) -> Result<(), SubscriberError> {
        self.0.take_away(u64::MAX);
        Ok(())
    }
}

fn space() -> Space {
    Space::builder().no_reclaim().build()
}

const I5: &str = "i5: nothing stale is translated once a Zapped window has opened";

/// A fault looks the host up and installs what it found, while a window opens, changes the host, and closes.
fn fault_and_zapped_window(close: bool) {
    let space = space();
    let table = Table::new(ABSENT);
    let _subscription = space.subscribe(Follows(Arc::clone(&table))).unwrap();
    let (gate, host) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(OLD)));
    let mut walker = space.walker();

    let fault = thread::spawn({
        let (table, gate, host) = (Arc::clone(&table), Arc::clone(&gate), Arc::clone(&host));
        move || {
            gate.fetch_add(1, Relaxed);
            let Ok(fault) = walker.fault(page()) else { return };
            let found = host.load(Relaxed);
            let extent = Extent { guest: page(), output: OutputAddr::new(found), access: Access::RW };
            let Ok(resolved) = fault.resolve(|_| Ok::<_, ()>(extent)) else { return };
            resolved.install(|admission| table.install(admission, found));
        }
    });
    let window = thread::spawn({
        let (space, table, gate, host) = (space.clone(), Arc::clone(&table), Arc::clone(&gate), Arc::clone(&host));
        move || {
            gate.fetch_add(1, Relaxed);
            let guard = space.zap(page()).unwrap();
            rule(table.settled() == ABSENT, I5);
            host.store(NEW, Relaxed);
            if close {
                guard.close().unwrap();
            } else {
                std::mem::forget(guard);
            }
        }
    });
    fault.join().unwrap();
    window.join().unwrap();
    rule(table.settled() != OLD, I5);
    judge();
}

#[test]
fn fault_against_zapped_window() {
    let twins = [Twin::PublishFence, Twin::RecordFence, Twin::PoisonFence, Twin::ClaimFence, Twin::Poison];
    check("fault_against_zapped_window (stays open)", I5, &twins, || fault_and_zapped_window(false));
    check("fault_against_zapped_window (closes)", I5, &twins, || fault_and_zapped_window(true));
}

const I6: &str = "i6: no right is added once a Retained window has opened";

/// A write fault raises an entry's rights, while a window takes them away and counts on that.
fn fault_and_retained_window() {
    let space = space();
    let table = Table::new(OLD);
    let _subscription = space.subscribe(Follows(Arc::clone(&table))).unwrap();
    let gate = Arc::new(AtomicUsize::new(0));
    let mut walker = space.walker();

    let fault = thread::spawn({
        let (table, gate) = (Arc::clone(&table), Arc::clone(&gate));
        move || {
            gate.fetch_add(1, Relaxed);
            let Ok(fault) = walker.fault(page()) else { return };
            fault.admit(|admission| table.install(admission, OLD | WRITE));
        }
    });
    let window = thread::spawn({
        let (space, table, gate) = (space.clone(), Arc::clone(&table), Arc::clone(&gate));
        move || {
            gate.fetch_add(1, Relaxed);
            let guard = space.retain(page()).unwrap();
            rule(table.settled() == OLD, I6);
            std::mem::forget(guard);
        }
    });
    fault.join().unwrap();
    window.join().unwrap();
    // The window is open to the end.
    rule(table.settled() == OLD, I6);
    judge();
}

#[test]
fn fault_against_retained_window() {
    let twins = [Twin::PublishFence, Twin::RecordFence, Twin::PoisonFence, Twin::ClaimFence, Twin::Poison];
    check("fault_against_retained_window", I6, &twins, fault_and_retained_window);
}

const I2: &str = "i2: the sequence moves before the count falls";

/// An observer with Linux's test, beside one window.
fn observer_and_window() {
    let space = space();
    let (gate, host) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(OLD)));
    let late = Arc::new(AtomicU64::new(OLD));

    let observer = thread::spawn({
        let (space, gate, host, late) = (space.clone(), Arc::clone(&gate), Arc::clone(&host), Arc::clone(&late));
        move || {
            gate.fetch_add(1, Relaxed);
            let snapshot = space.progress().sequence;
            let fresh = late.load(Relaxed);
            rule(snapshot == 0 || fresh == NEW, "i2: what is looked up is not older than the sequence says");
            // Acquire: who saw the change saw the window open.
            if snapshot == 0 && host.load(Acquire) == NEW {
                rule(space.must_retry(snapshot), I2);
            }
        }
    });
    let window = thread::spawn({
        let (space, gate, host, late) = (space.clone(), Arc::clone(&gate), Arc::clone(&host), Arc::clone(&late));
        move || {
            gate.fetch_add(1, Relaxed);
            let guard = space.zap(page()).unwrap();
            late.store(NEW, Relaxed);
            host.store(NEW, Release);
            guard.close().unwrap();
        }
    });
    observer.join().unwrap();
    window.join().unwrap();
    judge();
}

#[test]
fn sequence_before_count() {
    check("sequence_before_count", I2, &[Twin::CountFirst], observer_and_window);
}

const FLUSH: &str = "i5: a flush waits for the scopes that may use what was removed";

/// A walker uses what it found, while it is removed, flushed and freed.
fn scope_and_flush() {
    const FREED: u64 = 6;
    let space = space();
    let gate = Arc::new(AtomicUsize::new(0));
    let (entry, memory) = (Arc::new(AtomicU64::new(OLD)), Arc::new(AtomicU64::new(OLD)));
    let mut walker = space.walker();

    let walk = thread::spawn({
        let (gate, entry, memory) = (Arc::clone(&gate), Arc::clone(&entry), Arc::clone(&memory));
        move || {
            gate.fetch_add(1, Relaxed);
            let scope = walker.enter();
            if entry.load(Relaxed) == OLD {
                rule(memory.load(Relaxed) != FREED, FLUSH);
                // A write, too, is over when the flush returns.
                memory.store(NEW, Relaxed);
            }
            drop(scope);
        }
    });
    let remover = thread::spawn({
        let (space, gate, memory, entry) = (space.clone(), Arc::clone(&gate), Arc::clone(&memory), Arc::clone(&entry));
        move || {
            gate.fetch_add(1, Relaxed);
            entry.store(ABSENT, Relaxed);
            space.wait_for_scopes(false).unwrap();
            memory.store(FREED, Relaxed);
        }
    });
    walk.join().unwrap();
    remover.join().unwrap();
    rule(memory.load(Relaxed) == FREED, FLUSH);
    judge();
}

#[test]
fn scope_entry_against_flush() {
    check("scope_entry_against_flush", FLUSH, &[Twin::ScopeFence, Twin::FlushSkipsScopes], scope_and_flush);
}

const BESIDE: &str = "a window never goes on beside a lease";

fn lease_and_window() {
    let space = space();
    let (gate, inside) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let holder = thread::spawn({
        let (space, gate, inside) = (space.clone(), Arc::clone(&gate), Arc::clone(&inside));
        move || {
            gate.fetch_add(1, Relaxed);
            if let Ok(lease) = space.lease(LeaseRequest::new(page(), "holder")) {
                rule(inside.fetch_add(1, Relaxed) == 0, BESIDE);
                inside.fetch_sub(1, Relaxed);
                drop(lease);
            }
        }
    });
    let window = thread::spawn({
        let (space, gate, inside) = (space.clone(), Arc::clone(&gate), Arc::clone(&inside));
        move || {
            gate.fetch_add(1, Relaxed);
            if let Ok(guard) = space.zap(page()) {
                rule(inside.fetch_add(1, Relaxed) == 0, BESIDE);
                inside.fetch_sub(1, Relaxed);
                guard.close().unwrap();
            }
        }
    });
    holder.join().unwrap();
    window.join().unwrap();
    judge();
}

#[test]
fn lease_against_window() {
    check("lease_against_window", BESIDE, &[], lease_and_window);
}

const PAIRS: &str = "every start has its end, and no end comes without one";

fn join_and_close() {
    let space = space();
    let gate = Arc::new(AtomicUsize::new(0));
    let guard = space.window(page()).open_zapped_owned().unwrap();
    let table = Table::new(ABSENT);
    let joiner = thread::spawn({
        let (space, gate, table) = (space.clone(), Arc::clone(&gate), Arc::clone(&table));
        move || {
            gate.fetch_add(1, Relaxed);
            space.subscribe(Follows(table)).unwrap()
        }
    });
    let closer = thread::spawn({
        let gate = Arc::clone(&gate);
        move || {
            gate.fetch_add(1, Relaxed);
            guard.close().unwrap();
        }
    });
    let subscription = joiner.join().unwrap();
    closer.join().unwrap();
    rule(table.starts.load(Relaxed) == table.ends.load(Relaxed), PAIRS);
    rule(space.progress().count == 0, PAIRS);
    drop(subscription);
    judge();
}

#[test]
fn join_against_window_close() {
    check("join_against_window_close", PAIRS, &[], join_and_close);
}

fn leave_and_open() {
    let space = space();
    let gate = Arc::new(AtomicUsize::new(0));
    let table = Table::new(OLD);
    let subscription = space.subscribe(Follows(Arc::clone(&table))).unwrap();
    let leaver = thread::spawn({
        let gate = Arc::clone(&gate);
        move || {
            gate.fetch_add(1, Relaxed);
            drop(subscription);
        }
    });
    let window = thread::spawn({
        let (space, gate, table) = (space.clone(), Arc::clone(&gate), Arc::clone(&table));
        move || {
            gate.fetch_add(1, Relaxed);
            let guard = space.zap(page()).unwrap();
            rule(table.settled() == ABSENT, I5);
            std::mem::forget(guard);
        }
    });
    leaver.join().unwrap();
    window.join().unwrap();
    judge();
}

#[test]
fn leave_against_window_open() {
    check("leave_against_window_open", I5, &[], leave_and_open);
}

const SLOTS: &str = "no fault is installed by slots that have changed";

/// A fault finds no memory and marks that down, while memory appears there.
fn slot_and_fault() {
    const NO_MEMORY: u64 = 8;
    let space = space();
    let gate = Arc::new(AtomicUsize::new(0));
    let table = Table::new(ABSENT);
    let _subscription = space.subscribe(Follows(Arc::clone(&table))).unwrap();
    let mut walker = space.walker();
    let fault = thread::spawn({
        let (gate, table) = (Arc::clone(&gate), Arc::clone(&table));
        move || {
            gate.fetch_add(1, Relaxed);
            let Ok(fault) = walker.fault(page()) else { return };
            let found = if fault.slot().is_some() { NEW } else { NO_MEMORY };
            fault.admit(|admission| table.install(admission, found));
        }
    });
    let adder = thread::spawn({
        let (space, gate) = (space.clone(), Arc::clone(&gate));
        move || {
            gate.fetch_add(1, Relaxed);
            space.add_slot(SlotSpec { guest: page(), host: None, flags: SlotFlags::empty() }).unwrap();
        }
    });
    fault.join().unwrap();
    adder.join().unwrap();
    rule(table.settled() != NO_MEMORY, SLOTS);
    judge();
}

#[test]
fn fault_against_slot_change() {
    check("fault_against_slot_change", SLOTS, &[Twin::PublishFence, Twin::Poison], slot_and_fault);
}
