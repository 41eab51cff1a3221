# SPDX-License-Identifier: Apache-2.0
"""The classification loss of RetinaNet's head without a wait, and with one table in memory instead of a dozen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import Matcher

# torchvision.ops.sigmoid_focal_loss's defaults, which its head takes; gamma is 2.
_ALPHA = 0.25
#: Logits at a time on a CPU: fewer cost more in waking threads for each step, more no longer stay in its caches.
_LOGITS = 3 << 18


def classification_loss(logits: Tensor, matches: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
    """The focal loss of anchors, over the number of matched ones of each image, averaged over images.

    Args:
        logits: [N, M, classes], float32 or float64.
        matches: of each image [M] int64: the ground truth of each anchor, -1 for background, -2 for what does not
            count.
        labels: of each image [G_n] int64: the class of each ground truth.

    Returns: a number, to rounding that of torchvision's ``RetinaNetClassificationHead.compute_loss``. Not twice
        differentiable.

    Source: Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    matched = torch.stack(list(matches))
    positive = matched >= 0
    share = (positive.sum(1, keepdim=True).clamp(min=1) * len(matches)).to(logits.dtype).reciprocal()
    weights = torch.where(matched == Matcher.BETWEEN_THRESHOLDS, 0, share)
    # One class more, so that an image without ground truths has something to take.
    classes = [F.pad(own, (0, 1))[match.clamp(min=0)] for own, match in zip(labels, matches, strict=True)]
    return _FocalLoss.apply(logits.flatten(0, 1), positive.flatten(), torch.stack(classes).flatten(), weights.flatten())


class _FocalLoss(torch.autograd.Function):
    """Of logits [M, classes]; positive [M]: whether labels [M] is an anchor's class; weights [M].

    The gradient is made in the forward, while an anchor's logits are in cache.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, positive: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        gradient = torch.empty_like(logits) if ctx.needs_input_grad[0] else None
        total = logits.new_zeros(())
        background = weights * (1 - _ALPHA)
        # As if no class were any anchor's,
        step = max(1, _LOGITS // logits.shape[1] if logits.is_cpu else len(logits))
        for start in range(0, len(logits), step):
            part = slice(start, start + step)
            loss, slope = _focal(logits[part])
            total += loss.sum(1) @ background[part]
            if gradient is not None:
                torch.mul(slope, background[part, None], out=gradient[part])
        # and then put right for the class of each matched anchor.
        own = logits.gather(1, labels[:, None])
        weights = torch.where(positive, weights, 0)[:, None]
        # The same with the signs of logit and derivative changed.
        (loss, slope), (old_loss, old_slope) = _focal(-own), _focal(own)
        total += (weights * (_ALPHA * loss - (1 - _ALPHA) * old_loss)).sum()
        if gradient is not None:
            right = gradient.gather(1, labels[:, None]) - weights * (_ALPHA * slope + (1 - _ALPHA) * old_slope)
            ctx.save_for_backward(gradient.scatter_(1, labels[:, None], right))
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # The gradient's own dependence on the logits would be lost without a word.
            raise RuntimeError("classification_loss is not differentiable twice, which create_graph=True asks for")
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def _focal(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Loss p^2 log(1 / (1 - p)), p = sigmoid, of classes that are not an anchor's, and its derivative; without alpha.

    On a CPU a step costs a fifth of a nanosecond for sigmoid, one for log, and 15 for log1p and softplus, which PyTorch
    takes one element at a time: they stay out.
    """
    p, q = logits.sigmoid(), logits.neg().sigmoid_()
    # So far from 0 that what is lost is below a rounding of the logit, the cross entropy there.
    q.clamp_(min=1e-30)
    cross_entropy = q.log()
    # Where p is small, q has lost most of it: log(1 - p) = log(q) + (1 - p - q), and 1 - q is exact.
    torch.sub(p, cross_entropy.add_(1 - q), out=cross_entropy)
    torch.maximum(cross_entropy, logits, out=cross_entropy)
    square = p.square()
    slope = p.addcmul_(q, cross_entropy, value=2).mul_(square)
    return cross_entropy.mul_(square), slope
