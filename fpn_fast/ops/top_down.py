# SPDX-License-Identifier: Apache-2.0
"""The top-down merge of a feature pyramid: upsample and lateral add, the whole pathway in one call."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from fpn_fast import backends, reference
from fpn_fast._memory_format import memory_format
from fpn_fast._torch_private import below_autograd
from fpn_fast.ops._checks import check_maps
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op, traced

# csrc/common/resample.h: enum class Resample.
_NEAREST, _BILINEAR, _BILINEAR_ALIGN_CORNERS = 0, 1, 2


def top_down(
    laterals: Sequence[Tensor],
    mode: str = "nearest",
    *,
    align_corners: bool = False,
    scale_factor: int | None = None,
    fuse: str = "sum",
) -> list[Tensor]:
    """Merge a pyramid top-down: ``merged[l] = laterals[l] + resample(merged[l + 1])``, ``merged[-1] = laterals[-1]``.

    Args:
        laterals: L maps [N, C, H_l, W_l], finest first, of one dtype (float64, float32, float16 or bfloat16) and on one
            device, with any strides. Under autocast they are promoted to the widest dtype among them, like in an
            addition.
        mode: ``"nearest"`` (default) or ``"bilinear"``. The coarser map is resampled to the lateral's size, whatever
            the ratio.
        align_corners: see :func:`torch.nn.functional.interpolate`; for ``"bilinear"`` only. False by default.
        scale_factor: if given, each lateral must be exactly this many times as high and wide as the map above it, as in
            detectron2.
        fuse: ``"sum"`` (default), or ``"avg"`` for half the sum (detectron2's ``fuse_type="avg"``).

    Returns:
        L maps with the shapes, dtype and memory formats of their laterals. The last is ``laterals[-1]`` itself. Every
        level is computed in float32 (float64 for float64) and rounded once to the storage type. ``"nearest"`` equals
        ``lateral + F.interpolate(top, size)`` bit for bit. Twice differentiable. ``torch.compile`` gets that sequence
        where no gradient is recorded, and fuses it.

    Raises:
        TypeError: a lateral is not a tensor or has an unsupported dtype, or the dtypes differ.
        ValueError: laterals are missing, empty, not [N, C, H, W], or differ in N, C or device; mode or fuse is unknown;
            align_corners is given without bilinear; scale_factor is not a positive integer or does not fit the sizes.
        BackendUnavailableError: the requested backend cannot serve the laterals' device.

    >>> merged = top_down([torch.ones(1, 8, 4, 6), torch.ones(1, 8, 2, 3)])
    >>> merged[0].unique().item()
    2.0

    Source: Lin et al., Feature Pyramid Networks for Object Detection, 2017;
    torchvision/ops/feature_pyramid_network.py.
    """
    return _merge(list(laterals), mode, align_corners, scale_factor, fuse)


def upsample_add(
    lateral: Tensor,
    top: Tensor,
    mode: str = "nearest",
    *,
    align_corners: bool = False,
    scale_factor: int | None = None,
    fuse: str = "sum",
) -> Tensor:
    """Return ``lateral + resample(top to lateral's size)``: :func:`top_down` for two maps.

    Args:
        lateral: [N, C, H, W].
        top: [N, C, h, w].
        mode, align_corners, scale_factor, fuse: see :func:`top_down`.

    Returns:
        [N, C, H, W] in the lateral's dtype and memory format.

    Raises:
        TypeError, ValueError, BackendUnavailableError: see :func:`top_down`.
    """
    return _merge([lateral, top], mode, align_corners, scale_factor, fuse)[0]


def _merge(laterals: list[Tensor], mode: str, align_corners: bool, scale_factor: int | None, fuse: str) -> list[Tensor]:
    code = _check_options(mode, align_corners, fuse)
    if laterals and not isinstance(laterals[0], Tensor) and has_torch_function(laterals):
        # torch.fx records the op as one node.
        options = {"align_corners": align_corners, "scale_factor": scale_factor, "fuse": fuse}
        found = handle_torch_function(top_down, laterals, laterals, mode, **options)
        return [found[i] for i in range(len(laterals))]
    plain = backends.plain_only()
    # For torch.jit.trace sizes are tensors, which a check would turn into constants.
    if not (plain and backends.jit_traced()):
        laterals = check_maps(laterals, "laterals")
        if scale_factor is not None:
            _check_scale_factor(laterals, scale_factor)
    average = fuse == "avg"
    plain = plain or _left_to_a_compiler(laterals, code)
    backend = "reference" if plain else backends.choose_for(laterals[0], "top_down")
    if backend == "reference":
        return reference.top_down(laterals, mode, align_corners=align_corners, average=average)
    if not traced() and records_gradient(laterals):
        merged = _TopDown.apply(backend, code, average, *laterals)
    else:
        merged = call_kernel(_FORWARD[backend], laterals, code, average)
    return [*merged, laterals[-1]]


def _left_to_a_compiler(laterals: list[Tensor], code: int) -> bool:
    """Whether the merge goes to a compiler as plain additions, which it fuses with what is around them.

    The values are equal. With gradients the op stays: what Inductor makes of upsampling's gradient scatters. So it does
    where F.interpolate would round (bilinear) or would read a source in Python (the float64 reference).
    """
    return (
        torch.compiler.is_compiling()
        and backends.requested() == "auto"
        and code == _NEAREST
        and laterals[0].dtype != torch.float64
        and not records_gradient(laterals)
    )


def _check_options(mode: str, align_corners: bool, fuse: str) -> int:
    if fuse != "sum" and fuse != "avg":
        raise ValueError(f'fuse must be "sum" or "avg", got {fuse!r}')
    if mode == "nearest":
        if align_corners:
            raise ValueError('align_corners goes with mode="bilinear", got mode="nearest"')
        return _NEAREST
    if mode == "bilinear":
        return _BILINEAR_ALIGN_CORNERS if align_corners else _BILINEAR
    raise ValueError(f'mode must be "nearest" or "bilinear", got {mode!r}')


def _check_scale_factor(laterals: list[Tensor], scale_factor: int) -> None:
    if int(scale_factor) != scale_factor or scale_factor < 1:
        raise ValueError(
            f"scale_factor must be a positive integer, got {scale_factor}; other ratios resample to the lateral's size"
        )
    # An integer of numpy may overflow below.
    scale_factor = int(scale_factor)
    for i, (lateral, top) in enumerate(itertools.pairwise(laterals)):
        height, width = top.shape[2] * scale_factor, top.shape[3] * scale_factor
        if lateral.shape[2] != height or lateral.shape[3] != width:
            raise ValueError(
                f"with scale_factor={scale_factor}, lateral {i} must be {int(height)} x {int(width)} pixels to fit the "
                f"map above, got {lateral.shape[2]} x {lateral.shape[3]}; pad the image to a multiple of the coarsest "
                "stride, or leave scale_factor out"
            )


def _fake(laterals: list[Tensor], mode: int, average: bool) -> list[Tensor]:
    check_maps(laterals, "laterals")
    return [torch.empty_like(lateral, memory_format=memory_format(lateral)) for lateral in laterals[:-1]]


def _fake_backward(
    grads: list[Tensor], coarse_height: int, coarse_width: int, mode: int, average: bool
) -> list[Tensor]:
    last = grads[-1]
    coarsest = torch.empty(
        (last.size(0), last.size(1), coarse_height, coarse_width),
        dtype=last.dtype,
        device=last.device,
        memory_format=memory_format(last),
    )
    return [*(torch.empty_like(grad, memory_format=memory_format(grad)) for grad in grads[1:]), coarsest]


def _lateral_grads(
    grads: Sequence[Tensor], coarser: bool, backend: str, mode: int, average: bool, coarse_size: Sequence[int]
) -> list[Tensor | None]:
    """Return the gradients of all laterals; only the finest one's unless `coarser`.

    grads: of the merged maps without the coarsest; coarse_size: (h, w) of the coarsest. The gradient of the finest
    lateral is that of its merged map. A coarser one also gathers the gradients of the pixels that read it.
    """
    finest = grads[0] / 2 if average else grads[0]
    if not coarser:
        return [finest, *([None] * len(grads))]
    own, op = [finest, *grads[1:]], _BACKWARD[backend]
    arguments = (own, *coarse_size, mode, average)
    return [finest, *(op(*arguments) if records_gradient(own) else call_kernel(op, *arguments))]


class _TopDown(torch.autograd.Function):
    """The gradient of an eager call. The registered rule has the same formula and takes several times as long."""

    @staticmethod
    def forward(ctx: Any, backend: str, mode: int, average: bool, *laterals: Tensor) -> tuple[Tensor, ...]:
        ctx.rule = backend, mode, average, laterals[-1].shape[2:]
        with below_autograd():
            return tuple(_FORWARD[backend](list(laterals), mode, average))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, None, *_lateral_grads(grads, any(ctx.needs_input_grad[4:]), *ctx.rule)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    laterals, ctx.mode, ctx.average = inputs
    ctx.coarse_size = tuple(laterals[-1].shape[2:])
    ctx.shapes = [tuple(lateral.shape) for lateral in laterals[:-1]]
    ctx.like = laterals[0].new_empty(0)


def _backward(backend: str) -> Any:
    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        full = [ctx.like.new_zeros(s) if g is None else g for g, s in zip(grads, ctx.shapes, strict=True)]
        lateral_grads = _lateral_grads(full, True, backend, ctx.mode, ctx.average, ctx.coarse_size)
        return lateral_grads, None, None

    return backward


def _setup_context_backward(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    grads, _, _, ctx.mode, ctx.average = inputs
    ctx.like = grads[0].new_empty(0)
    ctx.shapes = [tuple(grads[0].shape), *(tuple(sums.shape) for sums in output)]


def _double_backward(backend: str) -> Any:
    """The gather's transpose is the merge of the incoming gradients, with zeros at the finest level."""

    def backward(ctx: Any, grad_sums: list[Tensor | None]) -> tuple[Any, ...]:
        laterals = [
            ctx.like.new_zeros(s) if g is None else g for g, s in zip([None, *grad_sums], ctx.shapes, strict=True)
        ]
        merged = _FORWARD[backend](laterals, ctx.mode, ctx.average)
        # The gather does not halve the finest gradient; the merge did.
        finest = merged[0] * 2 if ctx.average else merged[0]
        return [finest, *merged[1:]], None, None, None, None

    return backward


_FORWARD = register_op("top_down", fake=_fake, setup_context=_setup_context, backward=_backward)
_BACKWARD = register_op(
    "top_down_backward", fake=_fake_backward, setup_context=_setup_context_backward, backward=_double_backward
)
