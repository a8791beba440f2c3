// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The checks of the `protocol` target can fail: something is wrong on purpose, and is found out by the check that it is for.

use std::panic::{AssertUnwindSafe, catch_unwind, set_hook};

use secondary_mmu_fuzz::{
    bytes::noise,
    protocol::{self, Plant},
};

/// How many inputs there are to find it with.
const INPUTS: u64 = 1500;
/// Bytes of one.
const LEN: usize = 768;

/// A part of what the check says.
fn says(plant: Plant) -> &'static str {
    match plant {
        Plant::None => "",
        Plant::KeepsZapped => "I5: ",
        Plant::KeepsWrite | Plant::KeepsUpgrade => "I6: ",
        Plant::KeepsUnsettled => "I8: ",
        Plant::ChangeCreates => "I7: ",
        Plant::ChangeLies => "still translates",
        Plant::InstallsUnchecked => "I4: ",
        Plant::EndTwice => "without a start",
        Plant::EndMissing => "was not told",
        Plant::EndsInOrder => "before who was started after it",
        Plant::ChangeMovesSequence => "I3: ",
        Plant::CountFalls => "I1: ",
        Plant::RetryElsewhere => "is populated",
        Plant::FaultGoesOn => "I1: ",
        Plant::RefusalChanges => "I10: ",
    }
}

/// What the check said, where one failed.
fn complaint(n: u64, plant: Plant) -> Option<String> {
    let payload = catch_unwind(AssertUnwindSafe(|| protocol::run_with(&noise(n, LEN), plant))).err()?;
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned())).or(Some(String::new()))
}

#[test]
fn every_plant_is_found_out_by_the_check_it_is_for_and_nothing_is_found_without() {
    for n in 0..INPUTS / 4 {
        println!("input {n}");
        protocol::run(&noise(n, LEN));
    }
    set_hook(Box::new(|_| {}));
    let mut missed = Vec::new();
    for plant in Plant::ALL {
        let found = (0..INPUTS).find(|&n| complaint(n, plant).is_some_and(|said| said.contains(says(plant))));
        match found {
            Some(n) => println!("{plant:?}: input {n}"),
            None => missed.push(plant),
        }
    }
    let _ = std::panic::take_hook();
    assert_eq!(missed, [], "after {INPUTS} inputs each");
}
