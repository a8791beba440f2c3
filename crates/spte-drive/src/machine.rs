// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table by itself, whose flushes are looked at while they are under way: for tests of what the engine makes of a format,
//! in which order it breaks, flushes and makes.
#![allow(clippy::unwrap_used, reason = "it is made by tests, and what goes wrong while it is made fails them")]

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use notifier_core::{Access, AddrRange, Admission, Extent, Gpa, GpaRange, OutputAddr, Space, Subscription};
use spte_core::format::{Format, Kind, LeafSpec, Level};
use spte_core::{Flush, FlushError, FlushRequest, Found, HeapPages, MapError, MapOptions, Mapped, Table};

/// One flush: what it named, and what the watched entry was meanwhile.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Of each range where it starts, its bytes, its level hint and whether links went.
    pub ranges: Vec<(u64, u64, Option<Level>, bool)>,
    /// What the entry was.
    pub kind: Kind,
    /// The level it was found at.
    pub level: Level,
}

impl Seen {
    /// Looks at the entry that decides about `watched`.
    pub fn at<F: Format>(watched: u64) -> impl Fn(&WatchedTable<F, Self>, &FlushRequest<'_>) -> Self {
        move |table, request| {
            let Found { kind, level, .. } = table.entry(Gpa::new(watched)).unwrap();
            Self { ranges: named(request), kind, level }
        }
    }
}

/// The ranges of a flush, as [`Seen::ranges`] has them.
pub fn named(request: &FlushRequest<'_>) -> Vec<(u64, u64, Option<Level>, bool)> {
    let range = |part: &spte_core::FlushRange| {
        (part.range.start().as_u64(), part.range.len(), part.leaves.level(), part.links.is_some())
    };
    request.ranges.iter().map(range).collect()
}

/// `len` guest bytes from `start` on.
///
/// # Panics
/// Where that is no range.
pub fn range(start: u64, len: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(start), len).unwrap()
}

/// The table of a [`Machine`].
pub type WatchedTable<F, S> = Table<F, HeapPages, Watch<F, S>>;

type Look<F, S> = Box<dyn Fn(&WatchedTable<F, S>, &FlushRequest<'_>) -> S + Send + Sync>;

struct Log<F: Format, S: Send + 'static> {
    look: Look<F, S>,
    table: OnceLock<Weak<WatchedTable<F, S>>>,
    failing: AtomicBool,
    meanwhile: Mutex<Option<Box<dyn FnOnce() + Send>>>,
    seen: Mutex<Vec<S>>,
    dirty: Mutex<Vec<GpaRange>>,
}

/// A flush that writes down what it sees: an `S` each.
pub struct Watch<F: Format, S: Send + 'static = Seen>(Arc<Log<F, S>>);

impl<F: Format, S: Send + 'static> Flush for Watch<F, S> {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        let Watch(log) = self;
        let Some(table) = log.table.get().and_then(Weak::upgrade) else { return Ok(()) };
        let seen = (log.look)(&table, request);
        lock(&log.seen).push(seen);
        // Let go of before it is called: what it does may flush.
        let meanwhile = lock(&log.meanwhile).take();
        if let Some(meanwhile) = meanwhile {
            meanwhile();
        }
        match log.failing.load(Ordering::Relaxed) {
            true => Err(FlushError::Failed { code: 5 }),
            false => Ok(()),
        }
    }
}

/// A table in a space of its own, what is seen at each flush, and what the dirty sink heard.
pub struct Machine<F: Format, S: Send + 'static = Seen> {
    /// Goes before the rest does.
    subscription: Option<Subscription>,
    /// The space, whose pages are the table's smallest leaves, with a collector of its own and no slots.
    pub space: Space,
    /// The table.
    pub table: Arc<WatchedTable<F, S>>,
    log: Arc<Log<F, S>>,
}

