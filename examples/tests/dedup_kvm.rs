// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main job on KVM, briefly, in each of its modes, and with a host whose calls fail. Where guests cannot run on KVM
//! each test says so and passes.

use std::{
    collections::BTreeMap,
    io,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use examples::dedup::{Error, Options, Report, run, run_on};
use notifier_linux::{Call, Kernel};

/// One at a time: runs that share a processor show little.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn options(args: &[&str]) -> Options {
    Options::from_args([&["dedup", "--backend", "kvm"], args].concat()).unwrap()
}

/// The outcome of a run, or `None`, and a line, where there is no KVM.
fn on_kvm(run: impl FnOnce() -> Result<Report, Error>) -> Option<Report> {
    let _alone = alone();
    match run() {
        Err(Error::Backend(why)) => {
            println!("not run: {why}");
            None
        }
        Err(error) => panic!("{error:?}"),
        Ok(report) => Some(report),
    }
}

fn brief(args: &[&str]) -> Option<Report> {
    on_kvm(|| run(&options(&[&["--mem", "16M"], args].concat()), &AtomicBool::new(false)))
}

/// What holds for every run of a safe merger.
fn assert_safe(report: &Report) {
    assert_eq!((report.lost_writes, report.stale_reads, report.unrelated_retries), (0, 0, 0), "{report}");
    assert_eq!((report.backend, report.exit_code()), ("kvm", 0), "{report}");
    assert!(report.pages_merged > 4096, "{report}");
    assert!(report.bytes_saved > 8 << 20, "{report}");
    assert!(report.bytes_returned >= report.bytes_saved / 10 * 9, "{report}");
    assert!(report.unmerged > 0 && report.unmerged < report.pages_merged, "{report}");
    assert!(report.kvm_exits.is_some_and(|exits| exits > 0), "{report}");
}

#[test]
fn merged_pages_of_real_guests_are_repointed_without_a_fault() {
    let Some(report) = brief(&["--seconds", "3"]) else { return };
    assert_safe(&report);
    assert_eq!(report.refaults_after_merge, 0, "{report}");
    assert!(report.changes >= report.pages_merged / 10 * 9, "{report}");
    assert!(report.vetoes > 0, "{report}");
    assert!(report.kvm_page_faults.is_none_or(|faults| faults > 0), "{report}");
    assert_eq!(report.samples.len(), 8);
}

#[test]
fn zapped_pages_fault_again() {
    let Some(report) = brief(&["--seconds", "3", "--mode", "zap"]) else { return };
    assert_safe(&report);
    assert_eq!(report.changes, 0, "{report}");
    assert!(report.refaults_after_merge > 0 && report.zaps >= report.pages_merged, "{report}");
}

#[test]
fn merging_without_a_fence_loses_writes() {
    let Some(report) = brief(&["--seconds", "3", "--unsafe-no-fence"]) else { return };
    assert!(report.lost_writes > 0, "{report}");
    assert_eq!(report.exit_code(), 0);
}

#[test]
fn un_merging_without_a_window_makes_devices_read_what_is_old() {
    let Some(report) = brief(&["--seconds", "3", "--unsafe-no-notify"]) else { return };
    assert!(report.stale_reads > 0, "{report}");
    assert_eq!(report.exit_code(), 0);
}

#[test]
fn guests_go_on_whatever_call_of_the_host_fails() {
    // Which calls a run makes once it has begun, and how many.
    let counts = Arc::new(Mutex::new(BTreeMap::new()));
    let kernel = Kernel::with_hook({
        let counts = Arc::clone(&counts);
        move |call| {
            *counts.lock().unwrap().entry(call.name()).or_insert(0_u64) += 1;
            Ok(())
        }
    });
    let small = options(&["--mem", "8M", "--seconds", "1"]);
    let Some(_) = on_kvm(|| run_on(&kernel, &small, &AtomicBool::new(false))) else { return };
    let counts = counts.lock().unwrap().clone();
    for &call in Call::ALL {
        // Those of the beginning are made a few times, and end the run before it has begun.
        let Some(&made) = counts.get(call.name()).filter(|&&made| made > 40) else { continue };
        let at = made / 4;
        let (seen, failed) = (AtomicU64::new(0), Arc::new(AtomicU64::new(0)));
        let kernel = Kernel::with_hook({
            let failed = Arc::clone(&failed);
            move |this| {
                // Once, and then three times in a row: made again at once, and given up.
                let count = if this == call { seen.fetch_add(1, Ordering::Relaxed) } else { 0 };
                if count == at || (2 * at..2 * at + 3).contains(&count) && at != 0 {
                    failed.fetch_add(1, Ordering::Relaxed);
                    return Err(io::Error::from_raw_os_error(12));
                }
                Ok(())
            }
        });
        let report = on_kvm(|| run_on(&kernel, &small, &AtomicBool::new(false))).unwrap();
        let failed = failed.load(Ordering::Relaxed);
        assert!(failed > 0, "{}: never failed\n{report}", call.name());
        assert_eq!((report.lost_writes, report.stale_reads), (0, 0), "{}: {report}", call.name());
        assert!(report.pages_merged > 2048, "{}: {report}", call.name());
    }
}

