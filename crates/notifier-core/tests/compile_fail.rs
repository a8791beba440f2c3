// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What must not compile, beside twins that do. The messages are those of one toolchain; after
//! an update, run with `TRYBUILD=overwrite` and read the difference.
#![cfg(all(feature = "std", not(loom)))]

#[test]
fn misuse_does_not_compile_and_its_twins_do() {
    let programs = trybuild::TestCases::new();
    programs.pass("tests/ui/pass/*.rs");
    programs.compile_fail("tests/ui/fail/*.rs");
}
