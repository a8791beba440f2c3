// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage-2 tables under stress, which break before they make. What runs, what is compared and which variables say how long
//! is `spte-stress`'s to say.

use spte_arm64::{AccessedDirty, BreakLevel, Stage2, Stage2Options};
use spte_stress::{Config, Sabotage, found, holds, join};

/// The runs that share the time there is.
const RUNS: u32 = 3;

fn stage2(accessed_dirty: AccessedDirty, break_level: BreakLevel) -> Stage2 {
    Stage2::new(Stage2Options { ipa_bits: 48, accessed_dirty, break_level, ..Stage2Options::default() }).unwrap()
}

fn config() -> Config {
    Config::new(
        RUNS,
        |space| join(space, stage2(AccessedDirty::Hardware, BreakLevel::Level0), None),
        |space| join(space, stage2(AccessedDirty::HardwareAccessed, BreakLevel::Level0), None),
    )
}

#[test]
fn hardware_facts_and_breaks() {
    holds("stage 2, hardware", config());
}

#[test]
fn software_facts_breaks_and_failing_flushes() {
    let config = Config {
        primary: |space| join(space, stage2(AccessedDirty::Software, BreakLevel::Level0), Some(499)),
        secondary: |space| join(space, stage2(AccessedDirty::Hardware, BreakLevel::Level2), Some(251)),
        ..config()
    };
    holds("stage 2, software", config);
}

#[test]
fn sizes_that_change_in_place() {
    let config = Config {
        primary: |space| join(space, stage2(AccessedDirty::Hardware, BreakLevel::Level2), None),
        secondary: |space| join(space, stage2(AccessedDirty::Software, BreakLevel::Level2), None),
        private_reclaim: false,
        ..config()
    };
    holds("stage 2, in place", config);
}

#[test]
fn a_page_compared_before_the_window_is_caught() {
    found("copy before the window", Config { sabotage: Sabotage::CopyBeforeWindow, ..config() });
}
