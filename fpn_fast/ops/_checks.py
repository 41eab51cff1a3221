# SPDX-License-Identifier: Apache-2.0
"""Argument checks that several ops share."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def as_integer(name: str, value: Any) -> int:
    """Return an integer, such as numpy's, as Python's, which cannot overflow; a tracer's symbol as it is.

    Raises TypeError for anything else, also for a float without a fraction.
    """
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None


def as_pair(name: str, value: Any) -> tuple[int, int]:
    """Return two integers, (height, width), of a sequence of two, or of one integer for both; see :func:`as_integer`.

    Raises TypeError for what is no integer, ValueError for a sequence of another length.
    """
    # A tensor or an array without dimensions has __iter__ too.
    if not isinstance(value, Iterable) or getattr(value, "ndim", 1) == 0:
        value = (value, value)
    found = tuple(as_integer(name, each) for each in value)
    if len(found) != 2:
        raise ValueError(f"{name} must be one integer or two, (height, width), got {value}")
    return found


def as_sizes(name: str, value: Any) -> list[tuple[int, int]]:
    """Return one pair or several, see :func:`as_pair`, as the distinct pairs, smallest area first."""
    pairs = isinstance(value, Iterable) and all(isinstance(size, Iterable) for size in value)
    sizes = {as_pair(name, size) for size in (value if pairs else [value])}
    return sorted(sizes, key=lambda size: (size[0] * size[1], size))


def check_sizes(**sizes: Any) -> list[int]:
    """Return `sizes` as integers of Python; raise TypeError for other numbers, ValueError for negative ones."""
    found = [as_integer(name, value) for name, value in sizes.items()]
    for name, value in zip(sizes, found, strict=True):
        if value < 0:
            raise ValueError(f"{name} must be 0 or more, got {value}")
    return found


def check_tensor(tensor: Tensor, name: str) -> None:
    """Raise TypeError unless `tensor` is a tensor of a dtype in DTYPES."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")


def check_shape(tensor: Tensor, name: str, letters: str, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `tensor` has `shape`, which `letters` spell, such as "[N, 4]"."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {letters}, {shape}, got {tuple(tensor.shape)}")


def check_device(tensor: Tensor, name: str, like: Tensor, like_name: str) -> None:
    """Raise ValueError unless `tensor` is on the device of `like`."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on the device of {like_name}, {like.device}, got {tensor.device}")


def check_integers(
    tensor: Tensor, name: str, letters: str, shape: tuple[int, ...], like: Tensor, like_name: str
) -> Tensor:
    """Return `tensor` as contiguous int64.

    Raises:
        TypeError: it is not a tensor of an integer dtype.
        ValueError: it does not have `shape` or is not on the device of `like`.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype.is_floating_point or tensor.dtype.is_complex or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be of an integer type, got {tensor.dtype}")
    check_shape(tensor, name, letters, shape)
    check_device(tensor, name, like, like_name)
    return tensor.long().contiguous()


def check_maps(maps: list[Tensor], name: str, *, any_channels: bool = False) -> list[Tensor]:
    """Return `maps` [N, C, H_l, W_l]; under autocast, promoted to the widest dtype among them.

    name: the argument's name, for errors; any_channels: whether C may differ.

    Raises:
        TypeError: a map is not a tensor or has a dtype outside DTYPES, or the dtypes differ outside autocast.
        ValueError: there are no maps; a map is empty or not [N, C, H, W]; N, C or device differ.
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
        elif shape[0] != batch or (shape[1] != channels and not any_channels):
            shared = f"N, {batch}" if any_channels else f"N and C, {(batch, channels)}"
            raise ValueError(f"{name} must share {shared}, got {tuple(shape)} at {i}")
        if shape[2] < 1 or shape[3] < 1:
            raise ValueError(f"{name} must have at least 1 x 1 pixel, got {tuple(shape)} at {i}")
        if each.device != device:
            raise ValueError(f"{name} must be on one device, {device}, got {each.device} at {i}")
        mixed |= each.dtype != dtype
    return _promote(maps, name) if mixed else maps


def _promote(maps: list[Tensor], name: str) -> list[Tensor]:
    if not torch.is_autocast_enabled(maps[0].device.type):
        dtypes = [str(each.dtype) for each in maps]
        raise TypeError(f"{name} must be of one dtype outside autocast, got {dtypes}; convert them")
    widest = maps[0].dtype
    for each in maps[1:]:
        widest = torch.promote_types(widest, each.dtype)
    return [each.to(widest) for each in maps]
