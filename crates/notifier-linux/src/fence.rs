// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A fence against writers: they wait, and no write is lost. The argument is on [`WriteFence`].
use std::{
    fmt, io,
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, Instant},
};

use linux_raw_sys::general::{
    UFFD_FEATURE_EXACT_ADDRESS, UFFD_FEATURE_PAGEFAULT_FLAG_WP, UFFD_FEATURE_WP_HUGETLBFS_SHMEM,
    UFFD_FEATURE_WP_UNPOPULATED, uffd_msg,
};
use notifier_core::{Hva, HvaRange};
use parking_lot::{RwLock, RwLockReadGuard};
use rustix::event::{PollFd, PollFlags};

use crate::{
    kernel::{Call, Kernel},
    uffd::{Message, ProtectError, RegisterError, Stop, Uffd, insist, no_messages},
};

/// No feature that sends events: whoever changes the mappings would wait for a reader of them.
const FEATURES: u32 = UFFD_FEATURE_PAGEFAULT_FLAG_WP
    | UFFD_FEATURE_EXACT_ADDRESS
    | UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    | UFFD_FEATURE_WP_UNPOPULATED;

/// Messages that are read with one call.
const BATCH: usize = 64;

/// What a fence could not do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FenceError {
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
    /// The fence was not made for this byte. Nothing was done.
    #[error("{address} is in no range of this fence")]
    Foreign {
        /// The first such byte.
        address: Hva,
    },
    /// What is mapped here now was mapped over what was registered: [`WriteFence::readmit`] is missing. It was done for
    /// everything else in the range.
    #[error("{address} was mapped anew and is not registered with this fence: readmit it first")]
    Lapsed {
        /// The first page.
        address: Hva,
    },
    /// A call failed. It may have been done for a part of the range; doing it again, or lifting, is right.
    #[error("{call} failed at {range}: {source}")]
    Call {
        /// Which call.
        call: Call,
        /// What it was made for.
        range: HvaRange,
        /// Its error.
        source: io::Error,
    },
    /// The fence was given up ([`WriteFence::disband`]). Nothing was done.
    #[error("the fence over {range} was disbanded")]
    Disbanded {
        /// What was asked for.
        range: HvaRange,
    },
    /// Waiting for messages failed. None was lost.
    #[error("{call} failed: {source}")]
    Wait {
        /// Which call.
        call: Call,
        /// Its error.
        source: io::Error,
    },
}

/// Somebody who waits at the fence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Waiter {
    /// The byte that is to be written, exactly; the first, of a store of several.
    pub address: Hva,
}

