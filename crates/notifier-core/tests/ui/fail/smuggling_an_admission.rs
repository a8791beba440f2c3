// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Admission, Resolved};

fn smuggle(resolved: Resolved<'_>) {
    let mut stolen: Option<&Admission<'_>> = None;
    resolved.install(|admission| stolen = Some(admission));
    let _ = stolen;
}

fn main() {}
