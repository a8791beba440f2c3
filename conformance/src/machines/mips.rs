// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! The GPA table of 64-bit MIPS on QEMU's Malta board: walked by a refill handler, and by a hardware walker.
//!
//! Guest physical addresses are those of xuseg (useg), in kernel mode: EntryLo says nothing about modes, so that the guest's
//! accesses can be the stub's own, and no page of code has to be mapped. Table pages, sentinels and data are above 2 GiB, where the
//! board has all its memory; its first 256 MiB are at 0 too.
//!
//! | variants | processor | who walks |
//! |---|---|---|
//! | `mips64-refill-..`, `mips64el-refill-..` | I6400 | the stub's refill handler, as Linux's: pointer after pointer, then both entries of the pair shifted to EntryLo |
//! | `mips32-walker-..`, `mips32el-walker-..` | P5600 | the processor (PWBase, PWField, PWSize, PWCtl) |
//!
//! # How a 32-bit walker walks entries of 64 bits
//! QEMU has the walker for 32-bit processors alone. There PWSize.PS is 0, pointers have 32 bits, and PWSize.PTEW = 1 makes entries
//! of tables of pages twice as large: the 64-bit ones of this format. Entries of directories become so too where PWCtl.HugePg is set as
//! well (QEMU: `page_table_walk_refill`, `directory_mop`). Bit PSn of a directory entry then says that it is a page and no link: PSn
//! is 0 here, a bit that no link has, as tables are aligned. Of a link the processor takes the lower 32 bits as an address. A link is
//! an address in xkphys, 0x9800_0000_8123_4000 say, and its lower half is one of kseg0, which stands for physical
//! 0x0123_4000: on this board the same memory as 0x8123_4000. So one table serves both kinds of processors, as long as its pages are
//! between 2 and 2.25 GiB. That HugePg widens directories, and that the upper half of a link is dropped, is what QEMU does; no
//! manual's text was at hand. Without PTEW, or without HugePg, this walker reads half an entry: no layout of this format is for that.
//!
//! Guest addresses have 31 bits then; indices above them are always 0, of which the widest tables have some. EntryLo has PFN
//! from bit 6 on, with RI and XI in bits 31 and 30: 36 bits of physical addresses. Without RI and XI there is no variant: see
//! [`GpaOptions::rixi`].
//!
//! # What faults say
//! ExcCode (MIPS64 PRA, volume III, "Cause Register"): 1 Mod, 19 TLBRI, 20 TLBXI mean that V is set and the right is not
//! there: denied. 2 TLBL and 3 TLBS, other than refills, mean that V is clear: absent, or old. Hardware does not tell these apart,
//! the table does. A leaf without any right has V, and its accesses end in 19, 20 and 1. BadVAddr is the whole address; a TLBL was for
//! a fetch where EPC is the same. No level is reported, as leaves are at one level only.
//!
//! An exception within the refill handler means that a directory led it astray (TLBL at an address of a mapped segment, AdEL at
//! physical addresses that the processor does not have, DBE): misconfigured, and the level is known. Of the walker's troubles the
//! processor says no more than that it was a refill after all.
//!
//! # What is cached
//! Pairs stay in the TLB across exits, invalid halves too: a flush that is missing shows. The stub's exception handlers do nothing
//! about that. Whoever resolved a trap drops the pair, [`tlb::filled`], before the guest goes on: [`Machine::refresh`] and
//! [`Machine::installed`] for one access, [`Machine::resume`] for a guest at work; so these steps are tested too.
//!
//! What cannot show: a flush of a link that is missing, as neither handler nor walker keeps what it read of directories; other
//! processors; GuestIDs; cache attributes.
//!
//! There are no GuestIDs (QEMU has no VZ): a guest's number is the root's ASID. The one vCPU is out when a flush is carried out, so
//! that [`Step::Kick`] has nothing left to do.

use std::fmt::Write;
use std::sync::Arc;

use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Format, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_mips::tlb::{self, EntryLo, unique_entry_hi};
use spte_mips::{
    Cache, GpaAttrs, GpaOptions, GpaTable, PageSize, Pair, Processor, PteLayout, PwBase, PwCtl, PwField, PwSize, Step,
    Steps, TlbFeatures, WalkShape, Width,
};
use spte_model::{Access, MemType, Shape, TouchKind};

