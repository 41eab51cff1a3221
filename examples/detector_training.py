# SPDX-License-Identifier: Apache-2.0
"""What a run's losses depend on, and its training step: accumulated, mixed in precision, over many processes."""

from __future__ import annotations

import argparse
import copy
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import numpy as np
import torch
from detector_models import build_detector
from processes import Processes, distributed, gradients_exchanged, local, shard_in_place, whole
from torch import Tensor, nn
from torchvision.transforms.v2 import functional as F

# Images, float32 [3, H, W] each, and their targets: boxes float32 [D, 4], labels int64 [D], maybe masks [D, H, W].
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

# Steps until the learning rate is at its full value, and until it begins to fall with the square root of the step.
WARMUP_STEPS = 20
CONSTANT_STEPS = 1000
# The evaluated weights average about the last tenth of the steps, at most this many: over 150 steps that doubled AP in
# seven of eight trials, and over thousands it takes out what the last few pictures did.
AVERAGED_STEPS = 1000
# What a random stream is for: one of these beside the seed keeps streams of one step apart.
LOSS_STREAM, FLIP_STREAM = 0, 1


class TrainingError(Exception):
    """Training that cannot go on; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """What a run's losses depend on, besides the number of steps, the backend and how processes share the work."""

    device: torch.device
    data: str
    class_names: tuple[str, ...]
    model: str
    backbone: str
    pyramid: str
    heads: str
    channels: int
    norm: str
    frozen_stages: int
    pretrained: bool
    image_size: int
    multi_scale: tuple[int, int] | None
    flip: bool
    batch_size: int
    # Batches of batch_size that one optimiser step takes in, over all processes and accumulations.
    batches_per_step: int
    learning_rate: float
    learning_rate_steps: tuple[int, ...]
    max_gradient_norm: float
    amp: bool
    float64: bool
    channels_last: bool
    static_sampling: bool
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace, processes: Processes, class_names: tuple[str, ...]) -> Settings:
        same = (
            "model",
            "backbone",
            "pyramid",
            "channels",
            "heads",
            "norm",
            "frozen_stages",
            "pretrained",
            "image_size",
            "flip",
        )
        same += ("batch_size", "max_gradient_norm", "amp", "float64", "channels_last", "static_sampling", "seed")
        return cls(
            device=processes.device,
            data=f"digits, {args.train_images} pictures" if args.coco is None else str(args.coco[0]),
            class_names=class_names,
            multi_scale=None if args.multi_scale is None else tuple(args.multi_scale),
            batches_per_step=args.accumulate * processes.world,
            learning_rate=args.lr,
            learning_rate_steps=tuple(args.lr_steps),
            **{name: getattr(args, name) for name in same},
        )

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that must be equal for a checkpoint to be gone on from."""
        values = {key: value for key, value in vars(self).items() if key != "device"}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}

    def autocast(self) -> torch.autocast:
        """bfloat16 on a CPU, float16 on CUDA; disabled without --amp."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, images and boxes."""
        return torch.float64 if self.float64 else torch.float32

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def learning_rate_at(self, step: int) -> float:
        """A function of the step alone: --steps can be raised later without changing what came before."""
        decay = min(1.0, math.sqrt(CONSTANT_STEPS / (step + 1)))
        decay *= 0.1 ** sum(step >= drop for drop in self.learning_rate_steps)
        return self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay

    def random_stream(self, purpose: int, step: int, place: int) -> int:
        """A seed for the place-th batch of a step: equal for every model, after a resume, and on any process."""
        return int(np.random.SeedSequence([self.seed, purpose, step, place]).generate_state(1)[0])


def build_model(settings: Settings) -> nn.Module:
    """The detector that the settings speak of, with random or pretrained weights, on the CPU."""
    return build_detector(
        settings.model,
        settings.backbone,
        len(settings.class_names),
        settings.image_size,
        norm=settings.norm,
        frozen_stages=settings.frozen_stages,
        pretrained=settings.pretrained,
        pyramid=settings.pyramid,
        heads=settings.heads,
        channels=settings.channels,
        multi_scale=settings.multi_scale,
    )


def to_device(batch: Batch, settings: Settings) -> Batch:
    """With numbers of the type that is trained in; labels and masks stay integers."""

    def moved(value: Tensor) -> Tensor:
        return value.to(settings.device, settings.dtype if value.is_floating_point() else value.dtype)

    images, targets = batch
    return [moved(image) for image in images], [{key: moved(each) for key, each in t.items()} for t in targets]


def flipped(batch: Batch, step: int, place: int, settings: Settings) -> Batch:
    """Each image mirrored with probability 1/2, its boxes and masks with it; without --flip the batch as it is."""
    if not settings.flip:
        return batch
    coins = np.random.default_rng(settings.random_stream(FLIP_STREAM, step, place)).random(len(batch[0])) < 0.5
    images, targets = list(batch[0]), list(batch[1])
    for i in np.flatnonzero(coins):
        width = images[i].shape[-1]
        images[i], target = F.horizontal_flip(images[i]), dict(targets[i])
        x1, y1, x2, y2 = target["boxes"].unbind(1)
        target["boxes"] = torch.stack([width - x2, y1, width - x1, y2], 1)
        if "masks" in target:
            target["masks"] = target["masks"].flip(-1)
        targets[i] = target
    return images, targets


def losses_of(model: nn.Module, batch: Batch, step: int, settings: Settings, place: int = 0) -> dict[str, Tensor]:
    """The model's training losses by name, scalars."""
    # Anchors and proposals are sampled at random: one stream a batch.
    torch.manual_seed(settings.random_stream(LOSS_STREAM, step, place))
    with settings.autocast():
        losses: dict[str, Tensor] = model(*batch)
    return losses


