// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Reports changes of host memory that somebody made without a window. What it sees, and when, is on [`Tripwire`].
use std::{
    fmt, io,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use linux_raw_sys::general::{
    UFFD_FEATURE_EVENT_REMAP, UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
};
use notifier_core::{Hva, HvaRange, InvalidationGuard, OpenError, Space, Zapped};
use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags};

use crate::{
    kernel::Kernel,
    pagemap::{PageMap, PageState},
    uffd::{Message, RegisterError, Stop, Uffd, insist, join, no_messages, without},
};

const FEATURES: u32 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_EVENT_REMAP
    | UFFD_FEATURE_EVENT_REMOVE
    | UFFD_FEATURE_EVENT_UNMAP;

/// Messages that are read with one call.
const BATCH: usize = 16;
/// How long is waited between two looks at something that nobody announces.
const PAUSE: Duration = Duration::from_millis(1);
/// How often is looked whether removed pages have gone.
const LOOKS: u32 = 100;

/// What a tripwire could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TripwireError {
    /// Memory could not be registered.
    #[error(transparent)]
    Register(#[from] RegisterError),
    /// A range that does not begin and end on pages. Nothing was done.
    #[error("{range} does not begin and end on pages of {page_size:#x} bytes")]
    Unaligned {
        /// What was asked for.
        range: HvaRange,
        /// Bytes of a page of this host.
        page_size: u64,
    },
    /// The tripwire was not made for this byte. Nothing was done.
    #[error("{address} is in no range of this tripwire")]
    Foreign {
        /// The first such byte.
        address: Hva,
    },
    /// A thread could not be made. Nothing is registered.
    #[error("no thread for the tripwire: {source}")]
    Thread {
        /// The error.
        source: io::Error,
    },
}

/// What was done to memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ChangeKind {
    /// Its pages are dropped; what is there next is zero, or the file's.
    Removed,
    /// It was unmapped, or something was mapped over it.
    Unmapped,
    /// It was moved.
    Moved {
        /// Where its first byte lies now.
        to: Hva,
    },
}

/// A change that nobody expected.
#[derive(Debug)]
#[non_exhaustive]
pub struct Tripped {
    /// Which bytes.
    pub range: HvaRange,
    /// What happened to them.
    pub kind: ChangeKind,
    /// Whether the kernel told before it changed anything ([`ChangeKind::Removed`]). The change did not wait for the
    /// window all the same.
    pub in_time: bool,
    /// Whether the window is known to have closed after the change: always, where it was made before it was told.
    /// Removed pages have to be seen absent while the window is open; they are not where somebody touches them at
    /// once, or where the kernel takes its time (`MADV_FREE`). A secondary that faulted one in after the window may
    /// then be stale.
    pub settled: bool,
    /// Whether a window was opened over the range, and nobody translates what was there.
    pub secondaries: Result<(), OpenError>,
}

/// What all threads have. Not the descriptor: whoever has it open and does not read it holds up whoever makes a change,
/// and a report takes as long as it pleases.
struct Shared {
    kernel: Kernel,
    /// What is watched: sorted, joined.
    ranges: Vec<HvaRange>,
    space: Space,
    stop: Stop,
    stopping: AtomicBool,
    /// What changes with its owner's knowledge; as often as there are guards for it.
    expected: Mutex<Vec<HvaRange>>,
    failures: AtomicU64,
}

