# SPDX-License-Identifier: Apache-2.0
"""What the modules of all libraries share: the pyramid's forward pass, and conversions around proposals."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import backends, ops

Layer = Callable[[Tensor], Tensor]


def initialise(module: nn.Module) -> None:
    """The initialisation of a pyramid's convolutions in torchvision, which detectron2 calls c2_xavier_fill."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_uniform_(layer.weight, a=1)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def merge_pyramid(
    features: Iterable[Tensor], lateral_convs: Iterable[Layer], output_convs: Iterable[Layer], **merge: Any
) -> tuple[list[Tensor], list[Tensor]]:
    """Lateral convolutions, the top-down merge, and output convolutions.

    Args:
        features: maps [N, C_l, H_l, W_l], finest first.
        lateral_convs, output_convs: one layer per map.
        merge: options of :func:`ops.top_down`.

    Returns:
        (merged maps, output maps), finest first.
    """
    laterals = [conv(feature) for conv, feature in zip(lateral_convs, features, strict=True)]
    merged = ops.top_down(laterals, **merge)
    return merged, [conv(map) for conv, map in zip(output_convs, merged, strict=True)]


def recorded(x: Any) -> bool:
    """Whether torch.jit.trace records the call, or torch.fx, whose stand-in `x` is or, in a dict, its values are."""
    first = next(iter(x.values()), None) if isinstance(x, dict) else x
    return backends.jit_traced() or isinstance(first, torch.fx.Proxy)


def sizes_beside(maps: Sequence[Tensor], image_sizes: Sequence[Sequence[int]] | Tensor) -> Tensor:
    """(height, width) per image, in pixels -> [N, 2] on the device of `maps`, without synchronising."""
    if isinstance(image_sizes, Tensor):
        return image_sizes
    # The driver stages a copy this small from pageable memory, so it does not synchronise.
    sizes = torch.tensor([tuple(size) for size in image_sizes], device="cpu").view(-1, 2)
    return sizes.to(maps[0].device, non_blocking=True)


def proposals_of_images(boxes: Tensor, scores: Tensor, counts: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Padded [N, P, 4], [N, P] and [N] -> per image (boxes [K, 4], scores [K]). Synchronises with the host once."""
    return [(boxes[n, :count], scores[n, :count]) for n, count in enumerate(counts.tolist())]


def values_of(owner: Any, tables: Sequence[Tensor]) -> list[Any]:
    """`tables` as lists. Reading them from a GPU synchronises, so `owner` keeps them until a table is replaced."""
    known = owner._numbers
    if known is None or len(known[0]) != len(tables) or any(a is not b for a, b in zip(known[0], tables, strict=True)):
        known = owner._numbers = (tuple(tables), [table.tolist() for table in tables])
    return known[1]
