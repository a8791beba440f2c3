// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Devices: transfers that outlive a scope, and so hold a lease.
//!
//! A device translates the pages of a transfer in one scope, takes a lease on them in it, and leaves. What it found stays
//! good until it gives the lease back, for windows over those pages are refused (the merger's) or ask for it (a
//! vCPU's un-merge).

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use notifier_core::{Access, Lease, LeaseError, LeaseRequest, OutputAddr};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{
    access::{Walking, write_pieces},
    damage::Checking,
    error::Error,
    guest::Guest,
    ledger::{Expected, Stamp},
    mapping::gpa,
    memory::PAGE,
    table::Walk,
};

/// Most pages of a transfer.
const PAGES: usize = 24;
/// How long one takes, in microseconds.
const FLIGHT: std::ops::Range<u64> = 300..3_000;
/// How often it looks whether somebody wants its pages.
const POLL: Duration = Duration::from_micros(50);
const REST: Duration = Duration::from_millis(1);
/// Devices' stamps are not vCPUs'.
const STAMPS: u64 = 1 << 62;

/// Makes transfers: changes the first page of some pages, reads all of them, and puts the first one back next time.
pub(crate) fn transfer(guest: &Guest, seed: u64, stop: &AtomicBool) -> Result<(), Error> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut agent = Walking::new(guest);
    let mut stamps = STAMPS..u64::MAX;
    let mut standing: Option<usize> = None;
    while !stop.load(Ordering::Relaxed) {
        let first = standing.unwrap_or_else(|| guest.working_set.pick(&mut rng));
        let stamp = if standing.is_some() { Stamp::NONE } else { stamps.next().map_or(Stamp::NONE, Stamp) };
        let count = rng.random_range(1..=PAGES).min(guest.pages() - first);
        let flight = Duration::from_micros(rng.random_range(FLIGHT));
        let Some(claim) = guest.ledger.claim(first) else {
            thread::sleep(POLL);
            continue;
        };
        agent.check_claimed(&[(first, &claim)])?;

        let expected: Vec<_> = (first + 1..first + count).map(|page| guest.ledger.observe(page)).collect();
        let (lease, found) = pin(&mut agent, first, count)?;
        guest.tally.leases.add(1);
        let landing = Instant::now() + flight;
        while Instant::now() < landing && !lease.is_cancelled() && !stop.load(Ordering::Relaxed) {
            thread::sleep(POLL);
        }
        // No scope here: the lease keeps what was found.
        write_pieces(&guest.frames, found[0], &claim.pieces(stamp))?;
        let mut seen = vec![[0; PAGE]; found.len() - 1];
        for (bytes, &at) in seen.iter_mut().zip(&found[1..]) {
            guest.frames.read(at, bytes)?;
        }
        let steady = |page, expected: &Option<Expected>| expected.filter(|e| guest.ledger.still(page, e));
        let expected: Vec<_> = (first + 1..).zip(&expected).map(|(page, e)| steady(page, e)).collect();
        drop(lease);

        claim.publish(stamp);
        guest.tally.writes.add(1);
        standing = (stamp != Stamp::NONE).then_some(first);
        for ((page, expected), seen) in (first + 1..).zip(expected).zip(&seen) {
            if let Some(expected) = expected {
                agent.check_seen(page, expected, seen)?;
            }
        }
        guest.pace.rest(REST);
    }
    Ok(())
}

/// Translates some pages, the first for writing, and pins what it found.
fn pin(agent: &mut Walking<'_>, first: usize, count: usize) -> Result<(Lease, Vec<OutputAddr>), Error> {
    let guest = agent.guest;
    let range = guest.guest_range(first, count)?;
    'again: loop {
        let scope = agent.walker.enter();
        let mut found = Vec::with_capacity(count);
        for page in first..first + count {
            let access = if page == first { Access::WRITE } else { Access::READ };
            match guest.table.translate(&scope, gpa(page), access)? {
                Walk::Found(at) => found.push(at),
                Walk::Missing => {
                    guest.fault(scope, page, access)?;
                    continue 'again;
                }
                Walk::Busy => {
                    drop(scope);
                    thread::yield_now();
                    continue 'again;
                }
            }
        }
        match scope.lease(LeaseRequest::new(range, "device")) {
            Ok(lease) => return Ok((lease, found)),
            Err(LeaseError::Retry(retry)) => {
                drop(scope);
                retry.wait();
            }
            Err(error) => return Err(Error::Lease(error)),
        }
    }
}
