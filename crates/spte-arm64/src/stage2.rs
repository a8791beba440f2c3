// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Stage 2 of VMSAv8-64: one granule, one guest address width, one machine.
//!
//! Facts are from Arm DDI 0487, chapter "The AArch64 Virtual Memory System Architecture", and from Linux's
//! `arch/arm64/kvm/hyp/pgtable.c`.

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect,
};

use crate::{
    bits::{
        self, ACCESS_FLAG, AddressLayout, CONTIGUOUS, DBM, EXECUTE_NEVER, EXECUTE_NEVER_SHIFT, Granule, MEM_ATTR,
        MEM_ATTR_SHIFT, NO_TRANSLATION_CACHING, OptionsError, READ, SHAREABILITY, SHAREABILITY_SHIFT, Start, TYPE,
        VALID, WRITE,
    },
    memtype::{Device, ExecuteAt, MemoryType, Shareability, Stage2Attrs},
    software::{
        AccessedDirty, CLAIM, DIRTY_FACT, NOT_PRESENT, UPGRADABLE, USER, WITHHELD_EXECUTE, WITHHELD_EXECUTE_SHIFT,
        WriteState,
    },
    transition::{BreakLevel, View},
};

/// XN of what executes nowhere.
const NOWHERE: u64 = 2;

/// What the machine and its controls are like. The default is a machine of Armv8.0 with 48 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage2Options {
    /// The smallest page.
    pub granule: Granule,
    /// Guest (intermediate physical) address bits: 32 to 48, or to 52 with [`Stage2Options::lpa2`] or with the 64K granule
    /// and more than 48 physical bits.
    pub ipa_bits: u8,
    /// Physical address bits: 32 to 48, or to 52 with [`Stage2Options::lpa2`] or the 64K granule.
    pub physical_bits: u8,
    /// Descriptors of FEAT_LPA2 (VTCR_EL2.DS): 52-bit addresses with the 4K and 16K granules, blocks one level higher,
    /// and shareability from VTCR_EL2 instead of the leaf.
    pub lpa2: bool,
    /// The level where walks begin.
    pub start: Start,
    /// HCR_EL2.FWB: leaves say what the memory is, instead of what it is at most.
    pub fwb: bool,
    /// FEAT_XNX: leaves may execute at one exception level alone.
    pub xnx: bool,
    /// How accessed and dirty are learnt.
    pub accessed_dirty: AccessedDirty,
    /// Shareability of table walks, and with `lpa2` of every leaf: VTCR_EL2.SH0.
    pub shareability: Shareability,
    /// What changes of size need.
    pub break_level: BreakLevel,
}

impl Default for Stage2Options {
    fn default() -> Self {
        Self {
            granule: Granule::K4,
            ipa_bits: 40,
            physical_bits: 48,
            lpa2: false,
            start: Start::FewestLevels,
            fwb: false,
            xnx: false,
            accessed_dirty: AccessedDirty::Software,
            shareability: Shareability::Inner,
            break_level: BreakLevel::Level0,
        }
    }
}

/// The stage 2 format of one machine and one address width.
///
/// # Where Linux does otherwise, and why
///
/// - **A block of which a part goes is split**, not lost whole (`stage2_unmap_walker` removes the block, and the rest
///   faults in again), because a Retained window must keep what it does not change.
/// - **A split keeps the memory type.** Linux's eager split rebuilds leaves from `kvm_pgtable_stage2_pte_prot`, which gives
///   back rights and software bits alone; it is safe there only because device blocks are never split.
/// - **Rights rise in place** over a valid leaf, where `kvm_pgtable_stage2_map` answers -EAGAIN and writes nothing.
/// - **What is absent stays absent in `change_pte`.** Linux's arm64 callback was a map of one page, read-only
///   (`kvm_set_spte_gfn`, before that `kvm_set_spte_hva`, calling `kvm_pgtable_stage2_map` with `KVM_PGTABLE_PROT_R` and no
///   memory cache). Where the last-level table was still there, kept by a neighbour, that *installed* the page, although
///   commit c13fda237f08 says that the callback "maps" only what was found: what was found was the table, not a leaf. Where
///   the table was gone too it did nothing (-ENOMEM); where a live leaf had the same page it did nothing either, and left it
///   writable (-EAGAIN); where a live block covered the page, it left the block, with the old page (-ENOMEM).
#[derive(Debug, Clone)]
pub struct Stage2 {
    options: Stage2Options,
    geometry: Geometry,
    start: i8,
    layout: AddressLayout,
}

