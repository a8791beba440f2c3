// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the engine must know of a page-table format, and nothing more.
//!
//! A [`Format`] is a set of pure functions on raw entries: it builds them, reads them, and says how one may be turned
//! into another. It holds no table, takes no lock and loops over no entries; the engine does all of that and knows
//! no bit of any format. The contract between the two is this page:
//!
//! - **Raw entries are numbers**, as the architecture's manual draws them. Memory order is [`Format::memory_of`] and
//!   [`Format::raw_of`].
//! - **Levels** count up from [`Level::LEAF`], the level of the smallest pages. The architecture's own number is
//!   [`Format::level_number`].
//! - **Three values are not present and hold no data**: those of [`Format::not_present`]. No sequence of writes to
//!   [`Format::hardware_bits`] turns one of the three into another or into anything present; [`Format::kind`] reads them
//!   under that mask. None of the three has one of these bits set.
//! - **Special** entries are not present (hardware follows none that [`Format::check`] passes) but hold data (MMIO markers, owner annotations). The engine leaves them alone
//!   but for removing them when their range is unmapped.
//! - **A present entry can be claimed without being taken away** when the format has a software bit to spare
//!   ([`Format::claim_bit`]): hardware goes on with the old translation while the claim is held. Where there is none,
//!   a claim makes the entry transiently absent.
//! - **Rights** have three degrees for writing: granted, *armed* (withheld, but one compare-exchange may bring it back:
//!   dirty logging), and denied (the host must be asked).

use core::fmt;

use notifier_core::{Access, OutputAddr};

/// The most levels any format has.
pub const MAX_LEVELS: usize = 6;

/// A level of a table, counted up from the smallest pages.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// The level of the smallest pages.
    pub const LEAF: Level = Level(1);

    /// The `n`-th level from below; the level of the smallest pages is 1. `None` for 0 and above [`MAX_LEVELS`].
    pub const fn new(n: u8) -> Option<Self> {
        if n == 0 || n as usize > MAX_LEVELS { None } else { Some(Self(n)) }
    }

    /// Its number, from 1.
    #[inline]
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The next smaller level, or `None` at the bottom.
    #[inline]
    pub const fn below(self) -> Option<Self> {
        if self.0 > 1 { Some(Self(self.0 - 1)) } else { None }
    }

    /// The next larger level, or `None` at [`MAX_LEVELS`].
    #[inline]
    pub const fn above(self) -> Option<Self> {
        Self::new(self.0 + 1)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "L{}", self.0)
    }
}

/// One level's shape.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LevelShape {
    /// An entry spans `1 << shift` bytes.
    pub shift: u8,
    /// A table has `1 << bits` entries.
    pub bits: u8,
    /// Whether an entry of this level may be a leaf.
    pub leaf: bool,
}

/// The shape of a whole table: how an address is cut into indices. Every entry has eight bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    levels: [LevelShape; MAX_LEVELS],
    top: Level,
}

impl Geometry {
    /// A shape from the smallest level up. `None` where there are no levels or more than [`MAX_LEVELS`], a table would
    /// have no index bit or more than 24, a level does not begin where the one below it ends, the smallest level
    /// holds no leaves, or the whole would pass 63 bits.
    pub const fn new(from_leaf: &[LevelShape]) -> Option<Self> {
        if from_leaf.is_empty() || from_leaf.len() > MAX_LEVELS || !from_leaf[0].leaf {
            return None;
        }
        let mut levels = [LevelShape { shift: 0, bits: 0, leaf: false }; MAX_LEVELS];
        let mut i = 0;
        while i < from_leaf.len() {
            let shape = from_leaf[i];
            if shape.bits == 0 || shape.bits > 24 || shape.shift as u32 + shape.bits as u32 > 63 {
                return None;
            }
            if i > 0 && shape.shift != from_leaf[i - 1].shift + from_leaf[i - 1].bits {
                return None;
            }
            levels[i] = shape;
            i += 1;
        }
        Some(Self { levels, top: Level(from_leaf.len() as u8) })
    }

    /// The root's level.
    #[inline]
    pub const fn top(&self) -> Level {
        self.top
    }

    /// The shape of `level`. Levels above [`Geometry::top`] have no bits.
    #[inline]
    pub const fn level(&self, level: Level) -> LevelShape {
        self.levels[level.0 as usize - 1]
    }

    /// Bytes that one entry of `level` spans.
    #[inline]
    pub const fn span(&self, level: Level) -> u64 {
        1 << self.level(level).shift
    }

    /// Entries in a table of `level`.
    #[inline]
    pub const fn entries(&self, level: Level) -> usize {
        1 << self.level(level).bits
    }

    /// Bytes of a table of `level`, which is also its alignment.
    #[inline]
    pub const fn table_bytes(&self, level: Level) -> usize {
        self.entries(level) * 8
    }

