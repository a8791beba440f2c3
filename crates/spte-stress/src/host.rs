// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The machine that is lied about: frames, the host's mapping of guest pages to them, and the truth about their contents.
//!
//! A frame has a tag, which says whose contents it holds, and a value, which counts the writes. A frame that is freed is
//! poisoned at once and reused soon: whoever still translates to it reads the wrong tag, or spoils the poison. The ledger
//! counts the writes a second time, by guest page, where no translation has a part in it.
//!
//! Everything that readers and writers touch is loaded and stored relaxed: that nobody reads a frame of somebody else is
//! the library's doing, or nobody's.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
    },
};

use notifier_core::{AddrRange, Gpa, GpaRange, Hva, HvaRange, OutputAddr};

use crate::random::Random;

pub(crate) const PAGE: u64 = 4096;
/// Pages of a region: as many as a 2M leaf has.
pub(crate) const SPAN: usize = 512;
pub(crate) const REGION: u64 = PAGE * SPAN as u64;
/// Regions of guest memory. The last has no host address and is known by guest addresses alone (guest_memfd).
pub(crate) const REGIONS: usize = 4;
pub(crate) const LOGGED_REGION: usize = 2;
pub(crate) const MEMFD_REGION: usize = 3;
pub(crate) const PAGES: usize = REGIONS * SPAN;
/// Pages that are ballooned out and in again: a part of one region, so that the others can be whole.
pub(crate) const BALLOON: std::ops::Range<usize> = SPAN + 480..SPAN + 504;

pub(crate) const HOST_BASE: u64 = 1 << 40;
pub(crate) const ALIAS_BASE: u64 = 1 << 30;
pub(crate) const LOGGED_BASE: u64 = 2 << 30;
pub(crate) const MEMFD_BASE: u64 = 3 << 30;
const OUTPUT_BASE: u64 = 1 << 32;

/// Frames that are handed out one by one, behind which come the blocks of 2M.
const SMALL: usize = 4 * PAGES;
const BLOCKS: usize = 3 * REGIONS;

const POISON: u64 = 0xdead_0000_0000_0000;
const SHARED: u64 = 1 << 32;

/// What a run found wrong first, and the order to stop.
#[derive(Debug, Default)]
pub(crate) struct Failure {
    stop: AtomicBool,
    first: Mutex<Option<String>>,
}

impl Failure {
    pub(crate) fn report(&self, what: impl Into<String>) {
        let mut first = self.first.lock().unwrap();
        first.get_or_insert(what.into());
        self.stop.store(true, SeqCst);
    }

    pub(crate) fn happened(&self) -> bool {
        self.stop.load(Relaxed)
    }

    pub(crate) fn take(&self) -> Option<String> {
        self.first.lock().unwrap().take()
    }
}

/// What the host says about a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Backing {
    pub(crate) frame: u32,
    /// Several pages with equal contents: nobody may write.
    pub(crate) shared: bool,
}

#[derive(Debug, Default)]
struct Frame {
    tag: AtomicU64,
    value: AtomicU64,
    /// Pages that are backed by it; changed by who holds their regions.
    users: AtomicU32,
}

#[derive(Debug)]
pub(crate) struct Host {
    frames: Vec<Frame>,
    small: Mutex<Vec<u32>>,
    blocks: Mutex<Vec<u32>>,
    block_users: Vec<AtomicU32>,
    backing: Vec<AtomicU64>,
    /// Writes, counted beside the frames.
    pub(crate) ledger: Vec<AtomicU64>,
    /// Odd while a page is ballooned out; a change says that its count began anew.
    pub(crate) epochs: Vec<AtomicU64>,
    regions: Vec<Mutex<()>>,
    /// Frames that pages of equal contents share, by contents.
    stable: Mutex<HashMap<(u64, u64), u32>>,
    /// Frames that may be freed when no window is in progress.
    deferred: Mutex<Vec<u32>>,
    /// Written and not yet copied.
    pub(crate) dirty: Vec<AtomicBool>,
    /// How often the slot of the alias changed, and what it is: see [`Alias`].
    pub(crate) alias: AtomicU64,
    /// Windows over a page that somebody began to open, and those that are closed for certain.
    pub(crate) opened: Vec<AtomicU64>,
    pub(crate) closed: Vec<AtomicU64>,
    pub(crate) failure: Failure,
}

