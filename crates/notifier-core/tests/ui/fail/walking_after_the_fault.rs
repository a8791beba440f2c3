// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{GpaRange, Scope};

fn go_on(scope: Scope<'_>, range: GpaRange) {
    let fault = scope.fault(range);
    drop(scope.space());
    drop(fault);
}

fn main() {}
