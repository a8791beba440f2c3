// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Windows: opening, closing, what goes wrong with either, and what is left after that.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use common::*;
use notifier_core::*;

#[test]
fn i1_while_a_guard_lives_its_range_is_in_progress() {
    let (space, toy, _s) = world(16);
    let mut walker = space.walker();
    let guard = space.zap(hva(HOST + PAGE, 2 * PAGE)).unwrap();
    assert_eq!(space.progress(), Progress { count: 1, ..space.progress() });
    for page in [1, 2] {
        assert!(is_retry(&try_fault(&mut walker, &toy, page * PAGE, home(page * PAGE))));
    }
    for page in [0, 3] {
        try_fault(&mut walker, &toy, page * PAGE, home(page * PAGE)).unwrap();
    }
    guard.close().unwrap();
    assert_eq!(space.progress().count, 0);
    try_fault(&mut walker, &toy, PAGE, home(PAGE)).unwrap();
}

#[test]
fn i2_no_observer_sees_the_count_fall_before_the_sequence_moved() {
    // (The weak orders are the model's: `sequence_before_count` in loom.rs.)
    let space = Space::new();
    let done = Arc::new(AtomicBool::new(false));
    let opened = Arc::new(AtomicU64::new(0));
    let observer = std::thread::spawn({
        let (space, done, opened) = (space.clone(), Arc::clone(&done), Arc::clone(&opened));
        move || {
            while !done.load(Ordering::Acquire) {
                // The count was elevated for this many windows; if it is down now, each has moved the sequence.
                let opened = opened.load(Ordering::Acquire);
                let now = space.progress();
                assert!(now.count != 0 || now.sequence >= opened, "{now:?}, but {opened} were opened");
            }
        }
    });
    for n in 1..=20_000 {
        let guard = space.zap(hva(PAGE, PAGE)).unwrap();
        opened.store(n, Ordering::Release);
        guard.close().unwrap();
    }
    done.store(true, Ordering::Release);
    observer.join().unwrap();
    assert_eq!(space.progress(), Progress { count: 0, sequence: 20_000 });
    assert!(!space.must_retry(20_000));
    assert!(space.must_retry(19_999));
}

#[test]
fn i4_nothing_is_added_inside_a_window() {
    let (space, toy, _s) = world(16);
    let mut walker = space.walker();
    // A fault, and an operation without a lookup, that began before the window.
    let resolved = walker
        .fault(gpa(0, PAGE))
        .unwrap()
        .resolve(|fault| Ok::<_, ()>(Extent { guest: fault.range(), output: home(0), access: Access::RW }))
        .unwrap();
    let mut other = space.walker();
    let upgrade = other.fault(gpa(0, PAGE)).unwrap();
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    assert!(upgrade.is_lost());
    assert_eq!(upgrade.admit(|admission| admission.check(gpa(0, PAGE))), Err(Refused::Lost));
    let retry = resolved.install(|admission| toy.install(admission)).unwrap_err();
    assert_eq!(retry.window(), Some(Key::Host(hva(HOST, PAGE))));
    assert_eq!(toy.peek(0), None);
    // And those that begin inside it.
    assert!(is_retry(&space.admit(gpa(0, PAGE), |_| ())));
    guard.close().unwrap();
    space.admit(gpa(0, PAGE), |admission| admission.check(gpa(0, PAGE)).unwrap()).unwrap();
}

#[test]
fn i5_after_a_zapped_guard_is_returned_nothing_reaches_the_page() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let mut walker = space.walker();
    let inside = walker.enter();
    assert_eq!(toy.read(&inside, PAGE), Some(home(PAGE)));
    // The walker still uses what it found: the window waits for it.
    let opened = Arc::new(AtomicBool::new(false));
    let opener = std::thread::spawn({
        let (space, opened) = (space.clone(), Arc::clone(&opened));
        move || {
            let guard = space.zap(hva(HOST + PAGE, PAGE)).unwrap();
            opened.store(true, Ordering::SeqCst);
            guard.close().unwrap();
        }
    });
    eventually(|| toy.peek(PAGE).is_none());
    std::thread::sleep(Duration::from_millis(20));
    assert!(!opened.load(Ordering::SeqCst), "the window opened beside a scope that may use the page");
    drop(inside);
    opener.join().unwrap();
    let inside = walker.enter();
    assert_eq!(toy.read(&inside, PAGE), None);
    assert_eq!(toy.read(&inside, 2 * PAGE), Some(home(2 * PAGE)));
}

