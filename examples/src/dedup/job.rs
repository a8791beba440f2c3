// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A run from beginning to end.

use std::{
    ops::Range,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, Scope, ScopedJoinHandle},
    time::{Duration, Instant},
};

use notifier_core::Space;
use notifier_linux::Kernel;

use super::{
    access::{Agent, Walking},
    backend::{self, Chosen},
    cli::Options,
    clock::{process_cpu, thread_cpu},
    damage::Checking,
    device,
    error::Error,
    guest::{Guest, Run},
    home::Home,
    images::Images,
    mapped::{Mapped, RamKind},
    memory::PAGE,
    merger::Merger,
    native::{self, Direct, Native, OpenFence},
    plot,
    progress::{Point, Progress},
    report::{Details, Report, Sample, mode_name},
    store::Store,
    tally::Tally,
    vcpu::{self, Pace, WRITER_REST},
};
use crate::machine::Machine;

/// Between two points of the plot.
const TICK: Duration = Duration::from_millis(50);
/// Stamps of vCPUs, and of the VMM. Devices have their own.
const VCPU_STAMPS: Range<u64> = 1..1 << 61;
const VMM_STAMPS: Range<u64> = 1 << 61..1 << 62;
/// Between two bursts of the VMM's writes.
const VMM_REST: Duration = Duration::from_millis(5);

/// Everything that threads share.
#[derive(Debug)]
struct Job {
    guests: Vec<Guest>,
    store: Arc<Store>,
    tally: Arc<Tally>,
    /// Memory of the guests before the first merge, in bytes.
    resident_before: u64,
}

