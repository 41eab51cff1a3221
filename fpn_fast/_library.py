# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled library: schemas and CPU kernels, then the CUDA kernels where torch has CUDA.

What the library says of itself comes through C functions and ctypes, which work in every Python.
"""

from __future__ import annotations

import ctypes
import json
import logging
import mmap
import re
from pathlib import Path
from typing import Any

import torch

# The stable interface that the library is compiled against begins there.
if tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2]) < (2, 11):
    raise ImportError(
        f"fpn_fast needs torch 2.11 or newer, and this is torch {torch.__version__}; run `pip install 'torch>=2.11'`"
    )

_FOLDER = Path(__file__).parent

#: Why the part for a device type is not loaded; None where it is.
problems: dict[str, str | None] = {}


def path(name: str) -> Path:
    """Path of the compiled file `name` ("_C" or "_C_cuda"), whether or not it is there."""
    return _FOLDER / f"{name}.abi3.so"


def build_facts() -> dict[str, str] | None:
    """Compiler, torch, CUDA ("none" without), GPU architectures and Python of the build; None without a library."""
    if not path("_C").exists():
        return None
    read = ctypes.CDLL(str(path("_C"))).fpn_fast_build_facts
    read.restype = ctypes.c_char_p
    return json.loads(read())


class _KernelAttributes(ctypes.Structure):
    """csrc/cuda/kernel_table.cu: struct KernelAttributes."""

    _fields_ = (
        ("name", ctypes.c_char * 128),
        ("threads", ctypes.c_int),
        ("registers", ctypes.c_int),
        ("shared_bytes", ctypes.c_int),
        ("local_bytes", ctypes.c_int),
        ("occupancy", ctypes.c_double),
    )


def kernel_attributes() -> list[dict[str, Any]]:
    """Name, threads, registers, shared_bytes, local_bytes and occupancy (0 to 1) of each CUDA kernel.

    Raises:
        RuntimeError: the CUDA runtime reports an error, such as a machine without a GPU.
    """
    read = ctypes.CDLL(str(path("_C_cuda"))).fpn_fast_kernel_attributes
    found: list[dict[str, Any]] = []
    attributes = _KernelAttributes()
    while (status := read(len(found), ctypes.byref(attributes))) == 0:
        values = {name: getattr(attributes, name) for name, _ in _KernelAttributes._fields_}
        found.append({**values, "name": attributes.name.decode()})
    if status > 0:  # -1 marks the end of the table
        raise RuntimeError(f"the CUDA runtime reports error {status}")
    return found


def _other_cuda(name: str) -> str | None:
    """Why the file `name` cannot be loaded: it is built for another CUDA major version than torch."""
    with path(name).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        needed = re.search(rb"libcudart\.so\.(\d+)", content)
        built = needed[1].decode() if needed else None
    if built is None or built == (torch.version.cuda or "").partition(".")[0]:
        return None
    return (
        f"fpn_fast's CUDA kernels are built for CUDA {built}, and torch {torch.__version__} for CUDA "
        f"{torch.version.cuda}; install a torch for CUDA {built}, or build fpn_fast for this torch with "
        "`pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout"
    )


def _load(name: str, absent: str) -> str | None:
    if not path(name).exists():
        return absent
    try:
        torch.ops.load_library(str(path(name)))
    except OSError as error:
        return f"the compiled library does not load: {error}; build it again with `pip install --no-build-isolation .`"
    return None


problems["cpu"] = _load(
    "_C",
    "fpn_fast was installed without its compiled library, because there was no C++ compiler; install g++ or clang++ "
    "and run `pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout",
)
if problems["cpu"] is not None:
    problems["cuda"] = problems["cpu"]
elif torch.version.cuda is None:
    problems["cuda"] = "this torch is built without CUDA; install a CUDA build of torch"
elif path("_C_cuda").exists() and (other := _other_cuda("_C_cuda")):
    problems["cuda"] = other
    # With a GPU, the only other sign would be a slow run.
    logging.getLogger("fpn_fast").warning(other)
else:
    problems["cuda"] = _load(
        "_C_cuda",
        "fpn_fast was built without CUDA kernels, because there was no CUDA toolkit; install CUDA toolkit "
        f"{torch.version.cuda} or set CUDA_HOME to it, and build again with FPN_FAST_CUDA=1",
    )
