// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The kernel, as far as this crate calls it.
//!
//! Every call goes through a [`Kernel`], so that each can be made to fail, or be counted. What is unsafe about the calls
//! is settled here; the functions that remain unsafe are those that change what lies at an address.

use std::{
    ffi::c_void,
    fs::File,
    io,
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd},
        unix::fs::FileExt,
    },
    sync::{Arc, OnceLock},
    time::Duration,
};

use linux_raw_sys::{
    general::{
        UFFD_API, UFFDIO_REGISTER_MODE_WP, page_region, pm_scan_arg, uffd_msg, uffdio_api, uffdio_range,
        uffdio_register, uffdio_writeprotect,
    },
    ioctl::{UFFDIO_API, UFFDIO_REGISTER, UFFDIO_UNREGISTER, UFFDIO_WAKE, UFFDIO_WRITEPROTECT},
};
use notifier_core::{Access, HvaRange};
use rustix::{
    event::{PollFd, Timespec},
    fs::{FallocateFlags, Mode, OFlags, SealFlags},
    io::Errno,
    ioctl::{Ioctl, IoctlOutput, Opcode, opcode},
    mm::{Advice, MapFlags, MprotectFlags, MsyncFlags, ProtFlags, UserfaultfdFlags},
};

/// `UFFDIO_WRITEPROTECT_MODE_WP`: protect rather than lift (`include/uapi/linux/userfaultfd.h`).
const WRITEPROTECT_MODE_WP: u64 = 1 << 0;
/// `UFFDIO_WRITEPROTECT_MODE_DONTWAKE`: leave those who wait asleep.
const WRITEPROTECT_MODE_DONTWAKE: u64 = 1 << 1;
/// `USERFAULTFD_IOC_NEW`, a request of `/dev/userfaultfd` (Linux 6.1).
const USERFAULTFD_IOC_NEW: Opcode = opcode::none(0xAA, 0x00);
/// `PAGEMAP_SCAN`, a request of `/proc/self/pagemap` (Linux 6.7, `include/uapi/linux/fs.h`).
const PAGEMAP_SCAN: Opcode = opcode::read_write::<pm_scan_arg>(b'f', 16);

/// A kind of call to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Call {
    /// `mmap` of a file over a range.
    MapFile,
    /// `mmap` of private anonymous memory over a range.
    MapAnonymous,
    /// `mmap` of private anonymous memory where nothing is mapped (`MAP_FIXED_NOREPLACE`, Linux 4.17).
    FillHole,
    /// `msync`, which says whether all of a range is mapped.
    FindHole,
    /// `mprotect`.
    Protect,
    /// `madvise(MADV_DONTNEED)`.
    Discard,
    /// `madvise(MADV_POPULATE_READ)` (Linux 5.14).
    PopulateRead,
    /// `madvise(MADV_POPULATE_WRITE)` (Linux 5.14).
    PopulateWrite,
    /// `madvise(MADV_NOHUGEPAGE)`.
    NoHugePage,
    /// `fallocate(FALLOC_FL_PUNCH_HOLE)`.
    PunchHole,
    /// `fstat`, for the length of a file, and which it is.
    FileFacts,
    /// `fcntl(F_GETFL)` and `fcntl(F_GET_SEALS)`, for whether a file can be written to.
    FileRights,
    /// `userfaultfd`, or `USERFAULTFD_IOC_NEW` of `/dev/userfaultfd`.
    OpenUserfaultfd,
    /// `UFFDIO_API`.
    UserfaultfdApi,
    /// `UFFDIO_REGISTER`.
    Register,
    /// `UFFDIO_UNREGISTER`.
    Unregister,
    /// `UFFDIO_WRITEPROTECT` with `MODE_WP`.
    WriteProtect,
    /// `UFFDIO_WRITEPROTECT` without `MODE_WP`.
    Lift,
    /// `UFFDIO_WAKE`.
    Wake,
    /// `read` of a userfaultfd.
    ReadMessages,
    /// `ppoll`.
    Poll,
    /// `pread` of `/proc/self/pagemap`.
    ReadPagemap,
    /// `PAGEMAP_SCAN` (Linux 6.7).
    ScanPagemap,
    /// Reading `/proc/self/maps`.
    CountMappings,
    /// Reading `/proc/sys/vm/max_map_count`.
    MappingLimit,
}

