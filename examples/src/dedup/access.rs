// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! How guests reach their memory: by walking the table inside a scope, and by faulting where that finds nothing.

use notifier_core::{Access, OutputAddr, Walker};

use super::{
    error::Error,
    guest::Guest,
    ledger::{Claim, STAMP, Stamp},
    mapping::gpa,
    memory::{Frames, PAGE, PageBytes},
    table::Walk,
};

/// A vCPU or a device of one guest, seen as somebody who walks.
#[derive(Debug)]
pub(crate) struct Agent<'g> {
    pub(crate) guest: &'g Guest,
    pub(crate) walker: Walker,
}

impl<'g> Agent<'g> {
    pub(crate) fn new(guest: &'g Guest) -> Self {
        Self { guest, walker: guest.space.walker() }
    }

    /// Reaches a page: `used` gets the output address, and what it does there it does inside the scope of the walk.
    pub(crate) fn reach<R>(
        &mut self,
        page: usize,
        access: Access,
        used: impl FnOnce(&Frames, OutputAddr) -> Result<R, Error>,
    ) -> Result<R, Error> {
        loop {
            let scope = self.walker.enter();
            match self.guest.table.translate(&scope, gpa(page), access)? {
                Walk::Found(at) => return used(&self.guest.frames, at),
                Walk::Missing => self.guest.fault(scope, page, access)?,
                Walk::Busy => {
                    drop(scope);
                    std::thread::yield_now();
                }
            }
        }
    }

    /// Reads a whole page.
    pub(crate) fn read(&mut self, page: usize) -> Result<PageBytes, Error> {
        let mut bytes = [0; PAGE];
        self.reach(page, Access::READ, |frames, at| frames.read(at, &mut bytes))?;
        Ok(bytes)
    }

    /// Writes a whole page.
    pub(crate) fn write(&mut self, page: usize, bytes: &PageBytes) -> Result<(), Error> {
        self.reach(page, Access::WRITE, |frames, at| frames.write(at, bytes))
    }

    /// Changes a claimed page, which holds what it must, so that it has `stamp`; and writes that down.
    pub(crate) fn stamp(&mut self, page: usize, claim: Claim<'_>, stamp: Stamp) -> Result<(), Error> {
        let pieces = claim.pieces(stamp);
        self.reach(page, Access::WRITE, |frames, at| write_pieces(frames, at, &pieces))?;
        claim.publish(stamp);
        self.guest.tally.writes.add(1);
        Ok(())
    }
}

/// Writes pieces of the page that lies at `at`.
pub(crate) fn write_pieces(frames: &Frames, at: OutputAddr, pieces: &[(usize, [u8; STAMP])]) -> Result<(), Error> {
    pieces.iter().try_for_each(|(offset, bytes)| frames.write(at.wrapping_add(*offset as u64), bytes))
}
