// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every call that guest RAM makes fails, each in its turn; and what is so after that.
#![cfg(target_os = "linux")]

mod support;

use std::{
    collections::BTreeSet,
    fs::File,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use notifier_core::{Access, GpaRange};
use notifier_linux::{Batch, Call, GuestRam, Kernel, OperationError, RamError, VmaBudget};
use support::*;
use vm_memory::GuestMemoryMmap;

/// `EIO`: a number that none of the calls gives by itself here.
const EIO: i32 = 5;

/// What an operation does, for the test's own account.
#[derive(Debug, Clone, Copy)]
enum Do {
    Discard,
    /// From this page of the test's source on.
    Replace(u64),
    Protect(Access),
}

type Operation = (u64, u64, Do);

/// A state to begin with, and a batch.
struct Scene {
    name: &'static str,
    before: &'static [Operation],
    /// Pages that the guest writes to then.
    written: &'static [u64],
    batch: &'static [Operation],
}

const SCENES: &[Scene] = &[
    Scene { name: "discard", before: &[], written: &[5], batch: &[(4, 4, Do::Discard)] },
    Scene { name: "replace", before: &[], written: &[5], batch: &[(4, 4, Do::Replace(0))] },
    Scene { name: "protect", before: &[], written: &[], batch: &[(4, 4, Do::Protect(Access::READ))] },
    Scene {
        name: "discard what was replaced",
        before: &[(5, 2, Do::Replace(1))],
        written: &[],
        batch: &[(4, 4, Do::Discard)],
    },
    Scene {
        name: "replace what was replaced",
        before: &[(4, 2, Do::Replace(1)), (6, 1, Do::Replace(9))],
        written: &[],
        batch: &[(3, 6, Do::Replace(4))],
    },
    Scene {
        name: "replace by what is there",
        before: &[(4, 2, Do::Replace(1)), (6, 1, Do::Replace(9))],
        written: &[5],
        batch: &[(4, 4, Do::Replace(1))],
    },
    Scene {
        name: "protect what differs",
        before: &[(4, 2, Do::Replace(1)), (6, 1, Do::Protect(Access::READ)), (8, 2, Do::Discard)],
        written: &[4],
        batch: &[(3, 8, Do::Protect(Access::empty())), (12, 2, Do::Protect(Access::READ))],
    },
    Scene {
        name: "one of each",
        before: &[],
        written: &[2, 5],
        batch: &[
            (20, 2, Do::Protect(Access::READ)),
            (2, 3, Do::Discard),
            (5, 2, Do::Replace(0)),
            (10, 2, Do::Replace(6)),
        ],
    },
    Scene {
        name: "what can be undone, then what cannot",
        before: &[(2, 2, Do::Replace(1)), (12, 3, Do::Replace(8))],
        written: &[13],
        batch: &[
            (2, 2, Do::Replace(9)),
            (20, 2, Do::Replace(3)),
            (24, 2, Do::Protect(Access::READ)),
            (12, 4, Do::Discard),
            (17, 1, Do::Replace(1)),
        ],
    },
];

fn add<'r>(mut batch: Batch<'r>, operations: &[Operation], file: &Arc<File>) -> Batch<'r> {
    for &(first, count, what) in operations {
        batch = match what {
            Do::Discard => batch.discard(guest(first, count)),
            Do::Replace(from) => batch.replace(page_at(first), &source(file, from), count * PAGE),
            Do::Protect(access) => batch.protect(guest(first, count), access),
        };
    }
    batch
}

/// What is on a page (a page whose rights forbid reading is looked at through other rights), and its rights.
type Page = (u8, Access);

fn apply(pages: &mut [Page], operations: &[Operation]) {
    for &(first, count, what) in operations {
        for page in first..first + count {
            let (number, access) = &mut pages[page as usize];
            match what {
                Do::Discard => *number = 0,
                Do::Replace(from) => *number = (100 + from + page - first) as u8,
                Do::Protect(new) => *access = new,
            }
        }
    }
}

