// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The formats keep what they promise to the engine, in every way that they can be set up.

mod common;

use proptest::prelude::*;
use spte_core::examine::examine;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn radix_trees_keep_their_promises(format in common::any_format()) {
        prop_assert_eq!(examine(&format, Default::default()), Ok(()));
    }
}
