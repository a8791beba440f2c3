// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The crate without its features: `cargo test -p notifier-core --no-default-features`.
#![cfg(not(any(feature = "std", loom)))]

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use notifier_core::*;

const PAGE: u64 = 0x1000;

#[derive(Default)]
struct Counts {
    starts: AtomicUsize,
    ends: AtomicUsize,
}

struct Counting(Arc<Counts>);

impl Subscriber for Counting {
    fn start(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.0.starts.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn end(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.0.ends.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        Ok(())
    }
}

fn page(n: u64) -> GpaRange {
    AddrRange::with_len(Gpa::new(n * PAGE), PAGE).unwrap()
}

#[test]
fn windows_faults_scopes_and_leases_work_without_std() {
    let space = Space::new();
    let counts = Arc::new(Counts::default());
    let subscription = space.subscribe(Counting(Arc::clone(&counts))).unwrap();
    let guest = AddrRange::with_len(Gpa::new(0), 16 * PAGE).unwrap();
    space.add_slot(SlotSpec { guest, host: Some(Hva::new(0x10_0000)), flags: SlotFlags::empty() }).unwrap();
    let mut walker = space.walker();
    drop(walker.enter());
    let fault = walker.fault(page(0)).unwrap();
    let guard = space.retain(page(0)).unwrap();
    assert_eq!(fault.admit(|admission| admission.check(page(0))), Err(Refused::Lost));
    assert!(walker.fault(page(0)).is_err());
    drop(walker.fault(page(1)).unwrap());
    let change = Change { page: Gpa::new(0), expected: OutputAddr::new(0), new: OutputAddr::new(PAGE) };
    assert_eq!(guard.change_pte(&[change]).unwrap()[0].outcome, Outcome::Zapped);
    guard.close().unwrap();
    let lease = space.lease(LeaseRequest::new(page(2), "dma")).unwrap();
    assert!(matches!(space.zap(page(2)), Err(OpenError::Pinned { .. })));
    drop(lease);
    // An owned guard is left to whoever calls `reap`.
    drop(space.window(page(2)).open_zapped_owned().unwrap());
    assert_eq!(space.progress().count, 1);
    assert_eq!(space.reap(), 0);
    assert_eq!(space.progress().count, 0);
    drop(subscription);
    assert_eq!(counts.starts.load(Ordering::SeqCst), counts.ends.load(Ordering::SeqCst));
}
