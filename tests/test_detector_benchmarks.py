# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole detectors: that it compares rightly, and says what it measured."""

import json
from functools import partial

import pytest
import torch
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from benchmarks import detectors
from fpn_fast.bench import timing
from fpn_fast.bench.machine import facts
from fpn_fast.bench.rows import Results, Row


@pytest.fixture(autouse=True)
def small_detectors(monkeypatch):
    monkeypatch.setattr(detectors, "resnet_fpn_backbone", lambda backbone_name, **options:
                        resnet_fpn_backbone(backbone_name="resnet18", **options))  # fmt: skip
    few = {"rpn_post_nms_top_n_train": 40, "rpn_post_nms_top_n_test": 40, "box_batch_size_per_image": 16}
    monkeypatch.setitem(detectors.CLASSES, "faster_rcnn", partial(detection.FasterRCNN, **few))


def test_cases_in_small(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(timing, "MIN_ROUNDS", 3)
    arguments = ["--device", "cpu", "--tiny", "--no-compile", "--case-seconds", "0", "--results", str(tmp_path)]
    for case in ("faster_rcnn-inference-320", "faster_rcnn-training", "retinanet-inference-320"):
        arguments += ["--case", case]
    assert detectors.main(arguments) == 0
    (file,) = tmp_path.glob("*/detectors.json")
    results = json.loads(file.read_text())
    rows = results["rows"]
    assert len(rows) == 5 + 5 + 5
    assert {row["provider"]: row["syncs"] for row in rows if row["training"]}["static"] == 0
    backends = {row["provider"]: row["backend"] for row in rows}
    of_both = {f"{name}{memory}": backend for name, backend in (("eager", "torch"), ("fpn_fast", "cpp"))
               for memory in ("", ", channels_last")}  # fmt: skip
    assert backends == of_both | {"static": "cpp"}
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
    draws = [{"loss": torch.tensor(1.0 + 0.01 * i)} for i in range(detectors.DRAWS)]
    assert detectors.problem_of_draws({"loss": torch.tensor(1.1)}, draws) is None
    assert detectors.problem_of_draws({"loss": torch.tensor(1.3)}, draws).startswith(
        "loss is 1.3, not 1.035 within 0.1"
    )


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
    # These would not take the model.
    monkeypatch.setattr(detectors, "training_steps", lambda *_: {})
    monkeypatch.setattr(timing, "MIN_ROUNDS", 1)
    case = detectors.Case("faster_rcnn", (64, 96), 2, training=True)
    rows = detectors.measure(case, torch.device("cpu"), 0.0, False)
    assert {r.provider: r.refused for r in rows} == {
        name + memory: None if name == "eager" else "torch computed this"
        for name in ("eager", "fpn_fast") for memory in ("", ", channels_last")
    }  # fmt: skip


def test_cases_of_an_earlier_run_stay_where_it_was_of_the_same_commit(tmp_path):
    machine = {**facts("cpu"), "commit": "abc"}
    cases = [detectors.Case("retinanet", (64, 96), 1), detectors.Case("retinanet", (64, 96), 2, training=True)]
    Results(tmp_path, "detectors", machine).add([row(case, "eager") for case in cases])
    keep = lambda r: r["training"]  # noqa: E731
    again = Results(tmp_path, "detectors", machine, keep)
    again.add([row(cases[0], "eager", p50=5e3)])
    assert [r["p50"] for r in json.loads(again.path.read_text())["rows"]] == [1e4, 5e3]
    assert Results(tmp_path, "detectors", {**machine, "commit": "def"}, keep).rows == []
