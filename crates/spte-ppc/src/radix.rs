// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! A partition-scoped radix tree: one base page, one machine.
//!
//! Sources are named in [`bits`](crate::bits); what Linux does is `arch/powerpc/kvm/book3s_64_mmu_radix.c`.

use notifier_core::{Access, OutputAddr};
use spte_core::format::{
    EntryError, Format, FormatError, Geometry, Kind, LeafSpec, Level, NotPresent, Touch, Transition, WriteProtect,
};

use crate::{
    bits::{
        self, ATT, ATT_SHIFT, BasePage, CHANGED, EXECUTE, LEAF, LINK_RESERVED, NLB, NLS, OptionsError, READ,
        REFERENCED, RPN, VALID, WIDEST, WRITE,
    },
    memtype::{RadixAttrs, Storage},
    software::{HARDWARE, NOT_PRESENT, UPGRADABLE, USER, WriteState},
    transition::View,
};

/// What the machine is like. The default is a POWER9 as Linux runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RadixOptions {
    /// The smallest page.
    pub page: BasePage,
    /// Physical address bits: 32 to 57. (Linux goes to 53, `_PAGE_PA_MAX`; POWER9 has 51.)
    pub physical_bits: u8,
    /// ATT has strong access order: machines of Power ISA 3.0.
    pub strong_order: bool,
}

impl Default for RadixOptions {
    fn default() -> Self {
        Self { page: BasePage::K64, physical_bits: 53, strong_order: true }
    }
}

/// The format of the partition-scoped tree of one machine.
///
/// # Facts
///
/// The ISA lets a processor set R and C in the entry, or interrupt where they would have to be set. POWER9 interrupts, in both
/// scopes (its User's Manual, 4.10.13.1, as QEMU quotes it: "target/ppc: Generate storage interrupts for radix RC changes"; to
/// Linux that is `DSISR_SET_RC`, and `kvmppc_hv_handle_set_rc` sets them and retries). What POWER10 does was found nowhere. Here
/// `touch` sets them, as a processor of the other kind and the handler do; and as such a processor may do so until the flush, R and
/// C are read once more after it. That it may, in an entry that is invalid by then, rests on one comment of Linux's alone
/// (`RADIX_PTE_NONE_MASK`, older than any machine); no processor is known to do it.
///
/// # Where Linux does otherwise, and why
///
/// - **`change_pte` repoints.** Linux's `set_spte_gfn` for radix unmapped the page, and ignored the new one (until v6.10, which
///   removed it). What it had to do is what [`transition`](crate::transition) says.
/// - **A leaf of another page is never ORed in.** `kvmppc_create_pte` over a present leaf warns, and ORs the new entry into the
///   old one: two frame numbers become a third. Here a map over another output is a conflict, and nothing is written.
/// - **A larger leaf of which a part goes is split**, not lost whole.
/// - **Logging arms.** Linux logs by C alone; here write protection may be asked for too, and C is what a harvest reads.
#[derive(Debug, Clone)]
pub struct Radix {
    options: RadixOptions,
    geometry: Geometry,
}

impl Radix {
    /// The format for these options.
    ///
    /// # Errors
    /// [`OptionsError`], for what RPN cannot hold.
    pub fn new(options: RadixOptions) -> Result<Self, OptionsError> {
        let bits = options.physical_bits;
        if !(32..=WIDEST).contains(&bits) {
            return Err(OptionsError::PhysicalBits { bits });
        }
        Ok(Self { options, geometry: bits::geometry(options.page) })
    }

    /// What it was made from.
    pub fn options(&self) -> &RadixOptions {
        &self.options
    }

    /// The state of a leaf as to writing, `None` where its bits say something impossible.
    pub fn write_state(&self, raw: u64) -> Option<WriteState> {
        match (raw & UPGRADABLE != 0, raw & WRITE != 0) {
            (false, false) => Some(WriteState::ReadOnly),
            (true, false) => Some(WriteState::Armed),
            (true, true) => Some(WriteState::Writable),
            (false, true) => None,
        }
    }

    pub(crate) fn has_leaves(&self, level: Level) -> bool {
        level <= self.geometry.top() && self.geometry.level(level).leaf
    }

    /// RPN, without bits below the leaf's size.
    fn output(&self, level: Level, raw: u64) -> u64 {
        raw & RPN & !(self.geometry.span(level) - 1)
    }

    /// The table that a directory entry leads to, if it is one of a tree of this shape.
    fn linked(&self, level: Level, raw: u64) -> Option<OutputAddr> {
        let below = level.below().filter(|_| level <= self.geometry.top())?;
        let base = raw & NLB;
        let sized = raw & NLS == u64::from(self.geometry.level(below).bits);
        let bare = raw & (LEAF | LINK_RESERVED) == 0;
        let aligned = base & (self.geometry.table_bytes(below) as u64 - 1) == 0;
        let fits = base >> self.options.physical_bits == 0;
        (sized && bare && aligned && fits).then(|| OutputAddr::new(base))
    }

