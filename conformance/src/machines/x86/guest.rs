// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What every x86 machine has, whatever virtualizes its guest: the ROM, the guest's code, and, where the table under test
//! translates guest physical addresses, the guest's own tables.

use crate::emulator::{Assembler, Lost, Tools, Workshop};
use crate::machine::{GuestAccess, Work};
use crate::memory::Memory;
use spte_model::{MemType, TouchKind};
use spte_x86::{Levels, LongModeAttrs, MemoryType, Pat};

/// For x86-64, on a machine of any kind.
pub(crate) const ASSEMBLER: Assembler = Assembler {
    prefix: ["x86_64-linux-gnu-as", "x86_64-linux-gnu-ld", "x86_64-linux-gnu-objcopy"],
    package: "binutils-x86-64-linux-gnu",
    options: &["--64"],
    link: &["-melf_x86_64"],
};

/// Where the ROM begins and the processor expects its last 16 bytes.
const ROM: u64 = 0xffff_0000;

/// Numbers of general registers, as instructions have them.
pub(crate) mod gpr {
    pub(crate) const RAX: usize = 0;
    pub(crate) const RCX: usize = 1;
    pub(crate) const RBX: usize = 3;
    pub(crate) const RSI: usize = 6;
    pub(crate) const RDI: usize = 7;
    pub(crate) const R8: usize = 8;
    pub(crate) const R9: usize = 9;
    pub(crate) const R10: usize = 10;
    pub(crate) const R11: usize = 11;
    pub(crate) const R12: usize = 12;
    pub(crate) const R13: usize = 13;
    pub(crate) const R14: usize = 14;
}

/// A register and its value.
pub(crate) type Register = (usize, u64);

/// What rdi has where the loop came out for a kick.
pub(crate) const KICKED: u64 = 1;

/// The instruction by which a guest leaves, of three bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Hypercall {
    /// Under SVM.
    Vmmcall,
}

impl Hypercall {
    fn name(self) -> &'static str {
        match self {
            Self::Vmmcall => "vmmcall",
        }
    }

    fn bytes(self) -> [u8; 3] {
        match self {
            Self::Vmmcall => [0x0f, 0x01, 0xd9],
        }
    }

    /// The guest's page of code.
    ///
    /// # Errors
    /// [`Lost`].
    pub(crate) fn page(self, tools: &Tools, workshop: &Workshop) -> Result<Vec<u8>, Lost> {
        let hypercall = self.name();
        let source = include_str!("../../../stubs/x86_guest.S");
        let source = format!(".macro hypercall\n{hypercall}\n.endm\n{source}");
        workshop.assemble(tools, &ASSEMBLER, "x86_guest", &source, 0)
    }

    /// MOV eax, number, and the hypercall.
    pub(crate) fn code(self, number: u16) -> [u8; 16] {
        load(number, &self.bytes())
    }
}

/// MOV eax, number, and a jump to where rcx says: for guests that leave by something longer.
pub(crate) fn returning(number: u16) -> [u8; 16] {
    load(number, &[0xff, 0xe1])
}

/// MOV eax, number, and what follows.
fn load(number: u16, then: &[u8]) -> [u8; 16] {
    let mut code = [0x90; 16];
    code[0] = 0xb8;
    code[1..5].copy_from_slice(&u32::from(number).to_le_bytes());
    code[5..5 + then.len()].copy_from_slice(then);
    code
}

/// A ROM that boots into a stub at `stub`, whose own paging has so many levels, and EFER.NXE or not.
///
/// # Errors
/// [`Lost`].
pub(crate) fn rom(
    tools: &Tools,
    workshop: &Workshop,
    stub: u64,
    levels: Levels,
    no_execute: bool,
) -> Result<Vec<u8>, Lost> {
    let source = include_str!("../../../stubs/x86_boot.S");
    let (levels, nxe) = (levels.get(), u8::from(no_execute));
    let source = format!(".equ STUB, {stub:#x}\n.equ LEVELS, {levels}\n.equ NXE, {nxe}\n{source}");
    workshop.assemble(tools, &ASSEMBLER, "x86_boot", &source, ROM)
}

