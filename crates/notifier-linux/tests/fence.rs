// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Writers wait at the fence, and no write is lost. Against threads and the kernel, in memory of each kind.
#![cfg(target_os = "linux")]

mod mappings;

use std::{
    io::Write,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};

use mappings::{KINDS, Kind, Mapping, memfd, page_size, word_of};
use notifier_core::{AddrRange, Hva, HvaRange};
use notifier_linux::{FenceError, Kernel, RegisterError, WriteFence};

const LONG: Duration = Duration::from_secs(60);

/// A fence, or a line that says what is missing.
fn fence(ranges: &[HvaRange]) -> Option<WriteFence> {
    match WriteFence::new(&Kernel::new(), ranges) {
        Err(FenceError::Register(RegisterError::Missing(missing))) => {
            let _ = writeln!(std::io::stderr(), "not tested: {missing}");
            None
        }
        fence => Some(fence.unwrap()),
    }
}

#[test]
fn writers_wait_and_nothing_is_lost() {
    const PAGES: u64 = 8;
    const STOPS: u64 = 300;
    for kind in KINDS {
        let memory = Mapping::new(kind, PAGES);
        let Some(fence) = fence(&[memory.range()]) else { return };
        let done = AtomicBool::new(false);
        let write = || {
            let mut rounds = 0;
            while !done.load(Ordering::SeqCst) {
                for page in 0..PAGES {
                    memory.word(page, page).fetch_add(1, Ordering::Relaxed);
                }
                rounds += 1;
            }
            rounds
        };
        let written: u64 = thread::scope(|scope| {
            let writers: Vec<_> = (0..3).map(|_| scope.spawn(write)).collect();
            // A failure is told when the writers have ended.
            let mut still = true;
            for _ in 0..STOPS {
                fence.arm(memory.range()).unwrap();
                let read = || (0..PAGES).map(|page| memory.words(page)).collect::<Vec<_>>();
                let before = read();
                thread::yield_now();
                still &= before == read();
                fence.lift(memory.range()).unwrap();
                // Between two stops somebody writes, and so each stop has somebody to stop.
                let now = memory.get(0);
                while memory.get(0) == now {
                    thread::yield_now();
                }
            }
            done.store(true, Ordering::SeqCst);
            assert!(still, "{kind:?}: somebody wrote to armed memory");
            writers.into_iter().map(|writer| writer.join().unwrap()).sum()
        });
        for page in 0..PAGES {
            assert_eq!(memory.word(page, page).load(Ordering::SeqCst), written, "{kind:?}: page {page}");
        }
    }
}

#[test]
fn a_writer_is_told_with_its_byte_and_waits_until_it_is_lifted() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 4);
        let Some(fence) = fence(&[memory.range()]) else { return };
        memory.set(2, 1);
        fence.arm(memory.range()).unwrap();
        assert!(memory.state(2).write_protected);
        thread::scope(|scope| {
            let writer = scope.spawn(|| memory.word(2, 5).store(7, Ordering::SeqCst));
            let waiter = fence.next(LONG).unwrap().unwrap();
            assert_eq!(waiter.address, memory.page(2).start().wrapping_add(40));
            assert_eq!(memory.word(2, 5).load(Ordering::SeqCst), 0);
            assert!(!writer.is_finished());
            // Told once.
            assert_eq!(fence.next(Duration::ZERO).unwrap(), None);
            // Another page is another matter.
            fence.lift(memory.page(1)).unwrap();
            memory.set(1, 3);
            assert_eq!(memory.word(2, 5).load(Ordering::SeqCst), 0);
            fence.lift(memory.page(2)).unwrap();
            writer.join().unwrap();
        });
        assert_eq!((memory.word(2, 5).load(Ordering::SeqCst), memory.get(1)), (7, 3));
        assert!(!memory.state(2).write_protected);
        assert!(memory.state(3).write_protected);
    }
}

