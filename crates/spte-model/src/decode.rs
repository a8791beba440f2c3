// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Operations out of arbitrary bytes, and bytes out of operations, for fuzzers and property tests.
//!
//! Each eight bytes are one operation, so that cutting, copying and splicing input cuts, copies and
//! splices operations. Each byte of a word decides one thing, and zero is always the plainest choice.
//! Addresses are drawn from a few places at the edges of leaves of every size, so that operations
//! meet; outputs mostly keep step with guest addresses, so that large leaves are possible and
//! neighbours merge. About one operation in sixteen is malformed. No operation makes or breaks up
//! more than a few thousand leaves, so that sequences stay fast.
//!
//! A word whose first byte is 0xff is followed by words with an operation's numbers as they are (little endian), so that
//! a sequence that somebody wrote down can be a seed: see [`Op::encode`]. The kind of operation says how many follow.

use crate::op::{Access, MemType, Op, PageChoice, TouchKind};
use crate::shape::Shape;

/// The first byte of a word whose operation's numbers follow it.
const LITERAL: u8 = 0xff;

impl Op {
    /// Decodes operations that are interesting on tables of this shape. Any bytes will do; a rest of less than eight is
    /// ignored.
    pub fn decode(shape: &Shape, bytes: &[u8]) -> Vec<Op> {
        let mut words = bytes.chunks_exact(8).filter_map(|word| <[u8; 8]>::try_from(word).ok());
        let mut ops = Vec::new();
        while let Some(word) = words.next() {
            ops.push(match word[0] {
                LITERAL => Op::from_literal(shape, word, || words.next().map_or(0, u64::from_le_bytes)),
                _ => Op::from_word(shape, word),
            });
        }
        ops
    }

    /// Bytes that [`Op::decode`] makes these operations of, for any shape; only a size that would make more leaves than
    /// decoded operations do comes back smaller.
    pub fn encode(ops: &[Op]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for op in ops {
            let (kind, numbers) = op.to_literal();
            bytes.extend(kind);
            numbers.into_iter().flatten().for_each(|number| bytes.extend(number.to_le_bytes()));
        }
        bytes
    }

    /// What follows [`LITERAL`]: the kind of operation; its rights, or its kind of touch; which leaf sizes; the memory
    /// type. Then the numbers.
    fn to_literal(self) -> ([u8; 8], [Option<u64>; 4]) {
        let mut access = Access::NONE;
        let (mut pages, mut memory) = (0, 0);
        let (kind, numbers) = match self {
            Op::Map { gpa, out, size, access: rights, page, mem } => {
                access = rights;
                memory = index(&MemType::ALL, &mem);
                let bytes = match page {
                    PageChoice::Granule => None,
                    PageChoice::Max => {
                        pages = 1;
                        None
                    }
                    PageChoice::Size(bytes) => {
                        pages = 2;
                        Some(bytes)
                    }
                };
                (0, [Some(gpa), Some(out), Some(size), bytes])
            }
            Op::Unmap { gpa, size } => (1, [Some(gpa), Some(size), None, None]),
            Op::Protect { gpa, size, access: rights } => {
                access = rights;
                (2, [Some(gpa), Some(size), None, None])
            }
            Op::WriteProtect { gpa, size } => (3, [Some(gpa), Some(size), None, None]),
            Op::Touch { gpa, kind } => {
                access = kind.needs();
                (4, [Some(gpa), None, None, None])
            }
            Op::Age { gpa, size } => (5, [Some(gpa), Some(size), None, None]),
            Op::Dirty { gpa, size } => (6, [Some(gpa), Some(size), None, None]),
            Op::Change { gpa, out } => (7, [Some(gpa), Some(out), None, None]),
            Op::ZapChange { gpa, out } => (8, [Some(gpa), Some(out), None, None]),
            Op::Split { gpa, size } => (9, [Some(gpa), Some(size), None, None]),
            Op::Collapse { gpa, size } => (10, [Some(gpa), Some(size), None, None]),
            Op::Walk { gpa } => (11, [Some(gpa), None, None, None]),
        };
        ([LITERAL, kind, index(&Access::ALL, &access), pages, memory, 0, 0, 0], numbers)
    }

