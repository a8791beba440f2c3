// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The table of guest physical addresses: one page size, one width, one layout of entries, one byte order.
//!
//! Facts are from Linux's `arch/mips/kvm/mmu.c` (until v6.9 for `change_pte`), `arch/mips/include/asm/pgtable.h`
//! (`pte_mkold` and the like) and `pgtable-64.h`.

use core::{fmt, marker::PhantomData};

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect,
};
use spte_core::raw::check_output;

use crate::{
    bits::{
        self, ACCESSED, MODIFIED, PRESENT, PageSize, PteLayout, WRITE, Width, XKPHYS, XKPHYS_CACHE_SHIFT, bit_range,
    },
    memtype::{Cache, GpaAttrs},
    software::{Sentinels, WriteState},
    transition::View,
};

mod order {
    pub trait Sealed: Send + Sync + 'static {
        fn swap(native: u64) -> u64;
    }
}

/// The byte order of the processors that read the table: [`BigEndian`] or [`LittleEndian`].
pub trait ByteOrder: order::Sealed + Copy + fmt::Debug + Default + Eq {
    /// What is behind the format's name: empty, or `el`.
    const SUFFIX: &'static str;
}

/// Most significant byte first, as MIPS machines mostly are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BigEndian;

/// Least significant byte first, such as Loongson.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LittleEndian;

impl order::Sealed for BigEndian {
    fn swap(native: u64) -> u64 {
        native.to_be()
    }
}

impl ByteOrder for BigEndian {
    const SUFFIX: &'static str = "";
}

impl order::Sealed for LittleEndian {
    fn swap(native: u64) -> u64 {
        native.to_le()
    }
}

impl ByteOrder for LittleEndian {
    const SUFFIX: &'static str = "el";
}

/// Options that no machine has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// Physical addresses have 32 to 59 bits: what xkphys holds.
    #[error("{bits} physical address bits are not within 32 to 59")]
    PhysicalBits {
        /// The bits asked for.
        bits: u8,
    },
    /// The tables that empty directories lead to are not whole pages, or not all within the physical addresses.
    #[error("{bytes:#x} bytes of sentinels at {start} are not whole pages, or pass the physical addresses")]
    Sentinels {
        /// Where they were to begin.
        start: OutputAddr,
        /// Bytes of all of them.
        bytes: u64,
    },
    /// The tables have a shape that the engine does not take.
    #[error("no table has pages of {page:?} and this width")]
    Shape {
        /// The page size.
        page: PageSize,
    },
}

/// What the machine and the code that reads the table are like. The default is 4K pages, 40 bits of guest addresses, 48 of
/// physical ones, RI and XI.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GpaOptions {
    /// The page size.
    pub page: PageSize,
    /// Guest address bits.
    pub width: Width,
    /// Where an entry's bits stand.
    pub layout: PteLayout,
    /// Physical address bits: 32 to 59.
    pub physical_bits: u8,
    /// RI and XI are in use (PageGrain.RIE and XIE; QEMU: `helper_dmtc0_entrylo0`). Without, what can be read can be
    /// executed, and there is no leaf that cannot be. Not without where the walker fills a TLB that has RI: it moves the two
    /// bits below G there in any case, and READ, which says the opposite, would be RI (QEMU: `get_tlb_entry_layout`,
    /// `r4k_fill_tlb`, which look at no PageGrain).
    pub rixi: bool,
    /// The cache attribute of table pages: links are addresses in xkphys that have it.
    pub table_cache: Cache,
    /// Physical address of [`Sentinels`]. The default is the 48-bit space's last megabyte, where a program that walks
    /// its own tables has none of them; who lets anything else walk says where they really are.
    pub sentinels: OutputAddr,
}

impl Default for GpaOptions {
    fn default() -> Self {
        Self {
            page: PageSize::K4,
            width: Width::Standard,
            layout: PteLayout::Plain,
            physical_bits: 48,
            rixi: true,
            table_cache: Cache::NonCoherent,
            sentinels: OutputAddr::new(0xffff_fff0_0000),
        }
    }
}

