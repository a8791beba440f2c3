// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The fourteen rules of the command's contract, each with the bytes that it asks for.
//!
//! Entries are worked out by hand from the manuals: an EPT leaf is R W X (1, 2, 4), the memory type (WB: 6 << 3), ignore PAT
//! (0x40), above 4K bit 7 (0x80), accessed (0x100), dirty (0x200); an NPT leaf is P, R/W, U/S (1, 2, 4), accessed (0x20), dirty
//! (0x40), above 4K bit 7 (0x80), NX (bit 63); an arm64 stage-2 page is valid (1), a page (2), MemAttr (WB: 0xf << 2),
//! S2AP (read 0x40, write 0x80), inner shareable (0x300), AF (0x400), XN (bit 54), so that 0x7ff is rwx; a block lacks the 2; a
//! link is 3; with dirty by hardware, DBM (bit 51) says that writing is allowed, and 0x80 that it was done.

mod common;

use common::{run, spte};

#[test]
fn rule_01_success_prints_ok_and_listings_end_with_their_rows() {
    let script = "map 0x1000 0x5000 8k rw\nprotect 0x1000 4k r\nsplit 0 2m\ncollapse 0 2m\nunmap 0x1000 4k\nwalk 0\n";
    assert_eq!(
        run("npt", script),
        "ok\nok\nok\nok\nok\n\
         L4 0x0 0000000000000027\nL3 0x0 0000000000000027\nL2 0x0 0000000000000027\nL1 0x0 0000000000000000\nend 4\n"
    );
    assert_eq!(run("ept", "dump\n"), "end 0\n");
    assert_eq!(run("ept", "dirty 0 4k\n"), "end 0\n");
}

#[test]
fn rule_01_arm64_counts_its_levels_down_to_3() {
    let script = "map 0x1000 0x5000 8k rw\nprotect 0x1000 4k r\nsplit 0 2m\ncollapse 0 2m\nunmap 0x1000 4k\nwalk 0\n";
    let walk = "L1 0x0 0000000000000003\nL2 0x0 0000000000000003\nL3 0x0 0000000000000000\nend 3\n";
    assert_eq!(run("arm64-s2", script), format!("ok\nok\nok\nok\nok\n{walk}"));
    assert_eq!(run("arm64-s2 --granule 64k", "dump\ndirty 0 64k\n"), "end 0\nend 0\n");
}

#[test]
fn rule_02_malformed_lines_end_the_script_and_earlier_output_stands() {
    let fails = |line: &str, why: &str| {
        let script = format!("# heading\n\nmap 0 0 4k r\n{line}\nmap 0x1000 0 4k r\n");
        let ran = spte(&["run", "--format", "ept"], script.as_bytes());
        assert_eq!(ran, (2, "ok\n".into(), format!("line 4: {why}\n")), "{line}");
    };
    fails("remap 0 0 4k r", "unknown command \"remap\"");
    fails("Unmap 0 4k", "unknown command \"Unmap\"");
    fails("unmap 0", "SIZE is missing");
    fails("unmap # 0 4k", "GPA is missing");
    fails("unmap 0 4k 4k", "unexpected word \"4k\"");
    fails("unmap 0 0", "the size is 0");
    fails("unmap 0 4K", "\"4K\" is not a size");
    fails("unmap 4k 4k", "\"4k\" is not an address");
    fails("unmap 0 0x1p", "\"0x1p\" is not a size");
    fails("unmap 0x10000000000000000 4k", "\"0x10000000000000000\" does not fit 64 bits");
    fails("unmap 0xfffffffffffff000 8k", "guest address 0xfffffffffffff000 wraps around with size 0x2000");
    fails("unmap 0x800 4k", "guest address 0x800 is not aligned to 0x1000");
    fails("unmap 0 0x800", "size 0x800 is not aligned to 0x1000");
    fails("map 0x2000 0x10 4k r", "output address 0x10 is not aligned to 0x1000");
    fails("map 0x2000 0x10000000000000 4k r", "output address 0x10000000000fff is beyond 52 bits");
    fails("split 0xfffffffff000 8k", "guest address 0x1000000000fff is beyond 48 bits");
    fails("touch 0x1000000000000 r", "guest address 0x1000000000000 is beyond 48 bits");
    fails("map 0x2000 0 4k xr", "\"xr\" is not a subset of rwx in that order, or -");
    fails("map 0x2000 0 4k r page=8k", "\"page=8k\" is not page=4k|16k|64k|2m|32m|512m|1g|max");
    fails("map 0x2000 0 4k r mem=wp", "\"mem=wp\" is not mem=wb|uc|wc|wt");
    fails("map 0x2000 0 4k r page=4k page=4k", "unexpected word \"page=4k\"");
    fails("touch 0 rw", "\"rw\" is not r, w or x");
    fails("map 0x2000 0 0x400000000000 r", "more than 268435456 leaves");
    // The configured bits are what counts, not the table's.
    let ran = spte(&["run", "--format", "npt", "--ipa-bits", "40", "--pa-bits", "36"], b"map 0 0x1000000000 4k r\n");
    assert_eq!(ran, (2, String::new(), "line 1: output address 0x1000000fff is beyond 36 bits\n".into()));
    let ran = spte(&["run", "--format", "npt", "--ipa-bits", "40"], b"walk 0xffffffffff\nwalk 0x10000000000\n");
    assert_eq!((ran.0, ran.2.as_str()), (2, "line 2: guest address 0x10000000000 is beyond 40 bits\n"));
    // Not text, outside a comment.
    let ran = spte(&["run", "--format", "npt"], b"# \xff\nunmap 0 4k # \xff\n\xff\n");
    assert_eq!(ran, (2, "ok\n".into(), "line 3: the line is not UTF-8\n".into()));
}

#[test]
fn rule_02_arm64_lines_are_whole_granules_of_40_and_48_bits() {
    let fails = |options: &str, line: &str, why: &str| {
        let words: Vec<&str> = ["run", "--format", "arm64-s2"].into_iter().chain(options.split_whitespace()).collect();
        let ran = spte(&words, format!("map 0 0 64k r\n{line}\nmap 0x10000 0 64k r\n").as_bytes());
        assert_eq!(ran, (2, "ok\n".into(), format!("line 2: {why}\n")), "{line}");
    };
    fails("", "touch 0x10000000000 r", "guest address 0x10000000000 is beyond 40 bits");
    fails("", "unmap 0xfffffff000 8k", "guest address 0x10000000fff is beyond 40 bits");
    fails("", "map 0x10000 0x1000000000000 4k r", "output address 0x1000000000fff is beyond 48 bits");
    fails("--granule 16k", "unmap 0x1000 16k", "guest address 0x1000 is not aligned to 0x4000");
    fails("--granule 16k", "map 0x10000 0x1000 16k r", "output address 0x1000 is not aligned to 0x4000");
    fails("--granule 64k", "age 0 4k", "size 0x1000 is not aligned to 0x10000");
    fails("--granule 64k", "change 0x10000 0x4000", "output address 0x4000 is not aligned to 0x10000");
    fails("--ipa-bits 36", "walk 0x1000000000", "guest address 0x1000000000 is beyond 36 bits");
    fails("--pa-bits 36", "change 0 0x1000000000", "output address 0x1000000fff is beyond 36 bits");
    // The last page there is, and with it the last table of a root of sixteen.
    let last = "map 0xffffffc000 0xffffffffc000 16k r\nwalk 0xffffffffff\n";
    assert_eq!(
        run("arm64-s2 --granule 16k", last),
        "ok\nL2 0xfffe000000 0000000000000003\nL3 0xffffffc000 0040ffffffffc77f\nend 2\n"
    );
}

#[test]
fn rule_03_hex_is_unpadded_and_entries_are_sixteen_digits() {
    let script = "map 0x00ABC000 0x000000DEF000 4096 x mem=wt\ntouch 0xabc123 x\nwalk 0xabcfff\n";
    assert_eq!(
        run("ept", script),
        "ok\nok 0xdef123\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0xa00000 0000000000000107\nL1 0xabc000 0000000000def164\nend 4\n"
    );
    assert_eq!(
        run("npt", "map 0 0 4k r\ndump\n").lines().nth(4),
        Some("L1 0x0 8000000000000025"),
        "an entry is a number: NX is the first digit"
    );
}

