// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Joining, leaving, and what callbacks may not do.
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

#[test]
fn joining_replays_the_windows_that_are_open_and_waits_for_none() {
    let (space, _toy, _s) = world(8);
    let log = Log::default();
    let zapped = space.zap(hva(HOST, PAGE)).unwrap();
    let retained = space.retain(hva(HOST + PAGE, PAGE)).unwrap();
    let seen: Arc<Mutex<Vec<(u64, Mode)>>> = Arc::default();
    let probe = Probe::new("p", &log).on_start({
        let seen = Arc::clone(&seen);
        move |window| {
            lock(&seen).push((window.window(), window.mode()));
            Ok(())
        }
    });
    let _p = space.subscribe(probe).unwrap();
    assert_eq!(log.take(), "p.start p.start p.populate");
    assert_eq!(*lock(&seen), [(zapped.window(), Mode::Zapped), (retained.window(), Mode::Retained)]);
    zapped.close().unwrap();
    assert_eq!(log.take(), "p.end");
    // It takes part in what is left of the window.
    retained.close().unwrap();
    assert_eq!(log.take(), "p.zap p.end");
}

#[test]
fn joining_replays_only_what_it_is_interested_in() {
    let (space, _toy, _s) = world(8);
    space.add_slot(spec(0x100_0000, 4 * PAGE, 0x200_0000)).unwrap();
    let log = Log::default();
    let _here = space.zap(gpa(0, PAGE)).unwrap();
    let _p = space.subscribe_to(Interest::Guest(gpa(0x100_0000, PAGE)), Probe::new("guest", &log)).unwrap();
    let _q = space.subscribe_to(Interest::Host(hva(HOST, PAGE)), Probe::new("host", &log)).unwrap();
    assert_eq!(log.take(), "guest.populate host.start host.populate");
    space.zap(gpa(0x100_0000, 1)).unwrap().close().unwrap();
    assert_eq!(log.take(), "guest.start guest.end");
    // By either address it is the same page.
    space.zap(hva(0x200_0000, 1)).unwrap().close().unwrap();
    assert_eq!(log.take(), "guest.start guest.end");
    space.zap(hva(0x200_0000 + PAGE, 1)).unwrap().close().unwrap();
    assert_eq!(log.take(), "");
}

#[test]
fn joining_does_not_replay_holes() {
    let (space, _toy, _s) = world(8);
    let guard = space.zap(gpa(2 * PAGE, PAGE)).unwrap();
    guard.discard();
    guard.close().unwrap();
    let toy = Toy::new(&space, 8);
    let _t = space.subscribe(Arc::clone(&toy)).unwrap();
    let guests: Vec<_> = toy.populated().iter().filter_map(|stretch| stretch.guest).collect();
    assert_eq!(guests, [gpa(0, 2 * PAGE), gpa(3 * PAGE, 5 * PAGE)]);
    assert_eq!(toy.populated()[1].host, Some(hva(HOST + 3 * PAGE, 5 * PAGE)));
}

#[test]
fn a_subscriber_that_cannot_be_replayed_does_not_join() {
    let (space, _toy, _s) = world(8);
    let log = Log::default();
    let first = space.zap(hva(HOST, PAGE)).unwrap();
    let second = space.zap(hva(HOST + PAGE, PAGE)).unwrap();
    let id = second.window();
    let probe = Probe::new("p", &log).on_start(move |w| if w.window() == id { Err(refused()) } else { Ok(()) });
    assert!(matches!(space.subscribe(probe), Err(JoinError::Replay { .. })));
    assert_eq!(log.take(), "p.start p.start p.release");
    first.close().unwrap();
    second.close().unwrap();
    assert_eq!(log.take(), "", "who is gone gets no end");
    let toy = Toy::new(&space, 8);
    toy.refuse_populate.store(true, Ordering::SeqCst);
    assert!(matches!(space.subscribe(Arc::clone(&toy)), Err(JoinError::Populate { .. })));
    assert!(toy.released.load(Ordering::SeqCst));
}

