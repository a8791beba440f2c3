// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A guest's table: entries in pages on the heap, for software walks them.
//!
//! The only place of this program that knows which formats there are, and which engine it runs on.

use std::{fmt::Debug, sync::Arc};

use clap::ValueEnum;
use notifier_core::{Access, Gpa, GpaRange, JoinError, OutputAddr, Resolved, Retry, Scope, Space, Subscription};
use spte_arm64::{AccessedDirty, Stage2, Stage2Options};
use spte_core::{Format, HarvestError, HeapPages, MapError, MapOptions, Miss, Table, TableError, format::Kind};
use spte_mips::{BigEndian, GpaOptions, GpaTable};
use spte_ppc::{BasePage, Radix, RadixOptions};
use spte_x86::{Ept, EptOptions, Levels, LongMode, LongModeOptions, Npt};

/// Formats of tables that software walks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
#[non_exhaustive]
pub enum TableFormat {
    /// Intel's extended page tables.
    #[default]
    Ept,
    /// AMD's nested page tables.
    Npt,
    /// Long mode, four levels.
    #[value(name = "x86-64")]
    X86_64,
    /// Long mode, five levels.
    #[value(name = "x86-64-la57")]
    X86_64La57,
    /// arm64 stage 2 of 4K pages: what changes its size is broken before it is made.
    #[value(name = "arm64-s2")]
    Arm64Stage2,
    /// Radix trees of Power with 4K pages: a page that is repointed is taken away, flushed and made again.
    #[value(name = "ppc-radix")]
    PpcRadix,
    /// KVM's table for 64-bit MIPS, 4K pages, big-endian: V and D say what was used and written, and entries that are claimed
    /// are absent meanwhile.
    Mips64,
}

impl TableFormat {
    /// The name as it is written.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ept => "ept",
            Self::Npt => "npt",
            Self::X86_64 => "x86-64",
            Self::X86_64La57 => "x86-64-la57",
            Self::Arm64Stage2 => "arm64-s2",
            Self::PpcRadix => "ppc-radix",
            Self::Mips64 => "mips64",
        }
    }
}

