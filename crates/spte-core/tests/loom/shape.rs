// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Collapse: against windows, and as walkers see it.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use notifier_core::{Access, Gpa, GpaRange, Space, primitive::Twin};
use spte_core::{CollapseError, HeapPages, Level, format::Kind};

use crate::{
    harness::{Gate, Model, OLD, World, page, pages, saw},
    tiny::{PAGE, Tiny},
};

/// Two small leaves that one large one could stand for.
fn world(format: Tiny, dirty: Arc<AtomicBool>) -> Arc<World> {
    let sink = move |range: GpaRange| {
        dirty.fetch_or(range.contains(page(1)), Ordering::Relaxed);
    };
    let space = Space::builder().no_reclaim().dirty_sink(sink).build();
    let world = World::with(space, format, Arc::new(HeapPages::new()), ());
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    world.map_to(&mut walker, pages(1, 1), Access::RW, false, OLD.wrapping_add(PAGE));
    Arc::new(world)
}

/// Collapses the two leaves under a fault over both; notes what came of it.
fn collapse(world: &World, walker: &mut notifier_core::Walker) {
    let Ok(fault) = walker.fault(pages(0, 2)) else { return saw("refused at its snapshot") };
    saw(match fault.admit(|admission| world.table.collapse(admission, pages(0, 2))) {
        Ok(0) => "not alike",
        Ok(_) => "collapsed",
        Err(CollapseError::Retry { .. }) => "refused while it collapsed",
        Err(_) => "failed",
    });
}

/// What `gpa` is mapped to, by a leaf of any size.
fn output(world: &World, gpa: Gpa) -> Option<u64> {
    let found = world.table.entry(gpa).filter(|found| found.kind == Kind::Leaf)?;
    Some(Tiny::output(found.raw).as_u64() + (gpa.as_u64() - found.start.as_u64()))
}

/// A collapse of two pages while a Zapped window over the second opens and stays open.
fn against_window(format: Tiny) {
    let world = world(format, Arc::default());
    let mut walker = world.space.walker();
    let gate = Gate::new();
    let merger = gate.spawn({
        let world = Arc::clone(&world);
        move || collapse(&world, &mut walker)
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || world.space.window(pages(1, 1)).open_zapped_owned().unwrap()
    });
    merger.join().unwrap();
    let guard = window.join().unwrap();
    let (first, second) = (output(&world, page(0)), output(&world, page(1)));
    guard.close().unwrap();
    World::end(world);
    assert!(second.is_none(), "nothing_is_mapped_inside_a_zapped_window");
    assert!(first.is_none_or(|first| first == OLD.as_u64()), "no_different_translation_after_a_collapse");
}

#[test]
fn collapse_against_window() {
    let with = || against_window(Tiny::huge());
    let without = || against_window(Tiny::huge_without_claim_bit());
    for (name, run) in
        [("collapse_against_window", with as fn()), ("collapse_against_window, no claim bit", without as fn())]
    {
        Model { name, run, preemptions: None }
            .holds(&["collapsed", "not alike", "refused at its snapshot", "refused while it collapsed"])
            .refuted_without(Twin::ZapSkipsClaim, "nothing_is_mapped_inside_a_zapped_window");
    }
}

/// A walker writes to the second page during a collapse.
fn against_walker(format: Tiny) {
    let dirty = Arc::new(AtomicBool::new(false));
    let world = world(format, Arc::clone(&dirty));
    let (mut merger, mut walker) = (world.space.walker(), world.space.walker());
    let gate = Gate::new();
    let merger = gate.spawn({
        let world = Arc::clone(&world);
        move || collapse(&world, &mut merger)
    });
    let walk = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let scope = walker.enter();
            let found = world.table.translate(&scope, page(1), Access::WRITE);
            saw(if found.is_ok() { "wrote" } else { "missed" });
            found.ok().map(|found| found.output())
        }
    });
    merger.join().unwrap();
    let written = walk.join().unwrap();
    let large = world.table.entry(page(1)).is_some_and(|found| found.level != Level::LEAF);
    let kept = world.table.entry(page(1)).is_some_and(|found| Tiny::is_written(found.raw));
    World::end(world);
    saw(if large { "one leaf" } else { "two leaves" });
    if let Some(output) = written {
        assert_eq!(output, OLD.wrapping_add(PAGE), "no_different_translation_during_a_collapse");
        assert!(kept || dirty.load(Ordering::Relaxed), "no_dirty_fact_is_lost_in_a_collapse");
    }
}

#[test]
fn collapse_against_walker() {
    let assertion = "no_dirty_fact_is_lost_in_a_collapse";
    Model { name: "collapse_against_walker", run: || against_walker(Tiny::huge()), preemptions: None }
        .holds(&["collapsed", "one leaf", "wrote"])
        .refuted_without(Twin::CollapseForgetsFacts, assertion);
    // A transient fault, never another translation.
    let run = || against_walker(Tiny::huge_without_claim_bit());
    Model { name: "collapse_against_walker, no claim bit", run, preemptions: None }
        .holds(&["collapsed", "missed", "one leaf", "wrote"])
        .refuted_without(Twin::CollapseForgetsFacts, assertion);
}

/// A walker writes to the second page during a collapse, and then a Retained window opens over it: whatever was written
/// has been told by then.
fn against_retained_window() {
    let dirty = Arc::new(AtomicBool::new(false));
    let world = world(Tiny::huge(), Arc::clone(&dirty));
    let (mut merger, mut walker) = (world.space.walker(), world.space.walker());
    let gate = Gate::new();
    let merger = gate.spawn({
        let world = Arc::clone(&world);
        move || collapse(&world, &mut merger)
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let scope = walker.enter();
            let wrote = world.table.translate(&scope, page(1), Access::WRITE).is_ok();
            drop(scope);
            let guard = world.space.window(pages(1, 1)).open_retained_owned().unwrap();
            let told = dirty.load(Ordering::Relaxed);
            saw(if wrote { "wrote" } else { "missed" });
            (guard, !wrote || told)
        }
    });
    merger.join().unwrap();
    let (guard, told) = window.join().unwrap();
    guard.close().unwrap();
    World::end(world);
    assert!(told, "what_was_written_is_told_when_a_retained_window_is_open");
}

#[test]
fn collapse_against_retained_window() {
    Model { name: "collapse_against_retained_window", run: against_retained_window, preemptions: Some(2) }
        .holds(&["collapsed", "not alike", "refused at its snapshot", "refused while it collapsed", "wrote"])
        .refuted_without(Twin::CollapseFreesEarly, "what_was_written_is_told_when_a_retained_window_is_open");
}
