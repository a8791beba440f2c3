// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Runs models, and their broken twins.

use std::{
    cell::RefCell,
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Instant,
};

use loom::thread::JoinHandle;
use notifier_core::{
    Access, AddrRange, Extent, Fault, Gpa, GpaRange, OutputAddr, ResolveError, Resolved, Space, Subscription, Walker,
    primitive::{Twin, set_broken},
};
use spte_core::{Flush, HeapPages, MapError, MapOptions, Mapped, PageSource, Table, format::Kind};

use crate::tiny::{PAGE, Tiny};

/// Where things lie before anything is changed.
pub(crate) const OLD: OutputAddr = OutputAddr::new(0x10_0000);
/// Where they lie after that.
pub(crate) const NEW: OutputAddr = OutputAddr::new(0x20_0000);

thread_local! {
    /// loom runs all threads of a model on the thread that checks it.
    static SEEN: RefCell<BTreeSet<&'static str>> = const { RefCell::new(BTreeSet::new()) };
}

/// Notes that something happened in an interleaving: a model that is blind does not see all that can happen.
pub(crate) fn saw(what: &'static str) {
    SEEN.with_borrow_mut(|seen| seen.insert(what));
}

/// One model: a closure that builds everything anew, runs two threads, joins them, and asserts.
#[derive(Clone, Copy)]
pub(crate) struct Model {
    pub(crate) name: &'static str,
    pub(crate) run: fn(),
    /// The most preemptions that are explored; `None` for all.
    pub(crate) preemptions: Option<usize>,
}

impl Model {
    /// The iterations it took, unless an assertion failed.
    fn check(self) -> usize {
        // Not one of loom's atomics: counting is no part of the model.
        let count = Arc::new(AtomicUsize::new(0));
        let mut builder = loom::model::Builder::new();
        builder.max_branches = 20_000;
        builder.preemption_bound = self.preemptions;
        let (seen, run) = (Arc::clone(&count), self.run);
        builder.check(move || {
            seen.fetch_add(1, Ordering::Relaxed);
            run();
        });
        count.load(Ordering::Relaxed)
    }

    /// Asserts that the shipped code keeps the model's assertions in every interleaving, that there were some, and that
    /// exactly these things [happened](saw) in one or another.
    pub(crate) fn holds(self, outcomes: &[&'static str]) -> Self {
        set_broken(Twin::None);
        SEEN.with_borrow_mut(BTreeSet::clear);
        let begun = Instant::now();
        let iterations = self.check();
        println!("{}: holds, {iterations} iterations, {:.1} s", self.name, begun.elapsed().as_secs_f32());
        assert!(iterations > 1, "{}: loom explored nothing", self.name);
        let seen = SEEN.with_borrow(BTreeSet::clone);
        assert_eq!(seen, outcomes.iter().copied().collect(), "{}: the outcomes", self.name);
        self
    }

    /// Asserts that the twin without `what` breaks `assertion`, and not something else.
    pub(crate) fn refuted_without(self, what: Twin, assertion: &str) -> Self {
        set_broken(what);
        let begun = Instant::now();
        let refuted = catch_unwind(AssertUnwindSafe(|| self.check()));
        set_broken(Twin::None);
        let message = match refuted {
            Ok(iterations) => panic!("{}: nobody misses {what:?} in {iterations} iterations", self.name),
            Err(payload) => match payload.downcast::<String>() {
                Ok(message) => *message,
                Err(payload) => payload.downcast::<&'static str>().map_or_else(|_| String::new(), |m| (*m).into()),
            },
        };
        assert!(message.contains(assertion), "{}: without {what:?} not {assertion} but: {message}", self.name);
        println!("{}: {what:?} refuted at {assertion}, {:.1} s", self.name, begun.elapsed().as_secs_f32());
        self
    }
}

/// What every thread of a model begins with: a read-modify-write on one atomic. Where a thread's first operation is a
/// load, loom explores nothing. Relaxed: the gate orders nothing.
#[derive(Debug, Clone)]
pub(crate) struct Gate(Arc<loom::sync::atomic::AtomicUsize>);

impl Gate {
    pub(crate) fn new() -> Self {
        Self(Arc::new(loom::sync::atomic::AtomicUsize::new(0)))
    }

