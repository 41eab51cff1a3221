# SPDX-License-Identifier: Apache-2.0
"""Copies of the package whose CPU library is built from changed sources."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools.gpu_emulator import compiler, locked

ROOT = Path(__file__).resolve().parents[2]
_OPTIMISE = '"-O3", "-g0"'
_SOURCES = re.compile(r"^SOURCES = \[(.*?)\]", re.MULTILINE | re.DOTALL)


def sources() -> dict[str, str]:
    """What the library is built from, by path."""
    paths = [ROOT / "setup.py", *sorted((ROOT / "csrc").rglob("*"))]
    return {str(path.relative_to(ROOT)): path.read_text() for path in paths if path.is_file()}


def build(name: str, texts: dict[str, str], flags: tuple[str, ...]) -> Path:
    """A folder with a package whose library is of `texts`; built once for each content of them.

    The folder can be PYTHONPATH's, or the current one of `python -m`. flags: the compiler's, in place of those by
    which setup.py optimises. The sources are one translation unit: unoptimised, most of their time is the headers'.
    """
    setup, found = texts["setup.py"], _SOURCES.search(texts["setup.py"])
    if setup.count(_OPTIMISE) != 1 or found is None:
        raise ValueError(f"setup.py has not {_OPTIMISE} and a list of sources once")
    # Each has a device of its own for what all share.
    unit = [f'#define Cpu Cpu{i}\n#include "{path}"\n#undef Cpu\n'
            for i, path in enumerate(re.findall(r'"csrc/(.+?)"', found[1]))]  # fmt: skip
    setup = _SOURCES.sub('SOURCES = ["csrc/all.cpp"]', setup, count=1)
    setup = setup.replace(_OPTIMISE, ", ".join(f'"{flag}"' for flag in flags))
    texts = {**texts, "setup.py": setup, "csrc/all.cpp": "".join(unit)}
    parts = [torch.__version__, _compiler_version(), *texts, *texts.values()]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    copies = ROOT / "build" / name
    folder = copies / key[:16]
    with locked(copies / "lock"):
        if not (folder / "done").exists():
            for stale in copies.glob("*/"):
                shutil.rmtree(stale)
            for path, text in texts.items():
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_text(text)
            shutil.copy(ROOT / "pyproject.toml", folder)
            _copy_package(folder)
            command = [sys.executable, "setup.py", "build_ext", "--inplace"]
            environment = {**os.environ, "FPN_FAST_CUDA": "0"}
            built = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
            if built.returncode != 0:
                raise RuntimeError(f"{name}: the library does not compile:\n{built.stdout[-4000:]}")
            shutil.rmtree(folder / "build")
            (folder / "done").touch()
        # Of the checkout as it is now: the key is of what is compiled.
        _copy_package(folder)
    return folder


def _compiler_version() -> str:
    path = compiler()
    if path is None:
        pytest.skip("no g++ to compile the library with")
    return subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


def _copy_package(folder: Path) -> None:
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "fpn_fast", folder / "fpn_fast", ignore=ignored, dirs_exist_ok=True)
