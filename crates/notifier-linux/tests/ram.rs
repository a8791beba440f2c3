// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What operations on guest RAM do, on every kind of memory, and what they refuse.
#![cfg(target_os = "linux")]

mod support;

use std::sync::Arc;

use notifier_core::{Access, AddrRange, Gpa, Hva, Key, OpenError, SlotFlags, SlotSpec, Space};
use notifier_linux::{Backing, BuildError, Call, GuestRam, RamError};
use support::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

#[test]
fn what_is_discarded_reads_as_zero_and_neighbours_stay() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        // A private copy in the middle of what is the file's.
        bench.write(6, 7);
        bench.ram.discard(guest(5, 3)).unwrap();
        bench.assert_pages(|page| if (5..8).contains(&page) { 0 } else { page as u8 + 1 });
        bench.assert_true();
        bench.assert_at_rest();
        // It is memory as before.
        bench.write(6, 99);
        assert_eq!(bench.read(6), contents(99));
        bench.ram.discard(guest(5, 3)).unwrap();
        bench.assert_pages(|page| if (5..8).contains(&page) { 0 } else { page as u8 + 1 });
    }
}

#[test]
fn what_is_discarded_goes_back_to_the_host() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        (0..PAGES).for_each(|page| bench.write(page, page as u8 + 1));
        let before = bench.home.as_ref().map(|file| resident(file));
        bench.ram.discard(guest(4, 8)).unwrap();
        for page in 0..PAGES {
            assert_eq!(present(bench.host(page, 1)), !(4..12).contains(&page), "page {page} of {kind:?}");
        }
        let after = bench.home.as_ref().map(|file| resident(file));
        match kind {
            Kind::Anonymous => assert_eq!(after, None),
            Kind::Shared | Kind::Private => assert_eq!(after.unwrap(), before.unwrap() - 8 * PAGE),
            // Others read it.
            Kind::Template => assert_eq!(after, before),
        }
    }
}

#[test]
fn a_template_is_never_changed() {
    let bench = Bench::new(Kind::Template);
    let file = filled(100, 4);
    bench.write(2, 50);
    bench.ram.discard(guest(2, 2)).unwrap();
    bench.ram.replace(page_at(3), &source(&file, 0), 2 * PAGE).unwrap();
    bench.write(3, 51);
    bench.ram.discard(guest(3, 3)).unwrap();
    bench.assert_true();
    let home = bench.home.as_ref().unwrap();
    for page in 0..PAGES {
        let mut bytes = contents(0);
        std::os::unix::fs::FileExt::read_exact_at(&**home, &mut bytes, (page + 3) * PAGE).unwrap();
        assert_eq!(bytes, contents(page as u8 + 1));
    }
}

#[test]
fn a_snapshot_that_is_open_for_reading_alone_is_memory_all_the_same() {
    let written = filled(1, PAGES);
    // The same file, open for reading alone.
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*written));
    let snapshot = Arc::new(std::fs::File::open(path).unwrap());
    for file in [&snapshot, &written] {
        let memory = GuestMemoryMmap::<()>::from_regions(vec![region(BASE, PAGES, Some((file, 0)), true)]).unwrap();
        let ram = GuestRam::new(&Space::new(), memory).unwrap();
        let other = filled(100, 4);
        ram.discard(guest(0, 1)).unwrap();
        ram.replace(page_at(1), &source(&other, 0), PAGE).unwrap();
        ram.discard(guest(1, 2)).unwrap();
        ram.replace(page_at(2), &source(&other, 3), PAGE).unwrap();
        assert_true(&ram, guest(0, PAGES));
        let read = |page: u64| ram.memory().read_obj::<u8>(GuestAddress(BASE + page * PAGE)).unwrap();
        assert_eq!([read(0), read(1), read(2), read(3)], [0, 0, 103, 4]);
        for page in 0..PAGES {
            let mut bytes = contents(0);
            std::os::unix::fs::FileExt::read_exact_at(&*written, &mut bytes, page * PAGE).unwrap();
            assert_eq!(bytes, contents(page as u8 + 1), "nobody said that the file is the guest's own");
        }
    }
}

#[test]
fn a_file_that_cannot_give_memory_back_is_refused_where_it_is_to() {
    use rustix::fs::{MemfdFlags, SealFlags};
    let space = Space::new();
    let build = |file: &Arc<std::fs::File>, private: bool, own: bool| {
        // Shared and not writable: vm-memory maps what the descriptor allows.
        let at = Some(vm_memory::FileOffset::from_arc(Arc::clone(file), 0));
        let flags = 0x4000 | if private { 2 } else { 1 };
        let mapping = vm_memory::MmapRegion::build(at, 4 * PAGE as usize, 1, flags).unwrap();
        let region = vm_memory::GuestRegionMmap::new(mapping, GuestAddress(BASE)).unwrap();
        let memory = GuestMemoryMmap::<()>::from_regions(vec![region]).unwrap();
        GuestRam::builder(&space, memory).own_files(own).build().map(drop)
    };
    let open = filled(1, 4);
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*open));
    let read_only = Arc::new(std::fs::File::open(path).unwrap());
    let sealed = |seal| {
        let file = rustix::fs::memfd_create("sealed", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        rustix::fs::ftruncate(&file, 4 * PAGE).unwrap();
        rustix::fs::fcntl_add_seals(&file, seal).unwrap();
        Arc::new(std::fs::File::from(file))
    };
    for file in [read_only, sealed(SealFlags::WRITE), sealed(SealFlags::FUTURE_WRITE)] {
        for (private, own) in [(true, true), (false, false)] {
            let error = build(&file, private, own).unwrap_err();
            assert!(matches!(error, BuildError::NotWritable { start, .. } if start == page_at(0)), "{error:?}");
            // The kernel agrees.
            let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&*file, flags, 0, PAGE).unwrap_err();
        }
        build(&file, true, false).unwrap();
    }
    assert_eq!(space.slots(), []);
    build(&open, false, false).unwrap();
    build(&sealed(SealFlags::SHRINK | SealFlags::GROW), true, true).unwrap();
    // A file that knows no seals.
    let path = std::env::temp_dir().join(format!("notifier-linux-{}", std::process::id()));
    let plain = std::fs::File::options().read(true).write(true).create(true).truncate(true).open(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    plain.set_len(4 * PAGE).unwrap();
    build(&Arc::new(plain), true, true).unwrap();
}

