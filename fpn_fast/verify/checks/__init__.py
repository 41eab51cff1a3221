# SPDX-License-Identifier: Apache-2.0
"""What ``verify`` checks. To add an op, write a function from a :class:`~fpn_fast.verify.draw.Draw` to a
:class:`~fpn_fast.verify.trial.Trial` and put :func:`register` on it; modules of this package are imported below."""

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
    """An op or module as ``verify`` knows it.

    draw: makes case after case; ops: the registered ops behind it, without whose kernels a backend has no part in it;
    backends: None, or the only ones that make a difference; keys: the sizes that a user's file may give it.
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
    """Puts a function that draws trials into CHECKS as `name`; options are handed to it. ops: by default (name,)."""

    def add(function: Callable[..., Trial]) -> Callable[..., Trial]:
        draw = (lambda d: function(d, **options)) if options else function
        only = None if backends is None else tuple(backends)
        CHECKS[name] = Check(name, draw, tuple(ops) or (name,), tuple(dtypes), tuple(keys), only)
        return function

    return add


# They register themselves, and so need what is above.
from fpn_fast.verify.checks import (  # noqa: E402, F401
    detections,
    feature_pyramid,
    keypoints,
    losses,
    masks,
    proposals,
    roi_align,
    selection,
)

if importlib.util.find_spec("torchvision") is not None:
    from fpn_fast.verify.checks import torchvision_modules  # noqa: F401
