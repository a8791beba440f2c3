// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The idea in one page: a guest page moves to another frame, and its translation follows without a fault.
//!
//! A secondary MMU (EPT, an IOTLB, a device) keeps a second copy of the host's translations. Before a page's old frame
//! may be reused, no copy may lead there any more. That is what a *window* is for, and a *guard* is an open window.
#![forbid(unsafe_code)]

use std::{convert::Infallible, error::Error, sync::Arc};

use notifier_core::{Access, Change, Extent, Gpa, GpaRange, Hva, HvaRange, Outcome, OutputAddr, Space};
use spte_core::{HeapPages, MapOptions, Table};
use spte_x86::{Ept, EptOptions};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

const PAGE: u64 = 0x1000;
/// The frame that the page is in, and the one that it moves to: whatever the VMM's walkers mean by such numbers.
const OLD: OutputAddr = OutputAddr::new(0x10_2000);
const NEW: OutputAddr = OutputAddr::new(0x77_7000);

fn main() -> Result<(), Box<dyn Error>> {
    // A space is one guest's memory and everybody who keeps a second copy of its translations. Its slots say which
    // guest physical bytes lie where in the host's address space.
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x10_0000)])?;
    let space = Space::new();
    space.set_memory(&memory)?;

    // One such copy: a table of EPT entries that software walks. By subscribing it is told of every window.
    let table = Table::new(&space, Ept::new(EptOptions::default())?, Arc::new(HeapPages::new()), ())?;
    let _subscription = space.subscribe(Arc::clone(&table))?;

    // The guest touches a page. A vCPU walks inside a scope, for what it finds is good only until the scope ends.
    let page = GpaRange::with_len(Gpa::new(0x2000), PAGE)?;
    let mut walker = space.walker();
    let scope = walker.enter();
    assert!(table.translate(&scope, page.start(), Access::READ).is_err());

    // Nothing there: a fault. Snapshot, resolve, install; each takes the one before by value, so that no other order
    // compiles, and a window that opens in between turns the install into a `Retry`.
    let fault = scope.fault(page)?;
    let backing = Extent { guest: page, output: OLD, access: Access::RWX };
    let resolved = fault.resolve(|_snapshot| Ok::<_, Infallible>(backing))?;
    resolved.install(|admission| table.map(admission, &MapOptions::default()))?;
    show(&table, "faulted in");

    // The host wants the page's old frame back (it found another frame with the same bytes, say). Windows are over what
    // changes: host virtual addresses. From here on nobody writes the page, and no fault can bring writing back.
    let host = Hva::new(memory.get_host_address(GuestAddress(page.start().as_u64()))? as u64);
    let guard = space.retain(HvaRange::with_len(host, PAGE)?)?;
    show(&table, "window open");

    // Now is the time to compare the two frames: before the window, what was compared could be written a moment later.
    // Equal: repoint. On return nothing leads to the old frame, TLBs and software walkers included.
    let moved = guard.change_pte(&[Change { page: host, expected: OLD, new: NEW }])?;
    assert_eq!(moved[0].outcome, Outcome::Changed);
    show(&table, "repointed");

    // The sequence moves, then the count of open windows falls; faults on the page are served again.
    guard.close()?;
    let scope = walker.enter();
    assert_eq!(table.translate(&scope, page.start(), Access::READ)?.output(), NEW);
    assert!(table.translate(&scope, page.start(), Access::WRITE).is_err(), "shared frames are read-only");
    drop(scope);

    // What does not compile. Linux could only check these while it ran, and in 2012 broke the second one unnoticed:
    // change_pte was called with the range zapped, found nothing to change, and was deleted twelve years later.
    //
    //   InvalidationGuard { inner: .. }       there is no guard but from opening a window        (E0451, private fields)
    //   space.zap(range)?.change_pte(&[..])   a Zapped window has nothing to repoint             (E0599, no such method)
    //   guard.close()?; guard.change_pte(..)  the window is over                                 (E0382, moved)
    //   guard.clone()                         one window, one guard                              (E0599, no such method)
    //   resolved.install(..) twice            one fault, one install                             (E0382, moved)
    //
    // Each is a test of notifier-core, beside the twin that compiles.
    Ok(())
}

/// Prints the raw entry: watch the frame in the middle, and bit 1 (write) go away before it changes.
fn show(table: &Table<Ept, HeapPages, ()>, when: &str) {
    let raw = table.entry(Gpa::new(0x2000)).map_or(0, |found| found.raw);
    println!("{when:<12} {raw:#018x}");
}

#[cfg(test)]
#[test]
fn the_tutorial_runs() -> Result<(), Box<dyn Error>> {
    main()
}
