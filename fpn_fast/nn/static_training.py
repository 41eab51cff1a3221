# SPDX-License-Identifier: Apache-2.0
"""Training of a whole detector on fixed shapes. Needs torchvision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import fcos as _fcos
from torchvision.models.detection import generalized_rcnn
from torchvision.models.detection import retinanet as _retinanet
from torchvision.models.detection import roi_heads as _roi_heads
from torchvision.models.detection import rpn as _rpn
from torchvision.models.detection import ssd as _ssd
from torchvision.models.detection import transform as _transform
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler, SSDMatcher
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fpn_fast import _torch_private, backends, ops
from fpn_fast.nn import _matching
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn.dense_detectors import FCOS, LINEAR_CODER, SSD, RetinaNet
from fpn_fast.nn.region_proposal import (
    ANCHORS,
    BOX_CODER,
    LOSSES,
    PROPOSALS,
    AnchorGenerator,
    RegionProposalNetwork,
    anchor_grid,
    anchor_tables,
    anchors_at,
)
from fpn_fast.nn.roi_heads import GeneralizedRCNNTransform, RoIHeads
from fpn_fast.nn.static_detector import DEFAULT_BOXES, anchor_generator, default_boxes, meta_maps
from fpn_fast.nn.static_losses import fcos_losses, retinanet_losses, ssd_losses
from fpn_fast.nn.static_sampling import (
    ROI_TRAINING,
    FixedSizeSampler,
    StaticRegionProposalNetwork,
    StaticRoIHeads,
    proposal_losses,
)
from fpn_fast.nn.static_targets import StaticTargets, pack_targets
from fpn_fast.nn.training_step import TrainingStep, check_optimizer
from fpn_fast.ops._checks import as_integer, as_sizes

__all__ = ["StaticTraining"]

Size = tuple[int, int]

_SAMPLER = Part(BalancedPositiveNegativeSampler, fused=FixedSizeSampler)
_TRANSFORM = Steps(
    _transform.GeneralizedRCNNTransform, "forward", "normalize", "batch_images", fused=GeneralizedRCNNTransform
)
_MODEL = Steps(generalized_rcnn.GeneralizedRCNN, "forward", "eager_outputs")
_DENSE = {
    RetinaNet: Steps(_retinanet.RetinaNet, "compute_loss", "eager_outputs", replaced="forward", fused=RetinaNet),
    FCOS: Steps(_fcos.FCOS, "compute_loss", "eager_outputs", replaced="forward", fused=FCOS),
    SSD: Steps(_ssd.SSD, "compute_loss", "eager_outputs", replaced="forward", fused=SSD),
}
_RETINANET_HEAD = Steps(_retinanet.RetinaNetHead, "compute_loss")
_CLASSIFICATION = Steps(_retinanet.RetinaNetClassificationHead, "compute_loss")
_REGRESSION = Steps(_retinanet.RetinaNetRegressionHead, "compute_loss")
_FCOS_HEAD = Steps(_fcos.FCOSHead, "compute_loss")
_SSD_MATCHER = Part(SSDMatcher, calls=(box_iou,))
# Of ours and those that static sampling makes of them.
_RPN_KINDS = (RegionProposalNetwork, StaticRegionProposalNetwork)
_HEADS_KINDS = (RoIHeads, StaticRoIHeads)
_RPN = Steps(_rpn.RegionProposalNetwork, "forward", fused=_RPN_KINDS)
_HEADS = Steps(_roi_heads.RoIHeads, "forward", fused=_HEADS_KINDS)


class StaticTraining(nn.Module):
    """The training step's losses of a whole detector, on fixed shapes and without host synchronisation.

    You can compile it as one graph (:meth:`compile`), or capture it with the backward pass and the optimiser in a CUDA
    graph (:meth:`capture`).

    Args:
        model: a Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS or SSD of torchvision after
            :func:`fpn_fast.accelerate`. It is shared, not copied.
        canvas: (height, width) in pixels of the padded batches that the backbone gets, one number for both, or a list
            of several pairs.
        batch_size: images per batch.
        max_targets: G, the most ground truths of an image.
        too_many: what :attr:`pack` does with an image that has more; see :func:`fpn_fast.nn.pack_targets`.

    Raises:
        TypeError: the model is of another class, or one of its parts is not accelerated or is not torchvision's own.
        ValueError: a number is not positive; a side of a canvas is no multiple of the transform's ``size_divisible``.

    Note:
        Losses have torchvision's distribution; the random numbers that sample anchors and proposals are others. Where
        nothing is sampled, losses equal torchvision's on a batch padded to the same canvas, up to rounding. Anchors
        are float32 also under autocast; torchvision rounds them to the maps' dtype.

    >>> import torch, torchvision, fpn_fast
    >>> build = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    >>> model = build(weights=None, weights_backbone=None, min_size=64).train()
    >>> report = fpn_fast.accelerate(model)
    >>> training = fpn_fast.StaticTraining(model, canvas=(64, 96), batch_size=2, max_targets=10)
    >>> target = {"boxes": torch.tensor([[4.0, 4, 40, 50]]), "labels": torch.tensor([1])}
    >>> batch = training.pack([torch.rand(3, 60, 80), torch.rand(3, 64, 64)], [target, target])
    >>> sorted(training(*batch))
    ['loss_box_reg', 'loss_classifier', 'loss_objectness', 'loss_rpn_box_reg']
    """

    model: Any
    #: (height, width) of the batches that it takes, in pixels, smallest first.
    canvases: list[Size]
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: nn.Module,
        canvas: int | Size | Sequence[Size],
        batch_size: int,
        *,
        max_targets: int = 100,
        too_many: str = "raise",
    ) -> None:
        super().__init__()
        check_training_model(model)
        self.model = model
        self.batch_size = as_integer("batch_size", batch_size)
        self.max_targets = as_integer("max_targets", max_targets)
        canvases = as_sizes("canvas", canvas)
        if min(self.batch_size, self.max_targets, *(side for size in canvases for side in size)) < 1:
            raise ValueError(
                "canvas, batch_size and max_targets must be positive, got "
                f"{canvases}, {self.batch_size} and {self.max_targets}"
            )
        divisor = self.model.transform.size_divisible
        if any(side % divisor for size in canvases for side in size):
            raise ValueError(f"canvas must have sides that are multiples of {divisor}, got {canvases}")
        self.pack = Packing(self.model.transform, tuple(canvases), self.max_targets, too_many)
        self._compiled: Callable[..., dict[str, Tensor]] | None = None
        # Constants go to the device now: a CUDA graph cannot capture a copy from the host.
        moments = {"mean": self.model.transform.image_mean, "std": self.model.transform.image_std}
        for name, values in moments.items():
            # Rounded to the images' dtype at each call, as torchvision's are.
            constant = torch.tensor(values, dtype=torch.float64, device="cpu")[:, None, None]
            self.register_buffer(f"_{name}", constant, persistent=False)
        self._grids: dict[Size, ops.AnchorGrid] = {}
        self.canvases = canvases
        for i, size in enumerate(canvases):
            maps = meta_maps(self.model, size)
            _choose_scales(self.model, maps, size)
            whole = torch.tensor([size] * self.batch_size, device="cpu")
            self.register_buffer(f"_sizes_{i}", whole, persistent=False)
            if isinstance(model, SSD):
                anchors = default_boxes(model, size)
            else:
                self._grids[size] = anchor_grid(
                    anchor_generator(model), size, [each.shape[2:] for each in maps.values()]
                )
                anchors = anchor_tables(self._grids[size])
            self.register_buffer(f"_anchors_{i}", anchors, persistent=False)
        self.to(next(model.parameters()).device)

    def forward(self, images: Tensor, targets: StaticTargets, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """torchvision's losses of a batch, by name.

        Args:
            images: [batch_size, C, H, W] with values in 0 to 1, resized, in the model's dtype; (H, W) is one of
                `canvases`. What lies outside an image's size does not count.
            targets: the ground truths, in pixels of the canvas; G is `max_targets`.
            sizes: [batch_size, 2] int64, (height, width) of the image in the top left corner of each, in pixels.
                Default: (H, W).

        Raises:
            ValueError: a shape, dtype or device differs from the model's; the model is in evaluation mode; masks or
                keypoints are missing.
        """
        size = self.check_batch(images, targets, sizes)
        sizes = self.whole_sizes(size) if sizes is None else sizes
        losses = self._step if self._compiled is None else self._compiled
        # Tensors alone, so that a compiler guards nothing else.
        return losses(images, sizes, targets.boxes, targets.labels, targets.counts, targets.masks, targets.keypoints)

    def compile(self, **options: Any) -> StaticTraining:  # type: ignore[override]
        """Compiles the losses as one graph, and with it one of their gradients. Returns self.

        Args:
            options: those of :func:`torch.compile`, such as ``mode``.

        The first call of each canvas compiles, later calls never do. Moving the model or changing its dtype drops the
        compiled graphs.
        """
        self._compiled = torch.compile(self._step, fullgraph=True, dynamic=False, **options)
        return self

    def step(self, optimizer: torch.optim.Optimizer, **options: Any) -> TrainingStep:
        """A whole training step as one call, on any device.

        Args:
            optimizer: of the model's parameters.
            max_gradient_norm: larger gradients are scaled down to this norm. Default: they are not.
            autocast: dtype of mixed precision, such as ``torch.bfloat16``. Default: none but what surrounds the call.
            scaler: a GradScaler for float16.
            accumulate: batches for each step of the optimiser; their gradients are averaged. Default: 1.
            average: a copy of the model, which becomes the exponential moving average of its weights and statistics.
            decay: of that average, a number or a tensor of one element. Default: 0.999.

        Returns:
            A :class:`TrainingStep`, to be called with the arguments of :meth:`forward`.
        """
        return TrainingStep(self, optimizer, **options)

    def capture(self, optimizer: torch.optim.Optimizer, **options: Any) -> TrainingStep:
        """:meth:`step`, captured in one CUDA graph a canvas, which each call replays.

        A call copies its batch into the graph's own tensors, also from pinned memory of the host. Weights, statistics,
        the optimiser's state and random numbers are as before the capture. Learning rates become tensors on the GPU, so
        that a schedule needs no new capture; you may still set them as numbers. Capture again after you load a
        checkpoint or move the model.

        Args:
            optimizer: SGD with ``fused=True``, or one with ``capturable=True``; with a `scaler` also ``fused=True``.
            options: see :meth:`step`.

        Raises:
            ValueError: the optimiser cannot be captured; the message says what it needs. Autocast surrounds the call.
            RuntimeError: the model is not on a GPU.
        """
        scaler = options.get("scaler")
        check_optimizer(optimizer, scaled=scaler is not None and scaler.is_enabled())
        return TrainingStep(self, optimizer, **options).capture()

    def __getstate__(self) -> dict[str, Any]:
        """For copies: a compiled function is of this object alone."""
        return {**super().__getstate__(), "_compiled": None}

    def _apply(self, *arguments: Any, **options: Any) -> StaticTraining:
        """Runs whenever the module moves."""
        self._compiled = None
        constants = dict(self.named_buffers(recurse=False))
        super()._apply(*arguments, **options)
        # Constants keep their dtype, whatever the model's is.
        self._buffers.update({name: each.to(self._mean.device) for name, each in constants.items()})
        return self

    def _step(
        self,
        images: Tensor,
        sizes: Tensor,
        boxes: Tensor,
        labels: Tensor,
        counts: Tensor,
        masks: Tensor | None,
        keypoints: Tensor | None,
    ) -> dict[str, Tensor]:
        size = (images.shape[2], images.shape[3])
        model, targets = self.model, StaticTargets(boxes, labels, counts, masks, keypoints)
        batch = ImageList(self._transform(images, sizes), sizes)
        features = model.backbone(batch.tensors)
        features = {"0": features} if isinstance(features, Tensor) else features
        if isinstance(model, FasterRCNN):
            return self._two_stages(batch, features, targets, size)
        return self._one_stage(features, targets, size)

    def _transform(self, images: Tensor, sizes: Tensor) -> Tensor:
        """torchvision's normalisation, and zeros around each image."""
        images = (images - self._mean.to(images.dtype)) / self._std.to(images.dtype)
        height, width = images.shape[2:]
        rows = torch.arange(height, device=images.device)[:, None] < sizes[:, 0, None, None]
        columns = torch.arange(width, device=images.device) < sizes[:, 1, None, None]
        return images.where((rows & columns)[:, None], 0)

    def _two_stages(
        self, batch: ImageList, features: dict[str, Tensor], targets: StaticTargets, size: Size
    ) -> dict[str, Tensor]:
        rpn, heads, grid = self.model.rpn, self.model.roi_heads, self._grids[size]
        objectness, deltas = rpn.head_maps(features)
        proposals, _, _ = rpn.proposals_of_head(batch, objectness, deltas)
        gt_boxes = targets.boxes.to(proposals.dtype)

        def anchors(places: Tensor) -> Tensor:
            return anchors_at(self._constant("anchors", size), len(grid.sizes), places, gt_boxes.dtype)

        matches = _matching.matches_by_op(rpn.proposal_matcher, gt_boxes, targets.counts, grid)
        losses = proposal_losses(rpn, _sampler(rpn), objectness, deltas, matches, gt_boxes, anchors)
        boxes = torch.cat([proposals, gt_boxes], 1)
        matches = _matching.matches_by_op(heads.proposal_matcher, gt_boxes, targets.counts, boxes)
        owners = matches.clamp(min=0)
        labels = torch.where(matches >= 0, targets.labels.gather(1, owners), matches + 1)
        sampled = (boxes, owners, labels, gt_boxes, targets.masks, targets.keypoints)
        shapes = [size] * self.batch_size
        return {**StaticRoIHeads.train_on_sample(heads, _sampler(heads), features, shapes, *sampled), **losses}

    def _one_stage(self, features: dict[str, Tensor], targets: StaticTargets, size: Size) -> dict[str, Tensor]:
        model, outputs = self.model, self.model.head(list(features.values()))
        anchors = self._constant("anchors", size)
        if isinstance(model, SSD):
            return ssd_losses(outputs, anchors, targets, model)
        grid, dtype = self._grids[size], torch.promote_types(outputs["cls_logits"].dtype, torch.float32)
        anchors = anchors_at(anchors, len(grid.sizes), torch.arange(len(grid), device=anchors.device), dtype)
        if isinstance(model, RetinaNet):
            return retinanet_losses(outputs, anchors, targets, model)
        counts = [len(cells) * h * w for cells, (h, w) in zip(grid.cell_anchors, grid.sizes, strict=True)]
        return fcos_losses(outputs, anchors, targets, model, counts)

    def _constant(self, name: str, size: Size) -> Tensor:
        found: Tensor = getattr(self, f"_{name}_{self.canvases.index(size)}")
        return found

    def check_batch(
        self, images: Tensor, targets: StaticTargets, sizes: Tensor | None, *, anywhere: bool = False
    ) -> Size:
        """The canvas of a batch. Raises what :meth:`forward` does; with `anywhere`, tensors may be on any device."""
        if backends.jit_traced():
            raise RuntimeError("torch.jit.trace cannot record a StaticTraining; compile() it")
        if not self.model.training:
            raise ValueError("the model must be in training mode, call .train()")
        if not isinstance(targets, StaticTargets):
            raise TypeError(f"targets must be StaticTargets, as of pack_targets, got {type(targets).__name__}")
        shape, dtype = tuple(images.shape), next(self.model.parameters()).dtype
        fixed = (self.batch_size, len(self._mean))
        if shape[:2] != fixed or shape[2:] not in self.canvases:
            expected = " or ".join(str((*fixed, *size)) for size in self.canvases)
            raise ValueError(f"images must be {expected}, got {shape}")
        if images.dtype != dtype:
            raise ValueError(f"images must be {dtype}, got {images.dtype}")
        size = (shape[2], shape[3])
        found: dict[str, Tensor] = {"images": images, **targets.named()}
        shapes: dict[str, tuple[int, ...]] = {"images": shape, **self._target_shapes(size)}
        if sizes is not None:
            found["sizes"], shapes["sizes"] = sizes, (self.batch_size, 2)
        device = self._mean.device
        for name, expected_shape in shapes.items():
            if name not in found:
                raise ValueError(f"targets must have {name} {expected_shape}, got none")
            if tuple(found[name].shape) != expected_shape:
                raise ValueError(f"{name} must be {expected_shape}, got {tuple(found[name].shape)}")
            if not anywhere and found[name].device != device:
                raise ValueError(f"{name} must be on {device}, got {found[name].device}")
        return size

    def empty_batch(self, size: Size) -> tuple[Tensor, StaticTargets, Tensor]:
        """The arguments of :meth:`forward`, all zeros but the sizes, on the model's device; `size` is a canvas."""
        like, device = next(self.model.parameters()), self._mean.device
        types = {"masks": torch.uint8, "labels": torch.int64, "counts": torch.int64}
        tables = {
            name: torch.zeros(shape, dtype=types.get(name, torch.float32), device=device)
            for name, shape in self._target_shapes(size).items()
        }
        images = torch.zeros(self.batch_size, len(self._mean), *size, dtype=like.dtype, device=device)
        return images, StaticTargets(**tables), self.whole_sizes(size).clone()

    def whole_sizes(self, size: Size) -> Tensor:
        """[batch_size, 2]: the sizes of images that fill a canvas."""
        return self._constant("sizes", size)

    def _target_shapes(self, size: Size) -> dict[str, tuple[int, ...]]:
        room = (self.batch_size, self.max_targets)
        shapes: dict[str, tuple[int, ...]] = {"boxes": (*room, 4), "labels": room, "counts": room[:1]}
        heads = getattr(self.model, "roi_heads", None)
        if heads is not None and heads.has_mask():
            shapes["masks"] = (*room, *size)
        if heads is not None and heads.has_keypoint():
            shapes["keypoints"] = (*room, heads.keypoint_predictor.out_channels, 3)
        return shapes


