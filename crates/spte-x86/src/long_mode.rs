// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long mode: the four- and five-level tables of x86-64, as a VMM's own tables ([`LongMode`]) and as AMD's second level
//! of translation ([`Npt`]).
//!
//! Both have the same entries (AMD APM volume 2, "Long-Mode Page Translation" and "Nested Paging"; Intel SDM volume 3,
//! "4-Level Paging and 5-Level Paging"). What differs in NPT: every access is a user access, so U/S is set at every
//! level; the global bit means nothing and there are no protection keys; the depth is that of the host's own paging
//! mode; accesses to the guest's page tables are writes. Accessed and dirty bits always exist.
//!
//! Rights are P (always there: nothing can be present and unreadable), R/W and NX. While EFER.NXE is clear NX is
//! reserved and everything executes: a leaf that should not be executable is refused then, as rights are never rounded
//! up.

use core::{fmt, marker::PhantomData};

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect,
};

use crate::{
    bits::{self, ADDRESS, Levels, OptionsError, PAGE_SIZE, address_field, bit_range, long_mode},
    memtype::{LongModeAttrs, PatSelector, ProtectionKey, pat_bit},
    mmio::MmioLayout,
    software::{self, CLAIM, MMU_PRESENT, NOT_PRESENT, WriteBits, WriteState},
    transition::View,
};

/// What the processor and the table's owner are like. The default is a machine with 1G pages and NX, no protection keys
/// and no memory encryption.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LongModeOptions {
    /// Levels of the table. NPT has the host's own number.
    pub levels: Levels,
    /// Physical address bits, 32 to 52; with memory encryption those that are left.
    pub physical_bits: u8,
    /// 1G leaves exist.
    pub pages_1g: bool,
    /// EFER.NXE is set. For NPT this is the host's.
    pub no_execute: bool,
    /// Bits 62:59 of leaves are protection keys. Not for NPT.
    pub protection_keys: bool,
    /// The bit of the address field that says "encrypted" (C-bit), at or above `physical_bits`. It is never part of an
    /// output address.
    pub encryption_bit: Option<u8>,
    /// Table pages are encrypted: links carry the encryption bit.
    pub encrypt_tables: bool,
    /// Bit 8 of links at levels 4 and 5 is reserved, as on AMD; Intel ignores it. (Below neither minds it, whatever older manuals
    /// of AMD said: Linux, commit 5ecad245de2a.)
    pub link_global_reserved: bool,
    /// Larger leaves are never executable (the mitigation of the iTLB multihit erratum); what is withheld comes back
    /// when they are split to 4K.
    pub nx_huge_pages: bool,
    /// On a processor with L1TF, how many address bits its caches compare.
    pub l1tf_cache_bits: Option<u8>,
}

impl Default for LongModeOptions {
    fn default() -> Self {
        Self {
            levels: Levels::Four,
            physical_bits: 52,
            pages_1g: true,
            no_execute: true,
            protection_keys: false,
            encryption_bit: None,
            encrypt_tables: false,
            link_global_reserved: true,
            nx_huge_pages: false,
            l1tf_cache_bits: None,
        }
    }
}

mod sealed {
    pub trait Sealed {}
    impl Sealed for super::Native {}
    impl Sealed for super::Nested {}
}

/// What a table of long-mode entries is used for. Sealed: [`Native`] or [`Nested`].
pub trait Usage: sealed::Sealed + Send + Sync + 'static {
    /// Whether the processor uses the table for nested paging.
    const NESTED: bool;
    /// Names of the formats with four and five levels.
    #[doc(hidden)]
    const NAMES: [&'static str; 2];
}

/// A table that translates virtual addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Native {}

/// A table that translates guest physical addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nested {}

