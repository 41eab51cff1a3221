# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole detectors: that it compares rightly, and says what it measured."""

import json

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import detectors
from fpn_fast.bench import timing
from fpn_fast.bench.machine import facts
from fpn_fast.bench.rows import Results, Row


def retinanet(weights, weights_backbone, **options):
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=weights, trainable_layers=5)
    sizes = tuple((16.0 * 2**i, 20.0 * 2**i, 25.0 * 2**i) for i in range(5))
    generator = detection.retinanet.AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * 5)
    return detection.RetinaNet(backbone, 91, anchor_generator=generator, **options)


@pytest.fixture(autouse=True)
def small_detectors(monkeypatch):
    small = {"faster_rcnn": detection.fasterrcnn_mobilenet_v3_large_fpn, "retinanet": retinanet}
    monkeypatch.setattr(detectors, "BUILDERS", small)


def test_cases_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    arguments = ["--device", "cpu", "--tiny", "--no-compile", "--case-seconds", "0", "--results", str(tmp_path)]
    for case in ("faster_rcnn-inference-320", "faster_rcnn-training", "retinanet-inference-320"):
        arguments += ["--case", case]
    assert detectors.main(arguments) == 0
    (file,) = tmp_path.glob("*/detectors.json")
    results = json.loads(file.read_text())
    rows = results["rows"]
    assert len(rows) == 3 + 2 + 3  # StaticDetector is for inference
    backends = {row["provider"]: row["backend"] for row in rows}
    assert backends == {"eager": "torch", "fpn_fast": "cpp", "static": "cpp"}
    for row in rows:
        assert row["p20"] <= row["p50"] <= row["p80"]
        assert row["rounds"] == 3
    syncs = {(row["model"], row["provider"]): row["syncs"] for row in rows if not row["training"]}
    assert syncs["faster_rcnn", "static"] == syncs["retinanet", "static"] == 0
    assert syncs["faster_rcnn", "fpn_fast"] == 2
    assert syncs["faster_rcnn", "eager"] > 10
    stages = next(row["stages"] for row in rows if row["model"] == "faster_rcnn" and row["provider"] == "eager")
    assert set(stages) >= {*detectors.REPLACED, "backbone", "heads", "transform", "FPN convolutions"}
    printed = capsys.readouterr().out
    assert printed == detectors.table(results) + "\n"
    assert "| faster_rcnn, training step, 64x96, N=2 | fpn_fast |" in printed
    assert "retinanet-training-320x544-n2.\n" in printed


def test_stages_make_the_whole():
    case = detectors.Case("faster_rcnn", (64, 96), 1)
    (provider, *_) = detectors.providers(case, torch.device("cpu"), compiled=False).values()
    start = detectors.time.perf_counter()
    with detectors.clocked(provider.model, lambda: None) as stages:
        provider.step()
    whole = (detectors.time.perf_counter() - start) * 1e3
    assert 0.8 * whole < sum(stages.values()) <= whole
    assert detectors.replaced({"pooler": 1.0, "heads": 5.0, "RPN tail": 2.0}) == 3.0
    calls = sum(len(module._forward_hooks) for module in provider.model.modules())
    assert calls == 0


def test_what_differs_is_refused():
    boxes = torch.tensor([[0.0, 0, 10, 10], [5, 5, 20, 30]])
    found = [{"boxes": boxes, "scores": torch.tensor([0.9, 0.5]), "labels": torch.tensor([1, 2])}]
    assert detectors.problem(found, found) is None
    swapped = [{name: each.flip(0) if name != "scores" else each for name, each in found[0].items()}]
    assert detectors.problem(swapped, found) is None
    for changes, reason in (
        ({"boxes": boxes + 1}, "2 boxes of 2 are not there"),
        ({"labels": torch.tensor([1, 1])}, "1 boxes of 2"),
        ({"scores": torch.tensor([0.9, 0.6])}, "scores differ by 0.1"),
        ({name: each[:1] for name, each in found[0].items()}, "1 detections, not 2"),
    ):
        assert detectors.problem([{**found[0], **changes}], found).startswith(reason)
    nothing = [{name: each[:0] for name, each in found[0].items()}]
    assert "nothing to compare" in detectors.problem(nothing, nothing)
    assert detectors.problem({"loss": torch.tensor(1.1)}, {"loss": torch.tensor(1.0)}) == "loss is 1.1, not 1"


def results_of(tmp_path, *rows):
    kept = Results(tmp_path, "detectors", facts("cpu"))
    kept.add(list(rows))
    return json.loads(kept.path.read_text())


def row(case, name, **fields):
    return Row(case, name, "wall", "clock", **{"p50": 1e4, "speedup": {}, **fields})


def test_a_refused_detector_is_shown(tmp_path):
    refused = Row(detectors.Case("retinanet", (64, 96), 1), "fpn_fast", "none", "none", refused="loss is 1.1, not 1")
    assert "| fpn_fast | refused: loss is 1.1, not 1 |" in detectors.table(results_of(tmp_path, refused))


def test_an_accelerated_detector_that_ran_by_torch_is_refused(monkeypatch):
    monkeypatch.setattr(detectors.fpn_fast, "accelerate", lambda model: None)
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    case = detectors.Case("faster_rcnn", (64, 96), 2, training=True)
    rows = detectors.measure(case, torch.device("cpu"), 0.0, False)
    assert {r.provider: r.refused for r in rows} == {"eager": None, "fpn_fast": "torch computed this"}


def test_cases_of_an_earlier_run_stay_where_it_was_of_the_same_commit(tmp_path):
    machine = {**facts("cpu"), "commit": "abc"}
    cases = [detectors.Case("retinanet", (64, 96), 1), detectors.Case("retinanet", (64, 96), 2, training=True)]
    Results(tmp_path, "detectors", machine).add([row(case, "eager") for case in cases])
    keep = lambda r: r["training"]  # noqa: E731
    again = Results(tmp_path, "detectors", machine, keep)
    again.add([row(cases[0], "eager", p50=5e3)])
    assert [r["p50"] for r in json.loads(again.path.read_text())["rows"]] == [1e4, 5e3]
    assert Results(tmp_path, "detectors", {**machine, "commit": "def"}, keep).rows == []
