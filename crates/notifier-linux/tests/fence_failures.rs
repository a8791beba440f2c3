// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Each call that the fence, the filter, the tripwire and the page map make fails once: the error names it, what was so
//! before is so after (or what the documentation says), and doing it again works.
#![cfg(target_os = "linux")]

mod mappings;

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::channel,
    },
    thread,
    time::{Duration, Instant},
};

use mappings::{KINDS, Kind, Mapping, memfd};
use notifier_core::Space;
use notifier_linux::{
    BudgetError, Call, DirtyError, DirtyFilter, Feature, FenceError, Kernel, PageMap, PageMapError, RegisterError,
    Tripwire, TripwireError, VmaBudget, WriteFence,
};
use parking_lot::Mutex;

const LONG: Duration = Duration::from_secs(60);
const EPERM: i32 = 1;
const EINTR: i32 = 4;
const EIO: i32 = 5;
const EAGAIN: i32 = 11;
const EINVAL: i32 = 22;
const ENOTTY: i32 = 25;

/// Which calls fail next.
#[derive(Clone, Default)]
struct Faults(Arc<Mutex<Vec<Fault>>>);

struct Fault {
    call: Call,
    /// So many succeed first.
    after: u64,
    /// So many fail then.
    times: u64,
    errno: i32,
}

impl Faults {
    fn kernel(&self) -> Kernel {
        let faults = self.clone();
        Kernel::with_hook(move |call| {
            let mut faults = faults.0.lock();
            let Some(fault) = faults.iter_mut().find(|fault| fault.call == call && fault.times != 0) else {
                return Ok(());
            };
            if fault.after != 0 {
                fault.after -= 1;
                return Ok(());
            }
            fault.times -= 1;
            Err(io::Error::from_raw_os_error(fault.errno))
        })
    }

    fn fail(&self, call: Call, after: u64, times: u64, errno: i32) {
        self.0.lock().push(Fault { call, after, times, errno });
    }

    fn once(&self, call: Call) {
        self.fail(call, 0, 1, EIO);
    }

    /// Everything that was to fail did.
    fn spent(&self) {
        let mut faults = self.0.lock();
        assert!(faults.iter().all(|fault| fault.times == 0), "a call was not made");
        faults.clear();
    }
}

/// Whether userfaultfd can be used here; otherwise a line that says what is missing.
fn possible() -> bool {
    let memory = Mapping::new(Kind::Anonymous, 1);
    match DirtyFilter::new(&Kernel::new(), &[memory.range()]) {
        Err(DirtyError::Register(RegisterError::Missing(missing))) => {
            println!("not tested: {missing}");
            false
        }
        filter => filter.is_ok(),
    }
}

fn is_eio(source: &io::Error) -> bool {
    source.raw_os_error() == Some(EIO)
}

/// The call that a registration failed in.
fn failed_in(error: &RegisterError) -> Call {
    match error {
        RegisterError::Open { call, source } | RegisterError::Call { call, source, .. } if is_eio(source) => *call,
        other => panic!("{other}"),
    }
}

