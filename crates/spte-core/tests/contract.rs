// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each operation promises, for every flavour of the tiny format.

mod common;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use common::{BIG, Event, OUT, PAGE, Rig, extent, flavours, large, range, small};
use notifier_core::{Access, AddrRange, Change, Gpa, GpaRange, Hva, Outcome, OutputAddr, SlotFlags, Space};
use spte_core::format::Format;
use spte_core::{
    CollapseError, HeapPages, MapError, MapOptions, Mapped, Miss, RemoveError, SplitError, Table, TableError,
    TableRangeError, Upgrade,
};

const RWX: Access = Access::RWX;

fn each(test: impl Fn(&Rig)) {
    for format in flavours() {
        let rig = Rig::new(format);
        test(&rig);
        rig.verify();
        rig.end();
    }
}

#[test]
fn leaves_are_as_large_as_fit() {
    each(|rig| {
        let mapped = rig.map(PAGE, 2 * BIG, &large()).unwrap();
        // Three pages up to the first boundary, a large leaf, one page.
        assert_eq!(mapped.made, 5);
        let sizes: Vec<_> = rig.leaves().iter().map(|leaf| leaf.2).collect();
        assert_eq!(sizes, [PAGE, PAGE, PAGE, BIG, PAGE]);
        assert!(rig.leaves().iter().all(|leaf| leaf.1 == OUT + leaf.0 && leaf.3 == RWX && !leaf.4));
    });
}

#[test]
fn a_whole_root_entry_is_one_leaf() {
    each(|rig| {
        let span = rig.format.geometry.span(rig.format.geometry.top());
        rig.map(span, span, &large()).unwrap();
        assert_eq!(rig.leaves(), [(span, OUT + span, span, RWX, false)]);
        assert_eq!(rig.table.stats().tables, 1);
    });
}

#[test]
fn outputs_that_are_out_of_step_make_small_leaves() {
    each(|rig| {
        assert_eq!(rig.map_to(0, OUT + PAGE, BIG, &large()).unwrap().made, 4);
        assert!(rig.leaves().iter().all(|leaf| leaf.2 == PAGE && leaf.1 == OUT + PAGE + leaf.0));
    });
}

#[test]
fn what_is_there_already_is_counted_and_left() {
    each(|rig| {
        rig.map(0, BIG + PAGE, &large()).unwrap();
        let before = rig.leaves();
        rig.pages.take_events();
        let again = rig.map(0, BIG + PAGE, &large()).unwrap();
        assert_eq!((again.made, again.raised, again.already), (0, 0, 2));
        assert_eq!(rig.leaves(), before);
        assert_eq!(rig.pages.take_events(), [], "{}", rig.format.name);
    });
}

#[test]
fn a_large_leaf_over_a_table_in_use_fills_the_table() {
    each(|rig| {
        rig.map(PAGE, PAGE, &small()).unwrap();
        rig.pages.take_events();
        let mapped = rig.map(0, BIG, &large()).unwrap();
        assert_eq!((mapped.made, mapped.already), (3, 1));
        let flushes = rig.pages.take_events();
        assert!(!flushes.iter().any(|event| matches!(event, Event::Flush { .. })), "{}", rig.format.name);
    });
}

#[test]
fn a_large_leaf_replaces_an_empty_table() {
    each(|rig| {
        rig.map(PAGE, PAGE, &small()).unwrap();
        rig.table.unmap(range(PAGE, PAGE)).unwrap();
        assert_eq!(rig.map(0, BIG, &large()).unwrap().made, 1);
        assert_eq!(rig.leaves(), [(0, OUT, BIG, RWX, false)]);
    });
}

#[test]
fn another_output_or_attribute_is_a_conflict() {
    each(|rig| {
        rig.map(0, 4 * PAGE, &small()).unwrap();
        let error = rig.map_to(0, OUT + BIG, PAGE, &small()).unwrap_err();
        let MapError::Conflict { at, present, wanted } = error else { panic!("{error:?}") };
        assert_eq!((at, present, wanted), (Gpa::new(0), OutputAddr::new(OUT), OutputAddr::new(OUT + BIG)));
        assert!(matches!(rig.map(PAGE, PAGE, &small().attrs(1)), Err(MapError::Conflict { .. })));
    });
}

