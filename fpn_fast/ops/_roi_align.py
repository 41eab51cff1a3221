# SPDX-License-Identifier: Apache-2.0
"""What both pool modes of multi-level RoIAlign remember for their gradients, and refuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast._memory_format import is_channels_last


def remember_sizes(ctx: Any, features: Sequence[Tensor], numbers: Sequence[Any]) -> None:
    """Keeps what a gradient needs of the features [N, C, H_l, W_l]: no feature, only sizes."""
    ctx.batch = features[0].size(0)
    ctx.sizes = [size for feature in features for size in feature.shape[2:]]
    ctx.channels_last = is_channels_last(features[0])
    ctx.numbers = numbers[2:]


def in_order(ctx: Any, grad: Tensor) -> Tensor:
    """`grad` [K, C, PH, PW] in the finest feature's format: put in order once, not each time that it is read."""
    return grad.contiguous(memory_format=torch.channels_last if ctx.channels_last else torch.contiguous_format)


def keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """setup_context of a backward op."""


def refuse_second_derivative(backend: str) -> Any:
    """The backward of a backward op."""

    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        raise RuntimeError("multiscale_roi_align is not differentiable twice")

    return backward
