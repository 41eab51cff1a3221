# SPDX-License-Identifier: Apache-2.0
"""What is measured, as data: shapes of named detectors, and the bytes that each op must move."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from fpn_fast.bench.rois import pixels_read

#: A pyramid's maps, (height, width), finest first.
Levels = tuple[tuple[int, int], ...]


def _levels(height: int, width: int, strides: Sequence[int] = (4, 8, 16, 32)) -> Levels:
    """The maps of an image at `strides`."""
    return tuple((-(-height // stride), -(-width // stride)) for stride in strides)


#: Of the usual padded size of COCO images, and of the size before padding, where widths of 334, 167, 84 and 42 do not
#: halve everywhere.
RESNET50_FPN_800X1344, RESNET50_FPN_800X1333 = _levels(800, 1344), _levels(800, 1333)
#: 268,569 anchors with three per cell; 201,600 with nine.
_RPN_STRIDES = (4, 8, 16, 32, 64)
RPN_800X1344 = _levels(800, 1344, _RPN_STRIDES)
RETINANET_800X1344 = _levels(800, 1344, (8, 16, 32, 64, 128))
TINY_3_LEVELS: Levels = ((4, 4), (2, 2), (1, 1))
TINY_2_MAPS: Levels = ((4, 4), (2, 2))

ELEMENT_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


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
    batch: int = 1
    channels: int = 0
    dtype: str = "float32"
    memory_format: str = "channels_first"
    direction: str = "forward"
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


def _over(base: Case, **axes: Sequence[object]) -> list[Case]:
    """`base` with every combination of the values of its fields `axes`, the last varying fastest.

    Its name may hold fields in braces, and the words ``spread`` (or "clustered") and ``image``.
    """
    found = []
    for values in itertools.product(*axes.values()):
        case = replace(base, **dict(zip(axes, values, strict=True)))  # type: ignore[arg-type]
        image = "{}x{}".format(*image_size(case))
        words = {**vars(case), "spread": "clustered" if case.clustered else "spread", "image": image}
        found.append(replace(case, name=case.name.format(**words)))
    return found


_FORMATS = {"memory_format": ("channels_first", "channels_last")}
_BOTH = {**_FORMATS, "direction": ("forward", "backward")}
_DTYPES = {"dtype": ("float32", "bfloat16")}
_MERGE = Case("top_down", "resnet50_fpn_800x1344", RESNET50_FPN_800X1344, channels=256)
_OVERHEAD = {"direction": ("forward", "forward_grad", "forward_backward")}
_TINY = Case("top_down", "tiny_3_levels", TINY_3_LEVELS, channels=8, overhead=True)
#: A detector's poolers.
_BOX, *_POOLERS = (
    Case("multiscale_roi_align", name + "_{spread}", RESNET50_FPN_800X1344, channels=256, rois=rois, output_size=size,
         sampling_ratio=ratio)
    for name, rois, size, ratio in (
        ("box_1000_7x7_ratio_2", 1000, 7, 2),
        ("box_1000_7x7_adaptive", 1000, 7, 0),
        ("mask_100_14x14_ratio_2", 100, 14, 2),
        ("train_512_7x7_ratio_2", 512, 7, 2),
    )
)  # fmt: skip
_CROWDED = replace(_BOX, clustered=True)
_PROPOSALS = Case("generate_proposals", "top_{pre_nms_top_n}_800x1344", RPN_800X1344, anchors=3, pre_nms_top_n=1000)
#: Tables with the classes of an anchor side by side, as channels_last maps have them.
_RETINANET = Case("select_detections", "retinanet_91_classes_800x1344", RETINANET_800X1344,
                  memory_format="channels_last", anchors=9, classes=91)  # fmt: skip
_MATCH = Case("match_anchors", "{boxes}_gts_800x1344", RPN_800X1344, anchors=3, boxes=20)
#: The ends of the four stages of a ResNet-50 on an 800x1344 image.
_BLOCK_ENDS = [
    Case("frozen_batch_norm", f"block_end_{channels}x{height}x{width}", ((height, width),), channels=channels)
    for channels, (height, width) in zip((256, 512, 1024, 2048), RESNET50_FPN_800X1344, strict=True)
]
_IMAGE, _UNPADDED_IMAGE = ((800, 1344),), ((800, 1333),)


def _library(neck: str, extractor: str, proposals: str) -> list[Case]:
    """The parts of a library's Faster R-CNN R50 that fpn_fast replaces; their pooling is adaptive."""
    base = Case(neck, "faster_rcnn_r50_800x1344", RESNET50_FPN_800X1344, channels=256)
    return [
        *_over(base, **_BOTH),
        *_over(replace(base, op=extractor, rois=1000, output_size=7), **_BOTH),
        *_over(replace(_PROPOSALS, op=proposals, name=base.name), batch=(1, 2), **_FORMATS),
    ]


def _images(base: Case, axis: str) -> list[Case]:
    sizes = [_levels(*size, _RPN_STRIDES[: len(base.levels)]) for size in ((400, 672), (800, 1344), (1200, 2016))]
    return _over(replace(base, axis=axis, name=axis + "_{image}"), levels=sizes)


