// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What goes into a TLB, and what comes out of it by a flush: a TLB of pairs that is filled as handlers fill one.

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::*;
use notifier_core::{Access, AddrRange, Gpa};
use spte_core::format::Format;
use spte_core::{FlushRange, FlushRequest, Leaves};
use spte_mips::tlb::{filled, unique_entry_hi};
use spte_mips::*;

fn part(start: u64, len: u64) -> FlushRange {
    FlushRange { range: AddrRange::with_len(Gpa::new(start), len).unwrap(), leaves: Leaves::Of(L1), links: None }
}

fn steps(format: &GpaTable, features: TlbFeatures, ranges: &[FlushRange], all: bool) -> Vec<Step> {
    Steps::new(format, features, &FlushRequest { ranges, all, nonblocking: false }).collect()
}

const NONE: TlbFeatures = TlbFeatures { guest_ids: false, walker: false, virtual_icache: false };
const BOTH: TlbFeatures = TlbFeatures { guest_ids: true, walker: true, virtual_icache: false };

#[test]
fn a_refill_has_both_halves() {
    for (page, mask) in PAGES.into_iter().zip([0, 0x6000, 0x1_e000]) {
        let format = table(of(page, Width::Standard));
        let bytes = page.bytes();
        let leaf = |output| format.leaf(L1, &spec(output, Access::RX)).unwrap();
        let (even, odd) = (leaf(0x10_0000), leaf(0x70_0000));
        for gpa in [6 * bytes, 6 * bytes + 8, 7 * bytes, 8 * bytes - 1] {
            let pair = format.pair(gpa, even, odd);
            assert_eq!((pair.entry_hi, pair.page_mask), (6 * bytes, mask));
            let output = if gpa < 7 * bytes { 0x10_0000 } else { 0x70_0000 };
            assert_eq!(pair.half(gpa).output(), output, "{gpa:#x}");
        }
        // The other half is there, and has V clear.
        let pair = format.pair(6 * bytes, even, format.not_present(L1).absent);
        assert!(pair.half(6 * bytes).is_valid() && !pair.half(7 * bytes).is_valid());
    }
}

#[test]
fn global_takes_both_halves() {
    let format = table(GpaOptions::default());
    let (plain, global) = (0x1234_5685, 0x1234_5685 | PteLayout::Plain.global());
    let is = |even, odd| format.pair(0, even, odd).is_global();
    assert_eq!(
        [is(plain, plain), is(global, plain), is(plain, global), is(global, global)],
        [false, false, false, true]
    );
}

#[test]
fn a_flush_drops_whole_pairs() {
    let format = table(GpaOptions::default());
    let pairs = |ranges: &[FlushRange]| {
        let steps = steps(&format, NONE, ranges, false);
        assert_eq!(steps.first(), Some(&Step::Sync));
        let drops = |step: &Step| if let Step::DropPair(at) = *step { Some(at) } else { None };
        let drops: Vec<u64> = steps[1..].iter().filter_map(drops).collect();
        assert_eq!(drops.len(), steps.len() - 1);
        drops
    };
    assert_eq!(pairs(&[part(0x2000, 0x1000)]), [0x2000]);
    assert_eq!(pairs(&[part(0x3000, 0x1000)]), [0x2000], "the odd page's pair begins before it");
    assert_eq!(pairs(&[part(0x3000, 0x2000)]), [0x2000, 0x4000]);
    assert_eq!(pairs(&[part(0x3000, 0x1000), part(0x9000, 0x4000)]), [0x2000, 0x8000, 0xa000, 0xc000]);
    let end = (1 << 40) - 0x1000;
    assert_eq!(pairs(&[part(end, 0x1000)]), [end - 0x1000]);
    assert_eq!(steps(&format, NONE, &[], false), []);
}

#[test]
fn probes_are_made_with_the_walker_stopped_and_the_guest_selected() {
    let format = table(GpaOptions::default());
    let ranges = [part(0x3000, 0x1000)];
    use Step::*;
    assert_eq!(
        steps(&format, BOTH, &ranges, false),
        [Sync, StopWalker, SelectGuest, DropPair(0x2000), SelectRoot, StartWalker]
    );
    let only_ids = TlbFeatures { walker: false, ..BOTH };
    assert_eq!(steps(&format, only_ids, &ranges, false), [Sync, SelectGuest, DropPair(0x2000), SelectRoot]);
    let only_walker = TlbFeatures { guest_ids: false, ..BOTH };
    assert_eq!(steps(&format, only_walker, &ranges, false), [Sync, StopWalker, DropPair(0x2000), StartWalker]);
    // What a processor does for itself after a trap.
    let own: Vec<Step> = filled(&format, BOTH, 0x5abc).collect();
    assert_eq!(own, [Sync, StopWalker, SelectGuest, DropPair(0x4000), SelectRoot, StartWalker]);
}

