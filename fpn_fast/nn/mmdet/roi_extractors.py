# SPDX-License-Identifier: Apache-2.0
"""mmdetection's RoI extractors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import ops

__all__ = ["GenericRoIExtractor", "SingleRoIExtractor"]

#: mmcv.ops.RoIAlign's arguments; spatial_scale is each stride's, and use_torchvision only picks a kernel.
_ROI_ALIGN_DEFAULTS: dict[str, Any] = {
    "spatial_scale": 1.0,
    "sampling_ratio": 0,
    "pool_mode": "avg",
    "aligned": True,
    "use_torchvision": False,
}


#: Those of them that change what is pooled.
LAYER_KEYS = ("output_size", "sampling_ratio", "pool_mode", "aligned")


class ExtractorForward:
    """What both extractors share, of our modules and of mmdetection's own."""

    featmap_strides: Sequence[float]

    def _layer(self) -> dict[str, Any]:
        """output_size, sampling_ratio, pool_mode and aligned of every map's RoIAlign."""
        raise NotImplementedError

    @property
    def num_inputs(self) -> int:
        """How many maps are pooled from."""
        return len(self.featmap_strides)

    def roi_rescale(self, rois: Tensor, scale_factor: float) -> Tensor:
        """[K, 5] -> [K, 5]: the RoIs scale_factor times as wide and high, with the centres that they had."""
        image, x1, y1, x2, y2 = rois.unbind(1)
        half_width, half_height = (x2 - x1) * scale_factor * 0.5, (y2 - y1) * scale_factor * 0.5
        x, y = (x1 + x2) * 0.5, (y1 + y2) * 0.5
        return torch.stack([image, x - half_width, y - half_height, x + half_width, y + half_height], 1)

    def _pool(self, maps: Sequence[Tensor], rois: Tensor, strides: Sequence[float], **rule: Any) -> Tensor:
        scales = [1 / stride for stride in strides]
        return ops.multiscale_roi_align(maps, rois, scales=scales, **self._layer(), **rule)

    def _maps_of(self, feats: Sequence[Tensor]) -> list[Tensor]:
        if len(feats) == 0:
            raise ValueError("feats must hold at least one map, got an empty sequence")
        return list(feats[: self.num_inputs])


class RoIExtractor(ExtractorForward, nn.Module):
    """The arguments that both extractors take; they have no parameters."""

    def __init__(
        self,
        roi_layer: dict[str, Any],
        out_channels: int,
        featmap_strides: Sequence[float],
        init_cfg: Any = None,
    ) -> None:
        super().__init__()
        if not featmap_strides or not all(stride > 0 for stride in featmap_strides):
            raise ValueError(f"featmap_strides must be positive, got {list(featmap_strides)}")
        self.roi_layer = roi_align_options(roi_layer)
        self.out_channels = out_channels
        self.featmap_strides = featmap_strides
        self.init_cfg = init_cfg

    def _layer(self) -> dict[str, Any]:
        return {key: self.roi_layer[key] for key in LAYER_KEYS}

    def extra_repr(self) -> str:
        options = ", ".join(f"{key}={value!r}" for key, value in self.roi_layer.items())
        strides = list(self.featmap_strides)
        return f"roi_layer=dict({options}), out_channels={self.out_channels}, featmap_strides={strides}"


class SingleForward(ExtractorForward):
    """What SingleRoIExtractor computes."""

    finest_scale: float
    strict: bool

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
        maps = self._maps_of(feats)
        strides = self.featmap_strides[: len(maps)]
        rule: dict[str, Any] = {"canonical_scale": self.finest_scale, "canonical_level": 2, "level_formula": "mmdet"}
        if self.strict:
            rois = rois.to(maps[0].dtype)
        if len(maps) > 1 and self.strict:
            rule = {"levels": self._levels_in_the_type_of(rois, len(maps))}
        elif len(maps) > 1 and roi_scale_factor is not None:
            # The level is that of the RoI before it grows.
            rule = {"levels": ops.assign_levels(rois, [1 / stride for stride in strides], **rule)}
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        return self._pool(maps, rois, strides, **rule)

    def _levels_in_the_type_of(self, rois: Tensor, maps: int) -> Tensor:
        """The levels [K] that mmdetection gives to `rois`, computed in their type, overflow and all; -1: none."""
        scale = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        levels = torch.floor(torch.log2(scale / self.finest_scale + 1e-6)).clamp(0, maps - 1)
        return levels.nan_to_num(nan=-1).long()


