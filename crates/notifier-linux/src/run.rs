// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A plan carried out: the calls, and what is undone where one of them fails.

use std::{fs::File, io, os::fd::AsFd, sync::Arc};

use notifier_core::Access;
use vm_memory::bitmap::Bitmap;

use crate::{
    batch::{Operation, OperationError, RamError, UndoError},
    budget::Reservation,
    kernel::Call,
    layout::{Piece, Place, Span},
    plan::{Before, Deed, Hole, Plan, Step, plan},
    ram::{Claim, GuestRam, Home, Region},
};

/// Of `/proc/self/pagemap`: a page of a file or of shared memory; swapped out; present
/// (`Documentation/admin-guide/mm/pagemap.rst`).
const PM_FILE: u64 = 1 << 61;
const PM_SWAP: u64 = 1 << 62;
const PM_PRESENT: u64 = 1 << 63;

/// What the kernel said to a call, and to which.
type Made = Result<(), (Call, io::Error)>;

/// Claims the pages, makes the calls, and undoes them where one fails.
pub(crate) fn execute<B: Bitmap>(
    ram: &GuestRam<B>,
    operations: &[Operation<'_>],
    reserved: Option<Reservation>,
) -> Result<(), RamError> {
    let hosts = operations.iter().map(|operation| operation.host(ram));
    let (mut claim, mut plan) = ram.claim(hosts, |state| plan(ram, operations, state));
    let at = operations[0].range.start();
    // What was reserved before the windows were opened was for the layout as it was then.
    let reservation = match reserved.filter(|reserved| plan.has_enough(reserved)) {
        Some(enough) => Ok(enough),
        None => plan.reserve(&ram.budget),
    };
    claim.reservation = Some(reservation.map_err(|source| RamError::Budget { at, source })?);
    if plan.calls() > 1 {
        look_for_copies(ram, &mut plan);
    }
    let mut run = Run { ram, plan: &plan, claim };
    for (index, step) in plan.steps.iter().enumerate() {
        match run.make(step) {
            Ok(()) => run.note(step),
            Err(failed) => return Err(run.fail(operations, index, 0, failed).into()),
        }
    }
    for (index, hole) in plan.holes.iter().enumerate() {
        if let Err(failed) = run.punch(hole.region, hole.span) {
            return Err(run.fail(operations, plan.steps.len(), index, failed).into());
        }
    }
    run.punched(&plan.holes);
    Ok(())
}

/// Asks which private mappings of files have no page of their own.
fn look_for_copies<B: Bitmap>(ram: &GuestRam<B>, plan: &mut Plan) {
    let mut entries = Vec::new();
    for step in &plan.steps {
        if !matches!(step.deed, Deed::MapFile(..) | Deed::MapHome(_) | Deed::MapZero(_) | Deed::Drop) {
            continue;
        }
        let region = &ram.regions[step.region];
        for before in &mut plan.before[step.before.clone()] {
            let private = match before.piece.place {
                Place::File { .. } => true,
                Place::Home => matches!(region.home, Home::Private { .. }),
                Place::Anonymous => false,
            };
            // What cannot be asked is taken to have copies.
            before.clean = private
                && ram.kernel.read_pagemap(region.host_of(before.span), &mut entries).is_ok()
                && entries.iter().all(|entry| entry & (PM_PRESENT | PM_SWAP) == 0 || entry & PM_FILE != 0);
        }
    }
}

/// A plan under way.
struct Run<'r, 'p, B: Bitmap> {
    ram: &'r GuestRam<B>,
    plan: &'p Plan,
    claim: Claim<'r, B>,
}

impl<B: Bitmap> Run<'_, '_, B> {
    fn make(&self, step: &Step) -> Made {
        let region = &self.ram.regions[step.region];
        let host = region.host_of(step.span);
        let kernel = &self.ram.kernel;
        let failed = |call| move |error| (call, error);
        match &step.deed {
            Deed::MapFile(file, offset, access) => {
                // SAFETY: guest RAM: vm-memory accesses it through volatile slices alone, the claim keeps other changes
                // away, and the layout has checked that the range is the region's. (One case cannot be excluded: a call that
                // failed here before left a hole, and another thread's mapping landed in it before it was filled. Then
                // that is replaced. `OperationError` says so to who goes on after such a failure.)
                unsafe { kernel.map_file(host, file.as_fd(), *offset, region.style(*access, false)) }
                    .map_err(failed(Call::MapFile))
            }
            Deed::MapHome(access) => self.map_home(region, step.span, *access),
            Deed::MapZero(access) => self.map_zero(region, step.span, *access),
            // SAFETY: as above.
            Deed::Drop => unsafe { kernel.discard(host) }.map_err(failed(Call::Discard)),
            Deed::Punch => self.punch(step.region, step.span),
            Deed::Protect(access) => self.protect(region, step.span, *access),
        }
    }

    fn map_home(&self, region: &Region, span: Span, access: Access) -> Made {
        let (file, offset, shared) = match &region.home {
            Home::Anonymous => return self.map_zero(region, span, access),
            Home::Shared(file, offset) => (file, offset, true),
            Home::Private { file, offset, .. } => (file, offset, false),
        };
        self.map_file(region, span, file, offset + span.start, access, shared)?;
        self.keep_small(region, span);
        Ok(())
    }

    fn map_zero(&self, region: &Region, span: Span, access: Access) -> Made {
        let style = region.style(access, false);
        // SAFETY: as in `make`.
        unsafe { self.ram.kernel.map_anonymous(region.host_of(span), style) }
            .map_err(|error| (Call::MapAnonymous, error))?;
        self.keep_small(region, span);
        Ok(())
    }

    /// No huge pages in what was mapped just now, where they are not wanted. It is a wish: pages of either size hold what
    /// they hold, and nothing fails for it.
    fn keep_small(&self, region: &Region, span: Span) {
        if self.plan.small {
            let _ = self.ram.kernel.no_huge_page(region.host_of(span));
        }
    }

    fn map_file(
        &self,
        region: &Region,
        span: Span,
        file: &Arc<File>,
        offset: u64,
        access: Access,
        shared: bool,
    ) -> Made {
        let style = region.style(access, shared);
        // SAFETY: as in `make`.
        unsafe { self.ram.kernel.map_file(region.host_of(span), file.as_fd(), offset, style) }
            .map_err(|error| (Call::MapFile, error))
    }

    fn protect(&self, region: &Region, span: Span, access: Access) -> Made {
        // SAFETY: as in `make`. Accesses that are forbidden now are faults, not undefined.
        unsafe { self.ram.kernel.protect(region.host_of(span), access) }.map_err(|error| (Call::Protect, error))
    }

    fn punch(&self, region: usize, span: Span) -> Made {
        match &self.ram.regions[region].home {
            Home::Shared(file, offset) | Home::Private { file, offset, template: false } => {
                let made = self.ram.kernel.punch_hole(file.as_fd(), offset + span.start, span.len());
                made.map_err(|error| (Call::PunchHole, error))
            }
            Home::Anonymous | Home::Private { template: true, .. } => Ok(()),
        }
    }

    /// Writes down what a step did.
    fn note(&mut self, step: &Step) {
        let before = &self.plan.before[step.before.clone()];
        let mut set = |span, place, access| self.claim.changes.push((step.region, span, Piece::new(place, access)));
        match &step.deed {
            // What the home underneath held is known for each piece that was there.
            Deed::MapFile(file, offset, access) => {
                let punched = self.ram.regions[step.region].punched.is_some();
                for before in before {
                    let offset = offset + (before.span.start - step.span.start);
                    let kept = punched && before.piece.home_holds();
                    set(before.span, Place::File { file: Arc::clone(file), offset, kept }, *access);
                }
            }
            Deed::MapHome(access) => set(step.span, Place::Home, *access),
            Deed::MapZero(access) => set(step.span, Place::Anonymous, *access),
            Deed::Protect(access) => {
                before.iter().for_each(|before| set(before.span, before.piece.place.clone(), *access));
            }
            // So that `punched` finds it.
            Deed::Drop => {
                before.iter().for_each(|before| set(before.span, before.piece.place.clone(), before.piece.access))
            }
            Deed::Punch => {}
        }
    }

    /// Writes down that the homes under `holes` hold nothing any more.
    fn punched(&mut self, holes: &[Hole]) {
        for (region, span, piece) in &mut self.claim.changes {
            let inside =
                |hole: &Hole| hole.region == *region && hole.span.start <= span.start && span.end <= hole.span.end;
            if let Place::File { kept, .. } = &mut piece.place {
                *kept = *kept && !holes.iter().any(inside);
            }
        }
    }

    /// A step, or a hole after all steps, failed: undoes what can be undone, and says what is so.
    fn fail(
        mut self,
        operations: &[Operation<'_>],
        steps: usize,
        holes: usize,
        (call, source): (Call, io::Error),
    ) -> Box<OperationError> {
        let plan = self.plan;
        let step = plan.steps.get(steps);
        let (operation, region, span) = match (step, plan.holes.get(holes)) {
            (Some(step), _) => (step.operation, step.region, step.span),
            (None, Some(hole)) => (hole.operation, hole.region, hole.span),
            // `fail` is told of a step or of a hole.
            (None, None) => (0, operations[0].region, operations[0].span),
        };
        let mut error = Box::new(OperationError {
            operation,
            at: self.ram.regions[region].guest_of(span).start(),
            call,
            source,
            undone: Vec::new(),
            standing: Vec::new(),
            lost: Vec::new(),
            filled: Vec::new(),
            holes: Vec::new(),
            undo: None,
        });
        let (made, open) = if step.is_some() { (&plan.holes[..0], true) } else { (&plan.holes[..holes], false) };
        self.punched(made);
        // Whether the operation that failed is as if it had not been begun, but for what is lost.
        let mut whole = step.is_none_or(|step| self.mend(step, &mut error));

        // From the last to the first, as the calls were made.
        let mut end = steps;
        while end != 0 {
            let index = plan.steps[end - 1].operation;
            let begin = plan.steps[..end].iter().rposition(|step| step.operation != index).map_or(0, |last| last + 1);
            let own = &plan.steps[begin..end];
            end = begin;
            if open && index == operation {
                // Half done: what can be is undone, the rest is lost.
                for step in own.iter().rev() {
                    if self.reversible(step, made) {
                        whole &= self.undo(step, &mut error);
                    } else {
                        let region = &self.ram.regions[step.region];
                        let lost = region.guest_of(step.span);
                        if !error.lost.contains(&lost) {
                            error.lost.push(lost);
                        }
                    }
                }
            } else if own.iter().all(|step| self.reversible(step, made))
                && own.iter().rev().all(|step| self.undo(step, &mut error))
            {
                error.undone.push(index);
            } else {
                error.standing.push(index);
            }
        }
        if !whole {
            error.standing.push(operation);
        }
        // What needed no call is as it was asked for.
        for index in (0..operations.len()).filter(|&index| if open { index < operation } else { true }) {
            if !error.undone.contains(&index) && !error.standing.contains(&index) {
                error.standing.push(index);
            }
        }
        error.undone.sort_unstable();
        error.standing.sort_unstable();
        error.lost.sort_unstable_by_key(|range| range.start());
        error
    }

    /// Whether everything that was there before a step, which was made, is still somewhere.
    fn reversible(&self, step: &Step, made: &[Hole]) -> bool {
        let region = &self.ram.regions[step.region];
        let before = &self.plan.before[step.before.clone()];
        match step.deed {
            Deed::Protect(_) => true,
            // Of a home that nobody sees, nothing is lost.
            Deed::Punch => before.iter().all(|before| matches!(before.piece.place, Place::File { .. })),
            Deed::MapFile(..) | Deed::MapHome(_) | Deed::MapZero(_) | Deed::Drop => {
                before.iter().all(|before| recoverable(region, step.region, before, made))
            }
        }
    }

    /// Puts back what was there before a step that is reversible.
    fn undo(&mut self, step: &Step, error: &mut OperationError) -> bool {
        if matches!(step.deed, Deed::Drop | Deed::Punch) {
            // Nothing was there that is not there now.
            return true;
        }
        let rights = match step.deed {
            Deed::Protect(access) => Some(access),
            _ => None,
        };
        let before = &self.plan.before[step.before.clone()];
        // All of them, also after one that failed.
        let failed = before.iter().filter(|before| !self.put_back(step.region, before, rights, error)).count();
        failed == 0
    }

    /// Puts back one piece; where it is a matter of rights alone, the layout has `rights` if they cannot be put back.
    fn put_back(&mut self, index: usize, before: &Before, rights: Option<Access>, error: &mut OperationError) -> bool {
        let region = &self.ram.regions[index];
        let access = before.piece.access;
        let made = match &before.piece.place {
            _ if rights.is_some() => self.protect(region, before.span, access),
            Place::File { file, offset, .. } => self.map_file(region, before.span, file, *offset, access, false),
            Place::Home | Place::Anonymous => self.map_home(region, before.span, access),
        };
        match made {
            Ok(()) => {
                self.claim.changes.push((index, before.span, before.piece.clone()));
                true
            }
            Err((call, source)) => {
                let at = region.guest_of(before.span).start();
                error.undo.get_or_insert(UndoError { at, call, source });
                if let Some(access) = rights {
                    // A part of it may have the one, a part the other.
                    let piece = Piece { access, unsure: true, ..before.piece.clone() };
                    self.claim.changes.push((index, before.span, piece));
                }
                false
            }
        }
    }

    /// Sees to what a step that failed may have done all the same. Whether it is as if it had not been tried, but for what
    /// the error has as lost.
    fn mend(&mut self, step: &Step, error: &mut OperationError) -> bool {
        let plan = self.plan;
        let before = &plan.before[step.before.clone()];
        let access = match step.deed {
            Deed::MapFile(_, _, access) | Deed::MapHome(access) | Deed::MapZero(access) => access,
            Deed::Protect(_) => {
                // `mprotect(2)`: the mappings before the one that it failed at may have been changed.
                let mut whole = true;
                for before in before {
                    whole &= self.put_back(step.region, before, Some(before.piece.access), error);
                }
                return whole;
            }
            // These fail before they do anything.
            Deed::Drop | Deed::Punch => return true,
        };
        let region = &self.ram.regions[step.region];
        if self.ram.kernel.is_mapped(region.host_of(step.span)).unwrap_or(false) {
            return true;
        }
        // The kernel took the old mapping away and then failed. Before anything else of this process lands there:
        // filled, by halves, for a part of it may still be mapped.
        let (mut filled, mut holes) = (Vec::new(), Vec::new());
        let mut left = vec![step.span];
        while let Some(span) = left.pop() {
            match self.ram.kernel.fill_hole(region.host_of(span), region.style(access, false)) {
                Ok(true) => {
                    self.keep_small(region, span);
                    filled.push(span);
                }
                Ok(false) if span.len() > self.ram.page => {
                    let middle = span.start + (span.len() / self.ram.page / 2) * self.ram.page;
                    left.push(Span { start: middle, end: span.end });
                    left.push(Span { start: span.start, end: middle });
                }
                Ok(false) => {}
                Err(_) => holes.push(span),
            }
        }
        let place = if matches!(region.home, Home::Anonymous) { Place::Home } else { Place::Anonymous };
        for &span in &filled {
            self.claim.changes.push((step.region, span, Piece::new(place.clone(), access)));
        }
        for span in holes {
            error.holes.push(region.guest_of(span));
            // What goes home, or is replaced, is mapped there anew.
            for before in before {
                let part = Span { start: span.start.max(before.span.start), end: span.end.min(before.span.end) };
                if part.start < part.end {
                    let piece = before.piece.after(part.start - before.span.start);
                    self.claim.changes.push((step.region, part, Piece { unsure: true, ..piece }));
                }
            }
        }
        for before in before {
            let hit = |span: &&Span| span.start < before.span.end && before.span.start < span.end;
            let zeros: Vec<Span> = filled.iter().filter(hit).copied().collect();
            if zeros.is_empty() {
                continue;
            }
            let recoverable = recoverable(region, step.region, before, &[]);
            if recoverable && self.put_back(step.region, before, None, error) {
                continue;
            }
            for span in zeros {
                let span = Span { start: span.start.max(before.span.start), end: span.end.min(before.span.end) };
                error.filled.push(region.guest_of(span));
                error.lost.push(region.guest_of(span));
            }
        }
        true
    }
}

/// Whether what was there before it was mapped over, or dropped, is still somewhere.
fn recoverable(region: &Region, index: usize, before: &Before, made: &[Hole]) -> bool {
    let hit =
        |hole: &Hole| hole.region == index && hole.span.start < before.span.end && before.span.start < hole.span.end;
    match (&before.piece.place, &region.home) {
        (Place::Home, Home::Shared(..)) => !made.iter().any(hit),
        (Place::Home, Home::Private { .. }) => before.clean && !made.iter().any(hit),
        (Place::File { .. }, _) => before.clean,
        (Place::Home, Home::Anonymous) | (Place::Anonymous, _) => false,
    }
}
