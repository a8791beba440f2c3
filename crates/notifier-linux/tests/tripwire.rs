// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tripwire reports what changed without a window, stays silent about what was expected, and is blind exactly where
//! its page says so. What is *not* reported is shown by a change that is, made afterwards: messages keep their order.
#![cfg(target_os = "linux")]

mod mappings;

use std::{
    io::Write,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, channel},
    },
    thread,
    time::Duration,
};

use mappings::{KINDS, Kind, Mapping, memfd, page_size};
use notifier_core::{
    AddrRange, Coverage, Gpa, Hva, HvaRange, LeaseRequest, OpenError, SlotFlags, SlotSpec, Space, Subscriber,
    SubscriberError,
};
use notifier_linux::{Call, ChangeKind, Kernel, RegisterError, Tripped, Tripwire, TripwireError};
use parking_lot::Mutex;
use rustix::{
    fs::FallocateFlags,
    mm::{Advice, MprotectFlags, MremapFlags},
};

/// A tripwire and its reports, or a line that says what is missing.
fn tripwire(space: &Space, kernel: &Kernel, ranges: &[HvaRange]) -> Option<(Tripwire, Receiver<Tripped>)> {
    let (send, receive) = channel();
    match Tripwire::new(space, kernel, ranges, move |tripped| drop(send.send(tripped))) {
        Err(TripwireError::Register(RegisterError::Missing(missing))) => {
            let _ = writeln!(std::io::stderr(), "not tested: {missing}");
            None
        }
        tripwire => Some((tripwire.unwrap(), receive)),
    }
}

/// Runs what waits for ever where the rule is broken: then the test fails, and the thread is left behind.
fn ends(run: impl FnOnce() + Send + 'static) {
    let (send, receive) = channel::<()>();
    let running = thread::spawn(move || {
        let _dropped_at_the_end = send;
        run();
    });
    if receive.recv_timeout(Duration::from_secs(60)) == Err(RecvTimeoutError::Timeout) {
        panic!("somebody waits for ever");
    }
    running.join().unwrap();
}

fn advise(memory: &Mapping, range: HvaRange, advice: Advice) {
    // SAFETY: the mapping's contents may change at any time.
    unsafe { rustix::mm::madvise(memory.pointer(range), range.len() as usize, advice) }.unwrap();
}

fn discard(memory: &Mapping, range: HvaRange) {
    advise(memory, range, Advice::LinuxDontNeed);
}

/// Moves a page to where a page of another mapping was.
fn move_page(from: &Mapping, page: u64, to: &Mapping, to_page: u64) {
    let (size, flags) = (page_size() as usize, MremapFlags::MAYMOVE);
    let to = to.pointer(to.page(to_page));
    // SAFETY: both mappings' contents may change at any time; what is left behind is unmapped, and unmapped again
    // later.
    unsafe { rustix::mm::mremap_fixed(from.pointer(from.page(page)), size, size, flags, to) }.unwrap();
}

/// Counts windows, and can be told to wait for scopes.
#[derive(Default)]
struct Watcher {
    started: Mutex<Vec<HvaRange>>,
    ended: AtomicU64,
    waits_for: Mutex<Option<Space>>,
}

impl Subscriber for Watcher {
    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        if let Some(space) = &*self.waits_for.lock() {
            space.wait_for_scopes(window.nonblocking()).map_err(|_| SubscriberError::WouldBlock)?;
        }
        self.started.lock().extend(window.host());
        Ok(())
    }
    fn end(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.ended.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
    fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        Ok(())
    }
}

