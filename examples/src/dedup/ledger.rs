// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What each page must read: the truth, written down beside the memory by whoever writes it.
//!
//! Nothing here comes from a table, a mapping or the memory itself. A page holds its image, perhaps with a *stamp* over a
//! part of it. Whoever changes a page claims it here first, changes the memory, and then writes down what it did; one
//! at a time a page. Readers hold nobody up: they look here, read the page, and look here again; where nothing was
//! claimed in between, the page had one contents all the time, and has to have read so (a sequence lock, with the
//! guest's page as its data).

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering, fence},
};

use super::{
    images::Images,
    memory::{PAGE, PageBytes},
};

/// Bytes that a stamp covers; stamps begin at multiples of this.
pub(crate) const STAMP: usize = 64;

/// Where in a page, and what.
pub(crate) type StampPiece = (usize, [u8; STAMP]);

/// A change of a page's contents, named by a number that is never used twice. 0 is none: the image as it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stamp(pub(crate) u64);

impl Stamp {
    pub(crate) const NONE: Self = Self(0);

    /// Where in the page its bytes lie.
    pub(crate) fn offset(self) -> usize {
        self.0 as usize % (PAGE / STAMP) * STAMP
    }

    /// Its bytes.
    pub(crate) fn bytes(self) -> [u8; STAMP] {
        let mut bytes = [0; STAMP];
        for (word, i) in bytes.chunks_exact_mut(8).zip(1u64..) {
            word.copy_from_slice(&self.0.wrapping_mul(2 * i + 1).to_le_bytes());
        }
        bytes
    }
}

#[derive(Debug)]
struct Entry {
    /// Odd while somebody changes the page. Guards the two words below.
    sequence: AtomicU64,
    stamp: AtomicU64,
    before: AtomicU64,
    image: u32,
}

/// What a page must read as long as its sequence is this.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Expected {
    sequence: u64,
    pub(crate) stamp: Stamp,
    before: Stamp,
}

/// What came of comparing a page with what it must read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// As it must.
    True,
    /// What it held before it was last changed.
    Older,
    /// Nothing that it has held of late.
    Foreign,
}

/// The truth about one guest's RAM.
#[derive(Debug)]
pub(crate) struct Ledger {
    images: Arc<Images>,
    entries: Vec<Entry>,
}

impl Ledger {
    /// Each page holds the image named for it.
    pub(crate) fn new(images: Arc<Images>, layout: &[u32]) -> Self {
        let entry = |&image: &u32| Entry {
            sequence: AtomicU64::new(0),
            stamp: AtomicU64::new(0),
            before: AtomicU64::new(0),
            image,
        };
        Self { entries: layout.iter().map(entry).collect(), images }
    }

    /// What `page` must read; `None` while somebody is changing it.
    pub(crate) fn observe(&self, page: usize) -> Option<Expected> {
        let entry = &self.entries[page];
        let sequence = entry.sequence.load(Ordering::Acquire);
        let expected = Expected {
            sequence,
            stamp: Stamp(entry.stamp.load(Ordering::Relaxed)),
            before: Stamp(entry.before.load(Ordering::Relaxed)),
        };
        (sequence & 1 == 0 && self.still(page, &expected)).then_some(expected)
    }

    /// Whether nobody has begun to change `page` since it was observed.
    pub(crate) fn still(&self, page: usize, expected: &Expected) -> bool {
        // Sequence lock, reader: had any read before this seen a later change, the load sees that change's claim.
        fence(Ordering::Acquire);
        self.entries[page].sequence.load(Ordering::Relaxed) == expected.sequence
    }