    /// Its levels, from the smallest pages up to the root's.
    pub fn levels(&self) -> impl Iterator<Item = Level> + use<> {
        let top = self.top;
        core::iter::successors(Some(Level::LEAF), move |level| level.above().filter(|above| *above <= top))
    }

    /// Bits of an address that the table translates.
    #[inline]
    pub const fn address_bits(&self) -> u32 {
        let top = self.level(self.top);
        top.shift as u32 + top.bits as u32
    }

    /// Index of the entry for `addr` in a table of `level`.
    #[inline]
    pub const fn index(&self, level: Level, addr: u64) -> usize {
        let shape = self.level(level);
        ((addr >> shape.shift) & ((1 << shape.bits) - 1)) as usize
    }
}

/// What an entry is, as far as the engine cares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Nothing: not present, no data, may be claimed.
    Absent,
    /// Not present, but holds data of the format (MMIO marker, annotation).
    Special,
    /// Somebody is deciding what goes here: wait.
    Claimed,
    /// The table this entry lies in was unlinked: start again from the root.
    Dead,
    /// A link to the next lower table, at this output address.
    Table(OutputAddr),
    /// A translation.
    Leaf,
}

/// The three values of an entry that is not present and holds no data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotPresent {
    /// Nothing is here.
    pub absent: u64,
    /// Somebody is deciding what goes here.
    pub claimed: u64,
    /// The table that the entry lies in was unlinked.
    pub dead: u64,
}

impl NotPresent {
    /// Which of the three `raw` is, bits in `ignored` left out; `None` if it is none of them.
    pub const fn kind(&self, raw: u64, ignored: u64) -> Option<Kind> {
        let raw = raw & !ignored;
        if raw == self.absent {
            Some(Kind::Absent)
        } else if raw == self.claimed {
            Some(Kind::Claimed)
        } else if raw == self.dead {
            Some(Kind::Dead)
        } else {
            None
        }
    }
}

/// Everything the engine may want to say or know about a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LeafSpec<A> {
    /// Where the leaf points, aligned to its size.
    pub output: OutputAddr,
    /// Its rights. With `armed`, `WRITE` is among them but withheld.
    pub access: Access,
    /// Writing is withheld, and the leaf carries the format's upgrade bit: one compare-exchange brings it back.
    /// Meaningless without `WRITE` in `access`.
    pub armed: bool,
    /// The accessed fact.
    pub accessed: bool,
    /// The dirty fact. A format without a dirty bit takes a writable leaf for a dirty one.
    pub dirty: bool,
    /// What only the format understands: memory types and the like.
    pub attrs: A,
}

/// Why a format cannot express an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FormatError {
    /// The output address is not aligned to the leaf or table.
    #[error("{output} is not aligned to {align:#x} bytes")]
    Unaligned {
        /// The address.
        output: OutputAddr,
        /// What it has to be a multiple of.
        align: u64,
    },
    /// The output address has bits that the format (or this machine's physical address width) cannot hold.
    #[error("{output} needs more than {bits} physical address bits")]
    OutputTooWide {
        /// The address.
        output: OutputAddr,
        /// The bits there are.
        bits: u32,
    },
    /// The format cannot express this set of rights.
    #[error("the format has no entry with rights {access}")]
    Access {
        /// The rights.
        access: Access,
    },
    /// Entries of this level cannot be leaves.
    #[error("the format has no leaf at level {number}")]
    NoLeaf {
        /// The architecture's number of the level.
        number: i8,
    },
    /// The format cannot express these attributes (such as a memory type).
    #[error("the format cannot express attribute value {value:#x}: {rule}")]
    Attribute {
        /// The attribute's value.
        value: u64,
        /// The rule that forbids it.
        rule: &'static str,
    },
}

/// Why a raw entry is impossible: hardware would refuse it, or software wrote what it must not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("entry {raw:#018x} at level {number}: {rule} (bits {bits:#x})")]
pub struct EntryError {
    /// The entry.
    pub raw: u64,
    /// The architecture's number of the level it stands at.
    pub number: i8,
    /// The rule it breaks.
    pub rule: &'static str,
    /// The bits that break it.
    pub bits: u64,
}

/// How strongly a leaf is write-protected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WriteProtect {
    /// For dirty logging: writing is withheld and the upgrade bit stays (or is set, where the leaf was writable).
    Arm,
    /// For a `Retained` window: nothing but a fresh fault can make the leaf writable again, neither hardware (a
    /// dirty-bit modifier) nor the lockless upgrade.
    Retain,
}

/// How a live entry may become another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Transition {
    /// The old value must be taken away and flushed before the new one is written.
    pub break_first: bool,
    /// TLBs may hold what the new value no longer grants: a flush is owed.
    pub flush: bool,
}

