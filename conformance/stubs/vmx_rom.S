# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The ROM, 64 KiB below 4 GiB: from the reset vector to long mode, with the first 4 GiB at their own addresses by pages of
# 2 MiB, and on to vmx.S, which is in RAM already.
#
# Bochs hands RAM out in blocks, in the order in which they are first touched. So all of RAM is touched here before anything else,
# in ascending order; what lies in the hole below 1 MiB is no RAM.
        .equ    RAM_BYTES, 64 << 20
        .equ    BLOCK, 0x10000          # no more than a block
        .equ    HOLE, 0xa0000
        .equ    TABLES, 0x10000         # PML4, PDPT, four PDs
        .equ    STUB, 0x20000

        .text
        .code16
real:   cli
        lgdtl   %cs:(gdtr - real)
        mov     %cr0, %eax
        and     $0x9fffffff, %eax       # caches on
        or      $1, %eax
        mov     %eax, %cr0
        ljmpl   $8, $protected
        .balign 8
gdt:    .quad   0
        .quad   0x00cf9b000000ffff      # 0x08: 32-bit code
        .quad   0x00cf93000000ffff      # 0x10: data
        .quad   0x00af9b000000ffff      # 0x18: 64-bit code
gdtr:   .word   31
        .long   gdt

        .code32
protected:
        mov     $0x10, %eax
        mov     %eax, %ds
        mov     %eax, %es
        mov     %eax, %ss
        xor     %esi, %esi
1:      mov     (%esi), %eax
        add     $BLOCK, %esi
        cmp     $HOLE, %esi
        jne     2f
        mov     $0x100000, %esi
2:      cmp     $RAM_BYTES, %esi
        jb      1b

        mov     $TABLES, %edi
        xor     %eax, %eax
        mov     $0x800, %ecx
        rep stosl
        movl    $TABLES + 0x1003, TABLES
        mov     $4, %ecx
        mov     $TABLES + 0x1000, %edi
        mov     $TABLES + 0x2003, %eax
1:      mov     %eax, (%edi)
        add     $8, %edi
        add     $0x1000, %eax
        loop    1b
        mov     $TABLES + 0x2000, %edi
        mov     $0x83, %eax
        mov     $2048, %ecx
2:      mov     %eax, (%edi)
        movl    $0, 4(%edi)
        add     $8, %edi
        add     $0x200000, %eax
        loop    2b

        mov     $0x620, %eax            # CR4: PAE, OSFXSR, OSXMMEXCPT
        mov     %eax, %cr4
        mov     $TABLES, %eax
        mov     %eax, %cr3
        mov     $0xc0000080, %ecx       # EFER: LME, NXE
        rdmsr
        or      $0x900, %eax
        wrmsr
        mov     %cr0, %eax
        or      $0x80010020, %eax       # PG, WP, NE
        mov     %eax, %cr0
        ljmpl   $0x18, $STUB

        .org    0xfff0
        .code16
        jmp     real
        .org    0x10000
