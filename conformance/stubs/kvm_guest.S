# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The guest's page of code, in long mode at CPL 0 on the table under test. There is no stub: the host sets the registers before
# each run, and the guest comes back by a write to a port. RSP is the end of the scratch page, and nothing but a page fault
# pushes anything there.
#
#   LOAD, STORE, FETCH   RBX address, RAX value, RCX where fetched code comes back (DONE)    -> port 0x80, VALUE
#   FLUSH                RSI list of pairs {operation, operand}, RCX how many (not 0)        -> port 0x80
#   WORK                 R8 first address, R9 pages, R10 stride, R11 first page to write, R12 counts
#                        R13 page, RBP passes, RDI address                                   -> port 0x82: kicked
#   a page fault                                                                             -> port 0x81, CR2 in FAULT, and
#                                                                                               error code and RIP as pushed
# From 0x81 and 0x82 it goes on when it is run again: with the access that faulted, or after a look at the kick word.
# Any other exception has no gate, and ends in a shutdown.
        .equ    FIXED, 0x7fffffe00000   # guest address of this page, and of the scratch page behind it
        .equ    SCRATCH, FIXED + 0x1000
        .equ    FAULT, SCRATCH + 0x40
        .equ    VALUE, SCRATCH + 0x48
        .equ    HANDLER, FIXED + 0x140

        .text
        .code64
        mov     (%rbx), %rax            # 0x00: LOAD
        jmp     done
        .org    0x10                    # STORE
        mov     %rax, (%rbx)
        jmp     done
        .org    0x20                    # FETCH
        jmp     *%rbx
        .org    0x30                    # DONE
done:   movabs  %rax, VALUE
        out     %al, $0x80

        .org    0x40                    # FLUSH
flush:  mov     (%rsi), %rdx
        mov     8(%rsi), %rbx
        cmp     $1, %rdx
        je      1f
        ja      2f
        invlpg  (%rbx)                  # 0
        jmp     3f
1:      mov     %cr3, %rax              # 1: what is not global
        mov     %rax, %cr3
        jmp     3f
2:      mov     %cr4, %rax              # 2: everything
        and     $~0x80, %rax            # PGE
        mov     %rax, %cr4
        or      $0x80, %rax
        mov     %rax, %cr4
3:      add     $16, %rsi
        loop    flush
        out     %al, $0x80

        .org    0x80                    # WORK
        xor     %ebp, %ebp
        movq    $0, (%r12)
        movq    $0, 8(%r12)
pass:   mov     %r8, %rdi
        xor     %r13d, %r13d
page:   mov     (%rdi), %rax
        cmp     %rdi, %rax
        je      1f
        incq    8(%r12)
1:      cmp     %r11, %r13
        jb      2f
        mov     %rbp, 8(%rdi)
2:      cmpq    $0, kick(%rip)
        je      3f
        out     %al, $0x82
3:      add     %r10, %rdi
        inc     %r13
        cmp     %r9, %r13
        jb      page
        inc     %rbp
        mov     %rbp, (%r12)
        jmp     pass

        .org    0x140                   # the page-fault handler
        push    %rax
        mov     %cr2, %rax
        movabs  %rax, FAULT
        pop     %rax
        out     %al, $0x81
        add     $8, %rsp                # the error code
        iretq

        .org    0x7f8
kick:   .quad   0

        .org    0x800                   # GDT
        .quad   0
        .quad   0x00af9b000000ffff      # 0x08: 64-bit code
        .quad   0x00cf93000000ffff      # 0x10: data

        .org    0xa00 + 14 * 16         # IDT: vector 14 alone
        .short  HANDLER & 0xffff, 8, 0x8e00, (HANDLER >> 16) & 0xffff
        .long   HANDLER >> 32, 0
        .org    0x1000
