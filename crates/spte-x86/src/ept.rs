// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! EPT: Intel's second level of translation.
//!
//! Facts are from the Intel SDM, volume 3, "The Extended Page Table Mechanism", and from Linux's
//! `arch/x86/kvm/mmu/spte.c`, whose software bits are kept (see [`software`](crate::software)).
//!
//! Three ways to learn what the guest used and wrote exist, one a table: see [`AccessedDirty`]. With
//! [`AccessedDirty::Disabled`] an old leaf is a *tracked* one: R and X are saved in bits 54 and 56, all rights are
//! clear, and the next access faults. W is not saved: it comes back only through a write fault, so a writable leaf that
//! is aged becomes an armed one; that it was writable, hence dirty, stays known in bit 59.
//!
//! With mode-based execute, `EXECUTE` is both kinds, supervisor and user, and needs `READ`.

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect,
};

use crate::{
    bits::{self, ADDRESS, Levels, OptionsError, PAGE_SIZE, address_field, bit_range, ept},
    memtype::EptAttrs,
    mmio::MmioLayout,
    registers::EptCapabilities,
    software::{self, AccessedDirty, CLAIM, MMU_PRESENT, NOT_PRESENT, WriteBits, WriteState},
    transition::View,
};

/// What the processor and the VM's controls are like. The default is a machine with everything but mode-based execute.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EptOptions {
    /// Levels of the table.
    pub levels: Levels,
    /// MAXPHYADDR, 32 to 52.
    pub physical_bits: u8,
    /// Leaves may be executable and nothing else.
    pub execute_only: bool,
    /// How accessed and dirty are learnt.
    pub accessed_dirty: AccessedDirty,
    /// The control "mode-based execute for EPT" is on.
    pub mode_based_execute: bool,
    /// Links and leaves have bit 63 set, so that no violation becomes a `#VE`. Entries that hold nothing always have
    /// it.
    pub suppress_ve: bool,
    /// 2M leaves exist.
    pub pages_2m: bool,
    /// 1G leaves exist.
    pub pages_1g: bool,
    /// Larger leaves are never executable (the mitigation of the iTLB multihit erratum); what is withheld comes back
    /// when they are split to 4K.
    pub nx_huge_pages: bool,
    /// On a processor with L1TF, how many address bits its caches compare.
    pub l1tf_cache_bits: Option<u8>,
}

impl Default for EptOptions {
    fn default() -> Self {
        Self {
            levels: Levels::Four,
            physical_bits: 52,
            execute_only: true,
            accessed_dirty: AccessedDirty::Enabled,
            mode_based_execute: false,
            suppress_ve: true,
            pages_2m: true,
            pages_1g: true,
            nx_huge_pages: false,
            l1tf_cache_bits: None,
        }
    }
}

impl EptOptions {
    /// These options, without what the processor cannot do: execute-only, large pages, accessed and dirty bits.
    #[must_use]
    pub fn with_capabilities(self, capabilities: EptCapabilities) -> Self {
        let accessed_dirty = if capabilities.contains(EptCapabilities::ACCESSED_DIRTY) {
            self.accessed_dirty
        } else {
            AccessedDirty::Disabled
        };
        Self {
            execute_only: self.execute_only && capabilities.contains(EptCapabilities::EXECUTE_ONLY),
            accessed_dirty,
            pages_2m: self.pages_2m && capabilities.contains(EptCapabilities::PAGES_2M),
            pages_1g: self.pages_1g && capabilities.contains(EptCapabilities::PAGES_1G),
            ..self
        }
    }
}

/// The EPT format of one machine.
#[derive(Debug, Clone)]
pub struct Ept {
    options: EptOptions,
    geometry: Geometry,
    physical: u64,
    mmio: MmioLayout,
}

impl Ept {
    /// The format for these options.
    ///
    /// # Errors
    /// [`OptionsError::PhysicalBits`] and [`OptionsError::CacheBits`] for widths that no processor has.
    pub fn new(options: EptOptions) -> Result<Self, OptionsError> {
        bits::check_widths(options.physical_bits, options.l1tf_cache_bits)?;
        Ok(Self {
            options,
            geometry: bits::geometry(options.levels, options.pages_2m, options.pages_1g),
            physical: bit_range(u32::from(options.physical_bits) - 1, 12),
            mmio: MmioLayout::ept(options.physical_bits, options.l1tf_cache_bits),
        })
    }

    /// What it was made from.
    pub fn options(&self) -> &EptOptions {
        &self.options
    }

