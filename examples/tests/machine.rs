// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The real guest: what it reads and stores, what its VMM may change below it, and what goes wrong. Where there is no KVM
//! each test says so and passes.
#![cfg(target_arch = "x86_64")]

use std::{
    fs::File,
    os::unix::fs::FileExt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use examples::machine::{BUFFER_PAGES, Machine, MachineError, PAGE, StrangeExit, Vcpu, probe};
use notifier_core::Gpa;
use rustix::{
    fs::MemfdFlags,
    mm::{MapFlags, MprotectFlags, ProtFlags},
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

type Page = [u8; PAGE];

/// Whether the test has anything to run on.
fn kvm() -> bool {
    match probe() {
        Ok(()) => true,
        Err(why) => {
            println!("not run: {why}");
            false
        }
    }
}

fn page(number: u64) -> Gpa {
    Gpa::new(number * PAGE as u64)
}

fn at(gpa: Gpa) -> GuestAddress {
    GuestAddress(gpa.as_u64())
}

/// A page that says which one it is in each of its quadwords.
fn contents(number: u64) -> Page {
    let mut page = [0; PAGE];
    for (index, word) in page.chunks_exact_mut(8).enumerate() {
        word.copy_from_slice(&(number << 16 | index as u64).to_le_bytes());
    }
    page
}

fn anonymous(pages: usize) -> GuestMemoryMmap<()> {
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), pages * PAGE)]).unwrap()
}

/// What a thread's result has to be.
fn from_a_thread<T: Send + Sync + 'static>(value: T) -> T {
    value
}

fn one(ram: &GuestMemoryMmap<()>) -> (Machine, Vcpu) {
    let (machine, mut vcpus) = Machine::new(ram, 1).unwrap();
    (machine, vcpus.pop().unwrap())
}

