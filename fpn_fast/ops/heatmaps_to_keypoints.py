# SPDX-License-Identifier: Apache-2.0
"""Keypoint R-CNN's keypoints from its heatmaps: all boxes in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops import _differentiable
from fpn_fast.ops._checks import check_device, check_shape, check_tensor
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op


def heatmaps_to_keypoints(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Find the highest position of each heatmap resized to its box, without storing the resized maps.

    Args:
        heatmaps: [R, K, h, w], K per box, such as logits; float64, float32, float16 or bfloat16; h and w from 1 to
            4096.
        boxes: [R, 4], (x1, y1, x2, y2) in image pixels, of the same dtypes; read in float32 (float64 for float64).

    Returns:
        keypoints [R, K, 3], (x, y, 1) in image pixels, and scores [R, K], the heatmap's value there; both float32.
        Keypoints are differentiable in the boxes, with which they move, and scores in the heatmaps.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes or devices do not fit.
        BackendUnavailableError: the requested backend cannot serve the heatmaps' device.

    Note:
        Like in torchvision, the map is resized to the box's size rounded up, at least one pixel, bicubically without
        aligned corners, in float32 (float64 for float64). The first of its highest positions in row-major order is the
        keypoint; a NaN is higher than any number. All backends are equal bit for bit. torchvision may choose another
        position where two are equal to rounding; for half precision it rounds the resized map first.

        The call does not synchronise with the host, except by the reference, which reads the boxes' sizes and takes
        about four times the memory of a box's resized maps. A side shorter than one pixel, or inverted, counts as one
        pixel. A box that is not finite, or has a side longer than 8192 pixels, gives keypoints (0, 0, 0) and scores 0.

    Source: He et al., Mask R-CNN, 2017; torchvision/models/detection/roi_heads.py, heatmaps_to_keypoints.
    """
    check_tensor(heatmaps, "heatmaps")
    check_tensor(boxes, "boxes")
    if heatmaps.dim() != 4 or not (1 <= heatmaps.size(2) <= 4096 and 1 <= heatmaps.size(3) <= 4096):
        raise ValueError(f"heatmaps must be [R, K, h, w], h and w of 1 to 4096, got {tuple(heatmaps.shape)}")
    check_shape(boxes, "boxes", "[R, 4]", (heatmaps.size(0), 4))
    check_device(boxes, "boxes", heatmaps, "heatmaps")
    coordinates = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    given = heatmaps, boxes.to(coordinates)
    heatmaps, boxes = (each.detach().contiguous() for each in given)
    op = _OP[backends.choose_for(heatmaps, "heatmaps_to_keypoints")]
    found = call_kernel(op, heatmaps, boxes)
    return _differentiable.heatmaps_to_keypoints(*given, found[0]) if records_gradient(given) else found


def _fake(heatmaps: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    count, keypoints = heatmaps.shape[:2]
    return (
        heatmaps.new_empty((count, keypoints, 3), dtype=torch.float32),
        heatmaps.new_empty((count, keypoints), dtype=torch.float32),
    )


_OP = register_op("heatmaps_to_keypoints", fake=_fake, reference=reference.heatmaps_to_keypoints)
