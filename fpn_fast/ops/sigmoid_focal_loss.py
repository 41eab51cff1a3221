# SPDX-License-Identifier: Apache-2.0
"""The focal loss of a dense head's classes, with its gradient in the same pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import check_device, check_integers, check_shape, check_tensor
from fpn_fast.ops._registration import register_op
from fpn_fast.ops._schemas import FOCAL_TILE


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, weights: Tensor | None = None, *, alpha: float = 0.25) -> Tensor:
    """Sum the focal losses of all classes of all anchors, with gamma 2 and without a table of one-hot targets.

    Args:
        logits: [M, C], one per class; float64, float32, float16 or bfloat16.
        labels: [M] integers, the class of each anchor from 0 to C - 1; any other value is background.
        weights: [M], the factor of an anchor's losses, 0 to ignore it. None (default): 1.
        alpha: the share of an anchor's own class, 0.25 by default; the others have 1 - alpha.

    Returns:
        A scalar, float64 for float64 logits, else float32: the sum over anchors and classes of
        ``weight * alpha_t * (1 - p_t)^2 * log(1 / p_t)``. It equals ``torchvision.ops.sigmoid_focal_loss(...,
        reduction="sum")`` with one-hot targets to rounding. Logits of any size are safe; NaN stays NaN.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the logits' device.
        RuntimeError: a second derivative is asked for.

    Note:
        The forward pass computes the gradient for the logits too, one table of their size. The call does not
        synchronise with the host. Two runs are equal bit for bit; backends agree to rounding.

    >>> print(f"{sigmoid_focal_loss(torch.tensor([[2.0, -1.0]]), torch.tensor([1])):.4f}")
    1.4130

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    check_tensor(logits, "logits")
    if logits.dim() != 2:
        raise ValueError(f"logits must be [M, C], got {tuple(logits.shape)}")
    labels = check_integers(labels, "labels", "[M]", (logits.size(0),), logits, "logits")
    if weights is not None:
        check_tensor(weights, "weights")
        check_shape(weights, "weights", "[M]", (logits.size(0),))
        check_device(weights, "weights", logits, "logits")
    accumulate = torch.promote_types(logits.dtype, torch.float32)
    if weights is None:
        weights = torch.ones(len(logits), dtype=accumulate, device=logits.device)
    weights = weights.detach().to(accumulate).contiguous()
    if backends.plain_only():
        losses, _ = reference.sigmoid_focal_loss(logits, labels, weights, float(alpha))
        return losses.sum()
    backend = backends.choose_for(logits, "sigmoid_focal_loss")
    total: Tensor = _FocalLoss.apply(backend, logits.contiguous(), labels, weights, float(alpha))
    return total


class _FocalLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, logits: Tensor, labels: Tensor, weights: Tensor, alpha: float) -> Tensor:
        parts, gradient = _OP[backend](logits, labels, weights, alpha, ctx.needs_input_grad[1])
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(gradient)
        total: Tensor = parts.sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The saved gradient is a constant to autograd: a second derivative would silently be zero.
            raise RuntimeError("sigmoid_focal_loss is not differentiable twice, which create_graph=True asks for")
        (gradient,) = ctx.saved_tensors
        return None, gradient * grad.to(gradient.dtype), None, None, None


def _fake(logits: Tensor, labels: Tensor, weights: Tensor, alpha: float, with_gradient: bool) -> tuple[Tensor, Tensor]:
    gradient = torch.empty_like(logits) if with_gradient else logits.new_empty(0)
    return weights.new_empty((logits.numel() + FOCAL_TILE - 1) // FOCAL_TILE), gradient


def _reference(
    logits: Tensor, labels: Tensor, weights: Tensor, alpha: float, with_gradient: bool
) -> tuple[Tensor, Tensor]:
    losses, slopes = reference.sigmoid_focal_loss(logits, labels, weights, alpha)
    flat = losses.flatten()
    tiles = torch.nn.functional.pad(flat, (0, -len(flat) % FOCAL_TILE)).view(-1, FOCAL_TILE)
    return tiles.sum(1), slopes.to(logits.dtype) if with_gradient else logits.new_empty(0)


_OP = register_op("sigmoid_focal_loss", fake=_fake, reference=_reference)