#[test]
fn rule_03_arm64_entries_are_sixteen_digits() {
    let script = "map 0x00ABC000 0x000000DEF000 4096 x mem=wt\ntouch 0xabc123 x\nwalk 0xabcfff\n";
    assert_eq!(
        run("arm64-s2", script),
        "ok\nok 0xdef123\nL1 0x0 0000000000000003\nL2 0xa00000 0000000000000003\nL3 0xabc000 0000000000def72b\nend 3\n"
    );
    // Addresses of 52 bits: 51:48 in 15:12 of the 64K granule, 51:50 in 9:8 and no shareability in the others.
    let wide = |granule: &str| format!("arm64-s2 --pa-bits 52 --granule {granule}");
    assert_eq!(
        run(&wide("64k"), "map 0 0xf800012340000 64k rwx\ndump\n"),
        "ok\nL2 0x0 0000000000000003\nL3 0x0 000080001234f7ff\nend 2\n"
    );
    assert_eq!(
        run(&wide("4k"), "map 0 0xe800012345000 4k rwx\ntouch 7 w\ndump\n"),
        "ok\nok 0xe800012345007\nL1 0x0 0000000000000003\nL2 0x0 0000000000000003\nL3 0x0 00028000123457ff\nend 3\n"
    );
}

#[test]
fn rule_04_map_refuses_and_changes_nothing() {
    let script = "map 0x201000 0x5000 4k rw\nmap 0x200000 0 2m r page=2m\nmap 0x201000 0 4k - page=1g mem=wc\n\
        map 0x400000 0x1000 2m r page=2m\nmap 0x401000 0 2m r page=2m\nmap 0x400000 0 12k r page=2m\n\
        map 0x400000 0 64k r page=64k\nmap 0x400000 0 4k w\nmap 0x400000 0 4k wx\nmap 0x400000 0 4k -\n\
        map 0x400000 0 4k x\nmap 0x400000 0 4k w mem=wc\nmap 0x400000 0 4k r mem=wc\nstats\n";
    assert_eq!(
        run("npt", script),
        "ok\nrefused present 0x201000\nrefused present 0x201000\n\
         refused page\nrefused page\nrefused page\nrefused page\nrefused perm\nrefused perm\nrefused perm\n\
         refused perm\nrefused perm\nrefused mem\n\
         tables 4\nleaves_4k 1\nleaves_2m 0\nleaves_1g 0\nbytes_tables 16384\nend 5\n"
    );
    // The first address of the range, where a larger leaf begins before it.
    let script = "map 0x200000 0 2m r page=2m\nmap 0x203000 0 4k r\nmap 0x1ff000 0 8k r\n";
    assert_eq!(run("ept", script), "ok\nrefused present 0x203000\nrefused present 0x200000\n");
}

#[test]
fn rule_04_map_takes_the_leaves_asked_for() {
    // The granule where nothing is said; with max the largest that both alignments and the remainder allow.
    let script = "map 0x3ff000 0x7ff000 0x402000 rwx page=max\nmap 0x40000000 0x80000000 1g rx page=1g\n\
        map 0x80000000 0 2m r\nstats\nwalk 0x400000\nwalk 0x40000000\n";
    assert_eq!(
        run("ept", script),
        "ok\nok\nok\n\
         tables 7\nleaves_4k 514\nleaves_2m 2\nleaves_1g 1\nbytes_tables 28672\nend 5\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x400000 00000000008001f7\nend 3\n\
         L4 0x0 0000000000000107\nL3 0x40000000 00000000800001f5\nend 2\n"
    );
    // Accessed set, dirty clear, writing allowed; execute-only; ignore PAT with each type.
    let script = "map 0x1000 0x1000 4k rwx\nmap 0x2000 0x2000 4k x mem=uc\nmap 0x3000 0x3000 4k rw mem=wc\n\
        map 0x4000 0x4000 4k r mem=wt\ndump\n";
    assert_eq!(
        run("ept", script),
        "ok\nok\nok\nok\nL4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x0 0000000000000107\n\
         L1 0x1000 0000000000001177\nL1 0x2000 0000000000002144\nL1 0x3000 000000000000314b\n\
         L1 0x4000 0000000000004161\nend 7\n"
    );
    // Long mode: PWT is WT and PWT with PCD is UC, as after reset; U/S is set.
    let script =
        "map 0x1000 0x1000 4k rwx\nmap 0x2000 0x2000 4k rw mem=wt\nmap 0x200000 0x200000 2m rx page=2m mem=uc\ndump\n";
    for format in ["x86-64", "npt"] {
        assert_eq!(
            run(format, script),
            "ok\nok\nok\nL4 0x0 0000000000000027\nL3 0x0 0000000000000027\nL2 0x0 0000000000000027\n\
             L1 0x1000 0000000000001027\nL1 0x2000 800000000000202f\nL2 0x200000 00000000002000bd\nend 6\n"
        );
    }
}

#[test]
fn rule_04_arm64_has_every_right_and_every_memory_type() {
    let script = "map 0x201000 0x5000 4k rw\nmap 0x200000 0 2m r page=2m\nmap 0x201000 0 4k - page=1g mem=wc\n\
        map 0x400000 0x1000 2m r page=2m\nmap 0x400000 0 64k r page=64k\nmap 0x400000 0 16k r page=16k\n\
        map 0x2000000 0 32m r page=32m\nmap 0x400000 0 4k w\nmap 0x401000 0 4k wx\nmap 0x402000 0 4k -\n\
        map 0x403000 0 4k x\nmap 0x404000 0 4k rw mem=wc\nmap 0x405000 0 4k r mem=wt\nmap 0x406000 0 4k rwx mem=uc\n\
        protect 0x406000 4k -\ndump\n";
    assert_eq!(
        run("arm64-s2", script),
        "ok\nrefused present 0x201000\nrefused present 0x201000\nrefused page\nrefused page\nrefused page\n\
         refused page\nok\nok\nok\nok\nok\nok\nok\nok\n\
         L1 0x0 0000000000000003\nL2 0x200000 0000000000000003\nL3 0x201000 00400000000057ff\n\
         L2 0x400000 0000000000000003\nL3 0x400000 00400000000007bf\nL3 0x401000 00000000000007bf\n\
         L3 0x402000 004000000000073f\nL3 0x403000 000000000000073f\nL3 0x404000 00400000000007d7\n\
         L3 0x405000 004000000000076b\nL3 0x406000 0040000000000707\nend 11\n"
    );
    // Hardware that records writes: a clean leaf that may be written has DBM, and S2AP[1] clear.
    assert_eq!(
        run("arm64-s2 --hw-ad", "map 0x1000 0x1000 4k rwx\nmap 0x2000 0x2000 4k rx\nwalk 0x1000\nwalk 0x2000\n"),
        "ok\nok\nL1 0x0 0000000000000003\nL2 0x0 0000000000000003\nL3 0x1000 000800000000177f\nend 3\n\
         L1 0x0 0000000000000003\nL2 0x0 0000000000000003\nL3 0x2000 000000000000277f\nend 3\n"
    );
}

#[test]
fn rule_04_arm64_granules_have_their_own_pages() {
    let script = "map 0x2000000 0x4000000 32m rw page=32m\nmap 0x20000000 0x40000000 512m rx page=512m\n\
        map 0x80000000 0x80000000 2m r page=2m\nmap 0x80000000 0x80000000 1g r page=1g\n\
        map 0x80000000 0x80000000 64k r page=64k\nmap 0x80020000 0x80000000 64k r page=16k\n\
        map 0x80040000 0 64k r page=4k\nmap 0x80050000 0x70000 64k rwx\ndump\n";
    let pages = |first: u64, size: u64, count: u64, output: u64, bits: u64| -> String {
        let page = |i| format!("L3 {:#x} {:016x}\n", first + i * size, (output + i * size) | bits);
        (0..count).map(page).collect()
    };
    let (read, all) = (0x40_0000_0000_077f, 0x7ff);
    assert_eq!(
        run("arm64-s2 --granule 16k", script),
        format!(
            "ok\nrefused page\nrefused page\nrefused page\nrefused page\nok\nrefused page\nok\n\
             L2 0x2000000 00400000040007fd\nL2 0x80000000 0000000000000003\n{}{}end 10\n",
            pages(0x8002_0000, 0x4000, 4, 0x8000_0000, read),
            pages(0x8005_0000, 0x4000, 4, 0x7_0000, all),
        )
    );
    assert_eq!(
        run("arm64-s2 --granule 64k", script),
        format!(
            "refused page\nok\nrefused page\nrefused page\nok\nrefused page\nrefused page\nok\n\
             L2 0x20000000 000000004000077d\nL2 0x80000000 0000000000000003\n{}{}end 4\n",
            pages(0x8000_0000, 0x1_0000, 1, 0x8000_0000, read),
            pages(0x8005_0000, 0x1_0000, 1, 0x7_0000, all),
        )
    );
    // The largest at each step: pages up to a block, the block, pages.
    let max = "map 0x1ffc000 0x5ffc000 0x2008000 rw page=max\ndump\n";
    assert_eq!(
        run("arm64-s2 --granule 16k", max),
        "ok\nL2 0x0 0000000000000003\nL3 0x1ffc000 0040000005ffc7ff\nL2 0x2000000 00400000060007fd\n\
         L2 0x4000000 0000000000000003\nL3 0x4000000 00400000080007ff\nend 5\n"
    );
    // A block of 512G is there where descriptors are LPA2's, and nowhere else.
    let map = "map 0 0 1t r page=max\nstats\n";
    let stats = |out: &str| out.lines().filter(|row| row.starts_with("leaves_")).collect::<Vec<_>>().join(" ");
    assert_eq!(stats(&run("arm64-s2 --ipa-bits 48", map)), "leaves_4k 0 leaves_2m 0 leaves_1g 1024");
    assert_eq!(
        stats(&run("arm64-s2 --ipa-bits 48 --pa-bits 52", map)),
        "leaves_4k 0 leaves_2m 0 leaves_1g 0 leaves_512g 2"
    );
}

