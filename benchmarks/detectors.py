# SPDX-License-Identifier: Apache-2.0
"""Whole detectors in the same rounds: torchvision's, the same accelerated, compiled ones of each, and the static form.

    python -m benchmarks.detectors --results benchmarks/results          all cases; the file of the README's table
    python -m benchmarks.detectors --case faster_rcnn-inference-320x544 --no-compile

Weights are random, scaled so that a head's outputs are spread as a trained one's: some thousand candidates of a dense
head are above its threshold, and some hundred pairs of a box and a class. Times are what a caller waits. What a
provider finds is compared with what torchvision finds before it is timed; one that differs is refused.

Stages are of one more run with clocks about modules, each stage without those inside it. A part of a model that has no
module of its own counts to the one around it: what follows RetinaNet's head is the detector's own.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import detection

import fpn_fast
from benchmarks import census
from fpn_fast.bench import cpu_timing, gpu_timing
from fpn_fast.bench.machine import facts, slug
from fpn_fast.bench.rows import write_text
from fpn_fast.bench.sampling import interleave, quantile, ratio

BUILDERS = {"faster_rcnn": detection.fasterrcnn_resnet50_fpn, "retinanet": detection.retinanet_resnet50_fpn}
#: Stages that fpn_fast has its own form of.
REPLACED = ("FPN merge", "RPN tail", "pooler", "detections")
#: Of what the last layers of heads give, by their names.
DEVIATIONS = {"cls_logits": 1.0, "cls_score": 3.0, "bbox_pred": 0.3, "bbox_reg": 0.3}
#: Of a dense head's logits, the share above its threshold.
DENSE_SHARE = 2e-4
TARGETS_PER_IMAGE = 7


@dataclass(frozen=True)
class Case:
    """One detector, (height, width) of its images, images of a batch, and whether it is trained."""

    model: str
    size: tuple[int, int]
    batch: int
    training: bool = False

    def __str__(self) -> str:
        kind = "training" if self.training else "inference"
        return f"{self.model}-{kind}-{self.size[0]}x{self.size[1]}-n{self.batch}"


def cases(device_type: str) -> list[Case]:
    """On a CPU also a small image, and of that alone a training step, which takes a minute of large ones."""
    large, small = (800, 1344), (320, 544)
    found = []
    for model in BUILDERS:
        if device_type == "cpu":
            found.append(Case(model, small, 1))
        found += [Case(model, large, 1), Case(model, small if device_type == "cpu" else large, 2, training=True)]
    return found


@dataclass
class Row:
    """A provider's figures for a case: milliseconds, and those of its stages."""

    case: Case
    provider: str
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    rounds: int = 0
    #: By provider, the median over all rounds of its time over this one's.
    speedup: dict[str, float] = field(default_factory=dict)
    stages: dict[str, float] = field(default_factory=dict)
    waits: int | None = None
    peak_bytes: int | None = None
    refused: str | None = None


def build(case: Case, device: torch.device) -> nn.Module:
    """torchvision's detector, its outputs spread by :func:`spread`."""
    torch.manual_seed(0)
    model = BUILDERS[case.model](
        weights=None, weights_backbone=None, min_size=min(case.size), max_size=max(case.size)
    ).to(device)
    spread(model, images(case, device))
    return model.train(case.training)


