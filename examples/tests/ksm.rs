// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel's merging as the examples use it: its texts are read right, its settings are put back whatever happens,
//! and where this process may, a real run.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{self, Command, Stdio},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use examples::ksm::{
    Counters, Daemon, DaemonError, Ended, Frames, MergeableError, Paths, Plan, ProcessStat, Saved, Setting,
    SettingsError, SmapsError, Sums, host_ranges, mark, merge_with_ksm, restore_left_over, unmark,
};
use notifier_core::{AddrRange, Hva, HvaRange};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
const PAGE: u64 = 4096;

fn range(start: u64, end: u64) -> HvaRange {
    AddrRange::new(Hva::new(start), Hva::new(end)).unwrap()
}

/// A directory that imitates `/`, removed at the end.
struct Root(PathBuf);

impl Root {
    fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("ksm-test-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = env::temp_dir().join(name);
        fs::create_dir_all(&root).unwrap();
        Self(root)
    }

    /// With KSM's settings as a kernel that was just started has them.
    fn with_settings() -> Self {
        let root = Self::new();
        for (name, value) in [
            ("run", "0"),
            ("advisor_mode", "[none] scan-time"),
            ("pages_to_scan", "100"),
            ("sleep_millisecs", "20"),
            ("smart_scan", "1"),
            ("use_zero_pages", "0"),
            ("max_page_sharing", "256"),
            ("pages_shared", "0"),
        ] {
            root.write(&format!("sys/kernel/mm/ksm/{name}"), &format!("{value}\n"));
        }
        root
    }

    fn paths(&self) -> Paths {
        Paths::below(&self.0)
    }

