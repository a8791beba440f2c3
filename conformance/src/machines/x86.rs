// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! AMD's nested tables and tables that a VMM owns, walked by QEMU's PC with a stub that is the host of SVM.
//!
//! | machines | the table under test | a fault is |
//! |---|---|---|
//! | `x86-npt-4`, `-5`, `-4-no-nx` | nested; the guest has tables of its own, which map 40 bits where they are | a nested page fault: class and kind by EXITINFO1, guest physical address by EXITINFO2 (APM volume 2, 15.25.6) |
//! | `x86-cr3-4`, `-5`, `-4-no-nx` | the guest's CR3, without nested paging | an intercepted page fault: error code in EXITINFO1, linear address in EXITINFO2 (15.12.15, 8.4.2) |
//!
//! The guest runs at CPL 3, so that U/S counts at every level in both. No fault says which level it is of. A fault on a reserved
//! bit has P set on a processor and, here, clear: RSV says enough.
//!
//! VMRUN starts with nothing cached in QEMU, whatever TLB control says: a flush that is missing cannot show, and there is nothing
//! to refresh. Flushes are carried out all the same. Physical addresses have 40 bits there, those of a nested guest too.

use std::sync::Arc;

use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_model::{Access, Shape, TouchKind};
use spte_x86::tlb::{Step, Steps, TlbControl};
use spte_x86::{Cr3, Levels, LongModeFormat, LongModeOptions, NestedCr3, NestedFault, Usage};

use crate::emulator::{Emulator, Lost, Tool, Tools, Workshop};
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Leniency, Machine, Work};
use crate::mailbox::{Mailbox, Results};
use crate::memory::{ByteOrder, Memory, Region};
use guest::{Guest, Hypercall, gpr};

pub(crate) mod guest;
mod vmcb;

/// The file is sparse: nothing is between tables and data, which begin where a leaf of 1 GiB may.
const RAM_BYTES: u64 = DATA + DATA_BYTES;
const STUB: u64 = 0x2_0000;
const MAILBOX: u64 = 0x3_0000;
const HSAVE: u64 = 0x3_2000;
const VMCB: u64 = 0x3_3000;
const REGS: u64 = 0x3_4000;
const CODE: u64 = 0x4_0000;
const SCRATCH: u64 = 0x4_1000;
const GUEST_TABLES: u64 = 0x4_2000;
const TABLES: u64 = 0x10_0000;
const TABLES_END: u64 = 0x800_0000;
const DATA: u64 = 1 << 30;
const DATA_BYTES: u64 = 32 << 20;

/// The physical address bits of QEMU's TCG.
const PHYSICAL_BITS: u8 = 40;

const QEMU: Tool = Tool { name: "qemu-system-x86_64", package: "qemu-system-x86" };

/// One set-up of the format.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// What it is called.
    pub name: &'static str,
    /// What the format is made of.
    pub options: LongModeOptions,
}

/// QEMU's PC.
#[derive(Debug)]
pub struct X86<U: Usage> {
    variant: Variant,
    format: LongModeFormat<U>,
    guest: Guest,
    flush_by_asid: bool,
    ground: Ground,
    mailbox: Mailbox,
    emulator: Emulator,
}

impl<U: Usage> X86<U> {
    /// Both depths, and one without EFER.NXE.
    pub fn variants() -> Vec<Variant> {
        let plain = LongModeOptions { physical_bits: PHYSICAL_BITS, ..LongModeOptions::default() };
        let names = if U::NESTED {
            ["x86-npt-4", "x86-npt-5", "x86-npt-4-no-nx"]
        } else {
            ["x86-cr3-4", "x86-cr3-5", "x86-cr3-4-no-nx"]
        };
        let options =
            [plain, LongModeOptions { levels: Levels::Five, ..plain }, LongModeOptions { no_execute: false, ..plain }];
        names.into_iter().zip(options).map(|(name, options)| Variant { name, options }).collect()
    }

