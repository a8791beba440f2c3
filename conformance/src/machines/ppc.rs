// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Partition-scoped radix trees of POWER9, walked by QEMU's `powernv9` machine with a stub in hypervisor state.
//!
//! The guest runs in real mode, so that its effective addresses are guest real ones. A fault is a hypervisor data or instruction
//! storage interrupt (Power ISA 3.0B, Book III, 6.5.16 and 6.5.17): HDSISR and, for fetches, HSRR1 say the class, ASDR the
//! guest real page; HDAR or HSRR0 has to say the same one, and has the offset in it too. No register says the level.
//!
//! | IBM bit of HDSISR, HSRR1 | | class |
//! |---|---|---|
//! | 33 | no translation was found | [`Class::Absent`] |
//! | 36; of HSRR1 35 too, no execute or guarded | the access is not allowed | [`Class::Denied`] |
//! | 45 | R or C is not set, and software has to | [`Class::Old`] |
//! | 44 | unsupported configuration of the tree | [`Class::Misconfigured`] |
//! | 38 (HDSISR) | it was a store | |
//!
//! QEMU 7.2 sets R and C itself, as the ISA allows, where POWER9 interrupts (and QEMU since 011dd5ecf226, which [`Ppc::start`]
//! refuses): here the machine is one of the first kind. Both are kept with what is cached: a leaf that is cached sets none again. It
//! loads the entry, and stores it with R and C as the walk ends: what changes in between, some nanoseconds, is overwritten (one of
//! 60,000 bits that were set meanwhile). So facts that a guest at work loses are looked for a second time ([`Machine::sets_facts_at_once`]).
//!
//! What the guest uses is cached, so that a flush that is missing shows. What cannot:
//! - links are not cached, so that no invalidation of the page-walk cache is missed (that they are valid forms is seen);
//! - an invalidation by address drops what lies in one large leaf with that address, whatever AP it has, as long as it begins
//!   in the leaf; one that has an AP too large may leave it;
//! - LPID and PRS are not looked at: an invalidation for another partition does for this one.

use std::sync::Arc;

use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Format, FormatError, LeafSpec, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_model::{Access, MemType, Shape, TouchKind};
use spte_ppc::tlb::INSTALLED;
use spte_ppc::{
    BasePage, PartitionEntry, Ptcr, Radix, RadixAttrs, RadixOptions, RegisterError, Ric, Step, Steps, Storage,
    TlbFixes, Tlbie,
};

use crate::emulator::{Assembler, Emulator, Lost, Tool, Tools, Workshop};
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Leniency, Machine, Work};
use crate::mailbox::{MOST_PAIRS, Mailbox, Results};
use crate::memory::{ByteOrder, Memory, Region};

const RAM_BYTES: u64 = 1 << 30;
const STUB: u64 = 0;
const MAILBOX: u64 = 0x3_0000;
const PARTITIONS: u64 = 0x4_0000;
const CODE: u64 = 0x6_0000;
const SCRATCH: u64 = 0x7_0000;
// The machine leaves a device tree at 16 MiB.
const TABLES: u64 = 0x400_0000;
const DATA: u64 = RAM_BYTES - (64 << 20);
/// Offsets in the code page.
const LOAD: u64 = 0;
const STORE: u64 = 8;
const CALL: u64 = 4;
const FETCH: u64 = u64::MAX;
const KICK: u64 = 0x7f8;
/// The partition. 0 is the hypervisor's own.
const LPID: u32 = 1;
/// log2 of the partition table's bytes, as POWER9 wants it.
const PARTITIONS_LOG2: u8 = 16;
/// UPRT, HR and GTSE: a radix host, as Linux runs one.
const LPCR: u64 = 1 << 22 | 1 << 20 | 1 << 10;
/// POWER9 has so many physical address bits.
const PHYSICAL_BITS: u8 = 51;

/// IBM bit `number` of a register.
const fn bit(number: u32) -> u64 {
    1 << (63 - number)
}

const NO_TRANSLATION: u64 = bit(33);
const NO_EXECUTE: u64 = bit(35);
const PROTECTION: u64 = bit(36);
const IS_STORE: u64 = bit(38);
const CONFIGURATION: u64 = bit(44);
const FACTS: u64 = bit(45);
const CAUSES: u64 = NO_TRANSLATION | NO_EXECUTE | PROTECTION | CONFIGURATION | FACTS | bit(46);

const QEMU: Tool = Tool { name: "qemu-system-ppc64", package: "qemu-system-ppc" };
const ASSEMBLER: Assembler = Assembler {
    prefix: ["powerpc64-linux-gnu-as", "powerpc64-linux-gnu-ld", "powerpc64-linux-gnu-objcopy"],
    package: "binutils-powerpc64-linux-gnu",
    options: &["-mpower9", "-mbig", "-a64"],
    link: &[],
};