#[test]
fn i5_a_subscriber_that_is_leaving_is_waited_for() {
    // It left, but has not released yet: a window that opens now must not return while it still translates.
    let (space, toy, _s) = world(4);
    struct Slow(Arc<Toy>, Arc<(AtomicBool, AtomicBool)>);
    impl Subscriber for Slow {
        fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
            self.0.start(window)
        }
        fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
            self.0.zap(part)
        }
        fn release(&self) -> Result<(), SubscriberError> {
            self.1.0.store(true, Ordering::SeqCst);
            eventually(|| self.1.1.load(Ordering::SeqCst));
            self.0.release()
        }
    }
    let table = Toy::new(&space, 4);
    let flags = Arc::new((AtomicBool::new(false), AtomicBool::new(false)));
    let subscription = space.subscribe(Slow(Arc::clone(&table), Arc::clone(&flags))).unwrap();
    fault_in(&space, &table, 0..2);
    fault_in(&space, &toy, 0..2);
    let leaver = std::thread::spawn(move || subscription.leave().map_err(|_| ()).unwrap());
    eventually(|| flags.0.load(Ordering::SeqCst));
    // The non-blocking form does not wait for it.
    assert!(matches!(space.window(hva(HOST, PAGE)).nonblocking().open_zapped(), Err(OpenError::WouldBlock { .. })));
    let opener = std::thread::spawn({
        let (space, table) = (space.clone(), Arc::clone(&table));
        move || {
            let guard = space.zap(hva(HOST, PAGE)).unwrap();
            assert_eq!(table.peek(0), None, "the leaving subscriber still translates");
            guard.close().unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(50));
    flags.1.store(true, Ordering::SeqCst);
    leaver.join().unwrap();
    opener.join().unwrap();
}

#[test]
fn i6_no_write_reaches_a_page_of_a_retained_window() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..2);
    toy.log_dirty(PAGE);
    let before = Seen { output: home(PAGE), writable: false, upgradable: true };
    assert_eq!(toy.peek(PAGE), Some(before));
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    let mut walker = space.walker();
    let inside = walker.enter();
    for page in [0, 1] {
        assert_eq!(toy.read(&inside, page * PAGE), Some(home(page * PAGE)), "reads go on");
        assert_eq!(toy.write(&inside, page * PAGE), None, "a write got through");
    }
    drop(inside);
    guard.keep(hva(HOST, 2 * PAGE)).unwrap();
    guard.close().unwrap();
    assert_eq!(toy.peek(0), Some(Seen { output: home(0), writable: false, upgradable: false }));
}

#[test]
fn i8_a_page_without_an_outcome_is_zapped() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let guard = space.retain(hva(HOST, 4 * PAGE)).unwrap();
    guard.keep(hva(HOST + PAGE, PAGE)).unwrap();
    guard.zap(hva(HOST + 2 * PAGE, PAGE)).unwrap();
    assert_eq!(toy.peek(2 * PAGE), None);
    assert!(matches!(guard.keep(hva(HOST + 3 * PAGE, 2 * PAGE)), Err(SettleError::OutsideWindow { .. })));
    assert!(matches!(guard.zap(hva(HOST - PAGE, PAGE)), Err(SettleError::OutsideWindow { .. })));
    guard.close().unwrap();
    assert!(toy.peek(0).is_none() && toy.peek(PAGE).is_some());
    assert!(toy.peek(3 * PAGE).is_none() && toy.peek(4 * PAGE).is_some());
    assert_eq!(space.counters().zaps, 3);
    // Dropping is no other outcome.
    drop(space.retain(hva(HOST + 4 * PAGE, PAGE)).unwrap());
    assert_eq!(toy.peek(4 * PAGE), None);
}