#[test]
fn what_is_replaced_shows_the_source_and_is_copied_when_written() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let file = filled(100, 8);
        bench.ram.replace(page_at(10), &source(&file, 2), 4 * PAGE).unwrap();
        let expected = |page: u64| match page {
            10..14 => 100 + 2 + (page - 10) as u8,
            _ => page as u8 + 1,
        };
        bench.assert_pages(expected);
        bench.assert_true();
        bench.write(11, 7);
        bench.assert_pages(|page| if page == 11 { 7 } else { expected(page) });
        let mut bytes = contents(0);
        std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, 3 * PAGE).unwrap();
        assert_eq!(bytes, contents(103), "the source is not the guest's");
        bench.assert_at_rest();
    }
}

#[test]
fn the_home_of_what_is_replaced_goes_back_to_the_host() {
    for kind in [Kind::Shared, Kind::Private] {
        let bench = Bench::new(kind);
        let home = bench.home.clone().unwrap();
        let before = resident(&home);
        let file = filled(100, 8);
        bench.ram.replace(page_at(10), &source(&file, 0), 6 * PAGE).unwrap();
        assert_eq!(resident(&home), before - 6 * PAGE);
        bench.assert_pages(|page| if (10..16).contains(&page) { 90 + page as u8 } else { page as u8 + 1 });
        // What was replaced before has no home to give back.
        bench.log.take();
        bench.ram.replace(page_at(10), &source(&file, 1), 6 * PAGE).unwrap();
        assert!(!bench.log.calls().contains(&Call::PunchHole));
        // Of what was replaced in part, the rest.
        bench.ram.replace(page_at(8), &source(&file, 0), 8 * PAGE).unwrap();
        assert_eq!(resident(&home), before - 8 * PAGE);
        bench.assert_true();
    }
}

#[test]
fn what_is_mapped_already_is_not_mapped_again() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let file = filled(100, 8);
        bench.ram.replace(page_at(10), &source(&file, 0), 4 * PAGE).unwrap();
        bench.write(12, 7);
        bench.log.take();
        let mappings = bench.mappings();
        bench.ram.replace(page_at(11), &source(&file, 1), 2 * PAGE).unwrap();
        assert_eq!(bench.log.calls(), [Call::FileFacts, Call::Discard]);
        assert_eq!(bench.mappings(), mappings);
        bench.assert_pages(|page| if (10..14).contains(&page) { 90 + page as u8 } else { page as u8 + 1 });
        // Of which a part is there.
        bench.write(12, 7);
        bench.ram.replace(page_at(12), &source(&file, 2), 4 * PAGE).unwrap();
        let calls = bench.log.calls();
        assert_eq!(calls.iter().filter(|&&call| call == Call::MapFile).count(), 1, "{kind:?} {calls:?}");
        bench.assert_pages(|page| if (10..16).contains(&page) { 90 + page as u8 } else { page as u8 + 1 });
        bench.assert_true();
    }
}

#[test]
fn a_clone_merges_with_its_template_without_a_new_mapping() {
    let bench = Bench::new(Kind::Template);
    let template = bench.home.clone().unwrap();
    (4..8).for_each(|page| bench.write(page, 77));
    let mappings = bench.mappings();
    bench.log.take();
    bench.ram.replace(page_at(4), &source(&template, 4 + 3), 4 * PAGE).unwrap();
    assert_eq!(bench.log.calls(), [Call::FileFacts, Call::Discard]);
    assert_eq!(bench.mappings(), mappings);
    bench.assert_pages(|page| page as u8 + 1);
    assert!(matches!(bench.ram.backing_at(page_at(4)), Some(Backing::Private { offset, .. }) if offset == 7 * PAGE));
}

