// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Admission, Resolved};

fn smuggle<'a>(resolved: Resolved<'a>) -> &'a Admission<'a> {
    resolved.install(|admission| admission)
}

fn main() {}