#[test]
fn unexpected_changes_are_reported_with_their_kind() {
    for kind in KINDS {
        let (space, memory, elsewhere) = (Space::new(), Mapping::new(kind, 8), Mapping::new(Kind::Anonymous, 1));
        let Some((tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.range()]) else { return };
        (0..8).for_each(|page| memory.set(page, 1));

        discard(&memory, memory.part(1, 2));
        let removed = reports.recv().unwrap();
        assert_eq!((removed.range, removed.kind), (memory.part(1, 2), ChangeKind::Removed), "{kind:?}");
        assert!(removed.in_time && removed.secondaries.is_ok(), "{removed:?}");

        if kind == Kind::Shared {
            advise(&memory, memory.page(3), Advice::LinuxRemove);
            let removed = reports.recv().unwrap();
            assert_eq!((removed.range, removed.kind), (memory.page(3), ChangeKind::Removed));
        }

        memory.map_over(4, memfd(1), 0);
        let mapped = reports.recv().unwrap();
        assert_eq!((mapped.range, mapped.kind), (memory.page(4), ChangeKind::Unmapped));
        assert!(!mapped.in_time && mapped.settled && mapped.secondaries.is_ok(), "{mapped:?}");

        move_page(&memory, 6, &elsewhere, 0);
        let moved = reports.recv().unwrap();
        assert_eq!(moved.kind, ChangeKind::Moved { to: elsewhere.page(0).start() });
        assert!(moved.range == memory.page(6) && !moved.in_time);
        let left = reports.recv().unwrap();
        assert_eq!((left.range, left.kind), (memory.page(6), ChangeKind::Unmapped));

        // SAFETY: nobody has a reference into the page.
        unsafe { rustix::mm::munmap(memory.pointer(memory.page(7)), page_size() as usize) }.unwrap();
        let unmapped = reports.recv().unwrap();
        assert_eq!((unmapped.range, unmapped.kind), (memory.page(7), ChangeKind::Unmapped));

        // A window for each report.
        let windows = if kind == Kind::Shared { 6 } else { 5 };
        assert_eq!((space.progress().count, space.progress().sequence), (0, windows));
        assert_eq!(tripwire.failures(), 0);
        drop(tripwire);
        assert!(reports.recv().is_err());
    }
}

#[test]
fn removed_pages_are_seen_to_go_while_the_window_is_open() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 1));
    let Some((_tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.range()]) else { return };
    // Nobody touches the page again, and so it is seen absent, unless the kernel lets this thread wait for very long.
    let settles = || {
        memory.set(0, 1);
        discard(&memory, memory.page(0));
        reports.recv().unwrap().settled
    };
    assert!((0..1_000).any(|_| settles()));
    // Advice that the kernel follows when it pleases: the page stays, and the report says that nothing is known.
    memory.set(0, 1);
    advise(&memory, memory.page(0), Advice::LinuxFree);
    let report = reports.recv().unwrap();
    assert_eq!(report.kind, ChangeKind::Removed);
    assert!(!report.settled || !memory.state(0).present);
}

#[test]
fn expected_changes_are_not_reported_however_soon_the_guard_goes() {
    const ROUNDS: u64 = 2_000;
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 4));
    let Some((tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.range()]) else { return };
    for round in 0..ROUNDS {
        let page = round % 3;
        memory.set(page, 1);
        let expected = tripwire.expect(memory.page(page));
        discard(&memory, memory.page(page));
        drop(expected);
    }
    discard(&memory, memory.page(3));
    assert_eq!(reports.recv().unwrap().range, memory.page(3));
    assert_eq!(space.progress().sequence, 1);
}

#[test]
fn the_rest_of_a_change_that_was_expected_in_part_is_reported() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 8));
    let Some((tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.part(0, 7)]) else { return };
    let twice = (tripwire.expect(memory.part(1, 2)), tripwire.expect(memory.part(1, 2)));
    let other = tripwire.expect(memory.part(5, 1));
    discard(&memory, memory.part(0, 7));
    for expected in [memory.page(0), memory.part(3, 2), memory.page(6)] {
        assert_eq!(reports.recv().unwrap().range, expected);
    }
    // One of two guards over the same bytes is enough.
    drop(twice.0);
    drop(other);
    discard(&memory, memory.part(1, 5));
    assert_eq!(reports.recv().unwrap().range, memory.part(3, 3));
    drop(twice.1);
    // What is not watched is cut off.
    // SAFETY: nobody has a reference into the pages.
    unsafe { rustix::mm::munmap(memory.pointer(memory.part(6, 2)), 2 * page_size() as usize) }.unwrap();
    let unmapped = reports.recv().unwrap();
    assert_eq!((unmapped.range, unmapped.kind), (memory.page(6), ChangeKind::Unmapped));
}

