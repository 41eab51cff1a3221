# SPDX-License-Identifier: Apache-2.0
"""The ops in Triton, under ``fpn_fast_triton::`` with the schemas of ``fpn_fast::``. Imported when they can serve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fpn_fast import backends
from fpn_fast.ops._schemas import SCHEMAS

_library = torch.library.Library("fpn_fast_triton", "DEF")


def register(name: str, function: Callable[..., Any]) -> None:
    """Makes `function` the op `name` on CUDA tensors, and in the interpreter on CPU tensors."""
    _library.define(name + SCHEMAS[name])
    for device in ("CUDA", "CPU") if backends.triton_interprets() else ("CUDA",):
        _library.impl(name, function, device)


from fpn_fast.triton import (  # noqa: E402, F401  register their ops
    match_anchors,
    multiscale_roi_align,
    multiscale_roi_align_max,
    paste_masks,
    top_down,
)
