# SPDX-License-Identifier: Apache-2.0
"""The weighted fusion of maps of several sizes: resample, weigh, add and activate in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast._memory_format import empty_map
from fpn_fast._torch_private import below_autograd
from fpn_fast.ops._checks import as_integer, as_pair, check_device, check_maps, check_shape, check_tensor
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op, traced
from fpn_fast.ops._schemas import SUM_ROWS

MOST_MAPS = 5
#: csrc/common/fuse_maps.h: enum class Form.
FORMS = (
    *("identity", "nearest", "bilinear", "bilinear_align_corners"),
    *("max_pool", "max_pool_same", "max_pool_same_zero", "max_pool_2x2", "adaptive_max"),
)
ACTIVATIONS = (None, "relu", "relu6", "silu")
_CODES = {form: code for code, form in enumerate(FORMS)}
_POOLED = _CODES["max_pool"]
#: Codes of forms, whether the rule is "fast", whether the sum is sequential, the divisor, the code of the activation.
_Options = tuple[list[int], bool, bool, int, int]


def fuse_maps(
    maps: Sequence[Tensor],
    size: int | tuple[int, int],
    *,
    resample: str | Sequence[str],
    weights: Tensor | None = None,
    weight_rule: str | None = None,
    gate: Tensor | None = None,
    rounding: str = "once",
    divide: int = 1,
    activation: str | None = None,
) -> Tensor:
    """Resample maps to one size and fuse them: ``activation(sum_k weight_k * resampled(maps[k]) / divide)``.

    Args:
        maps: 1 to 5 maps [N, C, h_k, w_k] of one dtype (float64, float32, float16 or bfloat16) and on one device, with
            any strides. Under autocast they are promoted to the widest dtype among them, like in an addition.
        size: (H, W) of the result, or one number for both.
        resample: how maps get this size; one form for all, or one per map. ``"identity"``: the map has it.
            ``"nearest"``, ``"bilinear"`` and ``"bilinear_align_corners"``: as :func:`torch.nn.functional.interpolate`
            by size. ``"max_pool"``: windows of 3 x 3 pixels with stride 2, padded by one pixel. ``"max_pool_same"``:
            the same with TensorFlow's SAME padding, which begins one pixel later where the map's side is even.
            ``"max_pool_same_zero"``: padded with zeros that take part in the maximum. ``"max_pool_2x2"``: windows of
            2 x 2 pixels with stride 2. ``"adaptive_max"``: as :func:`torch.nn.functional.adaptive_max_pool2d`.
        weights: [K], one per map, or None for a plain sum. They are converted to the maps' dtype first.
        weight_rule: None (default) takes the weights as they are. ``"softmax"`` takes their softmax. ``"fast"`` is
            BiFPN's fast normalised fusion: with ``e = relu(weights)``, map k is multiplied by ``e[k]`` and then divided
            by ``sum(e) + 1e-4``.
        gate: [N, C, 1, 1], multiplies the resampled ``maps[0]``; not together with weights.
        rounding: ``"once"`` (default) adds in float32 and rounds the sum once, as ``torch.stack(...).sum(-1)`` does;
            ``"sequential"`` rounds after each addition, as ``a + b + c`` does. For float32 and float64 they agree.
        divide: a positive integer that the rounded sum is divided by.
        activation: None (default), ``"relu"``, ``"relu6"`` or ``"silu"``.

    Returns:
        [N, C, H, W] in the dtype and memory format of ``maps[0]``. Every product, quotient and activation is rounded to
        this dtype, as in a sequence of PyTorch's operators. Without a bilinear form and ``"silu"`` the result equals
        theirs bit for bit.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype, or the maps' dtypes differ.
        ValueError: there are no maps or more than 5; they are not [N, C, h, w] or differ in N, C or device; a form,
            rule, rounding or activation is unknown; a form does not give the size; weights or gate have another shape;
            both are given; weight_rule is given without weights; size or divide is less than 1.
        BackendUnavailableError: the requested backend cannot serve the maps' device.

    Note:
        maps, weights and gate are differentiable, twice. Of equal maxima the first in the order of rows gets the
        gradient, and a NaN before any number. Two runs are equal bit for bit. The call does not synchronise with the
        host. :func:`top_down` merges a whole pathway in one call, where every merge is a plain sum of two maps.

    >>> p4, p5 = torch.ones(1, 8, 4, 4), torch.ones(1, 8, 2, 2)
    >>> fused = fuse_maps([p4, p5], (4, 4), resample=["identity", "nearest"], weights=torch.ones(2), weight_rule="fast")
    >>> print(f"{fused.unique().item():.5f}")
    0.99995

    Source: Tan et al., EfficientDet, 2020, and effdet/efficientdet.py; mmdet/models/necks for gate and divide.
    """
    size = checked_size(size)
    forms = _forms(resample, len(maps))
    _check_words(weights, weight_rule, gate, rounding, activation)
    divide = as_integer("divide", divide)
    if divide < 1:
        raise ValueError(f"divide must be 1 or more, got {divide}")
    maps = list(maps)
    plain = backends.plain_only()
    # For torch.jit.trace sizes are tensors, which a check would turn into constants.
    if not (plain and backends.jit_traced()):
        maps = check_maps(maps, "maps")
        _check_tensors(maps, size, forms, weights, gate)
    sequential = rounding == "sequential"
    backend = "reference" if plain else backends.choose_for(maps[0], "fuse_maps")
    if backend == "reference":
        return reference.fuse_maps(maps, size, forms, weights, weight_rule, gate, sequential, divide, activation)
    dtype = maps[0].dtype
    if weights is not None:
        weights = weights.to(dtype).contiguous()
        if weight_rule == "softmax":
            weights = weights.softmax(0)
    if gate is not None:
        gate = gate.to(dtype).contiguous()
    others = [each for each in (weights, gate) if each is not None]
    records = records_gradient([*maps, *others])
    # The gradient of SiLU reads the sum, which a call that applies it does not keep.
    apart = records and activation == "silu"
    codes = [_CODES[form] for form in forms]
    options = (codes, weight_rule == "fast", sequential, divide, 0 if apart else ACTIVATIONS.index(activation))
    if records and not traced():
        fused: Tensor = _FuseMaps.apply(backend, size, options, weights, gate, *maps)
    else:
        codes, fast, sequential, divide, code = options
        fused = call_kernel(_FORWARD[backend], maps, *size, codes, weights, fast, gate, sequential, divide, code)
    return F.silu(fused) if apart else fused


def checked_size(size: Any) -> tuple[int, int]:
    """Return `size` as (height, width); raise TypeError or ValueError for what is none."""
    height, width = as_pair("size", size)
    if height < 1 or width < 1:
        raise ValueError(f"size must be at least 1 x 1 pixel, got {height} x {width}")
    return height, width


def _forms(resample: str | Sequence[str], count: int) -> list[str]:
    """Return one form per map."""
    if count > MOST_MAPS:
        raise ValueError(f"maps must be {MOST_MAPS} or fewer, got {count}")
    forms = [resample] * count if isinstance(resample, str) else list(resample)
    for form in forms:
        if form not in FORMS:
            raise ValueError(f"resample must be {', '.join(FORMS[:-1])} or {FORMS[-1]}, got {form!r}")
    if len(forms) != count:
        raise ValueError(f"resample must be one form or one per map, {count}, got {len(forms)}")
    return forms


def _check_words(
    weights: Tensor | None, weight_rule: str | None, gate: Tensor | None, rounding: str, activation: str | None
) -> None:
    if weight_rule not in (None, "softmax", "fast"):
        raise ValueError(f'weight_rule must be None, "softmax" or "fast", got {weight_rule!r}')
    if weights is None and weight_rule is not None:
        raise ValueError(f"weight_rule goes with weights, got {weight_rule!r} without")
    if weights is not None and gate is not None:
        raise ValueError("gate goes without weights, got both")
    if rounding not in ("once", "sequential"):
        raise ValueError(f'rounding must be "once" or "sequential", got {rounding!r}')
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation must be None, "relu", "relu6" or "silu", got {activation!r}')


def pooled_size(form: str, height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The size that `form` gives to a map; `size` where it gives any."""
    if form == "identity":
        return height, width
    if form in ("max_pool", "max_pool_same", "max_pool_same_zero"):
        return (height + 1) // 2, (width + 1) // 2
    if form == "max_pool_2x2":
        return height // 2, width // 2
    return size


