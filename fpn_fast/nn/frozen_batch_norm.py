# SPDX-License-Identifier: Apache-2.0
"""torchvision's batch norm with fixed statistics, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops.misc import FrozenBatchNorm2d as _FrozenBatchNormBase

from fpn_fast import backends, ops
from fpn_fast.nn._shared import recorded
from fpn_fast.ops._checks import DTYPES

__all__ = ["FrozenBatchNorm2d"]


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
        if torch.compiler.is_compiling() or recorded(x):
            return super().forward(x)
        vectors = self.weight, self.bias, self.running_mean, self.running_var
        known = x.dim() == 4 and x.dtype in DTYPES and self.weight.dtype in DTYPES
        for vector in vectors:
            # What torchvision broadcasts or promotes, the op refuses.
            known = known and vector.shape == x.shape[1:2] and vector.dtype == self.weight.dtype
        # Only weight and bias have a gradient in the op.
        known = known and not (self.running_mean.requires_grad or self.running_var.requires_grad)
        if backends.falls_back(self, x, "frozen_batch_norm", known=known):
            return super().forward(x)
        return ops.frozen_batch_norm(x, *vectors, self.eps)
