// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! Long-mode tables, walked by the processor that this program runs on: a guest on /dev/kvm whose CR3 leads to them.
//!
//! The guest runs at CPL 0 (`stubs/kvm_guest.S`) without SMEP and SMAP, so that user pages are as good as others. Which fault
//! it was is in the error code (Intel SDM volume 3, "Page-Fault Exceptions"; AMD APM volume 2, "#PF"): a clear P is an entry
//! that is absent, RSVD one that breaks a rule, anything else a right that is missing. CR2 has the address, with the bits
//! above the ones that are translated as the highest of these is; nothing says a level.
//!
//! The guest comes out for each access, so that no thread of its own has to spin. Whether what the processor cached is still
//! cached after that depends on the machine: with nested paging it mostly is, links too; where KVM shadows the table all of it
//! may be gone. So a flush that is missing may show here, and need not. A page fault drops what there is of the address (Intel
//! SDM volume 3, "Operations that Invalidate TLBs and Paging-Structure Caches"): the handler of a fault on rights that are
//! there has nothing to do but to return.

use std::arch::x86_64::__cpuid_count;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_regs, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use notifier_core::OutputAddr;
use spte_core::FlushRequest;
use spte_core::format::{EntryError, Format, Level};
use spte_core::raw::HardwareKind;
use spte_drive::Driven;
use spte_model::{Access, MemType, Shape, TouchKind};
use spte_x86::{Levels, LongMode, LongModeAttrs, LongModeOptions, Step, Steps};

use crate::emulator::{Lost, Tools, Workshop};
use crate::machine::{Class, Exit, Fault, Fixed, Ground, GuestAccess, Machine, Work};
use crate::machines::x86::guest::{ASSEMBLER, attrs, returning};
use crate::memory::{ByteOrder, Memory, Region};

const RAM_BYTES: u64 = 64 << 20;
const CODE: u64 = 0x1_0000;
const SCRATCH: u64 = 0x1_1000;
const TABLES: u64 = 0x10_0000;
const DATA: u64 = 0x200_0000;
/// Where the guest has its code; the scratch page follows.
const FIXED: u64 = 0x7fff_ffe0_0000;
/// Offsets in the code page, as in the stub.
const LOAD: u64 = 0;
const STORE: u64 = 0x10;
const FETCH: u64 = 0x20;
const DONE: u64 = 0x30;
const FLUSH: u64 = 0x40;
const WORK: u64 = 0x80;
const KICK: u64 = 0x7f8;
const GDT: u64 = 0x800;
const IDT: u64 = 0xa00;
/// Offsets in the scratch page, behind the counts of the loop.
const FAULT: u64 = 0x40;
const VALUE: u64 = 0x48;
const LIST: u64 = 0x80;
const MOST_PAIRS: usize = 64;
const STACK: u64 = 0x1000;
/// What a page fault pushes: the error code, and RIP.
const ERROR: u64 = STACK - 0x30;
const RIP: u64 = STACK - 0x28;
/// Ports.
const PORT_DONE: u16 = 0x80;
const PORT_FAULT: u16 = 0x81;
const PORT_KICKED: u16 = 0x82;

/// One set-up of the format.
#[derive(Debug, Clone, Copy)]
pub struct Variant {
    /// What it is called.
    pub name: &'static str,
    /// Levels.
    pub levels: Levels,
    /// Leaves are global.
    pub global: bool,
}

/// Four levels, with leaves that are global or not, and five where this processor has them.
pub fn variants() -> Vec<Variant> {
    let four = Variant { name: "x86-kvm-cr3", levels: Levels::Four, global: false };
    let global = Variant { name: "x86-kvm-cr3-global", global: true, ..four };
    let five = Variant { name: "x86-kvm-cr3-5", levels: Levels::Five, ..four };
    // LA57.
    let has_five = __cpuid_count(7, 0).ecx & 1 << 16 != 0;
    if has_five { vec![four, global, five] } else { vec![four, global] }
}

