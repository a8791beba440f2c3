// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Every entry of arm64 stage 2 that can be built says, through `decode --json`, what it was built from: read back from the
//! fields' values alone, by the manual's tables, which are written out below.

mod common;

use std::collections::BTreeMap;

use common::spte;
use notifier_core::{Access, OutputAddr};
use proptest::prelude::*;
use serde_json::Value;
use spte_arm64::{
    AccessedDirty, BreakLevel, Cache, Device, ExecuteAt, Granule, MemoryType, Shareability, Stage2, Stage2Attrs,
    Stage2Options, Start,
};
use spte_core::format::{Format, LeafSpec, Level};
use spte_tool::decode;

/// The fields of the only reading, by name.
fn fields(object: &Value) -> BTreeMap<String, u64> {
    let [reading] = object["readings"].as_array().unwrap().as_slice() else { panic!("{object}") };
    assert!(reading["rule_broken"].is_null() && reading["software_rule_broken"].is_null(), "{object}");
    let number = |field: &Value| u64::from_str_radix(&field["value"].as_str().unwrap()[2..], 16).unwrap();
    let mut fields: BTreeMap<String, u64> = BTreeMap::new();
    for field in reading["fields"].as_array().unwrap() {
        let name = field["name"].as_str().unwrap();
        // Of addresses what the words say, which is where the bits belong; of everything else the value.
        let value = if name.ends_with("address") || name.starts_with("OA[") {
            u64::from_str_radix(&field["meaning"].as_str().unwrap()[2..], 16).unwrap()
        } else {
            number(field)
        };
        assert_eq!(fields.insert(name.into(), value), None, "{object}");
    }
    fields
}

fn get(fields: &BTreeMap<String, u64>, name: &str) -> u64 {
    fields.get(name).copied().unwrap_or(0)
}

fn output(fields: &BTreeMap<String, u64>, name: &str) -> u64 {
    get(fields, name) | get(fields, "OA[51:48]") | get(fields, "OA[51:50]")
}

fn memory(value: u64, fwb: bool) -> MemoryType {
    let cache = |bits| match bits {
        1 => Cache::NonCacheable,
        2 => Cache::WriteThrough,
        3 => Cache::WriteBack,
        _ => panic!("{value} is reserved"),
    };
    match (value, fwb) {
        (0, _) => MemoryType::Device(Device::NGnRnE),
        (1, _) => MemoryType::Device(Device::NGnRE),
        (2, _) => MemoryType::Device(Device::NGRE),
        (3, _) => MemoryType::Device(Device::GRE),
        (5, true) => MemoryType::NON_CACHEABLE,
        (6, true) => MemoryType::WRITE_BACK,
        (7, true) => MemoryType::Stage1,
        (_, true) => panic!("{value} is reserved"),
        (_, false) => MemoryType::Normal { outer: cache(value >> 2), inner: cache(value & 3) },
    }
}

/// What the fields of a leaf say.
fn spec_of(options: &Stage2Options, fields: &BTreeMap<String, u64>) -> LeafSpec<Stage2Attrs> {
    let (read, write) = (get(fields, "S2AP[1:0]") & 1 == 1, get(fields, "S2AP[1:0]") & 2 == 2);
    let (dbm, upgradable) = (get(fields, "DBM") == 1, get(fields, "software use: upgradable") == 1);
    let xn = get(fields, "XN[1:0]");
    let mut access = Access::empty();
    access.set(Access::READ, read);
    access.set(Access::WRITE, write || dbm || upgradable);
    access.set(Access::EXECUTE, xn != 2);
    let place = match (xn, options.xnx) {
        // Remembered, where the page executes nowhere.
        (2, true) => get(fields, "PBHA[3:0]") & 3,
        (2, false) => 0,
        (xn, _) => xn,
    };
    let shareability = match get(fields, "SH[1:0]") {
        _ if options.lpa2 => options.shareability,
        0 => Shareability::NonShareable,
        2 => Shareability::Outer,
        3 => Shareability::Inner,
        other => panic!("{other} is reserved"),
    };
    LeafSpec {
        output: OutputAddr::new(output(fields, "Output address")),
        access,
        armed: upgradable && !write && !dbm,
        accessed: get(fields, "AF") == 1,
        dirty: write || get(fields, "software use: dirty fact") == 1,
        attrs: Stage2Attrs {
            memory: memory(get(fields, "MemAttr[3:0]"), options.fwb),
            shareability,
            execute: match place {
                0 => ExecuteAt::Both,
                1 => ExecuteAt::El0,
                3 => ExecuteAt::El1,
                other => panic!("{other} executes nowhere"),
            },
            software: get(fields, "software use: the user's") == 1,
        },
    }
}

