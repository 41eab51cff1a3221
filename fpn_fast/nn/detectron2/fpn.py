# SPDX-License-Identifier: Apache-2.0
"""detectron2's FPN, over any backbone with an output_shape()."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast.nn._shared import initialise, merge_pyramid

__all__ = ["FPN", "LastLevelMaxPool", "LastLevelP6P7", "ShapeSpec"]

#: `norm` by name: number of channels -> layer.
_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "GN": lambda channels: nn.GroupNorm(32, channels),
}


class ShapeSpec(NamedTuple):
    """Channels, stride, and the size where it is known, of a map; stands in for detectron2's ShapeSpec."""

    channels: int
    stride: int
    height: int | None = None
    width: int | None = None


class ConvWithNorm(nn.Conv2d):
    """A convolution, its normalisation and ReLU if `relu`, with detectron2's keys: `weight`, `bias`, `norm.weight`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        norm: str | Callable[[int], nn.Module] | None,
        relu: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=norm == "")
        self.norm = None if norm is None or norm == "" else norm_maker(norm)(out_channels)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """[N, in_channels, H, W] -> [N, out_channels, H, W]"""
        convolved = super().forward(input)
        normed = convolved if self.norm is None else self.norm(convolved)
        return F.relu(normed) if self.relu else normed


def norm_maker(norm: str | Callable[[int], nn.Module]) -> Callable[[int], nn.Module]:
    """`norm` as a function of a number of channels; raises ValueError for an unknown name."""
    if not isinstance(norm, str):
        return norm
    if norm not in _NORMS:
        raise ValueError(f"norm must be '', {', '.join(_NORMS)} or a function of the channels, got {norm!r}")
    return _NORMS[norm]


class LastLevelMaxPool(nn.Module):
    """P6 as every second pixel of P5: detectron2's top block for Faster R-CNN."""

    def __init__(self) -> None:
        super().__init__()
        self.num_levels = 1
        self.in_feature = "p5"

    def forward(self, x: Tensor) -> list[Tensor]:
        """[N, C, H, W] -> [one map of half the height and width]"""
        return [F.max_pool2d(x, kernel_size=1, stride=2, padding=0)]


class LastLevelP6P7(nn.Module):
    """P6 and P7 by strided 3x3 convolutions: detectron2's top block for RetinaNet.

    Args:
        in_channels: channels of the map named `in_feature`.
        out_channels: channels of P6 and P7.
        in_feature: name of the input, a map of the backbone or of the pyramid. Default: "res5".
    """

    def __init__(self, in_channels: int, out_channels: int, in_feature: str = "res5") -> None:
        super().__init__()
        self.num_levels = 2
        self.in_feature = in_feature
        self.p6 = nn.Conv2d(in_channels, out_channels, 3, 2, 1)
        self.p7 = nn.Conv2d(out_channels, out_channels, 3, 2, 1)
        initialise(self)

    def forward(self, c5: Tensor) -> list[Tensor]:
        """[N, in_channels, H, W] -> maps of half and a quarter of the height and width."""
        p6 = self.p6(c5)
        return [p6, self.p7(F.relu(p6))]


