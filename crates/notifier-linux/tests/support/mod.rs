// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Guest RAM of every kind, and what is true of it whatever happens.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::{
    fs::File,
    io,
    os::unix::fs::{FileExt, MetadataExt},
    sync::{Arc, Mutex},
};

use notifier_core::{
    Access, AddrRange, Coverage, Gpa, GpaRange, Hva, HvaRange, Space, Subscriber, SubscriberError, Subscription,
};
use notifier_linux::{Backing, Call, GuestRam, Kernel, Source};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

pub(crate) const PAGE: u64 = 4096;
pub(crate) const PAGES: u64 = 32;
pub(crate) const BASE: u64 = 0x10_0000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Anonymous,
    Shared,
    Private,
    Template,
}

pub(crate) const KINDS: [Kind; 4] = [Kind::Anonymous, Kind::Shared, Kind::Private, Kind::Template];

/// What happened, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Start(Vec<HvaRange>),
    End(Vec<HvaRange>),
    Made(Call),
}

type Answer = dyn Fn(Call) -> io::Result<()> + Send + Sync;

/// A log of calls and windows, and what is answered to calls.
#[derive(Clone)]
pub(crate) struct Log {
    pub(crate) events: Arc<Mutex<Vec<Event>>>,
    answer: Arc<Mutex<Arc<Answer>>>,
}

impl Default for Log {
    fn default() -> Self {
        Self { events: Arc::default(), answer: Arc::new(Mutex::new(Arc::new(|_| Ok(())))) }
    }
}

impl Log {
    pub(crate) fn kernel(&self) -> Kernel {
        let log = self.clone();
        Kernel::with_hook(move |call| {
            log.events.lock().unwrap().push(Event::Made(call));
            let answer = Arc::clone(&log.answer.lock().unwrap());
            answer(call)
        })
    }

    pub(crate) fn answer(&self, answer: impl Fn(Call) -> io::Result<()> + Send + Sync + 'static) {
        *self.answer.lock().unwrap() = Arc::new(answer);
    }

    /// Fails the nth call from now on (the first is 0), once, or all from there on.
    pub(crate) fn fail(&self, nth: usize, errno: i32, once: bool) {
        let seen = std::sync::atomic::AtomicUsize::new(0);
        self.answer(move |_| {
            let now = seen.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            if now == nth || (now > nth && !once) { Err(io::Error::from_raw_os_error(errno)) } else { Ok(()) }
        });
    }

    pub(crate) fn heal(&self) {
        self.answer(|_| Ok(()));
    }

    pub(crate) fn take(&self) -> Vec<Event> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }

    /// The calls since the last look.
    pub(crate) fn calls(&self) -> Vec<Call> {
        let made = |event| if let Event::Made(call) = event { Some(call) } else { None };
        self.take().into_iter().filter_map(made).collect()
    }
}

impl Subscriber for Log {
    fn start(&self, coverage: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.events.lock().unwrap().push(Event::Start(coverage.host().collect()));
        Ok(())
    }
    fn end(&self, coverage: &Coverage<'_>) -> Result<(), SubscriberError> {
        self.events.lock().unwrap().push(Event::End(coverage.host().collect()));
        Ok(())
    }
    fn zap(&self, _: &Coverage<'_>) -> Result<(), SubscriberError> {
        Ok(())
    }
}

pub(crate) struct Bench {
    pub(crate) space: Space,
    pub(crate) ram: GuestRam,
    /// The file that RAM is at home in.
    pub(crate) home: Option<Arc<File>>,
    pub(crate) log: Log,
    pub(crate) kind: Kind,
    subscription: Option<Subscription>,
}

