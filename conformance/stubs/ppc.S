# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# Hypervisor state (HV), real mode, big-endian: lets a guest in real mode, whose effective addresses are guest real ones, run on the
# partition-scoped tree under test. Loaded at 0 by -bios, entered at 0x10; interrupts come to the vectors here.
#
# The guest has r3 to r16, the stub has the rest: what a loop holds survives an exit, and command 5 just goes back. XER, LR and
# CTR are nobody's. CR is not kept: the loop compares anew after each place where it can come out.
#   r19 number of the last request   r20 mailbox   r21 guest address of the code page (ppc_guest.S)   r22 where the loop goes on
#   r23 whether the loop runs   r24 MSR of the guest   r18 vector   r17 and r25 to r31 for a while
#
#   1 begin   PTCR, LPCR, LPID, code page                   -> LPCR, PVR, PTCR
#   2 flush   number of pairs {operation | RS << 8, RB}, see `operations`          -> 0, 0
#   3 access  address, offset of the routine in the code page (all ones: fetch from the address), value
#   4 work    first address, pages, stride, first page to write, counts, kick word
#   5 resume
#   3, 4, 5 answer                                          -> r3, vector, r16, HDSISR, HDAR, ASDR, HSRR0, HSRR1
# QEMU finds code by address in a cache beside its TLB, of which an invalidation by address clears only the 4 KiB at the start of a
# leaf (7.2). So a list that invalidates a larger leaf by address ends with calls of 64 pages of the stub's own that share the places of
# all there are: code is then found through the TLB again, of which nothing is dropped by that.
# Any interrupt answers like that. 0xc00 is the guest that is done, as it called the hypervisor (sc 1); r16 is 1 after a kick.
        .machine power9
        .set    MAILBOX, 0x30000
        .set    CALLED, 0x100000        # the 64 pages
        .set    AP, 0xe0                # IBM bits 56:58 of RB
        .set    WORK, 0x10              # offset of the loop in the code page
        .set    SRR0, 26
        .set    HDSISR, 306
        .set    HDAR, 307
        .set    HSRR0, 314
        .set    HSRR1, 315
        .set    LPCR, 318
        .set    LPIDR, 319
        .set    PTCR, 464
        .set    ASDR, 816
        .set    PVR, 287

        .text
        .org    0x10
_start: b       start

        .irp    vector, 0x100,0x200,0x300,0x380,0x400,0x480,0x500,0x600,0x700,0x800,0x900,0x980,0xa00,0xc00,0xd00,0xe00,0xe20,0xe40,0xe60,0xe80,0xea0,0xf00,0xf20,0xf40,0xf60,0xf80
        .org    \vector
        li      18, \vector
        b       exit
        .endr

        .org    0x1000
start:  lis     20, MAILBOX@h
        li      24, 1
        sldi    24, 24, 63
        ori     24, 24, 0x1000          # SF and ME: real mode, HV clear
        li      23, 0
        lis     25, 0x4e80
        ori     25, 25, 0x20            # blr
        lis     26, CALLED@h
        li      27, 64
        mtctr   27
1:      stw     25, 0(26)
        addi    26, 26, 0x1000
        bdnz    1b
        ld      19, 128(20)
main:   ld      25, 0(20)
        cmpd    25, 19
        beq     main
        mr      19, 25
        lwsync
        ld      26, 8(20)               # command
        ld      27, 16(20)              # first argument
        cmpdi   26, 3
        beq     access
        cmpdi   26, 2
        beq     flush
        cmpdi   26, 5
        beq     resume
        cmpdi   26, 4
        beq     work
        cmpdi   26, 1
        beq     begin
        li      25, -1
        std     25, 136(20)
reply:  lwsync
        std     19, 128(20)
        b       main

begin:  ld      28, 24(20)
        ld      29, 32(20)
        ld      21, 40(20)
        mtspr   PTCR, 27
        mtspr   LPCR, 28
        mtspr   LPIDR, 29
        isync
        li      25, 0xc00               # IS 3: of all partitions
        ptesync
        tlbie   25, 29, 2, 0, 1
        eieio
        tlbsync
        ptesync
        isync
        mfspr   25, LPCR
        std     25, 136(20)
        mfspr   25, PVR
        std     25, 144(20)
        mfspr   25, PTCR
        std     25, 152(20)
        b       reply

flush:  li      25, 0
        std     25, 136(20)
        std     25, 144(20)
        cmpdi   27, 0
        beq     reply
        mtctr   27
        li      17, 0                   # AP of what is invalidated by address
        addi    26, 20, 256 - 8
        lis     31, operations@h
        ori     31, 31, operations@l
1:      ld      28, 8(26)               # operation, RS
        ldu     29, 16(26)              # RB
        srdi    30, 28, 8
        clrldi  28, 28, 56
        cmpdi   28, 3
        bne     2f
        or      17, 17, 29
2:      sldi    28, 28, 3               # eight bytes each
        add     28, 28, 31
        mtlr    28
        blrl
        bdnz    1b
        andi.   17, 17, AP
        beq     reply
        lis     26, CALLED@h
        li      27, 64
        mtctr   27
3:      mtlr    26
        blrl
        addi    26, 26, 0x1000
        bdnz    3b
        b       reply
operations:
        ptesync                         # 0
        blr
        eieio                           # 1
        blr
        tlbsync                         # 2
        blr
        tlbie   29, 30, 0, 0, 1         # 3: RIC 0, PRS 0, R 1
        blr
        tlbie   29, 30, 1, 0, 1         # 4: RIC 1
        blr
        tlbie   29, 30, 2, 0, 1         # 5: RIC 2
        blr

access: ld      28, 24(20)
        ld      3, 32(20)
        mr      4, 27
        mr      25, 27
        cmpdi   28, -1
        beq     1f
        add     25, 21, 28
1:      li      23, 0
        b       enter

work:   mr      5, 27
        ld      6, 24(20)
        ld      7, 32(20)
        ld      8, 40(20)
        ld      9, 48(20)
        ld      10, 56(20)
        li      13, 0
        li      14, 0
        addi    22, 21, WORK
resume: mr      25, 22
        li      23, 1
enter:  li      16, 0
        mtspr   HDSISR, 16              # what an interrupt leaves alone is 0
        mtspr   HDAR, 16
        mtspr   ASDR, 16
        mtspr   HSRR0, 25
        mtspr   HSRR1, 24
        hrfid

exit:   mfspr   25, HSRR0
        mfspr   26, HSRR1
        cmpdi   23, 0
        beq     1f
        mr      22, 25                  # the instruction that faulted; or the one after the call, which only SRR0 has
        cmpdi   18, 0xc00
        bne     1f
        mfspr   22, SRR0
1:      std     3, 136(20)
        std     18, 144(20)
        std     16, 152(20)
        mfspr   27, HDSISR
        std     27, 160(20)
        mfspr   27, HDAR
        std     27, 168(20)
        mfspr   27, ASDR
        std     27, 176(20)
        std     25, 184(20)
        std     26, 192(20)
        b       reply
