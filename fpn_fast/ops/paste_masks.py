# SPDX-License-Identifier: Apache-2.0
"""Mask R-CNN's masks in their images: all detections in one call."""

from __future__ import annotations

import torch
from torch import Tensor

from fpn_fast import backends, reference
from fpn_fast.ops._checks import DTYPES
from fpn_fast.ops._registration import call_kernel, register_op


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    image_size: tuple[int, int],
    *,
    padding: int = 1,
    threshold: float | None = None,
) -> Tensor:
    """Resizes each mask to its box and puts it into an image of zeros.

    Args:
        masks: [K, 1, M, M], such as probabilities; float64, float32, float16 or bfloat16; M of 1 to 4096.
        boxes: [K, 4], (x1, y1, x2, y2) in image pixels, of the same types; read in float32, or float64 where they are.
        image_size: (H, W).
        padding: mask pixels of zeros put around a mask before it is resized; its box grows about its centre as much.
        threshold: instead of values, whether they are above this: a quarter of the memory of float32.

    Returns:
        [K, 1, H, W] of masks' type, or bool with a threshold. The grown box's corners are cut to integers, first and
        last pixel; the resize is bilinear, without aligned corners, in float32 (float64 for float64) and rounded once;
        the threshold is compared before that. torchvision's paste_masks_in_image to rounding.

        A box outside of the image or inverted gives zeros. So do, where torchvision raises or asks for a huge amount of
        memory, a NaN, an infinity, and a corner more than 2**29 pixels away.

    Raises:
        TypeError: something is not a tensor, or not of a type above.
        ValueError: shapes, devices or numbers do not fit.
        BackendUnavailableError: the backend asked for cannot serve the masks' device.

    Nothing waits for a GPU. The reference takes about four times the memory of the result. Not differentiable.

    Source: He et al., Mask R-CNN, 2017; torchvision/models/detection/roi_heads.py, paste_masks_in_image.
    """
    for tensor, name in ((masks, "masks"), (boxes, "boxes")):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float64, float32, float16 or bfloat16, got {tensor.dtype}")
    if masks.dim() != 4 or masks.size(1) != 1 or masks.size(2) != masks.size(3) or not 1 <= masks.size(3) <= 4096:
        raise ValueError(f"masks must be [K, 1, M, M], M of 1 to 4096, got {tuple(masks.shape)}")
    if boxes.dim() != 2 or boxes.size(1) != 4 or boxes.size(0) != masks.size(0):
        raise ValueError(f"boxes must be [K, 4] with K of masks, {masks.size(0)}, got {tuple(boxes.shape)}")
    if boxes.device != masks.device:
        raise ValueError(f"boxes must be on the masks' device, {masks.device}, got {boxes.device}")
    height, width = image_size
    if not (0 <= height <= 2**29 and 0 <= width <= 2**29):
        raise ValueError(f"image_size must be (H, W), up to 2**29 pixels each, got {tuple(image_size)}")
    if not 0 <= padding <= 4096:
        raise ValueError(f"padding must be 0 to 4096 mask pixels, got {padding}")
    coordinates = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    masks, boxes = masks.detach().contiguous(), boxes.detach().to(coordinates).contiguous()
    op = _OP[backends.choose_for(masks, "paste_masks")]
    arguments = (masks, boxes, height, width, int(padding), None if threshold is None else float(threshold))
    return call_kernel(op, *arguments)


def _fake(
    masks: Tensor, boxes: Tensor, height: int, width: int, padding: int, threshold: float | None = None
) -> Tensor:
    dtype = masks.dtype if threshold is None else torch.bool
    return masks.new_empty((masks.size(0), 1, height, width), dtype=dtype)


def _reference(
    masks: Tensor, boxes: Tensor, height: int, width: int, padding: int, threshold: float | None = None
) -> Tensor:
    return reference.paste_masks(masks, boxes, height, width, padding, threshold)


_OP = register_op("paste_masks", fake=_fake, reference=_reference)
