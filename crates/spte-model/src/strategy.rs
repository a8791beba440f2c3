// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `proptest` strategies over operations (feature `proptest`).
//!
//! They draw the same words as [`Op::decode`] and map them through the same function, so a failure
//! of a fuzz target and one of a property test are the same bytes. A zero word is the plainest
//! operation, and each byte of a word decides one thing: shrinking drops operations, then simplifies
//! what is left.

use proptest::collection::{SizeRange, vec};
use proptest::prelude::*;

use crate::op::Op;
use crate::shape::Shape;

/// One operation.
pub fn op(shape: &Shape) -> impl Strategy<Value = Op> + Clone + use<> {
    let shape = shape.clone();
    any::<[u8; 8]>().prop_map(move |word| Op::from_word(&shape, word))
}

/// A sequence of operations.
pub fn ops<L: Into<SizeRange>>(shape: &Shape, len: L) -> impl Strategy<Value = Vec<Op>> + Clone + use<L> {
    vec(op(shape), len)
}