#[test]
fn only_absent_refuses_and_changes_nothing() {
    each(|rig| {
        rig.map(2 * PAGE, PAGE, &small()).unwrap();
        let before = rig.leaves();
        let error = rig.map(0, BIG, &large().only_absent(true)).unwrap_err();
        assert!(matches!(error, MapError::Present { at } if at == Gpa::new(2 * PAGE)), "{error:?}");
        assert_eq!(rig.leaves(), before);
        // Inside a larger leaf: the first address of the range that is present.
        rig.map(BIG, BIG, &large()).unwrap();
        let error = rig.map(BIG + PAGE, PAGE, &large().only_absent(true)).unwrap_err();
        assert!(matches!(error, MapError::Present { at } if at == Gpa::new(BIG + PAGE)), "{error:?}");
    });
}

#[test]
fn a_fault_with_more_rights_raises_them() {
    each(|rig| {
        rig.map(0, BIG, &large().access(Access::READ)).unwrap();
        let mapped = rig.map(0, BIG, &large().access(Access::RW)).unwrap();
        assert_eq!(mapped.raised, 1);
        assert_eq!(rig.leaves(), [(0, OUT, BIG, Access::RW, false)]);
        // A part: the leaf is split, for nothing was resolved about the rest.
        let mapped = rig.map(PAGE, PAGE, &large()).unwrap();
        assert_eq!(mapped.raised, 1);
        let rights: Vec<_> = rig.leaves().iter().map(|leaf| (leaf.0, leaf.3)).collect();
        let rw = Access::RW;
        assert_eq!(rights, [(0, rw), (PAGE, RWX), (2 * PAGE, rw), (3 * PAGE, rw)]);
    });
}

#[test]
fn a_fault_on_an_old_leaf_makes_it_young() {
    each(|rig| {
        rig.map(0, PAGE, &small()).unwrap();
        assert_eq!(rig.table.age(range(0, PAGE)).unwrap(), 1);
        assert_eq!(rig.table.test_age(range(0, PAGE)), 0);
        assert_eq!(rig.map(0, PAGE, &small()).unwrap().raised, 1);
        assert_eq!(rig.table.test_age(range(0, PAGE)), 1);
        assert!(rig.table.make_young(Gpa::new(0)));
        assert!(!rig.table.make_young(Gpa::new(BIG)));
        assert!(!rig.table.make_young(Gpa::new(u64::MAX)));
    });
}

#[test]
fn armed_leaves_are_upgraded_once() {
    each(|rig| {
        rig.map(0, PAGE, &small().armed(true)).unwrap();
        assert_eq!(rig.leaves(), [(0, OUT, PAGE, RWX, true)]);
        let mut walker = rig.walker();
        {
            let scope = walker.enter();
            let miss = rig.table.translate(&scope, Gpa::new(8), Access::WRITE).unwrap_err();
            assert_eq!(miss, Miss::Denied { at: Gpa::new(8), access: Access::WRITE, armed: true });
        }
        assert_eq!(rig.table.upgrade(Gpa::new(8)), Upgrade::Granted);
        assert_eq!(rig.table.upgrade(Gpa::new(8)), Upgrade::Already);
        assert_eq!(rig.table.upgrade(Gpa::new(PAGE)), Upgrade::No);
        assert_eq!(rig.table.upgrade(Gpa::new(u64::MAX)), Upgrade::No);
        assert_eq!(rig.was_reported(0), !rig.format.hardware, "{}", rig.format.name);
        let scope = walker.enter();
        let found = rig.table.translate(&scope, Gpa::new(8), Access::WRITE).unwrap();
        assert_eq!((found.output().as_u64(), found.len(), found.access()), (OUT + 8, PAGE - 8, RWX));
        assert!(!found.is_empty());
    });
}

#[test]
fn dirty_logging_slots_have_smallest_pages() {
    for format in flavours() {
        let rig = Rig::with_slot(format, SlotFlags::LOG_DIRTY);
        assert_eq!(rig.map(0, BIG, &large()).unwrap().made, 4);
        assert_eq!(rig.admit(range(0, BIG), |admission| rig.table.collapse(admission, range(0, BIG)).unwrap()), 0);
        rig.verify();
        rig.end();
    }
}

