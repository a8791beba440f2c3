// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Roots, the partition table, PTCR; and what a flush has to name.

mod common;

use common::*;
use notifier_core::{AddrRange, Gpa, OutputAddr};
use spte_core::format::Level;
use spte_core::{FlushRange, FlushRequest, Leaves};
use spte_ppc::*;

const L1: Level = Level::LEAF;
const ROOT: OutputAddr = OutputAddr::new(0x1000_0000);

#[test]
fn the_size_of_a_tree_is_in_two_pieces() {
    let root = Root::new(&radix(BasePage::K4), ROOT).unwrap();
    // 52 - 31 = 21 = 0b10101: 0b10 in 62:61, 0b101 in 7:5; 13 in 4:0.
    assert_eq!(root.raw(), 0x4000_0000_1000_00ad);
    assert_eq!((root.address_bits(), root.base()), (52, ROOT));
    assert_eq!(Root::from_raw(root.raw()), Ok(root));
    assert_eq!(Root::new(&radix(BasePage::K64), ROOT), Ok(root), "the root is the same for both base pages");
}

#[test]
fn partition_entries_are_as_worked_out_by_hand() {
    let entry = PartitionEntry::new(&radix(BasePage::K64), ROOT, 0x4000_0000, 16).unwrap();
    assert_eq!(entry.raw(), [0xc000_0000_1000_00ad, 0x8000_0000_4000_0004]);
    let image = [0xc0, 0, 0, 0, 0x10, 0, 0, 0xad, 0x80, 0, 0, 0, 0x40, 0, 0, 4];
    assert_eq!(entry.to_memory(), image);
    assert_eq!(PartitionEntry::from_memory(image), Ok(entry));
    assert_eq!((entry.root().base(), entry.process_table()), (ROOT, (0x4000_0000, 0x1_0000)));
    // The smallest and the largest process table.
    assert_eq!(PartitionEntry::new(&radix(BasePage::K4), ROOT, 0x1000, 12).unwrap().raw()[1], 0x8000_0000_0000_1000);
    assert_eq!(PartitionEntry::new(&radix(BasePage::K4), ROOT, 1 << 36, 36).unwrap().raw()[1], 0x8000_0010_0000_0018);
}

