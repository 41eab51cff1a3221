# SPDX-License-Identifier: Apache-2.0
"""Keypoint R-CNN's keypoints from its heatmaps: all boxes in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops._registration import call_kernel, register_op


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Resizes each heatmap to its box and finds its highest position, without ever holding the resized maps.

    Args:
        heatmaps: [R, K, h, w], K of each box, such as logits; float64, float32, float16 or bfloat16; h and w of 1 to
            4096.
        boxes: [R, 4], (x1, y1, x2, y2) in image pixels, of the same types; read in float32, or float64 where they are.

    Returns:
        keypoints [R, K, 3], (x, y, 1) in image pixels, and scores [R, K], the heatmap there; both float32.

        torchvision's heatmaps_to_keypoints: the map is resized to the box's size rounded up, at least one pixel,
        bicubically without aligned corners, in float32 (float64 for float64); the first of its highest positions in
        row-major order is the keypoint, and a NaN is higher than any number. Every backend finds the same, bit for
        bit. torchvision may find another position where two are equal to rounding; for half precision it rounds the
        resized map first.

        A side shorter than one pixel counts as one, also where the box is inverted. A box with a NaN or an infinity, or
        a side longer than 8192 pixels, gives keypoints (0, 0, 0) and scores 0.

    Raises:
        TypeError: something is not a tensor, or not of a type above.
        ValueError: shapes or devices do not fit.
        BackendUnavailableError: the backend asked for cannot serve the heatmaps' device.

    Nothing waits for a GPU but the reference, which asks for the boxes' sizes and takes some four times the memory of
    a box's resized maps. Not differentiable.

    Source: He et al., Mask R-CNN, 2017; torchvision/models/detection/roi_heads.py, heatmaps_to_keypoints.
    """
    for tensor, name in ((heatmaps, "heatmaps"), (boxes, "boxes")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if heatmaps.dim() != 4 or not (1 <= heatmaps.size(2) <= 4096 and 1 <= heatmaps.size(3) <= 4096):
        raise ValueError(f"heatmaps must be [R, K, h, w], h and w of 1 to 4096, got {tuple(heatmaps.shape)}")
    if boxes.dim() != 2 or boxes.size(1) != 4 or boxes.size(0) != heatmaps.size(0):
        raise ValueError(f"boxes must be [R, 4] with R of heatmaps, {heatmaps.size(0)}, got {tuple(boxes.shape)}")
    if boxes.device != heatmaps.device:
        raise ValueError(f"boxes must be on the heatmaps' device, {heatmaps.device}, got {boxes.device}")
    coordinates = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    heatmaps, boxes = heatmaps.detach().contiguous(), boxes.detach().to(coordinates).contiguous()
    op = _OP[backends.choose_for(heatmaps, "heatmaps_to_keypoints")]
    return call_kernel(op, heatmaps, boxes)


def _fake(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    count, keypoints = heatmaps.shape[:2]
    return (
        heatmaps.new_empty((count, keypoints, 3), dtype=torch.float32),
        heatmaps.new_empty((count, keypoints), dtype=torch.float32),
    )


def _reference(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    return reference.heatmaps_to_keypoints(heatmaps, boxes)


_OP = register_op("heatmaps_to_keypoints", fake=_fake, reference=_reference)