/// Who has the virtual processor.
enum Processor {
    /// This thread.
    Here(VcpuFd),
    /// One that runs the guest's loop.
    Away(JoinHandle<(VcpuFd, Result<u16, Lost>)>),
    /// It was lost.
    Gone,
}

impl fmt::Debug for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Here(_) => "Here",
            Self::Away(_) => "Away",
            Self::Gone => "Gone",
        })
    }
}

/// A guest on /dev/kvm.
#[derive(Debug)]
pub struct KvmGuest {
    variant: Variant,
    format: LongMode,
    ground: Ground,
    processor: Processor,
    root: u64,
    /// It waits in its loop.
    at_work: bool,
    /// It has run on the present root.
    has_run: bool,
    _vm: VmFd,
}

fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Lost {
    move |error| Lost::Run { program: what.to_owned(), source: io::Error::from(error) }
}

/// What this processor has, as far as guests may have it: EAX, EBX, ECX, EDX of a leaf.
fn cpuid(entries: &[kvm_bindings::kvm_cpuid_entry2], leaf: u32) -> [u32; 4] {
    let found = entries.iter().find(|entry| entry.function == leaf && entry.index == 0);
    found.map_or([0; 4], |entry| [entry.eax, entry.ebx, entry.ecx, entry.edx])
}

impl KvmGuest {
    /// Makes one.
    ///
    /// # Errors
    /// [`Lost`]; [`Lost::NotHere`] where there is no /dev/kvm that this program may use, or this processor lacks what the
    /// variant is about.
    pub fn start(tools: &Tools, variant: Variant) -> Result<Self, Lost> {
        let kvm = Kvm::new().map_err(|error| Lost::NotHere(format!("/dev/kvm is not here: {error}")))?;
        let region = Region { output: 0, bytes: RAM_BYTES, offset: 0 };
        let memory = Arc::new(Memory::new(&[region], ByteOrder::Little)?);
        let guest = include_str!("../../stubs/kvm_guest.S");
        memory.write(CODE, &Workshop::new()?.assemble(tools, &ASSEMBLER, "guest", guest, FIXED)?);
        let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM_BYTES,
            userspace_addr: memory.word(0).as_ptr() as u64,
        };
        // SAFETY: the mapping outlives every run: `ground` has the memory while the processor is here, the thread's clone while it
        // is away, and `drop` joins that thread first.
        unsafe { vm.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        let vcpu = vm.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        let has = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        vcpu.set_cpuid2(&has).map_err(failed("KVM_SET_CPUID2"))?;
        let has = has.as_slice();
        let [_, vendor, ..] = cpuid(has, 0);
        let [.., extended] = cpuid(has, 0x8000_0001);
        let [sizes, ..] = cpuid(has, 0x8000_0008);
        let [_, _, features, _] = cpuid(has, 7);
        if variant.levels == Levels::Five && features & 1 << 16 == 0 {
            return Err(Lost::NotHere("this processor has no tables of five levels".to_owned()));
        }
        let options = LongModeOptions {
            levels: variant.levels,
            physical_bits: (sizes & 0xff) as u8,
            pages_1g: extended & 1 << 26 != 0,
            no_execute: extended & 1 << 20 != 0,
            // "GenuineIntel" begins so.
            link_global_reserved: vendor.to_le_bytes() != *b"Genu",
            ..LongModeOptions::default()
        };
        let format = LongMode::new(options).map_err(|error| Lost::Needs(error.to_string()))?;
        let ground = Ground {
            memory,
            tables: TABLES..DATA,
            data: DATA..RAM_BYTES,
            fixed: vec![
                Fixed { gpa: FIXED, output: CODE, access: Access::RX },
                Fixed { gpa: FIXED + 0x1000, output: SCRATCH, access: Access::RW },
            ],
            kick: CODE + KICK,
        };
        let processor = Processor::Here(vcpu);
        Ok(Self { variant, format, ground, processor, root: 0, at_work: false, has_run: false, _vm: vm })
    }

