// SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
// EL2, MMU off: lets a guest at EL1 (stage 1 off, so that its addresses are guest physical) run on the stage 2 table under test.
//
// The guest has x0 to x10, the stub has the rest: what a loop holds survives an exit, and command 5 just goes back.
//   x19 number of the last request   x20 mailbox   x21 guest address of the code page (arm64_guest.S)
//
//   1 begin   VTCR_EL2, VTTBR_EL2, HCR_EL2, code page       -> ID_AA64MMFR0_EL1, MMFR1, MMFR2, ID_AA64ISAR0_EL1
//   2 flush   number of pairs {operation, operand}, see `operations`
//   3 access  address, offset of the routine in the code page (all ones: fetch from the address), value
//   4 work    first address, pages, stride, first page to write, counts, kick word
//   5 resume
//   6 wake the second processor (its mailbox is the next page)  -> PSCI's answer
//   7 sleep: this processor is off
//   3, 4, 5 answer                                          -> x0, ESR_EL2, FAR_EL2, HPFAR_EL2, ELR_EL2, vector,
//                                                             ESR_EL1, FAR_EL1
        .equ    MAILBOX, 0x40300000
        .equ    WORK, 0x40              // offset of the loop in the code page
        .equ    EL1H_MASKED, 0x3c5
        .equ    PSCI_CPU_ON, 0xc4000003
        .equ    PSCI_CPU_OFF, 0x84000002

        .text
_start: msr     daifset, #15
        mrs     x11, mpidr_el1
        and     x11, x11, #0xff
        ldr     x20, =MAILBOX
        add     x20, x20, x11, lsl #12
        adr     x11, vectors
        msr     vbar_el2, x11
        ldr     x11, =0x30d00800        // SCTLR_EL1: RES1 alone
        msr     sctlr_el1, x11
        ldr     x19, [x20, #128]
        isb
main:   ldr     x11, [x20]
        cmp     x11, x19
        b.eq    main
        mov     x19, x11
        dmb     sy
        ldp     x12, x13, [x20, #8]     // command, first argument
        cmp     x12, #1
        b.eq    begin
        cmp     x12, #2
        b.eq    flush
        cmp     x12, #3
        b.eq    access
        cmp     x12, #4
        b.eq    work
        cmp     x12, #5
        b.eq    resume
        cmp     x12, #6
        b.eq    wake
        cmp     x12, #7
        b.eq    sleep
        mov     x11, #-1
        str     x11, [x20, #136]
reply:  dmb     sy
        str     x19, [x20, #128]
        b       main

begin:  ldp     x14, x15, [x20, #24]
        ldr     x21, [x20, #40]
        msr     vtcr_el2, x13
        msr     vttbr_el2, x14
        msr     hcr_el2, x15
        add     x11, x21, #0x800
        msr     vbar_el1, x11
        isb
        tlbi    alle1
        dsb     sy
        isb
        mrs     x11, id_aa64mmfr0_el1
        mrs     x12, id_aa64mmfr1_el1
        stp     x11, x12, [x20, #136]
        mrs     x11, id_aa64mmfr2_el1
        mrs     x12, id_aa64isar0_el1
        stp     x11, x12, [x20, #152]
        b       reply

flush:  add     x14, x20, #256
        cbz     x13, reply
1:      ldp     x15, x16, [x14], #16
        adr     x11, operations
        add     x11, x11, x15, lsl #3
        blr     x11
        subs    x13, x13, #1
        b.ne    1b
        b       reply
operations:                             // eight bytes each, operand in x16
        dsb     ishst                   // 0
        ret
        dsb     ish                     // 1
        ret
        dsb     nshst                   // 2
        ret
        dsb     nsh                     // 3
        ret
        isb                             // 4
        ret
        tlbi    ipas2e1is, x16          // 5
        ret
        tlbi    ripas2e1is, x16         // 6
        ret
        tlbi    vmalle1is               // 7
        ret
        tlbi    vmalls12e1is            // 8
        ret
        tlbi    alle1is                 // 9
        ret
        tlbi    ipas2e1, x16            // 10
        ret
        tlbi    vmalle1                 // 11
        ret

access: ldp     x14, x0, [x20, #24]
        mov     x1, x13
        cmn     x14, #1
        add     x14, x14, x21
        csel    x14, x1, x14, eq
        msr     elr_el2, x14
        b       enter

work:   mov     x1, x13
        ldp     x2, x3, [x20, #24]
        ldp     x4, x5, [x20, #40]
        ldr     x6, [x20, #56]
        mov     x9, xzr
        mov     x10, xzr
        add     x14, x21, #WORK
        msr     elr_el2, x14
enter:  mov     x11, #EL1H_MASKED
        msr     spsr_el2, x11
resume: eret

wake:   ldr     x0, =PSCI_CPU_ON
        mov     x1, #1
        adr     x2, _start
        mov     x3, xzr
        smc     #0
        str     x0, [x20, #136]
        b       reply
sleep:  dmb     sy                      // answered before, or the request would be there still when it wakes
        str     x19, [x20, #128]
        dmb     sy
        ldr     x0, =PSCI_CPU_OFF
        smc     #0
        b       main

exit:   mrs     x11, esr_el2            // x18: which vector
        stp     x0, x11, [x20, #136]
        mrs     x11, far_el2
        mrs     x12, hpfar_el2
        stp     x11, x12, [x20, #152]
        mrs     x11, elr_el2
        stp     x11, x18, [x20, #168]
        mrs     x11, esr_el1
        mrs     x12, far_el1
        stp     x11, x12, [x20, #184]
        b       reply
        .ltorg

        .balign 2048
vectors:
        .irp    n, 0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15
        .balign 128
        mov     x18, #\n
        b       exit
        .endr