/// What QEMU 7.2 does otherwise than the rules say. (The ISA: Power ISA 3.0B, Book III, "Radix Tree Translation"; trees that there are:
/// POWER9 User's Manual, 4.10.4.1.)
const LENIENCIES: [Leniency; 7] = [
    Leniency {
        rule: "of a directory entry are reserved",
        bits: u64::MAX,
        only: None,
        why: "reserved bits of a directory entry are ignored (ISA, the figure of a page directory entry)",
    },
    Leniency {
        rule: "of a leaf are reserved",
        bits: u64::MAX,
        only: None,
        why: "reserved bits of a leaf are ignored (ISA, the figure of a page table entry)",
    },
    Leniency {
        rule: "a table is aligned to its own size",
        bits: u64::MAX,
        only: None,
        why: "bits of NLB below the size of the table are left out (ISA, NLB)",
    },
    Leniency {
        rule: "this level has no leaves",
        bits: u64::MAX,
        only: None,
        why: "a leaf of 512G is one (the Manual's trees have pages of 4K, 64K, 2M and 1G)",
    },
    Leniency {
        rule: "above the physical address width",
        bits: u64::MAX,
        only: None,
        why: "an address beyond the 51 bits of the processor is no interrupt: where nothing is, nothing is read",
    },
    Leniency { rule: "", bits: 1 << 4, only: Some((&[TouchKind::Execute], Class::Denied)), why: GUARDED },
    Leniency { rule: "", bits: 1 << 5, only: Some((&[TouchKind::Execute], Class::Denied)), why: GUARDED },
];
const GUARDED: &str =
    "nothing is fetched from storage whose ATT is 2, whatever EAA says: it is guarded (ISA, ATT), and so no leniency";

/// One set-up of the format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variant {
    /// The smallest page.
    pub page: BasePage,
}

/// Both base pages.
pub fn variants() -> Vec<(&'static str, Variant)> {
    [BasePage::K4, BasePage::K64].map(|page| (Variant { page }.name(), Variant { page })).to_vec()
}

impl Variant {
    const fn name(self) -> &'static str {
        match self.page {
            BasePage::K4 => "ppc-radix-4k",
            BasePage::K64 => "ppc-radix-64k",
        }
    }
}

/// QEMU's `powernv9` machine.
#[derive(Debug)]
pub struct Ppc {
    variant: Variant,
    format: Radix,
    ground: Ground,
    mailbox: Mailbox,
    emulator: Emulator,
}

