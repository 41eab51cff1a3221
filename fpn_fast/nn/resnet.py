# SPDX-License-Identifier: Apache-2.0
"""The residual blocks of torchvision's ResNet, ResNeXt and Wide ResNet: norm, residual and ReLU in one pass each.

:func:`fpn_fast.accelerate` swaps them in. Keys, parameters and results are torchvision's. The blocks of other libraries
share :func:`may_fuse` and :func:`run_block`.
"""

from __future__ import annotations

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
from fpn_fast.nn.frozen_batch_norm import FrozenBatchNorm2d
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops.frozen_batch_norm import normalise, vectors_fit

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
    return not isinstance(norm, nn.BatchNorm2d) or (not norm.training and norm.running_mean is not None)


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
    vectors, other = _vectors(norm), [] if residual_norm is None else _vectors(residual_norm)
    known = x.dim() == 4 and x.dtype in DTYPES and vectors_fit(x, vectors)
    if known and residual is not None:
        known = residual.shape == x.shape and residual.device == x.device
        known = known and residual.dtype in (x.dtype, torch.float32)
        known = known and (not other or (vectors_fit(x, other) and other[0].dtype == vectors[0].dtype))
    if known:
        rule = rule_of(norm, x)
        dtype = torch.promote_types(x.dtype, vectors[0].dtype) if rule == "torchvision" else x.dtype
        return normalise(x, vectors, norm.eps, residual, other, True, rule, dtype)
    y: Tensor = norm(x)
    if residual is not None:
        y += residual if residual_norm is None else residual_norm(residual)
    return relu(y)


def rule_of(norm: Any, x: Tensor) -> str:
    """The op's rule for a norm of `x`."""
    if isinstance(norm, _FrozenBatchNormBase):
        return "torchvision"
    # detectron2's module calls F.batch_norm where x records no gradient.
    return "batch_norm" if isinstance(norm, nn.BatchNorm2d) or not x.requires_grad else "detectron2"


def _vectors(norm: Any) -> list[Tensor]:
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def split(down: Any) -> tuple[Any, Any]:
    """(convolution, norm) of a downsampling of these two alone, or (what it is, None)."""
    return tuple(down) if change(down, (nn.Sequential,)) is None and len(down) == 2 else (down, None)


_BASIC, _BOTTLENECK = (Steps(base, replaced="forward") for base in (resnet.BasicBlock, resnet.Bottleneck))
Parts(resnet.BasicBlock, {"bn1": NORMS, "bn2": NORMS, "relu": (nn.ReLU,)})
Parts(resnet.Bottleneck, {"bn1": NORMS, "bn2": NORMS, "bn3": NORMS, "relu": (nn.ReLU,)})


class BasicBlock(FusedBlock, resnet.BasicBlock):
    """The block of ResNet-18 and ResNet-34. With live batch norm it runs torchvision's code."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, planes, H / stride, W / stride]."""
        norms = (self.bn1, self.bn2)
        if not may_fuse(self, x, _BASIC, norms) or change(self.relu, (nn.ReLU,)):
            return super().forward(x)
        return run_block(self.relu, x, (self.conv1, self.conv2), norms, *split(self.downsample))


class Bottleneck(FusedBlock, resnet.Bottleneck):
    """The block of deeper ResNets, ResNeXt and Wide ResNet. With live batch norm it runs torchvision's code."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4 * planes, H / stride, W / stride]."""
        norms = (self.bn1, self.bn2, self.bn3)
        if not may_fuse(self, x, _BOTTLENECK, norms) or change(self.relu, (nn.ReLU,)):
            return super().forward(x)
        convs = (self.conv1, self.conv2, self.conv3)
        return run_block(self.relu, x, convs, norms, *split(self.downsample))
