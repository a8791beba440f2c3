// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a change owes: the table of `transition`, row by row.

mod common;

use common::*;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use spte_core::format::{Format, Kind, LeafSpec, Level, Transition, WriteProtect};
use spte_mips::*;

#[test]
fn another_page_or_attribute_is_flushed_and_never_broken() {
    for format in formats() {
        let old = format.leaf(L1, &spec(0x1_0000, Access::RX)).unwrap();
        let attrs = GpaAttrs { cache: Cache::Uncached };
        let moved = format.leaf(L1, &spec(0x2_0000, Access::RX)).unwrap();
        let other = format.leaf(L1, &LeafSpec { attrs, ..spec(0x1_0000, Access::RX) }).unwrap();
        for new in [moved, other] {
            assert_eq!(format.transition(L1, old, new), Transition::FLUSH);
            assert_eq!(format.equal_contents_transition(L1, old, new), Transition::FLUSH);
        }
    }
}

#[test]
fn a_right_that_goes_is_flushed_whatever_the_facts() {
    for format in formats() {
        for accessed in [true, false] {
            let leaf = |access, armed, dirty| {
                format.leaf(L1, &LeafSpec { accessed, armed, dirty, ..spec(0x1_0000, access) }).unwrap()
            };
            let (writable, armed) = (leaf(Access::RWX, false, true), leaf(Access::RWX, true, false));
            let read_only = leaf(Access::RX, false, false);
            let written = leaf(Access::RX, false, true);
            // The same page each time: what Linux did not flush, as MODIFIED stayed.
            assert_eq!(format.transition(L1, writable, written), Transition::FLUSH);
            assert_eq!(format.transition(L1, writable, armed), Transition::FLUSH);
            assert_eq!(format.transition(L1, armed, read_only), Transition::FLUSH, "the arming may be unflushed");
            assert_eq!(format.transition(L1, written, read_only), Transition::FLUSH);
            for (from, to) in [(read_only, writable), (read_only, armed), (armed, writable), (written, writable)] {
                assert_eq!(format.transition(L1, from, to), Transition::FREE, "rights rise in place");
            }
            if format.options().rixi {
                for less in [Access::READ, Access::EXECUTE, Access::empty()] {
                    let fewer = leaf(less, false, false);
                    assert_eq!(format.transition(L1, read_only, fewer), Transition::FLUSH);
                    assert_eq!(format.transition(L1, fewer, read_only), Transition::FREE);
                }
            }
        }
    }
}

#[test]
fn another_g_is_flushed() {
    for format in formats() {
        // No leaf here is global; one that somebody else wrote matches every address space.
        let plain = format.leaf(L1, &spec(0x1_0000, Access::RX)).unwrap();
        let global = plain | format.options().layout.global();
        assert_eq!(format.transition(L1, global, plain), Transition::FLUSH);
        assert_eq!(format.transition(L1, plain, global), Transition::FLUSH);
    }
}

#[test]
fn ageing_owes_no_flush() {
    for format in formats() {
        for armed in [true, false] {
            let raw = format.leaf(L1, &LeafSpec { armed, ..spec(0x1_0000, Access::RWX) }).unwrap();
            let old = format.make_old(L1, raw);
            assert_eq!(format.transition(L1, raw, old), Transition::FREE);
            assert_eq!(format.transition(L1, old, raw), Transition::FREE);
        }
    }
}

#[test]
fn an_old_leaf_may_be_in_a_tlb_and_is_flushed() {
    for format in formats() {
        let raw = format.leaf(L1, &LeafSpec { accessed: false, ..spec(0x1_0000, Access::RX) }).unwrap();
        assert!(!format.entry_lo(raw).is_valid());
        let moved = format.set_spte(L1, raw, OutputAddr::new(0x2_0000)).unwrap();
        assert_eq!(format.transition(L1, raw, moved), Transition::FLUSH);
        for gone in [
            format.not_present(Level::LEAF).absent,
            format.not_present(Level::LEAF).claimed,
            format.not_present(Level::LEAF).dead,
        ] {
            assert_eq!(format.transition(L1, raw, gone), Transition::FLUSH);
        }
    }
}

#[test]
fn links_that_go_are_flushed_and_what_holds_nothing_owes_nothing() {
    for format in formats() {
        let level = Level::new(2).unwrap();
        let table = |at| format.table(level, OutputAddr::new(at)).unwrap();
        assert_eq!(format.transition(level, table(0x1_0000), table(0x1_0000)), Transition::FREE);
        assert_eq!(format.transition(level, table(0x1_0000), table(0x2_0000)), Transition::FLUSH);
        for level in [L1, level] {
            let nothing =
                [format.not_present(level).absent, format.not_present(level).claimed, format.not_present(level).dead];
            let something = if level == L1 { 0x1_0001 } else { table(0x1_0000) };
            for from in nothing {
                assert_eq!(format.transition(level, from, something), Transition::FREE);
                assert_eq!(format.transition(level, something, from), Transition::FLUSH);
                for to in nothing {
                    assert_eq!(format.transition(level, from, to), Transition::FREE);
                }
            }
        }
        // V without PRESENT is nobody's, and loaded.
        let loaded = 0x1_0000 | format.options().layout.valid();
        assert_eq!(format.kind(L1, loaded), Kind::Special);
        assert_eq!(format.transition(L1, loaded, format.not_present(Level::LEAF).absent), Transition::FLUSH);
        assert_eq!(format.transition(L1, loaded, loaded), Transition::FREE);
        assert_eq!(format.transition(L1, 0x1_0000, format.not_present(Level::LEAF).absent), Transition::FREE);
        // What somebody else wrote into a directory is followed, whatever it is.
        assert_eq!(format.transition(level, 0x1000, format.not_present(level).absent), Transition::FLUSH);
    }
}

proptest! {
    /// A transition that owes nothing takes nothing away that a TLB may hold.
    #[test]
    fn what_is_free_takes_nothing_away(format in any_format(), a in any_spec(), b in any_spec(), same in any::<bool>()) {
        let (a, b) = (fitted(&format, a), fitted(&format, b));
        let b = if same { LeafSpec { output: a.output, attrs: a.attrs, ..b } } else { b };
        let (old, new) = (format.leaf(L1, &a).unwrap(), format.leaf(L1, &b).unwrap());
        let owed = format.transition(L1, old, new);
        prop_assert!(!owed.break_first);
        let granted = |spec: &LeafSpec<GpaAttrs>| if spec.armed { spec.access.read_only() } else { spec.access };
        let kept = a.output == b.output && a.attrs == b.attrs && granted(&b).contains(granted(&a));
        prop_assert!(owed.flush || kept);
        // What windows do is never free where anything could be written.
        let retained = format.write_protect(L1, old, WriteProtect::Retain);
        prop_assert_eq!(format.transition(L1, old, retained).flush, old != retained);
    }
}
