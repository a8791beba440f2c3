// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What happens while a run goes on: points over time, and a line on a terminal.

use std::{
    io::{IsTerminal, stderr},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};

/// The state of a run at one moment.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Point {
    pub(crate) at: Duration,
    pub(crate) merged: u64,
    pub(crate) saved: u64,
    pub(crate) faults: u64,
    pub(crate) damage: u64,
}

/// A line on standard error, where that is a terminal; nothing elsewhere.
#[derive(Debug)]
pub(crate) struct Progress(Option<ProgressBar>);

impl Progress {
    /// For a run of at most `limit`.
    pub(crate) fn new(limit: Duration) -> Self {
        Self(stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(limit.as_millis() as u64);
            if let Ok(style) = ProgressStyle::with_template("{spinner} {wide_bar} {msg}") {
                bar.set_style(style);
            }
            bar
        }))
    }

    /// What is being done.
    pub(crate) fn say(&self, what: &'static str) {
        if let Some(bar) = &self.0 {
            bar.set_message(what);
            bar.tick();
        }
    }

    pub(crate) fn show(&self, point: &Point) {
        if let Some(bar) = &self.0 {
            bar.set_position(point.at.as_millis() as u64);
            bar.set_message(format!(
                "{} merged, {} MiB saved, {} faults, damage {}",
                point.merged,
                point.saved >> 20,
                point.faults,
                point.damage
            ));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
