// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The protocol: any sequence of windows, faults, scopes, leases, members and slots on one space.
//!
//! One thread takes turns with many objects that are open at the same time: windows of both modes over host and guest
//! bytes (also half pages), closed, dropped, left to the reaper or leaked; faults between snapshot, resolution and
//! installation; leases; members that join, fail in every callback, and leave; slots that alias, go and come; another
//! thread's scope. What the host's memory is meant to be is kept by an account of its own ([`truth`]), which shares no code with
//! `notifier-core`. After each operation it is asked:
//!
//! | | what has to hold |
//! |---|---|
//! | I1 | the count is the number of windows that are open or could not be finished; faults and leases over them are refused |
//! | I2 | count and sequence together are the number of windows ever recorded, at each end the count still has the window |
//! | I3 | `change_pte` moves neither |
//! | I4 | nobody gains a translation or a right where a window is open |
//! | I5 | nobody translates a byte of a Zapped window; every translation anywhere is to what is there now |
//! | I6 | nobody can write, or be upgraded to, in a Retained window |
//! | I7 | `change_pte` makes no translation, and its report is what happened |
//! | I8 | what had no outcome is translated by nobody after the window |
//! | I10 | what failed changed nothing it did not say; ends are given to exactly those who were started, in reverse |
//! | I11 | a fault is lost if and only if a window over it was recorded since; none lost to a window elsewhere |
//!
//! That these can fail is tested with [`Plant`]: members and observations that are wrong on purpose.

mod members;
mod truth;
mod world;

/// Something that is wrong on purpose, so that the checks can be seen to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plant {
    /// Nothing.
    None,
    /// Members keep what a Zapped window was opened over.
    KeepsZapped,
    /// Members keep the write bit in a Retained window.
    KeepsWrite,
    /// Members keep the upgrade bit in a Retained window.
    KeepsUpgrade,
    /// Members do not zap what has no outcome.
    KeepsUnsettled,
    /// Members repoint what they do not have.
    ChangeCreates,
    /// Members say that they repointed, and did not.
    ChangeLies,
    /// Members install without a check.
    InstallsUnchecked,
    /// A member is told of an end twice.
    EndTwice,
    /// A member is not told of an end.
    EndMissing,
    /// Ends come in the order of starts.
    EndsInOrder,
    /// The sequence moves in `change_pte`.
    ChangeMovesSequence,
    /// The count falls while a window is open.
    CountFalls,
    /// A window elsewhere fails a fault.
    RetryElsewhere,
    /// A fault goes on although a window is over it.
    FaultGoesOn,
    /// A refused batch changes something.
    RefusalChanges,
}

impl Plant {
    /// All but [`Plant::None`].
    pub const ALL: [Plant; 15] = [
        Plant::KeepsZapped,
        Plant::KeepsWrite,
        Plant::KeepsUpgrade,
        Plant::KeepsUnsettled,
        Plant::ChangeCreates,
        Plant::ChangeLies,
        Plant::InstallsUnchecked,
        Plant::EndTwice,
        Plant::EndMissing,
        Plant::EndsInOrder,
        Plant::ChangeMovesSequence,
        Plant::CountFalls,
        Plant::RetryElsewhere,
        Plant::FaultGoesOn,
        Plant::RefusalChanges,
    ];
}

/// Runs one input.
pub fn run(data: &[u8]) {
    world::run(data, Plant::None);
}

/// Runs one input with something wrong. Panics where that is found out.
pub fn run_with(data: &[u8], plant: Plant) {
    world::run(data, plant);
}
