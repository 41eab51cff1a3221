# SPDX-License-Identifier: Apache-2.0
"""The top-down merge in Triton: one launch per level, any strides.

A program owns BLOCK_OUTER rows of BLOCK_INNER elements. Inner elements are adjacent in memory: channels of a pixel
(channels_last) or columns of a row of one channel (channels_first). UNIT says that the inner stride is 1, and VEC which
power of two divides the other strides and the inner size: with them Triton widens accesses. Sizes and strides are no
constants, because Triton would compile a variant for nearly every image size: Note [Encoded arguments].
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast._memory_format import is_channels_last, memory_format
from fpn_fast.triton import _resample, register
from fpn_fast.triton._resample import bilinear_source, nearest_source, target_range, target_weight

# 8 elements per thread of 4 warps: one 16-byte access for bfloat16, two for float32.
BLOCK_ELEMENTS = 1024
# Columns of a channels_first program: a constant, so that Triton compiles nothing anew for another image size.
BLOCK_COLUMNS = 32
NUM_WARPS = 4


@triton.jit
def multiple(value, VEC: tl.constexpr):
    """Return `value` and let the compiler know that VEC divides it."""
    return value // VEC * VEC


@triton.jit
def coordinates(
    CHANNELS_LAST: tl.constexpr, C, H, W, blocks, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr
):  # fmt: skip
    """Return (n, c, y, x, inside) of a program's elements, each broadcastable to [BLOCK_OUTER, BLOCK_INNER]."""
    if CHANNELS_LAST:
        inner_size, outer_per_image = C, H * W
    else:
        inner_size, outer_per_image = W, C * H
    outer = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)[:, None]
    inner = tl.program_id(0) % blocks * BLOCK_INNER + tl.arange(0, BLOCK_INNER)[None, :]
    n = outer // outer_per_image
    rest = (outer % outer_per_image).to(tl.int32)
    if CHANNELS_LAST:
        c, y, x = inner, rest // W, rest % W
    else:
        c, y, x = rest // H, rest % H, inner
    return n, c, y, x, inner < inner_size


@triton.jit
def offsets(n, c, y, x, stride_n, stride_c, stride_h, stride_w):
    """Return 64-bit element offsets: P2 of a large batch has more than 2^31 elements."""
    return n * stride_n + c.to(tl.int64) * stride_c + y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w


def stride_names(*maps: str) -> list[str]:
    return [f"{name}_{dimension}" for name in maps for dimension in "nchw"]


