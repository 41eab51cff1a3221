# SPDX-License-Identifier: Apache-2.0
"""Random cases from a seed: the same values on every device and for every backend."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from fpn_fast._memory_format import memory_format

T = TypeVar("T")
NAN, INF = float("nan"), float("inf")
#: Memory layouts of a map. A view lies in a larger map of NaN, so that a read outside of it shows.
LAYOUTS = ("contiguous", "channels_last", "view", "channels_last view", "transposed")


class Draw:
    """The source of one case.

    name, dtype, number: the seed. The number also selects a check's flavour, each in its turn.
    small: whether to draw smaller sizes, for slow backends.
    given: sizes that a user has asked for instead of random ones.
    """

    def __init__(
        self, name: str, number: int, dtype: torch.dtype, device: str, *, small: bool = False, given: Any = None
    ) -> None:
        # A string seeds the same in every process, a hash does not.
        self.random = random.Random(f"{name} {dtype} {number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(62))
        self.number, self.dtype, self.device, self.small = number, dtype, device, small
        self.given: dict[str, Any] = dict(given or {})

    @property
    def wide(self) -> torch.dtype:
        """The dtype of boxes that go with features of `dtype`."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def flavour(self, *names: str) -> str:
        """One of `names`, each in its turn."""
        return names[self.number % len(names)]

    def size(self, key: str, draw: Callable[[], T]) -> T:
        """The size that the user gave as `key`, or a drawn one."""
        return self.given[key] if key in self.given else draw()

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return self.random.randint(low, high)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def choice(self, values: Sequence[T]) -> T:
        return self.random.choice(values)

    def channels(self) -> int:
        """A number of channels: a multiple of a vector's width, less than one vector, or more with a remainder."""
        counts = (1, 3, 4, 7) if self.small else (1, 3, 4, 8, 11, 16, 19, 33, 64, 67)
        return self.size("channels", lambda: self.choice(counts))

    def pyramid(self, levels: int) -> list[tuple[int, int]]:
        """(H, W) per map, finest first, in ratios of 2, about 2, or any."""
        if "sizes" in self.given:
            return [(int(height), int(width)) for height, width in self.given["sizes"]]
        largest = 12 if self.small else 48
        kind = self.choice(("doubled", "about doubled", "about doubled", "any"))
        sizes = [(self.integer(1, 6), self.integer(1, 7))]
        while len(sizes) < levels:
            height, width = sizes[0]
            if kind == "any":
                finer = (self.integer(1, largest), self.integer(1, largest))
            elif kind == "doubled":
                finer = (2 * height, 2 * width)
            else:
                finer = (2 * height + self.integer(-1, 1), 2 * width + self.integer(-1, 1))
            sizes.insert(0, (min(max(finer[0], 1), largest), min(max(finer[1], 1), largest)))
        return sizes

    def layout(self, *names: str) -> str:
        return self.choice(names or LAYOUTS)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal float64 values on the CPU."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform float64 values from 0 to 1 on the CPU."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """int64 values from low to high, both included, on the CPU."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def place(self, tensor: Tensor, layout: str = "contiguous") -> Tensor:
        """`tensor` in this case's dtype, on its device and in `layout`, detached."""
        tensor = tensor.to(self.dtype).to(self.device)
        if tensor.dim() != 4 or layout == "contiguous":
            return tensor.contiguous()
        if layout == "channels_last":
            return tensor.contiguous(memory_format=torch.channels_last)
        if layout == "transposed":
            return tensor.transpose(2, 3).contiguous().transpose(2, 3)
        n, c, h, w = tensor.shape
        form = torch.channels_last if layout == "channels_last view" else torch.contiguous_format
        frame = torch.full((n, c + 1, h + 2, w + 3), NAN, dtype=self.dtype, device=self.device)
        view = frame.contiguous(memory_format=form)[:, :c, 1:-1, 1:-2]
        view.copy_(tensor)
        return view

    def maps(self, batch: int, channels: int, sizes: Sequence[tuple[int, int]], layout: str) -> list[Tensor]:
        """Standard normal maps [batch, channels, *size]."""
        return [self.place(self.normal(batch, channels, *size), layout) for size in sizes]

    def seeds(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of `outputs`: dense, transposed, or one value expanded, like the gradient of a sum."""
        kind = self.choice(("dense", "dense", "transposed", "expanded"))
        made = []
        for output in outputs:
            if kind == "expanded":
                # A power of two, whose multiples are exact: rounding errors of equal terms would add up.
                number = torch.tensor(self.choice((1.0, 0.5, -2.0)), dtype=output.dtype, device=self.device)
                made.append(number.expand(output.shape))
                continue
            seed = self.normal(*output.shape).to(output.dtype).to(self.device)
            made.append(seed.mT.contiguous().mT if kind == "transposed" and seed.dim() == 4 else seed)
        return made


def form_of(maps: Sequence[Tensor], layout: str) -> torch.memory_format | None:
    """The memory format of results for maps of `layout`; None where none is promised."""
    return memory_format(maps[0]) if layout in ("contiguous", "channels_last") else None


def text_of(maps: Sequence[Tensor]) -> str:
    """The shapes of maps as text: ``2x16x[25x42, 13x21]``."""
    if not maps:
        return "no maps"
    sizes = ", ".join("x".join(map(str, m.shape[2:])) for m in maps)
    return f"{maps[0].shape[0]}x{maps[0].shape[1]}x[{sizes}]"


def padded(table: Tensor, room: int, value: float = -1) -> Tensor:
    """[K, ...] -> [room, ...] with `value` in the rows added, so that lists of different lengths can be compared."""
    return torch.nn.functional.pad(table, [0, 0] * (table.dim() - 1) + [0, room - len(table)], value=value)
