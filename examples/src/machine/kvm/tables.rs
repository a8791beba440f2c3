// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The tables behind CR3: guest-virtual to guest-physical, the same numbers.
//!
//! They are made before any vCPU is, and never changed after: changes of host memory happen below them, in what KVM
//! keeps. So they have a space of their own, without slots, and need no flush.
#![allow(unsafe_code)]

use std::{convert::Infallible, ptr::NonNull, sync::Arc};

use notifier_core::{Access, Extent, GpaRange, OutputAddr, Space, Subscription};
use parking_lot::Mutex;
use spte_core::{Entry, MapOptions, OutOfPages, PageSource, Table, TableLayout};
use spte_x86::{LongMode, LongModeAttrs, LongModeOptions};

use super::control::{Control, Mapping};
use crate::machine::{MachineError, PAGE};

/// The guest's own table: what CR3 points at. Its "guest physical" addresses are the guest's virtual ones, and its outputs
/// are guest-physical.
pub type GuestTable = Table<LongMode, ControlPages, ()>;

/// Table pages in the control region: a page's output address is its guest-physical address.
#[derive(Debug)]
pub struct ControlPages {
    control: Arc<Control>,
    /// Pages of the region that are free.
    free: Mutex<Vec<usize>>,
}

impl ControlPages {
    fn new(control: Arc<Control>) -> Self {
        // The lowest first.
        let free = Mutex::new(control.table_pages().rev().collect());
        Self { control, free }
    }

    /// How many page-table pages identity maps of these ranges need at most, the root included.
    pub(super) fn needed(ranges: impl Iterator<Item = GpaRange>) -> usize {
        // A range begins and ends anywhere, so that at each level one node more than its size asks for can be needed. Below
        // leaves of 1G and 2M only the ends of a range need nodes; without 1G leaves each gigabyte has one.
        let nodes = |range: GpaRange, bits: u32| {
            let last = range.end().as_u64() - 1;
            (last >> bits) - (range.start().as_u64() >> bits) + 1
        };
        let of = |range: GpaRange| nodes(range, 39) + nodes(range, 30) + nodes(range, 21).min(2);
        1 + ranges.map(of).sum::<u64>() as usize
    }

    fn entries_of(&self, page: OutputAddr) -> *mut Entry {
        let offset = page.as_u64().wrapping_sub(self.control.base().as_u64()) as usize;
        self.control.memory().as_ptr().wrapping_add(offset).cast()
    }
}

// SAFETY: a page is a whole page of the control region's mapping, which lives as long as `self` has the region; the mapping is
// page-aligned, and its pages are among those that the region keeps for tables and uses for nothing else. The guest cannot write
// them: no table maps them. Entries are initialised: anonymous memory is zero, and `alloc` fills them. Each page is given out
// once, as it leaves the free list, and so addresses of live pages differ.
unsafe impl PageSource for ControlPages {
    fn alloc(&self, layout: TableLayout, fill: u64) -> Result<OutputAddr, OutOfPages> {
        let out = OutOfPages { bytes: layout.bytes };
        if layout.bytes != PAGE {
            return Err(out);
        }
        let index = self.free.lock().pop().ok_or(out)?;
        let page = OutputAddr::new(self.control.base().as_u64() + (index * PAGE) as u64);
        let entries = self.entries_of(page);
        for index in 0..layout.entries() {
            // SAFETY: inside a page of the region that was free until now, so that nobody else uses it.
            unsafe { entries.add(index).write(Entry::new(fill)) };
        }
        Ok(page)
    }

    unsafe fn free(&self, page: OutputAddr, _: TableLayout) {
        let index = page.as_u64().wrapping_sub(self.control.base().as_u64()) as usize / PAGE;
        self.free.lock().push(index);
    }

    unsafe fn entries(&self, page: OutputAddr, _: TableLayout) -> NonNull<Entry> {
        // SAFETY: `page` came from `alloc`, and so its entries are in the region's mapping, which is not at address 0.
        unsafe { NonNull::new_unchecked(self.entries_of(page)) }
    }
}

/// The table, and its place in its space.
#[derive(Debug)]
pub(super) struct Tables {
    table: Arc<GuestTable>,
    _subscription: Subscription,
}

impl Tables {
    /// Maps all of `ram` (user, read and write), and of the control region what it says.
    pub(super) fn new(
        control: &Arc<Control>,
        ram: &[GpaRange],
        options: LongModeOptions,
    ) -> Result<Self, MachineError> {
        let space = Space::new();
        let pages = Arc::new(ControlPages::new(Arc::clone(control)));
        let table = Table::new(&space, LongMode::new(options)?, pages, ())?;
        let subscription = space.subscribe(Arc::clone(&table))?;
        let tables = Self { table, _subscription: subscription };
        for &range in ram {
            tables.map(range, Access::RW, true)?;
        }
        for Mapping { at, bytes, access, user } in control.mappings() {
            tables.map(GpaRange::with_len(at, bytes)?, access, user)?;
        }
        Ok(tables)
    }

    fn map(&self, range: GpaRange, access: Access, user: bool) -> Result<(), MachineError> {
        // Accessed and dirty already: neither hardware nor KVM has anything to write into the table.
        let options = MapOptions::default().attrs(LongModeAttrs { user, ..LongModeAttrs::default() }).dirty(true);
        let mut walker = self.table.space().walker();
        let extent = Extent { guest: range, output: OutputAddr::new(range.start().as_u64()), access };
        let resolved = walker.fault(range)?.resolve(|_| Ok::<_, Infallible>(extent))?;
        resolved.install(|admission| self.table.map(admission, &options))?;
        Ok(())
    }

    pub(super) fn table(&self) -> &GuestTable {
        &self.table
    }

    /// The root's guest-physical address.
    pub(super) fn root(&self) -> OutputAddr {
        self.table.root()
    }
}

#[cfg(test)]
mod tests {
    use notifier_core::Gpa;

    use super::*;

    fn range(start: u64, len: u64) -> GpaRange {
        GpaRange::with_len(Gpa::new(start), len).unwrap()
    }

    /// Without 1G leaves, which need the most table pages; odd bounds at each level.
    #[test]
    fn the_pages_set_aside_are_enough() {
        let layouts: [&[(u64, u64)]; 4] = [
            &[(0, 0x800_0000)],
            &[(0x1000, 0x1000)],
            &[(0x3fff_f000, 0x2000), (0x1_0000_0000, 0x8000_1000)],
            &[(0, 0xa_0000), (0x10_0000, 0x7ff0_0000), (0x7f_ffff_f000, 0x4000_3000)],
        ];
        for layout in layouts {
            let mut ranges: Vec<GpaRange> = layout.iter().map(|&(start, len)| range(start, len)).collect();
            let base = 0x1ff_ffff_f000;
            let table_pages = ControlPages::needed(ranges.iter().copied().chain([range(base, 1 << 20)]));
            let control = Arc::new(Control::new(Gpa::new(base), 2, table_pages).unwrap());
            let options = LongModeOptions { pages_1g: false, ..LongModeOptions::default() };
            let tables = Tables::new(&control, &ranges, options).unwrap();
            tables.table().check().unwrap();
            let table_range = control.table_pages();
            assert_eq!(table_range.len(), table_pages);
            // And what holds the tables is mapped by none of them.
            ranges.push(range(base + (table_range.start * PAGE) as u64, (table_pages * PAGE) as u64));
            let mut seen = 0;
            tables.table().visit(ranges[ranges.len() - 1], |found| {
                seen += u64::from(matches!(found.kind, spte_core::format::Kind::Leaf));
            });
            assert_eq!(seen, 0);
        }
    }
}