use crate::emulator::{Assembler, Emulator, Lost, Tool, Tools, Workshop};
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Leniency, Machine, Work};
use crate::mailbox::{MOST_PAIRS, Mailbox, Results};
use crate::memory::{self, Memory, Region};

/// Where the board has its memory; the first 256 MiB are at 0 as well.
const RAM: u64 = 0x8000_0000;
const RAM_BYTES: u64 = 128 << 20;
/// An EntryHi for each TLB index, for the stub.
const UNIQUE: u64 = RAM + 0x4000;
const INDICES: u16 = 64;
const MAILBOX: u64 = RAM + 0x3_0000;
const SCRATCH: u64 = RAM + 0x4_0000;
/// In the scratch page.
const KICK: u64 = 0x100;
const SENTINELS: u64 = RAM + 0x10_0000;
const TABLES: u64 = RAM + 0x100_0000;
const DATA: u64 = RAM + 0x400_0000;
/// Of the format's.
const DATA_PAGES: u64 = 0x400;

const PACKAGE: &str = "binutils-mips64-linux-gnuabi64";
const PREFIX: [&str; 3] = ["mips64-linux-gnuabi64-as", "mips64-linux-gnuabi64-ld", "mips64-linux-gnuabi64-objcopy"];
const BIG64: Assembler = Assembler {
    prefix: PREFIX,
    package: PACKAGE,
    options: &["-mips64r6", "-mabi=64", "-EB"],
    link: &["-EB", "-m", "elf64btsmip"],
};
const LITTLE64: Assembler =
    Assembler { options: &["-mips64r6", "-mabi=64", "-EL"], link: &["-EL", "-m", "elf64ltsmip"], ..BIG64 };
const BIG32: Assembler =
    Assembler { options: &["-mips32r5", "-mabi=32", "-EB"], link: &["-EB", "-m", "elf32btsmip"], ..BIG64 };
const LITTLE32: Assembler =
    Assembler { options: &["-mips32r5", "-mabi=32", "-EL"], link: &["-EL", "-m", "elf32ltsmip"], ..BIG64 };

/// A byte order that there is a machine for.
pub trait ByteOrder: spte_mips::ByteOrder {
    /// Lowest first.
    const LITTLE: bool;
}

impl ByteOrder for spte_mips::BigEndian {
    const LITTLE: bool = false;
}

impl ByteOrder for spte_mips::LittleEndian {
    const LITTLE: bool = true;
}

/// One set-up of the format, and who walks it.
#[derive(Debug, Clone)]
pub struct Variant {
    /// What it is called.
    pub name: String,
    /// What the format is made of.
    pub options: GpaOptions,
    /// A 32-bit processor's walker, not a refill handler.
    pub walker: bool,
}

/// Every page size, width and layout, with and without RI and XI; of the walker what it can reach.
pub fn variants<O: ByteOrder>() -> Vec<Variant> {
    let plain = GpaOptions { sentinels: OutputAddr::new(SENTINELS), ..GpaOptions::default() };
    let wide = GpaOptions { width: Width::Wide, ..plain };
    let (k16, k64) = (PageSize::K16, PageSize::K64);
    let (huge, splitting) = (PteLayout::Huge, PteLayout::HugeSplitting);
    let without = GpaOptions { rixi: false, ..plain };
    let refilled = [
        ("4k", plain),
        ("4k-wide", GpaOptions { layout: huge, ..wide }),
        ("4k-splitting", GpaOptions { layout: splitting, table_cache: Cache::Uncached, ..plain }),
        ("4k-no-rixi", GpaOptions { layout: splitting, ..without }),
        ("16k", GpaOptions { page: k16, ..plain }),
        ("16k-wide", GpaOptions { page: k16, layout: huge, ..wide }),
        ("64k", GpaOptions { page: k64, layout: huge, ..plain }),
        ("64k-wide", GpaOptions { page: k64, ..wide }),
        ("64k-no-rixi", GpaOptions { page: k64, ..without }),
    ];
    let plain = GpaOptions { physical_bits: 36, ..plain };
    let walked = [
        ("4k", plain),
        ("4k-wide", GpaOptions { layout: huge, width: Width::Wide, ..plain }),
        ("4k-splitting", GpaOptions { layout: splitting, ..plain }),
        ("16k", GpaOptions { page: k16, ..plain }),
        ("16k-wide", GpaOptions { page: k16, layout: huge, width: Width::Wide, ..plain }),
        ("64k", GpaOptions { page: k64, layout: huge, ..plain }),
    ];
    let order = if O::LITTLE { "el" } else { "" };
    let refilled = refilled.map(|(name, options)| (format!("mips64{order}-refill-{name}"), options, false));
    let walked = walked.map(|(name, options)| (format!("mips32{order}-walker-{name}"), options, true));
    let all = refilled.into_iter().chain(walked);
    all.map(|(name, options, walker)| Variant { name, options, walker }).collect()
}

