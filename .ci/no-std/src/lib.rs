// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table made, mapped and repointed by a program that has no std.
#![no_std]

extern crate alloc;

use alloc::sync::Arc;
use core::alloc::{GlobalAlloc, Layout};

use notifier_core::{Access, AddrRange, Change, Extent, Gpa, OutputAddr, Space};
use spte_arm64::{Stage2, Stage2Options};
use spte_core::{Format, HeapPages, MapOptions, Table};
use spte_mips::{BigEndian, GpaOptions, GpaTable};
use spte_ppc::{BasePage, Radix, RadixOptions};
use spte_x86::{Ept, EptOptions};

struct NoMemory;

// SAFETY: never hands out memory, and so never has any to take back.
unsafe impl GlobalAlloc for NoMemory {
    unsafe fn alloc(&self, _: Layout) -> *mut u8 {
        core::ptr::null_mut()
    }
    unsafe fn dealloc(&self, _: *mut u8, _: Layout) {}
}

#[global_allocator]
static HEAP: NoMemory = NoMemory;

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// Reaches into every crate, so that all of it is compiled and linked.
#[unsafe(no_mangle)]
pub extern "C" fn repoint() -> bool {
    let radix = Radix::new(RadixOptions { page: BasePage::K4, ..RadixOptions::default() });
    run(Ept::new(EptOptions::default()).ok()).is_some()
        && run(Stage2::new(Stage2Options::default()).ok()).is_some()
        && run(GpaTable::<BigEndian>::new(GpaOptions::default()).ok()).is_some()
        && run(radix.ok()).is_some()
}

fn run<F: Format>(format: Option<F>) -> Option<()> {
    let space = Space::new();
    let format = format?;
    let table = Table::new(&space, format, Arc::new(HeapPages::new()), ()).ok()?;
    let _subscription = space.subscribe(Arc::clone(&table)).ok()?;
    let page = AddrRange::with_len(Gpa::new(0x1000), 0x1000).ok()?;
    let mut walker = space.walker();
    let extent = Extent { guest: page, output: OutputAddr::new(0x8000), access: Access::RWX };
    let resolved = walker.fault(page).ok()?.resolve(|_| Ok::<_, ()>(extent)).ok()?;
    resolved.install(|admission| table.map(admission, &MapOptions::default())).ok()?;
    let scope = walker.enter();
    let old = table.translate(&scope, page.start(), Access::READ).ok()?.output();
    drop(scope);
    let guard = space.retain(page).ok()?;
    guard.change_pte(&[Change { page: page.start(), expected: old, new: OutputAddr::new(0x9000) }]).ok()?;
    guard.close().ok()
}
