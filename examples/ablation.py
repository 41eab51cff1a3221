# SPDX-License-Identifier: Apache-2.0
"""Measure accuracy with and without our kernels, and the FPN paper's ablation, on the digits, from scratch, over seeds.

    python examples/ablation.py --output runs/ablation

A row is a model that train_detector.py trains once per seed, with the same data and steps. The seed sets the weights,
the images of training and test, and their order. As in the paper (Lin et al., 2017, Tables 1 and 2) the figures are the
AR of the proposals and the AP of the detections. A finished run is not repeated, an interrupted one resumes, and the
table has all runs in the folder: --rows and --seeds add to it.

Five models converge within an hour on two cores. The backbone is quick, and its finest level is a convolution and a
pool: deep features must come from above. The pyramid has 128 channels where the paper's has 256, and the learning rate
falls to a tenth twice near the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROWS: dict[str, tuple[str, ...]] = {
    "FPN, torchvision": ("--backend", "eager"),
    "FPN, fpn_fast": (),
    "FPN, fpn_fast, static sampling": ("--static-sampling",),
    "no top-down pathway": ("--pyramid", "no-top-down"),
    "single level, C4": ("--pyramid", "c4"),
}
# The set has too few large digits for figures of them.
PRECISIONS = ("AP", "AP50", "AP_small", "AP_medium")
RECALLS = ("AR_10", "AR_10_small", "AR_10_medium", "AR_100", "AR_100_small", "AR_100_medium")


def train(arguments: list[str], folder: Path, jobs: int) -> int:
    """Run train_detector.py and return its exit code; with several jobs it writes to a log, not to the terminal."""
    if jobs == 1:
        # Imported here: the table of finished runs needs none of its packages.
        import train_detector

        return train_detector.main(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("train_detector.py")
    command = [sys.executable, str(script), *arguments, "--threads", str(max(1, cores() // jobs))]
    with (folder / "log.txt").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def folder_of(name: str, options: argparse.Namespace) -> Path:
    return options.output / name.replace(", ", "_").replace(" ", "-")


def run(name: str, seed: int, options: argparse.Namespace, more: Sequence[str]) -> None:
    """Train one model of a row, or resume it, unless it is finished."""
    folder, steps = folder_of(name, options) / f"seed-{seed}", options.steps
    if (folder / "figures.json").exists():
        return
    arguments = ["--seed", seed, "--output", folder]
    for option in ("steps", "image_size", "batch_size", "eval_images", "backbone", "channels"):
        arguments += [f"--{option.replace('_', '-')}", getattr(options, option)]
    arguments += ["--lr-steps", max(1, steps * 3 // 4), max(1, steps * 11 // 12)]
    # Where the curve is flat, training has converged.
    arguments += ["--evaluate-every", max(1, steps // 3), *ROWS[name], *more]
    resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
    code = train([*map(str, arguments), *resume], folder, options.jobs)
    if code != 0:
        raise SystemExit(f"error: {name}: training ended with exit code {code}; see its log in {folder}")
    print(f"{name}, seed {seed}: trained", flush=True)


def figures_of(path: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The figures of one run, from train_detector.py's file."""
    figures = json.loads(path.read_text())
    track = figures["eager" if "eager" in figures else "fused"]
    if figures["steps"] != options.steps:
        raise SystemExit(f"error: {path} is of {figures['steps']} steps, not {options.steps}; take another --output")
    curve = [{"step": at.pop("step"), "AP": next(iter(at.values()))["AP"]} for at in figures["test_history"]]
    return {
        "seed": figures["arguments"]["seed"],
        **{column: track["test"][column] for column in PRECISIONS},
        **{column: track["test"].get("proposals", {}).get(column) for column in RECALLS},
        "images": track["test"]["images"],
        "AP_by_step": curve,
        "final_loss": sum(track["losses"][-20:]) / len(track["losses"][-20:]),
        "step_seconds_median": track["step_seconds_median"],
        "arguments": figures["arguments"],
        "versions": figures["versions"],
    }


def mean(runs: list[dict[str, Any]], column: str) -> float | None:
    """The mean over seeds; None where a run has no such figure."""
    values = [run[column] for run in runs]
    return None if None in values else sum(values) / len(values)


def table(rows: list[dict[str, Any]], command: str) -> str:
    """Markdown, with AP and AR in points of 100."""
    columns = [column for column in PRECISIONS + RECALLS if any(mean(row["runs"], column) is not None for row in rows)]
    names = [column.replace("_", " ") for column in columns]
    several = any(len(row["runs"]) > 1 for row in rows)
    if several:
        names.insert(1, "AP of each seed")
    lines = [f"| model | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)]
    for row in rows:
        means = [mean(row["runs"], column) for column in columns]
        values = ["-" if value is None else f"{100 * value:.1f}" for value in means]
        if several:
            values.insert(1, ", ".join(f"{100 * run['AP']:.1f}" for run in row["runs"]))
        lines.append(f"| {row['row']} | {' | '.join(values)} |")
    seeds = sorted({run["seed"] for row in rows for run in row["runs"]})
    first = rows[0]["runs"][0]
    arguments, versions = first["arguments"], first["versions"]
    lines += [
        "",
        f"Faster R-CNN, {arguments['backbone']} from random weights, a pyramid of {arguments['channels']} channels, "
        f"{arguments['steps']} steps of {arguments['batch_size']} images of {arguments['image_size']} pixels, "
        f"{'means of seeds' if several else 'seed'} {', '.join(map(str, seeds))}; {first['images']} test images; "
        f"AR is of the first 10 or 100 proposals; torch {versions['torch']}. `{command}`",
    ]
    return "\n".join(lines) + "\n"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="All other options are passed to train_detector.py.",
    )

    def option(name: str, default: Any, text: str, **more: Any) -> None:
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        parser.add_argument(name, default=default, help=f"{text} (default: {shown})", **{"type": int} | more)

    option("--steps", 5000, "optimiser steps per model")
    option("--backbone", "shufflenet_v2_x1_0", "name of a torchvision classifier", type=str)
    option("--seeds", [0], "train every row once per seed", nargs="+")
    option("--image-size", 128, "side of an image, in pixels")
    option("--channels", 128, "channels of every pyramid level")
    option("--batch-size", 2, "images per step")
    option("--eval-images", 2000, "test images to measure AP on")
    option("--jobs", min(2, cores()), "models to train at the same time; they share the cores")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW",
                        help=f"models to train, of: {'; '.join(ROWS)} (default: all)")  # fmt: skip
    option("--output", Path("runs/ablation"), "folder for the runs and the table", type=Path, metavar="DIR")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Train what is not finished, and write the table; unknown options go to train_detector.py."""
    parser = build_parser()
    given = list(sys.argv[1:] if argv is None else argv)
    options, more = parser.parse_known_args(given)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    # Seed by seed: an interruption leaves all rows of some seeds.
    pairs = [(name, seed) for seed in options.seeds for name in options.rows]
    if options.jobs == 1:
        for pair in pairs:
            run(*pair, options, more)
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda pair: run(*pair, options, more), pairs))
    done = {name: sorted(folder_of(name, options).glob("seed-*/figures.json")) for name in ROWS}
    rows = [{"row": name, "runs": [figures_of(path, options) for path in done[name]]} for name in ROWS if done[name]]
    command = shlex.join(["python", "examples/ablation.py", *given])
    text = table(rows, command)
    (options.output / "ablation.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    (options.output / "ablation.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
