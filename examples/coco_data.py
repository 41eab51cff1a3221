# SPDX-License-Identifier: Apache-2.0
"""Detection sets in COCO format: reading them with checks, batches that depend on the step alone, AP."""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from torchvision.transforms.v2 import functional as F

Item = tuple[Tensor, dict[str, Tensor]]


class DataError(Exception):
    """Annotations or images that cannot be used; the message is one line that says which and why."""


class DetectionData(Protocol):
    """A detection set: items as torchvision's detectors take them, and the same annotations as a COCO dict.

    Labels count from 1 (0 is the background); label ``l`` is class ``class_names[l - 1]``, ``category_ids[l - 1]``.
    """

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Item: ...
    def coco(self) -> dict[str, Any]: ...
    def first(self, count: int) -> DetectionData: ...


def read_annotations(path: Path) -> dict[str, Any]:
    """A COCO file as a dict whose images, categories and annotations are known to hold what training needs."""
    try:
        coco = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    if not isinstance(coco, dict):
        raise DataError(f"{path} must hold a JSON object, got a {type(coco).__name__}")
    for key in ("images", "annotations", "categories"):
        if not isinstance(coco.get(key), list):
            raise DataError(f"{path} has no list {key!r}")
    _check_entries(path, coco["images"], "images", {"id": int, "file_name": str})
    _check_entries(path, coco["categories"], "categories", {"id": int, "name": str})
    _check_entries(path, coco["annotations"], "annotations", {"image_id": int, "category_id": int, "bbox": list})
    for key in ("images", "categories"):
        if len({entry["id"] for entry in coco[key]}) < len(coco[key]):
            raise DataError(f"{path}: {key} must have distinct ids")
        if not coco[key]:
            raise DataError(f"{path} has no {key}")
    known = {"image_id": {i["id"] for i in coco["images"]}, "category_id": {c["id"] for c in coco["categories"]}}
    for i, annotation in enumerate(coco["annotations"]):
        box = annotation["bbox"]
        if len(box) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
            raise DataError(f"{path}: annotations[{i}]: bbox must be 4 finite numbers, got {box}")
        for key, ids in known.items():
            if annotation[key] not in ids:
                raise DataError(f"{path}: annotations[{i}]: {key} {annotation[key]} is not in the file")
    return coco


def _check_entries(path: Path, entries: list[Any], name: str, keys: dict[str, type]) -> None:
    for i, entry in enumerate(entries):
        for key, kind in keys.items():
            if not isinstance(entry, dict) or key not in entry:
                raise DataError(f"{path}: {name}[{i}] has no {key!r}")
            if not isinstance(entry[key], kind) or isinstance(entry[key], bool):
                raise DataError(f"{path}: {name}[{i}]: {key!r} must be {kind.__name__}, got {entry[key]!r}")


