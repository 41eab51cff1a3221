# SPDX-License-Identifier: Apache-2.0
"""Neck, RoI extractor and proposals of a Faster R-CNN R50, as detectron2 and mmdetection configure it.

Eager states in plain PyTorch, step by step, what the library does. Its own RoIAlign and NMS kernels are torchvision's
here, whose results are the same. ``tests/against_mmdet.py`` holds these statements against mmdetection itself. Ours are
the modules of :mod:`fpn_fast.nn.detectron2` and :mod:`fpn_fast.nn.mmdet`. A neck includes its convolutions, which are
the same on both sides.

Sources: detectron2/modeling/backbone/fpn.py, poolers.py, anchor_generator.py, box_regression.py and
proposal_generator/proposal_utils.py; mmdet/models/necks/fpn.py, roi_heads/roi_extractors/single_level_roi_extractor.py,
dense_heads/rpn_head.py, task_modules/coders/delta_xywh_bbox_coder.py, and mmcv/ops/nms.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torchvision.ops import batched_nms, nms, roi_align

from fpn_fast.bench.cases import NECK_CHANNELS, Case, image_size, scales
from fpn_fast.bench.op import Op, listed, on_device
from fpn_fast.bench.rois import random_rois
from fpn_fast.bench.torchvision_ops import PROPOSAL_IOU, gradient_sums, memory_format, proposals, random_maps
from fpn_fast.nn import detectron2, mmdet
from fpn_fast.nn.detectron2.fpn import ShapeSpec

SCALE_CLAMP = math.log(1000 / 16)
RATIOS = (0.5, 1.0, 2.0)


# Necks: inputs are four maps of a ResNet, then weights and biases of all lateral and of all output convolutions.

#: A neck's convolutions and its last level.
_NECK = frozenset(("aten::convolution", "aten::convolution_backward", "aten::max_pool2d_with_indices",
                   "aten::max_pool2d_with_indices_backward"))  # fmt: skip


def _neck(case: Case, module: nn.Module, names: Sequence[str]) -> Op:
    """names: `module`'s lateral convolutions, then its output convolutions, finest first.

    Both libraries make the same calls; detectron2 convolves each level's output before the next finer level.
    """
    count = len(case.levels)
    keys = [f"{name}.{key}" for name in names for key in ("weight", "bias")]
    module.requires_grad_(False)

    def inputs(device: torch.device) -> list[Tensor]:
        maps = [
            torch.randn(case.batch, share * case.channels, *size, device=device)
            for share, size in zip(NECK_CHANNELS, case.levels, strict=True)
        ]
        tensors = maps + [module.get_parameter(key).detach().to(device) for key in keys]
        form = memory_format(case)
        # Biases are initialised as zeros, which would hide one that is not used.
        return [each.contiguous(memory_format=form) if each.dim() == 4 else torch.randn_like(each) for each in tensors]

    def convolved(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        layers = zip(maps, weights[::2], weights[1::2], strict=True)
        return [F.conv2d(each, weight, bias, padding=weight.size(-1) // 2) for each, weight, bias in layers]

    def plain(tensors: Sequence[Tensor]) -> list[Tensor]:
        merged = convolved(tensors[:count], tensors[count : 3 * count])
        for level in range(count - 1, 0, -1):
            size = merged[level - 1].shape[2:]
            merged[level - 1] = merged[level - 1] + F.interpolate(merged[level], size=size, mode="nearest")
        results = convolved(merged, tensors[3 * count :])
        return [*results, F.max_pool2d(results[-1], 1, stride=2)]

    def fused(tensors: Sequence[Tensor]) -> list[Tensor]:
        found = functional_call(module, dict(zip(keys, tensors[count:], strict=True)), (tensors[:count],))
        return list(found.values()) if isinstance(found, dict) else listed(found)

    return Op(inputs, plain, fused, plain, "top_down", fullgraph=True, alongside=_NECK | gradient_sums(case))


class _Given(nn.Module):
    """A backbone that hands on the maps it is given."""

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.channels = channels

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {f"res{i}": ShapeSpec(channels, 1 << i) for i, channels in enumerate(self.channels, 2)}

    def forward(self, maps: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self.output_shape(), maps, strict=True))


def detectron2_fpn(case: Case) -> Op:
    """detectron2's FPN with LastLevelMaxPool, of the backbone's maps."""
    backbone = _Given([share * case.channels for share in NECK_CHANNELS])
    names, last = list(backbone.output_shape()), detectron2.LastLevelMaxPool()
    module = detectron2.FPN(backbone, names, case.channels, top_block=last)
    return _neck(case, module, [f"fpn_{kind}{level}" for kind in ("lateral", "output") for level in range(2, 6)])


def mmdet_neck(case: Case) -> Op:
    """mmdetection's FPN, ``num_outs=5``."""
    module = mmdet.FPN([share * case.channels for share in NECK_CHANNELS], case.channels, num_outs=5)
    return _neck(case, module, [f"{kind}_convs.{i}.conv" for kind in ("lateral", "fpn") for i in range(4)])