/// QEMU's Malta board.
#[derive(Debug)]
pub struct Mips<O: ByteOrder> {
    variant: Variant,
    format: GpaTable<O>,
    features: TlbFeatures,
    ground: Ground,
    mailbox: Mailbox,
    emulator: Emulator,
    /// Where the guest at work trapped, until it goes on.
    trapped: Option<u64>,
}

impl<O: ByteOrder> Mips<O> {
    /// Starts one.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn start(tools: &Tools, variant: Variant) -> Result<Self, Lost> {
        let Variant { options, walker, .. } = variant;
        let format = GpaTable::<O>::new(options).map_err(|error| Lost::Needs(error.to_string()))?;
        let mut qemu = tools.qemu(qemu(O::LITTLE, walker))?;
        let workshop = Workshop::new()?;
        let order = if O::LITTLE { memory::ByteOrder::Little } else { memory::ByteOrder::Big };
        let region = Region { output: RAM, bytes: RAM_BYTES, offset: 0 };
        let memory = Arc::new(Memory::new(&[region], order)?);
        let (assembler, stub, address) = match (walker, O::LITTLE) {
            (false, false) => (&BIG64, include_str!("../../stubs/mips64.S"), 0xffff_ffff_8000_0000),
            (false, true) => (&LITTLE64, include_str!("../../stubs/mips64.S"), 0xffff_ffff_8000_0000),
            (true, false) => (&BIG32, include_str!("../../stubs/mips32.S"), 0x8000_0000),
            (true, true) => (&LITTLE32, include_str!("../../stubs/mips32.S"), 0x8000_0000),
        };
        let stub = format!("{}{stub}", described(&format));
        memory.write(RAM, &workshop.assemble(tools, assembler, "mips", &stub, address)?);
        for index in 0..INDICES {
            // Little-endian ones do as if they had no TLBINV.
            let unique = unique_entry_hi(options.page, index, !O::LITTLE);
            let unique = unique.ok_or_else(|| Lost::Needs("an EntryHi for each index".to_owned()))?;
            memory.store(UNIQUE + 8 * u64::from(index), unique);
        }
        fill_sentinels(&format, &memory);
        let boot = include_str!("../../stubs/mips_boot.S");
        let boot = workshop.assemble(tools, &BIG64, "mips_boot", boot, 0xffff_ffff_bfc0_0000)?;
        let boot = workshop.write("boot", &boot)?;
        qemu.args(["-M", "malta,memory-backend=m", "-m", "128M", "-cpu", if walker { "P5600" } else { "I6400" }]);
        let path = memory.path();
        qemu.args(["-object", &format!("memory-backend-file,id=m,size=128M,mem-path={path},share=on")]);
        qemu.arg("-bios").arg(boot);
        let emulator = Emulator::start(qemu, workshop)?;
        // An address of no particular kind, far from the ends.
        let gpa = 5 << (gpa_bits(&variant) - 3) | 0x234_0000;
        let access = if options.rixi { Access::RW } else { Access::RWX };
        let ground = Ground {
            memory: Arc::clone(&memory),
            tables: TABLES..DATA,
            data: DATA..DATA + DATA_PAGES * options.page.bytes(),
            fixed: vec![Fixed { gpa, output: SCRATCH, access }],
            kick: SCRATCH + KICK,
        };
        let features = TlbFeatures { walker, ..TlbFeatures::default() };
        Ok(Self { variant, format, features, ground, mailbox: Mailbox::new(memory, MAILBOX), emulator, trapped: None })
    }

    /// The TLB's entry for the pair of pages around `gpa`, where it has one; without bits that the processor does not keep.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn cached(&mut self, gpa: u64) -> Result<Option<Pair>, Lost> {
        let [index, entry_hi, page_mask, even, odd, ..] =
            self.mailbox.call(&mut self.emulator, 6, &[self.format.vpn2(gpa)])?;
        if index & 1 << 31 != 0 {
            return Ok(None);
        }
        let half = |raw: u64| {
            let wide = raw & 0x3fff_ffff | raw >> 30 << 62;
            EntryLo::from_raw(if self.variant.walker { wide } else { raw })
        };
        // Without the ASID, and without address bits inside the pair, which QEMU keeps.
        Ok(Some(Pair { entry_hi: entry_hi & !(page_mask | 0x1fff), page_mask, even: half(even), odd: half(odd) }))
    }

    /// What the format's crate says that belongs into the TLB for that pair.
    pub fn pair(&self, gpa: u64, even: u64, odd: u64) -> Pair {
        self.format.pair(gpa, even, odd)
    }

    fn steps<'a>(&mut self, steps: impl IntoIterator<Item = Step> + 'a) -> Result<(), Lost> {
        let steps = steps.into_iter().filter(|step| *step != Step::Kick).map(operation);
        let steps = steps.collect::<Result<Vec<_>, _>>()?;
        for part in steps.chunks(MOST_PAIRS) {
            self.mailbox.list(part);
            self.mailbox.call(&mut self.emulator, 2, &[part.len() as u64])?;
        }
        Ok(())
    }

    fn exit(&self, results: &Results) -> Result<Exit, Lost> {
        let [value, code, bad, epc, walking, _, refilled, _] = *results;
        let syndrome = format!("ExcCode {}, BadVAddr {bad:#x}, EPC {epc:#x}, walk {walking}", code & 0x1f);
        let fault = |class, kind, at, level| {
            Ok(Exit::Fault(Fault { class, at: Some(at), blind: 0, level, kind, syndrome: syndrome.clone() }))
        };
        // In the handler, and not in the guest.
        if walking != 0 && code & 0x100 != 0 {
            let (at, level) = match self.variant.walker {
                true => (bad, None),
                false => (refilled, self.format.level_of(walking as i8 + 1)),
            };
            return fault(Class::Misconfigured, None, at, level);
        }
        let loaded = if bad == epc { TouchKind::Execute } else { TouchKind::Read };
        match code {
            0 => Ok(Exit::Done { value }),
            2 => Ok(Exit::Kicked),
            0x101 => fault(Class::Denied, Some(TouchKind::Write), bad, None),
            0x102 => fault(Class::Absent, Some(loaded), bad, None),
            0x103 => fault(Class::Absent, Some(TouchKind::Write), bad, None),
            0x113 => fault(Class::Denied, Some(TouchKind::Read), bad, None),
            0x114 => fault(Class::Denied, Some(TouchKind::Execute), bad, None),
            // Bus errors leave BadVAddr alone, and that of data may be a store's.
            0x106 | 0x107 => {
                let kind = (code == 0x106).then_some(TouchKind::Execute);
                Ok(Exit::Fault(Fault { class: Class::Other, at: None, blind: 0, level: None, kind, syndrome }))
            }
            0x104 => fault(Class::Other, Some(loaded), bad, None),
            0x105 => fault(Class::Other, Some(TouchKind::Write), bad, None),
            _ => Err(Lost::Answer(syndrome)),
        }
    }
}

