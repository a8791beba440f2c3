// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Encodings that Linux 6.12 computes, as literals: our builders must agree with them bit for bit.
//!
//! The values were taken from Linux's own `make_spte` and its callers, not from this crate.

mod common;

use common::{L1, level};
use notifier_core::{Access, OutputAddr};
use spte_core::format::{Format, LeafSpec, Level, WriteProtect};
use spte_x86::*;

fn ept() -> Ept {
    Ept::new(EptOptions::default()).unwrap()
}

fn npt() -> Npt {
    Npt::new(LongModeOptions { physical_bits: 48, ..LongModeOptions::default() }).unwrap()
}

fn armed<A: Default>(output: u64) -> LeafSpec<A> {
    LeafSpec { armed: true, ..common::spec(output, Access::RWX) }
}

fn read_only<A: Default>(output: u64) -> LeafSpec<A> {
    LeafSpec { dirty: false, ..common::spec(output, Access::RX) }
}

#[test]
fn ept_leaves_are_linux_leaves() {
    let ept = ept();
    assert_eq!(ept.leaf(L1, &common::spec(0x501_0000, Access::RWX)), Ok(0x8600_0000_0501_0b77));
    assert_eq!(ept.leaf(L1, &armed(0x501_0000)), Ok(0x8600_0000_0501_0b75));
    assert_eq!(ept.leaf(level(2), &armed(0x1020_0000)), Ok(0x8600_0000_1020_0bf5));
    assert_eq!(ept.leaf(L1, &read_only(0x501_2000)), Ok(0x8000_0000_0501_2975));
    assert_eq!(ept.write_protect(L1, 0x8600_0000_0501_0b77, WriteProtect::Arm), 0x8600_0000_0501_0b75);
    assert_eq!(ept.upgrade(L1, 0x8600_0000_0501_0b75), Some(0x8600_0000_0501_0b77));
}

#[test]
fn npt_leaves_are_linux_leaves() {
    let npt = npt();
    assert_eq!(npt.leaf(L1, &armed(0x501_0000)), Ok(0x0000_0000_0501_0e65));
    assert_eq!(npt.leaf(L1, &read_only(0x501_2000)), Ok(0x0000_0000_0501_2825));
    assert_eq!(npt.upgrade(L1, 0x0501_0e65), Some(0x0501_0e67));
    // As seen by hardware alone, at 1G: P, US, A and PS.
    let one_g = npt.leaf(level(3), &read_only(0x1_4000_0000)).unwrap();
    assert_eq!(one_g & 0x800f_ffff_ffff_f0a7, 0x1_4000_00a5);
}

#[test]
fn tables_are_linux_tables() {
    let child = OutputAddr::new(0x1234_5000);
    assert_eq!(ept().table(level(2), child), Ok(0x8000_0000_1234_5907));
    assert_eq!(ept().table(level(4), OutputAddr::new(0)), Ok(0x8000_0000_0000_0907));
    assert_eq!(npt().table(level(2), child), Ok(0x0000_0000_1234_5827));
    let disabled = common::ept(AccessedDirty::Disabled);
    assert_eq!(disabled.table(level(2), child), Ok(0x8010_0000_1234_5807));
}

#[test]
fn change_pte_of_linux_leaves() {
    // kvm_mmu_changed_pte_notifier_make_spte cleared W, host-writable and MMU-writable, and A too; ours keeps A.
    let moved = ept().set_spte(L1, 0x8600_0000_0501_0b77, OutputAddr::new(0x777_7000));
    assert_eq!(moved, Ok(0x8000_0000_0777_7975));
    let moved = npt().set_spte(L1, 0x0501_0e67, OutputAddr::new(0x777_7000));
    assert_eq!(moved, Ok(0x0777_7825));
    let huge = ept().set_spte(level(2), 0x8600_0000_1020_0bf5, OutputAddr::new(0x40_0000));
    assert_eq!(huge, Ok(0x8000_0000_0040_09f5));
}

#[test]
fn tracked_leaves_have_their_rights_in_54_and_56() {
    let ept = common::ept(AccessedDirty::Disabled);
    let young = ept.leaf(L1, &common::spec(0x501_0000, Access::RWX)).unwrap();
    // 63 suppress-#VE, 58 and 57 writable, 52 A/D disabled; no A, no D.
    assert_eq!(young, 0x8610_0000_0501_0877);
    // 59 remembers that it was writable.
    assert_eq!(ept.make_old(L1, young), 0x8f50_0000_0501_0870);
    let read_only = ept.leaf(L1, &read_only(0x501_2000)).unwrap();
    assert_eq!(read_only, 0x8010_0000_0501_2875);
    assert_eq!(ept.make_old(L1, read_only), 0x8150_0000_0501_2870);
    let read = ept.with_access(L1, read_only, Access::READ).unwrap();
    assert_eq!(ept.make_old(L1, read), 0x8050_0000_0501_2870);
}

#[test]
fn write_protect_only_has_type_two_and_no_use_of_dirty() {
    let ept = common::ept(AccessedDirty::WriteProtectOnly);
    let leaf = ept.leaf(L1, &common::spec(0x501_0000, Access::RWX)).unwrap();
    assert_eq!(leaf, 0x8620_0000_0501_0977);
    assert!(ept.is_dirty(L1, leaf));
    assert_eq!(ept.make_clean(L1, leaf | 0x200), 0x8620_0000_0501_0b75);
    assert!(!ept.is_dirty(L1, 0x8620_0000_0501_0b75));
}

#[test]
fn values_that_hold_nothing() {
    assert_eq!(ept().not_present(Level::LEAF).absent, 0x8000_0000_0000_0000);
    assert_eq!(npt().not_present(Level::LEAF).absent, 0x8000_0000_0000_0000);
    // Linux's frozen value is a stranger's: special, neither present nor one of ours.
    assert_eq!(ept().kind(L1, 0x8000_0000_0000_05a0), spte_core::format::Kind::Special);
}

#[test]
fn cache_types_of_leaves() {
    let attrs = |memory_type, ignore_pat| EptAttrs { memory_type, ignore_pat };
    let leaf = |attrs| ept().leaf(L1, &LeafSpec { attrs, ..read_only(0) }).unwrap() & 0x7f;
    assert_eq!(leaf(attrs(EptMemoryType::Uncacheable, true)), 0x45);
    assert_eq!(leaf(attrs(EptMemoryType::WriteCombining, false)), 0x0d);
    assert_eq!(leaf(attrs(EptMemoryType::WriteThrough, true)), 0x65);
    assert_eq!(leaf(attrs(EptMemoryType::WriteProtected, false)), 0x2d);
}