    /// Starts one.
    ///
    /// # Errors
    /// [`Lost`].
    pub fn start(tools: &Tools, variant: Variant) -> Result<Self, Lost> {
        let LongModeOptions { levels, no_execute, .. } = variant.options;
        let format = LongModeFormat::new(variant.options).map_err(|error| Lost::Needs(error.to_string()))?;
        let mut qemu = tools.qemu(QEMU)?;
        let workshop = Workshop::new()?;
        let region = Region { output: 0, bytes: RAM_BYTES, offset: 0 };
        let memory = Arc::new(Memory::new(&[region], ByteOrder::Little)?);
        // Of two sets of tables one is tested: the other is plain.
        let (guest_levels, stub_levels) = if U::NESTED { (Levels::Four, levels) } else { (levels, Levels::Four) };
        let (guest_nx, stub_nx) = if U::NESTED { (true, no_execute) } else { (no_execute, true) };
        let guest = Guest::new(guest_levels, U::NESTED);
        let code = guest.code;

        memory.write(CODE, &Hypercall::Vmmcall.page(tools, &workshop)?);
        let stub = include_str!("../../stubs/x86_svm.S");
        let places = [("MAILBOX", MAILBOX), ("HSAVE", HSAVE), ("VMCB", VMCB), ("REGS", REGS), ("ASID", vmcb::ASID)];
        let places = places.map(|(name, value)| format!(".equ {name}, {value:#x}\n")).concat();
        let stub = workshop.assemble(tools, &guest::ASSEMBLER, "x86_svm", &(places + stub), STUB)?;
        memory.write(STUB, &stub);
        vmcb::fill(&memory, VMCB, guest_levels, guest_nx, U::NESTED);
        // Everything executes where nothing can say that it does not.
        let written = if no_execute { Access::RW } else { Access::RWX };
        let mut fixed = vec![
            Fixed { gpa: code, output: CODE, access: Access::RX },
            Fixed { gpa: code + 0x1000, output: SCRATCH, access: written },
        ];
        if U::NESTED {
            let (gpa, pages) = (code + 0x2000, 0..guest::IDENTITY_PAGES);
            guest::identity(&memory, GUEST_TABLES, gpa);
            memory.store(VMCB + vmcb::CR3, gpa);
            let page = |number: u64| (gpa + 0x1000 * number, GUEST_TABLES + 0x1000 * number);
            fixed.extend(pages.map(page).map(|(gpa, output)| Fixed { gpa, output, access: written }));
        }

        let rom = workshop.write("rom", &guest::rom(tools, &workshop, STUB, stub_levels, stub_nx)?)?;
        qemu.args(["-M", "pc,memory-backend=m", "-cpu", "max", "-no-reboot", "-m"])
            .arg(format!("{}M", RAM_BYTES >> 20));
        let (path, size) = (memory.path(), memory.file_bytes());
        qemu.args(["-object", &format!("memory-backend-file,id=m,size={size},mem-path={path},share=on")]);
        qemu.arg("-bios").arg(rom);
        let emulator = Emulator::start(qemu, workshop)?;
        let ground = Ground {
            memory: Arc::clone(&memory),
            tables: TABLES..TABLES_END,
            data: DATA..DATA + DATA_BYTES,
            fixed,
            kick: CODE + Guest::KICK,
        };
        let mailbox = Mailbox::new(memory, MAILBOX);
        Ok(Self { variant, format, guest, flush_by_asid: false, ground, mailbox, emulator })
    }

    /// Where a register of the guest is while it does not run.
    fn register(number: usize) -> u64 {
        if number == gpr::RAX { VMCB + vmcb::RAX } else { REGS + 8 * number as u64 }
    }

    fn set(&self, (rip, registers): (u64, impl IntoIterator<Item = (usize, u64)>)) {
        let memory = &self.ground.memory;
        memory.store(VMCB + vmcb::RIP, rip);
        registers.into_iter().for_each(|(number, value)| memory.store(Self::register(number), value));
    }

    fn steps(&mut self, steps: &[(u64, u64)]) -> Result<(), Lost> {
        self.mailbox.list(steps);
        self.mailbox.call(&mut self.emulator, 2, &[steps.len() as u64]).map(drop)
    }

