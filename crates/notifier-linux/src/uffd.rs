// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the three users of userfaultfd in this crate share: opening one, registering memory with it, leaving again.
//!
//! A stretch of memory belongs to one userfaultfd at most (Linux keeps one `vm_userfaultfd_ctx` per mapping), so that
//! [`WriteFence`](crate::WriteFence), [`DirtyFilter`](crate::DirtyFilter) and [`Tripwire`](crate::Tripwire) exclude
//! each other on the same mapping: the second one gets [`RegisterError::Busy`].

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
};

use linux_raw_sys::general::{
    _UFFDIO_WRITEPROTECT, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, uffd_msg,
    uffd_msg__bindgen_ty_1, uffd_msg__bindgen_ty_1__bindgen_ty_5,
};
use notifier_core::{AddrRange, Hva, HvaRange};
use parking_lot::Mutex;
use rustix::{event::EventfdFlags, io::Errno};

use crate::{
    budget::{BudgetError, PER_CALL, VmaBudget, Wanted},
    features::{Feature, Missing},
    kernel::{Call, Kernel},
};

/// Why memory could not be registered with a userfaultfd. What was made is undone, unless a variant says otherwise.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The kernel lacks something, or forbids it.
    #[error(transparent)]
    Missing(#[from] Missing),
    /// A range that does not begin and end on pages.
    #[error("{range} does not begin and end on pages of {page_size:#x} bytes")]
    Unaligned {
        /// What was asked for.
        range: HvaRange,
        /// Bytes of a page of this host.
        page_size: u64,
    },
    /// Another userfaultfd has some of this memory; a mapping can be in one only.
    #[error("{range} is registered with another userfaultfd, in part at least: a mapping can be in one only")]
    Busy {
        /// What was to be registered.
        range: HvaRange,
    },
    /// Nothing is mapped here, or something that userfaultfd does not take: it takes anonymous memory, memfd and tmpfs
    /// (shared and private) and hugetlbfs, with a right to be written (`vma_can_userfault` and `VM_MAYWRITE` in Linux's
    /// `fs/userfaultfd.c`).
    #[error("{range} holds nothing, or memory that cannot be write-protected by userfaultfd")]
    Unfit {
        /// What was to be registered.
        range: HvaRange,
    },
    /// So many ranges, each of which may take a mapping of its own out of a larger one (and so add two), that less than
    /// the reserve of [`VmaBudget::new`](crate::VmaBudget::new) would be left to the process; or its mappings could not
    /// be counted.
    #[error(transparent)]
    Budget(#[from] BudgetError),
    /// A call failed.
    #[error("{call} failed at {range}: {source}")]
    Call {
        /// Which call.
        call: Call,
        /// What it was made for.
        range: HvaRange,
        /// Its error.
        source: io::Error,
    },
    /// No eventfd could be had, to end waits with.
    #[error("eventfd failed: {source}")]
    Event {
        /// Its error.
        source: io::Error,
    },
    /// A call failed that is about no range.
    #[error("{call} failed: {source}")]
    Open {
        /// Which call.
        call: Call,
        /// Its error.
        source: io::Error,
    },
}

/// The features that are asked for, with what to call them where they are missing. (`UFFD_FEATURE_EXACT_ADDRESS`, Linux
/// 5.18, is older than what is asked for beside it.)
const FEATURES: [(u32, Feature); 7] = [
    (UFFD_FEATURE_PAGEFAULT_FLAG_WP, Feature::WriteProtect),
    (UFFD_FEATURE_WP_HUGETLBFS_SHMEM, Feature::WriteProtectShared),
    (UFFD_FEATURE_WP_UNPOPULATED, Feature::WriteProtectUnpopulated),
    (UFFD_FEATURE_WP_ASYNC, Feature::WriteProtectAsync),
    (UFFD_FEATURE_EVENT_REMOVE, Feature::EventRemove),
    (UFFD_FEATURE_EVENT_UNMAP, Feature::EventUnmap),
    (UFFD_FEATURE_EVENT_REMAP, Feature::EventRemap),
];

/// Ranges whose registering is not worth counting the process's mappings.
const FEW: usize = 32;
/// Calls that unregistering may take until it no longer looks for what is in the way.
const CALLS: u32 = 1 << 16;

/// One message of a userfaultfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Message {
    /// Somebody waits at this byte.
    Fault(Hva),
    /// This is about to be dropped.
    Remove(HvaRange),
    /// This is not mapped any more.
    Unmap(HvaRange),
    /// This lies elsewhere now.
    Remap(HvaRange, Hva),
}

