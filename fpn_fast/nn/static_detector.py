# SPDX-License-Identifier: Apache-2.0
"""Inference of a whole detector on fixed shapes. Needs torchvision."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torchvision.models.detection import roi_heads as _roi_heads
from torchvision.models.detection import rpn as _rpn
from torchvision.models.detection import ssd as _ssd
from torchvision.models.detection import transform as _transform
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from fpn_fast import _torch_private, backends, ops
from fpn_fast.nn._own import Part, Steps
from fpn_fast.nn.dense_detectors import FCOS, LINEAR_CODER, SSD, RetinaNet, lists_of, named
from fpn_fast.nn.region_proposal import ANCHORS, BOX_CODER, PROPOSALS, AnchorGenerator, RegionProposalNetwork
from fpn_fast.nn.roi_heads import GeneralizedRCNNTransform, RoIHeads
from fpn_fast.ops._checks import as_integer, as_sizes

__all__ = ["StaticDetector"]

Size = tuple[int, int]

_TRANSFORM = Steps(
    _transform.GeneralizedRCNNTransform,
    *("forward", "normalize", "resize", "batch_images", "postprocess"),
    fused=GeneralizedRCNNTransform,
)
_RPN = Steps(_rpn.RegionProposalNetwork, "forward", fused=RegionProposalNetwork)
_HEADS = Steps(_roi_heads.RoIHeads, "forward", "postprocess_detections", fused=RoIHeads)
_SSD = Steps(_ssd.SSD, "postprocess_detections", "eager_outputs", replaced="forward", fused=SSD)
DEFAULT_BOXES = Part(DefaultBoxGenerator)


class StaticDetector(nn.Module):
    """Runs a whole detector on fixed shapes without host synchronisation.

    Its outputs have fixed shapes too. You can compile it as one graph, export it, or capture it in a CUDA graph.

    Args:
        model: a Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS or SSD of torchvision after
            :func:`fpn_fast.accelerate`, in evaluation mode. It is shared, not copied.
        image_size: (height, width) of the images in pixels, one number for both, or a list of several pairs.
        batch_size: images per batch.
        max_detections: per image. Default: the model's own limit. So many masks are pasted.
        mask_threshold: of a Mask R-CNN: masks are bool, whether a probability is above it, in a quarter of the memory.
            Default: probabilities, as torchvision's.

    Raises:
        TypeError: the model is of another class, or one of its parts is not accelerated.
        ValueError: a size is not positive; the model has no masks for `mask_threshold`.

    Note:
        Detections equal the model's own for a list of `batch_size` images of `image_size`. A smaller image is padded to
        the smallest size that it fits into, and resized like an image of that size; the model alone would enlarge it
        further. No gradient is recorded.

    >>> import torch, torchvision, fpn_fast
    >>> model = torchvision.models.detection.fcos_resnet50_fpn(weights=None, weights_backbone=None, min_size=64).eval()
    >>> report = fpn_fast.accelerate(model)
    >>> detector = fpn_fast.StaticDetector(model, (60, 80), batch_size=2)
    >>> {name: tuple(each.shape) for name, each in detector(torch.rand(2, 3, 60, 80)).items()}
    {'boxes': (2, 100, 4), 'scores': (2, 100), 'labels': (2, 100), 'counts': (2,)}
    """

    model: Any
    _mean: Tensor
    _std: Tensor

    def __init__(
        self,
        model: nn.Module,
        image_size: int | Size | Sequence[Size],
        batch_size: int,
        *,
        max_detections: int | None = None,
        mask_threshold: float | None = None,
    ) -> None:
        super().__init__()
        _check_model(model)
        sizes, batch_size = as_sizes("image_size", image_size), as_integer("batch_size", batch_size)
        if batch_size < 1 or min(min(size) for size in sizes) < 1:
            raise ValueError(f"sizes must be positive, got images of {sizes} in batches of {batch_size}")
        if max_detections is not None and max_detections < 0:
            raise ValueError(f"max_detections must be 0 or more, got {max_detections}")
        if mask_threshold is not None and not (isinstance(model, FasterRCNN) and model.roi_heads.has_mask()):
            raise ValueError(f"mask_threshold is for a Mask R-CNN, got {mask_threshold} for a {type(model).__name__}")
        self.model = model
        # Of the model alone it decides what runs.
        self.training = model.training
        self.batch_size = batch_size
        self.max_detections = max_detections
        self.mask_threshold = mask_threshold
        self._shapes = {size: _Shapes(self.model.transform, size) for size in sizes}
        self._captured: dict[Size, _Captured] = {}
        self._compiled: dict[Size, Callable[[Tensor, Tensor], dict[str, Tensor]]] = {}
        if not isinstance(model, SSD):
            # Computed here once and kept, because a compiler cannot trace it.
            anchor_generator(model).cell_numbers()
        # Constants go to the device now: a CUDA graph cannot capture a copy from the host.
        moments = {"mean": self.model.transform.image_mean, "std": self.model.transform.image_std}
        constants = {name: torch.tensor(values, device="cpu")[:, None, None] for name, values in moments.items()}
        for i, shapes in enumerate(self._shapes.values()):
            constants[f"sizes_{i}"] = torch.tensor([shapes.original] * batch_size, dtype=torch.float32, device="cpu")
            constants[f"resized_{i}"], constants[f"back_{i}"] = (
                torch.tensor(shapes.resized, device="cpu"),
                shapes.back(),
            )
            if isinstance(model, SSD):
                constants[f"default_boxes_{i}"] = default_boxes(model, shapes.padded)
        for name, values in constants.items():
            self.register_buffer(f"_{name}", values, persistent=False)
        self.to(next(model.parameters()).device)

    @property
    def image_sizes(self) -> list[Size]:
        """The image sizes that a batch may have, smallest first."""
        return list(self._shapes)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """The detections of a batch, padded.

        Args:
            images: [batch_size, C, H, W] with values in 0 to 1, in the model's dtype; (H, W) is one of `image_sizes`.
            sizes: [batch_size, 2] (height, width) of the image in the top left corner of each, in pixels. Default: (H,
                W).

        Returns:
            "boxes" [N, D, 4] in image pixels, "scores" [N, D], "labels" [N, D] and "counts" [N]. A Mask R-CNN adds
            "masks" [N, D, 1, H, W]; a Keypoint R-CNN adds "keypoints" [N, D, K, 3] and "keypoints_scores" [N, D, K].
            Entries after an image's last detection are zero. After :meth:`capture` these tensors are the graph's: the
            next call, of any size, overwrites them.

        Raises:
            ValueError: the shape, dtype or device differs from the model's; the model is in training mode.
        """
        size = self._check(images, sizes)
        if sizes is None:
            sizes = getattr(self, f"_sizes_{self.image_sizes.index(size)}")
        if size in self._captured:
            return self._captured[size].replay(images, sizes)
        if size in self._compiled:
            return self._compiled[size](images, sizes.to(torch.float32))
        return self._detect(images, sizes)

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """The detections of any number of images, as torchvision's list of dicts.

        Args:
            images: [C, h, w] each, not larger than the largest of `image_sizes`; values, dtype and device: see
                :meth:`forward`.

        Returns:
            Per image a dict of tensors that hold no memory but their own.

        Raises:
            TypeError: an image is not a tensor.
            ValueError: an image has another shape, dtype or device, is empty or larger than every size; the model is in
                training mode.

        Synchronises with the host once a batch.
        """
        for i, image in enumerate(images):
            self._check_image(image, i)
        found = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            size = self._smallest(batch)
            full = batch[0].new_zeros(self.batch_size, len(self._mean), *size)
            # In an incomplete batch, the missing images count as whole.
            heights_widths = [size] * self.batch_size
            for i, image in enumerate(batch):
                full[i, :, : image.shape[1], : image.shape[2]] = image
                heights_widths[i] = image.shape[1], image.shape[2]
            sizes = torch.tensor(heights_widths, dtype=torch.float32, device="cpu").to(full.device, non_blocking=True)
            lists = self.unpad(self(full, sizes))[: len(batch)]
            for each, (height, width) in zip(lists, heights_widths, strict=False):
                if "masks" in each and (height, width) != size:
                    each["masks"] = each["masks"][..., :height, :width].clone()
            found.extend(lists)
        return found

    @staticmethod
    def unpad(detections: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """The padded detections of :meth:`forward` -> torchvision's list of dicts. Synchronises with the host once."""
        return lists_of(detections)

    def capture(self) -> StaticDetector:
        """Captures one CUDA graph per image size, which later calls replay. Returns self.

        All graphs share one pool of memory, and nothing is copied out of it: a call's outputs last until the next call.
        Clone what you keep longer; :meth:`detect` and :meth:`unpad` do. You may change weights in place afterwards.
        Moving the model or changing its dtype drops the graphs.

        Raises:
            RuntimeError: the model is not on a GPU.
        """
        device = self._mean.device
        if device.type != "cuda":
            raise RuntimeError(f"a CUDA graph is captured on a GPU; the model is on {device}")
        dtype = next(self.model.parameters()).dtype
        self._captured.clear()
        pool = torch.cuda.graph_pool_handle()
        # A tensor of inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            # The largest first, so that the memory of its intermediate results serves the others.
            for i, size in reversed([*enumerate(self._shapes)]):
                images = torch.zeros(self.batch_size, len(self._mean), *size, dtype=dtype, device=device)
                self._captured[size] = _Captured(self._detect, images, getattr(self, f"_sizes_{i}").clone(), pool)
        return self

    def compile(self, folder: str | Path | None = None) -> StaticDetector:  # type: ignore[override]
        """Compiles one package per image size with AOTInductor, which later calls run. Returns self.

        The weights are frozen: Inductor folds the batch norms into the convolutions, reorders the weights for the
        processor, and fuses ReLU and additions. On a CPU the maps are channels_last, whatever the model's are. A
        package is for this processor and this number of threads (:func:`torch.get_num_threads`), and needs a C++
        compiler once.

        Args:
            folder: where the packages stay, as HEIGHTxWIDTH.pt2. AOTInductor's ``aoti_load_package`` loads one in any
                process; call it with the arguments of :meth:`forward`, `sizes` in float32. Default: none stays.

        Raises:
            ValueError: the model is in training mode.

        Weights that you change afterwards, also in place, count once you compile again. Moving the model or changing
        its dtype drops the packages; compiling drops captured CUDA graphs. Boxes differ from the detector's by
        rounding: 0.004 pixels at most in a Faster R-CNN R50-FPN of 320 x 544, 0.006 in one image of a RetinaNet.
        """
        if self.model.training:
            raise ValueError("the model must be in evaluation mode, call .eval()")
        self._captured.clear()
        self._compiled.clear()
        parameter, packages = next(self.model.parameters()), {}
        # Inductor runs convolutions in channels_last on a CPU. A graph exported from channels_first maps would convert
        # them for every op that is not Inductor's: the pooler, the merge and the norms.
        source = copy.deepcopy(self).to(memory_format=torch.channels_last) if self._mean.is_cpu else self
        # Inductor freezes weights only where no gradient is recorded.
        with tempfile.TemporaryDirectory() as temporary, torch.no_grad():
            target = Path(temporary if folder is None else folder)
            target.mkdir(parents=True, exist_ok=True)
            for i, (height, width) in enumerate(self._shapes):
                images = parameter.new_zeros(self.batch_size, len(self._mean), height, width)
                # Not the buffer itself: the exported graph would read it in place of the argument.
                sizes = getattr(self, f"_sizes_{i}").clone()
                program = torch.export.export(source, (images, sizes))
                path = str(target / f"{height}x{width}.pt2")
                packages[height, width] = _torch_private.compiled_package(program, path, {"freezing": True})
        self._compiled = packages
        return self

    def _apply(self, *arguments: Any, **options: Any) -> StaticDetector:
        """Runs whenever the module moves. Drops captured graphs, which would read freed memory, and packages."""
        self._captured.clear()
        self._compiled.clear()
        constants = dict(self.named_buffers(recurse=False))
        super()._apply(*arguments, **options)
        # Boxes are float32, whatever the model's dtype is.
        self._buffers.update({name: each.to(self._mean.device) for name, each in constants.items()})
        return self

    def _smallest(self, images: Sequence[Tensor]) -> Size:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        for size in self._shapes:
            if height <= size[0] and width <= size[1]:
                return size
        raise ValueError(f"an image of ({height}, {width}) fits into none of the sizes {self.image_sizes}")

    def _check_image(self, image: Tensor, i: int) -> None:
        if not isinstance(image, Tensor):
            raise TypeError(f"images must be tensors, got {type(image).__name__} at {i}")
        dtype, device, channels = next(self.model.parameters()).dtype, self._mean.device, len(self._mean)
        if image.dim() != 3 or image.size(0) != channels or 0 in image.shape:
            raise ValueError(
                f"images must be [{channels}, h, w] of at least 1 x 1 pixel, got {tuple(image.shape)} at {i}"
            )
        if image.dtype != dtype or image.device != device:
            advice = "; divide by 255 first" if image.dtype == torch.uint8 else ""
            raise ValueError(f"images must be {dtype} on {device}, got {image.dtype} on {image.device} at {i}{advice}")

    def _check(self, images: Tensor, sizes: Tensor | None) -> Size:
        if backends.jit_traced():
            raise RuntimeError("torch.jit.trace cannot record a StaticDetector; trace its model, or use torch.export")
        if self.model.training:
            raise ValueError("the model must be in evaluation mode, call .eval()")
        dtype, device, channels = next(self.model.parameters()).dtype, self._mean.device, len(self._mean)
        shape = tuple(images.shape)
        if shape[:2] != (self.batch_size, channels) or shape[2:] not in self._shapes:
            expected = " or ".join(str((self.batch_size, channels, *size)) for size in self._shapes)
            raise ValueError(f"images must be {expected}, got {shape}")
        if images.dtype != dtype or images.device != device:
            raise ValueError(f"images must be {dtype} on {device}, got {images.dtype} on {images.device}")
        if sizes is not None and (tuple(sizes.shape) != (self.batch_size, 2) or sizes.device != device):
            raise ValueError(f"sizes must be {(self.batch_size, 2)} on {device}, got {tuple(sizes.shape)} there")
        return (shape[2], shape[3])

    @torch.no_grad()
    def _detect(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        size = (images.shape[2], images.shape[3])
        shapes, i = self._shapes[size], self.image_sizes.index(size)
        sizes = sizes.to(torch.float32)
        batch = self._transform(images, sizes, shapes)
        # The division comes last, so that an image of the whole size gets exactly the resized size.
        resized = (sizes * getattr(self, f"_resized_{i}") / getattr(self, f"_sizes_{i}")).floor()
        back = getattr(self, f"_back_{i}")
        if isinstance(self.model, FasterRCNN):
            return self._two_stages(batch, resized, back, shapes)
        if isinstance(self.model, SSD):
            maps = self.model.backbone(batch)
            outputs = self.model.head([maps] if isinstance(maps, Tensor) else list(maps.values()))
            boxes = getattr(self, f"_default_boxes_{i}").expand(len(batch), -1, -1)
            padded = self.model.detections_of_head(outputs, boxes, resized, max_detections=self.max_detections)
        else:
            padded = self.model.detections(ImageList(batch, resized), max_detections=self.max_detections)
        found = named(padded)
        return found | {"boxes": found["boxes"] * back}

    def _transform(self, images: Tensor, sizes: Tensor, shapes: _Shapes) -> Tensor:
        """The normalisation, resizing and padding of torchvision's transform."""
        images = (images - self._mean.to(images.dtype)) / self._std.to(images.dtype)
        rows = torch.arange(shapes.original[0], device=images.device)[:, None] < sizes[:, 0, None, None]
        columns = torch.arange(shapes.original[1], device=images.device) < sizes[:, 1, None, None]
        images = images.where((rows & columns)[:, None], 0)
        images = interpolate(images, shapes.resized, mode="bilinear", align_corners=False)
        below, beside = (full - part for full, part in zip(shapes.padded, shapes.resized, strict=True))
        return pad(images, (0, beside, 0, below))

    def _two_stages(self, batch: Tensor, sizes: Tensor, back: Tensor, shapes: _Shapes) -> dict[str, Tensor]:
        model, heads = self.model, self.model.roi_heads
        images = len(batch)
        features = model.backbone(batch)
        features = {"0": features} if isinstance(features, Tensor) else features
        proposals, _, counts = model.rpn.proposals(ImageList(batch, sizes), features)
        # The poolers use the sizes once, to infer the scales of the maps.
        resized = [shapes.resized] * images
        pooled = heads.box_head(heads.box_roi_pool(features, list(proposals), resized))
        logits, deltas = (each.unflatten(0, (images, -1)) for each in heads.box_predictor(pooled))
        found = named(heads.detections(logits, deltas, proposals, counts, sizes, max_detections=self.max_detections))
        boxes, found["boxes"] = found["boxes"], found["boxes"] * back
        there = torch.arange(boxes.size(1), device=boxes.device) < found["counts"][:, None]
        if heads.has_mask():
            logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, list(boxes), resized)))
            of_label = logits[torch.arange(len(logits), device=logits.device), found["labels"].flatten()]
            masks = of_label.sigmoid().where(there.flatten()[:, None, None], 0)
            pasted = ops.paste_masks(
                masks[:, None], found["boxes"].flatten(0, 1), shapes.original, threshold=self.mask_threshold
            )
            found["masks"] = pasted.unflatten(0, there.shape)
        if heads.has_keypoint():
            maps = heads.keypoint_predictor(
                heads.keypoint_head(heads.keypoint_roi_pool(features, list(boxes), resized))
            )
            points, point_scores = ops.heatmaps_to_keypoints(maps, boxes.flatten(0, 1))
            points = points * torch.cat([back[:2], back.new_ones(1)])
            found["keypoints"] = points.unflatten(0, there.shape).where(there[:, :, None, None], 0)
            found["keypoints_scores"] = point_scores.unflatten(0, there.shape).where(there[:, :, None], 0)
        return found