class CocoImages(Dataset[Item]):
    """The images of a checked COCO dict. Boxes are clipped to their image; crowds are for evaluation only."""

    def __init__(self, coco: dict[str, Any], folder: Path) -> None:
        self.folder, self._coco = folder, coco
        self.category_ids = tuple(sorted(category["id"] for category in coco["categories"]))
        names = {category["id"]: category["name"] for category in coco["categories"]}
        self.class_names = tuple(names[category] for category in self.category_ids)
        self._labels = {category: label for label, category in enumerate(self.category_ids, start=1)}
        self._boxes: dict[int, list[dict[str, Any]]] = defaultdict(list)
        for annotation in coco["annotations"]:
            self._boxes[annotation["image_id"]].append(annotation)

    def __len__(self) -> int:
        return len(self._coco["images"])

    def __getitem__(self, index: int) -> Item:
        """image float32 ``[3, H, W]`` in 0..1; boxes float32 ``[D, 4]`` as (x1, y1, x2, y2), labels int64 ``[D]``."""
        entry = self._coco["images"][index]
        try:
            with Image.open(self.folder / entry["file_name"]) as file:
                pixels = F.pil_to_tensor(file.convert("RGB"))
        except OSError as error:
            raise DataError(f"cannot read image {self.folder / entry['file_name']}: {error}") from error
        kept = [annotation for annotation in self._boxes[entry["id"]] if not annotation["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in kept], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = torch.tensor([self._labels[a["category_id"]] for a in kept], dtype=torch.int64)
        image = F.to_dtype(pixels, torch.float32, scale=True)
        return image, {"boxes": boxes, "labels": labels, "image_id": torch.tensor(entry["id"])}

    def coco(self) -> dict[str, Any]:
        return self._coco

    def first(self, count: int) -> CocoImages:
        """The set of the first ``count`` images."""
        return CocoImages(_subset(self._coco, list(range(min(count, len(self))))), self.folder)


def load_coco(annotations: Path, folder: Path, held_out: float = 0.2, seed: int = 0) -> tuple[CocoImages, CocoImages]:
    """Train and test sets of one COCO file: a seeded share of its images is held out for the test split."""
    coco = _complete(read_annotations(annotations), annotations, folder)
    images = coco["images"]
    if len(images) < 2:
        raise DataError(f"{annotations} must have at least 2 images, one for each split, got {len(images)}")
    order = np.random.default_rng(seed).permutation(len(images)).tolist()
    count = min(max(1, round(len(images) * held_out)), len(images) - 1)
    test, train = (_subset(coco, sorted(part)) for part in (order[:count], order[count:]))
    if not any(not annotation["iscrowd"] for annotation in train["annotations"]):
        raise DataError(f"{annotations} leaves no box to learn from in the train split")
    return CocoImages(train, folder), CocoImages(test, folder)


def _complete(coco: dict[str, Any], path: Path, folder: Path) -> dict[str, Any]:
    """The same dict with every image's file found and size known, boxes clipped, and what COCO lets out filled in."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a directory of images")
    images = {}
    for image in coco["images"]:
        file = folder / image["file_name"]
        try:
            with Image.open(file) as opened:
                images[image["id"]] = {**image, "width": opened.width, "height": opened.height}
        except FileNotFoundError as error:
            raise DataError(f"image {image['file_name']} of {path} is not in {folder}") from error
        except OSError as error:
            raise DataError(f"cannot read image {file}: {error}") from error
    annotations: list[dict[str, Any]] = []
    for annotation in coco["annotations"]:
        x, y, width, height = annotation["bbox"]
        image = images[annotation["image_id"]]
        x1, y1 = max(0.0, x), max(0.0, y)
        x2, y2 = min(image["width"], x + width), min(image["height"], y + height)
        if x2 <= x1 or y2 <= y1:
            continue
        area = annotation.get("area")
        filled = {
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": area if isinstance(area, int | float) else (x2 - x1) * (y2 - y1),
            "iscrowd": 1 if annotation.get("iscrowd") else 0,
        }
        annotations.append({**annotation, **filled, "id": len(annotations) + 1})
    dropped = len(coco["annotations"]) - len(annotations)
    if dropped:
        print(f"warning: {dropped} of {path}'s boxes have no area inside their image; dropped", file=sys.stderr)
    return {"info": {}, "images": [*images.values()], "annotations": annotations, "categories": coco["categories"]}


def _subset(coco: dict[str, Any], indices: list[int]) -> dict[str, Any]:
    images = [coco["images"][index] for index in indices]
    ids = {image["id"] for image in images}
    return {**coco, "images": images, "annotations": [a for a in coco["annotations"] if a["image_id"] in ids]}


class StepBatches(Sampler[list[int]]):
    """Indices of one batch a step, from ``first`` to ``last - 1``: shuffled epochs, cut into batches.

    A step's batch depends on (length, batch size, seed, step) alone, so a resumed run sees what it would have seen.
    """

    def __init__(self, length: int, batch_size: int, seed: int, first: int, last: int) -> None:
        self.length, self.batch_size, self.seed, self.first, self.last = length, batch_size, seed, first, last

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, np.empty(0, dtype=np.int64)
        for step in range(self.first, self.last):
            batch = []
            for place in range(step * self.batch_size, (step + 1) * self.batch_size):
                if place // self.length != epoch:
                    epoch = place // self.length
                    order = np.random.default_rng([self.seed, epoch]).permutation(self.length)
                batch.append(int(order[place % self.length]))
            yield batch


def collate(items: list[Item]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images differ in size, so a batch is two lists."""
    return [image for image, _ in items], [target for _, target in items]


def detections_as_coco(
    image_id: int, detections: dict[str, Tensor], category_ids: tuple[int, ...]
) -> list[dict[str, Any]]:
    """A detector's answer for one image as COCO results: boxes ``[D, 4]`` become (x, y, width, height)."""
    boxes = detections["boxes"].float().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    found = zip(boxes.tolist(), detections["labels"].tolist(), detections["scores"].tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": category_ids[label - 1], "bbox": box, "score": score}
        for box, label, score in found
    ]


def average_precision(coco: dict[str, Any], results: list[dict[str, Any]]) -> dict[str, float | None]:
    """COCO's AP of results, by pycocotools; None where the set has no box of that size."""
    names = {"AP": 0, "AP50": 1, "AP75": 2, "AP_small": 3, "AP_medium": 4, "AP_large": 5, "AR_100": 8}
    truth = COCO()
    truth.dataset = coco
    # pycocotools prints its progress.
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        if not results:
            # loadRes cannot take an empty list; a detector that finds nothing has no precision.
            return dict.fromkeys(names, 0.0)
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = {name: float(evaluation.stats[place]) for name, place in names.items()}
    return {name: value if value >= 0 else None for name, value in values.items()}