impl Message {
    /// Reads one; `None` where it is of a kind that nobody here asked for.
    pub(crate) fn parse(message: &uffd_msg) -> Option<Self> {
        let arg = message.arg;
        // SAFETY: every field of the union is plain integers of the same 24 bytes, which the kernel wrote (it clears
        // the whole message first: `msg_init` in fs/userfaultfd.c); the event says which of them is meant.
        let (fault, remove, remap) = unsafe { (arg.pagefault, arg.remove, arg.remap) };
        let range = |start, end| AddrRange::new(Hva::new(start), Hva::new(end)).ok();
        match u32::from(message.event) {
            UFFD_EVENT_PAGEFAULT => Some(Self::Fault(Hva::new(fault.address))),
            UFFD_EVENT_REMOVE => range(remove.start, remove.end).map(Self::Remove),
            UFFD_EVENT_UNMAP => range(remove.start, remove.end).map(Self::Unmap),
            UFFD_EVENT_REMAP => AddrRange::with_len(Hva::new(remap.from), remap.len)
                .ok()
                .map(|from| Self::Remap(from, Hva::new(remap.to))),
            _ => None,
        }
    }
}

/// A userfaultfd and what is registered with it, for write protection.
#[derive(Debug)]
pub(crate) struct Uffd {
    kernel: Kernel,
    fd: OwnedFd,
    /// What may be registered: sorted, joined.
    ranges: Vec<HvaRange>,
    /// Those of them that were not unregistered for good. What was is never unregistered again: it may be another
    /// userfaultfd's by then, which not every kernel asks about.
    left: Mutex<Vec<HvaRange>>,
    page_size: u64,
}

impl Uffd {
    /// Opens one with `features` and registers all of `ranges`.
    pub(crate) fn new(kernel: &Kernel, features: u32, ranges: &[HvaRange]) -> Result<Self, RegisterError> {
        let page_size = page_size();
        if let Some(&range) = ranges.iter().find(|range| !range.is_aligned(page_size)) {
            return Err(RegisterError::Unaligned { range, page_size });
        }
        let fd = open(kernel, features)?;
        let mut ranges = ranges.to_vec();
        join(&mut ranges);
        let left = Mutex::new(ranges.clone());
        let this = Self { kernel: kernel.clone(), fd, ranges, left, page_size };
        // An early return drops the descriptor, and with it what was registered.
        this.register_all()?;
        Ok(this)
    }

    /// Registers what this was made for. Registering a part of a mapping makes a mapping of its own of it: many parts are
    /// registered as far as the last count of the process's mappings allows whatever they add, and then it is counted
    /// anew.
    fn register_all(&self) -> Result<(), RegisterError> {
        let mut rest = self.ranges.as_slice();
        if rest.len() > FEW {
            let budget = VmaBudget::new(&self.kernel)?;
            loop {
                let room = budget.limit().saturating_sub(budget.reserve()).saturating_sub(budget.in_use());
                let fits = usize::try_from(room / PER_CALL).unwrap_or(usize::MAX).clamp(1, rest.len());
                let (now, later) = rest.split_at(fits);
                let most = PER_CALL * fits as u64;
                let reservation = budget.reserve_mappings(Wanted { worst: most, likely: most })?;
                now.iter().try_for_each(|&range| self.register(range))?;
                // How many they added only a count tells: others go on from the worst case until they have made one.
                reservation.settle(0);
                rest = later;
                if rest.is_empty() {
                    break;
                }
                budget.recount()?;
            }
        }
        rest.iter().try_for_each(|&range| self.register(range))
    }

    pub(crate) fn kernel(&self) -> &Kernel {
        &self.kernel
    }

    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    pub(crate) fn ranges(&self) -> &[HvaRange] {
        &self.ranges
    }

    pub(crate) fn page_size(&self) -> u64 {
        self.page_size
    }

