// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Pages and flushes that remember: what was taken, what is free, what was flushed when, and what must not be.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use notifier_core::OutputAddr;
use spte_core::{Entry, Flush, FlushError, FlushRange, FlushRequest, OutOfPages, PageSource, TableLayout};

use super::format::{POISON, Tiny};

/// What happened, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Flush {
        ranges: Vec<FlushRange>,
        all: bool,
        ok: bool,
    },
    /// A page that was part of the table.
    Free(OutputAddr),
    /// A page that never was.
    Unused(OutputAddr),
}

struct Page {
    /// Kept until the source goes, so that whoever reads a page that is free reads poison.
    own: NonNull<Entry>,
    mirror: Option<NonNull<Entry>>,
    bytes: usize,
    free: bool,
    /// Unlinked when a flush began, and that flush has succeeded.
    flushed: bool,
}

// SAFETY: the pointers are to atomics that live as long as the source.
unsafe impl Send for Page {}

#[derive(Default)]
struct State {
    pages: BTreeMap<u64, Page>,
    events: Vec<Event>,
    wrong: Vec<String>,
}

type Hook = Box<dyn FnMut(&FlushRequest<'_>) + Send>;

/// Page source and flush in one: each has to know of the other to check their order.
pub(crate) struct Recorder {
    format: Tiny,
    state: Mutex<State>,
    /// The call that fails, counted from 0; `u64::MAX` for none.
    pub(crate) fail_alloc: AtomicU64,
    pub(crate) allocs: AtomicU64,
    pub(crate) fail_flush: AtomicU64,
    /// Every flush from `fail_flush` on fails, instead of that one alone.
    pub(crate) keep_failing: AtomicBool,
    pub(crate) flushes: AtomicU64,
    /// What hardware does before a flush is complete.
    pub(crate) during_flush: Mutex<Option<Hook>>,
}

impl std::fmt::Debug for Recorder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recorder").finish_non_exhaustive()
    }
}

fn allocate(bytes: usize, fill: u64) -> NonNull<Entry> {
    let layout = std::alloc::Layout::from_size_align(bytes, bytes.max(16)).unwrap();
    // SAFETY: the size is not zero.
    let page = NonNull::new(unsafe { std::alloc::alloc(layout) }).unwrap().cast::<Entry>();
    for index in 0..bytes / 8 {
        // SAFETY: inside what was just allocated.
        unsafe { page.add(index).write(Entry::new(fill)) };
    }
    page
}

fn slice(page: NonNull<Entry>, bytes: usize) -> &'static [Entry] {
    // SAFETY: allocated with this size; freed when the source is dropped, and tests keep it longer than any slice.
    unsafe { std::slice::from_raw_parts(page.as_ptr(), bytes / 8) }
}

impl Recorder {
    pub(crate) fn new(format: Tiny) -> Self {
        Self {
            format,
            state: Mutex::default(),
            fail_alloc: AtomicU64::new(u64::MAX),
            allocs: AtomicU64::new(0),
            fail_flush: AtomicU64::new(u64::MAX),
            keep_failing: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            during_flush: Mutex::new(None),
        }
    }

    pub(crate) fn live(&self) -> u64 {
        self.state.lock().unwrap().pages.values().filter(|page| !page.free).count() as u64
    }

    pub(crate) fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.state.lock().unwrap().events)
    }

    /// Panics if a rule was broken.
    pub(crate) fn verify(&self) {
        let wrong = self.state.lock().unwrap().wrong.clone();
        assert!(wrong.is_empty(), "{}: {wrong:?}", self.format.name);
    }

    /// The call to `alloc` after `n` more that fails.
    pub(crate) fn fail_alloc_in(&self, n: u64) {
        self.fail_alloc.store(self.allocs.load(Ordering::SeqCst) + n, Ordering::SeqCst);
    }

    pub(crate) fn fail_flush_in(&self, n: u64) {
        self.fail_flush.store(self.flushes.load(Ordering::SeqCst) + n, Ordering::SeqCst);
    }

    pub(crate) fn stop_failing(&self) {
        self.fail_alloc.store(u64::MAX, Ordering::SeqCst);
        self.fail_flush.store(u64::MAX, Ordering::SeqCst);
        self.keep_failing.store(false, Ordering::SeqCst);
    }

    /// The page's entries as hardware walks them.
    pub(crate) fn hardware_page(&self, page: OutputAddr) -> &'static [Entry] {
        let state = self.state.lock().unwrap();
        let page = &state.pages[&page.as_u64()];
        slice(page.mirror.unwrap_or(page.own), page.bytes)
    }

    /// Every page that is taken, as hardware walks it.
    pub(crate) fn hardware_pages(&self) -> Vec<&'static [Entry]> {
        let state = self.state.lock().unwrap();
        let taken = state.pages.values().filter(|page| !page.free);
        taken.map(|page| slice(page.mirror.unwrap_or(page.own), page.bytes)).collect()
    }

    /// Linked once and unlinked since: every entry is DEAD.
    fn is_dead(&self, page: &Page) -> bool {
        let ignored = super::format::ACCESSED | super::format::DIRTY;
        use spte_core::format::{Format, Level};
        let all = |dead: u64| {
            slice(page.own, page.bytes).iter().all(|entry| self.format.raw_of(entry.load()) & !ignored == dead)
        };
        (1..=3).filter_map(Level::new).any(|level| all(self.format.not_present(level).dead))
    }
}

