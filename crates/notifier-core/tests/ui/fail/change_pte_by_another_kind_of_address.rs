// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Change, Gpa, Hva, InvalidationGuard, Retained};

fn repoint(guard: &InvalidationGuard<'_, Retained, Hva>, changes: &[Change<Gpa>]) {
    let _ = guard.change_pte(changes);
}

fn main() {}
