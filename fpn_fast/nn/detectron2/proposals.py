# SPDX-License-Identifier: Apache-2.0
"""detectron2's anchors and proposals, computed from the maps of an RPN's head."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fpn_fast import ops
from fpn_fast.nn._shared import proposals_of_images, sizes_beside
from fpn_fast.ops.generate_proposals import DETECTRON2
from fpn_fast.reference.generate_proposals import anchors_at

__all__ = ["Boxes", "DefaultAnchorGenerator", "find_top_rpn_proposals", "proposals_of_images"]


class Boxes:
    """Boxes [L, 4], (x1, y1, x2, y2), as ``tensor``; stands in for detectron2's Boxes where that is not imported.

    >>> boxes = Boxes.cat([Boxes(torch.tensor([[0.0, 0, 4, 2]])), Boxes(torch.empty(0, 4))])
    >>> len(boxes), boxes.area().tolist(), boxes[0].tensor.tolist()
    (1, [8.0], [[0.0, 0.0, 4.0, 2.0]])
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, item: Any) -> Boxes:
        return Boxes(self.tensor[item].reshape(-1, 4))

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensor)

    def __repr__(self) -> str:
        return f"Boxes({self.tensor})"

    @property
    def device(self) -> torch.device:
        return self.tensor.device

    def to(self, device: torch.device | str) -> Boxes:
        return Boxes(self.tensor.to(device))

    def clone(self) -> Boxes:
        return Boxes(self.tensor.clone())

    def area(self) -> Tensor:
        """[L], in square pixels."""
        return (self.tensor[:, 2] - self.tensor[:, 0]) * (self.tensor[:, 3] - self.tensor[:, 1])

    @classmethod
    def cat(cls, boxes_list: Sequence[Boxes]) -> Boxes:
        return cls(torch.cat([boxes.tensor for boxes in boxes_list]) if boxes_list else torch.empty(0, 4))


class DefaultAnchorGenerator(nn.Module):
    """The anchors of a pyramid: drop-in for detectron2's DefaultAnchorGenerator, with its order and values.

    Anchors are not rounded. Aspect ratios vary fastest. The module has no parameters and no ``state_dict`` keys.

    Args:
        cfg, input_shape: a detectron2 configuration and the maps' :class:`ShapeSpec`, which give the arguments below;
            one that is given too replaces theirs. Default: none.
        sizes: square roots of the anchors' areas in pixels, one list per map or one list for all maps.
        aspect_ratios: height divided by width, one list per map or one list for all maps.
        strides: image pixels per map pixel, one per map.
        offset: position of the first anchor's centre, in strides, from 0 to below 1. Default: 0.5.

    Raises:
        TypeError: neither a configuration nor sizes, aspect_ratios and strides are given.
        ValueError: the number of lists differs from the number of strides; offset is out of range.

    Source: detectron2/modeling/anchor_generator.py.

    >>> generator = DefaultAnchorGenerator(sizes=[[32]], aspect_ratios=[[1.0]], strides=[16], offset=0.5)
    >>> generator([torch.rand(1, 8, 1, 2)])[0].tensor
    tensor([[-8., -8., 24., 24.],
            [ 8., -8., 40., 24.]])
    """

    box_dim = 4

    def __init__(
        self,
        cfg: Any = None,
        input_shape: Sequence[Any] | None = None,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float] | None = None,
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float] | None = None,
        strides: Sequence[int] | None = None,
        offset: float | None = None,
    ) -> None:
        super().__init__()
        given = {"sizes": sizes, "aspect_ratios": aspect_ratios, "strides": strides, "offset": offset}
        options: dict[str, Any] = {"offset": 0.5} if cfg is None else self.from_config(cfg, input_shape)
        options |= {name: value for name, value in given.items() if value is not None}
        if missing := [name for name in given if options.get(name) is None]:
            raise TypeError(f"a configuration, or {', '.join(missing)}, must be given")
        self._build(**options)

    def _build(self, sizes: Any, aspect_ratios: Any, strides: Sequence[int], offset: float) -> None:
        if not 0 <= offset < 1:
            raise ValueError(f"offset must be 0 to below 1 stride, got {offset}")
        self.strides = list(strides)
        self.offset = offset
        self.cell_anchors = [
            self.generate_cell_anchors(of_map, ratios)
            for of_map, ratios in zip(
                _of_each_map("sizes", sizes, len(strides)),
                _of_each_map("aspect_ratios", aspect_ratios, len(strides)),
                strict=True,
            )
        ]

    @classmethod
    def from_config(cls, cfg: Any, input_shape: Sequence[Any] | None) -> dict[str, Any]:
        """The arguments that a detectron2 configuration gives for maps of `input_shape`."""
        settings = cfg.MODEL.ANCHOR_GENERATOR
        return {
            "sizes": settings.SIZES,
            "aspect_ratios": settings.ASPECT_RATIOS,
            "strides": None if input_shape is None else [shape.stride for shape in input_shape],
            "offset": settings.OFFSET,
        }

    @property
    def num_features(self) -> int:
        """The number of maps."""
        return len(self.strides)

    @property
    def num_anchors(self) -> list[int]:
        """Anchors per position, of each map."""
        return [len(table) for table in self.cell_anchors]

    @property
    def num_cell_anchors(self) -> list[int]:
        """Another name of num_anchors."""
        return self.num_anchors

    def generate_cell_anchors(
        self, sizes: Sequence[float] = (32, 64, 128, 256, 512), aspect_ratios: Sequence[float] = (0.5, 1, 2)
    ) -> Tensor:
        """The anchors [A, 4] of a position, about the origin: all ratios of the first size, then of the next."""
        return torch.tensor([_cell_anchor(size, ratio) for size in sizes for ratio in aspect_ratios], device="cpu")

    def forward(self, features: Sequence[Tensor]) -> list[Any]:
        """Computes the anchors of a pyramid.

        Args:
            features: maps [N, C, H_l, W_l], one per stride.

        Returns:
            Per map [H_l * W_l * A, 4] float32, (x1, y1, x2, y2), in order (y, x, anchor), as the ``tensor`` of
            detectron2's Boxes, or of :class:`Boxes` where detectron2 is not imported.
        """
        kind = getattr(sys.modules.get("detectron2.structures"), "Boxes", Boxes)
        anchors = []
        for map, table, stride in zip(features, self.cell_anchors, self.strides, strict=True):
            height, width = map.shape[-2:]
            index = torch.arange(height * width * len(table), device=map.device)
            boxes = anchors_at(index, table.to(map.device), width, (stride, stride), self.offset, torch.float32)
            anchors.append(kind(boxes))
        return anchors


