// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Extent, GpaRange, Walker};

fn in_order(walker: &mut Walker, range: GpaRange, extent: Extent) {
    let Ok(fault) = walker.enter().fault(range) else { return };
    let Ok(resolved) = fault.resolve(|_| Ok::<_, ()>(extent)) else { return };
    let mut ranges = Vec::new();
    resolved.install(|admission| ranges.push(admission.range()));
    let Ok(fault) = walker.fault(range) else { return };
    fault.admit(|admission| ranges.push(admission.range()));
}

fn main() {
    let _ = in_order;
}