class _Shapes:
    """Original, resized and padded (height, width) of images of one size."""

    def __init__(self, transform: Any, original: Size) -> None:
        self.original = original
        # torchvision's own arithmetic, on a meta tensor.
        resized, _ = transform.resize(torch.empty(3, *original, device="meta"))
        self.resized: Size = (resized.shape[1], resized.shape[2])
        divisor = transform.size_divisible
        height, width = (-(-side // divisor) * divisor for side in self.resized)
        self.padded: Size = (height, width)

    def back(self) -> Tensor:
        """[4]: factors from (x1, y1, x2, y2) in the resized image to the original image."""
        original, resized = torch.tensor([self.original, self.resized], dtype=torch.float32, device="cpu")
        y, x = original / resized
        return torch.stack([x, y, x, y])


class _Captured:
    """The captured graph of a function of (images, sizes), with memory of `pool`."""

    def __init__(self, function: Any, images: Tensor, sizes: Tensor, pool: Any) -> None:
        self.images, self.sizes = images, sizes
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            # The first calls select cuDNN algorithms and allocate workspaces outside the graph.
            for _ in range(3):
                function(images, sizes)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool):
            self.outputs = function(images, sizes)

    def replay(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        self.images.copy_(images)
        self.sizes.copy_(sizes)
        self.graph.replay()
        return dict(self.outputs)


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, (RetinaNet, FCOS, SSD, FasterRCNN)):
        raise TypeError(
            "model must be a Faster, Mask or Keypoint R-CNN, RetinaNet, FCOS or SSD of torchvision after "
            f"fpn_fast.accelerate(model), got {type(model).__name__}"
        )
    transforms = _transform.GeneralizedRCNNTransform, GeneralizedRCNNTransform
    parts: list[tuple[str, Any, tuple[type, ...]]] = [("transform", model.transform, transforms)]
    if isinstance(model, FasterRCNN):
        parts += [("rpn", model.rpn, (RegionProposalNetwork,)), ("roi_heads", model.roi_heads, (RoIHeads,))]
    anchors = DefaultBoxGenerator if isinstance(model, SSD) else AnchorGenerator
    for name, part, kinds in [*parts, ("anchor_generator", anchor_generator(model), (anchors,))]:
        if type(part) not in kinds:
            expected = f"{kinds[-1].__name__} after fpn_fast.accelerate(model)"
            raise TypeError(f"the model's {name} must be {expected}, got {type(part).__name__}")
    for name, part, steps in _left_out(model):
        if changed := steps.changed(part):
            raise TypeError(f"the model's {name} must be torchvision's own, got a changed {', '.join(changed)}")


def _left_out(model: Any) -> list[tuple[str, Any, Steps]]:
    """The parts whose steps are not called, by name."""
    anchors = DEFAULT_BOXES if isinstance(model, SSD) else ANCHORS
    parts = [("transform", model.transform, _TRANSFORM), ("anchor_generator", anchor_generator(model), anchors)]
    if isinstance(model, FasterRCNN):
        parts += [("rpn", model.rpn, steps) for steps in (_RPN, PROPOSALS)]
        parts += [(f"{name}.box_coder", getattr(model, name).box_coder, BOX_CODER) for name in ("rpn", "roi_heads")]
        return [*parts, ("roi_heads", model.roi_heads, _HEADS)]
    coder = LINEAR_CODER if isinstance(model, FCOS) else BOX_CODER
    evaluation = _SSD if isinstance(model, SSD) else model._evaluation
    return [*parts, ("box_coder", model.box_coder, coder), (type(model).__name__, model, evaluation)]


def default_boxes(model: Any, size: Size) -> Tensor:
    """[M, 4] on the CPU: the default boxes of an SSD for batches of `size`, by torchvision's own code."""
    dtype = torch.promote_types(next(model.parameters()).dtype, torch.float32)
    maps = [torch.empty(1, 1, *each, dtype=dtype, device="cpu") for each in map_sizes(model, size)]
    # Of the images only the size is read.
    batch = ImageList(torch.empty(1, 1, *size, device="meta"), [size])
    with torch.device("cpu"):
        (boxes,) = model.anchor_generator(batch, maps)
    return boxes


def map_sizes(model: Any, size: Size) -> list[Size]:
    """(height, width) of the maps that a model's backbone makes of batches of `size`, from shapes alone."""
    return [(each.shape[2], each.shape[3]) for each in meta_maps(model, size).values()]


def meta_maps(model: Any, size: Size) -> dict[str, Tensor]:
    """The maps that a model's backbone makes of an image of `size`, by name, without memory."""
    backbone = model.backbone
    tensors = {
        name: torch.empty_like(each, device="meta")
        for name, each in (*backbone.named_parameters(), *backbone.named_buffers())
    }
    channels = len(model.transform.image_mean)
    images = torch.empty(1, channels, *size, dtype=next(backbone.parameters()).dtype, device="meta")
    with torch.no_grad():
        maps = torch.func.functional_call(backbone, tensors, (images,))
    return {"0": maps} if isinstance(maps, Tensor) else maps


def anchor_generator(model: Any) -> Any:
    return (model.rpn if isinstance(model, FasterRCNN) else model).anchor_generator
