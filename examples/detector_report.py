# SPDX-License-Identifier: Apache-2.0
"""The report of a training run: AP, times per stage, images, a JSON file and a short table."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from coco_data import DetectionData
from detector_evaluation import evaluate
from detector_training import Batch, Settings, Track, losses_of, to_device
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from processes import Progress
from torch import Tensor, nn
from torchvision.ops import nms
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

COLOURS = {"eager": "#d95f02", "fused": "#1b6ca8"}
PALETTE = ("#55ddff", "#ffd633", "#8cff73", "#ff8ccc", "#ff9a4d")
PACKAGES = ("torch", "torchvision", "fpn_fast", "scikit-learn", "scikit-image", "pycocotools")
# The parts of a detector that are timed alone, where it has them.
STAGES = {"pyramid": "backbone.fpn", "RPN": "rpn", "RoI pooling": "roi_heads.box_roi_pool"}
# The first steps pay for allocations and, on CUDA, for choosing convolution algorithms.
WARMUP_STEPS_LEFT_OUT = 2
REPEATS, UNCOUNTED_REPEATS = 40, 5
# The reference backend loops over RoIs in Python: it gets fewer repeats.
TIMING_SECONDS = 10
# Images in detections.png and pyramid.png, and the side that a drawn image is enlarged to, in pixels.
SHOWN_DETECTIONS, SHOWN_PYRAMIDS, SHOWN_SIDE = 8, 3, 384
SHOWN_SCORE, SHOWN_AT_LEAST, SHOWN_OVERLAP = 0.4, 2, 0.4


def stage_seconds(tracks: list[Track], name: str, batch: Batch, settings: Settings) -> dict[str, Any]:
    """Median seconds of one stage, forward and backward, for each track, on what its own model passes to it.

    name: of the stage's module. The medians are under "median_seconds", with the maps' shapes and dtype.
    """
    runs: dict[str, Callable[[], object]] = {}
    for track in tracks:
        module, inputs = track.model.get_submodule(name), list[Any]()
        hook = module.register_forward_pre_hook(lambda _, given, kept=inputs: kept.extend(given))
        with hook, torch.no_grad():
            losses_of(track.model, to_device(batch, settings), 0, settings)
        place = next(i for i, value in enumerate(inputs) if isinstance(value, dict))
        inputs[place] = {name: each.detach().requires_grad_() for name, each in inputs[place].items()}
        runs[track.name] = _stage_run(module, inputs, list(inputs[place].values()), settings)
    maps = list(inputs[place].values())
    shapes = [list(each.shape) for each in maps]
    return {**_median_seconds(runs, settings), "maps": shapes, "dtype": str(maps[0].dtype)}


def _stage_run(module: nn.Module, inputs: list[Any], maps: list[Tensor], settings: Settings) -> Callable[[], object]:
    def run() -> object:
        with settings.autocast():
            outputs = module(*inputs)
        # An RPN returns proposals and losses; the others return maps by name, or one tensor.
        outputs = outputs[1] if isinstance(outputs, tuple) else outputs
        values = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
        return torch.autograd.grad(values, maps, [torch.ones_like(each) for each in values], allow_unused=True)

    return run


def _median_seconds(runs: dict[str, Callable[[], object]], settings: Settings) -> dict[str, Any]:
    """The runs take turns, so that noise of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    until = time.perf_counter() + TIMING_SECONDS
    for repeat in range(UNCOUNTED_REPEATS + REPEATS):
        if repeat > UNCOUNTED_REPEATS and time.perf_counter() > until:
            break
        for name in list(runs)[:: 1 if repeat % 2 == 0 else -1]:
            settings.synchronize()
            started = time.perf_counter()
            runs[name]()
            settings.synchronize()
            times[name].append(time.perf_counter() - started)
    counted = {name: values[UNCOUNTED_REPEATS:] for name, values in times.items()}
    medians = {name: statistics.median(values) for name, values in counted.items()}
    return {"median_seconds": medians, "repeats": len(next(iter(counted.values())))}


