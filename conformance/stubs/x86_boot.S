# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A ROM of 64 KiB below 4 GiB that brings a PC from its reset vector into long mode and jumps to a stub in memory, which is
# there already. Whoever assembles it says before it
#
#   STUB      where the stub is, below 4 GiB
#   LEVELS    4, or 5 for CR4.LA57
#   NXE       1 for EFER.NXE, or 0
#
# Both are of the stub's own paging, and of nested paging under SVM with it. The stub begins at CPL 0 with interrupts off, no
# stack, CR0.WP, and the first 4 GiB mapped where they are. Its page tables are in this ROM: accessed and dirty are set in all
# entries, so that nobody writes there.
        .equ    PAE, 1 << 5
        .equ    LA57, 1 << 12
        .equ    EFER, 0xc0000080
        .equ    LME, 1 << 8
        .equ    PG_WP, 0x80010000

        .text
        .code16
boot:   cli
        lgdtl   %cs:(gdtr - boot)
        mov     %cr0, %eax
        and     $0x9fffffff, %eax       # caches on
        or      $1, %eax
        mov     %eax, %cr0
        ljmpl   $0x08, $protected

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 0x08: 32-bit code
        .quad   0x00cf93000000ffff      # 0x10: data
        .quad   0x00af9b000000ffff      # 0x18: 64-bit code
gdtr:   .word   . - gdt - 1
        .long   gdt

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        .if     LEVELS == 5
        mov     $PAE | LA57, %eax
        mov     $pml5, %edx
        .else
        mov     $PAE, %eax
        mov     $pml4, %edx
        .endif
        mov     %eax, %cr4
        mov     %edx, %cr3
        mov     $EFER, %ecx
        rdmsr
        or      $(LME | NXE << 11), %eax
        wrmsr
        mov     %cr0, %eax
        or      $PG_WP, %eax
        mov     %eax, %cr0
        ljmpl   $0x18, $STUB

        .org    0x1000
pml5:   .quad   pml4 + 0x23             # P, W, A
        .org    0x2000
pml4:   .quad   pdpt + 0x23
        .org    0x3000
pdpt:   .irp    n, 0, 1, 2, 3
        .quad   (\n << 30) + 0xe3       # P, W, A, D, 1 GiB
        .endr

        .org    0xfff0                  # the reset vector
        .code16
        jmp     boot
        .org    0x10000
