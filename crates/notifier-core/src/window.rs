// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Windows: how one is opened, what it remembers, and how it is finished.
//!
//! Opening, step by step:
//!
//! 1. Under the registry lock: count += 1, the record goes into the set of open windows, and the subscribers to be
//!    started are noted. Joining and leaving take the same lock, so that each pair of a window and a subscriber is
//!    decided one way: either the window starts the subscriber, or the joining subscriber replays the window.
//! 2. Fence (W1), poison overlapping faults, fence (W2): see [`crate::fault`].
//! 3. Subscribers that cannot follow: a reason to fail.
//! 4. Leases: cancelled, waited for, or a reason to fail.
//! 5. Each subscriber's start, in the order in which they joined. One that is leaving is waited for: until it has
//!    released, it may translate.
//!
//! Finishing:
//!
//! 1. Retained: pages without an outcome are zapped.
//! 2. Each started subscriber's end, in reverse order. Who has had its end is remembered: finishing can be tried again.
//! 3. Under the registry lock: the record leaves the set; the sequence moves; *then* the count falls.
//! 4. Whoever waits for the window is woken.
//!
//! A record never changes what it covers while it is published.

use alloc::{string::String, sync::Arc, vec::Vec};
use core::fmt;

use crate::{
    addr::{AddrRange, Address, Gpa, GpaRange, Hva, HvaRange},
    counters::add,
    lease::{LeaseId, LeasePolicy},
    primitive::{AtomicBool, Condvar, Mutex, Ordering, Twin, broken, fence, fence_unless},
    ranges::{RangeIndex, RangeSet},
    slots::{SlotMap, Stretch},
    space::Inner,
    subscriber::{Coverage, Mode, SubscriberError, SubscriberId},
    subscription::Member,
};

/// What a window is over: a host virtual range, or a guest physical one (where there is no host address, or where only
/// one of several aliases changes).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Key {
    /// Every place where these host bytes appear.
    Host(HvaRange),
    /// These guest bytes, and no alias of them.
    Guest(GpaRange),
}

impl Key {
    /// Whether the window has a byte of `place`.
    pub fn overlaps(&self, place: &Stretch) -> bool {
        match self {
            Key::Host(range) => place.host.is_some_and(|host| host.overlaps(range)),
            Key::Guest(range) => place.guest.is_some_and(|guest| guest.overlaps(range)),
        }
    }

    /// What the window reaches: each place where subscribers may hold something of it.
    pub(crate) fn reach(&self, slots: &SlotMap) -> Vec<Stretch> {
        match *self {
            Key::Guest(range) => slots.stretches(range),
            Key::Host(range) => {
                let mut reach: Vec<_> = slots.aliases(range).collect();
                // A consumer may map host memory that no slot has: it hears of the whole range too.
                let mut seen = RangeSet::default();
                reach.iter().filter_map(|s| s.host).for_each(|part| seen.insert(part));
                reach
                    .extend(seen.missing_from(range).into_iter().map(|part| Stretch { guest: None, host: Some(part) }));
                reach
            }
        }
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Key::Host(range) => range.fmt(f),
            Key::Guest(range) => range.fmt(f),
        }
    }
}

impl From<HvaRange> for Key {
    fn from(range: HvaRange) -> Self {
        Key::Host(range)
    }
}

impl From<GpaRange> for Key {
    fn from(range: GpaRange) -> Self {
        Key::Guest(range)
    }
}

/// The address types that windows may be keyed by: [`Hva`] and [`Gpa`]. Sealed, as [`Address`] is.
pub trait WindowAddress: Address {
    /// The key of a window over `range`.
    fn key(range: AddrRange<Self>) -> Key;
    /// The side of `stretch` that this type names.
    fn side(stretch: &Stretch) -> Option<AddrRange<Self>>;
}

impl WindowAddress for Hva {
    fn key(range: HvaRange) -> Key {
        Key::Host(range)
    }
    fn side(stretch: &Stretch) -> Option<HvaRange> {
        stretch.host
    }
}

impl WindowAddress for Gpa {
    fn key(range: GpaRange) -> Key {
        Key::Guest(range)
    }
    fn side(stretch: &Stretch) -> Option<GpaRange> {
        stretch.guest
    }
}

