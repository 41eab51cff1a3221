# SPDX-License-Identifier: Apache-2.0
"""The kernels that measure a GPU's limits. Imported where Triton is there."""

import triton
import triton.language as tl

#: Floats that a thread of l2_read_kernel reads at a time: four 16-byte loads.
READ_FLOATS = 16
#: Loads in a turn of chase_kernel, and conversions in one of convert_kernel: many, so that the loop costs little.
LOADS, CONVERSIONS = 16, 16
#: Added after each. No bfloat16: the sum of two is one addition, without a conversion.
STEP = 1.2501


def chase(cache: str) -> str:
    """PTX of LOADS loads one after another, of where the next address is. tl.load would set a register to zero before
    it loads into it, and it would be that of the address."""
    loads = f"ld.global{cache}.u64 %next, [%next]; " * LOADS
    return f"{{ .reg .u64 %next; mov.u64 %next, $1; {loads} mov.u64 $0, %next; }}"


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


@triton.jit
def chase_kernel(place, turns, CHASE: tl.constexpr):
    """Follows addresses from that in place [1] int64, `turns` times as many as CHASE, and stores the last there."""
    address = tl.load(place)
    for _ in range(turns):
        address = tl.inline_asm_elementwise(CHASE, "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1)
    tl.store(place, address)


@triton.jit
def convert_kernel(values, turns, BLOCK: tl.constexpr, CONVERSIONS: tl.constexpr, STEP: tl.constexpr):
    """Rounds each of values [programs * BLOCK] float32 to bfloat16 and adds STEP, turns * CONVERSIONS times."""
    lanes = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(values + lanes)
    for _ in range(turns):
        for _ in tl.static_range(CONVERSIONS):
            # Widened by hand: for its own widening the compiler takes a conversion of two numbers at a time.
            bits = value.to(tl.bfloat16).to(tl.uint16, bitcast=True).to(tl.uint32) << 16
            value = bits.to(tl.float32, bitcast=True) + STEP
    tl.store(values + lanes, value)
