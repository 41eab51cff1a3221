# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: shapes of named detectors, and the bytes that each op must move."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fpn_fast.bench.rois import pixels_read

#: A pyramid's maps, (height, width), finest first.
Levels = tuple[tuple[int, int], ...]

#: Strides 4 to 32 of an 800x1344 image, the usual padded size of COCO images, and of 800x1333, the size before padding:
#: its widths halve to 334, 167, 84 and 42, so the ratio is not two everywhere.
RESNET50_FPN_800X1344: Levels = ((200, 336), (100, 168), (50, 84), (25, 42))
RESNET50_FPN_800X1333: Levels = ((200, 334), (100, 167), (50, 84), (25, 42))
#: Strides 4 to 64 for an RPN: 268,569 anchors with three per cell.
RPN_800X1344: Levels = (*RESNET50_FPN_800X1344, (13, 21))
#: Strides 8 to 128 for RetinaNet: 201,600 anchors with nine per cell.
RETINANET_800X1344: Levels = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
#: An image in place of maps.
IMAGE_800X1344: Levels = ((800, 1344),)
IMAGE_800X1333: Levels = ((800, 1333),)
TINY_3_LEVELS: Levels = ((4, 4), (2, 2), (1, 1))
TINY_2_MAPS: Levels = ((4, 4), (2, 2))

ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
MEMORY_FORMATS = ("channels_first", "channels_last")


@dataclass(frozen=True)
class Case:
    """One thing to measure; every provider computes it from the same inputs.

    direction: ``forward`` (no gradient recorded), ``forward_grad`` (recorded), ``backward`` (propagated), or
        ``forward_backward``.
    overhead: the maps fit in the first cache, so the cost of a call counts and not bytes.
    rois, output_size, sampling_ratio, clustered: a pooler's RoIs per image, bins per axis, samples per bin and axis
        (0: adaptive), and whether the RoIs crowd around a few objects.
    anchors, classes, pre_nms_top_n: a head's anchors per cell, classes (or groups of boxes, or keypoints) and
        candidates per level.
    boxes: candidates, ground truths, masks or people per image; output_size is then the side of a mask or heatmap.
    axis: what grows from case to case of a series; empty for a case that stands alone.
    """

    op: str
    name: str
    levels: Levels
    batch: int
    channels: int
    dtype: str
    memory_format: str
    direction: str
    overhead: bool = False
    rois: int = 0
    output_size: int = 0
    sampling_ratio: int = 0
    clustered: bool = False
    anchors: int = 0
    classes: int = 0
    pre_nms_top_n: int = 0
    boxes: int = 0
    axis: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-n{self.batch}-{self.dtype}-{self.memory_format}-{self.direction}"


def scales(case: Case) -> tuple[float, ...]:
    """Map pixels per image pixel, from a stride of 4 on."""
    return tuple(2.0 ** -(2 + level) for level in range(len(case.levels)))


#: Image pixels per cell of the finest map, where that is not four.
_FINEST_STRIDE = {"select_detections": 8, "sigmoid_focal_loss": 8} | dict.fromkeys(
    ("batched_nms", "paste_masks", "heatmaps_to_keypoints"), 1
)


def image_size(case: Case) -> tuple[int, int]:
    """(height, width) of the case's image."""
    stride = _FINEST_STRIDE.get(case.op, 4)
    return stride * case.levels[0][0], stride * case.levels[0][1]


def level_anchors(case: Case) -> list[int]:
    """Anchors of each level of one image."""
    return [case.anchors * height * width for height, width in case.levels]


def _map_elements(case: Case) -> list[int]:
    return [case.batch * case.channels * height * width for height, width in case.levels]


def _merge_elements(case: Case) -> int:
    """Forward reads every lateral and writes every merged map but the coarsest, which is its lateral.

    Backward reads and writes a gradient for each level but the finest, whose gradient is its merged map's own. In
    upsample_add the coarser map is no output, so it has no gradient to read.
    """
    fine, *coarse = _map_elements(case)
    if case.op == "upsample_add":
        return fine + coarse[0] if case.direction == "backward" else 2 * fine + coarse[0]
    return fine + 2 * sum(coarse) if case.direction == "backward" else 2 * (fine + sum(coarse)) - coarse[-1]


def _pooler_elements(case: Case) -> int:
    """Forward reads every pixel that a RoI covers and writes the bins; backward reads those and writes all maps."""
    pooled = case.batch * case.rois * case.channels * case.output_size**2
    if case.direction == "backward":
        return pooled + sum(_map_elements(case))
    # detectron2 and mmdetection put pixel centres at half-integers, as torchvision does with aligned=True.
    aligned = case.op != "multiscale_roi_align"
    grid = case.output_size, case.sampling_ratio, case.clustered, aligned
    return pooled + case.channels * pixels_read(case.batch, case.rois, case.levels, scales(case), *grid)


