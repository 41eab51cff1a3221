# SPDX-License-Identifier: Apache-2.0
"""Sync-free sampling for the training of two-stage detectors: samples of a fixed size, drawn on the device.

torchvision's sampler looks up the positions of positive labels, which synchronises with the host several times an
image. Here every label gets a random key, and top-k takes the largest keys of each kind. Where an image has too few
candidates, the sample keeps its size and the missing entries get a weight of zero. Samples have torchvision's
distribution, and another random stream.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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
_ROI_TRAINING = Steps(
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


def _encoded(coder: BoxCoder, boxes: Tensor, anchors: Tensor, counted: Tensor) -> Tensor:
    """coder.encode_single of boxes and anchors [N, S, 4] where counted [N, S], finite values elsewhere.

    torchvision copies the weights to the GPU for every call, which synchronises.
    """
    # (0, 0, 1, 1); any box with an area serves.
    unit = (torch.arange(4, device=boxes.device) >= 2).to(boxes.dtype)
    boxes, anchors = (torch.where(counted[..., None], each, unit) for each in (boxes, anchors))
    sizes, own_sizes = (each[..., 2:] - each[..., :2] for each in (anchors, boxes))
    shifts = (boxes[..., :2] + 0.5 * own_sizes) - (anchors[..., :2] + 0.5 * sizes)
    parts = torch.cat([shifts / sizes, torch.log(own_sizes / sizes)], -1)
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
        loss, box_loss = self._sampled_losses(images, maps, objectness, deltas, targets)
        return list(boxes.unbind()), {"loss_objectness": loss, "loss_rpn_box_reg": box_loss}

    def _sampled_losses(
        self, images: ImageList, maps: list[Tensor], objectness: list[Tensor], deltas: list[Tensor], targets: Any
    ) -> tuple[Tensor, Tensor]:
        """torchvision's losses: a mean over the sample, and a sum over positives divided by the sample's size."""
        anchors, matches, gt_boxes = self._matched(images, maps, targets)
        places, kinds = self.fg_bg_sampler.sample(_matching.labels_of(matches))
        count = (kinds >= 0).sum().clamp(min=1)
        scores, box_deltas = concat_box_prediction_layers(objectness, deltas)
        sampled = scores.view(matches.shape).gather(1, places)
        losses = F.binary_cross_entropy_with_logits(sampled, (kinds > 0).to(sampled.dtype), reduction="none")
        loss = losses.masked_fill(kinds < 0, 0).sum() / count
        # Positives come first.
        few = self.fg_bg_sampler.max_positives
        places, is_positive = places[:, :few], kinds[:, :few] > 0
        # One row more, because gather needs a row also where an image has no ground truth.
        own = _rows(F.pad(gt_boxes, (0, 0, 0, 1)), matches.gather(1, places).clamp(min=0))
        goals = _encoded(self.box_coder, own, anchors[places], is_positive)
        found = _rows(box_deltas.view(*matches.shape, 4), places)
        return loss, _box_loss(found, goals, is_positive) / count


def _box_loss(found: Tensor, goals: Tensor, counted: Tensor) -> Tensor:
    """torchvision's box loss, summed over the counted [N, S] rows of [N, S, 4]."""
    losses = F.smooth_l1_loss(found, goals, beta=1 / 9, reduction="none")
    return losses.masked_fill(~counted[..., None], 0).sum()


