// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Slots that are replaced, tables and devices that come and go.

use std::sync::{Arc, atomic::Ordering::*};

use notifier_core::{
    CallAdapter, GpaRange, Interest, InvalidationGuard, JoinError, LeaseRequest, LeaveError, SlotError, SlotFlags,
    SlotId, SlotSpec, SubscriberError, Subscription,
};

use crate::{
    activity::Activity,
    host::*,
    run::{Adapter, Shared},
    tables::{Device, Member},
    work::Worker,
};

impl Worker<'_> {
    pub(crate) fn slot_at(&self, guest: GpaRange) -> Option<(SlotId, SlotSpec)> {
        self.shared.space.slots().into_iter().find(|(_, spec)| spec.guest == guest)
    }

    pub(crate) fn slot_outcome(&mut self, outcome: Result<Vec<SlotId>, SlotError>) -> Option<bool> {
        match outcome {
            Ok(_) => Some(true),
            // Changed, but a window over it is left to the reaper.
            Err(SlotError::Close(_)) => None,
            Err(SlotError::Window(error)) => {
                self.did(Activity::SlotRefused);
                self.refused(&error, false);
                Some(false)
            }
            Err(error) => {
                self.wrong(format!("slots: {error}"));
                Some(false)
            }
        }
    }

    pub(crate) fn change_alias(&mut self) {
        let shared = self.shared;
        let host = &*shared.host;
        let before = host.alias();
        let old = self.slot_at(alias_gpas());
        let add = old.is_none() || self.random.one_in(2);
        let region = add.then(|| self.random.below(2) as usize);
        let read_only = add && self.random.one_in(4);
        let spec = region.map(|region| SlotSpec {
            guest: alias_gpas(),
            host: Some(hva_of(region * SPAN)),
            flags: if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() },
        });
        self.serial += 1;
        host.alias.store(Alias::changing(self.serial).as_u64(), SeqCst);
        host.opened[PAGES].fetch_add(1, SeqCst);
        let remove: Vec<_> = old.iter().map(|(id, _)| *id).collect();
        let add: Vec<_> = spec.into_iter().collect();
        let outcome = shared.space.replace_slots(&remove, &add);
        let changed = self.slot_outcome(outcome);
        self.serial += 1;
        let after = match changed {
            Some(false) => Alias::new(self.serial, before.region(), before.read_only()),
            _ => Alias::new(self.serial, region, read_only),
        };
        host.alias.store(after.as_u64(), SeqCst);
        if changed.is_some() {
            host.closed[PAGES].fetch_add(1, SeqCst);
        }
        if changed != Some(false) {
            self.did(match (remove.is_empty(), add.is_empty()) {
                (true, _) => Activity::SlotAdded,
                (_, true) => Activity::SlotRemoved,
                _ => Activity::SlotReplaced,
            });
        }
    }

    /// The same slot again, or with other flags.
    pub(crate) fn replace_slot(&mut self, first: usize, count: usize, flags: SlotFlags) {
        let shared = self.shared;
        let host = &*shared.host;
        let Some((id, spec)) = self.slot_at(gpas(first, count)) else {
            return self.wrong(format!("the slot at {} is gone", gpas(first, count)));
        };
        Host::stamp(&host.opened, first..first + count);
        let outcome = shared.space.replace_slots(&[id], &[SlotSpec { flags: spec.flags ^ flags, ..spec }]);
        match self.slot_outcome(outcome) {
            Some(true) => self.did(Activity::SlotReplaced),
            Some(false) => {}
            None => return self.did(Activity::SlotReplaced),
        }
        self.closed(first, count);
    }

    pub(crate) fn replace_logged(&mut self) {
        let first = LOGGED_REGION * SPAN;
        let lease = if self.random.one_in(8) {
            self.shared.space.lease(LeaseRequest::new(gpas(first + 400, 1), "in the way")).ok()
        } else {
            None
        };
        let before = self.slot_at(gpas(first, SPAN)).map(|(id, _)| id);
        self.replace_slot(first, SPAN, SlotFlags::LOG_DIRTY);
        if lease.is_some() && self.slot_at(gpas(first, SPAN)).map(|(id, _)| id) != before {
            self.wrong("a slot was replaced although a part of it is leased");
        }
    }

    pub(crate) fn change_table(&mut self) {
        let shared = self.shared;
        match self.secondary.take() {
            None => match (shared.config.secondary)(&shared.space) {
                Ok(member) => {
                    *shared.secondary.write().unwrap() = Some(Arc::clone(&member.table));
                    self.secondary = Some(member);
                    self.did(Activity::TableJoined);
                }
                // The replay of an open window may fail as any start may.
                Err(JoinError::Replay { .. }) => {}
                Err(error) => self.wrong(format!("join: {error}")),
            },
            Some(Member { table, subscription, pages }) => {
                // Who has it by now goes on using it while it leaves.
                *shared.secondary.write().unwrap() = None;
                if let Err(error) = leave(shared, subscription) {
                    self.wrong(error);
                }
                let leaves: u64 = table.stats().leaves.iter().sum();
                if leaves != 0 {
                    self.wrong(format!("{leaves} leaves in a table that has left"));
                }
                if let Err(error) = table.check() {
                    self.wrong(error);
                }
                drop((table, pages));
                self.did(Activity::TableLeft);
            }
        }
    }

    pub(crate) fn change_device(&mut self) {
        let shared = self.shared;
        match self.adapter.take() {
            None => {
                let adapter: Adapter = Arc::new(CallAdapter::new(Device::new(Arc::clone(&shared.host))));
                let interest = match self.random.below(3) {
                    0 => Interest::Whole,
                    1 => Interest::Guest(gpas(0, 2 * SPAN)),
                    _ => Interest::Host(hvas(0, 2 * SPAN)),
                };
                match shared.space.subscribe_to(interest, Arc::clone(&adapter)) {
                    Ok(subscription) => {
                        *shared.adapter.write().unwrap() = Some(Arc::clone(&adapter));
                        self.adapter = Some((adapter, subscription));
                        self.did(Activity::DeviceJoined);
                    }
                    Err(error) => self.wrong(format!("join: {error}")),
                }
            }
            Some((adapter, subscription)) => {
                *shared.adapter.write().unwrap() = None;
                if self.random.one_in(2) {
                    drop(subscription);
                } else if let Err(error) = subscription.leave() {
                    self.wrong(format!("leave: {error}"));
                }
                let left = adapter.consumer().mapped.lock().unwrap().len();
                if left != 0 {
                    self.wrong(format!("a device that has left uses {left} extents"));
                }
                self.did(Activity::DeviceLeft);
            }
        }
    }
}

/// Leaves. A release that fails, because a flush does, is tried again by each window.
pub(crate) fn leave(shared: &Shared, subscription: Subscription) -> Result<(), String> {
    match subscription.leave() {
        Ok(()) => return Ok(()),
        Err(LeaveError::Release { source: SubscriberError::Flush(_), .. }) => {}
        Err(error) => return Err(format!("leave: {error}")),
    }
    let mut last = None;
    for page in 0..64 {
        // One that nobody holds a lease on will be among them.
        let range = gpas(page, 1);
        Host::stamp(&shared.host.opened, page..page + 1);
        let opened = shared.space.zap(range).map(InvalidationGuard::close);
        match opened {
            Ok(Ok(())) => {
                Host::stamp(&shared.host.closed, page..page + 1);
                return Ok(());
            }
            Ok(Err(_)) => return Ok(()),
            Err(error) => {
                Host::stamp(&shared.host.closed, page..page + 1);
                last = Some(error);
            }
        }
    }
    Err(format!("a release fails for ever: {last:?}"))
}
