# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign: level assignment, sampling and pooling of all maps in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_fast import backends, reference
from fpn_fast._memory_format import memory_format
from fpn_fast._torch_private import below_autograd
from fpn_fast.ops._checks import DTYPES, check_maps
from fpn_fast.ops._registration import call_kernel, constant, records_gradient, register_op, traced
from fpn_fast.ops._roi_align import in_order, keep_nothing, refuse_second_derivative, remember_sizes
from fpn_fast.ops.levels import MAX_LEVELS, levels_by_area, thresholds_of
from fpn_fast.ops.multiscale_roi_align_max import pool_max


def multiscale_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    output_size: int | tuple[int, int],
    scales: Sequence[float],
    *,
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    level_formula: str = "torchvision",
    levels: Tensor | None = None,
    pool_mode: str = "avg",
) -> Tensor:
    """Pool each RoI from the map of its level to a fixed size: RoIAlign over all levels in one call.

    Args:
        features: 1 to 8 maps [N, C, H_l, W_l], finest first, of one dtype (float64, float32, float16 or bfloat16) and
            on one device, with any strides. Under autocast they are promoted to the widest dtype among them.
        rois: [K, 5] (image, x1, y1, x2, y2): the image's index in the batch and corners in image pixels. They are read
            in float32 (float64 for float64 features) and get no gradient.
        output_size: bins along each axis, (PH, PW) or one number for both; at most 1024.
        scales: map pixels per image pixel of each map, such as (1/4, 1/8, 1/16, 1/32).
        sampling_ratio: samples along each axis of a bin. 0 or less (default): the bin's size in map pixels, rounded up.
        aligned: True if pixel centres lie at half-integers (detectron2's ROIAlignV2, mmcv's default). If False
            (default), a RoI is at least one map pixel wide and high.
        canonical_scale, canonical_level, level_formula: the level rule, see :func:`assign_levels`.
        levels: [K] integers, the map of each RoI, instead of the level rule. A RoI of an unknown map gets a zero row.
        pool_mode: ``"avg"`` (default), the mean of a bin's samples; or ``"max"``, the largest, as in mmcv's RoIAlign,
            for maps of at most 16,000 x 16,000 pixels. In both, a sample more than a pixel off the map counts as zero.

    Returns:
        [K, C, PH, PW] in the features' dtype and the finest map's memory format; computed in float32 (float64 for
        float64) and rounded once.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, or the features' dtypes differ.
        ValueError: shapes, devices or values do not fit; the message names the rule and the value received.
        BackendUnavailableError: the requested backend cannot serve the features' device.

    Note:
        The gradient is gathered without atomics: two runs are equal bit for bit. There is no second derivative.

        A RoI gets a row of zeros if it belongs to no map, has a NaN, is infinite, or names an image outside the batch.
        A bin is zero if it lies off the map or is more than 2**20 map pixels long with an adaptive grid. Whether a NaN
        or infinite pixel reaches other bins of the same RoI is undefined.

        In ``"max"`` the first of equal samples wins, in the order of rows, then columns; its pixels alone get the
        gradient, none if it is off the map. NaN and negative infinity never win. A bin without another sample is zero,
        where mmcv returns the lowest float.

    Source: He et al., Mask R-CNN, 2017; torchvision/ops/poolers.py and csrc/ops/cpu/roi_align_kernel.cpp;
    mmcv/ops/csrc/common/cuda/roi_align_cuda_kernel.cuh.
    """
    if pool_mode not in ("avg", "max"):
        raise ValueError(f"pool_mode must be 'avg' or 'max', got {pool_mode!r}")
    height, width = _check_output_size(output_size)
    features = check_maps(list(features), "features")
    rois, levels = _check_rois(features, rois, scales, sampling_ratio, levels)
    scales = tuple(constant(scale) for scale in scales)
    # One that no area passes stands for none: autograd's tracer takes an empty list for one of tensors.
    thresholds = [math.inf]
    if levels is None and len(scales) > 1:
        thresholds = thresholds_of(scales, constant(canonical_scale), constant(canonical_level), level_formula)
    pool = pool_max if pool_mode == "max" else _pool
    return pool(features, rois, levels, height, width, list(scales), thresholds, int(sampling_ratio), bool(aligned))


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Pool RoIs from one map: :func:`torchvision.ops.roi_align` with its arguments, by :func:`multiscale_roi_align`.

    Args:
        input: [N, C, H, W].
        boxes: [K, 5] (image, x1, y1, x2, y2), or a list of N tensors [L, 4]. They stay float32 for half-precision
            input.
        output_size, sampling_ratio, aligned: see :func:`multiscale_roi_align`.
        spatial_scale: map pixels per image pixel; 1 by default.

    Returns:
        [K, C, PH, PW] in the input's dtype and memory format.

    Raises:
        TypeError, ValueError, BackendUnavailableError: see :func:`multiscale_roi_align`.
    """
    rois = boxes if isinstance(boxes, Tensor) else rois_of_images(boxes)
    return multiscale_roi_align(
        [input], rois, output_size, [spatial_scale], sampling_ratio=sampling_ratio, aligned=aligned
    )


def rois_of_images(boxes: Sequence[Tensor]) -> Tensor:
    """Boxes [L_i, 4] of each image of a batch -> [K, 5] (image, x1, y1, x2, y2), float32 or, for float64, float64."""
    for i, each in enumerate(boxes):
        if each.dim() != 2 or each.size(1) != 4:
            raise ValueError(f"boxes must be [L, 4], (x1, y1, x2, y2), got {tuple(each.shape)} at {i}")
    if not boxes:
        raise ValueError("boxes must have a tensor for each image, got an empty sequence")
    dtype = torch.float64 if boxes[0].dtype == torch.float64 else torch.float32
    rows = [torch.nn.functional.pad(each.detach().to(dtype), (1, 0), value=float(i)) for i, each in enumerate(boxes)]
    return torch.cat(rows)


def _check_output_size(output_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (output_size, output_size) if isinstance(output_size, int) else output_size
    if not 1 <= height <= 1024 or not 1 <= width <= 1024:
        raise ValueError(f"output_size must be 1 to 1024 bins along each axis, got {output_size}")
    return int(height), int(width)


def _check_rois(
    features: list[Tensor], rois: Tensor, scales: Sequence[float], sampling_ratio: int, levels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Rois and levels in the types that the kernels take, detached."""
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"features must be 1 to {MAX_LEVELS} maps, got {len(features)}")
    if len(scales) != len(features):
        raise ValueError(f"scales must be one for each of the {len(features)} features, got {len(scales)}")
    if sampling_ratio > 1024:
        raise ValueError(f"sampling_ratio must be at most 1024, got {sampling_ratio}")
    if not isinstance(rois, Tensor):
        raise TypeError(f"rois must be a tensor, got {type(rois).__name__}")
    if rois.dim() != 2 or rois.size(1) != 5:
        raise ValueError(f"rois must be [K, 5], (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    if rois.dtype not in DTYPES:
        raise TypeError(f"rois must be float64, float32, float16 or bfloat16, got {rois.dtype}")
    device = features[0].device
    if rois.device != device:
        raise ValueError(f"rois must be on the features' device, {device}, got {rois.device}")
    coordinates = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    rois = rois.detach().to(coordinates).contiguous()
    if levels is not None:
        if levels.dtype.is_floating_point or levels.dtype.is_complex or levels.dtype == torch.bool:
            raise TypeError(f"levels must be of an integer type, got {levels.dtype}")
        if levels.dim() != 1 or levels.size(0) != rois.size(0):
            raise ValueError(f"levels must be [K], one for each of the rois, got {tuple(levels.shape)}")
        if levels.device != device:
            raise ValueError(f"levels must be on the features' device, {device}, got {levels.device}")
        levels = levels.detach().long().contiguous()
    return rois, levels


def _pool(features: list[Tensor], rois: Tensor, levels: Tensor | None, *numbers: Any) -> Tensor:
    backend = backends.choose_for(features[0], "multiscale_roi_align")
    if not traced() and records_gradient(features):
        return _MultiScaleRoIAlign.apply(backend, rois, levels, numbers, *features)
    return call_kernel(_FORWARD[backend], features, rois, levels, *numbers)


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
) -> Tensor:
    first = features[0]
    return torch.empty(
        (rois.size(0), first.size(1), pooled_height, pooled_width),
        dtype=first.dtype,
        device=first.device,
        memory_format=memory_format(first),
    )


