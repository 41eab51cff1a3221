# SPDX-License-Identifier: Apache-2.0
"""``python -m fpn_fast bench``: its arguments, its files and its report."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_fast import __main__ as command_line
from fpn_fast.bench import cases, command, report
from fpn_fast.bench.rows import Row, as_dict

ONLY = "resnet50_fpn_800x1344-n1-float32-channels_last,gts_,tiny_2_maps-n1-float32-channels_first-forward_g"


def bench(capsys, *arguments: str) -> tuple[int, str]:
    """Exit code, and what was printed."""
    try:
        code = command_line.main(["bench", "--device", "cpu", *arguments])
    except SystemExit as stopped:
        code = stopped.code
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A machine's folder, of a walk with tiny maps."""
    output = tmp_path_factory.mktemp("bench")
    options = ["--device", "cpu", "--tiny", "--providers", "eager,cpp", "--only", ONLY, "--output", str(output)]
    assert command_line.main(["bench", *options]) == 0
    (found,) = output.iterdir()
    return found


def test_every_file_is_written(folder):
    assert {path.name for path in folder.iterdir()} == {
        "top_down.json",
        "growth.json",
        "match_anchors.json",
        "report.md",
    }
    results = report.load(folder / "top_down.json")
    rows = results["rows"]
    assert results["machine"]["tiny"]
    assert results["machine"]["not_reached"] == []
    wanted = [c for c in cases.FAMILIES["top_down"]("cpu") if any(word in str(c) for word in ONLY.split(","))]
    assert len(report.by_case(results)) == len(wanted)
    for row in rows:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["bytes"] == cases.bytes_moved(report.case_of(row))
        assert ("copy_share" in row) != row["overhead"]
    by_provider = {row["provider"]: row for row in rows if row["direction"] == "forward" and row["channels"] == 8}
    # An interpolation and an addition for each of three levels against one call; no synchronisation.
    assert (by_provider["eager"]["operations"], by_provider["cpp"]["operations"]) == (6, 1)
    assert (by_provider["eager"]["syncs"], by_provider["cpp"]["syncs"]) == (0, 0)
    text = (folder / "report.md").read_text()
    for what in ("operations", "host synchronisations", "peak memory"):
        assert f"| {what}, eager | {what}, fpn_fast (cpp) |" in text
    cells = [cell for line in text.splitlines() for cell in line.split(" | ")]
    for pattern in (r"[\d.]+ (us|ms)", r"[\d.]+x", r"\d+%", r"[\d.]+ MB"):
        assert any(re.fullmatch(pattern, cell) for cell in cells), pattern
    assert "least bytes" in text
    assert "no measurement" in text


def _results(times: dict[str, float], refused: bool = False) -> dict:
    """Results of one case: eager at 100 us, and the library."""
    case = cases.FAMILIES["top_down"]("cpu")[0]
    found = [
        Row(case, name, "wall", "clock", 8, t, t, t, speedup={o: s / t for o, s in times.items() if o != name})
        for name, t in times.items()
    ]
    if refused:
        found[-1] = Row(case, found[-1].provider, "none", "none", 8, refused="result 0 differs")
    machine = {"device_type": "cpu", "device": "Abacus 9", "threads": 2, "torch": "2.11.0", "commit": "0123abc",
               "date": "2026-01-02", "allocator": {}}  # fmt: skip
    return {"machine": machine, "rows": list(map(as_dict, found))}


def test_regressions_are_relative_to_the_rival():
    before = _results({"eager": 100.0, "cpp": 50.0})
    case = report.case_of(before["rows"][0])
    # The machine as a whole is half as fast: nothing changed.
    assert report.changes([before], [_results({"eager": 200.0, "cpp": 100.0})]) == {(case, "cpp"): 1.0}
    changed = report.changes([before], [_results({"eager": 100.0, "cpp": 62.5})])
    assert changed[case, "cpp"] == pytest.approx(1.25)
    # Without a rival in both, times themselves.
    alone = report.changes([_results({"cpp": 50.0})], [_results({"eager": 1.0, "cpp": 40.0})])
    assert alone[case, "cpp"] == pytest.approx(0.8)
    assert report.changes([before], [_results({"eager": 1.0, "cpp": 1.0}, refused=True)]) == {}


