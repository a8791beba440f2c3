// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every machine is asked: one trait, whatever the emulator and its stub are like.
//!
//! A machine has memory that this program maps too ([`Ground`]), one processor whose MMU walks the tables there, and a stub at
//! the hypervisor's privilege that is asked through a [`Mailbox`](crate::mailbox::Mailbox). A guest's access is a few
//! instructions of a page of code that the table under test has to map like any other: [`Ground::fixed`].
//!
//! # What is in memory
//! [`Ground::data`] is filled once: each 4 KiB of it begin with 16 bytes of code that come back to the stub with the number of
//! these 4 KiB, and every other word has its own output address. So what a load or a fetch returns says where it went. A store
//! writes a value that was never there, and the word is looked up where it should be.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Format, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_model::{Access, TouchKind};

use crate::emulator::Lost;
use crate::memory::Memory;

/// A page that a guest needs to run at all. Tables under test map it before anything else, and operations keep away from
/// the entry above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fixed {
    /// Where the guest has it; a multiple of the granule.
    pub gpa: u64,
    /// Where it is; a multiple of the granule.
    pub output: u64,
    /// What the guest may do there. Hardware may write no facts there but those that this access leaves.
    pub access: Access,
}

/// Where things are in a machine's memory.
#[derive(Debug, Clone)]
pub struct Ground {
    /// The memory.
    pub memory: Arc<Memory>,
    /// Output addresses for table pages.
    pub tables: Range<u64>,
    /// Output addresses of what the guest accesses; the start is a multiple of 2 MiB at least, the size a multiple of 4 KiB
    /// and at most 2^16 of them.
    pub data: Range<u64>,
    /// Pages that a guest needs.
    pub fixed: Vec<Fixed>,
    /// Output address of the word that tells a guest in a loop to come out, in a fixed page.
    pub kick: u64,
}

/// One access of a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestAccess {
    /// Where: a multiple of 8. A fetch is of the code that begins there.
    pub at: u64,
    /// What.
    pub kind: TouchKind,
    /// What is stored.
    pub value: u64,
}

/// What a fault was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Class {
    /// Nothing is there.
    Absent,
    /// What is there does not grant the access.
    Denied,
    /// The leaf is old, and hardware leaves it to software to make it young.
    Old,
    /// An entry breaks a rule.
    Misconfigured,
    /// Anything else.
    Other,
}

/// A fault, as the machine reported it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What for.
    pub class: Class,
    /// The guest physical address that was reported, as far as the machine reports one.
    pub at: Option<u64>,
    /// How many low bits of the address are not reported, and 0 in [`Fault::at`].
    pub blind: u32,
    /// The level of the entry that faulted, where the machine says that.
    pub level: Option<Level>,
    /// Which access it says it was, where it says so.
    pub kind: Option<TouchKind>,
    /// The registers that said so, by name, for people.
    pub syndrome: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.class)?;
        if let Some(at) = self.at {
            write!(f, " at {at:#x}")?;
        }
        if let Some(level) = self.level {
            write!(f, " at level {}", level.get())?;
        }
        write!(f, " ({})", self.syndrome)
    }
}

/// Why a guest came back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Exit {
    /// It is done. What it loaded; or the number that the fetched code has; or anything, after a store.
    Done {
        /// See above.
        value: u64,
    },
    /// It saw [`Ground::kick`] in its loop.
    Kicked,
    /// It faulted.
    Fault(Fault),
}

/// What a guest does in a loop until it is kicked or faults: it goes over `pages` pages from `first` on, `stride` bytes apart, again
/// and again. Of each it loads the word at offset [`Work::OFFSET`], which must be that word's own guest address, and
/// counts a mismatch if not; in the last `written` of them it then stores the number of passes to the word after it. After each
/// page it looks at the kick word; after each pass it stores the counts to [`Work::counts`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// The first page.
    pub first: u64,
    /// How many.
    pub pages: u64,
    /// How far apart.
    pub stride: u64,
    /// How many of the last are written too.
    pub written: u64,
    /// Guest address of two words at the start of a fixed page that may be written: passes, and mismatches.
    pub counts: u64,
    /// Flushes are to reach the guest without a kick, where the machine can broadcast them ([`Machine::broadcasts`]).
    pub broadcast: bool,
}

impl Work {
    /// Where in a page the word is.
    pub const OFFSET: u64 = 0x20;
}

/// Where a machine is known to do otherwise than the format's rules say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leniency {
    /// The rule that it does not go by, as [`EntryError`] names it, or a part of it. Empty: no rule forbids the entry, and the machine
    /// makes something else of it.
    pub rule: &'static str,
    /// It shows where one of these bits was turned.
    pub bits: u64,
    /// It shows in a fault of this class alone, for an access of one of these kinds; `None`: in whatever comes of it.
    pub only: Option<(&'static [TouchKind], Class)>,
    /// What the machine does, and where the manual has the rule.
    pub why: &'static str,
}

impl Leniency {
    /// One that shows in whatever comes of an entry that breaks `rule`.
    pub const fn of(rule: &'static str, why: &'static str) -> Self {
        Self { rule, bits: u64::MAX, only: None, why }
    }

    /// Whether it is about an entry in which `turned` was turned, and which breaks `rule`.
    pub fn concerns(&self, rule: &str, turned: u64) -> bool {
        let named = if self.rule.is_empty() { rule.is_empty() } else { rule.contains(self.rule) };
        named && (self.bits == u64::MAX || self.bits & turned != 0)
    }

    /// Whether it is about what came of such an access.
    pub fn explains(&self, rule: &str, turned: u64, kind: TouchKind, exit: &Exit) -> bool {
        let shows = self.only.is_none_or(|(kinds, class)| {
            kinds.contains(&kind) && matches!(exit, Exit::Fault(fault) if fault.class == class)
        });
        self.concerns(rule, turned) && shows
    }
}

