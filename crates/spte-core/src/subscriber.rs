// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A table as a subscriber of its space: what windows do to it.

use alloc::boxed::Box;

use notifier_core::primitive::{Twin, broken};
use notifier_core::{
    ChangeBatch, Coverage, Membership, Mode, PageChange, PageOutcome, ScopeWaitError, Stretch, Subscriber,
    SubscriberError,
};

use crate::{
    batch::{Batch, FlushFailed},
    flush::{Flush, FlushError},
    format::{Format, WriteProtect},
    pages::PageSource,
    remove::{Partly, RemoveError},
    table::Table,
};

/// Why a table does not join.
#[derive(Debug, thiserror::Error)]
#[error("the table was made for another space, or has joined its space before")]
struct NotYours;

fn refused(error: FlushFailed, nonblocking: bool) -> SubscriberError {
    match error {
        FlushFailed::Hardware(FlushError::WouldBlock) | FlushFailed::Scopes(ScopeWaitError::WouldBlock)
            if nonblocking =>
        {
            SubscriberError::WouldBlock
        }
        error => SubscriberError::Flush(Box::new(error)),
    }
}

fn removal(error: RemoveError, nonblocking: bool) -> SubscriberError {
    match error {
        RemoveError::Flush { source, .. } => refused(source, nonblocking),
        error => SubscriberError::Other(Box::new(error)),
    }
}

impl<F: Format, P: PageSource, X: Flush> Table<F, P, X> {
    fn zap_all(&self, coverage: &Coverage<'_>) -> Result<(), SubscriberError> {
        let mut batch = Batch::new(self);
        for range in coverage.guest().filter_map(|range| self.clip(range)) {
            self.zap_range(range, Partly::Whole { nonblocking: coverage.nonblocking() }, &mut batch)
                .map_err(|e| removal(e, coverage.nonblocking()))?;
        }
        batch.finish_inheriting(coverage.nonblocking()).map_err(|error| refused(error, coverage.nonblocking()))?;
        if !coverage.nonblocking() {
            self.space.hand_over();
        }
        Ok(())
    }

    fn retain_all(&self, coverage: &Coverage<'_>) -> Result<(), SubscriberError> {
        let mut batch = Batch::new(self);
        for range in coverage.guest().filter_map(|range| self.clip(range)) {
            self.lessen_range(range, Partly::Whole { nonblocking: coverage.nonblocking() }, &mut batch, |cell, raw| {
                let retained = self.format.write_protect(cell.level, raw, WriteProtect::Retain);
                if broken(Twin::RetainKeepsUpgrade) {
                    return Ok(self.format.write_protect(cell.level, raw, WriteProtect::Arm));
                }
                Ok(retained)
            })
            .map_err(|e| removal(e, coverage.nonblocking()))?;
        }
        batch.finish_inheriting(coverage.nonblocking()).map_err(|error| refused(error, coverage.nonblocking()))
    }
}

impl<F: Format, P: PageSource, X: Flush> Subscriber for Table<F, P, X> {
    fn name(&self) -> &str {
        self.format.name()
    }

    fn joined(&self, membership: Membership) -> Result<(), SubscriberError> {
        // Walkers, faults and flushes go by the table's own space, and by one place in it.
        if !membership.is_of(&self.space) || !self.join(membership) {
            return Err(SubscriberError::Other(Box::new(NotYours)));
        }
        Ok(())
    }

    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        match window.mode() {
            Mode::Zapped => self.zap_all(window),
            Mode::Retained => self.retain_all(window),
        }
    }

    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.zap_all(part)
    }

    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        let pin = self.space.pin();
        let mut flushes = Batch::new(self);
        let pages: &[PageChange] = batch.pages();
        for (change, outcome) in pages.iter().zip(outcomes) {
            *outcome = self.change_page(&pin, change, batch.page_size(), &mut flushes);
        }
        flushes.finish_inheriting(false).map_err(|error| refused(error, false))
    }

    fn age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let mut young = false;
        for range in reach.iter().filter_map(|stretch| stretch.guest) {
            young |= Table::age(self, range).map_err(|error| refused(error, false))? != 0;
        }
        Ok(young)
    }

    fn test_age(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        Ok(reach.iter().filter_map(|stretch| stretch.guest).any(|range| Table::test_age(self, range) != 0))
    }

    fn release(&self) -> Result<(), SubscriberError> {
        // What claimed before the membership ended is waited out by this walk; what claims later is refused.
        let mut batch = Batch::new(self);
        if let Some(whole) = self.whole() {
            self.zap_range(whole, Partly::Whole { nonblocking: false }, &mut batch)
                .map_err(|error| removal(error, false))?;
        }
        batch.finish_inheriting(false).map_err(|error| refused(error, false))
    }
}