#[test]
fn leaving_waits_for_callbacks_that_run() {
    let space = Space::new();
    let log = Log::default();
    let (inside, go) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let probe = Probe::new("p", &log).on_start({
        let (inside, go, log) = (Arc::clone(&inside), Arc::clone(&go), log.clone());
        move |_| {
            inside.store(true, Ordering::SeqCst);
            eventually(|| go.load(Ordering::SeqCst));
            log.push("p", "started");
            Ok(())
        }
    });
    let subscription = space.subscribe(probe).unwrap();
    let opener = std::thread::spawn({
        let space = space.clone();
        move || space.zap(hva(0, PAGE)).unwrap().close().unwrap()
    });
    eventually(|| inside.load(Ordering::SeqCst));
    let leaver = std::thread::spawn({
        let log = log.clone();
        move || {
            subscription.leave().map_err(|_| ()).unwrap();
            log.push("p", "left");
        }
    });
    std::thread::sleep(Duration::from_millis(20));
    go.store(true, Ordering::SeqCst);
    leaver.join().unwrap();
    opener.join().unwrap();
    assert_eq!(log.take(), "p.start p.started p.release p.left");
}

#[test]
fn who_left_hears_nothing_more() {
    let space = Space::new();
    let log = Log::default();
    let subscription = space.subscribe(Probe::new("p", &log)).unwrap();
    let guard = space.retain(hva(0, PAGE)).unwrap();
    drop(subscription);
    assert_eq!(log.take(), "p.start p.release");
    guard.close().unwrap();
    space.zap(hva(0, PAGE)).unwrap().close().unwrap();
    assert_eq!(log.take(), "");
    assert_eq!(space.progress().count, 0);
}

#[test]
fn a_subscription_may_be_dropped_in_its_own_callback() {
    let space = Space::new();
    let log = Log::default();
    let own: Arc<Mutex<Option<Subscription>>> = Arc::default();
    let probe = Probe::new("p", &log).on_start({
        let (own, log) = (Arc::clone(&own), log.clone());
        move |_| {
            drop(lock(&own).take());
            log.push("p", "dropped");
            Ok(())
        }
    });
    let subscription = space.subscribe(probe).unwrap();
    *lock(&own) = Some(subscription);
    returns({
        let space = space.clone();
        move || space.zap(hva(0, PAGE)).unwrap().close().unwrap()
    });
    assert_eq!(log.take(), "p.start p.dropped p.release");
    space.zap(hva(0, PAGE)).unwrap().close().unwrap();
    assert_eq!(log.take(), "");
}

#[test]
fn callbacks_do_not_join_leave_or_change_slots() {
    let space = Space::new();
    let log = Log::default();
    let errors: Arc<Mutex<Vec<String>>> = Arc::default();
    let own: Arc<Mutex<Option<Subscription>>> = Arc::default();
    let probe = Probe::new("p", &log).on_start({
        let (space, errors, own, log) = (space.clone(), Arc::clone(&errors), Arc::clone(&own), log.clone());
        move |_| {
            let mut errors = lock(&errors);
            errors.push(format!("{:?}", space.subscribe(Probe::new("q", &log)).unwrap_err()));
            let subscription = lock(&own).take().unwrap();
            match subscription.leave() {
                Err(LeaveError::InCallback(again)) => {
                    errors.push("InCallback".into());
                    *lock(&own) = Some(again);
                }
                other => errors.push(format!("{other:?}")),
            }
            errors.push(format!("{:?}", space.add_slot(spec(0, PAGE, 0)).unwrap_err()));
            errors.push(format!("{:?}", space.populate(gpa(0, PAGE)).unwrap_err()));
            Ok(())
        }
    });
    let subscription = space.subscribe(probe).unwrap();
    *lock(&own) = Some(subscription);
    space.zap(hva(0, PAGE)).unwrap().close().unwrap();
    let errors = lock(&errors).clone();
    assert_eq!(errors.len(), 4);
    assert!(errors.iter().all(|error| error.contains("InCallback")), "{errors:?}");
    assert!(lock(&own).is_some());
    assert_eq!(log.take(), "p.start p.end");
    drop(lock(&own).take());
}

