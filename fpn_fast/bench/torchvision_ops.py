# SPDX-License-Identifier: Apache-2.0
"""Every op of ours and the torchvision code that it replaces.

On a CPU ours ends in lists whose lengths depend on the data, as torchvision's code does. On a GPU it returns padded
tensors, which can be captured in a CUDA graph; torchvision cannot do that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import retinanet, roi_heads, rpn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.ops import MultiScaleRoIAlign, batched_nms, box_iou
from torchvision.ops import sigmoid_focal_loss as focal_losses

from fpn_fast import ops, reference
from fpn_fast.bench import scenes
from fpn_fast.bench.cases import Case, image_size, level_anchors, scales
from fpn_fast.bench.op import OnDevice, Op, lists_on_cpu, unpadded
from fpn_fast.bench.rois import random_rois

NMS_IOU, PROPOSAL_IOU = 0.5, 0.7
#: torchvision's RPN: an IoU of at least the first is a match, below the second background.
HIGH_IOU, LOW_IOU = 0.7, 0.3


def memory_format(case: Case) -> torch.memory_format:
    return torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format


def random_maps(case: Case) -> Callable[[torch.device], list[Tensor]]:
    return lambda device: [
        torch.randn(case.batch, case.channels, *size, device=device)
        .to(getattr(torch, case.dtype))
        .contiguous(memory_format=memory_format(case))
        for size in case.levels
    ]


def _copied(make: Callable[[], Sequence[Tensor]]) -> Callable[[torch.device], list[Tensor]]:
    """Inputs that are made on the CPU."""
    return lambda device: [each.to(device) for each in make()]


def head_maps(case: Case, head: scenes.Head) -> Callable[[torch.device], list[Tensor]]:
    """Maps of logits, then of deltas, of a trained head with one logit per anchor."""
    return lambda device: [
        each.to(device).contiguous(memory_format=memory_format(case))
        for table in scenes.head_tables(head, case.batch, 1)
        for each in head.maps_of(table)
    ]


def gradient_sums(case: Case) -> frozenset[str]:
    """Autograd adds the gradients of a map that is used twice, such as the coarsest one."""
    return frozenset({"aten::add"} if "backward" in case.direction else ())


def top_down(case: Case) -> Op:
    """The loop in torchvision's FeaturePyramidNetwork.forward, without its convolutions."""

    def eager(laterals: Sequence[Tensor]) -> list[Tensor]:
        merged = [laterals[-1]]
        for lateral in reversed(laterals[:-1]):
            merged.insert(0, lateral + F.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
        return merged

    inputs, alongside = random_maps(case), gradient_sums(case)
    return Op(inputs, eager, ops.top_down, reference.top_down, "top_down", fullgraph=True, alongside=alongside)


def upsample_add(case: Case) -> Op:
    def eager(maps: Sequence[Tensor]) -> Tensor:
        return maps[0] + F.interpolate(maps[1], size=maps[0].shape[-2:], mode="nearest")

    def fused(maps: Sequence[Tensor]) -> Tensor:
        return ops.upsample_add(maps[0], maps[1])

    return Op(
        random_maps(case),
        eager,
        fused,
        lambda maps: reference.upsample_add(maps[0], maps[1]),
        "top_down",
        fullgraph=True,
    )


def multiscale_roi_align(case: Case) -> Op:
    """torchvision's MultiScaleRoIAlign, on RoIs that a detector has already."""
    size = image_size(case)
    rois = random_rois(case.batch, case.rois, *size, case.clustered)
    module = MultiScaleRoIAlign([str(i) for i in range(len(case.levels))], case.output_size, case.sampling_ratio)
    boxes = OnDevice((rois, [rois[rois[:, 0] == i, 1:].contiguous() for i in range(case.batch)]))

    def eager(maps: Sequence[Tensor]) -> Tensor:
        # torchvision has no bfloat16 kernel. Its users have autocast there, which widens every map.
        with torch.autocast(maps[0].device.type, torch.bfloat16, enabled=maps[0].dtype == torch.bfloat16):
            named = {str(i): each for i, each in enumerate(maps)}
            pooled: Tensor = module(named, boxes(maps[0].device)[1], [size] * case.batch)
            return pooled

    def fused(maps: Sequence[Tensor]) -> Tensor:
        here, _ = boxes(maps[0].device)
        return ops.multiscale_roi_align(maps, here, case.output_size, scales(case), sampling_ratio=case.sampling_ratio)

    return Op(random_maps(case), eager, fused, eager, "multiscale_roi_align")


def generate_proposals(case: Case) -> Op:
    """Everything after an RPN's head, from its maps to the proposals of each image."""
    head = scenes.rpn_head(image_size(case), case.levels)
    # torchvision keeps as many proposals per image as candidates per level.
    top_n = {"training": case.pre_nms_top_n, "testing": case.pre_nms_top_n}
    theirs = rpn.RegionProposalNetwork(
        head.generator, None, HIGH_IOU, LOW_IOU, 256, 0.5, top_n, top_n, PROPOSAL_IOU
    ).eval()
    count, sizes = len(case.levels), OnDevice(torch.tensor([head.image_size] * case.batch))

    def eager(maps: Sequence[Tensor]) -> list[Tensor]:
        logits, deltas = list(maps[:count]), list(maps[count:])
        images = head.images(case.batch, maps[0].device)
        all_anchors = theirs.anchor_generator(images, logits)
        counts = [each[0].numel() for each in logits]
        objectness, codes = rpn.concat_box_prediction_layers(logits, deltas)
        decoded = theirs.box_coder.decode(codes, all_anchors).view(case.batch, -1, 4)
        boxes, scores = theirs.filter_proposals(decoded, objectness, images.image_sizes, counts)
        return [*boxes, *scores]

    def fused(maps: Sequence[Tensor]) -> Any:
        found = ops.generate_proposals(
            maps[:count], maps[count:], head.cells, head.strides, sizes(maps[0].device),
            pre_nms_top_n=case.pre_nms_top_n, post_nms_top_n=case.pre_nms_top_n, nms_thresh=PROPOSAL_IOU,
        )  # fmt: skip
        return lists_on_cpu(found)

    return Op(head_maps(case, head), eager, fused, eager, "generate_proposals", decides=True, tensors_of=unpadded)


def select_detections(case: Case) -> Op:
    """Everything after RetinaNet's head, from its tables to the detections of each image.

    torchvision's head permutes and concatenates its maps itself, so both sides start from the tables.
    """
    head = scenes.retinanet_head(image_size(case), case.levels)
    counts = level_anchors(case)
    theirs = SimpleNamespace(
        score_thresh=0.05, topk_candidates=case.pre_nms_top_n, nms_thresh=NMS_IOU, detections_per_img=300,
        box_coder=BoxCoder((1.0, 1.0, 1.0, 1.0)),
    )  # fmt: skip
    sizes = OnDevice(torch.tensor([head.image_size] * case.batch))
    given = _copied(lambda: scenes.head_tables(head, case.batch, case.classes))

    def eager(tables: Sequence[Tensor]) -> list[Tensor]:
        images = head.images(case.batch, tables[0].device)
        features = [images.tensors[:, :1, :height, :width] for height, width in case.levels]
        anchors = [list(each.split(counts)) for each in head.generator(images, features)]
        logits, deltas = (list(table.split(counts, 1)) for table in tables)
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        found = retinanet.RetinaNet.postprocess_detections(theirs, outputs, anchors, images.image_sizes)
        return [each[name] for name in ("boxes", "scores", "labels") for each in found]

    def fused(tables: Sequence[Tensor]) -> Any:
        logits, deltas = map(head.maps_of, tables)
        found = ops.select_detections(
            logits, deltas, head.cells, head.strides, sizes(tables[0].device), score_thresh=theirs.score_thresh,
            pre_nms_top_n=theirs.topk_candidates, nms_thresh=theirs.nms_thresh,
            max_detections=theirs.detections_per_img,
        )  # fmt: skip
        return lists_on_cpu(found)

    return Op(given, eager, fused, eager, "select_detections", decides=True, tensors_of=unpadded)


def nms_in_groups(case: Case) -> Op:
    """torchvision's batched_nms: boxes of one image in groups."""
    given = _copied(lambda: scenes.detections(case.boxes, case.classes, *image_size(case)))

    def eager(found: Sequence[Tensor]) -> Tensor:
        return batched_nms(*found, NMS_IOU)

    def fused(found: Sequence[Tensor]) -> Any:
        if found[0].device.type == "cpu":
            return ops.batched_nms(found[0], found[1], found[2], NMS_IOU)
        boxes, scores, groups = (each[None] for each in found)
        return ops.segmented_nms(boxes, scores, groups, None, NMS_IOU, len(found[0]))

    return Op(given, eager, fused, eager, "segmented_nms", decides=True, tensors_of=unpadded)


def sigmoid_focal_loss(case: Case) -> Op:
    """The summed loss of a RetinaNet early in training: scores of about 0.01, and 3 labels in 1,000 anchors."""
    anchors = case.batch * sum(level_anchors(case))
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(case.classes, (anchors,), generator=generator)
    labels = OnDevice(torch.where(torch.rand(anchors, generator=generator) < 3e-3, some, -1))
    given = _copied(lambda: [torch.randn(anchors, case.classes, generator=generator).sub_(4.6)])

    def eager(logits: Sequence[Tensor]) -> Tensor:
        here = labels(logits[0].device)
        foreground = here >= 0
        targets = torch.zeros_like(logits[0])
        targets[foreground, here[foreground]] = 1.0
        loss: Tensor = focal_losses(logits[0], targets, reduction="sum")
        return loss

    def fused(logits: Sequence[Tensor]) -> Tensor:
        return ops.sigmoid_focal_loss(logits[0], labels(logits[0].device))

    # The kernel gives a loss per anchor and the gradient of their sum; autograd scales it.
    return Op(given, eager, fused, eager, "sigmoid_focal_loss", alongside=frozenset(("aten::sum", "aten::mul")))


def match_anchors(case: Case) -> Op:
    """An image's anchors, which both sides are given, to its ground truths."""
    head = scenes.rpn_head(image_size(case), case.levels)
    matcher = Matcher(HIGH_IOU, LOW_IOU, allow_low_quality_matches=True)
    given = _copied(lambda: (scenes.ground_truths(case.boxes, *head.image_size), head.anchors()))

    def eager(boxes: Sequence[Tensor]) -> Tensor:
        return matcher(box_iou(*boxes))

    def fused(boxes: Sequence[Tensor]) -> Tensor:
        gts, anchors = boxes
        return ops.match_anchors(gts[None], None, anchors, high_threshold=HIGH_IOU, low_threshold=LOW_IOU)[0][0]

    return Op(given, eager, fused, eager, "match_anchors", decides=True)


def _per_box(case: Case, table: Callable[..., Tensor], *arguments: int) -> Callable[[torch.device], list[Tensor]]:
    """A mask or heatmaps for each ground truth, and these."""
    boxes = scenes.ground_truths(case.boxes, *image_size(case))
    return _copied(lambda: (table(case.boxes, *arguments, case.output_size), boxes))


# Of code that goes from box to box, torch.compile makes a graph for each size of a box, and leaves the rest to eager
# after eight of them.


def paste_masks(case: Case) -> Op:
    size = image_size(case)

    def eager(found: Sequence[Tensor]) -> Tensor:
        pasted: Tensor = roi_heads.paste_masks_in_image(*found, size)
        return pasted

    def fused(found: Sequence[Tensor]) -> Tensor:
        return ops.paste_masks(found[0], found[1], size)

    return Op(_per_box(case, scenes.mask_probabilities), eager, fused, None, "paste_masks")


def heatmaps_to_keypoints(case: Case) -> Op:
    """The keypoints of an image's people; a person's row is judged as boxes are."""
    return Op(
        _per_box(case, scenes.keypoint_logits, case.classes),
        lambda found: roi_heads.heatmaps_to_keypoints(*found),
        lambda found: ops.heatmaps_to_keypoints(*found),
        None,
        "heatmaps_to_keypoints",
        decides=True,
        tensors_of=lambda result: [result[0].flatten(1), result[1]],
    )


OPS: dict[str, Callable[[Case], Op]] = {
    "top_down": top_down,
    "upsample_add": upsample_add,
    "multiscale_roi_align": multiscale_roi_align,
    "generate_proposals": generate_proposals,
    "select_detections": select_detections,
    "batched_nms": nms_in_groups,
    "sigmoid_focal_loss": sigmoid_focal_loss,
    "match_anchors": match_anchors,
    "paste_masks": paste_masks,
    "heatmaps_to_keypoints": heatmaps_to_keypoints,
}
