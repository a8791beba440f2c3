// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Sets: leaves that hardware may hold as one, dissolved and folded beside hardware, windows and each other.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use notifier_core::{Access, GpaRange, Space, primitive::Twin};
use spte_core::{
    Entry, HeapPages, PageSource, TableLayout,
    format::{Format, Kind, Level},
};

use crate::{
    harness::{Gate, Model, OLD, World, page, pages, saw},
    tiny::{DIRTY, PAGE, Tiny},
};

/// Two leaves in a row. `dirty` is set when the sink hears of the first page.
fn world(format: Tiny, dirty: &Arc<AtomicBool>) -> World {
    let dirty = Arc::clone(dirty);
    let sink = move |range: GpaRange| {
        dirty.fetch_or(range.contains(page(0)), Ordering::Relaxed);
    };
    let space = Space::builder().no_reclaim().dirty_sink(sink).build();
    let world = World::with(space, format, Arc::new(HeapPages::new()), ());
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, false);
    world.map_to(&mut walker, pages(1, 1), Access::RW, false, OLD.wrapping_add(PAGE));
    world
}

/// The same, as a set.
fn folded(format: Tiny, dirty: &Arc<AtomicBool>) -> Arc<World> {
    let world = world(format, dirty);
    assert_eq!(world.table.fold(pages(0, 2)).unwrap(), 1);
    Arc::new(world)
}

/// The entry of the second page.
fn second(world: &World) -> &Entry {
    let root = world.table.root();
    let layout = TableLayout { bytes: world.table.format().geometry().table_bytes(Level::LEAF) };
    // SAFETY: the root of this table, from this source, of this layout; it lives as long as the table.
    unsafe { world.table.pages().entries(root, layout).add(1).as_ref() }
}

/// The first page is unmapped while a guest writes to it through the set, and hardware records that in the second entry.
fn against_hardware() {
    let dirty = Arc::new(AtomicBool::new(false));
    let world = folded(Tiny::flat_with_a_set(), &dirty);
    let gate = Gate::new();
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            world.table.unmap(pages(0, 1)).unwrap();
        }
    });
    let hardware = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let entry = second(&world);
            let mut found = entry.load();
            while world.table.format().kind(Level::LEAF, found) == Kind::Leaf && Tiny::is_marked(found) {
                match entry.compare_exchange(found, found | DIRTY) {
                    Ok(_) => return true,
                    Err(other) => found = other,
                }
            }
            false
        }
    });
    remover.join().unwrap();
    let written = hardware.join().unwrap();
    let rest = world.leaf(page(1));
    let told = dirty.load(Ordering::Relaxed);
    World::end(world);
    saw(if written { "written through the set" } else { "no set any more" });
    assert!(rest.is_some_and(|rest| !Tiny::is_marked(rest)), "no_half_of_a_set_is_left");
    assert!(!written || rest.is_some_and(Tiny::is_written), "the_rest_keeps_its_facts");
    assert!(!written || told, "no_write_through_a_set_is_lost");
}

#[test]
fn dissolve_against_hardware() {
    Model { name: "dissolve_against_hardware", run: against_hardware, preemptions: None }
        .holds(&["written through the set", "no set any more"])
        .refuted_without(Twin::DissolveForgetsFacts, "no_write_through_a_set_is_lost");
}

/// Two threads each take a right away from one page of a set.
fn from_both_ends() {
    let world = folded(Tiny::flat_with_a_set(), &Arc::default());
    let gate = Gate::new();
    let threads = [0, 1].map(|index| {
        let world = Arc::clone(&world);
        gate.spawn(move || world.table.restrict(pages(index, 1), Access::READ).unwrap().leaves)
    });
    let restricted = threads.map(|thread| thread.join().unwrap());
    let leaves = [0, 1].map(|index| world.leaf(page(index)).unwrap());
    World::end(world);
    saw("both ended");
    assert_eq!(restricted, [1, 1], "each_restricts_its_own");
    for (index, leaf) in leaves.into_iter().enumerate() {
        assert!(!Tiny::is_marked(leaf) && !Tiny::grants_writing(leaf), "each_leaf_is_read_only_and_in_no_set");
        assert_eq!(Tiny::output(leaf), OLD.wrapping_add(index as u64 * PAGE), "each_leaf_points_where_it_did");
    }
}

#[test]
fn dissolve_from_both_ends() {
    // Without a bound it held in 7 461 497 executions, which take ten minutes.
    Model { name: "dissolve_from_both_ends", run: from_both_ends, preemptions: Some(3) }.holds(&["both ended"]);
}

/// A guest wrote to the first page, and hardware recorded that in the second entry. One thread takes a right away from the
/// second page; another unmaps both, and their table with them.
fn against_unlinking() {
    let dirty = Arc::new(AtomicBool::new(false));
    let world = folded(Tiny::deep_with_sets(), &dirty);
    let mut walker = world.space.walker();
    let scope = walker.enter();
    world.table.translate(&scope, page(1), Access::WRITE).unwrap();
    drop(scope);
    let gate = Gate::new();
    let restricter = gate.spawn({
        let world = Arc::clone(&world);
        move || world.table.restrict(pages(1, 1), Access::READ).unwrap().leaves
    });
    let remover = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            world.table.unmap(pages(0, 2)).unwrap();
        }
    });
    let restricted = restricter.join().unwrap();
    remover.join().unwrap();
    let leaves = [0, 1].map(|index| world.leaf(page(index)));
    let told = dirty.load(Ordering::Relaxed);
    World::end(world);
    saw(if restricted == 1 { "dissolved first" } else { "unlinked first" });
    assert_eq!(leaves, [None; 2], "nothing_is_left");
    assert!(told, "no_write_through_a_set_is_lost");
}

#[test]
fn dissolve_against_unlinking() {
    Model { name: "dissolve_against_unlinking", run: against_unlinking, preemptions: Some(3) }
        .holds(&["dissolved first", "unlinked first"])
        .refuted_without(Twin::SetWithoutGate, "no_write_through_a_set_is_lost");
}

/// Two leaves are folded while a Zapped window over the second opens and stays open.
fn against_window() {
    let world = Arc::new(world(Tiny::flat_with_a_set(), &Arc::default()));
    let gate = Gate::new();
    let folder = gate.spawn({
        let world = Arc::clone(&world);
        move || world.table.fold(pages(0, 2)).unwrap()
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || world.space.window(pages(1, 1)).open_zapped_owned().unwrap()
    });
    let sets = folder.join().unwrap();
    let guard = window.join().unwrap();
    let leaves = [0, 1].map(|index| world.leaf(page(index)));
    guard.close().unwrap();
    World::end(world);
    saw(if sets == 1 { "folded, then dissolved" } else { "nothing to fold" });
    assert!(leaves[1].is_none(), "nothing_is_mapped_inside_a_zapped_window");
    assert!(leaves[0].is_some_and(|leaf| !Tiny::is_marked(leaf)), "no_half_of_a_set_is_left");
}

#[test]
fn fold_against_window() {
    Model { name: "fold_against_window", run: against_window, preemptions: None }
        .holds(&["folded, then dissolved", "nothing to fold"])
        .refuted_without(Twin::ZapSkipsClaim, "nothing_is_mapped_inside_a_zapped_window");
}
