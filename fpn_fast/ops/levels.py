# SPDX-License-Identifier: Apache-2.0
"""The level rule of RoIs as a list of areas: Note [Levels by area] in csrc/common/levels.h."""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast.reference.multiscale_roi_align import LEVEL_FORMULAS

#: csrc/common/levels.h: kMaxRoiLevels.
MAX_LEVELS = 8


def _float32(value: float) -> float:
    """Round `value` to float32; beyond its range, to infinity."""
    try:
        return struct.unpack("f", struct.pack("f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _from_bits(bits: int) -> float:
    return struct.unpack("f", struct.pack("I", bits))[0]


def _target(area: float, canonical_scale: float, canonical_level: float, level_formula: str) -> float:
    """Return the level of an area before floor and clamp, with every step rounded like in reference.assign_levels."""
    inside, outside = LEVEL_FORMULAS[level_formula]
    ratio = _float32(_float32(math.sqrt(area)) / _float32(canonical_scale))
    ratio = _float32(ratio + _float32(inside))
    logarithm = _float32(math.log2(ratio)) if ratio > 0 else -math.inf
    return _float32(_float32(canonical_level + logarithm) + _float32(outside))


@functools.lru_cache(maxsize=256)
def level_thresholds(
    first_level: int, last_level: int, canonical_scale: float, canonical_level: float, level_formula: str
) -> tuple[float, ...]:
    """Return the smallest float32 area of each level above the first, ascending; infinity if no area reaches it."""
    if level_formula == "mmdet":
        canonical_scale, canonical_level = canonical_scale / 2 ** (canonical_level - 2), 0
        first_level, last_level = 0, last_level - first_level
    infinity = struct.unpack("I", struct.pack("f", math.inf))[0]
    thresholds = []
    for level in range(first_level + 1, last_level + 1):
        # Binary search over bits: those of positive floats have the order of the floats.
        low, high = 0, infinity
        while low < high:
            middle = (low + high) // 2
            if _target(_from_bits(middle), canonical_scale, canonical_level, level_formula) >= level:
                high = middle
            else:
                low = middle + 1
        thresholds.append(_from_bits(low))
    return tuple(thresholds)


def check_level_rule(level_formula: str, canonical_scale: float) -> None:
    """Raise ValueError for an unknown formula or a scale that is not positive and finite."""
    if level_formula not in LEVEL_FORMULAS:
        raise ValueError(f"level_formula must be one of {', '.join(LEVEL_FORMULAS)}, got {level_formula!r}")
    if not canonical_scale > 0 or math.isinf(canonical_scale):
        raise ValueError(f"canonical_scale must be a positive number of pixels, got {canonical_scale}")


@torch.compiler.assume_constant_result
def thresholds_of(
    scales: Sequence[float], canonical_scale: float, canonical_level: float, level_formula: str
) -> list[float]:
    """Return the thresholds of a pyramid whose maps have `scales`, at most one per map; none for a single map.

    Raises:
        ValueError: scales are not positive or not finest first; the level rule is unknown.
    """
    check_level_rule(level_formula, canonical_scale)
    for scale in scales:
        if not scale > 0 or math.isinf(scale):
            raise ValueError(f"scales must be positive, got {list(scales)}")
    if len(scales) == 1:
        return []
    first, last = (round(-math.log2(scale)) for scale in (scales[0], scales[-1]))
    if last < first:
        raise ValueError(f"maps must be finest first, got scales {list(scales)}; reverse both")
    if level_formula == "mmdet":
        first, last = 0, len(scales) - 1
    # A pyramid that leaves out a stride has more levels than maps. RoIs beyond the last map belong to none.
    return list(level_thresholds(first, last, canonical_scale, canonical_level, level_formula)[: len(scales)])


def assign_levels(
    rois: Tensor,
    scales: Sequence[float],
    *,
    canonical_scale: float = 224,
    canonical_level: float = 4,
    level_formula: str = "torchvision",
) -> Tensor:
    """Return the map that each RoI is pooled from, by the rule of :func:`fpn_fast.ops.multiscale_roi_align`.

    Args:
        rois: [K, 5] (image, x1, y1, x2, y2) in image pixels.
        scales: map pixels per image pixel of each map, finest first.
        canonical_scale, canonical_level: a RoI of canonical_scale**2 pixels (224**2 by default) belongs to
            canonical_level (4 by default), whose stride is 2**canonical_level.
        level_formula: ``"torchvision"`` (default), ``"detectron2"`` or ``"mmdet"``; see
            :func:`fpn_fast.reference.assign_levels`, which computes the same with a logarithm.

    Returns:
        [K] int64, 0 for the finest map; -1 for a RoI that belongs to none: one with a NaN or, with several maps,
        inverted along one axis.

    Raises:
        TypeError: rois are not a floating-point tensor.
        ValueError: rois are not [K, 5]; scales are not positive or not finest first; the formula is unknown.

    >>> assign_levels(torch.tensor([[0.0, 0, 0, 50, 50], [0, 0, 0, 400, 400]]), (1 / 4, 1 / 8, 1 / 16)).tolist()
    [0, 2]
    """
    if not isinstance(rois, Tensor):
        raise TypeError(f"rois must be a tensor, got {type(rois).__name__}")
    if not rois.is_floating_point():
        raise TypeError(f"rois must be of a floating-point type, got {rois.dtype}")
    if rois.dim() != 2 or rois.size(1) != 5:
        raise ValueError(f"rois must be [K, 5], (image, x1, y1, x2, y2), got {tuple(rois.shape)}")
    if len(scales) == 0:
        raise ValueError("scales must have one value per map, got an empty sequence")
    # Two to the power of a negative integer is no number in numpy.
    canonical_scale, canonical_level = float(canonical_scale), float(canonical_level)
    thresholds = thresholds_of(tuple(map(float, scales)), canonical_scale, canonical_level, level_formula)
    return levels_by_area(rois, len(scales), thresholds)


def levels_by_area(rois: Tensor, maps: int, thresholds: Sequence[float]) -> Tensor:
    """Assign RoIs [K, 5] to maps like locate_roi in csrc/common/levels.h: [K] int64, -1 for none."""
    box = rois.detach()[:, 1:].float()
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    level = torch.zeros_like(area, dtype=torch.int64)
    for threshold in thresholds:
        level += area >= threshold
    absent = rois.isnan().any(1)
    if maps > 1:
        absent = absent | ~(area >= 0) | (level >= maps)
    return torch.where(absent, -1, level)
