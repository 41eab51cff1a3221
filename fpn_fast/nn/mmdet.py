# SPDX-License-Identifier: Apache-2.0
"""mmdetection's SingleRoIExtractor, without mmdetection or mmcv."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import ops

__all__ = ["SingleRoIExtractor"]

#: mmcv.ops.RoIAlign's arguments; spatial_scale is each stride's, and use_torchvision only picks a kernel.
_ROI_ALIGN_DEFAULTS: dict[str, Any] = {
    "spatial_scale": 1.0,
    "sampling_ratio": 0,
    "pool_mode": "avg",
    "aligned": True,
    "use_torchvision": False,
}


class SingleRoIExtractor(nn.Module):
    """Pools RoIs from a pyramid: drop-in for mmdetection's ``SingleRoIExtractor``, which needs not be installed.

    Same constructor, level formula and results, in one call of :func:`fpn_fast.ops.multiscale_roi_align`. It has no
    parameters.

    Two things differ. RoIs stay float32 where features are half precision; mmdetection rounds them to the features'
    type first, in which the area of a RoI of 256x256 pixels is infinite for float16, and so its level the last.
    ``strict=True`` does as mmdetection, but samples in float32 also where mmcv's kernel does so in half precision. And
    roi_scale_factor counts with a single map too, where mmdetection forgets it.

    Args:
        roi_layer: ``dict(type="RoIAlign", output_size=...)`` with the arguments of ``mmcv.ops.RoIAlign`` and their
            defaults; spatial_scale and use_torchvision are ignored.
        out_channels: channels of the maps; kept as an attribute.
        featmap_strides: image pixels per map pixel of each map, finest first.
        finest_scale: RoIs below twice this, the root of the area in pixels, are pooled from the first map, those below
            four times from the second, and so on.
        init_cfg: kept as an attribute; there is nothing to initialise.
        strict: rounds RoIs to the features' type and computes their levels in it.

    Raises:
        ValueError: roi_layer is of another type, has an unknown key or no output_size; pool_mode is neither ``"avg"``
            nor ``"max"``; strides or finest_scale are not positive.

    Source: mmdet/models/roi_heads/roi_extractors/, mmcv/ops/roi_align.py.

    >>> extractor = SingleRoIExtractor(dict(type="RoIAlign", output_size=7, sampling_ratio=0), 8, [4, 8])
    >>> maps = (torch.rand(2, 8, 32, 32), torch.rand(2, 8, 16, 16))
    >>> extractor(maps, torch.tensor([[1.0, 0.0, 0.0, 90.0, 60.0]])).shape
    torch.Size([1, 8, 7, 7])
    """

    def __init__(
        self,
        roi_layer: dict[str, Any],
        out_channels: int,
        featmap_strides: Sequence[float],
        finest_scale: float = 56,
        init_cfg: Any = None,
        *,
        strict: bool = False,
    ) -> None:
        super().__init__()
        if not featmap_strides or not all(stride > 0 for stride in featmap_strides):
            raise ValueError(f"featmap_strides must be positive, got {list(featmap_strides)}")
        if not finest_scale > 0:
            raise ValueError(f"finest_scale must be a positive number of pixels, got {finest_scale}")
        self.roi_layer = _roi_align_options(roi_layer)
        self.out_channels = out_channels
        self.featmap_strides = featmap_strides
        self.finest_scale = finest_scale
        self.init_cfg = init_cfg
        self.strict = strict

    @property
    def num_inputs(self) -> int:
        """How many maps are pooled from."""
        return len(self.featmap_strides)

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools the RoIs of a batch of images.

        Args:
            feats: maps [N, C, H_l, W_l], finest first; those after the first num_inputs are not used.
            rois: [K, 5] (image, x1, y1, x2, y2), the image's index in the batch and corners in image pixels.
            roi_scale_factor: RoIs are made larger by this, around their centres, once their levels are known.

        Returns:
            [K, C, PH, PW] in the features' type.

        Raises:
            ValueError: feats is empty; others: the op's.
            TypeError: see the op.
        """
        feats = list(feats[: self.num_inputs])
        if not feats:
            raise ValueError("feats must hold at least one map, got an empty sequence")
        scales = [1 / stride for stride in self.featmap_strides[: len(feats)]]
        rule: dict[str, Any] = {"canonical_scale": self.finest_scale, "canonical_level": 2, "level_formula": "mmdet"}
        if self.strict:
            rois = rois.to(feats[0].dtype)
        if len(feats) > 1 and self.strict:
            rule = {"levels": self._levels_in_the_type_of(rois, len(feats))}
        elif len(feats) > 1 and roi_scale_factor is not None:
            # The level is that of the RoI before it grows.
            rule = {"levels": ops.assign_levels(rois, scales, **rule)}
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        return ops.multiscale_roi_align(
            feats,
            rois,
            self.roi_layer["output_size"],
            scales,
            sampling_ratio=self.roi_layer["sampling_ratio"],
            aligned=self.roi_layer["aligned"],
            pool_mode=self.roi_layer["pool_mode"],
            **rule,
        )

    def roi_rescale(self, rois: Tensor, scale_factor: float) -> Tensor:
        """[K, 5] -> [K, 5]: the RoIs scale_factor times as wide and high, with the centres that they had."""
        image, x1, y1, x2, y2 = rois.unbind(1)
        half_width, half_height = (x2 - x1) * scale_factor * 0.5, (y2 - y1) * scale_factor * 0.5
        x, y = (x1 + x2) * 0.5, (y1 + y2) * 0.5
        return torch.stack([image, x - half_width, y - half_height, x + half_width, y + half_height], 1)

    def _levels_in_the_type_of(self, rois: Tensor, maps: int) -> Tensor:
        """The levels [K] that mmdetection gives to `rois`, computed in their type, overflow and all; -1: none."""
        scale = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        levels = torch.floor(torch.log2(scale / self.finest_scale + 1e-6)).clamp(0, maps - 1)
        return levels.nan_to_num(nan=-1).long()

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.roi_layer.items())
        return (
            f"roi_layer=dict({options}), out_channels={self.out_channels}, "
            f"featmap_strides={list(self.featmap_strides)}, finest_scale={self.finest_scale}, strict={self.strict}"
        )


def _roi_align_options(roi_layer: dict[str, Any]) -> dict[str, Any]:
    """`roi_layer` with defaults filled in, checked."""
    options = dict(roi_layer)
    kind = options.pop("type", None)
    if kind != "RoIAlign":
        raise ValueError(f"roi_layer must be of type 'RoIAlign', got {kind!r}")
    unknown = options.keys() - _ROI_ALIGN_DEFAULTS.keys() - {"output_size"}
    if unknown:
        raise ValueError(f"roi_layer has unknown keys {', '.join(sorted(unknown))}")
    if "output_size" not in options:
        raise ValueError(f"roi_layer must have an output_size, got {roi_layer}")
    options = {**_ROI_ALIGN_DEFAULTS, **options}
    if options["pool_mode"] not in ("avg", "max"):
        raise ValueError(f"pool_mode must be 'avg' or 'max', got {options['pool_mode']!r}")
    return options