fn memfd(name: &str, pages: usize) -> File {
    let file = File::from(rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
    file.set_len((pages * PAGE) as u64).unwrap();
    file
}

/// Maps a page of a file over a page of RAM.
fn map_over(ram: &GuestMemoryMmap<()>, number: u64, file: &File, offset: u64) {
    let host = ram.get_host_address(at(page(number))).unwrap();
    // SAFETY: the page is one of a mapping that is guest RAM: Rust code has no reference into it.
    let mapped = unsafe {
        rustix::mm::mmap(
            host.cast(),
            PAGE,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED | MapFlags::FIXED,
            file,
            offset,
        )
    };
    assert_eq!(mapped.unwrap(), host.cast());
}

#[test]
fn the_guest_reads_what_the_host_wrote() {
    if !kvm() {
        return;
    }
    let pages = 3 * BUFFER_PAGES + 5;
    let ram = anonymous(pages);
    for number in 0..pages as u64 {
        ram.write_slice(&contents(number), at(page(number))).unwrap();
    }
    let (_machine, mut vcpu) = one(&ram);
    // Not in order, and one of them twice.
    let mut wanted: Vec<u64> = (0..pages as u64).rev().collect();
    wanted.push(7);
    let gpas: Vec<Gpa> = wanted.iter().copied().map(page).collect();
    let mut out = vec![[9; PAGE]; 1000];
    vcpu.read(&gpas, &mut out).unwrap();
    assert_eq!(out.len(), wanted.len());
    for (number, found) in wanted.iter().zip(&out) {
        assert_eq!(found, &contents(*number), "page {number}");
    }
    vcpu.read(&[], &mut out).unwrap();
    assert!(out.is_empty());
}

#[test]
fn the_host_reads_what_the_guest_wrote() {
    if !kvm() {
        return;
    }
    let pages = 4 * BUFFER_PAGES;
    let ram = anonymous(pages);
    let (_machine, mut vcpu) = one(&ram);
    let mut expected = vec![0; pages * PAGE];
    // Small ones, more than a job list holds; one across two pages; one that is larger than the buffer.
    let large: Vec<u8> = (0..=BUFFER_PAGES as u64).flat_map(contents).collect();
    let small: Vec<[u8; 8]> = (1..=500_u64).map(u64::to_be_bytes).collect();
    let mut pieces: Vec<(Gpa, &[u8])> = Vec::new();
    for (index, bytes) in small.iter().enumerate() {
        pieces.push((Gpa::new(index as u64 * 24), bytes));
    }
    let across = contents(77);
    pieces.push((Gpa::new(20 * PAGE as u64 - 16), &across[..64]));
    pieces.push((page(25), &[]));
    pieces.push((page(30), &large));
    // What comes later wins.
    pieces.push((page(30), &across[..8]));
    for (gpa, bytes) in &pieces {
        expected[gpa.as_u64() as usize..][..bytes.len()].copy_from_slice(bytes);
    }
    vcpu.write(&pieces).unwrap();
    let mut found = vec![0; pages * PAGE];
    ram.read_slice(&mut found, GuestAddress(0)).unwrap();
    assert!(found == expected);
    // And the guest reads its own.
    let mut out = Vec::new();
    vcpu.read(&[page(30), page(31)], &mut out).unwrap();
    assert_eq!(out.concat(), expected[30 * PAGE..32 * PAGE]);
}

#[test]
fn a_piece_that_is_no_multiple_of_eight_is_refused_before_anything_is_written() {
    if !kvm() {
        return;
    }
    let ram = anonymous(4);
    let (_machine, mut vcpu) = one(&ram);
    let refused = vcpu.write(&[(page(0), &[1; 8]), (page(1), &[1; 12])]);
    assert!(matches!(refused, Err(MachineError::Length { at, len: 12 }) if at == page(1)), "{refused:?}");
    assert_eq!(ram.read_obj::<u64>(GuestAddress(0)).unwrap(), 0);
    assert_eq!(vcpu.exits(), 0);
}

#[test]
fn a_job_is_one_exit() {
    if !kvm() {
        return;
    }
    let ram = anonymous(256);
    let (_machine, mut vcpu) = one(&ram);
    let mut out = Vec::new();
    let pages: Vec<Gpa> = (0..256).map(page).collect();
    vcpu.read(&pages[..1], &mut out).unwrap();
    assert_eq!(vcpu.exits(), 1);
    // First touches are no exits either.
    vcpu.read(&pages[..BUFFER_PAGES], &mut out).unwrap();
    assert_eq!(vcpu.exits(), 2);
    vcpu.read(&pages[..3 * BUFFER_PAGES], &mut out).unwrap();
    assert_eq!(vcpu.exits(), 5);
    let bytes = contents(1);
    let pieces: Vec<(Gpa, &[u8])> = pages[..BUFFER_PAGES].iter().map(|&gpa| (gpa, &bytes[..])).collect();
    vcpu.write(&pieces).unwrap();
    assert_eq!(vcpu.exits(), 6);
    vcpu.write(&[]).unwrap();
    assert_eq!(vcpu.exits(), 6);
}

#[test]
fn vcpus_run_on_threads_of_their_own() {
    if !kvm() {
        return;
    }
    const EACH: u64 = 64;
    const ROUNDS: u64 = 50;
    let ram = anonymous(2 * EACH as usize);
    let (machine, vcpus) = Machine::new(&ram, 2).unwrap();
    thread::scope(|scope| {
        for (mut vcpu, first) in vcpus.into_iter().zip([0, EACH]) {
            scope.spawn(move || {
                let gpas: Vec<Gpa> = (first..first + EACH).map(page).collect();
                let mut out = Vec::new();
                for round in 1..=ROUNDS {
                    let bytes: Vec<Page> = (0..EACH).map(|number| contents(round * 1000 + first + number)).collect();
                    let pieces: Vec<(Gpa, &[u8])> =
                        gpas.iter().zip(&bytes).map(|(&gpa, bytes)| (gpa, &bytes[..])).collect();
                    vcpu.write(&pieces).unwrap();
                    vcpu.read(&gpas, &mut out).unwrap();
                    assert!(out == bytes, "round {round} of the vCPU at page {first}");
                }
                assert_eq!(vcpu.exits(), 2 * ROUNDS);
            });
        }
        // Counting goes on meanwhile, and only upwards.
        let mut last = Some(0);
        for _ in 0..100 {
            let now = machine.page_faults().unwrap();
            assert!(now.is_none() || now >= last, "{now:?} after {last:?}");
            last = now;
        }
    });
    for number in 0..2 * EACH {
        let mut found = [0; PAGE];
        ram.read_slice(&mut found, at(page(number))).unwrap();
        assert_eq!(found, contents(ROUNDS * 1000 + number));
    }
}

#[test]
fn a_page_changed_under_a_running_guest_is_seen_without_an_exit() {
    if !kvm() {
        return;
    }
    const CHANGED: u64 = 3;
    const ROUNDS: u64 = 300;
    let file = FileOffset::new(memfd("ram", 16), 0);
    let ram: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 16 * PAGE, Some(file))]).unwrap();
    ram.write_slice(&contents(0), at(page(CHANGED))).unwrap();
    // Page `n` of the other file holds `contents(n)`, and is what round `n` maps.
    let other = memfd("other", ROUNDS as usize + 1);
    for round in 1..=ROUNDS {
        other.write_all_at(&contents(round), round * PAGE as u64).unwrap();
    }
    let (_machine, mut vcpu) = one(&ram);
    let (begun, done, reads) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut out = Vec::new();
            // The same page in all of a job: the guest is at it nearly all of the time.
            let gpas = [page(CHANGED); BUFFER_PAGES];
            let mut jobs = 0;
            while !stop.load(Ordering::Acquire) {
                let oldest = done.load(Ordering::Acquire);
                let job = vcpu.read(&gpas, &mut out);
                let newest = begun.load(Ordering::Acquire);
                if let Err(error) = job {
                    stop.store(true, Ordering::Release);
                    panic!("{error}");
                }
                jobs += 1;
                for (index, word) in out.iter().flat_map(|page| page.chunks_exact(8).enumerate()) {
                    let word = u64::from_le_bytes(*word.first_chunk().unwrap());
                    let fits = word & 0xffff == index as u64 && (oldest..=newest).contains(&(word >> 16));
                    if !fits {
                        stop.store(true, Ordering::Release);
                        panic!("{word:#x} at {index}, between rounds {oldest} and {newest}");
                    }
                }
                reads.store(jobs, Ordering::Release);
            }
            // What came after the last change, whatever the loop above was doing then.
            vcpu.read(&gpas[..1], &mut out).unwrap();
            (jobs + 1, vcpu.exits(), out[0])
        });
        for round in 1..=ROUNDS {
            // The guest reads on between any two changes.
            let before = reads.load(Ordering::Acquire);
            while reads.load(Ordering::Acquire) == before && !stop.load(Ordering::Acquire) {
                thread::yield_now();
            }
            begun.store(round, Ordering::Release);
            map_over(&ram, CHANGED, &other, round * PAGE as u64);
            done.store(round, Ordering::Release);
        }
        stop.store(true, Ordering::Release);
        let (jobs, exits, last) = reader.join().unwrap();
        assert_eq!(last, contents(ROUNDS));
        assert_eq!(exits, jobs, "the changes cost exits");
    });
}