def differences_at_equal_weights(tracks: list[Track], batch: Batch, settings: Settings) -> dict[str, float]:
    """How far one batch's loss and gradients differ when the second model has the first one's weights.

    This is what the kernels themselves change. Over a run the difference grows, because one proposal more or less
    changes what is sampled. The gradient's difference is relative to its norm, and the largest of all parameters.
    """
    batch = to_device(batch, settings)
    first, second = (track.model for track in tracks)
    trained = copy.deepcopy(second.state_dict())
    second.load_state_dict(first.state_dict())
    losses, gradients = [], []
    for model in (first, second):
        loss = torch.stack([part.float() for part in losses_of(model, batch, 0, settings).values()]).sum()
        losses.append(loss.item())
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    second.load_state_dict(trained)
    relative = [
        ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()
        for theirs, ours in zip(*gradients, strict=True)
    ]
    return {"loss": abs(losses[1] - losses[0]), "gradient_relative": max(relative)}


def draw_detections(data: DetectionData, detections: dict[str, dict[int, dict[str, Tensor]]], path: Path) -> None:
    """Draw test images by model and index: annotated boxes in white, detections in colour with class and score."""
    per_model = SHOWN_DETECTIONS // len(detections)
    chosen = [(name, *each) for name, found in detections.items() for each in list(found.items())[:per_model]]
    font, cells = {"font": findfont("DejaVu Sans"), "font_size": 17}, []
    for name, index, found in chosen:
        image, target = data[index]
        scale = SHOWN_SIDE / min(image.shape[-2:])
        drawn = F.resize(image, [round(side * scale) for side in image.shape[-2:]]).clamp(0, 1)
        # The detector suppresses within a class; here one class per place is legible.
        best = nms(found["boxes"].float(), found["scores"].float(), SHOWN_OVERLAP)
        # A model that has learned little still shows where it looks, with low scores.
        kept = best[: max(SHOWN_AT_LEAST, int((found["scores"][best] >= SHOWN_SCORE).sum()))]
        boxes, labels, scores = (found[key][kept] for key in ("boxes", "labels", "scores"))
        colours = [PALETTE[label % len(PALETTE)] for label in labels]
        style: dict[str, Any] = {"colors": colours, "label_background_colors": colours, "fill_labels": True, "width": 3}
        style["label_colors"] = ["black"] * len(labels)
        style["labels"] = [f"{data.class_names[i - 1]}  {each:.2f}" for i, each in zip(labels, scores, strict=True)]
        for drawn_boxes, options in ((target["boxes"], {"colors": "white"}), (boxes, style | font)):
            if len(drawn_boxes):
                drawn = draw_bounding_boxes(drawn, drawn_boxes * scale, **options)
        cells.append((f"{name}, test image {index + 1}", drawn.permute(1, 2, 0)))
    shown = f"scores of {SHOWN_SCORE} or more, or the best {SHOWN_AT_LEAST}"
    title = f"Detections, one class per place, with {shown}; annotations in white"
    _draw_grid(cells, min(4, len(cells)), path, title)


@torch.inference_mode()
def draw_pyramid(track: Track, data: DetectionData, settings: Settings, path: Path) -> None:
    """Draw test images and, next to each, the norm over the channels of every map of the averaged model's pyramid."""
    model, count = track.average.module, min(SHOWN_PYRAMIDS, len(data))
    images = [data[index][0].to(settings.torch_device, settings.dtype) for index in range(count)]
    # P6 of a two-stage detector is P5 with every other pixel.
    found = [model.backbone(model.transform([image])[0].tensors) for image in images]
    found = [{name: each for name, each in maps.items() if name != "pool"} for maps in found]
    cells = []
    for image, maps in zip(images, found, strict=True):
        cells.append(("image", image.permute(1, 2, 0)))
        for level, features in enumerate(maps.values(), start=2 if hasattr(model, "rpn") else 3):
            height, width = features.shape[-2:]
            name = "C4" if settings.pyramid == "c4" else f"P{level}"
            cells.append((f"{name}, {width} x {height}", features[0].norm(dim=0)))
    _draw_grid(cells, 1 + len(found[0]), path)