    fn exit(&self, results: &Results) -> Result<Exit, Lost> {
        let [code, info1, info2, rax, rdi, rip, ..] = *results;
        let syndrome =
            || format!("EXITCODE {code:#x}, EXITINFO1 {info1:#x}, EXITINFO2 {info2:#x}, RIP {rip:#x}, rax {rax:#x}");
        match code {
            vmcb::EXIT_VMMCALL if rdi == guest::KICKED => return Ok(Exit::Kicked),
            vmcb::EXIT_VMMCALL => return Ok(Exit::Done { value: rax }),
            vmcb::EXIT_INVALID => return Err(Lost::Answer(syndrome())),
            _ => {}
        }
        if code != if U::NESTED { vmcb::EXIT_NESTED } else { vmcb::EXIT_PAGE_FAULT } {
            let (class, syndrome) = (Class::Other, syndrome());
            return Ok(Exit::Fault(Fault { class, at: None, blind: 0, level: None, kind: None, syndrome }));
        }
        // The low half is that of a page fault.
        let error = NestedFault::from_bits_retain(info1);
        let class = if error.contains(NestedFault::RESERVED) {
            Class::Misconfigured
        } else if error.contains(NestedFault::PRESENT) {
            Class::Denied
        } else {
            Class::Absent
        };
        let kind = if error.contains(NestedFault::FETCH) {
            Some(TouchKind::Execute)
        } else if error.contains(NestedFault::WRITE) {
            Some(TouchKind::Write)
        } else {
            // Without EFER.NXE a fetch is not told from a load.
            self.variant.options.no_execute.then_some(TouchKind::Read)
        };
        let at = if U::NESTED { info2 } else { self.guest.address(info2) };
        Ok(Exit::Fault(Fault { class, at: Some(at), blind: 0, level: None, kind, syndrome: syndrome() }))
    }
}

const RESERVED_GLOBAL: Leniency = Leniency {
    rule: "bit 8 of a link at levels 4 and 5 is reserved",
    bits: u64::MAX,
    only: None,
    why: "G of a link is ignored, as by Intel's processors; AMD's fault (APM volume 2, 5.3.3: MBZ)",
};
const LENIENCIES: [&[Leniency]; 2] = [
    &[
        RESERVED_GLOBAL,
        Leniency {
            rule: "",
            bits: 1 << 2,
            only: Some((&[TouchKind::Read, TouchKind::Write, TouchKind::Execute], Class::Denied)),
            why: "a leaf without U/S is denied: this guest is at CPL 3, and a format does not say who asks",
        },
    ],
    &[RESERVED_GLOBAL],
];

/// As the stub has them.
fn invlpga(address: u64) -> (u64, u64) {
    (1, address)
}

fn tlb_control(control: TlbControl) -> (u64, u64) {
    (2, control.raw().into())
}

impl<U: Usage> Machine for X86<U> {
    type Format = LongModeFormat<U>;

    fn name(&self) -> &str {
        self.variant.name
    }

    fn driven(&self) -> Driven<LongModeFormat<U>> {
        let shape = if U::NESTED { Shape::npt() } else { Shape::x86_64() };
        let shape = shape.with_bits(self.guest.bits, PHYSICAL_BITS.into());
        let shape = shape.unwrap_or_else(|error| panic!("{}: {error}", self.variant.name));
        let executes = [Access::RWX, Access::RX];
        let shape = if self.variant.options.no_execute { shape } else { shape.with_access(&executes) };
        Driven { format: self.format.clone(), shape, attrs: guest::attrs }
    }

    fn ground(&self) -> &Ground {
        &self.ground
    }

    fn code(&self, number: u16) -> [u8; 16] {
        Hypercall::Vmmcall.code(number)
    }

    fn check_hardware(&self, level: Level, raw: u64) -> Result<(), EntryError> {
        self.format.check_hardware(level, raw)
    }

    fn hardware_kind(&self, level: Level, raw: u64) -> HardwareKind {
        self.format.hardware_kind(level, raw)
    }

    fn caches(&self) -> bool {
        false
    }

