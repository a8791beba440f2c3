// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{HvaRange, InvalidationGuard, OpenError, Retained, Space};

fn get(space: &Space, range: HvaRange) -> Result<InvalidationGuard<'_, Retained>, OpenError> {
    space.retain(range)
}

fn main() {
    let _ = get;
}
