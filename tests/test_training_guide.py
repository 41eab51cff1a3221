# SPDX-License-Identifier: Apache-2.0
"""Every command of docs/train-on-your-own-data.md, at a small size; its Python is run by test_docs.py."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from helpers.examples import ROOT, SMALL, tidied

GUIDE = (ROOT / "docs" / "train-on-your-own-data.md").read_text()
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", GUIDE, re.S) for line in block.splitlines()]
# What makes a command small: later values of an option replace earlier ones.
SMALLER = {
    "digits_on_photographs": ["--image-size", "64", "--train", "6", "--test", "2"],
    "train_detector": SMALL,
    "ablation": [*SMALL, "--steps", "2", "--jobs", "1", "--seeds", "3", "5", "--rows", "FPN, torchvision",
                 "single level, C4"],
}  # fmt: skip


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


def test_the_commands_of_the_guide_run(monkeypatch, tmp_path):
    """One test: a command needs what those before it wrote."""
    assert len(COMMANDS) == len(set(COMMANDS)) == 9
    assert sum(command.startswith("torchrun ") for command in COMMANDS) == 1
    monkeypatch.chdir(tmp_path)
    with tidied(tmp_path):
        for command in COMMANDS:
            run(*small(command))
    assert json.loads(Path("runs/two/figures.json").read_text())["processes"] == 2
    found = json.loads(Path("runs/ablation/ablation.json").read_text())
    assert [row["row"] for row in found["rows"]] == ["FPN, torchvision", "single level, C4"]
    for row in found["rows"]:
        assert [run["seed"] for run in row["runs"]] == [3, 5]
        assert all(run["AP_by_step"][0]["step"] == 1 and run["final_loss"] > 0 for run in row["runs"])
    table = Path("runs/ablation/ablation.md").read_text()
    assert "| single level, C4 | " in table
    assert "means of seeds 3, 5; " in table
    assert found["command"] in table


def run(program: str, *words: str) -> None:
    if program == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", *words]
        command[command.index("examples/train_detector.py")] = str(ROOT / "examples" / "train_detector.py")
        done = subprocess.run(command, capture_output=True, text=True, timeout=540)
        assert done.returncode == 0, done.stderr
        return
    script, *arguments = words
    assert program == "python", program
    assert (ROOT / script).is_file(), script
    assert importlib.import_module(Path(script).stem).main(arguments) in (0, None), (script, *arguments)
