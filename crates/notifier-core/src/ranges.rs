// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set of bytes as disjoint ranges, and an index that finds overlaps among many ranges.

use alloc::{collections::BTreeMap, vec::Vec};

use crate::addr::{AddrRange, Address};

/// A set of addresses, kept as disjoint ranges that do not touch.
#[derive(Debug, Clone)]
pub(crate) struct RangeSet<A> {
    /// Start to end.
    ranges: BTreeMap<A, A>,
}

impl<A> Default for RangeSet<A> {
    fn default() -> Self {
        Self { ranges: BTreeMap::new() }
    }
}

impl<A: Address> RangeSet<A> {
    pub(crate) fn iter(&self) -> impl Iterator<Item = AddrRange<A>> + '_ {
        // No empty range is ever put in.
        self.ranges.iter().filter_map(|(&start, &end)| AddrRange::new(start, end).ok())
    }

    pub(crate) fn insert(&mut self, range: AddrRange<A>) {
        let (mut start, mut end) = (range.start(), range.end());
        // Whatever overlaps or touches the new range begins at or before its end; the ranges are disjoint, so going
        // backwards from there the first that ends before the new start is the last to look at.
        while let Some((&s, &e)) = self.ranges.range(..=end).next_back() {
            if e < start {
                break;
            }
            self.ranges.remove(&s);
            start = start.min(s);
            end = end.max(e);
        }
        self.ranges.insert(start, end);
    }

    pub(crate) fn remove(&mut self, range: AddrRange<A>) {
        while let Some((&s, &e)) = self.ranges.range(..range.end()).next_back() {
            if e <= range.start() {
                break;
            }
            self.ranges.remove(&s);
            if s < range.start() {
                self.ranges.insert(s, range.start());
            }
            if e > range.end() {
                self.ranges.insert(range.end(), e);
            }
        }
    }

    /// The parts of `range` that are in the set, ascending.
    pub(crate) fn within(&self, range: AddrRange<A>) -> Vec<AddrRange<A>> {
        let first = self.ranges.range(..=range.start()).next_back().map_or(range.start(), |(&s, _)| s);
        let near = self.ranges.range(first..range.end());
        near.filter_map(|(&s, &e)| AddrRange::new(s, e).ok()?.intersection(&range)).collect()
    }

    pub(crate) fn overlaps(&self, range: AddrRange<A>) -> bool {
        self.ranges.range(..range.end()).next_back().is_some_and(|(_, &e)| e > range.start())
    }

    /// The parts of `range` that are not in the set, ascending.
    pub(crate) fn missing_from(&self, range: AddrRange<A>) -> Vec<AddrRange<A>> {
        let mut missing = Vec::new();
        let mut at = range.start();
        let first = self.ranges.range(..=at).next_back().map_or(at, |(&s, _)| s);
        for (&s, &e) in self.ranges.range(first..range.end()) {
            if let Ok(gap) = AddrRange::new(at, s) {
                missing.push(gap);
            }
            at = at.max(e);
        }
        missing.extend(AddrRange::new(at, range.end()));
        missing
    }
}

/// Immutable ranges sorted for overlap queries.
#[derive(Debug, Clone)]
pub(crate) struct RangeIndex<A: Address> {
    /// Range, the greatest end up to here, and whose it is.
    sorted: Vec<(AddrRange<A>, A, usize)>,
}

impl<A: Address> RangeIndex<A> {
    pub(crate) fn new(ranges: impl Iterator<Item = (AddrRange<A>, usize)>) -> Self {
        let mut all: Vec<_> = ranges.collect();
        all.sort_by_key(|(range, _)| range.start());
        let mut greatest = A::from_u64(0);
        let sorted = all
            .into_iter()
            .map(|(range, whose)| {
                greatest = greatest.max(range.end());
                (range, greatest, whose)
            })
            .collect();
        Self { sorted }
    }

    /// Whose ranges overlap `range`.
    pub(crate) fn overlapping(&self, range: AddrRange<A>) -> impl Iterator<Item = usize> + '_ {
        let upto = self.sorted.partition_point(|(other, _, _)| other.start() < range.end());
        self.sorted[..upto]
            .iter()
            .rev()
            .take_while(move |(_, greatest, _)| *greatest > range.start())
            .filter(move |(other, _, _)| other.overlaps(&range))
            .map(|(_, _, whose)| *whose)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::{Gpa, GpaRange};

    fn range(start: u64, end: u64) -> GpaRange {
        AddrRange::new(Gpa::new(start), Gpa::new(end)).unwrap()
    }

    proptest::proptest! {
        #[test]
        fn range_sets_agree_with_a_bitmap(ops in proptest::collection::vec((0u64..64, 1u64..20, 0u8..3), 1..60)) {
            let mut set = RangeSet::default();
            let mut truth = [false; 96];
            for (start, len, what) in ops {
                let r = range(start, start + len);
                let bits = &mut truth[start as usize..(start + len) as usize];
                match what {
                    0 => { set.insert(r); bits.fill(true); }
                    1 => { set.remove(r); bits.fill(false); }
                    _ => {
                        proptest::prop_assert_eq!(set.overlaps(r), bits.iter().any(|b| *b));
                        let mut missing = [false; 96];
                        for gap in set.missing_from(r) {
                            missing[gap.start().as_u64() as usize..gap.end().as_u64() as usize].fill(true);
                        }
                        for i in start..start + len {
                            proptest::prop_assert_eq!(missing[i as usize], !truth[i as usize]);
                        }
                    }
                }
            }
        }

        #[test]
        fn an_index_finds_exactly_the_overlaps(
            ranges in proptest::collection::vec((0u64..200, 1u64..50), 0..40),
            start in 0u64..200, len in 1u64..30,
        ) {
            let ranges: Vec<_> = ranges.into_iter().map(|(s, l)| range(s, s + l)).collect();
            let index = RangeIndex::new(ranges.iter().copied().zip(0..));
            let wanted = range(start, start + len);
            let mut found: Vec<_> = index.overlapping(wanted).collect();
            found.sort_unstable();
            let truth: Vec<_> = (0..ranges.len()).filter(|i| ranges[*i].overlaps(&wanted)).collect();
            proptest::prop_assert_eq!(found, truth);
        }
    }
}