impl Stage2 {
    /// The format for these options.
    ///
    /// # Errors
    /// Any [`OptionsError`], for what the architecture does not have.
    pub fn new(options: Stage2Options) -> Result<Self, OptionsError> {
        let Stage2Options { granule, ipa_bits, physical_bits, lpa2, .. } = options;
        let wide = match granule {
            Granule::K64 if lpa2 => return Err(OptionsError::Lpa2),
            Granule::K64 => true,
            Granule::K4 | Granule::K16 => lpa2,
        };
        let most = if wide { 52 } else { 48 };
        if !(32..=most).contains(&physical_bits) {
            return Err(OptionsError::PhysicalBits { bits: physical_bits, most });
        }
        let most = if lpa2 || physical_bits > 48 { 52 } else { 48 };
        if !(32..=most).contains(&ipa_bits) {
            return Err(OptionsError::IpaBits { bits: ipa_bits, most });
        }
        let start = bits::start_level(granule, ipa_bits, lpa2, options.start)?;
        let layout = match granule {
            Granule::K64 if physical_bits > 48 => AddressLayout::Lpa64K,
            Granule::K4 | Granule::K16 if lpa2 => AddressLayout::Lpa2,
            _ => AddressLayout::Bits48,
        };
        let geometry = bits::geometry(granule, ipa_bits, start, lpa2, physical_bits)?;
        Ok(Self { options, geometry, start, layout })
    }

    /// What it was made from.
    pub fn options(&self) -> &Stage2Options {
        &self.options
    }

    /// The architecture's number of the level where walks begin: -1 to 3.
    pub fn start_level(&self) -> i8 {
        self.start
    }

    /// How many tables lie side by side at the start: 1 to 16.
    pub fn concatenated(&self) -> u8 {
        let table = self.options.granule.index_bits();
        let root = self.geometry.level(self.geometry.top()).bits;
        if root > table { 1 << (root - table) } else { 1 }
    }

    /// The state of a leaf as to writing, `None` where its bits say something impossible.
    pub fn write_state(&self, raw: u64) -> Option<WriteState> {
        let hardware = self.options.accessed_dirty.sets_dirty();
        match (raw & UPGRADABLE != 0, raw & DBM != 0, raw & WRITE != 0) {
            (false, false, false) => Some(WriteState::ReadOnly),
            (true, false, false) => Some(WriteState::Armed),
            (true, true, false) if hardware => Some(WriteState::WritableClean),
            (true, dbm, true) if dbm == hardware => Some(WriteState::Writable),
            _ => None,
        }
    }

    /// Whether a guest's caches may hold what the leaf translates to.
    pub fn is_cacheable(&self, raw: u64) -> bool {
        self.memory_type(raw).is_cacheable()
    }

    /// Whether the leaf executes at some exception level.
    pub fn is_executable(&self, raw: u64) -> bool {
        self.execute_never(raw) != NOWHERE
    }

    pub(crate) fn layout(&self) -> AddressLayout {
        self.layout
    }

    /// log2 of what an entry at `level` spans.
    pub(crate) fn shift(&self, level: Level) -> u8 {
        self.options.granule.entry_shift(bits::number_of(level))
    }

    pub(crate) fn has_leaves(&self, level: Level) -> bool {
        level <= self.geometry.top() && self.geometry.level(level).leaf
    }

    /// XN as FEAT_XNX has it; without, bit 53 counts for nothing.
    pub(crate) fn execute_never(&self, raw: u64) -> u64 {
        let xn = (raw & EXECUTE_NEVER) >> EXECUTE_NEVER_SHIFT;
        if self.options.xnx { xn } else { xn & NOWHERE }
    }

