# SPDX-License-Identifier: Apache-2.0
"""The residual blocks of torchvision's ResNet, ResNeXt and Wide ResNet: norm, residual and ReLU in one pass each.

:func:`fpn_fast.accelerate` swaps them in. Keys, parameters and results are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import resnet
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNormBase

from fpn_fast import _torch_private, backends
from fpn_fast.nn._own import Steps
from fpn_fast.nn._shared import recorded
from fpn_fast.nn.frozen_batch_norm import STEPS as _NORM_STEPS
from fpn_fast.nn.frozen_batch_norm import FrozenBatchNorm2d
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops.frozen_batch_norm import normalise, vectors_fit

_FROZEN = (FrozenBatchNorm2d, _FrozenBatchNormBase)
#: The parts that a fused block does not call, and what calling them runs.
_FORWARDS = {kind: kind.forward for kind in (*_FROZEN, nn.BatchNorm2d, nn.ReLU, nn.Sequential)}
_NORMS = (*_FROZEN, nn.BatchNorm2d)


class _Parts(Steps):
    """The norms and the activation of a block, for the report of accelerate()."""

    def changed(self, module: object) -> list[str]:
        # Other subclasses of torchvision's blocks are not fused.
        if not isinstance(module, (BasicBlock, Bottleneck)):
            return []
        kinds = {"bn1": _NORMS, "bn2": _NORMS, "bn3": _NORMS, "relu": (nn.ReLU,)}
        changes = {name: _change(getattr(module, name), kinds[name]) for name in kinds if hasattr(module, name)}
        return [f"{name} ({change})" for name, change in changes.items() if change]


def _change(part: nn.Module, kinds: tuple[type, ...]) -> str | None:
    """What calling `part` does beside the forward pass of one of `kinds`; None where nothing."""
    kind = type(part)
    if kind not in kinds:
        return kind.__name__
    own = kind.forward is _FORWARDS[kind] and "forward" not in vars(part)
    if not own or (kind in _FROZEN and not _NORM_STEPS.are_own(part)):
        return "forward"
    return "hooks" if _torch_private.has_hooks(part) else None


_BASIC, _BOTTLENECK = (Steps(base, replaced="forward") for base in (resnet.BasicBlock, resnet.Bottleneck))
_PARTS = [_Parts(base) for base in (resnet.BasicBlock, resnet.Bottleneck)]


def _is_frozen(norm: Any) -> bool:
    """Whether `norm`, of a kind in _NORMS, has fixed statistics now."""
    return not isinstance(norm, nn.BatchNorm2d) or (not norm.training and norm.running_mean is not None)


def _is_fused(block: Any, x: Any, steps: Steps, norms: Sequence[Any]) -> bool:
    """Whether :func:`_forward` may stand for torchvision's forward pass of `block` in this call."""
    # A compiler fuses torchvision's operators itself.
    if torch.compiler.is_compiling() or recorded(x) or _torch_private.has_global_hooks():
        return False
    for norm in norms:
        if _change(norm, _NORMS) or not _is_frozen(norm):
            return False
    own = steps.are_own(block) and _change(block.relu, (nn.ReLU,)) is None
    return own and not backends.falls_back(block, x, "frozen_batch_norm")


def _forward(block: Any, x: Tensor, convs: Sequence[nn.Module], norms: Sequence[Any]) -> Tensor:
    """The forward pass of a block whose norms are frozen. Its end is one call of the op."""
    out = x
    for conv, norm in zip(convs[:-1], norms[:-1], strict=True):
        out = _normalise(block.relu, norm, conv(out))
    out = convs[-1](out)
    down, last = block.downsample, norms[-1]
    if down is None:
        return _normalise(block.relu, last, out, x)
    if _change(down, (nn.Sequential,)) is None and len(down) == 2:
        conv, norm = down
        # One call has one eps and one rule.
        alike = isinstance(norm, nn.BatchNorm2d) == isinstance(last, nn.BatchNorm2d)
        if _change(norm, _NORMS) is None and alike and _is_frozen(norm) and norm.eps == last.eps:
            return _normalise(block.relu, last, out, conv(x), norm)
    return _normalise(block.relu, last, out, down(x))


def _normalise(
    relu: nn.Module, norm: Any, x: Tensor, residual: Tensor | None = None, residual_norm: Any = None
) -> Tensor:
    """``relu(norm(x) + residual_norm(residual))`` by the op, or by the modules where it does not know the inputs."""
    vectors, other = _vectors(norm), [] if residual_norm is None else _vectors(residual_norm)
    known = x.dim() == 4 and x.dtype in DTYPES and vectors_fit(x, vectors)
    if known and residual is not None:
        known = residual.shape == x.shape and residual.device == x.device
        known = known and residual.dtype in (x.dtype, torch.float32)
        known = known and (not other or (vectors_fit(x, other) and other[0].dtype == vectors[0].dtype))
    if known:
        batch_norm = isinstance(norm, nn.BatchNorm2d)
        dtype = x.dtype if batch_norm else torch.promote_types(x.dtype, vectors[0].dtype)
        return normalise(x, vectors, norm.eps, residual, other, True, False, dtype)
    y: Tensor = norm(x)
    if residual is not None:
        y += residual if residual_norm is None else residual_norm(residual)
    return relu(y)


def _vectors(norm: Any) -> list[Tensor]:
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


class BasicBlock(resnet.BasicBlock):
    """The block of ResNet-18 and ResNet-34. With live batch norm it runs torchvision's code."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, planes, H / stride, W / stride]."""
        norms = (self.bn1, self.bn2)
        if not _is_fused(self, x, _BASIC, norms):
            return super().forward(x)
        return _forward(self, x, (self.conv1, self.conv2), norms)


class Bottleneck(resnet.Bottleneck):
    """The block of deeper ResNets, ResNeXt and Wide ResNet. With live batch norm it runs torchvision's code."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, 4 * planes, H / stride, W / stride]."""
        norms = (self.bn1, self.bn2, self.bn3)
        if not _is_fused(self, x, _BOTTLENECK, norms):
            return super().forward(x)
        return _forward(self, x, (self.conv1, self.conv2, self.conv3), norms)