#[test]
fn i10_a_failed_opening_ends_exactly_those_it_started_in_reverse() {
    let log = Log::default();
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let _a = space.subscribe(Probe::new("a", &log)).unwrap();
    let _b = space.subscribe(Probe::new("b", &log)).unwrap();
    let _c = space.subscribe(Probe::new("c", &log).on_start(|_| Err(refused()))).unwrap();
    let _d = space.subscribe(Probe::new("d", &log)).unwrap();
    log.take();
    let error = space.zap(hva(HOST, PAGE)).unwrap_err();
    assert!(matches!(&error, OpenError::Subscriber { name, .. } if name == "c"), "{error}");
    assert_eq!(log.take(), "a.start b.start c.start b.end a.end");
    assert_eq!(toy.peek(0), None, "what was zapped stays zapped");
    assert!(toy.peek(PAGE).is_some());
    assert_eq!(space.progress(), Progress { count: 0, sequence: 1 + 1 }, "one for the slot, one for this");
    // A failed Retained opening keeps what it found.
    assert!(space.retain(hva(HOST + PAGE, PAGE)).is_err());
    assert!(toy.peek(PAGE).is_some());
    assert_eq!(space.counters().zaps, 0);
}

#[test]
fn i10_a_panicking_start_is_a_failed_one() {
    let log = Log::default();
    let space = Space::new();
    let _a = space.subscribe(Probe::new("a", &log)).unwrap();
    let b = space.subscribe(Probe::new("b", &log).on_start(|_| panic!("at the start"))).unwrap();
    let error = space.zap(hva(0, PAGE)).unwrap_err();
    assert!(matches!(error, OpenError::Subscriber { source: SubscriberError::Panicked, .. }), "{error}");
    assert_eq!(log.take(), "a.start b.start a.end");
    assert_eq!(space.progress().count, 0);
    // It is still a member, and the space still works.
    b.leave().map_err(|_| ()).unwrap();
    space.zap(hva(0, PAGE)).unwrap().close().unwrap();
}

#[test]
fn i10_an_end_that_fails_keeps_the_window_in_progress_until_it_is_reaped() {
    let (space, toy, _s) = world(4);
    let log = Log::default();
    let _b = space.subscribe(Probe::new("b", &log)).unwrap();
    log.take();
    let guard = space.zap(hva(HOST, PAGE)).unwrap();
    toy.fail_end.store(true, Ordering::SeqCst);
    let error = guard.close().unwrap_err();
    assert!(matches!(error.cause, CloseCause::Subscriber { .. }), "{error}");
    assert_eq!(space.progress().count, 1);
    assert_eq!(space.counters().unfinished, 1);
    let mut walker = space.walker();
    assert!(is_retry(&try_fault(&mut walker, &toy, 0, home(0))));
    try_fault(&mut walker, &toy, PAGE, home(PAGE)).unwrap();
    assert_eq!(space.reap(), 1);
    toy.fail_end.store(false, Ordering::SeqCst);
    eventually(|| space.reap() == 0 && space.progress().count == 0);
    // Who had its end does not get another.
    assert_eq!(log.take(), "b.start b.end");
    assert_eq!(toy.ends.load(Ordering::SeqCst), toy.starts.load(Ordering::SeqCst));
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
}

#[test]
fn a_window_that_did_not_close_is_finished_without_being_asked() {
    let (space, toy, _s) = world(4);
    toy.fail_end.store(true, Ordering::SeqCst);
    drop(space.zap(hva(HOST, PAGE)).unwrap());
    assert_eq!(space.progress().count, 1);
    toy.fail_end.store(false, Ordering::SeqCst);
    eventually(|| space.progress().count == 0);
}

