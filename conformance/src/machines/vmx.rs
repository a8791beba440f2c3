// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! EPT, walked by Bochs.
//!
//! A stub in VMX root operation (`stubs/vmx.S`) lets a guest in long mode run (`stubs/vmx_guest.S`) whose own tables lead each
//! address below 2^40 to itself, so that every guest physical address is reached that this processor has. The guest asks the
//! mailbox itself, and leaves for flushes and faults alone. Bochs keeps what it walked until the next exit, so a missing flush
//! shows as long as nothing faulted in between. It keeps no links: a missing flush of a link shows by the leaves below it alone.
//!
//! Bochs walks again where what it keeps does not allow an access: there are no faults on rights that are there already
//! (a processor drops what caused a violation by itself: Intel SDM volume 3, "Operations that Invalidate Cached Mappings").
//!
//! Violations say what was accessed and what all entries on the way together grant (Intel SDM volume 3, "Exit Qualification
//! for EPT Violations"): an access that they all grant nothing for found an entry that is not present, whatever the others
//! grant, because links here grant everything. No violation says a level. A misconfiguration says the address and nothing else.
//!
//! Bochs has no RAM that can be shared, and no display without a port: see `stubs/vmx_ram.c`.

use std::process::Command;
use std::sync::Arc;

use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_model::{Access, MemType, Shape, TouchKind};
use spte_x86::{
    AccessedDirty, Ept, EptAttrs, EptCapabilities, EptMemoryType, EptOptions, EptPointer, EptViolation, Invept,
};

use crate::emulator::{Emulator, Lost, Tool, Tools, Workshop, run};
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Leniency, Machine, Work};
use crate::machines::x86::guest::{ASSEMBLER, IDENTITY_BITS, identity, returning};
use crate::mailbox::{Mailbox, Results};
use crate::memory::{ByteOrder, Memory, Region};

const RAM_BYTES: u64 = 64 << 20;
/// RAM below 1 MiB ends there, and the file goes on with what is above.
const HOLE: u64 = 0xa_0000;
const HIGH: u64 = 0x10_0000;
const STUB: u64 = 0x2_0000;
const MAILBOX: u64 = 0x3_0000;
const CODE: u64 = 0x3_4000;
/// The guest's own tables, of which the first is the root.
const GUEST_TABLES: [u64; 3] = [0x3_5000, 0x3_6000, 0x3_7000];
const SCRATCH: u64 = 0x3_8000;
const TABLES: u64 = HIGH;
const DATA: u64 = 0x200_0000;
/// Where the guest has its pages, one after the other: the code, the scratch page, its tables, the mailbox.
const FIXED: u64 = 0xff_ffe0_0000;
/// The offset of the kick word in the code page.
const KICK: u64 = 0x7f8;

const BOCHS: Tool = Tool { name: "bochs-bin", package: "bochs" };
const CC: Tool = Tool { name: "cc", package: "gcc" };
/// Bochs does not start without a ROM of the graphics card: one of 512 bytes that returns at once, whose sum is 0.
const VGA_ROM: [u8; 512] = {
    let mut rom = [0; 512];
    [rom[0], rom[1], rom[2], rom[3]] = [0x55, 0xaa, 1, 0xcb];
    rom[511] = 0x35;
    rom
};

/// Basic exit reasons.
const VIOLATION: u64 = 48;
const MISCONFIGURATION: u64 = 49;

const LENIENCIES: [Leniency; 4] = [
    Leniency {
        rule: "address bits below the size of the page are reserved",
        bits: 1 << 12,
        only: None,
        why: "Bochs takes bit 12 of larger leaves, as if PAT had its place there, and no other of these bits \
              (Intel SDM volume 3, formats of an EPT PDE that maps a 2-MByte page and of a PDPTE that maps a 1-GByte page)",
    },
    Leniency { rule: "", bits: 1 << 52, only: None, why: SOFTWARE },
    Leniency { rule: "", bits: 1 << 53, only: None, why: SOFTWARE },
    Leniency {
        rule: "execute-only needs a processor that supports it",
        bits: u64::MAX,
        only: None,
        why: "this processor supports it (IA32_VMX_EPT_VPID_CAP, bit 0), the format is set up as if it did not",
    },
];

