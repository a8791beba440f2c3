# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# VMX root operation, in long mode: lets a guest run on the EPT under test.
#
# The guest (vmx_guest.S) reads the same mailbox and answers 3, 4 and 5 itself, so that it stays inside from one access to the
# next, and what it has cached stays too. The root has the rest: a VMCALL says that a request is not the guest's, any other
# exit is the answer to what the guest was asked. Each entry goes to the guest's own loop, at GUEST.
#
# RBX mailbox; RAX, RCX, RDX, RSI of root. The guest keeps R8 to R13, RDI, RBP for its loop, and R15: where the loop goes on.
#
#   1 begin   EPTP                                    -> 0; or 2, and in the last word the VM-instruction error
#   2 flush   number of pairs {INVEPT type, EPTP}     -> as 1
#   3, 4, 5   see vmx_guest.S; from here              -> 2, exit reason, qualification, guest physical address, guest linear
#                                                        address, RIP, interruption information, VM-instruction error
#   6 what the processor has                          -> IA32_VMX_EPT_VPID_CAP, MAXPHYADDR
        .equ    MAILBOX, 0x30000
        .equ    VMXON, 0x32000
        .equ    VMCS, 0x33000
        .equ    RAM_BYTES, 64 << 20
        .equ    FIXED, 0xffffe00000     # guest address of the pages that vmx.rs has mapped
        .equ    GUEST, FIXED
        .equ    GUEST_PML4, FIXED + 0x2000
        .equ    IA32_VMX_BASIC, 0x480
        .equ    IA32_VMX_EPT_VPID_CAP, 0x48c
        .equ    EPTP, 0x201a

        .text
        .code64
_start: lea     stack(%rip), %rsp
        mov     $MAILBOX, %ebx
        mov     $0x100000, %eax         # marks, by which the host sees that it has the same RAM
1:      mov     %rax, (%rax)
        add     $0x10000, %eax
        cmp     $RAM_BYTES, %eax
        jb      1b
        mov     %cr4, %rax              # VMXE
        or      $0x2000, %eax
        mov     %rax, %cr4
        mov     $0x3a, %ecx             # IA32_FEATURE_CONTROL: locked, VMX outside SMX
        rdmsr
        test    $1, %al
        jnz     2f
        or      $5, %eax
        wrmsr
2:      mov     $IA32_VMX_BASIC, %ecx
        rdmsr
        and     $0x7fffffff, %eax
        mov     %eax, VMXON
        mov     %eax, VMCS
        movq    $VMXON, pointer(%rip)
        vmxon   pointer(%rip)
        movq    $VMCS, pointer(%rip)

main:   pause
        mov     (%rbx), %rax
        cmp     128(%rbx), %rax
        je      main
        mov     8(%rbx), %rax
        cmp     $1, %rax
        je      begin
        cmp     $2, %rax
        je      flush
        cmp     $6, %rax
        je      has
        # The guest's: it is entered, and finds the request where it is.
        mov     $0x681e, %eax           # RIP
        mov     entry(%rip), %rcx
        vmwrite %rcx, %rax
        cmpb    $0, launched(%rip)
        jne     1f
        movb    $1, launched(%rip)
        vmlaunch
        jmp     2f
1:      vmresume
2:      movq    $-1, 144(%rbx)          # neither enters: as an exit for no reason
        jmp     error
reply:  mov     (%rbx), %rax
        mov     %rax, 128(%rbx)
        jmp     main

begin:  vmclear pointer(%rip)
        vmptrld pointer(%rip)
        movb    $0, launched(%rip)
        lea     fields(%rip), %rsi
1:      movzwl  (%rsi), %eax
        test    %eax, %eax
        jz      2f
        mov     4(%rsi), %rcx
        vmwrite %rcx, %rax
        add     $12, %rsi
        jmp     1b
2:      lea     controls(%rip), %rsi    # what is wanted, with what has to be 1 and without what has to be 0
3:      movzwl  (%rsi), %ecx
        jrcxz   4f
        rdmsr
        or      4(%rsi), %eax
        and     %edx, %eax
        mov     %eax, %ecx
        movzwl  2(%rsi), %eax
        vmwrite %rcx, %rax
        add     $8, %rsi
        jmp     3b
4:      mov     $0x6c00, %eax           # host CR0, CR3, CR4, RSP, RIP
        mov     %cr0, %rcx
        vmwrite %rcx, %rax
        mov     $0x6c02, %eax
        mov     %cr3, %rcx
        vmwrite %rcx, %rax
        mov     $0x6c04, %eax
        mov     %cr4, %rcx
        vmwrite %rcx, %rax
        mov     $0x6c14, %eax
        vmwrite %rsp, %rax
        mov     $0x6c16, %eax
        lea     exit(%rip), %rcx
        vmwrite %rcx, %rax
        sgdt    table(%rip)
        mov     $0x6c0c, %eax           # host GDTR
        mov     table+2(%rip), %rcx
        vmwrite %rcx, %rax
        mov     $EPTP, %eax
        mov     16(%rbx), %rcx
        vmwrite %rcx, %rax
        mov     $2, %eax                # of no table anything
        invept  zero(%rip), %rax
        movq    $0, 136(%rbx)
        ja      reply
error:  movq    $2, 136(%rbx)
        mov     $0x4400, %ecx
        vmread  %rcx, %rax
        mov     %rax, 192(%rbx)
        jmp     reply

flush:  mov     16(%rbx), %rcx
        lea     256(%rbx), %rsi
        movq    $0, descriptor+8(%rip)
        test    %rcx, %rcx
        jz      reply