# RoI extractors: bins of 7x7, as many samples as a bin has pixels, pixel centres at half-integers.


def _extractor(
    case: Case, module: Callable[..., Tensor], boxes: Any, levelled: Callable[[Any], tuple[Tensor, Tensor]]
) -> Op:
    """boxes: what `module` takes beside the maps; levelled: these -> RoIs [K, 5] and the level of each."""
    given, size, ratio = on_device(boxes), case.output_size, case.sampling_ratio

    def fused(maps: Sequence[Tensor]) -> Tensor:
        return module(maps, given(maps[0].device))

    def eager(maps: Sequence[Tensor]) -> Tensor:
        rois, levels = levelled(given(maps[0].device))
        pooled = maps[0].new_zeros(len(rois), case.channels, size, size)
        for level, (each, scale) in enumerate(zip(maps, scales(case), strict=True)):
            chosen = (levels == level).nonzero().squeeze(1)
            pooled[chosen] = roi_align(each, rois[chosen].to(each.dtype), size, scale, ratio, aligned=True)
        return pooled

    return Op(random_maps(case), eager, fused, eager, "multiscale_roi_align")


def detectron2_pooler(case: Case) -> Op:
    """detectron2's ROIPooler of ROIAlignV2, of the boxes of each image."""
    module = detectron2.ROIPooler(case.output_size, scales(case), case.sampling_ratio, "ROIAlignV2")
    rois = random_rois(case.batch, case.rois, *image_size(case), case.clustered)

    def levelled(lists: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        boxes = torch.cat(list(lists))
        lengths = torch.tensor([len(each) for each in lists], device=boxes.device)
        images = torch.repeat_interleave(torch.arange(len(lists), device=boxes.device), lengths)
        sides = torch.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
        levels = torch.floor(4 + torch.log2(sides / 224 + 1e-8)).clamp(2, 1 + len(case.levels)).to(torch.int64) - 2
        return torch.cat([images[:, None].to(boxes.dtype), boxes], 1), levels

    return _extractor(case, module, [rois[rois[:, 0] == i, 1:] for i in range(case.batch)], levelled)


def mmdet_extractor(case: Case) -> Op:
    """mmdetection's SingleRoIExtractor, of RoIs [K, 5]."""
    layer = {"type": "RoIAlign", "output_size": case.output_size, "sampling_ratio": case.sampling_ratio}
    module = mmdet.SingleRoIExtractor(layer, case.channels, _strides(case))

    def levelled(rois: Tensor) -> tuple[Tensor, Tensor]:
        sides = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
        return rois, torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, len(case.levels) - 1).long()

    return _extractor(case, module, random_rois(case.batch, case.rois, *image_size(case), case.clustered), levelled)


# Proposals: anchors of three ratios, eight strides wide, on five levels.