/// What a table refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TableFault {
    /// An x86 format cannot be had with these options.
    #[error(transparent)]
    X86(#[from] spte_x86::OptionsError),
    /// arm64 stage 2 cannot be had with these options.
    #[error(transparent)]
    Arm64(#[from] spte_arm64::OptionsError),
    /// A radix tree cannot be had with these options.
    #[error(transparent)]
    Ppc(#[from] spte_ppc::OptionsError),
    /// The MIPS table cannot be had with these options.
    #[error(transparent)]
    Mips(#[from] spte_mips::OptionsError),
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

/// A table of any format.
trait AnyTable: Debug + Send + Sync {
    fn translate(&self, scope: &Scope<'_>, gpa: Gpa, access: Access) -> Result<OutputAddr, Miss>;
    fn map(&self, resolved: Resolved<'_>) -> Result<(), MapError>;
    /// The entry that decides about `gpa`, and what it is.
    fn entry(&self, gpa: Gpa) -> Option<(RawEntry, Kind)>;
    fn harvest_dirty(&self, range: GpaRange) -> Result<Vec<GpaRange>, HarvestError>;
    fn check(&self) -> Result<(), Gpa>;
}

impl<F> AnyTable for Table<F, HeapPages, ()>
where
    F: Format<Attrs: Default>,
{
    fn translate(&self, scope: &Scope<'_>, gpa: Gpa, access: Access) -> Result<OutputAddr, Miss> {
        Self::translate(self, scope, gpa, access).map(|found| found.output())
    }

    fn map(&self, resolved: Resolved<'_>) -> Result<(), MapError> {
        resolved.install(|admission| Self::map(self, admission, &MapOptions::default())).map(drop)
    }

    fn entry(&self, gpa: Gpa) -> Option<(RawEntry, Kind)> {
        let found = Self::entry(self, gpa)?;
        Some((RawEntry { level: self.format().level_number(found.level), raw: found.raw }, found.kind))
    }

    fn harvest_dirty(&self, range: GpaRange) -> Result<Vec<GpaRange>, HarvestError> {
        Self::harvest_dirty(self, range)
    }

    fn check(&self) -> Result<(), Gpa> {
        Self::check(self).map_err(|(at, _)| at)
    }
}

/// One guest's table, in its space.
#[derive(Debug)]
pub(crate) struct GuestTable {
    table: Arc<dyn AnyTable>,
    _subscription: Subscription,
}

impl GuestTable {
    /// An empty table that is told of every window of `space`. Accessed and dirty are set as by hardware, in each format
    /// whose hardware does.
    pub(crate) fn new(space: &Space, format: TableFormat) -> Result<Self, TableFault> {
        let long_mode = LongModeOptions::default();
        match format {
            TableFormat::Ept => Self::of(space, Ept::new(EptOptions::default())?),
            TableFormat::Npt => Self::of(space, Npt::new(long_mode)?),
            TableFormat::X86_64 => Self::of(space, LongMode::new(long_mode)?),
            TableFormat::X86_64La57 => {
                Self::of(space, LongMode::new(LongModeOptions { levels: Levels::Five, ..long_mode })?)
            }
            TableFormat::Mips64 => Self::of(space, GpaTable::<BigEndian>::new(GpaOptions::default())?),
            TableFormat::Arm64Stage2 => {
                let accessed_dirty = AccessedDirty::Hardware;
                Self::of(space, Stage2::new(Stage2Options { accessed_dirty, ..Stage2Options::default() })?)
            }
            TableFormat::PpcRadix => {
                Self::of(space, Radix::new(RadixOptions { page: BasePage::K4, ..RadixOptions::default() })?)
            }
        }
    }

    fn of<F>(space: &Space, format: F) -> Result<Self, TableFault>
    where
        F: Format<Attrs: Default>,
    {
        // No hardware walks it, so nothing but scopes is to be waited for: `()` flushes.
        let table = Table::new(space, format, Arc::new(HeapPages::new()), ())?;
        let subscription = space.subscribe(Arc::clone(&table))?;
        Ok(Self { table, _subscription: subscription })
    }

    /// Walks as hardware would, accessed and dirty bits included.
    pub(crate) fn translate(&self, scope: &Scope<'_>, gpa: Gpa, access: Access) -> Result<Walk, TableFault> {
        match self.table.translate(scope, gpa, access) {
            Ok(output) => Ok(Walk::Found(output)),
            Err(Miss::Absent { .. } | Miss::Denied { .. } | Miss::Old { .. }) => Ok(Walk::Missing),
            Err(Miss::Busy { .. }) => Ok(Walk::Busy),
            Err(miss) => Err(TableFault::Walk(miss)),
        }
    }

    /// Maps what a fault resolved.
    pub(crate) fn install(&self, resolved: Resolved<'_>) -> Result<Installed, TableFault> {
        match self.table.map(resolved) {
            Ok(()) => Ok(Installed::Mapped),
            Err(MapError::Retry(retry)) => Ok(Installed::Lost(retry)),
            Err(MapError::Conflict { at, .. }) => Ok(Installed::Conflict(at)),
            Err(error) => Err(TableFault::Map(error)),
        }
    }

    /// The entry that decides about `gpa`, as it is in the table.
    pub(crate) fn entry(&self, gpa: Gpa) -> Option<RawEntry> {
        self.table.entry(gpa).map(|(entry, _)| entry)
    }

    /// Whether there is a translation of `gpa`, to wherever.
    pub(crate) fn translates(&self, gpa: Gpa) -> bool {
        self.table.entry(gpa).is_some_and(|(_, kind)| kind == Kind::Leaf)
    }

    /// What was written since this was asked last.
    pub(crate) fn harvest_dirty(&self, range: GpaRange) -> Result<Vec<GpaRange>, TableFault> {
        Ok(self.table.harvest_dirty(range)?)
    }

    /// The first entry that breaks a rule of the format, if there is one.
    pub(crate) fn check(&self) -> Result<(), Gpa> {
        self.table.check()
    }
}