#[test]
fn what_is_discarded_after_it_was_replaced_is_at_home_again() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let (file, other) = (filled(100, 8), filled(120, 8));
        bench.ram.replace(page_at(10), &source(&file, 0), 3 * PAGE).unwrap();
        bench.ram.replace(page_at(13), &source(&other, 5), PAGE).unwrap();
        bench.ram.protect(guest(12, 1), Access::READ).unwrap();
        bench.log.take();
        bench.ram.discard(guest(9, 6)).unwrap();
        bench.assert_pages(|page| if (9..15).contains(&page) { 0 } else { page as u8 + 1 });
        bench.assert_true();
        assert_eq!(bench.ram.access_at(page_at(12)), Some(Access::READ), "rights are not a matter of contents");
        bench.ram.protect(guest(12, 1), Access::RW).unwrap();
        bench.assert_true();
        for page in 9..15 {
            bench.write(page, 60);
        }
        match (kind, bench.ram.backing_at(page_at(10)).unwrap()) {
            (Kind::Anonymous | Kind::Template, Backing::Anonymous) => {}
            (Kind::Private, Backing::Private { offset, .. }) => assert_eq!(offset, 13 * PAGE),
            (Kind::Shared, Backing::Shared { file, offset }) => {
                let mut bytes = contents(0);
                std::os::unix::fs::FileExt::read_exact_at(&*file, &mut bytes, offset).unwrap();
                assert_eq!(bytes, contents(60), "writes reach the file again");
                assert_eq!(bench.mappings(), 1);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn protect_sets_the_hosts_rights_and_replacing_keeps_them() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let file = filled(100, 8);
        bench.ram.protect(guest(4, 4), Access::READ).unwrap();
        bench.assert_true();
        assert_eq!(bench.ram.access_at(page_at(4)), Some(Access::READ));
        assert_eq!(bench.ram.access_at(page_at(8)), Some(Access::RW));
        bench.ram.replace(page_at(6), &source(&file, 0), 4 * PAGE).unwrap();
        bench.assert_true();
        assert_eq!(bench.ram.access_at(page_at(7)), Some(Access::READ));
        bench.log.take();
        bench.ram.protect(guest(4, 4), Access::READ).unwrap();
        assert_eq!(bench.log.calls(), []);
        bench.ram.protect(guest(0, PAGES), Access::RW).unwrap();
        bench.assert_true();
        bench.ram.protect(guest(0, 1), Access::empty()).unwrap();
        bench.assert_true();
    }
}

#[test]
fn subscribers_hear_of_a_change_before_and_after() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let file = filled(100, 8);
        let host = bench.host(3, 2);
        let inside = |bench: &Bench| {
            let events = bench.log.take();
            let looks = |event: &Event| matches!(event, Event::Made(Call::FileFacts | Call::CountMappings));
            let events: Vec<_> = events.into_iter().filter(|event| !looks(event)).collect();
            assert_eq!(events.first(), Some(&Event::Start(vec![host])));
            assert_eq!(events.last(), Some(&Event::End(vec![host])));
            let calls = &events[1..events.len() - 1];
            assert!(!calls.is_empty() && calls.iter().all(|event| matches!(event, Event::Made(_))), "{calls:?}");
        };
        bench.ram.protect(guest(3, 2), Access::READ).unwrap();
        inside(&bench);
        bench.ram.replace(page_at(3), &source(&file, 0).populated(), 2 * PAGE).unwrap();
        inside(&bench);
        bench.ram.discard(guest(3, 2)).unwrap();
        inside(&bench);
        assert_eq!(bench.space.progress().sequence, 3 + 1, "one window each, and one for the slot");
    }
}

#[test]
fn a_batch_opens_all_its_windows_first_one_for_each_run() {
    let bench = Bench::new(Kind::Shared);
    let file = filled(100, 8);
    let batch = bench.ram.batch().discard(guest(20, 2)).replace(page_at(4), &source(&file, 0), PAGE);
    let batch = batch.protect(guest(5, 1), Access::READ).discard(guest(3, 1));
    assert_eq!(batch.len(), 4);
    batch.run().unwrap();
    let events = bench.log.take();
    let events: Vec<_> = events.into_iter().filter(|event| *event != Event::Made(Call::FileFacts)).collect();
    let (low, high) = (vec![bench.host(3, 3)], vec![bench.host(20, 2)]);
    assert_eq!(
        events,
        [
            Event::Start(low.clone()),
            Event::Start(high.clone()),
            Event::Made(Call::PunchHole),
            Event::Made(Call::MapFile),
            Event::Made(Call::Protect),
            Event::Made(Call::PunchHole),
            Event::Made(Call::PunchHole),
            Event::End(high),
            Event::End(low),
        ]
    );
    bench.assert_true();
    bench.assert_pages(|page| match page {
        3 | 20 | 21 => 0,
        4 => 100,
        _ => page as u8 + 1,
    });
}

#[test]
fn neighbouring_homes_are_punched_with_one_call() {
    let bench = Bench::new(Kind::Shared);
    let file = filled(100, 8);
    let mut batch = bench.ram.batch();
    for page in 0..8 {
        batch = batch.replace(page_at(page), &source(&file, 7 - page), PAGE);
    }
    batch.run().unwrap();
    let calls = bench.log.calls();
    assert_eq!(calls.iter().filter(|&&call| call == Call::FileFacts).count(), 1);
    assert_eq!(calls.iter().filter(|&&call| call == Call::PunchHole).count(), 1);
    assert_eq!(calls.iter().filter(|&&call| call == Call::MapFile).count(), 8);
    bench.assert_pages(|page| if page < 8 { 107 - page as u8 } else { page as u8 + 1 });
}

