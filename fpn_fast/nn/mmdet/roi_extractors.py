# SPDX-License-Identifier: Apache-2.0
"""mmdetection's RoI extractors."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import ops

__all__ = ["GenericRoIExtractor", "SingleRoIExtractor"]

#: Arguments of mmcv.ops.RoIAlign. The stride replaces spatial_scale; use_torchvision only chooses a kernel.
_ROI_ALIGN_DEFAULTS: dict[str, Any] = {
    "spatial_scale": 1.0,
    "sampling_ratio": 0,
    "pool_mode": "avg",
    "aligned": True,
    "use_torchvision": False,
}

#: The arguments that change the output.
LAYER_KEYS = ("output_size", "sampling_ratio", "pool_mode", "aligned")


class ExtractorForward:
    """The steps that both extractors share, for our modules and for mmdetection's."""

    featmap_strides: Sequence[float]

    # output_size, sampling_ratio, pool_mode and aligned of the RoIAlign of all maps.
    _layer: Callable[[], dict[str, Any]]

    @property
    def num_inputs(self) -> int:
        """The number of maps that are pooled."""
        return len(self.featmap_strides)

    def roi_rescale(self, rois: Tensor, scale_factor: float) -> Tensor:
        """RoIs [K, 5] -> [K, 5], with width and height multiplied by scale_factor around the same centres."""
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
    """The constructor that both extractors share. They have no parameters."""

    def __init__(
        self,
        roi_layer: dict[str, Any],
        out_channels: int,
        featmap_strides: Sequence[float],
        init_cfg: Any = None,
    ) -> None:
        super().__init__()
        if len(featmap_strides) == 0 or not all(stride > 0 for stride in featmap_strides):
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
    """The forward pass of SingleRoIExtractor."""

    finest_scale: float
    strict: bool

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools the RoIs of a batch of images.

        Args:
            feats: maps [N, C, H_l, W_l], finest first. Only the first num_inputs are used.
            rois: [K, 5] (image, x1, y1, x2, y2): index in the batch, and corners in image pixels.
            roi_scale_factor: enlarges RoIs around their centres, after their levels are assigned. Default: 1.

        Returns:
            [K, C, PH, PW] in the features' dtype.

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
            # mmdetection assigns levels before it enlarges the RoIs.
            rule = {"levels": ops.assign_levels(rois, [1 / stride for stride in strides], **rule)}
        if roi_scale_factor is not None:
            rois = self.roi_rescale(rois, roi_scale_factor)
        return self._pool(maps, rois, strides, **rule)

    def _levels_in_the_type_of(self, rois: Tensor, maps: int) -> Tensor:
        """mmdetection's levels [K], computed in the dtype of `rois` with its overflow; -1 for no level."""
        scale = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        levels = torch.floor(torch.log2(scale / self.finest_scale + 1e-6)).clamp(0, maps - 1)
        return levels.nan_to_num(nan=-1).long()


class SingleRoIExtractor(SingleForward, RoIExtractor):
    """RoIAlign from the pyramid level that fits each RoI: drop-in for mmdetection's ``SingleRoIExtractor``.

    Constructor, level formula and output are mmdetection's, computed by one call of
    :func:`fpn_fast.ops.multiscale_roi_align`. The module has no parameters.

    Note:
        RoIs stay float32 for half-precision features. mmdetection rounds them to the features' dtype first; in float16
        the area of a RoI of 256x256 pixels overflows, which sends it to the last level. ``strict=True`` rounds like
        mmdetection, and samples in float32 like this library always does. roi_scale_factor also applies to a single
        map, where mmdetection ignores it.

    Args:
        roi_layer: ``dict(type="RoIAlign", output_size=...)`` with the arguments of ``mmcv.ops.RoIAlign`` and their
            defaults. spatial_scale and use_torchvision are ignored.
        out_channels: channels of the maps, kept as an attribute.
        featmap_strides: image pixels per map pixel, one per map, finest first.
        finest_scale: the first map serves RoIs whose square root of the area is below twice this, in pixels; the second
            serves those below four times this, and so on. Default: 56.
        init_cfg: kept as an attribute. The module has nothing to initialise.
        strict: whether RoIs are rounded to the features' dtype, and their levels computed in it.

    Raises:
        ValueError: roi_layer has another type, an unknown key or no output_size; pool_mode is neither ``"avg"`` nor
            ``"max"``; a stride or finest_scale is not positive.

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

    def map_roi_levels(self, rois: Tensor, num_levels: int) -> Tensor:
        """RoIs [K, 5] -> the map of each, [K] int64 from 0 to num_levels - 1, in float32; -1 for none."""
        scales = [1 / stride for stride in self.featmap_strides[:num_levels]]
        rule: dict[str, Any] = {"canonical_scale": self.finest_scale, "canonical_level": 2, "level_formula": "mmdet"}
        return ops.assign_levels(rois, scales, **rule)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, finest_scale={self.finest_scale}, strict={self.strict}"


class GenericForward(ExtractorForward):
    """The forward pass of GenericRoIExtractor."""

    out_channels: int
    aggregation: str

    def forward(self, feats: Sequence[Tensor], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Pools every RoI from every map; arguments: see :meth:`SingleRoIExtractor.forward`.

        Returns:
            [K, out_channels, PH, PW] in the features' dtype.

        Raises:
            ValueError: feats is empty, or its channels differ from out_channels: those of each map for "sum", those of
                all maps together for "concat"; others: the op's.
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
    """Pools RoIs from all maps (GRoIE, Rossi et al., 2020): drop-in for mmdetection's ``GenericRoIExtractor``.

    Constructor and output are mmdetection's, computed by one call of :func:`fpn_fast.ops.multiscale_roi_align` per map.

    Note:
        RoIs stay float32 for half-precision features. roi_scale_factor also applies to a single map, where mmdetection
        ignores it.

    Args:
        aggregation: ``"sum"`` over the maps, or ``"concat"`` of their channels.
        pre_cfg, post_cfg: must be None; mmcv's plugins are not supported.
        roi_layer, out_channels, featmap_strides, init_cfg: see :class:`SingleRoIExtractor`.

    Raises:
        ValueError: aggregation is unknown; pre_cfg or post_cfg is given; others: see :class:`SingleRoIExtractor`.

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
                raise ValueError(f"{name} must be None: mmcv's plugins are not supported, got {plugin}")
        self.aggregation = aggregation

    def extra_repr(self) -> str:
        return f"aggregation={self.aggregation!r}, {super().extra_repr()}"


def roi_align_options(roi_layer: dict[str, Any]) -> dict[str, Any]:
    """`roi_layer` with its defaults filled in. Raises ValueError for what RoIAlign does not have."""
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