#[test]
fn a_panicking_end_or_zap_is_a_failed_one() {
    let log = Log::default();
    let space = Space::new();
    let armed = Arc::new(AtomicBool::new(true));
    let boom = |armed: &Arc<AtomicBool>| {
        let armed = Arc::clone(armed);
        move |_: &Coverage<'_>| {
            assert!(!armed.load(Ordering::SeqCst), "boom");
            Ok(())
        }
    };
    let _a = space.subscribe(Probe::new("a", &log).on_end(boom(&armed)).on_zap(boom(&armed))).unwrap();
    let guard = space.retain(hva(0, PAGE)).unwrap();
    assert!(matches!(guard.zap(hva(0, PAGE)), Err(SettleError::Close(CloseCause::Subscriber { .. }))));
    drop(guard);
    assert_eq!(space.progress().count, 1);
    armed.store(false, Ordering::SeqCst);
    eventually(|| space.reap() == 0 && space.progress().count == 0);
}

#[test]
fn a_leaked_guard_stalls_only_its_range() {
    let (space, toy, _s) = world(16);
    fault_in(&space, &toy, 0..16);
    std::mem::forget(space.zap(hva(HOST, PAGE)).unwrap());
    let mut walker = space.walker();
    assert!(is_retry(&try_fault(&mut walker, &toy, 0, home(0))));
    for round in 0..100 {
        let guard = space.retain(hva(HOST + PAGE, 8 * PAGE)).unwrap();
        guard.keep(guard.range()).unwrap();
        guard.close().unwrap();
        try_fault(&mut walker, &toy, 12 * PAGE, out(round * PAGE)).unwrap();
        assert_eq!(space.progress().count, 1);
    }
    // Other windows may open over it all the same.
    space.zap(hva(HOST, 2 * PAGE)).unwrap().close().unwrap();
    assert_eq!(space.counters().unrelated_retries, 0);
}

#[test]
fn retained_windows_do_not_overlap_each_other() {
    let (space, _toy, _s) = world(16);
    let first = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    let open = Key::Host(first.range());
    for result in [space.retain(hva(HOST + 2 * PAGE - 1, 1)).map(drop)] {
        match result {
            Err(OpenError::Busy { open: busy, .. }) => assert_eq!(busy, open),
            other => panic!("{other:?}"),
        }
    }
    // By its guest address it is the same page.
    assert!(matches!(space.retain(gpa(PAGE, PAGE)), Err(OpenError::Busy { .. })));
    // A Zapped window may, and another Retained one beside it.
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
    space.retain(hva(HOST + 2 * PAGE, PAGE)).unwrap().close().unwrap();
    first.close().unwrap();
    space.retain(hva(HOST, PAGE)).unwrap().close().unwrap();
}

#[test]
fn partly_covered_pages_count() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    // One byte of page 1, one byte of page 2.
    let guard = space.zap(hva(HOST + 2 * PAGE - 1, 2)).unwrap();
    assert!(toy.peek(0).is_some() && toy.peek(3 * PAGE).is_some());
    assert!(toy.peek(PAGE).is_none() && toy.peek(2 * PAGE).is_none());
    let mut walker = space.walker();
    for page in [1, 2] {
        assert!(is_retry(&try_fault(&mut walker, &toy, page * PAGE, home(page * PAGE))));
    }
    guard.close().unwrap();
}

#[test]
fn the_nonblocking_form_does_not_wait_for_scopes() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let (entered, wait) = (std::sync::mpsc::channel(), std::sync::mpsc::channel::<()>());
    let in_scope = std::thread::spawn({
        let space = space.clone();
        move || {
            let mut walker = space.walker();
            let _scope = walker.enter();
            entered.0.send(()).unwrap();
            let _ = wait.1.recv();
        }
    });
    entered.1.recv().unwrap();
    let refused = space.window(hva(HOST, PAGE)).nonblocking().open_zapped();
    assert!(matches!(refused, Err(OpenError::WouldBlock { .. })), "{refused:?}");
    assert_eq!(space.progress().count, 0);
    drop(wait.0);
    in_scope.join().unwrap();
    space.window(hva(HOST, PAGE)).nonblocking().open_zapped().unwrap().close().unwrap();
}