/// The alias slot: which region it shows, if any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Alias(u64);

impl Alias {
    pub(crate) fn new(serial: u64, region: Option<usize>, read_only: bool) -> Self {
        Self(serial << 4 | u64::from(read_only) << 2 | region.map_or(2, |region| region as u64))
    }
    pub(crate) fn changing(serial: u64) -> Self {
        Self(serial << 4 | 3)
    }
    pub(crate) fn from_u64(raw: u64) -> Self {
        Self(raw)
    }
    pub(crate) fn as_u64(self) -> u64 {
        self.0
    }
    pub(crate) fn is_changing(self) -> bool {
        self.0 & 3 == 3
    }
    pub(crate) fn region(self) -> Option<usize> {
        (self.0 & 3 < 2).then_some((self.0 & 3) as usize)
    }
    pub(crate) fn read_only(self) -> bool {
        self.0 & 4 != 0
    }
}

/// Whether others have pages with the same contents now and then.
pub(crate) fn is_mergeable(page: usize) -> bool {
    page % 8 < 2
}

pub(crate) fn tag_of(page: usize) -> u64 {
    if is_mergeable(page) { 0x1000 + (page as u64 / 8) % 4 } else { 0x10_0000 + page as u64 }
}

/// What a page holds after so many writes.
pub(crate) fn value_of(page: usize, writes: u64) -> u64 {
    if is_mergeable(page) { writes % 4 } else { writes }
}

pub(crate) fn output_of(frame: u32) -> OutputAddr {
    OutputAddr::new(OUTPUT_BASE + u64::from(frame) * PAGE)
}

pub(crate) fn frame_at(output: OutputAddr) -> Option<u32> {
    let index = output.as_u64().checked_sub(OUTPUT_BASE)? / PAGE;
    (index < (SMALL + BLOCKS * SPAN) as u64).then_some(index as u32)
}

pub(crate) fn gpa_of(page: usize) -> Gpa {
    let (region, offset) = (page / SPAN, (page % SPAN) as u64 * PAGE);
    Gpa::new(match region {
        LOGGED_REGION => LOGGED_BASE + offset,
        MEMFD_REGION => MEMFD_BASE + offset,
        region => region as u64 * REGION + offset,
    })
}

pub(crate) fn hva_of(page: usize) -> Hva {
    Hva::new(HOST_BASE + page as u64 * PAGE)
}

pub(crate) fn gpas(first: usize, count: usize) -> GpaRange {
    AddrRange::with_len(gpa_of(first), count as u64 * PAGE).unwrap()
}

pub(crate) fn hvas(first: usize, count: usize) -> HvaRange {
    AddrRange::with_len(hva_of(first), count as u64 * PAGE).unwrap()
}

pub(crate) fn alias_gpas() -> GpaRange {
    AddrRange::with_len(Gpa::new(ALIAS_BASE), REGION).unwrap()
}

/// The page at `gpa`, where that is not in the alias slot.
pub(crate) fn page_at(gpa: Gpa) -> Option<usize> {
    let gpa = gpa.as_u64();
    let (region, base) = match gpa >> 30 {
        0 if gpa < 2 * REGION => (0, 0),
        2 => (LOGGED_REGION, LOGGED_BASE),
        3 => (MEMFD_REGION, MEMFD_BASE),
        _ => return None,
    };
    let page = region * SPAN + ((gpa - base) / PAGE) as usize;
    (page < PAGES).then_some(page)
}

impl Host {
    pub(crate) fn new() -> Self {
        let frames: Vec<Frame> = (0..SMALL + BLOCKS * SPAN).map(|_| Frame::default()).collect();
        let host = Self {
            small: Mutex::new((0..SMALL as u32).collect()),
            blocks: Mutex::new((0..BLOCKS as u32).collect()),
            block_users: (0..BLOCKS).map(|_| AtomicU32::new(0)).collect(),
            backing: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            ledger: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            epochs: (0..PAGES).map(|_| AtomicU64::new(0)).collect(),
            regions: (0..REGIONS).map(|_| Mutex::new(())).collect(),
            stable: Mutex::default(),
            deferred: Mutex::default(),
            dirty: (0..PAGES).map(|_| AtomicBool::new(false)).collect(),
            alias: AtomicU64::new(Alias::new(0, None, false).as_u64()),
            opened: (0..PAGES + 1).map(|_| AtomicU64::new(0)).collect(),
            closed: (0..PAGES + 1).map(|_| AtomicU64::new(0)).collect(),
            failure: Failure::default(),
            frames,
        };
        for frame in 0..host.frames.len() as u32 {
            host.poison(frame);
        }
        for region in 0..REGIONS {
            let first = host.take_block().unwrap();
            for (page, frame) in (region * SPAN..).zip(first..).take(SPAN) {
                host.fill(frame, tag_of(page), 0);
                host.set_backing(page, Some(Backing { frame, shared: false }));
            }
        }
        host
    }