impl Job {
    fn new(
        options: &Options,
        chosen: Chosen,
        kernel: &Kernel,
        images: Images,
        interrupt: &AtomicBool,
    ) -> Result<Self, Error> {
        let images = Arc::new(images);
        // Pages of the same contents are merged even where they are alone in their frame by now: no more frames than
        // pages.
        let all = u32::try_from(u64::from(options.guests) * options.pages() as u64).map_err(|_| Error::StoreFull)?;
        let store = Arc::new(match chosen {
            Chosen::Software => Store::new(all)?,
            Chosen::Kvm => Store::for_mapping(all)?,
        });
        let tally = Arc::new(Tally::default());
        let pace = Pace::new(options.guests, options.pages());
        let home = |space: &Space, pages: usize| match chosen {
            Chosen::Software => Home::file(space, pages),
            Chosen::Kvm => {
                let (kind, safety) = (RamKind::Anonymous, options.safety());
                let mapped = Mapped::new(space, pages, kind, store.file(), kernel, safety, &tally)?;
                Ok(Home::Mapped(Box::new(mapped)))
            }
        };
        let safety = options.safety();
        let format = options.format.unwrap_or_default();
        let common = Run { images: &images, store: &store, tally: &tally, format, safety, pace, interrupt };
        let guest = |number: u32| {
            let layout = images.layout(options.seed.wrapping_mul(64).wrapping_add(u64::from(number)));
            let guest = Guest::new(home, &layout, &common)?;
            // Devices of a real guest may reach all of its RAM before it runs.
            if chosen == Chosen::Kvm {
                guest.prefetch_all()?;
            }
            Ok(guest)
        };
        let guests = (0..options.guests).map(guest).collect::<Result<Vec<_>, Error>>()?;
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

/// A guest's vCPUs: one that reads, one that writes.
#[derive(Debug)]
enum Cpus<'j> {
    Software(Walking<'j>, Walking<'j>),
    Kvm(Box<[Native<'j>; 2]>),
}

/// What was measured when all had stopped.
#[derive(Debug)]
struct Measured {
    elapsed: Duration,
    cpu: Duration,
    merger_cpu: Duration,
    samples: Vec<Sample>,
    merged_now: u64,
    bytes_saved: u64,
    bytes_returned: u64,
    kvm: Option<KvmCounts>,
}

/// What KVM counted.
#[derive(Debug)]
struct KvmCounts {
    exits: u64,
    page_faults: Option<u64>,
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
    run_on(&Kernel::new(), options, interrupt)
}

/// The same, with the host's calls made through `kernel`, which may let some of them fail.
///
/// # Errors
/// As for [`run`].
pub fn run_on(kernel: &Kernel, options: &Options, interrupt: &AtomicBool) -> Result<Report, Error> {
    if let Some(path) = &options.plot {
        plot::can_write(path)?;
    }
    let (chosen, why) = backend::choose(options.backend, options.format)?;
    let (limit, until_idle) = options.limit();
    let progress = Progress::new(limit);
    progress.say("filling RAM");
    let images = Images::load(&options.image, options.pages(), options.seed)?;
    let (files, times) = (images.files(), images.times());
    let job = Job::new(options, chosen, kernel, images, interrupt)?;
    let mut machines = Vec::new();
    let mut cpus = Vec::new();
    for guest in &job.guests {
        cpus.push(match chosen {
            Chosen::Software => Cpus::Software(Walking::new(guest), Walking::new(guest)),
            Chosen::Kvm => {
                let (machine, vcpus) = Machine::new(guest.home.memory(), 2)?;
                machines.push(machine);
                let mut vcpus = vcpus.into_iter().map(|vcpu| Native::new(guest, vcpu));
                match (vcpus.next(), vcpus.next()) {
                    (Some(reader), Some(writer)) => Cpus::Kvm(Box::new([reader, writer])),
                    _ => return Err(Error::NoVcpu),
                }
            }
        });
    }

    let (stop, idle, closed) = (AtomicBool::new(false), AtomicBool::new(false), AtomicBool::new(false));
    let (started, cpu_started) = (Instant::now(), process_cpu());
    let mut points = vec![job.point(Duration::ZERO)];
    let measured = thread::scope(|scope| -> Result<Measured, Error> {
        // Whatever ends this, an error included, ends the threads too: those first that others may wait for last.
        let close = StopOthers(&closed);
        let stop_all = StopOthers(&stop);
        let (stop, idle, closed, job) = (&stop, &idle, &closed, &job);
        let mut porters = Vec::new();
        if chosen == Chosen::Kvm {
            for (number, guest) in job.guests.iter().enumerate() {
                let porter = move || {
                    let _open = OpenFence(guest);
                    native::let_writers_in(guest, closed)
                };
                porters.push(spawn(scope, format!("guest{number}-porter"), stop, porter)?);
            }
        }
        let mut readers = Vec::new();
        let mut agents = Vec::new();
        for (number, (guest, cpus)) in job.guests.iter().zip(cpus).enumerate() {
            let seed = move |role: u64| options.seed.wrapping_mul(1000).wrapping_add(number as u64 * 8 + role);
            let (reader, writer) = (format!("guest{number}-vcpu0"), format!("guest{number}-vcpu1"));
            match cpus {
                Cpus::Software(mut zero, mut one) => {
                    let read = move || vcpu::read(&mut zero, seed(0), stop);
                    let write = move || vcpu::write(&mut one, seed(1), VCPU_STAMPS, WRITER_REST, stop);
                    agents.push(spawn(scope, reader, stop, read)?);
                    agents.push(spawn(scope, writer, stop, write)?);
                }
                Cpus::Kvm(both) => {
                    let [mut zero, mut one] = *both;
                    let read = move || vcpu::read(&mut zero, seed(0), stop).map(|()| zero);
                    let write = move || vcpu::write(&mut one, seed(1), VCPU_STAMPS, WRITER_REST, stop).map(|()| one);
                    let vmm = move || vcpu::write(&mut Direct(guest), seed(3), VMM_STAMPS, VMM_REST, stop);
                    readers.push(spawn(scope, reader, stop, read)?);
                    readers.push(spawn(scope, writer, stop, write)?);
                    agents.push(spawn(scope, format!("guest{number}-vmm"), stop, vmm)?);
                }
            }
            let device = move || device::transfer(guest, seed(2), stop);
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
        let natives: Vec<_> = readers.into_iter().map(joined).collect();
        ends.into_iter().collect::<Result<(), Error>>()?;
        let mut natives = natives.into_iter().collect::<Result<Vec<Native<'_>>, Error>>()?;
        let (samples, merger_cpu) = merged?;
        let (elapsed, cpu) = (started.elapsed(), process_cpu().saturating_sub(cpu_started));

        // Before the last look, which in an unsafe run brings back what was given away.
        let merged_now = job.guests.iter().map(|guest| guest.mapping.merged()).sum();
        let given = job.resident_before.saturating_sub(job.resident()?);
        let faults = machines.iter().map(|machine| Ok(machine.page_faults()?)).collect::<Result<Vec<_>, Error>>()?;
        let measured = Measured {
            elapsed,
            cpu,
            merger_cpu,
            samples,
            merged_now,
            bytes_saved: job.saved(merged_now),
            bytes_returned: given.saturating_sub(job.store.file().resident()?),
            kvm: (chosen == Chosen::Kvm).then(|| KvmCounts {
                exits: natives.iter().map(Native::exits).sum(),
                page_faults: faults.into_iter().sum(),
            }),
        };
        progress.say("looking at every page once more");
        for guest in &job.guests {
            look_at_all(&mut Walking::new(guest))?;
            guest.table.check().map_err(|gpa| Error::Entry { gpa })?;
        }
        natives.iter_mut().try_for_each(look_at_all)?;
        drop(close);
        porters.into_iter().map(joined).collect::<Vec<_>>().into_iter().collect::<Result<(), Error>>()?;
        Ok(measured)
    })?;
    if let Some(path) = &options.plot {
        plot::draw(path, &points)?;
    }

    let counters: Vec<_> = job.guests.iter().map(|guest| guest.space.counters()).collect();
    let sum = |field: fn(&notifier_core::Counters) -> u64| counters.iter().map(field).sum::<u64>();
    let tally = &job.tally;
    let details = Details {
        safety: options.safety(),
        kvm: chosen == Chosen::Kvm,
        format: options.format,
        why,
        mem: options.mem,
        files,
        times,
        passes: tally.passes.get(),
        windows: sum(|c| c.windows),
        faults: sum(|c| c.faults),
        absent: tally.absent.get(),
        differed: tally.differed.get(),
        no_mapping: tally.no_mapping.get(),
        host_failures: tally.host_failures.get(),
        stuck: tally.stuck.get(),
        merged_now: measured.merged_now,
        frames: job.store.in_use(),
        checks: tally.checks.get(),
        writes: tally.writes.get(),
        leases: tally.leases.get(),
        interrupted: interrupt.load(Ordering::Relaxed),
    };
    Ok(Report {
        backend: chosen.name(),
        mode: mode_name(options.mode),
        guests: options.guests,
        pages_scanned: tally.scanned.get(),
        pages_merged: tally.merged.get(),
        bytes_saved: measured.bytes_saved,
        bytes_returned: measured.bytes_returned,
        unmerged: tally.unmerged.get(),
        vetoes: sum(|c| c.vetoes),
        retries: sum(|c| c.retries),
        unrelated_retries: sum(|c| c.unrelated_retries),
        changes: sum(|c| c.changes),
        zaps: sum(|c| c.zaps) + tally.zapped.get(),
        refaults_after_merge: tally.refaults.get(),
        lost_writes: tally.lost_writes.get(),
        stale_reads: tally.stale_reads.get(),
        elapsed_ms: measured.elapsed.as_millis() as u64,
        cpu_ms: measured.cpu.as_millis() as u64,
        merger_cpu_ms: measured.merger_cpu.as_millis() as u64,
        samples: measured.samples,
        kvm_exits: measured.kvm.as_ref().map(|kvm| kvm.exits),
        kvm_page_faults: measured.kvm.and_then(|kvm| kvm.page_faults),
        details,
    })
}

/// Checks every page of RAM.
fn look_at_all(agent: &mut impl Agent) -> Result<(), Error> {
    let pages: Vec<usize> = (0..agent.guest().pages()).collect();
    pages.chunks(64).try_for_each(|pages| agent.check(pages))
}
