# SPDX-License-Identifier: Apache-2.0
"""Inference of a whole detector with tensors of fixed sizes, from the image to the detections.

Needs torchvision: the detectors are torchvision's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad
from torchvision.models.detection import transform as _transform
from torchvision.models.detection.faster_rcnn import FasterRCNN
from torchvision.models.detection.image_list import ImageList

from fpn_fast import ops
from fpn_fast.nn.dense_detectors import FCOS, RetinaNet
from fpn_fast.nn.region_proposal import AnchorGenerator, RegionProposalNetwork
from fpn_fast.nn.roi_heads import GeneralizedRCNNTransform, RoIHeads

__all__ = ["StaticDetector"]

Size = tuple[int, int]


class StaticDetector(nn.Module):
    """An accelerated detector on batches of a fixed size, without a wait for the GPU.

    What comes out has a fixed size too: it can be compiled as one graph, exported, and captured in a CUDA graph.

    Args:
        model: a Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS of torchvision after :func:`fpn_fast.accelerate`, in
            evaluation mode. It is shared, not copied.
        image_size: (height, width) of the images in pixels; or several of them, for images that vary.
        batch_size: images of a batch.
        max_detections: of each image; None: as many as the model gives.

    Detections equal the model's own on a list of `batch_size` images of `image_size`. A smaller image is padded to the
    smallest of the sizes that it fits into and resized as that one is, where the model alone would enlarge it further.

    Raises:
        TypeError: a part of the model is not one of those, or is not accelerated.
        ValueError: a size is not positive.

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
        image_size: Size | Sequence[Size],
        batch_size: int,
        *,
        max_detections: int | None = None,
    ) -> None:
        super().__init__()
        _check_model(model)
        sizes = _sorted_sizes(image_size)
        if batch_size < 1 or min(min(size) for size in sizes) < 1:
            raise ValueError(f"sizes must be positive, got images of {sizes} in batches of {batch_size}")
        if max_detections is not None and max_detections < 0:
            raise ValueError(f"max_detections must be 0 or more, got {max_detections}")
        self.model = model
        self.batch_size = batch_size
        self.max_detections = max_detections
        self._shapes = {size: _Shapes(self.model.transform, size) for size in sizes}
        self._captured: dict[Size, _Captured] = {}
        # Asked for here, as it is kept: a compiler cannot.
        _anchor_generator(model).cell_numbers()
        # Constants are on the device beforehand: a copy to it cannot be captured.
        for name, values in (("mean", self.model.transform.image_mean), ("std", self.model.transform.image_std)):
            self.register_buffer(f"_{name}", torch.tensor(values)[:, None, None], persistent=False)
        for i, shapes in enumerate(self._shapes.values()):
            whole = torch.tensor([shapes.original] * batch_size, dtype=torch.float32)
            self.register_buffer(f"_sizes_{i}", whole, persistent=False)
            for name, values in (("resized", torch.tensor(shapes.resized)), ("back", shapes.back())):
                self.register_buffer(f"_{name}_{i}", values, persistent=False)
        self.to(next(model.parameters()).device)

    @property
    def image_sizes(self) -> list[Size]:
        """The sizes that a batch may have, smallest first."""
        return list(self._shapes)

    def forward(self, images: Tensor, sizes: Tensor | None = None) -> dict[str, Tensor]:
        """Detections of a batch.

        Args:
            images: [batch_size, C, H, W] with values in 0 to 1, of the model's dtype; (H, W) is one of `image_sizes`.
            sizes: [batch_size, 2] (height, width) of what each image fills, from its top left; None: all of it.

        Returns:
            "boxes" [N, D, 4] in image pixels, "scores" [N, D], "labels" [N, D] and "counts" [N]; of a Mask R-CNN
            "masks" [N, D, 1, H, W]; of a Keypoint R-CNN "keypoints" [N, D, K, 3] and "keypoints_scores" [N, D, K]. All
            but the counts are zero after the last detection of an image.

        Raises:
            ValueError: a shape, dtype or device is another one; the model is in training mode.
        """
        size = self._check(images, sizes)
        if sizes is None:
            sizes = getattr(self, f"_sizes_{self.image_sizes.index(size)}")
        if size in self._captured:
            return self._captured[size].replay(images, sizes)
        return self._detect(images, sizes)

    def detect(self, images: Sequence[Tensor]) -> list[dict[str, Tensor]]:
        """Detections of any number of images [C, h, w], each at most as large as the largest size: for each image the
        dict that torchvision's detectors give. Waits for a GPU once a batch.

        Raises:
            ValueError: an image fits into none of the sizes; others: see :meth:`forward`.
        """
        found = []
        for start in range(0, len(images), self.batch_size):
            batch = images[start : start + self.batch_size]
            size = self._smallest(batch)
            full = batch[0].new_zeros(self.batch_size, len(self._mean), *size)
            # An image that is not there is as large as the batch.
            heights_widths = [size] * self.batch_size
            for i, image in enumerate(batch):
                full[i, :, : image.shape[1], : image.shape[2]] = image
                heights_widths[i] = image.shape[1], image.shape[2]
            sizes = torch.tensor(heights_widths, dtype=torch.float32).to(full.device, non_blocking=True)
            lists = self.unpad(self(full, sizes))[: len(batch)]
            for each, (height, width) in zip(lists, heights_widths, strict=False):
                if "masks" in each:
                    each["masks"] = each["masks"][..., :height, :width]
            found.extend(lists)
        return found

    @staticmethod
    def unpad(detections: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """What :meth:`forward` gives -> for each image the dict that torchvision's detectors give. Waits once."""
        counts = detections["counts"].tolist()
        names = [name for name in detections if name != "counts"]
        return [{name: detections[name][n, :count] for name in names} for n, count in enumerate(counts)]

    def capture(self) -> StaticDetector:
        """Captures a CUDA graph for each size, which every later call replays; returns self.

        The model's weights may change in place afterwards, its device and dtype may not.

        Raises:
            RuntimeError: the model is not on a GPU.
        """
        device = self._mean.device
        if device.type != "cuda":
            raise RuntimeError(f"a CUDA graph is captured on a GPU; the model is on {device}")
        dtype = next(self.model.parameters()).dtype
        for i, size in enumerate(self._shapes):
            images = torch.zeros(self.batch_size, len(self._mean), *size, dtype=dtype, device=device)
            self._captured[size] = _Captured(self._detect, images, getattr(self, f"_sizes_{i}").clone())
        return self

    def _apply(self, *arguments: Any, **options: Any) -> StaticDetector:
        """All of torch.nn.Module's ways to move a module. A graph that was captured would read what is gone."""
        self._captured.clear()
        constants = dict(self.named_buffers(recurse=False))
        super()._apply(*arguments, **options)
        # Boxes are float32 whatever the model's dtype.
        self._buffers.update({name: each.to(self._mean.device) for name, each in constants.items()})
        return self

    def _smallest(self, images: Sequence[Tensor]) -> Size:
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        for size in self._shapes:
            if height <= size[0] and width <= size[1]:
                return size
        raise ValueError(f"an image of ({height}, {width}) fits into none of the sizes {self.image_sizes}")

    def _check(self, images: Tensor, sizes: Tensor | None) -> Size:
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
        # Divided last: an image of the whole size is then exactly as large as it is resized to.
        resized = (sizes * getattr(self, f"_resized_{i}") / getattr(self, f"_sizes_{i}")).floor()
        back = getattr(self, f"_back_{i}")
        if isinstance(self.model, FasterRCNN):
            return self._two_stages(batch, resized, back, shapes)
        boxes, scores, labels, counts = self.model.detections(
            ImageList(batch, resized), max_detections=self.max_detections
        )
        return {"boxes": boxes * back, "scores": scores, "labels": labels, "counts": counts}

    def _transform(self, images: Tensor, sizes: Tensor, shapes: _Shapes) -> Tensor:
        """torchvision's normalisation, resizing and padding."""
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
        # The poolers look at the sizes once, for the scales of the maps.
        resized = [shapes.resized] * images
        pooled = heads.box_head(heads.box_roi_pool(features, list(proposals), resized))
        logits, deltas = (each.unflatten(0, (images, -1)) for each in heads.box_predictor(pooled))
        boxes, scores, labels, counts = heads.detections(
            logits, deltas, proposals, counts, sizes, max_detections=self.max_detections
        )
        found = {"boxes": boxes * back, "scores": scores, "labels": labels, "counts": counts}
        there = torch.arange(boxes.size(1), device=boxes.device) < counts[:, None]
        if heads.has_mask():
            logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, list(boxes), resized)))
            of_label = logits[torch.arange(len(logits), device=logits.device), labels.flatten()]
            masks = of_label.sigmoid().where(there.flatten()[:, None, None], 0)
            pasted = ops.paste_masks(masks[:, None], found["boxes"].flatten(0, 1), shapes.original)
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
    """The sizes, (height, width), through which an image of one size goes."""

    def __init__(self, transform: Any, original: Size) -> None:
        self.original = original
        # torchvision's own arithmetic, on an image without values.
        resized, _ = transform.resize(torch.empty(3, *original, device="meta"))
        self.resized: Size = (resized.shape[1], resized.shape[2])
        divisor = transform.size_divisible
        height, width = (-(-side // divisor) * divisor for side in self.resized)
        self.padded: Size = (height, width)

    def back(self) -> Tensor:
        """[4]: what torchvision multiplies (x1, y1, x2, y2) of the resized image by."""
        y, x = torch.tensor(self.original, dtype=torch.float32) / torch.tensor(self.resized, dtype=torch.float32)
        return torch.stack([x, y, x, y])


class _Captured:
    """A captured graph of a function of (images, sizes)."""

    def __init__(self, function: Any, images: Tensor, sizes: Tensor) -> None:
        self.images, self.sizes = images, sizes
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))
        with torch.cuda.stream(stream):
            # The first calls choose algorithms, and allocate what is not to be part of the graph.
            for _ in range(3):
                function(images, sizes)
        torch.cuda.current_stream(images.device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(images, sizes)

    def replay(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        self.images.copy_(images)
        self.sizes.copy_(sizes)
        self.graph.replay()
        # The next replay writes over them.
        return {name: each.clone() for name, each in self.outputs.items()}


def _sorted_sizes(image_size: Any) -> list[Size]:
    """One size or several -> the different ones, smallest first."""
    several = [image_size] if isinstance(image_size[0], int) else image_size
    return sorted({(int(height), int(width)) for height, width in several}, key=lambda size: (size[0] * size[1], size))


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, (RetinaNet, FCOS, FasterRCNN)):
        raise TypeError(
            "model must be a Faster, Mask or Keypoint R-CNN, RetinaNet or FCOS of torchvision after "
            f"fpn_fast.accelerate(model), got {type(model).__name__}"
        )
    parts: dict[str, tuple[type, ...]] = {"transform": (_transform.GeneralizedRCNNTransform, GeneralizedRCNNTransform)}
    if isinstance(model, FasterRCNN):
        parts |= {"rpn": (RegionProposalNetwork,), "roi_heads": (RoIHeads,)}
    found = {name: type(getattr(model, name)) for name in parts}
    parts["anchor_generator"], found["anchor_generator"] = (AnchorGenerator,), type(_anchor_generator(model))
    for name, kinds in parts.items():
        if found[name] not in kinds:
            raise TypeError(
                f"the model's {name} must be {kinds[-1].__name__} after fpn_fast.accelerate(model), "
                f"got {found[name].__name__}"
            )


def _anchor_generator(model: Any) -> Any:
    return (model.rpn if isinstance(model, FasterRCNN) else model).anchor_generator