    /// The first byte of `range` that this was not made for.
    pub(crate) fn foreign(&self, range: HvaRange) -> Option<Hva> {
        // Ranges are joined where they touch, so that what is covered is covered by one.
        let after = self.ranges.partition_point(|own| own.end() <= range.start());
        match self.ranges.get(after) {
            Some(own) if own.contains(range.start()) => (own.end() < range.end()).then_some(own.end()),
            _ => Some(range.start()),
        }
    }

    /// Registers what is mapped at `range` now; what is registered already stays as it is.
    pub(crate) fn register(&self, range: HvaRange) -> Result<(), RegisterError> {
        let ioctls =
            insist(|| self.kernel.register_write_protect(self.fd(), range)).map_err(
                |source| match Errno::from_io_error(&source) {
                    Some(Errno::BUSY) => RegisterError::Busy { range },
                    Some(Errno::INVAL | Errno::PERM) => RegisterError::Unfit { range },
                    _ => RegisterError::Call { call: Call::Register, range, source },
                },
            )?;
        if ioctls & (1 << _UFFDIO_WRITEPROTECT) == 0 {
            return Err(RegisterError::Unfit { range });
        }
        Ok(())
    }

    /// Write-protects (or not any more) what is registered of `range`, whatever else lies in it.
    ///
    /// The kernel goes through the mappings in ascending order and stops with ENOENT at the first that is not
    /// registered (`mwriteprotect_range` in mm/userfaultfd.c). Halving finds it, and does the rest.
    pub(crate) fn protect(&self, range: HvaRange, on: bool) -> Result<(), ProtectError> {
        let attempt = |piece| match on {
            true => insist(|| self.kernel.write_protect(self.fd(), piece)),
            false => insist(|| self.kernel.lift(self.fd(), piece, true)),
        };
        if self.left.lock().is_empty() {
            return Err(ProtectError::Lapsed { address: range.start() });
        }
        let is_lapsed = |error: &io::Error| Errno::from_io_error(error) == Some(Errno::NOENT);
        match attempt(range) {
            Ok(()) => return Ok(()),
            Err(error) if is_lapsed(&error) => {}
            Err(source) => return Err(ProtectError::Failed { range, source }),
        }
        let mut lapsed = None;
        let mut todo = self.halves(range);
        while let Some(piece) = todo.pop() {
            match attempt(piece) {
                Ok(()) => {}
                Err(error) if is_lapsed(&error) => match piece.len() > self.page_size {
                    true => todo.extend(self.halves(piece)),
                    false => lapsed = lapsed.or(Some(piece.start())),
                },
                Err(source) => return Err(ProtectError::Failed { range: piece, source }),
            }
        }
        // None: what was not registered at first was by the time it was looked for.
        lapsed.map_or(Ok(()), |address| Err(ProtectError::Lapsed { address }))
    }

    /// Both halves, the upper one first; a single page is both.
    fn halves(&self, range: HvaRange) -> Vec<HvaRange> {
        let middle = range.start().wrapping_add(range.len() / 2).align_down(self.page_size);
        match (AddrRange::new(range.start(), middle), AddrRange::new(middle, range.end())) {
            (Ok(lower), Ok(upper)) => vec![upper, lower],
            _ => vec![range],
        }
    }

    /// For good: nothing is registered, nothing protected, and nobody waits any more. All of it is tried, whatever
    /// fails; the first failure is returned, and the next call does what is left. Nothing may be registered meanwhile or
    /// later.
    ///
    /// Unregistering makes writable, and wakes nobody who waits for a write (`userfaultfd_unregister` wakes for missing
    /// pages only).
    pub(crate) fn unregister_all(&self) -> Result<(), (Call, HvaRange, io::Error)> {
        let mut done = Ok(());
        let mut calls = 0;
        let mut left = self.left.lock();
        left.retain(|&range| {
            let gone = self.unregister(range, &mut calls);
            let is_left = gone.is_err();
            if done.is_ok() {
                done = gone.map_err(|(range, error)| (Call::Unregister, range, error));
            }
            is_left
        });
        // Whoever waited is woken each time, also where it was unregistered before and waking failed.
        for &range in &self.ranges {
            let woken = self.wake(range);
            done = done.and(woken.map_err(|error| (Call::Wake, range, error)));
        }
        done
    }