impl Call {
    /// Every call there is.
    pub const ALL: &'static [Call] = &[
        Call::MapFile,
        Call::MapAnonymous,
        Call::FillHole,
        Call::FindHole,
        Call::Protect,
        Call::Discard,
        Call::PopulateRead,
        Call::PopulateWrite,
        Call::NoHugePage,
        Call::PunchHole,
        Call::FileFacts,
        Call::FileRights,
        Call::OpenUserfaultfd,
        Call::UserfaultfdApi,
        Call::Register,
        Call::Unregister,
        Call::WriteProtect,
        Call::Lift,
        Call::Wake,
        Call::ReadMessages,
        Call::Poll,
        Call::ReadPagemap,
        Call::ScanPagemap,
        Call::CountMappings,
        Call::MappingLimit,
    ];

    /// The kernel's name for it.
    pub fn name(self) -> &'static str {
        match self {
            Call::MapFile => "mmap(MAP_FIXED) of a file",
            Call::MapAnonymous => "mmap(MAP_FIXED | MAP_ANONYMOUS)",
            Call::FillHole => "mmap(MAP_FIXED_NOREPLACE | MAP_ANONYMOUS)",
            Call::FindHole => "msync(MS_ASYNC)",
            Call::Protect => "mprotect",
            Call::Discard => "madvise(MADV_DONTNEED)",
            Call::PopulateRead => "madvise(MADV_POPULATE_READ)",
            Call::PopulateWrite => "madvise(MADV_POPULATE_WRITE)",
            Call::NoHugePage => "madvise(MADV_NOHUGEPAGE)",
            Call::PunchHole => "fallocate(FALLOC_FL_PUNCH_HOLE)",
            Call::FileFacts => "fstat",
            Call::FileRights => "fcntl(F_GETFL, F_GET_SEALS)",
            Call::OpenUserfaultfd => "userfaultfd",
            Call::UserfaultfdApi => "UFFDIO_API",
            Call::Register => "UFFDIO_REGISTER",
            Call::Unregister => "UFFDIO_UNREGISTER",
            Call::WriteProtect => "UFFDIO_WRITEPROTECT(MODE_WP)",
            Call::Lift => "UFFDIO_WRITEPROTECT",
            Call::Wake => "UFFDIO_WAKE",
            Call::ReadMessages => "read of a userfaultfd",
            Call::Poll => "ppoll",
            Call::ReadPagemap => "pread of /proc/self/pagemap",
            Call::ScanPagemap => "PAGEMAP_SCAN",
            Call::CountMappings => "read of /proc/self/maps",
            Call::MappingLimit => "read of /proc/sys/vm/max_map_count",
        }
    }
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

type Hook = dyn Fn(Call) -> io::Result<()> + Send + Sync;

/// The kernel. A handle: clones ask the same hook.
///
/// `/proc/self/pagemap` is opened when it is first needed, and stays that of the process that opened it. After a `fork`
/// without `exec` a child that goes on using a kernel of its parent looks at the parent's pages: it makes a new one (and all
/// that is built on it: guest RAM, fences and filters are the parent's too).
#[derive(Clone, Default)]
pub struct Kernel {
    hook: Option<Arc<Hook>>,
    /// `/proc/self/pagemap`, opened when it is first needed. It stays that of the process that opened it.
    pagemap: Arc<OnceLock<File>>,
}

impl std::fmt::Debug for Kernel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kernel").field("hooked", &self.hook.is_some()).finish_non_exhaustive()
    }
}

/// How a range is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Style {
    pub(crate) access: Access,
    /// Writes reach the file.
    pub(crate) shared: bool,
    /// `MAP_NORESERVE`. Mappings that differ in it are not joined by the kernel.
    pub(crate) no_reserve: bool,
}

