# SPDX-License-Identifier: Apache-2.0
"""The kernel that measures how fast the L2 is read. Imported where Triton is there."""

import triton
import triton.language as tl

#: Floats that a program reads at a time: four 16-byte loads for each thread of eight warps.
BLOCK = 4096
WARPS = 8


@triton.jit
def l2_read_kernel(source, sums, blocks, turns, BLOCK: tl.constexpr):
    """Reads source [blocks * BLOCK] float32 `turns` times over, past the first cache; each program keeps a sum."""
    program = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    # One loop over all turns: programs stay evenly loaded, and the next turn's blocks are other programs'.
    for i in range(program, blocks * turns, tl.num_programs(0)):
        total += tl.load(source + (i % blocks) * BLOCK + lanes, cache_modifier=".cg")
    tl.store(sums + program, tl.sum(total))
