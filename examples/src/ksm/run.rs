// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One measured run of KSM over given memory.

use std::{
    fs,
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use notifier_core::HvaRange;
use serde::Serialize;

use super::{
    Paths,
    daemon::{Counters, Daemon, DaemonError, ProcessStat},
    frames::{Frames, FramesError},
    mergeable::{MergeableError, mark},
    settings::{PutBack, Saved, Setting, SettingsError},
    smaps::{SmapsError, Sums},
};

/// A run that was not made, or was broken off. The settings were put back then; what could not be is in the record, for
/// [`restore_left_over`](super::restore_left_over). The memory may be marked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The settings cannot be recorded or changed.
    #[error(transparent)]
    Settings(#[from] SettingsError),
    /// `ksmd` or its counters cannot be read.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// The memory cannot be marked.
    #[error(transparent)]
    Mergeable(#[from] MergeableError),
    /// The mappings cannot be summed.
    #[error(transparent)]
    Smaps(#[from] SmapsError),
    /// The frames cannot be counted, though the process may.
    #[error(transparent)]
    Frames(#[from] FramesError),
    /// The kernel does not tell which pages are merged: `smaps` has no line `KSM`.
    #[error("this kernel's smaps does not tell what KSM merged")]
    NotTold,
    /// The run is complete, but settings are not as they were.
    #[error("after a run that merged {} pages: {source}", run.merged_pages)]
    NotPutBack {
        /// What the run measured.
        run: Box<KsmRun>,
        /// Which settings.
        source: SettingsError,
    },
}

/// How KSM is to be run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// Pages that `ksmd` looks at between two rests.
    pub pages_to_scan: u32,
    /// A rest. Whole milliseconds count.
    pub sleep: Duration,
    /// Whether pages that did not merge are looked at less and less often; `None` leaves the host's setting. Where it
    /// is on, KSM's records of memory that was here before, at the same addresses, may have it spare new memory for
    /// some scans: measure in a process of its own then.
    pub smart_scan: Option<bool>,
    /// Whether pages of zeroes go to the kernel's zero page; `None` leaves the host's setting.
    pub use_zero_pages: Option<bool>,
    /// Merged pages at which the run ends; `None` for as many as there are.
    pub target: Option<u64>,
    /// The run ends where this many full scans have merged nothing more. At least 2: the first scan only remembers what
    /// pages hold. At least 10 with `smart_scan` on, which spares a page for up to 8 scans (`skip_age` in `mm/ksm.c`).
    pub quiet_scans: u32,
    /// The run ends after this time.
    pub timeout: Duration,
    /// Time between two samples, and so how finely times are known. More where a sample takes long: no more than a
    /// tenth of the time is spent on them.
    pub sample_every: Duration,
}

impl Plan {
    /// `ksmd` without a rest, every page in each scan: the soonest that KSM can merge.
    pub fn eager() -> Self {
        Self {
            pages_to_scan: 20_000,
            sleep: Duration::ZERO,
            smart_scan: Some(false),
            use_zero_pages: None,
            target: None,
            quiet_scans: 3,
            timeout: Duration::from_secs(60),
            sample_every: Duration::from_millis(10),
        }
    }

    /// 2000 pages, then 20 ms of rest: some three times slower, with a quarter of a processor for `ksmd` while it
    /// merges.
    pub fn kind() -> Self {
        Self { pages_to_scan: 2_000, sleep: Duration::from_millis(20), ..Self::eager() }
    }
}

/// Why a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub enum Ended {
    /// The target was reached.
    Target,
    /// Full scans merged nothing more.
    Quiet,
    /// The time was over.
    TimedOut,
    /// The caller asked.
    Interrupted,
}

/// How far a run was at some time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Sample {
    /// Time since `ksmd` was let run.
    pub at: Duration,
    /// What `ksmd` used since; see [`Daemon::cpu`] for how exact it is.
    pub ksmd_cpu: Duration,
    /// Pages of the ranges that lead to a frame KSM shares, and pages of this process merged with the zero page since.
    ///
    /// The first and the last sample, and one that ends a run at its target, are what `smaps` says, which takes the
    /// kernel some 0.2 us a page. Those between are [`ProcessStat::merging_pages`], with pages that were written since
    /// and not been scanned again; but where KSM knew pages of this process already, it would count others too, and
    /// all are from `smaps`.
    pub merged: u64,
    /// Full scans since.
    pub full_scans: u64,
}

/// What a run did. Differences are between its beginning and its end; the memory stays marked and merged after it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct KsmRun {
    /// As it was asked for.
    pub plan: Plan,
    /// Why it ended.
    pub ended: Ended,
    /// Pages merged, as [`Sample::merged`] counts: each page that leads to a shared frame counts, also the first.
    pub merged_pages: u64,
    /// Time from `ksmd` being let run until it rested again.
    pub wall: Duration,
    /// Processor time `ksmd` used, for this process and for all others that have marked memory.
    pub ksmd_cpu: Duration,
    /// Bytes of KSM's own records for this process at the end.
    pub records: u64,
    /// The mappings of the ranges before, marked already, and after.
    pub mappings: [Sums; 2],
    /// The frames of the ranges before and after; `None` where the process may not know.
    pub frames: Option<[Frames; 2]>,
    /// The host's counters before and after. Where others have merged pages, they are among them.
    pub counters: [Counters; 2],
    /// This process's counters before and after.
    pub process: [ProcessStat; 2],
    /// Bytes of a page.
    pub page: u64,
    /// In order of time; the first is the beginning, the last the end.
    pub samples: Vec<Sample>,
    /// Settings put back at the end.
    #[serde(skip)]
    pub put_back: Vec<PutBack>,
}

