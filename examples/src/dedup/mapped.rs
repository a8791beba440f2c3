// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! RAM that vCPUs and the VMM reach through a mapping in this process; merged pages are the store's, mapped over it.
//!
//! What keeps writes from getting lost, and devices from reading what is old:
//!
//! - Before pages are compared, the *fence* is armed over them: who writes them waits. It stays armed over what is merged.
//! - A frame is mapped privately: should anybody write all the same, the kernel copies, and the frame stays as it is.
//! - Mapping over a page takes the fence from it for a moment. So it is looked at again under the new fence: a page that
//!   the kernel has copied meanwhile is not merged, but at home in its copy.
//! - Whoever waits is let in when the page is un-merged: tables are zapped, the fence is lifted, the kernel is made to
//!   copy, and only then the frame may be used for something else.
//!
//! The thread that lets writers in opens windows, and a window waits for scopes. So nobody may wait at the fence inside a
//! scope. Nobody does: in a scope a page is written through a translation that says it may be, and over a fenced page
//! there is none. (The fence is armed inside a window, which took the right to write away from all tables, and stays
//! armed over merged pages only, which no table may write.)

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use notifier_core::{AddrRange, GpaRange, Hva, HvaRange, InvalidationGuard, SlotFlags, Space, WindowMode, Zapped};
use notifier_linux::{FenceError, GuestRam, Kernel, PageMap, RamError, Source, Waiter, WriteFence};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::{
    cli::Safety,
    error::Error,
    mapping::gpa,
    memory::{MemoryFile, PAGE, host_address},
    store::Frame,
    tally::Tally,
};
use crate::ksm::{Paths, Sums};

/// What became of a page that was to be merged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Merge {
    /// It had no frame.
    NotAsked,
    /// It shows the frame.
    Merged,
    /// It is at home, and the frame is not shown to anybody on its account.
    Home,
    /// It is at home, but the kernel may still show the frame there until it is written: the frame is to stay as it is.
    Stuck,
}

/// What a guest's RAM is to be made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RamKind {
    /// Private anonymous memory.
    Anonymous,
    /// A memory file, shared.
    SharedFile,
}

/// How often a call of the host that failed is made again at once.
const ATTEMPTS: usize = 3;
/// How long the host may refuse to lift the fence, in milliseconds. Until then the page's window stays open; had it
/// closed, a device could be let write the page, and wait for the porter inside a scope.
const PATIENCE: u32 = 2_000;
/// How long the thread that lets writers in waits before it looks whether it is to stop.
const NAP: Duration = Duration::from_millis(100);

/// A guest's RAM, its fence, and the store that is mapped over it.
#[derive(Debug)]
pub(crate) struct Mapped {
    ram: GuestRam,
    /// What the RAM is a mapping of.
    file: Option<MemoryFile>,
    fence: WriteFence,
    store: Arc<MemoryFile>,
    kernel: Kernel,
    host: HvaRange,
    /// Merged pages are fenced.
    watched: bool,
    /// There is no fence any more.
    open: AtomicBool,
    tally: Arc<Tally>,
}

impl Mapped {
    /// RAM of so many pages and its slot, on what the store's frames can be mapped over.
    pub(crate) fn new(
        space: &Space,
        pages: usize,
        kind: RamKind,
        store: &Arc<MemoryFile>,
        kernel: &Kernel,
        safety: Safety,
        tally: &Arc<Tally>,
    ) -> Result<Self, Error> {
        let len = pages * PAGE;
        let file = match kind {
            RamKind::Anonymous => None,
            RamKind::SharedFile => Some(MemoryFile::new("dedup-ram", len as u64)?),
        };
        let memory = match &file {
            None => GuestMemoryMmap::from_ranges(&[(GuestAddress(0), len)])
                .map_err(|source| Error::Map { what: "RAM", source })?,
            Some(file) => file.memory().clone(),
        };
        let host = AddrRange::with_len(host_address(&memory)?, len as u64)?;
        let ram = GuestRam::builder(space, memory).slot_flags(SlotFlags::LOG_DIRTY).kernel(kernel.clone()).build()?;
        // A huge page is given back when all of it is merged, and merging goes by pages.
        ram.no_huge_pages()?;
        let fence = WriteFence::new(kernel, &[host])?;
        Ok(Self {
            ram,
            file,
            fence,
            store: Arc::clone(store),
            kernel: kernel.clone(),
            host,
            watched: safety != Safety::NoNotify,
            open: AtomicBool::new(false),
            tally: Arc::clone(tally),
        })
    }

    pub(crate) fn memory(&self) -> &GuestMemoryMmap<()> {
        self.ram.memory()
    }