impl Transition {
    /// One store, nothing owed.
    pub const FREE: Self = Self { break_first: false, flush: false };
    /// One store, then a flush.
    pub const FLUSH: Self = Self { break_first: false, flush: true };
    /// Break, flush, make.
    pub const BREAK: Self = Self { break_first: true, flush: true };
}

/// What came of an access that a walker made as hardware would.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    /// Allowed; the entry must become this value first (the same value when nothing is to be recorded).
    Allowed(u64),
    /// The entry does not grant the access.
    Denied,
    /// The accessed bit is clear and hardware does not set it: software must ([`Format::make_young`]).
    AccessFlag,
}

/// A page-table format: pure functions on raw entries. See the [module](self) for the contract.
///
/// Functions that take a leaf may be given any raw value for which [`Format::kind`] says [`Kind::Leaf`]; they must
/// keep [`Format::claim_bit`] and whatever software bits they do not mean to change, as they find them.
///
/// # A format is trusted
/// The engine follows what [`Format::kind`] calls a link. The memory safety of a [`Table`](crate::Table) rests on its format
/// calling so exactly what [`Format::table`] made (with claim and hardware bits set or not), always, and on
/// [`Format::raw_of`] undoing [`Format::memory_of`]. The trait is not `unsafe` so that format crates can forbid `unsafe`
/// code altogether; whoever uses a format that is not of this workspace reads it as if it were.
pub trait Format: Send + Sync + 'static {
    /// Attributes of a leaf beyond address and rights: memory type, shareability.
    type Attrs: Copy + Eq + fmt::Debug + Default + Send + Sync + 'static;

    /// A short name, such as `ept`.
    fn name(&self) -> &'static str;

    /// The shape of the table.
    fn geometry(&self) -> &Geometry;

    /// The architecture's number for `level`.
    fn level_number(&self, level: Level) -> i8 {
        level.get() as i8
    }

    /// The level that the architecture calls `number`, if the table has it.
    fn level_of(&self, number: i8) -> Option<Level> {
        self.geometry().levels().find(|level| self.level_number(*level) == number)
    }

    /// The values at `level` of entries that hold nothing. They differ from level to level where walkers follow every entry
    /// of a directory without asking whether it is one, so that even nothing has to lead somewhere.
    fn not_present(&self, level: Level) -> NotPresent;
    /// A software bit of *present* entries (links and leaves) that marks a claim; 0 where the format has none. It is part of no
    /// address and none of hardware's bits. The engine sets and clears it; what changes one entry ([`Format::with_access`]
    /// and its like) keeps it, and what makes new ones ([`Format::split`], [`Format::collapse`]) is never given it.
    fn claim_bit(&self) -> u64;
    /// The bits that hardware, or ageing, may write at any time into `raw` at `level`. Writing them does not change what they
    /// are. A bit that is a fact in a leaf and part of the address in a link is none of a link's. In a value that holds nothing
    /// they are where [late facts](Format::late_facts) may come; it stays what it is when they are set.
    fn hardware_bits(&self, level: Level, raw: u64) -> u64;

    /// What `raw` is at `level`. [`Format::claim_bit`] is ignored: a claimed leaf is a leaf.
    fn kind(&self, level: Level, raw: u64) -> Kind;

    /// A link at `level` to a table of the level below. (`level` is never [`Level::LEAF`].)
    ///
    /// # Errors
    /// [`FormatError::Unaligned`] or [`FormatError::OutputTooWide`] for the table's address.
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError>;

    /// A leaf at `level`.
    ///
    /// # Errors
    /// Any [`FormatError`], where the format cannot express `spec`.
    fn leaf(&self, level: Level, spec: &LeafSpec<Self::Attrs>) -> Result<u64, FormatError>;

    /// What the leaf `raw` says: the inverse of [`Format::leaf`].
    fn spec(&self, level: Level, raw: u64) -> LeafSpec<Self::Attrs>;

    /// What `change_pte` reaches (Linux: `kvm_set_spte_gfn`): the leaf `old`, pointing at `output` instead; read-only
    /// and not upgradable, attributes and execute rights kept, accessed kept, dirty clear (the engine reports it).
    ///
    /// # Errors
    /// [`FormatError::Unaligned`] or [`FormatError::OutputTooWide`] for `output`.
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError>;

    /// The leaf with exactly these rights; everything else, the facts included, as it was. An armed leaf that keeps
    /// `WRITE` stays armed. Rights that the format does not have are refused, not dropped: a device's table without `EXECUTE` is
    /// mapped with [`MapOptions::access`](crate::MapOptions::access).
    ///
    /// # Errors
    /// [`FormatError::Access`] where the format cannot express them.
    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError>;

    /// The leaf write-protected. To retain clears its dirty fact (the engine reports what is gone); to arm may leave it to the
    /// next harvest, where it is a bit of its own.
    fn write_protect(&self, level: Level, raw: u64, how: WriteProtect) -> u64;

    /// The leaf with writing granted, where it is armed; `None` where it is not.
    fn upgrade(&self, level: Level, raw: u64) -> Option<u64>;

    /// Whether the leaf was used since it was last aged.
    fn is_young(&self, level: Level, raw: u64) -> bool;
    /// The leaf made old.
    fn make_old(&self, level: Level, raw: u64) -> u64;
    /// The leaf made young again: what a fault handler does for a leaf that was aged by taking rights away.
    fn make_young(&self, level: Level, raw: u64) -> u64;

    /// Whether the leaf was written since it was last cleaned.
    fn is_dirty(&self, level: Level, raw: u64) -> bool;
    /// The leaf made clean, so that the next write shows: the dirty bit cleared, or writing armed.
    fn make_clean(&self, level: Level, raw: u64) -> u64;

    /// What an access with these rights finds and does, as hardware would do it.
    fn touch(&self, level: Level, raw: u64, access: Access) -> Touch;

    /// The `index`-th child, one level below, of the leaf `raw` at `level`: same translation, rights, attributes and
    /// facts. `level` is not [`Level::LEAF`], and the level below may hold leaves.
    fn split(&self, level: Level, raw: u64, index: usize) -> u64;

    /// The leaf at `level` that stands for a whole table of leaves whose first is `child`, one level below; `None` where
    /// the format has no such leaf. The facts are those of `child`; the engine adds the others'. Leaves are merged where each is, but
    /// for facts, bit by bit what [`Format::split`] makes of the result: where that is not exact nothing is ever merged.
    fn collapse(&self, level: Level, child: u64) -> Option<u64>;

    /// `into`, with the accessed and dirty facts of `from` added; both are leaves, of levels that may differ.
    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64;

    /// log2 of how many leaves of `level`, in a row in one table, may be marked as a set that hardware may hold as one
    /// (see [`sets`](crate::sets)); 0 where there are no sets. A set begins at a multiple of its own span, and is
    /// no larger than a table. A format with sets has no [late facts](Format::late_facts): those are collected page by page.
    fn set_shift(&self, level: Level) -> u8 {
        let _ = level;
        0
    }

    /// Whether the leaf is marked as a member of a set. Everything but [`Format::unmarked`], [`Format::split`] and
    /// [`Format::collapse`], which make leaves of their own, keeps the mark.
    fn in_set(&self, level: Level, raw: u64) -> bool {
        let _ = (level, raw);
        false
    }

    /// The `index`-th member, marked, of the set whose first leaf is `first` (marked or not), with its facts; `None` where
    /// no set can begin with it.
    fn set_member(&self, level: Level, first: u64, index: usize) -> Option<u64> {
        let _ = (level, first, index);
        None
    }

    /// The leaf as one of its own, in no set.
    fn unmarked(&self, level: Level, raw: u64) -> u64 {
        let _ = level;
        raw
    }

    /// How the live entry `old` may become `new`, when what both translate to may differ. Both are present: what is taken away
    /// altogether is always flushed, and what was absent is made without asking.
    ///
    /// From a leaf to a link this is a split: every address translates the same before and after. Hardware whose
    /// invalidations are tagged with the size of a leaf has to have it flushed all the same, or a later flush of a
    /// smaller leaf leaves the larger one in TLBs.
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition;

    /// How the live leaf `old` may become `new` when both are read-only and the two pages have equal contents.
    fn equal_contents_transition(&self, level: Level, old: u64, new: u64) -> Transition {
        self.transition(level, old, new)
    }

    /// Whether an entry that was taken away has to be flushed before anything else is made in its place: where a processor
    /// may not be shown two translations of one address, not even one after the other. Who fills an absent entry then
    /// flushes its span first, if anybody owes a flush.
    fn flushes_before_refill(&self) -> bool {
        false
    }

    /// Whether hardware may still write facts into an entry after it was replaced, until the flush: the engine then
    /// reads them again after it. In such a format every change that takes a leaf away, a split included, owes a flush.
    fn late_facts(&self) -> bool {
        false
    }

    /// Checks an entry as hardware would, and as this crate's own rules do: reserved bits, misconfigurations,
    /// impossible combinations of software bits.
    ///
    /// # Errors
    /// The rule that `raw` breaks.
    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError>;

    /// A raw entry as it lies in memory.
    #[inline]
    fn memory_of(&self, raw: u64) -> u64 {
        raw
    }
    /// A raw entry from how it lies in memory.
    #[inline]
    fn raw_of(&self, memory: u64) -> u64 {
        memory
    }
}