#[test]
fn a_batch_that_is_wrong_anywhere_does_nothing() {
    let bench = Bench::new(Kind::Shared);
    let (file, home) = (filled(100, 4), bench.home.clone().unwrap());
    let refused = |wanted: &dyn Fn(&RamError) -> bool, batch: notifier_linux::Batch<'_>| {
        let error = batch.run().unwrap_err();
        assert!(wanted(&error), "{error:?}");
        let events = bench.log.take();
        assert!(events.iter().all(|event| *event == Event::Made(Call::FileFacts)), "{events:?}");
    };
    let good = || bench.ram.batch().discard(guest(0, 1));
    let bytes = |start, len| AddrRange::with_len(Gpa::new(start), len).unwrap();
    let overlap = Gpa::new(BASE + 5 * PAGE);
    refused(
        &|error| matches!(error, RamError::Overlap { first: 1, second: 2, at } if *at == overlap),
        good().protect(guest(5, 3), Access::READ).replace(page_at(4), &source(&file, 0), 2 * PAGE),
    );
    refused(&|error| matches!(error, RamError::Unaligned { .. }), good().discard(bytes(BASE + PAGE, 100)));
    refused(&|error| matches!(error, RamError::Unaligned { .. }), good().discard(bytes(BASE + 100, PAGE)));
    let end = Gpa::new(BASE + PAGES * PAGE);
    refused(&|error| matches!(error, RamError::Outside { at } if *at == end), good().discard(guest(PAGES - 1, 2)));
    refused(&|error| matches!(error, RamError::Outside { .. }), good().discard(bytes(0, PAGE)));
    refused(&|error| matches!(error, RamError::Range(_)), good().replace(page_at(3), &source(&file, 0), 0));
    refused(
        &|error| matches!(error, RamError::SourceEnds { end, length, .. } if *end == 5 * PAGE && *length == 4 * PAGE),
        good().replace(page_at(3), &source(&file, 3), 2 * PAGE),
    );
    refused(
        &|error| matches!(error, RamError::SourceUnaligned { offset: 12, .. }),
        good().replace(page_at(3), &notifier_linux::Source::new(&file, 12), PAGE),
    );
    // Through whichever descriptor.
    let reopened = Arc::new(home.try_clone().unwrap());
    for home in [&home, &reopened] {
        refused(
            &|error| matches!(error, RamError::SourceIsHome { home, .. } if *home == guest(0, PAGES)),
            good().replace(page_at(3), &source(home, 5), PAGE),
        );
    }
    // Beside the home it may be.
    good().replace(page_at(3), &source(&home, 0), 3 * PAGE).run().unwrap();
}

#[test]
fn a_range_over_two_regions_is_no_operation() {
    let space = Space::new();
    let regions = vec![region(BASE, 4, None, true), region(BASE + 4 * PAGE, 4, None, true)];
    let ram = GuestRam::new(&space, GuestMemoryMmap::<()>::from_regions(regions).unwrap()).unwrap();
    let error = ram.discard(guest(3, 2)).unwrap_err();
    assert!(matches!(error, RamError::Crosses { end, .. } if end == page_at(4)), "{error:?}");
    // But looking is.
    assert_eq!(ram.host_ranges(guest(0, 8)).iter().map(|range| range.len()).sum::<u64>(), 8 * PAGE);
    ram.populate(guest(3, 2)).unwrap();
    assert!(present(ram.host_ranges(guest(3, 1))[0]) && present(ram.host_ranges(guest(4, 1))[0]));
    assert_eq!(ram.slots().len(), 2);
    ram.batch().discard(guest(3, 1)).discard(guest(4, 1)).run().unwrap();
}

#[test]
fn a_window_of_ones_own_serves_in_either_mode_and_by_either_address() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let file = filled(100, 8);
        let retained = bench.space.retain(bench.host(4, 4)).unwrap();
        bench.ram.within(&retained).unwrap().replace(page_at(4), &source(&file, 0), 4 * PAGE).unwrap();
        retained.close().unwrap();
        let zapped = bench.space.zap(guest(8, 4)).unwrap();
        let within = bench.ram.within(&zapped).unwrap();
        within.batch().discard(guest(8, 2)).protect(guest(10, 2), Access::READ).run().unwrap();
        zapped.close().unwrap();
        let zapped = bench.space.zap(bench.host(12, 1)).unwrap();
        bench.ram.within(&zapped).unwrap().protect(guest(12, 1), Access::READ).unwrap();
        bench.ram.within(&zapped).unwrap().discard(guest(12, 1)).unwrap();
        zapped.close().unwrap();
        let retained = bench.space.retain(guest(13, 1)).unwrap();
        bench.ram.within(&retained).unwrap().replace(page_at(13), &source(&file, 7), PAGE).unwrap();
        retained.close().unwrap();
        assert_eq!(bench.space.progress().sequence, 5, "four windows, and one for the slot");
        bench.assert_pages(|page| match page {
            4..8 => 96 + page as u8,
            8 | 9 | 12 => 0,
            13 => 107,
            _ => page as u8 + 1,
        });
        bench.assert_true();
    }
}

