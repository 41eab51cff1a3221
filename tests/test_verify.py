# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast verify``: its arguments, its outputs, and that it fails where it should."""

import io
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from fpn_fast import __main__ as command_line
from fpn_fast import nn, ops
from fpn_fast.verify import command, report, trial
from fpn_fast.verify.checks import CHECKS, Check, register
from fpn_fast.verify.draw import LAYOUTS, Draw
from fpn_fast.verify.run import Plan, Row, name_of, run


def verify(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    try:
        code = command_line.main(["verify", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


def python(folder, code: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Runs `code` in another process and another folder."""
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=os.environ | environment)


@pytest.fixture
def add(monkeypatch):
    """Adds the check of a function that draws, in float32 and by the reference."""

    def add(name, draw):
        check = Check(name, draw, ("top_down",), (torch.float32,), (), ("reference",))
        monkeypatch.setitem(CHECKS, name, check)

    return add


@pytest.fixture
def broken(add):
    """A check whose op is right but for its third case."""

    def draw(draw: Draw) -> trial.Trial:
        wrong = 1.0 if draw.number % 6 == 2 else 0.0
        call = lambda x: [x[0] + wrong]  # noqa: E731
        return trial.Trial("three numbers", [draw.place(draw.normal(3))], call, list, lambda i: trial.exactly)

    add("broken", draw)


def test_every_op_and_module_is_checked():
    helpers = {"AnchorGrid", "pad_boxes"}
    assert set(ops.__all__) - helpers <= set(CHECKS)
    modules = {name for name in nn.__all__ if isinstance(getattr(nn, name), type)}
    parts = {"ExtraFPNBlock", "LastLevelMaxPool", "LastLevelP6P7", "StaticTargets"}
    assert {f"nn.{name}" for name in modules - parts} <= set(CHECKS)
    assert {"nn.detectron2.ROIPooler", "nn.mmdet.SingleRoIExtractor"} <= set(CHECKS)


def test_passes_and_prints_a_table(capsys):
    code, text = verify(capsys, "--ops", "top_down", "match_anchors", "--cases", "2", "--backends", "cpp", "reference")
    assert code == 0
    lines = text.splitlines()
    assert " ".join(lines[0].split()) == "op backend device type cases worst ulp error bound decisions result"
    rows = [line.split() for line in lines if line.startswith(("top_down", "match_anchors"))]
    assert {tuple(row[:4]) for row in rows if row[2] == "cpu"} == {
        (op, backend, "cpu", dtype)
        for op in ("top_down", "match_anchors")
        for backend in ("cpp", "reference")
        for dtype in ("float64", "float32", "float16", "bfloat16")
    }
    assert all((row[4], row[-1]) == ("2", "pass") for row in rows)
    assert re.search(r"\d+ cases in \d+ s, 0 failed; fpn_fast ", text)


def test_the_quick_run_passes(capsys):
    code, text = verify(capsys, "--quick", "--backends", "cpp", "reference")
    assert code == 0, text
    assert int(re.search(r"(\d+) cases in \d+ s, 0 failed; ", text)[1]) >= 6 * len(CHECKS)


def test_files(capsys, tmp_path):
    paths = {kind: tmp_path / kind for kind in ("json", "junit", "markdown")}
    code, _ = verify(capsys, "--ops", "nms", "--cases", "1", "--seed", "3", *(f"--{k}={p}" for k, p in paths.items()))
    assert code == 0
    found = json.loads(paths["json"].read_text())
    assert found["passed"]
    assert found["settings"]["seed"] == 3
    assert {"fpn_fast", "torch", "python", "library", "gpu", "threads"} == set(found["environment"])
    assert {row["op"] for row in found["rows"]} == {"nms"}
    suite = ET.parse(paths["junit"]).getroot()
    assert (suite.tag, suite.get("failures"), suite.get("tests")) == ("testsuite", "0", str(len(found["rows"])))
    assert "| nms | reference | cpu | float32 | 1 | 0 | 0.0e+00 | 0.0e+00 | 0 | pass |" in paths["markdown"].read_text()


def test_a_failure_is_told_in_every_form(capsys, tmp_path, broken):
    paths = {kind: tmp_path / kind for kind in ("json", "junit", "markdown")}
    code, text = verify(capsys, "--ops", "broken", "--cases", "6", *(f"--{k}={p}" for k, p in paths.items()))
    assert code == 1
    assert "FAIL (1)" in text
    assert "broken/reference/cpu/float32/2: three numbers" in text
    line = next(line.strip() for line in text.splitlines() if line.strip().startswith("python -m fpn_fast"))
    failure = json.loads(paths["json"].read_text())["rows"][0]["failures"][0]
    assert failure["command"] == line
    assert failure["message"].startswith("output 0: [3] float32 differs from the reference in 3 of 3 elements")
    (test,) = ET.parse(paths["junit"]).getroot()
    assert line in test.find("failure").text
    assert line in paths["markdown"].read_text()
    # The line runs that case alone, and only that.
    code, text = verify(capsys, *shlex.split(line)[4:])
    assert code == 1
    assert text.splitlines()[1].split()[:5] == ["broken", "reference", "cpu", "float32", "1"]
    code, _ = verify(capsys, "--case", "broken/reference/cpu/float32/3")
    assert code == 0


def test_what_raises_has_failed(capsys, add):
    def draw(draw):
        raise RuntimeError("no such luck")

    add("raises", draw)
    code, text = verify(capsys, "--ops", "raises", "--cases", "1")
    assert code == 1
    assert "raised RuntimeError: no such luck" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "bottom_up"], "invalid choice: 'bottom_up'"),
        (["--backends", "fpga"], "invalid choice: 'fpga'"),
        (["--cases", "0"], "--cases must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be 0 or more, got -1"),
        (["--quick", "--cases", "3"], "--quick and --cases both set the number of cases"),
        (["--json", "/no/such/folder/file.json"], "there is no folder /no/such/folder"),
        (["--case", "top_down"], "--case must be OP/BACKEND/DEVICE/TYPE/NUMBER, got 'top_down'"),
        (["--case", "bottom_up/cpp/cpu/float32/1"], "there is no op 'bottom_up'"),
        (["--case", "top_down/cpp/tpu/float32/1"], "backend 'cpp' does not serve tpu tensors"),
        (["--case", "top_down/cpp/cpu/int8/1"], "top_down is not checked in 'int8'"),
        (["--case", "top_down/cpp/cpu/float32/1", "--quick"], "--case names one case"),
        (["--shapes", "missing.json"], "missing.json"),
        # The content of a file of sizes.
        ("{", "Expecting property name"),
        pytest.param("[" * 10**5, "shapes.json: maximum recursion depth", id="nested"),
        ("[]", "must hold an object"),
        ('{"bottom_up": [{}]}', "there is no op 'bottom_up'"),
        ('{"top_down": {}}', "top_down must be a list of objects"),
        ('{"top_down": [{"rois": 3}]}', "top_down has no size 'rois'; it has: batch, channels, sizes"),
        ('{"top_down": [{"sizes": [[4]]}]}', "top_down has sizes"),
        ('{"top_down": [{"sizes": [[4, 0]]}]}', "top_down has sizes"),
        ('{"top_down": [{"batch": 1.5}]}', "top_down has batch 1.5"),
        ('{"top_down": [{"channels": true}]}', "top_down has channels true"),
        ('{"heatmaps_to_keypoints": [{"heatmap_size": 7}]}', "heatmaps_to_keypoints has heatmap_size 7"),
    ],
)
def test_bad_arguments_exit_with_2(capsys, tmp_path, arguments, message):
    if isinstance(arguments, str):
        path = tmp_path / "shapes.json"
        path.write_text(arguments)
        arguments = ["--shapes", str(path)]
    code, text = verify(capsys, *arguments)
    assert code == 2
    assert message in text


def test_shapes_of_a_user(capsys, tmp_path):
    path, found = tmp_path / "my shapes.json", tmp_path / "found.json"
    path.write_text(
        json.dumps(
            {
                "top_down": [{"batch": 1, "channels": 5, "sizes": [[9, 14], [5, 7]]}, {"channels": 6}],
                "multiscale_roi_align": [{"rois": 2, "output_size": 3}],
                "paste_masks": [{"masks": 2, "image": [12, 17], "mask_size": 5}],
            }
        )
    )
    code, text = verify(capsys, "--shapes", str(path), "--backends", "reference", "--json", str(found))
    assert code == 0, text
    cases = {row["op"]: row["cases"] for row in json.loads(found.read_text())["rows"]}
    assert cases == {"top_down": 4, "multiscale_roi_align": 2, "paste_masks": 2}
    code, text = verify(capsys, "--shapes", str(path), "--ops", "nms")
    assert code == 2
    assert "has no sizes for nms" in text


def test_sizes_that_are_given_are_used():
    given = {"batch": 1, "channels": 5, "sizes": [[9, 14], [5, 7]], "rois": 3, "output_size": 2}
    maps = CHECKS["top_down"].draw(Draw("top_down", 0, torch.float32, "cpu", given=given)).inputs
    assert [tuple(m.shape) for m in maps] == [(1, 5, 9, 14), (1, 5, 5, 7)]
    drawn = CHECKS["multiscale_roi_align"].draw(Draw("x", 0, torch.float32, "cpu", given=given))
    (pooled,) = drawn.plain(drawn.inputs)
    assert pooled.shape == (3, 5, 2, 2)


@pytest.mark.parametrize("name", CHECKS)
def test_a_case_is_its_number(name):
    """The same numbers each time; other ones for another number."""
    check, texts = CHECKS[name], []
    for number in (7, 7, 8):
        drawn = check.draw(Draw(name, number, check.dtypes[0], "cpu"))
        texts.append((drawn.text, [i.nan_to_num(9).tolist() for i in drawn.inputs]))
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_layouts():
    values = torch.arange(120.0).view(2, 3, 4, 5)
    for layout in LAYOUTS:
        draw = Draw("layouts", 0, torch.float32, "cpu")
        placed = draw.place(values, layout)
        assert torch.equal(placed, values)
        assert placed.is_contiguous() == (layout == "contiguous")
        assert placed.is_contiguous(memory_format=torch.channels_last) == (layout == "channels_last")


def test_unwritten_memory_shows(add):
    zeros = [torch.zeros(4), torch.zeros(2, dtype=torch.int64)]

    def call():
        out = torch.empty(4)
        out[1:] = 0
        return [out, zeros[1]]

    add("u", lambda draw: trial.decision("", call, lambda: zeros))
    (row,) = run(Plan(["u"], ["reference"], 0, 1))
    message = "output 0: [4] float32 differs from the reference in 1 of 4 elements, most at (0,): nan and not 0.0"
    assert row.failures[0].message.startswith(message)
    assert not torch.are_deterministic_algorithms_enabled()


def double_gradient(x):
    """The identity, of which autograd says that it doubles."""
    return x * 2 - x.detach()


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        (lambda x: [x, x], "outputs are"),
        (lambda x: [x[:1]], "outputs are"),
        (lambda x: [x.double()], "outputs are"),
        (lambda x: [x.contiguous(memory_format=torch.channels_last)], "is not torch.contiguous_format"),
        (lambda x: [x * 2], "output 0: [2, 3, 4, 5] float32 differs"),
        (lambda x: [double_gradient(x)], "gradient 0: [2, 3, 4, 5] float32 differs"),
    ],
)
def test_rules_find(add, outputs, message):
    def draw(draw):
        # Whole numbers: sums and differences are exact.
        maps = [draw.place(draw.integers(-9, 9, 2, 3, 4, 5).double())]
        return trial.Trial("", maps, lambda x: outputs(x[0]), lambda x: [x[0] * 1], lambda i: trial.exactly,
                           lambda *_: [trial.not_worse(5)], form=torch.contiguous_format,
                           output_seeds=draw.seeds)  # fmt: skip

    add("w", draw)
    (row,) = run(Plan(["w"], ["reference"], 0, 1))
    assert message in row.failures[0].message


def test_errors_in_ulp():
    exact = torch.tensor([1.0, 0.5, 4.0, 1e-9], dtype=torch.float64)
    actual = exact.float()
    assert trial.exactly(actual, actual, actual.double()).ulp == 0
    off = actual.clone()
    off[0] += 2**-22
    measure = trial.exactly(off, actual, exact)
    # Two units of numbers from 1 to 2.
    assert measure.ulp == pytest.approx(2)
    assert measure.error.worst == pytest.approx(2**-22)
    assert "have to be equal" in measure.error.text
    for bad in (float("nan"), float("inf")):
        measure = trial.exactly(actual.index_fill(0, torch.tensor(0), bad), actual, exact)
        assert (measure.ulp, measure.error.within) == (float("inf"), False)
    same = torch.tensor([float("nan"), float("inf"), 1.0])
    assert trial.exactly(same, same, same.double()) == trial.Measure()
    assert trial.decided()(torch.tensor([1, 2, 3]), torch.tensor([1, 5, 4]), torch.tensor([])).decisions == 2


def test_progress_is_for_terminals():
    plain, terminal = io.StringIO(), io.StringIO()
    terminal.isatty = lambda: True
    for stream in (plain, terminal):
        bar = report.Progress(stream)
        bar(5, 10, "top_down")
        bar(10, 10, "")
    assert plain.getvalue() == ""
    assert "[############............]  50%" in terminal.getvalue()
    assert terminal.getvalue().endswith(" \r")


def test_interpreted_kernels_take_few_cases():
    if not os.environ.get("TRITON_INTERPRET"):
        pytest.skip("Triton runs on the GPU here")
    rows = run(Plan(["upsample_add"], ["triton"], 0, 24))
    assert [(row.dtype, row.cases, row.passed) for row in rows if row.device == "cpu"] == [
        ("float64", 3, True), ("float32", 3, True), ("float16", 3, True), ("bfloat16", 0, True),
    ]  # fmt: skip
    assert "3 small cases" in rows[0].note
    assert "does not round to bfloat16" in rows[-1].note
    assert "left out" in report.table(rows)
    assert 'skipped="1"' in report.as_junit(rows, 1.0, "")


def test_registering_an_op(monkeypatch):
    monkeypatch.setattr("fpn_fast.verify.checks.CHECKS", {})
    from fpn_fast.verify import checks

    @register("doubled", keys=("rois",))
    def doubled(draw):
        raise NotImplementedError

    assert checks.CHECKS["doubled"].ops == ("doubled",)
    assert [name_of(d) for d in checks.CHECKS["doubled"].dtypes] == ["float64", "float32", "float16", "bfloat16"]


def finds_the_fault(code: int, text: str) -> None:
    """In RoIAlign, which a test made wrong, and not in NMS."""
    assert code == 1, text
    rows = [line.split() for line in text.splitlines() if line.startswith(("roi_align ", "nms "))]
    assert {(row[0], row[9]) for row in rows} == {("roi_align", "FAIL"), ("nms", "pass")}
    # The printed error and bound say the same as the printed result.
    assert all((float(row[6]) <= float(row[7])) == (row[9] == "pass") for row in rows)


def test_a_planted_fault_is_found(capsys, monkeypatch):
    right = ops.roi_align
    monkeypatch.setattr(ops, "roi_align", lambda *arguments, **options: right(*arguments, **options) * 1.5 + 0.25)
    finds_the_fault(*verify(capsys, "--ops", "roi_align", "nms", "--cases", "3", "--backends", "cpp"))


BARE = """
import contextlib, sys
from fpn_fast import ops
from fpn_fast.__main__ import main
for arguments in (["--help"], ["verify", "--help"], ["bench", "--help"], ["info"]):
    with contextlib.suppress(SystemExit):
        main(arguments)
right = ops.roi_align
ops.roi_align = lambda *arguments, **options: right(*arguments, **options) * 1.5 + 0.25
sys.exit(main(["verify", "--ops", "roi_align", "nms", "--cases", "3", "--backends", "cpp"]))
"""


def test_needs_no_assert_statements_and_no_docstrings(tmp_path):
    """In one process: Python compiles torch anew for -OO, which takes half a minute. -O leaves less out."""
    done = python(tmp_path, BARE, "-OO")
    assert done.stderr == ""
    assert "Checks every op and module" in done.stdout
    assert "backends for cpu tensors:" in done.stdout
    finds_the_fault(done.returncode, done.stdout)


TORCH_ALONE = """
import sys
sys.modules.update(dict.fromkeys(["torchvision", "pytest", "hypothesis", "numpy", "tqdm"]))
import fpn_fast.__main__
assert fpn_fast.__main__.main(["verify", "--ops", "nn.FeaturePyramidNetwork", "nn.RoIAlign", "--cases", "1"]) == 0
from fpn_fast.verify.checks import CHECKS
assert "nn.RegionProposalNetwork" not in CHECKS
"""


def test_needs_torch_alone(tmp_path):
    done = python(tmp_path, TORCH_ALONE, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stdout + done.stderr


def test_help_says_what_a_file_of_shapes_has(capsys):
    code, text = verify(capsys, "--help")
    assert code == 0
    example = re.search(r'\{"top_down": .*?\}\]\}', text, re.DOTALL).group()
    shapes = json.loads(example)
    assert all(key in CHECKS[op].keys for op, entries in shapes.items() for each in entries for key in each)
    assert command.CASES > command.QUICK_CASES
    assert Row("a", "b", "c", "d").passed