    fn leniencies(&self) -> &'static [Leniency] {
        LENIENCIES[usize::from(U::NESTED)]
    }

    /// QEMU sets A of a 1 GiB leaf before it looks at rights, and of a smaller one after. (An entry may be marked that was walked for
    /// an access that is denied then: Intel SDM volume 3, "Accessed and Dirty Flags".)
    fn marks_denied(&self, level: Level) -> bool {
        level.get() == 3
    }

    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost> {
        let [features, _, widths, ..] = self.mailbox.call(&mut self.emulator, 1, &[])?;
        let has = [("SVM with nested paging", features & 1 != 0), ("40 address bits", widths & 0xff == 40)];
        if let Some((name, _)) = has.iter().find(|(_, has)| !has) {
            return Err(Lost::Needs(format!("this emulator has no {name}")));
        }
        self.flush_by_asid = features & 1 << 6 != 0;
        let register = |error: spte_x86::RegisterError| Lost::Needs(error.to_string());
        let (field, value) = if U::NESTED {
            (vmcb::NESTED_CR3, NestedCr3::new(root).map_err(register)?.raw())
        } else {
            (vmcb::CR3, Cr3::new(root, 0).map_err(register)?.raw())
        };
        self.ground.memory.store(VMCB + field, value);
        self.steps(&[tlb_control(TlbControl::All)])
    }

    fn access(&mut self, access: GuestAccess) -> Result<Exit, Lost> {
        self.set(self.guest.access(access));
        let results = self.mailbox.call(&mut self.emulator, 3, &[])?;
        self.exit(&results)
    }

    /// Of a nested table the guest's ASID is flushed by the next VMRUN. Of a guest's own, each INVLPG is an INVLPGA of the guest's
    /// ASID, and what goes beyond single pages is again the next VMRUN's.
    fn flush(&mut self, request: &FlushRequest<'_>) -> Result<(), Lost> {
        let all = TlbControl::flush(self.flush_by_asid);
        if U::NESTED {
            return self.steps(&[tlb_control(all)]);
        }
        let step = |step| match step {
            Step::Invlpg(address) => invlpga(address),
            Step::WriteCr3 if self.flush_by_asid => tlb_control(TlbControl::AsidNonGlobal),
            Step::WriteCr3 | Step::Everything => tlb_control(all),
        };
        // No leaf of it is global.
        let steps: Vec<(u64, u64)> = Steps::new(&self.format, false, request).map(step).collect();
        self.steps(&steps)
    }

    fn refresh(&mut self, _: u64, _: Level) -> Option<Result<(), Lost>> {
        None
    }

    fn run(&mut self, work: Work) -> Result<(), Lost> {
        self.set(self.guest.work(work));
        self.mailbox.ask(3, &[]);
        Ok(())
    }

    fn poll(&mut self) -> Result<Option<Exit>, Lost> {
        self.emulator.alive()?;
        self.mailbox.answer().map(|results| self.exit(&results)).transpose()
    }

    fn resume(&mut self) -> Result<(), Lost> {
        self.mailbox.ask(3, &[]);
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use notifier_core::{AddrRange, Gpa};
    use spte_core::{FlushRange, Leaves};
    use spte_x86::{Native, Nested};

    use super::*;

    /// TLB_CONTROL after flushes of one page, of 40 pages, and of everything, each before and after a guest ran.
    fn controls<U: Usage>() -> Option<Vec<[u64; 2]>> {
        let tools = Tools::new(std::env::var_os("CONFORMANCE_TOOLS").map(Into::into));
        let mut machine = match X86::<U>::start(&tools, X86::<U>::variants()[0]) {
            Err(lost @ Lost::Missing(_)) if std::env::var_os("CONFORMANCE_REQUIRE").is_none() => {
                println!("left out: {lost}");
                return None;
            }
            machine => machine.unwrap(),
        };
        let memory = Arc::clone(&machine.ground.memory);
        // A root of zeros: the guest comes back at once.
        machine.begin(OutputAddr::new(TABLES)).unwrap();
        let access = GuestAccess { at: 0, kind: TouchKind::Read, value: 0 };
        assert!(matches!(machine.access(access).unwrap(), Exit::Fault(Fault { class: Class::Absent, .. })));
        let control = || memory.load(VMCB + 0x58) >> 32 & 0xff;
        let flushes = [(1, false), (40, false), (0, true)].into_iter().map(|(pages, all)| {
            let range = AddrRange::with_len(Gpa::new(0x20_0000), pages << 12).ok();
            let ranges: Vec<FlushRange> =
                range.into_iter().map(|range| FlushRange { range, leaves: Leaves::Any, links: None }).collect();
            machine.flush(&FlushRequest { ranges: &ranges, all, nonblocking: false }).unwrap();
            let before = control();
            machine.access(access).unwrap();
            [before, control()]
        });
        Some(flushes.collect())
    }

    #[test]
    fn a_flush_of_a_nested_table_is_the_next_entry_s() {
        let all = TlbControl::All.raw().into();
        assert!(controls::<Nested>().is_none_or(|found| found == [[all, 0]; 3]));
    }

    #[test]
    fn few_pages_of_a_native_table_are_invalidated_one_by_one() {
        let all = TlbControl::All.raw().into();
        assert!(controls::<Native>().is_none_or(|found| found == [[0, 0], [all, 0], [all, 0]]));
    }
}