    fn write(&self, path: &str, text: &str) {
        let path = self.0.join(path);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn setting(&self, setting: Setting) -> String {
        value(&self.paths(), setting)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

fn value(paths: &Paths, setting: Setting) -> String {
    fs::read_to_string(paths.sysfs.join(setting.name())).unwrap().trim().to_owned()
}

/// All the settings this kernel has.
fn settings(paths: &Paths) -> Vec<(Setting, String)> {
    let there = Setting::ALL.iter().filter(|setting| paths.sysfs.join(setting.name()).exists());
    there.map(|&setting| (setting, value(paths, setting))).collect()
}

#[test]
fn settings_are_put_back_and_the_record_goes() {
    let root = Root::with_settings();
    let paths = root.paths();
    let before = settings(&paths);
    {
        let mut saved = Saved::take(&paths).unwrap();
        assert_eq!(settings(&paths), before, "taking changes nothing");
        saved.set(Setting::PagesToScan, 20_000).unwrap();
        saved.set(Setting::Run, 1).unwrap();
        assert_eq!((root.setting(Setting::PagesToScan), root.setting(Setting::Run)), ("20000".into(), "1".into()));
        assert_eq!(fs::metadata(&paths.record).unwrap().permissions().mode() & 0o777, 0o600);
    }
    assert_eq!(settings(&paths), before);
    assert!(!paths.record.exists());

    let mut saved = Saved::take(&paths).unwrap();
    saved.set(Setting::Run, 1).unwrap();
    let told: Vec<String> = saved.restore().unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(told, ["run 1 -> 0"]);
    assert!(!paths.record.exists());
}

#[test]
fn a_change_is_recorded_before_it_is_made() {
    let root = Root::with_settings();
    let paths = root.paths();
    let mut saved = Saved::take(&paths).unwrap();
    // A directory where the next record is to be made: noting the change fails.
    let next = paths.record.with_extension("new");
    fs::create_dir(&next).unwrap();
    assert!(matches!(saved.set(Setting::Run, 1), Err(SettingsError::Record { .. })));
    assert_eq!(root.setting(Setting::Run), "0");
    fs::remove_dir(&next).unwrap();
    saved.set(Setting::Run, 1).unwrap();
    assert!(fs::read_to_string(&paths.record).unwrap().contains("\"changed\": [\n    \"run\"\n  ]"));
}

#[test]
fn without_a_place_for_the_record_nothing_is_changed() {
    let root = Root::with_settings();
    root.write("run/secondary-mmu", "a file where the directory should be");
    let before = settings(&root.paths());
    assert!(matches!(Saved::take(&root.paths()), Err(SettingsError::Record { .. })));
    assert_eq!(settings(&root.paths()), before);
}

#[test]
fn settings_the_run_left_alone_are_not_touched() {
    let root = Root::with_settings();
    let mut saved = Saved::take(&root.paths()).unwrap();
    saved.set(Setting::Run, 1).unwrap();
    root.write("sys/kernel/mm/ksm/sleep_millisecs", "50\n");
    saved.restore().unwrap();
    assert_eq!((root.setting(Setting::Run), root.setting(Setting::SleepMillisecs)), ("0".into(), "50".into()));
}

#[test]
fn what_an_advisor_chooses_is_left_to_it() {
    let root = Root::with_settings();
    root.write("sys/kernel/mm/ksm/advisor_mode", "none [scan-time]\n");
    let mut saved = Saved::take(&root.paths()).unwrap();
    assert_eq!(saved.found(Setting::AdvisorMode), Some("scan-time"));
    saved.set(Setting::AdvisorMode, "none").unwrap();
    saved.set(Setting::PagesToScan, 20_000).unwrap();
    saved.restore().unwrap();
    // The kernel would refuse to have it written.
    let is = (root.setting(Setting::AdvisorMode), root.setting(Setting::PagesToScan));
    assert_eq!(is, ("scan-time".into(), "20000".into()));
}

#[test]
fn an_unknown_setting_and_a_kernel_without_ksm_are_told() {
    let root = Root::with_settings();
    let mut saved = Saved::take(&root.paths()).unwrap();
    let refused = saved.set(Setting::MergeAcrossNodes, 1);
    assert!(matches!(refused, Err(SettingsError::NoSetting { setting: Setting::MergeAcrossNodes })));
    let bare = Root::new();
    assert!(matches!(Saved::take(&bare.paths()), Err(SettingsError::NoKsm { .. })));
    assert!(!bare.paths().record.exists());
}

#[test]
fn what_cannot_be_put_back_is_named_and_its_record_kept() {
    let root = Root::with_settings();
    let paths = root.paths();
    let mut saved = Saved::take(&paths).unwrap();
    saved.set(Setting::SmartScan, 0).unwrap();
    saved.set(Setting::Run, 1).unwrap();
    // A file that can be read and that nobody can write, root neither.
    let file = paths.sysfs.join("smart_scan");
    fs::remove_file(&file).unwrap();
    symlink("/proc/version", &file).unwrap();
    let error = saved.restore().unwrap_err();
    let SettingsError::Partly { put_back, failed, record } = &error else { panic!("{error}") };
    assert_eq!(put_back.iter().map(|p| p.setting).collect::<Vec<_>>(), [Setting::Run]);
    assert_eq!(failed.iter().map(|f| (f.setting, f.wanted.as_str())).collect::<Vec<_>>(), [(Setting::SmartScan, "1")]);
    assert_eq!(record, &paths.record);
    assert!(paths.record.exists() && error.to_string().contains("smart_scan stays at Linux version"), "{error}");

    fs::remove_file(&file).unwrap();
    fs::write(&file, "0\n").unwrap();
    let restored = restore_left_over(&paths).unwrap().unwrap();
    let line = "KSM settings that a run killed earlier had changed were put back: smart_scan 0 -> 1";
    assert_eq!((restored.to_string().as_str(), root.setting(Setting::SmartScan).as_str()), (line, "1"));
    assert!(!paths.record.exists());
}

#[test]
fn a_text_that_is_no_record_is_left_alone() {
    let root = Root::with_settings();
    root.write("run/secondary-mmu/ksm.json", "{\"pid\": 1");
    assert!(matches!(restore_left_over(&root.paths()), Err(SettingsError::NotARecord { .. })));
    assert!(matches!(Saved::take(&root.paths()), Err(SettingsError::NotARecord { .. })));
    assert!(root.paths().record.exists());
}

#[test]
fn without_a_record_nothing_is_put_back_and_nothing_made() {
    let root = Root::with_settings();
    assert!(restore_left_over(&root.paths()).unwrap().is_none());
    assert!(!root.0.join("run").exists());
}

/// Runs itself as the process that is killed.
#[test]
fn a_killed_run_is_told_from_a_live_one_and_put_back() {
    const ROOT: &str = "KSM_TEST_ROOT_OF_CHILD";
    if let Some(root) = env::var_os(ROOT) {
        let mut saved = Saved::take(&Paths::below(Path::new(&root))).unwrap();
        saved.set(Setting::PagesToScan, 777).unwrap();
        saved.set(Setting::Run, 1).unwrap();
        println!("\nsettings changed");
        // Until the parent kills this process, or ends itself.
        std::io::stdin().lock().lines().for_each(drop);
        return;
    }
    let root = Root::with_settings();
    let paths = root.paths();
    let before = settings(&paths);
    let mut child = Command::new(env::current_exe().unwrap())
        .args(["--exact", "a_killed_run_is_told_from_a_live_one_and_put_back", "--nocapture"])
        .env(ROOT, &root.0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut told = BufReader::new(child.stdout.take().unwrap()).lines().map_while(Result::ok);
    assert!(told.any(|line| line == "settings changed"));
    let id = child.id();

    assert!(matches!(Saved::take(&paths), Err(SettingsError::Busy { pid: Some(pid) }) if pid == id));
    assert!(matches!(restore_left_over(&paths), Err(SettingsError::Busy { pid: Some(pid) }) if pid == id));
    assert_eq!(root.setting(Setting::Run), "1");

    child.kill().unwrap();
    child.wait().unwrap();
    assert!(matches!(Saved::take(&paths), Err(SettingsError::LeftOver { pid, .. }) if pid == id));
    let restored = restore_left_over(&paths).unwrap().unwrap();
    assert_eq!(restored.pid, id);
    assert_eq!(
        restored.to_string(),
        "KSM settings that a run killed earlier had changed were put back: pages_to_scan 777 -> 100, run 1 -> 0"
    );
    assert_eq!(settings(&paths), before);
    assert!(restore_left_over(&paths).unwrap().is_none());
}

const KSMD: &str =
    "37 (ksmd) S 2 0 0 0 -1 2097216 0 0 0 0 25 5 0 0 25 5 1 0 29 0 0 18446744073709551615 0 0 0 0 0 0 0\n";

#[test]
fn ksmd_is_a_child_of_kthreadd() {
    let root = Root::new();
    root.write("proc/9/comm", "ksmd\n");
    root.write("proc/9/stat", "9 (ksmd) S 1 0 0 0 -1 0 0 0 0 0 1 1 0 0\n");
    root.write("proc/uptime", "1 1\n");
    assert!(matches!(Daemon::find(&root.paths()), Err(DaemonError::NoDaemon { .. })));
    root.write("proc/37/comm", "ksmd\n");
    root.write("proc/37/stat", KSMD);
    assert_eq!(Daemon::find(&root.paths()).unwrap().pid(), 37);
}

#[test]
fn processor_time_is_in_nanoseconds_or_else_in_ticks() {
    let root = Root::new();
    root.write("proc/37/comm", "ksmd\n");
    root.write("proc/37/stat", KSMD);
    let daemon = Daemon::find(&root.paths()).unwrap();
    let second = rustix::param::clock_ticks_per_second();
    assert_eq!(daemon.cpu().unwrap(), Duration::from_nanos(30 * 1_000_000_000 / second));
    root.write("proc/37/schedstat", "308860 1140917 2\n");
    assert_eq!(daemon.cpu().unwrap(), Duration::from_nanos(308_860));
    root.write("proc/37/schedstat", "soon\n");
    let error = daemon.cpu().unwrap_err().to_string();
    assert!(error.contains("37/schedstat has no nanoseconds run"), "{error}");
}

#[test]
fn counters_name_the_file_that_is_wrong() {
    let root = Root::new();
    for (name, text) in [
        ("pages_shared", "11"),
        ("pages_sharing", "22"),
        ("pages_unshared", "33"),
        ("full_scans", "4"),
        ("general_profit", "-128"),
    ] {
        root.write(&format!("sys/kernel/mm/ksm/{name}"), &format!("{text}\n"));
    }
    let counters = Counters::read(&root.paths()).unwrap();
    assert_eq!((counters.pages_shared, counters.pages_sharing, counters.pages_unshared), (11, 22, 33));
    assert_eq!((counters.full_scans, counters.general_profit, counters.pages_scanned), (4, Some(-128), None));
    root.write("sys/kernel/mm/ksm/pages_sharing", "many\n");
    let error = Counters::read(&root.paths()).unwrap_err().to_string();
    assert!(error.contains("ksm/pages_sharing has no number"), "{error}");
}

#[test]
fn a_process_s_counters_are_read_by_name() {
    let text = "ksm_rmap_items 4096\nksm_zero_pages 3\nksm_merging_pages 4000\nksm_process_profit -262144\n\
                ksm_mergeable: yes\n";
    let stat = ProcessStat::parse(text, Path::new("ksm_stat")).unwrap();
    assert_eq!((stat.rmap_items, stat.zero_pages, stat.merging_pages, stat.process_profit), (4096, 3, 4000, -262_144));
    assert_eq!(stat.records(4096), 4003 * 4096 + 262_144);
    let error = ProcessStat::parse("ksm_rmap_items 1\nksm_process_profit 0\n", Path::new("ksm_stat")).unwrap_err();
    assert!(matches!(error, DaemonError::Text { what: "ksm_merging_pages", .. }), "{error}");
}

/// As Linux 6.18 tells it, of a marked region in part merged, between a program's text and the system call page.
const SMAPS: &str = "\
563d98d35000-563d98d3b000 r-xp 00002000 fe:00 247282                     /usr/bin/head
Size:                 24 kB
KernelPageSize:        4 kB
Rss:                  24 kB
Pss:                  24 kB
Private_Clean:        24 kB
Anonymous:             0 kB
KSM:                   0 kB
THPeligible:           0
VmFlags: rd ex mr mw me 
7f0000000000-7f0000010000 rw-p 00000000 00:00 0 
Size:                 64 kB
KernelPageSize:        4 kB
MMUPageSize:           4 kB
Rss:                  48 kB
Pss:                  30 kB
Pss_Dirty:            30 kB
Shared_Clean:          4 kB
Shared_Dirty:         24 kB
Private_Clean:         8 kB
Private_Dirty:        12 kB
Referenced:           48 kB
Anonymous:            44 kB
KSM:                  28 kB
LazyFree:              0 kB
Swap:                 16 kB
SwapPss:              16 kB
THPeligible:           0
VmFlags: rd wr mr mw me nr mg 
7f0000010000-7f0000020000 rw-p 00000000 00:00 0 
Size:                 64 kB
Rss:                   4 kB
Pss:                   4 kB
Private_Dirty:         4 kB
Anonymous:             4 kB
KSM:                   0 kB
VmFlags: rd wr mr mw me nr 
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Size:                  4 kB
Rss:                   0 kB
VmFlags: ex 
";

const KIB: u64 = 1024;

#[test]
fn only_mappings_inside_the_ranges_are_summed() {
    let first = Sums {
        mappings: 1,
        size: 64 * KIB,
        rss: 48 * KIB,
        pss: 30 * KIB,
        shared_clean: 4 * KIB,
        shared_dirty: 24 * KIB,
        private_clean: 8 * KIB,
        private_dirty: 12 * KIB,
        anonymous: 44 * KIB,
        ksm: Some(28 * KIB),
        swap: 16 * KIB,
        mergeable: 64 * KIB,
    };
    let of = |ranges: &[HvaRange]| Sums::parse(SMAPS.as_bytes(), ranges).unwrap();
    assert_eq!(of(&[range(0x7f00_0000_0000, 0x7f00_0001_0000)]), first);
    assert_eq!(of(&[range(0x7eff_ffff_0000, 0x7f00_0001_0000)]), first, "a hole in a range is no mapping");
    let both = Sums {
        mappings: 2,
        size: 128 * KIB,
        rss: 52 * KIB,
        pss: 34 * KIB,
        private_dirty: 16 * KIB,
        anonymous: 48 * KIB,
        ..first
    };
    let halves = [range(0x7f00_0001_0000, 0x7f00_0002_0000), range(0x7f00_0000_0000, 0x7f00_0001_0000)];
    assert_eq!(of(&halves), both);
    assert_eq!(of(&[halves[0], halves[1], halves[1]]), both, "a range that is given twice counts once");
    let none = Sums { ksm: Some(0), ..Sums::default() };
    assert_eq!(of(&[range(0x1000, 0x2000)]), none);
    assert_eq!(of(&[]), none);
    assert_eq!(of(&[range(0, u64::MAX)]).ksm, None, "one mapping does not tell");
}

#[test]
fn a_mapping_across_an_edge_is_an_error() {
    let mapping = range(0x7f00_0000_0000, 0x7f00_0001_0000);
    for cut in [range(0x7f00_0000_0000, 0x7f00_0000_f000), range(0x7f00_0000_1000, 0x7f00_0001_0000)] {
        let error = Sums::parse(SMAPS.as_bytes(), &[cut]).unwrap_err();
        assert!(
            matches!(error, SmapsError::AcrossEdge { mapping: m, range: r } if (m, r) == (mapping, cut)),
            "{error}"
        );
    }
    // Ranges that touch are one: no edge.
    let touching = [range(0x7f00_0000_0000, 0x7f00_0000_8000), range(0x7f00_0000_8000, 0x7f00_0001_0000)];
    assert_eq!(Sums::parse(SMAPS.as_bytes(), &touching).unwrap().mappings, 1);
}

#[test]
fn lines_that_make_no_sense_and_sums_beyond_64_bits_are_errors() {
    let all = [range(0, u64::MAX)];
    let error = |text: &str| Sums::parse(text.as_bytes(), &all).unwrap_err();
    assert!(matches!(error("Rss: 4 kB\n"), SmapsError::Line { number: 1, .. }));
    assert!(matches!(error("1000-2000 rw-p\nRss: four kB\n"), SmapsError::Line { number: 2, .. }));
    assert!(matches!(error("1000-2000 rw-p\nRss: 4\n"), SmapsError::Line { number: 2, .. }));
    assert!(matches!(error("2000-1000 rw-p\n"), SmapsError::Line { number: 1, .. }));
    assert!(matches!(error("\n"), SmapsError::Line { number: 1, .. }));
    assert!(matches!(error("1000-2000 rw-p\nRss: 18014398509481984 kB\n"), SmapsError::Line { number: 2, .. }));
    let most = "Rss: 18014398509481983 kB\n";
    let two = format!("1000-2000 rw-p\n{most}2000-3000 rw-p\n{most}");
    assert!(matches!(error(&two), SmapsError::Overflow { field: "Rss", number: 4 }));
}

#[test]
fn sixty_thousand_mappings_are_summed() {
    let mut text = String::new();
    for i in 1..=60_000_u64 {
        let start = i * 2 * PAGE;
        text +=
            &format!("{start:x}-{:x} rw-p 00000000 00:00 0 \nRss: 4 kB\nPss: 2 kB\nVmFlags: rd mg \n", start + PAGE);
    }
    let sums = Sums::parse(text.as_bytes(), &[range(0, 40_000 * 2 * PAGE)]).unwrap();
    let expected = (39_999, 39_999 * PAGE, 39_999 * PAGE / 2, 39_999 * PAGE);
    assert_eq!((sums.mappings, sums.rss, sums.pss, sums.mergeable), expected);
}

/// One at a time: memory that another test maps beside it would become the same mapping, and KSM is one for all.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
}

fn private(len: u64) -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len as usize)]).unwrap()
}

