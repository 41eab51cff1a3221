# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN's masks in their images: all detections in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import as_integer, as_pair, check_device, check_shape, check_tensor
from fpn_fast.ops._registration import call_kernel, records_gradient, register_op


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: int | tuple[int, int],
    *,
    padding: int = 1,
    threshold: float | None = None,
) -> Tensor:
    """Resize each mask to its box and paste it into an image of zeros.

    Args:
        masks: [K, 1, M, M], such as probabilities; float64, float32, float16 or bfloat16; M from 1 to 4096.
        boxes: [K, 4], (x1, y1, x2, y2) in image pixels, of the same dtypes; read in float32 (float64 for float64).
        image_size: (H, W) in pixels, or one number for both.
        padding: zero pixels added around a mask before it is resized; its box grows about its centre in proportion. 1
            by default.
        threshold: return whether values are above it instead of the values, in a quarter of float32's memory. None by
            default.

    Returns:
        [K, 1, H, W] in the masks' dtype, or bool with a threshold. The grown box's corners are truncated to integers,
        first and last pixel. The resize is bilinear without aligned corners, in float32 (float64 for float64), and
        rounded once, after the comparison with the threshold. It equals torchvision's paste_masks_in_image to rounding.
        Values are differentiable in the masks, by the reference; boxes have no gradient.

    Raises:
        TypeError: an argument is not a tensor or has an unsupported dtype.
        ValueError: shapes, devices or values do not fit.
        BackendUnavailableError: the requested backend cannot serve the masks' device.

    Note:
        The call does not synchronise with the host. The reference takes about four times the memory of the result. A
        box outside the image or inverted gives zeros. So does a box that is not finite or has a corner more than 2**29
        pixels away, where torchvision raises an error or allocates a huge tensor.

    Source: He et al., Mask R-CNN, 2017; torchvision/models/detection/roi_heads.py, paste_masks_in_image.
    """
    check_tensor(masks, "masks")
    check_tensor(boxes, "boxes")
    if masks.dim() != 4 or masks.size(1) != 1 or masks.size(2) != masks.size(3) or not 1 <= masks.size(3) <= 4096:
        raise ValueError(f"masks must be [K, 1, M, M], M of 1 to 4096, got {tuple(masks.shape)}")
    check_shape(boxes, "boxes", "[K, 4]", (masks.size(0), 4))
    check_device(boxes, "boxes", masks, "masks")
    height, width = as_pair("image_size", image_size)
    if not (0 <= height <= 2**29 and 0 <= width <= 2**29):
        raise ValueError(f"image_size must be (H, W), up to 2**29 pixels each, got {(height, width)}")
    padding = as_integer("padding", padding)
    if not 0 <= padding <= 4096:
        raise ValueError(f"padding must be 0 to 4096 mask pixels, got {padding}")
    coordinates = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    given, masks, boxes = masks, masks.detach().contiguous(), boxes.detach().to(coordinates).contiguous()
    op = _OP[backends.choose_for(masks, "paste_masks")]
    if threshold is None and records_gradient([given]):
        return reference.paste_masks(given, boxes, height, width, padding, None)
    arguments = (masks, boxes, height, width, padding, None if threshold is None else float(threshold))
    return call_kernel(op, *arguments)


def _fake(
    masks: Tensor, boxes: Tensor, height: int, width: int, padding: int, threshold: float | None = None
) -> Tensor:
    dtype = masks.dtype if threshold is None else torch.bool
    return masks.new_empty((masks.size(0), 1, height, width), dtype=dtype)


_OP = register_op("paste_masks", fake=_fake, reference=reference.paste_masks)
