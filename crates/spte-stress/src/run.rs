// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One run: the threads, the moments at which all of them rest and everything is compared, and the end.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Barrier, Mutex, RwLock,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*},
    },
    thread,
    time::{Duration, Instant},
};

use notifier_core::{CallAdapter, DirtySink, GpaRange, SlotFlags, SlotSpec, Space, Subscription};

use crate::{
    activity::{Activities, Activity},
    config::{Config, Sabotage},
    host::*,
    members,
    random::Random,
    tables::{AnyTable, Device, Member},
    work,
};

pub(crate) type Adapter = Arc<CallAdapter<Device>>;

/// Everything that the threads share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) space: Space,
    pub(crate) host: Arc<Host>,
    pub(crate) primary: Arc<dyn AnyTable>,
    pub(crate) secondary: RwLock<Option<Arc<dyn AnyTable>>>,
    pub(crate) adapter: RwLock<Option<Adapter>>,
    pub(crate) activities: Activities,
    /// What has been copied of each page, as a migration would: by value.
    pub(crate) copies: Mutex<Vec<u64>>,
    resting: AtomicBool,
    stopping: AtomicBool,
    rested: Barrier,
    resumed: Barrier,
    /// Of each worker, and of the comparison: steps, what it does, whether it is due to move.
    beats: Vec<Beat>,
}

#[derive(Debug, Default)]
struct Beat {
    steps: AtomicU64,
    doing: AtomicUsize,
    idle: AtomicBool,
}

/// What goes into the dirty bitmap.
struct Sink {
    host: Arc<Host>,
    activities: Activities,
    forget: bool,
}

impl DirtySink for Sink {
    fn dirty(&self, range: GpaRange) {
        self.activities.did(Activity::FactReported);
        if !self.forget {
            self.host.pages_of(range, None).into_iter().for_each(|page| self.host.mark(page));
        }
    }
}

/// What runs, and how often.
const WORKERS: [(&str, work::Step); 8] = [
    ("vcpu 0", work::vcpu),
    ("vcpu 1", work::vcpu),
    ("vcpu 2", work::vcpu),
    ("host 0", work::host),
    ("host 1", work::host),
    ("shape", work::shape),
    ("members", work::members),
    ("migration", work::migration),
];

/// Nothing moved for so long: something waits for ever.
const DEADLOCK: Duration = Duration::from_secs(20);
const BETWEEN_RESTS: Duration = Duration::from_millis(250);

impl Shared {
    pub(crate) fn over(&self) -> bool {
        self.stopping.load(Relaxed) || self.host.failure.happened()
    }

    pub(crate) fn sabotage(&self, what: Sabotage) -> bool {
        self.config.sabotage == what
    }

    /// A sign of life, and of what.
    pub(crate) fn beat(&self, worker: usize, doing: Activity) {
        self.beats[worker].steps.fetch_add(1, Relaxed);
        self.beats[worker].doing.store(doing as usize, Relaxed);
    }