    /// The inverse of [`Op::to_literal`], for any word. Numbers that are missing are 0.
    fn from_literal(shape: &Shape, word: [u8; 8], mut number: impl FnMut() -> u64) -> Op {
        let [_, kind, rights, pages, memory, ..] = word;
        let access = any(&Access::ALL, rights);
        let gpa = number();
        match kind % 12 {
            0 => {
                let (out, size) = (number(), number());
                let page = match pages % 3 {
                    0 => PageChoice::Granule,
                    1 => PageChoice::Max,
                    _ => PageChoice::Size(number()),
                };
                let unit = match page {
                    PageChoice::Granule => shape.granule(),
                    PageChoice::Size(bytes) => bytes,
                    PageChoice::Max => {
                        let fits = |leaf: &u64| (gpa ^ out) % leaf == 0;
                        shape.leaf_sizes().iter().copied().rev().find(fits).unwrap_or(shape.granule())
                    }
                };
                let most = if unit > shape.granule() { unit.saturating_mul(1 << 13) } else { limit(shape) };
                let op = |size| Op::Map { gpa, out, size, access, page, mem: any(&MemType::ALL, memory) };
                // What is malformed or refused makes nothing, however large.
                let made = shape.leaf_sizes().contains(&unit) && op(size).check(shape).is_ok();
                if made { op(size.min(most)) } else { op(size) }
            }
            1 => Op::Unmap { gpa, size: number() },
            2 => Op::Protect { gpa, size: number(), access },
            3 => Op::WriteProtect { gpa, size: number() },
            4 => {
                let kinds = [TouchKind::Read, TouchKind::Write, TouchKind::Execute];
                let kind = kinds.into_iter().find(|kind| kind.needs() == access).unwrap_or(TouchKind::Read);
                Op::Touch { gpa, kind }
            }
            5 => Op::Age { gpa, size: number() },
            6 => Op::Dirty { gpa, size: number() },
            7 => Op::Change { gpa, out: number() },
            8 => Op::ZapChange { gpa, out: number() },
            9 => {
                let size = number();
                let op = |size| Op::Split { gpa, size };
                if op(size).check(shape).is_ok() { op(size.min(limit(shape))) } else { op(size) }
            }
            10 => Op::Collapse { gpa, size: number() },
            _ => Op::Walk { gpa },
        }
    }

    /// Decodes one operation.
    pub(crate) fn from_word(shape: &Shape, word: [u8; 8]) -> Op {
        let [verb, place, edges, length, target, rights, options, spoil] = word;
        let page = gpa(shape, place, edges);
        let (gpa, size) = range(shape, page, length);
        // Everything, for operations that cut and make nothing then.
        let (from, wide) = if length < 0xf8 { (gpa, size) } else { (0, 1 << shape.gpa_bits()) };
        let out = |gpa| out(shape, gpa, target);
        let access = pick(shape.access(), rights).unwrap_or_else(|| any(&Access::ALL, rights));
        let limit = limit(shape);

        let op = match verb % 32 {
            0..=8 => {
                let out = out(gpa);
                let page = page_choice(shape, size, options);
                let mem = pick(shape.mem(), options >> 5).unwrap_or_default();
                let mem = if options >= 0xf8 { any(&MemType::ALL, options) } else { mem };
                let in_step = (gpa ^ out) % size.next_power_of_two() == 0;
                let by_granules = match page {
                    PageChoice::Granule => true,
                    PageChoice::Max => !in_step,
                    PageChoice::Size(page) => page == shape.granule(),
                };
                let size = if by_granules { size.min(limit) } else { size };
                Op::Map { gpa, out, size, access, page, mem }
            }
            9..=10 => Op::Unmap { gpa: from, size: wide },
            11..=12 => Op::Protect { gpa, size, access },
            13..=14 => Op::WriteProtect { gpa: from, size: wide },
            15..=19 => {
                let gpa = page + u64::from(target) * 16 % shape.granule();
                let kind = any(&[TouchKind::Read, TouchKind::Write, TouchKind::Execute], rights);
                Op::Touch { gpa, kind }
            }
            20..=21 => Op::Age { gpa: from, size: wide },
            22..=23 => Op::Dirty { gpa: from, size: wide },
            24..=25 => Op::Change { gpa: page, out: out(page) },
            26 => Op::ZapChange { gpa: page, out: out(page) },
            27..=28 => Op::Split { gpa, size: size.min(limit) },
            29..=30 => Op::Collapse { gpa: from, size: wide },
            _ => Op::Walk { gpa: page },
        };
        if spoil < 0xf0 { op } else { spoiled(shape, op, spoil) }
    }
}

/// A region, then for each leaf size a step from its beginning: often none, so that operations meet,
/// else next to it, or at or just before an end.
fn gpa(shape: &Shape, place: u8, edges: u8) -> u64 {
    // Both widths are powers of two, so what wraps around is still an address after the remainder.
    let whole: u64 = 1 << shape.gpa_bits();
    let region = match place & 7 {
        0..=4 => 0,
        5 => whole / 2,
        6 => whole.saturating_sub(largest(shape).saturating_mul(4)),
        // Just before the second table of the level above the largest leaf.
        _ => largest(shape).wrapping_mul(511),
    };
    let mut choices = usize::from(place >> 3) | usize::from(edges) << 5;
    let mut gpa = region;
    let mut above = largest(shape).saturating_mul(2);
    for &unit in shape.leaf_sizes().iter().rev() {
        let last = above / unit - 1;
        let steps = [0, 0, 0, 1, 0, last, 0, last / 2];
        gpa = gpa.wrapping_add(unit.wrapping_mul(steps[choices % 8]));
        choices >>= 3;
        above = unit;
    }
    gpa % whole
}