const SOFTWARE: &str =
    "no leniency: hardware ignores bits 53:52, by which software goes to know who keeps the facts of a leaf";

/// One set-up of the format.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// What it is called.
    pub name: &'static str,
    /// What the format is made of. Address bits are the machine's.
    pub options: EptOptions,
}

/// Accessed and dirty by hardware, not at all, and where dirty bits are somebody else's; without leaves that are
/// executable and nothing else.
pub fn variants() -> Vec<Variant> {
    let plain = EptOptions::default();
    [
        ("x86-ept", plain),
        ("x86-ept-no-ad", EptOptions { accessed_dirty: AccessedDirty::Disabled, ..plain }),
        ("x86-ept-no-d", EptOptions { accessed_dirty: AccessedDirty::WriteProtectOnly, ..plain }),
        ("x86-ept-no-xo", EptOptions { execute_only: false, suppress_ve: false, ..plain }),
    ]
    .map(|(name, options)| Variant { name, options })
    .to_vec()
}

/// Bochs.
#[derive(Debug)]
pub struct Vmx {
    variant: Variant,
    format: Ept,
    capabilities: EptCapabilities,
    eptp: Option<EptPointer>,
    ground: Ground,
    mailbox: Mailbox,
    emulator: Emulator,
}

/// Bochs, without anything that is asked of it in a home folder.
fn bochs(tools: &Tools, workshop: &Workshop, memory: &Memory) -> Result<Command, Lost> {
    let mut command = tools.command(BOCHS)?;
    let rom = workshop.assemble(tools, &ASSEMBLER, "rom", include_str!("../../stubs/vmx_rom.S"), 0xffff_0000)?;
    workshop.write("rom.bin", &rom)?;
    workshop.write("vga.bin", &VGA_ROM)?;
    let shim = workshop.write("ram.c", include_bytes!("../../stubs/vmx_ram.c"))?;
    run(tools.command(CC)?.args(["-O2", "-shared", "-fPIC", "-o"]).arg(workshop.file("ram.so")).arg(shim))?;
    let megabytes = RAM_BYTES >> 20;
    let settings = format!(
        "memory: guest={megabytes}, host={megabytes}\n\
         romimage: file=rom.bin, address=0xffff0000\n\
         vgaromimage: file=vga.bin\n\
         cpu: model=corei7_skylake_x, count=1, ips=100000000, reset_on_triple_fault=0, ignore_bad_msrs=1\n\
         display_library: rfb, options=\"timeout=0\"\n\
         sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy\n\
         boot: floppy\n\
         floppy_bootsig_check: disabled=1\n\
         clock: sync=none\n\
         log: log\n\
         panic: action=fatal\n\
         error: action=report\n\
         info: action=ignore\n\
         debug: action=ignore\n"
    );
    workshop.write("settings", settings.as_bytes())?;
    workshop.write("commands", b"c\n")?;
    command.env("BXSHARE", tools.file("usr/share/bochs"));
    command.env("LTDL_LIBRARY_PATH", tools.file("usr/lib/x86_64-linux-gnu/bochs/plugins"));
    command.args(["-q", "-f", "settings"]);
    // Built with its debugger it stops before it begins, and takes commands.
    let mut help = tools.command(BOCHS)?;
    let help = help.arg("--help").output().map_err(|source| Lost::Run { program: BOCHS.name.to_owned(), source })?;
    if [help.stdout, help.stderr].iter().any(|said| String::from_utf8_lossy(said).contains("-rc filename")) {
        command.args(["-rc", "commands"]);
    }
    command.env("LD_PRELOAD", workshop.file("ram.so"));
    command.env("CONFORMANCE_RAM", memory.path());
    command.env("CONFORMANCE_RAM_BYTES", memory.file_bytes().to_string());
    Ok(command)
}

