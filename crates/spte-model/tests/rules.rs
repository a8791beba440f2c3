// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The rules of the script language that concern state, one test each, as short scripts.

use spte_model::{Access, Command, Leaf, Model, Op, Outcome, Shape, parse_script};

/// EPT whose software manages accessed and dirty.
fn software_ad() -> Shape {
    Shape::ept().with_hw_ad(false)
}

/// A format that can express everything, with many small leaf sizes.
fn tiny() -> Shape {
    Shape::new(&[0x1000, 0x4000, 0x10000], 20, 20).unwrap()
}

/// Runs a script whose comments are what each line must print, `;` between rows.
#[track_caller]
fn run(shape: Shape, script: &str) -> Model {
    let mut model = Model::new(shape.clone());
    for (number, command) in parse_script(&shape, script).unwrap() {
        let line = script.lines().nth(number - 1).unwrap();
        let Command::Op(op) = command else { panic!("{line}") };
        let printed = model.apply(&op).unwrap().to_string().replace('\n', ";");
        let expected = line.split_once('#').map_or("ok", |(_, comment)| comment.trim());
        assert_eq!(printed, expected, "line {number}: {line}");
    }
    model
}

/// Address and size of each leaf.
fn sizes(model: &Model) -> Vec<(u64, u64)> {
    model.leaves().map(|(gpa, leaf)| (gpa, leaf.size)).collect()
}

fn leaf(model: &Model, gpa: u64) -> Leaf {
    *model.leaf(gpa).unwrap().1
}

#[test]
fn rule_2_malformed_changes_nothing() {
    let mut model = run(Shape::ept(), "map 0 0 2m rwx page=2m");
    for line in ["unmap 0 0", "unmap 0x10 4k", "unmap 0 0x1010", "unmap 0 512t", "change 0 1"] {
        assert!(model.apply(&line.parse::<Op>().unwrap()).is_err(), "{line}");
        assert_eq!(sizes(&model), [(0, 2 << 20)]);
    }
}

#[test]
fn rule_4_map_over_present_changes_nothing() {
    let model = run(
        Shape::ept(),
        "map 0x400000 0 2m rwx page=2m
         map 0 0 16m rwx page=2m # refused present 0x400000
         map 0x5ff000 0 8k rwx # refused present 0x5ff000
         map 0x401000 0 4k rwx # refused present 0x401000
         map 0x3ff000 0 4k rwx
         map 0x600000 0 4k rwx",
    );
    assert_eq!(sizes(&model), [(0x3ff000, 0x1000), (0x400000, 0x200000), (0x600000, 0x1000)]);
}

#[test]
fn rule_4_default_page_is_the_granule() {
    let model = run(Shape::ept(), "map 0 0 2m rwx");
    assert_eq!(model.leaves().count(), 512);
    let model = run(Shape::new(&[1 << 16, 1 << 29], 40, 48).unwrap(), "map 0 0 512m rwx");
    assert_eq!(model.leaves().count(), 8192);
}

#[test]
fn rule_4_page_max_takes_the_largest_leaf_at_each_step() {
    let model = run(tiny(), "map 0x3000 0x3000 0x22000 r page=max");
    assert_eq!(
        sizes(&model),
        [
            (0x3000, 0x1000),
            (0x4000, 0x4000),
            (0x8000, 0x4000),
            (0xc000, 0x4000),
            (0x10000, 0x10000),
            (0x20000, 0x4000),
            (0x24000, 0x1000),
        ]
    );
    // Both sides must be aligned: these two agree modulo 0x4000 only, and then not even that.
    let model = run(tiny(), "map 0x10000 0x4000 0x10000 r page=max");
    assert_eq!(sizes(&model).len(), 4);
    let model = run(tiny(), "map 0x10000 0x1000 0x10000 r page=max");
    assert_eq!(sizes(&model).len(), 16);
}

#[test]
fn rule_4_a_named_page_fits_or_is_refused() {
    let model = run(
        Shape::ept(),
        "map 0x1000 0 2m rwx page=2m # refused page
         map 0 0x1000 2m rwx page=2m # refused page
         map 0 0 0x201000 rwx page=2m # refused page
         map 0 0 32m rwx page=32m # refused page
         map 0 0 4m rwx page=2m",
    );
    assert_eq!(sizes(&model), [(0, 0x200000), (0x200000, 0x200000)]);
}

