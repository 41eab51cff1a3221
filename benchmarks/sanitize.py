# SPDX-License-Identifier: Apache-2.0
"""Calls each compiled kernel once on small odd maps, for compute-sanitizer: ``python -m benchmarks.sanitize``.

The sanitizer slows kernels a hundredfold, so this is no test suite: results are only held against gross error, which
shows that the kernels ran. An op without a kernel for the device is named.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fpn_fast import backends, ops, reference
from fpn_fast.bench import providers
from fpn_fast.bench.cases import FAMILIES, tiny

#: Ratios of two and others, a single pixel at the top, and channels that do and do not fill 16 bytes.
LEVELS = ((13, 19), (7, 9), (4, 5), (1, 1))
CHANNELS = (3, 16)


def _gradients(merged: Sequence[Tensor], laterals: Sequence[Tensor]) -> list[Tensor]:
    return [*merged, *torch.autograd.grad(list(merged), laterals, [torch.ones_like(m) for m in merged])]


def _compare(label: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for result, right in zip(actual, expected, strict=True):
        if not torch.allclose(result.float().cpu(), right.float(), rtol=0.05, atol=0.05):
            raise AssertionError(f"{label}: wrong result")


def top_down(device: torch.device) -> int:
    """Forward and backward for both memory formats and modes; returns the number of calls."""
    calls = 0
    for dtype, memory_format, mode, channels in itertools.product(
        (torch.float32, torch.bfloat16),
        (torch.contiguous_format, torch.channels_last),
        ("nearest", "bilinear"),
        CHANNELS,
    ):
        laterals = [
            torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=memory_format) for size in LEVELS
        ]
        here = [lateral.clone().requires_grad_() for lateral in laterals]
        there = [lateral.to(device).requires_grad_() for lateral in laterals]
        expected = _gradients(reference.top_down(here, mode), here)
        actual = _gradients(ops.top_down(there, mode), there)
        _compare(f"top_down {mode} {dtype} {memory_format} C={channels}", actual, expected)
        calls += 1
    return calls


#: Of both images, on every level, off the map, and without level.
ROIS = (
    (0.0, 3.3, 5.1, 30.7, 41.9),
    (1.0, 0.0, 0.0, 76.0, 52.0),
    (1.0, 60.2, 10.4, 61.3, 33.8),
    (0.0, -9.5, -8.5, 12.25, 9.75),
    (1.0, 500.0, 500.0, 600.0, 600.0),
    (0.0, float("nan"), 5.0, 30.0, 40.0),
    (7.0, 3.0, 5.0, 30.0, 40.0),
)


def multiscale_roi_align(device: torch.device) -> int:
    """Forward and backward for both memory formats and grids; returns the number of calls."""
    calls = 0
    rois = torch.tensor(ROIS * 4)
    scales = [2.0 ** -(2 + level) for level in range(len(LEVELS))]
    for dtype, memory_format, (size, ratio), channels in itertools.product(
        (torch.float32, torch.bfloat16),
        (torch.contiguous_format, torch.channels_last),
        ((7, 2), ((3, 5), 0), (14, 2)),
        CHANNELS,
    ):
        features = [
            torch.randn(2, channels, *size).to(dtype).contiguous(memory_format=memory_format) for size in LEVELS
        ]
        results = []
        for where, backend in ((torch.device("cpu"), "reference"), (device, "cpp")):
            maps = [feature.to(where).requires_grad_() for feature in features]
            with backends.use(backend):
                pooled = ops.multiscale_roi_align(
                    maps, rois.to(where), size, scales, sampling_ratio=ratio, canonical_scale=48
                )
            results.append(_gradients([pooled], maps))
        label = f"multiscale_roi_align {size} {ratio} {dtype} {memory_format} C={channels}"
        # RoIs add up at a pixel: gradients are compared as shares of the largest.
        scaled = [[each / max(1.0, right.abs().max().item()) for each, right in zip(r, results[0], strict=True)]
                  for r in results]  # fmt: skip
        _compare(label, scaled[1], scaled[0])
        calls += 1
    return calls


def match_anchors(device: torch.device) -> int:
    """Anchors made and loaded, with and without low-quality matches; returns the number of calls."""
    cells = [[(-12.0, -8.0, 12.0, 8.0), (-8.0, -12.0, 8.0, 12.0)]] * len(LEVELS)
    grid = ops.AnchorGrid(cells, LEVELS, [(4 * 2**i, 4 * 2**i) for i in range(len(LEVELS))])
    # More than a block of threads loads at once.
    low = torch.rand(2, 300, 2) * 60
    gts, counts = torch.cat((low, low + 4 + torch.rand(2, 300, 2) * 40), 2).round(), torch.tensor([300, 5])
    calls = 0
    for low_quality, stored in itertools.product((True, False), repeat=2):
        results = []
        for where, backend in ((torch.device("cpu"), "reference"), (device, "cpp")):
            anchors = grid.boxes(device=where).expand(2, -1, -1) if stored else grid
            with backends.use(backend):
                results.append(
                    ops.match_anchors(
                        gts.to(where),
                        counts.to(where),
                        anchors,
                        high_threshold=0.5,
                        low_threshold=0.3,
                        allow_low_quality_matches=low_quality,
                    )
                )
        _compare(f"match_anchors low_quality={low_quality} stored={stored}", results[1], results[0])
        calls += 1
    return calls


def paste_masks(device: torch.device) -> int:
    """Values and bool, boxes inside, across an edge and outside; returns the number of calls."""
    boxes = torch.tensor(ROIS)[:, 1:]
    calls = 0
    for dtype, threshold in itertools.product((torch.float32, torch.bfloat16), (None, 0.5)):
        masks = torch.rand(len(boxes), 1, 28, 28).to(dtype)
        expected = reference.paste_masks(masks, boxes, 45, 67, 1, threshold)
        pasted = ops.paste_masks(masks.to(device), boxes.to(device), (45, 67), threshold=threshold)
        if threshold is None:
            _compare(f"paste_masks {dtype}", [pasted], [expected])
        # A value next to the threshold may fall on either side.
        elif (pasted.cpu() != expected).float().mean() > 0.001:
            raise AssertionError(f"paste_masks {dtype} above {threshold}: wrong result")
        calls += 1
    return calls


def heatmaps_to_keypoints(device: torch.device) -> int:
    """Larger and smaller boxes than the maps, and ones of no pixels; returns the number of calls."""
    boxes = torch.tensor(ROIS)[:, 1:]
    for dtype in (torch.float32, torch.bfloat16):
        heatmaps = torch.randn(len(boxes), 3, 9, 7).to(dtype)
        expected = reference.heatmaps_to_keypoints(heatmaps, boxes)
        _compare(
            f"heatmaps_to_keypoints {dtype}", ops.heatmaps_to_keypoints(heatmaps.to(device), boxes.to(device)), expected
        )
    return 2


def sigmoid_focal_loss(device: torch.device) -> int:
    """Tiles and a part of one, with and without a gradient; returns the number of calls."""
    labels, weights = torch.randint(-1, 91, (101,)), torch.rand(101)
    for dtype, with_gradient in itertools.product((torch.float32, torch.bfloat16), (True, False)):
        logits = torch.randn(101, 91).to(dtype)
        losses, slopes = reference.sigmoid_focal_loss(logits, labels, weights, 0.25)
        leaf = logits.to(device).requires_grad_(with_gradient)
        loss = ops.sigmoid_focal_loss(leaf, labels.to(device), weights.to(device))
        _compare(f"sigmoid_focal_loss {dtype}", [loss.detach()], [losses.sum()])
        if with_gradient:
            _compare(f"sigmoid_focal_loss {dtype}", [torch.autograd.grad(loss, leaf)[0]], [slopes.to(dtype)])
    return 4


def _selection(device: torch.device, family: str, *cases: dict[str, int]) -> int:
    """The family's tiny case with each of `cases`; returns the number of calls."""
    for changes in cases:
        case = replace(tiny(FAMILIES[family]("cpu")[0]), **changes)
        op = providers.op_of(case)
        here = op.inputs(case, torch.device("cpu"))
        expected = providers.expectation(case, here, [])
        result = op.fused([each.to(device) for each in here])
        problem = expected.problem([each.cpu() for each in expected.tensors_of(result)])
        if problem is not None:
            raise AssertionError(f"{case} {changes}: {problem}")
    return len(cases)