    /// Unregisters what is registered of `range`, whatever else lies in it.
    ///
    /// The kernel refuses all of a range, with EINVAL, where it holds nothing or any memory that could not be registered
    /// (`userfaultfd_unregister` in fs/userfaultfd.c): a page of a file on a disk that was mapped over, say. Halving
    /// leaves that out.
    fn unregister(&self, range: HvaRange, calls: &mut u32) -> Result<(), (HvaRange, io::Error)> {
        let mut done = Ok(());
        let mut todo = vec![range];
        while let Some(piece) = todo.pop() {
            *calls += 1;
            let error = match insist(|| self.kernel.unregister(self.fd(), piece)) {
                Ok(()) => continue,
                Err(error) => error,
            };
            if Errno::from_io_error(&error) == Some(Errno::INVAL) && *calls < CALLS {
                if piece.len() > self.page_size {
                    todo.extend(self.halves(piece));
                    continue;
                }
                // ENOENT: nothing is mapped, or it is not registered (`mwriteprotect_range` in mm/userfaultfd.c).
                let lifted = insist(|| self.kernel.lift(self.fd(), piece, true));
                if lifted.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::NOENT)) {
                    continue;
                }
            }
            done = done.and(Err((piece, error)));
        }
        done
    }

    /// Whether somebody makes a change that was watched when it began, and whose message was not read yet.
    ///
    /// Lifting says EAGAIN then, before it looks at any memory (`mwriteprotect_range` in mm/userfaultfd.c): a change is
    /// counted (`mmap_changing`) from before it gives up the lock that unregistering takes, until whoever makes it has
    /// been let go on.
    pub(crate) fn is_changing(&self) -> bool {
        let page = self.ranges.first().and_then(|range| AddrRange::with_len(range.start(), self.page_size).ok());
        let lifted = page.map_or(Ok(()), |page| self.kernel.lift(self.fd(), page, true));
        lifted.is_err_and(|error| Errno::from_io_error(&error) == Some(Errno::AGAIN))
    }

    /// Lets whoever waits in `range` try again.
    pub(crate) fn wake(&self, range: HvaRange) -> io::Result<()> {
        insist(|| self.kernel.wake(self.fd(), range))
    }
}

/// Why [`Uffd::protect`] did not do all of it.
#[derive(Debug)]
pub(crate) enum ProtectError {
    /// What is mapped here is not registered; everything else was done.
    Lapsed { address: Hva },
    /// A call failed; what follows was not done.
    Failed { range: HvaRange, source: io::Error },
}

impl Drop for Uffd {
    fn drop(&mut self) {
        // Closing alone does all of it (`userfaultfd_release`: entries are made writable, registrations go, everybody is
        // woken), but not while a forked child still has the descriptor.
        let _ = self.unregister_all();
    }
}

/// Opens a userfaultfd with exactly these features.
fn open(kernel: &Kernel, features: u32) -> Result<OwnedFd, RegisterError> {
    let open = || {
        kernel.userfaultfd().map_err(|source| match Errno::from_io_error(&source) {
            Some(Errno::PERM | Errno::ACCESS | Errno::NOSYS | Errno::NOENT) => {
                Missing { feature: Feature::Userfaultfd, source: Some(source) }.into()
            }
            _ => RegisterError::Open { call: Call::OpenUserfaultfd, source },
        })
    };
    let fd = open()?;
    let refused = match kernel.userfaultfd_api(fd.as_fd(), u64::from(features)) {
        Ok(_) => return Ok(fd),
        Err(source) => source,
    };
    // The kernel refuses all features where it lacks one, and does not say which. A second one tells what there is.
    let have = match Errno::from_io_error(&refused) {
        Some(Errno::INVAL) => {
            let probe = open()?;
            kernel
                .userfaultfd_api(probe.as_fd(), 0)
                .map_err(|source| RegisterError::Open { call: Call::UserfaultfdApi, source })?
        }
        _ => return Err(RegisterError::Open { call: Call::UserfaultfdApi, source: refused }),
    };
    match lacking(features, have) {
        Some(feature) => Err(Missing { feature, source: Some(refused) }.into()),
        None => Err(RegisterError::Open { call: Call::UserfaultfdApi, source: refused }),
    }
}