/// Who stands in a window's way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Holder {
    /// A lease.
    Lease(LeaseId),
    /// A subscriber that declared that it cannot follow.
    Subscriber(SubscriberId),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Holder::Lease(id) => id.fmt(f),
            Holder::Subscriber(id) => id.fmt(f),
        }
    }
}

/// Why a window was not opened. Nothing is in progress on its account; what was zapped on the way stays zapped.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// Somebody holds a part of the range and does not give it up.
    #[error("{key} is pinned by {holder} ({name})")]
    Pinned {
        /// What was to be opened.
        key: Key,
        /// Who holds it.
        holder: Holder,
        /// The holder's name.
        name: String,
    },
    /// Another Retained window overlaps.
    #[error("{key} overlaps an open Retained window over {open}")]
    Busy {
        /// What was to be opened.
        key: Key,
        /// The window that is open.
        open: Key,
    },
    /// The window is of the non-blocking form, and something would have had to be waited for.
    #[error("opening a window over {key} would block")]
    WouldBlock {
        /// What was to be opened.
        key: Key,
    },
    /// A subscriber could not keep the promise.
    #[error("{id} ({name}) refused a window over {key}: {source}")]
    Subscriber {
        /// What was to be opened.
        key: Key,
        /// Which subscriber.
        id: SubscriberId,
        /// Its name.
        name: String,
        /// Its error.
        source: SubscriberError,
    },
    /// The calling thread is inside a scope of this space: the flush would wait for it for ever.
    #[error("a window over {key} was opened inside the caller's own scope")]
    InScope {
        /// What was to be opened.
        key: Key,
    },
    /// The caller is a subscriber's callback of this space.
    #[error("a window over {key} was opened inside a subscriber's callback")]
    InCallback {
        /// What was to be opened.
        key: Key,
    },
}

/// Why a window could not be finished. It stays in progress.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CloseCause {
    /// A subscriber failed to zap what had no outcome, or to take its end.
    #[error("{id} ({name}): {source}")]
    Subscriber {
        /// Which subscriber.
        id: SubscriberId,
        /// Its name.
        name: String,
        /// Its error.
        source: SubscriberError,
    },
    /// The calling thread is inside a scope of this space.
    #[error("a window was closed inside the caller's own scope")]
    InScope,
    /// The caller is a subscriber's callback of this space.
    #[error("a window was closed inside a subscriber's callback")]
    InCallback,
}

/// Where a subscriber stands with a window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stage {
    Waiting,
    Started,
    Over,
}

/// A subscriber's part in a window.
#[derive(Debug)]
pub(crate) struct Participant {
    pub(crate) member: Arc<Member>,
    /// Held across the start and the end, so that an end never overtakes its start.
    pub(crate) stage: Mutex<Stage>,
}

impl Participant {
    pub(crate) fn new(member: Arc<Member>) -> Arc<Self> {
        Arc::new(Self { member, stage: Mutex::new(Stage::Waiting) })
    }

    /// Gives the start, unless the window is over already.
    pub(crate) fn start(&self, inner: &Inner, record: &Record, nonblocking: bool) -> Result<(), SubscriberError> {
        let mut stage = self.stage.lock();
        if *stage != Stage::Waiting {
            return Ok(());
        }
        let coverage = record.coverage(nonblocking);
        match self.member.call(inner, nonblocking, |subscriber| subscriber.start(&coverage)) {
            Some(Ok(())) => *stage = Stage::Started,
            // It left meanwhile: it has nothing, and will get nothing.
            None => *stage = Stage::Over,
            Some(Err(error)) => {
                *stage = Stage::Over;
                return Err(error);
            }
        }
        Ok(())
    }

    fn end(&self, inner: &Inner, record: &Record) -> Result<(), SubscriberError> {
        let mut stage = self.stage.lock();
        if *stage == Stage::Started {
            let ended = self.member.try_call(inner, |subscriber| subscriber.end(&record.coverage(false)));
            ended.transpose()?;
        }
        *stage = Stage::Over;
        Ok(())
    }
}