#[test]
fn special_entries_give_way_to_memory() {
    each(|rig| {
        let special = common::format::SPECIAL | 0x1000;
        rig.admit(range(PAGE, PAGE), |admission| {
            rig.table.set_special(admission, Gpa::new(PAGE), special).unwrap();
            // Again: it replaces itself.
            rig.table.set_special(admission, Gpa::new(PAGE), special).unwrap();
            let bad = rig.table.set_special(admission, Gpa::new(PAGE), common::format::ABSENT);
            assert!(matches!(bad, Err(MapError::Format { .. })));
            let outside = rig.table.set_special(admission, Gpa::new(0), special);
            assert!(matches!(outside, Err(MapError::Outside { .. })), "{outside:?}");
            let beyond = rig.table.set_special(admission, Gpa::new(1 << 40), special);
            assert!(matches!(beyond, Err(MapError::Range(TableRangeError::TooWide { .. }))));
            let unaligned = rig.table.set_special(admission, Gpa::new(8), special);
            assert!(matches!(unaligned, Err(MapError::Range(TableRangeError::Unaligned { .. }))));
            let last = rig.table.set_special(admission, Gpa::new(u64::MAX), special);
            assert!(matches!(last, Err(MapError::Outside { .. } | MapError::Range(_))));
        });
        let mut walker = rig.walker();
        {
            let scope = walker.enter();
            let miss = rig.table.translate(&scope, Gpa::new(PAGE), Access::READ).unwrap_err();
            assert_eq!(miss, Miss::Special { at: Gpa::new(PAGE), entry: special });
        }
        let mapped = rig.map(0, BIG, &large().only_absent(true)).unwrap();
        assert_eq!(mapped.made, 4);
        rig.admit(range(PAGE, PAGE), |admission| {
            let refused = rig.table.set_special(admission, Gpa::new(PAGE), special);
            assert!(matches!(refused, Err(MapError::Present { .. })));
        });
        rig.table.unmap(range(0, BIG)).unwrap();
        rig.admit(range(0, BIG), |admission| rig.table.set_special(admission, Gpa::new(0), special).unwrap());
        rig.table.unmap(range(0, PAGE)).unwrap();
        assert_eq!(rig.entry(0).raw, common::format::ABSENT);
    });
}

#[test]
fn unmapping_a_part_of_a_large_leaf_leaves_the_rest() {
    each(|rig| {
        rig.map(0, 2 * BIG, &large()).unwrap();
        let removed = rig.table.unmap(range(PAGE, BIG)).unwrap();
        assert_eq!(removed.leaves, 4);
        assert_eq!(removed.young, 4);
        let left: Vec<_> = rig.translations().iter().map(|page| (page.0, page.1)).collect();
        let expected: Vec<_> = [0, 5, 6, 7].iter().map(|page| (page * PAGE, OUT + page * PAGE)).collect();
        assert_eq!(left, expected);
    });
}

#[test]
fn tables_that_a_range_covers_go_after_the_flush() {
    each(|rig| {
        let whole = rig.whole();
        rig.map(0, whole.len(), &small()).unwrap();
        let tables = rig.table.stats().tables;
        assert!(tables > 2);
        rig.pages.take_events();
        let removed = rig.table.unmap(whole).unwrap();
        assert_eq!(removed.leaves, whole.len() / PAGE);
        assert_eq!(rig.table.stats().tables, 1, "{}", rig.format.name);
        rig.collect();
        let events = rig.pages.take_events();
        let flushes = events.iter().filter(|event| matches!(event, Event::Flush { .. })).count();
        let frees = events.iter().filter(|event| matches!(event, Event::Free(_))).count();
        assert_eq!((flushes, frees as u64), (1, tables - 1));
        assert!(matches!(events[0], Event::Flush { .. }));
    });
}

#[test]
fn trim_unlinks_what_is_empty_and_nothing_else() {
    each(|rig| {
        let last = rig.whole().end().as_u64() - PAGE;
        rig.map(PAGE, PAGE, &small()).unwrap();
        rig.map(last, PAGE, &small()).unwrap();
        rig.table.unmap(range(PAGE, PAGE)).unwrap();
        let before = rig.table.stats().tables;
        let gone = rig.table.trim(rig.whole()).unwrap() as u64;
        assert!(gone > 0);
        assert_eq!(rig.table.stats().tables, before - gone);
        assert_eq!(rig.leaves().len(), 1);
        assert_eq!(rig.table.trim(rig.whole()).unwrap(), 0);
        assert_eq!(rig.table.trim(range(1 << 40, 1)).unwrap(), 0);
    });
}

