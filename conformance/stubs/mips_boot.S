# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
# The boot flash of a Malta board, at 0xbfc00000 after reset: goes to the stub, which is in memory already. The board keeps its
# revision in the word at 0x10, so that there is a jump over it. Words are big-endian whatever the processor is: QEMU swaps
# them for a little-endian one.
        .set    noreorder
        .set    noat
        b       1f
        nop
        .org    0x20
1:      lui     $8, 0x8000
        ori     $8, $8, 0x1000
        jalr    $0, $8
        nop