#[test]
fn a_waiter_that_is_woken_while_armed_is_told_again() {
    let memory = Mapping::new(Kind::Anonymous, 1);
    let Some(fence) = fence(&[memory.range()]) else { return };
    fence.arm(memory.range()).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| memory.set(0, 7));
        let first = fence.next(LONG).unwrap().unwrap();
        for _ in 0..3 {
            fence.wake(memory.range()).unwrap();
            assert_eq!(fence.next(LONG).unwrap(), Some(first));
            assert_eq!(memory.get(0), 0);
        }
        fence.lift(memory.range()).unwrap();
    });
    assert_eq!(memory.get(0), 7);
}

#[test]
fn the_kernel_waits_as_threads_do() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 1);
        let Some(fence) = fence(&[memory.range()]) else { return };
        let source = memfd(1);
        source.write_all_at(&7u64.to_ne_bytes(), 0).unwrap();
        fence.arm(memory.range()).unwrap();
        thread::scope(|scope| {
            let reader = scope.spawn(|| {
                // SAFETY: eight bytes of the mapping, which nobody else has a reference to while this thread runs.
                let bytes = unsafe { std::slice::from_raw_parts_mut(memory.pointer(memory.range()).cast::<u8>(), 8) };
                source.read_exact_at(bytes, 0)
            });
            let waiter = fence.next(LONG).unwrap().unwrap();
            assert_eq!(waiter.address, memory.range().start(), "{kind:?}");
            fence.lift(memory.range()).unwrap();
            reader.join().unwrap().unwrap();
        });
        assert_eq!(memory.get(0), 7, "{kind:?}");
    }
}

#[test]
fn many_waiters_come_with_one_call() {
    const PAGES: u64 = 6;
    let memory = Mapping::new(Kind::Shared, PAGES);
    let Some(fence) = fence(&[memory.range()]) else { return };
    fence.arm(memory.range()).unwrap();
    thread::scope(|scope| {
        for page in 0..PAGES {
            let memory = &memory;
            scope.spawn(move || memory.set(page, page + 1));
        }
        let mut waiters = Vec::new();
        while waiters.len() < PAGES as usize {
            let before = waiters.len();
            let count = fence.next_batch(&mut waiters, LONG).unwrap();
            assert_eq!(waiters.len(), before + count);
            assert_ne!(count, 0);
        }
        waiters.sort_by_key(|waiter| waiter.address);
        let pages: Vec<_> = waiters.iter().map(|waiter| waiter.address).collect();
        assert_eq!(pages, (0..PAGES).map(|page| memory.page(page).start()).collect::<Vec<_>>());
        fence.lift(memory.range()).unwrap();
    });
    assert_eq!((0..PAGES).map(|page| memory.get(page)).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 6]);
}

#[test]
fn several_handlers_let_every_writer_go_on() {
    const WRITERS: u64 = 4;
    let memory = Mapping::new(Kind::Private, WRITERS);
    let Some(fence) = fence(&[memory.range()]) else { return };
    let writing = AtomicU64::new(WRITERS);
    let handled = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(waiter) = fence.next(LONG).unwrap() {
                    handled.fetch_add(1, Ordering::SeqCst);
                    let page = AddrRange::with_len(waiter.address.align_down(page_size()), page_size()).unwrap();
                    fence.lift(page).unwrap();
                }
                assert!(fence.is_stopped());
            });
        }
        for page in 0..WRITERS {
            let (memory, fence, writing) = (&memory, &fence, &writing);
            scope.spawn(move || {
                for round in 1..=500 {
                    fence.arm(memory.page(page)).unwrap();
                    // Only this thread arms and writes this page, and so each write waits.
                    memory.set(page, round);
                }
                if writing.fetch_sub(1, Ordering::SeqCst) == 1 {
                    fence.stop();
                }
            });
        }
    });
    assert_eq!(handled.into_inner(), WRITERS * 500);
    assert!((0..WRITERS).all(|page| memory.get(page) == 500));
    assert_eq!(fence.next(LONG).unwrap(), None);
    assert_eq!(fence.next_batch(&mut Vec::new(), LONG).unwrap(), 0);
}

