// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Faults and upgrades against windows.

use std::sync::Arc;

use loom::sync::atomic::{AtomicU64, Ordering};
use notifier_core::{Access, Change, Outcome, OutputAddr, primitive::Twin};
use spte_core::Upgrade;

use crate::{
    harness::{Gate, Model, NEW, OLD, World, page, pages, race_in, saw},
    tiny::Tiny,
};

/// What can become of a fault beside a window.
const FAULT: [&str; 3] = ["installed", "refused at its installation", "refused at its snapshot"];

/// A fault maps a page while a Zapped window over it opens and stays open.
fn zapped(world: World) {
    let world = Arc::new(world);
    let mut walker = world.space.walker();
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            race_in(&world.table, &mut walker, pages(0, 1), || OLD);
        }
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || world.space.window(pages(0, 1)).open_zapped_owned().unwrap()
    });
    fault.join().unwrap();
    let guard = window.join().unwrap();
    // The window is open still: whatever was published after it opened is here.
    let empty = world.leaf(page(0)).is_none();
    guard.close().unwrap();
    World::end(world);
    assert!(empty, "nothing_is_mapped_inside_a_zapped_window");
}

#[test]
fn fault_against_zapped_window() {
    let assertion = "nothing_is_mapped_inside_a_zapped_window";
    let run = || zapped(World::new(Tiny::flat()));
    Model { name: "fault_against_zapped_window", run, preemptions: None }
        .holds(&FAULT)
        .refuted_without(Twin::PublishFence, assertion)
        .refuted_without(Twin::RecordFence, assertion)
        .refuted_without(Twin::PoisonFence, assertion)
        .refuted_without(Twin::ClaimFence, assertion)
        .refuted_without(Twin::Poison, assertion)
        .refuted_without(Twin::ZapSkipsClaim, assertion);
}

/// A fault maps a page while a Zapped window over it opens, moves what lies behind it, and closes.
///
/// The backing is read and written without any order of its own: what the resolver sees is up to the fault and the window.
fn moved() {
    let world = Arc::new(World::new(Tiny::flat()));
    let mut walker = world.space.walker();
    let backing = Arc::new(AtomicU64::new(OLD.as_u64()));
    let gate = Gate::new();
    let fault = gate.spawn({
        let (world, backing) = (Arc::clone(&world), Arc::clone(&backing));
        move || {
            let look = || OutputAddr::new(backing.load(Ordering::Relaxed));
            race_in(&world.table, &mut walker, pages(0, 1), look);
        }
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let guard = world.space.window(pages(0, 1)).open_zapped().unwrap();
            backing.store(NEW.as_u64(), Ordering::Relaxed);
            guard.close().unwrap();
        }
    });
    fault.join().unwrap();
    window.join().unwrap();
    let current = world.leaf(page(0)).is_none_or(|leaf| Tiny::output(leaf) == NEW);
    World::end(world);
    assert!(current, "nothing_maps_what_a_closed_window_moved");
}

#[test]
fn fault_against_window_that_closes() {
    let assertion = "nothing_maps_what_a_closed_window_moved";
    Model { name: "fault_against_window_that_closes", run: moved, preemptions: None }
        .holds(&FAULT)
        .refuted_without(Twin::PublishFence, assertion)
        .refuted_without(Twin::RecordFence, assertion)
        .refuted_without(Twin::PoisonFence, assertion)
        .refuted_without(Twin::ClaimFence, assertion)
        .refuted_without(Twin::Poison, assertion)
        .refuted_without(Twin::ZapSkipsClaim, assertion);
}

/// A fault raises the rights of a read-only page while a Retained window over it opens and stays open.
fn retained(world: World) {
    let world = Arc::new(world);
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::READ, false);
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            race_in(&world.table, &mut walker, pages(0, 1), || OLD);
        }
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || world.space.window(pages(0, 1)).open_retained_owned().unwrap()
    });
    fault.join().unwrap();
    let guard = window.join().unwrap();
    let leaf = world.leaf(page(0));
    guard.close().unwrap();
    World::end(world);
    let writable = leaf.is_some_and(|leaf| Tiny::grants_writing(leaf) || Tiny::can_be_upgraded(leaf));
    assert!(!writable, "nothing_is_writable_inside_a_retained_window");
    assert!(leaf.is_some(), "a_retained_window_keeps_what_was_mapped");
}

#[test]
fn fault_against_retained_window() {
    let assertion = "nothing_is_writable_inside_a_retained_window";
    let with = || retained(World::new(Tiny::flat()));
    let without = || retained(World::new(Tiny::flat_without_claim_bit()));
    for (name, run) in [
        ("fault_against_retained_window", with as fn()),
        ("fault_against_retained_window, no claim bit", without as fn()),
    ] {
        Model { name, run, preemptions: None }
            .holds(&FAULT)
            .refuted_without(Twin::PublishFence, assertion)
            .refuted_without(Twin::RecordFence, assertion)
            .refuted_without(Twin::PoisonFence, assertion)
            .refuted_without(Twin::ClaimFence, assertion)
            .refuted_without(Twin::Poison, assertion)
            .refuted_without(Twin::ZapSkipsClaim, assertion);
    }
}

