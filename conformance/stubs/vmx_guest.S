# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The guest's page of code, in VMX non-root operation. It runs in long mode; its own tables, three more pages that the EPT maps, map the
# lowest 2^40 addresses to themselves with pages of 1 GiB, so that each linear address is guest physical.
#
# It reads the mailbox itself. What is not for it, or goes wrong, is an exit to vmx.S. It has no stack.
#
#   3 access  address, kind (0 load, 1 store, 2 fetch), value   -> 0, what was loaded, or RAX as fetched code left it
#   4 work    first address, pages, stride, first page to write, counts
#   5 resume                                                    -> 1: kicked
#
# The loop has R8 first address, R9 pages, R10 stride, R11 first page to write, R12 counts, R13 page, RBP passes, RDI address,
# R15 where to go on: the instruction that faulted, or the one after a look at the kick word.
        .equ    FIXED, 0xffffe00000
        .equ    MAILBOX, FIXED + 0x5000

        .text
        .code64
_start: movabs  $MAILBOX, %r14
wait:   pause
        mov     (%r14), %rax
        cmp     128(%r14), %rax
        je      wait
        mov     8(%r14), %rax
        cmp     $3, %rax
        je      access
        cmp     $4, %rax
        je      work
        cmp     $5, %rax
        je      resume
        vmcall

access: mov     16(%r14), %rbx
        mov     24(%r14), %rdx
        mov     32(%r14), %rax
        lea     done(%rip), %rcx        # fetched code comes back there
        cmp     $1, %rdx
        je      1f
        ja      2f
        mov     (%rbx), %rax
        jmp     done
1:      mov     %rax, (%rbx)
        jmp     done
2:      jmp     *%rbx
done:   mov     %rax, 144(%r14)
        movq    $0, 136(%r14)
reply:  mov     (%r14), %rax
        mov     %rax, 128(%r14)
        jmp     wait

work:   mov     16(%r14), %r8
        mov     24(%r14), %r9
        mov     32(%r14), %r10
        mov     40(%r14), %r11
        mov     48(%r14), %r12
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
2:      lea     3f(%rip), %r15
        cmpq    $0, kick(%rip)
        jne     kicked
3:      add     %r10, %rdi
        inc     %r13
        cmp     %r9, %r13
        jb      page
        inc     %rbp
        mov     %rbp, (%r12)
        jmp     pass
kicked: movq    $1, 136(%r14)
        jmp     reply
resume: jmp     *%r15

        .org    0x7f8
kick:   .quad   0