/// What this host lacks for a real run; it is said in one line.
fn lacking() -> bool {
    let why = if !Path::new("/sys/kernel/mm/ksm/run").exists() {
        "no /sys/kernel/mm/ksm"
    } else if !rustix::process::geteuid().is_root() {
        "not root"
    } else {
        return false;
    };
    println!("not tested here: {why}");
    true
}

#[test]
fn the_mark_is_read_back() {
    let _alone = alone();
    let paths = Paths::system();
    if !paths.sysfs.exists() {
        return println!("not tested here: no /sys/kernel/mm/ksm");
    }
    let memory = private(MIB);
    let ranges = host_ranges(&memory).unwrap();
    mark(&paths, &ranges).unwrap();
    assert_eq!(Sums::of(&paths, &ranges).unwrap().mergeable, MIB);
    // Unmarked, it may have become one mapping with memory beside it.
    match unmark(&paths, &ranges) {
        Ok(sums) => assert_eq!((sums.size, sums.mergeable), (MIB, 0)),
        Err(error) => {
            assert!(matches!(error, MergeableError::Flags(SmapsError::AcrossEdge { .. })), "{error}");
        }
    }
}

#[test]
fn a_mark_the_kernel_ignores_is_an_error() {
    let _alone = alone();
    let paths = Paths::system();
    if !paths.sysfs.exists() {
        return println!("not tested here: no /sys/kernel/mm/ksm");
    }
    let file = fs::File::from(rustix::fs::memfd_create("shared", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(MIB).unwrap();
    let backed = [(GuestAddress(0), MIB as usize, Some(FileOffset::new(file, 0)))];
    let memory = GuestMemoryMmap::<()>::from_ranges_with_files(backed).unwrap();
    let ranges = host_ranges(&memory).unwrap();
    let error = mark(&paths, &ranges).unwrap_err();
    assert!(matches!(error, MergeableError::Ignored { mapping } if ranges[0] == mapping), "{error}");
}

#[test]
fn parts_of_pages_and_memory_that_is_not_there_are_not_marked() {
    let _alone = alone();
    let paths = Paths::system();
    let error = mark(&paths, &[range(0x1000, 0x1001)]).unwrap_err();
    assert!(matches!(error, MergeableError::Unaligned { .. }), "{error}");
    // Below what a process may map.
    let error = mark(&paths, &[range(0x1000, 0x2000)]).unwrap_err();
    assert!(matches!(error, MergeableError::Refused { .. }), "{error}");
}

/// What page `page` of the pairs holds.
fn contents(page: u64) -> Vec<u8> {
    let mut state = page / 2 + 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state.to_le_bytes()
    });
    words.collect()
}

