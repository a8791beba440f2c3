// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Change, Hva, InvalidationGuard, Retained, Space};

fn repoint(guard: InvalidationGuard<'_, Retained>, changes: &[Change<Hva>], space: &Space) {
    let _ = guard.change_pte(changes);
    let _ = guard.change_pte_in(space, changes);
    let _ = guard.close();
}

fn main() {
    let _ = repoint;
}