/// An armed page is upgraded, without claim or fault, while a Retained window over it opens and stays open.
fn upgraded() {
    let world = Arc::new(World::new(Tiny::flat()));
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::RW, true);
    let gate = Gate::new();
    let upgrade = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            saw(match world.table.upgrade(page(0)) {
                Upgrade::Granted => "granted",
                Upgrade::Already => "already",
                Upgrade::No => "too late",
            });
        }
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || world.space.window(pages(0, 1)).open_retained_owned().unwrap()
    });
    upgrade.join().unwrap();
    let guard = window.join().unwrap();
    let leaf = world.leaf(page(0));
    guard.close().unwrap();
    World::end(world);
    let granted = leaf.is_some_and(Tiny::grants_writing);
    assert!(!granted, "no_upgrade_inside_a_retained_window");
    assert!(leaf.is_some(), "a_retained_window_keeps_what_was_mapped");
}

#[test]
fn upgrade_inside_a_retained_window() {
    Model { name: "upgrade_inside_a_retained_window", run: upgraded, preemptions: None }
        .holds(&["granted", "too late"])
        .refuted_without(Twin::RetainKeepsUpgrade, "no_upgrade_inside_a_retained_window");
}

/// A page is repointed inside a Retained window while a fault that the window has overtaken claims its leaf, asks, and
/// gives it back.
fn changed(world: World) {
    let world = Arc::new(world);
    let mut walker = world.space.walker();
    world.map(&mut walker, pages(0, 1), Access::READ, false);
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            race_in(&world.table, &mut walker, pages(0, 1), || OLD);
        }
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            let guard = world.space.window(pages(0, 1)).open_retained_owned().unwrap();
            let changes = [Change { page: page(0), expected: OLD, new: NEW }];
            let outcome = guard.change_pte(&changes).unwrap()[0].outcome;
            (guard, outcome)
        }
    });
    fault.join().unwrap();
    let (guard, outcome) = window.join().unwrap();
    let leaf = world.leaf(page(0));
    guard.close().unwrap();
    World::end(world);
    let old = leaf.is_some_and(|leaf| Tiny::output(leaf) == OLD);
    assert!(!old, "nothing_translates_to_the_old_page");
    assert_eq!(outcome, Outcome::Changed, "a_read_only_leaf_is_repointed");
    let new = leaf.is_some_and(|leaf| Tiny::output(leaf) == NEW && !Tiny::grants_writing(leaf));
    assert!(new, "the_new_page_is_there_and_read_only");
}

#[test]
fn change_pte_against_a_claim() {
    let with = || changed(World::new(Tiny::flat()));
    let without = || changed(World::new(Tiny::flat_without_claim_bit()));
    for (name, run) in
        [("change_pte_against_a_claim", with as fn()), ("change_pte_against_a_claim, no claim bit", without as fn())]
    {
        Model { name, run, preemptions: None }
            .holds(&FAULT)
            .refuted_without(Twin::ChangeSkipsClaim, "nothing_translates_to_the_old_page");
    }
}

/// A fault over two pages publishes a whole private table for them while a window over the second opens and stays open.
fn whole_table() {
    let world = Arc::new(World::new(Tiny::deep()));
    let mut walker = world.space.walker();
    let gate = Gate::new();
    let fault = gate.spawn({
        let world = Arc::clone(&world);
        move || {
            race_in(&world.table, &mut walker, pages(0, 2), || OLD);
        }
    });
    let window = gate.spawn({
        let world = Arc::clone(&world);
        move || world.space.window(pages(1, 1)).open_zapped_owned().unwrap()
    });
    fault.join().unwrap();
    let guard = window.join().unwrap();
    let (first, second) = (world.leaf(page(0)), world.leaf(page(1)));
    guard.close().unwrap();
    World::end(world);
    assert!(second.is_none(), "no_later_page_of_a_table_is_mapped_inside_a_window");
    // Either the table was published before the window opened, and lost the page to it, or not at all.
    assert!(first.is_none_or(|leaf| Tiny::output(leaf) == OLD), "what_is_outside_the_window_is_as_it_was_resolved");
}

#[test]
fn missing_leaf_table_against_window() {
    let assertion = "no_later_page_of_a_table_is_mapped_inside_a_window";
    Model { name: "missing_leaf_table_against_window", run: whole_table, preemptions: None }
        .holds(&FAULT)
        .refuted_without(Twin::CheckFirstPageOnly, assertion)
        .refuted_without(Twin::ClaimFence, assertion)
        .refuted_without(Twin::ZapSkipsClaim, assertion);
}
