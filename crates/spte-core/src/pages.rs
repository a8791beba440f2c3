// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Where table pages come from.

use core::ptr::NonNull;

use notifier_core::OutputAddr;

use crate::entry::Entry;

/// Size and alignment of a table page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct TableLayout {
    /// Bytes; a power of two, at least 8. The page is aligned to its size.
    pub bytes: usize,
}

impl TableLayout {
    /// Number of entries.
    #[inline]
    pub const fn entries(self) -> usize {
        self.bytes / 8
    }
}

/// No page is to be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no table page of {bytes:#x} bytes is to be had")]
pub struct OutOfPages {
    /// Bytes asked for.
    pub bytes: usize,
}

/// Gives the engine pages that hardware could walk.
///
/// A page has an output address, which goes into links, and a place where the engine reads and writes its entries.
/// Pages must not be evictable, registered with userfaultfd, or writable by the guest. If the guest can write the
/// page that hardware walks (a VMM may own a guest's own tables), the source gives a private page for
/// [`PageSource::entries`] and the guest's as [`PageSource::mirror`]: links and claims are then kept in the private one,
/// and nothing the guest writes into its page is ever followed.
///
/// Entries are [`Entry`], which is an `AtomicU64` in memory: a pointer to eight-byte words is cast to it. [`HeapPages`](crate::HeapPages)
/// is one to begin with.
///
/// # Safety
/// For every address that [`PageSource::alloc`] returned and [`PageSource::free`] has not been given back:
/// [`PageSource::entries`] returns a pointer to `layout.entries()` initialised entries, aligned, the same at every call,
/// that nobody but the engine (and, in hardware-written bits, hardware) writes; so does [`PageSource::mirror`] where it
/// returns one, but its entries may be written by anybody, atomically. Addresses of two live pages are not equal.
pub unsafe trait PageSource: Send + Sync + 'static {
    /// A page whose entries, in memory order, are all `fill`.
    ///
    /// # Errors
    /// [`OutOfPages`]; nothing was taken.
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages>;

    /// Takes a page back. The engine calls this once, after the flush and the grace period, from any thread and inside any operation
    /// on any table of the process; or at once for a page that was never linked. So it must not wait for a lock that somebody
    /// holds around such operations.
    ///
    /// # Safety
    /// `page` came from [`PageSource::alloc`] with this layout, is not yet free, and nobody uses it any more.
    unsafe fn free(&self, page: OutputAddr, layout: TableLayout);

    /// The entries of the page at `page`.
    ///
    /// # Safety
    /// `page` came from [`PageSource::alloc`] with this layout and is not yet free.
    unsafe fn entries(&self, page: OutputAddr, layout: TableLayout) -> NonNull<Entry>;

    /// The entries that hardware walks, where they are not [`PageSource::entries`] itself.
    ///
    /// # Safety
    /// As for [`PageSource::entries`].
    unsafe fn mirror(&self, page: OutputAddr, layout: TableLayout) -> Option<NonNull<Entry>> {
        let _ = (page, layout);
        None
    }
}
