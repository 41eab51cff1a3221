# SPDX-License-Identifier: Apache-2.0
"""The ops that select, match and paste: torchvision's sequences of calls, and ours, on the inputs of scenes.py.

On a CPU ours ends, as torchvision's does, in lists whose lengths are data. On a GPU it is the padded form, which waits
for nothing and so can be captured in a graph; torchvision has no such form.

Their results are decisions, so float64 says nothing about them: they are held to the reference in the same dtype, the
same boxes in the same order, with coordinates and scores off by no more than roundings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection import retinanet, roi_heads, rpn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import batched_nms, box_iou
from torchvision.ops import sigmoid_focal_loss as focal_losses

from fpn_fast import backends, nn, ops
from fpn_fast.bench import scenes
from fpn_fast.bench.cases import Case, image_size
from fpn_fast.bench.op import Expectation, Function, Op, listed

NMS_IOU, PROPOSAL_IOU = 0.5, 0.7
#: torchvision's RPN: at least and less than these a match and background.
HIGH_IOU, LOW_IOU = 0.7, 0.3
#: A box is decoded in about eight roundings, of numbers up to this many pixels.
DECODE_ROUNDINGS, DECODE_RANGE = 8, 4096
#: Of a probability, relative to 1.
SCORE_ROUNDINGS = 4


def by_reference(function: Function) -> Function:
    """`function`, which calls one of the ops, by the op's reference."""

    def run(inputs: Sequence[Tensor]) -> Any:
        with backends.use("reference"):
            return function(inputs)

    return run


def unpadded(result: Any) -> list[Tensor]:
    """(boxes [N, P, 4], ..., counts [N]) -> the boxes of each image, then the rest of each; a list is one already."""
    if isinstance(result, list):
        return result
    *padded, counts = result
    lengths = counts.tolist()
    return [image[:length] for tensor in padded for image, length in zip(tensor, lengths, strict=True)]


def decided(reference: Function, tensors_of: Callable[[Any], list[Tensor]] = listed) -> Function:
    """The expectation of an op that decides: the reference's results, floating-point ones to rounding."""

    def bound(tensor: Tensor) -> float:
        if not tensor.is_floating_point():
            return 0.0
        eps = torch.finfo(tensor.dtype).eps
        return DECODE_ROUNDINGS * DECODE_RANGE * eps if tensor.dim() == 2 else SCORE_ROUNDINGS * eps

    def expected(inputs: Sequence[Tensor]) -> Expectation:
        results = tensors_of(reference(inputs))
        dtypes = [result.dtype for result in results]
        return Expectation([r.double() for r in results], list(map(bound, results)), dtypes, tensors_of)

    return expected


class Sizes:
    """The images' sizes, brought to a device once: a CUDA graph cannot hold the copy."""

    def __init__(self, batch: int, image_size: tuple[int, int]) -> None:
        self.here = torch.tensor([image_size] * batch)
        self.there: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """[N, 2] on `device`."""
        if device not in self.there:
            self.there[device] = self.here.to(device)
        return self.there[device]


def generate_proposals(case: Case) -> Op:
    """Everything after an RPN's head, from its maps to the proposals of each image."""
    head = scenes.rpn_head(image_size(case), case.levels)
    # As torchvision has them: as many proposals as candidates of a level.
    top_n = {"training": case.pre_nms_top_n, "testing": case.pre_nms_top_n}
    arguments = (None, HIGH_IOU, LOW_IOU, 256, 0.5, top_n, top_n, PROPOSAL_IOU)
    theirs = rpn.RegionProposalNetwork(head.generator, *arguments).eval()
    anchors = nn.AnchorGenerator(head.generator.sizes, head.generator.aspect_ratios)
    mine = nn.RegionProposalNetwork(anchors, *arguments).eval()
    levels = len(case.levels)

    form = torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        tables = scenes.head_tables(head, case.batch, 1)
        return [m.to(device).contiguous(memory_format=form) for table in tables for m in scenes.maps_of(head, table)]

    def eager(maps: Sequence[Tensor]) -> list[Tensor]:
        logits, deltas = list(maps[:levels]), list(maps[levels:])
        images = head.images(case.batch, maps[0].device)
        anchors = theirs.anchor_generator(images, logits)
        numbers = [each[0].numel() for each in logits]
        objectness, codes = rpn.concat_box_prediction_layers(logits, deltas)
        decoded = theirs.box_coder.decode(codes, anchors).view(case.batch, -1, 4)
        boxes, scores = theirs.filter_proposals(decoded, objectness, images.image_sizes, numbers)
        return [*boxes, *scores]

    sizes = Sizes(case.batch, head.image_size)

    def fused(maps: Sequence[Tensor]) -> Any:
        device = maps[0].device
        if device.type == "cpu":
            images = head.images(case.batch, device)
            return unpadded(mine.proposals_of_head(images, maps[:levels], maps[levels:]))
        return ops.generate_proposals(
            maps[:levels],
            maps[levels:],
            head.cells,
            head.strides,
            sizes.on(device),
            pre_nms_top_n=case.pre_nms_top_n,
            post_nms_top_n=case.pre_nms_top_n,
            nms_thresh=PROPOSAL_IOU,
        )

    plain = by_reference(fused)
    return Op(inputs, plain, eager, fused, compiled=eager, fullgraph=False, expected=decided(plain, unpadded))


