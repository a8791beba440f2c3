// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The hashed page table: not here yet.
//!
//! A partition whose entry in the partition table has HR clear translates by hash: groups of eight entries of two words, found by
//! a hash of the virtual page number, shared by all of a guest's segments, with a reverse map beside it. That is another kind of
//! table than the tree of [`radix`](crate::Radix), not another format of it: the engine would look entries up by hash, and
//! reach them from guest physical addresses by chains. What will be here:
//!
//! - entries of both words, in the two layouts (before Power ISA 3.0, and since), and how one becomes the other;
//! - page sizes of a segment and of an entry, their LP codes, and the table of 256 that decodes them;
//! - the hash of segments of 256M and 1T, primary and secondary groups, and the virtual address that an entry stands for;
//! - what an invalidation of one entry has to name;
//! - the order in which an entry of two words is written: second word, `eieio`, first word; and taken away: first word,
//!   `ptesync`, `tlbie`, `eieio; tlbsync; ptesync`, and only then is R and C final.
//!
//! [`PartitionEntry`](crate::registers::PartitionEntry) makes and reads radix partitions alone, and says so of others.
