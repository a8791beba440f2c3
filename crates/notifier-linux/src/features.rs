// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the running kernel can do of what this crate would like to use.

use std::{fmt, io, os::fd::AsFd};

use linux_raw_sys::general::{
    UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_ASYNC, UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, page_region, pm_scan_arg,
};
use notifier_core::{AddrRange, Hva};

use crate::kernel::Kernel;

/// Something that not every kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// A userfaultfd that sees the kernel's own faults too, for this process.
    Userfaultfd,
    /// Write protection of private anonymous memory.
    WriteProtect,
    /// Write protection of shared memory (memfd, tmpfs).
    WriteProtectShared,
    /// Write protection of anonymous pages that were never touched.
    WriteProtectUnpopulated,
    /// Write protection that the kernel lifts by itself at the first write.
    WriteProtectAsync,
    /// A message before `MADV_DONTNEED` and its like.
    EventRemove,
    /// A message after something was unmapped.
    EventUnmap,
    /// A message after something was moved.
    EventRemap,
    /// A search of the page tables by kind of page.
    PagemapScan,
    /// Faulting ranges in ahead.
    Populate,
}

impl Feature {
    /// Every feature there is.
    pub const ALL: &'static [Feature] = &[
        Feature::Userfaultfd,
        Feature::WriteProtect,
        Feature::WriteProtectShared,
        Feature::WriteProtectUnpopulated,
        Feature::WriteProtectAsync,
        Feature::EventRemove,
        Feature::EventUnmap,
        Feature::EventRemap,
        Feature::PagemapScan,
        Feature::Populate,
    ];

    /// What it is.
    pub fn name(self) -> &'static str {
        match self {
            Feature::Userfaultfd => "userfaultfd with the kernel's own faults",
            Feature::WriteProtect => "write protection of anonymous memory",
            Feature::WriteProtectShared => "write protection of shared memory",
            Feature::WriteProtectUnpopulated => "write protection of untouched memory",
            Feature::WriteProtectAsync => "write protection that lifts itself",
            Feature::EventRemove => "messages of discarded memory",
            Feature::EventUnmap => "messages of unmapped memory",
            Feature::EventRemap => "messages of moved memory",
            Feature::PagemapScan => "scans of the page tables",
            Feature::Populate => "faulting memory in ahead",
        }
    }

    /// The kernel's own name for it.
    pub fn kernel_name(self) -> &'static str {
        match self {
            Feature::Userfaultfd => "userfaultfd(2), vm.unprivileged_userfaultfd",
            Feature::WriteProtect => "UFFD_FEATURE_PAGEFAULT_FLAG_WP",
            Feature::WriteProtectShared => "UFFD_FEATURE_WP_HUGETLBFS_SHMEM",
            Feature::WriteProtectUnpopulated => "UFFD_FEATURE_WP_UNPOPULATED",
            Feature::WriteProtectAsync => "UFFD_FEATURE_WP_ASYNC",
            Feature::EventRemove => "UFFD_FEATURE_EVENT_REMOVE",
            Feature::EventUnmap => "UFFD_FEATURE_EVENT_UNMAP",
            Feature::EventRemap => "UFFD_FEATURE_EVENT_REMAP",
            Feature::PagemapScan => "PAGEMAP_SCAN",
            Feature::Populate => "MADV_POPULATE_READ, MADV_POPULATE_WRITE",
        }
    }

    /// The first Linux that has it: major and minor version (`ioctl_userfaultfd(2)`, `madvise(2)`,
    /// `PAGEMAP_SCAN(2const)`).
    pub fn since(self) -> (u32, u32) {
        match self {
            Feature::Userfaultfd => (4, 3),
            Feature::EventRemove | Feature::EventUnmap | Feature::EventRemap => (4, 11),
            Feature::WriteProtect => (5, 7),
            Feature::Populate => (5, 14),
            Feature::WriteProtectShared => (5, 19),
            Feature::WriteProtectUnpopulated => (6, 4),
            Feature::WriteProtectAsync | Feature::PagemapScan => (6, 7),
        }
    }

    /// Its bit of `UFFDIO_API`, where it has one.
    fn bit(self) -> Option<u64> {
        Some(u64::from(match self {
            Feature::WriteProtect => UFFD_FEATURE_PAGEFAULT_FLAG_WP,
            Feature::WriteProtectShared => UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
            Feature::WriteProtectUnpopulated => UFFD_FEATURE_WP_UNPOPULATED,
            Feature::WriteProtectAsync => UFFD_FEATURE_WP_ASYNC,
            Feature::EventRemove => UFFD_FEATURE_EVENT_REMOVE,
            Feature::EventUnmap => UFFD_FEATURE_EVENT_UNMAP,
            Feature::EventRemap => UFFD_FEATURE_EVENT_REMAP,
            Feature::Userfaultfd | Feature::PagemapScan | Feature::Populate => return None,
        }))
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor) = self.since();
        write!(f, "{} ({}; Linux {major}.{minor})", self.name(), self.kernel_name())
    }
}

/// The running kernel does not have, or does not permit, something that was asked for.
#[derive(Debug, thiserror::Error)]
#[error("this kernel does not offer {feature}{}", source.as_ref().map_or_else(String::new, |source| format!(": {source}")))]
pub struct Missing {
    /// What is missing.
    pub feature: Feature,
    /// What the kernel said, where it said anything.
    #[source]
    pub source: Option<io::Error>,
}