/// Watches memory for changes that nobody announced.
///
/// The protocol works because whoever changes memory opens a window first. A library that drops pages by itself, or a
/// call that was forgotten, leaves every secondary with translations of pages that are somebody else's. This finds
/// such changes with userfaultfd's events, says what changed, and zaps the secondaries. It is for development, and for
/// whoever cannot see all code in the process. It is no substitute for windows: see what it cannot see, and when it
/// comes.
///
/// # What it sees, and when
/// | change | kind | what lies there when it is told |
/// |---|---|---|
/// | `madvise` with `MADV_DONTNEED`, `MADV_FREE`, `MADV_REMOVE` | [`Removed`](ChangeKind::Removed) | the old page, still; nothing tells when it goes |
/// | `munmap`, `mmap` over | [`Unmapped`](ChangeKind::Unmapped) | nothing, or the new mapping |
/// | `mremap` | [`Moved`](ChangeKind::Moved), and then [`Unmapped`](ChangeKind::Unmapped) unless with `MREMAP_DONTUNMAP` | as above |
///
/// Whoever makes the change waits inside its system call until the message is read, which a thread of the tripwire
/// does at once (20 to 50 us), and then goes on: the window is opened *after* that, on a second thread. It cannot be
/// opened before, for the change may be made inside a scope, which the window would wait for. So a secondary uses the
/// old page for a moment longer than it should; after the window it does not, if [`Tripped::settled`] says so.
///
/// # What it does not see
/// - `mprotect`;
/// - holes punched in the file, and its truncation, through the descriptor;
/// - anything done through a second mapping of the same file, in this process or another;
/// - `MADV_COLD` and `MADV_PAGEOUT`, and the kernel's own reclaim, migration and merging (which keep the contents);
/// - `fork`. There is an event for it (`UFFD_FEATURE_EVENT_FORK`), which is not asked for: the C library forks with its
///   allocator's locks held, the call waits until the event is read, and a reader that allocates waits for the locks;
/// - what is mapped over a range, until [`Tripwire::readmit`].
///
/// # One userfaultfd only
/// A mapping is in one userfaultfd at most: memory of a [`WriteFence`](crate::WriteFence) or a
/// [`DirtyFilter`](crate::DirtyFilter) is refused with [`RegisterError::Busy`].
///
/// # What is not to be watched
/// Memory that the tripwire's own threads may change: the C heap and every other memory that the process's allocator
/// gets from the kernel. The threads allocate and free, the allocator then gives memory back (`madvise`, `munmap`), and
/// the thread that reads would wait for itself. Nor may a [`Kernel`] hook change watched memory.
///
/// # Mappings, and the end
/// Scattered ranges add up to two mappings each to the process, as with [`WriteFence`](crate::WriteFence#mappings):
/// [`Tripwire::new`] with too many of them is refused ([`RegisterError::Budget`]).
///
/// What was unmapped, seen and told, is not watched any more, but it is still among the ranges that the drop
/// unregisters: had somebody else registered other memory at the same addresses by then, the drop would take that
/// registration off on kernels that do not ask whose it is. So the tripwire goes before its memory does, or before the
/// addresses are used again.
///
/// A child of `fork` that goes on without `exec` has neither the threads nor the registrations: nothing is watched
/// there. While it has the descriptor open, the drop in the parent unregisters and reads what is left, and nobody waits.
///
/// # Threads
/// The reports come on a thread of the tripwire, one at a time. Dropping the tripwire frees whoever waits for a
/// message to be read, and then ends the threads: it waits for a report in progress, unless it is dropped by that, and
/// for those of what it has read by then. Nothing is watched by the time it waits: a report may unmap what was watched
/// after it has dropped the tripwire, and may wait for somebody who does, whoever drops it.
///
/// # Example
/// ```
/// use std::sync::mpsc;
/// use notifier_core::{AddrRange, Hva, Space};
/// use notifier_linux::{ChangeKind, Kernel, RegisterError, Tripwire, TripwireError};
/// use rustix::mm::{Advice, madvise};
/// use vm_memory::MmapRegion;
///
/// let memory = MmapRegion::<()>::new(0x4000)?;
/// let range = AddrRange::with_len(Hva::new(memory.as_ptr() as u64), 0x4000)?;
/// let (send, receive) = mpsc::channel();
/// let tripwire = match Tripwire::new(&Space::new(), &Kernel::new(), &[range], move |tripped| drop(send.send(tripped))) {
///     Err(TripwireError::Register(RegisterError::Missing(missing))) => return Ok(println!("{missing}")),
///     tripwire => tripwire?,
/// };
/// // SAFETY: the memory's contents may change at any time.
/// let discard = || unsafe { madvise(memory.as_ptr().cast(), 0x4000, Advice::LinuxDontNeed) };
/// let expected = tripwire.expect(range); // Beside the window that the change is made in.
/// discard()?;
/// drop(expected);
/// discard()?; // This one without.
/// assert_eq!(receive.recv()?.kind, ChangeKind::Removed);
/// assert!(receive.try_recv().is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct Tripwire {
    shared: Arc<Shared>,
    // The order matters: the monitor's end, then the descriptor's, and only then is a report waited for. It may itself
    // wait for somebody who makes a change of watched memory, which ends only where somebody reads, or nobody can.
    monitor: Option<Worker>,
    uffd: Arc<Uffd>,
    reporter: Option<Worker>,
}

