// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The library under stress with trees without a claim bit that break before they make, and read facts again after a flush: the machine, the threads and the checks are those of
//! `spte-x86`'s stress test (`crates/spte-x86/tests/stress`), which says what they are.
//!
//! | variable | meaning | unless set |
//! |---|---|---|
//! | `SPTE_STRESS_SECONDS` | how long the runs take, together | 3 |
//! | `SPTE_STRESS_SEED` | the seed of all choices; the schedule is the machine's | from the clock |
#![allow(unreachable_pub, missing_debug_implementations, dead_code, reason = "modules of one test")]

#[path = "../../spte-x86/tests/stress/activity.rs"]
mod activity;
#[path = "../../spte-x86/tests/stress/guest.rs"]
mod guest;
#[path = "../../spte-x86/tests/stress/host.rs"]
mod host;
#[path = "../../spte-x86/tests/stress/members.rs"]
mod members;
#[path = "../../spte-x86/tests/stress/random.rs"]
mod random;
#[path = "../../spte-x86/tests/stress/run.rs"]
mod run;
#[path = "../../spte-x86/tests/stress/tables.rs"]
mod tables;
#[path = "../../spte-x86/tests/stress/windows.rs"]
mod windows;
#[path = "../../spte-x86/tests/stress/work.rs"]
mod work;

use std::{
    sync::Mutex,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use run::{Config, Sabotage};
use spte_ppc::{BasePage, Radix, RadixOptions};

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

fn radix() -> Radix {
    Radix::new(RadixOptions { page: BasePage::K4, ..RadixOptions::default() }).unwrap()
}

fn config() -> Config {
    Config {
        primary: |space| tables::join(space, radix(), None).unwrap(),
        secondary: |space| tables::join(space, radix(), None),
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

#[test]
fn radix_trees() {
    holds("radix", config());
}

#[test]
fn radix_trees_and_failing_flushes() {
    let config = Config {
        primary: |space| tables::join(space, radix(), Some(499)).unwrap(),
        secondary: |space| tables::join(space, radix(), Some(251)),
        ..config()
    };
    holds("radix, failing flushes", config);
}

/// With the collector that all spaces share.
#[test]
fn radix_trees_and_a_shared_collector() {
    holds("radix, shared", Config { private_reclaim: false, ..config() });
}

#[test]
fn a_page_compared_before_the_window_is_caught() {
    let _one = ONE_AT_A_TIME.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let sabotage = Sabotage::CopyBeforeWindow;
    let what = run::run("copy before the window", Config { sabotage, duration: Duration::from_secs(20), ..config() });
    let what = what.expect_err("nothing was noticed");
    assert!(["lost", "holds", "was written"].iter().any(|word| what.contains(word)), "{what}");
}