#[test]
fn rule_4_unsupported_rights_and_memory_are_refused() {
    run(
        Shape::ept(),
        "map 0 0 4k w # refused perm
         map 0 0 4k wx # refused perm
         map 0 0 4k - # refused perm
         map 0 0 4k x mem=wc",
    );
    for shape in [Shape::npt(), Shape::x86_64(), Shape::x86_64_la57()] {
        run(
            shape,
            "map 0 0 4k x # refused perm
             map 0 0 4k w # refused perm
             map 0 0 4k - # refused perm
             map 0 0 4k rwx mem=wc # refused mem
             map 0 0 4k rw mem=uc",
        );
    }
}

#[test]
fn rule_4_refusals_are_ordered_present_page_perm_mem() {
    run(
        Shape::npt().with_mem(&[Default::default()]),
        "map 0 0 4k r
         map 0 0 4k w page=2m mem=uc # refused present 0x0
         map 0x1000 0 4k w page=2m mem=uc # refused page
         map 0x1000 0 4k w mem=uc # refused perm
         map 0x1000 0 4k r mem=uc # refused mem",
    );
}

#[test]
fn rule_4_installed_leaves_are_young_clean_and_writable() {
    for shape in [Shape::ept(), software_ad()] {
        let model = run(
            shape,
            "map 0 0x1000 4k rw
             dirty 0 4k # end 0
             touch 0 w # ok 0x1000",
        );
        assert!(leaf(&model, 0).accessed);
        assert!(model.writable(0));
    }
}

#[test]
fn rule_5_larger_leaves_are_cut_only_as_far_as_needed() {
    let model = run(
        tiny(),
        "map 0x10000 0x10000 0x10000 rwx page=64k
         unmap 0x15000 0x1000",
    );
    let cut = [
        (0x10000, 0x4000),
        (0x14000, 0x1000),
        (0x16000, 0x1000),
        (0x17000, 0x1000),
        (0x18000, 0x4000),
        (0x1c000, 0x4000),
    ];
    assert_eq!(sizes(&model), cut);

    // A range that begins and ends on the edges of smaller leaves cuts no deeper.
    let model = run(
        tiny(),
        "map 0 0 0x10000 rwx page=64k
         protect 0x4000 0x8000 r",
    );
    assert_eq!(sizes(&model), [(0, 0x4000), (0x4000, 0x4000), (0x8000, 0x4000), (0xc000, 0x4000)]);
    assert!(model.writable(0x3fff) && model.writable(0xc000));
    assert!(!model.writable(0x4000) && !model.writable(0xbfff));

    // Whole leaves are not cut at all.
    let model = run(
        tiny(),
        "map 0 0 0x20000 rwx page=64k
         wrprotect 0 0x10000",
    );
    assert_eq!(sizes(&model), [(0, 0x10000), (0x10000, 0x10000)]);
}

#[test]
fn rule_5_what_a_cut_makes_inherits_attributes_and_facts() {
    let model = run(
        tiny().with_hw_ad(true),
        "map 0 0x10000 0x10000 rwx page=64k mem=uc
         touch 0 w # ok 0x10000
         age 0 4k # ok 1
         unmap 0 0x1000",
    );
    let before = Leaf { size: 0x10000, out: 0x10000, ..leaf(&model, 0xc000) };
    for (gpa, leaf) in model.leaves() {
        assert!(leaf.dirty && !leaf.accessed);
        assert_eq!(*leaf, Leaf { size: leaf.size, out: 0x10000 + gpa, ..before });
    }
    let removed = [(0, Leaf { size: 0x1000, ..before })];
    assert_eq!(model.removed(), removed);
}

#[test]
fn rule_5_the_absent_is_skipped() {
    let model = run(
        tiny(),
        "map 0x4000 0 0x1000 rwx
         unmap 0x8000 0x8000
         protect 0 0x10000 r
         wrprotect 0 0x10000
         split 0 0x10000
         collapse 0 0x10000",
    );
    assert_eq!(sizes(&model), [(0x4000, 0x1000)]);
}

#[test]
fn rule_5_protect_with_unsupported_rights_is_refused() {
    let model = run(
        Shape::ept(),
        "map 0 0 2m rwx page=2m
         protect 0 4k w # refused perm
         protect 0 4k - # refused perm
         protect 0x400000 4k - # refused perm",
    );
    assert_eq!(sizes(&model), [(0, 0x200000)]);
    run(
        tiny(),
        "map 0 0 4k rwx
         protect 0 4k -
         touch 0 r # fault perm",
    );
}