/// A thread, which is waited for when this is dropped.
struct Worker(Option<JoinHandle<()>>);

impl Drop for Worker {
    fn drop(&mut self) {
        // A report may drop the tripwire; its thread ends when that returns.
        if let Some(thread) = self.0.take().filter(|thread| thread.thread().id() != thread::current().id()) {
            // Neither panics; and there is nobody to tell.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Tripwire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tripwire").field("ranges", &self.ranges()).finish_non_exhaustive()
    }
}

/// While this lives, changes of its range are expected, and are not reported.
#[must_use = "changes are expected while this lives"]
pub struct Expected<'t> {
    shared: &'t Shared,
    range: HvaRange,
}

impl fmt::Debug for Expected<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Expected").field(&self.range).finish()
    }
}

impl Drop for Expected<'_> {
    fn drop(&mut self) {
        // The change has been made, and so its message was read; it was judged in the same hold of this lock.
        let mut expected = self.shared.expected.lock();
        if let Some(index) = expected.iter().position(|&range| range == self.range) {
            expected.swap_remove(index);
        }
    }
}

impl Tripwire {
    /// Watches `ranges` from now on, and hands every unexpected change to `on_trip`, after the window over it in
    /// `space` was opened and closed. A panic in `on_trip` is caught, and the next report comes all the same.
    ///
    /// # Errors
    /// [`TripwireError::Register`] (as for [`WriteFence::new`](crate::WriteFence::new), too many ranges included),
    /// [`TripwireError::Thread`]. Nothing is registered then.
    pub fn new(
        space: &Space,
        kernel: &Kernel,
        ranges: &[HvaRange],
        on_trip: impl Fn(Tripped) + Send + Sync + 'static,
    ) -> Result<Self, TripwireError> {
        let uffd = Arc::new(Uffd::new(kernel, FEATURES, ranges)?);
        let shared = Arc::new(Shared {
            kernel: kernel.clone(),
            ranges: uffd.ranges().to_vec(),
            space: space.clone(),
            stop: Stop::new()?,
            stopping: AtomicBool::new(false),
            expected: Mutex::default(),
            failures: AtomicU64::new(0),
        });
        let (send, receive) = mpsc::channel();
        let spawn = |name: &str, run: Box<dyn FnOnce() + Send>| {
            let thread = thread::Builder::new().name(name.into()).spawn(run);
            thread.map(|thread| Worker(Some(thread))).map_err(|source| TripwireError::Thread { source })
        };
        // From here on dropping it ends what there is.
        let mut this = Self { shared: Arc::clone(&shared), monitor: None, uffd, reporter: None };
        let (watched, uffd) = (Arc::clone(&shared), Arc::clone(&this.uffd));
        this.monitor = Some(spawn("tripwire", Box::new(move || watched.monitor(&uffd, &send)))?);
        this.reporter = Some(spawn(
            "tripwire-report",
            Box::new(move || {
                receive.iter().for_each(|(range, kind)| {
                    let tripped = shared.tripped(range, kind);
                    // A report that panics is the reporter's own affair.
                    let _ = catch_unwind(AssertUnwindSafe(|| on_trip(tripped)));
                });
            }),
        )?);
        Ok(this)
    }

    /// What is watched, ascending; ranges that touch are joined.
    pub fn ranges(&self) -> &[HvaRange] {
        &self.shared.ranges
    }

