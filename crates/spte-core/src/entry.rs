// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! One entry in memory, and the few ways in which it is written.
//!
//! Everything the engine does to a table is one of these:
//!
//! - [`Cell::replace`]: one compare-exchange, for changes that take something away or record a fact;
//! - [`Cell::claim`], then [`Claim::publish`] or [`Claim::give_back`]: for changes that add something, which have to be
//!   checked after the claim and before the publishing;
//! - [`Cell::kill`]: a compare-exchange to DEAD, for entries of a table that is being unlinked.
//!
//! # Claims
//! An entry that is not present is claimed by the value CLAIMED. A present one is claimed by a software bit where the
//! format has one: hardware and walkers go on with the old translation until the claim is decided, so a claim is never
//! seen by a guest. Where the format has none, it becomes CLAIMED too, which a guest sees as a transient fault. Either way
//! the claim's owner decides without allocating, calling, locking or faulting, so that whoever waits for it waits for
//! moments. (Formats that break before they make, or flush before they refill, are the exception: there the claim is held across
//! a flush, and the walkers that the flush waits for never wait for claims.)
//!
//! # Mirrors
//! Where hardware walks another page than the one the engine keeps (because a guest can write it), the kept entry is
//! the truth. Every change then claims the kept entry, writes the mirror, and publishes the kept entry last; of
//! what stands in the mirror only facts are ever taken over.

use notifier_core::primitive::{AtomicU64, Ordering, Twin, broken};

use crate::format::{Format, Kind, Level};

/// One entry of a table page, in memory order.
#[derive(Debug)]
#[repr(transparent)]
pub struct Entry(AtomicU64);

impl Entry {
    /// An entry with this value, in memory order.
    pub fn new(memory: u64) -> Self {
        Self(AtomicU64::new(memory))
    }

    /// What hardware would read.
    pub fn load(&self) -> u64 {
        // Acquire: whoever sees a link sees the table behind it filled; whoever sees a removal sees that its flush is owed.
        self.0.load(Ordering::Acquire)
    }

    /// Overwrites the entry: for page sources that fill pages, and for tests that play hardware or a hostile guest. Not
    /// for entries that an engine is using.
    pub fn store(&self, memory: u64) {
        self.0.store(memory, Ordering::Release);
    }

    /// One compare-exchange, as hardware makes it when it records facts.
    ///
    /// # Errors
    /// The value found, where it is not `old`.
    pub fn compare_exchange(&self, old: u64, new: u64) -> Result<u64, u64> {
        self.0.compare_exchange(old, new, Ordering::AcqRel, Ordering::Acquire)
    }

    /// Sets bits.
    fn set(&self, bits: u64) {
        self.0.fetch_or(bits, Ordering::AcqRel);
    }

    fn swap(&self, new: u64) -> u64 {
        self.0.swap(new, Ordering::AcqRel)
    }
}

/// What a cell holds, claims included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum View {
    Absent,
    Special,
    /// Somebody is deciding: wait.
    Claimed,
    /// Start again from the root.
    Dead,
    Table(notifier_core::OutputAddr),
    Leaf,
}

/// An entry in its place: the kept one, its mirror, and what it spans.
#[derive(Debug)]
pub(crate) struct Cell<'p> {
    pub(crate) own: &'p Entry,
    pub(crate) mirror: Option<&'p Entry>,
    pub(crate) level: Level,
    /// First guest address it spans.
    pub(crate) start: u64,
    /// Bytes it spans.
    pub(crate) span: u64,
}

impl Clone for Cell<'_> {
    fn clone(&self) -> Self {
        *self
    }
}

impl Copy for Cell<'_> {}

/// `raw` as what it is; a present entry with the claim bit is claimed.
pub(crate) fn view<F: Format>(format: &F, level: Level, raw: u64) -> View {
    let claimed = raw & format.claim_bit() != 0;
    match format.kind(level, raw) {
        Kind::Absent => View::Absent,
        Kind::Special => View::Special,
        Kind::Claimed => View::Claimed,
        Kind::Dead => View::Dead,
        Kind::Table(_) | Kind::Leaf if claimed => View::Claimed,
        Kind::Table(child) => View::Table(child),
        Kind::Leaf => View::Leaf,
    }
}

impl<'p> Cell<'p> {
    /// One past the last guest address it spans; saturates at the top of the address space.
    pub(crate) fn end(&self) -> u64 {
        self.start.saturating_add(self.span)
    }

