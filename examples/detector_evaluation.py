# SPDX-License-Identifier: Apache-2.0
"""COCO figures of models in training, each process with its share of the images."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from coco_data import (
    DetectionData,
    average_precision,
    average_recall,
    detections_as_coco,
    of_images,
    proposals_as_coco,
)
from detector_models import TWO_STAGE
from detector_training import Settings, Track
from processes import Processes
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes
from tqdm import tqdm

EVALUATION_BATCH = 4


@torch.inference_mode()
def evaluate(
    tracks: list[Track], data: DetectionData, budget: float | None, settings: Settings, processes: Processes
) -> tuple[dict[str, dict[str, Any]], dict[int, dict[str, Tensor]]]:
    """COCO figures of every track's averaged weights, and the last track's detections by index of the image.

    Of two stages the first's proposals have figures too, under "proposals": AR, as :func:`coco_data.average_recall`.
    After `budget` seconds it ends early: all tracks are then measured on the images seen until there. With several
    processes the figures are the leading one's; detections are those of a process's own images.
    """
    results: dict[str, list[dict[str, Any]]] = {track.name: [] for track in tracks}
    proposals: dict[str, list[dict[str, Any]]] = {track.name: [] for track in tracks}
    seen: dict[int, dict[str, Tensor]] = {}
    round_size = EVALUATION_BATCH * processes.world
    started = time.monotonic()
    bar = tqdm(total=len(data), desc="test", unit="image", mininterval=0.5, disable=not processes.leads)
    with bar, ExitStack() as stack:
        proposed = {track.name: stack.enter_context(_proposals(track.average.model)) for track in tracks}
        for first in range(0, len(data), round_size):
            if first and processes.any(budget is not None and time.monotonic() - started >= budget):
                break
            end = min(first + round_size, len(data))
            own = range(first + processes.rank, end, processes.world)
            # Sharded models are gathered by all processes together: one without a share takes part all the same.
            indices = list(own) or [first]
            items = [data[index] for index in indices]
            images = [image.to(settings.device, settings.dtype) for image, _ in items]
            for track in tracks:
                with settings.autocast():
                    found = track.average.model(images)
                if own:
                    ids = [int(target["image_id"]) for _, target in items]
                    for image_id, each in zip(ids, found, strict=True):
                        results[track.name] += detections_as_coco(image_id, each, data.category_ids)
                    # None of a model without proposals.
                    for image_id, image, (boxes, size) in zip(ids, images, proposed[track.name], strict=False):
                        boxes = resize_boxes(boxes, size, image.shape[-2:])
                        proposals[track.name] += proposals_as_coco(image_id, boxes, data.category_ids)
            if own:
                for index, each in zip(indices, found, strict=True):
                    seen[index] = {key: value.cpu() for key, value in each.items() if key != "masks"}
            bar.update(end - first)
    every_index = [index for part in processes.gather(sorted(seen)) for index in part]
    truth = of_images(data.coco(), sorted(every_index))
    figures = {}
    for track in tracks:
        values = [value for part in processes.gather(results[track.name]) for value in part]
        boxes = [value for part in processes.gather(proposals[track.name]) for value in part]
        # Crowds of equal scores are ranked by order: that of the images, whichever process had them.
        values.sort(key=lambda value: value["image_id"])
        if processes.leads:
            figures[track.name] = {
                **average_precision(truth, values),
                "images": len(every_index),
                "detections": len(values),
            }
            if settings.model in TWO_STAGE:
                figures[track.name]["proposals"] = average_recall(truth, boxes)
            if settings.model == "mask_rcnn":
                figures[track.name]["masks"] = average_precision(truth, values, "segm")
    return figures, seen


@contextmanager
def _proposals(model: nn.Module) -> Iterator[list[tuple[Tensor, list[int]]]]:
    """A list that holds, after each call of `model`, each image's proposals, best first, and the size they are for;
    nothing of a model without proposals."""
    found: list[tuple[Tensor, list[int]]] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[list[Tensor], Any]) -> None:
        found[:] = zip(outputs[0], inputs[0].image_sizes, strict=True)

    if not hasattr(model, "rpn"):
        yield found
        return
    hook = model.rpn.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()