/// What `fstat` says of a file.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FileFacts {
    /// Bytes.
    pub(crate) length: u64,
    /// Device and inode: equal for descriptors of the same file.
    pub(crate) identity: (u64, u64),
}

impl Style {
    fn flags(self) -> MapFlags {
        let sharing = if self.shared { MapFlags::SHARED } else { MapFlags::PRIVATE };
        if self.no_reserve { sharing | MapFlags::NORESERVE } else { sharing }
    }

    fn prot(self) -> ProtFlags {
        let mut prot = ProtFlags::empty();
        prot.set(ProtFlags::READ, self.access.contains(Access::READ));
        prot.set(ProtFlags::WRITE, self.access.contains(Access::WRITE));
        prot.set(ProtFlags::EXEC, self.access.contains(Access::EXECUTE));
        prot
    }
}

impl Kernel {
    /// The kernel as it is.
    pub fn new() -> Self {
        Self::default()
    }

    /// A kernel that asks `hook` before each call. What it returns as an error is what the call "failed" with, and the
    /// call is not made. For tests, and for counting.
    pub fn with_hook(hook: impl Fn(Call) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self { hook: Some(Arc::new(hook)), pagemap: Arc::default() }
    }

    fn ask(&self, call: Call) -> io::Result<()> {
        self.hook.as_ref().map_or(Ok(()), |hook| hook(call))
    }

    // ---- what changes the contents or the rights of a range ----

    /// Maps `range.len()` bytes of `file` from `offset` over `range`.
    ///
    /// # Safety
    /// `range` lies in memory that the caller may change the contents of: every access to it goes through raw or
    /// volatile pointers, as guest memory's does. Its ends are multiples of the page size.
    pub(crate) unsafe fn map_file(
        &self,
        range: HvaRange,
        file: BorrowedFd<'_>,
        offset: u64,
        style: Style,
    ) -> io::Result<()> {
        self.ask(Call::MapFile)?;
        let flags = style.flags() | MapFlags::FIXED;
        // SAFETY: MAP_FIXED replaces what is mapped in `range`, and the caller may have that replaced.
        unsafe { rustix::mm::mmap(at(range), len(range), style.prot(), flags, file, offset) }?;
        Ok(())
    }

    /// Maps zeros over `range`, private.
    ///
    /// # Safety
    /// As for [`Kernel::map_file`].
    pub(crate) unsafe fn map_anonymous(&self, range: HvaRange, style: Style) -> io::Result<()> {
        self.ask(Call::MapAnonymous)?;
        let flags = Style { shared: false, ..style }.flags() | MapFlags::FIXED;
        // SAFETY: MAP_FIXED replaces what is mapped in `range`, and the caller may have that replaced.
        unsafe { rustix::mm::mmap_anonymous(at(range), len(range), style.prot(), flags) }?;
        Ok(())
    }