#[test]
fn no_address_is_too_large_for_a_probe() {
    for page in PAGES {
        let format = table(of(page, Width::Standard));
        let last = !(2 * page.bytes() - 1);
        let own: Vec<Step> = filled(&format, NONE, u64::MAX).collect();
        assert_eq!(own, [Step::Sync, Step::DropPair(last)]);
        let ranges = [part(last, 2 * page.bytes() - page.bytes())];
        assert_eq!(steps(&format, NONE, &ranges, false), [Step::Sync, Step::DropPair(last)]);
        let pair = Pair { page_mask: u64::MAX, ..format.pair(0, 0, 0) };
        assert_eq!(pair.half(u64::MAX), EntryLo::default());
    }
    assert_eq!(PteLayout::Plain.frame(12, 0), 0, "no address bits");
}

#[test]
fn an_instruction_cache_with_virtual_tags_goes_with_the_pairs() {
    let format = table(GpaOptions::default());
    let ranges = [part(0x3000, 0x1000)];
    use Step::*;
    for features in [NONE, BOTH, TlbFeatures { walker: true, ..NONE }, TlbFeatures { walker: false, ..BOTH }] {
        let tagged = TlbFeatures { virtual_icache: true, ..features };
        let mut expected = steps(&format, features, &ranges, false);
        expected.push(DropInstructions);
        assert_eq!(steps(&format, tagged, &ranges, false), expected);
        assert_eq!(filled(&format, tagged, 0x3000).last(), Some(DropInstructions));
        // With all of the guest its numbers go, which are in the tags.
        let large = [part(0x1000, 0x1000), part(1 << 30, 1 << 30)];
        assert_eq!(steps(&format, tagged, &large, false), steps(&format, features, &large, false));
        assert_eq!(steps(&format, tagged, &[], true), steps(&format, features, &[], true));
        assert_eq!(steps(&format, tagged, &[], false), []);
    }
}

#[test]
fn all_of_a_guest_goes_by_new_ids() {
    let format = table(GpaOptions::default());
    use Step::*;
    assert_eq!(steps(&format, BOTH, &[], true), [Sync, DropGuestIds, Kick]);
    assert_eq!(steps(&format, NONE, &[], true), [Sync, MarkAsids, Kick]);
    // More pairs than it is worth, also after others.
    let large = [part(0x1000, 0x1000), part(1 << 30, 1 << 30), part(0x9000, 0x1000)];
    assert_eq!(
        steps(&format, BOTH, &large, false),
        [Sync, StopWalker, SelectGuest, DropPair(0), SelectRoot, StartWalker, DropGuestIds, Kick]
    );
    assert_eq!(steps(&format, NONE, &large, false), [Sync, DropPair(0), MarkAsids, Kick]);
    // 256 pairs one by one, and one more not.
    assert_eq!(steps(&format, NONE, &[part(0, 256 * 0x2000)], false).len(), 257);
    assert_eq!(steps(&format, NONE, &[part(0, 256 * 0x2000 + 0x1000)], false), [Sync, MarkAsids, Kick]);
}

#[test]
fn pairs_are_counted_over_all_ranges_of_a_flush() {
    let format = table(GpaOptions::default());
    let two = |second: u64| [part(0, 200 * 0x2000), part(1 << 30, second * 0x2000)];
    assert_eq!(steps(&format, NONE, &two(56), false).len(), 257);
    let more = steps(&format, NONE, &two(57), false);
    assert_eq!(more.len(), 203, "200 probes, and then the rest is not worth it");
    assert_eq!(more[200..], [Step::DropPair(199 * 0x2000), Step::MarkAsids, Step::Kick]);
    // As many ranges as a flush may name, none of them large.
    let many: Vec<FlushRange> = (0..32_u64).map(|at| part(at << 30, 256 * 0x2000)).collect();
    assert!(steps(&format, BOTH, &many, false).len() < 300);
}

#[test]
fn every_index_has_an_entry_hi_of_its_own() {
    for page in PAGES {
        let all: BTreeSet<u64> = (0..=u16::MAX)
            .filter_map(|index| unique_entry_hi(page, index, true))
            .map(|hi| hi & !(2 * page.bytes() - 1))
            .collect();
        assert_eq!(all.len() as u64, 0x1_0000.min(0x2000_0000 / page.bytes()));
        // None is a guest physical address, and index 0 is one as any other.
        assert!(all.iter().all(|hi| *hi >= 0xffff_ffff_8000_0000));
    }
    assert_eq!(unique_entry_hi(PageSize::K4, 0, true), Some(0xffff_ffff_8000_0400));
    assert_eq!(unique_entry_hi(PageSize::K16, 3, false), Some(0xffff_ffff_8001_8000));
}

