# SPDX-License-Identifier: Apache-2.0
"""A correct call of every op, of random numbers of any type and size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_fast import ops

INF = math.inf


@dataclass
class Call:
    """A call that is right: the op, its arguments by name, and what kind of thing each of those is that is no tensor.

    sums: results are sums of so many products at most, compared as such; None: they are decisions, compared exactly.
    finite: tensors that are not given numbers that are none, because what the sums are then depends on their order.
    """

    op: Callable[..., Any]
    arguments: dict[str, Any]
    kinds: dict[str, str]
    sums: int | None = None
    finite: tuple[str, ...] = ()


def _normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def _boxes(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    corners = torch.rand(*shape, 2, 2, generator=generator, dtype=torch.float64) * 60
    return corners.sort(-2).values.flatten(-2).to(dtype)


def _sizes(generator: torch.Generator, size: int) -> list[tuple[int, int]]:
    """Of two maps."""
    sides = torch.randint(1, 10, (2, 2), generator=generator) * size
    return [(height, width) for height, width in sides.tolist()]


def _maps(generator: torch.Generator, dtype: torch.dtype, channels: int, sizes: list[tuple[int, int]]) -> list[Tensor]:
    return [_normal(generator, dtype, 2, channels, *size) for size in sizes]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _rois(generator: torch.Generator, dtype: torch.dtype, size: int) -> Tensor:
    image = torch.randint(2, (6 * size, 1), generator=generator).to(_wide(dtype))
    return torch.cat([image, _boxes(generator, _wide(dtype), 6 * size)], 1)


def top_down(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {"laterals": _maps(g, dtype, 3, _sizes(g, size)), "mode": "nearest", "align_corners": False,
                 "scale_factor": None, "fuse": "sum"}  # fmt: skip
    kinds = {"mode": "word", "align_corners": "flag", "scale_factor": "size", "fuse": "word"}
    return Call(ops.top_down, arguments, kinds, sums=8)


def upsample_add(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    lateral, top = _maps(g, dtype, 3, _sizes(g, size))
    kinds = {"mode": "word", "align_corners": "flag", "scale_factor": "size", "fuse": "word"}
    arguments = {"lateral": lateral, "top": top, "mode": "bilinear", "align_corners": True, "scale_factor": None,
                 "fuse": "avg"}  # fmt: skip
    return Call(ops.upsample_add, arguments, kinds, sums=16, finite=("lateral", "top"))


def fuse_maps(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    fine, coarse = _sizes(g, size)
    half = ((fine[0] + 1) // 2, (fine[1] + 1) // 2)
    maps = _maps(g, dtype, 3, [half, coarse, fine])
    arguments = {"maps": maps, "size": half, "resample": ["identity", "nearest", "max_pool_same"],
                 "weights": _normal(g, torch.float32, 3), "weight_rule": "fast", "gate": None, "rounding": "once",
                 "divide": 1, "activation": "relu6"}  # fmt: skip
    kinds = {"size": "list", "resample": "list", "weight_rule": "word", "rounding": "word", "divide": "size",
             "activation": "word", "gate": "word"}  # fmt: skip
    return Call(ops.fuse_maps, arguments, kinds, sums=16, finite=("maps", "weights"))


def resize_cat(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {"maps": _maps(g, dtype, 3, _sizes(g, size)), "size": (5 * size, 7 * size), "mode": "bilinear"}
    return Call(ops.resize_cat, arguments, {"size": "list", "mode": "word"}, sums=16, finite=("maps",))


def multiscale_roi_align(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    rois = _rois(g, dtype, size)
    arguments = {"features": _maps(g, dtype, 3, _sizes(g, size)), "rois": rois, "output_size": 3,
                 "scales": [0.25, 0.125], "sampling_ratio": 2, "aligned": False,
                 "canonical_scale": 224, "canonical_level": 4, "level_formula": "torchvision",
                 "pool_mode": "avg"}  # fmt: skip
    kinds = {"output_size": "size", "scales": "list", "sampling_ratio": "size", "aligned": "flag",
             "canonical_scale": "number", "canonical_level": "number", "level_formula": "word",
             "pool_mode": "word"}  # fmt: skip
    return Call(ops.multiscale_roi_align, arguments, kinds, sums=64, finite=("features",))


def roi_align(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    rois = _rois(g, dtype, size)
    arguments = {"input": _maps(g, dtype, 3, _sizes(g, size))[0], "boxes": rois, "output_size": 3,
                 "spatial_scale": 0.25, "sampling_ratio": 2, "aligned": True}  # fmt: skip
    kinds = {"output_size": "size", "spatial_scale": "number", "sampling_ratio": "size", "aligned": "flag"}
    return Call(ops.roi_align, arguments, kinds, sums=64, finite=("input",))


def assign_levels(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    rois = torch.cat([torch.zeros(6 * size, 1), _boxes(g, torch.float32, 6 * size) * 10], 1)
    arguments = {"rois": rois, "scales": [0.25, 0.125], "canonical_scale": 224, "canonical_level": 4}
    kinds = {"scales": "list", "canonical_scale": "number", "canonical_level": "number"}
    return Call(ops.assign_levels, arguments, kinds)


_CELLS = [[(-8.0, -4.0, 8.0, 4.0), (-6.0, -6.0, 6.0, 6.0)], [(-16.0, -8.0, 16.0, 8.0), (-12.0, -12.0, 12.0, 12.0)]]


def generate_proposals(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    sizes = _sizes(g, size)
    arguments = {
        "objectness": _maps(g, dtype, 2, sizes), "deltas": [m * 0.2 for m in _maps(g, dtype, 8, sizes)],
        "cell_anchors": _CELLS, "strides": [(4, 4), (8, 8)], "image_sizes": torch.tensor([[36, 48], [30, 40]]),
        "pre_nms_top_n": 20, "post_nms_top_n": 10, "nms_thresh": 0.7, "score_thresh": 0.0, "min_size": 1e-3,
        "weights": (1.0,) * 4, "means": (0.0,) * 4, "stds": (1.0,) * 4, "scale_clamp": 4.0, "clamp": "max",
        "center": "corner", "center_clamp": INF, "center_offset": 0.0, "strict_size": False, "scores": "probability",
        "convention": "torchvision",
    }  # fmt: skip
    kinds = {
        "cell_anchors": "list", "strides": "list", "pre_nms_top_n": "count", "post_nms_top_n": "size",
        "nms_thresh": "number", "score_thresh": "number", "min_size": "number", "weights": "four", "means": "four",
        "stds": "four", "scale_clamp": "number", "clamp": "word", "center": "word", "center_clamp": "number",
        "center_offset": "number", "strict_size": "flag", "scores": "word", "convention": "word",
    }  # fmt: skip
    return Call(ops.generate_proposals, arguments, kinds)


def select_detections(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    sizes = _sizes(g, size)
    arguments = {
        "logits": _maps(g, dtype, 6, sizes), "deltas": [m * 0.2 for m in _maps(g, dtype, 8, sizes)],
        "cell_anchors": _CELLS, "strides": [(4, 4), (8, 8)], "image_sizes": torch.tensor([[36, 48], [30, 40]]),
        "score_thresh": 0.3, "pre_nms_top_n": 20, "nms_thresh": 0.5, "max_detections": 10, "coder": "deltas",
        "weights": (1.0,) * 4, "scale_clamp": 4.0,
    }  # fmt: skip
    kinds = {
        "cell_anchors": "list", "strides": "list", "score_thresh": "number", "pre_nms_top_n": "count",
        "nms_thresh": "number", "max_detections": "size", "coder": "word", "weights": "four", "scale_clamp": "number",
    }  # fmt: skip
    return Call(ops.select_detections, arguments, kinds)


def select_box_detections(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {
        "logits": _normal(g, dtype, 2, 12 * size, 4), "deltas": _normal(g, dtype, 2, 12 * size, 16),
        "boxes": _boxes(g, dtype, 2, 12 * size),
        "counts": torch.tensor([12, 7]), "image_sizes": torch.tensor([[60, 60], [50, 40]]), "score_thresh": 0.2,
        "nms_thresh": 0.5, "max_detections": 10, "min_size": 0.1, "class_top_n": 5, "weights": (10.0, 10.0, 5.0, 5.0),
        "scale_clamp": 4.0,
    }  # fmt: skip
    kinds = {
        "score_thresh": "number", "nms_thresh": "number", "max_detections": "size", "min_size": "number",
        "class_top_n": "count", "weights": "four", "scale_clamp": "number",
    }  # fmt: skip
    return Call(ops.select_box_detections, arguments, kinds)


def segmented_nms(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {
        "boxes": _boxes(g, dtype, 2, 15 * size**2), "scores": _normal(g, dtype, 2, 15 * size**2),
        "groups": torch.randint(-2, 3, (2, 15 * size**2), generator=g), "counts": torch.tensor([15, 9]),
        "iou_threshold": 0.5, "max_output": 10, "convention": "torchvision",
    }  # fmt: skip
    kinds = {"iou_threshold": "number", "max_output": "size", "convention": "word"}
    return Call(ops.segmented_nms, arguments, kinds)


def nms(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {
        "boxes": _boxes(g, dtype, 15 * size**2),
        "scores": _normal(g, dtype, 15 * size**2),
        "iou_threshold": 0.5,
    }
    return Call(ops.nms, arguments, {"iou_threshold": "number"})


def batched_nms(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    call = nms(g, dtype, size)
    call.arguments["idxs"] = torch.randint(-2, 3, (15 * size**2,), generator=g)
    return Call(ops.batched_nms, call.arguments, call.kinds)


def match_anchors(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {
        "gt_boxes": _boxes(g, dtype, 2, 4 * size), "gt_counts": torch.tensor([4, 2]),
        "anchors": _boxes(g, dtype, 30 * size), "high_threshold": 0.5, "low_threshold": 0.3,
        "allow_low_quality_matches": True, "anchor_counts": None,
    }  # fmt: skip
    kinds = {"high_threshold": "number", "low_threshold": "number", "allow_low_quality_matches": "flag"}
    return Call(ops.match_anchors, arguments, kinds)


def paste_masks(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {"masks": torch.rand(3 * size, 1, 7, 7, generator=g, dtype=torch.float64).to(dtype),
                 "boxes": _boxes(g, _wide(dtype), 3 * size), "image_size": (20, 24), "padding": 1,
                 "threshold": None}  # fmt: skip
    kinds = {"image_size": "list", "padding": "size", "threshold": "number"}
    return Call(ops.paste_masks, arguments, kinds)


def heatmaps_to_keypoints(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {"heatmaps": _normal(g, dtype, 3 * size, 2, 7, 6), "boxes": _boxes(g, dtype, 3 * size)}
    return Call(ops.heatmaps_to_keypoints, arguments, {})


def sigmoid_focal_loss(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    arguments = {"logits": _normal(g, dtype, 30 * size**2, 7),
                 "labels": torch.randint(-1, 7, (30 * size**2,), generator=g),
                 "weights": _normal(g, _wide(dtype), 30 * size**2).abs(), "alpha": 0.25}  # fmt: skip
    return Call(ops.sigmoid_focal_loss, arguments, {"alpha": "number"}, sums=210)


def frozen_batch_norm(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    (height, width), _ = _sizes(g, size)
    x, residual = _maps(g, dtype, 5, [(height, width)] * 2)
    norm, other = ([*_normal(g, _wide(dtype), 3, 5), torch.rand(5, generator=g).to(_wide(dtype))] for _ in range(2))
    names = ("weight", "bias", "running_mean", "running_var")
    arguments = {"x": x, **dict(zip(names, norm, strict=True)), "eps": 1e-5, "residual": residual,
                 "residual_norm": other, "activation": "relu", "rule": "torchvision", "output_dtype": None}  # fmt: skip
    kinds = {"eps": "number", "activation": "word", "rule": "word", "output_dtype": "word"}
    return Call(ops.frozen_batch_norm, arguments, kinds, sums=16)


RECIPES = (top_down, upsample_add, fuse_maps, resize_cat, multiscale_roi_align, roi_align, assign_levels,
           generate_proposals, select_detections, select_box_detections, segmented_nms, nms, batched_nms, match_anchors,
           paste_masks, heatmaps_to_keypoints, sigmoid_focal_loss, frozen_batch_norm)  # fmt: skip


def match_anchors_of_a_grid(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    call = match_anchors(g, _wide(dtype), size)
    sizes = [(9 * size, 12 * size), (5 * size, 6 * size)]
    grid = ops.AnchorGrid(_CELLS, sizes, [(4, 4), (8, 8)])
    return Call(ops.match_anchors, {**call.arguments, "anchors": grid}, call.kinds)


def match_anchors_of_each_image(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    call = match_anchors(g, dtype, size)
    others = {"anchors": _boxes(g, dtype, 2, 30 * size), "anchor_counts": torch.tensor([30, 7]), "gt_counts": None}
    return Call(ops.match_anchors, call.arguments | others, call.kinds)


def paste_masks_above(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    call = paste_masks(g, dtype, size)
    return Call(ops.paste_masks, call.arguments | {"threshold": 0.5}, call.kinds)


def select_detections_by_distances(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    call = select_detections(g, dtype, size)
    sizes = [tuple(m.shape[2:]) for m in call.arguments["logits"]]
    others = {"centerness": _maps(g, dtype, 2, sizes), "coder": "distances"}
    return Call(ops.select_detections, call.arguments | others, call.kinds)


def segmented_nms_of_one_group(g: torch.Generator, dtype: torch.dtype, size: int = 1) -> Call:
    call = segmented_nms(g, dtype, size)
    return Call(ops.segmented_nms, call.arguments | {"groups": None, "counts": None}, call.kinds)


#: With the arguments that are often left out.
VARIANTS = (match_anchors_of_a_grid, match_anchors_of_each_image, paste_masks_above, select_detections_by_distances,
            segmented_nms_of_one_group)  # fmt: skip