#[test]
fn a_flush_is_asked_for_only_when_something_was_taken_away() {
    each(|rig| {
        rig.map(0, PAGE, &small()).unwrap();
        rig.pages.take_events();
        rig.table.unmap(range(BIG, BIG)).unwrap();
        rig.table.arm(range(BIG, BIG)).unwrap();
        rig.table.restrict(range(0, BIG), RWX).unwrap();
        rig.table.trim(rig.whole()).unwrap();
        rig.space.zap(range(BIG, BIG)).unwrap().close().unwrap();
        assert_eq!(rig.pages.take_events(), [], "{}", rig.format.name);
    });
}

#[test]
fn more_ranges_than_are_remembered_flush_everything_once() {
    each(|rig| {
        let whole = rig.whole();
        rig.map(0, whole.len(), &small()).unwrap();
        for page in (0..whole.len()).step_by(2 * PAGE as usize) {
            rig.table.restrict(range(page, PAGE), Access::READ).unwrap();
        }
        rig.pages.take_events();
        rig.table.restrict(whole, Access::READ).unwrap();
        let events = rig.pages.take_events();
        assert_eq!(events.len(), 1);
    });
}

#[test]
fn ranges_that_do_not_fit_are_refused() {
    each(|rig| {
        let bits = rig.format.geometry.address_bits();
        let top = 1u64 << bits;
        let unaligned = [AddrRange::new(Gpa::new(8), Gpa::new(PAGE)).unwrap(), range(0, 8)];
        let wide = [range(top - PAGE, 2 * PAGE), range(top, PAGE), range(!(PAGE - 1) - PAGE, PAGE)];
        for bad in unaligned {
            let refused = TableRangeError::Unaligned { range: bad, leaf: PAGE };
            assert_eq!(rig.table.unmap(bad), Err(RemoveError::Range(refused)));
            assert_eq!(rig.table.arm(bad), Err(RemoveError::Range(refused)));
            assert_eq!(rig.table.split(bad), Err(SplitError::Range(refused)));
            assert!(rig.table.harvest_dirty(bad).is_err());
        }
        for bad in wide {
            let refused = TableRangeError::TooWide { range: bad, bits };
            assert_eq!(rig.table.unmap(bad), Err(RemoveError::Range(refused)));
            assert_eq!(rig.table.restrict(bad, RWX), Err(RemoveError::Range(refused)));
            assert_eq!(rig.table.split(bad), Err(SplitError::Range(refused)));
            let map = rig.map_to(bad.start().as_u64(), OUT, bad.len(), &large());
            assert!(matches!(map, Err(MapError::Range(error)) if error == refused));
            rig.admit(bad, |admission| {
                let collapse = rig.table.collapse(admission, bad);
                assert!(matches!(collapse, Err(CollapseError::Range(error)) if error == refused));
                let protect = rig.table.protect(admission, bad, RWX);
                assert!(matches!(protect, Err(MapError::Range(error)) if error == refused));
            });
            assert_eq!(rig.table.age(bad).unwrap(), 0);
            assert_eq!(rig.table.trim(bad).unwrap(), 0);
        }
        // Windows may be anything.
        rig.map(top - PAGE, PAGE, &small()).unwrap();
        rig.space.zap(AddrRange::new(Gpa::new(top - 1), Gpa::new(u64::MAX)).unwrap()).unwrap().close().unwrap();
        assert_eq!(rig.leaves(), []);
        assert!(rig.table.walk(Gpa::new(u64::MAX)).is_empty());
        assert!(rig.table.entry(Gpa::new(top)).is_none());
        rig.table.visit(range(top, PAGE), |found| panic!("{found:?}"));
        let mut walker = rig.walker();
        let scope = walker.enter();
        let miss = rig.table.translate(&scope, Gpa::new(u64::MAX), Access::READ).unwrap_err();
        assert_eq!(miss, Miss::TooWide { at: Gpa::new(u64::MAX), bits });
    });
}

#[test]
fn the_last_page_is_a_page_as_any() {
    each(|rig| {
        let last = rig.whole().end().as_u64() - PAGE;
        rig.map(last, PAGE, &large()).unwrap();
        assert_eq!(rig.table.age(range(last, PAGE)).unwrap(), 1);
        rig.table.arm(range(last, PAGE)).unwrap();
        rig.table.split(range(last, PAGE)).unwrap();
        rig.admit(range(last, PAGE), |admission| rig.table.collapse(admission, range(last, PAGE)).unwrap());
        assert_eq!(rig.table.unmap(range(last, PAGE)).unwrap().leaves, 1);
    });
}

