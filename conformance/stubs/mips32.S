# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A 32-bit processor with a page table walker, in kernel mode: the walker fills the TLB from the table under test. Guest physical
# addresses are useg; the stub is in kseg0 and its mailbox in kseg1, which are not mapped.
#
# A TLB refill exception means that the walker gave up on the way: it has no other way to say so.
#
# Words of the mailbox and of guests have 64 bits, of which this processor looks at the lower half, LOW bytes behind the
# beginning, and leaves the upper zero; what guests load and store goes through the floating-point unit, whole. PAGE_SHIFT and
# PAGE_MASK come before this file too.
#
#   $17 ASID                 $18 last TLB index       $19 number of the last request
#   $20 mailbox              $21 unique EntryHis      $15 where exceptions lead
#   $2 to $6, $8 to $11, $31, $f0 commands; exceptions leave ExcCode | 0x100 in $8, BadVAddr in $9, EPC in $10, and 1 in $11 where
#   they are refills
#   $7, $12 to $14, $28 to $30, $f2 the loop of command 4: they survive other commands until 5
#
#   1 begin   PWBase, PWField, PWSize, PWCtl       -> Config1, Config3, Config4, PageGrain, PWField, PWSize, PWCtl
#   2 flush   number of pairs {operation, operand}: 0 SYNC, 1 drop the pair with this EntryHi, 2 new ASID, 3 stop the walker,
#             4 start it
#   3 access  address, kind (0 load, 1 store, 2 fetch), value
#   4 work    first address, pages, stride, pages written, counts, kick word
#   5 resume
#   6 look    EntryHi                              -> Index, EntryHi, PageMask, EntryLo0, EntryLo1 (lower halves)
#   3, 4, 5 answer value, $8 (0 done, 2 kicked), BadVAddr, EPC, $11
        .set    noreorder
        .set    noat
        .set    fp=64
        .equ    MAILBOX, 0x30000
        .equ    LOOP, 0x4300            # arguments of command 4
        .equ    UNIQUE, 0x4000          # an EntryHi for each index, from the format's crate
        .equ    HIGH, 4 - LOW

        .macro  address register, label
        lui     \register, 0x8000
        ori     \register, \register, \label - base
        .endm
        .macro  result number, register
        sw      \register, 136 + 8 * \number + LOW($20)
        sw      $0, 136 + 8 * \number + HIGH($20)
        .endm
        .macro  registers               # after an exception
        mfc0    $8, $13                 # Cause
        mfc0    $9, $8                  # BadVAddr
        mfc0    $10, $14                # EPC
        ext     $8, $8, 2, 5
        ori     $8, $8, 0x100
        mtc0    $15, $14
        ehb
        eret
        .endm

base:
        .org    0                       # TLB refill
        li      $11, 1
        registers
        .org    0x180                   # everything else
        li      $11, 0
        registers

        .org    0x1000
start:  lui     $8, 0x3400              # CU0, CU1, FR; neither BEV nor ERL nor EXL
        mtc0    $8, $12
        ehb
        mtc0    $0, $6                  # Wired
        mtc0    $0, $6, 6               # PWCtl: no walks yet
        lui     $8, 0xe800              # PageGrain: RIE, XIE, ELPA, IEC
        mtc0    $8, $5, 1
        li      $8, PAGE_MASK
        mtc0    $8, $5
        ehb
        lui     $20, 0xa000 + (MAILBOX >> 16)
        lui     $21, 0x8000
        ori     $21, $21, UNIQUE
        mfc0    $18, $16, 1
        ext     $18, $18, 25, 6         # Config1: index of the last TLB entry
        li      $17, 1
        jal     drop_all
        nop
        lw      $19, 128 + LOW($20)
main:   lw      $8, LOW($20)
        beq     $8, $19, main
        nop
        move    $19, $8
        sync
        lw      $9, 8 + LOW($20)        # command
        lw      $4, 16 + LOW($20)       # arguments
        lw      $5, 24 + LOW($20)
        lw      $6, 32 + LOW($20)
        li      $10, 3
        beq     $9, $10, access
        li      $10, 2
        beq     $9, $10, flush
        li      $10, 1
        beq     $9, $10, begin
        li      $10, 4
        beq     $9, $10, work
        li      $10, 5
        beq     $9, $10, resume
        li      $10, 6
        beq     $9, $10, look
        nop
reply:  sync
        sw      $19, 128 + LOW($20)
        b       main
        nop

begin:  mtc0    $0, $6, 6
        ehb
        mtc0    $4, $5, 5
        mtc0    $5, $5, 6
        mtc0    $6, $5, 7
        jal     drop_all
        ehb
        lw      $8, 40 + LOW($20)
        mtc0    $8, $6, 6
        ehb
        mfc0    $8, $16, 1
        result  0, $8
        mfc0    $8, $16, 3
        result  1, $8
        mfc0    $8, $16, 4
        result  2, $8
        mfc0    $8, $5, 1
        result  3, $8
        mfc0    $8, $5, 6
        result  4, $8
        mfc0    $8, $5, 7
        result  5, $8
        mfc0    $8, $6, 6
        result  6, $8
        b       reply
        nop

drop_all:                               # every index its unique EntryHi, and nothing valid
        mtc0    $0, $2
        mtc0    $0, $3
        move    $8, $18