def generate_proposals(device: torch.device) -> int:
    """Some candidates of a level in a batch, and all of one image."""
    cases = ({"pre_nms_top_n": 20, "batch": 2}, {"pre_nms_top_n": 900})
    return _selection(device, "generate_proposals", *cases)


def _centered(device: torch.device) -> int:
    """Scores with centerness, in both memory formats; returns the number of calls."""
    strides = [(4 * 2**level, 4 * 2**level) for level in range(len(LEVELS))]
    cells = [[(-2.0 * stride, -2.0 * stride, 2.0 * stride, 2.0 * stride)] for stride, _ in strides]
    calls = 0
    for memory_format in (torch.contiguous_format, torch.channels_last):
        maps = [
            [torch.randn(2, channels, *size).abs().contiguous(memory_format=memory_format) for size in LEVELS]
            for channels in (7, 4, 1)
        ]
        results = []
        for where, backend in ((torch.device("cpu"), "reference"), (device, "cpp")):
            logits, deltas, centerness = ([each.to(where) for each in level] for level in maps)
            with backends.use(backend):
                results.append(
                    ops.select_detections(
                        logits,
                        deltas,
                        cells,
                        strides,
                        torch.tensor([[52, 76], [50, 70]]).to(where),
                        score_thresh=0.5,
                        pre_nms_top_n=50,
                        nms_thresh=0.5,
                        max_detections=30,
                        centerness=centerness,
                        coder="distances",
                    )
                )
        _compare(f"select_detections with centerness {memory_format}", results[1], results[0])
        calls += 1
    return calls


