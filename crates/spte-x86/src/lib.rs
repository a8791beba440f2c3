// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The x86 page-table formats of secondary MMUs: Intel's EPT, AMD's NPT, and ordinary long mode for tables that a VMM
//! owns.
//!
//! Everything here is a pure function on one raw entry. The engine (`spte-core`) holds the tables; this crate says what
//! an entry means, how it is built, how one may be turned into another, and which entries are impossible.
//!
//! | to | look at |
//! |---|---|
//! | build a table of EPT entries | [`Ept`], [`EptOptions`] |
//! | build a table of NPT or long-mode entries | [`Npt`], [`LongMode`], [`LongModeOptions`] |
//! | repoint a leaf, which is all that `change_pte` may do | [`Format::set_spte`](spte_core::format::Format::set_spte) |
//! | mark emulated devices | [`MmioLayout`] |
//! | find out why hardware would refuse an entry | [`check`], `check_hardware` of both formats |
//! | fill VMCS, VMCB and control registers, read exit reasons | [`registers`] |
//! | choose cache types | [`memtype`] |
//! | know what a change owes, and carry out a flush | [`transition`], [`tlb`] |
//!
//! ```
//! use notifier_core::{Access, OutputAddr};
//! use spte_core::format::{Format, Level, LeafSpec};
//! use spte_x86::{Ept, EptAttrs, EptOptions};
//!
//! let ept = Ept::new(EptOptions::default())?;
//! let leaf = ept.leaf(Level::LEAF, &LeafSpec {
//!     output: OutputAddr::new(0x501_0000),
//!     access: Access::RWX,
//!     armed: false,
//!     accessed: true,
//!     dirty: true,
//!     attrs: EptAttrs::default(),
//! })?;
//! assert_eq!(leaf, 0x8600_0000_0501_0b77);
//!
//! // What `change_pte` reaches (Linux: `kvm_set_spte_gfn`): another page, read-only, not upgradable.
//! let moved = ept.set_spte(Level::LEAF, leaf, OutputAddr::new(0x777_7000))?;
//! assert_eq!(moved, 0x8000_0000_0777_7975);
//! assert_eq!(ept.upgrade(Level::LEAF, moved), None);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Behaviours, and the tests that check them
//!
//! Numbers are those of the project's list of KVM's invariants.
//!
//! | | rule | tests (`tests/`) |
//! |---|---|---|
//! | I23 | a changed leaf has W, host-writable and MMU-writable clear | `entries`: `change_is_read_only_and_not_upgradable` |
//! | I34 | only four (host, mmu, W) states exist | `entries`: `only_four_write_states_exist`, `check`: `impossible_write_states_are_refused` |
//! | I35 | host-writable comes back only with new rights | `entries`: `host_writable_never_comes_back_by_itself` |
//! | I36 | MMU-present exactly where memory is behind the entry | `entries`: `mmu_present_iff_backed` |
//! | I37 | what is built passes every reserved-bit rule | `entries`: `built_entries_pass_the_check`, `check`: `bad_set_of_low_six_bits` and the rest |
//! | I38 | an MMIO entry gives back address, access and generation | `mmio`: `mmio_round_trips_at_every_width` |
//! | I39 | a stale generation is no hit; a wrap is seen | `mmio`: `stale_generation_is_no_hit`, `wrap_asks_for_a_zap_of_all` |
//! | I40 | access tracking loses nothing but W | `entries`: `tracking_is_the_identity_minus_write`, `tracking_twice_is_tracking_once` |
//! | I41 | the dirty fact is lost only where it is reported | `entries`: `dirty_is_not_lost` |
//! | I45 | split and collapse keep every translation | `entries`: `split_translates_the_same`, `pat_bit_moves_between_7_and_12` |
//! | I54 | clearing MMU-writable owes a flush, W clear or not | `entries`: `clearing_mmu_writable_owes_a_flush` |
//! | I57 | no executable huge leaf under the mitigation | `entries`: `no_executable_huge_leaf_under_the_mitigation` |
//! | I58 | ageing touches nothing but accessed | `entries`: `ageing_keeps_output_rights_and_dirty` |
//! | I43 | absent, claimed and dead stay apart whatever hardware writes | `entries`: `three_values_survive_every_hardware_write` |
//! | | encodings agree with what Linux 6.12 computes | `linux_values`: `values_that_hold_nothing` and the rest |
//! | | a flush names the EPTP, the ASID, or each leaf; many leaves go together | `tlb`: `invept_names_the_table_where_it_can`, `an_asid_is_flushed_by_the_next_vmrun`, `each_leaf_is_named_once_whatever_its_size`, `more_than_33_leaves_go_together_and_global_ones_with_them` |
//! | | all that a table answers is what a sequential map of leaves would | `model` |
//!
//! # What it does not do
//!
//! - No shadow paging, no PAE or 32-bit tables, no sub-page permissions, no virtualization exceptions beyond the bit that
//!   suppresses them.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod bits;
pub mod check;
mod ept;
mod long_mode;
pub mod memtype;
pub mod mmio;
pub mod registers;
pub mod software;
pub mod tlb;
pub mod transition;

pub use bits::{Levels, OptionsError};
pub use check::HardwareKind;
pub use ept::{Ept, EptOptions};
pub use long_mode::{LongMode, LongModeFormat, LongModeOptions, Native, Nested, Npt, Usage};
pub use memtype::{EptAttrs, EptMemoryType, LongModeAttrs, MemoryType, Pat, PatSelector, ProtectionKey};
pub use mmio::{MmioAccess, MmioEntry, MmioError, MmioGeneration, MmioLayout, SlotGeneration};
pub use registers::{Cr3, EptCapabilities, EptPointer, EptViolation, NestedCr3, NestedFault, RegisterError};
pub use software::{AccessedDirty, WriteState};
pub use tlb::{Invept, Step, Steps, TlbControl};

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