    fn vcpu(&mut self) -> Result<&mut VcpuFd, Lost> {
        match &mut self.processor {
            Processor::Here(vcpu) => Ok(vcpu),
            Processor::Away(_) => Err(Lost::Answer("nothing: the guest is at work".to_owned())),
            Processor::Gone => Err(Lost::Answer("nothing: its processor is gone".to_owned())),
        }
    }

    /// Sets the registers for one of the routines of the code page.
    fn go_to(&mut self, routine: u64, registers: kvm_regs) -> Result<(), Lost> {
        // RFLAGS: nothing but the bit that is always there.
        let registers = kvm_regs { rip: FIXED + routine, rsp: FIXED + 0x1000 + STACK, rflags: 2, ..registers };
        self.vcpu()?.set_regs(&registers).map_err(failed("KVM_SET_REGS"))?;
        self.has_run = true;
        Ok(())
    }

    /// Where the guest's scratch page has a word.
    fn scratch(&self, offset: u64) -> u64 {
        self.ground.memory.load(SCRATCH + offset)
    }

    /// As linear addresses are.
    fn canonical(&self, at: u64) -> u64 {
        let unused = 64 - self.format.geometry().address_bits();
        (((at << unused) as i64) >> unused) as u64
    }

    fn exit(&self, port: u16) -> Result<Exit, Lost> {
        match port {
            PORT_DONE => Ok(Exit::Done { value: self.scratch(VALUE) }),
            PORT_KICKED => Ok(Exit::Kicked),
            PORT_FAULT => {
                let (error, cr2, rip) = (self.scratch(ERROR), self.scratch(FAULT), self.scratch(RIP));
                let syndrome = format!("error code {error:#x}, CR2 {cr2:#x}, RIP {rip:#x}");
                // P, W/R, RSVD, I/D; bit 2 is for accesses at CPL 3.
                let class = match (error & 1 << 3 != 0, error & 1 != 0) {
                    (true, _) => Class::Misconfigured,
                    (false, false) => Class::Absent,
                    (false, true) => Class::Denied,
                };
                let class = if error & !0x1b == 0 { class } else { Class::Other };
                let kind = match (error & 1 << 4 != 0, error & 1 << 1 != 0) {
                    (true, _) => TouchKind::Execute,
                    (false, true) => TouchKind::Write,
                    (false, false) => TouchKind::Read,
                };
                let translated = u64::MAX >> (64 - self.format.geometry().address_bits());
                // An address that is not canonical is no address of this table.
                let at = if self.canonical(cr2) == cr2 { cr2 & translated } else { cr2 };
                Ok(Exit::Fault(Fault { class, at: Some(at), blind: 0, level: None, kind: Some(kind), syndrome }))
            }
            port => Err(Lost::Answer(format!("port {port:#x}"))),
        }
    }

    /// Has the guest take these steps.
    fn steps(&mut self, steps: &[(u64, u64)]) -> Result<(), Lost> {
        for part in steps.chunks(MOST_PAIRS) {
            for (number, (operation, operand)) in part.iter().enumerate() {
                let at = SCRATCH + LIST + 16 * number as u64;
                self.ground.memory.store(at, *operation);
                self.ground.memory.store(at + 8, *operand);
            }
            let list = FIXED + 0x1000 + LIST;
            self.go_to(FLUSH, kvm_regs { rsi: list, rcx: part.len() as u64, ..kvm_regs::default() })?;
            match run(self.vcpu()?)? {
                PORT_DONE => {}
                port => return Err(Lost::Answer(format!("a flush by {:?}", self.exit(port)?))),
            }
        }
        Ok(())
    }