// SAFETY: each page is an allocation of its own that is given back to the system only with the source; the rest as in
// `HeapPages`.
unsafe impl PageSource for Recorder {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let call = self.allocs.fetch_add(1, Ordering::SeqCst);
        // And where the engine asks once more.
        let fail = self.fail_alloc.load(Ordering::SeqCst);
        if call == fail || Some(call) == fail.checked_add(1) {
            return Err(OutOfPages { bytes: layout.bytes });
        }
        let own = allocate(layout.bytes, fill);
        let mirror = self.format.mirror.then(|| allocate(layout.bytes, fill));
        let address = own.as_ptr().expose_provenance() as u64;
        let page = Page { own, mirror, bytes: layout.bytes, free: false, flushed: false };
        self.state.lock().unwrap().pages.insert(address, page);
        Ok(OutputAddr::new(address))
    }

    unsafe fn free(&self, address: OutputAddr, layout: TableLayout) {
        let mut state = self.state.lock().unwrap();
        let page = &state.pages[&address.as_u64()];
        let dead = self.is_dead(page);
        let mut wrong = Vec::new();
        if page.free {
            wrong.push(format!("{address} was freed twice"));
        }
        if page.bytes != layout.bytes {
            wrong.push(format!("{address} was freed with another size"));
        }
        // (A table that goes takes with it what waited for a flush.)
        if dead && !page.flushed && !self.keep_failing.load(Ordering::SeqCst) {
            wrong.push(format!("{address} was freed before the flush"));
        }
        for entries in std::iter::once(page.own).chain(page.mirror) {
            slice(entries, page.bytes).iter().for_each(|entry| entry.store(POISON));
        }
        state.wrong.append(&mut wrong);
        state.events.push(if dead { Event::Free(address) } else { Event::Unused(address) });
        if let Some(page) = state.pages.get_mut(&address.as_u64()) {
            page.free = true;
        }
    }

    unsafe fn entries(&self, page: OutputAddr, _: TableLayout) -> NonNull<Entry> {
        self.state.lock().unwrap().pages[&page.as_u64()].own
    }

    unsafe fn mirror(&self, page: OutputAddr, _: TableLayout) -> Option<NonNull<Entry>> {
        self.state.lock().unwrap().pages[&page.as_u64()].mirror
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        for page in self.state.get_mut().unwrap().pages.values() {
            let layout = std::alloc::Layout::from_size_align(page.bytes, page.bytes.max(16)).unwrap();
            for entries in std::iter::once(page.own).chain(page.mirror) {
                // SAFETY: allocated by `allocate` with this layout; nobody has the source any more.
                unsafe { std::alloc::dealloc(entries.as_ptr().cast(), layout) };
            }
        }
    }
}

/// The flush of a [`Recorder`].
#[derive(Debug, Clone)]
pub(crate) struct Recorded(pub(crate) Arc<Recorder>);

impl Flush for Recorded {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        let recorder = &*self.0;
        let call = recorder.flushes.fetch_add(1, Ordering::SeqCst);
        let from = recorder.fail_flush.load(Ordering::SeqCst);
        let fails = call == from || (recorder.keep_failing.load(Ordering::SeqCst) && call >= from);
        let unlinked: Vec<u64> = {
            let mut state = recorder.state.lock().unwrap();
            if request.ranges.is_empty() != request.all {
                state.wrong.push(format!("a flush of nothing, or of everything and more: {request:?}"));
            }
            let dead = state.pages.iter().filter(|(_, page)| !page.free && recorder.is_dead(page));
            dead.map(|(address, _)| *address).collect()
        };
        let ranges = request.ranges.to_vec();
        let event = Event::Flush { ranges, all: request.all, ok: !fails };
        if fails {
            recorder.state.lock().unwrap().events.push(event);
            return Err(FlushError::Failed { code: 5 });
        }
        if let Some(hook) = &mut *recorder.during_flush.lock().unwrap() {
            hook(request);
        }
        let mut state = recorder.state.lock().unwrap();
        for address in unlinked {
            if let Some(page) = state.pages.get_mut(&address) {
                page.flushed = true;
            }
        }
        state.events.push(event);
        Ok(())
    }
}
