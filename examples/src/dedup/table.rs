// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's table: EPT entries in pages on the heap, for software walks them.
//!
//! The only place of this program that knows which format and which engine it runs on.

use std::sync::Arc;

use notifier_core::{Access, Gpa, GpaRange, JoinError, OutputAddr, Resolved, Retry, Scope, Space, Subscription};
use spte_core::{Format, HarvestError, HeapPages, MapError, MapOptions, Miss, Table, TableError, format::Kind};
use spte_x86::{Ept, EptOptions, OptionsError};

/// What a table refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableFault {
    /// The format cannot be had with these options.
    #[error(transparent)]
    Options(#[from] OptionsError),
    /// The table could not be made.
    #[error(transparent)]
    New(#[from] TableError),
    /// It could not join its space.
    #[error(transparent)]
    Join(#[from] JoinError),
    /// What a fault resolved could not be mapped.
    #[error(transparent)]
    Map(MapError),
    /// Its dirty facts could not be taken.
    #[error(transparent)]
    Harvest(#[from] HarvestError),
    /// A walk failed for good.
    #[error(transparent)]
    Walk(Miss),
}

/// What came of a walk.
#[derive(Debug)]
pub(crate) enum Walk {
    /// Where the byte lies, for as long as the scope lives.
    Found(OutputAddr),
    /// Fault.
    Missing,
    /// Somebody is changing the entry: walk again, in a new scope.
    Busy,
}

/// What came of an install.
#[derive(Debug)]
pub(crate) enum Installed {
    Mapped,
    /// A window was faster.
    Lost(Retry),
    /// Something else is mapped there. The protocol does not let this happen to those who keep to it.
    Conflict(Gpa),
}

/// A raw entry, and where it stands.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RawEntry {
    /// The architecture's number of the level.
    pub(crate) level: i8,
    pub(crate) raw: u64,
}

/// One guest's table, in its space.
#[derive(Debug)]
pub(crate) struct GuestTable {
    table: Arc<Table<Ept, HeapPages, ()>>,
    _subscription: Subscription,
}

impl GuestTable {
    /// An empty table that is told of every window of `space`.
    pub(crate) fn new(space: &Space) -> Result<Self, TableFault> {
        let format = Ept::new(EptOptions::default())?;
        // No hardware walks it, so nothing but scopes is to be waited for: `()` flushes.
        let table = Table::new(space, format, Arc::new(HeapPages::new()), ())?;
        let subscription = space.subscribe(Arc::clone(&table))?;
        Ok(Self { table, _subscription: subscription })
    }

    /// Walks as hardware would, accessed and dirty bits included.
    pub(crate) fn translate(&self, scope: &Scope<'_>, gpa: Gpa, access: Access) -> Result<Walk, TableFault> {
        match self.table.translate(scope, gpa, access) {
            Ok(translation) => Ok(Walk::Found(translation.output())),
            Err(Miss::Absent { .. } | Miss::Denied { .. } | Miss::Old { .. }) => Ok(Walk::Missing),
            Err(Miss::Busy { .. }) => Ok(Walk::Busy),
            Err(miss) => Err(TableFault::Walk(miss)),
        }
    }

    /// Maps what a fault resolved.
    pub(crate) fn install(&self, resolved: Resolved<'_>) -> Result<Installed, TableFault> {
        match resolved.install(|admission| self.table.map(admission, &MapOptions::default())) {
            Ok(_) => Ok(Installed::Mapped),
            Err(MapError::Retry(retry)) => Ok(Installed::Lost(retry)),
            Err(MapError::Conflict { at, .. }) => Ok(Installed::Conflict(at)),
            Err(error) => Err(TableFault::Map(error)),
        }
    }

    /// The entry that decides about `gpa`, as it is in the table.
    pub(crate) fn entry(&self, gpa: Gpa) -> Option<RawEntry> {
        let found = self.table.entry(gpa)?;
        Some(RawEntry { level: self.table.format().level_number(found.level), raw: found.raw })
    }

    /// Whether there is a translation of `gpa`, to wherever.
    pub(crate) fn translates(&self, gpa: Gpa) -> bool {
        self.table.entry(gpa).is_some_and(|found| found.kind == Kind::Leaf)
    }

    /// What was written since this was asked last.
    pub(crate) fn harvest_dirty(&self, range: GpaRange) -> Result<Vec<GpaRange>, TableFault> {
        Ok(self.table.harvest_dirty(range)?)
    }

    /// The first entry that breaks a rule of the format, if there is one.
    pub(crate) fn check(&self) -> Result<(), Gpa> {
        self.table.check().map_err(|(at, _)| at)
    }
}