/// Stops whoever writes to given memory, page by page, until it is let go on: writers wait, and no write is lost.
///
/// Between comparing two pages and mapping one over the other, a write to the page that goes is lost. The fence closes
/// that gap with userfaultfd's write protection (`Documentation/admin-guide/mm/userfaultfd.rst`):
///
/// ```text
/// arm(range)      writers of the range wait from here on
/// compare         what is read now stays so
/// mmap over       drops the registration and the protection of what was mapped; wakes nobody
/// readmit(range)  registers what is mapped now
/// wake(range)     whoever waits tries again, and writes to what is mapped now
/// lift(range)     instead, where nothing was mapped over: writers go on
/// ```
///
/// # Who is stopped
/// From the return of [`WriteFence::arm`] on, every store through *this mapping* of *this process*: of threads, of the
/// kernel on their behalf (`read(2)` into the range, say: it sleeps inside the system call), and of KVM's vCPUs.
/// Arming takes the right to write out of the page tables and tells the MMU notifiers (`change_protection` in
/// mm/mprotect.c), so that a vCPU that had the page writable in its secondary table faults; it then waits inside
/// `KVM_RUN`, without an exit. A store that was made before `arm` returned is seen by every read after it. Reads go
/// on.
///
/// A store is stopped before it happens, at each page by itself: one that crosses into an armed page may have been done
/// in part on the page before.
///
/// # Who is not
/// - Other mappings of the same memory: of other processes (vhost-user back ends, and a forked child: fork leaves the
///   registration behind), and a second mapping of the memfd in this process.
/// - Pins: whoever holds the page itself (registered buffers of io_uring, VFIO) writes past every page table.
/// - `MADV_DONTNEED`, hole punching and truncation: the contents go, armed or not. In mappings of files the protection
///   stays behind as a marker, and in anonymous memory it goes with the page (`zap_install_uffd_wp_if_needed` in
///   mm/memory.c): whoever drops armed anonymous pages arms them again.
///
/// # Pages that are not there
/// Arming covers them, with a marker in the page table. Whoever writes to one waits like everybody else, but the page
/// is made *first*, by the writer's own fault: a page of zeros in anonymous memory, a page of the file in a shared
/// mapping, and in a private mapping of a file the *private copy*. So where somebody waits for a private page that
/// nobody had read before, [`PageState::file`](crate::PageState::file) is already false; the contents are still those
/// of the file.
///
/// # Who handles the waiters
/// Whoever arms lifts: waiters need no handler where each `arm` is followed by a `lift`, or by `readmit` and `wake`.
/// Handler threads ([`WriteFence::next`]) are for those who arm and let the first writer decide.
///
/// **A handler never waits for a scope, a window, a lock or a thread that could itself wait at the fence.** A walker
/// that stores to guest memory inside its scope waits at the fence until the handler lifts; a handler that opens a
/// window waits for that scope: neither ever goes on. The handler lifts, or hands the work to another thread and
/// lifts. For the same reason it writes to no fenced memory itself.
///
/// # Mappings
/// Registering a part of a mapping makes a mapping of its own of it, as replacing does: scattered ranges add up to two
/// each, which no [`VmaBudget`](crate::VmaBudget) knows of until it counts. [`WriteFence::new`] with many of them leaves
/// the process the reserve that a budget leaves by default, or is refused ([`RegisterError::Budget`]); what a few ranges
/// add, and [`WriteFence::readmit`] of parts of what was mapped over, is not counted. One range over all of guest
/// memory adds next to nothing; but where pages of it are mapped anew, each stays a mapping of its own until it is
/// readmitted, though it may have gone home.
///
/// # State, and the end
/// Each page is either armed or not; there is no count. Whoever arms a page that is armed arms it once.
///
/// Dropping the fence lets everybody go on: the protections are taken off, the registrations go, and all waiters are
/// woken. The kernel does that too where the process ends. The ranges stay mapped while the fence lives (mapping over
/// them is what it is for): had they been unmapped, and had somebody else registered other memory at the same
/// addresses, the drop would take that registration off on kernels that do not ask whose it is. What
/// [`WriteFence::disband`] has unregistered the drop leaves alone.
///
/// # Example
/// ```
/// use notifier_core::{AddrRange, Hva};
/// use notifier_linux::{FenceError, Kernel, RegisterError, WriteFence};
/// use vm_memory::MmapRegion;
///
/// let memory = MmapRegion::<()>::new(0x4000)?;
/// let range = AddrRange::with_len(Hva::new(memory.as_ptr() as u64), 0x4000)?;
/// let fence = match WriteFence::new(&Kernel::new(), &[range]) {
///     Err(FenceError::Register(RegisterError::Missing(missing))) => return Ok(println!("{missing}")),
///     fence => fence?,
/// };
/// fence.arm(range)?;
/// // Nobody writes to the range here.
/// fence.lift(range)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct WriteFence {
    uffd: Uffd,
    stop: Stop,
    stopped: AtomicBool,
    /// Held for reading while something is registered or armed: what was begun before it was disbanded is undone then.
    disbanded: RwLock<bool>,
}

impl fmt::Debug for WriteFence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("WriteFence")
            .field("ranges", &self.uffd.ranges())
            .field("stopped", &self.is_stopped())
            .finish_non_exhaustive()
    }
}

impl WriteFence {
    /// A fence for `ranges`: anonymous memory, memfd and tmpfs (shared or private), hugetlbfs. Nothing is armed. Bytes
    /// of a range where nothing is mapped are left out until [`WriteFence::readmit`].
    ///
    /// # Errors
    /// [`FenceError::Register`]: the kernel lacks userfaultfd, the right to use it, or a feature
    /// ([`RegisterError::Missing`]); memory that it does not take ([`RegisterError::Unfit`]) or that is in another
    /// userfaultfd ([`RegisterError::Busy`]); [`RegisterError::Unaligned`]; more ranges than the process has mappings
    /// left for ([`RegisterError::Budget`]). Nothing is registered then.
    pub fn new(kernel: &Kernel, ranges: &[HvaRange]) -> Result<Self, FenceError> {
        let stop = Stop::new()?;
        Ok(Self {
            uffd: Uffd::new(kernel, FEATURES, ranges)?,
            stop,
            stopped: AtomicBool::new(false),
            disbanded: RwLock::new(false),
        })
    }