#[test]
fn rule_05_parts_of_larger_leaves_are_split_and_what_is_absent_is_skipped() {
    let script = "map 0 0x40000000 1g rwx page=1g\nunmap 0x1000 0x3fffe000\nunmap 0 1t\nmap 0 0x40000000 2m rwx page=2m\n\
        protect 0x1ff000 8k r\nprotect 0x1fe000 4k w\nunmap 0 0x1fd000\ndump\nunmap 0x1fd000 12k\ndump\n";
    assert_eq!(
        run("ept", script),
        "ok\nok\nok\nok\nok\nrefused perm\nok\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x0 0000000000000107\n\
         L1 0x1fd000 00000000401fd177\nL1 0x1fe000 00000000401fe177\nL1 0x1ff000 00000000401ff171\nend 6\n\
         ok\nend 0\n"
    );
    // No further than needed: 511 leaves of 2M stay.
    let script = "map 0 0 1g rw page=1g\nwrprotect 0x200000 4k\nstats\n";
    assert_eq!(
        run("npt", script),
        "ok\nok\ntables 4\nleaves_4k 512\nleaves_2m 511\nleaves_1g 0\nbytes_tables 16384\nend 5\n"
    );
}

#[test]
fn rule_05_arm64_blocks_are_split_and_keep_what_they_say() {
    // A device stays one.
    let script = "map 0x200000 0x40200000 2m rw page=2m mem=uc\nunmap 0x201000 0x1fe000\ndump\n\
        protect 0x3ff000 4k x\nunmap 0x200000 4k\nunmap 0 1t\ndump\n";
    assert_eq!(
        run("arm64-s2", script),
        "ok\nok\nL1 0x0 0000000000000003\nL2 0x200000 0000000000000003\nL3 0x200000 00400000402007c7\n\
         L3 0x3ff000 00400000403ff7c7\nend 4\nok\nok\nok\nend 0\n"
    );
    let script = "map 0 0 512m rw page=512m\nprotect 0x10000 64k r\nstats\n";
    assert_eq!(
        run("arm64-s2 --granule 64k", script),
        "ok\nok\ntables 2\nleaves_64k 8192\nleaves_512m 0\nbytes_tables 81920\nend 4\n"
    );
}

#[test]
fn rule_06_logging_withholds_writing_until_it_is_used() {
    let script = "map 0x1000 0x1000 8k rwx\nwrprotect 0 1t\nwalk 0x1000\ntouch 0x1008 r\ndirty 0 1t\ntouch 0x1008 w\n\
        walk 0x1000\ndirty 0 1t\nwalk 0x1000\nwalk 0x2000\n";
    let way = "L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x0 0000000000000107\n";
    assert_eq!(
        run("ept", script),
        format!(
            "ok\nok\n{way}L1 0x1000 0000000000001175\nend 4\nok 0x1008\nend 0\nok 0x1008\n\
             {way}L1 0x1000 0000000000001377\nend 4\n0x1000 0x1000\nend 1\n\
             {way}L1 0x1000 0000000000001175\nend 4\n{way}L1 0x2000 0000000000002175\nend 4\n"
        )
    );
    // What is read-only is logged too once it may be written; what is absent is not.
    let script = "map 0x1000 0x1000 4k r\nwrprotect 0 1m\nmap 0x2000 0x2000 4k rw\nprotect 0x1000 4k rw\n\
        walk 0x1000\nwalk 0x2000\n";
    assert_eq!(
        run("ept", script),
        format!("ok\nok\nok\nok\n{way}L1 0x1000 0000000000001171\nend 4\n{way}L1 0x2000 0000000000002173\nend 4\n")
    );
}

/// As Linux leaves it: the bit says that the leaf was written since the last harvest, and goes with that.
#[test]
fn rule_06_the_dirty_bit_outlasts_wrprotect() {
    let script = "map 0x1000 0x5000 4k rwx\ntouch 0x1000 w\nwrprotect 0 1g\nwalk 0x1000\ndirty 0 1g\nwalk 0x1000\n";
    let way = "L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x0 0000000000000107\n";
    assert_eq!(
        run("ept", script),
        format!(
            "ok\nok 0x5000\nok\n{way}L1 0x1000 0000000000005375\nend 4\n0x1000 0x1000\nend 1\n\
             {way}L1 0x1000 0000000000005175\nend 4\n"
        )
    );
}

#[test]
fn rule_06_arm64_logging_withholds_s2ap_and_dbm() {
    let script = "map 0x1000 0x1000 8k rwx\nwrprotect 0 512g\nwalk 0x1000\ntouch 0x1008 r\ndirty 0 512g\n\
        touch 0x1008 w\nwalk 0x1000\ndirty 0 512g\nwalk 0x1000\nwalk 0x2000\n";
    let way = "L1 0x0 0000000000000003\nL2 0x0 0000000000000003\n";
    let expected = |first: &str, written: &str, second: &str| {
        format!(
            "ok\nok\n{way}L3 0x1000 {first}\nend 3\nok 0x1008\nend 0\nok 0x1008\n\
             {way}L3 0x1000 {written}\nend 3\n0x1000 0x1000\nend 1\n\
             {way}L3 0x1000 {first}\nend 3\n{way}L3 0x2000 {second}\nend 3\n"
        )
    };
    let (armed, second) = ("000000000000177f", "000000000000277f");
    assert_eq!(run("arm64-s2", script), expected(armed, "00000000000017ff", second));
    // DBM goes with the right: were it left, hardware would let the write through.
    assert_eq!(run("arm64-s2 --hw-ad", script), expected(armed, "00080000000017ff", second));
}

#[test]
fn rule_07_touch_sets_what_hardware_would_and_never_maps() {
    let script = "touch 0 r\nmap 0x1000 0x5000 4k rx\ntouch 0x1fff r\ntouch 0x1fff w\ntouch 0x1fff x\nage 0x1000 4k\n\
        touch 0x1000 w\nage 0x1000 4k\ntouch 0x1000 r\nage 0x1000 4k\ntouch 0x2000 r\n\
        map 0x3000 0x3000 4k rw\ntouch 0x3000 w\nwalk 0x3000\ntouch 0x3000 x\n";
    assert_eq!(
        run("ept", script),
        "fault absent\nok\nok 0x5fff\nfault perm\nok 0x5fff\nok 1\n\
         fault perm\nok 0\nok 0x5000\nok 1\nfault absent\nok\nok 0x3000\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x0 0000000000000107\nL1 0x3000 0000000000003373\nend 4\n\
         fault perm\n"
    );
}

#[test]
fn rule_07_without_hardware_an_old_leaf_faults_once() {
    let script = "map 0x1000 0x5000 4k rw\ntouch 0x1000 w\nage 0x1000 4k\ntouch 0x1000 x\ntouch 0x1000 x\ntouch 0x1000 w\n\
        age 0 1m\ndirty 0 1m\nwrprotect 0 1m\ntouch 0x1000 w\ntouch 0x1000 w\ndirty 0 1m\nwalk 0x1000\n";
    for off in ["npt --hw-ad=off", "npt --hw-ad off"] {
        assert_eq!(
            run(off, script),
            "ok\nok 0x5000\nok 1\nfault af\nfault perm\nok 0x5000\n\
             ok 1\nend 0\nok\nfault af\nok 0x5000\n0x1000 0x1000\nend 1\n\
             L4 0x0 0000000000000027\nL3 0x0 0000000000000027\nL2 0x0 0000000000000027\nL1 0x1000 8000000000005025\nend 4\n"
        );
    }
    assert_eq!(
        run("ept --hw-ad=off", "map 0 0 4k r\nage 0 4k\ntouch 0 r\ntouch 0 r\n"),
        "ok\nok 1\nfault af\nok 0x0\n"
    );
    assert_eq!(run("ept --hw-ad", "map 0 0 4k r\nage 0 4k\ntouch 0 r\ntouch 0 r\n"), "ok\nok 1\nok 0x0\nok 0x0\n");
}

