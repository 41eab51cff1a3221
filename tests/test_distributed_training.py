# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  # the examples are no package, and need more than the library does
"""Training in two processes, which gloo joins: against one process on the joined batch."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

for package in ("sklearn", "skimage", "pycocotools", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="the examples' extra is not installed")

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import train_detector
from helpers.two_processes import SMALL

# A process that waits for another for ever would end the test here; together they take half a minute when alone.
PATIENCE = 540


def free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return int(opened.getsockname()[1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where two processes have left what they found, "0.json" and "1.json", and their runs."""
    folder = tmp_path_factory.mktemp("two")
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("helpers") / "two_processes.py"), str(folder)]
    started = [
        subprocess.Popen(
            command,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n".join(printed)
    (folder / "printed").write_text(printed[0])
    yield folder
    for checkpoint in folder.rglob("checkpoint.pt*"):
        checkpoint.unlink()


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    """The same steps in one process, which takes both batches of a step one after the other."""
    arguments = [*SMALL, "--accumulate", "2", "--steps", "2", "--output", str(folder / "alone")]
    threads = torch.get_num_threads()
    assert train_detector.main(arguments) == 0
    torch.set_num_threads(threads)
    return folder / "alone"


def figures_of(run: Path) -> dict[str, Any]:
    figures: dict[str, Any] = json.loads((run / "figures.json").read_text())
    return figures


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(run / "checkpoint.pt", weights_only=True)["tracks"][0]["model"]
    return weights


def test_gradients_of_two_processes_are_those_of_the_joined_batch(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        # Sums of fewer than 10^6 products in float64, in another order.
        assert of_rank["detector"]["difference"] < 1e6 * torch.finfo(torch.float64).eps
        assert of_rank["detector"]["parameters"] > 80


def test_a_level_without_rois_on_one_process_neither_hangs_nor_changes_gradients(found: list[dict[str, Any]]) -> None:
    for of_rank in found:
        # The level between has no RoI on either: zeros there, as in one process.
        assert of_rank["level"]["unused"] == ["fpn.layer_blocks.1.0.weight", "fpn.layer_blocks.1.0.bias"]
        assert of_rank["level"]["difference"] < 1e3 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("run", ["copied", "sharded"])
def test_two_processes_take_the_steps_that_one_takes(run: str, folder: Path, found: Any, alone: Path) -> None:
    assert [of_rank[run]["code"] for of_rank in found] == [0, 0]
    figures, expected = figures_of(folder / run), figures_of(alone)
    assert figures["processes"] == 2
    losses, expected_losses = figures["fused"]["losses"], expected["fused"]["losses"]
    # The halves of the gradient are added in either order; Adam's first step turns a last bit into one of a weight.
    assert losses[0] == expected_losses[0]
    assert losses[1] == pytest.approx(expected_losses[1], rel=1e-4)
    # Three images, of which one process had two.
    assert figures["fused"]["test"]["images"] == expected["fused"]["test"]["images"] == 3
    assert figures["fused"]["test"]["AP"] == pytest.approx(expected["fused"]["test"]["AP"], abs=1e-3)


def test_a_sharded_checkpoint_is_that_of_one_process(folder: Path, found: Any, alone: Path) -> None:
    sharded, whole = weights_of(folder / "sharded"), weights_of(alone)
    assert list(sharded) == list(whole)
    learning_rates = 4e-4 * (1 + 2) / 20
    for name, value in whole.items():
        assert sharded[name].shape == value.shape
        # A gradient of nothing but rounding has either sign, and Adam's step the learning rate's size.
        assert (sharded[name] - value).abs().max() <= 2 * learning_rates, name
    # One process goes on from it.
    arguments = [*SMALL, "--accumulate", "2", "--steps", "3", "--resume", "--output", str(folder / "sharded")]
    assert train_detector.main(arguments) == 0
    assert len(figures_of(folder / "sharded")["fused"]["losses"]) == 3


def test_all_processes_stop_where_one_has_a_loss_that_is_not_finite(folder: Path, found: Any) -> None:
    assert [of_rank["not_finite"]["code"] for of_rank in found] == [1, 1]
    errors = [line for line in (folder / "printed").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "loss is not finite at step 2 (images " in errors[0]
    assert "loss_classifier nan" in errors[0]
    assert not (folder / "not_finite" / "checkpoint.pt").exists()


def test_the_leading_process_alone_writes_logs(folder: Path, found: Any) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((folder / "copied" / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(folder / "copied" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss/fused")]
    assert losses == pytest.approx(figures_of(folder / "copied")["fused"]["losses"])
    assert [event.step for event in events.Scalars("train/loss_objectness/fused")] == [1, 2]