    /// A thread that begins with the gate.
    pub(crate) fn spawn<R: 'static>(&self, body: impl FnOnce() -> R + 'static) -> JoinHandle<R> {
        let gate = Arc::clone(&self.0);
        loom::thread::spawn(move || {
            gate.fetch_add(1, loom::sync::atomic::Ordering::Relaxed);
            body()
        })
    }
}

/// A space with one table that belongs to it.
pub(crate) struct World<P: PageSource = HeapPages, X: Flush = ()> {
    pub(crate) space: Space,
    pub(crate) table: Arc<Table<Tiny, P, X>>,
    subscription: Subscription,
}

impl World {
    /// With a table that only software walks. Nothing is reclaimed: a pin would bring fences of its own, and hide what
    /// is missing.
    pub(crate) fn new(format: Tiny) -> Self {
        Self::with(Space::builder().no_reclaim().build(), format, Arc::new(HeapPages::new()), ())
    }
}

impl<P: PageSource, X: Flush> World<P, X> {
    pub(crate) fn with(space: Space, format: Tiny, pages: Arc<P>, flush: X) -> Self {
        let table = Table::new(&space, format, pages, flush).unwrap();
        let subscription = space.subscribe(Arc::clone(&table)).unwrap();
        Self { space, table, subscription }
    }

    /// Maps `range` to [`OLD`], before any thread runs.
    pub(crate) fn map(&self, walker: &mut Walker, range: GpaRange, access: Access, armed: bool) {
        self.map_to(walker, range, access, armed, OLD);
    }

    /// Maps `range` by leaves of the smallest size, before any thread runs.
    pub(crate) fn map_to(&self, walker: &mut Walker, range: GpaRange, access: Access, armed: bool, output: OutputAddr) {
        let options = MapOptions::default().armed(armed).largest(PAGE);
        fault_in(&self.table, walker, range, access, &options, || output).unwrap().unwrap();
    }

    /// The entry that decides about `gpa`, where it is a leaf.
    pub(crate) fn leaf(&self, gpa: Gpa) -> Option<u64> {
        self.table.entry(gpa).filter(|found| found.kind == Kind::Leaf).map(|found| found.raw)
    }

    /// Takes everything apart. To be called before an assertion: an unwinding model cannot run drops.
    pub(crate) fn end(this: Arc<Self>) {
        let world = Arc::into_inner(this).unwrap();
        world.subscription.leave().unwrap();
    }
}

/// One fault from its snapshot to its installation. `None`: a window was open.
pub(crate) fn fault_in<P: PageSource, X: Flush>(
    table: &Table<Tiny, P, X>,
    walker: &mut Walker,
    range: GpaRange,
    access: Access,
    options: &MapOptions<()>,
    backing: impl FnOnce() -> OutputAddr,
) -> Option<Result<Mapped, MapError>> {
    let fault: Fault<'_> = walker.fault(range).ok()?;
    let resolved: Result<Resolved<'_>, ResolveError<()>> =
        fault.resolve(|fault| Ok(Extent { guest: fault.range(), output: backing(), access }));
    Some(resolved.unwrap().install(|admission| table.map(admission, options)))
}

/// As [`fault_in`], for a fault that a window may overtake; notes what became of it. Whether it was installed.
pub(crate) fn race_in<P: PageSource, X: Flush>(
    table: &Table<Tiny, P, X>,
    walker: &mut Walker,
    range: GpaRange,
    backing: impl FnOnce() -> OutputAddr,
) -> bool {
    let what = match fault_in(table, walker, range, Access::RW, &MapOptions::default(), backing) {
        None => "refused at its snapshot",
        Some(Err(MapError::Retry(_))) => "refused at its installation",
        Some(Err(_)) => "failed",
        Some(Ok(Mapped { made: 0, raised: 0, .. })) => "found nothing to do",
        Some(Ok(_)) => "installed",
    };
    saw(what);
    what == "installed"
}

pub(crate) fn page(index: u64) -> Gpa {
    Gpa::new(index * PAGE)
}

pub(crate) fn pages(first: u64, count: u64) -> GpaRange {
    AddrRange::with_len(page(first), count * PAGE).unwrap()
}
