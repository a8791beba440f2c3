// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushes that fail: what was removed stays removed, the flush stays owed, and no page is free before one succeeds.

mod common;

use std::sync::atomic::Ordering;

use common::{BIG, Event, OUT, PAGE, Rig, flavours, large, range, small};
use notifier_core::{Access, Change, Gpa, OpenError, Outcome, OutputAddr, ScopeWaitError};
use spte_core::{CollapseError, FlushError, FlushFailed, MapError, RemoveError, Removed, SplitError};

const FAILED: FlushFailed = FlushFailed::Hardware(FlushError::Failed { code: 5 });

fn each(test: impl Fn(&Rig)) {
    for format in flavours() {
        let rig = Rig::new(format);
        test(&rig);
        rig.pages.stop_failing();
        // Whatever is still owed is settled by a window, though it changes nothing itself.
        rig.space.zap(range(rig.whole().end().as_u64() - PAGE, PAGE)).unwrap().close().unwrap();
        rig.verify();
        rig.end();
    }
}

fn last_is_full(rig: &Rig) -> bool {
    matches!(rig.pages.take_events().last(), Some(Event::Flush { all: true, ok: true, .. }))
}

#[test]
fn what_was_removed_stays_removed_and_its_flush_is_inherited() {
    each(|rig| {
        rig.map(0, BIG, &small()).unwrap();
        rig.pages.fail_flush_in(0);
        let failed = rig.table.unmap(range(0, PAGE)).unwrap_err();
        assert_eq!(failed, RemoveError::Flush { at: Gpa::new(PAGE), source: FAILED, absent: None });
        assert_eq!(rig.leaves().len(), 3);
        rig.pages.take_events();
        // A window elsewhere, that finds nothing: it flushes everything.
        rig.space.zap(range(BIG, PAGE)).unwrap().close().unwrap();
        assert!(last_is_full(rig), "{}", rig.format.name);
        // Once.
        rig.space.zap(range(BIG, PAGE)).unwrap().close().unwrap();
        assert_eq!(rig.pages.take_events(), []);
    });
}

#[test]
fn i9_unlinked_tables_wait_for_a_flush_that_succeeds() {
    each(|rig| {
        rig.map(0, BIG, &small()).unwrap();
        let live = rig.pages.live();
        rig.pages.keep_failing.store(true, Ordering::SeqCst);
        rig.pages.fail_flush_in(0);
        rig.table.unmap(range(0, BIG)).unwrap_err();
        rig.collect();
        assert_eq!(rig.pages.live(), live, "{}", rig.format.name);
        let refused = rig.space.zap(range(2 * BIG, PAGE)).unwrap_err();
        assert!(matches!(refused, OpenError::Subscriber { .. }), "{refused:?}");
        assert_eq!(rig.space.progress().count, 0);
        rig.collect();
        assert_eq!(rig.pages.live(), live, "{}", rig.format.name);
        rig.pages.stop_failing();
        let guard = rig.space.zap(range(2 * BIG, PAGE)).unwrap();
        assert!(last_is_full(rig));
        guard.close().unwrap();
        rig.collect();
        assert!(rig.pages.live() < live, "{}", rig.format.name);
    });
}

#[test]
fn pages_in_limbo_go_with_the_table_once_it_is_flushed() {
    for format in flavours() {
        let rig = Rig::new(format);
        rig.map(0, BIG, &small()).unwrap();
        rig.pages.keep_failing.store(true, Ordering::SeqCst);
        rig.pages.fail_flush_in(0);
        rig.table.unmap(range(0, BIG)).unwrap_err();
        let common::Rig { pages, table, space, subscription, .. } = rig;
        // Hardware may still walk what was not flushed: as long as that fails, the table stays where windows find it.
        drop((subscription, table));
        assert!(pages.live() > 0, "{}", format.name);
        pages.stop_failing();
        assert_eq!(space.reap(), 0);
        drop(space);
        assert_eq!(pages.live(), 0, "{}", format.name);
    }
}

