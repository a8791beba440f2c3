// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What caches and tags need before a guest sees a page, and after it no longer does.
//!
//! A guest may run with its caches off, and its instruction cache does not follow data. So before a leaf is made, and after
//! one is gone, somebody has to do what [`Duties`] says. This crate builds numbers and can do none of it: [`Maintenance`]
//! is for the VMM or hypervisor to implement, and [`Duties::perform`] calls it in order.
//!
//! **Where to call it.** The engine calls nobody between claim and publish. Before a page is mapped, or made executable,
//! the duties are done in [`Fault::resolve`](notifier_core::Fault::resolve), whose work may sleep and fault and comes before
//! the install; a retry does them again, which is harmless. So the order of break-before-make (break, clean, make) is
//! here clean, break, make: no guest reaches the new page before the make, so nothing it does can come between. For a
//! page that `change_pte` repoints to, they are done by whoever compares the pages, before the call. After an unmap
//! they are done when the operation, or the opening of the window, has returned: it returns after the flush.
//!
//! Linux: `kvm_clean_inval_dcache_to_poc` and `kvm_icache_inval` by `stage2_map_walker_try_leaf` (`dcache_clean_inval_poc`,
//! `icache_inval_pou` of `struct kvm_pgtable_mm_ops`), `stage2_unmap_put_pte`, `sanitise_mte_tags`.

use notifier_core::{Access, OutputAddr};

use crate::{memtype::MemoryType, stage2::Stage2};

/// What processors do by themselves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CacheFeatures {
    /// CTR_EL0.DIC: instruction caches need no invalidation.
    pub instructions_follow_data: bool,
    /// The guest uses memory tags (FEAT_MTE2).
    pub tags: bool,
}

/// What has to be done for one page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Duties {
    /// Clean and invalidate data to the point of coherency.
    pub clean: bool,
    /// Clear the page's tags, unless it has the guest's already.
    pub tags: bool,
    /// Invalidate instructions to the point of unification.
    pub instructions: bool,
}

/// Does what a page needs. `page` is a host physical address, `bytes` the size of a leaf.
pub trait Maintenance {
    /// Why something could not be done.
    type Error;

    /// Cleans and invalidates data caches to the point of coherency (`DC CIVAC` over the page, `DSB ISH`).
    ///
    /// # Errors
    /// Whatever the implementation fails with; the page must not be mapped then, or given to others.
    fn clean_to_point_of_coherency(&self, page: OutputAddr, bytes: u64) -> Result<(), Self::Error>;

    /// Sees to it that the page's tags are no other owner's.
    ///
    /// # Errors
    /// As above.
    fn initialise_tags(&self, page: OutputAddr, bytes: u64) -> Result<(), Self::Error>;

    /// Invalidates instruction caches to the point of unification, on all processors.
    ///
    /// # Errors
    /// As above.
    fn invalidate_instructions(&self, page: OutputAddr, bytes: u64) -> Result<(), Self::Error>;
}

/// For tables that only software walks.
impl Maintenance for () {
    type Error = core::convert::Infallible;

    fn clean_to_point_of_coherency(&self, _: OutputAddr, _: u64) -> Result<(), Self::Error> {
        Ok(())
    }
    fn initialise_tags(&self, _: OutputAddr, _: u64) -> Result<(), Self::Error> {
        Ok(())
    }
    fn invalidate_instructions(&self, _: OutputAddr, _: u64) -> Result<(), Self::Error> {
        Ok(())
    }
}

impl Duties {
    /// Calls `maintenance` for everything that has to be done, tags first (they are data), instructions last (they are
    /// fetched from what was cleaned).
    ///
    /// # Errors
    /// The first that `maintenance` gives; what comes after it was not done.
    pub fn perform<M: Maintenance>(self, maintenance: &M, page: OutputAddr, bytes: u64) -> Result<(), M::Error> {
        if self.tags {
            maintenance.initialise_tags(page, bytes)?;
        }
        if self.clean {
            maintenance.clean_to_point_of_coherency(page, bytes)?;
        }
        if self.instructions {
            maintenance.invalidate_instructions(page, bytes)?;
        }
        Ok(())
    }

    /// Whether nothing has to be done.
    pub const fn is_nothing(self) -> bool {
        !self.clean && !self.tags && !self.instructions
    }
}

impl Stage2 {
    /// Before a page of this type is mapped with these rights. Data is cleaned unless FWB makes the guest's view coherent;
    /// devices have neither data nor tags to clean.
    pub fn before_mapping(&self, features: CacheFeatures, memory: MemoryType, access: Access) -> Duties {
        let cacheable = memory.is_cacheable();
        Duties {
            clean: cacheable && !self.options().fwb,
            tags: cacheable && features.tags,
            instructions: access.contains(Access::EXECUTE) && !features.instructions_follow_data,
        }
    }

    /// Before a leaf that is mapped with `old` rights gets `new` ones.
    pub fn before_relaxing(&self, features: CacheFeatures, old: Access, new: Access) -> Duties {
        let gains = new.contains(Access::EXECUTE) && !old.contains(Access::EXECUTE);
        Duties { instructions: gains && !features.instructions_follow_data, ..Duties::default() }
    }

    /// After a page of this type was unmapped and flushed, before others read it.
    pub fn after_unmapping(&self, memory: MemoryType) -> Duties {
        Duties { clean: memory.is_cacheable() && !self.options().fwb, ..Duties::default() }
    }
}