/// What an entry can say of what it was asked to: where hardware records no writes, who may write has written.
fn expressible(options: &Stage2Options, spec: LeafSpec<Stage2Attrs>) -> LeafSpec<Stage2Attrs> {
    let writable = spec.access.contains(Access::WRITE);
    let armed = spec.armed && writable;
    let records = options.accessed_dirty == AccessedDirty::Hardware;
    LeafSpec { armed, dirty: spec.dirty || (writable && !armed && !records), ..spec }
}

/// Options of every machine that there can be; those that there cannot be are left out by who uses them.
fn machine() -> impl Strategy<Value = Stage2Options> {
    let features = (any::<bool>(), any::<bool>(), any::<bool>());
    (
        prop::sample::select(vec![Granule::K4, Granule::K16, Granule::K64]),
        (32_u8..=52, 32_u8..=52),
        features,
        prop_oneof![
            3 => Just(Start::FewestLevels), 1 => Just(Start::SingleTable), 1 => (-1_i8..=2).prop_map(Start::Level)
        ],
        prop::sample::select(vec![AccessedDirty::Software, AccessedDirty::HardwareAccessed, AccessedDirty::Hardware]),
        prop::sample::select(vec![Shareability::NonShareable, Shareability::Outer, Shareability::Inner]),
        prop::sample::select(vec![BreakLevel::Level0, BreakLevel::Level1, BreakLevel::Level2]),
    )
        .prop_map(
            |(
                granule,
                (ipa_bits, physical_bits),
                (lpa2, fwb, xnx),
                start,
                accessed_dirty,
                shareability,
                break_level,
            )| {
                Stage2Options {
                    granule,
                    ipa_bits,
                    physical_bits,
                    lpa2: lpa2 && granule != Granule::K64,
                    start,
                    fwb,
                    xnx,
                    accessed_dirty,
                    shareability,
                    break_level,
                }
            },
        )
}

/// Some leaf, with its output and attributes not yet cut to what a machine has.
fn leaf() -> impl Strategy<Value = LeafSpec<Stage2Attrs>> {
    let memory: Vec<MemoryType> = [false, true]
        .iter()
        .flat_map(|fwb| (0..16).filter_map(|value| MemoryType::from_mem_attr(value, *fwb)))
        .collect();
    (
        any::<u64>(),
        0_u8..8,
        any::<(bool, bool, bool, bool)>(),
        prop::sample::select(memory),
        prop::sample::select(vec![Shareability::NonShareable, Shareability::Outer, Shareability::Inner]),
        prop::sample::select(vec![ExecuteAt::Both, ExecuteAt::El0, ExecuteAt::El1]),
    )
        .prop_map(|(output, access, (armed, accessed, dirty, software), memory, shareability, execute)| LeafSpec {
            output: OutputAddr::new(output),
            access: Access::from_bits_truncate(access),
            armed,
            accessed,
            dirty,
            attrs: Stage2Attrs { memory, shareability, execute, software },
        })
}

/// `spec` as far as leaves at `level` of this machine have it.
fn cut(format: &Stage2, level: Level, spec: LeafSpec<Stage2Attrs>) -> LeafSpec<Stage2Attrs> {
    let options = format.options();
    let attrs = spec.attrs;
    let width = (1_u64 << options.physical_bits) - 1;
    LeafSpec {
        output: OutputAddr::new(spec.output.as_u64() & width & !(format.geometry().span(level) - 1)),
        attrs: Stage2Attrs {
            memory: attrs.memory.mem_attr(options.fwb).map_or(MemoryType::WRITE_BACK, |_| attrs.memory),
            shareability: if options.lpa2 { options.shareability } else { attrs.shareability },
            execute: if options.xnx { attrs.execute } else { ExecuteAt::Both },
            ..attrs
        },
        ..spec
    }
}

fn levels(format: &Stage2, leaves: bool) -> Vec<Level> {
    let all = (-1_i8..=3).filter_map(|number| format.level_of(number));
    all.filter(|level| if leaves { format.geometry().level(*level).leaf } else { *level > Level::LEAF }).collect()
}