#[test]
fn a_partial_flush_does_not_settle_what_another_owes() {
    each(|rig| {
        rig.map(0, 2 * BIG, &small()).unwrap();
        rig.pages.fail_flush_in(0);
        rig.table.unmap(range(0, BIG)).unwrap_err();
        let live = rig.pages.live();
        rig.table.unmap(range(BIG, PAGE)).unwrap();
        rig.collect();
        assert_eq!(rig.pages.live(), live, "{}", rig.format.name);
        rig.pages.take_events();
        rig.space.retain(range(BIG, PAGE)).unwrap().close().unwrap();
        let events = rig.pages.take_events();
        assert!(matches!(events[0], Event::Flush { all: true, ok: true, .. }), "{}", rig.format.name);
    });
}

/// Who finds nothing left to take away has not been told that nothing is cached.
#[test]
fn what_another_call_took_away_is_flushed_before_this_one_returns() {
    type Removal = (&'static str, fn(&Rig) -> Result<Removed, RemoveError>);
    let removals: [Removal; 3] = [
        ("unmap", |rig| rig.table.unmap(range(PAGE, PAGE))),
        ("restrict", |rig| rig.table.restrict(range(PAGE, PAGE), Access::READ)),
        ("arm", |rig| rig.table.arm(range(PAGE, PAGE))),
    ];
    each(|rig| {
        for (name, removal) in removals {
            rig.map(0, BIG, &small()).unwrap();
            rig.pages.fail_flush_in(0);
            removal(rig).unwrap_err();
            rig.pages.take_events();
            let again = removal(rig).unwrap();
            assert_eq!(again.leaves, 0, "{}: {name}", rig.format.name);
            let flushed = |event: &Event| match event {
                Event::Flush { ranges, all, ok } => {
                    *ok && (*all || ranges.iter().any(|flush| flush.range.covers(&range(PAGE, PAGE))))
                }
                _ => false,
            };
            assert!(rig.pages.take_events().iter().any(flushed), "{}: {name}", rig.format.name);
            // Of what lies elsewhere nobody is told that it is settled.
            rig.table.unmap(range(0, BIG)).unwrap();
            rig.space.zap(range(2 * BIG, PAGE)).unwrap().close().unwrap();
            rig.pages.take_events();
            removal(rig).unwrap();
            let flushed = |event: &Event| matches!(event, Event::Flush { .. });
            assert!(!rig.pages.take_events().iter().any(flushed), "{}: {name}", rig.format.name);
        }
    });
}

#[test]
fn windows_that_cannot_flush_do_not_open() {
    each(|rig| {
        rig.map(0, BIG, &small()).unwrap();
        rig.pages.fail_flush_in(0);
        let refused = rig.space.zap(range(0, PAGE)).unwrap_err();
        assert!(matches!(refused, OpenError::Subscriber { .. }), "{refused:?}");
        assert_eq!(rig.leaves().len(), 3);
        rig.pages.fail_flush_in(0);
        let refused = rig.space.retain(range(PAGE, PAGE)).unwrap_err();
        assert!(matches!(refused, OpenError::Subscriber { .. }), "{refused:?}");
        assert_eq!(rig.space.progress().count, 0);
        rig.pages.take_events();
        // Opened again it owes what the failed one owed, although the table is as it has to be.
        let guard = rig.space.retain(range(PAGE, PAGE)).unwrap();
        assert!(last_is_full(rig), "{}", rig.format.name);
        guard.close().unwrap();
        // Faults are served again.
        assert_eq!(rig.map(0, 2 * PAGE, &small()).unwrap().made, 2);
    });
}

#[test]
fn a_change_that_cannot_flush_is_a_zap() {
    each(|rig| {
        rig.map(0, BIG, &small()).unwrap();
        let guard = rig.space.retain(range(0, BIG)).unwrap();
        rig.pages.fail_flush_in(0);
        let new = OutputAddr::new(0);
        let change = Change { page: Gpa::new(0), expected: OutputAddr::new(OUT), new };
        // The engine fails, the page is zapped for it.
        assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Zapped, "{}", rig.format.name);
        assert!(!rig.leaves().iter().any(|leaf| leaf.0 == 0));
        assert!(last_is_full(rig), "{}", rig.format.name);
        guard.close().unwrap();
    });
}