    /// Who changes the mapping of a region's pages holds it.
    pub(crate) fn lock(&self, region: usize) -> MutexGuard<'_, ()> {
        self.regions[region].lock().unwrap()
    }

    pub(crate) fn alias(&self) -> Alias {
        Alias::from_u64(self.alias.load(Acquire))
    }

    // ---- frames ----

    fn poison(&self, frame: u32) {
        self.frames[frame as usize].tag.store(POISON | u64::from(frame), Relaxed);
        self.frames[frame as usize].value.store(POISON ^ u64::from(frame), Relaxed);
    }

    /// A free frame that is not as it was left was written through a stale translation.
    fn fill(&self, frame: u32, tag: u64, value: u64) {
        let at = &self.frames[frame as usize];
        let (was, count) = (at.tag.swap(tag, Relaxed), at.value.swap(value, Relaxed));
        if was != POISON | u64::from(frame) || count != POISON ^ u64::from(frame) {
            self.failure.report(format!("free frame {frame} was written: tag {was:#x}, value {count:#x}"));
        }
        at.users.store(1, Relaxed);
    }

    /// A frame of one's own with these contents.
    pub(crate) fn take(&self, tag: u64, value: u64) -> Option<u32> {
        let frame = self.small.lock().unwrap().pop()?;
        self.fill(frame, tag, value);
        Some(frame)
    }

    /// First of the frames of a free block; they hold nothing yet.
    fn take_block(&self) -> Option<u32> {
        let block = self.blocks.lock().unwrap().pop()?;
        self.block_users[block as usize].store(SPAN as u32, Relaxed);
        Some((SMALL + block as usize * SPAN) as u32)
    }

    /// A block of 2M with the contents given, one a page.
    pub(crate) fn take_filled_block(&self, contents: &[(u64, u64)]) -> Option<u32> {
        let first = self.take_block()?;
        for (frame, &(tag, value)) in (first..).zip(contents) {
            self.fill(frame, tag, value);
        }
        Some(first)
    }

    /// A page no longer has `frame`, and nothing translates to it on the page's account.
    pub(crate) fn release(&self, backing: Backing) {
        let frame = &self.frames[backing.frame as usize];
        if backing.shared {
            let mut stable = self.stable.lock().unwrap();
            if frame.users.fetch_sub(1, AcqRel) != 1 {
                return;
            }
            let contents = (frame.tag.load(Relaxed), frame.value.load(Relaxed));
            if stable.remove(&contents) != Some(backing.frame) {
                self.failure.report(format!("shared frame {} was written: {contents:x?}", backing.frame));
            }
        } else if frame.users.swap(0, AcqRel) != 1 {
            self.failure.report(format!("frame {} is freed twice", backing.frame));
        }
        self.free(backing.frame);
    }

    fn free(&self, frame: u32) {
        self.poison(frame);
        match (frame as usize).checked_sub(SMALL) {
            None => self.small.lock().unwrap().push(frame),
            Some(offset) => {
                let block = offset / SPAN;
                if self.block_users[block].fetch_sub(1, AcqRel) == 1 {
                    self.blocks.lock().unwrap().push(block as u32);
                }
            }
        }
    }

    /// As [`Host::release`], for when it is not known yet that nothing translates to it.
    pub(crate) fn release_later(&self, backing: Backing) {
        self.deferred.lock().unwrap().push(backing.frame | if backing.shared { 1 << 31 } else { 0 });
    }

    /// No window is in progress.
    pub(crate) fn release_deferred(&self) {
        for raw in std::mem::take(&mut *self.deferred.lock().unwrap()) {
            self.release(Backing { frame: raw & !(1 << 31), shared: raw >> 31 != 0 });
        }
    }

    /// The shared frame with these contents, with one more user; or a new one.
    pub(crate) fn share(&self, tag: u64, value: u64) -> Option<Backing> {
        let mut stable = self.stable.lock().unwrap();
        let frame = match stable.get(&(tag, value)) {
            Some(&frame) => {
                self.frames[frame as usize].users.fetch_add(1, AcqRel);
                frame
            }
            None => {
                let frame = self.take(tag, value)?;
                stable.insert((tag, value), frame);
                frame
            }
        };
        Some(Backing { frame, shared: true })
    }

    pub(crate) fn tag(&self, frame: u32) -> u64 {
        self.frames[frame as usize].tag.load(Relaxed)
    }

    pub(crate) fn value(&self, frame: u32) -> u64 {
        self.frames[frame as usize].value.load(Relaxed)
    }

    pub(crate) fn contents(&self, frame: u32) -> (u64, u64) {
        (self.tag(frame), self.value(frame))
    }

    /// The guest, or a device, writes.
    pub(crate) fn write(&self, page: usize, frame: u32) {
        let value = &self.frames[frame as usize].value;
        if is_mergeable(page) {
            let _ = value.fetch_update(Relaxed, Relaxed, |value| Some((value + 1) % 4));
        } else {
            value.fetch_add(1, Relaxed);
        }
        self.ledger[page].fetch_add(1, Release);
    }

    // ---- mapping ----

    pub(crate) fn backing(&self, page: usize) -> Option<Backing> {
        let raw = self.backing[page].load(Acquire);
        let frame = (raw as u32).checked_sub(1)?;
        Some(Backing { frame, shared: raw & SHARED != 0 })
    }

    pub(crate) fn set_backing(&self, page: usize, backing: Option<Backing>) {
        let raw = backing.map_or(0, |b| u64::from(b.frame + 1) | if b.shared { SHARED } else { 0 });
        self.backing[page].store(raw, Release);
    }

    // ---- windows, as the test itself knows of them ----

    /// Stamps of a range: pages, and the slot of the alias.
    pub(crate) fn stamps(of: &[AtomicU64], pages: std::ops::Range<usize>, alias: bool) -> u64 {
        let pages: u64 = of[pages].iter().map(|stamp| stamp.load(SeqCst)).sum();
        pages + if alias { of[PAGES].load(SeqCst) } else { 0 }
    }

    pub(crate) fn stamp(of: &[AtomicU64], pages: std::ops::Range<usize>) {
        of[pages].iter().for_each(|stamp| {
            stamp.fetch_add(1, SeqCst);
        });
    }

    /// Everything is quiet: windows that were left to somebody are closed.
    pub(crate) fn settle_stamps(&self) {
        for (opened, closed) in self.opened.iter().zip(&self.closed) {
            closed.store(opened.load(SeqCst), SeqCst);
        }
    }

    // ---- dirty facts ----

    pub(crate) fn mark(&self, page: usize) {
        self.dirty[page].store(true, SeqCst);
    }

    /// The pages of a fact about guest bytes. For the alias both regions that it may have been of, unless `alias` is known
    /// to be the slot of the fact.
    pub(crate) fn pages_of(&self, range: GpaRange, alias: Option<Alias>) -> Vec<usize> {
        let first = range.start().align_down(PAGE).as_u64();
        let mut pages = Vec::new();
        for gpa in (first..range.end().as_u64()).step_by(PAGE as usize) {
            let offset = gpa.checked_sub(ALIAS_BASE).filter(|offset| *offset < REGION).map(|bytes| bytes / PAGE);
            match (page_at(Gpa::new(gpa)), offset) {
                (Some(page), _) => pages.push(page),
                (None, Some(offset)) => {
                    let known = alias.and_then(Alias::region);
                    let regions = known.map_or(0..2, |region| region..region + 1);
                    pages.extend(regions.map(|region| region * SPAN + offset as usize));
                }
                (None, None) => self.failure.report(format!("a dirty fact about {range}, where nothing is")),
            }
        }
        pages
    }
}

/// A page that many want, or any.
pub(crate) fn pick(random: &mut Random) -> usize {
    if random.one_in(3) {
        // A few in each region, mergeable ones among them.
        let (region, page) = (random.below(REGIONS as u64) as usize, random.below(8) as usize);
        region * SPAN + 16 + page
    } else {
        random.below(PAGES as u64) as usize
    }
}
