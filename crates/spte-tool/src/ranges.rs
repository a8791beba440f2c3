// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set of addresses, kept as disjoint ranges that do not touch.

use std::collections::BTreeMap;

/// Addresses, by where a range begins and where it ends.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    /// The parts of the set in `start..end`, ascending.
    pub(crate) fn within(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let before = self.0.range(..start).next_back();
        before
            .into_iter()
            .chain(self.0.range(start..end))
            .map(|(&from, &to)| (from.max(start), to.min(end)))
            .filter(|(from, to)| from < to)
            .collect()
    }

    /// Whether one address of `start..end` is in the set.
    pub(crate) fn overlaps(&self, start: u64, end: u64) -> bool {
        let last = self.0.range(..end).next_back();
        last.is_some_and(|(_, &to)| to > start)
    }

    /// Takes `start..end` out.
    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        while let Some((&from, &to)) = self.0.range(..end).next_back().filter(|(_, to)| **to > start) {
            self.0.remove(&from);
            if from < start {
                self.0.insert(from, start);
            }
            if to > end {
                self.0.insert(end, to);
            }
        }
    }

    /// Adds `start..end`, which is not empty.
    pub(crate) fn insert(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        let end = self.0.remove(&end).unwrap_or(end);
        match self.0.range_mut(..start).next_back() {
            Some((_, to)) if *to == start => *to = end,
            _ => drop(self.0.insert(start, end)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_set_of_ranges_is_a_set(steps in prop::collection::vec((any::<bool>(), 0_u64..40, 1_u64..20), 0..40)) {
            let (mut ranges, mut plain) = (Ranges::default(), std::collections::BTreeSet::new());
            for (insert, start, len) in steps {
                if insert {
                    ranges.insert(start, start + len);
                    plain.extend(start..start + len);
                } else {
                    ranges.remove(start, start + len);
                    plain.retain(|at| !(start..start + len).contains(at));
                }
                let parts = ranges.within(5, 45);
                let all: Vec<u64> = parts.iter().flat_map(|&(from, to)| from..to).collect();
                let expected: Vec<u64> = plain.iter().copied().filter(|at| (5..45).contains(at)).collect();
                prop_assert_eq!(all, expected);
                prop_assert!(parts.windows(2).all(|pair| pair[0].1 < pair[1].0));
                prop_assert_eq!(ranges.overlaps(start, start + len), insert);
            }
        }
    }
}
