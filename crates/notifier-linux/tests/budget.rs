// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The process's mappings are watched, and are not used up.
//!
//! One test a process: what others map would be counted too. So each test here runs itself again as a child, alone.
#![cfg(target_os = "linux")]

mod support;

use std::{process::Command, sync::Arc};

use notifier_core::{Access, Space};
use notifier_linux::{BudgetError, Call, GuestRam, Kernel, RamError, VmaBudget};
use support::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const ALONE: &str = "NOTIFIER_LINUX_TEST_ALONE";

/// Whether this process is the child that runs the test named. If not, the child was run, and passed.
fn alone(test: &str) -> bool {
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let program = std::env::current_exe().unwrap();
    let child =
        Command::new(program).args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ALONE, "1").output();
    let child = child.unwrap();
    let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
    false
}

fn counted() -> u64 {
    std::fs::read_to_string("/proc/self/maps").unwrap().lines().count() as u64
}

fn exhausted(error: RamError) -> (u64, u64, u64) {
    match error {
        RamError::Budget { source: BudgetError::Exhausted { limit, in_use, wanted, .. }, .. } => {
            (limit, in_use, wanted)
        }
        other => panic!("{other:?}"),
    }
}

fn anonymous(pages: u64, log: &Log, budget: &Arc<VmaBudget>) -> GuestRam {
    let memory = GuestMemoryMmap::<()>::from_regions(vec![region(BASE, pages, None, true)]).unwrap();
    GuestRam::builder(&Space::new(), memory).kernel(log.kernel()).budget(Arc::clone(budget)).build().unwrap()
}

#[test]
fn mappings_that_do_not_fit_are_refused_before_anything_is_done() {
    if !alone("mappings_that_do_not_fit_are_refused_before_anything_is_done") {
        return;
    }
    let log = Log::default();
    let (reserve, room) = (10, 20);
    let limit = Kernel::new();
    let limit = VmaBudget::new(&limit).unwrap().recount().unwrap() + room + reserve;
    let budget = Arc::new(VmaBudget::with_limit(&log.kernel(), limit, reserve).unwrap());
    assert_eq!((budget.limit(), budget.reserve()), (limit, reserve));
    let ram = anonymous(256, &log, &budget);
    let file = filled(100, 8);
    ram.memory().write_slice(&contents(9), GuestAddress(BASE)).unwrap();
    let mut done = 0;
    let error = loop {
        log.take();
        // Every second page: nothing is joined.
        match ram.replace(page_at(2 * done + 1), &source(&file, 3), PAGE) {
            Ok(()) => done += 1,
            Err(error) => break error,
        }
    };
    assert!(!log.take().contains(&Event::Made(Call::MapFile)));
    let (said, in_use, wanted) = exhausted(error);
    assert_eq!((said, wanted), (limit, 2));
    // The region was mapped after the first count, and its mapping may have been joined to one that was there.
    assert!((room / 2 - 1..=room / 2).contains(&done), "{done}");
    assert!(in_use + wanted > limit - reserve && in_use.abs_diff(counted()) <= 1, "{in_use} {}", counted());
    assert!(counted() <= limit - reserve + 2);
    assert_true(&ram, guest(0, 256));

    // A batch asks for all of its mappings at once; protecting and going home ask too.
    budget.recount().unwrap();
    let batch = ram.batch().replace(page_at(200), &source(&file, 0), PAGE).protect(guest(210, 1), Access::READ);
    assert_eq!(exhausted(batch.run().unwrap_err()).2, 4);
    exhausted(ram.protect(guest(210, 1), Access::READ).unwrap_err());
    // The way home is never barred.
    ram.discard(guest(3, 1)).unwrap();
    budget.recount().unwrap();
    // What makes no mapping is not held up: nor is it in a window that is open.
    ram.discard(guest(0, 1)).unwrap();
    ram.replace(page_at(1), &source(&file, 3), PAGE).unwrap();
    let window = ram.space().zap(guest(0, 256)).unwrap();
    ram.within(&window).unwrap().discard(guest(0, 1)).unwrap();
    exhausted(ram.within(&window).unwrap().protect(guest(210, 1), Access::READ).unwrap_err());
    window.close().unwrap();

    // What others of the process gave back counts once it is counted.
    let other = VmaBudget::with_limit(&Kernel::new(), limit + 100, reserve).unwrap();
    let ram2 = anonymous(1, &log, &Arc::new(other));
    drop(ram2);
    drop(ram);
    budget.recount().unwrap();
    let ram = anonymous(256, &log, &budget);
    ram.replace(page_at(1), &source(&file, 3), PAGE).unwrap();
}

#[test]
fn mappings_are_counted_rarely() {
    if !alone("mappings_are_counted_rarely") {
        return;
    }
    let log = Log::default();
    let reserve = 512;
    let limit = VmaBudget::new(&Kernel::new()).unwrap().in_use() + 4096 + reserve;
    let budget = Arc::new(VmaBudget::with_limit(&log.kernel(), limit, reserve).unwrap());
    let ram = anonymous(16 * 1024, &log, &budget);
    let file = filled(0, 1);
    // In order, and at home again: 16,000 calls, of which few mappings are left at any time.
    log.take();
    for page in 0..4_000 {
        ram.replace(page_at(page * 2 + 1), &source(&file, 0), PAGE).unwrap();
        ram.discard(guest(page * 2 + 1, 1)).unwrap();
    }
    let counts = log.calls().iter().filter(|&&call| call == Call::CountMappings).count();
    // In the worst case each call makes two mappings; half the reserve is a bound on calls between two counts.
    assert!(counts <= 4_000 * 2 * 2 / (reserve as usize / 2), "{counts}");
    // Up to the limit: what is near to it is not counted at each call either.
    let mut done = 0;
    while ram.replace(page_at(done * 2 + 1), &source(&file, 0), PAGE).is_ok() {
        done += 1;
    }
    assert!((4096 / 2 - 8..=4096 / 2).contains(&done), "{done}");
    let counts = log.calls().iter().filter(|&&call| call == Call::CountMappings).count();
    assert!(counts <= 2 * done as usize / (reserve as usize / 2) + 2, "{counts} of {done}");
    let last = counted();
    assert!(last <= limit - reserve && last > limit - reserve - 64, "{last} {limit}");
}

