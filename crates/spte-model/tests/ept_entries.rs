// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Model leaves against EPT entries taken apart by hand, to show that a model says enough to predict
//! what a format writes.

use spte_model::{Command, Leaf, MemType, Model, Shape, parse_script};

/// Intel SDM vol. 3, EPT leaf formats: R 0, W 1, X 2, memory type 5:3, ignore-PAT 6, leaf 7,
/// accessed 8, address from 12.
fn entry(leaf: &Leaf) -> u64 {
    use spte_model::Access;
    let mem = match leaf.mem {
        MemType::Uc => 0,
        MemType::Wc => 1,
        MemType::Wt => 4,
        MemType::Wb => 6,
    };
    u64::from(leaf.access.contains(Access::R))
        | u64::from(leaf.writable()) << 1
        | u64::from(leaf.access.contains(Access::X)) << 2
        | mem << 3
        | 1 << 6
        | u64::from(leaf.size > 0x1000) << 7
        | u64::from(leaf.accessed) << 8
        | leaf.out
}

#[test]
fn a_script_makes_these_entries() {
    let shape = Shape::ept();
    let mut model = Model::new(shape.clone());
    let script = "
        map 0x1d40000000 0x100000000 0x80000000 rwx page=1g mem=wb
        map 0x1f72e00000 0x96600000 0x400000 rx page=2m
        map 0xf1bcb0000 0x671e3000 0x3000 rwx page=4k
        map 0x3000 0xfee00000 4k rw mem=uc
        age 0x1f72e00000 0x200000
        wrprotect 0 0x1d80000000
        touch 0xf1bcb1000 w
        dump";
    for (_, command) in parse_script(&shape, script).unwrap() {
        if let Command::Op(op) = command {
            model.apply(&op).unwrap();
        }
    }
    let rows: Vec<_> = model.leaves().map(|(gpa, leaf)| (gpa, entry(leaf))).collect();
    let expected = [
        (0x3000, 0xfee0_0141),
        (0xf_1bcb_0000, 0x671e_3175),
        (0xf_1bcb_1000, 0x671e_4177),
        (0xf_1bcb_2000, 0x671e_5175),
        (0x1d_4000_0000, 0x1_0000_01f5),
        (0x1d_8000_0000, 0x1_4000_01f7),
        (0x1f_72e0_0000, 0x9660_00f5),
        (0x1f_7300_0000, 0x9680_01f5),
    ];
    assert_eq!(rows, expected);
}
