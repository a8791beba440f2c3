// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The store: one frame for all pages of equal contents.
//!
//! A frame is filled once, before anybody shares it, and never written again while anybody does. Whoever lets a page point
//! at a frame is a sharer; the frame of the last sharer to leave is empty again, and its memory given back. Frame 0 is
//! the zero frame: it is always there, and costs nothing. (Where frames are mapped into guests it is not used: the host
//! would need a mapping for each page that shares it, for neighbours could not be one.)
//!
//! Where frames are mapped into guests, their places matter: neighbours in a guest that are neighbours in the store are
//! mapped with one call, and are one mapping of the few that a process may have. So each page of each guest has a
//! place in the store, in the same order, and contents that are new go to the place of the page that has them; contents
//! that were here before go where they were, as long as nothing else is there.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
};

use notifier_core::OutputAddr;
use parking_lot::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use super::{
    error::Error,
    memory::{MemoryFile, PAGE, PageBytes, STORE_BASE},
};

/// A number that equal contents share, and others hardly ever do.
pub(crate) fn fingerprint(bytes: &PageBytes) -> u64 {
    xxh3_64(bytes)
}

/// A frame of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Frame(pub(crate) u32);

impl Frame {
    pub(crate) const ZERO: Self = Self(0);

    /// Where it lies in every guest's output address space.
    pub(crate) fn output(self) -> OutputAddr {
        OutputAddr::new(STORE_BASE + u64::from(self.0) * PAGE as u64)
    }

    /// Where it lies in the store's file, which has no place for the zero frame.
    pub(crate) fn offset(self) -> u64 {
        (u64::from(self.0) - 1) * PAGE as u64
    }
}

#[derive(Debug, Default, Clone, Copy)]
struct Use {
    sharers: u32,
    fingerprint: u64,
}

#[derive(Debug, Default)]
struct Shelf {
    /// By frame; the zero frame's entry is not used.
    uses: Vec<Use>,
    /// Those that were filled once and are empty again; but for places of pages.
    empty: BTreeSet<Frame>,
    by_contents: HashMap<u64, Vec<Frame>>,
    /// Frames that hold something.
    filled: u64,
}

impl Shelf {
    fn is_empty(&self, frame: Frame) -> bool {
        self.uses.get(frame.0 as usize).is_none_or(|used| used.sharers == 0)
    }
}

/// All frames that guests share.
#[derive(Debug)]
pub(crate) struct Store {
    file: Arc<MemoryFile>,
    capacity: u32,
    /// Frames from 1 up to this are places of pages.
    places: u32,
    /// The fingerprint of zeros, where the zero frame is used.
    zero: Option<u64>,
    shelf: Mutex<Shelf>,
}

impl Store {
    /// A store with room for `capacity` frames, the zero frame not counted, that is used.
    pub(crate) fn new(capacity: u32) -> Result<Self, Error> {
        Self::with_places(0, capacity, Some(fingerprint(&[0; PAGE])))
    }

    /// A store with so many places of pages, and as much room besides. The zero frame is not used.
    pub(crate) fn for_mapping(places: u32) -> Result<Self, Error> {
        Self::with_places(places, places.checked_mul(2).ok_or(Error::StoreFull)?, None)
    }

    fn with_places(places: u32, capacity: u32, zero: Option<u64>) -> Result<Self, Error> {
        let file = Arc::new(MemoryFile::new("dedup-store", u64::from(capacity) * PAGE as u64)?);
        let uses = vec![Use::default(); places as usize + 1];
        let shelf = Shelf { uses, ..Shelf::default() };
        Ok(Self { file, capacity, places, zero, shelf: Mutex::new(shelf) })
    }

    /// The place of a page, of those that the store was made with.
    pub(crate) fn place(&self, page: u32) -> Frame {
        Frame(page + 1)
    }

    pub(crate) fn file(&self) -> &Arc<MemoryFile> {
        &self.file
    }

    /// Whether there is a frame that contents with this fingerprint may be equal to.
    pub(crate) fn has(&self, fingerprint: u64) -> bool {
        Some(fingerprint) == self.zero || self.shelf.lock().by_contents.contains_key(&fingerprint)
    }

