# SPDX-License-Identifier: Apache-2.0
"""The CUDA compiler and disassembler for tests that read machine code: no GPU needed; skips without the tools."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
from pathlib import Path

import pytest


def _toolkit_folders() -> list[Path]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [Path(home) / "bin" for home in homes if home]


def _find(tool: str, folders: list[Path]) -> str | None:
    return shutil.which(tool) or next((str(f / tool) for f in folders if os.access(f / tool, os.X_OK)), None)


@functools.cache
def nvcc() -> str:
    path = _find("nvcc", _toolkit_folders())
    if path is None:
        pytest.skip("no nvcc to compile the CUDA kernels with")
    return path


@functools.cache
def cuobjdump() -> str:
    folders = _toolkit_folders()
    # Triton's wheel carries one, in case the toolkit does not.
    triton = importlib.util.find_spec("triton")
    for location in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(location) / "backends" / "nvidia" / "bin")
    path = _find("cuobjdump", folders)
    if path is None:
        pytest.skip("no cuobjdump to disassemble the CUDA kernels with")
    return path


@functools.cache
def nvcc_version() -> str:
    return subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def architectures() -> frozenset[str]:
    """What this nvcc can compile for, such as sm_90."""
    listed = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return frozenset(listed.split())
