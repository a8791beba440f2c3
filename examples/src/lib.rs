// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the examples are made of. The examples themselves are the thin files beside `Cargo.toml`; what is here is
//! what their tests can call too.
// One function needs it, and says why: `ksm::mergeable` marks memory.
#![deny(unsafe_code)]

pub mod dedup;
pub mod ksm;
pub mod machine;

/// README's program, compiled and run as it stands there.
#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
pub mod readme {}