def images(case: Case, device: torch.device) -> list[Tensor]:
    """Random images, smooth as photographs are."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(case.batch, 3, case.size[0] // 16, case.size[1] // 16, generator=generator)
    return list(nn.functional.interpolate(coarse, case.size, mode="bicubic").clamp(0, 1).to(device))


def targets(case: Case, device: torch.device) -> list[dict[str, Tensor]]:
    """Ground truths of each image."""
    generator = torch.Generator().manual_seed(2)
    height, width = case.size
    found = []
    for _ in range(case.batch):
        share = torch.rand(TARGETS_PER_IMAGE, 4, generator=generator)
        sides = (0.05 + 0.4 * share[:, 2:]) * torch.tensor([width, height])
        corners = share[:, :2] * (torch.tensor([width, height]) - sides)
        labels = torch.randint(1, 91, (TARGETS_PER_IMAGE,), generator=generator)
        found.append({"boxes": torch.cat([corners, corners + sides], 1).to(device), "labels": labels.to(device)})
    return found


@torch.no_grad()
def spread(model: Any, batch: list[Tensor]) -> None:
    """Statistics of normalisation as of `batch`, and weights of the last layers as a trained detector's."""
    norms = [each for each in model.backbone.modules() if isinstance(each, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.backbone.train()(torch.stack(batch))
    for norm in norms:
        norm.momentum = 0.1
    model.eval()
    layers = {name: each for name, each in model.named_modules() if name.rpartition(".")[2] in DEVIATIONS}
    # The second stage's inputs depend on the first one's boxes.
    for second in (False, True):
        seen = _outputs(
            model, batch, {name: each for name, each in layers.items() if name.startswith("roi_heads") == second}
        )
        for name, outputs in seen.items():
            kind, out = name.rpartition(".")[2], torch.cat([each.flatten() for each in outputs])
            scale = DEVIATIONS[kind] / out.std().clamp(min=1e-6)
            layers[name].weight.mul_(scale)
            layers[name].bias.sub_(out.mean()).mul_(scale)
            if kind == "cls_logits" and hasattr(model, "score_thresh"):
                above = max(1, round(DENSE_SHARE * out.numel()))
                lowest = ((out - out.mean()) * scale).topk(above).values[-1]
                layers[name].bias.add_(math.log(model.score_thresh / (1 - model.score_thresh)) - lowest)


def _outputs(model: Any, batch: list[Tensor], layers: dict[str, nn.Module]) -> dict[str, list[Tensor]]:
    """What each of `layers` gives when `model` runs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    hooks = [
        each.register_forward_hook(lambda _m, _i, out, n=name: seen[n].append(out)) for name, each in layers.items()
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return seen


@dataclass
class Provider:
    """How a case is computed: `step` is timed, `found` what it gives in the form of lists."""

    step: Callable[[], Any]
    found: Callable[[], Any]
    model: nn.Module


def providers(case: Case, device: torch.device, compiled: bool) -> dict[str, Provider]:
    """By name, of models with the same weights."""
    plain = build(case, device)
    fast = copy.deepcopy(plain).train(case.training)
    fpn_fast.accelerate(fast)
    batch = images(case, device)
    if case.training:
        own_targets = targets(case, device)
        found = {name: _training(model, batch, own_targets) for name, model in (("eager", plain), ("fpn_fast", fast))}
        if compiled:
            found |= {
                f"{name} + compile": _training(torch.compile(each.model), batch, own_targets)
                for name, each in list(found.items())
            }
        return found
    found = {name: _lists(model, model, batch) for name, model in (("eager", plain), ("fpn_fast", fast))}
    static = fpn_fast.StaticDetector(fast, case.size, case.batch)
    stacked = torch.stack(batch)
    found["static"] = _static(static, static, stacked)
    if compiled:
        found |= {f"{name} + compile": _lists(torch.compile(each.model), each.model, batch)
                  for name, each in list(found.items()) if name != "static"}  # fmt: skip
        found["static + compile"] = _static(torch.compile(static, fullgraph=True), static, stacked)
    if device.type == "cuda":
        captured = fpn_fast.StaticDetector(fast, case.size, case.batch).capture()
        found["static, captured"] = _static(captured, captured, stacked)
    return found


def _lists(call: Any, model: nn.Module, batch: list[Tensor]) -> Provider:
    def step() -> Any:
        with torch.no_grad():
            return call(batch)

    return Provider(step, step, model)


def _static(call: Any, static: fpn_fast.StaticDetector, batch: Tensor) -> Provider:
    return Provider(lambda: call(batch), lambda: static.unpad(call(batch)), static)


def _training(model: Any, batch: list[Tensor], own_targets: list[dict[str, Tensor]]) -> Provider:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def step() -> Any:
        torch.manual_seed(3)
        optimizer.zero_grad(set_to_none=True)
        losses = model(batch, own_targets)
        sum(losses.values()).backward()
        optimizer.step()
        return losses

    return Provider(step, step, model)


def problem(found: Any, expected: Any) -> str | None:
    """Why what a provider found is not what torchvision finds; near ties may come in another order."""
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


class Stages:
    """Clocks about a detector's modules, each without what runs inside it; milliseconds by stage.

    What a module returns is kept until the clocks go: else the stage that uses it would pay for giving its memory back.
    """

    def __init__(self, model: Any, synchronize: Callable[[], None]) -> None:
        self.times: dict[str, float] = {}
        self._synchronize = synchronize
        self._open: list[tuple[str, float, float]] = []
        self._outputs: list[Any] = []
        self._modules = {module: stage for module, stage in _stage_modules(model)}

    @contextmanager
    def clocked(self) -> Iterator[None]:
        hooks = []
        for module, stage in self._modules.items():
            hooks.append(module.register_forward_pre_hook(lambda _m, _i, s=stage: self._begin(s)))
            hooks.append(module.register_forward_hook(lambda _m, _i, output: self._end(output)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, stage: str) -> None:
        self._synchronize()
        self._open.append((stage, time.perf_counter(), 0.0))

    def _end(self, output: Any) -> None:
        self._synchronize()
        self._outputs.append(output)
        stage, start, inside = self._open.pop()
        whole = time.perf_counter() - start
        self.times[stage] = self.times.get(stage, 0.0) + (whole - inside) * 1e3
        if self._open:
            name, began, others = self._open.pop()
            self._open.append((name, began, others + whole))


def _stage_modules(model: Any) -> Iterator[tuple[nn.Module, str]]:
    yield model, "detections"
    yield model.transform, "transform"
    yield model.backbone, "backbone"
    yield model.backbone.fpn, "FPN merge"
    for blocks in (model.backbone.fpn.inner_blocks, model.backbone.fpn.layer_blocks):
        for block in blocks:
            yield block, "FPN convolutions"
    if getattr(model.backbone.fpn, "extra_blocks", None) is not None:
        yield model.backbone.fpn.extra_blocks, "FPN convolutions"
    if hasattr(model, "head"):
        yield model.head, "heads"
    else:
        yield model.rpn, "RPN tail"
        yield model.rpn.head, "heads"
        yield model.roi_heads, "detections"
        yield model.roi_heads.box_roi_pool, "pooler"
        yield model.roi_heads.box_head, "heads"
        yield model.roi_heads.box_predictor, "heads"


def measure(case: Case, device: torch.device, seconds: float, compiled: bool, say: Callable[[str], None]) -> list[Row]:
    """All providers of `case`, for some `seconds` after warming up."""
    cuda = device.type == "cuda"
    synchronize: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    torch._dynamo.reset()
    rows, ready = [], {}
    found = providers(case, device, compiled)
    expected = found["eager"].found()
    for name, provider in found.items():
        say(f"{case}: {name}")
        row = Row(case, name)
        rows.append(row)
        try:
            row.refused = problem(provider.found(), expected)
            provider.step()
        except Exception as error:
            row.refused = f"does not run: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        if row.refused is None:
            ready[name] = provider.step
            row.peak_bytes = (gpu_timing if cuda else cpu_timing).peak_bytes(provider.step)
            if name in ("eager", "fpn_fast"):
                row.stages = _stages(provider, synchronize)
            if name in ("eager", "fpn_fast", "static") and not case.training:
                row.waits = census.count(provider.step).waits.total()

    def sampler(step: Callable[[], Any]) -> Callable[[], float]:
        def sample() -> float:
            synchronize()
            start = time.perf_counter()
            step()
            synchronize()
            return time.perf_counter() - start

        return sample

    say(f"{case}: rounds")
    samples = interleave({name: sampler(step) for name, step in ready.items()}, seconds)
    for row in rows:
        if row.refused is None:
            own = samples[row.provider]
            row.rounds = len(own)
            row.p50, row.p20, row.p80 = (quantile(own, share) * 1e3 for share in (0.5, 0.2, 0.8))
            row.speedup = {name: ratio(times, own) for name, times in samples.items() if name != row.provider}
    return rows


def _stages(provider: Provider, synchronize: Callable[[], None], runs: int = 7) -> dict[str, float]:
    """The median of each stage over some runs."""
    times = []
    for _ in range(runs):
        stages = Stages(provider.model, synchronize)
        with stages.clocked():
            provider.step()
        times.append(stages.times)
    return {stage: statistics.median(each[stage] for each in times) for stage in times[0]}


def replaced(stages: dict[str, float]) -> float:
    """Milliseconds of the stages that fpn_fast has its own form of."""
    return sum(stages.get(stage, 0.0) for stage in REPLACED)


def as_json(machine: dict[str, Any], rows: list[Row], earlier: list[dict[str, Any]]) -> str:
    """A results file of `rows`, and of those of `earlier`."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        return {key: short(item) for key, item in value.items()} if isinstance(value, dict) else value

    lines = [json.dumps(row) for row in earlier]
    for row in rows:
        fields = asdict(row)
        fields = {**fields.pop("case"), **fields}
        lines.append(json.dumps({key: short(value) for key, value in fields.items() if value not in (None, {})}))
    return f'{{"machine": {json.dumps(machine)},\n"rows": [\n' + ",\n".join(lines) + "\n]}\n"


def earlier_rows(path: Path, machine: dict[str, Any], chosen: list[Case]) -> list[dict[str, Any]]:
    """The rows in the file at `path` of other cases than `chosen`, if it is of the same commit."""
    if not path.exists():
        return []
    results = json.loads(path.read_text())
    if results["machine"]["commit"] != machine["commit"]:
        return []
    names = {str(case) for case in chosen}
    return [
        row
        for row in results["rows"]
        if str(Case(row["model"], tuple(row["size"]), row["batch"], row["training"])) not in names
    ]


def table(results: dict[str, Any]) -> str:
    """Markdown of a results file."""
    lines = [
        "| detector | provider | ms | speed-up | host synchronisations | peak memory | replaced stages, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in results["rows"]:
        kind = "training step" if row["training"] else "inference"
        name = f"{row['model']}, {kind}, {row['size'][0]}x{row['size'][1]}, N={row['batch']}"
        if "refused" in row:
            lines.append(f"| {name} | {row['provider']} | refused: {row['refused']} | | | | |")
            continue
        times = f"{row['speedup']['eager']:.2f}" if "eager" in row.get("speedup", {}) else ""
        waits = str(row.get("waits", ""))
        memory = f"{row['peak_bytes'] / 2**20:.0f} MiB" if "peak_bytes" in row else ""
        stages = f"{replaced(row['stages']):.0f}" if "stages" in row else ""
        lines.append(f"| {name} | {row['provider']} | {row['p50']:.0f} | {times} | {waits} | {memory} | {stages} |")
    machine = results["machine"]
    device = (
        f"{machine['device']}, {machine['threads']} threads" if machine["device_type"] == "cpu" else machine["device"]
    )
    note = (
        f"{device}, torch {machine['torch']}, commit {machine['commit'] or 'unknown'}, {machine['date']}: median wall "
        "time; ratios are medians over rounds, above 1 where fpn_fast is faster. Weights are random."
    )
    return "\n".join(lines) + f"\n\n{note}\n"


def target_lines(results: dict[str, Any]) -> tuple[list[str], bool]:
    """One line for each thing that the library is held to, and whether all of them are met: no detector is slower, and
    on a CPU the replaced stages take a quarter of their time at most."""
    rows = {
        (row["model"], *row["size"], row["batch"], row["training"], row["provider"]): row for row in results["rows"]
    }
    lines, all_met = [], True
    for key, row in rows.items():
        if key[-1] != "fpn_fast":
            continue
        eager = rows[(*key[:-1], "eager")]
        times = row.get("speedup", {}).get("eager")
        held = [(times is not None and times >= 1.0, f"{times} eager, wants 1")]
        if results["machine"]["device_type"] == "cpu" and "stages" in row:
            share = replaced(row["stages"]) / replaced(eager["stages"])
            held.append((share <= 0.25, f"replaced stages take {share:.0%}, want 25% at most"))
        for met, text in held:
            all_met &= met
            lines.append(f"{'met   ' if met else 'MISSED'} {' '.join(map(str, key[:-1]))}: {text}")
    return lines, all_met


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code: 1 if a provider was refused."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.detectors", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", action="append", help="a case by the beginning of its name; all by default")
    parser.add_argument("--case-seconds", type=float, default=60.0, help="time for each case, beyond warming up")
    parser.add_argument(
        "--no-compile",
        action="store_true",
        help="without torch.compile, which takes minutes a case; on a CPU it is of inference on the small image alone",
    )
    parser.add_argument("--results", type=Path, help="folder for <machine>/detectors.json")
    parser.add_argument("--tiny", action="store_true", help="tiny images, to walk the code")
    options = parser.parse_args(arguments)
    chosen = cases(options.device)
    if options.case:
        chosen = [case for case in chosen if any(str(case).startswith(name) for name in options.case)]
        if not chosen:
            parser.error(f"no case is named like {', '.join(options.case)}")
    if options.tiny:
        chosen = [Case(case.model, (64, 96), case.batch, case.training) for case in chosen]
    machine, rows = facts(options.device), []
    smallest = min(case.size for case in cases(options.device))
    path = None if options.results is None else options.results / slug(machine) / "detectors.json"
    earlier = [] if path is None else earlier_rows(path, machine, chosen)
    for case in chosen:
        rows += measure(
            case,
            torch.device(options.device),
            options.case_seconds,
            not options.no_compile
            and (options.device == "cuda" or options.tiny or (case.size == smallest and not case.training)),
            lambda text: print(text, file=sys.stderr, flush=True),
        )
        text = as_json(machine, rows, earlier)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, text)
    print(table(json.loads(text)))
    return int(any(row.refused for row in rows))


if __name__ == "__main__":
    sys.exit(main())
