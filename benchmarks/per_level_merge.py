# SPDX-License-Identifier: Apache-2.0
"""The top-down merge as torch.compile has it, as a rival where Inductor itself cannot run: it asks for a GPU's driver.

Inductor makes one pointwise kernel for each level of `lateral + interpolate(top)`, and for its gradient one that
gathers and adds. A program takes 1024 elements in the order of memory, by four warps; sizes are constants, indices have
32 bits; nearest is a product in float32, rounded towards zero; what a level computes is rounded once. Written anew in
Triton from that description.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fpn_fast.bench.cases import Case
from fpn_fast.bench.op import Function

BLOCK, WARPS = 1024, 4


@triton.jit
def _elements(count, BLOCK: tl.constexpr, EVEN: tl.constexpr):
    """A program's elements, and which of them there are."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < count
    if EVEN:
        inside = tl.full([BLOCK], True, tl.int1)
    return index, inside


@triton.jit
def per_level_merge_kernel(
    lateral, top, out, count, INNER: tl.constexpr, H: tl.constexpr, W: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [outer, H, W, INNER] = lateral + nearest(top [outer, h, w, INNER])."""
    index, inside = _elements(count, BLOCK, EVEN)
    y = ((index // (INNER * W) % H).to(tl.float32) * (h / H)).to(tl.int32)
    x = ((index // INNER % W).to(tl.float32) * (w / W)).to(tl.int32)
    source = ((index // (INNER * W * H) * h + y) * w + x) * INNER + index % INNER
    total = tl.load(lateral + index, mask=inside).to(tl.float32) + tl.load(top + source, mask=inside).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def per_level_gather_kernel(
    fine, own, out, count, INNER: tl.constexpr, H: tl.constexpr, W: tl.constexpr, h: tl.constexpr, w: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """out [outer, h, w, INNER] = own + the sum of what reads it of fine [outer, H, W, INNER]."""
    index, inside = _elements(count, BLOCK, EVEN)
    y, x, outer = index // (INNER * w) % h, index // INNER % w, index // (INNER * w * h)
    row, row_end = (y * H + h - 1) // h, ((y + 1) * H + h - 1) // h
    column, column_end = (x * W + w - 1) // w, ((x + 1) * W + w - 1) // w
    total = tl.zeros([BLOCK], tl.float32)
    for i in tl.static_range((H + h - 1) // h):
        for j in tl.static_range((W + w - 1) // w):
            reads = inside & (row + i < row_end) & (column + j < column_end)
            source = ((outer * H + row + i) * W + column + j) * INNER + index % INNER
            total += tl.load(fine + source, mask=reads, other=0.0).to(tl.float32)
    total += tl.load(own + index, mask=inside).to(tl.float32)
    tl.store(out + index, total.to(out.dtype.element_ty), mask=inside)


def _launch(kernel: Any, first: Tensor, second: Tensor, out: Tensor, fine: torch.Size, coarse: torch.Size) -> Tensor:
    channels_last = out.is_contiguous(memory_format=torch.channels_last)
    kernel[(triton.cdiv(out.numel(), BLOCK),)](
        first, second, out, out.numel(), INNER=out.shape[1] if channels_last else 1, H=fine[0], W=fine[1], h=coarse[0],
        w=coarse[1], BLOCK=BLOCK, EVEN=out.numel() % BLOCK == 0, num_warps=WARPS,
    )  # fmt: skip
    return out


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *laterals: Tensor) -> tuple[Tensor, ...]:
        ctx.sizes = [each.shape[2:] for each in laterals]
        merged = [laterals[-1]]
        for level in reversed(range(len(laterals) - 1)):
            lateral, top = laterals[level], merged[0]
            out = torch.empty_like(lateral)
            merged.insert(0, _launch(per_level_merge_kernel, lateral, top, out, *ctx.sizes[level : level + 2]))
        return tuple(merged)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        sums = [grads[0]]
        for level, grad in enumerate(grads[1:]):
            out = torch.empty_like(grad)
            sums.append(_launch(per_level_gather_kernel, sums[-1], grad, out, *ctx.sizes[level : level + 2]))
        return tuple(sums)


def merge(laterals: Sequence[Tensor]) -> list[Tensor]:
    """Merges as ``ops.top_down`` does by nearest, of maps that are all in one memory format, differentiable once."""
    return list(_Merge.apply(*laterals))


def rivals(case: Case) -> dict[str, Function]:
    """``inductor`` for a merge."""
    return {"inductor": merge} if case.op == "top_down" else {}
