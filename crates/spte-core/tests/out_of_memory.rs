// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! No page for a table, at every call: nothing is half done, what was done is said, nothing leaks, and trying again works.

mod common;

use common::{BIG, OUT, PAGE, Rig, Tiny, extent, flavours, large, range, small};
use notifier_core::{Access, Change, Gpa, Outcome, OutputAddr};
use spte_core::{MapError, MapOptions, RemoveError, SplitError};

type Page = (u64, u64, Access, bool);

/// Runs `operation` on a table prepared by `prepare`, with the page source failing at call 0, 1, 2 and so on until it
/// succeeds. `operation` says how far it came, if it failed. What lies below that must be as in the end, what lies above
/// as before.
fn at_every_call(format: Tiny, prepare: impl Fn(&Rig), operation: impl Fn(&Rig) -> Result<(), Gpa>, most: u64) {
    let whole = Rig::new(format);
    prepare(&whole);
    let before = whole.translations();
    operation(&whole).unwrap();
    let after = whole.translations();
    whole.verify();
    whole.end();
    let below = |pages: &[Page], at: u64| pages.iter().filter(|page| page.0 < at).copied().collect::<Vec<_>>();
    let above = |pages: &[Page], at: u64| pages.iter().filter(|page| page.0 >= at).copied().collect::<Vec<_>>();
    for call in 0.. {
        assert!(call <= most, "{}: more calls than tables", format.name);
        let rig = Rig::new(format);
        prepare(&rig);
        rig.pages.fail_alloc_in(call);
        let done = operation(&rig);
        rig.pages.stop_failing();
        rig.verify();
        let found = rig.translations();
        if let Err(at) = done {
            let at = at.as_u64();
            assert_eq!(below(&found, at), below(&after, at), "{}: call {call}, done up to {at:#x}", format.name);
            assert_eq!(above(&found, at), above(&before, at), "{}: call {call}, done up to {at:#x}", format.name);
            operation(&rig).unwrap();
            rig.verify();
        }
        assert_eq!(rig.translations(), after, "{}: call {call}, again", format.name);
        rig.end();
        if done.is_ok() {
            assert!(call > 0, "{}: no page was asked for", format.name);
            return;
        }
    }
}

fn stopped<T: std::fmt::Debug>(result: Result<T, MapError>) -> Result<(), Gpa> {
    match result {
        Ok(_) => Ok(()),
        Err(MapError::OutOfPages { at, .. }) => Err(at),
        Err(other) => panic!("{other}"),
    }
}

fn removed<T: std::fmt::Debug>(result: Result<T, RemoveError>) -> Result<(), Gpa> {
    match result {
        Ok(_) => Ok(()),
        Err(RemoveError::OutOfPages { at, .. }) => Err(at),
        Err(other) => panic!("{other}"),
    }
}

fn each(prepare: impl Fn(&Rig) + Copy, operation: impl Fn(&Rig) -> Result<(), Gpa> + Copy) {
    flavours().into_iter().for_each(|format| at_every_call(format, prepare, operation, 40));
}

#[test]
fn i10_mapping_a_page() {
    each(|_| (), |rig| stopped(rig.map(5 * PAGE, PAGE, &small())));
}

#[test]
fn i10_mapping_large_leaves() {
    each(|_| (), |rig| stopped(rig.map(PAGE, 2 * BIG, &large())));
}

#[test]
fn i10_mapping_over_many_tables() {
    each(|_| (), |rig| stopped(rig.map(PAGE, rig.whole().len() - 2 * PAGE, &small())));
}

#[test]
fn i10_mapping_what_is_absent() {
    let options = MapOptions::default().largest(PAGE).only_absent(true);
    each(
        |rig| _ = rig.map(3 * BIG, PAGE, &small()).unwrap(),
        |rig| {
            // Trying again finds what the first try did: this is not for `only_absent`, but for its parts.
            let there = rig.leaves().iter().any(|leaf| leaf.0 == 0);
            if there { Ok(()) } else { stopped(rig.map(0, PAGE, &options)) }
        },
    );
}

#[test]
fn i10_raising_a_part_of_a_large_leaf() {
    each(
        |rig| _ = rig.map(0, 2 * BIG, &large().access(Access::READ)).unwrap(),
        |rig| stopped(rig.map(PAGE, 2 * BIG - 2 * PAGE, &large())),
    );
}

