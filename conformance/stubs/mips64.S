# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# A 64-bit processor without a page table walker, in kernel mode: the refill handler here walks the table under test, as Linux's
# does (tlbex.c, build_r4000_tlb_refill_handler): it loads pointer after pointer without a look at any of them, then both
# entries of the pair, shifts them to EntryLo, and writes a random TLB entry. Guest physical addresses are xuseg; the stub is
# in kseg0 and its mailbox in kseg1, which are not mapped. EntryLo says nothing about modes, so the guest's accesses are the
# stub's own, in kernel mode.
#
# QEMU keeps translations that it looked up, beside the TLB that it emulates, and a page that was stored to or fetched from counts as
# readable there, whatever RI says. So before an access its pair, if there is one, is read and written back as it is: then
# QEMU forgets what it looked up through it. A change of ASID makes it forget everything, which takes long: that is why entries that
# are dropped keep the ASID, though they match nothing.
#
# What comes before this file says what the table is like: PAGE_SHIFT, PAIR_BITS (index bits of a pair in a table of pages),
# ENTRY_SHIFT (an entry shifted down by that is an EntryLo), RIXI, PAGE_MASK, and `directories`: one `directory` each, from
# the root down, with level, lowest bit and bits of the index.
#
#   $16 root (xkphys)        $17 ASID                 $18 last TLB index       $19 number of the last request
#   $20 mailbox              $21 unique EntryHis      $22 refills              $15 where exceptions lead
#   $25 level of the table that the refill handler loads from, 0 outside of it: an exception there is of the link above
#   $26 address that is refilled; $27, $23, $24 the handler's
#   $2 to $6, $8 to $11, $31 commands; exceptions leave ExcCode | 0x100 in $8, BadVAddr in $9, EPC in $10, $25 in $11
#   $1, $7, $12 to $14, $28 to $30 the loop of command 4: they survive other commands until 5
#
#   1 begin   root (address in xkphys)             -> Config1, Config3, Config4, PageGrain
#   2 flush   number of pairs {operation, operand}: 0 SYNC, 1 drop the pair with this EntryHi, 2 new ASID
#   3 access  address, kind (0 load, 1 store, 2 fetch), value
#   4 work    first address, pages, stride, pages written, counts, kick word
#   5 resume
#   6 look    EntryHi                              -> Index, EntryHi, PageMask, EntryLo0, EntryLo1
#   3, 4, 5 answer value, $8 (0 done, 2 kicked), BadVAddr, EPC, $25, refills so far, $26
        .set    noreorder
        .set    noat
        .equ    MAILBOX, 0x30000
        .equ    LOOP, 0x4300            # arguments of command 4
        .equ    UNIQUE, 0x4000          # an EntryHi for each index, from the format's crate

        .macro  address register, label
        lui     \register, 0x8000
        ori     \register, \register, \label - base
        .endm
        .macro  directory level, shift, bits
        li      $25, \level
        dext    $24, $26, \shift, \bits
        dlsa    $27, $24, $27, 3
        ld      $27, 0($27)
        .endm
        .macro  entry_lo register
        .if     RIXI                    # down to XI; RI and XI go round to the top
        dsrl    \register, \register, ENTRY_SHIFT - 2
        drotr   \register, \register, 2
        .else
        dsrl    \register, \register, ENTRY_SHIFT
        .endif
        .endm

base:
        .org    0x80                    # XTLB refill
        b       refill
        dmfc0   $26, $8                 # BadVAddr
        .org    0x180                   # everything else, also what goes wrong in the refill handler
        mfc0    $8, $13                 # Cause
        dmfc0   $9, $8
        dmfc0   $10, $14                # EPC
        ext     $8, $8, 2, 5
        ori     $8, $8, 0x100
        move    $11, $25
        move    $25, $0
        dmtc0   $15, $14
        ehb
        eret

refill: daddiu  $22, $22, 1
        move    $27, $16
        directories
        li      $25, 1
        dext    $24, $26, PAGE_SHIFT + 1, PAIR_BITS
        dlsa    $27, $24, $27, 4
        ld      $23, 0($27)
        ld      $24, 8($27)
        move    $25, $0
        entry_lo $23
        entry_lo $24
        dmtc0   $23, $2
        dmtc0   $24, $3
        ehb
        tlbwr
        eret

        .org    0x1000
start:  lui     $8, 0x1000
        ori     $8, $8, 0x00e0          # CU0, KX, SX, UX; neither BEV nor ERL nor EXL
        mtc0    $8, $12
        ehb
        mtc0    $0, $6                  # Wired
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
        move    $25, $0
        jal     drop_all
        nop
        ld      $19, 128($20)
main:   ld      $8, 0($20)
        beq     $8, $19, main
        nop
        move    $19, $8
        sync
        ld      $9, 8($20)              # command
        ld      $4, 16($20)             # arguments
        ld      $5, 24($20)
        ld      $6, 32($20)
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
        sd      $19, 128($20)
        b       main
        nop

