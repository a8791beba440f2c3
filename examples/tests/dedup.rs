// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The main job on software walkers, briefly, in each of its modes. Damage is counted by a ledger that knows no table: the unsafe modes are
//! here to show that it can.

use std::{
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use examples::dedup::{Error, Options, Report, run};

/// One at a time: runs that share a processor show little.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn dedup(args: &[&str]) -> Result<Report, Error> {
    let options = Options::from_args([&["dedup", "--backend", "software"], args].concat()).unwrap();
    run(&options, &AtomicBool::new(false))
}

fn brief(mem: &str, args: &[&str]) -> Report {
    let _alone = alone();
    dedup(&[&["--mem", mem], args].concat()).unwrap()
}

/// What holds for every run of a safe merger.
fn assert_safe(report: &Report) {
    assert_eq!((report.lost_writes, report.stale_reads, report.unrelated_retries), (0, 0, 0), "{report}");
    assert_eq!(report.exit_code(), 0);
    assert!(report.pages_merged > 4096, "{report}");
    assert!(report.bytes_saved > 8 << 20, "{report}");
    assert!(report.bytes_returned >= report.bytes_saved / 10 * 9, "{report}");
    assert!(report.unmerged > 0 && report.unmerged < report.pages_merged, "{report}");
}

#[test]
fn merged_pages_are_repointed_without_a_fault() {
    let report = brief("16M", &["--seconds", "2"]);
    assert_safe(&report);
    assert_eq!(report.refaults_after_merge, 0, "{report}");
    assert!(report.changes >= report.pages_merged / 10 * 9, "{report}");
    assert!(report.vetoes > 0, "{report}");
}

#[test]
fn merged_pages_are_repointed_without_a_fault_in_each_format() {
    for format in ["npt", "x86-64", "x86-64-la57", "arm64-s2", "ppc-radix", "mips64"] {
        let report = brief("16M", &["--seconds", "2", "--format", format]);
        assert_safe(&report);
        assert_eq!(report.refaults_after_merge, 0, "{format}: {report}");
        assert!(report.changes >= report.pages_merged / 10 * 9, "{format}: {report}");
    }
}

/// Where entries are broken before they are made, a leaf that only leads elsewhere is not: both pages are equal, and neither
/// may be written.
#[test]
fn arm64_leaves_change_their_frame_and_nothing_else() {
    let _alone = alone();
    // No back end is asked for: vCPUs on KVM would walk another format.
    let options = Options::from_args(["dedup", "--format", "arm64-s2", "--mem", "16M", "--seconds", "2"]).unwrap();
    let report = run(&options, &AtomicBool::new(false)).unwrap();
    assert_safe(&report);
    assert_eq!((report.backend, report.refaults_after_merge), ("software", 0), "{report}");
    assert!(report.to_string().contains("arm64-s2"), "{report}");
    assert_eq!(report.samples.len(), 8);
    for sample in &report.samples {
        let raw = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        let (before, after) = (raw(&sample.before), raw(&sample.after));
        let output = |entry: u64| entry & 0xffff_ffff_f000;
        assert_eq!((sample.level, output(before)), (3, raw(&sample.gpa)), "{sample:?}");
        assert!(output(after) >= 1 << 40, "the store is above: {sample:?}");
        assert_eq!(before & !output(u64::MAX), after & !output(u64::MAX), "{sample:?}");
        // A valid page that was used, inner shareable, write-back; S2AP reads, and neither writes nor has DBM.
        assert_eq!(after & !output(u64::MAX), 0x77f, "{sample:?}");
    }
}