#[test]
fn what_the_kernel_has_joined_is_not_cut_beyond_the_limit() {
    if !alone("what_the_kernel_has_joined_is_not_cut_beyond_the_limit") {
        return;
    }
    let (pages, reserve) = (4096, 300);
    let kernel = Kernel::new();
    let limit = VmaBudget::new(&kernel).unwrap().recount().unwrap() + 600;
    let budget = Arc::new(VmaBudget::with_limit(&kernel, limit, reserve).unwrap());
    let ram = anonymous(pages, &Log::default(), &budget);
    // Two handles of one file: apart in the layout, joined by the kernel.
    let file = memfd(pages * PAGE);
    let other = Arc::new(file.try_clone().unwrap());
    for page in 0..pages {
        ram.replace(page_at(page), &source([&file, &other][page as usize % 2], page), PAGE).unwrap();
    }
    assert!(counted() < limit - reserve);
    let mut done = 0;
    let error = loop {
        match ram.protect(guest(2 * done, 1), Access::READ) {
            Ok(()) => done += 1,
            Err(error) => break error,
        }
        assert!(2 * done < pages, "never refused");
    };
    assert!(done > 50, "{done}");
    assert!(counted() <= limit - reserve / 2, "{} of {limit}", counted());
    assert_eq!(exhausted(error).2, 2);
    // The way home is open all the same.
    for page in 0..pages {
        ram.discard(guest(page, 1)).unwrap();
    }
    assert_true(&ram, guest(0, pages));
}

/// The real limit, in pages scattered over RAM: what merging does at its worst.
#[test]
fn at_the_kernels_limit_the_process_goes_on() {
    if !alone("at_the_kernels_limit_the_process_goes_on") {
        return;
    }
    let budget = Arc::new(VmaBudget::new(&Kernel::new()).unwrap());
    let limit = budget.limit();
    assert_eq!(budget.reserve(), 1024.max(limit / 16));
    // Enough for any limit that a test can afford to reach.
    let limit_of_test = limit.min(262_144);
    let budget = if limit == limit_of_test {
        budget
    } else {
        Arc::new(VmaBudget::with_limit(&Kernel::new(), limit_of_test, limit_of_test / 16).unwrap())
    };
    let limit = limit_of_test;
    let pages = limit.next_power_of_two();
    let memory = GuestMemoryMmap::<()>::from_regions(vec![region(BASE, pages, None, true)]).unwrap();
    let space = Space::new();
    let ram = GuestRam::builder(&space, memory).budget(Arc::clone(&budget)).build().unwrap();
    let number = |page: u64| page.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let write = |page: u64| ram.memory().write_obj(number(page), GuestAddress(BASE + page * PAGE)).unwrap();
    let read = |page: u64| ram.memory().read_obj::<u64>(GuestAddress(BASE + page * PAGE)).unwrap();
    // Contents for one page in sixteen, so that the test is light on memory.
    (0..pages).step_by(16).for_each(write);
    let file = filled(7, 1);
    // Scattered: an odd stride goes through all pages of a power of two. No two neighbours are joined, for all have the
    // same page of the source.
    let mut replaced = vec![false; pages as usize];
    let mut page = 1;
    let window = space.zap(guest(0, pages)).unwrap();
    let within = ram.within(&window).unwrap();
    let error = loop {
        match within.replace(page_at(page), &source(&file, 0), PAGE) {
            Ok(()) => replaced[page as usize] = true,
            Err(error) => break error,
        }
        page = (page + 40_503) % pages;
    };
    let (said, in_use, _) = exhausted(error);
    assert_eq!(said, limit);
    let now = counted();
    // Looking takes a mapping of its own.
    assert!(now <= limit - budget.reserve() + 8, "{now} of {limit}");
    assert!(now > limit - 2 * budget.reserve(), "{now} of {limit}: given up too early");
    assert!(in_use.abs_diff(now) < budget.reserve() / 2, "{in_use} {now}");
    window.close().unwrap();

    // The process still allocates, also in mappings of their own, starts threads and reads files.
    let large: Vec<Vec<u8>> = (0..64).map(|_| vec![1; 1 << 20]).collect();
    assert_eq!(large.iter().map(|one| one[77] as usize).sum::<usize>(), 64);
    drop(large);
    assert_eq!(std::thread::spawn(|| 6 * 7).join().unwrap(), 42);
    assert!(std::fs::read_to_string("/proc/self/status").unwrap().contains("VmSize"));
    assert!(budget.in_use() > 0);
    for page in 0..pages {
        let expected = match page {
            page if replaced[page as usize] => u64::from_ne_bytes([7; 8]),
            page if page % 16 == 0 => number(page),
            _ => 0,
        };
        assert_eq!(read(page), expected, "page {page}");
    }
    // And everything can go home: that needs no mappings, and gives back.
    ram.discard(guest(1, 1)).unwrap();
    let window = space.zap(guest(0, pages)).unwrap();
    let within = ram.within(&window).unwrap();
    for page in (0..pages).filter(|&page| replaced[page as usize]) {
        within.discard(guest(page, 1)).unwrap();
    }
    window.close().unwrap();
    assert!(counted() < now / 2, "{} of {now}", counted());
}
