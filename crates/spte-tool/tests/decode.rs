// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `spte decode`: what it says of entries that were taken from manuals and logs, and that it says something of any.

mod common;

use common::spte;
use proptest::prelude::*;
use serde_json::Value;

/// With the numbers of their levels.
const FORMATS: [(&str, std::ops::RangeInclusive<i64>); 13] = [
    ("ept", 1..=4),
    ("npt", 1..=4),
    ("x86-64", 1..=4),
    ("x86-64-la57", 1..=5),
    ("arm64-s2", 1..=3),
    ("arm64-s2 --ipa-bits 48 --hw-ad", 0..=3),
    ("arm64-s2 --ipa-bits 52 --levels 5", -1..=3),
    ("arm64-s2 --granule 16k --ipa-bits 48 --hw-ad", 1..=3),
    ("arm64-s2 --granule 64k --ipa-bits 48", 1..=3),
    ("ppc-radix", 1..=4),
    ("ppc-radix --granule 64k", 1..=4),
    ("mips64", 1..=4),
    ("mips64 --granule 64k --ipa-bits 42", 1..=2),
];

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

/// Of KVM's table for 64-bit MIPS.
#[test]
fn every_field_of_mips_is_named_and_explained() {
    assert_eq!(
        decode("mips64 --level 1 0x12345a11"),
        "0000000012345a11\n  \
         L1: a page of 4k at 0x12345000, r, cached, coherent, exclusive on write, old, read-only\n        \
             0  PRESENT (software) = 1: a page\n        \
             1  WRITE (software) = 0: the host must be asked\n        \
             2  ACCESSED (software) = 0: was not used\n        \
             3  MODIFIED (software) = 0: was not written\n        \
             4  XI = 1: no instruction fetches\n        \
             5  RI = 0: reads are allowed\n        \
             6  G = 0: of one guest\n        \
             7  V = 0: any access is a TLB Invalid exception\n        \
             8  D = 0: a store is a TLB Modified exception\n     \
          11:9  C = 0x5: cached, coherent, exclusive on write\n    \
         47:12  PFN = 0x12345: 0x12345000\n"
    );
    let lines = |words: &str| decode(words).lines().skip(1).take(2).map(str::trim).collect::<Vec<_>>().join("\n");
    let software = "a page of 4k at 0x12345000, rx, write-through, accessed, read-only\n\
        software rule broken: V without PRESENT: hardware would load what nobody mapped (bits 0x80)";
    assert_eq!(lines("mips64 --level 1 0x12345080"), format!("L1: {software}"));
    assert_eq!(
        lines("mips64 --level 2 0x9800000012345000"),
        "L2: a link to the table at 0x12345000\n63:0  Address = 0x9800000012345000: xkphys, cached, non-coherent"
    );
    let zero = "L3: impossible: a link to the table at 0x0\n\
        rule broken: an empty entry of a directory leads to a sentinel: zero would be followed too (bits 0xffffffffffffffff)";
    assert_eq!(lines("mips64 --level 3 0x0"), zero);
}