/// On Power a page that is repointed is taken away, flushed and made again: a walk that comes in between waits for it, and no page
/// has to be faulted in again.
#[test]
fn radix_leaves_change_their_frame_and_nothing_else() {
    let _alone = alone();
    let options = Options::from_args(["dedup", "--format", "ppc-radix", "--mem", "16M", "--seconds", "2"]).unwrap();
    let report = run(&options, &AtomicBool::new(false)).unwrap();
    assert_safe(&report);
    assert_eq!((report.backend, report.refaults_after_merge), ("software", 0), "{report}");
    assert!(report.to_string().contains("ppc-radix"), "{report}");
    assert_eq!(report.samples.len(), 8);
    for sample in &report.samples {
        let raw = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        let (before, after) = (raw(&sample.before), raw(&sample.after));
        let output = |entry: u64| entry & 0x1ff_ffff_ffff_f000;
        assert_eq!((sample.level, output(before)), (1, raw(&sample.gpa)), "{sample:?}");
        assert!(output(after) >= 1 << 40, "the store is above: {sample:?}");
        // A valid leaf that was used; EAA reads and executes, and does not write.
        assert_eq!(after & !output(u64::MAX), 0xc000_0000_0000_0105, "{sample:?}");
        assert_eq!(before & !output(u64::MAX), after & !output(u64::MAX), "{sample:?}");
    }
}

#[test]
fn mips_leaves_change_their_frame_and_nothing_else() {
    let _alone = alone();
    let options = Options::from_args(["dedup", "--format", "mips64", "--mem", "16M", "--seconds", "2"]).unwrap();
    let report = run(&options, &AtomicBool::new(false)).unwrap();
    assert_safe(&report);
    assert_eq!((report.backend, report.refaults_after_merge), ("software", 0), "{report}");
    assert_eq!(report.samples.len(), 8);
    for sample in &report.samples {
        let raw = |text: &str| u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap();
        let (before, after) = (raw(&sample.before), raw(&sample.after));
        let output = |entry: u64| entry & 0xffff_ffff_f000;
        assert_eq!((sample.level, output(before)), (1, raw(&sample.gpa)), "{sample:?}");
        assert!(output(after) >= 1 << 40, "the store is above: {sample:?}");
        // Write-back, V, ACCESSED, PRESENT; neither D nor WRITE and MODIFIED, neither RI nor XI.
        assert_eq!([before, after].map(|entry| entry & !output(u64::MAX)), [0x685; 2], "{sample:?}");
    }
}

#[test]
fn zapped_arm64_pages_fault_again() {
    let report = brief("16M", &["--seconds", "2", "--format", "arm64-s2", "--mode", "zap"]);
    assert_safe(&report);
    assert_eq!(report.changes, 0, "{report}");
    assert!(report.refaults_after_merge > 0 && report.zaps >= report.pages_merged, "{report}");
}

#[test]
fn zapped_pages_fault_again() {
    let report = brief("16M", &["--seconds", "2", "--mode", "zap"]);
    assert_safe(&report);
    assert_eq!(report.changes, 0, "{report}");
    assert!(report.refaults_after_merge > 0 && report.zaps >= report.pages_merged, "{report}");
}

#[test]
fn comparing_before_the_window_loses_writes() {
    let report = brief("16M", &["--seconds", "3", "--unsafe-no-fence"]);
    assert!(report.lost_writes > 0, "{report}");
    assert_eq!(report.exit_code(), 0);
}

#[test]
fn giving_memory_back_without_a_window_makes_reads_stale() {
    let report = brief("16M", &["--seconds", "1", "--unsafe-no-notify"]);
    assert!(report.stale_reads > 0, "{report}");
    assert_eq!((report.exit_code(), report.changes), (0, 0));
}

#[test]
fn a_single_guest_has_its_own_equal_pages() {
    let _alone = alone();
    let path = std::env::temp_dir().join(format!("dedup-twice-{}", std::process::id()));
    // 64 pages of contents, 32 times over: a file that is its own twin.
    let once: Vec<u8> = (0..64u32 << 12).map(|i| (i >> 12) as u8 ^ i as u8).collect();
    std::fs::write(&path, once.repeat(32)).unwrap();
    let report = dedup(&["--guests", "1", "--mem", "8M", "--seconds", "1", "--image", path.to_str().unwrap()]);
    std::fs::remove_file(&path).unwrap();
    let report = report.unwrap();
    assert_eq!((report.lost_writes, report.stale_reads, report.refaults_after_merge), (0, 0, 0), "{report}");
    assert!(report.bytes_saved > 6 << 20, "{report}");
}

