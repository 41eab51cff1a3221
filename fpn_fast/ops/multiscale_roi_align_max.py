# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign whose bins are the largest of their samples: ``pool_mode="max"`` of multiscale_roi_align.py,
which has the contract and the checks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_fast import backends, reference
from fpn_fast._memory_format import memory_format
from fpn_fast._torch_private import below_autograd
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op, traced
from fpn_fast.ops._roi_align import in_order, keep_nothing, refuse_second_derivative, remember_sizes
from fpn_fast.ops.levels import levels_by_area

#: csrc/common/roi_align_max.h: kMaxWinnerSize.
MAX_SIZE = 16000


def pool_max(features: list[Tensor], rois: Tensor, levels: Tensor | None, *numbers: Any) -> Tensor:
    """The pooled RoIs, of arguments that are those of the registered op, checked.

    Raises:
        ValueError: a map has more than MAX_SIZE rows or columns.
    """
    for i, feature in enumerate(features):
        if feature.size(2) > MAX_SIZE or feature.size(3) > MAX_SIZE:
            raise ValueError(
                f"features must be at most {MAX_SIZE} x {MAX_SIZE} pixels for pool_mode 'max', got "
                f"{tuple(feature.shape)} at {i}"
            )
    backend = backends.choose_for(features[0], "multiscale_roi_align_max")
    if not traced() and records_gradient(features):
        return _MultiScaleRoIAlignMax.apply(backend, rois, levels, numbers, *features)[0]
    return call_kernel(_FORWARD[backend], features, rois, levels, *numbers)[0]


def _fake(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    first = features[0]
    shape = (rois.size(0), first.size(1), pooled_height, pooled_width)
    form = memory_format(first)
    return (
        torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=form),
        torch.empty(shape, dtype=torch.int32, device=first.device, memory_format=form),
    )


def _fake_backward(
    grad: Tensor,
    winners: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    batch: int,
    sizes: list[int],
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> list[Tensor]:
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [
        torch.empty((batch, grad.size(1), height, width), dtype=grad.dtype, device=grad.device, memory_format=form)
        for height, width in zip(sizes[::2], sizes[1::2], strict=True)
    ]


def _remember(
    ctx: Any, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, winners: Tensor, numbers: Sequence[Any]
) -> None:
    ctx.save_for_backward(rois, levels, winners)
    ctx.mark_non_differentiable(winners)
    ctx.set_materialize_grads(False)
    remember_sizes(ctx, features, numbers)


def _feature_grads(backend: str, ctx: Any, grad: Tensor) -> list[Tensor]:
    """The gradient of each feature, in the memory format of the finest one."""
    rois, levels, winners = ctx.saved_tensors
    return _BACKWARD[backend](
        in_order(ctx, grad), winners, rois, levels, ctx.batch, ctx.sizes, *ctx.numbers, ctx.channels_last
    )


class _MultiScaleRoIAlignMax(torch.autograd.Function):
    """The route without a tracer; :func:`_backward` is the same for the registered op."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, rois: Tensor, levels: Tensor | None, numbers: tuple[Any, ...], *features: Tensor
    ) -> tuple[Tensor, Tensor]:
        ctx.backend = backend
        with below_autograd():
            pooled, winners = _FORWARD[backend](list(features), rois, levels, *numbers)
        _remember(ctx, features, rois, levels, winners, numbers)
        return pooled, winners

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (4 + len(ctx.sizes) // 2)
        with below_autograd():
            return (None, None, None, None, *_feature_grads(ctx.backend, ctx, grad))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, rois, levels, *numbers = inputs
    _remember(ctx, features, rois, levels, output[1], numbers)


def _backward(backend: str) -> Any:
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
        if grad is None:
            return (None,) * 9
        return _feature_grads(backend, ctx, grad), *[None] * 8

    return backward


def _reference(
    features: list[Tensor],
    rois: Tensor,
    levels: Tensor | None,
    pooled_height: int,
    pooled_width: int,
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    levels = levels_by_area(rois, len(features), thresholds) if levels is None else levels
    size = (pooled_height, pooled_width)
    pooled, winners = reference.multiscale_roi_align_max(features, rois, levels, size, scales, sampling_ratio, aligned)
    form = memory_format(features[0])
    return pooled.contiguous(memory_format=form), winners.contiguous(memory_format=form)


def _reference_backward(
    grad: Tensor,
    winners: Tensor,
    rois: Tensor,
    levels: Tensor | None,
    batch: int,
    sizes: list[int],
    scales: list[float],
    thresholds: list[float],
    sampling_ratio: int,
    aligned: bool,
    channels_last: bool,
) -> list[Tensor]:
    levels = levels_by_area(rois, len(sizes) // 2, thresholds) if levels is None else levels
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    arguments = (grad, winners, rois, levels, batch, pairs, scales, sampling_ratio, aligned)
    # Autocast would round the products of the specification.
    with torch.autocast(grad.device.type, enabled=False):
        grads = reference.multiscale_roi_align_max_backward(*arguments)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [g.contiguous(memory_format=form) for g in grads]


_FORWARD = register_op(
    "multiscale_roi_align_max", fake=_fake, setup_context=_setup_context, backward=_backward, reference=_reference
)
_BACKWARD = register_op(
    "multiscale_roi_align_max_backward",
    fake=_fake_backward,
    setup_context=keep_nothing,
    backward=refuse_second_derivative,
    reference=_reference_backward,
)
