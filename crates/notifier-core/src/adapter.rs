// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Consumers that are calls: VFIO, vhost-user, HVF and their like.
//!
//! A page table has entries that can be claimed. A consumer whose "entry" is a call (map these bytes, unmap these bytes)
//! has none: its check and its call cannot be one step. [`CallAdapter`] makes them one by a lock, held across check and
//! call, and taken by the window's start too. So either the call comes first and the start unmaps what it mapped, or the
//! start comes first and the check, which sees the window's poison, refuses.

use alloc::{boxed::Box, collections::BTreeMap, vec::Vec};

use crate::{
    access::Access,
    addr::{Gpa, GpaRange},
    fault::{Admission, Extent, Refused, Retry},
    primitive::Mutex,
    slots::Stretch,
    subscriber::{ChangeBatch, Coverage, Mode, PageOutcome, Subscriber, SubscriberError},
    subscription::Membership,
};

/// A failed call of a consumer.
pub type CallError = Box<dyn core::error::Error + Send + Sync>;

/// Something that is told of translations by calls.
pub trait CallConsumer: Send + Sync {
    /// What to call it in errors.
    fn name(&self) -> &str {
        "call consumer"
    }

    /// Maps an extent. It is not mapped now.
    ///
    /// # Errors
    /// The call's own; nothing is mapped then.
    fn map(&self, extent: &Extent) -> Result<(), CallError>;

    /// Unmaps exactly an extent that was mapped by one call of [`CallConsumer::map`], and returns when the device no
    /// longer uses it.
    ///
    /// # Errors
    /// The call's own; the extent counts as mapped then.
    fn unmap(&self, extent: &Extent) -> Result<(), CallError>;

    /// Makes an extent that was mapped by one call of [`CallConsumer::map`] read-only, and returns when the device no
    /// longer writes to it. `Ok(false)`: it cannot do that, and is asked to unmap.
    ///
    /// # Errors
    /// The call's own; the extent counts as mapped as it was.
    fn make_read_only(&self, extent: &Extent) -> Result<bool, CallError> {
        let _ = extent;
        Ok(false)
    }
}

/// Why an extent was not mapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CallMapError {
    /// A window has overtaken the fault.
    #[error(transparent)]
    Retry(#[from] Retry),
    /// The extent asked for is not inside the fault's range.
    #[error("{range} is outside the fault's range")]
    Outside {
        /// The extent's guest range.
        range: GpaRange,
    },
    /// Something else is mapped there already.
    #[error("{range} overlaps {mapped}, which is mapped")]
    Present {
        /// The extent's guest range.
        range: GpaRange,
        /// What is mapped.
        mapped: GpaRange,
    },
    /// The adapter belongs to another space than the fault, or is not told of windows over these bytes.
    #[error("the consumer is not told of windows over {range} of this space")]
    NotMember {
        /// The extent's guest range.
        range: GpaRange,
    },
    /// The adapter is not part of a space (any more).
    #[error("the consumer has left its space")]
    Left,
    /// The consumer's call failed. Extents before this one are mapped.
    #[error("mapping {range} failed: {source}")]
    Call {
        /// The extent's guest range.
        range: GpaRange,
        /// The call's error.
        source: CallError,
    },
}

#[derive(Debug, Default)]
struct Mapped {
    /// Set while it belongs to a space.
    membership: Option<Membership>,
    /// By guest start; disjoint.
    extents: BTreeMap<Gpa, Extent>,
}

impl Mapped {
    /// `extent` is not mapped any more.
    fn unmapped(&mut self, extent: &Extent) {
        self.written(extent);
        self.extents.remove(&extent.guest.start());
    }

    /// The device may have written all that it could.
    fn written(&self, extent: &Extent) {
        if let Some(membership) = self.membership.as_ref().filter(|_| extent.access.writable()) {
            membership.report_dirty(extent.guest);
        }
    }

    fn overlapping(&self, range: GpaRange) -> impl Iterator<Item = Extent> + '_ {
        // Extents are disjoint: of those that begin before the range only the last can reach into it.
        let first = self.extents.range(..=range.start()).next_back().map_or(range.start(), |(&start, _)| start);
        self.extents.range(first..range.end()).map(|(_, extent)| *extent).filter(move |e| e.guest.overlaps(&range))
    }
}

/// Lets a [`CallConsumer`] take part: a [`Subscriber`] that keeps account of what is mapped.
///
/// Windows that touch a part of an extent unmap all of it (calls like VFIO's cannot unmap a part of what was mapped by
/// one call).
#[derive(Debug)]
pub struct CallAdapter<C> {
    consumer: C,
    mapped: Mutex<Mapped>,
}

impl<C: CallConsumer> CallAdapter<C> {
    /// Nothing is mapped yet.
    pub fn new(consumer: C) -> Self {
        Self { consumer, mapped: Mutex::default() }
    }

    /// The consumer.
    pub fn consumer(&self) -> &C {
        &self.consumer
    }