/// A few leaves of one size, mostly aligned to it, and always within the address width.
fn range(shape: &Shape, gpa: u64, length: u8) -> (u64, u64) {
    let sizes = shape.leaf_sizes();
    let index = usize::from(length & 7) * sizes.len() / 8;
    let unit = sizes[index];
    let ratio = sizes.get(index + 1).map_or(2, |above| above / unit);
    let counts = [1, 2, 4, 1, 3, ratio, ratio - 1, ratio / 2 + 1];
    let size = unit.saturating_mul(any(&counts, length >> 3));
    let gpa = if length < 0xc0 { gpa - gpa % unit } else { gpa };
    (gpa, size.min((1 << shape.gpa_bits()) - gpa))
}

/// Mostly in step with the guest address, in one of a few regions of its own; sometimes one granule
/// out of step; sometimes one fixed page, as merging makes.
fn out(shape: &Shape, gpa: u64, target: u8) -> u64 {
    let room = 1 << shape.out_bits();
    let window = largest(shape).saturating_mul(8).min(room);
    let out = match target {
        0..0xe0 => window.wrapping_mul(u64::from(target % 4)).wrapping_add(gpa % window),
        0xe0..0xf0 => shape.granule() + gpa % window,
        _ => shape.granule().wrapping_mul(5),
    };
    out % room
}

fn page_choice(shape: &Shape, size: u64, options: u8) -> PageChoice {
    // The largest leaf that the size is made of: likely to fit.
    let fitting = shape.leaf_sizes().iter().copied().rev().find(|leaf| size % leaf == 0);
    match options & 7 {
        0..=1 => PageChoice::Granule,
        2..=4 => PageChoice::Max,
        5..=6 => fitting.map_or(PageChoice::Max, PageChoice::Size),
        _ => PageChoice::Size(any(&PageChoice::WORDS, options >> 3).1),
    }
}

/// Breaks one rule of form. Operations on single pages and bytes have no size to spoil.
fn spoiled(shape: &Shape, mut op: Op, how: u8) -> Op {
    match &mut op {
        Op::Map { gpa, size, .. }
        | Op::Unmap { gpa, size }
        | Op::Protect { gpa, size, .. }
        | Op::WriteProtect { gpa, size }
        | Op::Age { gpa, size }
        | Op::Dirty { gpa, size }
        | Op::Split { gpa, size }
        | Op::Collapse { gpa, size } => match how % 8 {
            0 => *size = 0,
            1 => *gpa += shape.granule() / 2,
            2 => *size += 1,
            3 => *size = u64::MAX - (shape.granule() - 1),
            4 => *gpa = u64::MAX - (shape.granule() - 1),
            5 => *gpa = (1 << shape.gpa_bits()) - shape.granule(),
            6 => {
                *gpa += shape.granule();
                *size = 1 << shape.gpa_bits();
            }
            _ => *gpa = 1 << shape.gpa_bits(),
        },
        Op::Change { gpa, out } | Op::ZapChange { gpa, out } => match how % 4 {
            0 => *out += 8,
            1 => *gpa += 8,
            2 => *out = 1 << shape.out_bits(),
            _ => *gpa = u64::MAX - (shape.granule() - 1),
        },
        Op::Touch { gpa, .. } | Op::Walk { gpa } => *gpa = 1 << shape.gpa_bits(),
    }
    op
}

/// The most bytes that one operation breaks up or maps by granules: two tables of the last level, or one where that has
/// 8192 entries.
fn limit(shape: &Shape) -> u64 {
    let second = shape.leaf_sizes().get(1).copied().unwrap_or(u64::MAX);
    second.saturating_mul(2).min(shape.granule().saturating_mul(1 << 13))
}

fn largest(shape: &Shape) -> u64 {
    shape.leaf_sizes().last().copied().unwrap_or(shape.granule())
}

/// Something of a list that may be empty; rarely nothing, so that the unsupported is asked for too.
fn pick<T: Copy>(list: &[T], choice: u8) -> Option<T> {
    if choice >= 0xf0 || list.is_empty() {
        return None;
    }
    Some(list[usize::from(choice) % list.len()])
}

/// Something of a list that is not empty.
fn any<T: Copy>(list: &[T], choice: u8) -> T {
    list[usize::from(choice) % list.len()]
}

/// Where in a list something is; its first place if it is not there.
fn index<T: PartialEq>(list: &[T], item: &T) -> u8 {
    list.iter().position(|other| other == item).unwrap_or_default() as u8
}
