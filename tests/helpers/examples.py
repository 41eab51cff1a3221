# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  # the examples are no package, and need more than the library does
"""Imported first, this lets a test import the modules of examples/, or skips it without the examples' extra."""

import contextlib
import json
import sys
from pathlib import Path

import pytest
import torch

for package in ("sklearn", "skimage", "pycocotools", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="the examples' extra is not installed")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import detector_report
import train_detector

# The smallest images and model, and one thread: two wait for each other on a busy machine.
SMALL = ("--image-size", "64", "--batch-size", "1", "--eval-images", "2", "--device", "cpu", "--threads", "1",
         "--channels", "32", "--backbone", "slim_resnet")  # fmt: skip
# No test reads times.
detector_report.REPEATS = 1


def train(output, *arguments):
    return train_detector.main([*SMALL, "--output", str(output), *map(str, arguments)])


def figures_of(output):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((output / "figures.json").read_text(), parse_constant=refuse)


def saved_in(output):
    """The tracks of a run's checkpoint."""
    return torch.load(output / "checkpoint.pt", weights_only=True)["tracks"]


@contextlib.contextmanager
def tidied(folder):
    """Restore PyTorch's number of threads, and delete checkpoints: pytest keeps the folders of three sessions."""
    threads = torch.get_num_threads()
    try:
        yield folder
    finally:
        torch.set_num_threads(threads)
        for checkpoint in folder.rglob("checkpoint.pt*"):
            checkpoint.unlink()
