// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::{Hva, HvaRange, InvalidationGuard, Retained};

fn forge(range: HvaRange) -> InvalidationGuard<'static, Retained, Hva> {
    InvalidationGuard { range }
}

fn main() {}