#[test]
fn what_is_mapped_over_under_the_fence_gets_the_waiters_write() {
    let store = memfd(1);
    store.write_all_at(&[0x55; 8], 0).unwrap();
    let same = u64::from_ne_bytes([0x55; 8]);
    for kind in KINDS {
        let memory = Mapping::new(kind, 3);
        let Some(fence) = fence(&[memory.range()]) else { return };
        memory.set(1, same);
        fence.arm(memory.page(1)).unwrap();
        thread::scope(|scope| {
            let writer = scope.spawn(|| memory.word(1, 3).store(7, Ordering::SeqCst));
            let first = fence.next(LONG).unwrap().unwrap();
            assert_eq!(memory.get(1), word_of(&store, 0));
            memory.map_over(1, &store, 0);
            // Mapping over neither wakes nor keeps the registration.
            assert_eq!(fence.next(Duration::ZERO).unwrap(), None);
            let lapsed = fence.arm(memory.range()).unwrap_err();
            assert!(matches!(lapsed, FenceError::Lapsed { address } if address == memory.page(1).start()), "{lapsed}");
            fence.lift(memory.page(0)).unwrap();
            fence.lift(memory.page(2)).unwrap();

            fence.readmit(memory.page(1)).unwrap();
            assert!(!memory.state(1).write_protected);
            fence.arm(memory.page(1)).unwrap();
            fence.wake(memory.page(1)).unwrap();
            assert_eq!(fence.next(LONG).unwrap(), Some(first));
            assert_eq!(memory.words(1)[3], 0);
            fence.lift(memory.page(1)).unwrap();
            writer.join().unwrap();
        });
        assert_eq!((memory.words(1)[0], memory.words(1)[3]), (same, 7), "{kind:?}");
        assert!(memory.state(1).is_private());
        let mut page = vec![0; page_size() as usize];
        store.read_exact_at(&mut page, 0).unwrap();
        assert!(page[..8].iter().all(|&byte| byte == 0x55) && page[8..].iter().all(|&byte| byte == 0));
    }
}

/// Merges a page with a page of a file whenever both are zero, so many times or until a write was lost; how many were.
/// The writer writes a number, looks whether it stays, and writes zero again.
fn lost_writes(memory: &Mapping, fence: Option<&WriteFence>, merges: u64) -> u64 {
    let store = memfd(1);
    let (lost, done) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            for value in 1.. {
                memory.set(0, value);
                (0..200).for_each(|_| std::hint::spin_loop());
                if memory.get(0) != value {
                    lost.fetch_add(1, Ordering::SeqCst);
                }
                memory.set(0, 0);
                thread::yield_now();
                if done.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        let mut merged = 0;
        while merged < merges && lost.load(Ordering::SeqCst) == 0 {
            if let Some(fence) = fence {
                fence.arm(memory.page(0)).unwrap();
            }
            let same = memory.words(0).iter().all(|&word| word == 0);
            if same {
                // What would be done here takes a while.
                thread::yield_now();
                memory.map_over(0, &store, 0);
                merged += 1;
            }
            if let Some(fence) = fence {
                if same {
                    fence.readmit(memory.page(0)).unwrap();
                    fence.wake(memory.page(0)).unwrap();
                } else {
                    fence.lift(memory.page(0)).unwrap();
                }
            }
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(word_of(&store, 0), 0, "a write reached the file");
    lost.into_inner()
}

#[test]
fn merging_loses_writes_without_the_fence_and_none_with_it() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 1);
        let Some(fence) = fence(&[memory.range()]) else { return };
        assert_eq!(lost_writes(&memory, Some(&fence), 3_000), 0, "{kind:?}");
    }
    let memory = Mapping::new(Kind::Private, 1);
    assert_ne!(lost_writes(&memory, None, 2_000_000), 0);
}