struct Stage {
    bench: Bench,
    file: Arc<File>,
    before: Vec<Page>,
}

fn set(kind: Kind, scene: &Scene) -> Stage {
    let bench = Bench::new(kind);
    let file = filled(100, 16);
    let mut before: Vec<Page> = (0..PAGES).map(|page| (page as u8 + 1, Access::RW)).collect();
    add(bench.ram.batch(), scene.before, &file).run().unwrap();
    apply(&mut before, scene.before);
    for &page in scene.written {
        bench.write(page, 200 + page as u8);
        before[page as usize].0 = 200 + page as u8;
    }
    bench.log.take();
    Stage { bench, file, before }
}

impl Stage {
    fn assert_pages(&self, expected: &[Page], what: &str) {
        self.bench.assert_true();
        let mut raised = Vec::new();
        for (page, &(number, access)) in (0..).zip(expected) {
            assert_eq!(self.bench.ram.access_at(page_at(page)), Some(access), "page {page}: {what}");
            if !access.contains(Access::READ) {
                self.bench.ram.protect(guest(page, 1), Access::READ).unwrap();
                raised.push((page, access));
            }
            assert_eq!(self.bench.read(page), contents(number), "page {page}: {what}");
        }
        for (page, access) in raised {
            self.bench.ram.protect(guest(page, 1), access).unwrap();
        }
    }

    /// What an error says about each page.
    fn after(&self, batch: &[Operation], error: &OperationError) -> Vec<Page> {
        let mut pages = self.before.clone();
        for &operation in &error.standing {
            apply(&mut pages, &batch[operation..=operation]);
        }
        for page in 0..PAGES {
            if error.lost.iter().any(|lost| lost.overlaps(&guest(page, 1))) {
                // Zero, the source, or the guest's own copy of the page: whatever it is, it is the same all over.
                let now = self.bench.read(page)[0];
                let replaced = match batch[error.operation] {
                    (first, _, Do::Replace(from)) => (100 + from + page.wrapping_sub(first)) as u8,
                    _ => 0,
                };
                let old = pages[page as usize].0;
                let copy = self.bench.kind == Kind::Private && now == old && now > 200;
                assert!(now == 0 || now == replaced || copy, "page {page} shows {now}: {error}");
                pages[page as usize].0 = now;
            }
        }
        pages
    }
}

fn failed(error: RamError) -> Option<Box<OperationError>> {
    match error {
        RamError::Failed(error) => Some(error),
        _ => None,
    }
}

