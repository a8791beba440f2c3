// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What there is, kept apart from the crate that is tested. Everything is in *units* of half a page, so that windows may
//! begin and end inside pages.

use std::collections::{BTreeMap, BTreeSet};

use notifier_core::{AddrRange, Gpa, GpaRange, Hva, HvaRange, Interest, Key, Mode, SlotId};

pub(crate) const PAGE: u64 = 0x1000;
pub(crate) const UNIT: u64 = PAGE / 2;
/// Pages of the guest.
pub(crate) const GUEST: u64 = 24;
/// Pages of the host.
pub(crate) const HOST: u64 = 16;
/// Where the host's pages begin.
const HOST_BASE: u64 = 0x7000_0000_0000;

/// Units `start` to `end`, not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Span {
    pub(crate) fn of_pages(page: u64, pages: u64) -> Self {
        Self { start: page * 2, end: (page + pages) * 2 }
    }

    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }

    pub(crate) fn covers(self, other: Self) -> bool {
        self.start <= other.start && other.end <= self.end
    }

    fn common(self, other: Self) -> Option<Self> {
        let both = Self { start: self.start.max(other.start), end: self.end.min(other.end) };
        (both.start < both.end).then_some(both)
    }

    /// The pages that have a unit of it.
    pub(crate) fn pages(self) -> std::ops::Range<u64> {
        self.start / 2..self.end.div_ceil(2)
    }

    pub(crate) fn units(self) -> std::ops::Range<u64> {
        self.start..self.end
    }

    pub(crate) fn guest(self) -> GpaRange {
        AddrRange::new(Gpa::new(self.start * UNIT), Gpa::new(self.end * UNIT)).expect("not empty")
    }

    pub(crate) fn host(self) -> HvaRange {
        let at = |unit| Hva::new(HOST_BASE + unit * UNIT);
        AddrRange::new(at(self.start), at(self.end)).expect("not empty")
    }
}

pub(crate) fn host_page(page: u64) -> Hva {
    Hva::new(HOST_BASE + page * PAGE)
}

pub(crate) fn guest_page(page: u64) -> Gpa {
    Gpa::new(page * PAGE)
}

pub(crate) fn pages_of(range: GpaRange) -> std::ops::Range<u64> {
    range.start().as_u64() / PAGE..range.end().as_u64().div_ceil(PAGE)
}

/// What a window is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Over {
    Host(Span),
    Guest(Span),
}

impl Over {
    pub(crate) fn span(self) -> Span {
        match self {
            Over::Host(span) | Over::Guest(span) => span,
        }
    }

    pub(crate) fn part(self, span: Span) -> Over {
        match self {
            Over::Host(_) => Over::Host(span),
            Over::Guest(_) => Over::Guest(span),
        }
    }

    pub(crate) fn key(self) -> Key {
        match self {
            Over::Host(span) => Key::Host(span.host()),
            Over::Guest(span) => Key::Guest(span.guest()),
        }
    }

    pub(crate) fn overlaps(self, place: Place) -> bool {
        match self {
            Over::Host(span) => place.host.is_some_and(|host| host.overlaps(span)),
            Over::Guest(span) => place.guest.is_some_and(|guest| guest.overlaps(span)),
        }
    }
}

/// Bytes as both sides know them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) guest: Option<Span>,
    pub(crate) host: Option<Span>,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot {
    pub(crate) id: SlotId,
    pub(crate) guest: Span,
    pub(crate) host: Option<Span>,
    pub(crate) read_only: bool,
}

impl Slot {
    fn host_of(&self, guest: Span) -> Option<Span> {
        let start = self.host?.start + (guest.start - self.guest.start);
        Some(Span { start, end: start + (guest.end - guest.start) })
    }
}

/// How a window that is in progress came to be so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hold {
    /// A guard lives, or was leaked.
    Guard,
    /// It was to be closed, and could not be finished.
    Stuck,
    /// It was not opened, and could not be ended either: its promise does not hold.
    Aborted,
}

#[derive(Debug, Clone)]
pub(crate) struct Window {
    pub(crate) number: u64,
    pub(crate) over: Over,
    pub(crate) mode: Mode,
    pub(crate) reach: Vec<Place>,
    /// Units of `over` that have an outcome.
    pub(crate) settled: BTreeSet<u64>,
    pub(crate) hold: Hold,
}

/// What there is.
#[derive(Debug, Default)]
pub(crate) struct Truth {
    pub(crate) slots: Vec<Slot>,
    /// Guest units that are not populated.
    pub(crate) holes: BTreeSet<u64>,
    /// Guest units that may or may not be populated: a failed `populate` could not undo itself.
    pub(crate) doubtful: BTreeSet<u64>,
    pub(crate) windows: Vec<Window>,
    /// What a host page is, and what a guest page is where that is something else, or where there is no host page.
    host: BTreeMap<u64, u64>,
    guest: BTreeMap<u64, u64>,
    /// What a guest page may also be found to be: a repointing of it failed half way.
    pub(crate) also: BTreeMap<u64, u64>,
    frames: u64,
}

impl Truth {
    pub(crate) fn fresh_frame(&mut self) -> u64 {
        self.frames += 1;
        0x1_0000_0000 + self.frames * PAGE
    }

    pub(crate) fn slot_of(&self, page: u64) -> Option<&Slot> {
        let page = Span::of_pages(page, 1);
        self.slots.iter().find(|slot| slot.guest.covers(page))
    }

