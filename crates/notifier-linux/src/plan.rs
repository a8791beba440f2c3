// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which calls a batch takes, by what is mapped. Neighbours in need of the same call share it.

use std::{fs::File, ops::Range, sync::Arc};

use notifier_core::Access;
use vm_memory::bitmap::Bitmap;

use crate::{
    batch::{Operation, What},
    budget::{BudgetError, PER_CALL, Reservation, VmaBudget, Wanted},
    layout::{Layout, Piece, Place, Span},
    ram::{GuestRam, Home, Region, Source, State},
};

/// What a step does.
#[derive(Debug, Clone)]
pub(crate) enum Deed {
    /// Maps a file, private.
    MapFile(Arc<File>, u64, Access),
    /// Maps what the region is made of.
    MapHome(Access),
    /// Maps private zeros, in a region made of a file.
    MapZero(Access),
    /// Drops private pages.
    Drop,
    /// Punches the home's file.
    Punch,
    Protect(Access),
}

#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) operation: usize,
    pub(crate) region: usize,
    pub(crate) span: Span,
    pub(crate) deed: Deed,
    /// What was there, as indices of `Plan::before`.
    pub(crate) before: Range<usize>,
}

/// What was there before a step.
#[derive(Debug)]
pub(crate) struct Before {
    pub(crate) span: Span,
    pub(crate) piece: Piece,
    /// Of a private mapping of a file: the guest has no copy of its own, so that the file has all that there is.
    pub(crate) clean: bool,
}

/// A hole to be punched when all steps are done.
#[derive(Debug)]
pub(crate) struct Hole {
    /// The first operation that it belongs to.
    pub(crate) operation: usize,
    pub(crate) region: usize,
    pub(crate) span: Span,
}

#[derive(Debug, Default)]
pub(crate) struct Plan {
    pub(crate) steps: Vec<Step>,
    pub(crate) before: Vec<Before>,
    pub(crate) holes: Vec<Hole>,
    /// What goes home has no huge pages.
    pub(crate) small: bool,
    /// Mappings that the process may have more afterwards.
    pub(crate) mappings: Wanted,
    /// Some of them are not those of pages that go home.
    away: bool,
}

impl Plan {
    /// Adds a step for `self.before[before]`, which are neighbours and in need of the same.
    fn push(&mut self, operation: usize, region: usize, before: Range<usize>, deed: Deed, layout: &Layout) {
        let span = Span { start: self.before[before.start].span.start, end: self.before[before.end - 1].span.end };
        if matches!(deed, Deed::MapFile(..) | Deed::MapHome(_) | Deed::MapZero(_) | Deed::Protect(_)) {
            self.mappings.worst += PER_CALL;
            self.mappings.likely += layout.cuts(span);
            self.away |= matches!(deed, Deed::MapFile(..) | Deed::Protect(_));
        }
        self.steps.push(Step { operation, region, span, deed, before });
    }

    fn hole(&mut self, operation: usize, region: usize, span: Span) {
        match self.holes.last_mut() {
            Some(last) if last.region == region && last.span.end == span.start => {
                last.span.end = span.end;
            }
            _ => self.holes.push(Hole { operation, region, span }),
        }
    }

    /// Sets the mappings aside.
    pub(crate) fn reserve(&self, budget: &VmaBudget) -> Result<Reservation, BudgetError> {
        if self.away { budget.reserve_mappings(self.mappings) } else { budget.reserve_for_home(self.mappings) }
    }

    /// Whether what was set aside for an earlier plan is enough for this one.
    pub(crate) fn has_enough(&self, reserved: &Reservation) -> bool {
        reserved.wanted().likely >= self.mappings.likely && (reserved.asked() || !self.away)
    }

    /// Calls that it takes.
    pub(crate) fn calls(&self) -> usize {
        self.steps.len() + self.holes.len()
    }
}

/// What a piece needs, so that neighbours in need of the same can share calls.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Need {
    punch: bool,
    then: Then,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Then {
    Nothing,
    Drop,
    MapHome(Access),
    MapZero(Access),
    MapSource(Access),
    Protect,
}

