# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: shapes of named detectors, and the bytes that each op must move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fpn_fast.bench.rois import pixels_read

#: A pyramid's maps, (height, width), finest first.
Levels = tuple[tuple[int, int], ...]


def _levels(height: int, width: int, strides: Sequence[int] = (4, 8, 16, 32)) -> Levels:
    """The maps of an image at `strides`."""
    return tuple((-(-height // stride), -(-width // stride)) for stride in strides)


#: Of the usual padded size of COCO images, and of the size before padding, where widths of 334, 167, 84 and 42 do not
#: halve everywhere.
RESNET50_FPN_800X1344, RESNET50_FPN_800X1333 = _levels(800, 1344), _levels(800, 1333)
#: 268,569 anchors with three per cell.
_RPN_STRIDES = (4, 8, 16, 32, 64)
RPN_800X1344 = _levels(800, 1344, _RPN_STRIDES)
#: 201,600 anchors with nine per cell.
RETINANET_800X1344 = _levels(800, 1344, (8, 16, 32, 64, 128))
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
    stride = _FINEST_STRIDE.get(case.op, 4)
    return stride * case.levels[0][0], stride * case.levels[0][1]


def level_anchors(case: Case) -> list[int]:
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

    eager, compile: at least this many times as fast as that provider; copy: at least this share of a copy's bandwidth;
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


def _pathway(name: str, levels: Levels, batch: int, dtype: str, directions: Sequence[str]) -> list[Case]:
    return [
        Case("top_down", name, levels, batch, 256, dtype, memory_format, direction)
        for memory_format in MEMORY_FORMATS
        for direction in directions
    ]


def _top_down(device_type: str) -> list[Case]:
    both, dtypes = ("forward", "backward"), ("float32", "bfloat16")
    large = ("resnet50_fpn_800x1344", RESNET50_FPN_800X1344)
    cases = [case for batch in (1, 2) for dtype in dtypes for case in _pathway(*large, batch, dtype, both)]
    cases += [
        Case(op, name, levels, 1, 8, "float32", "channels_first", direction, overhead=True)
        for op, name, levels in (
            ("top_down", "tiny_3_levels", TINY_3_LEVELS),
            ("upsample_add", "tiny_2_maps", TINY_2_MAPS),
        )
        for direction in ("forward", "forward_grad", "forward_backward")
    ]
    cases += _pathway("resnet50_fpn_800x1333", RESNET50_FPN_800X1333, 1, "float32", both)
    if device_type == "cuda":
        cases += [case for dtype in dtypes for case in _pathway(*large, 8, dtype, both)]
    return cases


#: A detector's poolers: RoIs per image, bins and samples per axis.
POOLERS = {
    "box_1000_7x7_ratio_2": (1000, 7, 2),
    "box_1000_7x7_adaptive": (1000, 7, 0),
    "mask_100_14x14_ratio_2": (100, 14, 2),
    "train_512_7x7_ratio_2": (512, 7, 2),
}
_BOX = "box_1000_7x7_ratio_2"


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
    cases += _pool(_BOX, 1, "bfloat16") + _pool(_BOX, 1, "float32", clustered=True) + _pool(_BOX, 2, "float32")
    if device_type == "cuda":
        cases += [case for pooler in POOLERS if pooler != _BOX for case in _pool(pooler, 1, "bfloat16")]
        cases += _pool(_BOX, 1, "bfloat16", clustered=True) + _pool(_BOX, 2, "bfloat16") + _pool(_BOX, 8, "bfloat16")
    return cases


def _selection(op: str, name: str, levels: Levels, batch: int = 1, memory_format: str = "channels_first",
               direction: str = "forward", **sizes: Any) -> Case:  # fmt: skip
    return Case(op, name, levels, batch, 0, "float32", memory_format, direction, **sizes)


def _retinanet(op: str, direction: str, **sizes: int) -> list[Case]:
    """Tables with the classes of an anchor side by side, as channels_last maps have them."""
    name = "retinanet_91_classes_800x1344"
    return [
        _selection(op, name, RETINANET_800X1344, batch, "channels_last", direction, anchors=9, classes=91, **sizes)
        for batch in (1, 2)
    ]


def _proposals(op: str, name: str, batches: Sequence[int], top_ns: Sequence[int]) -> list[Case]:
    return [
        _selection(op, name.format(top_n), RPN_800X1344, batch, memory_format, anchors=3, pre_nms_top_n=top_n)
        for batch, top_n, memory_format in itertools.product(batches, top_ns, MEMORY_FORMATS)
    ]


#: The families that are the same on every device.
_SELECTIONS: dict[str, list[Case]] = {
    "generate_proposals": _proposals("generate_proposals", "top_{}_800x1344", (1, 2, 8), (1000, 2000)),
    "select_detections": _retinanet("select_detections", "forward", pre_nms_top_n=1000),
    "sigmoid_focal_loss": _retinanet("sigmoid_focal_loss", "forward_backward"),
    "batched_nms": [
        _selection("batched_nms", f"{boxes}_boxes_{groups}_groups", IMAGE_800X1344, boxes=boxes, classes=groups)
        for boxes, groups in itertools.product((1_000, 5_000, 10_000, 30_000), (1, 5, 80, 1203))
    ],
    "match_anchors": [
        _selection("match_anchors", f"{gts}_gts_800x1344", RPN_800X1344, anchors=3, boxes=gts)
        for gts in (20, 300, 100, 7)
    ],
    "paste_masks": [_selection("paste_masks", "100_masks_800x1333", IMAGE_800X1333, boxes=100, output_size=28)],
    "heatmaps_to_keypoints": [
        _selection("heatmaps_to_keypoints", f"{boxes}_people_800x1333", IMAGE_800X1333, boxes=boxes, classes=17,
                   output_size=56)
        for boxes in (20, 100)
    ],
}  # fmt: skip


def _library(neck: str, extractor: str, proposals: str) -> list[Case]:
    """The parts of a library's Faster R-CNN R50 that fpn_fast replaces; their pooling is adaptive."""
    name = "faster_rcnn_r50_800x1344"
    cases = [
        Case(op, name, RESNET50_FPN_800X1344, 1, 256, "float32", memory_format, direction, rois=rois, output_size=size)
        for op, rois, size in ((neck, 0, 0), (extractor, 1000, 7))
        for memory_format in MEMORY_FORMATS
        for direction in ("forward", "backward")
    ]
    return cases + _proposals(proposals, name, (1, 2), (1000,))


def _growth() -> list[Case]:
    """Series in which one quantity grows and all else stays."""
    pooler = next(c for c in _pool(_BOX, 1, "float32") if c.memory_format == "channels_last")
    pathway = _pathway("", RESNET50_FPN_800X1344, 1, "float32", ("forward",))[0]
    proposals, matching = _SELECTIONS["generate_proposals"][0], _SELECTIONS["match_anchors"][0]
    cases = [replace(pooler, rois=count, axis="rois", name=f"rois_{count}") for count in (100, 300, 1000, 3000)]
    cases += [replace(matching, boxes=count, axis="gts", name=f"gts_{count}") for count in (5, 20, 80, 320)]
    for base, counts in ((pathway, (1, 2, 4)), (proposals, (1, 2, 4, 8))):
        cases += [replace(base, batch=count, axis="batch", name="batch") for count in counts]
    for base, axis in ((pathway, "image"), (proposals, "image"), (matching, "anchors")):
        cases += [
            replace(base, levels=_levels(*size, _RPN_STRIDES[: len(base.levels)]), axis=axis,
                    name=f"{axis}_{size[0]}x{size[1]}")
            for size in ((400, 672), (800, 1344), (1200, 2016))
        ]  # fmt: skip
    return cases


def _same(cases: list[Case]) -> Callable[[str], list[Case]]:
    """Cases that do not depend on the device type."""
    return lambda device_type: list(cases)


#: Family -> its cases for a device type, the most valuable first. A family's rows share one results file.
FAMILIES: dict[str, Callable[[str], list[Case]]] = {
    "top_down": _top_down,
    "multiscale_roi_align": _multiscale_roi_align,
    **{family: _same(cases) for family, cases in _SELECTIONS.items()},
    "detectron2": _same(_library("detectron2_fpn", "detectron2_pooler", "detectron2_proposals")),
    "mmdet": _same(_library("mmdet_neck", "mmdet_extractor", "mmdet_proposals")),
    "growth": _same(_growth()),
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