#[test]
fn what_is_not_in_the_window_is_refused() {
    let bench = Bench::new(Kind::Anonymous);
    let file = filled(100, 8);
    let window = bench.space.zap(bench.host(4, 4)).unwrap();
    let within = bench.ram.within(&window).unwrap();
    bench.log.take();
    let outside = |error: RamError| {
        assert!(matches!(error, RamError::NotInWindow { window: Key::Host(_), .. }), "{error:?}");
        assert!(error.to_string().contains(&format!("{:#x}", BASE + 7 * PAGE)), "{error}");
    };
    outside(within.discard(guest(7, 2)).unwrap_err());
    outside(within.replace(page_at(7), &source(&file, 0), 2 * PAGE).unwrap_err());
    outside(within.protect(guest(7, 2), Access::READ).unwrap_err());
    outside(within.privatize(guest(7, 2)).unwrap_err());
    outside(within.batch().discard(guest(4, 1)).discard(guest(7, 2)).run().unwrap_err());
    assert_eq!(bench.log.calls(), []);
    drop(window);

    let window = bench.space.zap(guest(4, 1)).unwrap();
    let error = bench.ram.within(&window).unwrap().discard(guest(4, 2)).unwrap_err();
    assert!(matches!(error, RamError::NotInWindow { window: Key::Guest(_), .. }), "{error:?}");
    drop(window);

    let other = Space::new();
    let window = other.zap(bench.host(4, 4)).unwrap();
    let error = bench.ram.within(&window).unwrap_err();
    assert!(matches!(error, RamError::ForeignSpace { .. }), "{error:?}");
    bench.assert_pages(|page| page as u8 + 1);
}

#[test]
fn a_window_by_guest_address_does_not_serve_where_another_slot_has_the_page() {
    let bench = Bench::new(Kind::Shared);
    let alias = AddrRange::with_len(Gpa::new(1 << 40), 2 * PAGE).unwrap();
    let host = Some(bench.host(4, 2).start());
    let slot = bench.space.add_slot(SlotSpec { guest: alias, host, flags: SlotFlags::empty() }).unwrap();
    let window = bench.space.zap(guest(5, 1)).unwrap();
    let error = bench.ram.within(&window).unwrap_err();
    assert!(matches!(error, RamError::Aliased { slot: other, .. } if other == slot), "{error:?}");
    drop(window);
    let window = bench.space.zap(guest(6, 1)).unwrap();
    bench.ram.within(&window).unwrap().discard(guest(6, 1)).unwrap();
    drop(window);
    // By host address both are told.
    bench.log.take();
    bench.ram.discard(guest(5, 1)).unwrap();
    let Some(Event::Start(host)) = bench.log.take().into_iter().next() else { panic!() };
    assert_eq!(host, [bench.host(5, 1), bench.host(5, 1)]);
}

#[test]
fn a_slot_that_came_after_the_window_was_opened_is_seen() {
    let bench = Bench::new(Kind::Anonymous);
    let file = filled(100, 8);
    bench.ram.replace(page_at(6), &source(&file, 0), PAGE).unwrap();
    let window = bench.space.zap(guest(0, 8)).unwrap();
    let within = bench.ram.within(&window).unwrap();
    let alias = AddrRange::with_len(Gpa::new(1 << 40), 4 * PAGE).unwrap();
    let host = Some(bench.host(4, 4).start());
    let slot = bench.space.add_slot(SlotSpec { guest: alias, host, flags: SlotFlags::empty() }).unwrap();
    // Who translates through the new slot is not held up by the window.
    let mut walker = bench.space.walker();
    walker.fault(alias).unwrap().admit(|admission| admission.check(alias)).unwrap();
    bench.log.take();
    let refused = |error: RamError| {
        assert!(matches!(error, RamError::Aliased { slot: other, .. } if other == slot), "{error:?}");
    };
    refused(within.discard(guest(3, 2)).unwrap_err());
    refused(within.protect(guest(7, 1), Access::READ).unwrap_err());
    refused(within.privatize(guest(6, 1)).unwrap_err());
    refused(within.batch().discard(guest(0, 1)).discard(guest(5, 1)).run().unwrap_err());
    assert_eq!(bench.log.calls(), []);
    // Other pages of the window are its own.
    within.discard(guest(0, 4)).unwrap();
    bench.space.remove_slot(slot).unwrap();
    within.privatize(guest(6, 1)).unwrap();
    within.discard(guest(4, 1)).unwrap();
    drop(window);
    bench.assert_pages(|page| match page {
        0..=4 => 0,
        6 => 100,
        _ => page as u8 + 1,
    });
}

#[test]
fn a_private_copy_does_not_need_the_page_underneath() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let file = filled(100, 8);
        bench.ram.replace(page_at(4), &source(&file, 0), 4 * PAGE).unwrap();
        let window = bench.space.zap(bench.host(4, 4)).unwrap();
        bench.ram.within(&window).unwrap().privatize(guest(4, 2)).unwrap();
        window.close().unwrap();
        // The store takes the pages for something else.
        for page in 0..4 {
            std::os::unix::fs::FileExt::write_all_at(&*file, &contents(55), page * PAGE).unwrap();
        }
        bench.assert_pages(|page| match page {
            4 | 5 => 96 + page as u8,
            6 | 7 => 55,
            _ => page as u8 + 1,
        });
    }
}