#[test]
fn process_entries_are_roots() {
    let entry = ProcessEntry(Root::new(&radix(BasePage::K64), ROOT).unwrap());
    let image = [0x40, 0, 0, 0, 0x10, 0, 0, 0xad, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(entry.to_memory(), image);
    assert_eq!(ProcessEntry::from_memory(image), Ok(entry));
    let mut second = image;
    second[15] = 1;
    assert_eq!(ProcessEntry::from_memory(second), Err(RegisterError::Reserved { raw: 1, bits: 1 }));
}

#[test]
fn the_partition_table_has_room_for_so_many() {
    let ptcr = Ptcr::new(OutputAddr::new(0x7_0000), 16).unwrap();
    assert_eq!((ptcr.raw(), ptcr.base(), ptcr.entries()), (0x7_0004, OutputAddr::new(0x7_0000), 4096));
    assert_eq!(ptcr.entry(1), Ok(OutputAddr::new(0x7_0010)));
    assert_eq!(ptcr.entry(4095), Ok(OutputAddr::new(0x7_fff0)));
    assert_eq!(ptcr.entry(4096), Err(RegisterError::Lpid { lpid: 4096, entries: 4096 }));
    assert_eq!(Ptcr::from_raw(0x7_0004), Ok(ptcr));
}

#[test]
fn every_address_bit_of_a_register_counts() {
    let top = OutputAddr::new(0x0fff_0000_0000_0000);
    assert_eq!(Ptcr::new(top, 16).map(|ptcr| (ptcr.raw(), ptcr.base())), Ok((0x0fff_0000_0000_0004, top)));
    assert_eq!(Ptcr::from_raw(0x0fff_0000_0000_0004).map(Ptcr::base), Ok(top));
    let root = Root::from_raw(0x4000_0000_0000_00ad | top.as_u64()).unwrap();
    assert_eq!(root.base(), top);
    let entry = PartitionEntry::from_raw(1 << 63 | root.raw(), 1 << 63 | top.as_u64() | 4).unwrap();
    assert_eq!((entry.root(), entry.process_table()), (root, (top.as_u64(), 0x1_0000)));
}

#[test]
fn registers_refuse_what_is_reserved() {
    let unaligned = |base, align| Err(RegisterError::Unaligned { base: OutputAddr::new(base), align });
    let format = radix(BasePage::K4);
    assert_eq!(Root::new(&format, OutputAddr::new(0x1000)).map(|_| ()), unaligned(0x1000, 0x1_0000));
    let wide = OutputAddr::new(1 << 53);
    assert_eq!(Root::new(&format, wide), Err(RegisterError::TooWide { base: wide, bits: 53 }));
    let good = 0x4000_0000_1000_00ad;
    assert_eq!(Root::from_raw(good | 1 << 63), Err(RegisterError::Reserved { raw: good | 1 << 63, bits: 1 << 63 }));
    assert_eq!(Root::from_raw(good | 1 << 60), Err(RegisterError::Reserved { raw: good | 1 << 60, bits: 1 << 60 }));
    for bit in [0, 4, 5, 6, 61, 62] {
        assert!(matches!(Root::from_raw(good ^ 1 << bit), Err(RegisterError::Shape { .. })), "bit {bit}");
    }
    assert_eq!(Root::from_raw(good | 0x100).map(|_| ()), unaligned(0x1000_0100, 0x1_0000));
    let table = |raw| PartitionEntry::from_raw(1 << 63 | good, raw).map(|_| ());
    assert_eq!(table(0x8000_0000_0000_0018), Ok(()));
    assert_eq!(table(0x8000_0000_0000_0019), Err(RegisterError::TableSize { log2: 37 }), "PRTS 25");
    assert_eq!(table(0x8000_0000_0000_1001), unaligned(0x1000, 0x2000));
    for bit in [5, 11, 60, 62] {
        let raw = 1 << 63 | 1 << bit;
        assert_eq!(table(raw), Err(RegisterError::Reserved { raw, bits: 1 << bit }));
    }
    // A guest's tree translates 52 bits.
    let partition = |base, log2| PartitionEntry::new(&format, ROOT, base, log2).map(|_| ());
    let too_wide = |base| Err(RegisterError::TooWide { base: OutputAddr::new(base), bits: 52 });
    assert_eq!(partition((1 << 52) - 0x1_0000, 16), Ok(()));
    assert_eq!(partition(1 << 52, 16), too_wide(1 << 52));
    assert_eq!(partition(1 << 59, 36), too_wide(1 << 59));
    // HR and GR: both radix.
    assert_eq!(table(0x18), Err(RegisterError::NotRadix { raw: 0x18 }));
    assert_eq!(PartitionEntry::from_raw(good, 1 << 63), Err(RegisterError::NotRadix { raw: good }));
    assert!(matches!(Ptcr::from_raw(1 << 63), Err(RegisterError::Reserved { .. })));
    assert!(matches!(Ptcr::new(OutputAddr::new(0), 11), Err(RegisterError::TableSize { log2: 11 })));
    assert!(matches!(Ptcr::new(OutputAddr::new(0), 37), Err(RegisterError::TableSize { log2: 37 })));
    assert!(matches!(Ptcr::new(OutputAddr::new(0), 200), Err(RegisterError::TableSize { .. })));
    assert_eq!(Ptcr::new(OutputAddr::new(0x7_1000), 16).map(|_| ()), unaligned(0x7_1000, 0x1_0000));
    assert_eq!(
        PartitionEntry::new(&format, ROOT, 0x4000_1000, 13).map(|_| ()),
        unaligned(0x4000_1000, 0x2000),
        "a table is aligned to its size"
    );
    assert!(matches!(Ptcr::new(OutputAddr::new(1 << 60), 12), Err(RegisterError::TooWide { bits: 60, .. })));
}

const NONE: TlbFixes = TlbFixes { erat: false, store_queue: false };
const LPID: u32 = 7;

fn range(start: u64, len: u64, leaf: Option<Level>, links: bool) -> FlushRange {
    let leaves = leaf.map_or(Leaves::Any, Leaves::Of);
    let links = links.then(|| leaf.unwrap_or(Level::LEAF).above().unwrap());
    FlushRange { range: AddrRange::with_len(Gpa::new(start), len).unwrap(), leaves, links }
}

fn steps(format: &Radix, fixes: TlbFixes, ranges: &[FlushRange], all: bool) -> Vec<Step> {
    Steps::new(format, fixes, LPID, &FlushRequest { ranges, all, nonblocking: false }).collect()
}

/// The invalidations, with whatever is around them taken away and checked.
fn named(format: &Radix, ranges: &[FlushRange], all: bool) -> Vec<Tlbie> {
    let steps = steps(format, NONE, ranges, all);
    let (inner, tail) = steps.split_at(steps.len() - 3);
    assert_eq!(tail, [Step::Eieio, Step::Tlbsync, Step::Ptesync]);
    assert_eq!(inner[0], Step::Ptesync);
    let tlbie = |step: &Step| match step {
        Step::Tlbie(tlbie) => *tlbie,
        other => panic!("{other:?} among invalidations"),
    };
    inner[1..].iter().map(tlbie).collect()
}

fn va(rb: u64) -> Tlbie {
    Tlbie { rb, rs: 7, ric: Ric::Tlb }
}

const WALK: Tlbie = Tlbie { rb: 0x800, rs: 7, ric: Ric::PageWalk };
const ALL: Tlbie = Tlbie { rb: 0x800, rs: 7, ric: Ric::All };

#[test]
fn operands_are_as_worked_out_by_hand() {
    let [k4, k64] = both();
    let one = |format, gpa, number, bytes| named(format, &[range(gpa, bytes, Some(level(number)), false)], false);
    assert_eq!(one(&k4, 0x4020_1000, 1, 0x1000), [va(0x4020_1000)]);
    assert_eq!(one(&k64, 0x4021_0000, 1, 0x1_0000), [va(0x4021_00a0)]);
    assert_eq!(one(&k64, 0x4020_0000, 2, 2 << 20), [va(0x4020_0020)]);
    assert_eq!(one(&k4, 0x4000_0000, 3, 1 << 30), [va(0x4000_0040)]);
    assert_eq!([1, 2, 3, 4].map(|number| k4.page_size_code(level(number))), [Some(0), Some(1), Some(2), None]);
    assert_eq!(k64.page_size_code(L1), Some(5));
    // Any address inside the leaf names its start.
    assert_eq!(k4.tlbie_leaf(LPID, 0x403f_f123, level(2)), Some(va(0x4020_0020)));
    assert_eq!(k4.tlbie_leaf(LPID, 0, level(4)), None);
    assert!(va(0x4020_0020).is_by_address() && !ALL.is_by_address());
}

#[test]
fn a_flush_is_framed_by_barriers() {
    let format = radix(BasePage::K4);
    let page = range(0x1000, 0x1000, Some(L1), false);
    let tail = [Step::Eieio, Step::Tlbsync, Step::Ptesync];
    let expected = [&[Step::Ptesync, Step::Tlbie(va(0x1000))][..], &tail].concat();
    assert_eq!(steps(&format, NONE, &[page], false), expected);
    assert_eq!(steps(&format, NONE, &[], false), [], "nothing is named, nothing is done");
    assert_eq!(named(&format, &[], true), [ALL]);
    assert_eq!(tlb::INSTALLED, [Step::Ptesync]);
}

#[test]
fn every_leaf_of_a_range_is_named_with_its_size() {
    let format = radix(BasePage::K64);
    assert_eq!(named(&format, &[range(0, 4 << 20, Some(level(2)), false)], false), [va(0x20), va(0x20_0020)]);
    let pages = named(&format, &[range(0, 2 << 20, Some(L1), false)], false);
    let expected: Vec<Tlbie> = (0..32).map(|page| va(page << 16 | 0xa0)).collect();
    assert_eq!(pages, expected);
    let two = [range(0x1_0000, 0x1_0000, Some(L1), false), range(2 << 20, 2 << 20, Some(level(2)), false)];
    assert_eq!(named(&format, &two, false), [va(0x1_00a0), va(0x20_0020)]);
    // A part of a leaf names the leaf.
    assert_eq!(named(&format, &[range(0x21_0000, 0x1_0000, Some(level(2)), false)], false), [va(0x20_0020)]);
    // From inside one leaf to inside the next.
    assert_eq!(
        named(&format, &[range(0x21_0000, 2 << 20, Some(level(2)), false)], false),
        [va(0x20_0020), va(0x40_0020)]
    );
    // More than is worth it.
    assert_eq!(named(&format, &[range(0, 64 << 20, Some(L1), false)], false), [ALL]);
    assert_eq!(named(&format, &[range(0, 32 << 20, Some(L1), false)], false).len(), 512);
    assert_eq!(named(&format, &[two[0], range(0, 64 << 20, Some(L1), false), two[1]], false), [va(0x1_00a0), ALL]);
}

#[test]
fn a_range_of_several_sizes_takes_the_partition() {
    let format = radix(BasePage::K4);
    assert_eq!(named(&format, &[range(0, 0x2000, None, false)], false), [ALL]);
    assert_eq!(named(&format, &[range(0, 0x2000, None, true)], false), [ALL]);
    assert_eq!(named(&format, &[range(0, 1 << 40, Some(level(4)), false)], false), [ALL], "no such leaf");
}

#[test]
fn a_link_that_goes_takes_the_page_walk_cache_first() {
    let format = radix(BasePage::K64);
    let gone = range(0, 2 << 20, Some(L1), true);
    let flushed = named(&format, &[gone], false);
    assert_eq!((flushed[0], flushed.len()), (WALK, 33));
    // Once for all of them.
    let page = range(0x40_0000, 0x1_0000, Some(L1), true);
    let flushed = named(&format, &[page, page, range(0x80_0000, 0x1_0000, Some(L1), false)], false);
    assert_eq!(flushed, [WALK, va(0x40_00a0), va(0x40_00a0), va(0x80_00a0)]);
}

#[test]
fn fixes_repeat_the_last_invalidation() {
    let format = radix(BasePage::K64);
    let page = range(0x1_0000, 0x1_0000, Some(L1), false);
    let tail = [Step::Eieio, Step::Tlbsync, Step::Ptesync];
    let first = [Step::Ptesync, Step::Tlbie(va(0x1_00a0))];
    let erat = [Step::Ptesync, Step::Tlbie(Tlbie { rs: 0, ..va(0x1_00a0) })];
    let queue = [Step::Ptesync, Step::Tlbie(va(0x1_00a0))];
    let with = |erat, store_queue| steps(&format, TlbFixes { erat, store_queue }, &[page], false);
    assert_eq!(with(true, false), [&first[..], &erat, &tail].concat());
    assert_eq!(with(false, true), [&first[..], &queue, &tail].concat());
    assert_eq!(with(true, true), [&first[..], &erat, &queue, &tail].concat());
    // Of several addresses any may have stayed in the ERAT: all of LPID 0, and not the last address alone.
    let pages = range(0x1_0000, 0x2_0000, Some(L1), false);
    let several = steps(&format, TlbFixes { erat: true, store_queue: true }, &[pages], false);
    let named = [Step::Ptesync, Step::Tlbie(va(0x1_00a0)), Step::Tlbie(va(0x2_00a0))];
    let erat = [Step::Ptesync, Step::Tlbie(Tlbie { rb: 0x800, rs: 0, ric: Ric::Tlb })];
    let queue = [Step::Ptesync, Step::Tlbie(va(0x2_00a0))];
    assert_eq!(several, [&named[..], &erat, &queue, &tail].concat());
    let one = range(0x1_0000, 0x1_0000, Some(L1), true);
    let after_a_link = steps(&format, TlbFixes { erat: true, store_queue: false }, &[one], false);
    assert_eq!(
        after_a_link[3..5],
        [Step::Ptesync, Step::Tlbie(Tlbie { rs: 0, ..va(0x1_00a0) })],
        "one address after all"
    );
    // Of all of a partition: its translations.
    let all = steps(&format, TlbFixes { erat: true, store_queue: false }, &[], true);
    assert_eq!(all[2..4], [Step::Ptesync, Step::Tlbie(Tlbie { rb: 0x800, rs: 0, ric: Ric::Tlb })]);
}

/// Where nothing was translated the page-walk cache is all that has to go, and once is enough.
#[test]
fn links_that_go_alone_take_the_page_walk_cache_alone() {
    let [k4, _] = both();
    let links = |start| FlushRange {
        range: AddrRange::with_len(Gpa::new(start), 2 << 20).unwrap(),
        leaves: Leaves::None,
        links: L1.above(),
    };
    let page = range(0x7000, 0x1000, Some(L1), false);
    assert_eq!(named(&k4, &[links(0)], false), [WALK]);
    assert_eq!(named(&k4, &[page, links(0), links(1 << 30), page], false), [va(0x7000), WALK, va(0x7000)]);
    assert_eq!(named(&k4, &[links(0), range(2 << 20, 0x1000, Some(L1), true)], false), [WALK, va(2 << 20)]);
    // The fixes are for translations.
    let fixes = TlbFixes { erat: true, store_queue: true };
    let alone = [Step::Ptesync, Step::Tlbie(WALK), Step::Eieio, Step::Tlbsync, Step::Ptesync];
    assert_eq!(steps(&k4, fixes, &[links(0)], false), alone);
}