    /// Maps what was resolved; for use inside [`Resolved::install`](crate::Resolved::install). What is mapped so already
    /// stays; what is mapped with fewer rights is unmapped and mapped again.
    ///
    /// # Errors
    /// See [`CallMapError`].
    pub fn map(&self, admission: &Admission<'_>) -> Result<(), CallMapError> {
        let ceiling = admission.ceiling();
        for extent in admission.extents() {
            let extent = Extent { access: extent.access & ceiling, ..*extent };
            let range = extent.guest;
            // Held across check and call: the whole point of this type.
            let mut mapped = self.mapped.lock();
            let Some(membership) = mapped.membership.clone() else { return Err(CallMapError::Left) };
            let present = mapped.overlapping(range).next();
            match present {
                Some(other) if other.guest != range || other.output != extent.output => {
                    return Err(CallMapError::Present { range, mapped: other.guest });
                }
                // A fault that came back for what it had mapped.
                Some(other) if other.access.contains(extent.access) => continue,
                _ => {}
            }
            match admission.check_for(&membership, range) {
                Ok(()) => {}
                Err(Refused::Outside) => return Err(CallMapError::Outside { range }),
                Err(Refused::NotMember) => return Err(CallMapError::NotMember { range }),
                Err(Refused::Lost) => {
                    drop(mapped);
                    return Err(admission.retry().into());
                }
            }
            if let Some(lesser) = present {
                // Calls have no upgrade; between the two the device faults, as after any window.
                self.consumer.unmap(&lesser).map_err(|source| CallMapError::Call { range, source })?;
                mapped.unmapped(&lesser);
            }
            self.consumer.map(&extent).map_err(|source| CallMapError::Call { range, source })?;
            mapped.extents.insert(range.start(), extent);
        }
        Ok(())
    }

    /// What is mapped, ascending.
    pub fn mapped(&self) -> Vec<Extent> {
        self.mapped.lock().extents.values().copied().collect()
    }

    fn unmap(&self, reach: &[Stretch]) -> Result<bool, SubscriberError> {
        let mut mapped = self.mapped.lock();
        let mut any = false;
        for range in reach.iter().filter_map(|stretch| stretch.guest) {
            let hit: Vec<_> = mapped.overlapping(range).collect();
            for extent in hit {
                self.consumer.unmap(&extent).map_err(SubscriberError::Other)?;
                mapped.unmapped(&extent);
                any = true;
            }
        }
        Ok(any)
    }

    fn retain(&self, reach: &[Stretch]) -> Result<(), SubscriberError> {
        let mut mapped = self.mapped.lock();
        for range in reach.iter().filter_map(|stretch| stretch.guest) {
            let hit: Vec<_> = mapped.overlapping(range).filter(|extent| extent.access.writable()).collect();
            for mut extent in hit {
                if self.consumer.make_read_only(&extent).map_err(SubscriberError::Other)? {
                    mapped.written(&extent);
                    extent.access = extent.access.difference(Access::WRITE);
                    mapped.extents.insert(extent.guest.start(), extent);
                } else {
                    self.consumer.unmap(&extent).map_err(SubscriberError::Other)?;
                    mapped.unmapped(&extent);
                }
            }
        }
        Ok(())
    }
}

impl<C: CallConsumer> Subscriber for CallAdapter<C> {
    fn name(&self) -> &str {
        self.consumer.name()
    }

    fn joined(&self, membership: Membership) -> Result<(), SubscriberError> {
        let mut mapped = self.mapped.lock();
        if mapped.membership.is_some() {
            return Err(SubscriberError::Other("the consumer belongs to a space already".into()));
        }
        mapped.membership = Some(membership);
        Ok(())
    }

    fn start(&self, window: &Coverage<'_>) -> Result<(), SubscriberError> {
        match window.mode() {
            Mode::Zapped => self.unmap(window.stretches()).map(drop),
            Mode::Retained => self.retain(window.stretches()),
        }
    }

    fn zap(&self, part: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.unmap(part.stretches()).map(drop)
    }

    fn change_pte(&self, batch: &ChangeBatch<'_>, outcomes: &mut [PageOutcome]) -> Result<(), SubscriberError> {
        // A call cannot repoint; but what was not mapped is absent, and not zapped.
        for (stretch, outcome) in batch.stretches().iter().zip(outcomes) {
            let zapped = self.unmap(core::slice::from_ref(stretch))?;
            *outcome = if zapped { PageOutcome::Zapped { found: None } } else { PageOutcome::Absent };
        }
        Ok(())
    }

    fn release(&self) -> Result<(), SubscriberError> {
        let mut mapped = self.mapped.lock();
        while let Some(extent) = mapped.extents.values().next().copied() {
            self.consumer.unmap(&extent).map_err(SubscriberError::Other)?;
            mapped.unmapped(&extent);
        }
        mapped.membership = None;
        Ok(())
    }
}
