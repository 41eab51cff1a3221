# SPDX-License-Identifier: Apache-2.0
"""COCO figures of models in training, each process with its share of the images."""

from __future__ import annotations

import time
from typing import Any

import torch
from coco_data import DetectionData, average_precision, detections_as_coco, of_images
from detector_training import Settings, Track
from processes import Processes
from torch import Tensor
from tqdm import tqdm

EVALUATION_BATCH = 4


@torch.inference_mode()
def evaluate(
    tracks: list[Track], data: DetectionData, budget: float | None, settings: Settings, processes: Processes
) -> tuple[dict[str, dict[str, Any]], dict[int, dict[str, Tensor]]]:
    """COCO figures of every track's averaged weights, and the last track's detections by index of the image.

    After `budget` seconds it ends early: all tracks are then measured on the images seen until there. With several
    processes the figures are the leading one's; detections are those of a process's own images.
    """
    results: dict[str, list[dict[str, Any]]] = {track.name: [] for track in tracks}
    seen: dict[int, dict[str, Tensor]] = {}
    round_size = EVALUATION_BATCH * processes.world
    started = time.monotonic()
    with tqdm(total=len(data), desc="test", unit="image", mininterval=0.5, disable=not processes.leads) as bar:
        for first in range(0, len(data), round_size):
            if first and processes.any(budget is not None and time.monotonic() - started >= budget):
                break
            end = min(first + round_size, len(data))
            own = range(first + processes.rank, end, processes.world)
            # Sharded models are gathered by all processes together: one without a share takes part all the same.
            indices = list(own) or [first]
            items = [data[index] for index in indices]
            images = [image.to(settings.device) for image, _ in items]
            for track in tracks:
                with settings.autocast():
                    found = track.average.model(images)
                if own:
                    for (_, target), each in zip(items, found, strict=True):
                        results[track.name] += detections_as_coco(int(target["image_id"]), each, data.category_ids)
            if own:
                for index, each in zip(indices, found, strict=True):
                    seen[index] = {key: value.cpu() for key, value in each.items() if key != "masks"}
            bar.update(end - first)
    every_index = [index for part in processes.gather(sorted(seen)) for index in part]
    truth = of_images(data.coco(), sorted(every_index))
    figures = {}
    for track in tracks:
        values = [value for part in processes.gather(results[track.name]) for value in part]
        # Crowds of equal scores are ranked by order: that of the images, whichever process had them.
        values.sort(key=lambda value: value["image_id"])
        if processes.leads:
            figures[track.name] = {
                **average_precision(truth, values),
                "images": len(every_index),
                "detections": len(values),
            }
            if settings.model == "mask_rcnn":
                figures[track.name]["masks"] = average_precision(truth, values, "segm")
    return figures, seen
