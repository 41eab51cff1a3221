# SPDX-License-Identifier: Apache-2.0
"""Checks that several ops share."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def check_sizes(**sizes: int) -> None:
    """Each of `sizes` is an integer of 0 or more; a tracer's counts as one.

    Raises:
        TypeError: one is no integer.
        ValueError: one is negative.
    """
    for name, value in sizes.items():
        if not isinstance(value, (Integral, torch.SymInt)):
            raise TypeError(f"{name} must be an integer, got {value!r}")
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")


def check_maps(maps: list[Tensor], name: str) -> list[Tensor]:
    """`maps`, all [N, C, H, W] of one type and device; promoted to the widest type among them under autocast.

    name: the caller's word for them, in errors.

    Raises:
        TypeError: something is not a tensor, or not of a type in DTYPES, or the types differ outside autocast.
        ValueError: no maps; not [N, C, H, W]; N, C or device differ; an empty map.
    """
    if not maps:
        raise ValueError(f"{name} must hold at least one map, got an empty sequence")
    mixed = False
    for i, each in enumerate(maps):
        if not isinstance(each, Tensor):
            raise TypeError(f"{name} must be tensors, got {type(each).__name__} at {i}")
        if each.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {each.dtype} at {i}")
        shape = each.shape
        if len(shape) != 4:
            raise ValueError(f"{name} must be [N, C, H, W], got {tuple(shape)} at {i}")
        if i == 0:
            batch, channels, dtype, device = shape[0], shape[1], each.dtype, each.device
        elif shape[0] != batch or shape[1] != channels:
            raise ValueError(f"{name} must share N and C, {(batch, channels)}, got {tuple(shape)} at {i}")
        if shape[2] < 1 or shape[3] < 1:
            raise ValueError(f"{name} must have at least 1 x 1 pixel, got {tuple(shape)} at {i}")
        if each.device != device:
            raise ValueError(f"{name} must be on one device, {device}, got {each.device} at {i}")
        mixed |= each.dtype != dtype
    return _promote(maps, name) if mixed else maps


def _promote(maps: list[Tensor], name: str) -> list[Tensor]:
    if not torch.is_autocast_enabled(maps[0].device.type):
        raise TypeError(f"{name} must be of one dtype outside autocast, got {[str(m.dtype) for m in maps]}")
    widest = maps[0].dtype
    for each in maps[1:]:
        widest = torch.promote_types(widest, each.dtype)
    return [each.to(widest) for each in maps]
