# SPDX-License-Identifier: Apache-2.0
"""The focal loss in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sigmoid_focal_loss(logits: Tensor, labels: Tensor, weights: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Return the losses [M, C] of all anchors and classes, and their derivatives by the logits.

    logits: [M, C]; labels: [M], the class of each anchor, any other value for background; weights: [M], factors of the
    anchors' losses. Computed in float32 (float64 for float64 logits).
    """
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    own = labels[:, None] == torch.arange(logits.size(1), device=logits.device)
    wrong = torch.where(own, -x, x)
    # softplus would be the identity above 20.
    p, cross_entropy = wrong.sigmoid(), -F.logsigmoid(-wrong)
    # torch.where of two Python numbers returns float32, also for float64 logits.
    share = weights[:, None].to(x.dtype) * torch.where(own, x.new_full((), alpha), 1 - alpha)
    slope = share * p.square() * (p + 2 * torch.sigmoid(-wrong) * cross_entropy)
    return share * p.square() * cross_entropy, torch.where(own, -slope, slope)