impl Usage for Native {
    const NESTED: bool = false;
    const NAMES: [&'static str; 2] = ["x86-64", "x86-64-la57"];
}

impl Usage for Nested {
    const NESTED: bool = true;
    const NAMES: [&'static str; 2] = ["npt", "npt-5level"];
}

/// Ordinary long-mode tables: guest tables that the VMM owns, and the like.
pub type LongMode = LongModeFormat<Native>;
/// AMD's nested page tables.
pub type Npt = LongModeFormat<Nested>;

/// The long-mode format of one machine, for one [`Usage`].
pub struct LongModeFormat<U> {
    options: LongModeOptions,
    geometry: Geometry,
    physical: u64,
    encryption: u64,
    mmio: Option<MmioLayout>,
    usage: PhantomData<fn() -> U>,
}

impl<U> Clone for LongModeFormat<U> {
    fn clone(&self) -> Self {
        let Self { options, geometry, physical, encryption, mmio, usage } = *self;
        Self { options, geometry, physical, encryption, mmio, usage }
    }
}

impl<U: Usage> fmt::Debug for LongModeFormat<U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LongModeFormat")
            .field("name", &self.name())
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}

impl<U: Usage> LongModeFormat<U> {
    /// The format for these options.
    ///
    /// # Errors
    /// [`OptionsError`] for options that no machine has: widths, an encryption bit among the address bits, encrypted
    /// tables without one, non-executable huge pages without NX, protection keys in NPT.
    pub fn new(options: LongModeOptions) -> Result<Self, OptionsError> {
        bits::check_widths(options.physical_bits, options.l1tf_cache_bits)?;
        let physical_bits = options.physical_bits;
        let encryption = match options.encryption_bit {
            None if options.encrypt_tables => return Err(OptionsError::EncryptTables),
            None => 0,
            Some(bit) if bit < physical_bits || bit > 51 => {
                return Err(OptionsError::EncryptionBit { bit, physical_bits });
            }
            Some(bit) => 1 << bit,
        };
        if options.nx_huge_pages && !options.no_execute {
            return Err(OptionsError::NxHugePages);
        }
        if U::NESTED && options.protection_keys {
            return Err(OptionsError::NestedProtectionKeys);
        }
        let bit_51_reserved = physical_bits < 52 && options.encryption_bit != Some(51);
        Ok(Self {
            options,
            geometry: bits::geometry(options.levels, true, options.pages_1g),
            physical: bit_range(u32::from(physical_bits) - 1, 12),
            encryption,
            mmio: bit_51_reserved.then(|| MmioLayout::reserved_bit(physical_bits, options.l1tf_cache_bits)),
            usage: PhantomData,
        })
    }

    /// What it was made from.
    pub fn options(&self) -> &LongModeOptions {
        &self.options
    }

    /// How MMIO entries are laid out; `None` where bit 51 is not reserved, so that nothing would fault.
    pub fn mmio(&self) -> Option<&MmioLayout> {
        self.mmio.as_ref()
    }

    /// The state of the leaf as to writing, `None` where its bits say something impossible.
    pub fn write_state(&self, raw: u64) -> Option<WriteState> {
        WriteBits::LONG_MODE.state(raw)
    }

    /// The leaf in [`WriteState::WriteTracked`], where it was writable or armed: the page holds page tables of the
    /// guest, and no lockless upgrade may bring W back.
    pub fn write_track(&self, raw: u64) -> u64 {
        WriteBits::LONG_MODE.track(raw)
    }

    pub(crate) fn physical(&self) -> u64 {
        self.physical
    }

    pub(crate) fn encryption_bit(&self) -> u64 {
        self.encryption
    }

    pub(crate) fn is_mmio(&self, raw: u64) -> bool {
        self.mmio.is_some_and(|layout| layout.is_mmio(raw))
    }

    pub(crate) fn withholds_execute(&self, level: Level) -> bool {
        self.options.nx_huge_pages && level > Level::LEAF
    }

    /// Accessed and dirty.
    pub(crate) fn facts(&self) -> u64 {
        long_mode::ACCESSED | long_mode::DIRTY
    }

    pub(crate) fn executes(&self, raw: u64) -> bool {
        raw & long_mode::NO_EXECUTE == 0
    }

    /// The address field of a leaf, without the encryption bit.
    fn field(&self, level: Level) -> u64 {
        address_field(level) & !self.encryption
    }

