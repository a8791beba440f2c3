// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Change, Hva, InvalidationGuard, Retained};

fn repoint(guard: InvalidationGuard<'_, Retained>, changes: &[Change<Hva>]) {
    let _ = guard.close();
    let _ = guard.change_pte(changes);
}

fn main() {}
