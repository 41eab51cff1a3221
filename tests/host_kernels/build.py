# SPDX-License-Identifier: Apache-2.0
"""Compiles the programs that run CUDA kernels on the CPU, once for each content of their sources."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "host_kernels"

COMMON_FLAGS = (
    "-std=c++20",
    # Reports name lines, not variables, whose places take half of a build to follow.
    "-g1",
    "-pthread",
    # A product and a sum stay two roundings, so that results are the same on every host.
    "-ffp-contract=off",
    # Kernels read runs of elements as one vector type, which CUDA allows.
    "-fno-strict-aliasing",
    "-Wall",
    "-Wextra",
    # nvcc's `#pragma unroll`.
    "-Wno-unknown-pragmas",
    "-include",
    str(HERE / "host_cuda.h"),
)

FLAVOURS = {
    "plain": ("-O1",),
    # Unoptimised: with any optimisation the sanitizers' checks take the compiler twice as long.
    "address": ("-O0", "-fsanitize=address,undefined,float-cast-overflow", "-fno-sanitize-recover=all"),
    "thread": ("-O0", "-fsanitize=thread"),
}

_INCLUDE = re.compile(r'^\s*#include "([^"]+)"', re.MULTILINE)


def sources(*files: Path) -> list[Path]:
    """`files` and all that they include by a quoted path, so that another op's kernel does not rebuild this program."""
    found: dict[Path, None] = {}
    pending = [file.resolve() for file in files]
    while pending:
        file = pending.pop()
        if file not in found:
            found[file] = None
            pending += [(file.parent / name).resolve() for name in _INCLUDE.findall(file.read_text())]
    return sorted(found)


def content_hash(files: list[Path], *more: str) -> str:
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        digest.update(f"\0{file.name}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds `path` as a lock between processes: the workers of a parallel test run build a program once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@functools.cache
def compiler() -> tuple[str, str]:
    """The host compiler and its version line; skips where there is none."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        pytest.skip("no g++ to compile the CUDA kernels for the host with")
    return path, subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


@functools.cache
def program(name: str, flavour: str = "plain") -> Path:
    """The compiled `<name>.cpp`."""
    source = HERE / f"{name}.cpp"
    path, version = compiler()
    flags = [*COMMON_FLAGS, *FLAVOURS[flavour]]
    flag_text = " ".join(flags).replace(str(HERE), "")
    key = content_hash(sources(source, HERE / "host_cuda.h"), version, flag_text)
    binary = BUILD / f"{name}-{flavour}-{key}"
    with locked(BUILD / f"{name}-{flavour}.lock"):
        if not binary.exists():
            for stale in BUILD.glob(f"{name}-{flavour}-*"):
                stale.unlink()
            # Built under another name, so that an interrupted build leaves nothing that looks finished.
            partial = binary.with_name(f"{name}-{flavour}.partial")
            built = subprocess.run([path, *flags, str(source), "-o", str(partial)], capture_output=True, text=True)
            if built.returncode != 0:
                raise RuntimeError(f"{name}.cpp does not compile for the host ({flavour}):\n{built.stderr}")
            partial.rename(binary)
    return binary
