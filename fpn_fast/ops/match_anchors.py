# SPDX-License-Identifier: Apache-2.0
"""Matching of anchors to ground truths by IoU, without the matrix of all pairs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import as_integer, check_device, check_integers, check_tensor
from fpn_fast.ops._registration import call_kernel, register_op


@dataclass(frozen=True)
class AnchorGrid:
    """The anchors of a pyramid as a rule: boxes around every cell of every level, computed where they are needed.

    Anchors stand in the order (level, row, column, cell anchor). Anchor `a` of the cell in row y and column x is
    `cell_anchors[a]` moved by (x + offset) * stride to the right and (y + offset) * stride down.

    Args:
        cell_anchors: per level [A_l, 4] floats, (x1, y1, x2, y2) around a cell's origin.
        sizes: per level (H_l, W_l), its cells.
        strides: per level (down, right), whole pixels between cells.
        offset: of a cell's origin, in strides: 0 (default) in torchvision, 0.5 for centres.

    Raises:
        ValueError: the sequences differ in length; a level has no anchors, or one without four values.

    >>> grid = AnchorGrid(cell_anchors=[[(-4.0, -4.0, 4.0, 4.0)]], sizes=[(2, 3)], strides=[(8, 8)])
    >>> len(grid), grid.boxes()[-1].tolist()
    (6, [12.0, 4.0, 20.0, 12.0])
    """

    cell_anchors: Sequence[Sequence[Sequence[float]]]
    sizes: Sequence[tuple[int, int]]
    strides: Sequence[tuple[int, int]]
    offset: float = 0.0

    def __post_init__(self) -> None:
        counts = [len(each) for each in (self.cell_anchors, self.sizes, self.strides)]
        if len(set(counts)) != 1:
            raise ValueError(f"cell_anchors, sizes and strides must have one entry per level, got {counts} entries")
        for level, anchors in enumerate(self.cell_anchors):
            if not len(anchors) or any(len(anchor) != 4 for anchor in anchors):
                raise ValueError(f"cell_anchors must be [A, 4], (x1, y1, x2, y2), got {anchors} at level {level}")

    def __len__(self) -> int:
        _, cells, sizes, _, _ = self._numbers()
        return sum(count * height * width for count, height, width in zip(cells, sizes[::2], sizes[1::2], strict=True))

    def boxes(self, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
        """Return the anchors as a tensor [M, 4]."""
        return _boxes(*self._numbers(), dtype, device)

    def _numbers(self) -> tuple[list[float], list[int], list[int], list[int], float]:
        """Return the grid as the op takes it: flat lists and the offset."""
        return (
            [float(x) for anchors in self.cell_anchors for anchor in anchors for x in anchor],
            [len(anchors) for anchors in self.cell_anchors],
            [as_integer("sizes", size) for pair in self.sizes for size in pair],
            [as_integer("strides", stride) for pair in self.strides for stride in pair],
            float(self.offset),
        )


def match_anchors(
    gt_boxes: Tensor,
    gt_counts: Tensor | None,
    anchors: Tensor | AnchorGrid,
    *,
    high_threshold: float,
    low_threshold: float,
    allow_low_quality_matches: bool = True,
    anchor_counts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Match each anchor to the ground truth of highest IoU, the first of equals, or to a code for none.

    Args:
        gt_boxes: [N, G, 4], (x1, y1, x2, y2), the ground truths per image, padded to G; see :func:`pad_boxes`.
        gt_counts: [N] integers, how many of them are real. None: G.
        anchors: [M, 4], shared by all images; [N, M, 4]; or an :class:`AnchorGrid`, whose anchors are never stored.
        high_threshold: an IoU at or above it is a match.
        low_threshold: an IoU below it is background.
        allow_low_quality_matches: whether an anchor also keeps its match, however low its IoU, if no anchor has a
            higher IoU with some ground truth. True by default.
        anchor_counts: [N] integers, how many anchors of an image are real. None (default): M.

    Boxes are float64, float32, float16 or bfloat16. IoUs are computed in float32, or in float64 if any box is float64.

    Returns:
        (matches, ious): [N, M] int64, the index of a ground truth, -1 below the low threshold, -2 between the
        thresholds; and [N, M], the best IoU. For boxes of one dtype, float32 or float64, both equal torchvision's
        box_iou and Matcher bit for bit. There is no gradient.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes, devices or thresholds do not fit.
        BackendUnavailableError: the requested backend cannot serve the boxes' device.
        RuntimeError: an AnchorGrid has more than 8 levels or 64 cell anchors, for the compiled library on a GPU.

    Note:
        Memory grows with M and G, never with their product. The call does not synchronise with the host, except for the
        reference's upload of an AnchorGrid. Two runs are equal bit for bit, and so are all backends. An image without
        ground truths gives -1 and 0. If a ground truth is not finite, all finite anchors of its image match the first
        such, with an IoU of NaN, so that a loss shows it: as in torchvision, also where torchvision's IoU with an
        infinite one is 0. An anchor that is not finite takes no part. The IoU of two boxes without area is 0.

    Source: Ren et al., Faster R-CNN, 2015, 3.1.2; torchvision/models/detection/_utils.py, Matcher.
    """
    check_tensor(gt_boxes, "gt_boxes")
    if gt_boxes.dim() != 3 or gt_boxes.size(2) != 4:
        raise ValueError(f"gt_boxes must be [N, G, 4], (x1, y1, x2, y2), got {tuple(gt_boxes.shape)}")
    if not low_threshold <= high_threshold:
        raise ValueError(f"low_threshold must be at most high_threshold, {high_threshold}, got {low_threshold}")
    stored = None if isinstance(anchors, AnchorGrid) else anchors
    if stored is not None:
        _check_anchors(stored, gt_boxes)
    wide = torch.float64 in (gt_boxes.dtype, None if stored is None else stored.dtype)
    dtype = torch.float64 if wide else torch.float32
    gt_boxes = gt_boxes.detach().to(dtype).contiguous()
    if stored is not None:
        stored = stored.detach().to(dtype).contiguous()
    if gt_counts is None:
        gt_counts = torch.full(gt_boxes.shape[:1], gt_boxes.size(1), dtype=torch.int64, device=gt_boxes.device)
    images = (gt_boxes.size(0),)
    gt_counts = check_integers(gt_counts, "gt_counts", "[N]", images, gt_boxes, "gt_boxes")
    if anchor_counts is not None:
        anchor_counts = check_integers(anchor_counts, "anchor_counts", "[N]", images, gt_boxes, "gt_boxes")
    numbers = anchors._numbers() if isinstance(anchors, AnchorGrid) else ([], [], [], [], 0.0)
    thresholds = (float(high_threshold), float(low_threshold))
    arguments = (gt_boxes, gt_counts, stored, anchor_counts, *numbers, *thresholds, bool(allow_low_quality_matches))
    op = _OP[backends.choose_for(gt_boxes, "match_anchors")]
    return call_kernel(op, *arguments)