def select_detections(case: Case) -> Op:
    """Everything after RetinaNet's head, from its tables to the detections of each image.

    torchvision's head permutes and concatenates its maps itself, so both sides are given what comes out.
    """
    head = scenes.retinanet_head(image_size(case), case.levels)
    numbers = [case.anchors * height * width for height, width in case.levels]
    theirs = SimpleNamespace(
        score_thresh=0.05,
        topk_candidates=case.pre_nms_top_n,
        nms_thresh=NMS_IOU,
        detections_per_img=300,
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
    )
    sizes = Sizes(case.batch, head.image_size)

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        return [each.to(device) for each in scenes.head_tables(head, case.batch, case.classes)]

    def eager(tables: Sequence[Tensor]) -> list[Tensor]:
        images = head.images(case.batch, tables[0].device)
        features = [images.tensors[:, :1, :height, :width] for height, width in case.levels]
        anchors = [list(each.split(numbers)) for each in head.generator(images, features)]
        outputs = dict(zip(("cls_logits", "bbox_regression"), (list(t.split(numbers, 1)) for t in tables), strict=True))
        found = retinanet.RetinaNet.postprocess_detections(theirs, outputs, anchors, images.image_sizes)
        return [each[name] for name in ("boxes", "scores", "labels") for each in found]

    def fused(tables: Sequence[Tensor]) -> Any:
        logits, deltas = (scenes.maps_of(head, table) for table in tables)
        padded = ops.select_detections(
            logits,
            deltas,
            head.cells,
            head.strides,
            sizes.on(tables[0].device),
            score_thresh=theirs.score_thresh,
            pre_nms_top_n=theirs.topk_candidates,
            nms_thresh=theirs.nms_thresh,
            max_detections=theirs.detections_per_img,
        )
        return unpadded(padded) if tables[0].device.type == "cpu" else padded

    plain = by_reference(fused)
    return Op(inputs, plain, eager, fused, compiled=eager, fullgraph=False, expected=decided(plain, unpadded))