#[test]
fn i10_splitting() {
    each(
        |rig| _ = rig.map(0, rig.whole().len(), &large()).unwrap(),
        |rig| match rig.table.split(rig.whole()) {
            Ok(()) => Ok(()),
            Err(SplitError::OutOfPages { at, .. }) => Err(at),
            Err(other) => panic!("{other}"),
        },
    );
}

#[test]
fn i10_splitting_at_an_address() {
    each(
        |rig| _ = rig.map(0, rig.whole().len(), &large()).unwrap(),
        |rig| match rig.table.split_at(Gpa::new(5 * PAGE)) {
            Ok(()) => Ok(()),
            Err(SplitError::OutOfPages { at, .. }) => Err(at),
            Err(other) => panic!("{other}"),
        },
    );
}

#[test]
fn i10_unmapping_parts_of_large_leaves() {
    each(
        |rig| _ = rig.map(0, 3 * BIG, &large()).unwrap(),
        |rig| removed(rig.table.unmap(range(PAGE, 3 * BIG - 2 * PAGE))),
    );
}

#[test]
fn i10_arming_parts_of_large_leaves() {
    each(
        |rig| _ = rig.map(0, 3 * BIG, &large()).unwrap(),
        |rig| removed(rig.table.arm(range(PAGE, 3 * BIG - 2 * PAGE))),
    );
}

#[test]
fn i10_restricting_parts_of_large_leaves() {
    each(
        |rig| _ = rig.map(0, 3 * BIG, &large()).unwrap(),
        |rig| removed(rig.table.restrict(range(PAGE, 3 * BIG - 2 * PAGE), Access::READ)),
    );
}

#[test]
fn i10_protecting_parts_of_large_leaves() {
    each(
        |rig| _ = rig.map(0, 3 * BIG, &large().access(Access::READ)).unwrap(),
        |rig| {
            let part = range(PAGE, 3 * BIG - 2 * PAGE);
            let mut walker = rig.walker();
            let all = extent(PAGE, OUT + PAGE, part.len(), Access::RWX);
            let resolved = walker.fault(part).unwrap().resolve(|_| Ok::<_, ()>(all)).unwrap();
            stopped(resolved.install(|admission| rig.table.protect(admission, part, Access::RW)))
        },
    );
}

#[test]
fn i10_setting_a_special_entry() {
    each(
        |_| (),
        |rig| {
            stopped(rig.admit(range(BIG, PAGE), |admission| {
                rig.table.set_special(admission, Gpa::new(BIG), common::format::SPECIAL)
            }))
        },
    );
}

/// A window never fails for want of a page: what cannot be split is taken whole.
#[test]
fn windows_take_a_leaf_whole_that_cannot_be_split() {
    for format in flavours() {
        let rig = Rig::new(format);
        rig.map(0, 3 * BIG, &large()).unwrap();
        rig.pages.fail_alloc_in(0);
        rig.space.zap(range(PAGE, PAGE)).unwrap().close().unwrap();
        assert_eq!(rig.leaves().iter().map(|leaf| leaf.0).collect::<Vec<_>>(), [BIG, 2 * BIG], "{}", format.name);
        rig.pages.fail_alloc_in(0);
        let guard = rig.space.retain(range(BIG + PAGE, PAGE)).unwrap();
        assert_eq!(rig.leaves()[0], (BIG, OUT + BIG, BIG, Access::RX, false), "{}", format.name);
        guard.keep(range(BIG + PAGE, PAGE)).unwrap();
        guard.close().unwrap();
        rig.pages.stop_failing();
        rig.verify();
        rig.end();
    }
}

#[test]
fn repointing_a_page_of_a_leaf_that_cannot_be_split_zaps_the_leaf() {
    for format in flavours() {
        let rig = Rig::new(format);
        // Read-only: opening the window has nothing to split.
        rig.map(0, BIG, &large().access(Access::RX)).unwrap();
        let guard = rig.space.retain(range(PAGE, PAGE)).unwrap();
        rig.pages.fail_alloc_in(0);
        let new = OutputAddr::new(0);
        let change = Change { page: Gpa::new(PAGE), expected: OutputAddr::new(OUT + PAGE), new };
        let outcome = guard.change_pte(&[change]).unwrap()[0].outcome;
        assert_eq!(outcome, Outcome::Zapped, "{}", format.name);
        guard.close().unwrap();
        assert_eq!(rig.leaves(), [], "{}", format.name);
        rig.pages.stop_failing();
        rig.verify();
        rig.end();
    }
}