#[test]
fn what_the_page_says_is_not_seen_is_not_seen() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Shared, 8));
    let file = memory.file.as_ref().unwrap();
    let other = Mapping::of(file.try_clone().unwrap(), Kind::Shared, 8);
    let Some((_tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.range()]) else { return };
    (0..8).for_each(|page| memory.set(page, page + 1));

    for flags in [MprotectFlags::READ, MprotectFlags::READ | MprotectFlags::WRITE] {
        // SAFETY: nobody writes meanwhile.
        unsafe { rustix::mm::mprotect(memory.pointer(memory.page(0)), page_size() as usize, flags) }.unwrap();
    }
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, hole, page_size(), page_size()).unwrap();
    assert_eq!(memory.get(1), 0, "the page is another one now");
    advise(&other, other.page(2), Advice::LinuxRemove);
    assert_eq!(memory.get(2), 0, "the page is another one now");
    discard(&other, other.page(3));
    file.set_len(7 * page_size()).unwrap();
    file.set_len(8 * page_size()).unwrap();
    assert_eq!(memory.get(7), 0, "the page is another one now");
    advise(&memory, memory.page(4), Advice::LinuxCold);
    advise(&memory, memory.page(4), Advice::LinuxPageOut);

    discard(&memory, memory.page(5));
    let first = reports.recv().unwrap();
    assert_eq!(first.range, memory.page(5), "{first:?}");
}

#[test]
fn what_is_mapped_over_is_watched_once_it_is_readmitted() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 3));
    let Some((tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.part(0, 2)]) else { return };
    let store = memfd(1);
    let expected = tripwire.expect(memory.page(0));
    memory.map_over(0, &store, 0);
    drop(expected);
    discard(&memory, memory.page(0)); // Not seen.
    tripwire.readmit(memory.page(0)).unwrap();
    discard(&memory, memory.page(0));
    assert_eq!(reports.recv().unwrap().range, memory.page(0));
    assert_eq!(space.progress().sequence, 1);

    let foreign = tripwire.readmit(memory.part(1, 2)).unwrap_err();
    assert!(matches!(foreign, TripwireError::Foreign { address } if address == memory.page(2).start()), "{foreign}");
    let crooked = AddrRange::with_len(memory.page(0).start(), 17).unwrap();
    assert!(matches!(tripwire.readmit(crooked), Err(TripwireError::Unaligned { range, .. }) if range == crooked));
}

#[test]
fn secondaries_are_zapped_and_a_pin_is_told() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 4));
    let guest = |first: u64, pages: u64| AddrRange::with_len(Gpa::new(first * 0x1000), pages * 0x1000).unwrap();
    if page_size() != space.page_size() {
        return;
    }
    let slot = SlotSpec { guest: guest(0, 4), host: Some(memory.range().start()), flags: SlotFlags::empty() };
    space.add_slot(slot).unwrap();
    let watcher = Arc::new(Watcher::default());
    let _subscription = space.subscribe(Arc::clone(&watcher)).unwrap();
    let Some((_tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.range()]) else { return };
    let _lease = space.lease(LeaseRequest::new(guest(3, 1), "device")).unwrap();

    discard(&memory, memory.part(1, 2));
    reports.recv().unwrap().secondaries.unwrap();
    assert_eq!(*watcher.started.lock(), [memory.part(1, 2)]);
    assert_eq!(watcher.ended.load(Ordering::SeqCst), 1);

    discard(&memory, memory.page(3));
    let pinned = reports.recv().unwrap();
    assert!(matches!(pinned.secondaries, Err(OpenError::Pinned { .. })), "{pinned:?}");
    assert!(!pinned.settled);
}

