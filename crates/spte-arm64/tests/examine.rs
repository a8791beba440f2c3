// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The formats keep what they promise to the engine, in every way that they can be set up.

mod common;

use proptest::prelude::*;
use spte_arm64::Stage2Attrs;
use spte_core::examine::examine;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn stage_2_keeps_its_promises(format in common::any_format()) {
        // With 52 bits of addresses leaves have what all have.
        let attrs = Stage2Attrs { shareability: format.options().shareability, ..Stage2Attrs::default() };
        prop_assert_eq!(examine(&format, attrs), Ok(()));
    }
}
