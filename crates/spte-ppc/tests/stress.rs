// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Radix trees under stress: they have no claim bit, break before they make, and read facts again after a flush. What runs,
//! what is compared and which variables say how long is `spte-stress`'s to say.

use spte_ppc::{BasePage, Radix, RadixOptions};
use spte_stress::{Config, Sabotage, found, holds, join};

/// The runs that share the time there is.
const RUNS: u32 = 3;

fn radix() -> Radix {
    Radix::new(RadixOptions { page: BasePage::K4, ..RadixOptions::default() }).unwrap()
}

fn config() -> Config {
    Config::new(RUNS, |space| join(space, radix(), None), |space| join(space, radix(), None))
}

#[test]
fn radix_trees() {
    holds("radix", config());
}

#[test]
fn radix_trees_and_failing_flushes() {
    let config = Config {
        primary: |space| join(space, radix(), Some(499)),
        secondary: |space| join(space, radix(), Some(251)),
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
    found("copy before the window", Config { sabotage: Sabotage::CopyBeforeWindow, ..config() });
}