#[test]
fn a_change_inside_a_scope_does_not_wait_for_its_own_window() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 2));
    let watcher = Arc::new(Watcher::default());
    let _subscription = space.subscribe(Arc::clone(&watcher)).unwrap();
    *watcher.waits_for.lock() = Some(space.clone());
    let Some((tripwire, reports)) = tripwire(&space, &Kernel::new(), &[memory.range()]) else { return };
    let mut walker = space.walker();
    let scope = walker.enter();
    // Two, so that the second is read while the first one's window waits for the scope.
    discard(&memory, memory.page(0));
    discard(&memory, memory.page(1));
    drop(scope);
    for page in [0, 1] {
        let report = reports.recv().unwrap();
        assert_eq!(report.range, memory.page(page));
        report.secondaries.unwrap();
    }

    // And the tripwire can be dropped inside one, with a window that waits for it.
    let scope = walker.enter();
    discard(&memory, memory.page(0));
    drop(tripwire);
    let report = reports.recv().unwrap();
    assert!(matches!(report.secondaries, Err(OpenError::WouldBlock { .. })), "{report:?}");
    drop(scope);
    *watcher.waits_for.lock() = None;
}

#[test]
fn dropping_frees_whoever_waits_to_be_read() {
    for kind in KINDS {
        let (space, memory) = (Space::new(), Mapping::new(kind, 2));
        let (blind, asked) = (Arc::new(AtomicBool::new(true)), Arc::new(AtomicU64::new(0)));
        let kernel = Kernel::with_hook({
            let (blind, asked) = (Arc::clone(&blind), Arc::clone(&asked));
            move |call| match call {
                Call::ReadMessages if blind.load(Ordering::SeqCst) => {
                    asked.fetch_add(1, Ordering::SeqCst);
                    Err(std::io::Error::from_raw_os_error(5))
                }
                _ => Ok(()),
            }
        });
        let Some((tripwire, reports)) = tripwire(&space, &kernel, &[memory.range()]) else { return };
        memory.set(0, 1);
        thread::scope(|scope| {
            let changing = scope.spawn(|| discard(&memory, memory.page(0)));
            // It polls for a message, and reads only once there is one.
            while asked.load(Ordering::SeqCst) == 0 {
                thread::yield_now();
            }
            assert!(!changing.is_finished());
            assert!(kind == Kind::Shared || memory.get(0) == 1, "removed before it was told");
            drop(tripwire);
            changing.join().unwrap();
        });
        assert!(reports.recv().is_err());
    }
}

#[test]
fn reading_that_fails_is_counted_and_done_again() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 1));
    let fails = Arc::new(AtomicU64::new(0));
    let kernel = Kernel::with_hook({
        let fails = Arc::clone(&fails);
        move |call| match call {
            Call::ReadMessages | Call::Poll if fails.fetch_add(1, Ordering::SeqCst) < 5 => {
                Err(std::io::Error::from_raw_os_error(5))
            }
            _ => Ok(()),
        }
    });
    let Some((tripwire, reports)) = tripwire(&space, &kernel, &[memory.range()]) else { return };
    discard(&memory, memory.page(0));
    assert_eq!(reports.recv().unwrap().range, memory.page(0));
    assert!(tripwire.failures() != 0);
}

