// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What holds after every sequence of operations, on shapes of every kind.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;
use spte_model::{Access, Extent, Fault, Leaf, MemType, Model, Op, Outcome, PageChoice, Shape, TouchKind, coalesce};

fn tiny(hw_ad: bool) -> Shape {
    Shape::new(&[0x1000, 0x4000, 0x10000], 20, 22).unwrap().with_hw_ad(hw_ad)
}

fn shapes() -> impl Strategy<Value = Shape> {
    prop_oneof![
        Just(Shape::ept()),
        Just(Shape::npt().with_hw_ad(false)),
        Just(Shape::x86_64_la57()),
        Just(tiny(true)),
        Just(tiny(false)),
        // One leaf size; one granule of addresses; leaves larger than the space; huge leaves.
        Just(Shape::new(&[1 << 14], 36, 40).unwrap()),
        Just(Shape::new(&[1 << 12], 12, 12).unwrap()),
        Just(Shape::new(&[1 << 12, 1 << 21], 20, 20).unwrap()),
        Just(Shape::new(&[1 << 16, 1 << 29], 40, 48).unwrap()),
        Just(Shape::new(&[1 << 52, 1 << 62, 1 << 63], 63, 63).unwrap()),
    ]
}

fn bytes(words: usize) -> impl Strategy<Value = Vec<u8>> {
    vec(any::<[u8; 8]>(), 0..words).prop_map(|words| words.concat())
}

fn leaves(model: &Model) -> Vec<(u64, Leaf)> {
    model.leaves().map(|(gpa, leaf)| (gpa, *leaf)).collect()
}

/// Every leaf is one that the format could hold, and none overlaps another.
fn check_leaves(model: &Model) {
    let shape = model.shape();
    let mut end = 0;
    for (gpa, leaf) in model.leaves() {
        assert!(gpa >= end, "{gpa:#x} overlaps");
        end = gpa + leaf.size;
        assert!(shape.leaf_sizes().contains(&leaf.size));
        assert_eq!((gpa % leaf.size, leaf.out % leaf.size), (0, 0));
        assert!(end <= 1 << shape.gpa_bits() && leaf.out + leaf.size <= 1 << shape.out_bits());
        assert!(shape.supports(leaf.access) && shape.mem().contains(&leaf.mem));
    }
}

/// The same table by granules and without leaves: what each page translates to. It knows nothing of
/// sizes, cutting and merging.
#[derive(Default)]
struct Pages(BTreeMap<u64, (u64, Access, MemType)>);

impl Pages {
    fn apply(&mut self, op: &Op, outcome: &Outcome) {
        match (*op, outcome) {
            (Op::Map { gpa, out, size, access, mem, .. }, Outcome::Ok) => {
                for at in (0..size).step_by(0x1000) {
                    let before = self.0.insert(gpa + at, (out + at, access, mem));
                    assert_eq!(before, None);
                }
            }
            (Op::Map { .. }, Outcome::RefusedPresent { gpa }) => assert!(self.0.contains_key(gpa)),
            (Op::Unmap { gpa, size }, Outcome::Ok) => {
                self.0.retain(|page, _| !(gpa..gpa + size).contains(page));
            }
            (Op::Protect { gpa, size, access }, Outcome::Ok) => {
                self.0.range_mut(gpa..gpa + size).for_each(|(_, page)| page.1 = access);
            }
            (Op::Touch { gpa, kind }, outcome) => match (self.0.get(&(gpa & !0xfff)), outcome) {
                (None, Outcome::Fault(Fault::Absent)) => {}
                (Some(_), Outcome::Fault(Fault::AccessFlag)) => {}
                (Some(page), Outcome::Fault(Fault::Perm)) => {
                    assert!(!page.1.contains(kind.needs()));
                }
                (Some(page), Outcome::Touched { out }) => {
                    assert!(page.1.contains(kind.needs()));
                    assert_eq!(*out, page.0 | gpa & 0xfff);
                }
                other => panic!("{op}: {other:?}"),
            },
            (Op::Change { gpa, out }, Outcome::Changed) => {
                let page = self.0.get_mut(&gpa).unwrap();
                (page.0, page.1) = (out, page.1 - Access::W);
            }
            (Op::ZapChange { gpa, .. }, Outcome::Zapped) => {
                self.0.remove(&gpa).unwrap();
            }
            (Op::Change { gpa, .. } | Op::ZapChange { gpa, .. }, Outcome::Absent) => {
                assert!(!self.0.contains_key(&gpa));
            }
            (Op::Change { .. } | Op::ZapChange { .. }, other) => panic!("{op}: {other}"),
            _ => {}
        }
    }