#[test]
fn rule_07_arm64_has_access_flag_faults_unless_hardware_sets_the_flag() {
    let script = "touch 0 r\nmap 0x1000 0x5000 4k rw\ntouch 0x1fff w\nage 0x1000 4k\nwalk 0x1000\ntouch 0x1000 x\n\
        walk 0x1000\ntouch 0x1000 x\ntouch 0x1000 w\nwalk 0x1000\nage 0 1m\ntouch 0x1000 w\ntouch 0x1000 w\n";
    let way = "L1 0x0 0000000000000003\nL2 0x0 0000000000000003\n";
    // The flag is looked at before the rights.
    assert_eq!(
        run("arm64-s2", script),
        format!(
            "fault absent\nok\nok 0x5fff\nok 1\n{way}L3 0x1000 00400000000053ff\nend 3\nfault af\n\
             {way}L3 0x1000 00400000000057ff\nend 3\nfault perm\nok 0x5000\n{way}L3 0x1000 00400000000057ff\nend 3\n\
             ok 1\nfault af\nok 0x5000\n"
        )
    );
    assert_eq!(run("arm64-s2 --hw-ad=off", script), run("arm64-s2", script), "off is the default");
    assert_eq!(
        run("arm64-s2 --hw-ad", script),
        format!(
            "fault absent\nok\nok 0x5fff\nok 1\n{way}L3 0x1000 00480000000053ff\nend 3\nfault perm\n\
             {way}L3 0x1000 00480000000053ff\nend 3\nfault perm\nok 0x5000\n{way}L3 0x1000 00480000000057ff\nend 3\n\
             ok 1\nok 0x5000\nok 0x5000\n"
        )
    );
    // No right at all, and writing alone.
    let script = "map 0 0 4k -\nmap 0x1000 0x1000 4k w\ntouch 0 r\ntouch 0x1000 r\ntouch 0x1000 w\ntouch 0x1000 x\n";
    assert_eq!(run("arm64-s2", script), "ok\nok\nfault perm\nfault perm\nok 0x1000\nfault perm\n");
}

#[test]
fn rule_08_age_counts_young_leaves_and_dirty_lists_written_ones() {
    let script = "map 0 0 4m rwx page=2m\nmap 0x400000 0 8k rwx\nage 0 1t\nage 0 1t\ntouch 0x1000 r\nage 0 1t\n\
        touch 0x400008 w\ntouch 0x3fffff w\ndirty 0 1t\ndirty 0 1t\ntouch 0x400000 w\ndirty 0x401000 4k\ndirty 0x400000 4k\n\
        age 0 1t\n";
    assert_eq!(
        run("ept", script),
        "ok\nok\nok 4\nok 0\nok 0x1000\nok 1\nok 0x8\nok 0x3fffff\n\
         0x200000 0x200000\n0x400000 0x1000\nend 2\nend 0\nok 0x0\nend 0\n0x400000 0x1000\nend 1\nok 2\n"
    );
}

#[test]
fn rule_08_arm64_knows_of_writes_that_were_logged_or_that_hardware_recorded() {
    let script = "map 0 0 64m rwx page=32m\nmap 0x4000000 0 32k rwx\nage 0 512g\nage 0 512g\ntouch 0x1000 r\ntouch 0x1000 r\n\
        age 0 512g\ntouch 0x4000008 w\ntouch 0x4000008 w\ntouch 0x3ffffff w\ntouch 0x3ffffff w\ndirty 0 512g\ndirty 0 512g\n\
        wrprotect 0x4000000 16k\ntouch 0x4000000 w\ndirty 0x4004000 16k\ndirty 0x4000000 16k\nage 0 512g\n";
    let both = |faults: &str, written: &str| {
        format!(
            "ok\nok\nok 4\nok 0\n{faults}\nok 0x1000\nok 1\n{}\nok 0x8\n{}\nok 0x3ffffff\n{written}end 0\n\
             ok\nok 0x0\nend 0\n0x4000000 0x4000\nend 1\nok 2\n",
            faults.replace("0x1000", "0x8"),
            faults.replace("0x1000", "0x3ffffff"),
        )
    };
    assert_eq!(run("arm64-s2 --granule 16k", script), both("fault af", "end 0\n"));
    let written = "0x2000000 0x2000000\n0x4000000 0x4000\nend 2\n";
    assert_eq!(run("arm64-s2 --granule 16k --hw-ad", script), both("ok 0x1000", written));
}

#[test]
fn rule_09_change_leaves_a_read_only_page_and_never_creates() {
    let script = "change 0x1000 0x9000\nzapchange 0x1000 0x9000\nmap 0x200000 0x40000000 2m rwx page=2m\n\
        change 0x201000 0x9000\ntouch 0x201004 r\ntouch 0x201004 x\ntouch 0x201004 w\ntouch 0x202000 w\nwalk 0x201000\n\
        zapchange 0x201000 0xa000\ntouch 0x201000 r\nzapchange 0x201000 0xa000\nstats\n";
    assert_eq!(
        run("ept", script),
        "absent\nabsent\nok\nchanged\nok 0x9004\nok 0x9004\nfault perm\nok 0x40002000\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x200000 0000000000000107\nL1 0x201000 0000000000009175\nend 4\n\
         zapped\nfault absent\nabsent\n\
         tables 4\nleaves_4k 511\nleaves_2m 0\nleaves_1g 0\nbytes_tables 16384\nend 5\n"
    );
    // A write that was not harvested is not forgotten.
    let script = "map 0x1000 0x1000 4k rw\ntouch 0x1000 w\nchange 0x1000 0x2000\ndirty 0 1m\n";
    assert_eq!(run("npt", script), "ok\nok 0x1000\nchanged\n0x1000 0x1000\nend 1\n");
}

#[test]
fn rule_09_arm64_change_keeps_the_rest_of_the_leaf() {
    let script = "change 0x1000 0x9000\nzapchange 0x1000 0x9000\nmap 0x200000 0x40000000 2m rwx page=2m mem=wc\n\
        change 0x201000 0x9000\ntouch 0x201004 r\ntouch 0x201004 x\ntouch 0x201004 w\ntouch 0x202000 w\nwalk 0x201000\n\
        zapchange 0x201000 0xa000\ntouch 0x201000 r\nzapchange 0x201000 0xa000\nstats\n";
    for options in ["arm64-s2", "arm64-s2 --hw-ad"] {
        assert_eq!(
            run(options, script),
            "absent\nabsent\nok\nchanged\nok 0x9004\nok 0x9004\nfault perm\nok 0x40002000\n\
             L1 0x0 0000000000000003\nL2 0x200000 0000000000000003\nL3 0x201000 0000000000009757\nend 3\n\
             zapped\nfault absent\nabsent\n\
             tables 3\nleaves_4k 511\nleaves_2m 0\nleaves_1g 0\nbytes_tables 16384\nend 5\n"
        );
    }
    // What can only be written is left with no right, and that can be expressed.
    let script = "map 0x1000 0x1000 4k w\nchange 0x1000 0x2000\nwalk 0x1000\n";
    assert!(run("arm64-s2", script).starts_with("ok\nchanged\n"));
    assert!(run("arm64-s2", script).ends_with("L3 0x1000 004000000000273f\nend 3\n"));
    let script = "map 0x1000 0x1000 4k rw\ntouch 0x1000 w\nchange 0x1000 0x2000\ndirty 0 1m\n";
    assert_eq!(run("arm64-s2 --hw-ad", script), "ok\nok 0x1000\nchanged\n0x1000 0x1000\nend 1\n");
    assert_eq!(run("arm64-s2", script), "ok\nok 0x1000\nchanged\nend 0\n", "nobody logged it");
}