/// The GPA table of one machine, in its byte order.
///
/// # Where Linux does otherwise, and why
///
/// - **What is absent stays absent in `change_pte`.** Linux's callback (`kvm_set_spte_handler`, v4.10 to v6.9) wrote the
///   host's PTE into the slot whenever the table was there, present before or not, and skipped only the flush; a host
///   PTE that was not present left one that was neither zero nor present.
/// - **Rights and cache attribute are the old leaf's**, not the host's.
/// - **An old leaf that changes is flushed**: see [`transition`](crate::transition).
/// - **Ranges end before their end.** `kvm_mips_mkold_gpa_pt` and the others took the last page, and were given the first one
///   behind it.
/// - **V follows ACCESSED alone.** Linux leaves it clear where RI is set; here a page may be executed and not read.
#[derive(Debug, Clone)]
pub struct GpaTable<O: ByteOrder = BigEndian> {
    pub(crate) options: GpaOptions,
    geometry: Geometry,
    sentinels: Sentinels,
    order: PhantomData<O>,
}

impl<O: ByteOrder> GpaTable<O> {
    /// The format for these options.
    ///
    /// # Errors
    /// Any [`OptionsError`].
    pub fn new(options: GpaOptions) -> Result<Self, OptionsError> {
        let GpaOptions { page, width, physical_bits, .. } = options;
        if !(32..=59).contains(&physical_bits) {
            return Err(OptionsError::PhysicalBits { bits: physical_bits });
        }
        let geometry = bits::geometry(page, width).ok_or(OptionsError::Shape { page })?;
        let window = XKPHYS | (options.table_cache as u64) << XKPHYS_CACHE_SHIFT;
        let start = options.sentinels.as_u64();
        let sentinels = Sentinels { start, page_shift: page.shift(), top: geometry.top(), window };
        let end = start.checked_add(sentinels.bytes());
        if start % page.bytes() != 0 || end.is_none_or(|end| end > 1 << physical_bits) {
            return Err(OptionsError::Sentinels { start: options.sentinels, bytes: sentinels.bytes() });
        }
        Ok(Self { options, geometry, sentinels, order: PhantomData })
    }

    /// What it was made from.
    pub fn options(&self) -> &GpaOptions {
        &self.options
    }

    /// The tables that empty directories lead to.
    pub fn sentinels(&self) -> &Sentinels {
        &self.sentinels
    }

    /// The virtual address of a table, in xkphys: what a link is, and PWBase.
    pub fn pointer(&self, table: OutputAddr) -> u64 {
        self.sentinels.window | table.as_u64()
    }

    /// The state of a leaf as to writing, `None` where its bits say something impossible.
    pub fn write_state(&self, raw: u64) -> Option<WriteState> {
        match (raw & WRITE != 0, raw & MODIFIED != 0, raw & self.layout().dirty() != 0) {
            (true, true, true) => Some(WriteState::Writable),
            (true, _, false) => Some(WriteState::Armed),
            (false, _, false) => Some(WriteState::ReadOnly),
            _ => None,
        }
    }

    pub(crate) fn layout(&self) -> PteLayout {
        self.options.layout
    }

    pub(crate) fn shift(&self) -> u8 {
        self.options.page.shift()
    }

    /// The bits of an entry that are its address.
    pub(crate) fn frame(&self) -> u64 {
        self.layout().frame(self.shift(), self.options.physical_bits)
    }

    pub(crate) fn output(&self, raw: u64) -> u64 {
        self.layout().get(raw & self.frame(), self.shift())
    }

    /// Whether hardware lets the guest read, and execute.
    pub(crate) fn reads(&self, raw: u64) -> bool {
        if self.options.rixi {
            raw & self.layout().read_inhibit() == 0
        } else {
            // The same place is READ then, and every leaf has it.
            true
        }
    }

    pub(crate) fn executes(&self, raw: u64) -> bool {
        !self.options.rixi || raw & self.layout().execute_inhibit() == 0
    }

    pub(crate) fn is_armed(&self, raw: u64) -> bool {
        raw & WRITE != 0 && raw & self.layout().dirty() == 0
    }

    fn check_leaf(&self, level: Level, output: OutputAddr) -> Result<u64, FormatError> {
        if level != Level::LEAF {
            return Err(FormatError::NoLeaf { number: self.level_number(level) });
        }
        check_output(output, self.options.page.bytes(), self.options.physical_bits)
    }