#[test]
fn dropping_the_fence_lets_waiters_go_on() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 4);
        let Some(fence) = fence(&[memory.range()]) else { return };
        fence.arm(memory.range()).unwrap();
        thread::scope(|scope| {
            // Two are told of, two may not have come yet, or were told to nobody.
            let memory = &memory;
            for page in 0..4 {
                scope.spawn(move || memory.set(page, 7));
            }
            fence.next(LONG).unwrap().unwrap();
            fence.next(LONG).unwrap().unwrap();
            drop(fence);
        });
        for page in 0..4 {
            assert_eq!(memory.get(page), 7);
            assert!(!memory.state(page).write_protected, "{kind:?}");
        }
        // And the memory is free for another.
        let Some(_another) = self::fence(&[memory.range()]) else { return };
    }
}

#[test]
fn disbanding_lets_waiters_go_on_and_nobody_waits_again() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 4);
        let Some(fence) = fence(&[memory.range()]) else { return };
        fence.arm(memory.range()).unwrap();
        thread::scope(|scope| {
            let writers: Vec<_> = (0..4)
                .map(|page| {
                    scope.spawn({
                        let memory = &memory;
                        move || memory.word(page, 0).fetch_add(1, Ordering::SeqCst)
                    })
                })
                .collect();
            // All of them wait: each was told of.
            for _ in 0..4 {
                assert!(fence.next(LONG).unwrap().is_some());
            }
            fence.disband().unwrap();
            writers.into_iter().for_each(|writer| assert_eq!(writer.join().unwrap(), 0));
        });
        assert!(matches!(fence.arm(memory.range()), Err(FenceError::Disbanded { .. })));
        assert!(matches!(fence.readmit(memory.range()), Err(FenceError::Disbanded { .. })));
        memory.word(1, 0).fetch_add(1, Ordering::SeqCst);
        // There is nothing to be lifted, and that is no reason to wait.
        assert!(matches!(fence.lift(memory.range()), Err(FenceError::Lapsed { .. })));
        fence.disband().unwrap();
    }
}

#[test]
fn a_write_through_another_mapping_is_not_stopped() {
    let memory = Mapping::new(Kind::Shared, 1);
    let other = Mapping::of(memory.file.as_ref().unwrap().try_clone().unwrap(), Kind::Shared, 1);
    let Some(fence) = fence(&[memory.range()]) else { return };
    fence.arm(memory.range()).unwrap();
    other.set(0, 7);
    assert_eq!(memory.get(0), 7);
    assert_eq!(fence.next(Duration::ZERO).unwrap(), None);
}

#[test]
fn a_writer_of_an_absent_page_makes_the_page_before_it_waits() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 2);
        let Some(fence) = fence(&[memory.range()]) else { return };
        if let Some(file) = &memory.file {
            file.write_all_at(&5u64.to_ne_bytes(), 0).unwrap();
        }
        // The second page was read before, the first was not.
        assert_eq!(memory.get(1), 0);
        fence.arm(memory.range()).unwrap();
        assert!(!memory.state(0).present, "{kind:?}");
        for page in [0, 1] {
            thread::scope(|scope| {
                scope.spawn(|| memory.word(page, 1).store(7, Ordering::SeqCst));
                fence.next(LONG).unwrap().unwrap();
                let state = memory.state(page);
                assert!(state.present && state.write_protected, "{kind:?}: {state:?}");
                let is_copy = match kind {
                    Kind::Anonymous => true,
                    Kind::Shared => false,
                    // Copied by the fault that found nothing, and not yet by the one that found the file's page.
                    Kind::Private => page == 0,
                };
                assert_eq!(state.is_private(), is_copy, "{kind:?}: page {page}: {state:?}");
                assert_eq!(memory.words(page)[1], 0);
                fence.lift(memory.page(page)).unwrap();
            });
            assert_eq!(memory.words(page)[1], 7);
        }
        assert_eq!(memory.get(0), if kind == Kind::Anonymous { 0 } else { 5 });
    }
}

#[test]
fn reading_an_absent_armed_page_leaves_it_armed() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 1);
        let Some(fence) = fence(&[memory.range()]) else { return };
        fence.arm(memory.range()).unwrap();
        assert_eq!(memory.get(0), 0);
        thread::scope(|scope| {
            scope.spawn(|| memory.set(0, 7));
            fence.next(LONG).unwrap().unwrap();
            assert_eq!(memory.get(0), 0);
            fence.lift(memory.range()).unwrap();
        });
    }
}