    /// Maps zeros over `range` where nothing is mapped there; `false` where something is.
    pub(crate) fn fill_hole(&self, range: HvaRange, style: Style) -> io::Result<bool> {
        self.ask(Call::FillHole)?;
        let flags = Style { shared: false, ..style }.flags() | MapFlags::FIXED_NOREPLACE;
        // SAFETY: MAP_FIXED_NOREPLACE replaces nothing, so that no memory in use changes.
        match unsafe { rustix::mm::mmap_anonymous(at(range), len(range), style.prot(), flags) } {
            Ok(_) => Ok(true),
            Err(Errno::EXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether something is mapped at every page of `range`. `msync(2)`: `ENOMEM` where not; `MS_ASYNC` does nothing
    /// else (`mm/msync.c`).
    pub(crate) fn is_mapped(&self, range: HvaRange) -> io::Result<bool> {
        self.ask(Call::FindHole)?;
        // SAFETY: MS_ASYNC changes neither contents nor mappings.
        match unsafe { rustix::mm::msync(at(range), len(range), MsyncFlags::ASYNC) } {
            Ok(()) => Ok(true),
            Err(Errno::NOMEM) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the rights of `range`.
    ///
    /// # Safety
    /// As for [`Kernel::map_file`]; accesses that the rights forbid are faults.
    pub(crate) unsafe fn protect(&self, range: HvaRange, access: Access) -> io::Result<()> {
        self.ask(Call::Protect)?;
        let mut flags = MprotectFlags::empty();
        flags.set(MprotectFlags::READ, access.contains(Access::READ));
        flags.set(MprotectFlags::WRITE, access.contains(Access::WRITE));
        flags.set(MprotectFlags::EXEC, access.contains(Access::EXECUTE));
        // SAFETY: the caller's.
        unsafe { rustix::mm::mprotect(at(range), len(range), flags) }?;
        Ok(())
    }

    /// `MADV_DONTNEED`: private memory is zero, or the file's, afterwards.
    ///
    /// # Safety
    /// As for [`Kernel::map_file`].
    pub(crate) unsafe fn discard(&self, range: HvaRange) -> io::Result<()> {
        self.ask(Call::Discard)?;
        // SAFETY: the caller's.
        unsafe { advise(range, Advice::LinuxDontNeed) }
    }

    /// Faults `range` in for reading.
    pub(crate) fn populate_read(&self, range: HvaRange) -> io::Result<()> {
        self.ask(Call::PopulateRead)?;
        // SAFETY: faulting pages in changes no contents.
        unsafe { advise(range, Advice::LinuxPopulateRead) }
    }

    /// Faults `range` in for writing, and so breaks copy-on-write.
    pub(crate) fn populate_write(&self, range: HvaRange) -> io::Result<()> {
        self.ask(Call::PopulateWrite)?;
        // SAFETY: faulting pages in changes no contents.
        unsafe { advise(range, Advice::LinuxPopulateWrite) }
    }

    /// No huge pages in `range`.
    pub(crate) fn no_huge_page(&self, range: HvaRange) -> io::Result<()> {
        self.ask(Call::NoHugePage)?;
        // SAFETY: the size of pages is no matter of contents.
        unsafe { advise(range, Advice::LinuxNoHugepage) }
    }

    /// Gives the file's memory back; what was there reads as zero. The length stays.
    pub(crate) fn punch_hole(&self, file: BorrowedFd<'_>, offset: u64, len: u64) -> io::Result<()> {
        self.ask(Call::PunchHole)?;
        rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, len)?;
        Ok(())
    }

    /// The file's length, and which file it is.
    pub(crate) fn file_facts(&self, file: BorrowedFd<'_>) -> io::Result<FileFacts> {
        self.ask(Call::FileFacts)?;
        let stat = rustix::fs::fstat(file)?;
        Ok(FileFacts { length: u64::try_from(stat.st_size).unwrap_or(0), identity: (stat.st_dev, stat.st_ino) })
    }

    /// What keeps holes from being punched into a file: a descriptor that is not open for writing (`vfs_fallocate`), or a
    /// seal (`shmem_fallocate`). What else may (quotas, an immutable file) is not looked for.
    pub(crate) fn punch_obstacle(&self, file: BorrowedFd<'_>) -> io::Result<Option<&'static str>> {
        self.ask(Call::FileRights)?;
        let flags = rustix::fs::fcntl_getfl(file)?;
        let mode = flags & OFlags::ACCMODE;
        if flags.contains(OFlags::PATH) || (mode != OFlags::WRONLY && mode != OFlags::RDWR) {
            return Ok(Some("it is not open for writing"));
        }
        match rustix::fs::fcntl_get_seals(file) {
            Ok(seals) if seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) => {
                Ok(Some("it is sealed against writing"))
            }
            // Files that have no seals say so by EINVAL.
            Ok(_) | Err(Errno::INVAL) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    // ---- userfaultfd ----

    /// A userfaultfd that does not block, and that reports the kernel's own faults too. Where the system call is not
    /// permitted (`vm.unprivileged_userfaultfd`), `/dev/userfaultfd` is tried.
    pub(crate) fn userfaultfd(&self) -> io::Result<OwnedFd> {
        self.ask(Call::OpenUserfaultfd)?;
        // SAFETY: nothing is registered yet.
        match unsafe { rustix::mm::userfaultfd(UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK) } {
            Ok(fd) => Ok(fd),
            Err(Errno::PERM) => {
                let open = || rustix::fs::open("/dev/userfaultfd", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty());
                // What is missing is the permission, whatever the device says.
                let device = open().map_err(|_| Errno::PERM)?;
                // SAFETY: the request takes flags by value, and returns a new descriptor.
                Ok(unsafe { rustix::ioctl::ioctl(device, NewUserfaultfd) }?)
            }
            Err(error) => Err(error.into()),
        }
    }

    /// Agrees on `features`; which ones the kernel has. Once only for each descriptor.
    pub(crate) fn userfaultfd_api(&self, uffd: BorrowedFd<'_>, features: u64) -> io::Result<u64> {
        self.ask(Call::UserfaultfdApi)?;
        let mut api = uffdio_api { api: UFFD_API.into(), features, ioctls: 0 };
        // SAFETY: UFFDIO_API reads and writes one `uffdio_api`.
        unsafe { Request::call(uffd, UFFDIO_API as Opcode, &mut api) }?;
        Ok(api.features)
    }

    /// Registers `range`; which requests it takes, as bits `1 << _UFFDIO_*`.
    pub(crate) fn register(&self, uffd: BorrowedFd<'_>, range: HvaRange, mode: u64) -> io::Result<u64> {
        self.ask(Call::Register)?;
        let mut register = uffdio_register { range: raw(range), mode, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER reads and writes one `uffdio_register`; contents stay.
        unsafe { Request::call(uffd, UFFDIO_REGISTER as Opcode, &mut register) }?;
        Ok(register.ioctls)
    }

    /// As [`Kernel::register`], for write protection.
    pub(crate) fn register_write_protect(&self, uffd: BorrowedFd<'_>, range: HvaRange) -> io::Result<u64> {
        self.register(uffd, range, UFFDIO_REGISTER_MODE_WP.into())
    }

    /// Takes a registration back. Protections go; who waits for a write is not woken by this (`userfaultfd_unregister`).
    pub(crate) fn unregister(&self, uffd: BorrowedFd<'_>, range: HvaRange) -> io::Result<()> {
        self.ask(Call::Unregister)?;
        // SAFETY: UFFDIO_UNREGISTER reads one `uffdio_range`.
        unsafe { Request::call(uffd, UFFDIO_UNREGISTER as Opcode, &mut raw(range)) }?;
        Ok(())
    }

    /// Who writes to `range` waits, from the return of this on.
    pub(crate) fn write_protect(&self, uffd: BorrowedFd<'_>, range: HvaRange) -> io::Result<()> {
        self.ask(Call::WriteProtect)?;
        write_protection(uffd, range, WRITEPROTECT_MODE_WP)
    }

    /// Writing to `range` is possible again; with `wake`, those who wait go on.
    pub(crate) fn lift(&self, uffd: BorrowedFd<'_>, range: HvaRange, wake: bool) -> io::Result<()> {
        self.ask(Call::Lift)?;
        write_protection(uffd, range, if wake { 0 } else { WRITEPROTECT_MODE_DONTWAKE })
    }

    /// Wakes those who wait in `range`, mapped anew or not.
    pub(crate) fn wake(&self, uffd: BorrowedFd<'_>, range: HvaRange) -> io::Result<()> {
        self.ask(Call::Wake)?;
        // SAFETY: UFFDIO_WAKE reads one `uffdio_range`.
        unsafe { Request::call(uffd, UFFDIO_WAKE as Opcode, &mut raw(range)) }?;
        Ok(())
    }

    /// Reads messages; how many. None where there is none now.
    pub(crate) fn read_messages(&self, uffd: BorrowedFd<'_>, into: &mut [uffd_msg]) -> io::Result<usize> {
        self.ask(Call::ReadMessages)?;
        let bytes = size_of_val(into);
        // SAFETY: the bytes of `into`; `MaybeUninit` asks nothing of what they are, and whatever the kernel writes is a
        // message, for a message is made of integers.
        let bytes = unsafe { std::slice::from_raw_parts_mut(into.as_mut_ptr().cast::<MaybeUninit<u8>>(), bytes) };
        match rustix::io::read(uffd, bytes) {
            Ok((read, _)) => Ok(read.len() / size_of::<uffd_msg>()),
            Err(Errno::AGAIN) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Waits until a descriptor is ready; how many are. None where a signal came.
    pub(crate) fn poll(&self, fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> io::Result<usize> {
        self.ask(Call::Poll)?;
        let timeout = timeout.map(|timeout| Timespec {
            tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
            tv_nsec: timeout.subsec_nanos().into(),
        });
        match rustix::event::poll(fds, timeout.as_ref()) {
            Ok(ready) => Ok(ready),
            Err(Errno::INTR) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    // ---- what the kernel says of the process ----

    fn pagemap(&self) -> io::Result<&File> {
        match self.pagemap.get() {
            Some(file) => Ok(file),
            None => {
                let file = File::open("/proc/self/pagemap")?;
                Ok(self.pagemap.get_or_init(|| file))
            }
        }
    }

    /// The entries of `range`, one of 64 bits for each page (`Documentation/admin-guide/mm/pagemap.rst`), in the place of
    /// what `into` held.
    pub(crate) fn read_pagemap(&self, range: HvaRange, into: &mut Vec<u64>) -> io::Result<()> {
        self.ask(Call::ReadPagemap)?;
        const ENTRY: usize = size_of::<u64>();
        let page = rustix::param::page_size() as u64;
        into.clear();
        let (mut at, mut left) = (range.start().as_u64() / page * ENTRY as u64, (range.len() / page) as usize);
        let mut bytes = [0; 512 * ENTRY];
        while left != 0 {
            let part = left.min(512);
            self.pagemap()?.read_exact_at(&mut bytes[..part * ENTRY], at)?;
            let entries = bytes[..part * ENTRY].chunks_exact(ENTRY);
            into.extend(entries.map(|entry| u64::from_ne_bytes(std::array::from_fn(|byte| entry[byte]))));
            at += (part * ENTRY) as u64;
            left -= part;
        }
        Ok(())
    }

    /// Looks for pages, and with `PM_SCAN_WP_MATCHING` protects those found against writing (Linux 6.7); how many
    /// regions were written to `into`. `arg` says what is looked for; its vector is `into`.
    pub(crate) fn scan_pagemap(&self, arg: &mut pm_scan_arg, into: &mut [page_region]) -> io::Result<usize> {
        self.ask(Call::ScanPagemap)?;
        arg.size = size_of::<pm_scan_arg>() as u64;
        arg.vec = into.as_mut_ptr() as u64;
        arg.vec_len = into.len() as u64;
        // SAFETY: PAGEMAP_SCAN reads and writes one `pm_scan_arg`, and writes at most `vec_len` regions, which `into` has
        // room for.
        unsafe { Request::call(self.pagemap()?.as_fd(), PAGEMAP_SCAN, arg) }
    }

    /// Mappings of this process: the lines of `/proc/self/maps`. Takes no memory, for there may be none to be had.
    pub(crate) fn count_mappings(&self) -> io::Result<u64> {
        self.ask(Call::CountMappings)?;
        let maps = rustix::fs::open("/proc/self/maps", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let mut lines = 0;
        let mut bytes = [0; 4096];
        loop {
            match rustix::io::read(&maps, &mut bytes) {
                Ok(0) => return Ok(lines),
                // A newline in a file's name is written as \012.
                Ok(read) => lines += bytes[..read].iter().filter(|&&byte| byte == b'\n').count() as u64,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// `vm.max_map_count`.
    pub(crate) fn mapping_limit(&self) -> io::Result<u64> {
        self.ask(Call::MappingLimit)?;
        let text = std::fs::read_to_string("/proc/sys/vm/max_map_count")?;
        text.trim().parse().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }
}

fn at(range: HvaRange) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(range.start().as_u64() as usize)
}

fn len(range: HvaRange) -> usize {
    range.len() as usize
}

fn raw(range: HvaRange) -> uffdio_range {
    uffdio_range { start: range.start().as_u64(), len: range.len() }
}

/// # Safety
/// The advice may be followed in `range`.
unsafe fn advise(range: HvaRange, advice: Advice) -> io::Result<()> {
    loop {
        // SAFETY: the caller's.
        match unsafe { rustix::mm::madvise(at(range), len(range), advice) } {
            Ok(()) => return Ok(()),
            // Populating stops at signals.
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn write_protection(uffd: BorrowedFd<'_>, range: HvaRange, mode: u64) -> io::Result<()> {
    let mut protection = uffdio_writeprotect { range: raw(range), mode };
    loop {
        // SAFETY: UFFDIO_WRITEPROTECT reads one `uffdio_writeprotect`; contents stay.
        match unsafe { Request::call(uffd, UFFDIO_WRITEPROTECT as Opcode, &mut protection) } {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

/// A request that reads, and may write, one `T`.
struct Request<'a, T> {
    opcode: Opcode,
    argument: &'a mut T,
}

impl<'a, T> Request<'a, T> {
    /// # Safety
    /// `opcode` names a request of `fd` whose argument is a `T`.
    unsafe fn call(fd: BorrowedFd<'_>, opcode: Opcode, argument: &'a mut T) -> io::Result<usize> {
        // SAFETY: the caller's.
        Ok(unsafe { rustix::ioctl::ioctl(fd, Self { opcode, argument }) }?)
    }
}

// SAFETY: made by `call` alone, whose caller says that the opcode takes a `T`; the kernel may write to it, and the output
// is the number that the request returns.
unsafe impl<T> Ioctl for Request<'_, T> {
    type Output = usize;
    const IS_MUTATING: bool = true;
    fn opcode(&self) -> Opcode {
        self.opcode
    }
    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.argument).cast()
    }
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<usize> {
        Ok(usize::try_from(out).unwrap_or(0))
    }
}

/// `USERFAULTFD_IOC_NEW`.
struct NewUserfaultfd;

// SAFETY: the request takes the flags as its argument, by value, touches no memory of the caller, and returns a descriptor
// that nobody else has.
unsafe impl Ioctl for NewUserfaultfd {
    type Output = OwnedFd;
    const IS_MUTATING: bool = false;
    fn opcode(&self) -> Opcode {
        USERFAULTFD_IOC_NEW
    }
    fn as_ptr(&mut self) -> *mut c_void {
        let flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
        std::ptr::without_provenance_mut(flags.bits() as usize)
    }
    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> rustix::io::Result<OwnedFd> {
        // SAFETY: the kernel just made it, for us.
        Ok(unsafe { OwnedFd::from_raw_fd(out) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_call_has_a_name_of_its_own() {
        let names: std::collections::BTreeSet<_> = Call::ALL.iter().map(|call| call.name()).collect();
        assert_eq!(names.len(), Call::ALL.len());
    }

    #[test]
    fn a_hook_that_fails_a_call_is_all_that_happens() {
        let kernel = Kernel::with_hook(|call| match call {
            Call::CountMappings => Err(io::Error::from_raw_os_error(5)),
            _ => Ok(()),
        });
        assert_eq!(kernel.count_mappings().unwrap_err().raw_os_error(), Some(5));
        assert!(kernel.mapping_limit().unwrap() > 0);
    }

    #[test]
    fn mappings_are_counted_as_the_kernel_shows_them() {
        let lines = std::fs::read_to_string("/proc/self/maps").unwrap().lines().count() as u64;
        let counted = Kernel::new().count_mappings().unwrap();
        // Other tests' threads come and go.
        assert!(counted.abs_diff(lines) < 64, "{counted} {lines}");
        assert!(counted > 4);
    }
}