    fn with_execute(&self, level: Level, raw: u64, wanted: bool) -> u64 {
        let raw = raw & !(long_mode::NO_EXECUTE | software::long_mode::EXECUTE_WITHHELD);
        if !wanted {
            raw | long_mode::NO_EXECUTE
        } else if self.withholds_execute(level) {
            raw | long_mode::NO_EXECUTE | software::long_mode::EXECUTE_WITHHELD
        } else {
            raw
        }
    }

    fn check_access(&self, access: Access) -> Result<(), FormatError> {
        let executes = self.options.no_execute || access.contains(Access::EXECUTE);
        if access.contains(Access::READ) && executes { Ok(()) } else { Err(FormatError::Access { access }) }
    }

    fn check_leaf(&self, level: Level, output: OutputAddr) -> Result<u64, FormatError> {
        if level > self.geometry.top() || !self.geometry.level(level).leaf {
            return Err(FormatError::NoLeaf { number: self.level_number(level) });
        }
        bits::check_output(output, self.geometry.span(level), self.options.physical_bits)
    }

    fn attr_bits(&self, level: Level, attrs: LongModeAttrs) -> Result<u64, FormatError> {
        if U::NESTED && !attrs.user {
            return Err(FormatError::Attribute { value: 0, rule: "nested accesses are user accesses" });
        }
        if U::NESTED && attrs.global {
            return Err(FormatError::Attribute { value: 1, rule: "nested leaves cannot be global" });
        }
        if attrs.encrypted && self.encryption == 0 {
            return Err(FormatError::Attribute { value: 1, rule: "there is no encryption bit" });
        }
        let key = u64::from(attrs.protection_key.get());
        if key != 0 && !self.options.protection_keys {
            return Err(FormatError::Attribute { value: key, rule: "there are no protection keys" });
        }
        let user = if attrs.user { long_mode::USER } else { 0 };
        let global = if attrs.global { long_mode::GLOBAL } else { 0 };
        let encrypted = if attrs.encrypted { self.encryption } else { 0 };
        let selector = attrs.selector.to_bits(level > Level::LEAF);
        Ok(user | global | encrypted | selector | (key << long_mode::PROTECTION_KEY_SHIFT))
    }

    fn attrs(&self, level: Level, raw: u64) -> LongModeAttrs {
        let key = if self.options.protection_keys {
            (raw & long_mode::PROTECTION_KEY) >> long_mode::PROTECTION_KEY_SHIFT
        } else {
            0
        };
        LongModeAttrs {
            selector: PatSelector::from_bits(raw, level > Level::LEAF),
            user: raw & long_mode::USER != 0,
            global: raw & long_mode::GLOBAL != 0,
            encrypted: raw & self.encryption != 0,
            protection_key: ProtectionKey::new(key as u8).unwrap_or_default(),
        }
    }

    /// Rights that are in force: a withheld W is not among them.
    fn granted(&self, raw: u64) -> Access {
        let present = raw & long_mode::PRESENT != 0;
        let mut access = Access::empty();
        access.set(Access::READ, present);
        access.set(Access::WRITE, present && raw & long_mode::WRITE != 0);
        access.set(Access::EXECUTE, present && self.executes(raw));
        access
    }

    fn view(&self, raw: u64) -> View {
        let cache = long_mode::WRITE_THROUGH | long_mode::CACHE_DISABLE | PAGE_SIZE;
        let key = if self.options.protection_keys { long_mode::PROTECTION_KEY } else { 0 };
        View {
            target: raw & (ADDRESS | cache | long_mode::USER | long_mode::GLOBAL | key),
            rights: (raw & long_mode::PRESENT) | (!raw & long_mode::NO_EXECUTE),
            write: raw & long_mode::WRITE != 0,
            mmu_writable: raw & software::long_mode::MMU_WRITABLE != 0,
            dirty: raw & long_mode::DIRTY != 0,
            tracked: false,
        }
    }
}

impl<U: Usage> Format for LongModeFormat<U> {
    type Attrs = LongModeAttrs;

