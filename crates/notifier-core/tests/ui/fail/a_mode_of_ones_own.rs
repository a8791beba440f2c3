// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Mode, WindowMode};

#[derive(Debug)]
enum Mine {}

impl WindowMode for Mine {
    const MODE: Mode = Mode::Retained;
}

fn main() {}
