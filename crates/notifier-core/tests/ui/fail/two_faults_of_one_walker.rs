// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{GpaRange, Walker};

fn both(walker: &mut Walker, range: GpaRange) {
    let first = walker.fault(range);
    let second = walker.fault(range);
    drop((first, second));
}

fn main() {}