    fn name(&self) -> &'static str {
        let [four, five] = U::NAMES;
        match self.options.levels {
            Levels::Four => four,
            Levels::Five => five,
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

    /// By MMU-presence, and never by P: an entry of somebody else's is [`Kind::Special`], and
    /// [`LongModeFormat::hardware_kind`] reads such tables. A marked entry with bit 7 where no leaf can be is special
    /// too, and so is never followed. A zero is absent.
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

    /// Links grant everything, user mode included; rights are withheld in leaves only (Linux: `make_nonleaf_spte`).
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        bits::check_link(&self.geometry, level)?;
        let child = bits::check_output(child, 4096, self.options.physical_bits)?;
        let encrypted = if self.options.encrypt_tables { self.encryption } else { 0 };
        let rights = long_mode::PRESENT | long_mode::WRITE | long_mode::USER;
        Ok(child | encrypted | rights | long_mode::ACCESSED | MMU_PRESENT)
    }

    /// A leaf (Linux: `make_spte`). Under the huge-page mitigation a larger leaf takes `EXECUTE`, withholds it and
    /// remembers.
    fn leaf(&self, level: Level, spec: &LeafSpec<LongModeAttrs>) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, spec.output)?;
        self.check_access(spec.access)?;
        let attrs = self.attr_bits(level, spec.attrs)?;
        let size = if level == Level::LEAF { 0 } else { PAGE_SIZE };
        let accessed = if spec.accessed { long_mode::ACCESSED } else { 0 };
        let dirty = if spec.dirty { long_mode::DIRTY } else { 0 };
        let raw = output | attrs | size | accessed | dirty | long_mode::PRESENT | MMU_PRESENT;
        let raw = self.with_execute(level, raw, spec.access.contains(Access::EXECUTE));
        Ok(match (spec.access.writable(), spec.armed) {
            (false, _) => raw,
            (true, true) => WriteBits::LONG_MODE.arm(raw),
            (true, false) => WriteBits::LONG_MODE.grant(raw),
        })
    }

    fn spec(&self, level: Level, raw: u64) -> LeafSpec<LongModeAttrs> {
        let armed = WriteBits::LONG_MODE.is_armed(raw);
        let withheld = if armed { Access::WRITE } else { Access::empty() };
        LeafSpec {
            output: OutputAddr::new(raw & self.physical & address_field(level)),
            access: self.granted(raw) | withheld,
            armed,
            accessed: self.is_young(level, raw),
            dirty: self.is_dirty(level, raw),
            attrs: self.attrs(level, raw),
        }
    }

    /// What `change_pte` reaches (Linux: `kvm_set_spte_gfn`, through `kvm_mmu_changed_pte_notifier_make_spte`).
    ///
    /// The leaf points at `output`; W, host-writable and MMU-writable are clear, so that the first write is a fault
    /// that asks the host; execute, the PAT selector, encryption and accessed stay; dirty is clear.
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, output)?;
        Ok((self.write_protect(level, old, WriteProtect::Retain) & !self.field(level)) | output)
    }

    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        self.check_access(access)?;
        let raw = self.with_execute(level, raw, access.contains(Access::EXECUTE));
        Ok(WriteBits::LONG_MODE.with(raw, access.writable()))
    }

    /// Arming leaves hardware's dirty bit for the next harvest (as Linux does).
    fn write_protect(&self, _level: Level, raw: u64, how: WriteProtect) -> u64 {
        match how {
            WriteProtect::Arm => raw & !long_mode::WRITE,
            WriteProtect::Retain => WriteBits::LONG_MODE.deny(raw & !long_mode::DIRTY),
        }
    }

    /// Setting D is left to hardware.
    fn upgrade(&self, _level: Level, raw: u64) -> Option<u64> {
        WriteBits::LONG_MODE.is_armed(raw).then_some(raw | long_mode::WRITE)
    }

    fn is_young(&self, _level: Level, raw: u64) -> bool {
        raw & long_mode::ACCESSED != 0
    }
    fn make_old(&self, _level: Level, raw: u64) -> u64 {
        raw & !long_mode::ACCESSED
    }
    fn make_young(&self, _level: Level, raw: u64) -> u64 {
        raw | long_mode::ACCESSED
    }

    fn is_dirty(&self, _level: Level, raw: u64) -> bool {
        raw & long_mode::DIRTY != 0
    }
    fn make_clean(&self, _level: Level, raw: u64) -> u64 {
        raw & !long_mode::DIRTY
    }

    /// As for a user-mode access where U/S is set, a supervisor one where it is clear; protection keys are not asked.
    fn touch(&self, _level: Level, raw: u64, access: Access) -> Touch {
        if !self.granted(raw).contains(access) {
            return Touch::Denied;
        }
        let dirty = if access.writable() { long_mode::DIRTY } else { 0 };
        Touch::Allowed(raw | long_mode::ACCESSED | dirty)
    }

    /// The same translation and facts. At 4K the PAT bit moves from 12 to 7, and execute that the mitigation withheld
    /// comes back (Linux: `make_small_spte`).
    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        let Some(below) = level.below() else {
            return raw;
        };
        let field = self.field(level);
        let offset = (index as u64 & 511) << self.geometry.level(below).shift;
        let output = (raw & field).wrapping_add(offset) & ADDRESS & !self.encryption;
        if below > Level::LEAF {
            return (raw & !field) | output;
        }
        let pat = if raw & pat_bit(true) == 0 { 0 } else { pat_bit(false) };
        let child = (raw & !(field | pat_bit(true) | PAGE_SIZE)) | output | pat;
        if child & software::long_mode::EXECUTE_WITHHELD == 0 {
            return child;
        }
        self.with_execute(below, child, true)
    }

    /// `None` where the level has no leaves, or `child` is none or is not aligned to the larger page. From 4K the PAT
    /// bit moves from 7 to 12.
    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        let below = level.below()?;
        if level > self.geometry.top()
            || !self.geometry.level(level).leaf
            || self.kind(below, child) != Kind::Leaf
            || child & self.field(below) & !address_field(level) != 0
        {
            return None;
        }
        let wanted = self.executes(child) || child & software::long_mode::EXECUTE_WITHHELD != 0;
        let raw = if below == Level::LEAF {
            let pat = if child & pat_bit(false) == 0 { 0 } else { pat_bit(true) };
            (child & !pat_bit(false)) | PAGE_SIZE | pat
        } else {
            child
        };
        Some(self.with_execute(level, raw, wanted))
    }

    fn merge_facts(&self, _into_level: Level, into: u64, _from_level: Level, from: u64) -> u64 {
        into | (from & (long_mode::ACCESSED | long_mode::DIRTY))
    }

    /// Never breaks first. A leaf becomes a table only by being split, which owes nothing; what a replaced link or a
    /// leaf that goes away owes is in the table of the source file: rights lost, another target, MMU-writable or dirty
    /// cleared.
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        let rights = long_mode::PRESENT | long_mode::WRITE | long_mode::USER;
        match (self.kind(level, old), self.kind(level, new)) {
            (Kind::Leaf, Kind::Leaf) => self.view(old).become_leaf(self.view(new)),
            (Kind::Leaf, Kind::Table(_)) => Transition::FREE,
            (Kind::Table(_), Kind::Table(_))
                if (old ^ new) & ADDRESS == 0
                    && old & !new & rights == 0
                    && !old & new & long_mode::NO_EXECUTE == 0 =>
            {
                Transition::FREE
            }
            (Kind::Leaf | Kind::Table(_), _) => Transition::FLUSH,
            // Somebody else's entry, which hardware may have cached; it caches nothing of impossible ones.
            (Kind::Special, _) if old != new && raw_present(old) && self.check_hardware(level, old).is_ok() => {
                Transition::FLUSH
            }
            _ => Transition::FREE,
        }
    }

    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.check_entry(level, raw)
    }
}

fn raw_present(raw: u64) -> bool {
    raw & long_mode::PRESENT != 0
}