#[test]
fn rule_10_split_goes_to_the_granule_and_collapse_as_far_as_it_can() {
    let script = "map 0 0x40000000 1g rwx page=1g\nage 0 1g\nsplit 0 2m\nstats\ntouch 0x5000 w\n\
        collapse 0 2m\nwalk 0\ncollapse 0 1t\ndump\n";
    assert_eq!(
        run("ept", script),
        "ok\nok 1\nok\ntables 4\nleaves_4k 512\nleaves_2m 511\nleaves_1g 0\nbytes_tables 16384\nend 5\nok 0x40005000\nok\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x0 00000000400003f7\nend 3\n\
         ok\nL4 0x0 0000000000000107\nL3 0x0 00000000400003f7\nend 2\n"
    );
    // Not beyond the range, not what differs, not what does not follow, not what is not aligned.
    let script = "map 0 0 2m rw\ncollapse 0 0x1ff000\nstats\nprotect 0x1000 4k r\ncollapse 0 2m\n\
        map 0x200000 0x1000 2m rw\ncollapse 0x200000 2m\nmap 0x400000 0x400000 1m rw\nmap 0x500000 0x600000 1m rw\n\
        collapse 0 1g\nstats\n";
    assert_eq!(
        run("npt", script),
        "ok\nok\ntables 4\nleaves_4k 512\nleaves_2m 0\nleaves_1g 0\nbytes_tables 16384\nend 5\nok\nok\n\
         ok\nok\nok\nok\nok\ntables 6\nleaves_4k 1536\nleaves_2m 0\nleaves_1g 0\nbytes_tables 24576\nend 5\n"
    );
}

#[test]
fn rule_10_arm64_splits_to_the_granule_and_collapses_as_far_as_it_can() {
    let script = "map 0 0x40000000 512m rwx page=512m\nage 0 512m\nsplit 0x10000 64k\nstats\ntouch 0x50000 w\n\
        collapse 0x10000 0x1fff0000\nstats\ncollapse 0 1t\ndump\n";
    let stats = "tables 2\nleaves_64k 8192\nleaves_512m 0\nbytes_tables 81920\nend 4\n";
    assert_eq!(
        run("arm64-s2 --granule 64k --hw-ad", script),
        format!("ok\nok 1\nok\n{stats}ok 0x40050000\nok\n{stats}ok\nL2 0x0 00080000400007fd\nend 1\n")
    );
    let script = "map 0 0 32m rw\nprotect 0x4000 16k r\ncollapse 0 32m\nmap 0x2000000 0x4000 32m rw\n\
        collapse 0x2000000 32m\nstats\nprotect 0x4000 16k rw\ncollapse 0 32m\nwalk 0\n";
    assert_eq!(
        run("arm64-s2 --granule 16k", script),
        "ok\nok\nok\nok\nok\ntables 3\nleaves_16k 4096\nleaves_32m 0\nbytes_tables 294912\nend 4\nok\nok\n\
         L2 0x0 00400000000007fd\nend 1\n"
    );
}

#[test]
fn rule_11_walk_has_a_row_for_each_level_from_the_root() {
    let script = "map 0x40201000 0x5000 4k rw\nwalk 0x40201fff\nwalk 0x40400000\nwalk 0x8000000000\n";
    assert_eq!(
        run("npt", script),
        "ok\nL4 0x0 0000000000000027\nL3 0x40000000 0000000000000027\nL2 0x40200000 0000000000000027\n\
         L1 0x40201000 8000000000005027\nend 4\n\
         L4 0x0 0000000000000027\nL3 0x40000000 0000000000000027\nL2 0x40400000 0000000000000000\nend 3\n\
         L4 0x8000000000 0000000000000000\nend 1\n"
    );
    let script = "map 0x1000000000000 0x5000 4k rw\nwalk 0x1000000000000\n";
    let five = "ok\nL5 0x1000000000000 0000000000000027\nL4 0x1000000000000 0000000000000027\n\
         L3 0x1000000000000 0000000000000027\nL2 0x1000000000000 0000000000000027\n\
         L1 0x1000000000000 8000000000005027\nend 5\n";
    assert_eq!(run("x86-64-la57", script), five);
    assert_eq!(run("npt --levels 5 --ipa-bits 57", script), five);
    assert_eq!(run("npt --ipa-bits 57", script), five);
}

#[test]
fn rule_11_arm64_walks_begin_at_the_start_level() {
    // 40 bits: two tables side by side at level 1, of which the second has this. One row for both.
    let script = "map 0x8040201000 0x5000 4k rw\nwalk 0x8040201fff\nwalk 0x8040400000\nwalk 0xffffffffff\n";
    assert_eq!(
        run("arm64-s2", script),
        "ok\nL1 0x8040000000 0000000000000003\nL2 0x8040200000 0000000000000003\nL3 0x8040201000 00400000000057ff\nend 3\n\
         L1 0x8040000000 0000000000000003\nL2 0x8040400000 0000000000000000\nend 2\n\
         L1 0xffc0000000 0000000000000000\nend 1\n"
    );
    // Where walks begin, by granule and address bits; more levels where they are asked for.
    let first = |options: &str| {
        let out = run(&format!("arm64-s2 {options}"), "map 0 0 64k r\nwalk 0\n");
        let rows: Vec<&str> = out.lines().skip(1).map(|row| row.split(' ').next().unwrap()).collect();
        rows.join(" ")
    };
    assert_eq!(first("--ipa-bits 34"), "L2 L3 end");
    assert_eq!(first("--ipa-bits 43"), "L1 L2 L3 end");
    assert_eq!(first("--ipa-bits 44"), "L0 L1 L2 L3 end");
    assert_eq!(first("--ipa-bits 52"), "L0 L1 L2 L3 end");
    assert_eq!(first("--ipa-bits 52 --levels 5"), "L-1 L0 L1 L2 L3 end");
    assert_eq!(first("--ipa-bits 40 --levels 4"), "L0 L1 L2 L3 end");
    assert_eq!(first("--granule 16k --ipa-bits 40"), "L2 L3 end");
    assert_eq!(first("--granule 16k --ipa-bits 48"), "L1 L2 L3 end");
    assert_eq!(first("--granule 16k --ipa-bits 52"), "L0 L1 L2 L3 end");
    assert_eq!(first("--granule 64k --ipa-bits 46"), "L2 L3 end");
    assert_eq!(first("--granule 64k --ipa-bits 52"), "L1 L2 L3 end");
}

#[test]
fn rule_12_flushes_are_counted_by_kind_and_absent_entries_owe_none() {
    let nothing = "unmap 0 1g\nprotect 0 1g r\nwrprotect 0 1g\nage 0 1g\ndirty 0 1g\nchange 0 0\nzapchange 0 0\n\
        split 0 1g\ncollapse 0 1g\ntouch 0 w\nflushes\n";
    let answers = "ok\nok\nok\nok 0\nend 0\nabsent\nabsent\nok\nok\nfault absent\nend 0\n";
    // Mapping owes none, and neither does what takes nothing away.
    let some = "map 0x1000 0x1000 8k rw\ntouch 0x1000 w\nage 0 1m\nsplit 0 1m\nflushes\n\
        protect 0x1000 4k r\nflushes\nprotect 0x1000 4k rw\nflushes\ndirty 0 1m\nunmap 0x1000 4k\nflushes\n";
    for (format, kind) in [("ept", "invept"), ("npt", "asid"), ("x86-64", "invlpg"), ("x86-64-la57", "invlpg")] {
        assert_eq!(run(format, nothing), answers);
        let expected = format!(
            "ok\nok 0x1000\nok 2\nok\nend 0\nok\n{kind} 1\nend 1\nok\n{kind} 1\nend 1\n0x1000 0x1000\nend 1\nok\n{kind} 3\nend 1\n"
        );
        assert_eq!(run(format, some), expected, "{format}");
    }
    let many = "map 0 0 4m rw\nwrprotect 0 1m\nwrprotect 0x100000 8k\nflushes\n";
    assert_eq!(run("x86-64", many), "ok\nok\nok\ncr3 1\ninvlpg 2\nend 2\n");
    // A range is one flush, whatever is done to it. (Where a table goes too, that is another.)
    for operation in ["unmap 0x1000 64k", "protect 0x1000 64k r", "wrprotect 0x1000 64k"] {
        let script = format!("map 0x1000 0x5000 128k rw\n{operation}\nflushes\n");
        assert_eq!(run("ept", &script), "ok\nok\ninvept 1\nend 1\n", "{operation}");
        assert_eq!(run("arm64-s2", &script), "ok\nok\nipas2e1is 16\nvmalle1is 1\nend 2\n", "{operation}");
    }
}