    /// Bytes of private memory, copies of frames included, and of the RAM's own file.
    pub(crate) fn resident(&self) -> Result<u64, Error> {
        let private = Sums::of(&Paths::system(), &[self.host])?.anonymous;
        let file = self.file.as_ref().map_or(Ok(0), MemoryFile::resident)?;
        Ok(private + file)
    }

    /// Makes a call of the host, again if it fails: what failed once may succeed, and nobody is to suffer for it.
    fn attempt<R, E>(&self, mut call: impl FnMut() -> Result<R, E>) -> Result<R, E> {
        for _ in 1..ATTEMPTS {
            match call() {
                Ok(done) => return Ok(done),
                Err(_) => self.tally.host_failures.add(1),
            }
        }
        call()
    }

    fn range(&self, first: usize, count: usize) -> Result<HvaRange, Error> {
        Ok(AddrRange::with_len(self.host.start().wrapping_add((first * PAGE) as u64), (count * PAGE) as u64)?)
    }

    /// From here on whoever writes these pages waits.
    pub(crate) fn hold(&self, first: usize, count: usize) -> Result<(), Error> {
        self.arm(self.range(first, count)?)
    }

    fn arm(&self, range: HvaRange) -> Result<(), Error> {
        Ok(self.attempt(|| match self.fence.arm(range) {
            // What was mapped over a page is not behind the fence until it is registered.
            Err(FenceError::Lapsed { .. }) => {
                self.fence.readmit(range)?;
                self.fence.arm(range)
            }
            done => done,
        })?)
    }

    fn lift(&self, range: HvaRange) -> Result<(), Error> {
        for _ in 1..PATIENCE {
            if self.open.load(Ordering::Acquire) {
                break;
            }
            match self.fence.lift(range) {
                // What is not behind the fence has nothing to be lifted; everybody was woken.
                Ok(()) | Err(FenceError::Lapsed { .. }) => return Ok(()),
                Err(_) => self.tally.host_failures.add(1),
            }
            thread::sleep(Duration::from_millis(1));
        }
        // Then there is to be no fence at all: that is a call of another kind. Merged pages are not watched any more, so
        // the run ends.
        self.open_fence();
        Err(Error::FenceGone)
    }

    /// Whoever waits for these pages goes on, and nobody waits from here on.
    pub(crate) fn let_go(&self, first: usize, count: usize) -> Result<(), Error> {
        self.lift(self.range(first, count)?)
    }

    /// Maps frames over their pages, and fences what shows them now.
    pub(crate) fn cover<M: WindowMode>(
        &self,
        window: &InvalidationGuard<'_, M, Hva>,
        first: usize,
        frames: &[Option<Frame>],
    ) -> Result<Vec<Merge>, Error> {
        let mut result: Vec<Merge> =
            frames.iter().map(|frame| frame.map_or(Merge::NotAsked, |_| Merge::Home)).collect();
        let mut states = Vec::new();
        for (index, count, frame) in runs(frames) {
            let range = self.range(first + index, count)?;
            let source = Source::new(self.store.file(), frame.offset()).populated();
            match self.ram.within(window)?.replace(gpa(first + index), &source, range.len()) {
                Ok(()) => {}
                // All is as it was, and the pages stay at home until a later pass.
                Err(RamError::Budget { .. }) => {
                    self.tally.no_mapping.add(1);
                    continue;
                }
                // Whether they are what they were, or show their frames, or (the kernel took away and did not give) neither:
                // the contents are the frames', and they stay at home until a later pass. What they show is not asked: RAM
                // that is at home in a file shows a file's page in any case.
                Err(error) => {
                    self.tally.host_failures.add(1);
                    self.refill(&error, first + index, frame)?;
                    for (page, became) in (first + index..).zip(&mut result[index..index + count]) {
                        *became = self.uncover(window, page)?;
                    }
                    continue;
                }
            }
            let fenced =
                !self.watched || (self.attempt(|| self.fence.readmit(range)).is_ok() && self.arm(range).is_ok());
            if !self.watched {
                // Where the same frame was shown before, the fence is still there.
                self.lift(range)?;
            }
            let seen = fenced && self.attempt(|| PageMap::read(&self.kernel, range, &mut states)).is_ok();
            for at in 0..count {
                result[index + at] = match states.get(at) {
                    // The frame, and whoever writes it waits.
                    Some(state) if seen && state.present && state.file => Merge::Merged,
                    // A copy that the kernel made; or nobody knows.
                    _ => self.uncover(window, first + index + at)?,
                };
            }
        }
        Ok(result)
    }

