# SPDX-License-Identifier: Apache-2.0
"""Train a torchvision detector with fpn_fast's kernels, in one process or, under torchrun, in several.

README.md in this folder has commands to start from. Equal arguments give equal runs: data, initial weights and random
numbers follow from --seed. With --compare both models start from equal weights and take turns on the same batches, so
that noise of the machine hits both alike.
"""

from __future__ import annotations

import os

# Before torch is imported. OpenMP's threads otherwise spin while they wait: on busy cores a step took 29 s, not 1.2 s.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from coco_data import DetectionData, StepBatches, collate, load_coco, split_coco
from coco_files import DataError
from detector_checkpoints import load_checkpoint, save_checkpoint
from detector_evaluation import Logs, evaluate
from detector_models import FAMILY, HEADS, NORMS, ONE_STAGE, PYRAMIDS, SLIM, TWO_STAGE
from detector_report import report
from detector_training import Settings, Track, TrainingError, be_deterministic, flipped, interrupts, new_tracks
from digits_on_photographs import MIN_SIDE, DigitsOnPhotographs
from processes import Processes, Progress, UsageError, ignore_interrupts, joined
from static_batches import BucketBatches, bucket_of, sizes_of
from torch.utils.data import DataLoader

BACKENDS = ("eager", "auto", "cpp", "triton", "reference")


