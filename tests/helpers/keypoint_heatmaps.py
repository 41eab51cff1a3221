# SPDX-License-Identifier: Apache-2.0
"""Calls of heatmaps_to_keypoints that are small and odd, for kernels that a CPU runs a thread or a number at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fpn_fast import reference

NAN, INF = math.nan, math.inf

# Larger and smaller than the maps, of fractions, thin, of a pixel or less, inverted, far away.
BOXES = (
    (10.3, 8.7, 40.9, 31.2),
    (-9.5, 2.1, -4.4, 14.6),
    (5.0, 5.0, 12.0, 11.0),
    (3.0, 4.0, 4.0, 37.5),
    (3.0, 4.0, 40.0, 4.2),
    (7.5, 8.25, 7.5, 8.25),
    (20.0, 30.0, 10.0, 50.0),
    (1e6, -1e6, 1e6 + 9, -1e6 + 7),
)
# Of no pixels: no numbers, and sides that are too long.
EMPTY = (
    (NAN, 10, 30, 30),
    (10, 10, 30, NAN),
    (10, 10, INF, 30),
    (10, -INF, 30, 30),
    (INF, 10, INF, 30),
    (10, 10, 30, -INF),
    (-3e38, 0, 3e38, 9),
    (0, 0, 9, 8193),
    (0, 0, 8192.5, 9),
)


@dataclass(frozen=True)
class Case:
    boxes: tuple[tuple[float, ...], ...] = BOXES
    keypoints: int = 3
    size: tuple[int, int] = (7, 6)
    box_type: torch.dtype = torch.float32
    kind: str = "any"

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.boxes), self.keypoints, *self.size)
        if self.kind == "ties":
            # Many equal numbers, all of them exact: only where the first is decides.
            maps = torch.randint(0, 2, shape, generator=generator, dtype=torch.float64)
        else:
            maps = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind == "constant":
            maps[:] = torch.tensor([0.0, 3.0, -0.5])[:, None, None]
        if self.kind == "no_numbers":
            maps[:, 0, 2, 3], maps[:, 1, 4, 1], maps[:, 2, 0, 0] = NAN, INF, -INF
        if self.kind == "nowhere":
            maps[:, 0], maps[:, 1], maps[:, 2] = NAN, -INF, INF
        boxes = torch.tensor(self.boxes, dtype=torch.float64).reshape(-1, 4)
        return [maps.to(dtype), boxes.to(self.box_type)]

    def expected(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        return reference.heatmaps_to_keypoints(*self.inputs(dtype))


CASES = {
    "any": Case(),
    "ties": Case(kind="ties", size=(4, 4)),
    "constant": Case(kind="constant"),
    "no_numbers": Case(kind="no_numbers"),
    "nowhere": Case(BOXES[:2], kind="nowhere"),
    "no_box": Case((*EMPTY, BOXES[2])),
    "one_pixel_maps": Case(BOXES[:4], size=(1, 1)),
    "flat_maps": Case(BOXES[:4], size=(1, 9)),
    "large_maps": Case(((1.0, 2.0, 4.5, 9.5), (0.0, 0.0, 1.0, 1.0)), size=(40, 35)),
    "boxes_in_double": Case(box_type=torch.float64),
    # More columns and more rows than a block or program takes at a time.
    "wide": Case(((2.5, 3.5, 303.0, 9.0),), keypoints=1),
    "tall": Case(((2.5, 3.5, 9.0, 293.0),), keypoints=1),
    "no_boxes": Case(()),
    "no_keypoints": Case(BOXES[:2], keypoints=0),
}

# As small as an interpreter needs them: each is some seconds of Python otherwise.
TRITON_CASES = {
    "any": Case(BOXES[1:3], keypoints=1),
    "ties": Case(BOXES[2:3], keypoints=2, size=(4, 4), kind="ties"),
    "no_numbers": Case(BOXES[2:3], kind="no_numbers"),
    "no_box": Case((EMPTY[0], EMPTY[3], EMPTY[7], BOXES[6][:2] * 2), keypoints=1),
    "boxes_in_double": Case(BOXES[2:3], keypoints=1, box_type=torch.float64),
    "wide": Case(((2.5, 3.5, 303.0, 5.0),), keypoints=1, size=(2, 6)),
    "no_boxes": Case(()),
}


def same(actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    """Whether keypoints and scores are equal bit for bit; one NaN is as good as another."""
    return all(torch.equal(a.nan_to_num(7e37), e.nan_to_num(7e37)) for a, e in zip(actual, expected, strict=True))