pub(crate) fn memfd(len: u64) -> Arc<File> {
    let file = File::from(rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(len).unwrap();
    Arc::new(file)
}

/// Contents of a page: its number, all over.
pub(crate) fn contents(number: u8) -> Vec<u8> {
    vec![number; PAGE as usize]
}

/// A file whose page `n` is full of `first + n`.
pub(crate) fn filled(first: u8, pages: u64) -> Arc<File> {
    let file = memfd(pages * PAGE);
    for page in 0..pages {
        file.write_all_at(&contents(first + page as u8), page * PAGE).unwrap();
    }
    file
}

/// Bytes of memory that the host spends on a file.
pub(crate) fn resident(file: &File) -> u64 {
    file.metadata().unwrap().blocks() * 512
}

pub(crate) fn region(at: u64, pages: u64, file: Option<(&Arc<File>, u64)>, private: bool) -> GuestRegionMmap {
    let (prot, noreserve) = (3, 0x4000);
    let flags = noreserve | if private { 2 } else { 1 } | if file.is_none() { 0x20 } else { 0 };
    let file = file.map(|(file, offset)| FileOffset::from_arc(Arc::clone(file), offset));
    let mapping = MmapRegion::build(file, (pages * PAGE) as usize, prot, flags).unwrap();
    GuestRegionMmap::new(mapping, GuestAddress(at)).unwrap()
}

impl Bench {
    /// RAM whose page `n` is full of `n + 1`.
    pub(crate) fn new(kind: Kind) -> Self {
        let log = Log::default();
        let space = Space::new();
        let home = match kind {
            Kind::Anonymous => None,
            // Offsets that are not zero, so that forgetting them shows.
            _ => Some(memfd((PAGES + 3) * PAGE)),
        };
        let memory = region(BASE, PAGES, home.as_ref().map(|file| (file, 3 * PAGE)), kind != Kind::Shared);
        let memory: GuestMemoryMmap<()> = GuestMemoryMmap::from_regions(vec![memory]).unwrap();
        for page in 0..PAGES {
            let bytes = contents(page as u8 + 1);
            match (&home, kind) {
                (Some(file), Kind::Private | Kind::Template) => {
                    file.write_all_at(&bytes, (page + 3) * PAGE).unwrap();
                }
                _ => memory.write_slice(&bytes, GuestAddress(BASE + page * PAGE)).unwrap(),
            }
        }
        let subscription = Some(space.subscribe(log.clone()).unwrap());
        let builder = GuestRam::builder(&space, memory).kernel(log.kernel()).own_files(kind == Kind::Private);
        let ram = builder.build().unwrap();
        log.take();
        Self { space, ram, home, log, kind, subscription }
    }

    pub(crate) fn unsubscribe(&mut self) {
        self.subscription = None;
    }

    pub(crate) fn read(&self, page: u64) -> Vec<u8> {
        let mut bytes = contents(0xee);
        self.ram.memory().read_slice(&mut bytes, GuestAddress(BASE + page * PAGE)).unwrap();
        bytes
    }

    pub(crate) fn write(&self, page: u64, number: u8) {
        self.ram.memory().write_slice(&contents(number), GuestAddress(BASE + page * PAGE)).unwrap();
    }

    /// Asserts that each page is full of the number that `expected` has for it.
    pub(crate) fn assert_pages(&self, expected: impl Fn(u64) -> u8) {
        for page in 0..PAGES {
            assert_eq!(self.read(page), contents(expected(page)), "page {page} of {:?}", self.kind);
        }
    }

    pub(crate) fn host(&self, first: u64, count: u64) -> HvaRange {
        let all = self.ram.host_ranges(guest(first, count));
        assert_eq!(all.len(), 1);
        all[0]
    }

    /// No window is in progress, and faults are served.
    pub(crate) fn assert_at_rest(&self) {
        assert_eq!(self.space.progress().count, 0);
        let mut walker = self.space.walker();
        for page in 0..PAGES {
            let admitted = walker.fault(guest(page, 1)).unwrap().admit(|admission| admission.check(guest(page, 1)));
            assert_eq!(admitted, Ok(()), "page {page}");
        }
    }

    /// What RAM says is mapped is what the kernel says is mapped.
    pub(crate) fn assert_true(&self) {
        assert_true(&self.ram, guest(0, PAGES));
    }

    /// Mappings that the region is made of.
    pub(crate) fn mappings(&self) -> usize {
        let host = self.host(0, PAGES);
        maps().iter().filter(|line| line.range.overlaps(&host)).count()
    }
}

pub(crate) fn page_at(page: u64) -> Gpa {
    Gpa::new(BASE + page * PAGE)
}

pub(crate) fn guest(first: u64, count: u64) -> GpaRange {
    AddrRange::with_len(page_at(first), count * PAGE).unwrap()
}

pub(crate) fn source(file: &Arc<File>, page: u64) -> Source {
    Source::new(file, page * PAGE)
}

/// A line of `/proc/self/maps`.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) range: HvaRange,
    pub(crate) access: Access,
    pub(crate) shared: bool,
    pub(crate) offset: u64,
    pub(crate) inode: u64,
}