#[test]
fn what_the_guest_stores_goes_to_the_page_that_is_there_now() {
    if !kvm() {
        return;
    }
    let file = FileOffset::new(memfd("ram", 4), 0);
    let ram: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 4 * PAGE, Some(file.clone()))]).unwrap();
    let other = memfd("other", 1);
    let (_machine, mut vcpu) = one(&ram);
    vcpu.write(&[(page(1), &contents(1))]).unwrap();
    map_over(&ram, 1, &other, 0);
    vcpu.write(&[(page(1), &contents(2))]).unwrap();
    let read = |file: &File, offset| {
        let mut found = [0; PAGE];
        file.read_exact_at(&mut found, offset).unwrap();
        found
    };
    assert_eq!(read(file.file(), PAGE as u64), contents(1));
    assert_eq!(read(&other, 0), contents(2));
}

#[test]
fn a_guest_fault_is_typed_and_the_vcpu_goes_on() {
    if !kvm() {
        return;
    }
    let ram = anonymous(8);
    let (_machine, mut vcpu) = one(&ram);
    let mut out = Vec::new();
    for number in 0..8 {
        ram.write_slice(&contents(number), at(page(number))).unwrap();
    }
    // The first byte that no RAM has, but for the control region, which begins at 2 MiB.
    let nowhere = page(8);
    for _ in 0..3 {
        let fault = vcpu.read(&[page(0), nowhere], &mut out).unwrap_err();
        let MachineError::GuestFault { vector, error_code, address, rip } = fault else { panic!("{fault}") };
        // A read (bit 1 clear) by CPL3 (bit 2) where there is no translation (bit 0 clear).
        assert_eq!((vector, error_code, address), (14, 4, nowhere), "at {rip:#x}");
        assert!(out.is_empty());
        vcpu.read(&[page(5)], &mut out).unwrap();
        assert_eq!(out, [contents(5)]);
    }
    let fault = vcpu.write(&[(page(7), &[7; 8]), (nowhere, &[8; 8])]).unwrap_err();
    assert!(
        matches!(fault, MachineError::GuestFault { vector: 14, error_code: 6, address, .. } if address == nowhere),
        "{fault}"
    );
    assert_eq!(ram.read_obj::<u64>(at(page(7))).unwrap(), 0x0707_0707_0707_0707);
    // An address that is not canonical: a general protection fault, error code 0.
    let fault = vcpu.read(&[Gpa::new(1 << 60)], &mut out).unwrap_err();
    assert!(matches!(fault, MachineError::GuestFault { vector: 13, error_code: 0, .. }), "{fault}");
    vcpu.read(&[page(2)], &mut out).unwrap();
    assert_eq!(out, [contents(2)]);
}

