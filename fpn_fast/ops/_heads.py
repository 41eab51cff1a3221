# SPDX-License-Identifier: Apache-2.0
"""What the ops that read a detector's head check alike: its maps, the anchors behind them, and the images' sizes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fpn_fast.ops._checks import check_maps
from fpn_fast.ops._registration import constant

#: csrc/common/head_decoding.h: kMaxProposalLevels.
MAX_LEVELS = 8


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}, got {value!r}")


def check_numbers(**numbers: float) -> list[float]:
    """`numbers` as constants, none of which is NaN."""
    found = [constant(value) for value in numbers.values()]
    for name, value in zip(numbers, found, strict=True):
        if math.isnan(value):
            raise ValueError(f"{name} must be a number, got nan")
    return found


def check_fours(**fours: Sequence[float]) -> list[list[float]]:
    """Each of `fours` is four numbers, for (dx, dy, dw, dh), none of which is NaN; as constants."""
    found = []
    for name, values in fours.items():
        if len(values) != 4:
            raise ValueError(f"{name} must be four, for (dx, dy, dw, dh), got {values}")
        found.append([constant(value) for value in values])
        if any(math.isnan(value) for value in found[-1]):
            raise ValueError(f"{name} must be numbers, got {values}")
    return found


def check_head(**maps: Sequence[Tensor]) -> list[list[Tensor]]:
    """The maps of a head by name, detached: as many of each as of the first, of its sizes, on its device.

    Under autocast all are promoted to the widest dtype among them. Channels are the caller's to check.
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
        if others[0].device != first[0].device:
            raise ValueError(f"{name} must be on the device of {names[0]}, {first[0].device}, got {others[0].device}")
        if others[0].dtype != first[0].dtype and not torch.is_autocast_enabled(first[0].device.type):
            raise TypeError(f"{name} must be of the dtype of {names[0]}, {first[0].dtype}, got {others[0].dtype}")
    widest = first[0].dtype
    for others in found[1:]:
        widest = torch.promote_types(widest, others[0].dtype)
    return [[each.to(widest) for each in each_maps] for each_maps in found]


def check_channels(name: str, what: str, maps: Sequence[Tensor], channels: int, like: Sequence[Tensor]) -> None:
    """`maps` are [N, `channels`, H, W], with N, H and W of the maps in `like`; `what` is their shape in words."""
    for i, (each, other) in enumerate(zip(maps, like, strict=True)):
        expected = (other.size(0), channels, other.size(2), other.size(3))
        if tuple(each.shape) != expected:
            raise ValueError(f"{name} must be {what}, {expected} at {i}, got {tuple(each.shape)}")


def check_strides(strides: Sequence[tuple[int, int]], levels: int) -> list[int]:
    if len(strides) != levels or any(len(pair) != 2 for pair in strides):
        raise ValueError(f"strides must be (stride_y, stride_x) for each of the {levels} levels, got {strides}")
    flat = [stride for pair in strides for stride in pair]
    if any(isinstance(stride, float) for stride in flat):
        raise TypeError(f"strides must be integers, got {strides}")
    return flat


def check_image_sizes(image_sizes: Tensor, like: Tensor) -> Tensor:
    """[N, 2] with N of `like`, in the type in which boxes of its type are computed."""
    if not isinstance(image_sizes, Tensor):
        raise TypeError(f"image_sizes must be a tensor, got {type(image_sizes).__name__}")
    if image_sizes.is_complex():
        raise TypeError(f"image_sizes must be of a real type, got {image_sizes.dtype}")
    if image_sizes.dim() != 2 or image_sizes.size(0) != like.size(0) or image_sizes.size(1) != 2:
        raise ValueError(f"image_sizes must be [N, 2], {(like.size(0), 2)}, got {tuple(image_sizes.shape)}")
    if image_sizes.device != like.device:
        raise ValueError(f"image_sizes must be on the maps' device, {like.device}, got {image_sizes.device}")
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return image_sizes.detach().to(dtype).contiguous()


def flatten_cells(
    cell_anchors: Sequence[Sequence[Sequence[float]] | Tensor], levels: int, anchors: int | None
) -> list[float]:
    """The tables of `levels` levels in one list; each has `anchors` rows, or as many as the first."""
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
