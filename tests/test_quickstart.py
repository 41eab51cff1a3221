# SPDX-License-Identifier: Apache-2.0
"""examples/quickstart.ipynb: its cells run, and its committed outputs are there and small."""

import json
from pathlib import Path

import matplotlib

PATH = Path(__file__).parents[1] / "examples" / "quickstart.ipynb"
CELLS = [cell for cell in json.loads(PATH.read_text())["cells"] if cell["cell_type"] == "code"]


def test_all_cells_run_in_order(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = []
    monkeypatch.setattr(pyplot, "show", lambda: drawn.append(pyplot.gcf().number) or pyplot.close())
    scope = {"__name__": "__main__"}
    for cell in CELLS:
        exec(compile("".join(cell["source"]), PATH.name, "exec"), scope)
    assert len(drawn) == 2
    printed = capsys.readouterr().out
    assert "fpn_fast: 22 swapped" in printed
    assert "times as fast" in printed


def test_committed_outputs_are_whole_and_small():
    assert PATH.stat().st_size < 400_000
    outputs = [output for cell in CELLS for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 2
    text = "".join("".join(output.get("text", "")) for output in outputs)
    assert "fpn_fast: 22 swapped" in text