fn pairs(pages: u64) -> GuestMemoryMmap<()> {
    let memory = private(pages * PAGE);
    for page in 0..pages {
        memory.write_slice(&contents(page), GuestAddress(page * PAGE)).unwrap();
    }
    memory
}

/// Pages of the real run.
const PAIRED: u64 = 16 * MIB / PAGE;

#[test]
fn a_real_run_merges_the_pairs_and_leaves_the_settings_as_they_were() {
    let _alone = alone();
    if lacking() {
        return;
    }
    let paths = Paths::system();
    restore_left_over(&paths).unwrap();
    let before = settings(&paths);
    let memory = pairs(PAIRED);
    let ranges = host_ranges(&memory).unwrap();

    let plan = Plan { target: Some(PAIRED), ..Plan::eager() };
    let run = merge_with_ksm(&paths, &ranges, &plan, &AtomicBool::new(false)).unwrap();
    assert_eq!((run.ended, run.merged_pages), (Ended::Target, PAIRED));
    assert_eq!(run.frames.map(|frames| frames.map(|f| f.distinct)), Some([PAIRED, PAIRED / 2]));
    assert_eq!(run.returned(), (PAIRED / 2 * PAGE) as i64);
    assert_eq!(run.mappings.map(|sums| (sums.ksm, sums.mergeable)), [(Some(0), 16 * MIB), (Some(16 * MIB), 16 * MIB)]);
    assert_eq!(run.mappings.map(|sums| sums.pss), [16 * MIB, 8 * MIB]);
    assert!(run.ksmd_cpu > Duration::ZERO && run.at_95_percent().is_some_and(|at| at.at <= run.wall), "{run:?}");
    assert_eq!(settings(&paths), before);
    assert!(!paths.record.exists());
    let mut page_now = vec![0; PAGE as usize];
    for page in 0..PAIRED {
        memory.read_slice(&mut page_now, GuestAddress(page * PAGE)).unwrap();
        assert!(page_now == contents(page), "page {page} does not hold what it held");
    }

    match unmark(&paths, &ranges) {
        Ok(_) | Err(MergeableError::Flags(SmapsError::AcrossEdge { .. })) => {}
        Err(error) => panic!("{error}"),
    }
    assert_eq!(Frames::of(&paths, &ranges).unwrap().distinct, PAIRED);
}