impl<F: Format, S: Send + 'static> Machine<F, S> {
    /// A table of `format`; `look` is called at each flush, while it is under way.
    ///
    /// # Panics
    /// Where there is no page for the root, or the table cannot join.
    pub fn new(format: F, look: impl Fn(&WatchedTable<F, S>, &FlushRequest<'_>) -> S + Send + Sync + 'static) -> Self {
        let log = Arc::new(Log {
            look: Box::new(look),
            table: OnceLock::new(),
            failing: AtomicBool::new(false),
            meanwhile: Mutex::default(),
            seen: Mutex::default(),
            dirty: Mutex::default(),
        });
        let sink = Arc::clone(&log);
        let space = Space::builder()
            .page_size(format.geometry().span(Level::LEAF))
            .unwrap()
            .private_reclaim()
            .dirty_sink(move |range: GpaRange| lock(&sink.dirty).push(range))
            .build();
        let table = Table::new(&space, format, Arc::new(HeapPages::new()), Watch(Arc::clone(&log))).unwrap();
        assert!(log.table.set(Arc::downgrade(&table)).is_ok(), "it was not set before");
        let subscription = Some(space.subscribe(Arc::clone(&table)).unwrap());
        Self { subscription, space, table, log }
    }

    /// A fault on `at`, which resolves to `output` and these rights, and what it installs.
    ///
    /// # Errors
    /// As `install` has it.
    ///
    /// # Panics
    /// Where there can be no fault: a window is open there.
    pub fn install<T>(
        &self,
        at: GpaRange,
        output: u64,
        access: Access,
        install: impl FnOnce(&Admission<'_>) -> Result<T, MapError>,
    ) -> Result<T, MapError> {
        let mut walker = self.space.walker();
        let extent = Extent { guest: at, output: OutputAddr::new(output), access };
        walker.fault(at).unwrap().resolve(|_| Ok::<_, ()>(extent)).unwrap().install(install)
    }

    /// Maps `at` to `output`.
    ///
    /// # Errors
    /// As [`Table::map`].
    ///
    /// # Panics
    /// As [`Machine::install`].
    pub fn map_with(
        &self,
        at: GpaRange,
        output: u64,
        access: Access,
        options: MapOptions<F::Attrs>,
    ) -> Result<Mapped, MapError> {
        self.install(at, output, access, |admission| self.table.map(admission, &options))
    }

    /// Maps `len` bytes from `start` on to `output`, with leaves as large as they can be.
    ///
    /// # Errors
    /// As [`Table::map`].
    ///
    /// # Panics
    /// As [`Machine::install`].
    pub fn map(&self, start: u64, output: u64, len: u64, access: Access) -> Result<Mapped, MapError> {
        self.map_with(range(start, len), output, access, MapOptions::default())
    }

    /// What decides about `at`.
    ///
    /// # Panics
    /// Where the table does not reach there.
    pub fn found(&self, at: u64) -> Found {
        self.table.entry(Gpa::new(at)).unwrap()
    }

    /// What kind of entry that is.
    ///
    /// # Panics
    /// As [`Machine::found`].
    pub fn kind(&self, at: u64) -> Kind {
        self.found(at).kind
    }

    /// What the leaf over `at` says.
    ///
    /// # Panics
    /// Where there is none.
    pub fn spec(&self, at: u64) -> LeafSpec<F::Attrs> {
        let found = self.found(at);
        assert_eq!(found.kind, Kind::Leaf, "{at:#x}");
        self.table.format().spec(found.level, found.raw)
    }

    /// What was flushed since this was last asked.
    pub fn flushes(&self) -> Vec<S> {
        std::mem::take(&mut *lock(&self.log.seen))
    }

    /// What was flushed, to be changed.
    pub fn seen(&self) -> MutexGuard<'_, Vec<S>> {
        lock(&self.log.seen)
    }

    /// What the dirty sink heard, in order, for as long as nobody takes it out.
    pub fn dirty(&self) -> MutexGuard<'_, Vec<GpaRange>> {
        lock(&self.log.dirty)
    }

    /// The table leaves its space.
    pub fn leave(&mut self) {
        self.subscription = None;
    }

    /// From now on every flush fails; or none does. None does at the end, while the table leaves.
    pub fn fail(&self, failing: bool) {
        self.log.failing.store(failing, Ordering::Relaxed);
    }

    /// Somebody comes while the next flush is under way.
    pub fn meanwhile(&self, then: impl FnOnce() + Send + 'static) {
        *lock(&self.log.meanwhile) = Some(Box::new(then));
    }
}

impl<F: Format, S: Send + 'static> Drop for Machine<F, S> {
    fn drop(&mut self) {
        self.fail(false);
    }
}

impl<F: Format, S: Send + 'static> fmt::Debug for Machine<F, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Machine").field("space", &self.space).finish_non_exhaustive()
    }
}

impl<F: Format, S: Send + 'static> fmt::Debug for Watch<F, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

/// A test that panicked keeps its logs: they say more than the poison does.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