#[test]
fn would_block_is_an_error_of_the_subscriber_where_waiting_is_allowed() {
    let space = Space::new();
    let log = Log::default();
    let _a = space.subscribe(
        Probe::new("a", &log).on_start(|w| if w.nonblocking() { Err(SubscriberError::WouldBlock) } else { Ok(()) }),
    );
    let result = space.window(hva(0, PAGE)).nonblocking().open_retained();
    assert!(matches!(result, Err(OpenError::WouldBlock { .. })));
    space.retain(hva(0, PAGE)).unwrap().close().unwrap();
    let _b = space.subscribe(Probe::new("b", &log).on_start(|_| Err(SubscriberError::WouldBlock)));
    assert!(matches!(space.retain(hva(0, PAGE)), Err(OpenError::Subscriber { .. })));
}

#[test]
fn a_subscriber_that_cannot_follow_pins() {
    let (space, toy, _s) = world(16);
    fault_in(&space, &toy, 0..16);
    let log = Log::default();
    let fixed = space.subscribe(Probe::new("fixed", &log).pinned(Interest::Guest(gpa(PAGE, PAGE)))).unwrap();
    log.take();
    match space.zap(hva(HOST, 4 * PAGE)) {
        Err(OpenError::Pinned { holder, name, .. }) => {
            assert_eq!(holder, Holder::Subscriber(fixed.id()));
            assert_eq!(name, "fixed");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(log.take(), "", "nobody was started");
    assert!(toy.peek(0).is_some(), "nothing was zapped");
    assert_eq!(space.counters().vetoes, 1);
    assert_eq!(space.progress().count, 0);
    space.zap(hva(HOST + 2 * PAGE, PAGE)).unwrap().close().unwrap();
    // One that finds out at its start pins too.
    let held = gpa(8 * PAGE, PAGE);
    let _late = space
        .subscribe(Probe::new("late", &log).on_start(move |_| Err(SubscriberError::Pinned { range: held })))
        .unwrap();
    assert!(matches!(space.zap(hva(HOST + 8 * PAGE, PAGE)), Err(OpenError::Pinned { .. })));
    assert_eq!(space.counters().vetoes, 2);
}

#[test]
fn a_subscriber_that_panics_when_asked_whether_it_follows_has_failed() {
    struct Rude;
    impl Subscriber for Rude {
        fn not_invalidatable(&self) -> Option<Interest> {
            panic!("do not ask")
        }
        fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
        fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
    }
    let space = Space::new();
    let rude = space.subscribe(Rude).unwrap();
    assert!(matches!(space.zap(hva(0, PAGE)), Err(OpenError::Subscriber { source: SubscriberError::Panicked, .. })));
    assert_eq!(space.progress().count, 0);
    drop(rude);
    space.zap(hva(0, PAGE)).unwrap().close().unwrap();
}

#[test]
fn windows_are_not_opened_or_closed_inside_ones_own_scope() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let mut walker = space.walker();
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    let other = space.zap(hva(HOST + PAGE, PAGE)).unwrap();
    let scope = walker.enter();
    assert!(matches!(space.zap(hva(HOST, PAGE)), Err(OpenError::InScope { .. })));
    assert!(matches!(space.wait_for_scopes(false), Err(ScopeWaitError::InScope)));
    assert!(matches!(guard.close().unwrap_err().cause, CloseCause::InScope));
    drop(other);
    // The reaper may have closed the other one already: it has nothing to flush. This one waits for the scope.
    assert!(space.progress().count >= 1, "in progress");
    assert!(toy.peek(0).is_some());
    drop(scope);
    eventually(|| space.reap() == 0 && space.progress().count == 0);
    assert_eq!(toy.peek(0), None);
    assert_eq!(space.counters().unfinished, 2);
    // A scope of another space is no obstacle.
    let elsewhere = Space::new();
    let mut stranger = elsewhere.walker();
    let _inside = stranger.enter();
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
}

#[test]
fn nothing_of_a_window_is_settled_inside_ones_own_scope() {
    // The flush would wait for the caller.
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    let mut walker = space.walker();
    let scope = walker.enter();
    let change = Change { page: Hva::new(HOST), expected: home(0), new: out(0x9000_0000) };
    assert!(matches!(guard.change_pte(&[change]), Err(ChangeError::InScope { .. })));
    assert!(matches!(guard.zap(hva(HOST, PAGE)), Err(SettleError::Close(CloseCause::InScope))));
    assert_eq!(toy.peek(0).map(|seen| seen.output), Some(home(0)), "nothing was done");
    drop(scope);
    assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Changed);
    guard.close().unwrap();
}

