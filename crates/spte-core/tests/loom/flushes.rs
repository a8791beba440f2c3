// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Flushes: that owed ones are inherited, and that they miss no scope.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering};
use notifier_core::{Access, Change, Outcome, Space, primitive::Twin};
use spte_core::{Flush, FlushError, FlushRequest, HeapPages, MapOptions};

use crate::{
    harness::{Gate, Model, NEW, OLD, World, fault_in, page, pages, saw},
    tiny::Tiny,
};

const STALE: u64 = 1;
const EMPTY: u64 = 0;

/// A TLB with one entry. Hardware filled it before the model begins; flushing empties it.
///
/// Relaxed: whoever concludes from something else that the TLB is empty has to have been told so by that.
#[derive(Debug, Clone)]
struct Tlb(Arc<AtomicU64>);

impl Tlb {
    fn filled() -> Self {
        Self(Arc::new(AtomicU64::new(STALE)))
    }

    fn is_empty(&self) -> bool {
        self.0.load(Ordering::Relaxed) == EMPTY
    }
}

impl Flush for Tlb {
    fn flush(&self, _: &FlushRequest<'_>) -> Result<(), FlushError> {
        self.0.store(EMPTY, Ordering::Relaxed);
        Ok(())
    }
}

fn world_with(tlb: &Tlb, access: Access) -> Arc<World<HeapPages, Tlb>> {
    let space = Space::builder().no_reclaim().build();
    let world = World::with(space, Tiny::flat(), Arc::new(HeapPages::new()), tlb.clone());
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), access, false);
    Arc::new(world)
}

/// One thread unmaps a page; another opens a Zapped window over it, and may find nothing left to remove.
fn zapped() {
    let tlb = Tlb::filled();
    let world = world_with(&tlb, Access::RW);
    let gate = Gate::new();
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || world.table.unmap(pages(0, 1)).unwrap().leaves
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let guard = world.space.window(pages(0, 1)).open_zapped_owned().unwrap();
            (guard, tlb.is_empty())
        }
    });
    let unmapped = remover.join().unwrap();
    let (guard, empty) = window.join().unwrap();
    guard.close().unwrap();
    World::end(world);
    saw(if unmapped == 1 { "the window found nothing" } else { "the window removed it" });
    assert!(empty, "no_tlb_translates_inside_a_zapped_window");
}

/// One thread takes writing away; another opens a Retained window, and may find nothing left to take.
fn retained() {
    let tlb = Tlb::filled();
    let world = world_with(&tlb, Access::RW);
    let gate = Gate::new();
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || world.table.restrict(pages(0, 1), Access::READ).unwrap().leaves
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let guard = world.space.window(pages(0, 1)).open_retained_owned().unwrap();
            (guard, tlb.is_empty())
        }
    });
    let restricted = remover.join().unwrap();
    let (guard, empty) = window.join().unwrap();
    guard.close().unwrap();
    World::end(world);
    saw(if restricted == 1 { "the window found nothing" } else { "the window took it" });
    assert!(empty, "no_tlb_writes_inside_a_retained_window");
}

/// One thread unmaps a page; another repoints it inside a Retained window that is open already, and may find it absent.
fn repointed() {
    let tlb = Tlb::filled();
    let world = world_with(&tlb, Access::READ);
    let guard = world.space.window(pages(0, 1)).open_retained_owned().unwrap();
    let gate = Gate::new();
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            world.table.unmap(pages(0, 1)).unwrap();
        }
    });
    let window = gate.spawn(move || {
        let changes = [Change { page: page(0), expected: OLD, new: NEW }];
        let outcome = guard.change_pte(&changes).unwrap()[0].outcome;
        (guard, outcome, tlb.is_empty())
    });
    remover.join().unwrap();
    let (guard, outcome, empty) = window.join().unwrap();
    guard.close().unwrap();
    World::end(world);
    saw(match outcome {
        Outcome::Changed => "changed",
        Outcome::Absent => "absent",
        Outcome::Zapped => "zapped",
    });
    assert!(empty, "no_tlb_translates_to_the_old_page");
}

/// Two threads unmap a page, and one of them finds nothing left to remove.
fn unmapped() {
    let tlb = Tlb::filled();
    let world = world_with(&tlb, Access::RW);
    let gate = Gate::new();
    let [first, second] = [(), ()].map(|()| {
        let (world, tlb) = (Arc::clone(&world), tlb.clone());
        gate.spawn(move || (world.table.unmap(pages(0, 1)).unwrap().leaves, tlb.is_empty()))
    });
    let (first, second) = (first.join().unwrap(), second.join().unwrap());
    World::end(world);
    saw(if first.0 == 1 { "the first removed it" } else { "the second removed it" });
    assert!(first.1 && second.1, "no_tlb_translates_what_unmap_says_is_gone");
}

