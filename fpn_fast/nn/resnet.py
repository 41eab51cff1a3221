# SPDX-License-Identifier: Apache-2.0
"""The residual blocks of torchvision's ResNet, ResNeXt and Wide ResNet: norm, residual and ReLU in one pass each.

:func:`fpn_fast.accelerate` swaps them in. Keys, parameters and results are torchvision's. The blocks of other libraries
share :func:`may_fuse` and :func:`run_block`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNormBase

from fpn_fast import _torch_private, backends
from fpn_fast.nn._own import Steps
from fpn_fast.nn._shared import Layer, recorded
from fpn_fast.nn.frozen_batch_norm import STEPS as _NORM_STEPS
from fpn_fast.nn.frozen_batch_norm import FrozenBatchNorm2d, known_vectors, rule_of, run_norm

#: Norms that have, or may have, fixed statistics, and the steps of those that are swapped by themselves.
NORMS: dict[type, Steps | None] = {}
#: The parts that a fused block does not call, and what calling them runs.
_FORWARDS: dict[type, Callable[..., Any]] = {nn.ReLU: nn.ReLU.forward, nn.Sequential: nn.Sequential.forward}


def know(kind: type[nn.Module]) -> None:
    """Adds a class of modules that a fused block may leave out."""
    _FORWARDS[kind] = kind.forward


def know_norm(kind: type[nn.Module], steps: Steps | None = None) -> None:
    """Adds a class of norms; steps: of the class of its library."""
    know(kind)
    NORMS[kind] = steps


know_norm(nn.BatchNorm2d)
know_norm(nn.SyncBatchNorm)
know_norm(_FrozenBatchNormBase, _NORM_STEPS)
know_norm(FrozenBatchNorm2d, _NORM_STEPS)


def change(part: Any, kinds: Container[type]) -> str | None:
    """What calling `part` does beside the forward pass of one of `kinds`; None where nothing."""
    kind = type(part)
    if kind not in kinds:
        return kind.__name__
    steps = NORMS.get(kind)
    own = kind.forward is _FORWARDS[kind] and "forward" not in vars(part)
    if not own or (steps is not None and not steps.are_own(part)):
        return "forward"
    return "hooks" if _torch_private.has_hooks(part) else None


class Parts(Steps):
    """The norms and the activation of a block, for the report of accelerate().

    Args:
        base: the class of its library.
        parts: dotted name of a part -> the classes that are fused.
    """

    def __init__(self, base: type, parts: dict[str, Container[type]]) -> None:
        super().__init__(base)
        self._parts = parts

    def changed(self, module: object) -> list[str]:
        # Other subclasses of the library's block are not fused.
        if not isinstance(module, FusedBlock):
            return []
        changes = {name: change(attrgetter(name)(module), kinds) for name, kinds in self._parts.items()}
        return [f"{name} ({changed})" for name, changed in changes.items() if changed]


class FusedBlock:
    """Marks the blocks of all libraries that are fused."""


def is_fixed(norm: Any) -> bool:
    """Whether `norm` is of a kind in NORMS, called plainly, and has fixed statistics now."""
    if change(norm, NORMS) is not None:
        return False
    live = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm)) and (norm.training or norm.running_mean is None)
    return not live


def may_fuse(block: Any, x: Any, steps: Steps, norms: Sequence[Any]) -> bool:
    """Whether :func:`run_block` may stand for the library's forward pass of `block` in this call.

    steps: of the class of its library; norms: those of the block. Activation and convolutions are the caller's to ask.
    """
    # A compiler fuses the library's operators itself.
    if torch.compiler.is_compiling() or recorded(x) or _torch_private.has_global_hooks():
        return False
    fixed = all(map(is_fixed, norms)) and steps.are_own(block)
    return fixed and not backends.falls_back(block, x, "frozen_batch_norm")


def run_block(
    relu: Layer, x: Tensor, convs: Sequence[Layer], norms: Sequence[Any], down: Layer | None, down_norm: Any = None
) -> Tensor:
    """The forward pass of a block whose norms are fixed. Its end is one call of the op.

    down: what makes the residual of x, None for x itself; down_norm: a norm after it that is not part of it.
    """
    out = x
    for conv, norm in zip(convs[:-1], norms[:-1], strict=True):
        out = _normalise(relu, norm, conv(out))
    out = convs[-1](out)
    residual, last = x if down is None else down(x), norms[-1]
    # One call has one eps and one rule.
    alike = (
        down_norm is not None
        and is_fixed(down_norm)
        and down_norm.eps == last.eps
        and rule_of(down_norm, residual) == rule_of(last, out)
    )
    if down_norm is not None and not alike:
        residual, down_norm = down_norm(residual), None
    return _normalise(relu, last, out, residual, down_norm)


def _normalise(relu: Layer, norm: Any, x: Tensor, residual: Tensor | None = None, residual_norm: Any = None) -> Tensor:
    """``relu(norm(x) + residual_norm(residual))`` by the op, or by the modules where it does not know the inputs."""
    known = known_vectors(norm, x, residual, residual_norm)
    if known is not None:
        return run_norm(norm, x, known, residual, relu=True)
    y: Tensor = norm(x)
    if residual is not None:
        y += residual if residual_norm is None else residual_norm(residual)
    return relu(y)


def _split(down: Any) -> tuple[Any, Any]:
    """(layers, norm) of a downsampling that ends in a norm, or (what it is, None)."""
    if change(down, (nn.Sequential,)) is not None or len(down) < 2:
        return down, None
    *layers, norm = down
    return lambda x: functools.reduce(lambda y, layer: layer(y), layers, x), norm


class ResidualBlock(FusedBlock):
    """The forward pass of blocks of the usual make: norms, one activation, and a downsampling or none."""

    # Of the class of its library, and the names of its convolutions and norms.
    _steps: Steps
    _convs: Sequence[str]
    _norms: Sequence[str]
    relu: Any
    downsample: Any

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C_out, H / stride, W / stride]."""
        norms = [getattr(self, name) for name in self._norms]
        if not may_fuse(self, x, self._steps, norms) or not self._is_plain():
            return super().forward(x)  # type: ignore[misc]
        return self._run(x, norms)

    def _is_plain(self) -> bool:
        return change(self.relu, (nn.ReLU,)) is None

    def _run(self, x: Tensor, norms: list[Any]) -> Tensor:
        return run_block(self.relu, x, [getattr(self, name) for name in self._convs], norms, *_split(self.downsample))


def steps_of(base: type, norms: Sequence[str]) -> Steps:
    """The steps of a library's block, whose norms and activation are noted for the report of accelerate()."""
    Parts(base, {**dict.fromkeys(norms, NORMS), "relu": (nn.ReLU,)})
    return Steps(base, replaced="forward")


class BasicBlock(ResidualBlock, resnet.BasicBlock):
    """The block of ResNet-18 and ResNet-34. With live batch norm it runs torchvision's code."""

    _convs, _norms = ("conv1", "conv2"), ("bn1", "bn2")
    _steps = steps_of(resnet.BasicBlock, _norms)


class Bottleneck(ResidualBlock, resnet.Bottleneck):
    """The block of deeper ResNets, ResNeXt and Wide ResNet. With live batch norm it runs torchvision's code."""

    _convs, _norms = ("conv1", "conv2", "conv3"), ("bn1", "bn2", "bn3")
    _steps = steps_of(resnet.Bottleneck, _norms)
