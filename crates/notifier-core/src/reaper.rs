// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The thread that finishes windows whose guards went away: owned guards, whose drop must not block, and guards whose
//! closing failed.

use std::{
    sync::Weak,
    thread::{Builder, Thread},
    time::Duration,
};

use crate::space::Inner;

/// Pause between two tries at a window that cannot be finished; doubled up to the greatest.
const FIRST_PAUSE: Duration = Duration::from_millis(1);
const LAST_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(crate) struct Reaper(Thread);

impl Reaper {
    /// `None` where no thread is to be had.
    pub(crate) fn spawn(inner: Weak<Inner>) -> Option<Self> {
        let run = move || {
            let mut pause = FIRST_PAUSE;
            loop {
                // The space is held only while there is something to do, so that it can go away.
                let Some(left) = inner.upgrade().map(|inner| inner.reap()) else { return };
                if left == 0 {
                    pause = FIRST_PAUSE;
                    std::thread::park();
                } else {
                    std::thread::park_timeout(pause);
                    pause = (pause * 2).min(LAST_PAUSE);
                }
            }
        };
        let handle = Builder::new().name("notifier-reaper".into()).spawn(run).ok()?;
        Some(Self(handle.thread().clone()))
    }

    pub(crate) fn wake(&self) {
        self.0.unpark();
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        // The space is going away: let the thread see it.
        self.0.unpark();
    }
}