    fn check_leaf(&self, level: Level, output: OutputAddr) -> Result<u64, FormatError> {
        if !self.has_leaves(level) {
            return Err(FormatError::NoLeaf { number: self.level_number(level) });
        }
        bits::check_output(output, self.geometry.span(level), self.options.physical_bits)
    }

    fn is_armed(raw: u64) -> bool {
        raw & (UPGRADABLE | WRITE) == UPGRADABLE
    }

    /// What EAA grants: writing is reading too.
    fn granted(raw: u64) -> Access {
        let mut access = Access::empty();
        access.set(Access::READ, raw & (READ | WRITE) != 0);
        access.set(Access::WRITE, raw & WRITE != 0);
        access.set(Access::EXECUTE, raw & EXECUTE != 0);
        access
    }

    /// The leaf with these rights.
    fn put_access(raw: u64, access: Access, armed: bool) -> Result<u64, FormatError> {
        if access.writable() && !access.contains(Access::READ) {
            return Err(FormatError::Access { access });
        }
        let raw = raw & !(READ | WRITE | EXECUTE | UPGRADABLE);
        let raw = if access.contains(Access::READ) { raw | READ } else { raw };
        let raw = if access.contains(Access::EXECUTE) { raw | EXECUTE } else { raw };
        Ok(match (access.writable(), armed) {
            (false, _) => raw,
            (true, true) => raw | UPGRADABLE,
            (true, false) => raw | UPGRADABLE | WRITE,
        })
    }

    fn view(&self, level: Level, raw: u64) -> View {
        let granted = Self::granted(raw);
        let read = if granted.contains(Access::READ) { READ } else { 0 };
        View {
            target: self.output(level, raw) | (raw & ATT),
            rights: read | (raw & EXECUTE),
            writable: granted.writable(),
            upgradable: raw & UPGRADABLE != 0,
            changed: raw & CHANGED != 0,
        }
    }
}

impl Format for Radix {
    type Attrs = RadixAttrs;