#[test]
fn rule_6_a_write_restores_writing_and_logs_the_page() {
    for shape in [Shape::ept(), software_ad()] {
        let model = run(
            shape,
            "map 0 0x10000 16k rw
             wrprotect 0x1000 8k
             touch 0x1000 r # ok 0x11000
             dirty 0 16k # end 0
             touch 0x1008 w # ok 0x11008
             dirty 0 16k # 0x1000 0x1000;end 1",
        );
        // The harvest armed what was written, and only what was armed before.
        assert!(model.writable(0) && !model.writable(0x1000) && !model.writable(0x2000));
    }
}

#[test]
fn rule_6_logging_gives_no_right_that_was_not_granted() {
    run(
        Shape::ept(),
        "map 0 0 4k rx
         wrprotect 0 4k
         touch 0 w # fault perm
         touch 0 x # ok 0x0
         dirty 0 4k # end 0",
    );
}

#[test]
fn rule_6_logging_survives_new_rights() {
    let model = run(
        software_ad(),
        "map 0 0 8k r
         wrprotect 0 4k
         protect 0 8k rw",
    );
    assert!(!model.writable(0) && model.writable(0x1000));
}

#[test]
fn rule_6_arming_again_keeps_what_was_logged() {
    run(
        software_ad(),
        "map 0 0 4k rw
         wrprotect 0 4k
         touch 0 w # ok 0x0
         wrprotect 0 4k
         dirty 0 4k # 0x0 0x1000;end 1
         dirty 0 4k # end 0",
    );
}

#[test]
fn rule_7_touch_never_maps() {
    let model = run(
        Shape::ept(),
        "touch 0 r # fault absent
         map 0x2000 0 4k r
         touch 0x1fff r # fault absent
         touch 0x2fff r # ok 0xfff
         touch 0x3000 r # fault absent",
    );
    assert_eq!(sizes(&model), [(0x2000, 0x1000)]);
}

#[test]
fn rule_7_each_kind_needs_its_own_right() {
    run(
        tiny(),
        "map 0x0 0 4k x
         map 0x1000 0 4k w
         map 0x2000 0 4k r
         touch 0x0 x # ok 0x0
         touch 0x0 r # fault perm
         touch 0x1000 w # ok 0x0
         touch 0x1000 r # fault perm
         touch 0x2000 r # ok 0x0
         touch 0x2000 w # fault perm
         touch 0x2000 x # fault perm",
    );
}

#[test]
fn rule_7_hardware_sets_accessed_and_dirty() {
    run(
        Shape::ept(),
        "map 0 0 8k rw
         age 0 8k # ok 2
         touch 0 r # ok 0x0
         touch 0x1000 x # fault perm
         age 0 8k # ok 1
         touch 0x1000 w # ok 0x1000
         dirty 0 8k # 0x1000 0x1000;end 1
         touch 0x1000 r # ok 0x1000
         dirty 0 8k # end 0
         touch 0x1000 w # ok 0x1000
         dirty 0 8k # 0x1000 0x1000;end 1",
    );
}

#[test]
fn rule_7_without_hardware_an_old_leaf_faults_once() {
    run(
        software_ad(),
        "map 0 0 4k r
         age 0 4k # ok 1
         touch 0 w # fault af
         touch 0 w # fault perm
         touch 0 r # ok 0x0
         age 0 4k # ok 1",
    );
}

#[test]
fn rule_7_without_hardware_a_write_that_nobody_withheld_is_unseen() {
    run(
        software_ad(),
        "map 0 0 4k rw
         touch 0 w # ok 0x0
         dirty 0 4k # end 0",
    );
}

/// What arm64 may have (HA without HD), and EPT where its dirty bits are somebody else's.
#[test]
fn rule_7_hardware_may_set_accessed_alone() {
    run(
        software_ad().with_hw_accessed(true),
        "map 0 0 4k rw
         age 0 4k # ok 1
         touch 0 w # ok 0x0
         age 0 4k # ok 1
         dirty 0 4k # end 0
         wrprotect 0 4k
         touch 0 w # ok 0x0
         dirty 0 4k # 0x0 0x1000;end 1",
    );
}