class WeightAverage:
    """An exponential average of a model's weights and buffers, as a model of its own in evaluation mode."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after `step`, counted from 0."""
        weight = max(9 / (step + 10), 1 / AVERAGED_STEPS)
        ours, theirs = ([local(value) for value in each.state_dict().values()] for each in (self.model, model))
        floating = [value.is_floating_point() for value in ours]
        averaged = [value for value, chosen in zip(ours, floating, strict=True) if chosen]
        torch._foreach_lerp_(
            averaged, [value for value, chosen in zip(theirs, floating, strict=True) if chosen], weight
        )
        for value, other, chosen in zip(ours, theirs, floating, strict=True):
            if not chosen:
                value.copy_(other)


@dataclass
class Track:
    """One model in training: "eager" or "fused", its optimiser, and what was measured, one entry a step."""

    name: str
    model: nn.Module
    # The model as it is called in training; the same, or DistributedDataParallel around it.
    called: nn.Module
    average: WeightAverage
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    processes: Processes
    # accelerate()'s report; None for eager.
    swapped: Any = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    # Of the last step: losses by name and the norm of the gradient before it was clipped.
    parts: dict[str, float] = field(default_factory=dict)

    def step(self, batches: list[Batch], step: int, settings: Settings) -> None:
        """One optimiser step on this process's share, batches of (images, targets).

        The step's loss is the mean over all batches of all processes. The host reads numbers of the GPU once, at the
        end: a loss that is not finite is found when it has spoilt the weights, and before they are saved anywhere.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        on_device = [to_device(batch, settings) for batch in batches]
        settings.synchronize()
        started = time.perf_counter()
        self.optimizer.zero_grad()
        names: list[str] = []
        values: list[Tensor] = []
        for i, batch in enumerate(on_device):
            with gradients_exchanged(self.called, i + 1 == len(batches)):
                parts = losses_of(self.called, batch, step, settings, i * self.processes.world + self.processes.rank)
                names, stacked = list(parts), torch.stack([part.float() for part in parts.values()])
                self.scaler.scale(stacked.sum() / len(batches)).backward()
            values.append(stacked.detach())
        self.scaler.unscale_(self.optimizer)
        norm = whole(nn.utils.clip_grad_norm_(self.model.parameters(), settings.max_gradient_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.average.update(self.model, step)
        *rows, (gradient_norm, *_) = torch.stack([*values, norm.float().expand(len(names))]).tolist()
        settings.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self._check_finite(rows, names, batches, step)
        totals = self.processes.sum([math.fsum(part) for part in zip(*rows, strict=True)])
        self.parts = {name: total / settings.batches_per_step for name, total in zip(names, totals, strict=True)}
        self.losses.append(math.fsum(self.parts.values()))
        self.parts["gradient_norm"] = gradient_norm

    def _check_finite(self, rows: list[list[float]], names: list[str], batches: list[Batch], step: int) -> None:
        """All processes stop if a loss of any is not finite, and all say whose it was."""
        if not self.processes.any(not all(math.isfinite(value) for row in rows for value in row)):
            return
        bad = [
            ([int(target["image_id"]) for target in targets], row)
            for (_, targets), row in zip(batches, rows, strict=True)
            if not all(map(math.isfinite, row))
        ]
        shown = [
            f"images {', '.join(map(str, ids))}: "
            + ", ".join(f"{name} {value:.3g}" for name, value in zip(names, row, strict=True))
            for found in self.processes.gather(bad)
            for ids, row in found
        ]
        raise TrainingError(
            f"the {self.name} model's loss is not finite at step {step + 1} ({'; '.join(shown)}); the last checkpoint "
            "is of a step before it. Lower --lr, or look at these images"
        )


def new_tracks(names: list[str], settings: Settings, processes: Processes, shard: bool = False) -> list[Track]:
    """A track for each name, all with equal weights; "fused" ones with fpn_fast's modules swapped in."""
    torch.manual_seed(settings.seed)
    initial = build_model(settings)
    tracks = []
    for name in names:
        model = copy.deepcopy(initial).to(settings.device, settings.dtype).train()
        if settings.channels_last:
            model = model.to(memory_format=torch.channels_last)
        swapped = None
        if name == "fused":
            import fpn_fast

            swapped = fpn_fast.accelerate(model)
            if settings.static_sampling:
                from fpn_fast.nn.static_sampling import use_static_sampling

                use_static_sampling(model)
        average = WeightAverage(model)
        called = distributed(model, processes, shard)
        if shard:
            shard_in_place(average.model, processes)
        # One pass over the weights instead of eight: 0.02 s a step instead of 0.11 on two CPU cores.
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=1e-4, fused=True)
        # float16 alone needs scaled gradients.
        scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.amp and settings.device.type == "cuda")
        tracks.append(Track(name, model, called, average, optimizer, scaler, processes, swapped))
    return tracks


class Interrupts:
    """Inside the ``with`` block the first Ctrl-C only sets ``seen``: a step ends before the checkpoint is written."""

    def __init__(self) -> None:
        self.seen = False
        self._before: Callable[[int, FrameType | None], Any] | int | None = None

    def __enter__(self) -> Interrupts:
        self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        signal.signal(signal.SIGINT, self._before)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def be_deterministic() -> None:
    """Only algorithms that repeat themselves bit for bit; an operation that has none raises."""
    # What cuBLAS asks for; it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
