# SPDX-License-Identifier: Apache-2.0
"""What a training run is reported by: AP, merge and pooler times, two pictures, a JSON file and a short table."""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from coco_data import DetectionData
from detector_evaluation import evaluate
from detector_models import TWO_STAGE
from detector_training import Batch, Settings, Track, losses_of, to_device
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from processes import Processes
from torch import Tensor

Merge = Callable[[list[Tensor]], Sequence[Tensor]]

COLOURS = {"eager": "#d95f02", "fused": "#1b6ca8"}
# The first steps pay for allocations and, on CUDA, for choosing convolution algorithms.
WARMUP_STEPS_LEFT_OUT = 2
REPEATS = 40
UNCOUNTED_REPEATS = 5
# The reference backend's pooler is a loop over RoIs in Python: there fewer repeats have to do.
TIMING_SECONDS = 10
PICTURES = 8
SHOWN_SCORE = 0.3
SHOWN_AT_LEAST = 2


def eager_merge(laterals: list[Tensor]) -> list[Tensor]:
    """torchvision's merge: laterals ``[N, C, H_l, W_l]``, finest first, to as many merged maps of these shapes."""
    merged = [laterals[-1]]
    for lateral in laterals[-2::-1]:
        merged.insert(0, lateral + nnf.interpolate(merged[0], size=lateral.shape[-2:], mode="nearest"))
    return merged


def _merge_of(track: Track) -> Merge:
    if track.name == "eager":
        return eager_merge
    from fpn_fast import ops

    return ops.top_down


@torch.no_grad()
def laterals_of(track: Track, images: list[Tensor], settings: Settings) -> list[Tensor]:
    """What the track's FPN merges for a batch, ``[N, 256, H_l, W_l]``, taken by a hook on its way through the model."""
    inputs: list[Tensor] = []
    fpn = track.model.backbone.fpn
    handle = fpn.register_forward_pre_hook(lambda module, arguments: inputs.extend(arguments[0].values()))
    try:
        with settings.autocast():
            batch, _ = track.model.transform([image.to(settings.device, settings.dtype) for image in images])
            track.model.backbone(batch.tensors)
            return [block(features) for block, features in zip(fpn.inner_blocks, inputs, strict=True)]
    finally:
        handle.remove()


def merge_seconds(tracks: list[Track], images: list[Tensor], settings: Settings) -> dict[str, Any]:
    """Median seconds of each track's merge, forward and backward, on its own model's laterals for one batch."""
    runs: dict[str, Callable[[], object]] = {}
    for track in tracks:
        laterals = [lateral.detach().requires_grad_() for lateral in laterals_of(track, images, settings)]
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        gradients = [torch.empty_like(lateral).normal_(generator=generator) for lateral in laterals]
        runs[track.name] = _merge_run(_merge_of(track), laterals, gradients)
    shapes = [list(lateral.shape) for lateral in laterals]
    return {**_median_seconds(runs, settings), "laterals": shapes, "dtype": str(laterals[0].dtype)}


def _merge_run(merge: Merge, laterals: list[Tensor], gradients: list[Tensor]) -> Callable[[], object]:
    return lambda: torch.autograd.grad(merge(laterals), laterals, gradients)


def pooler_seconds(tracks: list[Track], batch: Batch, settings: Settings) -> dict[str, Any]:
    """Median seconds of each track's RoI pooler, forward and backward, on what its own model gives it in training."""
    runs: dict[str, Callable[[], object]] = {}
    for track in tracks:
        maps, boxes, image_shapes = pooler_inputs_of(track, batch, settings)
        runs[track.name] = _pooler_run(track.model.roi_heads.box_roi_pool, maps, boxes, image_shapes, settings)
    features = list(maps.values())
    shapes = [list(feature.shape) for feature in features]
    count = sum(len(each) for each in boxes)
    return {**_median_seconds(runs, settings), "maps": shapes, "boxes": count, "dtype": str(features[0].dtype)}