/// The addresses of a guest as the table under test has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Guest {
    /// How many bits they have.
    pub(crate) bits: u32,
    /// How many the guest's own tables translate. They are the table under test, or map addresses to themselves.
    linear: u32,
    /// Where its page of code is; other fixed pages follow. In the upper half, far from the ends.
    pub(crate) code: u64,
}

impl Guest {
    /// Of a guest with so many levels. `nested`: what is tested is not the guest's own table.
    pub(crate) fn new(levels: Levels, nested: bool) -> Self {
        let linear = 12 + 9 * u32::from(levels.get());
        let bits = if nested { IDENTITY_BITS } else { linear };
        Self { bits, linear, code: (5 << (bits - 3)) | 0x2340_0000 }
    }

    /// Offset of the kick word in the page of code.
    pub(crate) const KICK: u64 = 0xff8;

    /// As the processor wants it, with the bits above those that are translated as the highest of these is.
    pub(crate) fn canonical(self, address: u64) -> u64 {
        let unused = 64 - self.linear;
        (((address << unused) as i64) >> unused) as u64
    }

    /// The same without them.
    pub(crate) fn address(self, canonical: u64) -> u64 {
        canonical & ((1 << self.bits) - 1)
    }

    /// For one access: where the guest begins, and its registers.
    pub(crate) fn access(self, access: GuestAccess) -> (u64, [Register; 3]) {
        let offset = match access.kind {
            TouchKind::Read => 0,
            TouchKind::Write => 0x08,
            TouchKind::Execute => 0x10,
        };
        let registers = [(gpr::RAX, access.value), (gpr::RBX, self.canonical(access.at)), (gpr::RDI, 0)];
        (self.canonical(self.code + offset), registers)
    }

    /// For the loop: the same.
    pub(crate) fn work(self, work: Work) -> (u64, [Register; 10]) {
        let registers = [
            (gpr::RCX, u64::from(64 - self.linear)),
            (gpr::RSI, work.first + Work::OFFSET),
            (gpr::RDI, 0),
            (gpr::R8, work.pages),
            (gpr::R9, work.stride),
            (gpr::R10, work.written),
            (gpr::R11, self.canonical(work.counts)),
            (gpr::R12, self.canonical(self.code + Self::KICK)),
            (gpr::R13, 0),
            (gpr::R14, 0),
        ];
        (self.canonical(self.code + 0x40), registers)
    }
}

/// Bits of a guest physical address that [`identity`] reaches.
pub(crate) const IDENTITY_BITS: u32 = 40;

/// How many pages [`identity`] takes.
pub(crate) const IDENTITY_PAGES: u64 = 3;

/// Writes four-level tables that map 2^40 bytes of guest physical memory where they are, by 1 GiB, to pages that the guest
/// has from `gpa` on and `memory` from `output` on. Accessed and dirty are set throughout, so that a guest writes nothing
/// there. (To hardware its walks may be writes all the same: APM volume 2, 15.25.6.)
pub(crate) fn identity(memory: &Memory, output: u64, gpa: u64) {
    // Present, writable, user, accessed, dirty; and large.
    let (link, large) = (0x67, 0xe7);
    for table in 0..2 {
        memory.store(output + 8 * table, (gpa + 0x1000 * (1 + table)) | link);
        let page = output + 0x1000 * (1 + table);
        (0..512).for_each(|index| memory.store(page + 8 * index, (table << 39) | (index << 30) | large));
    }
}

/// The attributes of a memory type with the PAT that a processor has after reset, which has no write combining.
pub(crate) fn attrs(mem: MemType) -> Option<LongModeAttrs> {
    let memory_type = match mem {
        MemType::Wb => MemoryType::WriteBack,
        MemType::Uc => MemoryType::Uncacheable,
        MemType::Wc => MemoryType::WriteCombining,
        MemType::Wt => MemoryType::WriteThrough,
    };
    Some(LongModeAttrs { selector: Pat::RESET.selector(memory_type)?, ..LongModeAttrs::default() })
}
