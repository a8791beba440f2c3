// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a run is made of, and how a test has it run.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use notifier_core::{JoinError, Space};

use crate::{run::run, tables::Member};

/// Makes a table and joins it to the run's space: see [`join`](crate::join).
pub type Join = fn(&Space) -> Result<Member, JoinError>;

/// What the machine does wrong on purpose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sabotage {
    /// Nothing.
    None,
    /// Frames are freed before the window is opened.
    FreeBeforeWindow,
    /// Pages are copied before the Retained window is opened.
    CopyBeforeWindow,
    /// The host is asked before the fault takes its snapshot.
    ResolveBeforeSnapshot,
    /// What windows report to the sink is forgotten.
    ForgetSink,
    /// A frame is freed while its lease lives.
    FreeUnderLease,
}

impl Sabotage {
    /// Words of the checks that are there for it: one of them has to be in what is found.
    fn words(self) -> &'static [&'static str] {
        match self {
            Self::None => &[],
            Self::FreeBeforeWindow | Self::FreeUnderLease => &["stale", "was written", "holds", "page", "is mapped to"],
            Self::CopyBeforeWindow => &["lost", "holds", "was written"],
            Self::ResolveBeforeSnapshot => &["stale", "translates", "is mapped to"],
            Self::ForgetSink => &["never reported"],
        }
    }
}

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub struct Config {
    /// The table that is there from the beginning to the end.
    pub primary: Join,
    /// The table that joins and leaves all the time.
    pub secondary: Join,
    /// A collector of the space's own: then pages are counted at each rest, not only at the end.
    pub private_reclaim: bool,
    /// In the primary format ageing takes rights away, and giving them back has to happen.
    pub ages_by_rights: bool,
    /// The tables have leaves of 2M, which have to be used and made of smaller ones.
    pub large_leaves: bool,
    /// What is done wrong.
    pub sabotage: Sabotage,
    /// Of all choices.
    pub seed: u64,
    /// How long the run takes, unless something has not happened yet: then it may take half a minute longer.
    pub duration: Duration,
}

impl Config {
    /// These tables, with leaves of 2M, ageing that keeps the rights and a collector of the space's own; nothing is done
    /// wrong. One of so many `runs` that take [`seconds`] together, from [`seed`].
    pub fn new(runs: u32, primary: Join, secondary: Join) -> Self {
        Self {
            primary,
            secondary,
            private_reclaim: true,
            ages_by_rights: false,
            large_leaves: true,
            sabotage: Sabotage::None,
            seed: seed(),
            duration: Duration::from_secs_f64(seconds()) / runs.max(1),
        }
    }
}

/// One run at a time: the threads of one are more than most machines have processors.
fn one_at_a_time() -> MutexGuard<'static, ()> {
    static RUNNING: Mutex<()> = Mutex::new(());
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs; the tests of one program one after the other.
///
/// # Panics
/// Where something was wrong, with what it was and the seed; and where something never happened that a run is to try.
#[track_caller]
pub fn holds(name: &str, config: Config) {
    let _one = one_at_a_time();
    if let Err(what) = run(name, config) {
        panic!("{name}: {what}");
    }
}

/// How long a run with a sabotage may take until it is noticed.
const NOTICED_WITHIN: Duration = Duration::from_secs(20);

/// Runs until what `config.sabotage` does wrong is noticed, for 20 seconds at most; what was noticed. `config.duration` is
/// not looked at.
///
/// # Panics
/// Where nothing was noticed, or by none of the checks that are there for this sabotage.
#[track_caller]
pub fn found(name: &str, config: Config) -> String {
    let _one = one_at_a_time();
    let Err(what) = run(name, Config { duration: NOTICED_WITHIN, ..config }) else {
        panic!("{name}: nothing was noticed");
    };
    println!("stress: {name}: caught: {what}");
    assert!(config.sabotage.words().iter().any(|word| what.contains(word)), "{name}: {what}");
    what
}

/// `SPTE_STRESS_SECONDS`, or 3: how long the runs of a test take, together.
pub fn seconds() -> f64 {
    let set = std::env::var("SPTE_STRESS_SECONDS").ok().and_then(|text| text.parse().ok());
    set.filter(|seconds: &f64| seconds.is_finite() && *seconds >= 0.0).unwrap_or(3.0)
}

/// `SPTE_STRESS_SEED`, or a number from the clock.
pub fn seed() -> u64 {
    let set = std::env::var("SPTE_STRESS_SEED").ok().and_then(|text| number(&text));
    set.unwrap_or_else(|| SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_nanos() as u64))
}

/// Decimal, or hexadecimal as runs print it.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16).ok(),
        None => text.parse().ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_are_read_as_they_are_printed() {
        let seed = 0x18ae_dbf0_1234_5678;
        assert_eq!(number(&format!("{seed:#x}")), Some(seed));
        assert_eq!((number("7"), number("0x7"), number("7x"), number("")), (Some(7), Some(7), None, None));
    }
}
