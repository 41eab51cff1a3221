# SPDX-License-Identifier: Apache-2.0
"""mmdetection's anchors, box coder and proposals, computed from the maps of an RPN's head."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
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
        self.use_box_type = use_box_type
        self.base_anchors = self.gen_base_anchors()

    def __repr__(self) -> str:
        names = (
            "strides", "ratios", "scales", "base_sizes", "scale_major", "octave_base_scale", "scales_per_octave",
            "num_levels", "centers", "center_offset",
        )  # fmt: skip
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)}' for name in names)})"

    def gen_base_anchors(self) -> list[Tensor]:
        """Per map the anchors [A, 4] of a position, float32."""
        centers = [None] * self.num_levels if self.centers is None else self.centers
        return [
            self.gen_single_level_base_anchors(size, self.scales, self.ratios, center)
            for size, center in zip(self.base_sizes, centers, strict=True)
        ]

    def gen_single_level_base_anchors(
        self, base_size: float, scales: Tensor, ratios: Tensor, center: tuple[float, float] | None = None
    ) -> Tensor:
        """[A, 4] of all pairs of `scales` and `ratios`, computed in mmdetection's order of operations.

        center: (x, y) in pixels. Default: center_offset of the base size.
        """
        x, y = (self.center_offset * base_size,) * 2 if center is None else center
        heights, sides = torch.sqrt(ratios), []
        for factors in (1 / heights, heights):
            if self.scale_major:
                sides.append((base_size * factors[:, None] * scales).flatten())
            else:
                sides.append((base_size * scales[:, None] * factors).flatten())
        width, height = sides
        return torch.stack([x - 0.5 * width, y - 0.5 * height, x + 0.5 * width, y + 0.5 * height], 1)

    @property
    def num_base_priors(self) -> list[int]:
        """Anchors per position, of each map."""
        return [len(table) for table in self.base_anchors]

    @property
    def num_base_anchors(self) -> list[int]:
        """Another name of num_base_priors."""
        return self.num_base_priors

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
        self._check_levels(featmap_sizes)
        return [self.single_level_grid_priors(size, i, dtype, device) for i, size in enumerate(featmap_sizes)]

    def single_level_grid_priors(
        self,
        featmap_size: tuple[int, int],
        level_idx: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """(height, width) of map `level_idx` -> its anchors, see :meth:`grid_priors`."""
        height, width = as_pair("featmap_size", featmap_size)
        index = torch.arange(height * width * self.num_base_priors[level_idx], device=device)
        return self.sparse_priors(index, (height, width), level_idx, dtype, device)

    def sparse_priors(
        self,
        prior_idxs: Tensor,
        featmap_size: tuple[int, int],
        level_idx: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """The anchors [K, 4] of map `level_idx` at `prior_idxs` [K], their places in :meth:`grid_priors`."""
        _, width = as_pair("featmap_size", featmap_size)
        table, stride = self.base_anchors[level_idx].to(device, dtype), self.strides[level_idx]
        return anchors_at(prior_idxs.to(device), table, width, stride[::-1], 0.0, dtype)

    def grid_anchors(
        self, featmap_sizes: Sequence[tuple[int, int]], device: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """:meth:`grid_priors` in float32; deprecated in mmdetection."""
        return self.grid_priors(featmap_sizes, device=device)

    def single_level_grid_anchors(
        self,
        base_anchors: Tensor,
        featmap_size: tuple[int, int],
        stride: tuple[int, int] = (16, 16),
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """Anchors [H * W * A, 4] of any `base_anchors` [A, 4] and stride (x, y); deprecated in mmdetection."""
        height, width = as_pair("featmap_size", featmap_size)
        index = torch.arange(height * width * len(base_anchors), device=device)
        return anchors_at(index, base_anchors.to(device), width, stride[::-1], 0.0, base_anchors.dtype)

    def valid_flags(
        self,
        featmap_sizes: Sequence[tuple[int, int]],
        pad_shape: Sequence[int],
        device: torch.device | str = "cpu",
    ) -> list[Tensor]:
        """Whether the place of an anchor is in the padded image.

        Args:
            featmap_sizes: (height, width) per map.
            pad_shape: (height, width) of the image in pixels; more numbers are ignored.

        Returns:
            Per map bools [H_l * W_l * A], in the order of :meth:`grid_priors`.
        """
        self._check_levels(featmap_sizes)
        flags = []
        for size, (x, y), anchors in zip(featmap_sizes, self.strides, self.num_base_priors, strict=True):
            places = math.ceil(pad_shape[0] / y), math.ceil(pad_shape[1] / x)
            valid = (min(places[0], size[0]), min(places[1], size[1]))
            flags.append(self.single_level_valid_flags(size, valid, anchors, device))
        return flags

    def single_level_valid_flags(
        self,
        featmap_size: tuple[int, int],
        valid_size: tuple[int, int],
        num_base_anchors: int,
        device: torch.device | str = "cpu",
    ) -> Tensor:
        """[H * W * A] bools: whether an anchor is in the first `valid_size` (rows, columns) of its map."""
        (height, width), (rows, columns) = as_pair("featmap_size", featmap_size), as_pair("valid_size", valid_size)
        if rows > height or columns > width:
            raise ValueError(f"valid_size must be at most featmap_size, {(height, width)}, got {(rows, columns)}")
        valid_rows = torch.arange(height, device=device)[:, None, None] < rows
        valid_columns = torch.arange(width, device=device)[:, None] < columns
        return (valid_rows & valid_columns).expand(-1, -1, num_base_anchors).flatten()

    def _check_levels(self, sizes: Sequence[Any]) -> None:
        if len(sizes) != self.num_levels:
            raise ValueError(f"featmap_sizes must be one for each of the {self.num_levels} maps, got {len(sizes)}")


class DeltaXYWHBBoxCoder:
    """(dx, dy, dw, dh) from boxes to others: drop-in for mmdetection's DeltaXYWHBBoxCoder, with its values.

    Args:
        target_means, target_stds: delta * std + mean is decoded.
        clip_border: whether decoded boxes are clipped to the image; for :func:`predict_proposals` they must be.
        add_ctr_clamp, ctr_clamp: limits the shift of a centre to ctr_clamp pixels along each axis (YOLOF).
        use_box_type: must be False, because boxes are tensors.

    Raises:
        ValueError: use_box_type is True.

    Source: mmdet/models/task_modules/coders/delta_xywh_bbox_coder.py.

    >>> coder = DeltaXYWHBBoxCoder()
    >>> deltas = coder.encode(torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([[1.0, 0, 5, 4]]))
    >>> deltas, coder.decode(torch.tensor([[0.0, 0, 4, 4]]), deltas, max_shape=(4, 4))
    (tensor([[0.2500, 0.0000, 0.0000, 0.0000]]), tensor([[1., 0., 4., 4.]]))
    """

    #: Values in the code of a box.
    encode_size = 4

    def __init__(
        self,
        target_means: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        target_stds: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        clip_border: bool = True,
        add_ctr_clamp: bool = False,
        ctr_clamp: float = 32,
        use_box_type: bool = False,
    ) -> None:
        if use_box_type:
            raise ValueError("use_box_type must be False: boxes are tensors")
        self.use_box_type = use_box_type
        self.means = target_means
        self.stds = target_stds
        self.clip_border = clip_border
        self.add_ctr_clamp = add_ctr_clamp
        self.ctr_clamp = ctr_clamp

    def encode(self, bboxes: Any, gt_bboxes: Any) -> Tensor:
        """The code [..., 4], float32, of boxes `gt_bboxes` [..., 4] relative to as many `bboxes`.

        Both are tensors, or hold them as ``tensor``, as mmdetection's boxes do.

        Raises:
            ValueError: the shapes differ, or are not [..., 4].
        """
        boxes, others = _tensor_of(bboxes), _tensor_of(gt_bboxes)
        if boxes.shape != others.shape or boxes.shape[-1:] != (4,):
            raise ValueError(f"boxes must be [..., 4], as many of both, got {boxes.shape} and {others.shape}")
        (centres, sides), (goals, goal_sides) = _centres_and_sides(boxes.float()), _centres_and_sides(others.float())
        deltas = torch.cat([(goals - centres) / sides, torch.log(goal_sides / sides)], -1)
        return (deltas - _beside(deltas, self.means)) / _beside(deltas, self.stds)

    def decode(
        self,
        bboxes: Any,
        pred_bboxes: Tensor,
        max_shape: Any = None,
        wh_ratio_clip: float = 16 / 1000,
    ) -> Tensor:
        """Boxes from their codes relative to `bboxes`.

        Args:
            bboxes: [N, 4] or [B, N, 4], (x1, y1, x2, y2): a tensor, or an object that holds it as ``tensor``.
            pred_bboxes: [N, 4 * classes] or [B, N, 4 * classes], the codes per class.
            max_shape: (height, width) of the image in pixels to clip to, or a pair per image [B, 2]; a third number is
                ignored. None (default) clips nothing.
            wh_ratio_clip: sides are at most 1 / wh_ratio_clip times those of `bboxes`, and at least wh_ratio_clip times
                unless the coder limits centres.

        Returns:
            Boxes of the shape of pred_bboxes.

        Raises:
            ValueError: there are not as many boxes as codes, or codes are not multiples of 4.
        """
        boxes = _tensor_of(bboxes)
        if pred_bboxes.shape[:-1] != boxes.shape[:-1] or boxes.size(-1) != 4 or pred_bboxes.size(-1) % 4:
            raise ValueError(
                f"pred_bboxes must be [..., 4 * classes] for bboxes [..., 4], got {tuple(pred_bboxes.shape)} and "
                f"{tuple(boxes.shape)}"
            )
        deltas = pred_bboxes.unflatten(-1, (pred_bboxes.size(-1) // 4, 4))
        deltas = deltas * _beside(deltas, self.stds) + _beside(deltas, self.means)
        centres, sides = _centres_and_sides(boxes.unsqueeze(-2))
        moves, growth, limit = sides * deltas[..., :2], deltas[..., 2:], abs(math.log(wh_ratio_clip))
        if self.add_ctr_clamp:
            moves, growth = moves.clamp(-self.ctr_clamp, self.ctr_clamp), growth.clamp(max=limit)
        else:
            growth = growth.clamp(-limit, limit)
        centres, reach = centres + moves, sides * growth.exp() * 0.5
        decoded = torch.cat([centres - reach, centres + reach], -1)
        if self.clip_border and max_shape is not None:
            decoded = _clipped(decoded, max_shape)
        return decoded.flatten(-2)


def _clipped(boxes: Tensor, max_shape: Any) -> Tensor:
    """Boxes [..., classes, 4] clipped to a (height, width), or [B, N, classes, 4] to one per image.

    A coordinate on an edge has the gradient that it has in mmdetection: of a clamp, or of a comparison in a batch.
    """
    if not isinstance(max_shape, Tensor) and not isinstance(max_shape[0], Iterable):
        edges = zip(max_shape[1::-1], (boxes[..., 0::2], boxes[..., 1::2]), strict=True)
        return torch.stack([coordinates.clamp(0, edge) for edge, coordinates in edges], -1).flatten(-2)
    sizes = max_shape if isinstance(max_shape, Tensor) else torch.tensor(max_shape, device="cpu")
    height, width = sizes.to(boxes.device, boxes.dtype, non_blocking=True)[..., :2].unbind(-1)
    sizes = torch.stack([width, height] * 2, -1)
    # [4], or [B, 1, 1, 4].
    sizes = sizes[:, None, None] if sizes.dim() > 1 else sizes
    boxes = torch.where(boxes < 0, 0, boxes)
    return torch.where(boxes > sizes, sizes, boxes)


def _tensor_of(boxes: Any) -> Tensor:
    return boxes if isinstance(boxes, Tensor) else boxes.tensor


def _centres_and_sides(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Boxes [..., 4] -> centres (x, y) and sides (width, height), [..., 2] each."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return (low + high) * 0.5, high - low


def _beside(deltas: Tensor, values: Sequence[float]) -> Tensor:
    """`values` in the dtype and on the device of `deltas`, without synchronising; see sizes_beside."""
    return torch.tensor(values, dtype=deltas.dtype, device="cpu").to(deltas.device, non_blocking=True)


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