#[test]
fn a_private_copy_is_not_the_files_page() {
    let memory = Mapping::new(Kind::Private, 1);
    assert_eq!(memory.get(0), 0);
    let before = memory.state(0);
    assert!(before.present && before.file && !before.is_private());
    memory.set(0, 7);
    let after = memory.state(0);
    assert!(after.present && !after.file && after.is_private());
}

#[test]
fn ranges_that_the_fence_was_not_made_for_are_named() {
    let memory = Mapping::new(Kind::Anonymous, 8);
    let Some(fence) = fence(&[memory.part(4, 2), memory.part(1, 1), memory.part(2, 2)]) else { return };
    assert_eq!(fence.ranges(), [memory.part(1, 5)]);
    let foreign = |result: Result<(), FenceError>| match result {
        Err(FenceError::Foreign { address }) => address,
        other => panic!("{other:?}"),
    };
    assert_eq!(foreign(fence.arm(memory.part(0, 3))), memory.page(0).start());
    assert_eq!(foreign(fence.lift(memory.part(5, 2))), memory.page(6).start());
    assert_eq!(foreign(fence.readmit(memory.page(7))), memory.page(7).start());
    assert_eq!(foreign(fence.wake(memory.range())), memory.page(0).start());
    assert!((0..8).all(|page| !memory.state(page).write_protected));

    let crooked = AddrRange::with_len(memory.page(2).start().wrapping_add(1), page_size()).unwrap();
    let error = fence.arm(crooked).unwrap_err();
    assert!(matches!(error, FenceError::Unaligned { range, .. } if range == crooked), "{error}");
    let error = WriteFence::new(&Kernel::new(), &[crooked]).unwrap_err();
    let FenceError::Register(RegisterError::Unaligned { range, .. }) = error else { panic!("{error}") };
    assert_eq!(range, crooked);
}

#[test]
fn memory_of_another_fence_is_busy_and_no_memory_is_unfit() {
    let memory = Mapping::new(Kind::Shared, 2);
    let Some(_fence) = fence(&[memory.page(1)]) else { return };
    let error = WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap_err();
    let FenceError::Register(RegisterError::Busy { range }) = error else { panic!("{error}") };
    assert_eq!(range, memory.range());
    // What was registered of it on the way is free again.
    assert!(fence(&[memory.page(0)]).is_some());

    // The first page of the address space belongs to nobody.
    let nothing = AddrRange::with_len(Hva::new(0), page_size()).unwrap();
    let error = WriteFence::new(&Kernel::new(), &[nothing]).unwrap_err();
    assert!(matches!(error, FenceError::Register(RegisterError::Unfit { .. })), "{error}");
}

#[test]
fn a_fence_is_for_many_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<WriteFence>();
}

#[test]
fn what_is_dropped_stays_armed_in_mappings_of_files_alone() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 1);
        let Some(fence) = fence(&[memory.range()]) else { return };
        memory.set(0, 1);
        fence.arm(memory.range()).unwrap();
        let (at, len) = (memory.pointer(memory.range()), page_size() as usize);
        // SAFETY: the mapping's contents may change at any time.
        unsafe { rustix::mm::madvise(at, len, rustix::mm::Advice::LinuxDontNeed) }.unwrap();
        if kind == Kind::Anonymous {
            memory.set(0, 7);
            assert_eq!(fence.next(Duration::ZERO).unwrap(), None);
            continue;
        }
        let armed_and_absent = memory.state(0);
        assert!(armed_and_absent.write_protected && !armed_and_absent.present, "{kind:?}: {armed_and_absent:?}");
        thread::scope(|scope| {
            scope.spawn(|| memory.set(0, 7));
            fence.next(LONG).unwrap().unwrap();
            fence.lift(memory.range()).unwrap();
        });
        assert_eq!(memory.get(0), 7);
    }
}