proptest! {
    #![proptest_config(ProptestConfig {
        failure_persistence: None, cases: 4096, max_global_rejects: 1 << 20, ..ProptestConfig::default()
    })]

    #[test]
    fn a_leaf_of_any_machine_says_what_it_was_built_from(
        options in machine(), spec in leaf(), level in any::<prop::sample::Index>()
    ) {
        let Ok(format) = Stage2::new(options) else { return Err(TestCaseError::reject("no such machine")) };
        let level = *level.get(&levels(&format, true));
        let spec = cut(&format, level, spec);
        let raw = format.leaf(level, &spec).unwrap();
        let object = decode::json(&format, Some(level), raw);
        prop_assert_eq!(&object["readings"][0]["kind"], "leaf");
        let summary = object["readings"][0]["summary"].as_str().unwrap();
        let place = format!(" at {:#x}, ", spec.output.as_u64());
        prop_assert!(summary.contains(&place), "{}", summary);
        prop_assert_eq!(spec_of(&options, &fields(&object)), expressible(&options, spec), "{}", object);
        // And none of the bits that hardware reads is masked out of a dump.
        let mask = spte_tool::format::ToolFormat::mask(&format, level, spte_tool::format::Form::Leaf).unwrap();
        prop_assert_eq!(format.spec(level, raw & mask).output, spec.output);
        prop_assert_eq!(raw & !mask & !(0x3f << 55), 0);
    }

    #[test]
    fn a_link_of_any_machine_says_where_it_leads(options in machine(), to in any::<u64>(), level in any::<prop::sample::Index>()) {
        let Ok(format) = Stage2::new(options) else { return Err(TestCaseError::reject("no such machine")) };
        let links = levels(&format, false);
        prop_assume!(!links.is_empty());
        let level = *level.get(&links);
        let to = to & ((1 << options.physical_bits) - 1) & !(options.granule.bytes() - 1);
        let raw = format.table(level, OutputAddr::new(to)).unwrap();
        let object = decode::json(&format, Some(level), raw);
        prop_assert_eq!(&object["readings"][0]["kind"], "table");
        let summary = format!("a link to the table at {to:#x}");
        prop_assert_eq!(&object["readings"][0]["summary"], &summary);
        prop_assert_eq!(output(&fields(&object), "Next-level table address"), to, "{}", object);
    }

    /// What the command can be asked for: no FWB, and XN in two bits.
    #[test]
    fn a_leaf_decoded_by_the_command_says_what_it_was_built_from(
        granule in prop::sample::select(vec![Granule::K4, Granule::K16, Granule::K64]),
        (ipa_bits, pa_bits) in (32_u8..=52, 32_u8..=52), hw_ad: bool, spec in leaf(), level in any::<prop::sample::Index>()
    ) {
        let wide = ipa_bits > 48 || pa_bits > 48;
        let lpa2 = wide && granule != Granule::K64;
        let accessed_dirty = if hw_ad { AccessedDirty::Hardware } else { AccessedDirty::Software };
        let physical_bits = if wide && !lpa2 && pa_bits <= 48 { 52 } else { pa_bits };
        let options =
            Stage2Options { granule, ipa_bits, physical_bits, lpa2, xnx: true, accessed_dirty, ..Stage2Options::default() };
        let format = Stage2::new(options).unwrap();
        let level = *level.get(&levels(&format, true));
        let spec = cut(&format, level, spec);
        let raw = format.leaf(level, &spec).unwrap();
        let number = format.level_number(level);
        let line = format!(
            "decode --json --format arm64-s2 --granule {}k --ipa-bits {ipa_bits} --pa-bits {pa_bits} --hw-ad={} --level {number} {raw:#x}",
            granule.bytes() >> 10,
            if hw_ad { "on" } else { "off" },
        );
        let (status, out, err) = spte(&line.split(' ').collect::<Vec<_>>(), b"");
        prop_assert_eq!((status, err.as_str()), (0, ""));
        let object: Value = serde_json::from_str(&out).unwrap();
        prop_assert_eq!(&object["raw"], &format!("{raw:016x}"));
        prop_assert_eq!(spec_of(&options, &fields(&object)), expressible(&options, spec), "{}", line);
    }
}