1:      mov     (%rsi), %rax
        mov     8(%rsi), %rdx
        mov     %rdx, descriptor(%rip)
        invept  descriptor(%rip), %rax
        movq    $0, 136(%rbx)
        jbe     error
        add     $16, %rsi
        loop    1b
        jmp     reply

has:    mov     $IA32_VMX_EPT_VPID_CAP, %ecx
        rdmsr
        mov     %eax, 136(%rbx)
        mov     %edx, 140(%rbx)
        mov     %rbx, %rsi
        mov     $0x80000008, %eax
        cpuid
        mov     %rsi, %rbx
        movzbl  %al, %eax
        mov     %rax, 144(%rbx)
        jmp     reply

exit:   mov     $MAILBOX, %ebx
        mov     $0x4402, %ecx           # exit reason
        vmread  %rcx, %rax
        cmp     $18, %eax               # VMCALL
        je      main
        # A guest that waited lost its own pages with the table it ran on: nobody asked, and nobody is answered.
        mov     (%rbx), %rdx
        cmp     128(%rbx), %rdx
        je      main
        mov     8(%rbx), %rdx
        cmp     $3, %rdx
        jb      main
        movq    $2, 136(%rbx)
        mov     %rax, 144(%rbx)
        mov     $0x6400, %ecx
        vmread  %rcx, 152(%rbx)
        mov     $0x2400, %ecx
        vmread  %rcx, 160(%rbx)
        mov     $0x640a, %ecx
        vmread  %rcx, 168(%rbx)
        mov     $0x681e, %ecx
        vmread  %rcx, %rax
        mov     %rax, 176(%rbx)
        cmp     $3, %rdx
        je      1f
        mov     %rax, %r15              # the loop goes on with what faulted
1:      mov     $0x4404, %ecx
        vmread  %rcx, 184(%rbx)
        jmp     reply

        .balign 16
pointer:
        .quad   0
table:  .quad   0, 0
entry:  .quad   GUEST
launched:
        .quad   0
        .balign 16
zero:   .quad   0, 0
descriptor:
        .quad   0, 0

# Capability MSR, field, what is wanted.
        .macro  control msr, field, wanted
        .short  \msr, \field
        .long   \wanted
        .endm
controls:
        control 0x481, 0x4000, 0        # pin-based
        control 0x482, 0x4002, 1 << 31  # processor-based: there are secondary ones
        control 0x48b, 0x401e, 1 << 1   # secondary: EPT
        control 0x483, 0x400c, 1 << 9   # exit: to 64 bits
        control 0x484, 0x4012, 1 << 9   # entry: to IA-32e mode
        .short  0

# Field, value.
        .macro  field number, value
        .short  \number, 0
        .quad   \value
        .endm
fields: field   0x4004, 0xffffffff      # every exception is an exit
        field   0x4006, 0
        field   0x4008, 0
        field   0x400a, 0
        field   0x400e, 0
        field   0x4010, 0
        field   0x4014, 0
        field   0x4016, 0
        field   0x6000, 0
        field   0x6002, 0
        field   0x2800, -1              # link pointer
        field   0x0c00, 0x10            # host ES, CS, SS, DS, FS, GS, TR
        field   0x0c02, 0x18
        field   0x0c04, 0x10
        field   0x0c06, 0x10
        field   0x0c08, 0x10
        field   0x0c0a, 0x10
        field   0x0c0c, 0x20
        field   0x6c06, 0
        field   0x6c08, 0
        field   0x6c0a, 0
        field   0x6c0e, 0
        field   0x4c00, 0
        field   0x6c10, 0
        field   0x6c12, 0
        field   0x0800, 0x10            # guest ES, CS, SS, DS, FS, GS, LDTR, TR: selectors
        field   0x0802, 0x18
        field   0x0804, 0x10
        field   0x0806, 0x10
        field   0x0808, 0x10
        field   0x080a, 0x10
        field   0x080c, 0
        field   0x080e, 0x20
        field   0x4800, 0xffffffff      # limits, with those of GDTR and IDTR
        field   0x4802, 0xffffffff
        field   0x4804, 0xffffffff
        field   0x4806, 0xffffffff
        field   0x4808, 0xffffffff
        field   0x480a, 0xffffffff
        field   0x480c, 0
        field   0x480e, 0x67
        field   0x4810, 0
        field   0x4812, 0
        field   0x4814, 0xc093          # access rights
        field   0x4816, 0xa09b
        field   0x4818, 0xc093
        field   0x481a, 0xc093
        field   0x481c, 0xc093
        field   0x481e, 0xc093
        field   0x4820, 0x10000
        field   0x4822, 0x8b
        field   0x4824, 0               # interruptibility, activity
        field   0x4826, 0
        field   0x482a, 0
        field   0x6800, 0x80010031      # CR0: PG, WP, NE, ET, PE
        field   0x6802, GUEST_PML4
        field   0x6804, 0x2020          # CR4: VMXE, PAE
        field   0x6806, 0               # bases
        field   0x6808, 0
        field   0x680a, 0
        field   0x680c, 0
        field   0x680e, 0
        field   0x6810, 0
        field   0x6812, 0
        field   0x6814, 0
        field   0x6816, 0
        field   0x6818, 0
        field   0x681a, 0x400           # DR7
        field   0x681c, 0               # RSP
        field   0x6820, 2               # RFLAGS
        field   0x6822, 0
        field   0x6824, 0
        field   0x6826, 0
        .short  0
        .space  256
        .balign 16
stack:
