// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every committed input through its target: seeds in `corpus/`, inputs that once failed in `regressions/`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use secondary_mmu_fuzz::TARGETS;

fn inputs(kind: &str, target: &str) -> Vec<PathBuf> {
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join(kind).join(target);
    let Ok(files) = fs::read_dir(&place) else { return Vec::new() };
    let mut paths: Vec<_> = files.map(|file| file.expect("a file").path()).collect();
    paths.sort();
    paths
}

fn replayed(kind: &str, target: &str) -> usize {
    let target = TARGETS.iter().find(|known| known.name == target).expect("a target");
    let paths = inputs(kind, target.name);
    for path in &paths {
        // Where it fails, the last line printed names it.
        println!("{}", path.display());
        (target.run)(&fs::read(path).expect("an input"));
    }
    paths.len()
}

macro_rules! corpora {
    ($($name:ident: $target:literal,)*) => {
        $(
            #[test]
            fn $name() {
                assert!(replayed("corpus", $target) >= 5, "hardly any seeds");
                replayed("regressions", $target);
            }
        )*

        #[test]
        fn every_target_is_replayed() {
            let here = [$($target),*];
            let known: Vec<_> = TARGETS.iter().map(|target| target.name).collect();
            assert_eq!(here.as_slice(), known.as_slice());
        }
    };
}

corpora! {
    seeds_hold_in_decode: "decode",
    seeds_hold_in_script: "script",
    seeds_hold_in_protocol: "protocol",
    seeds_hold_in_ept: "ept",
    seeds_hold_in_npt: "npt",
    seeds_hold_in_x86_64: "x86_64",
    seeds_hold_in_la57: "la57",
    seeds_hold_in_arm64_s2: "arm64_s2",
    seeds_hold_in_ppc_radix: "ppc_radix",
    seeds_hold_in_mips64: "mips64",
    seeds_hold_in_out_of_memory: "out_of_memory",
}

#[test]
fn every_target_has_a_program_and_every_corpus_a_target() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let manifest = fs::read_to_string(root.join("Cargo.toml")).expect("a manifest");
    for target in TARGETS {
        assert!(manifest.contains(&format!("path = \"fuzz_targets/{}.rs\"", target.name)), "{}", target.name);
        assert!(root.join("fuzz_targets").join(format!("{}.rs", target.name)).exists(), "{}", target.name);
    }
    for kind in ["corpus", "regressions", "fuzz_targets"] {
        let Ok(entries) = fs::read_dir(root.join(kind)) else { continue };
        for entry in entries {
            let path = entry.expect("an entry").path();
            let name = path.file_stem().and_then(|name| name.to_str()).expect("a name").to_owned();
            assert!(TARGETS.iter().any(|target| target.name == name), "{} belongs to no target", path.display());
        }
    }
}

#[test]
fn inputs_of_any_length_mean_something() {
    for target in TARGETS {
        for len in 0..24 {
            for byte in [0, 1, 0x55, 0xff] {
                (target.run)(&vec![byte; len]);
            }
        }
    }
}
