// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Who walks the table for a guest.

use std::error::Error;

use notifier_core::{Access, Gpa, OutputAddr, Walker};
use spte_core::format::Format;
use spte_core::{Flush, FlushError, FlushRequest, Miss, PageSource, Table};
use spte_model::TouchKind;

use crate::driver::access;
use crate::tlb::Tlb;

/// What hardware did that no table of its format may make it do.
pub type Trouble = Box<dyn Error + Send + Sync>;

/// Why a guest's access did not reach memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Refusal {
    /// Nothing is there.
    Absent,
    /// The leaf does not grant the access.
    Denied {
        /// Writing is armed: [`Table::upgrade`] would help.
        armed: bool,
    },
    /// The leaf is old, and software has to make it young.
    Old,
}

/// Makes a guest's accesses through a table. A clone is the same hardware.
pub trait Hardware<F: Format>: Flush + Clone {
    /// From now on it walks the table at `root`, of which it knows nothing yet.
    ///
    /// # Errors
    /// Anything that is no fault of the table.
    fn begin(&self, root: OutputAddr) -> Result<(), Trouble> {
        let _ = root;
        Ok(())
    }

    /// One access at `at`: where it led, and which rights are cached with that; or what stood in its way. Accessed and dirty
    /// are hardware's to write, where the format says so.
    ///
    /// # Errors
    /// Whatever is neither: the access fails, and so does the operation.
    fn access<P: PageSource, C: Flush>(
        &self,
        table: &Table<F, P, C>,
        walker: &mut Walker,
        at: Gpa,
        kind: TouchKind,
    ) -> Result<Result<(OutputAddr, Access), Refusal>, Trouble>;
}

/// No hardware: the engine's own walk, which keeps nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Software;

impl Flush for Software {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        Ok(())
    }
}

impl<F: Format> Hardware<F> for Software {
    fn access<P: PageSource, C: Flush>(
        &self,
        table: &Table<F, P, C>,
        walker: &mut Walker,
        at: Gpa,
        kind: TouchKind,
    ) -> Result<Result<(OutputAddr, Access), Refusal>, Trouble> {
        let scope = walker.enter();
        match table.translate(&scope, at, access(kind.needs())) {
            Ok(found) => Ok(Ok((found.output(), found.access()))),
            Err(Miss::Absent { .. }) => Ok(Err(Refusal::Absent)),
            Err(Miss::Denied { armed, .. }) => Ok(Err(Refusal::Denied { armed })),
            Err(Miss::Old { .. }) => Ok(Err(Refusal::Old)),
            Err(miss) => Err(Box::new(miss)),
        }
    }
}

/// All that a table's flushes reach: the exact cache, and the hardware.
#[derive(Debug, Clone)]
pub struct Caches<H> {
    pub(crate) tlb: Tlb,
    pub(crate) hardware: H,
}

impl<H> Caches<H> {
    pub(crate) fn new(sized: bool, hardware: H) -> Self {
        Self { tlb: Tlb::new(sized), hardware }
    }
}

impl<H: Flush> Flush for Caches<H> {
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError> {
        self.tlb.flush(request)?;
        self.hardware.flush(request)
    }
}