    /// Finds or fills the frame with exactly these contents; the caller is a sharer of it now. New contents go to the
    /// first of the `wished` frames that is empty, if one is.
    pub(crate) fn share(&self, bytes: &PageBytes, wished: &[Frame]) -> Result<Frame, Error> {
        let fingerprint = fingerprint(bytes);
        if Some(fingerprint) == self.zero && bytes.iter().all(|&byte| byte == 0) {
            return Ok(Frame::ZERO);
        }
        let mut shelf = self.shelf.lock();
        let alike = shelf.by_contents.get(&fingerprint).cloned().unwrap_or_default();
        for frame in alike {
            // A fingerprint is only a hint.
            if self.contents(frame)? == *bytes {
                shelf.uses[frame.0 as usize].sharers += 1;
                return Ok(frame);
            }
        }
        let frame = match wished.iter().find(|&&frame| frame.0 <= self.capacity && shelf.is_empty(frame)) {
            Some(&frame) => frame,
            None => match shelf.empty.first() {
                Some(&frame) => frame,
                None if shelf.uses.len() as u32 <= self.capacity => Frame(shelf.uses.len() as u32),
                None => return Err(Error::StoreFull),
            },
        };
        self.file.write(frame.offset(), bytes)?;
        shelf.empty.remove(&frame);
        let index = frame.0 as usize;
        if shelf.uses.len() <= index {
            shelf.uses.resize(index + 1, Use::default());
        }
        shelf.uses[index] = Use { sharers: 1, fingerprint };
        shelf.filled += 1;
        shelf.by_contents.entry(fingerprint).or_default().push(frame);
        Ok(frame)
    }

    /// The contents of a frame that the caller, or somebody it keeps from leaving, shares.
    pub(crate) fn contents(&self, frame: Frame) -> Result<PageBytes, Error> {
        let mut bytes = [0; PAGE];
        if frame != Frame::ZERO {
            self.file.read(frame.offset(), &mut bytes)?;
        }
        Ok(bytes)
    }

    /// A sharer leaves. Nothing may translate to the frame on its account any more.
    pub(crate) fn leave(&self, frame: Frame) -> Result<(), Error> {
        if frame == Frame::ZERO {
            return Ok(());
        }
        let mut shelf = self.shelf.lock();
        let shelf = &mut *shelf;
        let entry = &mut shelf.uses[frame.0 as usize];
        entry.sharers = entry.sharers.saturating_sub(1);
        if entry.sharers > 0 {
            return Ok(());
        }
        if let Some(alike) = shelf.by_contents.get_mut(&entry.fingerprint) {
            alike.retain(|&other| other != frame);
            if alike.is_empty() {
                shelf.by_contents.remove(&entry.fingerprint);
            }
        }
        // Empty before it can be filled again: the hole must not swallow new contents.
        self.file.punch(frame.offset(), PAGE as u64)?;
        shelf.filled -= 1;
        if frame.0 > self.places {
            shelf.empty.insert(frame);
        }
        Ok(())
    }

    /// How many frames hold something.
    pub(crate) fn in_use(&self) -> u64 {
        self.shelf.lock().filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_contents_share_a_frame_until_the_last_sharer_leaves() {
        let store = Store::new(2).unwrap();
        let (one, two) = (store.share(&[1; PAGE], &[]).unwrap(), store.share(&[2; PAGE], &[]).unwrap());
        assert_ne!(one, two);
        assert_eq!(store.share(&[1; PAGE], &[]).unwrap(), one);
        assert!(matches!(store.share(&[3; PAGE], &[]), Err(Error::StoreFull)));
        store.leave(one).unwrap();
        assert_eq!((store.in_use(), store.contents(one).unwrap()), (2, [1; PAGE]));
        store.leave(one).unwrap();
        assert_eq!((store.in_use(), store.file().resident().unwrap()), (1, PAGE as u64));
        assert!(!store.has(fingerprint(&[1; PAGE])));
        assert_eq!(store.share(&[3; PAGE], &[]).unwrap(), one);
    }

    #[test]
    fn contents_go_to_the_place_of_their_page_and_back_to_it() {
        let store = Store::for_mapping(4).unwrap();
        let share = |page, fill| store.share(&[fill; PAGE], &[store.place(page)]).unwrap();
        // In whatever order they come, neighbours are neighbours.
        let (three, one) = (share(3, 3), share(1, 1));
        assert_eq!(three.0, one.0 + 2);
        assert_eq!(share(2, 1), one, "equal contents are in one place");
        // The place is taken: elsewhere, outside of all places.
        let other = share(1, 9);
        assert!(other.0 > 4);
        store.leave(three).unwrap();
        assert_eq!(share(3, 3), three);
        store.leave(other).unwrap();
        assert_eq!((share(1, 7), store.in_use()), (other, 3));
        // What it was in before is wished for before its own place.
        store.leave(other).unwrap();
        assert_eq!(store.share(&[8; PAGE], &[other, store.place(0)]).unwrap(), other);
        assert_eq!(store.share(&[0; PAGE], &[store.place(0)]).unwrap(), store.place(0), "zeros too");
    }

    #[test]
    fn zero_pages_need_no_frame() {
        let store = Store::new(1).unwrap();
        assert_eq!(store.share(&[0; PAGE], &[]).unwrap(), Frame::ZERO);
        assert!(store.has(fingerprint(&[0; PAGE])));
        assert_eq!((store.in_use(), store.file().resident().unwrap()), (0, 0));
        store.leave(Frame::ZERO).unwrap();
        assert_eq!(store.contents(Frame::ZERO).unwrap(), [0; PAGE]);
    }
}
