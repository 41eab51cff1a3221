# SPDX-License-Identifier: Apache-2.0
"""torchvision's region proposal network with proposals in one call. Needs torchvision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, smooth_l1_loss
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator as _AnchorGeneratorBase
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as _RegionProposalBase
from torchvision.models.detection.rpn import concat_box_prediction_layers

from fpn_fast import backends, ops
from fpn_fast.nn import _matching
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn._shared import proposals_of_images, sizes_beside, values_of

__all__ = ["AnchorGenerator", "RegionProposalNetwork"]


class AnchorGenerator(_AnchorGeneratorBase):
    """The anchors of a pyramid: drop-in for torchvision's AnchorGenerator.

    :meth:`cell_numbers` gives the A base boxes of each level; the proposal kernel computes all other anchors from them.

    Note:
        The base boxes are read when ``cell_anchors`` is set, before torchvision moves it to the features' device and
        rounds it to their dtype. Changes of its tensors in place go unnoticed.

    >>> AnchorGenerator(((32,), (64,)), ((1.0,), (1.0,))).cell_numbers()
    [[[-16.0, -16.0, 16.0, 16.0]], [[-32.0, -32.0, 32.0, 32.0]]]
    """

    # (tensors, their values); None in a module that was swapped in.
    _numbers: tuple[tuple[Tensor, ...], list[list[list[float]]]] | None = None

    def cell_numbers(self) -> list[list[list[float]]]:
        """Per level the A base boxes (x1, y1, x2, y2), centred at the origin, in pixels.

        Synchronises once if torchvision's module has moved ``cell_anchors`` to a GPU before.
        """
        return values_of(self, self.cell_anchors)

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The anchors [M, 4] of each image, given its batch and maps [N, C, H_l, W_l], without synchronising."""
        tables, like = self.cell_numbers(), feature_maps[0]
        rows = torch.tensor([row for table in tables for row in table], dtype=like.dtype, device="cpu").view(-1, 4)
        # torchvision keeps the tables that it moves. Those of a copy are not met by a call in another mode or thread.
        moved = copy.copy(self)
        moved.cell_anchors = list(rows.to(like.device, non_blocking=True).split([len(table) for table in tables]))
        moved._numbers = (tuple(moved.cell_anchors), tables)
        return super(AnchorGenerator, moved).forward(image_list, feature_maps)

    def set_cell_anchors(self, dtype: torch.dtype, device: torch.device) -> None:
        numbers = self.cell_numbers()
        super().set_cell_anchors(dtype, device)
        self._numbers = (tuple(self.cell_anchors), numbers)


