// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pre-copy: a guest's memory is sent elsewhere while the guest, a device and a balloon go on changing it.
//!
//! Each round sends what was written since the round before. Who says what was written? A table, of what the guest wrote
//! through it. Nobody but themselves, of devices and of the host.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;
use std::convert::Infallible;
use std::error::Error;
use std::mem::take;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::{thread, time::Duration};

use notifier_core::{Access, Extent, Gpa, GpaRange, LeaseRequest, OutputAddr, SlotFlags, SlotSpec, Space, Walker};
use spte_core::{HeapPages, MapOptions, Table};
use spte_x86::{LongModeOptions, Npt};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

const PAGE: u64 = 0x1000;
const PAGES: u64 = 256;

type Memory = GuestMemoryMmap<()>;
type Npts = Table<Npt, HeapPages, ()>;

fn main() -> Result<(), Box<dyn Error>> {
    let memory = Memory::from_ranges(&[(GuestAddress(0), (PAGES * PAGE) as usize)])?;
    (0..PAGES).try_for_each(|page| memory.write_obj(!page, GuestAddress(page * PAGE)))?;
    // Facts that leave a table (a page is unmapped that was written) come here, and so does what others report.
    let log = Arc::new(Mutex::new(BTreeSet::new()));
    let sink = {
        let log = Arc::clone(&log);
        move |written: GpaRange| lock(&log).extend(pages(written))
    };
    let space = Space::builder().dirty_sink(sink).build();
    space.set_memory(&memory)?;
    let table = Table::new(&space, Npt::new(LongModeOptions::default())?, Arc::new(HeapPages::new()), ())?;
    let _subscription = space.subscribe(Arc::clone(&table))?;

    // Logging is on from here: small leaves only, so that a bit stands for a page. (All leaves go, and are faulted in again.)
    let (ids, logged): (Vec<_>, Vec<_>) =
        space.slots().into_iter().map(|(id, spec)| (id, SlotSpec { flags: SlotFlags::LOG_DIRTY, ..spec })).unzip();
    space.replace_slots(&ids, &logged)?;

    let stop = AtomicBool::new(false);
    let mut there = vec![0; (PAGES * PAGE) as usize];
    thread::scope(|threads| -> Result<(), Box<dyn Error>> {
        let guest = threads.spawn(|| guest(space.walker(), &table, &memory, &stop));
        // Whatever goes wrong here, the guest has to stop.
        let sent = (|| -> Result<(), Box<dyn Error>> {
            send(0..PAGES, &memory, &mut there)?;
            for round in 1..=3 {
                thread::sleep(Duration::from_millis(2));
                device(&space, &memory)?;
                balloon(&space, &memory, round)?;
                println!("round {round}: {} pages", send(written(&table, &log)?, &memory, &mut there)?);
            }
            Ok(())
        })();
        // The guest stops, and what is left is sent.
        stop.store(true, Ordering::Relaxed);
        guest.join().expect("the guest panicked").map_err(|error| error.to_string())?;
        sent
    })?;
    println!("stopped: {} pages", send(written(&table, &log)?, &memory, &mut there)?);

    let mut here = vec![0; there.len()];
    memory.read_slice(&mut here, GuestAddress(0))?;
    assert!(here == there, "what was sent is not what is here");
    println!("all {PAGES} pages are there");
    Ok(())
}

/// The pages that were written since this was asked last. First what the sink has, then the tables (a write that a table
/// still knows of is in this harvest or in the next), and only then are the pages read.
fn written(table: &Npts, log: &Mutex<BTreeSet<u64>>) -> Result<BTreeSet<u64>, Box<dyn Error>> {
    let mut written = take(&mut *lock(log));
    let all = GpaRange::with_len(Gpa::new(0), PAGES * PAGE)?;
    written.extend(table.harvest_dirty(all)?.into_iter().flat_map(pages));
    Ok(written)
}

fn send(pages: impl IntoIterator<Item = u64>, memory: &Memory, there: &mut [u8]) -> Result<usize, Box<dyn Error>> {
    let mut sent = 0;
    for page in pages {
        let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
        memory.read_slice(&mut there[bytes], GuestAddress(page * PAGE))?;
        sent += 1;
    }
    Ok(sent)
}

/// A vCPU: walks, and writes what it found to a few pages. The walk has set the leaf's dirty bit.
fn guest(
    mut vcpu: Walker,
    table: &Npts,
    memory: &Memory,
    stop: &AtomicBool,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut number = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        number += 1;
        let page = GpaRange::with_len(Gpa::new(number * number % 61 * PAGE), PAGE)?;
        let scope = vcpu.enter();
        match table.translate(&scope, page.start(), Access::WRITE) {
            Ok(found) => memory.write_obj(number, GuestAddress(found.output().as_u64()))?,
            Err(_) => {
                // Frames have the numbers of their pages here. A window was quicker: the next turn tries again.
                let Ok(fault) = scope.fault(page) else { continue };
                let backing = |fault: &notifier_core::Fault<'_>| {
                    let output = OutputAddr::new(fault.range().start().as_u64());
                    Ok::<_, Infallible>(Extent { guest: fault.range(), output, access: Access::RWX })
                };
                let _ = fault.resolve(backing)?.install(|admission| table.map(admission, &MapOptions::default()));
            }
        }
    }
    Ok(())
}

/// A transfer that takes its time: under a lease no window takes its page away, and no table hears of its write. (Frames have the
/// numbers of their pages here, so that this one is found without a walk.)
fn device(space: &Space, memory: &Memory) -> Result<(), Box<dyn Error>> {
    let page = GpaRange::with_len(Gpa::new(100 * PAGE), PAGE)?;
    let lease = space.lease(LeaseRequest::new(page, "device"))?;
    memory.write_slice(b"from the device", GuestAddress(page.start().as_u64()))?;
    space.report_dirty(page);
    drop(lease);
    Ok(())
}

/// A page that is given back reads as zeros from then on: the host has changed it, so the host reports it.
fn balloon(space: &Space, memory: &Memory, round: u64) -> Result<(), Box<dyn Error>> {
    let page = GpaRange::with_len(Gpa::new((200 + round) * PAGE), PAGE)?;
    let window = space.zap(page)?;
    memory.write_slice(&[0; PAGE as usize], GuestAddress(page.start().as_u64()))?;
    space.report_dirty(page);
    window.close()?;
    Ok(())
}

fn pages(range: GpaRange) -> std::ops::Range<u64> {
    range.start().as_u64() / PAGE..range.end().as_u64().div_ceil(PAGE)
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[test]
fn the_tutorial_runs() -> Result<(), Box<dyn Error>> {
    main()
}
