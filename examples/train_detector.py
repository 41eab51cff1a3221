# SPDX-License-Identifier: Apache-2.0
"""Trains a torchvision Faster R-CNN (ResNet-18 + FPN, from random weights) with fpn_fast's kernels swapped in.

    python examples/train_detector.py                            # digits on photographs, the best backend
    python examples/train_detector.py --compare                  # beside the same model without our kernels
    python examples/train_detector.py --coco annotations.json images/

A run with equal arguments repeats itself: data, initial weights and the random stream of every step come from --seed.
With --compare both models start from equal weights and take their steps in turn on the same batches, so that noise
of the machine hits both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from coco_data import DataError, DetectionData, StepBatches, collate, load_coco
from detector_report import report
from detector_training import (
    Batch,
    CheckpointError,
    Interrupts,
    Settings,
    Track,
    TrainingError,
    load_checkpoint,
    new_tracks,
    save_checkpoint,
)
from digits_on_photographs import DigitsOnPhotographs
from torch.utils.data import DataLoader
from tqdm import tqdm

BUDGET = "training stops after this; testing after a quarter of it more, with the AP of the images seen until then"
BACKENDS = ("eager", "auto", "cpp", "triton", "reference")


class UsageError(Exception):
    """Something in the arguments that cannot be done here; the message is one line."""


def _positive(kind: type[int] | type[float]) -> Any:
    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; argparse itself ends a wrong one with a line and exit code 2."""
    parser = argparse.ArgumentParser(description="Train a Faster R-CNN with FPN, with or without fpn_fast.")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--data", choices=("digits",), default="digits", help="the set that is made on the fly")
    data.add_argument("--coco", nargs=2, type=Path, metavar=("ANNOTATIONS.json", "IMAGES_DIR"), help="your own set")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="eager: torchvision as it is")
    parser.add_argument("--compare", action="store_true", help="train the same model without our kernels beside it")
    parser.add_argument("--steps", type=_positive(int), default=600)
    parser.add_argument("--time-budget", type=_positive(float), metavar="SECONDS", help=BUDGET)
    parser.add_argument("--batch-size", type=_positive(int), default=2)
    parser.add_argument("--lr", type=_positive(float), default=4e-4)
    parser.add_argument("--image-size", type=_positive(int), default=256, help="shorter side, in pixels")
    parser.add_argument("--train-images", type=_positive(int), default=4000, help="digits: pictures in an epoch")
    parser.add_argument("--eval-images", type=_positive(int), default=100, help="test pictures to measure AP on")
    parser.add_argument("--amp", action="store_true", help="bfloat16 on a CPU; float16 with a gradient scaler on CUDA")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=_positive(int), help="CPU threads; PyTorch's choice if left out")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("runs/train_detector"), metavar="DIR")
    parser.add_argument("--checkpoint-every", type=_positive(int), default=200, metavar="STEPS")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    args = parser.parse_args(argv)
    if args.compare and args.backend == "eager":
        parser.error("--compare sets a backend beside eager: take --backend auto, cpp, triton or reference")
    if args.image_size < 64:
        parser.error(f"--image-size must be at least 64, got {args.image_size}")
    if args.workers < 0:
        parser.error(f"--workers must not be negative, got {args.workers}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    return args


def load_data(args: argparse.Namespace) -> tuple[DetectionData, DetectionData]:
    """Train and test sets."""
    if args.coco is None:
        sizes = {"side": args.image_size, "seed": args.seed}
        return (
            DigitsOnPhotographs("train", args.train_images, **sizes),
            DigitsOnPhotographs("test", args.eval_images, **sizes),
        )
    return load_coco(args.coco[0], args.coco[1], seed=args.seed)


@contextlib.contextmanager
def chosen_backend(name: str, device: torch.device) -> Iterator[str]:
    """Sets fpn_fast's backend, and says in a UsageError why it cannot serve; gives the name of the one that serves."""
    if name == "eager":
        yield "eager"
        return
    try:
        from fpn_fast import backends
    except ImportError as error:
        raise UsageError(f"--backend {name} needs fpn_fast, or take --backend eager: {error}") from error
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(backends.use(name))
            serving = backends.choose(device.type)
        except backends.BackendUnavailableError as error:
            raise UsageError(str(error)) from error
        yield serving


def train(tracks: list[Track], data: DetectionData, settings: Settings, args: argparse.Namespace, output: Path) -> str:
    """Trains every track up to --steps; returns why it ended: "steps", "time budget" or "interrupted"."""
    first, last = len(tracks[0].losses), args.steps
    batches = StepBatches(len(data), args.batch_size, args.seed, first, last)
    loader: Iterable[Batch] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=batches,
        num_workers=args.workers,
        collate_fn=collate,
    )
    started, ended = time.monotonic(), "steps"
    with tqdm(total=last, initial=first, unit="step", desc="train", mininterval=0.5) as bar, Interrupts() as interrupts:
        for step, batch in enumerate(loader, start=first):
            # The tracks take turns in going first: a warm cache favours neither.
            for track in tracks if step % 2 == 0 else tracks[::-1]:
                track.step(batch, step, settings)
            shown = tracks[-1]
            bar.set_postfix(loss=f"{shown.losses[-1]:.3f}", images_per_s=f"{args.batch_size / shown.seconds[-1]:.2f}")
            bar.update()
            if interrupts.seen:
                ended = "interrupted"
            elif args.time_budget is not None and time.monotonic() - started > args.time_budget:
                ended = "time budget"
            if ended != "steps" or step + 1 == last or (step + 1) % args.checkpoint_every == 0:
                save_checkpoint(output / "checkpoint.pt", tracks, settings)
            if ended != "steps":
                break
    return ended


def run(args: argparse.Namespace) -> int:
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    train_data, test_data = load_data(args)
    settings = Settings.of(args, device, train_data.class_names)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {args.output}: {error.strerror}") from error
    with chosen_backend(args.backend, device) as serving:
        names = ["eager", "fused"] if args.compare else ["eager" if args.backend == "eager" else "fused"]
        tracks = new_tracks(names, settings)
        for track in tracks:
            if track.swapped is not None and not args.resume:
                print(track.swapped)
        if args.resume:
            load_checkpoint(args.output / "checkpoint.pt", tracks, settings)
        ended = train(tracks, train_data, settings, args, args.output)
        if ended == "interrupted":
            print(f"interrupted after {len(tracks[0].losses)} steps; go on with --resume", file=sys.stderr)
            return 130
        # Paths become text; numbers, flags and None stay as they are.
        arguments = json.loads(json.dumps(vars(args), default=str))
        facts = {
            "arguments": arguments,
            "backend": serving,
            "ended_by": ended,
        }
        batch = collate([train_data[index] for index in range(min(args.batch_size, len(train_data)))])
        test_seconds = None if args.time_budget is None else args.time_budget / 4
        print(report(tracks, batch, test_data.first(args.eval_images), test_seconds, settings, facts, args.output))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for what the caller can mend, 1 for training that failed."""
    args = parse_arguments(argv)
    try:
        return run(args)
    except (CheckpointError, DataError, UsageError) as error:
        # A loader process passes an error on as its whole traceback; the last line is the message.
        print(f"error: {str(error).strip().splitlines()[-1].removeprefix('coco_data.DataError: ')}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
