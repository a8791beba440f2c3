// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
//! What the guest executes: a program at CPL3, and a stub at CPL0 for exceptions.
//!
//! Both are position-independent and lie in this file's read-only data: the host copies them into the control region and
//! never executes them.
#![allow(unsafe_code)]

use core::arch::global_asm;

/// Port of the program's `OUT`: a job is done.
pub(super) const DONE_PORT: u16 = 0x10;
/// Port of the stub's `OUT`: an exception, of which a [`Frame`] on the CPL0 stack tells.
pub(super) const EXCEPTION_PORT: u16 = 0x11;
/// Exceptions: vectors 0 (`#DE`) to 31.
pub(super) const VECTORS: usize = 32;
/// Bytes from one vector's entry in the stub to the next.
pub(super) const ENTRY_BYTES: usize = 16;
/// Where a page fault's code, and the others, are pushed: bytes of a [`Frame`].
pub(super) const FRAME_BYTES: usize = 8 * 8;

// A job list, at the address in RBX, is the number of copies (8 bytes), and three times 8 bytes for each: source,
// destination, quadwords. Nothing but RBX outlives a job. The program has no stack: it never pushes.
//
// After the OUT the next KVM_RUN goes on with the jump, and so with the next list.
//
// Vectors that push an error code: Intel SDM volume 3, "Exception and Interrupt Reference"; AMD APM volume 2, "Exceptions",
// for 29 and 30. A zero takes its place for the others, so that all frames are alike.
global_asm!(
    r#"
    .pushsection .rodata.secondary_mmu_guest, "a", @progbits
    .irp symbol, program, program_end, stub, stub_end
    .globl  secondary_mmu_guest_\symbol
    .hidden secondary_mmu_guest_\symbol
    .endr
    .balign 16
secondary_mmu_guest_program:
    mov     rdx, qword ptr [rbx]
    lea     r8, [rbx + 8]
2:
    test    rdx, rdx
    jz      3f
    mov     rsi, qword ptr [r8]
    mov     rdi, qword ptr [r8 + 8]
    mov     rcx, qword ptr [r8 + 16]
    rep     movsq
    add     r8, 24
    dec     rdx
    jmp     2b
3:
    out     {done}, al
    jmp     secondary_mmu_guest_program
secondary_mmu_guest_program_end:

    .balign 16
secondary_mmu_guest_stub:
    .irp vector, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30,31
    .balign {entry}
    .if (\vector != 8) && (\vector != 17) && (\vector != 21) && (\vector != 29) && (\vector != 30) && ((\vector < 10) || (\vector > 14))
    push    0
    .endif
    push    \vector
    jmp     4f
    .endr
    .balign {entry}
4:
    mov     rax, cr2
    push    rax
    out     {exception}, al
5:
    hlt
    jmp     5b
secondary_mmu_guest_stub_end:
    .popsection
    "#,
    done = const DONE_PORT,
    exception = const EXCEPTION_PORT,
    entry = const ENTRY_BYTES,
);

// SAFETY: defined above, with these names, in initialised read-only data.
unsafe extern "C" {
    static secondary_mmu_guest_program: u8;
    static secondary_mmu_guest_program_end: u8;
    static secondary_mmu_guest_stub: u8;
    static secondary_mmu_guest_stub_end: u8;
}

/// The bytes from one symbol to the other.
///
/// # Safety
/// Both are symbols of one stretch of initialised memory that is never written, `end` not below `start`.
unsafe fn between(start: *const u8, end: *const u8) -> &'static [u8] {
    // SAFETY: both point into (or one past) the same stretch, in this order, and nobody writes it: the caller's promise.
    unsafe { core::slice::from_raw_parts(start, end.offset_from_unsigned(start)) }
}

/// The program at CPL3. It begins at its first byte.
pub(super) fn program() -> &'static [u8] {
    // SAFETY: the two symbols stand in this order around the program, in a read-only section.
    unsafe { between(&raw const secondary_mmu_guest_program, &raw const secondary_mmu_guest_program_end) }
}

/// The stub at CPL0. Vector `n` enters it [`ENTRY_BYTES`]` * n` bytes from its beginning.
pub(super) fn stub() -> &'static [u8] {
    // SAFETY: the two symbols stand in this order around the stub, in a read-only section.
    unsafe { between(&raw const secondary_mmu_guest_stub, &raw const secondary_mmu_guest_stub_end) }
}

/// What lies on the CPL0 stack, from its pointer upwards, when the stub's `OUT` exits. Above it are CS, RFLAGS, RSP and SS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) cr2: u64,
    pub(super) vector: u64,
    pub(super) error_code: u64,
    pub(super) rip: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodings worked out by hand (Intel SDM volume 2): `push imm8` is 6a ib, `jmp rel32` e9 cd or `jmp rel8` eb cb,
    /// `out imm8, al` e6 ib, `mov rax, cr2` 0f 20 d0.
    #[test]
    fn each_vector_has_its_entry_where_the_idt_says() {
        let stub = stub();
        for vector in 0..VECTORS {
            let entry = &stub[vector * ENTRY_BYTES..][..ENTRY_BYTES];
            let pushes_code = [8, 10, 11, 12, 13, 14, 17, 21, 29, 30].contains(&vector);
            let push = if pushes_code { &entry[..2] } else { &entry[2..4] };
            assert_eq!(push, [0x6a, vector as u8], "vector {vector}");
            assert_eq!(entry[..2] == [0x6a, 0], !pushes_code || vector == 0, "vector {vector}");
        }
        assert_eq!(stub[VECTORS * ENTRY_BYTES..][..6], [0x0f, 0x20, 0xd0, 0x50, 0xe6, EXCEPTION_PORT as u8]);
    }

    #[test]
    fn the_programs_fit_their_pages_and_end_a_job_with_one_out() {
        assert!(program().len() <= crate::machine::PAGE && stub().len() <= crate::machine::PAGE);
        let outs = program().windows(2).filter(|pair| *pair == [0xe6, DONE_PORT as u8]).count();
        assert_eq!(outs, 1);
    }
}
