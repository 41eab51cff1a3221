# SPDX-License-Identifier: Apache-2.0
"""The focal loss in Triton: Note [Focal loss] in csrc/common/sigmoid_focal_loss.h. A program owns a tile of adjacent
elements, across rows, and sums their losses."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.ops._schemas import FOCAL_TILE
from fpn_fast.triton import register
from fpn_fast.triton._arguments import decode_float, encode_float

# 16 elements per thread.
NUM_WARPS = 8


@triton.jit
def log_of_one_and(e, ACC: tl.constexpr):
    """Return log(1 + e) for e from 0 to 1, as a series in e / (2 + e), which is at most 1/3."""
    tangent = e / (2 + e)
    square = tangent * tangent
    TERMS: tl.constexpr = 16 if ACC == tl.float64 else 7
    series = tl.full(e.shape, 1.0 / (2 * TERMS + 1), ACC)
    for i in tl.static_range(TERMS):
        series = series * square + 1.0 / (2 * (TERMS - 1 - i) + 1)
    return 2 * tangent * series


@triton.jit(do_not_specialize=["elements", "classes"])
def sigmoid_focal_loss_kernel(
    logits, labels, weights, alpha, parts, gradient, elements, classes,
    GRADIENT: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = index < elements
    row = index // classes
    # The compiler widens accesses to 16 bytes only without a mask.
    whole = (tl.program_id(0).to(tl.int64) + 1) * TILE <= elements
    if whole:
        x = tl.load(logits + index).to(ACC)
    else:
        x = tl.load(logits + index, mask=inside, other=0.0).to(ACC)
    own = tl.load(labels + row, mask=inside, other=-1) == index - row * classes
    # The loss of the anchor's own class is that of the negated logit.
    x = tl.where(own, -x, x)
    e = tl.exp(-tl.abs(x))
    larger = 1 / (1 + e)
    smaller = e * larger
    p, q = tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)
    # tl.maximum might drop a NaN.
    cross_entropy = tl.where(x < 0, 0.0, x) + log_of_one_and(e, ACC)
    weight = tl.load(weights + row, mask=inside, other=0.0)
    share = decode_float(alpha, ACC)
    factor = weight * tl.where(own, share, 1 - share) * p * p
    tl.store(parts + tl.program_id(0), tl.sum(tl.where(inside, factor * cross_entropy, 0.0)))
    if GRADIENT:
        slope = factor * (p + 2 * q * cross_entropy)
        slope = tl.where(own, -slope, slope).to(gradient.dtype.element_ty)
        if whole:
            tl.store(gradient + index, slope)
        else:
            tl.store(gradient + index, slope, mask=inside)


def sigmoid_focal_loss(
    logits: Tensor, labels: Tensor, weights: Tensor, alpha: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    tiles = triton.cdiv(logits.numel(), FOCAL_TILE)
    parts = weights.new_empty(tiles)
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    if tiles:
        with torch.cuda.device_of(logits):
            sigmoid_focal_loss_kernel[tiles,](
                logits, labels, weights, encode_float(alpha, weights.dtype), parts, gradient,
                logits.numel(), logits.size(1), GRADIENT=with_gradient,
                ACC=tl.float64 if weights.dtype == torch.float64 else tl.float32, TILE=FOCAL_TILE, num_warps=NUM_WARPS,
            )  # fmt: skip
    return parts, gradient


register("sigmoid_focal_loss", sigmoid_focal_loss)