/// The granule is what a page is, for repointing too.
#[test]
fn rule_9_arm64_repoints_pages_of_its_granule() {
    let model = run(
        Shape::arm64_stage2(16 << 10, 40, 48, false).unwrap(),
        "map 0x2000000 0x4000000 32m rw page=32m
         change 0x2004000 0x8000 # changed",
    );
    let repointed = leaf(&model, 0x2004000);
    assert_eq!((repointed.size, repointed.out, repointed.access), (0x4000, 0x8000, Access::R));
    assert_eq!(model.leaf_count(), 2048);
}

#[test]
fn rule_8_age_counts_young_leaves_and_makes_them_old() {
    let model = run(
        tiny(),
        "map 0 0 0x20000 r page=64k
         map 0x20000 0x20000 0x1000 r
         age 0x1000 0x1000 # ok 1
         age 0 0x30000 # ok 2
         age 0 0x30000 # ok 0",
    );
    // A larger leaf is counted once, and whole.
    assert_eq!(model.leaves().count(), 3);
}

#[test]
fn rule_8_dirty_reports_leaves_of_the_range_ascending() {
    let model = run(
        Shape::ept(),
        "map 0 0 2m rw page=2m
         map 0x200000 0x200000 16k rw
         touch 0x203000 w # ok 0x203000
         touch 0x201000 w # ok 0x201000
         touch 0x1000 w # ok 0x1000
         dirty 0x201000 4k # 0x201000 0x1000;end 1
         dirty 0x1ff000 1g # 0x0 0x200000;0x203000 0x1000;end 2
         dirty 0 1g # end 0",
    );
    assert_eq!(model.leaves().count(), 5);
}

#[test]
fn rule_9_change_is_read_only_until_rights_are_given_again() {
    let model = run(
        Shape::ept(),
        "map 0 0x10000 8k rwx mem=uc
         touch 0 w # ok 0x10000
         change 0 0x50000 # changed
         touch 0x8 r # ok 0x50008
         touch 0 x # ok 0x50000
         touch 0 w # fault perm
         wrprotect 0 4k
         touch 0 w # fault perm
         dirty 0 8k # 0x0 0x1000;end 1
         touch 0x1000 w # ok 0x11000",
    );
    let changed = leaf(&model, 0);
    assert_eq!((changed.access, changed.mem), (Access::RX, leaf(&model, 0x1000).mem));
    run(
        Shape::ept(),
        "map 0 0 4k rw
         change 0 0 # changed
         touch 0 w # fault perm
         protect 0 4k rw
         touch 0 w # ok 0x0",
    );
}

#[test]
fn rule_9_change_never_creates() {
    let model = run(
        Shape::ept(),
        "change 0 0x1000 # absent
         zapchange 0 0x1000 # absent",
    );
    assert_eq!(model.leaves().count(), 0);
}

#[test]
fn rule_9_a_larger_leaf_is_split_around_the_page() {
    let model = run(
        tiny(),
        "map 0x10000 0 0x10000 rw page=64k
         change 0x17000 0xff000 # changed",
    );
    assert_eq!(model.leaves().count(), 3 + 4);
    let outs: Vec<_> = model.extents().map(|extent| (extent.gpa, extent.out)).collect();
    assert_eq!(outs, [(0x10000, 0), (0x17000, 0xff000), (0x18000, 0x8000)]);

    let model = run(
        tiny(),
        "map 0x10000 0 0x10000 rw page=64k
         zapchange 0x17000 0xff000 # zapped",
    );
    assert_eq!(model.leaves().count(), 3 + 3);
    assert!(model.translate(0x17000).is_none());
    assert_eq!(model.removed().len(), 1);
}

#[test]
fn rule_9_what_cannot_be_read_only_is_zapped() {
    let shape = tiny().with_access(&[Access::W, Access::RW, Access::R]);
    let model = run(
        shape,
        "map 0 0 0x4000 w page=16k
         change 0x1000 0x5000 # zapped",
    );
    assert_eq!(sizes(&model), [(0, 0x1000), (0x2000, 0x1000), (0x3000, 0x1000)]);
}