def pad_boxes(boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad the boxes [L_i, 4] of N images with zeros to one tensor, and count them.

    For torchvision's targets: ``pad_boxes([t["boxes"] for t in targets])``.

    Args:
        boxes: a sequence of N tensors, or one tensor [N, G, 4].

    Returns:
        ([N, G, 4] in a dtype that holds all boxes, [N] int64), G the largest L_i.

    Raises:
        ValueError: there are no images, boxes are not [L, 4], or devices differ.
    """
    if len(boxes) == 0:
        raise ValueError("boxes must have a tensor for each image, got an empty sequence")
    for i, each in enumerate(boxes):
        # torchvision allows an empty tensor of any shape for an image without boxes.
        if each.numel() and (each.dim() != 2 or each.size(1) != 4):
            raise ValueError(f"boxes must be [L, 4], (x1, y1, x2, y2), got {tuple(each.shape)} at {i}")
        check_device(each, f"the boxes at {i}", boxes[0], "those at 0")
    dtype = functools.reduce(torch.promote_types, (each.dtype for each in boxes))
    rows = [each.reshape(-1, 4).to(dtype) for each in boxes]
    counts = torch.stack([torch.full((), len(each), dtype=torch.int64, device=each.device) for each in rows])
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), counts


def _check_anchors(anchors: Tensor, gt_boxes: Tensor) -> None:
    if not isinstance(anchors, Tensor):
        raise TypeError(f"anchors must be a tensor or an AnchorGrid, got {type(anchors).__name__}")
    check_tensor(anchors, "anchors")
    batched = anchors.dim() == 3 and anchors.size(0) == gt_boxes.size(0)
    if (anchors.dim() != 2 and not batched) or anchors.size(-1) != 4:
        raise ValueError(
            f"anchors must be [M, 4] or [N, M, 4] with N of gt_boxes, {gt_boxes.size(0)}, got {tuple(anchors.shape)}"
        )
    check_device(anchors, "anchors", gt_boxes, "gt_boxes")


def _boxes(
    cell_anchors: list[float],
    cells: list[int],
    sizes: list[int],
    strides: list[int],
    offset: float,
    dtype: torch.dtype,
    device: torch.device | str | None,
) -> Tensor:
    table = torch.tensor(cell_anchors, dtype=dtype, device=device).reshape(-1, 4)
    grids = list(zip(cells, sizes[::2], sizes[1::2], strict=True))
    return reference.grid_anchors(table, grids, list(zip(strides[::2], strides[1::2], strict=True)), offset)


def _fake(
    gt_boxes: Tensor, gt_counts: Tensor, anchors: Tensor | None, anchor_counts: Tensor | None,
    cell_anchors: list[float], cells: list[int], sizes: list[int], *arguments: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if anchors is not None:
        count = anchors.size(-2)
    else:
        count = sum(a * height * width for a, height, width in zip(cells, sizes[::2], sizes[1::2], strict=True))
    shape = (gt_boxes.size(0), count)
    return gt_boxes.new_empty(shape, dtype=torch.int64), gt_boxes.new_empty(shape)


def _reference(
    gt_boxes: Tensor, gt_counts: Tensor, anchors: Tensor | None, anchor_counts: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    *grid, high, low, allow_low_quality_matches = arguments
    if anchors is None:
        anchors = _boxes(*(*grid, gt_boxes.dtype, gt_boxes.device))
    return reference.match_anchors(gt_boxes, gt_counts, anchors, anchor_counts, high, low, allow_low_quality_matches)


_OP = register_op("match_anchors", fake=_fake, reference=_reference)