    /// Changes of `range` are expected while the returned guard lives: for whoever makes them inside a window. The
    /// guard is dropped after the changing call has returned.
    pub fn expect(&self, range: HvaRange) -> Expected<'_> {
        self.shared.expected.lock().push(range);
        Expected { shared: &self.shared, range }
    }

    /// Watches what was mapped over `range`. Nothing that is done to it before is seen.
    ///
    /// # Errors
    /// [`TripwireError::Unaligned`], [`TripwireError::Foreign`], [`TripwireError::Register`]: nothing is different.
    pub fn readmit(&self, range: HvaRange) -> Result<(), TripwireError> {
        let page_size = self.uffd.page_size();
        if !range.is_aligned(page_size) {
            return Err(TripwireError::Unaligned { range, page_size });
        }
        if let Some(address) = self.uffd.foreign(range) {
            return Err(TripwireError::Foreign { address });
        }
        Ok(self.uffd.register(range)?)
    }

    /// How often waiting for messages, or reading them, failed. It is tried again each time; whoever made a change
    /// waits meanwhile.
    pub fn failures(&self) -> u64 {
        self.shared.failures.load(Ordering::Relaxed)
    }
}

impl Drop for Tripwire {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        self.shared.stop.signal();
        // What follows is the fields' own: the order they are in. With the descriptor whoever still waits to be read
        // goes on (`userfaultfd_release`).
    }
}

