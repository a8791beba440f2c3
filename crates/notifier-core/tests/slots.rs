// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Slots: aliases, changes while windows are open, holes, and what faults see of all that.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, atomic::Ordering},
};

use common::*;
use notifier_core::*;

/// Two slots over one host range, and a table over both.
fn aliased() -> (Space, Arc<Toy>, Subscription) {
    let (space, toy, subscription) = world(4);
    space.add_slot(spec(16 * PAGE, 4 * PAGE, HOST)).unwrap();
    fault_in(&space, &toy, [0, 1, 16, 17]);
    (space, toy, subscription)
}

#[test]
fn a_host_page_is_zapped_in_every_slot_that_maps_it() {
    let (space, toy, _s) = aliased();
    let guard = space.zap(hva(HOST, PAGE)).unwrap();
    assert!(toy.peek(0).is_none() && toy.peek(16 * PAGE).is_none());
    assert!(toy.peek(PAGE).is_some() && toy.peek(17 * PAGE).is_some());
    let mut walker = space.walker();
    assert!(is_retry(&try_fault(&mut walker, &toy, 0, home(0))));
    assert!(is_retry(&try_fault(&mut walker, &toy, 16 * PAGE, home(0))));
    guard.close().unwrap();
}

#[test]
fn a_guest_keyed_window_leaves_the_other_alias_alone() {
    let (space, toy, _s) = aliased();
    let guard = space.zap(gpa(16 * PAGE, PAGE)).unwrap();
    assert!(toy.peek(0).is_some() && toy.peek(16 * PAGE).is_none());
    let mut walker = space.walker();
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
    assert!(is_retry(&try_fault(&mut walker, &toy, 16 * PAGE, home(0))));
    guard.close().unwrap();
}

#[test]
fn memory_without_a_host_address_has_windows_too() {
    let space = Space::new();
    space.add_slot(SlotSpec { guest: gpa(0, 4 * PAGE), host: None, flags: SlotFlags::empty() }).unwrap();
    let toy = Toy::new(&space, 4);
    let _s = space.subscribe(Arc::clone(&toy)).unwrap();
    fault_in(&space, &toy, 0..4);
    let guard = space.zap(gpa(PAGE, PAGE)).unwrap();
    assert!(toy.peek(PAGE).is_none() && toy.peek(0).is_some());
    guard.close().unwrap();
}

#[test]
fn a_removed_slot_is_zapped_and_serves_no_fault() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let mut walker = space.walker();
    let resolved = walker
        .fault(gpa(0, PAGE))
        .unwrap()
        .resolve(|fault| Ok::<_, Infallible>(Extent { guest: fault.range(), output: home(0), access: Access::RW }))
        .unwrap();
    let slot = space.slots()[0].0;
    space.remove_slot(slot).unwrap();
    assert!((0..4).all(|page| toy.peek(page * PAGE).is_none()));
    assert!(resolved.install(|admission| toy.install(admission)).is_err(), "a fault of the old slot was installed");
    let fault = walker.fault(gpa(0, PAGE)).unwrap();
    assert!(fault.slot().is_none());
    drop(fault);
    assert!(matches!(space.remove_slot(slot), Err(SlotError::NoSlot { .. })));
    assert_eq!(space.counters().unrelated_retries, 0);
    assert_eq!(space.progress().count, 0);
}

#[test]
fn a_slot_that_is_being_removed_stays_in_what_windows_walk_until_it_is_zapped() {
    // While the removal's own zap runs, a window by host address still reaches the slot's guest range.
    let space = Space::new();
    let slot = space.add_slot(spec(0, 4 * PAGE, HOST)).unwrap();
    let log = Log::default();
    let reached: Arc<Mutex<Vec<GpaRange>>> = Arc::default();
    let probe = Probe::new("p", &log).on_start({
        let (space, reached) = (space.clone(), Arc::clone(&reached));
        move |window| {
            if window.stretches().iter().any(|stretch| stretch.guest == Some(gpa(0, 4 * PAGE))) {
                let (space, reached) = (space.clone(), Arc::clone(&reached));
                std::thread::spawn(move || {
                    let other = Probe::new("q", &Log::default()).on_start(move |window| {
                        lock(&reached).extend(window.guest());
                        Ok(())
                    });
                    let joined = space.subscribe(other).unwrap();
                    space.window(hva(HOST + PAGE, 1)).nonblocking().open_zapped().unwrap().close().unwrap();
                    drop(joined);
                })
                .join()
                .unwrap();
            }
            Ok(())
        }
    });
    let _p = space.subscribe(probe).unwrap();
    returns({
        let space = space.clone();
        move || space.remove_slot(slot).unwrap()
    });
    assert!(lock(&reached).contains(&gpa(PAGE, 1)), "{reached:?}");
}

