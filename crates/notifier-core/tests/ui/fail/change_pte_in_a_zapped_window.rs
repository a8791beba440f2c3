// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Change, Hva, InvalidationGuard, Zapped};

fn repoint(guard: &InvalidationGuard<'_, Zapped>, changes: &[Change<Hva>]) {
    let _ = guard.change_pte(changes);
}

fn main() {}