pub(crate) fn maps() -> Vec<Line> {
    let text = std::fs::read_to_string("/proc/self/maps").unwrap();
    let hex = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let line = |line: &str| {
        let words: Vec<_> = line.split_whitespace().collect();
        let (start, end) = words[0].split_once('-').unwrap();
        let mut access = Access::empty();
        access.set(Access::READ, words[1].contains('r'));
        access.set(Access::WRITE, words[1].contains('w'));
        access.set(Access::EXECUTE, words[1].contains('x'));
        Line {
            range: AddrRange::new(Hva::new(hex(start)), Hva::new(hex(end))).unwrap(),
            access,
            shared: words[1].contains('s'),
            offset: hex(words[2]),
            inode: words[4].parse().unwrap(),
        }
    };
    text.lines().filter(|line| !line.contains("[vsyscall]")).map(line).collect()
}

/// What RAM says is mapped is what the kernel says is mapped.
pub(crate) fn assert_true(ram: &GuestRam, range: GpaRange) {
    let lines = maps();
    let mut at = range.start();
    while at < range.end() {
        let host = ram.host_ranges(AddrRange::with_len(at, PAGE).unwrap())[0];
        let line = lines.iter().find(|line| line.range.covers(&host)).unwrap_or_else(|| panic!("{at}: a hole"));
        let offset = line.offset + (host.start().as_u64() - line.range.start().as_u64());
        let place = match ram.backing_at(at).unwrap() {
            Backing::Anonymous => (false, 0, None),
            Backing::Shared { file, offset } => (true, file.metadata().unwrap().ino(), Some(offset)),
            Backing::Private { file, offset } | Backing::Replaced { file, offset } => {
                (false, file.metadata().unwrap().ino(), Some(offset))
            }
            other => panic!("{other:?}"),
        };
        assert_eq!((line.shared, line.inode), (place.0, place.1), "{at}: {line:?}");
        assert!(place.2.is_none_or(|expected| expected == offset), "{at}: {line:?} {offset:#x} {place:?}");
        assert_eq!(Some(line.access), ram.access_at(at), "{at}: {line:?}");
        at = at.wrapping_add(PAGE);
    }
}

/// Whether the process has the page at `range` in its tables.
pub(crate) fn present(range: HvaRange) -> bool {
    let mut entry = [0; 8];
    let at = range.start().as_u64() / PAGE * 8;
    File::open("/proc/self/pagemap").unwrap().read_exact_at(&mut entry, at).unwrap();
    u64::from_ne_bytes(entry) >> 63 == 1
}

/// Whether huge pages are refused in the mapping that has `range`: `nh` among the `VmFlags` (`proc_pid_smaps(5)`).
pub(crate) fn no_huge_pages_at(range: HvaRange) -> bool {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let at = range.start().as_u64();
    let hex = |text| u64::from_str_radix(text, 16).ok();
    let mut inside = false;
    for line in smaps.lines() {
        let ends = line.split(' ').next().and_then(|word| word.split_once('-'));
        if let Some((Some(start), Some(end))) = ends.map(|(start, end)| (hex(start), hex(end))) {
            inside = start <= at && at < end;
        }
        if inside && line.starts_with("VmFlags:") {
            return line.contains(" nh");
        }
    }
    panic!("nothing is mapped at {range}");
}