/// An open window.
#[derive(Debug)]
pub(crate) struct Record {
    id: u64,
    key: Key,
    mode: Mode,
    reach: Vec<Stretch>,
    participants: Mutex<Vec<Arc<Participant>>>,
    /// Bytes that have an outcome, by host address or by guest address as the key is.
    settled_host: Mutex<RangeSet<Hva>>,
    settled_guest: Mutex<RangeSet<Gpa>>,
    /// Opening failed: nothing changed, so nothing is to be zapped for want of an outcome.
    aborted: AtomicBool,
    closed: Mutex<bool>,
    closing: Condvar,
}

impl Record {
    pub(crate) fn key(&self) -> Key {
        self.key
    }

    pub(crate) fn id(&self) -> u64 {
        self.id
    }

    pub(crate) fn reach(&self) -> &[Stretch] {
        &self.reach
    }

    pub(crate) fn coverage(&self, nonblocking: bool) -> Coverage<'_> {
        Coverage { window: self.id, mode: self.mode, reach: &self.reach, nonblocking }
    }

    pub(crate) fn participants(&self) -> Vec<Arc<Participant>> {
        self.participants.lock().clone()
    }

    pub(crate) fn join(&self, participant: Arc<Participant>) {
        self.participants.lock().push(participant);
    }

    pub(crate) fn settle(&self, key: Key) {
        match key {
            Key::Host(range) => self.settled_host.lock().insert(range),
            Key::Guest(range) => self.settled_guest.lock().insert(range),
        }
    }

    pub(crate) fn unsettle(&self, key: Key) {
        match key {
            Key::Host(range) => self.settled_host.lock().remove(range),
            Key::Guest(range) => self.settled_guest.lock().remove(range),
        }
    }

    /// What has no outcome yet.
    fn unsettled(&self) -> Vec<Key> {
        match self.key {
            Key::Host(range) => self.settled_host.lock().missing_from(range).into_iter().map(Key::Host).collect(),
            Key::Guest(range) => self.settled_guest.lock().missing_from(range).into_iter().map(Key::Guest).collect(),
        }
    }

    /// The parts of the reach that lie in `part`, a part of the key.
    pub(crate) fn reach_of(&self, part: Key) -> Vec<Stretch> {
        self.reach.iter().filter_map(|stretch| cut(stretch, part)).collect()
    }

    pub(crate) fn wait_until_closed(&self) {
        let mut closed = self.closed.lock();
        while !*closed {
            closed = self.closing.wait(&self.closed, closed);
        }
    }

    #[cfg(all(feature = "std", not(loom)))]
    pub(crate) fn wait_until_closed_by(&self, deadline: std::time::Instant) -> bool {
        let mut closed = self.closed.lock();
        while !*closed {
            let (guard, in_time) = self.closing.wait_until(closed, deadline);
            closed = guard;
            if !in_time {
                return *closed;
            }
        }
        true
    }

    fn wake(&self) {
        *self.closed.lock() = true;
        self.closing.notify_all();
    }

    /// Zaps `part` in every subscriber that was started, and settles it.
    pub(crate) fn zap(&self, inner: &Inner, part: Key) -> Result<(), CloseCause> {
        let reach = self.reach_of(part);
        let coverage = Coverage { window: self.id, mode: self.mode, reach: &reach, nonblocking: false };
        for participant in self.participants() {
            let stage = participant.stage.lock();
            if *stage != Stage::Started {
                continue;
            }
            if let Some(Err(source)) = participant.member.call(inner, false, |subscriber| subscriber.zap(&coverage)) {
                return Err(participant.member.close_cause(source));
            }
        }
        self.settle(part);
        Ok(())
    }
}

fn cut(stretch: &Stretch, part: Key) -> Option<Stretch> {
    fn shift<A: Address, B: Address>(
        whole: AddrRange<A>,
        part: AddrRange<A>,
        other: AddrRange<B>,
    ) -> Option<AddrRange<B>> {
        let offset = part.start().as_u64() - whole.start().as_u64();
        AddrRange::with_len(B::from_u64(other.start().as_u64() + offset), part.len()).ok()
    }
    match part {
        Key::Host(range) => {
            let whole = stretch.host?;
            let host = whole.intersection(&range)?;
            Some(Stretch { guest: stretch.guest.and_then(|guest| shift(whole, host, guest)), host: Some(host) })
        }
        Key::Guest(range) => {
            let whole = stretch.guest?;
            let guest = whole.intersection(&range)?;
            Some(Stretch { guest: Some(guest), host: stretch.host.and_then(|host| shift(whole, guest, host)) })
        }
    }
}

