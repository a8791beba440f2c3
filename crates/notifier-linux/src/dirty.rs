// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Which pages were written since they were last asked about. What counts as written is on [`DirtyFilter`].
use std::{fmt, io};

use linux_raw_sys::general::{
    PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC, PM_SCAN_WP_MATCHING, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, page_region, pm_scan_arg,
};
use notifier_core::{AddrRange, Hva, HvaRange};
use parking_lot::Mutex;
use rustix::io::Errno;

use crate::{
    features::{Feature, Missing},
    kernel::{Call, Kernel},
    uffd::{ProtectError, RegisterError, Uffd, join, without},
};

const FEATURES: u32 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED
    | UFFD_FEATURE_WP_ASYNC;

/// Regions that one scan can return; more need another call.
const REGIONS: usize = 256;

/// What a filter could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DirtyError {
    /// Memory could not be registered.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// A range that does not begin and end on pages. Nothing was done.
    #[error("{range} does not begin and end on pages of {page_size:#x} bytes")]
    Unaligned {
        /// What was asked about.
        range: HvaRange,
        /// Bytes of a page of this host.
        page_size: u64,
    },
    /// The filter was not made for this byte. Nothing was done.
    #[error("{address} is in no range of this filter")]
    Foreign {
        /// The first such byte.
        address: Hva,
    },
    /// What is mapped here now was mapped over what was registered: [`DirtyFilter::readmit`] is missing.
    #[error("{address} was mapped anew and is not registered with this filter: readmit it first")]
    Lapsed {
        /// The first such page.
        address: Hva,
    },
    /// A call failed. What it might have told is told by the next answer.
    #[error("{call} failed at {range}: {source}")]
    Call {
        /// Which call.
        call: Call,
        /// What it was made for.
        range: HvaRange,
        /// Its error.
        source: io::Error,
    },
}

/// Knows which pages were written since they were last asked about, without stopping anybody.
///
/// The filter arms memory with userfaultfd's asynchronous write protection (`UFFD_FEATURE_WP_ASYNC`, Linux 6.7): the
/// first write to an armed page takes the protection off by itself, in the writer's fault, with no message and no wait
/// (0.8 us or so). `PAGEMAP_SCAN` finds the pages whose protection is gone and arms them again, page by page under the
/// page table's lock: 2 ns for a page that was not written.
///
/// A scan that wants to know which pages are worth hashing asks this first. It is no fence, and it is no dirty log
/// where memory is written past this mapping (see below).
///
/// # What counts as written
/// - Writes through this mapping of this process: of threads, of the kernel on their behalf, and of KVM's vCPUs. A
///   write that ended before [`DirtyFilter::written`] is called is in its answer, or was in an earlier one. One that
///   goes on meanwhile is in this answer or the next; where it is only in this one, it is seen by reads after the
///   return.
/// - What was [readmitted](DirtyFilter::readmit).
/// - Everything that an answer which failed might have held.
/// - A page that was dropped (`MADV_DONTNEED`, a hole punched): in anonymous memory the protection goes with it, and it
///   may count, or not until it is touched again, if only for reading. Whoever drops pages knows which.
///
/// Writes through other mappings of the same memory and through pins (registered buffers of io_uring, VFIO) do not
/// count.
///
/// # One userfaultfd only
/// A mapping is in one userfaultfd at most. Where a [`WriteFence`](crate::WriteFence) has it, this is refused with
/// [`RegisterError::Busy`], and the other way round. Who needs the fence finds stable pages by hashing them twice,
/// or asks KVM's dirty log (`KVM_GET_DIRTY_LOG`) about the guest's own writes.
///
/// # Mappings, and the end
/// Scattered ranges add up to two mappings each to the process, as with [`WriteFence`](crate::WriteFence#mappings):
/// [`DirtyFilter::new`] with too many of them is refused ([`RegisterError::Budget`]).
///
/// Dropping the filter takes the protections off and the registrations away. The ranges stay mapped while it lives
/// (mapping over them is fine): had they been unmapped, and had somebody else registered other memory at the same
/// addresses, the drop would take that registration off on kernels that do not ask whose it is.
///
/// A child of `fork` that goes on without `exec` has no registrations, and the filter there would scan the parent's
/// pages (`/proc/self/pagemap` stays that of the process that opened it): it makes a filter of its own, with a
/// [`Kernel`] of its own.
///
/// Threads may ask at the same time; of those that ask about the same page, one is told.
///
/// # Example
/// ```
/// use notifier_core::{AddrRange, Hva};
/// use notifier_linux::{DirtyError, DirtyFilter, Kernel, RegisterError};
/// use vm_memory::{Bytes, MmapRegion, VolatileMemory};
///
/// let memory = MmapRegion::<()>::new(0x4000)?;
/// let at = |page: u64| Hva::new(memory.as_ptr() as u64 + page * 0x1000);
/// let range = AddrRange::new(at(0), at(4))?;
/// let filter = match DirtyFilter::new(&Kernel::new(), &[range]) {
///     Err(DirtyError::Register(RegisterError::Missing(missing))) => return Ok(println!("{missing}")),
///     filter => filter?,
/// };
/// memory.as_volatile_slice().write_obj(1u8, 0x2fff)?;
/// assert_eq!(filter.written(range)?, [AddrRange::new(at(2), at(3))?]);
/// assert_eq!(filter.written(range)?, []);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DirtyFilter {
    uffd: Uffd,
    /// What counts as written whatever the page tables say: sorted, joined.
    pending: Mutex<Vec<HvaRange>>,
}

