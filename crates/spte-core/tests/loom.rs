// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Model checks of the shipped engine, under the shipped protocol.
//!
//! ```text
//! RUSTFLAGS="--cfg loom --cfg crossbeam_loom" cargo test -p spte-core --release --test loom -- --nocapture
//! ```
//!
//! Two threads each, over a format with one index bit a level ([`tiny`]). Models are explored completely, with no bound on time and none
//! on preemptions, but for three that say so (`preemptions`). Each is run with the shipped code, which must hold in every execution, and with
//! its broken twins, each of which leaves one thing out and must break the assertion named here and no other. In the
//! last column stands how many executions there were.
//!
//! | model | shipped code | twins | assertion that they break | |
//! |---|---|---|---|---|
//! | `fault_against_zapped_window` | `Fault`, `Admission::check`, `Table::map`; opening, `zap_range` | `PublishFence`, `RecordFence`, `PoisonFence`, `ClaimFence`, `Poison`, `ZapSkipsClaim` | `nothing_is_mapped_inside_a_zapped_window` | 4 239 |
//! | `fault_against_window_that_closes` | the same, and closing | the same six | `nothing_maps_what_a_closed_window_moved` | 8 259 |
//! | `fault_against_retained_window`, with a claim bit and without | `raise`; opening, `lessen_range` | the same six | `nothing_is_writable_inside_a_retained_window` | 4 239 each |
//! | `upgrade_inside_a_retained_window` | `Table::upgrade`; opening | `RetainKeepsUpgrade` | `no_upgrade_inside_a_retained_window` | 54 |
//! | `change_pte_against_a_claim`, with a claim bit and without | `raise`, `Claim::give_back`; `change_pte` | `ChangeSkipsClaim` | `nothing_translates_to_the_old_page` | 7 793 each |
//! | `missing_leaf_table_against_window` | `fill_absent` of a whole private table; `zap_range` | `CheckFirstPageOnly`, `ClaimFence`, `ZapSkipsClaim` | `no_later_page_of_a_table_is_mapped_inside_a_window` | 4 239 |
//! | `teardown_against_installer`, unmap | `unlink` with leaves; `Table::map` | `UnlinkLeavesChildren` | `nothing_is_published_into_an_unlinked_table` | 1 258 |
//! | `teardown_against_installer`, trim | `unlink` if empty; `Table::map` | `UnlinkLeavesChildren` | `what_was_mapped_survives_a_trim` | 928 |
//! | `reclamation_against_installer` | `unlink`, `Table::retire`; pins | `RetireFrees` | `no_table_page_is_used_after_it_was_freed` | 23 023 |
//! | `owed_flush_inherited`, Zapped | `Batch`; `unmap`, opening | `OwedForgotten` | `no_tlb_translates_inside_a_zapped_window` | 11 643 |
//! | `owed_flush_inherited`, Retained | `Batch`; `restrict`, opening | `OwedForgotten` | `no_tlb_writes_inside_a_retained_window` | 11 643 |
//! | `owed_flush_inherited`, unmap | `Batch`; `unmap`, twice | `OwedForgotten` | `no_tlb_translates_what_unmap_says_is_gone` | 24 498 |
//! | `owed_flush_inherited`, change_pte | `Batch`; `unmap`, `change_pte` | `OwedForgotten` | `no_tlb_translates_to_the_old_page` | 12 681 |
//! | `refill_after_flush` | `unmap`; `Table::settle_refill`, `fill_absent` | `RefillUnflushed` | `no_tlb_holds_the_old_translation_beside_the_new_one` | 294 |
//! | `scope_entry_against_flush`, Zapped and change_pte | `Walker::enter`, `translate`; `wait_for_scopes` | `ScopeFence`, `FlushSkipsScopes` | `no_scope_reads_a_released_page` | 252 each |
//! | `collapse_against_window`, with a claim bit | `collapse_cell`; opening, `zap_range`, `split_cell` | `ZapSkipsClaim` | `nothing_is_mapped_inside_a_zapped_window` | 302 100 |
//! | `collapse_against_window`, without | the same, and `collapse_broken` | `ZapSkipsClaim` | `nothing_is_mapped_inside_a_zapped_window` | 483 252 |
//! | `collapse_against_walker`, with a claim bit and without | `collapse_cell`, `collapse_broken`; `translate` | `CollapseForgetsFacts` | `no_dirty_fact_is_lost_in_a_collapse` | 79 454, 6 395 |
//! | `dissolve_against_hardware` | `dissolve`, `zap_range`; hardware that records in another member | `DissolveForgetsFacts` | `no_write_through_a_set_is_lost` | 726 |
//! | `dissolve_from_both_ends` | `dissolve`, twice | none: that it ends is what it says | | 22 458 |
//! | `dissolve_against_unlinking` | `dissolve`; `unlink` with leaves | `SetWithoutGate` | `no_write_through_a_set_is_lost` | 383 301 |
//! | `fold_against_window` | `fold_set`; opening, `zap_range` | `ZapSkipsClaim` | `nothing_is_mapped_inside_a_zapped_window` | 9 214 |
//!
//! How a model here is kept from passing for nothing:
//!
//! - Every thread begins with a read-modify-write on a shared gate, and the main thread only spawns and joins. (Where a
//!   thread begins with a load, loom explores one execution.)
//! - A model lists what can happen ("refused at its snapshot", "installed", ...), and fails unless exactly that was seen:
//!   one in which a race is never lost, or never won, proves nothing.
//! - Nothing beside the shipped code orders anything: gates, TLBs, memory and backing are relaxed atomics. The registry's
//!   lock and the stages' locks are taken by windows only, never on a fault's or a walker's way to its publication or
//!   translation, so they hide no missing fence.
//! - Pins are the exception: an epoch's pin has a SeqCst fence of its own, and would stand in for `ScopeFence`. So
//!   models that are not about reclamation have none (`no_reclaim`). The one that is has grace that ends at the first moment
//!   that the contract of a pin allows (`soonest_reclaim`), with a fence at each step as epochs have. Epochs themselves
//!   are not in any model: with a collector of one's own, malloc decides (by giving a freed address out again, or
//!   not) which compare-exchanges of its lists succeed, and loom needs executions that repeat.
//! - Assertions come last, in the main thread, after everything was taken apart: loom does not survive drops of its own
//!   objects in a thread that unwinds.
//!
//! What is left out: mirrors, formats that break before they make, late facts, flushes that fail, and more than two threads.
//! loom takes a SeqCst fence for a little stronger than it is, and knows no reordering of a load with a later store.
#![cfg(loom)]

#[path = "loom/harness.rs"]
mod harness;
#[path = "loom/tiny.rs"]
mod tiny;

#[path = "loom/flushes.rs"]
mod flushes;
#[path = "loom/sets.rs"]
mod sets;
#[path = "loom/shape.rs"]
mod shape;
#[path = "loom/teardown.rs"]
mod teardown;
#[path = "loom/windows.rs"]
mod windows;