/// The open windows, as faults and leases look at them.
#[derive(Debug)]
pub(crate) struct OpenWindows {
    records: Vec<Arc<Record>>,
    hosts: RangeIndex<Hva>,
    guests: RangeIndex<Gpa>,
}

impl OpenWindows {
    pub(crate) fn new(records: &[Arc<Record>]) -> Self {
        let keys = || records.iter().map(|record| record.key).zip(0..);
        Self {
            hosts: RangeIndex::new(keys().filter_map(|(key, i)| match key {
                Key::Host(range) => Some((range, i)),
                Key::Guest(_) => None,
            })),
            guests: RangeIndex::new(keys().filter_map(|(key, i)| match key {
                Key::Guest(range) => Some((range, i)),
                Key::Host(_) => None,
            })),
            records: records.to_vec(),
        }
    }

    pub(crate) fn overlapping(&self, place: &Stretch) -> Option<&Arc<Record>> {
        let host = place.host.and_then(|range| self.hosts.overlapping(range).next());
        let index = host.or_else(|| place.guest.and_then(|range| self.guests.overlapping(range).next()))?;
        Some(&self.records[index])
    }
}

/// How a window is opened.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct OpenOptions {
    pub(crate) leases: LeasePolicy,
    pub(crate) nonblocking: bool,
}

/// Opens a window.
pub(crate) fn open(inner: &Inner, key: Key, mode: Mode, options: OpenOptions) -> Result<Arc<Record>, OpenError> {
    if inner.in_callback() {
        return Err(OpenError::InCallback { key });
    }
    if crate::scope::in_own_scope(inner) {
        return Err(OpenError::InScope { key });
    }
    let (record, participants) = {
        let mut registry = inner.registry.lock();
        let reach = key.reach(&registry.walked);
        let mut retained = registry.windows.iter().filter(|open| open.mode == Mode::Retained && mode == Mode::Retained);
        if let Some(open) = retained.find(|open| reach.iter().any(|s| open.reaches(s))) {
            return Err(OpenError::Busy { key, open: open.key });
        }
        let members: Vec<_> = registry.members.iter().filter(|m| m.interest().meets(&reach)).cloned().collect();
        let participants: Vec<_> = members.into_iter().map(Participant::new).collect();
        registry.next_window += 1;
        let record = Arc::new(Record {
            id: registry.next_window,
            key,
            mode,
            reach,
            participants: Mutex::new(participants.clone()),
            settled_host: Mutex::default(),
            settled_guest: Mutex::default(),
            aborted: AtomicBool::new(false),
            closed: Mutex::new(false),
            closing: Condvar::new(),
        });
        registry.windows.push(Arc::clone(&record));
        // The count first: who reads 0 after its fence comes before this window's fence, and is seen by it.
        inner.count.fetch_add(1, Ordering::Relaxed);
        inner.open.store(OpenWindows::new(&registry.windows));
        (record, participants)
    };
    // W1: the record comes before the look at the faults.
    fence_unless(Twin::RecordFence, Ordering::SeqCst);
    if !broken(Twin::Poison) {
        for line in inner.lines.load().iter() {
            line.poison_if_overlapping(&record);
        }
    }
    // W2: the poison comes before the walk of the tables.
    fence_unless(Twin::PoisonFence, Ordering::SeqCst);

    // From here on a failure ends what was begun. `opening` does so when it is dropped, an unwinding included.
    let opening = Opening { inner, record: Some(record) };
    let record = opening.record();
    let refused = |member: &Member, source: SubscriberError| {
        let (id, name) = (member.id(), String::from(member.name()));
        match source {
            SubscriberError::WouldBlock if options.nonblocking => OpenError::WouldBlock { key },
            SubscriberError::Pinned { .. } => {
                add(&inner.counters.vetoes, 1);
                OpenError::Pinned { key, holder: Holder::Subscriber(id), name }
            }
            source => OpenError::Subscriber { key, id, name, source },
        }
    };
    // Who cannot follow is asked before anybody does anything, but after the window is recorded: it pins nothing new
    // here from then on.
    for Participant { member, .. } in participants.iter().map(|participant| &**participant) {
        match member.call(inner, options.nonblocking, |subscriber| Ok(subscriber.not_invalidatable())) {
            Some(Ok(Some(part))) if part.meets(record.reach()) => {
                add(&inner.counters.vetoes, 1);
                let holder = Holder::Subscriber(member.id());
                return Err(OpenError::Pinned { key, holder, name: member.name().into() });
            }
            Some(Err(source)) => return Err(refused(member, source)),
            _ => {}
        }
    }
    if let Err(blocked) = inner.leases.settle(key, options) {
        if matches!(blocked, OpenError::Pinned { .. }) {
            add(&inner.counters.vetoes, 1);
        }
        return Err(blocked);
    }
    // Not those who joined since: they have nothing here and get nothing here, and their own thread starts them.
    for participant in &participants {
        if let Err(source) = participant.start(inner, record, options.nonblocking) {
            return Err(refused(&participant.member, source));
        }
    }
    add(&inner.counters.windows, 1);
    Ok(opening.opened())
}

