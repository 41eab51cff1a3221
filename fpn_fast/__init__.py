# SPDX-License-Identifier: Apache-2.0
"""Fused kernels for Feature Pyramid Networks, behind drop-in modules.

>>> import fpn_fast
>>> report = fpn_fast.accelerate(model)  # a torchvision detector, in place  # doctest: +SKIP
"""

from fpn_fast import backends, nn, ops, reference
from fpn_fast._version import __version__
from fpn_fast.integrations import Report, accelerate, restore

__all__ = ["Report", "__version__", "accelerate", "backends", "nn", "ops", "reference", "restore"]
