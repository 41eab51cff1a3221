# SPDX-License-Identifier: Apache-2.0
"""torchvision's RoIAlign modules, which pool all levels of a pyramid in one call."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fpn_fast import ops
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn._shared import recorded
from fpn_fast.ops.multiscale_roi_align import rois_of_images

if importlib.util.find_spec("torchvision") is not None:
    # torchvision's models check isinstance, so its classes are the base where it is installed.
    from torchvision.ops import MultiScaleRoIAlign as _MultiScaleBase
    from torchvision.ops import RoIAlign as _RoIAlignBase
    from torchvision.ops.poolers import LevelMapper
else:
    from fpn_fast.nn._standalone import LevelMapper
    from fpn_fast.nn._standalone import MultiScaleRoIAlign as _MultiScaleBase
    from fpn_fast.nn._standalone import RoIAlign as _RoIAlignBase

__all__ = ["MultiScaleRoIAlign", "RoIAlign"]

_ROI_ALIGN = Steps(_RoIAlignBase, replaced="forward")
_POOLING = Steps(_MultiScaleBase, replaced="forward")
_MAPPER = Part(LevelMapper)


class RoIAlign(_RoIAlignBase):
    """RoIAlign of one map (He et al., 2017): drop-in for :class:`torchvision.ops.RoIAlign`.

    Constructor and output are torchvision's, computed by :func:`fpn_fast.ops.roi_align`. Boxes stay float32 also for a
    float16 or bfloat16 map. The class is a subclass of torchvision's where torchvision is installed.

    Args:
        output_size: bins along each axis, (PH, PW) or one integer for both.
        spatial_scale: map pixels per unit of the boxes.
        sampling_ratio: samples along each axis of a bin. 0 or less: the bin's size in map pixels, rounded up.
        aligned: whether pixel centres lie at half-integers. Default: False.

    >>> import torch
    >>> RoIAlign(7, 0.25, 2)(torch.rand(2, 8, 16, 16), torch.tensor([[1.0, 4.0, 4.0, 40.0, 60.0]])).shape
    torch.Size([1, 8, 7, 7])
    """

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """[N, C, H, W], and [K, 5] (image, x1, y1, x2, y2) or N tensors [L, 4] -> [K, C, PH, PW]; errors: the op's."""
        if recorded(input) or not _ROI_ALIGN.are_own(self):
            return super().forward(input, rois)
        return ops.roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class MultiScaleRoIAlign(_MultiScaleBase):
    """RoIAlign from the pyramid level that fits each box: drop-in for :class:`torchvision.ops.MultiScaleRoIAlign`.

    Constructor and output are torchvision's, computed by one sync-free call of
    :func:`fpn_fast.ops.multiscale_roi_align`. Boxes stay float32 and features keep their dtype, also under autocast.
    The class is a subclass of torchvision's where torchvision is installed.

    Note:
        Like in torchvision, the first call infers the maps' scales and keeps them in ``scales`` and ``map_levels``. A
        later call with another pyramid still uses these. Levels are decided in float32, also for float64 boxes. Maps
        that are not finest first raise an error; torchvision returns zeros for them.

    Args:
        featmap_names: names of the maps to pool from, which forward takes in the order of its dict.
        output_size: bins along each axis, (PH, PW) or one integer for both.
        sampling_ratio: samples along each axis of a bin. 0 or less: the bin's size in map pixels, rounded up.
        canonical_scale, canonical_level: a box of canonical_scale**2 pixels is pooled from the map with a stride of
            2**canonical_level. Defaults: 224 and 4.

    Source: Lin et al., Feature Pyramid Networks, 2017, equation 1; torchvision/ops/poolers.py.

    >>> import torch
    >>> pooler = MultiScaleRoIAlign(["0", "1"], output_size=7, sampling_ratio=2)
    >>> maps = {"0": torch.rand(1, 8, 32, 32), "1": torch.rand(1, 8, 16, 16), "pool": torch.rand(1, 8, 8, 8)}
    >>> pooler(maps, [torch.tensor([[0.0, 0.0, 90.0, 60.0]])], [(128, 128)]).shape
    torch.Size([1, 8, 7, 7])
    >>> pooler.scales
    [0.25, 0.125]
    """

    scales: list[float] | None
    # torchvision's LevelMapper, so that restore() gives torchvision's module its own; or a user's.
    map_levels: Any

    def forward(self, x: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Pools the boxes of a batch of images.

        Args:
            x: maps by name, finest first, [N, C, H_l, W_l].
            boxes: per image [L_i, 4], (x1, y1, x2, y2) in image pixels; L_i may be 0.
            image_shapes: (height, width) per image, in pixels. Only the first call uses them.

        Returns:
            [sum of L_i, C, PH, PW], image after image, in the dtype of the finest map.

        Raises:
            ValueError: x has none of featmap_names; image_shapes is empty at the first call; others: the op's.
            TypeError: see the op.
        """
        if recorded(x) or not _POOLING.are_own(self):
            return super().forward(x, boxes, image_shapes)
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"x must have maps of featmap_names {self.featmap_names}, got {list(x)}")
        if self.scales is None or self.map_levels is None:
            if len(image_shapes) == 0:
                raise ValueError("image_shapes must have the (height, width) of each image, got none")
            height = max(shape[0] for shape in image_shapes)
            self.scales = [_nearest_power_of_two(feature.shape[-2], height) for feature in features]
            ends = (_level(self.scales[0]), _level(self.scales[-1]))
            self.map_levels = LevelMapper(*ends, self.canonical_scale, self.canonical_level)
        # The kept scales may be of a pyramid with more or fewer maps.
        scales = self.scales[: len(features)]
        rule = _level_rule(self.map_levels, scales, boxes) if len(features) > 1 else {}
        pooled = ops.multiscale_roi_align(
            features[: len(scales)],
            rois_of_images(boxes),
            self.output_size,
            scales,
            sampling_ratio=self.sampling_ratio,
            **rule,
        )
        # Under autocast maps can differ in dtype: the op promotes them, torchvision returns the first one's.
        return pooled.to(features[0].dtype)


def _level(scale: float) -> int:
    return round(-math.log2(scale))


def _nearest_power_of_two(size: int, whole: float) -> float:
    """2.0 ** round(log2(size / whole)) by comparisons, so that a tracer can keep sizes dynamic."""
    # Floats: the square of a small integer of numpy overflows.
    whole, level = whole * 1.0, 0
    while (size * 2.0**level) ** 2 * 2 < whole**2:
        level += 1
    while (size * 2.0**level) ** 2 > whole**2 * 2:
        level -= 1
    return 2.0**-level


def _level_rule(mapper: Any, scales: Sequence[float], boxes: Sequence[Tensor]) -> dict[str, Any]:
    """Arguments for the op to choose the levels of `mapper`: its constants, or the levels of a custom mapper."""
    ends = (_level(scales[0]), _level(scales[-1]))
    usual = _MAPPER.are_own(mapper) and mapper.eps == 1e-6 and (mapper.k_min, mapper.k_max) == ends
    if usual and len(scales) > 1:
        return {"canonical_scale": mapper.s0, "canonical_level": mapper.lvl0}
    return {"levels": mapper(boxes)}
