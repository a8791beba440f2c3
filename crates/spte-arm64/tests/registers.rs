// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Register values that were worked out by hand, and the order of flushes.

mod common;

use common::*;
use notifier_core::{Access, AddrRange, Gpa, OutputAddr};
use spte_arm64::*;
use spte_core::{FlushRange, FlushRequest, Leaves, format::Level};

#[test]
fn vtcr_is_as_worked_out_by_hand() {
    let vtcr = |options, bits| Vtcr::new(&stage2(options), bits).map(Vtcr::raw);
    // T0SZ 24, SL0 1, write-back walks, inner shareable, 4K, 40 bits.
    let small = Stage2Options { ipa_bits: 40, physical_bits: 40, ..of(Granule::K4) };
    assert_eq!(vtcr(small, VmidBits::Eight), Ok(0x8002_3558));
    // T0SZ 16, SL0 2, 64K, 52 bits, 16-bit VMIDs, HA.
    let accessed_dirty = AccessedDirty::HardwareAccessed;
    let large = Stage2Options { ipa_bits: 48, physical_bits: 52, accessed_dirty, ..of(Granule::K64) };
    assert_eq!(vtcr(large, VmidBits::Sixteen), Ok(0x802e_7590));
    // T0SZ 17, SL0 2, 16K, 48 bits, HA and HD.
    let accessed_dirty = AccessedDirty::Hardware;
    let middle = Stage2Options { ipa_bits: 47, accessed_dirty, ..of(Granule::K16) };
    assert_eq!(vtcr(middle, VmidBits::Eight), Ok(0x8065_b591));
    // T0SZ 12, level -1: SL0 0 with SL2; DS.
    let wide = Stage2Options { ipa_bits: 52, physical_bits: 52, lpa2: true, ..of(Granule::K4) };
    assert_eq!(vtcr(Stage2Options { start: Start::SingleTable, ..wide }, VmidBits::Eight), Ok(0x3_8006_350c));
    assert_eq!(vtcr(wide, VmidBits::Eight), Ok(0x1_8006_358c), "level 0, 16 tables");
}

#[test]
fn vtcr_of_no_machine_is_refused() {
    let vtcr = |options| Vtcr::new(&stage2(options), VmidBits::Eight).map(drop);
    let narrow = Stage2Options { ipa_bits: 40, physical_bits: 36, ..of(Granule::K4) };
    assert_eq!(vtcr(narrow), Err(RegisterError::IpaBits { ipa_bits: 40, physical_bits: 36 }));
    // One table at level 0 for 40 bits: that is what concatenation is for.
    let single = Stage2Options { ipa_bits: 40, physical_bits: 40, start: Start::SingleTable, ..of(Granule::K4) };
    assert_eq!(vtcr(single), Err(RegisterError::StartLevel { number: 0, least: 44 }));
    let single = Stage2Options { ipa_bits: 40, physical_bits: 40, start: Start::SingleTable, ..of(Granule::K16) };
    assert_eq!(vtcr(single), Err(RegisterError::StartLevel { number: 1, least: 42 }));
}

#[test]
fn vtcr_says_what_format_it_is_for() {
    let read = |raw| Vtcr::from_raw(raw).unwrap().options().unwrap();
    let options = read(0x802e_7590);
    assert_eq!((options.granule, options.ipa_bits, options.physical_bits), (Granule::K64, 48, 52));
    assert_eq!((options.start, options.accessed_dirty), (Start::Level(1), AccessedDirty::HardwareAccessed));
    assert_eq!(read(0x3_8006_350c).start, Start::Level(-1));
    for bits in 32..=52 {
        for granule in [Granule::K4, Granule::K16, Granule::K64] {
            let lpa2 = bits > 48 && granule != Granule::K64;
            let physical_bits = if bits > 48 { 52 } else { 48 };
            let format = stage2(Stage2Options { ipa_bits: bits, physical_bits, lpa2, ..of(granule) });
            let vtcr = Vtcr::new(&format, VmidBits::Sixteen).unwrap();
            assert_eq!(Vtcr::from_raw(vtcr.raw()), Ok(vtcr));
            assert_eq!(vtcr.vmid_bits(), VmidBits::Sixteen);
            let back = stage2(vtcr.options().unwrap());
            assert_eq!((back.start_level(), back.concatenated()), (format.start_level(), format.concatenated()));
        }
    }
    let refused = |raw| Vtcr::from_raw(raw).unwrap_err();
    assert_eq!(refused(0x2_3558), RegisterError::Reserved { raw: 0x2_3558, bits: 1 << 31 });
    assert_eq!(refused(0x8012_3558), RegisterError::Reserved { raw: 0x8012_3558, bits: 1 << 20 });
    assert_eq!(refused(0x8002_f558), RegisterError::Field { raw: 0x8002_f558, field: "TG0" });
    assert_eq!(refused(0x8007_3558), RegisterError::Field { raw: 0x8007_3558, field: "PS" });
    assert_eq!(refused(0x8002_3540), RegisterError::Field { raw: 0x8002_3540, field: "T0SZ" });
    assert_eq!(refused(0x8002_1558), RegisterError::Field { raw: 0x8002_1558, field: "SH0" });
    // 48 bits that begin at level 2: level-0 translation faults.
    assert!(matches!(refused(0x8005_3510), RegisterError::Options { .. }));
}

