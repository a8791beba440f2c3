// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults: what a snapshot covers, when it is lost, and how one waits.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use common::*;
use notifier_core::*;

fn resolve(fault: Fault<'_>) -> Resolved<'_> {
    fault
        .resolve(|fault| {
            Ok::<_, Infallible>(Extent {
                guest: fault.range(),
                output: home(fault.range().start().as_u64()),
                access: Access::RW,
            })
        })
        .unwrap()
}

#[test]
fn i11_a_window_elsewhere_causes_no_retry() {
    let (space, toy, _s) = world(64);
    let mut walker = space.walker();
    for page in 0..64 {
        let fault = walker.fault(gpa(page * PAGE, PAGE)).unwrap();
        // Neighbours on both sides, opened and closed while the fault is in flight.
        for other in [page.wrapping_sub(1), page + 1] {
            if other < 64 {
                space.zap(hva(HOST + other * PAGE, PAGE)).unwrap().close().unwrap();
            }
        }
        resolve(fault).install(|admission| toy.install(admission)).unwrap();
    }
    let counters = space.counters();
    assert_eq!((counters.retries, counters.unrelated_retries), (0, 0));
}

#[test]
fn i11_however_many_guards_were_leaked_a_fault_elsewhere_goes_on() {
    let (space, toy, _s) = world(64);
    // Windows over every other page of a far range, more of them than any history would remember.
    for n in 0..2000 {
        std::mem::forget(space.zap(hva(0x4000_0000 + 2 * n * PAGE, PAGE)).unwrap());
    }
    for n in 0..8 {
        std::mem::forget(space.retain(hva(HOST + 2 * n * PAGE, PAGE)).unwrap());
    }
    let mut walker = space.walker();
    for page in 0..64 {
        let result = try_fault(&mut walker, &toy, page * PAGE, home(page * PAGE));
        assert_eq!(is_retry(&result), page < 16 && page % 2 == 0, "page {page}");
    }
    assert_eq!(space.counters().retries, 8);
    assert_eq!(space.counters().unrelated_retries, 0);
    assert_eq!(space.progress().count, 2008);
}

#[test]
fn a_fault_that_was_overtaken_is_lost_even_if_the_window_has_closed() {
    let (space, toy, _s) = world(8);
    let mut walker = space.walker();
    let fault = walker.fault(gpa(PAGE, PAGE)).unwrap();
    assert!(!fault.is_lost());
    let resolved = resolve(fault);
    space.zap(hva(HOST + PAGE, 1)).unwrap().close().unwrap();
    let retry = resolved.install(|admission| toy.install(admission)).unwrap_err();
    assert_eq!(retry.range(), Some(gpa(PAGE, PAGE)));
    assert_eq!(retry.window(), Some(Key::Host(hva(HOST + PAGE, 1))));
    retry.wait();
    // The walker's next fault does not inherit the poison.
    try_fault(&mut walker, &toy, PAGE, home(PAGE)).unwrap();
    assert_eq!((space.counters().retries, space.counters().unrelated_retries), (1, 0));
}

#[test]
fn retry_waits_for_the_window_and_no_longer() {
    let (space, toy, _s) = world(8);
    let guard = space.zap(hva(HOST, PAGE)).unwrap();
    let mut walker = space.walker();
    let Err(FaultError::Retry(retry)) = walker.fault(gpa(0, PAGE)) else { panic!() };
    assert!(!retry.wait_timeout(Duration::from_millis(5)));
    let closed = Arc::new(AtomicBool::new(false));
    let waiter = std::thread::spawn({
        let (closed, retry) = (Arc::clone(&closed), retry.clone());
        move || {
            // The longest of waits is no overflow.
            assert!(retry.wait_timeout(Duration::MAX));
            assert!(closed.load(Ordering::SeqCst));
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    closed.store(true, Ordering::SeqCst);
    guard.close().unwrap();
    waiter.join().unwrap();
    retry.wait();
    let before = Instant::now();
    assert!(retry.wait_timeout(Duration::from_secs(10)));
    assert!(before.elapsed() < Duration::from_secs(5));
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
}

#[test]
fn nothing_is_published_outside_the_snapshot() {
    let (space, toy, _s) = world(8);
    let mut walker = space.walker();
    let fault = walker.fault(gpa(PAGE, 2 * PAGE)).unwrap();
    fault.admit(|admission| {
        assert_eq!(admission.range(), gpa(PAGE, 2 * PAGE));
        admission.check(gpa(PAGE, 2 * PAGE)).unwrap();
        admission.check(gpa(2 * PAGE, PAGE)).unwrap();
        for outside in [gpa(0, PAGE), gpa(PAGE - 1, 2), gpa(2 * PAGE, PAGE + 1), gpa(0, 8 * PAGE)] {
            assert_eq!(admission.check(outside), Err(Refused::Outside));
        }
    });
    assert_eq!(toy.peek(0), None);
}

#[test]
fn extents_fit_their_fault_and_ascend() {
    let (space, _toy, _s) = world(8);
    let mut walker = space.walker();
    let extent =
        |start: u64, len: u64, output: u64| Extent { guest: gpa(start, len), output: out(output), access: Access::RW };
    let bad = [
        vec![extent(0, PAGE, 0)],
        vec![extent(PAGE, 4 * PAGE, 0)],
        vec![extent(2 * PAGE, PAGE, 0), extent(PAGE, PAGE, 0)],
        vec![extent(PAGE, 2 * PAGE, 0), extent(2 * PAGE, PAGE, 0)],
        vec![extent(PAGE, PAGE, u64::MAX - 1)],
    ];
    for extents in bad {
        let fault = walker.fault(gpa(PAGE, 2 * PAGE)).unwrap();
        let result = fault.resolve(|_| Ok::<_, Infallible>(extents.clone()));
        assert!(matches!(result, Err(ResolveError::Extent { .. })), "{extents:?}");
    }
    let fault = walker.fault(gpa(PAGE, 2 * PAGE)).unwrap();
    let failed = fault.resolve(|_| Err::<Extent, _>("no backing"));
    assert!(matches!(failed, Err(ResolveError::Resolver("no backing"))));
    drop(failed);
    let fault = walker.fault(gpa(PAGE, 2 * PAGE)).unwrap();
    let good = fault.resolve(|_| Ok::<_, Infallible>(vec![extent(PAGE, PAGE, 0x9000), extent(2 * PAGE, PAGE, 0)]));
    let resolved = good.unwrap();
    assert_eq!(resolved.extents().len(), 2);
    resolved.install(|admission| assert_eq!(admission.extents().len(), 2));
}

#[test]
fn a_leaked_fault_ends_with_the_walkers_next() {
    let (space, toy, _s) = world(8);
    let mut walker = space.walker();
    std::mem::forget(walker.fault(gpa(0, PAGE)).unwrap());
    // Windows over it neither wait nor pile up.
    for _ in 0..1000 {
        space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
    }
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
    std::mem::forget(walker.fault(gpa(0, PAGE)).unwrap());
    drop(walker);
    let mut next = space.walker();
    try_fault(&mut next, &toy, 0, home(0)).unwrap();
    assert_eq!(space.counters().retries, 0);
}

#[test]
fn a_walkers_line_is_used_again() {
    let space = Space::new();
    for _ in 0..100 {
        let mut walker = space.walker();
        drop(walker.fault(gpa(0, PAGE)).unwrap());
    }
    assert_eq!(space.counters().faults, 100);
}

#[test]
fn a_fault_where_there_is_no_memory_has_no_slot() {
    let (space, _toy, _s) = world(4);
    let mut walker = space.walker();
    let fault = walker.fault(gpa(0x100_0000, PAGE)).unwrap();
    assert!(fault.slot().is_none() && fault.host().is_none());
    fault.admit(|admission| {
        assert_eq!(admission.slot_flags(), None);
        admission.check(admission.range()).unwrap();
    });
    let fault = walker.fault(gpa(PAGE, PAGE)).unwrap();
    assert_eq!(fault.host(), Some(hva(HOST + PAGE, PAGE)));
}

#[test]
fn an_admission_knows_its_space() {
    let (space, other) = (Space::new(), Space::new());
    space.admit(gpa(0, PAGE), |admission| assert!(admission.is_of(&space) && !admission.is_of(&other))).unwrap();
    assert_eq!(space.walker().space(), space);
    assert_ne!(space, other);
}

#[test]
fn a_retry_says_what_it_lost_to() {
    let (space, _toy, _s) = world(4);
    let _guard = space.zap(hva(HOST, PAGE)).unwrap();
    let mut walker = space.walker();
    let error = walker.fault(gpa(0, PAGE)).unwrap_err();
    assert_eq!(error.to_string(), format!("the fault on {} lost to a window over {}", gpa(0, PAGE), hva(HOST, PAGE)));
}
