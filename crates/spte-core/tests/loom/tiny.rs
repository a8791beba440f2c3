// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The smallest format there can be: one index bit a level, one or two levels, pages of 4096 bytes.
//!
//! Everything that the engine distinguishes is there: links, leaves, the three values that hold nothing, armed writing, facts,
//! and a claim bit or none. Whatever else a real format has would only make the state space larger.

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, LevelShape, NotPresent, Touch, Transition,
    WriteProtect,
};

/// Bytes of a page.
pub(crate) const PAGE: u64 = 4096;

const PRESENT: u64 = 1 << 63;
const LINK: u64 = 1 << 62;
const CLAIM: u64 = 1 << 61;
const ARMED: u64 = 1 << 60;
const ACCESSED: u64 = 1 << 59;
pub(crate) const DIRTY: u64 = 1 << 58;
/// The two leaves of a table are a set.
const SET: u64 = 1 << 57;
/// Three bits of rights: those granted and, with `ARMED`, writing that is withheld.
const RIGHTS: u32 = 52;
const ADDRESS: u64 = (1 << 52) - 1;
const CLAIMED: u64 = 1;
const DEAD: u64 = 2;

#[derive(Debug)]
pub(crate) struct Tiny {
    geometry: Geometry,
    claim_bit: u64,
    /// What was taken away is flushed before anything is made in its place.
    flushes_before_refill: bool,
    /// log2 of a set's leaves.
    set_shift: u8,
}

impl Tiny {
    fn new(levels: &[LevelShape], claim_bit: u64) -> Self {
        Self { geometry: Geometry::new(levels).unwrap(), claim_bit, flushes_before_refill: false, set_shift: 0 }
    }

    /// A root with two leaves. Present entries are claimed by a bit.
    pub(crate) fn flat() -> Self {
        Self::new(&[LevelShape { shift: 12, bits: 1, leaf: true }], CLAIM)
    }

    /// A root with two leaves. A claim makes a present entry transiently absent.
    pub(crate) fn flat_without_claim_bit() -> Self {
        Self { claim_bit: 0, ..Self::flat() }
    }

    /// As [`Tiny::flat`], of a processor that must not be shown two translations of one address.
    pub(crate) fn flat_that_breaks() -> Self {
        Self { flushes_before_refill: true, ..Self::flat() }
    }

    /// As [`Tiny::flat_that_breaks`]; the two leaves may be a set.
    pub(crate) fn flat_with_a_set() -> Self {
        Self { set_shift: 1, ..Self::flat_that_breaks() }
    }

    /// A root with two links, to tables of two leaves.
    pub(crate) fn deep() -> Self {
        let leaves = LevelShape { shift: 12, bits: 1, leaf: true };
        Self::new(&[leaves, LevelShape { shift: 13, bits: 1, leaf: false }], CLAIM)
    }

    /// As [`Tiny::deep`], where the leaves of a table may be a set.
    pub(crate) fn deep_with_sets() -> Self {
        Self { flushes_before_refill: true, set_shift: 1, ..Self::deep() }
    }

    /// As [`Tiny::deep`], with leaves of two pages in the root.
    pub(crate) fn huge() -> Self {
        let leaves = LevelShape { shift: 12, bits: 1, leaf: true };
        Self::new(&[leaves, LevelShape { shift: 13, bits: 1, leaf: true }], CLAIM)
    }

    /// The same, where a claim makes a present entry transiently absent.
    pub(crate) fn huge_without_claim_bit() -> Self {
        Self { claim_bit: 0, ..Self::huge() }
    }

    /// The leaf `raw` is half of a set.
    pub(crate) fn is_marked(raw: u64) -> bool {
        raw & SET != 0
    }

    /// The leaf `raw` was written to.
    pub(crate) fn is_written(raw: u64) -> bool {
        raw & DIRTY != 0
    }

    /// Writing is granted by the leaf `raw`.
    pub(crate) fn grants_writing(raw: u64) -> bool {
        raw & ARMED == 0 && rights(raw).writable()
    }

    /// One compare-exchange grants writing.
    pub(crate) fn can_be_upgraded(raw: u64) -> bool {
        raw & ARMED != 0 && rights(raw).writable()
    }

    pub(crate) fn output(raw: u64) -> OutputAddr {
        OutputAddr::new(raw & ADDRESS & !(PAGE - 1))
    }
}

fn rights(raw: u64) -> Access {
    Access::from_bits_truncate((raw >> RIGHTS) as u8)
}

fn with_rights(raw: u64, access: Access) -> u64 {
    raw & !(7 << RIGHTS) | u64::from(access.bits()) << RIGHTS
}

fn flag(on: bool, bit: u64) -> u64 {
    if on { bit } else { 0 }
}

impl Format for Tiny {
    type Attrs = ();

