# SPDX-License-Identifier: Apache-2.0
"""Training in two processes, which gloo joins: against one process on the joined batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from helpers.examples import figures_of, saved_in, tidied, train

# A process that waits for another for ever would end the test here; together they take half a minute when alone.
PATIENCE = 540


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have left what they found, "0.json" and "1.json", and their runs."""
    folder = tmp_path_factory.mktemp("two")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with (folder / "printed").open("w") as printed:
        done = subprocess.run([*torchrun, "-m", "helpers.two_processes", str(folder)], env=environment,
                              stdout=printed, stderr=subprocess.STDOUT, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, (folder / "printed").read_text()
    with tidied(folder):
        yield folder


@pytest.fixture(scope="module")
def found(folder):
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(folder):
    """The same steps in one process, which takes both batches of a step one after the other."""
    assert train(folder / "alone", "--eval-images", 3, "--accumulate", 2, "--steps", 2) == 0
    return folder / "alone"


def test_gradients_of_two_processes_are_those_of_the_joined_batch(found):
    for of_rank in found:
        # Sums of fewer than 10^6 products in float64, in another order.
        assert of_rank["detector"]["difference"] < 1e6 * torch.finfo(torch.float64).eps
        assert of_rank["detector"]["parameters"] > 80


def test_a_compiled_static_step_exchanges_its_gradients(found):
    for of_rank in found:
        assert of_rank["static"]["difference"] < 1e6 * torch.finfo(torch.float64).eps
        assert of_rank["static"]["parameters"] > 20


def test_a_level_without_rois_on_one_process_neither_hangs_nor_changes_gradients(found):
    for of_rank in found:
        # The level between has no RoI on either: zeros there, as in one process.
        assert of_rank["level"]["unused"] == ["fpn.layer_blocks.1.0.weight", "fpn.layer_blocks.1.0.bias"]
        assert of_rank["level"]["difference"] < 1e3 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("run", ["copied", "sharded"])
def test_two_processes_take_the_steps_that_one_takes(run, folder, found, alone):
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


def test_a_sharded_checkpoint_is_that_of_one_process(folder, found, alone):
    sharded, whole = (saved_in(run)[0]["model"] for run in (folder / "sharded", alone))
    assert list(sharded) == list(whole)
    learning_rates = 4e-4 * (1 + 2) / 20
    for name, value in whole.items():
        assert sharded[name].shape == value.shape
        # A gradient of nothing but rounding has either sign, and Adam's step the learning rate's size.
        assert (sharded[name] - value).abs().max() <= 2 * learning_rates, name
    # One process goes on from it.
    assert train(folder / "sharded", "--accumulate", 2, "--steps", 3, "--resume") == 0
    assert len(figures_of(folder / "sharded")["fused"]["losses"]) == 3


def test_all_processes_stop_where_one_has_a_loss_that_is_not_finite(folder, found):
    assert [of_rank["not_finite"]["code"] for of_rank in found] == [1, 1]
    errors = [line for line in (folder / "printed").read_text().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "loss is not finite at step 2 (images " in errors[0]
    assert "loss_classifier nan" in errors[0]
    assert not (folder / "not_finite" / "checkpoint.pt").exists()


def test_the_leading_process_alone_writes_logs(folder, found):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((folder / "copied" / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(folder / "copied" / "tensorboard")).Reload()
    losses = [event.value for event in events.Scalars("train/loss/fused")]
    assert losses == pytest.approx(figures_of(folder / "copied")["fused"]["losses"])
    assert [event.step for event in events.Scalars("train/loss_objectness/fused")] == [1, 2]