1:      sll     $9, $8, 3
        addu    $9, $9, $21
        lw      $9, LOW($9)
        or      $9, $9, $17
        mtc0    $8, $0
        mtc0    $9, $10
        ehb
        tlbwi
        bnez    $8, 1b
        addiu   $8, $8, -1
        mtc0    $17, $10
        ehb
        jr      $31
        nop

flush:  addiu   $5, $20, 256
1:      beqz    $4, reply
        addiu   $4, $4, -1
        lw      $6, LOW($5)
        lw      $8, 8 + LOW($5)
        addiu   $5, $5, 16
        beqz    $6, 2f
        li      $9, 1
        beq     $6, $9, 3f
        li      $9, 2
        bne     $6, $9, 5f
        nop
        addiu   $17, $17, 1             # a new ASID; after the last of them they begin anew, with an empty TLB
        andi    $17, $17, 0xff
        mtc0    $17, $10
        bnez    $17, 1b
        ehb
        li      $17, 1
        jal     drop_all
        nop
        b       1b
        nop
2:      sync
        b       1b
        nop
3:      or      $8, $8, $17
        mtc0    $8, $10
        ehb
        tlbp
        ehb
        mfc0    $8, $0
        bltz    $8, 4f                  # index 0 is a hit too
        sll     $8, $8, 3
        addu    $8, $8, $21
        lw      $8, LOW($8)
        or      $8, $8, $17
        mtc0    $8, $10
        mtc0    $0, $2
        mtc0    $0, $3
        ehb
        tlbwi
4:      mtc0    $17, $10
        b       1b
        ehb
5:      mfc0    $8, $6, 6
        andi    $6, $6, 4               # 3 clears PWEn, 4 sets it
        srl     $6, $6, 2
        ins     $8, $6, 31, 1
        mtc0    $8, $6, 6
        b       1b
        ehb

access: move    $8, $0
        move    $9, $0
        move    $10, $0
        move    $11, $0
        srl     $2, $4, PAGE_SHIFT + 1  # see mips64.S
        sll     $2, $2, PAGE_SHIFT + 1
        or      $2, $2, $17
        mtc0    $2, $10
        ehb
        tlbp
        ehb
        mfc0    $2, $0
        bltz    $2, 1f
        nop
        tlbr
        ehb
        tlbwi
        ehb
1:
        address $15, answer
        beqz    $5, 1f
        li      $2, 1
        beq     $5, $2, 2f
        ldc1    $f0, 32($20)
        address $31, 3f
        jr      $4                      # comes back with its number in $2
        nop
3:      mtc1    $2, $f0
        b       answer
        mthc1   $0, $f0
1:      ldc1    $f0, 0($4)
        b       answer
        nop
2:      sdc1    $f0, 0($4)
answer: sdc1    $f0, 136($20)
        result  1, $8
        result  2, $9
        result  3, $10
        result  4, $11
        b       reply
        nop

look:   or      $8, $4, $17
        mtc0    $8, $10
        ehb
        tlbp
        ehb
        mfc0    $8, $0
        result  0, $8
        bltz    $8, 1f
        nop
        tlbr
        ehb
        mfc0    $8, $10
        result  1, $8
        mfc0    $8, $5
        result  2, $8
        mfc0    $8, $2
        result  3, $8
        mfc0    $8, $3
        result  4, $8
        li      $8, PAGE_MASK
        mtc0    $8, $5
1:      mtc0    $17, $10
        b       reply
        ehb

# $29 arguments: 0 first address, 4 pages, 8 stride, 12 pages written, 16 counts, 20 kick word
# $12 page, $13 pages left, $14 passes, $30 mismatches, $f2 what is loaded or stored, $7 address of counts or kick word, $28 where to go on
work:   lui     $29, 0x8000
        ori     $29, $29, LOOP
        sw      $4, 0($29)
        sw      $5, 4($29)
        sw      $6, 8($29)
        lw      $2, 40 + LOW($20)
        sw      $2, 12($29)
        lw      $2, 48 + LOW($20)
        sw      $2, 16($29)
        lw      $2, 56 + LOW($20)
        sw      $2, 20($29)
        move    $14, $0
        move    $30, $0
        address $28, pass
resume: address $15, left
        jr      $28
        nop
pass:   lw      $12, 0($29)
        lw      $13, 4($29)
page:   ldc1    $f2, 0x20($12)
        mfc1    $2, $f2
        addiu   $3, $12, 0x20
        xor     $2, $2, $3
        mfhc1   $3, $f2
        or      $2, $2, $3
        beqz    $2, 1f
        lw      $2, 12($29)
        addiu   $30, $30, 1
1:      sltu    $2, $2, $13
        bnez    $2, 2f
        lw      $7, 20($29)
        mtc1    $14, $f2
        mthc1   $0, $f2
        sdc1    $f2, 0x28($12)
2:      lw      $2, LOW($7)
        bnez    $2, kicked
        nop
next:   lw      $2, 8($29)
        addiu   $13, $13, -1
        bnez    $13, page
        addu    $12, $12, $2
        addiu   $14, $14, 1
        lw      $7, 16($29)
        sw      $14, LOW($7)
        sw      $0, HIGH($7)
        sw      $30, 8 + LOW($7)
        sw      $0, 8 + HIGH($7)
        b       pass
        nop
kicked: li      $8, 2
        address $10, next
left:   b       answer                  # by an exception, or kicked
        move    $28, $10
