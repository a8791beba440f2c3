// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: formats, arbitrary leaves, and the operations that are applied to them.
#![allow(dead_code, unreachable_pub)]

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, LeafSpec, Level, WriteProtect};
use spte_mips::*;

pub const L1: Level = Level::LEAF;

pub fn table(options: GpaOptions) -> GpaTable {
    GpaTable::new(options).unwrap()
}

pub fn of(page: PageSize, width: Width) -> GpaOptions {
    GpaOptions { page, width, ..GpaOptions::default() }
}

pub const PAGES: [PageSize; 3] = [PageSize::K4, PageSize::K16, PageSize::K64];
pub const WIDTHS: [Width; 2] = [Width::Standard, Width::Wide];
pub const LAYOUTS: [PteLayout; 3] = [PteLayout::Plain, PteLayout::Huge, PteLayout::HugeSplitting];

/// Every format that differs in how entries are built.
pub fn formats() -> Vec<GpaTable> {
    let mut all = Vec::new();
    for page in PAGES {
        for width in WIDTHS {
            for layout in LAYOUTS {
                for rixi in [true, false] {
                    all.push(table(GpaOptions { layout, rixi, ..of(page, width) }));
                }
            }
        }
    }
    all
}

pub fn any_format() -> impl Strategy<Value = GpaTable> {
    (any::<prop::sample::Index>(), 48_u8..=59).prop_map(|(index, physical_bits)| {
        let options = *index.get(&formats()).options();
        table(GpaOptions { physical_bits, ..options })
    })
}

pub fn any_spec() -> impl Strategy<Value = LeafSpec<GpaAttrs>> {
    let access = (0_u8..8).prop_map(Access::from_bits_truncate);
    (any::<u64>(), access, any::<[bool; 3]>(), 0_u8..8).prop_map(|(output, access, [armed, accessed, dirty], cache)| {
        LeafSpec {
            output: OutputAddr::new(output),
            access,
            armed: armed && access.writable(),
            accessed,
            dirty,
            attrs: GpaAttrs { cache: Cache::from_bits(cache) },
        }
    })
}

/// `spec` as the format can have it, with every physical address bit in use.
pub fn fitted(format: &GpaTable, spec: LeafSpec<GpaAttrs>) -> LeafSpec<GpaAttrs> {
    let options = format.options();
    let output = spec.output.as_u64() & ((1 << options.physical_bits) - 1);
    let output = OutputAddr::new(output).align_down(options.page.bytes());
    let access = if options.rixi { spec.access } else { spec.access | Access::RX };
    // What may be written unseen counts as written.
    let dirty = spec.dirty || (access.writable() && !spec.armed);
    LeafSpec { output, access, dirty, ..spec }
}

/// A plain leaf.
pub fn spec(output: u64, access: Access) -> LeafSpec<GpaAttrs> {
    LeafSpec {
        output: OutputAddr::new(output),
        access,
        armed: false,
        accessed: true,
        dirty: false,
        attrs: GpaAttrs::default(),
    }
}

/// Every operation on a leaf, by name.
pub fn operations(format: &GpaTable, raw: u64) -> Vec<(&'static str, u64)> {
    let mut results = vec![
        ("arm", format.write_protect(L1, raw, WriteProtect::Arm)),
        ("retain", format.write_protect(L1, raw, WriteProtect::Retain)),
        ("old", format.make_old(L1, raw)),
        ("young", format.make_young(L1, raw)),
        ("clean", format.make_clean(L1, raw)),
        ("merge", format.merge_facts(L1, raw, L1, raw)),
        ("set_spte", format.set_spte(L1, raw, OutputAddr::new(0)).unwrap()),
    ];
    results.extend(format.upgrade(L1, raw).map(|raw| ("upgrade", raw)));
    for bits in 0..8 {
        results.extend(format.with_access(L1, raw, Access::from_bits_truncate(bits)).ok().map(|raw| ("access", raw)));
    }
    results
}