impl Record {
    fn reaches(&self, place: &Stretch) -> bool {
        self.reach.iter().any(|mine| {
            let host = mine.host.zip(place.host).is_some_and(|(a, b)| a.overlaps(&b));
            host || mine.guest.zip(place.guest).is_some_and(|(a, b)| a.overlaps(&b))
        })
    }
}

struct Opening<'a> {
    inner: &'a Inner,
    record: Option<Arc<Record>>,
}

impl Opening<'_> {
    fn record(&self) -> &Arc<Record> {
        // Taken only by `opened`, which consumes.
        self.record.as_ref().unwrap_or_else(|| unreachable!("opening without a record"))
    }

    fn opened(mut self) -> Arc<Record> {
        self.record.take().unwrap_or_else(|| unreachable!("opening without a record"))
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(record) = self.record.take() {
            record.aborted.store(true, Ordering::Relaxed);
            if finish(self.inner, &record).is_err() {
                self.inner.leave_unfinished(record);
            }
        }
    }
}

/// Finishes a window; what fails leaves it in progress, and finishing may be tried again. One thread at a time.
pub(crate) fn finish(inner: &Inner, record: &Arc<Record>) -> Result<(), CloseCause> {
    if inner.in_callback() {
        return Err(CloseCause::InCallback);
    }
    if crate::scope::in_own_scope(inner) {
        return Err(CloseCause::InScope);
    }
    if record.mode == Mode::Retained && !record.aborted.load(Ordering::Relaxed) {
        for part in record.unsettled() {
            record.zap(inner, part)?;
            let bytes = match part {
                Key::Host(range) => range.len(),
                Key::Guest(range) => range.len(),
            };
            add(&inner.counters.zaps, bytes.div_ceil(inner.page_size));
        }
    }
    for participant in record.participants().iter().rev() {
        participant.end(inner, record).map_err(|source| participant.member.close_cause(source))?;
    }
    let mut late = {
        let mut registry = inner.registry.lock();
        let open = registry.windows.len();
        registry.windows.retain(|open| !Arc::ptr_eq(open, record));
        if registry.windows.len() == open {
            // It is over already, and this is about an end below that failed.
            return Ok(());
        }
        inner.open.store(OpenWindows::new(&registry.windows));
        // I2: whoever sees the count fall (and then has an acquire fence) sees the sequence moved. Whoever sees the
        // sequence moved sees all that was changed in the window: what it looks up after that is new.
        let (bump, lower) =
            (|| inner.sequence.fetch_add(1, Ordering::Release), || inner.count.fetch_sub(1, Ordering::Relaxed));
        if broken(Twin::CountFirst) {
            lower();
            fence(Ordering::Release);
            bump();
        } else {
            bump();
            fence(Ordering::Release);
            lower();
        }
        // A subscriber that joined after the ends above were given may have been started since; nobody can join this
        // window any more.
        record.participants()
    };
    record.wake();
    late.retain(|participant| *participant.stage.lock() != Stage::Over);
    let failed = late.iter().filter(|participant| participant.end(inner, record).is_err()).count();
    if failed != 0 {
        // The window is over for everybody else; whoever reaps gives these ends again.
        inner.leave_to_reaper(Arc::clone(record));
    }
    Ok(())
}