def batched_nms_of(case: Case) -> Op:
    """torchvision's batched_nms: boxes of one image in groups."""

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        return [each.to(device) for each in scenes.detections(case.boxes, case.classes, *image_size(case))]

    def eager(found: Sequence[Tensor]) -> Tensor:
        boxes, scores, groups = found
        return batched_nms(boxes, scores, groups, NMS_IOU)

    def fused(found: Sequence[Tensor]) -> Any:
        boxes, scores, groups = found
        if boxes.device.type == "cpu":
            return ops.batched_nms(boxes, scores, groups, NMS_IOU)
        return ops.segmented_nms(boxes[None], scores[None], groups[None], None, NMS_IOU, len(boxes))

    def kept(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else unpadded(result)

    plain = by_reference(fused)
    return Op(
        inputs,
        plain,
        eager,
        fused,
        compiled=eager,
        fullgraph=False,
        kernel="segmented_nms",
        expected=decided(plain, kept),
    )


def sigmoid_focal_loss(case: Case) -> Op:
    """The loss of a RetinaNet's logits as its head sums it up, before a trained head's background is: one in a hundred.
    The classes of three anchors in a thousand are there before; no decision, so checked against float64."""
    anchors = case.batch * case.anchors * sum(height * width for height, width in case.levels)
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(case.classes, (anchors,), generator=generator)
    labels = torch.where(torch.rand(anchors, generator=generator) < 3e-3, some, -1)
    labels_on: dict[torch.device, Tensor] = {}

    def of(logits: Tensor) -> Tensor:
        if logits.device not in labels_on:
            labels_on[logits.device] = labels.to(logits.device)
        return labels_on[logits.device]

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        return [torch.randn(anchors, case.classes, generator=generator).sub_(4.6).to(device)]

    def eager(logits: Sequence[Tensor]) -> Tensor:
        here = of(logits[0])
        foreground = here >= 0
        targets = torch.zeros_like(logits[0])
        targets[foreground, here[foreground]] = 1.0
        loss: Tensor = focal_losses(logits[0], targets, reduction="sum")
        return loss

    def fused(logits: Sequence[Tensor]) -> Tensor:
        return ops.sigmoid_focal_loss(logits[0], of(logits[0]))

    return Op(inputs, by_reference(fused), eager, fused, compiled=eager, fullgraph=False)


def match_anchors(case: Case) -> Op:
    """An image's anchors, which both sides are given, to its ground truths."""
    head = scenes.rpn_head(image_size(case), case.levels)
    matcher = Matcher(HIGH_IOU, LOW_IOU, allow_low_quality_matches=True)

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        return [each.to(device) for each in (scenes.ground_truths(case.boxes, *head.image_size), head.anchors())]

    def eager(boxes: Sequence[Tensor]) -> Tensor:
        gts, anchors = boxes
        return matcher(box_iou(gts, anchors))

    def fused(boxes: Sequence[Tensor]) -> Tensor:
        gts, anchors = boxes
        return ops.match_anchors(gts[None], None, anchors, high_threshold=HIGH_IOU, low_threshold=LOW_IOU)[0][0]

    plain = by_reference(fused)
    return Op(inputs, plain, eager, fused, compiled=eager, fullgraph=False, expected=decided(plain))


def paste_masks(case: Case) -> Op:
    """The masks of an image's detections, in the image; no decision, so checked against float64."""
    size = image_size(case)

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        masks = scenes.mask_probabilities(case.boxes, case.output_size)
        return [masks.to(device), scenes.ground_truths(case.boxes, *size).to(device)]

    def eager(found: Sequence[Tensor]) -> Tensor:
        return roi_heads.paste_masks_in_image(found[0], found[1], size)

    def fused(found: Sequence[Tensor]) -> Tensor:
        return ops.paste_masks(found[0], found[1], size)

    # torch.compile makes a graph for each size of a box, and after eight of them leaves the rest to eager.
    return Op(inputs, by_reference(fused), eager, fused, compiled=None)


def heatmaps_to_keypoints(case: Case) -> Op:
    """The keypoints of an image's people."""
    size = image_size(case)

    def inputs(case: Case, device: torch.device) -> list[Tensor]:
        heatmaps = scenes.keypoint_logits(case.boxes, case.classes, case.output_size)
        return [heatmaps.to(device), scenes.ground_truths(case.boxes, *size).to(device)]

    def eager(found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return roi_heads.heatmaps_to_keypoints(found[0], found[1])

    def fused(found: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        return ops.heatmaps_to_keypoints(found[0], found[1])

    def tables_of(result: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Numbers of each box, which are judged as those of boxes are."""
        return [result[0].flatten(1), result[1]]

    # As of masks: a graph for each size of a box.
    return Op(
        inputs, by_reference(fused), eager, fused, compiled=None, expected=decided(by_reference(fused), tables_of)
    )


OPS: dict[str, Callable[[Case], Op]] = {
    "generate_proposals": generate_proposals,
    "select_detections": select_detections,
    "sigmoid_focal_loss": sigmoid_focal_loss,
    "batched_nms": batched_nms_of,
    "match_anchors": match_anchors,
    "paste_masks": paste_masks,
    "heatmaps_to_keypoints": heatmaps_to_keypoints,
}