/// The first of the wanted features that the kernel does not have.
fn lacking(wanted: u32, have: u64) -> Option<Feature> {
    let missing = u64::from(wanted) & !have;
    FEATURES.iter().find(|(bits, _)| u64::from(*bits) & missing != 0).map(|&(_, feature)| feature)
}

/// Ends the waits of other threads, for good.
#[derive(Debug)]
pub(crate) struct Stop(OwnedFd);

impl Stop {
    pub(crate) fn new() -> Result<Self, RegisterError> {
        let fd = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        fd.map(Self).map_err(|error| RegisterError::Event { source: error.into() })
    }

    /// Readable once signalled; nobody reads it.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn signal(&self) {
        // Fails only where it has been signalled 2^64 - 2 times.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }
}

/// Room for messages.
pub(crate) const fn no_messages<const N: usize>() -> [uffd_msg; N] {
    let arg = uffd_msg__bindgen_ty_1 {
        reserved: uffd_msg__bindgen_ty_1__bindgen_ty_5 { reserved1: 0, reserved2: 0, reserved3: 0 },
    };
    [uffd_msg { event: 0, reserved1: 0, reserved2: 0, reserved3: 0, arg }; N]
}

/// Bytes of a page of this host.
pub(crate) fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// Repeats a call that was interrupted. Not for ever: whoever is told EAGAIN that often is told so.
pub(crate) fn insist<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    const TRIES: usize = 64;
    for _ in 1..TRIES {
        match call() {
            Err(error) if matches!(Errno::from_io_error(&error), Some(Errno::AGAIN | Errno::INTR)) => {
                std::thread::yield_now();
            }
            done => return done,
        }
    }
    call()
}

/// Sorts ranges, and joins what touches.
pub(crate) fn join(ranges: &mut Vec<HvaRange>) {
    ranges.sort_unstable_by_key(HvaRange::start);
    ranges.dedup_by(|next, last| {
        let touches = next.start() <= last.end();
        if touches {
            // The larger end; never empty, for `last` is not.
            *last = AddrRange::new(last.start(), last.end().max(next.end())).unwrap_or(*last);
        }
        touches
    });
}

/// What of `range` is in none of `others`, which are sorted and joined.
pub(crate) fn without(range: HvaRange, others: &[HvaRange]) -> Vec<HvaRange> {
    let mut rest = Vec::new();
    let mut from = range.start();
    for other in others.iter().filter(|other| other.overlaps(&range)) {
        rest.extend(AddrRange::new(from, other.start()).ok());
        from = from.max(other.end());
    }
    rest.extend(AddrRange::new(from, range.end()).ok());
    rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> HvaRange {
        AddrRange::new(Hva::new(start), Hva::new(end)).unwrap()
    }

    #[test]
    fn what_touches_is_joined() {
        let mut ranges =
            vec![range(0x3000, 0x5000), range(0x1000, 0x2000), range(0x2000, 0x3000), range(0x3000, 0x4000)];
        join(&mut ranges);
        assert_eq!(ranges, [range(0x1000, 0x5000)]);
        let mut apart = vec![range(0x3000, 0x4000), range(0x1000, 0x2000)];
        join(&mut apart);
        assert_eq!(apart, [range(0x1000, 0x2000), range(0x3000, 0x4000)]);
    }

    #[test]
    fn what_is_left_of_a_range() {
        let others = [range(0x1000, 0x2000), range(0x3000, 0x4000)];
        assert_eq!(without(range(0x1000, 0x2000), &others), []);
        assert_eq!(
            without(range(0, 0x5000), &others),
            [range(0, 0x1000), range(0x2000, 0x3000), range(0x4000, 0x5000)]
        );
        assert_eq!(without(range(0x1800, 0x3800), &others), [range(0x2000, 0x3000)]);
    }

    #[test]
    fn a_missing_feature_is_named() {
        let wanted = UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_WP_ASYNC;
        assert_eq!(lacking(wanted, u64::from(UFFD_FEATURE_PAGEFAULT_FLAG_WP)), Some(Feature::WriteProtectAsync));
        assert_eq!(lacking(wanted, u64::from(wanted)), None);
    }
}
