// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machines.

pub mod arm64;

use crate::report::Candidate;

/// Every machine there is a driver for.
pub fn candidates() -> Vec<Candidate> {
    let mut all = Vec::new();
    for variant in arm64::variants() {
        all.push(Candidate::new(variant.name, move |tools| arm64::Arm64::start(tools, variant)));
    }
    all
}