#[test]
fn rule_10_split_goes_down_to_the_granule_within_the_range() {
    let model = run(
        tiny().with_hw_ad(true),
        "map 0 0 0x10000 rw page=64k
         touch 0 w # ok 0x0
         split 0x4000 0x5000",
    );
    let expected: Vec<_> = [(0, 0x4000)]
        .into_iter()
        .chain((4..12).map(|page| (page * 0x1000, 0x1000)))
        .chain([(0xc000, 0x4000)])
        .collect();
    assert_eq!(sizes(&model), expected);
    assert!(model.leaves().all(|(_, leaf)| leaf.dirty && leaf.accessed));
    assert_eq!(model.extents().count(), 1);
}

#[test]
fn rule_10_collapse_merges_as_far_as_the_range_allows() {
    let map = "map 0 0x10000 0x20000 rw\n";
    let model = run(tiny(), &format!("{map} collapse 0 0x20000"));
    assert_eq!(sizes(&model), [(0, 0x10000), (0x10000, 0x10000)]);
    let model = run(tiny(), &format!("{map} collapse 0 0x1f000"));
    assert_eq!(sizes(&model).len(), 1 + 3 + 4);
    let model = run(tiny(), &format!("{map} collapse 0x1000 0x6000"));
    assert_eq!(sizes(&model).len(), 32);
    let model = run(tiny(), &format!("{map} collapse 0x1000 0x7000"));
    assert_eq!(sizes(&model).len(), 32 - 3);

    // A leaf that begins before the range is not part of it.
    let map = "map 0 0 0x10000 rw page=16k";
    let model = run(tiny(), &format!("{map}\n collapse 0x1000 0xf000"));
    assert_eq!(sizes(&model).len(), 4);
}

#[test]
fn rule_10_collapse_needs_alignment_contiguity_and_equal_attributes() {
    for script in [
        "map 0 0x1000 0x4000 rw",
        "map 0 0 0x3000 rw",
        "map 0 0 0x2000 rw\n map 0x2000 0x3000 0x2000 rw",
        "map 0 0 0x2000 rw\n map 0x2000 0x2000 0x2000 r",
        "map 0 0 0x2000 rw\n map 0x2000 0x2000 0x2000 rw mem=uc",
        "map 0 0 0x4000 rw\n change 0 0 # changed",
        "map 0 0 0x4000 rw\n wrprotect 0x1000 4k",
    ] {
        let before = run(tiny(), script);
        let after = run(tiny(), &format!("{script}\n collapse 0 0x10000"));
        assert_eq!(sizes(&before), sizes(&after), "{script}");
    }
}

#[test]
fn rule_10_collapse_joins_accessed_and_dirty() {
    let model = run(
        tiny().with_hw_ad(true),
        "map 0 0 0x8000 rw
         age 0 0x8000 # ok 8
         touch 0x2000 w # ok 0x2000
         collapse 0 0x8000
         dirty 0 0x8000 # 0x0 0x4000;end 1
         age 0 0x8000 # ok 1",
    );
    assert_eq!(model.leaves().count(), 2);
}

#[test]
fn rule_11_walk_finds_the_leaf_over_an_address() {
    let mut model = run(Shape::ept(), "map 0x200000 0 2m rwx page=2m");
    let found = leaf(&model, 0x3fffff);
    let mut walk = |gpa| model.apply(&Op::Walk { gpa });
    assert_eq!(walk(0x234567), Ok(Outcome::Walk { leaf: Some((0x200000, found)) }));
    assert_eq!(walk(0x400000), Ok(Outcome::Walk { leaf: None }));
}

#[test]
fn more_leaves_than_memory_holds_are_rejected_unchanged() {
    let mut model = run(Shape::ept(), "map 0 0 1t rwx page=1g");
    for line in ["split 0 1t", "map 1099511627776 0 1t rwx", "map 1099511627776 0x1000 1t r page=max"] {
        let error = model.apply(&line.parse::<Op>().unwrap()).unwrap_err();
        assert_eq!(error.to_string(), "more than 4194304 leaves");
        assert_eq!(model.leaves().count(), 1024);
    }

    // What counts is the part in the range: the rest of a larger leaf is cut, not filled.
    let shape = Shape::new(&[1 << 12, 1 << 24, 1 << 36], 48, 48).unwrap();
    let model = run(
        shape,
        "map 0 0 64g r page=max
         split 0xffffff000 4k",
    );
    assert_eq!(model.leaves().count(), 4095 + 4096);
}