def test_what_is_slower_refused_or_regressed_is_listed():
    slower = _results({"eager": 100.0, "compile": 300.0, "cpp": 200.0})
    case = report.case_of(slower["rows"][0])
    assert report.slower([slower]) == [f"{case}: 0.50x eager"]
    assert f"## Where a rival is faster\n\n- {case}: 0.50x eager\n" in report.document({"top_down": slower})
    assert "| 2.00x the time: REGRESSION |\n" in report.document({"top_down": slower}, {(case, "cpp"): 2.0})
    refused = _results({"eager": 100.0, "cpp": 20.0}, refused=True)
    text = report.document({"top_down": refused})
    assert f"## Refused\n\n- {case} cpp: result 0 differs\n" in text
    assert "| 100 us | refused |" in text
    assert report.slower([refused]) == []


def test_compare_marks_and_fails(folder, tmp_path, capsys):
    path = tmp_path / "before.json"
    before = json.loads((folder / "match_anchors.json").read_text())
    for row in before["rows"]:
        if row["provider"] == "cpp":
            row["speedup"]["eager"] *= 1000
    path.write_text(json.dumps(before))
    options = ["--tiny", "--providers", "eager,cpp", "--only", ONLY, "--family", "match_anchors"]
    code, text = bench(capsys, *options, "--output", str(tmp_path / "out"), "--compare", str(path))
    assert code == 1
    assert "slower than before: match_anchors-20_gts" in text
    (now,) = (tmp_path / "out").iterdir()
    assert "REGRESSION" in (now / "report.md").read_text()


def test_a_limit_leaves_the_rest_out_and_says_so(tmp_path, capsys):
    code, text = bench(capsys, "--tiny", "--limit", "0", "--family", "top_down", "--output", str(tmp_path))
    assert code == 0
    assert "the limit of 0 s is reached: 26 cases of top_down left out" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "nonsense"], "there are no cases of nonsense; there are some of batched_nms,"),
        (["--only", "nonsense"], "no case has 'nonsense' in its name"),
        (["--family", "nonsense"], "invalid choice: 'nonsense'"),
        (["--seconds", "-1"], "--seconds must be 0 or more, got -1.0"),
        (["--compare", "no/such/file.json"], "--compare no/such/file.json: "),
    ],
)
def test_bad_arguments_exit_with_2(capsys, arguments, message):
    code, text = bench(capsys, *arguments)
    assert code == 2
    assert message in text


@pytest.mark.parametrize(
    ("content", "message"),
    [("[]", "no results of fpn_fast bench there"), ("{", "Expecting"), ("[" * 10**5, "maximum recursion depth")],
    ids=["list", "cut", "nested"],
)
def test_bad_results_to_compare_with(content, message, capsys, tmp_path):
    (tmp_path / "not.json").write_text(content)
    code, text = bench(capsys, "--compare", str(tmp_path))
    assert code == 2
    assert message in text


def test_without_torchvision_it_says_what_to_install(tmp_path):
    code = (
        "import sys\nfrom importlib import machinery\nfind = machinery.PathFinder.find_spec\n"
        "hide = lambda name, *rest: None if name.partition('.')[0] == 'torchvision' else find(name, *rest)\n"
        "machinery.PathFinder.find_spec = hide\nfrom fpn_fast.__main__ import main\nmain(['bench'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert "which is not installed: pip install torchvision" in done.stderr


def test_quick_has_a_case_of_each_family_and_direction():
    class Options:
        family, ops, only, quick, tiny, seconds, compare = None, None, "", True, False, None, None

    chosen = command._chosen(Options, "cpu")
    assert set(chosen) == set(cases.FAMILIES)
    assert chosen["match_anchors"] == cases.FAMILIES["match_anchors"]("cpu")[:1]
    for family, found in chosen.items():
        wanted = {(case.op, case.direction) for case in cases.FAMILIES[family]("cpu")}
        assert {(case.op, case.direction) for case in found} == wanted