def _check_tensors(
    maps: list[Tensor], size: tuple[int, int], forms: list[str], weights: Tensor | None, gate: Tensor | None
) -> None:
    for k, (each, form) in enumerate(zip(maps, forms, strict=True)):
        height, width = pooled_size(form, each.shape[2], each.shape[3], size)
        if height != size[0] or width != size[1]:
            raise ValueError(
                f"resample {form!r} gives map {k} {height} x {width} pixels, which is not size, {size[0]} x {size[1]}"
            )
    if weights is not None:
        check_tensor(weights, "weights")
        check_shape(weights, "weights", "[K]", (len(maps),))
        check_device(weights, "weights", maps[0], "maps")
    if gate is not None:
        check_tensor(gate, "gate")
        check_shape(gate, "gate", "[N, C, 1, 1]", (maps[0].shape[0], maps[0].shape[1], 1, 1))
        check_device(gate, "gate", maps[0], "maps")


def _coefficients(
    weights: Tensor | None, fast: bool, divide: int, grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return what the gradients of maps are multiplied by, [K], with relu(weights) and their sum by the rule "fast"."""
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    if weights is None:
        return None, None, None
    if not fast:
        return weights.to(accumulate) / divide, None, None
    own = weights.relu()
    total = (own.sum() + reference.FAST_EPS).to(accumulate)
    own = own.to(accumulate)
    return own / (total * divide), own, total


def _gradients(
    backend: str,
    grad: Tensor,
    options: _Options,
    sizes: Sequence[Sequence[int]],
    saved: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Return the gradients of weights, gate and the maps, None where one is not needed.

    saved: the result where a ReLU needs it, weights, gate and the maps, None for those that are not kept; needs: of
    weights, gate and the maps; sizes: those of the maps.
    """
    y, weights, gate, *maps = saved
    codes, fast, _, divide, activation = options
    if y is not None:
        ops = torch.ops.aten
        is_relu = ACTIVATIONS[activation] == "relu"
        grad = ops.threshold_backward(grad, y, 0) if is_relu else ops.hardtanh_backward(grad, y, 0, 6)
    if not traced() and torch.is_grad_enabled():
        return _twice(grad, options, sizes, [weights, gate, *maps], needs)
    found: list[Tensor | None] = [None] * len(needs)
    coefficients, own, total = _coefficients(weights, fast, divide, grad)
    if coefficients is None and divide != 1:
        accumulate = torch.promote_types(grad.dtype, torch.float32)
        coefficients = grad.new_full((len(maps),), 1 / divide, dtype=accumulate)
    wanted = [k for k in range(len(maps)) if needs[2 + k]]
    if coefficients is None:
        for k in wanted:
            if codes[k] == _CODES["identity"] and (k > 0 or gate is None):
                found[2 + k] = grad
        wanted = [k for k in wanted if found[2 + k] is None]
    if wanted:
        if coefficients is not None and len(wanted) < len(maps):
            coefficients = torch.stack([coefficients[k] for k in wanted])
        pooled = [each for k in wanted if codes[k] >= _POOLED and (each := maps[k]) is not None]
        arguments = (
            [extent for _ in wanted for extent in (0, grad.size(1))],
            [extent for k in wanted for extent in sizes[k]],
            [codes[k] for k in wanted],
        )
        gates = gate if wanted[0] == 0 else None
        grads = call_kernel(BACKWARD[backend], grad, *arguments, pooled, coefficients, gates)
        for k, each in zip(wanted, grads, strict=True):
            found[2 + k] = each
    if weights is not None and needs[0]:
        sums = call_kernel(_SUMS[backend], grad, maps, codes).sum((0, 1, 3))
        if own is not None and total is not None:
            sums = (sums / total - (own * sums).sum() / total.square()).where(weights > 0, 0)
        found[0] = (sums / divide).to(grad.dtype)
    if gate is not None and needs[1]:
        sums = call_kernel(_SUMS[backend], grad, maps[:1], codes[:1]).sum(1)
        found[1] = (sums / divide).to(grad.dtype).view(gate.shape)
    return found


def _twice(
    grad: Tensor,
    options: _Options,
    sizes: Sequence[Sequence[int]],
    inputs: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients for a second derivative: the same in operators that autograd knows."""
    codes, fast, sequential, divide, _ = options
    weights, gate, *maps = inputs
    # A gradient does not depend on the maps that are not kept.
    own = [
        grad.new_zeros((*grad.shape[:2], *size)).requires_grad_() if each is None else each
        for each, size in zip(maps, sizes, strict=True)
    ]
    rule = "fast" if fast else None
    forms = [FORMS[code] for code in codes]
    size = (grad.size(2), grad.size(3))
    fused = reference.fuse_maps(own, size, forms, weights, rule, gate, sequential, divide)
    leaves = [weights, gate, *own]
    wanted = [k for k, need in enumerate(needs) if need]
    chosen = [each for k in wanted if (each := leaves[k]) is not None]
    grads = torch.autograd.grad(fused, chosen, grad, create_graph=True)
    found: list[Tensor | None] = [None] * len(needs)
    for k, each in zip(wanted, grads, strict=True):
        found[k] = each
    return found


def _kept(
    options: _Options, weights: Tensor | None, gate: Tensor | None, maps: Sequence[Tensor], y: Tensor
) -> list[Tensor | None]:
    """What the gradient reads: see :func:`_gradients`."""
    codes, _, _, _, activation = options
    every = weights is not None and weights.requires_grad
    first = gate is not None and gate.requires_grad
    kept = [m if every or (first and k == 0) or codes[k] >= _POOLED else None for k, m in enumerate(maps)]
    return [y if activation else None, weights, gate, *kept]


class _FuseMaps(torch.autograd.Function):
    """The gradient of an eager call. The registered rule has the same formula and takes several times as long."""

    @staticmethod
    def forward(
        ctx: Any,
        backend: str,
        size: tuple[int, int],
        options: _Options,
        weights: Tensor | None,
        gate: Tensor | None,
        *maps: Tensor,
    ) -> Tensor:
        codes, fast, sequential, divide, activation = options
        with below_autograd():
            y: Tensor = _FORWARD[backend](list(maps), *size, codes, weights, fast, gate, sequential, divide, activation)
        ctx.rule = backend, options, [each.shape[2:] for each in maps]
        ctx.save_for_backward(*_kept(options, weights, gate, maps, y))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        backend, options, sizes = ctx.rule
        needs = ctx.needs_input_grad[3:]
        return None, None, None, *_gradients(backend, grad, options, sizes, ctx.saved_tensors, needs)


def _fake(
    maps: list[Tensor],
    height: int,
    width: int,
    forms: list[int],
    weights: Tensor | None,
    fast: bool,
    gate: Tensor | None,
    sequential: bool,
    divide: int,
    activation: int,
) -> Tensor:
    return empty_map(maps[0], maps[0].size(1), height, width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    maps, _, _, codes, weights, fast, gate, sequential, divide, activation = inputs
    ctx.options = codes, fast, sequential, divide, activation
    ctx.sizes = [each.shape[2:] for each in maps]
    ctx.save_for_backward(*_kept(ctx.options, weights, gate, maps, output))


def _backward(backend: str) -> Any:
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        maps, _, _, _, weights, _, gate, *_ = ctx.needs_input_grad
        found = _gradients(backend, grad, ctx.options, ctx.sizes, ctx.saved_tensors, [weights, gate, *maps])
        return found[2:], None, None, None, found[0], None, found[1], None, None, None

    return backward


def _fake_backward(
    grad: Tensor,
    channels: list[int],
    sizes: list[int],
    forms: list[int],
    pooled: list[Tensor],
    coefficients: Tensor | None,
    gate: Tensor | None,
) -> list[Tensor]:
    counts, heights, widths = channels[1::2], sizes[::2], sizes[1::2]
    return [empty_map(grad, *extents) for extents in zip(counts, heights, widths, strict=True)]


def _fake_sums(grad: Tensor, maps: list[Tensor], forms: list[int]) -> Tensor:
    accumulate = torch.promote_types(grad.dtype, torch.float32)
    bands = (grad.size(2) + SUM_ROWS - 1) // SUM_ROWS
    return grad.new_empty((grad.size(0), bands, len(maps), grad.size(1)), dtype=accumulate)


_FORWARD = register_op("fuse_maps", fake=_fake, setup_context=_setup_context, backward=_backward)
#: The gradients of resampled maps; resize_cat has them too.
BACKWARD = register_op("resample_backward", fake=_fake_backward)
_SUMS = register_op("resample_sums", fake=_fake_sums)
