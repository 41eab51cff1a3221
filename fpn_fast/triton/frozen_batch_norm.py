# SPDX-License-Identifier: Apache-2.0
"""The frozen batch norm in Triton: Note [Frozen batch norm] in csrc/common/frozen_batch_norm.h.

A program owns BLOCK_OUTER rows of BLOCK_INNER adjacent elements: channels of a pixel (channels_last) or pixels of a
plane (channels_first). VEC tells Triton the power of two that divides a row's length, so that it can widen accesses.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast._memory_format import is_channels_last, memory_format
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops._schemas import NORM_PART, NORM_RULES
from fpn_fast.triton import register
from fpn_fast.triton._arguments import decode_float, encode_float

# 8 elements per thread of 4 warps: one 16-byte access for bfloat16, two for float32.
BLOCK_ELEMENTS = 1024
# Pixels of a program along a plane, of a small one and of others: few values, so that Triton compiles few variants.
SMALL_PLANE, BLOCK_PIXELS = 512, (64, 256)
NUM_WARPS = 4
DETECTRON2 = NORM_RULES.index("detectron2")
# Products and sums are rounded one by one, as in a sequence of operators.
OPTIONS = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}


@triton.jit
def affine(
    weight, bias, mean, variance, eps, c, mask,
    HAS_NORM: tl.constexpr, ROUNDS: tl.constexpr, MAP: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    """Return scale and shift of channels `c` in ACC, computed in VECTOR; ROUNDS: rounded to MAP."""
    if HAS_NORM:
        root = tl.load(variance + c, mask=mask, other=1.0).to(VECTOR) + decode_float(eps, VECTOR)
        # Of float64 Triton's rsqrt has as few digits as of float32.
        root = 1.0 / tl.sqrt(root) if VECTOR == tl.float64 else tl.rsqrt(root)
        scale = tl.load(weight + c, mask=mask, other=0.0).to(VECTOR) * root
        shift = tl.load(bias + c, mask=mask, other=0.0).to(VECTOR)
        shift -= tl.load(mean + c, mask=mask, other=0.0).to(VECTOR) * scale
        if ROUNDS:
            scale, shift = scale.to(MAP), shift.to(MAP)
    else:
        scale, shift = tl.full(c.shape, 1.0, VECTOR), tl.full(c.shape, 0.0, VECTOR)
    return scale.to(ACC), shift.to(ACC)


@triton.jit
def place(CHANNELS_LAST: tl.constexpr, rows, length, channels, blocks, VEC: tl.constexpr,
          BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr):  # fmt: skip
    """Return (offset, mask, channel, mask of the channel) of a program's elements."""
    length = length // VEC * VEC
    outer = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_OUTER + tl.arange(0, BLOCK_OUTER)[:, None]
    inner = tl.program_id(0) % blocks * BLOCK_INNER + tl.arange(0, BLOCK_INNER)[None, :]
    mask = (outer < rows) & (inner < length)
    if CHANNELS_LAST:
        return outer * length + inner, mask, inner, inner < channels
    else:
        return outer * length + inner, mask, (outer % channels).to(tl.int32), outer < rows


