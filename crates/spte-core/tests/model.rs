// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tiny formats against the plain sequential truth, operation by operation. (Those whose hardware keeps accessed and
//! dirty: elsewhere the model knows only of writes that were logged, and the engine takes what is writable for dirty.)

mod common;

use common::flavours;
use proptest::prelude::*;
use spte_core::format::{Geometry, Level};
use spte_drive::{Driven, agree};
use spte_model::{Access, MemType, Shape};

fn attrs(mem: MemType) -> Option<u8> {
    MemType::ALL.iter().position(|known| *known == mem).map(|index| index as u8)
}

fn shape(geometry: &Geometry) -> Shape {
    let levels = (1..=geometry.top().get()).filter_map(Level::new);
    let sizes: Vec<u64> = levels.map(|level| geometry.span(level)).collect();
    let shape = Shape::new(&sizes, geometry.address_bits(), 52).unwrap();
    shape.with_hw_ad(true).with_access(&[Access::RWX, Access::RW, Access::RX, Access::R])
}

#[test]
fn every_flavour_does_as_the_model() {
    for format in flavours().into_iter().filter(|format| format.hardware) {
        let shape = shape(&format.geometry);
        let ops = spte_model::strategy::ops(&shape, 0..200);
        let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(ops in ops)| {
            let driven = Driven { format, shape: shape.clone(), attrs };
            agree(driven, &ops).map_err(|wrong| TestCaseError::fail(wrong.to_string()))?;
        });
    }
}
