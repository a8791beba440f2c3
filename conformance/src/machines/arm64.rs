// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! arm64 stage 2, walked by QEMU's `virt` machine with a stub at EL2.
//!
//! The guest runs at EL1 with stage 1 off, so that its addresses are guest physical. A fault's class, level and kind come from
//! ESR_EL2 (Arm ARM, D19.2.37, ISS of a Data Abort and of an Instruction Abort), the address from FAR_EL2; for translation and
//! access flag faults HPFAR_EL2 has to say the same page (for others it is unknown).
//!
//! Hardware caches what the guest uses: a flush that is missing shows. One of the wrong place does not: of the two invalidations of
//! a flush by address QEMU needs the second alone (VMALLE1IS), as it does not keep stage 2 by itself for a guest whose stage 1 is
//! off, and that one drops all. (Which addresses, ranges and levels are named is for `spte-arm64`'s own tests.)

use std::sync::Arc;

use notifier_core::OutputAddr;
use spte_arm64::tlb::{INSTALLED, relaxed};
use spte_arm64::{
    AccessedDirty, Barrier, Granule, MemoryType, Stage2, Stage2Attrs, Stage2Options, Start, Step, Steps, TlbFeatures,
    Tlbi, VmidBits, Vtcr, Vttbr,
};
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Format, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_model::{Access, MemType, Shape, TouchKind};

use crate::emulator::{Assembler, Emulator, Lost, Tool, Tools, Workshop};
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Leniency, Machine, Work};
use crate::mailbox::{MOST_PAIRS, Mailbox, Results};
use crate::memory::{ByteOrder, Memory, Region};

const RAM: u64 = 0x4000_0000;
const RAM_BYTES: u64 = 128 << 20;
const STUB: u64 = 0x4020_0000;
const MAILBOX: u64 = 0x4030_0000;
const CODE: u64 = 0x4040_0000;
const SCRATCH: u64 = 0x4041_0000;
const TABLES: u64 = 0x4080_0000;
const DATA: u64 = 0x4400_0000;
/// Offsets in the code page.
const LOAD: u64 = 0;
const STORE: u64 = 8;
const FETCH: u64 = u64::MAX;
const KICK: u64 = 0x7f8;

const QEMU: Tool = Tool { name: "qemu-system-aarch64", package: "qemu-system-arm" };
const ASSEMBLER: Assembler = Assembler {
    prefix: ["aarch64-linux-gnu-as", "aarch64-linux-gnu-ld", "aarch64-linux-gnu-objcopy"],
    package: "binutils-aarch64-linux-gnu",
    options: &["-march=armv8.4-a"],
    link: &[],
};

/// What the architecture reserves and leaves to hardware (Arm ARM, D8.3.2 and the glossary: RES0 bits of descriptors may be ignored,
/// reserved field values are CONSTRAINED UNPREDICTABLE), and QEMU ignores.
const LENIENCIES: &[Leniency] = &[
    Leniency::of("SH value 1 is reserved", "a reserved SH is taken (QEMU caches nothing)"),
    Leniency::of("MemAttr values 4, 8 and 12 are reserved", "a reserved MemAttr is taken (QEMU caches nothing)"),
    Leniency::of(
        "with FWB, MemAttr[3] is RES0 and the value 4 is reserved",
        "a reserved MemAttr is taken (QEMU caches nothing)",
    ),
    Leniency::of("bits between the attributes and the output address are RES0", "RES0 bits of leaves are ignored"),
    Leniency::of("bits 50:48 that hold no output address are RES0", "RES0 bits are ignored"),
    Leniency::of("XN[0] is RES0 without FEAT_XNX", "the emulated processor has FEAT_XNX, and goes by XN[0]"),
    Leniency::of("this level has no blocks with this granule", "a block is taken at a level that has none (QEMU 7.2)"),
    Leniency::of("this level has no contiguous sets", "the contiguous bit is a hint, and ignored"),
    Leniency {
        rule: "",
        bits: 1 << 53,
        only: Some((&[TouchKind::Execute], Class::Denied)),
        why: "no leniency: XN[0] leaves execution to EL0, and the guest is at EL1",
    },
];

/// One set-up of the format.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// What it is called.
    pub name: &'static str,
    /// What the format is made of.
    pub options: Stage2Options,
}

