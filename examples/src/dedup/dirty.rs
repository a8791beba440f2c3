// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pages were written: the sink of a space's dirty facts.
//!
//! A fact says that a page was written before the table reported it. That decides what is *worth* comparing; what is
//! equal is decided inside a window.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use notifier_core::{DirtySink, GpaRange};

use super::memory::PAGE;

/// One bit a page.
#[derive(Debug, Clone)]
pub(crate) struct DirtyLog(Arc<[AtomicU64]>);

impl DirtyLog {
    pub(crate) fn new(pages: usize) -> Self {
        Self((0..pages.div_ceil(64)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Whether `page` was written since this was asked last.
    pub(crate) fn take(&self, page: usize) -> bool {
        let (word, bit) = (&self.0[page / 64], 1 << (page % 64));
        word.load(Ordering::Relaxed) & bit != 0 && word.fetch_and(!bit, Ordering::Relaxed) & bit != 0
    }
}

impl DirtySink for DirtyLog {
    fn dirty(&self, range: GpaRange) {
        let range = range.align_out(PAGE as u64);
        for page in range.start().as_u64() / PAGE as u64..range.end().as_u64() / PAGE as u64 {
            if let Some(word) = self.0.get(page as usize / 64) {
                word.fetch_or(1 << (page % 64), Ordering::Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use notifier_core::{AddrRange, Gpa};

    use super::*;

    #[test]
    fn a_fact_is_taken_once_and_covers_touched_pages() {
        let log = DirtyLog::new(200);
        log.dirty(AddrRange::with_len(Gpa::new(64 * 4096 - 1), 2).unwrap());
        let written: Vec<_> = (0..200).filter(|&page| log.take(page)).collect();
        assert_eq!(written, [63, 64]);
        assert!((0..200).all(|page| !log.take(page)));
        // Facts about what is not this guest's memory are nobody's.
        log.dirty(AddrRange::with_len(Gpa::new(1 << 40), 4096).unwrap());
    }
}