#[test]
fn an_entry_hi_that_hits_nothing_is_in_an_unmapped_segment_whatever_the_index() {
    for page in PAGES {
        for index in 0..=u16::MAX {
            let Some(first) = unique_entry_hi(page, index, false) else { continue };
            assert!(bits::unmapped(first + 2 * page.bytes() - 1).is_some(), "{page:?}, index {index}");
        }
    }
}

/// A TLB as hardware has one: what matches twice is a machine check.
struct Tlb {
    slots: Vec<Pair>,
    page: PageSize,
}

impl Tlb {
    fn new(page: PageSize) -> Self {
        let none = |index| Pair {
            entry_hi: unique_entry_hi(page, index, false).unwrap(),
            page_mask: page.page_mask(),
            even: EntryLo::default(),
            odd: EntryLo::default(),
        };
        Self { slots: (0..16).map(none).collect(), page }
    }

    fn probe(&self, gpa: u64) -> Option<usize> {
        let vpn2 = |hi: u64| hi & !(2 * self.page.bytes() - 1);
        let hits: Vec<usize> = (0..self.slots.len()).filter(|at| vpn2(self.slots[*at].entry_hi) == vpn2(gpa)).collect();
        assert!(hits.len() < 2, "machine check");
        let all: BTreeSet<u64> = self.slots.iter().map(|slot| vpn2(slot.entry_hi)).collect();
        assert_eq!(all.len(), self.slots.len(), "machine check");
        hits.first().copied()
    }

    fn carry_out(&mut self, steps: Steps<'_>) {
        for step in steps {
            if let Step::DropPair(at) = step {
                if let Some(index) = self.probe(at) {
                    let (even, odd) = (EntryLo::default(), EntryLo::default());
                    self.slots[index] = Pair {
                        entry_hi: unique_entry_hi(self.page, index as u16, false).unwrap(),
                        even,
                        odd,
                        ..self.slots[index]
                    };
                }
            }
        }
    }
}

#[test]
fn a_stale_buddy_goes_with_its_pair() {
    for page in PAGES {
        let format = table(of(page, Width::Standard));
        let bytes = page.bytes();
        let mut entries: BTreeMap<u64, u64> = BTreeMap::new();
        let mut tlb = Tlb::new(page);
        let leaf = |output| format.leaf(L1, &spec(output, Access::RX)).unwrap();
        // Every slot is used once, slot 0 first.
        for slot in 0..16_u64 {
            let (even, odd) = (2 * slot * bytes, (2 * slot + 1) * bytes);
            entries.insert(even, leaf(0x100_0000 + even));
            let read = |at: u64, entries: &BTreeMap<u64, u64>| {
                entries.get(&at).copied().unwrap_or(format.not_present(L1).absent)
            };
            let refill = |tlb: &mut Tlb, entries: &BTreeMap<u64, u64>| {
                assert_eq!(tlb.probe(even), None, "who writes a pair has missed");
                tlb.slots[slot as usize] = format.pair(even, read(even, entries), read(odd, entries));
            };
            refill(&mut tlb, &entries);
            // The odd page is mapped: the TLB still knows that it is not there, until who trapped drops the pair.
            entries.insert(odd, leaf(0x200_0000 + odd));
            let index = tlb.probe(odd).expect("no miss, and so no refill");
            assert_eq!(index as u64, slot);
            assert!(!tlb.slots[index].half(odd).is_valid());
            tlb.carry_out(filled(&format, NONE, odd));
            refill(&mut tlb, &entries);
            assert_eq!(tlb.slots[index].half(odd).output(), 0x200_0000 + odd);
            // The even page is repointed: the flush names it, and the odd one goes too.
            entries.insert(even, leaf(0x300_0000 + even));
            let ranges = [part(even, bytes)];
            tlb.carry_out(Steps::new(&format, NONE, &FlushRequest { ranges: &ranges, all: false, nonblocking: false }));
            assert_eq!((tlb.probe(even), tlb.probe(odd)), (None, None));
            refill(&mut tlb, &entries);
            assert_eq!(tlb.slots[index].half(even).output(), 0x300_0000 + even);
        }
    }
}

/// No TLB has a link. That the walker was stopped is what ends walks through the table.
#[test]
fn links_that_go_alone_stop_the_walker_and_drop_no_pair() {
    let format = table(GpaOptions::default());
    use Step::*;
    let links = FlushRange { leaves: Leaves::None, links: L1.above(), ..part(0, 2 << 20) };
    assert_eq!(steps(&format, BOTH, &[links], false), [Sync, StopWalker, SelectGuest, SelectRoot, StartWalker]);
    assert_eq!(steps(&format, NONE, &[links], false), [Sync]);
    let around = [links, part(0x1000, 0x1000), links, part(0x8000, 0x1000), links];
    assert_eq!(steps(&format, NONE, &around, false), [Sync, DropPair(0), DropPair(0x8000)]);
}