    /// Whether the guest can run at all: its code is mapped. Where it is not, the table is on its way out.
    fn can_run(&self) -> bool {
        let geometry = self.format.geometry();
        let mut table = self.root;
        let mut level = geometry.top();
        loop {
            let raw = self.ground.memory.load(table + 8 * geometry.index(level, FIXED) as u64);
            match (self.format.hardware_kind(level, raw), level.below()) {
                (HardwareKind::Table(below), Some(next)) => (table, level) = (below.as_u64(), next),
                (HardwareKind::Leaf, _) => return true,
                _ => return false,
            }
        }
    }

    /// Before the guest runs on a new root for the first time, whatever is left of the last one goes.
    fn arrive(&mut self) -> Result<(), Lost> {
        if self.has_run { Ok(()) } else { self.steps(&[operation(Step::Everything)]) }
    }

    fn work(&mut self) -> Result<(), Lost> {
        match std::mem::replace(&mut self.processor, Processor::Gone) {
            Processor::Here(mut vcpu) => {
                let memory = Arc::clone(&self.ground.memory);
                let thread = std::thread::spawn(move || {
                    let port = run(&mut vcpu);
                    drop(memory);
                    (vcpu, port)
                });
                self.processor = Processor::Away(thread);
                self.at_work = true;
                Ok(())
            }
            other => {
                self.processor = other;
                self.vcpu().map(|_| ())
            }
        }
    }
}

/// Runs the guest until it writes to a port: which one.
fn run(vcpu: &mut VcpuFd) -> Result<u16, Lost> {
    loop {
        match vcpu.run() {
            Ok(VcpuExit::IoOut(port, _)) => return Ok(port),
            // A signal.
            Ok(VcpuExit::Intr) => {}
            Ok(exit) => return Err(Lost::Answer(format!("an exit for {exit:?}"))),
            Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
            Err(error) => return Err(failed("KVM_RUN")(error)),
        }
    }
}

/// As FLUSH in the stub has them.
fn operation(step: Step) -> (u64, u64) {
    match step {
        Step::Invlpg(address) => (0, address),
        Step::WriteCr3 => (1, 0),
        Step::Everything => (2, 0),
    }
}

/// Flat, at CPL 0.
fn segment(selector: u16, kind: u8, long: bool) -> kvm_segment {
    let (l, db) = if long { (1, 0) } else { (0, 1) };
    kvm_segment { base: 0, limit: u32::MAX, selector, type_: kind, present: 1, db, s: 1, l, g: 1, ..Default::default() }
}

/// For the kernel's own pages, which are global where any are.
fn global(mem: MemType) -> Option<LongModeAttrs> {
    Some(LongModeAttrs { global: true, user: false, ..attrs(mem)? })
}

impl Machine for KvmGuest {
    type Format = LongMode;

    fn name(&self) -> &str {
        self.variant.name
    }