#[test]
fn slots_are_replaced_while_windows_are_open() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let old = space.slots()[0].0;
    let zapped = space.zap(hva(HOST, PAGE)).unwrap();
    let retained = space.retain(hva(HOST + PAGE, PAGE)).unwrap();
    let new_host = 0x200_0000;
    let ids = space.replace_slots(&[old], &[spec(0, 4 * PAGE, new_host), spec(8 * PAGE, PAGE, HOST)]).unwrap();
    assert_eq!(ids.len(), 2);
    assert!((0..4).all(|page| toy.peek(page * PAGE).is_none()));
    let mut walker = space.walker();
    // Guest 0 lies elsewhere now, and the window over its old host bytes says nothing of it any more.
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
    // The window follows its host bytes to where they appear now.
    assert!(is_retry(&try_fault(&mut walker, &toy, 8 * PAGE, home(0))));
    retained.close().unwrap();
    zapped.close().unwrap();
    assert_eq!(space.progress().count, 0);
    try_fault(&mut walker, &toy, 8 * PAGE, home(0)).unwrap();
}

#[test]
fn a_retry_does_not_wait_for_a_window_over_what_the_slot_was() {
    let (space, toy, _s) = world(4);
    std::mem::forget(space.zap(hva(HOST, PAGE)).unwrap());
    let mut walker = space.walker();
    let Err(FaultError::Retry(retry)) = walker.fault(gpa(0, PAGE)) else { panic!() };
    space.replace_slots(&[space.slots()[0].0], &[spec(0, 4 * PAGE, 0x200_0000)]).unwrap();
    returns(move || retry.wait());
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
}

#[test]
fn what_a_slot_held_is_not_repointed_after_the_slot_was_replaced() {
    // The window was opened when guest 0 was its page; it is another's now, which may share the old output page.
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let retained = space.retain(hva(HOST, PAGE)).unwrap();
    space.replace_slots(&[space.slots()[0].0], &[spec(0, 4 * PAGE, 0x200_0000)]).unwrap();
    let mut walker = space.walker();
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
    let change = Change { page: Hva::new(HOST), expected: home(0), new: out(0x9000_0000) };
    assert_eq!(retained.change_pte(&[change]).unwrap()[0].outcome, Outcome::Absent);
    assert_eq!(toy.peek(0).map(|seen| seen.output), Some(home(0)));
    retained.close().unwrap();
}

#[test]
fn a_fault_in_a_hole_of_the_map_is_lost_when_a_slot_appears() {
    let (space, toy, _s) = world(4);
    let mut walker = space.walker();
    let resolved = walker
        .fault(gpa(8 * PAGE, PAGE))
        .unwrap()
        .resolve(|fault| Ok::<_, Infallible>(Extent { guest: fault.range(), output: out(0), access: Access::READ }))
        .unwrap();
    space.add_slot(spec(8 * PAGE, PAGE, 0x200_0000)).unwrap();
    let retry = resolved.install(|admission| toy.install(admission)).unwrap_err();
    assert_eq!(retry.window(), Some(Key::Guest(gpa(8 * PAGE, PAGE))));
    assert_eq!(toy.peek(8 * PAGE), None);
    // What was installed for want of memory goes too.
    let mut other = space.walker();
    try_fault(&mut other, &toy, 9 * PAGE, out(0)).unwrap();
    space.add_slot(spec(9 * PAGE, PAGE, 0x300_0000)).unwrap();
    assert_eq!(toy.peek(9 * PAGE), None);
}

#[test]
fn a_fault_does_not_cross_slots() {
    let (space, _toy, _s) = world(4);
    space.add_slot(spec(4 * PAGE, 4 * PAGE, 0x200_0000)).unwrap();
    let mut walker = space.walker();
    for range in [gpa(3 * PAGE, 2 * PAGE), gpa(7 * PAGE, 2 * PAGE), gpa(0, 8 * PAGE)] {
        assert!(matches!(walker.fault(range), Err(FaultError::CrossesSlot { .. })), "{range}");
    }
    space.add_slot(spec(16 * PAGE, PAGE, 0x300_0000)).unwrap();
    match walker.fault(gpa(15 * PAGE, 2 * PAGE)) {
        Err(FaultError::CrossesSlot { covered, .. }) => assert_eq!(covered, gpa(16 * PAGE, PAGE)),
        other => panic!("{other:?}"),
    }
    drop(walker.fault(gpa(4 * PAGE, 4 * PAGE)).unwrap());
}

