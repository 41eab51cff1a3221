# SPDX-License-Identifier: Apache-2.0
"""Accuracy with and without our kernels, and the FPN paper's ablation, on the digits, from scratch and one seed.

    OMP_WAIT_POLICY=passive python examples/ablation.py --output runs/ablation

Every row is a run of train_detector.py with the same seed, data and steps: torchvision's Faster R-CNN as it is, the
same one with our kernels, with static sampling, without the top-down pathway, and on a single level of stride 16. As in
the paper (Lin et al., 2017, Tables 1 and 2) the figures are the AR of the first stage's proposals and the AP of the
detections. A row that has its figures already is not trained again, and one that was interrupted goes on.

The backbone has one of its 22 blocks before the finest level, so that what is deep must come from above, and is quick;
the pyramid has 64 channels where the paper's has 256, and the learning rate falls to a tenth twice near the end: five
models converge within an hour of two cores.
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
PRECISIONS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")
RECALLS = ("AR_10", "AR_10_small", "AR_10_medium", "AR_10_large", "AR_100")


def train(arguments: list[str], folder: Path, jobs: int) -> int:
    """Runs train_detector.py and returns its exit code; one of several writes to a log instead of the terminal."""
    if jobs == 1:
        # Here, so that the table of figures that are there needs none of its packages.
        import train_detector

        return train_detector.main(arguments)
    folder.mkdir(parents=True, exist_ok=True)
    script = Path(__file__).with_name("train_detector.py")
    command = [sys.executable, str(script), *arguments, "--threads", str(max(1, cores() // jobs))]
    with (folder / "log.txt").open("a") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, check=False).returncode


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure(name: str, options: argparse.Namespace, more: Sequence[str]) -> dict[str, Any]:
    """Trains one row, or goes on with it, and returns its figures."""
    folder = options.output / name.replace(", ", "_").replace(" ", "-")
    steps = options.steps
    arguments = ["--steps", steps, "--seed", options.seed, "--image-size", options.image_size]
    arguments += ["--batch-size", options.batch_size, "--eval-images", options.eval_images, "--output", folder]
    arguments += ["--backbone", options.backbone]
    arguments += ["--channels", options.channels, "--lr-steps", max(1, steps * 3 // 4), max(1, steps * 11 // 12)]
    # Where the curve is flat, training has converged.
    arguments += ["--evaluate-every", max(1, steps // 6), *ROWS[name], *more]
    done = folder / "figures.json"
    if not done.exists():
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        code = train([*map(str, arguments), *resume], folder, options.jobs)
        if code != 0:
            raise SystemExit(f"error: {name}: training ended with exit code {code}; {folder} has its log")
        print(f"{name}: trained", flush=True)
    figures = json.loads(done.read_text())
    track = figures["eager" if "eager" in figures else "fused"]
    if figures["arguments"]["seed"] != options.seed or figures["steps"] != options.steps:
        raise SystemExit(f"error: {done} is of another seed or other steps; take another --output")
    curve = [{"step": at["step"], "AP": next(at[key]["AP"] for key in at if key != "step")}
             for at in figures["test_history"]]  # fmt: skip
    return {
        "row": name,
        **{column: track["test"][column] for column in PRECISIONS},
        **{column: track["test"].get("proposals", {}).get(column) for column in RECALLS},
        "images": track["test"]["images"],
        "AP_by_step": curve,
        "final_loss": sum(track["losses"][-20:]) / len(track["losses"][-20:]),
        "step_seconds_median": track["step_seconds_median"],
        "arguments": figures["arguments"],
        "versions": figures["versions"],
    }


def table(rows: list[dict[str, Any]], command: str) -> str:
    """Markdown, AP and AR in points of 100."""
    columns = [column for column in PRECISIONS + RECALLS if any(row[column] is not None for row in rows)]
    names = [column.replace("_", " ") for column in columns]
    lines = [f"| model | {' | '.join(names)} |", "| --- |" + " ---: |" * len(columns)]
    for row in rows:
        values = ("-" if row[column] is None else f"{100 * row[column]:.1f}" for column in columns)
        lines.append(f"| {row['row']} | {' | '.join(values)} |")
    arguments, versions = rows[0]["arguments"], rows[0]["versions"]
    lines += [
        "",
        f"Faster R-CNN, {arguments['backbone']} from random weights, a pyramid of {arguments['channels']} channels, "
        f"{arguments['steps']} steps of {arguments['batch_size']} pictures of {arguments['image_size']} pixels, seed "
        f"{arguments['seed']}; {rows[0]['images']} test pictures; AR is of the first 10 or 100 proposals; "
        f"torch {versions['torch']}. `{command}`",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; what it does not know goes to train_detector.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, epilog="Other options are train_detector.py's."
    )
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--backbone", default="regnet_x_400mf")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--channels", type=int, default=64, help="of the pyramid's maps")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--eval-images", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=min(2, cores()), help="rows trained at a time, the cores shared")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), metavar="DIR")
    given = list(sys.argv[1:] if argv is None else argv)
    options, more = parser.parse_known_args(given)
    if options.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {options.jobs}")
    if options.jobs == 1:
        rows = [measure(name, options, more) for name in options.rows]
    else:
        with ThreadPoolExecutor(options.jobs) as pool:
            rows = list(pool.map(lambda name: measure(name, options, more), options.rows))
    command = shlex.join(["python", "examples/ablation.py", *given])
    text = table(rows, command)
    (options.output / "ablation.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    (options.output / "ablation.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