def positive(kind: type[int] | type[float]) -> Any:
    """An argparse type: a finite number above 0."""

    def parse(text: str) -> int | float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    parse.__name__ = f"positive {kind.__name__}"
    return parse


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a torchvision detector, with or without fpn_fast's kernels.")

    def option(group: Any, name: str, default: Any, text: str, **more: Any) -> None:
        kind = {"type": positive(type(default))} if isinstance(default, int | float) else {}
        group.add_argument(name, default=default, help=f"{text} (default: {default})", **kind | more)

    def flag(group: Any, name: str, text: str) -> None:
        group.add_argument(name, action="store_true", help=text)

    count, coco = positive(int), {"nargs": 2, "type": Path, "metavar": ("ANNOTATIONS.json", "IMAGES_DIR")}
    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group()
    option(source, "--data", "digits", "generated data set", choices=("digits",))
    source.add_argument("--coco", **coco, help="your data in COCO format; one image in five is held out for testing")
    data.add_argument("--coco-test", **coco, help="your test set in COCO format; then no image is held out")
    option(data, "--image-size", 256, "shorter side of an image, in pixels", metavar="PIXELS")
    text = "in training, draw each image's shorter side between these, in pixels"
    data.add_argument("--multi-scale", nargs=2, type=count, metavar=("LOW", "HIGH"), help=text)
    flag(data, "--flip", "in training, mirror each image with probability 1/2")
    option(data, "--train-images", 4000, "digits: images per epoch")
    option(data, "--smallest-digit", MIN_SIDE, "digits: longer side of the smallest, in pixels", metavar="PIXELS")
    option(data, "--eval-images", 100, "test images to measure AP on")
    option(data, "--workers", 0, "processes that load images; 0: the training process loads them", type=int)

    model = parser.add_argument_group("model")
    option(model, "--model", "faster_rcnn", "detector", choices=TWO_STAGE + ONE_STAGE)
    text = f"a torchvision classifier by its name (a ViT: with --pyramid vitdet), or {SLIM}, small enough for CPUs"
    option(model, "--backbone", "resnet18", text)
    flag(model, "--pretrained", "download ImageNet weights for the backbone")
    text = "backbone stages that do not train, counted from the image"
    option(model, "--frozen-stages", 0, text, choices=range(6), type=int)
    text = "norm of the backbone; group: also of the pyramid; sync: over all processes, on GPUs"
    option(model, "--norm", "group", text, choices=NORMS)
    text = "anchors, proposals and heads; torchvision: for images of 800 pixels; small: of 250; tiny: of 100"
    option(model, "--heads", "small", text, choices=HEADS)
    text = "fpn; others of its family; fpn without its top-down pathway; or the single map C4"
    option(model, "--pyramid", "fpn", text, choices=PYRAMIDS)
    option(model, "--channels", 256, "channels of every pyramid level")
    option(model, "--backend", "auto", "fpn_fast's backend; eager: torchvision's own model", choices=BACKENDS)
    flag(model, "--static-sampling", "sample anchors and proposals on the device, in fixed sizes")
    flag(model, "--static", "train on fixed shapes, without host synchronisation in the losses and gradients")
    flag(model, "--compile", "with --static: compile losses and gradients, one graph for each canvas")
    flag(model, "--compare", "also train torchvision's own model, and compare")

    training = parser.add_argument_group("training")
    option(training, "--steps", 600, "optimiser steps")
    text = "seconds after which training stops; testing stops after a quarter of them (default: no limit)"
    training.add_argument("--time-budget", type=positive(float), metavar="SECONDS", help=text)
    option(training, "--batch-size", 2, "images per batch and process")
    option(training, "--accumulate", 1, "batches per step and process; their gradients are averaged")
    option(training, "--lr", 4e-4, "learning rate of AdamW")
    text = "from each of these steps on, a tenth of the learning rate before (default: none)"
    training.add_argument("--lr-steps", nargs="+", type=count, default=[], metavar="STEP", help=text)
    # Detectors from random weights meet a few huge gradients early on.
    option(training, "--max-gradient-norm", 10.0, "norm that larger gradients are scaled down to")
    flag(training, "--amp", "mixed precision: bfloat16 on CPUs, float16 on GPUs")
    flag(training, "--float64", "train in float64, twice as slow on CPUs")
    flag(training, "--channels-last", "store weights and maps in channels-last order")
    option(training, "--seed", 0, "seed of everything random", type=int)
    flag(training, "--deterministic", "repeat bit for bit, or raise an error")

    where = parser.add_argument_group("where it runs and what it writes")
    option(where, "--device", "auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"))
    where.add_argument("--threads", type=count, help="CPU threads per process (default: PyTorch's choice)")
    flag(where, "--fsdp", "under torchrun, shard the model with FSDP2")
    output = Path("runs/train_detector")
    option(where, "--output", output, "folder for images, figures and the checkpoint", type=Path, metavar="DIR")
    option(where, "--checkpoint-every", 200, "steps between checkpoints", metavar="STEPS")
    text = "steps between measurements of AP (default: AP at the end alone)"
    where.add_argument("--evaluate-every", type=count, metavar="STEPS", help=text)
    flag(where, "--resume", "continue from the checkpoint in --output")
    flag(where, "--tensorboard", "write TensorBoard logs to --output/tensorboard")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> Settings:
    """Parse and check the command line; argparse ends a wrong one with a line and exit code 2."""
    parser = build_parser()
    args = parser.parse_args(argv, namespace=Settings())
    low, high = args.multi_scale or (args.image_size, args.image_size)
    digit, two_stage = args.smallest_digit, args.model in TWO_STAGE
    eager = args.backend == "eager" or args.compare
    static = two_stage and not eager
    fcos = args.model == "fcos" and args.channels % 32 != 0
    names = " and ".join(TWO_STAGE)
    for wrong, message in (
        (args.compare and args.backend == "eager", "--compare needs --backend auto, cpp, triton or reference"),
        (args.pyramid == "c4" and not two_stage, f"--pyramid c4 is for {names}, got --model {args.model}"),
        (args.pyramid in FAMILY and eager, f"--pyramid {args.pyramid} takes neither --backend eager nor --compare"),
        (fcos, f"--channels must be a multiple of 32 for fcos, whose heads have 32 groups, got {args.channels}"),
        (args.static_sampling and not static, f"--static-sampling is for fpn_fast's {names}, without --compare"),
        (
            args.static and (args.backend == "eager" or args.compare or args.fsdp),
            "--static is for fpn_fast's models, without --compare and --fsdp",
        ),
        (args.static and args.static_sampling, "--static samples in fixed sizes already: leave --static-sampling out"),
        (args.compile and not args.static, "--compile needs --static"),
        (args.float64 and args.amp, "--float64 and --amp exclude each other"),
        (args.coco_test is not None and args.coco is None, "--coco-test needs --coco"),
        (min(low, args.image_size) < 64, "--image-size and --multi-scale must be at least 64"),
        (low > high, f"--multi-scale must be LOW HIGH, got {low} {high}"),
        (digit < MIN_SIDE, f"--smallest-digit must be at least {MIN_SIDE}, got {digit}"),
        (digit > args.image_size // 2, f"--smallest-digit must be at most half of --image-size, got {digit}"),
        (args.workers < 0, f"--workers must not be negative, got {args.workers}"),
        (not 0 <= args.seed < 2**32, f"--seed must be at least 0 and below 2**32, got {args.seed}"),
        (args.device == "cuda" and not torch.cuda.is_available(), "--device cuda: this PyTorch finds no CUDA device"),
    ):
        if wrong:
            parser.error(message)
    return args


def load_data(args: Settings, processes: Processes) -> tuple[DetectionData, DetectionData]:
    masks = args.model == "mask_rcnn"
    if args.coco is None:
        sets = (("train", args.train_images), ("test", args.eval_images))
        options = (args.image_size, args.seed, masks, args.smallest_digit)
        return tuple(DigitsOnPhotographs(split, length, *options) for split, length in sets)
    how: dict[str, Any] = {"masks": masks, "workers": args.workers, "quiet": not processes.leads}
    if args.coco_test is None:
        train_data, test_data = split_coco(*args.coco, seed=args.seed, **how)
    else:
        train_data, test_data = load_coco(*args.coco, **how), load_coco(*args.coco_test, **how)
        if train_data.class_names != test_data.class_names or train_data.category_ids != test_data.category_ids:
            raise DataError(f"{args.coco_test[0]} must have the categories of {args.coco[0]}")
    if all(annotation["iscrowd"] for annotation in train_data.coco()["annotations"]):
        raise DataError(f"{args.coco[0]} leaves no box to learn from in the train split")
    return train_data, test_data.at(range(min(args.eval_images, len(test_data))))


@contextlib.contextmanager
def chosen_backend(name: str, device: torch.device) -> Iterator[str]:
    """Set fpn_fast's backend and yield the name of the one that serves; UsageError where none can."""
    if name == "eager":
        yield "eager"
        return
    try:
        from fpn_fast import backends
    except ImportError as error:
        raise UsageError(f"--backend {name} needs fpn_fast, or take --backend eager: {error}") from error
    try:
        with backends.use(name):
            serving = backends.choose(device.type)
    except backends.BackendUnavailableError as error:
        raise UsageError(str(error)) from error
    with backends.use(name):
        yield serving


def train(tracks: list[Track], data: DetectionData, test: DetectionData, args: Settings, logs: Logs) -> str:
    """Train every track up to --steps; return why it ended: "steps", "time budget" or "interrupted"."""
    first, last, processes = len(tracks[0].losses), args.steps, tracks[0].processes
    share = (args.accumulate, processes.rank, processes.world)
    order: tuple[Any, ...] = (args.batch_size, args.seed, range(first, last), *share)
    if args.static:
        buckets = [bucket_of(size) for size in sizes_of(data, args.image_size)]
        batches: StepBatches = BucketBatches(buckets, *order)
    else:
        batches = StepBatches(len(data), *order)
    how: dict[str, Any] = {"num_workers": args.workers, "collate_fn": collate, "worker_init_fn": ignore_interrupts}
    arriving = iter(DataLoader(data, batch_sampler=batches, **how))
    started, ended = time.monotonic(), "steps"
    bar = Progress("training", "step", last, args.time_budget, initial=first, disable=not processes.leads)
    with bar, interrupts() as interrupted:
        for step in range(first, last):
            taken = list(itertools.islice(arriving, args.accumulate))
            places = range(processes.rank, args.batches_per_step, processes.world)
            batch = [flipped(each, step, place, args) for place, each in zip(places, taken, strict=True)]
            # The tracks take turns in going first: a warm cache favours neither.
            for track in tracks if step % 2 == 0 else tracks[::-1]:
                track.step(batch, step, args)
                logs.step(track, step, args)
            bar.set_postfix_str(", ".join(f"loss {track.name} {track.losses[-1]:.2f}" for track in tracks), False)
            bar.update()
            if processes.any(bool(interrupted)):
                ended = "interrupted"
            elif processes.any(args.time_budget is not None and time.monotonic() - started > args.time_budget):
                ended = "time budget"
            if ended != "steps" or step + 1 == last or (step + 1) % args.checkpoint_every == 0:
                save_checkpoint(args.output / "checkpoint.pt", tracks, args)
            if ended != "steps":
                break
            if args.evaluate_every is not None and (step + 1) % args.evaluate_every == 0 and step + 1 < last:
                logs.test(evaluate(tracks, test, None, args)[0], step)
    return ended


def run(args: Settings, processes: Processes) -> int:
    if args.fsdp and processes.world == 1:
        raise UsageError("--fsdp shards over processes: start the script with torchrun --nproc-per-node 2 or more")
    if args.norm == "sync" and processes.device.type == "cpu" and processes.world > 1:
        raise UsageError("--norm sync: PyTorch's SyncBatchNorm works on GPUs alone; take --norm group")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        be_deterministic()
    train_data, test_data = load_data(args, processes)
    args.complete(processes, train_data.class_names, sizes_of(train_data, args.image_size))
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {args.output}: {error.strerror}") from error
    with chosen_backend(args.backend, processes.device) as serving, contextlib.closing(Logs(args, processes)) as logs:
        names = ["eager", "fused"] if args.compare else ["eager" if args.backend == "eager" else "fused"]
        tracks = new_tracks(names, args, processes)
        for track in tracks:
            if track.swapped is not None and not args.resume and processes.leads:
                print(track.swapped, flush=True)
        if args.resume:
            load_checkpoint(args.output / "checkpoint.pt", tracks, args)
        ended = train(tracks, train_data, test_data, args, logs)
        if ended == "interrupted":
            if processes.leads:
                print(f"interrupted after {len(tracks[0].losses)} steps; --resume continues", file=sys.stderr)
            return 130
        facts = {"arguments": args.plain(), "backend": serving, "ended_by": ended, "test_history": logs.history}
        batch = collate([train_data[index] for index in range(min(args.batch_size, len(train_data)))])
        text = report(tracks, batch, test_data, args, facts)
        if text is not None:
            print(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for training that failed, 2 for what the caller can mend, 130 for Ctrl-C."""
    args = parse_arguments(argv)
    with joined(args.device) as processes:
        try:
            return run(args, processes)
        except KeyboardInterrupt:
            # While it reads the data, builds the model or tests; training ends its step first.
            if processes.leads:
                print("interrupted", file=sys.stderr)
            return 130
        except (DataError, TrainingError, UsageError) as error:
            # A loader process passes an error on as its whole traceback, with the message at the end.
            message = str(error).rpartition("coco_files.DataError: ")[2].strip()
            code = 1 if isinstance(error, TrainingError) else 2
        if processes.leads or code == 2:
            # All processes find the same faults in a file; the last line has their number.
            shown = message.splitlines()[0 if processes.leads else -1 :]
            print(*(f"error: {line}" for line in shown), sep="\n", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
