// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a flush has to name, and who carries it out.

use notifier_core::GpaRange;

use crate::format::Level;

/// The leaves that were removed or changed in a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Leaves {
    /// There was none: links alone went.
    None,
    /// All were of this level. Not all of the range need have been leaves.
    Of(Level),
    /// They were of several levels, or nobody knows.
    Any,
}

impl Leaves {
    /// Their level, where all have the same.
    pub const fn level(self) -> Option<Level> {
        match self {
            Self::Of(level) => Some(level),
            Self::None | Self::Any => None,
        }
    }
}

/// One range to be dropped from TLBs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushRange {
    /// Guest physical bytes.
    pub range: GpaRange,
    /// What was translated there.
    pub leaves: Leaves,
    /// The level of the lowest entries that were links, and were removed or changed: what is cached of links must be flushed
    /// too. Hardware that drops the links by which it would translate an address has to be given one address in each of their
    /// spans, no more.
    pub links: Option<Level>,
}

/// What to flush. Later flushes of the same table may be running at the same time.
#[derive(Debug, Clone, Copy)]
pub struct FlushRequest<'a> {
    /// The ranges, or an empty slice where [`FlushRequest::all`] is set.
    pub ranges: &'a [FlushRange],
    /// Everything of this table, links included.
    pub all: bool,
    /// The flush must not wait for anything but hardware.
    pub nonblocking: bool,
}

/// A flush that did not happen. The engine keeps it owed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FlushError {
    /// It would have had to wait, and was told not to.
    #[error("the flush would block")]
    WouldBlock,
    /// The implementation panicked.
    #[error("the flush panicked")]
    Panicked,
    /// The hardware or the call behind it failed.
    #[error("the flush failed with code {code}")]
    Failed {
        /// The implementation's own code, such as an errno.
        code: i32,
    },
}

/// Carries flushes out on whatever caches the table's translations in hardware.
///
/// Software walkers are not its business: the engine waits for their scopes itself. `()` is for tables that only
/// software walks.
pub trait Flush: Send + Sync + 'static {
    /// Returns when no cache holds anything that the table no longer says in these ranges.
    ///
    /// # Errors
    /// [`FlushError`]; the engine keeps the flush owed and says so to its caller.
    fn flush(&self, request: &FlushRequest<'_>) -> Result<(), FlushError>;
}

impl Flush for () {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        Ok(())
    }
}