    /// The leaf with these rights, in the state that says both what is asked for and whether it was written.
    fn put_access(&self, raw: u64, access: Access, armed: bool, dirty: bool) -> Result<u64, FormatError> {
        let layout = self.layout();
        let (ri, xi) = (layout.read_inhibit(), layout.execute_inhibit());
        let raw = raw & !(WRITE | MODIFIED | layout.dirty() | ri | xi);
        let (reads, executes) = (access.contains(Access::READ), access.contains(Access::EXECUTE));
        let raw = match (self.options.rixi, reads, executes) {
            (true, _, _) => raw | if reads { 0 } else { ri } | if executes { 0 } else { xi },
            (false, true, true) => raw | ri,
            (false, _, _) => return Err(FormatError::Access { access }),
        };
        let fact = if dirty { MODIFIED } else { 0 };
        Ok(match (access.writable(), armed) {
            (false, _) => raw | fact,
            (true, true) => raw | WRITE | fact,
            (true, false) => raw | WRITE | MODIFIED | layout.dirty(),
        })
    }

    /// ACCESSED, V and MODIFIED. Hardware writes nothing; ageing and harvests do, and two leaves that differ in these say the
    /// same but for facts.
    pub(crate) fn facts(&self) -> u64 {
        ACCESSED | MODIFIED | self.layout().valid()
    }

    fn view(&self, raw: u64) -> View {
        let (frame, layout) = (self.frame(), self.layout());
        let reads = if self.reads(raw) { layout.read_inhibit() } else { 0 };
        let executes = if self.executes(raw) { layout.execute_inhibit() } else { 0 };
        View {
            place: raw & (frame | layout.cache() | layout.global()),
            rights: raw & (WRITE | MODIFIED | layout.dirty()) | reads | executes,
        }
    }
}

impl<O: ByteOrder> Format for GpaTable<O> {
    type Attrs = GpaAttrs;

    fn name(&self) -> &'static str {
        if O::SUFFIX.is_empty() { "mips64" } else { "mips64el" }
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    fn not_present(&self, level: Level) -> NotPresent {
        self.sentinels.not_present(level)
    }
    /// None: see [`software`](crate::software).
    fn claim_bit(&self) -> u64 {
        0
    }

    /// Those of a page; a directory has none.
    fn hardware_bits(&self, level: Level, _raw: u64) -> u64 {
        if level == Level::LEAF { self.facts() } else { 0 }
    }

    /// A leaf is what has PRESENT, whether or not V is set. In a directory everything is an address: one of the sentinels, a
    /// table's in xkphys, or nobody knows what, which is special and never followed.
    fn kind(&self, level: Level, raw: u64) -> Kind {
        if level > self.geometry.top() {
            return Kind::Special;
        }
        if level == Level::LEAF && raw & PRESENT != 0 {
            return Kind::Leaf;
        }
        let nothing = self.not_present(level).kind(raw, self.hardware_bits(level, raw));
        if level == Level::LEAF {
            return nothing.unwrap_or(Kind::Special);
        }
        if let Some(nothing) = nothing {
            return nothing;
        }
        let table = raw ^ self.sentinels.window;
        let aligned = table & bit_range(u32::from(self.shift()) - 1, 0) == 0;
        let free = !self.sentinels.overlaps(table, self.options.page.bytes());
        if table >> self.options.physical_bits == 0 && aligned && free {
            Kind::Table(OutputAddr::new(table))
        } else {
            Kind::Special
        }
    }