/// A run of a few seconds on a host that `hook` makes difficult: no damage, and guests go on.
fn on_a_difficult_host(hook: impl Fn(Call) -> io::Result<()> + Send + Sync + 'static) {
    let kernel = Kernel::with_hook(hook);
    let report = on_kvm(|| run_on(&kernel, &options(&["--mem", "4M", "--seconds", "2"]), &AtomicBool::new(false)));
    let Some(report) = report else { return };
    assert_eq!((report.lost_writes, report.stale_reads, report.exit_code()), (0, 0, 0), "{report}");
    assert!(report.pages_merged > 1024, "{report}");
}

#[test]
fn the_moment_without_a_fence_loses_nothing_however_long_it_is() {
    // What is mapped over a page is fenced only when it was registered and armed: each takes a millisecond more.
    for slow in [Call::MapFile, Call::Register, Call::WriteProtect, Call::ReadPagemap] {
        on_a_difficult_host(move |call| {
            if call == slow {
                thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        });
    }
}

#[test]
fn nobody_waits_for_ever_where_fences_are_hard_to_lift() {
    let lifts = AtomicU64::new(0);
    on_a_difficult_host(move |call| {
        // Each twentieth fails, and so do the five that follow.
        let hard = call == Call::Lift && lifts.fetch_add(1, Ordering::Relaxed) % 20 < 6;
        if hard { Err(io::Error::from_raw_os_error(12)) } else { Ok(()) }
    });
}

#[test]
fn a_fence_that_cannot_be_lifted_at_all_ends_the_run_and_holds_nobody() {
    let lifts = AtomicU64::new(0);
    let kernel = Kernel::with_hook(move |call| {
        let hard = call == Call::Lift && lifts.fetch_add(1, Ordering::Relaxed) > 200;
        if hard { Err(io::Error::from_raw_os_error(12)) } else { Ok(()) }
    });
    let _alone = alone();
    match run_on(&kernel, &options(&["--mem", "4M", "--seconds", "60"]), &AtomicBool::new(false)) {
        Err(Error::Backend(why)) => println!("not run: {why}"),
        Err(Error::FenceGone) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_porter_that_is_gone_ends_the_run_and_holds_nobody() {
    let reads = AtomicU64::new(0);
    let kernel = Kernel::with_hook(move |call| {
        let gone = call == Call::ReadMessages && reads.fetch_add(1, Ordering::Relaxed) > 200;
        if gone { Err(io::Error::from_raw_os_error(5)) } else { Ok(()) }
    });
    let _alone = alone();
    match run_on(&kernel, &options(&["--mem", "4M", "--seconds", "60"]), &AtomicBool::new(false)) {
        Err(Error::Backend(why)) => println!("not run: {why}"),
        Err(Error::FenceGone | Error::Fence(_)) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_run_that_cannot_begin_says_why_and_one_that_can_is_safe() {
    let smallest = options(&["--mem", "4M", "--seconds", "1"]);
    let mut errors = 0;
    for &call in Call::ALL {
        let made = Arc::new(AtomicU64::new(0));
        let kernel = Kernel::with_hook({
            let made = Arc::clone(&made);
            move |this| {
                // The first time, and whoever asks again at once.
                let first = this == call && made.fetch_add(1, Ordering::Relaxed) < 3;
                if first { Err(io::Error::from_raw_os_error(12)) } else { Ok(()) }
            }
        });
        let _alone = alone();
        match run_on(&kernel, &smallest, &AtomicBool::new(false)) {
            Err(Error::Backend(why)) => return println!("not run: {why}"),
            Err(error) => {
                assert!(made.load(Ordering::Relaxed) > 0, "{}: {error}", call.name());
                assert_eq!(error.exit_code(), 1, "{}: {error}", call.name());
                assert!(!error.to_string().contains('\n'), "{error}");
                errors += 1;
            }
            Ok(report) => assert_eq!((report.lost_writes, report.stale_reads), (0, 0), "{}: {report}", call.name()),
        }
    }
    // RAM, or its fence, could not be made.
    assert!(errors > 2);
}

#[test]
fn left_open_the_back_end_is_kvm_where_that_can_be_had() {
    let auto = Options::from_args(["dedup", "--mem", "4M", "--seconds", "1"]).unwrap();
    let _alone = alone();
    let report = run(&auto, &AtomicBool::new(false)).unwrap();
    let kvm = run(&options(&["--mem", "4M", "--seconds", "1"]), &AtomicBool::new(false));
    assert_eq!(report.backend, if kvm.is_ok() { "kvm" } else { "software" });
    // It says why: KVM opens, or what is missing.
    let text = report.to_string();
    assert!(text.contains(&format!("{} (", report.backend)), "{text}");
    let json = report.json().unwrap();
    assert_eq!(json.contains("\"kvm_exits\":"), report.backend == "kvm", "{json}");
}