    /// Puts back contents that are gone because the host failed half-way: in pages from `first` on, those of the frames
    /// from `frame` on. What else the error calls lost shows the frames already, and may have been written since.
    fn refill(&self, error: &RamError, first: usize, frame: Frame) -> Result<(), Error> {
        let RamError::Failed(failed) = error else { return Ok(()) };
        let pages = |range: &GpaRange| range.start().as_u64() / PAGE as u64..range.end().as_u64() / PAGE as u64;
        let mut bytes = [0; PAGE];
        for page in failed.filled.iter().flat_map(pages) {
            // Nothing is behind a fence that was mapped just now, so this thread does not wait for itself.
            self.store.read(frame.offset() + (page - first as u64) * PAGE as u64, &mut bytes)?;
            self.memory().write_slice(&bytes, GuestAddress(page * PAGE as u64))?;
        }
        Ok(())
    }

    /// A page that may show a frame, or a copy of one, is to be at home: makes it a copy.
    fn uncover<M: WindowMode>(&self, window: &InvalidationGuard<'_, M, Hva>, page: usize) -> Result<Merge, Error> {
        let range = self.range(page, 1)?;
        // An armed fence would let nobody copy, this thread not either.
        self.lift(range)?;
        let guest = AddrRange::with_len(gpa(page), PAGE as u64)?;
        match self.attempt(|| self.ram.within(window)?.privatize(guest)) {
            Ok(()) => Ok(Merge::Home),
            Err(_) => Ok(Merge::Stuck),
        }
    }

    /// Lets those go on who wait for pages that were not merged. Whoever waits for a merged one is let in when the
    /// thread that does that comes to it.
    pub(crate) fn settle(&self, first: usize, merged: &[bool]) -> Result<(), Error> {
        let mut index = 0;
        while index < merged.len() {
            let run = merged[index..].iter().take_while(|&&merged| !merged).count();
            if run != 0 {
                self.let_go(first + index, run)?;
            }
            index += run + 1;
        }
        Ok(())
    }

    /// Lets writers of a merged page in, and has the kernel copy it for them. Whether the frame is no longer shown.
    pub(crate) fn take_back(&self, window: &InvalidationGuard<'_, Zapped, Hva>, page: usize) -> Result<bool, Error> {
        match self.uncover(window, page)? {
            Merge::Stuck => {
                self.tally.stuck.add(1);
                Ok(false)
            }
            _ => Ok(true),
        }
    }

    /// Those who wait for pages, until it is told to stop: then none. Pages may be named more than once.
    pub(crate) fn waiters(&self, waiters: &mut Vec<Waiter>) -> Result<(), Error> {
        self.attempt(|| self.fence.next_batch(waiters, NAP))?;
        Ok(())
    }

    /// The page that somebody waits for.
    pub(crate) fn page_of(&self, waiter: &Waiter) -> usize {
        (waiter.address.as_u64().saturating_sub(self.host.start().as_u64()) / PAGE as u64) as usize
    }

    /// Nobody waits any more, and nobody will: there is nobody to let them in.
    pub(crate) fn open_fence(&self) {
        self.open.store(true, Ordering::Release);
        let _ = self.attempt(|| self.fence.disband());
    }
}