#[test]
fn whichever_call_fails_the_error_says_what_is_so_and_the_batch_can_be_repeated() {
    let mut seen = BTreeSet::new();
    for kind in KINDS {
        for scene in SCENES {
            let stage = set(kind, scene);
            add(stage.bench.ram.batch(), scene.batch, &stage.file).run().unwrap();
            let calls = stage.bench.log.calls();
            let mut whole = stage.before.clone();
            apply(&mut whole, scene.batch);
            stage.assert_pages(&whole, scene.name);
            assert!(!calls.is_empty());

            for (nth, &call) in calls.iter().enumerate() {
                let what = format!("{kind:?}, {}, call {nth} ({call}) failed", scene.name);
                let stage = set(kind, scene);
                let bench = &stage.bench;
                bench.log.fail(nth, EIO, true);
                let result = add(bench.ram.batch(), scene.batch, &stage.file).run();
                bench.log.heal();
                bench.assert_at_rest();
                seen.insert(call.name());
                match (call, result) {
                    // Without it no page is taken to be recoverable.
                    (Call::ReadPagemap, Ok(())) => stage.assert_pages(&whole, &what),
                    (Call::FileFacts, Err(RamError::Call { call: Call::FileFacts, source, .. })) => {
                        assert_eq!(source.raw_os_error(), Some(EIO));
                        stage.assert_pages(&stage.before, &what);
                    }
                    (_, Err(error)) => {
                        let text = error.to_string();
                        let error = failed(error).unwrap_or_else(|| panic!("{what}: {text}"));
                        assert_eq!((error.call, error.source.raw_os_error()), (call, Some(EIO)), "{what}");
                        assert!(text.contains(&error.at.to_string()) && text.contains(call.name()), "{text}");
                        let (first, count, _) = scene.batch[error.operation];
                        assert!(guest(first, count).contains(error.at), "{what}: {text}");
                        assert!(error.undo.is_none() && error.holes.is_empty() && error.filled.is_empty(), "{what}");
                        assert!(error.undone.iter().all(|done| !error.standing.contains(done)), "{what}: {error:?}");
                        stage.assert_pages(&stage.after(scene.batch, &error), &format!("{what}: {error:?}"));
                    }
                    (_, Ok(())) => panic!("{what}, and nobody heard of it"),
                }
                add(bench.ram.batch(), scene.batch, &stage.file).run().unwrap();
                // Memory was given back all the same. (Counted before anybody looks: reading a hole of a shared file
                // fills it. So a scene that began with one tells nothing.)
                let began_with_holes = scene.before.iter().any(|(_, _, what)| matches!(what, Do::Discard));
                if let (Kind::Shared, Some(home), false) = (kind, &bench.home, began_with_holes) {
                    let away = whole.iter().filter(|(number, _)| *number == 0 || (100..120).contains(number)).count();
                    assert_eq!(resident(home), (PAGES - away as u64) * PAGE, "{what}");
                }
                stage.assert_pages(&whole, &format!("{what}, and was repeated"));
                bench.assert_at_rest();
            }
        }
    }
    for call in [Call::MapFile, Call::MapAnonymous, Call::Protect, Call::Discard, Call::PunchHole, Call::ReadPagemap] {
        assert!(seen.contains(call.name()), "{call} was never made");
    }
}

/// Undoing fails too, for nothing works any more.
#[test]
fn when_undoing_fails_too_ram_still_knows_what_is_mapped() {
    let mut undoing = 0;
    for kind in KINDS {
        for scene in SCENES {
            let count = {
                let stage = set(kind, scene);
                add(stage.bench.ram.batch(), scene.batch, &stage.file).run().unwrap();
                stage.bench.log.calls().len()
            };
            for nth in 0..count {
                let stage = set(kind, scene);
                let bench = &stage.bench;
                bench.log.fail(nth, EIO, false);
                let error = add(bench.ram.batch(), scene.batch, &stage.file).run().unwrap_err();
                bench.log.heal();
                bench.assert_at_rest();
                bench.assert_true();
                if let Some(error) = failed(error) {
                    let (undo, text) = (error.undo.as_ref(), error.to_string());
                    assert!(undo.is_none_or(|undo| text.contains(&undo.at.to_string())), "{text}");
                    undoing += usize::from(undo.is_some());
                    for &index in &error.undone {
                        let (first, count, _) = scene.batch[index];
                        for page in first..first + count {
                            let (number, access) = stage.before[page as usize];
                            assert_eq!(bench.ram.access_at(page_at(page)), Some(access));
                            assert!(!access.contains(Access::READ) || bench.read(page) == contents(number), "{text}");
                        }
                    }
                }
                add(bench.ram.batch(), scene.batch, &stage.file).run().unwrap();
                let mut whole = stage.before.clone();
                apply(&mut whole, scene.batch);
                stage.assert_pages(&whole, scene.name);
            }
        }
    }
    assert!(undoing > 10, "{undoing}");
}

/// A page that was replaced, whose home could not be given back, and which could not be mapped back either.
fn with_a_home_that_was_kept(source_of: &Arc<File>) -> Bench {
    let bench = Bench::new(Kind::Shared);
    let maps = AtomicUsize::new(0);
    bench.log.answer(move |call| match call {
        Call::PunchHole => Err(io::Error::from_raw_os_error(EIO)),
        Call::MapFile if maps.fetch_add(1, Ordering::Relaxed) >= 1 => Err(io::Error::from_raw_os_error(EIO)),
        _ => Ok(()),
    });
    let error = failed(bench.ram.replace(page_at(4), &source(source_of, 0), PAGE).unwrap_err()).unwrap();
    assert_eq!((error.call, &*error.standing), (Call::PunchHole, &[0][..]), "{error:?}");
    bench.log.heal();
    bench
}

