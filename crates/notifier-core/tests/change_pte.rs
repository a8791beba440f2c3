// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `change_pte`: repointing a page without an exit, and everything it must not do.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::sync::{Arc, atomic::Ordering};

use common::*;
use notifier_core::*;

const NEW: u64 = 0x9000_0000;

fn change(page: u64) -> Change<Hva> {
    Change { page: Hva::new(HOST + page * PAGE), expected: home(page * PAGE), new: out(NEW + page * PAGE) }
}

fn outcomes(changed: &[Changed<Hva>]) -> Vec<Outcome> {
    changed.iter().map(|page| page.outcome).collect()
}

#[test]
fn a_page_is_repointed_read_only_without_an_exit() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    toy.touch(0);
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    let report = guard.change_pte(&[change(1), change(0)]).unwrap();
    assert_eq!(outcomes(&report), [Outcome::Changed; 2]);
    assert_eq!(report[0].page, Hva::new(HOST + PAGE));
    assert_eq!((report[0].old, report[0].found), (home(PAGE), None));
    guard.close().unwrap();
    for page in [0, 1] {
        let seen = Seen { output: out(NEW + page * PAGE), writable: false, upgradable: false };
        assert_eq!(toy.peek(page * PAGE), Some(seen), "closing keeps what has an outcome");
    }
    assert!(space.test_age(gpa(0, PAGE)).unwrap(), "the accessed fact survives");
    assert_eq!(toy.peek(2 * PAGE).unwrap().output, home(2 * PAGE));
    let counters = space.counters();
    assert_eq!((counters.changes, counters.absents, counters.zaps), (2, 0, 0));
}

#[test]
fn i3_change_pte_leaves_the_sequence_alone() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let guard = space.retain(hva(HOST, 8 * PAGE)).unwrap();
    let before = space.progress();
    for page in 0..8 {
        guard.change_pte(&[change(page)]).unwrap();
    }
    assert_eq!(space.progress(), before);
    guard.close().unwrap();
    assert_eq!(space.progress(), Progress { count: 0, sequence: before.sequence + 1 });
}

#[test]
fn i5_nothing_translates_to_the_old_page_when_change_pte_returns() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    let (entered, wait_entered) = std::sync::mpsc::channel();
    let (leave, wait_leave) = std::sync::mpsc::channel::<()>();
    let reader = std::thread::spawn({
        let (space, toy) = (space.clone(), Arc::clone(&toy));
        move || {
            let mut walker = space.walker();
            let scope = walker.enter();
            entered.send(toy.read(&scope, 0)).unwrap();
            wait_leave.recv().unwrap();
        }
    });
    assert_eq!(wait_entered.recv().unwrap(), Some(home(0)));
    // It cannot return while somebody may use the old page.
    let returned = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|threads| {
        threads.spawn(|| {
            guard.change_pte(&[change(0)]).unwrap();
            returned.store(true, Ordering::SeqCst);
        });
        eventually(|| toy.peek(0).map(|seen| seen.output) == Some(out(NEW)));
        std::thread::sleep(std::time::Duration::from_millis(20));
        assert!(!returned.load(Ordering::SeqCst));
        leave.send(()).unwrap();
    });
    reader.join().unwrap();
    guard.close().unwrap();
}

#[test]
fn i7_change_pte_never_creates() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, [0]);
    let guard = space.retain(hva(HOST, 4 * PAGE)).unwrap();
    assert_eq!(outcomes(&guard.change_pte(&[change(0), change(1)]).unwrap()), [Outcome::Changed, Outcome::Absent]);
    assert_eq!(toy.peek(PAGE), None);
    // What was zapped inside the window stays zapped.
    guard.zap(hva(HOST, PAGE)).unwrap();
    let again = Change { expected: out(NEW), new: home(0), ..change(0) };
    assert_eq!(outcomes(&guard.change_pte(&[again]).unwrap()), [Outcome::Absent]);
    assert_eq!(toy.peek(0), None);
    guard.close().unwrap();
    assert_eq!(space.counters().absents, 2);
}

#[test]
fn an_unexpected_output_is_zapped_and_named() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let guard = space.retain(hva(HOST, 4 * PAGE)).unwrap();
    let report = guard.change_pte(&[Change { expected: out(0x7000_0000), ..change(0) }, change(1)]).unwrap();
    assert_eq!(outcomes(&report), [Outcome::Zapped, Outcome::Changed]);
    assert_eq!(report[0].found, Some(home(0)));
    assert_eq!(toy.peek(0), None);
    guard.close().unwrap();
}

#[test]
fn i10_a_refused_batch_changes_nothing() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    let outside = guard.change_pte(&[change(0), change(2)]).unwrap_err();
    assert!(matches!(outside, ChangeError::OutsideWindow { page, .. } if page == Hva::new(HOST + 2 * PAGE)));
    for bad in [
        Change { page: Hva::new(HOST + 8), ..change(0) },
        Change { expected: out(0x8000_0001), ..change(0) },
        Change { new: out(0x8000_0800), ..change(0) },
    ] {
        assert!(matches!(guard.change_pte(&[change(1), bad]), Err(ChangeError::Unaligned { .. })));
    }
    let far = Change { page: Hva::new(u64::MAX - PAGE + 1), ..change(0) };
    assert!(matches!(guard.change_pte(&[far]), Err(ChangeError::OutsideWindow { .. })));
    assert!(matches!(guard.change_pte(&[change(1), change(0), change(1)]), Err(ChangeError::Twice { .. })));
    let other = Space::new();
    assert!(matches!(guard.change_pte_in(&other, &[change(0)]), Err(ChangeError::ForeignSpace { .. })));
    assert!((0..2).all(|page| toy.peek(page * PAGE).unwrap().output == home(page * PAGE)));
    assert_eq!(space.counters().changes, 0);
    guard.change_pte_in(&space, &[change(0)]).unwrap();
    assert!(guard.change_pte(&[]).unwrap().is_empty());
    guard.close().unwrap();
    assert_eq!(toy.peek(PAGE), None, "a page of a refused batch has no outcome");
}