    /// Takes `page` for a change; `None` where somebody else has it.
    pub(crate) fn claim(&self, page: usize) -> Option<Claim<'_>> {
        self.observe(page).and_then(|expected| self.claim_as(page, expected))
    }

    /// Takes `page` if nobody has changed it since it was observed.
    pub(crate) fn claim_as(&self, page: usize, expected: Expected) -> Option<Claim<'_>> {
        let sequence = &self.entries[page].sequence;
        let taken =
            sequence.compare_exchange(expected.sequence, expected.sequence + 1, Ordering::Acquire, Ordering::Relaxed);
        // Sequence lock, writer: whoever reads what is written from here on sees the claim.
        fence(Ordering::Release);
        taken.ok().map(|_| Claim { ledger: self, page, expected })
    }

    /// The bytes that a page with this stamp has.
    pub(crate) fn contents(&self, page: usize, stamp: Stamp) -> PageBytes {
        let mut bytes = *self.images.page(self.entries[page].image);
        if stamp != Stamp::NONE {
            bytes[stamp.offset()..][..STAMP].copy_from_slice(&stamp.bytes());
        }
        bytes
    }

    /// What `seen` is, where `expected` is what it must be.
    pub(crate) fn judge(&self, page: usize, expected: &Expected, seen: &PageBytes) -> Verdict {
        let is = |stamp| *seen == self.contents(page, stamp);
        if is(expected.stamp) {
            Verdict::True
        } else if is(expected.before) {
            Verdict::Older
        } else {
            Verdict::Foreign
        }
    }

    /// Whether the last write to the page (a stamp, or the putting back of what was under one) is missing in `seen`.
    pub(crate) fn lost(&self, page: usize, expected: &Expected, seen: &PageBytes) -> bool {
        let last = if expected.stamp == Stamp::NONE { expected.before } else { expected.stamp };
        let place = last.offset()..last.offset() + STAMP;
        last != Stamp::NONE && seen[place.clone()] != self.contents(page, expected.stamp)[place]
    }
}

/// A page taken for a change. Dropping it says that nothing was changed.
#[derive(Debug)]
pub(crate) struct Claim<'l> {
    ledger: &'l Ledger,
    page: usize,
    expected: Expected,
}

impl Claim<'_> {
    /// What the page must read until it is changed.
    pub(crate) fn expected(&self) -> &Expected {
        &self.expected
    }

    /// What is to be written for the page to have `stamp` and no other, given that it holds what it must: pieces, as
    /// offset and bytes.
    pub(crate) fn pieces(&self, stamp: Stamp) -> Vec<StampPiece> {
        let next = self.ledger.contents(self.page, stamp);
        let mut offsets: Vec<_> =
            [self.expected.stamp, stamp].into_iter().filter(|&s| s != Stamp::NONE).map(Stamp::offset).collect();
        offsets.dedup();
        let piece = |offset: usize| {
            let mut bytes = [0; STAMP];
            bytes.copy_from_slice(&next[offset..][..STAMP]);
            (offset, bytes)
        };
        offsets.into_iter().map(piece).collect()
    }

    /// Writes down that the page has `stamp` now.
    pub(crate) fn publish(self, stamp: Stamp) {
        let entry = &self.ledger.entries[self.page];
        entry.before.store(self.expected.stamp.0, Ordering::Relaxed);
        entry.stamp.store(stamp.0, Ordering::Relaxed);
        // `drop` moves the sequence on.
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        // Release: whoever sees the page free sees what was written to it, and what was written down.
        self.ledger.entries[self.page].sequence.store(self.expected.sequence + 2, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger() -> Ledger {
        Ledger::new(Arc::new(Images::load(&[], 8, 1).unwrap()), &[3, 1, 2])
    }

    #[test]
    fn a_page_is_claimed_by_one_at_a_time_and_readers_see_it() {
        let ledger = ledger();
        let seen = ledger.observe(1).unwrap();
        let claim = ledger.claim(1).unwrap();
        assert!(ledger.claim(1).is_none() && ledger.observe(1).is_none() && !ledger.still(1, &seen));
        drop(claim);
        assert!(ledger.observe(1).is_some() && !ledger.still(1, &seen));
    }

    #[test]
    fn what_is_older_and_what_is_foreign_is_told_apart() {
        let ledger = ledger();
        let stamp = Stamp(77);
        let claim = ledger.claim(0).unwrap();
        let mut bytes = ledger.contents(0, Stamp::NONE);
        for (offset, piece) in claim.pieces(stamp) {
            bytes[offset..][..STAMP].copy_from_slice(&piece);
        }
        claim.publish(stamp);
        let expected = ledger.observe(0).unwrap();
        assert_eq!(ledger.judge(0, &expected, &bytes), Verdict::True);
        assert_eq!(ledger.judge(0, &expected, &ledger.contents(0, Stamp::NONE)), Verdict::Older);
        assert_eq!(ledger.judge(0, &expected, &[0; PAGE]), Verdict::Foreign);
        assert!(ledger.lost(0, &expected, &[0; PAGE]) && !ledger.lost(0, &expected, &bytes));
        // Putting the old contents back.
        let claim = ledger.claim(0).unwrap();
        for (offset, piece) in claim.pieces(Stamp::NONE) {
            bytes[offset..][..STAMP].copy_from_slice(&piece);
        }
        claim.publish(Stamp::NONE);
        assert_eq!(ledger.judge(0, &ledger.observe(0).unwrap(), &bytes), Verdict::True);
    }
}
