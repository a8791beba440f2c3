// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who reads and writes guest memory.
//!
//! Everybody who does is an [`Agent`]: what it does there and how it is checked is the same for all. [`Walking`] agents
//! reach memory by walking the guest's table inside a scope, and by faulting where that finds nothing: software vCPUs,
//! and devices.

use notifier_core::{Access, OutputAddr, Walker};

use super::{
    error::Error,
    guest::Guest,
    ledger::StampPiece,
    mapping::gpa,
    memory::{Frames, PAGE, PageBytes},
    table::Walk,
};

/// Bytes to be written into one page.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Piece<'a> {
    pub(crate) page: usize,
    /// Where in the page.
    pub(crate) offset: usize,
    pub(crate) bytes: &'a [u8],
}

/// One who reads and writes a guest's memory.
pub(crate) trait Agent {
    /// Whose memory.
    fn guest(&self) -> &Guest;

    /// Reads whole pages, in this order.
    fn read(&mut self, pages: &[usize]) -> Result<Vec<PageBytes>, Error>;

    /// Writes, in this order.
    fn write(&mut self, pieces: &[Piece<'_>]) -> Result<(), Error>;
}

/// One who walks the guest's table.
#[derive(Debug)]
pub(crate) struct Walking<'g> {
    pub(crate) guest: &'g Guest,
    pub(crate) walker: Walker,
}

impl<'g> Walking<'g> {
    pub(crate) fn new(guest: &'g Guest) -> Self {
        Self { guest, walker: guest.space.walker() }
    }

    /// Reaches a page: `used` gets the output address, and what it does there it does inside the scope of the walk.
    fn reach<R>(
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
}

impl Agent for Walking<'_> {
    fn guest(&self) -> &Guest {
        self.guest
    }

    fn read(&mut self, pages: &[usize]) -> Result<Vec<PageBytes>, Error> {
        let read = |&page: &usize| {
            let mut bytes = [0; PAGE];
            self.reach(page, Access::READ, |frames, at| frames.read(at, &mut bytes))?;
            Ok(bytes)
        };
        pages.iter().map(read).collect()
    }

    fn write(&mut self, pieces: &[Piece<'_>]) -> Result<(), Error> {
        pieces.iter().try_for_each(|piece| {
            self.reach(piece.page, Access::WRITE, |frames, at| {
                frames.write(at.wrapping_add(piece.offset as u64), piece.bytes)
            })
        })
    }
}

/// Writes pieces of the page that lies at `at`.
pub(crate) fn write_pieces(frames: &Frames, at: OutputAddr, pieces: &[StampPiece]) -> Result<(), Error> {
    pieces.iter().try_for_each(|(offset, bytes)| frames.write(at.wrapping_add(*offset as u64), bytes))
}
