# SPDX-License-Identifier: Apache-2.0
"""Batch norm with fixed statistics, a residual and ReLU in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_fast._memory_format import memory_format


def _widened(norm: Sequence[Tensor]) -> list[Tensor]:
    return [vector.to(torch.promote_types(vector.dtype, torch.float32)).reshape(-1, 1, 1) for vector in norm]


def _affine(norm: Sequence[Tensor], eps: float, rule: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return scale and shift [C, 1, 1], in at least float32. dtype: that of the map."""
    weight, bias, mean, variance = _widened(norm)
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    if rule == "detectron2":
        scale, shift = (each.to(dtype).to(each.dtype) for each in (scale, shift))
    return scale, shift


def _normalised(x: Tensor, norm: Sequence[Tensor], eps: float, rule: str, dtype: torch.dtype) -> Tensor:
    if rule == "batch_norm":
        weight, bias, mean, variance = (vector.to(x.dtype) for vector in norm)
        # Of a map that is not dense torch computes (x - mean) * root * weight + bias.
        x = x.contiguous(memory_format=memory_format(x))
        return F.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)
    scale, shift = _affine(norm, eps, rule, dtype)
    return x * scale + shift


def _times_slope(grad: Tensor, norm: Sequence[Tensor], eps: float, rule: str, dtype: torch.dtype) -> Tensor:
    if rule == "batch_norm":
        weight, _, _, variance = _widened(norm)
        # The root is of float64, and rounded.
        return grad * (variance.double() + eps).rsqrt().to(weight.dtype) * weight
    return grad * _affine(norm, eps, rule, dtype)[0]


def frozen_batch_norm(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    residual: Tensor | None,
    residual_norm: Sequence[Tensor],
    relu: bool,
    rule: str,
    output_dtype: torch.dtype,
) -> Tensor:
    """Return ``x * scale + shift (+ residual * its scale + its shift)``, then ReLU, rounded once to `output_dtype`.

    norm: weight, bias, mean and variance [C]; residual_norm: those of the residual, empty without; rule: whose
    roundings are followed, see the op. Computed in float32, in float64 where a map or a vector is float64.
    """
    accumulate = torch.promote_types(torch.promote_types(x.dtype, norm[0].dtype), torch.float32)
    out = _normalised(x.to(accumulate), norm, eps, rule, x.dtype)
    if residual is not None:
        residual = residual.to(accumulate)
        if residual_norm:
            residual = _normalised(residual, residual_norm, eps, rule, x.dtype)
        out = out + residual
    return (out.relu() if relu else out).to(output_dtype)


def frozen_batch_norm_backward(
    grad: Tensor,
    y: Tensor | None,
    norm: Sequence[Tensor],
    eps: float,
    residual_norm: Sequence[Tensor],
    rule: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient behind ReLU, and those of x and of the residual, in at least float32.

    y: the result of a forward pass with ReLU, None without; dtype: that of x.
    """
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if y is not None:
        grad = torch.where(y <= 0, 0, grad)
    grad_x = _times_slope(grad, norm, eps, rule, dtype)
    return grad, grad_x, _times_slope(grad, residual_norm, eps, rule, dtype) if residual_norm else grad


def frozen_batch_norm_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums [C] of `grad`, which is behind ReLU, and of its product with x - mean."""
    centred = x.to(grad.dtype) - mean.to(grad.dtype).reshape(-1, 1, 1)
    return grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3))
