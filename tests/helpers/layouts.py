# SPDX-License-Identifier: Apache-2.0
"""Maps [N, C, H, W] in every kind of memory that a kernel may be handed, with poison in all that is not theirs."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Layout:
    """Axes from the outermost to the innermost, elements of border before and after each, and elements before all."""

    order: str
    border: dict[str, tuple[int, int]] = field(default_factory=dict)
    offset: int = 0

    @property
    def channels_last(self) -> bool:
        return self.order[-1] == "c"


LAYOUTS = {
    "channels_first": Layout("nchw"),
    "channels_last": Layout("nhwc"),
    # An address that 16-byte accesses are not allowed on.
    "channels_first-misaligned": Layout("nchw", offset=1),
    "channels_last-misaligned": Layout("nhwc", offset=1),
    "channels_first-cropped": Layout("nchw", {"n": (1, 1), "c": (1, 1), "h": (1, 1), "w": (3, 3)}),
    "channels_last-cropped": Layout("nhwc", {"n": (1, 1), "c": (3, 3), "h": (1, 1), "w": (1, 1)}),
    # Only the first row or pixel is where 16-byte accesses are allowed.
    "channels_first-uneven": Layout("nchw", {"w": (0, 1)}),
    "channels_last-uneven": Layout("nhwc", {"c": (0, 1)}),
    # Strides and address stay multiples of 16 bytes, and the map stays vectorised where its size allows.
    "channels_first-padded": Layout("nchw", {"n": (1, 1), "c": (2, 2), "h": (1, 1), "w": (8, 8)}),
    "channels_last-padded": Layout("nhwc", {"n": (1, 1), "c": (8, 8), "h": (1, 1), "w": (1, 1)}),
    "scrambled": Layout("wcnh", {"h": (1, 1)}),
}


def poisoned(size: tuple[int, ...], layout: Layout, dtype: torch.dtype) -> torch.Tensor:
    """A map whose whole storage is 0xFF: NaN in every floating type."""
    borders = [layout.border.get(axis, (0, 0)) for axis in "nchw"]
    extents = {axis: sum(border) + length for axis, border, length in zip("nchw", borders, size, strict=True)}
    shape = [extents[axis] for axis in layout.order]
    elements = layout.offset + torch.Size(shape).numel()
    storage = torch.full((elements * dtype.itemsize,), 0xFF, dtype=torch.uint8).view(dtype)
    tensor = storage[layout.offset :].view(shape).permute([layout.order.index(axis) for axis in "nchw"])
    for dim, (before, _) in enumerate(borders):
        tensor = tensor.narrow(dim, before, size[dim])
    return tensor


def place(values: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`values` in memory laid out so."""
    return poisoned(tuple(values.shape), layout, values.dtype).copy_(values)