    /// How MMIO entries are laid out.
    pub fn mmio(&self) -> &MmioLayout {
        &self.mmio
    }

    /// The state of the leaf as to writing, `None` where its bits say something impossible.
    pub fn write_state(&self, raw: u64) -> Option<WriteState> {
        WriteBits::EPT.state(raw)
    }

    /// The leaf in [`WriteState::WriteTracked`], where it was writable or armed: the page holds page tables of the
    /// guest, and no lockless upgrade may bring W back. Its dirty fact is kept.
    pub fn write_track(&self, raw: u64) -> u64 {
        let keep = if self.write_is_dirty(raw) { software::ept::DIRTY_FACT } else { 0 };
        WriteBits::EPT.track(raw) | keep
    }

    /// Whether the leaf was aged by taking its rights away.
    pub fn is_tracked(&self, raw: u64) -> bool {
        raw & MMU_PRESENT != 0 && self.accessed_dirty(raw) == AccessedDirty::Disabled && raw & self.present_bits() == 0
    }

    pub(crate) fn physical(&self) -> u64 {
        self.physical
    }

    pub(crate) fn suppress_ve(&self) -> u64 {
        if self.options.suppress_ve { ept::SUPPRESS_VE } else { 0 }
    }

    /// The bits of which one makes an entry present to hardware.
    pub(crate) fn present_bits(&self) -> u64 {
        if self.options.mode_based_execute { ept::RWX | ept::USER_EXECUTE } else { ept::RWX }
    }

    pub(crate) fn is_hardware_present(&self, raw: u64) -> bool {
        raw & self.present_bits() != 0
    }

    pub(crate) fn withholds_execute(&self, level: Level) -> bool {
        self.options.nx_huge_pages && level > Level::LEAF
    }

    /// Accessed and dirty, and where hardware has no dirty bit the fact that stands in for it: leaves that differ in these say
    /// the same but for facts, and merge.
    pub(crate) fn facts(&self) -> u64 {
        let fact = match self.options.accessed_dirty {
            AccessedDirty::Enabled => 0,
            AccessedDirty::Disabled | AccessedDirty::WriteProtectOnly => software::ept::DIRTY_FACT,
        };
        ept::ACCESSED | ept::DIRTY | fact
    }

    /// Both kinds of execute, where there are two.
    fn execute_bits(&self) -> u64 {
        self.present_bits() & !(ept::READ | ept::WRITE)
    }

    /// Whether a leaf lets the guest execute, or will again once it is young.
    pub(crate) fn executes(&self, raw: u64) -> bool {
        let live = self.restored(raw);
        live & self.execute_bits() == self.execute_bits()
    }

    /// The entry's own type; the impossible one counts as the most careful.
    fn accessed_dirty(&self, raw: u64) -> AccessedDirty {
        AccessedDirty::from_bits(raw).unwrap_or(AccessedDirty::WriteProtectOnly)
    }

    /// Whether the leaf is dirty because it is writable.
    fn write_is_dirty(&self, raw: u64) -> bool {
        raw & ept::WRITE != 0 && self.accessed_dirty(raw) != AccessedDirty::Enabled
    }

    /// R and X moved to where tracking saves them, W dropped.
    fn tracked(&self, raw: u64) -> u64 {
        let saved = (raw & (ept::READ | ept::EXECUTE)) << software::ept::SAVED_SHIFT;
        (raw & !(self.present_bits() | software::ept::SAVED)) | saved
    }

    /// A tracked leaf with its rights back, any other as it is.
    pub(crate) fn restored(&self, raw: u64) -> u64 {
        if !self.is_tracked(raw) {
            return raw;
        }
        let rights = (raw & software::ept::SAVED) >> software::ept::SAVED_SHIFT;
        let execute = if rights & ept::EXECUTE != 0 { self.execute_bits() } else { 0 };
        (raw & !software::ept::SAVED) | rights | execute
    }

    /// `change` applied to the leaf as if it were not tracked.
    fn edit(&self, raw: u64, change: impl FnOnce(u64) -> u64) -> u64 {
        let changed = change(self.restored(raw));
        if self.is_tracked(raw) { self.tracked(changed) } else { changed }
    }

    /// A leaf that is not tracked, with execute as asked for and as the mitigation allows.
    fn with_execute(&self, level: Level, raw: u64, wanted: bool) -> u64 {
        let raw = raw & !(self.execute_bits() | software::ept::EXECUTE_WITHHELD);
        if !wanted {
            raw
        } else if self.withholds_execute(level) {
            raw | software::ept::EXECUTE_WITHHELD
        } else {
            raw | self.execute_bits()
        }
    }