/// Every granule, several widths and start levels, facts by software and by hardware.
pub fn variants() -> Vec<Variant> {
    let plain = Stage2Options::default();
    let k16 = Stage2Options { granule: Granule::K16, ..plain };
    let k64 = Stage2Options { granule: Granule::K64, ..plain };
    let hardware = AccessedDirty::Hardware;
    [
        ("arm64-s2-4k", plain),
        ("arm64-s2-4k-hd", Stage2Options { ipa_bits: 48, accessed_dirty: hardware, ..plain }),
        (
            "arm64-s2-4k-ha",
            Stage2Options { ipa_bits: 34, accessed_dirty: AccessedDirty::HardwareAccessed, fwb: true, ..plain },
        ),
        ("arm64-s2-4k-lpa2", Stage2Options { ipa_bits: 50, physical_bits: 52, lpa2: true, xnx: true, ..plain }),
        ("arm64-s2-16k", Stage2Options { ipa_bits: 47, ..k16 }),
        ("arm64-s2-16k-hd", Stage2Options { ipa_bits: 40, accessed_dirty: hardware, ..k16 }),
        ("arm64-s2-64k", Stage2Options { ipa_bits: 42, ..k64 }),
        ("arm64-s2-64k-hd", Stage2Options { ipa_bits: 52, physical_bits: 52, accessed_dirty: hardware, ..k64 }),
        ("arm64-s2-64k-start-2", Stage2Options { ipa_bits: 44, start: Start::Level(2), ..k64 }),
    ]
    .map(|(name, options)| Variant { name, options })
    .to_vec()
}

/// QEMU's `virt` machine.
#[derive(Debug)]
pub struct Arm64 {
    variant: Variant,
    format: Stage2,
    features: TlbFeatures,
    ground: Ground,
    mailbox: Mailbox,
    /// The second processor's, where flushes come from while the first runs a guest: invalidations are broadcast.
    second: Mailbox,
    /// The second processor is on. It spins, so that it is off for all that needs no second one.
    awake: bool,
    /// VTCR_EL2, VTTBR_EL2, HCR_EL2 and the code page, as both processors have them.
    regime: [u64; 4],
    emulator: Emulator,
}

impl Arm64 {
    /// Starts one.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn start(tools: &Tools, variant: Variant) -> Result<Self, Lost> {
        let format = Stage2::new(variant.options).map_err(|error| Lost::Needs(error.to_string()))?;
        let mut qemu = tools.qemu(QEMU)?;
        let workshop = Workshop::new()?;
        let region = Region { output: RAM, bytes: RAM_BYTES, offset: 0 };
        let memory = Arc::new(Memory::new(&[region], ByteOrder::Little)?);
        let stub = include_str!("../../stubs/arm64.S");
        memory.write(STUB, &workshop.assemble(tools, &ASSEMBLER, "arm64", stub, STUB)?);
        let guest = include_str!("../../stubs/arm64_guest.S");
        memory.write(CODE, &workshop.assemble(tools, &ASSEMBLER, "arm64_guest", guest, 0)?);
        qemu.args([
            "-M",
            "virt,virtualization=on,gic-version=3,memory-backend=m",
            "-cpu",
            "max",
            "-smp",
            "2",
            "-m",
            "128M",
        ]);
        let path = memory.path();
        qemu.args(["-object", &format!("memory-backend-file,id=m,size=128M,mem-path={path},share=on")]);
        qemu.args(["-device", &format!("loader,addr={STUB:#x},cpu-num=0")]);
        let emulator = Emulator::start(qemu, workshop)?;
        let granule = variant.options.granule.bytes();
        // An address of no particular kind, far from the ends.
        let gpa = (5 << (variant.options.ipa_bits - 3)) | 0x2340_0000;
        let ground = Ground {
            memory: Arc::clone(&memory),
            tables: TABLES..DATA,
            data: DATA..RAM + RAM_BYTES,
            fixed: vec![
                Fixed { gpa, output: CODE, access: Access::RX },
                Fixed { gpa: gpa + granule, output: SCRATCH, access: Access::RW },
            ],
            kick: CODE + KICK,
        };
        let features = TlbFeatures { level_hints: true, ranges: true };
        let mailbox = Mailbox::new(Arc::clone(&memory), MAILBOX);
        let second = Mailbox::new(memory, MAILBOX + 0x1000);
        Ok(Self { variant, format, features, ground, mailbox, second, awake: false, regime: [0; 4], emulator })
    }

    fn code_page(&self) -> u64 {
        self.ground.fixed[0].gpa
    }

    /// Carries steps out on the first processor, or on the `second`.
    fn steps(&mut self, steps: impl IntoIterator<Item = Step>, second: bool) -> Result<(), Lost> {
        let steps: Vec<(u64, u64)> = steps.into_iter().map(operation).collect();
        let mailbox = if second { &mut self.second } else { &mut self.mailbox };
        for part in steps.chunks(MOST_PAIRS) {
            mailbox.list(part);
            mailbox.call(&mut self.emulator, 2, &[part.len() as u64])?;
        }
        Ok(())
    }

    /// Switches the second processor on.
    fn wake(&mut self) -> Result<(), Lost> {
        let regime = self.regime;
        while !self.awake {
            let [answer, ..] = self.mailbox.call(&mut self.emulator, 6, &[])?;
            match answer as i64 {
                0 => self.awake = true,
                // Still on its way off, or on.
                -4 | -5 => std::thread::yield_now(),
                _ => return Err(Lost::Answer(format!("{answer:#x} to CPU_ON"))),
            }
        }
        self.second.call(&mut self.emulator, 1, &regime).map(drop)
    }

    /// Switches it off.
    fn sleep(&mut self) -> Result<(), Lost> {
        match std::mem::take(&mut self.awake) {
            true => self.second.call(&mut self.emulator, 7, &[]).map(drop),
            false => Ok(()),
        }
    }

    fn exit(&self, results: &Results) -> Result<Exit, Lost> {
        let [x0, esr, far, hpfar, elr, vector, esr_el1, far_el1] = *results;
        let odd = || {
            Lost::Answer(format!("x0 {x0:#x}, ESR_EL2 {esr:#x}, FAR_EL2 {far:#x}, ELR_EL2 {elr:#x}, vector {vector}"))
        };
        // A lower exception level in AArch64, synchronous.
        if vector != 8 {
            return Err(odd());
        }
        match esr >> 26 {
            0x16 if esr & 0xffff == 0 => return Ok(Exit::Done { value: x0 }),
            0x16 if esr & 0xffff == 1 => return Ok(Exit::Kicked),
            0x16 => {
                let syndrome = format!("at EL1: ESR_EL1 {esr_el1:#x}, FAR_EL1 {far_el1:#x}");
                let fault = Fault { class: Class::Other, at: None, blind: 0, level: None, kind: None, syndrome };
                return Ok(Exit::Fault(fault));
            }
            0x20 | 0x24 => {}
            _ => return Err(odd()),
        }
        let status = esr & 0x3f;
        let (class, number) = match status {
            0b00_0000..=0b00_0011 => (Class::Misconfigured, Some((status & 3) as i8)),
            0b00_0100..=0b00_0111 => (Class::Absent, Some((status & 3) as i8)),
            0b00_1000..=0b00_1011 => (Class::Old, Some((status & 3) as i8)),
            0b00_1100..=0b00_1111 => (Class::Denied, Some((status & 3) as i8)),
            0b10_1001 => (Class::Misconfigured, Some(-1)),
            0b10_1011 => (Class::Absent, Some(-1)),
            _ => (Class::Other, None),
        };
        let kind = match esr >> 26 {
            0x20 => TouchKind::Execute,
            _ if esr & 1 << 6 != 0 => TouchKind::Write,
            _ => TouchKind::Read,
        };
        let page = (hpfar >> 4) << 12;
        let reported = matches!(class, Class::Absent | Class::Old) && page != far & !0xfff;
        let at = Some(if reported { page } else { far });
        let syndrome = format!("ESR_EL2 {esr:#x}, FAR_EL2 {far:#x}, HPFAR_EL2 {hpfar:#x}");
        let level = number.and_then(|number| self.format.level_of(number));
        Ok(Exit::Fault(Fault { class, at, blind: 0, level, kind: Some(kind), syndrome }))
    }
}

