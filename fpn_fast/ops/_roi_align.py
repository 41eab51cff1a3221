# SPDX-License-Identifier: Apache-2.0
"""The ops of multi-level RoIAlign in both pool modes: their rules for tracers and autograd, and their references.

A forward op takes (features, rois, levels, pooled_height, pooled_width, *rule), where `rule` is (scales, thresholds,
sampling_ratio, aligned). In max mode it also returns the winners. A backward op takes (grad, *saved, batch, sizes,
*rule, channels_last), where `saved` is (rois, levels), in max mode (winners, rois, levels).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fpn_fast import backends, reference
from fpn_fast._memory_format import is_channels_last, memory_format
from fpn_fast._torch_private import below_autograd
from fpn_fast.ops._outputs import empty_grads, empty_pooled, empty_pooled_and_winners
from fpn_fast.ops._registration import call_each_sample, call_kernel, records_gradient, register_op, traced
from fpn_fast.ops.levels import levels_by_area

_ONCE = "multiscale_roi_align is not differentiable twice, which create_graph=True asks for"
# The arguments of a backward op after its tensors.
_UNSAVED = 7


class _RoIAlign(torch.autograd.Function):
    """The gradient of an eager call. The registered rules have the same formula and take several times as long."""

    @staticmethod
    def forward(
        ctx: Any, name: str, backend: str, rois: Tensor, levels: Tensor | None, rule: tuple[Any, ...], *features: Tensor
    ) -> Any:
        forward_ops, backward_ops = _OPS[name]
        ctx.op = backward_ops[backend]
        with below_autograd():
            output = forward_ops[backend](list(features), rois, levels, *rule)
        _setup_context(ctx, (features, rois, levels, *rule), output)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (5 + len(ctx.sizes) // 2)
        with below_autograd():
            return (None,) * 5 + tuple(_feature_grads(ctx.op, grad, _backward_arguments(ctx)))


class _Transformed(torch.autograd.Function):
    """The forward op under torch.func's transforms and in forward mode. Its setup_context costs an eager call 50 us."""

    @staticmethod
    def forward(
        name: str, backend: str, rois: Tensor, levels: Tensor | None, rule: tuple[Any, ...], *features: Tensor
    ) -> Any:
        return _OPS[name][0][backend](list(features), rois, levels, *rule)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        ctx.name, ctx.backend, rois, levels, ctx.full_rule, *features = inputs
        _setup_context(ctx, (features, rois, levels, *ctx.full_rule), output)
        ctx.save_for_forward(rois, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None = None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (5 + len(ctx.sizes) // 2)
        return (None,) * 5 + _TransformedBackward.apply(ctx.name, ctx.backend, grad, *_backward_arguments(ctx))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        if ctx.name != "multiscale_roi_align":
            raise RuntimeError("multiscale_roi_align has no forward-mode derivative for pool_mode='max'")
        pooled: Tensor = _Transformed.apply(ctx.name, ctx.backend, *ctx.saved_tensors, ctx.full_rule, *tangents[5:])
        return pooled

    @staticmethod
    def vmap(*arguments: Any) -> Any:
        return call_each_sample(_Transformed.apply, *arguments)


class _TransformedBackward(torch.autograd.Function):
    """The backward op there: linear in the gradient too."""

    @staticmethod
    def forward(name: str, backend: str, grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_feature_grads(_OPS[name][1][backend], grad, arguments))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.backend, _, *arguments = inputs
        ctx.save_for_forward(*arguments[:-_UNSAVED])
        ctx.unsaved = arguments[-_UNSAVED:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raise RuntimeError(_ONCE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, ...]:
        grads: tuple[Tensor, ...] = _TransformedBackward.apply(
            ctx.name, ctx.backend, tangents[2], *ctx.saved_tensors, *ctx.unsaved
        )
        return grads

    @staticmethod
    def vmap(*arguments: Any) -> Any:
        return call_each_sample(_TransformedBackward.apply, *arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
    """Keep what a gradient needs: the sizes of the features, not the features."""
    features, rois, levels, _, _, *ctx.rule = inputs
    if isinstance(output, tuple):
        _, winners = output
        ctx.save_for_backward(winners, rois, levels)
        ctx.mark_non_differentiable(winners)
        ctx.set_materialize_grads(False)
    else:
        ctx.save_for_backward(rois, levels)
    ctx.batch = features[0].size(0)
    ctx.sizes = [size for feature in features for size in feature.shape[2:]]
    ctx.channels_last = is_channels_last(features[0])


def _backward_arguments(ctx: Any) -> tuple[Any, ...]:
    return *ctx.saved_tensors, ctx.batch, ctx.sizes, *ctx.rule, ctx.channels_last


def _feature_grads(op: Callable[..., list[Tensor]], grad: Tensor, arguments: tuple[Any, ...]) -> list[Tensor]:
    # Many pixels read one bin: a copy in the maps' memory format costs less than strided reads.
    grad = grad.contiguous(memory_format=torch.channels_last if arguments[-1] else torch.contiguous_format)
    return op(grad, *arguments)


def _keep_nothing(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    """setup_context of a backward op."""


def _refuse_second_derivative(backend: str) -> Callable[..., Any]:
    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        raise RuntimeError(_ONCE)

    return backward


def _register(
    name: str, empty: Callable[..., Any], specification: Callable[..., Any], specification_backward: Callable[..., Any]
) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    def backward(backend: str) -> Callable[..., Any]:
        def rule(ctx: Any, grad: Tensor | None, _: Tensor | None = None) -> tuple[Any, ...]:
            grads = None if grad is None else _feature_grads(backward_ops[backend], grad, _backward_arguments(ctx))
            return grads, *[None] * 8

        return rule

    def run_reference(
        features: list[Tensor], rois: Tensor, levels: Tensor | None, height: int, width: int,
        scales: list[float], thresholds: list[float], *rule: Any,
    ) -> Any:  # fmt: skip
        if levels is None:
            levels = levels_by_area(rois, len(features), thresholds)
        form = memory_format(features[0])
        # Autocast would round the products of the specification.
        with torch.autocast(features[0].device.type, enabled=False):
            found = specification(features, rois, levels, (height, width), scales, *rule)
        if isinstance(found, Tensor):
            return found.contiguous(memory_format=form)
        return tuple(each.contiguous(memory_format=form) for each in found)

    def run_reference_backward(grad: Tensor, *arguments: Any) -> list[Tensor]:
        *winners, rois, levels, batch, sizes, scales, thresholds, sampling_ratio, aligned, channels_last = arguments
        if levels is None:
            levels = levels_by_area(rois, len(sizes) // 2, thresholds)
        pairs = list(zip(sizes[::2], sizes[1::2], strict=True))
        with torch.autocast(grad.device.type, enabled=False):
            grads = specification_backward(grad, *winners, rois, levels, batch, pairs, scales, sampling_ratio, aligned)
        form = torch.channels_last if channels_last else torch.contiguous_format
        return [each.contiguous(memory_format=form) for each in grads]

    forward_ops = register_op(
        name, fake=empty, setup_context=_setup_context, backward=backward, reference=run_reference
    )
    backward_ops = register_op(
        f"{name}_backward",
        fake=empty_grads,
        setup_context=_keep_nothing,
        backward=_refuse_second_derivative,
        reference=run_reference_backward,
    )
    return forward_ops, backward_ops


_FORWARD, _BACKWARD = _register(
    "multiscale_roi_align", empty_pooled, reference.multiscale_roi_align, reference.multiscale_roi_align_backward
)
_MAX_FORWARD, _MAX_BACKWARD = _register(
    "multiscale_roi_align_max",
    empty_pooled_and_winners,
    reference.multiscale_roi_align_max,
    reference.multiscale_roi_align_max_backward,
)
_OPS = {
    "multiscale_roi_align": (_FORWARD, _BACKWARD),
    "multiscale_roi_align_max": (_MAX_FORWARD, _MAX_BACKWARD),
}


def pool(name: str, features: list[Tensor], rois: Tensor, levels: Tensor | None, *rule: Any) -> Any:
    """Run the forward op `name` on checked arguments, with a gradient where autograd records one."""
    backend = backends.choose_for(features[0], name)
    if backends.transformed():
        return _Transformed.apply(name, backend, rois, levels, rule, *features)
    if not traced() and records_gradient(features):
        return _RoIAlign.apply(name, backend, rois, levels, rule, *features)
    return call_kernel(_OPS[name][0][backend], features, rois, levels, *rule)