    /// R and X of a leaf that is not tracked.
    fn put_access(&self, level: Level, raw: u64, access: Access) -> u64 {
        let read = if access.contains(Access::READ) { ept::READ } else { 0 };
        self.with_execute(level, (raw & !ept::READ) | read, access.contains(Access::EXECUTE))
    }

    /// Rights that a leaf of `level` can have.
    fn check_access(&self, level: Level, access: Access) -> Result<(), FormatError> {
        let execute_only =
            self.options.execute_only && !self.options.mode_based_execute && !self.withholds_execute(level);
        if access.contains(Access::READ) || (access == Access::EXECUTE && execute_only) {
            Ok(())
        } else {
            Err(FormatError::Access { access })
        }
    }

    fn check_leaf(&self, level: Level, output: OutputAddr) -> Result<u64, FormatError> {
        if level > self.geometry.top() || !self.geometry.level(level).leaf {
            return Err(FormatError::NoLeaf { number: self.level_number(level) });
        }
        bits::check_output(output, self.geometry.span(level), self.options.physical_bits)
    }

    /// Rights that are in force once the leaf is young: a withheld W is not among them.
    fn granted(&self, raw: u64) -> Access {
        let live = self.restored(raw);
        let mut access = Access::empty();
        access.set(Access::READ, live & ept::READ != 0);
        access.set(Access::WRITE, live & ept::WRITE != 0);
        access.set(Access::EXECUTE, live & self.execute_bits() == self.execute_bits());
        access
    }

    fn clean(raw: u64) -> u64 {
        raw & !(ept::DIRTY | software::ept::DIRTY_FACT)
    }

    fn view(&self, level: Level, raw: u64) -> View {
        let live = self.restored(raw);
        View {
            target: raw & (ADDRESS | ept::MEMORY_TYPE | ept::IGNORE_PAT | PAGE_SIZE | ept::SUPPRESS_VE),
            rights: live & (self.present_bits() & !ept::WRITE),
            write: live & ept::WRITE != 0,
            mmu_writable: raw & software::ept::MMU_WRITABLE != 0,
            dirty: self.is_dirty(level, raw),
            tracked: self.is_tracked(raw),
        }
    }
}

impl Format for Ept {
    type Attrs = EptAttrs;

    fn name(&self) -> &'static str {
        match self.options.levels {
            Levels::Four => "ept",
            Levels::Five => "ept-5level",
        }
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
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

    /// By MMU-presence, and never by hardware's bits: an entry of somebody else's that is present to hardware alone is
    /// [`Kind::Special`]; [`Ept::hardware_kind`] reads such tables. A marked entry with bit 7 where no leaf can be is
    /// special too, and so is never followed. A zero is absent.
    fn kind(&self, level: Level, raw: u64) -> Kind {
        if raw & MMU_PRESENT == 0 {
            software::nothing(raw, self.facts()).unwrap_or(Kind::Special)
        } else if level == Level::LEAF {
            Kind::Leaf
        } else if raw & PAGE_SIZE == 0 {
            Kind::Table(OutputAddr::new(raw & self.physical))
        } else if self.geometry.level(level).leaf {
            Kind::Leaf
        } else {
            Kind::Special
        }
    }