#[test]
fn rule_12_arm64_flushes_are_invalidations_of_both_stages() {
    let nothing = "unmap 0 1g\nprotect 0 1g r\nwrprotect 0 1g\nage 0 1g\ndirty 0 1g\nchange 0 0\nzapchange 0 0\n\
        split 0 1g\ncollapse 0 1g\ntouch 0 w\nflushes\n";
    let answers = "ok\nok\nok\nok 0\nend 0\nabsent\nabsent\nok\nok\nfault absent\nend 0\n";
    let some = "map 0x10000 0x50000 128k rw\ntouch 0x10000 w\nsplit 0 1m\nage 0 1m\nflushes\nwrprotect 0x10000 64k\nflushes\n\
        touch 0x10000 w\ntouch 0x10000 w\nflushes\nunmap 0x10000 64k\nflushes\n";
    // An invalidation for each page, and one of stage 1 for the flush.
    for (granule, pages) in [("4k", 16), ("16k", 4), ("64k", 1)] {
        let options = format!("arm64-s2 --granule {granule}");
        assert_eq!(run(&options, nothing), answers);
        let flushed = |flushes: u64| format!("ipas2e1is {}\nvmalle1is {flushes}\nend 2\n", flushes * pages);
        let (one, two) = (flushed(1), flushed(2));
        let expected =
            format!("ok\nok 0x50000\nok\nok {}\nend 0\nok\n{one}fault af\nok 0x50000\n{one}ok\n{two}", 2 * pages);
        assert_eq!(run(&options, some), expected, "{granule}");
    }
    // Breaking before making: a split is a flush here, of one block; a collapse one of all the pages.
    let resize = "map 0 0 2m rw page=2m\nsplit 0 2m\nflushes\ncollapse 0 2m\nflushes\n";
    assert_eq!(
        run("arm64-s2", resize),
        "ok\nok\nipas2e1is 1\nvmalle1is 1\nend 2\nok\nipas2e1is 513\nvmalle1is 2\nend 2\n"
    );
    // More than 512 invalidations are one of the guest.
    let many = "map 0 0 4m rw\nwrprotect 0 0x201000\nwrprotect 0x201000 8k\nflushes\n";
    assert_eq!(run("arm64-s2", many), "ok\nok\nok\nipas2e1is 2\nvmalle1is 1\nvmalls12e1is 1\nend 3\n");
}

#[test]
fn rule_13_stats_has_tables_leaves_of_each_size_and_bytes() {
    let empty = "tables 1\nleaves_4k 0\nleaves_2m 0\nleaves_1g 0\nbytes_tables 4096\nend 5\n";
    for format in ["ept", "npt", "x86-64", "x86-64-la57"] {
        assert_eq!(run(format, "stats\n"), empty);
    }
    let script = "map 0x40000000 0 0x40201000 rw page=max\nstats\nunmap 0 1t\nstats\n";
    assert_eq!(
        run("ept", script),
        format!("ok\ntables 4\nleaves_4k 1\nleaves_2m 1\nleaves_1g 1\nbytes_tables 16384\nend 5\nok\n{empty}")
    );
}

#[test]
fn rule_13_arm64_counts_a_root_of_several_tables_once() {
    let stats = |options: &str| run(&format!("arm64-s2 {options}"), "map 0 0 64k r\nunmap 0 64k\nstats\n");
    let empty = |leaves: &str, bytes: u64| format!("ok\nok\ntables 1\n{leaves}\nbytes_tables {bytes}\n");
    let small = "leaves_4k 0\nleaves_2m 0\nleaves_1g 0";
    // Sixteen tables; one; and 32 entries.
    assert_eq!(stats("--ipa-bits 43"), empty(small, 16 << 12) + "end 5\n");
    assert_eq!(stats("--ipa-bits 39"), empty(small, 1 << 12) + "end 5\n");
    assert_eq!(stats("--ipa-bits 44"), empty(small, 32 << 3) + "end 5\n");
    assert_eq!(stats("--granule 16k"), empty("leaves_16k 0\nleaves_32m 0", 16 << 14) + "end 4\n");
    assert_eq!(stats("--granule 64k"), empty("leaves_64k 0\nleaves_512m 0", 2048 << 3) + "end 4\n");
    let wide = "leaves_64k 0\nleaves_512m 0\nleaves_4t 0";
    assert_eq!(stats("--granule 64k --pa-bits 52 --ipa-bits 48"), empty(wide, 64 << 3) + "end 5\n");
}

#[test]
fn rule_14_dump_prints_entries_ascending_without_table_addresses_and_software_bits() {
    let script = "map 0x8000000000 0x2000 4k rw\nmap 0x40000000 0x40000000 1g rx page=1g\nmap 0x200000 0x200000 2m r page=2m\n\
        wrprotect 0 1t\ndump\n";
    assert_eq!(
        run("ept", script),
        "ok\nok\nok\nok\n\
         L4 0x0 0000000000000107\nL3 0x0 0000000000000107\nL2 0x200000 00000000002001f1\nL3 0x40000000 00000000400001f5\n\
         L4 0x8000000000 0000000000000107\nL3 0x8000000000 0000000000000107\nL2 0x8000000000 0000000000000107\n\
         L1 0x8000000000 0000000000002171\nend 8\n"
    );
    let mask = |format: &str| spte(&["decode", "--mask", "--format", format], b"").1;
    assert_eq!(
        mask("ept"),
        "L4 00000000000001ff table\nL3 00000000000001ff table\nL3 000ffffffffff3ff leaf\n\
         L2 00000000000001ff table\nL2 000ffffffffff3ff leaf\nL1 000ffffffffff37f leaf\nend 6\n"
    );
    assert_eq!(
        mask("npt"),
        "L4 80000000000000bf table\nL3 80000000000000bf table\nL3 800ffffffffff0ff leaf\n\
         L2 80000000000000bf table\nL2 800ffffffffff0ff leaf\nL1 800ffffffffff0ff leaf\nend 6\n"
    );
    assert_eq!(
        mask("x86-64-la57"),
        "L5 80000000000000bf table\nL4 80000000000000bf table\nL3 80000000000000bf table\nL3 800ffffffffff1ff leaf\n\
         L2 80000000000000bf table\nL2 800ffffffffff1ff leaf\nL1 800ffffffffff1ff leaf\nend 7\n"
    );
    assert_eq!(
        spte(&["decode", "--mask", "--format", "x86-64", "--level", "2"], b"").1,
        "L2 80000000000000bf table\nL2 800ffffffffff1ff leaf\nend 2\n"
    );
}

#[test]
fn rule_14_arm64_dumps_rows_of_all_tables_of_the_root() {
    let script = "map 0x8000000000 0x2000 4k rw\nmap 0x40000000 0x40000000 1g rx page=1g\n\
        map 0x200000 0x200000 2m rw page=2m\nwrprotect 0 512g\ndump\n";
    assert_eq!(
        run("arm64-s2", script),
        "ok\nok\nok\nok\nL1 0x0 0000000000000003\nL2 0x200000 004000000020077d\nL1 0x40000000 000000004000077d\n\
         L1 0x8000000000 0000000000000003\nL2 0x8000000000 0000000000000003\nL3 0x8000000000 00400000000027ff\nend 6\n"
    );
    let mask = |options: &str| {
        let words: Vec<&str> =
            ["decode", "--mask", "--format", "arm64-s2"].into_iter().chain(options.split(' ')).collect();
        spte(&words, b"").1
    };
    assert_eq!(
        mask("--ipa-bits 48"),
        "L0 0000000000000003 table\nL1 0000000000000003 table\nL1 0078ffffc0000fff leaf\n\
         L2 0000000000000003 table\nL2 0078ffffffe00fff leaf\nL3 0078ffffffffffff leaf\nend 6\n"
    );
    assert_eq!(
        mask("--granule 16k"),
        "L2 0000000000000003 table\nL2 0078fffffe000fff leaf\nL3 0078ffffffffcfff leaf\nend 3\n"
    );
    assert_eq!(
        mask("--granule 64k --pa-bits 52 --ipa-bits 48"),
        "L1 0000000000000003 table\nL1 0078fc000000ffff leaf\nL2 0000000000000003 table\nL2 0078ffffe000ffff leaf\n\
         L3 0078ffffffffffff leaf\nend 5\n"
    );
    assert_eq!(mask("--ipa-bits 52 --level 0"), "L0 0000000000000003 table\nL0 007bff8000000fff leaf\nend 2\n");
}

/// A radix leaf is V and L (bits 63 and 62), read (4), write (2), execute (1), ATT (5:4), C (0x80), R (0x100); a directory entry is V
/// and the size of the next table.
#[test]
fn rule_01_radix_counts_its_levels_from_the_pages() {
    let script = "map 0x1000 0x5000 8k rw\nprotect 0x1000 4k r\nsplit 0 2m\ncollapse 0 2m\nunmap 0x1000 4k\nwalk 0\n";
    let walk =
        "L4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x0 8000000000000009\nL1 0x0 0000000000000000\nend 4\n";
    assert_eq!(run("ppc-radix", script), format!("ok\nok\nok\nok\nok\n{walk}"));
    assert_eq!(run("ppc-radix --granule 64k", "dump\ndirty 0 64k\n"), "end 0\nend 0\n");
}

