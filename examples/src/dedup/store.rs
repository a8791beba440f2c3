// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The store: one frame for all pages of equal contents.
//!
//! A frame is filled once, before anybody shares it, and never written again while anybody does. Whoever lets a page point
//! at a frame is a sharer; the frame of the last sharer to leave is empty again, and its memory given back. Frame 0 is
//! the zero frame: it is always there, and costs nothing.

use std::{collections::HashMap, sync::Arc};

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
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame(pub(crate) u32);

impl Frame {
    pub(crate) const ZERO: Self = Self(0);

    /// Where it lies in every guest's output address space.
    pub(crate) fn output(self) -> OutputAddr {
        OutputAddr::new(STORE_BASE + u64::from(self.0) * PAGE as u64)
    }

    /// Where it lies in the store's file, which has no place for the zero frame.
    fn offset(self) -> u64 {
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
    empty: Vec<Frame>,
    by_contents: HashMap<u64, Vec<Frame>>,
}

/// All frames that guests share.
#[derive(Debug)]
pub(crate) struct Store {
    file: Arc<MemoryFile>,
    capacity: u32,
    zero: u64,
    shelf: Mutex<Shelf>,
}

impl Store {
    /// A store with room for `capacity` frames, the zero frame not counted.
    pub(crate) fn new(capacity: u32) -> Result<Self, Error> {
        let file = Arc::new(MemoryFile::new("dedup-store", u64::from(capacity) * PAGE as u64)?);
        let shelf = Shelf { uses: vec![Use::default()], ..Shelf::default() };
        Ok(Self { file, capacity, zero: fingerprint(&[0; PAGE]), shelf: Mutex::new(shelf) })
    }

    pub(crate) fn file(&self) -> &Arc<MemoryFile> {
        &self.file
    }

    /// Whether there is a frame that contents with this fingerprint may be equal to.
    pub(crate) fn has(&self, fingerprint: u64) -> bool {
        fingerprint == self.zero || self.shelf.lock().by_contents.contains_key(&fingerprint)
    }

    /// Finds or fills the frame with exactly these contents; the caller is a sharer of it now.
    pub(crate) fn share(&self, bytes: &PageBytes) -> Result<Frame, Error> {
        let fingerprint = fingerprint(bytes);
        if fingerprint == self.zero && bytes.iter().all(|&byte| byte == 0) {
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
        let frame = match shelf.empty.pop() {
            Some(frame) => frame,
            None if shelf.uses.len() as u32 <= self.capacity => {
                shelf.uses.push(Use::default());
                Frame(shelf.uses.len() as u32 - 1)
            }
            None => return Err(Error::StoreFull),
        };
        if let Err(error) = self.file.write(frame.offset(), bytes) {
            shelf.empty.push(frame);
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
        shelf.empty.push(frame);
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
        let store = Store::new(2).unwrap();
        let (one, two) = (store.share(&[1; PAGE]).unwrap(), store.share(&[2; PAGE]).unwrap());
        assert_ne!(one, two);
        assert_eq!(store.share(&[1; PAGE]).unwrap(), one);
        assert!(matches!(store.share(&[3; PAGE]), Err(Error::StoreFull)));
        store.leave(one).unwrap();
        assert_eq!((store.in_use(), store.contents(one).unwrap()), (2, [1; PAGE]));
        store.leave(one).unwrap();
        assert_eq!((store.in_use(), store.file().resident().unwrap()), (1, PAGE as u64));
        assert!(!store.has(fingerprint(&[1; PAGE])));
        assert_eq!(store.share(&[3; PAGE]).unwrap(), one);
    }

    #[test]
    fn zero_pages_need_no_frame() {
        let store = Store::new(1).unwrap();
        assert_eq!(store.share(&[0; PAGE]).unwrap(), Frame::ZERO);
        assert!(store.has(fingerprint(&[0; PAGE])));
        assert_eq!((store.in_use(), store.file().resident().unwrap()), (0, 0));
        store.leave(Frame::ZERO).unwrap();
        assert_eq!(store.contents(Frame::ZERO).unwrap(), [0; PAGE]);
    }
}
