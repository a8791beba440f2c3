// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the tests share: formats, arbitrary leaves, and the operations that are applied to them.
#![allow(dead_code, unreachable_pub)]

use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{LeafSpec, Level};
#[allow(unused_imports, reason = "not every test asks for both")]
pub use spte_drive::{operations, plain_leaf as spec};
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