#[test]
fn rule_02_radix_lines_are_whole_pages_of_52_bits() {
    let fails = |options: &str, line: &str, why: &str| {
        let words: Vec<&str> = ["run", "--format", "ppc-radix"].into_iter().chain(options.split_whitespace()).collect();
        let ran = spte(&words, format!("map 0 0 64k r\n{line}\nmap 0x10000 0 64k r\n").as_bytes());
        assert_eq!(ran, (2, "ok\n".into(), format!("line 2: {why}\n")), "{line}");
    };
    fails("", "touch 0x10000000000000 r", "guest address 0x10000000000000 is beyond 52 bits");
    fails("", "map 0x10000 0x10000000000000 4k r", "output address 0x10000000000fff is beyond 52 bits");
    fails("--granule 64k", "age 0 4k", "size 0x1000 is not aligned to 0x10000");
    fails("--granule 64k", "change 0x10000 0x4000", "output address 0x4000 is not aligned to 0x10000");
    fails("--ipa-bits 36", "walk 0x1000000000", "guest address 0x1000000000 is beyond 36 bits");
    // The last page there is; and the widest output.
    let last = "map 0xffffffffff000 0x1fffffffffff000 4k r\nwalk 0xfffffffffffff\n";
    assert_eq!(
        run("ppc-radix --pa-bits 57", last),
        "ok\nL4 0xfff8000000000 8000000000000009\nL3 0xfffffc0000000 8000000000000009\n\
         L2 0xfffffffe00000 8000000000000009\nL1 0xffffffffff000 c1fffffffffff104\nend 4\n"
    );
}

#[test]
fn rule_04_radix_has_no_writing_alone_and_no_write_through() {
    let script = "map 0x201000 0x5000 4k rw\nmap 0x200000 0 2m r page=2m\nmap 0x400000 0 4k w\nmap 0x400000 0 4k wx\n\
        map 0x400000 0 4k -\nmap 0x401000 0 4k x\nmap 0x402000 0 4k rw mem=uc\nmap 0x403000 0 4k r mem=wc\n\
        map 0x404000 0 4k r mem=wt\nmap 0x404000 0 64k r page=64k\nmap 0x404000 0 4k rwx\ndump\n";
    assert_eq!(
        run("ppc-radix", script),
        "ok\nrefused present 0x201000\nrefused perm\nrefused perm\nok\nok\nok\nok\nrefused mem\nrefused page\nok\n\
         L4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x200000 8000000000000009\nL1 0x201000 c000000000005106\n\
         L2 0x400000 8000000000000009\nL1 0x400000 c000000000000100\nL1 0x401000 c000000000000101\n\
         L1 0x402000 c000000000000126\nL1 0x403000 c000000000000134\nL1 0x404000 c000000000000107\nend 10\n"
    );
    // Large leaves, and leaf tables of 32 entries.
    let script = "map 0x1f0000 0x401f0000 0x40020000 rw page=max\nmap 0x80000000 0x80000000 1g rx page=1g\n\
        map 0x100000000 0 64k r page=4k\nmap 0x100000000 0x10000 64k r page=64k\nstats\nwalk 0x100000000\nwalk 0x90000000\n";
    assert_eq!(
        run("ppc-radix --granule 64k", script),
        "ok\nok\nrefused page\nok\ntables 8\nleaves_64k 3\nleaves_2m 512\nleaves_1g 1\nbytes_tables 82688\nend 5\n\
         L4 0x0 8000000000000009\nL3 0x100000000 8000000000000009\nL2 0x100000000 8000000000000005\n\
         L1 0x100000000 c000000000010104\nend 4\nL4 0x0 8000000000000009\nL3 0x80000000 c000000080000105\nend 2\n"
    );
}

#[test]
fn rule_05_radix_leaves_are_split_and_keep_what_they_say() {
    let script = "map 0 0x40000000 2m rw page=2m mem=uc\nunmap 0x10000 64k\nprotect 0x20000 64k r\nunmap 0x40000 0x1c0000\ndump\n";
    assert_eq!(
        run("ppc-radix --granule 64k", script),
        "ok\nok\nok\nok\nL4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x0 8000000000000005\n\
         L1 0x0 c000000040000126\nL1 0x20000 c000000040020124\nL1 0x30000 c000000040030126\nend 6\n"
    );
    assert_eq!(run("ppc-radix", "map 0 0 4k rw\nprotect 0 4k w\nunmap 0 4k\ndump\n"), "ok\nrefused perm\nok\nend 0\n");
}

#[test]
fn rule_06_radix_logging_withholds_writing_and_keeps_c() {
    let script = "map 0x1000 0x5000 8k rw\ntouch 0x1000 w\nwrprotect 0x1000 8k\nwalk 0x1000\ntouch 0x2000 w\nwalk 0x2000\ndirty 0 1m\n";
    let links = "L4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x0 8000000000000009\n";
    assert_eq!(
        run("ppc-radix", script),
        format!(
            "ok\nok 0x5000\nok\n{links}L1 0x1000 c000000000005184\nend 4\nok 0x6000\n{links}L1 0x2000 c000000000006186\nend 4\n\
             0x1000 0x1000\n0x2000 0x1000\nend 2\n"
        )
    );
}

#[test]
fn rule_07_radix_hardware_sets_r_and_c_unless_it_is_told_not_to() {
    let script = "map 0x1000 0x5000 4k rw\nage 0 4m\ntouch 0x1000 r\nage 0 4m\ntouch 0x1004 w\ntouch 0x1000 x\ntouch 0x2000 r\nwalk 0x1000\n";
    let rows = "L4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x0 8000000000000009\n";
    assert_eq!(
        run("ppc-radix", script),
        format!(
            "ok\nok 1\nok 0x5000\nok 1\nok 0x5004\nfault perm\nfault absent\n{rows}L1 0x1000 c000000000005186\nend 4\n"
        )
    );
    let without = "map 0x1000 0x5000 4k rw\nage 0 4m\ntouch 0x1000 w\ntouch 0x1000 w\ndirty 0 4m\n";
    assert_eq!(run("ppc-radix --hw-ad=off", without), "ok\nok 1\nfault af\nok 0x5000\nend 0\n");
}

#[test]
fn rule_08_a_harvest_of_radix_clears_c() {
    let script =
        "map 0 0x200000 2m rw page=2m\ntouch 0x1234 w\ndirty 0 4k\ndirty 0 2m\ntouch 0x5000 w\ndirty 0 2m\nflushes\n";
    assert_eq!(
        run("ppc-radix", script),
        "ok\nok 0x201234\n0x0 0x200000\nend 1\nend 0\nok 0x205000\n0x0 0x200000\nend 1\ntlbie 2\nend 1\n"
    );
}

#[test]
fn rule_09_radix_change_keeps_the_rest_of_the_leaf() {
    let script = "map 0x1000 0x5000 8k rwx mem=wc\ntouch 0x1000 w\nchange 0x1000 0x9000\ntouch 0x1000 w\ntouch 0x1000 x\nwalk 0x1000\n\
        change 0x3000 0x9000\nzapchange 0x2000 0x9000\ndirty 0 1m\n";
    assert_eq!(
        run("ppc-radix", script),
        "ok\nok 0x5000\nchanged\nfault perm\nok 0x9000\nL4 0x0 8000000000000009\nL3 0x0 8000000000000009\n\
         L2 0x0 8000000000000009\nL1 0x1000 c000000000009135\nend 4\nabsent\nzapped\n0x1000 0x1000\nend 1\n"
    );
    let large = "map 0 0x40000000 2m rwx page=2m\nchange 0x30000 0x90000\nwalk 0x30000\nwalk 0x40000\n";
    let links = "L4 0x0 8000000000000009\nL3 0x0 8000000000000009\nL2 0x0 8000000000000005\n";
    assert_eq!(
        run("ppc-radix --granule 64k", large),
        format!("ok\nchanged\n{links}L1 0x30000 c000000000090105\nend 4\n{links}L1 0x40000 c000000040040107\nend 4\n")
    );
}

#[test]
fn rule_10_radix_splits_to_the_page_and_collapses_as_far_as_it_can() {
    let script = "map 0 0x40000000 1g rw page=1g\nsplit 0x200000 2m\nstats\ncollapse 0 1g\nwalk 0\n";
    assert_eq!(
        run("ppc-radix --granule 64k", script),
        "ok\nok\ntables 4\nleaves_64k 32\nleaves_2m 511\nleaves_1g 0\nbytes_tables 73984\nend 5\nok\n\
         L4 0x0 8000000000000009\nL3 0x0 c000000040000106\nend 2\n"
    );
}

