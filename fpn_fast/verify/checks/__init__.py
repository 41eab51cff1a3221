# SPDX-License-Identifier: Apache-2.0
"""The checks of ``verify``, one per op and module.

To add one, write a function from a :class:`~fpn_fast.verify.draw.Draw` to a :class:`~fpn_fast.verify.trial.Trial`,
decorate it with :func:`register`, and import its module below.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fpn_fast.verify.draw import Draw
from fpn_fast.verify.trial import Trial

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Check:
    """The check of an op or module.

    draw: makes a case; ops: the registered ops behind it, of which a backend needs a kernel to be checked;
    backends: the only ones to check, None for all; keys: the sizes that a user's file may set.
    """

    name: str
    draw: Callable[[Draw], Trial]
    ops: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    keys: tuple[str, ...]
    backends: tuple[str, ...] | None


CHECKS: dict[str, Check] = {}


def register(
    name: str,
    *,
    ops: Sequence[str] = (),
    dtypes: Sequence[torch.dtype] = DTYPES,
    keys: Sequence[str] = (),
    backends: Sequence[str] | None = None,
    **options: Any,
) -> Callable[[Callable[..., Trial]], Callable[..., Trial]]:
    """Adds a function that draws trials to CHECKS as `name`. options: its keywords; ops: by default (name,)."""

    def add(function: Callable[..., Trial]) -> Callable[..., Trial]:
        draw = (lambda d: function(d, **options)) if options else function
        only = None if backends is None else tuple(backends)
        CHECKS[name] = Check(name, draw, tuple(ops) or (name,), tuple(dtypes), tuple(keys), only)
        return function

    return add


# These modules register their checks, with the names above.
from fpn_fast.verify.checks import (  # noqa: E402, F401
    bottom_up,
    detections,
    feature_pyramid,
    fused_maps,
    heads,
    roi_align,
    selection,
)

if importlib.util.find_spec("torchvision") is not None:
    from fpn_fast.verify.checks import torchvision_modules  # noqa: F401