impl Shared {
    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::SeqCst)
    }

    /// Sleeps, unless the tripwire ends.
    fn pause(&self) {
        let mut fds = [PollFd::from_borrowed_fd(self.stop.fd(), PollFlags::IN)];
        if self.kernel.poll(&mut fds, Some(PAUSE)).is_err() {
            thread::sleep(PAUSE);
        }
    }

    /// Reads messages until the tripwire ends. Whoever makes a change waits for this, and so it waits for nobody: it
    /// takes one lock, which is held for moments and never across a call that makes changes.
    fn monitor(&self, uffd: &Uffd, trips: &mpsc::Sender<(HvaRange, ChangeKind)>) {
        while !self.is_stopping() {
            let mut fds = [
                PollFd::from_borrowed_fd(uffd.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.fd(), PollFlags::IN),
            ];
            if self.kernel.poll(&mut fds, None).and_then(|_| self.read(uffd, trips)).is_err() {
                self.failures.fetch_add(1, Ordering::Relaxed);
                thread::sleep(PAUSE);
            }
        }
        // What happened before the end is told. And while a forked child has the descriptor, closing ours lets nobody go
        // on: what began before unregistering is read after it. (Without a child closing does the rest, whatever fails.)
        let _ = uffd.unregister_all();
        for _ in 0..LOOKS {
            if self.read(uffd, trips).is_err() || !uffd.is_changing() {
                break;
            }
            thread::sleep(PAUSE);
        }
    }

    /// Reads what messages there are.
    fn read(&self, uffd: &Uffd, trips: &mpsc::Sender<(HvaRange, ChangeKind)>) -> io::Result<()> {
        let mut messages = no_messages::<BATCH>();
        loop {
            // Reading releases whoever made the change, who may then drop its guard: the guard waits for this lock
            // until the change was judged.
            let expected = self.expected.lock();
            let read = insist(|| self.kernel.read_messages(uffd.fd(), &mut messages))?;
            for message in messages[..read].iter().filter_map(Message::parse) {
                let (range, kind) = match message {
                    Message::Remove(range) => (range, ChangeKind::Removed),
                    Message::Unmap(range) => (range, ChangeKind::Unmapped),
                    Message::Remap(range, to) => (range, ChangeKind::Moved { to }),
                    // Nothing is ever armed.
                    Message::Fault(_) => continue,
                };
                for (part, kind) in self.unexpected(range, kind, &expected) {
                    // Fails only where the reporter is gone, and with it whoever would be told.
                    let _ = trips.send((part, kind));
                }
            }
            if read < BATCH {
                return Ok(());
            }
        }
    }

    /// The watched parts of a change that nobody expected. (An unmapping is told as it was asked for, watched or not.)
    fn unexpected(&self, range: HvaRange, kind: ChangeKind, expected: &[HvaRange]) -> Vec<(HvaRange, ChangeKind)> {
        let mut expected = expected.to_vec();
        join(&mut expected);
        let watched = self.ranges.iter().filter_map(|own| own.intersection(&range));
        let parts = watched.flat_map(|part| without(part, &expected));
        let at = |part: HvaRange| match kind {
            ChangeKind::Moved { to } => {
                ChangeKind::Moved { to: to.wrapping_add(part.start().as_u64() - range.start().as_u64()) }
            }
            kind => kind,
        };
        parts.map(|part| (part, at(part))).collect()
    }

    /// Makes the secondaries drop what they have of a range that changed.
    fn tripped(&self, range: HvaRange, kind: ChangeKind) -> Tripped {
        let in_time = kind == ChangeKind::Removed;
        let (settled, secondaries) = match self.open(range) {
            Ok(window) => {
                let settled = !in_time || self.has_gone(range);
                // Where it cannot be closed it stays in progress, which the space's reaper looks after; nobody
                // translates the range meanwhile.
                let _ = window.close();
                (settled, Ok(()))
            }
            Err(error) => (false, Err(error)),
        };
        Tripped { range, kind, in_time, settled, secondaries }
    }

    /// Opens a window. Does not block, so that a scope of whoever drops the tripwire does not block that.
    fn open(&self, range: HvaRange) -> Result<InvalidationGuard<'_, Zapped>, OpenError> {
        loop {
            match self.space.window(range).nonblocking().open_zapped() {
                Err(OpenError::WouldBlock { .. }) if !self.is_stopping() => self.pause(),
                outcome => return outcome,
            }
        }
    }

    /// Whether every page of `range` was seen absent.
    fn has_gone(&self, range: HvaRange) -> bool {
        let mut here: Vec<PageState> = Vec::new();
        let mut left: Option<Vec<bool>> = None;
        for _ in 0..LOOKS {
            if PageMap::read(&self.kernel, range, &mut here).is_err() {
                return false;
            }
            let now = here.iter().map(|page| page.present);
            let still: Vec<bool> = match left {
                None => now.collect(),
                Some(before) => before.into_iter().zip(now).map(|(before, now)| before && now).collect(),
            };
            if !still.contains(&true) {
                return true;
            }
            if self.is_stopping() {
                return false;
            }
            left = Some(still);
            self.pause();
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use notifier_core::AddrRange;
    use rustix::mm::{Advice, madvise};
    use vm_memory::MmapRegion;

    use super::*;
    use crate::kernel::Call;

    #[test]
    fn a_change_at_the_very_end_is_read_though_another_process_has_the_descriptor() {
        let len = crate::uffd::page_size();
        let memory = Arc::new(MmapRegion::<()>::new(len as usize).unwrap());
        let range = AddrRange::with_len(Hva::new(memory.as_ptr() as u64), len).unwrap();
        let (fd, changed) = (Arc::new(Mutex::new(None::<std::os::fd::OwnedFd>)), mpsc::channel());
        // Called when the monitor has stopped: the change is made then, and is waiting to be read on the return.
        let kernel = Kernel::with_hook({
            let (fd, memory, send) = (Arc::clone(&fd), Arc::clone(&memory), changed.0);
            move |call| {
                let fd = fd.lock();
                if let (Call::Unregister, Some(fd)) = (call, &*fd) {
                    let (memory, send) = (Arc::clone(&memory), send.clone());
                    thread::spawn(move || {
                        // SAFETY: the memory's contents may change at any time.
                        unsafe { madvise(memory.as_ptr().cast(), len as usize, Advice::LinuxDontNeed) }.unwrap();
                        let _ = send.send(());
                    });
                    let mut fds = [PollFd::new(fd, PollFlags::IN)];
                    rustix::event::poll(&mut fds, None).unwrap();
                }
                Ok(())
            }
        });
        let (send, receive) = mpsc::channel();
        let tripwire = match Tripwire::new(&Space::new(), &kernel, &[range], move |tripped| drop(send.send(tripped))) {
            Err(TripwireError::Register(RegisterError::Missing(missing))) => return println!("not tested: {missing}"),
            tripwire => tripwire.unwrap(),
        };
        // What a forked child has: another descriptor of the same userfaultfd, so that closing ours does not end it.
        *fd.lock() = Some(tripwire.uffd.fd().try_clone_to_owned().unwrap());
        drop(tripwire);
        let outcome = changed.1.recv_timeout(Duration::from_secs(10));
        // Whoever still waits goes on here.
        *fd.lock() = None;
        outcome.expect("whoever made the change waits to be read");
        assert_eq!(receive.recv().unwrap().range, range);
    }
}