/// Lets KSM look until it has dropped what it knows of memory that is gone: with `run` 0 it never does.
fn forget(paths: &Paths) {
    let mut saved = Saved::take(paths).unwrap();
    saved.set(Setting::AdvisorMode, "none").unwrap();
    saved.set(Setting::PagesToScan, 20_000).unwrap();
    saved.set(Setting::SleepMillisecs, 1).unwrap();
    saved.set(Setting::Run, 1).unwrap();
    for _ in 0..300 {
        if Counters::read(paths).unwrap().pages_shared == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    saved.restore().unwrap();
}

#[test]
fn a_setting_that_merged_pages_refuse_is_put_back_all_the_same() {
    let _alone = alone();
    if lacking() {
        return;
    }
    let paths = Paths::system();
    restore_left_over(&paths).unwrap();
    let before = settings(&paths);
    forget(&paths);
    if Counters::read(&paths).unwrap().pages_shared != 0 {
        return println!("not tested here: others have merged pages");
    }
    let memory = pairs(512);
    let ranges = host_ranges(&memory).unwrap();
    mark(&paths, &ranges).unwrap();
    let mut saved = Saved::take(&paths).unwrap();
    saved.set(Setting::MaxPageSharing, 300).unwrap();
    saved.set(Setting::AdvisorMode, "none").unwrap();
    saved.set(Setting::PagesToScan, 20_000).unwrap();
    saved.set(Setting::SleepMillisecs, 0).unwrap();
    saved.set(Setting::Run, 1).unwrap();
    let scans = Counters::read(&paths).unwrap().full_scans;
    loop {
        let now = Counters::read(&paths).unwrap();
        if now.pages_shared >= 256 {
            break;
        }
        assert!(now.full_scans < scans + 100, "a hundred scans merge no pairs: {now:?}");
        std::thread::yield_now();
    }
    let refused = saved.set(Setting::MaxPageSharing, 301);
    assert!(matches!(&refused, Err(SettingsError::Refused(r)) if r.is == "300"), "{refused:?}");
    saved.restore().unwrap();
    assert_eq!(settings(&paths), before);
}

#[test]
fn pages_that_were_merged_in_memory_now_gone_are_not_counted() {
    let _alone = alone();
    if lacking() {
        return;
    }
    let paths = Paths::system();
    restore_left_over(&paths).unwrap();
    // Until it is scanned again, KSM takes the second memory for the first: the kernel maps it at the same addresses.
    for _ in 0..2 {
        let memory = pairs(512);
        let ranges = host_ranges(&memory).unwrap();
        let run = merge_with_ksm(&paths, &ranges, &Plan::eager(), &AtomicBool::new(false)).unwrap();
        assert_eq!((run.ended, run.merged_pages, run.returned()), (Ended::Quiet, 512, (256 * PAGE) as i64));
        assert_eq!(run.samples[0].merged, 0);
    }
    // Nor while it runs: at a page a second it has not come far.
    let memory = pairs(512);
    let plan = Plan { pages_to_scan: 1, sleep: Duration::from_secs(1), ..Plan::eager() };
    let run = merge_with_ksm(&paths, &host_ranges(&memory).unwrap(), &plan, &AtomicBool::new(true)).unwrap();
    assert!(run.process[0].merging_pages >= 512, "KSM forgot the earlier memory: {:?}", run.process);
    assert!(run.samples.iter().all(|sample| sample.merged < 256), "{:?}", run.samples);
}

#[test]
fn an_interrupted_run_says_so_and_leaves_the_settings_as_they_were() {
    let _alone = alone();
    if lacking() {
        return;
    }
    let paths = Paths::system();
    restore_left_over(&paths).unwrap();
    let before = settings(&paths);
    let memory = pairs(64);
    let plan = Plan { target: Some(1 << 40), ..Plan::kind() };
    let run = merge_with_ksm(&paths, &host_ranges(&memory).unwrap(), &plan, &AtomicBool::new(true)).unwrap();
    assert_eq!(run.ended, Ended::Interrupted);
    assert!(run.at_95_percent().is_none());
    assert_eq!(settings(&paths), before);
}
