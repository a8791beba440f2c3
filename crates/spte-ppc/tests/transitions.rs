// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of `transition`, row by row, with entries written out.

mod common;

use common::*;
use spte_core::format::{Format, Level, Transition};
use spte_ppc::BasePage;

const FREE: Transition = Transition::FREE;
const FLUSH: Transition = Transition::FLUSH;
const BREAK: Transition = Transition::BREAK;

/// A page at 0x8000_1000 that is read, written and executed; upgradable; R and C.
const PAGE: u64 = 0xc000_0000_8000_1987;
/// The same, read-only, clean, and nothing to upgrade.
const READ_ONLY: u64 = 0xc000_0000_8000_1105;
/// 2M at 0x8000_0000, read-only.
const LARGE: u64 = 0xc000_0000_8000_0105;
/// A link to a table of 512 entries.
const LINK: u64 = 0x8000_0000_7000_5009;

fn both_ways(number: u8, one: u64, other: u64, expected: Transition) {
    let format = radix(BasePage::K4);
    for (old, new) in [(one, other), (other, one)] {
        assert_eq!(format.transition(level(number), old, new), expected, "{old:#x} to {new:#x}");
        assert_eq!(format.equal_contents_transition(level(number), old, new), expected, "{old:#x} to {new:#x}");
    }
}

#[test]
fn another_output_or_attribute_breaks() {
    both_ways(1, READ_ONLY, READ_ONLY ^ 0x0f00_0000, BREAK);
    both_ways(1, PAGE, READ_ONLY ^ 0x0f00_0000, BREAK);
    both_ways(2, LARGE, LARGE ^ 0x4000_0000, BREAK);
    for att in 1..4 {
        both_ways(1, READ_ONLY, READ_ONLY | att << 4, BREAK);
    }
}

#[test]
fn a_change_of_size_breaks() {
    both_ways(2, LARGE, LINK, BREAK);
    both_ways(3, LARGE & !0x4000_0000, LINK, BREAK);
    both_ways(2, LINK, LINK ^ 0x1_0000, BREAK);
    both_ways(2, LINK, LINK, FREE);
}

#[test]
fn rights_alone_never_break_and_flush_when_they_go() {
    let format = radix(BasePage::K4);
    let l1 = level(1);
    // Write (upgradable kept, then not), execute, read.
    for (more, less) in [
        (PAGE, PAGE & !0x2),
        (PAGE, PAGE & !0x802),
        (READ_ONLY | 0x800, READ_ONLY),
        (READ_ONLY, READ_ONLY & !0x1),
        (READ_ONLY, READ_ONLY & !0x4),
    ] {
        assert_eq!(format.transition(l1, more, less), FLUSH, "{more:#x} to {less:#x}");
        assert_eq!(format.transition(l1, less, more), FREE, "{less:#x} to {more:#x}");
    }
    // EAA[2] alone grants reading too: EAA[1] on top is nothing, and EAA[2] in exchange for it is no loss.
    assert_eq!(format.transition(l1, PAGE, PAGE & !0x4), FREE);
    assert_eq!(format.transition(l1, PAGE, PAGE & !0x6), FLUSH);
}

#[test]
fn a_cleared_change_flushes() {
    let format = radix(BasePage::K4);
    assert_eq!(format.transition(level(1), PAGE, PAGE & !0x80), FLUSH);
    assert_eq!(format.transition(level(1), PAGE & !0x80, PAGE), FREE);
}

#[test]
fn referenced_and_software_bits_cost_nothing() {
    for bit in [0x100, 0x200, 0x400, 1 << 61] {
        both_ways(1, READ_ONLY, READ_ONLY ^ bit, FREE);
        both_ways(2, LARGE, LARGE ^ bit, FREE);
    }
}

#[test]
fn what_becomes_invalid_is_flushed_and_what_was_invalid_costs_nothing() {
    let format = radix(BasePage::K4);
    let invalid =
        [0, format.not_present(Level::LEAF).claimed, format.not_present(Level::LEAF).dead, 0x2000_0000_0000_0000];
    for none in invalid {
        for (number, raw) in [(1, PAGE), (2, LARGE), (2, LINK), (3, LINK)] {
            assert_eq!(format.transition(level(number), raw, none), FLUSH);
            assert_eq!(format.transition(level(number), none, raw), FREE);
        }
        for other in invalid {
            assert_eq!(format.transition(level(1), none, other), FREE);
        }
    }
    // What somebody else left valid may be cached.
    let foreign = LINK ^ 0xc;
    assert_eq!(format.transition(level(2), foreign, 0), FLUSH);
    assert_eq!(format.transition(level(2), foreign, LINK), BREAK);
    assert_eq!(format.transition(level(2), foreign, foreign), FREE);
}