#[test]
fn impossible_slots_are_refused_and_nothing_changes() {
    let (space, _toy, _s) = world(4);
    let before = space.slots();
    let bad = [
        spec(3 * PAGE, PAGE, 0),
        spec(0x100_0800, PAGE, 0),
        spec(0x100_0000, PAGE + 1, 0),
        spec(0x100_0000, PAGE, 0x800),
        spec(0x100_0000, 2 * PAGE, u64::MAX - PAGE + 1),
    ];
    for spec in bad {
        assert!(space.add_slot(spec).is_err(), "{spec:?}");
    }
    // Two of one call overlap each other.
    assert!(space.replace_slots(&[], &[spec(0x100_0000, 2 * PAGE, 0), spec(0x100_1000, PAGE, 0)]).is_err());
    assert!(space.replace_slots(&[before[0].0], &[spec(0x100_0000, PAGE, 1)]).is_err());
    assert_eq!(space.slots(), before);
}

#[test]
fn slots_that_a_subscriber_refuses_change_nothing() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    let before = space.slots();
    toy.refuse_populate.store(true, Ordering::SeqCst);
    let result = space.replace_slots(&[before[0].0], &[spec(0, 2 * PAGE, 0x200_0000), spec(8 * PAGE, PAGE, HOST)]);
    assert!(matches!(result, Err(SlotError::Window(OpenError::Subscriber { .. }))), "{result:?}");
    assert_eq!(space.slots(), before, "the slots are what they were");
    assert_eq!(space.progress().count, 0);
    toy.refuse_populate.store(false, Ordering::SeqCst);
    fault_in(&space, &toy, 0..4);
    assert!(space.zap(hva(HOST, 4 * PAGE)).is_ok());
    assert_eq!(toy.peek(0), None, "windows still walk the slot");
    space.remove_slot(before[0].0).unwrap();
}

#[test]
fn slots_whose_window_is_refused_stay() {
    let (space, toy, _s) = world(4);
    fault_in(&space, &toy, 0..4);
    toy.fail_start.store(true, Ordering::SeqCst);
    let slot = space.slots()[0].0;
    assert!(matches!(space.remove_slot(slot), Err(SlotError::Window(OpenError::Subscriber { .. }))));
    assert_eq!(space.progress().count, 0);
    toy.fail_start.store(false, Ordering::SeqCst);
    let mut walker = space.walker();
    try_fault(&mut walker, &toy, 0, home(0)).unwrap();
    space.remove_slot(slot).unwrap();
}

#[test]
fn a_slots_window_that_cannot_be_closed_is_reported_and_stays() {
    let (space, toy, _s) = world(4);
    toy.fail_end.store(true, Ordering::SeqCst);
    assert!(matches!(space.add_slot(spec(8 * PAGE, PAGE, 0x200_0000)), Err(SlotError::Close(_))));
    assert_eq!(space.slots().len(), 2);
    assert_eq!(space.progress().count, 1);
    toy.fail_end.store(false, Ordering::SeqCst);
    eventually(|| space.reap() == 0 && space.progress().count == 0);
}

#[test]
fn what_was_discarded_is_served_again_once_it_is_populated() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let guard = space.zap(hva(HOST + 2 * PAGE, 2 * PAGE)).unwrap();
    guard.discard();
    guard.close().unwrap();
    let mut walker = space.walker();
    for range in [gpa(2 * PAGE, PAGE), gpa(PAGE, 2 * PAGE), gpa(0, 8 * PAGE)] {
        assert!(matches!(walker.fault(range), Err(FaultError::NotPopulated { .. })));
    }
    drop(walker.fault(gpa(4 * PAGE, PAGE)).unwrap());
    lock(&toy.populated).clear();
    space.populate(gpa(2 * PAGE, PAGE)).unwrap();
    assert_eq!(toy.populated(), [Stretch { guest: Some(gpa(2 * PAGE, PAGE)), host: Some(hva(HOST + 2 * PAGE, PAGE)) }]);
    try_fault(&mut walker, &toy, 2 * PAGE, home(0)).unwrap();
    assert!(walker.fault(gpa(3 * PAGE, PAGE)).is_err());
    // A slot that is removed takes its holes along.
    space.remove_slot(space.slots()[0].0).unwrap();
    space.add_slot(spec(0, 8 * PAGE, HOST)).unwrap();
    drop(walker.fault(gpa(0, 8 * PAGE)).unwrap());
}