    /// What the fence was made for, ascending; ranges that touch are joined.
    pub fn ranges(&self) -> &[HvaRange] {
        self.uffd.ranges()
    }

    /// On return whoever writes to a byte of `range` through this mapping waits.
    ///
    /// About 80 ns a page in large ranges, 0.7 us a call.
    ///
    /// # Errors
    /// [`FenceError::Unaligned`], [`FenceError::Foreign`]: nothing was done. [`FenceError::Lapsed`]: all of it is
    /// armed, but for what was mapped over. [`FenceError::Call`] (no memory for page tables, mostly): a part of it may
    /// be armed. In the last two cases [`WriteFence::lift`] of the range takes it back.
    pub fn arm(&self, range: HvaRange) -> Result<(), FenceError> {
        self.check(range)?;
        let _standing = self.standing(range)?;
        self.uffd.protect(range, true).map_err(|error| told(error, Call::WriteProtect))
    }

    /// Gives the fence up: nothing is armed or registered any more, everybody who waits goes on, and nothing can be armed
    /// or readmitted from here on ([`WriteFence::lift`] then says [`FenceError::Lapsed`]). For whoever can no longer let
    /// writers in: they are not to wait for nobody.
    ///
    /// # Errors
    /// [`FenceError::Call`]: a part of it may still be armed, and its writers wait. Everything else was done all the
    /// same. Doing it again does what is left (what was unregistered is left alone: it may be another fence's by now),
    /// and so does dropping the fence.
    pub fn disband(&self) -> Result<(), FenceError> {
        *self.disbanded.write() = true;
        self.uffd.unregister_all().map_err(|(call, range, source)| FenceError::Call { call, range, source })
    }

