# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: E402  # the examples are no package, and need more than the library does
"""Every command of docs/train-on-your-own-data.md, at a small size; its Python is run by test_docs.py."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

for package in ("sklearn", "skimage", "pycocotools", "matplotlib", "tqdm", "torchvision"):
    pytest.importorskip(package, reason="the examples' extra is not installed")

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples"))

import detector_report

GUIDE = (ROOT / "docs" / "train-on-your-own-data.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]
# What makes a command small: later values of an option replace earlier ones.
SMALL = ["--image-size", "64", "--batch-size", "1", "--eval-images", "2", "--device", "cpu", "--threads", "1",
         "--channels", "32", "--backbone", "slim_resnet"]  # fmt: skip
SMALLER = {
    "digits_on_photographs": ["--image-size", "64", "--train", "6", "--test", "2"],
    "train_detector": SMALL,
    "ablation": [
        *SMALL,
        "--steps",
        "2",
        "--jobs",
        "1",
        "--seeds",
        "3",
        "5",
        "--rows",
        "FPN, torchvision",
        "single level, C4",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the guide's reader stands."""
    folder, threads = tmp_path_factory.mktemp("guide"), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        # These tests read no times.
        patch.setattr(detector_report, "REPEATS", 1)
        yield folder
    torch.set_num_threads(threads)
    for checkpoint in folder.rglob("checkpoint.pt"):
        checkpoint.unlink()


def small(command: str) -> list[str]:
    """The command's words with small sizes in the place of the guide's."""
    words = shlex.split(command.replace("--heads torchvision", "--heads small"))
    script = next(Path(word).stem for word in words if word.endswith(".py"))
    words += SMALLER[script]
    if script == "train_detector":
        # A run that goes on has a step more than the one before it.
        words += ["--steps", "2" if "--resume" in words else "1"]
        if "--multi-scale" in words:
            words += ["--multi-scale", "64", "96"]
        if "--checkpoint-every" in words:
            words += ["--checkpoint-every", "1"]
    return words


@pytest.mark.parametrize("number", range(len(COMMANDS)))
def test_a_command_of_the_guide_runs(number: int, folder: Path) -> None:
    program, *words = small(COMMANDS[number])
    if program == "torchrun":
        words[words.index("examples/train_detector.py")] = str(ROOT / "examples" / "train_detector.py")
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr
        assert json.loads((folder / "runs/two/figures.json").read_text())["processes"] == 2
        return
    assert program == "python"
    script, *arguments = words
    assert (ROOT / script).is_file()
    assert importlib.import_module(Path(script).stem).main(arguments) in (0, None)


def test_the_ablation_has_left_its_table(folder: Path) -> None:
    found = json.loads((folder / "runs/ablation/ablation.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["FPN, torchvision", "single level, C4"]
    for row in found["rows"]:
        assert [run["seed"] for run in row["runs"]] == [3, 5]
        assert all(run["AP_by_step"][0]["step"] == 1 and run["final_loss"] > 0 for run in row["runs"])
    table = (folder / "runs/ablation/ablation.md").read_text()
    assert "| single level, C4 | " in table
    assert "means of seeds 3, 5; " in table
    assert found["command"] in table


def test_the_guide_has_all_kinds_of_commands() -> None:
    assert len(COMMANDS) == len(set(COMMANDS)) == 9
    assert sum(command.startswith("torchrun ") for command in COMMANDS) == 1