def _fake_backward(
    grad: Tensor,
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
    ctx: Any, features: Sequence[Tensor], rois: Tensor, levels: Tensor | None, numbers: Sequence[Any]
) -> None:
    ctx.save_for_backward(rois, levels)
    remember_sizes(ctx, features, numbers)


def _feature_grads(backend: str, ctx: Any, grad: Tensor) -> list[Tensor]:
    """The gradient of each feature, in the memory format of the finest one."""
    rois, levels = ctx.saved_tensors
    return _BACKWARD[backend](in_order(ctx, grad), rois, levels, ctx.batch, ctx.sizes, *ctx.numbers, ctx.channels_last)


class _MultiScaleRoIAlign(torch.autograd.Function):
    """The route without a tracer; :func:`_backward` is the same for the registered op."""

    @staticmethod
    def forward(
        ctx: Any, backend: str, rois: Tensor, levels: Tensor | None, numbers: tuple[Any, ...], *features: Tensor
    ) -> Tensor:
        ctx.backend = backend
        _remember(ctx, features, rois, levels, numbers)
        with below_autograd():
            return _FORWARD[backend](list(features), rois, levels, *numbers)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        with below_autograd():
            return (None, None, None, None, *_feature_grads(ctx.backend, ctx, grad))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, rois, levels, *numbers = inputs
    _remember(ctx, features, rois, levels, numbers)


def _backward(backend: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _feature_grads(backend, ctx, grad), *[None] * 8

    return backward


def _reference_levels(rois: Tensor, levels: Tensor | None, maps: int, thresholds: list[float]) -> Tensor:
    return levels_by_area(rois, maps, thresholds) if levels is None else levels


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
) -> Tensor:
    levels = _reference_levels(rois, levels, len(features), thresholds)
    size = (pooled_height, pooled_width)
    # Autocast would round the products of the specification.
    with torch.autocast(features[0].device.type, enabled=False):
        pooled = reference.multiscale_roi_align(features, rois, levels, size, scales, sampling_ratio, aligned)
    return pooled.contiguous(memory_format=memory_format(features[0]))


def _reference_backward(
    grad: Tensor,
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
    levels = _reference_levels(rois, levels, len(sizes) // 2, thresholds)
    pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
    arguments = (grad, rois, levels, batch, pairs, scales, sampling_ratio, aligned)
    with torch.autocast(grad.device.type, enabled=False):
        grads = reference.multiscale_roi_align_backward(*arguments)
    form = torch.channels_last if channels_last else torch.contiguous_format
    return [g.contiguous(memory_format=form) for g in grads]


_FORWARD = register_op(
    "multiscale_roi_align", fake=_fake, setup_context=_setup_context, backward=_backward, reference=_reference
)
_BACKWARD = register_op(
    "multiscale_roi_align_backward",
    fake=_fake_backward,
    setup_context=keep_nothing,
    backward=refuse_second_derivative,
    reference=_reference_backward,
)
