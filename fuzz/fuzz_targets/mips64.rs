// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! See [`secondary_mmu_fuzz`].
#![cfg_attr(fuzzing, no_main)]

#[cfg(fuzzing)]
libfuzzer_sys::fuzz_target!(|data: &[u8]| secondary_mmu_fuzz::ops::mips64(data));

#[cfg(not(fuzzing))]
fn main() {
    secondary_mmu_fuzz::replay(secondary_mmu_fuzz::ops::mips64);
}