    pub(crate) fn place(&self, guest: Span) -> Place {
        let slot = self.slots.iter().find(|slot| slot.guest.covers(guest));
        Place { guest: Some(guest), host: slot.and_then(|slot| slot.host_of(guest)) }
    }

    /// Whether a slot has a part of these bytes and not all.
    pub(crate) fn crosses(&self, guest: Span) -> bool {
        self.slots.iter().any(|slot| slot.guest.overlaps(guest) && !slot.guest.covers(guest))
    }

    fn host_page_of(&self, page: u64) -> Option<u64> {
        self.place(Span::of_pages(page, 1)).host.map(|host| host.start / 2)
    }

    /// What a guest page is.
    pub(crate) fn frame(&mut self, page: u64) -> u64 {
        if let Some(&frame) = self.guest.get(&page) {
            return frame;
        }
        let host = self.host_page_of(page);
        if let Some(&frame) = host.and_then(|host| self.host.get(&host)) {
            return frame;
        }
        let frame = self.fresh_frame();
        match host {
            Some(host) => self.host.insert(host, frame),
            None => self.guest.insert(page, frame),
        };
        frame
    }

    /// What the page of a window is.
    pub(crate) fn frame_of(&mut self, over: Over, page: u64) -> u64 {
        match over {
            Over::Guest(_) => self.frame(page),
            Over::Host(_) => match self.host.get(&page) {
                Some(&frame) => frame,
                None => {
                    let frame = self.fresh_frame();
                    self.host.insert(page, frame);
                    frame
                }
            },
        }
    }

    /// The guest pages where a page of a window is seen.
    pub(crate) fn places_of(&self, over: Over, page: u64) -> Vec<u64> {
        match over {
            Over::Guest(_) => vec![page],
            Over::Host(_) => (0..GUEST).filter(|&guest| self.host_page_of(guest) == Some(page)).collect(),
        }
    }

    /// A page of a window is something else from now on.
    pub(crate) fn repoint(&mut self, over: Over, page: u64, frame: u64) {
        match over {
            Over::Guest(_) => {
                self.guest.insert(page, frame);
            }
            Over::Host(_) => {
                self.host.insert(page, frame);
                for guest in self.places_of(over, page) {
                    self.guest.remove(&guest);
                }
            }
        }
    }

    /// What was known of a guest page is over: another slot has it, or none.
    pub(crate) fn forget(&mut self, page: u64) {
        self.guest.remove(&page);
        self.also.remove(&page);
    }

    pub(crate) fn reach(&self, over: Over) -> Vec<Place> {
        match over {
            Over::Guest(span) => {
                let mut all: Vec<Place> = Vec::new();
                let mut outside: Vec<Span> = vec![span];
                for slot in &self.slots {
                    let Some(part) = slot.guest.common(span) else { continue };
                    all.push(Place { guest: Some(part), host: slot.host_of(part) });
                    outside = outside.into_iter().flat_map(|gap| without(gap, part)).collect();
                }
                all.extend(outside.into_iter().map(|gap| Place { guest: Some(gap), host: None }));
                all
            }
            Over::Host(span) => {
                let mut all: Vec<Place> = Vec::new();
                let mut outside: Vec<Span> = vec![span];
                for slot in &self.slots {
                    let (Some(host), Some(part)) = (slot.host, slot.host.and_then(|host| host.common(span))) else {
                        continue;
                    };
                    let start = slot.guest.start + (part.start - host.start);
                    let guest = Span { start, end: start + (part.end - part.start) };
                    all.push(Place { guest: Some(guest), host: Some(part) });
                    outside = outside.into_iter().flat_map(|gap| without(gap, part)).collect();
                }
                all.extend(outside.into_iter().map(|gap| Place { guest: None, host: Some(gap) }));
                all
            }
        }
    }

    /// Windows in progress over a place.
    pub(crate) fn over(&self, place: Place) -> impl Iterator<Item = &Window> {
        self.windows.iter().filter(move |window| window.over.overlaps(place))
    }
}

fn without(gap: Span, part: Span) -> Vec<Span> {
    if !gap.overlaps(part) {
        return vec![gap];
    }
    let sides = [Span { start: gap.start, end: part.start }, Span { start: part.end, end: gap.end }];
    sides.into_iter().filter(|side| side.start < side.end && gap.covers(*side)).collect()
}

/// Which bytes a member is told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    Whole,
    Guest(Span),
    Host(Span),
}

impl Told {
    pub(crate) fn interest(self) -> Interest {
        match self {
            Told::Whole => Interest::Whole,
            Told::Guest(span) => Interest::Guest(span.guest()),
            Told::Host(span) => Interest::Host(span.host()),
        }
    }

    pub(crate) fn meets(self, reach: &[Place]) -> bool {
        match self {
            Told::Whole => true,
            Told::Guest(span) => reach.iter().any(|place| place.guest.is_some_and(|guest| guest.overlaps(span))),
            Told::Host(span) => reach.iter().any(|place| place.host.is_some_and(|host| host.overlaps(span))),
        }
    }

    pub(crate) fn covers(self, place: Place) -> bool {
        match self {
            Told::Whole => true,
            Told::Guest(span) => place.guest.is_some_and(|guest| span.covers(guest)),
            Told::Host(span) => place.host.is_some_and(|host| span.covers(host)),
        }
    }
}
