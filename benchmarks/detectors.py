# SPDX-License-Identifier: Apache-2.0
"""Whole detectors in the same rounds: torchvision's, accelerated, either in channels_last, compiled, StaticDetector.

    python -m benchmarks.detectors --results benchmarks/results          all cases; the results of the docs' table
    python -m benchmarks.detectors --case faster_rcnn-inference-320x544 --no-compile

They are as torchvision's pretrained detectors: frozen batch norm, three trainable stages. Weights are random, scaled so
that a head's outputs are spread as a trained one's: some thousand candidates of a dense head are above its threshold,
and some hundred pairs of a box and a class. Each provider's detections are compared with torchvision's before it is
timed; one that differs is refused. StaticTraining of a Faster R-CNN samples with other random numbers: its losses must
be within DRAWN_DEVIATIONS of the mean of torchvision's over DRAWS seeds.

Stages are timed in further runs with clocks around modules, each stage without the stages inside it. A part of a model
without a module of its own counts to the module around it: what follows RetinaNet's head is the detector's own.
"""

from __future__ import annotations

import argparse
import copy
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

import fpn_fast
from fpn_fast.__main__ import ends_with_its_reader
from fpn_fast.bench import machine, timing
from fpn_fast.bench.harness import Ready, prepare, sampled
from fpn_fast.bench.providers import backend_seen
from fpn_fast.bench.report import absent, load, place
from fpn_fast.bench.report import table as markdown_table
from fpn_fast.bench.rows import Results, Row

CLASSES: dict[str, Callable[..., nn.Module]] = {
    "faster_rcnn": detection.FasterRCNN, "mask_rcnn": detection.MaskRCNN, "retinanet": detection.RetinaNet
}  # fmt: skip
#: The models that are timed.
TIMED = ("faster_rcnn", "retinanet")
#: Stage -> the names of its modules; the model itself has none.
STAGES = {
    "detections": r"|roi_heads",
    "transform": r"transform",
    "backbone": r"backbone",
    "FPN merge": r"backbone\.fpn",
    "FPN convolutions": r"backbone\.fpn\.((inner|layer)_blocks\.\d+|extra_blocks)",
    "RPN tail": r"rpn",
    "pooler": r"roi_heads\.box_roi_pool",
    "heads": r"(rpn\.)?head|roi_heads\.box_(head|predictor)",
}
#: Stages that fpn_fast replaces.
REPLACED = ("FPN merge", "RPN tail", "pooler", "detections")
STAGE_RUNS = 7
#: Standard deviation of the outputs of a head's last layer, by its name.
DEVIATIONS = {"cls_logits": 1.0, "cls_score": 3.0, "bbox_pred": 0.3, "bbox_reg": 0.3}
#: The share of a dense head's logits above its threshold.
DENSE_SHARE = 2e-4
TARGETS_PER_IMAGE = 7
#: A mean of 8 draws and one more differ by 6 deviations, estimated from the 8, once in some 2,000 comparisons.
DRAWS, DRAWN_DEVIATIONS = 8, 6.0
#: Backbones halve images five times.
DIVISOR = 32
LARGE, SMALL, TINY = (800, 1344), (320, 544), (64, 96)


@dataclass(frozen=True)
class Case:
    """One detector: (height, width) of its images, images per batch, and whether it is trained."""

    model: str
    size: tuple[int, int]
    batch: int
    training: bool = False

    def __str__(self) -> str:
        kind = "training" if self.training else "inference"
        return f"{self.model}-{kind}-{self.size[0]}x{self.size[1]}-n{self.batch}"


def cases(device_type: str) -> list[Case]:
    """On a CPU also a small image, and a training step on small ones alone: on large ones it takes a minute."""
    of_cpu, of_gpu = ((SMALL, 1), (LARGE, 1), (SMALL, 2, True)), ((LARGE, 1), (LARGE, 2, True))
    return [Case(model, *case) for model in TIMED for case in (of_cpu if device_type == "cpu" else of_gpu)]


def build(name: str, size: tuple[int, int], batch: Sequence[Tensor]) -> nn.Module:
    """torchvision's detector as its pretrained ones are, with frozen batch norm and three trainable stages of its
    ResNet-50, for images of `size`. Its outputs are as :func:`spread` makes them of `batch`, on whose device it is."""
    torch.manual_seed(0)
    dense = {"returned_layers": [2, 3, 4], "extra_blocks": LastLevelP6P7(256, 256)} if name == "retinanet" else {}
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None, trainable_layers=3, **dense)
    sides = batch[0].shape[1:]
    model: Any = CLASSES[name](backbone, num_classes=91, min_size=min(sides), max_size=max(sides)).to(batch[0].device)
    spread(model, batch)
    model.transform.min_size, model.transform.max_size = (min(size),), max(size)
    return model