/// Runs of neighbours whose frames are neighbours too: index, count, first frame.
fn runs(frames: &[Option<Frame>]) -> Vec<(usize, usize, Frame)> {
    let mut runs: Vec<(usize, usize, Frame)> = Vec::new();
    for (index, frame) in frames.iter().enumerate() {
        let Some(frame) = *frame else { continue };
        match runs.last_mut() {
            Some((start, count, Frame(first))) if *start + *count == index && *first + *count as u32 == frame.0 => {
                *count += 1;
            }
            _ => runs.push((index, 1, frame)),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use std::sync::OnceLock;

    use notifier_linux::{Call, RegisterError};

    use super::*;

    const PAGES: usize = 4;

    fn fill(page: usize) -> [u8; PAGE] {
        [page as u8 + 1; PAGE]
    }

    /// RAM and a store of equal contents, page by page, on a host that does `at_register` when something that was mapped
    /// over is about to be fenced again.
    fn merging(at_register: impl Fn(&GuestMemoryMmap<()>) + Send + Sync + 'static) -> Option<(Space, Mapped)> {
        on_host(RamKind::Anonymous, move |call, memory| {
            if call == Call::Register {
                at_register(memory);
            }
            Ok(())
        })
    }

    /// The same in RAM of either kind, on a host that does `hook` before each call, once there is RAM.
    fn on_host(
        kind: RamKind,
        hook: impl Fn(Call, &GuestMemoryMmap<()>) -> std::io::Result<()> + Send + Sync + 'static,
    ) -> Option<(Space, Mapped)> {
        let memory = Arc::new(OnceLock::<GuestMemoryMmap<()>>::new());
        let kernel = Kernel::with_hook({
            let memory = Arc::clone(&memory);
            move |call| memory.get().map_or(Ok(()), |memory| hook(call, memory))
        });
        let store = Arc::new(MemoryFile::new("store", (PAGES * PAGE) as u64).unwrap());
        let (space, tally) = (Space::new(), Arc::new(Tally::default()));
        let made = Mapped::new(&space, PAGES, kind, &store, &kernel, Safety::Safe, &tally);
        let mapped = match made {
            Err(Error::Fence(FenceError::Register(RegisterError::Missing(missing)))) => {
                println!("not tested: {missing}");
                return None;
            }
            made => made.unwrap(),
        };
        for page in 0..PAGES {
            store.write((page * PAGE) as u64, &fill(page)).unwrap();
            mapped.memory().write_slice(&fill(page), GuestAddress((page * PAGE) as u64)).unwrap();
        }
        memory.set(mapped.memory().clone()).unwrap();
        Some((space, mapped))
    }

    fn cover(space: &Space, mapped: &Mapped) -> Vec<Merge> {
        let window = space.retain(mapped.host).unwrap();
        mapped.hold(0, PAGES).unwrap();
        let covered = mapped.cover(&window, 0, &[Some(Frame(1)), Some(Frame(2)), None, Some(Frame(4))]).unwrap();
        mapped.settle(0, &covered.iter().map(|&covered| covered == Merge::Merged).collect::<Vec<_>>()).unwrap();
        window.close().unwrap();
        covered
    }

    #[test]
    fn what_is_written_in_the_moment_without_a_fence_is_not_merged() {
        // Not through the fence: it went with what was mapped there before. Once, before there is another one.
        let written = AtomicBool::new(false);
        let write = move |memory: &GuestMemoryMmap<()>| {
            if !written.swap(true, Ordering::SeqCst) {
                memory.write_obj(77_u8, GuestAddress(PAGE as u64 + 5)).unwrap();
            }
        };
        let Some((space, mapped)) = merging(write) else { return };
        assert_eq!(cover(&space, &mapped), [Merge::Merged, Merge::Home, Merge::NotAsked, Merge::Merged]);
        let byte = |at: usize| mapped.memory().read_obj::<u8>(GuestAddress(at as u64)).unwrap();
        assert_eq!((byte(PAGE + 5), byte(PAGE + 6)), (77, 2));
        // At home, it can be written with nobody to let anybody in; and its frame can be given to others.
        mapped.memory().write_obj(78_u8, GuestAddress(PAGE as u64)).unwrap();
        mapped.store.write(PAGE as u64, &[0; PAGE]).unwrap();
        assert_eq!((byte(PAGE), byte(PAGE + 6), byte(2 * PAGE)), (78, 2, 3));
    }

    #[test]
    fn what_could_not_be_mapped_over_is_at_home_in_ram_of_each_kind() {
        for kind in [RamKind::Anonymous, RamKind::SharedFile] {
            let refused = |call, _: &_| match call {
                Call::MapFile => Err(std::io::Error::from_raw_os_error(12)),
                _ => Ok(()),
            };
            let Some((space, mapped)) = on_host(kind, refused) else { return };
            let before = mapped.resident().unwrap();
            let home = [Merge::Home, Merge::Home, Merge::NotAsked, Merge::Home];
            assert_eq!(cover(&space, &mapped), home, "{kind:?}");
            assert_eq!(mapped.resident().unwrap(), before, "{kind:?}");
            // Nobody waits there, and the store's frames are nobody's.
            for page in 0..PAGES {
                mapped.store.write((page * PAGE) as u64, &[0; PAGE]).unwrap();
                mapped.memory().write_obj(9_u8, GuestAddress((page * PAGE) as u64)).unwrap();
                let bytes: [u8; 2] = mapped.memory().read_obj(GuestAddress((page * PAGE) as u64)).unwrap();
                assert_eq!(bytes, [9, page as u8 + 1], "{kind:?}");
            }
        }
    }

    #[test]
    fn a_merged_page_shows_its_frame_until_it_is_taken_back() {
        let Some((space, mapped)) = merging(|_| {}) else { return };
        let before = mapped.resident().unwrap();
        assert_eq!(cover(&space, &mapped), [Merge::Merged, Merge::Merged, Merge::NotAsked, Merge::Merged]);
        assert_eq!(before - mapped.resident().unwrap(), 3 * PAGE as u64);
        let window = space.zap(mapped.range(1, 1).unwrap()).unwrap();
        assert!(mapped.take_back(&window, 1).unwrap());
        window.close().unwrap();
        // The frame may be anything from here on, and writers of the page wait for nobody.
        mapped.store.write(PAGE as u64, &[0; PAGE]).unwrap();
        mapped.memory().write_obj(9_u8, GuestAddress(PAGE as u64)).unwrap();
        let page: [u8; 2] = mapped.memory().read_obj(GuestAddress(PAGE as u64)).unwrap();
        assert_eq!(page, [9, 2]);
    }
}