    fn work(&self, index: usize, step: work::Step) {
        let mut worker = work::Worker::new(self, index, Random::new(self.config.seed, index as u64 + 1));
        // A failure stops the run at its next rest: until then everybody goes on, so that nobody is waited for in vain.
        loop {
            if self.resting.load(Acquire) {
                self.beats[index].idle.store(true, Relaxed);
                self.rested.wait();
                self.resumed.wait();
                self.beats[index].idle.store(false, Relaxed);
                if self.stopping.load(Acquire) {
                    return;
                }
            }
            if self.host.failure.happened() {
                self.beat(index, Activity::Rest);
                thread::sleep(Duration::from_millis(1));
                continue;
            }
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| step(&mut worker))) {
                let what = panic.downcast_ref::<String>().cloned();
                let what = what.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
                self.host.failure.report(format!("{} panicked: {what:?}", WORKERS[index].0));
            }
        }
    }

    /// Stops the process, with a picture, where a thread makes no step.
    fn watch(&self, done: &AtomicBool) {
        let mut last: Vec<(u64, Instant)> = vec![(0, Instant::now()); self.beats.len()];
        while !done.load(Acquire) {
            thread::sleep(Duration::from_millis(100));
            for (beat, last) in self.beats.iter().zip(&mut last) {
                let now = beat.steps.load(Relaxed);
                if now != last.0 || beat.idle.load(Relaxed) {
                    *last = (now, Instant::now());
                }
            }
            if last.iter().any(|(_, since)| since.elapsed() > DEADLOCK) {
                eprintln!("stress: seed {:#x}: no step for {DEADLOCK:?}", self.config.seed);
                let names = WORKERS.iter().map(|(name, _)| *name).chain(["comparison"]);
                for ((name, beat), (steps, since)) in names.zip(&self.beats).zip(&last) {
                    let doing = Activity::name(beat.doing.load(Relaxed));
                    eprintln!("  {name}: step {steps}, {doing}, for {:?}", since.elapsed());
                }
                eprintln!("  found before: {:?}", self.host.failure.take());
                eprintln!("  {:?}, {:?}", self.space.progress(), self.space.counters());
                std::process::abort();
            }
        }
    }

    /// Everybody rests: the whole state is compared with the truth.
    fn compare(&self) -> Result<(), String> {
        let host = &*self.host;
        let since = Instant::now();
        while self.space.progress().count != 0 {
            self.space.reap();
            if since.elapsed() > DEADLOCK {
                return Err(format!("{:?} although nobody has a window", self.space.progress()));
            }
            thread::yield_now();
        }
        let counters = self.space.counters();
        if counters.unrelated_retries != 0 {
            return Err(format!("retries without reason: {counters:?}"));
        }
        // No write is lost, and what leaves say is what the host says.
        for page in 0..PAGES {
            let Some(backing) = host.backing(page) else { continue };
            let writes = host.ledger[page].load(Acquire);
            let (found, wanted) = (host.contents(backing.frame), (tag_of(page), value_of(page, writes)));
            if found != wanted {
                return Err(format!(
                    "page {page} in frame {} holds {found:x?} after {writes} writes, not {wanted:x?}",
                    backing.frame
                ));
            }
        }
        let tables = [Some(Arc::clone(&self.primary)), self.secondary.read().unwrap().clone()];
        for table in tables.iter().flatten() {
            self.compare_table(&**table)?;
        }
        if let Some(adapter) = &*self.adapter.read().unwrap() {
            for extent in adapter.mapped() {
                let pages = extent.guest.len() / PAGE;
                let first = page_at(extent.guest.start()).ok_or("the device maps the alias")?;
                for offset in 0..pages as usize {
                    let frame = frame_at(extent.output.wrapping_add(offset as u64 * PAGE));
                    self.compare_leaf("device", first + offset, frame, extent.access.writable())?;
                }
            }
        }
        // A last round of migration has everything.
        while !work::migrate(self, &work::PARTS) {
            self.beat(WORKERS.len(), Activity::Harvested);
        }
        let copies = self.copies.lock().unwrap();
        for page in 0..PAGES {
            let Some(backing) = host.backing(page) else { continue };
            let (copied, value) = (copies[page], host.value(backing.frame));
            if copied != value {
                return Err(format!("page {page} was written and never reported: copied {copied}, holds {value}"));
            }
        }
        host.release_deferred();
        host.settle_stamps();
        Ok(())
    }

    fn compare_leaf(&self, whose: &str, page: usize, frame: Option<u32>, writable: bool) -> Result<(), String> {
        let backing = self.host.backing(page);
        if backing.map(|backing| backing.frame) != frame || (writable && backing.is_some_and(|backing| backing.shared))
        {
            return Err(format!("{whose} translates page {page} to {frame:?} (writable: {writable}), not {backing:?}"));
        }
        Ok(())
    }

    fn compare_table(&self, table: &dyn AnyTable) -> Result<(), String> {
        table.check().map_err(|error| format!("{table:?}: {error}"))?;
        let alias = self.host.alias();
        let whole = notifier_core::AddrRange::with_len(notifier_core::Gpa::new(0), 1 << 39).unwrap();
        let logged = self.space.slots().iter().any(|(_, slot)| slot.flags.contains(SlotFlags::LOG_DIRTY));
        for leaf in table.leaves(whole) {
            for offset in 0..leaf.span / PAGE {
                let gpa = leaf.start.wrapping_add(offset * PAGE);
                let frame = leaf.frame.map(|frame| frame + offset as u32);
                let page = page_at(gpa).or_else(|| {
                    let offset = gpa.as_u64().checked_sub(ALIAS_BASE)? / PAGE;
                    Some(alias.region()? * SPAN + offset as usize).filter(|_| offset < SPAN as u64)
                });
                let page = page.ok_or_else(|| format!("{table:?} translates {gpa}, where no slot is"))?;
                self.compare_leaf(&format!("{table:?}"), page, frame, leaf.writable)?;
                if logged && page / SPAN == LOGGED_REGION && leaf.span != PAGE {
                    return Err(format!("a leaf of {:#x} bytes in a slot whose writes are logged", leaf.span));
                }
                if page_at(gpa).is_none() && alias.read_only() && leaf.writable {
                    return Err(format!("{gpa} is writable in a read-only slot"));
                }
            }
        }
        if self.config.private_reclaim {
            self.compare_pages(table)?;
        }
        Ok(())
    }

    /// Pages are as many as can be reached, once nobody is pinned.
    fn compare_pages(&self, table: &dyn AnyTable) -> Result<(), String> {
        let since = Instant::now();
        loop {
            // What failed flushes left in limbo goes with a flush that inherits.
            let _ = self.space.zap(gpas(0, 1)).map(|guard| guard.close());
            self.space.collect();
            let (live, linked) = (table.live_pages(), table.stats().tables);
            if live == linked {
                return Ok(());
            }
            if since.elapsed() > Duration::from_secs(5) {
                return Err(format!("{table:?}: {live} pages live, {linked} linked"));
            }
        }
    }
}

