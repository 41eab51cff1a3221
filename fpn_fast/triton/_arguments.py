# SPDX-License-Identifier: Apache-2.0
"""Integers and floats as kernel arguments in tuples.

Note [Encoded arguments]
Triton compiles a variant of a kernel for each pattern of integers that are 1 or multiples of 16. For a plain argument
`do_not_specialize` forbids that, but not for the elements of a tuple, and the sizes and strides of maps come in every
pattern. So an integer n travels as 2n + 3, which is odd and greater than 1 for every n from 0.
The launcher rounds every float to float32. A float that a float64 kernel reads therefore travels as its 64 bits in an
integer.
"""

from __future__ import annotations

import struct

import torch
import triton
import triton.language as tl


def encode_int(number: int) -> int:
    """Encode `number`, 0 or more, for a tuple of kernel arguments."""
    return 2 * number + 3


@triton.jit
def decode_int(number):
    """Return the integer that :func:`encode_int` encoded."""
    return (number - 3) >> 1


def encode_float(number: float, dtype: torch.dtype) -> float | int:
    """Encode `number` for a kernel that computes in `dtype`."""
    return struct.unpack("q", struct.pack("d", number))[0] if dtype == torch.float64 else number


@triton.jit
def decode_float(number, ACC: tl.constexpr):
    """Return the float that :func:`encode_float` encoded for a kernel that computes in ACC."""
    if ACC == tl.float64:
        # Triton passes small integers, such as the bits of 0, as int32.
        return number.to(tl.int64).to(tl.float64, bitcast=True)
    else:
        return number
