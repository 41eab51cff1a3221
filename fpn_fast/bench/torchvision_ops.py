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
from fpn_fast.bench.op import Function, Op, lists_on_cpu, on_device, unpadded
from fpn_fast.bench.rois import random_rois

NMS_IOU, PROPOSAL_IOU = 0.5, 0.7
#: torchvision's RPN: an IoU of at least the first is a match, below the second background.
HIGH_IOU, LOW_IOU = 0.7, 0.3
Inputs = Callable[[torch.device], list[Tensor]]


def memory_format(case: Case) -> torch.memory_format:
    return torch.channels_last if case.memory_format == "channels_last" else torch.contiguous_format


def random_maps(case: Case) -> Inputs:
    return lambda device: [
        torch.randn(case.batch, case.channels, *size, device=device)
        .to(getattr(torch, case.dtype))
        .contiguous(memory_format=memory_format(case))
        for size in case.levels
    ]


def _copied(make: Callable[[], Sequence[Tensor]]) -> Inputs:
    """Inputs that are made on the CPU."""
    return lambda device: [each.to(device) for each in make()]


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
    return Op(
        random_maps(case),
        lambda maps: maps[0] + F.interpolate(maps[1], size=maps[0].shape[-2:], mode="nearest"),
        lambda maps: ops.upsample_add(maps[0], maps[1]),
        lambda maps: reference.upsample_add(maps[0], maps[1]),
        "top_down",
        fullgraph=True,
    )


def multiscale_roi_align(case: Case) -> Op:
    """torchvision's MultiScaleRoIAlign, on RoIs that a detector has already."""
    size, grid = image_size(case), (case.output_size, case.sampling_ratio)
    rois = random_rois(case.batch, case.rois, *size, case.clustered)
    module = MultiScaleRoIAlign([str(i) for i in range(len(case.levels))], *grid)
    table = on_device(rois)
    lists = on_device([rois[rois[:, 0] == i, 1:].contiguous() for i in range(case.batch)])

    def eager(maps: Sequence[Tensor]) -> Tensor:
        # torchvision has no bfloat16 kernel. Its users have autocast there, which widens every map.
        with torch.autocast(maps[0].device.type, torch.bfloat16, enabled=maps[0].dtype == torch.bfloat16):
            named = {str(i): each for i, each in enumerate(maps)}
            pooled: Tensor = module(named, lists(maps[0].device), [size] * case.batch)
            return pooled

    def fused(maps: Sequence[Tensor]) -> Tensor:
        return ops.multiscale_roi_align(maps, table(maps[0].device), grid[0], scales(case), sampling_ratio=grid[1])

    return Op(random_maps(case), eager, fused, eager, "multiscale_roi_align")


def frozen_batch_norm(case: Case) -> Op:
    """What torchvision's Bottleneck does after its last convolution: FrozenBatchNorm2d, residual and ReLU."""
    generator, eps = torch.Generator().manual_seed(0), 1e-5
    norms = on_device([torch.rand(case.channels, generator=generator) + 0.5 for _ in range(4)])

    def maps(device: torch.device) -> list[Tensor]:
        return [each for _ in range(2) for each in random_maps(case)(device)]

    def eager(maps: Sequence[Tensor]) -> Tensor:
        weight, bias, mean, var = (each.view(1, -1, 1, 1) for each in norms(maps[0].device))
        scale = weight * (var + eps).rsqrt()
        out = maps[0] * scale + (bias - mean * scale)
        out += maps[1]
        return F.relu_(out)

    def fused(maps: Sequence[Tensor]) -> Tensor:
        weight, bias, mean, var = norms(maps[0].device)
        return ops.frozen_batch_norm(maps[0], weight, bias, mean, var, eps, residual=maps[1], activation="relu")

    return Op(maps, eager, fused, eager, "frozen_batch_norm", fullgraph=True)


def _selection(inputs: Inputs, eager: Function, fused: Callable[[Sequence[Tensor]], Any], kernel: str) -> Op:
    """eager gives lists, fused padded tensors."""
    return Op(
        inputs, eager, lambda given: lists_on_cpu(fused(given)), eager, kernel, decides=True, tensors_of=unpadded
    )  # fmt: skip


