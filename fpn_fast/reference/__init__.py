# SPDX-License-Identifier: Apache-2.0
"""The executable specification: every op in plain PyTorch, as torchvision computes it."""

from fpn_fast.reference.top_down import top_down, upsample_add

__all__ = ["top_down", "upsample_add"]