/// As `operations` in the stub has them.
fn operation(step: Step) -> (u64, u64) {
    match step {
        Step::Barrier(Barrier::InnerStores) => (0, 0),
        Step::Barrier(Barrier::Inner) => (1, 0),
        Step::Barrier(Barrier::LocalStores) => (2, 0),
        Step::Barrier(Barrier::Local) => (3, 0),
        Step::Isb => (4, 0),
        Step::Invalidate(Tlbi::Ipa(operand)) => (5, operand),
        Step::Invalidate(Tlbi::Range(operand)) => (6, operand),
        Step::Invalidate(Tlbi::Stage1) => (7, 0),
        Step::Invalidate(Tlbi::Vmid) => (8, 0),
        Step::Invalidate(Tlbi::Everything) => (9, 0),
        Step::Invalidate(Tlbi::LocalIpa(operand)) => (10, operand),
        Step::Invalidate(Tlbi::LocalStage1) => (11, 0),
    }
}

impl Machine for Arm64 {
    type Format = Stage2;

    fn name(&self) -> &str {
        self.variant.name
    }

    fn driven(&self) -> Driven<Stage2> {
        let Stage2Options { granule, ipa_bits, physical_bits, lpa2, accessed_dirty, fwb, .. } = self.variant.options;
        let wide = lpa2 || physical_bits > 48;
        let shape = Shape::arm64_stage2(granule.bytes(), ipa_bits.into(), physical_bits.into(), wide);
        let shape = shape.unwrap_or_else(|error| panic!("{}: {error}", self.variant.name));
        let shape = match accessed_dirty {
            AccessedDirty::Hardware => shape.with_hw_ad(true),
            other => shape.with_hw_accessed(other.sets_accessed()),
        };
        let largest = self.format.geometry().span(self.format.geometry().top());
        let shape = shape.with_leaves_up_to(largest);
        let shape = if fwb { shape.with_forced_write_back() } else { shape };
        Driven { format: self.format.clone(), shape, attrs: if fwb { forced } else { plain } }
    }

