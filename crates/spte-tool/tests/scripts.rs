// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `spte run` on anything: scripts that are none, scripts that nearly are, and what JSON makes of one.

mod common;

use common::spte;
use proptest::prelude::*;

const FORMATS: [&str; 10] = [
    "ept",
    "npt",
    "x86-64",
    "x86-64-la57",
    "arm64-s2",
    "arm64-s2 --granule 16k --hw-ad",
    "arm64-s2 --granule 64k",
    "ppc-radix",
    "ppc-radix --granule 64k --hw-ad=off",
    "mips64",
];

/// Ends well, or says at which line it does not.
fn ends(format: &str, script: &[u8]) {
    let words: Vec<&str> = ["run", "--format"].into_iter().chain(format.split(' ')).collect();
    let (status, out, err) = spte(&words, script);
    match status {
        0 => assert_eq!(err, ""),
        2 => assert!(err.starts_with("line ") && err.ends_with('\n'), "{err}"),
        _ => panic!("{status}: {out}"),
    }
}

#[test]
fn json_has_the_same_answers() {
    let script =
        b"map 0x1000 0x5000 8k rw\n\ntouch 0x1004 w # here\ndirty 0 1m\nwalk 0x40000000\nstats\nmap 0x1000 0 4k r\n";
    let (status, out, err) = spte(&["run", "--json", "--format", "npt", "-"], script);
    assert_eq!((status, err.as_str()), (0, ""));
    let lines: Vec<serde_json::Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0], serde_json::json!({ "line": 1, "command": "map", "outcome": "ok" }));
    assert_eq!(lines[1], serde_json::json!({ "line": 3, "command": "touch", "outcome": "ok 0x5004" }));
    let row = serde_json::json!({ "gpa": "0x1000", "size": "0x1000" });
    assert_eq!(lines[2], serde_json::json!({ "line": 4, "command": "dirty", "rows": [row] }));
    assert_eq!(
        lines[3]["rows"],
        serde_json::json!([
            { "level": 4, "gpa": "0x0", "raw": "0000000000000027" },
            { "level": 3, "gpa": "0x40000000", "raw": "0000000000000000" },
        ])
    );
    assert_eq!(lines[4]["rows"][1], serde_json::json!({ "key": "leaves_4k", "value": 2 }));
    assert_eq!(lines[5]["outcome"], "refused present 0x1000");
}

#[test]
fn a_script_comes_from_a_file_too() {
    let path = std::env::temp_dir().join(format!("spte-script-{}", std::process::id()));
    std::fs::write(&path, "map 0 0 4k r\r\ntouch 0 r").unwrap();
    let ran = spte(&["run", "--format", "ept", path.to_str().unwrap()], b"not read");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(ran, (0, "ok\nok 0x0\n".into(), String::new()));
    let (status, _, err) = spte(&["run", "--format", "ept", "/nowhere/at/all"], b"");
    assert_eq!((status, err.starts_with("spte: /nowhere/at/all: ")), (2, true));
}

#[test]
fn rights_over_scattered_pages_are_protected_in_one_go() {
    // Every second page elsewhere: no two of the leaves continue each other.
    let mut script = String::new();
    for page in 0..3000_u64 {
        script += &format!("map {:#x} {:#x} 4k r\n", page << 12, (page ^ 1) << 12);
    }
    script += "protect 0 1g rw\ntouch 0xbb7000 w\n";
    let (status, out, err) = spte(&["run", "--format", "ept"], script.as_bytes());
    assert_eq!((status, err.as_str()), (0, ""));
    assert!(out.ends_with("ok\nok 0xbb6000\n"), "{}", &out[out.len() - 40..]);
}

fn word() -> impl Strategy<Value = String> {
    prop_oneof![
        6 => prop::sample::select(vec![
            "map", "unmap", "protect", "wrprotect", "touch", "age", "dirty", "change", "zapchange", "split", "collapse", "walk",
            "flushes", "stats", "dump",
        ]).prop_map(String::from),
        8 => (0_u64..0x1000).prop_map(|page| format!("{:#x}", page << 12)),
        4 => prop::sample::select(vec!["4k", "8k", "2m", "4m", "1g", "0", "256t", "0xfffffffff000", "0x1fffffffffff000"])
            .prop_map(String::from),
        4 => prop::sample::select(vec!["r", "w", "x", "rw", "rx", "rwx", "-", "page=2m", "page=max", "mem=uc", "#"])
            .prop_map(String::from),
        1 => "\\PC{0,8}",
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes_are_no_panic(format in prop::sample::select(&FORMATS[..]), script in prop::collection::vec(any::<u8>(), 0..400)) {
        ends(format, &script);
    }

    #[test]
    fn any_words_are_no_panic(
        format in prop::sample::select(&FORMATS[..]), lines in prop::collection::vec(prop::collection::vec(word(), 1..6), 1..8)
    ) {
        let lines: Vec<String> = lines.iter().map(|words| words.join(" ")).collect();
        ends(format, lines.join("\n").as_bytes());
    }

    /// Lines that are commands, with addresses that go wrong in every way.
    #[test]
    fn any_operation_is_no_panic(
        format in prop::sample::select(&FORMATS[..]),
        lines in prop::collection::vec((0_usize..8, any::<u64>(), 0_u32..64, any::<u64>(), 0_u32..64, any::<bool>()), 1..20)
    ) {
        for (name, gpa, gpa_bits, size, size_bits, aligned) in lines {
            let align = |value: u64| if aligned { value & !0xfff } else { value };
            let (gpa, size) = (align(gpa >> gpa_bits), align(size >> size_bits));
            let name = ["unmap", "wrprotect", "age", "dirty", "split", "collapse", "change", "zapchange"][name];
            let script = format!("map 0x40000000 0x40000000 1g rwx page=1g\n{name} {gpa:#x} {size:#x}\ndump\nwalk {gpa:#x}\n");
            ends(format, script.as_bytes());
        }
    }
}

/// `leaves/NAME.spte` with the leaves that it must end in, worked out from the manual's tables by a program that is not ours:
/// all bits but software's.
macro_rules! leaves {
    ($($name:literal)*) => {
        [$(($name, include_str!(concat!("leaves/", $name, ".spte")), include_str!(concat!("leaves/", $name, ".leaves")))),*]
    };
}

#[test]
fn arm64_scripts_end_in_the_leaves_that_are_written_down() {
    let scripts = leaves!["arm64-4k-36" "arm64-4k-48" "arm64-16k-40" "arm64-16k-47" "arm64-64k-36" "arm64-64k-44"];
    for (name, script, expected) in scripts {
        let command = script.lines().find_map(|line| line.strip_prefix("# spte ")).unwrap();
        let words: Vec<&str> = command.split(' ').collect();
        let (status, out, err) = spte(&words, script.as_bytes());
        assert_eq!((status, err.as_str()), (0, ""), "{name}");
        // Pages, and blocks: what is no link.
        let is_leaf = |row: &&str| {
            let words: Vec<&str> = row.split(' ').collect();
            matches!(words[..], [level, _, raw]
                if level == "L3" || u64::from_str_radix(raw, 16).is_ok_and(|raw| raw & 3 == 1))
        };
        let mut leaves: Vec<String> = out.lines().filter(is_leaf).map(String::from).collect();
        leaves.push(format!("end {}", leaves.len()));
        let expected: Vec<&str> = expected.lines().filter(|line| !line.starts_with('#')).collect();
        assert_eq!(leaves, expected, "{name}");
        assert!(leaves.len() > 50, "{name}");
    }
}
