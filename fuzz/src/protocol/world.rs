// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Carries operations out on a space, and asks after each whether everything holds.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, mpsc},
    thread::JoinHandle,
    time::Duration,
};

use notifier_core::*;

use super::{
    Plant,
    members::{Call, Entry, Event, Installed, Kind, Log, Member, fails, lock},
    truth::{GUEST, HOST, Hold, Over, PAGE, Place, Slot, Span, Told, Truth, UNIT, Window, guest_page, host_page},
};
use crate::bytes::Bytes;

/// The most operations of one input.
const MOST: usize = 200;

pub(crate) fn run(data: &[u8], plant: Plant) {
    let (space, other) = (Space::new(), Space::new());
    let mut world = World::new(&space, &other, plant);
    world.check();
    let mut input = Bytes(data);
    for _ in 0..MOST {
        if input.is_empty() {
            break;
        }
        world.operation(&mut input);
        world.check();
    }
    world.finish();
}

// ---- guards of every kind -------------------------------------------------------------------------------------------

enum Guard<'s> {
    ZappedHost(InvalidationGuard<'s, Zapped, Hva>),
    ZappedGuest(InvalidationGuard<'s, Zapped, Gpa>),
    RetainedHost(InvalidationGuard<'s, Retained, Hva>),
    RetainedGuest(InvalidationGuard<'s, Retained, Gpa>),
    OwnZappedHost(OwnedInvalidationGuard<Zapped, Hva>),
    OwnZappedGuest(OwnedInvalidationGuard<Zapped, Gpa>),
    OwnRetainedHost(OwnedInvalidationGuard<Retained, Hva>),
    OwnRetainedGuest(OwnedInvalidationGuard<Retained, Gpa>),
}

macro_rules! any {
    ($guard:expr, $one:ident => $what:expr) => {
        match $guard {
            Guard::ZappedHost($one) => $what,
            Guard::ZappedGuest($one) => $what,
            Guard::RetainedHost($one) => $what,
            Guard::RetainedGuest($one) => $what,
            Guard::OwnZappedHost($one) => $what,
            Guard::OwnZappedGuest($one) => $what,
            Guard::OwnRetainedHost($one) => $what,
            Guard::OwnRetainedGuest($one) => $what,
        }
    };
}

/// One page of a batch: its number in the window's address space.
#[derive(Debug, Clone, Copy)]
struct Repoint {
    page: u64,
    expected: u64,
    new: u64,
}

/// What `change_pte` reported of a page.
#[derive(Debug, Clone, Copy)]
struct Reported {
    outcome: Outcome,
    old: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Outside,
    Unaligned,
    Twice,
    Foreign,
    InScope,
    Subscriber,
    Other,
}

fn change<A: WindowAddress>(
    guard: &InvalidationGuard<'_, Retained, A>,
    space: &Space,
    at: fn(u64) -> A,
    batch: &[Repoint],
) -> Result<Vec<Reported>, Refusal> {
    let changes: Vec<Change<A>> = batch
        .iter()
        .map(|one| Change {
            page: at(one.page),
            expected: OutputAddr::new(one.expected),
            new: OutputAddr::new(one.new),
        })
        .collect();
    match guard.change_pte_in(space, &changes) {
        Ok(report) => {
            assert!(
                report.iter().map(|one| one.page).eq(changes.iter().map(|one| one.page)),
                "another page is reported"
            );
            Ok(report.iter().map(|one| Reported { outcome: one.outcome, old: one.old.as_u64() }).collect())
        }
        Err(error) => {
            assert!(!error.to_string().contains('\n'));
            Err(match error {
                ChangeError::OutsideWindow { .. } => Refusal::Outside,
                ChangeError::Unaligned { .. } => Refusal::Unaligned,
                ChangeError::Twice { .. } => Refusal::Twice,
                ChangeError::ForeignSpace { .. } => Refusal::Foreign,
                ChangeError::InScope { .. } => Refusal::InScope,
                ChangeError::Subscriber { .. } => Refusal::Subscriber,
                _ => Refusal::Other,
            })
        }
    }
}

impl Guard<'_> {
    fn number(&self) -> u64 {
        any!(self, guard => guard.window())
    }

    fn close(self) -> Result<(), CloseError> {
        any!(self, guard => guard.close())
    }

    fn owned(&self) -> bool {
        matches!(
            self,
            Guard::OwnZappedHost(_) | Guard::OwnZappedGuest(_) | Guard::OwnRetainedHost(_) | Guard::OwnRetainedGuest(_)
        )
    }

    fn change(&self, space: &Space, batch: &[Repoint]) -> Option<Result<Vec<Reported>, Refusal>> {
        Some(match self {
            Guard::RetainedHost(guard) => change(guard, space, host_page, batch),
            Guard::OwnRetainedHost(guard) => change(guard, space, host_page, batch),
            Guard::RetainedGuest(guard) => change(guard, space, guest_page, batch),
            Guard::OwnRetainedGuest(guard) => change(guard, space, guest_page, batch),
            _ => return None,
        })
    }

    /// `None` for a guard of the other mode.
    fn settle(&self, part: Span, zap: bool) -> Option<Result<(), Refusal>> {
        fn one<A: WindowAddress>(
            guard: &InvalidationGuard<'_, Retained, A>,
            part: AddrRange<A>,
            zap: bool,
        ) -> Result<(), Refusal> {
            let settled = if zap { guard.zap(part) } else { guard.keep(part) };
            settled.map_err(|error| match error {
                SettleError::OutsideWindow { .. } => Refusal::Outside,
                SettleError::Close(CloseCause::InScope) => Refusal::InScope,
                SettleError::Close(CloseCause::Subscriber { .. }) => Refusal::Subscriber,
                _ => Refusal::Other,
            })
        }
        Some(match self {
            Guard::RetainedHost(guard) => one(guard, part.host(), zap),
            Guard::OwnRetainedHost(guard) => one(guard, part.host(), zap),
            Guard::RetainedGuest(guard) => one(guard, part.guest(), zap),
            Guard::OwnRetainedGuest(guard) => one(guard, part.guest(), zap),
            _ => return None,
        })
    }

    fn discard(&self) -> bool {
        match self {
            Guard::ZappedHost(guard) => guard.discard(),
            Guard::ZappedGuest(guard) => guard.discard(),
            Guard::OwnZappedHost(guard) => guard.discard(),
            Guard::OwnZappedGuest(guard) => guard.discard(),
            _ => return false,
        }
        true
    }
}

// ---- walkers with faults in flight ----------------------------------------------------------------------------------

enum Flight {
    Idle,
    Begun(Fault<'static>),
    Found(Resolved<'static>),
}

/// A walker, and the fault that borrows it.
struct Seat {
    flight: Flight,
    place: Place,
    /// Whether a window over it was recorded since; `None` where that is not known.
    lost: Option<bool>,
    walker: *mut Walker,
}

impl Seat {
    fn new(space: &Space) -> Self {
        let nowhere = Place { guest: None, host: None };
        let walker = Box::into_raw(Box::new(space.walker()));
        Self { flight: Flight::Idle, place: nowhere, lost: Some(false), walker }
    }

    fn begin(&mut self, range: GpaRange) -> Result<Fault<'static>, FaultError> {
        self.flight = Flight::Idle;
        // SAFETY: the walker lives until the seat is dropped, which ends the flight first; and nobody else borrows it,
        // for the only other borrow there can be is the flight that was ended above.
        unsafe { &mut *self.walker }.fault(range)
    }

    fn in_flight(&self) -> bool {
        !matches!(self.flight, Flight::Idle)
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        self.flight = Flight::Idle;
        // SAFETY: from `Box::into_raw`, and nothing borrows it any more.
        drop(unsafe { Box::from_raw(self.walker) });
    }
}

// ---- another thread's scope -----------------------------------------------------------------------------------------

struct Elsewhere {
    leave: mpsc::Sender<()>,
    thread: JoinHandle<()>,
}

impl Elsewhere {
    fn enter(space: &Space) -> Self {
        let (space, (entered, is_in), (leave, left)) = (space.clone(), mpsc::channel(), mpsc::channel());
        let thread = std::thread::spawn(move || {
            let mut walker = space.walker();
            let scope = walker.enter();
            entered.send(()).expect("somebody waits");
            // Also where the sender is gone: an input that failed.
            let _ = left.recv();
            drop(scope);
        });
        is_in.recv().expect("a scope");
        Self { leave, thread }
    }

    fn leave(self) {
        self.leave.send(()).expect("a scope");
        self.thread.join().expect("a scope that ends");
    }
}

// ---- the world ------------------------------------------------------------------------------------------------------

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Standing {
    Live,
    /// It left, or failed to join, and was not released yet.
    Leaving,
    Gone,
}

struct Taking {
    member: Arc<Member>,
    told: Told,
    subscription: Option<Subscription>,
    standing: Standing,
}

struct Held {
    lease: Arc<Mutex<Option<Lease>>>,
    place: Place,
    /// It is given back when a window asks.
    obliging: bool,
}

impl Held {
    fn is_alive(&self) -> bool {
        lock(&self.lease).is_some()
    }
}

/// What each member has, by page.
type Tables = Vec<Vec<Option<Entry>>>;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Busy,
    Pinned,
    WouldBlock,
    Subscriber,
}

struct World<'s> {
    /// First, so that it ends first where a check fails: everything below may have to wait for it.
    elsewhere: Option<Elsewhere>,
    space: &'s Space,
    other: &'s Space,
    plant: Plant,
    log: Log,
    truth: Truth,
    members: Vec<Taking>,
    guards: Vec<Guard<'s>>,
    leaked: Vec<Guard<'s>>,
    seats: Vec<Seat>,
    leases: Vec<Held>,
    /// Windows that were ever recorded.
    recorded: u64,
    /// By window: who was started, in order, and whether they had their end.
    started: BTreeMap<u64, Vec<(usize, bool)>>,
    gone_slots: Vec<SlotId>,
    /// Whether the operation may add translations or rights.
    gains: bool,
    before: Tables,
}

impl<'s> World<'s> {
    fn new(space: &'s Space, other: &'s Space, plant: Plant) -> Self {
        let mut world = Self {
            elsewhere: None,
            space,
            other,
            plant,
            log: Log::default(),
            truth: Truth::default(),
            members: Vec::new(),
            guards: Vec::new(),
            leaked: Vec::new(),
            seats: (0..4).map(|_| Seat::new(space)).collect(),
            leases: Vec::new(),
            recorded: 0,
            started: BTreeMap::new(),
            gone_slots: Vec::new(),
            gains: false,
            before: Vec::new(),
        };
        // Two slots share host pages; one has none.
        for (guest, pages, host) in [(0, 8, Some(0)), (8, 6, Some(4)), (16, 4, None)] {
            world.add_slot(guest, pages, host, false);
        }
        world.join(0, Told::Whole, 0);
        world
    }

    fn add_slot(&mut self, page: u64, pages: u64, host: Option<u64>, read_only: bool) {
        let (spec, guest, host) = spec(page, pages, host, read_only);
        let id = self.space.add_slot(spec).expect("a slot where none is");
        self.truth.slots.push(Slot { id, guest, host, read_only });
        self.recorded += 1;
    }

    // ---- observation ----

    fn progress(&self) -> Progress {
        let mut progress = self.space.progress();
        if self.plant == Plant::CountFalls && progress.count > 0 {
            progress = Progress { count: progress.count - 1, sequence: progress.sequence + 1 };
        }
        progress
    }

    fn tables(&self) -> Tables {
        self.members.iter().map(|taking| taking.member.entries()).collect()
    }

    fn live(&self) -> impl Iterator<Item = &Taking> {
        self.members.iter().filter(|taking| taking.standing == Standing::Live)
    }

    fn stuck(&self) -> bool {
        self.truth.windows.iter().any(|window| window.hold != Hold::Guard)
            || self.members.iter().any(|taking| taking.standing == Standing::Leaving)
    }

    /// Takes the calls in, in their order.
    fn events(&mut self) {
        let mut events: Vec<Event> = std::mem::take(&mut *lock(&self.log));
        let ends = |events: &[Event]| -> Vec<usize> {
            (0..events.len()).filter(|&i| events[i].call == Call::End && events[i].ok).collect()
        };
        match (self.plant, ends(&events).as_slice()) {
            (Plant::EndTwice, [first, ..]) => events.insert(*first, events[*first]),
            (Plant::EndMissing, [first, ..]) => drop(events.remove(*first)),
            (Plant::EndsInOrder, [first, second, ..]) if events[*first].window == events[*second].window => {
                events.swap(*first, *second);
            }
            _ => {}
        }
        for event in events {
            self.event(event);
        }
    }

    fn event(&mut self, event: Event) {
        let Event { member, call, window, ok, count } = event;
        let standing = self.members[member].standing;
        assert!(standing != Standing::Gone, "{call:?} after the release of member {member}");
        let started = self.started.entry(window).or_default();
        let place = started.iter().position(|(one, _)| *one == member);
        let running = place.is_some_and(|place| !started[place].1);
        match call {
            Call::Joined | Call::Populate => {}
            Call::Start => {
                assert!(place.is_none(), "member {member} was started twice for window {window}");
                assert!(count > 0, "a start while the count is 0");
                if ok {
                    started.push((member, false));
                }
            }
            Call::End => {
                assert!(running, "member {member} has an end of window {window} without a start");
                assert!(count > 0, "an end while the count is 0");
                if ok {
                    let place = place.expect("running");
                    let later = &started[place + 1..];
                    let in_order =
                        later.iter().all(|(one, ended)| *ended || self.members[*one].standing != Standing::Live);
                    assert!(in_order, "member {member} had its end of window {window} before who was started after it");
                    started[place].1 = true;
                }
            }
            Call::Zap if window == 0 => {}
            Call::Zap | Call::Change => {
                assert!(running, "{call:?} of window {window} to member {member}, which takes no part in it");
            }
            Call::Release => {
                self.members[member].standing = if ok { Standing::Gone } else { Standing::Leaving };
            }
        }
        if self.started.get(&window).is_some_and(Vec::is_empty) {
            self.started.remove(&window);
        }
    }

    /// The window is over: everybody who was started had its end, or left.
    fn over(&mut self, number: u64) {
        for (member, ended) in self.started.remove(&number).unwrap_or_default() {
            let live = self.members[member].standing == Standing::Live;
            assert!(ended || !live, "window {number} is over, and member {member} was not told");
        }
    }

    /// What would keep a window from being finished.
    fn obstructed(&self, window: &Window) -> bool {
        let unsettled = window.mode == Mode::Retained
            && window.hold != Hold::Aborted
            && window.over.span().units().any(|unit| !window.settled.contains(&unit));
        let started = self.started.get(&window.number).map_or(&[][..], Vec::as_slice);
        started.iter().filter(|(_, ended)| !ended).any(|(member, _)| {
            let taking = &self.members[*member];
            match taking.standing {
                Standing::Live => taking.member.fails(fails::END) || (unsettled && taking.member.fails(fails::ZAP)),
                Standing::Leaving => unsettled && taking.member.fails(fails::RELEASE),
                Standing::Gone => false,
            }
        })
    }

    /// Has whatever can be finished finished, and takes note of it.
    fn reap(&mut self) {
        let left = self.space.reap();
        self.events();
        let (mut stays, mut goes) = (Vec::new(), Vec::new());
        for window in std::mem::take(&mut self.truth.windows) {
            if window.hold == Hold::Guard || self.obstructed(&window) { stays.push(window) } else { goes.push(window) }
        }
        self.truth.windows = stays;
        for window in goes {
            self.settled_by_closing(&window);
        }
        let stuck = self.truth.windows.iter().filter(|window| window.hold != Hold::Guard).count();
        let leaving = self.members.iter().filter(|taking| taking.standing == Standing::Leaving).count();
        assert_eq!(left, stuck + leaving, "left to be finished; {stuck} windows and {leaving} members stay");
    }

    // ---- what has to hold after each operation ----

    fn check(&mut self) {
        self.events();
        if self.stuck() && self.elsewhere.is_none() {
            self.reap();
        }
        let after = self.tables();
        let progress = self.progress();
        // I1, I2.
        assert_eq!(progress.count, self.truth.windows.len(), "I1: {:?}", self.truth.windows);
        assert_eq!(progress.count as u64 + progress.sequence, self.recorded, "I2: windows recorded");
        assert_eq!(self.space.counters().unrelated_retries, 0, "I11");
        let mut slots: Vec<_> = self.truth.slots.iter().map(|slot| (slot.id, slot.guest.guest())).collect();
        slots.sort_by_key(|(_, guest)| guest.start());
        let served: Vec<_> = self.space.slots().iter().map(|(id, spec)| (*id, spec.guest)).collect();
        assert_eq!(served, slots, "I10: the slots");

        for (number, entries) in after.iter().enumerate() {
            let gone = self.members[number].standing == Standing::Gone;
            for (page, entry) in (0..).zip(entries) {
                let was = self.before.get(number).and_then(|entries| entries[page as usize]);
                let place = self.truth.place(Span::of_pages(page, 1));
                self.gained(number, page, place, was, *entry);
                let Some(entry) = *entry else { continue };
                assert!(!gone, "member {number} has left, and translates page {page}");
                let (frame, also) = (self.truth.frame(page), self.truth.also.get(&page).copied());
                assert!(
                    entry.frame == frame || Some(entry.frame) == also,
                    "I5: member {number} translates page {page} to {:#x}, and {frame:#x} is there",
                    entry.frame
                );
                let read_only = self.truth.slot_of(page).is_some_and(|slot| slot.read_only);
                assert!(!read_only || !(entry.write || entry.armed), "member {number} writes to read-only page {page}");
                for window in self.truth.over(place).filter(|window| window.hold != Hold::Aborted) {
                    match window.mode {
                        Mode::Zapped => panic!("I5: member {number} translates page {page} of {window:?}"),
                        Mode::Retained => assert!(
                            !entry.write && !entry.armed,
                            "I6: member {number} may write to page {page} of {window:?}: {entry:?}"
                        ),
                    }
                }
            }
        }
        for seat in &self.seats {
            if let (Flight::Begun(fault), Some(lost)) = (&seat.flight, seat.lost) {
                assert_eq!(fault.is_lost(), lost, "I11: a fault over {:?}", seat.place);
            }
        }
        self.leases.retain(Held::is_alive);
        self.gains = false;
        self.before = after;
    }

    /// I4: a translation, or a right, that was not there before.
    fn gained(&self, member: usize, page: u64, place: Place, was: Option<Entry>, is: Option<Entry>) {
        let more = match (was, is) {
            (_, None) => false,
            (None, Some(_)) => true,
            (Some(was), Some(is)) => (is.write && !was.write) || (is.armed && !was.armed),
        };
        if more {
            assert!(self.gains, "I4: member {member} gained {is:?} at page {page} from an operation that adds nothing");
            let window = self.truth.over(place).next();
            assert!(window.is_none(), "I4: member {member} gained {is:?} at page {page}, inside {window:?}");
        }
    }

    /// A window over `over` was recorded.
    fn recorded(&mut self, over: Over) {
        self.recorded += 1;
        for seat in self.seats.iter_mut().filter(|seat| seat.in_flight() && over.overlaps(seat.place)) {
            seat.lost = Some(true);
        }
    }

    /// Windows that are not known one by one: of a change of slots, or of a populating that failed.
    fn recorded_some(&mut self) {
        let progress = self.space.progress();
        let recorded = progress.count as u64 + progress.sequence;
        assert!(recorded >= self.recorded, "I2: the sequence went back");
        self.recorded = recorded;
    }

    // ---- operations ----

    fn operation(&mut self, input: &mut Bytes<'_>) {
        let alone = self.elsewhere.is_none();
        match input.below(42) {
            0..=4 => self.open(input),
            5 | 6 => self.close(input, false),
            7 => self.close(input, true),
            8 => self.leak(input),
            9 => self.host_changes(input),
            10..=12 if alone => self.change(input),
            13 if alone => self.settle(input),
            14 => self.discard(input),
            15 if alone => self.populate(input),
            16..=18 => self.begin(input),
            19 | 20 => self.resolve(input),
            21..=23 => self.install(input),
            24 => {
                let seat = usize::from(input.below(4));
                self.seats[seat].flight = Flight::Idle;
            }
            25 => self.lease(input),
            26 => {
                let which = usize::from(input.byte());
                if !self.leases.is_empty() {
                    let which = which % self.leases.len();
                    drop(lock(&self.leases[which].lease).take());
                }
            }
            27 if alone => {
                let (how, told, fails) = (input.byte(), self.told(input), FAILURES[usize::from(input.byte()) % 32]);
                self.join(how, told, fails);
            }
            28 if alone => self.leave(input),
            29 if alone => {
                let (which, fails) = (usize::from(input.byte()), FAILURES[usize::from(input.byte()) % 32]);
                let which = which % self.members.len();
                self.members[which].member.set_fails(fails);
            }
            30 if alone => self.heal(),
            31 if alone => self.slots(input),
            32 => self.guest(input),
            33 => self.age(input),
            34 => match self.elsewhere.take() {
                Some(elsewhere) => elsewhere.leave(),
                None if !self.stuck() => self.elsewhere = Some(Elsewhere::enter(self.space)),
                None => {}
            },
            35 if alone => self.in_own_scope(input),
            36..=41 => self.fault_in(input),
            _ => {}
        }
    }

    fn guest_span(input: &mut Bytes<'_>, most: u8) -> Span {
        let page = u64::from(input.below(GUEST as u8));
        let pages = 1 + u64::from(input.below(most));
        Span::of_pages(page, pages.min(GUEST - page))
    }

    fn over_any(input: &mut Bytes<'_>) -> Over {
        let how = input.byte();
        let (host, halves) = (how & 1 == 0, how & 6 == 6);
        let pages = if host { HOST } else { GUEST };
        let start = u64::from(input.below(pages as u8));
        let len = 1 + u64::from(input.below(5));
        let mut span = Span::of_pages(start, len.min(pages - start));
        if halves {
            // Half pages at either end.
            span.start += u64::from(how >> 3 & 1);
            span.end -= u64::from(how >> 4 & 1);
            span.end = span.end.max(span.start + 1);
        }
        if host { Over::Host(span) } else { Over::Guest(span) }
    }

    fn told(&self, input: &mut Bytes<'_>) -> Told {
        match input.byte() {
            byte if byte & 7 == 6 => Told::Guest(Self::guest_span(input, 16)),
            byte if byte & 7 == 7 => {
                let page = u64::from(input.below(HOST as u8));
                let pages = 1 + u64::from(input.below(12));
                Told::Host(Span::of_pages(page, pages.min(HOST - page)))
            }
            _ => Told::Whole,
        }
    }

    fn open(&mut self, input: &mut Bytes<'_>) {
        let over = Self::over_any(input);
        let how = input.byte();
        let (mode, owned) = (if how & 1 == 0 { Mode::Zapped } else { Mode::Retained }, how & 2 != 0);
        let mut nonblocking = how & 4 != 0 || self.elsewhere.is_some();
        let mut policy = match how >> 4 & 3 {
            0 => LeasePolicy::Fail,
            1 => LeasePolicy::Wait,
            2 => LeasePolicy::Cancel,
            _ => LeasePolicy::CancelFor(Duration::ZERO),
        };
        if self.guards.len() >= 6 {
            return;
        }
        let reach = self.truth.reach(over);
        let reaches = |window: &Window| {
            reach.iter().any(|a| {
                window.reach.iter().any(|b| {
                    let sides = [(a.host, b.host), (a.guest, b.guest)];
                    sides.iter().any(|(a, b)| a.zip(*b).is_some_and(|(a, b)| a.overlaps(b)))
                })
            })
        };
        let mut reasons = Vec::new();
        let busy = mode == Mode::Retained
            && self.truth.windows.iter().any(|window| window.mode == Mode::Retained && reaches(window));
        if busy {
            reasons.push(Reason::Busy);
        }
        // Leases: nobody else can give them back, so that nothing may wait for one.
        let pins: Vec<bool> = (self.leases.iter())
            .filter(|held| held.is_alive() && over.overlaps(held.place))
            .map(|held| held.obliging)
            .collect();
        let obliging = pins.iter().all(|obliging| *obliging);
        if !pins.is_empty() {
            match policy {
                LeasePolicy::Wait => nonblocking = true,
                LeasePolicy::Cancel if !obliging && !nonblocking => policy = LeasePolicy::CancelFor(Duration::ZERO),
                _ => {}
            }
            match policy {
                LeasePolicy::Fail => reasons.push(Reason::Pinned),
                LeasePolicy::Wait => reasons.push(Reason::WouldBlock),
                _ if obliging => {}
                LeasePolicy::Cancel => reasons.push(Reason::WouldBlock),
                _ => reasons.push(if nonblocking { Reason::WouldBlock } else { Reason::Pinned }),
            }
        }
        let mut expected_starts = Vec::new();
        for taking in self.members.iter().filter(|taking| taking.told.meets(&reach)) {
            let member = &taking.member;
            match taking.standing {
                Standing::Gone => {}
                Standing::Leaving if nonblocking => reasons.push(Reason::WouldBlock),
                Standing::Leaving if member.fails(fails::RELEASE) => reasons.push(Reason::Subscriber),
                Standing::Leaving => {}
                Standing::Live => {
                    expected_starts.push(member.number);
                    if member.fails(fails::PINNED | fails::START_PINNED) {
                        reasons.push(Reason::Pinned);
                    }
                    if member.fails(fails::START | fails::START_LATE) {
                        reasons.push(Reason::Subscriber);
                    }
                    if self.elsewhere.is_some() && matches!(member.kind, Kind::Pages(_)) {
                        reasons.push(Reason::WouldBlock);
                    }
                }
            }
        }
        if !busy {
            self.recorded(over);
        }
        // The builder's lifetime is the space's, so each of the eight is named.
        let space = self.space;
        let how = (policy, nonblocking);
        macro_rules! builder {
            ($range:expr) => {{
                let builder = space.window($range).leases(how.0);
                if how.1 { builder.nonblocking() } else { builder }
            }};
        }
        let result = match (over, mode, owned) {
            (Over::Host(span), Mode::Zapped, false) => builder!(span.host()).open_zapped().map(Guard::ZappedHost),
            (Over::Guest(span), Mode::Zapped, false) => builder!(span.guest()).open_zapped().map(Guard::ZappedGuest),
            (Over::Host(span), Mode::Retained, false) => builder!(span.host()).open_retained().map(Guard::RetainedHost),
            (Over::Guest(span), Mode::Retained, false) => {
                builder!(span.guest()).open_retained().map(Guard::RetainedGuest)
            }
            (Over::Host(span), Mode::Zapped, true) => {
                builder!(span.host()).open_zapped_owned().map(Guard::OwnZappedHost)
            }
            (Over::Guest(span), Mode::Zapped, true) => {
                builder!(span.guest()).open_zapped_owned().map(Guard::OwnZappedGuest)
            }
            (Over::Host(span), Mode::Retained, true) => {
                builder!(span.host()).open_retained_owned().map(Guard::OwnRetainedHost)
            }
            (Over::Guest(span), Mode::Retained, true) => {
                builder!(span.guest()).open_retained_owned().map(Guard::OwnRetainedGuest)
            }
        };
        self.events();
        match result {
            Ok(guard) => {
                assert!(reasons.is_empty(), "{over:?} opened {mode:?} in spite of {reasons:?}");
                let number = guard.number();
                let window = Window { number, over, mode, reach, settled: Default::default(), hold: Hold::Guard };
                let starts: Vec<usize> =
                    self.started.get(&number).into_iter().flatten().map(|(member, _)| *member).collect();
                assert_eq!(starts, expected_starts, "who was started for {window:?}");
                self.truth.windows.push(window);
                self.guards.push(guard);
            }
            Err(error) => {
                let reason = match &error {
                    OpenError::Busy { .. } => Reason::Busy,
                    OpenError::Pinned { .. } => Reason::Pinned,
                    OpenError::WouldBlock { .. } => Reason::WouldBlock,
                    OpenError::Subscriber { .. } => Reason::Subscriber,
                    error => panic!("not opened: {error}"),
                };
                assert!(reasons.contains(&reason), "{over:?} was not opened: {error}, and there is but {reasons:?}");
                self.aborted(over, mode, reach);
            }
        }
    }

    /// I10: a window that was not opened is in progress only where somebody cannot be given its end.
    fn aborted(&mut self, over: Over, mode: Mode, reach: Vec<Place>) {
        let known: Vec<u64> = self.truth.windows.iter().map(|window| window.number).collect();
        let others: Vec<u64> = self.started.keys().copied().filter(|number| !known.contains(number)).collect();
        for number in others {
            let window =
                Window { number, over, mode, reach: reach.clone(), settled: Default::default(), hold: Hold::Aborted };
            if self.obstructed(&window) {
                self.truth.windows.push(window);
            } else {
                self.over(number);
            }
        }
    }

    fn pick(&mut self, input: &mut Bytes<'_>) -> Option<usize> {
        let which = usize::from(input.byte());
        (!self.guards.is_empty()).then(|| which % self.guards.len())
    }

    fn window_of(&self, guard: &Guard<'_>) -> usize {
        let number = guard.number();
        let at = self.truth.windows.iter().position(|window| window.number == number);
        at.expect("a guard's window is known")
    }

    fn close(&mut self, input: &mut Bytes<'_>, by_dropping: bool) {
        let Some(which) = self.pick(input) else { return };
        let window = self.window_of(&self.guards[which]);
        let unsettled = self.truth.windows[window].mode == Mode::Retained;
        if self.elsewhere.is_some() && unsettled {
            return;
        }
        let guard = self.guards.swap_remove(which);
        self.events();
        let obstructed = self.obstructed(&self.truth.windows[window]);
        if by_dropping {
            let owned = guard.owned();
            drop(guard);
            if owned && self.elsewhere.is_some() {
                // Nobody else reaps with it: it is over when the reaper has been there.
                self.space.reap();
            }
            self.truth.windows[window].hold = Hold::Stuck;
            self.reap();
            return;
        }
        let result = guard.close();
        self.events();
        match result {
            Ok(()) => {
                assert!(!obstructed, "closed, although somebody fails");
                let window = self.truth.windows.remove(window);
                self.settled_by_closing(&window);
            }
            Err(error) => {
                assert!(obstructed, "not closed: {error}");
                self.truth.windows[window].hold = Hold::Stuck;
            }
        }
    }

    /// I8, and what a window leaves.
    fn settled_by_closing(&mut self, window: &Window) {
        self.over(window.number);
        let unsettled: Vec<u64> = window.over.span().units().filter(|unit| !window.settled.contains(unit)).collect();
        if window.hold == Hold::Aborted || window.mode == Mode::Zapped {
            return;
        }
        let tables = self.tables();
        for page in 0..GUEST {
            let place = self.truth.place(Span::of_pages(page, 1));
            for unit in &unsettled {
                if !window.over.part(Span { start: *unit, end: unit + 1 }).overlaps(place) {
                    continue;
                }
                self.truth.also.remove(&page);
                for (number, entries) in tables.iter().enumerate() {
                    let entry = entries[page as usize];
                    assert!(entry.is_none(), "I8: member {number} kept page {page} of {window:?}: {entry:?}");
                }
            }
        }
    }

    fn leak(&mut self, input: &mut Bytes<'_>) {
        let Some(which) = self.pick(input) else { return };
        if self.leaked.len() < 3 {
            // Kept until the end, so that nothing is lost to a leak checker; nothing else ever touches it.
            let guard = self.guards.swap_remove(which);
            self.leaked.push(guard);
        }
    }

    fn host_changes(&mut self, input: &mut Bytes<'_>) {
        let Some(which) = self.pick(input) else { return };
        let window = self.window_of(&self.guards[which]);
        if self.truth.windows[window].mode != Mode::Zapped {
            return;
        }
        let over = self.truth.windows[window].over;
        for page in over.span().pages() {
            let frame = self.truth.fresh_frame();
            self.truth.repoint(over, page, frame);
        }
    }

    fn change(&mut self, input: &mut Bytes<'_>) {
        let Some(which) = self.pick(input) else { return };
        let at = self.window_of(&self.guards[which]);
        let window = self.truth.windows[at].clone();
        if window.mode != Mode::Retained {
            return;
        }
        let over = window.over;
        let pages: Vec<u64> = over.span().pages().collect();
        let mut batch = Vec::new();
        let how = input.byte();
        for _ in 0..(how & 3) + u8::from(how & 0x80 == 0) {
            let what = input.byte();
            let mut page = pages[usize::from(what & 15) % pages.len()];
            if what >> 4 & 7 == 7 {
                page += u64::from(input.below(3));
            }
            let truth = self.truth.frame_of(over, page.min(HOST.max(GUEST) - 1));
            let (mut expected, mut new) = (truth, self.truth.fresh_frame());
            match input.byte() {
                byte @ 0xe0..=0xe7 => expected += PAGE * u64::from(byte & 7),
                byte @ 0xe8..=0xef => new += u64::from(byte & 7),
                byte @ 0xd0..=0xdf => new = self.truth.frame(u64::from(byte & 15)),
                0xf0 => new = expected,
                0xf1 => expected += 8,
                _ => {}
            }
            batch.push(Repoint { page, expected, new });
        }
        let halfway = batch.iter().any(|one| {
            let places = self.truth.places_of(over, one.page);
            places.iter().any(|page| self.truth.also.contains_key(page))
        });
        if halfway {
            return;
        }
        let foreign = how & 0x70 == 0x70;
        let mut wrong = Vec::new();
        if foreign {
            wrong.push(Refusal::Foreign);
        }
        for (index, one) in batch.iter().enumerate() {
            if !over.span().covers(Span::of_pages(one.page, 1)) {
                wrong.push(Refusal::Outside);
            }
            if (one.expected | one.new) % PAGE != 0 {
                wrong.push(Refusal::Unaligned);
            }
            if batch[..index].iter().any(|other| other.page == one.page) {
                wrong.push(Refusal::Twice);
            }
        }
        self.events();
        let (before, began) = (self.tables(), self.progress());
        let space = if foreign { self.other } else { self.space };
        let Some(result) = self.guards[which].change(space, &batch) else { return };
        let mut ended = self.progress();
        if self.plant == Plant::ChangeMovesSequence {
            ended.sequence += 1;
        }
        if !self.stuck() {
            assert_eq!(began, ended, "I3: count and sequence");
        }
        match result {
            Ok(report) => {
                assert!(wrong.is_empty(), "{batch:?} was carried out in spite of {wrong:?}");
                assert_eq!(report.len(), batch.len());
                self.events();
                for (one, reported) in batch.iter().zip(&report) {
                    self.repointed(&window, *one, *reported, &before);
                    let place = self.truth.windows.iter_mut().find(|other| other.number == window.number);
                    if let Some(window) = place {
                        window.settled.extend(Span::of_pages(one.page, 1).units());
                    }
                }
            }
            Err(Refusal::Subscriber) => {
                let started = self.started.get(&window.number).map_or(&[][..], Vec::as_slice);
                let fails = started.iter().any(|(member, _)| {
                    let taking = &self.members[*member];
                    match taking.standing {
                        Standing::Live => {
                            taking.member.fails(fails::CHANGE | fails::CHANGE_LATE) && taking.member.fails(fails::ZAP)
                        }
                        _ => taking.member.fails(fails::RELEASE),
                    }
                });
                assert!(fails && wrong.is_empty(), "nobody fails to repoint and to zap");
                for one in &batch {
                    for page in self.truth.places_of(over, one.page) {
                        let old = self.truth.frame(page);
                        self.truth.also.insert(page, old);
                    }
                    self.truth.repoint(over, one.page, one.new);
                    let settled = &mut self.truth.windows[at].settled;
                    Span::of_pages(one.page, 1).units().for_each(|unit| {
                        settled.remove(&unit);
                    });
                }
                self.events();
            }
            Err(refusal) => {
                assert!(wrong.contains(&refusal), "{batch:?} was refused as {refusal:?}, and is {wrong:?}");
                if self.plant == Plant::RefusalChanges {
                    self.members.iter().for_each(|taking| taking.member.disturb());
                }
                assert_eq!(self.tables(), before, "I10: a refused batch changed something");
                let called = lock(&self.log).iter().any(|event| matches!(event.call, Call::Change));
                assert!(!called, "I10: a refused batch reached a member");
            }
        }
    }

    /// I5, I7, and the report of one page.
    fn repointed(&mut self, window: &Window, one: Repoint, reported: Reported, before: &Tables) {
        assert_eq!(reported.old, one.expected);
        let after = self.tables();
        let (mut changed, mut zapped) = (false, false);
        let places = self.truth.places_of(window.over, one.page);
        for (number, (was, is)) in before.iter().zip(&after).enumerate() {
            for page in &places {
                match (was[*page as usize], is[*page as usize]) {
                    (None, None) => {}
                    (None, Some(made)) => panic!("I7: change_pte made {made:?} at page {page} of member {number}"),
                    (Some(_), None) => zapped = true,
                    (Some(was), Some(is)) => {
                        changed = true;
                        assert_eq!(was.frame, one.expected, "repointed what was not the expected page");
                        assert_eq!(
                            is.frame, one.new,
                            "I5: member {number} still translates page {page} to the old one"
                        );
                        assert!(!is.write && !is.armed, "I6: repointed, and writable");
                    }
                }
            }
        }
        let started = self.started.get(&window.number).map_or(&[][..], Vec::as_slice);
        let generous = started.iter().any(|(member, _)| {
            let taking = &self.members[*member];
            taking.standing != Standing::Live
                || taking.member.is_simple()
                || taking.member.fails(fails::CHANGE | fails::CHANGE_LATE)
        });
        let right = match reported.outcome {
            Outcome::Absent => !changed && !zapped,
            Outcome::Changed => changed && !zapped,
            Outcome::Zapped => zapped || generous,
        };
        assert!(right, "reported {:?}; repointed: {changed}, removed: {zapped}", reported.outcome);
        self.truth.repoint(window.over, one.page, one.new);
    }

    fn settle(&mut self, input: &mut Bytes<'_>) {
        let Some(which) = self.pick(input) else { return };
        let at = self.window_of(&self.guards[which]);
        let window = self.truth.windows[at].clone();
        let span = window.over.span();
        let (how, from, len) = (input.byte(), u64::from(input.byte()), u64::from(input.byte()));
        let zap = how & 1 == 0;
        let mut part = Span { start: span.start + from % (span.end - span.start), end: 0 };
        part.end = (part.start + 1 + len % 4).min(span.end + u64::from(how & 2));
        let outside = !span.covers(part);
        let halfway = part
            .pages()
            .any(|page| self.truth.places_of(window.over, page).iter().any(|page| self.truth.also.contains_key(page)));
        if !zap && halfway {
            return;
        }
        self.events();
        let started = self.started.get(&window.number).map_or(&[][..], Vec::as_slice);
        let fails = zap
            && started.iter().filter(|(_, ended)| !ended).any(|(member, _)| {
                let taking = &self.members[*member];
                match taking.standing {
                    Standing::Live => taking.member.fails(fails::ZAP),
                    Standing::Leaving => taking.member.fails(fails::RELEASE),
                    Standing::Gone => false,
                }
            });
        let Some(result) = self.guards[which].settle(part, zap) else { return };
        match result {
            Ok(()) => {
                assert!(!outside && !fails, "settled {part:?} of {window:?}");
                self.truth.windows[at].settled.extend(part.units());
                if zap {
                    let tables = self.tables();
                    for page in 0..GUEST {
                        let place = self.truth.place(Span::of_pages(page, 1));
                        let hit = window.over.part(part).overlaps(place);
                        let left = tables.iter().any(|entries| entries[page as usize].is_some());
                        assert!(!hit || !left, "zapped page {page}, and somebody has it");
                    }
                }
            }
            Err(Refusal::Outside) => assert!(outside, "{part:?} is inside {window:?}"),
            Err(Refusal::Subscriber) => assert!(fails && !outside, "nobody fails to zap"),
            Err(refusal) => panic!("not settled: {refusal:?}"),
        }
    }

    fn discard(&mut self, input: &mut Bytes<'_>) {
        let Some(which) = self.pick(input) else { return };
        let window = self.window_of(&self.guards[which]);
        if !self.guards[which].discard() {
            return;
        }
        let reach = self.truth.reach(self.truth.windows[window].over);
        for guest in reach.iter().filter_map(|place| place.guest) {
            for unit in guest.units() {
                if self.truth.slots.iter().any(|slot| slot.guest.units().contains(&unit)) {
                    self.truth.holes.insert(unit);
                    self.truth.doubtful.remove(&unit);
                }
            }
        }
    }

    fn any_fails(&self, bits: u32) -> bool {
        self.members.iter().any(|taking| taking.standing != Standing::Gone && taking.member.fails(bits))
    }

    fn populate(&mut self, input: &mut Bytes<'_>) {
        let span = Self::guest_span(input, 8);
        if self.any_fails(fails::END | fails::RELEASE) {
            return;
        }
        let result = self.space.populate(span.guest());
        self.events();
        self.recorded_some();
        match result {
            Ok(()) => {
                for unit in span.units() {
                    self.truth.holes.remove(&unit);
                    self.truth.doubtful.remove(&unit);
                }
            }
            Err(OpenError::Subscriber { .. }) => {
                assert!(self.any_fails(fails::POPULATE), "nobody refuses what is populated");
                // Undone by windows, which may have been refused.
                let starts = fails::START | fails::START_LATE | fails::PINNED | fails::START_PINNED;
                let undone = !self.any_fails(starts) && self.leases.is_empty() && !self.stuck();
                for unit in span.units() {
                    if self.truth.holes.contains(&unit) && !undone {
                        self.truth.holes.remove(&unit);
                        self.truth.doubtful.insert(unit);
                    }
                }
                self.doubt(span);
            }
            Err(error) => panic!("not populated: {error}"),
        }
        self.finished_windows_are_over();
    }

    /// Whether faults over these bytes were lost is not known.
    fn doubt(&mut self, guest: Span) {
        for seat in &mut self.seats {
            if seat.place.guest.is_some_and(|place| place.overlaps(guest)) && seat.lost == Some(false) {
                seat.lost = None;
            }
        }
    }

    /// Windows of an operation that opened and closed them itself.
    fn finished_windows_are_over(&mut self) {
        let known: Vec<u64> = self.truth.windows.iter().map(|window| window.number).collect();
        let others: Vec<u64> = self.started.keys().copied().filter(|number| !known.contains(number)).collect();
        others.into_iter().for_each(|number| self.over(number));
    }

    // ---- faults ----

    /// What has to come of the beginning of a fault.
    fn expect_fault(&self, guest: Span, result: Result<(), &FaultError>) {
        let place = self.truth.place(guest);
        let crosses = self.truth.crosses(guest);
        let hole = guest.units().any(|unit| self.truth.holes.contains(&unit));
        let doubtful = guest.units().any(|unit| self.truth.doubtful.contains(&unit));
        match result {
            Ok(()) => {
                assert!(!crosses && !hole, "a fault over {place:?} began");
                let window = self.truth.over(place).next();
                assert!(window.is_none(), "I1: a fault over {place:?} began inside {window:?}");
            }
            Err(FaultError::CrossesSlot { .. }) => assert!(crosses, "{place:?} crosses no slot"),
            Err(FaultError::NotPopulated { .. }) => assert!(hole || doubtful, "{place:?} is populated"),
            Err(FaultError::Retry(retry)) => {
                assert!(!crosses && !hole, "a fault over {place:?} is to be tried again");
                let over: Vec<Key> = self.truth.over(place).map(|window| window.over.key()).collect();
                let named = retry.window().is_some_and(|key| over.contains(&key));
                assert!(named, "I11: a fault over {place:?} lost to {:?}; over it are {over:?}", retry.window());
            }
            Err(error) => panic!("no fault: {error}"),
        }
    }

    fn begin(&mut self, input: &mut Bytes<'_>) {
        let seat = usize::from(input.below(4));
        let guest = Self::guest_span(input, 3);
        let place = self.truth.place(guest);
        let begun = self.seats[seat].begin(guest.guest());
        match (&begun, self.plant) {
            (Ok(_), Plant::RetryElsewhere) if !self.truth.windows.is_empty() => {
                let retry = FaultError::NotPopulated { range: guest.guest() };
                self.expect_fault(guest, Err(&retry));
            }
            (Err(FaultError::Retry(_)), Plant::FaultGoesOn) => self.expect_fault(guest, Ok(())),
            _ => self.expect_fault(guest, begun.as_ref().map(drop)),
        }
        if let Ok(fault) = begun {
            let seat = &mut self.seats[seat];
            (seat.place, seat.lost, seat.flight) = (place, Some(false), Flight::Begun(fault));
        }
    }

    fn resolve(&mut self, input: &mut Bytes<'_>) {
        let seat = usize::from(input.below(4));
        let access = if input.byte() & 3 == 3 { Access::READ } else { Access::RW };
        let odd = input.byte();
        let (fault, guest) = match std::mem::replace(&mut self.seats[seat].flight, Flight::Idle) {
            Flight::Begun(fault) => (fault, self.seats[seat].place.guest.expect("a fault has a guest range")),
            other => {
                self.seats[seat].flight = other;
                return;
            }
        };
        let mut extents: Vec<Extent> = Vec::new();
        for page in guest.pages() {
            let output = OutputAddr::new(self.truth.frame(page));
            let guest = Span::of_pages(page, 1).guest();
            extents.push(Extent { guest, output, access });
        }
        // What a resolver must not return.
        let mut fits = true;
        match odd {
            0xf8 => {
                extents.push(extents[0]);
                fits = false;
            }
            0xf9 if guest.end < GUEST * 2 => {
                extents.push(Extent { guest: Span::of_pages(guest.end / 2, 1).guest(), ..extents[0] });
                fits = false;
            }
            0xfa => {
                extents[0].output = OutputAddr::new(u64::MAX - 5);
                fits = false;
            }
            0xfb => {
                let refused = fault.resolve(|_| Err::<Extent, _>("no memory"));
                assert!(matches!(refused, Err(ResolveError::Resolver("no memory"))));
                return;
            }
            _ => {}
        }
        match fault.resolve(|_| Ok::<_, &str>(extents)) {
            Ok(resolved) => {
                assert!(fits, "an extent that does not fit was taken");
                self.seats[seat].flight = Flight::Found(resolved);
            }
            Err(error) => assert!(!fits, "not resolved: {error}"),
        }
    }

    fn install(&mut self, input: &mut Bytes<'_>) {
        let seat = usize::from(input.below(4));
        let which = usize::from(input.byte()) % self.members.len();
        let resolved = match std::mem::replace(&mut self.seats[seat].flight, Flight::Idle) {
            Flight::Found(resolved) => resolved,
            other => {
                self.seats[seat].flight = other;
                return;
            }
        };
        let (place, lost) = (self.seats[seat].place, self.seats[seat].lost);
        let before = self.tables();
        let taking = &self.members[which];
        let result = resolved.install(|admission| taking.member.install(admission));
        self.gains = true;
        let guest = place.guest.expect("a fault has a guest range");
        let told = guest.pages().all(|page| taking.told.covers(self.truth.place(Span::of_pages(page, 1))));
        let member = taking.standing == Standing::Live && told;
        match result {
            Ok(()) if lost == Some(true) => {
                assert_eq!(self.tables(), before, "I4: a fault over {place:?} was lost, and installed");
            }
            // What is there already needs no check.
            Ok(()) => assert!(member || self.tables() == before, "installed by who is not told of it"),
            Err(Installed::Lost(retry)) => {
                assert_ne!(lost, Some(false), "I11: a fault over {place:?} lost for nothing: {retry}");
                let named = retry.window().is_some_and(|key| over_of(key).overlaps(place));
                assert!(named, "I11: a fault over {place:?} lost to {:?}", retry.window());
            }
            Err(Installed::NotMember) => assert!(!member, "{place:?} refused to a member"),
            Err(Installed::Present) => assert!(matches!(taking.member.kind, Kind::Calls(_))),
        }
    }

    /// A fault from its beginning to its end, on a walker of its own.
    fn fault_in(&mut self, input: &mut Bytes<'_>) {
        let guest = Self::guest_span(input, 8);
        let which = usize::from(input.byte()) % self.members.len();
        let place = self.truth.place(guest);
        let mut walker = self.space.walker();
        let begun = walker.fault(guest.guest());
        self.expect_fault(guest, begun.as_ref().map(drop));
        let Ok(fault) = begun else { return };
        let pages: Vec<(u64, u64)> = guest.pages().map(|page| (page, self.truth.frame(page))).collect();
        let extents = pages.iter().map(|(page, frame)| Extent {
            guest: Span::of_pages(*page, 1).guest(),
            output: OutputAddr::new(*frame),
            access: Access::RW,
        });
        let resolved = fault.resolve(|_| Ok::<_, &str>(extents.collect::<Vec<_>>())).expect("extents that fit");
        let taking = &self.members[which];
        let told = guest.pages().all(|page| taking.told.covers(self.truth.place(Span::of_pages(page, 1))));
        let member = taking.standing == Standing::Live && told;
        let before = self.tables();
        self.gains = true;
        match resolved.install(|admission| taking.member.install(admission)) {
            // What is there already needs no check.
            Ok(()) => assert!(member || self.tables() == before, "installed by who is not told of it"),
            Err(Installed::Lost(retry)) => panic!("I11: a fault over {place:?} lost, and nothing happened: {retry}"),
            Err(Installed::NotMember) => assert!(!member, "{place:?} refused to a member"),
            Err(Installed::Present) => assert!(matches!(taking.member.kind, Kind::Calls(_))),
        }
    }

    fn lease(&mut self, input: &mut Bytes<'_>) {
        let guest = Self::guest_span(input, 3);
        let how = input.byte();
        if self.leases.len() >= 4 {
            return;
        }
        let (place, slot) = (self.truth.place(guest), Arc::new(Mutex::new(None::<Lease>)));
        let mut request = LeaseRequest::new(guest.guest(), "fuzzed");
        let obliging = how & 1 == 1;
        if obliging {
            let slot = Arc::clone(&slot);
            request = request.on_cancel(move || {
                let lease = lock(&slot).take();
                drop(lease);
            });
        }
        let taken = if how & 2 == 0 {
            self.space.lease(request)
        } else {
            let mut walker = self.space.walker();
            let scope = walker.enter();
            scope.lease(request)
        };
        let over = self.truth.over(place).next();
        match taken {
            Ok(lease) => {
                assert!(over.is_none() && !self.truth.crosses(guest), "a lease over {place:?} beside {over:?}");
                *lock(&slot) = Some(lease);
                self.leases.push(Held { lease: slot, place, obliging });
            }
            Err(LeaseError::Retry(retry)) => {
                assert!(over.is_some(), "I11: a lease over {place:?} lost to {:?}", retry.window());
            }
            Err(LeaseError::CrossesSlot { .. }) => assert!(self.truth.crosses(guest)),
            Err(error) => panic!("no lease: {error}"),
        }
    }

    // ---- members ----

    fn join(&mut self, how: u8, told: Told, bits: u32) {
        let there = self.members.iter().filter(|taking| taking.standing != Standing::Gone).count();
        if there >= 5 || self.members.len() >= 16 {
            return;
        }
        let number = self.members.len();
        let member = Member::new(number, self.space, &self.log, self.plant, how);
        member.set_fails(bits);
        let replays = self.truth.windows.iter().any(|window| told.meets(&window.reach));
        let standing = Standing::Live;
        self.members.push(Taking { member: Arc::clone(&member), told, subscription: None, standing });
        match self.space.subscribe_to(told.interest(), Arc::clone(&member)) {
            Ok(subscription) => {
                let refuses = fails::START | fails::START_LATE | fails::START_PINNED;
                let fails = member.fails(fails::JOIN) || (replays && member.fails(refuses));
                assert!(!fails, "joined, and fails");
                self.members[number].subscription = Some(subscription);
            }
            Err(JoinError::Joined { .. }) => {
                assert!(member.fails(fails::JOIN));
                self.events();
                self.members[number].standing = Standing::Gone;
            }
            Err(error) => {
                let right = match &error {
                    JoinError::Replay { .. } => {
                        replays && member.fails(fails::START | fails::START_LATE | fails::START_PINNED)
                    }
                    JoinError::Populate { .. } => member.fails(fails::POPULATE),
                    _ => false,
                };
                assert!(right, "not joined: {error}");
                self.events();
                let standing = self.members[number].standing;
                assert_ne!(standing, Standing::Live, "did not join, and was not released");
            }
        }
    }

    fn leave(&mut self, input: &mut Bytes<'_>) {
        let which = usize::from(input.byte()) % self.members.len();
        let in_scope = input.byte() & 3 == 3;
        let Some(subscription) = self.members[which].subscription.take() else { return };
        let fails = self.members[which].member.fails(fails::RELEASE);
        if in_scope {
            let mut walker = self.space.walker();
            let scope = walker.enter();
            drop(subscription);
            drop(scope);
            self.members[which].standing = Standing::Leaving;
            self.reap();
        } else {
            let left = subscription.leave();
            self.events();
            match left {
                Ok(()) => assert!(!fails, "left, and fails to"),
                Err(LeaveError::Release { .. }) => assert!(fails),
                Err(error) => panic!("did not leave: {error}"),
            }
        }
        let standing = self.members[which].standing;
        assert_eq!(standing, if fails { Standing::Leaving } else { Standing::Gone }, "after it left");
    }

    fn heal(&mut self) {
        self.members.iter().for_each(|taking| taking.member.set_fails(0));
        self.reap();
        assert!(!self.stuck(), "nobody fails, and something is left to be finished");
        assert_eq!(self.space.reap(), 0);
    }

    // ---- slots ----

    fn slots(&mut self, input: &mut Bytes<'_>) {
        let (mut remove, mut add) = (Vec::new(), Vec::new());
        let how = input.byte();
        for _ in 0..how & 3 {
            let which = usize::from(input.byte());
            if which >= 0xf8 && !self.gone_slots.is_empty() {
                remove.push(self.gone_slots[which % self.gone_slots.len()]);
            } else if !self.truth.slots.is_empty() {
                let id = self.truth.slots[which % self.truth.slots.len()].id;
                if !remove.contains(&id) {
                    remove.push(id);
                }
            }
        }
        for _ in 0..how >> 2 & 3 {
            let span = Self::guest_span(input, 8);
            let (page, pages) = (span.start / 2, (span.end - span.start) / 2);
            let host = match input.byte() {
                0xf0.. => None,
                byte => Some(u64::from(byte) % (HOST - pages.min(HOST - 1))),
            };
            add.push((page, pages, host, input.byte() & 7 == 7));
        }
        // Windows that could not be finished would not be known by what they are over.
        if self.any_fails(fails::END | fails::RELEASE) || self.stuck() {
            return;
        }
        let specs: Vec<_> = add.iter().map(|(page, pages, host, ro)| spec(*page, *pages, *host, *ro)).collect();
        let (mut left, mut no_slot, mut overlap) = (self.truth.slots.clone(), false, false);
        for id in &remove {
            no_slot |= !left.iter().any(|slot| slot.id == *id);
        }
        let old: Vec<Slot> = left.iter().filter(|slot| remove.contains(&slot.id)).copied().collect();
        left.retain(|slot| !remove.contains(&slot.id));
        let mut there: Vec<Span> = left.iter().map(|slot| slot.guest).collect();
        for (_, guest, _) in &specs {
            overlap |= there.iter().any(|other| other.overlaps(*guest));
            there.push(*guest);
        }
        let touched: Vec<Span> =
            old.iter().map(|slot| slot.guest).chain(specs.iter().map(|(_, guest, _)| *guest)).collect();
        let adding: Vec<SlotSpec> = specs.iter().map(|(spec, ..)| *spec).collect();
        let result = self.space.replace_slots(&remove, &adding);
        self.events();
        match result {
            Ok(ids) => {
                assert!(!no_slot && !overlap, "slots that cannot be");
                self.gone_slots.extend(&remove);
                for ((id, (_, guest, host)), (.., read_only)) in ids.into_iter().zip(&specs).zip(&add) {
                    left.push(Slot { id, guest: *guest, host: *host, read_only: *read_only });
                }
                self.truth.slots = left;
                for slot in &old {
                    for unit in slot.guest.units() {
                        self.truth.holes.remove(&unit);
                        self.truth.doubtful.remove(&unit);
                    }
                }
                for page in touched.iter().flat_map(|span| span.pages()) {
                    self.truth.forget(page);
                }
                self.lost_in(&touched, true);
            }
            Err(SlotError::NoSlot { .. }) => assert!(no_slot),
            Err(SlotError::Overlap { .. }) => assert!(overlap && !no_slot),
            Err(SlotError::Window(error)) => {
                assert!(!no_slot && !overlap);
                let starts = fails::START | fails::START_LATE | fails::PINNED | fails::START_PINNED;
                let leased = self
                    .leases
                    .iter()
                    .filter_map(|held| held.place.guest.filter(|_| held.is_alive()))
                    .any(|leased| touched.iter().any(|span| span.overlaps(leased)));
                let refused = self.any_fails(starts | fails::POPULATE) || leased;
                assert!(refused, "nobody refuses: {error}");
                self.lost_in(&touched, false);
            }
            Err(error) => panic!("slots not replaced: {error}"),
        }
        self.recorded_some();
        self.finished_windows_are_over();
    }

    fn lost_in(&mut self, touched: &[Span], known: bool) {
        for seat in self.seats.iter_mut().filter(|seat| seat.in_flight()) {
            if seat.place.guest.is_some_and(|place| touched.iter().any(|span| span.overlaps(place))) {
                seat.lost = if known || seat.lost == Some(true) { Some(true) } else { None };
            }
        }
    }

    // ---- the guest, and questions ----

    fn guest(&mut self, input: &mut Bytes<'_>) {
        let which = usize::from(input.byte()) % self.members.len();
        let guest = Self::guest_span(input, 3);
        let how = input.byte();
        self.gains = true;
        let member = Arc::clone(&self.members[which].member);
        if how & 1 == 0 {
            return guest.pages().for_each(|page| member.touch(page, how & 2 != 0));
        }
        // Rights are raised without a lookup.
        let place = self.truth.place(guest);
        let told = guest.pages().all(|page| self.members[which].told.covers(self.truth.place(Span::of_pages(page, 1))));
        let raised = self.space.admit(guest.guest(), |admission| member.raise(admission));
        self.expect_fault(guest, raised.as_ref().map(drop));
        if let Ok(raised) = raised {
            let live = self.members[which].standing == Standing::Live;
            let calls = matches!(member.kind, Kind::Calls(_));
            match raised {
                Ok(()) => assert!(calls || (live && told), "rights raised by who is not told of {place:?}"),
                Err(Refused::NotMember) => assert!(!live || !told),
                Err(refused) => panic!("I11: {place:?} is {refused:?}, and nothing happened meanwhile"),
            }
        }
    }

    fn age(&mut self, input: &mut Bytes<'_>) {
        let over = Self::over_any(input);
        let reach = self.truth.reach(over);
        let young = self.live().filter(|taking| taking.told.meets(&reach)).any(|taking| {
            let entries = taking.member.entries();
            reach
                .iter()
                .filter_map(|place| place.guest)
                .flat_map(Span::pages)
                .any(|page| page < GUEST && entries[page as usize].is_some_and(|entry| entry.young))
        });
        let before = self.progress();
        assert_eq!(self.space.test_age(over.key()).expect("ageing does not fail"), young, "test_age over {over:?}");
        assert_eq!(self.space.age(over.key()).expect("ageing does not fail"), young, "age over {over:?}");
        assert!(!self.space.test_age(over.key()).expect("ageing does not fail"), "aged, and young");
        assert_eq!(self.progress(), before, "ageing is no window");
    }

    /// Whatever would wait for one's own scope is refused, and changes nothing.
    fn in_own_scope(&mut self, input: &mut Bytes<'_>) {
        let over = Self::over_any(input);
        let which = self.pick(input);
        let what = input.byte();
        self.events();
        let (before, began) = (self.tables(), self.progress());
        let mut walker = self.space.walker();
        let scope = walker.enter();
        let refused = match (over, what % 8) {
            (Over::Host(span), 0) => matches!(self.space.zap(span.host()), Err(OpenError::InScope { .. })),
            (Over::Guest(span), 0) => matches!(self.space.zap(span.guest()), Err(OpenError::InScope { .. })),
            (Over::Host(span), 1) => matches!(self.space.retain(span.host()), Err(OpenError::InScope { .. })),
            (Over::Guest(span), 1) => matches!(self.space.retain(span.guest()), Err(OpenError::InScope { .. })),
            (_, 2) => matches!(self.space.wait_for_scopes(false), Err(ScopeWaitError::InScope)),
            (_, 3) => matches!(self.space.replace_slots(&[], &[]), Err(SlotError::InScope)),
            (_, 4) => {
                let range = Span::of_pages(0, GUEST).guest();
                matches!(self.space.populate(range), Err(OpenError::InScope { .. }))
            }
            (_, 5) => match which.and_then(|which| self.guards[which].change(self.space, &[])) {
                Some(result) => matches!(result, Err(Refusal::InScope)),
                None => true,
            },
            (_, 6) => match which {
                Some(which) => {
                    let window = self.window_of(&self.guards[which]);
                    let part = self.truth.windows[window].over.span();
                    match self.guards[which].settle(part, true) {
                        Some(result) => matches!(result, Err(Refusal::InScope)),
                        None => true,
                    }
                }
                None => true,
            },
            _ => {
                let live = self.members.iter().position(|taking| taking.subscription.is_some());
                match live {
                    Some(live) => {
                        let subscription = self.members[live].subscription.take().expect("just found");
                        match subscription.leave() {
                            Err(LeaveError::InScope(back)) => {
                                self.members[live].subscription = Some(back);
                                true
                            }
                            _ => false,
                        }
                    }
                    None => true,
                }
            }
        };
        drop(scope);
        assert!(refused, "{} inside one's own scope was not refused", what % 8);
        if !self.stuck() {
            assert_eq!(self.progress(), began, "I10: refused, and count or sequence moved");
        }
        assert_eq!(self.tables(), before, "I10: refused, and changed something");
    }

    // ---- the end ----

    fn finish(mut self) {
        if let Some(elsewhere) = self.elsewhere.take() {
            elsewhere.leave();
        }
        self.heal();
        self.check();
        for held in &self.leases {
            drop(lock(&held.lease).take());
        }
        let guards: Vec<_> =
            std::mem::take(&mut self.leaked).into_iter().chain(std::mem::take(&mut self.guards)).collect();
        for guard in guards {
            let window = self.window_of(&guard);
            guard.close().expect("nobody fails");
            self.events();
            let window = self.truth.windows.remove(window);
            self.settled_by_closing(&window);
        }
        self.check();
        assert_eq!(self.space.progress().count, 0);
        for which in 0..self.members.len() {
            if let Some(subscription) = self.members[which].subscription.take() {
                subscription.leave().expect("nobody fails");
            }
        }
        self.check();
        assert!(self.members.iter().all(|taking| taking.standing == Standing::Gone), "somebody stays");
        assert!(self.started.is_empty(), "starts without ends: {:?}", self.started);
    }
}

fn spec(page: u64, pages: u64, host: Option<u64>, read_only: bool) -> (SlotSpec, Span, Option<Span>) {
    let guest = Span::of_pages(page, pages);
    let flags = if read_only { SlotFlags::READ_ONLY } else { SlotFlags::empty() };
    let spec = SlotSpec { guest: guest.guest(), host: host.map(host_page), flags };
    (spec, guest, host.map(|page| Span::of_pages(page, pages)))
}

fn over_of(key: Key) -> Over {
    match key {
        Key::Guest(range) => {
            Over::Guest(Span { start: range.start().as_u64() / UNIT, end: range.end().as_u64() / UNIT })
        }
        Key::Host(range) => {
            let unit = |at: Hva| (at.as_u64() - host_page(0).as_u64()) / UNIT;
            Over::Host(Span { start: unit(range.start()), end: unit(range.end()) })
        }
    }
}

/// What a member is told to fail at: mostly nothing.
const FAILURES: [u32; 32] = {
    let mut all = [0; 32];
    all[16] = fails::START;
    all[17] = fails::START_LATE;
    all[18] = fails::END;
    all[19] = fails::ZAP;
    all[20] = fails::CHANGE;
    all[21] = fails::CHANGE_LATE;
    all[22] = fails::RELEASE;
    all[23] = fails::POPULATE;
    all[24] = fails::PINNED;
    all[25] = fails::JOIN;
    all[26] = fails::START_PINNED;
    all[27] = fails::CHANGE | fails::ZAP;
    all[28] = fails::CHANGE_LATE | fails::ZAP;
    all[29] = fails::END | fails::ZAP;
    all[30] = fails::START | fails::END;
    all[31] = fails::ALL;
    all
};
