// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Merging while guests do nothing: what the merging itself costs, ours and the kernel's on the same images.
//!
//! Guests are on KVM and have read all of their RAM, so that KVM translates all of it and follows every merge; then they
//! stand still. Devices' tables translate all of RAM as well, in ours. At the end the guests read all of their RAM once
//! more, and every page is held against its image.

use std::{
    collections::HashSet,
    sync::{Arc, atomic::AtomicBool},
    time::{Duration, Instant},
};

use notifier_core::{AddrRange, HvaRange};
use notifier_linux::Kernel;
use serde::Serialize;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    cli::{MergeMode, Options, Safety},
    clock::thread_cpu,
    error::Error,
    guest::{Guest, Run},
    home::Home,
    images::Images,
    mapped::{Mapped, RamKind},
    mapping::gpa,
    memory::{PAGE, host_address},
    merger::Merger,
    store::{Store, fingerprint},
    table::TableFormat,
    tally::Tally,
    vcpu::Pace,
};
use crate::{
    ksm::{self, KsmRun, Paths, Plan},
    machine::{Machine, Vcpu},
};

/// What one merger did, alone.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Quiet {
    /// Pages that need not be there: all, less one for each different contents.
    pub spare: u64,
    /// Pages that lead to a shared frame.
    pub merged: u64,
    /// Pages that are no longer there: those merged, less the frames they share.
    pub saved: u64,
    /// Bytes that the host has back.
    pub bytes_returned: u64,
    /// Processor time of the merger, all in all.
    pub cpu: Duration,
    /// Time, all in all.
    pub wall: Duration,
    /// Processor time and time when 95 % of the spare pages were saved; `None` where that was not reached.
    pub at_95: Option<(Duration, Duration)>,
    /// Mappings of guests' RAM at the end.
    pub mappings: u64,
}

impl Quiet {
    /// Processor time of the merger for a page merged.
    pub fn cpu_per_page(&self) -> Option<Duration> {
        u32::try_from(self.merged).ok().and_then(|merged| self.cpu.checked_div(merged))
    }
}

/// RAM that merging is tried on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Ram {
    /// Private and anonymous.
    Anonymous,
    /// A memory file, shared. KSM does not look at it.
    SharedFile,
}

/// One guest, standing still: its vCPU and what its pages must read.
#[derive(Debug)]
struct Still {
    vcpu: Vcpu,
    layout: Vec<u32>,
    _machine: Machine,
}

impl Still {
    /// A guest on KVM whose vCPU has read all of its RAM.
    fn new(memory: &GuestMemoryMmap<()>, images: &Images, layout: Vec<u32>) -> Result<Self, Error> {
        let (machine, mut vcpus) = Machine::new(memory, 1)?;
        let mut still = Self { vcpu: vcpus.pop().ok_or(Error::NoVcpu)?, layout, _machine: machine };
        still.look(images)?;
        Ok(still)
    }

    /// Reads all of RAM, natively, and compares it.
    fn look(&mut self, images: &Images) -> Result<(), Error> {
        let mut read = Vec::new();
        for (index, chunk) in self.layout.chunks(64).enumerate() {
            let first = index * 64;
            let pages: Vec<_> = (first..first + chunk.len()).map(gpa).collect();
            read.clear();
            self.vcpu.read(&pages, &mut read)?;
            for ((&image, seen), page) in chunk.iter().zip(&read).zip(first..) {
                if seen != images.page(image) {
                    return Err(Error::Damaged { gpa: gpa(page) });
                }
            }
        }
        Ok(())
    }
}

fn layouts(options: &Options, images: &Images) -> Vec<Vec<u32>> {
    (0..options.guests)
        .map(|guest| images.layout(options.seed.wrapping_mul(64).wrapping_add(u64::from(guest))))
        .collect()
}

/// Pages of all guests, less the different contents among them.
fn spare(images: &Images, guests: u32) -> u64 {
    let different: HashSet<u64> = (0..images.pages() as u32).map(|page| fingerprint(images.page(page))).collect();
    u64::from(guests) * images.pages() as u64 - different.len() as u64
}