@triton.jit(do_not_specialize=[*stride_names("lateral", "top", "out"), "N", "C", "H", "W", "h", "w", "blocks"])
def top_down_kernel(
    lateral, lateral_n, lateral_c, lateral_h, lateral_w,
    top, top_n, top_c, top_h, top_w,
    out, out_n, out_c, out_h, out_w,
    N, C, H, W, h, w, blocks,
    MODE: tl.constexpr, AVERAGE: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    VEC: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Write out = lateral + resample(top), rounded once, then halved if AVERAGE."""
    if CHANNELS_LAST:
        C = multiple(C, VEC)
        lateral_w, top_w, out_w = multiple(lateral_w, VEC), multiple(top_w, VEC), multiple(out_w, VEC)
        top_n, top_h = multiple(top_n, VEC), multiple(top_h, VEC)
        if UNIT:
            lateral_c, top_c, out_c = 1, 1, 1
    else:
        W = multiple(W, VEC)
        lateral_c, out_c = multiple(lateral_c, VEC), multiple(out_c, VEC)
        if UNIT:
            lateral_w, out_w = 1, 1
    lateral_n, lateral_h = multiple(lateral_n, VEC), multiple(lateral_h, VEC)
    out_n, out_h = multiple(out_n, VEC), multiple(out_h, VEC)
    n, c, y, x, inside = coordinates(CHANNELS_LAST, C, H, W, blocks, BLOCK_OUTER, BLOCK_INNER)
    mask = inside & (n < N)
    if MODE == _resample.NEAREST:
        source_y, source_x = nearest_source(y, h, H), nearest_source(x, w, W)
        value = tl.load(top + offsets(n, c, source_y, source_x, top_n, top_c, top_h, top_w), mask=mask).to(ACC)
    else:
        y_lo, y_hi, y_weight = bilinear_source(y, h, H, MODE, ACC)
        x_lo, x_hi, x_weight = bilinear_source(x, w, W, MODE, ACC)
        a = tl.load(top + offsets(n, c, y_lo, x_lo, top_n, top_c, top_h, top_w), mask=mask).to(ACC)
        b = tl.load(top + offsets(n, c, y_lo, x_hi, top_n, top_c, top_h, top_w), mask=mask).to(ACC)
        above = (1 - x_weight) * a + x_weight * b
        a = tl.load(top + offsets(n, c, y_hi, x_lo, top_n, top_c, top_h, top_w), mask=mask).to(ACC)
        b = tl.load(top + offsets(n, c, y_hi, x_hi, top_n, top_c, top_h, top_w), mask=mask).to(ACC)
        below = (1 - x_weight) * a + x_weight * b
        value = (1 - y_weight) * above + y_weight * below
    value += tl.load(lateral + offsets(n, c, y, x, lateral_n, lateral_c, lateral_h, lateral_w), mask=mask).to(ACC)
    merged = value.to(out.dtype.element_ty)
    if AVERAGE:
        merged = (merged.to(ACC) * 0.5).to(out.dtype.element_ty)
    tl.store(out + offsets(n, c, y, x, out_n, out_c, out_h, out_w), merged, mask=mask)


@triton.jit(
    do_not_specialize=[
        *stride_names("fine", "grad", "out"), "N", "C", "H", "W", "h", "w", "rows_read", "cols_read", "blocks"
    ]
)  # fmt: skip
def top_down_backward_kernel(
    fine, fine_n, fine_c, fine_h, fine_w,
    grad, grad_n, grad_c, grad_h, grad_w,
    out, out_n, out_c, out_h, out_w,
    N, C, H, W, h, w, rows_read, cols_read, blocks,
    MODE: tl.constexpr, AVERAGE: tl.constexpr, HAS_GRAD: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Gather fine [N, C, H, W] into out [N, C, h, w], add grad, and halve the sum if AVERAGE. At most rows_read rows
    and cols_read columns read a source."""
    if CHANNELS_LAST:
        C = multiple(C, VEC)
        fine_w, grad_w, out_w = multiple(fine_w, VEC), multiple(grad_w, VEC), multiple(out_w, VEC)
        fine_n, fine_h = multiple(fine_n, VEC), multiple(fine_h, VEC)
        if UNIT:
            fine_c, grad_c, out_c = 1, 1, 1
    else:
        w = multiple(w, VEC)
        grad_c, out_c = multiple(grad_c, VEC), multiple(out_c, VEC)
        if UNIT:
            grad_w, out_w = 1, 1
    grad_n, grad_h = multiple(grad_n, VEC), multiple(grad_h, VEC)
    out_n, out_h = multiple(out_n, VEC), multiple(out_h, VEC)
    n, c, y, x, inside = coordinates(CHANNELS_LAST, C, h, w, blocks, BLOCK_OUTER, BLOCK_INNER)
    mask = inside & (n < N)
    row_begin, row_end = target_range(y, h, H, MODE, ACC)
    col_begin, col_end = target_range(x, w, W, MODE, ACC)
    total = tl.zeros([BLOCK_OUTER, BLOCK_INNER], dtype=ACC)
    for i in range(rows_read):
        fine_y = row_begin + i
        for j in range(cols_read):
            fine_x = col_begin + j
            reads = mask & (fine_y < row_end) & (fine_x < col_end)
            value = tl.load(fine + offsets(n, c, fine_y, fine_x, fine_n, fine_c, fine_h, fine_w), mask=reads, other=0.0)
            value = value.to(ACC)
            if MODE != _resample.NEAREST:
                value *= target_weight(fine_y, y, h, H, MODE, ACC) * target_weight(fine_x, x, w, W, MODE, ACC)
            total += value
    if HAS_GRAD:
        total += tl.load(grad + offsets(n, c, y, x, grad_n, grad_c, grad_h, grad_w), mask=mask).to(ACC)
        if AVERAGE:
            total *= 0.5
    tl.store(out + offsets(n, c, y, x, out_n, out_c, out_h, out_w), total.to(out.dtype.element_ty), mask=mask)


def _launch_config(out: Tensor, own: Tensor, other: Tensor) -> tuple[int, int, dict[str, object]]:
    """Return (programs, programs per row of elements, constants) to cover `out` [N, C, H, W] and read `own`, of its
    size, and `other`."""
    channels_last = is_channels_last(out)
    batch, channels, height, width = out.shape
    inner = channels if channels_last else width
    outer = batch * (height * width if channels_last else channels * height)
    block_inner = min(triton.next_power_of_2(inner), BLOCK_ELEMENTS) if channels_last else BLOCK_COLUMNS
    block_outer = BLOCK_ELEMENTS // block_inner
    # Columns of `other` are gathered one by one, so that its strides do not count there.
    dimension, maps = (1, [out, own, other]) if channels_last else (3, [out, own])
    unit = all(each.size(dimension) == 1 or each.stride(dimension) == 1 for each in maps)
    strides = [each.stride(d) for each in maps for d in range(4) if d != dimension and each.size(d) > 1]
    constants = {
        "CHANNELS_LAST": channels_last,
        "UNIT": unit,
        "ACC": tl.float64 if out.dtype == torch.float64 else tl.float32,
        "VEC": math.gcd(16 // out.element_size(), inner, *strides) if unit else 1,
        "BLOCK_OUTER": block_outer,
        "BLOCK_INNER": block_inner,
        "num_warps": NUM_WARPS,
    }
    blocks = triton.cdiv(inner, block_inner)
    return triton.cdiv(outer, block_outer) * blocks, blocks, constants


def most_targets(size_in: int, size_out: int, mode: int) -> int:
    """Return an upper bound of the destinations that read one source."""
    per_source = -(-size_out // size_in) + 1
    return min(size_out, per_source if mode == _resample.NEAREST.value else 2 * per_source + 1)


def top_down(laterals: list[Tensor], mode: int, average: bool) -> list[Tensor]:
    merged = [laterals[-1]]
    for lateral in reversed(laterals[:-1]):
        out = torch.empty_like(lateral, memory_format=memory_format(lateral))
        if out.numel() > 0:
            top = merged[-1]
            programs, blocks, constants = _launch_config(out, lateral, top)
            with torch.cuda.device_of(out):
                top_down_kernel[programs,](
                    lateral, *lateral.stride(), top, *top.stride(), out, *out.stride(),
                    *out.shape, *top.shape[2:], blocks, MODE=mode, AVERAGE=average, **constants,
                )  # fmt: skip
        merged.append(out)
    return merged[:0:-1]


def top_down_backward(
    grads: list[Tensor], coarse_height: int, coarse_width: int, mode: int, average: bool
) -> list[Tensor]:
    sums = []
    fine = grads[0]
    for level in range(1, len(grads) + 1):
        grad = grads[level] if level < len(grads) else None
        if grad is not None:
            out = torch.empty_like(grad, memory_format=memory_format(grad))
        else:
            size = (fine.size(0), fine.size(1), coarse_height, coarse_width)
            out = torch.empty(size, dtype=fine.dtype, device=fine.device, memory_format=memory_format(grads[-1]))
        if out.numel() > 0:
            # The kernel does not read `grad` of a level without its own gradient; any tensor fills the argument.
            own = out if grad is None else grad
            programs, blocks, constants = _launch_config(out, own, fine)
            with torch.cuda.device_of(out):
                top_down_backward_kernel[programs,](
                    fine, *fine.stride(), own, *own.stride(), out, *out.stride(),
                    *fine.shape, *out.shape[2:],
                    most_targets(out.shape[2], fine.shape[2], mode), most_targets(out.shape[3], fine.shape[3], mode),
                    blocks, MODE=mode, AVERAGE=average, HAS_GRAD=grad is not None, **constants,
                )  # fmt: skip
        sums.append(out)
        fine = out
    return sums


register("top_down", top_down)
register("top_down_backward", top_down_backward)
