# SPDX-License-Identifier: Apache-2.0
"""Trains a torchvision detector with fpn_fast's kernels swapped in, in one process or, by torchrun, in many.

    python examples/train_detector.py                            # digits on photographs, the best backend
    python examples/train_detector.py --compare                  # beside the same model without our kernels
    python examples/train_detector.py --coco annotations.json images/ --model mask_rcnn --backbone resnet50
    torchrun --nproc-per-node 2 examples/train_detector.py --amp # DistributedDataParallel; FSDP2 with --fsdp

A run with equal arguments repeats itself: data, initial weights and the random stream of every step come from --seed.
With --compare both models start from equal weights and take their steps in turn on the same batches, so that noise
of the machine hits both alike.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from coco_data import DataError, DetectionData, StepBatches, check_boxes, collate, load_coco, split_coco
from detector_checkpoints import CheckpointError, load_checkpoint, save_checkpoint
from detector_evaluation import evaluate
from detector_logs import Logs, NoLogsError
from detector_models import NORMS, ONE_STAGE, PYRAMIDS, TWO_STAGE, ModelError
from detector_report import report
from detector_training import (
    Batch,
    Interrupts,
    Settings,
    Track,
    TrainingError,
    be_deterministic,
    flipped,
    new_tracks,
)
from digits_on_photographs import DigitsOnPhotographs
from processes import Processes, joined
from torch.utils.data import DataLoader
from tqdm import tqdm

BUDGET = "training stops after this; testing after a quarter of it more, with the AP of the images seen until then"
BACKENDS = ("eager", "auto", "cpp", "triton", "reference")
COCO = ("ANNOTATIONS.json", "IMAGES_DIR")


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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Train a torchvision detector, with or without fpn_fast.")
    data = parser.add_argument_group("data")
    of = data.add_mutually_exclusive_group()
    of.add_argument("--data", choices=("digits",), default="digits", help="the set that is made on the fly")
    of.add_argument("--coco", nargs=2, type=Path, metavar=COCO, help="your own set; one image in five is held out")
    data.add_argument("--coco-test", nargs=2, type=Path, metavar=COCO, help="a test set of its own: none is held out")
    data.add_argument("--image-size", type=_positive(int), default=256, help="shorter side, in pixels")
    data.add_argument("--multi-scale", nargs=2, type=_positive(int), metavar=("LOW", "HIGH"), help="in training, drawn")
    data.add_argument("--flip", action="store_true", help="in training, half the images mirrored")
    data.add_argument("--train-images", type=_positive(int), default=4000, help="digits: pictures in an epoch")
    data.add_argument("--eval-images", type=_positive(int), default=100, help="test pictures to measure AP on")
    data.add_argument("--workers", type=int, default=0, help="processes that make batches")

    model = parser.add_argument_group("model")
    model.add_argument("--model", choices=TWO_STAGE + ONE_STAGE, default="faster_rcnn")
    model.add_argument("--backbone", default="resnet18", help="a classifier of torchvision, by its name there")
    model.add_argument("--pretrained", action="store_true", help="ImageNet weights for the backbone; downloads them")
    model.add_argument("--frozen-stages", type=int, choices=range(6), default=0, help="of the backbone, from the image")
    norm_help = "of the backbone, and of the pyramid too where it is group; sync: over processes, on GPUs"
    model.add_argument("--norm", choices=NORMS, default="group", help=norm_help)
    model.add_argument("--heads", choices=("small", "torchvision"), default="small", help="sizes of anchors and heads")
    model.add_argument("--pyramid", choices=PYRAMIDS, default="fpn", help="the others are for comparison")
    model.add_argument("--channels", type=_positive(int), default=256, help="of the pyramid's maps")
    model.add_argument("--backend", choices=BACKENDS, default="auto", help="eager: torchvision as it is")
    model.add_argument("--static-sampling", action="store_true", help="samples of a fixed size, drawn on the device")
    model.add_argument("--compare", action="store_true", help="train the same model without our kernels beside it")

    training = parser.add_argument_group("training")
    training.add_argument("--steps", type=_positive(int), default=600)
    training.add_argument("--time-budget", type=_positive(float), metavar="SECONDS", help=BUDGET)
    training.add_argument("--batch-size", type=_positive(int), default=2, help="of a process, in one go")
    training.add_argument("--accumulate", type=_positive(int), default=1, help="batches of a process in a step")
    training.add_argument("--lr", type=_positive(float), default=4e-4)
    training.add_argument(
        "--lr-steps", nargs="+", type=_positive(int), default=[], metavar="STEP", help="from each on, a tenth of it"
    )
    # Detectors from random weights meet a few huge gradients early on.
    training.add_argument("--max-gradient-norm", type=_positive(float), default=10.0)
    training.add_argument("--amp", action="store_true", help="bfloat16 on a CPU; float16, gradients scaled, on CUDA")
    training.add_argument("--float64", action="store_true", help="to compare free of roundings; twice as slow on a CPU")
    training.add_argument("--channels-last", action="store_true")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--deterministic", action="store_true", help="two runs equal bit for bit, or an error")

    where = parser.add_argument_group("where it runs, and what it writes")
    where.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    where.add_argument("--threads", type=_positive(int), help="CPU threads; PyTorch's choice if left out")
    where.add_argument("--fsdp", action="store_true", help="under torchrun: shard the model instead of copying it")
    where.add_argument("--output", type=Path, default=Path("runs/train_detector"), metavar="DIR")
    where.add_argument("--checkpoint-every", type=_positive(int), default=200, metavar="STEPS")
    where.add_argument("--evaluate-every", type=_positive(int), metavar="STEPS", help="AP also while it trains")
    where.add_argument("--resume", action="store_true", help="go on from the checkpoint in --output")
    where.add_argument("--tensorboard", action="store_true", help="logs in --output/tensorboard")
    return parser


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line, checked; argparse itself ends a wrong one with a line and exit code 2."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.compare and args.backend == "eager":
        parser.error("--compare sets a backend beside eager: take --backend auto, cpp, triton or reference")
    if args.pyramid == "c4" and args.model not in TWO_STAGE:
        parser.error(f"--pyramid c4 is for {' and '.join(TWO_STAGE)}, got --model {args.model}")
    if args.model == "fcos" and args.channels % 32 != 0:
        parser.error(f"--channels must be a multiple of 32 for fcos, whose heads have 32 groups, got {args.channels}")
    if args.static_sampling and (args.model not in TWO_STAGE or args.backend == "eager" or args.compare):
        parser.error(f"--static-sampling is for {' and '.join(TWO_STAGE)} with our kernels, and has no --compare")
    if args.float64 and args.amp:
        parser.error("--float64 and --amp exclude each other")
    if args.coco_test is not None and args.coco is None:
        parser.error("--coco-test goes with --coco")
    smallest = min([args.image_size, *(args.multi_scale or ())])
    if smallest < 64:
        parser.error(f"--image-size and --multi-scale must be at least 64, got {smallest}")
    if args.multi_scale is not None and args.multi_scale[0] > args.multi_scale[1]:
        parser.error(f"--multi-scale must be LOW HIGH, got {args.multi_scale[0]} {args.multi_scale[1]}")
    if args.workers < 0:
        parser.error(f"--workers must not be negative, got {args.workers}")
    if not 0 <= args.seed < 2**32:
        parser.error(f"--seed must be at least 0 and below 2**32, got {args.seed}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch finds no CUDA device")
    return args


def load_data(args: argparse.Namespace) -> tuple[DetectionData, DetectionData]:
    """Train and test sets."""
    masks = args.model == "mask_rcnn"
    if args.coco is None:
        sizes = {"side": args.image_size, "seed": args.seed, "masks": masks}
        return (
            DigitsOnPhotographs("train", args.train_images, **sizes),
            DigitsOnPhotographs("test", args.eval_images, **sizes),
        )
    if args.coco_test is None:
        train_data, test_data = split_coco(*args.coco, masks=masks, seed=args.seed)
    else:
        train_data, test_data = load_coco(*args.coco, masks=masks), load_coco(*args.coco_test, masks=masks)
        if train_data.class_names != test_data.class_names or train_data.category_ids != test_data.category_ids:
            raise DataError(f"{args.coco_test[0]} must have the categories of {args.coco[0]}")
    check_boxes(train_data, args.coco[0])
    return train_data, test_data


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


def train(
    tracks: list[Track],
    data: DetectionData,
    test: DetectionData,
    settings: Settings,
    args: argparse.Namespace,
    processes: Processes,
    logs: Logs,
) -> str:
    """Trains every track up to --steps; returns why it ended: "steps", "time budget" or "interrupted"."""
    first, last = len(tracks[0].losses), args.steps
    share = {"accumulate": args.accumulate, "rank": processes.rank, "world": processes.world}
    loader: Iterable[Batch] = DataLoader(
        data,  # type: ignore[arg-type]
        batch_sampler=StepBatches(len(data), args.batch_size, args.seed, first, last, **share),
        num_workers=args.workers,
        collate_fn=collate,
    )
    arriving = iter(loader)
    started, ended = time.monotonic(), "steps"
    bar = tqdm(total=last, initial=first, unit="step", desc="train", mininterval=0.5, disable=not processes.leads)
    with bar, Interrupts() as interrupts:
        for step in range(first, last):
            taken = list(itertools.islice(arriving, args.accumulate))
            places = range(processes.rank, settings.batches_per_step, processes.world)
            batches = [flipped(batch, step, place, settings) for place, batch in zip(places, taken, strict=True)]
            # The tracks take turns in going first: a warm cache favours neither.
            for track in tracks if step % 2 == 0 else tracks[::-1]:
                track.step(batches, step, settings)
                logs.step(track, step, settings)
            shown = tracks[-1]
            rate = settings.batch_size * settings.batches_per_step / shown.seconds[-1]
            bar.set_postfix(loss=f"{shown.losses[-1]:.3f}", images_per_s=f"{rate:.2f}")
            bar.update()
            if processes.any(interrupts.seen):
                ended = "interrupted"
            elif processes.any(args.time_budget is not None and time.monotonic() - started > args.time_budget):
                ended = "time budget"
            if ended != "steps" or step + 1 == last or (step + 1) % args.checkpoint_every == 0:
                save_checkpoint(args.output / "checkpoint.pt", tracks, settings, processes)
            if ended != "steps":
                break
            if args.evaluate_every is not None and (step + 1) % args.evaluate_every == 0 and step + 1 < last:
                logs.test(evaluate(tracks, test, None, settings, processes)[0], step)
    return ended


def run(args: argparse.Namespace, processes: Processes) -> int:
    device = processes.device
    if args.fsdp and processes.world == 1:
        raise UsageError("--fsdp shards over processes: start the script with torchrun --nproc-per-node 2 or more")
    if args.norm == "sync" and device.type == "cpu" and processes.world > 1:
        raise UsageError("--norm sync: PyTorch's SyncBatchNorm works on GPUs alone; take --norm group")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.deterministic:
        be_deterministic()
    train_data, test_data = load_data(args)
    test_data = test_data.first(args.eval_images)
    settings = Settings.of(args, processes, train_data.class_names)
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--output {args.output}: {error.strerror}") from error
    with chosen_backend(args.backend, device) as serving, Logs(args, processes) as logs:
        names = ["eager", "fused"] if args.compare else ["eager" if args.backend == "eager" else "fused"]
        tracks = new_tracks(names, settings, processes, args.fsdp)
        for track in tracks:
            if track.swapped is not None and not args.resume and processes.leads:
                print(track.swapped)
        if args.resume:
            load_checkpoint(args.output / "checkpoint.pt", tracks, settings)
        ended = train(tracks, train_data, test_data, settings, args, processes, logs)
        if ended == "interrupted":
            if processes.leads:
                print(f"interrupted after {len(tracks[0].losses)} steps; go on with --resume", file=sys.stderr)
            return 130
        # Paths become text; numbers, flags and None stay as they are.
        arguments = json.loads(json.dumps(vars(args), default=str))
        facts = {"arguments": arguments, "backend": serving, "ended_by": ended, "test_history": logs.history}
        batch = collate([train_data[index] for index in range(min(args.batch_size, len(train_data)))])
        test_seconds = None if args.time_budget is None else args.time_budget / 4
        text = report(tracks, batch, test_data, test_seconds, settings, facts, args.output, processes)
        if text is not None:
            print(text)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 2 for what the caller can mend, 1 for training that failed."""
    args = parse_arguments(argv)
    with joined(args.device) as processes:
        try:
            return run(args, processes)
        except (CheckpointError, DataError, ModelError, NoLogsError, UsageError) as error:
            # A loader process passes an error on as its whole traceback; the last line is the message.
            message = str(error).strip().splitlines()[-1].removeprefix("coco_data.DataError: ")
            code = 2
        except TrainingError as error:
            message, code = str(error), 1
        if processes.leads or code == 2:
            print(f"error: {message}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