def _draw_grid(cells: list[tuple[str, Tensor]], columns: int, path: Path, title: str | None = None) -> None:
    """Draw images [H, W, 3] and maps [H, W], row by row, each below its name."""
    rows = -(-len(cells) // columns)
    figure = Figure(figsize=(3.2 * columns, 3.5 * rows), dpi=110, layout="constrained")
    for axes, (name, image) in zip(figure.subplots(rows, columns, squeeze=False).flat, cells, strict=False):
        axes.imshow(image.float().cpu().numpy(), cmap="magma")
        axes.set_title(name, fontsize=10)
    for axes in figure.axes:
        axes.set_axis_off()
    figure.suptitle(title)
    figure.savefig(path)


def draw_losses(tracks: list[Track], path: Path) -> None:
    """Draw every track's loss by step; with two tracks also their difference, below."""
    compared = len(tracks) == 2
    figure = Figure(figsize=(8, 6 if compared else 4), dpi=120, layout="constrained")
    axes = figure.subplots(1 + compared, 1, squeeze=False, sharex=True, height_ratios=[2, 1][: 1 + compared])[:, 0]
    steps = np.arange(1, len(tracks[0].losses) + 1)
    width = max(1, min(20, len(steps) // 5))
    for track, style in zip(tracks, ("-", "--"), strict=False):
        colour = COLOURS[track.name]
        mean = np.convolve(track.losses, np.ones(width) / width, mode="valid")
        axes[0].plot(steps, track.losses, color=colour, alpha=0.25, linewidth=1, linestyle=style)
        label = f"{track.name}, mean of {width} steps"
        axes[0].plot(steps[width - 1 :], mean, color=colour, linewidth=2.2, linestyle=style, label=label)
    axes[0].set(ylabel="loss", ylim=(0, None))
    axes[0].legend(frameon=False)
    if compared:
        axes[1].axhline(0, color="0.7", linewidth=0.8)
        axes[1].plot(steps, np.subtract(tracks[1].losses, tracks[0].losses), color="0.2", linewidth=1)
        axes[1].set_ylabel(f"{tracks[1].name} − {tracks[0].name}")
        axes[1].ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes[-1].set_xlabel("step")
    axes[-1].locator_params(axis="x", integer=True)
    for each in axes:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", alpha=0.25)
    figure.savefig(path)


def _machine(settings: Settings) -> dict[str, Any]:
    versions: dict[str, str | None] = dict.fromkeys(PACKAGES)
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    device = settings.torch_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "versions": versions,
    }


def report(
    tracks: list[Track], batch: Batch, test: DetectionData, settings: Settings, facts: dict[str, Any]
) -> str | None:
    """Evaluate, measure, write images and figures.json into --output; return the table to print.

    batch: a training batch, on which the stages are timed where one process trains. All processes evaluate; the leading
    one alone does the rest, and the others get None.
    """
    budget = None if settings.time_budget is None else settings.time_budget / 4
    precisions, detections = evaluate(tracks, test, budget, settings)
    processes = tracks[0].processes
    if not processes.leads:
        return None
    alone, output = processes.world == 1, settings.output
    figures: dict[str, Any] = {**facts, **_machine(settings)}
    figures |= {"steps": len(tracks[0].losses), "processes": processes.world}
    modules = dict(tracks[0].model.named_modules()) if alone else {}
    timed, figures["stages"] = {stage: name for stage, name in STAGES.items() if name in modules}, {}
    with Progress("timing", "stage", len(timed), disable=not alone) as bar:
        for stage, name in timed.items():
            figures["stages"][stage] = stage_seconds(tracks, name, batch, settings)
            bar.update()
    for track in tracks:
        step_seconds = statistics.median(track.seconds[WARMUP_STEPS_LEFT_OUT:] or track.seconds)
        figures[track.name] = {
            "step_seconds_median": step_seconds,
            "images_per_second": settings.batch_size * settings.batches_per_step / step_seconds,
            "test_seconds_per_image": track.test_seconds,
            "test": precisions[track.name],
            "losses": track.losses,
            "step_seconds": track.seconds,
            "swapped": track.swapped.as_dict() if track.swapped is not None else None,
        }
    if len(tracks) == 2:
        gaps = np.abs(np.subtract(tracks[0].losses, tracks[1].losses))
        figures["loss_difference"] = {"largest": gaps.max(), "first_step": gaps[0]}
        if alone:
            equal = differences_at_equal_weights(tracks, batch, settings)
            figures["loss_difference"]["at_equal_weights"] = equal
    paths = [output / f"{name}.png" for name in ("detections", "loss_curves", "pyramid")[: 3 if alone else 2]]
    draw_detections(test, detections, paths[0])
    draw_losses(tracks, paths[1])
    if alone:
        draw_pyramid(tracks[-1], test, settings, paths[2])
    figures["pictures"] = list(map(str, paths))
    (output / "figures.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return table(figures, [track.name for track in tracks], output)


def table(figures: dict[str, Any], names: list[str], output: Path) -> str:
    """The figures a reader wants first, as plain text of at most 100 columns."""
    ours = [figures[name] for name in names]
    times = {
        "training step, median": [each["step_seconds_median"] for each in ours],
        "inference, per image": [each["test_seconds_per_image"] for each in ours],
    }
    times |= {
        f"{stage}, forward and backward": [found["median_seconds"][name] for name in names]
        for stage, found in figures["stages"].items()
    }
    rows = [["", *names]]
    for text, seconds in times.items():
        rows.append([text, *(f"{1e3 * each:.{1 if seconds[0] > 0.01 else 2}f} ms" for each in seconds)])
        if len(seconds) == 2:
            ratio = seconds[0] / seconds[1]
            rows[-1].append(f"{ratio:.2f}x {'faster' if ratio >= 1 else '(slower)'}")
    metrics = (
        ("AP / AP50", "", ("AP", "AP50")),
        ("AP small / medium / large", "", ("AP_small", "AP_medium", "AP_large")),
        ("AP / AP50 of masks", "masks", ("AP", "AP50")),
        ("AR of 10 / 100 proposals", "proposals", ("AR_10", "AR_100")),
    )
    for text, group, keys in metrics:
        tests = [each["test"].get(group, {}) if group else each["test"] for each in ours]
        values = [["-" if test[key] is None else f"{test[key]:.3f}" for key in keys] for test in tests if test]
        if values:
            rows.append([text, *map(" / ".join, values)])
    last = min(20, figures["steps"])
    rows.append(["loss, first step", *(f"{each['losses'][0]:.4f}" for each in ours)])
    means = [statistics.fmean(each["losses"][-last:]) for each in ours]
    rows.append([f"loss, mean of last {last} steps", *(f"{each:.4f}" for each in means)])
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(names) + 1)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], [*widths[1:], 0])]) for row in rows]
    if len(names) == 2:
        slower = [text for text, seconds in times.items() if seconds[0] < seconds[1]]
        lines.append(f"slower with fpn_fast: {'; '.join(slower) or 'none of these times'}")
        gap = figures["loss_difference"]
        if "at_equal_weights" in gap:
            loss, gradient = gap["at_equal_weights"].values()
            lines.append(f"difference at equal weights: loss {loss:.2g}, gradients {gradient:.1g} of their norm")
        lines.append(f"largest loss difference of a step: {gap['largest']:.2g}; roundings grow over a run")
    lines += [
        f"{figures['steps']} steps, ended by {figures['ended_by']}; AP on {ours[0]['test']['images']} images; "
        f"{figures['device']}, threads: {figures['threads']}, processes: {figures['processes']}",
        f"fpn_fast's backend: {figures['backend']}",
        *(f"image: {path}" for path in figures["pictures"]),
        f"all figures: {output / 'figures.json'}",
    ]
    return "\n".join(lines)