#[test]
fn vttbr_holds_root_and_vmid() {
    let format = stage2(Stage2Options { ipa_bits: 40, ..of(Granule::K4) });
    let vttbr = Vttbr::new(&format, OutputAddr::new(0x1234_6000), 0x12, VmidBits::Eight).unwrap();
    assert_eq!(vttbr.raw(), 0x0012_0000_1234_6000);
    assert_eq!(vttbr.common().raw(), 0x0012_0000_1234_6001);
    assert_eq!((vttbr.vmid(), vttbr.root(&format)), (0x12, OutputAddr::new(0x1234_6000)));
    // Two tables side by side are aligned to both.
    let unaligned = OutputAddr::new(0x1234_5000);
    let refused = Vttbr::new(&format, unaligned, 0, VmidBits::Eight);
    assert_eq!(refused, Err(RegisterError::Unaligned { root: unaligned, align: 0x2000 }));
    assert_eq!(Vttbr::new(&format, unaligned, 0x100, VmidBits::Eight), Err(RegisterError::Vmid { vmid: 0x100 }));
    assert!(Vttbr::new(&format, OutputAddr::new(0x2000), 0x100, VmidBits::Sixteen).is_ok());
    let root = OutputAddr::new(1 << 48);
    let refused = Vttbr::new(&format, root, 0, VmidBits::Eight);
    assert_eq!(refused, Err(RegisterError::TooWide { root, bits: 48 }));
    // With 52 bits, 51:48 stand in 5:2, and a root of 8 entries is aligned to 64 bytes.
    let wide = stage2(Stage2Options { ipa_bits: 32, physical_bits: 52, ..of(Granule::K64) });
    let root = OutputAddr::new(0xf_0000_0001_0040);
    let vttbr = Vttbr::new(&wide, root, 0xffff, VmidBits::Sixteen).unwrap();
    assert_eq!(vttbr.raw(), 0xffff_0000_0001_007c);
    assert_eq!(vttbr.root(&wide), root);
    // So is a root of two, which is smaller.
    let start = Start::Level(0);
    let small = stage2(Stage2Options { ipa_bits: 40, physical_bits: 52, lpa2: true, start, ..of(Granule::K4) });
    let root = OutputAddr::new(0x1_0020);
    let refused = Vttbr::new(&small, root, 0, VmidBits::Eight);
    assert_eq!(refused, Err(RegisterError::Unaligned { root, align: 64 }));
}

fn range(start: u64, len: u64, leaf: Option<Level>, links: bool) -> FlushRange {
    let leaves = leaf.map_or(Leaves::Any, Leaves::Of);
    let links = links.then(|| leaf.unwrap_or(Level::LEAF).above().unwrap());
    FlushRange { range: AddrRange::with_len(Gpa::new(start), len).unwrap(), leaves, links }
}

fn steps(format: &Stage2, features: TlbFeatures, ranges: &[FlushRange], all: bool) -> Vec<Step> {
    Steps::new(format, features, &FlushRequest { ranges, all, nonblocking: false }).collect()
}

const PLAIN: TlbFeatures = TlbFeatures { level_hints: false, ranges: false };
const HINTS: TlbFeatures = TlbFeatures { level_hints: true, ranges: false };
const RANGES: TlbFeatures = TlbFeatures { level_hints: true, ranges: true };

fn around(operations: &[Tlbi]) -> Vec<Step> {
    let mut all = vec![Step::Barrier(Barrier::InnerStores)];
    all.extend(operations.iter().map(|operation| Step::Invalidate(*operation)));
    all.extend([
        Step::Barrier(Barrier::Inner),
        Step::Invalidate(Tlbi::Stage1),
        Step::Barrier(Barrier::Inner),
        Step::Isb,
    ]);
    all
}