#[test]
fn owed_flush_inherited() {
    Model { name: "owed_flush_inherited, Zapped", run: zapped, preemptions: None }
        .holds(&["the window found nothing", "the window removed it"])
        .refuted_without(Twin::OwedForgotten, "no_tlb_translates_inside_a_zapped_window");
    Model { name: "owed_flush_inherited, Retained", run: retained, preemptions: None }
        .holds(&["the window found nothing", "the window took it"])
        .refuted_without(Twin::OwedForgotten, "no_tlb_writes_inside_a_retained_window");
    Model { name: "owed_flush_inherited, unmap", run: unmapped, preemptions: None }
        .holds(&["the first removed it", "the second removed it"])
        .refuted_without(Twin::OwedForgotten, "no_tlb_translates_what_unmap_says_is_gone");
    Model { name: "owed_flush_inherited, change_pte", run: repointed, preemptions: None }
        .holds(&["absent", "changed"])
        .refuted_without(Twin::OwedForgotten, "no_tlb_translates_to_the_old_page");
}

/// One thread unmaps a page; another finds it unmapped and maps something else there, perhaps before the flush.
fn refilled() {
    let tlb = Tlb::filled();
    let space = Space::builder().no_reclaim().build();
    let world = World::with(space, Tiny::flat_that_breaks(), Arc::new(HeapPages::new()), tlb.clone());
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    let world = Arc::new(world);
    let gate = Gate::new();
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            world.table.unmap(pages(0, 1)).unwrap();
        }
    });
    let filler = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let options = MapOptions::default().only_absent(true);
            let mapped = fault_in(&world.table, &mut walker, pages(0, 1), Access::RW, &options, || NEW).unwrap();
            // Whatever the TLB holds now it may hold together with the new translation.
            (mapped.is_ok_and(|mapped| mapped.made == 1), tlb.is_empty())
        }
    });
    remover.join().unwrap();
    let (filled, empty) = filler.join().unwrap();
    World::end(world);
    saw(if filled { "filled" } else { "found it mapped" });
    assert!(!filled || empty, "no_tlb_holds_the_old_translation_beside_the_new_one");
}

#[test]
fn refill_after_flush() {
    Model { name: "refill_after_flush", run: refilled, preemptions: None }
        .holds(&["filled", "found it mapped"])
        .refuted_without(Twin::RefillUnflushed, "no_tlb_holds_the_old_translation_beside_the_new_one");
}

/// What the guest wrote, and what the page's next owner does.
const GUEST: u64 = 1;
const OTHER: u64 = 2;

/// A walker translates in a scope, and reads the old page if that is where it is sent. Whether all it read was the
/// guest's.
fn walk(world: &World, walker: &mut notifier_core::Walker, memory: &AtomicU64) -> bool {
    let scope = walker.enter();
    match world.table.translate(&scope, page(0), Access::READ) {
        Ok(found) if found.output() == OLD => {
            saw("walked to the old page");
            memory.load(Ordering::Relaxed) == GUEST
        }
        Ok(_) => {
            saw("walked to the new page");
            true
        }
        Err(_) => {
            saw("missed");
            true
        }
    }
}

/// A walker beside a Zapped window, after which the page has another owner.
fn released() {
    let world = Arc::new(World::new(Tiny::flat()));
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    let memory = Arc::new(AtomicU64::new(GUEST));
    let gate = Gate::new();
    let walk = gate.spawn({
        let (world, memory) = (Arc::clone(&world), Arc::clone(&memory));
        move || walk(&world, &mut walker, &memory)
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let guard = world.space.window(pages(0, 1)).open_zapped_owned().unwrap();
            memory.store(OTHER, Ordering::Relaxed);
            guard
        }
    });
    let own = walk.join().unwrap();
    window.join().unwrap().close().unwrap();
    World::end(world);
    assert!(own, "no_scope_reads_a_released_page");
}

/// A walker beside a repointing, after which the old page has another owner.
fn merged() {
    let world = Arc::new(World::new(Tiny::flat()));
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::READ, false);
    let guard = world.space.window(pages(0, 1)).open_retained_owned().unwrap();
    let memory = Arc::new(AtomicU64::new(GUEST));
    let gate = Gate::new();
    let walk = gate.spawn({
        let (world, memory) = (Arc::clone(&world), Arc::clone(&memory));
        move || walk(&world, &mut walker, &memory)
    });
    let window = gate.spawn(move || {
        let _ = guard.change_pte(&[Change { page: page(0), expected: OLD, new: NEW }]).unwrap();
        memory.store(OTHER, Ordering::Relaxed);
        guard
    });
    let own = walk.join().unwrap();
    window.join().unwrap().close().unwrap();
    World::end(world);
    assert!(own, "no_scope_reads_a_released_page");
}

#[test]
fn scope_entry_against_flush() {
    Model { name: "scope_entry_against_flush, Zapped", run: released, preemptions: None }
        .holds(&["missed", "walked to the old page"])
        .refuted_without(Twin::ScopeFence, "no_scope_reads_a_released_page")
        .refuted_without(Twin::FlushSkipsScopes, "no_scope_reads_a_released_page");
    Model { name: "scope_entry_against_flush, change_pte", run: merged, preemptions: None }
        .holds(&["walked to the new page", "walked to the old page"])
        .refuted_without(Twin::ScopeFence, "no_scope_reads_a_released_page")
        .refuted_without(Twin::FlushSkipsScopes, "no_scope_reads_a_released_page");
}
