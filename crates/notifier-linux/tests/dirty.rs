// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The filter tells of every write once, and of nothing else. In memory of each kind.
#![cfg(target_os = "linux")]

mod mappings;

use std::{
    io::Write,
    os::unix::fs::FileExt,
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use mappings::{KINDS, Kind, Mapping, memfd, page_size};
use notifier_core::{AddrRange, Hva, HvaRange};
use notifier_linux::{DirtyError, DirtyFilter, Kernel, RegisterError, WriteFence};

/// A filter, or a line that says what is missing.
fn filter(ranges: &[HvaRange]) -> Option<DirtyFilter> {
    match DirtyFilter::new(&Kernel::new(), ranges) {
        Err(DirtyError::Register(RegisterError::Missing(missing))) => {
            let _ = writeln!(std::io::stderr(), "not tested: {missing}");
            None
        }
        filter => Some(filter.unwrap()),
    }
}

#[test]
fn a_write_is_told_once_and_a_read_never() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 16);
        // Some pages were written before, some read, some never touched.
        (0..4).for_each(|page| memory.set(page, 1));
        (4..8).for_each(|page| assert_eq!(memory.get(page), 0));
        let Some(filter) = filter(&[memory.range()]) else { return };
        assert_eq!(filter.written(memory.range()).unwrap(), [], "{kind:?}");
        (0..16).for_each(|page| drop(memory.words(page)));
        assert_eq!(filter.written(memory.range()).unwrap(), [], "{kind:?}: reads count");

        for page in [1, 5, 6, 15] {
            memory.set(page, 7);
        }
        let expected = [memory.page(1), memory.part(5, 2), memory.page(15)];
        assert_eq!(filter.peek(memory.range()).unwrap(), expected, "{kind:?}");
        assert_eq!(filter.peek(memory.part(4, 2)).unwrap(), [memory.page(5)]);
        assert_eq!(filter.written(memory.part(0, 6)).unwrap(), [memory.page(1), memory.page(5)]);
        assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(6), memory.page(15)]);
        assert_eq!(filter.written(memory.range()).unwrap(), []);

        // The second write counts as the first did.
        memory.set(5, 8);
        let rest = [memory.part(0, 5), memory.part(6, 10)];
        assert_eq!(filter.unwritten(memory.range()).unwrap(), rest);
        assert_eq!(filter.unwritten(memory.range()).unwrap(), [memory.range()]);
    }
}

#[test]
fn the_kernels_own_writes_count() {
    let source = memfd(1);
    for kind in KINDS {
        let memory = Mapping::new(kind, 2);
        let Some(filter) = filter(&[memory.range()]) else { return };
        {
            // SAFETY: eight bytes of the mapping, which nobody else has a reference to meanwhile.
            let bytes = unsafe { std::slice::from_raw_parts_mut(memory.pointer(memory.page(1)).cast::<u8>(), 8) };
            source.read_exact_at(bytes, 0).unwrap();
        }
        assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(1)], "{kind:?}");
    }
}

#[test]
fn more_regions_than_one_scan_returns_are_all_told() {
    const PAGES: u64 = 4 * 1024;
    for kind in KINDS {
        let memory = Mapping::new(kind, PAGES);
        let Some(filter) = filter(&[memory.range()]) else { return };
        (0..PAGES).step_by(2).for_each(|page| memory.set(page, 1));
        let expected: Vec<_> = (0..PAGES).step_by(2).map(|page| memory.page(page)).collect();
        assert_eq!(filter.peek(memory.range()).unwrap(), expected);
        assert_eq!(filter.written(memory.range()).unwrap(), expected, "{kind:?}");
        assert_eq!(filter.written(memory.range()).unwrap(), []);
    }
}

#[test]
fn every_write_is_in_this_answer_or_the_next() {
    const PAGES: u64 = 64;
    const WRITERS: u64 = 3;
    const QUESTIONS: u64 = 300;
    for kind in KINDS {
        let memory = Mapping::new(kind, PAGES);
        let Some(filter) = filter(&[memory.range()]) else { return };
        let done = AtomicBool::new(false);
        let read = |page: u64| (0..WRITERS).map(|word| memory.word(page, word).load(Ordering::SeqCst)).collect();
        let all = || (0..PAGES).map(read).collect::<Vec<Vec<u64>>>();
        // What each page held, word by word, when the filter last told of it.
        let mut known = all();
        let mut ask = || {
            let written = filter.written(memory.range()).unwrap();
            for page in (0..PAGES).filter(|&page| written.iter().any(|range| range.covers(&memory.page(page)))) {
                known[page as usize] = read(page);
            }
            known.clone()
        };
        // A failure is told when the writers have ended.
        let mut lost = None;
        thread::scope(|scope| {
            for writer in 0..WRITERS {
                let (memory, done) = (&memory, &done);
                scope.spawn(move || {
                    for round in 1.. {
                        // Each writer goes round with a stride of its own.
                        for step in 0..PAGES {
                            memory.word(step * (2 * writer + 1) % PAGES, writer).store(round, Ordering::SeqCst);
                        }
                        if done.load(Ordering::SeqCst) {
                            break;
                        }
                        thread::yield_now();
                    }
                });
            }
            for _ in 0..QUESTIONS {
                // A write that ended before the question is known after the answer, from this one or one before.
                let ended = all();
                let known = ask();
                let behind = |page: &usize| ended[*page].iter().zip(&known[*page]).any(|(ended, known)| known < ended);
                lost = lost.or((0..PAGES as usize).find(behind));
                // Somebody writes between two questions.
                while all() == ended {
                    thread::yield_now();
                }
            }
            done.store(true, Ordering::SeqCst);
        });
        assert_eq!(lost, None, "{kind:?}: a write to this page was not told of");
        assert_eq!(ask(), all(), "{kind:?}: the last question finds the last writes");
    }
}

