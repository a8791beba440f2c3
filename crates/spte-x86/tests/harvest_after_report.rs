// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A migration takes the facts that the sink has, harvests, then copies. When the harvest returns nobody may write any
//! more through a translation whose fact was among those taken: that write would be reported to nobody. The flush that
//! sees to it may be one that somebody else owes.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
        mpsc,
    },
    thread,
    time::Duration,
};

use notifier_core::{Access, AddrRange, Extent, Gpa, GpaRange, Hva, OpenError, OutputAddr, SlotFlags, SlotSpec, Space};
use spte_core::{HeapPages, MapOptions, Table};
use spte_x86::{Ept, EptOptions};

#[test]
fn a_harvest_waits_for_writers_whose_facts_were_reported() {
    let reported = Arc::new(AtomicBool::new(false));
    let sink = Arc::clone(&reported);
    let space = Space::builder().dirty_sink(move |_: GpaRange| sink.store(true, SeqCst)).build();
    let table = Table::new(&space, Ept::new(EptOptions::default()).unwrap(), Arc::new(HeapPages::new()), ()).unwrap();
    let _subscription = space.subscribe(Arc::clone(&table)).unwrap();
    let guest = AddrRange::with_len(Gpa::new(0), 0x20_0000).unwrap();
    space.add_slot(SlotSpec { guest, host: Some(Hva::new(1 << 40)), flags: SlotFlags::empty() }).unwrap();
    let page = AddrRange::with_len(Gpa::new(0x3000), 0x1000).unwrap();
    let mut walker = space.walker();
    let fault = walker.fault(page).unwrap();
    let output = OutputAddr::new(0x5000);
    fault
        .resolve(|fault| Ok::<_, ()>(Extent { guest: fault.range(), output, access: Access::RWX }))
        .unwrap()
        .install(|admission| table.map(admission, &MapOptions::default()))
        .unwrap();

    let scope = walker.enter();
    table.translate(&scope, page.start(), Access::WRITE).unwrap();
    let (harvested, harvests) = mpsc::channel();
    thread::scope(|threads| {
        threads.spawn(|| {
            // The leaf goes, its fact is reported, and the flush stays owed: the walker is in its scope.
            let refused = space.window(page).nonblocking().open_zapped();
            assert!(matches!(refused, Err(OpenError::WouldBlock { .. })), "{refused:?}");
            assert!(reported.swap(false, SeqCst));
            assert_eq!(table.harvest_dirty(guest).unwrap(), []);
            harvested.send(()).unwrap();
        });
        let early = harvests.recv_timeout(Duration::from_millis(200));
        assert_eq!(
            early,
            Err(mpsc::RecvTimeoutError::Timeout),
            "the walker may still write, and nobody will report it"
        );
        drop(scope);
        harvests.recv().unwrap();
    });
}
