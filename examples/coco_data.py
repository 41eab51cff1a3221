# SPDX-License-Identifier: Apache-2.0
"""Detection sets in COCO format: items, batches that depend on the step alone, AP and AR."""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from coco_files import DataError, mask_of, read_coco, read_picture
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.ops import box_convert

Item = tuple[Tensor, dict[str, Tensor]]

# How many of an image's proposals their recall is measured on.
PROPOSALS_COUNTED = (10, 100)


class DetectionData(Protocol):
    """A detection set: items as torchvision's detectors take them, and the same annotations as a COCO dict.

    Labels count from 1 (0 is the background); label ``l`` is class ``class_names[l - 1]``, ``category_ids[l - 1]``.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def coco(self) -> dict[str, Any]: ...


class CocoImages(Dataset[Item]):
    """The images of a checked COCO dict. Crowds are for evaluation only.

    masks: whether items have masks, from each annotation's "segmentation", polygons or RLE.
    """

    def __init__(self, coco: dict[str, Any], folder: Path, masks: bool = False) -> None:
        self.folder, self._coco, self.masks = folder, coco, masks
        names = {category["id"]: category["name"] for category in coco["categories"]}
        self.category_ids = tuple(sorted(names))
        self.class_names = tuple(names[category] for category in self.category_ids)
        self._labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self._annotations: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in coco["annotations"]:
            if not annotation["iscrowd"]:
                self._annotations[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self._coco["images"])

    def __getitem__(self, index: int) -> Item:
        """Return an image, float32 ``[3, H, W]`` in 0..1, and its target.

        The target has boxes float32 ``[D, 4]`` as (x1, y1, x2, y2), labels int64 ``[D]``, image_id, and with masks
        also masks uint8 ``[D, H, W]``.
        """
        entry = self._coco["images"][index]
        image = read_picture(self.folder / entry["file_name"])
        kept = self._annotations[entry["id"]]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        target = {
            "boxes": box_convert(boxes, "xywh", "xyxy"),
            "labels": torch.tensor([self._labels[a["category_id"]] for a in kept], dtype=torch.int64),
            "image_id": torch.tensor(entry["id"]),
        }
        if self.masks:
            size = (image.shape[1], image.shape[2])
            drawn = [torch.from_numpy(mask_of(annotation["segmentation"], size)) for annotation in kept]
            target["masks"] = torch.stack(drawn) if drawn else torch.zeros((0, *size), dtype=torch.uint8)
        return image, target

    def coco(self) -> dict[str, Any]:
        return self._coco

    def at(self, indices: Iterable[int]) -> CocoImages:
        return CocoImages(of_images(self._coco, indices), self.folder, self.masks)


def load_coco(
    annotations: Path, folder: Path, masks: bool = False, workers: int = 0, quiet: bool = False
) -> CocoImages:
    """The images of a file, checked; for the options see :func:`coco_files.read_coco`."""
    return CocoImages(read_coco(annotations, folder, masks, workers, quiet), folder, masks)


def split_coco(
    annotations: Path, folder: Path, masks: bool, seed: int, workers: int = 0, quiet: bool = False
) -> tuple[CocoImages, CocoImages]:
    """Training and test sets of one COCO file: the seed picks one image in five to hold out for testing."""
    data = load_coco(annotations, folder, masks, workers, quiet)
    if len(data) < 2:
        raise DataError(f"{annotations} must have at least 2 images, one for each split, got {len(data)}")
    order = np.random.default_rng(seed).permutation(len(data)).tolist()
    count = min(max(1, round(len(data) / 5)), len(data) - 1)
    return data.at(sorted(order[count:])), data.at(sorted(order[:count]))


def of_images(coco: dict[str, Any], indices: Iterable[int]) -> dict[str, Any]:
    """The part of a COCO dict that is about the images at these places."""
    images = [coco["images"][index] for index in indices]
    ids = {image["id"] for image in images}
    return {**coco, "images": images, "annotations": [a for a in coco["annotations"] if a["image_id"] in ids]}


class StepBatches(Sampler[list[int]]):
    """Indices of one process's batches, `accumulate` per step, for these consecutive steps of shuffled epochs.

    A step takes ``batch_size * accumulate * world`` images. They depend on that product, the length, the seed and the
    step alone: a resumed run takes the same images, and two processes take those of one that accumulates twice. Batch
    b of a step belongs to process ``b % world``.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int, steps: range, accumulate: int = 1, rank: int = 0, world: int = 1
    ) -> None:
        self.length, self.batch_size, self.seed = length, batch_size, seed
        first, last = (step * accumulate * world + rank for step in (steps.start, steps.stop))
        self.numbers = range(first, last, world)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for number in self.numbers:
            batch = []
            for place in range(number * self.batch_size, (number + 1) * self.batch_size):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                batch.append(int(order[place % self.length]))
            yield batch


