// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{HvaRange, OwnedInvalidationGuard, Space, Zapped};

fn outlive(range: HvaRange) -> OwnedInvalidationGuard<Zapped> {
    let space = Space::new();
    space.window(range).open_zapped_owned().unwrap()
}

fn main() {
    let _ = outlive;
}
