# SPDX-License-Identifier: Apache-2.0
"""Fused maps in Triton, and maps resized and concatenated: Note [Fused maps] in csrc/common/fuse_maps.h. Any strides.

A program owns BLOCK_OUTER rows of BLOCK_INNER elements as in top_down. What a call does not use, its forms, weights and
activation, are constants, so a program has no code of it. A concatenation is a launch for each of its maps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast._memory_format import empty_map, is_channels_last
from fpn_fast.ops._schemas import SUM_ROWS
from fpn_fast.reference.fuse_maps import FAST_EPS
from fpn_fast.triton import _resample, register
from fpn_fast.triton._arguments import decode_int, encode_int
from fpn_fast.triton._resample import (
    bilinear_source,
    divide,
    nearest_source,
    target_range,
    target_weight,
    window,
    window_targets,
)
from fpn_fast.triton.top_down import (
    BLOCK_COLUMNS,
    BLOCK_ELEMENTS,
    NUM_WARPS,
    coordinates,
    most_targets,
    multiple,
    offsets,
    stride_names,
)

RELU, RELU6, SILU = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
EPS = tl.constexpr(FAST_EPS)
# Products and sums are rounded one by one, as in a sequence of operators.
EXACT = {"enable_fp_fusion": False}
# Elements of a program that sums for weights, per step: 8 for each of 4 warps' threads.
SUM_PIXELS, SUM_CHANNELS = 32, 32


@triton.jit
def greater(first, second):
    """Return the greater number; NaN if one is. Of equal ones the first."""
    return tl.where((second > first) | (second != second), second, first)


@triton.jit
def geometry_of(geometry, UNIT_C: tl.constexpr, UNIT_W: tl.constexpr, VEC: tl.constexpr):
    """Return (height, width, strides, most rows and columns of a window) of a map.

    UNIT_C, UNIT_W: whether the stride of that axis is 1 and VEC divides the others.
    """
    height, width = decode_int(geometry[0]), decode_int(geometry[1])
    stride_n, stride_c = decode_int(geometry[2]).to(tl.int64), decode_int(geometry[3]).to(tl.int64)
    stride_h, stride_w = decode_int(geometry[4]).to(tl.int64), decode_int(geometry[5]).to(tl.int64)
    if UNIT_C:
        stride_n, stride_h, stride_w = multiple(stride_n, VEC), multiple(stride_h, VEC), multiple(stride_w, VEC)
        stride_c = stride_c * 0 + 1
    if UNIT_W:
        stride_n, stride_h, stride_c = multiple(stride_n, VEC), multiple(stride_h, VEC), multiple(stride_c, VEC)
        stride_w = stride_w * 0 + 1
    return height, width, stride_n, stride_c, stride_h, stride_w, decode_int(geometry[6]), decode_int(geometry[7])


@triton.jit
def at(map, n, c, y, x, stride_n, stride_c, stride_h, stride_w, mask, other, ACC: tl.constexpr):
    pointers = map + offsets(n, c, y, x, stride_n, stride_c, stride_h, stride_w)
    return tl.load(pointers, mask=mask, other=other).to(ACC)


@triton.jit
def resampled(
    map, geometry, n, c, y, x, mask, H, W,
    FORM: tl.constexpr, UNIT_C: tl.constexpr, UNIT_W: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Return elements (n, c, y, x) of a map that is resampled to [N, C, H, W]."""
    h, w, sn, sc, sh, sw, rows_most, cols_most = geometry_of(geometry, UNIT_C, UNIT_W, VEC)
    if FORM == _resample.IDENTITY:
        return at(map, n, c, y, x, sn, sc, sh, sw, mask, 0.0, ACC)
    elif FORM == _resample.NEAREST_FORM:
        return at(map, n, c, nearest_source(y, h, H), nearest_source(x, w, W), sn, sc, sh, sw, mask, 0.0, ACC)
    elif FORM < _resample.MAX_POOL:
        MODE: tl.constexpr = FORM - 1
        y_lo, y_hi, y_weight = bilinear_source(y, h, H, MODE, ACC)
        x_lo, x_hi, x_weight = bilinear_source(x, w, W, MODE, ACC)
        above = (1 - x_weight) * at(map, n, c, y_lo, x_lo, sn, sc, sh, sw, mask, 0.0, ACC)
        above += x_weight * at(map, n, c, y_lo, x_hi, sn, sc, sh, sw, mask, 0.0, ACC)
        below = (1 - x_weight) * at(map, n, c, y_hi, x_lo, sn, sc, sh, sw, mask, 0.0, ACC)
        below += x_weight * at(map, n, c, y_hi, x_hi, sn, sc, sh, sw, mask, 0.0, ACC)
        return (1 - y_weight) * above + y_weight * below
    else:
        ZEROS: tl.constexpr = FORM == _resample.MAX_POOL_SAME_ZERO
        rows, rows_end = window(y, h, H, FORM)
        cols, cols_end = window(x, w, W, FORM)
        greatest = tl.where(mask, float("-inf"), float("-inf")).to(ACC)
        for i in range(rows_most):
            for j in range(cols_most):
                row, col = rows + i, cols + j
                inside = (row >= 0) & (row < h) & (col >= 0) & (col < w)
                reads = mask & inside & (row < rows_end) & (col < cols_end)
                value = at(map, n, c, row, col, sn, sc, sh, sw, reads, float("-inf"), ACC)
                if ZEROS:
                    value = tl.where(inside, value, 0.0)
                greatest = greater(greatest, value)
        return greatest


