// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finding damage, and counting each piece of it once.
//!
//! A write is *lost* when its bytes are not there any more, and a second look does not find them either. A read is *stale*
//! when it saw what the page has not held: what was given back to the host, another page, or an older state that a
//! second look does not find any more. (A page that was taken from under its guest can be both.) What is found is
//! repaired, so that it is not found again.
//!
//! The second look is the guest's own where its memory is nowhere but behind its table, and at the host's mapping where
//! there is one that all of the guest's vCPUs share.

use super::{
    access::{Agent, Piece},
    error::Error,
    ledger::{Claim, Expected, Stamp, StampPiece, Verdict},
    memory::PageBytes,
};

/// A change of a claimed page.
#[derive(Debug)]
pub(crate) struct Stamping<'l> {
    pub(crate) page: usize,
    pub(crate) claim: Claim<'l>,
    pub(crate) stamp: Stamp,
}

/// What every agent can do beside reading and writing: hold what it reads against the ledger.
pub(crate) trait Checking: Agent {
    /// Reads whole pages and compares them with the ledger, but for those that somebody changes meanwhile.
    fn check(&mut self, pages: &[usize]) -> Result<(), Error> {
        let ledger = &self.guest().ledger;
        let (pages, expected): (Vec<_>, Vec<_>) =
            pages.iter().filter_map(|&page| Some((page, ledger.observe(page)?))).unzip();
        let seen = self.read(&pages)?;
        let ledger = &self.guest().ledger;
        let steady: Vec<bool> =
            pages.iter().zip(&expected).map(|(&page, expected)| ledger.still(page, expected)).collect();
        for (((page, expected), seen), steady) in pages.into_iter().zip(expected).zip(&seen).zip(steady) {
            if steady {
                self.check_seen(page, expected, seen)?;
            }
        }
        Ok(())
    }

    /// The same for what the caller has read itself, while the page had to read as `expected`.
    fn check_seen(&mut self, page: usize, expected: Expected, seen: &PageBytes) -> Result<(), Error> {
        let guest = self.guest();
        guest.tally.checks.add(1);
        if guest.ledger.judge(page, &expected, seen) == Verdict::True {
            return Ok(());
        }
        let ledger = std::sync::Arc::clone(&guest.ledger);
        match ledger.claim_as(page, expected) {
            Some(claim) => self.repair(page, &claim),
            // Somebody changes the page now, so there is no second look; what was seen was wrong in any case.
            None => {
                self.guest().tally.stale_reads.add(1);
                Ok(())
            }
        }
    }

    /// The same for pages that the caller has claimed: on return they hold what they must.
    fn check_claimed(&mut self, claimed: &[(usize, &Claim<'_>)]) -> Result<(), Error> {
        let pages: Vec<usize> = claimed.iter().map(|&(page, _)| page).collect();
        let seen = self.read(&pages)?;
        for (&(page, claim), seen) in claimed.iter().zip(&seen) {
            let guest = self.guest();
            guest.tally.checks.add(1);
            if guest.ledger.judge(page, claim.expected(), seen) != Verdict::True {
                self.repair(page, claim)?;
            }
        }
        Ok(())
    }

    /// Looks at claimed pages, changes them, and writes that down.
    fn stamp(&mut self, stampings: Vec<Stamping<'_>>) -> Result<(), Error> {
        let claimed: Vec<_> = stampings.iter().map(|s| (s.page, &s.claim)).collect();
        self.check_claimed(&claimed)?;
        let bytes: Vec<(usize, Vec<StampPiece>)> =
            stampings.iter().map(|s| (s.page, s.claim.pieces(s.stamp))).collect();
        let pieces = bytes.iter().flat_map(|&(page, ref pieces)| {
            pieces.iter().map(move |(offset, bytes)| Piece { page, offset: *offset, bytes })
        });
        self.write(&pieces.collect::<Vec<_>>())?;
        self.guest().tally.writes.add(stampings.len() as u64);
        stampings.into_iter().for_each(|s| s.claim.publish(s.stamp));
        Ok(())
    }

    /// A read of this page was wrong: looks again, counts, and makes the page right.
    fn repair(&mut self, page: usize, claim: &Claim<'_>) -> Result<(), Error> {
        let truth = self.guest().truth(page)?;
        let shared = truth.is_some();
        let now = match truth {
            Some(bytes) => bytes,
            None => self.read(&[page])?[0],
        };
        let (ledger, tally) = (&self.guest().ledger, &self.guest().tally);
        let expected = claim.expected();
        match ledger.judge(page, expected, &now) {
            Verdict::True => {
                tally.stale_reads.add(1);
                // Where only this agent's own view was old, it has to be brought to look anew.
                if !shared {
                    return Ok(());
                }
            }
            Verdict::Older => tally.lost_writes.add(1),
            Verdict::Foreign => {
                tally.stale_reads.add(1);
                tally.lost_writes.add(u64::from(ledger.lost(page, expected, &now)));
            }
        }
        let contents = ledger.contents(page, expected.stamp);
        self.write(&[Piece { page, offset: 0, bytes: &contents }])
    }
}

impl<A: Agent + ?Sized> Checking for A {}
