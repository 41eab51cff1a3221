# SPDX-License-Identifier: Apache-2.0
"""fpn_fast.profile: counts that can be done by hand, and those of three detectors against the committed ones."""

import importlib.metadata
import json
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

import fpn_fast
from fpn_fast import profile

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import step_budget  # noqa: E402

COMMITTED = json.loads((ROOT / "benchmarks" / "results" / "step_budget.json").read_text())


class Detector(nn.Module):
    """A convolution, a pyramid, a head with a number that the host reads, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
        self.neck = FeaturePyramidNetwork([4], 2)
        self.head = nn.Linear(2, 1, bias=False)

    def compute_loss(self, scores: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (scores * targets).sum()

    def forward(self, images: torch.Tensor, targets: torch.Tensor | None = None) -> object:
        scores = self.head(self.neck({"0": self.backbone(images)})["0"].movedim(1, -1)[0, 0])
        scores = scores + torch.rand(())
        if self.training:
            return {"loss": self.compute_loss(scores, targets)}
        return scores[scores > 0]


IMAGES = torch.ones(1, 3, 5, 7)


def test_an_evaluation_by_hand() -> None:
    found = profile.budget(Detector().eval(), IMAGES)
    assert list(found.parts) == ["body", "FPN", "heads", "detector"]
    body, head, rest = found.parts["body"], found.parts["heads"], found.parts["detector"]
    assert body.operators == {"aten::convolution": 1, "aten::native_batch_norm": 1}
    # Image, weight, bias and map.
    assert body.bytes["aten::convolution"] == 4 * (3 * 35 + 3 * 4 + 4 + 4 * 35)
    assert body.flops == {"aten::convolution": 2 * 35 * 3 * 4}
    assert head.operators == {"aten::mm": 1}
    assert (head.bytes["aten::mm"], head.flops["aten::mm"]) == (4 * (14 + 2 + 7), 2 * 14)
    assert +rest.syncs == {"mask as index": 1}
    assert [entry.name for entry in found.could_swap] == ["neck"]
    total = found.as_dict()["parts"]["total"]
    assert total["operators"] == sum(count.operations for count in found.parts.values())
    assert (total["syncs"], total["flops"]) == (1, 840 + 28 + 2 * 35 * (4 * 2 + 9 * 2 * 2))


def test_a_training_step_leaves_the_model_as_it_was() -> None:
    model = Detector()
    before = {name: each.clone() for name, each in model.state_dict().items()}
    state = torch.get_rng_state()
    found = profile.budget(model, IMAGES, torch.ones(7, 1))
    assert list(found.parts) == ["body", "FPN", "heads", "detector", "losses", "backward"]
    assert found.parts["losses"].operators == {"aten::mul": 1, "aten::sum": 1}
    # Twice the forward's, without the image's gradient.
    forward = sum(found.parts[part].flops.total() for part in ("body", "FPN", "heads"))
    assert found.parts["backward"].flops.total() == 2 * forward - 840
    assert all(each.grad is None for each in model.parameters())
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert type(model.neck) is FeaturePyramidNetwork
    fpn_fast.accelerate(model)
    assert fpn_fast.profile.budget(model, IMAGES, torch.ones(7, 1)).could_swap == []


@pytest.mark.parametrize(
    ("part", "names"),
    [
        ("transform", "transform data_preprocessor"),
        ("body", "backbone backbone.body backbone.bottom_up module.backbone model.backbone.bottom_up"),
        ("FPN", "backbone.fpn neck module.model.neck"),
        ("RPN", "rpn rpn_head proposal_generator"),
        ("pooler", "roi_heads.box_roi_pool roi_heads.mask_pooler roi_head.bbox_roi_extractor"),
        ("heads", "head roi_heads roi_head bbox_head module.roi_heads"),
        # Inside a part.
        (None, "rpn.head backbone.fpn.inner_blocks.0 roi_heads.box_head roi_head.bbox_head"),
    ],
)
def test_parts_are_known_by_their_names_in_three_libraries(part: str | None, names: str) -> None:
    assert {name: profile._part(name, nn.Module()) for name in names.split()} == dict.fromkeys(names.split(), part)
    pyramid = nn.Module()
    pyramid.bottom_up = nn.Module()
    assert profile._part("backbone", pyramid) == "FPN"


def test_what_cannot_be_counted_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got int"):
        profile.budget(3, IMAGES)
    with pytest.raises(TypeError, match="must return a dictionary of losses, got Tensor"):
        profile.budget(nn.Conv2d(3, 4, 1), IMAGES)


def test_a_roofline_is_a_model_by_the_slower_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    found = profile.budget(nn.Conv2d(3, 4, 1).eval(), IMAGES)
    moved, flops = 4 * (3 * 35 + 3 * 4 + 4 + 4 * 35), 840
    for rates, seconds in (((1e-9, 1.0), moved), ((1.0, 1e-12), flops)):
        text = found.table(rates)
        assert "model, not measured" in text
        assert f"| total | 1 | 0.00 | 0.0 | 0 | 0 | {seconds * 1e3:.2f} |" in text
    assert "model" not in found.table()

    class Clock:
        def elapsed(self, call: object) -> float:
            return 0.5

    monkeypatch.setattr(profile, "timer", lambda device_type: Clock())
    bandwidth, tflops = profile.measured_rates("cpu")
    assert (bandwidth, tflops) == (2 * 4 * 2**26 / 0.5 / 1e9, 2 * 2048**3 / 0.5 / 1e12)


def test_a_plot_has_a_bar_for_each_part() -> None:
    found = profile.budget(Detector().eval(), IMAGES)
    bars = [each for each in ET.fromstring(found.plot()) if each.tag.endswith("rect")]
    widths = [float(bar.get("width")) for bar in bars]
    sizes = [count.bytes.total() for count in found.parts.values()]
    assert max(widths) > 300
    assert widths == pytest.approx([max(widths) * size / max(sizes) for size in sizes], abs=0.1)


@pytest.mark.skipif(
    any(importlib.metadata.version(name) != COMMITTED[name] for name in ("torch", "torchvision")),
    reason="counts are of one version of torch and torchvision",
)
@pytest.mark.parametrize(
    ("model", "mode", "variant"),
    [case for case in step_budget.cases(list(step_budget.MODELS)) if case[2] != "torchvision"],
)
def test_no_more_than_committed(model: str, mode: str, variant: str) -> None:
    """An accelerated step's operators and synchronisations do not depend on the size of the image."""
    row = next(r for r in COMMITTED["rows"] if (r["model"], r["mode"], r["variant"]) == (model, mode, variant))
    found = step_budget.count_case(model, mode, variant, step_budget.SMALL)
    parts = found.as_dict()["parts"]
    assert parts.keys() == row["parts"].keys()
    for what in ("operators", "syncs"):
        assert {part: parts[part][what] for part in parts if parts[part][what] > row["parts"][part][what]} == {}, what
    assert found.could_swap == []


def test_the_command_counts_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {name: tmp_path / f"found.{name}" for name in ("json", "plot")}
    options = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    size = [str(each) for each in step_budget.SMALL]
    assert (
        step_budget.main(["--model", "Faster R-CNN", "--size", *size, *options, "--bandwidth", "1", "--tflops", "1"])
        == 0
    )
    rows = json.loads(files["json"].read_text())["rows"]
    assert len(rows) == 7
    assert ET.parse(files["plot"]).getroot().get("viewBox")
    printed = capsys.readouterr().out
    for row in rows:
        assert f"| total | {row['parts']['total']['operators']} |" in printed
    eager = rows[4]["parts"]
    assert (rows[4]["mode"], rows[4]["variant"], eager["RPN"]["syncs"]) == ("evaluation", "torchvision", 6)
    with pytest.raises(SystemExit):
        step_budget.main(["--bandwidth", "1"])