    fn ground(&self) -> &Ground {
        &self.ground
    }

    fn code(&self, number: u16) -> [u8; 16] {
        // MOVZ x0, #number; HVC #0.
        let mut code = [0; 16];
        code[..4].copy_from_slice(&(0xd280_0000 | u32::from(number) << 5).to_le_bytes());
        code[4..8].copy_from_slice(&0xd400_0002_u32.to_le_bytes());
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
        LENIENCIES
    }

    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost> {
        let register = |error: spte_arm64::RegisterError| Lost::Needs(error.to_string());
        let vtcr = Vtcr::new(&self.format, VmidBits::Eight).map_err(register)?.raw();
        let vttbr = Vttbr::new(&self.format, root, 1, VmidBits::Eight).map_err(register)?.raw();
        // VM, RW, and FWB where the format goes by it.
        let hcr = 1 | 1 << 31 | u64::from(self.variant.options.fwb) << 46;
        let code = self.code_page();
        self.sleep()?;
        self.regime = [vtcr, vttbr, hcr, code];
        let [mmfr0, mmfr1, mmfr2, isar0, ..] = self.mailbox.call(&mut self.emulator, 1, &self.regime)?;
        let options = self.variant.options;
        let has = [
            ("FEAT_LPA2", mmfr0 >> 40 & 0xf >= 3, options.lpa2),
            ("52 address bits", mmfr0 & 0xf >= 6, options.physical_bits > 48),
            ("FEAT_HAFDBS", mmfr1 & 0xf >= 2, options.accessed_dirty != AccessedDirty::Software),
            ("FEAT_S2FWB", mmfr2 >> 40 & 0xf != 0, options.fwb),
            ("FEAT_XNX", mmfr1 >> 28 & 0xf != 0, options.xnx),
            ("FEAT_TTL", mmfr2 >> 48 & 0xf != 0, self.features.level_hints),
            ("FEAT_TLBIRANGE", isar0 >> 56 & 0xf >= 2, self.features.ranges),
        ];
        match has.iter().find(|(_, has, needs)| *needs && !has) {
            Some((name, ..)) => Err(Lost::Needs(format!("this emulator has no {name}"))),
            None => Ok(()),
        }
    }

    fn access(&mut self, access: GuestAccess) -> Result<Exit, Lost> {
        let routine = match access.kind {
            TouchKind::Read => LOAD,
            TouchKind::Write => STORE,
            TouchKind::Execute => FETCH,
        };
        self.sleep()?;
        let results = self.mailbox.call(&mut self.emulator, 3, &[access.at, routine, access.value])?;
        self.exit(&results)
    }

    fn flush(&mut self, request: &FlushRequest<'_>) -> Result<(), Lost> {
        let format = self.format.clone();
        self.steps(Steps::new(&format, self.features, request), self.awake)
    }

    fn refresh(&mut self, at: u64, level: Level) -> Option<Result<(), Lost>> {
        let steps = relaxed(&self.format, self.features, at, level);
        Some(self.steps(steps, false))
    }

    fn installed(&mut self, _: u64) -> Result<(), Lost> {
        self.steps(INSTALLED, false)
    }

    fn run(&mut self, work: Work) -> Result<(), Lost> {
        match work.broadcast {
            true => self.wake()?,
            false => self.sleep()?,
        }
        let first = work.first + Work::OFFSET;
        let kick = self.code_page() + KICK;
        let written = work.pages - work.written;
        self.mailbox.ask(4, &[first, work.pages, work.stride, written, work.counts, kick]);
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Exit>, Lost> {
        self.emulator.alive()?;
        self.mailbox.answer().map(|results| self.exit(&results)).transpose()
    }

    fn resume(&mut self) -> Result<(), Lost> {
        self.mailbox.ask(5, &[]);
        Ok(())
    }

    fn broadcasts(&self) -> bool {
        self.awake
    }
}

fn plain(mem: MemType) -> Option<Stage2Attrs> {
    let memory = match mem {
        MemType::Wb => MemoryType::WRITE_BACK,
        MemType::Uc => MemoryType::DEVICE,
        MemType::Wc => MemoryType::NON_CACHEABLE,
        MemType::Wt => MemoryType::WRITE_THROUGH,
    };
    Some(Stage2Attrs::default().memory(memory))
}

/// With FEAT_S2FWB there is no write-through.
fn forced(mem: MemType) -> Option<Stage2Attrs> {
    if mem == MemType::Wt { None } else { plain(mem) }
}
