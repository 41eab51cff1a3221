# SPDX-License-Identifier: Apache-2.0
"""What a run logs while it trains: AP at --evaluate-every, and TensorBoard's files with --tensorboard."""

from __future__ import annotations

from typing import Any

from detector_training import Settings, Track
from processes import Processes


class NoLogsError(Exception):
    """Logs that cannot be written; the message is one line."""


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
            raise NoLogsError(f"--tensorboard needs a package: pip install tensorboard ({error})") from error
        self._writer = SummaryWriter(settings.output / "tensorboard")

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, track: Track, step: int, settings: Settings) -> None:
        images = settings.batch_size * settings.batches_per_step
        self._write(track.name, "train", {"loss": track.losses[-1], **track.parts}, step)
        self._write(track.name, "train", {"learning_rate": settings.learning_rate_at(step)}, step)
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
