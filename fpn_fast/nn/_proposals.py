# SPDX-License-Identifier: Apache-2.0
"""Conversions around :func:`ops.generate_proposals` that the modules of all libraries share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sizes_beside(maps: Sequence[Tensor], image_sizes: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """(height, width) per image, in pixels -> [N, 2] on the device of `maps`, without synchronising."""
    if isinstance(image_sizes, Tensor):
        return image_sizes
    # The driver stages a copy this small from pageable memory, so it does not synchronise.
    return torch.tensor([tuple(size) for size in image_sizes]).view(-1, 2).to(maps[0].device, non_blocking=True)


def proposals_of_images(boxes: Tensor, scores: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Padded [N, P, 4], [N, P] and [N] -> per image (boxes [K, 4], scores [K]). Synchronises with the host once."""
    return [(boxes[n, :count], scores[n, :count]) for n, count in enumerate(counts.tolist())]
