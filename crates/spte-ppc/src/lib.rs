// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The Power page-table format of secondary MMUs: partition-scoped radix trees (Book3S-64, Power ISA 3.0 and 3.1).
//!
//! Everything here is a pure function on one raw entry. The engine (`spte-core`) holds the tables; this crate says what
//! an entry means, how it is built, how one may be turned into another, and which entries are impossible.
//!
//! | to | look at |
//! |---|---|
//! | build a tree | [`Radix`], [`RadixOptions`] |
//! | repoint a leaf, which is all that `change_pte` may do | [`Format::set_spte`](spte_core::format::Format::set_spte) |
//! | know the order of invalid, `tlbie`, write, and why | [`transition`] |
//! | carry out a flush | [`tlb`] |
//! | choose storage attributes | [`memtype`] |
//! | know which bits are software's, and why there is no claim bit | [`software`] |
//! | find out why an entry is impossible | [`check`], [`Radix::check_hardware`] |
//! | fill the partition table and PTCR | [`registers`] |
//! | ask for the hashed page table | [`hpt`]: not here yet |
//!
//! ```
//! use notifier_core::{Access, OutputAddr};
//! use spte_ppc::{BasePage, PartitionEntry, Radix, RadixAttrs, RadixOptions};
//! use spte_core::format::{Format, Level, LeafSpec};
//!
//! let radix = Radix::new(RadixOptions { page: BasePage::K4, ..RadixOptions::default() })?;
//! let leaf = radix.leaf(Level::LEAF, &LeafSpec {
//!     output: OutputAddr::new(0x1_2345_6000),
//!     access: Access::RWX,
//!     armed: false,
//!     accessed: true,
//!     dirty: true,
//!     attrs: RadixAttrs::default(),
//! })?;
//! // IBM bit 52 is software's: writing was resolved.
//! assert_eq!(leaf, 0xc000_0001_2345_6987);
//! // Big-endian in memory.
//! assert_eq!(radix.memory_of(leaf).to_ne_bytes(), [0xc0, 0, 0, 1, 0x23, 0x45, 0x69, 0x87]);
//!
//! // What `change_pte` reaches: another page, read-only, not upgradable, clean. The old entry is broken first.
//! let moved = radix.set_spte(Level::LEAF, leaf, OutputAddr::new(0x7000))?;
//! assert_eq!(moved, 0xc000_0000_0000_7105);
//! assert!(radix.equal_contents_transition(Level::LEAF, leaf, moved).break_first);
//!
//! // What the partition table says: radix, 52 bits, the root, 2^13 entries; and the guest's process table, 64K.
//! let entry = PartitionEntry::new(&radix, OutputAddr::new(0x1000_0000), 0x4000_0000, 16)?;
//! assert_eq!(entry.raw(), [0xc000_0000_1000_00ad, 0x8000_0000_4000_0004]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Tables
//! There is one shape of tree: a root of 64K, tables of 4K below it, and leaf tables of 4K, or **of 256 bytes** where the base
//! page is 64K. Each is aligned to its own size. A page source is asked for pieces of these sizes
//! ([`TableLayout`](spte_core::TableLayout)): one that takes 256 bytes from a page of its own has sixteen of them there, and
//! counts tables, not pages.
//!
//! # Behaviours, and the tests that check them
//!
//! | behaviour | tests |
//! |---|---|
//! | words are big-endian in memory, whatever the host is | `entries_are_big_endian_in_memory`, `a_table_in_memory_is_big_endian` |
//! | base pages of 4K and 64K, 2M and 1G in both; leaf tables of 512 and of 32 entries | `addresses_are_cut_as_worked_out_by_hand`, `there_is_one_shape_of_tree_for_each_base_page` |
//! | a leaf table of 64K pages has 256 bytes, and lies at any multiple of them | `tables_of_256_bytes_lie_at_every_multiple`, `links_are_as_worked_out_by_hand` |
//! | leaves as the manual draws them | `leaves_are_as_worked_out_by_hand`, `a_leaf_says_what_it_was_built_from`, `rpn_bits_below_the_size_of_a_leaf_say_nothing` |
//! | NLS is the next level's bits; another is refused and never followed | `a_directory_entry_of_another_shape_is_not_followed`, `a_link_is_an_address_and_its_size` |
//! | RTS in two pieces; partition and process entries, PTCR | `the_size_of_a_tree_is_in_two_pieces`, `partition_entries_are_as_worked_out_by_hand`, `process_entries_are_roots`, `the_partition_table_has_room_for_so_many` |
//! | PRTS above 24, hash partitions, other shapes of tree are refused | `registers_refuse_what_is_reserved`, `every_address_bit_of_a_register_counts` |
//! | R and C alone are an empty entry | `three_values_survive_every_hardware_write` |
//! | an update keeps R and C that come meanwhile | `touch_sets_referenced_and_changed`, `i12_no_write_is_lost` |
//! | C that comes after the entry was taken away, until the flush, is told | `a_late_change_after_an_unmap_is_told`, `a_late_change_during_change_pte_is_told_for_the_old_page`, `a_late_reference_during_change_pte_stays_with_the_page`, `a_late_change_during_a_split_goes_to_the_pages` |
//! | bit 8 is R in a leaf and an address bit in a link: no link is taken for the one beside it, with mirrors either | `a_link_to_the_table_beside_it_is_another_link`, `what_a_guest_writes_into_the_mirror_of_a_link_is_no_fact` |
//! | with mirrors C that comes late is told too | `what_a_processor_stores_late_into_a_mirror_is_told`, `what_a_processor_stores_late_during_a_collapse_goes_to_the_larger_leaf`, `a_late_fact_stays_when_a_claim_is_given_back` |
//! | unmapping a dirty leaf reports all of it | `a_dirty_large_leaf_is_reported_whole` |
//! | invalidations carry the AP of the leaf, and its aligned address; several sizes take the whole partition | `operands_are_as_worked_out_by_hand`, `every_leaf_of_a_range_is_named_with_its_size`, `a_range_of_several_sizes_takes_the_partition` |
//! | the page-walk cache is flushed before a table goes | `a_link_that_goes_takes_the_page_walk_cache_first`, `an_unmapped_table_is_flushed_with_its_link` |
//! | `ptesync`, `tlbie`, `eieio; tlbsync; ptesync`; POWER9's fixes | `a_flush_is_framed_by_barriers`, `fixes_repeat_the_last_invalidation` |
//! | mapping what is there already: nothing is written; more rights: no flush | `mapping_what_is_mapped_so_already_writes_nothing`, `rights_change_in_place` |
//! | a leaf to another page is a conflict, and never ORed in | `another_output_over_a_leaf_is_a_conflict` |
//! | a smaller page in a larger leaf: invalid, flush, make; the rest stays | `a_split_is_broken_flushed_and_made_in_this_order`, `part_of_a_large_leaf_unmapped_leaves_the_rest` |
//! | a larger leaf in a table's place comes after the flush | `a_collapse_is_broken_flushed_and_made_in_this_order` |
//! | ageing clears R alone, flushes nothing, and a large leaf is young once | `ageing_clears_referenced_alone_and_owes_no_flush`, `a_large_leaf_is_young_once` |
//! | a harvest clears C, flushes, and says the whole leaf | `a_harvest_clears_changed_and_flushes` |
//! | `change_pte`: invalid, flush, write; absent stays absent; R, ATT, X stay; W goes; C is reported | `change_pte_breaks_flushes_and_makes`, `change_pte_never_creates`, `change_is_read_only_not_upgradable_and_keeps_the_rest`, `change_pte_of_a_page_of_a_large_leaf_splits_it` |
//! | `change_pte` where the host gives no memory: as for a map of it | `change_pte_of_an_io_page_keeps_its_attribute` |
//! | what was unmapped is filled again only after a flush | `what_was_unmapped_is_filled_after_a_flush` |
//! | break-before-make where it is required, and only there | `another_output_or_attribute_breaks`, `a_change_of_size_breaks`, `rights_alone_never_break_and_flush_when_they_go`, `referenced_and_software_bits_cost_nothing` |
//! | reserved bits of leaves and directory entries, one by one | `every_reserved_bit_of_a_leaf_is_refused`, `every_bit_of_a_link_is_address_size_or_refused`, `software_rules` |
//! | a valid entry of level 1 that is no leaf, and a leaf of 512G, are impossible | `leaves_stand_at_their_levels_alone` |
//! | all that a table answers is what a sequential map of leaves would | `base_4k_does_as_the_model`, `base_64k_does_as_the_model` |
//!
//! # What it does not do
//!
//! - No hashed page table ([`hpt`]), no process-scoped trees (their leaves look alike, but EAA\[0\] counts there), no shadow trees
//!   of guests that are hypervisors, no secure guests of an ultravisor.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod bits;
pub mod check;
pub mod hpt;
pub mod memtype;
mod radix;
pub mod registers;
pub mod software;
pub mod tlb;
pub mod transition;

pub use bits::{BasePage, OptionsError};
pub use check::HardwareKind;
pub use memtype::{RadixAttrs, Storage};
pub use radix::{Radix, RadixOptions};
pub use registers::{PartitionEntry, ProcessEntry, Ptcr, RegisterError, Root};
pub use software::WriteState;
pub use tlb::{Ric, Step, Steps, TlbFixes, Tlbie};

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
