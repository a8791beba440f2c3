// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Finding damage, and counting each piece of it once.
//!
//! A write is *lost* when its bytes are not there any more, and a second look does not find them either. A read is *stale*
//! when it saw what the page has not held: what was given back to the host, another page, or an older state that a
//! second look does not find any more. (A page that was taken from under its guest can be both.) What is found is
//! repaired, so that it is not found again.

use super::{
    access::Agent,
    error::Error,
    ledger::{Claim, Expected, Verdict},
    memory::PageBytes,
};

impl Agent<'_> {
    /// Reads a whole page and compares it with the ledger, if nobody changes the page meanwhile.
    pub(crate) fn check(&mut self, page: usize) -> Result<(), Error> {
        let ledger = &self.guest.ledger;
        let Some(expected) = ledger.observe(page) else { return Ok(()) };
        let seen = self.read(page)?;
        if !ledger.still(page, &expected) {
            return Ok(());
        }
        self.check_seen(page, expected, &seen)
    }

    /// The same for what the caller has read itself, while the page had to read as `expected`.
    pub(crate) fn check_seen(&mut self, page: usize, expected: Expected, seen: &PageBytes) -> Result<(), Error> {
        let ledger = &self.guest.ledger;
        self.guest.tally.checks.add(1);
        if ledger.judge(page, &expected, seen) == Verdict::True {
            return Ok(());
        }
        match ledger.claim_as(page, expected) {
            Some(claim) => self.repair(page, &claim),
            // Somebody changes the page now, so there is no second look; what was seen was wrong in any case.
            None => {
                self.guest.tally.stale_reads.add(1);
                Ok(())
            }
        }
    }

    /// The same for a page that the caller has claimed: on return it holds what it must.
    pub(crate) fn check_claimed(&mut self, page: usize, claim: &Claim<'_>) -> Result<(), Error> {
        let seen = self.read(page)?;
        self.guest.tally.checks.add(1);
        match self.guest.ledger.judge(page, claim.expected(), &seen) {
            Verdict::True => Ok(()),
            _ => self.repair(page, claim),
        }
    }

    /// A read of this page was wrong: looks again, counts, and makes the page right.
    fn repair(&mut self, page: usize, claim: &Claim<'_>) -> Result<(), Error> {
        let (ledger, tally) = (&self.guest.ledger, &self.guest.tally);
        let now = self.read(page)?;
        let expected = claim.expected();
        match ledger.judge(page, expected, &now) {
            Verdict::True => {
                tally.stale_reads.add(1);
                return Ok(());
            }
            Verdict::Older => tally.lost_writes.add(1),
            Verdict::Foreign => {
                tally.stale_reads.add(1);
                tally.lost_writes.add(u64::from(ledger.lost(page, expected, &now)));
            }
        }
        self.write(page, &ledger.contents(page, expected.stamp))?;
        Ok(())
    }
}