def images(case: Case, device: torch.device) -> list[Tensor]:
    """Random images, smooth as photographs are."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(case.batch, 3, case.size[0] // 16, case.size[1] // 16, generator=generator)
    return list(nn.functional.interpolate(coarse, case.size, mode="bicubic").clamp(0, 1).to(device))


def targets(case: Case, device: torch.device) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    image = torch.tensor(case.size[::-1])
    found = []
    for _ in range(case.batch):
        share = torch.rand(TARGETS_PER_IMAGE, 4, generator=generator)
        sides = (0.05 + 0.4 * share[:, 2:]) * image
        corners = share[:, :2] * (image - sides)
        labels = torch.randint(1, 91, (TARGETS_PER_IMAGE,), generator=generator)
        found.append({"boxes": torch.cat([corners, corners + sides], 1).to(device), "labels": labels.to(device)})
    return found


@torch.no_grad()
def spread(model: Any, batch: Sequence[Tensor]) -> None:
    """Sets normalisation to `batch`'s statistics, and the last layers to outputs as wide as a trained detector's."""

    def learn(norm: Any, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        norm.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = [each for each in model.backbone.modules() if isinstance(each, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(learn) for norm in norms]
    model.eval().backbone(torch.stack(list(batch)))
    for hook in hooks:
        hook.remove()
    # The box head's inputs depend on the RPN's boxes.
    for in_box_head in (False, True):
        layers = {
            name: each
            for name, each in model.named_modules()
            if name.rpartition(".")[2] in DEVIATIONS and name.startswith("roi_heads") == in_box_head
        }
        outputs: dict[str, list[Tensor]] = {name: [] for name in layers}
        hooks = [
            each.register_forward_hook(lambda _m, _i, out, of=outputs[name]: of.append(out.flatten()))
            for name, each in layers.items()
        ]
        model(batch)
        for hook, (name, layer) in zip(hooks, layers.items(), strict=True):
            hook.remove()
            kind, out = name.rpartition(".")[2], torch.cat(outputs[name])
            scale = DEVIATIONS[kind] / out.std().clamp(min=1e-6)
            layer.weight.mul_(scale)
            layer.bias.sub_(out.mean()).mul_(scale)
            if kind == "cls_logits" and hasattr(model, "score_thresh"):
                above = max(1, round(DENSE_SHARE * out.numel()))
                # Between two candidates, so that rounding moves none over the threshold.
                middle = ((out - out.mean()) * scale).topk(above + 1).values[-2:].mean()
                layer.bias.add_(math.log(model.score_thresh / (1 - model.score_thresh)) - middle)


@dataclass
class Provider:
    """How a case is computed: `step` is timed; `lists` gives its result as torchvision would.

    draws: whether it samples with random numbers of its own.
    """

    step: Callable[..., Any]
    model: nn.Module
    lists: Callable[[Any], Any] = lambda result: result
    draws: bool = False


def providers(case: Case, device: torch.device, compiled: bool) -> dict[str, Provider]:
    """By name. What says no memory format is channels_first. With `compiled` also what torch.compile and
    `StaticDetector.compile` make: on a CPU the former, which takes minutes, for inference on small images alone."""
    plain = build(case.model, case.size, images(case, device)).train(case.training)
    models = {"eager": plain, "fpn_fast": copy.deepcopy(plain)}
    fpn_fast.accelerate(models["fpn_fast"])
    models |= {
        f"{name}, channels_last": copy.deepcopy(each).to(memory_format=torch.channels_last)
        for name, each in models.items()
    }
    batch, own_targets = images(case, device), targets(case, device)

    def make(call: Any, model: nn.Module) -> Provider:
        if not case.training:
            return Provider(torch.no_grad()(lambda: call(batch)), model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

        def step(seed: int = 3) -> Any:
            torch.manual_seed(seed)
            optimizer.zero_grad(set_to_none=True)
            losses = call(batch, own_targets)
            sum(losses.values()).backward()
            optimizer.step()
            return losses

        return Provider(step, model)

    found = {name: make(each, each) for name, each in models.items()}
    if compiled and (device.type == "cuda" or case.size == TINY or (case.size == SMALL and not case.training)):
        found |= {
            f"{name} + torch.compile": make(torch.compile(models[name]), models[name]) for name in ("eager", "fpn_fast")
        }
    if case.training:
        steps = training_steps(case, models["fpn_fast"], compiled)
        for name, each in steps.items():
            packed = each.pack(batch, own_targets)
            found[name] = make(lambda *_, s=each, p=packed: s(*p), each)
            found[name].draws = case.model != "retinanet"
    else:
        stacked = torch.stack(batch)

        def static() -> fpn_fast.StaticDetector:
            return fpn_fast.StaticDetector(models["fpn_fast"], case.size, case.batch)

        calls = {"static": static()}
        if device.type == "cuda":
            calls["static, capture()"] = static().capture()
        elif compiled:
            calls["static, compile()"] = static().compile()
        found |= {name: Provider(lambda c=call: c(stacked), call, call.unpad) for name, call in calls.items()}
    return found


def training_steps(case: Case, model: nn.Module, compiled: bool) -> dict[str, Any]:
    """StaticTrainings of copies of an accelerated model, by the provider's name."""
    canvas = (-(-case.size[0] // DIVISOR) * DIVISOR, -(-case.size[1] // DIVISOR) * DIVISOR)

    def static() -> Any:
        return fpn_fast.StaticTraining(copy.deepcopy(model), canvas, case.batch, max_targets=TARGETS_PER_IMAGE)

    return {"static": static()} | ({"static, compile()": static().compile()} if compiled else {})


def problem(found: Any, expected: Any) -> str | None:
    """How a provider's result differs from torchvision's; None where it does not. Near ties may change places."""
    if isinstance(expected, dict):
        for name, loss in expected.items():
            if not torch.isclose(found[name], loss, rtol=1e-3, atol=1e-5):
                return f"{name} is {found[name].item():.6g}, not {loss.item():.6g}"
        return None
    for own, other in zip(found, expected, strict=True):
        if len(other["scores"]) == 0:
            return "torchvision finds nothing: there is nothing to compare"
        if len(own["scores"]) != len(other["scores"]):
            return f"{len(own['scores'])} detections, not {len(other['scores'])}"
        if not torch.allclose(own["scores"], other["scores"], rtol=0, atol=1e-3):
            return f"scores differ by {(own['scores'] - other['scores']).abs().max().item():.2g}"
        near = torch.cdist(own["boxes"], other["boxes"], p=float("inf")) < 0.5
        same = near & (own["labels"][:, None] == other["labels"])
        if same.any(0).float().mean() < 0.95:
            return f"{(~same.any(0)).sum().item()} boxes of {same.shape[1]} are not there"
    return None


def problem_of_draws(found: dict[str, Tensor], expected: Sequence[dict[str, Tensor]]) -> str | None:
    """How losses of one sample differ from torchvision's of several; None where chance would explain it."""
    for name, loss in found.items():
        drawn = torch.stack([each[name].detach() for each in expected])
        allowed = DRAWN_DEVIATIONS * drawn.std() * math.sqrt(1 + 1 / len(drawn))
        # What is sampled whole differs by rounding alone.
        if not torch.isclose(loss, drawn.mean(), rtol=1e-3, atol=1e-5) and not (loss - drawn.mean()).abs() <= allowed:
            return f"{name} is {loss.item():.6g}, not {drawn.mean().item():.6g} within {allowed.item():.2g}"
    return None


@contextmanager
def clocked(model: nn.Module, synchronize: Callable[[], None]) -> Iterator[dict[str, float]]:
    """Clocks around `model`'s modules, which fill a dict: milliseconds per stage, without the stages inside it.

    Outputs are kept until the clocks are removed: else the stage that uses one would pay for freeing it.
    """
    times: dict[str, float] = {}
    running: list[str] = []
    outputs, hooks, last = [], [], 0.0

    def lap() -> None:
        """What has passed since the last lap belongs to the innermost stage."""
        nonlocal last
        synchronize()
        now = time.perf_counter()
        if running:
            times[running[-1]] = times.get(running[-1], 0.0) + (now - last) * 1e3
        last = now

    def begin(stage: str) -> None:
        lap()
        running.append(stage)

    def end(output: Any) -> None:
        lap()
        running.pop()
        outputs.append(output)

    for name, module in model.named_modules():
        for stage, pattern in STAGES.items():
            if re.fullmatch(pattern, name):
                hooks.append(module.register_forward_pre_hook(lambda _m, _i, s=stage: begin(s)))
                hooks.append(module.register_forward_hook(lambda _m, _i, output: end(output)))
    try:
        yield times
    finally:
        for hook in hooks:
            hook.remove()


def measure(case: Case, device: torch.device, seconds: float, compiled: bool) -> list[Row]:
    """All providers of `case`, for some `seconds` after warming up."""
    torch.compiler.reset()
    clock = timing.timer(device.type)
    found = providers(case, device, compiled)
    expected = found["eager"].step()
    drawn = [found["eager"].step(seed) for seed in range(DRAWS)] if any(each.draws for each in found.values()) else []
    clock.synchronize()

    def compared(provider: Provider, result: Any) -> str | None:
        return problem_of_draws(result, drawn) if provider.draws else problem(provider.lists(result), expected)

    def stages(provider: Provider) -> dict[str, float]:
        times = []
        for _ in range(STAGE_RUNS):
            with clocked(provider.model, clock.synchronize) as one:
                provider.step()
            times.append(one)
        return {stage: statistics.median(each[stage] for each in times) for stage in times[0]}

    def wrong_backend(name: str, operators: set[str]) -> str | None:
        seen = backend_seen(operators)
        return None if (seen == "torch") == name.startswith("eager") else f"{seen} computed this"

    def ready(name: str, provider: Provider) -> Ready | str:
        print(f"{case}: {name}", file=sys.stderr, flush=True)
        prepared = prepare(
            lambda: [provider.step],
            lambda result: compared(provider, result),
            lambda operators: wrong_backend(name, operators),
            clock,
            seen="compile" not in name and "capture" not in name,
            metrics=clock.wall,
        )
        if name in ("eager", "fpn_fast") and not isinstance(prepared, str):
            prepared[1]["stages"] = stages(provider)
        return prepared

    return sampled(case, {name: ready(name, each) for name, each in found.items()}, seconds, timing.MAX_ROUNDS)


def replaced(stages: dict[str, float]) -> float:
    """Milliseconds of the stages that fpn_fast replaces."""
    return sum(stages.get(stage, 0.0) for stage in REPLACED)


def case_of(row: dict[str, Any]) -> Case:
    return Case(row["model"], tuple(row["size"]), row["batch"], row["training"])


def by_case(results: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """A case's name -> provider -> its row."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results["rows"]:
        found.setdefault(str(case_of(row)), {})[row["provider"]] = row
    return found


def table(results: dict[str, Any]) -> str:
    lines = [["detector", "provider", "ms", "speed-up", "host synchronisations", "peak memory", "replaced stages, ms"]]
    for row in results["rows"]:
        case = case_of(row)
        kind = "training step" if case.training else "inference"
        line = [f"{case.model}, {kind}, {case.size[0]}x{case.size[1]}, N={case.batch}", row["provider"]]
        if "refused" in row:
            lines.append([*line, f"refused: {row['refused']}", "", "", "", ""])
            continue
        times = row["speedup"].get("eager")
        line += [f"{row['p50'] / 1e3:.0f}", "" if times is None else f"{times:.2f}x", str(row.get("syncs", ""))]
        line += [f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""]
        lines.append([*line, f"{replaced(row['stages']):.0f}" if "stages" in row else ""])
    note = (
        f"{absent(cases(results['machine']['device_type']), by_case(results))}{place(results['machine'])}: median wall "
        "time; ratios to eager are medians over rounds, above 1 where fpn_fast is faster. Weights are random."
    )
    return f"{markdown_table(lines, left=2)}\n\n{note}\n"


@ends_with_its_reader
def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if a provider was refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detectors", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    for name, text, keywords in (
        ("--device", "where to measure (default: cuda if there is a GPU)",
         {"choices": ("cpu", "cuda"), "default": "cuda" if torch.cuda.is_available() else "cpu"}),
        ("--case", "a case, by the beginning of its name (default: all)", {"action": "append", "default": []}),
        ("--case-seconds", "seconds per case after warming up (default: 60)", {"type": float, "default": 60.0}),
        ("--no-compile", "without torch.compile and StaticDetector.compile", {"action": "store_true"}),
        ("--results", "folder for <machine>/detectors.json (default: %(default)s)",
         {"type": Path, "default": Path("output/benchmarks")}),
        ("--tiny", "tiny images: a trial of the command, not a measurement", {"action": "store_true"}),
    ):  # fmt: skip
        parser.add_argument(name, help=text, **keywords)
    options = parser.parse_args(arguments)
    if arguments is None:
        machine.keep_freed_memory()
    chosen = [case for case in cases(options.device) if str(case).startswith(tuple(options.case) or "")]
    if not chosen:
        parser.error(f"no case is named like {', '.join(options.case)}")
    if options.tiny:
        chosen = [Case(case.model, TINY, case.batch, case.training) for case in chosen]
    # Cases of an earlier run of the same commit stay in the file.
    names = set(map(str, chosen))
    results = Results(
        options.results, "detectors", machine.facts(options.device), lambda row: str(case_of(row)) not in names
    )
    for case in chosen:
        results.add(measure(case, torch.device(options.device), options.case_seconds, not options.no_compile))
    print(table(load(results.path)))
    return int(any("refused" in row for row in results.rows if str(case_of(row)) in names))


if __name__ == "__main__":
    sys.exit(main())
