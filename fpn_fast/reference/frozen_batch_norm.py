# SPDX-License-Identifier: Apache-2.0
"""Batch norm with fixed statistics, a residual and ReLU in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _affine(norm: Sequence[Tensor], eps: float, rounded_to: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """Return scale and shift [C, 1, 1], in at least float32. rounded_to: a type that both are rounded to."""
    precision = torch.promote_types(norm[0].dtype, torch.float32)
    weight, bias, mean, variance = (vector.to(precision).reshape(-1, 1, 1) for vector in norm)
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    if rounded_to is not None:
        scale, shift = scale.to(rounded_to).to(precision), shift.to(rounded_to).to(precision)
    return scale, shift


def frozen_batch_norm(
    x: Tensor,
    norm: Sequence[Tensor],
    eps: float,
    residual: Tensor | None,
    residual_norm: Sequence[Tensor],
    relu: bool,
    rounds: bool,
    output_dtype: torch.dtype,
) -> Tensor:
    """Return ``x * scale + shift (+ residual * its scale + its shift)``, then ReLU, rounded once to `output_dtype`.

    norm: weight, bias, mean and variance [C]; residual_norm: those of the residual, empty without; rounds: scale and
    shift are rounded to the dtype of x. Computed in float32, in float64 where a map or a vector is float64.
    """
    accumulate = torch.promote_types(torch.promote_types(x.dtype, norm[0].dtype), torch.float32)
    rounded_to = x.dtype if rounds else None
    scale, shift = _affine(norm, eps, rounded_to)
    out = x.to(accumulate) * scale + shift
    if residual is not None:
        residual = residual.to(accumulate)
        if residual_norm:
            scale, shift = _affine(residual_norm, eps, rounded_to)
            residual = residual * scale + shift
        out = out + residual
    return (out.relu() if relu else out).to(output_dtype)


def frozen_batch_norm_backward(
    grad: Tensor,
    y: Tensor | None,
    norm: Sequence[Tensor],
    eps: float,
    residual_norm: Sequence[Tensor],
    rounded_to: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient behind ReLU, and those of x and of the residual, in at least float32.

    y: the result of a forward pass with ReLU, None without.
    """
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    if y is not None:
        grad = torch.where(y <= 0, 0, grad)
    grad_x = grad * _affine(norm, eps, rounded_to)[0]
    return grad, grad_x, grad * _affine(residual_norm, eps, rounded_to)[0] if residual_norm else grad


def frozen_batch_norm_sums(grad: Tensor, x: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums [C] of `grad`, which is behind ReLU, and of its product with x - mean."""
    centred = x.to(grad.dtype) - mean.to(grad.dtype).reshape(-1, 1, 1)
    return grad.sum((0, 2, 3)), (grad * centred).sum((0, 2, 3))
