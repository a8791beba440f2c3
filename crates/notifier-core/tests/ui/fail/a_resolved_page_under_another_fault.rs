// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Extent, Fault, Resolved};

fn swap(fault: Fault<'_>, resolved: Resolved<'_>) {
    let extents: &[Extent] = resolved.extents();
    fault.admit(|admission| admission.extents = extents);
}

fn main() {}
