# SPDX-License-Identifier: Apache-2.0
"""torchvision's FeaturePyramidNetwork with the top-down pathway fused."""

from __future__ import annotations

import importlib.util
from collections import OrderedDict

from torch import Tensor

from fpn_fast.nn._own import Steps
from fpn_fast.nn._shared import merge_pyramid

if importlib.util.find_spec("torchvision") is not None:
    # torchvision's models check isinstance, so its classes are the base where it is installed.
    from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
    from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork as _Base
else:
    from fpn_fast.nn._standalone import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
    from fpn_fast.nn._standalone import FeaturePyramidNetwork as _Base

__all__ = ["ExtraFPNBlock", "FeaturePyramidNetwork", "LastLevelMaxPool", "LastLevelP6P7"]

_STEPS = Steps(_Base, "get_result_from_inner_blocks", "get_result_from_layer_blocks", replaced="forward")


class FeaturePyramidNetwork(_Base):
    """Feature Pyramid Network (Lin et al., 2017): drop-in for :class:`torchvision.ops.FeaturePyramidNetwork`.

    Constructor, ``state_dict`` keys, seeded initialisation and outputs are torchvision's. Keys of version 1 are
    migrated. One call of :func:`fpn_fast.ops.top_down` merges all levels. The class is a subclass of torchvision's
    where torchvision is installed.

    Args:
        in_channels_list: channels of each input map, finest first.
        out_channels: channels of every output map.
        extra_blocks: an :class:`ExtraFPNBlock` that appends coarser maps, such as :class:`LastLevelMaxPool`.
        norm_layer: makes the normalisation after each convolution. The convolutions then have no bias.

    Raises:
        ValueError: an entry of in_channels_list is 0.
        TypeError: extra_blocks is not an ExtraFPNBlock.

    >>> import torch
    >>> fpn = FeaturePyramidNetwork([8, 16], 4)
    >>> maps = fpn({"0": torch.rand(1, 8, 16, 16), "1": torch.rand(1, 16, 8, 8)})
    >>> {name: tuple(map.shape) for name, map in maps.items()}
    {'0': (1, 4, 16, 16), '1': (1, 4, 8, 8)}
    """

    def forward(self, x: dict[str, Tensor]) -> dict[str, Tensor]:
        """{name: [N, C_l, H_l, W_l]}, finest first -> {name: [N, out_channels, H_l, W_l]} and the extra maps."""
        if not _STEPS.are_own(self):
            return super().forward(x)
        names = list(x)
        features = list(x.values())
        # Like in torchvision, the coarsest map takes the last block, however many maps there are.
        indices = [*range(len(features) - 1), -1]
        inner, layers = [self.inner_blocks[i] for i in indices], [self.layer_blocks[i] for i in indices]
        _, results = merge_pyramid(features, inner, layers)
        if self.extra_blocks is not None:
            results, names = self.extra_blocks(results, features, names)
        return OrderedDict(zip(names, results, strict=False))