@torch.no_grad()
def pooler_inputs_of(
    track: Track, batch: Batch, settings: Settings
) -> tuple[dict[str, Tensor], list[Tensor], list[tuple[int, int]]]:
    """What the track's pooler is called with in training: maps by name, ``[N, 256, H_l, W_l]``, boxes, image shapes."""
    arguments: list[Any] = []
    pooler = track.model.roi_heads.box_roi_pool
    handle = pooler.register_forward_pre_hook(lambda module, inputs: arguments.extend(inputs))
    try:
        losses_of(track.model, to_device(batch, settings), 0, settings)
    finally:
        handle.remove()
    maps, boxes, image_shapes = arguments
    return {name: maps[name] for name in pooler.featmap_names if name in maps}, boxes, image_shapes


def _pooler_run(
    pooler: Callable[..., Tensor],
    maps: dict[str, Tensor],
    boxes: list[Tensor],
    image_shapes: list[tuple[int, int]],
    settings: Settings,
) -> Callable[[], object]:
    leaves = {name: feature.detach().requires_grad_() for name, feature in maps.items()}

    def run() -> object:
        with settings.autocast():
            pooled = pooler(leaves, boxes, image_shapes)
        return torch.autograd.grad(pooled, list(leaves.values()), torch.ones_like(pooled))

    return run


