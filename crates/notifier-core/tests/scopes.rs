// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Scopes: a flush waits for those entered before it, and for no others.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
        mpsc::channel,
    },
    time::Duration,
};

use common::*;
use notifier_core::*;

#[test]
fn a_flush_waits_for_scopes_that_were_entered_before_it() {
    let space = Space::new();
    let (entered, wait_entered) = channel();
    let (leave, wait_leave) = channel::<()>();
    let left = Arc::new(AtomicBool::new(false));
    let walker = std::thread::spawn({
        let (space, left) = (space.clone(), Arc::clone(&left));
        move || {
            let mut walker = space.walker();
            let scope = walker.enter();
            entered.send(()).unwrap();
            wait_leave.recv().unwrap();
            left.store(true, Ordering::Relaxed);
            drop(scope);
        }
    });
    wait_entered.recv().unwrap();
    assert_eq!(space.wait_for_scopes(true), Err(ScopeWaitError::WouldBlock));
    let flush = std::thread::spawn({
        let (space, left) = (space.clone(), Arc::clone(&left));
        move || {
            space.wait_for_scopes(false).unwrap();
            assert!(left.load(Ordering::Relaxed), "the flush did not wait");
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    leave.send(()).unwrap();
    flush.join().unwrap();
    walker.join().unwrap();
    space.wait_for_scopes(true).unwrap();
}

#[test]
fn a_flush_does_not_wait_for_scopes_entered_after_it() {
    // A walker that goes in and out for ever must not keep a flush.
    let space = Space::new();
    let (done, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let walker = std::thread::spawn({
        let (space, done, rounds) = (space.clone(), Arc::clone(&done), Arc::clone(&rounds));
        move || {
            let mut walker = space.walker();
            while !done.load(Ordering::Relaxed) {
                drop(walker.enter());
                rounds.fetch_add(1, Ordering::Relaxed);
            }
        }
    });
    eventually(|| rounds.load(Ordering::Relaxed) > 0);
    for _ in 0..1000 {
        space.wait_for_scopes(false).unwrap();
    }
    done.store(true, Ordering::Relaxed);
    walker.join().unwrap();
}

#[test]
fn a_fault_consumes_its_scope() {
    let (space, toy, _s) = world(4);
    let mut walker = space.walker();
    let scope = walker.enter();
    assert_eq!(toy.read(&scope, 0), None);
    let fault = scope.fault(gpa(0, PAGE)).unwrap();
    // The scope is over: a flush on this very thread does not wait for it.
    space.wait_for_scopes(true).unwrap();
    drop(fault);
    // So is it where the fault does not begin.
    let _guard = space.zap(hva(HOST, PAGE)).unwrap();
    assert!(walker.enter().fault(gpa(0, PAGE)).is_err());
    space.wait_for_scopes(true).unwrap();
}

#[test]
fn a_leaked_scope_ends_with_the_walkers_next_step() {
    let space = Space::new();
    let mut walker = space.walker();
    std::mem::forget(walker.enter());
    assert_eq!(space.wait_for_scopes(true), Err(ScopeWaitError::InScope));
    drop(walker.enter());
    space.wait_for_scopes(true).unwrap();
    // A fault is a next step too.
    std::mem::forget(walker.enter());
    drop(walker.fault(gpa(0, PAGE)).unwrap());
    space.wait_for_scopes(true).unwrap();
    // And so is the walker's end.
    std::mem::forget(walker.enter());
    drop(walker);
    space.wait_for_scopes(true).unwrap();
}

#[test]
fn a_walker_serves_whichever_thread_has_it() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let mut walker = space.walker();
    drop(walker.enter());
    let (entered, wait_entered) = channel();
    let (leave, wait_leave) = channel::<()>();
    let other = std::thread::spawn(move || {
        let scope = walker.enter();
        entered.send(()).unwrap();
        wait_leave.recv().unwrap();
        drop(scope);
    });
    wait_entered.recv().unwrap();
    // It is not this thread's scope any more.
    assert!(matches!(space.window(hva(HOST, PAGE)).nonblocking().open_zapped(), Err(OpenError::WouldBlock { .. })));
    leave.send(()).unwrap();
    other.join().unwrap();
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
}

#[test]
fn slots_are_not_changed_inside_ones_own_scope() {
    // Another thread may hold what slot changes are serialised by, and wait for this very scope.
    let (space, toy, subscription) = world(4);
    fault_in(&space, &toy, 0..4);
    returns(move || {
        let mut walker = space.walker();
        let scope = walker.enter();
        let slot = space.slots()[0].0;
        let other = std::thread::spawn({
            let space = space.clone();
            move || space.remove_slot(slot).unwrap()
        });
        eventually(|| toy.peek(0).is_none());
        assert!(matches!(space.add_slot(spec(0x100_0000, PAGE, 0)), Err(SlotError::InScope)));
        assert!(matches!(space.replace_slots(&[], &[]), Err(SlotError::InScope)));
        drop(scope);
        other.join().unwrap();
        drop(subscription);
    });
}

#[test]
fn a_subscriber_does_not_leave_inside_the_callers_own_scope() {
    // What it still runs may be waiting for this scope.
    let (space, toy, subscription) = world(4);
    fault_in(&space, &toy, 0..4);
    returns(move || {
        let mut walker = space.walker();
        let scope = walker.enter();
        let opener = std::thread::spawn({
            let space = space.clone();
            move || space.zap(hva(HOST, PAGE)).unwrap().close().unwrap()
        });
        eventually(|| toy.peek(0).is_none());
        let Err(LeaveError::InScope(subscription)) = subscription.leave() else { panic!() };
        // Dropping does not wait either: the last callback out releases.
        drop(subscription);
        drop(scope);
        opener.join().unwrap();
        eventually(|| toy.released.load(Ordering::SeqCst));
    });
}
