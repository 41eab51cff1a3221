# SPDX-License-Identifier: Apache-2.0
"""The top-down merge in plain PyTorch. This file is the specification; the kernels are checked against it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest_sources(size_in: int, size_out: int, device: torch.device | None = None) -> Tensor:
    """Return the source pixel of each of size_out pixels, int64: min(floor(dst * float32(in / out)), in - 1)."""
    source, out = torch.tensor([size_in, size_out], dtype=torch.float32, device="cpu")
    scale = source / out
    sources = torch.arange(size_out, dtype=torch.float32, device=device) * scale.item()
    return sources.floor().long().clamp(max=size_in - 1)


def resample(top: Tensor, size: tuple[int, int], mode: str = "nearest", align_corners: bool = False) -> Tensor:
    """Resample [N, C, h, w] to [N, C, *size] like F.interpolate.

    The exception is nearest float64. There F.interpolate computes sources with a float64 scale, though only for
    contiguous maps on a CPU, and reads other pixels for ratios such as 26 -> 44. Here the scale is always float32.
    """
    if mode == "nearest" and top.dtype == torch.float64:
        rows = nearest_sources(top.shape[2], size[0], top.device)
        cols = nearest_sources(top.shape[3], size[1], top.device)
        return top.index_select(2, rows).index_select(3, cols)
    return F.interpolate(top, size=size, mode=mode, align_corners=align_corners if mode == "bilinear" else None)


def upsample_add(
    lateral: Tensor, top: Tensor, mode: str = "nearest", *, align_corners: bool = False, average: bool = False
) -> Tensor:
    """Return ``lateral + resample(top to lateral's size)``, halved if `average`.

    lateral: [N, C, H, W]; top: [N, C, h, w]; result: [N, C, H, W] in the lateral's dtype. Any ratio of sizes is
    allowed: 25 -> 13 -> 25 is not a factor of two. The sum is rounded to the storage type before it is halved.

    Source: torchvision/ops/feature_pyramid_network.py; for `average`, detectron2's fuse_type="avg".
    """
    merged = lateral + resample(top, (lateral.shape[2], lateral.shape[3]), mode, align_corners)
    return merged / 2 if average else merged


def top_down(
    laterals: Sequence[Tensor], mode: str = "nearest", *, align_corners: bool = False, average: bool = False
) -> list[Tensor]:
    """Merge a pyramid: ``merged[-1] = laterals[-1]``, ``merged[l] = upsample_add(laterals[l], merged[l + 1])``.

    laterals: [N, C, H_l, W_l], finest first; result: the same shapes, rounded to the storage type at every level.
    """
    merged = [laterals[-1]]
    for lateral in reversed(laterals[:-1]):
        merged.append(upsample_add(lateral, merged[-1], mode, align_corners=align_corners, average=average))
    return merged[::-1]
