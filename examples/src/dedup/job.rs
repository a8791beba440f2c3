// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A run from beginning to end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use super::{
    access::Agent,
    cli::{Backend, Options},
    clock::{process_cpu, thread_cpu},
    device,
    error::Error,
    guest::Guest,
    images::Images,
    memory::PAGE,
    merger::Merger,
    plot,
    progress::{Point, Progress},
    report::{Details, Report, Sample, mode_name},
    store::Store,
    tally::Tally,
    vcpu::{self, Pace},
};

/// Between two points of the plot.
const TICK: Duration = Duration::from_millis(50);

/// Everything that threads share.
#[derive(Debug)]
struct Job {
    guests: Vec<Guest>,
    store: Arc<Store>,
    tally: Arc<Tally>,
    /// Blocks of the guests' memory files before the first merge, in bytes.
    resident_before: u64,
}

impl Job {
    fn new(options: &Options, images: Images) -> Result<Self, Error> {
        let images = Arc::new(images);
        // Pages of the same contents are merged even where they are alone in their frame by now: no more frames than pages.
        let all = u32::try_from(u64::from(options.guests) * options.pages() as u64).map_err(|_| Error::StoreFull)?;
        let store = Arc::new(Store::new(all)?);
        let tally = Arc::new(Tally::default());
        let pace = Pace::new(options.guests, options.pages());
        let guest = |number: u32| {
            let layout = images.layout(options.seed.wrapping_mul(64).wrapping_add(u64::from(number)));
            Guest::new(&images, &layout, &store, &tally, options.safety(), pace)
        };
        let guests = (0..options.guests).map(guest).collect::<Result<Vec<_>, _>>()?;
        let mut job = Self { guests, store, tally, resident_before: 0 };
        job.resident_before = job.resident()?;
        Ok(job)
    }

    fn resident(&self) -> Result<u64, Error> {
        self.guests.iter().map(|guest| guest.home.resident()).sum()
    }

    /// Bytes that merging saves now.
    fn saved(&self, merged: u64) -> u64 {
        merged.saturating_sub(self.store.in_use()) * PAGE as u64
    }

    fn point(&self, at: Duration) -> Point {
        let tally = &self.tally;
        Point {
            at,
            merged: tally.merged.get(),
            saved: self.saved(tally.merged.get().saturating_sub(tally.unmerged.get())),
            faults: self.guests.iter().map(|guest| guest.space.counters().faults).sum(),
            damage: tally.lost_writes.get() + tally.stale_reads.get(),
        }
    }
}

/// Says stop when it goes, a panic included: no thread works on for the others' sake when one is gone.
struct StopOthers<'a>(&'a AtomicBool);

impl Drop for StopOthers<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn spawn<'s, 'e, R: Send + 's>(
    scope: &'s Scope<'s, 'e>,
    name: String,
    stop: &'s AtomicBool,
    work: impl FnOnce() -> Result<R, Error> + Send + 's,
) -> Result<ScopedJoinHandle<'s, Result<R, Error>>, Error> {
    let work = move || {
        // Threads that were told to stop change nothing by telling the others.
        let _last = StopOthers(stop);
        work()
    };
    thread::Builder::new().name(name).spawn_scoped(scope, work).map_err(Error::Thread)
}

fn joined<R>(handle: ScopedJoinHandle<'_, Result<R, Error>>) -> Result<R, Error> {
    handle.join().unwrap_or(Err(Error::Panicked))
}

