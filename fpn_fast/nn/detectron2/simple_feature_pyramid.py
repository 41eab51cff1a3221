# SPDX-License-Identifier: Apache-2.0
"""ViTDet's pyramid of one map, as in detectron2."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fpn_fast.nn._pyramid import ChannelNorm, Deconvolution
from fpn_fast.nn.detectron2.fpn import ConvWithNorm, ShapeSpec, levels_of, norm_maker

__all__ = ["SimpleFeaturePyramid"]

NormChoice = str | Callable[[int], nn.Module]


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's pyramid (Li et al., 2022): drop-in for detectron2's ``SimpleFeaturePyramid``.

    Constructor, ``state_dict`` keys and outputs are detectron2's. All levels are made of the last map of a plain
    backbone: deconvolutions for the finer ones, max pooling for the coarser one.

    Args:
        net: the backbone: a module that returns a dict of maps, with an ``output_shape()``, see :class:`FPN`.
        in_feature: name of the map to use.
        out_channels: channels of every output.
        scale_factors: of each output to the map, finest first: 4.0, 2.0, 1.0 or 0.5, each half the one before.
        top_block: makes coarser maps of the last output, see :class:`FPN`. Default: none.
        norm: ``"LN"`` for a layer norm over channels; others: see :class:`FPN`. 1x1 and 3x3 convolutions have a bias
            only for ``""``.
        square_pad: the side to which images are padded, for ``padding_constraints``. Default: 0, for none.

    Raises:
        ValueError: a scale factor or norm is none of these; the strides are no powers of two, each twice the last.

    Source: detectron2/modeling/backbone/vit.py.

    >>> import torch
    >>> class Backbone(nn.Module):
    ...     def output_shape(self):
    ...         return {"last": ShapeSpec(channels=8, stride=16)}
    ...     def forward(self, x):
    ...         return {"last": x[:, :1, ::16, ::16].expand(-1, 8, -1, -1)}
    >>> pyramid = SimpleFeaturePyramid(Backbone(), "last", 6, [4.0, 2.0, 1.0, 0.5])
    >>> {name: tuple(map.shape) for name, map in pyramid(torch.rand(1, 3, 32, 64)).items()}
    {'p2': (1, 6, 8, 16), 'p3': (1, 6, 4, 8), 'p4': (1, 6, 2, 4), 'p5': (1, 6, 1, 2)}
    """

    def __init__(
        self,
        net: nn.Module,
        in_feature: str,
        out_channels: int,
        scale_factors: Sequence[float],
        top_block: Any = None,
        norm: NormChoice = "LN",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        if (theirs := sys.modules.get("detectron2.modeling.backbone")) is not None:
            # An abstract base class, which takes classes that do not derive from it.
            theirs.Backbone.register(SimpleFeaturePyramid)
        shape = net.output_shape()[in_feature]  # type: ignore[operator]
        strides = [int(shape.stride / scale) for scale in scale_factors]
        levels = levels_of(strides)
        made: NormChoice = ChannelNorm if norm == "LN" else norm
        # Like detectron2, the module has the stages in this list in addition to the names below.
        self.stages = []
        for level, scale in zip(levels, scale_factors, strict=True):
            layers, channels = _resampling(scale, shape.channels, made)
            layers += [ConvWithNorm(channels, out_channels, 1, made), ConvWithNorm(out_channels, out_channels, 3, made)]
            self.stages.append(nn.Sequential(*layers))
            self.add_module(f"simfp_{level}", self.stages[-1])
        self.net = net
        self.in_feature = in_feature
        self.top_block = top_block
        self.scale_factors = scale_factors
        extra = 0 if top_block is None else top_block.num_levels
        self._out_feature_strides = {f"p{level}": 2**level for level in range(levels[0], levels[-1] + 1 + extra)}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = strides[-1]
        self._square_pad = square_pad

    @property
    def size_divisibility(self) -> int:
        """The height and width of images must be multiples of this, in pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """{"size_divisiblity": see above, in detectron2's spelling; "square_size": side to which images are padded}"""
        return {"size_divisiblity": self._size_divisibility, "square_size": self._square_pad}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output, by name."""
        return {
            name: ShapeSpec(self._out_feature_channels[name], self._out_feature_strides[name])
            for name in self._out_features
        }

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the pyramid of a batch of images.

        Args:
            x: [N, 3, H, W], with H and W multiples of ``size_divisibility``.

        Returns:
            {"p{s}": [N, out_channels, H / 2**s, W / 2**s]}, finest first; the top block's maps come last.
        """
        maps = self.net(x)
        results = [stage(maps[self.in_feature]) for stage in self.stages]
        if self.top_block is not None:
            name = self.top_block.in_feature
            results += self.top_block(maps[name] if name in maps else results[self._out_features.index(name)])
        return dict(zip(self._out_features, results, strict=True))


def _resampling(scale: float, channels: int, norm: NormChoice) -> tuple[list[nn.Module], int]:
    """(layers that resample by `scale`, channels after them)"""
    if scale == 4.0:
        half, quarter = channels // 2, channels // 4
        # Without a norm detectron2 has nothing in this place, where its forward pass fails; the numbers stay.
        between = nn.Identity() if norm == "" else norm_maker(norm)(half)
        return [
            Deconvolution(channels, half), between, nn.GELU(), Deconvolution(half, quarter),
        ], quarter  # fmt: skip
    if scale == 2.0:
        return [Deconvolution(channels, channels // 2)], channels // 2
    if scale == 1.0:
        return [], channels
    if scale == 0.5:
        return [nn.MaxPool2d(2, 2)], channels
    raise ValueError(f"scale_factors must be 4.0, 2.0, 1.0 or 0.5, got {scale}")