def proposals(
    case: Case,
    eager: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[Sequence[Tensor], Sequence[Tensor]]],
    fused: Callable[[Sequence[Tensor], Sequence[Tensor], Tensor], tuple[Tensor, ...]],
) -> Op:
    """eager: logits and deltas of a trained head -> boxes and scores of each image; fused: these and the images' sizes.

    The head has one logit per anchor.
    """
    head, count = scenes.rpn_head(image_size(case), case.levels), len(case.levels)
    sizes = on_device(torch.tensor([head.image_size] * case.batch))

    def inputs(device: torch.device) -> list[Tensor]:
        maps = [each for table in scenes.head_tables(head, case.batch, 1) for each in head.maps_of(table)]
        return [each.to(device).contiguous(memory_format=memory_format(case)) for each in maps]

    def plain(maps: Sequence[Tensor]) -> list[Tensor]:
        boxes, scores = eager(maps[:count], maps[count:])
        return [*boxes, *scores]

    return _selection(
        inputs, plain, lambda maps: fused(maps[:count], maps[count:], sizes(maps[0].device)), "generate_proposals"
    )  # fmt: skip


def generate_proposals(case: Case) -> Op:
    """Everything after an RPN's head, from its maps to the proposals of each image."""
    head, top_n = scenes.rpn_head(image_size(case), case.levels), case.pre_nms_top_n
    # torchvision keeps as many proposals per image as candidates per level.
    most = {"training": top_n, "testing": top_n}
    theirs = rpn.RegionProposalNetwork(head.generator, None, HIGH_IOU, LOW_IOU, 256, 0.5, most, most, PROPOSAL_IOU)
    theirs.eval()

    def eager(logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        images = head.images(case.batch, logits[0].device)
        all_anchors = theirs.anchor_generator(images, list(logits))
        counts = [each[0].numel() for each in logits]
        objectness, codes = rpn.concat_box_prediction_layers(list(logits), list(deltas))
        decoded = theirs.box_coder.decode(codes, all_anchors).view(case.batch, -1, 4)
        found: tuple[list[Tensor], list[Tensor]] = theirs.filter_proposals(
            decoded, objectness, images.image_sizes, counts
        )
        return found

    def fused(logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
        return ops.generate_proposals(
            logits, deltas, head.cells, head.strides, sizes, pre_nms_top_n=top_n, post_nms_top_n=top_n,
            nms_thresh=PROPOSAL_IOU,
        )  # fmt: skip

    return proposals(case, eager, fused)


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
    sizes = on_device(torch.tensor([head.image_size] * case.batch))

    def eager(tables: Sequence[Tensor]) -> list[Tensor]:
        images = head.images(case.batch, tables[0].device)
        features = [images.tensors[:, :1, :height, :width] for height, width in case.levels]
        anchors = [list(each.split(counts)) for each in head.generator(images, features)]
        logits, deltas = (list(table.split(counts, 1)) for table in tables)
        outputs = {"cls_logits": logits, "bbox_regression": deltas}
        found = retinanet.RetinaNet.postprocess_detections(theirs, outputs, anchors, images.image_sizes)
        return [each[name] for name in ("boxes", "scores", "labels") for each in found]

    def fused(tables: Sequence[Tensor]) -> tuple[Tensor, ...]:
        logits, deltas = map(head.maps_of, tables)
        return ops.select_detections(
            logits, deltas, head.cells, head.strides, sizes(tables[0].device),
            score_thresh=theirs.score_thresh, pre_nms_top_n=theirs.topk_candidates, nms_thresh=theirs.nms_thresh,
            max_detections=theirs.detections_per_img,
        )  # fmt: skip

    given = _copied(lambda: scenes.head_tables(head, case.batch, case.classes))
    return _selection(given, eager, fused, "select_detections")


def nms_in_groups(case: Case) -> Op:
    """torchvision's batched_nms: boxes of one image in groups."""

    def fused(found: Sequence[Tensor]) -> Any:
        if found[0].device.type == "cpu":
            return ops.batched_nms(found[0], found[1], found[2], NMS_IOU)
        boxes, scores, groups = (each[None] for each in found)
        return ops.segmented_nms(boxes, scores, groups, None, NMS_IOU, len(found[0]))

    def eager(found: Sequence[Tensor]) -> Tensor:
        return batched_nms(*found, NMS_IOU)

    given = _copied(lambda: scenes.detections(case.boxes, case.classes, *image_size(case)))
    return Op(given, eager, fused, eager, "segmented_nms", decides=True, tensors_of=unpadded)


def sigmoid_focal_loss(case: Case) -> Op:
    """The summed loss of a RetinaNet early in training: scores of about 0.01, and 3 labels in 1,000 anchors."""
    anchors = case.batch * sum(level_anchors(case))
    generator = torch.Generator().manual_seed(0)
    some = torch.randint(case.classes, (anchors,), generator=generator)
    labels = on_device(torch.where(torch.rand(anchors, generator=generator) < 3e-3, some, -1))

    def eager(logits: Sequence[Tensor]) -> Tensor:
        here = labels(logits[0].device)
        foreground = here >= 0
        targets = torch.zeros_like(logits[0])
        targets[foreground, here[foreground]] = 1.0
        loss: Tensor = focal_losses(logits[0], targets, reduction="sum")
        return loss

    return Op(
        _copied(lambda: [torch.randn(anchors, case.classes, generator=generator).sub_(4.6)]),
        eager,
        lambda logits: ops.sigmoid_focal_loss(logits[0], labels(logits[0].device)),
        eager,
        "sigmoid_focal_loss",
        # The kernel gives a loss per anchor and the gradient of their sum; autograd scales it.
        alongside=frozenset(("aten::sum", "aten::mul")),
    )


def match_anchors(case: Case) -> Op:
    """An image's anchors, which both sides are given, to its ground truths."""
    head = scenes.rpn_head(image_size(case), case.levels)
    matcher = Matcher(HIGH_IOU, LOW_IOU, allow_low_quality_matches=True)

    def eager(boxes: Sequence[Tensor]) -> Tensor:
        return matcher(box_iou(*boxes))

    def fused(boxes: Sequence[Tensor]) -> Tensor:
        gts, anchors = boxes
        return ops.match_anchors(gts[None], None, anchors, high_threshold=HIGH_IOU, low_threshold=LOW_IOU)[0][0]

    given = _copied(lambda: (scenes.ground_truths(case.boxes, *head.image_size), head.anchors()))
    return Op(given, eager, fused, eager, "match_anchors", decides=True)


# Of code that goes from box to box, torch.compile makes a graph for each size of a box, and leaves the rest to eager
# after eight of them.


def paste_masks(case: Case) -> Op:
    size = image_size(case)
    given = _copied(lambda: (scenes.mask_probabilities(case.boxes, case.output_size),
                             scenes.ground_truths(case.boxes, *size)))  # fmt: skip
    return Op(
        given,
        lambda found: roi_heads.paste_masks_in_image(*found, size),
        lambda found: ops.paste_masks(found[0], found[1], size),
        None,
        "paste_masks",
    )


def heatmaps_to_keypoints(case: Case) -> Op:
    """The keypoints of an image's people; a person's row is judged as boxes are."""
    given = _copied(lambda: (scenes.keypoint_logits(case.boxes, case.classes, case.output_size),
                             scenes.ground_truths(case.boxes, *image_size(case))))  # fmt: skip
    return Op(
        given,
        lambda found: roi_heads.heatmaps_to_keypoints(*found),
        lambda found: ops.heatmaps_to_keypoints(*found),
        None,
        "heatmaps_to_keypoints",
        decides=True,
        tensors_of=lambda result: [result[0].flatten(1), result[1]],
    )


OPS: dict[str, Callable[[Case], Op]] = {
    "batched_nms": nms_in_groups,
    **{
        op.__name__: op
        for op in (top_down, upsample_add, multiscale_roi_align, frozen_batch_norm, generate_proposals,
                   select_detections, sigmoid_focal_loss, match_anchors, paste_masks, heatmaps_to_keypoints)
    },
}  # fmt: skip
