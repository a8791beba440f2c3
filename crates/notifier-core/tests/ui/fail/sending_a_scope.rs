// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::Walker;

fn send(walker: &mut Walker) {
    let scope = walker.enter();
    std::thread::scope(|threads| {
        threads.spawn(move || drop(scope));
    });
}

fn main() {}
