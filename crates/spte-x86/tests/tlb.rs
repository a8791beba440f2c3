// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What flushes name.

use notifier_core::{AddrRange, Gpa, OutputAddr};
use spte_core::format::Level;
use spte_core::{FlushRange, FlushRequest, Leaves};
use spte_x86::{EptCapabilities, EptPointer, Invept, Levels, LongMode, LongModeOptions, Step, Steps, TlbControl};

fn flush(start: u64, bytes: u64, leaf: Option<u8>, links: bool) -> FlushRange {
    let range = AddrRange::with_len(Gpa::new(start), bytes).unwrap();
    let leaves = leaf.map_or(Leaves::Any, |level| Leaves::Of(Level::new(level).unwrap()));
    FlushRange { range, leaves, links: links.then(|| Level::new(2).unwrap()) }
}

fn steps(levels: Levels, globals: bool, ranges: &[FlushRange]) -> Vec<Step> {
    let format = LongMode::new(LongModeOptions { levels, ..LongModeOptions::default() }).unwrap();
    Steps::new(&format, globals, &FlushRequest { ranges, all: false, nonblocking: false }).collect()
}

#[test]
fn invept_names_the_table_where_it_can() {
    let eptp = EptPointer::new(OutputAddr::new(0x1234_5000), Levels::Four, true).unwrap();
    let single = EptCapabilities::INVEPT | EptCapabilities::INVEPT_SINGLE_CONTEXT;
    let all = EptCapabilities::INVEPT | EptCapabilities::INVEPT_ALL_CONTEXTS;
    let named = Invept::new(eptp, single | all).unwrap();
    assert_eq!((named.kind(), named.descriptor()), (1, [0x1234_505e, 0]));
    assert_eq!(Invept::new(eptp, single), Some(named));
    let everything = Invept::new(eptp, all).unwrap();
    assert_eq!((everything.kind(), everything.descriptor()), (2, [0, 0]));
    assert_eq!(Invept::new(eptp, EptCapabilities::INVEPT), None);
    assert_eq!(Invept::new(eptp, EptCapabilities::INVEPT_SINGLE_CONTEXT), None, "the instruction is not there");
}

#[test]
fn an_asid_is_flushed_by_the_next_vmrun() {
    assert_eq!(TlbControl::flush(true).raw(), 3);
    assert_eq!(TlbControl::flush(false).raw(), 1);
    assert_eq!((TlbControl::Keep.raw(), TlbControl::AsidNonGlobal.raw()), (0, 7));
}

#[test]
fn each_leaf_is_named_once_whatever_its_size() {
    let ranges = [flush(0x20_0000, 0x40_0000, Some(2), false), flush(0x7000, 0x2000, Some(1), true)];
    let expected = [0x20_0000, 0x40_0000, 0x7000, 0x8000].map(Step::Invlpg);
    assert_eq!(steps(Levels::Four, false, &ranges), expected);
    // Part of a larger page, and pages of sizes that nobody knows.
    assert_eq!(steps(Levels::Four, false, &[flush(0x20_1000, 0x1000, Some(2), false)]), [Step::Invlpg(0x20_1000)]);
    assert_eq!(steps(Levels::Four, true, &[flush(0, 0x2000, None, true)]), [0, 0x1000].map(Step::Invlpg));
    assert_eq!(steps(Levels::Four, false, &[]), []);
    // What is cached of links goes with any address.
    let links = FlushRange { leaves: Leaves::None, ..flush(1 << 39, 1 << 39, None, true) };
    assert_eq!(steps(Levels::Four, false, &[links]), [Step::Invlpg(1 << 39)]);
}

#[test]
fn addresses_of_the_upper_half_are_canonical() {
    let one = |levels, start| steps(levels, false, &[flush(start, 0x1000, Some(1), false)]);
    assert_eq!(one(Levels::Four, 0x8000_0000_0000), [Step::Invlpg(0xffff_8000_0000_0000)]);
    assert_eq!(one(Levels::Four, 0x7fff_ffff_f000), [Step::Invlpg(0x7fff_ffff_f000)]);
    assert_eq!(one(Levels::Five, 0x8000_0000_0000), [Step::Invlpg(0x8000_0000_0000)]);
    assert_eq!(one(Levels::Five, 0x1ff_ffff_ffff_f000), [Step::Invlpg(0xffff_ffff_ffff_f000)]);
}

#[test]
fn more_than_33_leaves_go_together_and_global_ones_with_them() {
    let pages = |count: u64| flush(0, count << 12, Some(1), false);
    assert_eq!(steps(Levels::Four, false, &[pages(33)]).len(), 33);
    assert_eq!(steps(Levels::Four, false, &[pages(34)]), [Step::WriteCr3]);
    assert_eq!(steps(Levels::Four, true, &[pages(34)]), [Step::Everything]);
    // Counted over all ranges.
    assert_eq!(steps(Levels::Four, false, &[pages(20), flush(1 << 30, 14 << 12, Some(1), true)]), [Step::WriteCr3]);
    let format = LongMode::new(LongModeOptions::default()).unwrap();
    let all = FlushRequest { ranges: &[], all: true, nonblocking: false };
    assert_eq!(Steps::new(&format, false, &all).collect::<Vec<_>>(), [Step::WriteCr3]);
    assert_eq!(Steps::new(&format, true, &all).collect::<Vec<_>>(), [Step::Everything]);
}