@dataclass(frozen=True)
class Packing:
    """Makes a batch of a :class:`StaticTraining` of images and targets of any sizes, on the host.

    A DataLoader can call it in its workers.

    Args:
        transform: the model's, which resizes.
        canvases: (height, width) in pixels, smallest first.
        max_targets, too_many: see :func:`pack_targets`.
    """

    transform: GeneralizedRCNNTransform
    canvases: tuple[Size, ...]
    max_targets: int
    too_many: str = "raise"

    def __call__(
        self,
        images: Sequence[Tensor],
        targets: Sequence[Mapping[str, Tensor]],
        canvas: Size | None = None,
    ) -> tuple[Tensor, StaticTargets, Tensor]:
        """The arguments of :meth:`StaticTraining.forward`.

        Args:
            images: [C, h, w] each, with values in 0 to 1.
            targets: torchvision's dict for each image, in its pixels.
            canvas: each image becomes as large as fits into this one of the canvases. Default: it is resized as the
                model does in training, which may draw a size, and the smallest canvas serves that all images fit into.

        Raises:
            ValueError: an image fits into no canvas; others: see :func:`pack_targets`.
        """
        if canvas is not None and tuple(canvas) not in self.canvases:
            raise ValueError(f"canvas must be one of {self.canvases}, got {canvas}")
        pairs = [self._resized(*pair, canvas) for pair in zip(images, targets, strict=True)]
        sizes = [(image.shape[1], image.shape[2]) for image, _ in pairs]
        size = self._smallest(sizes) if canvas is None else canvas
        batch = images[0].new_zeros(len(pairs), len(images[0]), *size)
        for row, (image, _) in zip(batch, pairs, strict=True):
            row[:, : image.shape[1], : image.shape[2]] = image
        own = [target for _, target in pairs]
        packed = pack_targets(own, self.max_targets, canvas=size, too_many=self.too_many)
        return batch, packed, torch.tensor(sizes, device=batch.device)

    def _resized(
        self, image: Tensor, target: Mapping[str, Tensor], canvas: Size | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        transform = self.transform
        if canvas is not None:
            scale = min(canvas[0] / image.shape[1], canvas[1] / image.shape[2])
            height, width = (
                max(1, min(side, int(own * scale + 1e-6))) for side, own in zip(canvas, image.shape[1:], strict=True)
            )
            transform = copy.copy(transform)
            # torchvision's order.
            transform.fixed_size, transform._skip_resize = (width, height), False
        own = dict(target)
        # It changes the dict.
        resized, _ = transform.resize(image, own)
        return resized, own

    def _smallest(self, sizes: Sequence[Size]) -> Size:
        height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
        for size in self.canvases:
            if height <= size[0] and width <= size[1]:
                return size
        raise ValueError(f"the images of a batch, resized to {sizes}, fit into none of the canvases {self.canvases}")


def _sampler(stage: Any) -> FixedSizeSampler:
    sampler = stage.fg_bg_sampler
    return FixedSizeSampler(sampler.batch_size_per_image, sampler.positive_fraction)


def _choose_scales(model: Any, maps: dict[str, Tensor], size: Size) -> None:
    """Poolers infer the scales of their maps at their first call, which is not to be one that is compiled."""
    for name in ("box_roi_pool", "mask_roi_pool", "keypoint_roi_pool"):
        pooler = getattr(getattr(model, "roi_heads", None), name, None)
        if pooler is not None:
            dtype = next(iter(maps.values())).dtype
            pooler(maps, [torch.empty(0, 4, dtype=dtype, device="meta")], [size])


def check_training_model(model: nn.Module) -> None:
    """Raises TypeError unless a StaticTraining computes what the model itself would."""
    if not isinstance(model, (FasterRCNN, RetinaNet, FCOS, SSD)):
        raise TypeError(
            "model must be a Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS or SSD of torchvision after "
            f"fpn_fast.accelerate(model), got {type(model).__name__}"
        )
    owner: Any = model
    anchors = DefaultBoxGenerator if isinstance(model, SSD) else AnchorGenerator
    parts: list[tuple[str, Any, tuple[type, ...]]] = [
        ("transform", owner.transform, (GeneralizedRCNNTransform,)),
        ("anchor_generator", anchor_generator(model), (anchors,)),
    ]
    if isinstance(model, FasterRCNN):
        parts += [("rpn", owner.rpn, _RPN_KINDS), ("roi_heads", owner.roi_heads, _HEADS_KINDS)]
    for name, part, kinds in parts:
        if type(part) not in kinds:
            expected = f"{kinds[0].__name__} after fpn_fast.accelerate(model)"
            raise TypeError(f"the model's {name} must be {expected}, got {type(part).__name__}")
    for name, part, steps in _left_out(model):
        if changed := steps.changed(part):
            raise TypeError(f"the model's {name} must be torchvision's own, got a changed {', '.join(changed)}")
    if _torch_private.has_forward_hooks(model):
        raise TypeError(f"the model's forward is not called, got a {type(model).__name__} with forward hooks")
    if isinstance(model, FasterRCNN) and owner.rpn.box_similarity is not box_iou:
        raise TypeError("the model's rpn.box_similarity must be torchvision's box_iou")


def _left_out(model: Any) -> list[tuple[str, Any, Steps]]:
    """The parts whose steps are not called, by name."""
    parts: list[tuple[str, Any, Steps]] = [("transform", model.transform, _TRANSFORM)]
    if not isinstance(model, FasterRCNN):
        parts += [(type(model).__name__, model, steps) for kind, steps in _DENSE.items() if isinstance(model, kind)]
        parts += [(f"head.{name}", model.head.get_submodule(name), steps) for name, steps in _dense_heads(model)]
        coder = LINEAR_CODER if isinstance(model, FCOS) else BOX_CODER
        anchors = DEFAULT_BOXES if isinstance(model, SSD) else ANCHORS
        matcher = _SSD_MATCHER if isinstance(model, SSD) else _matching.MATCHER
        parts += [("box_coder", model.box_coder, coder), ("anchor_generator", model.anchor_generator, anchors)]
        return parts if isinstance(model, FCOS) else [*parts, ("proposal_matcher", model.proposal_matcher, matcher)]
    rpn, heads = model.rpn, model.roi_heads
    parts += [(type(model).__name__, model, _MODEL), ("anchor_generator", rpn.anchor_generator, ANCHORS)]
    parts += [("rpn", rpn, steps) for steps in (_RPN, PROPOSALS, LOSSES)]
    parts += [("roi_heads", heads, steps) for steps in (_HEADS, ROI_TRAINING)]
    for name, stage in (("rpn", rpn), ("roi_heads", heads)):
        parts += [(f"{name}.box_coder", stage.box_coder, BOX_CODER)]
        parts += [(f"{name}.proposal_matcher", stage.proposal_matcher, _matching.MATCHER)]
        parts += [(f"{name}.fg_bg_sampler", stage.fg_bg_sampler, _SAMPLER)]
    return parts


def _dense_heads(model: Any) -> list[tuple[str, Steps]]:
    """What computes losses in a dense detector's head, by name."""
    if isinstance(model, RetinaNet):
        return [("", _RETINANET_HEAD), ("classification_head", _CLASSIFICATION), ("regression_head", _REGRESSION)]
    return [("", _FCOS_HEAD)] if isinstance(model, FCOS) else []
