# SPDX-License-Identifier: Apache-2.0
"""The semantic branch of detectron2's Panoptic FPN."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast.nn._pyramid import climb, size_of, sum_of_ladders
from fpn_fast.nn.detectron2.fpn import ConvWithNorm

__all__ = ["SemSegFPNHead"]


class SemSegFPNHead(nn.Module):
    """Semantic branch of Panoptic FPN (Kirillov et al., 2019): drop-in for detectron2's ``SemSegFPNHead``.

    Constructor, ``state_dict`` keys, initialisation and outputs are detectron2's. One call of
    :func:`fpn_fast.ops.fuse_maps` upsamples the levels a last time and sums them, rounding after each addition;
    :class:`fpn_fast.nn.mmdet.PanopticFPNHead` rounds once.

    Args:
        input_shape: for each map by its name, an object with ``channels`` and ``stride``, such as
            :class:`~fpn_fast.nn.detectron2.ShapeSpec`.
        num_classes: of the output.
        conv_dims: channels of the branch.
        common_stride: at which all levels are summed: the finest map's.
        loss_weight: of the loss.
        norm: ``""`` or None for none, ``"GN"`` with 32 groups, others: see :class:`FPN`. Convolutions have a bias only
            without a norm.
        ignore_value: a label that is left out of the loss.

    Raises:
        ValueError: a stride is not a power of two times common_stride; others: see :class:`FPN`.

    Source: detectron2/modeling/meta_arch/semantic_seg.py.

    >>> import torch
    >>> from fpn_fast.nn.detectron2 import ShapeSpec
    >>> shapes = {f"p{level}": ShapeSpec(channels=4, stride=2**level) for level in (2, 3, 4)}
    >>> head = SemSegFPNHead(shapes, num_classes=3, conv_dims=6, common_stride=4).eval()
    >>> maps = {name: torch.rand(1, 4, 64 // shape.stride, 96 // shape.stride) for name, shape in shapes.items()}
    >>> logits, _ = head(maps)
    >>> tuple(logits.shape)
    (1, 3, 64, 96)
    """

    def __init__(
        self,
        input_shape: Mapping[str, Any],
        *,
        num_classes: int,
        conv_dims: int,
        common_stride: int,
        loss_weight: float = 1.0,
        norm: str | Callable[[int], nn.Module] | None = None,
        ignore_value: int = -1,
    ) -> None:
        super().__init__()
        shapes = sorted(input_shape.items(), key=lambda item: item[1].stride)
        self.in_features = [name for name, _ in shapes]
        self.num_classes = num_classes
        self.common_stride = common_stride
        self.loss_weight = loss_weight
        self.ignore_value = ignore_value
        # Like detectron2, the module has the ladders in this list in addition to the names of their maps.
        self.scale_heads = []
        for name, shape in shapes:
            steps = math.log2(shape.stride / common_stride)
            if not steps.is_integer() or steps < 0:
                raise ValueError(f"the stride of {name} must be {common_stride} times a power of 2, got {shape.stride}")
            layers: list[nn.Module] = []
            for i in range(max(1, int(steps))):
                layers.append(ConvWithNorm(conv_dims if i else shape.channels, conv_dims, 3, norm or "", relu=True))
                if steps:
                    layers.append(nn.Upsample(scale_factor=2, mode="bilinear", align_corners=False))
            self.scale_heads.append(nn.Sequential(*layers))
            self.add_module(name, self.scale_heads[-1])
        self.predictor = ConvWithNorm(conv_dims, num_classes, 1, "")
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(
        self, features: Mapping[str, Tensor], targets: Tensor | None = None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The loss in training, logits in evaluation.

        Args:
            features: maps [N, C_l, H_l, W_l] by name; those of a stride beyond common_stride are that much smaller.
            targets: in training, labels [N, H, W] at the image's size, int64.

        Returns:
            (None, {"loss_sem_seg": the mean}) in training, (logits [N, num_classes, H, W] at the image's size, {}) in
            evaluation.
        """
        logits = self.layers(features)
        if self.training:
            return None, self.losses(logits, targets)
        return F.interpolate(logits, scale_factor=self.common_stride, mode="bilinear", align_corners=False), {}

    def layers(self, features: Mapping[str, Tensor]) -> Tensor:
        """Maps by name -> logits [N, num_classes, H, W] at common_stride."""
        tops = []
        for name, ladder in zip(self.in_features, self.scale_heads, strict=True):
            tops.append(climb(features[name], (layer for layer in ladder if not isinstance(layer, nn.Upsample))))
        factor = 2 if len(self.scale_heads[0]) > 1 else 1
        height, width = size_of(tops[0])
        return self.predictor(sum_of_ladders(tops, (factor * height, factor * width), rounding="sequential"))

    def losses(self, predictions: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """{"loss_sem_seg": the mean cross entropy of logits at common_stride, upsampled, and labels [N, H, W]}"""
        if targets is None:
            raise ValueError("targets must be labels [N, H, W] in training, got None")
        # In float32, as detectron2 computes it under autocast too.
        upsampled = F.interpolate(
            predictions.float(), scale_factor=self.common_stride, mode="bilinear", align_corners=False
        )
        loss = F.cross_entropy(upsampled, targets, reduction="mean", ignore_index=self.ignore_value)
        return {"loss_sem_seg": loss * self.loss_weight}
