// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The library alone, under stress: threads that fault, repoint, zap, age, split, collapse, harvest, replace slots, join
//! and leave, all at once, and every read checked against the truth.
//!
//! The machine is made up (`stress/host.rs`): frames with a tag that says whose contents they hold, a mapping of guest
//! pages to frames that changes only inside windows, and a ledger of all writes that no translation has a part in. A frame
//! whose window has promised that nobody translates to it is poisoned at once and soon used for another page. So a
//! translation that is stale for a moment reads a wrong tag or writes a frame of somebody else, and a write that comes
//! between a comparison and its `change_pte` is missing from the copy. Several times a second all threads rest, and
//! everything is compared: frames with the ledger, every leaf with the mapping, what a migration copied with what there is,
//! table pages with what can be reached.
//!
//! What the threads do is in `stress/work.rs` and its neighbours; a run counts it (`stress/activity.rs`) and goes on until each kind has
//! happened. That the checks can fail is a test too: in each of the tests named `.._is_caught` the test itself breaks one
//! rule of the library's contract.
//!
//! | variable | meaning | unless set |
//! |---|---|---|
//! | `SPTE_STRESS_SECONDS` | how long the runs take, together | 3 |
//! | `SPTE_STRESS_SEED` | the seed of all choices; the schedule is the machine's | from the clock |
#![allow(unreachable_pub, missing_debug_implementations, reason = "modules of one test")]

#[path = "stress/activity.rs"]
mod activity;
#[path = "stress/guest.rs"]
mod guest;
#[path = "stress/host.rs"]
mod host;
#[path = "stress/members.rs"]
mod members;
#[path = "stress/random.rs"]
mod random;
#[path = "stress/run.rs"]
mod run;
#[path = "stress/tables.rs"]
mod tables;
#[path = "stress/windows.rs"]
mod windows;
#[path = "stress/work.rs"]
mod work;

use std::{
    sync::Mutex,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use run::{Config, Sabotage};
use spte_x86::{AccessedDirty, Ept, EptOptions, LongMode, LongModeOptions, Npt};

/// One run at a time: the threads of one are more than most machines have processors.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The runs that share the time there is.
const RUNS: u32 = 3;

fn seconds() -> f64 {
    std::env::var("SPTE_STRESS_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(3.0)
}

fn seed() -> u64 {
    let set = std::env::var("SPTE_STRESS_SEED").ok().and_then(|text| match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    });
    set.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64))
}

fn ept(accessed_dirty: AccessedDirty) -> Ept {
    Ept::new(EptOptions { accessed_dirty, ..EptOptions::default() }).unwrap()
}

fn long_mode() -> LongMode {
    LongMode::new(LongModeOptions::default()).unwrap()
}

fn npt() -> Npt {
    Npt::new(LongModeOptions::default()).unwrap()
}

fn config() -> Config {
    Config {
        primary: |space| tables::join(space, ept(AccessedDirty::Enabled), None).unwrap(),
        secondary: |space| tables::join(space, npt(), None),
        private_reclaim: true,
        ages_by_rights: false,
        large_leaves: true,
        sabotage: Sabotage::None,
        seed: seed(),
        duration: Duration::from_secs_f64(seconds()) / RUNS,
    }
}

fn holds(name: &str, config: Config) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Err(what) = run::run(name, config) {
        panic!("{name}: {what}");
    }
}

/// The run must find out what the test does wrong, by one of the checks that are there for it.
fn is_caught(name: &str, sabotage: Sabotage, by: &[&str]) {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let what = run::run(name, Config { sabotage, duration: Duration::from_secs(20), ..config() });
    let what = what.expect_err("nothing was noticed");
    println!("stress: {name}: caught: {what}");
    assert!(by.iter().any(|word| what.contains(word)), "{what}");
}

#[test]
fn ept_with_npt_coming_and_going() {
    holds("ept, npt", config());
}

/// Ageing takes rights away, writing is dirty; and flushes fail.
#[test]
fn ept_without_dirty_bits_and_with_failing_flushes() {
    let config = Config {
        primary: |space| tables::join(space, ept(AccessedDirty::Disabled), Some(499)).unwrap(),
        secondary: |space| tables::join(space, ept(AccessedDirty::WriteProtectOnly), Some(251)),
        ages_by_rights: true,
        ..config()
    };
    holds("ept without dirty bits", config);
}

/// With the collector that all spaces share.
#[test]
fn long_mode_with_ept_coming_and_going() {
    let config = Config {
        primary: |space| tables::join(space, long_mode(), None).unwrap(),
        secondary: |space| tables::join(space, ept(AccessedDirty::Enabled), None),
        private_reclaim: false,
        ..config()
    };
    holds("long mode, ept", config);
}

#[test]
fn a_frame_freed_before_the_window_is_caught() {
    is_caught(
        "free before the window",
        Sabotage::FreeBeforeWindow,
        &["stale", "was written", "holds", "page", "is mapped to"],
    );
}

#[test]
fn a_page_compared_before_the_window_is_caught() {
    is_caught("copy before the window", Sabotage::CopyBeforeWindow, &["lost", "holds", "was written"]);
}

#[test]
fn a_lookup_before_the_snapshot_is_caught() {
    is_caught("resolve before the snapshot", Sabotage::ResolveBeforeSnapshot, &["stale", "translates", "is mapped to"]);
}

#[test]
fn a_forgotten_fact_is_caught() {
    is_caught("forget the sink", Sabotage::ForgetSink, &["never reported"]);
}

#[test]
fn a_frame_freed_under_a_lease_is_caught() {
    is_caught(
        "free under a lease",
        Sabotage::FreeUnderLease,
        &["stale", "was written", "holds", "page", "is mapped to"],
    );
}
