// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Extent, Fault};

fn again(fault: Fault<'_>, extent: Extent) {
    let first = fault.resolve(|_| Ok::<_, ()>(extent));
    let second = fault.resolve(|_| Ok::<_, ()>(extent));
    drop((first, second));
}

fn main() {}