#[test]
fn operations_that_break_first_say_what_is_gone() {
    each(|rig| {
        if !rig.format.breaks() && rig.format.claim {
            return;
        }
        rig.map(0, BIG, &large()).unwrap();
        if rig.format.breaks() {
            rig.pages.fail_flush_in(0);
            let failed = rig.table.split(range(0, BIG)).unwrap_err();
            assert_eq!(failed, SplitError::Flush { at: Gpa::new(0), source: FAILED, absent: Some(range(0, BIG)) });
            assert_eq!(rig.leaves(), [], "{}", rig.format.name);
            assert_eq!(rig.was_reported(0), !rig.format.hardware);
            rig.verify_but_limbo();
            // Also where the split was only on the way to something else.
            rig.table.unmap(range(0, BIG)).unwrap();
            rig.map(0, BIG, &large()).unwrap();
            rig.pages.fail_flush_in(0);
            let failed = rig.table.restrict(range(PAGE, PAGE), Access::READ).unwrap_err();
            let absent = Some(range(0, BIG));
            assert_eq!(failed, RemoveError::Flush { at: Gpa::new(PAGE), source: FAILED, absent });
            assert_eq!(rig.leaves(), [], "{}", rig.format.name);
        }
        rig.table.unmap(range(0, BIG)).unwrap();
        rig.map(0, BIG, &small()).unwrap();
        rig.pages.fail_flush_in(0);
        let failed = rig.admit(range(0, BIG), |admission| rig.table.collapse(admission, range(0, BIG)).unwrap_err());
        let CollapseError::Flush { absent, .. } = failed else { panic!("{failed:?}") };
        assert_eq!(absent, Some(range(0, BIG)));
        assert_eq!(rig.leaves(), [], "{}", rig.format.name);
    });
}

#[test]
fn raising_rights_survives_a_failing_flush_or_says_so() {
    each(|rig| {
        rig.map(0, BIG, &small()).unwrap();
        rig.pages.fail_flush_in(0);
        let lowered = rig.admit(range(0, BIG), |admission| rig.table.protect(admission, range(0, BIG), Access::READ));
        assert!(matches!(lowered, Err(MapError::Flush { source: FAILED, .. })), "{lowered:?}");
        // One flush for all of the range: it comes last.
        let rights: Vec<_> = rig.leaves().iter().map(|leaf| leaf.3).collect();
        assert_eq!(rights, [Access::READ; 4], "{}", rig.format.name);
        assert!(matches!(lowered, Err(MapError::Flush { at, .. }) if at == Gpa::new(BIG)), "{lowered:?}");
    });
}

#[test]
fn a_range_owes_one_flush_whatever_is_done_to_its_leaves() {
    each(|rig| {
        rig.map(0, BIG, &small()).unwrap();
        let whole = range(0, BIG);
        let count = |what: &str| {
            let flushes = rig.pages.take_events().iter().filter(|event| matches!(event, Event::Flush { .. })).count();
            assert_eq!(flushes, 1, "{}: {what}", rig.format.name);
        };
        rig.pages.take_events();
        rig.admit(whole, |admission| rig.table.protect(admission, whole, Access::READ)).unwrap();
        count("protect");
        rig.table.unmap(whole).unwrap();
        count("unmap");
    });
}

#[test]
fn harvested_facts_are_in_the_error() {
    each(|rig| {
        rig.map(0, PAGE, &small().dirty(true)).unwrap();
        rig.pages.fail_flush_in(0);
        let failed = rig.table.harvest_dirty(range(0, BIG)).unwrap_err();
        let spte_core::HarvestError::Flush { dirty, source, absent: None } = failed else { panic!("{failed:?}") };
        assert_eq!((dirty, source), (vec![range(0, PAGE)], FAILED));
    });
}

