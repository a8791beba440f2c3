// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What a flush has to name, and who carries it out.

use notifier_core::GpaRange;

use crate::format::Level;

/// One range to be dropped from TLBs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlushRange {
    /// Guest physical bytes.
    pub range: GpaRange,
    /// The level of every leaf that was removed or changed in it, where all had the same; a hint that must be exact or
    /// absent.
    pub leaf: Option<Level>,
    /// A link was removed too: structures that cache links must be flushed.
    pub links: bool,
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