#[test]
fn what_is_mapped_over_counts_as_written_once_it_is_readmitted() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 8);
        let Some(filter) = filter(&[memory.range()]) else { return };
        let store = memfd(1);
        memory.set(1, 1);
        memory.map_over(3, &store, 0);
        memory.set(6, 1);
        for answer in [filter.written(memory.range()), filter.peek(memory.range())] {
            let lapsed = answer.unwrap_err();
            assert!(matches!(lapsed, DirtyError::Lapsed { address } if address == memory.page(3).start()), "{lapsed}");
        }
        filter.readmit(memory.page(3)).unwrap();
        let found = filter.peek(memory.range()).unwrap();
        // Nothing that was found or not reached by the answer that failed is lost; more may count.
        for page in [1, 3, 6] {
            assert!(found.iter().any(|range| range.covers(&memory.page(page))), "{kind:?}: {found:?}");
        }
        assert_eq!(filter.written(memory.range()).unwrap(), found);
        assert_eq!(filter.written(memory.range()).unwrap(), []);
        // It is like any other page now, and the file is as it was.
        assert_eq!(memory.get(3), 0);
        assert_eq!(filter.written(memory.range()).unwrap(), []);
        memory.set(3, 9);
        assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(3)], "{kind:?}");
        assert_eq!(mappings::word_of(&store, 0), 0);
    }
}

#[test]
fn what_is_dropped_and_written_again_counts() {
    for kind in KINDS {
        let memory = Mapping::new(kind, 4);
        let Some(filter) = filter(&[memory.range()]) else { return };
        memory.set(1, 1);
        assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(1)]);
        // SAFETY: the mapping's contents may change at any time.
        unsafe {
            rustix::mm::madvise(memory.pointer(memory.page(1)), page_size() as usize, rustix::mm::Advice::LinuxDontNeed)
        }
        .unwrap();
        memory.set(1, 2);
        assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(1)], "{kind:?}");
        assert_eq!(filter.written(memory.range()).unwrap(), []);
    }
}

#[test]
fn a_write_through_another_mapping_does_not_count() {
    let memory = Mapping::new(Kind::Shared, 2);
    let other = Mapping::of(memory.file.as_ref().unwrap().try_clone().unwrap(), Kind::Shared, 2);
    let Some(filter) = filter(&[memory.range()]) else { return };
    other.set(0, 7);
    memory.set(1, 7);
    assert_eq!(memory.get(0), 7);
    assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(1)]);
}

#[test]
fn a_fence_and_a_filter_exclude_each_other() {
    let memory = Mapping::new(Kind::Anonymous, 4);
    let Some(filter) = filter(&[memory.part(0, 2)]) else { return };
    let error = WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap_err().to_string();
    assert!(error.contains("another userfaultfd") && error.contains(&memory.range().to_string()), "{error}");
    drop(filter);
    let _fence = WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap();
    let error = DirtyFilter::new(&Kernel::new(), &[memory.page(3)]).unwrap_err();
    assert!(matches!(error, DirtyError::Register(RegisterError::Busy { range }) if range == memory.page(3)), "{error}");
}

#[test]
fn ranges_that_the_filter_was_not_made_for_are_named() {
    let memory = Mapping::new(Kind::Anonymous, 4);
    let Some(filter) = filter(&[memory.part(1, 2)]) else { return };
    assert_eq!(filter.ranges(), [memory.part(1, 2)]);
    let foreign = |error| matches!(error, DirtyError::Foreign { address } if address == memory.page(3).start());
    assert!(foreign(filter.written(memory.part(1, 3)).unwrap_err()));
    assert!(foreign(filter.unwritten(memory.page(3)).unwrap_err()));
    assert!(foreign(filter.peek(memory.part(2, 2)).unwrap_err()));
    assert!(foreign(filter.readmit(memory.part(2, 2)).unwrap_err()));
    let crooked = AddrRange::with_len(memory.page(1).start(), 17).unwrap();
    let error = filter.written(crooked).unwrap_err();
    assert!(matches!(error, DirtyError::Unaligned { range, .. } if range == crooked), "{error}");
    let nothing = AddrRange::with_len(Hva::new(0), page_size()).unwrap();
    let error = DirtyFilter::new(&Kernel::new(), &[nothing]).unwrap_err();
    assert!(matches!(error, DirtyError::Register(RegisterError::Unfit { .. })), "{error}");
}
