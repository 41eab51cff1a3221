# SPDX-License-Identifier: Apache-2.0
"""Multi-level RoIAlign: level assignment, sampling and pooling of all maps in one call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast.ops._checks import as_pair, check_device, check_integers, check_maps, check_tensor
from fpn_fast.ops._registration import constant
from fpn_fast.ops._roi_align import pool
from fpn_fast.ops.levels import MAX_LEVELS, thresholds_of

#: csrc/common/roi_align_max.h: kMaxWinnerSize.
MAX_SIZE = 16000


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
    scales = [constant(scale) for scale in scales]
    thresholds = []
    if levels is None and len(scales) > 1:
        thresholds = thresholds_of(tuple(scales), constant(canonical_scale), constant(canonical_level), level_formula)
    # Not an empty list, as for maps of one scale: autograd's tracer mistakes it for a list of tensors. Only an infinite
    # area reaches this one; AOTInductor cannot load a list with infinity.
    thresholds = thresholds or [torch.finfo(torch.float32).max]
    rule = (height, width, scales, thresholds, int(sampling_ratio), bool(aligned))
    if pool_mode == "avg":
        return pool("multiscale_roi_align", features, rois, levels, *rule)
    for i, feature in enumerate(features):
        if feature.size(2) > MAX_SIZE or feature.size(3) > MAX_SIZE:
            raise ValueError(
                f"features must be at most {MAX_SIZE} x {MAX_SIZE} pixels for pool_mode 'max', got "
                f"{tuple(feature.shape)} at {i}"
            )
    return pool("multiscale_roi_align_max", features, rois, levels, *rule)[0]


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
    """Join the boxes [L_i, 4] of all images to [K, 5] (image, x1, y1, x2, y2), float32 (float64 for float64)."""
    for i, each in enumerate(boxes):
        if each.dim() != 2 or each.size(1) != 4:
            raise ValueError(f"boxes must be [L, 4], (x1, y1, x2, y2), got {tuple(each.shape)} at {i}")
    if len(boxes) == 0:
        raise ValueError("boxes must have a tensor for each image, got an empty sequence")
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in boxes) else torch.float32
    rows = [torch.nn.functional.pad(each.detach().to(dtype), (1, 0), value=float(i)) for i, each in enumerate(boxes)]
    return torch.cat(rows)


def _check_output_size(output_size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = as_pair("output_size", output_size)
    if not 1 <= height <= 1024 or not 1 <= width <= 1024:
        raise ValueError(f"output_size must be 1 to 1024 bins along each axis, got {output_size}")
    return height, width


def _check_rois(
    features: list[Tensor], rois: Tensor, scales: Sequence[float], sampling_ratio: int, levels: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return rois and levels, detached, in the dtypes that the kernels take."""
    if not 1 <= len(features) <= MAX_LEVELS:
        raise ValueError(f"features must be 1 to {MAX_LEVELS} maps, got {len(features)}")
    if len(scales) != len(features):
        raise ValueError(f"scales must be one for each of the {len(features)} features, got {len(scales)}")
    if sampling_ratio > 1024:
        raise ValueError(f"sampling_ratio must be at most 1024, got {sampling_ratio}")
    check_tensor(rois, "rois")
    if rois.dim() != 2 or rois.size(1) != 5:
        raise ValueError(f"rois must be [K, 5], (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    check_device(rois, "rois", features[0], "features")
    coordinates = torch.float64 if features[0].dtype == torch.float64 else torch.float32
    rois = rois.detach().to(coordinates).contiguous()
    if levels is not None:
        levels = check_integers(levels, "levels", "[K]", (rois.size(0),), features[0], "features")
    return rois, levels