impl Vmx {
    /// Starts one.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn start(tools: &Tools, variant: Variant) -> Result<Self, Lost> {
        let low = Region { output: 0, bytes: HOLE, offset: 0 };
        let high = Region { output: HIGH, bytes: RAM_BYTES - HIGH, offset: HOLE };
        let memory = Arc::new(Memory::new(&[low, high], ByteOrder::Little)?);
        let workshop = Workshop::new()?;
        let command = bochs(tools, &workshop, &memory)?;
        let stub = include_str!("../../stubs/vmx.S");
        memory.write(STUB, &workshop.assemble(tools, &ASSEMBLER, "vmx", stub, STUB)?);
        let guest = include_str!("../../stubs/vmx_guest.S");
        memory.write(CODE, &workshop.assemble(tools, &ASSEMBLER, "guest", guest, FIXED)?);
        let outputs = [CODE, SCRATCH, GUEST_TABLES[0], GUEST_TABLES[1], GUEST_TABLES[2], MAILBOX];
        let fixed = outputs.iter().zip((FIXED..).step_by(0x1000)).map(|(&output, gpa)| {
            // With accessed and dirty bits a walk of the guest's tables counts as writing them.
            let access = if output == CODE { Access::RX } else { Access::RW };
            Fixed { gpa, output, access }
        });
        let fixed: Vec<Fixed> = fixed.collect();
        identity(&memory, GUEST_TABLES[0], fixed[2].gpa);
        let mut emulator = Emulator::start(command, workshop)?;
        let mut mailbox = Mailbox::new(Arc::clone(&memory), MAILBOX);
        let [capabilities, physical_bits, ..] = mailbox.call(&mut emulator, 6, &[])?;
        if let Some(at) = (HIGH..RAM_BYTES).step_by(0x1_0000).find(|&at| memory.load(at) != at) {
            return Err(Lost::Needs(format!("this Bochs has RAM at {at:#x} elsewhere in its file")));
        }
        let capabilities = EptCapabilities::from_bits_retain(capabilities);
        let has = [
            ("EPT of four levels", capabilities.contains(EptCapabilities::FOUR_LEVELS)),
            ("INVEPT", capabilities.contains(EptCapabilities::INVEPT)),
            ("40 address bits", physical_bits >= IDENTITY_BITS.into()),
        ];
        if let Some((name, _)) = has.iter().find(|(_, has)| !has) {
            return Err(Lost::Needs(format!("this Bochs has no {name}")));
        }
        let physical_bits = physical_bits.min(52) as u8;
        let options = EptOptions { physical_bits, ..variant.options }.with_capabilities(capabilities);
        let format = Ept::new(options).map_err(|error| Lost::Needs(error.to_string()))?;
        let ground = Ground { memory, tables: TABLES..DATA, data: DATA..RAM_BYTES, fixed, kick: CODE + KICK };
        Ok(Self { variant, format, capabilities, eptp: None, ground, mailbox, emulator })
    }

    fn exit(&self, results: &Results) -> Result<Exit, Lost> {
        let [status, reason, qualification, at, linear, rip, event, error] = *results;
        match status {
            0 => return Ok(Exit::Done { value: reason }),
            1 => return Ok(Exit::Kicked),
            _ => {}
        }
        let syndrome = format!(
            "exit reason {reason:#x}, qualification {qualification:#x}, guest physical {at:#x}, linear {linear:#x}, RIP {rip:#x}"
        );
        let (class, kind) = match reason {
            VIOLATION => {
                let said = EptViolation::from_bits_retain(qualification);
                let itself = said.contains(EptViolation::LINEAR_VALID | EptViolation::FINAL);
                let class = match (itself, said.is_present()) {
                    (false, _) => Class::Other,
                    (true, false) => Class::Absent,
                    (true, true) => Class::Denied,
                };
                let kinds = [
                    (EptViolation::READ, TouchKind::Read),
                    (EptViolation::WRITE, TouchKind::Write),
                    (EptViolation::FETCH, TouchKind::Execute),
                ];
                let mut kinds = kinds.into_iter().filter(|(bit, _)| said.contains(*bit)).map(|(_, kind)| kind);
                match (kinds.next(), kinds.next()) {
                    (Some(kind), None) => (class, Some(kind)),
                    _ => (Class::Other, None),
                }
            }
            MISCONFIGURATION => (Class::Misconfigured, None),
            _ => {
                return Err(Lost::Answer(format!("{syndrome}, interruption {event:#x}, VM-instruction error {error}")));
            }
        };
        Ok(Exit::Fault(Fault { class, at: Some(at), blind: 0, level: None, kind, syndrome }))
    }

    /// Asks for what either works or does not.
    fn order(&mut self, command: u64, arguments: &[u64]) -> Result<(), Lost> {
        let results = self.mailbox.call(&mut self.emulator, command, arguments)?;
        match results[0] {
            0 => Ok(()),
            _ => Err(Lost::Answer(format!("VM-instruction error {}", results[7]))),
        }
    }
}