#[test]
fn an_admission_or_scope_of_another_space_is_refused() {
    each(|rig| {
        let other = Rig::new(rig.format);
        other.admit(range(0, BIG), |admission| {
            assert!(matches!(rig.table.map(admission, &large()), Err(MapError::ForeignSpace)));
            assert!(matches!(rig.table.protect(admission, range(0, BIG), RWX), Err(MapError::ForeignSpace)));
            assert!(matches!(rig.table.collapse(admission, range(0, BIG)), Err(CollapseError::ForeignSpace)));
            let special = rig.table.set_special(admission, Gpa::new(0), common::format::SPECIAL);
            assert!(matches!(special, Err(MapError::ForeignSpace)));
        });
        let mut walker = other.walker();
        let scope = walker.enter();
        let miss = rig.table.translate(&scope, Gpa::new(0), Access::READ).unwrap_err();
        assert_eq!(miss, Miss::ForeignScope);
    });
}

#[test]
fn a_table_maps_nothing_before_it_joins_or_after_it_left() {
    for format in flavours() {
        let space = Space::builder().private_reclaim().build();
        let pages = Arc::new(HeapPages::new());
        let table = Table::new(&space, format, Arc::clone(&pages), ()).unwrap();
        if format.mirror {
            continue;
        }
        let map = || {
            space.admit(range(0, PAGE), |admission| {
                let special = common::format::SPECIAL;
                let set = table.set_special(admission, Gpa::new(0), special);
                (table.map(admission, &small()), set, table.protect(admission, range(0, PAGE), RWX))
            })
        };
        let refused = |(map, set, protect): (Result<Mapped, MapError>, Result<(), MapError>, Result<_, MapError>)| {
            assert!(matches!(map, Err(MapError::NotJoined)));
            assert!(matches!(set, Err(MapError::NotJoined)));
            assert!(matches!(protect, Err(MapError::NotJoined)));
        };
        refused(map().unwrap());
        let subscription = space.subscribe(Arc::clone(&table)).unwrap();
        let mut walker = space.walker();
        let fault = walker.fault(range(0, 2 * BIG)).unwrap();
        let resolved = fault.resolve(|_| Ok::<_, ()>(extent(0, OUT, 2 * BIG, RWX))).unwrap();
        resolved.install(|admission| table.map(admission, &large())).unwrap();
        assert_eq!(table.stats().leaves[1], 2);
        subscription.leave().unwrap();
        assert_eq!(table.stats().leaves, [0; 6]);
        refused(map().unwrap());
        drop(walker);
        drop(table);
        drop(space);
        assert_eq!(pages.live(), 0);
    }
}

#[test]
fn two_tables_of_one_space_follow_the_same_windows() {
    for format in flavours() {
        let rig = Rig::with_slot(format, SlotFlags::empty());
        let pages = Arc::new(common::Recorder::new(format));
        let second = Table::new(&rig.space, format, Arc::clone(&pages), common::Recorded(Arc::clone(&pages))).unwrap();
        let subscription = rig.space.subscribe(Arc::clone(&second)).unwrap();
        rig.map(0, BIG, &large()).unwrap();
        let mut walker = rig.walker();
        let fault = walker.fault(range(0, BIG)).unwrap();
        let resolved = fault.resolve(|_| Ok::<_, ()>(extent(0, OUT, BIG, RWX))).unwrap();
        resolved.install(|admission| second.map(admission, &small())).unwrap();
        let guard = rig.space.retain(AddrRange::with_len(Hva::new(PAGE), PAGE).unwrap()).unwrap();
        let change = Change { page: Hva::new(PAGE), expected: OutputAddr::new(OUT + PAGE), new: OutputAddr::new(PAGE) };
        assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Changed);
        guard.close().unwrap();
        for table in [&rig.table, &second] {
            let found = table.entry(Gpa::new(PAGE)).unwrap();
            let spec = format.spec(found.level, found.raw);
            assert_eq!((spec.output.as_u64(), spec.access, found.span), (PAGE, Access::RX, PAGE));
        }
        rig.space.zap(AddrRange::with_len(Hva::new(0), BIG).unwrap()).unwrap().close().unwrap();
        assert_eq!((rig.leaves().len(), second.stats().leaves), (0, [0; 6]));
        rig.verify();
        drop((subscription, second, walker));
        rig.end();
        assert_eq!(pages.live(), 0);
    }
}

