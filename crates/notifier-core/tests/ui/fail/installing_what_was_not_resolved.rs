// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
use notifier_core::Fault;

fn hurry(fault: Fault<'_>) {
    fault.install(|_| ());
}

fn main() {}
