// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `spte dump`: tables in images that somebody else made, right or wrong.

mod common;

use std::io::Write;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use common::{Ran, spte};
use proptest::prelude::*;

/// An image in a file that goes with it.
struct Image(PathBuf);

impl Image {
    fn new(bytes: &[u8]) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("spte-image-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        std::fs::File::create(&path).unwrap().write_all(bytes).unwrap();
        Self(path)
    }

    fn dump(&self, options: &str) -> Ran {
        let words: Vec<&str> = ["dump", "--format"].into_iter().chain(options.split(' ')).collect();
        spte(&[&words[..], &[self.0.to_str().unwrap()]].concat(), b"")
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Pages with these entries: page, index, value.
fn pages(count: usize, entries: &[(usize, usize, u64)]) -> Vec<u8> {
    let mut bytes = vec![0; count * 4096];
    for (page, index, value) in entries {
        let at = page * 4096 + index * 8;
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

/// Somebody else's EPT at 4G, its root in the third page: none of our software bits.
fn somebodys() -> Vec<u8> {
    pages(
        5,
        &[
            (2, 0, 0x1_0000_0007),
            (2, 511, 0x1_0000_0107),
            (0, 1, 0x2_4000_00b7),
            (0, 2, 0x1_0000_1007),
            (1, 3, 0x1_0000_3007),
            (3, 0, 0x5037),
            (3, 511, 0x0030_0000_0000_6171),
        ],
    )
}

#[test]
fn a_table_is_printed_as_hardware_reads_it() {
    let image = Image::new(&somebodys());
    assert_eq!(
        image.dump("ept --root 0x100002000 --base 0x100000000"),
        (
            0,
            "L4 0x0 0000000000000007\nL3 0x40000000 00000002400000b7\nL3 0x80000000 0000000000000007\n\
             L2 0x80600000 0000000000000007\nL1 0x80600000 0000000000005037\nL1 0x807ff000 0000000000006171\n\
             L4 0xff8000000000 0000000000000107\nL3 0xff8040000000 00000002400000b7\nL3 0xff8080000000 0000000000000007\n\
             L2 0xff8080600000 0000000000000007\nL1 0xff8080600000 0000000000005037\nL1 0xff80807ff000 0000000000006171\n\
             end 12\n"
                .into(),
            String::new()
        )
    );
    let raw = image.dump("ept --root 0x100002000 --base 0x100000000 --raw --limit 12").1;
    assert!(raw.starts_with("L4 0x0 0000000100000007\n"), "{raw}");
    assert!(raw.contains("L1 0x807ff000 0030000000006171\n"), "{raw}");
    let json = image.dump("ept --root 0x100002000 --base 0x100000000 --json").1;
    let first: serde_json::Value = serde_json::from_str(json.lines().next().unwrap()).unwrap();
    let expected =
        serde_json::json!({ "level": 4, "gpa": "0x0", "raw": "0000000000000007", "kind": "table", "trouble": null });
    assert_eq!(first, expected);
    assert_eq!(json.lines().count(), 12);
}

/// Somebody else's stage 2, as Linux lays it out: 40 bits are two tables of 4K side by side.
#[test]
fn a_root_of_several_tables_is_one_table() {
    // Pages 0 and 1 are the root, 2 and 3 tables below, 4 is a root above.
    let entries = [
        (0, 1, 0x3000_2003),
        (0, 511, 0x0040_00ff_c000_07c5),
        (1, 0, 0x9_4000_07fd),
        (1, 511, 0x3000_2003),
        (2, 3, 0x3000_3003),
        (2, 511, 0x0040_0000_0020_077d),
        (3, 0, 0x0180_0000_8000_17ff),
        (3, 511, 0x0000_0000_8000_2777),
        (3, 510, 0x5000_0000_0000_7000),
        (4, 0, 0x3000_0003),
        (4, 1, 0x3000_1003),
    ];
    let image = Image::new(&pages(5, &entries));
    let below = |base: u64| {
        format!(
            "L2 {:#x} 0000000000000003\nL3 {:#x} 00000000800017ff\nL3 {:#x} 0000000000000000\nL3 {:#x} 0000000080002777\n\
             L2 {:#x} 004000000020077d\n",
            base + 0x60_0000,
            base + 0x60_0000,
            base + 0x7f_e000,
            base + 0x7f_f000,
            base + 0x3fe0_0000,
        )
    };
    assert_eq!(
        image.dump("arm64-s2 --root 0x30000000 --base 0x30000000"),
        (
            0,
            format!(
                "L1 0x40000000 0000000000000003\n{}L1 0x7fc0000000 004000ffc00007c5\n\
                 L1 0x8000000000 00000009400007fd\nL1 0xffc0000000 0000000000000003\n{}end 14\n",
                below(0x4000_0000),
                below(0xff_c000_0000),
            ),
            String::new()
        )
    );
    // Nothing is masked where it is asked for raw.
    let raw = image.dump("arm64-s2 --root 0x30000000 --base 0x30000000 --raw").1;
    assert!(raw.contains("L3 0x40600000 01800000800017ff\nL3 0x407fe000 5000000000007000\n"), "{raw}");
    // The root is aligned to all of its tables; and 39 bits have one.
    let (status, out, err) = image.dump("arm64-s2 --root 0x30001000 --base 0x30000000");
    assert_eq!((status, out.as_str()), (2, ""));
    assert_eq!(err, "spte: the root 0x30001000 is not aligned to 0x2000 bytes\n");
    let (status, out, _) = image.dump("arm64-s2 --ipa-bits 39 --root 0x30001000 --base 0x30000000");
    assert_eq!((status, out.lines().next()), (0, Some("L1 0x0 00000009400007fd")));
    // Walks that begin a level higher: the same two tables, each behind a link.
    let (status, out, _) = image.dump("arm64-s2 --levels 4 --root 0x30004000 --base 0x30000000");
    let rows = |options: &str| {
        let rows = image.dump(&format!("arm64-s2 {options} --base 0x30000000")).1;
        rows.lines().map(String::from).filter(|row| row.starts_with('L')).collect::<Vec<_>>()
    };
    let mut expected = rows("--root 0x30000000");
    expected.insert(0, "L0 0x0 0000000000000003".into());
    expected.insert(8, "L0 0x8000000000 0000000000000003".into());
    assert_eq!((status, out.lines().last()), (0, Some("end 16")));
    assert_eq!(rows("--levels 4 --root 0x30004000"), expected);
}

/// Of the 64K granule, with addresses of 52 bits in links and leaves.
#[test]
fn addresses_of_52_bits_are_followed() {
    const BASE: u64 = 0xf_1234_5678_0000;
    let mut bytes = vec![0; 2 * 0x1_0000];
    let mut put = |at: usize, value: u64| bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
    // PA[51:48] stands in bits 15:12.
    put(0, 0x1234_5679_f003);
    put(8, 0x4000_0000_17fd);
    put(0x1_0000 + 8 * 8191, 0x8000_1234_f7ff);
    let image = Image::new(&bytes);
    let options = format!("arm64-s2 --granule 64k --pa-bits 52 --root {BASE:#x} --base {BASE:#x}");
    assert_eq!(
        image.dump(&options),
        (
            0,
            "L2 0x0 0000000000000003\nL3 0x1fff0000 000080001234f7ff\nL2 0x20000000 00004000000017fd\nend 3\n".into(),
            String::new()
        )
    );
}

#[test]
fn impossible_entries_are_shown_with_their_rule_and_not_followed() {
    let image = Image::new(&pages(2, &[(0, 0, 0x1002), (0, 1, 0x1087), (0, 2, 0x1007), (1, 0, 0x4000)]));
    assert_eq!(
        image.dump("ept --root 0"),
        (
            0,
            "L4 0x0 0000000000001002 # impossible: an entry that is not readable must not be writable\n\
             L4 0x8000000000 0000000000001087 # impossible: bit 7 is reserved at levels 4 and 5\n\
             L4 0x10000000000 0000000000000007\nL3 0x10000000000 0000000000000000\nend 4\n"
                .into(),
            String::new()
        )
    );
}

#[test]
fn loops_in_the_image_end() {
    // The root links to itself 512 times; and through a second table.
    let mut entries: Vec<(usize, usize, u64)> = (0..512).map(|index| (0, index, 7)).collect();
    let image = Image::new(&pages(1, &entries));
    let (status, out, _) = image.dump("ept --root 0");
    assert_eq!((status, out.lines().count()), (0, 513));
    assert!(out.starts_with("L4 0x0 0000000000000007 # links back to the table at 0x0\n"), "{out}");
    entries = vec![(0, 0, 0x1007), (1, 0, 7), (1, 1, 0x1007)];
    let (status, out, _) = Image::new(&pages(2, &entries)).dump("ept --root 0");
    let expected = "L4 0x0 0000000000000007\nL3 0x0 0000000000000007 # links back to the table at 0x0\n\
        L3 0x40000000 0000000000000007 # links back to the table at 0x1000\nend 3\n";
    assert_eq!((status, out.as_str()), (0, expected));
}

#[test]
fn a_table_that_is_shared_many_times_ends_at_the_limit() {
    let all = |page: usize, to: u64| (0..512).map(move |index| (page, index, to | 7));
    let entries: Vec<_> = all(0, 0x1000).chain(all(1, 0x2000)).chain(all(2, 0x3000)).collect();
    let image = Image::new(&pages(4, &entries));
    let (status, out, err) = image.dump("ept --root 0 --limit 1000");
    assert_eq!((status, out.lines().count()), (2, 1000));
    assert_eq!(err, "spte: more than 1000 rows; the next is at 0x7ca00000\n");
}

#[test]
fn tables_outside_the_image_are_named() {
    let image = Image::new(&somebodys()[..0x3000 + 0x800]);
    let (status, out, err) = image.dump("ept --root 0x100002000 --base 0x100000000");
    assert_eq!(status, 2);
    let outside = "the table at 0x100003000 is outside the image, which has 0x100000000 to 0x100003800";
    assert!(out.contains(&format!("L2 0x80600000 0000000000000007 # {outside}\n")), "{out}");
    assert!(out.ends_with("end 8\n"), "the rest is shown: {out}");
    assert_eq!(err, format!("spte: {outside}\n"));
    let fails = |options: &str, why: &str| {
        assert_eq!(image.dump(options), (2, String::new(), format!("spte: {why}\n")));
    };
    fails("npt --root 0x10", "the root 0x10 is not aligned to 0x1000 bytes");
    fails("npt --root 0x4000", "the table at 0x4000 is outside the image, which has 0x0 to 0x3800");
    fails("npt --root 0 --base 0x1000", "the table at 0x0 is outside the image, which has 0x1000 to 0x4800");
    fails("npt --root 0 --base 0xfffffffffffff000", "an image of 0x3800 bytes from 0xfffffffffffff000 passes 64 bits");
    let (status, _, err) = spte(&["dump", "--format", "ept", "--root", "0", "/nowhere/at/all"], b"");
    assert_eq!(status, 2);
    assert!(err.starts_with("spte: /nowhere/at/all: "), "{err}");
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn any_image_is_no_panic(
        format in prop::sample::select(vec![
            "ept", "npt", "x86-64", "x86-64-la57", "arm64-s2", "arm64-s2 --ipa-bits 48", "arm64-s2 --granule 16k --ipa-bits 36",
            "ppc-radix", "ppc-radix --granule 64k", "mips64",
        ]),
        entries in prop::collection::vec((0_usize..6, 0_usize..512, 0_u64..8, any::<u64>(), any::<u64>()), 0..60),
        cut in 0_usize..6 * 4096, noise in prop::collection::vec((0_usize..6 * 4096, any::<u8>()), 0..20),
        root in prop_oneof![4 => (0_u64..6).prop_map(|page| page * 4096), 1 => any::<u64>()],
        base in prop_oneof![4 => Just(0_u64), 1 => any::<u64>()],
        json: bool,
    ) {
        // Mostly links among the pages, with some of the other bits.
        let entries: Vec<_> = entries
            .into_iter()
            .map(|(page, index, to, a, b)| (page, index, to << 12 | 7 | a & b & 0xfff0_0000_0000_0fff & (a >> 3)))
            .collect();
        let mut bytes = pages(6, &entries);
        for (at, byte) in noise {
            bytes[at] = byte;
        }
        bytes.truncate(6 * 4096 - cut / 2);
        let json = if json { " --json" } else { "" };
        let (status, out, err) = Image::new(&bytes).dump(&format!("{format} --root {root} --base {base} --limit 5000{json}"));
        prop_assert!(status == 0 || status == 2);
        prop_assert_eq!(err.is_empty(), status == 0);
        prop_assert!(out.lines().count() <= 5001);
        if json.is_empty() && status == 0 {
            let gpas = out.lines().filter(|row| row.starts_with('L')).map(|row| {
                u64::from_str_radix(&row.split(' ').nth(1).unwrap()[2..], 16).unwrap()
            });
            prop_assert!(gpas.is_sorted(), "{}", out);
        }
    }

    #[test]
    fn any_bytes_are_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..20_000), page in 0_u64..5) {
        let (status, _, _) = Image::new(&bytes).dump(&format!("x86-64 --root {} --limit 3000", page * 4096));
        prop_assert!(status == 0 || status == 2);
    }
}

/// Words as a big-endian processor stores them.
fn big_endian(count: usize, entries: &[(usize, usize, u64)]) -> Vec<u8> {
    pages(count, &entries.iter().map(|&(page, index, raw)| (page, index, raw.swap_bytes())).collect::<Vec<_>>())
}

/// R and C that a processor stored into an entry which was invalid by then make nothing of it.
#[test]
fn late_facts_alone_are_an_empty_entry() {
    // A root of 64K, and a table of each level below.
    let image = Image::new(&big_endian(
        19,
        &[
            (0, 0, 0x8000_0000_0001_0009),
            (0, 1, 0x100),
            (16, 0, 0x8000_0000_0001_1009),
            (17, 0, 0x8000_0000_0001_2009),
            (18, 3, 0x180),
            (18, 4, 0xc000_0000_0000_5105),
            (18, 5, 0x80),
        ],
    ));
    let rows = "L4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x0 8000000000000009\nL1 0x4000 c000000000005105\n\
        end 4\n";
    assert_eq!(image.dump("ppc-radix --root 0"), (0, rows.into(), String::new()));
}

/// A kernel's empty directories lead to tables of its own that hold nothing.
#[test]
fn tables_that_hold_nothing_are_named_and_left_out() {
    let link = |page: u64| 0x9800_0000_0000_0000 | page << 12;
    let (pmd, pte) = (6, 7);
    let mut entries: Vec<(usize, usize, u64)> = (0..1024).map(|index| (index / 512, index % 512, link(pmd))).collect();
    entries.extend((0..512).map(|index| (2, index, link(pte))));
    entries.extend((0..512).map(|index| (6, index, link(pte))));
    entries.retain(|&(page, index, _)| !matches!((page, index), (0, 1) | (2, 3)));
    entries.extend([(0, 1, link(2)), (2, 3, link(3)), (3, 4, 0x1234_578f)]);
    let image = Image::new(&big_endian(8, &entries));
    let rows =
        "L3 0x40000000 9800000000000000\nL2 0x40600000 9800000000000000\nL1 0x40604000 0000000012345780\nend 3\n";
    let named = image.dump("mips64 --ipa-bits 40 --root 0 --empty 0x6000 --empty 0x7000");
    assert_eq!(named, (0, rows.into(), String::new()));
    // Who does not say so has them shown.
    let (status, out, _) = image.dump("mips64 --ipa-bits 40 --root 0");
    assert_eq!((status, out.lines().last()), (0, Some(format!("end {}", 1023 * 513 + 514).as_str())));
}
