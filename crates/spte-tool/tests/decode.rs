// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `spte decode`: what it says of entries that were taken from manuals and logs, and that it says something of any.

mod common;

use common::spte;
use proptest::prelude::*;
use serde_json::Value;

const FORMATS: [&str; 4] = ["ept", "npt", "x86-64", "x86-64-la57"];

fn decode(words: &str) -> String {
    let words: Vec<&str> = ["decode", "--format"].into_iter().chain(words.split(' ')).collect();
    let (status, out, err) = spte(&words, b"");
    assert_eq!((status, err.as_str()), (0, ""));
    out
}

fn json(words: &str) -> Value {
    serde_json::from_str(&decode(&format!("{words} --json"))).unwrap()
}

#[test]
fn every_field_is_named_and_explained() {
    assert_eq!(
        decode("ept --level 1 0x8600000005010b77"),
        "8600000005010b77\n  \
         L1: a leaf of 4k at 0x5010000, rwx, WB, write back, accessed, dirty, writable\n        \
             0  Read access = 1: reads are allowed\n        \
             1  Write access = 1: writes are allowed\n        \
             2  Execute access = 1: instruction fetches are allowed\n      \
           5:3  EPT memory type = 0x6: WB, write back\n        \
             6  Ignore PAT memory type = 1: the memory type above holds\n        \
             8  Accessed = 1: was used\n        \
             9  Dirty = 1: was written\n       \
            11  MMU-present (software) = 1: memory or a table is behind the entry\n    \
         51:12  Physical address = 0x5010: 0x5010000\n    \
         53:52  accessed/dirty type (software) = 0x0: hardware sets accessed and dirty\n       \
            57  host-writable (software) = 1: slot and host mapping allow writing\n       \
            58  MMU-writable (software) = 1: W may be set by one compare-exchange\n       \
            63  Suppress #VE = 1: violations are exits\n"
    );
    let link = decode("npt --level 4 0000000012345827");
    assert!(link.starts_with("0000000012345827\n  L4: a link to the table at 0x12345000, rwx, user\n"), "{link}");
    let huge = decode("x86-64 --level 2 0x80000000402010bd");
    assert!(
        huge.contains("a leaf of 2m at 0x40200000, r, user, PAT selector 7 (after reset: UC, uncacheable)"),
        "{huge}"
    );
    assert!(huge.contains("       12  PAT = 1: bit 2 of the PAT selector is 1\n"), "{huge}");
}

#[test]
fn an_impossible_entry_names_the_rule_it_breaks() {
    let rule = |words: &str, rule: &str| {
        let out = decode(words);
        assert!(out.contains(&format!("    rule broken: {rule}\n")), "{words}: {out}");
        assert!(out.contains(": impossible: "), "{words}: {out}");
    };
    rule("ept --level 1 0x5002", "an entry that is not readable must not be writable (bits 0x2)");
    rule("ept --level 1 0x501f", "memory types 2, 3 and 7 are reserved (bits 0x38)");
    rule("ept --level 2 0x5041", "bits 6:3 of a link are reserved (bits 0x40)");
    rule("ept --level 2 0x10b1", "address bits below the size of the page are reserved (bits 0x1000)");
    rule("ept --level 4 0x81", "bit 7 is reserved at levels 4 and 5 (bits 0x80)");
    rule(
        "npt --level 1 --pa-bits 40 0x10000000027",
        "address bits above the physical address width are reserved (bits 0x10000000000)",
    );
    rule("npt --level 1 0x5023", "nested accesses are user accesses: U/S must be set (bits 0x4)");
    // The processor takes it, and this workspace never writes it.
    let out = decode("ept --level 1 0x0000000000005877");
    assert!(
        out.contains("    software rule broken: W needs MMU-writable, and MMU-writable needs host-writable"),
        "{out}"
    );
}

#[test]
fn what_is_not_present_is_told_apart() {
    let says = |words: &str, what: &str| {
        let out = decode(words);
        assert!(out.lines().nth(1).is_some_and(|line| line.ends_with(what)), "{words}: {out}");
    };
    says("ept 0x8000000000000000", "L1 L2 L3 L4: not present: nothing is here");
    says("x86-64-la57 0x0", "L1 L2 L3 L4 L5: not present: nothing is here");
    says("ept 0xd540000000000000", "not present: claimed by an operation that is deciding what goes here");
    says("npt 0xaa20000000000000", "not present: an entry of a table that was unlinked");
    says("npt 0x1234000", "not present: hardware looks at nothing but bit 0");
    // Linux's marker for emulated devices: W and X without R on Intel, bit 51 with P on AMD.
    says(
        "ept --level 1 0x00000000fee0012e",
        "impossible: an MMIO marker for 0xfee00000, generation 37: every access is meant to fault",
    );
    says(
        "npt --pa-bits 48 --level 1 0x00080000fee00007",
        "an MMIO marker for 0xfee00000, generation 0: every access is meant to fault",
    );
    // Aged where hardware has no accessed bit: R and X are saved.
    let tracked = decode("ept --level 1 0x8750000005010870");
    assert!(tracked.contains("aged by taking its rights away"), "{tracked}");
    assert!(tracked.contains("       54  saved R (software) = 1"), "{tracked}");
}