begin:  move    $16, $4
        jal     drop_all
        nop
        mfc0    $8, $16, 1
        sd      $8, 136($20)
        mfc0    $8, $16, 3
        sd      $8, 144($20)
        mfc0    $8, $16, 4
        sd      $8, 152($20)
        mfc0    $8, $5, 1
        sd      $8, 160($20)
        b       reply
        nop

drop_all:                               # every index its unique EntryHi, and nothing valid
        dmtc0   $0, $2
        dmtc0   $0, $3
        move    $8, $18
1:      dlsa    $9, $8, $21, 3
        ld      $9, 0($9)
        or      $9, $9, $17
        mtc0    $8, $0
        dmtc0   $9, $10
        ehb
        tlbwi
        bnez    $8, 1b
        daddiu  $8, $8, -1
        dmtc0   $17, $10
        ehb
        jr      $31
        nop

flush:  daddiu  $5, $20, 256
1:      beqz    $4, reply
        daddiu  $4, $4, -1
        ld      $6, 0($5)
        ld      $8, 8($5)
        daddiu  $5, $5, 16
        beqz    $6, 2f
        li      $9, 1
        beq     $6, $9, 3f
        nop
        daddiu  $17, $17, 1             # a new ASID; after the last of them they begin anew, with an empty TLB
        andi    $17, $17, 0xff
        dmtc0   $17, $10
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
        dmtc0   $8, $10
        ehb
        tlbp
        ehb
        mfc0    $8, $0
        bltz    $8, 4f                  # index 0 is a hit too
        dlsa    $8, $8, $21, 3
        ld      $8, 0($8)
        or      $8, $8, $17
        dmtc0   $8, $10
        dmtc0   $0, $2
        dmtc0   $0, $3
        ehb
        tlbwi
4:      dmtc0   $17, $10
        b       1b
        ehb

access: move    $8, $0
        move    $9, $0
        move    $10, $0
        move    $11, $0
        .if     RIXI                    # see above
        dsrl    $2, $4, PAGE_SHIFT + 1
        dsll    $2, $2, PAGE_SHIFT + 1
        or      $2, $2, $17
        dmtc0   $2, $10
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
        .endif
        address $15, answer
        beqz    $5, 1f
        li      $2, 1
        beq     $5, $2, 2f
        move    $31, $15
        jr      $4                      # comes back with its number in $2
        nop
1:      ld      $2, 0($4)
        b       answer
        nop
2:      sd      $6, 0($4)
answer: sd      $2, 136($20)
        sd      $8, 144($20)
        sd      $9, 152($20)
        sd      $10, 160($20)
        sd      $11, 168($20)
        sd      $22, 176($20)
        b       reply
        sd      $26, 184($20)

look:   or      $8, $4, $17
        dmtc0   $8, $10
        ehb
        tlbp
        ehb
        mfc0    $8, $0
        bltz    $8, 1f
        sd      $8, 136($20)
        tlbr
        ehb
        dmfc0   $8, $10
        sd      $8, 144($20)
        mfc0    $8, $5
        sd      $8, 152($20)
        dmfc0   $8, $2
        sd      $8, 160($20)
        dmfc0   $8, $3
        sd      $8, 168($20)
        li      $8, PAGE_MASK
        mtc0    $8, $5
1:      dmtc0   $17, $10
        b       reply
        ehb

# $29 arguments: 0 first address, 8 pages, 16 stride, 24 pages written, 32 counts, 40 kick word
# $12 page, $13 pages left, $14 passes, $30 mismatches, $1 what was loaded, $7 address of counts or kick word, $28 where to go on
work:   lui     $29, 0x8000
        ori     $29, $29, LOOP
        sd      $4, 0($29)
        sd      $5, 8($29)
        sd      $6, 16($29)
        ld      $2, 40($20)
        sd      $2, 24($29)
        ld      $2, 48($20)
        sd      $2, 32($29)
        ld      $2, 56($20)
        sd      $2, 40($29)
        move    $14, $0
        move    $30, $0
        address $28, pass
resume: address $15, left
        jr      $28
        nop
pass:   ld      $12, 0($29)
        ld      $13, 8($29)
page:   ld      $1, 0x20($12)
        daddiu  $2, $12, 0x20
        beq     $1, $2, 1f
        ld      $2, 24($29)
        daddiu  $30, $30, 1
1:      sltu    $2, $2, $13
        bnez    $2, 2f
        ld      $7, 40($29)
        sd      $14, 0x28($12)
2:      ld      $2, 0($7)
        bnez    $2, kicked
        nop
next:   ld      $2, 16($29)
        daddiu  $13, $13, -1
        bnez    $13, page
        daddu   $12, $12, $2
        daddiu  $14, $14, 1
        ld      $7, 32($29)
        sd      $14, 0($7)
        sd      $30, 8($7)
        b       pass
        nop
kicked: li      $8, 2
        address $10, next
left:   b       answer                  # by an exception, or kicked
        move    $28, $10