#[test]
fn pages_of_the_space_may_be_larger_than_those_of_the_table() {
    for format in flavours() {
        let space = Space::builder().private_reclaim().page_size(BIG).unwrap().build();
        let pages = Arc::new(common::Recorder::new(format));
        let table = Table::new(&space, format, Arc::clone(&pages), common::Recorded(Arc::clone(&pages))).unwrap();
        let subscription = space.subscribe(Arc::clone(&table)).unwrap();
        let mut walker = space.walker();
        let fault = walker.fault(range(0, 2 * BIG)).unwrap();
        let resolved = fault.resolve(|_| Ok::<_, ()>(extent(0, OUT, 2 * BIG, RWX))).unwrap();
        resolved.install(|admission| table.map(admission, &small())).unwrap();
        table.unmap(range(PAGE, PAGE)).unwrap();
        let guard = space.retain(range(0, 2 * BIG)).unwrap();
        let change = |page, expected, new| Change {
            page: Gpa::new(page),
            expected: OutputAddr::new(expected),
            new: OutputAddr::new(new),
        };
        let unaligned = guard.change_pte(&[change(PAGE, OUT, 0)]);
        assert!(unaligned.is_err());
        let done = guard.change_pte(&[change(0, OUT, 4 * BIG), change(BIG, OUT, 5 * BIG)]).unwrap();
        assert_eq!(done[0].outcome, Outcome::Changed);
        assert_eq!((done[1].outcome, done[1].found.is_some()), (Outcome::Zapped, true));
        guard.close().unwrap();
        let mut rows = Vec::new();
        table.visit(range(0, 2 * BIG), |found| {
            if found.kind == spte_core::format::Kind::Leaf {
                rows.push((found.start.as_u64(), format.spec(found.level, found.raw).output.as_u64()));
            }
        });
        let at = |page: u64| (page * PAGE, 4 * BIG + page * PAGE);
        assert_eq!(rows, [at(0), at(2), at(3)], "{}", format.name);
        drop((subscription, walker, table, space));
        pages.verify();
        assert_eq!(pages.live(), 0);
    }
    let space = Space::builder().page_size(0x800).unwrap().build();
    let refused = Table::new(&space, flavours()[0], Arc::new(HeapPages::new()), ());
    assert!(matches!(refused, Err(TableError::PageSize { leaf: PAGE, page: 0x800 })));
}

#[test]
fn change_pte_says_what_it_found() {
    for format in flavours() {
        let rig = Rig::with_slot(format, SlotFlags::empty());
        rig.map(0, BIG, &large()).unwrap();
        rig.map(BIG, 2 * PAGE, &small()).unwrap();
        let special = common::format::SPECIAL;
        rig.admit(range(2 * BIG, PAGE), |admission| {
            rig.table.set_special(admission, Gpa::new(2 * BIG), special).unwrap();
        });
        let guard = rig.space.retain(range(0, 3 * BIG)).unwrap();
        let change = |page, expected| Change {
            page: Gpa::new(page),
            expected: OutputAddr::new(expected),
            new: OutputAddr::new(8 * BIG + page),
        };
        let changes = [
            change(PAGE, OUT + PAGE),
            change(BIG, OUT + BIG),
            change(BIG + PAGE, OUT),
            change(BIG + 2 * PAGE, OUT),
            change(2 * BIG, OUT),
        ];
        let outcomes: Vec<_> =
            guard.change_pte(&changes).unwrap().iter().map(|page| (page.outcome, page.found)).collect();
        let found = Some(OutputAddr::new(OUT + BIG + PAGE));
        use Outcome::{Absent, Changed, Zapped};
        let expected = [(Changed, None), (Changed, None), (Zapped, found), (Absent, None), (Absent, None)];
        assert_eq!(outcomes, expected, "{}", format.name);
        // Neither was there before, and neither is now.
        assert_eq!(rig.entry(2 * BIG).raw, special);
        guard.keep(range(0, 3 * BIG)).unwrap();
        guard.close().unwrap();
        let rx = Access::RX;
        let at = |page| (page, OUT + page, PAGE, rx, false);
        let changed = |page| (page, 8 * BIG + page, PAGE, rx, false);
        let rows = [at(0), changed(PAGE), at(2 * PAGE), at(3 * PAGE), changed(BIG)];
        assert_eq!(rig.leaves(), rows, "{}", format.name);
        rig.verify();
        rig.end();
    }
}

