// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A page source that runs out when it is told to.

use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use notifier_core::OutputAddr;
use spte_core::{Entry, HeapPages, OutOfPages, PageSource, TableLayout};

/// Pages of another source, which run out when they are told to, and are counted.
///
/// Counters are relaxed: whoever tells the source to fail is the thread that asks it for pages.
#[derive(Debug, Default)]
pub struct ScarcePages<P = HeapPages> {
    inner: P,
    /// Calls to `alloc` so far.
    asked: AtomicU64,
    /// Those of them that failed because the source was told to.
    failed: AtomicU64,
    /// The calls that fail: from `fail_from` up to, not including, `fail_until`.
    fail_from: AtomicU64,
    fail_until: AtomicU64,
}

impl<P> ScarcePages<P> {
    /// All pages of `inner`, until [`ScarcePages::run_out`].
    pub fn new(inner: P) -> Self {
        let [asked, failed, fail_from, fail_until] = [(); 4].map(|()| AtomicU64::new(0));
        Self { inner, asked, failed, fail_from, fail_until }
    }

    /// After `after` more calls to `alloc` that succeed, the next `calls` fail. Replaces what was asked for before.
    pub fn run_out(&self, after: u64, calls: u64) {
        let from = self.asked.load(Ordering::Relaxed).saturating_add(after);
        self.fail_from.store(from, Ordering::Relaxed);
        self.fail_until.store(from.saturating_add(calls), Ordering::Relaxed);
    }

    /// No call fails any more.
    pub fn recover(&self) {
        self.run_out(0, 0);
    }

    /// Whether a later call may fail.
    pub fn may_run_out(&self) -> bool {
        let from = self.fail_from.load(Ordering::Relaxed).max(self.asked.load(Ordering::Relaxed));
        from < self.fail_until.load(Ordering::Relaxed)
    }

    /// Calls to `alloc` that failed because they were told to.
    pub fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    /// Calls to `alloc`.
    pub fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }

    /// Where the pages come from.
    pub fn inner(&self) -> &P {
        &self.inner
    }
}

// SAFETY: every page is one of `inner`'s, with the layout it was asked for; each call is passed on as it is, or, for
// `alloc`, not made at all.
unsafe impl<P: PageSource> PageSource for ScarcePages<P> {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let call = self.asked.fetch_add(1, Ordering::Relaxed);
        let failing = self.fail_from.load(Ordering::Relaxed)..self.fail_until.load(Ordering::Relaxed);
        if failing.contains(&call) {
            self.failed.fetch_add(1, Ordering::Relaxed);
            return Err(OutOfPages { bytes: layout.bytes });
        }
        self.inner.alloc(layout, fill)
    }

    unsafe fn free(&self, page: OutputAddr, layout: TableLayout) {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.free(page, layout) }
    }

    unsafe fn entries(&self, page: OutputAddr, layout: TableLayout) -> NonNull<Entry> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.entries(page, layout) }
    }

    unsafe fn mirror(&self, page: OutputAddr, layout: TableLayout) -> Option<NonNull<Entry>> {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.mirror(page, layout) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exactly_the_calls_fail_that_were_named() {
        let pages = ScarcePages::new(HeapPages::new());
        let layout = TableLayout { bytes: 4096 };
        let ask = || {
            pages.alloc(layout, 0).map(|page| {
                // SAFETY: just allocated with this layout.
                unsafe { pages.free(page, layout) }
            })
        };
        assert!(ask().is_ok() && !pages.may_run_out());
        pages.run_out(2, 2);
        assert_eq!(
            [(); 6].map(|()| (ask().is_ok(), pages.may_run_out())),
            [(true, true), (true, true), (false, true), (false, false), (true, false), (true, false)]
        );
        assert_eq!((pages.asked(), pages.failed(), pages.inner().live()), (7, 2, 0));
        pages.run_out(0, u64::MAX);
        assert!(ask().is_err() && pages.may_run_out());
        pages.recover();
        assert!(ask().is_ok());
    }
}