    fn standing(&self, range: HvaRange) -> Result<RwLockReadGuard<'_, bool>, FenceError> {
        let disbanded = self.disbanded.read();
        if *disbanded { Err(FenceError::Disbanded { range }) } else { Ok(disbanded) }
    }

    /// On return `range` can be written again, and whoever waited goes on.
    ///
    /// # Errors
    /// [`FenceError::Unaligned`], [`FenceError::Foreign`]: nothing was done. [`FenceError::Lapsed`]: all of it is
    /// lifted and every waiter woken; a part of it was mapped over and cannot have been armed. [`FenceError::Call`]: a
    /// part of it may still be armed, and its writers wait.
    pub fn lift(&self, range: HvaRange) -> Result<(), FenceError> {
        self.check(range)?;
        self.uffd.protect(range, false).or_else(|error| {
            // The kernel wakes only where it lifted.
            self.wake(range)?;
            Err(told(error, Call::Lift))
        })
    }

    /// Registers what was mapped over `range`. It is not armed, and who waited for what was mapped before still waits:
    /// [`WriteFence::wake`]. What is registered already stays as it is.
    ///
    /// # Errors
    /// [`FenceError::Unaligned`], [`FenceError::Foreign`], [`FenceError::Register`]: nothing is different.
    pub fn readmit(&self, range: HvaRange) -> Result<(), FenceError> {
        self.check(range)?;
        let _standing = self.standing(range)?;
        Ok(self.uffd.register(range)?)
    }

    /// Whoever waits in `range` tries again: it goes on where nothing is armed now, and is a new [`Waiter`] where
    /// something is.
    ///
    /// # Errors
    /// [`FenceError::Unaligned`], [`FenceError::Foreign`], [`FenceError::Call`]: nobody was woken.
    pub fn wake(&self, range: HvaRange) -> Result<(), FenceError> {
        self.check(range)?;
        self.uffd.wake(range).map_err(|source| FenceError::Call { call: Call::Wake, range, source })
    }

    /// The next one who waits; `None` at the timeout, or once the fence is stopped. Each is told once, to one caller:
    /// who takes it sees to it that it is lifted or woken. Who was lifted before it was told is never told.
    ///
    /// # Errors
    /// [`FenceError::Wait`]: no message was lost.
    pub fn next(&self, timeout: Duration) -> Result<Option<Waiter>, FenceError> {
        let mut messages = no_messages::<1>();
        self.read(&mut messages, timeout).map(|waiters| waiters.into_iter().flatten().next())
    }

    /// As [`WriteFence::next`], for all who wait now (64 at most): appends them to `into`, with one call, and says how
    /// many.
    ///
    /// # Errors
    /// [`FenceError::Wait`]: no message was lost.
    pub fn next_batch(&self, into: &mut Vec<Waiter>, timeout: Duration) -> Result<usize, FenceError> {
        let mut messages = no_messages::<BATCH>();
        let before = into.len();
        into.extend(self.read(&mut messages, timeout)?.into_iter().flatten());
        Ok(into.len() - before)
    }

    /// From now on every [`WriteFence::next`] returns `None`, and those that wait return. What is armed stays armed,
    /// and waiters wait.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::SeqCst);
        self.stop.signal();
    }

    /// Whether [`WriteFence::stop`] was called.
    pub fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::SeqCst)
    }

    fn check(&self, range: HvaRange) -> Result<(), FenceError> {
        let page_size = self.uffd.page_size();
        if !range.is_aligned(page_size) {
            return Err(FenceError::Unaligned { range, page_size });
        }
        self.uffd.foreign(range).map_or(Ok(()), |address| Err(FenceError::Foreign { address }))
    }

    /// Waits for messages, and reads as many as there are and fit; `None` at the timeout or when stopped.
    fn read<'m>(
        &self,
        messages: &'m mut [uffd_msg],
        timeout: Duration,
    ) -> Result<Option<impl Iterator<Item = Waiter> + use<'m>>, FenceError> {
        // None: further away than the clock goes.
        let until = Instant::now().checked_add(timeout);
        let kernel = self.uffd.kernel();
        while !self.is_stopped() {
            let read = insist(|| kernel.read_messages(self.uffd.fd(), messages))
                .map_err(|source| FenceError::Wait { call: Call::ReadMessages, source })?;
            if read != 0 {
                let fault = |message: &uffd_msg| match Message::parse(message) {
                    Some(Message::Fault(address)) => Some(Waiter { address }),
                    _ => None,
                };
                return Ok(Some(messages[..read].iter().filter_map(fault)));
            }
            let left = until.map(|until| until.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                break;
            }
            let mut fds = [
                PollFd::from_borrowed_fd(self.uffd.fd(), PollFlags::IN),
                PollFd::from_borrowed_fd(self.stop.fd(), PollFlags::IN),
            ];
            kernel.poll(&mut fds, left).map_err(|source| FenceError::Wait { call: Call::Poll, source })?;
        }
        Ok(None)
    }
}

fn told(error: ProtectError, call: Call) -> FenceError {
    match error {
        ProtectError::Lapsed { address } => FenceError::Lapsed { address },
        ProtectError::Failed { range, source } => FenceError::Call { call, range, source },
    }
}

#[cfg(test)]
mod tests {
    use notifier_core::AddrRange;
    use vm_memory::{Bytes, MmapRegion, VolatileMemory};

    use super::*;

    #[test]
    fn writers_go_on_at_the_drop_though_another_process_had_the_descriptor() {
        let len = crate::uffd::page_size();
        let memory = MmapRegion::<()>::new(len as usize).unwrap();
        let range = AddrRange::with_len(Hva::new(memory.as_ptr() as u64), len).unwrap();
        let fence = match WriteFence::new(&Kernel::new(), &[range]) {
            Err(FenceError::Register(RegisterError::Missing(missing))) => return println!("not tested: {missing}"),
            fence => fence.unwrap(),
        };
        fence.arm(range).unwrap();
        // What a forked child has: another descriptor of the same userfaultfd, so that dropping ours does not end it.
        let childs = fence.uffd.fd().try_clone_to_owned().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| memory.as_volatile_slice().write_obj(7u8, 0).unwrap());
            fence.next(Duration::from_secs(60)).unwrap().unwrap();
            drop(fence);
        });
        assert_eq!(memory.as_volatile_slice().read_obj::<u8>(0).unwrap(), 7);
        drop(childs);
    }
}
