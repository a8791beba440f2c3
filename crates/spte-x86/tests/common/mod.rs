// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: formats, arbitrary leaves, and the operations that are applied to them.
#![allow(dead_code, unreachable_pub)]

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, LeafSpec, Level, WriteProtect};
use spte_x86::*;

pub const L1: Level = Level::LEAF;

pub fn level(n: u8) -> Level {
    Level::new(n).unwrap()
}

/// What both formats can say beyond the trait.
pub trait X86: Format {
    fn state(&self, raw: u64) -> Option<WriteState>;
    fn write_tracked(&self, raw: u64) -> u64;
    fn hardware(&self, level: Level, raw: u64) -> HardwareKind;
}

impl X86 for Ept {
    fn state(&self, raw: u64) -> Option<WriteState> {
        self.write_state(raw)
    }
    fn write_tracked(&self, raw: u64) -> u64 {
        self.write_track(raw)
    }
    fn hardware(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }
}

impl<U: Usage> X86 for LongModeFormat<U> {
    fn state(&self, raw: u64) -> Option<WriteState> {
        self.write_state(raw)
    }
    fn write_tracked(&self, raw: u64) -> u64 {
        self.write_track(raw)
    }
    fn hardware(&self, level: Level, raw: u64) -> HardwareKind {
        self.hardware_kind(level, raw)
    }
}

pub fn ept(accessed_dirty: AccessedDirty) -> Ept {
    Ept::new(EptOptions { accessed_dirty, ..EptOptions::default() }).unwrap()
}

/// Every way that an EPT can be set up which changes how entries are built.
pub fn any_ept() -> impl Strategy<Value = Ept> {
    let ad =
        prop_oneof![Just(AccessedDirty::Enabled), Just(AccessedDirty::Disabled), Just(AccessedDirty::WriteProtectOnly)];
    (ad, any::<[bool; 4]>(), 39_u8..=52).prop_map(|(accessed_dirty, [xo, mbe, ve, nx], physical_bits)| {
        Ept::new(EptOptions {
            accessed_dirty,
            execute_only: xo,
            mode_based_execute: mbe,
            suppress_ve: ve,
            nx_huge_pages: nx,
            physical_bits,
            ..EptOptions::default()
        })
        .unwrap()
    })
}

pub fn any_long_mode<U: Usage + core::fmt::Debug>() -> impl Strategy<Value = LongModeFormat<U>> {
    (any::<[bool; 4]>(), 39_u8..=51).prop_map(|([nxe, nx_huge, keys, encrypted], physical_bits)| {
        LongModeFormat::new(LongModeOptions {
            no_execute: nxe,
            nx_huge_pages: nxe && nx_huge,
            protection_keys: keys && !U::NESTED,
            encryption_bit: encrypted.then_some(51),
            encrypt_tables: encrypted,
            physical_bits,
            ..LongModeOptions::default()
        })
        .unwrap()
    })
}

pub fn any_level() -> impl Strategy<Value = Level> {
    (1_u8..=3).prop_map(level)
}

/// Addresses within the narrowest width the tests use, aligned by the caller.
pub fn any_output() -> impl Strategy<Value = u64> {
    0..1_u64 << 39
}

pub fn any_access() -> impl Strategy<Value = Access> {
    (0_u8..8).prop_map(Access::from_bits_truncate)
}

pub fn any_ept_attrs() -> impl Strategy<Value = EptAttrs> {
    (prop::sample::select(vec![0_u8, 1, 4, 5, 6]), any::<bool>()).prop_map(|(number, ignore_pat)| EptAttrs {
        memory_type: EptMemoryType::from_number(number).unwrap(),
        ignore_pat,
    })
}

/// Attributes that the format has; those it has not are dropped.
pub fn any_long_mode_attrs() -> impl Strategy<Value = LongModeAttrs> {
    (0_u8..8, any::<[bool; 3]>(), 0_u8..16).prop_map(|(selector, [user, global, encrypted], key)| LongModeAttrs {
        selector: PatSelector::new(selector).unwrap(),
        user,
        global,
        encrypted,
        protection_key: ProtectionKey::new(key).unwrap(),
    })
}

pub fn fit<U: Usage>(format: &LongModeFormat<U>, attrs: LongModeAttrs) -> LongModeAttrs {
    LongModeAttrs {
        user: attrs.user || U::NESTED,
        global: attrs.global && !U::NESTED,
        encrypted: attrs.encrypted && format.options().encryption_bit.is_some(),
        protection_key: if format.options().protection_keys { attrs.protection_key } else { ProtectionKey::default() },
        ..attrs
    }
}

pub fn any_spec<A: core::fmt::Debug>(attrs: impl Strategy<Value = A>) -> impl Strategy<Value = LeafSpec<A>> {
    (any_output(), any_access(), any::<[bool; 3]>(), attrs).prop_map(
        |(output, access, [armed, accessed, dirty], attrs)| LeafSpec {
            output: OutputAddr::new(output),
            access,
            armed: armed && access.writable(),
            accessed,
            dirty,
            attrs,
        },
    )
}

pub fn aligned<F: Format>(format: &F, level: Level, spec: LeafSpec<F::Attrs>) -> LeafSpec<F::Attrs> {
    LeafSpec { output: spec.output.align_down(format.geometry().span(level)), ..spec }
}

/// A plain leaf.
pub fn spec<A: Default>(output: u64, access: Access) -> LeafSpec<A> {
    LeafSpec { output: OutputAddr::new(output), access, armed: false, accessed: true, dirty: true, attrs: A::default() }
}

/// Every operation on a leaf that keeps its level, by name.
pub fn operations<F: X86>(format: &F, level: Level, raw: u64) -> Vec<(&'static str, u64)> {
    let mut results = vec![
        ("arm", format.write_protect(level, raw, WriteProtect::Arm)),
        ("retain", format.write_protect(level, raw, WriteProtect::Retain)),
        ("old", format.make_old(level, raw)),
        ("young", format.make_young(level, raw)),
        ("clean", format.make_clean(level, raw)),
        ("write track", format.write_tracked(raw)),
        ("merge", format.merge_facts(level, raw, level, raw)),
        ("set_spte", format.set_spte(level, raw, OutputAddr::new(0x40_0000_0000)).unwrap()),
    ];
    results.extend(format.upgrade(level, raw).map(|raw| ("upgrade", raw)));
    results.extend(format.with_access(level, raw, Access::RX).map(|raw| ("rx", raw)));
    results.extend(format.with_access(level, raw, Access::RWX).map(|raw| ("rwx", raw)));
    results.extend(format.with_access(level, raw, Access::READ).map(|raw| ("r", raw)));
    results.extend(format.with_access(level, raw, Access::EXECUTE).map(|raw| ("x", raw)));
    results
}

/// Operations that report the dirty fact, or exist to clear it.
pub fn clears_dirty(name: &str) -> bool {
    matches!(name, "arm" | "retain" | "clean" | "set_spte")
}
