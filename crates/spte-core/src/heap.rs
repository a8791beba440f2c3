// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Table pages on the heap, for tables that only software walks.

use alloc::alloc::{Layout, alloc, dealloc};
use core::ptr::NonNull;

use notifier_core::OutputAddr;
use notifier_core::primitive::{AtomicU64, Ordering};

use crate::{
    entry::Entry,
    pages::{OutOfPages, PageSource, TableLayout},
};

/// Table pages on the heap: a page's output address is its address in this process.
///
/// For walkers in software only; no hardware can follow these addresses.
#[derive(Debug, Default)]
pub struct HeapPages {
    live: AtomicU64,
}

impl HeapPages {
    /// No pages yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Pages that are taken and not yet free.
    pub fn live(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    fn layout(layout: TableLayout) -> Option<Layout> {
        // Under loom an entry is larger than eight bytes; what a link can hold is the alignment of the real thing.
        let align = layout.bytes.max(align_of::<Entry>());
        Layout::array::<Entry>(layout.entries()).ok()?.align_to(align).ok()
    }
}

// SAFETY: each page is an allocation of its own, aligned to at least its size, of `entries()` initialised entries that are
// freed only by `free`; its address is its identity. Nobody else has a pointer to it.
unsafe impl PageSource for HeapPages {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let out = OutOfPages { bytes: layout.bytes };
        let heap = Self::layout(layout).filter(|heap| heap.size() != 0).ok_or(out)?;
        // SAFETY: the size is not zero.
        let page = NonNull::new(unsafe { alloc(heap) }).ok_or(out)?.cast::<Entry>();
        for index in 0..layout.entries() {
            // SAFETY: `index` is inside the array just allocated, which is aligned for its items.
            unsafe { page.add(index).write(Entry::new(fill)) };
        }
        self.live.fetch_add(1, Ordering::Relaxed);
        Ok(OutputAddr::new(page.as_ptr().expose_provenance() as u64))
    }

    unsafe fn free(&self, page: OutputAddr, layout: TableLayout) {
        let Some(heap) = Self::layout(layout) else { return };
        // SAFETY: the caller says that the page came from `alloc` with this layout and that nobody uses it.
        let entries = unsafe { self.entries(page, layout) };
        for index in 0..layout.entries() {
            // SAFETY: inside the array, initialised by `alloc`, dropped once.
            unsafe { entries.add(index).drop_in_place() };
        }
        // SAFETY: allocated by `alloc` with this layout.
        unsafe { dealloc(entries.as_ptr().cast(), heap) };
        self.live.fetch_sub(1, Ordering::Relaxed);
    }

    unsafe fn entries(&self, page: OutputAddr, _: TableLayout) -> NonNull<Entry> {
        let pointer = core::ptr::with_exposed_provenance_mut(page.as_u64() as usize);
        // SAFETY: `alloc` never returns a null page, and the caller got `page` from it.
        unsafe { NonNull::new_unchecked(pointer) }
    }
}