/// The longest that a run goes on because something has not happened yet.
const PATIENCE: Duration = Duration::from_secs(30);

/// Runs; `Err` says what went wrong.
pub(crate) fn run(name: &str, config: Config) -> Result<(), String> {
    println!("stress: {name}: seed {:#x}, {:?}", config.seed, config.duration);
    let host = Arc::new(Host::new());
    let activities = Activities::default();
    let sink = Sink {
        host: Arc::clone(&host),
        activities: activities.clone(),
        forget: config.sabotage == Sabotage::ForgetSink,
    };
    let builder = Space::builder().dirty_sink(sink);
    let space = if config.private_reclaim { builder.private_reclaim().build() } else { builder.build() };
    for (first, count) in [(0, 2 * SPAN), (LOGGED_REGION * SPAN, SPAN), (MEMFD_REGION * SPAN, SPAN)] {
        let hva = (first / SPAN != MEMFD_REGION).then(|| hva_of(first));
        let spec = SlotSpec { guest: gpas(first, count), host: hva, flags: SlotFlags::empty() };
        space.add_slot(spec).map_err(|error| error.to_string())?;
    }
    let joined = (config.primary)(&space).map_err(|error| format!("join: {error}"))?;
    let Member { table: primary, subscription, pages } = joined;
    let shared = Shared {
        config,
        space,
        host,
        primary,
        secondary: RwLock::default(),
        adapter: RwLock::default(),
        activities,
        copies: Mutex::new(vec![0; PAGES]),
        resting: AtomicBool::new(false),
        stopping: AtomicBool::new(false),
        rested: Barrier::new(WORKERS.len() + 1),
        resumed: Barrier::new(WORKERS.len() + 1),
        beats: (0..=WORKERS.len()).map(|_| Beat::default()).collect(),
    };
    let comparing = &shared.beats[WORKERS.len()];
    comparing.idle.store(true, Relaxed);
    let missing = |activities: &Activities| -> Vec<Activity> {
        let impossible = |what: &Activity| match what {
            Activity::MadeYoung => !config.ages_by_rights,
            Activity::LeafOf2M | Activity::Collapsed => !config.large_leaves,
            _ => false,
        };
        activities.missing().filter(|what| !impossible(what)).collect()
    };
    let begun = Instant::now();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        let shared = &shared;
        let done = &done;
        scope.spawn(move || shared.watch(done));
        let workers: Vec<_> = (WORKERS.iter().enumerate())
            .map(|(index, &(name, step))| {
                let builder = thread::Builder::new().name(name.into());
                builder.spawn_scoped(scope, move || shared.work(index, step)).expect("a thread")
            })
            .collect();
        loop {
            let rest = Instant::now() + BETWEEN_RESTS;
            while Instant::now() < rest && !shared.host.failure.happened() {
                thread::sleep(Duration::from_millis(5));
            }
            shared.resting.store(true, Release);
            shared.rested.wait();
            if !shared.host.failure.happened() {
                comparing.idle.store(false, Relaxed);
                shared.beat(WORKERS.len(), Activity::Rest);
                if let Err(what) = shared.compare() {
                    shared.host.failure.report(what);
                }
                comparing.idle.store(true, Relaxed);
                shared.activities.did(Activity::Rest);
            }
            let elapsed = begun.elapsed();
            let idle = config.sabotage == Sabotage::None && !missing(&shared.activities).is_empty();
            let enough = elapsed >= config.duration && (!idle || elapsed >= config.duration + PATIENCE);
            let stop = enough || shared.host.failure.happened();
            shared.stopping.store(stop, Release);
            shared.resting.store(false, Release);
            shared.resumed.wait();
            if stop {
                break;
            }
        }
        for worker in workers {
            let _ = worker.join();
        }
        done.store(true, Release);
    });
    println!("stress: {name}: {:?}: {}", begun.elapsed(), shared.activities);
    println!("stress: {name}: {:?}", shared.space.counters());
    if let Some(what) = shared.host.failure.take() {
        return Err(format!("seed {:#x}: {what}", config.seed));
    }
    if config.sabotage == Sabotage::None {
        let missing = missing(&shared.activities);
        if !missing.is_empty() {
            return Err(format!("never happened: {missing:?}"));
        }
    }
    end(shared, subscription, &pages)
}

/// Everybody leaves; nothing is left.
fn end(shared: Shared, subscription: Subscription, pages: &spte_core::HeapPages) -> Result<(), String> {
    members::leave(&shared, subscription)?;
    let Shared { config, space, primary, host, secondary, .. } = shared;
    // A table keeps its space.
    drop(secondary);
    let leaves: u64 = primary.stats().leaves.iter().sum();
    if leaves != 0 {
        return Err(format!("{leaves} leaves in a table that has left"));
    }
    drop(primary);
    let progress = space.progress();
    if progress.count != 0 {
        return Err(format!("{progress:?} at the end"));
    }
    // With a collector that all spaces share nobody is obliged to collect: pin until it has.
    let since = Instant::now();
    while pages.live() != 0 && !config.private_reclaim && since.elapsed() < Duration::from_secs(5) {
        space.collect();
        thread::yield_now();
    }
    drop(space);
    // The reaper may hold the space for another moment.
    while pages.live() != 0 && since.elapsed() < Duration::from_secs(5) {
        thread::sleep(Duration::from_millis(1));
    }
    match pages.live() {
        0 => host.failure.take().map_or(Ok(()), Err),
        live => Err(format!("{live} pages are never freed")),
    }
}