    /// The value, with the facts that hardware wrote into the mirror.
    pub(crate) fn load<F: Format>(&self, format: &F) -> u64 {
        let raw = format.raw_of(self.own.load());
        match self.mirror {
            Some(mirror) if format.kind(self.level, raw) == Kind::Leaf => {
                raw | (format.raw_of(mirror.load()) & format.hardware_bits(self.level, raw))
            }
            _ => raw,
        }
    }

    /// The bits that may differ between `old` and the same entry as it is kept: the facts of a leaf. In anything else these
    /// bits say something (of a link, perhaps where its table is), and another value is another entry.
    fn facts_in<F: Format>(&self, format: &F, old: u64) -> u64 {
        if format.kind(self.level, old) == Kind::Leaf { format.hardware_bits(self.level, old) } else { 0 }
    }

    /// Facts that hardware left late in the mirror of `raw`, which is no leaf (any more) and not claimed.
    pub(crate) fn late_in_mirror<F: Format>(&self, format: &F, raw: u64) -> u64 {
        match (self.mirror, view(format, self.level, raw)) {
            (Some(mirror), View::Absent | View::Dead | View::Table(_)) if format.late_facts() => {
                self.late_over(format, raw, format.raw_of(mirror.load()))
            }
            _ => 0,
        }
    }

    /// The facts in `seen`, from the mirror, that `raw` can have beside what it says: none that make another entry of it.
    fn late_over<F: Format>(&self, format: &F, raw: u64, seen: u64) -> u64 {
        let late = seen & format.hardware_bits(self.level, raw) & !raw;
        if format.kind(self.level, raw | late) == format.kind(self.level, raw) { late } else { 0 }
    }

    /// Turns `old` into `new` in one step, if it is still `old`. For changes that need no check.
    ///
    /// # Errors
    /// The value found instead; nothing was written.
    pub(crate) fn replace<F: Format>(&self, format: &F, old: u64, new: u64) -> Result<(), u64> {
        let Some(mirror) = self.mirror else {
            let exchanged = self.own.compare_exchange(format.memory_of(old), format.memory_of(new));
            return exchanged.map(drop).map_err(|found| format.raw_of(found));
        };
        // `old` may have facts that only the mirror has: the kept entry is compared without regard to them.
        let kept = format.raw_of(self.own.load());
        let facts = format.hardware_bits(self.level, old);
        if (kept ^ old) & !self.facts_in(format, old) != 0 {
            return Err(self.load(format));
        }
        let Some(claim) = self.claim(format, kept) else { return Err(self.load(format)) };
        // One exchange, whatever a guest writes there meanwhile. A fact that hardware wrote since `old` was read must not
        // be lost: then the caller looks again, and as there are few facts, it does so few times.
        let seen = format.raw_of(mirror.swap(format.memory_of(new)));
        if format.kind(self.level, old) == Kind::Leaf && seen & facts & !old != 0 {
            // For that moment hardware had the new entry: what it wrote into it belongs to this page as well.
            let more = format.raw_of(mirror.swap(format.memory_of(old | (seen & facts))));
            mirror.set(format.memory_of(more & facts));
            claim.give_back(format);
            return Err(self.load(format));
        }
        self.own.store(format.memory_of(new));
        Ok(())
    }

