// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::Resolved;

fn again(resolved: Resolved<'_>) {
    resolved.install(|_| ());
    resolved.install(|_| ());
}

fn main() {}
