// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guards that borrow nothing, for async VMMs.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::sync::atomic::Ordering;

use common::*;
use notifier_core::*;

fn is_send<T: Send + 'static>() {}

#[test]
fn an_owned_guard_goes_to_other_threads_and_closes_there() {
    is_send::<OwnedInvalidationGuard<Zapped>>();
    is_send::<OwnedInvalidationGuard<Retained, Gpa>>();
    is_send::<Subscription>();
    is_send::<Lease>();
    is_send::<Walker>();
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let guard = space.window(hva(HOST, PAGE)).open_retained_owned().unwrap();
    let other = space.clone();
    std::thread::spawn(move || {
        assert!(guard.is_of(&other));
        drop(other);
        let change = Change { page: Hva::new(HOST), expected: home(0), new: out(0x9000_0000) };
        assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Changed);
        guard.close().unwrap();
    })
    .join()
    .unwrap();
    assert_eq!(space.progress().count, 0);
    assert_eq!(toy.peek(0).map(|seen| seen.output), Some(out(0x9000_0000)));
}

#[test]
fn dropping_an_owned_guard_does_not_block_and_the_reaper_closes_it() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let guard = space.window(hva(HOST, PAGE)).open_retained_owned().unwrap();
    // Closing flushes, and the flush waits for this scope: a drop that closed would never return.
    let mut walker = space.walker();
    let scope = walker.enter();
    drop(guard);
    assert_eq!(space.progress().count, 1, "in progress until it is reaped");
    assert!(toy.read(&scope, PAGE).is_some());
    drop(scope);
    eventually(|| space.progress().count == 0);
    assert_eq!(toy.peek(0), None, "no outcome");
    assert_eq!(space.counters().unfinished, 0, "nothing went wrong");
}

#[test]
fn the_reaper_goes_on_until_it_succeeds() {
    let (space, toy, _s) = world(4);
    let guard = space.window(gpa(0, PAGE)).open_zapped_owned().unwrap();
    toy.fail_end.store(true, Ordering::SeqCst);
    drop(guard);
    std::thread::sleep(std::time::Duration::from_millis(20));
    assert_eq!(space.progress().count, 1);
    toy.fail_end.store(false, Ordering::SeqCst);
    eventually(|| space.progress().count == 0);
}

#[test]
fn a_space_goes_away_with_its_reaper() {
    struct Drops(std::sync::Arc<()>);
    impl DirtySink for Drops {
        fn dirty(&self, _: GpaRange) {
            let _ = &self.0;
        }
    }
    let alive = std::sync::Arc::new(());
    let space = Space::builder().dirty_sink(Drops(alive.clone())).build();
    drop(space.window(hva(0, PAGE)).open_zapped_owned().unwrap());
    eventually(|| space.progress().count == 0);
    drop(space);
    eventually(|| std::sync::Arc::strong_count(&alive) == 1);
}

#[test]
fn a_future_that_holds_an_owned_guard_is_send() {
    fn send<F: Future<Output = ()> + Send>(future: F) -> F {
        future
    }
    let (space, _toy, _s) = world(4);
    let mut future = Box::pin(send({
        let space = space.clone();
        async move {
            let guard = space.window(hva(HOST, PAGE)).open_retained_owned().unwrap();
            std::future::ready(()).await;
            guard.close().unwrap();
        }
    }));
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    assert!(future.as_mut().poll(&mut context).is_ready());
    assert_eq!(space.progress().count, 0);
}
