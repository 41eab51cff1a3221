# SPDX-License-Identifier: Apache-2.0
"""The semantic branch of mmdetection's PanopticFPN."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fpn_fast.nn._pyramid import block, climb, size_of, sum_of_ladders
from fpn_fast.nn.mmdet.conv_module import ConvModule

__all__ = ["PanopticFPNHead"]


class PanopticFPNHead(nn.Module):
    """Semantic branch of Panoptic FPN (Kirillov et al., 2019): drop-in for mmdetection's ``PanopticFPNHead``.

    Constructor, ``state_dict`` keys and outputs are mmdetection's. One call of :func:`fpn_fast.ops.fuse_maps` upsamples
    the levels a last time and sums them, in float32 with one rounding; :class:`fpn_fast.nn.detectron2.SemSegFPNHead`
    sums in the storage type. The constructor draws the weights that mmdetection draws.

    Args:
        num_things_classes, num_stuff_classes: how many classes; the output has one for each stuff class and one for
            all things, the last.
        in_channels: channels of every map; inner_channels: of the branch.
        start_level, end_level: first map to use, and one past the last.
        conv_cfg, norm_cfg: see :class:`~fpn_fast.nn.mmdet.conv_module.ConvModule`.
        loss_seg: must be a CrossEntropyLoss, with ``ignore_index`` and ``loss_weight``.
        init_cfg: must be None.

    Raises:
        ValueError: an argument is none of these.

    Source: mmdet/models/seg_heads/panoptic_fpn_head.py, mmdet/models/layers/conv_upsample.py.

    >>> import torch
    >>> norm = dict(type="GN", num_groups=2)
    >>> head = PanopticFPNHead(8, 2, in_channels=4, inner_channels=6, norm_cfg=norm)
    >>> {name: tuple(map.shape) for name, map in head([torch.rand(1, 4, 16 >> i, 24 >> i) for i in range(4)]).items()}
    {'seg_preds': (1, 3, 16, 24), 'feats': (1, 6, 16, 24)}
    """

    def __init__(
        self,
        num_things_classes: int = 80,
        num_stuff_classes: int = 53,
        in_channels: int = 256,
        inner_channels: int = 128,
        start_level: int = 0,
        end_level: int = 4,
        conv_cfg: Mapping[str, Any] | None = None,
        norm_cfg: Mapping[str, Any] | None = {"type": "GN", "num_groups": 32, "requires_grad": True},
        loss_seg: Mapping[str, Any] = {"type": "CrossEntropyLoss", "ignore_index": -1, "loss_weight": 1.0},
        init_cfg: None = None,
    ) -> None:
        super().__init__()
        if init_cfg is not None:
            raise ValueError(f"init_cfg must be None, got {init_cfg}")
        if loss_seg.get("type") != "CrossEntropyLoss":
            raise ValueError(f"loss_seg must be of type 'CrossEntropyLoss', got {loss_seg.get('type')!r}")
        self.num_things_classes, self.num_stuff_classes = num_things_classes, num_stuff_classes
        self.num_classes = num_stuff_classes + 1
        self.start_level, self.end_level = start_level, end_level
        self.ignore_index, self.loss_weight = loss_seg.get("ignore_index", -100), loss_seg.get("loss_weight", 1.0)
        layers: dict[str, Any] = {"conv_cfg": conv_cfg, "norm_cfg": norm_cfg, "act_cfg": {"type": "ReLU"}}
        self.conv_upsample_layers = nn.ModuleList()
        for i in range(start_level, end_level):
            widths = [in_channels, *[inner_channels] * max(i, 1)]
            convs = nn.ModuleList(ConvModule(a, b, 3, **layers) for a, b in itertools.pairwise(widths))
            self.conv_upsample_layers.append(block(conv=convs))
        self.conv_logits = nn.Conv2d(inner_channels, self.num_classes, 1)
        nn.init.normal_(self.conv_logits.weight, 0, 0.01)
        nn.init.zeros_(self.conv_logits.bias)  # type: ignore[arg-type]

    def forward(self, x: Sequence[Tensor]) -> dict[str, Tensor]:
        """Maps [N, in_channels, H_l, W_l], finest first, each twice as large as the next.

        Returns:
            seg_preds: logits [N, num_stuff_classes + 1, H, W] at the size of the finest map; feats: [N, inner_channels,
            H, W].

        Raises:
            ValueError: there are fewer than end_level maps; others: see :func:`fpn_fast.ops.fuse_maps`.
        """
        if len(x) < self.end_level:
            raise ValueError(f"x must have at least {self.end_level} maps, got {len(x)}")
        used = x[self.start_level : self.end_level]
        ladders: Any = self.conv_upsample_layers
        tops = [climb(map, ladder.conv) for map, ladder in zip(used, ladders, strict=True)]
        height, width = size_of(tops[0])
        factor = 2 if self.start_level else 1
        feats = sum_of_ladders(tops, (factor * height, factor * width), rounding="once")
        return {"seg_preds": self.conv_logits(feats), "feats": feats}

    def loss(self, seg_preds: Tensor, gt_semantic_seg: Tensor) -> dict[str, Tensor]:
        """The cross entropy of logits [N, K, H, W] and labels.

        Args:
            gt_semantic_seg: [N, H, W] at the logits' size, which mmdetection makes of the image's by nearest: things
                from 0 on, then stuff; ignore_index is left out. All things become one class.

        Returns:
            {"loss_seg": their mean times the weight}
        """
        things = self.num_things_classes
        thing = (gt_semantic_seg >= 0) & (gt_semantic_seg < things)
        stuff = (gt_semantic_seg >= things) & (gt_semantic_seg < things + self.num_stuff_classes)
        labels = gt_semantic_seg.long().masked_fill(thing, self.num_stuff_classes)
        labels = labels.where(~stuff, gt_semantic_seg.long() - things)
        loss = F.cross_entropy(seg_preds, labels, ignore_index=self.ignore_index)
        return {"loss_seg": self.loss_weight * loss}
