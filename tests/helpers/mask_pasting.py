# SPDX-License-Identifier: Apache-2.0
"""Calls of mask pasting that are small and odd, for kernels that a CPU runs a thread or a number at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fpn_fast import reference

NAN, INF = math.nan, math.inf

# Inside, across each edge, the whole image and beyond, one pixel, thin; and what is no box.
BOXES = (
    (10.3, 8.7, 40.9, 31.2),
    (-9.5, 12.1, 20.4, 40.6),
    (30.2, -12.1, 95.4, 10.6),
    (0.0, 0.0, 53.0, 37.0),
    (-200.0, -100.0, 300.0, 200.0),
    (30.2, 20.1, 30.4, 20.3),
    (10.0, 30.0, 50.0, 30.5),
    (52.9, 36.9, 53.0, 37.0),
)
EMPTY = (
    (90.5, 10, 110, 30),
    (40, 10, 20, 30),
    (NAN, 10, 30, 30),
    (10, 10, 30, INF),
    (-1e30, 0, 1e30, 9),
    (9, 9, 2e9, 20),
)


@dataclass(frozen=True)
class Case:
    boxes: tuple[tuple[float, ...], ...] = BOXES
    size: int = 7
    # Rows are no multiple of 16 bytes, and a run of bool goes on in the next.
    image: tuple[int, int] = (37, 53)
    padding: int = 1
    threshold: float | None = None
    box_type: torch.dtype = torch.float32

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(0)
        shape = (len(self.boxes), 1, self.size, self.size)
        masks = torch.randn(shape, generator=generator, dtype=torch.float64).mul(4).sigmoid().to(dtype)
        return [masks, torch.tensor(self.boxes, dtype=torch.float64).reshape(-1, 4).to(self.box_type)]

    def expected(self, dtype: torch.dtype) -> torch.Tensor:
        return reference.paste_masks(*self.inputs(dtype), *self.image, self.padding, self.threshold)


CASES = {
    "inside_and_across": Case(),
    "bool": Case(threshold=0.5),
    "empty": Case(EMPTY + BOXES[:1], threshold=-1.0),
    "empty_values": Case(EMPTY + BOXES[:1]),
    "one_pixel_masks": Case(size=1, padding=0),
    "large_masks": Case(BOXES[:3], size=57, padding=3),
    "boxes_in_double": Case(box_type=torch.float64),
    # Runs of many rows and masks.
    "one_pixel_images": Case(image=(1, 1), threshold=0.25),
    "narrow_images": Case(image=(5, 3), threshold=0.25),
    "no_masks": Case(()),
    "no_pixels": Case(image=(0, 5)),
}