#: Family -> its cases on any device, the most valuable first. A family's rows share one results file.
_CASES: dict[str, list[Case]] = {
    "top_down": [
        *_over(_MERGE, batch=(1, 2), **_DTYPES, **_BOTH),
        *_over(_TINY, **_OVERHEAD),
        *_over(replace(_TINY, op="upsample_add", name="tiny_2_maps", levels=TINY_2_MAPS), **_OVERHEAD),
        *_over(replace(_MERGE, name="resnet50_fpn_800x1333", levels=RESNET50_FPN_800X1333), **_BOTH),
    ],
    "multiscale_roi_align": [
        *(case for pooler in (_BOX, *_POOLERS) for case in _over(pooler, **_BOTH)),
        *_over(replace(_BOX, dtype="bfloat16"), **_BOTH),
        *_over(_CROWDED, **_BOTH),
        *_over(replace(_BOX, batch=2), **_BOTH),
    ],
    "frozen_batch_norm": [case for end in _BLOCK_ENDS for case in _over(end, **_BOTH)],
    "generate_proposals": _over(_PROPOSALS, batch=(1, 2, 8), pre_nms_top_n=(1000, 2000), **_FORMATS),
    "select_detections": _over(replace(_RETINANET, pre_nms_top_n=1000), batch=(1, 2)),
    "sigmoid_focal_loss": _over(
        replace(_RETINANET, op="sigmoid_focal_loss", direction="forward_backward"), batch=(1, 2)
    ),
    "batched_nms": _over(
        Case("batched_nms", "{boxes}_boxes_{classes}_groups", _IMAGE),
        boxes=(1_000, 5_000, 10_000, 30_000), classes=(1, 5, 80, 1203),
    ),
    "match_anchors": _over(_MATCH, boxes=(20, 300, 100, 7)),
    "paste_masks": [Case("paste_masks", "100_masks_800x1333", _UNPADDED_IMAGE, boxes=100, output_size=28)],
    "heatmaps_to_keypoints": _over(
        Case("heatmaps_to_keypoints", "{boxes}_people_800x1333", _UNPADDED_IMAGE, classes=17, output_size=56),
        boxes=(20, 100),
    ),
    "detectron2": _library("detectron2_fpn", "detectron2_pooler", "detectron2_proposals"),
    "mmdet": _library("mmdet_neck", "mmdet_extractor", "mmdet_proposals"),
    # Series in which one quantity grows and all else stays.
    "growth": [
        *_over(replace(_BOX, axis="rois", name="rois_{rois}", memory_format="channels_last"),
               rois=(100, 300, 1000, 3000)),
        *_over(replace(_MATCH, axis="gts", name="gts_{boxes}"), boxes=(5, 20, 80, 320)),
        *_over(replace(_MERGE, axis="batch", name="batch"), batch=(1, 2, 4)),
        *_over(replace(_PROPOSALS, axis="batch", name="batch"), batch=(1, 2, 4, 8)),
        *_images(_MERGE, "image"), *_images(_PROPOSALS, "image"), *_images(_MATCH, "anchors"),
    ],
}  # fmt: skip
#: Further cases on a GPU.
_ON_A_GPU: dict[str, list[Case]] = {
    "top_down": _over(replace(_MERGE, batch=8), **_DTYPES, **_BOTH),
    "multiscale_roi_align": [
        case
        for base in (*_POOLERS, _CROWDED, replace(_BOX, batch=2), replace(_BOX, batch=8))
        for case in _over(replace(base, dtype="bfloat16"), **_BOTH)
    ],
}


def _of_family(family: str) -> Callable[[str], list[Case]]:
    return lambda device_type: _CASES[family] + (_ON_A_GPU.get(family, []) if device_type == "cuda" else [])


#: Family -> its cases for a device type.
FAMILIES: dict[str, Callable[[str], list[Case]]] = {family: _of_family(family) for family in _CASES}


def in_turn(families: dict[str, list[Case]]) -> list[tuple[str, Case]]:
    """(family, case): the first case of every family, then the second of every family, and so on."""
    turns = itertools.zip_longest(*([(family, case) for case in cases] for family, cases in families.items()))
    return [each for turn in turns for each in turn if each is not None]


def tiny(case: Case) -> Case:
    """`case` with eight channels, maps of a few pixels and few boxes: for tests, not for measurements."""
    levels = tuple(((height + 15) // 16, (width + 15) // 16) for height, width in case.levels)
    if all(fine == (2 * coarse[0], 2 * coarse[1]) for fine, coarse in itertools.pairwise(case.levels)):
        # Maps that halve still do: detectron2 takes no others.
        (height, width), last = levels[-1], len(levels) - 1
        levels = tuple((height << (last - i), width << (last - i)) for i in range(len(levels)))
    most = {"channels": 8, "rois": 4, "classes": 3, "pre_nms_top_n": 20, "boxes": 20}
    return replace(case, levels=levels, **{name: min(getattr(case, name), limit) for name, limit in most.items()})


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
    **dict.fromkeys(("top_down", "upsample_add"), _merge_elements),
    **dict.fromkeys(("multiscale_roi_align", "detectron2_pooler", "mmdet_extractor"), _pooler_elements),
    # The block's map, what it is added to, and their sum; backward the sum's gradient, the sum, and two gradients.
    "frozen_batch_norm": lambda case: (4 if case.direction == "backward" else 3) * sum(_map_elements(case)),
    **dict.fromkeys(("generate_proposals", "detectron2_proposals", "mmdet_proposals"), _proposal_elements),
    **dict.fromkeys(("detectron2_fpn", "mmdet_neck"), _neck_elements),
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
}


def bytes_moved(case: Case) -> int:
    """The fewest bytes that `case` can move: each input read once, each output written once.

    The same for every provider, whatever it really moves, so that the share of the copy bandwidth compares them.
    """
    elements = _ELEMENTS_MOVED[case.op](case)
    if case.direction == "forward_backward":
        elements += _ELEMENTS_MOVED[case.op](replace(case, direction="backward"))
    return elements * ELEMENT_BYTES[case.dtype]
