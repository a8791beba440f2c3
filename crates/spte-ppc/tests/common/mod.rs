// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: formats, arbitrary leaves, and the operations that are applied to them.
#![allow(dead_code, unreachable_pub)]

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, LeafSpec, Level};
#[allow(unused_imports, reason = "not every test asks for both")]
pub use spte_drive::{operations, plain_leaf as spec};
use spte_ppc::*;

pub fn level(number: u8) -> Level {
    Level::new(number).unwrap()
}

pub fn of(page: BasePage) -> RadixOptions {
    RadixOptions { page, ..RadixOptions::default() }
}

pub fn radix(page: BasePage) -> Radix {
    Radix::new(of(page)).unwrap()
}

pub fn both() -> [Radix; 2] {
    [radix(BasePage::K4), radix(BasePage::K64)]
}

pub fn any_format() -> impl Strategy<Value = Radix> {
    let page = prop_oneof![Just(BasePage::K4), Just(BasePage::K64)];
    (page, 40_u8..=57, any::<bool>()).prop_map(|(page, physical_bits, strong_order)| {
        Radix::new(RadixOptions { page, physical_bits, strong_order }).unwrap()
    })
}

/// Rights that EAA can say.
pub fn any_access() -> impl Strategy<Value = Access> {
    let access = (0_u8..8).prop_map(Access::from_bits_truncate);
    access.prop_map(|access| if access.writable() { access | Access::READ } else { access })
}

pub fn any_spec() -> impl Strategy<Value = LeafSpec<RadixAttrs>> {
    (any::<u64>(), any_access(), any::<[bool; 4]>(), 0_u8..4).prop_map(
        |(output, access, [armed, accessed, dirty, software], storage)| LeafSpec {
            output: OutputAddr::new(output),
            access,
            armed: armed && access.writable(),
            accessed,
            dirty,
            attrs: RadixAttrs { storage: Storage::from_bits(storage), software },
        },
    )
}

/// `spec` as the format can have it at `level`, with every physical address bit in use.
pub fn fitted(format: &Radix, level: Level, spec: LeafSpec<RadixAttrs>) -> LeafSpec<RadixAttrs> {
    let output = spec.output.as_u64() & ((1 << format.options().physical_bits) - 1);
    let output = OutputAddr::new(output).align_down(format.geometry().span(level));
    let storage = match spec.attrs.storage {
        Storage::StrongOrder if !format.options().strong_order => Storage::Normal,
        storage => storage,
    };
    LeafSpec { output, attrs: spec.attrs.storage(storage), ..spec }
}
