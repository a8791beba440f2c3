// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The store: one frame for all pages of equal contents.
//!
//! A frame is filled once, before anybody shares it, and never written again while anybody does. Whoever lets a page point
//! at a frame is a sharer; the frame of the last sharer to leave is empty again, and its memory given back. Frame 0 is
//! the zero frame: it is always there, and costs nothing. (Where frames are mapped into guests it is not used: the host
//! would need a mapping for each page that shares it, for neighbours could not be one.)
//!
//! Neighbours in guests get neighbouring frames where that is possible: runs of them are mapped with one call and
//! need one mapping.

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
    empty: BTreeSet<Frame>,
    by_contents: HashMap<u64, Vec<Frame>>,
}

/// All frames that guests share.
#[derive(Debug)]
pub(crate) struct Store {
    file: Arc<MemoryFile>,
    capacity: u32,
    /// The fingerprint of zeros, where the zero frame is used.
    zero: Option<u64>,
    shelf: Mutex<Shelf>,
}

impl Store {
    /// A store with room for `capacity` frames, the zero frame not counted; and whether that is used.
    pub(crate) fn new(capacity: u32, zero_frame: bool) -> Result<Self, Error> {
        let file = Arc::new(MemoryFile::new("dedup-store", u64::from(capacity) * PAGE as u64)?);
        let shelf = Shelf { uses: vec![Use::default()], ..Shelf::default() };
        let zero = zero_frame.then(|| fingerprint(&[0; PAGE]));
        Ok(Self { file, capacity, zero, shelf: Mutex::new(shelf) })
    }

    pub(crate) fn file(&self) -> &Arc<MemoryFile> {
        &self.file
    }

    /// Whether there is a frame that contents with this fingerprint may be equal to.
    pub(crate) fn has(&self, fingerprint: u64) -> bool {
        Some(fingerprint) == self.zero || self.shelf.lock().by_contents.contains_key(&fingerprint)
    }

    /// Finds or fills the frame with exactly these contents; the caller is a sharer of it now. A new one is the neighbour
    /// of `after` if it can be.
    pub(crate) fn share(&self, bytes: &PageBytes, after: Option<Frame>) -> Result<Frame, Error> {
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
        let untouched = Frame(shelf.uses.len() as u32);
        let untouched = (untouched.0 <= self.capacity).then_some(untouched);
        let neighbour = after.map(|Frame(after)| Frame(after + 1));
        let frame = match neighbour {
            Some(next) if shelf.empty.remove(&next) => next,
            // Untouched ones first: what is empty grows together meanwhile.
            _ => untouched.or_else(|| shelf.empty.pop_first()).ok_or(Error::StoreFull)?,
        };
        if Some(frame) == untouched {
            shelf.uses.push(Use::default());
        }
        if let Err(error) = self.file.write(frame.offset(), bytes) {
            shelf.empty.insert(frame);
            return Err(error);
        }
        shelf.uses[frame.0 as usize] = Use { sharers: 1, fingerprint };
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
        shelf.empty.insert(frame);
        Ok(())
    }

    /// How many frames hold something.
    pub(crate) fn in_use(&self) -> u64 {
        let shelf = self.shelf.lock();
        (shelf.uses.len() - 1 - shelf.empty.len()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_contents_share_a_frame_until_the_last_sharer_leaves() {
        let store = Store::new(2, true).unwrap();
        let (one, two) = (store.share(&[1; PAGE], None).unwrap(), store.share(&[2; PAGE], None).unwrap());
        assert_ne!(one, two);
        assert_eq!(store.share(&[1; PAGE], None).unwrap(), one);
        assert!(matches!(store.share(&[3; PAGE], None), Err(Error::StoreFull)));
        store.leave(one).unwrap();
        assert_eq!((store.in_use(), store.contents(one).unwrap()), (2, [1; PAGE]));
        store.leave(one).unwrap();
        assert_eq!((store.in_use(), store.file().resident().unwrap()), (1, PAGE as u64));
        assert!(!store.has(fingerprint(&[1; PAGE])));
        assert_eq!(store.share(&[3; PAGE], None).unwrap(), one);
    }

    #[test]
    fn neighbours_get_neighbouring_frames() {
        let store = Store::new(8, false).unwrap();
        let mut after = None;
        let frames: Vec<Frame> = (0..6u8)
            .map(|fill| {
                after = Some(store.share(&[fill; PAGE], after).unwrap());
                after.unwrap()
            })
            .collect();
        assert!(frames.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1), "{frames:?}");
        // Two that are empty again: the one that follows is taken, though others were never used.
        store.leave(frames[1]).unwrap();
        store.leave(frames[4]).unwrap();
        assert_eq!(store.share(&[77; PAGE], Some(frames[3])).unwrap(), frames[4]);
        assert!(store.share(&[78; PAGE], Some(frames[3])).unwrap() > frames[5]);
    }

    #[test]
    fn zero_pages_need_no_frame() {
        let store = Store::new(1, true).unwrap();
        assert_eq!(store.share(&[0; PAGE], None).unwrap(), Frame::ZERO);
        assert!(store.has(fingerprint(&[0; PAGE])));
        assert_eq!((store.in_use(), store.file().resident().unwrap()), (0, 0));
        store.leave(Frame::ZERO).unwrap();
        assert_eq!(store.contents(Frame::ZERO).unwrap(), [0; PAGE]);
    }
}
