// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of `transition`, row by row, with entries written out.

mod common;

use common::*;
use spte_arm64::*;
use spte_core::format::{Format, Level, Transition};

const FREE: Transition = Transition::FREE;
const FLUSH: Transition = Transition::FLUSH;
const BREAK: Transition = Transition::BREAK;

/// A 4K page at 0x8000_1000: AF, inner shareable, write-back, read-write, executable; upgradable (bit 56).
const PAGE: u64 = 0x0100_0000_8000_17ff;
/// The same, read-only, and nothing to upgrade.
const READ_ONLY: u64 = 0x0000_0000_8000_177f;
/// A 2M block at 0x8000_0000, read-only.
const BLOCK: u64 = 0x0000_0000_8000_077d;
/// A link to a table.
const LINK: u64 = 0x0000_0000_7000_5003;

fn software() -> Stage2 {
    stage2(Stage2Options::default())
}

fn hardware() -> Stage2 {
    stage2(Stage2Options { accessed_dirty: AccessedDirty::Hardware, ..Stage2Options::default() })
}

fn both_ways(format: &Stage2, number: i8, one: u64, other: u64, expected: Transition) {
    for (old, new) in [(one, other), (other, one)] {
        assert_eq!(format.transition(level(number), old, new), expected, "{old:#x} to {new:#x}");
    }
}

#[test]
fn memory_type_cacheability_and_shareability_break() {
    let format = software();
    // Write-back, non-cacheable, write-through, Device-nGnRE; non-shareable, outer.
    for other in [0x8000_1757, 0x8000_176b, 0x8000_1747, 0x8000_147f, 0x8000_167f] {
        both_ways(&format, 3, READ_ONLY, other, BREAK);
        // Equal contents are no excuse.
        assert_eq!(format.equal_contents_transition(L3, READ_ONLY, other), BREAK);
    }
}

#[test]
fn another_output_breaks_unless_both_are_read_only_and_equal() {
    let moved = |raw: u64| raw ^ 0x0f00_0000;
    for format in [software(), hardware()] {
        both_ways(&format, 3, READ_ONLY, moved(READ_ONLY), BREAK);
        assert_eq!(format.equal_contents_transition(L3, READ_ONLY, moved(READ_ONLY)), FLUSH);
        assert_eq!(format.equal_contents_transition(L3, PAGE, moved(READ_ONLY)), BREAK, "the old is writable");
        assert_eq!(format.equal_contents_transition(L3, READ_ONLY, moved(PAGE)), BREAK, "the new is writable");
        let block = BLOCK ^ 0x4000_0000;
        assert_eq!(format.equal_contents_transition(level(2), BLOCK, block), FLUSH);
    }
    // DBM is writable where hardware records writes, and nothing where it does not.
    let clean = 0x0108_0000_8000_177f;
    assert_eq!(hardware().equal_contents_transition(L3, clean, moved(READ_ONLY)), BREAK);
    assert_eq!(hardware().equal_contents_transition(L3, READ_ONLY, moved(clean)), BREAK);
    assert_eq!(software().equal_contents_transition(L3, READ_ONLY | 1 << 51, moved(READ_ONLY) | 1 << 51), FLUSH);
    // A change to another page that is less than the page: nothing moves, nothing breaks.
    assert_eq!(software().equal_contents_transition(L3, READ_ONLY, READ_ONLY), FREE);
}

#[test]
fn a_change_of_size_breaks_unless_the_machine_does_without() {
    let format = software();
    both_ways(&format, 2, BLOCK, LINK, BREAK);
    both_ways(&format, 3, READ_ONLY, READ_ONLY | 1 << 52, BREAK);
    both_ways(&format, 2, BLOCK, BLOCK | 1 << 16, BREAK);
    let one = stage2(Stage2Options { break_level: BreakLevel::Level1, ..Stage2Options::default() });
    both_ways(&one, 2, BLOCK, LINK, BREAK);
    let two = stage2(Stage2Options { break_level: BreakLevel::Level2, ..Stage2Options::default() });
    both_ways(&two, 2, BLOCK, LINK, FLUSH);
    both_ways(&two, 3, READ_ONLY, READ_ONLY | 1 << 52, FLUSH);
    // Which relaxes nothing else.
    both_ways(&two, 3, PAGE, PAGE ^ 0x0f00_0000, BREAK);
    both_ways(&two, 3, READ_ONLY, 0x8000_1747, BREAK);
    both_ways(&two, 2, LINK, LINK ^ 0x1_0000, BREAK);
}

#[test]
fn a_link_to_another_table_breaks() {
    let format = software();
    both_ways(&format, 2, LINK, LINK ^ 0x1_0000, BREAK);
    both_ways(&format, 2, LINK, LINK | 1 << 55, FREE);
    both_ways(&format, 1, LINK, LINK, FREE);
}

#[test]
fn rights_alone_never_break_and_flush_when_they_go() {
    let format = software();
    let pairs = [
        // Write, with its dirty fact kept, read, execute.
        (PAGE, 0x0300_0000_8000_177f & !(1 << 56)),
        (READ_ONLY, 0x8000_173f),
        (READ_ONLY, 0x0040_0000_8000_177f),
    ];
    for (more, less) in pairs {
        assert_eq!(format.transition(L3, more, less), FLUSH, "{more:#x} to {less:#x}");
    }
    for (more, less) in [(PAGE, READ_ONLY), (READ_ONLY, 0x8000_173f), (READ_ONLY, 0x0040_0000_8000_177f)] {
        assert_eq!(format.transition(L3, less, more), FREE, "{less:#x} to {more:#x}");
    }
    // DBM alone is a right where hardware goes by it.
    let (clean, armed) = (0x0108_0000_8000_177f, 0x0100_0000_8000_177f);
    assert_eq!(hardware().transition(L3, clean, armed), FLUSH);
    assert_eq!(hardware().transition(L3, armed, clean), FREE);
}

#[test]
fn clearing_upgradable_or_the_written_state_flushes() {
    let armed = 0x0100_0000_8000_177f;
    assert_eq!(software().transition(L3, armed, READ_ONLY), FLUSH);
    assert_eq!(software().transition(L3, READ_ONLY, armed), FREE);
    // Written to writable-clean: DBM stays, and the next write must set S2AP[1] again.
    let (written, clean) = (0x0108_0000_8000_17ff, 0x0108_0000_8000_177f);
    assert_eq!(hardware().transition(L3, written, clean), FLUSH);
    assert_eq!(hardware().transition(L3, clean, written), FREE);
    assert_eq!(software().transition(L3, READ_ONLY | 1 << 57, READ_ONLY), FLUSH);
}

#[test]
fn access_flag_and_software_bits_cost_nothing() {
    for bit in [10, 55, 58] {
        both_ways(&software(), 3, READ_ONLY, READ_ONLY ^ 1 << bit, FREE);
        both_ways(&software(), 2, BLOCK, BLOCK ^ 1 << bit, FREE);
    }
}

#[test]
fn what_becomes_invalid_is_flushed_and_what_was_invalid_costs_nothing() {
    let format = software();
    let invalid = [0, format.not_present(Level::LEAF).claimed, format.not_present(Level::LEAF).dead, Owner(7).to_raw()];
    for none in invalid {
        for (number, raw) in [(3, PAGE), (2, BLOCK), (2, LINK), (1, LINK)] {
            assert_eq!(format.transition(level(number), raw, none), FLUSH);
            assert_eq!(format.transition(level(number), none, raw), FREE);
        }
        for other in invalid {
            assert_eq!(format.transition(L3, none, other), FREE);
        }
    }
}