#[test]
fn a_report_may_panic_and_may_drop_the_tripwire() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 2));
    let owner: Arc<Mutex<Option<Tripwire>>> = Arc::default();
    let (send, receive) = channel();
    let made = Tripwire::new(&space, &Kernel::new(), &[memory.range()], {
        let owner = Arc::clone(&owner);
        let first = memory.page(0);
        move |tripped| {
            if tripped.range == first {
                std::panic::resume_unwind(Box::new("a report that panics"));
            }
            drop(owner.lock().take());
            send.send(tripped.range).unwrap();
        }
    });
    match made {
        Err(TripwireError::Register(RegisterError::Missing(missing))) => return println!("not tested: {missing}"),
        made => *owner.lock() = Some(made.unwrap()),
    }
    discard(&memory, memory.page(0));
    discard(&memory, memory.page(1));
    assert_eq!(receive.recv().unwrap(), memory.page(1));
    assert!(owner.lock().is_none());
}

#[test]
fn a_report_that_dropped_the_tripwire_may_unmap_what_was_watched() {
    ends(|| {
        let memory = Mapping::new(Kind::Anonymous, 2);
        let (first, given) = (memory.page(0), Arc::new(Mutex::new(None::<(Tripwire, Mapping)>)));
        let (send, receive) = channel();
        let made = Tripwire::new(&Space::new(), &Kernel::new(), &[memory.range()], {
            let given = Arc::clone(&given);
            move |_| {
                let Some((tripwire, memory)) = given.lock().take() else { return };
                drop(tripwire);
                drop(memory);
                send.send(()).unwrap();
            }
        });
        let tripwire = match made {
            Err(TripwireError::Register(RegisterError::Missing(missing))) => return println!("not tested: {missing}"),
            made => made.unwrap(),
        };
        let pointer = memory.pointer(first).expose_provenance();
        *given.lock() = Some((tripwire, memory));
        // SAFETY: the mapping's contents may change at any time; it is unmapped only after this has been read.
        unsafe {
            let pointer = std::ptr::with_exposed_provenance_mut(pointer);
            rustix::mm::madvise(pointer, first.len() as usize, Advice::LinuxDontNeed)
        }
        .unwrap();
        receive.recv().unwrap();
    });
}

#[test]
fn a_report_may_wait_for_whoever_unmaps_while_the_tripwire_is_dropped() {
    ends(|| {
        let (memory, lock) = (Mapping::new(Kind::Anonymous, 2), Arc::new(Mutex::new(())));
        let (reporting, in_report) = channel();
        let made = Tripwire::new(&Space::new(), &Kernel::new(), &[memory.range()], {
            let lock = Arc::clone(&lock);
            move |_| {
                let _ = reporting.send(());
                drop(lock.lock());
            }
        });
        let tripwire = match made {
            Err(TripwireError::Register(RegisterError::Missing(missing))) => return println!("not tested: {missing}"),
            made => made.unwrap(),
        };
        let held = lock.lock();
        discard(&memory, memory.page(0));
        in_report.recv().unwrap();
        let dropping = thread::spawn(move || drop(tripwire));
        // Watched or not any more: until nobody watches, each is a chance to meet the gap.
        while !free(&memory) {
            discard(&memory, memory.page(1));
        }
        drop(memory);
        drop(held);
        dropping.join().unwrap();
    });
}

/// Whether no userfaultfd has this memory.
fn free(memory: &Mapping) -> bool {
    notifier_linux::WriteFence::new(&Kernel::new(), &[memory.range()]).is_ok()
}

#[test]
fn memory_that_is_watched_already_is_busy() {
    let (space, memory) = (Space::new(), Mapping::new(Kind::Anonymous, 2));
    let Some((_tripwire, _reports)) = tripwire(&space, &Kernel::new(), &[memory.page(0)]) else { return };
    let error = notifier_linux::WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap_err();
    assert!(
        matches!(error, notifier_linux::FenceError::Register(RegisterError::Busy { range }) if range == memory.range()),
        "{error}"
    );
    let nothing = AddrRange::with_len(Hva::new(0), page_size()).unwrap();
    let error = Tripwire::new(&space, &Kernel::new(), &[nothing], drop).unwrap_err();
    assert!(matches!(error, TripwireError::Register(RegisterError::Unfit { .. })), "{error}");
}