#[test]
fn joined_comes_first_and_only_once_windows_know_the_subscriber() {
    // From `joined` on a subscriber takes translations: a window that opens then must find it.
    struct Eager(Arc<AtomicUsize>, Space);
    impl Subscriber for Eager {
        fn joined(&self, _: Membership) -> Result<(), SubscriberError> {
            let space = self.1.clone();
            let (starts, opened) = (Arc::clone(&self.0), Arc::new(AtomicBool::new(false)));
            let opened_by = Arc::clone(&opened);
            std::thread::spawn(move || {
                let guard = space.zap(hva(0, PAGE)).unwrap();
                opened_by.store(true, Ordering::SeqCst);
                assert_eq!(starts.load(Ordering::SeqCst), 1, "a window opened past a subscriber that had joined");
                guard.close().unwrap();
                starts.fetch_add(10, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(50));
            assert!(!opened.load(Ordering::SeqCst));
            assert_eq!(self.0.load(Ordering::SeqCst), 0, "a start came before `joined` was through");
            Ok(())
        }
        fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
        fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
    }
    let space = Space::new();
    let starts = Arc::new(AtomicUsize::new(0));
    let subscription = space.subscribe(Eager(Arc::clone(&starts), space.clone())).unwrap();
    eventually(|| starts.load(Ordering::SeqCst) == 11);
    drop(subscription);
}

#[test]
fn a_subscriber_whose_joined_panics_does_not_join() {
    struct Rude;
    impl Subscriber for Rude {
        fn joined(&self, _: Membership) -> Result<(), SubscriberError> {
            panic!("no")
        }
        fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            panic!("never started")
        }
        fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
    }
    let space = Space::new();
    let joined = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| space.subscribe(Rude).map(drop)));
    assert!(!matches!(joined, Ok(Ok(()))));
    returns(move || space.zap(hva(0, PAGE)).unwrap().close().unwrap());
}

#[test]
fn i10_every_start_has_one_end_however_joins_and_windows_meet() {
    let (space, _toy, _s) = world(8);
    let done = Arc::new(AtomicBool::new(false));
    let windows: Vec<_> = (0..2)
        .map(|n| {
            let (space, done) = (space.clone(), Arc::clone(&done));
            std::thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    let range = hva(HOST + n * PAGE, PAGE);
                    drop(space.zap(range).unwrap());
                    drop(space.retain(range).unwrap());
                }
            })
        })
        .collect();
    let mut tables = Vec::new();
    for _ in 0..500 {
        let table = Toy::new(&space, 8);
        tables.push((space.subscribe(Arc::clone(&table)).unwrap(), table));
        if tables.len() > 4 {
            drop(tables.remove(0));
        }
    }
    done.store(true, Ordering::Relaxed);
    for thread in windows {
        thread.join().unwrap();
    }
    assert_eq!(space.progress().count, 0);
    for (_, table) in tables {
        assert_eq!(table.starts.load(Ordering::SeqCst), table.ends.load(Ordering::SeqCst));
    }
}

#[test]
fn who_joins_a_window_that_is_closing_gets_its_end_even_if_the_first_fails() {
    let space = Space::new();
    let log = Log::default();
    let (late, fail) = (Arc::new(Mutex::new(None)), Arc::new(AtomicBool::new(true)));
    let first = Probe::new("first", &log).on_end({
        let (space, log, late, fail) = (space.clone(), log.clone(), Arc::clone(&late), Arc::clone(&fail));
        move |_| {
            if lock(&late).is_some() {
                return Ok(());
            }
            let (space, log, fail) = (space.clone(), log.clone(), Arc::clone(&fail));
            // Its window is still in progress, and the ends are being given.
            let join = move || {
                let probe = Probe::new("late", &log)
                    .on_end(move |_| if fail.load(Ordering::SeqCst) { Err(refused()) } else { Ok(()) });
                space.subscribe(probe).unwrap()
            };
            *lock(&late) = Some(std::thread::spawn(join).join().unwrap());
            Ok(())
        }
    });
    let subscription = space.subscribe(first).unwrap();
    space.zap(hva(0, PAGE)).unwrap().close().unwrap();
    assert_eq!(space.progress(), Progress { count: 0, sequence: 1 });
    assert!(log.take().starts_with("first.start first.end late.start late.end"));
    fail.store(false, Ordering::SeqCst);
    eventually(|| space.reap() == 0 && log.take().ends_with("late.end"));
    assert_eq!(space.progress(), Progress { count: 0, sequence: 1 }, "counted once");
    drop((lock(&late).take(), subscription));
}

