// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A plain leaf, and all that may be done to one: for tests of a format's functions alone, without a table.

use notifier_core::{Access, OutputAddr};
use spte_core::format::{Format, LeafSpec, Level, WriteProtect};

/// A leaf that was used and not written.
pub fn plain_leaf<A: Default>(output: u64, access: Access) -> LeafSpec<A> {
    LeafSpec {
        output: OutputAddr::new(output),
        access,
        armed: false,
        accessed: true,
        dirty: false,
        attrs: A::default(),
    }
}

/// What every operation that keeps the level makes of the leaf `raw`, by name. Changes of rights are `raise` where the new
/// ones have writing, and `restrict` where they have not; those that the format cannot express are left out.
///
/// # Panics
/// Where the format cannot point the leaf at address 0.
#[allow(clippy::expect_used, reason = "a format without that is wrong, and the test has failed")]
pub fn operations<F: Format>(format: &F, level: Level, raw: u64) -> Vec<(&'static str, u64)> {
    let mut results = vec![
        ("arm", format.write_protect(level, raw, WriteProtect::Arm)),
        ("retain", format.write_protect(level, raw, WriteProtect::Retain)),
        ("old", format.make_old(level, raw)),
        ("young", format.make_young(level, raw)),
        ("clean", format.make_clean(level, raw)),
        ("merge", format.merge_facts(level, raw, level, raw)),
        ("set_spte", format.set_spte(level, raw, OutputAddr::new(0)).expect("0 is aligned, and not wide")),
    ];
    results.extend(format.upgrade(level, raw).map(|raw| ("upgrade", raw)));
    for bits in 0..8 {
        let access = Access::from_bits_truncate(bits);
        let name = if access.writable() { "raise" } else { "restrict" };
        results.extend(format.with_access(level, raw, access).ok().map(|raw| (name, raw)));
    }
    results
}