/// Of arm64 stage 2. The entries are those of a KVM guest's log, and of our own tables.
#[test]
fn every_field_of_arm64_is_named_and_explained() {
    assert_eq!(
        decode("arm64-s2 --level 3 0x4000008000177f"),
        "004000008000177f\n  \
         L3: a page of 4k at 0x80001000, r, Normal write-back, inner shareable, accessed\n        \
             0  Valid = 1: valid\n        \
             1  Descriptor type = 1: a page\n      \
           5:2  MemAttr[3:0] = 0xf: Normal write-back\n      \
           7:6  S2AP[1:0] = 0x1: reads are allowed\n      \
           9:8  SH[1:0] = 0x3: inner shareable\n       \
            10  AF = 1: was used\n    \
         47:12  Output address = 0x80001: 0x80001000\n    \
         54:53  XN[1:0] = 0x2: no instruction fetches\n"
    );
    let heading = |words: &str| String::from(decode(words).lines().nth(1).unwrap());
    assert_eq!(
        heading("arm64-s2 --level 2 0x400000090007c5"),
        "  L2: a block of 2m at 0x9000000, rw, Device-nGnRE, inner shareable, accessed"
    );
    assert_eq!(heading("arm64-s2 --level 1 0000000012345003"), "  L1: a link to the table at 0x12345000");
    assert_eq!(
        heading("arm64-s2 --granule 64k --pa-bits 52 --level 3 0x80001234f7ff"),
        "  L3: a page of 64k at 0xf800012340000, rwx, Normal write-back, inner shareable, accessed"
    );
    assert_eq!(
        heading("arm64-s2 --ipa-bits 52 --pa-bits 52 --level 3 0x28000123457ff"),
        "  L3: a page of 4k at 0xe800012345000, rwx, Normal write-back, accessed",
        "bits 9:8 are address bits, and shareability is VTCR_EL2's"
    );
    assert_eq!(
        heading("arm64-s2 --granule 16k --pa-bits 52 --level 2 0x3000012344303"),
        "  L2: a link to the table at 0xf000012344000"
    );
    let highest = "arm64-s2 --ipa-bits 52 --levels 5 --level -1 0x12345003";
    assert_eq!(heading(highest), "  L-1: a link to the table at 0x12345000");
    assert_eq!(json(highest)["readings"][0]["levels"], serde_json::json!([-1]));
    // MemAttr is read without FWB; what it is with it is said too.
    let forced = decode("arm64-s2 --level 3 0x800017db");
    let words = "5:2  MemAttr[3:0] = 0x6: Normal, outer non-cacheable, inner write-through (with HCR_EL2.FWB: Normal write-back)\n";
    assert!(forced.contains(words), "{forced}");
    // Where hardware records writes DBM allows them, and bit 7 says that one was made.
    let state = |words: &str| heading(words).split(", ").skip(4).map(String::from).collect::<Vec<_>>().join(", ");
    assert_eq!(
        state("arm64-s2 --level 3 --hw-ad 0x010800008000177f"),
        "accessed, clean, writable, hardware records the first write"
    );
    assert_eq!(state("arm64-s2 --level 3 --hw-ad 0x01080000800017ff"), "accessed, dirty, writable");
    assert_eq!(
        state("arm64-s2 --level 3 0x010000008000137f"),
        "old, writing withheld: one compare-exchange brings it back"
    );
    assert_eq!(state("arm64-s2 --level 3 0x020000008000177f"), "accessed, read-only");
    // XN as FEAT_XNX has it.
    assert!(heading("arm64-s2 --level 3 0x2000008000177f").contains(", rx (executes at EL0 alone), "));
    assert!(heading("arm64-s2 --level 3 0x6000008000177f").contains(", rx (executes at EL1 alone), "));
}

/// Of Power's radix trees. Bits are counted from the least significant one.
#[test]
fn every_field_of_a_radix_entry_is_named_and_explained() {
    assert_eq!(
        decode("ppc-radix --level 1 0xc000000123456987"),
        "c000000123456987\n  \
         L1: a leaf of 4k at 0x123456000, rwx, normal memory, referenced, changed, writable\n      \
           3:0  EAA = 0x7: loads and stores are allowed, instruction fetches too\n      \
           5:4  ATT = 0x0: normal memory\n        \
             7  C = 1: was written\n        \
             8  R = 1: was used\n       \
            11  SW: upgradable = 1: here: writing may be granted by one compare-exchange (Linux: devmap)\n    \
         56:12  RPN = 0x123456: 0x123456000\n       \
            62  L = 1: a leaf\n       \
            63  V = 1: valid\n"
    );
    assert_eq!(
        decode("ppc-radix --granule 64k --level 2 0x8000000034567105"),
        "8000000034567105\n  \
         L2: a link to the table at 0x34567100, of 2^5 entries\n      \
           4:0  NLS = 0x5: the next table has 2^5 entries\n     \
          59:8  NLB = 0x345671: 0x34567100\n       \
            62  L = 0: a directory entry\n       \
            63  V = 1: valid\n"
    );
    let heading = |words: &str| decode(&format!("ppc-radix {words}")).lines().nth(1).unwrap().to_owned();
    assert_eq!(
        heading("--granule 64k --level 3 0xc000000040000126"),
        "  L3: a leaf of 1g at 0x40000000, rw, non-idempotent I/O, referenced, clean"
    );
    assert!(heading("--level 1 0xc000000000005802").contains(" at 0x5000, rw, "), "writing is reading too");
    assert!(heading("--level 1 0xc000000000001904").ends_with("writing withheld: one compare-exchange brings it back"));
    assert!(heading("--level 1 0xc00000000000111c").contains("strong access order"));
    assert!(decode("ppc-radix --level 1 0xc00000000000110c").contains("privileged, which says nothing here"));
}

