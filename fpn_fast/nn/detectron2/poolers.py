# SPDX-License-Identifier: Apache-2.0
"""detectron2's ROIPooler."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.ops._checks import as_pair
from fpn_fast.ops.multiscale_roi_align import rois_of_images

__all__ = ["ROIPooler"]

#: pooler_type -> whether pixel centres lie at half-integers.
_ALIGNED = {"ROIAlign": False, "ROIAlignV2": True}


class PoolerForward:
    """The forward pass of ROIPooler, for our module and for detectron2's."""

    output_size: tuple[int, int]
    canonical_box_size: float
    canonical_level: float
    strict: bool

    # (scales, sampling_ratio, aligned)
    _sampling: Callable[[], tuple[Sequence[float], int, bool]]

    def forward(self, x: Sequence[Tensor], box_lists: Sequence[Any]) -> Tensor:
        """Pools the boxes of a batch of images.

        Args:
            x: one map [N, C, H_l, W_l] per scale, finest first.
            box_lists: per image [L_i, 4], (x1, y1, x2, y2) in image pixels, or an object that holds them as ``tensor``,
                such as detectron2's Boxes. L_i may be 0.

        Returns:
            [sum of L_i, C, PH, PW], image after image, in the features' dtype.

        Raises:
            ValueError: the number of maps or of box lists is wrong; others: the op's.
            TypeError: see the op.
        """
        scales, sampling_ratio, aligned = self._sampling()
        if len(x) != len(scales):
            raise ValueError(f"x must have a map for each of the {len(scales)} scales, got {len(x)}")
        if len(box_lists) != x[0].size(0):
            raise ValueError(f"box_lists must be one for each of the {x[0].size(0)} images, got {len(box_lists)}")
        boxes = [each if isinstance(each, Tensor) else each.tensor for each in box_lists]
        rois = rois_of_images(boxes) if boxes else torch.zeros(0, 5, device=x[0].device)
        rule: dict[str, Any] = {
            "canonical_scale": self.canonical_box_size,
            "canonical_level": self.canonical_level,
            "level_formula": "detectron2",
        }
        if self.strict:
            rule = {"levels": ops.assign_levels(rois, scales, **rule)}
            rois = rois.to(x[0].dtype)
        return ops.multiscale_roi_align(
            x,
            rois,
            self.output_size,
            scales,
            sampling_ratio=sampling_ratio,
            aligned=aligned,
            **rule,
        )


class ROIPooler(PoolerForward, nn.Module):
    """RoIAlign from the pyramid level that fits each box: drop-in for ``detectron2.modeling.poolers.ROIPooler``.

    Constructor, level formula and output are detectron2's, computed by one call of
    :func:`fpn_fast.ops.multiscale_roi_align`. The module has no parameters.

    Note:
        Boxes stay float32 for half-precision features; detectron2 rounds them to the features' dtype.
        ``strict=True`` rounds them too, and samples in float32 like this library always does. An output_size that is
        not square is used as given; detectron2 makes it square for several maps.

    Args:
        output_size: bins along each axis, (PH, PW) or one integer for both.
        scales: map pixels per image pixel of each map: powers of two, at most 1, each half of the one before.
        sampling_ratio: samples along each axis of a bin. 0 or less: the bin's size in map pixels, rounded up.
        pooler_type: ``"ROIAlignV2"``, or ``"ROIAlign"``, whose samples are off by half a pixel.
        canonical_box_size, canonical_level: a box of canonical_box_size**2 pixels is pooled from the map with a stride
            of 2**canonical_level. Defaults: 224 and 4.
        strict: whether boxes are rounded to the features' dtype before sampling. Levels use the boxes as given.

    Raises:
        ValueError: pooler_type is unknown; scales are not such a sequence; a size is not positive.

    Source: detectron2/modeling/poolers.py, detectron2/layers/roi_align.py.

    >>> pooler = ROIPooler(7, (1 / 4, 1 / 8), sampling_ratio=0, pooler_type="ROIAlignV2")
    >>> maps = [torch.rand(2, 8, 32, 32), torch.rand(2, 8, 16, 16)]
    >>> pooler(maps, [torch.tensor([[0.0, 0.0, 90.0, 60.0]]), torch.empty(0, 4)]).shape
    torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: float = 224,
        canonical_level: float = 4,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if pooler_type not in _ALIGNED:
            raise ValueError(f"pooler_type must be one of {', '.join(_ALIGNED)}, got {pooler_type!r}")
        size = as_pair("output_size", output_size)
        if min(size) < 1:
            raise ValueError(f"output_size must be one or two positive integers, got {output_size}")
        if not canonical_box_size > 0:
            raise ValueError(f"canonical_box_size must be a positive number of pixels, got {canonical_box_size}")
        self.min_level, self.max_level = _levels_of(scales)
        self.output_size = size
        self.scales = tuple(map(float, scales))
        self.sampling_ratio = sampling_ratio
        self.pooler_type = pooler_type
        self.canonical_box_size = canonical_box_size
        self.canonical_level = canonical_level
        self.strict = strict

    def _sampling(self) -> tuple[Sequence[float], int, bool]:
        return self.scales, self.sampling_ratio, _ALIGNED[self.pooler_type]

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, scales={self.scales}, sampling_ratio={self.sampling_ratio}, "
            f"pooler_type={self.pooler_type!r}, canonical_box_size={self.canonical_box_size}, "
            f"canonical_level={self.canonical_level}, strict={self.strict}"
        )


def _levels_of(scales: Sequence[float]) -> tuple[int, int]:
    """First and last level of maps with `scales`; level l has stride 2**l."""
    if len(scales) == 0 or not all(0 < scale <= 1 for scale in scales):
        raise ValueError(f"scales must be positive and at most 1, got {list(scales)}")
    levels = [-math.log2(scale) for scale in scales]
    if not all(level.is_integer() for level in levels):
        raise ValueError(f"scales must be powers of two, got {list(scales)}")
    if any(coarser != finer + 1 for finer, coarser in itertools.pairwise(levels)):
        raise ValueError(f"scales must each be half of the one before, got {list(scales)}")
    return int(levels[0]), int(levels[-1])