def collate(items: list[Item]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """A batch is two lists, because images differ in size."""
    return [image for image, _ in items], [target for _, target in items]


def proposals_as_coco(image_id: int, boxes: Tensor, category_ids: tuple[int, ...]) -> list[dict[str, Any]]:
    """The first of an image's proposals ``[P, 4]``, best first, as COCO results.

    Proposals have no class; they take the set's first, because pycocotools leaves out unknown ones.
    """
    ranks = torch.arange(min(PROPOSALS_COUNTED[-1], len(boxes)))
    found = {"boxes": boxes[: len(ranks)], "labels": torch.ones_like(ranks), "scores": -ranks}
    return detections_as_coco(image_id, found, category_ids)


def detections_as_coco(
    image_id: int, detections: dict[str, Tensor], category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A detector's output for one image as COCO results: boxes ``[D, 4]`` become (x, y, width, height).

    Masks ``[D, 1, H, W]``, if there are any, become the RLE of the pixels above one half.
    """
    boxes = box_convert(detections["boxes"].float(), "xyxy", "xywh").tolist()
    found = zip(boxes, detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    results: list[dict[str, Any]] = [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in found
    ]
    if "masks" in detections:
        for result, mask in zip(results, (detections["masks"][:, 0] > 0.5).cpu().numpy(), strict=True):
            result["segmentation"] = encode_mask(mask)
    return results


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """bool ``[H, W]`` as COCO's compressed RLE, with text that JSON can hold."""
    encoded = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(encoded["size"]), "counts": encoded["counts"].decode("ascii")}


def average_precision(
    coco: dict[str, Any], results: list[dict[str, Any]], kind: str = "bbox"
) -> dict[str, float | None]:
    """COCO's AP of boxes ("bbox") or masks ("segm"), by pycocotools; None where the set has no object of a size."""
    names = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR_100": 8}
    if not results:
        # pycocotools cannot take an empty list.
        return dict.fromkeys(names, 0.0)
    # Where a result has a box, pycocotools takes the box's area for the mask's.
    kept = [{key: result[key] for key in result if kind == "bbox" or key != "bbox"} for result in results]
    stats = _evaluate(coco, kept, kind, by_class=True).stats
    return {name: float(stats[place]) if stats[place] >= 0 else None for name, place in names.items()}


def average_recall(coco: dict[str, Any], proposals: list[dict[str, Any]]) -> dict[str, float | None]:
    """COCO's AR of each image's first 10 and 100 boxes, of any class; None where the set has no object of a size.

    This is how the FPN paper measures a region proposal network (Lin et al., 2017, Table 1).
    """
    names = [f"AR_{count}{size}" for count in PROPOSALS_COUNTED for size in ("", "_small", "_medium", "_large")]
    if not proposals:
        return dict.fromkeys(names, 0.0)
    # Overlap thresholds, one class, sizes, counts.
    recall = _evaluate(coco, proposals, "bbox", by_class=False).eval["recall"][:, 0, :, 1:]
    values = recall.mean(axis=0).T.ravel().tolist()
    return {name: value if value >= 0 else None for name, value in zip(names, values, strict=True)}


def _evaluate(coco: dict[str, Any], results: list[dict[str, Any]], kind: str, *, by_class: bool) -> COCOeval:
    truth = COCO()
    truth.dataset = coco
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.params.useCats = int(by_class)
        evaluation.params.maxDets = [1, *PROPOSALS_COUNTED]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation
