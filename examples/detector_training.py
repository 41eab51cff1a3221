# SPDX-License-Identifier: Apache-2.0
"""The detector, its training step, and checkpoints that go on where they were written."""

from __future__ import annotations

import argparse
import copy
import math
import os
import pickle
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator

# Images, float32 [3, H, W] each, and their targets: boxes float32 [D, 4], labels int64 [D].
Batch = tuple[list[Tensor], list[dict[str, Tensor]]]

# Steps until the learning rate is at its full value, and until it begins to fall with the square root of the step.
WARMUP_STEPS = 20
CONSTANT_STEPS = 1000
# The evaluated weights average about the last 20 steps: over 150 steps that doubled AP in seven of eight trials.
AVERAGE_DECAY = 0.95
# Detectors from random weights meet a few huge gradients early on.
MAX_GRADIENT_NORM = 10.0
HEAD_WIDTH = 256


class TrainingError(Exception):
    """Training that cannot go on; the message is one line."""


class CheckpointError(Exception):
    """A checkpoint that is not there, cannot be read, or is of another run; the message is one line."""


@dataclass(frozen=True)
class Settings:
    """What a run's losses depend on, besides the number of steps and the backend."""

    device: torch.device
    data: str
    class_names: tuple[str, ...]
    image_size: int
    batch_size: int
    learning_rate: float
    amp: bool
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace, device: torch.device, class_names: tuple[str, ...]) -> Settings:
        data = f"digits, {args.train_images} pictures" if args.coco is None else str(args.coco[0])
        return cls(device, data, class_names, args.image_size, args.batch_size, args.lr, args.amp, args.seed)

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that must be equal for a checkpoint to be gone on from."""
        values = {key: value for key, value in vars(self).items() if key != "device"}
        return {**values, "class_names": list(self.class_names)}

    def autocast(self) -> torch.autocast:
        """bfloat16 on a CPU, float16 on CUDA; disabled without --amp."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.amp)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def learning_rate_at(self, step: int) -> float:
        """A function of the step alone: --steps can be raised later without changing what came before."""
        decay = min(1.0, math.sqrt(CONSTANT_STEPS / (step + 1)))
        return self.learning_rate * min(1.0, (step + 1) / WARMUP_STEPS) * decay


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)


def build_model(settings: Settings) -> FasterRCNN:
    """Faster R-CNN on ResNet-18 + FPN with random weights, anchors of 16 to 256 pixels, one size a level.

    GroupNorm instead of torchvision's FrozenBatchNorm2d, which normalises nothing in a network with random weights.
    """
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=_group_norm, trainable_layers=5)
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    return FasterRCNN(
        backbone,
        rpn_anchor_generator=anchors,
        min_size=settings.image_size,
        # torchvision's default proportion, 800 to 1333.
        max_size=settings.image_size * 5 // 3,
        # Fewer proposals than torchvision's 2000, and a narrower head: the pictures are a tenth of COCO's.
        rpn_pre_nms_top_n_train=500,
        rpn_post_nms_top_n_train=300,
        rpn_pre_nms_top_n_test=300,
        rpn_post_nms_top_n_test=150,
        box_batch_size_per_image=128,
        box_head=TwoMLPHead(backbone.out_channels * 7 * 7, HEAD_WIDTH),
        box_predictor=FastRCNNPredictor(HEAD_WIDTH, len(settings.class_names) + 1),
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    images, targets = batch
    moved = [{key: value.to(device) for key, value in target.items()} for target in targets]
    return [image.to(device) for image in images], moved


def losses_of(model: FasterRCNN, batch: Batch, step: int, settings: Settings) -> dict[str, Tensor]:
    """The model's training losses by name, scalars."""
    # Anchors and proposals are sampled at random: one stream a step, the same for every model and after a resume.
    torch.manual_seed(settings.seed * 1_000_003 + step)
    with settings.autocast():
        losses: dict[str, Tensor] = model(*batch)
    return losses


@dataclass
class Track:
    """One model in training: "eager" or "fused", its optimiser, and what was measured, one entry a step."""

    name: str
    model: FasterRCNN
    average: AveragedModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    # accelerate()'s report; None for eager.
    swapped: Any = None
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def step(self, batch: Batch, step: int, settings: Settings) -> None:
        """One optimiser step on (images, targets)."""
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate_at(step)
        batch = to_device(batch, settings.device)
        settings.synchronize()
        started = time.perf_counter()
        parts = losses_of(self.model, batch, step, settings)
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        value = loss.item()
        if not math.isfinite(value):
            shown = ", ".join(f"{key} {part.item():.3g}" for key, part in parts.items())
            raise TrainingError(f"the {self.name} model's loss is not finite at step {step + 1} ({shown}); lower --lr")
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRADIENT_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        settings.synchronize()
        self.seconds.append(time.perf_counter() - started)
        self.losses.append(value)
        self.average.update_parameters(self.model)


def new_tracks(names: list[str], settings: Settings) -> list[Track]:
    """A track for each name, all with equal weights; "fused" ones with fpn_fast's modules swapped in."""
    torch.manual_seed(settings.seed)
    initial = build_model(settings)
    tracks = []
    for name in names:
        model = copy.deepcopy(initial).to(settings.device).train()
        swapped = None
        if name == "fused":
            import fpn_fast

            swapped = fpn_fast.accelerate(model)
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True)
        # One pass over the weights instead of eight: 0.02 s a step instead of 0.11 on two CPU cores.
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=1e-4, fused=True)
        # float16 alone needs scaled gradients.
        scaler = torch.amp.GradScaler(settings.device.type, enabled=settings.amp and settings.device.type == "cuda")
        tracks.append(Track(name, model, average, optimizer, scaler, swapped))
    return tracks


def save_checkpoint(path: Path, tracks: list[Track], settings: Settings) -> None:
    """Writes a file beside `path` and renames it: whatever happens, `path` is a whole checkpoint."""
    state = {
        "settings": settings.fingerprint(),
        "tracks": [
            {
                "model": track.model.state_dict(),
                "average": track.average.state_dict(),
                "optimizer": track.optimizer.state_dict(),
                "scaler": track.scaler.state_dict(),
                "losses": track.losses,
                "seconds": track.seconds,
            }
            for track in tracks
        ],
    }
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path, tracks: list[Track], settings: Settings) -> None:
    """Puts the tracks where the checkpoint was written. The backend may be another: weights are the same."""
    try:
        state = torch.load(path, map_location=settings.device, weights_only=True)
        saved, states = state["settings"], state["tracks"]
    except FileNotFoundError as error:
        raise CheckpointError(f"--resume: there is no checkpoint {path}") from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"--resume: {path} is not a checkpoint of this script") from error
    for key, value in settings.fingerprint().items():
        if saved.get(key) != value:
            raise CheckpointError(f"--resume: {path} was trained with {key} {saved.get(key)}, this run has {value}")
    if len(states) != len(tracks):
        raise CheckpointError(f"--resume: {path} was written {'with' if len(states) > 1 else 'without'} --compare")
    for track, values in zip(tracks, states, strict=True):
        for part in ("model", "average", "optimizer", "scaler"):
            getattr(track, part).load_state_dict(values[part])
        track.losses, track.seconds = list(values["losses"]), list(values["seconds"])


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
