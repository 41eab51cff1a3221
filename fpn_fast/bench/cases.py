# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: shapes of named detectors, and the bytes that each op must move.

A later op adds cases and a family here, and its callables in providers.py, selection.py or libraries.py; nothing else
changes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fpn_fast.bench.rois import adaptive_samples, pixels_read

#: A pyramid's maps, (height, width), finest first.
Levels = tuple[tuple[int, int], ...]

#: Strides 4 to 32 of an 800 x 1344 image, the usual padded size of COCO images, and of 800 x 1333, which is the size
#: before padding: its widths halve to 334, 167, 84, 42, so the ratio is not two everywhere.
RESNET50_FPN_800X1344: Levels = ((200, 336), (100, 168), (50, 84), (25, 42))
RESNET50_FPN_800X1333: Levels = ((200, 334), (100, 167), (50, 84), (25, 42))
#: Strides 4 to 64 of 800 x 1344, of an RPN: 268,569 anchors at three a cell.
RPN_800X1344: Levels = (*RESNET50_FPN_800X1344, (13, 21))
#: Strides 8 to 128, of RetinaNet: 201,600 anchors at nine a cell.
RETINANET_800X1344: Levels = ((100, 168), (50, 84), (25, 42), (13, 21), (7, 11))
#: An image instead of maps.
IMAGE_800X1344: Levels = ((800, 1344),)
IMAGE_800X1333: Levels = ((800, 1333),)
TINY_3_LEVELS: Levels = ((4, 4), (2, 2), (1, 1))
TINY_2_MAPS: Levels = ((4, 4), (2, 2))

ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
MEMORY_FORMATS = ("channels_first", "channels_last")
#: forward: no gradients recorded; forward_grad: recorded; forward_backward: recorded, then propagated.
DIRECTIONS = ("forward", "backward", "forward_grad", "forward_backward")


@dataclass(frozen=True)
class Case:
    """One thing to measure; every provider computes it from the same inputs."""

    op: str
    name: str
    levels: Levels
    batch: int
    channels: int
    dtype: str
    memory_format: str
    direction: str
    #: Call overhead is what counts, not bytes: these maps fit in the first cache.
    overhead: bool = False
    #: Of a pooler: RoIs per image, bins along an axis, samples along an axis of a bin (0: adaptive), and whether the
    #: RoIs crowd around a few objects.
    rois: int = 0
    output_size: int = 0
    sampling_ratio: int = 0
    clustered: bool = False
    #: Of a selection: anchors of a cell, classes (groups of boxes, or keypoints of each), candidates of a level, and
    #: boxes that are there before (candidates, ground truths, masks or people of an image; output_size is then a mask's
    #: or heatmap's).
    anchors: int = 0
    classes: int = 0
    pre_nms_top_n: int = 0
    boxes: int = 0
    #: What grows from case to case of a series, one of AXES; none for a case that stands alone.
    axis: str = ""

    def __str__(self) -> str:
        return f"{self.op}-{self.name}-n{self.batch}-{self.dtype}-{self.memory_format}-{self.direction}"


@dataclass(frozen=True)
class Target:
    """What the fused op must reach on a CPU: times as fast as another provider, in a share of its peak memory."""

    provider: str
    times: float
    peak_share: float | None = None


def _elements(case: Case) -> list[int]:
    """Elements of each map, finest first."""
    return [case.batch * case.channels * height * width for height, width in case.levels]


def _top_down_elements(case: Case) -> int:
    """Forward: each lateral is read and each merged map but the coarsest, which is its lateral, is written.

    Backward: the finest lateral's gradient is its merged map's own; each coarser one reads a gradient and writes one.
    """
    maps = _elements(case)
    if case.direction == "backward":
        return maps[0] + 2 * sum(maps[1:])
    return 2 * sum(maps[:-1]) + maps[-1]


def _upsample_add_elements(case: Case) -> int:
    """As in top_down, but the coarser map is no output, so it has no gradient of its own to read."""
    fine, coarse = _elements(case)
    return fine + coarse if case.direction == "backward" else 2 * fine + coarse


def scales(case: Case) -> tuple[float, ...]:
    """Map pixels per image pixel, from a stride of 4 on."""
    return tuple(2.0 ** -(2 + level) for level in range(len(case.levels)))