/// Where accesses go through what the rules refuse: each of these leads elsewhere, and nothing says so.
const HANDLER: &[Leniency] = &[
    Leniency {
        rule: "which EntryLo does not keep",
        bits: u64::MAX,
        only: None,
        why: "EntryLo drops address bits that the processor does not have (MIPS64 PRA, \"EntryLo0, EntryLo1\", PFN)",
    },
    Leniency {
        rule: "frame bits below the page size are zero",
        bits: u64::MAX,
        only: None,
        why: "PFN bits that PageMask covers are not looked at (MIPS64 PRA, \"PageMask Register\"; QEMU: r4k_fill_tlb)",
    },
    Leniency {
        rule: "a table is aligned to its page",
        bits: u64::MAX,
        only: None,
        why: "a handler adds the index to the link, whatever it is, and release 6 loads words that are not aligned",
    },
];

/// See [`HANDLER`].
const WALKER: &[Leniency] = &[
    HANDLER[0],
    HANDLER[1],
    Leniency {
        rule: "a link is an address of an unmapped segment",
        bits: u64::MAX,
        only: None,
        why: "a 32-bit walker takes the lower half of a link",
    },
    Leniency {
        rule: "address bits above the physical address width (an address error)",
        bits: u64::MAX,
        only: None,
        why: "a 32-bit walker takes the lower half of a link",
    },
];