    /// Shareability bits, where they are not address bits.
    pub(crate) fn shareability_bits(&self) -> u64 {
        if self.layout == AddressLayout::Lpa2 { 0 } else { SHAREABILITY }
    }

    /// Whether hardware lets the guest write.
    pub(crate) fn writes(&self, raw: u64) -> bool {
        raw & WRITE != 0 || (raw & DBM != 0 && self.options.accessed_dirty.sets_dirty())
    }

    pub(crate) fn output(&self, level: Level, raw: u64) -> u64 {
        self.layout.get(raw, self.shift(level))
    }

    fn memory_type(&self, raw: u64) -> MemoryType {
        // What is reserved counts as the strictest.
        MemoryType::of(raw, self.options.fwb).unwrap_or(MemoryType::Device(Device::NGnRnE))
    }

    fn check_leaf(&self, level: Level, output: OutputAddr) -> Result<u64, FormatError> {
        if !self.has_leaves(level) {
            return Err(FormatError::NoLeaf { number: self.level_number(level) });
        }
        bits::check_output(output, self.geometry.span(level), self.options.physical_bits)
    }

    fn attr_bits(&self, attrs: Stage2Attrs) -> Result<u64, FormatError> {
        let refuse = |value: u64, rule| Err(FormatError::Attribute { value, rule });
        let Some(mem_attr) = attrs.memory.mem_attr(self.options.fwb) else {
            // Named by what it would be under the other setting.
            let value = attrs.memory.mem_attr(!self.options.fwb).unwrap_or(0);
            return refuse(
                u64::from(value),
                if self.options.fwb {
                    "with FWB there is device, write-back, non-cacheable, and what stage 1 says"
                } else {
                    "what stage 1 says alone can be had with FWB only"
                },
            );
        };
        let shareability = match self.layout {
            AddressLayout::Lpa2 if attrs.shareability != self.options.shareability => {
                return refuse(attrs.shareability as u64, "with LPA2 descriptors shareability is the table's");
            }
            AddressLayout::Lpa2 => 0,
            _ => (attrs.shareability as u64) << SHAREABILITY_SHIFT,
        };
        if attrs.execute != ExecuteAt::Both && !self.options.xnx {
            return refuse(attrs.execute as u64, "executing at one exception level alone needs FEAT_XNX");
        }
        let software = if attrs.software { USER } else { 0 };
        Ok(u64::from(mem_attr) << MEM_ATTR_SHIFT | shareability | software)
    }

    /// Where the page executes, if it does or did.
    fn execute_at(&self, raw: u64) -> ExecuteAt {
        let xn = match self.execute_never(raw) {
            NOWHERE if self.options.xnx => (raw & WITHHELD_EXECUTE) >> WITHHELD_EXECUTE_SHIFT,
            NOWHERE => 0,
            xn => xn,
        };
        ExecuteAt::from_bits(xn as u8).unwrap_or(ExecuteAt::Both)
    }

    fn with_execute(raw: u64, at: ExecuteAt, wanted: bool) -> u64 {
        let raw = raw & !(EXECUTE_NEVER | WITHHELD_EXECUTE);
        let at = at as u64;
        if wanted {
            raw | at << EXECUTE_NEVER_SHIFT
        } else {
            raw | NOWHERE << EXECUTE_NEVER_SHIFT | at << WITHHELD_EXECUTE_SHIFT
        }
    }

    /// The leaf with read and execute as asked for, and writing in the state that says both what is asked for and
    /// whether it was written.
    fn put_access(&self, raw: u64, access: Access, armed: bool, dirty: bool) -> u64 {
        let raw = Self::with_execute(raw, self.execute_at(raw), access.contains(Access::EXECUTE));
        let raw = raw & !(READ | WRITE | DBM | UPGRADABLE | DIRTY_FACT);
        let raw = if access.contains(Access::READ) { raw | READ } else { raw };
        let fact = if dirty { DIRTY_FACT } else { 0 };
        match (access.writable(), armed, self.options.accessed_dirty.sets_dirty()) {
            (false, ..) => raw | fact,
            (true, true, _) => raw | UPGRADABLE | fact,
            (true, false, false) => raw | UPGRADABLE | WRITE,
            (true, false, true) => raw | UPGRADABLE | DBM | if dirty { WRITE } else { 0 },
        }
    }