def _median_seconds(runs: dict[str, Callable[[], object]], settings: Settings) -> dict[str, Any]:
    """The runs take turns, so that noise of the machine hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    began, repeat = time.perf_counter(), 0
    while repeat <= UNCOUNTED_REPEATS or (
        repeat < UNCOUNTED_REPEATS + REPEATS and time.perf_counter() - began < TIMING_SECONDS
    ):
        for name in list(runs) if repeat % 2 == 0 else list(runs)[::-1]:
            settings.synchronize()
            started = time.perf_counter()
            runs[name]()
            settings.synchronize()
            if repeat >= UNCOUNTED_REPEATS:
                times[name].append(time.perf_counter() - started)
        repeat += 1
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {"median_seconds": medians, "repeats": repeat - UNCOUNTED_REPEATS}


def differences_at_equal_weights(tracks: list[Track], batch: Batch, settings: Settings) -> dict[str, float]:
    """What one batch's loss and gradients differ by when the second model has the first one's weights.

    In a long run rounding differences grow, because a proposal more or less changes what is sampled; this one says
    what the kernels themselves add. The gradient's difference is relative to its norm, the largest of all parameters.
    """
    batch = to_device(batch, settings)
    models = [track.model for track in tracks]
    trained = copy.deepcopy(models[1].state_dict())
    models[1].load_state_dict(models[0].state_dict())
    losses, gradients = [], []
    for model in models:
        loss = torch.stack([part.float() for part in losses_of(model, batch, 0, settings).values()]).sum()
        losses.append(loss.item())
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients.append(torch.autograd.grad(loss, parameters, materialize_grads=True))
    models[1].load_state_dict(trained)
    relative = [
        ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()
        for theirs, ours in zip(*gradients, strict=True)
    ]
    return {"loss": abs(losses[1] - losses[0]), "gradient_relative": max(relative)}


def _draw_box(axes: Axes, box: Sequence[float], colour: Any, style: str, text: str = "") -> None:
    x1, y1, x2, y2 = box
    # Legible on any photograph.
    outline: list[patheffects.AbstractPathEffect] = [patheffects.withStroke(linewidth=2.8, foreground=(0, 0, 0, 0.6))]
    frame = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=1.6, linestyle=style)
    frame.set_path_effects(outline)
    axes.add_patch(frame)
    if text:
        # Inside the picture, also for a box at its upper edge.
        axes.text(x1, max(y1, 11), text, color=colour, fontsize=8.5, va="bottom", weight="bold", path_effects=outline)


def draw_detections(data: DetectionData, detections: dict[int, dict[str, Tensor]], name: str, path: Path) -> None:
    """A grid of test images by index: annotated boxes dashed in white, detections coloured by class with scores."""
    columns = min(4, len(detections))
    rows = -(-len(detections) // columns)
    figure = Figure(figsize=(3.4 * columns, 3.4 * rows + 0.6), dpi=110, layout="constrained")
    palette = np.asarray([(0.35, 0.85, 1), (1, 0.85, 0.2), (0.55, 1, 0.45), (1, 0.55, 0.8), (1, 0.6, 0.3)])
    for place, (index, found) in enumerate(detections.items()):
        image, target = data[index]
        axes = figure.add_subplot(rows, columns, place + 1)
        axes.imshow(image.permute(1, 2, 0).numpy())
        axes.set_axis_off()
        for box in target["boxes"].tolist():
            _draw_box(axes, box, "white", "--")
        kept = found["scores"] >= SHOWN_SCORE
        # Best first; a model that has learned little still shows where it looks, and its scores say how little.
        kept[:SHOWN_AT_LEAST] = True
        for box, label, score in zip(
            *(found[key][kept].tolist() for key in ("boxes", "labels", "scores")), strict=True
        ):
            _draw_box(axes, box, palette[label % len(palette)], "-", f"{data.class_names[label - 1]}  {score:.2f}")
    shown = f"{SHOWN_SCORE} or more, or the best {SHOWN_AT_LEAST}"
    figure.suptitle(f"{name} model: detections scoring {shown}; dashed white: annotated", fontsize=11)
    figure.savefig(path)


def _smooth(values: Sequence[float], width: int) -> tuple[np.ndarray, np.ndarray]:
    """(steps, running mean over `width` steps)."""
    mean = np.convolve(values, np.ones(width) / width, mode="valid")
    return np.arange(width, len(values) + 1), mean


def draw_losses(tracks: list[Track], path: Path) -> None:
    """Every track's loss over the steps; with two tracks also their difference, below."""
    compared = len(tracks) == 2
    figure = Figure(figsize=(8, 6 if compared else 4), dpi=120, layout="constrained")
    axes = figure.subplots(2 if compared else 1, 1, squeeze=False, sharex=True, height_ratios=[2, 1][: 1 + compared])
    upper = axes[0, 0]
    width = max(1, min(20, len(tracks[0].losses) // 5))
    for track, style in zip(tracks, ("-", "--"), strict=False):
        colour = COLOURS[track.name]
        upper.plot(
            range(1, len(track.losses) + 1), track.losses, color=colour, alpha=0.25, linewidth=1, linestyle=style
        )
        label = f"{track.name}, mean of {width} steps" if width > 1 else track.name
        upper.plot(*_smooth(track.losses, width), color=colour, linewidth=2.2, linestyle=style, label=label)
    upper.set_ylabel("loss")
    upper.set_ylim(bottom=0)
    upper.legend(frameon=False)
    if compared:
        difference = np.subtract(tracks[1].losses, tracks[0].losses)
        lower = axes[1, 0]
        lower.axhline(0, color="0.7", linewidth=0.8)
        lower.plot(range(1, len(difference) + 1), difference, color="0.2", linewidth=1)
        lower.set_ylabel(f"{tracks[1].name} − {tracks[0].name}")
        lower.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
    axes[-1, 0].set_xlabel("step")
    axes[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))
    for each in axes[:, 0]:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(axis="y", alpha=0.25)
    figure.savefig(path)


def _machine(settings: Settings) -> dict[str, Any]:
    versions: dict[str, str | None] = {}
    for package in ("torch", "torchvision", "fpn_fast", "scikit-learn", "scikit-image", "pycocotools"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    cuda = settings.device.type == "cuda"
    name = torch.cuda.get_device_name(settings.device) if cuda else platform.processor() or platform.machine()
    return {
        "device": settings.device.type,
        "device_name": name,
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "python": platform.python_version(),
        "versions": versions,
    }


def report(
    tracks: list[Track],
    batch: Batch,
    test: DetectionData,
    test_seconds: float | None,
    settings: Settings,
    facts: dict[str, Any],
    output: Path,
    processes: Processes,
) -> str | None:
    """Measures, writes detections.png, loss_curves.png and figures.json into `output`; returns the table to print.

    batch: one of training's, on which the merge and the pooler are timed where one process trains. All processes
    evaluate; the leading one alone does the rest, the others get None.
    """
    precisions, detections = evaluate(tracks, test, test_seconds, settings, processes)
    if not processes.leads:
        return None
    figures: dict[str, Any] = {**facts, **_machine(settings), "steps": len(tracks[0].losses)}
    figures["processes"] = processes.world
    alone = processes.world == 1
    if alone and settings.pyramid == "fpn":
        figures["merge"] = merge_seconds(tracks, batch[0], settings)
    if alone and settings.model in TWO_STAGE:
        figures["pooler"] = pooler_seconds(tracks, batch, settings)
    for track in tracks:
        step_seconds = statistics.median(track.seconds[WARMUP_STEPS_LEFT_OUT:] or track.seconds)
        figures[track.name] = {
            "step_seconds_median": step_seconds,
            "images_per_second": settings.batch_size * settings.batches_per_step / step_seconds,
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
    pictures = [output / "detections.png", output / "loss_curves.png"]
    draw_detections(test, dict(list(detections.items())[:PICTURES]), tracks[-1].name, pictures[0])
    draw_losses(tracks, pictures[1])
    figures["pictures"] = [str(picture) for picture in pictures]
    (output / "figures.json").write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n")
    return table(figures, [track.name for track in tracks], output)


def table(figures: dict[str, Any], names: list[str], output: Path) -> str:
    """The figures a reader wants first, as plain text."""

    def precision(test: dict[str, Any], keys: Sequence[str]) -> str:
        values = (test[key] for key in keys)
        return " / ".join("-" if value is None else f"{value:.3f}" for value in values)

    steps = {name: figures[name]["step_seconds_median"] for name in names}
    # (text, seconds, digits of the milliseconds)
    times = [
        ("step time, median", steps, 1),
        *(
            (f"{part} time, forward + backward", figures[part]["median_seconds"], 3)
            for part in ("merge", "pooler")
            if part in figures
        ),
    ]
    tests = [figures[name]["test"] for name in names]
    last = min(20, figures["steps"])
    rows = [
        ["", *names],
        *([text, *(f"{1e3 * seconds[name]:.{digits}f} ms" for name in names)] for text, seconds, digits in times),
        ["AP / AP50 on the test split", *(precision(each, ("AP", "AP50")) for each in tests)],
        ["AP small / medium / large", *(precision(each, ("AP_small", "AP_medium", "AP_large")) for each in tests)],
        *(
            [["AP / AP50 of masks", *(precision(each["masks"], ("AP", "AP50")) for each in tests)]]
            if "masks" in tests[0]
            else []
        ),
        *(
            [["AR of 10 / 100 proposals", *(precision(each["proposals"], ("AR_10", "AR_100")) for each in tests)]]
            if "proposals" in tests[0]
            else []
        ),
        ["loss, first step", *(f"{figures[name]['losses'][0]:.4f}" for name in names)],
        [f"loss, mean of last {last}", *(f"{statistics.fmean(figures[name]['losses'][-last:]):.4f}" for name in names)],
    ]
    if len(names) == 2:
        rows[0].append("eager/fused")
        for row, (_, seconds, _) in zip(rows[1:], times, strict=False):
            row.append(f"{seconds['eager'] / seconds['fused']:.2f}x")
    widths = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(rows[0]))]
    # zip ends with the shorter row: only the times have a ratio.
    padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows]
    lines = ["  ".join(row) for row in padded]
    if len(names) == 2:
        gap = figures["loss_difference"]
        equal = gap.get("at_equal_weights")
        at_equal = (
            ""
            if equal is None
            else (f"{equal['loss']:.2g} at equal weights, gradients within {equal['gradient_relative']:.1g}; ")
        )
        lines += [
            f"largest loss difference: {at_equal}{gap['largest']:.2g} over the whole run, in which rounding grows",
        ]
    seen = tests[0]["images"]
    lines += [
        f"{figures['steps']} steps, ended by {figures['ended_by']}; AP on {seen} images; backend {figures['backend']}, "
        f"{figures['device']}, {figures['threads']} threads, {figures['processes']} process(es)",
        f"pictures: {' '.join(figures['pictures'])}",
        f"all figures: {output / 'figures.json'}",
    ]
    return "\n".join(lines)