impl Ppc {
    /// Starts one.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn start(tools: &Tools, variant: Variant) -> Result<Self, Lost> {
        let options = RadixOptions { page: variant.page, physical_bits: PHYSICAL_BITS, strong_order: true };
        let format = Radix::new(options).map_err(|error| Lost::Needs(error.to_string()))?;
        let mut qemu = tools.qemu(QEMU)?;
        let workshop = Workshop::new()?;
        let region = Region { output: 0, bytes: RAM_BYTES, offset: 0 };
        let memory = Arc::new(Memory::new(&[region], ByteOrder::Big)?);
        let stub = workshop.assemble(tools, &ASSEMBLER, "ppc", include_str!("../../stubs/ppc.S"), STUB)?;
        let guest = include_str!("../../stubs/ppc_guest.S");
        memory.write(CODE, &workshop.assemble(tools, &ASSEMBLER, "ppc_guest", guest, 0)?);
        qemu.args(["-M", "powernv9,memory-backend=m", "-m", "1G", "-bios"]).arg(workshop.write("rom", &stub)?);
        let path = memory.path();
        qemu.args(["-object", &format!("memory-backend-file,id=m,size=1G,mem-path={path},share=on")]);
        let emulator = Emulator::start(qemu, workshop)?;
        let page = variant.page.bytes();
        // An address of no particular kind, far from the ends.
        let gpa = 5 << 49 | 0x2340_0000;
        let ground = Ground {
            memory: Arc::clone(&memory),
            tables: TABLES..DATA,
            data: DATA..RAM_BYTES,
            fixed: vec![
                Fixed { gpa, output: CODE, access: Access::RX },
                Fixed { gpa: gpa + page, output: SCRATCH, access: Access::RW },
            ],
            kick: CODE + KICK,
        };
        let mut machine = Self { variant, format, ground, mailbox: Mailbox::new(memory, MAILBOX), emulator };
        machine.sets_referenced()?;
        Ok(machine)
    }

    /// Whether the machine sets R itself: the guest runs through a leaf that is old.
    fn sets_referenced(&mut self) -> Result<(), Lost> {
        let format = |error: FormatError| Lost::Needs(error.to_string());
        let (memory, gpa) = (Arc::clone(&self.ground.memory), self.code_page());
        let geometry = self.format.geometry();
        let spec = LeafSpec {
            output: OutputAddr::new(CODE),
            access: notifier_core::Access::RWX,
            armed: false,
            accessed: false,
            dirty: false,
            attrs: RadixAttrs::default(),
        };
        // From the leaf up; each table in 64K of its own.
        let (mut level, mut entry, mut table) =
            (Level::LEAF, self.format.leaf(Level::LEAF, &spec).map_err(format)?, TABLES);
        loop {
            memory.store(table + 8 * geometry.index(level, gpa) as u64, entry);
            let Some(above) = level.above().filter(|above| *above <= geometry.top()) else { break };
            entry = self.format.table(above, OutputAddr::new(table)).map_err(format)?;
            (level, table) = (above, table + 0x1_0000);
        }
        self.begin(OutputAddr::new(table))?;
        match self.access(GuestAccess { at: gpa + CALL, kind: TouchKind::Execute, value: 0 })? {
            Exit::Done { .. } => Ok(()),
            Exit::Fault(fault) if fault.class == Class::Old => Err(Lost::Needs(format!(
                "this QEMU interrupts where R is not set, as POWER9 does; here are tests for one that sets it (7.2): {fault}"
            ))),
            other => Err(Lost::Answer(format!("{other:?} of the code page"))),
        }
    }

    fn code_page(&self) -> u64 {
        self.ground.fixed[0].gpa
    }

    /// Executes these, and nothing else.
    ///
    /// # Errors
    /// [`Lost`]: of [`Lost::Answer`] too, where the machine refuses an operand.
    pub fn steps(&mut self, steps: impl IntoIterator<Item = Step>) -> Result<(), Lost> {
        let steps: Vec<(u64, u64)> = steps.into_iter().map(operation).collect();
        for part in steps.chunks(MOST_PAIRS) {
            self.mailbox.list(part);
            let results = self.mailbox.call(&mut self.emulator, 2, &[part.len() as u64])?;
            if results[1] != 0 {
                return Err(odd(&results));
            }
        }
        Ok(())
    }
}

/// As `operations` in the stub has them.
fn operation(step: Step) -> (u64, u64) {
    match step {
        Step::Ptesync => (0, 0),
        Step::Eieio => (1, 0),
        Step::Tlbsync => (2, 0),
        Step::Tlbie(Tlbie { rb, rs, ric }) => {
            let operation = match ric {
                Ric::Tlb => 3,
                Ric::PageWalk => 4,
                Ric::All => 5,
            };
            (operation | rs << 8, rb)
        }
    }
}

fn registers(results: &Results) -> String {
    let [_, vector, _, hdsisr, hdar, asdr, hsrr0, hsrr1] = *results;
    format!(
        "interrupt {vector:#x}, HDSISR {hdsisr:#x}, HDAR {hdar:#x}, ASDR {asdr:#x}, HSRR0 {hsrr0:#x}, HSRR1 {hsrr1:#x}"
    )
}

fn odd(results: &Results) -> Lost {
    Lost::Answer(registers(results))
}

fn other(results: &Results) -> Fault {
    Fault { class: Class::Other, at: None, blind: 0, level: None, kind: None, syndrome: registers(results) }
}

fn exit(results: &Results) -> Result<Exit, Lost> {
    let [r3, vector, kicked, hdsisr, hdar, asdr, hsrr0, hsrr1] = *results;
    let (cause, at) = match vector {
        0xc00 if kicked == 0 => return Ok(Exit::Done { value: r3 }),
        0xc00 => return Ok(Exit::Kicked),
        0xe00 => (hdsisr, hdar),
        0xe20 => (hsrr1, hsrr0),
        // Whatever a guest met at a place that it should not have come to.
        0x200..=0xf80 => return Ok(Exit::Fault(other(results))),
        _ => return Err(odd(results)),
    };
    // In real mode both say the page.
    if (at ^ asdr) & !0xfff != 0 {
        return Err(odd(results));
    }
    let fetch = vector == 0xe20;
    let class = match cause & CAUSES {
        NO_TRANSLATION => Class::Absent,
        PROTECTION => Class::Denied,
        NO_EXECUTE if fetch => Class::Denied,
        CONFIGURATION => Class::Misconfigured,
        FACTS => Class::Old,
        _ => Class::Other,
    };
    let kind = match (fetch, hdsisr & IS_STORE != 0) {
        (true, _) => TouchKind::Execute,
        (false, true) => TouchKind::Write,
        (false, false) => TouchKind::Read,
    };
    let syndrome = registers(results);
    Ok(Exit::Fault(Fault { class, at: Some(at), blind: 0, level: None, kind: Some(kind), syndrome }))
}

