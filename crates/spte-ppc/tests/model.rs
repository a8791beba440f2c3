// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Radix trees against the plain sequential truth, operation by operation, with a TLB beside them that forgets nothing until
//! it is told to: both base pages.
//!
//! Each test runs 256 sequences of 200 operations; `PROPTEST_CASES` says how many otherwise:
//!
//! ```console
//! $ PROPTEST_CASES=4000 cargo test --release -p spte-ppc --test model
//! ```

use proptest::prelude::*;
use spte_drive::{Driven, agree};
use spte_model::{MemType, Shape};
use spte_ppc::{BasePage, Radix, RadixAttrs, RadixOptions, Storage};

fn attrs(mem: MemType) -> Option<RadixAttrs> {
    let storage = match mem {
        MemType::Wb => Storage::Normal,
        MemType::Uc => Storage::NonIdempotent,
        MemType::Wc => Storage::Tolerant,
        MemType::Wt => return None,
    };
    Some(RadixAttrs::default().storage(storage))
}

fn make(page: BasePage) -> Driven<Radix> {
    let options = RadixOptions { page, physical_bits: 57, ..RadixOptions::default() };
    let shape = Shape::ppc_radix(page.bytes()).unwrap();
    Driven { format: Radix::new(options).unwrap(), shape, attrs }
}

fn check(page: BasePage) {
    let strategy = spte_model::strategy::ops(&make(page).shape, 200);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    proptest!(config, |(ops in strategy)| {
        agree(make(page), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}

#[test]
fn base_4k_does_as_the_model() {
    check(BasePage::K4);
}

#[test]
fn base_64k_does_as_the_model() {
    check(BasePage::K64);
}
