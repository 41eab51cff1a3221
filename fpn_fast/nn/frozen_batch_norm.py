# SPDX-License-Identifier: Apache-2.0
"""torchvision's batch norm with fixed statistics, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNormBase

from fpn_fast import backends
from fpn_fast.nn._own import Steps
from fpn_fast.nn._shared import recorded
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops.frozen_batch_norm import normalise, vectors_fit

__all__ = ["FrozenBatchNorm2d"]

STEPS = Steps(_FrozenBatchNormBase, replaced="forward")


def known_vectors(
    norm: Any, x: Tensor, residual: Tensor | None = None, residual_norm: Any = None
) -> tuple[list[Tensor], list[Tensor]] | None:
    """The vectors of `norm` and of `residual_norm`; None where the op does not take these with the maps."""
    vectors, other = _vectors(norm), [] if residual_norm is None else _vectors(residual_norm)
    # What a library broadcasts or promotes, and a gradient of the statistics, the op refuses.
    known = x.dim() == 4 and x.dtype in DTYPES and vectors_fit(x, vectors)
    if known and residual is not None:
        known = residual.shape == x.shape and residual.device == x.device
        known = known and residual.dtype in (x.dtype, torch.float32)
        known = known and (not other or (vectors_fit(x, other) and other[0].dtype == vectors[0].dtype))
    return (vectors, other) if known else None


def run_norm(
    norm: Any, x: Tensor, known: tuple[list[Tensor], list[Tensor]], residual: Tensor | None = None, *, relu: bool
) -> Tensor:
    """The op with what :func:`known_vectors` returned, in place of the checks of the public one."""
    vectors, other = known
    rule = rule_of(norm, x)
    # By torchvision's rule alone the output may be wider than x.
    dtype = torch.promote_types(x.dtype, vectors[0].dtype) if rule == "torchvision" else x.dtype
    return normalise(x, vectors, norm.eps, residual, other, relu, rule, dtype)


def rule_of(norm: Any, x: Tensor) -> str:
    """The op's rule for a norm of `x`."""
    if isinstance(norm, _FrozenBatchNormBase):
        return "torchvision"
    # detectron2's module calls F.batch_norm where x records no gradient.
    live = isinstance(norm, (nn.BatchNorm2d, nn.SyncBatchNorm))
    return "batch_norm" if live or not x.requires_grad else "detectron2"


def _vectors(norm: Any) -> list[Tensor]:
    return [norm.weight, norm.bias, norm.running_mean, norm.running_var]


def fused_norm(norm: Any, x: Tensor, steps: Steps) -> Tensor | None:
    """The output of a norm with fixed statistics by the op; None where its library's code has to run.

    steps: of the library's class.
    """
    if torch.compiler.is_compiling() or recorded(x) or not steps.are_own(norm):
        return None
    known = known_vectors(norm, x)
    if backends.falls_back(norm, x, "frozen_batch_norm", known=known is not None) or known is None:
        return None
    return run_norm(norm, x, known, relu=False)


class FrozenBatchNorm2d(_FrozenBatchNormBase):
    """Batch norm with fixed statistics, weight and bias: drop-in for :class:`torchvision.ops.FrozenBatchNorm2d`.

    Constructor, buffers, checkpoints and output are torchvision's. One call of :func:`fpn_fast.ops.frozen_batch_norm`
    computes its seven operators; on a CPU the result is equal bit for bit in float32 and float64. A compiler, a tracer,
    and inputs that are not [N, C, H, W] get torchvision's own code.

    Args:
        num_features: C.
        eps: added to the variances. Default: 1e-5.

    Source: torchvision/ops/misc.py.

    >>> norm = FrozenBatchNorm2d(8)
    >>> norm(torch.rand(2, 8, 4, 6)).shape
    torch.Size([2, 8, 4, 6])
    """

    def forward(self, x: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, H, W] in the wider of the dtypes of x and of the buffers."""
        y = fused_norm(self, x, STEPS)
        return super().forward(x) if y is None else y