#[test]
fn what_was_not_made_leaves_nothing_registered() {
    if !possible() {
        return;
    }
    let memory = Mapping::new(Kind::Shared, 4);
    let ranges = [memory.page(0), memory.part(2, 2)];
    let (faults, space) = (Faults::default(), Space::new());
    let kernel = faults.kernel();
    // The second registration: one was made before.
    for (call, after) in
        [(Call::OpenUserfaultfd, 0), (Call::UserfaultfdApi, 0), (Call::Register, 0), (Call::Register, 1)]
    {
        let free = || drop(WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap());

        faults.fail(call, after, 1, EIO);
        match WriteFence::new(&kernel, &ranges) {
            Err(FenceError::Register(error)) => assert_eq!(failed_in(&error), call),
            other => panic!("{other:?}"),
        }
        faults.spent();
        free();
        drop(WriteFence::new(&kernel, &ranges).unwrap());

        faults.fail(call, after, 1, EIO);
        match DirtyFilter::new(&kernel, &ranges) {
            Err(DirtyError::Register(error)) => assert_eq!(failed_in(&error), call),
            other => panic!("{other:?}"),
        }
        faults.spent();
        free();
        drop(DirtyFilter::new(&kernel, &ranges).unwrap());

        faults.fail(call, after, 1, EIO);
        match Tripwire::new(&space, &kernel, &ranges, drop) {
            Err(TripwireError::Register(error)) => assert_eq!(failed_in(&error), call),
            other => panic!("{other:?}"),
        }
        faults.spent();
        free();
        drop(Tripwire::new(&space, &kernel, &ranges, drop).unwrap());
    }

    for (call, after) in [(Call::WriteProtect, 0), (Call::WriteProtect, 1), (Call::ScanPagemap, 0)] {
        faults.fail(call, after, 1, EIO);
        match DirtyFilter::new(&kernel, &ranges) {
            Err(DirtyError::Call { call: named, source, .. }) => assert!(named == call && is_eio(&source)),
            other => panic!("{other:?}"),
        }
        faults.spent();
        assert!((0..4).all(|page| !memory.state(page).write_protected));
        drop(WriteFence::new(&kernel, &[memory.range()]).unwrap());
    }
}

/// Runs a test again as a child, alone in its process; whether this is the child. If not, the child passed.
fn alone(test: &str) -> bool {
    const ALONE: &str = "NOTIFIER_LINUX_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let mut child = std::process::Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", test, "--nocapture", "--test-threads=1"]).env(ALONE, "1");
    let child = child.output().unwrap();
    let said = String::from_utf8_lossy(&child.stdout) + String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
    false
}