/// Makes a run. It ends when its time is over, when nothing more is to be merged (unless it was given a time), or when
/// `interrupt` is set.
///
/// # Errors
/// [`Error`]; where its exit code is 2, nothing was begun.
pub fn run(options: &Options, interrupt: &AtomicBool) -> Result<Report, Error> {
    if let Some(path) = &options.plot {
        plot::can_write(path)?;
    }
    let (limit, until_idle) = options.limit();
    let progress = Progress::new(limit);
    progress.say("filling RAM");
    let images = Images::load(&options.image, options.pages(), options.seed)?;
    let (files, times) = (images.files(), images.times());
    let job = Job::new(options, images)?;

    let (stop, idle) = (AtomicBool::new(false), AtomicBool::new(false));
    let (started, cpu_started) = (Instant::now(), process_cpu());
    let mut points = vec![job.point(Duration::ZERO)];
    let (samples, merger_cpu) = thread::scope(|scope| -> Result<(Vec<Sample>, Duration), Error> {
        // Whatever ends this, an error included, ends the threads too.
        let stop_all = StopOthers(&stop);
        let (stop, idle, job) = (&stop, &idle, &job);
        let mut agents = Vec::new();
        for (number, guest) in job.guests.iter().enumerate() {
            let seed = move |role: u64| options.seed.wrapping_mul(1000).wrapping_add(number as u64 * 8 + role);
            let reader = move || vcpu::read(guest, seed(0), stop);
            let writer = move || vcpu::write(guest, seed(1), stop);
            let device = move || device::transfer(guest, seed(2), stop);
            agents.push(spawn(scope, format!("guest{number}-vcpu0"), stop, reader)?);
            agents.push(spawn(scope, format!("guest{number}-vcpu1"), stop, writer)?);
            agents.push(spawn(scope, format!("guest{number}-device"), stop, device)?);
        }
        let merger = spawn(scope, "merger".into(), stop, move || {
            let merger = Merger::new(&job.guests, &job.store, &job.tally, options.mode, options.safety());
            Ok((merger.run(stop, idle)?, thread_cpu()))
        })?;
        let over = || {
            let told = stop.load(Ordering::Relaxed) || interrupt.load(Ordering::Relaxed);
            told || started.elapsed() >= limit || until_idle && idle.load(Ordering::Relaxed)
        };
        while !over() {
            thread::sleep(TICK.min(limit.saturating_sub(started.elapsed())));
            let point = job.point(started.elapsed());
            progress.show(&point);
            points.push(point);
        }
        drop(stop_all);
        let merged = joined(merger);
        // All of them, whatever the first one says.
        let ends: Vec<_> = agents.into_iter().map(joined).collect();
        ends.into_iter().collect::<Result<(), Error>>()?;
        merged
    })?;
    let (elapsed, cpu) = (started.elapsed(), process_cpu().saturating_sub(cpu_started));

    // Before the last look, which in an unsafe run brings back what was given away.
    let merged_now = job.guests.iter().map(|guest| guest.mapping.merged()).sum();
    let bytes_saved = job.saved(merged_now);
    let given = job.resident_before.saturating_sub(job.resident()?);
    let bytes_returned = given.saturating_sub(job.store.file().resident()?);
    progress.say("looking at every page once more");
    for guest in &job.guests {
        let mut agent = Agent::new(guest);
        (0..guest.pages()).try_for_each(|page| agent.check(page))?;
        guest.table.check().map_err(|gpa| Error::Entry { gpa })?;
    }
    if let Some(path) = &options.plot {
        plot::draw(path, &points)?;
    }

    let counters: Vec<_> = job.guests.iter().map(|guest| guest.space.counters()).collect();
    let sum = |field: fn(&notifier_core::Counters) -> u64| counters.iter().map(field).sum::<u64>();
    let tally = &job.tally;
    let details = Details {
        safety: options.safety(),
        auto: options.backend == Backend::Auto,
        mem: options.mem,
        files,
        times,
        passes: tally.passes.get(),
        windows: sum(|c| c.windows),
        faults: sum(|c| c.faults),
        absent: tally.absent.get(),
        differed: tally.differed.get(),
        merged_now,
        frames: job.store.in_use(),
        checks: tally.checks.get(),
        writes: tally.writes.get(),
        leases: tally.leases.get(),
        interrupted: interrupt.load(Ordering::Relaxed),
    };
    Ok(Report {
        backend: "software",
        mode: mode_name(options.mode),
        guests: options.guests,
        pages_scanned: tally.scanned.get(),
        pages_merged: tally.merged.get(),
        bytes_saved,
        bytes_returned,
        unmerged: tally.unmerged.get(),
        vetoes: sum(|c| c.vetoes),
        retries: sum(|c| c.retries),
        unrelated_retries: sum(|c| c.unrelated_retries),
        changes: sum(|c| c.changes),
        zaps: sum(|c| c.zaps) + tally.zapped.get(),
        refaults_after_merge: tally.refaults.get(),
        lost_writes: tally.lost_writes.get(),
        stale_reads: tally.stale_reads.get(),
        elapsed_ms: elapsed.as_millis() as u64,
        cpu_ms: cpu.as_millis() as u64,
        merger_cpu_ms: merger_cpu.as_millis() as u64,
        samples,
        details,
    })
}
