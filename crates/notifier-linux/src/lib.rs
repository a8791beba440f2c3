// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest memory on Linux whose backing changes only inside invalidation windows.
//!
//! # The problem
//! What a guest physical page is made of changes all the time: a balloon gives it back, a merger maps a shared page over it,
//! the guest's write to a merged page takes a copy. To the kernel each change is one call (`madvise`, `mmap`, `fallocate`),
//! which tells the kernel's own secondary MMUs. It does not tell those in user space: page tables that a VMM owns, software
//! IOTLBs, devices in other processes. `notifier_core` has the protocol by which they are told in time; it works if *every*
//! change is made inside a window. So this crate owns the changing calls, and makes none without one.
//!
//! (Asking the kernel instead does not work: userfaultfd reports some of these calls, the others not at all, and never their
//! end. See [`Tripwire`] for what it can do.)
//!
//! # Concepts
//! **[`GuestRam`]** is a vm-memory guest memory whose regions are slots of a [`Space`](notifier_core::Space). It keeps a
//! layout: what is mapped at each page, and with which rights.
//!
//! **A home** is what vm-memory mapped at a page: private anonymous memory, a shared file (a memfd), or a private mapping of
//! a file. Discarded pages are at home. A file that is mapped privately may be a snapshot, or a *template* that other guests
//! map too, and is never changed: there private zeros lie over the home. Where it is said to be the guest's own
//! ([`GuestRamBuilder::own_files`]), its memory goes back too, as a shared file's does.
//!
//! **A [`Source`]** is bytes of a file that are mapped, privately, in the place of guest memory: the page that several guests
//! share. The guest's first write takes a copy, by the kernel and without notice; so whoever translates to a merged page does
//! so read-only (which [`Retained`](notifier_core::Retained) windows and `change_pte` see to), and calls
//! [`Within::privatize`] in a window before it grants writing.
//!
//! **A [`Batch`]** is a list of operations that is checked whole, done in order, and undone where a call fails, as far as
//! the old contents are still somewhere. [`OperationError`] says what is so then.
//!
//! **A [`VmaBudget`]** keeps the process below `vm.max_map_count`: scattered replacing splits mappings, and whoever
//! reaches the limit cannot even allocate.
//!
//! | to | call |
//! |---|---|
//! | give pages back | [`GuestRam::discard`] |
//! | merge, or restore from a snapshot | [`GuestRam::replace`] |
//! | set the host's rights | [`GuestRam::protect`] |
//! | do several at once | [`GuestRam::batch`] |
//! | do it in a window that is open | [`GuestRam::within`] |
//! | part merged pages | [`Within::privatize`] |
//! | keep writers out while comparing | [`WriteFence`] |
//! | know what was written since | [`DirtyFilter`] |
//! | look at pages | [`PageMap`], [`GuestRam::backing_at`] |
//! | find changes without a window | [`Tripwire`] |
//! | ask what the kernel has | [`Features`] |
//! | make the kernel fail, in tests | [`Kernel::with_hook`] |
//!
//! # Example
//! ```
//! use notifier_core::{Access, AddrRange, Gpa, Space};
//! use notifier_linux::GuestRam;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
//!
//! let space = Space::new();
//! let ram = GuestRam::new(&space, GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 1 << 20)])?)?;
//! ram.memory().write_obj(7_u64, GuestAddress(0x3000))?;
//!
//! let pages = |at, len| AddrRange::with_len(Gpa::new(at), len);
//! ram.batch().discard(pages(0x3000, 0x2000)?).protect(pages(0x8000, 0x1000)?, Access::READ).run()?;
//! assert_eq!(ram.memory().read_obj::<u64>(GuestAddress(0x3000))?, 0);
//!
//! // Inside a window of one's own, nothing outside of it.
//! let guard = space.zap(pages(0x8000, 0x1000)?)?;
//! let within = ram.within(&guard)?;
//! within.protect(pages(0x8000, 0x1000)?, Access::RW)?;
//! assert!(within.discard(pages(0x9000, 0x1000)?).is_err());
//! guard.close()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//! The README has one that replaces a page.
//!
//! # What is outside
//! - *Other mappings of the same file*, in this process or in others (vhost-user back ends). They see holes that are punched,
//!   but not what is mapped over. Whoever shares a guest's memfd subscribes, and has the other side map anew.
//! - *Pins*: what VFIO or a registered buffer of io_uring has pinned stays pinned, and goes on being read and written, at
//!   the old page. Holders of pins take leases, which refuse windows.
//! - *Writers*: a write between the caller's comparing and the `mmap` is lost. [`WriteFence`] keeps writers of this process
//!   out, a window those that translate.
//! - *hugetlbfs*: its pages cannot be mapped over in parts; such regions are refused.
//! - *What was set by address* (`MADV_DONTFORK`, memory policies, `mlock`, userfaultfd registrations) is gone from pages that
//!   are mapped anew. [`GuestRam::no_huge_pages`] is remembered for pages that go home.
//! - *Reading a hole of a shared file fills it*: who scans pages that were discarded takes their memory again. Look at
//!   [`PageMap`] first.
//!
//! # Who may call at the same time
//! Everybody, for everything; operations over the same pages wait for each other, for the time of their system calls. What
//! overlapping windows decide is who may translate, not which of two changes comes last.
#![cfg(target_os = "linux")]

mod batch;
mod budget;
mod dirty;
mod features;
mod fence;
mod kernel;
mod layout;
mod pagemap;
mod plan;
mod ram;
mod run;
mod tripwire;
mod uffd;

pub use batch::{Batch, OperationError, RamError, UndoError};
pub use budget::{BudgetError, VmaBudget};
pub use dirty::{DirtyError, DirtyFilter};
pub use features::{Feature, Features, Missing};
pub use fence::{FenceError, Waiter, WriteFence};
pub use kernel::{Call, Kernel};
pub use pagemap::{PageMap, PageMapError, PageState};
pub use ram::{Backing, BuildError, GuestRam, GuestRamBuilder, Source, Within};
pub use tripwire::{ChangeKind, Expected, Tripped, Tripwire, TripwireError};
pub use uffd::RegisterError;

/// The examples of the README are tests.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
