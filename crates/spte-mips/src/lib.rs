// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The MIPS page-table format of secondary MMUs: the table of guest physical addresses that KVM keeps for 64-bit MIPS, from
//! which root TLBs are filled.
//!
//! Everything here is a pure function on one raw entry. The engine (`spte-core`) holds the tables; this crate says what
//! an entry means, how it is built, what a change owes, and which entries are impossible.
//!
//! | to | look at |
//! |---|---|
//! | build a table | [`GpaTable`], [`GpaOptions`] |
//! | repoint a leaf, which is all that `change_pte` may do | [`Format::set_spte`](spte_core::format::Format::set_spte) |
//! | know what a change owes | [`transition`] |
//! | fill a TLB, carry out a flush | [`tlb`] |
//! | give empty directories something to lead to | [`Sentinels`] |
//! | choose cache attributes | [`memtype`] |
//! | find out why an entry is impossible | [`check`], [`GpaTable::check_hardware`] |
//! | fill PWBase, PWField, PWSize and PWCtl | [`registers`] |
//!
//! ```
//! use notifier_core::{Access, OutputAddr};
//! use spte_core::format::{Format, Level, LeafSpec};
//! use spte_mips::{BigEndian, GpaAttrs, GpaOptions, GpaTable};
//!
//! let table = GpaTable::<BigEndian>::new(GpaOptions::default())?; // 4K pages, 40 bits
//! let leaf = table.leaf(Level::LEAF, &LeafSpec {
//!     output: OutputAddr::new(0x1234_5000),
//!     access: Access::RWX,
//!     armed: false,
//!     accessed: true,
//!     dirty: true,
//!     attrs: GpaAttrs::default(),
//! })?;
//! assert_eq!(leaf, 0x1234_578f);
//! assert_eq!(leaf.to_be_bytes(), table.memory_of(leaf).to_ne_bytes());
//! assert_eq!(table.entry_lo(leaf).raw(), 0x48_d15e);
//!
//! // What `change_pte` reaches: another page, read-only, not upgradable. One store, then a flush of the pair.
//! let moved = table.set_spte(Level::LEAF, leaf, OutputAddr::new(0x777_7000))?;
//! assert_eq!(moved, 0x777_7685);
//! let owed = table.transition(Level::LEAF, leaf, moved);
//! assert!(owed.flush && !owed.break_first);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Behaviours, and the tests that check them
//!
//! | behaviour | tests |
//! |---|---|
//! | three layouts of entries, and EntryLo from each | `bits_stand_where_linux_has_them`, `entries_and_entry_lo_are_as_worked_out_by_hand`, `a_leaf_says_what_it_was_built_from` |
//! | tables of each page size and width | `tables_have_linux_shapes`, `addresses_are_cut_into_linux_indices`, `the_last_page_is_mapped_and_nothing_behind_it` |
//! | an empty directory holds the sentinel's address, not zero; a table of pages is zero | `empty_directories_lead_to_sentinels_and_empty_tables_are_zero`, `a_new_table_leads_to_sentinels_at_every_level`, `a_directory_entry_of_zero_is_impossible` |
//! | every walk of handlers or walker ends in V clear, whatever is absent, claimed or dead on the way | `a_walk_through_sentinels_ends_in_an_invalid_entry` |
//! | raw walks, while tables come and go, end in what there is; none finds a table that is free; what was unmapped is in no TLB | `walks_of_three_levels_end_in_what_there_is`, and the others of `tests/hardware.rs` |
//! | facts change no kind, at any level | `facts_change_no_kind_at_any_level` |
//! | a table never lies where the sentinels are | `a_table_where_the_sentinels_are_is_refused` |
//! | a table in use is not away while empty ones are looked for | `a_table_in_use_is_not_away_while_empty_ones_are_looked_for` |
//! | physical addresses from 32 bits to 59 | `the_narrowest_and_the_widest_machine_have_all_their_addresses` |
//! | memory images in both byte orders | `memory_images_are_in_the_processors_order` |
//! | a refill reads the even and the odd entry; invalidating one drops both | `a_refill_has_both_halves`, `a_flush_drops_whole_pairs`, `a_stale_buddy_goes_with_its_pair` |
//! | V only with ACCESSED, D only with WRITE and MODIFIED, after every operation | `operations_keep_the_rules`, `every_single_bit_change_is_found_or_means_something` |
//! | ageing keeps D, and the next use brings writing back | `ageing_keeps_writing_for_the_next_use` |
//! | a load never marks a page as written | `a_load_marks_nothing_as_written` |
//! | ranges end before their end | `ageing_ends_before_the_end_of_its_range` |
//! | what is logged is what was asked for, not what lies between | `logging_arms_what_was_asked_for_alone` |
//! | tables go when a range covers them, the root never (here also when they are empty, by a trim) | `empty_tables_go_up_to_the_root_and_not_the_root` |
//! | `change_pte`: absent stays absent, though its table is there | `change_pte_repoints_without_a_break_and_never_creates` |
//! | WRITE dropped with the same page owes a flush | `a_right_that_goes_is_flushed_whatever_the_facts` |
//! | an old leaf that changes is flushed | `an_old_leaf_may_be_in_a_tlb_and_is_flushed`, `change_pte_of_an_old_leaf_flushes` |
//! | `change_pte` keeps cache attribute, RI and XI, drops WRITE and MODIFIED | `change_is_read_only_not_upgradable_and_keeps_the_rest` |
//! | ageing owes no flush, unmapping always does where something was mapped | `ageing_owes_no_flush`, `an_old_leaf_may_be_in_a_tlb_and_is_flushed` |
//! | EntryHi of what is dropped is another at each index, 0 included | `every_index_has_an_entry_hi_of_its_own`, `an_entry_hi_that_hits_nothing_is_in_an_unmapped_segment_whatever_the_index` |
//! | the walker is stopped, and the guest's GuestID selected, around probes | `probes_are_made_with_the_walker_stopped_and_the_guest_selected` |
//! | a flush of many pairs, in however many ranges, is one of the whole guest | `pairs_are_counted_over_all_ranges_of_a_flush` |
//! | an instruction cache with virtual tags goes with the pairs | `an_instruction_cache_with_virtual_tags_goes_with_the_pairs` |
//! | without GuestIDs ASIDs are marked before vCPUs are asked to leave | `all_of_a_guest_goes_by_new_ids` |
//! | G counts where both halves have it; no entry here is global | `global_takes_both_halves`, `global_and_huge_leaves_are_refused` |
//! | walker registers, 32- and 64-bit; an index below 12 drops the write | `walker_registers_are_as_worked_out_by_hand`, `an_index_below_twelve_is_refused`, `what_six_bits_do_not_hold_is_refused_and_goes_into_no_neighbour`, `registers_come_back` |
//! | all that a table answers is what a sequential map of leaves would | `pages_4k_do_as_the_model`, and the others of `tests/model.rs` |
//!
//! # What it does not do
//!
//! - No tables of 32-bit kernels (entries of two words), of release 1, of 8K and 32K pages; no huge pages, which KVM's table
//!   never has; no guest virtual addresses (trap-and-emulate, gone since v5.13).
//! - No global entries: guest physical addresses belong to one guest, so that setting G in an empty buddy, as
//!   `set_pte` of the kernel's own tables does, never arises.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod bits;
pub mod check;
mod gpa;
pub mod memtype;
pub mod registers;
pub mod software;
pub mod tlb;
pub mod transition;

pub use bits::{PageSize, PteLayout, Width};
pub use check::HardwareKind;
pub use gpa::{BigEndian, ByteOrder, GpaOptions, GpaTable, LittleEndian, OptionsError};
pub use memtype::{Cache, GpaAttrs};
pub use registers::{Processor, PwBase, PwCtl, PwField, PwSize, RegisterError, WalkShape};
pub use software::{Sentinels, WriteState};
pub use tlb::{EntryLo, Pair, Step, Steps, TlbFeatures};

/// The example of the README is a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
