// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! x86 tables under stress. What runs, what is compared and which variables say how long is `spte-stress`'s to say.

use spte_stress::{Config, Sabotage, found, holds, join};
use spte_x86::{AccessedDirty, Ept, EptOptions, LongMode, LongModeOptions, Npt};

/// The runs that share the time there is.
const RUNS: u32 = 3;

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
    Config::new(RUNS, |space| join(space, ept(AccessedDirty::Enabled), None), |space| join(space, npt(), None))
}

fn is_caught(name: &str, sabotage: Sabotage) {
    found(name, Config { sabotage, ..config() });
}

#[test]
fn ept_with_npt_coming_and_going() {
    holds("ept, npt", config());
}

/// Ageing takes rights away, writing is dirty; and flushes fail.
#[test]
fn ept_without_dirty_bits_and_with_failing_flushes() {
    let config = Config {
        primary: |space| join(space, ept(AccessedDirty::Disabled), Some(499)),
        secondary: |space| join(space, ept(AccessedDirty::WriteProtectOnly), Some(251)),
        ages_by_rights: true,
        ..config()
    };
    holds("ept without dirty bits", config);
}

/// With the collector that all spaces share.
#[test]
fn long_mode_with_ept_coming_and_going() {
    let config = Config {
        primary: |space| join(space, long_mode(), None),
        secondary: |space| join(space, ept(AccessedDirty::Enabled), None),
        private_reclaim: false,
        ..config()
    };
    holds("long mode, ept", config);
}

#[test]
fn a_frame_freed_before_the_window_is_caught() {
    is_caught("free before the window", Sabotage::FreeBeforeWindow);
}

#[test]
fn a_page_compared_before_the_window_is_caught() {
    is_caught("copy before the window", Sabotage::CopyBeforeWindow);
}

#[test]
fn a_lookup_before_the_snapshot_is_caught() {
    is_caught("resolve before the snapshot", Sabotage::ResolveBeforeSnapshot);
}

#[test]
fn a_forgotten_fact_is_caught() {
    is_caught("forget the sink", Sabotage::ForgetSink);
}

#[test]
fn a_frame_freed_under_a_lease_is_caught() {
    is_caught("free under a lease", Sabotage::FreeUnderLease);
}
