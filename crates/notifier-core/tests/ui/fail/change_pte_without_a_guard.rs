// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Change, Hva, Space};

fn repoint(space: &Space, changes: &[Change<Hva>]) {
    let _ = space.change_pte(changes);
}

fn main() {}
