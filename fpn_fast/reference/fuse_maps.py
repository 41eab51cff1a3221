# SPDX-License-Identifier: Apache-2.0
"""The weighted fusion of maps of several sizes in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_fast._memory_format import memory_format
from fpn_fast.reference.top_down import resample

#: Added to the sum of weights by the rule "fast".
FAST_EPS = 1e-4


def same_padding(size: int) -> tuple[int, int]:
    """Return the pixels of padding before and after an axis, of a 3-pixel window with stride 2 in TensorFlow's SAME."""
    total = max(2 * ((size + 1) // 2 - 1) + 3 - size, 0)
    return total // 2, total - total // 2


def resized(x: Tensor, size: tuple[int, int], form: str) -> Tensor:
    """Return `x` [N, C, h, w] in one of the forms of :func:`fpn_fast.ops.fuse_maps`, [N, C, *size]."""
    if form == "identity":
        return x
    if form == "nearest":
        return resample(x, size)
    if form in ("bilinear", "bilinear_align_corners"):
        return resample(x, size, "bilinear", form == "bilinear_align_corners")
    if form == "max_pool":
        return F.max_pool2d(x, 3, 2, 1)
    if form == "max_pool_2x2":
        return F.max_pool2d(x, 2, 2)
    if form == "adaptive_max":
        return F.adaptive_max_pool2d(x, size)
    padding = [*same_padding(x.shape[3]), *same_padding(x.shape[2])]
    return F.max_pool2d(F.pad(x, padding, value=0.0 if form == "max_pool_same_zero" else -torch.inf), 3, 2)


def fuse_maps(
    maps: Sequence[Tensor],
    size: tuple[int, int],
    forms: Sequence[str],
    weights: Tensor | None = None,
    rule: str | None = None,
    gate: Tensor | None = None,
    sequential: bool = False,
    divide: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Return ``activation(sum_k w_k * resized(maps[k]) / divide)``, [N, C, *size], in the memory format of maps[0].

    forms: one per map; weights: [K], converted to the maps' dtype first; rule: None, "softmax" or "fast"; gate:
    [N, C, 1, 1], multiplies the first map. Every product, quotient and activation rounds to the storage type. The sum
    does so after each addition if `sequential`, else once.

    Source: effdet/efficientdet.py, FpnCombine, for the rules and one rounding.
    """
    dtype = maps[0].dtype
    terms = [resized(x, size, form) for x, form in zip(maps, forms, strict=True)]
    if weights is not None:
        weights = weights.to(dtype)
        if rule == "fast":
            weights = weights.relu()
            total = weights.sum() + FAST_EPS
            terms = [term * weights[k] / total for k, term in enumerate(terms)]
        else:
            if rule == "softmax":
                weights = weights.softmax(0)
            terms = [term * weights[k] for k, term in enumerate(terms)]
    if gate is not None:
        terms[0] = terms[0] * gate.to(dtype)
    accumulate = dtype if sequential else torch.promote_types(dtype, torch.float32)
    fused = terms[0].to(accumulate)
    for term in terms[1:]:
        fused = fused + term.to(accumulate)
    fused = fused.to(dtype)
    if divide != 1:
        # A GPU multiplies by the inverse of a number of Python, which rounds otherwise.
        fused = fused / fused.new_full((), divide)
    if activation is not None:
        fused = {"relu": torch.relu, "relu6": F.relu6, "silu": F.silu}[activation](fused)
    return fused.contiguous(memory_format=memory_format(maps[0]))
