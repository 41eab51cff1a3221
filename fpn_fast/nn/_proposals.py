# SPDX-License-Identifier: Apache-2.0
"""What goes into and comes out of :func:`ops.generate_proposals`, in the modules of all libraries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sizes_beside(maps: Sequence[Tensor], image_sizes: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """(height, width) of each image, in pixels -> [N, 2] on the device of `maps`, without a wait for it."""
    if isinstance(image_sizes, Tensor):
        return image_sizes
    # Of memory that is not pinned a copy this small is staged by the driver: it does not wait.
    return torch.tensor([tuple(size) for size in image_sizes]).view(-1, 2).to(maps[0].device, non_blocking=True)


def proposals_of_images(boxes: Tensor, scores: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The padded form, [N, P, 4], [N, P] and [N] -> for each image (boxes [K, 4], scores [K]). Waits for a GPU once."""
    return [(boxes[n, :count], scores[n, :count]) for n, count in enumerate(counts.tolist())]
