// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! NPT and long-mode tables on QEMU.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::sync::atomic::Ordering;

use conformance::change::{How, PAGES, UNMERGED, seen};
use conformance::machine::{Class, Exit, Fault, GuestAccess, Machine};
use conformance::machines::x86::X86;
use conformance::mmu::{Mmu, Without};
use conformance::sequence::{OPERATIONS, Sequences, Walked, reserved};
use conformance::testing;
use notifier_core::Gpa;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use spte_core::format::{Format, Kind, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Step;
use spte_model::TouchKind;
use spte_x86::{Native, Nested, Usage};

/// Where the data is.
const DATA: u64 = 1 << 30;
const KINDS: [TouchKind; 3] = [TouchKind::Read, TouchKind::Write, TouchKind::Execute];

/// One of each depth, or none where a program is missing.
fn each<U: Usage>(test: impl Fn(&str, Mmu<X86<U>>)) {
    let _alone = testing::alone();
    for variant in X86::<U>::variants() {
        if let Some(machine) = testing::started(variant.name, X86::start(&testing::tools(), variant)) {
            test(variant.name, Mmu::new(machine));
        }
    }
}

/// A table that has the fixed pages, and its model.
struct Bench<U: Usage> {
    name: String,
    mmu: Mmu<X86<U>>,
    pair: Walked<X86<U>>,
}

impl<U: Usage> Bench<U> {
    fn new(name: &str, mmu: Mmu<X86<U>>) -> Self {
        let pair = Sequences::new(mmu.clone()).table().unwrap();
        Self { name: name.to_owned(), mmu, pair }
    }

    /// An operation on table and model, as text, of which both answer the same: a touch goes through the machine, and facts
    /// are those that it left.
    fn step(&mut self, op: &str) -> String {
        match self.pair.step(&op.parse().unwrap()) {
            Ok(Step::Answered(outcome)) => outcome.to_string(),
            other => panic!("{}: {op}: {other:?}", self.name),
        }
    }

    /// The machine alone.
    fn access(&self, at: u64, kind: TouchKind) -> Exit {
        self.mmu.machine().access(GuestAccess { at, kind, value: 0x1234 }).unwrap()
    }

    fn store(&self, at: u64, value: u64) {
        self.mmu.machine().ground().memory.store(at, value);
    }

    /// The entry of a level on the way to `at`: where it is, and what.
    fn entry(&self, at: u64, level: Level) -> (u64, u64) {
        let table = self.pair.driver().table();
        let mut page = table.root().as_u64();
        for found in table.walk(Gpa::new(at)) {
            let shape = table.format().geometry().level(found.level);
            let entry = page + 8 * (at >> shape.shift & ((1 << shape.bits) - 1));
            match found.kind {
                _ if found.level == level => return (entry, found.raw),
                Kind::Table(below) => page = below.as_u64(),
                _ => break,
            }
        }
        panic!("{}: nothing at level {} on the way to {at:#x}", self.name, level.get());
    }
}

fn leads<U: Usage>(name: &str, mmu: Mmu<X86<U>>) {
    let top = 1 << mmu.machine().driven().shape.gpa_bits();
    let mut bench = Bench::new(name, mmu);
    let places = [("4k", 0x1000, 0x20_3000), ("2m", 0x20_0000, 0x20_0000), ("1g", 0x4000_0000, 0)];
    for (page, size, inside) in places {
        for gpa in [0, size, top / 2 - size, top / 2, top - size] {
            bench.step(&format!("map {gpa:#x} {:#x} {size:#x} rwx page={page}", DATA + inside));
            // The last word of a gigabyte is beyond the data.
            for offset in [0, 0x10, 0xff8, size.min(0x20_0000) - 0x1000, size.min(0x20_0000) - 8] {
                for kind in ["r", "w", "x"] {
                    let touched = bench.step(&format!("touch {:#x} {kind}", gpa + offset));
                    let led = format!("{:#x}", DATA + inside + offset);
                    assert!(touched.contains(&led), "{name}: {touched} and not {led}, by {page}");
                }
            }
            assert!(bench.step(&format!("walk {gpa:#x}")).contains(&format!("{size:#x}")), "{name}: {page}");
            bench.step(&format!("unmap {gpa:#x} {size:#x}"));
            assert_eq!(bench.step(&format!("touch {gpa:#x} r")), "fault absent");
        }
    }
}

#[test]
fn every_leaf_of_a_nested_table_leads_where_it_says() {
    each::<Nested>(leads);
}

#[test]
fn every_leaf_of_a_native_table_leads_where_it_says() {
    each::<Native>(leads);
}

fn rights<U: Usage>(name: &str, mmu: Mmu<X86<U>>) {
    let mut bench = Bench::new(name, mmu);
    for (page, size) in [("4k", 0x1000), ("2m", 0x20_0000), ("1g", 0x4000_0000)] {
        let rights = bench.mmu.machine().driven().shape.access().to_vec();
        for access in rights.iter().map(ToString::to_string) {
            bench.step(&format!("map 0x80000000 {DATA:#x} {size:#x} {access} page={page}"));
            for kind in ["x", "w", "r"] {
                let answer = bench.step(&format!("touch 0x80000018 {kind}"));
                let denied = answer == "fault perm";
                assert_eq!(denied, !access.contains(kind), "{name}: {kind} with {access} by {page}: {answer}");
            }
            bench.step(&format!("unmap 0x80000000 {size:#x}"));
        }
    }
}

#[test]
fn a_nested_leaf_grants_its_rights_and_no_more() {
    each::<Nested>(rights);
}

#[test]
fn a_native_leaf_grants_its_rights_and_no_more() {
    each::<Native>(rights);
}

/// What an entry does to one access of a guest at CPL 3, where all others on the way allow it.
fn expected(kind: HardwareKind, raw: u64, access: TouchKind) -> Option<Class> {
    let denied = match access {
        TouchKind::Read => false,
        TouchKind::Write => raw & 1 << 1 == 0,
        TouchKind::Execute => raw & 1 << 63 != 0,
    };
    match kind {
        HardwareKind::NotPresent => Some(Class::Absent),
        // See `leniencies`.
        HardwareKind::Impossible(why) if why.rule.starts_with("bit 8 of a link") => None,
        // To the format a rule, to processors a right like any other.
        HardwareKind::Impossible(why) if why.rule.starts_with("nested accesses") => Some(Class::Denied),
        HardwareKind::Impossible(_) => Some(Class::Misconfigured),
        HardwareKind::Leaf | HardwareKind::Table(_) => (denied || raw & 1 << 2 == 0).then_some(Class::Denied),
    }
}

/// Turns every bit of links and leaves alone, but for those that lead elsewhere.
fn bits<U: Usage>(name: &str, mmu: Mmu<X86<U>>) {
    let mut bench = Bench::new(name, mmu);
    let (small, two, one) = (0x8000_0000, 0x8020_0000, 0xc000_0000);
    bench.step(&format!("map {small:#x} {DATA:#x} 0x1000 rwx"));
    bench.step(&format!("map {two:#x} {DATA:#x} 0x200000 rwx page=2m"));
    bench.step(&format!("map {one:#x} {DATA:#x} 0x40000000 rwx page=1g"));
    let format = bench.mmu.machine().driven().format;
    let reserved = reserved(&format, bench.mmu.machine().ground());
    let level = |number| Level::new(number).unwrap();
    let links = (2..=format.geometry().top().get()).map(|number| (small, number));
    for (at, number) in [(small, 1), (two, 2), (one, 3)].into_iter().chain(links) {
        let (slot, good) = bench.entry(at, level(number));
        let leaf = format.kind(level(number), good) == Kind::Leaf;
        // The guest's own tables and code are below the one entry there too: a walk comes first, which is a write, then a
        // fetch of the instruction.
        let all = U::NESTED && number == 5;
        for bit in 0..64 {
            let address = (12 + if leaf { 9 * (number - 1) } else { 0 }..40).contains(&bit);
            let becomes_link = leaf && number > 1 && bit == 7;
            if address || becomes_link {
                continue;
            }
            let raw = good ^ 1 << bit;
            let kind = format.hardware_kind(level(number), raw);
            for access in KINDS {
                let place = Mmu::<X86<U>>::place(at + 0x18, access);
                bench.store(slot, raw);
                let exit = bench.access(place, access);
                bench.store(slot, good);
                bench.store(DATA + 0x18, DATA + 0x18);
                let found = match exit {
                    Exit::Done { .. } => None,
                    Exit::Fault(Fault { class, at, kind, .. }) => {
                        let own = all && at.is_some_and(|at| reserved.contains(&at)) && kind != Some(TouchKind::Read);
                        // Without NX a fetch is not told from a load.
                        let blurred = !format.options().no_execute && access != TouchKind::Write;
                        let wanted = if blurred { None } else { Some(access) };
                        let told = (at, kind) == (Some(place), wanted);
                        assert!(own || told && !all, "{name}: {raw:#x} at level {number}: {at:x?}, {kind:?}");
                        Some(class)
                    }
                    Exit::Kicked => panic!("{name}: nobody kicked"),
                };
                let needs = if all { &KINDS[..] } else { &[access] };
                let wanted = needs.iter().find_map(|access| expected(kind, raw, *access));
                assert_eq!(found, wanted, "{name}: {access:?} by {raw:#x}, bit {bit}, at level {number}: {kind:?}");
            }
        }
    }
}

#[test]
fn every_bit_of_a_nested_entry_means_what_the_format_says() {
    each::<Nested>(bits);
}

#[test]
fn every_bit_of_a_native_entry_means_what_the_format_says() {
    each::<Native>(bits);
}

/// Should this fail one day, the machine has begun to cache, and `caches` and `refresh` have to say so.
fn cold<U: Usage>(name: &str, mmu: Mmu<X86<U>>) {
    let mut bench = Bench::new(name, mmu);
    bench.mmu.leave_out(Without::Flushes);
    bench.step(&format!("map 0x200000 {DATA:#x} 0x1000 rwx"));
    bench.step("touch 0x200010 w");
    bench.step("unmap 0x200000 0x1000");
    assert!(bench.mmu.counts().left_out.load(Ordering::Relaxed) > 0);
    let stale = !matches!(bench.access(0x20_0010, TouchKind::Read), Exit::Fault(Fault { class: Class::Absent, .. }));
    assert_eq!(stale, bench.mmu.machine().caches(), "{name}");
}

#[test]
fn a_nested_guest_enters_with_nothing_cached() {
    each::<Nested>(cold);
}

#[test]
fn a_native_guest_enters_with_nothing_cached() {
    each::<Native>(cold);
}

fn works<U: Usage>(name: &str, mmu: Mmu<X86<U>>) {
    let change = seen(&mmu, How::Change).unwrap();
    assert_eq!((change.mismatches, change.read_faults, change.other_faults, change.breaks), (0, 0, 0, 0), "{name}");
    assert_eq!((change.stores, change.write_faults), (UNMERGED, UNMERGED), "{name}");
    assert!(change.kicks > 0 && change.passes > 2, "{name}: {change:?}");
    let zap = seen(&mmu, How::Zap).unwrap();
    assert_eq!((zap.mismatches, zap.read_faults), (0, PAGES), "{name}");
}

#[test]
fn a_nested_guest_at_work_is_kicked_faults_and_goes_on() {
    each::<Nested>(works);
}

#[test]
fn a_native_guest_at_work_is_kicked_faults_and_goes_on() {
    each::<Native>(works);
}

fn soak<U: Usage>(name: &str, mmu: Mmu<X86<U>>) {
    let sequences = Sequences::new(mmu);
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    for case in 0..1_000 / OPERATIONS {
        sequences.case(&mut rng).unwrap_or_else(|divergence| panic!("{name}, case {case}:\n{divergence}"));
    }
}

#[test]
fn a_nested_table_and_its_model_agree() {
    each::<Nested>(soak);
}

#[test]
fn a_native_table_and_its_model_agree() {
    each::<Native>(soak);
}
