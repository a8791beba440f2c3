// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: formats, arbitrary leaves, and the operations that are applied to them.
#![allow(dead_code, unreachable_pub)]

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_arm64::*;
use spte_core::format::{Format, LeafSpec, Level};
#[allow(unused_imports, reason = "not every test asks for both")]
pub use spte_drive::{operations, plain_leaf as spec};

pub const L3: Level = Level::LEAF;

/// The level with the architecture's number.
pub fn level(number: i8) -> Level {
    Level::new((4 - number) as u8).unwrap()
}

pub fn stage2(options: Stage2Options) -> Stage2 {
    Stage2::new(options).unwrap()
}

pub fn of(granule: Granule) -> Stage2Options {
    Stage2Options { granule, ..Stage2Options::default() }
}

pub fn any_granule() -> impl Strategy<Value = Granule> {
    prop_oneof![Just(Granule::K4), Just(Granule::K16), Just(Granule::K64)]
}

pub fn any_accessed_dirty() -> impl Strategy<Value = AccessedDirty> {
    prop_oneof![Just(AccessedDirty::Software), Just(AccessedDirty::HardwareAccessed), Just(AccessedDirty::Hardware)]
}

pub fn any_shareability() -> impl Strategy<Value = Shareability> {
    prop_oneof![Just(Shareability::NonShareable), Just(Shareability::Outer), Just(Shareability::Inner)]
}

/// Every way that a machine can be set up which changes how entries are built, with tables of at least two levels.
pub fn any_format() -> impl Strategy<Value = Stage2> {
    let level = prop_oneof![Just(BreakLevel::Level0), Just(BreakLevel::Level1), Just(BreakLevel::Level2)];
    let features = (any::<[bool; 3]>(), any_accessed_dirty(), any_shareability(), level);
    (any_granule(), 40_u8..=52, features).prop_map(
        |(granule, bits, ([wide, fwb, xnx], accessed_dirty, shareability, break_level))| {
            let bits = if wide { bits } else { bits.min(48) };
            stage2(Stage2Options {
                granule,
                ipa_bits: bits,
                physical_bits: bits,
                lpa2: wide && granule != Granule::K64,
                fwb,
                xnx,
                accessed_dirty,
                shareability,
                break_level,
                ..Stage2Options::default()
            })
        },
    )
}

pub fn any_memory() -> impl Strategy<Value = MemoryType> {
    let cache = || prop_oneof![Just(Cache::NonCacheable), Just(Cache::WriteThrough), Just(Cache::WriteBack)];
    prop_oneof![
        prop_oneof![Just(Device::NGnRnE), Just(Device::NGnRE), Just(Device::NGRE), Just(Device::GRE)]
            .prop_map(MemoryType::Device),
        (cache(), cache()).prop_map(|(outer, inner)| MemoryType::Normal { outer, inner }),
        Just(MemoryType::Stage1),
    ]
}

pub fn any_attrs() -> impl Strategy<Value = Stage2Attrs> {
    let execute = prop_oneof![Just(ExecuteAt::Both), Just(ExecuteAt::El0), Just(ExecuteAt::El1)];
    (any_memory(), any_shareability(), execute, any::<bool>())
        .prop_map(|(memory, shareability, execute, software)| Stage2Attrs { memory, shareability, execute, software })
}

/// Attributes that the format has in place of those it has not.
pub fn fit(format: &Stage2, attrs: Stage2Attrs) -> Stage2Attrs {
    let options = format.options();
    let known = attrs.memory.mem_attr(options.fwb).is_some();
    Stage2Attrs {
        memory: if known { attrs.memory } else { MemoryType::DEVICE },
        shareability: if options.lpa2 { options.shareability } else { attrs.shareability },
        execute: if options.xnx { attrs.execute } else { ExecuteAt::Both },
        ..attrs
    }
}

pub fn any_spec() -> impl Strategy<Value = LeafSpec<Stage2Attrs>> {
    let access = (0_u8..8).prop_map(Access::from_bits_truncate);
    (any::<u64>(), access, any::<[bool; 3]>(), any_attrs()).prop_map(
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

/// `spec` as the format can have it at `level`, with every physical address bit in use.
pub fn fitted(format: &Stage2, level: Level, spec: LeafSpec<Stage2Attrs>) -> LeafSpec<Stage2Attrs> {
    let output = spec.output.as_u64() & ((1 << format.options().physical_bits) - 1);
    let output = OutputAddr::new(output).align_down(format.geometry().span(level));
    let hardware = format.options().accessed_dirty.sets_dirty();
    // What may be written unseen counts as written.
    let dirty = spec.dirty || (!hardware && spec.access.writable() && !spec.armed);
    LeafSpec { output, dirty, attrs: fit(format, spec.attrs), ..spec }
}

/// The levels of the format that have leaves, by a number of any size.
pub fn leaf_level(format: &Stage2, pick: usize) -> Level {
    let levels: Vec<Level> = (1..=5)
        .filter_map(Level::new)
        .filter(|level| *level <= format.geometry().top() && format.geometry().level(*level).leaf)
        .collect();
    levels[pick % levels.len()]
}

/// Operations that report the dirty fact, or exist to clear it.
pub fn clears_dirty(name: &str) -> bool {
    matches!(name, "arm" | "retain" | "clean" | "set_spte")
}
