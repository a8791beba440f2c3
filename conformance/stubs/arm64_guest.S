// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// The page of code that the table under test maps for the guest. EL1, stage 1 off: data is device memory, so accesses are
// aligned. HVC 0 is done, HVC 1 came out of the loop for a kick, HVC 2 is an exception at EL1: an external abort, where a
// translation led to no memory.
        .text
        ldr     x0, [x1]                // 0x00: load
        hvc     #0
        str     x0, [x1]                // 0x08: store
        hvc     #0

        .org    0x40                    // the loop; what the registers hold is at `work` in arm64.S
pass:   mov     x7, x1
        mov     x8, xzr
page:   ldr     x0, [x7]
        cmp     x0, x7
        cinc    x10, x10, ne
        cmp     x8, x4
        b.lo    1f
        str     x9, [x7, #8]
1:      ldr     x0, [x6]
        cbz     x0, 2f
        hvc     #1
2:      add     x7, x7, x3
        add     x8, x8, #1
        cmp     x8, x2
        b.lo    page
        add     x9, x9, #1
        stp     x9, x10, [x5]
        b       pass

        .org    0x7f8
        .quad   0                       // the kick word
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        .balign 128
        hvc     #2
        .endr
