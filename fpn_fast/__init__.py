# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for Feature Pyramid Network detectors, behind drop-in modules.

>>> import fpn_fast
>>> report = fpn_fast.accelerate(model)  # a torchvision detector, in place  # doctest: +SKIP
"""

import importlib
from typing import Any

from fpn_fast import backends, nn, ops, reference
from fpn_fast._version import __version__
from fpn_fast.integrations import Report, accelerate, restore

__all__ = [
    "Report",
    "StaticDetector",
    "StaticTraining",
    "__version__",
    "accelerate",
    "backends",
    "nn",
    "ops",
    "reference",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in ("StaticDetector", "StaticTraining"):
        # Not imported above, because they need torchvision.
        module = "static_detector" if name == "StaticDetector" else "static_training"
        return getattr(importlib.import_module(f"fpn_fast.nn.{module}"), name)
    if name == "profile":
        # Nor this one.
        return importlib.import_module("fpn_fast.profile")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