class RegionProposalNetwork(_RegionProposalBase):
    """Region proposals (Ren et al., 2015): drop-in for torchvision's RegionProposalNetwork.

    Constructor, ``state_dict`` keys, losses, random numbers and proposals are torchvision's. One call of
    :func:`fpn_fast.ops.generate_proposals` makes the proposals and computes anchors inside the kernel; only the losses
    need anchors in memory. :meth:`forward` synchronises with the host once a batch, for the lengths of its lists.
    :meth:`proposals` returns padded tensors and does not synchronise. In training, ground truths are gathered and
    encoded for the sampled anchors only.

    Note:
        Boxes and scores are float32 also for a half-precision head. With your own anchor generator, box coder or step,
        and on a device without a kernel, torchvision's code runs.

    Source: torchvision/models/detection/rpn.py.
    """

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of a batch of images, and in training the losses.

        Args:
            images: the padded images and their sizes. Only the sizes are used.
            features: maps by name, [N, C, H_l, W_l].
            targets: per image a dict with "boxes" [G, 4]; needed in training.

        Returns:
            (boxes, losses): per image [K, 4] (x1, y1, x2, y2) in descending order of scores; in training
            "loss_objectness" and "loss_rpn_box_reg", otherwise {}.

        Raises:
            ValueError: training without targets; others: the op's.
            TypeError: see the op.
        """
        maps = list(features.values())
        if backends.falls_back(self, maps[0], "generate_proposals", known=self._knows_anchors()):
            return super().forward(images, features, targets)
        if self.training and targets is None:
            raise ValueError("targets must have the boxes of each image in training, got None")
        objectness, deltas = self.head(maps)
        padded = self.proposals_of_head(images, objectness, deltas)
        losses = self._losses(images, maps, objectness, deltas, targets) if self.training else {}
        # Last, because it synchronises: a GPU then computes the losses meanwhile.
        return [boxes for boxes, _ in proposals_of_images(*padded)], losses

    def proposals(self, images: ImageList, features: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The proposals as padded tensors, without synchronising.

        Returns:
            (boxes [N, P, 4], scores [N, P], counts [N]), with P = ``post_nms_top_n()``. Scores descend. Entries after
            an image's last proposal are zero.

        Raises:
            TypeError: the anchor generator, box coder or a step is your own; others: the op's.
        """
        if not self._knows_anchors():
            raise TypeError(
                "proposals() needs an AnchorGenerator and a BoxCoder of torchvision or fpn_fast, got "
                f"{type(self.anchor_generator).__name__} and {type(self.box_coder).__name__}; no step may be replaced"
            )
        return self.proposals_of_head(images, *self.head_maps(features))

    def head_maps(self, features: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The head's maps of objectness, [N, A, H_l, W_l], and of deltas, [N, 4A, H_l, W_l]."""
        objectness, deltas = self.head(list(features.values()))
        return objectness, deltas

    def proposals_of_head(
        self, images: ImageList, objectness: Sequence[Tensor], deltas: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`proposals` from the head's maps, [N, A, H_l, W_l] and [N, 4A, H_l, W_l]."""
        height, width = images.tensors.shape[-2:]
        # torchvision's strides are quotients of the padded size: 61 for a height of 800 and 13 rows.
        strides = [(height // m.shape[2], width // m.shape[3]) for m in objectness]
        return ops.generate_proposals(
            objectness,
            deltas,
            cell_numbers(self.anchor_generator),
            strides,
            sizes_beside(objectness, images.image_sizes),
            pre_nms_top_n=self.pre_nms_top_n(),
            post_nms_top_n=self.post_nms_top_n(),
            nms_thresh=self.nms_thresh,
            score_thresh=self.score_thresh,
            min_size=self.min_size,
            weights=self.box_coder.weights,
            scale_clamp=self.box_coder.bbox_xform_clip,
        )

    def assign_targets_to_anchors(
        self, anchors: list[Tensor], targets: list[dict[str, Tensor]]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Labels [M] and matched boxes [M, 4] per image, equal to torchvision's, without an IoU matrix.

        Labels are 1 for a match, 0 for background, -1 for an ignored anchor. An anchor without a match gets the first
        ground truth as its box, and zeros in an image without ground truths.
        """
        if not _ASSIGNING.are_own(self):
            return super().assign_targets_to_anchors(anchors, targets)
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=False):
            gt_boxes = target["boxes"]
            matches = _matching.match_boxes(self.proposal_matcher, self.box_similarity, gt_boxes, boxes)
            labels.append(_matching.labels_of(matches))
            none = torch.zeros_like(boxes, dtype=torch.float32)
            matched.append(gt_boxes[matches.clamp(min=0)] if gt_boxes.numel() else none)
        return labels, matched

    def _knows_anchors(self) -> bool:
        own_parts = ANCHORS.are_own(self.anchor_generator) and BOX_CODER.are_own(self.box_coder)
        return own_parts and PROPOSALS.are_own(self)

    def _losses(
        self, images: ImageList, maps: list[Tensor], objectness: list[Tensor], deltas: list[Tensor], targets: Any
    ) -> dict[str, Tensor]:
        if not LOSSES.are_own(self):
            anchors = self.anchor_generator(images, maps)
            labels, matched = self.assign_targets_to_anchors(anchors, targets)
            goals = self.box_coder.encode(matched, anchors)
            loss, box_loss = self.compute_loss(*concat_box_prediction_layers(objectness, deltas), labels, goals)
        else:
            loss, box_loss = self._sampled_losses(images, maps, objectness, deltas, targets)
        return {"loss_objectness": loss, "loss_rpn_box_reg": box_loss}

    def _sampled_losses(
        self, images: ImageList, maps: list[Tensor], objectness: list[Tensor], deltas: list[Tensor], targets: Any
    ) -> tuple[Tensor, Tensor]:
        """torchvision's losses, bit for bit. The sampler reads labels alone, so it can run before boxes are encoded."""
        at, matches, gt_boxes = self._matched(images, maps, targets)
        labels = _matching.labels_of(matches)
        positive, negative = (torch.where(torch.cat(masks))[0] for masks in self.fg_bg_sampler(list(labels)))
        sampled = torch.cat([positive, negative])
        scores, box_deltas = concat_box_prediction_layers(objectness, deltas)
        image, anchor = positive // matches.size(1), positive % matches.size(1)
        goals = self.box_coder.encode_single(gt_boxes[image, matches[image, anchor]], at(anchor))
        box_loss = smooth_l1_loss(box_deltas[positive], goals, beta=1 / 9, reduction="sum") / sampled.numel()
        return binary_cross_entropy_with_logits(scores.flatten()[sampled], labels.flatten()[sampled]), box_loss

    def _matched(
        self, images: ImageList, maps: list[Tensor], targets: Any
    ) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
        """What makes the anchors [..., 4] of places [...], the matches [N, M], and padded ground truths [N, G, 4].

        All images share the anchors. They are matched by arithmetic, and none but the sampled ones is made.
        """
        _matching.check_targets(targets, len(maps[0]))
        boxes, like = [target["boxes"] for target in targets], maps[0]
        matching = (self.proposal_matcher, self.box_similarity, boxes)
        # torchvision rounds anchors to the maps' dtype: in others than these, not as arithmetic would.
        if like.dtype not in (torch.float32, torch.float64) or any(each.dtype != like.dtype for each in boxes):
            (anchors,) = self.anchor_generator(ImageList(images.tensors, [(0, 0)]), maps)
            return anchors.__getitem__, *_matching.match_images(*matching, anchors)
        grid = anchor_grid(self.anchor_generator, images.tensors.shape[-2:], [each.shape[2:] for each in maps])
        tables = anchor_tables(grid).to(like.device, non_blocking=True)

        def at(places: Tensor) -> Tensor:
            return anchors_at(tables, len(grid.sizes), places, like.dtype)

        return at, *_matching.match_images(*matching, grid)


ANCHORS = Part(_AnchorGeneratorBase, fused=AnchorGenerator)
BOX_CODER = Part(BoxCoder)
PROPOSALS = Steps(_RegionProposalBase, "filter_proposals", "_get_top_n_idx", replaced="forward")
LOSSES = Steps(_RegionProposalBase, "assign_targets_to_anchors", "compute_loss", fused=RegionProposalNetwork)
_ASSIGNING = Steps(_RegionProposalBase, replaced="assign_targets_to_anchors")


def cell_numbers(generator: _AnchorGeneratorBase) -> list[list[list[float]]]:
    """Per level the A base boxes (x1, y1, x2, y2), centred at the origin, of our generator or torchvision's."""
    if isinstance(generator, AnchorGenerator):
        return generator.cell_numbers()
    return [table.tolist() for table in generator.cell_anchors]


def anchor_grid(
    generator: _AnchorGeneratorBase, image_size: Sequence[int], map_sizes: Sequence[Sequence[int]]
) -> ops.AnchorGrid:
    """The anchors that `generator` has for a padded image, both (height, width), and its maps, as a rule."""
    sizes = [(height, width) for height, width in map_sizes]
    # torchvision's strides are quotients of the padded size.
    strides = [(image_size[0] // height, image_size[1] // width) for height, width in sizes]
    return ops.AnchorGrid(cell_numbers(generator), sizes, strides)


def anchor_tables(grid: ops.AnchorGrid) -> Tensor:
    """What :func:`anchors_at` reads, a float64 tensor on the CPU: 6 numbers for each level, then all cell anchors."""
    levels: list[int] = []
    cells: list[float] = []
    first = 0
    for anchors, (height, width), strides in zip(grid.cell_anchors, grid.sizes, grid.strides, strict=True):
        levels += [first, len(anchors), width, *strides, len(cells) // 4]
        cells += [x for anchor in anchors for x in anchor]
        first += len(anchors) * height * width
    return torch.tensor([*levels, *cells], dtype=torch.float64, device="cpu")


def anchors_at(tables: Tensor, levels: int, places: Tensor, dtype: torch.dtype) -> Tensor:
    """The anchors of a grid with offset 0, of which no other is made.

    Args:
        tables: :func:`anchor_tables` of the grid, on the device of `places`.
        levels: how many the grid has.
        places: [...] int64, the anchors' places in the order of :class:`ops.AnchorGrid`.

    Returns:
        [..., 4] (x1, y1, x2, y2), for float32 and float64 equal to the grid's bit for bit.
    """
    rows, cells = tables[: 6 * levels].long().view(levels, 6), tables[6 * levels :].to(dtype).view(-1, 4)
    level = torch.bucketize(places.contiguous(), rows[:, 0].contiguous(), right=True) - 1
    first, anchors, width, down, right, own_cells = rows[level].unbind(-1)
    place = places - first
    cell, anchor = place // anchors, place % anchors
    x, y = (cell % width) * right, (cell // width) * down
    return cells[own_cells + anchor] + torch.stack([x, y, x, y], -1).to(dtype)