    pub(crate) fn is_armed(raw: u64) -> bool {
        raw & (UPGRADABLE | DBM | WRITE) == UPGRADABLE
    }

    /// The leaf's bits that depend on neither its address nor its level.
    fn moved(&self, from: Level, raw: u64, to: Level, output: u64) -> u64 {
        let kept = raw & !(self.layout.field(self.shift(from)) | TYPE | CONTIGUOUS | NO_TRANSLATION_CACHING);
        // Bit 16 is an address bit of small pages, and is in `put` then.
        kept | self.layout.put(output) | if to == Level::LEAF { TYPE } else { 0 }
    }

    fn view(&self, level: Level, raw: u64) -> View {
        // Execute at EL1 and EL0, by XN.
        let execute = match self.execute_never(raw) {
            0 => 3,
            1 => 1,
            3 => 2,
            _ => 0,
        };
        let staging = if level > Level::LEAF { NO_TRANSLATION_CACHING } else { 0 };
        View {
            output: self.output(level, raw),
            memory: raw & (MEM_ATTR | self.shareability_bits()),
            size: raw & (CONTIGUOUS | staging),
            rights: execute | (raw & READ),
            writable: self.writes(raw),
            upgradable: raw & UPGRADABLE != 0,
            dirty: self.is_dirty(level, raw),
        }
    }

    fn change(&self, level: Level, old: u64, new: u64, equal: bool) -> Transition {
        match (self.kind(level, old), self.kind(level, new)) {
            (Kind::Leaf, Kind::Leaf) => {
                self.view(level, old).become_leaf(self.view(level, new), self.options.break_level, equal)
            }
            (Kind::Leaf, Kind::Table(_)) | (Kind::Table(_), Kind::Leaf) => self.options.break_level.resize(),
            (Kind::Table(from), Kind::Table(to)) if from == to => Transition::FREE,
            (Kind::Table(_), Kind::Table(_)) => Transition::BREAK,
            (Kind::Leaf | Kind::Table(_), _) => Transition::FLUSH,
            // A valid entry that somebody else wrote, which hardware may have cached.
            (Kind::Special, _) if old != new && old & VALID != 0 => {
                if new & VALID != 0 {
                    Transition::BREAK
                } else {
                    Transition::FLUSH
                }
            }
            _ => Transition::FREE,
        }
    }

    /// AF, which ageing clears even where hardware does not set it; S2AP\[1\] where hardware records writes in it; and the
    /// dirty fact, which stands in for it: two leaves that differ in these say the same but for facts. Hardware changes an
    /// entry in one atomic step and only while it is valid, so that no fact comes after the entry was taken away.
    pub(crate) fn facts(&self) -> u64 {
        ACCESS_FLAG | DIRTY_FACT | if self.options.accessed_dirty.sets_dirty() { WRITE } else { 0 }
    }
}

impl Format for Stage2 {
    type Attrs = Stage2Attrs;

    fn name(&self) -> &'static str {
        "arm64-s2"
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// 3 for the smallest pages, counted down towards the root: -1 is the highest there is.
    fn level_number(&self, level: Level) -> i8 {
        bits::number_of(level)
    }

    fn not_present(&self, _level: Level) -> NotPresent {
        NOT_PRESENT
    }
    fn claim_bit(&self) -> u64 {
        CLAIM
    }

    fn hardware_bits(&self, _level: Level, _raw: u64) -> u64 {
        self.facts()
    }

    /// By bit 0 first: an invalid entry is nothing, a claim, dead, or an annotation, whatever else is in it. The same
    /// two bits are a table above the last level and a page at it. Reserved encodings are special, and so never
    /// followed.
    fn kind(&self, level: Level, raw: u64) -> Kind {
        if raw & VALID == 0 {
            return NOT_PRESENT.kind(raw, self.facts() | CLAIM).unwrap_or(Kind::Special);
        }
        match (level == Level::LEAF, raw & TYPE != 0) {
            (true, true) => Kind::Leaf,
            (false, true) if level <= self.geometry.top() => {
                Kind::Table(OutputAddr::new(self.layout.get(raw, self.options.granule.shift())))
            }
            (false, false) if self.has_leaves(level) => Kind::Leaf,
            _ => Kind::Special,
        }
    }