/// The emulator for a byte order and a processor.
const fn qemu(little: bool, walker: bool) -> Tool {
    let name = match (walker, little) {
        (false, false) => "qemu-system-mips64",
        (false, true) => "qemu-system-mips64el",
        (true, false) => "qemu-system-mips",
        (true, true) => "qemu-system-mipsel",
    };
    Tool { name, package: "qemu-system-mips" }
}

/// How many bits guest addresses have: the table's, as far as the processor has them.
fn gpa_bits(variant: &Variant) -> u32 {
    match (variant.options.page, variant.options.width) {
        _ if variant.walker => 31,
        (PageSize::K4, Width::Standard) => 40,
        (PageSize::K16, Width::Standard) => 36,
        (PageSize::K64, Width::Standard) => 42,
        (_, Width::Wide) => 48,
    }
}

/// What a stub has to know of the table, in the assembler's words.
fn described<O: ByteOrder>(format: &GpaTable<O>) -> String {
    let GpaOptions { page, layout, rixi, .. } = *format.options();
    let geometry = format.geometry();
    let set = [
        ("PAGE_SHIFT", u64::from(page.shift())),
        ("PAIR_BITS", u64::from(geometry.level(Level::LEAF).bits) - 1),
        ("ENTRY_SHIFT", u64::from(layout.global_shift())),
        ("RIXI", u64::from(rixi)),
        ("PAGE_MASK", page.page_mask()),
        ("LOW", if O::LITTLE { 0 } else { 4 }),
    ];
    let mut text = String::new();
    for (name, value) in set {
        let _ = writeln!(text, "\t.equ {name}, {value}");
    }
    text.push_str("\t.macro directories\n");
    let directories: Vec<Level> = geometry.levels().skip(1).collect();
    for level in directories.into_iter().rev() {
        let shape = geometry.level(level);
        let _ = writeln!(text, "\tdirectory {}, {}, {}", level.get(), shape.shift, shape.bits);
    }
    text.push_str("\t.endm\n");
    text
}

/// The tables that hold nothing.
fn fill_sentinels<O: ByteOrder>(format: &GpaTable<O>, memory: &Memory) {
    let sentinels = format.sentinels();
    let (start, bytes) = (sentinels.start().as_u64(), format.options().page.bytes());
    for index in 0..sentinels.pages() {
        if let Some(raw) = sentinels.fill(index) {
            let page = start + index * bytes;
            (page..page + bytes).step_by(8).for_each(|at| memory.store(at, raw));
        }
    }
}

/// As the stubs number them.
fn operation(step: Step) -> Result<(u64, u64), Lost> {
    match step {
        Step::Sync => Ok((0, 0)),
        Step::DropPair(entry_hi) => Ok((1, entry_hi)),
        Step::MarkAsids => Ok((2, 0)),
        Step::StopWalker => Ok((3, 0)),
        Step::StartWalker => Ok((4, 0)),
        // These belong to features that the machine does not have; of a kick nothing is left to do.
        Step::SelectGuest | Step::SelectRoot | Step::DropGuestIds | Step::DropInstructions | Step::Kick => {
            Err(Lost::Needs(format!("a machine for {step:?}")))
        }
    }
}

impl<O: ByteOrder> Machine for Mips<O> {
    type Format = GpaTable<O>;

    fn name(&self) -> &str {
        &self.variant.name
    }

    fn driven(&self) -> Driven<GpaTable<O>> {
        let GpaOptions { page, physical_bits, rixi, .. } = self.variant.options;
        let shape = Shape::new(&[page.bytes()], gpa_bits(&self.variant), physical_bits.into());
        let shape = shape.unwrap_or_else(|error| panic!("{}: {error}", self.variant.name));
        let shape = if rixi { shape } else { shape.with_access(&[Access::RWX, Access::RX]) };
        Driven { format: self.format.clone(), shape, attrs }
    }

    fn ground(&self) -> &Ground {
        &self.ground
    }

