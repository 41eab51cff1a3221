# SPDX-License-Identifier: Apache-2.0
"""Base classes for machines without torchvision, with torchvision's keys, initialisation and attributes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.nn._shared import initialise
from fpn_fast.ops._checks import as_pair
from fpn_fast.ops.multiscale_roi_align import rois_of_images

_NOT_RECORDED = "torch.jit.trace and torch.fx record torchvision's RoIAlign, and torchvision is not installed"


class ExtraFPNBlock(nn.Module):
    """Base class of modules that append coarser maps to a pyramid's outputs."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        """results: the pyramid's outputs, finest first; x: its inputs; names: of results. Returns (results, names)."""
        raise TypeError(f"{type(self).__name__} must define forward(results, x, names)")


class LastLevelMaxPool(ExtraFPNBlock):
    """Appends every second pixel of the coarsest output, under the name "pool"."""

    def forward(self, results: list[Tensor], x: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        pooled = F.max_pool2d(results[-1], kernel_size=1, stride=2, padding=0)
        return [*results, pooled], [*names, "pool"]


class LastLevelP6P7(ExtraFPNBlock):
    """RetinaNet's P6 and P7: strided 3x3 convolutions of P5 if in_channels equals out_channels, otherwise of C5."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        initialise(self)
        self.use_P5 = in_channels == out_channels

    def forward(self, p: list[Tensor], c: list[Tensor], names: list[str]) -> tuple[list[Tensor], list[str]]:
        p6 = self.p6((p if self.use_P5 else c)[-1])
        p7 = self.p7(F.relu(p6))
        return [*p, p6, p7], [*names, "p6", "p7"]


def _block(
    in_channels: int, out_channels: int, kernel_size: int, norm_layer: Callable[..., nn.Module] | None
) -> nn.Sequential:
    convolution = nn.Conv2d(
        in_channels, out_channels, kernel_size, padding=(kernel_size - 1) // 2, bias=norm_layer is None
    )
    return nn.Sequential(convolution) if norm_layer is None else nn.Sequential(convolution, norm_layer(out_channels))


class FeaturePyramidNetwork(nn.Module):
    """The parameters of a feature pyramid; fpn_fast.nn.FeaturePyramidNetwork adds forward()."""

    _version = 2

    def __init__(
        self,
        in_channels_list: list[int],
        out_channels: int,
        extra_blocks: ExtraFPNBlock | None = None,
        norm_layer: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList()
        self.layer_blocks = nn.ModuleList()
        for in_channels in in_channels_list:
            if in_channels == 0:
                raise ValueError("in_channels=0 is currently not supported")
            self.inner_blocks.append(_block(in_channels, out_channels, 1, norm_layer))
            self.layer_blocks.append(_block(out_channels, out_channels, 3, norm_layer))
        # Before the extra blocks are attached: those initialise themselves.
        initialise(self)
        if extra_blocks is not None and not isinstance(extra_blocks, ExtraFPNBlock):
            raise TypeError(f"extra_blocks must be an ExtraFPNBlock, got {type(extra_blocks).__name__}")
        self.extra_blocks = extra_blocks

    def _load_from_state_dict(
        self, state_dict: dict[str, Tensor], prefix: str, local_metadata: dict[str, Any], *arguments: Any
    ) -> None:
        if (local_metadata.get("version") or 0) < 2:
            # Version 1 held bare convolutions; version 2 wraps each in a Sequential.
            for blocks in ("inner_blocks", "layer_blocks"):
                for i in range(len(self.inner_blocks)):
                    for name in ("weight", "bias"):
                        old = f"{prefix}{blocks}.{i}.{name}"
                        if old in state_dict:
                            state_dict[f"{prefix}{blocks}.{i}.0.{name}"] = state_dict.pop(old)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *arguments)


class RoIAlign(nn.Module):
    """The arguments of a RoIAlign; fpn_fast.nn.RoIAlign adds forward()."""

    def __init__(
        self, output_size: int | tuple[int, int], spatial_scale: float, sampling_ratio: int, aligned: bool = False
    ) -> None:
        super().__init__()
        self.output_size = output_size
        self.spatial_scale = spatial_scale
        self.sampling_ratio = sampling_ratio
        self.aligned = aligned

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError(_NOT_RECORDED)

    def extra_repr(self) -> str:
        names = "output_size", "spatial_scale", "sampling_ratio", "aligned"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)


class LevelMapper:
    """Assigns boxes to the pyramid levels k_min to k_max. eps is torchvision's default and fixed."""

    eps = 1e-6

    def __init__(self, k_min: int, k_max: int, canonical_scale: int = 224, canonical_level: int = 4) -> None:
        self.k_min = k_min
        self.k_max = k_max
        self.s0 = canonical_scale
        self.lvl0 = canonical_level

    def __call__(self, boxlists: Sequence[Tensor]) -> Tensor:
        """[L_i, 4] per image -> [sum of L_i] int64, 0 for level k_min."""
        scales = [2.0**-level for level in range(self.k_min, self.k_max + 1)]
        rois = rois_of_images(boxlists)
        return ops.assign_levels(rois, scales, canonical_scale=self.s0, canonical_level=self.lvl0)


class MultiScaleRoIAlign(nn.Module):
    """The arguments and state of a pooler; fpn_fast.nn.MultiScaleRoIAlign adds forward()."""

    def __init__(
        self,
        featmap_names: list[str],
        output_size: int | tuple[int, int] | list[int],
        sampling_ratio: int,
        *,
        canonical_scale: int = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = featmap_names
        self.sampling_ratio = sampling_ratio
        self.output_size = as_pair("output_size", output_size)
        self.scales: list[float] | None = None
        self.map_levels: LevelMapper | None = None
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(self, *_: Any) -> Tensor:
        raise RuntimeError(_NOT_RECORDED)

    def extra_repr(self) -> str:
        names = "featmap_names", "output_size", "sampling_ratio"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
