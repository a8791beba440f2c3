// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What hardware may keep of a table: a cache of translations and links that forgets nothing until it is told to.
//!
//! A guest notices a flush that is missing only by chance. This cache keeps every page that was touched, and every link
//! on the way to it, exactly until a flush names it, and reads flushes as narrowly as hardware may: page by page, as if
//! larger leaves were cached in pieces; links only where a flush says so; and where the format's invalidations may be tagged
//! with the size of a leaf, a level hint drops entries of that level alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use notifier_core::{Access, OutputAddr};
use spte_core::format::Level;
use spte_core::{Flush, FlushError, FlushRequest, Leaves};

/// A translation of one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Cached {
    /// Where the page leads.
    pub(crate) output: OutputAddr,
    /// What was granted, withheld writing left out.
    pub(crate) access: Access,
    /// Hardware has set the dirty bit, and does not look again.
    pub(crate) dirty: bool,
    /// The leaf it came from.
    pub(crate) level: Level,
    pub(crate) start: u64,
    pub(crate) span: u64,
}

#[derive(Debug, Default)]
pub(crate) struct Entries {
    /// By the page's guest address.
    pub(crate) pages: BTreeMap<u64, Cached>,
    /// By level and the guest address where the link's span begins: the span, and the table it leads to.
    pub(crate) links: BTreeMap<(Level, u64), (u64, OutputAddr)>,
}

/// What hardware may keep of a table: translations of pages that were touched, and the links on the way to them. As a
/// [`Flush`] it drops what a flush names, page by page, and no more. A clone is the same cache.
#[derive(Debug, Clone, Default)]
pub struct Tlb {
    entries: Arc<Mutex<Entries>>,
    /// Level hints are read as hints of hardware that goes by them.
    sized: bool,
}

/// So many pages are kept, and so many links; then the one with the lowest address goes, as hardware may drop anything.
const MOST: usize = 48;

impl Tlb {
    /// Of hardware that goes by level hints, or not.
    pub(crate) fn new(sized: bool) -> Self {
        Self { entries: Arc::default(), sized }
    }

    pub(crate) fn entries(&self) -> MutexGuard<'_, Entries> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entries {
    pub(crate) fn keep_page(&mut self, page: u64, cached: Cached) {
        if self.pages.insert(page, cached).is_none() && self.pages.len() > MOST {
            self.pages.pop_first();
        }
    }

    pub(crate) fn keep_link(&mut self, level: Level, start: u64, span: u64, table: OutputAddr) {
        if self.links.insert((level, start), (span, table)).is_none() && self.links.len() > MOST {
            self.links.pop_first();
        }
    }
}

impl Flush for Tlb {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        let mut entries = self.entries();
        if request.all {
            *entries = Entries::default();
            return Ok(());
        }
        for part in request.ranges {
            let (start, end) = (part.range.start().as_u64(), part.range.end().as_u64());
            let named = |page: &Cached| match part.leaves {
                Leaves::None => false,
                Leaves::Of(level) => !self.sized || level == page.level,
                Leaves::Any => true,
            };
            entries.pages.retain(|page, cached| !((start..end).contains(page) && named(cached)));
            if part.links.is_some() {
                let meets = |at: u64, span: u64| at < end && start < at.saturating_add(span);
                entries.links.retain(|(_, at), (span, _)| !meets(*at, *span));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use notifier_core::{AddrRange, Gpa};
    use spte_core::FlushRange;

    use super::*;

    fn level(number: u8) -> Level {
        Level::new(number).unwrap()
    }

    /// A page of a small leaf, one of a larger leaf, and a link.
    fn filled(sized: bool) -> Tlb {
        let tlb = Tlb::new(sized);
        let page = Cached {
            output: OutputAddr::new(0),
            access: Access::READ,
            dirty: false,
            level: Level::LEAF,
            start: 0x1000,
            span: 0x1000,
        };
        let mut entries = tlb.entries();
        entries.keep_page(0x1000, page);
        entries.keep_page(0x20_1000, Cached { level: level(2), start: 0x20_0000, span: 0x20_0000, ..page });
        entries.keep_link(level(2), 0, 0x20_0000, OutputAddr::new(0x8000));
        drop(entries);
        tlb
    }

    /// What a flush leaves: the pages, and how many links.
    fn left(sized: bool, start: u64, len: u64, leaf: Option<u8>, links: bool) -> (Vec<u64>, usize) {
        left_by(sized, start, len, leaf.and_then(Level::new).map_or(Leaves::Any, Leaves::Of), links)
    }

    fn left_by(sized: bool, start: u64, len: u64, leaves: Leaves, links: bool) -> (Vec<u64>, usize) {
        let tlb = filled(sized);
        let range = AddrRange::with_len(Gpa::new(start), len).unwrap();
        let ranges = [FlushRange { range, leaves, links: links.then(|| level(2)) }];
        tlb.flush(&FlushRequest { ranges: &ranges, all: false, nonblocking: false }).unwrap();
        let entries = tlb.entries();
        (entries.pages.keys().copied().collect(), entries.links.len())
    }

    #[test]
    fn a_flush_drops_the_pages_it_names_and_no_more() {
        let both = vec![0x1000, 0x20_1000];
        for sized in [false, true] {
            assert_eq!(left(sized, 0x2000, 0x1000, None, false), (both.clone(), 1));
            assert_eq!(left(sized, 0x1000, 0x1000, None, false), (vec![0x20_1000], 1));
            assert_eq!(left(sized, 0x1000, 0x1000, Some(1), false), (vec![0x20_1000], 1));
            assert_eq!(left(sized, 0x20_0000, 0x1000, None, false), (both.clone(), 1));
            assert_eq!(left(sized, 0x20_0000, 0x2000, None, false), (vec![0x1000], 1));
            let tlb = filled(sized);
            tlb.flush(&FlushRequest { ranges: &[], all: true, nonblocking: false }).unwrap();
            let entries = tlb.entries();
            assert!(entries.pages.is_empty() && entries.links.is_empty());
        }
    }

    #[test]
    fn links_go_where_a_flush_says_so() {
        assert_eq!(left(false, 0x40_0000, 0x1000, None, true), (vec![0x1000, 0x20_1000], 1));
        assert_eq!(left(false, 0x1000, 0x1000, None, true), (vec![0x20_1000], 0));
        assert_eq!(left(false, 0x1000, 0x1000, None, false), (vec![0x20_1000], 1));
        for sized in [false, true] {
            assert_eq!(left_by(sized, 0, 0x40_0000, Leaves::None, true), (vec![0x1000, 0x20_1000], 0), "links alone");
        }
    }

    #[test]
    fn a_level_hint_spares_other_levels_where_hardware_goes_by_it() {
        assert_eq!(left(true, 0, 0x40_0000, Some(1), false).0, [0x20_1000]);
        assert_eq!(left(true, 0, 0x40_0000, Some(2), false).0, [0x1000]);
        assert!(left(false, 0, 0x40_0000, Some(1), false).0.is_empty());
    }

    #[test]
    fn so_many_are_kept_and_no_more() {
        let tlb = filled(false);
        let page = tlb.entries().pages[&0x1000];
        for number in 0..100 {
            tlb.entries().keep_page(number << 12, page);
            tlb.entries().keep_link(level(2), number << 21, 0x20_0000, OutputAddr::new(0));
        }
        let entries = tlb.entries();
        assert_eq!((entries.pages.len(), entries.links.len()), (MOST, MOST));
    }
}
