# SPDX-License-Identifier: Apache-2.0
"""Batches of fixed shapes for --static: canvases by aspect ratio and scale, and batches of one bucket each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from coco_data import CocoImages, DetectionData, StepBatches

if TYPE_CHECKING:
    from detector_training import Batch, Settings

Size = tuple[int, int]

# The most ground truths of an image; of more the largest are kept.
MAX_TARGETS = 100
# torchvision's longest side for its shortest, 1333 to 800, rounded.
MAX_RATIO = 5 / 3
# Canvases are multiples of it, as torchvision's batches are.
DIVISOR = 32
# With --multi-scale: how many sizes a canvas has. Each is compiled once.
SCALES = 3


def sizes_of(data: DetectionData, image_size: int) -> list[Size]:
    """(height, width) of each image, without reading one."""
    if isinstance(data, CocoImages):
        return [(image["height"], image["width"]) for image in data.coco()["images"]]
    return [(image_size, image_size)] * len(data)


def bucket_of(size: Sequence[int]) -> int:
    """0 for an image that is as wide as high or wider, 1 for a higher one."""
    return int(size[0] > size[1])


def canvases_of(sizes: Sequence[Size], image_size: int, multi_scale: Sequence[int] | None) -> list[list[Size]]:
    """Per bucket the canvases (height, width), one per scale, that its images fit into."""
    low, high = multi_scale or (image_size, image_size)
    sides = sorted({round(side) for side in np.linspace(low, high, SCALES)})
    found: list[list[Size]] = []
    for bucket in (0, 1):
        ratios = [max(size) / min(size) for size in sizes if bucket_of(size) == bucket]
        ratio = min(max(ratios, default=1.0), MAX_RATIO)
        pairs = [(_up(side), _up(side * ratio)) for side in sides] if ratios else []
        found.append([pair[::-1] if bucket else pair for pair in pairs])
    return found


def _up(side: float) -> int:
    return int(-(-side // DIVISOR) * DIVISOR)


class BucketBatches(StepBatches):
    """:class:`StepBatches` of images of one bucket each: they too depend on the step and the seed alone.

    An epoch has each image at least once: where a bucket does not fill its last batch, its first images come again.

    buckets: of each image.
    """

    def __init__(self, buckets: Sequence[int], *arguments: Any) -> None:
        super().__init__(len(buckets), *arguments)
        self.members = [np.flatnonzero(np.asarray(buckets) == each) for each in sorted(set(buckets))]

    def __iter__(self) -> Iterator[list[int]]:
        counts = [-(-len(own) // self.batch_size) for own in self.members]
        epoch, batches = -1, np.empty((0, self.batch_size), dtype=np.int64)
        for number in self.numbers:
            if number // sum(counts) != epoch:
                epoch = number // sum(counts)
                random = np.random.default_rng([self.seed, epoch])
                rows = [
                    np.resize(random.permutation(own), (count, self.batch_size))
                    for own, count in zip(self.members, counts, strict=True)
                ]
                batches = random.permutation(np.concatenate(rows))
            yield batches[number % sum(counts)].tolist()


@dataclass(frozen=True)
class StaticBatches:
    """Packs a step's batches on the host. With --multi-scale it draws a canvas of the batch's bucket for each.

    pack: a StaticTraining's.
    """

    pack: Any
    settings: Settings

    def __call__(self, batch: Batch, seed: int) -> tuple[Any, ...]:
        """The arguments of a StaticTraining, on the device; the same for the same seed."""
        settings, (images, targets) = self.settings, batch
        canvases = settings.canvases[bucket_of(images[0].shape[1:])]
        drawn = tuple(canvases[np.random.default_rng(seed).integers(len(canvases))])
        packed = self.pack(
            [image.to(settings.dtype) for image in images],
            [{key: each for key, each in target.items() if key != "image_id"} for target in targets],
            canvas=drawn if settings.multi_scale else None,
        )
        return tuple(each.to(settings.torch_device) for each in packed)


def flat(canvases: Sequence[Sequence[Sequence[int]]]) -> list[Size]:
    """All canvases of all buckets."""
    return [(size[0], size[1]) for bucket in canvases for size in bucket]
