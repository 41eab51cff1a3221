# SPDX-License-Identifier: Apache-2.0
"""Cases of the frozen batch norm, for its ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fpn_fast import ops, reference
from helpers.battery import Case

#: Not the default, so that a constant in its place shows.
EPS = 3e-3
RELU = {"activation": "relu"}
NORMED = {"activation": "relu", "normed": True}


def two(height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sizes of x and a residual."""
    return (height, width), (height, width)


CASES = [
    Case("one_pixel", two(1, 1), NORMED, channels=8),
    Case("batch_of_0", two(4, 6), NORMED, batch=0),
    Case("empty_maps", two(0, 6), NORMED),
    Case("one_channel", two(9, 7), NORMED, channels=1),
    Case("no_activation", ((5, 7),)),
    Case("norm_alone", ((6, 10),), RELU),
    # Planes of which vectors begin in one and end in the next.
    Case("uneven_planes", two(13, 21), RELU),
    Case("planes_of_less_than_a_vector", two(1, 3), RELU, channels=16),
    Case("uneven_channels", two(8, 8), NORMED, channels=11),
    Case("detectron2", two(10, 12), {**NORMED, "rule": "detectron2"}),
    Case("batch_norm", two(10, 12), {**NORMED, "rule": "batch_norm", "vectors": torch.float32}),
    Case("widened_output", two(10, 12), {**NORMED, "vectors": torch.float32}),
    Case("bfloat16_vectors", two(10, 12), {**NORMED, "vectors": torch.bfloat16}),
    Case("bfloat16_output", two(10, 12), {**NORMED, "output_dtype": torch.bfloat16}),
    Case("tiles_and_a_rest", two(33, 47), NORMED, channels=24),
]


def vectors_of(x: Tensor, dtype: torch.dtype | None, shift: float = 0.0) -> list[Tensor]:
    """weight, bias, mean and variance [C] of x, of its dtype by default: formulas, which a compiler can follow."""
    c = torch.arange(x.size(1), dtype=torch.float64, device=x.device) + shift
    norm = [(c + 1).sin() * 1.5, (2 * c).cos(), (3 * c).sin(), 1 + (5 * c).cos()]
    return [vector.to(x.dtype if dtype is None else dtype) for vector in norm]


def call(maps: list[Tensor], normed: bool = False, vectors: torch.dtype | None = None, **options: Any) -> list[Tensor]:
    """The op for x and perhaps a residual, as the battery calls it."""
    residual = maps[1] if len(maps) > 1 else None
    other = vectors_of(maps[0], vectors, 0.5) if normed else None
    norm = vectors_of(maps[0], vectors)
    return [ops.frozen_batch_norm(maps[0], *norm, EPS, residual=residual, residual_norm=other, **options)]


def plain(
    maps: list[Tensor], normed: bool = False, vectors: torch.dtype | None = None, activation: str | None = None,
    rule: str = "torchvision", output_dtype: torch.dtype | None = None,
) -> list[Tensor]:  # fmt: skip
    """The same by the reference."""
    x = maps[0]
    norm, other = vectors_of(x, vectors), vectors_of(x, vectors, 0.5) if normed else []
    dtype = torch.promote_types(x.dtype, norm[0].dtype) if rule == "torchvision" else x.dtype
    residual, relu = maps[1] if len(maps) > 1 else None, activation == "relu"
    arguments = (residual, other, relu, rule, output_dtype or dtype)
    return [reference.frozen_batch_norm(x, norm, EPS, *arguments)]