#[test]
fn many_ranges_leave_the_reserve_to_the_process() {
    if !possible() || !alone("many_ranges_leave_the_reserve_to_the_process") {
        return;
    }
    let budget = VmaBudget::new(&Kernel::new()).unwrap();
    let ceiling = budget.limit() - budget.reserve();
    if ceiling > 1 << 18 {
        return println!("not tested: a limit of {} mappings is more than a test can reach", budget.limit());
    }
    let memory = Mapping::new(Kind::Anonymous, 2 * ceiling);
    // Every other page: each is a mapping of its own, and so is what lies between.
    let ranges: Vec<_> = (0..ceiling).map(|index| memory.page(2 * index)).collect();
    let exhausted = |error| match error {
        RegisterError::Budget(BudgetError::Exhausted { limit, in_use, wanted, reserve }) => {
            assert!((limit, reserve) == (budget.limit(), budget.reserve()) && in_use + wanted > limit - reserve);
        }
        other => panic!("{other}"),
    };
    let most = Arc::new(AtomicU64::new(0));
    let kernel = Kernel::with_hook({
        let (most, registered) = (Arc::clone(&most), AtomicU64::new(0));
        move |call| {
            // The first one that is undone: everything is still registered.
            if call == Call::Unregister && registered.swap(0, Ordering::SeqCst) != 0 {
                let now = std::fs::read_to_string("/proc/self/maps")?.lines().count() as u64;
                most.fetch_max(now, Ordering::SeqCst);
            } else if call == Call::Register {
                registered.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        }
    });
    match WriteFence::new(&kernel, &ranges).unwrap_err() {
        FenceError::Register(error) => exhausted(error),
        other => panic!("{other}"),
    }
    match DirtyFilter::new(&kernel, &ranges).unwrap_err() {
        DirtyError::Register(error) => exhausted(error),
        other => panic!("{other}"),
    }
    match Tripwire::new(&Space::new(), &kernel, &ranges, drop).unwrap_err() {
        TripwireError::Register(error) => exhausted(error),
        other => panic!("{other}"),
    }
    // Looking takes a mapping or two of its own.
    let most = most.load(Ordering::SeqCst);
    assert!(most <= ceiling + 8 && most + 64 > ceiling, "{most} of {ceiling}");
    assert!(budget.recount().unwrap() < 1_000, "what was registered is undone");

    // What fits is registered, though in the worst case it would not have.
    let fits = ranges.len() / 2 - 500;
    let fence = WriteFence::new(&Kernel::new(), &ranges[..fits]).unwrap();
    fence.arm(ranges[fits - 1]).unwrap();
    let used = budget.recount().unwrap();
    assert!(used > 2 * fits as u64 && used <= ceiling, "{used} of {ceiling}");
}

#[test]
fn mappings_that_cannot_be_counted_are_not_registered() {
    if !possible() {
        return;
    }
    let memory = Mapping::new(Kind::Anonymous, 128);
    let (faults, ranges) = (Faults::default(), (0..64).map(|index| memory.page(2 * index)).collect::<Vec<_>>());
    for call in [Call::MappingLimit, Call::CountMappings] {
        faults.once(call);
        match WriteFence::new(&faults.kernel(), &ranges).unwrap_err() {
            FenceError::Register(RegisterError::Budget(BudgetError::Unknown { call: named, source })) => {
                assert!(named == call && is_eio(&source));
            }
            other => panic!("{other}"),
        }
        faults.spent();
        drop(WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap());
    }
    WriteFence::new(&faults.kernel(), &ranges).unwrap();
}

#[test]
fn what_the_kernel_does_not_offer_is_missing() {
    if !possible() {
        return;
    }
    let memory = Mapping::new(Kind::Anonymous, 1);
    let faults = Faults::default();
    let kernel = faults.kernel();
    faults.fail(Call::OpenUserfaultfd, 0, 1, EPERM);
    match WriteFence::new(&kernel, &[memory.range()]) {
        Err(FenceError::Register(RegisterError::Missing(missing))) => assert_eq!(missing.feature, Feature::Userfaultfd),
        other => panic!("{other:?}"),
    }
    for errno in [ENOTTY, EINVAL] {
        faults.fail(Call::ScanPagemap, 0, 1, errno);
        match DirtyFilter::new(&kernel, &[memory.range()]) {
            Err(DirtyError::Register(RegisterError::Missing(missing))) => {
                assert_eq!(missing.feature, Feature::PagemapScan);
            }
            other => panic!("{other:?}"),
        }
    }
    // Refused for no reason that the list of features gives: it is told as it is; so is a list that cannot be had.
    for (after, errno) in [(0, EINVAL), (1, EIO)] {
        faults.fail(Call::UserfaultfdApi, 0, 1, EINVAL);
        if after != 0 {
            faults.fail(Call::UserfaultfdApi, 0, 1, EIO);
        }
        match WriteFence::new(&kernel, &[memory.range()]) {
            Err(FenceError::Register(RegisterError::Open { call: Call::UserfaultfdApi, source })) => {
                assert_eq!(source.raw_os_error(), Some(errno));
            }
            other => panic!("{other:?}"),
        }
    }
    faults.spent();
    WriteFence::new(&kernel, &[memory.range()]).unwrap();
}

#[test]
fn a_fence_whose_call_fails_is_as_before() {
    if !possible() {
        return;
    }
    for kind in KINDS {
        let memory = Mapping::new(kind, 2);
        let faults = Faults::default();
        let fence = WriteFence::new(&faults.kernel(), &[memory.range()]).unwrap();
        let call_of = |error| match error {
            FenceError::Call { call, range, source } if is_eio(&source) && memory.range().covers(&range) => call,
            FenceError::Wait { call, source } if is_eio(&source) => call,
            other => panic!("{other}"),
        };

        faults.once(Call::WriteProtect);
        assert_eq!(call_of(fence.arm(memory.range()).unwrap_err()), Call::WriteProtect);
        memory.set(0, 1); // Nothing is armed.
        fence.arm(memory.range()).unwrap();

        thread::scope(|scope| {
            let writer = scope.spawn(|| memory.set(0, 2));
            // The message is there, and stays there.
            faults.once(Call::ReadMessages);
            assert_eq!(call_of(fence.next(LONG).unwrap_err()), Call::ReadMessages);
            let waiter = fence.next(LONG).unwrap().unwrap();
            assert_eq!(waiter.address, memory.page(0).start());

            // Nothing is there to be read, and so it polls.
            faults.once(Call::Poll);
            assert_eq!(call_of(fence.next(LONG).unwrap_err()), Call::Poll);
            assert_eq!(fence.next(Duration::ZERO).unwrap(), None);

            // Not woken: not told again.
            faults.once(Call::Wake);
            assert_eq!(call_of(fence.wake(memory.range()).unwrap_err()), Call::Wake);
            assert_eq!(fence.next(Duration::ZERO).unwrap(), None);
            fence.wake(memory.range()).unwrap();
            assert_eq!(fence.next(LONG).unwrap(), Some(waiter));

            // Not lifted: woken, and told again.
            faults.once(Call::Lift);
            assert_eq!(call_of(fence.lift(memory.range()).unwrap_err()), Call::Lift);
            assert_eq!(fence.next(LONG).unwrap(), Some(waiter));
            assert_eq!(memory.get(0), 1);
            // Neither lifted nor woken.
            faults.once(Call::Lift);
            faults.once(Call::Wake);
            assert_eq!(call_of(fence.lift(memory.range()).unwrap_err()), Call::Wake);
            assert_eq!(fence.next(Duration::ZERO).unwrap(), None);
            assert!(!writer.is_finished());
            fence.lift(memory.range()).unwrap();
        });
        assert_eq!(memory.get(0), 2);

        memory.map_over(1, memfd(1), 0);
        faults.once(Call::Register);
        match fence.readmit(memory.page(1)).unwrap_err() {
            FenceError::Register(error) => assert_eq!(failed_in(&error), Call::Register),
            other => panic!("{other}"),
        }
        assert!(matches!(fence.arm(memory.page(1)), Err(FenceError::Lapsed { .. })));
        fence.readmit(memory.page(1)).unwrap();
        fence.arm(memory.page(1)).unwrap();
        assert!(memory.state(1).write_protected || !memory.state(1).present);
        faults.spent();
    }
}

#[test]
fn a_range_with_a_gap_is_armed_and_lifted_around_it() {
    if !possible() {
        return;
    }
    for kind in KINDS {
        let memory = Mapping::new(kind, 9);
        let faults = Faults::default();
        let fence = WriteFence::new(&faults.kernel(), &[memory.range()]).unwrap();
        (0..9).for_each(|page| memory.set(page, 1));
        let store = memfd(1);
        [2, 5].into_iter().for_each(|page| memory.map_over(page, &store, 0));
        let armed = || (0..9).filter(|&page| memory.state(page).write_protected).collect::<Vec<_>>();
        let lapsed = |error| matches!(error, FenceError::Lapsed { address } if address == memory.page(2).start());
        assert!(lapsed(fence.arm(memory.range()).unwrap_err()), "{kind:?}");
        assert_eq!(armed(), [0, 1, 3, 4, 6, 7, 8]);
        thread::scope(|scope| {
            scope.spawn(|| memory.set(8, 2));
            fence.next(LONG).unwrap().unwrap();
            assert!(lapsed(fence.lift(memory.range()).unwrap_err()), "{kind:?}");
        });
        assert!(armed().is_empty() && memory.get(8) == 2);

        // A call that fails on the way is told with its part, and lifting takes back what was armed.
        faults.fail(Call::WriteProtect, 2, 1, EIO);
        let error = fence.arm(memory.range()).unwrap_err();
        let FenceError::Call { call: Call::WriteProtect, range, .. } = error else { panic!("{error}") };
        assert!(range != memory.range() && memory.range().covers(&range));
        faults.spent();
        assert!(lapsed(fence.lift(memory.range()).unwrap_err()));
        assert!(armed().is_empty());
    }
}

#[test]
fn interrupted_calls_are_repeated_but_not_for_ever() {
    if !possible() {
        return;
    }
    let memory = Mapping::new(Kind::Anonymous, 1);
    let faults = Faults::default();
    let fence = WriteFence::new(&faults.kernel(), &[memory.range()]).unwrap();
    for errno in [EAGAIN, EINTR] {
        faults.fail(Call::WriteProtect, 0, 5, errno);
        faults.fail(Call::Lift, 0, 5, errno);
        fence.arm(memory.range()).unwrap();
        fence.lift(memory.range()).unwrap();
        faults.spent();
    }
    faults.fail(Call::WriteProtect, 0, u64::MAX, EAGAIN);
    let error = fence.arm(memory.range()).unwrap_err();
    assert!(matches!(&error, FenceError::Call { source, .. } if source.raw_os_error() == Some(EAGAIN)), "{error}");
}

#[test]
fn dropping_lets_waiters_go_on_whatever_fails() {
    if !possible() {
        return;
    }
    for kind in KINDS {
        for calls in [&[Call::Unregister][..], &[Call::Wake], &[Call::Unregister, Call::Wake]] {
            let memory = Mapping::new(kind, 1);
            let faults = Faults::default();
            let fence = WriteFence::new(&faults.kernel(), &[memory.range()]).unwrap();
            fence.arm(memory.range()).unwrap();
            calls.iter().for_each(|&call| faults.once(call));
            thread::scope(|scope| {
                scope.spawn(|| memory.set(0, 7));
                fence.next(LONG).unwrap().unwrap();
                drop(fence);
            });
            faults.spent();
            assert!(memory.get(0) == 7 && !memory.state(0).write_protected, "{kind:?}");
            WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap();
        }
    }
}

#[test]
fn a_fence_that_could_not_be_disbanded_is_by_doing_it_again() {
    if !possible() {
        return;
    }
    for kind in KINDS {
        // The first of two ranges, or the second.
        for (call, after) in [(Call::Unregister, 0), (Call::Unregister, 1), (Call::Wake, 0), (Call::Wake, 1)] {
            let (memory, faults) = (Mapping::new(kind, 3), Faults::default());
            let ranges = [memory.page(0), memory.page(2)];
            thread::scope(|scope| {
                // Dropped where an assertion fails, and so nobody waits for ever.
                let fence = WriteFence::new(&faults.kernel(), &ranges).unwrap();
                ranges.iter().for_each(|&range| fence.arm(range).unwrap());
                let writers = [0, 2].map(|page| {
                    let memory = &memory;
                    scope.spawn(move || memory.set(page, 7))
                });
                let mut waiting = Vec::new();
                while waiting.len() < 2 {
                    fence.next_batch(&mut waiting, LONG).unwrap();
                }
                faults.fail(call, after, 1, EIO);
                match fence.disband().unwrap_err() {
                    FenceError::Call { call: named, range, source } => {
                        assert!(named == call && range == ranges[after as usize] && is_eio(&source), "{source}");
                    }
                    other => panic!("{other}"),
                }
                faults.spent();
                // The other one goes on, whichever failed.
                let until = Instant::now() + LONG;
                while !writers[1 - after as usize].is_finished() {
                    assert!(Instant::now() < until, "the other writer waits");
                    thread::yield_now();
                }
                assert!(matches!(fence.arm(ranges[0]), Err(FenceError::Disbanded { range }) if range == ranges[0]));
                assert!(!writers[after as usize].is_finished());
                fence.disband().unwrap();
                while !writers.iter().all(|writer| writer.is_finished()) {
                    assert!(Instant::now() < until, "a writer waits though the fence was disbanded");
                    thread::yield_now();
                }
                fence.disband().unwrap();
            });
            assert!(memory.get(0) == 7 && memory.get(2) == 7);
        }
    }
}

#[test]
fn a_fence_that_ended_lets_its_memory_be_another_ones() {
    if !possible() {
        return;
    }
    for kind in KINDS {
        let (memory, faults) = (Mapping::new(kind, 3), Faults::default());
        let ranges = [memory.page(0), memory.page(2)];
        let fence = WriteFence::new(&faults.kernel(), &ranges).unwrap();
        faults.fail(Call::Unregister, 1, 1, EIO);
        fence.disband().unwrap_err();
        let other = WriteFence::new(&Kernel::new(), &[memory.page(0)]).unwrap();
        other.arm(memory.page(0)).unwrap();
        // Whatever the first one still has to do, this is not its own any more.
        fence.disband().unwrap();
        fence.disband().unwrap();
        drop(fence);
        assert!(memory.state(0).write_protected, "{kind:?}");
        other.arm(memory.page(0)).unwrap();
    }
}

#[test]
fn a_fence_ends_around_memory_that_could_not_be_fenced() {
    if !possible() {
        return;
    }
    let disk = std::fs::File::open(std::env::current_exe().unwrap()).unwrap();
    for kind in KINDS {
        let memory = Mapping::new(kind, 9);
        let fence = WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap();
        fence.arm(memory.range()).unwrap();
        memory.map_over(3, &disk, 0);
        memory.map_over(6, &disk, 0);
        thread::scope(|scope| {
            let writer = scope.spawn(|| memory.set(8, 7));
            fence.next(LONG).unwrap().unwrap();
            let outcome = fence.disband();
            // Otherwise it waits for ever.
            drop(fence);
            writer.join().unwrap();
            outcome.unwrap();
        });
        (0..9).filter(|page| ![3, 6].contains(page)).for_each(|page| assert!(!memory.state(page).write_protected));
    }
}

#[test]
fn an_answer_that_fails_loses_no_write() {
    if !possible() {
        return;
    }
    const PAGES: u64 = 1024;
    for kind in KINDS {
        let memory = Mapping::new(kind, PAGES);
        let faults = Faults::default();
        let filter = DirtyFilter::new(&faults.kernel(), &[memory.range()]).unwrap();
        let scan_failed = |error| match error {
            DirtyError::Call { call, source, .. } => call == Call::ScanPagemap && is_eio(&source),
            _ => false,
        };
        // Every other page: 512 regions, which take two scans and the rest. The first finds and arms 256 of them.
        for after in [0, 1] {
            (0..PAGES).step_by(2).for_each(|page| memory.set(page, 1));
            let expected: Vec<_> = (0..PAGES).step_by(2).map(|page| memory.page(page)).collect();

            faults.fail(Call::ScanPagemap, after, 1, EIO);
            assert!(scan_failed(filter.peek(memory.range()).unwrap_err()));
            assert_eq!(filter.peek(memory.range()).unwrap(), expected, "a failed look changes nothing");

            faults.fail(Call::ScanPagemap, after, 1, EIO);
            assert!(scan_failed(filter.written(memory.range()).unwrap_err()));
            let found = filter.written(memory.range()).unwrap();
            for page in &expected {
                assert!(found.iter().any(|range| range.covers(page)), "{kind:?}: {page} was lost");
            }
            assert_eq!(filter.written(memory.range()).unwrap(), []);
            faults.spent();
        }

        for call in [Call::Register, Call::WriteProtect] {
            memory.map_over(8, memfd(1), 0);
            faults.once(call);
            match filter.readmit(memory.page(8)).unwrap_err() {
                DirtyError::Register(error) => assert_eq!(failed_in(&error), call),
                DirtyError::Call { call: named, source, .. } => assert!(named == call && is_eio(&source)),
                other => panic!("{other}"),
            }
            filter.readmit(memory.page(8)).unwrap();
            assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(8)], "{kind:?}");
            assert_eq!(filter.written(memory.range()).unwrap(), []);
            memory.set(8, 2);
            assert_eq!(filter.written(memory.range()).unwrap(), [memory.page(8)]);
        }
        faults.spent();
    }
}