impl fmt::Debug for DirtyFilter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyFilter").field("ranges", &self.uffd.ranges()).finish_non_exhaustive()
    }
}

impl DirtyFilter {
    /// A filter for `ranges`, from now on: nothing counts as written yet. With this feature Linux takes any kind of
    /// memory, also private mappings of files on disks. Page tables are made for all of it (8 bytes a page).
    ///
    /// # Errors
    /// [`DirtyError::Register`]: the kernel lacks userfaultfd, the right to use it, asynchronous protection or
    /// `PAGEMAP_SCAN` ([`RegisterError::Missing`]); memory that it does not take ([`RegisterError::Unfit`]) or that is
    /// in another userfaultfd ([`RegisterError::Busy`]); [`RegisterError::Unaligned`]; more ranges than the process
    /// has mappings left for ([`RegisterError::Budget`]). [`DirtyError::Call`] where arming failed. Nothing is registered then.
    pub fn new(kernel: &Kernel, ranges: &[HvaRange]) -> Result<Self, DirtyError> {
        let this = Self { uffd: Uffd::new(kernel, FEATURES, ranges)?, pending: Mutex::default() };
        for &range in this.uffd.ranges() {
            this.arm(range)?;
        }
        if let Some(&first) = this.uffd.ranges().first() {
            match this.peek(first) {
                Err(DirtyError::Call { call: Call::ScanPagemap, source, .. })
                    if matches!(Errno::from_io_error(&source), Some(Errno::NOTTY | Errno::INVAL)) =>
                {
                    let missing = Missing { feature: Feature::PagemapScan, source: Some(source) };
                    return Err(RegisterError::from(missing).into());
                }
                answer => drop(answer?),
            }
        }
        Ok(this)
    }

    /// What the filter was made for, ascending; ranges that touch are joined.
    pub fn ranges(&self) -> &[HvaRange] {
        self.uffd.ranges()
    }

    /// The pages of `range` that were written since they were last asked about, ascending, those that touch joined;
    /// they are armed again, each at the moment it is found.
    ///
    /// # Errors
    /// [`DirtyError::Unaligned`], [`DirtyError::Foreign`]: nothing was done. [`DirtyError::Lapsed`],
    /// [`DirtyError::Call`]: nothing is lost, for whatever was found, and whatever was not reached, counts as written
    /// in the next answer.
    pub fn written(&self, range: HvaRange) -> Result<Vec<HvaRange>, DirtyError> {
        self.check(range)?;
        let mut found = self.take_pending(range);
        let mut reached = range.start();
        let outcome = self.scan(range, PM_SCAN_WP_MATCHING, &mut found, &mut reached);
        match outcome {
            Ok(()) => {
                join(&mut found);
                Ok(found)
            }
            Err(error) => {
                found.extend(AddrRange::new(reached, range.end()).ok());
                self.add_pending(&found);
                Err(error)
            }
        }
    }

    /// As [`DirtyFilter::written`], but for what it returns: the pages of `range` that were *not* written since they
    /// were last asked about. Those that were are armed again, and are in no later answer.
    ///
    /// # Errors
    /// Those of [`DirtyFilter::written`].
    pub fn unwritten(&self, range: HvaRange) -> Result<Vec<HvaRange>, DirtyError> {
        Ok(without(range, &self.written(range)?))
    }

    /// What [`DirtyFilter::written`] would return; changes nothing.
    ///
    /// # Errors
    /// Those of [`DirtyFilter::written`]; nothing counts as written on their account.
    pub fn peek(&self, range: HvaRange) -> Result<Vec<HvaRange>, DirtyError> {
        self.check(range)?;
        let mut found: Vec<_> = self.pending.lock().iter().filter_map(|part| part.intersection(&range)).collect();
        self.scan(range, 0, &mut found, &mut range.start())?;
        join(&mut found);
        Ok(found)
    }