#[test]
fn a_populated_source_is_there_before_it_is_used() {
    let bench = Bench::new(Kind::Anonymous);
    let file = filled(100, 8);
    bench.ram.replace(page_at(4), &source(&file, 0), 4 * PAGE).unwrap();
    assert!(!present(bench.host(4, 1)));
    let batch = bench.ram.batch().replace(page_at(8), &source(&file, 0).populated(), 4 * PAGE);
    let batch = batch.replace(page_at(12), &source(&file, 2).populated(), 2 * PAGE).discard(guest(14, 1));
    bench.log.take();
    batch.run().unwrap();
    assert_eq!(bench.log.calls().iter().filter(|&&call| call == Call::PopulateRead).count(), 1);
    assert!((8..14).all(|page| present(bench.host(page, 1))));
    bench.assert_pages(|page| match page {
        4..8 => 96 + page as u8,
        8..12 => 92 + page as u8,
        12 | 13 => 90 + page as u8,
        14 => 0,
        _ => page as u8 + 1,
    });
}

#[test]
fn what_must_not_be_read_is_not_populated() {
    let bench = Bench::new(Kind::Anonymous);
    let file = filled(100, 8);
    bench.ram.protect(guest(5, 1), Access::empty()).unwrap();
    bench.ram.protect(guest(8, 1), Access::empty()).unwrap();
    bench.ram.replace(page_at(4), &source(&file, 0).populated(), 3 * PAGE).unwrap();
    bench.ram.replace(page_at(8), &source(&file, 0).populated(), 2 * PAGE).unwrap();
    for (page, there) in [(4, true), (5, false), (6, true), (8, false), (9, true)] {
        assert_eq!(present(bench.host(page, 1)), there, "page {page}");
    }
    bench.assert_true();
}

#[test]
fn what_goes_home_has_no_huge_pages_either() {
    let bench = Bench::new(Kind::Anonymous);
    bench.ram.no_huge_pages().unwrap();
    let file = filled(100, 8);
    bench.ram.replace(page_at(4), &source(&file, 0), 4 * PAGE).unwrap();
    bench.log.take();
    bench.ram.discard(guest(4, 4)).unwrap();
    assert_eq!(bench.log.calls(), [Call::MapAnonymous, Call::NoHugePage]);
    assert!(no_huge_pages_at(bench.host(5, 1)));
}

#[test]
fn a_window_that_is_refused_leaves_everything() {
    let bench = Bench::new(Kind::Shared);
    let page = notifier_core::LeaseRequest::new(guest(21, 1), "device");
    let lease = bench.space.lease(page).unwrap();
    bench.log.take();
    let error = bench.ram.batch().discard(guest(4, 1)).discard(guest(21, 1)).run().unwrap_err();
    assert!(matches!(error, RamError::Window(OpenError::Pinned { .. })), "{error:?}");
    assert_eq!(bench.log.calls(), []);
    drop(lease);
    bench.assert_at_rest();
    bench.assert_pages(|page| page as u8 + 1);
    bench.ram.batch().nonblocking().discard(guest(4, 1)).discard(guest(21, 1)).run().unwrap();
}

#[test]
fn memory_that_cannot_be_kept_true_is_not_taken() {
    let space = Space::new();
    let build = |regions, own_files| {
        let memory = GuestMemoryMmap::<()>::from_regions(regions).unwrap();
        GuestRam::builder(&space, memory).own_files(own_files).build().map(drop)
    };
    let error = build(vec![region(BASE, 4, None, false)], false).unwrap_err();
    assert!(matches!(error, BuildError::SharedAnonymous { start } if start == page_at(0)), "{error:?}");
    let file = memfd(8 * PAGE);
    let two = |private| {
        vec![region(BASE, 4, Some((&file, 0)), private), region(BASE + 8 * PAGE, 4, Some((&file, 3 * PAGE)), private)]
    };
    for private in [false, true] {
        let error = build(two(private), true).unwrap_err();
        assert!(matches!(error, BuildError::Common { second, .. } if second == page_at(8)), "{error:?}");
    }
    // What is not changed may be mapped twice.
    build(two(true), false).unwrap();
    let error = build(vec![region(BASE, 9, Some((&file, 0)), false)], false).unwrap_err();
    assert!(matches!(error, BuildError::FileEnds { length, .. } if length == 8 * PAGE), "{error:?}");
    let one = region(BASE, 4, None, true);
    let two = vm_memory::GuestRegionMmap::with_arc(one.get_mmap(), GuestAddress(BASE + 8 * PAGE)).unwrap();
    let error = build(vec![one, two], false).unwrap_err();
    assert!(matches!(error, BuildError::Common { .. }), "{error:?}");
    assert_eq!(space.slots(), []);
}

#[test]
fn slots_live_as_long_as_the_ram() {
    let space = Space::new();
    let memory = GuestMemoryMmap::<()>::from_regions(vec![region(BASE, 4, None, true)]).unwrap();
    let ram = GuestRam::builder(&space, memory).slot_flags(SlotFlags::LOG_DIRTY).build().unwrap();
    let slots = space.slots();
    assert_eq!(slots.len(), 1);
    assert_eq!((slots[0].0, slots[0].1.flags), (ram.slots()[0], SlotFlags::LOG_DIRTY));
    assert_eq!(slots[0].1.host, Some(ram.host_ranges(guest(0, 4))[0].start()));
    drop(ram);
    assert_eq!(space.slots(), []);
}