    fn code(&self, number: u16) -> [u8; 16] {
        // JR $31; in its delay slot ORI $2, $0, number. (JALR $0, $31: release 6 has no JR.)
        let mut code = [0; 16];
        for (place, word) in code.chunks_exact_mut(4).zip([0x03e0_0009, 0x3402_0000 | u32::from(number)]) {
            place.copy_from_slice(&if O::LITTLE { word.to_le_bytes() } else { word.to_be_bytes() });
        }
        code
    }

    fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.format.check_hardware(level, raw)
    }

    fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        self.format.hardware_kind(level, raw)
    }

    fn caches(&self) -> bool {
        true
    }

    fn tells_old(&self) -> bool {
        false
    }

    fn keeps_absent(&self) -> bool {
        true
    }

    fn leniencies(&self) -> &'static [Leniency] {
        if self.variant.walker { WALKER } else { HANDLER }
    }

    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost> {
        let register = |error: spte_mips::RegisterError| Lost::Needs(error.to_string());
        let base = PwBase::new(&self.format, root).map_err(register)?.raw();
        let mut arguments = vec![base];
        if self.variant.walker {
            let processor = Processor::Bits32;
            let shape = WalkShape { wide_entries: true, wide_pointers: false, ..WalkShape::new(&self.format) };
            let ctl = PwCtl::from_raw(PwCtl::ENABLE | PwCtl::HUGE, processor).map_err(register)?;
            arguments.extend([
                PwField::new(&shape, processor).map_err(register)?.raw(),
                PwSize::new(&shape, processor).map_err(register)?.raw(),
                ctl.raw(),
            ]);
        }
        let results = self.mailbox.call(&mut self.emulator, 1, &arguments)?;
        let [_, config3, config4, page_grain, registers @ ..] = results;
        let has = [
            ("Config3.RXI", config3 >> 12 & 1 != 0),
            ("Config4.IE", config4 >> 29 & 3 != 0),
            ("PageGrain.RIE, XIE and IEC", page_grain & 0xc800_0000 == 0xc800_0000),
            ("Config3.PW", !self.variant.walker || config3 >> 24 & 1 != 0),
            ("these values of PWField, PWSize and PWCtl", !self.variant.walker || registers[..3] == arguments[1..]),
        ];
        match has.iter().find(|(_, has)| !has) {
            Some((name, _)) => Err(Lost::Needs(format!("this processor has no {name}"))),
            None => Ok(()),
        }
    }

    fn access(&mut self, access: GuestAccess) -> Result<Exit, Lost> {
        let kind = match access.kind {
            TouchKind::Read => 0,
            TouchKind::Write => 1,
            TouchKind::Execute => 2,
        };
        let results = self.mailbox.call(&mut self.emulator, 3, &[access.at, kind, access.value])?;
        self.exit(&results)
    }

    fn flush(&mut self, request: &FlushRequest<'_>) -> Result<(), Lost> {
        let format = self.format.clone();
        self.steps(Steps::new(&format, self.features, request))
    }

    fn refresh(&mut self, at: u64, _: Level) -> Option<Result<(), Lost>> {
        Some(self.installed(at))
    }

    fn installed(&mut self, at: u64) -> Result<(), Lost> {
        let steps = tlb::filled(&self.format, self.features, at);
        self.steps(steps)
    }

    fn run(&mut self, work: Work) -> Result<(), Lost> {
        let kick = self.ground.fixed[0].gpa + KICK;
        self.mailbox.ask(4, &[work.first, work.pages, work.stride, work.written, work.counts, kick]);
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Exit>, Lost> {
        self.emulator.alive()?;
        let exit = self.mailbox.answer().map(|results| self.exit(&results)).transpose()?;
        if let Some(Exit::Fault(fault)) = &exit {
            self.trapped = fault.at;
        }
        Ok(exit)
    }

    fn resume(&mut self) -> Result<(), Lost> {
        // Not only what was mapped: rights that were raised too.
        if let Some(at) = self.trapped.take() {
            self.installed(at)?;
        }
        self.mailbox.ask(5, &[]);
        Ok(())
    }
}

fn attrs(mem: MemType) -> Option<GpaAttrs> {
    let cache = match mem {
        MemType::Wb => Cache::NonCoherent,
        MemType::Uc => Cache::Uncached,
        MemType::Wc => Cache::UncachedAccelerated,
        MemType::Wt => Cache::WriteThrough,
    };
    Some(GpaAttrs { cache })
}
