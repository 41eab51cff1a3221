# SPDX-License-Identifier: Apache-2.0
"""The focal loss in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, weights: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Losses [M, C] of every class of every anchor, and their derivatives.

    logits [M, C]; labels [M], the class of each anchor, below 0 for none; weights [M], by which its losses are
    multiplied. In float64 for float64 logits, else in float32.
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = labels[:, None] == torch.arange(logits.size(1), device=logits.device)
    wrong = torch.where(own, -x, x)
    # Not softplus, which is the identity from 20 on.
    p, cross_entropy = wrong.sigmoid(), -F.logsigmoid(-wrong)
    # Two Python numbers would make float32 of float64.
    share = weights[:, None].to(x.dtype) * torch.where(own, x.new_full((), alpha), 1 - alpha)
    slope = share * p.square() * (p + 2 * torch.sigmoid(-wrong) * cross_entropy)
    return share * p.square() * cross_entropy, torch.where(own, -slope, slope)