#[test]
fn a_window_of_a_part_of_a_page_has_no_page_to_repoint() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let guard = space.retain(hva(HOST, PAGE - 1)).unwrap();
    assert!(matches!(guard.change_pte(&[change(0)]), Err(ChangeError::OutsideWindow { .. })));
    guard.close().unwrap();
    assert_eq!(toy.peek(0), None);
}

#[test]
fn i10_what_cannot_be_changed_is_zapped() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    toy.fail_change.store(true, Ordering::SeqCst);
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    assert_eq!(outcomes(&guard.change_pte(&[change(0)]).unwrap()), [Outcome::Zapped]);
    assert!(toy.peek(0).is_none() && toy.peek(PAGE).is_some());
    // And where that fails too, it is said, and closing fails until it is done.
    toy.fail_zap.store(true, Ordering::SeqCst);
    assert!(matches!(guard.change_pte(&[change(1)]), Err(ChangeError::Subscriber { .. })));
    assert!(guard.close().is_err());
    assert_eq!(space.progress().count, 1);
    toy.fail_zap.store(false, Ordering::SeqCst);
    eventually(|| space.reap() == 0 && space.progress().count == 0);
    assert_eq!(toy.peek(PAGE), None);
}

#[test]
fn a_panic_in_change_pte_zaps() {
    struct Boom(Arc<Toy>);
    impl Subscriber for Boom {
        fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
            self.0.start(window)
        }
        fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
            self.0.zap(part)
        }
        fn change_pte(&self, _: &ChangeBatch<'_>, _: &mut [PageOutcome]) -> Result<(), SubscriberError> {
            panic!("boom")
        }
    }
    let space = Space::new();
    space.add_slot(spec(0, 4 * PAGE, HOST)).unwrap();
    let toy = Toy::new(&space, 4);
    let _s = space.subscribe(Boom(Arc::clone(&toy))).unwrap();
    fault_in(&space, &toy, 0..4);
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    assert_eq!(outcomes(&guard.change_pte(&[change(0)]).unwrap()), [Outcome::Zapped]);
    assert_eq!(toy.peek(0), None);
    guard.close().unwrap();
}

#[test]
fn who_cannot_repoint_removes() {
    let (space, toy, _s) = world(4);
    let log = Log::default();
    let _p = space.subscribe(Probe::new("p", &log)).unwrap();
    fault_in(&space, &toy, 0..4);
    log.take();
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    assert_eq!(outcomes(&guard.change_pte(&[change(0)]).unwrap()), [Outcome::Zapped], "one of two removed it");
    assert_eq!(log.take(), "p.start p.zap");
    assert_eq!(toy.peek(0).map(|seen| seen.output), Some(out(NEW)), "the other did not have to");
    guard.close().unwrap();
    assert_eq!(log.take(), "p.end");
}

#[test]
fn every_alias_is_repointed() {
    let (space, toy, _s) = world(4);
    space.add_slot(spec(16 * PAGE, 4 * PAGE, HOST)).unwrap();
    let mut walker = space.walker();
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
    try_fault(&mut walker, &toy, 16 * PAGE, home(0)).unwrap();
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    assert_eq!(outcomes(&guard.change_pte(&[change(0)]).unwrap()), [Outcome::Changed]);
    for addr in [0, 16 * PAGE] {
        assert_eq!(toy.peek(addr).map(|seen| seen.output), Some(out(NEW)));
    }
    guard.close().unwrap();
    assert_eq!(space.counters().changes, 1, "a page counts once");
    // One alias alone, by its guest address.
    let guard = space.retain(gpa(16 * PAGE, PAGE)).unwrap();
    let one = Change { page: Gpa::new(16 * PAGE), expected: out(NEW), new: out(NEW + PAGE) };
    assert_eq!(guard.change_pte(&[one]).unwrap()[0].outcome, Outcome::Changed);
    guard.close().unwrap();
    assert_eq!(toy.peek(0).map(|seen| seen.output), Some(out(NEW)));
    assert_eq!(toy.peek(16 * PAGE).map(|seen| seen.output), Some(out(NEW + PAGE)));
}

#[test]
fn linux_of_2012_would_have_zapped_first() {
    // The order that made change_pte useless: invalidate_range_start (here: a Zapped window), then the change. In a
    // Retained window the guest never exits; in a Zapped one the method does not exist (see compile_fail.rs).
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let mut walker = space.walker();
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    assert!(toy.read(&walker.enter(), 0).is_some());
    guard.change_pte(&[change(0)]).unwrap();
    assert!(toy.read(&walker.enter(), 0).is_some());
    guard.close().unwrap();
    assert!(toy.read(&walker.enter(), 0).is_some());
    assert_eq!(space.counters().retries, 0);
}