#[test]
fn a_tripwire_reports_whatever_fails() {
    if !possible() {
        return;
    }
    let (space, memory, faults) = (Space::new(), Mapping::new(Kind::Anonymous, 2), Faults::default());
    let (send, receive) = channel();
    let tripwire =
        Tripwire::new(&space, &faults.kernel(), &[memory.range()], move |tripped| drop(send.send(tripped))).unwrap();
    let discard = |page| {
        let range = memory.page(page);
        let advice = rustix::mm::Advice::LinuxDontNeed;
        // SAFETY: the mapping's contents may change at any time.
        unsafe { rustix::mm::madvise(memory.pointer(range), range.len() as usize, advice) }.unwrap();
    };

    faults.once(Call::ReadMessages);
    discard(0);
    assert_eq!(receive.recv().unwrap().range, memory.page(0));
    assert_eq!(tripwire.failures(), 1);

    // Whether the page has gone cannot be known.
    faults.once(Call::ReadPagemap);
    discard(0);
    let report = receive.recv().unwrap();
    assert!(!report.settled && report.secondaries.is_ok());
    faults.spent();

    memory.map_over(1, memfd(1), 0);
    assert_eq!(receive.recv().unwrap().range, memory.page(1));
    faults.once(Call::Register);
    match tripwire.readmit(memory.page(1)).unwrap_err() {
        TripwireError::Register(error) => assert_eq!(failed_in(&error), Call::Register),
        other => panic!("{other}"),
    }
    tripwire.readmit(memory.page(1)).unwrap();
    discard(1);
    assert_eq!(receive.recv().unwrap().range, memory.page(1));

    faults.once(Call::Unregister);
    drop(tripwire);
    faults.spent();
    assert!(receive.recv().is_err());
    WriteFence::new(&Kernel::new(), &[memory.range()]).unwrap();
}

