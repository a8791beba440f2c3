// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! GPA tables under stress: they have no claim bit, no leaves of 2M, and sentinels in their directories. What runs, what is
//! compared and which variables say how long is `spte-stress`'s to say.

use spte_mips::{BigEndian, ByteOrder, GpaOptions, GpaTable, LittleEndian, Width};
use spte_stress::{Config, Sabotage, found, holds, join};

/// The runs that share the time there is.
const RUNS: u32 = 2;

fn gpa<O: ByteOrder>() -> GpaTable<O> {
    GpaTable::new(GpaOptions { width: Width::Wide, ..GpaOptions::default() }).unwrap()
}

fn config() -> Config {
    let config = Config::new(
        RUNS,
        |space| join(space, gpa::<BigEndian>(), None),
        |space| join(space, gpa::<LittleEndian>(), None),
    );
    Config { large_leaves: false, ..config }
}

/// With the collector that all spaces share.
#[test]
fn both_byte_orders() {
    holds("gpa", Config { private_reclaim: false, ..config() });
}

#[test]
fn failing_flushes() {
    let config = Config {
        primary: |space| join(space, gpa::<BigEndian>(), Some(499)),
        secondary: |space| join(space, gpa::<BigEndian>(), Some(251)),
        ..config()
    };
    holds("gpa, failing flushes", config);
}

#[test]
fn a_page_compared_before_the_window_is_caught() {
    found("copy before the window", Config { sabotage: Sabotage::CopyBeforeWindow, ..config() });
}