#[test]
fn stage_1_follows_stage_2_after_a_barrier() {
    let format = stage2(Stage2Options::default());
    let page = range(0x12_3456_7000, 0x1000, Some(L3), false);
    assert_eq!(steps(&format, PLAIN, &[page], false), around(&[Tlbi::Ipa(0x1234567)]));
    let whole =
        [Step::Barrier(Barrier::InnerStores), Step::Invalidate(Tlbi::Vmid), Step::Barrier(Barrier::Inner), Step::Isb];
    assert_eq!(steps(&format, PLAIN, &[], true), whole);
    assert_eq!(steps(&format, PLAIN, &[], false), []);
}

#[test]
fn a_level_hint_is_exact_or_absent() {
    let format = stage2(Stage2Options::default());
    let hinted = |leaf, links| {
        let range = range(0x4020_0000, 0x20_0000, leaf, links);
        steps(&format, HINTS, &[range], false)[1]
    };
    let ipa = |operand| Step::Invalidate(Tlbi::Ipa(operand));
    // TTL: 01 for 4K, then the level.
    assert_eq!(hinted(Some(level(2)), false), ipa(0x6000_0004_0200));
    assert_eq!(hinted(Some(L3), false), ipa(0x7000_0004_0200));
    assert_eq!(hinted(None, false), ipa(0x4_0200));
    assert_eq!(hinted(Some(L3), true), ipa(0x4_0200), "a link went: leaves are not all there was");
    let other = stage2(of(Granule::K64));
    let page = range(0x1_0000, 0x1_0000, Some(L3), false);
    assert_eq!(steps(&other, HINTS, &[page], false)[1], ipa(0xf000_0000_0010));
    assert_eq!(steps(&other, PLAIN, &[page], false)[1], ipa(0x10));
}

#[test]
fn every_leaf_of_a_range_is_named() {
    let format = stage2(Stage2Options::default());
    let named = |range| {
        let steps = steps(&format, PLAIN, &[range], false);
        steps.iter().filter(|step| matches!(step, Step::Invalidate(Tlbi::Ipa(_)))).count()
    };
    assert_eq!(named(range(0, 0x40_0000, Some(level(2)), false)), 2);
    assert_eq!(named(range(0, 0x20_0000, Some(L3), false)), 512);
    assert_eq!(named(range(0, 0x20_0000, None, true)), 512, "of unknown size: every smallest page");
    // More than is worth it: the whole VMID.
    let much = range(0, 1 << 30, Some(L3), false);
    assert_eq!(steps(&format, PLAIN, &[much], false)[1], Step::Invalidate(Tlbi::Vmid));
    let two = [range(0x1000, 0x1000, Some(L3), false), range(0x9000, 0x2000, Some(L3), false)];
    assert_eq!(steps(&format, PLAIN, &two, false), around(&[Tlbi::Ipa(1), Tlbi::Ipa(9), Tlbi::Ipa(10)]));
}

/// Pages that a RIPAS2E1IS operand covers, and from which one.
fn covered(operand: u64) -> (u64, u64) {
    let (num, scale) = (operand >> 39 & 0x1f, operand >> 44 & 3);
    (operand & ((1 << 37) - 1), (num + 1) << (5 * scale + 1))
}

#[test]
fn range_operations_cover_exactly_the_range() {
    for (granule, lpa2) in [(Granule::K4, false), (Granule::K16, false), (Granule::K64, false), (Granule::K4, true)] {
        let format = stage2(Stage2Options { granule, ipa_bits: 44, lpa2, ..Stage2Options::default() });
        let shift = granule.shift();
        let unit = if lpa2 { 16 } else { shift };
        for pages in [1, 2, 3, 15, 63, 64, 65, 513, 2047, 4096, 70_000, 262_144] {
            let (start, end) = (7 << shift, (7 + pages) << shift);
            let all = steps(&format, RANGES, &[range(start, end - start, None, false)], false);
            let mut next = start;
            for step in &all {
                let Step::Invalidate(operation) = step else { continue };
                match operation {
                    Tlbi::Ipa(operand) => {
                        assert_eq!(operand << 12, next);
                        next += 1 << shift;
                    }
                    Tlbi::Range(operand) => {
                        let (page, count) = covered(*operand);
                        assert_eq!(page << unit, next, "{pages} pages of {granule:?}");
                        assert_eq!(operand >> 46, [1, 2, 3][usize::from(shift - 12) / 2]);
                        next += count << shift;
                    }
                    other => assert_eq!(*other, Tlbi::Stage1),
                }
            }
            assert_eq!(next, end, "{pages} pages of {granule:?}");
            assert!(all.len() < 40, "{} steps for {pages} pages", all.len());
        }
    }
}