#[test]
fn whoever_is_in_a_scope_gets_an_error_and_no_deadlock() {
    each(|rig| {
        rig.map(0, 2 * BIG, &small()).unwrap();
        let in_scope = FlushFailed::Scopes(ScopeWaitError::InScope);
        let mut walker = rig.walker();
        {
            let scope = walker.enter();
            let failed = rig.table.unmap(range(0, BIG)).unwrap_err();
            assert_eq!(failed, RemoveError::Flush { at: Gpa::new(BIG), source: in_scope, absent: None });
            rig.table.arm(range(BIG, BIG)).unwrap_err();
            assert!(matches!(rig.space.zap(range(0, BIG)), Err(OpenError::InScope { .. })));
            drop(scope);
        }
        rig.pages.take_events();
        // Another's scope, and a window that must not wait.
        let space = &rig.space;
        std::thread::scope(|threads| {
            let _scope = walker.enter();
            threads
                .spawn(|| {
                    let refused = space.window(range(BIG, BIG)).nonblocking().open_zapped();
                    assert!(matches!(refused, Err(OpenError::WouldBlock { .. })), "{refused:?}");
                })
                .join()
                .unwrap();
        });
        assert_eq!(rig.leaves(), [], "{}", rig.format.name);
    });
}

#[test]
fn a_window_that_must_not_wait_does_not_wait_to_split() {
    each(|rig| {
        rig.map(0, 2 * BIG, &large()).unwrap();
        let space = &rig.space;
        let mut walker = rig.walker();
        std::thread::scope(|threads| {
            let _scope = walker.enter();
            let open = || {
                let zapped = space.window(range(PAGE, PAGE)).nonblocking().open_zapped();
                assert!(matches!(zapped, Err(OpenError::WouldBlock { .. })), "{zapped:?}");
                let retained = space.window(range(BIG + PAGE, PAGE)).nonblocking().open_retained();
                assert!(matches!(retained, Err(OpenError::WouldBlock { .. })), "{retained:?}");
            };
            threads.spawn(open).join().unwrap();
        });
        assert!(!rig.leaves().iter().any(|leaf| leaf.0 <= PAGE && leaf.0 + leaf.2 > PAGE), "{}", rig.format.name);
    });
}

/// At every flush of a history of every operation.
#[test]
fn every_flush_of_a_long_history_may_fail() {
    for format in flavours() {
        for call in 0..24 {
            let rig = Rig::new(format);
            rig.pages.fail_flush_in(call);
            let whole = rig.whole();
            let _ = rig.map(0, whole.len(), &large());
            let _ = rig.table.split(range(PAGE, PAGE));
            let _ = rig.table.arm(range(0, 3 * PAGE));
            let _ = rig.map(0, BIG, &small());
            let _ = rig.admit(whole, |admission| rig.table.collapse(admission, whole));
            let _ = rig.table.unmap(range(2 * PAGE, BIG));
            if let Ok(guard) = rig.space.retain(range(0, BIG)) {
                let change = Change { page: Gpa::new(0), expected: OutputAddr::new(OUT), new: OutputAddr::new(BIG) };
                let _ = guard.change_pte(&[change]);
                let _ = guard.close();
            }
            let _ = rig.table.harvest_dirty(whole);
            let _ = rig.table.restrict(whole, Access::READ);
            let _ = rig.table.trim(whole);
            if let Ok(guard) = rig.space.zap(range(0, BIG)) {
                let _ = guard.close();
            }
            let _ = rig.table.unmap(whole);
            rig.pages.stop_failing();
            rig.space.reap();
            assert_eq!(rig.space.progress().count, 0, "{}: {call}", format.name);
            rig.space.zap(whole).unwrap().close().unwrap();
            assert_eq!(rig.leaves(), [], "{}: {call}", format.name);
            rig.verify();
            rig.end();
        }
    }
}