    /// A link is an address and two bits: stage 2 has no rights in links.
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        if level == Level::LEAF || level > self.geometry.top() {
            return Err(FormatError::Attribute {
                value: u64::from(level.get()),
                rule: "links stand between level 2 and the level where walks begin",
            });
        }
        let child = bits::check_output(child, self.options.granule.bytes(), self.options.physical_bits)?;
        Ok(self.layout.put(child) | TYPE | VALID)
    }

    /// A leaf (Linux: `stage2_set_prot_attr`, `kvm_init_valid_leaf_pte`). Each of the eight sets of rights can be had, of
    /// devices too: that a guest should not execute from one is the caller's to see to.
    fn leaf(&self, level: Level, spec: &LeafSpec<Stage2Attrs>) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, spec.output)?;
        let raw = self.layout.put(output) | VALID | self.attr_bits(spec.attrs)?;
        let raw = if level == Level::LEAF { raw | TYPE } else { raw };
        let raw = Self::with_execute(raw, spec.attrs.execute, spec.access.contains(Access::EXECUTE));
        let raw = if spec.accessed { raw | ACCESS_FLAG } else { raw };
        Ok(self.put_access(raw, spec.access, spec.armed, spec.dirty))
    }

    fn spec(&self, level: Level, raw: u64) -> LeafSpec<Stage2Attrs> {
        let armed = Self::is_armed(raw);
        let mut access = Access::empty();
        access.set(Access::READ, raw & READ != 0);
        access.set(Access::WRITE, armed || self.writes(raw));
        access.set(Access::EXECUTE, self.is_executable(raw));
        let shareability = match self.layout {
            AddressLayout::Lpa2 => self.options.shareability,
            _ => Shareability::from_bits((raw >> SHAREABILITY_SHIFT & 3) as u8).unwrap_or_default(),
        };
        LeafSpec {
            output: OutputAddr::new(self.output(level, raw)),
            access,
            armed,
            accessed: self.is_young(level, raw),
            dirty: self.is_dirty(level, raw),
            attrs: Stage2Attrs {
                memory: self.memory_type(raw),
                shareability,
                execute: self.execute_at(raw),
                software: raw & USER != 0,
            },
        }
    }

    /// What `change_pte` reaches (Linux, until v6.9: `kvm_set_spte_gfn`; see [`Stage2`] for what that did).
    ///
    /// The leaf points at `output`; S2AP\[1\], DBM and upgradable are clear, so that the first write is a fault that asks
    /// the host; memory type, shareability, execute, the user's bit and the access flag stay; dirty is clear.
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, output)?;
        let field = self.layout.field(self.shift(level));
        Ok((self.write_protect(level, old, WriteProtect::Retain) & !field) | self.layout.put(output))
    }

    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        Ok(self.put_access(raw, access, Self::is_armed(raw), self.is_dirty(level, raw)))
    }

    /// DBM goes with S2AP\[1\] in both cases: with DBM left, hardware would set S2AP\[1\] again.
    fn write_protect(&self, _level: Level, raw: u64, how: WriteProtect) -> u64 {
        let raw = raw & !(WRITE | DBM | DIRTY_FACT);
        match how {
            WriteProtect::Arm => raw,
            WriteProtect::Retain => raw & !UPGRADABLE,
        }
    }

    /// Where hardware records writes, recording this one is left to it.
    fn upgrade(&self, _level: Level, raw: u64) -> Option<u64> {
        if !Self::is_armed(raw) {
            return None;
        }
        let clean = raw & !DIRTY_FACT;
        Some(match (self.options.accessed_dirty.sets_dirty(), raw & DIRTY_FACT != 0) {
            (false, _) => clean | WRITE,
            (true, false) => clean | DBM,
            (true, true) => clean | DBM | WRITE,
        })
    }

    fn is_young(&self, _level: Level, raw: u64) -> bool {
        raw & ACCESS_FLAG != 0
    }
    fn make_old(&self, _level: Level, raw: u64) -> u64 {
        raw & !ACCESS_FLAG
    }
    fn make_young(&self, _level: Level, raw: u64) -> u64 {
        raw | ACCESS_FLAG
    }

    /// S2AP\[1\] says that hardware saw a write, or, where hardware records none, that nobody would have seen it.
    fn is_dirty(&self, _level: Level, raw: u64) -> bool {
        raw & (WRITE | DIRTY_FACT) != 0
    }
    /// With DBM the leaf stays writable, and the next write sets S2AP\[1\] again; without, writing is armed.
    fn make_clean(&self, _level: Level, raw: u64) -> u64 {
        raw & !(WRITE | DIRTY_FACT)
    }

    /// The access flag comes before the rights, where hardware does not set it ("Prioritization of synchronous aborts
    /// from a single stage of address translation").
    fn touch(&self, _level: Level, raw: u64, access: Access) -> Touch {
        if raw & ACCESS_FLAG == 0 && !self.options.accessed_dirty.sets_accessed() {
            return Touch::AccessFlag;
        }
        let mut granted = Access::empty();
        granted.set(Access::READ, raw & READ != 0);
        granted.set(Access::WRITE, self.writes(raw));
        granted.set(Access::EXECUTE, self.is_executable(raw));
        if !granted.contains(access) {
            return Touch::Denied;
        }
        let written = if access.writable() && self.options.accessed_dirty.sets_dirty() { WRITE } else { 0 };
        Touch::Allowed(raw | ACCESS_FLAG | written)
    }

    /// The same translation, rights, facts and memory type; a device stays one.
    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        let Some(below) = level.below() else {
            return raw;
        };
        let index = index as u64 & ((1 << self.options.granule.index_bits()) - 1);
        let output = self.output(level, raw) + (index << self.shift(below));
        self.moved(level, raw, below, output)
    }

    /// `None` where the level has no leaves, or `child` is none or is not aligned to the larger block.
    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        let below = level.below()?;
        if !self.has_leaves(level) || self.kind(below, child) != Kind::Leaf {
            return None;
        }
        let output = self.output(below, child);
        (output & (self.geometry.span(level) - 1) == 0).then(|| self.moved(below, child, level, output))
    }

    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64 {
        let into = if self.is_young(from_level, from) { into | ACCESS_FLAG } else { into };
        if !self.is_dirty(from_level, from) || self.is_dirty(into_level, into) {
            into
        } else if self.writes(into) {
            into | WRITE
        } else {
            into | DIRTY_FACT
        }
    }

    /// See the table of [`transition`](crate::transition).
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        self.change(level, old, new, false)
    }

    fn equal_contents_transition(&self, level: Level, old: u64, new: u64) -> Transition {
        self.change(level, old, new, true)
    }

    /// Sets by the Contiguous bit, where a table has room for one.
    fn set_shift(&self, level: Level) -> u8 {
        self.contiguous(level).map_or(0, |set| set.entries.trailing_zeros() as u8)
    }

    fn in_set(&self, _level: Level, raw: u64) -> bool {
        raw & CONTIGUOUS != 0
    }

    fn set_member(&self, level: Level, first: u64, index: usize) -> Option<u64> {
        let set = self.contiguous(level)?;
        let begin = self.output(level, first);
        let wide = (begin + set.bytes - 1) >> self.options.physical_bits != 0;
        if begin & (set.bytes - 1) != 0 || wide || index >= usize::from(set.entries) {
            return None;
        }
        let output = begin + ((index as u64) << self.shift(level));
        Some((first & !self.layout.field(self.shift(level))) | self.layout.put(output) | CONTIGUOUS)
    }

    fn unmarked(&self, _level: Level, raw: u64) -> u64 {
        raw & !CONTIGUOUS
    }

    /// A TLB that still has the old translation when the new one is made holds both: break-before-make is break, flush, make.
    fn flushes_before_refill(&self) -> bool {
        true
    }

    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.check_entry(level, raw)
    }
}