@triton.jit(do_not_specialize=["rows", "length", "channels", "blocks"])
def frozen_batch_norm_kernel(
    x, residual, y, weight, bias, mean, variance, other_weight, other_bias, other_mean, other_variance, eps,
    rows, length, channels, blocks,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, RELU: tl.constexpr, ROUNDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, VEC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    offset, mask, c, inside = place(CHANNELS_LAST, rows, length, channels, blocks, VEC, BLOCK_OUTER, BLOCK_INNER)
    MAP: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + offset, mask=mask).to(ACC)
    scale, shift = affine(weight, bias, mean, variance, eps, c, inside, True, ROUNDS, MAP, ACC, VECTOR)
    value = value * scale + shift
    if HAS_RESIDUAL:
        added = tl.load(residual + offset, mask=mask).to(ACC)
        if HAS_NORM:
            scale, shift = affine(
                other_weight, other_bias, other_mean, other_variance, eps, c, inside, True, ROUNDS, MAP, ACC, VECTOR
            )
            added = added * scale + shift
        value += added
    if RELU:
        # tl.maximum might drop a NaN.
        value = tl.where(value < 0, 0.0, value)
    tl.store(y + offset, value.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length", "channels", "blocks"])
def frozen_batch_norm_backward_kernel(
    grad, y, grad_x, grad_residual, weight, bias, mean, variance, other_weight, other_bias, other_mean, other_variance,
    eps, rows, length, channels, blocks,
    HAS_RESIDUAL: tl.constexpr, HAS_NORM: tl.constexpr, RELU: tl.constexpr, ROUNDS: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, VECTOR: tl.constexpr, VEC: tl.constexpr,
    BLOCK_OUTER: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    offset, mask, c, inside = place(CHANNELS_LAST, rows, length, channels, blocks, VEC, BLOCK_OUTER, BLOCK_INNER)
    MAP: tl.constexpr = grad_x.dtype.element_ty
    value = tl.load(grad + offset, mask=mask).to(ACC)
    if RELU:
        # Where y is NaN the gradient passes, as PyTorch's does.
        value = tl.where(tl.load(y + offset, mask=mask).to(ACC) <= 0, 0.0, value)
    scale, _ = affine(weight, bias, mean, variance, eps, c, inside, True, ROUNDS, MAP, ACC, VECTOR)
    tl.store(grad_x + offset, (value * scale).to(MAP), mask=mask)
    if HAS_RESIDUAL:
        scale, _ = affine(
            other_weight, other_bias, other_mean, other_variance, eps, c, inside, HAS_NORM, ROUNDS, MAP, ACC, VECTOR
        )
        tl.store(grad_residual + offset, (value * scale).to(grad_residual.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions", "plane", "channels"])
def frozen_batch_norm_sums_kernel(
    grad, y, x, mean, parts, positions, plane, channels,
    RELU: tl.constexpr, CHANNELS_LAST: tl.constexpr, ACC: tl.constexpr, PART: tl.constexpr,
    BLOCK_POSITIONS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Note [Sums for weight and bias]: a program owns a part of BLOCK_CHANNELS channels."""
    part = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)[None, :]
    centre = tl.load(mean + c, mask=c < channels, other=0.0)
    sums = tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], ACC)
    products = tl.zeros([BLOCK_POSITIONS, BLOCK_CHANNELS], ACC)
    for start in range(0, PART, BLOCK_POSITIONS):
        position = part * PART + start + tl.arange(0, BLOCK_POSITIONS)[:, None]
        mask = (position < positions) & (c < channels)
        if CHANNELS_LAST:
            offset = position * channels + c
        else:
            offset = (position // plane * channels + c) * plane + position % plane
        value = tl.load(grad + offset, mask=mask, other=0.0).to(ACC)
        if RELU:
            value = tl.where(tl.load(y + offset, mask=mask, other=0.0).to(ACC) <= 0, 0.0, value)
        sums += value
        centred = tl.load(x + offset, mask=mask, other=0.0).to(ACC) - centre
        products += tl.where(mask, value * centred, 0.0)
    c = tl.program_id(1) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    tl.store(parts + part * 2 * channels + c, tl.sum(sums, 0), mask=c < channels)
    tl.store(parts + (part * 2 + 1) * channels + c, tl.sum(products, 0), mask=c < channels)


def _accumulator(dtype: torch.dtype) -> Any:
    return tl.float64 if dtype == torch.float64 else tl.float32


def _launch(
    like: Tensor, norm: list[Tensor], residual_norm: list[Tensor], eps: float, rule: int
) -> tuple[tuple[int], list[Any], dict[str, Any]]:
    """Return the grid, the arguments behind the maps, and the constants, for dense maps like `like`."""
    channels_last = is_channels_last(like)
    batch, channels, height, width = like.shape
    rows, length = (batch * height * width, channels) if channels_last else (batch * channels, height * width)
    if channels_last:
        block_inner = min(triton.next_power_of_2(length), BLOCK_ELEMENTS)
    else:
        block_inner = BLOCK_PIXELS[length >= SMALL_PLANE]
    block_outer = BLOCK_ELEMENTS // block_inner
    blocks = triton.cdiv(length, block_inner)
    # A norm that is not there is not read; any tensors fill the arguments.
    arguments = [*norm, *(residual_norm or norm), encode_float(eps, norm[0].dtype), rows, length, channels, blocks]
    constants = {
        "HAS_NORM": bool(residual_norm),
        "ROUNDS": rule == DETECTRON2,
        "CHANNELS_LAST": channels_last,
        "ACC": _accumulator(like.dtype),
        "VECTOR": _accumulator(norm[0].dtype),
        "VEC": math.gcd(8, length),
        "BLOCK_OUTER": block_outer,
        "BLOCK_INNER": block_inner,
        **OPTIONS,
    }
    return (triton.cdiv(rows, block_outer) * blocks,), arguments, constants


def frozen_batch_norm(
    x: Tensor, norm: list[Tensor], eps: float, residual: Tensor | None, residual_norm: list[Tensor],
    relu: bool, rule: int, widen: bool,
) -> Tensor:  # fmt: skip
    dtype = torch.promote_types(x.dtype, torch.float32) if widen else x.dtype
    y = torch.empty_like(x, dtype=dtype, memory_format=memory_format(x))
    if y.numel() > 0:
        grid, arguments, constants = _launch(x, norm, residual_norm, eps, rule)
        with torch.cuda.device_of(x):
            frozen_batch_norm_kernel[grid](
                x, x if residual is None else residual, y, *arguments,
                HAS_RESIDUAL=residual is not None, RELU=relu, **constants,
            )  # fmt: skip
    return y


def frozen_batch_norm_backward(
    grad: Tensor, y: Tensor | None, norm: list[Tensor], eps: float, residual_norm: list[Tensor],
    rule: int, x_type: int, residual_type: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    form = memory_format(grad)
    grad_x = torch.empty_like(grad, dtype=DTYPES[x_type], memory_format=form)
    wanted = residual_type >= 0
    dtype = DTYPES[residual_type] if wanted else grad_x.dtype
    grad_residual = (
        torch.empty_like(grad, dtype=dtype, memory_format=form) if wanted else grad.new_empty(0, dtype=dtype)
    )
    if grad.numel() > 0:
        grid, arguments, constants = _launch(grad, norm, residual_norm, eps, rule)
        with torch.cuda.device_of(grad):
            frozen_batch_norm_backward_kernel[grid](
                grad, grad if y is None else y, grad_x, grad_residual, *arguments,
                HAS_RESIDUAL=wanted, RELU=y is not None, **constants,
            )  # fmt: skip
    return grad_x, grad_residual


def frozen_batch_norm_sums(grad: Tensor, y: Tensor | None, x: Tensor, mean: Tensor) -> Tensor:
    channels_last, channels, plane = is_channels_last(x), x.size(1), x.size(2) * x.size(3)
    positions = x.size(0) * plane
    parts = mean.new_empty(triton.cdiv(positions, NORM_PART), 2, channels)
    block_channels = 32 if channels_last else 1
    if x.numel() > 0:
        with torch.cuda.device_of(x):
            frozen_batch_norm_sums_kernel[len(parts), triton.cdiv(channels, block_channels)](
                grad, grad if y is None else y, x, mean, parts, positions, plane, channels,
                RELU=y is not None, CHANNELS_LAST=channels_last, ACC=_accumulator(mean.dtype), PART=NORM_PART,
                BLOCK_POSITIONS=BLOCK_ELEMENTS // block_channels, BLOCK_CHANNELS=block_channels, **OPTIONS,
            )  # fmt: skip
    return parts


register("frozen_batch_norm", frozen_batch_norm)
register("frozen_batch_norm_backward", frozen_batch_norm_backward)
register("frozen_batch_norm_sums", frozen_batch_norm_sums)