    /// Links grant everything; rights are withheld in leaves only (Linux: `make_nonleaf_spte`).
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        bits::check_link(&self.geometry, level)?;
        let child = bits::check_output(child, 4096, self.options.physical_bits)?;
        let accessed = match self.options.accessed_dirty {
            AccessedDirty::Disabled => 0,
            AccessedDirty::Enabled | AccessedDirty::WriteProtectOnly => ept::ACCESSED,
        };
        let kept = MMU_PRESENT | self.options.accessed_dirty.to_bits() | self.suppress_ve();
        Ok(child | self.present_bits() | accessed | kept)
    }

    /// A leaf (Linux: `make_spte`). Under the huge-page mitigation a larger leaf takes `EXECUTE`, withholds it and
    /// remembers.
    fn leaf(&self, level: Level, spec: &LeafSpec<EptAttrs>) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, spec.output)?;
        self.check_access(level, spec.access)?;
        let kept = MMU_PRESENT | self.options.accessed_dirty.to_bits() | self.suppress_ve();
        let size = if level == Level::LEAF { 0 } else { PAGE_SIZE };
        let raw = self.put_access(level, output | kept | size | spec.attrs.to_bits(), spec.access);
        let raw = match (spec.access.writable(), spec.armed) {
            (false, _) => raw,
            (true, true) => WriteBits::EPT.arm(raw),
            (true, false) => WriteBits::EPT.grant(raw),
        };
        let raw = match (spec.dirty, self.options.accessed_dirty) {
            (false, _) => raw,
            (true, AccessedDirty::Enabled) => raw | ept::DIRTY,
            (true, _) if raw & ept::WRITE != 0 => raw,
            (true, _) => raw | software::ept::DIRTY_FACT,
        };
        Ok(match (spec.accessed, self.options.accessed_dirty) {
            (true, AccessedDirty::Disabled) => raw,
            (true, _) => raw | ept::ACCESSED,
            (false, _) => self.make_old(level, raw),
        })
    }

    fn spec(&self, level: Level, raw: u64) -> LeafSpec<EptAttrs> {
        let armed = WriteBits::EPT.is_armed(raw);
        let withheld = if armed { Access::WRITE } else { Access::empty() };
        LeafSpec {
            output: OutputAddr::new(raw & self.physical & address_field(level)),
            access: self.granted(raw) | withheld,
            armed,
            accessed: self.is_young(level, raw),
            dirty: self.is_dirty(level, raw),
            attrs: EptAttrs::from_bits(raw),
        }
    }

    /// What `change_pte` reaches (Linux: `kvm_set_spte_gfn`, through `kvm_mmu_changed_pte_notifier_make_spte`).
    ///
    /// The leaf points at `output`; W, host-writable and MMU-writable are clear, so that the first write is a fault
    /// that asks the host; execute, memory type and accessed stay, a tracked leaf stays tracked; dirty is clear.
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, output)?;
        Ok((self.write_protect(level, old, WriteProtect::Retain) & !address_field(level)) | output)
    }

    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        self.check_access(level, access)?;
        let was_dirty = self.is_dirty(level, raw);
        let changed =
            self.edit(raw, |live| WriteBits::EPT.with(self.put_access(level, live, access), access.writable()));
        Ok(match (self.accessed_dirty(raw), changed & ept::WRITE != 0) {
            (AccessedDirty::Enabled, _) => changed,
            (_, false) if was_dirty => changed | software::ept::DIRTY_FACT,
            _ => changed & !software::ept::DIRTY_FACT,
        })
    }

    /// Arming leaves hardware's dirty bit for the next harvest (as Linux does).
    fn write_protect(&self, _level: Level, raw: u64, how: WriteProtect) -> u64 {
        match (how, self.accessed_dirty(raw)) {
            (WriteProtect::Arm, AccessedDirty::Enabled) => raw & !ept::WRITE,
            (WriteProtect::Arm, _) => Self::clean(raw) & !ept::WRITE,
            (WriteProtect::Retain, _) => WriteBits::EPT.deny(Self::clean(raw)),
        }
    }

    /// A tracked leaf gets its other rights back too (Linux: `fast_page_fault`). Where hardware has a dirty bit,
    /// setting it is left to hardware.
    fn upgrade(&self, _level: Level, raw: u64) -> Option<u64> {
        if !WriteBits::EPT.is_armed(raw) {
            return None;
        }
        let live = self.restored(raw);
        // W needs R; a leaf that is not readable was never writable, and is not made a misconfiguration.
        (live & ept::READ != 0).then_some((live | ept::WRITE) & !software::ept::DIRTY_FACT)
    }

    fn is_young(&self, _level: Level, raw: u64) -> bool {
        match self.accessed_dirty(raw) {
            AccessedDirty::Disabled => !self.is_tracked(raw),
            AccessedDirty::Enabled | AccessedDirty::WriteProtectOnly => raw & ept::ACCESSED != 0,
        }
    }

    /// Ageing. Without accessed bits the rights go, W for good; a leaf that was dirty by being writable stays dirty.
    fn make_old(&self, _level: Level, raw: u64) -> u64 {
        match self.accessed_dirty(raw) {
            AccessedDirty::Disabled if self.is_tracked(raw) => raw,
            AccessedDirty::Disabled => {
                let keep = if self.write_is_dirty(raw) { software::ept::DIRTY_FACT } else { 0 };
                self.tracked(raw) | keep
            }
            AccessedDirty::Enabled | AccessedDirty::WriteProtectOnly => raw & !ept::ACCESSED,
        }
    }

    fn make_young(&self, _level: Level, raw: u64) -> u64 {
        match self.accessed_dirty(raw) {
            AccessedDirty::Disabled => self.restored(raw),
            AccessedDirty::Enabled | AccessedDirty::WriteProtectOnly => raw | ept::ACCESSED,
        }
    }

    fn is_dirty(&self, _level: Level, raw: u64) -> bool {
        match self.accessed_dirty(raw) {
            AccessedDirty::Enabled => raw & ept::DIRTY != 0,
            AccessedDirty::Disabled | AccessedDirty::WriteProtectOnly => {
                raw & (ept::WRITE | software::ept::DIRTY_FACT) != 0
            }
        }
    }

    fn make_clean(&self, _level: Level, raw: u64) -> u64 {
        match self.accessed_dirty(raw) {
            AccessedDirty::Enabled => raw & !ept::DIRTY,
            AccessedDirty::Disabled | AccessedDirty::WriteProtectOnly => {
                raw & !(ept::WRITE | software::ept::DIRTY_FACT)
            }
        }
    }

    /// A tracked leaf that would allow the access once it is young says [`Touch::AccessFlag`]; a write to it does not,
    /// as W comes back only through [`Format::upgrade`].
    fn touch(&self, level: Level, raw: u64, access: Access) -> Touch {
        if !self.granted(raw).contains(access) {
            return Touch::Denied;
        }
        if self.is_tracked(raw) {
            return Touch::AccessFlag;
        }
        if self.accessed_dirty(raw) == AccessedDirty::Disabled {
            return Touch::Allowed(raw);
        }
        let dirty = if access.writable() { ept::DIRTY } else { 0 };
        Touch::Allowed(self.make_young(level, raw) | dirty)
    }

    /// The same translation and facts; execute that the mitigation withheld comes back at 4K (Linux:
    /// `make_small_spte`).
    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        let Some(below) = level.below() else {
            return raw;
        };
        let field = address_field(level);
        let offset = (index as u64 & 511) << self.geometry.level(below).shift;
        let child = (raw & !field) | ((raw & field).wrapping_add(offset) & ADDRESS);
        if below > Level::LEAF {
            return child;
        }
        let child = child & !PAGE_SIZE;
        if child & software::ept::EXECUTE_WITHHELD == 0 {
            return child;
        }
        self.edit(child, |live| self.with_execute(below, live, true))
    }

    /// `None` where the level has no leaves, `child` is none or is not aligned to the larger page, or nothing but
    /// execute was allowed and the mitigation withholds it.
    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        let below = level.below()?;
        if level > self.geometry.top()
            || !self.geometry.level(level).leaf
            || self.kind(below, child) != Kind::Leaf
            || child & ADDRESS & !address_field(level) != 0
        {
            return None;
        }
        let wanted = self.executes(child) || child & software::ept::EXECUTE_WITHHELD != 0;
        if self.withholds_execute(level) && self.restored(child) & ept::READ == 0 {
            return None;
        }
        Some(self.edit(child | PAGE_SIZE, |live| self.with_execute(level, live, wanted)))
    }

    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64 {
        let into = if self.is_young(from_level, from) { self.make_young(into_level, into) } else { into };
        if !self.is_dirty(from_level, from) || self.is_dirty(into_level, into) {
            return into;
        }
        match self.accessed_dirty(into) {
            AccessedDirty::Enabled => into | ept::DIRTY,
            AccessedDirty::Disabled | AccessedDirty::WriteProtectOnly => into | software::ept::DIRTY_FACT,
        }
    }

    /// Never breaks first. A leaf becomes a table only by being split, which owes nothing; what a replaced link or a
    /// leaf that goes away owes is in the table of the source file: rights lost, another target, MMU-writable or dirty
    /// cleared.
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        match (self.kind(level, old), self.kind(level, new)) {
            (Kind::Leaf, Kind::Leaf) => self.view(level, old).become_leaf(self.view(level, new)),
            (Kind::Leaf, Kind::Table(_)) => Transition::FREE,
            (Kind::Table(from), Kind::Table(to)) if from == to && old & !new & self.present_bits() == 0 => {
                Transition::FREE
            }
            (Kind::Leaf | Kind::Table(_), _) => Transition::FLUSH,
            // Somebody else's entry, which hardware may have cached; it caches nothing of impossible ones.
            (Kind::Special, _)
                if old != new && self.is_hardware_present(old) && self.check_hardware(level, old).is_ok() =>
            {
                Transition::FLUSH
            }
            _ => Transition::FREE,
        }
    }

    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.check_entry(level, raw)
    }
}
