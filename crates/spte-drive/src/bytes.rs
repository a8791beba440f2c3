// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A set of addresses.

use std::collections::BTreeMap;

/// A set of addresses, as disjoint ranges: start to end.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Bytes(BTreeMap<u64, u64>);

impl Bytes {
    /// The parts inside `start..end`.
    pub(crate) fn within(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let before = self.0.range(..start).next_back().map(|(&from, &to)| (from, to));
        let others = self.0.range(start..end).map(|(&from, &to)| (from, to));
        let all = before.into_iter().chain(others);
        all.map(|(from, to)| (from.max(start), to.min(end))).filter(|(from, to)| from < to).collect()
    }

    pub(crate) fn overlaps(&self, start: u64, end: u64) -> bool {
        // Ranges are disjoint: the last that begins before `end` is the only one that can reach furthest.
        self.0.range(..end).next_back().is_some_and(|(_, &to)| to > start)
    }

    pub(crate) fn remove(&mut self, start: u64, end: u64) {
        if let Some((&from, &to)) = self.0.range(..start).next_back() {
            if to > start {
                self.0.insert(from, start);
                if to > end {
                    self.0.insert(end, to);
                }
            }
        }
        let inside: Vec<_> = self.0.range(start..end).map(|(&from, &to)| (from, to)).collect();
        for (from, to) in inside {
            self.0.remove(&from);
            if to > end {
                self.0.insert(end, to);
            }
        }
    }

    pub(crate) fn insert(&mut self, start: u64, end: u64) {
        self.remove(start, end);
        // Neighbours join.
        let end = self.0.remove(&end).unwrap_or(end);
        match self.0.range_mut(..start).next_back() {
            Some((_, to)) if *to == start => *to = end,
            _ => drop(self.0.insert(start, end)),
        }
    }

    /// Keeps only what `others` has too.
    pub(crate) fn keep(&mut self, others: &Bytes) {
        let mut kept = Bytes::default();
        for (&from, &to) in &self.0 {
            others.within(from, to).into_iter().for_each(|(from, to)| kept.insert(from, to));
        }
        *self = kept;
    }
}

/// The answer of [`Bytes::overlaps`] and how far it goes, for a walk that asks about one stretch after the other.
#[derive(Debug, Default)]
pub(crate) struct Nearest {
    /// Known from here...
    from: u64,
    /// ...to here:
    to: u64,
    inside: bool,
}

impl Nearest {
    /// As [`Bytes::overlaps`], of a set that is the same at each call.
    pub(crate) fn overlaps(&mut self, set: &Bytes, start: u64, end: u64) -> bool {
        if self.from <= start && end <= self.to {
            return self.inside;
        }
        let before = set.0.range(..=start).next_back().filter(|&(_, &to)| to > start);
        let next = || set.0.range(start..).next().map_or(u64::MAX, |(&from, _)| from);
        (self.from, self.to, self.inside) = match before {
            Some((_, &to)) => (start, to, true),
            None => (start, next(), false),
        };
        if end <= self.to { self.inside } else { set.overlaps(start, end) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Against sixteen flags, for every pair of ranges and each way to apply them.
    #[test]
    fn ranges_are_what_sixteen_flags_would_be() {
        let ranges: Vec<(u64, u64)> = (0..8).flat_map(|from| (from + 1..=8).map(move |to| (from, to))).collect();
        for &(a, b) in &ranges {
            for &(c, d) in &ranges {
                for &(e, f) in &ranges {
                    let (mut set, mut flags) = (Bytes::default(), [false; 8]);
                    set.insert(a, b);
                    set.insert(c, d);
                    set.remove(e, f);
                    flags.iter_mut().enumerate().for_each(|(at, flag)| {
                        let at = at as u64;
                        *flag = ((a..b).contains(&at) || (c..d).contains(&at)) && !(e..f).contains(&at);
                    });
                    let mut nearest = Nearest::default();
                    for &(from, to) in &ranges {
                        let part = &flags[from as usize..to as usize];
                        assert_eq!(set.overlaps(from, to), part.contains(&true));
                        assert_eq!(nearest.overlaps(&set, from, to), part.contains(&true));
                        let bytes: u64 = set.within(from, to).iter().map(|(from, to)| to - from).sum();
                        assert_eq!(bytes as usize, part.iter().filter(|flag| **flag).count());
                    }
                    // Neighbours are joined, so that equal sets are equal.
                    let runs = flags.windows(2).filter(|pair| !pair[0] && pair[1]).count() + usize::from(flags[0]);
                    assert_eq!(set.0.len(), runs);
                }
            }
        }
    }

    #[test]
    fn keeping_is_the_intersection() {
        let (mut set, mut other) = (Bytes::default(), Bytes::default());
        set.insert(0, 10);
        set.insert(20, 30);
        other.insert(5, 22);
        other.insert(25, 26);
        set.keep(&other);
        assert_eq!(set.within(0, 100), [(5, 10), (20, 22), (25, 26)]);
    }
}
