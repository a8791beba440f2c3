// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A family of tiny formats: a few levels of a few entries, and every property a real format may have, by choice.
//!
//! | bits | |
//! |---|---|
//! | 0 | present |
//! | 1 | leaf (at the lowest level too) |
//! | 2, 3, 4 | read, write, execute |
//! | 5 | upgradable: with write clear, the leaf is armed |
//! | 6, 7 | accessed, dirty |
//! | 8 | claim, where the flavour has it |
//! | 9 to 56 | output address, shifted right by four: tables are as small as 16 bytes |
//! | 57, 58 | attribute |
//! | 59 | dirty fact of software, where there is no dirty bit |
//! | 60 | keeps absent entries from being zero |
//! | 61, 62, 63 | not present: DEAD, CLAIMED, special |

use std::cell::RefCell;

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, LevelShape, NotPresent, Touch, Transition,
    WriteProtect,
};

pub(crate) const PRESENT: u64 = 1;
pub(crate) const LEAF: u64 = 1 << 1;
pub(crate) const READ: u64 = 1 << 2;
pub(crate) const WRITE: u64 = 1 << 3;
pub(crate) const EXECUTE: u64 = 1 << 4;
pub(crate) const UPGRADE: u64 = 1 << 5;
pub(crate) const ACCESSED: u64 = 1 << 6;
pub(crate) const DIRTY: u64 = 1 << 7;
pub(crate) const CLAIM: u64 = 1 << 8;
const ADDRESS: u64 = ((1 << 48) - 1) << 9;
const ATTR_SHIFT: u32 = 57;
const ATTR: u64 = 3 << ATTR_SHIFT;
pub(crate) const FACT: u64 = 1 << 59;
pub(crate) const ABSENT: u64 = 1 << 60;
pub(crate) const DEAD: u64 = 1 << 61;
pub(crate) const CLAIMED: u64 = 1 << 62;
pub(crate) const SPECIAL: u64 = 1 << 63;
/// What a page source fills a freed page with. Whoever reads one as an entry has read freed memory.
pub(crate) const POISON: u64 = 0xdead_dead_dead_dead;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// One store.
    InPlace,
    /// Break before make; `exempt`: not between equal contents.
    BreakFirst { exempt: bool },
}

thread_local! {
    /// What hardware does in the moment in which the engine asks for the value of nothing, on this thread.
    pub(crate) static AT_ABSENT: RefCell<Option<Box<dyn FnMut()>>> = const { RefCell::new(None) };
}

/// One member of the family.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tiny {
    pub(crate) name: &'static str,
    pub(crate) claim: bool,
    pub(crate) change: Change,
    /// Hardware sets accessed and dirty.
    pub(crate) hardware: bool,
    pub(crate) late: bool,
    pub(crate) big_endian: bool,
    pub(crate) mirror: bool,
    /// What holds nothing in a directory is another value than in a table of pages, and another at each level.
    pub(crate) sentinels: bool,
    pub(crate) geometry: Geometry,
}

/// 64 pages of 4K: four, 16K; eight of these, 128K; two of these.
pub(crate) fn three_levels() -> Geometry {
    Geometry::new(&[
        LevelShape { shift: 12, bits: 2, leaf: true },
        LevelShape { shift: 14, bits: 3, leaf: true },
        LevelShape { shift: 17, bits: 1, leaf: true },
    ])
    .unwrap()
}

pub(crate) fn two_levels() -> Geometry {
    Geometry::new(&[LevelShape { shift: 12, bits: 2, leaf: true }, LevelShape { shift: 14, bits: 2, leaf: true }])
        .unwrap()
}

/// The common size of a leaf of the second level.
pub(crate) const BIG: u64 = 0x4000;
pub(crate) const PAGE: u64 = 0x1000;

const BASE: Tiny = Tiny {
    name: "",
    claim: true,
    change: Change::InPlace,
    hardware: true,
    late: false,
    big_endian: false,
    mirror: false,
    sentinels: false,
    // Replaced by `flavours`.
    geometry: match Geometry::new(&[LevelShape { shift: 12, bits: 2, leaf: true }]) {
        Some(geometry) => geometry,
        None => panic!(),
    },
};