#[test]
fn an_impossible_radix_entry_names_the_rule_it_breaks() {
    let says = |words: &str, rule: &str| {
        let out = decode(&format!("ppc-radix {words}"));
        assert!(out.lines().nth(1).unwrap().contains(": impossible: "), "{out}");
        assert!(out.lines().any(|line| line == format!("    rule broken: {rule}")), "{out}");
    };
    let nls = "NLS is not the size of the next table in the one shape of tree that there is (bits 0x1f)";
    says("--level 2 0x8000000034567005", nls);
    says("--granule 64k --level 2 0x8000000034567009", nls);
    says("--level 2 0x8000000034567109", "a table is aligned to its own size (bits 0x100)");
    let reserved = "IBM bits 2:3 and 56:58 of a directory entry are reserved (bits 0x20)";
    says("--level 2 0x8000000034567029", reserved);
    says("--level 1 0x8000000034567009", "an entry of level 1 that is valid is a leaf (bits 0x4000000000000000)");
    says("--level 4 0xc000000000000105", "this level has no leaves (bits 0x4000000000000000)");
    says("--level 1 0xc200000000000105", "IBM bits 3:6 and 57 of a leaf are reserved (bits 0x200000000000000)");
    let wide = "address bits above the physical address width (bits 0x10000000000000)";
    says("--level 1 0xc010000000000105", wide);
    says("--level 2 0x8010000034567009", wide);
    // What processors take and this workspace never writes; asked where the entry may be this workspace's.
    let out = decode("ppc-radix --level 1 0xc000000000000a05");
    assert!(out.contains("    software rule broken: IBM bits 2 and 54 are nobody's (bits 0x200)\n"), "{out}");
    assert!(!decode("ppc-radix --level 1 0xc000000000000205").contains("rule"));
}

