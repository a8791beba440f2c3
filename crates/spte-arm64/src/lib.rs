// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The arm64 page-table format of secondary MMUs: stage 2 of VMSAv8-64.
//!
//! Everything here is a pure function on one raw entry. The engine (`spte-core`) holds the tables; this crate says what
//! an entry means, how it is built, how one may be turned into another, and which entries are impossible.
//!
//! | to | look at |
//! |---|---|
//! | build a table | [`Stage2`], [`Stage2Options`] |
//! | repoint a leaf, which is all that `change_pte` may do | [`Format::set_spte`](spte_core::format::Format::set_spte) |
//! | know when an entry is broken before the new one is made | [`transition`] |
//! | carry out a flush | [`tlb`] |
//! | clean caches and tags around a mapping | [`maintenance`] |
//! | choose memory types | [`memtype`] |
//! | say who owns what is not mapped | [`Owner`] |
//! | find out why an entry is impossible | [`check`], [`Stage2::check_hardware`] |
//! | have or read contiguous sets | [`contiguous`] |
//! | fill VTCR_EL2 and VTTBR_EL2 | [`registers`] |
//!
//! ```
//! use notifier_core::{Access, OutputAddr};
//! use spte_arm64::{Stage2, Stage2Attrs, Stage2Options, Vtcr, VmidBits};
//! use spte_core::format::{Format, Level, LeafSpec};
//!
//! // 40 bits of guest addresses in 4K pages: walks begin at level 1, in two tables side by side.
//! let stage2 = Stage2::new(Stage2Options::default())?;
//! assert_eq!((stage2.start_level(), stage2.concatenated()), (1, 2));
//! assert_eq!(Vtcr::new(&stage2, VmidBits::Eight)?.raw(), 0x8005_3558);
//!
//! let leaf = stage2.leaf(Level::LEAF, &LeafSpec {
//!     output: OutputAddr::new(0x8000_1000),
//!     access: Access::RWX,
//!     armed: false,
//!     accessed: true,
//!     dirty: false,
//!     attrs: Stage2Attrs::default(),
//! })?;
//! // Bit 56 is software's: writing was resolved.
//! assert_eq!(leaf, 0x0100_0000_8000_17ff);
//!
//! // What `change_pte` reaches: another page, read-only, not upgradable; and as it was read-only before, and the contents
//! // are equal, no break-before-make.
//! let moved = stage2.set_spte(Level::LEAF, leaf, OutputAddr::new(0x777_7000))?;
//! assert_eq!(moved, 0x0777_777f);
//! let read_only = 0x8000_177f;
//! assert!(!stage2.equal_contents_transition(Level::LEAF, read_only, moved).break_first);
//! assert!(stage2.transition(Level::LEAF, read_only, moved).break_first);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Roots
//! The root of a [`Table`](spte_core::Table) of this format has as many entries as the addresses need: fewer than a table,
//! or up to 16 tables in a row. Its [`TableLayout`](spte_core::TableLayout) asks the page source for one piece of memory
//! of that size, aligned to it, which is what VTTBR_EL2 wants. (With more than 48 physical bits it wants 64 bytes at least:
//! a source of pages gives more than that anyway.)
//!
//! # Behaviours, and the tests that check them
//!
//! | behaviour | tests |
//! |---|---|
//! | start level and number of root tables, for every width and granule | `roots_begin_where_the_architecture_says`, `every_width_has_a_root_of_at_most_sixteen_tables`, `a_start_that_does_not_fit_is_refused` |
//! | each table of a concatenated root is used, and the root is aligned to all | `every_table_of_a_concatenated_root_is_walked`, `addresses_are_cut_into_the_manuals_indices` |
//! | 0b11 at level 3 is a page, and never followed | `three_at_the_last_level_is_a_page` |
//! | 52-bit addresses come back from leaves and links, and overlap no SH | `leaves_are_as_worked_out_by_hand`, `links_are_as_worked_out_by_hand`, `a_leaf_says_what_it_was_built_from`, `a_link_is_an_address_and_two_bits` |
//! | ordinary memory is 15 without FWB and 6 with it, and cacheable in both | `memory_types_of_leaves`, `the_cacheability_of_a_leaf_is_the_tables` |
//! | blocks at each level that may have them, and no other | `blocks_are_where_the_architecture_has_them`, `blocks_stand_at_their_levels_alone` |
//! | an annotation keeps its table; unmapping takes both | `an_owner_keeps_its_table_and_goes_with_an_unmap`, `an_owner_comes_back_from_its_entry` |
//! | software tests V before anything else | `an_invalid_entry_is_never_interpreted` |
//! | mapping what is there already writes and flushes nothing (Linux: -EAGAIN; here rights also rise in place) | `mapping_what_is_mapped_so_already_writes_nothing`, `rights_change_in_place` |
//! | mapping over an old leaf makes it young (Linux: break and make; here one store, as an old leaf is in no TLB) | `an_old_leaf_is_made_young_in_place` |
//! | a block over a table comes after a flush of the whole range, without a level hint (here the table must be empty) | `a_block_takes_the_place_of_an_empty_table_after_a_flush_of_its_range` |
//! | a smaller page in a block: the block is broken first | `a_split_is_broken_flushed_and_made_in_this_order` |
//! | no memory for a table: an error, and the table as it was | `i10_mapping_over_many_tables`, `i10_splitting` |
//! | part of a block unmapped: the rest stays (Linux: the block goes) | `part_of_a_block_unmapped_leaves_the_rest_as_it_was` |
//! | empty tables go, up to the root, which stays | `empty_tables_go_up_to_the_root_and_not_the_root` |
//! | invalid, flush, make: no valid entry over another | `a_split_is_broken_flushed_and_made_in_this_order`, `a_collapse_is_broken_flushed_and_made_in_this_order` |
//! | break-before-make where it is required, and only there | `memory_type_cacheability_and_shareability_break`, `another_output_breaks_unless_both_are_read_only_and_equal`, `a_change_of_size_breaks_unless_the_machine_does_without`, `a_link_to_another_table_breaks` |
//! | permissions alone are written directly | `rights_alone_never_break_and_flush_when_they_go`, `rights_change_in_place` |
//! | write protection flushes once; DBM goes with the right | `rights_change_in_place`, `a_retained_leaf_cannot_be_written_by_anybody` |
//! | ageing clears AF alone, flushes nothing, and says young once | `ageing_clears_the_access_flag_alone_and_owes_no_flush`, `an_old_leaf_is_made_young_in_place` |
//! | relaxing only adds, and touches no software bit | `mapping_what_is_mapped_so_already_writes_nothing`, `another_output_or_type_over_a_leaf_is_a_conflict` |
//! | a split keeps memory type, XN, software bits and AF | `a_split_says_the_same_and_a_device_stays_one`, `a_page_split_from_a_device_block_is_a_device` |
//! | a flush of a table carries no leaf hint | `a_level_hint_is_exact_or_absent`, `every_leaf_of_a_range_is_named` |
//! | stage 2, barrier, stage 1 | `stage_1_follows_stage_2_after_a_barrier` |
//! | a range beyond the guest's addresses is an error, one that ends with them is not | `ranges_end_where_guest_addresses_end` |
//! | `change_pte`: absent stays absent; a block is split; type, X and software bits stay; W goes; no break; one flush | `change_pte_repoints_without_a_break_and_never_creates`, `change_pte_of_a_page_of_a_block_splits_it_and_keeps_the_rest`, `change_is_read_only_not_upgradable_and_keeps_the_rest` |
//! | caches are cleaned unless FWB or DIC make it needless | `cache_duties_vanish_with_the_features_that_do_them` |
//! | members of a contiguous set are alike and in a row | `a_contiguous_set_is_alike_and_in_a_row`, `contiguous_sets_are_where_the_architecture_has_them` |
//! | a set is broken, flushed and made as one, and whatever changes a member dissolves it first | `a_fold_breaks_all_flushes_the_span_and_makes_all`, `what_changes_one_writable_member_dissolves_the_set_first`, `a_whole_set_is_unmapped_with_one_flush` |
//! | facts are the set's | `a_write_that_another_member_recorded_is_not_lost`, `a_set_is_young_if_one_member_is_and_ages_as_a_whole` |
//! | what was unmapped is filled again only after a flush | `what_was_unmapped_is_filled_after_a_flush`, `a_table_takes_a_blocks_place_after_a_flush`, `after_a_failed_flush_what_was_unmapped_is_flushed_again_before_it_is_filled` |
//! | all that a table answers is what a sequential map of leaves would | `granule_4k_without_hardware_facts_does_as_the_model`, `granule_4k_with_hardware_facts_does_as_the_model`, and the others of `tests/model.rs` |
//!
//! # What it does not do
//!
//! - No stage 1, no 128-bit descriptors (FEAT_D128), no permission indirection (S2PIE, S2POE), no tables of Realm or Secure
//!   state, no FEAT_BBM level 1 staging.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod bits;
pub mod check;
pub mod contiguous;
pub mod maintenance;
pub mod memtype;
pub mod registers;
pub mod software;
mod stage2;
pub mod tlb;
pub mod transition;

pub use bits::{Granule, OptionsError, Start};
pub use check::HardwareKind;
pub use contiguous::ContiguousSet;
pub use maintenance::{CacheFeatures, Duties, Maintenance};
pub use memtype::{Cache, Device, ExecuteAt, MemoryType, Shareability, Stage2Attrs};
pub use registers::{RegisterError, VmidBits, Vtcr, Vttbr};
pub use software::{AccessedDirty, Owner, WriteState};
pub use stage2::{Stage2, Stage2Options};
pub use tlb::{Barrier, Step, Steps, TlbFeatures, Tlbi};
pub use transition::BreakLevel;

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
