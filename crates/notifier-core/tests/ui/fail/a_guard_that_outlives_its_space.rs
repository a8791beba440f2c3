// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{HvaRange, InvalidationGuard, Space, Zapped};

fn outlive(range: HvaRange) -> InvalidationGuard<'static, Zapped> {
    let space = Space::new();
    space.zap(range).unwrap()
}

fn main() {}