/// Every flavour there is a test for.
pub(crate) fn flavours() -> Vec<Tiny> {
    let exempt = Change::BreakFirst { exempt: true };
    let strict = Change::BreakFirst { exempt: false };
    let base = Tiny { geometry: three_levels(), ..BASE };
    vec![
        Tiny { name: "claim", ..base },
        Tiny { name: "claim-software", hardware: false, ..base },
        Tiny { name: "no-claim", claim: false, ..base },
        Tiny { name: "no-claim-software", claim: false, hardware: false, ..base },
        Tiny { name: "break-claim-exempt", change: exempt, ..base },
        Tiny { name: "break-claim-strict", change: strict, hardware: false, ..base },
        Tiny { name: "break-no-claim", claim: false, change: strict, ..base },
        Tiny { name: "late", late: true, ..base },
        Tiny { name: "late-break-no-claim", late: true, claim: false, change: strict, ..base },
        Tiny { name: "big-endian", big_endian: true, geometry: two_levels(), ..base },
        Tiny { name: "sentinels", sentinels: true, ..base },
        Tiny { name: "sentinels-no-claim", sentinels: true, claim: false, hardware: false, ..base },
        Tiny { name: "sentinels-break-no-claim", sentinels: true, claim: false, change: strict, late: true, ..base },
        Tiny { name: "sentinels-mirror", sentinels: true, mirror: true, ..base },
        Tiny { name: "mirror", mirror: true, ..base },
        Tiny { name: "mirror-no-claim", mirror: true, claim: false, ..base },
        Tiny { name: "mirror-break", mirror: true, change: strict, ..base },
        Tiny { name: "mirror-late", mirror: true, late: true, ..base },
        Tiny { name: "mirror-late-break-no-claim", mirror: true, late: true, claim: false, change: strict, ..base },
    ]
}

impl Tiny {
    pub(crate) fn breaks(&self) -> bool {
        self.change != Change::InPlace
    }

    /// Whether a walker may never see a miss while nothing but the shape changes.
    pub(crate) fn seamless(&self) -> bool {
        self.claim && !self.breaks()
    }

    /// Where what holds nothing leads to, at this level.
    fn place_of_nothing(&self, level: Level) -> u64 {
        if self.sentinels && level > Level::LEAF { u64::from(level.get()) << 9 } else { 0 }
    }

    fn output(raw: u64) -> OutputAddr {
        OutputAddr::new((raw & ADDRESS) >> 9 << 4)
    }

    fn place(output: OutputAddr, align: u64) -> Result<u64, FormatError> {
        if !output.is_aligned(align) {
            return Err(FormatError::Unaligned { output, align });
        }
        if output.as_u64() >> 52 != 0 {
            return Err(FormatError::OutputTooWide { output, bits: 52 });
        }
        Ok(output.as_u64() >> 4 << 9)
    }

    fn deny(raw: u64) -> u64 {
        raw & !(WRITE | UPGRADE)
    }

    fn with_output(&self, level: Level, raw: u64, output: OutputAddr) -> Result<u64, FormatError> {
        Ok((raw & !ADDRESS) | Self::place(output, self.geometry.span(level))?)
    }
}

impl Format for Tiny {
    type Attrs = u8;

