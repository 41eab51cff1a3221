# SPDX-License-Identifier: Apache-2.0
"""Inputs of the selecting ops, as a trained detector sees them: outputs of heads, boxes and masks.

How long selection takes depends on the data: boxes that crowd around objects suppress each other, and few scores are
high. Uniform noise would measure something else.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import box_iou

from fpn_fast import ops
from fpn_fast.bench.rois import random_boxes

#: Objects in an image. COCO's mean is 7.3, and crowded images take more of the time.
OBJECTS = 20
#: Errors of a detected box: of its centre, in sides of the object, and of its sides, in logarithms.
CENTRE_NOISE, SIDE_NOISE = 0.15, 0.2
#: The share of boxes that belong to no object.
STRAY = 0.25
#: Logits: of the background, the gain from an IoU of 0 to 1 with an object, and their noise.
BACKGROUND_LOGIT, OBJECT_GAIN, LOGIT_NOISE = -6.0, 8.0, 0.7
#: The highest logits of an image are at least this far apart, which float32 tells apart before and after a sigmoid.
#: Of equal logits each provider could keep another.
APART, LOGIT_GAP = 300_000, 4e-6
#: Boxes lie on this grid of pixels. torchvision's batched_nms moves each group by a multiple of the image's side; on
#: this grid the sum is exact for up to 1,500 groups, so that all providers keep the same boxes.
GRID = 1 / 8


# Compared by identity, so that the caches below find its tables again.
@dataclass(eq=False)
class Head:
    """A dense head: the image's size, the sizes of its maps, and its anchors."""

    image_size: tuple[int, int]
    levels: tuple[tuple[int, int], ...]
    generator: AnchorGenerator

    @property
    def strides(self) -> list[tuple[int, int]]:
        """(vertical, horizontal) stride per level, torchvision's quotients."""
        return [(self.image_size[0] // height, self.image_size[1] // width) for height, width in self.levels]

    @functools.cached_property
    def cells(self) -> list[list[list[float]]]:
        """The base anchors of each level."""
        return [table.tolist() for table in self.generator.cell_anchors]

    def images(self, batch: int, device: torch.device) -> ImageList:
        """Images that take no memory: only their sizes are read."""
        pixel = torch.empty((), device=device)
        return ImageList(pixel.expand(batch, 3, *self.image_size), [self.image_size] * batch)

    def anchors(self) -> Tensor:
        """[M, 4], in (level, row, column, cell anchor) order."""
        return ops.AnchorGrid(self.cells, self.levels, self.strides).boxes()

    def maps_of(self, table: Tensor) -> list[Tensor]:
        """[N, M, K] -> a map [N, A * K, H, W] per level, without a copy."""
        counts = [height * width * len(cells) for (height, width), cells in zip(self.levels, self.cells, strict=True)]
        return [
            level.view(len(level), *size, -1).permute(0, 3, 1, 2)
            for level, size in zip(table.split(counts, 1), self.levels, strict=True)
        ]


_RATIOS = (0.5, 1.0, 2.0)


@functools.lru_cache(maxsize=4)
def rpn_head(image_size: tuple[int, int], levels: tuple[tuple[int, int], ...]) -> Head:
    """Faster R-CNN's: one size per level, three ratios."""
    sizes = tuple((float(32 * 2**level),) for level in range(len(levels)))
    return Head(image_size, levels, AnchorGenerator(sizes, (_RATIOS,) * len(levels)))


@functools.lru_cache(maxsize=4)
def retinanet_head(image_size: tuple[int, int], levels: tuple[tuple[int, int], ...]) -> Head:
    """RetinaNet's: three sizes per level, rounded down as torchvision does, three ratios."""
    base = [32 * 2**level for level in range(len(levels))]
    sizes = tuple((float(x), float(int(x * 2 ** (1 / 3))), float(int(x * 2 ** (2 / 3)))) for x in base)
    return Head(image_size, levels, AnchorGenerator(sizes, (_RATIOS,) * len(levels)))


def _about(objects: Tensor, generator: torch.Generator) -> Tensor:
    """A detected box for each of `objects` [B, 4]."""
    sides = objects[:, 2:] - objects[:, :2]
    noise = torch.randn(len(objects), 4, generator=generator)
    centres = (objects[:, :2] + objects[:, 2:]) / 2 + CENTRE_NOISE * noise[:, :2] * sides
    reach = sides * torch.exp(SIDE_NOISE * noise[:, 2:]) / 2
    return torch.cat([centres - reach, centres + reach], 1)


@functools.lru_cache(maxsize=4)
def detections(count: int, classes: int, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes [count, 4], scores [count] without ties, and classes [count], before suppression.

    The nearer a box is to an object, the higher its score and the likelier the object's class.
    """
    generator = torch.Generator().manual_seed(count + classes)
    # No detector puts thousands of an image's 30,000 boxes around one object.
    objects = random_boxes(OBJECTS + count // 100, height, width, False, generator)
    kinds = torch.randint(classes, (len(objects),), generator=generator)
    chosen = torch.randint(len(objects), (count,), generator=generator)
    stray = torch.rand(count, generator=generator) < STRAY
    boxes = torch.where(stray[:, None], random_boxes(count, height, width, False, generator),
                        _about(objects[chosen], generator))  # fmt: skip
    near = torch.where(stray, 0.1, _paired_iou(boxes, objects[chosen]))
    other = torch.rand(count, generator=generator) < STRAY
    labels = torch.where(stray | other, torch.randint(classes, (count,), generator=generator), kinds[chosen])
    rank = (near + 0.1 * torch.randn(count, generator=generator)).argsort().argsort()
    return _on_grid(boxes, height, width), (rank + 1) / (count + 1), labels


def _paired_iou(a: Tensor, b: Tensor) -> Tensor:
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (a, b)]
    return sides.prod(1) / (areas[0] + areas[1] - sides.prod(1))


def _on_grid(boxes: Tensor, height: int, width: int) -> Tensor:
    limit = torch.tensor([width, height] * 2)
    low = torch.minimum((boxes / GRID).round() * GRID, limit - 1).clamp(min=0)[:, :2]
    return torch.cat([low, torch.maximum(torch.minimum((boxes / GRID).round() * GRID, limit)[:, 2:], low + 1)], 1)


@functools.lru_cache(maxsize=4)
def ground_truths(count: int, height: int, width: int) -> Tensor:
    return random_boxes(count, height, width, False, torch.Generator().manual_seed(count))


@functools.lru_cache(maxsize=1)
def head_tables(head: Head, batch: int, classes: int) -> tuple[Tensor, Tensor]:
    """Logits [N, M, classes] and deltas [N, M, 4] of a trained head, in the order of :meth:`Head.anchors`.

    An anchor near an object has a high logit for the object's class and the deltas of a box around it.
    """
    generator = torch.Generator().manual_seed(len(head.levels) + batch)
    anchors, coder = head.anchors(), BoxCoder((1.0, 1.0, 1.0, 1.0))
    of_images: list[tuple[Tensor, Tensor]] = []
    for _ in range(batch):
        objects = random_boxes(OBJECTS, *head.image_size, False, generator)
        kinds = torch.randint(classes, (OBJECTS,), generator=generator)
        overlap, index = box_iou(objects, anchors).max(0)
        logits = BACKGROUND_LOGIT + LOGIT_NOISE * torch.randn(len(anchors), classes, generator=generator)
        logits[torch.arange(len(anchors)), kinds[index]] += OBJECT_GAIN * overlap
        found = coder.encode_single(_about(objects[index], generator), anchors)
        stray = 0.1 * torch.randn(len(anchors), 4, generator=generator)
        of_images.append((_without_ties(logits), torch.where(overlap[:, None] > 0.3, found, stray)))
    logits, deltas = (torch.stack(each) for each in zip(*of_images, strict=True))
    return logits, deltas


def _without_ties(logits: Tensor) -> Tensor:
    """`logits` in their order, the highest moved up a little where they are too close."""
    values, index = logits.flatten().topk(min(APART, logits.numel()))
    steps = LOGIT_GAP * torch.arange(len(values), dtype=torch.float64)
    apart = (values.flip(0).double() - steps).cummax(0).values + steps
    return logits.flatten().scatter(0, index.flip(0), apart.float()).view_as(logits)


def mask_probabilities(count: int, size: int) -> Tensor:
    """[count, 1, size, size]: a blob per box, mostly near 0 or 1, as a trained mask head gives it."""
    generator = torch.Generator().manual_seed(count)
    axis = torch.linspace(-1, 1, size)
    distance = (axis[:, None] ** 2 + axis[None, :] ** 2).sqrt()
    noise = torch.randn(count, 1, size, size, generator=generator)
    return torch.sigmoid(8 * (0.8 - distance) + noise)


def keypoint_logits(count: int, keypoints: int, size: int) -> Tensor:
    """[count, keypoints, size, size]: one peak per heatmap over low hills, as a trained keypoint head gives it."""
    generator = torch.Generator().manual_seed(count)
    axis = torch.linspace(0, 1, size)
    x, y = torch.rand(2, count, keypoints, 1, 1, generator=generator)
    distance = ((axis - x) ** 2 + (axis[:, None] - y) ** 2).sqrt()
    noise = torch.randn(count, keypoints, size, size, generator=generator)
    return 10 * torch.exp(-8 * distance) + torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