#[test]
fn page_states_that_cannot_be_read_are_none() {
    let (memory, faults) = (Mapping::new(Kind::Anonymous, 2), Faults::default());
    let kernel = faults.kernel();
    memory.set(1, 1);
    let mut states = Vec::new();
    PageMap::read(&kernel, memory.range(), &mut states).unwrap();
    assert_eq!(states.iter().map(|state| state.present).collect::<Vec<_>>(), [false, true]);
    faults.once(Call::ReadPagemap);
    let error = PageMap::read(&kernel, memory.range(), &mut states).unwrap_err();
    assert!(matches!(error, PageMapError::Read { range, .. } if range == memory.range()));
    assert!(states.is_empty());
    PageMap::read(&kernel, memory.range(), &mut states).unwrap();
    assert_eq!(states.len(), 2);
}

#[test]
fn every_call_of_this_half_is_among_those_that_failed() {
    if !possible() {
        return;
    }
    let made: Arc<[AtomicU64]> = Call::ALL.iter().map(|_| AtomicU64::new(0)).collect();
    let kernel = Kernel::with_hook({
        let made = Arc::clone(&made);
        move |call| {
            let index = Call::ALL.iter().position(|&known| known == call).unwrap();
            made[index].fetch_add(1, Ordering::SeqCst);
            Ok(())
        }
    });
    let (space, memory) = (Space::new(), Mapping::new(Kind::Private, 2));
    let fence = WriteFence::new(&kernel, &[memory.range()]).unwrap();
    fence.arm(memory.range()).unwrap();
    fence.next(Duration::from_millis(100)).unwrap();
    fence.lift(memory.range()).unwrap();
    fence.readmit(memory.range()).unwrap();
    fence.wake(memory.range()).unwrap();
    drop(fence);
    let filter = DirtyFilter::new(&kernel, &[memory.range()]).unwrap();
    filter.written(memory.range()).unwrap();
    drop(filter);
    let tripwire = Tripwire::new(&space, &kernel, &[memory.range()], drop).unwrap();
    tripwire.readmit(memory.range()).unwrap();
    drop(tripwire);
    PageMap::read(&kernel, memory.range(), &mut Vec::new()).unwrap();
    let of_this_half: Vec<_> = Call::ALL
        .iter()
        .zip(made.iter())
        .filter(|(_, made)| made.load(Ordering::SeqCst) != 0)
        .map(|(call, _)| *call)
        .collect();
    let failed_above = [
        Call::OpenUserfaultfd,
        Call::UserfaultfdApi,
        Call::Register,
        Call::Unregister,
        Call::WriteProtect,
        Call::Lift,
        Call::Wake,
        Call::ReadMessages,
        Call::Poll,
        Call::ReadPagemap,
        Call::ScanPagemap,
    ];
    assert_eq!(of_this_half, failed_above);
}