#[test]
fn ages_are_asked_of_everybody_and_made_old_by_age_only() {
    let (space, toy, _s) = world(8);
    let other = Toy::new(&space, 8);
    let _o = space.subscribe(Arc::clone(&other)).unwrap();
    fault_in(&space, &toy, 0..2);
    fault_in(&space, &other, 0..2);
    assert!(!space.test_age(hva(HOST, PAGE)).unwrap());
    other.touch(0);
    assert!(space.test_age(hva(HOST, 1)).unwrap() && space.test_age(gpa(0, PAGE)).unwrap());
    assert!(!space.test_age(hva(HOST + PAGE, PAGE)).unwrap());
    assert!(space.age(gpa(0, PAGE)).unwrap());
    assert!(!space.age(gpa(0, PAGE)).unwrap());
    assert!(toy.peek(0).is_some() && other.peek(0).is_some());
    struct Broken;
    impl Subscriber for Broken {
        fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
        fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
        fn age(&self, _: &[Stretch]) -> Result<bool, SubscriberError> {
            Err(refused())
        }
    }
    let broken = space.subscribe(Broken).unwrap();
    let last = Toy::new(&space, 8);
    let _l = space.subscribe(Arc::clone(&last)).unwrap();
    fault_in(&space, &last, 0..1);
    last.touch(0);
    assert!(space.age(gpa(0, PAGE)).is_err());
    drop(broken);
    assert!(!space.test_age(gpa(0, PAGE)).unwrap(), "the others were asked all the same");
}

#[test]
fn i12_dirty_facts_reach_the_sink_before_the_window_is_open() {
    let dirty: Arc<Mutex<Vec<GpaRange>>> = Arc::default();
    let sink = {
        let dirty = Arc::clone(&dirty);
        move |range: GpaRange| lock(&dirty).push(range)
    };
    let space = Space::builder().dirty_sink(sink).build();
    space.add_slot(spec(0, 8 * PAGE, HOST)).unwrap();
    let toy = Toy::new(&space, 8);
    let _s = space.subscribe(Arc::clone(&toy)).unwrap();
    fault_in(&space, &toy, 0..2);
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    assert_eq!(*lock(&dirty), [gpa(0, PAGE)]);
    guard.close().unwrap();
    assert_eq!(lock(&dirty).len(), 1, "a fact that was reported is not dirty again");
    drop(space.zap(hva(HOST + PAGE, PAGE)).unwrap());
    assert_eq!(*lock(&dirty), [gpa(0, PAGE), gpa(PAGE, PAGE)]);
}

/// A subscriber whose release always fails.
struct Stays(Arc<AtomicUsize>);

impl Subscriber for Stays {
    fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        Ok(())
    }
    fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        Ok(())
    }
    fn release(&self) -> Result<(), SubscriberError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        Err(SubscriberError::Other("busy".into()))
    }
}

#[test]
fn a_release_that_fails_is_counted_once_however_often_it_was_tried() {
    let space = Space::new();
    let tried = Arc::new(AtomicUsize::new(0));
    let subscription = space.subscribe(Stays(Arc::clone(&tried))).unwrap();
    subscription.leave().unwrap_err();
    for round in 0..5 {
        assert!(space.zap(AddrRange::with_len(Hva::new(0x1000), 0x1000).unwrap()).is_err());
        assert_eq!(space.reap(), 1, "round {round}");
    }
}

/// The reaper finds the window unfinished because of the subscriber that it is to release: it must not wake itself.
#[test]
fn a_window_that_waits_for_a_failing_release_does_not_keep_the_reaper_busy() {
    let space = Space::new();
    let tried = Arc::new(AtomicUsize::new(0));
    let subscription = space.subscribe(Stays(Arc::clone(&tried))).unwrap();
    let guard = space.retain(AddrRange::with_len(Hva::new(0x1000), 0x1000).unwrap()).unwrap();
    subscription.leave().unwrap_err();
    guard.close().unwrap_err();
    std::thread::sleep(std::time::Duration::from_millis(300));
    // Two tries a round, and rounds at growing distances: about twenty. A reaper that wakes itself makes hundreds of
    // thousands.
    let tries = tried.load(Ordering::SeqCst);
    assert!(tries < 1000, "{tries}");
    assert_eq!(space.reap(), 2, "the window and the subscriber");
}
