# SPDX-License-Identifier: Apache-2.0
"""torchvision's RoI pooling modules, with all levels of a pyramid pooled in one call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fpn_fast import ops
from fpn_fast.ops.multiscale_roi_align import rois_of_images

try:
    # torchvision's models check isinstance: where it is installed its classes are the base.
    from torchvision.ops import MultiScaleRoIAlign as _MultiScaleBase
    from torchvision.ops import RoIAlign as _RoIAlignBase
    from torchvision.ops.poolers import LevelMapper
except ImportError:
    from fpn_fast.nn._standalone import LevelMapper
    from fpn_fast.nn._standalone import MultiScaleRoIAlign as _MultiScaleBase
    from fpn_fast.nn._standalone import RoIAlign as _RoIAlignBase

__all__ = ["MultiScaleRoIAlign", "RoIAlign"]


class RoIAlign(_RoIAlignBase):
    """RoIAlign of one map (He et al., 2017): drop-in for :class:`torchvision.ops.RoIAlign`.

    Same constructor and results, by :func:`fpn_fast.ops.roi_align`; a subclass of torchvision's where torchvision is
    installed. Boxes stay float32 where the map is half precision, which may be bfloat16.

    Args:
        output_size: bins along each axis, (PH, PW) or one number for both.
        spatial_scale: map pixels per unit of the boxes.
        sampling_ratio: samples along each axis of a bin; 0 or less: one for each pixel of the bin, rounded up.
        aligned: whether pixel centres lie at half-integers.

    >>> import torch
    >>> RoIAlign(7, 0.25, 2)(torch.rand(2, 8, 16, 16), torch.tensor([[1.0, 4.0, 4.0, 40.0, 60.0]])).shape
    torch.Size([1, 8, 7, 7])
    """

    def forward(self, input: Tensor, rois: Tensor | Sequence[Tensor]) -> Tensor:
        """[N, C, H, W], and [K, 5] (image, x1, y1, x2, y2) or N tensors [L, 4] -> [K, C, PH, PW]; errors: the op's."""
        return ops.roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class MultiScaleRoIAlign(_MultiScaleBase):
    """RoIAlign from the pyramid level that fits each box: drop-in for :class:`torchvision.ops.MultiScaleRoIAlign`.

    Same constructor and results, by one call of :func:`fpn_fast.ops.multiscale_roi_align`, which never waits for a GPU.
    Boxes stay float32 and features in their own type, also under autocast. A subclass of torchvision's where
    torchvision is installed. As there, the first call infers the maps' scales and keeps them, in ``scales`` and
    ``map_levels``: a later call with another pyramid still uses these.

    Levels are decided in float32, for float64 boxes too. A pyramid that is not finest first, for which torchvision
    gives zeros, raises.

    Args:
        featmap_names: the maps to pool from; they are taken in the order in which forward's dict has them.
        output_size: bins along each axis, (PH, PW) or one number for both.
        sampling_ratio: samples along each axis of a bin; 0 or less: one for each pixel of the bin, rounded up.
        canonical_scale, canonical_level: a box of canonical_scale**2 pixels is pooled from the map whose stride is
            2**canonical_level.

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
    # torchvision's LevelMapper, so that a module swapped back finds its own; or whatever a user put there.
    map_levels: Any

    def forward(self, x: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> Tensor:
        """Pools the boxes of a batch of images.

        Args:
            x: maps by name, finest first, [N, C, H_l, W_l].
            boxes: for each of the N images [L_i, 4], (x1, y1, x2, y2) in image pixels; L_i may be 0.
            image_shapes: (height, width) of each image, in pixels; only the first call looks at them.

        Returns:
            [sum of L_i, C, PH, PW], the images' boxes one after the other, in the type of the finest map.

        Raises:
            ValueError: x has none of featmap_names; image_shapes is empty at the first call; others: the op's.
            TypeError: see the op.
        """
        features = [feature for name, feature in x.items() if name in self.featmap_names]
        if not features:
            raise ValueError(f"x must have maps of featmap_names {self.featmap_names}, got {list(x)}")
        if self.scales is None or self.map_levels is None:
            self.scales = _infer_scales(features, image_shapes)
            ends = (_level(self.scales[0]), _level(self.scales[-1]))
            self.map_levels = LevelMapper(*ends, self.canonical_scale, self.canonical_level)
        # Scales may have been kept from a pyramid with more or fewer maps.
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
        # Autocast may have given the maps several types: the op promotes, torchvision takes the first one's.
        return pooled.to(features[0].dtype)


def _level(scale: float) -> int:
    return round(-math.log2(scale))


def _infer_scales(features: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]) -> list[float]:
    """The power of two nearest to each map's height as a share of the highest image's."""
    if not image_shapes:
        raise ValueError("image_shapes must have the (height, width) of each image, got none")
    height = max(shape[0] for shape in image_shapes)
    return [_nearest_power_of_two(feature.shape[-2], height) for feature in features]


def _nearest_power_of_two(size: int, whole: int) -> float:
    """2.0 ** round(log2(size / whole)), by comparisons alone: a tracer need not fix sizes that vary."""
    level = 0
    while size**2 * 4.0**level * 2 < whole**2:
        level += 1
    while size**2 * 4.0**level > whole**2 * 2:
        level -= 1
    return 2.0**-level


def _level_rule(mapper: Any, scales: Sequence[float], boxes: Sequence[Tensor]) -> dict[str, Any]:
    """What makes the op choose levels as `mapper` does: its constants, or where it is an unusual one, its choice."""
    ends = (_level(scales[0]), _level(scales[-1]))
    usual = type(mapper) is LevelMapper and mapper.eps == 1e-6 and (mapper.k_min, mapper.k_max) == ends
    if usual and len(scales) > 1:
        return {"canonical_scale": mapper.s0, "canonical_level": mapper.lvl0}
    return {"levels": mapper(boxes)}