class SingleRoIExtractor(SingleForward, RoIExtractor):
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
        super().__init__(roi_layer, out_channels, featmap_strides, init_cfg)
        if not finest_scale > 0:
            raise ValueError(f"finest_scale must be a positive number of pixels, got {finest_scale}")
        self.finest_scale = finest_scale
        self.strict = strict

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, finest_scale={self.finest_scale}, strict={self.strict}"


class GenericForward(ExtractorForward):
    """What GenericRoIExtractor computes."""

    out_channels: int
    aggregation: str

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools every RoI from every map.

        Args:
            feats: maps [N, C, H_l, W_l], finest first; those after the first num_inputs are not used.
            rois: [K, 5] (image, x1, y1, x2, y2), the image's index in the batch and corners in image pixels.
            roi_scale_factor: RoIs are made larger by this, around their centres.

        Returns:
            [K, out_channels, PH, PW] in the features' type.

        Raises:
            ValueError: feats is empty, or has not out_channels channels: each map for "sum", all together for "concat";
                others: the op's.
            TypeError: see the op.
        """
        maps = self._maps_of(feats)
        channels = sum(map.size(1) for map in maps) if self.aggregation == "concat" else maps[0].size(1)
        if channels != self.out_channels:
            raise ValueError(f"feats must have out_channels {self.out_channels} channels, got {channels}")
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        pooled = [self._pool([map], rois, [stride]) for map, stride in zip(maps, self.featmap_strides, strict=False)]
        return torch.cat(pooled, 1) if self.aggregation == "concat" else functools.reduce(torch.add, pooled)


class GenericRoIExtractor(GenericForward, RoIExtractor):
    """Pools RoIs from all maps of a pyramid (GRoIE, Rossi et al., 2020): drop-in for mmdetection's
    ``GenericRoIExtractor``, which needs not be installed.

    Same constructor and results, in one call of :func:`fpn_fast.ops.multiscale_roi_align` for each map. RoIs stay
    float32 where features are half precision; and roi_scale_factor counts with a single map too, where mmdetection
    forgets it.

    Args:
        aggregation: ``"sum"``, or ``"concat"`` for all maps' channels one after the other.
        pre_cfg, post_cfg: must be None: mmcv's plugins have no form here.
        roi_layer, out_channels, featmap_strides, init_cfg: as of :class:`SingleRoIExtractor`.

    Raises:
        ValueError: another aggregation; pre_cfg or post_cfg; roi_layer or strides as of :class:`SingleRoIExtractor`.

    Source: mmdet/models/roi_heads/roi_extractors/generic_roi_extractor.py.

    >>> layer = dict(type="RoIAlign", output_size=7, sampling_ratio=2)
    >>> extractor = GenericRoIExtractor("concat", roi_layer=layer, out_channels=16, featmap_strides=[4, 8])
    >>> maps = (torch.rand(2, 8, 32, 32), torch.rand(2, 8, 16, 16))
    >>> extractor(maps, torch.tensor([[1.0, 0.0, 0.0, 90.0, 60.0]])).shape
    torch.Size([1, 16, 7, 7])
    """

    def __init__(
        self,
        aggregation: str = "sum",
        pre_cfg: None = None,
        post_cfg: None = None,
        *,
        roi_layer: dict[str, Any],
        out_channels: int,
        featmap_strides: Sequence[float],
        init_cfg: Any = None,
    ) -> None:
        super().__init__(roi_layer, out_channels, featmap_strides, init_cfg)
        if aggregation not in ("sum", "concat"):
            raise ValueError(f"aggregation must be 'sum' or 'concat', got {aggregation!r}")
        for name, plugin in (("pre_cfg", pre_cfg), ("post_cfg", post_cfg)):
            if plugin is not None:
                raise ValueError(f"{name} must be None: mmcv's plugins have no form here, got {plugin}")
        self.aggregation = aggregation

    def extra_repr(self) -> str:
        return f"aggregation={self.aggregation!r}, {super().extra_repr()}"


def roi_align_options(roi_layer: dict[str, Any]) -> dict[str, Any]:
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