#[test]
fn what_was_discarded_stays_so_where_its_slot_is_replaced_over_the_same_memory() {
    let (space, toy, _s) = world(8);
    let guard = space.zap(gpa(2 * PAGE, 4 * PAGE)).unwrap();
    guard.discard();
    guard.close().unwrap();
    lock(&toy.populated).clear();
    // Dirty logging is switched on, the slot is cut in two, and the last two pages get other memory.
    let logged = SlotSpec { flags: SlotFlags::LOG_DIRTY, ..spec(0, 4 * PAGE, HOST) };
    let slots = [logged, spec(4 * PAGE, PAGE, HOST + 4 * PAGE), spec(5 * PAGE, 3 * PAGE, 0x200_0000)];
    space.replace_slots(&[space.slots()[0].0], &slots).unwrap();
    let mut walker = space.walker();
    let served: Vec<u64> = (0..8).filter(|page| walker.fault(gpa(page * PAGE, PAGE)).is_ok()).collect();
    assert_eq!(served, [0, 1, 5, 6, 7]);
    // Who maps ahead is told of what is there.
    let told: Vec<_> = toy.populated().iter().filter_map(|stretch| stretch.guest).collect();
    assert_eq!(told, [gpa(0, 2 * PAGE), gpa(5 * PAGE, 3 * PAGE)]);
    // And where somebody refuses that, the holes are what they were.
    toy.refuse_populate.store(true, Ordering::SeqCst);
    let ids: Vec<SlotId> = space.slots().iter().map(|slot| slot.0).collect();
    space.replace_slots(&ids, &[spec(0, 8 * PAGE, HOST)]).unwrap_err();
    toy.refuse_populate.store(false, Ordering::SeqCst);
    let served: Vec<u64> = (0..8).filter(|page| walker.fault(gpa(page * PAGE, PAGE)).is_ok()).collect();
    assert_eq!(served, [0, 1, 5, 6, 7]);
}

#[test]
fn only_memory_is_discarded() {
    // A window over more than a slot: what lies beside the slot has nothing that could be unplugged.
    let (space, _toy, _s) = world(4);
    let guard = space.zap(gpa(0, 16 * PAGE)).unwrap();
    guard.discard();
    guard.close().unwrap();
    let mut walker = space.walker();
    drop(walker.fault(gpa(8 * PAGE, PAGE)).unwrap());
    assert!(matches!(walker.fault(gpa(0, PAGE)), Err(FaultError::NotPopulated { .. })));
    space.add_slot(spec(8 * PAGE, PAGE, 0x200_0000)).unwrap();
    drop(walker.fault(gpa(8 * PAGE, PAGE)).unwrap());
}

#[test]
fn discarding_goes_by_the_slots_of_now() {
    let (space, _toy, _s) = world(4);
    let guard = space.zap(hva(HOST, 4 * PAGE)).unwrap();
    space
        .replace_slots(&[space.slots()[0].0], &[spec(0, 4 * PAGE, 0x200_0000), spec(8 * PAGE, 4 * PAGE, HOST)])
        .unwrap();
    guard.discard();
    guard.close().unwrap();
    let mut walker = space.walker();
    drop(walker.fault(gpa(0, PAGE)).unwrap());
    assert!(matches!(walker.fault(gpa(8 * PAGE, PAGE)), Err(FaultError::NotPopulated { .. })));
}

#[test]
fn populating_that_a_subscriber_refuses_leaves_the_holes_that_were() {
    let (space, toy, _s) = world(8);
    fault_in(&space, &toy, 0..8);
    let guard = space.zap(gpa(2 * PAGE, PAGE)).unwrap();
    guard.discard();
    guard.close().unwrap();
    toy.refuse_populate.store(true, Ordering::SeqCst);
    assert!(matches!(space.populate(gpa(0, 8 * PAGE)), Err(OpenError::Subscriber { .. })));
    let mut walker = space.walker();
    drop(walker.fault(gpa(PAGE, PAGE)).unwrap());
    assert!(toy.peek(PAGE).is_some(), "what was populated is untouched");
    assert!(matches!(walker.fault(gpa(2 * PAGE, PAGE)), Err(FaultError::NotPopulated { .. })));
    assert_eq!(space.progress().count, 0);
}

