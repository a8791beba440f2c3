# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The page of code that the table under test maps for the guest: 64-bit code without a stack, at CPL 3 or 0. Whoever assembles
# it defines the macro `hypercall` before it, which leaves the guest and keeps its registers.
#
# It comes out with edi as the reason: 0 done, 1 kicked. Guest addresses are as the table under test has them, without the
# copies of the highest bit that make them canonical; the loop adds those.
        .text
        mov     (%rbx), %rax            # 0x00: load
        hypercall
        .org    0x08
        mov     %rax, (%rbx)            # 0x08: store
        hypercall
        .org    0x10
        jmp     *%rbx                   # 0x10: fetch

        # The loop. What the stub, or this program, sets before it, and nobody changes:
        #   cl   64 less the bits of linear addresses   rsi  the first word       r9   bytes from page to page
        #   r8   pages   r10  those at the end that are written   r11  counts   r12  kick word (both canonical)
        # and what it keeps:
        #   rdx  guest address    rbx  the same, canonical    rbp  pages to go    r13  passes    r14  mismatches
        .org    0x40
pass:   mov     %rsi, %rdx
        mov     %r8, %rbp
page:   mov     %rdx, %rbx
        shl     %cl, %rbx
        sar     %cl, %rbx
        mov     (%rbx), %rax
        cmp     %rdx, %rax
        je      1f
        inc     %r14
1:      cmp     %r10, %rbp
        ja      2f
        mov     %r13, 8(%rbx)
2:      cmpl    $0, (%r12)
        je      3f
        mov     $1, %edi
        hypercall
        xor     %edi, %edi
3:      add     %r9, %rdx
        dec     %rbp
        jnz     page
        inc     %r13
        mov     %r13, (%r11)
        mov     %r14, 8(%r11)
        jmp     pass

        .org    0xff8
        .quad   0                       # the kick word
