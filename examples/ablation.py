# SPDX-License-Identifier: Apache-2.0
"""Accuracy with and without our kernels, and the FPN paper's ablation, on the digits, from scratch and one seed.

    OMP_WAIT_POLICY=passive python examples/ablation.py --output runs/ablation

Every row is a run of train_detector.py with the same seed, data and steps: torchvision's Faster R-CNN as it is, the
same one with our kernels, with static sampling, without the top-down pathway, and on a single level of stride 16. The
paper (Lin et al., 2017, Tables 1 and 2) has the pyramid above both, most of all on small objects. A row that has its
figures already is not trained again, and one that was interrupted goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import train_detector

ROWS: dict[str, tuple[str, ...]] = {
    "FPN, torchvision": ("--backend", "eager"),
    "FPN, fpn_fast": (),
    "FPN, fpn_fast, static sampling": ("--static-sampling",),
    "no top-down pathway": ("--pyramid", "no-top-down"),
    "single level, C4": ("--pyramid", "c4"),
}
COLUMNS = ("AP", "AP50", "AP_small", "AP_medium", "AP_large")


def measure(name: str, options: argparse.Namespace, more: Sequence[str]) -> dict[str, Any]:
    """Trains one row, or goes on with it, and returns its figures."""
    folder = options.output / name.replace(", ", "_").replace(" ", "-")
    arguments = ["--steps", options.steps, "--seed", options.seed, "--image-size", options.image_size]
    arguments += ["--batch-size", options.batch_size, "--eval-images", options.eval_images, "--output", folder]
    # Where the curve is flat, training has converged.
    arguments += ["--evaluate-every", max(1, options.steps // 3), *ROWS[name], *more]
    done = folder / "figures.json"
    if not done.exists():
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        code = train_detector.main([*map(str, arguments), *resume])
        if code != 0:
            raise SystemExit(code)
    figures = json.loads(done.read_text())
    track = figures["eager" if "eager" in figures else "fused"]
    if figures["arguments"]["seed"] != options.seed or figures["steps"] != options.steps:
        raise SystemExit(f"error: {done} is of another seed or other steps; take another --output")
    curve = [{"step": at["step"], "AP": next(at[key]["AP"] for key in at if key != "step")}
             for at in figures["test_history"]]  # fmt: skip
    return {
        "row": name,
        **{column: track["test"][column] for column in COLUMNS},
        "images": track["test"]["images"],
        "AP_by_step": curve,
        "final_loss": sum(track["losses"][-20:]) / len(track["losses"][-20:]),
        "step_seconds_median": track["step_seconds_median"],
        "arguments": figures["arguments"],
        "versions": figures["versions"],
    }


def table(rows: list[dict[str, Any]], command: str) -> str:
    """Markdown, AP in points of 100."""
    lines = ["| model | AP | AP50 | small | medium | large |", "| --- | ---: | ---: | ---: | ---: | ---: |"]
    for row in rows:
        values = ("-" if row[column] is None else f"{100 * row[column]:.1f}" for column in COLUMNS)
        lines.append(f"| {row['row']} | {' | '.join(values)} |")
    arguments = rows[0]["arguments"]
    lines += [
        "",
        f"Faster R-CNN, ResNet-18 from random weights, {arguments['steps']} steps of {arguments['batch_size']} "
        f"pictures of {arguments['image_size']} pixels, seed {arguments['seed']}; {rows[0]['images']} test pictures. "
        f"`{command}`",
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; what it does not know goes to train_detector.py."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None, epilog="Other options are train_detector.py's."
    )
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--image-size", type=int, default=192)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--eval-images", type=int, default=300)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--output", type=Path, default=Path("runs/ablation"), metavar="DIR")
    given = list(sys.argv[1:] if argv is None else argv)
    options, more = parser.parse_known_args(given)
    rows = [measure(name, options, more) for name in options.rows]
    command = " ".join(["python examples/ablation.py", *given])
    text = table(rows, command)
    (options.output / "ablation.json").write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n")
    (options.output / "ablation.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
