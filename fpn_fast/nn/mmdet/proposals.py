# SPDX-License-Identifier: Apache-2.0
"""mmdetection's anchors, box coder and proposals, computed from the maps of an RPN's head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fpn_fast import ops
from fpn_fast.nn._shared import proposals_of_images, sizes_beside
from fpn_fast.ops._checks import as_pair
from fpn_fast.ops.generate_proposals import MMDET
from fpn_fast.reference.generate_proposals import anchors_at

__all__ = ["AnchorGenerator", "DeltaXYWHBBoxCoder", "predict_proposals", "proposals_of_images"]

#: Keys of an RPN's test_cfg and of the nms in it. split_thr only chooses between equivalent paths in mmcv.
_CONFIG_KEYS = ("nms_pre", "max_per_img", "nms", "min_bbox_size")
_NMS_KEYS = ("type", "iou_threshold", "split_thr")


class AnchorGenerator:
    """The anchors of a pyramid: drop-in for mmdetection's AnchorGenerator, with its order and values.

    Args:
        strides: image pixels per map pixel, one per map: an integer or (width, height).
        ratios: height divided by width.
        scales: sides divided by the base size. Give either these or octave_base_scale and scales_per_octave.
        base_sizes: in pixels, one per map. Default: the shorter stride of each map.
        scale_major: whether scales vary fastest; otherwise ratios do. Default: True.
        octave_base_scale, scales_per_octave: make the scales octave_base_scale * 2 ** (i / scales_per_octave).
        centers: (x, y) of the first anchor's centre in pixels, one per map.
        center_offset: the same centre, divided by the base size, from 0 to 1. Default: 0.
        use_box_type: must be False, because anchors are tensors.

    Raises:
        ValueError: scales and octave_base_scale are both given or both missing; centers and center_offset are both
            given; center_offset is out of range; the number of base_sizes or centers differs from that of strides;
            use_box_type is True.

    Source: mmdet/models/task_modules/prior_generators/anchor_generator.py.

    >>> AnchorGenerator(strides=[16], ratios=[1.0], scales=[1.0], base_sizes=[9]).base_anchors
    [tensor([[-4.5000, -4.5000,  4.5000,  4.5000]])]
    """

    def __init__(
        self,
        strides: Sequence[int] | Sequence[tuple[int, int]],
        ratios: Sequence[float],
        scales: Sequence[float] | None = None,
        base_sizes: Sequence[float] | None = None,
        scale_major: bool = True,
        octave_base_scale: float | None = None,
        scales_per_octave: int | None = None,
        centers: Sequence[tuple[float, float]] | None = None,
        center_offset: float = 0.0,
        use_box_type: bool = False,
    ) -> None:
        if use_box_type:
            raise ValueError("use_box_type must be False: anchors are tensors")
        if not 0 <= center_offset <= 1:
            raise ValueError(f"center_offset must be 0 to 1 base sizes, got {center_offset}")
        if centers is not None and center_offset != 0:
            raise ValueError(f"centers go without a center_offset, got {center_offset}")
        octaves = octave_base_scale is not None and scales_per_octave is not None
        if octaves == (scales is not None):
            raise ValueError("scales, or octave_base_scale and scales_per_octave, must be given, and not both")
        self.strides = [as_pair("strides", stride) for stride in strides]
        self.base_sizes = [min(stride) for stride in self.strides] if base_sizes is None else list(base_sizes)
        for name, values in (("base_sizes", self.base_sizes), ("centers", centers)):
            if values is not None and len(values) != len(self.strides):
                raise ValueError(f"{name} must be one for each of the {len(self.strides)} strides, got {values}")
        if octave_base_scale is not None and scales_per_octave is not None:
            scales = [2 ** (i / scales_per_octave) * octave_base_scale for i in range(scales_per_octave)]
        self.scales, self.ratios = (torch.tensor(each, dtype=torch.float32, device="cpu") for each in (scales, ratios))
        self.octave_base_scale, self.scales_per_octave = octave_base_scale, scales_per_octave
        self.scale_major = scale_major
        self.centers = centers
        self.center_offset = center_offset
        self.base_anchors = [
            self._base_anchors(size, (center_offset * size, center_offset * size) if centers is None else centers[i])
            for i, size in enumerate(self.base_sizes)
        ]

    def _base_anchors(self, size: float, center: tuple[float, float]) -> Tensor:
        """[A, 4] float32 around `center`, computed in mmdetection's order of operations."""
        heights = torch.sqrt(self.ratios)
        sides = []
        for ratios in (1 / heights, heights):
            if self.scale_major:
                sides.append((size * ratios[:, None] * self.scales).flatten())
            else:
                sides.append((size * self.scales[:, None] * ratios).flatten())
        (x, y), (width, height) = center, sides
        return torch.stack([x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height], 1)

    @property
    def num_base_priors(self) -> list[int]:
        """Anchors per position, of each map."""
        return [len(table) for table in self.base_anchors]

    @property
    def num_levels(self) -> int:
        """The number of maps."""
        return len(self.strides)

    def grid_priors(
        self,
        featmap_sizes: Sequence[tuple[int, int]],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> list[Tensor]:
        """(height, width) per map -> per map [H_l * W_l * A, 4], (x1, y1, x2, y2), in the order (y, x, anchor)."""
        anchors = []
        for (height, width), table, stride in zip(featmap_sizes, self.base_anchors, self.strides, strict=True):
            index = torch.arange(height * width * len(table), device=device)
            anchors.append(anchors_at(index, table.to(device, dtype), width, stride[::-1], 0.0, dtype))
        return anchors


class DeltaXYWHBBoxCoder:
    """The settings of mmdetection's DeltaXYWHBBoxCoder, for :func:`predict_proposals`.

    Args:
        target_means, target_stds: delta * std + mean is decoded.
        clip_border: must be True: boxes are clipped to the image.
        add_ctr_clamp, ctr_clamp: limits the shift of a centre to ctr_clamp pixels along each axis (YOLOF).

    Raises:
        ValueError: clip_border is False.

    Source: mmdet/models/task_modules/coders/delta_xywh_bbox_coder.py.
    """

    def __init__(
        self,
        target_means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        target_stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        clip_border: bool = True,
        add_ctr_clamp: bool = False,
        ctr_clamp: float = 32,
    ) -> None:
        _check_clip_border(clip_border)
        self.means = target_means
        self.stds = target_stds
        self.clip_border = clip_border
        self.add_ctr_clamp = add_ctr_clamp
        self.ctr_clamp = ctr_clamp


def _check_clip_border(clip_border: bool) -> None:
    if not clip_border:
        raise ValueError("clip_border must be True: proposals are clipped to the image")


def predict_proposals(
    cls_scores: Sequence[Tensor],
    bbox_preds: Sequence[Tensor],
    prior_generator: Any,
    bbox_coder: Any,
    image_sizes: Sequence[Sequence[int]] | Tensor,
    cfg: Mapping[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """The proposals that mmdetection's RPNHead makes of its maps, by :func:`fpn_fast.ops.generate_proposals`.

    Candidates are ranked by logits, mmdetection's by scores, in which the highest logits are equal. Boxes and scores
    are float32 for half precision, where mmdetection decodes in the maps' type.

    Args:
        cls_scores, bbox_preds: the head's maps, logits [N, A, H_l, W_l] and deltas [N, 4A, H_l, W_l].
        prior_generator, bbox_coder: :class:`AnchorGenerator` and :class:`DeltaXYWHBBoxCoder`, or mmdetection's own.
        image_sizes: (height, width) per image in pixels, or a tensor [N, 2] on the maps' device.
        cfg: the RPN's configuration. ``nms_pre``: boxes kept per map and image before NMS, all for 0 or less (the
            default). ``max_per_img``: boxes kept per image after NMS. ``nms``: ``dict(type="nms", iou_threshold=...)``.
            ``min_bbox_size``: sides must be longer than this, in pixels.

    Returns:
        (boxes [N, P, 4], scores [N, P], counts [N]), with P = max_per_img. Scores descend; entries after an image's
        last proposal are zero. :func:`proposals_of_images` turns them into lists. The call does not synchronise.

    Raises:
        ValueError: cfg has an unknown or missing key, or another nms; the coder does not clip; others: the op's.
        TypeError: see the op.

    Source: mmdet/models/dense_heads/rpn_head.py.
    """
    _check_clip_border(bbox_coder.clip_border)
    nms = check_config(cfg)
    nms_pre, min_size = cfg.get("nms_pre", -1), cfg.get("min_bbox_size", -1)
    least = min_size if min_size >= 0 else -math.inf
    rule = dataclasses.replace(MMDET, min_size=least, means=bbox_coder.means, stds=bbox_coder.stds)
    if bbox_coder.add_ctr_clamp:
        rule = dataclasses.replace(rule, clamp="max", center_clamp=bbox_coder.ctr_clamp)
    return ops.generate_proposals(
        cls_scores,
        bbox_preds,
        prior_generator.base_anchors,
        [(height, width) for width, height in prior_generator.strides],
        sizes_beside(cls_scores, image_sizes),
        pre_nms_top_n=nms_pre if nms_pre > 0 else max(map[0].numel() for map in cls_scores),
        post_nms_top_n=cfg["max_per_img"],
        nms_thresh=nms["iou_threshold"],
        **vars(rule),
    )


def check_config(cfg: Mapping[str, Any]) -> Mapping[str, Any]:
    """The nms of an RPN's configuration. Raises ValueError if :func:`predict_proposals` does not support `cfg`."""
    for name, given, known, needed in (
        ("cfg", cfg, _CONFIG_KEYS, ("max_per_img", "nms")),
        ("cfg's nms", cfg.get("nms") or {}, _NMS_KEYS, ("iou_threshold",)),
    ):
        if unknown := [str(key) for key in given if key not in known]:
            raise ValueError(f"{name} has unknown keys {', '.join(unknown)}; it may have {', '.join(known)}")
        if missing := [key for key in needed if key not in given]:
            raise ValueError(f"{name} must have {', '.join(missing)}, got {dict(given)}")
    nms = cfg["nms"]
    if nms.get("type", "nms") != "nms":
        raise ValueError(f"cfg's nms must be of type 'nms', got {nms['type']!r}")
    return nms