#: Pixels between the finest map's cells, where that is not four.
_FINEST_STRIDE = {
    "select_detections": 8,
    "sigmoid_focal_loss": 8,
    "batched_nms": 1,
    "paste_masks": 1,
    "heatmaps_to_keypoints": 1,
}


def image_size(case: Case) -> tuple[int, int]:
    """(height, width) of the image that the case's maps are of."""
    stride = _FINEST_STRIDE.get(case.op, 4)
    height, width = case.levels[0]
    return stride * height, stride * width


def _roi_align_elements(case: Case) -> int:
    """Forward: every pixel that a RoI reads, and the output. Backward: the output's gradient, and that of all maps.

    The other libraries' poolers have pixel centres at half-integers.
    """
    pooled = case.batch * case.rois * case.channels * case.output_size**2
    if case.direction == "backward":
        return pooled + sum(_elements(case))
    read = pixels_read(
        case.batch,
        case.rois,
        case.levels,
        scales(case),
        case.output_size,
        case.sampling_ratio,
        case.clustered,
        aligned=case.op != "multiscale_roi_align",
    )
    return pooled + read * case.channels


#: Channels of a ResNet-50's maps, in channels of the pyramid.
NECK_CHANNELS = (1, 2, 4, 8)


def _neck_elements(case: Case) -> int:
    """Maps, weights and outputs; backward also the gradients of all three."""
    taken = sum(share * each for share, each in zip(NECK_CHANNELS, _elements(case), strict=True))
    width = case.channels
    weights = sum(share * width**2 + width + 9 * width**2 + width for share in NECK_CHANNELS)
    height, breadth = case.levels[-1]
    coarsest = case.batch * width * -(-height // 2) * -(-breadth // 2)
    if case.direction == "backward":
        # Of what is not read again, the outputs, the gradients alone.
        return 2 * (taken + weights) + sum(_elements(case)) + coarsest
    return taken + weights + sum(_elements(case)) + coarsest


def _neck_arithmetic(case: Case) -> int:
    """A product and a sum for each weight and place; backward that of the maps and of the weights."""
    places = [case.batch * height * width for height, width in case.levels]
    products = sum((share + 9) * each for share, each in zip(NECK_CHANNELS, places, strict=True)) * case.channels**2
    return (4 if case.direction == "backward" else 2) * products


def _anchors(case: Case) -> list[int]:
    """Anchors of each level."""
    return [case.anchors * height * width for height, width in case.levels]


def _proposal_elements(case: Case) -> int:
    """Every logit, the deltas of what is selected by them, and boxes and scores of as many proposals."""
    selected = sum(min(case.pre_nms_top_n, anchors) for anchors in _anchors(case))
    return case.batch * (sum(_anchors(case)) + 4 * selected + 5 * min(case.pre_nms_top_n, selected))


def _detection_elements(case: Case) -> int:
    """Every logit. What is above the threshold is data, and little."""
    return case.batch * case.classes * sum(_anchors(case))


def _focal_elements(case: Case) -> int:
    """Every logit, and a class of each anchor, of 8 bytes; backward again, and a gradient of each logit."""
    anchors = case.batch * sum(_anchors(case))
    return anchors * (case.classes * (2 if case.direction == "backward" else 1) + 2)


def _nms_elements(case: Case) -> int:
    """Boxes, scores and groups, and an index of what is kept: one in each group at least. Integers are of 8 bytes."""
    return (4 + 1 + 2) * case.boxes + 2 * min(case.classes, case.boxes)


def _match_elements(case: Case) -> int:
    """Ground truths and anchors, and an index of 8 bytes for each anchor."""
    return 4 * case.boxes + (4 + 2) * sum(_anchors(case))


def _paste_elements(case: Case) -> int:
    """Masks and boxes, and an image for each."""
    height, width = image_size(case)
    return case.boxes * (case.output_size**2 + 4 + height * width)


def _keypoint_elements(case: Case) -> int:
    """Heatmaps and boxes, and a keypoint and a score for each."""
    return case.boxes * (case.classes * (case.output_size**2 + 3 + 1) + 4)


_ELEMENTS_MOVED: dict[str, Callable[[Case], int]] = {
    "top_down": _top_down_elements,
    "upsample_add": _upsample_add_elements,
    "multiscale_roi_align": _roi_align_elements,
    "generate_proposals": _proposal_elements,
    "select_detections": _detection_elements,
    "sigmoid_focal_loss": _focal_elements,
    "batched_nms": _nms_elements,
    "match_anchors": _match_elements,
    "paste_masks": _paste_elements,
    "heatmaps_to_keypoints": _keypoint_elements,
    "detectron2_fpn": _neck_elements,
    "detectron2_pooler": _roi_align_elements,
    "detectron2_proposals": _proposal_elements,
    "mmdet_neck": _neck_elements,
    "mmdet_extractor": _roi_align_elements,
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


def _samples(case: Case) -> int:
    """Samples of all bins of a pooler."""
    bins = case.batch * case.rois * case.output_size**2
    if case.sampling_ratio:
        return bins * case.sampling_ratio**2
    height, width = image_size(case)
    per_bin = adaptive_samples(case.batch, case.rois, height, width, scales(case), case.output_size, case.clustered)
    return round(bins * per_bin)


_ARITHMETIC: dict[str, Callable[[Case], int]] = {
    # An addition for each element of a map that something is added to.
    "top_down": lambda case: sum(_elements(case)[:-1]),
    "upsample_add": lambda case: _elements(case)[0],
    # Four products and sums a sample.
    "multiscale_roi_align": lambda case: 8 * _samples(case) * case.channels,
    # A comparison of each logit, and some 40 operations to decode, clip and test a candidate.
    "generate_proposals": lambda case: (
        case.batch * sum(anchors + 40 * min(case.pre_nms_top_n, anchors) for anchors in _anchors(case))
    ),
    "select_detections": lambda case: case.batch * case.classes * sum(_anchors(case)),
    # An exponential, a logarithm and a division, and what joins them: some 50 operations, which also give the gradient.
    "sigmoid_focal_loss": lambda case: 25 * case.batch * case.classes * sum(_anchors(case)),
    # The comparisons of a sort.
    "batched_nms": lambda case: round(case.boxes * math.log2(max(case.boxes, 2))),
    # An intersection over union of each pair.
    "match_anchors": lambda case: 12 * case.boxes * sum(_anchors(case)),
    # Four products and sums for each pixel of a mask, at least.
    "paste_masks": lambda case: 8 * case.boxes * case.output_size**2,
    "detectron2_fpn": _neck_arithmetic,
    "mmdet_neck": _neck_arithmetic,
}
_ARITHMETIC |= dict.fromkeys(("detectron2_pooler", "mmdet_extractor"), _ARITHMETIC["multiscale_roi_align"])
_ARITHMETIC |= dict.fromkeys(("detectron2_proposals", "mmdet_proposals"), _ARITHMETIC["generate_proposals"])


def arithmetic(case: Case) -> int | None:
    """Operations that a result of `case` cannot do without, for its place on a roofline; None where nobody said.

    Of what data decide, such as the pairs that suppression compares, nothing is counted: a kernel does more than this.
    """
    if case.op not in _ARITHMETIC:
        return None
    return _ARITHMETIC[case.op](case) * (2 if case.direction == "forward_backward" else 1)


#: What can grow: the label of its axis, and how much of it a case has.
AXES: dict[str, tuple[str, Callable[[Case], float]]] = {
    "rois": ("RoIs", lambda case: case.batch * case.rois),
    "anchors": ("anchors of an image", lambda case: sum(_anchors(case))),
    "gts": ("ground truths of an image", lambda case: case.boxes),
    "batch": ("images", lambda case: case.batch),
    "image": ("megapixels of an image", lambda case: math.prod(image_size(case)) / 1e6),
}

#: What selections are held to, whatever the case.
_SELECTION_TARGETS = {
    "generate_proposals": Target("eager", 8.0),
    "select_detections": Target("eager", 5.0),
    "sigmoid_focal_loss": Target("eager", 5.0),
    "batched_nms": Target("eager", 3.0),
    "paste_masks": Target("eager", 5.0),
    "heatmaps_to_keypoints": Target("eager", 3.0),
}
#: By the number of ground truths.
_MATCH_TARGETS = {20: Target("eager", 10.0, peak_share=0.1), 300: Target("eager", 20.0, peak_share=0.1)}


def targets(case: Case) -> tuple[Target, ...]:
    """What the compiled library is held to for `case` on two CPU cores; empty where it is only reported."""
    if case.overhead:
        return (Target("eager", 1.0),)
    if case.op in _SELECTION_TARGETS:
        return (_SELECTION_TARGETS[case.op],)
    if case.op == "match_anchors":
        return (_MATCH_TARGETS[case.boxes],) if case.boxes in _MATCH_TARGETS else ()
    if case.op == "multiscale_roi_align" and case.dtype == "float32":
        if case.direction == "forward" and case.sampling_ratio == 0:
            return (Target("eager", 10.0),)
        return (Target("eager", 8.0 if case.memory_format == "channels_last" else 5.0),)
    if case.name == "resnet50_fpn_800x1344" and case.dtype == "float32":
        return (Target("eager", 2.0), Target("compile", 1.0))
    return ()


def _pathway(name: str, levels: Levels, batches: tuple[int, ...], dtypes: tuple[str, ...]) -> list[Case]:
    return [
        Case("top_down", name, levels, batch, 256, dtype, memory_format, direction)
        for batch in batches
        for dtype in dtypes
        for memory_format in MEMORY_FORMATS
        for direction in ("forward", "backward")
    ]


def _call_overhead() -> list[Case]:
    return [
        Case(op, name, levels, 1, 8, "float32", "channels_first", direction, overhead=True)
        for op, name, levels in (
            ("top_down", "tiny_3_levels", TINY_3_LEVELS),
            ("upsample_add", "tiny_2_maps", TINY_2_MAPS),
        )
        for direction in ("forward", "forward_grad", "forward_backward")
    ]


def _top_down(device_type: str) -> list[Case]:
    cases = _pathway("resnet50_fpn_800x1344", RESNET50_FPN_800X1344, (1, 2), ("float32", "bfloat16"))
    cases += _call_overhead()
    cases += _pathway("resnet50_fpn_800x1333", RESNET50_FPN_800X1333, (1,), ("float32",))
    if device_type == "cuda":
        cases += _pathway("resnet50_fpn_800x1344", RESNET50_FPN_800X1344, (8,), ("float32", "bfloat16"))
    return cases


#: A detector's poolers: RoIs per image, bins, samples.
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
        Case(
            "multiscale_roi_align",
            name,
            RESNET50_FPN_800X1344,
            batch,
            256,
            dtype,
            memory_format,
            direction,
            rois=count,
            output_size=output_size,
            sampling_ratio=sampling_ratio,
            clustered=clustered,
        )
        for memory_format in MEMORY_FORMATS
        for direction in ("forward", "backward")
    ]


def _multiscale_roi_align(device_type: str) -> list[Case]:
    cases = [case for pooler in POOLERS for case in _pool(pooler, 1, "float32")]
    box = "box_1000_7x7_ratio_2"
    cases += _pool(box, 1, "bfloat16") + _pool(box, 1, "float32", clustered=True) + _pool(box, 2, "float32")
    if device_type == "cuda":
        cases += [case for pooler in POOLERS if pooler != box for case in _pool(pooler, 1, "bfloat16")]
        cases += _pool(box, 1, "bfloat16", clustered=True) + _pool(box, 2, "bfloat16") + _pool(box, 8, "bfloat16")
    return cases


def _selection(op: str, name: str, levels: Levels, batch: int = 1, memory_format: str = "channels_first",
               **numbers: Any) -> Case:  # fmt: skip
    return Case(op, name, levels, batch, 0, "float32", memory_format, "forward", **numbers)


def _generate_proposals(device_type: str) -> list[Case]:
    return [
        _selection("generate_proposals", f"top_{top_n}_800x1344", RPN_800X1344, batch, memory_format, anchors=3,
                   pre_nms_top_n=top_n)
        for batch, top_n, memory_format in itertools.product((1, 2, 8), (1000, 2000), MEMORY_FORMATS)
    ]  # fmt: skip


def _select_detections(device_type: str) -> list[Case]:
    # Tables, an anchor's classes together: what maps are whose channels come last.
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
    """Series in which one quantity grows and all else stays, to show how cost grows with it."""
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
    """The parts of a Faster R-CNN R50 that we replace, as a library is configured for it: its pooling is adaptive."""

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
    """`case` with eight channels, maps of a few pixels and few boxes, to walk the code and measure nothing."""
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