def select_detections(device: torch.device) -> int:
    """Few classes and many, in a batch; and scores with centerness."""
    cases = ({"classes": classes, "batch": 2} for classes in (3, 91))
    return _selection(device, "select_detections", *cases) + _centered(device)


def select_box_detections(device: torch.device) -> int:
    """Deltas of boxes and of classes, and a class's best alone; returns the number of calls."""
    corners = torch.rand(2, 300, 2) * 60
    boxes = torch.cat((corners, corners + 8 + torch.rand(2, 300, 2) * 40), 2)
    calls = 0
    for classes, shared, class_top_n in ((2, False, None), (40, True, 20)):
        tables = [torch.randn(2, 300, classes) * 4, torch.randn(2, 300, 4 if shared else 4 * classes), boxes]
        tables += [torch.tensor([300, 170]), torch.tensor([[100.0, 100.0], [90.0, 110.0]])]
        results = []
        for where, backend in ((torch.device("cpu"), "reference"), (device, "cpp")):
            with backends.use(backend):
                results.append(
                    ops.select_box_detections(
                        *(each.to(where) for each in tables),
                        score_thresh=0.05,
                        nms_thresh=0.5,
                        max_detections=100,
                        class_top_n=class_top_n,
                    )
                )
        _compare(f"select_box_detections classes={classes}", results[1], results[0])
        calls += 1
    return calls


def segmented_nms(device: torch.device) -> int:
    """One group and many, of boxes that fill no block and several, and a group that many blocks share."""
    cases = ({"boxes": boxes, "classes": classes} for boxes, classes in ((7, 1), (500, 5), (900, 80), (1500, 1)))
    return _selection(device, "batched_nms", *cases)


#: By the op whose kernels are called.
CALLS: dict[str, Callable[[torch.device], int]] = {
    "top_down": top_down,
    "multiscale_roi_align": multiscale_roi_align,
    "generate_proposals": generate_proposals,
    "select_detections": select_detections,
    "select_box_detections": select_box_detections,
    "segmented_nms": segmented_nms,
    "match_anchors": match_anchors,
    "paste_masks": paste_masks,
    "sigmoid_focal_loss": sigmoid_focal_loss,
    "heatmaps_to_keypoints": heatmaps_to_keypoints,
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    with backends.use("cpp"):
        for name, call in CALLS.items():
            done = f"{call(device)} calls" if backends.problem("cpp", device.type, name) is None else "no kernel"
            print(f"{name}: {done} on {device}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