class StaticRoIHeads(RoIHeads):
    """:class:`RoIHeads` that train without host synchronisation, on samples of a fixed size.

    Proposals without an area are ignored. Keypoints are not supported. Evaluation is unchanged.
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
        own = _ROI_TRAINING.are_own(self) and BOX_CODER.are_own(self.box_coder)
        if not own or not _SAMPLER.are_own(self.fg_bg_sampler):
            # torchvision would sample the padding as background.
            found = [boxes[boxes[:, 2] > boxes[:, 0]] for boxes in proposals]
            return super().forward(features, found, image_shapes, targets)
        if targets is None:
            raise ValueError("targets must have the boxes and labels of each image in training, got None")
        self.check_targets(targets)
        boxes, kinds, owners, labels, gt_boxes = self._sample(proposals, targets)
        pooled = self.box_roi_pool(features, list(boxes.unbind()), image_shapes)
        logits, deltas = self.box_predictor(self.box_head(pooled))
        count = (kinds >= 0).sum().clamp(min=1)
        class_loss = F.cross_entropy(logits, labels.flatten(), ignore_index=-1, reduction="sum") / count
        # Positives come first.
        few = self.fg_bg_sampler.max_positives
        is_positive, classes = kinds[:, :few] > 0, labels[:, :few].clamp(min=0)
        owners, few_boxes = owners[:, :few], boxes[:, :few]
        goals = _encoded(self.box_coder, _rows(gt_boxes, owners), few_boxes, is_positive)
        of_classes = deltas.view(*labels.shape, -1, 4)[:, :few]
        own_class = classes[..., None, None].expand(-1, -1, 1, 4)
        found = of_classes.gather(2, own_class).squeeze(2)
        losses = {"loss_classifier": class_loss, "loss_box_reg": _box_loss(found, goals, is_positive) / count}
        if self.has_mask():
            pooled = self.mask_roi_pool(features, list(few_boxes.unbind()), image_shapes)
            mask_logits = self.mask_predictor(self.mask_head(pooled))
            losses["loss_mask"] = _mask_loss(mask_logits, few_boxes, targets, owners, classes, is_positive)
        return [], losses

    def _sample(self, proposals: list[Tensor], targets: list[dict[str, Tensor]]) -> tuple[Tensor, ...]:
        """Boxes [N, S, 4], kinds, ground-truth indices and labels [N, S] of a sample, and all ground truths [N, G, 4].

        Labels are class indices: 0 for background, -1 for an empty entry.
        """
        gt_list = [target["boxes"].to(proposals[0].dtype) for target in targets]
        gt_boxes, _ = ops.pad_boxes(gt_list)
        # One row more, because gather needs a row also where no image has a ground truth.
        gt_boxes = F.pad(gt_boxes, (0, 0, 0, 1))
        padded, _ = ops.pad_boxes(proposals)
        boxes = torch.cat([padded, gt_boxes], 1)
        classes = [target["labels"] for target in targets]
        owners, labels = map(torch.stack, self.assign_targets_to_proposals(list(boxes.unbind()), gt_list, classes))
        labels = labels.masked_fill(boxes[..., 2] <= boxes[..., 0], -1)
        places, kinds = self.fg_bg_sampler.sample(labels)
        labels = labels.gather(1, places).masked_fill(kinds < 0, -1)
        return _rows(boxes, places), kinds, owners.gather(1, places), labels, gt_boxes


def _mask_loss(
    logits: Tensor, boxes: Tensor, targets: list[dict[str, Tensor]], owners: Tensor, classes: Tensor, counted: Tensor
) -> Tensor:
    """torchvision's mask loss: the mean over the pixels of the counted [N, P] positives."""
    side = logits.shape[-1]
    # An infinite box, which is never a positive, has no number of samples.
    boxes = boxes.masked_fill(~counted[..., None], 0)
    goals = []
    for own_boxes, own, target in zip(boxes, owners, targets, strict=True):
        masks = target["masks"]
        if len(masks) == 0:
            goals.append(logits.new_zeros(len(own), side, side))
            continue
        rois = torch.cat([own[:, None].to(own_boxes.dtype), own_boxes], 1)
        goals.append(roi_align(masks[:, None].to(own_boxes.dtype), rois, (side, side), 1.0)[:, 0])
    chosen = logits.gather(1, classes.view(-1, 1, 1, 1).expand(-1, 1, side, side)).squeeze(1)
    losses = F.binary_cross_entropy_with_logits(chosen, torch.cat(goals).to(chosen.dtype), reduction="none")
    kept = losses.masked_fill(~counted.view(-1, 1, 1), 0)
    return kept.sum() / (counted.sum() * side * side).clamp(min=1)


def use_static_sampling(model: nn.Module) -> None:
    """Makes a torchvision Faster or Mask R-CNN train without host synchronisation, in place.

    It replaces the samplers of both stages by :class:`FixedSizeSampler`. The model may be accelerated before. Weights,
    ``state_dict`` keys and evaluation are unchanged. Losses keep their distribution; the random numbers differ.

    Raises:
        TypeError: the model lacks one of the two stages or has keypoints; or its anchor generator, box coder, sampler
            or stage is a class of your own.
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
    if heads.has_keypoint():
        raise TypeError("static sampling does not support keypoints, got a model with a keypoint head")
    rpn.__class__, heads.__class__ = StaticRegionProposalNetwork, StaticRoIHeads
    for stage in (rpn, heads):
        old = stage.fg_bg_sampler
        stage.fg_bg_sampler = FixedSizeSampler(old.batch_size_per_image, old.positive_fraction)