#[test]
fn without_a_time_a_run_ends_when_nothing_more_is_to_be_merged() {
    let began = Instant::now();
    let report = brief("4M", &["--guests", "3"]);
    assert!(began.elapsed() < Duration::from_secs(60));
    assert_eq!((report.lost_writes, report.stale_reads), (0, 0), "{report}");
    assert!(report.pages_merged >= 2 * 1024, "{report}");
}

#[test]
fn an_interrupted_run_reports() {
    let _alone = alone();
    let options = Options::from_args(["dedup", "--backend", "software", "--mem", "4M", "--seconds", "60"]).unwrap();
    let interrupt = AtomicBool::new(false);
    let began = Instant::now();
    let report = thread::scope(|scope| {
        let run = scope.spawn(|| run(&options, &interrupt).unwrap());
        thread::sleep(Duration::from_millis(400));
        interrupt.store(true, Ordering::Relaxed);
        run.join().unwrap()
    });
    assert!(began.elapsed() < Duration::from_secs(20));
    assert_eq!(report.exit_code(), 0);
    assert!(report.to_string().ends_with("interrupted"));
}

#[test]
fn the_json_object_has_these_fields_in_this_order() {
    let report = brief("4M", &["--seconds", "1"]);
    let json = report.json().unwrap();
    assert!(!json.contains('\n'));
    let value: serde_json::Value = serde_json::from_str(&json).unwrap();
    let names = [
        "backend",
        "mode",
        "guests",
        "pages_scanned",
        "pages_merged",
        "bytes_saved",
        "bytes_returned",
        "unmerged",
        "vetoes",
        "retries",
        "unrelated_retries",
        "changes",
        "zaps",
        "refaults_after_merge",
        "lost_writes",
        "stale_reads",
        "elapsed_ms",
        "cpu_ms",
        "merger_cpu_ms",
        "samples",
    ];
    let object = value.as_object().unwrap();
    assert_eq!(object.len(), names.len(), "{json}");
    let places: Vec<_> = names.iter().map(|name| json.find(&format!("\"{name}\":")).expect(name)).collect();
    assert!(places.is_sorted(), "{json}");
    assert_eq!((&value["backend"], &value["mode"]), (&"software".into(), &"change".into()));
    let samples = value["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 8);
    for sample in samples {
        let raw = |name: &str| u64::from_str_radix(&sample[name].as_str().unwrap()[2..], 16).unwrap();
        let output = |entry: u64| entry & 0x000f_ffff_ffff_f000;
        assert_eq!(output(raw("before")), raw("gpa"), "home is where the page is: {sample}");
        assert!(output(raw("after")) >= 1 << 40, "the store is above: {sample}");
        // Nothing but the frame changes: present, readable, executable, not writable (SDM volume 3, EPT entries).
        assert_eq!(raw("before") & !output(u64::MAX), raw("after") & !output(u64::MAX), "{sample}");
        assert_eq!(raw("after") & 0b111, 0b101, "{sample}");
        assert_eq!(sample["level"], 1);
    }
}

#[test]
fn what_cannot_be_written_or_read_is_bad_input() {
    for args in [["--plot", "/nowhere/plot.svg"], ["--image", "/nowhere"], ["--image", "/"]] {
        let error = dedup(&args).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{error}");
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn a_plot_is_drawn() {
    let path = std::env::temp_dir().join(format!("dedup-run-{}.svg", std::process::id()));
    brief("4M", &["--seconds", "1", "--plot", path.to_str().unwrap()]);
    let svg = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert!(svg.contains("MiB saved") && svg.contains("polyline"));
}