/// What the running kernel has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// What `UFFDIO_API` offers.
    userfaultfd: Result<u64, Option<i32>>,
    pagemap_scan: Result<(), Option<i32>>,
    populate: Result<(), Option<i32>>,
    mapping_limit: Option<u64>,
}

impl Features {
    /// Asks the kernel. Makes a userfaultfd for a moment, and changes nothing.
    pub fn detect(kernel: &Kernel) -> Self {
        let userfaultfd = || -> io::Result<u64> {
            let uffd = kernel.userfaultfd()?;
            // With none asked for, the answer is all that there are (`userfaultfd_api` in fs/userfaultfd.c).
            kernel.userfaultfd_api(uffd.as_fd(), 0)
        };
        // A page that is mapped for sure: that of a local variable.
        let here = 0_u8;
        let page = rustix::param::page_size() as u64;
        let here = Hva::new(std::ptr::from_ref(&here).addr() as u64).align_down(page);
        let populate = AddrRange::with_len(here, page).map_err(io::Error::other);
        let scan = || {
            let nowhere = page_region { start: 0, end: 0, categories: 0 };
            // `start == end`: looks at nothing.
            let mut arg = pm_scan_arg {
                size: 0,
                flags: 0,
                start: here.as_u64(),
                end: here.as_u64(),
                walk_end: 0,
                vec: 0,
                vec_len: 0,
                max_pages: 0,
                category_inverted: 0,
                category_mask: 0,
                category_anyof_mask: 0,
                return_mask: 0,
            };
            kernel.scan_pagemap(&mut arg, &mut [nowhere])
        };
        let number = |error: io::Error| error.raw_os_error();
        Self {
            userfaultfd: userfaultfd().map_err(number),
            pagemap_scan: scan().map(drop).map_err(number),
            populate: populate.and_then(|page| kernel.populate_read(page)).map_err(number),
            mapping_limit: kernel.mapping_limit().ok(),
        }
    }

    fn look(&self, feature: Feature) -> Result<(), Option<i32>> {
        match feature {
            Feature::PagemapScan => self.pagemap_scan,
            Feature::Populate => self.populate,
            _ => {
                let offered = self.userfaultfd?;
                if feature.bit().is_some_and(|bit| offered & bit == 0) { Err(None) } else { Ok(()) }
            }
        }
    }

    /// Whether the kernel has it, and permits it to this process.
    pub fn has(&self, feature: Feature) -> bool {
        self.look(feature).is_ok()
    }

    /// Insists on it.
    ///
    /// # Errors
    /// [`Missing`].
    pub fn require(&self, feature: Feature) -> Result<(), Missing> {
        self.look(feature).map_err(|number| Missing { feature, source: number.map(io::Error::from_raw_os_error) })
    }

    /// Mappings that a process may have (`vm.max_map_count`), where that can be read.
    pub fn mapping_limit(&self) -> Option<u64> {
        self.mapping_limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Call;

    fn failing(fails: Call, number: i32) -> Features {
        Features::detect(&Kernel::with_hook(move |call| {
            if call == fails { Err(io::Error::from_raw_os_error(number)) } else { Ok(()) }
        }))
    }

    #[test]
    fn what_the_kernel_refuses_is_missing_with_its_reason() {
        let features = failing(Call::OpenUserfaultfd, 1);
        for feature in [Feature::Userfaultfd, Feature::WriteProtect, Feature::EventRemove] {
            assert!(!features.has(feature));
            let missing = features.require(feature).unwrap_err();
            assert_eq!(missing.feature, feature);
            assert_eq!(missing.source.unwrap().raw_os_error(), Some(1));
        }
        assert!(!failing(Call::UserfaultfdApi, 22).has(Feature::WriteProtectAsync));
        assert!(!failing(Call::ScanPagemap, 25).has(Feature::PagemapScan));
        assert!(!failing(Call::PopulateRead, 22).has(Feature::Populate));
        assert_eq!(failing(Call::MappingLimit, 2).mapping_limit(), None);
    }

    #[test]
    fn a_missing_feature_is_named_with_the_kernels_name_and_version() {
        let missing = failing(Call::PopulateRead, 22).require(Feature::Populate).unwrap_err().to_string();
        assert!(missing.contains("MADV_POPULATE_READ") && missing.contains("Linux 5.14"), "{missing}");
        for feature in Feature::ALL {
            let (major, minor) = feature.since();
            assert!(feature.to_string().contains(&format!("Linux {major}.{minor}")));
            assert!(feature.to_string().contains(feature.kernel_name()));
        }
    }

    #[test]
    fn detection_agrees_with_the_kernels_version() {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|n| n.parse::<u32>().unwrap_or(0));
        let version = (numbers.next().unwrap(), numbers.next().unwrap());
        let features = Features::detect(&Kernel::new());
        // What a kernel is too old for it does not have. (What it is new enough for may be configured away.)
        for &feature in Feature::ALL {
            assert!(version >= feature.since() || !features.has(feature), "{feature} on {release}");
        }
        assert_eq!(features.has(Feature::Populate), version >= Feature::Populate.since());
    }
}
