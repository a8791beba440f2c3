// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Consumers that are calls.
#![cfg(all(feature = "std", not(loom)))]

mod common;

use std::{
    convert::Infallible,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
};

use common::*;
use notifier_core::*;

/// Notes its calls, and checks that nothing is mapped twice or unmapped that was not mapped so.
#[derive(Default)]
struct Device {
    mapped: Mutex<Vec<Extent>>,
    can_protect: AtomicBool,
    fail_unmap: AtomicBool,
    fail_map: AtomicBool,
}

impl CallConsumer for Device {
    fn name(&self) -> &str {
        "device"
    }
    fn map(&self, extent: &Extent) -> Result<(), CallError> {
        if self.fail_map.load(Ordering::SeqCst) {
            return Err("map".into());
        }
        let mut mapped = lock(&self.mapped);
        assert!(mapped.iter().all(|other| !other.guest.overlaps(&extent.guest)));
        mapped.push(*extent);
        Ok(())
    }
    fn unmap(&self, extent: &Extent) -> Result<(), CallError> {
        if self.fail_unmap.load(Ordering::SeqCst) {
            return Err("unmap".into());
        }
        let mut mapped = lock(&self.mapped);
        let at = mapped.iter().position(|other| other.guest == extent.guest).expect("exactly what was mapped");
        mapped.swap_remove(at);
        Ok(())
    }
    fn make_read_only(&self, extent: &Extent) -> Result<bool, CallError> {
        if !self.can_protect.load(Ordering::SeqCst) {
            return Ok(false);
        }
        let mut mapped = lock(&self.mapped);
        let at = mapped.iter().position(|other| other.guest == extent.guest).expect("exactly what was mapped");
        mapped[at].access = mapped[at].access.read_only();
        Ok(true)
    }
}

fn world_of_calls() -> (Space, Arc<CallAdapter<Device>>, Subscription) {
    let space = Space::new();
    space.add_slot(spec(0, 16 * PAGE, HOST)).unwrap();
    let adapter = Arc::new(CallAdapter::new(Device::default()));
    let subscription = space.subscribe(Arc::clone(&adapter)).unwrap();
    (space, adapter, subscription)
}

fn map(space: &Space, adapter: &CallAdapter<Device>, start: u64, len: u64, access: Access) -> Result<(), CallMapError> {
    let mut walker = space.walker();
    let Ok(fault) = walker.fault(gpa(start, len)) else { panic!("no fault") };
    let resolved =
        fault.resolve(|f| Ok::<_, Infallible>(Extent { guest: f.range(), output: home(start), access })).unwrap();
    resolved.install(|admission| adapter.map(admission))
}

fn ranges(adapter: &CallAdapter<Device>) -> Vec<GpaRange> {
    let ours: Vec<_> = adapter.mapped().iter().map(|extent| extent.guest).collect();
    let mut theirs: Vec<_> = lock(&adapter.consumer().mapped).iter().map(|extent| extent.guest).collect();
    theirs.sort_by_key(|range| range.start());
    assert_eq!(ours, theirs, "the account is what the device has");
    ours
}

#[test]
fn a_window_unmaps_whole_extents() {
    let (space, adapter, _s) = world_of_calls();
    map(&space, &adapter, 0, 4 * PAGE, Access::RW).unwrap();
    map(&space, &adapter, 4 * PAGE, 2 * PAGE, Access::RW).unwrap();
    map(&space, &adapter, 8 * PAGE, PAGE, Access::RW).unwrap();
    let guard = space.zap(hva(HOST + 3 * PAGE, PAGE + 1)).unwrap();
    assert_eq!(ranges(&adapter), [gpa(8 * PAGE, PAGE)]);
    guard.close().unwrap();
}

#[test]
fn a_lost_fault_is_not_mapped() {
    let (space, adapter, _s) = world_of_calls();
    let mut walker = space.walker();
    let fault = walker.fault(gpa(0, PAGE)).unwrap();
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
    let resolved = fault
        .resolve(|f| Ok::<_, Infallible>(Extent { guest: f.range(), output: home(0), access: Access::RW }))
        .unwrap();
    assert!(matches!(resolved.install(|admission| adapter.map(admission)), Err(CallMapError::Retry(_))));
    assert!(ranges(&adapter).is_empty());
}

#[test]
fn a_retained_window_protects_or_unmaps() {
    let (space, adapter, _s) = world_of_calls();
    map(&space, &adapter, 0, PAGE, Access::RW).unwrap();
    map(&space, &adapter, PAGE, PAGE, Access::READ).unwrap();
    adapter.consumer().can_protect.store(true, Ordering::SeqCst);
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    assert_eq!(adapter.mapped().iter().map(|extent| extent.access).collect::<Vec<_>>(), [Access::READ; 2]);
    guard.keep(guard.range()).unwrap();
    guard.close().unwrap();
    assert_eq!(ranges(&adapter), [gpa(0, PAGE), gpa(PAGE, PAGE)]);
    // A write fault afterwards gets its right back.
    map(&space, &adapter, 0, PAGE, Access::RW).unwrap();
    assert_eq!(adapter.mapped()[0].access, Access::RW);
    assert_eq!(lock(&adapter.consumer().mapped).iter().find(|e| e.guest == gpa(0, PAGE)).unwrap().access, Access::RW);
    adapter.consumer().can_protect.store(false, Ordering::SeqCst);
    let guard = space.retain(hva(HOST, 2 * PAGE)).unwrap();
    assert_eq!(ranges(&adapter), [gpa(PAGE, PAGE)], "what cannot be protected goes; what is read-only stays");
    guard.close().unwrap();
    assert!(ranges(&adapter).is_empty(), "no outcome");
}

