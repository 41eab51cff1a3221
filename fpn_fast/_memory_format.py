# SPDX-License-Identifier: Apache-2.0
"""The memory format of outputs, decided by one rule in every backend."""

import torch
from torch import Tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether outputs like `tensor` [N, C, H, W] are channels_last: csrc/torch/tensors.h has the same rule."""
    return tensor.stride(1) == 1 and tensor.size(1) > 1 and not tensor.is_contiguous()


def memory_format(tensor: Tensor) -> torch.memory_format:
    """The memory format of outputs that follow `tensor` [N, C, H, W]."""
    return torch.channels_last if is_channels_last(tensor) else torch.contiguous_format


def empty_map(like: Tensor, channels: int, height: int, width: int) -> Tensor:
    """An uninitialised map in the dtype, memory format and batch of `like`."""
    return torch.empty(
        (like.size(0), channels, height, width),
        dtype=like.dtype,
        device=like.device,
        memory_format=memory_format(like),
    )