#[test]
fn protect_raises_only_what_was_resolved() {
    each(|rig| {
        let protect = |at, extents: Vec<notifier_core::Extent>, access| {
            let mut walker = rig.walker();
            let fault = walker.fault(range(at, PAGE)).unwrap();
            let resolved = fault.resolve(|_| Ok::<_, ()>(extents)).unwrap();
            resolved.install(|admission| rig.table.protect(admission, range(at, PAGE), access))
        };
        rig.map(0, BIG, &large().access(Access::READ)).unwrap();
        // Nothing resolved: nothing raised, nothing split.
        let refused = protect(PAGE, vec![], Access::RW).unwrap();
        assert_eq!((refused.raised, refused.already, refused.withheld), (0, 1, 1));
        // To another output: neither.
        assert_eq!(protect(PAGE, vec![extent(PAGE, OUT, PAGE, RWX)], Access::RW).unwrap().raised, 0);
        assert_eq!(rig.leaves().len(), 1);
        // A part of a larger leaf: that part alone.
        assert_eq!(protect(PAGE, vec![extent(PAGE, OUT + PAGE, PAGE, RWX)], Access::RW).unwrap().raised, 1);
        let rights: Vec<_> = rig.leaves().iter().map(|leaf| leaf.3).collect();
        let r = Access::READ;
        assert_eq!(rights, [r, Access::RW, r, r], "{}", rig.format.name);
        // Rights go without being resolved.
        assert_eq!(protect(PAGE, vec![], Access::READ).unwrap().raised, 1);
        assert!(rig.leaves().iter().all(|leaf| leaf.3 == r));
        // What the format cannot express.
        assert!(matches!(protect(0, vec![], Access::empty()), Err(MapError::Format { at, .. }) if at == Gpa::new(0)));
    });
}

#[test]
fn harvest_reports_each_write_once() {
    each(|rig| {
        rig.map(0, BIG, &large()).unwrap();
        rig.map(BIG, BIG, &small()).unwrap();
        let whole = rig.whole();
        // Where writable means dirty, all of it is.
        let first = rig.table.harvest_dirty(whole).unwrap();
        assert_eq!(first.is_empty(), rig.format.hardware);
        let write = |at| {
            let mut walker = rig.walker();
            if rig.table.upgrade(Gpa::new(at)) == Upgrade::No {
                panic!("{}: not upgradable", rig.format.name);
            }
            let scope = walker.enter();
            rig.table.translate(&scope, Gpa::new(at), Access::WRITE).unwrap();
        };
        rig.take_dirty();
        write(PAGE + 5);
        write(BIG + PAGE);
        let second = rig.table.harvest_dirty(whole).unwrap();
        assert_eq!(second, [range(0, BIG), range(BIG + PAGE, PAGE)], "{}", rig.format.name);
        assert_eq!(rig.table.harvest_dirty(whole).unwrap(), []);
    });
}

#[test]
fn split_and_collapse_undo_each_other() {
    each(|rig| {
        let whole = rig.whole();
        rig.map(0, whole.len(), &large()).unwrap();
        let before = rig.translations();
        rig.table.split(range(PAGE, PAGE)).unwrap();
        rig.verify();
        assert_eq!(rig.translations(), before);
        rig.table.split(whole).unwrap();
        rig.verify();
        assert_eq!(rig.leaves().len() as u64, whole.len() / PAGE);
        assert_eq!(rig.translations(), before);
        let merged = rig.admit(whole, |admission| rig.table.collapse(admission, whole).unwrap());
        assert!(merged > 2);
        assert_eq!(rig.translations(), before);
        assert_eq!(rig.table.stats().tables, 1);
    });
}

#[test]
fn collapse_leaves_alone_what_is_not_alike() {
    each(|rig| {
        rig.map(0, 2 * BIG, &small()).unwrap();
        rig.table.restrict(range(PAGE, PAGE), Access::READ).unwrap();
        rig.table.unmap(range(BIG, PAGE)).unwrap();
        rig.pages.take_events();
        let before = rig.leaves();
        let whole = rig.whole();
        assert_eq!(rig.admit(whole, |admission| rig.table.collapse(admission, whole).unwrap()), 0);
        assert_eq!(rig.leaves(), before);
        let part = range(PAGE, BIG);
        assert_eq!(rig.admit(part, |admission| rig.table.collapse(admission, part).unwrap()), 0);
        let outside = rig.admit(part, |admission| rig.table.collapse(admission, whole));
        assert!(matches!(outside, Err(CollapseError::Outside { .. })));
    });
}

