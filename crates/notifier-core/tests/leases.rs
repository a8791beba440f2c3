// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Leases: no window goes on beside one, and none is given inside a window.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use common::*;
use notifier_core::*;

fn request(start: u64, len: u64) -> LeaseRequest {
    LeaseRequest::new(gpa(start, len), "dma")
}

#[test]
fn a_window_is_refused_by_a_lease_and_says_by_which() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let lease = space.lease(request(PAGE, PAGE)).unwrap();
    assert_eq!(lease.range(), gpa(PAGE, PAGE));
    match space.zap(hva(HOST, 8 * PAGE)) {
        Err(OpenError::Pinned { holder, name, key }) => {
            assert_eq!(holder, Holder::Lease(lease.id()));
            assert_eq!(name, "dma");
            assert_eq!(key, Key::Host(hva(HOST, 8 * PAGE)));
        }
        other => panic!("{other:?}"),
    }
    assert!(matches!(space.retain(gpa(2 * PAGE - 1, 1)), Err(OpenError::Pinned { .. })));
    assert!(toy.peek(0).is_some(), "nobody was told to zap anything");
    assert_eq!(space.counters().vetoes, 2);
    assert_eq!(space.progress().count, 0);
    assert!(!lease.is_cancelled());
    space.zap(hva(HOST + 2 * PAGE, PAGE)).unwrap().close().unwrap();
    drop(lease);
    space.zap(hva(HOST, 8 * PAGE)).unwrap().close().unwrap();
}

#[test]
fn no_lease_is_given_inside_a_window() {
    let (space, _toy, _s) = world(8);
    let guard = space.retain(hva(HOST + PAGE, PAGE)).unwrap();
    let Err(LeaseError::Retry(retry)) = space.lease(request(0, 2 * PAGE)) else { panic!() };
    assert_eq!(retry.window(), Some(Key::Host(hva(HOST + PAGE, PAGE))));
    // A lease that was not given holds nothing.
    space.zap(hva(HOST, 2 * PAGE)).unwrap().close().unwrap();
    drop(space.lease(request(0, PAGE)).unwrap());
    guard.close().unwrap();
    retry.wait();
    drop(space.lease(request(0, 2 * PAGE)).unwrap());
}

#[test]
fn a_refused_lease_is_never_in_a_windows_way() {
    // A lease that finds a window open was never a lease: no other window may be refused on its account.
    let (space, _toy, _s) = world(8);
    let guard = space.zap(hva(HOST, PAGE)).unwrap();
    let done = Arc::new(AtomicBool::new(false));
    let taker = std::thread::spawn({
        let (space, done) = (space.clone(), Arc::clone(&done));
        move || {
            while !done.load(Ordering::Relaxed) {
                assert!(space.lease(request(0, PAGE)).is_err());
            }
        }
    });
    for _ in 0..5000 {
        space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
    }
    done.store(true, Ordering::Relaxed);
    taker.join().unwrap();
    guard.close().unwrap();
}

