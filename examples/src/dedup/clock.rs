// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Processor time spent, by the host's clocks.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

fn read(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// What all threads of this process have spent.
pub(crate) fn process_cpu() -> Duration {
    read(ClockId::ProcessCPUTime)
}

/// What the calling thread has spent.
pub(crate) fn thread_cpu() -> Duration {
    read(ClockId::ThreadCPUTime)
}
