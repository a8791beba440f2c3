// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What tests of every machine begin with.
//!
//! `CONFORMANCE_TOOLS` is a folder in which packages were unpacked. Where a program is missing a test says so and passes, unless
//! `CONFORMANCE_REQUIRE` is set.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::emulator::{Lost, Tools};

/// Keeps the other tests of this process out: a stub spins on a processor, and a test on another, and there may be two.
pub fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Programs of the folder `CONFORMANCE_TOOLS`, or else of PATH.
pub fn tools() -> Tools {
    Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into))
}

/// Whether a machine that could be had has to be there.
pub fn required() -> bool {
    std::env::var_os("CONFORMANCE_REQUIRE").is_some()
}

/// A machine that was started, or none where it is passed over: standard error is told, once for each reason.
///
/// # Panics
/// Where the machine should be here and is not.
pub fn started<M>(name: &str, machine: Result<M, Lost>) -> Option<M> {
    static SAID: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let lost = match machine {
        Ok(machine) => return Some(machine),
        Err(lost) => lost,
    };
    assert!(lost.passes_over(required()), "{name}: {lost}");
    if SAID.lock().unwrap_or_else(PoisonError::into_inner).insert(lost.to_string()) {
        // The harness keeps what is printed by tests that pass; this goes past it. Who reads no errors needs none.
        let _ = writeln!(io::stderr(), "not tested: {name} and what needs the same: {lost}");
    }
    None
}