#[test]
fn the_guest_can_write_neither_its_tables_nor_its_programs() {
    if !kvm() {
        return;
    }
    let ram = anonymous(8);
    let (machine, mut vcpu) = one(&ram);
    let root = Gpa::new(machine.table().root().as_u64());
    let fault = vcpu.write(&[(root, &[0; 8])]).unwrap_err();
    // A write (bit 1) by CPL3 (bit 2) where nothing is mapped (bit 0 clear).
    assert!(
        matches!(fault, MachineError::GuestFault { vector: 14, error_code: 6, address, .. } if address == root),
        "{fault}"
    );
    // The control region begins with what only CPL0 may touch: descriptors, gates, stub; then the program.
    let control = Gpa::new(2 << 20);
    for number in 0..4 {
        let gpa = control.wrapping_add(number * PAGE as u64);
        let fault = vcpu.write(&[(gpa, &[0; 8])]).unwrap_err();
        assert!(
            matches!(fault, MachineError::GuestFault { vector: 14, error_code: 7, address, .. } if address == gpa),
            "{fault}"
        );
    }
    let mut out = Vec::new();
    let fault = vcpu.read(&[control], &mut out).unwrap_err();
    assert!(matches!(fault, MachineError::GuestFault { vector: 14, error_code: 5, .. }), "{fault}");
    vcpu.read(&[page(1)], &mut out).unwrap();
    assert_eq!(machine.table().check(), Ok(()));
}

#[test]
fn the_tables_pass_the_formats_check_before_and_after_hardware_used_them() {
    if !kvm() {
        return;
    }
    let ram = anonymous(600);
    let (machine, mut vcpu) = one(&ram);
    machine.table().check().unwrap();
    let before = machine.table().stats();
    assert!(before.leaves[0] > 0 && before.leaves[1] > 0, "{before:?}");
    let mut out = Vec::new();
    let all: Vec<Gpa> = (0..600).map(page).collect();
    vcpu.read(&all, &mut out).unwrap();
    vcpu.write(&[(page(3), &[3; 8]), (page(599), &[3; 8])]).unwrap();
    machine.table().check().unwrap();
    assert_eq!(machine.table().stats(), before);
}

#[test]
fn large_ram_is_mapped_by_large_leaves() {
    if !kvm() {
        return;
    }
    // No memory is spent on what nobody touches.
    let ram = anonymous(2 << 18);
    let (machine, mut vcpu) = one(&ram);
    let leaves = machine.table().stats().leaves;
    assert!(leaves[2] == 2 || leaves[1] == 1024, "{leaves:?}");
    let ends = [page(0), page((1 << 18) - 1), page(1 << 18), page((2 << 18) - 1)];
    for (number, gpa) in ends.iter().enumerate() {
        ram.write_slice(&contents(number as u64), at(*gpa)).unwrap();
    }
    let mut out = Vec::new();
    vcpu.read(&ends, &mut out).unwrap();
    assert_eq!(out, [0, 1, 2, 3].map(contents));
}

#[test]
fn page_faults_are_counted() {
    if !kvm() {
        return;
    }
    let ram = anonymous(512);
    let (machine, mut vcpu) = one(&ram);
    let mut out = Vec::new();
    let Some(none) = machine.page_faults().unwrap() else {
        println!("not run: the kernel does not count page faults of guests");
        return;
    };
    assert_eq!(none, 0);
    let all: Vec<Gpa> = (0..512).map(page).collect();
    vcpu.read(&all, &mut out).unwrap();
    let first = machine.page_faults().unwrap().unwrap();
    assert!(first > 0);
    // It is not exits that are counted: a thousand jobs on a page that is there are not a thousand faults.
    for _ in 0..1000 {
        vcpu.read(&all[..1], &mut out).unwrap();
    }
    let warm = machine.page_faults().unwrap().unwrap();
    assert!(warm - first < 1000, "{first} and then {warm}");
    // A page whose host page is gone faults again.
    let other = memfd("other", 1);
    map_over(&ram, 100, &other, 0);
    vcpu.read(&all[100..101], &mut out).unwrap();
    assert!(machine.page_faults().unwrap().unwrap() > warm);
}

