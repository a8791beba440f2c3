// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The formats keep what they promise to the engine, in every way that they can be set up.

mod common;

use proptest::prelude::*;
use spte_core::examine::examine;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn ept_keeps_its_promises(format in common::any_ept()) {
        prop_assert_eq!(examine(&format, Default::default()), Ok(()));
    }

    #[test]
    fn long_mode_keeps_its_promises(format in common::any_long_mode::<spte_x86::Native>()) {
        prop_assert_eq!(examine(&format, Default::default()), Ok(()));
    }

    #[test]
    fn nested_long_mode_keeps_its_promises(format in common::any_long_mode::<spte_x86::Nested>()) {
        prop_assert_eq!(examine(&format, Default::default()), Ok(()));
    }
}