    fn extents(&self) -> impl Iterator<Item = Extent> {
        coalesce(self.0.iter().map(|(&gpa, &(out, access, mem))| Extent {
            gpa,
            size: 0x1000,
            out,
            access,
            writable: false,
            mem,
        }))
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn every_sequence_leaves_a_possible_table(shape in shapes(), bytes in bytes(40)) {
        let mut model = Model::new(shape.clone());
        for op in Op::decode(&shape, &bytes) {
            let (before, extents) = (leaves(&model), model.extents().collect::<Vec<_>>());
            let answer = model.apply(&op);
            check_leaves(&model);
            prop_assert_eq!(answer.is_ok(), op.check(&shape).is_ok());
            match (op, answer) {
                (_, Err(_) | Ok(
                    Outcome::RefusedPresent { .. } | Outcome::RefusedPage
                    | Outcome::RefusedPerm | Outcome::RefusedMem,
                )) => prop_assert_eq!(leaves(&model), before),
                (Op::Map { gpa, out, size, page, .. }, Ok(_)) => {
                    prop_assert_eq!(model.translate(gpa).map(|page| page.out), Some(out));
                    let last = model.translate(gpa + size - 1).map(|page| page.out);
                    prop_assert_eq!(last, Some(out + size - 1));
                    if let PageChoice::Size(page) = page {
                        prop_assert_eq!(model.leaf(gpa).map(|(_, leaf)| leaf.size), Some(page));
                    }
                }
                (Op::Unmap { gpa, size }, Ok(_)) => {
                    let inside = |at: u64| (gpa..gpa + size).contains(&at);
                    prop_assert!(!model.leaves().any(|(at, _)| inside(at)));
                    prop_assert!(model.removed().iter().all(|&(at, _)| inside(at)));
                    prop_assert!(model.leaf(gpa).is_none() && model.leaf(gpa + size - 1).is_none());
                }
                (Op::Split { gpa, size }, Ok(_)) => {
                    prop_assert_eq!(model.extents().collect::<Vec<_>>(), extents);
                    for (_, leaf) in model.leaves().filter(|leaf| (gpa..gpa + size).contains(&leaf.0)) {
                        prop_assert_eq!(leaf.size, shape.granule());
                    }
                }
                (Op::Collapse { .. }, Ok(_)) => {
                    prop_assert_eq!(model.extents().collect::<Vec<_>>(), extents);
                    let after = leaves(&model);
                    model.apply(&op).unwrap();
                    prop_assert_eq!(leaves(&model), after);
                }
                (Op::Age { .. } | Op::Dirty { .. } | Op::Touch { .. } | Op::Walk { .. }, Ok(_)) => {
                    prop_assert_eq!(model.leaves().count(), before.len());
                }
                _ => {}
            }
        }
    }

    /// What a decoder is for: any bytes, and no operation that makes a table of millions of leaves.
    #[test]
    fn any_bytes_decode_to_operations_of_bounded_size(shape in shapes(), bytes in vec(any::<u8>(), 0..400)) {
        let mut model = Model::new(shape.clone());
        let ops = Op::decode(&shape, &bytes);
        prop_assert!(ops.len() <= bytes.len() / 8);
        for op in ops {
            let before = model.leaves().count();
            if let Ok(Outcome::Ok) = model.apply(&op) {
                prop_assert!(model.leaves().count() <= before + (1 << 18) + (1 << 15), "{}", op);
            }
        }
    }

    #[test]
    fn what_is_encoded_decodes_to_itself(shape in shapes(), words in bytes(40)) {
        let ops = Op::decode(&shape, &words);
        prop_assert_eq!(Op::decode(&shape, &Op::encode(&ops)), ops);
    }

    /// Each number of a literal is one word of the bytes: nothing is left out, and nothing is taken for another operation.
    #[test]
    fn literals_are_taken_as_they_are(numbers: [u64; 4], rights in 0_usize..8, mem in 0_usize..4, size in 0_u64..9) {
        let shape = tiny(true);
        let [gpa, out, page, _] = numbers;
        let (access, mem, size) = (Access::ALL[rights], MemType::ALL[mem], size * 0x1000);
        let ops = [
            Op::Map { gpa, out, size, access, page: PageChoice::Granule, mem },
            Op::Map { gpa, out, size, access, page: PageChoice::Max, mem },
            Op::Map { gpa, out, size, access, page: PageChoice::Size(page), mem },
            Op::Unmap { gpa, size: out },
            Op::Protect { gpa, size: out, access },
            Op::WriteProtect { gpa, size: out },
            Op::Touch { gpa, kind: TouchKind::Read },
            Op::Touch { gpa, kind: TouchKind::Write },
            Op::Touch { gpa, kind: TouchKind::Execute },
            Op::Age { gpa, size: out },
            Op::Dirty { gpa, size: out },
            Op::Change { gpa, out },
            Op::ZapChange { gpa, out },
            Op::Split { gpa, size },
            Op::Collapse { gpa, size: out },
            Op::Walk { gpa },
        ];
        prop_assert_eq!(Op::decode(&shape, &Op::encode(&ops)), ops);
    }

    #[test]
    fn leaves_translate_as_pages_would(hw_ad: bool, bytes in bytes(60)) {
        let shape = tiny(hw_ad);
        let (mut model, mut pages) = (Model::new(shape.clone()), Pages::default());
        for op in Op::decode(&shape, &bytes) {
            if let Ok(outcome) = model.apply(&op) {
                pages.apply(&op, &outcome);
            }
            let extents = model.leaves().map(|(gpa, leaf)| Extent {
                gpa,
                size: leaf.size,
                out: leaf.out,
                access: leaf.access,
                writable: false,
                mem: leaf.mem,
            });
            prop_assert!(coalesce(extents).eq(pages.extents()));
        }
    }

    /// The reason to log at all: between two harvests no write is missed, however leaves are cut,
    /// merged and protected meanwhile. Only what the whole page loses with its leaf is gone.
    #[test]
    fn no_write_goes_unreported(hw_ad: bool, bytes in bytes(60)) {
        let shape = tiny(hw_ad);
        let mut model = Model::new(shape.clone());
        let mut armed = BTreeMap::new();
        for op in Op::decode(&shape, &bytes) {
            let whole = Op::Dirty { gpa: 0, size: 1 << 20 };
            let Ok(outcome) = model.apply(&op) else { continue };
            match (op, outcome) {
                (Op::WriteProtect { gpa, size }, _) => {
                    let present = (gpa..gpa + size).step_by(0x1000).filter(|&page| model.leaf(page).is_some());
                    for page in present {
                        armed.entry(page).or_insert(false);
                    }
                }
                (Op::Touch { gpa, kind: TouchKind::Write }, Outcome::Touched { .. }) => {
                    if let Some(written) = armed.get_mut(&(gpa & !0xfff)) {
                        *written = true;
                    }
                }
                (Op::Dirty { .. }, outcome) => {
                    let mut rows = Vec::new();
                    for outcome in [outcome, model.apply(&whole).unwrap()] {
                        let Outcome::Dirty { rows: some } = outcome else { panic!("{outcome}") };
                        rows.extend(some);
                    }
                    for (page, written) in &mut armed {
                        let reported = |&(gpa, size): &(u64, u64)| (gpa..gpa + size).contains(page);
                        prop_assert!(!*written || rows.iter().any(reported), "{:#x}", page);
                        *written = false;
                    }
                }
                _ => armed.retain(|&page, _| model.leaf(page).is_some()),
            }
        }
    }
}

/// Cut anywhere, a literal is still an operation.
#[test]
fn a_literal_that_is_cut_off_decodes() {
    let op: Op = "map 0x200000 0x40000000 2m rwx page=2m".parse().unwrap();
    let bytes = Op::encode(&[op]);
    assert_eq!(bytes.len(), 40);
    for len in 0..=bytes.len() {
        let ops = Op::decode(&Shape::ept(), &bytes[..len]);
        assert_eq!(ops.len(), usize::from(len >= 8), "{len}");
        assert_eq!(ops == [op], len == bytes.len(), "{len}");
    }
}

/// Random bytes must reach what matters, or the properties above say little.
#[test]
fn decoded_operations_reach_every_outcome() {
    // A fixed multiplicative generator: the counts below are the same on every run.
    let mut state = 1_u64;
    let mut word = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 32) as u8
    };
    for shape in [Shape::ept(), tiny(false)] {
        let mut seen: BTreeMap<String, usize> = BTreeMap::new();
        for _ in 0..60 {
            let bytes: Vec<u8> = (0..60 * 8).map(|_| word()).collect();
            let mut model = Model::new(shape.clone());
            for op in Op::decode(&shape, &bytes) {
                let before = model.leaves().count();
                let text = match model.apply(&op) {
                    Err(reject) => format!("{reject:?}"),
                    Ok(Outcome::Dirty { rows }) => format!("dirty {}", !rows.is_empty()),
                    Ok(Outcome::Aged { young }) => format!("aged {}", young > 0),
                    Ok(Outcome::Walk { leaf }) => format!("walk {}", leaf.is_some()),
                    Ok(outcome @ (Outcome::Ok | Outcome::Changed | Outcome::Zapped)) => {
                        let cut = (model.leaves().count() > before, model.leaves().count() < before);
                        format!("{} {outcome} {cut:?}", op.to_string().split(' ').next().unwrap())
                    }
                    Ok(outcome) => outcome.to_string(),
                };
                let kind = text.split("0x").next().unwrap_or_default();
                let kind = kind.split(['{', ';']).next().unwrap_or_default().trim();
                *seen.entry(kind.to_string()).or_default() += 1;
            }
        }
        for expected in [
            "SizeZero",
            "Wraps",
            "Misaligned",
            "Beyond",
            "refused present",
            "refused page",
            "fault absent",
            "fault perm",
            "dirty true",
            "aged true",
            "walk true",
            "absent",
            "map ok (true, false)",
            "unmap ok (true, false)",
            "unmap ok (false, true)",
            "protect ok (true, false)",
            "wrprotect ok (true, false)",
            "split ok (true, false)",
            "collapse ok (false, true)",
            "change changed (true, false)",
            "change changed (false, false)",
            "zapchange zapped (true, false)",
        ] {
            assert!(seen.contains_key(expected), "no {expected} in {seen:#?}");
        }
    }
}
