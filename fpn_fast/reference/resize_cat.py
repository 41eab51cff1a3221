# SPDX-License-Identifier: Apache-2.0
"""Maps of several sizes, resized and concatenated, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast._memory_format import memory_format
from fpn_fast.reference.fuse_maps import resized


def resize_cat(maps: Sequence[Tensor], size: tuple[int, int], mode: str) -> Tensor:
    """Return the maps [N, C_k, h_k, w_k], resized to `size` and concatenated: [N, sum of C_k, *size].

    mode: "nearest", "bilinear" or "bilinear_align_corners"; a map of this size is copied. The result has the memory
    format of maps[0].
    """
    parts = [resized(x, size, "identity" if tuple(x.shape[2:]) == tuple(size) else mode) for x in maps]
    return torch.cat(parts, 1).contiguous(memory_format=memory_format(maps[0]))