/// Ours. Of the options, those count that say what guests' RAM holds.
///
/// # Errors
/// [`Error`]; [`Error::Damaged`] where a guest does not read what it must.
pub fn merge_quietly(options: &Options, ram: Ram, interrupt: &AtomicBool) -> Result<Quiet, Error> {
    let images = Arc::new(Images::load(&options.image, options.pages(), options.seed)?);
    let spare = spare(&images, options.guests);
    let all = u64::from(options.guests) * options.pages() as u64;
    let store = Arc::new(Store::for_mapping(u32::try_from(all).map_err(|_| Error::StoreFull)?)?);
    let tally = Arc::new(Tally::default());
    let kind = match ram {
        Ram::Anonymous => RamKind::Anonymous,
        Ram::SharedFile => RamKind::SharedFile,
    };
    let mut guests = Vec::new();
    let mut stills = Vec::new();
    for layout in layouts(options, &images) {
        let home = |space: &_, pages| {
            let (kernel, safety) = (Kernel::new(), Safety::Safe);
            let mapped = Mapped::new(space, pages, kind, store.file(), &kernel, safety, &tally)?;
            Ok(Home::Mapped(Box::new(mapped)))
        };
        let pace = Pace::new(options.guests, options.pages());
        let safety = Safety::Safe;
        let format = TableFormat::default();
        let common = Run { images: &images, store: &store, tally: &tally, format, safety, pace, interrupt };
        let guest = Guest::new(home, &layout, &common)?;
        guest.prefetch_all()?;
        stills.push(Still::new(guest.home.memory(), &images, layout)?);
        guests.push(guest);
    }
    let resident = || guests.iter().map(|guest| guest.home.resident()).sum::<Result<u64, Error>>();
    let before = resident()?;

    let mut merger = Merger::new(&guests, &store, &tally, MergeMode::Change, Safety::Safe);
    merger.mark(spare * 95 / 100);
    let (began, cpu_began) = (Instant::now(), thread_cpu());
    merger.until_quiet(interrupt)?;
    let (wall, cpu) = (began.elapsed(), thread_cpu().saturating_sub(cpu_began));

    let merged: u64 = guests.iter().map(|guest| guest.mapping.merged()).sum();
    let at_95 = merger.marked().map(|(at, used)| (used.saturating_sub(cpu_began), at.saturating_duration_since(began)));
    let bytes_returned = before.saturating_sub(resident()?).saturating_sub(store.file().resident()?);
    stills.iter_mut().try_for_each(|still| still.look(&images))?;
    let ranges = guests.iter().map(|guest| guest.host_range(0, guest.pages())).collect::<Result<Vec<_>, _>>()?;
    let mappings = ksm::Sums::of(&Paths::system(), &ranges)?.mappings;
    Ok(Quiet { spare, merged, saved: merged - store.in_use(), bytes_returned, cpu, wall, at_95, mappings })
}

/// The kernel's, on the same images.
///
/// # Errors
/// As for [`merge_quietly`]; [`Error::Ksm`].
pub fn merge_with_ksm(options: &Options, plan: &Plan, interrupt: &AtomicBool) -> Result<Quiet, Error> {
    let images = Images::load(&options.image, options.pages(), options.seed)?;
    let spare = spare(&images, options.guests);
    let mut memories = Vec::new();
    let mut stills = Vec::new();
    let mut ranges: Vec<HvaRange> = Vec::new();
    for layout in layouts(options, &images) {
        let len = layout.len() * PAGE;
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), len)])
            .map_err(|source| Error::Map { what: "RAM", source })?;
        for (page, &image) in layout.iter().enumerate() {
            memory.write_slice(images.page(image), GuestAddress((page * PAGE) as u64))?;
        }
        ranges.push(AddrRange::with_len(host_address(&memory)?, len as u64)?);
        stills.push(Still::new(&memory, &images, layout)?);
        memories.push(memory);
    }
    let run: KsmRun = ksm::merge_with_ksm(&Paths::system(), &ranges, plan, interrupt)?;
    stills.iter_mut().try_for_each(|still| still.look(&images))?;
    // Not by KSM's counters of the host: they go on counting what is no longer mapped, until it scans again.
    let bytes_returned = u64::try_from(run.returned()).unwrap_or(0);
    let saved = (bytes_returned / PAGE as u64).min(run.merged_pages);
    // Samples say how many pages are merged; those that are not there any more are to be compared.
    let target = (spare * 95 / 100).saturating_add(run.merged_pages - saved);
    Ok(Quiet {
        spare,
        merged: run.merged_pages,
        saved,
        bytes_returned,
        cpu: run.ksmd_cpu,
        wall: run.wall,
        at_95: run.reached(target).map(|sample| (sample.ksmd_cpu, sample.at)),
        mappings: run.mappings[1].mappings,
    })
}
