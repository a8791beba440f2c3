// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{InvalidationGuard, Retained};

fn twice(guard: InvalidationGuard<'_, Retained>) {
    let again: InvalidationGuard<'_, Retained> = guard.clone();
    drop(again);
}

fn main() {}