#[test]
fn rule_12_radix_flushes_are_tlbies() {
    let flushes = |options: &str, script: &str| {
        let out = run(format!("ppc-radix {options}").trim_end(), &format!("{script}flushes\n"));
        out.lines().filter(|line| line.starts_with("tlbie")).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(flushes("", "map 0 0 64k rw\nunmap 0x10000 64k\nage 0 64k\nprotect 0 64k rwx\n"), "", "nothing went");
    assert_eq!(flushes("", "map 0 0 64k rw\nwrprotect 0 64k\n"), "tlbie 16");
    assert_eq!(flushes("--granule 64k", "map 0 0 64k rw\nwrprotect 0 64k\n"), "tlbie 1");
    // What changes its size is flushed as what it was, and a table goes with its link.
    assert_eq!(flushes("--granule 64k", "map 0 0 2m rw page=2m\nsplit 0 2m\n"), "tlbie 1");
    assert_eq!(flushes("--granule 64k", "map 0 0 2m rw page=2m\nsplit 0 2m\ncollapse 0 2m\n"), "tlbie 33 tlbie-pwc 1");
    assert_eq!(flushes("--granule 64k", "map 0 0 2m rw\nunmap 0 2m\n"), "tlbie 32 tlbie-pwc 2");
    // Of a table that goes its leaves are named, and no place that was empty.
    assert_eq!(flushes("", "map 0 0 64k rw\nunmap 0 64k\n"), "tlbie 16 tlbie-pwc 1");
    assert_eq!(flushes("", "map 0x3000 0 4k rw\nunmap 0 1g\n"), "tlbie 1 tlbie-pwc 2");
    // More than 512 leaves: the partition.
    assert_eq!(flushes("", "map 0 0 8m rw\nwrprotect 0 8m\n"), "tlbie-all 1");
    assert_eq!(flushes("", "map 0 0 4k rw\nchange 0 0x1000\n"), "tlbie 2", "the window, and the page");
}

#[test]
fn rule_13_radix_tables_have_the_sizes_of_their_levels() {
    let stats = |options: &str| run(format!("ppc-radix {options}").trim_end(), "map 0 0 64k r\nstats\n");
    assert_eq!(stats(""), "ok\ntables 4\nleaves_4k 16\nleaves_2m 0\nleaves_1g 0\nbytes_tables 77824\nend 5\n");
    assert_eq!(
        stats("--granule 64k"),
        "ok\ntables 4\nleaves_64k 1\nleaves_2m 0\nleaves_1g 0\nbytes_tables 73984\nend 5\n"
    );
}

#[test]
fn rule_14_radix_dumps_under_the_mask() {
    let mask = spte(&["decode", "--mask", "--format", "ppc-radix", "--granule", "64k"], b"").1;
    assert_eq!(
        mask,
        "L4 c00000000000001f table\nL3 c00000000000001f table\nL3 c1ffffffc00001b7 leaf\nL2 c00000000000001f table\n\
         L2 c1ffffffffe001b7 leaf\nL1 c1ffffffffff01b7 leaf\nend 6\n"
    );
}

#[test]
fn rule_02_mips_lines_are_whole_pages_of_48_bits() {
    let refused = |options: &str, line: &str| {
        let words: Vec<&str> = ["run", "--format", "mips64"].into_iter().chain(options.split_whitespace()).collect();
        let (status, out, err) = spte(&words, line.as_bytes());
        assert_eq!((status, out.as_str()), (2, ""));
        err
    };
    assert_eq!(
        refused("", "map 0x1000000000000 0 4k r\n"),
        "line 1: guest address 0x1000000000fff is beyond 48 bits\n"
    );
    assert_eq!(
        refused("--ipa-bits 40", "touch 0x10000000000 r\n"),
        "line 1: guest address 0x10000000000 is beyond 40 bits\n"
    );
    assert_eq!(
        refused("--granule 64k", "unmap 0x1000 64k\n"),
        "line 1: guest address 0x1000 is not aligned to 0x10000\n"
    );
    assert_eq!(refused("--hw-ad", ""), "spte: accessed and dirty are software's in format mips64\n");
    let levels = "spte: 48 guest address bits are not within 32 to 40, which 3 levels of mips64 translate\n";
    assert_eq!(refused("--levels 3", ""), levels);
    assert_eq!(refused("--levels 5", ""), "spte: format mips64 has no tables of 5 levels\n");
    assert_eq!(refused("--pa-bits 60", ""), "spte: 60 physical address bits are not within 32 to 59\n");
}

#[test]
fn rule_04_mips_has_every_right_and_every_memory_type() {
    // RI and XI say what is missing; V is set; C is 2, 7, 0, 3.
    let script = "map 0x1000 0x1000 4k r mem=uc\nmap 0x2000 0x2000 4k - mem=wc\nmap 0x3000 0x3000 4k x mem=wt\n\
        map 0x4000 0x4000 4k wx\nmap 0x5000 0x5000 4k rw\nmap 0x5000 0 8k r\nmap 0x200000 0 2m r page=2m\n\
        map 0x200000 0x400000 12k rwx page=max\ndump\n";
    assert_eq!(
        run("mips64 --ipa-bits 40", script),
        "ok\nok\nok\nok\nok\nrefused present 0x5000\nrefused page\nok\n\
         L3 0x0 9800000000000000\nL2 0x0 9800000000000000\nL1 0x1000 0000000000001490\nL1 0x2000 0000000000002eb0\n\
         L1 0x3000 00000000000030a0\nL1 0x4000 00000000000047a0\nL1 0x5000 0000000000005790\n\
         L2 0x200000 9800000000000000\nL1 0x200000 0000000000400780\nL1 0x201000 0000000000401780\n\
         L1 0x202000 0000000000402780\nend 11\n"
    );
}

#[test]
fn rules_06_to_09_mips_facts_are_software_s() {
    let script = "map 0x3000 0x7000 8k rwx\nage 0x3000 4k\ntouch 0x3000 r\ntouch 0x3000 w\nwrprotect 0x3000 8k\n\
        touch 0x4000 w\ndirty 0 1m\nchange 0x3000 0x9000\nchange 0x5000 0x9000\nwalk 0x3000\ntouch 0x3000 w\n";
    for (options, root) in [("mips64 --ipa-bits 40", ""), ("mips64", "L4 0x0 9800000000000000\n")] {
        let end = if root.is_empty() { 3 } else { 4 };
        assert_eq!(
            run(options, script),
            format!(
                "ok\nok 1\nfault af\nok 0x7000\nok\nok 0x8000\n0x4000 0x1000\nend 1\nchanged\nabsent\n\
                 {root}L3 0x0 9800000000000000\nL2 0x0 9800000000000000\nL1 0x3000 0000000000009680\nend {end}\nfault perm\n"
            )
        );
    }
}

#[test]
fn rule_10_mips_has_no_larger_leaves() {
    let script = "map 0x10000 0x30000 128k rx page=max\nsplit 0x10000 64k\ncollapse 0 1m\nzapchange 0x10000 0\nwalk 0x10000\nstats\n";
    assert_eq!(
        run("mips64 --granule 64k", script),
        "ok\nok\nok\nzapped\nL3 0x0 9800000000000000\nL2 0x0 9800000000000000\nL1 0x10000 0000000000000000\nend 3\n\
         tables 3\nleaves_64k 1\nbytes_tables 196608\nend 3\n"
    );
}

#[test]
fn rule_12_mips_flushes_are_probes_of_pairs_or_a_new_guest_id() {
    // Two pages of two pairs, one page, more than 256 pairs; absent pages owe none.
    let script = "map 0 0x40000000 4m rw\nunmap 0x3000 8k\nunmap 0x9000 4k\nunmap 0x9000 4k\nflushes\n\
        unmap 0x10000 0x210000\nflushes\nstats\nunmap 0 1t\nstats\n";
    assert_eq!(
        run("mips64 --ipa-bits 40", script),
        "ok\nok\nok\nok\ntlbp 3\nend 1\nok\nguestid 1\ntlbp 3\nend 2\n\
         tables 4\nleaves_4k 493\nbytes_tables 20480\nend 3\nok\ntables 1\nleaves_4k 0\nbytes_tables 8192\nend 3\n"
    );
}

#[test]
fn rule_14_mips_masks_leave_what_goes_into_entry_lo() {
    let mask = |options: &str| {
        let words: Vec<&str> =
            ["decode", "--mask", "--format", "mips64"].into_iter().chain(options.split_whitespace()).collect();
        spte(&words, b"").1
    };
    assert_eq!(
        mask(""),
        "L4 f800000000000000 table\nL3 f800000000000000 table\nL2 f800000000000000 table\nL1 0000fffffffffff0 leaf\nend 4\n"
    );
    assert_eq!(
        mask("--granule 64k --ipa-bits 42 --pa-bits 40"),
        "L2 f800000000000000 table\nL1 000000ffffff0ff0 leaf\nend 2\n"
    );
}