#[test]
fn wait_waits_and_asks_nobody() {
    let (space, _toy, _s) = world(8);
    let asked = Arc::new(AtomicUsize::new(0));
    let hook = {
        let asked = Arc::clone(&asked);
        move || {
            asked.fetch_add(1, Ordering::SeqCst);
        }
    };
    let lease = space.lease(request(0, PAGE).on_cancel(hook)).unwrap();
    let blocked = space.window(hva(HOST, PAGE)).leases(LeasePolicy::Wait).nonblocking().open_zapped();
    assert!(matches!(blocked, Err(OpenError::WouldBlock { .. })));
    let gone = Arc::new(AtomicBool::new(false));
    let opener = std::thread::spawn({
        let (space, gone) = (space.clone(), Arc::clone(&gone));
        move || {
            let guard = space.window(hva(HOST, PAGE)).leases(LeasePolicy::Wait).open_zapped().unwrap();
            assert!(gone.load(Ordering::SeqCst));
            guard.close().unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    assert!(!lease.is_cancelled());
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    gone.store(true, Ordering::SeqCst);
    drop(lease);
    opener.join().unwrap();
}

#[test]
fn cancel_asks_each_holder_once_and_waits() {
    let (space, _toy, _s) = world(8);
    let asked = Arc::new(AtomicUsize::new(0));
    let held: Arc<Mutex<Vec<Lease>>> = Arc::default();
    for page in 0..3 {
        let (asked, held_by) = (Arc::clone(&asked), Arc::clone(&held));
        let hook = move || {
            // The first one that is asked gives all back, itself included, from inside its hook.
            asked.fetch_add(1, Ordering::SeqCst);
            let all: Vec<_> = std::mem::take(&mut *lock(&held_by));
            drop(all);
        };
        let lease = space.lease(request(page * PAGE, PAGE).on_cancel(hook)).unwrap();
        lock(&held).push(lease);
    }
    let guard = space.window(hva(HOST, 8 * PAGE)).leases(LeasePolicy::Cancel).open_retained().unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 3);
    guard.close().unwrap();
    assert_eq!(space.counters().vetoes, 0);
}

#[test]
fn cancel_for_is_refused_when_its_time_is_over() {
    let (space, _toy, _s) = world(8);
    let lease = space.lease(request(0, PAGE)).unwrap();
    let policy = LeasePolicy::CancelFor(Duration::from_millis(10));
    assert!(matches!(space.window(hva(HOST, PAGE)).leases(policy).open_zapped(), Err(OpenError::Pinned { .. })));
    assert!(lease.is_cancelled());
    assert_eq!(space.progress().count, 0);
    assert_eq!(space.counters().vetoes, 1);
    // The longest of times is no overflow.
    let opener = std::thread::spawn({
        let space = space.clone();
        move || {
            let policy = LeasePolicy::CancelFor(Duration::MAX);
            space.window(hva(HOST, PAGE)).leases(policy).open_zapped().unwrap().close().unwrap();
        }
    });
    std::thread::sleep(Duration::from_millis(10));
    drop(lease);
    opener.join().unwrap();
}

#[test]
fn nonblocking_cancel_asks_and_returns() {
    let (space, _toy, _s) = world(8);
    let lease = space.lease(request(0, PAGE)).unwrap();
    let refused = space.window(hva(HOST, PAGE)).leases(LeasePolicy::Cancel).nonblocking().open_zapped();
    assert!(matches!(refused, Err(OpenError::WouldBlock { .. })));
    assert!(lease.is_cancelled());
    drop(lease);
    space.window(hva(HOST, PAGE)).nonblocking().open_zapped().unwrap().close().unwrap();
}

#[test]
fn a_leaked_lease_keeps_only_its_bytes() {
    let (space, toy, _s) = world(8);
    std::mem::forget(space.lease(request(0, PAGE)).unwrap());
    assert!(matches!(space.zap(hva(HOST, PAGE)), Err(OpenError::Pinned { .. })));
    space.zap(hva(HOST + PAGE, PAGE)).unwrap().close().unwrap();
    fault_in(&space, &toy, 0..8);
}

#[test]
fn a_panicking_hook_leaves_no_window_behind() {
    let (space, _toy, _s) = world(8);
    let lease = space.lease(request(0, PAGE).on_cancel(|| panic!("hook"))).unwrap();
    let open = std::panic::AssertUnwindSafe(|| {
        space.window(hva(HOST, PAGE)).leases(LeasePolicy::Cancel).open_zapped().map(drop)
    });
    assert!(std::panic::catch_unwind(open).is_err());
    assert_eq!(space.progress().count, 0);
    drop(lease);
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
}

#[test]
fn a_lease_taken_in_a_scope_keeps_what_was_found_in_it() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let mut walker = space.walker();
    let scope = walker.enter();
    let found = toy.read(&scope, PAGE).unwrap();
    let lease = scope.lease(request(PAGE, PAGE)).unwrap();
    drop(scope);
    assert!(space.zap(hva(HOST + PAGE, PAGE)).is_err());
    assert_eq!(toy.peek(PAGE).map(|seen| seen.output), Some(found));
    drop(lease);
    assert!(matches!(space.lease(request(7 * PAGE, 2 * PAGE)), Err(LeaseError::CrossesSlot { .. })));
}

#[test]
fn a_leased_slot_stays() {
    let (space, _toy, _s) = world(8);
    let lease = space.lease(request(0, PAGE)).unwrap();
    let slot = space.slots()[0].0;
    assert!(matches!(space.remove_slot(slot), Err(SlotError::Window(OpenError::Pinned { .. }))));
    assert_eq!(space.slots().len(), 1);
    drop(lease);
    space.remove_slot(slot).unwrap();
}
