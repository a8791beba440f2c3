// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! arm64 stage 2, walked by QEMU.

use std::sync::Arc;

use conformance::change::{How, PAGES, UNMERGED, seen};
use conformance::entries::check;
use conformance::facts::{Lose, race};
use conformance::machine::{Class, Exit, GuestAccess, Machine};
use conformance::machines::arm64::{Arm64, Variant, variants};
use conformance::mmu::{Mmu, Without};
use conformance::plants::{Plant, is_caught, sequences_miss_flushes};
use conformance::sequence::Sequences;
use conformance::testing;
use conformance::vmm::Vmm;
use notifier_core::Access;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spte_core::format::Format;
use spte_model::TouchKind;

/// Runs a test on each variant that there are programs for.
fn each(test: impl Fn(Variant, Mmu<Arm64>)) {
    let _alone = testing::alone();
    for variant in variants() {
        if let Some(machine) = testing::started(variant.name, Arm64::start(&testing::tools(), variant)) {
            test(variant, Mmu::new(machine));
        }
    }
}

fn seed(number: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(number)
}

#[test]
fn random_sequences_do_as_the_model() {
    each(|variant, mmu| {
        let (sequences, mut rng) = (Sequences::new(mmu.clone()), seed(11));
        for case in 0..8 {
            if let Err(divergence) = sequences.case(&mut rng) {
                panic!("{}, case {case}:\n{divergence}", variant.name);
            }
        }
        let faults = mmu.counts().faults.load(std::sync::atomic::Ordering::Relaxed);
        assert!(faults > 100, "{}: {faults} faults were compared", variant.name);
    });
}

#[test]
fn a_sequence_that_diverges_is_cut_to_what_shows_it() {
    each(|variant, mmu| {
        let (sequences, mut rng) = (Sequences::new(mmu.clone()), seed(3));
        mmu.leave_out(Without::Flushes);
        let found = (0..50).find_map(|_| sequences.case(&mut rng).err());
        mmu.leave_out(Without::Nothing);
        let divergence = found.unwrap_or_else(|| panic!("{}: nothing is missed without flushes", variant.name));
        // A page is mapped, used, changed, and used again.
        let ops = &divergence.ops;
        assert!((3..=6).contains(&ops.len()), "{}:\n{divergence}", variant.name);
        assert_eq!(sequences.replay(ops), None, "{}: with flushes nothing is wrong\n{divergence}", variant.name);
    });
}

#[test]
fn leaves_of_every_size_lead_where_they_say() {
    each(|variant, mmu| {
        let mut vmm = Vmm::new(mmu.clone(), |page| page).unwrap();
        let format = vmm.table.format().clone();
        let data = vmm.ground.data.start;
        let sizes = mmu.machine().driven().shape.leaf_sizes().to_vec();
        // Any size is left of the fixed pages, which are above 5/8 of all addresses.
        for (number, size) in sizes.iter().enumerate() {
            let (at, output) = (number as u64 * sizes[sizes.len() - 1], data & !(size - 1));
            assert!(at + size <= vmm.ground.fixed[0].gpa & !(size - 1), "{} {size:#x}", variant.name);
            vmm.map(at, output, *size, Access::RWX).unwrap();
            assert_eq!(vmm.table.entry(notifier_core::Gpa::new(at)).unwrap().span, *size, "{}", variant.name);
            let place = at + (data - output);
            for offset in [0x10, 0x1ff8, format.geometry().span(spte_core::Level::LEAF) - 8].map(|offset| offset % size)
            {
                let loaded = vmm.access(place + offset, TouchKind::Read, 0).unwrap();
                assert_eq!(loaded, Exit::Done { value: data + offset }, "{} {size:#x}", variant.name);
            }
            // The code of the second 4 KiB says so, where the leaf has so many.
            let fetched = vmm.access(place + (0x1000 % size), TouchKind::Execute, 0).unwrap();
            assert_eq!(fetched, Exit::Done { value: (0x1000 % size) >> 12 }, "{} {size:#x}", variant.name);
        }
    });
}

#[test]
fn a_fault_has_its_class_address_level_and_kind() {
    each(|variant, mmu| {
        let mut vmm = Vmm::new(mmu.clone(), |page| page).unwrap();
        let (granule, data) = (vmm.granule, vmm.ground.data.start);
        let first = vmm.ground.fixed[1].gpa + granule;
        vmm.map(first, data, granule, Access::READ).unwrap();
        vmm.map(first + granule, data, granule, Access::EXECUTE).unwrap();
        let level = Some(spte_core::Level::LEAF);
        let rows = [
            (first, TouchKind::Write, Class::Denied),
            (first, TouchKind::Execute, Class::Denied),
            (first + granule, TouchKind::Read, Class::Denied),
            (first + 2 * granule, TouchKind::Read, Class::Absent),
            (first + 2 * granule, TouchKind::Write, Class::Absent),
            (first + 2 * granule, TouchKind::Execute, Class::Absent),
        ];
        for (page, kind, class) in rows {
            let at = if kind == TouchKind::Execute { page } else { page + 0x128 };
            let exit = mmu.machine().access(GuestAccess { at, kind, value: 1 }).unwrap();
            let Exit::Fault(fault) = exit else { panic!("{} {kind:?} of {at:#x}: {exit:x?}", variant.name) };
            let found = (fault.class, fault.at, fault.level, fault.kind);
            assert_eq!(found, (class, Some(at), level, Some(kind)), "{}", variant.name);
        }
        // Nothing at all on the way there: the fault is the root's.
        let top = vmm.table.format().geometry().top();
        let exit = vmm.access(0x40, TouchKind::Read, 0).unwrap();
        let Exit::Fault(fault) = exit else { panic!("{}: {exit:x?}", variant.name) };
        assert_eq!((fault.class, fault.at, fault.level), (Class::Absent, Some(0x40), Some(top)), "{}", variant.name);
    });
}

#[test]
fn what_is_done_after_rights_were_raised_reaches_what_is_cached() {
    each(|variant, mmu| {
        let mut vmm = Vmm::new(mmu.clone(), |page| page).unwrap();
        let at = vmm.ground.fixed[1].gpa + vmm.granule;
        vmm.map(at, vmm.ground.data.start, vmm.granule, Access::RWX).unwrap();
        assert!(matches!(vmm.access(at + 0x40, TouchKind::Read, 0).unwrap(), Exit::Done { .. }));
        mmu.leave_out(Without::Flushes);
        vmm.table.unmap(Vmm::<Arm64>::range(at, vmm.granule).unwrap()).unwrap();
        mmu.leave_out(Without::Nothing);
        assert!(matches!(vmm.access(at + 0x40, TouchKind::Read, 0).unwrap(), Exit::Done { .. }), "{}", variant.name);
        mmu.machine().refresh(at, spte_core::Level::LEAF).unwrap().unwrap();
        let exit = vmm.access(at + 0x40, TouchKind::Read, 0).unwrap();
        assert!(matches!(exit, Exit::Fault(ref fault) if fault.class == Class::Absent), "{}: {exit:x?}", variant.name);
    });
}

#[test]
fn single_entries_do_as_the_checker_says() {
    each(|variant, mmu| {
        let entries = check(&mmu, 4, &mut seed(5)).unwrap_or_else(|error| panic!("{}: {error}", variant.name));
        assert!(entries.refused > 50 && entries.accesses > 2 * entries.refused, "{}: {entries:?}", variant.name);
    });
}

#[test]
fn every_leniency_that_is_said_shows() {
    let seen = std::cell::RefCell::new(std::collections::BTreeSet::new());
    let said = std::cell::RefCell::new(std::collections::BTreeSet::new());
    each(|variant, mmu| {
        let entries = check(&mmu, 24, &mut seed(6)).unwrap_or_else(|error| panic!("{}: {error}", variant.name));
        seen.borrow_mut().extend(entries.lenient.into_keys());
        said.borrow_mut().extend(mmu.machine().leniencies().iter().map(|leniency| leniency.why));
    });
    // Another version of the emulator may have mended one.
    if testing::required() {
        assert_eq!(seen, said);
    }
}

#[test]
fn no_fact_is_lost_while_a_guest_writes() {
    each(|variant, mmu| {
        let facts =
            race(&mmu, 60, Lose::Nothing, &mut seed(7)).unwrap_or_else(|error| panic!("{}: {error}", variant.name));
        assert!(facts.is_clean(), "{}: {facts:?}", variant.name);
        for lose in Lose::ALL {
            let facts = race(&mmu, 60, lose, &mut seed(7)).unwrap_or_else(|error| panic!("{}: {error}", variant.name));
            assert!(lose.shows(&facts), "{} {lose:?}: {facts:?}", variant.name);
        }
        assert!(
            facts.moved > 0 && facts.used > 0 && facts.repointed > 0 && facts.zapped > 0,
            "{}: {facts:?}",
            variant.name
        );
    });
}

#[test]
fn planted_faults_are_noticed() {
    each(|variant, mmu| {
        for plant in Plant::ALL {
            let caught = is_caught(&mmu, plant).unwrap_or_else(|error| panic!("{} {plant:?}: {error}", variant.name));
            // Two levels have no link to a table below a link's.
            assert_ne!(caught, Some(false), "{} {plant:?}", variant.name);
            assert!(caught.is_some() || plant == Plant::Link, "{} {plant:?}", variant.name);
        }
        assert!(sequences_miss_flushes(&mmu, 100, &mut seed(9)).is_some_and(|noticed| noticed.is_some()));
    });
}

#[test]
fn a_guest_sees_nothing_of_pages_that_are_repointed_and_a_fault_a_page_of_those_zapped() {
    each(|variant, mmu| {
        let change = seen(&mmu, How::Change).unwrap_or_else(|error| panic!("{}: {error}", variant.name));
        assert_eq!((change.mismatches, change.read_faults, change.other_faults), (0, 0, 0), "{}", variant.name);
        assert_eq!((change.write_faults, change.stores), (UNMERGED, UNMERGED), "{}", variant.name);
        // Invalidations are broadcast, and equal contents need no break.
        assert_eq!((change.kicks, change.breaks), (0, 0), "{}", variant.name);
        assert!(change.passes > 2 && change.flushes >= PAGES, "{}: {change:?}", variant.name);
        let zap = seen(&mmu, How::Zap).unwrap_or_else(|error| panic!("{}: {error}", variant.name));
        assert_eq!((zap.mismatches, zap.read_faults, zap.other_faults), (0, PAGES, 0), "{}", variant.name);
    });
}

#[test]
fn a_page_of_a_block_is_broken_before_it_is_repointed() {
    each(|variant, mmu| {
        let mut vmm = Vmm::new(mmu.clone(), |page| page).unwrap();
        let sizes = mmu.machine().driven().shape.leaf_sizes().to_vec();
        let [granule, block] = [sizes[0], sizes[1]];
        let first = vmm.ground.fixed[0].gpa & !(block - 1);
        let at = if first >= block { first - block } else { first + block };
        let data = vmm.ground.data.start & !(block - 1);
        let offset = vmm.ground.data.start - data;
        vmm.map(at, data, block, Access::RWX).unwrap();
        assert_eq!(vmm.breaks(), 0);
        let (page, copy) = (at + offset, data + offset + 7 * granule);
        assert!(vmm.change(page, data + offset, copy, || {}).unwrap(), "{}", variant.name);
        // The split shows at its flush: at this level of FEAT_BBM a block may not become a table at once.
        assert!(vmm.breaks() > 0, "{}", variant.name);
        let loaded = vmm.access(page + 0x40, TouchKind::Read, 0).unwrap();
        assert_eq!(loaded, Exit::Done { value: copy + 0x40 }, "{}", variant.name);
        let beside = vmm.access(page + granule + 0x40, TouchKind::Read, 0).unwrap();
        assert_eq!(beside, Exit::Done { value: data + offset + granule + 0x40 }, "{}", variant.name);
    });
}

#[test]
fn pages_that_are_free_lead_nowhere() {
    each(|variant, mmu| {
        let root = {
            let vmm = Vmm::new(mmu.clone(), |page| page).unwrap();
            vmm.table.root()
        };
        // The root was given back: whoever walks it still comes to nothing.
        mmu.machine().begin(root).unwrap();
        let exit = mmu.machine().access(GuestAccess { at: 0x40, kind: TouchKind::Read, value: 0 }).unwrap();
        // A link to where there is no memory is an external abort.
        assert!(matches!(exit, Exit::Fault(_)), "{}: {exit:x?}", variant.name);
    });
}

#[test]
fn an_emulator_ends_with_its_machine() {
    let _alone = testing::alone();
    let variant = variants()[0];
    let Some(machine) = testing::started(variant.name, Arm64::start(&testing::tools(), variant)) else {
        return;
    };
    let memory = Arc::clone(&machine.ground().memory);
    let mapped = || {
        std::fs::read_dir("/proc")
            .unwrap()
            .flatten()
            // Not `self` and `thread-self`.
            .filter(|process| process.file_name().to_string_lossy().parse::<u32>().is_ok())
            .filter(|process| {
                let maps = std::fs::read_to_string(process.path().join("maps")).unwrap_or_default();
                let inode = format!(" {} ", memory.inode());
                maps.lines().any(|line| line.contains("memfd:guest") && line.contains(&inode))
            })
            .count()
    };
    // This program, and the emulator once it has mapped it.
    let mut machine = machine;
    let root = machine.ground().tables.start;
    machine.begin(notifier_core::OutputAddr::new(root)).unwrap();
    assert_eq!(mapped(), 2);
    drop(machine);
    assert_eq!(mapped(), 1);
}