#[test]
fn change_pte_unmaps() {
    let (space, adapter, _s) = world_of_calls();
    adapter.consumer().can_protect.store(true, Ordering::SeqCst);
    map(&space, &adapter, 0, PAGE, Access::RW).unwrap();
    let guard = space.retain(hva(HOST, PAGE)).unwrap();
    let change = Change { page: Hva::new(HOST), expected: home(0), new: out(0x9000_0000) };
    assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Zapped);
    assert!(ranges(&adapter).is_empty());
    guard.close().unwrap();
}

#[test]
fn what_is_mapped_already_stays_and_what_differs_is_refused() {
    let (space, adapter, _s) = world_of_calls();
    map(&space, &adapter, 0, 2 * PAGE, Access::RW).unwrap();
    // A fault that was told to retry half-way comes back for what it had mapped already.
    map(&space, &adapter, 0, 2 * PAGE, Access::READ).unwrap();
    assert_eq!(adapter.mapped()[0].access, Access::RW);
    match map(&space, &adapter, PAGE, 2 * PAGE, Access::RW) {
        Err(CallMapError::Present { mapped, .. }) => assert_eq!(mapped, gpa(0, 2 * PAGE)),
        other => panic!("{other:?}"),
    }
    assert_eq!(ranges(&adapter), [gpa(0, 2 * PAGE)]);
}

#[test]
fn a_failed_call_is_reported_and_accounted_for() {
    let (space, adapter, _s) = world_of_calls();
    adapter.consumer().fail_map.store(true, Ordering::SeqCst);
    assert!(matches!(map(&space, &adapter, 0, PAGE, Access::RW), Err(CallMapError::Call { .. })));
    assert!(ranges(&adapter).is_empty());
    adapter.consumer().fail_map.store(false, Ordering::SeqCst);
    map(&space, &adapter, 0, PAGE, Access::RW).unwrap();
    adapter.consumer().fail_unmap.store(true, Ordering::SeqCst);
    assert!(matches!(space.zap(hva(HOST, PAGE)), Err(OpenError::Subscriber { .. })));
    assert_eq!(ranges(&adapter), [gpa(0, PAGE)]);
    assert_eq!(space.progress().count, 0);
    adapter.consumer().fail_unmap.store(false, Ordering::SeqCst);
    space.zap(hva(HOST, PAGE)).unwrap().close().unwrap();
    assert!(ranges(&adapter).is_empty());
}

#[test]
fn who_left_maps_nothing_more() {
    let (space, adapter, subscription) = world_of_calls();
    map(&space, &adapter, 0, PAGE, Access::RW).unwrap();
    drop(subscription);
    assert!(ranges(&adapter).is_empty());
    assert!(matches!(map(&space, &adapter, 0, PAGE, Access::RW), Err(CallMapError::Left)));
}

#[test]
fn a_read_only_slot_is_mapped_read_only() {
    let (space, adapter, _s) = world_of_calls();
    space.add_slot(SlotSpec { flags: SlotFlags::READ_ONLY, ..spec(32 * PAGE, PAGE, 0x200_0000) }).unwrap();
    map(&space, &adapter, 32 * PAGE, PAGE, Access::RW).unwrap();
    assert_eq!(adapter.mapped()[0].access, Access::READ);
}

#[test]
fn check_and_call_are_one_step() {
    // Faults against windows: after a window opened, the device has nothing of its range.
    let (space, adapter, _s) = world_of_calls();
    let done = AtomicBool::new(false);
    std::thread::scope(|threads| {
        for page in 0..2 {
            let (space, adapter, done) = (&space, &adapter, &done);
            threads.spawn(move || {
                let mut walker = space.walker();
                while !done.load(Ordering::Relaxed) {
                    let Ok(fault) = walker.fault(gpa(page * PAGE, PAGE)) else { continue };
                    let extent = Extent { guest: gpa(page * PAGE, PAGE), output: home(0), access: Access::RW };
                    let resolved = fault.resolve(|_| Ok::<_, Infallible>(extent)).unwrap();
                    match resolved.install(|admission| adapter.map(admission)) {
                        Ok(()) | Err(CallMapError::Retry(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
            });
        }
        for round in 0..3000 {
            let page = round % 2;
            let guard = space.zap(hva(HOST + page * PAGE, PAGE)).unwrap();
            assert!(lock(&adapter.consumer().mapped).iter().all(|extent| extent.guest != gpa(page * PAGE, PAGE)));
            guard.close().unwrap();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(space.counters().unrelated_retries, 0);
}
