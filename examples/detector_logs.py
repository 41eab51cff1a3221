# SPDX-License-Identifier: Apache-2.0
"""What a run writes while it trains: AP now and then, and TensorBoard's files if they are asked for."""

from __future__ import annotations

import argparse
from typing import Any

from detector_training import Settings, Track
from processes import Processes


class NoLogsError(Exception):
    """Logs that cannot be written; the message is one line."""


class Logs:
    """Scalars by step: losses, gradient norm, learning rate, images a second, AP. The leading process writes them."""

    def __init__(self, args: argparse.Namespace, processes: Processes) -> None:
        # One entry for each evaluation before the last: the step, and each track's figures by its name.
        self.history: list[dict[str, Any]] = []
        self._writer = None
        if not args.tensorboard or not processes.leads:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise NoLogsError(f"--tensorboard needs its package: pip install tensorboard ({error})") from error
        self._writer = SummaryWriter(args.output / "tensorboard")

    def __enter__(self) -> Logs:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def step(self, track: Track, step: int, settings: Settings) -> None:
        if self._writer is None:
            return
        values = {f"train/{name}": value for name, value in track.parts.items()} | {
            "train/loss": track.losses[-1],
            "train/learning_rate": settings.learning_rate_at(step),
            "speed/images_per_second": settings.batch_size * settings.batches_per_step / track.seconds[-1],
        }
        self._write(track.name, values, step)

    def test(self, figures: dict[str, dict[str, Any]], step: int) -> None:
        """Figures of every track after the step; empty in processes that do not lead."""
        self.history.append({"step": step + 1, **figures})
        for name, found in figures.items():
            values = {f"test/{key}": value for key, value in found.items() if isinstance(value, float)}
            for part in ("masks", "proposals"):
                more = found.get(part, {}).items()
                values |= {f"test/{part}_{key}": value for key, value in more if value is not None}
            self._write(name, values, step)

    def _write(self, name: str, values: dict[str, float], step: int) -> None:
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(f"{key}/{name}", value, step + 1)
