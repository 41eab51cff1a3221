# SPDX-License-Identifier: Apache-2.0
"""Sync-free sampling for the training of two-stage detectors: samples of a fixed size, drawn on the device.

torchvision's sampler looks up the positions of positive labels, which synchronises with the host several times an
image. Here every label gets a random key, and top-k takes the largest keys of each kind. Where an image has too few
candidates, the sample keeps its size and the missing entries get a weight of zero. Samples have torchvision's
distribution, and another random stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator as _AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork as _RegionProposalNetwork
from torchvision.models.detection.rpn import concat_box_prediction_layers
from torchvision.ops import roi_align

from fpn_fast import ops
from fpn_fast.nn import _matching
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn.region_proposal import BOX_CODER, LOSSES, AnchorGenerator, RegionProposalNetwork
from fpn_fast.nn.roi_heads import RoIHeads

__all__ = ["FixedSizeSampler", "StaticRegionProposalNetwork", "StaticRoIHeads", "use_static_sampling"]

_TORCHVISIONS_SAMPLER = Part(BalancedPositiveNegativeSampler)
ROI_TRAINING = Steps(
    roi_heads.RoIHeads,
    *("select_training_samples", "add_gt_proposals", "assign_targets_to_proposals", "subsample"),
    replaced="forward",
    fused=RoIHeads,
)


class FixedSizeSampler(BalancedPositiveNegativeSampler):
    """Samples all images at once without synchronising: drop-in for torchvision's BalancedPositiveNegativeSampler.

    Constructor and distribution are torchvision's: per image a uniformly random subset of the positives, at most
    ``positive_fraction`` of ``batch_size_per_image``, and a random subset of the negatives that fills the rest.

    Note:
        Keys are float32, so one pair in 2^24 is equal. The device decides between equal keys.
    """

    @property
    def max_positives(self) -> int:
        return int(self.batch_size_per_image * self.positive_fraction)

    def sample(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Draws the samples of all images.

        Args:
            labels: [N, M]: positive from 1, negative for 0, ignored below 0.

        Returns:
            (places [N, S] int64 in 0..M-1, kinds [N, S] int64), with S = ``batch_size_per_image``. Kinds are 1 for a
            positive, 0 for a negative and -1 for an empty entry. Positives come first.
        """
        images, candidates = labels.shape
        size = self.batch_size_per_image
        keys = torch.rand(labels.shape, device=labels.device)
        # Keys are drawn from 0 to 1, so -1 is below all of them.
        positive_keys, positives = keys.masked_fill(labels < 1, -1).topk(min(self.max_positives, candidates))
        negative_keys, negatives = keys.masked_fill(labels != 0, -1).topk(min(size, candidates))
        slots = torch.arange(size, device=labels.device).expand(images, size)
        found = (positive_keys >= 0).sum(1, keepdim=True)
        is_positive = slots < found
        of_negatives = slots - found
        is_negative = ~is_positive & (of_negatives < (negative_keys >= 0).sum(1, keepdim=True))
        places = torch.where(
            is_positive, _at(positives, slots), torch.where(is_negative, _at(negatives, of_negatives), 0)
        )
        return places, is_positive.long() - (~is_positive & ~is_negative).long()

    def __call__(self, matched_idxs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Labels [M_n] per image -> per image uint8 masks of the sampled positives and negatives."""
        masks: tuple[list[Tensor], list[Tensor]] = ([], [])
        for labels in matched_idxs:
            places, kinds = self.sample(labels[None])
            for mask, kind in zip(masks, (1, 0), strict=True):
                chosen = torch.zeros(len(labels), dtype=torch.uint8, device=labels.device)
                mask.append(chosen.scatter_reduce(0, places[0], (kinds[0] == kind).to(torch.uint8), "amax"))
        return masks


_SAMPLER = Part(FixedSizeSampler)


def _at(table: Tensor, places: Tensor) -> Tensor:
    """table [N, K] at places [N, S]. The value is arbitrary for a place outside 0..K-1."""
    if table.shape[1] == 0:
        return torch.zeros_like(places)
    return table.gather(1, places.clamp(0, table.shape[1] - 1))


def _rows(table: Tensor, places: Tensor) -> Tensor:
    """table [N, M, 4] at places [N, S] -> [N, S, 4]."""
    return table.gather(1, places[..., None].expand(-1, -1, 4))


def encoded(coder: BoxCoder, boxes: Tensor, anchors: Tensor, counted: Tensor) -> Tensor:
    """coder.encode_single of boxes and anchors [N, S, 4] where counted [N, S], zeros elsewhere.

    torchvision copies the weights to the GPU for every call, which synchronises.
    """
    # (0, 0, 1, 1); any box with an area serves.
    unit = (torch.arange(4, device=boxes.device) >= 2).to(boxes.dtype)
    boxes, anchors = (torch.where(counted[..., None], each, unit) for each in (boxes, anchors))
    sizes, own_sizes = (each[..., 2:] - each[..., :2] for each in (anchors, boxes))
    shifts = (boxes[..., :2] + 0.5 * own_sizes) - (anchors[..., :2] + 0.5 * sizes)
    parts = torch.cat([shifts / sizes, torch.log(own_sizes / sizes)], -1)
    if tuple(coder.weights) == (1, 1, 1, 1):
        return parts
    return torch.stack([part * weight for part, weight in zip(parts.unbind(-1), coder.weights, strict=True)], -1)


class StaticRegionProposalNetwork(RegionProposalNetwork):
    """A :class:`RegionProposalNetwork` that trains without host synchronisation.

    In training, proposals are padded: [P, 4] per image, with P = ``post_nms_top_n()`` and zeros after the last.
    :class:`StaticRoIHeads` ignores boxes without an area. Evaluation is unchanged.
    """

    fg_bg_sampler: FixedSizeSampler

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """See :class:`RegionProposalNetwork`. In training, boxes are padded."""
        own = self._knows_anchors() and LOSSES.are_own(self) and _SAMPLER.are_own(self.fg_bg_sampler)
        if not self.training or not own:
            return super().forward(images, features, targets)
        if targets is None:
            raise ValueError("targets must have the boxes of each image in training, got None")
        maps = list(features.values())
        objectness, deltas = self.head(maps)
        boxes, _, _ = self.proposals_of_head(images, objectness, deltas)
        at, matches, gt_boxes = self._matched(images, maps, targets)
        # One row more, because gather needs a row also where no image has a ground truth.
        gt_boxes = F.pad(gt_boxes, (0, 0, 0, 1))
        sampler = self.fg_bg_sampler
        losses = proposal_losses(self, sampler, objectness, deltas, matches, gt_boxes, at)
        return list(boxes.unbind()), losses


def proposal_losses(
    rpn: _RegionProposalNetwork,
    sampler: FixedSizeSampler,
    objectness: list[Tensor],
    deltas: list[Tensor],
    matches: Tensor,
    gt_boxes: Tensor,
    anchors_at: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    """torchvision's losses of a sample of anchors: a mean over it, and a sum over positives divided by its size.

    Args:
        rpn: for its box coder.
        sampler: draws the sample.
        objectness, deltas: the head's maps, [N, A, H_l, W_l] and [N, 4A, H_l, W_l].
        matches: [N, M] int64, as of :func:`ops.match_anchors`.
        gt_boxes: [N, G, 4], with G at least 1.
        anchors_at: [N, S] int64, places in 0..M-1 -> anchors [N, S, 4].
    """
    places, kinds = sampler.sample(_matching.labels_of(matches))
    count = (kinds >= 0).sum().clamp(min=1)
    scores, box_deltas = concat_box_prediction_layers(objectness, deltas)
    sampled = scores.view(matches.shape).gather(1, places)
    losses = F.binary_cross_entropy_with_logits(sampled, (kinds > 0).to(sampled.dtype), reduction="none")
    loss = losses.masked_fill(kinds < 0, 0).sum() / count
    # Positives come first.
    few = sampler.max_positives
    places, is_positive = places[:, :few], kinds[:, :few] > 0
    own = _rows(gt_boxes, matches.gather(1, places).clamp(min=0))
    goals = encoded(rpn.box_coder, own, anchors_at(places), is_positive)
    found = _rows(box_deltas.view(*matches.shape, 4), places)
    return {"loss_objectness": loss, "loss_rpn_box_reg": _box_loss(found, goals, is_positive) / count}


def _box_loss(found: Tensor, goals: Tensor, counted: Tensor) -> Tensor:
    """torchvision's box loss, summed over the counted [N, S] rows of [N, S, 4]."""
    losses = F.smooth_l1_loss(found, goals, beta=1 / 9, reduction="none")
    return losses.masked_fill(~counted[..., None], 0).sum()


class StaticRoIHeads(RoIHeads):
    """:class:`RoIHeads` that train without host synchronisation, on samples of a fixed size.

    Proposals without an area are ignored. Evaluation is unchanged.
    """

    fg_bg_sampler: FixedSizeSampler

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """See :class:`RoIHeads`."""
        if not self.training:
            return super().forward(features, proposals, image_shapes, targets)
        own = ROI_TRAINING.are_own(self) and BOX_CODER.are_own(self.box_coder)
        if not own or not _SAMPLER.are_own(self.fg_bg_sampler):
            # torchvision would sample the padding as background.
            found = [boxes[boxes[:, 2] > boxes[:, 0]] for boxes in proposals]
            return super().forward(features, found, image_shapes, targets)
        if targets is None:
            raise ValueError("targets must have the boxes and labels of each image in training, got None")
        self.check_targets(targets)
        padded, _ = ops.pad_boxes(proposals)
        gt_boxes, _ = ops.pad_boxes([target["boxes"].to(padded.dtype) for target in targets])
        classes = [target["labels"] for target in targets]
        # One row more, because gather needs a row also where no image has a ground truth.
        gt_boxes = F.pad(gt_boxes, (0, 0, 0, 1))
        boxes = torch.cat([padded, gt_boxes], 1)
        assigned = self.assign_targets_to_proposals(
            list(boxes.unbind()), [target["boxes"].to(padded.dtype) for target in targets], classes
        )
        owners, labels = map(torch.stack, assigned)
        keypoints = None
        if self.has_keypoint():
            # An image without ground truths has an empty tensor of any shape.
            points = [target["keypoints"] for target in targets]
            shape = next((each.shape[1:] for each in points if each.numel()), (1, 3))
            keypoints = pad_sequence([each.reshape(-1, *shape) for each in points], batch_first=True)
            keypoints = F.pad(keypoints, (0, 0, 0, 0, 0, 1))
        masks = [target["masks"] for target in targets] if self.has_mask() else None
        sampled = (boxes, owners, labels, gt_boxes, masks, keypoints)
        return [], StaticRoIHeads.train_on_sample(self, self.fg_bg_sampler, features, image_shapes, *sampled)

    def train_on_sample(
        self: RoIHeads,
        sampler: FixedSizeSampler,
        features: dict[str, Tensor],
        image_shapes: list[tuple[int, int]],
        boxes: Tensor,
        owners: Tensor,
        labels: Tensor,
        gt_boxes: Tensor,
        masks: Iterable[Tensor] | None,
        keypoints: Tensor | None,
    ) -> dict[str, Tensor]:
        """torchvision's losses of all heads, of a sample of boxes.

        Args:
                sampler: draws the sample.
            features: maps by name.
            image_shapes: (height, width) per image.
            boxes: [N, M, 4], proposals and ground truths. One without an area is ignored.
            owners: [N, M] int64, the index of each box's ground truth, any for none.
            labels: [N, M] int64, its label; 0 for background, -1 for a box to be ignored.
            gt_boxes: [N, G, 4], with G at least 1.
            masks: per image [G_n, H, W], where there is a mask head.
            keypoints: [N, G, K, 3], where there is a keypoint head.
        """
        labels = labels.masked_fill(boxes[..., 2] <= boxes[..., 0], -1)
        places, kinds = sampler.sample(labels)
        labels = labels.gather(1, places).masked_fill(kinds < 0, -1)
        boxes, owners = _rows(boxes, places), owners.gather(1, places)
        pooled = self.box_roi_pool(features, list(boxes.unbind()), image_shapes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        count = (kinds >= 0).sum().clamp(min=1)
        class_loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-1, reduction="sum") / count
        # Positives come first.
        few = sampler.max_positives
        is_positive, classes = kinds[:, :few] > 0, labels[:, :few].clamp(min=0)
        owners, boxes = owners[:, :few], boxes[:, :few]
        goals = encoded(self.box_coder, _rows(gt_boxes, owners), boxes, is_positive)
        of_classes = deltas.view(*labels.shape, -1, 4)[:, :few]
        found = of_classes.gather(2, classes[..., None, None].expand(-1, -1, 1, 4)).squeeze(2)
        losses = {"loss_classifier": class_loss, "loss_box_reg": _box_loss(found, goals, is_positive) / count}
        if self.has_mask():
            if masks is None:
                raise ValueError("targets must have masks for a mask head, got none")
            pooled = self.mask_roi_pool(features, list(boxes.unbind()), image_shapes)
            mask_logits = self.mask_predictor(self.mask_head(pooled))
            losses["loss_mask"] = _mask_loss(mask_logits, boxes, masks, owners, classes, is_positive)
        if self.has_keypoint():
            if keypoints is None:
                raise ValueError("targets must have keypoints for a keypoint head, got none")
            pooled = self.keypoint_roi_pool(features, list(boxes.unbind()), image_shapes)
            heatmaps = self.keypoint_predictor(self.keypoint_head(pooled))
            # [N, P, K, 3] of the ground truth of each box.
            own_points = keypoints.gather(1, owners[..., None, None].expand(-1, -1, *keypoints.shape[2:]))
            # Without any ground truth, K may be unknown.
            own_points = own_points.expand(-1, -1, heatmaps.shape[1], -1)
            losses["loss_keypoint"] = _keypoint_loss(heatmaps, boxes, own_points, is_positive)
        return losses


def _mask_loss(
    logits: Tensor, boxes: Tensor, masks: Iterable[Tensor], owners: Tensor, classes: Tensor, counted: Tensor
) -> Tensor:
    """torchvision's mask loss: the mean over the pixels of the counted [N, P] positives."""
    side = logits.shape[-1]
    # An infinite box, which is never a positive, has no number of samples.
    boxes = boxes.masked_fill(~counted[..., None], 0)
    goals = []
    # Image after image: masks as large as the canvas are made of floats for one image at a time.
    for own_boxes, own, own_masks in zip(boxes, owners, masks, strict=True):
        if len(own_masks) == 0:
            goals.append(logits.new_zeros(len(own), side, side))
            continue
        rois = torch.cat([own[:, None].to(own_boxes.dtype), own_boxes], 1)
        goals.append(roi_align(own_masks[:, None].to(own_boxes.dtype), rois, (side, side), 1.0)[:, 0])
    chosen = logits.gather(1, classes.view(-1, 1, 1, 1).expand(-1, 1, side, side)).squeeze(1)
    losses = F.binary_cross_entropy_with_logits(chosen, torch.cat(goals).to(chosen.dtype), reduction="none")
    kept = losses.masked_fill(~counted.view(-1, 1, 1), 0)
    return kept.sum() / (counted.sum() * side * side).clamp(min=1)


def _keypoint_loss(heatmaps: Tensor, boxes: Tensor, keypoints: Tensor, counted: Tensor) -> Tensor:
    """torchvision's keypoint loss: the mean over the visible keypoints inside their box, of the counted [N, P] boxes.

    heatmaps: [N * P, K, S, S]; boxes: [N, P, 4]; keypoints: [N, P, K, 3].
    """
    side = heatmaps.shape[-1]
    starts, ends = boxes[:, :, None, :2], boxes[:, :, None, 2:]
    points, visible = keypoints[..., :2], keypoints[..., 2] > 0
    cells = ((points - starts) * (side / (ends - starts))).floor()
    # A keypoint on the right or lower edge belongs to the last cell.
    cells = torch.where(points == ends, side - 1, cells)
    inside = ((cells >= 0) & (cells < side)).all(-1)
    valid = inside & visible & counted[:, :, None]
    # What is not valid may be no number at all.
    columns, rows = torch.where(valid[..., None], cells, 0).long().unbind(-1)
    goals = torch.where(valid, rows * side + columns, -1)
    losses = F.cross_entropy(heatmaps.flatten(2).flatten(0, 1), goals.flatten(), ignore_index=-1, reduction="sum")
    return losses / valid.sum().clamp(min=1)


def use_static_sampling(model: nn.Module) -> None:
    """Makes a torchvision Faster, Mask or Keypoint R-CNN train without host synchronisation, in place.

    It replaces the samplers of both stages by :class:`FixedSizeSampler`. The model may be accelerated before. Weights,
    ``state_dict`` keys and evaluation are unchanged. Losses keep their distribution; the random numbers differ.

    Raises:
        TypeError: the model lacks one of the stages, or its anchor generator, box coder, sampler or stage is a class
            of your own.
    """
    rpn: Any = getattr(model, "rpn", None)
    heads: Any = getattr(model, "roi_heads", None)
    stages = {_RegionProposalNetwork, RegionProposalNetwork}, {roi_heads.RoIHeads, RoIHeads}
    if type(rpn) not in stages[0] or type(heads) not in stages[1]:
        raise TypeError(
            "the model must have an rpn and roi_heads of torchvision or fpn_fast, got "
            f"{type(rpn).__name__} and {type(heads).__name__}"
        )
    usual = (
        (rpn.anchor_generator, (_AnchorGenerator, AnchorGenerator)),
        (rpn.box_coder, (BoxCoder,)),
        (heads.box_coder, (BoxCoder,)),
        (rpn.fg_bg_sampler, (BalancedPositiveNegativeSampler,)),
        (heads.fg_bg_sampler, (BalancedPositiveNegativeSampler,)),
    )
    for part, known in usual:
        if type(part) not in known:
            raise TypeError(f"the model's {known[0].__name__} must be torchvision's, got {type(part).__name__}")
    if not _TORCHVISIONS_SAMPLER.are_own(rpn.fg_bg_sampler):
        raise TypeError("BalancedPositiveNegativeSampler must be torchvision's own: static sampling replaces it")
    rpn.__class__, heads.__class__ = StaticRegionProposalNetwork, StaticRoIHeads
    for stage in (rpn, heads):
        old = stage.fg_bg_sampler
        stage.fg_bg_sampler = FixedSizeSampler(old.batch_size_per_image, old.positive_fraction)