@triton.jit
def positive(weight):
    """Return relu(weight), which keeps a NaN."""
    return tl.where(weight <= 0, 0.0, weight)


@triton.jit
def rounded(value, T: tl.constexpr, ACC: tl.constexpr):
    return value.to(T).to(ACC)


@triton.jit(do_not_specialize=[*stride_names("out"), "N", "C", "H", "W", "blocks", "divisor"])
def fuse_maps_kernel(
    maps, geometry, weights, gate, out, out_n, out_c, out_h, out_w, N, C, H, W, blocks, divisor,
    FORMS: tl.constexpr, WEIGHTED: tl.constexpr, FAST: tl.constexpr, GATED: tl.constexpr, SEQUENTIAL: tl.constexpr,
    DIVIDES: tl.constexpr, ACTIVATION: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Write out = activation(sum of terms / divisor)."""
    T: tl.constexpr = out.dtype.element_ty
    if CHANNELS_LAST:
        C = multiple(C, VEC)
        out_w = multiple(out_w, VEC)
        if UNIT:
            out_c = 1
    else:
        W = multiple(W, VEC)
        out_c = multiple(out_c, VEC)
        if UNIT:
            out_w = 1
    out_n, out_h = multiple(out_n, VEC), multiple(out_h, VEC)
    n, c, y, x, inside = coordinates(CHANNELS_LAST, C, H, W, blocks, BLOCK_OUTER, BLOCK_INNER)
    mask = inside & (n < N)
    if FAST:
        total = tl.full([], 0.0, ACC)
        for k in tl.static_range(len(FORMS)):
            total += positive(tl.load(weights + k).to(ACC))
        total = rounded(rounded(total, T, ACC) + EPS, T, ACC)
    value = tl.zeros([BLOCK_OUTER, BLOCK_INNER], dtype=ACC)
    for k in tl.static_range(len(FORMS)):
        term = resampled(
            maps[k],
            geometry[k],
            n,
            c,
            y,
            x,
            mask,
            H,
            W,
            FORMS[k],
            UNIT and CHANNELS_LAST,
            UNIT and (not CHANNELS_LAST) and (FORMS[k] == 0),
            VEC,
            ACC,
        )
        if WEIGHTED:
            weight = tl.load(weights + k).to(ACC)
            if FAST:
                weight = positive(weight)
            term = rounded(term * weight, T, ACC)
            if FAST:
                term = rounded(divide(term, total + tl.zeros_like(term), ACC), T, ACC)
        if GATED and k == 0:
            factor = tl.load(gate + n * C + c, mask=mask, other=0.0).to(ACC)
            term = rounded(term * factor, T, ACC)
        if k == 0:
            value += term
        else:
            value = value + term
        if SEQUENTIAL:
            value = rounded(value, T, ACC)
    if DIVIDES:
        value = divide(rounded(value, T, ACC), divisor + tl.zeros_like(value), ACC)
    if ACTIVATION > 0:
        value = rounded(value, T, ACC)
        if ACTIVATION == SILU:
            value = value / (1 + tl.exp(-value))
        else:
            # tl.maximum might drop a NaN.
            value = tl.where(value < 0, 0.0, value)
            if ACTIVATION == RELU6:
                value = tl.where(value > 6, 6.0, value)
    tl.store(out + offsets(n, c, y, x, out_n, out_c, out_h, out_w), value.to(T), mask=mask)


@triton.jit(
    do_not_specialize=[
        *stride_names("grad", "out"), "N", "C", "H", "W", "h", "w", "rows_read", "cols_read", "blocks"
    ]
)  # fmt: skip
def resample_backward_kernel(
    grad, grad_n, grad_c, grad_h, grad_w, map, geometry, coefficients, k, gate, out, out_n, out_c, out_h, out_w,
    N, C, H, W, h, w, rows_read, cols_read, blocks,
    FORM: tl.constexpr, WEIGHTED: tl.constexpr, GATED: tl.constexpr, CHANNELS_LAST: tl.constexpr, UNIT: tl.constexpr,
    ACC: tl.constexpr, VEC: tl.constexpr, BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """Gather grad [N, C, H, W] into out [N, C, h, w]. At most rows_read rows and cols_read columns read a source."""
    if CHANNELS_LAST:
        C = multiple(C, VEC)
        grad_n, grad_h, grad_w = multiple(grad_n, VEC), multiple(grad_h, VEC), multiple(grad_w, VEC)
        out_w = multiple(out_w, VEC)
        if UNIT:
            grad_c, out_c = 1, 1
    else:
        w = multiple(w, VEC)
        out_c = multiple(out_c, VEC)
        if UNIT:
            out_w = 1
    out_n, out_h = multiple(out_n, VEC), multiple(out_h, VEC)
    n, c, y, x, inside = coordinates(CHANNELS_LAST, C, h, w, blocks, BLOCK_OUTER, BLOCK_INNER)
    mask = inside & (n < N)
    POOLED: tl.constexpr = FORM >= _resample.MAX_POOL
    if FORM == _resample.IDENTITY:
        row_begin, row_end, col_begin, col_end = y, y + 1, x, x + 1
    elif POOLED:
        row_begin, row_end = window_targets(y, h, H, FORM)
        col_begin, col_end = window_targets(x, w, W, FORM)
    else:
        row_begin, row_end = target_range(y, h, H, FORM - 1, ACC)
        col_begin, col_end = target_range(x, w, W, FORM - 1, ACC)
    total = tl.zeros([BLOCK_OUTER, BLOCK_INNER], dtype=ACC)
    for i in range(rows_read):
        row = row_begin + i
        for j in range(cols_read):
            col = col_begin + j
            reads = mask & (row < row_end) & (col < col_end)
            if POOLED:
                reads = reads & is_maximum(map, geometry, n, c, y, x, row, col, reads, H, W, FORM, ACC)
            value = at(grad, n, c, row, col, grad_n, grad_c, grad_h, grad_w, reads, 0.0, ACC)
            if (FORM > _resample.NEAREST_FORM) and (not POOLED):
                weight = target_weight(row, y, h, H, FORM - 1, ACC) * target_weight(col, x, w, W, FORM - 1, ACC)
                value *= weight
            total += value
    if WEIGHTED:
        total *= tl.load(coefficients + k)
    if GATED:
        total *= tl.load(gate + n * C + c, mask=mask, other=0.0).to(ACC)
    tl.store(out + offsets(n, c, y, x, out_n, out_c, out_h, out_w), total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def is_maximum(map, geometry, n, c, y, x, row, col, mask, H, W, FORM: tl.constexpr, ACC: tl.constexpr):
    """Return whether pixel (y, x) of the map is the maximum of window (row, col) of the result."""
    h, w, sn, sc, sh, sw, rows_most, cols_most = geometry_of(geometry, False, False, 1)
    ZEROS: tl.constexpr = FORM == _resample.MAX_POOL_SAME_ZERO
    rows, rows_end = window(row, h, H, FORM)
    cols, cols_end = window(col, w, W, FORM)
    greatest = tl.where(mask, float("-inf"), float("-inf")).to(ACC)
    wins, known = mask & False, mask & False
    for i in range(rows_most):
        for j in range(cols_most):
            at_row, at_col = rows + i, cols + j
            in_window = mask & (at_row < rows_end) & (at_col < cols_end)
            inside = (at_row >= 0) & (at_row < h) & (at_col >= 0) & (at_col < w)
            value = at(map, n, c, at_row, at_col, sn, sc, sh, sw, in_window & inside, 0.0, ACC)
            taken = in_window & ((value > greatest) | (value != value) | ~known)
            if not ZEROS:
                taken = taken & inside
            greatest = tl.where(taken, value, greatest)
            wins = tl.where(taken, (at_row == y) & (at_col == x), wins)
            known = known | taken
    return wins


@triton.jit(do_not_specialize=[*stride_names("grad"), "bands", "C", "H", "W"])
def resample_sums_kernel(
    grad, grad_n, grad_c, grad_h, grad_w, maps, geometry, parts, bands, C, H, W,
    FORMS: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Note [Fixed order of sums]: a program sums a band of ROWS rows of BLOCK_C channels."""
    n, band = (tl.program_id(0) // bands).to(tl.int64), tl.program_id(0) % bands
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    first = band * ROWS
    pixels = tl.minimum(ROWS, H - first) * W
    for k in tl.static_range(len(FORMS)):
        sums = tl.zeros([BLOCK_P, BLOCK_C], dtype=ACC)
        for start in range(0, pixels, BLOCK_P):
            pixel = start + tl.arange(0, BLOCK_P)[:, None]
            y, x = first + pixel // W, pixel % W
            mask = (pixel < pixels) & (c[None, :] < C)
            value = at(grad, n, c[None, :], y, x, grad_n, grad_c, grad_h, grad_w, mask, 0.0, ACC)
            term = resampled(maps[k], geometry[k], n, c[None, :], y, x, mask, H, W, FORMS[k], False, False, 1, ACC)
            sums += tl.where(mask, value * term, 0.0)
        pointers = parts + ((n * bands + band) * len(FORMS) + k) * C + c
        tl.store(pointers, tl.sum(sums, 0), mask=c < C)


def _window_size(form: int, size_in: int, size_out: int) -> int:
    """The most rows or columns of a window."""
    if form == _resample.ADAPTIVE_MAX.value:
        return min(size_in, -(-size_in // size_out) + 1)
    return 2 if form == _resample.MAX_POOL_2X2.value else 3


def _geometry(map: Tensor, form: int, size: Sequence[int]) -> tuple[int, ...]:
    windows = [_window_size(form, map.size(2 + i), size[i]) for i in range(2)]
    return tuple(encode_int(int(number)) for number in (*map.shape[2:], *map.stride(), *windows))


def _launch_config(out: Tensor, channels_last: bool, adjacent: Sequence[Tensor]) -> tuple[int, int, dict[str, object]]:
    """Return (programs, programs per row of elements, constants) to cover `out` [N, C, H, W].

    adjacent: the maps besides `out` that a program reads in runs of adjacent elements.
    """
    batch, channels, height, width = out.shape
    inner = channels if channels_last else width
    outer = batch * (height * width if channels_last else channels * height)
    block_inner = min(triton.next_power_of_2(inner), BLOCK_ELEMENTS) if channels_last else BLOCK_COLUMNS
    block_outer = BLOCK_ELEMENTS // block_inner
    dimension, maps = 1 if channels_last else 3, [out, *adjacent]
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
        **EXACT,
    }
    blocks = triton.cdiv(inner, block_inner)
    return triton.cdiv(outer, block_outer) * blocks, blocks, constants


def _fuse_into(
    out: Tensor,
    channels_last: bool,
    maps: Sequence[Tensor],
    forms: Sequence[int],
    weights: Tensor | None = None,
    fast: bool = False,
    gate: Tensor | None = None,
    sequential: bool = False,
    divide: int = 1,
    activation: int = 0,
) -> None:
    adjacent = [each for each, form in zip(maps, forms, strict=True) if channels_last or form == 0]
    programs, blocks, constants = _launch_config(out, channels_last, adjacent)
    geometry = tuple(_geometry(each, form, out.shape[2:]) for each, form in zip(maps, forms, strict=True))
    with torch.cuda.device_of(out):
        fuse_maps_kernel[programs,](
            tuple(maps), geometry, out if weights is None else weights, out if gate is None else gate,
            out, *out.stride(), *out.shape, blocks, divide,
            FORMS=tuple(forms), WEIGHTED=weights is not None, FAST=fast and weights is not None,
            GATED=gate is not None, SEQUENTIAL=sequential and out.element_size() == 2, DIVIDES=divide != 1,
            ACTIVATION=activation, **constants,
        )  # fmt: skip


def fuse_maps(
    maps: list[Tensor],
    height: int,
    width: int,
    forms: list[int],
    weights: Tensor | None,
    fast: bool,
    gate: Tensor | None,
    sequential: bool,
    divide: int,
    activation: int,
) -> Tensor:
    out = empty_map(maps[0], maps[0].size(1), height, width)
    if out.numel() > 0:
        channels_last = is_channels_last(maps[0])
        _fuse_into(out, channels_last, maps, forms, weights, fast, gate, sequential, divide, activation)
    return out


def resize_cat(maps: list[Tensor], height: int, width: int, forms: list[int]) -> Tensor:
    out = empty_map(maps[0], sum(each.size(1) for each in maps), height, width)
    channel = 0
    for each, form in zip(maps, forms, strict=True):
        part = out.narrow(1, channel, each.size(1))
        channel += each.size(1)
        if part.numel() > 0:
            _fuse_into(part, is_channels_last(maps[0]), [each], [form])
    return out


def resample_backward(
    grad: Tensor,
    channels: list[int],
    sizes: list[int],
    forms: list[int],
    pooled: list[Tensor],
    coefficients: Tensor | None,
    gate: Tensor | None,
) -> list[Tensor]:
    channels_last, outs, remaining = is_channels_last(grad), [], list(pooled)
    for k, form in enumerate(forms):
        first, count = channels[2 * k : 2 * k + 2]
        own = grad.narrow(1, first, count)
        out = empty_map(grad, count, *sizes[2 * k : 2 * k + 2])
        outs.append(out)
        is_pooled = form >= _resample.MAX_POOL.value
        map = remaining.pop(0) if is_pooled else out
        if out.numel() == 0:
            continue
        gated = gate is not None and k == 0
        programs, blocks, constants = _launch_config(out, channels_last, [own] if channels_last else [])
        if is_pooled:
            # Two windows hold a pixel at most, adaptive ones more.
            adaptive = form == _resample.ADAPTIVE_MAX.value
            read = [-(-own.size(d) // out.size(d)) + 1 if adaptive else 2 for d in (2, 3)]
        else:
            read = [1 if form == 0 else most_targets(out.size(d), own.size(d), form - 1) for d in (2, 3)]
        with torch.cuda.device_of(out):
            resample_backward_kernel[programs,](
                own, *own.stride(), map, _geometry(map, form, own.shape[2:]),
                out if coefficients is None else coefficients, k, gate if gated else out, out, *out.stride(),
                *own.shape, *out.shape[2:], *read, blocks,
                FORM=form, WEIGHTED=coefficients is not None, GATED=gated, **constants,
            )  # fmt: skip
    return outs


def resample_sums(grad: Tensor, maps: list[Tensor], forms: list[int]) -> Tensor:
    batch, channels, height, width = grad.shape
    bands = triton.cdiv(height, SUM_ROWS)
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    parts = grad.new_empty((batch, bands, len(maps), channels), dtype=accumulate)
    if parts.numel() > 0:
        geometry = tuple(_geometry(each, form, grad.shape[2:]) for each, form in zip(maps, forms, strict=True))
        with torch.cuda.device_of(grad):
            resample_sums_kernel[batch * bands, triton.cdiv(channels, SUM_CHANNELS)](
                grad, *grad.stride(), tuple(maps), geometry, parts, bands, channels, height, width,
                FORMS=tuple(forms), ACC=tl.float64 if grad.dtype == torch.float64 else tl.float32, ROWS=SUM_ROWS,
                BLOCK_P=SUM_PIXELS, BLOCK_C=SUM_CHANNELS, num_warps=NUM_WARPS, **EXACT,
            )  # fmt: skip
    return parts


register("fuse_maps", fuse_maps)
register("resize_cat", resize_cat)
register("resample_backward", resample_backward)
register("resample_sums", resample_sums)
