# SPDX-License-Identifier: Apache-2.0
"""Installing: a wheel with the CPU library, what is left without a compiler, and how wheels are built and checked."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
USE = (
    "import torch, fpn_fast\n"
    "maps = [torch.ones(1, 2, 4, 4), torch.ones(1, 2, 2, 2)]\n"
    "print(fpn_fast.__file__, fpn_fast.backends.choose('cpu'), fpn_fast.ops.top_down(maps)[0].sum().item())\n"
)


def build_wheel(folder: Path, keep: tuple[str, ...] = (), **environment: str) -> Path:
    """A wheel of a copy of the sources, so that neither this checkout nor another build is touched.

    keep: the C++ files to compile, by their stems; by default all.
    """
    source = folder / "source"
    for name in ("csrc", "fpn_fast"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("setup.py", "pyproject.toml", "pytest_fpn_fast.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    if keep:
        setup = (source / "setup.py").read_text()
        files = re.findall(r'    "csrc/(?:cpu/)?(\w+)\.cpp",\n', setup)
        assert set(keep) < set(files)
        for name in set(files) - set(keep):
            setup = re.sub(rf'    "csrc/(cpu/)?{name}\.cpp",\n', "", setup)
        (source / "setup.py").write_text(setup)
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


def test_the_library_links_little():
    """The CPU library needs nothing of CUDA, no glibc from after 2.28 and no libstdc++ from after GCC 8."""
    library = ROOT / "fpn_fast" / "_C.abi3.so"
    if not library.exists():
        pytest.skip("this checkout has no compiled library")
    needs = subprocess.run(["objdump", "-p", library], capture_output=True, text=True, check=True).stdout
    libraries = set(re.findall(r"NEEDED +(\S+?)\.so", needs))
    assert "libtorch_cpu" in libraries
    assert libraries <= {"libc10", "libtorch_cpu", "libstdc++", "libm", "libgcc_s", "libc"}
    versions = {(name, tuple(map(int, v.split(".")))) for name, v in re.findall(r" (GLIBC(?:XX)?)_([\d.]+)\n", needs)}
    assert {name for name, _ in versions} == {"GLIBC", "GLIBCXX"}
    assert [v for v in versions if v[1] > {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24)}[v[0]]] == []


@pytest.mark.slow
def test_wheel_is_abi3_and_runs(tmp_path):
    """A small one: of the op that is used below alone, unoptimised."""
    wheel = build_wheel(tmp_path, keep=("build_facts", "ops", "top_down"), FPN_FAST_CUDA="0", FPN_FAST_DEBUG="1")
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
    assert "report.md" in output_of(*command, "--only", "gts_", "--providers", "eager", "--output", "bench")
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


def run_tool(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_build_shows_its_progress_and_the_end_of_what_failed(tmp_path):
    code = (
        "import sys; print('  fpn_fast: two files'); print('  fpn_fast: two files')\n"
        "for i in (1, 2): print(f'  [{i}/2] c++ -c {i}.cpp')\n"
        "sys.exit(int(sys.argv[1]))"
    )
    always = (
        "import progress, sys; progress.EVERY_S = 0; sys.exit(progress.run(progress.Path(sys.argv[1]), sys.argv[2:]))"
    )
    log = tmp_path / "logs" / "build.log"
    command = [sys.executable, "-c", always, log, sys.executable, "-c", code, "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tools")
    assert done.returncode == 0
    assert done.stdout.splitlines() == [
        "fpn_fast: two files",
        "  1 of 2 files compiled, 0:00",
        "  2 of 2 files compiled, 0:00",
    ]
    assert log.read_text().count("\n") == 4
    failed = run_tool("progress.py", log, sys.executable, "-c", code, "3")
    assert failed.returncode == 3
    assert "c++ -c 2.cpp" in failed.stdout
    assert f"the whole output is in {log}" in failed.stdout


@pytest.mark.parametrize(
    ("name", "entry", "size", "message"),
    [
        ("cp311-cp311-manylinux_2_28_x86_64", "fpn_fast/_C.abi3.so", 1, "is not for Python 3.10 and later"),
        ("cp310-abi3-linux_x86_64", "fpn_fast/_C.abi3.so", 1, "is not for Python 3.10 and later"),
        ("cp310-abi3-manylinux_2_28_x86_64", "fpn_fast/a.cpython-311.so", 1, "files for one Python alone: fpn_fast/a"),
        ("cp310-abi3-manylinux_2_28_x86_64", "fpn_fast/_C.abi3.so", 30_000_000, "more than "),
        ("cp310-abi3-manylinux_2_28_x86_64", "fpn_fast/_C.abi3.so", 1, "cannot be installed, so nothing was tried"),
    ],
)
def test_a_wheel_that_is_not_as_promised_is_refused(tmp_path, name, entry, size, message):
    with zipfile.ZipFile(tmp_path / f"fpn_fast-0.1.0-{name}.whl", "w") as wheel:
        wheel.writestr(entry, b"0" * size)
    done = run_tool("build_wheel.py", "--no-build", "--folder", tmp_path, PIP_NO_INDEX="1", PIP_FIND_LINKS="")
    assert done.returncode == 1
    assert message in done.stdout + done.stderr


def test_hosted_workflows_call_our_own_commands_alone():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = []
    for path in (ROOT / ".github" / "workflows").glob("*.yml"):
        for job in yaml.safe_load(path.read_text())["jobs"].values():
            commands += [step["run"] for step in job["steps"] if "run" in step]
    assert sorted(commands) == [".ci/run", "make test-wheel"]
    assert "test-wheel" in targets


@pytest.mark.parametrize("name", ["wrong-result", "slow", "request"])
def test_issue_forms_ask_for_the_installation(name):
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text())
    assert {"name", "description", "body"} <= form.keys()
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert any("fpn-fast info --json" in field["attributes"]["label"] for field in fields)
