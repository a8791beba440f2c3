// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! `dedup`: identical pages of running guests are merged, and repointed through `change_pte`.
//!
//! Guests are threads (vCPUs and devices) that reach their memory only by walking their guest's table, of any format; or
//! their vCPUs are on KVM, and devices walk the table. A merger looks for pages of equal contents in all guests, keeps one copy in a
//! *store* and gives the others' memory back to the host, while the guests run, write and check what they read.
//!
//! ```text
//!   vcpu, device      what agents do: read, write, check; make transfers
//!   access, native    how they reach memory: walking the table inside a scope; on KVM, and as the VMM
//!   guest             space, table, slots: what belongs to one guest
//!   mapping           where each page's contents are: its home, or a frame of the store
//!   home, mapped      home memory, behind the table or behind a mapping: what a merge does to it
//!   merger            finds equal pages, opens a window, compares, repoints, gives memory back
//!   store, memory     frames: memory files, their blocks
//!   ledger, damage    what each page must read, written down beside the memory by whoever writes; and what does not
//!   job, quiet        runs: with guests that work, and with guests that stand still
//! ```
//!
//! The contents of a page are at its home until they are *merged* into a frame of the store, and there until a write
//! *un-merges* them. Both moves happen inside a window over the page, and only there; that is the whole rule, and
//! `--unsafe-no-fence` and `--unsafe-no-notify` are what becomes of guests when it is broken.

mod access;
mod backend;
mod cli;
mod clock;
mod damage;
mod device;
mod dirty;
mod error;
mod guest;
mod home;
mod images;
mod job;
mod ledger;
mod mapped;
mod mapping;
mod memory;
mod merger;
mod native;
mod plot;
mod progress;
mod quiet;
mod report;
mod store;
mod table;
mod tally;
mod vcpu;

pub use backend::NoBackend;
pub use cli::{Backend, MergeMode, Options, Safety, UsageError};
pub use error::Error;
pub use images::ImageError;
pub use job::{run, run_on};
pub use quiet::{Quiet, Ram, merge_quietly, merge_with_ksm};
pub use report::{Report, Sample};
pub use table::TableFormat;
