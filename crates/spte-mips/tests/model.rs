// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! GPA tables against the plain sequential truth, operation by operation: each page size and width, with RI and XI and without,
//! both byte orders.
//!
//! Each test runs 256 sequences of 200 operations, fewer where pages are large and there are no larger leaves: one operation
//! is then many entries. `PROPTEST_CASES` says how many otherwise:
//!
//! ```console
//! $ PROPTEST_CASES=4000 cargo test --release -p spte-mips --test model
//! ```

use proptest::prelude::*;
use spte_drive::{Driven, agree, agree_in_want};
use spte_mips::{
    BigEndian, ByteOrder, Cache, GpaAttrs, GpaOptions, GpaTable, LittleEndian, PageSize, PteLayout, Width,
};
use spte_model::{Access, MemType, Shape};

fn attrs(mem: MemType) -> Option<GpaAttrs> {
    let cache = match mem {
        MemType::Wb => Cache::NonCoherent,
        MemType::Uc => Cache::Uncached,
        MemType::Wc => Cache::UncachedAccelerated,
        MemType::Wt => Cache::WriteThrough,
    };
    Some(GpaAttrs { cache })
}

/// The format, and what the model knows of it.
fn make<O: ByteOrder>(options: GpaOptions) -> Driven<GpaTable<O>> {
    let bits = match (options.page, options.width) {
        (PageSize::K4, Width::Standard) => 40,
        (PageSize::K16, Width::Standard) => 36,
        (PageSize::K64, Width::Standard) => 42,
        (PageSize::K4 | PageSize::K16, Width::Wide) => 48,
        (PageSize::K64, Width::Wide) => 55,
    };
    let shape = Shape::new(&[options.page.bytes()], bits, 48).unwrap();
    let shape = if options.rixi { shape } else { shape.with_access(&[Access::RWX, Access::RX]) };
    Driven { format: GpaTable::new(options).unwrap(), shape, attrs }
}

fn options(page: PageSize, width: Width) -> GpaOptions {
    GpaOptions { page, width, ..GpaOptions::default() }
}

/// One in `part` of the sequences that there would be.
fn check<O: ByteOrder>(options: GpaOptions, part: u32) {
    let strategy = spte_model::strategy::ops(&make::<O>(options).shape, 200);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let config = ProptestConfig { cases: config.cases.div_ceil(part), ..config };
    proptest!(config, |(ops in strategy)| {
        agree(make::<O>(options), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}

macro_rules! compare {
    ($($name:ident, $order:ident, one in $part:literal: $options:expr;)*) => {
        $(
            #[test]
            fn $name() {
                check::<$order>($options, $part);
            }
        )*
    };
}

compare! {
    pages_4k_do_as_the_model, BigEndian, one in 1: options(PageSize::K4, Width::Standard);
    pages_16k_do_as_the_model, BigEndian, one in 16: options(PageSize::K16, Width::Standard);
    pages_64k_do_as_the_model, BigEndian, one in 16: options(PageSize::K64, Width::Standard);
    four_levels_of_4k_do_as_the_model, BigEndian, one in 1: options(PageSize::K4, Width::Wide);
    three_levels_of_16k_do_as_the_model, LittleEndian, one in 16: options(PageSize::K16, Width::Wide);
    three_levels_of_64k_do_as_the_model, BigEndian, one in 16: options(PageSize::K64, Width::Wide);
    little_endian_does_as_the_model, LittleEndian, one in 1: GpaOptions {
        layout: PteLayout::Huge, ..options(PageSize::K4, Width::Standard)
    };
    without_ri_and_xi_does_as_the_model, BigEndian, one in 1: GpaOptions {
        rixi: false, layout: PteLayout::HugeSplitting, ..options(PageSize::K4, Width::Standard)
    };
}

#[test]
fn want_of_pages_leaves_what_was_or_what_was_asked_for() {
    let options = options(PageSize::K4, Width::Wide);
    let ops = spte_model::strategy::ops(&make::<BigEndian>(options).shape, 60);
    let wants = prop::collection::vec(prop::option::of((0_u64..3, 1_u64..4)), 60);
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(64) };
    proptest!(config, |(ops in ops, wants in wants)| {
        let ops: Vec<_> = ops.into_iter().zip(wants).collect();
        agree_in_want(make::<BigEndian>(options), &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
    });
}