    fn name(&self) -> &'static str {
        "ppc-radix"
    }

    fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// 1 for base pages, 2 for 2M, 3 for 1G, 4 for the root.
    fn level_number(&self, level: Level) -> i8 {
        bits::number_of(level)
    }

    fn not_present(&self, _level: Level) -> NotPresent {
        NOT_PRESENT
    }

    /// None: see [`software`](crate::software).
    fn claim_bit(&self) -> u64 {
        0
    }

    /// R and C, of leaves and of what was one until now. A directory entry has neither: its bit 8 is an address bit.
    fn hardware_bits(&self, _level: Level, raw: u64) -> u64 {
        if raw & (VALID | LEAF) == VALID { 0 } else { HARDWARE }
    }

    /// By V first, without R and C where it is clear. What is valid and not a leaf is a link only if it is exactly what
    /// [`Format::table`] makes: NLS of another tree, reserved bits, or a table inside another are special, and not followed.
    fn kind(&self, level: Level, raw: u64) -> Kind {
        if raw & VALID == 0 {
            return NOT_PRESENT.kind(raw, HARDWARE).unwrap_or(Kind::Special);
        }
        if raw & LEAF != 0 {
            return if self.has_leaves(level) { Kind::Leaf } else { Kind::Special };
        }
        self.linked(level, raw).map_or(Kind::Special, Kind::Table)
    }

    /// V, NLB and NLS: directory entries have no rights (Linux: `RADIX_PMD_VAL_BITS`).
    fn table(&self, level: Level, child: OutputAddr) -> Result<u64, FormatError> {
        let below = level.below().filter(|_| level <= self.geometry.top()).ok_or(FormatError::Attribute {
            value: u64::from(level.get()),
            rule: "links stand between level 2 and the root",
        })?;
        let align = self.geometry.table_bytes(below) as u64;
        let child = bits::check_output(child, align, self.options.physical_bits)?;
        Ok(VALID | child | u64::from(self.geometry.level(below).bits))
    }

    /// Each set of rights can be had but writing without reading, which EAA cannot say.
    fn leaf(&self, level: Level, spec: &LeafSpec<RadixAttrs>) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, spec.output)?;
        let storage = spec.attrs.storage;
        if storage == Storage::StrongOrder && !self.options.strong_order {
            let rule = "strong access order is reserved since Power ISA 3.1";
            return Err(FormatError::Attribute { value: storage as u64, rule });
        }
        let raw = VALID | LEAF | output | (storage as u64) << ATT_SHIFT;
        let raw = if spec.attrs.software { raw | USER } else { raw };
        let raw = if spec.accessed { raw | REFERENCED } else { raw };
        let raw = if spec.dirty { raw | CHANGED } else { raw };
        Self::put_access(raw, spec.access, spec.armed)
    }

    fn spec(&self, level: Level, raw: u64) -> LeafSpec<RadixAttrs> {
        let armed = Self::is_armed(raw);
        let granted = Self::granted(raw);
        LeafSpec {
            output: OutputAddr::new(self.output(level, raw)),
            access: if armed { granted | Access::WRITE } else { granted },
            armed,
            accessed: raw & REFERENCED != 0,
            dirty: raw & CHANGED != 0,
            attrs: RadixAttrs { storage: Storage::of(raw), software: raw & USER != 0 },
        }
    }

    /// What `change_pte` reaches: the leaf points at `output`, EAA\[2\] and upgradable are clear, so that the first write is a
    /// fault that asks the host; ATT, read, execute, the user's bit and R stay; C is clear, and was reported.
    fn set_spte(&self, level: Level, old: u64, output: OutputAddr) -> Result<u64, FormatError> {
        let output = self.check_leaf(level, output)?;
        Ok((self.write_protect(level, old, WriteProtect::Retain) & !RPN) | output)
    }

    fn with_access(&self, _level: Level, raw: u64, access: Access) -> Result<u64, FormatError> {
        Self::put_access(raw, access, Self::is_armed(raw))
    }

    /// To arm leaves C to the next harvest: it is a bit of its own, and who clears it has to flush.
    fn write_protect(&self, _level: Level, raw: u64, how: WriteProtect) -> u64 {
        match how {
            WriteProtect::Arm => raw & !WRITE,
            WriteProtect::Retain => raw & !(WRITE | UPGRADABLE | CHANGED),
        }
    }

    fn upgrade(&self, _level: Level, raw: u64) -> Option<u64> {
        Self::is_armed(raw).then_some(raw | WRITE)
    }

    fn is_young(&self, _level: Level, raw: u64) -> bool {
        raw & REFERENCED != 0
    }
    fn make_old(&self, _level: Level, raw: u64) -> u64 {
        raw & !REFERENCED
    }
    fn make_young(&self, _level: Level, raw: u64) -> u64 {
        raw | REFERENCED
    }

    fn is_dirty(&self, _level: Level, raw: u64) -> bool {
        raw & CHANGED != 0
    }
    fn make_clean(&self, _level: Level, raw: u64) -> u64 {
        raw & !CHANGED
    }

    /// By EAA; R and C are set. (That nothing is fetched from guarded storage is not EAA's to say: see
    /// [`memtype`](crate::memtype).)
    fn touch(&self, _level: Level, raw: u64, access: Access) -> Touch {
        if !Self::granted(raw).contains(access) {
            return Touch::Denied;
        }
        Touch::Allowed(raw | REFERENCED | if access.writable() { CHANGED } else { 0 })
    }

    fn split(&self, level: Level, raw: u64, index: usize) -> u64 {
        let Some(below) = level.below() else {
            return raw;
        };
        let index = index as u64 & (self.geometry.entries(below) as u64 - 1);
        let output = self.output(level, raw) | index << self.geometry.level(below).shift;
        (raw & !RPN) | output
    }

    /// `None` where the level has no leaves, or `child` is none or is not aligned to the larger leaf.
    fn collapse(&self, level: Level, child: u64) -> Option<u64> {
        let below = level.below()?;
        let leaf = self.has_leaves(level) && self.kind(below, child) == Kind::Leaf;
        (leaf && self.output(below, child) & (self.geometry.span(level) - 1) == 0).then_some(child)
    }

    fn merge_facts(&self, _into_level: Level, into: u64, _from_level: Level, from: u64) -> u64 {
        into | (from & HARDWARE)
    }

    /// See the table of [`transition`](crate::transition). Equal contents are no exemption.
    fn transition(&self, level: Level, old: u64, new: u64) -> Transition {
        match (self.kind(level, old), self.kind(level, new)) {
            (Kind::Leaf, Kind::Leaf) => self.view(level, old).become_leaf(self.view(level, new)),
            (Kind::Leaf, Kind::Table(_)) | (Kind::Table(_), Kind::Leaf) => Transition::BREAK,
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

    /// What was taken away and what is made in its place may not be in one TLB together.
    fn flushes_before_refill(&self) -> bool {
        true
    }

    /// R and C may come until the flush.
    fn late_facts(&self) -> bool {
        true
    }

    fn check(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.check_entry(level, raw)
    }

    /// Big-endian, whatever the host is.
    #[inline]
    fn memory_of(&self, raw: u64) -> u64 {
        raw.to_be()
    }
    #[inline]
    fn raw_of(&self, memory: u64) -> u64 {
        u64::from_be(memory)
    }
}