#[test]
fn callbacks_open_close_and_settle_nothing() {
    let space = Space::new();
    let log = Log::default();
    let kept: Arc<Mutex<Option<OwnedInvalidationGuard<Retained>>>> = Arc::default();
    let found: Arc<Mutex<Vec<String>>> = Arc::default();
    let _a = space
        .subscribe(Probe::new("a", &log).on_zap({
            let (space, kept, found) = (space.clone(), Arc::clone(&kept), Arc::clone(&found));
            move |_| {
                let mut found = lock(&found);
                found.push(format!("{:?}", space.zap(hva(0, PAGE)).unwrap_err()));
                let guard = lock(&kept).take().unwrap();
                found.push(format!("{:?}", guard.zap(hva(0, PAGE)).unwrap_err()));
                found.push(format!("{:?}", guard.change_pte(&[]).unwrap_err()));
                found.push(format!("{:?}", guard.close().unwrap_err().cause));
                drop(space.retain(hva(0, PAGE)));
                Ok(())
            }
        }))
        .unwrap();
    *lock(&kept) = Some(space.window(hva(0, PAGE)).open_retained_owned().unwrap());
    let driver = space.retain(hva(PAGE, PAGE)).unwrap();
    driver.zap(hva(PAGE, PAGE)).unwrap();
    driver.close().unwrap();
    let found = lock(&found).clone();
    assert_eq!(found.len(), 4);
    assert!(found.iter().all(|error| error.contains("InCallback")), "{found:?}");
}

#[test]
fn a_guard_that_a_threads_own_storage_holds_closes_with_the_thread() {
    // The crate's own thread-local state is gone by then: that must not be a panic, in a drop of all places.
    thread_local! {
        static KEPT: std::cell::RefCell<Option<OwnedInvalidationGuard<Zapped>>> = const { std::cell::RefCell::new(None) };
        static BORROWED: std::cell::RefCell<Option<InvalidationGuard<'static, Zapped>>> =
            const { std::cell::RefCell::new(None) };
    }
    let (space, _toy, _s) = world(4);
    let leaked: &'static Space = Box::leak(Box::new(space.clone()));
    std::thread::spawn(move || {
        // Registered before the crate's own, and so destroyed after it.
        KEPT.with_borrow_mut(|kept| *kept = None);
        BORROWED.with_borrow_mut(|kept| *kept = None);
        let guard = leaked.window(hva(HOST, PAGE)).open_zapped_owned().unwrap();
        KEPT.with_borrow_mut(|kept| *kept = Some(guard));
        let guard = leaked.zap(hva(HOST + PAGE, PAGE)).unwrap();
        BORROWED.with_borrow_mut(|kept| *kept = Some(guard));
    })
    .join()
    .unwrap();
    eventually(|| space.progress().count == 0);
}

#[test]
fn windows_are_counted() {
    let (space, toy, _s) = world(4);
    let slots = space.counters().windows;
    fault_in(&space, &toy, 0..4);
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
    drop(space.retain(hva(HOST, 4 * PAGE)).unwrap());
    let counters = space.counters();
    assert_eq!(counters.windows, slots + 2);
    assert_eq!(counters.zaps, 4);
    assert_eq!(counters.faults, 4);
    assert_eq!((counters.retries, counters.unfinished, counters.vetoes), (0, 0, 0));
}
