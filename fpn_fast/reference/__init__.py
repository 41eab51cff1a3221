# SPDX-License-Identifier: Apache-2.0
"""The executable specification: every op in plain PyTorch, as torchvision computes it."""

from fpn_fast.reference.multiscale_roi_align import assign_levels, multiscale_roi_align, multiscale_roi_align_backward
from fpn_fast.reference.top_down import top_down, upsample_add

__all__ = ["assign_levels", "multiscale_roi_align", "multiscale_roi_align_backward", "top_down", "upsample_add"]
