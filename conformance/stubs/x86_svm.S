# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The stub under SVM: long mode, CPL 0, memory where it is (x86_boot.S). This program fills the VMCB and the guest's other
# registers in memory; the stub runs it. Nothing interrupts: no device is set up, and interrupts are off here and in the guest.
#
#   r14 number of the last request    r15 mailbox    (the guest has all registers while it runs)
#
#   1 begin                                             -> CPUID 8000_000A EDX, EBX; CPUID 8000_0008 EAX
#   2 flush   number of pairs {operation, operand}:
#             1 INVLPGA of this address, 2 TLB_CONTROL of the next VMRUN
#   3 run                                               -> EXITCODE, EXITINFO1, EXITINFO2, rax, rdi, RIP
#
# Command 3 is a single access, a loop, and going on: the registers in memory say which. After a hypercall the guest goes on
# behind it (RIP is that of the VMMCALL, and not every processor saves the next one). TLB_CONTROL holds for one VMRUN.
#
# Whoever assembles it says before it where things are: MAILBOX, HSAVE, VMCB, REGS (rax to r15 by their numbers; rax and rsp
# are the VMCB's), and ASID.
        .equ    EFER, 0xc0000080
        .equ    SVME, 0x1000
        .equ    VM_HSAVE_PA, 0xc0010117
        # Offsets in a VMCB.
        .equ    TLB_CONTROL, 0x5c
        .equ    EXITCODE, 0x70
        .equ    EXITINFO1, 0x78
        .equ    EXITINFO2, 0x80
        .equ    RIP, 0x578
        .equ    RAX, 0x5f8
        .equ    EXIT_VMMCALL, 0x81
        .equ    VMMCALL_BYTES, 3

        .text
_start: mov     $EFER, %ecx
        rdmsr
        or      $SVME, %eax
        wrmsr
        mov     $VM_HSAVE_PA, %ecx
        mov     $HSAVE, %eax
        xor     %edx, %edx
        wrmsr
        mov     $MAILBOX, %r15d
        mov     128(%r15), %r14
main:   mov     (%r15), %rax
        cmp     %r14, %rax
        je      main
        mov     %rax, %r14
        mov     8(%r15), %rax           # command
        cmp     $3, %rax
        je      run
        cmp     $2, %rax
        je      flush
        cmp     $1, %rax
        je      begin
        movq    $-1, 136(%r15)
reply:  mov     %r14, 128(%r15)
        jmp     main

begin:  mov     $0x8000000a, %eax
        cpuid
        mov     %rdx, 136(%r15)
        mov     %rbx, 144(%r15)
        mov     $0x80000008, %eax
        cpuid
        mov     %rax, 152(%r15)
        jmp     reply

flush:  mov     16(%r15), %rdx
        lea     256(%r15), %rsi
1:      dec     %rdx
        js      reply
        mov     8(%rsi), %rax
        cmpl    $1, (%rsi)
        jne     2f
        mov     $ASID, %ecx
        invlpga %rax, %ecx
        jmp     3f
2:      mov     VMCB + TLB_CONTROL, %cl # what is pending already may be more: 1 is more than 3, and 3 than 7
        test    %cl, %cl
        jz      4f
        cmp     %al, %cl
        jbe     3f
4:      mov     %al, VMCB + TLB_CONTROL
3:      add     $16, %rsi
        jmp     1b

        .macro  load n, r
        mov     REGS - VMCB + 8 * \n(%rax), %\r
        .endm
        .macro  save n, r
        mov     %\r, REGS - VMCB + 8 * \n(%rax)
        .endm
        .macro  all do
        \do     1, rcx
        \do     2, rdx
        \do     3, rbx
        \do     5, rbp
        \do     6, rsi
        \do     7, rdi
        .irp    n, 8, 9, 10, 11, 12, 13, 14, 15
        \do     \n, r\n
        .endr
        .endm
run:    mov     $VMCB, %eax
        all     load
        vmrun   %rax
        all     save
        mov     $MAILBOX, %r15d
        mov     (%r15), %r14
        movb    $0, TLB_CONTROL(%rax)
        mov     EXITCODE(%rax), %rbx
        mov     %rbx, 136(%r15)
        mov     EXITINFO1(%rax), %rcx
        mov     %rcx, 144(%r15)
        mov     EXITINFO2(%rax), %rcx
        mov     %rcx, 152(%r15)
        mov     RAX(%rax), %rcx
        mov     %rcx, 160(%r15)
        mov     %rdi, 168(%r15)
        mov     RIP(%rax), %rcx
        mov     %rcx, 176(%r15)
        cmp     $EXIT_VMMCALL, %rbx
        jne     reply
        addq    $VMMCALL_BYTES, RIP(%rax)
        jmp     reply