#[test]
fn an_impossible_entry_of_arm64_names_the_rule_it_breaks() {
    let rule = |words: &str, rule: &str| {
        let out = decode(&format!("arm64-s2 {words}"));
        assert!(out.contains(&format!("    rule broken: {rule}\n")), "{words}: {out}");
        assert!(out.contains(": impossible: "), "{words}: {out}");
    };
    rule("--level 3 0x800017fd", "an entry of level 3 that is valid is a page: bit 1 must be set (bits 0x2)");
    rule(
        "--level 0 --ipa-bits 48 0x7fd",
        "this level has no blocks with this granule and these address bits (bits 0x2)",
    );
    rule(
        "--level 1 --granule 16k --ipa-bits 48 0x7fd",
        "this level has no blocks with this granule and these address bits (bits 0x2)",
    );
    rule("--level 3 0x713", "MemAttr values 4, 8 and 12 are reserved (bits 0x3c)");
    rule("--level 3 0x57f", "SH value 1 is reserved (bits 0x300)");
    rule("--level 2 0x17fd", "bits between the attributes and the output address are RES0 (bits 0x1000)");
    rule("--level 3 --granule 64k 0x17ff", "bits between the attributes and the output address are RES0 (bits 0x1000)");
    rule("--level 3 0x400000000077f", "bits 50:48 that hold no output address are RES0 (bits 0x4000000000000)");
    rule(
        "--level 3 --pa-bits 40 0x1000000077f",
        "address bits above the physical address width (an address size fault) (bits 0xfffffffff000)",
    );
    rule(
        "--level 1 --granule 16k --ipa-bits 47 0x1003",
        "bits between the attributes and the output address are RES0 (bits 0x1000)",
    );
    // The processor takes it, and this workspace never writes it: bit 56 says that the entry is from here.
    let out = decode("arm64-s2 --level 3 0x0100000080001fff");
    assert!(out.contains("    software rule broken: no leaf of this crate has FnXS (bits 0x800)\n"), "{out}");
    let out = decode("arm64-s2 --level 3 0x011000008000177f");
    assert!(
        out.contains("    software rule broken: an armed leaf is in no contiguous set (bits 0x10000000000000)\n"),
        "{out}"
    );
    let out = decode("arm64-s2 --level 3 0x0000000080001fff");
    assert!(!out.contains("broken"), "{out}");
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
    says("npt 0xa230000000000000", "not present: an entry of a table that was unlinked");
    says("npt 0x1234000", "not present: hardware looks at nothing but bit 0");
    says("arm64-s2 --ipa-bits 48 0x0", "L3 L2 L1 L0: not present: nothing is here");
    says("ppc-radix 0x0", "L1 L2 L3 L4: not present: nothing is here");
    says("ppc-radix 0x0000000000000180", "not present: nothing is here; R or C came late");
    says("ppc-radix 0x1c00000000000600", "not present: claimed by an operation that is deciding what goes here");
    says("ppc-radix 0x0300000000000860", "not present: an entry of a table that was unlinked");
    says("ppc-radix 0x6000000000005187", "not present: hardware looks at nothing but V");
    says("arm64-s2 0x9540000000000000", "not present: claimed by an operation that is deciding what goes here");
    says("arm64-s2 0x6830000000000000", "not present: an entry of a table that was unlinked");
    says("arm64-s2 0x5000000000007000", "not present: the page belongs to owner 7");
    says("arm64-s2 0x1000000000000000", "not present: hardware looks at nothing but bit 0");
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
    for format in ["ppc-hpt"] {
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
        "--format arm64-s2 --granule 8k",
        "--format arm64-s2 --ipa-bits 31",
        "--format arm64-s2 --ipa-bits 53",
        "--format arm64-s2 --ipa-bits 300",
        "--format arm64-s2 --pa-bits 31",
        "--format arm64-s2 --pa-bits 53",
        "--format arm64-s2 --levels 0",
        "--format arm64-s2 --levels 2",
        "--format arm64-s2 --levels 5",
        "--format arm64-s2 --levels 6",
        "--format arm64-s2 --granule 16k --levels 4 --ipa-bits 48",
        "--format ppc-radix --granule 16k",
        "--format ppc-radix --levels 3",
        "--format ppc-radix --ipa-bits 53",
        "--format ppc-radix --ipa-bits 11",
        "--format ppc-radix --granule 64k --ipa-bits 15",
        "--format ppc-radix --pa-bits 31",
        "--format ppc-radix --pa-bits 58",
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
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b & a.rotate_left(7) | 0x77d),
        (0_u32..64).prop_map(|bit| 1 << bit | 1),
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b & a.rotate_left(7) | 0xc000_0000_0000_0105),
        (any::<u64>(), any::<u64>()).prop_map(|(a, b)| a & b & a.rotate_left(7) & !0xe0 | 0x8000_0000_0000_0005),
        (0_u32..64).prop_map(|bit| 1 << bit),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 1024, ..ProptestConfig::default() })]

    #[test]
    fn any_entry_is_explained_to_the_last_bit(
        raw in entry(), (format, all) in prop::sample::select(&FORMATS[..]), level in prop::option::of(any::<prop::sample::Index>()),
        pa_bits in 32_u32..=52
    ) {
        let all: Vec<i64> = all.collect();
        let number = level.map(|level| *level.get(&all));
        let level = number.map_or(String::new(), |number| format!("--level {number} "));
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
        prop_assert_eq!(levels, number.map_or(all, |number| vec![number]));
    }

    #[test]
    fn any_words_are_no_panic(words in prop::collection::vec(prop_oneof![
        prop::sample::select(vec![
            "decode", "run", "dump", "completions", "help", "--format", "ept", "npt", "arm64-s2", "ppc-radix", "mips64", "16k", "--json", "--mask", "--level",
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