    /// Claims the entry, if it is still `old`. What follows, up to publishing or giving back, allocates nothing, calls
    /// nobody, takes no lock and faults nowhere.
    #[must_use]
    pub(crate) fn claim<F: Format>(&self, format: &F, old: u64) -> Option<Claim<'p>> {
        let present = matches!(format.kind(self.level, old), Kind::Table(_) | Kind::Leaf);
        let soft = present && format.claim_bit() != 0;
        // With a mirror, `old` may have facts that the kept entry does not have.
        let kept = match self.mirror {
            Some(_) => format.raw_of(self.own.load()),
            None => old,
        };
        if (kept ^ old) & !self.facts_in(format, old) != 0 {
            return None;
        }
        let claimed = if soft { kept | format.claim_bit() } else { format.not_present(self.level).claimed };
        let exchanged = self.own.compare_exchange(format.memory_of(kept), format.memory_of(claimed));
        // And the kept entry facts that `old` does not have.
        let old = old | (kept & self.facts_in(format, old));
        exchanged.ok().map(|_| Claim { cell: *self, old })
    }

    /// Claims the entry and takes it away from hardware at once.
    #[must_use]
    pub(crate) fn claim_broken<F: Format>(&self, format: &F, old: u64) -> Option<Claim<'p>> {
        let exchanged =
            self.own.compare_exchange(format.memory_of(old), format.memory_of(format.not_present(self.level).claimed));
        exchanged.ok()?;
        if let Some(mirror) = self.mirror {
            let seen = format.raw_of(mirror.swap(format.memory_of(format.not_present(self.level).absent)));
            if format.late_facts() {
                // The claimed entry keeps them for who publishes in its place.
                self.own.set(format.memory_of(self.late_over(format, old, seen)));
            }
        }
        Some(Claim { cell: *self, old })
    }

    /// Makes the entry DEAD, if it is still `old` (which is not claimed). Returns what it was, with all its facts.
    ///
    /// # Errors
    /// The value found instead; nothing was written.
    pub(crate) fn kill<F: Format>(&self, format: &F, old: u64) -> Result<u64, u64> {
        let has_facts = match format.kind(self.level, old) {
            Kind::Leaf => true,
            Kind::Absent => format.late_facts(),
            _ => false,
        };
        // With a mirror, `old` may have facts that the kept entry does not have.
        let kept = format.raw_of(self.own.load());
        if (kept ^ old) & !self.facts_in(format, old) != 0 {
            return Err(kept);
        }
        let exchanged =
            self.own.compare_exchange(format.memory_of(kept), format.memory_of(format.not_present(self.level).dead));
        let mut was = exchanged.map(|_| kept).map_err(|found| format.raw_of(found))?;
        // Once the kept entry is DEAD nobody else writes the mirror, but for hardware and the guest.
        if let Some(mirror) = self.mirror {
            let seen = format.raw_of(mirror.swap(format.memory_of(format.not_present(self.level).absent)));
            if has_facts {
                was |= seen & format.hardware_bits(self.level, old);
            }
        }
        Ok(was)
    }

    /// Makes a DEAD entry absent again: the table it lies in stays linked after all.
    pub(crate) fn revive<F: Format>(&self, format: &F) {
        let mut found = self.own.load();
        let late = format.hardware_bits(self.level, format.not_present(self.level).dead);
        loop {
            // Facts that hardware writes late stay.
            let facts = format.raw_of(found) & late;
            match self.own.compare_exchange(found, format.memory_of(format.not_present(self.level).absent | facts)) {
                Ok(_) => return,
                Err(other) => found = other,
            }
        }
    }
}

/// A claimed entry.
#[derive(Debug)]
#[must_use = "a claim is published or given back"]
pub(crate) struct Claim<'p> {
    pub(crate) cell: Cell<'p>,
    /// What was claimed.
    pub(crate) old: u64,
}

