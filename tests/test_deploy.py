# SPDX-License-Identifier: Apache-2.0
"""docs/deploy.md as a reader would follow it: its Python, then its C++ and shell lines over the files that it wrote."""

import copy
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.small_detectors import calibrate

import fpn_fast

onnxruntime = pytest.importorskip("onnxruntime")

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
BLOCKS = BLOCK.findall((ROOT / "docs" / "deploy.md").read_text())


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """What the page's Python leaves: its names, and its files in ``scope["folder"]``."""
    folder = tmp_path_factory.mktemp("deploy")
    torch.manual_seed(0)
    scope = {"__name__": "__main__", "folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for text in (text for language, text in BLOCKS if language == "python"):
            exec(compile(text, "docs/deploy.md", "exec"), scope)
            if "detector" not in scope:
                # Scores of random weights are nearly equal: a rounding would reorder them, and change what is proposed.
                calibrate(scope["model"])
                scope["model"].rpn.nms_thresh = 1.0
                scope["model"].rpn._post_nms_top_n["testing"] = 12
    scope["images"].numpy().tofile(folder / "image.raw")
    return scope


def distances(found, expected):
    """[K]: how far, in pixels, each detection is from the nearest expected one of its label and score.

    The order does not count: equal scores may change places.
    """
    far = (found["boxes"][:, None] - expected["boxes"]).abs().amax(2)
    same = found["labels"][:, None] == expected["labels"]
    same &= (found["scores"][:, None] - expected["scores"]).abs() <= 1e-3
    return far.masked_fill(~same, torch.inf).amin(1)


def test_onnx_and_the_package_give_the_detections_of_torchvision(page):
    model = copy.deepcopy(page["model"])
    fpn_fast.restore(model)
    assert model.roi_heads.__module__.startswith("torchvision")
    with torch.no_grad():
        (expected,) = model(list(page["images"]))
    count = len(expected["boxes"])
    assert count > 10
    packaged = page["detector"].unpad(page["packaged"])[0]
    onnx = {name: torch.from_numpy(page[name]) for name in expected}
    # Fused convolutions and onnxruntime's RoIAlign round otherwise, of images of 128 pixels.
    for found in (packaged, onnx):
        assert len(found["boxes"]) == count
        assert distances(found, expected).max() < 0.2
        torch.testing.assert_close(found["scores"], expected["scores"], rtol=0, atol=1e-4)


def test_the_compiled_detector_is_within_its_bounds(page):
    """Its norms are in the convolutions, and a move drops the packages."""
    names = page["run"].get_constant_fqns()
    assert names
    assert not any("running" in name for name in names)
    detector, images, sizes = page["detector"], page["images"], page["sizes"]
    assert torch.equal(page["compiled"]["boxes"], page["packaged"]["boxes"])
    found, expected = (detector.unpad(page[name])[0] for name in ("compiled", "found"))
    assert len(found["boxes"]) == len(expected["boxes"])
    # 0.011 and 0.035 pixels from float64 were seen.
    assert distances(found, expected).max() < 0.2
    # Sizes of smaller images reach the package.
    part = detector(images, sizes / 2)
    assert part["boxes"].max() <= 64
    detector.to("cpu")
    torch.testing.assert_close(detector(images, sizes / 2)["counts"], part["counts"])
    assert not detector._compiled
    with pytest.raises(ValueError, match="evaluation mode"):
        fpn_fast.StaticDetector(copy.deepcopy(detector.model).train(), 96, 1).compile()


def test_cpp_lines_print_the_same_detections(page):
    """Compiled against this libtorch, run in a process without Python."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    (source,) = (text for language, text in BLOCKS if language == "cpp")
    (page["folder"] / "deploy.cpp").write_text(source)
    (script,) = (text for language, text in BLOCKS if language == "sh")
    # "python" of the page is this one, with this package.
    environment = {**os.environ, "PYTHONPATH": str(Path(fpn_fast.__file__).parents[1])}
    script = f"set -e\npython() {{ '{sys.executable}' \"$@\"; }}\n{script}"
    done = subprocess.run(
        ["bash", "-c", script], cwd=page["folder"], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = torch.tensor([[float(number) for number in line.split()] for line in done.stdout.splitlines()])
    found = page["detector"].unpad(page["packaged"])[0]
    torch.testing.assert_close(printed[:, 0].long(), found["labels"])
    torch.testing.assert_close(printed[:, 1], found["scores"], rtol=0, atol=1e-5)
    torch.testing.assert_close(printed[:, 2:], found["boxes"], rtol=0, atol=1e-2)
