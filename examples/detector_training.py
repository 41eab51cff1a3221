# SPDX-License-Identifier: Apache-2.0
"""What a run's losses depend on, and its training step: accumulated, in mixed precision, over several processes."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from detector_models import build_detector
from processes import Processes, distributed, gradients_exchanged, shard_in_place, whole
from static_batches import MAX_TARGETS, StaticBatches, canvases_of, flat
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxFormat

# Images, float32 [3, H, W] each, and their targets: boxes float32 [D, 4], labels int64 [D], maybe masks [D, H, W].
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

# Steps until the learning rate reaches its full value, and until it begins to fall with the square root of the step.
WARMUP_STEPS = 20
CONSTANT_STEPS = 1000
# The evaluated weights average about the last tenth of the steps, at most this many: over 150 steps that doubled AP in
# seven of eight trials, and over thousands it removes the effect of the last few images.
AVERAGED_STEPS = 1000
# What a random stream is for: with one of these in the seed, two streams of one step differ.
LOSS_STREAM, FLIP_STREAM, CANVAS_STREAM = 0, 1, 2


class TrainingError(Exception):
    """Training that cannot continue; the message is one line."""


class Settings(argparse.Namespace):
    """The command line, and what a run's losses depend on besides: device, classes and batches per step."""

    # Options that a resumed run may change: its losses do not depend on them, or only on what they lead to.
    CHANGEABLE = (
        *("steps", "time_budget", "checkpoint_every", "evaluate_every", "eval_images", "coco_test", "workers"),
        *("backend", "compare", "deterministic", "device", "threads", "fsdp", "accumulate", "compile"),
        *("output", "resume", "tensorboard"),
    )

    def complete(
        self, processes: Processes, class_names: tuple[str, ...], sizes: Sequence[tuple[int, int]] = ()
    ) -> Settings:
        """Add what the command line does not say; return self. sizes: (height, width) of each training image."""
        self.torch_device, self.class_names = processes.device, class_names
        if self.static:
            self.canvases = canvases_of(sizes, self.image_size, self.multi_scale)
        # Batches of batch_size per optimiser step, over all processes and accumulations.
        self.batches_per_step = self.accumulate * processes.world
        return self

    def plain(self) -> dict[str, Any]:
        """The settings as JSON values; paths and devices become text."""
        return json.loads(json.dumps(vars(self), default=str))

    def fingerprint(self) -> dict[str, Any]:
        """The values that a resumed run must share with the checkpoint."""
        return {key: value for key, value in self.plain().items() if key not in (*self.CHANGEABLE, "torch_device")}

    def autocast(self) -> torch.autocast:
        """bfloat16 on a CPU, float16 on a GPU; disabled without --amp."""
        dtype = torch.float16 if self.torch_device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.torch_device.type, dtype, enabled=self.amp)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, images and boxes."""
        return torch.float64 if self.float64 else torch.float32

    def synchronize(self) -> None:
        if self.torch_device.type == "cuda":
            torch.cuda.synchronize(self.torch_device)

    def learning_rate_at(self, step: int) -> float:
        """A function of the step alone: a resumed run may raise --steps."""
        decay = min(1.0, math.sqrt(CONSTANT_STEPS / (step + 1)))
        decay *= 0.1 ** sum(step >= drop for drop in self.lr_steps)
        return self.lr * min(1.0, (step + 1) / WARMUP_STEPS) * decay

    def random_stream(self, purpose: int, step: int, place: int) -> int:
        """The seed of a step's place-th batch: the same for every model, after a resume, and in any process."""
        return int(np.random.SeedSequence([self.seed, purpose, step, place]).generate_state(1)[0])


def build_model(settings: Settings) -> nn.Module:
    """The detector of these settings, with random or pretrained weights, on the CPU."""
    names = ("norm", "frozen_stages", "pretrained", "pyramid", "heads", "channels", "multi_scale")
    options = {name: getattr(settings, name) for name in names}
    return build_detector(settings.model, settings.backbone, len(settings.class_names), settings.image_size, **options)


def to_device(batch: Batch, settings: Settings) -> Batch:
    """The batch on the device, images and boxes in the dtype of training; labels and masks stay integers."""

    def moved(value: Tensor) -> Tensor:
        return value.to(settings.torch_device, settings.dtype if value.is_floating_point() else value.dtype)

    images, targets = batch
    return [moved(image) for image in images], [{key: moved(each) for key, each in t.items()} for t in targets]


def flipped(batch: Batch, step: int, place: int, settings: Settings) -> Batch:
    """Mirror each image, its boxes and masks with probability 1/2; without --flip return the batch as it is."""
    if not settings.flip:
        return batch
    coins = np.random.default_rng(settings.random_stream(FLIP_STREAM, step, place)).random(len(batch[0])) < 0.5
    images, targets = list(batch[0]), list(batch[1])
    for i in np.flatnonzero(coins):
        boxes, size = targets[i]["boxes"], tuple(images[i].shape[-2:])
        mirrored = {key: F.horizontal_flip(value) for key, value in targets[i].items() if key == "masks"}
        mirrored["boxes"] = F.horizontal_flip_bounding_boxes(boxes, BoundingBoxFormat.XYXY, size)
        images[i], targets[i] = F.horizontal_flip(images[i]), targets[i] | mirrored
    return images, targets