impl Machine for Ppc {
    type Format = Radix;

    fn name(&self) -> &str {
        self.variant.name()
    }

    fn driven(&self) -> Driven<Radix> {
        let shape = Shape::ppc_radix(self.variant.page.bytes());
        let shape = shape.and_then(|shape| shape.with_bits(52, PHYSICAL_BITS.into()));
        let shape = shape.unwrap_or_else(|error| panic!("{}: {error}", self.name()));
        Driven { format: self.format.clone(), shape: shape.with_mem(&[MemType::Wb, MemType::Wc]), attrs }
    }

    fn ground(&self) -> &Ground {
        &self.ground
    }

    fn code(&self, number: u16) -> [u8; 16] {
        // li r3, 0; ori r3, r3, number; sc 1; and never b .
        let words = [0x3860_0000, 0x6063_0000 | u32::from(number), 0x4400_0022, 0x4800_0000];
        let mut code = [0; 16];
        code.chunks_exact_mut(4).zip(words).for_each(|(bytes, word)| bytes.copy_from_slice(&word.to_be_bytes()));
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

    fn leniencies(&self) -> &'static [Leniency] {
        &LENIENCIES
    }

    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost> {
        let register = |error: RegisterError| Lost::Needs(error.to_string());
        let ptcr = Ptcr::new(OutputAddr::new(PARTITIONS), PARTITIONS_LOG2).map_err(register)?;
        // The process table is never looked at: the guest stays in real mode.
        let entry = PartitionEntry::new(&self.format, root, 0, 12).map_err(register)?;
        let at = ptcr.entry(LPID).map_err(register)?.as_u64();
        self.ground.memory.write(at, &entry.to_memory());
        let arguments = [ptcr.raw(), LPCR, LPID.into(), self.code_page()];
        let results = self.mailbox.call(&mut self.emulator, 1, &arguments)?;
        let [lpcr, pvr, found, ..] = results;
        // POWER9, of any version.
        if pvr >> 16 != 0x4e {
            return Err(Lost::Needs(format!("PVR {pvr:#x} is no POWER9")));
        }
        if lpcr & LPCR != LPCR || found != ptcr.raw() {
            return Err(Lost::Answer(format!("LPCR {lpcr:#x}, PTCR {found:#x}")));
        }
        Ok(())
    }

    fn access(&mut self, access: GuestAccess) -> Result<Exit, Lost> {
        let routine = match access.kind {
            TouchKind::Read => LOAD,
            TouchKind::Write => STORE,
            TouchKind::Execute => FETCH,
        };
        let results = self.mailbox.call(&mut self.emulator, 3, &[access.at, routine, access.value])?;
        exit(&results)
    }

    fn flush(&mut self, request: &FlushRequest<'_>) -> Result<(), Lost> {
        let format = self.format.clone();
        self.steps(Steps::new(&format, TlbFixes::default(), LPID, request))
    }

    /// A processor that finds too few rights in its TLB looks at the table (raising rights takes no invalidation: 3.1B, Book III,
    /// 6.10.1.2), and QEMU does; so all there is to do is to wait for the store. What a guest may run into are leaves that are
    /// broken for the moment.
    fn refresh(&mut self, at: u64, _: Level) -> Option<Result<(), Lost>> {
        Some(self.installed(at))
    }

    fn breaks(&self) -> bool {
        true
    }

    fn sets_facts_at_once(&self) -> bool {
        false
    }

    fn installed(&mut self, _: u64) -> Result<(), Lost> {
        self.steps(INSTALLED)
    }

    fn run(&mut self, work: Work) -> Result<(), Lost> {
        let first = work.first + Work::OFFSET;
        let kick = self.code_page() + KICK;
        let written = work.pages - work.written;
        self.mailbox.ask(4, &[first, work.pages, work.stride, written, work.counts, kick]);
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Exit>, Lost> {
        self.emulator.alive()?;
        self.mailbox.answer().map(|results| exit(&results)).transpose()
    }

    fn resume(&mut self) -> Result<(), Lost> {
        self.mailbox.ask(5, &[]);
        Ok(())
    }
}

/// Without non-idempotent storage: nothing is fetched from there, whatever EAA says, and the model goes by rights alone.
fn attrs(mem: MemType) -> Option<RadixAttrs> {
    let storage = match mem {
        MemType::Wb => Storage::Normal,
        MemType::Wc => Storage::Tolerant,
        MemType::Uc | MemType::Wt => return None,
    };
    Some(RadixAttrs::default().storage(storage))
}
