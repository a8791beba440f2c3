# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The page of code that the tree under test maps for the guest: real mode, HV clear, 64-bit, big-endian. sc 1 calls the hypervisor;
# with r16 set it came out of the loop for a kick.
        .machine power9
        .text
        ld      3, 0(4)                 # 0x00: load
        sc      1
        std     3, 0(4)                 # 0x08: store
        sc      1

# 0x10: the loop. r5 first address, r6 pages, r7 stride, r8 first page to write, r9 counts, r10 kick word
pass:   mr      11, 5                   # the address
        li      12, 0                   # number of the page
page:   ld      15, 0(11)
        cmpd    15, 11
        beq     1f
        addi    14, 14, 1               # mismatches
1:      cmpd    12, 8
        blt     2f
        std     13, 8(11)
2:      ld      15, 0(10)
        cmpdi   15, 0
        beq     3f
        li      16, 1
        sc      1
3:      add     11, 11, 7
        addi    12, 12, 1
        cmpd    12, 6
        blt     page
        addi    13, 13, 1               # passes
        std     13, 0(9)
        std     14, 8(9)
        b       pass
        .org    0x7f8
        .quad   0                       # the kick word