#[test]
fn a_home_that_was_kept_is_given_back_when_replacing_is_repeated() {
    let file = filled(100, 8);
    // What happens to the page in between gives nothing back, and is not taken to have done so.
    let between: [&dyn Fn(&Bench); 3] =
        [&|_| (), &|bench| bench.ram.protect(guest(4, 1), Access::READ).unwrap(), &|bench| {
            let seen = AtomicUsize::new(0);
            bench.log.answer(move |call| match call {
                Call::Protect if seen.fetch_add(1, Ordering::Relaxed) == 1 => Err(io::Error::from_raw_os_error(EIO)),
                _ => Ok(()),
            });
            let batch = bench.ram.batch().protect(guest(4, 1), Access::READ).protect(guest(9, 1), Access::READ);
            let error = failed(batch.run().unwrap_err()).unwrap();
            assert_eq!(error.undone, [0], "{error:?}");
            bench.log.heal();
        }];
    for between in between {
        let bench = with_a_home_that_was_kept(&file);
        let home = bench.home.clone().unwrap();
        assert_eq!(resident(&home), PAGES * PAGE);
        between(&bench);
        bench.ram.replace(page_at(4), &source(&file, 0), PAGE).unwrap();
        assert_eq!(resident(&home), (PAGES - 1) * PAGE);
        bench.log.take();
        bench.ram.replace(page_at(4), &source(&file, 1), PAGE).unwrap();
        assert!(!bench.log.calls().contains(&Call::PunchHole), "there is nothing left to give back");
        bench.assert_true();
    }
}

#[test]
fn rights_that_could_not_be_put_back_are_named_and_are_set_by_the_next_protect() {
    let bench = Bench::new(Kind::Anonymous);
    bench.ram.protect(guest(5, 1), Access::READ).unwrap();
    // Page 4 is protected, page 5 is so already, page 6 fails; page 4 cannot be put back.
    let made = AtomicUsize::new(0);
    bench.log.answer(move |call| match call {
        Call::Protect if made.fetch_add(1, Ordering::Relaxed) >= 1 => Err(io::Error::from_raw_os_error(EIO)),
        _ => Ok(()),
    });
    let error = failed(bench.ram.protect(guest(4, 3), Access::READ).unwrap_err()).unwrap();
    bench.log.heal();
    assert_eq!((error.operation, &*error.standing), (0, &[0][..]), "{error:?}");
    assert!(error.undo.is_some(), "{error:?}");
    bench.assert_true();
    bench.log.take();
    bench.ram.protect(guest(4, 1), Access::READ).unwrap();
    assert_eq!(bench.log.calls(), [Call::Protect], "what is not sure is set");
    bench.ram.protect(guest(4, 1), Access::READ).unwrap();
    assert_eq!(bench.log.calls(), []);
    bench.ram.protect(guest(6, 1), Access::RW).unwrap();
    assert_eq!(bench.log.calls(), [Call::Protect], "what failed is not sure either");
    bench.assert_true();
    bench.ram.protect(guest(0, PAGES), Access::RW).unwrap();
    assert_eq!(bench.mappings(), 1);
    bench.assert_pages(|page| page as u8 + 1);
}