#[test]
fn memory_that_somebody_may_still_translate_stays_mapped() {
    let space = Space::new();
    let memory = GuestMemoryMmap::<()>::from_regions(vec![region(BASE, 4, None, true)]).unwrap();
    memory.write_slice(&[42], GuestAddress(BASE)).unwrap();
    let ram = GuestRam::new(&space, memory).unwrap();
    let host = ram.host_ranges(guest(0, 1))[0];
    let mut walker = space.walker();
    let scope = walker.enter();
    // Inside the thread's own scope no slot can be removed.
    drop(ram);
    drop(scope);
    assert_eq!(space.slots().len(), 1);
    assert!(maps().iter().any(|line| line.range.covers(&host)));
    assert!(present(host));
    let _: Hva = host.start();
}

#[test]
fn memory_that_comes_later_is_ram_of_its_own_in_the_same_space() {
    let space = Space::new();
    let parts = [Arc::new(region(BASE, 4, None, true)), Arc::new(region(BASE + 4 * PAGE, 4, None, true))];
    let first = GuestMemoryMmap::<()>::from_arc_regions(vec![Arc::clone(&parts[0])]).unwrap();
    let first = GuestRam::new(&space, first).unwrap();
    first.discard(guest(0, 1)).unwrap();
    let second = GuestMemoryMmap::<()>::from_arc_regions(vec![Arc::clone(&parts[1])]).unwrap();
    let second = GuestRam::builder(&space, second).budget(Arc::clone(first.budget())).build().unwrap();
    assert_eq!(space.slots().len(), 2);
    assert!(Arc::ptr_eq(first.budget(), second.budget()));
    let all = GuestMemoryMmap::<()>::from_arc_regions(parts.to_vec()).unwrap();
    for page in 0..8 {
        all.write_slice(&contents(page as u8 + 1), GuestAddress(BASE + page * PAGE)).unwrap();
    }
    // One window over both.
    let file = filled(100, 8);
    let window = space.zap(guest(2, 4)).unwrap();
    first.within(&window).unwrap().replace(page_at(2), &source(&file, 0), 2 * PAGE).unwrap();
    second.within(&window).unwrap().discard(guest(4, 2)).unwrap();
    window.close().unwrap();
    let read = |page: u64| all.read_obj::<u8>(GuestAddress(BASE + page * PAGE)).unwrap();
    assert_eq!([1, 2, 3, 4, 5, 6].map(read), [2, 100, 101, 0, 0, 7]);
    assert!(matches!(first.discard(guest(4, 1)), Err(RamError::Outside { .. })));
    // Unplugged.
    drop(second);
    assert_eq!(space.slots().len(), 1);
    first.discard(guest(0, 4)).unwrap();
    assert_true(&first, guest(0, 4));
}

/// RAM of two regions, each of a file of its own, and whether the process has these files mapped.
fn two_regions(space: &Space) -> (GuestRam, impl Fn() -> [bool; 2]) {
    let files = [memfd(4 * PAGE), memfd(4 * PAGE)];
    let inode = |file: &Arc<std::fs::File>| std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
    // Held open, so that nobody else is given the number.
    let mapped = {
        let files = files.clone();
        move || [0, 1].map(|index| maps().iter().any(|line| line.inode == inode(&files[index])))
    };
    let part = |index: usize, page| region(BASE + page * PAGE, 4, Some((&files[index], 0)), false);
    let memory = GuestMemoryMmap::<()>::from_regions(vec![part(0, 0), part(1, 8)]).unwrap();
    (GuestRam::new(space, memory).unwrap(), mapped)
}

#[test]
fn memory_whose_slots_were_removed_by_others_is_unmapped() {
    let space = Space::new();
    let (ram, mapped) = two_regions(&space);
    assert_eq!(mapped(), [true, true]);
    space.remove_slot(ram.slots()[0]).unwrap();
    drop(ram);
    assert_eq!(mapped(), [false, false]);
    assert_eq!(space.slots(), []);
}

#[test]
fn only_what_another_slot_translates_to_stays_mapped() {
    let space = Space::new();
    let (ram, mapped) = two_regions(&space);
    let host = Some(ram.host_ranges(guest(0, 4))[0].start());
    let alias = AddrRange::with_len(Gpa::new(1 << 40), 4 * PAGE).unwrap();
    let own = SlotSpec { guest: alias, host, flags: SlotFlags::READ_ONLY };
    let slots = space.replace_slots(&ram.slots()[..1], &[own]).unwrap();
    drop(ram);
    assert_eq!(mapped(), [true, false]);
    assert_eq!(space.slots(), [(slots[0], own)]);
}

#[test]
fn slots_that_replace_its_own_over_the_same_memory_are_its_own() {
    let space = Space::new();
    let (ram, mapped) = two_regions(&space);
    let first = ram.slots();
    ram.set_slot_flags(SlotFlags::LOG_DIRTY).unwrap();
    assert!(space.slots().iter().all(|(id, spec)| spec.flags == SlotFlags::LOG_DIRTY && !first.contains(id)));
    // By hand, and cut in two.
    let second = ram.slots()[1];
    let half = |page, len| {
        let host = Some(ram.host_ranges(guest(page, len))[0].start());
        SlotSpec { guest: guest(page, len), host, flags: SlotFlags::empty() }
    };
    space.replace_slots(&[second], &[half(8, 2), half(10, 2)]).unwrap();
    assert_eq!(ram.slots().len(), 3);
    for page in [1, 9, 11] {
        let window = space.zap(guest(page, 1)).unwrap();
        ram.within(&window).unwrap().discard(guest(page, 1)).unwrap();
        window.close().unwrap();
    }
    // What is unplugged stays so.
    let window = space.zap(guest(2, 1)).unwrap();
    window.discard();
    window.close().unwrap();
    ram.set_slot_flags(SlotFlags::empty()).unwrap();
    assert!(space.walker().fault(guest(2, 1)).is_err());
    drop(ram);
    assert_eq!((mapped(), space.slots()), ([false, false], vec![]));
}