#[test]
fn rights_that_rose_are_dropped_on_the_processor_that_faulted() {
    let format = stage2(Stage2Options::default());
    let steps = tlb::relaxed(&format, HINTS, 0x4020_0000, level(2));
    assert_eq!(steps[1], Step::Invalidate(Tlbi::LocalIpa(0x6000_0004_0200)));
    assert_eq!(steps[3], Step::Invalidate(Tlbi::LocalStage1));
    assert_eq!([steps[0], steps[2]], [Step::Barrier(Barrier::LocalStores), Step::Barrier(Barrier::Local)]);
}

#[test]
fn cache_duties_vanish_with_the_features_that_do_them() {
    let plain = stage2(Stage2Options::default());
    let fwb = stage2(Stage2Options { fwb: true, ..Stage2Options::default() });
    let none = CacheFeatures::default();
    let (normal, device) = (MemoryType::WRITE_BACK, MemoryType::DEVICE);
    let before = |format: &Stage2, memory, access| format.before_mapping(none, memory, access);
    let clean = Duties { clean: true, ..Duties::default() };
    assert_eq!(before(&plain, normal, Access::READ), clean);
    assert_eq!(before(&plain, normal, Access::RWX), Duties { instructions: true, ..clean });
    assert!(before(&plain, device, Access::READ).is_nothing());
    assert!(before(&plain, MemoryType::NON_CACHEABLE, Access::READ).is_nothing());
    assert!(before(&fwb, normal, Access::READ).is_nothing());
    let dic = CacheFeatures { instructions_follow_data: true, tags: true };
    assert_eq!(fwb.before_mapping(dic, normal, Access::RWX), Duties { tags: true, ..Duties::default() });
    assert_eq!(plain.after_unmapping(normal), clean);
    assert!(fwb.after_unmapping(normal).is_nothing() && plain.after_unmapping(device).is_nothing());
    assert!(plain.before_relaxing(none, Access::READ, Access::RX).instructions);
    assert!(plain.before_relaxing(none, Access::RX, Access::RWX).is_nothing());
}

#[test]
fn duties_are_done_in_order_and_stop_at_the_first_failure() {
    struct Recorder(std::cell::RefCell<Vec<&'static str>>, &'static str);
    impl Recorder {
        fn note(&self, what: &'static str) -> Result<(), &'static str> {
            self.0.borrow_mut().push(what);
            if what == self.1 { Err(what) } else { Ok(()) }
        }
    }
    impl Maintenance for Recorder {
        type Error = &'static str;
        fn clean_to_point_of_coherency(&self, _: OutputAddr, _: u64) -> Result<(), Self::Error> {
            self.note("clean")
        }
        fn initialise_tags(&self, _: OutputAddr, _: u64) -> Result<(), Self::Error> {
            self.note("tags")
        }
        fn invalidate_instructions(&self, _: OutputAddr, _: u64) -> Result<(), Self::Error> {
            self.note("instructions")
        }
    }
    let all = Duties { clean: true, tags: true, instructions: true };
    let fine = Recorder(Vec::new().into(), "");
    assert_eq!(all.perform(&fine, OutputAddr::new(0), 0x1000), Ok(()));
    assert_eq!(*fine.0.borrow(), ["tags", "clean", "instructions"]);
    let fails = Recorder(Vec::new().into(), "clean");
    assert_eq!(all.perform(&fails, OutputAddr::new(0), 0x1000), Err("clean"));
    assert_eq!(*fails.0.borrow(), ["tags", "clean"]);
}

/// Where nothing was translated there is nothing to name but the link, once, and no size to hint at.
#[test]
fn a_link_that_goes_alone_is_one_address() {
    let format = stage2(Stage2Options::default());
    let links = |start, len, number| FlushRange {
        range: AddrRange::with_len(Gpa::new(start), len).unwrap(),
        leaves: Leaves::None,
        links: Some(level(number)),
    };
    assert_eq!(steps(&format, HINTS, &[links(0x40_0000, 0x20_0000, 2)], false), around(&[Tlbi::Ipa(0x400)]));
    // Two side by side, and one of a higher level.
    let two = around(&[Tlbi::Ipa(0x400), Tlbi::Ipa(0x600)]);
    assert_eq!(steps(&format, PLAIN, &[links(0x40_0000, 0x40_0000, 2)], false), two);
    assert_eq!(steps(&format, PLAIN, &[links(0x4000_0000, 0x4000_0000, 1)], false), around(&[Tlbi::Ipa(0x4_0000)]));
    // The leaves of the same table come by themselves, with their hint.
    let both = [range(0x40_3000, 0x2000, Some(L3), false), links(0x40_0000, 0x20_0000, 2)];
    let named = around(&[Tlbi::Ipa(0x7000_0000_0403), Tlbi::Ipa(0x7000_0000_0404), Tlbi::Ipa(0x400)]);
    assert_eq!(steps(&format, HINTS, &both, false), named);
}