def _strides(case: Case) -> list[int]:
    return [4 << level for level in range(len(case.levels))]


def _flat(maps: Sequence[Tensor], values: int) -> list[Tensor]:
    """Maps [N, A * K, H, W] -> tables [N, H * W * A, K]."""
    return [each.unflatten(1, (-1, values)).permute(0, 3, 4, 1, 2).reshape(len(each), -1, values) for each in maps]


def _shifted(table: Tensor, size: torch.Size, stride: int) -> Tensor:
    """[A, 4] about the origin -> [H * W * A, 4]."""
    y, x = (torch.arange(0, length * stride, stride, dtype=torch.float32, device=table.device) for length in size)
    grid_y, grid_x = (each.reshape(-1) for each in torch.meshgrid(y, x, indexing="ij"))
    shifts = torch.stack([grid_x, grid_y, grid_x, grid_y], 1)
    return (shifts[:, None] + table[None]).reshape(-1, 4)


def detectron2_proposals(case: Case) -> Op:
    """The end of detectron2's RPN: all anchors, all boxes, then the highest logits."""
    strides, top_n, (height, width) = _strides(case), case.pre_nms_top_n, image_size(case)
    generator: Any = detectron2.DefaultAnchorGenerator(
        sizes=[[8 * stride] for stride in strides], aspect_ratios=RATIOS, strides=strides, offset=0.0
    )
    # detectron2 has them as buffers, on the device. Ours reads plain floats from its generator once.
    cells = on_device(generator.cell_anchors)
    generator.cell_anchors = [table.tolist() for table in generator.cell_anchors]

    def decoded(anchors: Tensor, deltas: Tensor) -> Tensor:
        sides = anchors[:, 2:] - anchors[:, :2]
        centres = anchors[:, :2] + 0.5 * sides
        moved = deltas[:, :2] * sides + centres
        reach = 0.5 * (torch.exp(deltas[:, 2:].clamp(max=SCALE_CLAMP)) * sides)
        return torch.cat([moved - reach, moved + reach], 1)

    def eager(logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> Any:
        batch, device = len(logits[0]), logits[0].device
        candidates, scores, levels = [], [], []
        parts = zip(cells(device), strides, _flat(logits, 1), _flat(deltas, 4), logits, strict=True)
        for i, (table, stride, flat, codes, each) in enumerate(parts):
            anchors = _shifted(table, each.shape[2:], stride)
            # A copy per image, as detectron2 makes it.
            repeated = anchors[None].expand(batch, -1, -1).reshape(-1, 4)
            boxes = decoded(repeated, codes.reshape(-1, 4)).view(batch, -1, 4)
            best, index = flat[..., 0].topk(min(top_n, flat.size(1)), dim=1)
            candidates.append(boxes[torch.arange(batch, device=device)[:, None], index])
            scores.append(best)
            levels.append(torch.full((best.size(1),), i, dtype=torch.int64, device=device))
        all_boxes, all_scores, level = torch.cat(candidates, 1), torch.cat(scores, 1), torch.cat(levels)
        found = []
        for boxes, own in zip(all_boxes, all_scores, strict=True):
            valid, groups = boxes.isfinite().all(1) & own.isfinite(), level
            if not valid.all():
                boxes, own, groups = boxes[valid], own[valid], groups[valid]
            x1, y1, x2, y2 = boxes.unbind(1)
            boxes = torch.stack([x1.clamp(0, width), y1.clamp(0, height), x2.clamp(0, width), y2.clamp(0, height)], 1)
            kept = (boxes[:, 2] - boxes[:, 0] > 0) & (boxes[:, 3] - boxes[:, 1] > 0)
            if kept.sum().item() != len(boxes):
                boxes, own, groups = boxes[kept], own[kept], groups[kept]
            chosen = batched_nms(boxes.float(), own, groups, PROPOSAL_IOU)[:top_n]
            found.append((boxes[chosen], own[chosen]))
        return zip(*found, strict=True)

    def fused(logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
        return detectron2.find_top_rpn_proposals(
            logits, deltas, generator, sizes, pre_nms_topk=top_n, post_nms_topk=top_n, nms_thresh=PROPOSAL_IOU
        )

    return proposals(case, eager, fused)


def mmdet_proposals(case: Case) -> Op:
    """The end of mmdetection's RPNHead: a sort per image and level, then the boxes of the highest scores."""
    strides, top_n, (height, width) = _strides(case), case.pre_nms_top_n, image_size(case)
    coder, generator = mmdet.DeltaXYWHBBoxCoder(), mmdet.AnchorGenerator(strides, RATIOS, scales=[8.0])
    nms_config = {"type": "nms", "iou_threshold": PROPOSAL_IOU}
    config = {"nms_pre": top_n, "max_per_img": top_n, "nms": nms_config, "min_bbox_size": 0}
    tables = generator.base_anchors
    # Reading a tensor would count as a host synchronisation.
    plain: Any = SimpleNamespace(base_anchors=[table.tolist() for table in tables], strides=generator.strides)

    def decoded(anchors: Tensor, deltas: Tensor) -> Tensor:
        codes = deltas * deltas.new_tensor(coder.stds) + deltas.new_tensor(coder.means)
        centres, sides = (anchors[:, :2] + anchors[:, 2:]) * 0.5, anchors[:, 2:] - anchors[:, :2]
        moved = centres + sides * codes[:, :2]
        reach = sides * codes[:, 2:].clamp(-SCALE_CLAMP, SCALE_CLAMP).exp() * 0.5
        boxes = torch.cat([moved - reach, moved + reach], 1)
        boxes[:, 0::2].clamp_(0, width)
        boxes[:, 1::2].clamp_(0, height)
        return boxes

    def eager(logits: Sequence[Tensor], deltas: Sequence[Tensor]) -> Any:
        device = logits[0].device
        # mmdetection keeps them on the CPU and copies them each time.
        sized = zip((table.to(device) for table in tables), strides, logits, strict=True)
        priors = [_shifted(table, each.shape[2:], stride) for table, stride, each in sized]
        found = []
        for n in range(len(logits[0])):
            scores, codes, anchors, levels = [], [], [], []
            for level, (each, rows, own) in enumerate(zip(logits, deltas, priors, strict=True)):
                score = each[n].permute(1, 2, 0).reshape(-1).sigmoid()
                delta = rows[n].permute(1, 2, 0).reshape(-1, 4)
                if top_n < len(score):
                    ranked, index = score.sort(descending=True)
                    score, index = ranked[:top_n], index[:top_n]
                    delta, own = delta[index], own[index]
                scores.append(score)
                codes.append(delta)
                anchors.append(own)
                levels.append(score.new_full((len(score),), level, dtype=torch.int64))
            boxes, score, group = decoded(torch.cat(anchors), torch.cat(codes)), torch.cat(scores), torch.cat(levels)
            large = (boxes[:, 2] - boxes[:, 0] > 0) & (boxes[:, 3] - boxes[:, 1] > 0)
            if not large.all():
                boxes, score, group = boxes[large], score[large], group[large]
            apart = boxes + (group.to(boxes) * (boxes.max() + 1))[:, None]
            kept = nms(apart, score, PROPOSAL_IOU)[:top_n]
            found.append((boxes[kept], score[kept]))
        return zip(*found, strict=True)

    def fused(logits: Sequence[Tensor], deltas: Sequence[Tensor], sizes: Tensor) -> tuple[Tensor, ...]:
        return mmdet.predict_proposals(logits, deltas, plain, coder, sizes, config)

    return proposals(case, eager, fused)


OPS: dict[str, Callable[[Case], Op]] = {
    op.__name__: op
    for op in (detectron2_fpn, detectron2_pooler, detectron2_proposals, mmdet_neck, mmdet_extractor, mmdet_proposals)
}
