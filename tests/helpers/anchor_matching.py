# SPDX-License-Identifier: Apache-2.0
"""Calls of anchor matching that are small and odd, for kernels that a CPU runs a thread or a number at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fpn_fast import ops, reference

NAN, INF = math.nan, math.inf
# Three levels, the second without cells: 3 * 7 * 9 + 2 * 5 * 8 anchors are two blocks, the second not full.
GRID = ops.AnchorGrid(
    [[(-9.5, -5, 9.5, 5), (-7, -7, 7, 7), (-5, -9.5, 5, 9.5)], [(-1, -1, 1, 1)], [(-20, -9, 20, 9), (-9, -20, 9, 20)]],
    [(7, 9), (0, 4), (5, 8)],
    [(8, 9), (3, 5), (12, 10)],
    0.5,
)  # fmt: skip


def boxes(count: int, seed: int, whole: bool = True) -> torch.Tensor:
    """In an image of 60 x 80; of whole pixels they are full of ties."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64) * torch.tensor([70.0, 50.0])
    found = torch.cat((low, low + 2 + torch.rand(count, 2, generator=generator) * 30), 1)
    return found.round() if whole else found


@dataclass(frozen=True)
class Case:
    gts: torch.Tensor
    gt_counts: tuple[int, ...]
    anchors: torch.Tensor | ops.AnchorGrid
    anchor_counts: tuple[int, ...] | None = None
    high: float = 0.5
    low: float = 0.3
    low_quality: bool = True

    def tensors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        grid = self.anchors if isinstance(self.anchors, ops.AnchorGrid) else None
        stored = torch.zeros(0, 4) if grid else self.anchors
        counts = torch.tensor(self.anchor_counts or [], dtype=torch.int64)
        return [
            torch.tensor([self.high, self.low, grid.offset if grid else 0.0], dtype=torch.float64),
            torch.tensor(grid._numbers()[0] if grid else [], dtype=torch.float64),
            self.gts.to(dtype),
            torch.tensor(self.gt_counts, dtype=torch.int64),
            stored.to(dtype),
            counts,
        ]

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        _, _, gts, gt_counts, anchors, anchor_counts = self.tensors(dtype)
        if isinstance(self.anchors, ops.AnchorGrid):
            anchors = self.anchors.boxes(dtype)
        counts = None if self.anchor_counts is None else anchor_counts
        return reference.match_anchors(gts, gt_counts, anchors, counts, self.high, self.low, self.low_quality)


BAD = torch.tensor([[NAN, 1, 9, 9], [1, 1, INF, 9], [3, 3, 12, 12], [5, 5, 5, 5], [30, 20, 10, 5], [-3e38, 2, 3e38, 9],
                    [-3e38, 5, 3e38, 5], [0, -INF, 9, 9], [0, 0, 1e-42, 1e-42]], dtype=torch.float64)  # fmt: skip
FAR = torch.tensor([[500.0, 500, 510, 510]], dtype=torch.float64)
CASES = {
    "grid": Case(torch.stack([boxes(7, 0), boxes(7, 1), boxes(7, 2)]), (7, 3, 0), GRID),
    "grid_without_low_quality": Case(boxes(7, 0, False)[None], (7,), GRID, low_quality=False),
    "same_for_all": Case(torch.stack([boxes(5, 0), boxes(5, 1)]), (5, 4), boxes(300, 3)),
    "of_each_image": Case(torch.stack([boxes(5, 0), boxes(5, 1)]), (4, 5), torch.stack([boxes(270, 3), boxes(270, 4)]),
                          (270, 7)),
    "counted": Case(torch.stack([boxes(4, 0), boxes(4, 1)]), (-1, 9), boxes(40, 5), (0, 99)),
    "more_than_a_block_of_gts": Case(boxes(300, 6)[None], (300,), boxes(50, 7)),
    "more_than_a_block_without_low_quality": Case(boxes(300, 6)[None], (300,), boxes(50, 7), low_quality=False),
    "nothing_reaches_one": Case(torch.cat((boxes(3, 0), FAR))[None], (4,), boxes(40, 8)),
    "one_beyond_a_block_is_not_finite": Case(torch.cat((boxes(258, 6), BAD[:2]))[None], (260,), boxes(40, 9)),
    "one_is_not_finite_without_low_quality": Case(
        torch.stack([torch.cat((boxes(5, 0), BAD[1:2])), boxes(6, 1)]), (6, 6), torch.cat((BAD, boxes(40, 9))),
        low_quality=False),
    "none_is_a_box": Case(torch.full((1, 3, 4), INF), (3,), boxes(40, 9)),
    "odd": Case(torch.stack([BAD, boxes(9, 0), BAD.flip(0)]), (9, 9, 9), torch.cat((BAD, boxes(30, 2), BAD.flip(0)))),
    "no_gts": Case(torch.zeros(2, 0, 4), (0, 0), boxes(40, 0)),
    "no_images": Case(torch.zeros(0, 3, 4), (), boxes(40, 0)),
    "no_anchors": Case(boxes(3, 0)[None], (3,), torch.zeros(0, 4)),
}  # fmt: skip
