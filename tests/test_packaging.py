# SPDX-License-Identifier: Apache-2.0
"""Installing: a wheel with the CPU library, and what is left without a compiler."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USE = (
    "import torch, fpn_fast\n"
    "maps = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)]\n"
    "print(fpn_fast.__file__, fpn_fast.backends.choose('cpu'), fpn_fast.ops.top_down(maps)[0].sum().item())\n"
)


def build_wheel(folder: Path, **environment: str) -> Path:
    """A wheel of a copy of the sources, so that neither this checkout nor another build is touched."""
    source = folder / "source"
    for name in ("csrc", "fpn_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "pytest_fpn_fast.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    options = ["--no-build-isolation", "--no-deps", "-w", str(folder)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def install_and_use(wheel: Path, folder: Path, code: str = "") -> str:
    """Installs the wheel under `folder`, and returns what its use and `code` after it print."""
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(command, capture_output=True, check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", USE + code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    assert str(target) in done.stdout
    return done.stdout


@pytest.mark.slow
def test_wheel_is_abi3_and_runs(tmp_path):
    # Unoptimised: a quarter of the time to build, and nothing here is timed.
    wheel = build_wheel(tmp_path, FPN_FAST_CUDA="0", FPN_FAST_DEBUG="1")
    assert "-cp310-abi3-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert "fpn_fast/_C.abi3.so" in names
    # A file with a cpython tag would serve one Python alone.
    assert not any("_C_cuda" in name or "cpython" in name or name.startswith("tests") for name in names)
    facts = "print(fpn_fast._library.build_facts()['cuda'])"
    assert install_and_use(wheel, tmp_path, facts).split()[1:] == ["cpp", "64.0", "none"]


def test_without_a_compiler_the_package_still_works(tmp_path):
    (tmp_path / "bin").mkdir()
    wheel = build_wheel(tmp_path, PATH=str(tmp_path / "bin"), CXX="no-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    text = install_and_use(wheel, tmp_path, "import fpn_fast.__main__ as m; m.main(['info'])")
    assert text.split()[1:3] == ["reference", "64.0"]
    assert "cpp       not available: fpn_fast was installed without its compiled library" in text
    assert "install g++ or clang++" in text
    site = tmp_path / "site"
    environment = {**os.environ, "PYTHONPATH": str(site)}
    environment.pop("TRITON_INTERPRET", None)

    def output_of(*command: str) -> str:
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True).stdout

    # Commands and the pytest plugin are there by their entry points alone.
    command = [sys.executable, str(site / "bin" / "fpn-fast"), "verify", "--cases", "1", "--ops", "nms", "upsample_add"]
    assert "upsample_add  reference  cpu     bfloat16      1" in output_of(*command)
    command = [
        sys.executable,
        str(site / "bin" / "fpn-fast"),
        "bench",
        "--device",
        "cpu",
        "--tiny",
        "--ops",
        "match_anchors",
    ]
    assert "report.html" in output_of(*command, "--only", "gts_", "--providers", "eager", "--output", "bench")
    assert len(list((tmp_path / "bench").glob("*/growth.json"))) == 1
    assert "@pytest.mark.fpn_fast_parity(" in output_of(sys.executable, "-m", "pytest", "--markers")


def test_build_without_torch_says_what_to_do(tmp_path):
    code = "import sys, runpy; sys.modules['torch'] = None; runpy.run_path('setup.py')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "pip install --no-build-isolation ." in done.stderr


@pytest.mark.parametrize(("value", "message"), [("2", "must be auto, 0 or 1, got '2'"), ("1", "FPN_FAST_CUDA=1, but")])
def test_cuda_switch_errors(value, message):
    code = "import runpy, torch; torch.version.cuda = None; runpy.run_path('setup.py')"
    environment = {**os.environ, "FPN_FAST_CUDA": value}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 1
    assert message in done.stderr