class FPNForward:
    """The forward pass of FPN, for our module and for detectron2's, which have the same attributes."""

    bottom_up: nn.Module
    top_block: Any
    in_features: Sequence[str]
    lateral_convs: Sequence[nn.Module]
    output_convs: Sequence[nn.Module]
    _out_features: list[str]
    _fuse_type: str

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Computes the pyramid of a batch of images.

        Args:
            x: [N, 3, H, W], with H and W multiples of ``size_divisibility``.

        Returns:
            {"p{s}": [N, out_channels, H / 2**s, W / 2**s]}, finest first; the top block's maps come last.

        Raises:
            ValueError: a map of the backbone is not twice as high and wide as the next; others: see
                :func:`fpn_fast.ops.top_down`.
        """
        maps = self.bottom_up(x)
        # Like detectron2, the module stores convolutions coarsest first.
        _, results = merge_pyramid(
            [maps[name] for name in self.in_features],
            self.lateral_convs[::-1],
            self.output_convs[::-1],
            scale_factor=2,
            fuse=self._fuse_type,
        )
        if self.top_block is not None:
            name = self.top_block.in_feature
            results += self.top_block(maps[name] if name in maps else results[self._out_features.index(name)])
        return dict(zip(self._out_features, results, strict=True))


class FPN(FPNForward, nn.Module):
    """Feature Pyramid Network (Lin et al., 2017): drop-in for detectron2's ``FPN``.

    Constructor, ``state_dict`` keys, seeded initialisation and outputs are detectron2's. One call of
    :func:`fpn_fast.ops.top_down` merges all levels. Where detectron2 is imported, the module is an instance of its
    ``Backbone``, which its registry of backbones asks for.

    Args:
        bottom_up: the backbone: a module that returns a dict of maps. Its ``output_shape()`` returns an object with
            ``channels`` and ``stride`` for each name, such as :class:`ShapeSpec`.
        in_features: names of the maps to use, finest first. Strides are powers of two, each twice the one before.
        out_channels: channels of every output.
        norm: ``""`` for none; ``"BN"``, ``"SyncBN"`` or ``"GN"`` with 32 groups; or a function from a number of
            channels to a layer. Convolutions have a bias only for ``""``.
        top_block: :class:`LastLevelMaxPool`, :class:`LastLevelP6P7`, or a module with their attributes. Default: none.
        fuse_type: ``"sum"``, or ``"avg"`` for half of the sum.
        square_pad: the side to which images are padded, for ``padding_constraints``. Default: 0, for none.

    Raises:
        ValueError: the strides are not such a sequence; norm or fuse_type is unknown.

    Source: detectron2/modeling/backbone/fpn.py.

    >>> import torch
    >>> class Backbone(torch.nn.Module):
    ...     def output_shape(self):
    ...         return {"res2": ShapeSpec(channels=3, stride=4), "res3": ShapeSpec(channels=3, stride=8)}
    ...     def forward(self, x):
    ...         return {"res2": x[:, :, ::4, ::4], "res3": x[:, :, ::8, ::8]}
    >>> fpn = FPN(Backbone(), ["res2", "res3"], 6)
    >>> {name: tuple(map.shape) for name, map in fpn(torch.rand(1, 3, 32, 64)).items()}
    {'p2': (1, 6, 8, 16), 'p3': (1, 6, 4, 8)}
    """

    def __init__(
        self,
        bottom_up: nn.Module,
        in_features: Sequence[str],
        out_channels: int,
        norm: str | Callable[[int], nn.Module] = "",
        top_block: Any = None,
        fuse_type: str = "sum",
        square_pad: int = 0,
    ) -> None:
        super().__init__()
        if (theirs := sys.modules.get("detectron2.modeling.backbone")) is not None:
            # An abstract base class, which takes classes that do not derive from it.
            theirs.Backbone.register(FPN)
        if fuse_type not in ("sum", "avg"):
            raise ValueError(f"fuse_type must be 'sum' or 'avg', got {fuse_type!r}")
        shapes: Any = bottom_up.output_shape()  # type: ignore[operator]
        strides = [shapes[name].stride for name in in_features]
        levels = levels_of(strides)
        laterals, outputs = [], []
        for level, name in zip(levels, in_features, strict=True):
            laterals.append(ConvWithNorm(shapes[name].channels, out_channels, 1, norm))
            outputs.append(ConvWithNorm(out_channels, out_channels, 3, norm))
            initialise(nn.ModuleList([laterals[-1], outputs[-1]]))
            self.add_module(f"fpn_lateral{level}", laterals[-1])
            self.add_module(f"fpn_output{level}", outputs[-1])
        # Like detectron2, which keeps them coarsest first in addition to the names above.
        self.lateral_convs, self.output_convs = laterals[::-1], outputs[::-1]
        self.top_block = top_block
        self.in_features = tuple(in_features)
        self.bottom_up = bottom_up
        extra = 0 if top_block is None else top_block.num_levels
        self._out_feature_strides = {f"p{level}": 2**level for level in range(levels[0], levels[-1] + 1 + extra)}
        self._out_features = list(self._out_feature_strides)
        self._out_feature_channels = dict.fromkeys(self._out_features, out_channels)
        self._size_divisibility = strides[-1]
        self._square_pad = square_pad
        self._fuse_type = fuse_type

    @property
    def size_divisibility(self) -> int:
        """The height and width of images must be multiples of this, in pixels."""
        return self._size_divisibility

    @property
    def padding_constraints(self) -> dict[str, int]:
        """{"square_size": side to which images are padded, in pixels; 0 for none}"""
        return {"square_size": self._square_pad}

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of each output, by name."""
        return {
            name: ShapeSpec(self._out_feature_channels[name], self._out_feature_strides[name])
            for name in self._out_features
        }


def levels_of(strides: Sequence[int]) -> list[int]:
    """The levels of strides that are powers of two, each twice the last; raises ValueError for others."""
    levels = [math.log2(stride) for stride in strides]
    halving = all(coarser == finer + 1 for finer, coarser in itertools.pairwise(levels))
    if not levels or not halving or not levels[0].is_integer():
        raise ValueError(f"in_features must have strides that are powers of two, each twice the last, got {strides}")
    return [int(level) for level in levels]