/// Threads change the same pages in windows that overlap. What was the last word on a page is what both say.
#[test]
fn the_layout_is_true_whoever_changes_what_at_the_same_time() {
    for kind in KINDS {
        let bench = Bench::new(kind);
        let files = [filled(100, PAGES), filled(150, PAGES)];
        std::thread::scope(|threads| {
            for thread in 0..4_u64 {
                let (bench, files) = (&bench, &files);
                threads.spawn(move || {
                    let mut random = 0x2545_f491_4f6c_dd1d_u64.wrapping_mul(thread + 1);
                    let mut next = |below: u64| {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        random % below
                    };
                    for _ in 0..400 {
                        let first = next(PAGES);
                        let count = 1 + next((PAGES - first).min(6));
                        let range = guest(first, count);
                        match next(5) {
                            0 => bench.ram.discard(range).unwrap(),
                            1 => bench.ram.protect(range, [Access::READ, Access::RW][next(2) as usize]).unwrap(),
                            2 => {
                                let window = bench.space.zap(bench.host(first, count)).unwrap();
                                let within = bench.ram.within(&window).unwrap();
                                let half = first + count / 2;
                                let rest = (first + count - half) * PAGE;
                                let batch = within.batch().replace(page_at(half), &source(&files[1], 0), rest);
                                let batch =
                                    if half == first { batch } else { batch.discard(guest(first, half - first)) };
                                batch.run().unwrap();
                                window.close().unwrap();
                            }
                            _ => {
                                let from = source(&files[next(2) as usize], first);
                                let from = if next(2) == 0 { from.populated() } else { from };
                                bench.ram.replace(page_at(first), &from, count * PAGE).unwrap();
                            }
                        }
                    }
                });
            }
        });
        bench.assert_true();
        bench.assert_at_rest();
        for page in 0..PAGES {
            // Never anything but zero, or the page of a source.
            let expected = match bench.ram.backing_at(page_at(page)).unwrap() {
                Backing::Replaced { file, offset } => {
                    let first = if Arc::ptr_eq(&file, &files[0]) { 100 } else { 150 };
                    first + (offset / PAGE) as u8
                }
                _ if bench.read(page)[0] == page as u8 + 1 => page as u8 + 1,
                _ => 0,
            };
            if bench.ram.access_at(page_at(page)).unwrap().contains(Access::READ) {
                assert_eq!(bench.read(page), contents(expected), "page {page} of {kind:?}");
            }
        }
    }
}

/// One thread has replaced page 4, and is held up in the middle of the rest of its batch. What another thread does with
/// `page` meanwhile; `patient` is how long the first one waits for it, if not for ever.
fn while_another_is_in_the_middle(page: u64, patient: Option<std::time::Duration>) -> (Bench, [Arc<std::fs::File>; 2]) {
    let bench = Bench::new(Kind::Anonymous);
    let files = [filled(100, 8), filled(150, 8)];
    let (go, gone) = std::sync::mpsc::channel();
    let (done, other_is_done) = std::sync::mpsc::channel();
    let other_is_done = std::sync::Mutex::new(other_is_done);
    bench.log.answer(move |call| {
        if call == Call::Protect {
            go.send(()).unwrap();
            let other_is_done = other_is_done.lock().unwrap();
            match patient {
                Some(patient) => drop(other_is_done.recv_timeout(patient)),
                None => other_is_done.recv().unwrap(),
            }
        }
        Ok(())
    });
    std::thread::scope(|threads| {
        let (bench, files) = (&bench, &files);
        threads.spawn(move || {
            let batch = bench.ram.batch().replace(page_at(4), &source(&files[0], 0), PAGE);
            batch.protect(guest(20, 1), Access::READ).run().unwrap();
        });
        threads.spawn(move || {
            gone.recv().unwrap();
            bench.ram.replace(page_at(page), &source(&files[1], 0), PAGE).unwrap();
            // Nobody may be waiting any more.
            let _ = done.send(());
        });
    });
    (bench, files)
}

#[test]
fn who_wants_a_page_that_another_is_changing_comes_after() {
    let (bench, files) = while_another_is_in_the_middle(4, Some(std::time::Duration::from_millis(50)));
    bench.assert_true();
    let backing = bench.ram.backing_at(page_at(4));
    assert!(matches!(&backing, Some(Backing::Replaced { file, .. }) if Arc::ptr_eq(file, &files[1])), "{backing:?}");
    assert_eq!(bench.read(4), contents(150));
}

#[test]
fn who_wants_another_page_does_not_wait() {
    // Waits for ever where it has to wait.
    let (bench, _) = while_another_is_in_the_middle(5, None);
    bench.assert_true();
    assert_eq!((bench.read(4), bench.read(5)), (contents(100), contents(150)));
}