    fn name(&self) -> &'static str {
        self.name
    }
    fn geometry(&self) -> &Geometry {
        &self.geometry
    }
    fn not_present(&self, level: Level) -> NotPresent {
        AT_ABSENT.with(|hook| {
            if let Some(hook) = hook.try_borrow_mut().ok().as_deref_mut().and_then(Option::as_mut) {
                hook();
            }
        });
        let place = self.place_of_nothing(level);
        NotPresent { absent: ABSENT | place, claimed: CLAIMED | place, dead: DEAD | place }
    }
    fn claim_bit(&self) -> u64 {
        if self.claim { CLAIM } else { 0 }
    }
    fn hardware_bits(&self, _: Level, _: u64) -> u64 {
        ACCESSED | DIRTY
    }

    fn kind(&self, level: Level, raw: u64) -> Kind {
        assert_ne!(raw, POISON, "{}: read an entry of a page that is free", self.name);
        assert_ne!(raw, POISON.swap_bytes(), "{}: read an entry of a page that is free", self.name);
        if raw & PRESENT == 0 {
            let facts = self.hardware_bits(level, raw);
            return match self.not_present(level).kind(raw, facts) {
                None if raw & !facts == 0 && self.place_of_nothing(level) == 0 => Kind::Absent,
                nothing => nothing.unwrap_or(Kind::Special),
            };
        }
        if level == Level::LEAF || raw & LEAF != 0 { Kind::Leaf } else { Kind::Table(Self::output(raw)) }
    }

    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        let below = level.below().ok_or(FormatError::NoLeaf { number: 0 })?;
        Ok(PRESENT | Self::place(child, self.geometry.table_bytes(below) as u64)?)
    }

    fn leaf(&self, level: Level, spec: &LeafSpec<u8>) -> Result<u64, FormatError> {
        if !self.geometry.level(level).leaf {
            return Err(FormatError::NoLeaf { number: self.level_number(level) });
        }
        if !spec.access.contains(Access::READ) {
            return Err(FormatError::Access { access: spec.access });
        }
        if spec.attrs > 3 {
            return Err(FormatError::Attribute { value: spec.attrs.into(), rule: "attributes have two bits" });
        }
        let mut raw = PRESENT | LEAF | READ | Self::place(spec.output, self.geometry.span(level))?;
        raw |= u64::from(spec.attrs) << ATTR_SHIFT;
        if spec.access.contains(Access::EXECUTE) {
            raw |= EXECUTE;
        }
        if spec.access.writable() {
            raw |= if spec.armed { UPGRADE } else { UPGRADE | WRITE };
        }
        if spec.accessed {
            raw |= ACCESSED;
        }
        if spec.dirty {
            raw |= match (self.hardware, raw & WRITE != 0) {
                (true, _) => DIRTY,
                (false, true) => 0,
                (false, false) => FACT,
            };
        }
        Ok(raw)
    }

    fn spec(&self, level: Level, raw: u64) -> LeafSpec<u8> {
        let mut access = Access::empty();
        access.set(Access::READ, raw & READ != 0);
        access.set(Access::WRITE, raw & (WRITE | UPGRADE) != 0);
        access.set(Access::EXECUTE, raw & EXECUTE != 0);
        LeafSpec {
            output: Self::output(raw),
            access,
            armed: raw & (WRITE | UPGRADE) == UPGRADE,
            accessed: self.is_young(level, raw),
            dirty: self.is_dirty(level, raw),
            attrs: ((raw & ATTR) >> ATTR_SHIFT) as u8,
        }
    }

    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        self.with_output(level, Self::deny(old) & !(DIRTY | FACT), output)
    }

    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        if !access.contains(Access::READ) {
            return Err(FormatError::Access { access });
        }
        let dirty = self.is_dirty(level, raw);
        let armed = raw & (WRITE | UPGRADE) == UPGRADE;
        let mut new = Self::deny(raw) & !(EXECUTE | FACT);
        if access.contains(Access::EXECUTE) {
            new |= EXECUTE;
        }
        if access.writable() {
            new |= if armed { UPGRADE } else { UPGRADE | WRITE };
        }
        if dirty && !self.is_dirty(level, new) {
            new |= FACT;
        }
        Ok(new)
    }

    fn write_protect(&self, _: Level, raw: u64, how: WriteProtect) -> u64 {
        let clean = raw & !(DIRTY | FACT);
        match how {
            WriteProtect::Arm => clean & !WRITE,
            WriteProtect::Retain => Self::deny(clean),
        }
    }

    fn upgrade(&self, _: Level, raw: u64) -> Option<u64> {
        (raw & (WRITE | UPGRADE) == UPGRADE).then_some((raw | WRITE) & !FACT)
    }

    fn is_young(&self, _: Level, raw: u64) -> bool {
        raw & ACCESSED != 0
    }
    fn make_old(&self, _: Level, raw: u64) -> u64 {
        raw & !ACCESSED
    }
    fn make_young(&self, _: Level, raw: u64) -> u64 {
        raw | ACCESSED
    }

    fn is_dirty(&self, _: Level, raw: u64) -> bool {
        if self.hardware { raw & DIRTY != 0 } else { raw & (WRITE | FACT) != 0 }
    }
    fn make_clean(&self, _: Level, raw: u64) -> u64 {
        if self.hardware { raw & !DIRTY } else { raw & !(WRITE | FACT) }
    }

    fn touch(&self, _: Level, raw: u64, access: Access) -> Touch {
        let granted = [(Access::READ, READ), (Access::WRITE, WRITE), (Access::EXECUTE, EXECUTE)];
        if granted.iter().any(|&(right, bit)| access.contains(right) && raw & bit == 0) {
            return Touch::Denied;
        }
        if !self.hardware {
            return if raw & ACCESSED == 0 { Touch::AccessFlag } else { Touch::Allowed(raw) };
        }
        Touch::Allowed(raw | ACCESSED | if access.writable() { DIRTY } else { 0 })
    }

    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        let Some(below) = level.below() else { return raw };
        let output = Self::output(raw).wrapping_add(index as u64 * self.geometry.span(below));
        (raw & !ADDRESS) | (output.as_u64() >> 4 << 9)
    }

    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        (self.geometry.level(level).leaf && Self::output(child).is_aligned(self.geometry.span(level))).then_some(child)
    }

    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64 {
        let mut merged = into | (from & ACCESSED);
        if self.is_dirty(from_level, from) && !self.is_dirty(into_level, into) {
            merged |= if self.hardware { DIRTY } else { FACT };
        }
        merged
    }

    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        let flush = |owed| if owed { Transition::FLUSH } else { Transition::FREE };
        match (self.kind(level, old), self.kind(level, new)) {
            (Kind::Leaf, Kind::Leaf) => {
                if (old ^ new) & (ADDRESS | ATTR) != 0 && self.breaks() {
                    return Transition::BREAK;
                }
                let lost = old & !new & (READ | WRITE | EXECUTE | UPGRADE | DIRTY | FACT) != 0;
                flush((old ^ new) & (ADDRESS | ATTR) != 0 || lost)
            }
            // Facts that come late are read again after a flush: there has to be one.
            (Kind::Leaf, Kind::Table(_)) if !self.breaks() => flush(self.late),
            (Kind::Leaf | Kind::Table(_), Kind::Leaf | Kind::Table(_)) if self.breaks() && old != new => {
                Transition::BREAK
            }
            (Kind::Leaf | Kind::Table(_), _) => Transition::FLUSH,
            _ => Transition::FREE,
        }
    }

    fn equal_contents_transition(&self, level: Level, old: u64, new: u64) -> Transition {
        match self.change {
            Change::BreakFirst { exempt: true } => Transition::FLUSH,
            _ => self.transition(level, old, new),
        }
    }

    fn late_facts(&self) -> bool {
        self.late
    }

    fn flushes_before_refill(&self) -> bool {
        self.breaks()
    }

    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        let bad = |rule, bits| Err(EntryError { raw, number: self.level_number(level), rule, bits });
        match self.kind(level, raw) {
            Kind::Leaf => {
                if raw & READ == 0 {
                    return bad("leaves are readable", READ);
                }
                if raw & (WRITE | UPGRADE) == WRITE {
                    return bad("what is writable is upgradable", WRITE);
                }
                if !Self::output(raw).is_aligned(self.geometry.span(level)) || !self.geometry.level(level).leaf {
                    return bad("leaves are aligned", ADDRESS);
                }
                if raw & CLAIM != 0 {
                    return bad("the claim was left", CLAIM);
                }
                Ok(())
            }
            Kind::Table(_) if raw & (READ | WRITE | EXECUTE | UPGRADE | ATTR | FACT | DIRTY) != 0 => {
                bad("links are bare", raw & (READ | WRITE | EXECUTE | UPGRADE | ATTR | FACT | DIRTY))
            }
            Kind::Special if raw & SPECIAL == 0 => bad("what holds nothing is of its level", raw),
            _ => Ok(()),
        }
    }

    fn memory_of(&self, raw: u64) -> u64 {
        if self.big_endian { raw.swap_bytes() } else { raw }
    }
    fn raw_of(&self, memory: u64) -> u64 {
        if self.big_endian { memory.swap_bytes() } else { memory }
    }
}