impl Claim<'_> {
    /// Puts `new` in place of what was claimed. Facts that hardware added meanwhile are added to `new` where both are
    /// leaves. Returns the old value with all its facts.
    pub(crate) fn publish<F: Format>(self, format: &F, new: u64) -> u64 {
        let Cell { own, mirror, level, .. } = self.cell;
        let was_leaf = format.kind(level, self.old) == Kind::Leaf;
        let is_leaf = format.kind(level, new) == Kind::Leaf;
        let written = format.hardware_bits(level, self.old);
        let mut found = format.raw_of(own.load());
        loop {
            // Only facts can have changed under a claim.
            let old = self.old | (found & written);
            let mut full = match (was_leaf && is_leaf, format.kind(level, new)) {
                (true, _) => format.merge_facts(level, new, level, old),
                // Given back as absent: facts that come late stay until they are collected.
                (false, Kind::Absent) if new == self.old => old,
                _ => new,
            };
            let mut full_old = old;
            if let Some(mirror) = mirror {
                // The mirror is what hardware reads: it comes first, and the kept entry, for which windows wait, last. One
                // exchange, whatever a guest writes there meanwhile.
                let facts = format.raw_of(mirror.swap(format.memory_of(full))) & written;
                if was_leaf {
                    full_old = old | facts;
                    if is_leaf {
                        full = format.merge_facts(level, new, level, full_old);
                        mirror.set(format.memory_of(full & format.hardware_bits(level, full)));
                    }
                } else if format.late_facts() && matches!(format.kind(level, self.old), Kind::Absent | Kind::Table(_)) {
                    let late = self.cell.late_over(format, self.old, facts);
                    full_old |= late;
                    if new == self.old {
                        // Given back: they stay until they are collected.
                        mirror.set(format.memory_of(late));
                    }
                }
            }
            match own.compare_exchange(format.memory_of(found), format.memory_of(full)) {
                Ok(_) => return full_old,
                Err(other) => found = format.raw_of(other),
            }
        }
    }

    /// Puts the leaf `new` where hardware and walkers use it, in place of the link that was claimed, and keeps the claim.
    /// Only for formats with a claim bit. Returns the link, with the facts that hardware had left in it late.
    pub(crate) fn show<F: Format>(&mut self, format: &F, new: u64) -> u64 {
        let Cell { own, mirror, .. } = self.cell;
        let claim = if broken(Twin::CollapseFreesEarly) { 0 } else { format.claim_bit() };
        let mut seen = format.raw_of(own.swap(format.memory_of(new | claim)));
        if let Some(mirror) = mirror {
            seen |= format.raw_of(mirror.swap(format.memory_of(new)));
        }
        let link = core::mem::replace(&mut self.old, new);
        if format.late_facts() { link | self.cell.late_over(format, link, seen) } else { link }
    }

    /// Takes a claimed leaf or link away from hardware, keeping the claim: the break of break-before-make. Returns the
    /// old value with its facts.
    pub(crate) fn take_away<F: Format>(&mut self, format: &F) -> u64 {
        let Cell { own, mirror, level, .. } = self.cell;
        let written = format.hardware_bits(level, self.old);
        let mut facts = format.raw_of(own.swap(format.memory_of(format.not_present(level).claimed))) & written;
        if let Some(mirror) = mirror {
            facts |= format.raw_of(mirror.swap(format.memory_of(format.not_present(level).absent))) & written;
        }
        if format.kind(self.cell.level, self.old) == Kind::Leaf {
            self.old |= facts;
        }
        self.old
    }

    /// Takes the facts that hardware left late in the mirror of an absent entry or a link.
    pub(crate) fn take_late<F: Format>(&self, format: &F) -> u64 {
        let Some(mirror) = self.cell.mirror else { return 0 };
        self.cell.late_over(format, self.old, format.raw_of(mirror.swap(format.memory_of(self.old))))
    }

    /// As if nothing had been claimed.
    pub(crate) fn give_back<F: Format>(self, format: &F) {
        let old = self.old;
        // For a leaf the facts that came meanwhile are added.
        let _ = self.publish(format, old);
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use notifier_core::{Access, OutputAddr};

    use super::*;
    use crate::format::{
        EntryError, FormatError, Geometry, LeafSpec, LevelShape, NotPresent, Touch, Transition, WriteProtect,
    };

    const PRESENT: u64 = 1;
    const LEAF: u64 = 2;
    /// Of leaves. In links it is an address bit: their tables have 256 bytes.
    const FACT: u64 = 0x100;
    /// Another one, of leaves alone.
    const ACCESSED: u64 = 4;

    std::thread_local! {
        /// What others do while a format is asked for a kind, until it is done.
        static MEANWHILE: RefCell<Option<Box<dyn Fn() -> bool>>> = const { RefCell::new(None) };
    }

    fn meanwhile() {
        MEANWHILE.with_borrow_mut(|hook| {
            if hook.as_ref().is_some_and(|act| act()) {
                *hook = None;
            }
        });
    }

    /// As much of a format as a cell asks for.
    struct SmallTables(Geometry);

    impl Format for SmallTables {
        type Attrs = ();
        fn name(&self) -> &'static str {
            "small-tables"
        }
        fn geometry(&self) -> &Geometry {
            &self.0
        }
        fn not_present(&self, _: Level) -> NotPresent {
            NotPresent { absent: 0, claimed: 1 << 60, dead: 1 << 61 }
        }
        fn claim_bit(&self) -> u64 {
            0
        }
        fn hardware_bits(&self, _: Level, raw: u64) -> u64 {
            if raw & (PRESENT | LEAF) == PRESENT { 0 } else { FACT | ACCESSED }
        }
        fn kind(&self, level: Level, raw: u64) -> Kind {
            meanwhile();
            match (raw & PRESENT != 0, raw & LEAF != 0) {
                (true, true) => Kind::Leaf,
                (true, false) => Kind::Table(OutputAddr::new(raw & !0xff)),
                (false, _) => self.not_present(level).kind(raw, FACT | ACCESSED).unwrap_or(Kind::Special),
            }
        }
        fn table(&self, _: Level, _: OutputAddr) -> Result<u64, FormatError> {
            unreachable!()
        }
        fn leaf(&self, _: Level, _: &LeafSpec<()>) -> Result<u64, FormatError> {
            unreachable!()
        }
        fn spec(&self, _: Level, _: u64) -> LeafSpec<()> {
            unreachable!()
        }
        fn set_spte(&self, _: Level, _: u64, _: OutputAddr) -> Result<u64, FormatError> {
            unreachable!()
        }
        fn with_access(&self, _: Level, _: u64, _: Access) -> Result<u64, FormatError> {
            unreachable!()
        }
        fn write_protect(&self, _: Level, _: u64, _: WriteProtect) -> u64 {
            unreachable!()
        }
        fn upgrade(&self, _: Level, _: u64) -> Option<u64> {
            unreachable!()
        }
        fn is_young(&self, _: Level, _: u64) -> bool {
            unreachable!()
        }
        fn make_old(&self, _: Level, _: u64) -> u64 {
            unreachable!()
        }
        fn make_young(&self, _: Level, _: u64) -> u64 {
            unreachable!()
        }
        fn is_dirty(&self, _: Level, _: u64) -> bool {
            unreachable!()
        }
        fn make_clean(&self, _: Level, _: u64) -> u64 {
            unreachable!()
        }
        fn touch(&self, _: Level, _: u64, _: Access) -> Touch {
            unreachable!()
        }
        fn split(&self, _: Level, _: u64, _: usize) -> u64 {
            unreachable!()
        }
        fn collapse(&self, _: Level, _: u64) -> Option<u64> {
            unreachable!()
        }
        fn merge_facts(&self, _: Level, into: u64, _: Level, from: u64) -> u64 {
            into | (from & (FACT | ACCESSED))
        }
        fn transition(&self, _: Level, _: u64, _: u64) -> Transition {
            unreachable!()
        }
        fn check(&self, _: Level, _: u64) -> Result<(), EntryError> {
            unreachable!()
        }
    }

    fn small_tables() -> SmallTables {
        let shape = [LevelShape { shift: 16, bits: 5, leaf: true }, LevelShape { shift: 21, bits: 9, leaf: true }];
        SmallTables(Geometry::new(&shape).unwrap())
    }

    /// One processor uses the leaf just before it is exchanged, so that the exchange is taken back; another wrote through what was
    /// there for that moment.
    #[test]
    fn a_fact_that_comes_while_an_exchange_is_taken_back_stays() {
        let format = small_tables();
        let old = 0x7000 | LEAF | PRESENT;
        let (own, mirror): (&Entry, &Entry) =
            (Box::leak(Box::new(Entry::new(old))), Box::leak(Box::new(Entry::new(old))));
        let cell = Cell { own, mirror: Some(mirror), level: Level::LEAF, start: 0, span: 0x1_0000 };
        mirror.set(ACCESSED);
        let new = 0x9000 | LEAF | PRESENT;
        MEANWHILE.set(Some(Box::new(move || {
            let there = mirror.load() == new;
            if there {
                mirror.set(FACT);
            }
            there
        })));
        let found = cell.replace(&format, old, new).unwrap_err();
        assert!(MEANWHILE.take().is_none(), "the new entry was there for a moment");
        assert_eq!(found, old | ACCESSED | FACT);
        assert_eq!(mirror.load(), old | ACCESSED | FACT);
    }

    /// The kept entry is the truth, whatever a guest does to the mirror.
    #[test]
    fn a_claim_has_the_facts_that_the_kept_entry_alone_has() {
        let format = small_tables();
        let old = 0x7000 | LEAF | PRESENT;
        let (own, mirror) = (Entry::new(old | FACT), Entry::new(old));
        let cell = Cell { own: &own, mirror: Some(&mirror), level: Level::LEAF, start: 0, span: 0x1_0000 };
        let claim = cell.claim(&format, old).unwrap();
        assert_eq!(claim.publish(&format, 0), old | FACT);
    }

    #[test]
    fn links_that_differ_in_what_is_a_fact_of_leaves_are_two_links() {
        let format = small_tables();
        let level = Level::new(2).unwrap();
        let (seen, there) = (0x7000 | PRESENT, 0x7100 | PRESENT);
        let (own, other) = (Entry::new(there), Entry::new(there));
        for mirror in [None, Some(&other)] {
            let cell = Cell { own: &own, mirror, level, start: 0, span: 1 << 21 };
            assert!(cell.claim(&format, seen).is_none());
            assert_eq!(cell.kill(&format, seen), Err(there));
            assert_eq!(cell.replace(&format, seen, 0), Err(there));
            assert_eq!((own.load(), other.load()), (there, there));
        }
        // Between leaves it is a fact, and one that came meanwhile stops nobody who has a mirror.
        let (seen, kept) = (0x7000 | LEAF | PRESENT | FACT, 0x7000 | LEAF | PRESENT);
        let (own, other) = (Entry::new(kept), Entry::new(seen));
        let cell = Cell { own: &own, mirror: Some(&other), level, start: 0, span: 1 << 21 };
        assert_eq!(cell.kill(&format, seen), Ok(seen));
    }
}