impl KsmRun {
    /// Bytes the host got back: frames the ranges no longer have. Negative where the process touched more memory
    /// meanwhile. Without the right to know frames it is the loss of `Pss`, short or long by up to 1 KiB a mapping.
    pub fn returned(&self) -> i64 {
        let lost = |[before, after]: [u64; 2]| before.cast_signed().wrapping_sub(after.cast_signed());
        match self.frames {
            Some(frames) => lost(frames.map(|frames| frames.distinct.saturating_mul(self.page))),
            None => lost(self.mappings.map(|sums| sums.pss)),
        }
    }

    /// The first sample with at least `pages` merged.
    pub fn reached(&self, pages: u64) -> Option<&Sample> {
        self.samples.iter().find(|sample| sample.merged >= pages)
    }

    /// The first sample with 95 % of the target merged, or of the final number where there was no target. `None` where
    /// the target was not come that near, or nothing was merged.
    pub fn at_95_percent(&self) -> Option<&Sample> {
        let all = u128::from(self.plan.target.unwrap_or(self.merged_pages));
        let pages = u64::try_from((all * 95).div_ceil(100)).unwrap_or(u64::MAX);
        self.reached(pages.max(1))
    }

    /// Processor time of `ksmd` for a merged page; `None` where none was.
    pub fn cpu_per_page(&self) -> Option<Duration> {
        let nanos = self.ksmd_cpu.as_nanos().checked_div(u128::from(self.merged_pages))?;
        Some(Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX)))
    }
}

/// What is compared with its beginning.
struct Start<'a> {
    paths: &'a Paths,
    daemon: &'a Daemon,
    cpu: Duration,
    counters: Counters,
    process: ProcessStat,
    ranges: &'a [HvaRange],
    page: u64,
    clock: Instant,
}

impl Start<'_> {
    fn sample(&self, exact: bool) -> Result<(Sample, Counters, ProcessStat), RunError> {
        let ksmd_cpu = self.daemon.cpu()?.saturating_sub(self.cpu);
        let at = self.clock.elapsed();
        let counters = Counters::read(self.paths)?;
        let process = ProcessStat::read(self.paths)?;
        // Among `merging_pages` are also pages long unmapped, until they are scanned: of use only if there were none.
        let sharing = match exact || self.process.rmap_items != 0 {
            true => Sums::of(self.paths, self.ranges)?.ksm.ok_or(RunError::NotTold)? / self.page,
            false => process.merging_pages,
        };
        let zero = process.zero_pages.saturating_sub(self.process.zero_pages);
        let merged = sharing.saturating_add(zero);
        let full_scans = counters.full_scans.saturating_sub(self.counters.full_scans);
        Ok((Sample { at, ksmd_cpu, merged, full_scans }, counters, process))
    }
}