fn discard_needs(piece: &Piece, home: &Home) -> Need {
    let own = !matches!(home, Home::Anonymous | Home::Private { template: true, .. });
    let then = match (&piece.place, home) {
        (_, Home::Private { template: true, .. }) if piece.unsure => Then::MapZero(piece.access),
        _ if piece.unsure => Then::MapHome(piece.access),
        (Place::Home, Home::Shared(..)) => Then::Nothing,
        (Place::Home | Place::Anonymous, Home::Anonymous) => Then::Drop,
        (Place::Home, Home::Private { template: false, .. }) => Then::Drop,
        (Place::Anonymous, Home::Private { template: true, .. }) => Then::Drop,
        (_, Home::Private { template: true, .. }) => Then::MapZero(piece.access),
        _ => Then::MapHome(piece.access),
    };
    Need { punch: own, then }
}

fn replace_needs(span: Span, piece: &Piece, home: &Home, source: &Source, from: Span) -> Need {
    let wanted = source.offset + (span.start - from.start);
    let same = match (&piece.place, home) {
        (Place::File { file, offset, .. }, _) => Arc::ptr_eq(file, &source.file) && *offset == wanted,
        (Place::Home, Home::Private { file, offset, .. }) => {
            Arc::ptr_eq(file, &source.file) && offset + span.start == wanted
        }
        _ => false,
    };
    Need { punch: false, then: if same && !piece.unsure { Then::Drop } else { Then::MapSource(piece.access) } }
}

/// Which calls the layout asks for.
pub(crate) fn plan<B: Bitmap>(ram: &GuestRam<B>, operations: &[Operation<'_>], state: &State) -> Plan {
    let mut plan = Plan { small: state.no_huge_pages, ..Plan::default() };
    for (index, operation) in operations.iter().enumerate() {
        let region = &ram.regions[operation.region];
        let layout = &state.layouts[operation.region];
        let mut open: Option<(Need, usize)> = None;
        for (span, piece) in layout.within(operation.span) {
            let need = match operation.what {
                What::Discard => Some(discard_needs(&piece, &region.home)),
                What::Replace(source) => Some(replace_needs(span, &piece, &region.home, source, operation.span)),
                What::Protect(access) if *access == piece.access && !piece.unsure => None,
                What::Protect(_) => Some(Need { punch: false, then: Then::Protect }),
            };
            if open.is_some_and(|(open, _)| Some(open) != need) {
                flush(&mut plan, index, operation, region, layout, open.take());
            }
            if let Some(need) = need {
                open = open.or(Some((need, plan.before.len())));
                plan.before.push(Before { span, piece, clean: false });
            }
        }
        flush(&mut plan, index, operation, region, layout, open.take());
    }
    plan
}

/// Adds the steps for the pieces from `open` on.
fn flush(
    plan: &mut Plan,
    index: usize,
    operation: &Operation<'_>,
    region: &Region,
    layout: &Layout,
    open: Option<(Need, usize)>,
) {
    let Some((need, first)) = open else { return };
    let before = first..plan.before.len();
    let start = plan.before[first].span.start;
    if need.punch {
        plan.push(index, operation.region, before.clone(), Deed::Punch, layout);
    }
    let deed = match (need.then, operation.what) {
        (Then::Nothing, _) => None,
        (Then::Drop, _) => Some(Deed::Drop),
        (Then::MapHome(access), _) => Some(Deed::MapHome(access)),
        (Then::MapZero(access), _) => Some(Deed::MapZero(access)),
        (Then::MapSource(access), What::Replace(source)) => {
            let offset = source.offset + (start - operation.span.start);
            Some(Deed::MapFile(Arc::clone(&source.file), offset, access))
        }
        (Then::Protect, What::Protect(access)) => Some(Deed::Protect(*access)),
        (Then::MapSource(_) | Then::Protect, _) => None,
    };
    if let Some(deed) = deed {
        plan.push(index, operation.region, before.clone(), deed, layout);
    }
    if matches!(operation.what, What::Replace(_)) && region.punched.is_some() {
        for part in before {
            let Before { span, piece, .. } = &plan.before[part];
            // Its own file's bytes, where they are: they stay.
            let stays = matches!(piece.place, Place::Home) && need.then == Then::Drop;
            let span = *span;
            if piece.home_holds() && !stays {
                plan.hole(index, operation.region, span);
            }
        }
    }
}
