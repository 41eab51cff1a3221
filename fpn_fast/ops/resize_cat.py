# SPDX-License-Identifier: Apache-2.0
"""Resize maps to one size and concatenate them, without the resized copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast._memory_format import empty_map
from fpn_fast._torch_private import below_autograd
from fpn_fast.ops._checks import check_maps
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op, traced
from fpn_fast.ops.fuse_maps import BACKWARD, FORMS, checked_size

MOST_MAPS = 8
_IDENTITY = FORMS.index("identity")
MODES = ("nearest", "bilinear", "bilinear_align_corners")


def resize_cat(maps: Sequence[Tensor], size: int | tuple[int, int], *, mode: str = "bilinear") -> Tensor:
    """Resize maps to one size and concatenate them along the channels.

    Args:
        maps: 1 to 8 maps [N, C_k, h_k, w_k] of one dtype (float64, float32, float16 or bfloat16) and on one device,
            with any strides. Under autocast they are promoted to the widest dtype among them, like in a concatenation.
        size: (H, W) of the result, or one number for both.
        mode: ``"nearest"``, ``"bilinear"`` (default) or ``"bilinear_align_corners"``, as
            :func:`torch.nn.functional.interpolate` by size. A map that has the size is copied.

    Returns:
        [N, sum of C_k, H, W] in the dtype and memory format of ``maps[0]``. ``"nearest"`` equals a sequence of
        PyTorch's operators bit for bit. ``"bilinear"`` is computed in float32 (float64 for float64) and rounded once.

    Raises:
        TypeError: a map is not a tensor or has an unsupported dtype, or the dtypes differ.
        ValueError: there are no maps or more than 8; they are not [N, C, h, w] or differ in N or device; mode is
            unknown; size is less than 1.
        BackendUnavailableError: the requested backend cannot serve the maps' device.

    Note:
        Differentiable, twice. Two runs are equal bit for bit. The call does not synchronise with the host.

    >>> p2, p3 = torch.zeros(1, 8, 4, 6), torch.ones(1, 4, 2, 3)
    >>> resize_cat([p2, p3], (4, 6)).shape
    torch.Size([1, 12, 4, 6])

    Source: Xiao et al., Unified Perceptual Parsing, 2018; transformers/models/upernet/modeling_upernet.py.
    """
    size = checked_size(size)
    if mode not in MODES:
        raise ValueError(f'mode must be "nearest", "bilinear" or "bilinear_align_corners", got {mode!r}')
    maps = list(maps)
    if len(maps) > MOST_MAPS:
        raise ValueError(f"maps must be {MOST_MAPS} or fewer, got {len(maps)}")
    plain = backends.plain_only()
    # For torch.jit.trace sizes are tensors, which a check would turn into constants.
    if not (plain and backends.jit_traced()):
        maps = check_maps(maps, "maps", any_channels=True)
    backend = "reference" if plain else backends.choose_for(maps[0], "resize_cat")
    if backend == "reference":
        return reference.resize_cat(maps, size, mode)
    own = FORMS.index(mode)
    codes = [_IDENTITY if each.size(2) == size[0] and each.size(3) == size[1] else own for each in maps]
    if not traced() and records_gradient(maps):
        return _ResizeCat.apply(backend, size, codes, *maps)
    return call_kernel(_FORWARD[backend], maps, *size, codes)


def _gradients(
    backend: str, grad: Tensor, codes: list[int], shapes: Sequence[Sequence[int]], needs: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients of the maps, None where one is not needed. shapes: [C_k, h_k, w_k] of the maps."""
    if not traced() and torch.is_grad_enabled():
        # A second derivative is asked for. It does not depend on the maps.
        maps = [grad.new_zeros((grad.size(0), *shape)).requires_grad_() for shape in shapes]
        mode = FORMS[max(codes)] if any(codes) else "nearest"
        joined = reference.resize_cat(maps, (grad.size(2), grad.size(3)), mode)
        return list(torch.autograd.grad(joined, maps, grad, create_graph=True))
    found: list[Tensor | None] = []
    channels: list[int] = []
    first = 0
    for code, shape in zip(codes, shapes, strict=True):
        channels += [first, shape[0]]
        # The gradient of a copy is a view.
        found.append(grad.narrow(1, first, shape[0]) if code == _IDENTITY else None)
        first += shape[0]
    wanted = [k for k, need in enumerate(needs) if need and found[k] is None]
    if wanted:
        arguments = (
            [extent for k in wanted for extent in channels[2 * k : 2 * k + 2]],
            [extent for k in wanted for extent in shapes[k][1:]],
            [codes[k] for k in wanted],
        )
        grads = call_kernel(BACKWARD[backend], grad, *arguments, [], None, None)
        for k, each in zip(wanted, grads, strict=True):
            found[k] = each
    return found


class _ResizeCat(torch.autograd.Function):
    """The gradient of an eager call. The registered rule has the same formula and takes several times as long."""

    @staticmethod
    def forward(ctx: Any, backend: str, size: tuple[int, int], codes: list[int], *maps: Tensor) -> Tensor:
        ctx.rule = backend, codes, [each.shape[1:] for each in maps]
        with below_autograd():
            joined: Tensor = _FORWARD[backend](list(maps), *size, codes)
        return joined

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, codes, shapes = ctx.rule
        return None, None, None, *_gradients(backend, grad, codes, shapes, ctx.needs_input_grad[3:])


def _fake(maps: list[Tensor], height: int, width: int, forms: list[int]) -> Tensor:
    return empty_map(maps[0], sum(each.size(1) for each in maps), height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, _, ctx.codes = inputs
    ctx.shapes = [each.shape[1:] for each in maps]


def _backward(backend: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return _gradients(backend, grad, ctx.codes, ctx.shapes, ctx.needs_input_grad[0]), None, None, None

    return backward


_FORWARD = register_op("resize_cat", fake=_fake, setup_context=_setup_context, backward=_backward)