/// Frames, unless this process may not know them.
fn frames(paths: &Paths, ranges: &[HvaRange]) -> Result<Option<Frames>, FramesError> {
    match Frames::of(paths, ranges) {
        Ok(frames) => Ok(Some(frames)),
        Err(FramesError::Hidden) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Marks `ranges`, which are page aligned and of this process, lets `ksmd` run as `plan` says until the plan or
/// `interrupt` ends it, and puts KSM's settings back as they were.
///
/// The ranges stay marked and what is merged stays merged, though no longer looked at where `run` was found 0:
/// [`unmark`](super::unmark) undoes that, and so does unmapping.
/// Needs the right to write KSM's settings: root. Put back what a killed run left
/// ([`restore_left_over`](super::restore_left_over)) before this.
///
/// # Errors
/// [`RunError`] by what failed. Nothing is changed where `ksmd` cannot be found or the settings cannot be recorded.
pub fn merge_with_ksm(
    paths: &Paths,
    ranges: &[HvaRange],
    plan: &Plan,
    interrupt: &AtomicBool,
) -> Result<KsmRun, RunError> {
    let daemon = Daemon::find(paths)?;
    let mut saved = Saved::take(paths)?;
    if saved.found(Setting::Run) == Some("1") {
        saved.set(Setting::Run, 0)?;
    }
    if saved.found(Setting::AdvisorMode).is_some() {
        saved.set(Setting::AdvisorMode, "none")?;
    }
    saved.set(Setting::PagesToScan, plan.pages_to_scan)?;
    saved.set(Setting::SleepMillisecs, plan.sleep.as_millis())?;
    for (setting, wanted) in [(Setting::SmartScan, plan.smart_scan), (Setting::UseZeroPages, plan.use_zero_pages)] {
        if let Some(wanted) = wanted {
            saved.set(setting, u8::from(wanted))?;
        }
    }
    // The mark also makes the ranges mappings of their own, apart from unmarked neighbours: they can be summed now.
    mark(paths, ranges)?;
    let mappings = Sums::of(paths, ranges)?;
    let frames_before = frames(paths, ranges)?;

    let start = Start {
        paths,
        daemon: &daemon,
        cpu: daemon.cpu()?,
        counters: Counters::read(paths)?,
        process: ProcessStat::read(paths)?,
        ranges,
        page: rustix::param::page_size() as u64,
        clock: Instant::now(),
    };
    let mut samples = vec![start.sample(true)?.0];
    saved.set(Setting::Run, 1)?;
    let smart = fs::read_to_string(paths.sysfs.join(Setting::SmartScan.name())).is_ok_and(|text| text.trim() == "1");
    let quiet_scans = u64::from(plan.quiet_scans.max(if smart { 10 } else { 2 }));
    // When something was merged last, in full scans.
    let (mut most, mut grew_at) = (0, 0);
    let ended = loop {
        let began = Instant::now();
        let (mut sample, ..) = start.sample(false)?;
        let reached = |sample: &Sample| plan.target.is_some_and(|target| sample.merged >= target);
        if reached(&sample) {
            sample.merged = start.sample(true)?.0.merged;
        }
        let took = began.elapsed();
        samples.push(sample);
        if sample.merged > most {
            (most, grew_at) = (sample.merged, sample.full_scans);
        }
        if reached(&sample) {
            break Ended::Target;
        }
        if sample.full_scans - grew_at >= quiet_scans {
            break Ended::Quiet;
        }
        if interrupt.load(Ordering::Relaxed) {
            break Ended::Interrupted;
        }
        if sample.at >= plan.timeout {
            break Ended::TimedOut;
        }
        thread::sleep(plan.sample_every.max(took * 9));
    };
    // The kernel returns from this once `ksmd` is between two batches, and then it does not run: its time is exact.
    saved.set(Setting::Run, 0)?;
    let (last, counters, process) = start.sample(true)?;
    samples.push(last);

    let mut run = KsmRun {
        plan: *plan,
        ended,
        merged_pages: last.merged,
        wall: last.at,
        ksmd_cpu: last.ksmd_cpu,
        records: process.records(start.page),
        mappings: [mappings, Sums::of(paths, ranges)?],
        frames: frames_before.zip(frames(paths, ranges)?).map(<[Frames; 2]>::from),
        counters: [start.counters, counters],
        process: [start.process, process],
        page: start.page,
        samples,
        put_back: Vec::new(),
    };
    match saved.restore() {
        Ok(put_back) => {
            run.put_back = put_back;
            Ok(run)
        }
        Err(source) => Err(RunError::NotPutBack { run: Box::new(run), source }),
    }
}
