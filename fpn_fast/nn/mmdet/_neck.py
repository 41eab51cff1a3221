# SPDX-License-Identifier: Apache-2.0
"""What mmdetection's necks share: stages, 1x1 lateral convolutions, and how the first weights are drawn."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["CAFFE2_XAVIER", "KAIMING", "XAVIER", "Drawn", "Neck", "stages_of"]

#: The defaults of `init_cfg` in mmdetection.
XAVIER: dict[str, Any] = {"type": "Xavier", "layer": "Conv2d", "distribution": "uniform"}
CAFFE2_XAVIER: dict[str, Any] = {"type": "Caffe2Xavier", "layer": "Conv2d"}
KAIMING: dict[str, Any] = {
    "type": "Kaiming", "layer": "Conv2d", "a": math.sqrt(5), "distribution": "uniform", "mode": "fan_in",
    "nonlinearity": "leaky_relu",
}  # fmt: skip
_DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "Xavier": nn.init.xavier_uniform_,
    "Caffe2Xavier": functools.partial(nn.init.kaiming_uniform_, a=1),
    "Kaiming": functools.partial(nn.init.kaiming_uniform_, a=math.sqrt(5)),
}


class Drawn(nn.Module):
    """A module whose convolutions are drawn by `init_cfg`: mmdetection's default, or None to keep mmcv's."""

    def __init__(self, init_cfg: Mapping[str, Any] | None, default: Mapping[str, Any]) -> None:
        super().__init__()
        if init_cfg is not None and dict(init_cfg) != default:
            raise ValueError(f"init_cfg must be None or {default}, got {init_cfg}")
        self.init_cfg = init_cfg

    def init_weights(self) -> None:
        """Draws new weights by init_cfg, which the constructor has done already; none where it is None."""
        if self.init_cfg is None:
            return
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                _DRAWS[self.init_cfg["type"]](layer.weight)


class Neck(Drawn):
    """A neck with `lateral_convs` over the stages from start_level to end_level.

    default: of init_cfg; layers: options of the lateral convolutions.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int,
        num_outs: int,
        start_level: int,
        end_level: int,
        init_cfg: Mapping[str, Any] | None,
        default: Mapping[str, Any],
        layers: Mapping[str, Any],
    ) -> None:
        super().__init__(init_cfg, default)
        self.in_channels = list(in_channels)
        self.out_channels = out_channels
        self.num_ins = len(self.in_channels)
        self.num_outs = num_outs
        self.start_level, self.end_level = start_level, end_level
        self.backbone_end_level = _end_of(end_level, start_level, num_outs, self.num_ins)
        self.lateral_convs = nn.ModuleList(
            ConvModule(channels, out_channels, 1, **layers)
            for channels in self.in_channels[start_level : self.backbone_end_level]
        )


def stages_of(neck: Any, inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The maps that `neck`, ours or mmdetection's, uses, of one for every stage of the backbone."""
    if len(inputs) != len(neck.in_channels):
        raise ValueError(f"inputs must be a map for each of the {len(neck.in_channels)} stages, got {len(inputs)}")
    return inputs[neck.start_level : neck.backbone_end_level]


def _end_of(end_level: int, start_level: int, num_outs: int, stages: int) -> int:
    """One past the last stage that is used; checks the rules that mmdetection asserts."""
    if not 0 <= start_level < stages:
        raise ValueError(f"start_level must be one of the {stages} stages, got {start_level}")
    if end_level in (-1, stages - 1):
        if num_outs < stages - start_level:
            raise ValueError(f"num_outs must be at least {stages - start_level}, one for each stage, got {num_outs}")
        return stages
    if not start_level <= end_level < stages:
        raise ValueError(f"end_level must be -1 or a stage from {start_level} to {stages - 1}, got {end_level}")
    if num_outs != end_level - start_level + 1:
        raise ValueError(f"num_outs must be {end_level - start_level + 1} for an end_level before the last stage's, "
                         f"where there are no extra levels, got {num_outs}")  # fmt: skip
    return end_level + 1