def _of_each_map(name: str, values: Sequence[Any], maps: int) -> list[Sequence[float]]:
    """One list per map; a single list counts for every map."""
    lists = list(values) if len(values) and isinstance(values[0], Iterable) else [values]
    if len(lists) == 1:
        lists *= maps
    if len(lists) != maps or not all(map(len, lists)):
        raise ValueError(f"{name} must be a list for each of the {maps} strides, or one list, got {values}")
    return lists


def _cell_anchor(size: float, ratio: float) -> list[float]:
    width = math.sqrt(size**2.0 / ratio)
    height = ratio * width
    return [-width / 2, -height / 2, width / 2, height / 2]


def find_top_rpn_proposals(
    pred_objectness_logits: Sequence[Tensor],
    pred_anchor_deltas: Sequence[Tensor],
    anchor_generator: Any,
    image_sizes: Sequence[Sequence[int]] | Tensor,
    *,
    pre_nms_topk: int,
    post_nms_topk: int,
    nms_thresh: float = 0.7,
    min_box_size: float = 0.0,
    box2box_weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    scale_clamp: float = math.log(1000.0 / 16),
) -> tuple[Tensor, Tensor, Tensor]:
    """The proposals of detectron2's RPN, by one call of :func:`fpn_fast.ops.generate_proposals`.

    detectron2's function of this name takes decoded boxes. This one takes the head's maps: it decodes only the selected
    anchors, inside the kernel, and does not synchronise.

    Args:
        pred_objectness_logits, pred_anchor_deltas: the head's maps, [N, A, H_l, W_l] and [N, 4A, H_l, W_l].
        anchor_generator: :class:`DefaultAnchorGenerator`, or detectron2's. Base anchors on a GPU cost one
            synchronisation.
        image_sizes: (height, width) per image in pixels, or a tensor [N, 2] on the maps' device.
        pre_nms_topk: boxes kept per map and image before NMS.
        post_nms_topk: boxes kept per image after NMS.
        nms_thresh: intersection over union above which a box suppresses a lower one of its map. Default: 0.7.
        min_box_size: sides must be longer than this, in pixels. Default: 0.
        box2box_weights, scale_clamp: those of Box2BoxTransform.

    Returns:
        (boxes [N, P, 4], logits [N, P], counts [N]), with P = post_nms_topk. Logits descend; entries after an image's
        last proposal are zero. :func:`proposals_of_images` turns them into lists.

    Note:
        Logits and boxes that are not finite are left out, also in training, where detectron2 raises an error. Boxes and
        logits are float32 for half-precision maps, like in detectron2.

    Raises:
        TypeError, ValueError: the op's.

    Source: detectron2/modeling/proposal_generator/proposal_utils.py, rpn.py.
    """
    rule = dataclasses.replace(
        DETECTRON2,
        min_size=min_box_size,
        weights=box2box_weights,
        scale_clamp=scale_clamp,
        center_offset=anchor_generator.offset,
    )
    return ops.generate_proposals(
        pred_objectness_logits,
        pred_anchor_deltas,
        list(anchor_generator.cell_anchors),
        [(stride, stride) for stride in anchor_generator.strides],
        sizes_beside(pred_objectness_logits, image_sizes),
        pre_nms_top_n=pre_nms_topk,
        post_nms_top_n=post_nms_topk,
        nms_thresh=nms_thresh,
        **vars(rule),
    )