    fn name(&self) -> &'static str {
        "tiny"
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn not_present(&self, _: Level) -> NotPresent {
        NotPresent { absent: 0, claimed: CLAIMED, dead: DEAD }
    }

    fn claim_bit(&self) -> u64 {
        self.claim_bit
    }

    fn hardware_bits(&self, _: Level, _: u64) -> u64 {
        ACCESSED | DIRTY
    }

    fn kind(&self, _: Level, raw: u64) -> Kind {
        match raw & !(ACCESSED | DIRTY) {
            0 => Kind::Absent,
            CLAIMED => Kind::Claimed,
            DEAD => Kind::Dead,
            raw if raw & PRESENT == 0 => Kind::Special,
            raw if raw & LINK != 0 => Kind::Table(OutputAddr::new(raw & ADDRESS)),
            _ => Kind::Leaf,
        }
    }

    fn table(&self, _: Level, child: OutputAddr) -> Result<u64, FormatError> {
        match child.as_u64() {
            address if address & !ADDRESS == 0 => Ok(PRESENT | LINK | address),
            _ => Err(FormatError::OutputTooWide { output: child, bits: 52 }),
        }
    }

    fn leaf(&self, level: Level, spec: &LeafSpec<()>) -> Result<u64, FormatError> {
        if !spec.output.is_aligned(self.geometry.span(level)) {
            return Err(FormatError::Unaligned { output: spec.output, align: self.geometry.span(level) });
        }
        let armed = spec.armed && spec.access.writable();
        let flags = flag(armed, ARMED) | flag(spec.accessed, ACCESSED) | flag(spec.dirty, DIRTY);
        Ok(with_rights(PRESENT | flags | spec.output.as_u64(), spec.access))
    }

    fn spec(&self, _: Level, raw: u64) -> LeafSpec<()> {
        LeafSpec {
            output: Self::output(raw),
            access: rights(raw),
            armed: raw & ARMED != 0,
            accessed: raw & ACCESSED != 0,
            dirty: raw & DIRTY != 0,
            attrs: (),
        }
    }

    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let spec = self.spec(level, old);
        let access = spec.access.read_only();
        self.leaf(level, &LeafSpec { output, access, armed: false, dirty: false, ..spec })
    }

    fn with_access(&self, _: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        Ok(with_rights(if access.writable() { raw } else { raw & !ARMED }, access))
    }

    fn write_protect(&self, _: Level, raw: u64, how: WriteProtect) -> u64 {
        match how {
            WriteProtect::Arm if rights(raw).writable() => (raw | ARMED) & !DIRTY,
            WriteProtect::Arm => raw & !DIRTY,
            WriteProtect::Retain => with_rights(raw & !(ARMED | DIRTY), rights(raw).read_only()),
        }
    }

    fn upgrade(&self, _: Level, raw: u64) -> Option<u64> {
        Self::can_be_upgraded(raw).then_some(raw & !ARMED)
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
        raw & DIRTY != 0
    }

    fn make_clean(&self, _: Level, raw: u64) -> u64 {
        raw & !DIRTY
    }

    fn touch(&self, _: Level, raw: u64, access: Access) -> Touch {
        if !rights(raw).contains(access) || access.writable() && raw & ARMED != 0 {
            return Touch::Denied;
        }
        Touch::Allowed(raw | ACCESSED | flag(access.writable(), DIRTY))
    }

    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        raw + index as u64 * level.below().map_or(0, |below| self.geometry.span(below))
    }

    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        Self::output(child).is_aligned(self.geometry.span(level)).then_some(child)
    }

    fn merge_facts(&self, _: Level, into: u64, _: Level, from: u64) -> u64 {
        into | from & (ACCESSED | DIRTY)
    }

    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        let (present, leaf) = (self.kind(level, old) == Kind::Leaf, self.kind(level, new) == Kind::Leaf);
        let gained = leaf && rights(new).contains(rights(old)) && Self::output(old) == Self::output(new);
        let armed = new & ARMED & !old != 0;
        if present && (!gained || armed) { Transition::FLUSH } else { Transition::FREE }
    }

    fn set_shift(&self, level: Level) -> u8 {
        if level == Level::LEAF { self.set_shift } else { 0 }
    }

    fn in_set(&self, _: Level, raw: u64) -> bool {
        Self::is_marked(raw)
    }

    fn set_member(&self, _: Level, first: u64, index: usize) -> Option<u64> {
        Self::output(first).is_aligned(2 * PAGE).then(|| (first | SET) + index as u64 * PAGE)
    }

    fn unmarked(&self, _: Level, raw: u64) -> u64 {
        raw & !SET
    }

    fn flushes_before_refill(&self) -> bool {
        self.flushes_before_refill
    }

    fn check(&self, _: Level, _: u64) -> Result<(), EntryError> {
        Ok(())
    }
}