#: Channels of a ResNet-50's maps, in channels of the pyramid.
NECK_CHANNELS = (1, 2, 4, 8)


def _neck_elements(case: Case) -> int:
    """Maps, weights and outputs; backward also the gradients of the first two, and reads those of the outputs."""
    width, (height, breadth) = case.channels, case.levels[-1]
    maps = sum(share * each for share, each in zip(NECK_CHANNELS, _map_elements(case), strict=True))
    weights = sum((share + 9) * width**2 + 2 * width for share in NECK_CHANNELS)
    outputs = sum(_map_elements(case)) + case.batch * width * -(-height // 2) * -(-breadth // 2)
    return (2 if case.direction == "backward" else 1) * (maps + weights) + outputs


def _proposal_elements(case: Case) -> int:
    """Every logit, the deltas of the selected anchors, and boxes and scores of the proposals."""
    selected = sum(min(case.pre_nms_top_n, anchors) for anchors in level_anchors(case))
    return case.batch * (sum(level_anchors(case)) + 4 * selected + 5 * min(case.pre_nms_top_n, selected))


def _focal_elements(case: Case) -> int:
    """Every logit and each anchor's label of 8 bytes; backward reads both again and writes a gradient per logit."""
    return case.batch * sum(level_anchors(case)) * (case.classes * (2 if case.direction == "backward" else 1) + 2)


_ELEMENTS_MOVED: dict[str, Callable[[Case], int]] = {
    "top_down": _merge_elements,
    "upsample_add": _merge_elements,
    "multiscale_roi_align": _pooler_elements,
    "generate_proposals": _proposal_elements,
    # Every logit. What is above the threshold depends on the data, and is little.
    "select_detections": lambda case: case.batch * case.classes * sum(level_anchors(case)),
    "sigmoid_focal_loss": _focal_elements,
    # Boxes, scores and groups, and an index per kept box: one in each group at least. Integers have 8 bytes.
    "batched_nms": lambda case: (4 + 1 + 2) * case.boxes + 2 * min(case.classes, case.boxes),
    # Ground truths and anchors, and an index of 8 bytes per anchor.
    "match_anchors": lambda case: 4 * case.boxes + (4 + 2) * sum(level_anchors(case)),
    # Masks and boxes, and an image for each.
    "paste_masks": lambda case: case.boxes * (case.output_size**2 + 4 + image_size(case)[0] * image_size(case)[1]),
    # Heatmaps and boxes, and (x, y, 1) and a score per keypoint.
    "heatmaps_to_keypoints": lambda case: case.boxes * (case.classes * (case.output_size**2 + 3 + 1) + 4),
    "detectron2_fpn": _neck_elements,
    "detectron2_pooler": _pooler_elements,
    "detectron2_proposals": _proposal_elements,
    "mmdet_neck": _neck_elements,
    "mmdet_extractor": _pooler_elements,
    "mmdet_proposals": _proposal_elements,
}


def bytes_moved(case: Case) -> int:
    """The fewest bytes that `case` can move: each input read once, each output written once.

    The same for every provider, whatever it really moves, so that the share of the copy bandwidth compares them.
    """
    elements = _ELEMENTS_MOVED[case.op](case)
    if case.direction == "forward_backward":
        elements += _ELEMENTS_MOVED[case.op](replace(case, direction="backward"))
    return elements * ELEMENT_BYTES[case.dtype]


_SELECTION_TARGETS = {
    "generate_proposals": 8.0,
    "select_detections": 5.0,
    "sigmoid_focal_loss": 5.0,
    "batched_nms": 3.0,
    "paste_masks": 5.0,
    "heatmaps_to_keypoints": 3.0,
}
_MATCH_TARGETS = {20: 10.0, 300: 20.0}  # by ground truths


def targets(case: Case) -> dict[str, float]:
    """What the compiled library is held to for `case` on two CPU cores; empty where it is only reported.

    eager, compile: at least so many times as fast as that provider; copy: at least this share of a copy's bandwidth;
    peak: at most this share of eager's peak memory.
    """
    if case.op in _SELECTION_TARGETS:
        return {"eager": _SELECTION_TARGETS[case.op]}
    if case.op == "match_anchors" and case.boxes in _MATCH_TARGETS:
        return {"eager": _MATCH_TARGETS[case.boxes], "peak": 0.1}
    if case.op == "multiscale_roi_align" and case.dtype == "float32":
        if case.direction == "forward" and case.sampling_ratio == 0:
            return {"eager": 10.0}
        return {"eager": 8.0 if case.memory_format == "channels_last" else 5.0}
    if (case.name, case.dtype, case.batch) == ("resnet50_fpn_800x1344", "float32", 1):
        return {"compile": 1.0, "copy": 0.85} if case.direction == "forward" else {"compile": 1.0}
    return {}


def _pathway(name: str, levels: Levels, batches: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Case]:
    return [
        Case("top_down", name, levels, batch, 256, dtype, memory_format, direction)
        for batch in batches
        for dtype in dtypes
        for memory_format in MEMORY_FORMATS
        for direction in ("forward", "backward")
    ]


def _call_overhead() -> list[Case]:
    tiny = ("top_down", "tiny_3_levels", TINY_3_LEVELS), ("upsample_add", "tiny_2_maps", TINY_2_MAPS)
    return [
        Case(op, name, levels, 1, 8, "float32", "channels_first", direction, overhead=True)
        for op, name, levels in tiny
        for direction in ("forward", "forward_grad", "forward_backward")
    ]


def _top_down(device_type: str) -> list[Case]:
    cases = _pathway("resnet50_fpn_800x1344", RESNET50_FPN_800X1344, (1, 2), ("float32", "bfloat16"))
    cases += _call_overhead()
    cases += _pathway("resnet50_fpn_800x1333", RESNET50_FPN_800X1333, (1,), ("float32",))
    if device_type == "cuda":
        cases += _pathway("resnet50_fpn_800x1344", RESNET50_FPN_800X1344, (8,), ("float32", "bfloat16"))
    return cases


#: A detector's poolers: RoIs per image, bins and samples per axis.
POOLERS = {
    "box_1000_7x7_ratio_2": (1000, 7, 2),
    "box_1000_7x7_adaptive": (1000, 7, 0),
    "mask_100_14x14_ratio_2": (100, 14, 2),
    "train_512_7x7_ratio_2": (512, 7, 2),
}


def _pool(pooler: str, batch: int, dtype: str, clustered: bool = False) -> list[Case]:
    count, output_size, sampling_ratio = POOLERS[pooler]
    name = f"{pooler}_{'clustered' if clustered else 'spread'}"
    return [
        Case("multiscale_roi_align", name, RESNET50_FPN_800X1344, batch, 256, dtype, memory_format, direction,
             rois=count, output_size=output_size, sampling_ratio=sampling_ratio, clustered=clustered)
        for memory_format in MEMORY_FORMATS
        for direction in ("forward", "backward")
    ]  # fmt: skip


def _multiscale_roi_align(device_type: str) -> list[Case]:
    cases = [case for pooler in POOLERS for case in _pool(pooler, 1, "float32")]
    box = "box_1000_7x7_ratio_2"
    cases += _pool(box, 1, "bfloat16") + _pool(box, 1, "float32", clustered=True) + _pool(box, 2, "float32")
    if device_type == "cuda":
        cases += [case for pooler in POOLERS if pooler != box for case in _pool(pooler, 1, "bfloat16")]
        cases += _pool(box, 1, "bfloat16", clustered=True) + _pool(box, 2, "bfloat16") + _pool(box, 8, "bfloat16")
    return cases


def _selection(op: str, name: str, levels: Levels, batch: int = 1, memory_format: str = "channels_first",
               **sizes: Any) -> Case:  # fmt: skip
    return Case(op, name, levels, batch, 0, "float32", memory_format, "forward", **sizes)


def _generate_proposals(device_type: str) -> list[Case]:
    return [
        _selection("generate_proposals", f"top_{top_n}_800x1344", RPN_800X1344, batch, memory_format, anchors=3,
                   pre_nms_top_n=top_n)
        for batch, top_n, memory_format in itertools.product((1, 2, 8), (1000, 2000), MEMORY_FORMATS)
    ]  # fmt: skip


def _select_detections(device_type: str) -> list[Case]:
    # Tables with the classes of an anchor side by side, as channels_last maps have them.
    return [
        _selection("select_detections", "retinanet_91_classes_800x1344", RETINANET_800X1344, batch, "channels_last",
                   anchors=9, classes=91, pre_nms_top_n=1000)
        for batch in (1, 2)
    ]  # fmt: skip


def _sigmoid_focal_loss(device_type: str) -> list[Case]:
    cases = [
        _selection("sigmoid_focal_loss", "retinanet_91_classes_800x1344", RETINANET_800X1344, batch, "channels_last",
                   anchors=9, classes=91)
        for batch in (1, 2)
    ]  # fmt: skip
    return [replace(case, direction="forward_backward") for case in cases]


def _batched_nms(device_type: str) -> list[Case]:
    return [
        _selection("batched_nms", f"{boxes}_boxes_{groups}_groups", IMAGE_800X1344, boxes=boxes, classes=groups)
        for boxes, groups in itertools.product((1_000, 5_000, 10_000, 30_000), (1, 5, 80, 1203))
    ]


def _match_anchors(device_type: str) -> list[Case]:
    return [
        _selection("match_anchors", f"{gts}_gts_800x1344", RPN_800X1344, anchors=3, boxes=gts)
        for gts in (20, 300, 100, 7)
    ]


def _paste_masks(device_type: str) -> list[Case]:
    return [_selection("paste_masks", "100_masks_800x1333", IMAGE_800X1333, boxes=100, output_size=28)]


def _heatmaps_to_keypoints(device_type: str) -> list[Case]:
    return [
        _selection("heatmaps_to_keypoints", f"{boxes}_people_800x1333", IMAGE_800X1333, boxes=boxes, classes=17,
                   output_size=56)
        for boxes in (20, 100)
    ]  # fmt: skip


def _levels(height: int, width: int, count: int) -> Levels:
    """Maps of strides 4, 8, ... of an image."""
    return tuple((-(-height // stride), -(-width // stride)) for stride in (4 << i for i in range(count)))


def _growth(device_type: str) -> list[Case]:
    """Series in which one quantity grows and all else stays."""
    images = ((400, 672), (800, 1344), (1200, 2016))
    pooler = next(c for c in _pool("box_1000_7x7_ratio_2", 1, "float32") if c.memory_format == "channels_last")
    pathway = next(c for c in _pathway("", RESNET50_FPN_800X1344, (1,), ("float32",)) if c.direction == "forward")
    proposals = _selection("generate_proposals", "", RPN_800X1344, anchors=3, pre_nms_top_n=1000)
    matching = _selection("match_anchors", "", RPN_800X1344, anchors=3, boxes=20)
    cases = [replace(pooler, rois=count, axis="rois", name=f"rois_{count}") for count in (100, 300, 1000, 3000)]
    cases += [replace(matching, boxes=count, axis="gts", name=f"gts_{count}") for count in (5, 20, 80, 320)]
    for base, counts in ((pathway, (1, 2, 4)), (proposals, (1, 2, 4, 8))):
        cases += [replace(base, batch=count, axis="batch", name="batch") for count in counts]
    for base, axis, levels in ((pathway, "image", 4), (proposals, "image", 5), (matching, "anchors", 5)):
        cases += [
            replace(base, levels=_levels(*size, levels), axis=axis, name=f"{axis}_{size[0]}x{size[1]}")
            for size in images
        ]
    return cases


def _library(neck: str, extractor: str, proposals: str) -> Callable[[str], list[Case]]:
    """The parts of a library's Faster R-CNN R50 that fpn_fast replaces; their pooling is adaptive."""

    def of(device_type: str) -> list[Case]:
        name = "faster_rcnn_r50_800x1344"
        cases = [
            Case(op, name, RESNET50_FPN_800X1344, 1, 256, "float32", memory_format, direction)
            for op in (neck, extractor)
            for memory_format in MEMORY_FORMATS
            for direction in ("forward", "backward")
        ]
        cases = [replace(case, rois=1000, output_size=7) if case.op == extractor else case for case in cases]
        return cases + [
            _selection(proposals, name, RPN_800X1344, batch, memory_format, anchors=3, pre_nms_top_n=1000)
            for batch, memory_format in itertools.product((1, 2), MEMORY_FORMATS)
        ]

    return of


#: Family -> its cases for a device type, the most valuable first. A family's rows share one results file.
FAMILIES: dict[str, Callable[[str], list[Case]]] = {
    "top_down": _top_down,
    "multiscale_roi_align": _multiscale_roi_align,
    "generate_proposals": _generate_proposals,
    "select_detections": _select_detections,
    "sigmoid_focal_loss": _sigmoid_focal_loss,
    "batched_nms": _batched_nms,
    "match_anchors": _match_anchors,
    "paste_masks": _paste_masks,
    "heatmaps_to_keypoints": _heatmaps_to_keypoints,
    "detectron2": _library("detectron2_fpn", "detectron2_pooler", "detectron2_proposals"),
    "mmdet": _library("mmdet_neck", "mmdet_extractor", "mmdet_proposals"),
    "growth": _growth,
}


def tiny(case: Case) -> Case:
    """`case` with eight channels, maps of a few pixels and few boxes: for tests, not for measurements."""
    levels = tuple(((height + 15) // 16, (width + 15) // 16) for height, width in case.levels)
    if all(fine == (2 * coarse[0], 2 * coarse[1]) for fine, coarse in itertools.pairwise(case.levels)):
        # Maps that halve still do: detectron2 takes no others.
        (height, width), last = levels[-1], len(levels) - 1
        levels = tuple((height << (last - i), width << (last - i)) for i in range(len(levels)))
    return replace(
        case,
        levels=levels,
        channels=min(case.channels, 8),
        rois=min(case.rois, 4),
        classes=min(case.classes, 3),
        pre_nms_top_n=min(case.pre_nms_top_n, 20),
        boxes=min(case.boxes, 20),
    )
