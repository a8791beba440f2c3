// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: formats, arbitrary leaves, and the operations that are applied to them.
#![allow(dead_code, unreachable_pub)]

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, LeafSpec, Level, WriteProtect};
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

/// A plain leaf.
pub fn spec(output: u64, access: Access) -> LeafSpec<RadixAttrs> {
    LeafSpec {
        output: OutputAddr::new(output),
        access,
        armed: false,
        accessed: true,
        dirty: false,
        attrs: RadixAttrs::default(),
    }
}

/// Every operation on a leaf that keeps its level, by name.
pub fn operations(format: &Radix, level: Level, raw: u64) -> Vec<(&'static str, u64)> {
    let mut results = vec![
        ("arm", format.write_protect(level, raw, WriteProtect::Arm)),
        ("retain", format.write_protect(level, raw, WriteProtect::Retain)),
        ("old", format.make_old(level, raw)),
        ("young", format.make_young(level, raw)),
        ("clean", format.make_clean(level, raw)),
        ("merge", format.merge_facts(level, raw, level, raw)),
        ("set_spte", format.set_spte(level, raw, OutputAddr::new(0)).unwrap()),
    ];
    results.extend(format.upgrade(level, raw).map(|raw| ("upgrade", raw)));
    for bits in 0..8 {
        let access = Access::from_bits_truncate(bits);
        let name = if access.writable() { "raise" } else { "restrict" };
        results.extend(format.with_access(level, raw, access).ok().map(|raw| (name, raw)));
    }
    results
}