fn attrs(mem: MemType) -> Option<EptAttrs> {
    let memory_type = match mem {
        MemType::Wb => EptMemoryType::WriteBack,
        MemType::Uc => EptMemoryType::Uncacheable,
        MemType::Wc => EptMemoryType::WriteCombining,
        MemType::Wt => EptMemoryType::WriteThrough,
    };
    Some(EptAttrs { memory_type, ignore_pat: true })
}

impl Machine for Vmx {
    type Format = Ept;

    fn name(&self) -> &str {
        self.variant.name
    }

    fn driven(&self) -> Driven<Ept> {
        let EptOptions { physical_bits, accessed_dirty, execute_only, .. } = *self.format.options();
        let shape = Shape::ept().with_bits(IDENTITY_BITS, physical_bits.into());
        let shape = shape.unwrap_or_else(|error| panic!("{}: {error}", self.variant.name));
        let shape = match accessed_dirty {
            AccessedDirty::Enabled => shape,
            AccessedDirty::Disabled => shape.with_hw_ad(false),
            AccessedDirty::WriteProtectOnly => shape.with_hw_ad(false).with_hw_accessed(true),
        };
        let shape =
            if execute_only { shape } else { shape.with_access(&[Access::RWX, Access::RW, Access::RX, Access::R]) };
        Driven { format: self.format.clone(), shape, attrs }
    }

    fn ground(&self) -> &Ground {
        &self.ground
    }

    fn code(&self, number: u16) -> [u8; 16] {
        returning(number)
    }

    fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.format.check_hardware(level, raw)
    }

    fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        self.format.hardware_kind(level, raw)
    }

    /// Where no bit says accessed, an old leaf has no rights, and is absent to hardware.
    fn tells_old(&self) -> bool {
        self.format.options().accessed_dirty != AccessedDirty::Disabled
    }

    fn leniencies(&self) -> &'static [Leniency] {
        // Not the last where the format goes by what the processor has.
        if self.format.options().execute_only { &LENIENCIES[..3] } else { &LENIENCIES }
    }

    /// What is cached stays from one access to the next, and goes with the first that faults. Of random accesses most fault.
    fn caches(&self) -> bool {
        false
    }

    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost> {
        let EptOptions { levels, accessed_dirty, .. } = *self.format.options();
        let eptp = EptPointer::new(root, levels, accessed_dirty != AccessedDirty::Disabled);
        let eptp = eptp.map_err(|error| Lost::Needs(error.to_string()))?;
        self.eptp = Some(eptp);
        self.order(1, &[eptp.raw()])
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

    fn flush(&mut self, _: &FlushRequest<'_>) -> Result<(), Lost> {
        // Before there was a root nothing was cached of it.
        let Some(eptp) = self.eptp else { return Ok(()) };
        let Some(invept) = Invept::new(eptp, self.capabilities) else {
            return Err(Lost::Needs("this Bochs has no INVEPT".to_owned()));
        };
        self.mailbox.list(&[(invept.kind(), invept.descriptor()[0])]);
        self.order(2, &[1])
    }

    fn refresh(&mut self, _: u64, _: Level) -> Option<Result<(), Lost>> {
        None
    }

    fn run(&mut self, work: Work) -> Result<(), Lost> {
        let first = work.first + Work::OFFSET;
        self.mailbox.ask(4, &[first, work.pages, work.stride, work.pages - work.written, work.counts]);
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
}