#[test]
fn undone_operations_are_named() {
    let stage = set(Kind::Shared, &SCENES[8]);
    let bench = &stage.bench;
    // The last map: all before it but the discard of a page with a private copy can be undone.
    bench.log.answer({
        let seen = std::sync::atomic::AtomicUsize::new(0);
        move |call| match call {
            Call::MapFile if seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed) == 3 => {
                Err(io::Error::from_raw_os_error(EIO))
            }
            _ => Ok(()),
        }
    });
    let error = add(bench.ram.batch(), SCENES[8].batch, &stage.file).run().unwrap_err();
    bench.log.heal();
    let error = failed(error).unwrap();
    assert_eq!((error.operation, &*error.undone, &*error.standing), (4, &[0, 1, 2][..], &[3][..]), "{error}");
    stage.assert_pages(&stage.after(SCENES[8].batch, &error), &error.to_string());
}

/// A kernel that takes the old mapping away before it fails.
fn with_hole(kind: Kind, scene: &Scene, wanted: Call, also: Option<Call>) -> (Stage, Box<OperationError>) {
    let stage = set(kind, scene);
    let bench = &stage.bench;
    let host = bench.host(4, 3);
    let done = Mutex::new(false);
    bench.log.answer(move |call| {
        if Some(call) == also {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        if call == wanted && !std::mem::replace(&mut *done.lock().unwrap(), true) {
            let at = std::ptr::with_exposed_provenance_mut(host.start().as_u64() as usize);
            // SAFETY: pages of the test's own guest memory, which nobody touches meanwhile.
            unsafe { rustix::mm::munmap(at, host.len() as usize) }.unwrap();
            return Err(io::Error::from_raw_os_error(12));
        }
        Ok(())
    });
    let error = add(bench.ram.batch(), scene.batch, &stage.file).run().unwrap_err();
    bench.log.heal();
    bench.assert_at_rest();
    (stage, failed(error).unwrap())
}

#[test]
fn a_hole_is_filled_before_anything_else_lands_there() {
    for kind in KINDS {
        for also in [None, Some(Call::FindHole)] {
            let (stage, error) = with_hole(kind, &SCENES[1], Call::MapFile, also);
            let bench = &stage.bench;
            bench.assert_true();
            assert!(error.holes.is_empty() && error.undo.is_none(), "{error:?}");
            let mut expected = stage.before.clone();
            match kind {
                // Nothing was lost: the file has it.
                Kind::Shared => assert!(error.filled.is_empty() && error.lost.is_empty(), "{error:?}"),
                _ => {
                    let bytes = |ranges: &[GpaRange]| ranges.iter().map(|range| range.len()).sum::<u64>();
                    assert_eq!((bytes(&error.filled), bytes(&error.lost)), (3 * PAGE, 3 * PAGE), "{error:?}");
                    assert!(error.lost.iter().all(|lost| guest(4, 3).covers(lost)), "{error:?}");
                    expected[4..7].iter_mut().for_each(|page| page.0 = 0);
                }
            }
            stage.assert_pages(&expected, &error.to_string());
            add(bench.ram.batch(), SCENES[1].batch, &stage.file).run().unwrap();
            apply(&mut expected, SCENES[1].batch);
            stage.assert_pages(&expected, "repeated");
            // And home again, zeros or not.
            bench.ram.discard(guest(0, PAGES)).unwrap();
            expected.iter_mut().for_each(|page| page.0 = 0);
            stage.assert_pages(&expected, "home");
        }
    }
}

#[test]
fn a_hole_that_cannot_be_filled_is_named() {
    let (stage, error) = with_hole(Kind::Anonymous, &SCENES[1], Call::MapFile, Some(Call::FillHole));
    assert_eq!(error.holes, [guest(4, 4)], "{error:?}");
    assert!(error.to_string().contains(&format!("nothing is mapped at {}", guest(4, 4))), "{error}");
    // Nothing is mapped there, so that nothing may look.
    add(stage.bench.ram.batch(), SCENES[1].batch, &stage.file).run().unwrap();
    let mut expected = stage.before.clone();
    apply(&mut expected, SCENES[1].batch);
    stage.assert_pages(&expected, "repeated");
}

#[test]
fn discarding_a_hole_maps_it_anew() {
    for kind in KINDS {
        let (stage, error) = with_hole(kind, &SCENES[1], Call::MapFile, Some(Call::FillHole));
        let bench = &stage.bench;
        assert_eq!(error.holes, [guest(4, 4)], "{error:?}");
        bench.ram.discard(guest(4, 4)).unwrap();
        let mut expected = stage.before.clone();
        expected[4..8].iter_mut().for_each(|page| page.0 = 0);
        stage.assert_pages(&expected, &format!("{kind:?}"));
    }
}

#[test]
fn what_cannot_be_faulted_in_ahead_is_there_all_the_same() {
    let bench = Bench::new(Kind::Anonymous);
    let file = filled(100, 8);
    bench.log.answer(|call| match call {
        Call::PopulateRead => Err(io::Error::from_raw_os_error(EIO)),
        _ => Ok(()),
    });
    let from = source(&file, 0).populated();
    let error = bench.ram.replace(page_at(4), &from, 2 * PAGE).unwrap_err();
    assert!(matches!(error, RamError::Populate { at, .. } if at == page_at(4)), "{error:?}");
    assert!(error.to_string().contains(&page_at(4).to_string()), "{error}");
    bench.assert_at_rest();
    bench.assert_true();
    bench.assert_pages(|page| if page == 4 || page == 5 { 96 + page as u8 } else { page as u8 + 1 });
    let error = bench.ram.populate(guest(8, 1)).unwrap_err();
    assert!(matches!(error, RamError::Call { call: Call::PopulateRead, at, .. } if at == page_at(8)), "{error:?}");
    bench.log.heal();
    bench.ram.replace(page_at(4), &from, 2 * PAGE).unwrap();
    bench.ram.populate(guest(8, 1)).unwrap();
}

/// One whose `end` panics, which is all that keeps a window from closing.
struct Breaks;

impl notifier_core::Subscriber for Breaks {
    fn start(&self, _: &notifier_core::Coverage<'_>) -> Result<(), notifier_core::SubscriberError> {
        Ok(())
    }
    fn zap(&self, _: &notifier_core::Coverage<'_>) -> Result<(), notifier_core::SubscriberError> {
        Ok(())
    }
    fn end(&self, _: &notifier_core::Coverage<'_>) -> Result<(), notifier_core::SubscriberError> {
        panic!("this end is meant to break")
    }
}

#[test]
fn a_window_that_does_not_close_is_told_of_also_where_a_call_failed() {
    let fails = |wanted| move |call| if call == wanted { Err(io::Error::from_raw_os_error(EIO)) } else { Ok(()) };
    let file = filled(100, 8);
    let bench = Bench::new(Kind::Anonymous);
    let subscription = bench.space.subscribe(Breaks).unwrap();
    bench.log.answer(fails(Call::Discard));
    let error = bench.ram.discard(guest(4, 1)).unwrap_err();
    bench.log.heal();
    let text = error.to_string();
    let RamError::Unclosed { error, close } = error else { panic!("{text}") };
    assert!(text.contains(&close.to_string()), "{text}");
    let error = failed(*error).unwrap();
    assert_eq!((error.call, error.operation), (Call::Discard, 0));
    drop(subscription);

    let bench = Bench::new(Kind::Anonymous);
    let subscription = bench.space.subscribe(Breaks).unwrap();
    bench.log.answer(fails(Call::PopulateRead));
    let error = bench.ram.replace(page_at(4), &source(&file, 0).populated(), PAGE).unwrap_err();
    bench.log.heal();
    let RamError::Unclosed { error, .. } = error else { panic!("{error:?}") };
    assert!(matches!(*error, RamError::Populate { at, .. } if at == page_at(4)), "{error:?}");
    drop(subscription);

    let bench = Bench::new(Kind::Anonymous);
    let subscription = bench.space.subscribe(Breaks).unwrap();
    let error = bench.ram.discard(guest(4, 1)).unwrap_err();
    assert!(matches!(error, RamError::Close(_)), "{error:?}");
    drop(subscription);
}

#[test]
fn what_cannot_be_copied_stays_shared() {
    let bench = Bench::new(Kind::Anonymous);
    let file = filled(100, 8);
    bench.ram.replace(page_at(4), &source(&file, 0), 2 * PAGE).unwrap();
    bench.log.answer(|call| match call {
        Call::PopulateWrite => Err(io::Error::from_raw_os_error(12)),
        _ => Ok(()),
    });
    let window = bench.space.zap(bench.host(4, 2)).unwrap();
    let within = bench.ram.within(&window).unwrap();
    let error = within.privatize(guest(4, 2)).unwrap_err();
    assert!(matches!(error, RamError::Call { call: Call::PopulateWrite, at, .. } if at == page_at(4)), "{error:?}");
    bench.log.heal();
    within.privatize(guest(4, 2)).unwrap();
    // The kernel refuses where writing is not allowed.
    within.protect(guest(4, 1), Access::READ).unwrap();
    let error = within.privatize(guest(4, 2)).unwrap_err();
    assert!(matches!(&error, RamError::Call { source, .. } if source.raw_os_error() == Some(22)), "{error:?}");
    window.close().unwrap();
    bench.assert_at_rest();
    bench.assert_pages(|page| if page == 4 || page == 5 { 96 + page as u8 } else { page as u8 + 1 });
}

fn no_huge_page_fails_with(bench: &Bench, errno: i32) {
    bench.log.answer(move |call| match call {
        Call::NoHugePage => Err(io::Error::from_raw_os_error(errno)),
        _ => Ok(()),
    });
}

#[test]
fn huge_pages_that_cannot_be_refused_are_an_error_and_are_not_remembered() {
    let bench = Bench::new(Kind::Anonymous);
    no_huge_page_fails_with(&bench, EIO);
    let error = bench.ram.no_huge_pages().unwrap_err();
    assert!(matches!(error, RamError::Call { call: Call::NoHugePage, at, .. } if at == page_at(0)), "{error:?}");
    let file = filled(100, 8);
    bench.ram.replace(page_at(4), &source(&file, 0), 2 * PAGE).unwrap();
    bench.log.take();
    bench.ram.discard(guest(4, 2)).unwrap();
    assert_eq!(bench.log.calls(), [Call::MapAnonymous]);
    bench.log.heal();
    bench.ram.no_huge_pages().unwrap();
    assert!(no_huge_pages_at(bench.host(4, 1)));
}

#[test]
fn a_kernel_without_huge_pages_has_none() {
    const EINVAL: i32 = 22;
    let bench = Bench::new(Kind::Anonymous);
    no_huge_page_fails_with(&bench, EINVAL);
    bench.ram.no_huge_pages().unwrap();
    let file = filled(100, 8);
    bench.ram.replace(page_at(4), &source(&file, 0), 2 * PAGE).unwrap();
    bench.log.take();
    bench.ram.discard(guest(4, 2)).unwrap();
    assert_eq!(bench.log.calls(), [Call::MapAnonymous]);
}

#[test]
fn no_operation_fails_for_the_size_of_pages() {
    for kind in KINDS {
        for errno in [EIO, 22, 12] {
            let bench = Bench::new(kind);
            bench.ram.no_huge_pages().unwrap();
            let file = filled(100, 8);
            bench.ram.replace(page_at(4), &source(&file, 0), 2 * PAGE).unwrap();
            no_huge_page_fails_with(&bench, errno);
            bench.log.take();
            bench.ram.discard(guest(4, 2)).unwrap();
            assert!(bench.log.calls().contains(&Call::NoHugePage));
            bench.log.heal();
            bench.assert_true();
            bench.assert_pages(|page| if page == 4 || page == 5 { 0 } else { page as u8 + 1 });
        }
    }
}

#[test]
fn what_is_put_back_has_no_huge_pages_either() {
    let bench = Bench::new(Kind::Shared);
    bench.ram.no_huge_pages().unwrap();
    let file = filled(100, 4);
    bench.log.answer(|call| match call {
        Call::PunchHole => Err(io::Error::from_raw_os_error(EIO)),
        _ => Ok(()),
    });
    let error = failed(bench.ram.replace(page_at(4), &source(&file, 0), PAGE).unwrap_err()).unwrap();
    assert_eq!(error.undone, [0]);
    bench.log.heal();
    assert!(no_huge_pages_at(bench.host(4, 1)));
    assert_eq!(bench.mappings(), 1, "the kernel joins what differs in nothing");
}

#[test]
fn what_fills_a_hole_has_no_huge_pages_either() {
    let bench = Bench::new(Kind::Anonymous);
    bench.ram.no_huge_pages().unwrap();
    let file = filled(100, 4);
    let host = bench.host(4, 1);
    bench.log.answer(move |call| {
        if call == Call::MapFile {
            let at = std::ptr::with_exposed_provenance_mut(host.start().as_u64() as usize);
            // SAFETY: a page of the test's own guest memory, which nobody touches meanwhile.
            unsafe { rustix::mm::munmap(at, host.len() as usize) }.unwrap();
            return Err(io::Error::from_raw_os_error(12));
        }
        Ok(())
    });
    let error = failed(bench.ram.replace(page_at(4), &source(&file, 0), PAGE).unwrap_err()).unwrap();
    assert_eq!(error.filled, [guest(4, 1)]);
    bench.log.heal();
    assert!(no_huge_pages_at(host));
}

#[test]
fn memory_is_not_taken_by_a_kernel_that_cannot_be_asked() {
    for fails in [Call::CountMappings, Call::MappingLimit, Call::FileFacts, Call::FileRights] {
        let space = notifier_core::Space::new();
        let file = memfd(4 * PAGE);
        let memory = || GuestMemoryMmap::<()>::from_regions(vec![region(BASE, 4, Some((&file, 0)), false)]).unwrap();
        let kernel =
            Kernel::with_hook(move |call| if call == fails { Err(io::Error::from_raw_os_error(EIO)) } else { Ok(()) });
        let error = GuestRam::builder(&space, memory()).kernel(kernel.clone()).build().unwrap_err();
        assert!(!error.to_string().is_empty());
        assert_eq!(space.slots(), []);
        GuestRam::new(&space, memory()).unwrap();
        if !matches!(fails, Call::FileFacts | Call::FileRights) {
            let error = VmaBudget::new(&kernel).unwrap_err();
            assert!(error.to_string().contains(fails.name()), "{error}");
        }
    }
}

#[test]
fn a_batch_whose_mappings_cannot_be_counted_does_nothing() {
    let log = Log::default();
    let space = notifier_core::Space::new();
    let kernel = log.kernel();
    // So low that each reservation asks for a count.
    let budget = Arc::new(VmaBudget::with_limit(&kernel, 0, 0).unwrap());
    let memory = GuestMemoryMmap::<()>::from_regions(vec![region(BASE, PAGES, None, true)]).unwrap();
    let ram = GuestRam::builder(&space, memory).kernel(kernel).budget(Arc::clone(&budget)).build().unwrap();
    let file = filled(100, 8);
    log.answer(|call| match call {
        Call::CountMappings => Err(io::Error::from_raw_os_error(EIO)),
        _ => Ok(()),
    });
    // The last count serves for a while; then it is too old to refuse anything by it.
    let error = loop {
        match ram.replace(page_at(4), &source(&file, 0), PAGE).unwrap_err() {
            RamError::Budget { source: notifier_linux::BudgetError::Exhausted { .. }, .. } => {}
            other => break other,
        }
    };
    assert!(matches!(error, RamError::Budget { at, .. } if at == page_at(4)), "{error:?}");
    assert!(error.to_string().contains(Call::CountMappings.name()), "{error}");
    assert!(!log.calls().contains(&Call::MapFile));
    assert_true(&ram, guest(0, PAGES));
    assert_eq!(space.progress().count, 0);
}
