# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: a file is whole or absent, and the same for one process and for many.

A step's data, order, random numbers and learning rate are functions of the seed and the step (see `Settings`). A
checkpoint holds the rest: weights, their average, the optimiser, the gradient scaler and the losses so far.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch
from detector_training import Settings, Track
from processes import UsageError
from torch.distributed.checkpoint import state_dict as sharded

WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def save_checkpoint(path: Path, tracks: list[Track], settings: Settings) -> None:
    """Write the tracks to `path`, through a temporary file: at any time `path` is a whole checkpoint.

    All processes call it, because sharded weights are gathered; the leading one writes.
    """
    states = [
        {
            "model": sharded.get_model_state_dict(track.model, options=WHOLE),
            "average": sharded.get_model_state_dict(track.average.module, options=WHOLE),
            "optimizer": sharded.get_optimizer_state_dict(track.model, track.optimizer, options=WHOLE),
            "scaler": track.scaler.state_dict(),
            "losses": track.losses,
            "seconds": track.seconds,
        }
        for track in tracks
    ]
    processes = tracks[0].processes
    if processes.leads:
        temporary = path.with_name(f"{path.name}.tmp")
        try:
            with temporary.open("wb") as file:
                torch.save({"settings": settings.fingerprint(), "tracks": states}, file)
                file.flush()
                # The name must not reach the disk before the contents.
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    # Nobody continues before the file is there.
    processes.any(False)


def load_checkpoint(path: Path, tracks: list[Track], settings: Settings) -> None:
    """Restore the tracks from `path`; UsageError where it is absent, unreadable, or of another run.

    The backend may be another: weights have the same names and shapes.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved, states = state["settings"], state["tracks"]
    except FileNotFoundError as error:
        raise UsageError(f"--resume: there is no checkpoint {path}") from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise UsageError(f"--resume: {path} is not a checkpoint of this script") from error
    for key, value in settings.fingerprint().items():
        if saved.get(key) != value:
            raise UsageError(f"--resume: {path} was trained with {key} {saved.get(key)}, this run has {value}")
    if len(states) != len(tracks):
        raise UsageError(f"--resume: {path} was written {'with' if len(states) > 1 else 'without'} --compare")
    for track, values in zip(tracks, states, strict=True):
        sharded.set_model_state_dict(track.model, values["model"], options=WHOLE)
        sharded.set_model_state_dict(track.average.module, values["average"], options=WHOLE)
        sharded.set_optimizer_state_dict(track.model, track.optimizer, values["optimizer"], options=WHOLE)
        track.scaler.load_state_dict(values["scaler"])
        track.losses, track.seconds = list(values["losses"]), list(values["seconds"])
        # The average of no steps would start anew.
        track.average.n_averaged.fill_(len(track.losses))