    fn driven(&self) -> Driven<LongMode> {
        let LongModeOptions { levels, physical_bits, pages_1g, .. } = *self.format.options();
        let shape = if levels == Levels::Five { Shape::x86_64_la57() } else { Shape::x86_64() };
        let bits = self.format.geometry().address_bits();
        let shape = shape.with_bits(bits, physical_bits.into());
        let shape = shape.unwrap_or_else(|error| panic!("{}: {error}", self.variant.name));
        let shape = if pages_1g { shape } else { shape.with_leaves_up_to(2 << 20) };
        Driven { format: self.format.clone(), shape, attrs: if self.variant.global { global } else { attrs } }
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

    /// Not for sure.
    fn caches(&self) -> bool {
        false
    }

    fn begin(&mut self, root: OutputAddr) -> Result<(), Lost> {
        let five = self.variant.levels == Levels::Five;
        let no_execute = self.format.options().no_execute;
        let vcpu = self.vcpu()?;
        let mut registers = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        registers.cs = segment(8, 11, true);
        let data = segment(0x10, 3, false);
        [registers.ds, registers.es, registers.fs, registers.gs, registers.ss] = [data; 5];
        registers.gdt.base = FIXED + GDT;
        registers.gdt.limit = 0x17;
        registers.idt.base = FIXED + IDT;
        registers.idt.limit = 15 * 16 - 1;
        // PG, WP, NE, ET, MP, PE; PAE, PGE, LA57; LMA, LME, NXE.
        registers.cr0 = 0x8001_0033;
        registers.cr4 = 0xa0 | u64::from(five) << 12;
        registers.efer = 0x500 | u64::from(no_execute) << 11;
        registers.cr3 = root.as_u64();
        vcpu.set_sregs(&registers).map_err(failed("KVM_SET_SREGS"))?;
        (self.root, self.at_work, self.has_run) = (root.as_u64(), false, false);
        Ok(())
    }

    fn access(&mut self, access: GuestAccess) -> Result<Exit, Lost> {
        self.arrive()?;
        let routine = match access.kind {
            TouchKind::Read => LOAD,
            TouchKind::Write => STORE,
            TouchKind::Execute => FETCH,
        };
        let (rbx, rax, rcx) = (self.canonical(access.at), access.value, FIXED + DONE);
        self.go_to(routine, kvm_regs { rax, rbx, rcx, ..kvm_regs::default() })?;
        self.at_work = false;
        let port = run(self.vcpu()?)?;
        self.exit(port)
    }

    fn flush(&mut self, request: &FlushRequest<'_>) -> Result<(), Lost> {
        if !self.has_run {
            return Ok(());
        }
        if !self.can_run() {
            // What the processor has goes before the guest runs again (`arrive`).
            self.has_run = false;
            return Ok(());
        }
        let format = self.format.clone();
        let steps: Vec<(u64, u64)> = Steps::new(&format, self.variant.global, request).map(operation).collect();
        if !self.at_work {
            return self.steps(&steps);
        }
        // The write to the port is done with when the guest is run again; it comes back at once.
        let vcpu = self.vcpu()?;
        vcpu.set_kvm_immediate_exit(1);
        let done = vcpu.run().map(|exit| format!("{exit:?}"));
        vcpu.set_kvm_immediate_exit(0);
        match done {
            Err(error) if error.errno() == rustix::io::Errno::INTR.raw_os_error() => {}
            Err(error) => return Err(failed("KVM_RUN")(error)),
            Ok(exit) => return Err(Lost::Answer(format!("an exit for {exit} at once"))),
        }
        let registers = vcpu.get_regs().map_err(failed("KVM_GET_REGS"))?;
        self.steps(&steps)?;
        self.vcpu()?.set_regs(&registers).map_err(failed("KVM_SET_REGS"))
    }

    fn refresh(&mut self, _: u64, _: Level) -> Option<Result<(), Lost>> {
        Some(Ok(()))
    }

    fn run(&mut self, work: Work) -> Result<(), Lost> {
        self.arrive()?;
        let registers = kvm_regs {
            r8: self.canonical(work.first + Work::OFFSET),
            r9: work.pages,
            r10: work.stride,
            r11: work.pages - work.written,
            r12: self.canonical(work.counts),
            ..kvm_regs::default()
        };
        self.go_to(WORK, registers)?;
        self.work()
    }

    fn poll(&mut self) -> Result<Option<Exit>, Lost> {
        if !matches!(&self.processor, Processor::Away(thread) if thread.is_finished()) {
            return Ok(None);
        }
        let Processor::Away(thread) = std::mem::replace(&mut self.processor, Processor::Gone) else { return Ok(None) };
        let (vcpu, port) = thread.join().map_err(|_| Lost::Answer("nothing: its thread is gone".to_owned()))?;
        self.processor = Processor::Here(vcpu);
        self.exit(port?).map(Some)
    }

    fn resume(&mut self) -> Result<(), Lost> {
        self.work()
    }
}

impl Drop for KvmGuest {
    fn drop(&mut self) {
        if let Processor::Away(thread) = std::mem::replace(&mut self.processor, Processor::Gone) {
            self.ground.memory.store(self.ground.kick, 1);
            // How it ended matters to nobody.
            let _ = thread.join();
        }
    }
}
