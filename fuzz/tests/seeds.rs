// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The seeds reach what the targets are about: a law that is asked of nothing holds.

use std::{collections::BTreeMap, fs, path::Path};

use secondary_mmu_fuzz::decode::{self, Seen};

fn corpus(target: &str) -> impl Iterator<Item = Vec<u8>> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target);
    fs::read_dir(place).expect("a corpus").map(|file| fs::read(file.expect("a file").path()).expect("an input"))
}

#[test]
fn every_kind_of_entry_of_every_format_is_looked_at() {
    let mut all: BTreeMap<&str, Seen> = BTreeMap::new();
    for seen in corpus("decode").map(|data| decode::look(&data)) {
        let Some(format) = seen.format else { continue };
        let sum = all.entry(format).or_default();
        sum.leaves += seen.leaves;
        sum.links += seen.links;
        sum.others += seen.others;
        sum.refused += seen.refused;
    }
    for format in ["ept", "ept-5level", "npt", "npt-5level", "x86-64", "x86-64-la57", "arm64-s2", "ppc-radix", "mips64"]
    {
        let seen = all.get(format).unwrap_or_else(|| panic!("no seed is of {format}: {all:?}"));
        let enough = seen.leaves >= 3 && seen.links >= 1 && seen.others >= 1 && seen.refused >= 1;
        assert!(enough, "{format}: {seen:?}");
    }
}