/// A machine whose MMU walks tables of a format.
pub trait Machine: Sized + Send + 'static {
    /// The format.
    type Format: Format + Clone;

    /// What it is called on the command line and in reports, such as `arm64-s2-4k`.
    fn name(&self) -> &str;

    /// The format, and what the model has to know of it: no more address bits than the machine has.
    fn driven(&self) -> Driven<Self::Format>;

    /// Its memory.
    fn ground(&self) -> &Ground;

    /// The code that comes back from a guest with `number` as [`Exit::Done`]'s value: what the 4 KiB of data with this number
    /// begin with. It must not load or store.
    fn code(&self, number: u16) -> [u8; 16];

    /// The format's rules about what hardware may find, without those about bits that are software's.
    ///
    /// # Errors
    /// The rule that is broken.
    fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError>;

    /// What an entry is to hardware, as the format's crate says.
    fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind;

    /// Whether a flush that is missing shows: what is cached stays so across exits.
    fn caches(&self) -> bool;

    /// Whether an access that a leaf of this level denies marks it as accessed all the same, where a manual allows that. It is made
    /// old again then.
    fn marks_denied(&self, level: Level) -> bool {
        let _ = level;
        false
    }

    /// Whether a fault says that a leaf is old. `false` where hardware has one bit for "nothing is there" and "not now": an old leaf
    /// is then reported as [`Class::Absent`].
    fn tells_old(&self) -> bool {
        true
    }

    /// Whether a page is broken before it is repointed to equal contents, by what the architecture asks for.
    fn breaks(&self) -> bool {
        false
    }

    /// Whether hardware sets accessed and dirty by one access that nothing comes between. Where an emulator does not, it can lose
    /// what somebody else stores into an entry at that moment: a fact that is lost once is looked for again.
    fn sets_facts_at_once(&self) -> bool {
        true
    }

    /// Whether it is cached that nothing is there.
    fn keeps_absent(&self) -> bool {
        false
    }

    /// Where this machine takes what a rule forbids, or refuses what none does.
    fn leniencies(&self) -> &'static [Leniency] {
        &[]
    }

    /// From now on the table at `root` is walked, and nothing is cached of any other.
    ///
    /// # Errors
    /// [`Lost`].
    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost>;

    /// Lets a guest make one access. Nothing is flushed.
    ///
    /// # Errors
    /// [`Lost`].
    fn access(&mut self, access: GuestAccess) -> Result<Exit, Lost>;

    /// Carries a flush out exactly as the format's crate describes it, and no more.
    ///
    /// # Errors
    /// [`Lost`].
    fn flush(&mut self, request: &FlushRequest<'_>) -> Result<(), Lost>;

    /// What a fault handler does on its own processor before a guest goes back to an entry at `at` that allows the access
    /// already: a leaf of which rights were raised may be cached with fewer. `None` where that cannot be: nothing is cached
    /// across exits, so each fault is one.
    fn refresh(&mut self, at: u64, level: Level) -> Option<Result<(), Lost>>;

    /// What a fault handler does on its own processor when it has mapped what was absent at `at`: what the format's crate says,
    /// a barrier or nothing; or more, where that nothing was there is cached too.
    ///
    /// # Errors
    /// [`Lost`].
    fn installed(&mut self, at: u64) -> Result<(), Lost> {
        let _ = at;
        Ok(())
    }

    /// Sets a guest to `work`, and does not wait.
    ///
    /// # Errors
    /// [`Lost`].
    fn run(&mut self, work: Work) -> Result<(), Lost>;

    /// Why the guest that was set to work came back, if it has.
    ///
    /// # Errors
    /// [`Lost`].
    fn poll(&mut self) -> Result<Option<Exit>, Lost>;

    /// Lets it go on where it was: after a kick, or with the access that faulted.
    ///
    /// # Errors
    /// [`Lost`].
    fn resume(&mut self) -> Result<(), Lost>;

    /// Whether flushes reach the guest that was set to work without a kick: a second processor broadcasts them. `false` here:
    /// the guest is kicked, flushes are carried out, and the guest goes on.
    fn broadcasts(&self) -> bool {
        false
    }
}

impl Ground {
    /// A guest address for so many bytes near the fixed pages, in front of them where there is room: wherever those are, a guest
    /// reaches it.
    pub fn beside_fixed(&self, bytes: u64) -> u64 {
        let size = bytes.next_power_of_two();
        let fixed = self.fixed.iter().map(|page| page.gpa).min().unwrap_or(0);
        if fixed >= 2 * size { (fixed - size) & !(size - 1) } else { fixed + size }
    }

    /// The fixed page that a guest may write, where there is one: for the counts of [`Work`].
    pub fn scratch(&self) -> Option<Fixed> {
        self.fixed.iter().copied().find(|page| page.access.contains(Access::W))
    }

    /// Looks for a value at this offset of each 4 KiB of data, and puts right what has it: where that was.
    pub fn find(&self, offset: u64, value: u64) -> Option<u64> {
        let mut words = self.data.clone().step_by(0x1000).map(|page| page + offset);
        let found = words.find(|word| self.memory.load(*word) == value)?;
        self.memory.store(found, found);
        Some(found)
    }

    /// Fills [`Ground::data`], as [`machine`](self) says.
    pub fn fill(&self, code: impl Fn(u16) -> [u8; 16]) {
        for page in self.data.clone().step_by(0x1000) {
            self.memory.write(page, &code(((page - self.data.start) >> 12) as u16));
            for word in (page + 16..page + 0x1000).step_by(8) {
                self.memory.store(word, word);
            }
        }
    }
}