    /// Registers and arms what was mapped over `range`; all of it counts as written once.
    ///
    /// # Errors
    /// [`DirtyError::Unaligned`], [`DirtyError::Foreign`]: nothing was done. [`DirtyError::Register`],
    /// [`DirtyError::Call`]: it counts as written, and is not, or only in part, armed.
    pub fn readmit(&self, range: HvaRange) -> Result<(), DirtyError> {
        self.check(range)?;
        self.uffd.register(range).inspect_err(|_| self.add_pending(&[range]))?;
        let armed = self.arm(range);
        // Last: an answer that took it while it was not armed yet would be followed by writes that nobody finds.
        self.add_pending(&[range]);
        armed
    }

    fn arm(&self, range: HvaRange) -> Result<(), DirtyError> {
        self.uffd.protect(range, true).map_err(|error| match error {
            ProtectError::Lapsed { address } => DirtyError::Lapsed { address },
            ProtectError::Failed { range, source } => DirtyError::Call { call: Call::WriteProtect, range, source },
        })
    }

    fn check(&self, range: HvaRange) -> Result<(), DirtyError> {
        let page_size = self.uffd.page_size();
        if !range.is_aligned(page_size) {
            return Err(DirtyError::Unaligned { range, page_size });
        }
        self.uffd.foreign(range).map_or(Ok(()), |address| Err(DirtyError::Foreign { address }))
    }

    fn add_pending(&self, ranges: &[HvaRange]) {
        let mut pending = self.pending.lock();
        pending.extend_from_slice(ranges);
        join(&mut pending);
    }

    fn take_pending(&self, range: HvaRange) -> Vec<HvaRange> {
        let mut pending = self.pending.lock();
        let taken = pending.iter().filter_map(|part| part.intersection(&range)).collect();
        *pending = pending.iter().flat_map(|&part| without(part, &[range])).collect();
        taken
    }

    /// Appends the pages of `range` whose protection is gone to `found`; `reached` is where to go on after an error.
    fn scan(
        &self,
        range: HvaRange,
        flags: u32,
        found: &mut Vec<HvaRange>,
        reached: &mut Hva,
    ) -> Result<(), DirtyError> {
        let failed = |from, source| {
            let range = AddrRange::new(from, range.end()).unwrap_or(range);
            DirtyError::Call { call: Call::ScanPagemap, range, source }
        };
        let mut regions = [page_region { start: 0, end: 0, categories: 0 }; REGIONS];
        while *reached < range.end() {
            let mut arg = scan_of(*reached, range.end());
            arg.flags = u64::from(flags | PM_SCAN_CHECK_WPASYNC);
            arg.category_mask = u64::from(PAGE_IS_WRITTEN);
            arg.return_mask = u64::from(PAGE_IS_WRITTEN);
            let count = match self.uffd.kernel().scan_pagemap(&mut arg, &mut regions) {
                Ok(count) => count,
                // What stands here now is not protected asynchronously (`pagemap_scan_test_walk` in
                // fs/proc/task_mmu.c).
                Err(error) if Errno::from_io_error(&error) == Some(Errno::PERM) => {
                    let address = self.lapsed(*reached, range.end()).unwrap_or(*reached);
                    return Err(DirtyError::Lapsed { address });
                }
                Err(error) => return Err(failed(*reached, error)),
            };
            let region = |region: &page_region| AddrRange::new(Hva::new(region.start), Hva::new(region.end)).ok();
            found.extend(regions.iter().take(count).filter_map(region));
            let walked = Hva::new(arg.walk_end);
            if walked <= *reached {
                let source = io::Error::new(io::ErrorKind::InvalidData, "the scan did not get on");
                return Err(failed(*reached, source));
            }
            *reached = walked;
        }
        Ok(())
    }

    /// The first page between two places that is not registered for asynchronous protection, where that can be found.
    fn lapsed(&self, from: Hva, to: Hva) -> Option<Hva> {
        let mut arg = scan_of(from, to);
        arg.max_pages = 1;
        arg.category_inverted = u64::from(PAGE_IS_WPALLOWED);
        arg.category_mask = u64::from(PAGE_IS_WPALLOWED);
        arg.return_mask = u64::from(PAGE_IS_WPALLOWED);
        let mut regions = [page_region { start: 0, end: 0, categories: 0 }];
        match self.uffd.kernel().scan_pagemap(&mut arg, &mut regions) {
            Ok(1) => Some(Hva::new(regions[0].start)),
            _ => None,
        }
    }
}

fn scan_of(from: Hva, to: Hva) -> pm_scan_arg {
    pm_scan_arg {
        size: 0,
        flags: 0,
        start: from.as_u64(),
        end: to.as_u64(),
        walk_end: 0,
        vec: 0,
        vec_len: 0,
        max_pages: 0,
        category_inverted: 0,
        category_mask: 0,
        category_anyof_mask: 0,
        return_mask: 0,
    }
}