#[test]
fn a_page_that_was_mapped_while_populating_failed_is_zapped_again() {
    // The first subscriber maps at once what it is told of; the second refuses.
    struct Eager(Arc<Toy>, Space);
    impl Subscriber for Eager {
        fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
            self.0.start(window)
        }
        fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
            Ok(())
        }
        fn populate(&self, part: &Stretch) -> Result<(), SubscriberError> {
            let Some(guest) = part.guest else { return Ok(()) };
            let mut walker = self.1.walker();
            let _ = try_fault(&mut walker, &self.0, guest.start().as_u64(), home(0));
            Ok(())
        }
    }
    let space = Space::new();
    space.add_slot(spec(0, 4 * PAGE, HOST)).unwrap();
    let toy = Toy::new(&space, 4);
    let _e = space.subscribe(Eager(Arc::clone(&toy), space.clone())).unwrap();
    let refusing = Toy::new(&space, 4);
    let _r = space.subscribe(Arc::clone(&refusing)).unwrap();
    let guard = space.zap(gpa(PAGE, PAGE)).unwrap();
    guard.discard();
    guard.close().unwrap();
    refusing.refuse_populate.store(true, Ordering::SeqCst);
    assert!(space.populate(gpa(PAGE, PAGE)).is_err());
    assert_eq!(toy.peek(PAGE), None, "a hole is translated");
}

#[test]
fn a_read_only_slot_caps_what_is_granted() {
    let space = Space::new();
    let rom = SlotSpec { flags: SlotFlags::READ_ONLY | SlotFlags::LOG_DIRTY, ..spec(0, 4 * PAGE, HOST) };
    space.add_slot(rom).unwrap();
    space.add_slot(spec(8 * PAGE, PAGE, 0x200_0000)).unwrap();
    let toy = Toy::new(&space, 16);
    let _s = space.subscribe(Arc::clone(&toy)).unwrap();
    fault_in(&space, &toy, [0, 8]);
    assert!(!toy.peek(0).unwrap().writable && toy.peek(8 * PAGE).unwrap().writable);
    space
        .admit(gpa(0, PAGE), |admission| {
            assert_eq!(admission.ceiling(), Access::RX);
            assert_eq!(admission.slot_flags(), Some(rom.flags));
        })
        .unwrap();
    space.admit(gpa(8 * PAGE, PAGE), |admission| assert_eq!(admission.ceiling(), Access::RWX)).unwrap();
}

#[test]
fn pages_have_the_size_that_was_asked_for() {
    assert!(Space::builder().page_size(3000).is_err());
    let space = Space::builder().page_size(0x4000).unwrap().build();
    assert!(space.add_slot(spec(0, 0x1000, 0)).is_err());
    space.add_slot(spec(0, 0x4000, 0x4000)).unwrap();
    let guard = space.retain(hva(0x4000, 0x4000)).unwrap();
    let change = |page| Change { page: Hva::new(page), expected: out(0), new: out(0x4000) };
    assert!(matches!(guard.change_pte(&[change(0x5000)]), Err(ChangeError::OutsideWindow { .. })));
    guard.change_pte(&[change(0x4000)]).unwrap();
}

#[cfg(feature = "vm-memory")]
#[test]
fn slots_come_from_a_guest_memory() {
    use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
    let memory: GuestMemoryMmap =
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000), (GuestAddress(0x10_0000), 0x2000)]).unwrap();
    let space = Space::new();
    let ids = space.set_memory(&memory).unwrap();
    assert_eq!(ids.len(), 2);
    let slots = space.slots();
    assert_eq!(slots[1].1.guest, gpa(0x10_0000, 0x2000));
    let host = memory.get_host_address(GuestAddress(0x10_1000)).unwrap() as u64;
    let toy = Toy::new(&space, 0x110);
    let _s = space.subscribe(Arc::clone(&toy)).unwrap();
    fault_in(&space, &toy, [0x101]);
    space.zap(hva(host, 1)).unwrap().close().unwrap();
    assert_eq!(toy.peek(0x10_1000), None);
    // Again, with less.
    let less: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    space.set_memory(&less).unwrap();
    assert_eq!(space.slots().len(), 1);
    assert_eq!(Gpa::from(GuestAddress(5)), Gpa::new(5));
    assert_eq!(GuestAddress::from(Gpa::new(5)), GuestAddress(5));
}
