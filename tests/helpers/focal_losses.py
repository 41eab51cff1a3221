# SPDX-License-Identifier: Apache-2.0
"""Calls of the focal loss that are small and odd, for kernels that a CPU runs a thread or a number at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fpn_fast import reference
from fpn_fast.ops._schemas import FOCAL_TILE
from fpn_fast.testing.tolerances import assert_linear

ALPHA = 0.3


def accumulated(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True)
class Case:
    anchors: int
    classes: int
    spread: float = 4.0
    # Nobody's class, the last one, and what is no class at all.
    lowest_label: int = -2

    def inputs(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Logits, labels and weights, of which some are 0."""
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(self.anchors, self.classes, generator=generator, dtype=torch.float64) * self.spread - 2
        labels = torch.randint(self.lowest_label, self.classes + 2, (self.anchors,), generator=generator)
        weights = torch.rand(self.anchors, generator=generator, dtype=torch.float64)
        weights[::5] = 0
        return [logits.to(dtype), labels, weights.to(accumulated(dtype))]


CASES = {
    "one_tile": Case(40, 91),
    "tiles_and_a_rest": Case(101, 91),
    "one_class": Case(FOCAL_TILE + 13, 1),
    "two_classes": Case(61, 2),
    "rows_longer_than_a_tile": Case(2, 2 * FOCAL_TILE + 7, lowest_label=2 * FOCAL_TILE),
    "exactly_a_tile": Case(64, FOCAL_TILE // 64),
    "odd": Case(7, 3),
    # Beyond where exp of any of them is a number.
    "large_logits": Case(90, 10, spread=150),
}


def check(parts: torch.Tensor, gradient: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """Sums of tiles and gradients, against float64."""
    logits, labels, weights = inputs
    losses, slopes = reference.sigmoid_focal_loss(logits.double(), labels, weights.double(), ALPHA)
    tiles = torch.nn.functional.pad(losses.flatten(), (0, -losses.numel() % FOCAL_TILE)).view(-1, FOCAL_TILE)
    assert (parts.dtype, gradient.dtype) == (accumulated(logits.dtype), logits.dtype)
    # A term has some 30 roundings: a series of 8, or of 17 of float64, in each of exp and log, and what joins them. It
    # is never negative, and of a sum of n each is rounded n times at most.
    assert_linear(parts, tiles.sum(1), tiles.sum(1), terms=30 + min(logits.numel(), FOCAL_TILE), roundings=1)
    assert_linear(gradient, slopes, slopes.abs(), terms=30, roundings=1)