#[test]
fn memory_that_the_host_has_not_is_a_typed_error() {
    if !kvm() {
        return;
    }
    let ram = anonymous(8);
    ram.write_slice(&contents(2), at(page(2))).unwrap();
    let (_machine, mut vcpu) = one(&ram);
    let host = ram.get_host_address(at(page(2))).unwrap();
    let protect = |flags| {
        // SAFETY: a page of guest RAM, into which Rust code has no reference.
        unsafe { rustix::mm::mprotect(host.cast(), PAGE, flags) }.unwrap();
    };
    let mut out = Vec::new();
    vcpu.read(&[page(2)], &mut out).unwrap();
    for _ in 0..2 {
        protect(MprotectFlags::empty());
        let error = vcpu.read(&[page(1), page(2)], &mut out).unwrap_err();
        assert!(matches!(error, MachineError::Run { .. } | MachineError::Exit(StrangeExit::Memory { .. })), "{error}");
        protect(MprotectFlags::READ | MprotectFlags::WRITE);
        vcpu.read(&[page(2)], &mut out).unwrap();
        assert_eq!(out, [contents(2)]);
    }
}

#[test]
fn a_signal_does_not_end_a_job() {
    if !kvm() {
        return;
    }
    use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};
    // Generic, as the type in the middle has no name that could be used here.
    extern "C" fn nothing<T>(_: i32, _: *mut T, _: *mut std::ffi::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing).unwrap();
    let ram = anonymous(BUFFER_PAGES);
    for number in 0..BUFFER_PAGES as u64 {
        ram.write_slice(&contents(number), at(page(number))).unwrap();
    }
    let (_machine, mut vcpu) = one(&ram);
    let interrupted = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&interrupted);
    let reader = thread::spawn(move || {
        let mut out = Vec::new();
        let gpas: Vec<Gpa> = (0..BUFFER_PAGES as u64).map(page).collect();
        let mut jobs = 0;
        // More returns than jobs: one of them was for a signal.
        while vcpu.exits() == jobs {
            vcpu.read(&gpas, &mut out).unwrap();
            jobs += 1;
            for (number, found) in out.iter().enumerate() {
                assert_eq!(found, &contents(number as u64));
            }
        }
        seen.store(true, Ordering::Release);
    });
    while !interrupted.load(Ordering::Acquire) && !reader.is_finished() {
        reader.kill(SIGRTMIN()).unwrap();
        // Time to run in: under a flood of signals the guest is never entered.
        thread::sleep(Duration::from_millis(1));
    }
    reader.join().unwrap();
}

#[test]
fn ram_may_have_holes_and_vcpus_outlive_their_machine() {
    if !kvm() {
        return;
    }
    let ram: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[
        (GuestAddress(0x1000), 3 * PAGE),
        (GuestAddress(0x3fff_f000), 2 * PAGE),
        // Up to where the control region cannot begin.
        (GuestAddress(0xbfff_e000), 2 * PAGE),
    ])
    .unwrap();
    let (machine, mut vcpus) = Machine::new(&ram, 2).unwrap();
    assert!(machine.table().root().as_u64() > 1 << 32);
    drop(machine);
    let mut out = Vec::new();
    for (vcpu, value) in vcpus.iter_mut().zip([1, 2]) {
        for gpa in [0x1000, 0x3fff_f000, 0x4000_0000, 0xbfff_f000] {
            vcpu.write(&[(Gpa::new(gpa), &[value; 8])]).unwrap();
            vcpu.read(&[Gpa::new(gpa)], &mut out).unwrap();
            assert_eq!(out[0][..9], [value, value, value, value, value, value, value, value, 0]);
        }
        for gpa in [0, 0x4000, 0x3fff_e000, 0x4000_1000] {
            let fault = vcpu.read(&[Gpa::new(gpa)], &mut out).unwrap_err();
            assert!(
                matches!(fault, MachineError::GuestFault { vector: 14, address, .. } if address == Gpa::new(gpa)),
                "{fault}"
            );
        }
    }
}

#[test]
fn what_cannot_be_made_is_refused() {
    if !kvm() {
        return;
    }
    let ram = anonymous(8);
    let none = from_a_thread(Machine::new(&ram, 0));
    assert!(matches!(none, Err(MachineError::Vcpus { asked: 0, .. })));
    assert!(matches!(Machine::new(&ram, usize::MAX), Err(MachineError::Vcpus { .. })));
    let odd: GuestMemoryMmap<()> = GuestMemoryMmap::from_ranges(&[(GuestAddress(0x800), PAGE)]).unwrap();
    assert!(matches!(Machine::new(&odd, 1), Err(MachineError::Unaligned { start, .. }) if start == Gpa::new(0x800)));
    let high: GuestMemoryMmap<()> =
        GuestMemoryMmap::from_ranges(&[(GuestAddress((1 << 52) - PAGE as u64), PAGE)]).unwrap();
    assert!(matches!(Machine::new(&high, 1), Err(MachineError::TooHigh { .. })));
}
