# SPDX-License-Identifier: Apache-2.0
"""The top-down merge in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def upsample_add(
    lateral: Tensor, top: Tensor, mode: str = "nearest", *, align_corners: bool = False, average: bool = False
) -> Tensor:
    """``merged = lateral + resample(top to lateral's size)``, halved if `average`.

    lateral: [N, C, H, W]; top: [N, C, h, w]; result: [N, C, H, W] in lateral's type. The lateral's size wins, whatever
    the ratio: 25 -> 13 -> 25 is not a factor of two. ``nearest`` reads source ``min(floor(dst * float32(in / out)),
    in - 1)``. The sum is rounded to the storage type; halving it then is exact but for subnormals.

    Source: the FPN paper's top-down pathway, as torchvision/ops/feature_pyramid_network.py and (averaging) detectron2's
    fuse_type="avg" compute it.
    """
    corners = align_corners if mode == "bilinear" else None
    merged = lateral + F.interpolate(top, size=lateral.shape[-2:], mode=mode, align_corners=corners)
    return merged / 2 if average else merged


def top_down(
    laterals: Sequence[Tensor], mode: str = "nearest", *, align_corners: bool = False, average: bool = False
) -> list[Tensor]:
    """The whole pathway: ``merged[-1] = laterals[-1]``, ``merged[l] = upsample_add(laterals[l], merged[l + 1])``.

    laterals: [N, C, H_l, W_l], finest first; result: the same shapes. Rounded to the storage type at every level.
    """
    merged = [laterals[-1]]
    for lateral in reversed(laterals[:-1]):
        merged.append(upsample_add(lateral, merged[-1], mode, align_corners=align_corners, average=average))
    return merged[::-1]