#[test]
fn collapse_adds_facts_up() {
    each(|rig| {
        rig.map(0, BIG, &small().accessed(false)).unwrap();
        if !rig.format.hardware {
            rig.table.harvest_dirty(range(0, BIG)).unwrap();
        }
        assert_eq!(rig.table.test_age(range(0, BIG)), 0);
        rig.table.make_young(Gpa::new(2 * PAGE));
        rig.table.upgrade(Gpa::new(3 * PAGE));
        common::hardware_access(rig, 3 * PAGE, Access::WRITE);
        let merged = rig.admit(range(0, BIG), |admission| rig.table.collapse(admission, range(0, BIG)).unwrap());
        if rig.format.hardware {
            assert_eq!(merged, 1, "{}", rig.format.name);
            assert_eq!(rig.table.test_age(range(0, BIG)), 1);
            assert_eq!(rig.table.harvest_dirty(range(0, BIG)).unwrap(), [range(0, BIG)]);
        }
    });
}

#[test]
fn an_upgrade_inside_a_scope_is_not_waited_for() {
    // A walker that found an armed leaf may upgrade it from inside its scope, while somebody holds the claim of that
    // leaf across a flush that waits for the scope.
    for format in flavours() {
        let rig = Rig::new(format);
        rig.map(0, BIG, &large().armed(true)).unwrap();
        std::thread::scope(|threads| {
            let mut walker = rig.walker();
            let scope = walker.enter();
            let splitter = threads.spawn(|| rig.table.split(range(0, BIG)));
            std::thread::sleep(std::time::Duration::from_millis(20));
            rig.table.upgrade(Gpa::new(0));
            rig.table.make_young(Gpa::new(0));
            drop(scope);
            splitter.join().unwrap().unwrap();
        });
        rig.verify();
        rig.end();
    }
}

#[test]
fn nothing_of_the_callers_runs_while_an_entry_is_claimed() {
    use std::sync::{Mutex, OnceLock};
    for format in flavours() {
        let table: Arc<OnceLock<Arc<common::TinyTable>>> = Arc::default();
        let heard = Arc::new(Mutex::new(0));
        let (looked_at, count) = (Arc::clone(&table), Arc::clone(&heard));
        let sink = move |range: GpaRange| {
            *count.lock().unwrap() += 1;
            let Some(table) = looked_at.get() else { return };
            for found in table.walk(range.start()) {
                use spte_core::format::Kind;
                let claimed = match found.kind {
                    Kind::Claimed => true,
                    Kind::Leaf | Kind::Table(_) => found.raw & format.claim_bit() != 0,
                    _ => false,
                };
                assert!(!claimed, "{}: the sink was called under a claim: {found:?}", format.name);
            }
        };
        let space = Space::builder().private_reclaim().dirty_sink(sink).build();
        let pages = Arc::new(common::Recorder::new(format));
        let made = Table::new(&space, format, Arc::clone(&pages), common::Recorded(Arc::clone(&pages))).unwrap();
        table.set(Arc::clone(&made)).unwrap();
        let subscription = space.subscribe(Arc::clone(&made)).unwrap();
        let map = |options: &MapOptions<u8>| {
            let mut walker = space.walker();
            let fault = walker.fault(range(0, 4 * BIG)).unwrap();
            let resolved = fault.resolve(|_| Ok::<_, ()>(extent(0, OUT, 4 * BIG, RWX))).unwrap();
            resolved.install(|admission| made.map(admission, options)).unwrap();
        };
        map(&small().dirty(true));
        // A whole table, a part of one, a large leaf, a repointed page, a failed break.
        made.unmap(range(0, BIG)).unwrap();
        made.unmap(range(BIG, PAGE)).unwrap();
        space.admit(range(2 * BIG, BIG), |admission| made.collapse(admission, range(2 * BIG, BIG)).unwrap()).unwrap();
        pages.fail_flush_in(0);
        let _ = made.split(range(2 * BIG, BIG));
        pages.stop_failing();
        map(&small().dirty(true));
        let guard = space.retain(range(BIG, BIG)).unwrap();
        let page = Gpa::new(BIG);
        let change = Change { page, expected: OutputAddr::new(OUT + BIG), new: OutputAddr::new(0) };
        guard.change_pte(&[change]).unwrap();
        guard.close().unwrap();
        pages.fail_flush_in(0);
        let _ = space.admit(range(3 * BIG, BIG), |admission| made.collapse(admission, range(3 * BIG, BIG)));
        assert!(*heard.lock().unwrap() > 0);
        drop((subscription, made, table, space));
        pages.stop_failing();
        assert!(pages.flushes.load(Ordering::SeqCst) > 0);
    }
}