    /// A link is the table's address in xkphys, and nothing else.
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        if level == Level::LEAF || level > self.geometry.top() {
            let rule = "links stand above the level of pages, up to the root";
            return Err(FormatError::Attribute { value: u64::from(level.get()), rule });
        }
        let bytes = self.options.page.bytes();
        let table = check_output(child, bytes, self.options.physical_bits)?;
        if self.sentinels.overlaps(table, bytes) {
            let rule = "a table lies where the sentinels are";
            return Err(FormatError::Attribute { value: table, rule });
        }
        Ok(self.pointer(child))
    }

    /// A leaf. With RI and XI each of the eight sets of rights can be had. One that may be written and is not armed counts as
    /// written: hardware would not tell.
    fn leaf(&self, level: Level, spec: &LeafSpec<GpaAttrs>) -> Result<u64, FormatError> {
        let layout = self.layout();
        let output = self.check_leaf(level, spec.output)?;
        let raw = layout.put(output) | (spec.attrs.cache as u64) << layout.cache_shift() | PRESENT;
        let raw = if spec.accessed { self.make_young(level, raw) } else { raw };
        self.put_access(raw, spec.access, spec.armed, spec.dirty)
    }

    fn spec(&self, level: Level, raw: u64) -> LeafSpec<GpaAttrs> {
        let mut access = Access::empty();
        access.set(Access::READ, self.reads(raw));
        access.set(Access::WRITE, raw & WRITE != 0);
        access.set(Access::EXECUTE, self.executes(raw));
        let layout = self.layout();
        LeafSpec {
            output: OutputAddr::new(self.output(raw)),
            access,
            armed: self.is_armed(raw),
            accessed: self.is_young(level, raw),
            dirty: self.is_dirty(level, raw),
            attrs: GpaAttrs { cache: Cache::from_bits(((raw & layout.cache()) >> layout.cache_shift()) as u8) },
        }
    }

    /// What `change_pte` reaches (Linux: `kvm_set_spte_handler`; see [`GpaTable`] for what that did).
    ///
    /// The leaf points at `output`; WRITE and D are clear, so that the first store is a fault that asks the host; cache
    /// attribute, RI and XI, ACCESSED and V stay; MODIFIED is clear.
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, output)?;
        Ok((self.write_protect(level, old, WriteProtect::Retain) & !self.frame()) | self.layout().put(output))
    }

    fn with_access(&self, level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        self.put_access(raw, access, self.is_armed(raw), self.is_dirty(level, raw))
    }

    /// To arm is Linux's `pte_mkclean`: WRITE stays. To retain is that and `pte_wrprotect`.
    fn write_protect(&self, _level: Level, raw: u64, how: WriteProtect) -> u64 {
        let raw = raw & !(MODIFIED | self.layout().dirty());
        match how {
            WriteProtect::Arm => raw,
            WriteProtect::Retain => raw & !WRITE,
        }
    }

    /// Linux's `pte_mkdirty`, in the fast path of a fault.
    fn upgrade(&self, _level: Level, raw: u64) -> Option<u64> {
        self.is_armed(raw).then_some(raw | MODIFIED | self.layout().dirty())
    }

    fn is_young(&self, _level: Level, raw: u64) -> bool {
        raw & ACCESSED != 0
    }
    /// D stays: with the next use the leaf is as it was.
    fn make_old(&self, _level: Level, raw: u64) -> u64 {
        raw & !(ACCESSED | self.layout().valid())
    }
    fn make_young(&self, _level: Level, raw: u64) -> u64 {
        raw | ACCESSED | self.layout().valid()
    }

    fn is_dirty(&self, _level: Level, raw: u64) -> bool {
        raw & MODIFIED != 0
    }
    fn make_clean(&self, _level: Level, raw: u64) -> u64 {
        raw & !(MODIFIED | self.layout().dirty())
    }

    /// V comes before RI, XI and D (QEMU: `r4k_map_address`).
    fn touch(&self, _level: Level, raw: u64, access: Access) -> Touch {
        if raw & self.layout().valid() == 0 {
            return Touch::AccessFlag;
        }
        let mut granted = Access::empty();
        granted.set(Access::READ, self.reads(raw));
        granted.set(Access::WRITE, raw & self.layout().dirty() != 0);
        granted.set(Access::EXECUTE, self.executes(raw));
        if granted.contains(access) { Touch::Allowed(raw) } else { Touch::Denied }
    }

    /// There are no larger leaves.
    fn split(&self, _level: Level, raw: u64, _index: usize) -> u64 {
        raw
    }
    fn collapse(&self, _level: Level, _child: u64) -> Option<u64> {
        None
    }

    fn merge_facts(&self, into_level: Level, into: u64, from_level: Level, from: u64) -> u64 {
        let into = if self.is_young(from_level, from) { self.make_young(into_level, into) } else { into };
        if self.is_dirty(from_level, from) { into | MODIFIED } else { into }
    }

    /// See the table of [`transition`](crate::transition).
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        match (self.kind(level, old), self.kind(level, new)) {
            (Kind::Leaf, Kind::Leaf) => self.view(old).become_leaf(self.view(new)),
            (Kind::Table(from), Kind::Table(to)) if from == to => Transition::FREE,
            (Kind::Leaf | Kind::Table(_), _) => Transition::FLUSH,
            // What somebody else wrote: hardware follows every directory entry, and loads every entry with V.
            (Kind::Special, _) if old != new && (level > Level::LEAF || old & self.layout().valid() != 0) => {
                Transition::FLUSH
            }
            _ => Transition::FREE,
        }
    }

    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.check_entry(level, raw)
    }

    fn memory_of(&self, raw: u64) -> u64 {
        O::swap(raw)
    }
    fn raw_of(&self, memory: u64) -> u64 {
        // The same swap, once more.
        O::swap(memory)
    }
}
