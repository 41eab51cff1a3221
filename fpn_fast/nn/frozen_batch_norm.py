# SPDX-License-Identifier: Apache-2.0
"""torchvision's batch norm with fixed statistics, in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNormBase

from fpn_fast import backends
from fpn_fast.nn._own import Steps
from fpn_fast.nn._shared import recorded
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops.frozen_batch_norm import normalise, vectors_fit

__all__ = ["FrozenBatchNorm2d"]

STEPS = Steps(_FrozenBatchNormBase, replaced="forward")


def fused_norm(norm: Any, x: Tensor, steps: Steps, rule: str) -> Tensor | None:
    """The output of a norm with fixed statistics by the op; None where its library's code has to run.

    steps: of the library's class; rule: see the op; but by torchvision's alone the output may be wider than x.
    """
    if torch.compiler.is_compiling() or recorded(x) or not steps.are_own(norm):
        return None
    vectors = [norm.weight, norm.bias, norm.running_mean, norm.running_var]
    # What the library broadcasts or promotes, and a gradient of the statistics, the op refuses.
    known = x.dim() == 4 and x.dtype in DTYPES and vectors_fit(x, vectors)
    if backends.falls_back(norm, x, "frozen_batch_norm", known=known):
        return None
    # The checks of the public op are made.
    dtype = torch.promote_types(x.dtype, vectors[0].dtype) if rule == "torchvision" else x.dtype
    return normalise(x, vectors, norm.eps, None, [], False, rule, dtype)


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
        y = fused_norm(self, x, STEPS, "torchvision")
        return super().forward(x) if y is None else y
