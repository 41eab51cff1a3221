# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the ops that read a detector's head: its maps, its anchors and the sizes of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast.ops._checks import as_integer, check_device, check_maps, check_shape
from fpn_fast.ops._registration import constant

#: csrc/common/head_decoding.h: kMaxProposalLevels.
MAX_LEVELS = 8


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_numbers(**numbers: float) -> list[float]:
    """Return `numbers` as constants; raise ValueError for a NaN."""
    found = [constant(value) for value in numbers.values()]
    for name, value in zip(numbers, found, strict=True):
        if math.isnan(value):
            raise ValueError(f"{name} must be a number, got nan")
    return found


def check_fours(**fours: Sequence[float]) -> list[list[float]]:
    """Return `fours`, values for (dx, dy, dw, dh), as constants; raise ValueError for a NaN or another count."""
    found = []
    for name, values in fours.items():
        if len(values) != 4:
            raise ValueError(f"{name} must be four values, (dx, dy, dw, dh), got {values}")
        found.append([constant(value) for value in values])
        if any(math.isnan(value) for value in found[-1]):
            raise ValueError(f"{name} must not hold NaN, got {values}")
    return found


def check_head(**maps: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return the maps of a head by name, detached and, under autocast, promoted to the widest dtype among them.

    Raises TypeError or ValueError unless all names have equally many maps on one device. Shapes are checked by
    :func:`check_channels`.
    """
    names = list(maps)
    found = [
        check_maps([each.detach() if isinstance(each, Tensor) else each for each in maps[name]], name) for name in names
    ]
    first = found[0]
    if len(first) > MAX_LEVELS:
        raise ValueError(f"{names[0]} must be 1 to {MAX_LEVELS} maps, got {len(first)}")
    for name, others in zip(names[1:], found[1:], strict=True):
        if len(others) != len(first):
            raise ValueError(f"{name} must be one for each of the {len(first)} maps of {names[0]}, got {len(others)}")
        check_device(others[0], name, first[0], names[0])
        if others[0].dtype != first[0].dtype and not torch.is_autocast_enabled(first[0].device.type):
            raise TypeError(f"{name} must be of the dtype of {names[0]}, {first[0].dtype}, got {others[0].dtype}")
    widest = first[0].dtype
    for others in found[1:]:
        widest = torch.promote_types(widest, others[0].dtype)
    return [[each.to(widest) for each in each_maps] for each_maps in found]


def check_channels(name: str, what: str, maps: Sequence[Tensor], channels: int, like: Sequence[Tensor]) -> None:
    """Raise ValueError unless `maps` are [N, `channels`, H, W] with N, H and W of `like`; `what` spells that shape."""
    for i, (each, other) in enumerate(zip(maps, like, strict=True)):
        expected = (other.size(0), channels, other.size(2), other.size(3))
        if tuple(each.shape) != expected:
            raise ValueError(f"{name} must be {what}, {expected} at {i}, got {tuple(each.shape)}")


def check_strides(strides: Sequence[tuple[int, int]], levels: int) -> list[int]:
    if len(strides) != levels or any(len(pair) != 2 for pair in strides):
        raise ValueError(f"strides must be (stride_y, stride_x) for each of the {levels} levels, got {strides}")
    return [as_integer("strides", stride) for pair in strides for stride in pair]


def check_image_sizes(image_sizes: Tensor, like: Tensor) -> Tensor:
    """Return the sizes, [N, 2] with N of `like`, in the dtype in which boxes are computed from `like`."""
    if not isinstance(image_sizes, Tensor):
        raise TypeError(f"image_sizes must be a tensor, got {type(image_sizes).__name__}")
    if image_sizes.is_complex():
        raise TypeError(f"image_sizes must be of a real type, got {image_sizes.dtype}")
    check_shape(image_sizes, "image_sizes", "[N, 2]", (like.size(0), 2))
    check_device(image_sizes, "image_sizes", like, "the maps")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return image_sizes.detach().to(dtype).contiguous()


def flatten_cells(
    cell_anchors: Sequence[Sequence[Sequence[float]] | Tensor], levels: int, anchors: int | None
) -> list[float]:
    """Return the values of all levels' anchors [A, 4] in one list; A is `anchors`, or the first level's for None."""
    if len(cell_anchors) != levels:
        raise ValueError(f"cell_anchors must be a table for each of the {levels} levels, got {len(cell_anchors)}")
    flat: list[float] = []
    for i, table in enumerate(cell_anchors):
        rows = table.tolist() if isinstance(table, Tensor) else table
        if anchors is None:
            anchors = len(rows)
        if len(rows) != anchors or any(len(row) != 4 for row in rows):
            raise ValueError(f"cell_anchors must be {anchors} anchors (x1, y1, x2, y2) at level {i}, got {rows}")
        flat.extend(value for row in rows for value in row)
    return [constant(value) for value in flat]


def run_reference(
    specification: Callable[..., Any],
    maps: Sequence[list[Tensor]],
    cell_anchors: list[float],
    strides: list[int],
    image_sizes: Tensor,
    *rule: Any,
) -> Any:
    """Call `specification` with an op's arguments; it takes a table of anchors and a pair of strides per level."""
    tables = image_sizes.new_tensor(cell_anchors).view(len(maps[0]), -1, 4)
    pairs = list(zip(strides[::2], strides[1::2], strict=True))
    # Autocast would round the products of the specification.
    with torch.autocast(image_sizes.device.type, enabled=False):
        return specification(*maps, list(tables), pairs, image_sizes, *rule)
