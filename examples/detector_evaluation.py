# SPDX-License-Identifier: Apache-2.0
"""COCO figures of models in training, of which each process evaluates its share, and the logs of a run."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from coco_data import DetectionData, average_precision, average_recall, detections_as_coco, of_images, proposals_as_coco
from detector_training import Settings, Track
from processes import Processes, Progress, UsageError
from torch import Tensor, nn
from torchvision.models.detection.transform import resize_boxes

EVALUATION_BATCH = 4


@torch.inference_mode()
def evaluate(
    tracks: list[Track], data: DetectionData, budget: float | None, settings: Settings
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[int, dict[str, Tensor]]]]:
    """Return COCO figures of every track's averaged weights, and its detections by index of the image.

    The proposals of a two-stage detector have figures too, under "proposals": see :func:`coco_data.average_recall`.
    After `budget` seconds evaluation ends early, with the figures of the images seen. With several processes the
    figures are the leading one's; a process has the detections of its own images.
    """
    results: dict[str, list[dict[str, Any]]] = defaultdict(list)
    proposals: dict[str, list[dict[str, Any]]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    seen: dict[str, dict[int, dict[str, Tensor]]] = {track.name: {} for track in tracks}
    processes = tracks[0].processes
    round_size = EVALUATION_BATCH * processes.world
    started = time.monotonic()
    bar = Progress("testing", "image", len(data), limit=budget, disable=not processes.leads)
    with bar, ExitStack() as stack:
        proposed = {track.name: stack.enter_context(_proposals(track.average.module)) for track in tracks}
        for first in range(0, len(data), round_size):
            if first and processes.any(budget is not None and time.monotonic() - started >= budget):
                break
            end = min(first + round_size, len(data))
            own = range(first + processes.rank, end, processes.world)
            # All processes gather sharded models together: one without a share runs its model all the same.
            items = [data[index] for index in own or [first]]
            images = [image.to(settings.torch_device, settings.dtype) for image, _ in items]
            for track in tracks:
                settings.synchronize()
                began = time.perf_counter()
                with settings.autocast():
                    found = track.average.module(images)
                settings.synchronize()
                seconds[track.name] += time.perf_counter() - began
                for place, (index, each) in enumerate(zip(own, found, strict=False)):
                    image_id = int(items[place][1]["image_id"])
                    results[track.name] += detections_as_coco(image_id, each, data.category_ids)
                    seen[track.name][index] = {key: value.cpu() for key, value in each.items() if key != "masks"}
                    if proposed[track.name]:
                        boxes, size = proposed[track.name][place]
                        boxes = resize_boxes(boxes, size, images[place].shape[-2:])
                        proposals[track.name] += proposals_as_coco(image_id, boxes, data.category_ids)
            bar.update(end - first)
    every_index = sorted(processes.gather(list(seen[tracks[0].name])))
    truth = of_images(data.coco(), every_index)
    figures: dict[str, dict[str, Any]] = {}
    for track in tracks:
        track.test_seconds = seconds[track.name] / max(1, len(seen[track.name]))
        values, boxes = processes.gather(results[track.name]), processes.gather(proposals[track.name])
        if not processes.leads:
            continue
        # Equal scores are ranked by order: that of the images, whichever process had them.
        values.sort(key=lambda value: value["image_id"])
        counts = {"images": len(every_index), "detections": len(values)}
        figures[track.name] = {**average_precision(truth, values), **counts}
        if hasattr(track.model, "rpn"):
            figures[track.name]["proposals"] = average_recall(truth, boxes)
        if settings.model == "mask_rcnn":
            figures[track.name]["masks"] = average_precision(truth, values, "segm")
    return figures, seen


@contextmanager
def _proposals(model: nn.Module) -> Iterator[list[tuple[Tensor, list[int]]]]:
    """A list that each call of `model` fills: per image its proposals, best first, and the size that they are for.

    The list stays empty for a one-stage detector.
    """
    found: list[tuple[Tensor, list[int]]] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...], outputs: tuple[list[Tensor], Any]) -> None:
        found[:] = zip(outputs[0], inputs[0].image_sizes, strict=True)

    with model.rpn.register_forward_hook(keep) if hasattr(model, "rpn") else nullcontext():
        yield found


class Logs:
    """Scalars by step: losses, gradient norm, learning rate, images per second, AP. The leading process writes them."""

    def __init__(self, settings: Settings, processes: Processes) -> None:
        # An entry per evaluation before the last: the step, and each track's figures by its name.
        self.history: list[dict[str, Any]] = []
        self._writer = None
        if not settings.tensorboard or not processes.leads:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise UsageError(f"--tensorboard needs a package: pip install tensorboard ({error})") from error
        self._writer = SummaryWriter(settings.output / "tensorboard")

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, track: Track, step: int, settings: Settings) -> None:
        images, rate = settings.batch_size * settings.batches_per_step, settings.learning_rate_at(step)
        self._write(track.name, "train", {"loss": track.losses[-1], **track.parts, "learning_rate": rate}, step)
        self._write(track.name, "speed", {"images_per_second": images / track.seconds[-1]}, step)

    def test(self, figures: dict[str, dict[str, Any]], step: int) -> None:
        """Log every track's figures after the step; they are empty in processes that do not lead."""
        self.history.append({"step": step + 1, **figures})
        for name, found in figures.items():
            self._write(name, "test", found, step)
            for part in ("masks", "proposals"):
                self._write(name, "test", {f"{part}_{key}": each for key, each in found.get(part, {}).items()}, step)

    def _write(self, name: str, group: str, values: dict[str, Any], step: int) -> None:
        for key, value in values.items():
            if self._writer is not None and isinstance(value, float):
                self._writer.add_scalar(f"{group}/{key}/{name}", value, step + 1)
