# SPDX-License-Identifier: Apache-2.0
"""Finds and loads the compiled library: schemas and CPU kernels, then the CUDA kernels where torch has CUDA."""

from __future__ import annotations

from pathlib import Path

import torch

_FOLDER = Path(__file__).parent

#: Why the part for a device type is not loaded; None where it is.
problems: dict[str, str | None] = {}


def path(name: str) -> Path:
    """Path of the compiled file `name` ("_C" or "_C_cuda"), whether or not it is there."""
    return _FOLDER / f"{name}.abi3.so"


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
    "the package was installed without its compiled library (no C++ compiler at the time); install g++ or clang++ and "
    "run `pip install --no-build-isolation --force-reinstall --no-deps .` in a checkout",
)
if problems["cpu"] is not None:
    problems["cuda"] = problems["cpu"]
elif torch.version.cuda is None:
    problems["cuda"] = "this torch is built without CUDA; install a CUDA build of torch"
else:
    problems["cuda"] = _load(
        "_C_cuda",
        "the compiled library has no CUDA kernels (no CUDA toolkit when it was built); install the CUDA toolkit of "
        f"torch's version ({torch.version.cuda}) or set CUDA_HOME, and build again with FPN_FAST_CUDA=1",
    )