def losses_of(
    model: nn.Module, batch: tuple[Any, ...], step: int, settings: Settings, place: int = 0
) -> dict[str, Tensor]:
    # Anchors and proposals are sampled at random: one stream per batch.
    torch.manual_seed(settings.random_stream(LOSS_STREAM, step, place))
    with settings.autocast():
        return model(*batch)


@dataclass
class Track:
    """One model in training, "eager" or "fused", with its optimiser and its measurements, one entry per step."""

    name: str
    model: nn.Module
    # The model to call in training: the same, or DistributedDataParallel around it.
    called: nn.Module
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    processes: Processes
    # accelerate()'s report; None for eager.
    swapped: Any = None
    # With --static.
    packed: StaticBatches | None = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    # Seconds per image of the last evaluation.
    test_seconds: float = 0.0
    # Of the last step: losses by name, and the norm of the gradient before it was clipped.
    parts: dict[str, float] = field(default_factory=dict)

    def step(self, batches: list[Batch], step: int, settings: Settings) -> None:
        """Take one optimiser step on this process's batches of (images, targets).

        The step's loss is the mean over all batches of all processes. The step reads the losses at its end, in one host
        synchronisation: a loss that is not finite has then spoilt the weights, but no checkpoint.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        places = [i * self.processes.world + self.processes.rank for i in range(len(batches))]
        on_device: list[Any] = [
            to_device(batch, settings)
            if self.packed is None
            else self.packed(batch, settings.random_stream(CANVAS_STREAM, step, place))
            for place, batch in zip(places, batches, strict=True)
        ]
        settings.synchronize()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        names: list[str] = []
        values: list[Tensor] = []
        for place, batch in zip(places, on_device, strict=True):
            with gradients_exchanged(self.called, place == places[-1]):
                parts = losses_of(self.called, batch, step, settings, place)
                names, stacked = list(parts), torch.stack([part.float() for part in parts.values()])
                self.scaler.scale(stacked.sum() / len(batches)).backward()
            values.append(stacked.detach())
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_gradient_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.multi_avg_fn = get_ema_multi_avg_fn(1 - max(9 / (step + 10), 1 / AVERAGED_STEPS))
        self.average.update_parameters(self.model)
        *rows, (gradient_norm, *_) = torch.stack([*values, norm.float().expand(len(names))]).tolist()
        settings.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self._check_finite(rows, names, batches, step)
        totals = self.processes.sum([math.fsum(part) for part in zip(*rows, strict=True)])
        self.parts = {name: total / settings.batches_per_step for name, total in zip(names, totals, strict=True)}
        self.losses.append(math.fsum(self.parts.values()))
        self.parts["gradient_norm"] = gradient_norm

    def _check_finite(self, rows: list[list[float]], names: list[str], batches: list[Batch], step: int) -> None:
        """Stop all processes if a loss of any is not finite, and name the images in every one of them."""
        if not self.processes.any(not all(math.isfinite(value) for row in rows for value in row)):
            return
        bad = [
            f"images {', '.join(str(int(target['image_id'])) for target in targets)}: "
            + ", ".join(f"{name} {value:.3g}" for name, value in zip(names, row, strict=True))
            for (_, targets), row in zip(batches, rows, strict=True)
            if not all(map(math.isfinite, row))
        ]
        shown = "; ".join(self.processes.gather(bad))
        raise TrainingError(
            f"the {self.name} model's loss is not finite at step {step + 1} ({shown}); the last checkpoint is of an "
            "earlier step. Lower --lr, or look at these images"
        )


def new_tracks(names: list[str], settings: Settings, processes: Processes) -> list[Track]:
    """A track per name, all with equal weights; in "fused" ones fpn_fast replaces the modules that it has."""
    torch.manual_seed(settings.seed)
    initial = build_model(settings)
    tracks = []
    for name in names:
        model = copy.deepcopy(initial).to(settings.torch_device, settings.dtype).train()
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        swapped = packed = None
        if name == "fused":
            import fpn_fast

            swapped = fpn_fast.accelerate(model)
            if settings.static_sampling:
                from fpn_fast.nn.static_sampling import use_static_sampling

                use_static_sampling(model)
        average = AveragedModel(model, use_buffers=True).requires_grad_(False).eval()
        trainee = model
        if settings.static:
            options = {"max_targets": MAX_TARGETS, "too_many": "largest"}
            trainee = fpn_fast.StaticTraining(model, flat(settings.canvases), settings.batch_size, **options)
            packed = StaticBatches(trainee.pack, settings)
            if settings.compile:
                trainee.compile()
        called = distributed(trainee, processes, settings.fsdp)
        if settings.fsdp:
            shard_in_place(average.module, processes)
        # One pass over the weights instead of eight: 0.02 s per step instead of 0.11 on two CPU cores.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=1e-4, fused=True)
        # Only float16 needs scaled gradients.
        device = settings.torch_device.type
        scaler = torch.amp.GradScaler(device, enabled=settings.amp and device == "cuda")
        tracks.append(Track(name, model, called, average, optimizer, scaler, processes, swapped, packed=packed))
    return tracks


@contextlib.contextmanager
def interrupts() -> Iterator[list[int]]:
    """In the block the first Ctrl-C only fills the list: the step ends before the checkpoint is written."""
    seen: list[int] = []

    def note(number: int, _: object) -> None:
        seen.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)


def be_deterministic() -> None:
    """Allow only algorithms that repeat bit for bit; an operation without one raises."""
    # cuBLAS needs it, and reads it when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