#[test]
fn values_are_hex_and_several() {
    let (status, out, _) = spte(&["decode", "--format", "ept", "--level", "1", "0x0", "8000000000000000", "0X1"], b"");
    assert_eq!((status, out.as_str()), (2, ""));
    let out = decode("ept --level 1 0x0 8000000000000000");
    assert_eq!(
        out.lines().filter(|line| !line.starts_with(' ')).collect::<Vec<_>>(),
        ["0000000000000000", "8000000000000000"]
    );
    for wrong in ["0x", "1234", "0x12345678123456781", "800000000000000g", "+800000000000000", "é800000000000000"] {
        let (status, out, err) = spte(&["decode", "--format", "ept", wrong], b"");
        assert_eq!((status, out.as_str()), (2, ""), "{wrong}");
        assert!(err.contains("is no entry"), "{err}");
    }
    let (status, _, err) = spte(&["decode", "--format", "ept", "--level", "5", "0x0"], b"");
    assert_eq!((status, err.as_str()), (2, "spte: format ept has no level 5\n"));
}

#[test]
fn formats_and_options_that_are_not_there_are_exit_status_2() {
    for format in ["ppc-radix", "ppc-hpt", "mips64"] {
        for command in [&["decode", "--mask"][..], &["run"], &["dump", "--root", "0", "/dev/null"]] {
            let words: Vec<&str> = command.iter().copied().chain(["--format", format]).collect();
            let expected = (2, String::new(), format!("spte: format {format} is not built yet\n"));
            assert_eq!(spte(&words, b""), expected);
        }
    }
    for wrong in [
        "--format sparc",
        "",
        "--format ept --granule 64k",
        "--format ept --levels 3",
        "--format x86-64-la57 --levels 4",
        "--format npt --levels 4 --ipa-bits 49",
        "--format npt --ipa-bits 58",
        "--format npt --ipa-bits 11",
        "--format npt --pa-bits 53",
        "--format npt --pa-bits 31",
        "--format npt --hw-ad=perhaps",
    ] {
        let words: Vec<&str> = ["run"].into_iter().chain(wrong.split(' ').filter(|word| !word.is_empty())).collect();
        let (status, out, err) = spte(&words, b"stats\n");
        assert_eq!((status, out.as_str()), (2, ""), "{wrong}");
        assert!(!err.is_empty(), "{wrong}");
    }
}

/// Every raw entry that is likely to be near something.
fn entry() -> impl Strategy<Value = u64> {
    prop_oneof![
        any::<u64>(),
        (any::<u64>(), any::<u64>(), any::<u64>()).prop_map(|(a, b, c)| a & b & c),
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b & 0xfff0_0000_0000_0fff | 0x4000_0000),
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b | 0x827),
        (0_u32..64).prop_map(|bit| 1 << bit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn any_entry_is_explained_to_the_last_bit(
        raw in entry(), format in prop::sample::select(&FORMATS[..]), level in prop::option::of(1_i8..=4), pa_bits in 32_u32..=52
    ) {
        let level = level.map_or(String::new(), |level| format!("--level {level} "));
        let options = format!("{format} --pa-bits {pa_bits} {level}{raw:#x}");
        let heading = format!("{raw:016x}\n  L");
        prop_assert!(decode(&options).starts_with(&heading));
        let object = json(&options);
        let mut levels = Vec::new();
        for reading in object["readings"].as_array().unwrap() {
            levels.extend(reading["levels"].as_array().unwrap().iter().map(|level| level.as_i64().unwrap()));
            let mut covered = 0_u64;
            for field in reading["fields"].as_array().unwrap() {
                let (high, low) = (field["high"].as_u64().unwrap(), field["low"].as_u64().unwrap());
                let mask = (u64::MAX >> (63 - high)) & (u64::MAX << low);
                prop_assert_eq!(covered & mask, 0, "two names for one bit: {}", field);
                covered |= mask;
                let value = u64::from_str_radix(field["value"].as_str().unwrap().trim_start_matches("0x"), 16).unwrap();
                prop_assert_eq!(value, (raw & mask) >> low);
                prop_assert_ne!(field["meaning"].as_str().unwrap(), "", "{}", field);
            }
            prop_assert_eq!(raw & !covered, 0, "bits without a name: {}", reading);
            prop_assert_eq!(reading["kind"] == "impossible", !reading["rule_broken"].is_null());
        }
        levels.sort_unstable();
        let top = if format == "x86-64-la57" { 5 } else { 4 };
        prop_assert_eq!(levels, if level.is_empty() { (1..=top).collect() } else { vec![level[8..9].parse().unwrap()] });
    }

    #[test]
    fn any_words_are_no_panic(words in prop::collection::vec(prop_oneof![
        prop::sample::select(vec![
            "decode", "run", "dump", "completions", "help", "--format", "ept", "npt", "arm64-s2", "--json", "--mask", "--level",
            "-1", "1", "9", "--levels", "4", "5", "--hw-ad", "off", "--ipa-bits", "--pa-bits", "--granule", "64k", "--root", "0",
            "--base", "0xffffffffffffffff", "/dev/null", "bash", "--help", "0x77", "--limit",
        ]).prop_map(String::from),
        "[ -~]{0,20}",
    ], 0..8)) {
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let (status, _, _) = spte(&words, b"stats\n");
        prop_assert!(status == 0 || status == 2);
    }
}
