// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The host mapping: where each page's contents are, at its home or in a frame of the store.
//!
//! This is what faults are resolved from. The rule that keeps tables true to it: *a page's place changes only inside a
//! window over the page* (a fault that looked before the change is refused by the window, one that looks after it
//! finds the new place). Windows of different kinds may be open over one page at once, so whoever changes places
//! also holds the lock of the page's group; it is taken inside windows, for moments, and no window is opened under it.

use std::sync::atomic::{AtomicU32, Ordering};

use notifier_core::{Access, AddrRange, Extent, Gpa, GpaRange, OutputAddr};
use parking_lot::{Mutex, MutexGuard};

use super::{memory::PAGE, store::Frame};

/// Pages that share a lock. Merges are made in batches that stay inside one group.
pub(crate) const GROUP: usize = 64;

/// Where a page's contents are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Place {
    /// At its own frame.
    Home,
    /// In a frame of the store, read-only.
    Merged(Frame),
}

impl Place {
    fn encode(self) -> u32 {
        match self {
            Self::Home => 0,
            Self::Merged(Frame(frame)) => frame + 1,
        }
    }

    fn decode(raw: u32) -> Self {
        raw.checked_sub(1).map_or(Self::Home, |frame| Self::Merged(Frame(frame)))
    }
}

/// The guest physical address of a page.
pub(crate) fn gpa(page: usize) -> Gpa {
    Gpa::new((page * PAGE) as u64)
}

/// The output address of a page's home.
pub(crate) fn home(page: usize) -> OutputAddr {
    OutputAddr::new((page * PAGE) as u64)
}

/// The page wants writing, and is merged: it has to be un-merged first.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the page is merged")]
pub(crate) struct IsMerged;

/// The places of one guest's pages.
#[derive(Debug)]
pub(crate) struct Mapping {
    places: Vec<AtomicU32>,
    /// The frame that each page was last merged into, as a place.
    last: Vec<AtomicU32>,
    groups: Vec<Mutex<()>>,
}

/// The right to change the places of one group's pages.
#[derive(Debug)]
pub(crate) struct Places<'m> {
    mapping: &'m Mapping,
    group: usize,
    _lock: MutexGuard<'m, ()>,
}

impl Places<'_> {
    /// Moves a page of this group.
    pub(crate) fn set(&mut self, page: usize, place: Place) {
        debug_assert_eq!(page / GROUP, self.group);
        if let Place::Merged(_) = place {
            self.mapping.last[page].store(place.encode(), Ordering::Relaxed);
        }
        self.mapping.places[page].store(place.encode(), Ordering::Release);
    }
}

impl Mapping {
    /// All pages are at home.
    pub(crate) fn new(pages: usize) -> Self {
        Self {
            places: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            last: (0..pages).map(|_| AtomicU32::new(0)).collect(),
            groups: (0..pages.div_ceil(GROUP)).map(|_| Mutex::new(())).collect(),
        }
    }

    /// Number of pages.
    pub(crate) fn pages(&self) -> usize {
        self.places.len()
    }

    /// Where a page is. Without a window over the page the answer may be out of date at once.
    pub(crate) fn place(&self, page: usize) -> Place {
        Place::decode(self.places[page].load(Ordering::Acquire))
    }

    /// The frame that a page was last merged into.
    pub(crate) fn last(&self, page: usize) -> Option<Frame> {
        match Place::decode(self.last[page].load(Ordering::Relaxed)) {
            Place::Home => None,
            Place::Merged(frame) => Some(frame),
        }
    }

    /// For whoever has a window over pages of `page`'s group open.
    pub(crate) fn lock(&self, page: usize) -> Places<'_> {
        let group = page / GROUP;
        Places { mapping: self, group, _lock: self.groups[group].lock() }
    }

    /// Pages that are merged now.
    pub(crate) fn merged(&self) -> u64 {
        self.places.iter().filter(|place| place.load(Ordering::Relaxed) != 0).count() as u64
    }

    /// What a fault on `range` is answered with, where `page` wants `access`: homes may be written, frames of the store
    /// may not.
    pub(crate) fn resolve(&self, range: GpaRange, page: usize, access: Access) -> Result<Vec<Extent>, IsMerged> {
        let mut extents: Vec<Extent> = Vec::new();
        let first = (range.start().as_u64() / PAGE as u64) as usize;
        let last = ((range.end().as_u64() / PAGE as u64) as usize).min(self.pages());
        for at in first..last {
            let (output, granted) = match self.place(at) {
                Place::Home => (home(at), Access::RWX),
                Place::Merged(_) if at == page && access.writable() => return Err(IsMerged),
                Place::Merged(frame) => (frame.output(), Access::RX),
            };
            let Ok(guest) = AddrRange::with_len(gpa(at), PAGE as u64) else { continue };
            match extents.last_mut() {
                Some(last) if last.access == granted && last.output.checked_add(last.guest.len()) == Some(output) => {
                    if let Ok(longer) = AddrRange::new(last.guest.start(), guest.end()) {
                        last.guest = longer;
                    }
                }
                _ => extents.push(Extent { guest, output, access: granted }),
            }
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn faults_are_answered_in_runs_and_the_store_is_read_only() {
        let mapping = Mapping::new(8);
        mapping.lock(2).set(2, Place::Merged(Frame(5)));
        mapping.lock(3).set(3, Place::Merged(Frame(6)));
        mapping.lock(4).set(4, Place::Merged(Frame::ZERO));
        let all = AddrRange::with_len(gpa(0), 8 * PAGE as u64).unwrap();
        let extents = mapping.resolve(all, 0, Access::WRITE).unwrap();
        let runs: Vec<_> = extents.iter().map(|e| (e.guest.len() / PAGE as u64, e.output, e.access)).collect();
        assert_eq!(
            runs,
            [
                (2, home(0), Access::RWX),
                (2, Frame(5).output(), Access::RX),
                (1, Frame::ZERO.output(), Access::RX),
                (3, home(5), Access::RWX),
            ]
        );
        assert!(mapping.resolve(all, 2, Access::WRITE).is_err());
        assert!(mapping.resolve(all, 2, Access::READ).is_ok());
        assert_eq!(mapping.merged(), 3);
    }
}
